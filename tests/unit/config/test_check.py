"""What shape cannot say: every sentence of ``check``, with the place that it is about."""

# ruff: noqa: E501 - a case is a line

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ascproxy.config import check as checks
from ascproxy.config.finding import Severity
from ascproxy.model.node import ListenerTls
from ascproxy.net.tls import CertificateError, listener_context
from tests.kit.config import NODE, findings, places, write

PLAIN = "plaintext is for loopback addresses and Unix sockets only"
SHAPE = "write 127.0.0.1:8080, [::1]:8080 or unix:PATH"


def certificate(folder: Path, name: str, *, names: bool = True, begins: int = -2, ends: int = 2) -> None:
    """``name.crt`` and ``name.key``, signed by its own key, right for servers but for what is asked."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway.example")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + begins * day)
        .not_valid_after(now + ends * day)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("gateway.example")]), critical=False)
    (folder / f"{name}.crt").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(pem)
    (folder / f"{name}.key").chmod(0o600)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the cases refer to: ``good``, ``nameless`` and ``expired`` certificates, a CA and its client, secrets."""
    certificate(tmp_path, "good")
    certificate(tmp_path, "nameless", names=False)
    certificate(tmp_path, "expired", ends=-1)
    certificate(tmp_path, "soon", begins=-30, ends=9)
    certificate(tmp_path, "group")
    (tmp_path / "group.key").chmod(0o660)
    certificate(tmp_path, "open")
    (tmp_path / "open.key").chmod(0o644)
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, content, mode in (
        ("secret", "s3cret\n", 0o600),
        ("open-secret", "s3cret\n", 0o604),
        ("empty", "", 0o600),
        ("junk", "junk", 0o600),
        ("two-lines", "a\nb\n", 0o600),
    ):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def listener(text: str) -> str:
    return f"node: n\nlisteners:\n  - {text}\n"


def tls(text: str) -> str:
    return listener(f"{{address: '0.0.0.0:8443', tls: {text}}}")


