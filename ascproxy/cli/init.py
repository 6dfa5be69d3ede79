"""``ascproxy init``: a complete runnable directory: node file, resources, private CA, one tenant with one key."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from ascproxy.errors import AscproxyError, UsageError
from ascproxy.model.provider import ProviderType

HELP = """\
Write a complete configuration in a new directory: both files, a private CA with a server certificate, one tenant and
one API key, which is shown once. Without --model the upstream is asked which models it serves.

[bold]Examples[/bold]

  ascproxy init gateway --upstream http://127.0.0.1:8000\n
  ascproxy init gateway --upstream http://127.0.0.1:8000 --model llama-3-70b --https-port 9443\n
  ascproxy init gateway --upstream https://api.openai.com --type openai --model gpt-5 --credential file:keys/openai\n
  ascproxy init gateway --upstream http://127.0.0.1:8000 --json
"""
TENANT = "default"
ASK_TIMEOUT_S = 5.0
MAX_ANSWER = 4 * 1024 * 1024
MAX_CREDENTIAL = 16_384

NODE_FILE = """\
# What differs from machine to machine. Relative paths start at this file's folder. Check changes with: ascproxy check
node: {node}
state_dir: state            # durable: the key store
workers: auto               # one per core
listeners:
  - address: 0.0.0.0:{https_port}
    tls: {{certificate: tls/server.crt, key: tls/server.key}}   # client_ca: makes it mTLS
{http}metrics: {{address: "127.0.0.1:{metrics_port}"}}
limits: {{header_timeout: 10s}}
resources: resources.yaml   # read again on reload (SIGHUP)
"""
HTTP_LISTENER = """\
  - address: 127.0.0.1:{port}    # plaintext: loopback and Unix sockets only
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asked for, checked."""

    directory: Path
    upstream: str
    kind: ProviderType
    models: tuple[str, ...]
    https_port: int
    http_port: int | None
    metrics_port: int
    credential: str | None


def register(app: typer.Typer) -> None:
    """Add the command ``init`` to ``app``."""
    app.command("init", help=HELP)(init)


def init(  # noqa: PLR0917 - a command has as many parameters as options
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to make; it must not exist.")],
    upstream: Annotated[str, typer.Option(help="Base URL of the model server, without /v1.")],
    kind: Annotated[ProviderType, typer.Option("--type", help="The wire it speaks.")] = ProviderType.VLLM,
    model: Annotated[list[str] | None, typer.Option(help="A model to route; asked from the upstream if none.")] = None,
    https_port: Annotated[int, typer.Option(min=1, max=65_535, help="Port for HTTPS, on all addresses.")] = 8443,
    http_port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Also listen in plaintext on 127.0.0.1.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(min=1, max=65_535, help="Metrics and health, on 127.0.0.1.")] = 9464,
    credential: Annotated[
        str | None, typer.Option(metavar="file:PATH", help="What the upstream is shown; also systemd:NAME, env:NAME.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Make the directory, whole or not at all."""
    from ascproxy.config.check import split_endpoint
    from ascproxy.config.schema import MAX_MODEL, PRINTABLE

    if os.path.lexists(directory):
        raise UsageError(f"{directory} is there already; choose another name or remove it")
    try:
        split_endpoint(upstream)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if len({https_port, http_port, metrics_port}) < 3:
        raise UsageError("--https-port, --http-port and --metrics-port must differ")
    source = _source(credential)
    models = tuple(dict.fromkeys(model or ())) or ask_models(upstream, kind, source)
    for name in models:
        if not name or re.fullmatch(PRINTABLE, name) is None or len(name.encode()) > MAX_MODEL:
            raise UsageError(f"{name!r} is no model name: 1 to {MAX_MODEL} bytes without control characters")
    wanted = Wanted(
        directory.absolute(), upstream.rstrip("/"), kind, models, https_port, http_port, metrics_port, source
    )
    facts = make(wanted)
    sys.stdout.write(json.dumps(facts) + "\n" if as_json else _shown(facts, directory))


