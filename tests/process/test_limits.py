"""Limits of the whole service: connections of an address, and what happens when memory runs short."""

from __future__ import annotations

import http.client
import json
import re
import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kit import namespace
from tests.kit.processes import UnixConnection
from tests.kit.rig import free_port, post
from tests.kit.service import Service, Simulator, wait_for

MIB = 1 << 20
MODELS = ["sim-chat"]


def metric(service: Service, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", service.metrics(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def tripped(service: Service, reason: str) -> float:
    return metric(service, f'ascproxy_limit_trips_total{{reason="{reason}"}}')


# ---- descriptors ---------------------------------------------------------------------------------------------------


def test_every_process_raises_its_limit_of_descriptors(tmp_path: Path) -> None:
    """A shell's soft limit of 1,024 would be 384 connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Simulator() as sim:
        service = Service(tmp_path / "d", upstream=sim.url, models=MODELS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        try:
            service.start()
            assert service.process is not None
            pid = service.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            assert len(children) == 2, "a worker and control"
            for each in (pid, *children):
                limits = Path(f"/proc/{each}/limits").read_text()
                assert re.search(rf"^Max open files +{hard} +{hard} ", limits, re.MULTILINE), limits
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            service.stop()


# ---- connections of an address -------------------------------------------------------------------------------------


class Callers:
    """Callers of one service from addresses of a namespace, over TLS."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.port = port
        self.context = ssl.create_default_context(cafile=service.facts["ca"])
        self.open: list[ssl.SSLSocket] = []

    def comes(self, host: int) -> ssl.SSLSocket | None:
        """A connection from an address; None where it was closed before the handshake was done."""
        raw = namespace.connect(namespace.NETWORK + str(host), self.port)
        try:
            done = self.context.wrap_socket(raw, server_hostname="localhost")
        except (ssl.SSLError, OSError):
            raw.close()
            return None
        self.open.append(done)
        return done

    def ask(self, connection: ssl.SSLSocket) -> int:
        body = {"model": "sim-chat", "messages": []}
        connection.sendall(post(body, "Content-Type: application/json", f"Authorization: Bearer {self.service.key}"))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        answer.read()
        return answer.status

    def close(self) -> None:
        for each in self.open:
            each.close()


def test_an_address_has_its_share_and_more_once_it_has_authenticated(tmp_path: Path) -> None:
    port = free_port()

    def node(document: dict[str, Any]) -> None:
        tls = document["listeners"][0]["tls"]
        document["listeners"].append({"address": f"{namespace.SERVER}:{port}", "name": "all", "tls": tls})
        document["limits"] = {
            "max_connections_per_ip": 6,
            "max_unauthenticated_per_ip": 3,
            "trusted_peers": ["192.0.2.64/26"],
        }

    def run() -> None:
        with (
            Simulator("--rate", "0", "--tokens", "2") as sim,
            Service(tmp_path / "d", upstream=sim.url, models=MODELS, node=node) as service,
        ):
            callers = Callers(service, port)
            first = [callers.comes(10) for _ in range(3)]
            assert all(first)
            assert callers.comes(10) is None
            assert tripped(service, "max_unauthenticated_per_ip") == 1
            assert callers.comes(11), "another address has a share of its own"

            assert first[0] is not None
            assert callers.ask(first[0]) == 200
            assert all(callers.comes(10) for _ in range(3))
            assert callers.comes(10) is None
            assert tripped(service, "max_connections_per_ip") == 1

            first[0].close()
            wait_for(lambda: callers.comes(10), "the place of the one that left is free")
            assert all(callers.comes(70) for _ in range(10)), "a trusted peer is not counted"
            with_loopback = [socket.create_connection(("127.0.0.1", service.http_port)) for _ in range(10)]
            wait_for(
                lambda: metric(service, "ascproxy_connections") == 6 + 1 + 10 + 10, "loopback is not counted either"
            )
            for each in with_loopback:
                each.close()
            callers.close()
            lines = [line for line in service.out.read_text().splitlines() if '"kind":"access"' in line]
            assert len(lines) == 1, "what is refused before a request leaves no line"

    namespace.inside(run)


# ---- memory --------------------------------------------------------------------------------------------------------


def limited(size: int) -> Callable[[dict[str, Any]], None]:
    def node(document: dict[str, Any]) -> None:
        document["limits"] = {
            "memory_limit": f"{size}MiB",
            "max_bodies": "2GiB",
            "max_body": "1GiB",
            "body_min_rate": "1B",
        }

    return node


def unlimited(document: dict[str, Any]) -> None:
    for route in document["routes"].values():
        route["limits"] = {"max_body": "1GiB"}


SAMPLE_S = 0.3  # longer than the supervisor's period and a worker's tick together
SLACK = 1 << 20


class Holder:
    """Callers with a good key that send bodies without end, all of which the worker holds.

    They keep sending a byte now and then, or the limits on slow bodies would end them."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.callers: list[socket.socket] = []

    def fill(self, level: int) -> None:
        """Make the service use ``level`` bytes in all."""
        size = level - int(self.settled())
        caller = socket.create_connection(("127.0.0.1", self.service.http_port), timeout=30)
        self.callers.append(caller)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {self.service.key}\r\n"
        caller.sendall(f"{head}Content-Length: {size + SLACK}\r\n\r\n".encode())
        piece = b" " * MIB
        while size > 0:
            size -= caller.send(piece[:size])

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        def looked() -> Any:
            for caller in self.callers:
                caller.send(b" ")
            return condition()

        return wait_for(looked, what)

    def settled(self) -> float:
        """The memory of the service once it has stopped changing."""
        seen: list[float] = []

        def same() -> bool:
            seen.append(metric(self.service, "ascproxy_memory_bytes"))
            time.sleep(SAMPLE_S)
            return len(seen) > 1 and seen[-1] > 0 and abs(seen[-1] - seen[-2]) < MIB

        self.until(same, "memory does not change any more")
        return seen[-1]

    def close(self) -> None:
        for caller in self.callers:
            caller.close()
        self.callers.clear()


@contextmanager
def short_of(folder: Path, size: int, *, more: Callable[[dict[str, Any]], None] = lambda _: None) -> Iterator[Holder]:
    """A service with this memory limit, and who fills it."""

    def node(document: dict[str, Any]) -> None:
        limited(size)(document)
        more(document)

    with (
        Simulator("--rate", "0", "--tokens", "2") as sim,
        Service(folder, upstream=sim.url, models=MODELS, node=node, resources=unlimited) as service,
    ):
        holder = Holder(service)
        try:
            yield holder
        finally:
            holder.close()


def test_memory_that_runs_short_refuses_requests_until_there_is_room_again(tmp_path: Path) -> None:
    size = 400 * MIB
    body = {"model": "sim-chat", "messages": []}
    with short_of(tmp_path / "d", 400) as holder:
        service = holder.service
        assert metric(service, "ascproxy_memory_limit_bytes") == size
        status, fields, _ = service.ask("/v1/chat/completions", body)
        assert (status, fields.get("connection")) == (200, None)

        holder.fill(int(0.885 * size))
        holder.until(lambda: metric(service, "ascproxy_overload_step") == 1, "the first step")
        holder.until(lambda: service.ask("/v1/chat/completions", body)[1].get("connection") == "close", "it is obeyed")
        assert service.ask("/v1/chat/completions", body)[0] == 200

        holder.fill(int(0.945 * size))
        holder.until(lambda: metric(service, "ascproxy_overload_step") == 2, "the second step")
        holder.until(lambda: service.ask("/v1/chat/completions", body)[0] == 503, "it is obeyed")
        status, fields, answer = service.ask("/v1/messages", body)
        assert (status, fields["x-ascproxy-error"], fields["retry-after"]) == (503, "overloaded", "1")
        assert json.loads(answer)["type"] == "error"
        assert tripped(service, "memory_refuse") >= 2
        assert service.health("ready")[0] == 200
        assert service.status()["workers"][0]["state"] == "ready"

        holder.close()
        wait_for(lambda: metric(service, "ascproxy_overload_step") == 0, "memory was given back")
        wait_for(lambda: service.ask("/v1/chat/completions", body)[0] == 200, "and requests are served")
        said = service.out.read_text()
        assert "memory runs short: requests are refused" in said
        assert "memory is below its limit again" in said


def test_at_the_last_step_connections_wait_and_management_does_not(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"

    def more(document: dict[str, Any]) -> None:
        document["listeners"].append({"address": f"unix:{path}", "name": "local"})

    with short_of(tmp_path / "d", 250, more=more) as holder:
        service = holder.service
        holder.fill(250 * MIB)
        holder.until(lambda: metric(service, "ascproxy_overload_step") == 3, "the last step")
        holder.until(lambda: service.health("ready")[0] == 503, "the node is not ready")
        assert service.health("ready")[1]["reasons"] == ["no worker accepts connections"]
        assert service.health("live")[0] == 200
        assert tripped(service, "memory_accept") == 1

        accepted = metric(service, "ascproxy_connections_accepted_total")
        waiting = http.client.HTTPConnection("127.0.0.1", service.http_port, timeout=30)
        local = UnixConnection(str(path))
        for each in (waiting, local):
            each.request("GET", "/v1/models", headers={"authorization": f"Bearer {service.key}"})
        assert service.status()["workers"][0]["state"] == "ready"
        assert metric(service, "ascproxy_connections_accepted_total") == accepted, "they wait in the kernel"

        holder.close()
        for each in (waiting, local):
            assert each.getresponse().status == 200, "whoever waited is served"
            each.close()
        wait_for(lambda: service.health("ready")[0] == 200, "ready again")
        again = UnixConnection(str(path))
        again.request("GET", "/v1/models", headers={"authorization": f"Bearer {service.key}"})
        assert again.getresponse().status == 200, "the socket's path is still there"
        again.close()
