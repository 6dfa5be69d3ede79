"""A private CA and a server certificate for ``ascproxy init``, so that a first run has real TLS.

Loads ``cryptography``: for the command line and control only, never for workers. What it does not do: renew, or serve
as anyone's company CA.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ascproxy.errors import AscproxyError

CA_LIFE = datetime.timedelta(days=3650)
SERVER_LIFE = datetime.timedelta(days=824)  # Apple's clients refuse more than 825 days (HT210176), private CAs included
CLOCK_SKEW = datetime.timedelta(hours=1)  # a client whose clock is behind

HOST_NAME = re.compile(r"(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,250}[A-Za-z0-9_])?")


class AuthorityError(AscproxyError):
    """The CA or the certificate cannot be made; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Files:
    """What was made: PEM files, the keys readable by their owner alone."""

    ca: Path
    certificate: Path
    key: Path


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        encoded = name.removesuffix(".").encode("idna").decode("ascii")
    except UnicodeError:
        encoded = ""
    if not HOST_NAME.fullmatch(encoded):
        raise AuthorityError(f"{name!r} is neither an address nor a host name that a certificate can carry")
    return x509.DNSName(encoded)


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


def _write(path: Path, content: bytes, mode: int) -> None:
    """Create a file that was not there, with its mode from its first moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make_ca(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    # The key's fingerprint keeps the CAs of two directories apart in a trust store.
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ascproxy"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"ascproxy private CA {identifier.digest.hex()[:8]}"),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def _make_server(
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    now: datetime.datetime,
) -> x509.Certificate:
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ascproxy gateway")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now - CLOCK_SKEW + SERVER_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def create(directory: Path, names: Sequence[str], *, now: datetime.datetime) -> Files:
    """Make ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key`` (P-256) in a directory that is there.

    ``names``: host names and addresses the server is reached by; repeated ones count once. ``now``: with a time zone.
    The CA lives for 10 years and signs nothing but servers' own certificates; the server's lives for less than 825
    days. Key files have mode 0600. Raises :class:`AuthorityError` when there is no name, a name cannot stand in a
    certificate, a file is already there, or the directory cannot be written.
    """
    alternatives = list(dict.fromkeys(_alternative_name(name) for name in names))
    if not alternatives:
        raise AuthorityError("a server certificate needs at least one host name or address")
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _make_ca(ca_key, now)
    server = _make_server(key, ca, ca_key, alternatives, now)
    private, public = stat.S_IRUSR | stat.S_IWUSR, 0o644
    try:
        _write(directory / "ca.key", _key_pem(ca_key), private)
        _write(directory / "ca.crt", _certificate_pem(ca), public)
        _write(directory / "server.key", _key_pem(key), private)
        _write(directory / "server.crt", _certificate_pem(server), public)
    except OSError as error:
        raise AuthorityError(
            f"cannot write {error.filename}: {error.strerror}; nothing that was there is touched"
        ) from error
    return Files(ca=directory / "ca.crt", certificate=directory / "server.crt", key=directory / "server.key")
