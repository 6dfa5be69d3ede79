"""Measures what a request costs in the gateway and in its peers, interleaved, and prints the table."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import gateway, h2load, lines, machine, native, noise, table
from bench.gateway import Gateway
from bench.lines import Kind, Line, Turn
from bench.peers import Envoy, Haproxy, LiteLLM, Nginx, Peer, VllmRouter
from bench.subject import Bare, Place, Subject

SUBJECTS: dict[str, type[Subject]] = {s.name: s for s in (Bare, Nginx, Haproxy, Envoy, VllmRouter, LiteLLM, Gateway)}
STANDARD = ("bare", "nginx", "haproxy", "ascproxy")  # the others are measured where they are asked for
WORKERS = (1, 4)  # of the start line
RESULTS = Path(__file__).resolve().parent / "results"


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def names(known: dict[str, Any], what: str) -> Any:
    """A converter for argparse: a comma-separated list of known names, in the order of the table."""

    def convert(text: str) -> list[str]:
        asked = {name.strip().lower() for name in text.split(",")}
        unknown = asked - {name.lower() for name in known}
        if unknown:
            raise argparse.ArgumentTypeError(f"no {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return [name for name in known if name.lower() in asked]

    return convert


def sizes(text: str) -> list[int]:
    """A converter for argparse: ascending numbers of at least 1, the first of which the others are compared with."""
    try:
        found = sorted({int(part.replace("_", "")) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: 10,1000,100000") from None
    if found[0] < 1:
        raise argparse.ArgumentTypeError("sizes are at least 1")
    return found


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench/run",
        description=__doc__,
        epilog="for example: bench/run --only W1,SSE --peers nginx,ascproxy --rounds 5",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with every line and subject (default 3)")
    parser.add_argument(
        "--windows", type=int, default=4, help="windows of each subject and line in a round (default 4)"
    )
    parser.add_argument("--seconds", type=float, default=1, help="length of a measured window (default 1)")
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds of load before it (default 0.3)")
    parser.add_argument(
        "--only",
        type=names(lines.LINES, "line"),
        default=list(lines.LINES),
        metavar="LINES",
        help=f"of {','.join(lines.LINES)}",
    )
    parser.add_argument(
        "--peers",
        type=names(SUBJECTS, "subject"),
        default=list(STANDARD),
        metavar="NAMES",
        help=f"of {','.join(SUBJECTS)} (default {','.join(STANDARD)})",
    )
    parser.add_argument(
        "--keys", type=sizes, default=[10, 1000, 100_000, 1_000_000], metavar="SIZES", help="of the line keys"
    )
    parser.add_argument("--routes", type=sizes, default=[1, 10, 100, 1000], metavar="SIZES", help="of the line routes")
    parser.add_argument("--limit", action="store_true", help="the peers also limit the rate of each caller")
    parser.add_argument("--json", action="store_true", help="print the raw figures instead of the table")
    chosen = parser.parse_args(argv)
    if chosen.rounds < 1 or chosen.windows < 1 or chosen.seconds <= 0 or chosen.warmup < 0:
        parser.error("--rounds, --windows, --seconds and --warmup are positive")
    if "latency" in chosen.only and "bare" not in chosen.peers:
        chosen.peers.insert(0, "bare")  # what is added is added to something
    return chosen


class Contestant:
    """A subject that is measured in turn with others: what it is, and how it is made when its turn comes."""

    def __init__(
        self,
        name: str,
        make: Callable[[Place], Subject],
        size: int | None = None,
        callers: lines.Callers | None = None,
    ) -> None:
        self.name = name
        self.make = make
        self.size = size
        self.callers = callers

    @property
    def label(self) -> str:
        """For progress and notes."""
        return self.name if self.size is None else f"{self.name} {self.size:,}"


class Run:
    """One run: the stub, the subjects that can run here, and what was measured."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.cores = machine.cores()
        self.notes: list[str] = []
        self.samples: list[lines.Sample] = []
        self.starts: list[lines.Start] = []
        self.subjects = []
        for name in chosen.peers:
            reason = SUBJECTS[name].missing()
            if reason is None:
                self.subjects.append(name)
            else:
                self.notes.append(reason)
                say(reason)
        reason = h2load.missing()
        if reason is not None and any(lines.LINES[name].mode == "h2" for name in chosen.only):
            chosen.only = [name for name in chosen.only if lines.LINES[name].mode != "h2"]
            self.notes.append(reason)
            say(reason)
        self.failed: set[tuple[str, str]] = set()  # line, label
        self.sized: dict[str, list[Contestant]] = {}  # by line: directories that are filled once a run
        self.window = lines.Window(self.cores, chosen.seconds, chosen.warmup)
        self.head: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            **machine.description(),
            "load_average": f"{os.getloadavg()[0]:.2f}",
            "placement": f"proxy on core {self.cores.proxy}, stub on {self.cores.stub}, load on {self.cores.load}",
            "versions": [v for v in (SUBJECTS[name].version() for name in self.subjects) if v],
            "peers": "key check, JSON log" + (", rate limit" if chosen.limit else ""),
            "rounds": chosen.rounds,
            "windows": chosen.windows,
            "seconds": chosen.seconds,
        }
        self._ticks = noise.read()

    # -- one subject

    def enter(self, stack: ExitStack, line: Line, contestant: Contestant, stub: lines.Stub) -> Subject | None:
        """Starts a subject in fresh folders, which end with the stack. None: it has not what the line needs, or does
        not start; then it is named, and left out of the line from then on."""
        logs = Path(tempfile.mkdtemp(prefix="ascproxy-bench-", dir=machine.volatile_dir()))
        stack.callback(shutil.rmtree, logs, ignore_errors=True)
        state = Path(tempfile.mkdtemp(prefix="ascproxy-bench-"))
        stack.callback(shutil.rmtree, state, ignore_errors=True)
        logs.chmod(0o755)  # a peer's worker that gives up root reads from it
        subject = contestant.make(
            Place(self.cores.proxy, stub.port, logs, state, tls=line.tls, callers=line.connections)
        )
        stack.callback(subject.stop)
        try:
            subject.start()
        except machine.StartError as error:
            self.give_up(line, contestant, error)
            return None
        if (line.tls and not subject.tls_port) or (line.kind is Kind.MEMORY and subject.pid is None):
            return None
        return subject

    def give_up(self, line: Line, contestant: Contestant, error: machine.StartError) -> None:
        """Notes what cannot be measured, and is not tried again in this line."""
        self.failed.add((line.name, contestant.label))
        self.notes.append(f"{line.name} {contestant.label} cannot be measured: {error}")
        say(self.notes[-1])

    def one(self, line: Line, contestant: Contestant, subject: Subject, turn: Turn, stub: lines.Stub) -> None:
        """Measures a started subject once."""
        try:
            sample = lines.measure(line, subject, turn, stub, self.window, callers=contestant.callers)
        except machine.StartError as error:
            self.give_up(line, contestant, error)
            return
        self.samples.append(sample)
        cost = "" if sample.cpu_us is None else f"{sample.cpu_us:8.2f} us, {sample.busy:4.0%} busy, "
        rate = f"{sample.per_second:10,.0f} {line.unit}/s, {sample.errors} errors"
        disturbed = ", disturbed" if sample.noise is not None and sample.noise.useless else ""
        say(f"round {turn.round}.{turn.window}  {line.name:8}{contestant.label:20}{cost}{rate}{disturbed}")

    # -- one line

    def contest(self, line: Line, contestants: list[Contestant], number: int, stub: lines.Stub) -> None:
        """All of them wait side by side, and one after the other is measured in a short window, again and again: what
        the machine does meanwhile meets all alike. The gateway is not paused: its supervisor would take a worker
        that was for one that hangs; idle it takes less than a hundredth of the core."""
        with ExitStack() as stack:
            started = [
                (contestant, subject)
                for contestant in contestants
                if (subject := self.enter(stack, line, contestant, stub)) is not None
            ]
            for _, subject in started:
                subject.pause()
            for window in range(1, self.chosen.windows + 1):
                first = (number + window) % max(1, len(started))
                for contestant, subject in started[first:] + started[:first]:
                    if (line.name, contestant.label) not in self.failed:
                        subject.resume()
                        self.one(line, contestant, subject, Turn(number, window, contestant.size), stub)
                        subject.pause()

    def apart(self, line: Line, contestants: list[Contestant], number: int, stub: lines.Stub) -> None:
        """Each alone from its start to its end: memory."""
        for contestant in contestants:
            with ExitStack() as stack:
                subject = self.enter(stack, line, contestant, stub)
                if subject is not None:
                    self.one(line, contestant, subject, Turn(number, 1, contestant.size), stub)

    def anywhere(self, workers: int, place: Place) -> Gateway:
        """The gateway with several workers, on all cores."""
        return Gateway(replace(place, core=set(self.cores.all)), workers=workers)

    def start_up(self, number: int, stub: lines.Stub) -> None:
        """How long the gateway takes to be ready, on all cores, with one worker and with several."""
        for workers in WORKERS:
            contestant = Contestant(Gateway.name, partial(self.anywhere, workers))
            with ExitStack() as stack:
                subject = self.enter(stack, lines.LINES["start"], contestant, stub)
                if isinstance(subject, Gateway):
                    self.starts.append(lines.Start(Gateway.name, workers, number, subject.ready_s))
                    say(f"round {number}    start   {workers} workers: {subject.ready_s:.2f} s")

    def sizes_of(self, line: Line, stub: lines.Stub, stack: ExitStack) -> list[Contestant]:
        """The gateway with each of the line's sizes; the directories are made and filled at the first call."""
        if line.name in self.sized:
            return self.sized[line.name]
        folder = Path(tempfile.mkdtemp(prefix="ascproxy-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        found = self.sized[line.name] = []
        for size in self.chosen.keys if line.name == "keys" else self.chosen.routes:
            say(f"preparing {size:,} {line.name}")
            label = Contestant(Gateway.name, Gateway, size)
            try:
                directory = gateway.make(folder / str(size), stub.port)
                if line.name == "keys":
                    gateway.add_keys(directory, size)
                    callers = lines.Callers(keys=directory.keys)
                else:
                    gateway.add_routes(directory, size)
                    callers = lines.Callers(models=directory.models)
            except machine.StartError as error:
                self.give_up(line, label, error)
                continue
            found.append(Contestant(Gateway.name, partial(Gateway, directory=directory), size, callers))
        return found

    def all(self) -> None:
        """Rounds outermost, so that what the machine does meanwhile meets every subject; each begins with another."""
        os.sched_setaffinity(0, {self.cores.load})  # this process, too, stays off the proxy's core
        with ExitStack() as stack:
            stubs = {}
            for interval_ms in {lines.LINES[name].interval_ms for name in self.chosen.only}:
                stubs[interval_ms] = lines.Stub(self.cores.stub, interval_ms)
                stack.callback(stubs[interval_ms].stop)
            for number in range(1, self.chosen.rounds + 1):
                for line in (lines.LINES[name] for name in self.chosen.only):
                    if number == 1 or not line.once:
                        self.line(line, number, stubs[line.interval_ms], stack)
        after = noise.read()
        before, self._ticks = self._ticks, after
        spent = {which: getattr(after[-1], which) - getattr(before[-1], which) for which in ("busy", "idle", "steal")}
        self.head["steal"] = spent["steal"] / max(1, sum(spent.values()))
        self.head["load_average_after"] = f"{os.getloadavg()[0]:.2f}"

    def line(self, line: Line, number: int, stub: lines.Stub, stack: ExitStack) -> None:
        """One line in one round."""
        turn = (number - 1) % max(1, len(self.subjects))
        plain = [
            Contestant(name, SUBJECTS[name])
            for name in self.subjects[turn:] + self.subjects[:turn]
            if (line.name, name) not in self.failed
        ]
        match line.kind:
            case Kind.CPU:
                self.contest(line, plain, number, stub)
            case Kind.MEMORY:
                self.apart(line, plain, number, stub)
            case Kind.SIZES if Gateway.name in self.subjects:
                sized = self.sizes_of(line, stub, stack)
                self.contest(line, [c for c in sized if (line.name, c.label) not in self.failed], number, stub)
            case Kind.START if Gateway.name in self.subjects:
                self.start_up(number, stub)

    # -- what is told

    def doubts(self) -> list[str]:
        """What was not measured, and what should not be believed."""
        return [*self.notes, *table.doubts(self.samples)]

    def text(self) -> str:
        """The table with its head and its doubts."""
        h = self.head
        parts = [
            f"{h['at']}, {h['cpu']}, {h['cores']} cores, {h['kernel']}, load average {h['load_average']} before and "
            f"{h['load_average_after']} after, {h['steal']:.1%} of all time stolen\n"
            f"{', '.join(self.head['versions'])}, Python {h['python']}; peers: {h['peers']}\n"
            f"{h['placement']}; medians of {h['rounds']} rounds of {h['windows']} windows of {h['seconds']:g} s",
            table.summary(self.samples, self.chosen.only, self.subjects),
            table.ratios(self.samples, self.chosen.only, self.subjects),
            table.by_size(self.samples, self.chosen.only),
            table.streams(self.samples, self.chosen.only, self.subjects),
            table.starts(self.starts),
            table.detail(self.samples, self.chosen.only, self.subjects),
            "\n".join(f"! {note}" for note in self.doubts()),
        ]
        return "\n\n".join(part for part in parts if part)

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            **self.head,
            "notes": self.doubts(),
            "samples": [sample.as_json() for sample in self.samples],
            "starts": [start.as_json() for start in self.starts],
        }


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: all that was asked for was measured; 1: something is missing or failed; 2: usage."""
    chosen = options(argv)
    Peer.limited = chosen.limit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name in native.LIBRARIES:
            native.program(name)
        run = Run(chosen)
        run.all()
    except (native.BuildError, machine.StartError) as error:
        say(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        say("bench: interrupted")
        return 130
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / time.strftime("%Y%m%d-%H%M%S")
    stem.with_suffix(".json").write_text(json.dumps(run.as_json(), indent=1) + "\n")
    stem.with_suffix(".txt").write_text(run.text() + "\n")
    print(json.dumps(run.as_json(), indent=1) if chosen.json else run.text())
    say(f"kept in bench/results/{stem.name}.json and .txt")
    return 1 if run.notes or any(s.errors for s in run.samples) else 0
