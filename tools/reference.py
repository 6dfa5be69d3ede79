"""Write ``docs/reference``: the pages of both files and of the command line, and the JSON Schemas.

Everything in them comes from the schema, the nouns and the commands themselves; a test holds the pages to it. Run it
after changing a key, a default or a command: ``python tools/reference.py``.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from ascproxy.cli.app import application
from ascproxy.config.schema import NodeFile, ResourcesFile, Section
from ascproxy.config.units import show_size, show_time
from ascproxy.model.node import Limits
from ascproxy.model.provider import UpstreamTimeouts
from ascproxy.model.route import Route

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
MADE = "<!-- made by tools/reference.py: change the schema or the command, then run it -->\n"
HIDDEN = {"help"}
UNITS = """\
Times are a whole number with `ms`, `s`, `m`, `h` or `d`, sizes with `B`, `KiB`, `MiB` or `GiB`. An unknown key, a key
written twice and a value of the wrong kind are errors; all findings of both files are shown at once. `yes`, `on` and
`0777` are texts; there are no tags and no merge keys.
"""


def noun_defaults() -> dict[str, dict[str, str]]:
    """Section class -> key -> its default, for those that the schema leaves to the nouns."""
    limits = {f.name.removesuffix("_ms"): _shown(f.name, f.default) for f in fields(Limits)}
    timeouts = {f.name.removesuffix("_ms"): _shown(f.name, f.default) for f in fields(UpstreamTimeouts)}
    route = next(f for f in fields(Route) if f.name == "max_body")
    return {
        "LimitsSection": limits,
        "ListenerLimitsSection": dict.fromkeys(limits, "the node's"),
        "TimeoutsSection": timeouts,
        "RouteLimitsSection": {
            "max_body": _shown("max_body", route.default),
            **dict.fromkeys(("first_byte", "between_tokens", "total"), "the provider's"),
        },
        "NodeFile": {"workers": "`auto`"},
    }


def _shown(name: str, value: Any) -> str:
    if name.endswith("_ms"):
        return f"`{show_time(value)}`"
    counts = ("connection_requests", "max_fields", "json_depth", "json_keys", "json_digits", "max_connections")
    return f"`{value}`" if name in counts else f"`{show_size(value)}`"


def sections(kind: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """Every section of a file with its path, in reading order: ``listeners[].tls``, ``routes.NAME.targets[]``."""

    def inside(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
        yield path, section
        for name, field in section.model_fields.items():
            found = _section(field.annotation)
            if found is not None:
                deeper, suffix = found
                yield from inside(deeper, f"{path}.{field.alias or name}{suffix}".lstrip("."))

    return inside(kind, "")


def _section(annotation: Any) -> tuple[type[Section], str] | None:
    """The section class in an annotation, and how its path goes on: ``[]`` for lists, ``.NAME`` for mappings."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    inner: tuple[Any, ...] = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) in (list, dict) and (found := _section(inner[-1])):
        return found[0], "[]" if annotation.__origin__ is list else ".NAME"
    return next((found for each in inner if (found := _section(each))), None)


def key_rows(section: type[Section]) -> Iterator[str]:
    """The table of a section."""
    usual = noun_defaults().get(section.__name__, {})
    yield "| key | default | is |"
    yield "|---|---|---|"
    for name, field in section.model_fields.items():
        key = field.alias or name
        if field.is_required():
            default = "required"
        elif name in usual:
            default = usual[name]
        else:
            default = f"`{field.default}`" if isinstance(field.default, str) else "-"
            default = f"`{str(field.default).lower()}`" if isinstance(field.default, bool) else default
        yield f"| `{key}` | {default} | {field.description} |"


def configuration() -> str:
    """The page of both files."""
    lines = ["# Configuration reference", "", MADE, UNITS]
    for title, kind, schema in (
        ("`ascproxy.yaml`", NodeFile, "ascproxy.schema.json"),
        ("`resources.yaml`", ResourcesFile, "resources.schema.json"),
    ):
        lines += [f"## {title}", "", f"JSON Schema for editors: [{schema}]({schema})", ""]
        for path, section in sections(kind):
            if path:
                lines += [f"### `{path}`", ""]
            lines += [" ".join((section.__doc__ or "").split()), ""]
            if section.model_fields:
                lines += [*key_rows(section), ""]
    return "\n".join(lines).rstrip() + "\n"


def schema(kind: type[Section]) -> str:
    """The JSON Schema of a file (draft 2020-12)."""
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema(by_alias=True)}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def commands(group: Any, name: str = "ascproxy") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, as ``--help`` lists them."""
    for each, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {each}")
        else:
            yield f"{name} {each}", command


def command_line() -> str:
    """The page of the command line."""
    root: Any = typer.main.get_command(application())
    lines = ["# Command line reference", "", MADE]
    lines += [
        "Exit status: 0 fine, 1 findings or refused, 2 usage or unreadable, 3 not running. Errors are sentences on",
        "standard error. `ascproxy --version` prints the version, `--help` (`-h`) of a command what is written here.",
        "",
    ]
    for name, command in commands(root):
        text, _, examples = (command.help or "").partition("[bold]Examples[/bold]")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name not in HIDDEN]
        shown = [a.metavar or str(a.name).upper() for a in arguments]
        usage = " ".join([name, *(s if a.required else f"[{s}]" for s, a in zip(shown, arguments, strict=True))])
        lines += [f"## `{usage}`", "", " ".join(text.split()), ""]
        lines += ["```sh", *(line.strip() for line in examples.splitlines() if line.strip()), "```", ""]
        if command.epilog:
            lines += [" ".join(command.epilog.split()), ""]
        lines += ["| argument or option | default | is |", "|---|---|---|"]
        for text_of, parameter in zip(shown, arguments, strict=True):
            default = "required" if parameter.required else "`.`"
            lines.append(f"| `{text_of}` | {default} | {parameter.help} |")
        lines += [_option_row(option) for option in options]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _option_row(option: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    text = re.sub(r"\s+", " ", option.help or "").replace("|", "\\|")
    if isinstance(option.default, Enum):
        text += " One of " + ", ".join(f"`{each.value}`" for each in type(option.default)) + "."
    if option.multiple:
        text += " May be repeated."
    value = option.default
    if option.required:
        default = "required"
    elif isinstance(option.show_default, str):
        default = f"`{option.show_default}`"
    elif option.is_flag or value in (None, [], ()) or callable(value):
        default = "-"
    else:
        default = f"`{shlex.quote(str(getattr(value, 'value', value)))}`"
    return f"| {flags} | {default} | {text} |"


def pages() -> dict[str, str]:
    """File name in ``docs/reference`` -> its text."""
    return {
        "configuration.md": configuration(),
        "cli.md": command_line(),
        "ascproxy.schema.json": schema(NodeFile),
        "resources.schema.json": schema(ResourcesFile),
    }


def main() -> int:
    """Write every page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
