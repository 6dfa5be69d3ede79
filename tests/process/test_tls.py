"""TLS of the whole service: certificates that change under load, wrong ones, tickets over workers and nodes, mTLS."""

from __future__ import annotations

import asyncio
import http.client
import re
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit.certificates import DAY, Authority, Files, refused_by, trusting
from tests.kit.processes import eventually
from tests.kit.service import Service, Simulator, command, first_light

CHAT = b'{"model":"sim-chat","messages":[{"role":"user","content":"hello"}]}'
EVERY = pytest.mark.parametrize("version", ["1.2", "1.3"])
ROTATIONS = 20


class Node:
    """A service on two workers whose HTTPS listener has certificates of the test's own CA."""

    def __init__(self, service: Service, authority: Authority, folder: Path) -> None:
        self.service, self.authority, self.folder = service, authority, folder
        self.certificate, self.key = folder / "live.crt", folder / "live.key"

    def install(self, files: Files) -> Files:
        files.move_to(self.certificate, self.key)
        return files

    def reload(self) -> tuple[int, str]:
        """Exit status of ``ascproxy reload`` and what it said."""
        done = command("reload", "--config", str(self.service.folder))
        return done.returncode, done.stdout + done.stderr

    def metric(self, name: str, **labels: str) -> float | None:
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.service.metrics().splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name and wanted <= set((found[2] or "").split(",")):
                return float(found[3])
        return None

    def connect(self, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.service.https_port), timeout=20)
        return context.wrap_socket(plain, server_hostname="localhost", session=session)

    def serial(self) -> int:
        """Of the certificate that a new connection is shown."""
        with self.connect(trusting(self.authority)) as secure:
            shown = secure.getpeercert()
            assert shown is not None
            return int(str(shown["serialNumber"]), 16)

    def ask(self, secure: ssl.SSLSocket) -> bytes:
        """One request on a connection that is there; the status line."""
        secure.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %b\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (self.service.key.encode(), len(CHAT), CHAT)
        )
        answer = http.client.HTTPResponse(secure)
        answer.begin()
        answer.read()
        return b"%d" % answer.status

    def worker_of(self, secure: ssl.SSLSocket) -> int:
        """The pid of the worker that holds the other end of a connection."""
        local, port = secure.getsockname()[1], self.service.https_port
        ends = f":{port:04X} ", f":{local:04X} "
        lines = [line for line in Path("/proc/net/tcp").read_text().splitlines() if all(end in line for end in ends)]
        inode = next(fields[9] for fields in map(str.split, lines) if fields[1].endswith(f":{port:04X}"))
        for worker in self.service.status()["workers"]:
            folder = Path(f"/proc/{worker['pid']}/fd")
            if any(str(fd.readlink()) == f"socket:[{inode}]" for fd in folder.iterdir()):
                return int(worker["pid"])
        raise AssertionError("no worker has that connection")


@contextmanager
def node(folder: Path, simulator: Simulator, authority: Authority | None = None, **tls: Any) -> Iterator[Node]:
    folder.mkdir(exist_ok=True)
    own = authority or Authority(folder)
    live = own.issue("localhost", common="first", ends=10 * DAY)
    live.move_to(folder / "live.crt", folder / "live.key")

    def secure(document: dict[str, Any]) -> None:
        listener = next(each for each in document["listeners"] if "tls" in each)
        listener["name"] = "https"
        listener["tls"] = {"certificate": str(folder / "live.crt"), "key": str(folder / "live.key"), **tls}

    models = [simulator.model]
    with Service(folder / "d", upstream=simulator.url, models=models, workers=2, node=secure) as service:
        yield Node(service, own, folder)


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator(model="sim-chat") as started:
        yield started


