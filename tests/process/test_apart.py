"""Control as a process of its own, which meets the gateway at a named socket: who is let in, and who may go when."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ascproxy.model.tenant import Tenant
from tests.kit.processes import ROOT, Service, eventually, gone, snapshot
from tests.kit.service import Service as RealService
from tests.kit.service import Simulator, command
from tests.process.test_upgrade import Asking, outcome, pids, upgrade, write_program

SILENT_S = 20.0  # a control that does not answer is let go after 10 s
OTHER = os.geteuid() + 1


class Control:
    """A control beside a gateway."""

    def __init__(self, folder: Path, peer: int | None = None) -> None:
        run_dir = folder / "run"
        self.log_file = folder / "control.log"
        self.socket = run_dir / "gateway.sock"
        given = ["--config", str(folder / "snapshot.json"), "--run-dir", str(run_dir)]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.kit.plain_control", *given, "--peer", str(peer or os.geteuid())],
                stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def until_said(self, words: str) -> None:
        eventually(lambda: words in self.log_file.read_text(), 15, f"{words!r} in {self.log_file.read_text()}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


class Apart:
    """A gateway, and the controls that were started beside it."""

    def __init__(self, folder: Path, **given: Any) -> None:
        self.folder = folder
        self.gateway = Service(folder, snapshot(folder), **{"apart": os.geteuid(), **given})
        self.controls: list[Control] = []

    def start_control(self, **given: Any) -> Control:
        self.controls.append(Control(self.folder, **given))
        return self.controls[-1]

    def until_served(self) -> None:
        eventually(self.served, 15, f"control serves: {self.gateway.log_file.read_text()}")

    def served(self) -> bool:
        try:
            host, _, port = self.gateway.snapshot.node.metrics_address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=0.5) as end:
                end.sendall(b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                return end.recv(4096).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def end(self) -> None:
        for control in self.controls:
            control.end()
        if self.gateway.process.poll() is None:
            self.gateway.process.kill()
        self.gateway.process.wait(10)


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    """Both run, and serve."""
    program = tmp_path / "program"
    write_program(program, ROOT)
    made = Apart(tmp_path, again=[str(program)])
    try:
        made.start_control()
        made.gateway.until_ready()
        made.until_served()
        yield made
    finally:
        made.end()


def test_they_find_each_other_whoever_comes_first(tmp_path: Path) -> None:
    (tmp_path / "snapshot.json").write_bytes(b"")  # written by the gateway's side before it is read
    made = Apart.__new__(Apart)
    made.folder, made.controls = tmp_path, []
    first = made.start_control()
    first.until_said("waiting for the gateway")
    made.gateway = Service(tmp_path, snapshot(tmp_path), apart=os.geteuid())
    try:
        made.gateway.until_ready()
        made.until_served()
        assert {answer["revision"] for answer in (made.gateway.ask(), made.gateway.ask())} == {"0000000000a1"}
        run_dir = Path(made.gateway.snapshot.node.run_dir)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (run_dir, *run_dir.iterdir())}
        assert modes["run"] == 0o750
        assert modes["gateway.sock"] == 0o660
        assert modes["control.sock"] == modes["lock"] == 0o600
        assert modes["slot-0.page"] == modes["shared.page"] == 0o640
    finally:
        made.end()


def test_a_killed_control_costs_no_request_and_the_next_one_is_let_in(apart: Apart) -> None:
    workers = pids(apart.gateway)
    for _ in range(3):
        control = apart.controls[-1]
        with Asking(apart.gateway) as asking:
            control.process.kill()
            apart.gateway.until_logged("without control until it comes again")
            apart.start_control()
            apart.until_served()
        assert asking.failures == [] and asking.answers
    assert pids(apart.gateway) == workers
    changed = dataclasses.replace(apart.gateway.snapshot, revision="0000000000b2", tenants=(Tenant("acme"),))
    apart.gateway.reload(changed)
    eventually(lambda: apart.gateway.ask()["revision"] == "0000000000b2")
    eventually(lambda: apart.gateway.status()["revision"] == "0000000000b2")
    assert len(apart.gateway.children()) == 2, "control is nobody's child"


def test_a_reload_that_is_asked_for_without_control_waits_for_it(apart: Apart) -> None:
    apart.controls[-1].end()
    apart.gateway.until_logged("without control until it comes again")
    changed = dataclasses.replace(apart.gateway.snapshot, revision="0000000000b2", tenants=(Tenant("acme"),))
    apart.gateway.reload(changed)
    assert apart.gateway.ask()["revision"] == "0000000000a1"
    apart.start_control()
    eventually(lambda: apart.gateway.ask()["revision"] == "0000000000b2")


def test_an_upgrade_of_the_gateway_leaves_control_alone(apart: Apart) -> None:
    before = pids(apart.gateway)
    with Asking(apart.gateway) as asking:
        for _ in range(2):
            assert upgrade(apart.gateway)["state"] == "done", apart.gateway.log_file.read_text()
    assert asking.failures == []
    assert not set(pids(apart.gateway).values()) & set(before.values())
    assert apart.controls[-1].process.poll() is None
    assert apart.gateway.status()["upgrade"]["state"] == "done"
    changed = dataclasses.replace(apart.gateway.snapshot, revision="0000000000b2", tenants=(Tenant("acme"),))
    apart.gateway.reload(changed)
    eventually(lambda: apart.gateway.ask()["revision"] == "0000000000b2")
    # And the socket has passed on: the next control is let in by the next program.
    apart.controls[-1].end()
    apart.start_control()
    apart.until_served()
    assert apart.gateway.status()["revision"] == "0000000000b2"


def test_an_upgrade_needs_no_control(apart: Apart) -> None:
    before = pids(apart.gateway)
    apart.controls[-1].end()
    apart.gateway.until_logged("without control until it comes again")
    apart.gateway.process.send_signal(signal.SIGUSR2)
    eventually(lambda: (found := outcome(apart.gateway)) and found["state"] == "done", 30)
    apart.start_control()
    apart.until_served()
    assert not set(pids(apart.gateway).values()) & set(before.values())


def test_an_upgrade_that_fails_leaves_both_as_they_were(apart: Apart) -> None:
    before = pids(apart.gateway)
    write_program(apart.folder / "program", ROOT, "raise ImportError('no such module')")
    assert "does not start (exit 1)" in upgrade(apart.gateway)["reason"]
    assert pids(apart.gateway) == before
    assert apart.controls[-1].process.poll() is None


def test_new_workers_in_a_crash_loop_are_turned_round(apart: Apart) -> None:
    """The rehearsal's worker has no slot, so it does not see what crashes in slot 1 of the new program only."""
    before = pids(apart.gateway)
    crash = "os.environ['ASCPROXY_TEST_CRASH_SLOT'] = '1'"
    write_program(apart.folder / "program", ROOT, crash)
    with Asking(apart.gateway) as asking:
        found = upgrade(apart.gateway)
        assert "the worker of slot 1 exited 3 times" in found["reason"]
        eventually(lambda: pids(apart.gateway) == before, what="the old workers are in their slots")
    assert asking.failures == []
    assert apart.controls[-1].process.poll() is None
    assert apart.gateway.status()["upgrade"]["state"] == "failed"