NODE_CASES: dict[str, tuple[str, str, str]] = {
    # listeners and addresses
    "plaintext": (listener("{address: »'0.0.0.0:8080'}"), "listeners[0].address", f"0.0.0.0:8080: {PLAIN}; add tls: {{certificate: ..., key: ...}}"),
    "plaintext v6": (listener("{address: »'[::]:8080'}"), "listeners[0].address", f"[::]:8080: {PLAIN}; add tls: {{certificate: ..., key: ...}}"),
    "plaintext in the network": (listener("{address: »'10.1.2.3:80'}"), "listeners[0].address", f"10.1.2.3:80: {PLAIN}; add tls: {{certificate: ..., key: ...}}"),
    "mapped": (listener("{address: »'[::ffff:127.0.0.1]:80'}"), "listeners[0].address", f"[::ffff:127.0.0.1]:80: {PLAIN}; add tls: {{certificate: ..., key: ...}}"),
    "no port": (listener("{address: »127.0.0.1}"), "listeners[0].address", f"'127.0.0.1' is no address: {SHAPE}"),
    "port 0": (listener("{address: »'127.0.0.1:0'}"), "listeners[0].address", f"'127.0.0.1:0' is no address: {SHAPE}"),
    "port out of range": (listener("{address: »'127.0.0.1:65536'}"), "listeners[0].address", f"'127.0.0.1:65536' is no address: {SHAPE}"),
    "v6 without brackets": (listener("{address: »'::1:8080'}"), "listeners[0].address", f"'::1:8080' is no address: {SHAPE}"),
    "host name": (listener("{address: »'gateway.example:80'}"), "listeners[0].address", "'gateway.example' is no IP address: a listener binds to one, 0.0.0.0 for all"),
    "half an address": (listener("{address: »'127.1:80'}"), "listeners[0].address", "'127.1' is no IP address: a listener binds to one, 0.0.0.0 for all"),
    "Unix socket without a name": (listener("{address: »'unix:'}"), "listeners[0].address", "{folder}: a Unix socket's path has at most 107 bytes, and a name"),
    "Unix socket too long": (listener("{address: »'unix:/" + "x" * 107 + "'}"), "listeners[0].address", "/" + "x" * 107 + ": a Unix socket's path has at most 107 bytes, and a name"),
    "Unix socket twice": (listener("{address: 'unix:a'}\n  - {address: »'unix:./b/../a', name: b}"), "listeners[1].address", "unix:./b/../a is taken by listeners[0]"),
    "address twice": (listener("{address: '127.0.0.1:80'}\n  - {address: »'localhost:80'}"), "listeners[1].address", "localhost:80 is taken by listeners[0]"),
    "on all and on one": (listener("{address: '0.0.0.0:80', tls: {certificate: good.crt, key: good.key}}\n  - {address: »'127.0.0.1:80'}"), "listeners[1].address", "127.0.0.1:80 is taken by listeners[0]"),
    "name twice": (listener("{address: '127.0.0.1:80', name: a}\n  - {address: '127.0.0.1:81', name: »a}"), "listeners[1].name", "'a' is the name of listeners[0] too; give each its own"),
    "PROXY headers of nobody": (listener("{address: '127.0.0.1:80', proxy_protocol: »true}"), "listeners[0].proxy_protocol", "nobody could connect: name the load balancer's address in limits.trusted_peers"),
    # metrics
    "metrics in the network": (NODE + "metrics: {address: »'0.0.0.0:9464'}\n", "metrics.address", f"0.0.0.0:9464: {PLAIN}; scrape it from this machine or through a tunnel"),
    "metrics no address": (NODE + "metrics: {address: »here}\n", "metrics.address", f"'here' is no address: {SHAPE}"),
    "metrics on a listener": (NODE + "metrics: {address: »'127.0.0.1:8080'}\n", "metrics.address", "127.0.0.1:8080 is taken by listeners[0]"),
    # certificates
    "no certificate": (tls("{certificate: »absent.crt, key: good.key}"), "listeners[0].tls.certificate", "cannot read {folder}/absent.crt: no such file or directory"),
    "no key": (tls("{certificate: good.crt, key: »absent.key}"), "listeners[0].tls.key", "cannot read {folder}/absent.key: no such file or directory"),
    "certificate is a pipe": (tls("{certificate: »pipe, key: good.key}"), "listeners[0].tls.certificate", "cannot read {folder}/pipe: it is no regular file"),
    "no client CA": (tls("{certificate: good.crt, key: good.key, client_ca: »absent}"), "listeners[0].tls.client_ca", "cannot read {folder}/absent: no such file or directory"),
    "not PEM": (tls("{certificate: »junk, key: good.key}"), "listeners[0].tls.certificate", "certificate {folder}/junk holds no certificate; it must be PEM"),
    "another key": (tls("»{certificate: good.crt, key: nameless.key}"), "listeners[0].tls", "key {folder}/nameless.key does not belong to certificate {folder}/good.crt"),
    "expired": (tls("{certificate: »expired.crt, key: expired.key}"), "listeners[0].tls.certificate", "certificate {folder}/expired.crt expired on "),
    "nameless": (tls("{certificate: »nameless.crt, key: nameless.key}"), "listeners[0].tls.certificate", "certificate {folder}/nameless.crt names no host: issue it with a subjectAltName (DNS names or IP addresses)"),
    "open key": (tls("{certificate: open.crt, key: »open.key}"), "listeners[0].tls.key", "{folder}/open.key can be read by every user of this machine: chmod 600"),
    "key that a group writes": (tls("{certificate: group.crt, key: »group.key}"), "listeners[0].tls.key", "{folder}/group.key can be changed by other users than its owner: chmod 600"),
    "second certificate": (tls("{certificate: good.crt, key: good.key, certificates: [{certificate: »expired.crt, key: expired.key}]}"), "listeners[0].tls.certificates[0].certificate", "certificate {folder}/expired.crt expired on "),
    "second key": (tls("{certificate: good.crt, key: good.key, certificates: [{certificate: good.crt, key: »absent}]}"), "listeners[0].tls.certificates[0].key", "cannot read {folder}/absent: no such file or directory"),
    "no CRL": (tls("{certificate: good.crt, key: good.key, client_ca: ca.pem, client_crl: »junk}"), "listeners[0].tls.client_crl", "CRL file {folder}/junk holds no revocation list; it must be PEM"),
    "CRL without CA": (tls("{certificate: good.crt, key: good.key, client_crl: »junk}"), "listeners[0].tls.client_crl", "needs client_ca: the CAs whose clients it is about"),
    "required without CA": (tls("{certificate: good.crt, key: good.key, client_auth: »required}"), "listeners[0].tls.client_auth", "needs client_ca: the CAs whose clients it is about"),
    "depth without CA": (tls("{certificate: good.crt, key: good.key, client_depth: »1}"), "listeners[0].tls.client_depth", "needs client_ca: the CAs whose clients it is about"),
    "tickets": (tls("{certificate: good.crt, key: good.key, ticket_keys: »secret}"), "listeners[0].tls.ticket_keys", "ticket key file {folder}/secret: line 1 is no key: write 64 hexadecimal digits"),
    "open tickets": (tls("{certificate: good.crt, key: good.key, ticket_keys: »open-secret}"), "listeners[0].tls.ticket_keys", "ticket key file {folder}/open-secret can be read by others or written by its group (mode 0604)"),
    "soon": (tls("»{certificate: soon.crt, key: soon.key}"), "listeners[0].tls", "certificate {folder}/soon.crt expires on "),
    # limits
    "an address over all": (NODE + "limits: {max_connections_per_ip: »11, max_connections: 10}\n", "limits.max_connections_per_ip", "is more than max_connections, which is 10 here; raise that too"),
    "unauthenticated over authenticated": (NODE + "limits: {max_unauthenticated_per_ip: »2049}\n", "limits.max_unauthenticated_per_ip", "is more than max_connections_per_ip, which is 2048 here; raise that too"),
    "one chunk over all": (listener("{address: 'unix:a', limits: {max_chunk_extension: »9KiB}}") + "limits: {max_chunk_extensions: 8KiB}\n", "listeners[0].limits.max_chunk_extension", "is more than max_chunk_extensions, which is 8KiB here; raise that too"),
    "line over head": (NODE + "limits: {max_request_line: »16KiB, max_head: 8KiB}\n", "limits.max_request_line", "is more than max_head, which is 8KiB here; raise that too"),
    "field over the usual head": (NODE + "limits: {max_field: »32769B}\n", "limits.max_field", "is too large; the most is 32KiB"),
    "field over the node's head": (listener("{address: 'unix:a', limits: {max_field: »10KiB}}") + "limits: {max_head: 8KiB}\n", "listeners[0].limits.max_field", "is more than max_head, which is 8KiB here; raise that too"),
    # folders
    "state is a file": (NODE + "state_dir: »file\n", "state_dir", "{folder}/file is no folder that this user can write to"),
    "state below a file": (NODE + "state_dir: »file/state\n", "state_dir", "{folder}/file is no folder that this user can write to"),
    "run below a file": (NODE + "run_dir: »file/run\n", "run_dir", "{folder}/file is no folder that this user can write to"),
    "run too long": (NODE + "run_dir: »/dev/shm/" + "x" * 90 + "\n", "run_dir", "/dev/shm/" + "x" * 90 + " is too long for the sockets in it: at most 94 bytes"),
    "run on a disk": (NODE + "run_dir: »run\n", "run_dir", "{folder}/run is not on a tmpfs: counters and sockets would go through a disk; use /dev/shm or /run"),
    "no folder for the log": (NODE + "access_log: »logs/access\n", "access_log", "there is no folder {folder}/logs for it; make it, or write stdout or none"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "path", "sentence"), NODE_CASES.values(), ids=NODE_CASES.keys())
