"""Log lines of the processes: one JSON object a line on standard error, or a readable line on a terminal.

One :class:`Log` per process, made by its composition root and handed on. A line is one ``write`` of less than a pipe's
atomic size, so that lines of several processes never mix; a line that cannot be written at once is dropped and
counted (SEMANTICS 11). Fields are for names and numbers, never for secrets. What does not do: access lines, which are
native and have a sink of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from enum import IntEnum

import orjson

from ascproxy import clock
from ascproxy.telemetry.outlet import Outlet

Field = str | int | float | bool | None | list[str]
STDERR = 2
MAX_LINE = 4096  # PIPE_BUF: a write up to this size is not interleaved with others


class Level(IntEnum):
    """How much a line matters."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


COLOURS = {Level.DEBUG: "\x1b[2m", Level.INFO: "", Level.WARNING: "\x1b[33m", Level.ERROR: "\x1b[31m"}
RESET = "\x1b[0m"


class Log:
    """Lines of one process. ``dropped`` counts those that found a full sink."""

    def __init__(
        self,
        process: str,
        *,
        outlet: Outlet | None = None,
        readable: bool | None = None,
        level: Level = Level.INFO,
        wall_ns: Callable[[], int] = clock.wall_ns,
    ) -> None:
        self.process = process
        self.dropped = 0
        self._outlet = outlet or Outlet(STDERR)
        self._readable = self._outlet.terminal if readable is None else readable
        self._level = level
        self._wall_ns = wall_ns

    def named(self, process: str) -> Log:
        """The same sink for another process: what a forked worker uses."""
        return Log(process, outlet=self._outlet, readable=self._readable, level=self._level, wall_ns=self._wall_ns)

    def debug(self, message: str, **fields: Field) -> None:
        self._line(Level.DEBUG, message, fields)

    def info(self, message: str, **fields: Field) -> None:
        self._line(Level.INFO, message, fields)

    def warning(self, message: str, **fields: Field) -> None:
        self._line(Level.WARNING, message, fields)

    def error(self, message: str, **fields: Field) -> None:
        self._line(Level.ERROR, message, fields)

    def _line(self, level: Level, message: str, fields: dict[str, Field]) -> None:
        if level < self._level:
            return
        at = datetime.fromtimestamp(self._wall_ns() / 1e9, UTC)
        render = _readable if self._readable else _json
        line = render(at, level, self.process, message, fields)
        if len(line) > MAX_LINE:
            line = render(at, level, self.process, message[:1000] + "...", {})
        try:
            self._outlet.write(line)
        except OSError:  # full (EAGAIN) or gone: a log must never stop a process
            self.dropped += 1


def _json(at: datetime, level: Level, process: str, message: str, fields: dict[str, Field]) -> bytes:
    head = {"time": at.isoformat(timespec="milliseconds"), "level": level.name.lower(), "process": process}
    return orjson.dumps({**head, "message": message, **fields}) + b"\n"


def _readable(at: datetime, level: Level, process: str, message: str, fields: dict[str, Field]) -> bytes:
    shown = "".join(f"  {name}={_value(value)}" for name, value in fields.items())
    text = f"{at:%H:%M:%S} {level.name.lower():7} {process:10} {_printable(message)}{shown}"
    return f"{COLOURS[level]}{text}{RESET if COLOURS[level] else ''}\n".encode()


def _value(value: Field) -> str:
    return _printable("; ".join(value) if isinstance(value, list) else str(value))


def _printable(text: str) -> str:
    """Control characters escaped: what a peer sent must not drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
