"""The ground that everything stands on: lock files, floors of the packages, commands, what a bare machine is told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def pins(lock: Path) -> dict[str, tuple[Version, int]]:
    """Name -> (version, number of hashes) of a lock file."""
    found = {}
    for block in re.split(r"\n(?=[a-z0-9])", lock.read_text()):
        if match := re.match(r"([a-z0-9-]+)==(\S+)", block):
            found[match[1]] = (Version(match[2]), len(re.findall(r"--hash=sha256:[0-9a-f]{64}", block)))
    return found


def test_every_declared_dependency_is_pinned_within_its_range() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    runtime = pins(ROOT / "requirements/runtime.txt")
    assert len({Requirement(line).name.lower() for line in declared}) == len(declared)
    for requirement in map(Requirement, declared):
        version, _ = runtime[requirement.name.lower()]
        assert version in requirement.specifier, requirement


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.stem)
def test_every_pin_has_hashes_and_no_index_is_named(lock: Path) -> None:
    assert all(hashes for _, hashes in pins(lock).values())
    assert len(pins(lock)) == len(re.findall(r"^[^\s#]", lock.read_text(), re.MULTILINE))
    assert not re.search(r"://|^-", lock.read_text(), re.MULTILINE)


def test_tests_run_against_the_versions_that_are_shipped() -> None:
    runtime, dev = pins(ROOT / "requirements/runtime.txt"), pins(ROOT / "requirements/dev.txt")
    assert {name: dev.get(name) for name in runtime} == runtime


class TestFloors:
    """The contracts of pyproject.toml over a small tree: each rule is shown to bite, and to leave good code alone."""

    GOOD: ClassVar[dict[str, str]] = {
        "__init__.py": "",
        "errors.py": "",
        "clock.py": "import time",
        "cli/__init__.py": "import ascproxy.worker, ascproxy.sim, ascproxy.control.app, typer",
        "supervisor/__init__.py": "import ascproxy.net",
        "control/__init__.py": "",
        "control/app.py": "import ascproxy.config, hypercorn",
        "worker/__init__.py": "",
        "worker/loop.py": "import ascproxy.gateway, ascproxy.net, ascproxy.clock",
        "sim/__init__.py": "import ascproxy.wire, ascproxy.model, ascproxy.errors, ascproxy.clock, asyncio",
        "gateway/__init__.py": "import ascproxy.auth, ascproxy.model",
        "auth/__init__.py": "import ascproxy.store",
        "policy/__init__.py": "",
        "policy/evaluate.py": "import ascproxy.model",
        "config/__init__.py": "import yaml, pydantic",
        "store/__init__.py": "import lmdb",
        "net/__init__.py": "import ascproxy.telemetry, socket",
        "telemetry/__init__.py": "import ascproxy.model",
        "wire/__init__.py": "import ascproxy.errors",
        "model/__init__.py": "",
    }
    ABOVE = "floors: imports go down only"
    SIM = "the simulator knows"
    NO_IO = "decisions do no I/O"
    LEAN = "workers carry no"

    def lint(self, folder: Path, changes: dict[str, str]) -> list[str]:
        """The names of the contracts that the tree, with these modules changed or added, breaks."""
        for name, text in (self.GOOD | changes).items():
            (folder / "ascproxy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "ascproxy" / name).write_text(text)
        shutil.copy(ROOT / "pyproject.toml", folder)
        done = subprocess.run(
            [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        broken = re.findall(r"^(.+) BROKEN$", done.stdout, re.MULTILINE)
        assert re.search(r"Contracts: \d+ kept", done.stdout), done.stdout + done.stderr
        assert bool(broken) == bool(done.returncode)
        return broken

    def test_good_code_keeps_every_contract(self, tmp_path: Path) -> None:
        assert self.lint(tmp_path, {}) == []

    @pytest.mark.parametrize(
        ("module", "text", "contract"),
        [
            ("auth/__init__.py", "import ascproxy.gateway", ABOVE),
            ("model/__init__.py", "import ascproxy.telemetry", ABOVE),
            ("auth/__init__.py", "import ascproxy.policy", ABOVE),
            ("wire/__init__.py", "import ascproxy.model", ABOVE),
            ("worker/loop.py", "import ascproxy.supervisor", ABOVE),
            ("utils.py", "", ABOVE),
            ("sim/__init__.py", "import ascproxy.telemetry", SIM),
            ("wire/openai.py", "import asyncio", NO_IO),
            ("model/__init__.py", "import ssl", NO_IO),
            ("policy/evaluate.py", "from time import monotonic", NO_IO),
            ("worker/loop.py", "import ascproxy.config", LEAN),
            ("worker/loop.py", "def f():\n    import yaml", LEAN),
        ],
    )
    def test_each_rule_bites(self, tmp_path: Path, module: str, text: str, contract: str) -> None:
        assert any(name.startswith(contract) for name in self.lint(tmp_path, {module: text}))


def test_the_linter_sees_every_module() -> None:
    """A folder without __init__.py would be importable, and invisible to the contracts."""
    folders = {module.parent for module in (ROOT / "ascproxy").rglob("*.py")}
    assert folders
    assert all((folder / "__init__.py").exists() for folder in folders), folders


def test_a_worker_loads_no_heavy_library() -> None:
    """DESIGN 2: memory; what import-linter holds for our imports, this holds for those of the libraries too."""
    code = """
