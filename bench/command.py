"""`bench/run`: measures every subject under every line, interleaved, and prints the table."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import lines, machine, native, table
from bench.gateway import Gateway
from bench.peers import Haproxy, Nginx, Peer
from bench.subject import Bare, Place, Subject

SUBJECTS: dict[str, type[Subject]] = {s.name: s for s in (Bare, Nginx, Haproxy, Gateway)}
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


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with every line and subject (default 3)")
    parser.add_argument("--seconds", type=float, default=5, help="length of a measured window (default 5)")
    parser.add_argument("--warmup", type=float, default=1, help="seconds of load before it (default 1)")
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
        default=list(SUBJECTS),
        metavar="NAMES",
        help=f"of {','.join(SUBJECTS)}",
    )
    parser.add_argument("--limit", action="store_true", help="the peers also limit the rate of each caller")
    parser.add_argument("--json", action="store_true", help="print the raw figures instead of the table")
    chosen = parser.parse_args(argv)
    if chosen.rounds < 1 or chosen.seconds <= 0 or chosen.warmup < 0:
        parser.error("--rounds, --seconds and --warmup are positive")
    if "latency" in chosen.only and "bare" not in chosen.peers:
        chosen.peers.insert(0, "bare")  # what is added is added to something
    return chosen


class Run:
    """One run: the stub, the subjects that can run here, and what was measured."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.cores = machine.cores()
        self.notes: list[str] = []
        self.samples: list[lines.Sample] = []
        self.subjects = []
        for name in chosen.peers:
            reason = SUBJECTS[name].missing()
            if reason is None:
                self.subjects.append(name)
            else:
                self.notes.append(reason)
                say(reason)
        self.failed: set[str] = set()
        self.window = lines.Window(self.cores.load, chosen.seconds, chosen.warmup)
        self.head = {
            "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            **machine.description(),
            "load_average": f"{os.getloadavg()[0]:.2f}",
            "placement": f"proxy on core {self.cores.proxy}, stub on {self.cores.stub}, load on {self.cores.load}",
            "versions": [v for v in (SUBJECTS[name].version() for name in self.subjects) if v],
            "peers": "key check, JSON log" + (", rate limit" if chosen.limit else ""),
            "rounds": chosen.rounds,
            "seconds": chosen.seconds,
        }

    def one(self, line: lines.Line, name: str, number: int, stub: lines.Stub) -> None:
        """Starts a subject in fresh folders, measures, stops. One that fails is left out from then on, and named."""
        logs = Path(tempfile.mkdtemp(prefix="ascproxy-bench-", dir=machine.volatile_dir()))
        state = Path(tempfile.mkdtemp(prefix="ascproxy-bench-"))
        logs.chmod(0o755)  # a peer's worker that gives up root reads from it
        subject = SUBJECTS[name](Place(self.cores.proxy, stub.port, logs, state))
        try:
            subject.start()
            if line.tls and not subject.tls_port:
                return
            if line.memory and subject.pid is None:
                return
            sample = lines.measure(line, subject, number, stub, self.window)
            self.samples.append(sample)
            cost = "" if sample.cpu_us is None else f"{sample.cpu_us:8.2f} us, {sample.busy:4.0%} busy, "
            rate = f"{sample.per_second:10,.0f} {line.unit}/s, {sample.errors} errors"
            say(f"round {number}  {line.name:8}{name:10}{cost}{rate}")
        except machine.StartError as error:
            self.failed.add(name)
            self.notes.append(f"{name} cannot be measured: {error}")
            say(self.notes[-1])
        finally:
            subject.stop()
            shutil.rmtree(logs, ignore_errors=True)
            shutil.rmtree(state, ignore_errors=True)

    def all(self) -> None:
        """Rounds outermost, so that what the machine does meanwhile meets every subject; each begins with another."""
        os.sched_setaffinity(0, {self.cores.load})  # this process, too, stays off the proxy's core
        stub = lines.Stub(self.cores.stub)
        try:
            for number in range(1, self.chosen.rounds + 1):
                turn = (number - 1) % max(1, len(self.subjects))
                for line in (lines.LINES[name] for name in self.chosen.only):
                    for name in self.subjects[turn:] + self.subjects[:turn]:
                        if name not in self.failed:
                            self.one(line, name, number, stub)
        finally:
            stub.stop()

    def text(self) -> str:
        """The table with its head and its doubts."""
        h = self.head
        parts = [
            f"{h['at']}, {h['cpu']}, {h['cores']} cores, {h['kernel']}, load average {h['load_average']}\n"
            f"{', '.join(self.head['versions'])}, Python {h['python']}; peers: {h['peers']}\n"
            f"{h['placement']}; medians of {h['rounds']} rounds of {h['seconds']:g} s",
            table.summary(self.samples, self.chosen.only, self.subjects),
            table.ratios(self.samples, self.chosen.only, self.subjects),
            table.detail(self.samples, self.chosen.only, self.subjects),
            "\n".join(f"! {note}" for note in (*self.notes, *table.doubts(self.samples))),
        ]
        return "\n\n".join(part for part in parts if part)

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            **self.head,
            "notes": [*self.notes, *table.doubts(self.samples)],
            "samples": [sample.as_json() for sample in self.samples],
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
