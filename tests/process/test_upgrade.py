"""Upgrades with real processes: what passes, who serves meanwhile, and how a failed one is turned round."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ascproxy.model.node import Listener
from ascproxy.model.tenant import Tenant
from tests.kit.load import Load
from tests.kit.processes import ROOT, Service, eventually, gone, running, snapshot
from tests.kit.service import Service as RealService
from tests.kit.service import command, first_light


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path) as started:
        yield started


def upgrade(service: Service) -> dict[str, Any]:
    """Ask for one and wait for its end; the supervisor's word."""
    before = outcome(service)
    service.process.send_signal(signal.SIGUSR2)
    number = before["number"] if before is not None else 0
    return eventually(
        lambda: (o := outcome(service)) and o["number"] > number and o["state"] in ("done", "failed") and o,
        30, service.log_file.read_text(),
    )  # fmt: skip


def outcome(service: Service) -> dict[str, Any] | None:
    file = Path(service.snapshot.node.run_dir) / "upgrade.json"
    return json.loads(file.read_bytes()) if file.exists() else None


def pids(service: Service) -> dict[int, int]:
    return {slot: worker["pid"] for slot, worker in service.workers().items() if worker["state"] == "ready"}


def replaced(service: Service, before: dict[int, int]) -> bool:
    """Whether other workers than those serve."""
    return not set(pids(service).values()) & set(before.values())


