"""A thousand readers that stop reading, against the real service: what they cost, and whom they harm (DESIGN 5)."""

from __future__ import annotations

import http.client
import itertools
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.rig import free_port, post
from tests.kit.service import ROOT, Service, wait_for

READERS = 1000
KB = 1024


def private_bytes(pid: int) -> int:
    """Memory that only this process holds."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_"):
            total += int(line.split()[1]) * KB
    return total


def queues(pid_port: int) -> tuple[int, int]:
    """Bytes in the kernel's queues of sockets whose local port is ``pid_port``: (to be read, to be sent)."""
    received = sent = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].split(":")[1], 16) == pid_port:
            tx, rx = fields[4].split(":")
            sent += int(tx, 16)
            received += int(rx, 16)
    return received, sent


def upstream_queues(sim_port: int) -> int:
    """Bytes that wait to be read in sockets connected to the simulator."""
    waiting = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].split(":")[1], 16) == sim_port:
            waiting += int(fields[4].split(":")[1], 16)
    return waiting


def stalled(service: Service, n: int, *, tls: bool) -> socket.socket:
    """A client that asks for a long stream and reads nothing."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", service.https_port if tls else service.http_port))
    s: socket.socket = raw
    if tls:
        s = service.tls().wrap_socket(raw, server_hostname="localhost")
    body = {"model": "sim-chat", "stream": True, "user": f"reader-{n}"}
    s.sendall(post(body, f"Authorization: Bearer {service.key}"))
    return s


def connections_to(port: int) -> int:
    """Established connections to a local port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[2].split(":")[1], 16) == port and row[3] == "01" for row in rows)


def worker_pid(service: Service) -> int:
    (worker,) = service.status()["workers"]
    return int(worker["pid"])


def paused(service: Service) -> int:
    for line in service.metrics().splitlines():
        if line.startswith("ascproxy_connections_paused"):
            return int(float(line.split()[-1]))
    return 0


@pytest.fixture
def flood():
    """The port of an upstream that never stops by itself."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kit.flood", str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    yield port
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("tls", "bound"), [(False, 24 * KB), (True, 48 * KB)], ids=["plaintext", "tls"])
def test_a_thousand_stalled_readers(tmp_path: Path, flood: int, tls: bool, bound: int) -> None:
    with Service(tmp_path / "d", upstream=f"http://127.0.0.1:{flood}", models=["sim-chat"]) as service:
        pid = worker_pid(service)
        readers = [stalled(service, n, tls=tls) for n in range(20)]  # the interpreter's own growth happens here
        wait_for(lambda: paused(service) >= 20, "twenty readers stall")
        before = private_bytes(pid)
        readers += [stalled(service, n, tls=tls) for n in range(20, 20 + READERS)]
        wait_for(lambda: paused(service) >= READERS + 20, "all readers stall", 60)
        grown = private_bytes(pid) - before
        assert grown / READERS <= bound, f"{grown / READERS / KB:.1f} KiB a stream in the process"
        _, unsent = queues(service.https_port if tls else service.http_port)
        unread = upstream_queues(flood)
        assert (unsent + unread) / len(readers) <= 256 * KB, (unsent, unread)

        # others are not affected: a whole stream passes meanwhile
        begin = time.monotonic()
        status, _, body = service.ask("/v1/chat/completions", {"model": "sim-chat", "stream": True, "max_tokens": 20})
        assert status == 200
        assert body.endswith(b"data: [DONE]\n\n")
        assert time.monotonic() - begin < 5

        # one that wakes up finds every event in order, and its own marker in each
        sleeper = readers[5]
        sleeper.settimeout(10)
        with http.client.HTTPResponse(sleeper) as stream:
            stream.begin()
            assert stream.status == 200
            events = [line.split()[1:3] for line in itertools.islice(stream, 2000) if line.startswith(b"data: ")]
        assert len(events) > 500
        assert [number for _, number in events] == [b"%08d" % n for n in range(len(events))]
        assert all(opening.endswith(b'"reader-5') for opening, _ in events)
        for s in readers:
            s.close()
        wait_for(lambda: paused(service) == 0, "nothing is paused any more")
        wait_for(lambda: connections_to(flood) == 0, "every generation is cut")
