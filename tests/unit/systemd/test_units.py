"""The units: systemd reads them without a word, and their exposure is what we promise."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ascproxy.model.node import Limits
from ascproxy.supervisor.__main__ import LOAD_TIMEOUT_MS, MEET_TIMEOUT_MS

FOLDER = Path(__file__).parents[3] / "systemd"
EXPOSURE = 15  # 1.5, as --threshold takes it
SUPERVISORS = ("ascproxy-gateway.service", "ascproxy.service")
SERVICES = (*SUPERVISORS, "ascproxy-control.service")
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
    for unit in FOLDER.glob("ascproxy*.*"):
        # The program is not installed where the tests run, and that is all that may be missing.
        text = unit.read_text().replace("/opt/ascproxy/current/bin/ascproxy", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    done = analyze("verify", *(str(path) for path in sorted(tmp_path.iterdir())))
    assert (done.returncode, done.stderr) == (0, "")


@needs_analyze
@pytest.mark.parametrize("name", SERVICES)
def test_the_exposure_is_at_most_1_5(name: str) -> None:
    service = str(FOLDER / name)
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", service)
    assert done.returncode == 0, done.stdout
    assert f"Overall exposure level for {name}" in done.stdout


@needs_analyze
@pytest.mark.parametrize("name", SERVICES)
def test_that_check_bites(tmp_path: Path, name: str) -> None:
    weak = tmp_path / name
    text = (FOLDER / name).read_text()
    for setting in ("NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict"):
        assert f"\n{setting}\n" in text
        text = text.replace(f"\n{setting}\n", "\n")
    weak.write_text(text)
    assert analyze("security", "--offline=true", f"--threshold={EXPOSURE}", str(weak)).returncode == 1


@pytest.mark.parametrize("name", SUPERVISORS)
def test_a_stop_is_given_the_time_of_the_longest_drain(name: str) -> None:
    longest_s = max(Limits().drain_unary_ms, Limits().drain_stream_ms) // 1000
    assert int(settings(name)["TimeoutStopSec"][0]) > longest_s + 5, "and the grace after it"


@pytest.mark.parametrize("name", SUPERVISORS)
def test_only_the_supervisor_is_signalled(name: str) -> None:
    """Workers die by SIGTERM; they are drained by their mailbox instead."""
    found = settings(name)
    assert found["KillMode"] == ["mixed"]
    assert found["NotifyAccess"] == ["main"]


def test_the_two_units_name_each_other_and_meet_in_one_place() -> None:
    gateway, control = settings("ascproxy-gateway.service"), settings("ascproxy-control.service")
    commands = {name: found["ExecStart"][0].split() for name, found in (("gateway", gateway), ("control", control))}
    options = {name: dict(zip(words[3::2], words[4::2], strict=True)) for name, words in commands.items()}
    assert options["gateway"]["--peer"] == control["User"][0]
    assert options["control"]["--peer"] == gateway["User"][0]
    assert gateway["User"] != control["User"]
    assert gateway["Group"] == control["Group"]
    assert (
        options["gateway"]["--run-dir"] == options["control"]["--run-dir"] == f"/run/{gateway['RuntimeDirectory'][0]}"
    )
    assert gateway["ReadWritePaths"] == [f"/var/lib/{control['StateDirectory'][0]}"], (
        "read-only, it would not be locked"
    )
    assert [options[name]["--only"] for name in ("gateway", "control")] == ["gateway", "control"]


def test_the_gateway_waits_for_control_no_longer_than_its_start_may_take() -> None:
    may_take_s = (MEET_TIMEOUT_MS + LOAD_TIMEOUT_MS) / 1000
    assert int(settings("ascproxy-gateway.service")["TimeoutStartSec"][0]) > may_take_s
