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

from ascproxy import _native
from ascproxy.cli.app import application
from ascproxy.config.schema import (
    LimitsSection,
    ListenerLimitsSection,
    NodeFile,
    ResourcesFile,
    RouteLimitsSection,
    Section,
    TimeoutsSection,
)
from ascproxy.config.units import show_size, show_time
from ascproxy.model.node import Limits
from ascproxy.model.provider import UpstreamTimeouts
from ascproxy.model.route import Route

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
MADE = "<!-- made by tools/reference.py: change the schema or the command, then run it -->\n"
HIDDEN = {"help"}
CONNECTIONS = ("max_connections", "max_connections_per_ip", "max_unauthenticated_per_ip")
H2_FLOODS = (
    "h2_resets",
    "h2_continuations",
    "h2_settings",
    "h2_settings_entries",
    "h2_pings",
    "h2_priorities",
    "h2_empty_data",
    "h2_glitches",
    "h2_queued",
)
H2_COUNTS = ("h2_streams", "h2_resets_rate", "h2_glitches_rate", *H2_FLOODS)
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
    if name == "trusted_peers":
        return "none"
    if name == "memory_limit":
        return "the machine's"
    counts = ("connection_requests", "max_fields", "json_depth", "json_keys", "json_digits", *H2_COUNTS, *CONNECTIONS)
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


