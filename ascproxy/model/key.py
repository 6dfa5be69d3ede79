"""API keys: the stored row, and the principal that a valid key makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One API key as the store keeps it (DESIGN D12). The secret itself is stored nowhere.

    ``secret_sha256`` is the digest of the secret part; ``models`` (names or globs) and ``operations`` empty mean all;
    ``expires_ms`` is wall-clock milliseconds since 1970, None for never.
    """

    id: str
    tenant: str
    secret_sha256: bytes
    models: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    created_ms: int = 0
    expires_ms: int | None = None
    revoked_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. ``log`` is its fragment of the access line: JSON members without braces."""

    tenant: str
    id: str
    models: tuple[str, ...]
    operations: tuple[str, ...]
    expires_ms: int | None
    log: bytes