def test_another_user_is_refused_as_control(tmp_path: Path) -> None:
    made = Apart(tmp_path, apart=OTHER)
    try:
        made.start_control()
        line = made.gateway.until_logged("at the gateway's socket is refused")
        assert f"(uid {os.geteuid()})" in line["message"] and f"uid {OTHER}" in line["message"]
        assert made.gateway.logged("ready") is None
        assert made.controls[0].process.wait(10) == 0
    finally:
        made.end()


def test_another_user_is_refused_as_gateway(tmp_path: Path) -> None:
    made = Apart(tmp_path)
    try:
        control = made.start_control(peer=OTHER)
        control.until_said("gateway.sock is refused")
        assert f"uid {OTHER}" in control.log_file.read_text()
        assert control.process.poll() is None, "it goes on looking for the right one"
        made.start_control()
        made.gateway.until_ready()
    finally:
        made.end()


def test_a_second_control_is_refused(apart: Apart) -> None:
    second = apart.start_control()
    assert second.process.wait(10) == 0
    assert apart.gateway.logged("control is refused: there is one") is not None
    assert apart.served()


def test_a_control_that_does_not_answer_is_let_go(apart: Apart) -> None:
    hung = apart.controls[-1]
    hung.process.send_signal(signal.SIGSTOP)
    with Asking(apart.gateway) as asking:
        line = apart.gateway.until_logged("without control until it comes again", SILENT_S)
        apart.start_control()
        apart.until_served()
    assert line["reason"] == "it does not answer"
    assert asking.failures == []
    hung.process.send_signal(signal.SIGCONT)
    assert hung.process.wait(10) == 0, "it has been hung up on"


def test_control_ends_with_the_gateway_and_answers_until_its_workers_have_ended(apart: Apart) -> None:
    held = apart.gateway.hold("/late")
    apart.gateway.process.terminate()
    apart.gateway.until_logged("draining")
    assert apart.gateway.public("/healthz/live")[0] == 200
    while held.recv(65536):
        pass
    held.close()
    assert apart.gateway.process.wait(10) == 0
    assert apart.controls[-1].process.wait(10) == 0
    assert not Path(apart.gateway.snapshot.node.run_dir).exists()


