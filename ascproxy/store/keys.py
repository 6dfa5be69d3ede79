"""API keys in the store: one row a key, found by its public id.

Row format (docs/formats/store.md): table ``keys``, key the id in ASCII, value a JSON object with the members
``tenant``, ``secret_sha256`` (hex), ``models``, ``operations``, ``created_ms``, ``expires_ms``, ``revoked_ms``. A
million keys cost a reader nothing: a look-up reads one page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import lmdb
import orjson

from ascproxy.model.key import KeyRow
from ascproxy.store.env import StoreError

_TABLE = b"keys"


class KeyStore:
    """Rows of one environment. Readers see a write as soon as it is committed."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        self._table: Any = None  # lmdb's handle, which its stubs do not name

    def get(self, key_id: str) -> KeyRow | None:
        """The row of ``key_id``, revoked ones too. Raises :class:`StoreError` when the store cannot be read."""
        try:
            table = self._open()
            if table is None:
                return None
            with self._reading(table) as txn:
                value = txn.get(key_id.encode())
        except lmdb.Error as error:
            raise StoreError(f"cannot read the store: {error}") from error
        return None if value is None else _row(key_id, value)

    def put(self, row: KeyRow) -> None:
        """Store ``row``, durably when this returns. Raises :class:`StoreError` when there is no room."""
        self.put_all((row,))

    def put_all(self, rows: Iterable[KeyRow]) -> None:
        """Store all of ``rows`` in one transaction: all, durably, when this returns, or none. Many go in much faster in
        the order of their ids. Raises :class:`StoreError` when there is no room."""
        try:
            table = self._open(create=True)
            with self._env.begin(db=table, write=True) as txn:
                for row in rows:
                    txn.put(row.id.encode(), _value(row))
        except lmdb.MapFullError as error:
            raise StoreError("the store is full (1 GiB): remove revoked or expired keys") from error
        except lmdb.Error as error:
            raise StoreError(f"cannot write the store: {error}") from error

    def revoke(self, key_id: str, now_ms: int) -> KeyRow | None:
        """Mark a key as revoked: the row as it is then, None if there is none. The first time counts."""
        row = self.get(key_id)
        if row is None:
            return None
        if row.revoked_ms is None:
            row = replace(row, revoked_ms=now_ms)
            self.put(row)
        return row

    def rows(self, tenant: str | None = None) -> Iterator[KeyRow]:
        """All rows in the order of their ids, or one tenant's. Raises :class:`StoreError` when one cannot be read."""
        try:
            table = self._open()
            if table is None:
                return
            with self._reading(table) as txn:
                for key_id, value in txn.cursor():
                    row = _row(key_id.decode(), value)
                    if tenant is None or row.tenant == tenant:
                        yield row
        except lmdb.Error as error:
            raise StoreError(f"cannot read the store: {error}") from error

    def _open(self, *, create: bool = False) -> Any:
        """The table; None while no key was ever stored."""
        if self._table is None:
            try:
                self._table = self._env.open_db(_TABLE, create=create)
            except (lmdb.NotFoundError, lmdb.ReadonlyError):
                return None
        return self._table

    def _reading(self, table: Any) -> lmdb.Transaction[bytes]:
        try:
            return self._env.begin(db=table)
        except lmdb.MapResizedError:  # a newer version of the writer uses a larger map
            self._env.set_mapsize(0)
            return self._env.begin(db=table)


def _value(row: KeyRow) -> bytes:
    return orjson.dumps(
        {
            "tenant": row.tenant,
            "secret_sha256": row.secret_sha256.hex(),
            "models": row.models,
            "operations": row.operations,
            "created_ms": row.created_ms,
            "expires_ms": row.expires_ms,
            "revoked_ms": row.revoked_ms,
        }
    )


def _row(key_id: str, value: bytes) -> KeyRow:
    try:
        raw = orjson.loads(value)
        return KeyRow(
            id=key_id,
            tenant=raw["tenant"],
            secret_sha256=bytes.fromhex(raw["secret_sha256"]),
            models=tuple(raw["models"]),
            operations=tuple(raw["operations"]),
            created_ms=raw["created_ms"],
            expires_ms=raw["expires_ms"],
            revoked_ms=raw["revoked_ms"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"the store's row of key {key_id} is damaged: restore a backup of the store") from error
