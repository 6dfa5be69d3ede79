"""What a dialect answers, before and after it became bytes.

An :class:`Answer` is a body or a sequence of events, each with the tokens that it costs to make; :func:`render` turns
it into the exact pieces that go on the wire. Pacing and sending are the server's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# (tokens that must have been generated before this may leave, bytes)
Event = tuple[int, bytes]

REASONS = {
    200: b"OK",
    204: b"No Content",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    405: b"Method Not Allowed",
    415: b"Unsupported Media Type",
    422: b"Unprocessable Entity",
    424: b"Failed Dependency",
    429: b"Too Many Requests",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
}

LAST_CHUNK = b"0\r\n\r\n"


@dataclass(slots=True)
class Answer:
    """A status with a body, or with ``events`` (then ``body`` is None and the answer is a stream).

    ``extra`` is whole header lines with their CRLF, placed where the imitated server has them; ``bare`` leaves out the
    headers that vLLM's middlewares add after its authentication.
    """

    status: int = 200
    body: bytes | None = b""
    events: Iterator[Event] | None = None
    tokens: int = 0
    content_type: bytes | None = b"application/json"
    extra: bytes = b""
    bare: bool = False
    generates: bool = False


def status_line(status: int) -> bytes:
    """``HTTP/1.1 STATUS REASON`` with its CRLF."""
    return b"HTTP/1.1 %d %b\r\n" % (status, REASONS[status])


def chunk(data: bytes) -> bytes:
    """One HTTP chunk (RFC 9112, 7.1), with a lower-case size as uvicorn writes it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def render(answer: Answer, head: bytes, size: int = 0) -> Iterator[Event]:
    """The pieces of ``answer`` behind ``head``: a unary answer is one, a stream is head, chunks, last chunk.

    ``size`` > 0 cuts the stream into chunks of that many bytes, whatever the events' boundaries are.
    """
    if answer.events is None:
        return iter([(answer.tokens, head + (answer.body or b""))])
    return _stream(head, answer.events if size == 0 else _resize(answer.events, size))


def _stream(head: bytes, events: Iterator[Event]) -> Iterator[Event]:
    yield 0, head
    for tokens, data in events:
        yield tokens, chunk(data)
    yield 0, LAST_CHUNK


def _resize(events: Iterator[Event], size: int) -> Iterator[Event]:
    held, tokens = bytearray(), 0
    for cost, data in events:
        held += data
        tokens += cost
        while len(held) >= size:
            yield tokens, bytes(held[:size])
            del held[:size]
            tokens = 0
    if held:
        yield tokens, bytes(held)
