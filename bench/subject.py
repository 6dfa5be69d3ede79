"""A subject: something that stands between the load and the stub, and `bare`, which is nothing."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from bench import machine

MODEL = "bench"


@dataclass(frozen=True, slots=True)
class Place:
    """What a subject is given: its core (or cores), the stub behind it, a folder on a tmpfs for logs, one on disk for
    state. `tls`: the callers come by TLS, for a subject that can listen in one way at a time; `callers`: how many
    connections they have."""

    core: int | set[int]
    upstream_port: int
    logs: Path
    state: Path
    tls: bool = False
    callers: int = 64


@dataclass
class Subject:
    """Started fresh for each measurement by `start`, ended by `stop`. Ports are on 127.0.0.1; `tls_port` 0: no TLS."""

    place: Place
    port: int = 0
    tls_port: int = 0
    key: str = "none"
    child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    name = ""
    answers_within_s = 60.0  # for all of the load's connections to have had an answer
    rewrites = False  # its answers are made anew, so that their length is its own

    @classmethod
    def missing(cls) -> str | None:
        """Why this subject cannot run here, as a sentence with the line that installs it; None when it can."""
        return None

    @classmethod
    def version(cls) -> str:
        """For the head of the table."""
        return ""

    def start(self) -> None:
        """Returns when the subject serves. Raises machine.StartError."""

    def workers(self) -> list[int]:
        """The processes on the data path, of those in the tree."""
        return [self.pid] if self.pid is not None else []

    def pause(self) -> None:
        """Its turn is over: from now on it must not use the core that the next one is measured on."""

    def resume(self) -> None:
        """Its turn begins."""

    def stop(self) -> None:
        """Ends every process of the subject."""
        if self.child is not None:
            machine.stop(self.child)
            self.child = None

    @property
    def pid(self) -> int | None:
        """Root of the process tree to account for; None: there is none."""
        return self.child.pid if self.child is not None else None


class Bare(Subject):
    """The load talks to the stub: the most that the two can do, and the latency that is not the proxy's."""

    name = "bare"

    def start(self) -> None:
        """Nothing to start."""
        self.port = self.place.upstream_port
