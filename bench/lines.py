"""The lines of the table: one load each, and how one measurement of it is taken."""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import time
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from bench import h2load, machine, native, noise, process
from bench.subject import MODEL, Subject

UNARY_BYTES = 1500
STREAMS = 500
INTERVAL_MS = 20
MANY_STREAMS = 10_000
MANY_INTERVAL_MS = 1_000  # ten thousand streams are there to be held, not to be fast
# Of the descriptor limit of a subject: two a stream, and what it needs besides.
RESERVED_DESCRIPTORS = 512
# Connections in the making at the same time, where there are thousands: a stream opens with its first event.
OPENING = 512


class Kind(Enum):
    """How a line is measured."""

    CPU = "cost of a unit under a load, in short windows that the subjects take in turn"
    SIZES = "the same, for one subject with stores or routes of several sizes"
    MEMORY = "what a subject holds before and with open streams"
    START = "the time from the command to readiness"


@dataclass(frozen=True, slots=True)
class Line:
    """A load: what the generator is told, and which of its counters is the unit that CPU is divided by."""

    name: str
    title: str
    mode: str = "unary"
    kind: Kind = Kind.CPU
    unit: str = "requests"
    connections: int = 64
    streams: int = 1  # requests under way on each connection: more than one with HTTP/2 only
    interval_ms: int = INTERVAL_MS
    tls: bool = False
    saturates: bool = False  # a closed loop that should keep the subject's core busy
    rate: int = 1000
    opening: int = 0
    marked: bool = False  # each request has a marker that its answer must say back: with a stub that echoes
    once: bool = False  # in the first round only: it does not move with the machine


