"""The subset of YAML: what it means, what is refused, where, and that a small file stays small."""

# ruff: noqa: E501 - a case is a line

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ascproxy.config import document as documents
from ascproxy.config.document import MAX_DEPTH, MAX_VALUES, Document, Place, parse, read, show, under
from ascproxy.errors import UsageError
from tests.kit.config import unmarked

FILE = Path("/d/f.yaml")


def parsed(text: str | bytes) -> Document:
    return parse(FILE, text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", None),
        ("# nothing\n", None),
        ("a: true\nb: false", {"a": True, "b": False}),
        ("a: yes\nb: no\nc: on\nd: True", {"a": "yes", "b": "no", "c": "on", "d": "True"}),
        ("a: 0777\nb: 0x1f\nc: 12:30\nd: 1_000", {"a": "0777", "b": "0x1f", "c": "12:30", "d": "1_000"}),
        ("a: 10\nb: -1\nc: 1.5\nd: 1e3\ne: .inf\nf: 0", {"a": 10, "b": -1, "c": 1.5, "d": "1e3", "e": ".inf", "f": 0}),
        ("a: 9999999999999999999", {"a": "9999999999999999999"}),
        ("a: 2027-01-01", {"a": "2027-01-01"}),
        ("a: null\nb: ~\nc:", {"a": None, "b": None, "c": None}),
        ("a: 'true'\nb: \"10\"\nc: |\n  5\n", {"a": "true", "b": "10", "c": "5\n"}),
        ("1: a\ntrue: b", {"1": "a", "true": "b"}),
        ("[a, {b: c}]", ["a", {"b": "c"}]),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("\ufeffa: b", {"a": "b"}),
    ],
)
def test_what_texts_mean(text: str, data: Any) -> None:
    document = parsed(text)
    assert document.findings == []
    assert document.data == data
    assert repr(document.data) == repr(data)  # 1 is not True


@pytest.mark.parametrize(
    ("text", "path", "sentence"),
    [
        ("a: 1\n»a: 2\n", "a", "is written twice, first on line 1; remove one of them"),
        ("a: 1\n»'a': 2\n", "a", "is written twice, first on line 1; remove one of them"),
        ("a:\n  b: {c: 1, »c: 2}\n", "a.b.c", "is written twice, first on line 2; remove one of them"),
        ("a: »!!python/object:os.system x\n", "a", "the tag !!python/object:os.system is not supported; remove it"),
        ("a: »!!str 10\n", "a", "the tag !!str is not supported; remove it"),
        ("a: »!secret x\n", "a", "the tag !secret is not supported; remove it"),
        ("a: »!!set {x, y}\n", "a", "the tag !!set is not supported; remove it"),
        ("a: &x {b: 1}\nc:\n  »<<: *x\n", "c", "merge keys (<<) are not supported; write the keys out"),
        ("»[a]: 1\n", "", "a key must be a plain name"),
        ("? »{a: b}\n: 1\n", "", "a key must be a plain name"),
        ('»"\\uD800": 1\n', "", "a key must be a plain name"),
        ('a: »"x\\uDFFF"\n', "a", "contains half a character (\\uD800 to \\uDFFF)"),
        ("a: »&x [*x]\n", "a[0]", "contains itself"),
    ],
)
def test_what_is_refused_and_where(text: str, path: str, sentence: str) -> None:
    clean, places = unmarked(text)
    findings = parsed(clean).findings
    assert [((f.line, f.column), f.path, f.reason) for f in findings] == [(places[0], path, sentence)]


