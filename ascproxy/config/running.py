"""Where the service of a configuration runs, for commands that talk to it.

Not always where the node file says now: the file may have changed since the start, and only the unit sees its
RuntimeDirectory. So a service leaves a note in its state folder, ``state_dir/run_dir``: one line, the run directory of
whoever served last. A command that looked elsewhere would take it for stopped, and change its keys behind its back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from ascproxy.config.compile import run_dir, state_dir
from ascproxy.config.document import read
from ascproxy.config.load import find

NOTE = "run_dir"
CONTROL_SOCKET = "control.sock"


def note(state: Path, run: Path) -> None:
    """Leave the note. Raises OSError."""
    new = state / f".{NOTE}.{os.getpid()}"
    new.write_bytes(os.fsencode(run) + b"\n")
    new.rename(state / NOTE)  # read whole or not at all


def run_dir_of(target: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The run directory of the service of this configuration, whatever else is wrong with its files.

    Raises :class:`ascproxy.errors.UsageError` if the node file cannot be read or says nothing about it.
    """
    document = read(find(target))
    expected = run_dir(document, environ)
    with contextlib.suppress(OSError):
        noted = os.fsdecode((state_dir(document) / NOTE).read_bytes()).strip()
        if noted and os.path.lexists(Path(noted) / CONTROL_SOCKET):
            return Path(noted)
    return expected
