"""``python -m ascproxy.control --config PATH --fd N``: control over a configuration, started by the supervisor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ascproxy.config.compile import compile_files
from ascproxy.config.diff import needs_restart
from ascproxy.config.finding import InvalidConfigError
from ascproxy.config.running import note
from ascproxy.control import process
from ascproxy.errors import AscproxyError, UsageError
from ascproxy.model.snapshot import Snapshot

if TYPE_CHECKING:
    from ascproxy.control.app import Keys

ARGUMENTS = 5


def load(target: Path, boot: Snapshot | None) -> process.Loaded:
    """The configuration at ``target`` as it is now. Raises :class:`ascproxy.control.process.LoadError`."""
    try:
        compiled = compile_files(target)
    except InvalidConfigError as error:
        raise process.LoadError(tuple(str(finding) for finding in error.findings)) from error
    except UsageError as error:
        raise process.LoadError((str(error),), error.exit_code) from error
    restart = needs_restart(boot, compiled.snapshot) if boot is not None else ()
    return process.Loaded(compiled.snapshot, tuple(str(finding) for finding in compiled.warnings), restart)


def open_keys(snapshot: Snapshot, tenants: Callable[[], Collection[str]], wrote: Callable[[], None]) -> Keys:
    """The stored keys of a service that runs now, and the note where it does. Raises AscproxyError."""
    keys = process.stored_keys(snapshot, tenants, wrote)
    state = Path(snapshot.node.state_dir)
    try:
        note(state, Path(snapshot.node.run_dir))
    except OSError as error:
        raise AscproxyError(f"cannot write to state_dir {state}: {(error.strerror or str(error)).lower()}") from error
    return keys


def main(arguments: list[str]) -> int:
    """Be control; the exit status."""
    if len(arguments) != ARGUMENTS or arguments[1] != "--config" or arguments[3] != "--fd":
        sys.stderr.write("ascproxy.control is started by: ascproxy serve DIR\n")
        return 2
    target = Path(arguments[2])
    return process.run(int(arguments[4]), lambda boot: load(target, boot), open_keys)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
