"""``ascproxy upgrade``: ask the running service to go on as the program that is installed now; say what came of it."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ascproxy.cli.local import ask, document, tell
from ascproxy.errors import AscproxyError

POLL_S = 0.1
# The service gives up by itself before (ascproxy/supervisor: rehearsal, quiet moment, configuration, workers).
TIMEOUT_S = 300.0
OVER = ("done", "failed")
HELP = """\
Upgrade the running service to the program that is installed now, without losing a request.

Install the new version first: into the same place, or into another one to which the link in the service's command
leads. The service keeps its process id and its sockets; new workers start, and the old ones finish what they have.
Where the new version does not get ready, the old workers go on, and this says why.

Exit status 0 when it is upgraded, 1 when it is not, 3 when no service runs.

[bold]Examples[/bold]

  ascproxy upgrade --config /etc/ascproxy\n
  ascproxy upgrade --json
"""


def register(app: typer.Typer) -> None:
    """Add the command ``upgrade`` to ``app``."""
    app.command("upgrade", help=HELP)(upgrade)


def upgrade(
    config: Annotated[
        Path, typer.Option("--config", metavar="DIR_OR_FILE", help="The node file, or its folder.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one line of JSON.")] = False,
) -> None:
    """Send SIGUSR2 to the supervisor, and wait for its word."""
    from ascproxy.config.running import run_dir_of

    try:
        outcome = carry_out(run_dir_of(config))
    except AscproxyError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(error.exit_code) from None
    failed = outcome["state"] == "failed"
    if as_json:
        sys.stdout.write(json.dumps(outcome) + "\n")
    elif failed:
        sys.stderr.write(f"not upgraded: {outcome['reason']}\n")
    else:
        sys.stdout.write(f"upgraded from {outcome['from']} to {outcome['to']}\n")
    raise typer.Exit(1 if failed else 0)


def carry_out(run_dir: Path) -> dict[str, Any]:
    """The upgrade's document at its end. Raises AscproxyError when it cannot be asked for."""
    before = ask(run_dir, "GET", "/status").get("upgrade")
    if before is not None and before["state"] not in OVER:
        raise AscproxyError("an upgrade is under way already: ascproxy status --json shows what comes of it")
    pid = tell(run_dir, signal.SIGUSR2)
    number = before["number"] if before is not None else 0
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found = document(run_dir, "upgrade.json")  # from its file: control is being replaced meanwhile
        if found is not None and found["number"] > number and found["state"] in OVER:
            return found
        if not Path(f"/proc/{pid}").exists():
            raise AscproxyError("the service ended during the upgrade: its log says why")
        time.sleep(POLL_S)
    raise AscproxyError(f"nothing came of the upgrade within {TIMEOUT_S:.0f} s: the service's log says more")
