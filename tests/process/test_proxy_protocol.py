"""The gateway behind a real haproxy that sends PROXY headers, with TLS passed through and in plaintext, in a network of
its own: callers have addresses of their own there, and so has the load balancer.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit import namespace, proxy2
from tests.kit.rig import free_port, post
from tests.kit.service import Service, Simulator, command, wait_for

MODELS = ["sim-chat"]
BALANCER = namespace.NETWORK + "70"
HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
CONFIGURATION = """\
global
    stats socket {folder}/haproxy.sock
defaults
    mode tcp
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    source {balancer}
listen secure
    bind {server}:{ports[secure]}
    default-server send-proxy-v2 proxy-v2-options crc32c,unique-id check check-send-proxy inter 100
    server gateway {server}:{ports[all]}
listen plain
    bind {server}:{ports[plain]}
    server gateway unix@{folder}/plain.sock send-proxy-v2
listen unsaid
    bind {server}:{ports[unsaid]}
    server gateway {server}:{ports[all]}
frontend requests
    mode http
    option forwardfor
    bind {server}:{ports[requests]}
    default_backend requests
backend requests
    mode http
    server gateway {server}:{ports[direct]} ssl verify required ca-file {ca} sni str(localhost) verifyhost localhost
"""


class Place:
    """The service behind haproxy. ``ports``: ``secure`` and ``plain`` of haproxy with headers, ``unsaid`` without one,
    ``requests`` with X-Forwarded-For; ``all`` and ``direct`` of the gateway itself."""

    def __init__(self, service: Service, ports: dict[str, int]) -> None:
        self.service, self.ports = service, ports
        self.context = ssl.create_default_context(cafile=service.facts["ca"])

    def comes(self, host: int, port: str, *, tls: bool) -> socket.socket:
        """A connection from an address."""
        raw = namespace.connect(namespace.NETWORK + str(host), self.ports[port])
        try:
            return self.context.wrap_socket(raw, server_hostname="localhost") if tls else raw
        except OSError:
            raw.close()
            raise

    def ask(self, connection: socket.socket, *fields: str) -> int:
        body = {"model": "sim-chat", "messages": []}
        key = f"Authorization: Bearer {self.service.key}"
        connection.sendall(post(body, "Content-Type: application/json", key, *fields))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        answer.read()
        return answer.status

    def lines(self) -> list[dict[str, Any]]:
        """The access lines so far."""
        said = self.service.out.read_text().splitlines()
        return [json.loads(line) for line in said if '"kind":"access"' in line]

    def line(self, count: int) -> dict[str, Any]:
        """The last of this many lines."""
        wait_for(lambda: len(self.lines()) >= count, "the access line")
        found = self.lines()
        assert len(found) == count
        return found[-1]

    def tripped(self, reason: str) -> float:
        found = re.search(rf'^ascproxy_limit_trips_total{{reason="{reason}"}} (\S+)$', self.service.metrics(), re.M)
        return float(found[1]) if found else 0.0


@contextlib.contextmanager
def balanced(folder: Path, **limits: Any) -> Iterator[Place]:
    """haproxy before the service before the simulator."""
    ports = {name: free_port() for name in ("secure", "plain", "unsaid", "requests", "all", "direct")}

    def node(document: dict[str, Any]) -> None:
        tls = document["listeners"][0]["tls"]
        address = f"{namespace.SERVER}:{ports['all']}"
        document["listeners"] += [
            {"address": address, "name": "all", "tls": tls, "proxy_protocol": True},
            {"address": f"unix:{folder}/plain.sock", "name": "plain", "proxy_protocol": True},
            {"address": f"{namespace.SERVER}:{ports['direct']}", "name": "direct", "tls": tls},
        ]
        document["limits"] = {"trusted_peers": [BALANCER]} | limits

    with (
        Simulator("--rate", "0", "--tokens", "2") as sim,
        Service(folder / "d", upstream=sim.url, models=MODELS, node=node) as service,
    ):
        file = folder / "haproxy.cfg"
        values = {"balancer": BALANCER, "server": namespace.SERVER, "ports": ports, "ca": service.facts["ca"]}
        file.write_text(CONFIGURATION.format(folder=folder, **values))
        assert HAPROXY is not None
        process = subprocess.Popen([HAPROXY, "-db", "-f", str(file)], stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: up(folder / "haproxy.sock"), "haproxy finds the gateway well")
            yield Place(service, ports)
        finally:
            process.kill()
            process.wait()


def up(path: Path) -> bool:
    """Whether haproxy's checks, which are LOCAL headers, pass."""
    with socket.socket(socket.AF_UNIX) as admin, contextlib.suppress(OSError):
        admin.connect(str(path))
        admin.sendall(b"show stat\n")
        said = b"".join(iter(lambda: admin.recv(65536), b"")).decode()
        (row,) = (line.split(",") for line in said.splitlines() if line.startswith("secure,gateway,"))
        return row[17] == "UP" and row[36] in ("L4OK", "L6OK")
    return False


