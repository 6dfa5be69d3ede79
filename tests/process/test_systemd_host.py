"""The unit on a booted systemd host: start, reload, upgrade, watchdog, stop. Run it with ``make test-systemd``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.host import ROOT, Host, install, missing, point_to, until
from tests.kit.service import command

pytestmark = [
    pytest.mark.skipif("ASCPROXY_SYSTEMD_HOST" not in os.environ, reason="takes minutes: make test-systemd"),
    pytest.mark.skipif(missing() is not None, reason=f"no systemd host can run here: {missing()}"),
    pytest.mark.timeout(600),
]
SIM_PORT, HTTPS, HTTP, METRICS = 8000, 8443, 8080, 9464
READY_S = 1.5
STARTS = 3


class Unit:
    """A unit on a host, and a simulator beside it."""

    def __init__(self, host: Host, facts: dict[str, Any], folder: Path, name: str) -> None:
        self.host = host
        self.facts = facts
        self.folder = folder
        self.name = name

    def show(self, name: str, unit: str | None = None) -> str:
        return self.host.run("systemctl", "show", "-P", name, unit or self.name).stdout.strip()

    def took_s(self) -> float:
        """From the execution to READY, the last time."""
        begin, end = (
            int(self.show(name)) for name in ("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
        )
        return (end - begin) / 1e6

    def status(self) -> dict[str, Any]:
        done = self.host.run("/opt/ascproxy/current/bin/ascproxy", "status", "--config", "/etc/ascproxy", "--json")
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    def workers(self) -> set[int]:
        return {worker["pid"] for worker in self.status()["workers"] if worker["state"] == "ready"}

    def journal(self) -> str:
        return self.host.run("journalctl", "-u", "ascproxy*", "-o", "cat", "--no-pager", check=False).stdout

    @contextmanager
    def load(self) -> Iterator[dict[str, Any]]:
        """Requests from the host's network as long as the block runs; what came of them afterwards."""
        given = {
            "key": self.facts["api_key"], "http_port": HTTP, "https_port": HTTPS, "ca": self.facts["ca"], "rate": 30
        }  # fmt: skip
        process = subprocess.Popen(
            self.host.within(sys.executable, "-m", "tests.kit.load", json.dumps(given)),
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found: dict[str, Any] = {}
        try:
            yield found
        finally:
            out, _ = process.communicate("")
        found.update(json.loads(out))


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    """A host with the one unit, not started yet."""
    with booted(tmp_path_factory.mktemp("host"), "ascproxy.service", "ascproxy") as made:
        yield made


@contextmanager
def booted(folder: Path, name: str, owner: str) -> Iterator[Unit]:
    """A host with the units installed as docs/install.md says, none started yet. ``owner``: who writes the store."""
    made = folder / "made"
    init = command(
        "init", str(made), "--upstream", f"http://127.0.0.1:{SIM_PORT}", "--model", "sim-chat", "--https-port",
        str(HTTPS), "--http-port", str(HTTP), "--metrics-port", str(METRICS), "--json",
    )  # fmt: skip
    assert init.returncode == 0, init.stderr
    host = Host(folder)
    if not (host.root / f"usr/bin/python3.{sys.version_info.minor}").exists():
        pytest.skip(f"the host has another Python than {sys.version}: run the tests with Debian's own")
    for version in ("0.1.0", "0.2.0"):
        install(host.root, version)
    point_to(host.root, "0.1.0")
    for kind in ("sysusers.d", "tmpfiles.d"):
        copy(ROOT / "systemd" / kind / "ascproxy.conf", host.root / "usr/lib" / kind / "ascproxy.conf")
    for file in (ROOT / "systemd").glob("ascproxy*.*"):
        copy(file, host.root / "etc/systemd/system" / file.name)
    socket_unit = host.root / "etc/systemd/system/ascproxy.socket"
    socket_unit.write_text(re.sub("(?m)^Service=.*$", f"Service={name}", socket_unit.read_text()))
    with host:
        host.run("systemd-sysusers")
        host.run("systemd-tmpfiles", "--create", "ascproxy.conf")
        move_configuration(made, host, owner)
        simulator = subprocess.Popen(
            host.within(
                sys.executable, "-m", "ascproxy.sim", "--port", str(SIM_PORT), "--model", "sim-chat", "--json",
                "--rate", "60", "--tokens", "12",
            ),
            cwd=ROOT, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert simulator.stdout is not None
        assert simulator.stdout.readline().startswith(b"{")
        try:
            yield Unit(host, json.loads(init.stdout), folder, name)
        finally:
            simulator.kill()
            simulator.wait()
            simulator.stdout.close()


def copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def move_configuration(made: Path, host: Host, owner: str) -> None:
    """What init made into /etc/ascproxy, its state into /var/lib/ascproxy; both owned as docs/install.md says."""
    node = made / "ascproxy.yaml"
    document = yaml.safe_load(node.read_text())
    node.write_text(yaml.safe_dump(document | {"state_dir": "/var/lib/ascproxy"}, sort_keys=False))
    host.run("mkdir", "-p", "/var/lib/ascproxy")
    for source, target in ((made / "state", "var/lib/ascproxy"), (made, "etc/ascproxy")):
        subprocess.run(["cp", "-a", f"{source}/.", str(host.root / target)], check=True)
    host.run("rm", "-rf", "/etc/ascproxy/state")
    host.run("chown", "-R", f"{owner}:ascproxy", "/var/lib/ascproxy")
    host.run("chown", "-R", "root:ascproxy", "/etc/ascproxy")
    host.run("chmod", "-R", "u=rwX,g=rX,o=", "/etc/ascproxy")


def test_it_starts_in_time_and_as_nobody_in_particular(unit: Unit) -> None:
    begin = unit.host.run("systemctl", "start", "ascproxy.service", check=False)
    assert begin.returncode == 0, unit.journal()
    assert unit.show("ActiveState") == "active"
    # What others have running takes its share of the processors, and a start is all computing.
    shares = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    took_s = [unit.took_s()]
    while took_s[-1] >= READY_S * shares and len(took_s) < STARTS:
        unit.host.run("systemctl", "restart", "ascproxy.service")
        took_s.append(unit.took_s())
    assert min(took_s) < READY_S * shares, (took_s, shares)
    assert unit.show("StatusText").startswith("serving revision ")
    assert unit.host.run("stat", "-c", "%U %a", "/run/ascproxy").stdout == "ascproxy 700\n"
    with unit.load() as load:
        until(lambda: unit.status()["workers"], "workers")
    assert load["failures"] == []


def test_a_reload_under_load(unit: Unit) -> None:
    before, pid = unit.status(), unit.show("MainPID")
    resources = unit.host.root / "etc/ascproxy/resources.yaml"
    with unit.load() as load:
        resources.write_text(resources.read_text().replace("tenants:\n", "tenants:\n  another: {}\n"))
        unit.host.run("systemctl", "reload", "ascproxy.service")
        until(lambda: unit.status()["revision"] != before["revision"], "another revision", said=unit.journal)
        until(lambda: unit.show("ActiveState") == "active", "active again")
    assert load["failures"] == [] and load["sent"] > 0
    assert unit.show("MainPID") == pid
    assert unit.workers() == {worker["pid"] for worker in before["workers"]}


def test_an_upgrade_under_load(unit: Unit) -> None:
    before, pid = unit.workers(), unit.show("MainPID")
    point_to(unit.host.root, "0.2.0")
    with unit.load() as load:
        done = unit.host.run("/opt/ascproxy/current/bin/ascproxy", "upgrade", "--config", "/etc/ascproxy", check=False)
        assert (done.returncode, done.stdout) == (0, "upgraded from 0.1.0 to 0.2.0\n"), done.stderr + unit.journal()
    assert load["failures"] == [] and load["sent"] > 0
    assert unit.show("MainPID") == pid
    assert unit.show("NRestarts") == "0"
    assert not unit.workers() & before
    until(lambda: unit.show("ActiveState") == "active", "active, not reloading any more")
    assert unit.show("StatusText").startswith("serving revision ")


def test_an_upgrade_that_fails_under_load(unit: Unit) -> None:
    before = unit.workers()
    broken = unit.host.root / "opt/ascproxy/0.3.0/bin"
    broken.mkdir(parents=True)
    (broken / "ascproxy").write_text("#!/usr/bin/python3\nimport a_module_that_nobody_has\n")
    (broken / "ascproxy").chmod(0o755)
    point_to(unit.host.root, "0.3.0")
    with unit.load() as load:
        unit.host.run("systemctl", "kill", "--kill-whom=main", "--signal=USR2", "ascproxy.service")
        until(lambda: "does not start (exit 1)" in unit.journal(), "the failure in the journal")
    point_to(unit.host.root, "0.2.0")
    assert load["failures"] == [] and load["sent"] > 0
    assert unit.workers() == before
    assert unit.status()["upgrade"]["state"] == "failed"
    assert "a_module_that_nobody_has" in unit.journal(), "and what it printed"


def test_a_supervisor_that_hangs_is_replaced_by_the_watchdog(unit: Unit) -> None:
    pid, before = unit.show("MainPID"), unit.workers()
    unit.host.run("kill", "-STOP", pid)
    until(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active", "restarted", 60, unit.journal)
    assert unit.show("MainPID") != pid
    assert not unit.workers() & before
    with unit.load() as load:
        until(lambda: unit.status()["workers"], "workers")
    assert load["failures"] == []


def test_a_stop_is_clean(unit: Unit) -> None:
    unit.host.run("systemctl", "stop", "ascproxy.service")
    assert (unit.show("ActiveState"), unit.show("Result"), unit.show("ExecMainStatus")) == ("inactive", "success", "0")
    assert not (unit.host.root / "run/ascproxy").exists()
    left = unit.host.run("ps", "-u", "ascproxy", "-o", "pid=", check=False)
    assert left.stdout.strip() == ""


def test_with_the_socket_unit_connections_wait_for_a_restart(unit: Unit) -> None:
    unit.host.run("systemctl", "start", "ascproxy.socket")
    unit.host.run("systemctl", "start", "ascproxy.service")
    with unit.load() as load:
        unit.host.run("systemctl", "reload", "ascproxy.service")
        done = unit.host.run("/opt/ascproxy/current/bin/ascproxy", "upgrade", "--config", "/etc/ascproxy", check=False)
        assert done.returncode == 0, done.stderr
    assert load["failures"] == [], "a passed socket outlives an upgrade"
    unit.host.run("systemctl", "stop", "ascproxy.service", "ascproxy.socket")
