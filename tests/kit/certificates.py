"""CAs, certificates and revocation lists as files, wrong in one way where a test wants it so; and clients that are
OpenSSL's own, because they say by which alert they were refused.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
ALERT = re.compile(r"SSL alert number (\d+)")
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


@dataclass(frozen=True, slots=True)
class Files:
    """One certificate with its key, as files."""

    certificate: Path
    key: Path
    x509: x509.Certificate

    @property
    def pair(self) -> tuple[str, str]:
        return str(self.certificate), str(self.key)

    def move_to(self, certificate: Path, key: Path) -> None:
        """Put them in the place of others, each whole."""
        self.certificate.replace(certificate)
        self.key.replace(key)


class Authority:
    """A root, or an intermediate that ``parent`` has signed."""

    def __init__(self, folder: Path, name: str = "authority", parent: Authority | None = None) -> None:
        self.folder, self.name, self.parent = folder, name, parent
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._numbers = itertools.count()
        by = parent or self
        self.x509 = (
            _builder(_subject(name), by.subject if parent else _subject(name), self.key, -DAY, 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(by.key, hashes.SHA256())
        )
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(_pem(self.x509))

    @property
    def subject(self) -> x509.Name:
        return self.x509.subject

    def issue(
        self,
        *names: str,
        common: str = "leaf",
        rsa_bits: int = 0,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = 20 * DAY,
        client: bool = False,
        chain: bool = True,
    ) -> Files:
        """A certificate for DNS names (``URI:`` before a URI); with the intermediates in its file if ``chain``."""
        key: Key = rsa.generate_private_key(65537, rsa_bits) if rsa_bits else ec.generate_private_key(ec.SECP256R1())
        use = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = (
            _builder(_subject(common), self.subject, key, begins, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_name(name) for name in names]), critical=False
            )
        made = builder.sign(self.key, hashes.SHA256())
        stem = f"{self.name}-{common}-{next(self._numbers)}"
        certificate, key_file = self.folder / f"{stem}.crt", self.folder / f"{stem}.key"
        certificate.write_bytes(_pem(made) + (_pem(self.x509) if chain and self.parent is not None else b""))
        key_file.touch(0o600)
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Files(certificate, key_file, made)

    def revoke(self, *revoked: Files, ends: datetime.timedelta = 7 * DAY) -> bytes:
        """The PEM of a revocation list."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.subject)
            .last_update(now - 8 * DAY)
            .next_update(now + ends)
        )
        for each in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(each.x509.serial_number)
                .revocation_date(now - DAY)
                .build()
            )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _name(text: str) -> x509.GeneralName:
    if text.startswith("URI:"):
        return x509.UniformResourceIdentifier(text.removeprefix("URI:"))
    return x509.DNSName(text)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, begins: datetime.timedelta, ends: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def trusting(authority: Authority, version: str = "1.3", client: Files | None = None) -> ssl.SSLContext:
    """A client that speaks one version of TLS, and shows a certificate if it has one."""
    context = ssl.create_default_context(cafile=authority.file)
    context.minimum_version = context.maximum_version = VERSIONS[version]
    if client is not None:
        context.load_cert_chain(*client.pair)
    return context


def s_client(port: int, version: str, client: Files | None = None, *more: str) -> list[str]:
    """The command of OpenSSL's client: it reads until the server ends, and says which alert came."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", f"-tls{version.replace('.', '_')}", *more]
    return command + (["-cert", str(client.certificate), "-key", str(client.key)] if client is not None else [])


async def refused_by(port: int, version: str, client: Files | None = None, *more: str) -> int:
    """The number of the alert (RFC 8446 6.2) that a client is refused with; 0: it was let in, or saw none."""
    command = s_client(port, version, client, *more)
    running = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert running.stdin is not None
    assert running.stdout is not None
    # Its input stays open: at an end of input it would leave, alert or not. The gateway ends the answer.
    running.stdin.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    said = (await asyncio.wait_for(running.stdout.read(), 20)).decode(errors="replace")
    running.stdin.close()
    await running.wait()
    found = ALERT.search(said)
    return int(found[1]) if found else 0
