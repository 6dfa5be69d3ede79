"""Gateway and control as two units and two users on a booted systemd host. Run it with ``make test-systemd``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kit.host import missing, point_to, until
from tests.process.test_systemd_host import Unit, booted

pytestmark = [
    pytest.mark.skipif("ASCPROXY_SYSTEMD_HOST" not in os.environ, reason="takes minutes: make test-systemd"),
    pytest.mark.skipif(missing() is not None, reason=f"no systemd host can run here: {missing()}"),
    pytest.mark.timeout(600),
]
GATEWAY, CONTROL = "ascproxy-gateway.service", "ascproxy-control.service"
KEY = "/etc/ascproxy/tls/server.key"


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    """The two units, not started yet. The key of the certificate is the gateway's alone."""
    with booted(tmp_path_factory.mktemp("host"), GATEWAY, "ascproxy-control") as made:
        made.host.run("chown", "ascproxy:ascproxy", KEY)
        made.host.run("chmod", "0400", KEY)
        yield made


def revision(units: Unit) -> str:
    return str(units.status()["revision"])


def changed(units: Unit, tenant: str) -> None:
    """Another configuration in place."""
    resources = units.host.root / "etc/ascproxy/resources.yaml"
    resources.write_text(resources.read_text().replace("tenants:\n", f"tenants:\n  {tenant}: {{}}\n"))


def may(units: Unit, user: str, test: str, path: str) -> bool:
    """Whether a user of the host may read (-r) or write (-w) a file."""
    return units.host.run("runuser", "-u", user, "--", "test", test, path, check=False).returncode == 0


def control_serves(units: Unit) -> bool:
    command = ("/opt/ascproxy/current/bin/ascproxy", "status", "--config", "/etc/ascproxy", "--json")
    return units.host.run(*command, check=False).returncode == 0


def test_starting_the_gateway_starts_both_and_each_is_a_user_of_its_own(units: Unit) -> None:
    begin = units.host.run("systemctl", "start", GATEWAY, check=False)
    assert begin.returncode == 0, units.journal()
    assert [units.show("ActiveState", name) for name in (GATEWAY, CONTROL)] == ["active", "active"]
    until(lambda: control_serves(units), "control serves", said=units.journal)
    assert units.status()["separation"] == "units"
    pids = [units.show("MainPID", name) for name in (GATEWAY, CONTROL)]
    users = [units.host.run("ps", "-o", "user:32=", "-p", pid).stdout.strip() for pid in pids]
    assert users == ["ascproxy", "ascproxy-control"]
    with units.load() as load:
        until(lambda: len(units.workers()), "workers")
    assert load["failures"] == [] and load["sent"] > 0


def test_each_may_write_and_read_what_is_its_own(units: Unit) -> None:
    store = "/var/lib/ascproxy/store.lmdb"
    assert may(units, "ascproxy-control", "-w", f"{store}/data.mdb")
    assert may(units, "ascproxy", "-r", f"{store}/data.mdb")
    assert not may(units, "ascproxy", "-w", f"{store}/data.mdb")
    assert not may(units, "ascproxy", "-w", store), "nor put another one in its place"
    assert not may(units, "ascproxy", "-w", "/var/lib/ascproxy")
    assert may(units, "ascproxy", "-r", KEY)
    assert not may(units, "ascproxy-control", "-r", KEY)
    assert not may(units, "ascproxy-control", "-w", "/run/ascproxy")
    assert not may(units, "nobody", "-r", "/run/ascproxy")
    for worker in units.workers():
        opened = units.host.run("find", f"/proc/{worker}/fd", "-lname", f"{store}/lock.mdb").stdout
        assert opened, "it notes what it reads; on a read-only file system it would go without"


def test_a_killed_control_comes_back_and_no_request_is_lost(units: Unit) -> None:
    workers, before, pid = units.workers(), revision(units), units.show("MainPID", CONTROL)
    with units.load() as load:
        units.host.run("kill", "-KILL", pid)
        until(lambda: units.show("MainPID", CONTROL) not in ("0", pid), "another control", said=units.journal)
        until(lambda: control_serves(units), "it serves", said=units.journal)
    assert load["failures"] == [] and load["sent"] > 0
    assert units.workers() == workers
    assert revision(units) == before
    with units.load() as load:
        changed(units, "after-the-kill")
        units.host.run("systemctl", "reload", GATEWAY)
        until(lambda: revision(units) != before, "another revision", said=units.journal)
    assert load["failures"] == []
    assert units.workers() == workers


def test_a_key_that_is_made_by_the_new_control_is_known_to_the_old_workers(units: Unit) -> None:
    command = ("/opt/ascproxy/current/bin/ascproxy", "key", "list", "--config", "/etc/ascproxy", "--json")
    assert units.host.run(*command).stdout.strip()
    made = units.host.run(
        "/opt/ascproxy/current/bin/ascproxy", "key", "create", "--tenant", "after-the-kill", "--config",
        "/etc/ascproxy", "--json",
    ).stdout  # fmt: skip
    assert "api_key" in made
    assert units.host.run("stat", "-c", "%U", "/var/lib/ascproxy/store.lmdb/data.mdb").stdout == "ascproxy-control\n"


