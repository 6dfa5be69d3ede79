"""``python -m ascproxy.control --config PATH``: control over a configuration.

``--fd N``: started by the supervisor, which has left a mailbox there. ``--run-dir PATH --peer UID``: a unit of its own,
which looks for the gateway that this user runs in that run directory. It may not see what only the workers need then
(keys of certificates, credentials), so a worker is the first to check those.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ascproxy.config.compile import RUNTIME_DIRECTORY, compile_files
from ascproxy.config.diff import needs_restart
from ascproxy.config.finding import InvalidConfigError
from ascproxy.config.running import note
from ascproxy.control import process
from ascproxy.errors import AscproxyError, UsageError
from ascproxy.model.snapshot import Snapshot

if TYPE_CHECKING:
    from ascproxy.control.app import Keys


def load(
    target: Path, boot: Snapshot | None, environ: Mapping[str, str] = os.environ, *, secrets: bool = True
) -> process.Loaded:
    """The configuration at ``target`` as it is now. Raises :class:`ascproxy.control.process.LoadError`."""
    try:
        compiled = compile_files(target, environ, secrets=secrets)
    except InvalidConfigError as error:
        raise process.LoadError(tuple(str(finding) for finding in error.findings)) from error
    except UsageError as error:
        raise process.LoadError((str(error),), error.exit_code) from error
    restart = needs_restart(boot, compiled.snapshot) if boot is not None else ()
    return process.Loaded(compiled.snapshot, tuple(str(finding) for finding in compiled.warnings), restart)


def open_keys(
    snapshot: Snapshot, tenants: Callable[[], Collection[str]], wrote: Callable[[], None], *, shared: bool = False
) -> Keys:
    """The stored keys of a service that runs now, and the note where it does. Raises AscproxyError."""
    keys = process.stored_keys(snapshot, tenants, wrote, shared=shared)
    state = Path(snapshot.node.state_dir)
    try:
        note(state, Path(snapshot.node.run_dir))
    except OSError as error:
        raise AscproxyError(f"cannot write to state_dir {state}: {(error.strerror or str(error)).lower()}") from error
    return keys


def main(arguments: list[str]) -> int:
    """Be control; the exit status."""
    parser = argparse.ArgumentParser(prog="ascproxy.control", description="It is started by: ascproxy serve DIR")
    parser.add_argument("--config", type=Path, required=True)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--fd", type=int)
    how.add_argument("--run-dir", type=Path)
    parser.add_argument("--peer", type=int, metavar="UID")
    options = parser.parse_args(arguments)
    if options.fd is not None:
        return process.run(options.fd, lambda boot: load(options.config, boot), open_keys)
    if options.peer is None:
        parser.error("--run-dir needs --peer")
    environ = {**os.environ, RUNTIME_DIRECTORY: str(options.run_dir)}
    secrets = options.peer == os.geteuid()
    return process.attach(
        options.run_dir,
        options.peer,
        lambda boot: load(options.config, boot, environ, secrets=secrets),
        partial(open_keys, shared=not secrets),
        os.environ,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