def test_the_node_file(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, path: str, sentence: str) -> None:
    monkeypatch.setattr(checks, "_on_tmpfs", lambda path: path.is_relative_to("/dev/shm"))
    marked = write(folder, text)
    found = findings(folder)
    assert [f.path for f in found] == [path]
    assert found[0].reason.startswith(sentence.replace("{folder}", str(folder)))
    assert places(found) == marked
    warning = "chmod" in sentence or "tmpfs" in sentence or "expires on" in sentence
    assert found[0].severity is (Severity.WARNING if warning else Severity.ERROR)


def test_what_nobody_may_write_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = NODE + "state_dir: »state\nrun_dir: »/dev/shm/x\naccess_log: »access\n"
    marked = write(folder, text)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    found = findings(folder)
    assert places(found) == marked
    assert [f.reason for f in found] == [
        f"{folder} is no folder that this user can write to",
        "/dev/shm is no folder that this user can write to",
        f"{folder}/access cannot be written to by this user",
    ]


def test_files_that_this_user_may_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = write(
        folder,
        tls("{certificate: good.crt, key: »good.key}") + "resources: resources.yaml\n",
        "credentials: {c: {from: »'file:secret'}}\n",
    )
    real = os.open

    def refusing(path: str | Path, *more: int, **named: int) -> int:
        if Path(path).name in ("good.key", "secret"):
            raise PermissionError(13, "Permission denied")
        return real(path, *more, **named)

    monkeypatch.setattr(os, "open", refusing)
    found = findings(folder)
    assert places(found) == marked
    assert [f.reason for f in found] == [
        f"cannot read {folder}/{name}: permission denied" for name in ("good.key", "secret")
    ]


