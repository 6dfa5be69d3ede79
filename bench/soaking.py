"""An hour of the service at 70 % of what it can do, and what must be true at the end.

Two loads run at the same time, and each request of both carries a marker of its own, which its answer must say. The
storm (tests/kit/storm.py) is plaintext and TLS, one answer and streams, fresh connections and kept ones, against the
simulator. The other is pressure (bench/load.c against bench/stub.c), plaintext and TLS in halves, at a share of the
capacity that is measured first, with the storm already running. Meanwhile workers are killed, the service reloaded or
upgraded, if asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascproxy.control.serving import KEEP_ALIVE_S
from ascproxy.supervisor.predecessors import IDLE_MS
from bench import lines, machine, native, process, verdict
from bench.subject import MODEL, Place, Subject
from tests.kit.service import Service, Simulator, command
from tests.kit.storm import PATIENCE_S, Storm, Way

SIM = ("--tokens", "6", "--rate", "100")
WAYS = (Way(), Way(stream=True), Way(tls=True), Way(tls=True, stream=True))
WORKERS = 2
CAPACITY_S = 3.0
CONNECTIONS = 32
# For the last connections of a load to be closed, those of pools too; control keeps those of the commands the longest.
QUIET_S = KEEP_ALIVE_S + 15
# For workers that were replaced to end: how long they keep idle connections, and the last answers of the load.
DRAINED_S = IDLE_MS / 1000 + 2 * PATIENCE_S
UPGRADE = signal.SIGUSR2


def say(text: str) -> None:
    """Progress, apart from the report."""
    print(text, file=sys.stderr, flush=True)


class Target(Subject):
    """The service as the pressure sees it."""

    name = "ascproxy"

    def __init__(self, service: Service) -> None:
        nowhere = Path()
        super().__init__(
            Place(0, 0, nowhere, nowhere), port=service.http_port, tls_port=service.https_port, key=service.key
        )


# -- what is seen


def anonymous_kib(pid: int) -> int | None:
    """Memory that is no file's: what leaks. None when the process has ended."""
    try:
        return process.parse_smaps_rollup(Path(f"/proc/{pid}/smaps_rollup").read_text())["Anonymous"]
    except (FileNotFoundError, ProcessLookupError):
        return None


def descriptors(pid: int) -> int | None:
    """How many it has open. None when the process has ended."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return None


def socket_inodes(pid: int) -> frozenset[int]:
    """The sockets that a process has open, by inode."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(entry.readlink())
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return frozenset(found)


def callers(table: str, inodes: frozenset[int], listening: set[int]) -> frozenset[int]:
    """The callers' ports of those connections to the ports in `listening` whose socket is one of `inodes`. `table` is
    the text of /proc/net/tcp."""
    found = set()
    for line in table.splitlines()[1:]:
        fields = line.split()
        local, remote = (int(fields[i].rpartition(":")[2], 16) for i in (1, 2))
        if local in listening and remote and int(fields[9]) in inodes:
            found.add(remote)
    return frozenset(found)


