"""The command line before, beside and behind a real service: what an operator types, and what he reads."""

# ruff: noqa: E501 - a case is a line

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
import yaml

from tests.kit.rig import free_port
from tests.kit.service import ROOT, Service, Simulator, command

CHAT = {"model": "sim-chat", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator("--model", "other") as started:
        yield started


@pytest.fixture(scope="module")
def service(simulator: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("cli") / "node"
    with Service(folder, upstream=simulator.url, models=[simulator.model, "other"]) as started:
        yield started


def said(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """Exit status and the one line on standard error."""
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.returncode, done.stderr.rstrip("\n")


class TestInit:
    def test_the_models_are_asked_from_vllm(self, simulator: Simulator, tmp_path: Path) -> None:
        done = command("init", str(tmp_path / "d"), "--upstream", simulator.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"^models   sim-chat, other$", done.stdout, re.MULTILINE)
        assert re.search(r"^API key  asc_[a-z0-9]{12}_\S+$", done.stdout, re.MULTILINE)
        assert f"  ascproxy serve {tmp_path}/d\n" in done.stdout
        assert command("check", str(tmp_path / "d")).returncode == 0

    def test_the_models_are_asked_from_tgi(self, tmp_path: Path) -> None:
        with Simulator("--type", "tgi", model="org/T") as tgi:
            done = command("init", str(tmp_path / "d"), "--upstream", tgi.url, "--type", "tgi", "--json")
        assert json.loads(done.stdout)["models"] == ["org/T"]
        resources = yaml.safe_load((tmp_path / "d" / "resources.yaml").read_text())
        assert resources["providers"]["upstream"]["type"] == "tgi"

    def test_with_a_credential_that_the_upstream_wants(self, tmp_path: Path) -> None:
        key = tmp_path / "key"
        key.write_text("s3cret\n")
        key.chmod(0o600)
        with Simulator("--api-key-file", str(key)) as guarded:
            arguments = ["init", str(tmp_path / "d"), "--upstream", guarded.url]
            refused = f"{guarded.url} wants a credential (401): give one with --credential file:PATH"
            assert said(command(*arguments)) == (1, refused)
            assert not (tmp_path / "d").exists()
            relative = os.path.relpath(key, ROOT)
            done = command(*arguments, "--credential", f"file:{relative}", "--json")
        assert json.loads(done.stdout)["models"] == ["sim-chat"], done.stderr
        resources = yaml.safe_load((tmp_path / "d" / "resources.yaml").read_text())
        assert resources["credentials"] == {"upstream": {"from": f"file:{key}"}}
        assert "s3cret" not in (tmp_path / "d" / "resources.yaml").read_text()

    def test_an_upstream_that_is_not_there(self, tmp_path: Path) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        hint = "start it, correct --upstream, or name the models with --model"
        done = command("init", str(tmp_path / "d"), "--upstream", url)
        assert said(done) == (1, f"{url} does not answer (connection refused): {hint}")
        assert list(tmp_path.iterdir()) == []

    def test_an_upstream_that_is_something_else(self, service: Service, tmp_path: Path) -> None:
        url = f"http://127.0.0.1:{service.metrics_port}"
        status, sentence = said(command("init", str(tmp_path / "d"), "--upstream", url))
        assert status == 1
        assert sentence.startswith(f"{url}/v1/models answers 404, and not with models: ")

    def test_an_upstream_whose_certificate_nobody_knows(self, service: Service, tmp_path: Path) -> None:
        url = f"https://127.0.0.1:{service.https_port}"
        status, sentence = said(command("init", str(tmp_path / "d"), "--upstream", url))
        assert status == 1
        assert sentence.startswith(f"{url} does not answer (")
        assert "certificate verify failed" in sentence


def key(where: Service | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder = where if isinstance(where, Path) else where.folder
    return command("key", *arguments, "--config", str(folder))


REFUSED = [
    (["create", "--tenant", "nobody"], 2, "there is no tenant 'nobody' in the configuration; tenants: default"),
    (["create", "--tenant", "default", "--operation", "fly"], 2, "there is no operation 'fly'; operations: "),
    (["create", "--tenant", "default", "--expires", "soon"], 2, "'soon' is no expiry: write 30d, 12h, or a date such as 2027-01-01"),
    (["create", "--tenant", "default", "--expires", "2001-01-01"], 2, "a key must expire in the future, and before the year 10000"),
    (["create", "--tenant", "default", "--expires", "0d"], 2, "a key must expire in the future, and before the year 10000"),
    (["revoke", "000000000000"], 1, "there is no key '000000000000'; ascproxy key list shows them"),
    (["revoke", "../../status"], 2, "'../../status' is no key id: it is the part between the two underscores of a key"),
]  # fmt: skip


class TestKeys:
    def test_through_the_service_a_revoked_key_is_refused_on_the_next_request(self, service: Service) -> None:
        made = json.loads(key(service, "create", "--tenant", "default", "--json").stdout)
        assert set(made) == {"id", "api_key", "tenant", "expires"}
        assert made["expires"] is None
        ask: Callable[[], int] = lambda: service.ask("/v1/chat/completions", CHAT, key=made["api_key"])[0]  # noqa: E731
        assert [ask(), ask()] == [200, 200]
        assert key(service, "revoke", made["id"]).returncode == 0
        assert ask() == 401
        rows = {row["id"]: row for row in json.loads(key(service, "list", "--json").stdout)}
        assert rows[made["id"]]["state"] == "revoked"
        assert made["api_key"] not in key(service, "list", "--json").stdout

    def test_the_service_is_found_after_its_file_has_changed(self, service: Service) -> None:
        made = json.loads(key(service, "create", "--tenant", "default", "--json").stdout)
        assert service.ask("/v1/chat/completions", CHAT, key=made["api_key"])[0] == 200
        node = service.folder / "ascproxy.yaml"
        before = node.read_text()
        try:
            node.write_text(re.sub(r"(?m)^node: .*$", "node: renamed", before))
            assert key(service, "revoke", made["id"]).returncode == 0
            assert command("status", "--config", str(service.folder)).returncode == 0
        finally:
            node.write_text(before)
        assert service.ask("/v1/chat/completions", CHAT, key=made["api_key"])[0] == 401

    @pytest.mark.parametrize(
        ("scope", "statuses"),
        [
            (["--model", "sim-*"], [200, 403, 200]),
            (["--model", "other"], [403, 200, 200]),
            (["--operation", "models"], [403, 403, 200]),
            (["--operation", "chat_completions", "--expires", "1h"], [200, 200, 403]),
        ],
    )
    def test_scopes_are_kept(self, service: Service, scope: list[str], statuses: list[int]) -> None:
        made = json.loads(key(service, "create", "--tenant", "default", *scope, "--json").stdout)
        chats = [
            service.ask("/v1/chat/completions", CHAT | {"model": m}, key=made["api_key"])[0]
            for m in ("sim-chat", "other")
        ]
        models = service.ask("/v1/models", method="GET", key=made["api_key"])[0]
        assert [*chats, models] == statuses

    def test_an_expired_key_is_refused(self, service: Service) -> None:
        # A span counts from the command's own clock: how long it takes to start does not shorten the key's life.
        created = key(service, "create", "--tenant", "default", "--expires", "5s", "--json")
        assert created.returncode == 0, created.stderr
        made = json.loads(created.stdout)
        statuses = [service.ask("/v1/models", method="GET", key=made["api_key"])[0]]
        while statuses[-1] == 200:
            statuses.append(service.ask("/v1/models", method="GET", key=made["api_key"])[0])
        assert datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") >= made["expires"]
        assert (statuses[0], statuses[-1]) == (200, 401)

    def test_for_people(self, service: Service) -> None:
        made = key(service, "create", "--tenant", "default", "--model", "a", "--model", "b*")
        assert re.fullmatch(r"asc_[a-z0-9]{12}_\S+\n", made.stdout)
        number = made.stdout.split("_")[1]
        assert made.stderr == f"key {number} of tenant default; this is the only time it is shown\n"
        head, *rows = key(service, "list").stdout.splitlines()
        assert head.split() == ["id", "tenant", "state", "expires", "models", "operations"]
        assert [number, "default", "active", "-", "a,b*", "all"] in [row.split() for row in rows]
        assert re.fullmatch(rf"key {number} is revoked since \S+\n", key(service, "revoke", number).stdout)

    @pytest.mark.parametrize(("arguments", "status", "sentence"), REFUSED)
    def test_refusals_are_the_same_with_and_without_a_service(
        self, service: Service, tmp_path: Path, arguments: list[str], status: int, sentence: str
    ) -> None:
        folder = tmp_path / "d"
        assert command("init", str(folder), "--upstream", "http://127.0.0.1:1", "--model", "m").returncode == 0
        for where in (service, folder):
            found, text = said(key(where, *arguments))
            assert (found, text[: len(sentence)]) == (status, sentence)

    def test_without_a_service_the_store_is_changed_itself(self, simulator: Simulator, tmp_path: Path) -> None:
        service = Service(tmp_path / "d", upstream=simulator.url, models=[simulator.model])
        made = [json.loads(key(service, "create", "--tenant", "default", "--json").stdout) for _ in range(2)]
        assert key(service, "revoke", made[1]["id"]).returncode == 0
        states = {row["id"]: row["state"] for row in json.loads(key(service, "list", "--json").stdout)}
        assert [states[each["id"]] for each in made] == ["active", "revoked"]
        with service:
            assert [service.ask("/v1/models", method="GET", key=each["api_key"])[0] for each in made] == [200, 401]

    def test_a_mistake_in_a_file_keeps_no_key_from_being_revoked(self, tmp_path: Path) -> None:
        folder = tmp_path / "d"
        made = command("init", str(folder), "--upstream", "http://127.0.0.1:1", "--model", "m", "--json")
        number = json.loads(made.stdout)["api_key"].split("_")[1]
        for name in ("ascproxy.yaml", "resources.yaml"):
            with (folder / name).open("a") as file:
                file.write("mistake: 1\n")
        assert command("check", str(folder)).returncode == 1
        assert key(folder, "create", "--tenant", "default").returncode == 1
        assert key(folder, "revoke", number).returncode == 0
        assert [(row["id"], row["state"]) for row in json.loads(key(folder, "list", "--json").stdout)] == [
            (number, "revoked")
        ]

    @pytest.mark.parametrize("arguments", [["list"], ["revoke", "000000000000"]])
    def test_looking_for_keys_makes_no_store(self, tmp_path: Path, arguments: list[str]) -> None:
        folder = tmp_path / "d"
        assert command("init", str(folder), "--upstream", "http://127.0.0.1:1", "--model", "m").returncode == 0
        shutil.rmtree(folder / "state")
        status, text = said(key(folder, *arguments))
        assert (status, text) == (1, f"there is no store in {folder}/state: make a configuration with ascproxy init")
        assert not (folder / "state").exists()


def obey_modes() -> None:
    """Let root, too, be refused by the modes of files: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH after exec."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; fails for others, who obey anyway


def serve(folder: Path) -> tuple[int, str]:
    return said(command("serve", str(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration that could be served, on ports of its own."""
    ports = ["--https-port", str(free_port()), "--metrics-port", str(free_port())]
    done = command("init", str(tmp_path / "d"), "--upstream", "http://127.0.0.1:1", "--model", "m", *ports)
    assert done.returncode == 0, done.stderr
    return tmp_path / "d"


class TestServeRefuses:
    """Show 10: a sentence that says what to do, and nothing is left running."""

    def change(self, folder: Path, old: str, new: str) -> tuple[str, int, int]:
        """The place where ``new`` stands now."""
        file = folder / "ascproxy.yaml"
        text = file.read_text()
        assert text.count(old) == 1
        before, _, after = text.partition(old)
        file.write_text(before + new + after)
        return str(file), before.count("\n") + 1, len(before) - before.rfind("\n")

    def test_plaintext_off_loopback(self, folder: Path) -> None:
        port = free_port()
        tls = "\n  - address: "
        file, line, column = self.change(folder, tls, f"\n  - address: 0.0.0.0:{port}{tls}")
        del column
        assert serve(folder) == (
            1,
            f"{file}:{line + 1}:14: error: listeners[0].address: 0.0.0.0:{port}: plaintext is for loopback addresses and "
            "Unix sockets only; add tls: {certificate: ..., key: ...}",
        )

    def test_unknown_keys(self, folder: Path) -> None:
        file, line, column = self.change(folder, "workers: auto", "wrokers: auto")
        expected = f"{file}:{line}:{column}: error: wrokers: unknown key 'wrokers'; did you mean workers?"
        assert serve(folder) == (1, expected)

    def test_a_certificate_that_is_missing(self, folder: Path) -> None:
        (folder / "tls" / "server.crt").unlink()
        status, sentence = serve(folder)
        assert status == 1
        expected = f"listeners[0].tls.certificate: cannot read {folder}/tls/server.crt: no such file or directory"
        assert sentence.endswith(expected)

    def test_a_certificate_that_is_of_another_key(self, folder: Path) -> None:
        trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(folder / "tls" / "server.key")
        status, sentence = serve(folder)
        assert status == 1
        assert f"key {folder}/tls/server.key does not belong to certificate {folder}/tls/server.crt" in sentence

    def test_files_that_this_user_may_not_read(self, folder: Path) -> None:
        (folder / "tls" / "server.key").chmod(0)
        (folder / "state").chmod(0o500)
        done = subprocess.run(
            [sys.executable, "-m", "ascproxy", "serve", str(folder)],
            check=False, cwd=ROOT, capture_output=True, text=True, timeout=60, preexec_fn=obey_modes,
        )  # fmt: skip
        assert done.returncode == 1
        key, state = sorted(done.stderr.splitlines(), key=lambda line: "state_dir" in line)
        assert key.endswith(f"listeners[0].tls.key: cannot read {folder}/tls/server.key: permission denied")
        assert state.endswith(f"state_dir: {folder}/state is no folder that this user can write to")

    def test_no_configuration(self, tmp_path: Path) -> None:
        hint = "name a node file or its folder, or make one with: ascproxy init DIR"
        assert serve(tmp_path / "x") == (2, f"there is no {tmp_path}/x; {hint}")

    @pytest.mark.parametrize("which", ["https", "metrics"])
    def test_a_port_in_use(self, folder: Path, which: str) -> None:
        node = yaml.safe_load((folder / "ascproxy.yaml").read_text())
        address = node["metrics"]["address"] if which == "metrics" else node["listeners"][0]["address"]
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", int(address.rpartition(":")[2])))
            taken.listen()
            status, sentence = serve(folder)
        assert status == 1
        why = "the address is in use by another process: stop it or choose another port"
        assert sentence == f"cannot listen on {address}: {why}"


def test_serve_starts_without_its_upstream_and_says_so_to_callers(tmp_path: Path) -> None:
    with Service(tmp_path / "d", upstream=f"http://127.0.0.1:{free_port()}", models=["m"]) as service:
        status, _, body = service.ask("/v1/chat/completions", CHAT | {"model": "m"})
        error = json.loads(body)["error"]
        assert status == 502
        assert len(error["message"]) > 20
        assert command("check", str(service.folder)).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["check"], ["key", "list", "--config"]])
def test_output_that_nobody_reads_is_no_traceback(folder: Path, arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    more = [] if arguments[0].startswith("--") else [str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "ascproxy", *arguments, *more],
        check=False, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
