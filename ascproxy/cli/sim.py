"""``ascproxy sim``: the command line of the bundled model-server simulator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ascproxy.errors import AscproxyError
from ascproxy.sim.failure import KINDS
from ascproxy.sim.settings import Options
from ascproxy.sim.settings import options as known_options

DEFAULTS = Options()

EXAMPLES = """\
Simulate a model server: vLLM's or TGI's wire, without a model.

[bold]Examples[/bold]

  ascproxy sim --port 8000 --model llama-3-70b\n
  ascproxy sim --type tgi --tokens 200 --rate 50\n
  ascproxy sim --fail busy --json\n
  curl --json '{"model": "sim-chat!stall:3", "stream": true, "messages": []}' URL/v1/chat/completions\n
  curl URL/sim/stats\n
  curl -X PUT -d '{"fail": "busy"}' URL/sim/settings
"""


def _help(name: str) -> str:
    return str(known_options()[name].metadata["help"])


def _failures() -> str:
    known = "; ".join(f"{kind.value}: {does}" for kind, (does, _) in KINDS.items())
    return f"Failures (KIND or KIND:N): {known}."


def register(app: typer.Typer) -> None:
    """Add the command ``sim`` to ``app``; its options, help and defaults are those of ``sim.settings.Options``."""
    app.command("sim", help=EXAMPLES, epilog=_failures(), rich_help_panel=None)(simulate)


def simulate(  # noqa: PLR0917  a command has as many parameters as options
    host: Annotated[str, typer.Option(help=_help("host"))] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help=_help("port"))] = DEFAULTS.port,
    kind: Annotated[str, typer.Option("--type", help=_help("type"))] = DEFAULTS.type,
    model: Annotated[list[str] | None, typer.Option(help=_help("model"), show_default=DEFAULTS.model[0])] = None,
    tokens: Annotated[int, typer.Option(help=_help("tokens"))] = DEFAULTS.tokens,
    rate: Annotated[float, typer.Option(help=_help("rate"))] = DEFAULTS.rate,
    api_key_file: Annotated[Path | None, typer.Option(help=_help("api_key_file"))] = None,
    fail: Annotated[str | None, typer.Option(help=_help("fail"))] = None,
    recordings: Annotated[Path | None, typer.Option(help=_help("recordings"))] = None,
    wire: Annotated[str | None, typer.Option(help=_help("wire"))] = None,
    split: Annotated[int, typer.Option(help=_help("split"))] = DEFAULTS.split,
    gap: Annotated[float, typer.Option(help=_help("gap"))] = DEFAULTS.gap,
    chunk: Annotated[int, typer.Option(help=_help("chunk"))] = DEFAULTS.chunk,
    max_model_len: Annotated[int, typer.Option(help=_help("max_model_len"))] = DEFAULTS.max_model_len,
    request_ids: Annotated[bool, typer.Option(help=_help("request_ids"))] = DEFAULTS.request_ids,
    tls_certificate: Annotated[Path | None, typer.Option(help=_help("tls_certificate"))] = None,
    tls_key: Annotated[Path | None, typer.Option(help=_help("tls_key"))] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help=_help("tls_client_ca"))] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help='Print {"url","models","pid"} in one line when listening.')
    ] = False,
) -> None:
    """Run the simulator until Ctrl-C."""
    from ascproxy.sim.command import run

    options = Options(
        host=host,
        port=port,
        type=kind,
        model=tuple(model or DEFAULTS.model),
        tokens=tokens,
        rate=rate,
        api_key_file=api_key_file,
        fail=fail,
        recordings=recordings,
        wire=wire,
        split=split,
        gap=gap,
        chunk=chunk,
        max_model_len=max_model_len,
        request_ids=request_ids,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
    )
    try:
        code = run(options, as_json=as_json)
    except AscproxyError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    raise typer.Exit(code)
