"""What the service manager says and hears: passed sockets, READY, RELOADING, STOPPING, the watchdog."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascproxy.model.tenant import Tenant
from tests.kit.processes import Service, running, snapshot

# systemd sets LISTEN_PID to the pid that it executes: so does this, for descriptor 3 and what it becomes.
PASS_SOCKET = """
import os, sys
descriptor = int(sys.argv[1])
os.dup2(descriptor, 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


class Manager:
    """Receives notifications as systemd would."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.seen: list[dict[str, str]] = []

    def until(self, name: str, value: str = "1", within_s: float = 10.0) -> dict[str, str]:
        deadline = time.monotonic() + within_s
        while True:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            message = dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())
            self.seen.append(message)
            if message.get(name) == value:
                return message


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.socket.close()


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(tmp_path / "notify"), **more}


def test_the_life_of_a_service(tmp_path: Path, manager: Manager) -> None:
    with running(tmp_path, environment=environment(tmp_path)) as service:
        assert manager.until("READY")["STATUS"] == "serving revision 0000000000a1 with 2 workers"
        before = time.monotonic_ns() // 1000
        service.reload(dataclasses.replace(service.snapshot, revision="0000000000b2", tenants=(Tenant("acme"),)))
        assert before <= int(manager.until("RELOADING")["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert "0000000000b2" in manager.until("READY")["STATUS"]
        service.config.write_bytes(b"broken")
        service.process.send_signal(signal.SIGHUP)
        manager.until("RELOADING")
        assert "0000000000b2" in manager.until("READY")["STATUS"]
        service.process.terminate()
        assert manager.until("STOPPING")["STATUS"] == "draining"
        assert service.process.wait(10) == 0


def test_the_watchdog_is_fed_at_half_its_time(tmp_path: Path, manager: Manager) -> None:
    with running(tmp_path, environment=environment(tmp_path, WATCHDOG_USEC="400000")):
        manager.until("READY")
        manager.until("WATCHDOG")
        begin = time.monotonic()
        for _ in range(3):
            manager.until("WATCHDOG", within_s=0.4)
        assert 0.4 < time.monotonic() - begin < 1.2


def test_a_watchdog_for_another_process_is_not_fed(tmp_path: Path, manager: Manager) -> None:
    given = environment(tmp_path, WATCHDOG_USEC="100000", WATCHDOG_PID="1")
    with running(tmp_path, environment=given) as service:
        manager.until("READY")
        service.process.terminate()
        manager.until("STOPPING")
    assert not any("WATCHDOG" in message for message in manager.seen)


def test_an_abstract_notify_address(tmp_path: Path) -> None:
    address = f"@ascproxy-test-{tmp_path.name}-{time.monotonic_ns()}"
    listening = Manager(address)
    with running(tmp_path, environment={"NOTIFY_SOCKET": address}):
        listening.until("READY")
    listening.socket.close()


@pytest.mark.parametrize("name", ["main", "unknown"])  # by its name, and by its address
def test_a_passed_socket_is_served_by_all_workers_and_left_open(tmp_path: Path, name: str) -> None:
    first = snapshot(tmp_path)
    host, _, port = first.node.listeners[0].address.rpartition(":")
    with socket.create_server((host, int(port)), backlog=64) as passed:
        wrap = [sys.executable, "-c", PASS_SOCKET, str(passed.fileno()), name]
        with running(tmp_path, first, wrap=wrap, pass_fds=(passed.fileno(),)) as service:
            for _ in range(5):
                assert service.ask()["listener"] == "main"
            service.process.terminate()
            assert service.process.wait(10) == 0
        # The manager still holds it: connections wait there for the next start instead of being refused.
        with contextlib.closing(socket.create_connection((host, int(port)), timeout=2)):
            passed.settimeout(2)
            passed.accept()[0].close()


def test_a_passed_socket_that_nobody_asked_for_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        wrap = [sys.executable, "-c", PASS_SOCKET, str(passed.fileno()), "unknown"]
        service = Service(tmp_path, snapshot(tmp_path), wrap=wrap, pass_fds=(passed.fileno(),))
        assert service.process.wait(15) == 1
    text = service.log_file.read_text()
    assert "systemd passed a socket on ('127.0.0.1'," in text
    assert "which is no listener of the node file" in text