# What the caller sees of each limit that can trip, its public error code, and what the access line says of it. Where
# there is no request there is no line. Names, defaults, places and meanings come from the schema.
CLOSED = "the connection closes"
SEEN: dict[str, tuple[str, str, str]] = {
    "proxy_untrusted": (CLOSED, "-", "none"),
    "proxy_header": (CLOSED, "-", "none"),
    "tls_handshake": (CLOSED, "-", "none"),
    "header_timeout": ("408, then it closes", "request_timeout", "`limit`, without method and path"),
    "idle_timeout": (CLOSED, "-", "none"),
    "connection_age": ("`Connection: close` in the next answer", "-", "as usual"),
    "connection_requests": ("`Connection: close` in the last answer", "-", "as usual"),
    "body_idle": ("408, then it closes", "request_timeout", "`limit`"),
    "body_min_rate": ("408, then it closes", "request_timeout", "`limit`"),
    "body_total": ("408, then it closes", "request_timeout", "`limit`"),
    "write_stall": ("a reset", "-", "`limit`, outcome `write_stall`"),
    "max_request_line": ("414, then it closes", "uri_too_long", "`limit`, without method and path"),
    "max_field": ("431, then it closes", "headers_too_large", "`limit`, without method and path"),
    "max_head": ("431, then it closes", "headers_too_large", "`limit`, without method and path"),
    "max_fields": ("431, then it closes", "headers_too_large", "`limit`, without method and path"),
    "max_body": ("413, before more is read", "body_too_large", "`limit`"),
    "max_bodies": ("503 with `Retry-After`, then it closes", "overloaded", "`limit`"),
    "max_unauthenticated_body": ("401, before more is read", "invalid_api_key", "`limit`"),
    "max_chunk_extension": ("400, then it closes", "invalid_request", "`limit`"),
    "max_chunk_extensions": ("400, then it closes", "invalid_request", "`limit`"),
    "max_trailers": ("400, then it closes", "invalid_request", "`limit`"),
    "json_depth": ("400", "invalid_request", "`limit`"),
    "json_keys": ("400", "invalid_request", "`limit`"),
    "json_digits": ("400", "invalid_request", "`limit`"),
    "max_connections": (
        "a new connection closes at once; with HTTP/2, 503 with `Retry-After` for a request when connections and "
        "requests under way are twice as many",
        "overloaded",
        "`limit`, where there is a request",
    ),
    "max_connections_per_ip": ("a new connection closes at once", "-", "none"),
    "max_unauthenticated_per_ip": ("a new connection closes at once", "-", "none"),
    "memory_keep_alive": ("`Connection: close` in each answer", "-", "as usual"),
    "memory_refuse": ("503 with `Retry-After`, then it closes", "overloaded", "`limit`"),
    "memory_accept": ("new connections wait, readiness is 503", "-", "none"),
    "h2_streams": ("RST_STREAM REFUSED_STREAM, or GOAWAY PROTOCOL_ERROR", "-", "none"),
    **dict.fromkeys(H2_FLOODS, ("GOAWAY ENHANCE_YOUR_CALM, then it closes", "-", "`limit`, of each request under way")),
    "connect": ("the next target, else 502", "upstream_unreachable", "`limit`"),
    "tls": ("the next target, else 502", "upstream_unreachable", "`limit`"),
    "first_byte": ("504", "upstream_timeout", "`limit`"),
    "between_tokens": ("the answer breaks off", "-", "`limit`, outcome `upstream_timeout`"),
    "total": ("504, or the answer breaks off", "upstream_timeout", "`limit`"),
}
PROXY_REASONS = {
    "proxy_untrusted": "a connection that comes from none of `trusted_peers`",
    "proxy_header": "a connection that begins with no PROXY header, or with one that is malformed",
}
MEMORY_STEPS = {"memory_keep_alive": "85 %", "memory_refuse": "92 %", "memory_accept": "97 %"}
LIMITS_INTRO = """\
Each limit that is reached adds one to `ascproxy_limit_trips_total` with its name as `reason`. Where there is a
request, its access line has the error code as `code` and the name as `limit`; a limit that is reached before there
is one is counted only, so that nobody can fill a log without asking for anything. What `proxy_protocol` refuses is told
by the worker's log, in one line in 10 s at most. A listener's limits win over the node's, a route's over a provider's.
What the codes look like to a caller is on the page of [errors](../errors.md).

Limits of connections and bodies count per worker. Connections per address do, too: the kernel spreads a caller's
connections over the workers, so that a node lets in about `workers` times as many. `max_connections` is never above
half of the descriptors that a worker has after 256 are set aside
([decision 4](../decisions/0004-connections.md)); the soft limit of descriptors is raised to the hard one at the
start. An address has authenticated once a request from it was let through. That is remembered while it has a
connection, and of those that have none for the last 1,024.

A limit that is one of a connection with HTTP/1.1 is one of the stream with HTTP/2: where this page says that the
connection closes after an answer, only the stream ends there. Those that begin with `h2_` count frames of one
connection; what each is there for is in [decision 12](../decisions/0012-http2.md).

`memory_limit` is compared five times a second with the anonymous and shared memory of all processes of the service.
Each step is left 3 points below where it was entered, and keeps what those before it do. Metrics, health and the
management socket are served by another process, which takes part in none of this.
"""


def limits() -> str:
    """The page of limits that can trip."""
    sections: dict[str, type[Section]] = {
        "node": LimitsSection,
        "listener": ListenerLimitsSection,
        "provider": TimeoutsSection,
        "route": RouteLimitsSection,
    }
    usual = noun_defaults()
    lines = ["# Limits", "", MADE, LIMITS_INTRO]
    lines += ["| limit | default | set for | is about | the caller sees | code | access line |", "|---" * 7 + "|"]
    for name in _native.LIMIT_NAMES:
        seen, code, line = SEEN[name]
        code = code if code == "-" else f"`{code}`"
        if name in MEMORY_STEPS:
            row = (f"{MEMORY_STEPS[name]} of `memory_limit`", "node", "the memory of the service")
        elif name in PROXY_REASONS:
            row = ("with `proxy_protocol`", "listener", PROXY_REASONS[name])
        else:
            places = [place for place, section in sections.items() if name in section.model_fields]
            section = sections["provider" if "provider" in places else "node"]
            what = str(section.model_fields[name].description).partition("; then")[0]
            row = (usual[section.__name__][name], ", ".join(places), what)
        lines.append("| " + " | ".join((f"`{name}`", *row, seen, code, line)) + " |")
    return "\n".join(lines) + "\n"


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
        "limits.md": limits(),
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
