"""From two files to a snapshot: paths, numbers, ids, defaults, and a revision that changes when the meaning does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import trustme

from ascproxy.config.compile import compile_files
from ascproxy.config.finding import InvalidConfigError, Severity
from ascproxy.config.running import note, run_dir_of
from ascproxy.errors import AscproxyError, UsageError
from ascproxy.model.node import CertificatePair, ClientAuth, Limits, Listener, ListenerTls, Node
from ascproxy.model.provider import Credential, Endpoint, Provider, ProviderType, UpstreamTimeouts, UpstreamTls
from ascproxy.model.route import Route, Target
from ascproxy.model.snapshot import Snapshot, decode, encode
from ascproxy.model.tenant import Tenant
from tests.kit.certificates import Authority
from tests.kit.config import NODE, write

SMALLEST = "providers: {p: {type: vllm, endpoints: ['http://127.0.0.1']}}\n"


def compiled(folder: Path, node: str, resources: str | None = None, environ: dict[str, str] | None = None) -> Snapshot:
    write(folder, node + ("resources: resources.yaml\n" if resources is not None else ""), resources)
    return compile_files(folder, environ or {}).snapshot


def test_the_smallest_node_file_and_its_defaults(tmp_path: Path) -> None:
    snapshot = compiled(tmp_path, NODE)
    assert snapshot.node == Node(
        name="n",
        state_dir=f"{tmp_path}/state",
        run_dir=snapshot.node.run_dir,
        workers=len(os.sched_getaffinity(0)),
        listeners=(Listener("127.0.0.1:8080", "127.0.0.1:8080"),),
        metrics_address="127.0.0.1:9464",
    )
    assert re.fullmatch(r"/dev/shm/ascproxy-n-[0-9a-f]{8}", snapshot.node.run_dir)
    assert (snapshot.tenants, snapshot.providers, snapshot.routes) == ((), (), ())


def test_a_whole_configuration(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)
    snapshot = compiled(
        tmp_path,
        """\
node: rack-a-1
state_dir: ../elsewhere/./state
run_dir: /dev/shm/somewhere
workers: 3
listeners:
  - {address: "localhost:8080", name: apps, limits: {header_timeout: 5s, max_body: 1MiB}}
  - {address: "unix:sock", limits: {}, proxy_protocol: true}
  - {address: "[0::1]:8081"}
metrics: {address: "unix:/run/metrics"}
limits: {header_timeout: 20s, max_fields: 50, drain_stream: 1m}
access_log: none
""",
        """\
tenants: {acme: {}, beta: {}}
credentials: {c: {from: "file:key"}}
providers:
  a:
    type: vllm
    endpoints: ["http://127.0.0.1:8000", "http://[::1]:8001/base/"]
    credential: c
    region: eu-1
  b:
    {type: openai, endpoints: ["https://h.example"], timeouts: {connect: 1s, between_tokens: 2m},
     request_headers: [x-a-*]}
  c: {type: vllm, endpoints: ["http://127.0.0.1:8002"], pool_idle: 9s}
routes:
  r:
    models: ["m-*", "Modell für alle"]
    targets: [{provider: a, model: org/M}, {provider: b}]
    operations: [messages]
    tenants: [acme]
    limits: {max_body: 2MiB, first_byte: 1s, between_tokens: 2s, total: 3s}
    retry_ambiguous: true
  s: {models: ["*"], targets: [{provider: b}]}
