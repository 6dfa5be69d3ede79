"""The units: systemd reads them without a word, and their exposure is what we promise."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ascproxy.model.node import Limits

FOLDER = Path(__file__).parents[3] / "systemd"
EXPOSURE = 15  # 1.5, as --threshold takes it
needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze here: apt-get install systemd"
)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def settings(name: str) -> dict[str, list[str]]:
    """All values of each setting of a unit."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@needs_analyze
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    for unit in FOLDER.glob("ascproxy.*"):
        # The program is not installed where the tests run, and that is all that may be missing.
        text = unit.read_text().replace("/opt/ascproxy/current/bin/ascproxy", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    done = analyze("verify", *(str(path) for path in sorted(tmp_path.iterdir())))
    assert (done.returncode, done.stderr) == (0, "")


@needs_analyze
def test_the_exposure_is_at_most_1_5() -> None:
    service = str(FOLDER / "ascproxy.service")
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", service)
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level for ascproxy.service" in done.stdout


@needs_analyze
def test_that_check_bites(tmp_path: Path) -> None:
    weak = tmp_path / "ascproxy.service"
    text = (FOLDER / "ascproxy.service").read_text()
    for setting in ("NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict"):
        assert f"\n{setting}\n" in text
        text = text.replace(f"\n{setting}\n", "\n")
    weak.write_text(text)
    assert analyze("security", "--offline=true", f"--threshold={EXPOSURE}", str(weak)).returncode == 1


def test_a_stop_is_given_the_time_of_the_longest_drain() -> None:
    longest_s = max(Limits().drain_unary_ms, Limits().drain_stream_ms) // 1000
    assert int(settings("ascproxy.service")["TimeoutStopSec"][0]) > longest_s + 5, "and the grace after it"


def test_only_the_supervisor_is_signalled() -> None:
    """Workers die by SIGTERM; they are drained by their mailbox instead."""
    found = settings("ascproxy.service")
    assert found["KillMode"] == ["mixed"]
    assert found["NotifyAccess"] == ["main"]
