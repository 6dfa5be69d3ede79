"""Control over a snapshot file instead of a configuration: ``python -m tests.kit.plain_control --config FILE --fd N``,
or with ``--run-dir PATH --peer UID``, as ascproxy.control.

The file holds the bytes of :func:`ascproxy.model.snapshot.encode`, so that process tests need no configuration room.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ascproxy.control import process
from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot as snapshots
from ascproxy.model.snapshot import Snapshot


def load(file: Path, boot: Snapshot | None) -> process.Loaded:
    try:
        found = snapshots.decode(file.read_bytes())
    except (OSError, AscproxyError) as error:
        raise process.LoadError((f"{file}: {error}",), 2 if isinstance(error, OSError) else 1) from error
    differs = boot is not None and boot.node.listeners != found.node.listeners
    return process.Loaded(found, restart=("listeners",) if differs else ())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--fd", type=int)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--peer", type=int)
    options = parser.parse_args()
    if options.fd is not None:
        sys.exit(process.run(options.fd, lambda boot: load(options.config, boot), process.stored_keys))
    sys.exit(
        process.attach(
            options.run_dir, options.peer, lambda boot: load(options.config, boot), process.stored_keys, os.environ
        )
    )
