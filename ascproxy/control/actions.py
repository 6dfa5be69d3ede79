"""What an operator can do to API keys: one implementation for the local socket and for a command on a stopped service.

Documents in and out are those of the command line's ``--json`` (DESIGN 8). The caller serialises writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any

from ascproxy.auth import apikey
from ascproxy.clock import wall_ns
from ascproxy.errors import AscproxyError, UsageError
from ascproxy.model.key import KeyRow
from ascproxy.store.keys import KeyStore
from ascproxy.wire.operation import Operation

MEMBERS = {"tenant", "models", "operations", "expires_ms"}
MAX_SCOPE = 100
MAX_EXPIRES_MS = 253_402_300_799_000  # the last second that a date of four digits can say


def instant(ms: int | None) -> str | None:
    """ISO 8601 in UTC of milliseconds since 1970; None stays None."""
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class KeyActions:
    """Create, list and revoke keys in ``store``. ``wrote`` is called after each durable write."""

    def __init__(
        self,
        store: KeyStore,
        tenants: Callable[[], Collection[str]],
        *,
        wrote: Callable[[], None] = lambda: None,
        random: Callable[[int], bytes] = os.urandom,
        now_ns: Callable[[], int] = wall_ns,
    ) -> None:
        self._store = store
        self._tenants = tenants
        self._wrote = wrote
        self._random = random
        self._now_ns = now_ns

    def create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """A new key from ``{"tenant", "models", "operations", "expires_ms"}``; all but the tenant may be left out.

        Returns ``{"id", "api_key", "tenant", "expires"}``; the text of the key is nowhere else. Raises
        :class:`UsageError` for a document that is wrong.
        """
        now_ms = self._now_ns() // 1_000_000
        if unknown := sorted(set(wanted) - MEMBERS):
            raise UsageError(f"{unknown[0]} is not a member of a key; these are: {', '.join(sorted(MEMBERS))}")
        tenant = wanted.get("tenant")
        if not isinstance(tenant, str) or tenant not in self._tenants():
            known = ", ".join(sorted(self._tenants())) or "none"
            raise UsageError(f"there is no tenant {tenant!r} in the configuration; tenants: {known}")
        operations = _names(wanted, "operations")
        for operation in operations:
            if operation not in set(Operation):
                raise UsageError(f"there is no operation {operation!r}; operations: {', '.join(sorted(Operation))}")
        expires_ms = wanted.get("expires_ms")
        if expires_ms is not None and (type(expires_ms) is not int or not now_ms < expires_ms <= MAX_EXPIRES_MS):
            raise UsageError("a key must expire in the future, and before the year 10000")
        text, row = apikey.mint(
            tenant,
            models=_names(wanted, "models"),
            operations=operations,
            created_ms=now_ms,
            expires_ms=expires_ms,
            random=self._random,
        )
        self._store.put(row)
        self._wrote()
        return {"id": row.id, "api_key": text, "tenant": tenant, "expires": instant(expires_ms)}

    def list(self) -> list[dict[str, Any]]:
        """Every key, without its secret, in the order of ids."""
        now_ms = self._now_ns() // 1_000_000
        return [_shown(row, now_ms) for row in self._store.rows()]

    def revoke(self, key_id: str) -> dict[str, Any]:
        """Refuse a key from the next request on. Raises :class:`AscproxyError` if there is none of that id."""
        now_ms = self._now_ns() // 1_000_000
        row = self._store.revoke(key_id, now_ms)
        if row is None:
            raise AscproxyError(f"there is no key {key_id!r}; ascproxy key list shows them")
        self._wrote()
        return _shown(row, now_ms)


def _names(wanted: dict[str, Any], member: str) -> tuple[str, ...]:
    names = wanted.get(member) or []
    if not isinstance(names, list) or not all(isinstance(n, str) and 0 < len(n) <= 256 for n in names):
        raise UsageError(f"{member} must be a list of names")
    if len(names) > MAX_SCOPE:
        raise UsageError(f"{member} holds at most {MAX_SCOPE} names")
    return tuple(names)


def _shown(row: KeyRow, now_ms: int) -> dict[str, Any]:
    if row.revoked_ms is not None:
        state = "revoked"
    elif row.expires_ms is not None and row.expires_ms <= now_ms:
        state = "expired"
    else:
        state = "active"
    return {
        "id": row.id,
        "tenant": row.tenant,
        "state": state,
        "models": list(row.models),
        "operations": list(row.operations),
        "created": instant(row.created_ms),
        "expires": instant(row.expires_ms),
        "revoked": instant(row.revoked_ms),
    }