def test_control_is_restarted_alone_and_by_its_watchdog(units: Unit) -> None:
    workers, pid = units.workers(), units.show("MainPID", GATEWAY)
    with units.load() as load:
        units.host.run("systemctl", "restart", CONTROL)
        until(lambda: control_serves(units), "it serves", said=units.journal)
        hung = units.show("MainPID", CONTROL)
        units.host.run("kill", "-STOP", hung)
        until(lambda: units.show("MainPID", CONTROL) not in ("0", hung), "another control", 60, units.journal)
        until(lambda: control_serves(units), "it serves", said=units.journal)
    assert load["failures"] == []
    assert (units.workers(), units.show("MainPID", GATEWAY)) == (workers, pid)


def test_the_gateway_is_upgraded_first_and_control_restarted_then(units: Unit) -> None:
    before, control = units.workers(), units.show("MainPID", CONTROL)
    point_to(units.host.root, "0.2.0")
    with units.load() as load:
        done = units.host.run("/opt/ascproxy/current/bin/ascproxy", "upgrade", "--config", "/etc/ascproxy", check=False)
        assert (done.returncode, done.stdout) == (0, "upgraded from 0.1.0 to 0.2.0\n"), done.stderr + units.journal()
        assert units.show("MainPID", CONTROL) == control
        assert units.status()["upgrade"]["state"] == "done"
        units.host.run("systemctl", "restart", CONTROL)
        until(lambda: control_serves(units), "it serves", said=units.journal)
    assert load["failures"] == [] and load["sent"] > 0
    assert not units.workers() & before


def test_somebody_else_is_not_let_in(units: Unit) -> None:
    """One of the group, so that only the question for its uid keeps it out."""
    units.host.run("systemctl", "stop", CONTROL)
    code = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(10); "
        "s.connect('/run/ascproxy/gateway.sock'); assert s.recv(1) == b''"
    )
    units.host.run("runuser", "-u", "ascproxy", "--", "python3", "-c", code)
    until(lambda: "at the gateway's socket is refused" in units.journal(), "said in the log")
    units.host.run("systemctl", "start", CONTROL)
    until(lambda: control_serves(units), "it serves", said=units.journal)


def test_the_gateway_is_restarted_alone_and_control_finds_it(units: Unit) -> None:
    before = units.workers()
    units.host.run("systemctl", "restart", GATEWAY)
    until(lambda: control_serves(units), "it serves", said=units.journal)
    assert not units.workers() & before
    assert units.show("ActiveState", CONTROL) == "active"
    with units.load() as load:
        until(lambda: len(units.workers()), "workers")
    assert load["failures"] == []


def test_a_key_that_the_gateway_cannot_read_is_said_and_the_revision_stays(units: Unit) -> None:
    """Control takes keys on trust; the workers do not."""
    before = revision(units)
    units.host.run("chown", "root:root", KEY)
    changed(units, "never-in-force")
    units.host.run("systemctl", "reload", GATEWAY)
    until(lambda: f"revision {before} stays in force" in units.journal(), "said in the log", said=units.journal)
    assert revision(units) == before
    units.host.run("chown", "ascproxy:ascproxy", KEY)
    units.host.run("systemctl", "reload", GATEWAY)
    until(lambda: revision(units) != before, "the new revision", said=units.journal)


def test_a_stop_of_both_is_clean(units: Unit) -> None:
    units.host.run("systemctl", "stop", GATEWAY, CONTROL)
    for name in (GATEWAY, CONTROL):
        assert (units.show("ActiveState", name), units.show("Result", name)) == ("inactive", "success")
    assert not (units.host.root / "run/ascproxy").exists()
    for user in ("ascproxy", "ascproxy-control"):
        assert units.host.run("ps", "-u", user, "-o", "pid=", check=False).stdout.strip() == ""


def test_with_the_socket_unit_a_restart_of_control_and_an_upgrade_lose_nothing(units: Unit) -> None:
    units.host.run("systemctl", "start", "ascproxy.socket", GATEWAY)
    until(lambda: control_serves(units), "control serves", said=units.journal)
    with units.load() as load:
        units.host.run("systemctl", "restart", CONTROL)
        until(lambda: control_serves(units), "it serves", said=units.journal)
        done = units.host.run("/opt/ascproxy/current/bin/ascproxy", "upgrade", "--config", "/etc/ascproxy", check=False)
        assert done.returncode == 0, done.stderr + units.journal()
    assert load["failures"] == [] and load["sent"] > 0


def test_one_unit_excludes_the_two(units: Unit) -> None:
    """They would fight for the run directory and the store."""
    units.host.run("systemctl", "stop", "ascproxy.socket")
    assert units.show("ActiveState", GATEWAY) == "active"
    units.host.run("chown", "-R", "ascproxy:ascproxy", "/var/lib/ascproxy")
    begin = units.host.run("systemctl", "start", "ascproxy.service", check=False)
    assert begin.returncode == 0, units.journal()
    assert [units.show("ActiveState", name) for name in (GATEWAY, CONTROL)] == ["inactive", "inactive"]
    assert units.status()["separation"] == "none"
    units.host.run("systemctl", "stop", "ascproxy.service")