@dataclass
class Watch:
    """The processes of the service over time. ``spare``: descriptors that each may hold besides those from before."""

    service: Service
    spare: int = 0
    roles: dict[int, str] = field(default_factory=dict)
    memory: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    before: dict[int, int | None] = field(default_factory=dict)

    @property
    def root(self) -> int:
        """The supervisor, whose pid stays."""
        assert self.service.process is not None
        return self.service.process.pid

    def living(self) -> dict[int, str]:
        """Each process and its role: the control that was there first is known by not being a worker, every later child
        is taken for a worker."""
        if not self.roles:
            workers = {worker["pid"] for worker in self.service.status()["workers"]}
            self.roles = {pid: "worker" if pid in workers else "control" for pid in process.children(self.root)}
        found = {self.root: "supervisor"}
        for pid in process.children(self.root):
            found[pid] = self.roles.setdefault(pid, "worker")
        return found

    def workers(self) -> list[int]:
        """Those on the data path."""
        return [pid for pid, role in self.living().items() if role == "worker"]

    def count(self) -> dict[int, int | None]:
        """Descriptors of each."""
        return {pid: descriptors(pid) for pid in self.living()}

    def sample(self, at: float) -> None:
        """One point of each series."""
        for pid in self.living():
            kib = anonymous_kib(pid)
            if kib is not None:
                self.memory.setdefault(pid, []).append((at, kib))

    def draining(self) -> frozenset[int]:
        """Workers that another one has replaced and that still live, by the service's own word."""
        told = {worker["pid"] for worker in self.service.status()["workers"] if worker["state"] == "draining"}
        return frozenset(told & set(process.children(self.root)))

    async def drained(self) -> frozenset[int]:
        """Waits for replaced workers to end; those that have not when patience ends."""
        end = time.monotonic() + DRAINED_S
        while left := await asyncio.to_thread(self.draining):
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.5)
        return left

    async def quiet(self) -> dict[int, int | None]:
        """Descriptors of each, once they are as few as before, or when patience ends."""
        end = time.monotonic() + QUIET_S
        bound = {self.roles.get(pid, "supervisor"): n + self.spare for pid, n in self.before.items() if n is not None}
        while True:
            now = self.count()
            over = [
                pid for pid, n in now.items() if n is not None and n > bound.get(self.roles.get(pid, "supervisor"), n)
            ]
            if not over or time.monotonic() > end:
                return now
            await asyncio.sleep(0.1)

    def processes(self, after: dict[int, int | None], draining: frozenset[int]) -> tuple[verdict.Process, ...]:
        """What is judged."""
        return tuple(
            verdict.Process(
                pid,
                self.roles.get(pid, "supervisor"),
                tuple(points),
                descriptors_before=known + self.spare if (known := self.before.get(pid)) is not None else None,
                descriptors_after=after.get(pid),
                draining=pid in draining,
            )
            for pid, points in self.memory.items()
        )


# -- what is done to it


def wait_stopped(pid: int) -> None:
    """Returns when a process that was sent SIGSTOP has stopped: until then it may still accept a connection."""
    end = time.monotonic() + 1
    while process.parse_state(Path(f"/proc/{pid}/stat").read_text()) != "T":
        if time.monotonic() > end:
            raise machine.StartError(f"process {pid} does not stop")
        time.sleep(0.001)


def kill_one(watch: Watch) -> verdict.Kill:
    """Kills a worker. It is stopped first, so that what it has open can be read without a race."""
    victim = min(watch.workers())
    os.kill(victim, signal.SIGSTOP)
    wait_stopped(victim)
    listening = {watch.service.http_port, watch.service.https_port}
    ports = callers(Path("/proc/net/tcp").read_text(), socket_inodes(victim), listening)
    at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    return verdict.Kill(at, victim, ports)


def change(number: int) -> Callable[[dict[str, Any]], None]:
    """An edit of the resources that a reload takes in: another route."""

    def edit(document: dict[str, Any]) -> None:
        provider = next(iter(document["providers"]))
        document["routes"]["soak-more"] = {"models": [f"more-{number}"], "targets": [{"provider": provider}]}

    return edit


def upgrade_of(help_text: str, caught: int) -> str:
    """How this service is upgraded: by the command `upgrade`, if `--help` names it, else by a signal, if the supervisor
    catches it (`caught`: the bits of SigCgt in /proc/PID/status). "": not at all."""
    if any(line.strip(" │|").startswith("upgrade ") for line in help_text.splitlines()):
        return "command"
    return "signal" if caught >> (UPGRADE - 1) & 1 else ""


