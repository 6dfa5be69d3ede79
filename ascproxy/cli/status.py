"""``ascproxy status``: what the running service says of itself, over the control socket in its run directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ascproxy.cli.local import ask
from ascproxy.errors import AscproxyError

COLUMNS = ("slot", "pid", "state", "revision", "restarts", "in_flight")
HELP = """\
Show the revision in force and the workers of the running service.

Exit status 3 when it does not run, 1 when it has no ready worker.

[bold]Examples[/bold]

  ascproxy status --config /etc/ascproxy\n
  ascproxy status --json
"""


def register(app: typer.Typer) -> None:
    """Add the command ``status`` to ``app``."""
    app.command("status", help=HELP)(status)


def status(
    config: Annotated[
        Path, typer.Option("--config", metavar="DIR_OR_FILE", help="The node file, or its folder.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the document as one line of JSON.")] = False,
) -> None:
    """Print the status; the exit status says whether the service is ready."""
    from ascproxy.config.running import run_dir_of

    try:
        document = ask(run_dir_of(config), "GET", "/status")
    except AscproxyError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(error.exit_code) from None
    sys.stdout.write(json.dumps(document) + "\n" if as_json else render(document))
    ready = any(worker["state"] == "ready" for worker in document["workers"])
    raise typer.Exit(0 if ready else 1)


def render(document: dict[str, Any]) -> str:
    """The status document as a table."""
    rows = [COLUMNS, *([_cell(worker[name]) for name in COLUMNS] for worker in document["workers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"revision {document['revision']}, separation {document['separation']}"
    upgrade = document.get("upgrade")
    if upgrade is not None and upgrade["state"] == "failed":
        lines.append(f"the last upgrade failed: {upgrade['reason']}")
    return "\n".join([head, *lines]) + "\n"


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
