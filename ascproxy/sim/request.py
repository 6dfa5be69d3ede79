"""Requests as they come off a connection: a small strict HTTP/1.x reader, fed with whatever arrived.

Strict on purpose (RFC 9112): the simulator stands behind a gateway, and whatever is odd here is a finding about that
gateway, counted as ``malformed``. Obsolete line folding, bare line feeds, two lengths, unknown codings are all refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

import orjson

MAX_HEAD = 65536
MAX_BODY = 128 * 1024 * 1024

REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/1\.([01])")
FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")


class Malformed(Exception):
    """The bytes are no HTTP/1.x request; the text says why. The connection cannot be used further."""


@dataclass(slots=True)
class Request:
    """One request. ``headers`` has lower-case names, in order; ``head`` is the exact head without the blank line."""

    method: str
    target: str
    minor: int
    headers: list[tuple[str, str]]
    head: bytes
    body: bytes = b""
    path: str = field(init=False)
    query: str = field(init=False)
    _document: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        path, _, self.query = self.target.partition("?")
        self.path = unquote(path)

    def header(self, name: str) -> str | None:
        """The first value of the header ``name`` (lower case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def argument(self, name: str) -> str | None:
        """The value of ``name`` in the query, or None."""
        return dict(parse_qsl(self.query)).get(name) if self.query else None

    def document(self) -> Any:
        """The body as JSON, parsed once. Raises orjson.JSONDecodeError."""
        if self._document is None:
            self._document = orjson.loads(self.body)
        return self._document

    @property
    def keep_alive(self) -> bool:
        """Whether the client expects the connection to stay (RFC 9112, 9.3). HTTP/1.0: uvicorn always closes."""
        return self.minor == 1 and "close" not in (self.header("connection") or "").lower()


class Reader:
    """Turns bytes into requests, one at a time; what follows a request stays buffered (pipelining)."""

    __slots__ = ("_body", "_buffer", "_chunked", "_expects", "_need", "_request")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._request: Request | None = None
        self._need = 0
        self._chunked = False
        self._expects = False
        self._body = bytearray()

    @property
    def pending(self) -> bool:
        """Whether a request has begun to arrive and is not complete."""
        return bool(self._buffer) or self._request is not None

    def feed(self, data: bytes) -> None:
        """Append what arrived."""
        self._buffer += data

    def expects(self) -> bool:
        """Whether a 100 Continue is due now; true once per request that asked (RFC 9110, 10.1.1)."""
        due, self._expects = self._expects, False
        return due

    def next(self) -> Request | None:
        """The next complete request, or None until more arrives. Raises Malformed."""
        if self._request is None and not self._read_head():
            return None
        request = self._request
        assert request is not None
        if self._chunked:
            if not self._read_chunks():
                return None
            request.body = bytes(self._body)
            self._body.clear()
        else:
            if len(self._buffer) < self._need:
                return None
            if self._need:
                request.body = bytes(self._buffer[: self._need])
                del self._buffer[: self._need]
        self._request = None
        self._expects = False
        return request

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise Malformed("head too large")
            return False
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        line, *lines = head.split(b"\r\n")
        found = REQUEST_LINE.fullmatch(line)
        if found is None:
            raise Malformed("request line")
        headers: list[tuple[str, str]] = []
        for raw in lines:
            pair = FIELD_LINE.fullmatch(raw)
            if pair is None:
                raise Malformed("header line")
            headers.append((pair[1].decode("ascii").lower(), pair[2].decode("latin-1").rstrip(" \t")))
        self._request = Request(found[1].decode("ascii"), found[2].decode("ascii"), int(found[3]), headers, head)
        self._frame(self._request)
        return True

    def _frame(self, request: Request) -> None:
        lengths = [value for name, value in request.headers if name == "content-length"]
        codings = [value for name, value in request.headers if name == "transfer-encoding"]
        hosts = sum(name == "host" for name, _ in request.headers)
        if hosts > 1 or (request.minor == 1 and hosts == 0):
            raise Malformed("not exactly one Host")
        if codings and (lengths or len(codings) > 1 or codings[0].lower() != "chunked" or request.minor == 0):
            raise Malformed("transfer-encoding")
        if len(lengths) > 1 or (lengths and not (lengths[0].isascii() and lengths[0].isdigit())):
            raise Malformed("content-length")
        self._chunked = bool(codings)
        self._need = int(lengths[0]) if lengths else 0
        if self._need > MAX_BODY:
            raise Malformed("body too large")
        self._expects = request.minor == 1 and (request.header("expect") or "").lower() == "100-continue"

    def _read_chunks(self) -> bool:
        buffer = self._buffer
        while True:
            found = CHUNK_SIZE.match(buffer)
            if found is None:
                if b"\r\n" in buffer[:4096] or len(buffer) > 4096:
                    raise Malformed("chunk size")
                return False
            size, start = int(found[1], 16), found.end()
            if size == 0:
                return self._read_trailers(start)
            if len(self._body) + size > MAX_BODY:
                raise Malformed("body too large")
            if len(buffer) < start + size + 2:
                return False
            if buffer[start + size : start + size + 2] != b"\r\n":
                raise Malformed("chunk end")
            self._body += buffer[start : start + size]
            del buffer[: start + size + 2]

    def _read_trailers(self, start: int) -> bool:
        if self._buffer[start : start + 2] == b"\r\n":
            del self._buffer[: start + 2]
            return True
        end = self._buffer.find(b"\r\n\r\n", start)
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise Malformed("trailers too large")
            return False
        if not all(FIELD_LINE.fullmatch(raw) for raw in bytes(self._buffer[start:end]).split(b"\r\n")):
            raise Malformed("trailer line")
        del self._buffer[: end + 4]
        return True
