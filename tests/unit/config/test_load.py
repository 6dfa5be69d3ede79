"""Shape: every kind of finding with its file, line, column, path and sentence, all of both files at once."""

# ruff: noqa: E501 - a case is a line

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import BaseModel

from ascproxy import _native
from ascproxy.config.load import find, load
from ascproxy.config.schema import LimitsSection, ListenerLimitsSection, NodeFile, ResourcesFile
from ascproxy.errors import UsageError
from ascproxy.model.node import Limits
from tests.kit.config import NODE, findings, places, write

LISTEN = "listeners: [{address: '127.0.0.1:8080'}]\n"
NAME = "is no name: up to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit"
NODE_KEYS = "node, state_dir, run_dir, workers, listeners, metrics, limits, access_log, resources"

NODE_CASES = [
    ("", "node", "is missing: the name of this machine", "»" + LISTEN),
    ("", "listeners", "is missing: where callers connect", "»node: n\n"),
    ("listeners: »[]\n", "listeners", "is empty; name at least one", "node: n\n"),
    ("listeners: »{a: b}\n", "listeners", "is a mapping; write a list: one item per line, each after a dash, or [a, b]", "node: n\n"),
    ("listeners: [»8080]\n", "listeners[0]", "is the number 8080; write keys and values below it, or {}", "node: n\n"),
    ("listeners:\n  - »tls: {certificate: c, key: k}\n", "listeners[0].address", "is missing: `host:port`, `[v6]:port` or `unix:PATH`. Without `tls` only loopback addresses and Unix sockets", "node: n\n"),
    ("listeners:\n  - {address: 'unix:a', »tsl: {}}\n", "listeners[0].tsl", "unknown key 'tsl'; did you mean tls?", "node: n\n"),
    ("listeners:\n  - {address: 'unix:a', tls: {certificate: c, key: k, »clientca: x}}\n", "listeners[0].tls.clientca", "unknown key 'clientca'; did you mean client_ca?", "node: n\n"),
    ("listeners:\n  - {address: 'unix:a', »tls: {key: k}}\n", "listeners[0].tls.certificate", "is missing: certificate chain, the server's own first", "node: n\n"),
    ("listeners:\n  - {address: 'unix:a', tls: »yes}\n", "listeners[0].tls", "is the text 'yes'; write keys and values below it, or {}", "node: n\n"),
    ("listeners:\n  - {address: 'unix:a', limits: {»max_bodies: 1GiB}}\n", "listeners[0].limits.max_bodies", "max_bodies counts for the whole node; move it to limits at the top of the file", "node: n\n"),
    ("»wrokers: 3\n", "wrokers", "unknown key 'wrokers'; did you mean workers?", NODE),
    ("»zzz: 3\n", "zzz", f"unknown key 'zzz'; known keys are {NODE_KEYS}", NODE),
    ('»"a\\nb": 3\n', '["a\\nb"]', f"unknown key 'a\\nb'; known keys are {NODE_KEYS}", NODE),
    ("»" + "x" * 100 + ": 3\n", "x" * 100, f"unknown key '{'x' * 77}...'; known keys are {NODE_KEYS}", NODE),
    ("workers: »0\n", "workers", "write auto (one per core) or a number from 1 to 256", NODE),
    ("workers: »257\n", "workers", "write auto (one per core) or a number from 1 to 256", NODE),
    ("workers: »true\n", "workers", "write auto (one per core) or a number from 1 to 256", NODE),
    ("workers: »'2'\n", "workers", "write auto (one per core) or a number from 1 to 256", NODE),
    ("node: »a b\n", "node", f"'a b' {NAME}", LISTEN),
    ("node: »-a\n", "node", f"'-a' {NAME}", LISTEN),
    ("node: »" + "a" * 64 + "\n", "node", f"'{'a' * 64}' {NAME}", LISTEN),
    ("node: »10\n", "node", "is the number 10; put text in quotes", LISTEN),
    ("node:»\n", "node", "is empty; put text in quotes", LISTEN),
    ("state_dir: »''\n", "state_dir", "is empty; write something or remove the key", NODE),
    ("state_dir: »false\n", "state_dir", "is the boolean false; put text in quotes", NODE),
    ("state_dir: »[a]\n", "state_dir", "is a list; put text in quotes", NODE),
    ('state_dir: »"a\\0b"\n', "state_dir", "'a\\x00b' contains a control character; remove it", NODE),
    ("state_dir: »" + "x" * 4097 + "\n", "state_dir", "is longer than 4096 characters", NODE),
    ("limits: {header_timeout: »10}\n", "limits.header_timeout", "a time needs its unit: 10s or 10ms", NODE),
    ("limits: {max_body: »32MB}\n", "limits.max_body", "'MB' is not a unit of size; use B, KiB, MiB or GiB; did you mean 32MiB?", NODE),
    ("limits: {connection_requests: »0}\n", "limits.connection_requests", "is too small; the least is 1", NODE),
    ("limits: {connection_requests: »1.5}\n", "limits.connection_requests", "is the number 1.5; write a whole number without quotes", NODE),
    ("limits: {connection_requests: »'10'}\n", "limits.connection_requests", "is the text '10'; write a whole number without quotes", NODE),
    ("limits: {max_fields: »129}\n", "limits.max_fields", "is too large; the most is 128", NODE),
    ("limits: {max_head: »41KiB}\n", "limits.max_head", "is too large; the most is 40KiB", NODE),
    ("limits: {max_trailers: »65KiB}\n", "limits.max_trailers", "is too large; the most is 64KiB", NODE),
    ("limits: {memory_limit: »16}\n", "limits.memory_limit", "a size needs its unit: 16B or 16KiB", NODE),
    ("limits: {max_connections_per_ip: »0}\n", "limits.max_connections_per_ip", "is too small; the least is 1", NODE),
    ("limits: {trusted_peers: [»10.0.0.1/8]}\n", "limits.trusted_peers[0]", "'10.0.0.1/8' is no network (10.0.0.1/8 has host bits set): write 10.0.0.0/8, 2001:db8::/32 or one address", NODE),
    ("limits: {trusted_peers: [10.0.0.1, »here]}\n", "limits.trusted_peers[1]", "'here' is no network ('here' does not appear to be an IPv4 or IPv6 network): write 10.0.0.0/8, 2001:db8::/32 or one address", NODE),
    ("limits: {json_depth: »65}\n", "limits.json_depth", "is too large; the most is 64", NODE),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "path", "sentence", "rest"), NODE_CASES, ids=[f"{c[1]}: {c[2][:40]}" for c in NODE_CASES]
)
def test_the_node_file(tmp_path: Path, text: str, path: str, sentence: str, rest: str) -> None:
    marked = write(tmp_path, rest + text)
    found = findings(tmp_path)
    assert [(f.path, f.reason) for f in found] == [(path, sentence)]
    if marked:
        assert places(found) == marked
    assert str(found[0]) == f"{found[0].file}:{found[0].line}:{found[0].column}: error: {path}: {sentence}"


