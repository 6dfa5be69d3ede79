"""``ascproxy serve``: becomes the supervisor, or control. The command line's libraries do not stay in its memory."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ascproxy.errors import UsageError

HELP = """\
Run the whole service in the foreground, or one part of it.

SIGTERM drains, Ctrl-C drains for 5 s, a second signal stops at once. SIGHUP reloads the configuration, SIGUSR2 upgrades
to the program that is installed now; SIGTTIN and SIGTTOU add and remove a worker.

The parts are for two systemd units under two users: gateway (the supervisor with its workers) and control
(configuration, metrics, health, keys). They meet in the run directory, and each lets in only the user that --peer
names.

[bold]Examples[/bold]

  ascproxy serve\n
  ascproxy serve /etc/ascproxy\n
  kill -HUP PID\n
  ascproxy serve /etc/ascproxy --only gateway --peer ascproxy-control --run-dir /run/ascproxy\n
  ascproxy serve /etc/ascproxy --only control --peer ascproxy --run-dir /run/ascproxy
"""


class Part(StrEnum):
    """What can run alone."""

    GATEWAY = "gateway"
    CONTROL = "control"


def register(app: typer.Typer) -> None:
    """Add the command ``serve`` to ``app``."""
    app.command("serve", help=HELP)(serve)


def serve(
    config: Annotated[
        Path, typer.Argument(metavar="DIR_OR_FILE", help="The node file ascproxy.yaml, or its folder.")
    ] = Path(),
    only: Annotated[Part | None, typer.Option(help="Run only this part.")] = None,
    peer: Annotated[str | None, typer.Option(metavar="USER", help="With --only: who runs the other part.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --only: where the parts meet, the same for both.")
    ] = None,
) -> None:
    """Replace this process by the supervisor: same pid, so that a service manager's expectations hold."""
    from ascproxy.net.meeting import uid_of

    wanted = {"--only": only, "--peer": peer, "--run-dir": run_dir}
    missing = [name for name, value in wanted.items() if value is None]
    if missing and len(missing) < len(wanted):
        raise UsageError(f"--only, --peer and --run-dir come together; missing: {' and '.join(missing)}")
    sys.stdout.flush()
    given: list[str] = []
    if only is not None and peer is not None and run_dir is not None:
        given = ["--run-dir", str(run_dir.absolute()), "--peer", str(uid_of(peer))]
    if only is Part.CONTROL:
        command = ["-m", "ascproxy.control", "--config", str(config), *given]
    else:
        same = ["--only", only, "--peer", str(peer), "--run-dir", str(run_dir)] if only is not None else []
        command = ["-m", "ascproxy.supervisor", str(config), *given, "--again", *again(sys.argv[0], config), *same]
    os.execv(sys.executable, [sys.executable, *command])  # noqa: S606 - our own interpreter, no shell is wanted


def again(started_as: str, config: Path) -> list[str]:
    """The command that an upgrade runs: this one, by the name that it was started with.

    A symbolic link in that name is not followed now but then, so that it may lead to another version by that time.
    """
    program = Path(started_as).absolute()
    if os.access(program, os.X_OK) and program.is_file():
        return [str(program), "serve", str(config)]
    return [sys.executable, "-m", "ascproxy", "serve", str(config)]
