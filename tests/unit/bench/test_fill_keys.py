"""Filling a store in bulk: all keys are there, and those that the callers get are good and spread over it."""

import stat
from pathlib import Path

import pytest

from ascproxy.auth import apikey
from ascproxy.store.env import open_store
from ascproxy.store.keys import KeyStore
from bench.fill_keys import fill, main


@pytest.mark.parametrize("batch", [7, 100, 1000])
def test_every_key_is_stored_and_the_callers_keys_are_found(tmp_path: Path, batch: int) -> None:
    told: list[int] = []
    texts = fill(tmp_path, 100, 10, "acme", told.append, batch=batch)
    assert told[-1] == 100
    env = open_store(tmp_path, write=False)
    rows = list(KeyStore(env).rows("acme"))
    env.close()
    assert len(rows) == 100
    assert len(set(texts)) == 10
    by_id = {row.id: row for row in rows}
    for text in texts:
        parsed = apikey.parse(text.encode())
        assert parsed is not None
        assert apikey.matches(by_id[parsed[0]], parsed[1])


def test_of_few_keys_all_call(tmp_path: Path) -> None:
    assert len(set(fill(tmp_path, 5, 1000, "acme", lambda _: None))) == 5


def test_the_command_writes_a_file_that_others_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "callers"
    assert main([str(tmp_path / "state"), "--count", "20", "--callers", "4", "--out", str(out)]) == 0
    assert len(out.read_text().split()) == 4
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert "20 of 20 keys" in capsys.readouterr().err


def test_a_state_that_is_no_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").touch()
    assert main([str(tmp_path / "state"), "--count", "1", "--out", str(tmp_path / "callers")]) == 1
    assert "cannot open the store" in capsys.readouterr().err
