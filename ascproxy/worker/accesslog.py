"""Where access lines go: a file, or standard output, readable on a terminal. Never blocks (SEMANTICS 11).

The core batches lines as JSON, each ended by a newline. A sink that takes a part of them gets the rest next time, so
that no line is torn; while such a rest waits, newer lines are dropped whole and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from ascproxy.errors import AscproxyError
from ascproxy.telemetry.outlet import Outlet

STDOUT = "stdout"
NONE = "none"
RESET, DIM, RED, YELLOW = "\x1b[0m", "\x1b[2m", "\x1b[31m", "\x1b[33m"
FIRST = ("time", "method", "path", "status", "code")


@dataclass(slots=True)
class Sink:
    """``dropped`` counts lines that found the sink full."""

    outlet: Outlet
    readable: bool
    dropped: int = 0
    _rest: bytes = b""

    def write(self, lines: bytes) -> None:
        """Write whole lines, or drop and count them."""
        data = lines
        if self._rest:
            self._rest = self._put(self._rest)
            if self._rest:
                self.dropped += data.count(b"\n")
                return
        if not data:
            return
        if self.readable:
            data = b"".join(render(line) for line in data.splitlines())
        rest = self._put(data)
        if not rest:
            return
        # What is torn must be finished; whole lines behind it need not wait for a sink that is full.
        torn = b"" if len(rest) == len(data) or data[-len(rest) - 1 : -len(rest)] == b"\n" else _first_line(rest)
        self._rest = torn
        self.dropped += rest[len(torn) :].count(b"\n")

    def close(self) -> None:
        """Close what was opened."""
        self.outlet.close()

    def _put(self, data: bytes) -> bytes:
        """Write what goes at once; the rest."""
        try:
            return data[self.outlet.write(data) :]
        except BlockingIOError:
            return data
        except OSError:  # the reader is gone or the disk is full: the lines are lost, the service is not
            self.dropped += data.count(b"\n")
            return b""


def open_sink(place: str) -> Sink | None:
    """The sink of a node file's ``access_log``; None for ``none``. Raises AscproxyError if a file cannot be opened."""
    if place == NONE:
        return None
    if place == STDOUT:
        outlet = Outlet(1)
        return Sink(outlet, readable=outlet.terminal)
    try:
        return Sink(Outlet.appending(place), readable=False)
    except OSError as error:
        raise AscproxyError(f"cannot write access_log {place}: {(error.strerror or str(error)).lower()}") from error


def render(line: bytes) -> bytes:
    """One JSON access line for a human."""
    try:
        members = orjson.loads(line)
    except orjson.JSONDecodeError:
        return line + b"\n"
    if not isinstance(members, dict):
        return line + b"\n"
    status = members.get("status")
    colour = RED if isinstance(status, int) and status >= 500 else YELLOW if _odd(status) else ""
    head = " ".join(str(members[name]) for name in FIRST if members.get(name) not in (None, ""))
    rest = " ".join(
        f"{name}={value}" for name, value in members.items() if name not in FIRST and value not in (None, "")
    )
    return f"{colour}{_printable(head)}{RESET if colour else ''}  {DIM}{_printable(rest)}{RESET}\n".encode()


def _odd(status: object) -> bool:
    return isinstance(status, int) and status >= 400


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _first_line(data: bytes) -> bytes:
    end = data.find(b"\n")
    return data if end < 0 else data[: end + 1]
