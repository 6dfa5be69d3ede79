"""The supervisor with real processes: replacing, adopting, draining, leaving nothing behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascproxy import _native
from ascproxy.control.node import open_page
from ascproxy.model.node import Listener
from ascproxy.model.tenant import Tenant
from tests.kit.processes import Service, eventually, gone, running, snapshot


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path) as started:
        yield started


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


def test_workers_serve_and_hold_only_what_is_theirs(service: Service) -> None:
    answers = [service.ask() for _ in range(20)]
    assert {answer["revision"] for answer in answers} == {"0000000000a1"}
    assert {answer["core"] for answer in answers} == {0}
    pids = {worker["pid"] for worker in service.workers().values()}
    assert {answer["pid"] for answer in answers} <= pids
    assert {answer["dumpable"] for answer in answers} == {0}
    # A worker holds its own listening socket and mailbox, and nothing else of the supervisor or of its siblings.
    theirs = {str(entry.readlink()) for entry in Path(f"/proc/{service.process.pid}/fd").iterdir()}
    for answer in answers:
        held = answer["descriptors"]
        assert not any("/lock" in name or "pidfd" in name for name in held), held
        assert len({name for name in held if name.startswith("socket:") and name in theirs}) == 2, (held, theirs)


def test_a_worker_that_cannot_build_its_first_revision_says_why(tmp_path: Path) -> None:
    refused = dataclasses.replace(snapshot(tmp_path), tenants=(Tenant("refused"),))
    service = Service(tmp_path, refused)
    try:
        line = service.until_logged("worker cannot start")
        assert line["reason"] == "the tenant refused cannot be built"
        service.process.terminate()
        assert service.process.wait(10) == 0
    finally:
        service.process.kill()


def test_a_killed_worker_is_replaced_and_its_counters_survive(service: Service) -> None:
    end = service.hold()
    slot, before = next((s, w) for s, w in service.workers().items() if w["in_flight"])
    page = open_page(Path(service.snapshot.node.run_dir) / f"slot-{slot}.page")
    accepted = page.load(_native.Page.CELLS["accepted"])
    assert accepted > 0
    kill(before["pid"])
    eventually(lambda: page.load(_native.Page.CELLS["in_flight"]) == 0)
    after = eventually(lambda: (w := service.workers()[slot])["restarts"] == 1 and w["state"] == "ready" and w)
    assert after["pid"] not in (None, before["pid"])
    assert after["in_flight"] == 0
    assert page.load(_native.Page.CELLS["accepted"]) >= accepted
    assert service.logged("worker exited")["status"] == "SIGKILL"
    assert end.recv(1) == b""


def test_no_connection_is_lost_while_a_worker_is_killed_again_and_again(service: Service) -> None:
    """The socket outlives the worker: what was not accepted yet is accepted by the next or by a sibling."""
    slowest = 0.0
    for _ in range(4):
        victim = service.workers()[0]
        kill(victim["pid"])
        while not gone(victim["pid"]):
            pass
        for _ in range(10):
            begin = time.monotonic()
            service.ask()
            slowest = max(slowest, time.monotonic() - begin)
        eventually(lambda victim=victim: (w := service.workers()[0])["state"] == "ready" and w["pid"] != victim["pid"])
    assert slowest < 1.0, slowest


def test_a_slot_in_a_crash_loop_is_accepted_by_its_sibling(service: Service) -> None:
    """Its workers die at each start; nobody waits over 300 ms, and the pauses grow."""
    crashing = dataclasses.replace(service.snapshot, tenants=(Tenant("crash-0"),), revision="0000000000b2")
    service.reload(crashing)
    service.until_logged("reloaded")
    kill(service.workers()[0]["pid"])
    service.until_logged("slot is accepted by a sibling", 2)
    for _ in range(30):  # half of them on the crashing slot's socket
        begin = time.monotonic()
        assert service.ask()["slot"] == 1
        assert time.monotonic() - begin < 0.3
    exits = eventually(lambda: len(e := [x for x in service.log() if x["message"] == "worker exited"]) >= 4 and e)
    assert all(each["slot"] == 0 for each in exits)
    assert [each["was_ready"] for each in exits[:4]] == [True, False, False, False]

    service.reload(dataclasses.replace(service.snapshot, revision="0000000000c3"))
    eventually(lambda: service.workers()[0]["state"] == "ready", 15)
    eventually(lambda: {service.ask()["slot"] for _ in range(8)} == {0, 1})


def test_a_worker_that_does_not_answer_is_killed(service: Service) -> None:
    silent = service.workers()[1]
    kill(silent["pid"], signal.SIGSTOP)
    service.until_logged("worker does not answer and is killed", 14)
    eventually(lambda: (w := service.workers()[1])["state"] == "ready" and w["pid"] != silent["pid"])


def test_sigterm_finishes_what_is_in_flight_and_refuses_what_is_new(service: Service) -> None:
    held = service.hold("/late")
    children = service.children()
    service.process.terminate()
    answer = held.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert service.process.wait(10) == 0
    assert all(gone(pid) for pid in children)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(service.address, timeout=2)
    assert not Path(service.snapshot.node.run_dir).exists()


def test_a_drain_cuts_what_is_left_at_its_deadline(tmp_path: Path) -> None:
    first = snapshot(tmp_path)
    limits = dataclasses.replace(first.node.limits, drain_unary_ms=300, drain_stream_ms=300)
    first = dataclasses.replace(first, node=dataclasses.replace(first.node, limits=limits))
    with running(tmp_path, first) as service:
        held = service.hold()
        service.process.terminate()
        assert held.recv(1) == b""
        assert service.process.wait(10) == 0


def test_connections_are_refused_while_a_drain_waits(service: Service) -> None:
    held = service.hold()
    service.process.terminate()

    def refused() -> bool:
        try:
            socket.create_connection(service.address, timeout=2).close()
        except ConnectionRefusedError:
            return True
        return False

    eventually(refused)
    assert service.process.poll() is None
    assert service.public("/healthz/ready")[0] == 503
    held.close()
    assert service.process.wait(10) == 0


def test_sigint_drains_for_5_s_at_most(tmp_path: Path) -> None:
    first = snapshot(tmp_path)
    limits = dataclasses.replace(first.node.limits, drain_unary_ms=60_000, drain_stream_ms=600_000)
    with running(tmp_path, dataclasses.replace(first, node=dataclasses.replace(first.node, limits=limits))) as service:
        held = service.hold()
        begin = time.monotonic()
        service.process.send_signal(signal.SIGINT)
        assert held.recv(1) == b""
        assert 4.5 < time.monotonic() - begin < 8
        assert service.process.wait(10) == 0
        assert service.logged("SIGINT, draining")["stream_ms"] == 5_000


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    first = snapshot(tmp_path)
    limits = dataclasses.replace(first.node.limits, drain_unary_ms=60_000, drain_stream_ms=60_000)
    with running(tmp_path, dataclasses.replace(first, node=dataclasses.replace(first.node, limits=limits))) as service:
        service.hold()
        service.process.terminate()
        service.until_logged("SIGTERM, draining")
        children = service.children()
        service.process.terminate()
        assert service.process.wait(2) == 1
        assert all(gone(pid) for pid in children)


def test_nothing_is_left_when_the_supervisor_is_killed(service: Service) -> None:
    children = service.children()
    assert len(children) == 3
    service.process.kill()
    service.process.wait(5)
    eventually(lambda: all(gone(pid) for pid in children), 1.0, "workers and control ended")


def test_a_stopped_worker_is_not_left_either(service: Service) -> None:
    """SIGKILL ends what SIGTERM would leave waiting."""
    pid = service.workers()[0]["pid"]
    kill(pid, signal.SIGSTOP)
    service.process.kill()
    service.process.wait(5)
    eventually(lambda: gone(pid), 1.0)


def test_a_second_supervisor_is_refused_by_name_of_the_first(service: Service, tmp_path: Path) -> None:
    second = Service(tmp_path, service.snapshot)
    assert second.process.wait(15) == 1
    text = second.log_file.read_text()
    assert f"already running, pid {service.process.pid}" in text
    assert "Traceback" not in text
    assert service.ask()["revision"] == "0000000000a1"


@pytest.mark.parametrize("which", ["listener", "metrics"])
def test_a_port_in_use_is_one_sentence(tmp_path: Path, which: str) -> None:
    first = snapshot(tmp_path)
    address = first.node.listeners[0].address if which == "listener" else first.node.metrics_address
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))):
        service = Service(tmp_path, first)
        assert service.process.wait(15) == 1
    assert service.log_file.read_text() == (
        f"cannot listen on {address}: the address is in use by another process: stop it or choose another port\n"
    )
    assert service.process.returncode == 1


def test_a_broken_configuration_is_said_before_anything_is_touched(tmp_path: Path) -> None:
    service = Service(tmp_path, snapshot(tmp_path), config=b"{")
    assert service.process.wait(15) == 1
    text = service.log_file.read_text()
    assert text.startswith(f"{service.config}: not a snapshot")
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_ttin_and_ttou_change_the_number_of_workers(service: Service) -> None:
    service.process.send_signal(signal.SIGTTIN)
    eventually(lambda: len(service.workers()) == 3 and service.workers()[2]["state"] == "ready")
    eventually(lambda: 2 in {service.ask()["slot"] for _ in range(10)})
    service.process.send_signal(signal.SIGTTOU)
    eventually(lambda: 2 not in service.workers())
    for _ in range(20):  # a third of them on the socket that lost its worker
        assert service.ask()["slot"] in (0, 1)
    for _ in range(3):
        service.process.send_signal(signal.SIGTTOU)
    eventually(lambda: set(service.workers()) == {0})
    assert service.ask()["slot"] == 0


def test_a_unix_listener_is_shared_by_all_workers(tmp_path: Path) -> None:
    path = tmp_path / "data.sock"
    main = snapshot(tmp_path).node.listeners[0]
    first = snapshot(tmp_path, listeners=(main, Listener("local", f"unix:{path}")))
    with running(tmp_path, first) as service:
        kill(service.workers()[0]["pid"])
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as end:
                end.settimeout(5)
                end.connect(str(path))
                end.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert b'"listener":"local"' in end.recv(4096)
        service.process.send_signal(signal.SIGTTOU)
        eventually(lambda: set(service.workers()) == {0})
        with socket.socket(socket.AF_UNIX) as end:  # one worker's end must not take the shared socket with it
            end.connect(str(path))
        service.process.terminate()
        assert service.process.wait(10) == 0
        assert not path.exists()
