"""Control over a snapshot file instead of a configuration: ``python -m tests.kit.plain_control --config FILE --fd N``.

The file holds the bytes of :func:`ascproxy.model.snapshot.encode`, so that process tests need no configuration room.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ascproxy.control import process
from ascproxy.errors import AscproxyError
from ascproxy.model import snapshot as snapshots
from ascproxy.model.snapshot import Snapshot


class RememberedKeys:
    """Keys in memory: what the local application needs, without a store."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._rows: dict[str, dict[str, Any]] = {}

    def create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        key_id = f"key{len(self._rows)}"
        self._rows[key_id] = {"id": key_id, **wanted}
        self._changed()
        return self._rows[key_id]

    def list(self) -> list[dict[str, Any]]:
        return [*self._rows.values()]

    def revoke(self, key_id: str) -> dict[str, Any]:
        if key_id not in self._rows:
            raise AscproxyError(f"there is no key {key_id}")
        self._changed()
        return self._rows.pop(key_id)


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
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args()
    sys.exit(
        process.run(options.fd, lambda boot: load(options.config, boot), lambda _, changed: RememberedKeys(changed))
    )
