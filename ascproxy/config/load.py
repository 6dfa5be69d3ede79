"""Read both files and check their shape: keys, kinds, units, ranges. Every finding of both at once.

pydantic decides; its errors become sentences here, at the border, with the line that they are about.
"""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ascproxy.config.document import Document, Location, read, under
from ascproxy.config.finding import Finding
from ascproxy.config.schema import PRINTABLE, LimitsSection, NodeFile, ResourcesFile, Section
from ascproxy.config.units import show_size
from ascproxy.errors import UsageError

NODE_FILE = "ascproxy.yaml"
MAX_SHOWN = 80  # characters of a value that a sentence repeats
S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class Sheet(Generic[S]):
    """One file: the text with its places, and its section tree, None if the shape is wrong."""

    document: Document
    section: S | None


@dataclass(frozen=True, slots=True)
class Sheets:
    """The node file and the resources file that it names, None if it names none or cannot be read."""

    node: Sheet[NodeFile]
    resources: Sheet[ResourcesFile] | None

    @property
    def findings(self) -> list[Finding]:
        """All findings so far, in the order of the files' lines."""
        documents = [self.node.document, *([self.resources.document] if self.resources else [])]
        return [f for d in documents for f in sorted(d.findings, key=lambda f: (f.line, f.column, f.path))]


def find(target: Path) -> Path:
    """The absolute path of the node file: ``target`` itself, or ``ascproxy.yaml`` in it.

    The same however the folder is spelled, so that every command means the same service. A file that is a link stays
    one: relative paths start where it was put, not where its content is kept. Raises :class:`UsageError` if there is
    none.
    """
    named = target / NODE_FILE if os.path.isdir(target) else target  # noqa: PTH112 - Path.is_dir raises EACCES
    file = Path(os.path.realpath(named.parent), named.name)
    if not os.path.lexists(file):
        raise UsageError(f"there is no {file}; name a node file or its folder, or make one with: ascproxy init DIR")
    return file


def load(target: Path) -> Sheets:
    """Both files of ``target`` (a node file or its folder). Raises :class:`UsageError` if the node file cannot be read;
    everything else is a finding."""
    node_document = read(find(target))
    node = shape(node_document, NodeFile)
    named = node_document.data.get("resources") if isinstance(node_document.data, dict) else None
    if not isinstance(named, str) or not named:
        return Sheets(node, None)
    try:
        document = read(under(node_document.file.parent, named))
    except UsageError as error:
        node_document.report(("resources",), f"{error}; correct the path or remove the key")
        return Sheets(node, None)
    return Sheets(node, shape(document, ResourcesFile))


def shape(document: Document, kind: type[S]) -> Sheet[S]:
    """Validate ``document`` as ``kind``; what is wrong becomes findings of the document."""
    if document.data is None and document.findings:
        return Sheet(document, None)
    data = {} if document.data is None else document.data
    try:
        return Sheet(document, kind.model_validate(data))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _report(document, kind, detail)
        return Sheet(document, None)


def _report(document: Document, kind: type[Section], detail: ErrorDetails) -> None:
    location: Location = detail["loc"]
    if location and location[-1] == "[key]":
        document.report(location[:-1], _name_reason(str(location[-2])), at_key=True)
    elif detail["type"] == "extra_forbidden":
        document.report(location, _unknown_key(str(location[-1]), _section_at(kind, location[:-1])), at_key=True)
    elif detail["type"] == "missing":
        document.report(location, _missing(_section_at(kind, location[:-1]), str(location[-1])), at_key=True)
    else:
        document.report(location, reason(detail))


def reason(detail: ErrorDetails) -> str:
    """What a value should be, for the kinds of error that the schema can produce."""
    kind, context, value = detail["type"], detail.get("ctx") or {}, detail["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return _pattern_reason(str(context["pattern"]), str(value))
    if kind == "enum":
        return f"{_what(value)}, not one of: {str(context['expected']).replace(chr(39), '')}"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = context["ge"] if "ge" in context else context["le"]
        if isinstance(value, str):  # a size, as it was written
            bound = show_size(int(bound))
        return (
            f"is too {'small' if 'ge' in context else 'large'}; the {'least' if 'ge' in context else 'most'} is {bound}"
        )
    if kind in ("too_short", "string_too_short"):
        return "is empty; " + ("name at least one" if isinstance(value, list) else "write something or remove the key")
    if kind == "string_too_long":
        return f"is longer than {context['max_length']} characters"
    return f"{_what(value)}; {_WANTED.get(kind, detail['msg'].lower())}"


_WANTED = {
    "string_type": "put text in quotes",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "int_type": "write a whole number without quotes",
    "int_from_float": "write a whole number",
    "list_type": "write a list: one item per line, each after a dash, or [a, b]",
    "dict_type": "write keys and values below it, or {}",
    "model_type": "write keys and values below it, or {}",
    "model_attributes_type": "write keys and values below it, or {}",
}


def _what(value: object) -> str:
    if value is None:
        return "is empty"
    if isinstance(value, bool):
        return f"is the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"is the number {value}"
    if isinstance(value, str):
        return f"is the text {_quoted(value)}"
    return "is a list" if isinstance(value, Sequence) else "is a mapping" if isinstance(value, Mapping) else "is wrong"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "...")


def _name_reason(name: str) -> str:
    return f"{_quoted(name)} is no name: up to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit"


def _pattern_reason(pattern: str, value: str) -> str:
    if pattern.startswith("^[A-Za-z0-9]["):
        return _name_reason(value)
    if pattern == PRINTABLE:
        return f"{_quoted(value)} contains a control character; remove it"
    return f"{_quoted(value)} is no header name: lower-case letters, digits, '-' and '_', with at most one '*'"


def _unknown_key(key: str, section: type[Section]) -> str:
    if key in LimitsSection.model_fields and issubclass(LimitsSection, section):
        return f"{key} counts for the whole node; move it to limits at the top of the file"
    known = [field.alias or name for name, field in section.model_fields.items()]
    if not known:
        return f"unknown key {_quoted(key)}; nothing is set here yet, write {{}}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
    return f"unknown key {_quoted(key)}; {hint}"


def _missing(section: type[Section], key: str) -> str:
    description = next((f.description for n, f in section.model_fields.items() if key in (n, f.alias)), None)
    return f"is missing: {description}"


def _section_at(kind: type[Section], location: Location) -> type[Section]:
    """The section class that the schema has at ``location``."""
    current: Any = kind
    for part in location:
        if get_origin(current) is None:  # a section; none of those that hold sections has an alias
            current = _plain(current.model_fields[str(part)].annotation)
        else:  # a list or a mapping by name: what it holds
            current = _plain(get_args(current)[-1])
    assert isinstance(current, type) and issubclass(current, Section)
    return current


def _plain(annotation: Any) -> Any:
    """``annotation`` without ``| None``."""
    if get_origin(annotation) is types.UnionType:
        return next(a for a in get_args(annotation) if a is not types.NoneType)
    return annotation
