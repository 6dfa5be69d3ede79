"""The reference pages are what the code says, and every example of the documents is one that works."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from ascproxy import _native
from ascproxy.cli.app import application
from ascproxy.config.finding import Severity
from ascproxy.gateway.refusal import CATALOGUE
from ascproxy.net import authority
from tests.kit.certificates import Authority
from tests.kit.config import findings

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NODE = {"node": "n", "listeners": [{"address": "127.0.0.1:8080"}]}


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of every fenced block of a language."""
    return [
        (str(page.relative_to(ROOT)), found[1])
        for page in PAGES
        for found in re.finditer(
            rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    ]


def test_the_pages_are_current(reference: ModuleType) -> None:
    for name, text in reference.pages().items():
        found = (ROOT / "docs/reference" / name).read_text(encoding="utf-8")
        assert found == text, f"docs/reference/{name} is not current: python tools/reference.py"


def test_every_key_and_option_is_on_its_page(reference: ModuleType) -> None:
    page = reference.configuration()
    for kind in (reference.NodeFile, reference.ResourcesFile):
        for path, section in reference.sections(kind):
            assert not path or f"### `{path}`" in page
            for name, field in section.model_fields.items():
                assert f"| `{field.alias or name}` | " in page
        shown = {section.__name__ for _, section in reference.sections(kind)}
        sections = {name for name, each in kind.model_json_schema()["$defs"].items() if each["type"] == "object"}
        assert shown == sections | {kind.__name__}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the examples refer to."""
    (tmp_path / "tls").mkdir()
    (tmp_path / "keys").mkdir()
    made = authority.create(tmp_path / "tls", ["localhost"], now=datetime.now(UTC))
    for name in ("server-rsa", "wild"):
        shutil.copy(made.certificate, tmp_path / "tls" / f"{name}.crt")
        shutil.copy(made.key, tmp_path / "tls" / f"{name}.key")
    clients = Authority(tmp_path / "tls", "clients")
    (tmp_path / "tls" / "clients.crl").write_bytes(clients.revoke())
    (tmp_path / "tls" / "tickets").touch(0o600)
    (tmp_path / "tls" / "tickets").write_text("ab" * 32 + "\n")
    (tmp_path / "keys" / "rack-a").write_text("secret")
    (tmp_path / "keys" / "rack-a").chmod(0o600)
    return tmp_path


YAML = blocks("yaml")


@pytest.mark.parametrize(("page", "text"), YAML, ids=[f"{page}:{n}" for n, (page, _) in enumerate(YAML)])
def test_every_example_of_a_file_loads(folder: Path, page: str, text: str) -> None:
    first = text.splitlines()[0]
    assert first in ("# ascproxy.yaml", "# resources.yaml"), f"{page}: say which file it is"
    document: dict[str, Any] = dict(NODE)
    if first == "# ascproxy.yaml":
        # As it is written, with the keys that it leaves out behind it.
        own = yaml.safe_load(text)
        rest = {key: value for key, value in document.items() if key not in own}
        (folder / "ascproxy.yaml").write_text(text + (yaml.safe_dump(rest) if rest else ""))
    else:
        (folder / "ascproxy.yaml").write_text(yaml.safe_dump(document | {"resources": "resources.yaml"}))
        (folder / "resources.yaml").write_text(text)
    found = findings(folder, {}, starting=False)
    assert [str(f) for f in found if f.severity is Severity.ERROR] == []
    assert {f.path for f in found} <= {"credentials.openai.from"}  # which only the unit can see


def test_there_are_examples_of_both_files() -> None:
    assert {text.splitlines()[0] for page, text in YAML if page == "docs/configuration.md"} == {
        "# ascproxy.yaml", "# resources.yaml",
    }  # fmt: skip


LINES = [
    (page, line.strip())
    for language in ("sh", "bash", "console")
    for page, text in blocks(language)
    for line in text.splitlines()
    if re.match(r"\s*(\S*/)?ascproxy ", line)
]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}"[:80] for page, line in LINES])
def test_every_command_line_of_the_documents_parses(page: str, line: str) -> None:
    command: Any = typer.main.get_command(application())
    words = shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    with command.make_context("ascproxy", [word for word in words if word != "&"]) as context:
        assert context.params


def test_every_limit_is_on_its_page_with_a_code_of_the_catalogue(reference: ModuleType) -> None:
    assert set(reference.SEEN) == set(_native.LIMIT_NAMES)
    assert {code for _, code, _ in reference.SEEN.values()} - {"-"} <= set(CATALOGUE)
    page = reference.limits()
    for name in _native.LIMIT_NAMES:
        assert page.count(f"\n| `{name}` | ") == 1


def test_every_key_of_a_limit_can_trip_or_is_known_not_to(reference: ModuleType) -> None:
    """A limit that is added to the schema must be counted when it is reached."""
    quiet = {"trusted_peers", "memory_limit", "drain_unary", "drain_stream"}
    # what a client is told and has to keep to, and how fast what tripped is forgiven
    quiet |= {"h2_stream_window", "h2_connection_window", "h2_frame", "h2_table", "h2_resets_rate", "h2_glitches_rate"}
    sections = (reference.LimitsSection, reference.TimeoutsSection, reference.RouteLimitsSection)
    keys = {name for section in sections for name in section.model_fields}
    assert keys - quiet | set(reference.MEMORY_STEPS) | set(reference.PROXY_REASONS) == set(_native.LIMIT_NAMES)