def many_streams(descriptors: int) -> int:
    """As many streams as a subject with this descriptor limit can hold, at most MANY_STREAMS."""
    return max(1, min(MANY_STREAMS, (descriptors - RESERVED_DESCRIPTORS) // 2))


def all_lines(descriptors: int) -> dict[str, Line]:
    """Every line by its name, in the order of the table."""
    held = {"mode": "sse", "kind": Kind.MEMORY, "unit": "events"}
    many = {**held, "connections": many_streams(descriptors), "interval_ms": MANY_INTERVAL_MS, "opening": OPENING}
    count = f"{many_streams(descriptors):,}"
    found = (
        Line("W1", "unary, keep-alive, 64 connections", saturates=True),
        Line("W2", "unary over TLS 1.3, keep-alive, 64 connections", tls=True, saturates=True),
        # h2load opens no connection in the place of one that was ended: with 32, each stays for more than ten seconds
        # below the 10,000 requests that the gateway allows it.
        Line(
            "H2",
            "unary over HTTP/2 and TLS 1.3, 32 connections with 8 streams each",
            "h2",
            connections=32,
            streams=8,
            tls=True,
            saturates=True,
        ),
        Line("SSE", f"{STREAMS} streams, one event each {INTERVAL_MS} ms", "sse", unit="events", connections=STREAMS),
        Line("SSE-tls", "the same over TLS 1.3", "sse", unit="events", connections=STREAMS, tls=True),
        # A full handshake costs the load, which uses the same OpenSSL, more than the subject: its core is full first.
        Line(
            "W5",
            "new TLS 1.3 connections, P-256, full handshake, one request each",
            "handshake",
            connections=32,
            tls=True,
        ),
        Line("latency", "open loop, 1,000 requests a second", "rate"),
        Line("keys", "W1 by the number of keys in the store", kind=Kind.SIZES, saturates=True),
        Line("routes", "W1 by the number of routes", kind=Kind.SIZES, saturates=True),
        Line("memory", f"idle, then {STREAMS} open streams", connections=STREAMS, **held),  # type: ignore[arg-type]
        Line("streams", f"{count} open streams", once=True, **many),  # type: ignore[arg-type]
        Line("streams-tls", f"{count} open streams over TLS 1.3", once=True, tls=True, **many),  # type: ignore[arg-type]
        Line("start", "start to ready", kind=Kind.START),
    )
    return {line.name: line for line in found}


LINES = all_lines(machine.descriptors())


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement. Times in microseconds per unit of the line, memory in KiB; None where it does not apply."""

    line: str
    subject: str
    round: int
    seconds: float
    units: int
    per_second: float
    cpu_us: float | None
    busy: float | None
    stub_us: float
    load_us: float
    errors: int
    first_error: str
    reconnects: int
    latency_us: dict[str, float]  # p50, p99, max and more; of h2load mean and max
    stub_late: int
    window: int = 1
    size: int | None = None  # keys or routes
    connections: int = 0
    noise: noise.Noise | None = None
    idle: process.Memory | None = None
    loaded: process.Memory | None = None
    worker_idle: process.Memory | None = None
    worker_loaded: process.Memory | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the file of raw results."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a subject: seconds from the command to its own word that it is ready."""

    subject: str
    workers: int
    round: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """For the file of raw results."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Callers:
    """Files with one key and one model a line that the load takes in turn; None: the subject's key, the one model."""

    keys: Path | None = None
    models: Path | None = None


class Load:
    """The running load generator; its window is opened and closed by name."""

    def __init__(self, line: Line, subject: Subject, core: int | set[int], callers: Callers | None = None) -> None:
        argv = [
            str(native.program("load")),
            "--mode",
            line.mode,
            "--connections",
            str(line.connections),
            "--model",
            MODEL,
        ]
        argv += ["--port", str(subject.tls_port if line.tls else subject.port), "--key", subject.key]
        argv += ["--tls"] if line.tls else []
        argv += ["--expect-bytes", str(UNARY_BYTES)] if line.mode != "sse" and not subject.rewrites else []
        argv += ["--rate", str(line.rate)] if line.mode == "rate" else []
        argv += ["--opening", str(line.opening)] if line.opening else []
        argv += ["--marked"] if line.marked else []
        if callers is not None:
            argv += ["--keys", str(callers.keys)] if callers.keys else []
            argv += ["--models", str(callers.models)] if callers.models else []
        self.what = f"{line.name} on {subject.name}"
        self.told: dict[str, Any] = {}
        self.child = machine.launch(argv, core, stdout=subprocess.PIPE, stdin=subprocess.PIPE)

    @property
    def pid(self) -> int:
        """Of the running load."""
        return self.child.pid

    def ready(self, patience_s: float = 60) -> None:
        """Returns when each connection has had a good answer. Raises StartError."""
        self.expect("ready", patience_s)

    def begin(self) -> None:
        """Opens the window. Raises StartError."""
        self.tell("begin")

    def end(self) -> None:
        """Closes the window. Raises StartError."""
        self.told = self.tell("end")

    def report(self) -> dict[str, Any]:
        """What happened in the window."""
        return self.told

    def expect(self, event: str, patience_s: float = 60) -> dict[str, Any]:
        """The next line, which must be this event. Raises StartError."""
        assert self.child.stdout is not None
        if not select.select([self.child.stdout], [], [], patience_s)[0]:
            raise machine.StartError(f"{self.what}: no `{event}` from the load within {patience_s:.0f} s")
        line = self.child.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"event": "end of output"}
        if told["event"] != event:
            raise machine.StartError(f"{self.what}: {told.get('reason', told['event'])}")
        return told

    def tell(self, word: str) -> dict[str, Any]:
        """Sends `begin` or `end` and returns the answer."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(word.encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:  # it gave up; its last line says why
            return self.expect(word)
        return self.expect(word)

    def stop(self) -> None:
        """Closes its connections."""
        machine.stop(self.child)


class Stub:
    """The upstream of everything; one for the whole run, and one for the lines with streams that are only held."""

    def __init__(self, core: int, interval_ms: int = INTERVAL_MS, *, echo: bool = False) -> None:
        self.port = machine.free_port()
        argv = [
            str(native.program("stub")),
            "--port",
            str(self.port),
            "--unary-bytes",
            str(UNARY_BYTES),
            "--model",
            MODEL,
        ]
        argv += ["--interval-ms", str(interval_ms)]
        argv += ["--echo"] if echo else []
        self.child = machine.launch(argv, core, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not machine.answers("127.0.0.1", self.port, "/health"):
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise machine.StartError("the stub does not answer")
            time.sleep(0.01)

    def late(self) -> int:
        """Events that left late or not at all since the start: the stub, or the reader behind it, was too slow."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", "/stats")
        told = json.loads(connection.getresponse().read())
        connection.close()
        return int(told["skipped"] + told["late"])

    def stop(self) -> None:
        """Ends it."""
        machine.stop(self.child)