@pytest.mark.timeout(300)
def test_twenty_certificates_in_turn_and_no_request_fails(tmp_path: Path, simulator: Simulator) -> None:
    with node(tmp_path, simulator) as one:
        trust, stop = trusting(one.authority), threading.Event()
        answers: list[bytes] = []
        failures: list[BaseException] = []

        def load(connection_each: bool) -> None:
            secure = one.connect(trust)
            while not stop.is_set():
                try:
                    if connection_each:
                        secure.close()
                        secure = one.connect(trust)
                    answers.append(one.ask(secure))
                except (OSError, http.client.HTTPException, ValueError) as error:
                    failures.append(error)
                    return
            secure.close()

        with one.connect(trust) as kept:
            assert one.ask(kept) == b"200"
            running = [threading.Thread(target=load, args=(each,)) for each in (True, False)]
            for thread in running:
                thread.start()
            try:
                for n in range(ROTATIONS):
                    made = one.install(one.authority.issue("localhost", common=f"c{n}", ends=(20 + n) * DAY))
                    before = len(answers)
                    status, said = one.reload()
                    assert status == 0, said
                    assert {one.serial() for _ in range(6)} == {made.x509.serial_number}
                    eventually(lambda before=before: len(answers) > before or failures, what="the load goes on")
            finally:
                stop.set()
                for thread in running:
                    thread.join()
            assert one.ask(kept) == b"200"  # a connection of the first certificate
        assert not failures
        assert set(answers) == {b"200"}


def _broken(one: Node) -> dict[str, tuple[Callable[[], object], str]]:
    issue = one.authority.issue
    return {
        "expired": (
            lambda: one.install(issue("localhost", begins=-3 * DAY, ends=-DAY)),
            f"certificate {one.certificate} expired on ",
        ),
        "key of another": (
            lambda: issue("localhost").key.replace(one.key),
            f"key {one.key} does not belong to certificate {one.certificate}; was only one of the two files replaced?",
        ),
        "garbage": (lambda: one.certificate.write_text("junk"), f"certificate {one.certificate} holds no certificate"),
        "gone": (one.key.unlink, f"cannot read {one.key}: no such file or directory"),
    }


def test_a_broken_certificate_leaves_the_old_one_serving_and_is_told(tmp_path: Path, simulator: Simulator) -> None:
    with node(tmp_path, simulator) as one:
        first, ends = one.serial(), {"listener": "https", "kind": "server", "file": str(one.certificate)}
        expiry = one.metric("ascproxy_certificate_expiry_timestamp_seconds", **ends)
        assert expiry is not None
        assert one.metric("ascproxy_reload_failed") == 0
        for spoil, sentence in _broken(one).values():
            one.install(one.authority.issue("localhost"))
            spoil()
            status, said = one.reload()
            assert (status, sentence in said) == (1, True), said
            assert "not reloaded, revision" in said
            assert sentence in one.service.said()
            checked = command("check", str(one.service.folder))
            assert (checked.returncode, sentence in checked.stdout) == (1, True)
            assert {one.serial() for _ in range(4)} == {first}
            assert one.metric("ascproxy_reload_failed") == 1
            assert one.metric("ascproxy_certificate_expiry_timestamp_seconds", **ends) == expiry
        repaired = one.install(one.authority.issue("localhost", ends=25 * DAY))
        status, said = one.reload()
        assert (status, said.startswith("reloaded, revision ")) == (0, True)
        assert one.serial() == repaired.x509.serial_number
        assert one.metric("ascproxy_reload_failed") == 0
        until = repaired.x509.not_valid_after_utc.timestamp()
        assert one.metric("ascproxy_certificate_expiry_timestamp_seconds", **ends) == until


def test_what_ends_soon_is_told_at_reload(tmp_path: Path, simulator: Simulator) -> None:
    with node(tmp_path, simulator) as one:
        one.install(one.authority.issue("localhost", begins=-30 * DAY, ends=3.5 * DAY))
        status, said = one.reload()
        assert status == 0
        assert re.search(
            rf": warning: .*certificate {one.certificate} expires on .*, in 3 days; renew it and reload", said
        )


def resumed(one: Node, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession, int]:
    """One request: whether its session was resumed, the session after it, and the worker."""
    with one.connect(context, session) as secure:
        assert one.ask(secure) == b"200"  # a ticket of TLS 1.3 comes with the first bytes
        assert secure.session is not None
        return bool(secure.session_reused), secure.session, one.worker_of(secure)


@EVERY
def test_a_session_resumes_on_every_worker_and_over_a_reload(
    tmp_path: Path, simulator: Simulator, version: str
) -> None:
    with node(tmp_path, simulator) as one:
        context = trusting(one.authority, version)
        reused, session, _ = resumed(one, context, None)
        assert not reused
        workers: set[int] = set()

        def both() -> bool:
            nonlocal session
            reused, session, worker = resumed(one, context, session)
            assert reused
            workers.add(worker)
            return len(workers) == 2

        eventually(both, what="both workers have resumed it")
        assert one.reload()[0] == 0
        workers.clear()
        eventually(both, what="both workers have resumed it after a reload")


