"""Contexts from configuration: each thing that can be wrong has its sentence; ticket keys turn without a gap."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import itertools
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ascproxy._native import TlsContext
from ascproxy.model.node import ClientAuth, Listener, ListenerTls, Node
from ascproxy.model.provider import UpstreamTls
from ascproxy.net import tls
from ascproxy.net.tls import CertificateError, TicketKeys, listener_context, upstream_context

DAY = datetime.timedelta(days=1)


class Pki:
    """A CA and one server certificate as files; ``sign`` makes others that are wrong in one way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        leaf = self.ca.issue_cert("gateway.example", "127.0.0.1", "::1")
        self.certificate, self.key = folder / "server.crt", folder / "server.key"
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(self.key)

    def listener(self, **other: str) -> ListenerTls:
        return ListenerTls(**({"certificate": str(self.certificate), "key": str(self.key)} | other))

    def sign(
        self,
        *,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = DAY,
        names: bool = True,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
    ) -> ListenerTls:
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway.example")])
        builder = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if names:
            alternatives = x509.SubjectAlternativeName([x509.DNSName("gateway.example")])
            builder = builder.add_extension(alternatives, critical=False)
        certificate_file, key_file = self.folder / "signed.crt", self.folder / "signed.key"
        certificate = builder.sign(key, hashes.SHA256())
        certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return ListenerTls(certificate=str(certificate_file), key=str(key_file))


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def test_a_context_knows_its_certificate(pki: Pki) -> None:
    context = listener_context(pki.listener(client_ca=str(pki.ca_file)))
    certificate = x509.load_pem_x509_certificate(pki.certificate.read_bytes())
    assert context.certificate_info == {
        "subject": certificate.subject.rfc4514_string(),
        "names": ("gateway.example", "127.0.0.1", "::1"),
        "not_before_unix": int(certificate.not_valid_before_utc.timestamp()),
        "not_after_unix": int(certificate.not_valid_after_utc.timestamp()),
        "fingerprint_sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }
    assert tls.expires_unix(context) == int(certificate.not_valid_after_utc.timestamp())


def _encrypted(pki: Pki) -> ListenerTls:
    key = serialization.load_pem_private_key(pki.key.read_bytes(), None)
    pki.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    return pki.listener()


def _another_key(pki: Pki) -> ListenerTls:
    pki.ca.issue_cert("other.example").private_key_pem.write_to_path(pki.key)
    return pki.listener()


def _changed(which: str, content: bytes) -> Callable[[Pki], ListenerTls]:
    def change(pki: Pki) -> ListenerTls:
        Path(getattr(pki, which)).write_bytes(content)
        return pki.listener(client_ca=str(pki.ca_file))

    return change


def _stranger_in_chain(pki: Pki) -> ListenerTls:
    pki.certificate.write_bytes(pki.certificate.read_bytes() + trustme.CA().cert_pem.bytes())
    return pki.listener()


def _torn(pki: Pki) -> ListenerTls:
    content = pki.certificate.read_bytes()
    pki.certificate.write_bytes(content[: len(content) // 2])
    return pki.listener()


WRONG: dict[str, tuple[Callable[[Pki], ListenerTls], str]] = {
    "no certificate file": (
        lambda pki: pki.listener(certificate="/absent.crt"),
        "cannot read certificate /absent.crt: No such file or directory; check the path",
    ),
    "no key file": (lambda pki: pki.listener(key="/absent.key"), "cannot read key /absent.key: No such file"),
    "no CA file": (lambda pki: pki.listener(client_ca="/absent.pem"), "cannot read CA file /absent.pem: No such file"),
    "certificate is a folder": (
        lambda pki: pki.listener(certificate=str(pki.folder)),
        ": Is a directory; check the path",
    ),
    "certificate not PEM": (
        _changed("certificate", b"\x30\x82junk"),
        "server.crt holds no certificate; it must be PEM",
    ),
    "certificate cut short": (_torn, "server.crt: certificate 1 cannot be decoded"),
    "certificate not base64": (
        _changed("certificate", b"-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n"),
        "server.crt: certificate 1 cannot be decoded",
    ),
    "certificate file holds a key": (
        lambda pki: pki.listener(certificate=str(pki.key)),
        "server.key holds no certificate",
    ),
    "key not PEM": (_changed("key", b"junk"), "server.key holds no private key; it must be PEM"),
    "key of another certificate": (_another_key, "server.key does not belong to certificate"),
    "key with a passphrase": (_encrypted, "server.key is encrypted with a passphrase"),
    "CA file empty": (_changed("ca_file", b""), "ca.pem holds no certificate"),
    "chain out of order": (_stranger_in_chain, "certificate 2 of the file did not issue certificate 1"),
    "expired": (lambda pki: pki.sign(begins=-2 * DAY, ends=-DAY), "signed.crt expired on "),
    "not yet valid": (lambda pki: pki.sign(begins=DAY, ends=2 * DAY), "signed.crt is not valid before "),
    "weak RSA key": (
        lambda pki: pki.sign(key=rsa.generate_private_key(65537, 1024)),
        "signed.crt is too weak (ee key too small); use P-256",
    ),
    "for clients only": (
        lambda pki: pki.sign(usage=ExtendedKeyUsageOID.CLIENT_AUTH),
        "signed.crt may not be used by a TLS server",
    ),
    "no name": (lambda pki: pki.sign(names=False), "signed.crt names no host: issue it with a subjectAltName"),
}


@pytest.mark.parametrize(("make", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_with_the_file(pki: Pki, make: Callable[[Pki], ListenerTls], sentence: str) -> None:
    with pytest.raises(CertificateError) as refused:
        listener_context(make(pki))
    assert sentence in str(refused.value)
    assert "error:" not in str(refused.value)


def test_the_signed_certificate_that_is_wrong_in_nothing_is_taken(pki: Pki) -> None:
    assert tls.expires_unix(listener_context(pki.sign())) > 0


def test_a_failure_leaves_nothing_behind_for_the_next_context(pki: Pki) -> None:
    for make, _ in WRONG.values():
        with pytest.raises(CertificateError):
            listener_context(make(Pki(pki.folder)))
    listener_context(Pki(pki.folder).listener())
    ssl.create_default_context()


def test_upstream_contexts(pki: Pki) -> None:
    plain = upstream_context(UpstreamTls())
    assert plain.certificate_info is None
    with pytest.raises(ValueError, match="no certificate of its own"):
        tls.expires_unix(plain)
    upstream_context(UpstreamTls(ca=str(pki.ca_file)))
    client = pki.sign(usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    own = UpstreamTls(ca=str(pki.ca_file), certificate=client.certificate, key=client.key)
    assert upstream_context(own).certificate_info is not None


@pytest.mark.parametrize(
    ("noun", "sentence"),
    [
        (UpstreamTls(ca="/absent.pem"), "cannot read CA file /absent.pem"),
        (UpstreamTls(certificate="/c.crt"), "/c.crt stands alone: name its key too"),
        (UpstreamTls(key="/c.key"), "/c.key stands alone: name its certificate too"),
        (UpstreamTls(certificate="/c.crt", key="/c.key"), "cannot read certificate /c.crt"),
    ],
)
def test_upstream_files_that_cannot_be_used(noun: UpstreamTls, sentence: str) -> None:
    with pytest.raises(CertificateError) as refused:
        upstream_context(noun)
    assert sentence in str(refused.value)


def test_a_server_certificate_is_no_client_certificate(pki: Pki) -> None:
    server = pki.sign()
    with pytest.raises(CertificateError, match="may not be used by a TLS client"):
        upstream_context(UpstreamTls(certificate=server.certificate, key=server.key))


def test_misuse_of_the_native_type(pki: Pki) -> None:
    files: dict[str, Any] = {"certificate": str(pki.certificate), "key": str(pki.key)}
    with pytest.raises(TypeError):
        TlsContext()
    with pytest.raises(TypeError, match="needs certificate and key"):
        TlsContext.server(certificate=files["certificate"])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"1\.2"):
        TlsContext.server(**files, minimum="1.1")
    for bad in ((b"",), (b"x" * 256,), ("h2",), (b"x" * 255,) * 257):
        with pytest.raises(ValueError, match="ALPN"):
            TlsContext.server(**files, alpn=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        TlsContext.server(**files, alpn=[b"h2"])  # type: ignore[arg-type]
    context = TlsContext.server(**files, alpn=(), minimum="1.3")
    for keys in ((b"x" * 79,), ("x" * 80,), (b"x" * 80,) * 9):
        with pytest.raises(ValueError, match="ticket key"):
            context.set_ticket_keys(keys)  # type: ignore[arg-type]
    context.set_ticket_keys((b"x" * 80,) * 8)
    context.set_ticket_keys(())
    with pytest.raises(ValueError, match="only a server"):
        TlsContext.client().set_ticket_keys((b"x" * 80,))


# -- ticket keys -------------------------------------------------------------------------------------------------------


def counting() -> Callable[[int], bytes]:
    """Randomness that is never the same twice and always the same in a test."""
    numbers = itertools.count()
    return lambda n: hashlib.shake_128(b"%d" % next(numbers)).digest(n)


def test_derived_keys_are_hkdf_expand() -> None:
    seed = bytes(range(32))
    info = b"ascproxy session ticket key"
    first = hmac.digest(seed, info + b"\x01", "sha256")
    second = hmac.digest(seed, first + info + b"\x02", "sha256")
    third = hmac.digest(seed, second + info + b"\x03", "sha256")
    assert tls.derive(seed) == (first + second + third)[:80]
    assert tls.derive(seed) != tls.derive(bytes(32))
    for wrong in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="32 random bytes"):
            tls.derive(wrong)


def test_a_key_decrypts_one_turn_before_and_one_turn_after_it_encrypts() -> None:
    random = counting()
    turns = [tls.fresh(random)]
    for _ in range(4):
        turns.append(tls.rotate(turns[-1], random))
    assert len({key for keys in turns for key in keys.ordered()}) == 3 + 4
    for before, after in itertools.pairwise(turns):
        assert after.current == before.next
        assert after.previous == before.current
        assert after.next not in before.ordered()
        # Whoever encrypts, with the old keys or the new ones, is understood by the other.
        assert before.ordered()[0] in after.ordered()
        assert after.ordered()[0] in before.ordered()
    assert turns[0].current not in turns[2].ordered()


def test_fresh_keys_know_no_earlier_ticket() -> None:
    random = counting()
    assert not set(tls.fresh(random).ordered()) & set(tls.fresh(random).ordered())


def test_keys_pass_through_the_mailbox_and_are_not_shown(pki: Pki) -> None:
    keys = tls.fresh(counting())
    assert len(keys.pack()) == 240
    assert TicketKeys.unpack(keys.pack()) == keys
    assert repr(keys) == "TicketKeys()"
    for wrong in (b"", keys.pack()[:-1], keys.pack() + b"x"):
        with pytest.raises(ValueError, match="240 bytes"):
            TicketKeys.unpack(wrong)
    with pytest.raises(ValueError, match="80 bytes"):
        TicketKeys(keys.current, keys.previous, b"short")
    listener_context(pki.listener(), tickets=keys)


# ---- ticket keys from a file, several certificates, trust ----------------------------------------------------------


def ticket_file(folder: Path, *lines: str, mode: int = 0o600) -> str:
    path = folder / "tickets"
    path.touch(0o600)
    path.write_text("\n".join(lines) + "\n")
    path.chmod(mode)
    return str(path)


SEED = "00112233445566778899aabbccddeeff" * 2


def test_keys_from_a_file_are_those_that_the_supervisor_would_derive(pki: Pki) -> None:
    """A session of a node with the file resumes on one whose keys were derived here: the derivation is one."""
    keys = TicketKeys(tls.derive(bytes.fromhex(SEED)), *(tls.derive(bytes([n]) * 32) for n in range(2)))
    from_file = listener_context(pki.listener(ticket_keys=ticket_file(pki.folder, "# ours", "", SEED.upper())))
    derived = listener_context(pki.listener(), tickets=keys)
    assert (from_file.ticket_keys_from_file, derived.ticket_keys_from_file) == (True, False)
    tls.use_tickets(from_file, tls.fresh(bytes))  # they stay the file's
    with pytest.raises(ValueError, match="come from a file"):
        from_file.set_ticket_keys((bytes(80),))


WRONG_TICKETS = {
    "short": ([SEED, SEED[:-1]], 0o600, "line 2 is no key: write 64 hexadecimal digits, as `openssl rand -hex 32`"),
    "not hexadecimal": (["g" + SEED[1:]], 0o600, "line 1 is no key"),
    "nothing": (["# nothing"], 0o600, "holds no key; make one with `openssl rand -hex 32`"),
    "twice": ([SEED, "", SEED], 0o600, "line 3 repeats a key; remove it"),
    "nine": ([f"{n:064x}" for n in range(9)], 0o600, "holds more than 8 keys; remove the oldest"),
    "readable": ([SEED], 0o604, "can be read by others or written by its group \\(mode 0604\\)"),
    "group writes": ([SEED], 0o660, "can be read by others or written by its group \\(mode 0660\\)"),
}


@pytest.mark.parametrize(("lines", "mode", "sentence"), WRONG_TICKETS.values(), ids=WRONG_TICKETS)
def test_a_wrong_ticket_file_has_its_sentence(pki: Pki, lines: list[str], mode: int, sentence: str) -> None:
    path = ticket_file(pki.folder, *lines, mode=mode)
    with pytest.raises(CertificateError, match=f"^ticket key file {path}:? {sentence}"):
        listener_context(pki.listener(ticket_keys=path))


def test_a_group_may_read_ticket_keys(pki: Pki) -> None:
    assert listener_context(pki.listener(ticket_keys=ticket_file(pki.folder, SEED, mode=0o640))).ticket_keys_from_file


def test_a_ticket_file_that_is_none(pki: Pki) -> None:
    with pytest.raises(CertificateError, match="cannot read ticket key file /absent: No such file"):
        listener_context(pki.listener(ticket_keys="/absent"))
    with pytest.raises(CertificateError, match=f"ticket key file {pki.folder} is no regular file"):
        listener_context(pki.listener(ticket_keys=str(pki.folder)))


def test_trust_is_what_decides_about_clients(pki: Pki) -> None:
    def trust(**of: Any) -> str:
        made = listener(**of)
        return tls.trust_of(Node("n", "/s", "/r", 1, (Listener("l", "127.0.0.1:1", made),), "127.0.0.1:2"))

    def listener(**of: Any) -> ListenerTls:
        return ListenerTls(str(pki.certificate), str(pki.key), **of)

    ca, crl = str(pki.ca_file), pki.folder / "crl"
    crl.write_bytes(b"one")
    kinds = {
        "none": trust(),
        "ca": trust(client_ca=ca),
        "optional": trust(client_ca=ca, client_auth=ClientAuth.OPTIONAL),
        "depth": trust(client_ca=ca, client_depth=1),
        "crl": trust(client_ca=ca, client_crl=str(crl)),
        "absent": trust(client_ca=ca, client_crl="/absent"),
    }
    assert len(set(kinds.values())) == len(kinds)
    assert trust(client_ca=ca, client_auth=ClientAuth.OFF) == kinds["none"]
    before = pki.certificate.read_bytes()
    pki.certificate.write_bytes(b"other")
    assert trust(client_ca=ca, client_crl=str(crl)) == kinds["crl"]  # our own certificate lets nobody in
    pki.certificate.write_bytes(before)
    crl.write_bytes(b"two")
    assert trust(client_ca=ca, client_crl=str(crl)) not in kinds.values()