def signals_caught(pid: int) -> int:
    """The bits of the signals that a process handles."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return int(line.split()[1], 16)
    return 0


class Actions:
    """What disturbs the service, how often, and what it came to."""

    def __init__(self, watch: Watch, chosen: argparse.Namespace) -> None:
        self.watch = watch
        self.kills: list[verdict.Kill] = []
        self.reloads = 0
        self.upgrades = 0
        self.how = ""
        self.upgrading: asyncio.Future[subprocess.CompletedProcess[str]] | None = None
        every: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (chosen.kill, self.kill),
            (chosen.reload, self.reload),
            (chosen.upgrade, self.upgrade),
        ]
        self.every = [(seconds, act) for seconds, act in every if seconds]

    def find_upgrade(self) -> bool:
        """Whether the service can be upgraded, and how."""
        self.how = upgrade_of(command("--help").stdout, signals_caught(self.watch.root))
        return bool(self.how)

    async def kill(self) -> None:
        """One worker."""
        self.kills.append(await asyncio.to_thread(kill_one, self.watch))

    async def reload(self) -> None:
        """With a change, so that the revision is a new one."""
        self.reloads += 1
        self.watch.service.edit("resources.yaml", change(self.reloads))
        self.watch.service.signal(signal.SIGHUP)

    async def upgrade(self) -> None:
        """In place."""
        self.upgrades += 1
        if self.how == "command":
            folder = str(self.watch.service.folder)
            self.upgrading = asyncio.ensure_future(asyncio.to_thread(command, "upgrade", "--config", folder))
            await self.upgraded()
        else:
            self.watch.service.signal(UPGRADE)

    async def upgraded(self) -> None:
        """Waits for the upgrade under way, if there is one: the end of the load cancels who waits, not the upgrade."""
        if self.upgrading is not None:
            done = await asyncio.shield(self.upgrading)
            if done.returncode != 0:
                raise machine.StartError(f"`ascproxy upgrade` ended with exit code {done.returncode}: {done.stderr}")

    async def one(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        """One action, again and again."""
        while True:
            await asyncio.sleep(seconds)
            await act()

    async def all(self) -> None:
        """All of them, and a sample of memory each second."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.sample())
            for seconds, act in self.every:
                group.create_task(self.one(seconds, act))

    async def sample(self) -> None:
        """Reads what the processes hold."""
        while True:
            await asyncio.to_thread(self.watch.sample, time.monotonic())
            await asyncio.sleep(1)


# -- the pressure


def capacity(target: Target, *, tls: bool) -> float:
    """Requests a second that the service answers in a closed loop, with all that runs beside it. StartError."""
    line = lines.Line("capacity", "", tls=tls, connections=CONNECTIONS)
    load = lines.Load(line, target, set(os.sched_getaffinity(0)))
    try:
        load.expect("ready")
        load.tell("begin")
        time.sleep(CAPACITY_S)
        return float(load.tell("end")["rps"])
    finally:
        load.stop()


def press(target: Target, rate: float, *, tls: bool) -> lines.Load:
    """Starts an open loop at a rate, its window open. StartError."""
    line = lines.Line("pressure", "", "rate", tls=tls, connections=CONNECTIONS, rate=max(1, round(rate)), marked=True)
    load = lines.Load(line, target, set(os.sched_getaffinity(0)))
    load.expect("ready")
    load.tell("begin")
    return load


def relieve(name: str, load: lines.Load, rate: float) -> verdict.Pressure:
    """Closes the window; what it came to."""
    try:
        told = load.tell("end")
    except machine.StartError as error:  # it gave up: nothing after that was answered
        gone = verdict.Failure(time.monotonic(), time.monotonic(), 0, str(error))
        return verdict.Pressure(name, due=1, answered=0, failures=(gone,))
    finally:
        load.stop()
    failures = tuple(
        verdict.Failure(one["opened"], one["ended"], one["port"], one["error"], one["foreign"])
        for one in told["failed"]
    )
    return verdict.Pressure(
        name,
        due=round(max(1, round(rate)) * told["seconds"]),
        answered=told["requests"],
        failures=failures,
        lost=told["lost"],
        untold=told["failures"] - len(failures),
    )


