"""``ascproxy init``: what the two files say, whatever a model is called, and that nothing is left of a failure."""

# ruff: noqa: E501 - a case is a line

from __future__ import annotations

import json
import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from ascproxy.cli import init
from ascproxy.cli.app import run
from ascproxy.cli.init import TENANT, Wanted, make, node_file, resources_file
from ascproxy.config.compile import compile_files
from ascproxy.errors import AscproxyError
from ascproxy.model.provider import ProviderType

GOLDEN = Path(__file__).parents[2] / "golden" / "init"
SMALL = Wanted(
    directory=Path("/nowhere"),
    upstream="http://127.0.0.1:8000",
    kind=ProviderType.VLLM,
    models=("llama-3-70b",),
    https_port=8443,
    http_port=None,
    metrics_port=9464,
    credential=None,
)
LARGE = replace(
    SMALL,
    upstream="https://api.example.com/base",
    kind=ProviderType.OPENAI,
    models=("gpt-x", 'org/Model:v1 "quoted" #1', "модель 😀"),
    https_port=9443,
    http_port=8080,
    metrics_port=9999,
    credential="file:/etc/keys/op en'ai",
)


@pytest.mark.parametrize(("name", "wanted"), [("small", SMALL), ("large", LARGE)])
def test_the_files_as_they_are_written(monkeypatch: pytest.MonkeyPatch, name: str, wanted: Wanted) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "rack-a-1.example.org")
    assert node_file(wanted) == (GOLDEN / f"{name}.ascproxy.yaml").read_text(encoding="utf-8")
    assert resources_file(wanted) == (GOLDEN / f"{name}.resources.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("host", "node"),
    [
        ("a_b", "a_b"),
        ("_x y", "x-y"),
        ("ü", "node"),
        ("", "node"),
        ("10", "node-10"),
        ("true", "node-true"),
        ("a" * 80, "a" * 63),
    ],
)
def test_a_host_name_becomes_a_node_name(monkeypatch: pytest.MonkeyPatch, host: str, node: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert f"\nnode: {node}\n" in node_file(SMALL)


ODD = (
    "yes", "null", "0777", "1e3", "a: b", "# no comment", "'", '"', "\\", "{x}", "[x]", "*", "&a", "!tag", "@x", "%x", "- x",
    "a b", " leading", "trailing ", "ü", "😀", "a,b", "x" * 256, "~", "<<", "\u00a0",
)  # fmt: skip


def test_every_odd_name_of_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    facts = make(replace(SMALL, directory=tmp_path / "d", models=ODD))
    snapshot = compile_files(tmp_path / "d", {}).snapshot
    assert tuple(route.models[0] for route in snapshot.routes) == ODD
    assert facts["models"] == list(ODD)


def test_json_has_exactly_its_members_and_the_folder_is_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "d"
    arguments = ["init", str(folder), "--upstream", "http://127.0.0.1:1/", "--model", "m", "--model", "m", "--json"]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert err == ""
    assert len(out.splitlines()) == 1
    assert facts.pop("api_key").startswith("asc_")
    assert facts == {
        "config": str(folder / "ascproxy.yaml"),
        "https_url": "https://localhost:8443",
        "http_url": None,
        "metrics_url": "http://127.0.0.1:9464",
        "ca": str(folder / "tls" / "ca.crt"),
        "tenant": TENANT,
        "models": ["m"],
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "tls" / "server.key").stat().st_mode) == 0o600
    assert run(["check", str(folder)]) == 0


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


USAGE = {
    "no upstream": (["d"], "--upstream"),
    "no URL": (["d", "--upstream", "127.0.0.1:8000"], "'127.0.0.1:8000' is no base URL: write http://host:port or https://host"),
    "/v1": (["d", "--upstream", "http://h/v1"], "'http://h/v1' ends in /v1, which the gateway adds itself; remove it"),
    "type": (["d", "--upstream", "http://h", "--type", "vlm"], "vlm"),
    "ports": (["d", "--upstream", "http://h", "--https-port", "1", "--metrics-port", "1"], "--https-port, --http-port and --metrics-port must differ"),
    "port": (["d", "--upstream", "http://h", "--https-port", "65536"], "less than or equal to"),
    "credential": (["d", "--upstream", "http://h", "--credential", "secret"], "'secret' is no source of a credential: write file:PATH, systemd:NAME or env:VARIABLE"),
    "model": (["d", "--upstream", "http://h", "--model", "a\nb"], "'a\\nb' is no model name: 1 to 256 bytes without control characters"),
    "long model": (["d", "--upstream", "http://h", "--model", "ü" * 129], "is no model name: 1 to 256 bytes without control characters"),
    "there": (["there", "--upstream", "http://h", "--model", "m"], "there is there already; choose another name or remove it"),
    "dangling link": (["link", "--upstream", "http://h", "--model", "m"], "link is there already; choose another name or remove it"),
    "unreadable credential": (["d", "--upstream", "http://127.0.0.1:1", "--credential", "file:absent"], "absent: no such file or directory"),
    "unset credential": (["d", "--upstream", "http://127.0.0.1:1", "--credential", "env:NOT_SET"], "the environment variable NOT_SET is not set"),
    "credential of the unit": (["d", "--upstream", "http://127.0.0.1:1", "--credential", "systemd:k"], "only the service itself can see systemd:k: name the models with --model"),
    "no credential in it": (["d", "--upstream", "http://127.0.0.1:1", "--credential", "file:binary"], "binary holds no credential: write the bare value into it, on one line"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), USAGE.values(), ids=USAGE.keys())
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    before = listing(tmp_path)
    assert run(["init", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in " ".join(err.split())
    assert listing(tmp_path) == before


def test_a_configuration_that_could_not_be_served_is_not_made(tmp_path: Path) -> None:
    wanted = replace(SMALL, directory=tmp_path / "a" / "b" / "d", credential=f"file:{tmp_path}/absent")
    with pytest.raises(AscproxyError) as refused:
        make(wanted)
    assert str(refused.value) == (
        f"{wanted.directory}/resources.yaml:5:20: error: credentials.upstream.from: "
        f"cannot read {tmp_path}/absent: no such file or directory"
    )
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "broken", ["ascproxy.net.authority.create", "ascproxy.store.env.open_store", "pathlib.Path.rename"]
)
def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(AscproxyError) as refused:
        make(replace(SMALL, directory=tmp_path / "a" / "d"))
    assert str(refused.value) == f"cannot make {tmp_path}/a/d: no space left on device"
    assert listing(tmp_path) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(init, "resources_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(replace(SMALL, directory=tmp_path / "d"))
    assert listing(tmp_path) == []


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AscproxyError) as refused:
        make(replace(SMALL, directory=tmp_path / "file" / "d"))
    assert str(refused.value) == f"cannot make {tmp_path}/file/d: file exists"
    assert listing(tmp_path) == ["file"]
