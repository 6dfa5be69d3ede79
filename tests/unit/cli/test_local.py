"""Asking a service that is not there, or not quite (DESIGN 8: exit 3 means that nothing runs)."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from ascproxy.cli.local import LOCK, ask
from ascproxy.errors import AscproxyError, NotRunningError


def test_nothing_runs_without_a_lock(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="ascproxy serve DIR"):
        ask(tmp_path, "GET", "/status")
    (tmp_path / LOCK).touch()
    with pytest.raises(NotRunningError):
        ask(tmp_path, "GET", "/status")


def test_a_service_whose_control_is_away_is_running(tmp_path: Path) -> None:
    """Its workers serve: a key that was revoked in the store alone would be accepted by them."""
    with (tmp_path / LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AscproxyError, match="try again in a moment") as caught:
            ask(tmp_path, "GET", "/status")
    assert not isinstance(caught.value, NotRunningError)