@pytest.mark.parametrize(
    ("text", "line", "column", "sentence"),
    [
        ("a: [1, 2\n", 2, 1, "is not YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence that starts on line 1)"),
        ("a: 'x\n", 2, 1, "is not YAML: found unexpected end of stream (while scanning a quoted scalar that starts on line 1)"),
        ("a:\n\tb: 1\n", 2, 1, "is not YAML: found character '\\t' that cannot start any token; indent with spaces"),
        ("a: *x\n", 1, 4, "is not YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 2\n", 2, 1, "is not YAML: but found another document (expected a single document in the stream that starts on line 1)"),
        (b"a: b\n\xc3\xbc: \xff\n", 2, 4, "is not UTF-8 text: a byte 0xff"),
        ("a: b\nü: \x00\n", 2, 4, "is not YAML: a control character 0x00; remove it"),
        ("a: b\nü: \x1b[0m\n", 2, 4, "is not YAML: a control character 0x1b; remove it"),
        ("a: b\n".encode("utf-16"), 1, 1, "is not UTF-8 text: a byte 0xff"),
    ],
)  # fmt: skip
def test_what_is_no_yaml(text: str | bytes, line: int, column: int, sentence: str) -> None:
    document = parsed(text)
    assert document.data is None
    (finding,) = document.findings
    assert (finding.line, finding.column) == (line, column)
    assert finding.reason == sentence


def test_depth_is_bounded_whole_and_exactly() -> None:
    deep = parsed("[" * MAX_DEPTH + "x" + "]" * MAX_DEPTH)
    assert deep.findings == []
    deeper = parsed("[" * (MAX_DEPTH + 1) + "x" + "]" * (MAX_DEPTH + 1))
    assert [f.reason for f in deeper.findings] == [f"is nested deeper than {MAX_DEPTH} levels"]
    deepest = parsed("[" * 100_000)
    assert [f.reason for f in deepest.findings] == [f"is nested deeper than {MAX_DEPTH} levels"]


def test_aliases_cannot_make_a_large_document_of_a_small_file() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    document = parsed("\n".join(lines))
    assert [f.reason for f in document.findings] == [f"the file has more than {MAX_VALUES} values, aliases expanded"]
    assert len(document.values) <= MAX_VALUES + 10_000


def test_places_of_keys_values_and_of_what_is_not_there() -> None:
    document = parsed("a:\n  - b: 1\n    c: [2,\n      3]\n")
    assert document.place(("a", 0, "c", 1)) == Place(4, 7)
    assert document.place(("a", 0, "c"), at_key=True) == Place(3, 5)
    assert document.place(("a", 0, "missing")) == Place(2, 5)
    assert document.place(("nowhere", 1)) == Place(1, 1)


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ((), ""),
        (("listeners", 0, "tls", "key"), "listeners[0].tls.key"),
        (("routes", "a.b", "models"), 'routes["a.b"].models'),
        (("a", 'say "x"\n\x1b[0m'), 'a["say \\"x\\"\\n\\u001b[0m"]'),
        (("a", "ü x"), 'a["ü x"]'),
    ],
)
def test_paths(location: tuple[str | int, ...], text: str) -> None:
    assert show(location) == text


def test_files_that_cannot_be_read_are_one_sentence_each(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, why in {
        "absent": "no such file or directory",
        "": "it is a folder",
        "pipe": "it is no regular file",
        "loop": "too many levels of symbolic links",
        "x" * 300: "file name too long",
    }.items():
        with pytest.raises(UsageError) as refused:
            read(tmp_path / name)
        assert str(refused.value) == f"cannot read {tmp_path / name}: {why}"


def test_a_file_without_end_is_not_read_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 1 << 20)
    (tmp_path / "f").write_bytes(b"#" * (1 << 20) + b"\n")
    (finding,) = read(tmp_path / "f").findings
    assert finding.reason == "is larger than 1MiB; is this the right file?"


def test_paths_start_at_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    folder = Path("/etc/gateway")
    assert [str(under(folder, p)) for p in ("a/b", "/a/b", "~/a", "~nobody-of-this-name/a")] == [
        "/etc/gateway/a/b", "/a/b", "/home/me/a", "/etc/gateway/~nobody-of-this-name/a",
    ]  # fmt: skip
