"""The commands in one table, and the one place where an error becomes a line on standard error and an exit status."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ascproxy import __version__
from ascproxy.cli import check, init, key, reload, serve, sim, status, upgrade
from ascproxy.errors import AscproxyError

HELP = """\
A self-hosted AI control plane: an HTTPS proxy between applications and model servers.

[bold]Start here[/bold]

  ascproxy init gateway --upstream http://127.0.0.1:8000\n
  ascproxy serve gateway
"""


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"ascproxy {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version  # its callback has done the work


def application() -> typer.Typer:
    """The application with every command, in the order of ``--help``."""
    app = typer.Typer(
        name="ascproxy", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
        add_completion=False, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback(help=HELP)(_root)
    for command in (init, serve, check, status, reload, upgrade, key, sim):
        command.register(app)
    return app


def run(arguments: list[str]) -> int:
    """Run one command; its exit status. 1 too when whoever read the output closed it."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # flushing at the end of the interpreter would fail again, with a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(arguments: list[str]) -> int:
    try:
        application()(arguments, prog_name="ascproxy")
    except AscproxyError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except SystemExit as exit_:  # how the command line library ends, wrong options included (2)
        return exit_.code if isinstance(exit_.code, int) else 0
    return 0