class Asking:
    """A thread that asks on fresh connections all the time: every answer and every failure is kept."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.answers: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self.service.ask())
            except (OSError, ValueError) as error:
                self.failures.append(repr(error))

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def test_new_workers_serve_in_the_same_slots_and_old_ones_end(service: Service) -> None:
    before, children = pids(service), service.children()
    with Asking(service) as asking:
        for number in range(1, 4):
            assert upgrade(service) == {
                "number": number, "state": "done", "from": "0.1.0", "to": "0.1.0", "reason": None
            }  # fmt: skip
            eventually(lambda gone_=before: set(pids(service)) == {0, 1} and replaced(service, gone_))
            eventually(lambda before=before: all(gone(pid) for pid in before.values()), what="old workers end")
            before = pids(service)
    assert asking.failures == []
    assert len({answer["incarnation"] for answer in asking.answers}) >= 3
    eventually(lambda: len(service.children()) == 3, what=f"two workers and control: {service.children()}")
    assert not set(children) & set(service.children())
    assert {worker["restarts"] for worker in service.workers().values()} == {0}, "an upgrade is no crash"
    assert service.status()["upgrade"]["state"] == "done"
    service.process.terminate()
    assert service.process.wait(10) == 0


def test_a_connection_that_is_under_way_is_finished_by_the_worker_that_has_it(service: Service) -> None:
    held = service.hold("/late")
    owner = next(worker["pid"] for worker in service.workers().values() if worker["in_flight"])
    assert upgrade(service)["state"] == "done"
    answer = b""
    while part := held.recv(65536):
        answer += part
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["pid"] == owner
    assert owner not in pids(service).values()


def test_a_revision_of_the_file_comes_into_force_with_the_new_workers(service: Service) -> None:
    service.write(dataclasses.replace(service.snapshot, revision="0000000000b2", tenants=(Tenant("acme"),)))
    assert upgrade(service)["state"] == "done"
    assert service.ask()["revision"] == "0000000000b2"
    assert service.status()["revision"] == "0000000000b2"


def test_sockets_without_a_worker_of_their_own_are_accepted_after_it(tmp_path: Path) -> None:
    """A slot that is not wanted any more, whose socket a sibling has adopted, and a Unix socket that all share."""
    path = tmp_path / "data.sock"
    main = snapshot(tmp_path).node.listeners[0]
    with running(tmp_path, snapshot(tmp_path, listeners=(main, Listener("local", f"unix:{path}")))) as service:
        service.process.send_signal(signal.SIGTTOU)
        eventually(lambda: set(service.workers()) == {0})
        before = pids(service)
        with Asking(service) as asking:
            assert upgrade(service)["state"] == "done"
            eventually(lambda: all(gone(pid) for pid in before.values()))
            for _ in range(20):  # half of them on the socket of slot 1
                assert service.ask()["slot"] == 0
        assert asking.failures == []
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(5)
            end.connect(str(path))
            end.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b'"listener":"local"' in end.recv(4096)
        service.process.terminate()
        assert service.process.wait(10) == 0
        assert not path.exists()


def test_session_tickets_outlive_an_upgrade(service: Service) -> None:
    before = {service.ask()["tickets"] for _ in range(5)}
    upgrade(service)
    assert {service.ask()["tickets"] for _ in range(5)} == before


def test_workers_of_the_new_program_hold_only_what_is_theirs(service: Service) -> None:
    upgrade(service)
    eventually(lambda: len(service.children()) == 3)
    theirs = {str(entry.readlink()) for entry in Path(f"/proc/{service.process.pid}/fd").iterdir()}
    for answer in [service.ask() for _ in range(10)]:
        assert not any("/lock" in name or "pidfd" in name or "handover" in name for name in answer["descriptors"])
        sockets = {name for name in answer["descriptors"] if name.startswith("socket:") and name in theirs}
        assert len(sockets) == 2, (answer["descriptors"], theirs)


def test_nothing_piles_up_over_many_upgrades(service: Service) -> None:
    def held() -> int:
        eventually(lambda: len(service.children()) == 3)
        return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))

    upgrade(service)
    first = held()
    for _ in range(3):
        upgrade(service)
    assert held() == first
    pages = sorted(file.name for file in Path(service.snapshot.node.run_dir).glob("slot-*"))
    assert len(pages) <= 6, f"pages are used again: {pages}"


# what fails, and what is left of it


def test_a_configuration_that_is_broken_stops_it_at_the_rehearsal(service: Service) -> None:
    before = service.children()
    service.config.write_bytes(b"{")
    found = upgrade(service)
    assert (found["state"], found["from"], found["to"]) == ("failed", "0.1.0", None)
    assert "not a snapshot" in found["reason"]
    assert service.logged("upgrade failed")["reason"] == found["reason"]
    assert service.children() == before
    assert service.status()["upgrade"]["reason"] == found["reason"]
    assert service.ask()["revision"] == "0000000000a1"


def test_a_revision_that_no_worker_can_build_stops_it_at_the_rehearsal(service: Service) -> None:
    before = service.children()
    service.write(dataclasses.replace(service.snapshot, tenants=(Tenant("refused"),)))
    assert "the tenant refused cannot be built" in upgrade(service)["reason"]
    assert service.children() == before


def test_new_workers_in_a_crash_loop_are_turned_round(service: Service) -> None:
    """The rehearsal cannot see it: slot 1 crashes. Slot 0 was ready already, and what it has accepted is finished."""
    before = pids(service)
    service.write(dataclasses.replace(service.snapshot, revision="0000000000b2", tenants=(Tenant("crash-1"),)))
    with Asking(service) as asking:
        found = upgrade(service)
        assert "the worker of slot 1 exited 3 times (exit 3)" in found["reason"]
        assert "the workers of version 0.1.0 go on serving" in found["reason"]
        eventually(lambda: pids(service) == before, what="the old workers are in their slots")
        eventually(lambda: len(service.children()) == 3)
    assert asking.failures == []
    assert service.ask()["revision"] == service.status()["revision"] == "0000000000a1"
    # And all of it works on: a worker is replaced, a revision taken, an upgrade made.
    os.kill(before[0], signal.SIGKILL)
    service.reload(dataclasses.replace(service.snapshot, revision="0000000000c3", tenants=(Tenant("fine"),)))
    eventually(lambda: {w["revision"] for w in service.workers().values()} == {"0000000000c3"})
    after = pids(service)
    assert after[1] == before[1]
    assert upgrade(service)["state"] == "done"
    assert not set(pids(service).values()) & set(after.values())
    incarnations = [answer["incarnation"] for answer in [service.ask() for _ in range(20)] if answer["slot"] == 1]
    assert min(incarnations) >= 5, "three that crashed have used up numbers"


# other programs than the own one


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """An executable that is the supervisor of these tests, and can be made another one."""
    file = tmp_path / "program"
    write_program(file, ROOT)
    return file


def write_program(file: Path, root: Path, first: str = "") -> None:
    """A program with the packages of ``root``; ``first`` is what it does at the very start."""
    new = file.with_suffix(".new")
    new.write_text(
        f"#!{sys.executable}\nimport os, sys\n{first}\n"
        f"os.environ['PYTHONSAFEPATH'] = '1'\n"
        f"os.environ['PYTHONPATH'] = {str(root)!r} + ':' + {str(ROOT)!r}\n"
        f"os.execv(sys.executable, [sys.executable, '-m', 'ascproxy.supervisor', *sys.argv[1:]])\n"
    )
    new.chmod(0o755)
    new.rename(file)


@pytest.fixture
def another(tmp_path: Path, program: Path) -> Iterator[Service]:
    """A service whose upgrades run ``program``."""
    service = Service(tmp_path, snapshot(tmp_path), again=[str(program)])
    try:
        yield service.until_ready()
    finally:
        service.process.kill()
        service.process.wait(10)


def version(tmp_path: Path, name: str, **edits: tuple[str, str]) -> Path:
    """A copy of the packages with edits: module (dots as ``__``) to what is replaced by what."""
    root = tmp_path / name
    shutil.copytree(ROOT / "ascproxy", root / "ascproxy", ignore=shutil.ignore_patterns("__pycache__"))
    edits = {"ascproxy": ('__version__ = "0.1.0"', f'__version__ = "{name}"'), **edits}
    for module, (before, after) in edits.items():
        path = root / module.replace("__", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))
    return root


def test_an_upgrade_to_another_version_and_back(another: Service, program: Path, tmp_path: Path) -> None:
    write_program(program, version(tmp_path, "0.2.0"))
    with Asking(another) as asking:
        assert upgrade(another)["to"] == "0.2.0"
        write_program(program, ROOT)
        found = upgrade(another)
    assert (found["from"], found["to"]) == ("0.2.0", "0.1.0")
    assert asking.failures == []


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("raise ImportError('no such module')", "does not start (exit 1)"),
        ("os.kill(os.getpid(), 9)", "does not start (SIGKILL)"),
    ],
)
def test_a_program_that_does_not_start_changes_nothing(another: Service, program: Path, first: str, said: str) -> None:
    before = another.children()
    write_program(program, ROOT, first)
    found = upgrade(another)
    assert said in found["reason"]
    assert another.children() == before
    program.unlink()
    assert "does not start (exit 70)" in upgrade(another)["reason"]
    assert "cannot execute" in another.log_file.read_text()
    assert another.children() == before


def test_a_program_that_reads_another_layout_only_is_refused(another: Service, program: Path, tmp_path: Path) -> None:
    before = another.children()
    newer = version(tmp_path, "9.0.0", ascproxy__supervisor__handover=("LAYOUT = 1", "LAYOUT = 3"))
    write_program(program, newer)
    found = upgrade(another)
    assert "hands over layout 1, this version reads layout 3" in found["reason"]
    assert another.children() == before


def test_a_worker_program_that_cannot_be_imported_is_refused(another: Service, program: Path, tmp_path: Path) -> None:
    before = another.children()
    broken = version(
        tmp_path, "9.0.0", ascproxy__worker__process=("import uvloop", "import uvloop_of_another_planet as uvloop")
    )
    write_program(program, broken)
    assert "no worker program" in upgrade(another)["reason"]
    assert another.children() == before


def test_a_new_control_that_does_not_serve_is_turned_round(another: Service, program: Path, tmp_path: Path) -> None:
    before = another.children()
    serve = "        snapshot, boot, metrics, local, page ="
    broken = version(tmp_path, "9.0.0", ascproxy__control__process=(serve, f"        os._exit(9)\n{serve}"))
    write_program(program, broken)
    with Asking(another) as asking:
        assert "the new control" in upgrade(another)["reason"]
        eventually(lambda: another.children() == before)
    assert asking.failures == []
    assert another.status()["upgrade"]["state"] == "failed"


# signals and ends in the middle


def test_signals_in_between_are_neither_lost_nor_fatal(service: Service) -> None:
    service.process.send_signal(signal.SIGUSR2)
    service.process.send_signal(signal.SIGHUP)
    service.until_logged("rehearsal succeeded")
    service.write(dataclasses.replace(service.snapshot, revision="0000000000b2", tenants=(Tenant("acme"),)))
    service.process.send_signal(signal.SIGHUP)
    service.process.send_signal(signal.SIGTTIN)
    service.until_logged("upgraded", 30)
    eventually(lambda: {w["revision"] for w in service.workers().values()} == {"0000000000b2"})
    eventually(lambda: set(pids(service)) == {0, 1, 2})


@pytest.mark.parametrize("moment", ["upgrade: rehearsing", "upgrade: executing", "upgrade: arrived", "upgraded"])
def test_a_stop_in_the_middle_ends_all(service: Service, moment: str) -> None:
    service.process.send_signal(signal.SIGUSR2)
    service.until_logged(moment)
    service.process.terminate()
    assert service.process.wait(20) == 0
    assert service.logged("stopped")["cut_off"] is False
    marker = str(service.config)
    eventually(lambda: descended(marker) == [], what=f"nothing is left: {descended(marker)}")
    assert not Path(service.snapshot.node.run_dir).exists()


@pytest.mark.parametrize("moment", ["upgrade: rehearsing", "upgrade: executing", "upgraded"])
def test_a_supervisor_that_is_killed_in_the_middle_leaves_no_orphan(service: Service, moment: str) -> None:
    held = service.hold()  # so that an old worker is still there in the end
    service.process.send_signal(signal.SIGUSR2)
    service.until_logged(moment, 30)
    marker = str(service.config)
    service.process.kill()
    service.process.wait()
    eventually(lambda: descended(marker) == [], what=f"no orphan: {descended(marker)}")
    held.close()


def descended(marker: str) -> list[int]:
    """Processes that have ``marker`` in their command line: workers, controls and rehearsals of one service."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if not gone(pid)]