def make(wanted: Wanted) -> dict[str, Any]:
    """Write the directory beside its place and move it there in one step. What ``--json`` prints."""
    from ascproxy.config.compile import compile_files
    from ascproxy.config.finding import InvalidConfigError
    from ascproxy.control.actions import KeyActions
    from ascproxy.net import authority
    from ascproxy.store.env import open_store
    from ascproxy.store.keys import KeyStore

    final = wanted.directory
    above = [folder for folder in final.parents if not os.path.lexists(folder)]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as error:
        raise AscproxyError(f"cannot make {final}: {(error.strerror or str(error)).lower()}") from error
    try:
        (building / "tls").mkdir(mode=0o700)
        names = ["localhost", "127.0.0.1", "::1", *_host_names()]
        authority.create(building / "tls", names, now=datetime.now(UTC))
        (building / "ascproxy.yaml").write_text(node_file(wanted), encoding="utf-8")
        resources = building / "resources.yaml"
        resources.write_text(resources_file(wanted), encoding="utf-8")
        compile_files(building, starting=False)  # a configuration that init writes is one that serve takes
        env = open_store(building / "state", write=True)
        try:
            made = KeyActions(KeyStore(env), lambda: [TENANT]).create({"tenant": TENANT})
        finally:
            env.close()
        building.rename(final)
    except OSError as error:
        raise AscproxyError(f"cannot make {final}: {(error.strerror or str(error)).lower()}") from error
    except InvalidConfigError as error:
        raise AscproxyError(str(error).replace(str(building), str(final))) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        for folder in above:  # those that we made, if they hold nothing
            with contextlib.suppress(OSError):
                folder.rmdir()
    return {
        "config": str(final / "ascproxy.yaml"),
        "https_url": f"https://localhost:{wanted.https_port}",
        "http_url": f"http://127.0.0.1:{wanted.http_port}" if wanted.http_port is not None else None,
        "metrics_url": f"http://127.0.0.1:{wanted.metrics_port}",
        "ca": str(final / "tls" / "ca.crt"),
        "api_key": made["api_key"],
        "tenant": TENANT,
        "models": list(wanted.models),
    }


def node_file(wanted: Wanted) -> str:
    """The text of ``ascproxy.yaml``."""
    node = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().partition(".")[0])[:63].lstrip("._-") or "node"
    if re.fullmatch(r"[0-9.]+|true|false|null", node):  # text to us, something else to YAML
        node = f"node-{node}"
    http = HTTP_LISTENER.format(port=wanted.http_port) if wanted.http_port is not None else ""
    return NODE_FILE.format(node=node, https_port=wanted.https_port, http=http, metrics_port=wanted.metrics_port)