def test_a_control_that_is_killed_during_a_drain_is_replaced(apart: Apart) -> None:
    held = apart.gateway.hold("/late")
    other = apart.gateway.hold("/hold")  # until the deadline of the drain, 2 s
    apart.controls[-1].process.kill()
    apart.gateway.process.terminate()
    apart.gateway.until_logged("without control until it comes again")
    last = apart.start_control()
    apart.gateway.until_logged("control has come")
    assert apart.gateway.process.wait(15) == 0
    assert last.process.wait(10) == 0
    held.close()
    other.close()


def test_a_run_directory_that_somebody_has_emptied_does_not_end_the_gateway(apart: Apart) -> None:
    (Path(apart.gateway.snapshot.node.run_dir) / "shared.page").unlink()
    apart.controls[-1].end()
    apart.start_control()
    apart.gateway.until_logged("control does not serve")
    assert apart.gateway.ask()["revision"] == "0000000000a1"


def test_nothing_is_left_when_the_gateway_is_killed(apart: Apart) -> None:
    workers = pids(apart.gateway)
    apart.gateway.process.kill()
    apart.gateway.process.wait(10)
    assert apart.controls[-1].process.wait(10) == 0
    eventually(lambda: all(gone(pid) for pid in workers.values()))


def test_a_broken_configuration_ends_the_gateway_with_its_findings(tmp_path: Path) -> None:
    made = Apart(tmp_path, config=b"{")
    try:
        made.start_control()
        assert made.gateway.process.wait(15) == 1
        assert "not a snapshot" in made.gateway.log_file.read_text()
    finally:
        made.end()


def test_a_run_dir_that_the_node_file_says_otherwise_is_one_sentence(tmp_path: Path) -> None:
    first = snapshot(tmp_path)
    elsewhere = dataclasses.replace(first, node=dataclasses.replace(first.node, run_dir=str(tmp_path / "elsewhere")))
    made = Apart(tmp_path)
    try:
        made.gateway.write(elsewhere)
        made.start_control()
        assert made.gateway.process.wait(15) == 1
        assert f"run_dir of the node file is {tmp_path}/elsewhere" in made.gateway.log_file.read_text()
    finally:
        made.end()


# the real parts, by the command that the units run


def test_the_command_runs_each_part(tmp_path: Path) -> None:
    """Under one user here; as two it is in tests/process/test_systemd_units.py."""
    with Simulator() as simulator, contextlib.ExitStack() as ending:
        made = RealService(tmp_path / "d", upstream=simulator.url, models=[simulator.model])
        processes = {}
        for part in ("gateway", "control"):
            given = ["--only", part, "--peer", str(os.geteuid()), "--run-dir", str(tmp_path / "run")]
            with (tmp_path / part).open("wb") as log:
                processes[part] = process = subprocess.Popen(
                    [sys.executable, "-m", "ascproxy", "serve", str(made.folder), *given],
                    stdout=log, stderr=log, cwd=ROOT,
                )  # fmt: skip
            ending.callback(process.wait, 20)
            ending.callback(process.kill)
        eventually(lambda: healthy(made), 20, (tmp_path / "gateway").read_text())
        assert models(made, made.key) == 200
        assert made.status()["separation"] == "none", "one user is no separation"
        created = command("key", "create", "--tenant", "default", "--config", str(made.folder), "--json")
        key = json.loads(created.stdout)
        assert models(made, key["api_key"]) == 200
        assert command("key", "revoke", key["id"], "--config", str(made.folder)).returncode == 0
        assert models(made, key["api_key"]) == 401, "workers hear of it at once"
        upgraded = command("upgrade", "--config", str(made.folder))
        assert upgraded.returncode == 0, upgraded.stderr + (tmp_path / "gateway").read_text()
        assert models(made, made.key) == 200
        assert processes["control"].poll() is None
        processes["gateway"].terminate()
        assert [processes[part].wait(20) for part in ("gateway", "control")] == [0, 0]


def healthy(service: RealService) -> bool:
    try:
        return service.health("ready")[0] == 200
    except OSError:
        return False


def models(service: RealService, key: str) -> int:
    return int(service.ask("/v1/models", method="GET", key=key)[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "gateway"], "--only, --peer and --run-dir come together; missing: --peer and --run-dir"),
        (["--peer", "root", "--run-dir", "/run/x"], "come together; missing: --only"),
        (["--only", "control", "--peer", "nobody-of-this-name", "--run-dir", "/run/x"], "no user nobody-of-this-name"),
    ],
)
def test_half_a_command_is_one_sentence(given: list[str], said: str) -> None:
    done = command("serve", "/etc/nowhere", *given)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