def inside(folder: Path, run: Callable[[Place], None], **limits: Any) -> None:
    if HAPROXY is None:
        pytest.skip("haproxy is not installed: apt-get install -y haproxy")

    def with_place() -> None:
        with balanced(folder, **limits) as place:
            run(place)

    namespace.inside(with_place)


def test_behind_haproxy_each_caller_is_known(tmp_path: Path) -> None:
    def run(place: Place) -> None:
        for number, (port, tls, host) in enumerate([("secure", True, 10), ("plain", False, 11), ("secure", True, 12)]):
            with place.comes(host, port, tls=tls) as caller:
                assert place.ask(caller, "X-Forwarded-For: 198.51.100.1") == 200
                line = place.line(number + 1)
                own = caller.getsockname()
                assert line["client"] == f"{own[0]}:{own[1]}"
                assert line["peer"].rpartition(":")[0] == (BALANCER if tls else "")
        # one request each over one connection of haproxy
        with place.comes(13, "requests", tls=False) as caller:
            assert place.ask(caller, "X-Forwarded-For: 198.51.100.1") == 200
            line = place.line(4)
            assert line["client"] == namespace.NETWORK + "13"
            assert line["peer"].rpartition(":")[0] == BALANCER
        # to the gateway itself: nobody whom it trusts
        with place.comes(14, "direct", tls=True) as caller:
            assert place.ask(caller, "X-Forwarded-For: 198.51.100.1") == 200
            assert "client" not in place.line(5)
        assert (place.tripped("proxy_untrusted"), place.tripped("proxy_header")) == (0, 0)

    inside(tmp_path, run)


def test_behind_haproxy_each_caller_has_a_share(tmp_path: Path) -> None:
    def run(place: Place) -> None:
        opened = [place.comes(10, "secure", tls=True) for _ in range(3)]
        with pytest.raises(OSError):
            place.comes(10, "secure", tls=True)
        wait_for(lambda: place.tripped("max_unauthenticated_per_ip") == 1, "the fourth is counted")
        opened += [place.comes(host, "secure", tls=True) for host in range(20, 30)]
        assert place.ask(opened[0]) == 200
        opened.append(place.comes(10, "secure", tls=True))
        for each in opened:
            each.close()

    inside(tmp_path, run, max_connections_per_ip=6, max_unauthenticated_per_ip=3)


def test_who_says_nothing_or_is_not_trusted_is_closed_counted_and_told_of(tmp_path: Path) -> None:
    def run(place: Place) -> None:
        with pytest.raises(OSError):
            place.comes(10, "unsaid", tls=True)
        assert place.tripped("proxy_header") == 1
        wait_for(lambda: "proxy_protocol: closed" in place.service.out.read_text(), "the log tells of the first")
        header = proxy2.header("198.51.100.1")
        for _ in range(5):
            with place.comes(10, "all", tls=False) as caller, contextlib.suppress(OSError):
                caller.sendall(header)
                assert caller.recv(1) == b""
        wait_for(lambda: place.tripped("proxy_untrusted") == 5, "they are counted")
        with place.comes(11, "secure", tls=True) as caller:
            assert place.ask(caller) == 200
        place.line(1)
        told = [line for line in place.service.out.read_text().splitlines() if "proxy_protocol: closed" in line]
        first = json.loads(told[0])
        assert (first["level"], first["listener"], first["reason"]) == ("warning", "all", "there is none")
        assert first["peer"].startswith(BALANCER)
        assert len(told) == 1, "and of later ones in 10 s"

    inside(tmp_path, run)


def test_without_a_trusted_peer_the_configuration_is_refused(tmp_path: Path) -> None:
    with Simulator() as sim:
        service = Service(tmp_path / "d", upstream=sim.url, models=MODELS)
    service.edit("ascproxy.yaml", lambda document: document["listeners"][0].update(proxy_protocol=True))
    done = command("check", str(service.folder))
    assert done.returncode == 1
    assert "nobody could connect: name the load balancer's address in limits.trusted_peers" in done.stdout + done.stderr