def test_what_check_says_of_a_certificate_is_what_serve_says(folder: Path) -> None:
    for name in ("nameless", "expired"):
        write(folder, tls(f"{{certificate: {name}.crt, key: {name}.key}}"))
        with pytest.raises(CertificateError) as refused:
            listener_context(ListenerTls(certificate=f"{folder}/{name}.crt", key=f"{folder}/{name}.key"))
        assert [f.reason for f in findings(folder)] == [str(refused.value)]


PROVIDER = "providers:\n  p: {type: vllm, endpoints: ['http://127.0.0.1:8000']}\n"


def endpoint(url: str) -> str:
    return f"providers:\n  p: {{type: vllm, endpoints: [»{url!r}]}}\n"


def upstream(text: str, scheme: str = "https") -> str:
    return f"providers:\n  p: {{type: vllm, endpoints: ['{scheme}://127.0.0.1:8000'], tls: {text}}}\n"


def source(text: str) -> str:
    return f"credentials:\n  c: {{from: »{text!r}}}\n"


def base(url: str) -> str:
    return f"{url!r} is no base URL: write http://host:port or https://host"


AT_ENDPOINT = "providers.p.endpoints[0]"
OPERATIONS = (
    "chat_completions, completions, embeddings, rerank, responses, messages, count_tokens, tokenize, detokenize, "
    "generate, generate_stream"
)
OPEN = "sends prompts and credentials unencrypted; use https, or an address of your own network"
RESOURCE_CASES: dict[str, tuple[str, str, str]] = {
    # credentials
    "no scheme": (source("secret"), "credentials.c.from", "is no source of a credential: write file:PATH, systemd:NAME or env:VARIABLE"),
    "another scheme": (source("vault:secret"), "credentials.c.from", "is no source of a credential: write file:PATH, systemd:NAME or env:VARIABLE"),
    "nothing": (source("file:"), "credentials.c.from", "is no source of a credential: write file:PATH, systemd:NAME or env:VARIABLE"),
    "absent": (source("file:absent"), "credentials.c.from", "cannot read {folder}/absent: no such file or directory"),
    "folder": (source("file:."), "credentials.c.from", "cannot read {folder}: it is a folder"),
    "pipe": (source("file:pipe"), "credentials.c.from", "cannot read {folder}/pipe: it is no regular file"),
    "empty": (source("file:empty"), "credentials.c.from", "secret {folder}/empty is empty; write the value into it"),
    "two lines": (source("file:two-lines"), "credentials.c.from", "secret {folder}/two-lines: byte 2 cannot stand in a header (only visible ASCII can); write the bare value, without spaces and on one line"),
    "open": (source("file:open-secret"), "credentials.c.from", "{folder}/open-secret can be read by every user of this machine: chmod 600"),
    "systemd": (source("systemd:key"), "credentials.c.from", "systemd gave no credentials: add LoadCredential=key:PATH to the unit"),
    "systemd path": (source("systemd:a/b"), "credentials.c.from", "'a/b' is no name of a systemd credential"),
    "systemd parent": (source("systemd:.."), "credentials.c.from", "'..' is no name of a systemd credential"),
    "unset": (source("env:KEY"), "credentials.c.from", "the environment variable KEY is not set"),
    # providers
    "no credential": ("providers:\n  p: {type: vllm, endpoints: ['http://127.0.0.1'], credential: »c}\n", "providers.p.credential", "there is no credential c; credentials: none yet"),
    "no scheme of a URL": (endpoint("host:8000"), AT_ENDPOINT, base("host:8000")),
    "ftp": (endpoint("ftp://host"), AT_ENDPOINT, base("ftp://host")),
    "no host": (endpoint("http:///x"), AT_ENDPOINT, base("http:///x")),
    "endpoint's port 0": (endpoint("http://h:0"), AT_ENDPOINT, base("http://h:0")),
    "endpoint's port": (endpoint("http://h:65536"), AT_ENDPOINT, "'http://h:65536' is no URL: Port out of range 0-65535"),
    "brackets": (endpoint("http://[::1"), AT_ENDPOINT, "'http://[::1' is no URL: Invalid IPv6 URL"),
    "user": (endpoint("http://u:pw@h"), AT_ENDPOINT, "a URL must not carry a credential: name one with credential:"),
    "query": (endpoint("http://h?x=1"), AT_ENDPOINT, "'http://h?x=1' has a query or fragment, which is never sent; remove it"),
    "fragment": (endpoint("http://h#x"), AT_ENDPOINT, "'http://h#x' has a query or fragment, which is never sent; remove it"),
    "odd host": (endpoint("http://h$h"), AT_ENDPOINT, "'http://h$h' is no base URL: host and path are plain ASCII"),
    "odd path": (endpoint("http://h/ü"), AT_ENDPOINT, "'http://h/ü' is no base URL: host and path are plain ASCII"),
    "/v1": (endpoint("http://h/v1/"), AT_ENDPOINT, "'http://h/v1/' ends in /v1, which the gateway adds itself; remove it"),
    "endpoint twice": ("providers:\n  p: {type: vllm, endpoints: ['http://h', »'http://h/']}\n", "providers.p.endpoints[1]", "http://h/ is there twice; remove one"),
    "open endpoint": (endpoint("http://api.example.com"), AT_ENDPOINT, f"http://api.example.com {OPEN}"),
    "open address": (endpoint("http://9.9.9.9:80"), AT_ENDPOINT, f"http://9.9.9.9:80 {OPEN}"),
    # TLS to providers
    "no effect": (upstream("»{ca: ca.pem}", "http"), "providers.p.tls", "has no effect: no endpoint is https"),
    "half": (upstream("»{certificate: good.crt}"), "providers.p.tls", "certificate and key come together; one of them is missing"),
    "absent CA": (upstream("{ca: »absent}"), "providers.p.tls.ca", "cannot read {folder}/absent: no such file or directory"),
    "CA that is none": (upstream("»{ca: junk}"), "providers.p.tls", "CA file {folder}/junk holds no certificate; it must be PEM, with lines BEGIN CERTIFICATE and END CERTIFICATE"),
    "open client key": (upstream("{certificate: client.crt, key: »client.key}"), "providers.p.tls.key", "{folder}/client.key can be read by every user of this machine: chmod 600"),
    # routes
    "no operation": (PROVIDER + "routes:\n  r: {models: [m], targets: [{provider: p}], operations: [»chat]}\n", "routes.r.operations[0]", f"'chat' is no operation; operations: {OPERATIONS}"),
    "models is no operation of a route": (PROVIDER + "routes:\n  r: {models: [m], targets: [{provider: p}], operations: [»models]}\n", "routes.r.operations[0]", f"'models' is no operation; operations: {OPERATIONS}"),
    "unserved operation": (PROVIDER + "routes:\n  r: {models: [m], targets: [{provider: p}], operations: [embeddings, »generate]}\n", "routes.r.operations[1]", "no target of this route serves generate, which is answered by tgi: remove it or add a target"),
    "no tenant": (PROVIDER + "routes:\n  r: {models: [m], targets: [{provider: p}], tenants: [»t]}\n", "routes.r.tenants[0]", "there is no tenant t; add it below tenants"),
    "no provider": (PROVIDER + "routes:\n  r: {models: [m], targets: [{provider: p}, {provider: »q}]}\n", "routes.r.targets[1].provider", "there is no provider q; providers: p"),
    "no provider at all": ("routes:\n  r: {models: [m], targets: [{provider: »q}]}\n", "routes.r.targets[0].provider", "there is no provider q; providers: none yet"),
    "model twice": (PROVIDER + "routes:\n  r: {models: [m, »m], targets: [{provider: p}]}\n", "routes.r.models[1]", "'m' is there twice; one route must answer"),
    "model in two routes": (PROVIDER + "routes:\n  r: {models: [m], targets: [{provider: p}]}\n  s: {models: [»m], targets: [{provider: p}]}\n", "routes.s.models[0]", "'m' belongs to route r too; one route must answer"),
    "model in two routes of a tenant": ("tenants: {t: {}, u: {}}\n" + PROVIDER + "routes:\n  r: {models: [m], targets: [{provider: p}], tenants: [t]}\n  s: {models: [»m], targets: [{provider: p}], tenants: [u, t]}\n", "routes.s.models[0]", "'m' belongs to route r too; one route must answer"),
}  # fmt: skip
WARNINGS = {"open", "open endpoint", "open address", "no effect", "open client key", "unserved operation"}