# -- the soak


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench/soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="for example: bench/soak --for 600 --kill 10 --reload 7 --json",
    )
    parser.add_argument("--for", type=float, default=3600, dest="seconds", help="seconds of load (default 3600)")
    parser.add_argument("--share", type=float, default=0.7, help="of the measured capacity, as pressure (default 0.7)")
    parser.add_argument("--rate", type=float, help="pressure in requests a second, instead of a share of the capacity")
    parser.add_argument("--markers", type=float, default=100, help="requests a second of the storm (default 100)")
    parser.add_argument("--kill", type=float, default=0, metavar="S", help="kill -9 a worker every S seconds")
    parser.add_argument("--reload", type=float, default=0, metavar="S", help="reload with a change every S seconds")
    parser.add_argument("--upgrade", type=float, default=0, metavar="S", help="upgrade in place every S seconds")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    chosen = parser.parse_args(argv)
    if chosen.seconds < verdict.SETTLE_S + 5:
        parser.error(f"--for is at least {verdict.SETTLE_S + 5:g}: memory is judged after {verdict.SETTLE_S:g} s")
    if not 0 < chosen.share <= 1 or chosen.markers <= 0 or (chosen.rate is not None and chosen.rate <= 0):
        parser.error("--share is above 0 and at most 1, --markers and --rate are positive")
    if min(chosen.kill, chosen.reload, chosen.upgrade) < 0:
        parser.error("--kill, --reload and --upgrade are seconds")
    return chosen


@contextlib.contextmanager
def running() -> Iterator[tuple[Service, lines.Stub]]:
    """The simulator, the stub, and the service with two workers in front of both. Access lines are made and written,
    to where they fill no disk."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ascproxy-soak-")))
        simulator = stack.enter_context(Simulator(*SIM))
        stub = lines.Stub(min(os.sched_getaffinity(0)), echo=True)
        stack.callback(stub.stop)
        os.sched_setaffinity(stub.child.pid, os.sched_getaffinity(0))

        def both(document: dict[str, Any]) -> None:
            kind = next(iter(document["providers"].values()))["type"]
            document["providers"]["stub"] = {"type": kind, "endpoints": [f"http://127.0.0.1:{stub.port}"]}
            document["routes"]["pressure"] = {"models": [MODEL], "targets": [{"provider": "stub"}]}

        service = Service(
            folder / "d",
            upstream=simulator.url,
            models=[simulator.model],
            workers=WORKERS,
            node=lambda document: document.update(access_log=os.devnull),
            resources=both,
        )
        service.start()
        try:
            yield service, stub
        finally:
            with contextlib.suppress(AssertionError):  # what remains of one that does not stop is killed there
                service.stop()


async def load_it(
    chosen: argparse.Namespace, service: Service, watch: Watch, actions: Actions
) -> tuple[Storm, float, list[verdict.Pressure], dict[str, Any], tuple[verdict.Process, ...]]:
    """The loads from their begin to the last closed connection."""
    storm = Storm(service, chosen.markers, float("inf"), WAYS, keep_good=False)
    target = Target(service)
    rates = {False: (chosen.rate or 0) / 2, True: (chosen.rate or 0) / 2}
    facts: dict[str, Any] = {}
    loads: dict[bool, lines.Load] = {}
    begun = asyncio.Event()
    begin = 0.0

    async def disturb() -> None:
        nonlocal begin
        if not chosen.rate:
            for tls in rates:
                most = await asyncio.to_thread(capacity, target, tls=tls)
                facts["capacity_tls" if tls else "capacity_plaintext"] = round(most)
                rates[tls] = most * chosen.share / 2
                say(f"capacity {'TLS' if tls else 'plaintext'}: {most:,.0f} requests a second")
        for tls, rate in rates.items():
            loads[tls] = press(target, rate, tls=tls)
            facts["pressure_tls" if tls else "pressure_plaintext"] = round(rate)
        begin = time.monotonic()
        begun.set()
        say(
            f"under load for {chosen.seconds:,.0f} s: {sum(rates.values()):,.0f} + {chosen.markers:g} requests a second"
        )
        try:
            async with asyncio.timeout(chosen.seconds):
                await actions.all()
        except TimeoutError:
            storm.stop()
            await asyncio.Event().wait()  # until the storm has its last answer

    try:
        await storm.run(disturb)
    finally:
        pressures = [
            relieve(f"pressure {'TLS' if tls else 'plaintext'}", load, rates[tls]) for tls, load in loads.items()
        ]
    await asyncio.to_thread(watch.sample, time.monotonic())
    say("the load is over; waiting for replaced workers to end and for the last connections to be closed")
    await actions.upgraded()
    draining = await watch.drained()
    return storm, begin, pressures, facts, watch.processes(await watch.quiet(), draining)


def restarts(service: Service) -> int:
    """How many workers were replaced, by the service's own count."""
    return sum(int(worker["restarts"]) for worker in service.status()["workers"])