@dataclass(frozen=True, slots=True)
class Window:
    """How long the load runs before and while it is measured, in seconds, and on which cores."""

    cores: machine.Cores
    seconds: float
    warmup: float


@dataclass(frozen=True, slots=True)
class Turn:
    """Which measurement this is: the round, the window in it, and the size where a line has several."""

    round: int
    window: int = 1
    size: int | None = None


def generator(line: Line, subject: Subject, window: Window, callers: Callers | None) -> Load | h2load.H2Load:
    """The load of a line, started. Raises StartError."""
    if line.mode != "h2":
        return Load(line, subject, window.cores.load, callers)
    return h2load.H2Load(
        subject,
        window.cores.load,
        f"{line.name} on {subject.name}",
        tls=line.tls,
        connections=line.connections,
        streams=line.streams,
        seconds=window.seconds,
        warmup=window.warmup,
        expect_bytes=None if subject.rewrites else UNARY_BYTES,
    )


def measure(
    line: Line, subject: Subject, turn: Turn, stub: Stub, window: Window, *, callers: Callers | None = None
) -> Sample:
    """Measures a started subject: load until ready, warm up, then a window with CPU read at both ends."""
    idle = loaded = worker_idle = worker_loaded = None
    holds = line.kind is Kind.MEMORY and subject.pid is not None
    if holds:
        time.sleep(1)  # what a start leaves to do is done
        idle, worker_idle = memory(subject)
    load = generator(line, subject, window, callers)
    try:
        load.ready(subject.answers_within_s)
        roots = (subject.pid, stub.child.pid, load.pid)
        time.sleep(window.warmup)
        late = stub.late()
        load.begin()
        before, machine_before, own_before = process.living(), noise.read(), sum(os.times()[:2])
        time.sleep(max(window.seconds, 2 * line.interval_ms / 1000))  # an event of each stream is in it
        load.end()
        after, machine_after, own_after = process.living(), noise.read(), sum(os.times()[:2])
        late = stub.late() - late
        if holds:
            loaded, worker_loaded = memory(subject)
        report = load.report()
    finally:
        load.stop()
    spent = [process.cpu_seconds(pid, after) - process.cpu_seconds(pid, before) if pid else None for pid in roots]
    ours = sum(cpu for cpu in spent if cpu is not None) + own_after - own_before
    units = int(report[line.unit])
    errors = report["errors"]

    def each(cpu: float | None) -> float | None:
        return cpu * 1e6 / units if cpu is not None and units else None

    return Sample(
        line=line.name,
        subject=subject.name,
        round=turn.round,
        window=turn.window,
        size=turn.size,
        connections=line.connections,
        seconds=report["seconds"],
        units=units,
        per_second=units / report["seconds"],
        cpu_us=each(spent[0]),
        busy=spent[0] / report["seconds"] if spent[0] is not None else None,
        stub_us=each(spent[1]) or 0.0,
        load_us=each(spent[2]) or 0.0,
        errors=sum(v for k, v in errors.items() if k != "first"),
        first_error=errors["first"],
        reconnects=report["reconnects"] + report["lost"],
        latency_us=report["latency_us"],
        stub_late=late,
        noise=noise.between(
            machine_before,
            machine_after,
            core=window.cores.proxy,
            subject_ticks=(spent[0] or 0.0) * process.TICKS_PER_SECOND,
            own_ticks=ours * process.TICKS_PER_SECOND,
        ),
        idle=idle,
        loaded=loaded,
        worker_idle=worker_idle,
        worker_loaded=worker_loaded,
        report=report,
    )


def memory(subject: Subject) -> tuple[process.Memory, process.Memory]:
    """What the subject's whole tree holds, and its workers alone."""
    assert subject.pid is not None
    return process.memory(subject.pid), process.memory_of(subject.workers())
