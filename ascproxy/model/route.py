"""Routes: what callers ask for, and the targets that may answer, in order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A provider to ask. ``model`` None sends the name that the caller asked for."""

    provider: str
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """``models`` are names or globs (``*``, ``?``). ``operations`` and ``tenants`` empty means all. ``usage``: a caller
    sees the usage of its stream if it ``asked`` for it, or always at the end (``final``)."""

    name: str
    models: tuple[str, ...]
    targets: tuple[Target, ...]
    operations: tuple[str, ...] = ()
    tenants: tuple[str, ...] = ()
    max_body: int = 32 * 1024 * 1024
    retry_ambiguous: bool = False
    usage: str = "asked"
    first_byte_ms: int | None = None
    between_tokens_ms: int | None = None
    total_ms: int | None = None
