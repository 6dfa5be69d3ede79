"""The key table: rows survive, revocation is seen by other readers, and what is no store is refused (LIMITS 5)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from ascproxy.model.key import KeyRow
from ascproxy.store.env import StoreError, open_store
from ascproxy.store.keys import KeyStore

DOC = Path(__file__).parents[3] / "docs/formats/store.md"


def row(key_id: str = "abcdefghijkl", **more: object) -> KeyRow:
    values: dict = {"tenant": "acme", "secret_sha256": bytes(range(32)), "models": ("llama-*",), "created_ms": 1}
    return KeyRow(key_id, **(values | more))


def test_rows_survive_reopening(tmp_path: Path) -> None:
    env = open_store(tmp_path, write=True)
    KeyStore(env).put(row(expires_ms=7, operations=("embeddings",)))
    env.close()
    env = open_store(tmp_path, write=False)
    assert KeyStore(env).get("abcdefghijkl") == row(expires_ms=7, operations=("embeddings",))
    assert KeyStore(env).get("nosuchkey000") is None
    env.close()


def test_many_rows_go_in_together_or_not_at_all(tmp_path: Path) -> None:
    env = open_store(tmp_path, write=True)
    keys = KeyStore(env)
    keys.put_all(row(f"{n:012}") for n in range(1000))
    assert [r.id for r in keys.rows()] == [f"{n:012}" for n in range(1000)]

    def breaks_off() -> Iterator[KeyRow]:
        yield row("new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        keys.put_all(breaks_off())
    assert keys.get("new") is None
    env.close()


def test_a_reader_that_is_open_sees_what_is_written_later(tmp_path: Path) -> None:
    """Two processes, as in service: LMDB allows one environment a process."""
    open_store(tmp_path, write=True).close()
    down, up = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        keys = KeyStore(open_store(tmp_path, write=False))
        before = keys.get("abcdefghijkl")
        os.write(up[1], b"r")
        os.read(down[0], 1)
        after = keys.get("abcdefghijkl")
        os._exit(0 if before is None and after == row() else 1)
    assert os.read(up[0], 1) == b"r"
    env = open_store(tmp_path, write=True)
    KeyStore(env).put(row())
    os.write(down[1], b"w")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    env.close()
    for fd in (*down, *up):
        os.close(fd)


def test_revoking_keeps_the_first_time(tmp_path: Path) -> None:
    env = open_store(tmp_path, write=True)
    keys = KeyStore(env)
    keys.put(row())
    assert keys.revoke("abcdefghijkl", 10) == row(revoked_ms=10)
    assert keys.revoke("abcdefghijkl", 20) == row(revoked_ms=10)
    assert keys.revoke("nosuchkey000", 20) is None
    env.close()


def test_rows_come_in_order_and_by_tenant(tmp_path: Path) -> None:
    env = open_store(tmp_path, write=True)
    keys = KeyStore(env)
    assert list(keys.rows()) == []
    for key_id, tenant in (("bbbbbbbbbbbb", "x"), ("aaaaaaaaaaaa", "y"), ("cccccccccccc", "x")):
        keys.put(row(key_id, tenant=tenant))
    assert [r.id for r in keys.rows()] == ["aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"]
    assert [r.id for r in keys.rows("x")] == ["bbbbbbbbbbbb", "cccccccccccc"]
    env.close()


def test_modes_keep_others_out(tmp_path: Path) -> None:
    open_store(tmp_path / "state", write=True).close()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state/store.lmdb/data.mdb").stat().st_mode & 0o777 == 0o600


def test_a_shared_store_is_read_by_the_group_and_written_by_its_owner(tmp_path: Path) -> None:
    open_store(tmp_path, write=True).close()  # as init makes it
    open_store(tmp_path, write=True, shared=True).close()
    store = tmp_path / "store.lmdb"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (store, *store.iterdir())}
    assert modes == {"store.lmdb": 0o750, "data.mdb": 0o640, "lock.mdb": 0o660}


def test_no_store_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ascproxy init"):
        open_store(tmp_path, write=False)


def test_garbage_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    open_store(tmp_path, write=True).close()
    data = tmp_path / "store.lmdb/data.mdb"
    data.write_bytes(b"garbage" * 10_000)
    with pytest.raises(StoreError, match=r"store\.lmdb"):
        open_store(tmp_path, write=True)
    assert data.read_bytes().startswith(b"garbage")


def test_another_format_is_refused(tmp_path: Path) -> None:
    env = open_store(tmp_path, write=True)
    with env.begin(db=env.open_db(b"meta"), write=True) as txn:
        txn.put(b"format", b"99")
    env.close()
    with pytest.raises(StoreError, match="reads format 1"):
        open_store(tmp_path, write=True)


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"null", b'{"tenant":"acme"}', None])
def test_a_damaged_row_is_a_sentence_that_names_the_key(tmp_path: Path, value: bytes | None) -> None:
    env = open_store(tmp_path, write=True)
    keys = KeyStore(env)
    keys.put(row("aaaaaaaaaaaa"))
    keys.put(row("bbbbbbbbbbbb"))
    with env.begin(db=env.open_db(b"keys"), write=True) as txn:
        written = txn.get(b"bbbbbbbbbbbb")
        assert written is not None
        txn.put(b"bbbbbbbbbbbb", value if value is not None else written.replace(b"000102", b"00010x"))
    with pytest.raises(StoreError, match="row of key bbbbbbbbbbbb is damaged: restore"):
        keys.get("bbbbbbbbbbbb")
    with pytest.raises(StoreError, match="bbbbbbbbbbbb"):
        list(keys.rows())
    assert keys.get("aaaaaaaaaaaa") == row("aaaaaaaaaaaa")
    env.close()


def test_a_store_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    """Whatever LMDB raises; here because its environment was closed."""
    env = open_store(tmp_path, write=True)
    keys = KeyStore(env)
    keys.put(row())
    env.close()
    with pytest.raises(StoreError, match="cannot read the store"):
        keys.get("abcdefghijkl")
    with pytest.raises(StoreError, match="cannot read the store"):
        list(keys.rows())


def test_the_documented_row_is_what_is_written(tmp_path: Path) -> None:
    documented = DOC.read_text().split("```json\n")[1].split("\n```")[0]
    env = open_store(tmp_path, write=True)
    keys = KeyStore(env)
    raw = json.loads(documented)
    keys.put(row(secret_sha256=bytes.fromhex(raw["secret_sha256"]), created_ms=raw["created_ms"]))
    with env.begin(db=env.open_db(b"keys")) as txn:
        assert txn.get(b"abcdefghijkl") == documented.encode()
    env.close()


def test_a_full_store_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascproxy.store.env.MAP_SIZE", 1 << 16)
    env = open_store(tmp_path, write=True)
    keys = KeyStore(env)
    with pytest.raises(StoreError, match="full"):
        for n in range(1000):
            keys.put(row(f"{n:012}"))
    assert keys.get("000000000000") is not None
    env.close()
    assert isinstance(lmdb.version(), tuple)
