"""A thousand readers that stop reading, against the real service: what they cost, and whom they harm (DESIGN 5)."""

from __future__ import annotations

import json
import selectors
import socket
import ssl
import time
from pathlib import Path

import pytest

from tests.kit.rig import post
from tests.kit.service import Service, first_light, wait_for

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
    body = {"model": "sim-chat", "stream": True, "max_tokens": 1_000_000, "user": f"reader-{n}"}
    s.sendall(post(body | {"messages": [{"role": "user", "content": "go"}]}, f"Authorization: Bearer {service.key}"))
    return s


def worker_pid(service: Service) -> int:
    (worker,) = service.status()["workers"]
    return int(worker["pid"])


def paused(service: Service) -> int:
    for line in service.metrics().splitlines():
        if line.startswith("ascproxy_connections_paused"):
            return int(float(line.split()[-1]))
    return 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("tls", "bound"), [(False, 24 * KB), (True, 48 * KB)], ids=["plaintext", "tls"])
def test_a_thousand_stalled_readers(tmp_path: Path, tls: bool, bound: int) -> None:
    with first_light(tmp_path, "--rate", "0", "--max-model-len", "2000000") as (service, sim):
        service.ask("/v1/chat/completions", {"model": "sim-chat", "messages": []})
        pid = worker_pid(service)
        readers = [stalled(service, n, tls=tls) for n in range(10)]  # the interpreter's own growth happens here
        wait_for(lambda: paused(service) >= 10, "ten readers stall")
        before = private_bytes(pid)
        readers += [stalled(service, n, tls=tls) for n in range(10, 10 + READERS)]
        wait_for(lambda: paused(service) >= READERS + 10, "all readers stall", 60)
        grown = private_bytes(pid) - before
        assert grown / READERS <= bound, f"{grown / READERS / KB:.1f} KiB a stream in the process"
        _, unsent = queues(service.https_port if tls else service.http_port)
        unread = upstream_queues(sim.port)
        assert (unsent + unread) / (READERS + 10) <= 256 * KB, (unsent, unread)

        # others are not affected: a request and a stream pass meanwhile
        begin = time.monotonic()
        status, _, body = service.ask("/v1/chat/completions", {"model": "sim-chat", "messages": [], "max_tokens": 4})
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 4
        assert time.monotonic() - begin < 5

        # one that wakes up finds every event in order and its own marker in them
        sleeper = readers[5]
        seen = b""
        selector = selectors.DefaultSelector()
        sleeper.setblocking(False)
        selector.register(sleeper, selectors.EVENT_READ)
        while len(seen) < 3_000_000:
            assert selector.select(10), "the stream goes on"
            try:
                seen += sleeper.recv(65_536)
            except ssl.SSLWantReadError:
                continue
        head, _, rest = seen.partition(b"\r\n\r\n")
        assert b" 200 " in head
        assert b"reader-5" in rest
        assert b"reader-6" not in rest
        for s in readers:
            s.close()
        wait_for(lambda: sim.stats()["running"] == 0, "every generation stops", 10)
        wait_for(lambda: paused(service) == 0, "nothing is paused any more")
