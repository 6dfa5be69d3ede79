"""Runs a supervisor as a process of its own, and asks it things. Waits on conditions, never for a time."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ascproxy.model.node import Limits, Listener, Node
from ascproxy.model.snapshot import Snapshot, encode
from ascproxy.model.tenant import Tenant

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def eventually(condition: Callable[[], T], within_s: float = 10.0, what: str = "condition") -> T:
    """The first true value of ``condition``; AssertionError after ``within_s``."""
    deadline = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.005)  # a poll interval, not a guess of how long something takes


def free_port() -> int:
    """A port below the kernel's range for outgoing connections, so that nothing takes it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def snapshot(folder: Path, *, workers: int = 2, revision: str = "0000000000a1", **node: Any) -> Snapshot:
    """A snapshot for the echo worker: one TCP listener, everything below ``folder``."""
    listeners = node.pop("listeners", None) or (Listener("main", f"127.0.0.1:{free_port()}"),)
    found = Node(
        name="test",
        state_dir=str(folder / "state"),
        run_dir=str(folder / "run"),
        workers=workers,
        listeners=listeners,
        metrics_address=f"127.0.0.1:{free_port()}",
        limits=Limits(drain_unary_ms=2_000, drain_stream_ms=2_000),
        access_log="none",
    )
    return Snapshot(revision, dataclasses.replace(found, **node), (Tenant("acme"),), (), (), ())


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect(self._path)


class Service:
    """A running supervisor with the plain control and, if nothing else is said, the echo worker."""

    def __init__(
        self,
        folder: Path,
        first: Snapshot,
        *,
        config: bytes | None = None,
        worker: str = "tests.kit.echo_worker:run",
        environment: dict[str, str] | None = None,
        again: list[str] | None = None,
        apart: int | None = None,
        **popen: Any,
    ) -> None:
        """``again``: the program of upgrades. ``apart``: the uid of a control that the test starts itself."""
        self.folder = folder
        self.snapshot = first
        self.config = folder / "snapshot.json"
        self.log_file = folder / "log"
        self.config.write_bytes(encode(first) if config is None else config)
        given = [str(self.config), "--worker", worker, "--control", "tests.kit.plain_control"]
        if apart is not None:
            given += ["--run-dir", first.node.run_dir, "--peer", str(apart)]
        command = [sys.executable, "-m", "ascproxy.supervisor", *given]
        if again is not None:  # what an upgrade runs, with the same arguments
            command += ["--again", *again, *given, "--again", *again, *given]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                popen.pop("wrap", []) + command,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                **popen,
            )

    def write(self, changed: Snapshot) -> None:
        self.config.write_bytes(encode(changed))

    def reload(self, changed: Snapshot) -> None:
        self.write(changed)
        self.process.send_signal(signal.SIGHUP)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.snapshot.node.listeners[0].address.rpartition(":")
        return host, int(port)

    def log(self) -> list[dict[str, Any]]:
        lines = self.log_file.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, message: str) -> dict[str, Any] | None:
        return next((line for line in self.log() if message in line["message"]), None)

    def until_logged(self, message: str, within_s: float = 10.0) -> dict[str, Any]:
        return eventually(lambda: self.logged(message), within_s, f"{message!r} in {self.log_file.read_text()}")

    def until_ready(self) -> Service:
        eventually(
            lambda: self.logged("ready") or self.process.poll() is not None, 15, f"ready: {self.log_file.read_text()}"
        )
        assert self.process.poll() is None, self.log_file.read_text()
        return self

    def ask(self, path: str = "/", timeout: float = 5.0) -> dict[str, Any]:
        """One request on a connection of its own; who answered."""
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def hold(self, path: str = "/hold") -> socket.socket:
        """A connection with a request that is in flight; returns once the worker counts it."""
        before = sum(worker["in_flight"] for worker in self.status()["workers"])
        end = socket.create_connection(self.address, timeout=10)
        end.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        eventually(lambda: sum(worker["in_flight"] for worker in self.status()["workers"]) > before)
        return end

    def local(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = UnixConnection(str(Path(self.snapshot.node.run_dir) / "control.sock"))
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        try:
            return self.local("GET", "/status")[1]
        except http.client.RemoteDisconnected:  # control is being replaced: what it had just accepted is closed
            return self.local("GET", "/status")[1]

    def workers(self) -> dict[int, dict[str, Any]]:
        return {worker["slot"]: worker for worker in self.status()["workers"]}

    def public(self, path: str) -> tuple[int, bytes]:
        host, _, port = self.snapshot.node.metrics_address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def children(self) -> list[int]:
        """Pids of all processes that descend from the supervisor now."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in found.split()]


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


@contextmanager
def running(folder: Path, first: Snapshot | None = None, **given: Any) -> Iterator[Service]:
    """A service that is ready; whatever happens, nothing of it is left."""
    service = Service(folder, first or snapshot(folder), **given)
    try:
        yield service.until_ready()
    finally:
        if service.process.poll() is None:
            service.process.kill()
        service.process.wait(10)
