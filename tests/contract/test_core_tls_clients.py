"""Client certificates: who is let in, by which alert the others are refused, and what the walk and the log are told."""

from __future__ import annotations

import asyncio
import datetime
import json
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes

from ascproxy import _native
from tests.contract.test_core_tls import echo
from tests.kit.certificates import DAY, Authority, Files, refused_by, trusting
from tests.kit.rig import Rig, post, read_answer, run

EVERY = pytest.mark.parametrize("version", ["1.2", "1.3"])
# RFC 8446 6.2; RFC 5246 has no alert of its own for a certificate that does not come.
HANDSHAKE_FAILURE, REVOKED, EXPIRED, UNKNOWN_CA, REQUIRED = 40, 44, 45, 48, 116


class Partners:
    """A CA whose clients are let in, with a server and clients of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = Authority(folder, "partners")
        self.server = self.ca.issue("localhost", common="server")
        self.good = self.ca.issue("app.example", "URI:spiffe://example/app", common="app", client=True)
        self.expired = self.ca.issue("old.example", client=True, begins=-3 * DAY, ends=-DAY)
        self.revoked = self.ca.issue("gone.example", client=True)
        self.stranger = Authority(folder, "stranger").issue("app.example", client=True)
        self.crl = folder / "partners.crl"
        self.crl.write_bytes(self.ca.revoke(self.revoked))

    def context(self, **more: object) -> _native.TlsContext:
        certificate, key = self.server.pair
        trust: dict[str, object] = {"client_ca": str(self.ca.file), "client_crl": str(self.crl)}
        return _native.TlsContext.server(certificate=certificate, key=key, **(trust | more))  # type: ignore[arg-type]


@pytest.fixture
def partners(tmp_path: Path) -> Partners:
    return Partners(tmp_path)


async def let_in(
    rig: Rig, partners: Partners, version: str, client: Files | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = trusting(partners.ca, version, client)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, ssl=context, server_hostname="localhost")
    await again(reader, writer)
    return reader, writer


async def again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(post(b"{}"))
    assert (await read_answer(reader)).body == b"{}"


@EVERY
def test_each_refusal_has_its_alert(partners: Partners, version: str) -> None:
    async def main() -> None:
        async with Rig(echo, server_tls=partners.context()) as rig:
            _, writer = await let_in(rig, partners, version, partners.good)
            writer.close()
            told = {
                name: await refused_by(rig.port, version, client)
                for name, client in {
                    "none": None,
                    "stranger": partners.stranger,
                    "expired": partners.expired,
                    "revoked": partners.revoked,
                }.items()
            }
            assert told == {
                "none": REQUIRED if version == "1.3" else HANDSHAKE_FAILURE,
                "stranger": UNKNOWN_CA,
                "expired": EXPIRED,
                "revoked": REVOKED,
            }
            assert rig.upstream_connections == 1
            assert rig.page.load(_native.Page.CELLS["tls_failed"]) == 4

    run(main())


@EVERY
def test_an_optional_certificate_may_be_left_out_and_not_be_wrong(partners: Partners, version: str) -> None:
    async def main() -> None:
        async with Rig(echo, server_tls=partners.context(client_required=False)) as rig:
            for client in (None, partners.good):
                _, writer = await let_in(rig, partners, version, client)
                writer.close()
            assert await refused_by(rig.port, version, partners.stranger) == UNKNOWN_CA
            assert await refused_by(rig.port, version, partners.revoked) == REVOKED
            first, second = rig.walk.seen_certificates
            assert first is None
            assert second is not None

    run(main())


@EVERY
def test_the_walk_and_the_access_line_know_the_client(partners: Partners, version: str) -> None:
    async def main() -> None:
        async with Rig(echo, server_tls=partners.context()) as rig:
            reader, writer = await let_in(rig, partners, version, partners.good)
            await again(reader, writer)
            writer.close()
            one, other = rig.walk.seen_certificates
            assert one is other  # made once for a connection
            fingerprint = partners.good.x509.fingerprint(hashes.SHA256()).hex()
            assert one is not None
            assert (one.subject, one.names) == ("CN=app", ("DNS:app.example", "URI:spiffe://example/app"))
            assert one.fingerprint_sha256 == fingerprint
            assert one.not_after_unix == int(partners.good.x509.not_valid_after_utc.timestamp())
            lines = [json.loads(line) for line in rig.core.take_log().splitlines()]
            assert [line["client_cert"] for line in lines] == [
                {"subject": "CN=app", "names": ["DNS:app.example", "URI:spiffe://example/app"], "sha256": fingerprint}
            ] * 2

    run(main())


def test_what_a_certificate_says_cannot_forge_a_line(partners: Partners) -> None:
    nasty = 'x","status":200}\n{"kind":"access'
    client = partners.ca.issue(f"URI:http://{nasty.replace(chr(10), '%0a')}", common=nasty, client=True)
    many = partners.ca.issue(*(f"n{n}.{'x' * 60}.example" for n in range(100)), common="ü" * 30, client=True)

    async def main() -> None:
        async with Rig(echo, server_tls=partners.context()) as rig:
            for each in (client, many):
                _, writer = await let_in(rig, partners, "1.3", each)
                writer.close()
            first, second = (json.loads(line) for line in rig.core.take_log().splitlines())
            assert first["status"] == 200
            assert len(second["client_cert"]["names"]) == 4
            seen = rig.walk.seen_certificates[1]
            assert seen is not None
            assert len(seen.names) == 100
            assert seen.subject == "CN=" + "ü" * 30

    run(main())


def test_connections_without_one_say_nothing_of_it(partners: Partners) -> None:
    async def main() -> None:
        certificate, key = partners.server.pair
        async with Rig(echo, server_tls=_native.TlsContext.server(certificate=certificate, key=key)) as rig:
            _, writer = await let_in(rig, partners, "1.3", partners.good)  # nobody asks for it
            writer.close()
            assert rig.walk.seen_certificates == [None]
            assert "client_cert" not in json.loads(rig.core.take_log())

    run(main())


@EVERY
def test_a_chain_may_be_as_long_as_the_depth_allows(tmp_path: Path, version: str) -> None:
    root = Authority(tmp_path, "root")
    one = Authority(tmp_path, "one", root)
    two = Authority(tmp_path, "two", one)
    server = root.issue("localhost", common="server")
    client = two.issue("app.example", client=True)
    client.certificate.write_bytes(client.certificate.read_bytes() + one.file.read_bytes())

    async def main() -> None:
        for depth, alert in ((3, 0), (2, UNKNOWN_CA)):
            context = _native.TlsContext.server(
                certificate=server.pair[0], key=server.pair[1], client_ca=str(root.file), client_depth=depth
            )
            async with Rig(echo, server_tls=context) as rig:
                more = ("-cert_chain", str(client.certificate))
                assert await refused_by(rig.port, version, client, *more) == alert

    run(main())


@EVERY
def test_a_reload_that_trusts_fewer_ends_the_connections_of_the_others(partners: Partners, version: str) -> None:
    """LIMITS 5: after the removal of a CA, connections that it authenticated go; the others do not notice."""
    late = partners.ca.issue("late.example", common="late", client=True)

    async def main() -> None:
        async with Rig(echo, server_tls=partners.context()) as rig:
            stays = await let_in(rig, partners, version, partners.good)
            goes = await let_in(rig, partners, version, late)
            rig.listener.tls = partners.context()  # nothing has changed
            await again(*stays)
            await again(*goes)
            partners.crl.write_bytes(partners.ca.revoke(partners.revoked, late))
            rig.listener.tls = partners.context()
            await again(*stays)
            await again(*stays)
            served = len(rig.walk.seen_certificates)
            goes[1].write(post(b"{}"))
            assert await goes[0].read() == b""
            assert len(rig.walk.seen_certificates) == served
            assert await refused_by(rig.port, version, late) == REVOKED
            for _, writer in (stays, goes):
                writer.close()

    run(main())


def test_who_showed_none_goes_when_one_is_required(partners: Partners) -> None:
    async def main() -> None:
        certificate, key = partners.server.pair
        async with Rig(echo, server_tls=_native.TlsContext.server(certificate=certificate, key=key)) as rig:
            reader, writer = await let_in(rig, partners, "1.3", None)
            rig.listener.tls = partners.context(client_required=False)
            await again(reader, writer)
            rig.listener.tls = partners.context()
            writer.write(post(b"{}"))
            assert await reader.read() == b""
            writer.close()

    run(main())


def test_a_connection_in_work_when_its_ca_goes_gets_its_answer(partners: Partners) -> None:
    waiting, go = asyncio.Event(), asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            waiting.set()
            await go.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")

    async def main() -> None:
        other = Authority(partners.folder, "other")
        async with Rig(slow, server_tls=partners.context()) as rig:
            context = trusting(partners.ca, "1.3", partners.good)
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", rig.port, ssl=context, server_hostname="localhost"
            )
            writer.write(post(b"{}"))
            await waiting.wait()
            rig.listener.tls = partners.context(client_ca=str(other.file), client_crl=None)
            go.set()
            assert (await read_answer(reader)).body == b"done"
            writer.write(post(b"{}"))
            assert await reader.read() == b""
            writer.close()

    run(main())


@EVERY
def test_a_session_is_not_resumed_under_other_trust(partners: Partners, version: str) -> None:
    """The certificate is not looked at again when a session is resumed, so it is bound to CAs and lists."""

    def one_request(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession]:
        import socket

        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
        ):
            secure.sendall(post(b"{}"))
            assert secure.recv(65_536).startswith(b"HTTP/1.1 200")
            assert secure.session is not None
            return bool(secure.session_reused), secure.session

    def made() -> _native.TlsContext:
        context = partners.context()
        context.set_ticket_keys((bytes(80),))
        return context

    async def main() -> None:
        async with Rig(echo, server_tls=made()) as rig:
            context = trusting(partners.ca, version, partners.good)
            reused, session = await asyncio.to_thread(one_request, rig.port, context, None)
            assert not reused
            rig.listener.tls = made()
            reused, session = await asyncio.to_thread(one_request, rig.port, context, session)
            assert reused
            # The identity is in the session: a resumed connection has it as well.
            assert {each.subject for each in rig.walk.seen_certificates if each} == {"CN=app"}
            partners.crl.write_bytes(partners.ca.revoke(partners.revoked, ends=9 * DAY))
            rig.listener.tls = made()
            reused, _ = await asyncio.to_thread(one_request, rig.port, context, session)
            assert not reused

    run(main())


def _wrong_lists(partners: Partners) -> dict[str, tuple[bytes, str]]:
    other = Authority(partners.folder, "other")
    return {
        "of another CA": (
            partners.crl.read_bytes() + other.revoke(),
            "list 2 is not signed by a CA of client_ca; remove it, or name its CA",
        ),
        "past its time": (
            partners.ca.revoke(ends=-datetime.timedelta(hours=1)),
            "list 1 was to be replaced by 20.*, and every client would be refused; fetch the current list",
        ),
        "no list": (b"junk", "holds no revocation list; it must be PEM, with lines BEGIN X509 CRL"),
        "torn": (partners.crl.read_bytes()[:-60], "list 1 cannot be decoded"),
    }


def test_a_list_that_cannot_be_used_is_refused_with_its_reason(partners: Partners) -> None:
    for content, sentence in _wrong_lists(partners).values():
        partners.crl.write_bytes(content)
        with pytest.raises(_native.TlsError, match=f"CRL file {partners.crl}:? {sentence}"):
            partners.context()


def test_every_ca_needs_its_list_and_its_root(partners: Partners) -> None:
    both = partners.folder / "both.pem"
    other = Authority(partners.folder, "other")
    both.write_bytes(partners.ca.file.read_bytes() + other.file.read_bytes())
    with pytest.raises(
        _native.TlsError, match="holds no list of /CN=other, and every client of that CA would be refused"
    ):
        partners.context(client_ca=str(both))
    partners.crl.write_bytes(partners.ca.revoke() + other.revoke())
    assert [kind for kind, *_ in partners.context(client_ca=str(both)).file_dates] == [
        "client_ca",
        "client_crl",
        "server",
    ]
    below = Authority(partners.folder, "below", partners.ca)
    with pytest.raises(_native.TlsError, match=f"CA file {below.file} holds no root"):
        partners.context(client_ca=str(below.file), client_crl=None)
    with pytest.raises(ValueError, match="client_crl needs client_ca"):
        partners.context(client_ca=None)
