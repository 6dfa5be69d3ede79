"""A snapshot: one complete, checked revision of everything that workers decide on, and its bytes.

The bytes are one JSON object with a layout version, written by control into a sealed memory file and read by every
worker (DESIGN 2, Reload). They hold no secret. :func:`encode` and :func:`decode` are inverse to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import orjson

from ascproxy.errors import AscproxyError
from ascproxy.model.node import Node
from ascproxy.model.provider import Credential, Provider
from ascproxy.model.route import Route
from ascproxy.model.tenant import Tenant

LAYOUT = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``revision`` is the first 12 hex digits of the SHA-256 of the canonical content."""

    revision: str
    node: Node
    tenants: tuple[Tenant, ...]
    credentials: tuple[Credential, ...]
    providers: tuple[Provider, ...]
    routes: tuple[Route, ...]


def encode(snapshot: Snapshot) -> bytes:
    """The bytes of a snapshot: ``{"layout": 1, "snapshot": {...}}``."""
    return orjson.dumps({"layout": LAYOUT, "snapshot": snapshot})


def decode(data: bytes | memoryview) -> Snapshot:
    """The snapshot in ``data``. Raises :class:`AscproxyError` for another layout or for bytes that are no snapshot."""
    try:
        document = orjson.loads(data)
        layout = document["layout"]
        if layout != LAYOUT:
            raise AscproxyError(f"snapshot has layout {layout}, this version reads layout {LAYOUT}")
        snapshot = _reader(Snapshot)(document["snapshot"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise AscproxyError(f"not a snapshot: {error}") from error
    assert isinstance(snapshot, Snapshot)
    return snapshot


@cache
def _reader(hint: Any) -> Callable[[Any], Any]:
    """What makes a value of the type from its document. Made once per type: a revision has thousands of values."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        (inner,) = (_reader(a) for a in get_args(hint) if a is not NoneType)
        return lambda raw: None if raw is None else inner(raw)
    if origin is tuple:
        item = _reader(get_args(hint)[0])
        return lambda raw: tuple(map(item, raw))
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        members = [(f.name, _reader(hints[f.name])) for f in fields(hint)]
        # A member that the version before did not know has its default: an upgrade hands its snapshots on.
        return lambda raw: hint(**{name: read(raw[name]) for name, read in members if name in raw})
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint
    return lambda raw: raw
