"""HTTP/2 load: h2load of nghttp2, whose words are read as it says them.

It checks the status of every answer. The length of an answer it only adds up: that is checked by a run of a fixed
number of requests before the load that is measured. It tells means of latencies, and no percentiles.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.subject import MODEL, Subject

PROGRAM = "h2load"
PACKAGE = "nghttp2-client"
PATH = "/v1/chat/completions"
BODY_BYTES = 1024  # as bench/load.c sends
# Warming up takes this much longer than the caller will wait, so that the window never opens before it looks.
SLACK_S = 0.25
PATIENCE_S = 60.0
BEGUN = "Main benchmark duration is started"
OVER = "Main benchmark duration is over"
UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6}


def missing() -> str | None:
    """Names the package."""
    return None if shutil.which(PROGRAM) else f"{PROGRAM} is not installed: apt-get install -y {PACKAGE}"


def body() -> bytes:
    """The request that the other lines send, too."""
    text = "What is a gateway? "

    def filled(length: int) -> bytes:
        content = (text * (length // len(text) + 1))[:length]
        message = {"role": "user", "content": content}
        made = {"model": MODEL, "max_tokens": 256, "temperature": 0, "messages": [message]}
        return json.dumps(made, separators=(",", ":")).encode()

    return filled(BODY_BYTES - len(filled(0)))


@dataclass(frozen=True, slots=True)
class Told:
    """What h2load says at its end. Latencies in microseconds; `data_bytes` are of the bodies."""

    protocol: str
    requests: int
    succeeded: int
    failed: int
    errored: int
    timeout: int
    statuses: dict[str, int]
    data_bytes: int
    mean_us: float
    max_us: float

    @property
    def wrong(self) -> int:
        """Requests without a good answer. What was cut or came too late is among the failed."""
        return self.failed + self.statuses["3xx"]

    def complaint(self) -> str:
        """What was wrong, in one line; empty when nothing was."""
        if not self.wrong:
            return ""
        by_status = ", ".join(f"{count} {status}" for status, count in self.statuses.items() if count)
        return f"{self.failed} failed, of them {self.errored} without an answer; answers: {by_status or 'none'}"


def _duration_us(text: str) -> float:
    found = re.fullmatch(r"([\d.]+)(us|ms|s)", text)
    if found is None:
        raise machine.StartError(f"{PROGRAM} names a duration {text!r} that this version of the benchmark cannot read")
    return float(found[1]) * UNITS[found[2]]


def parse(output: str) -> Told:
    """Reads the output of a run. Raises StartError when it is none, or not of HTTP/2."""

    def numbers(pattern: str) -> tuple[str, ...]:
        found = re.search(pattern, output, re.MULTILINE)
        if found is None:
            raise machine.StartError(
                f"{PROGRAM} did not say `{pattern.partition(':')[0].lstrip('^')}`:\n{output[-800:]}"
            )
        return found.groups()

    (protocol,) = numbers(r"^Application protocol: (\S+)$")
    if protocol not in {"h2", "h2c"}:
        raise machine.StartError(f"it does not speak HTTP/2, but {protocol}")
    counts = numbers(
        r"^requests: (\d+) total, \d+ started, \d+ done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout$"
    )
    statuses = numbers(r"^status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx$")
    (data,) = numbers(r"^traffic: .*\((\d+)\) data$")
    longest, mean = numbers(r"^time for request: +\S+ +(\S+) +(\S+)")
    requests, succeeded, failed, errored, timeout = (int(count) for count in counts)
    return Told(
        protocol,
        requests,
        succeeded,
        failed,
        errored,
        timeout,
        dict(zip(("2xx", "3xx", "4xx", "5xx"), map(int, statuses), strict=True)),
        int(data),
        _duration_us(mean),
        _duration_us(longest),
    )


class H2Load:
    """A load of `connections` with `streams` requests under way on each, for one window.

    `ready` checks, and sets it going; `begin` and `end` return when h2load opens and closes the window, so that CPU is
    read at these moments; `report` is what it came to, in the words of bench/load.c.
    """

    def __init__(
        self,
        subject: Subject,
        core: int | set[int],
        what: str,
        *,
        tls: bool,
        connections: int,
        streams: int,
        seconds: float,
        warmup: float,
        expect_bytes: int | None = None,
    ) -> None:
        request: Path = subject.place.logs / "request.json"
        request.write_bytes(body())
        port = subject.tls_port if tls else subject.port
        fields = {
            "authorization": f"Bearer {subject.key}",
            "accept": "application/json",
            "user-agent": "OpenAI/Python 2.0.0",
            "content-type": "application/json",
        }
        self.what = what
        self.core = core
        self.seconds = seconds
        self.in_flight = connections * streams
        self.expect_bytes = expect_bytes
        self.callers = [f"--clients={connections}", f"--max-concurrent-streams={streams}", f"--data={request}"]
        self.callers += [f"--header={name}: {value}" for name, value in fields.items()]
        self.callers.append(f"{'https' if tls else 'http'}://127.0.0.1:{port}{PATH}")
        self.span = [f"--duration={seconds * 1e3:.0f}ms", f"--warm-up-time={(warmup + SLACK_S) * 1e3:.0f}ms"]
        self.child: subprocess.Popen[bytes] | None = None
        self.said = b""

    @property
    def pid(self) -> int:
        """Of the running load."""
        assert self.child is not None
        return self.child.pid

    def ready(self, patience_s: float = PATIENCE_S) -> None:
        """Asks as often as the load will have requests under way, and starts it if all was well. Raises StartError."""
        self._start(f"--requests={self.in_flight}")
        self._read(None, patience_s)
        told = self._parsed()
        if told.wrong or told.succeeded != self.in_flight:
            raise machine.StartError(f"{self.what}: {told.complaint() or f'only {told.succeeded} answers'}")
        if self.expect_bytes is not None and told.data_bytes != self.expect_bytes * told.succeeded:
            raise machine.StartError(
                f"{self.what}: {told.succeeded} answers had {told.data_bytes:,} bytes, and not {self.expect_bytes} each"
            )
        self._start(*self.span)

    def begin(self) -> None:
        """Returns when the window opens. Raises StartError."""
        self._read(BEGUN, PATIENCE_S)

    def end(self) -> None:
        """Returns when the window closes. Raises StartError."""
        self._read(OVER, PATIENCE_S + self.seconds)

    def report(self) -> dict[str, Any]:
        """What happened in the window. Raises StartError."""
        self._read(None, PATIENCE_S)
        told = self._parsed()
        return {
            "seconds": self.seconds,
            "requests": told.succeeded,
            "errors": {"failed": told.wrong, "first": told.complaint()},
            "reconnects": 0,
            "lost": 0,
            "latency_us": {"mean": told.mean_us, "max": told.max_us},
        }

    def stop(self) -> None:
        """Ends it, if it has not ended."""
        if self.child is not None:
            machine.stop(self.child)
            if self.child.stdout is not None:
                self.child.stdout.close()
            self.child = None

    def _start(self, *how: str) -> None:
        self.stop()
        self.said = b""
        self.child = machine.launch(
            [PROGRAM, *how, *self.callers], self.core, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def _parsed(self) -> Told:
        try:
            return parse(self.said.decode(errors="replace"))
        except machine.StartError as error:
            raise machine.StartError(f"{self.what}: {error}") from None

    def _read(self, until: str | None, patience_s: float) -> None:
        """Collects what it says up to a line with these words, or to its end. Raises StartError."""
        assert self.child is not None
        assert self.child.stdout is not None
        out = self.child.stdout.fileno()
        deadline = time.monotonic() + patience_s
        while until is None or not re.search(rf"^{re.escape(until)}".encode(), self.said, re.MULTILINE):
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise machine.StartError(f"{self.what}: {PROGRAM} says nothing more{self._last()}")
            piece = os.read(out, 65536)
            self.said += piece
            if not piece and until is not None:
                raise machine.StartError(f"{self.what}: {PROGRAM} ended before it was measured{self._last()}")
            if not piece:
                return

    def _last(self) -> str:
        return f":\n{self.said[-800:].decode(errors='replace')}".rstrip()