@pytest.mark.parametrize("case", RESOURCE_CASES)
def test_the_resources_file(folder: Path, case: str) -> None:
    text, path, sentence = RESOURCE_CASES[case]
    ca = trustme.CA()
    client = ca.issue_cert("client.example")
    client.private_key_pem.write_to_path(folder / "client.key")
    client.cert_chain_pems[0].write_to_path(folder / "client.crt")
    (folder / "client.key").chmod(0o604)
    marked = write(folder, NODE + "resources: resources.yaml\n", text)
    found = findings(folder)
    assert [f.path for f in found] == [path]
    assert found[0].reason == sentence.replace("{folder}", str(folder))
    assert places(found) == marked
    assert found[0].severity is (Severity.WARNING if case in WARNINGS else Severity.ERROR)


@pytest.mark.parametrize(
    ("text", "environ", "starting", "expected"),
    [
        ("file:secret", {}, True, []),
        ("systemd:secret", {"CREDENTIALS_DIRECTORY": "{folder}"}, True, []),
        ("systemd:absent", {"CREDENTIALS_DIRECTORY": "{folder}"}, True, [("error", "cannot read {folder}/absent: no such file or directory")]),
        ("systemd:secret", {}, False, [("warning", "only the service itself can see it: its unit needs LoadCredential=secret:PATH")]),
        ("env:KEY", {"KEY": "x"}, True, [("warning", "env: is for trying out: every process of this user can read it; use file: or systemd:")]),
        ("env:KEY", {"KEY": ""}, True, [("error", "the environment variable KEY is not set")]),
    ],
)  # fmt: skip
def test_credentials_and_the_environment(
    folder: Path, text: str, environ: dict[str, str], starting: bool, expected: list[tuple[str, str]]
) -> None:
    write(folder, NODE + "resources: resources.yaml\n", f"credentials: {{c: {{from: '{text}'}}}}\n")
    found = findings(folder, {k: v.replace("{folder}", str(folder)) for k, v in environ.items()}, starting=starting)
    assert [(f.severity, f.reason) for f in found] == [(s, r.replace("{folder}", str(folder))) for s, r in expected]


