"""``ascproxy check``: everything that can be said about a configuration without starting it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

HELP = """\
Validate a configuration without starting it: all findings of both files at once.

Exit status 0 when it can be served (warnings included), 1 when it cannot, 2 when it cannot be read.

[bold]Examples[/bold]

  ascproxy check\n
  ascproxy check /etc/ascproxy --json
"""
RED, YELLOW, RESET = "\x1b[31m", "\x1b[33m", "\x1b[0m"


def register(app: typer.Typer) -> None:
    """Add the command ``check`` to ``app``."""
    app.command("check", help=HELP)(check)


def check(
    config: Annotated[
        Path, typer.Argument(metavar="DIR_OR_FILE", help="The node file ascproxy.yaml, or its folder.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print the findings."""
    from ascproxy.config.compile import compile_files
    from ascproxy.config.finding import InvalidConfigError, Severity, has_errors

    revision = None
    try:
        compiled = compile_files(config, starting=False)
        findings, revision = compiled.warnings, compiled.snapshot.revision
    except InvalidConfigError as error:
        findings = error.findings
    wrong = has_errors(findings)
    if as_json:
        document = {"valid": not wrong, "revision": revision, "findings": [dataclasses.asdict(f) for f in findings]}
        sys.stdout.write(json.dumps(document) + "\n")
        raise typer.Exit(1 if wrong else 0)
    colour = sys.stdout.isatty()
    for finding in findings:
        line = str(finding)
        if colour:
            line = f"{RED if finding.severity is Severity.ERROR else YELLOW}{line}{RESET}"
        sys.stdout.write(f"{line}\n")
    if wrong:
        errors = sum(f.severity is Severity.ERROR for f in findings)
        sys.stdout.write(f"{errors} error{'s' if errors != 1 else ''}\n")
    else:
        sys.stdout.write(f"can be served, revision {revision}\n")
    raise typer.Exit(1 if wrong else 0)