def soak(chosen: argparse.Namespace) -> verdict.Observed:
    """Runs it. Raises StartError when something cannot be started, or an upgrade is asked for that there is not."""
    with running() as (service, _):
        watch = Watch(service)
        if chosen.upgrade:  # a slot keeps the pages of the processes that were in it at the same time
            watch.spare = WORKERS * (1 + math.ceil(IDLE_MS / 1000 / chosen.upgrade))
        actions = Actions(watch, chosen)
        if chosen.upgrade and not actions.find_upgrade():
            raise machine.StartError(
                "this service has no upgrade: neither the command `ascproxy upgrade`, nor does its supervisor catch "
                f"{UPGRADE.name}; run it without --upgrade"
            )
        watch.before = watch.count()
        since = time.monotonic()
        storm, begin, pressures, facts, processes = asyncio.run(load_it(chosen, service, watch, actions))
        end = time.monotonic()
        replaced = None if actions.upgrades else restarts(service)
        code = service.stop()
    return verdict.Observed(
        begin=begin,
        end=end,
        requests=storm.done,
        requests_due=round(chosen.markers * chosen.seconds),
        failures=tuple(verdict.Failure(o.opened, o.ended, o.port, o.error, o.foreign) for o in storm.failed),
        kills=tuple(actions.kills),
        reloads=actions.reloads,
        upgrades=actions.upgrades,
        restarts=replaced,
        pressures=tuple(pressures),
        processes=processes,
        exit_code=code,
        facts={**machine.description(), **facts, "seconds": round(end - since, 1), "slowest_s": storm.slowest_s},
    )


def text(seen: verdict.Observed, found: list[str]) -> str:
    """The report for people."""
    shown = [
        f"{seen.facts['cpu']}, {seen.facts['cores']} cores, {seen.facts['kernel']}; {WORKERS} workers",
        f"storm: {seen.requests:,} requests, {len(seen.failures)} failed, "
        f"{verdict.owed(seen.failures, seen.kills)} of them on connections of killed workers",
    ]
    shown += [
        f"{p.name}: {p.answered:,} of {p.due:,} answered, {len(p.failures) - p.lost} failed, {p.lost} lost and sent "
        f"again, {verdict.owed(p.failures, seen.kills)} of them on connections of killed workers"
        for p in seen.pressures
    ]
    shown.append(f"{len(seen.kills)} kills, {seen.reloads} reloads, {seen.upgrades} upgrades")
    for p in seen.as_json()["processes"]:
        if p["descriptors_after"] is None:
            continue
        grows = "too short a life to judge" if p["mib_a_minute"] is None else f"{p['mib_a_minute']:+.2f} MiB a minute"
        shown.append(
            f"{p['role']} {p['pid']}: {p['mib_first']:.1f} to {p['mib_last']:.1f} MiB, {grows}; descriptors "
            f"{p['descriptors_before'] if p['descriptors_before'] is not None else '-'} to {p['descriptors_after']}"
        )
    shown += [f"! {violation}" for violation in found] or ["passed"]
    return "\n".join(shown)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: everything that is promised was kept; 1: it was not, or the soak could not run; 2: usage."""
    chosen = options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name in native.LIBRARIES:
            native.program(name)
        seen = soak(chosen)
    except (native.BuildError, machine.StartError, AssertionError, subprocess.SubprocessError) as error:
        say(f"bench/soak: {error}")
        return 1
    except ExceptionGroup as group:
        say(f"bench/soak: {group.exceptions[0]}")
        return 1
    except KeyboardInterrupt:
        say("bench/soak: interrupted")
        return 130
    found = verdict.violations(seen)
    print(json.dumps({**seen.as_json(), "violations": found}, indent=1) if chosen.json else text(seen, found))
    return 1 if found else 0
