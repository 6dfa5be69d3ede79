"""``ascproxy serve``: becomes the supervisor. The libraries of the command line do not stay in its memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

HELP = """\
Run the whole service in the foreground.

SIGTERM drains, Ctrl-C drains for 5 s, a second signal stops at once. SIGHUP reloads the configuration, SIGUSR2 upgrades
to the program that is installed now; SIGTTIN and SIGTTOU add and remove a worker.

[bold]Examples[/bold]

  ascproxy serve\n
  ascproxy serve /etc/ascproxy\n
  kill -HUP PID
"""


def register(app: typer.Typer) -> None:
    """Add the command ``serve`` to ``app``."""
    app.command("serve", help=HELP)(serve)


def serve(
    config: Annotated[
        Path, typer.Argument(metavar="DIR_OR_FILE", help="The node file ascproxy.yaml, or its folder.")
    ] = Path(),
) -> None:
    """Replace this process by the supervisor: same pid, so that a service manager's expectations hold."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "ascproxy.supervisor", str(config), "--again", *again(sys.argv[0], config)]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter, no shell is wanted


def again(started_as: str, config: Path) -> list[str]:
    """The command that an upgrade runs: this one, by the name that it was started with.

    A symbolic link in that name is not followed now but then, so that it may lead to another version by that time.
    """
    program = Path(started_as).absolute()
    if os.access(program, os.X_OK) and program.is_file():
        return [str(program), "serve", str(config)]
    return [sys.executable, "-m", "ascproxy", "serve", str(config)]