@pytest.mark.parametrize("text", ["file:absent", "file:empty", "systemd:key", "env:UNSET"])
def test_what_only_workers_can_see_is_taken_on_trust_by_a_control_with_a_user_of_its_own(
    folder: Path, text: str
) -> None:
    node = listener("{address: '0.0.0.0:8443', tls: {certificate: good.crt, key: absent.key}}")
    client = "{type: vllm, endpoints: ['https://h'], credential: c, tls: {certificate: good.crt, key: absent.key}}"
    resources = f"credentials: {{c: {{from: '{text}'}}}}\nproviders: {{p: {client}}}\n"
    write(
        folder,
        f"{node}access_log: /nowhere\nresources: resources.yaml\n".replace("/nowhere", str(folder / "ca.pem")),
        resources,
    )
    assert findings(folder, secrets=False) == []
    paths = {finding.path for finding in findings(folder) if finding.severity is Severity.ERROR}
    assert paths == {"listeners[0].tls.key", "credentials.c.from", "providers.p.tls.key"}


@pytest.mark.parametrize("text", ["", "vault:key", "systemd:a/b"])
def test_what_everybody_can_see_is_checked_all_the_same(folder: Path, text: str) -> None:
    node = listener("{address: '0.0.0.0:8443', tls: {certificate: absent.crt, key: absent.key}}")
    write(folder, f"{node}resources: resources.yaml\n", f"credentials: {{c: {{from: '{text}'}}}}\n")
    paths = {finding.path for finding in findings(folder, secrets=False)}
    assert paths == {"listeners[0].tls.certificate", "credentials.c.from"}


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "[::1]:8000", "10.0.0.1", "192.168.1.1", "169.254.1.1", "vllm", "gpu.internal", "a.lan"]
)
def test_http_within_the_own_network_is_no_finding(folder: Path, host: str) -> None:
    write(folder, NODE + "resources: resources.yaml\n", endpoint(f"http://{host}"))
    assert findings(folder) == []


