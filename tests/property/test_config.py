"""Whatever bytes a configuration is: findings or a UsageError, never another exception, never more than a bound."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ascproxy.config.compile import compile_files
from ascproxy.config.document import MAX_DEPTH, MAX_VALUES, parse
from ascproxy.config.finding import InvalidConfigError
from ascproxy.config.schema import NodeFile, ResourcesFile
from ascproxy.errors import UsageError
from ascproxy.model.snapshot import decode, encode


def keys() -> list[str]:
    """Every key of both files, so that what is made at random is often nearly right."""
    found = set()
    for kind in (NodeFile, ResourcesFile):
        schema = kind.model_json_schema(by_alias=True)
        for section in (schema, *schema["$defs"].values()):
            found |= set(section.get("properties", {}))
    return sorted(found)


VALUES = [
    "n", "auto", "stdout", "127.0.0.1:80", "[::1]:80", "unix:x", "0.0.0.0:1", "file:x",
    "env:HOME", "systemd:a", "http://h",
    "https://[::1", "http://h:99999", "~x/y", "~", "10s", "1KiB", "64GiB", "m*", "vllm", "",
    ".", "..", "/", "x" * 300, "\0", "ü", "\ud800",
]  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(VALUES), st.text(max_size=8))
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(keys()), st.text(max_size=4)), inner, max_size=5),
    ),
    max_leaves=25,
)
BYTES = settings(max_examples=300, deadline=2_000, suppress_health_check=[HealthCheck.too_slow])


def survives(node: bytes, resources: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ascproxy.yaml").write_bytes(node)
        (Path(folder) / "resources.yaml").write_bytes(resources)
        try:
            compiled = compile_files(Path(folder), {})
        except UsageError:
            return
        except InvalidConfigError as error:
            assert error.findings
            for finding in error.findings:
                lines = (Path(finding.file).read_bytes() + b"\n").decode(errors="replace").split("\n")
                assert 1 <= finding.line <= len(lines) + 1
                assert finding.column >= 1
                assert len(str(finding).splitlines()) == 1
                str(finding).encode()
            return
        assert decode(encode(compiled.snapshot)) == compiled.snapshot


@BYTES
@given(st.binary(max_size=200), st.binary(max_size=200))
@example(b"node: n\nlisteners: [{address: 'unix:x'}]\nresources: resources.yaml\n", b"tenants: {}")
def test_any_bytes(node: bytes, resources: bytes) -> None:
    survives(node, resources)


@BYTES
@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,?~ \n\t<\\uD8", max_size=120))
def test_any_text_of_the_characters_that_yaml_knows(text: str) -> None:
    survives(text.encode(), text.encode())
    document = parse(Path("x"), text.encode())
    assert len(document.values) <= MAX_VALUES
    assert all(len(location) <= MAX_DEPTH + 1 for location in document.values)


@BYTES
@given(DOCUMENTS, DOCUMENTS)
def test_any_document_of_nearly_right_keys(node: object, resources: object) -> None:
    if isinstance(node, dict):
        node["resources"] = "resources.yaml"
    survives(*(yaml.safe_dump(each, allow_unicode=False).encode(errors="replace") for each in (node, resources)))


@BYTES
@given(DOCUMENTS, st.sampled_from([k for k in NodeFile.model_fields if k != "resources"]))
def test_a_right_file_with_one_value_that_is_anything(value: object, key: str) -> None:
    right: dict[str, object] = {"node": "n", "listeners": [{"address": "unix:x"}]}
    survives(yaml.safe_dump(right | {key: value}).encode(errors="replace"), b"")
