"""The durable store: opening ``store.lmdb`` without losing anything (LIMITS 5, LMDB).

Open it after fork and once per process; transactions are short and never awaited in. Every commit is synced. The file
is sparse: its map has a fixed size and costs what is in it.
"""

from __future__ import annotations

from pathlib import Path

import lmdb

from ascproxy.errors import AscproxyError

NAME = "store.lmdb"
FORMAT = 1
MAP_SIZE = 1 << 30
MAX_READERS = 1024
MAX_TABLES = 8
_META = b"meta"
_FORMAT_KEY = b"format"


class StoreError(AscproxyError):
    """The store cannot be opened or written; the sentence says what to do."""


def open_store(state_dir: Path, *, write: bool, create: bool = True, shared: bool = False) -> lmdb.Environment:
    """The environment in ``state_dir``. Only control, or a command while no service runs, opens it with ``write``. It
    is then created if absent (folder 0700, files 0600), unless ``create`` is off. ``shared``: our group may read it.
    Raises :class:`StoreError`."""
    path = state_dir / NAME
    try:
        if write and create:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.mkdir(exist_ok=True, mode=0o700)
        elif not (path / "data.mdb").exists():
            raise StoreError(f"there is no store in {state_dir}: make a configuration with ascproxy init")
        env = lmdb.open(
            str(path),
            map_size=MAP_SIZE,
            subdir=True,
            readonly=not write,
            create=write,
            mode=0o600,
            max_dbs=MAX_TABLES,
            max_readers=MAX_READERS,
            readahead=False,  # a look-up reads one page of a table that may be much larger than memory
            metasync=True,
            sync=True,
        )
        if write and shared:
            _share(path)
    except (lmdb.Error, OSError) as error:
        hint = "is it this user's, and on a local file system?"
        raise StoreError(f"cannot open the store {path}: {error}; {hint}") from error
    try:
        _check_format(env, path, write=write)
    except BaseException:
        env.close()
        raise
    return env


def _share(path: Path) -> None:
    """Let the group read: the data is no more than that, but in the lock file each reader notes what it reads, or it
    would be pulled from under it."""
    path.chmod(0o750)
    (path / "data.mdb").chmod(0o640)
    (path / "lock.mdb").chmod(0o660)


def _check_format(env: lmdb.Environment, path: Path, *, write: bool) -> None:
    try:
        meta = env.open_db(_META, create=write)
        with env.begin(db=meta, write=write) as txn:
            found = txn.get(_FORMAT_KEY)
            if found is None and write:
                txn.put(_FORMAT_KEY, b"%d" % FORMAT)
                return
    except lmdb.Error as error:
        raise StoreError(f"{path} is not a store: {error}") from error
    if found != b"%d" % FORMAT:
        shown = "no" if found is None else repr(found.decode(errors="replace"))
        raise StoreError(f"{path} has {shown} format; this version of ascproxy reads format {FORMAT}")