""",
    )
    limits = Limits(header_timeout_ms=20_000, max_fields=50, drain_stream_ms=60_000)
    own = Limits(header_timeout_ms=5_000, max_fields=50, drain_stream_ms=60_000, max_body=1 << 20)
    assert snapshot.node == Node(
        name="rack-a-1",
        state_dir=f"{tmp_path.parent}/elsewhere/state",
        run_dir="/dev/shm/somewhere",
        workers=3,
        listeners=(
            Listener("apps", "127.0.0.1:8080", None, own),
            Listener("unix:sock", f"unix:{tmp_path}/sock", None, limits, proxy_protocol=True),
            Listener("[0::1]:8081", "[::1]:8081", None, limits),
        ),
        metrics_address="unix:/run/metrics",
        limits=limits,
        access_log="none",
    )
    assert snapshot.tenants == (Tenant("acme"), Tenant("beta"))
    assert snapshot.credentials == (Credential("c", "file", f"{tmp_path}/key"),)
    assert snapshot.providers == (
        Provider(
            "a",
            ProviderType.VLLM,
            (
                Endpoint(0, "http://127.0.0.1:8000", "http", "127.0.0.1", 8000, ""),
                Endpoint(1, "http://[::1]:8001/base/", "http", "::1", 8001, "/base"),
            ),
            credential="c",
            region="eu-1",
            pool_idle_ms=4_000,
        ),
        Provider(
            "b",
            ProviderType.OPENAI,
            (Endpoint(2, "https://h.example", "https", "h.example", 443, ""),),
            timeouts=UpstreamTimeouts(connect_ms=1_000, between_tokens_ms=120_000),
            pool_idle_ms=30_000,
            request_headers=("x-a-*",),
        ),
        Provider(
            "c",
            ProviderType.VLLM,
            (Endpoint(3, "http://127.0.0.1:8002", "http", "127.0.0.1", 8002, ""),),
            pool_idle_ms=9_000,
        ),
    )
    assert snapshot.routes == (
        Route(
            "r",
            ("m-*", "Modell für alle"),
            (Target("a", "org/M"), Target("b")),
            operations=("messages",),
            tenants=("acme",),
            max_body=2 << 20,
            retry_ambiguous=True,
            first_byte_ms=1_000,
            between_tokens_ms=2_000,
            total_ms=3_000,
        ),
        Route("s", ("*",), (Target("b"),)),
    )
    assert decode(encode(snapshot)) == snapshot


def test_a_snapshot_of_the_version_before_is_read(tmp_path: Path) -> None:
    """An upgrade hands it on: what that version did not know has its default."""
    snapshot = compiled(tmp_path, NODE, SMALLEST)
    before = orjson.loads(encode(snapshot))
    for listener in before["snapshot"]["node"]["listeners"]:
        del listener["proxy_protocol"]
    assert decode(orjson.dumps(before)) == snapshot
    del before["snapshot"]["node"]["name"]
    with pytest.raises(AscproxyError, match="not a snapshot"):
        decode(orjson.dumps(before))


def test_a_route_that_says_nothing_about_bodies_has_the_nodes_limit(tmp_path: Path) -> None:
    routes = SMALLEST + "routes: {a: {models: [a], targets: [{provider: p}]},\n"
    routes += "  b: {models: [b], targets: [{provider: p}], limits: {max_body: 1MiB}}}\n"
    snapshot = compiled(tmp_path, NODE + "limits: {max_body: 64MiB}\n", routes)
    assert [route.max_body for route in snapshot.routes] == [64 << 20, 1 << 20]


def test_paths_of_the_resources_file_start_at_its_own_folder(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (tmp_path / "node").mkdir()
    shared.mkdir()
    (shared / "key").write_text("secret")
    (shared / "r.yaml").write_text(
        "credentials: {c: {from: 'file:key'}}\n"
        "providers: {p: {type: vllm, endpoints: ['http://127.0.0.1'], tls: {ca: ca.pem}}}\n"
    )
    trustme.CA().cert_pem.write_to_path(shared / "ca.pem")
    (tmp_path / "node" / "ascproxy.yaml").write_text(NODE + "resources: ../shared/r.yaml\n")
    snapshot = compile_files(tmp_path / "node", {}).snapshot
    assert snapshot.credentials[0].place == f"{shared}/key"
    assert snapshot.providers[0].tls == UpstreamTls(ca=f"{shared}/ca.pem")


def test_the_revision_stays_while_the_meaning_does(tmp_path: Path) -> None:
    first = compiled(tmp_path, NODE, SMALLEST).revision
    assert re.fullmatch(r"[0-9a-f]{12}", first)
    same = [
        (NODE, SMALLEST),
        ("# a comment\n" + NODE, SMALLEST),
        (NODE + "limits: {header_timeout: 10000ms}\n", SMALLEST),
        (NODE + "state_dir: ./state\n", SMALLEST),
        (NODE, "providers:\n  p:\n    endpoints:\n      - 'http://127.0.0.1'\n    type: 'vllm'\n"),
    ]
    assert {compiled(tmp_path, *each).revision for each in same} == {first}
    other = [
        (NODE + "limits: {header_timeout: 11s}\n", SMALLEST),
        (NODE + "state_dir: other\n", SMALLEST),
        (NODE, SMALLEST + "tenants: {t: {}}\n"),
        (NODE, SMALLEST.replace("vllm", "tgi")),
        (NODE, None),
    ]
    assert len({compiled(tmp_path, *each).revision for each in other} | {first}) == len(other) + 1


def test_the_revision_is_the_same_in_every_process_and_spelling(tmp_path: Path) -> None:
    first = compiled(tmp_path, NODE, SMALLEST + "tenants: {c: {}, a: {}, b: {}}\n").revision
    (tmp_path / "link").symlink_to(".")
    program = (
        "import sys; from pathlib import Path; from ascproxy.config.compile import compile_files; "
        "print(compile_files(Path(sys.argv[1]), {}).snapshot.revision)"
    )
    for seed, spelling in (("1", "."), ("2", "link")):
        done = subprocess.run(
            [sys.executable, "-c", program, spelling],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[3])},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == first


def test_warnings_come_with_the_snapshot_and_errors_instead_of_it(tmp_path: Path) -> None:
    write(tmp_path, NODE + "resources: resources.yaml\n", SMALLEST.replace("127.0.0.1", "h.example"))
    (warning,) = compile_files(tmp_path, {}).warnings
    assert warning.severity is Severity.WARNING
    write(tmp_path, NODE + "resources: resources.yaml\nzzz: 1\n", SMALLEST.replace("127.0.0.1", "h.example"))
    with pytest.raises(InvalidConfigError) as refused:
        compile_files(tmp_path, {})
    assert [f.severity for f in refused.value.findings] == [Severity.ERROR, Severity.WARNING]
    assert str(refused.value).splitlines() == [str(f) for f in refused.value.findings]


class TestRunDir:
    def test_it_is_that_of_serve_however_the_folder_is_spelled(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served = compiled(tmp_path, NODE).node.run_dir
        (tmp_path / "link").symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        spellings = (Path(), Path("link"), Path("ascproxy.yaml"), Path("../") / tmp_path.name, tmp_path)
        assert {str(run_dir_of(each, {})) for each in spellings} == {served}

    def test_two_folders_have_two(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        one, other = (compiled(tmp_path / name, NODE).node.run_dir for name in ("a", "b"))
        assert one != other

    def test_what_the_file_says_wins_over_what_systemd_gives(self, tmp_path: Path) -> None:
        unit = {"RUNTIME_DIRECTORY": "/run/ascproxy:/run/other"}
        assert compiled(tmp_path, NODE, environ=unit).node.run_dir == "/run/ascproxy"
        assert str(run_dir_of(tmp_path, unit)) == "/run/ascproxy"
        said = compiled(tmp_path, NODE + "run_dir: /dev/shm/mine\n", environ=unit)
        assert said.node.run_dir == "/dev/shm/mine"
        assert str(run_dir_of(tmp_path, unit)) == "/dev/shm/mine"

    def test_mistakes_elsewhere_do_not_keep_status_from_finding_it(self, tmp_path: Path) -> None:
        served = compiled(tmp_path, NODE).node.run_dir
        write(tmp_path, NODE + "zzz: 1\nlimits: 3\nstate_dir: 3\n")
        assert str(run_dir_of(tmp_path, {})) == served

    @pytest.mark.parametrize("text", ["listeners: []\n", "- x\n", "node: [\n"])
    def test_a_file_that_names_no_node_has_none(self, tmp_path: Path, text: str) -> None:
        write(tmp_path, text)
        with pytest.raises(UsageError) as refused:
            run_dir_of(tmp_path, {})
        file = tmp_path / "ascproxy.yaml"
        assert str(refused.value) == f"{file} names no node; check it with: ascproxy check {file}"

    def test_the_note_of_a_running_service_wins_over_what_the_file_says_now(self, tmp_path: Path) -> None:
        expected = Path(compiled(tmp_path, NODE).node.run_dir)
        (tmp_path / "state").mkdir()
        running = tmp_path / "run"
        running.mkdir()
        note(tmp_path / "state", running)
        assert run_dir_of(tmp_path, {}) == expected  # nothing listens there any more
        (running / "control.sock").touch()
        write(tmp_path, NODE.replace("node: n", "node: renamed") + "run_dir: /dev/shm/new\n")
        assert run_dir_of(tmp_path, {}) == running
        assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["run_dir"]


def test_the_tls_of_a_listener(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    for name in ("a", "b"):
        authority.issue(f"{name}.example").move_to(tmp_path / f"{name}.crt", tmp_path / f"{name}.key")
    (tmp_path / "crl").write_bytes(authority.revoke())
    (tmp_path / "tickets").touch(0o600)
    (tmp_path / "tickets").write_text("0" * 64)
    write(
        tmp_path,
        """\