def test_a_second_request_while_one_is_under_way_is_refused(service: Service) -> None:
    service.process.send_signal(signal.SIGUSR2)
    service.until_logged("upgrade: rehearsing")
    service.process.send_signal(signal.SIGUSR2)
    service.until_logged("upgrade ignored")
    service.until_logged("upgraded", 30)
    assert outcome(service)["number"] == 1


# the real service, under load


@pytest.mark.timeout(240)
def test_upgrades_under_load_fail_no_request(tmp_path: Path) -> None:
    """Every 3 s, four times: unary and streamed, plaintext and TLS, kept and fresh connections."""
    with first_light(tmp_path, "--rate", "30", "--tokens", "24", workers=2) as (real, _):
        assert real.process is not None
        pid, seen = real.process.pid, [{worker["pid"] for worker in real.status()["workers"]}]
        load = Load(real.key, real.http_port, real.https_port, real.facts["ca"], rate=60)

        async def upgrades() -> None:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            running_load = asyncio.ensure_future(load.run(stop))
            begin = loop.time()
            for number in range(4):
                await asyncio.sleep(max(0.0, begin + 3 * number + 1 - loop.time()))
                done = await asyncio.to_thread(command, "upgrade", "--config", str(real.folder), "--json")
                assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "done"), done.stderr + real.said()
                workers = (await asyncio.to_thread(real.status))["workers"]
                seen.append({worker["pid"] for worker in workers if worker["state"] == "ready"})
            stop.set()
            await running_load

        asyncio.run(upgrades())
        assert load.failures == []
        assert load.sent > 300
        assert real.process.poll() is None and real.process.pid == pid
        assert [len(pids) for pids in seen] == [2] * 5
        assert len(set().union(*seen)) == 10, "each upgrade has workers of its own"
        assert counted(real) == load.sent, "counters survive, those of workers that are gone too"


