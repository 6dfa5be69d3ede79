"""The table of commands: help with examples that parse, one place for errors, exit statuses, no colours in a pipe."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ascproxy import __version__
from ascproxy.cli.app import application, run
from tests.kit.config import NODE, write

ROOT: Any = typer.main.get_command(application())


def commands(group: Any = ROOT, name: str = "") -> Iterator[tuple[str, Any]]:
    for each, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{each} ")
        else:
            yield f"{name}{each}", command


def examples(command: Any) -> list[str]:
    return [line.strip() for line in command.help.splitlines() if re.match(r"\s+ascproxy ", line)]


COMMANDS = dict(commands())


def test_the_commands_of_this_version() -> None:
    assert set(COMMANDS) == {
        "init",
        "serve",
        "check",
        "status",
        "reload",
        "upgrade",
        "key create",
        "key list",
        "key revoke",
        "sim",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_and_they_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = examples(COMMANDS[name])
    assert shown
    assert run([*name.split(), "--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for example in shown:
        words = shlex.split(example)[1:]
        assert words[: len(name.split())] == name.split()
        with COMMANDS[name].make_context(name, words[len(name.split()) :]) as context:
            assert context.params
        assert re.sub(r"\s+", " ", example)[:40] in text


def test_the_root_shows_where_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for example in examples(ROOT):
        assert example in out
        command = shlex.split(example)[1]
        with COMMANDS[command].make_context(command, shlex.split(example)[2:]) as context:
            assert context.params
    assert len(examples(ROOT)) == 2
    assert "\x1b" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"ascproxy {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["--fly"], ["check", "--fly"], ["check", "a", "b"], ["key", "fly"], ["key", "create"],
     ["key", "revoke"], ["init"]],
)  # fmt: skip
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: ascproxy" in err
    assert "\x1b" not in err
    assert "Traceback" not in err


class TestCheck:
    def test_a_configuration_that_can_be_served(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(tmp_path, NODE)
        assert run(["check", str(tmp_path)]) == 0
        revision = re.fullmatch(r"can be served, revision ([0-9a-f]{12})\n", capsys.readouterr().out)
        assert revision is not None
        assert run(["check", str(tmp_path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"valid": True, "revision": revision[1], "findings": []}

    def test_findings(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(tmp_path, NODE + "zzz: 1\nworkers: 0\n")
        file = tmp_path / "ascproxy.yaml"
        assert run(["check", str(tmp_path)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(" ", 3)[:3] for line in lines[:2]] == [
            [f"{file}:3:1:", "error:", "zzz:"],
            [f"{file}:4:10:", "error:", "workers:"],
        ]
        assert lines[2:] == ["2 errors"]
        assert run(["check", str(file), "--json"]) == 1
        document = json.loads(capsys.readouterr().out)
        assert (document["valid"], document["revision"]) == (False, None)
        assert document["findings"][1] == {
            "severity": "error",
            "file": str(file),
            "line": 4,
            "column": 10,
            "path": "workers",
            "reason": "write auto (one per core) or a number from 1 to 256",
        }

    def test_warnings_do_not_keep_it_from_being_served(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(tmp_path, NODE + "resources: resources.yaml\n", "credentials: {c: {from: 'systemd:key'}}\n")
        assert run(["check", str(tmp_path)]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert f"{tmp_path}/resources.yaml:1:25: warning: credentials.c.from: only the service itself" in first
        assert second.startswith("can be served")

    @pytest.mark.parametrize("more", [[], ["--json"]])
    def test_what_cannot_be_read(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
        assert run(["check", str(tmp_path), *more]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        sentence = "name a node file or its folder, or make one with: ascproxy init DIR"
        assert err == f"there is no {tmp_path}/ascproxy.yaml; {sentence}\n"

    def test_colours_are_for_terminals(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path, NODE + "zzz: 1\n")
        run(["check", str(tmp_path)])
        assert "\x1b" not in capsys.readouterr().out
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        run(["check", str(tmp_path)])
        assert capsys.readouterr().out.startswith("\x1b[31m")
