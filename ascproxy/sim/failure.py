"""Deliberate failures, by name: how a model server lets a gateway down.

Some replace the answer (``busy``: the dialect's own refusal), some change what is generated (``abort`` and
``error-frame``: the dialect's own frames), the others damage the bytes, here, in :func:`damage`. ``--fail`` sets one
for every request, a model name ``NAME!KIND:ARG`` or the header ``x-sim-fail: KIND:ARG`` for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice

from ascproxy.errors import UsageError
from ascproxy.sim.answer import Event


class Kind(Enum):
    """Every failure with its name on the command line."""

    REFUSE = "refuse"
    RESET = "reset"
    BUSY = "busy"
    ERROR = "error"
    UNAUTHORIZED = "unauthorized"
    RATE_LIMITED = "rate-limited"
    ERROR_FRAME = "error-frame"
    HANG = "hang"
    STALL = "stall"
    COMMENTS = "comments"
    TRUNCATE = "truncate"
    ABORT = "abort"
    MALFORMED = "malformed"
    BAD_CHUNK = "bad-chunk"
    EXTRA_BYTES = "extra-bytes"
    SLOW_FIRST_BYTE = "slow-first-byte"
    HEADERS = "headers"
    INFORMATIONAL = "1xx"


# kind -> (what it does, default argument)
KINDS: dict[Kind, tuple[str, float]] = {
    Kind.REFUSE: ("the port refuses connections, open connections are reset", 0),
    Kind.RESET: ("reset the connection after N events", 0),
    Kind.BUSY: ("503 as vLLM with a full queue; 429 as an overloaded TGI", 0),
    Kind.ERROR: ("500", 0),
    Kind.UNAUTHORIZED: ("401", 0),
    Kind.RATE_LIMITED: ("429 with Retry-After: N seconds", 1),
    Kind.ERROR_FRAME: ("an error frame inside a 200 stream after N events, as when vLLM's engine dies", 2),
    Kind.HANG: ("read the request, answer nothing", 0),
    Kind.STALL: ("stop after N events (a body: N bytes), connection open", 2),
    Kind.COMMENTS: ("stop after N events, then SSE comments, ten a second", 2),
    Kind.TRUNCATE: ("close after N events (a body: N bytes), without a terminator", 2),
    Kind.ABORT: ("half an answer with finish_reason abort, as vLLM under SIGTERM", 0),
    Kind.MALFORMED: ("a status line that is none", 0),
    Kind.BAD_CHUNK: ("a chunk size that is no number, after N events", 1),
    Kind.EXTRA_BYTES: ("N bytes behind a complete answer", 16),
    Kind.SLOW_FIRST_BYTE: ("first byte only after N seconds", 1),
    Kind.HEADERS: ("N more bytes of headers", 65536),
    Kind.INFORMATIONAL: ("N informational heads first", 1),
}

INFORMATIONAL_HEAD = b"HTTP/1.1 103 Early Hints\r\nlink: </sim>; rel=preload\r\n\r\n"


class End(Enum):
    """What happens after the last piece."""

    KEEP = "keep the connection"
    CLOSE = "send FIN"
    RESET = "send RST"
    HANG = "do nothing, until the client goes"
    COMMENT = "send SSE comments, until the client goes"


@dataclass(frozen=True, slots=True)
class Failure:
    """A kind and its argument: events, bytes or seconds, see KINDS."""

    kind: Kind
    argument: float

    @staticmethod
    def parse(text: str) -> Failure:
        """From ``KIND`` or ``KIND:ARG``. Raises UsageError that names the kinds."""
        name, colon, argument = text.partition(":")
        try:
            kind = Kind(name)
        except ValueError:
            raise UsageError(f"{text!r}: known failures are {', '.join(k.value for k in Kind)}") from None
        try:
            value = float(argument) if colon else KINDS[kind][1]
        except ValueError:
            raise UsageError(f"{text!r}: {argument!r} is not a number") from None
        if not 0 <= value < 2**31:
            raise UsageError(f"{text!r}: the argument must be 0 or more")
        return Failure(kind, value)

    def __str__(self) -> str:
        return f"{self.kind.value}:{self.argument:g}"


@dataclass(slots=True)
class Reply:
    """The pieces to send, when the first may leave (seconds from now), and what comes after the last."""

    pieces: Iterator[Event]
    end: End
    delay: float = 0.0


def damage(failure: Failure, reply: Reply, head: bytes, *, stream: bool) -> Reply:
    """``reply`` as the failure wants it on the wire; kinds that are the dialect's matter return it untouched.

    ``head`` is the response head that the first piece begins with.
    """
    count = int(failure.argument)
    match failure.kind:
        case Kind.RESET:
            return Reply(_cut(reply.pieces, head, count, stream) if count else iter(()), End.RESET)
        case Kind.HANG:
            return Reply(iter(()), End.HANG)
        case Kind.STALL:
            return Reply(_cut(reply.pieces, head, count, stream), End.HANG)
        case Kind.COMMENTS:
            return Reply(_cut(reply.pieces, head, count, stream), End.COMMENT if stream else End.HANG)
        case Kind.TRUNCATE:
            return Reply(_cut(reply.pieces, head, count, stream), End.CLOSE)
        case Kind.MALFORMED:
            return Reply(
                _first(reply.pieces, lambda data: b"HTTP/one.one 2OO fine" + data[data.find(b"\r\n") :]), reply.end
            )
        case Kind.BAD_CHUNK:
            good = islice(reply.pieces, 1 + count)
            return Reply(chain(good, [(0, b"zz\r\nnot a chunk\r\n")], reply.pieces), reply.end)
        case Kind.EXTRA_BYTES:
            return Reply(chain(reply.pieces, [(0, b"x" * count)]), reply.end)
        case Kind.SLOW_FIRST_BYTE:
            return Reply(reply.pieces, reply.end, failure.argument)
        case Kind.HEADERS:
            at = head.find(b"\r\n") + 2
            return Reply(_first(reply.pieces, lambda data: data[:at] + _filler(count) + data[at:]), reply.end)
        case Kind.INFORMATIONAL:
            return Reply(chain([(0, INFORMATIONAL_HEAD * count)], reply.pieces), reply.end)
    return reply


def _cut(pieces: Iterator[Event], head: bytes, count: int, stream: bool) -> Iterator[Event]:
    if stream:
        return islice(pieces, 1 + count)
    return _first(pieces, lambda data: data[: len(head) + count])


def _first(pieces: Iterator[Event], change: Callable[[bytes], bytes]) -> Iterator[Event]:
    for tokens, data in islice(pieces, 1):
        yield tokens, change(data)
    yield from pieces


def _filler(size: int) -> bytes:
    """Header lines of ``size`` bytes in all (at least one line)."""
    lines = bytearray()
    while len(lines) < size:
        name = b"x-sim-filler-%d: " % len(lines)
        lines += name + b"f" * max(1, min(1000, size - len(lines) - len(name) - 2)) + b"\r\n"
    return bytes(lines)