def counted(service: RealService) -> int:
    """Requests that the metrics say were answered with 200, once all are settled."""
    lines = [line for line in service.metrics().splitlines() if line.startswith("ascproxy_requests_total{")]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'code="200"' in line))


@pytest.mark.timeout(120)
def test_a_long_stream_ends_whole_over_two_upgrades(tmp_path: Path) -> None:
    with first_light(tmp_path, "--rate", "20", "--tokens", "160") as (real, _):
        context = real.tls()
        connection = http.client.HTTPSConnection("127.0.0.1", real.https_port, timeout=60, context=context)
        body = {"model": "sim-chat", "stream": True, "messages": [{"role": "user", "content": "long"}]}
        headers = {"authorization": f"Bearer {real.key}", "content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        begin = answer.read(64)
        owner = next(worker["pid"] for worker in real.status()["workers"] if worker["in_flight"])
        for _ in range(2):
            done = command("upgrade", "--config", str(real.folder))
            assert (done.returncode, done.stdout) == (0, "upgraded from 0.1.0 to 0.1.0\n"), done.stderr
        states = {worker["pid"]: worker["state"] for worker in real.status()["workers"]}
        assert states[owner] == "draining", "the stream is still there, and status shows who has it"
        whole = begin + answer.read()
        assert whole.endswith(b"data: [DONE]\n\n")
        assert whole.count(b"data: ") >= 160
        connection.close()
        eventually(lambda: gone(owner))


def test_the_command_says_what_came_of_it(tmp_path: Path) -> None:
    with first_light(tmp_path) as (real, _):
        real.edit("resources.yaml", lambda document: document.update(routes="none"))
        done = command("upgrade", "--config", str(real.folder))
        assert done.returncode == 1
        assert done.stderr.startswith("not upgraded: ")
        assert "resources.yaml" in done.stderr
        document = json.loads(command("upgrade", "--config", str(real.folder), "--json").stdout)
        assert (document["state"], document["number"]) == ("failed", 2)
        assert json.loads(command("status", "--config", str(real.folder), "--json").stdout)["upgrade"] == document
        assert "last upgrade failed: " in command("status", "--config", str(real.folder)).stdout
        assert real.ask("/v1/models", method="GET")[0] == 200
    done = command("upgrade", "--config", str(real.folder))
    assert done.returncode == 3
