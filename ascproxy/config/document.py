"""One YAML file as plain data, and where each value of it was written.

A strict subset of YAML 1.2: ``true`` and ``false`` are the only booleans (``yes`` is text), numbers are decimal
(``0777`` and ``12:30`` are text, not octal and sexagesimal numbers), there are no dates, tags or merge keys, and a
mapping that repeats a key is refused. Aliases are expanded, at most :data:`MAX_VALUES` values in all, so that a small
file cannot become a large one.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import yaml

from ascproxy.config.finding import Finding, Severity
from ascproxy.errors import UsageError

Location: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 16 * 1024 * 1024
MAX_VALUES = 200_000
MAX_DEPTH = 32

_INT = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)\.[0-9]+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # YAML's escapes can write them; no file name or UTF-8 text can
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True, slots=True)
class Place:
    """Line and column, from 1."""

    line: int
    column: int


START = Place(1, 1)


@dataclass(slots=True)
class Document:
    """A parsed file. ``values`` and ``keys`` tell where the value at a location begins, and where its key does."""

    file: Path
    data: Any = None
    values: dict[Location, Place] = field(default_factory=dict)
    keys: dict[Location, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def report(
        self, location: Location, reason: str, severity: Severity = Severity.ERROR, *, at_key: bool = False
    ) -> None:
        """Note a finding at ``location``, or at the nearest place around it that was written down."""
        self._note(self.place(location, at_key=at_key), location, reason, severity)

    def place(self, location: Location, *, at_key: bool = False) -> Place:
        """Where the value (or its key) at ``location`` begins; the enclosing key's place if it is not there."""
        if at_key and location in self.keys:
            return self.keys[location]
        if location in self.values:
            return self.values[location]
        while location:
            location = location[:-1]
            if found := self.keys.get(location) or self.values.get(location):
                return found
        return START

    def _note(self, place: Place, location: Location, reason: str, severity: Severity = Severity.ERROR) -> None:
        self.findings.append(Finding(severity, str(self.file), place.line, place.column, show(location), reason))


def read(file: Path) -> Document:
    """Parse ``file``. Mistakes of YAML become findings of the document; raises :class:`UsageError` if it cannot be
    read at all."""
    try:
        with open_file(file) as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {(error.strerror or str(error)).lower()}") from error
    return parse(file, raw)


def open_file(path: Path) -> BinaryIO:
    """``path``, opened for reading. Raises OSError, also for what is no regular file: a pipe that nobody writes to
    would keep us waiting (O_NONBLOCK, fifo(7)), a device has no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(0, "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    return os.fdopen(descriptor, "rb")


def under(folder: Path, path: str) -> Path:
    """``path`` from ``folder``, unless it is absolute. ``~`` and ``~user`` are homes, where there are such."""
    return folder / os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises where there is no such user


def parse(file: Path, raw: bytes) -> Document:
    """The document in ``raw``; ``data`` is None when it has no value or is not YAML."""
    document = Document(file)
    if len(raw) > MAX_BYTES:
        document.report((), f"is larger than {MAX_BYTES >> 20}MiB; is this the right file?")
        return document
    try:
        text = raw.decode("utf-8-sig")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        document._note(_place_in(raw[: error.start]), (), f"is not UTF-8 text: a byte {raw[error.start]:#04x}")
    except yaml.reader.ReaderError as error:  # its position counts characters
        place = _place_in(text[: int(error.position)].encode())
        document._note(place, (), f"is not YAML: a control character {int(error.character):#04x}; remove it")
    except yaml.MarkedYAMLError as error:
        document._note(_place(error.problem_mark or error.context_mark), (), _yaml_reason(error))
    except RecursionError:
        document.report((), f"is nested deeper than {MAX_DEPTH} levels")
    else:
        if node is not None:
            document.data = _Builder(document).build(node, (), 0)
    return document


def show(location: Location) -> str:
    """``("routes", "chat", "targets", 0)`` as ``routes.chat.targets[0]``; a name that is not plain goes in quotes."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part, ensure_ascii=not part.isprintable())}]"
    return text


class _Builder:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.left = MAX_VALUES
        self.open: set[int] = set()
        self.resolver = yaml.resolver.Resolver()

    def build(self, node: yaml.Node, location: Location, depth: int) -> Any:
        document, place = self.document, _place(node.start_mark)
        document.values[location] = place
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH or id(node) in self.open:
            if self.left >= 0:
                why = "contains itself" if id(node) in self.open else f"is nested deeper than {MAX_DEPTH} levels"
                document._note(place, location, why)
            elif self.left == -1:
                document._note(place, location, f"the file has more than {MAX_VALUES} values, aliases expanded")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, location)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            document._note(place, location, f"the tag {_tag(node.tag)} is not supported; remove it")
        self.open.add(id(node))
        built: Any
        if isinstance(node, yaml.MappingNode):
            built = self._mapping(node, location, depth)
        else:
            built = [self.build(item, (*location, i), depth + 1) for i, item in enumerate(node.value)]
        self.open.discard(id(node))
        return built

    def _mapping(self, node: yaml.MappingNode, location: Location, depth: int) -> dict[str, Any]:
        document = self.document
        built: dict[str, Any] = {}
        for key, value in node.value:
            place = _place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode) or _SURROGATE.search(key.value):
                document._note(place, location, "a key must be a plain name")
                continue
            if key.tag == "tag:yaml.org,2002:merge":
                document._note(place, location, "merge keys (<<) are not supported; write the keys out")
                continue
            inner = (*location, key.value)
            if key.value in built:
                document._note(
                    place, inner, f"is written twice, first on line {document.keys[inner].line}; remove one of them"
                )
                continue
            document.keys[inner] = place
            built[key.value] = self.build(value, inner, depth + 1)
        return built

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> Any:
        text: str = node.value
        plain = node.style is None
        resolved = self.resolver.resolve(yaml.ScalarNode, text, (plain, not plain))  # type: ignore[no-untyped-call]
        if node.tag != resolved:
            place = _place(node.start_mark)
            self.document._note(place, location, f"the tag {_tag(node.tag)} is not supported; remove it")
        if _SURROGATE.search(text):
            self.document._note(_place(node.start_mark), location, "contains half a character (\\uD800 to \\uDFFF)")
            return ""
        if not plain:  # quoted or a block: text, whatever it looks like
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        return text


def _tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _place(mark: yaml.Mark | None) -> Place:
    return START if mark is None else Place(mark.line + 1, mark.column + 1)


def _place_in(before: bytes) -> Place:
    """The place behind ``before``, which is UTF-8."""
    line = before[before.rfind(b"\n") + 1 :]
    return Place(before.count(b"\n") + 1, len(line.decode(errors="replace")) + 1)


def _yaml_reason(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "cannot be parsed"
    reason = f"is not YAML: {problem}"
    if "\\t" in problem:
        reason += "; indent with spaces"
    if error.context and error.context_mark and error.problem:
        reason += f" ({error.context} that starts on line {error.context_mark.line + 1})"
    return reason
