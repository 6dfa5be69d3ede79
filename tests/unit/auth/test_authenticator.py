"""Credentials to principals: what is remembered, and when it stops being true (DESIGN D12)."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest

from ascproxy.auth.authenticator import Authenticator
from ascproxy.model.key import KeyRow, Principal
from tests.kit.snapshots import KEY, SECRET, key_row

MS = 1_000_000


class Store:
    """Counts how often it is asked."""

    def __init__(self, *rows: KeyRow) -> None:
        self.rows = {row.id: row for row in rows}
        self.epoch = 1
        self.lookups = 0
        self.now_ns = 1_000 * MS

    def lookup(self, key_id: str) -> KeyRow | None:
        self.lookups += 1
        return self.rows.get(key_id)

    def authenticator(self, **more: Any) -> Authenticator:
        return Authenticator(self.lookup, lambda: self.epoch, lambda: self.now_ns, **more)


def bearing(credential: str | None) -> Any:
    """A stream with that credential."""
    raw = None if credential is None else credential.encode()
    return SimpleNamespace(credential=raw, credential_digest=None if raw is None else hashlib.sha256(raw).digest())


def test_a_valid_key_is_looked_up_once_per_epoch() -> None:
    store = Store(key_row(models=("m",), operations=("embeddings",)))
    a = store.authenticator()
    first = a.authenticate(bearing(KEY))
    assert first == Principal("acme", "k1", ("m",), ("embeddings",), None, b'"tenant":"acme","key":"k1"')
    assert a.authenticate(bearing(KEY)) is first
    assert store.lookups == 1
    store.epoch += 1
    assert a.authenticate(bearing(KEY)) == first
    assert store.lookups == 2


@pytest.mark.parametrize(
    "credential", [None, "", "x", "asc_", "asc_k1_", "asc_k1_short", KEY + "A", " " + KEY, KEY[:-1] + "B"]
)
def test_what_is_no_valid_key(credential: str | None) -> None:
    assert Store(key_row()).authenticator().authenticate(bearing(credential)) is None


def test_an_unknown_id_is_no_valid_key() -> None:
    assert Store().authenticator().authenticate(bearing(KEY)) is None


def test_refusals_are_not_remembered() -> None:
    store = Store()
    a = store.authenticator()
    assert a.authenticate(bearing(KEY)) is None
    store.rows["k1"] = key_row()
    assert a.authenticate(bearing(KEY)) is not None, "a key works as soon as the store has it"


def test_a_revoked_key_is_refused_from_the_next_epoch() -> None:
    store = Store(key_row())
    a = store.authenticator()
    assert a.authenticate(bearing(KEY)) is not None
    store.rows["k1"] = key_row(revoked_ms=999)
    store.epoch += 1
    assert a.authenticate(bearing(KEY)) is None


def test_a_row_read_while_the_epoch_moves_is_not_trusted_afterwards() -> None:
    """The key is revoked, and the epoch raised, between our reading of the epoch and of the row: the stale row may
    serve this request, never the next."""
    store = Store(key_row())
    a = store.authenticator()
    stale = store.lookup

    def lookup_during_revocation(key_id: str) -> KeyRow | None:
        row = stale(key_id)
        store.rows["k1"] = key_row(revoked_ms=999)
        store.epoch += 1
        return row

    a._key_lookup = lookup_during_revocation
    a.authenticate(bearing(KEY))
    a._key_lookup = stale
    assert a.authenticate(bearing(KEY)) is None


@pytest.mark.parametrize("cached", [False, True])
def test_a_key_expires_on_the_millisecond_cached_or_not(cached: bool) -> None:
    store = Store(key_row(expires_ms=2_000))
    a = store.authenticator()
    store.now_ns = 2_000 * MS - 1
    if cached:
        assert a.authenticate(bearing(KEY)) is not None
    store.now_ns += 1
    assert a.authenticate(bearing(KEY)) is None


def test_the_whole_credential_is_what_is_remembered() -> None:
    """LIMITS 3, CVE-2026-35030: never a prefix of it."""
    store = Store(key_row())
    a = store.authenticator()
    assert a.authenticate(bearing(KEY)) is not None
    for end in range(1, len(KEY)):
        assert a.authenticate(bearing(KEY[:end])) is None


def test_the_memory_is_bounded_and_forgets_the_least_recently_used() -> None:
    store = Store(*(key_row(f"k{n}") for n in range(3)))
    a = store.authenticator(capacity=2)
    keys = [f"asc_k{n}_{SECRET}" for n in range(3)]
    a.authenticate(bearing(keys[0]))
    a.authenticate(bearing(keys[1]))
    a.authenticate(bearing(keys[0]))
    a.authenticate(bearing(keys[2]))
    assert store.lookups == 3
    a.authenticate(bearing(keys[0]))
    assert store.lookups == 3
    a.authenticate(bearing(keys[1]))
    assert store.lookups == 4
