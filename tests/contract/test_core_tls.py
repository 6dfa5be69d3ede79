"""TLS on both sides of the native core: bytes, back-pressure, alerts, names (DESIGN D2)."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from pathlib import Path

import pytest
import trustme

from ascproxy import _native
from ascproxy.net import tls
from tests.kit.rig import Rig, post, read_answer, read_request, run, settled_at, until

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"


class Pki:
    """A private CA with a server certificate for localhost and a client certificate, as files."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        server = self.authority.issue_cert("localhost", "127.0.0.1")
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        server.cert_chain_pems[0].write_to_path(self.certificate)
        server.private_key_pem.write_to_path(self.key)
        client = self.authority.issue_cert("app@example.org")
        self.client_certificate, self.client_key = folder / "client.pem", folder / "client.key"
        client.cert_chain_pems[0].write_to_path(self.client_certificate)
        client.private_key_pem.write_to_path(self.client_key)

    def server(self, **more: object) -> _native.TlsContext:
        return _native.TlsContext.server(certificate=str(self.certificate), key=str(self.key), **more)

    def trusting(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        context.minimum_version = context.maximum_version = version
        return context

    def upstream(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        _, body = await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


async def dial(rig: Rig, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", rig.port, ssl=context, server_hostname="localhost", limit=1 << 26)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_requests_and_long_bodies_pass_over_tls_on_both_sides(pki: Pki, version: ssl.TLSVersion) -> None:
    async def main() -> None:
        client_tls = _native.TlsContext.client(ca=str(pki.ca))
        async with Rig(echo, server_tls=pki.server(), client_tls=client_tls, upstream_ssl=pki.upstream()) as rig:
            reader, writer = await dial(rig, pki.trusting(version))
            for size in (2, 1_000, 16_384, 100_000, 5_000_000):
                body = json.dumps("x" * size).encode()
                writer.write(post(body))
                answer = await read_answer(reader)
                assert answer.status == 200
                assert answer.body == body
            assert rig.upstream_connections == 1
            writer.close()

    run(main())


def test_a_stalled_tls_reader_is_felt_upstream_and_gets_every_byte(pki: Pki) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.transport.set_write_buffer_limits(high=0)
        await read_request(reader)
        writer.write(CHUNKED)
        for n in range(1000):
            writer.write(b"2710\r\n" + b"%010d" % n * 1000 + b"\r\n")
            await writer.drain()
            sent += 10_000
        writer.write(b"0\r\n\r\n")

    async def main() -> None:
        async with Rig(flood, server_tls=pki.server(), upstream_rcvbuf=65_536, upstream_sndbuf=16_384) as rig:
            reader, writer = await dial(rig, pki.trusting())
            writer.transport.pause_reading()
            writer.write(post(b"{}"))
            await until(lambda: rig.core.paused == 1, "the reader stalls")
            assert await settled_at(lambda: sent) < 9_000_000
            writer.transport.resume_reading()
            answer = await read_answer(reader)
            assert answer.body == b"".join(b"%010d" % n * 1000 for n in range(1000))
            writer.close()

    run(main())


def test_departure_of_a_tls_client_cancels_the_upstream(pki: Pki) -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()
        gone.set()

    async def main() -> None:
        async with Rig(silent, server_tls=pki.server()) as rig:
            _, writer = await dial(rig, pki.trusting())
            writer.write(post(b"{}"))
            await until(lambda: rig.upstream_connections == 1, "forwarded")
            writer.transport.abort()
            await asyncio.wait_for(gone.wait(), 0.2)

    run(main())


def test_a_client_certificate_is_required_and_the_alert_arrives(pki: Pki) -> None:
    async def main() -> None:
        async with Rig(echo, server_tls=pki.server(client_ca=str(pki.ca))) as rig:
            context = pki.trusting()
            with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
                reader, writer = await dial(rig, context)
                writer.write(post(b"{}"))
                await reader.read()
            context.load_cert_chain(pki.client_certificate, pki.client_key)
            reader, writer = await dial(rig, context)
            writer.write(post(b"{}"))
            assert (await read_answer(reader)).body == b"{}"
            writer.close()

    run(main())


def test_an_upstream_with_the_wrong_name_or_issuer_is_not_asked(pki: Pki, tmp_path: Path) -> None:
    other = trustme.CA()
    other.cert_pem.write_to_path(tmp_path / "other.pem")

    async def main() -> None:
        client_tls = _native.TlsContext.client(ca=str(tmp_path / "other.pem"))
        async with Rig(echo, client_tls=client_tls, upstream_ssl=pki.upstream()) as rig:
            reader, writer = await rig.client()
            writer.write(post(b"{}"))
            answer = await read_answer(reader)
            assert answer.status == 502
            assert b"certificate" in answer.body
            writer.close()

    run(main())


def test_plain_http_on_a_tls_port_is_cut(pki: Pki) -> None:
    async def main() -> None:
        async with Rig(echo, server_tls=pki.server()) as rig:
            reader, writer = await rig.client()
            writer.write(post(b"{}"))
            assert b"HTTP/1.1 200" not in await reader.read()
            writer.close()
            assert rig.upstream_connections == 0

    run(main())


def test_a_handshake_that_does_not_come_is_cut(pki: Pki) -> None:
    async def main() -> None:
        async with Rig(echo, server_tls=pki.server(), tls_handshake_ms=300) as rig:
            reader, writer = await rig.client()
            assert await reader.read() == b""
            writer.close()

    run(main())


def test_a_replaced_context_serves_new_connections_only(pki: Pki, tmp_path: Path) -> None:
    fresh = pki.authority.issue_cert("localhost", "127.0.0.1")
    fresh.cert_chain_pems[0].write_to_path(tmp_path / "new.pem")
    fresh.private_key_pem.write_to_path(tmp_path / "new.key")

    async def main() -> None:
        async with Rig(echo, server_tls=pki.server()) as rig:
            reader, writer = await dial(rig, pki.trusting())
            first = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
            rig.listener.tls = _native.TlsContext.server(
                certificate=str(tmp_path / "new.pem"), key=str(tmp_path / "new.key")
            )
            writer.write(post(b"{}"))
            assert (await read_answer(reader)).status == 200
            reader2, writer2 = await dial(rig, pki.trusting())
            assert writer2.get_extra_info("ssl_object").getpeercert()["serialNumber"] != first
            writer2.write(post(b"{}"))
            assert (await read_answer(reader2)).status == 200
            writer.close()
            writer2.close()

    run(main())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_outlives_one_rotation_of_the_ticket_keys_and_is_renewed(pki: Pki, version: ssl.TLSVersion) -> None:
    def once(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession]:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
        ):
            secure.sendall(post(b"{}"))
            assert secure.recv(65_536).startswith(b"HTTP/1.1 200")
            assert secure.session is not None
            return bool(secure.session_reused), secure.session

    async def main() -> None:
        keys = [tls.fresh(os.urandom)]
        for _ in range(3):
            keys.append(tls.rotate(keys[-1], os.urandom))
        server = pki.server()
        async with Rig(echo, server_tls=server) as rig:

            async def visit(session: ssl.SSLSession | None, turn: int) -> tuple[bool, ssl.SSLSession]:
                server.set_ticket_keys(keys[turn].ordered())
                return await asyncio.to_thread(once, rig.port, context, session)

            context = pki.trusting(version)
            reused, old = await visit(None, 0)
            assert not reused
            reused, renewed = await visit(old, 1)
            assert reused
            assert (await visit(renewed, 2))[0]  # it was renewed under the second key
            assert not (await visit(old, 2))[0]  # whose own key is gone
            # A worker that has not heard of a rotation opens what one that has sealed with the next key.
            _, early = await visit(None, 3)
            assert (await visit(early, 2))[0]

    run(main())


@pytest.mark.parametrize("hello", [b"\x16\x03\x01\x00\x02\x01\x00", b"\x00" * 64, b"\x15\x03\x01\x00\x02\x02\x28"])
def test_what_is_no_handshake_ends_without_a_reset(pki: Pki, hello: bytes) -> None:
    async def main() -> None:
        async with Rig(echo, server_tls=pki.server()) as rig:
            reader, writer = await rig.client()
            writer.write(hello + b"\x00" * 1_000)
            said = await reader.read()  # a reset would raise
            assert said == b"" or (said[0], len(said)) == (0x15, 7)  # or one alert record
            writer.close()

    run(main())
