"""From a credential to a principal (DESIGN D12).

A valid key is found again by the SHA-256 of the whole credential, in a bounded least-recently-used map that holds for
one key epoch: the store raises the epoch with every change of keys, so a revoked key is refused on the next request.
Refusals are not remembered: one costs a parse and a look-up, and strangers could push callers out of a map they share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import orjson

from ascproxy.auth import apikey
from ascproxy.model.key import KeyRow, Principal

if TYPE_CHECKING:
    from ascproxy._native import Stream

CAPACITY = 65_536
MS = 1_000_000


class Authenticator:
    """Verifies credentials for one worker; used from its event-loop thread only.

    ``key_lookup`` gives the stored row of a key id, ``key_epoch`` the store's present epoch, ``wall_ns`` wall-clock
    nanoseconds since 1970 (expiry dates are of the wall clock).
    """

    __slots__ = ("_capacity", "_epoch", "_key_epoch", "_key_lookup", "_known", "_wall_ns")

    def __init__(
        self,
        key_lookup: Callable[[str], KeyRow | None],
        key_epoch: Callable[[], int],
        wall_ns: Callable[[], int],
        capacity: int = CAPACITY,
    ) -> None:
        self._key_lookup = key_lookup
        self._key_epoch = key_epoch
        self._wall_ns = wall_ns
        self._capacity = capacity
        self._known: OrderedDict[bytes, Principal] = OrderedDict()  # by credential digest; of self._epoch
        self._epoch = key_epoch()

    def authenticate(self, stream: Stream) -> Principal | None:
        """The principal of the stream's credential, or None for a missing, malformed, unknown, expired or revoked one:
        callers must not be able to tell these apart."""
        digest = stream.credential_digest
        if digest is None:
            return None
        # The epoch is read before the row: a key revoked in between is cached under the old epoch, and dropped.
        epoch = self._key_epoch()
        if epoch != self._epoch:
            self._known.clear()
            self._epoch = epoch
        principal = self._known.get(digest)
        if principal is None:
            return self._verify(digest, stream.credential)
        if principal.expires_ms is not None and self._wall_ns() >= principal.expires_ms * MS:
            del self._known[digest]
            return None
        self._known.move_to_end(digest)
        return principal

    def _verify(self, digest: bytes, credential: bytes | None) -> Principal | None:
        parsed = apikey.parse(credential) if credential is not None else None
        if parsed is None:
            return None
        key_id, secret_sha256 = parsed
        row = self._key_lookup(key_id)
        if row is None or not apikey.matches(row, secret_sha256) or row.revoked_ms is not None:
            return None
        if row.expires_ms is not None and self._wall_ns() >= row.expires_ms * MS:
            return None
        principal = principal_of(row)
        self._known[digest] = principal
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return principal


def principal_of(row: KeyRow) -> Principal:
    """The principal that a valid key of ``row`` makes."""
    log = orjson.dumps({"tenant": row.tenant, "key": row.id})[1:-1]
    return Principal(row.tenant, row.id, row.models, row.operations, row.expires_ms, log)
