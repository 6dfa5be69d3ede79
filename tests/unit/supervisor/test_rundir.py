"""The run directory: one owner, its own files only, and pages that are repaired."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ascproxy import _native
from ascproxy.supervisor.rundir import RunDir, RunDirError


def test_it_is_private_locked_and_emptied(tmp_path: Path) -> None:
    first = RunDir(str(tmp_path / "a" / "run"))
    assert first.path.stat().st_mode & 0o777 == 0o700
    (first.path / "stale.sock").write_bytes(b"")
    with pytest.raises(RunDirError, match=r"already running, pid \d+"):
        RunDir(str(first.path))
    assert (first.path / "stale.sock").exists()
    first.close()
    assert not first.path.exists(), "what was made here is removed here"
    RunDir(str(first.path)).close()


def test_a_folder_that_was_there_stays_and_is_empty(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    run_dir.create_shared_page()
    run_dir.close()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one stops between our opening and our locking: we lock what is there then."""
    other = RunDir(str(tmp_path / "run"))
    taken, leaving = RunDir._take_lock, [other]

    def late(self: RunDir) -> None:
        while leaving:
            leaving.pop().close()
        taken(self)

    monkeypatch.setattr(RunDir, "_take_lock", late)
    mine = RunDir(str(tmp_path / "run"))
    with pytest.raises(RunDirError, match="already running"):
        RunDir(str(tmp_path / "run"))
    mine.close()


def test_a_folder_that_is_not_ours_is_not_emptied(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "precious").write_text("x")
    with pytest.raises(RunDirError, match="not ours"):
        RunDir(str(tmp_path))
    assert (tmp_path / "precious").read_text() == "x"


def test_a_folder_that_others_can_enter_is_closed_to_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # as RuntimeDirectory= makes it
    RunDir(str(tmp_path)).close()
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_a_group_may_look_in_where_that_is_asked_for(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path / "run"), 0o750)
    page = run_dir.create_shared_page()
    assert run_dir.path.stat().st_mode & 0o777 == 0o750
    modes = {path.name: path.stat().st_mode & 0o777 for path in run_dir.path.iterdir()}
    assert modes == {"lock": 0o600, "shared.page": 0o640}, "pages are read by the group, and written by nobody else"
    descriptor = run_dir.open_to_write(page)
    os.pwrite(descriptor, b"\x07", 4095)
    os.close(descriptor)
    assert page.memory[4095] == 7, "it is the same page"
    run_dir.close()


def test_a_damaged_page_starts_anew_and_a_sound_one_is_kept(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    file = run_dir.create_slot_page(3)
    cell = file.page.series(b"k", 1)
    file.page.add(cell, 7)
    assert not run_dir.repair(file, 3)
    assert file.page.load(cell) == 7
    file.memory[:64] = b"\xff" * 64
    assert run_dir.repair(file, 3)
    assert file.page.records() == []
    assert file.page.load(_native.Page.CELLS["slot"]) == 3
    run_dir.close()
