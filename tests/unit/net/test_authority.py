"""The private CA of `ascproxy init`: strict clients accept what it makes, and it touches nothing that was there."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from ascproxy.model.node import ListenerTls
from ascproxy.net import authority, tls
from ascproxy.net.authority import AuthorityError, Files

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
NAMES = ("localhost", "127.0.0.1", "::1", "rack-a-1.example")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return authority.create(tmp_path, NAMES, now=NOW)


def _read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_a_strict_verifier_accepts_the_certificate_for_every_name(files: Files, name: str) -> None:
    subject: x509.DNSName | x509.IPAddress
    try:
        subject = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        subject = x509.DNSName(name)
    verifier = PolicyBuilder().store(Store([_read(files.ca)])).time(NOW).build_server_verifier(subject)
    assert len(verifier.verify(_read(files.certificate), [])) == 2


@pytest.mark.parametrize(("name", "accepted"), [*((name, True) for name in NAMES), ("other.example", False)])
def test_a_handshake_with_it(files: Files, name: str, accepted: bool) -> None:
    trusting = ssl.create_default_context(cafile=files.ca)
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(files.certificate, files.key)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(down, up, server_hostname=name)
    server = serving.wrap_bio(up, down, server_side=True)

    def step(side: ssl.SSLObject) -> bool:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    if accepted:
        assert [step(client), step(server), step(client), step(server)] == [False, False, True, True]
    else:
        step(client)
        step(server)
        with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch"):
            step(client)


def test_our_own_listener_takes_it(files: Files) -> None:
    context = tls.listener_context(ListenerTls(certificate=str(files.certificate), key=str(files.key)))
    assert context.certificate_info is not None
    assert context.certificate_info["names"] == NAMES


def test_lives_keys_and_limits(files: Files) -> None:
    ca, server = _read(files.ca), _read(files.certificate)
    life = server.not_valid_after_utc - server.not_valid_before_utc
    assert datetime.timedelta(days=820) < life < datetime.timedelta(days=825)
    assert ca.not_valid_after_utc == NOW + datetime.timedelta(days=3650)
    assert server.not_valid_before_utc <= NOW - datetime.timedelta(hours=1)
    for certificate in (ca, server):
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP256R1)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)


def test_two_authorities_have_two_names(tmp_path: Path, files: Files) -> None:
    other = tmp_path / "other"
    other.mkdir()
    assert _read(authority.create(other, NAMES, now=NOW).ca).subject != _read(files.ca).subject


def test_keys_belong_to_their_owner_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        authority.create(tmp_path, NAMES, now=NOW)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"ca.key": 0o600, "ca.crt": 0o644, "server.key": 0o600, "server.crt": 0o644}


@pytest.mark.parametrize("there", ["ca.key", "ca.crt", "server.key", "server.crt"])
def test_a_file_that_is_there_is_not_touched(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(AuthorityError, match=rf"cannot write .*{there}: File exists"):
        authority.create(tmp_path, NAMES, now=NOW)
    assert (tmp_path / there).read_text() == "mine"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match="No such file or directory"):
        authority.create(tmp_path / "absent", NAMES, now=NOW)


@pytest.mark.parametrize("name", ["", ".", "two words", "a" * 64 + ".example", "under/way", "-a", "*"])
def test_names_that_no_certificate_can_carry(tmp_path: Path, name: str) -> None:
    with pytest.raises(AuthorityError, match="neither an address nor a host name"):
        authority.create(tmp_path, [name], now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_names_are_written_as_clients_compare_them(tmp_path: Path) -> None:
    made = authority.create(tmp_path, ["bücher.example.", "localhost", "localhost", "*.rack.example", "0::1"], now=NOW)
    names = _read(made.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["xn--bcher-kva.example", "localhost", "*.rack.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("::1")]


def test_no_name_at_all(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match="at least one host name"):
        authority.create(tmp_path, [], now=NOW)