def resources_file(wanted: Wanted) -> str:
    """The text of ``resources.yaml``."""
    lines = [
        "# What all machines of a cluster agree on. Read again on reload (SIGHUP).",
        "tenants:",
        f"  {TENANT}: {{}}",
    ]
    if wanted.credential is not None:
        lines += ["credentials:", f"  upstream: {{from: {_quoted(wanted.credential)}}}"]
    lines += [
        "providers:",
        "  upstream:",
        f"    type: {wanted.kind}   # vllm | tgi | openai | anthropic",
        f"    endpoints: [{_quoted(wanted.upstream)}]",
    ]
    if wanted.credential is not None:
        lines.append("    credential: upstream")
    lines.append("routes:")
    for number, model in enumerate(wanted.models, 1):
        lines += [
            f"  model-{number}:",
            f"    models: [{_quoted(model)}]" + ("   # what callers ask for; globs allowed" if number == 1 else ""),
            "    targets:" + ("   # tried in order" if number == 1 else ""),
            "      - {provider: upstream}",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A YAML string: JSON's, but for characters beyond the BMP, which JSON escapes in two halves."""
    return json.dumps(text, ensure_ascii=False)


def ask_models(upstream: str, kind: ProviderType, credential: str | None) -> tuple[str, ...]:
    """The models that the upstream says it serves. Raises :class:`AscproxyError` with what to do instead."""
    path = "/info" if kind is ProviderType.TGI else "/v1/models"
    hint = "start it, correct --upstream, or name the models with --model"
    try:
        status, body = _get(upstream, path, kind, credential)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise AscproxyError(f"{upstream} does not answer ({reason.lower()}): {hint}") from error
    if status in (401, 403):
        raise AscproxyError(f"{upstream} wants a credential ({status}): give one with --credential file:PATH")
    try:
        document = json.loads(body)
        found = [document["model_id"]] if kind is ProviderType.TGI else [m["id"] for m in document["data"]]
    except (ValueError, KeyError, TypeError):
        raise AscproxyError(f"{upstream}{path} answers {status}, and not with models: {hint}") from None
    if not found or not all(isinstance(m, str) and m for m in found):
        raise AscproxyError(f"{upstream}{path} names no model: name them with --model")
    return tuple(dict.fromkeys(found))


def _get(upstream: str, path: str, kind: ProviderType, credential: str | None) -> tuple[int, bytes]:
    parts = urlsplit(upstream)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=ASK_TIMEOUT_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=ASK_TIMEOUT_S)
    headers = {}
    if credential is not None:
        value = _value(credential)
        headers = {"x-api-key": value} if kind is ProviderType.ANTHROPIC else {"authorization": f"Bearer {value}"}
        headers["anthropic-version"] = "2023-06-01"
    try:
        connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER)
    finally:
        connection.close()


def _source(credential: str | None) -> str | None:
    """The source with an absolute path: the option is relative to here, the file it goes to is elsewhere."""
    from ascproxy.config.document import under

    if credential is None:
        return None
    scheme, colon, place = credential.partition(":")
    if not colon or scheme not in ("file", "systemd", "env") or not place:
        raise UsageError(f"{credential!r} is no source of a credential: write file:PATH, systemd:NAME or env:VARIABLE")
    return f"file:{os.path.normpath(under(Path.cwd(), place))}" if scheme == "file" else credential


def _value(credential: str) -> str:
    """The credential itself, to ask the upstream once; it is not kept."""
    from ascproxy.config.document import open_file

    scheme, _, place = credential.partition(":")
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if scheme == "env":
        if not os.environ.get(place):
            raise UsageError(f"the environment variable {place} is not set")
        return os.environ[place]
    if scheme == "systemd" and folder is None:
        raise UsageError(f"only the service itself can see {credential}: name the models with --model")
    path = Path(place) if scheme == "file" else Path(folder or "", place)
    try:
        with open_file(path) as file:
            value = file.read(MAX_CREDENTIAL).decode("ascii").strip()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError:
        value = ""
    if re.fullmatch("[!-~]+", value) is None:
        raise UsageError(f"{path} holds no credential: write the bare value into it, on one line")
    return value


def _host_names() -> list[str]:
    """This machine's own name, where it is one that a certificate can carry."""
    name = socket.gethostname()
    return [name] if re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*", name) else []


def _shown(facts: dict[str, Any], directory: Path) -> str:
    models = ", ".join(facts["models"])
    return (
        f"wrote {facts['config']}\n"
        f"models   {models}\n"
        f"API key  {facts['api_key']}\n"
        f"         of tenant {facts['tenant']}; this is the only time it is shown\n"
        f"CA file  {facts['ca']}\n\n"
        f"Start it:\n  ascproxy serve {directory}\n\n"
        f"Ask it:\n"
        f"  curl --cacert {facts['ca']} {facts['https_url']}/v1/models -H 'Authorization: Bearer {facts['api_key']}'\n"
    )