@pytest.mark.timeout(300)
@EVERY
def test_a_session_resumes_on_another_node_with_the_same_key_file(
    tmp_path: Path, simulator: Simulator, version: str
) -> None:
    keys, authority = tmp_path / "tickets", Authority(tmp_path)
    keys.touch(0o600)
    first, second = secrets.token_hex(32), secrets.token_hex(32)
    keys.write_text(f"# shared by both nodes\n{first}\n")
    shared = {"authority": authority, "ticket_keys": str(keys)}
    with node(tmp_path / "a", simulator, **shared) as one, node(tmp_path / "b", simulator, **shared) as other:
        context = trusting(authority, version)
        _, session, _ = resumed(one, context, None)
        reused, session, _ = resumed(other, context, session)
        assert reused
        # Rotation: the new key is made known everywhere, then it encrypts, then the old one goes.
        for text, stays in ((f"{first}\n{second}\n", True), (f"{second}\n{first}\n", True), (f"{second}\n", True)):
            keys.write_text(text)
            assert [each.reload()[0] for each in (one, other)] == [0, 0]
            for each in (one, other):
                reused, session, _ = resumed(each, context, session)
                assert reused is stays
        keys.write_text(f"{first}\n")
        assert other.reload()[0] == 0
        assert not resumed(other, context, session)[0]
        keys.chmod(0o644)
        status, said = one.reload()
        assert (status, f"ticket key file {keys} can be read by others" in said) == (1, True)


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory, simulator: Simulator) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("partners")
    authority = Authority(folder)
    (folder / "clients.crl").write_bytes(authority.revoke())
    trust = {"client_ca": str(authority.file), "client_crl": str(folder / "clients.crl")}
    with node(folder, simulator, authority, **trust) as one:
        yield one


# RFC 8446 6.2
@EVERY
def test_a_client_is_refused_by_the_alert_that_tells_it_why(partners: Node, version: str) -> None:
    authority, port = partners.authority, partners.service.https_port
    gone = authority.issue("gone.example", client=True)
    good = authority.issue("app.example", client=True)
    leaving = trusting(authority, version, gone)
    with partners.connect(leaving) as secure:
        assert partners.ask(secure) == b"200"  # not revoked yet
        session = secure.session
        assert session is not None
        (partners.folder / "clients.crl").write_bytes(authority.revoke(gone))
        status, said = partners.reload()
        assert status == 0, said
        with pytest.raises((ConnectionError, http.client.HTTPException, ssl.SSLError)):
            partners.ask(secure)  # nor may it go on
    stranger = Authority(partners.folder, "stranger").issue("app.example", client=True)
    expired = authority.issue("old.example", client=True, begins=-3 * DAY, ends=-DAY)

    async def alerts() -> list[int]:
        return [await refused_by(port, version, client) for client in (None, stranger, expired, gone)]

    assert asyncio.run(alerts()) == [116 if version == "1.3" else 40, 48, 45, 44]
    with pytest.raises(ssl.SSLError, match="revoked"), partners.connect(leaving, session) as again:
        again.recv(1)  # a session is no way around
    with partners.connect(trusting(authority, version, good)) as secure:
        assert partners.ask(secure) == b"200"
    labels = {"listener": "https", "kind": "client_crl", "file": str(partners.folder / "clients.crl")}
    assert partners.metric("ascproxy_certificate_expiry_timestamp_seconds", **labels) is not None


def test_who_speaks_no_tls_is_let_go_without_a_reset(partners: Node) -> None:
    for hello in (
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\xff\xff",
        b"\x00" * 100,
        b"\x80\x2e\x01\x03\x01",
    ):
        with closing(socket.create_connection(("127.0.0.1", partners.service.https_port), timeout=20)) as plain:
            plain.sendall(hello + b"x" * 5_000)
            plain.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda end=plain: end.recv(4096), b""))  # a reset would raise
            assert said == b"" or said[0] == 0x15, said  # nothing, or an alert record


def test_reload_without_a_service(tmp_path: Path, simulator: Simulator) -> None:
    with first_light(tmp_path) as (service, _):
        done = command("reload", "--config", str(service.folder), "--json")
        assert done.returncode == 0
        assert '"state": "done"' in done.stdout
        service.stop()
        done = command("reload", "--config", str(service.folder))
        assert (done.returncode, "nothing runs in" in done.stderr) == (3, True)
