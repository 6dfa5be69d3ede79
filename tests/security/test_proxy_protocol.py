"""PROXY headers that nobody should send, at the real gateway: each closes its connection, none of them reaches the
model server or names a caller, and a good header after each of them is served by the same worker.
"""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from tests.kit import proxy2
from tests.kit.malformed import MODEL, Aim
from tests.kit.rig import free_port
from tests.kit.service import Service, wait_for
from tests.kit.witness import Witness

PATIENCE_S = 8
ROUNDS = 300
PLACES = (*range(14), *range(16, 47))  # all but the length, with which a header would only be waited for
SEED = 20


class Target:
    """The service, plaintext at ``port`` and TLS at ``tls_port``, both behind a header from loopback."""

    def __init__(self, service: Service, witness: Witness, port: int, tls_port: int) -> None:
        self.service, self.witness, self.port, self.tls_port = service, witness, port, tls_port
        self.aim = Aim(service.key)
        self.pid = service.status()["workers"][0]["pid"]
        self.served = 0

    def sent(self, data: bytes, port: int) -> bytes:
        """What comes for these bytes until the connection ends."""
        answer = b""
        with (
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client,
            suppress(ConnectionResetError, BrokenPipeError),
        ):
            client.sendall(data)
            while more := client.recv(65536):
                answer += more
        return answer

    def good(self) -> None:
        """A good header and request on a new connection: served, and the caller is the one of the header."""
        self.served += 1
        caller = f"203.0.113.{self.served % 250 + 1}"
        data = proxy2.header(caller, checksum=True) + self.aim.head(b"Connection: close")
        assert self.sent(data, self.port).startswith(b"HTTP/1.1 200 ")
        assert self.witness.take().startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        wait_for(lambda: len(self.clients()) == self.served, "the access line")
        assert self.clients()[-1] == f"{caller}:40000"
        assert self.service.status()["workers"][0]["pid"] == self.pid

    def clients(self) -> list[str]:
        said = self.service.out.read_text().splitlines()
        return [json.loads(line).get("client", "") for line in said if '"kind":"access"' in line]

    def refused(self) -> int:
        found = re.search(
            r'^ascproxy_limit_trips_total\{reason="proxy_header"\} (\d+)', self.service.metrics(), re.MULTILINE
        )
        return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    port, tls_port = free_port(), free_port()

    def node(document: dict[str, Any]) -> None:
        tls = document["listeners"][0]["tls"]
        document["listeners"] += [
            {"address": f"127.0.0.1:{port}", "name": "plain", "proxy_protocol": True},
            {"address": f"127.0.0.1:{tls_port}", "name": "secure", "proxy_protocol": True, "tls": tls},
        ]
        document["limits"] = {"trusted_peers": ["127.0.0.1"]}

    with ExitStack() as stack:
        witness = stack.enter_context(Witness())
        folder = tmp_path_factory.mktemp("proxy") / "d"
        service = stack.enter_context(Service(folder, upstream=witness.url, models=[MODEL], node=node))
        yield Target(service, witness, port, tls_port)


@pytest.mark.parametrize("name", proxy2.malformed())
def test_what_is_no_header_is_closed_without_a_word(target: Target, name: str) -> None:
    data, _ = proxy2.malformed()[name]
    before = target.refused()
    for port in (target.port, target.tls_port):
        assert target.sent(data + target.aim.good(), port) == b""
    assert target.witness.take() == b""
    assert target.refused() == before + 2
    target.good()


def test_headers_that_are_a_little_wrong_never_name_another_caller(target: Target) -> None:
    """A header with a checksum, a few of its bits turned: closed, or, where it has no checksum any more, taken
    at its word. A worker never crashes of it."""
    chance = random.Random(SEED)
    before = target.refused()
    closed = 0
    for _ in range(ROUNDS):
        header = bytearray(proxy2.header("203.0.113.7", tlvs=proxy2.tlv(0x02, b"localhost"), checksum=True))
        for _ in range(chance.randint(1, 3)):
            at = chance.choice(PLACES)
            header[at] ^= 1 << chance.randrange(8)
        answer = target.sent(bytes(header) + target.aim.head(b"Connection: close"), target.port)
        seen = target.witness.take()
        if answer == b"":
            closed += 1
            assert seen == b""
            continue
        target.served += 1
        wait_for(lambda: len(target.clients()) == target.served, "the access line")
        address = ".".join(map(str, header[16:20]))
        client = target.clients()[-1]
        assert client == "" or client.startswith(f"{address}:")
    assert closed > ROUNDS // 2
    assert target.refused() == before + closed
    target.good()
