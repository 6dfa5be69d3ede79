"""The native parsers alone, for tests: bytes in, split as the caller likes, plain values out.

Not used by the service, whose core calls the same C functions directly.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

Pieces: TypeAlias = Sequence[bytes | bytearray | memoryview]

# Framing of a head.
NO_BODY: int
LENGTH: int
CHUNKED: int
TO_CLOSE: int
# Why a head was refused.
BAD_REQUEST: int
LINE_TOO_LONG: int
FIELDS_TOO_LARGE: int
BAD_VERSION: int
UNSUPPORTED_TE: int

def parse_request(
    data: bytes,
    seen: int = 0,
    head_request: bool = False,
    max_line: int = 8192,
    max_field: int = 16384,
    max_head: int = 32768,
    max_fields: int = 100,
) -> dict[str, Any] | tuple[int, str] | None:
    """None while partial, (reject, why) when refused, else what the head says: ``method target path query minor framing
    content_length keep_alive expect_continue upgrade head_len`` and ``fields``, a list of (name, value, id).

    ``seen`` bytes were already given to a call that returned None. ValueError when ``seen`` exceeds the data.
    """

def parse_response(
    data: bytes,
    seen: int = 0,
    head_request: bool = False,
    max_line: int = 8192,
    max_field: int = 16384,
    max_head: int = 32768,
    max_fields: int = 100,
) -> dict[str, Any] | tuple[int, str] | None:
    """As :func:`parse_request`, with ``status``; ``head_request``: the request was HEAD."""

CHUNK_MORE: int
CHUNK_END: int
CHUNK_BAD: int

def chunk_decode(pieces: Pieces, /) -> tuple[int, bytearray, int, int]:
    """(result, payload, bytes of input used, the decoder's own count of payload). Stops at the end or at an error."""

def chunk_size(length: int, /) -> bytes:
    """The size line of a chunk of ``length`` bytes."""

JSON_OK: int
JSON_SYNTAX: int
JSON_NOT_OBJECT: int
JSON_TRUNCATED: int
JSON_TRAILING: int
JSON_DUPLICATE: int
JSON_DEPTH: int
JSON_KEYS: int
JSON_NUMBER: int
JSON_FIELD: int

def json_request(
    pieces: Pieces, seed: int = 0, max_depth: int = 64, max_keys: int = 10000, max_digits: int = 64
) -> tuple[int, int, dict[str, Any]]:
    """(error, offset where the scan stopped, the members of ``json_fields`` in jsonscan.h)."""

# Dialects of answers.
NONE: int
OPENAI: int
MESSAGES: int
RESPONSES: int
TGI: int
# Why generation finished.
FINISH_NONE: int
FINISH_STOP: int
FINISH_LENGTH: int
FINISH_TOOL: int
FINISH_FILTER: int
FINISH_ABORT: int
FINISH_ERROR: int
FINISH_OTHER: int

def json_answer(pieces: Pieces, dialect: int, /) -> tuple[bool, dict[str, Any]]:
    """(it was JSON so far, the members of ``json_facts`` in jsonscan.h)."""

def sse(pieces: Pieces, dialect: int, /) -> tuple[int, dict[str, Any]]:
    """(events that ended, the public members of ``sse_scanner`` in sse.h)."""

def sse_events(pieces: Pieces, dialect: int, /) -> list[tuple[int, tuple[int, int] | None, dict[str, Any]]]:
    """For each event: the offset behind it, where its usage member lies, and its facts."""