import importlib, pkgutil, sys
import ascproxy.worker
for module in pkgutil.walk_packages(ascproxy.worker.__path__, "ascproxy.worker."):
    importlib.import_module(module.name)
print(*{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ascproxy" in loaded
    heavy = {"pydantic", "fastapi", "typer", "rich", "yaml", "hypercorn", "opentelemetry", "cryptography"}
    assert loaded.isdisjoint(heavy)


class TestCommands:
    def test_documents_name_only_commands_that_exist(self) -> None:
        listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"^  make ([a-z-]+) ", listed, re.MULTILINE))
        assert {"run", "test", "check", "bench", "fuzz", "help"} <= known
        for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
            named = set(re.findall(r"(?:^ *|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
            assert named <= known, document

    def test_documents_point_to_files_that_exist(self) -> None:
        for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
            for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
                assert (document.parent / target).exists(), (document, target)


class TestBareMachine:
    """tools/packages and setup.py on a machine that lacks things; programs are stood in for by a folder as PATH."""

    def packages(
        self, folder: Path, *, user: int, have: tuple[str, ...], python: str = "python3"
    ) -> subprocess.CompletedProcess[str]:
        programs = {
            "id": f"echo {user}",
            "apt-get": 'echo "apt-get $*"',
            "python3": f'exec {sys.executable} "$@"',
            "cc": "exit 0",
        }
        for name in have:
            (folder / name).write_text(f"#!/bin/sh\n{programs[name]}\n")
            (folder / name).chmod(0o755)
        shell = shutil.which("sh")
        assert shell is not None
        return subprocess.run(
            [shell, ROOT / "tools/packages", "build"],
            env={"PATH": str(folder), "PYTHON": python},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_a_complete_machine_is_left_alone(self, tmp_path: Path) -> None:
        done = self.packages(tmp_path, user=1000, have=("id", "apt-get", "python3", "cc"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_a_user_gets_one_apt_line_and_nothing_is_installed(self, tmp_path: Path) -> None:
        done = self.packages(tmp_path, user=1000, have=("id", "apt-get", "python3"))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "Missing here: gcc libc6-dev libssl-dev libnghttp2-dev. "
            "As root: apt-get update && apt-get install -y --no-install-recommends "
            "gcc libc6-dev libssl-dev libnghttp2-dev\n"
        )

    def test_root_installs_what_is_missing_and_only_that(self, tmp_path: Path) -> None:
        done = self.packages(tmp_path, user=0, have=("id", "apt-get", "python3"))
        assert done.returncode == 0
        assert done.stdout.splitlines()[1:] == [
            "apt-get update -q",
            "apt-get install -q -y --no-install-recommends gcc libc6-dev libssl-dev libnghttp2-dev",
        ]

    def test_a_machine_without_apt_gets_the_dnf_line(self, tmp_path: Path) -> None:
        done = self.packages(tmp_path, user=0, have=("id", "python3"))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "Missing here: gcc openssl-devel libnghttp2-devel. "
            "As root: dnf install -y gcc openssl-devel libnghttp2-devel\n"
        )

    def test_an_interpreter_that_is_not_there_is_named_and_not_installed(self, tmp_path: Path) -> None:
        done = self.packages(tmp_path, user=0, have=("id", "apt-get", "cc"), python="python3.12")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "There is no python3.12 here (PYTHON names the interpreter to use).\n"

    def test_a_build_without_compiler_names_the_packages(self, tmp_path: Path) -> None:
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        (tmp_path / "native").mkdir()
        (tmp_path / "native/py_probe.c").write_text("")
        (tmp_path / "README.md").write_text("")
        (tmp_path / "ascproxy").mkdir()
        (tmp_path / "ascproxy/__init__.py").write_text('__version__ = "0"')
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=tmp_path,
            env=os.environ | {"CC": "no-such-cc"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "no C compiler (no-such-cc): apt-get install gcc  |  dnf install gcc" in done.stderr
        assert "Traceback" not in done.stderr