node: n
listeners:
  - address: "127.0.0.1:8443"
    tls:
      certificate: a.crt
      key: a.key
      certificates: [{certificate: b.crt, key: b.key}]
      min_version: "1.3"
      client_ca: authority.pem
      client_auth: off
      client_crl: crl
      client_depth: 2
      ticket_keys: tickets
  - {address: "127.0.0.1:8444", tls: {certificate: a.crt, key: a.key, client_ca: authority.pem}}
""",
    )
    snapshot = compile_files(tmp_path).snapshot
    full, short = (each.tls for each in snapshot.node.listeners)
    at = str(tmp_path)
    assert full == ListenerTls(
        certificate=f"{at}/a.crt",
        key=f"{at}/a.key",
        client_ca=f"{at}/authority.pem",
        client_auth=ClientAuth.OFF,
        client_crl=f"{at}/crl",
        client_depth=2,
        certificates=(CertificatePair(f"{at}/b.crt", f"{at}/b.key"),),
        min_version="1.3",
        ticket_keys=f"{at}/tickets",
    )
    assert short is not None
    assert (full.asks_clients, short.asks_clients) == (False, True)
    assert short.client_auth is ClientAuth.REQUIRED
    assert decode(encode(snapshot)) == snapshot


def test_a_snapshot_of_the_version_before_has_defaults_for_what_is_new(tmp_path: Path) -> None:
    """An upgrade hands over the first snapshot, as the program before has written it."""
    tls = ListenerTls("/a.crt", "/a.key", client_ca="/ca.pem")
    node = Node("n", "/s", "/r", 1, (Listener("l", "127.0.0.1:1", tls),), "127.0.0.1:2")
    snapshot = Snapshot("0" * 12, node, (), (), (), ())
    document = json.loads(encode(snapshot))
    of_before = ("certificate", "key", "client_ca")
    listener = document["snapshot"]["node"]["listeners"][0]
    listener["tls"] = {name: listener["tls"][name] for name in of_before}
    assert decode(json.dumps(document).encode()) == snapshot
    del listener["tls"]["key"]
    with pytest.raises(AscproxyError, match=r"not a snapshot: .*key"):
        decode(json.dumps(document).encode())
