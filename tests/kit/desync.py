"""The vectors of http-desync-guardian as bytes: each names a request line and fields, ``Host`` and a body that fits are
added here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MISSING = "vectors/http-desync not found; set ASCPROXY_SHARED"


def folder() -> Path | None:
    """Where the vectors lie: $ASCPROXY_SHARED, or a folder named shared beside this repository or above it."""
    places = [Path(p) for p in [os.environ.get("ASCPROXY_SHARED")] if p]
    places += [parent / "shared" for parent in ROOT.parents]
    return next((p for p in (place / "vectors/http-desync" for place in places) if p.is_dir()), None)


def vectors() -> Iterator[Any]:
    """One parameter per vector, or one that is skipped for all to see."""
    where = folder()
    if where is None:
        yield pytest.param(None, marks=pytest.mark.skip(reason=MISSING))
        return
    for path in sorted(where.glob("*.yaml")):
        for n, vector in enumerate(yaml.safe_load(path.read_bytes())):
            yield pytest.param(vector, id=f"{path.stem}-{n}-{vector['name'][:40]}")


def wire(text: object) -> bytes:
    """Code points below 256 are bytes in these files, others are UTF-8."""
    try:
        return str(text).encode("latin-1")
    except UnicodeEncodeError:
        return str(text).encode()


def request(vector: dict[str, Any], *more: tuple[bytes, bytes], content: bytes = b"x") -> tuple[bytes, bytes]:
    """The bytes of the head, with ``more`` fields last, and of a body that fits its framing.

    ``content`` is the body in one chunk, or as much of it as a length says, filled up with its last byte.
    """
    fields = [(wire(h["name"]), wire(h["value"])) for h in vector["headers"] or []]
    if not any(name.strip().lower() == b"host" for name, _ in fields):
        fields.insert(0, (b"Host", b"example.com"))
    line = b" ".join(wire(vector[part]) for part in ("method", "uri", "version"))
    head = line + b"\r\n" + b"".join(b"%b:%b\r\n" % field for field in (*fields, *more)) + b"\r\n"
    lengths = [value.strip() for name, value in fields if name.strip().lower() == b"content-length"]
    if any(b"transfer-encoding" in name.lower() for name, _ in fields):
        return head, b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    length = min(int(lengths[0]), 1 << 20) if lengths and lengths[0].isdigit() else 0
    return head, content[:length].ljust(length, content[-1:])
