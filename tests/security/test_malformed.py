"""Malformed requests at the real gateway, plaintext and TLS: refused or cut, and never a byte of them upstream.

Issue "First light", Shows 7. The model server is a witness that keeps every byte it gets. After each of them a good
request on a new connection is served, by the same worker.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.kit import malformed
from tests.kit.desync import request as desync_request
from tests.kit.desync import vectors
from tests.kit.malformed import GOOD_BODY, MODEL, Aim
from tests.kit.service import Service
from tests.kit.witness import Witness

NAMES = malformed.closed(Aim("x")), malformed.kept(Aim("x"))
TRANSPORTS = ["plaintext", "tls"]
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")
PLAIN = re.compile("/[a-z/]*")  # not what the vector is about
PATIENCE_S = 8  # for an answer that the limits below bring within two


def limits(document: dict[str, Any]) -> None:
    document["limits"] = {"header_timeout": "1s", "body_idle": "1s"}


class Target:
    """The service before a witness."""

    def __init__(self, service: Service, witness: Witness) -> None:
        self.service, self.witness = service, witness
        self.aim = Aim(service.key)
        self.context = service.tls()
        (worker,) = service.status()["workers"]
        self.pid, self.restarts = worker["pid"], worker["restarts"]

    def connect(self, transport: str) -> socket.socket:
        port = self.service.https_port if transport == "tls" else self.service.http_port
        plain = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        return self.context.wrap_socket(plain, server_hostname="localhost") if transport == "tls" else plain

    def good(self, transport: str) -> None:
        """A good request on a new connection: served, and the one thing that the witness has seen."""
        with closing(self.connect(transport)) as client:
            client.sendall(self.aim.good())
            assert [status for status, _ in answers(client, 1)] == [200]
        head, _, body = self.witness.take().partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n"), head
        assert body == GOOD_BODY
        assert b"bearer" not in head.lower()

    def alive(self) -> None:
        """The same worker as at the beginning, with no crash in between."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        assert stat.rsplit(") ", 1)[1][0] in "SRD"

    def memory(self) -> int:
        """Resident bytes of the worker."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with ExitStack() as stack:
        witness = stack.enter_context(Witness())
        folder = tmp_path_factory.mktemp("malformed") / "d"
        service = stack.enter_context(Service(folder, upstream=witness.url, models=[MODEL], node=limits))
        yield Target(service, witness)


@pytest.fixture
def target(running: Target) -> Target:
    running.witness.take()  # whatever a failed test left
    return running


def answers(client: socket.socket, most: int, *, heads_only: bool = False) -> list[tuple[int, bytes]]:
    """Up to ``most`` answers, ``(status, head)``, fewer when the connection ends: then the last is ``(0, b"")``."""
    data, found = b"", []
    while len(found) < most:
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            head = data[: end + 2]
            length = LENGTH.search(head)
            assert length is not None, head
            behind = end + 4 + (0 if heads_only else int(length[1]))
            if len(data) >= behind:
                found.append((int(head.split()[1]), head))
                data = data[behind:]
                continue
        more = receive(client)
        if not more:
            assert data == b"", data  # half an answer
            return [*found, (0, b"")]
        data += more
    return found


def send(client: socket.socket, data: bytes) -> None:
    """All of it, or as much as the gateway takes before it cuts."""
    with suppress(ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
        client.sendall(data)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", NAMES[0])
def test_what_breaks_the_framing_is_refused_and_the_connection_ends(target: Target, name: str, transport: str) -> None:
    status, data = malformed.closed(target.aim)[name]
    with closing(target.connect(transport)) as client:
        send(client, data)
        got = answers(client, 3)
    assert [s for s, _ in got] == [status, 0], got
    assert b"\r\nconnection: close\r\n" in got[0][1]
    target.good(transport)
    target.alive()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", NAMES[1])
def test_what_is_framed_but_wrong_is_refused(target: Target, name: str, transport: str) -> None:
    status, data = malformed.kept(target.aim)[name]
    with closing(target.connect(transport)) as client:
        send(client, data)
        assert [s for s, _ in answers(client, 1)] == [status]
        assert target.witness.take() == b""
        send(client, target.aim.good())  # the connection is still good for a good one
        assert [s for s, _ in answers(client, 1)] == [200]
        target.witness.take()
    target.good(transport)
    target.alive()


@pytest.mark.parametrize("name", [*NAMES[0], *NAMES[1]])
def test_behind_a_good_request_only_that_one_is_served(target: Target, name: str) -> None:
    """Pipelined: what follows a good request is looked at as strictly, and nothing of it is taken for its body."""
    closes = name in NAMES[0]
    status, data = (malformed.closed if closes else malformed.kept)(target.aim)[name]
    with closing(target.connect("plaintext")) as client:
        send(client, target.aim.good() + data)
        got = [s for s, _ in answers(client, 3 if closes else 2)]
    assert got == ([200, status, 0] if closes else [200, status])
    seen = target.witness.take()
    assert seen.count(b"POST ") == 1
    assert seen.endswith(b"\r\n\r\n" + GOOD_BODY)
    target.good("plaintext")
    target.alive()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("vector", list(vectors()))
def test_vector_of_http_desync(target: Target, vector: dict[str, Any], transport: str) -> None:
    credential = target.aim.key.partition(b": ")[::2]
    dangerous = vector["expected"]["tier"] in ("Ambiguous", "Severe")
    for what in (vector, aimed(vector)):
        head, body = desync_request(what, credential, content=GOOD_BODY)
        with closing(target.connect(transport)) as client:
            send(client, head + body)
            if dangerous:
                told = everything(client)
                assert re.match(rb"HTTP/1\.1 (4\d\d|505) |$", told), told
                assert told.count(b"HTTP/1.1 ") <= 1
            else:
                ((status, _),) = answers(client, 1, heads_only=what["method"] == "HEAD")
                assert status < 500 or status == 505
        seen = target.witness.take()
        assert seen == b"" or (not dangerous and status == 200)
    target.good(transport)
    target.alive()


def aimed(vector: dict[str, Any]) -> dict[str, Any]:
    """The vector as a chat request, where method and target are not what it is about."""
    changed = dict(vector)
    if PLAIN.fullmatch(str(vector["uri"])):
        changed["uri"] = "/v1/chat/completions"
    if vector["method"] in ("GET", "HEAD") and not vector["expected"]["reason"].startswith(("Undefined", "GetHead")):
        changed["method"] = "POST"
    return changed


def everything(client: socket.socket) -> bytes:
    """What comes until the connection ends."""
    data = b""
    while more := receive(client):
        data += more
    return data


def receive(client: socket.socket) -> bytes:
    """What comes next, nothing when the connection has ended, in whatever manner."""
    try:
        return client.recv(65536)
    except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
        return b""


def test_http_at_the_tls_port_and_broken_tls(target: Target) -> None:
    record = b"\x16\x03\x01"
    for data in (
        target.aim.good(),
        malformed.HELLO,
        record + b"\xff\xff" + b"\x01" * 400,
        record + b"\x00\x00",
        b"\x80\x2e\x01\x03\x01" + bytes(41),
        b"\x17\x03\x03\x00\x10" + bytes(16),
        bytes(range(256)),
    ):
        with socket.create_connection(("127.0.0.1", target.service.https_port), timeout=PATIENCE_S) as client:
            send(client, data)
            client.shutdown(socket.SHUT_WR)
            told = everything(client)
        assert not told or told[0] == 21, told  # at most an alert
        target.good("tls")
    target.alive()


def test_memory_does_not_grow(target: Target) -> None:
    """All of it, again and again: what was refused leaves nothing behind."""
    quick = [data for status, data in malformed.closed(target.aim).values() if status != 408]
    quick += [data for _, data in malformed.kept(target.aim).values()]

    def round_of_all() -> None:
        for data in quick:
            with closing(target.connect("plaintext")) as client:
                send(client, data)
                answers(client, 1)

    for _ in range(3):  # pools and scratch buffers reach their size
        round_of_all()
    before = target.memory()
    for _ in range(20):
        round_of_all()
    assert target.memory() - before < 1024 * 1024
    target.good("plaintext")
    target.alive()