@pytest.mark.parametrize(
    "routes",
    [
        "a: {models: [m], targets: [{provider: p}], tenants: [t]}\n  b: {models: [m], targets: [{provider: p}]}",
        "a: {models: [m], targets: [{provider: p}], tenants: [t]}\n  b: {models: [m], targets: [{provider: p}], tenants: [u]}",
        "a: {models: [m], targets: [{provider: p}], operations: [messages]}\n  b: {models: [m], targets: [{provider: p}], operations: [rerank]}",
        "a: {models: [m], targets: [{provider: p}]}\n  b: {models: ['m*'], targets: [{provider: p}]}",
    ],
)  # fmt: skip
def test_routes_that_may_share_a_name(folder: Path, routes: str) -> None:
    resources = "tenants: {t: {}, u: {}}\n" + PROVIDER + f"routes:\n  {routes}\n"
    write(folder, NODE + "resources: resources.yaml\n", resources)
    assert findings(folder) == []


@pytest.mark.parametrize(
    "listeners",
    [
        "[{address: '127.0.0.1:80'}, {address: '127.0.0.2:80'}]",
        "[{address: 'localhost:80'}, {address: '[::1]:80'}]",
        "[{address: '0.0.0.0:80', tls: &t {certificate: good.crt, key: good.key}}, {address: '[::]:80', tls: *t}]",
        "[{address: 'unix:a'}, {address: 'unix:b'}]",
    ],
)
def test_listeners_that_do_not_meet(folder: Path, listeners: str) -> None:
    write(folder, f"node: n\nlisteners: {listeners}\n")
    assert findings(folder) == []


def test_tmpfs_is_told_from_the_mount_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "/dev/sda1 / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n/dev/sda2 /dev/shm/deep ext4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **more: table)
    on: Callable[[Path], bool] = checks._on_tmpfs
    assert [on(Path(p)) for p in ("/dev/shm/a", "/dev/shm", "/dev/shmx", "/dev/shm/deep/a", "/etc")] == [
        True, True, False, False, False,
    ]  # fmt: skip