RESOURCE_CASES = [
    ("tenants: »[acme]\n", "tenants", "is a list; write keys and values below it, or {}"),
    ("tenants:\n  »a b: {}\n", 'tenants["a b"]', f"'a b' {NAME}"),
    ("tenants: {acme: {»plan: gold}}\n", "tenants.acme.plan", "unknown key 'plan'; nothing is set here yet, write {}"),
    ("tenants: {acme: »x}\n", "tenants.acme", "is the text 'x'; write keys and values below it, or {}"),
    ("credentials: {»c: {}}\n", "credentials.c.from", "is missing: `file:PATH`, `systemd:NAME` (LoadCredential of the unit) or, for trying out, `env:VARIABLE`"),
    ("credentials:\n  c: {»form: 'file:x'}\n", "credentials.c.form", "unknown key 'form'; did you mean from?"),
    ("providers: {p: {type: »vlm, endpoints: ['http://127.0.0.1:1']}}\n", "providers.p.type", "is the text 'vlm', not one of: vllm, tgi, openai or anthropic"),
    ("providers: {p: {type: vllm, endpoints: »[]}}\n", "providers.p.endpoints", "is empty; name at least one"),
    ("providers: {p: {type: vllm, endpoints: »'http://h'}}\n", "providers.p.endpoints", "is the text 'http://h'; write a list: one item per line, each after a dash, or [a, b]"),
    ("providers: {p: {type: vllm, endpoints: ['http://h'], request_headers: [»X-Foo]}}\n", "providers.p.request_headers[0]", "'X-Foo' is no header name: lower-case letters, digits, '-' and '_', with at most one '*'"),
    ("providers: {p: {type: vllm, endpoints: ['http://h'], timeouts: {conect: »1s}}}\n", "providers.p.timeouts.conect", "unknown key 'conect'; did you mean connect?"),
    ("routes: {r: {models: »[], targets: [{provider: p}]}}\n", "routes.r.models", "is empty; name at least one"),
    ('routes: {r: {models: [»"a\\tb"], targets: [{provider: p}]}}\n', "routes.r.models[0]", "'a\\tb' contains a control character; remove it"),
    ("routes: {r: {models: [»" + "ü" * 129 + "], targets: [{provider: p}]}}\n", "routes.r.models[0]", "is longer than 256 bytes, the most that a model's name can be"),
    ("routes: {r: {models: [m], targets: [{»modell: x}]}}\n", "routes.r.targets[0].modell", "unknown key 'modell'; did you mean model?"),
    ("routes: {r: {models: [m], targets: [{provider: p}], retry_ambiguous: »'yes'}}\n", "routes.r.retry_ambiguous", "is the text 'yes'; write true or false"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "path", "sentence"), RESOURCE_CASES, ids=[f"{c[1]}: {c[2][:40]}" for c in RESOURCE_CASES]
)
def test_the_resources_file(tmp_path: Path, text: str, path: str, sentence: str) -> None:
    write(tmp_path, NODE + "resources: resources.yaml\n")
    marked = write(tmp_path, NODE + "resources: resources.yaml\n", text)
    found = [f for f in findings(tmp_path) if f.path == path]
    assert [f.reason for f in found] == [sentence]
    assert found[0].file == str(tmp_path / "resources.yaml")
    if "unknown key" not in sentence or "»1s" not in text:
        assert places(found) == marked


