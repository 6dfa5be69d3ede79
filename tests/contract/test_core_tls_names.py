"""Several certificates on one listener: which one a client is shown, by the name it asks for and the keys it takes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from ascproxy import _native
from tests.contract.test_core_tls import echo
from tests.kit.certificates import VERSIONS, Authority, Files, s_client
from tests.kit.rig import Rig, post, read_answer, run

EVERY = pytest.mark.parametrize("version", ["1.2", "1.3"])


class Several:
    """A listener's certificates: the first for two names with both kinds of keys, others for further names."""

    def __init__(self, folder: Path) -> None:
        self.ca = Authority(folder)
        self.first = self.ca.issue("a.example", "b.example", common="first")
        self.first_rsa = self.ca.issue("a.example", common="first-rsa", rsa_bits=2048)
        self.wild = self.ca.issue("*.wild.example", common="wild")
        self.exact = self.ca.issue("one.wild.example", common="exact")
        self.rsa_only = self.ca.issue("old.example", common="rsa-only", rsa_bits=2048)
        self.all = (self.first, self.first_rsa, self.wild, self.exact, self.rsa_only)

    def context(self, **more: object) -> _native.TlsContext:
        first, *others = (each.pair for each in self.all)
        return _native.TlsContext.server(certificate=first[0], key=first[1], more=tuple(others), **more)

    def by_der(self, der: bytes | None) -> str:
        assert der is not None
        serial = x509.load_der_x509_certificate(der).serial_number
        return next(name for name, each in vars(self).items() if getattr(each, "x509", None) is not None
                    and each.x509.serial_number == serial)  # fmt: skip


@pytest.fixture
def several(tmp_path: Path) -> Several:
    return Several(tmp_path)


def unchecked(version: str, *, only_rsa: bool = False, only_ecdsa: bool = False) -> ssl.SSLContext:
    """A client that looks at no name; for TLS 1.2 what it can check decides by its suites."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = VERSIONS[version]
    if only_rsa or only_ecdsa:
        context.set_ciphers("ECDHE+aRSA+AESGCM" if only_rsa else "ECDHE+ECDSA+AESGCM")
    return context


async def shown(several: Several, rig: Rig, context: ssl.SSLContext, name: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, ssl=context, server_hostname=name)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.write(post(b"{}"))
    assert (await read_answer(reader)).body == b"{}"
    writer.close()
    return several.by_der(der)


@EVERY
def test_the_name_that_is_asked_for_decides(several: Several, version: str) -> None:
    wanted = {
        "a.example": "first",
        "B.EXAMPLE": "first",
        "one.wild.example": "exact",  # the name itself wins over a wildcard
        "two.wild.example": "wild",
        "x.two.wild.example": "first",  # a star stands for one label
        "wild.example": "first",
        "old.example": "rsa_only",
        "unknown.example": "first",
        "127.0.0.1": "first",  # no name is sent for an address
    }

    async def main() -> None:
        async with Rig(echo, server_tls=several.context()) as rig:
            found = {name: await shown(several, rig, unchecked(version), name) for name in wanted}
        assert found == wanted

    run(main())


@EVERY
def test_a_client_that_takes_one_kind_of_key_is_shown_that_kind(several: Several, version: str) -> None:
    """RSA and ECDSA stand side by side; who takes both is shown ECDSA, which costs a tenth."""

    async def kind(port: int, *more: str) -> type:
        command = s_client(port, version, None, "-servername", "a.example", *more)
        running = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        said, _ = await asyncio.wait_for(running.communicate(b""), 20)
        start = said.index(b"-----BEGIN CERTIFICATE")
        key = x509.load_pem_x509_certificate(said[start:]).public_key()
        return rsa.RSAPublicKey if isinstance(key, rsa.RSAPublicKey) else ec.EllipticCurvePublicKey

    async def main() -> None:
        async with Rig(echo, server_tls=several.context()) as rig:
            assert await kind(rig.port) is ec.EllipticCurvePublicKey
            assert await kind(rig.port, "-sigalgs", "ecdsa_secp256r1_sha256") is ec.EllipticCurvePublicKey
            assert await kind(rig.port, "-sigalgs", "rsa_pss_rsae_sha256:rsa_pkcs1_sha256") is rsa.RSAPublicKey

    run(main())


@EVERY
def test_everything_else_is_the_same_whatever_name_was_asked_for(several: Several, version: str) -> None:
    """A connection that moves to another certificate keeps ALPN, tickets and the demand for a client certificate."""
    client = several.ca.issue("app.example", client=True)

    async def main() -> None:
        server = several.context(client_ca=str(several.ca.file))
        server.set_ticket_keys((bytes(80),))
        async with Rig(echo, server_tls=server) as rig:
            context = unchecked(version)
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await shown(several, rig, context, "two.wild.example")
            context.load_cert_chain(*client.pair)
            context.set_alpn_protocols(["h3", "http/1.1"])
            session = None
            for n in range(2):
                with socket_to(rig.port) as plain:
                    secure = context.wrap_socket(
                        plain, server_hostname="two.wild.example", session=session, do_handshake_on_connect=False
                    )
                    answer = await asyncio.to_thread(ask, secure)
                    assert answer.startswith(b"HTTP/1.1 200")
                    assert secure.selected_alpn_protocol() == "http/1.1"
                    assert secure.session_reused is (n == 1)
                    session = secure.session
                    secure.close()
            context.set_alpn_protocols(["h3"])
            with pytest.raises(ssl.SSLError, match="no application protocol"):
                await shown(several, rig, context, "two.wild.example")

    run(main())


def socket_to(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def ask(secure: ssl.SSLSocket) -> bytes:
    secure.do_handshake()
    secure.sendall(post(b"{}"))
    return secure.recv(65_536)


def test_the_oldest_version_can_be_raised(several: Several) -> None:
    async def main() -> None:
        async with Rig(echo, server_tls=several.context(minimum="1.3")) as rig:
            assert await shown(several, rig, unchecked("1.3"), "old.example") == "rsa_only"
            with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                await shown(several, rig, unchecked("1.2"), "old.example")

    run(main())


def test_every_certificate_is_checked_and_dated(several: Several, tmp_path: Path) -> None:
    context = several.context()
    assert [(kind, path) for kind, path, _, _ in context.file_dates] == [
        ("server", str(each.certificate)) for each in several.all
    ]
    for (_, _, since, until), each in zip(context.file_dates, several.all, strict=True):
        assert since == int(each.x509.not_valid_before_utc.timestamp())
        assert until == int(each.x509.not_valid_after_utc.timestamp())

    def with_second(files: Files) -> None:
        certificate, key = several.first.pair
        _native.TlsContext.server(certificate=certificate, key=key, more=(files.pair,))

    crossed = Files(several.wild.certificate, several.exact.key, several.wild.x509)
    with pytest.raises(_native.TlsError, match=f"{crossed.key} does not belong to certificate {crossed.certificate}"):
        with_second(crossed)
    nameless = several.ca.issue()
    with pytest.raises(_native.TlsError, match=f"{nameless.certificate} names no host"):
        with_second(nameless)
    with pytest.raises(ValueError, match="at most 16 certificates"):
        _native.TlsContext.server(certificate="a", key="b", more=(several.wild.pair,) * 16)
    for wrong in ((1,), ("ab",), [several.wild.pair]):
        with pytest.raises(TypeError):
            _native.TlsContext.server(certificate="a", key="b", more=wrong)  # type: ignore[arg-type]
