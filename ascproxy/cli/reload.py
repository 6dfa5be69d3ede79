"""``ascproxy reload``: have the running service read its configuration and files anew; say what came of it."""

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

RELOAD = "reload.json"
POLL_S = 0.05
TIMEOUT_S = 120.0  # control reads the files within a minute, or the service gives up
HELP = """\
Reload the running service: configuration, certificates, keys, client CAs, revocation lists, ticket keys.

Everything is checked first. Where anything is wrong nothing changes, what was in force goes on, and this says why. No
connection is dropped; connections that are there keep the certificate that they began with. The same as SIGHUP to the
service.

Exit status 0 when it is reloaded, 1 when it is not, or not by every worker, 3 when no service runs.

[bold]Examples[/bold]

  ascproxy reload --config /etc/ascproxy\n
  ascproxy reload --json
"""


def register(app: typer.Typer) -> None:
    """Add the command ``reload`` to ``app``."""
    app.command("reload", help=HELP)(reload)


def reload(
    config: Annotated[
        Path, typer.Option("--config", metavar="DIR_OR_FILE", help="The node file, or its folder.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one line of JSON.")] = False,
) -> None:
    """Send SIGHUP to the supervisor, and wait for its word."""
    from ascproxy.config.running import run_dir_of

    try:
        outcome = carry_out(run_dir_of(config))
    except AscproxyError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(error.exit_code) from None
    done = outcome["state"] == "done"
    if as_json:
        sys.stdout.write(json.dumps(outcome) + "\n")
    else:
        _tell(outcome, done)
    raise typer.Exit(0 if done else 1)


def _tell(outcome: dict[str, Any], done: bool) -> None:
    for sentence in outcome["warnings"]:
        sys.stdout.write(f"{sentence}\n")  # which says that it is a warning
    for sentence in outcome["restart"]:
        sys.stdout.write(f"takes effect at the next restart: {sentence}\n")
    if done:
        sys.stdout.write(f"reloaded, revision {outcome['revision']}\n")
        return
    for sentence in outcome["findings"]:
        sys.stderr.write(f"{sentence}\n")
    what = "not every worker has reloaded" if outcome["state"] == "partly" else "not reloaded"
    sys.stderr.write(f"{what}, revision {outcome['revision']} is in force\n")


def carry_out(run_dir: Path) -> dict[str, Any]:
    """The reload's document at its end. Raises AscproxyError when it cannot be asked for."""
    ask(run_dir, "GET", "/status")  # whether it runs, in clear words
    before = document(run_dir, RELOAD)
    number = before["number"] if before is not None else 0
    pid = tell(run_dir, signal.SIGHUP)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found = document(run_dir, RELOAD)
        if found is not None and found["number"] > number and found["state"] != "running":
            return found
        if not Path(f"/proc/{pid}").exists():
            raise AscproxyError("the service ended during the reload: its log says why")
        time.sleep(POLL_S)
    raise AscproxyError(f"nothing came of the reload within {TIMEOUT_S:.0f} s: the service's log says more")