def test_all_findings_of_both_files_come_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    marked = write(
        tmp_path,
        "resources: resources.yaml\nlisteners:\n  - {address: 'unix:a', »tsl: 1}\n»nod: n\nworkers: »-1\n",
        "routes:\n  r: {models: [m], targets: »[]}\n»tenant: {}\nproviders: »3\n",
    )
    found = findings(tmp_path)
    shown = [f.path for f in found]
    assert sorted(shown) == sorted(
        ["node", "listeners[0].tsl", "nod", "workers", "routes.r.targets", "tenant", "providers"]
    )
    assert [p for p in places(found) if p[1] > 1] == marked
    assert places(found)[0] == (str(tmp_path / "ascproxy.yaml"), 1, 1)


def test_a_broken_file_does_not_hide_the_other(tmp_path: Path) -> None:
    write(tmp_path, "resources: resources.yaml\nnod: [\n", "zzz: 1\n")
    assert ["is not YAML" in f.reason for f in findings(tmp_path)] == [True]  # nobody knows yet where the other is
    write(tmp_path, NODE + "resources: resources.yaml\nzzz: 1\n", "a: [\n")
    first, second = findings(tmp_path)
    assert (first.path, second.reason[:11]) == ("zzz", "is not YAML")


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("absent.yaml", "no such file or directory"),
        (".", "it is a folder"),
        ("pipe", "it is no regular file"),
        ("~nobody-of-this-name/r.yaml", "no such file or directory"),
    ],
)
def test_a_resources_file_that_cannot_be_read(tmp_path: Path, named: str, why: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (marked,) = write(tmp_path, NODE + f"resources: »{named}\n")
    (found,) = findings(tmp_path)
    assert (found.file, found.line, found.column) == marked
    assert found.reason == f"cannot read {tmp_path / named}: {why}; correct the path or remove the key"


def test_empty_files_say_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "# nothing\n")
    assert [(f.line, f.column, f.path) for f in findings(tmp_path)] == [(1, 1, "listeners"), (1, 1, "node")]
    write(tmp_path, NODE + "resources: resources.yaml\n", "")
    assert findings(tmp_path) == []
    write(tmp_path, "- a list\n")
    assert [f.reason for f in findings(tmp_path)] == ["is a list; write keys and values below it, or {}"]


def test_the_node_file_is_found_in_its_folder_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    write(folder, NODE)
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(folder)
    spellings = (Path(), Path("ascproxy.yaml"), folder, tmp_path / "link", Path("../link/../real/ascproxy.yaml"))
    assert {find(each) for each in spellings} == {folder / "ascproxy.yaml"}
    (folder / "other.yaml").symlink_to("ascproxy.yaml")
    assert find(folder / "other.yaml") == folder / "other.yaml"  # its relative paths start where it was put


def test_a_node_file_that_is_not_there(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "x"):
        with pytest.raises(UsageError) as refused:
            load(target)
        sentence = "name a node file or its folder, or make one with: ascproxy init DIR"
        assert (
            str(refused.value)
            == f"there is no {tmp_path / ('ascproxy.yaml' if target == tmp_path else 'x')}; {sentence}"
        )
    (tmp_path / "ascproxy.yaml").mkdir()
    with pytest.raises(UsageError, match="it is a folder"):
        load(tmp_path)


def bounds() -> list[tuple[str, int]]:
    """Every limit at the most that the schema allows."""
    names = {f: f if f in Limits.__dataclass_fields__ else f"{f}_ms" for f in LimitsSection.model_fields}
    found = []
    for name, field in LimitsSection.model_fields.items():
        most = next((m.le for m in field.metadata if hasattr(m, "le")), None)
        if most is None:
            most = 7 * 86_400_000 if names[name].endswith("_ms") else 64 << 30
        found.append((names[name], most))
    return found


@pytest.mark.parametrize(("name", "most"), bounds())
def test_the_core_takes_every_limit_that_the_schema_allows(name: str, most: int) -> None:
    assert _native.Listener(name="x", tls=None, limits=asdict(Limits()) | {name: most}).name == "x"


def test_every_limit_of_the_noun_has_its_key_and_listeners_have_those_that_are_theirs() -> None:
    fields = {name.removesuffix("_ms") for name in Limits.__dataclass_fields__}
    assert set(LimitsSection.model_fields) == fields
    of_the_node = {"max_bodies", "max_connections", "max_connections_per_ip", "max_unauthenticated_per_ip"}
    of_the_node |= {"trusted_peers", "memory_limit", "drain_unary", "drain_stream"}
    assert fields - set(ListenerLimitsSection.model_fields) == of_the_node


def test_every_key_is_described() -> None:
    def check(section: type[BaseModel], seen: set[type[BaseModel]]) -> None:
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, (section, name)

    for kind in (NodeFile, ResourcesFile):
        definitions = kind.model_json_schema(by_alias=True)
        check(kind, set())
        for name, definition in definitions["$defs"].items():
            for key, field in definition.get("properties", {}).items():
                assert field.get("description"), (name, key)
