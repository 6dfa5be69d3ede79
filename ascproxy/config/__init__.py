"""From two YAML files to a snapshot: load (text and shape), check (what shape cannot say), compile, diff.

``document`` knows where every value was written, ``schema`` which keys there are, ``check`` which files, references and
addresses make sense together, ``compile`` turns checked files into :class:`ascproxy.model.snapshot.Snapshot`, ``diff``
tells what a reload can apply. Nothing here is imported by workers: they get the snapshot's bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def run_dir_of(target: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The run directory that a service of this configuration has, whatever else is wrong with its files.

    Raises :class:`ascproxy.errors.UsageError` if the node file cannot be read or says nothing about it.
    """
    from ascproxy.config.compile import run_dir
    from ascproxy.config.document import read
    from ascproxy.config.load import find

    return run_dir(read(find(target)), environ)
