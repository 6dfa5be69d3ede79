"""The lines of the table: one load each, and how one measurement of it is taken."""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import machine, native, process
from bench.subject import MODEL, Subject

UNARY_BYTES = 1500
STREAMS = 500
INTERVAL_MS = 20


@dataclass(frozen=True, slots=True)
class Line:
    """A load: what the generator is told, and which of its counters is the unit that CPU is divided by."""

    name: str
    title: str
    mode: str
    unit: str = "requests"
    connections: int = 64
    tls: bool = False
    saturates: bool = True  # a closed loop that should keep the subject's core busy
    memory: bool = False


LINES = {
    line.name: line
    for line in (
        Line("W1", "unary, keep-alive, 64 connections", "unary"),
        Line("W2", "unary over TLS 1.3, keep-alive, 64 connections", "unary", tls=True),
        Line(
            "SSE",
            f"{STREAMS} streams, one event each {INTERVAL_MS} ms",
            "sse",
            unit="events",
            connections=STREAMS,
            saturates=False,
        ),
        # A full handshake costs the load, which uses the same OpenSSL, more than the subject: its core is full first.
        Line(
            "W5",
            "new TLS 1.3 connections, P-256, full handshake, one request each",
            "handshake",
            connections=32,
            tls=True,
            saturates=False,
        ),
        Line("latency", "open loop, 1,000 requests a second", "rate", saturates=False),
        Line(
            "memory",
            f"idle, then {STREAMS} open streams",
            "sse",
            unit="events",
            connections=STREAMS,
            saturates=False,
            memory=True,
        ),
    )
}


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
    latency_us: dict[str, float]
    stub_late: int
    idle: process.Memory | None = None
    loaded: process.Memory | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the file of raw results."""
        return asdict(self)


class Load:
    """The running load generator; its window is opened and closed by name."""

    def __init__(self, line: Line, subject: Subject, core: int) -> None:
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
        argv += ["--expect-bytes", str(UNARY_BYTES)] if line.mode != "sse" else []
        self.what = f"{line.name} on {subject.name}"
        self.child = machine.launch(argv, core, stdout=subprocess.PIPE, stdin=subprocess.PIPE)

    def expect(self, event: str, patience_s: float = 30) -> dict[str, Any]:
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
        self.child.stdin.write(word.encode() + b"\n")
        self.child.stdin.flush()
        return self.expect(word)

    def stop(self) -> None:
        """Closes its connections."""
        machine.stop(self.child)


class Stub:
    """The upstream of everything; one for the whole run."""

    def __init__(self, core: int) -> None:
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
        argv += ["--interval-ms", str(INTERVAL_MS)]
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
    """How long the load runs before and while it is measured, in seconds, and on which core."""

    load_core: int
    seconds: float
    warmup: float


def measure(line: Line, subject: Subject, number: int, stub: Stub, window: Window) -> Sample:
    """Measures a started subject: load until ready, warm up, then a window with CPU read at both ends."""
    idle = loaded = None
    if line.memory and subject.pid is not None:
        time.sleep(1)  # what a start leaves to do is done
        idle = process.memory(subject.pid)
    load = Load(line, subject, window.load_core)
    roots = (subject.pid, stub.child.pid, load.child.pid)
    try:
        load.expect("ready")
        time.sleep(window.warmup)
        late = stub.late()
        load.tell("begin")
        before = process.living()
        time.sleep(window.seconds)
        report = load.tell("end")
        after = process.living()
        late = stub.late() - late
        if line.memory and subject.pid is not None:
            loaded = process.memory(subject.pid)
    finally:
        load.stop()
    spent = [process.cpu_seconds(pid, after) - process.cpu_seconds(pid, before) if pid else None for pid in roots]
    units = int(report[line.unit])
    errors = report["errors"]

    def each(cpu: float | None) -> float | None:
        return cpu * 1e6 / units if cpu is not None and units else None

    return Sample(
        line=line.name,
        subject=subject.name,
        round=number,
        seconds=report["seconds"],
        units=units,
        per_second=units / report["seconds"],
        cpu_us=each(spent[0]),
        busy=spent[0] / report["seconds"] if spent[0] is not None else None,
        stub_us=each(spent[1]) or 0.0,
        load_us=each(spent[2]) or 0.0,
        errors=sum(v for k, v in errors.items() if k != "first"),
        first_error=errors["first"],
        reconnects=report["reconnects"],
        latency_us=report["latency_us"],
        stub_late=late,
        idle=idle,
        loaded=loaded,
        report=report,
    )
