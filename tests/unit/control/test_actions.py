"""Keys as an operator handles them (DESIGN 8)."""

from __future__ import annotations

from pathlib import Path

import pytest

from ascproxy.auth import apikey
from ascproxy.control.actions import KeyActions
from ascproxy.errors import AscproxyError, UsageError
from ascproxy.store.env import open_store
from ascproxy.store.keys import KeyStore

NOW_MS = 1_790_000_000_000


@pytest.fixture
def world(tmp_path: Path):
    env = open_store(tmp_path, write=True)
    store = KeyStore(env)
    wrote: list[int] = []
    actions = KeyActions(store, lambda: ["acme"], wrote=lambda: wrote.append(1), now_ns=lambda: NOW_MS * 1_000_000)
    yield actions, store, wrote
    env.close()


def test_create_shows_the_text_once_and_stores_its_digest(world) -> None:
    actions, store, wrote = world
    made = actions.create({"tenant": "acme", "models": ["m-*"], "expires_ms": NOW_MS + 1000})
    assert made["expires"] == "2026-09-21T14:13:21Z"
    found = apikey.parse(made["api_key"].encode())
    assert found is not None
    row = store.get(found[0])
    assert row is not None
    assert apikey.matches(row, found[1])
    assert wrote == [1]
    (listed,) = actions.list()
    assert listed["state"] == "active"
    assert made["api_key"] not in repr(listed)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({}, "no tenant None"),
        ({"tenant": "nobody"}, "tenants: acme"),
        ({"tenant": "acme", "tenants": []}, "tenants is not a member"),
        ({"tenant": "acme", "operations": ["fly"]}, "no operation 'fly'"),
        ({"tenant": "acme", "models": "m"}, "models must be a list"),
        ({"tenant": "acme", "models": ["m"] * 101}, "at most 100"),
        ({"tenant": "acme", "expires_ms": NOW_MS}, "in the future"),
        ({"tenant": "acme", "expires_ms": True}, "in the future"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_stores_nothing(world, wanted: dict, reason: str) -> None:
    actions, store, wrote = world
    with pytest.raises(UsageError, match=reason):
        actions.create(wanted)
    assert list(store.rows()) == []
    assert wrote == []


def test_revoke(world) -> None:
    actions, _, wrote = world
    made = actions.create({"tenant": "acme"})
    assert actions.revoke(made["id"])["state"] == "revoked"
    assert len(wrote) == 2
    with pytest.raises(AscproxyError, match="no key 'nosuchkey000'"):
        actions.revoke("nosuchkey000")


def test_expired_keys_are_shown_as_such(world) -> None:
    actions, store, _ = world
    made = actions.create({"tenant": "acme", "expires_ms": NOW_MS + 1})
    late = KeyActions(store, lambda: ["acme"], now_ns=lambda: (NOW_MS + 2) * 1_000_000)
    assert [k["state"] for k in late.list() if k["id"] == made["id"]] == ["expired"]
