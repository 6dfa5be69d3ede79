"""``ascproxy key``: API keys, through the running service, or in the store while none runs."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ascproxy.clock import wall_ns
from ascproxy.errors import NotRunningError, UsageError

HELP = "API keys: create, list, revoke."
CREATE_HELP = """\
Create an API key. Its text is shown once and stored nowhere.

[bold]Examples[/bold]

  ascproxy key create --tenant acme\n
  ascproxy key create --tenant acme --model 'llama-*' --operation chat_completions --expires 30d\n
  ascproxy key create --tenant acme --expires 2027-01-01 --json
"""
LIST_HELP = """\
List the API keys, without their secrets.

[bold]Examples[/bold]

  ascproxy key list --config /etc/ascproxy\n
  ascproxy key list --json
"""
REVOKE_HELP = """\
Revoke an API key. It is refused from the next request on.

[bold]Examples[/bold]

  ascproxy key revoke 4kq2m8x0c1zt
"""
UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
COLUMNS = ("id", "tenant", "state", "expires", "models", "operations")

Config = Annotated[Path, typer.Option("--config", metavar="DIR_OR_FILE", help="The node file, or its folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands ``key create``, ``key list`` and ``key revoke`` to ``app``."""
    group = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="rich")
    group.command("create", help=CREATE_HELP)(create)
    group.command("list", help=LIST_HELP)(list_keys)
    group.command("revoke", help=REVOKE_HELP)(revoke)
    app.add_typer(group, name="key")


def create(  # noqa: PLR0917 - a command has as many parameters as options
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    model: Annotated[list[str] | None, typer.Option(help="A model or glob it may use; all if none is given.")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="An operation; all if none is given.")] = None,
    expires: Annotated[str | None, typer.Option(help="30d, 12h, or a date such as 2027-01-01 (UTC).")] = None,
    config: Config = Path(),
    as_json: AsJson = False,
) -> None:
    """Make a key and show it."""
    wanted: dict[str, Any] = {"tenant": tenant, "models": model or [], "operations": operation or []}
    if expires is not None:
        wanted["expires_ms"] = expiry_ms(expires, wall_ns() // 1_000_000)
    made = _act(config, "POST", "/keys", wanted)
    if as_json:
        sys.stdout.write(json.dumps(made) + "\n")
        return
    sys.stdout.write(f"{made['api_key']}\n")
    until = f", expires {made['expires']}" if made["expires"] else ""
    sys.stderr.write(f"key {made['id']} of tenant {made['tenant']}{until}; this is the only time it is shown\n")


def list_keys(config: Config = Path(), as_json: AsJson = False) -> None:
    """Print every key's row."""
    keys = _act(config, "GET", "/keys", None)
    if as_json:
        sys.stdout.write(json.dumps(keys) + "\n")
        return
    rows = [COLUMNS, *([_cell(each[name]) for name in COLUMNS] for each in keys)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        sys.stdout.write("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() + "\n")


def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id: the part between the underscores.")],
    config: Config = Path(),
    as_json: AsJson = False,
) -> None:
    """Refuse a key from now on."""
    if re.fullmatch(r"[a-z0-9]{1,32}", key_id) is None:
        raise UsageError(f"{key_id!r} is no key id: it is the part between the two underscores of a key")
    row = _act(config, "DELETE", f"/keys/{key_id}", None)
    sys.stdout.write(json.dumps(row) + "\n" if as_json else f"key {row['id']} is revoked since {row['revoked']}\n")


def expiry_ms(text: str, now_ms: int) -> int:
    """Milliseconds since 1970 of ``30d`` from now, or of a date or time in UTC. Raises :class:`UsageError`."""
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if found is not None:
        return now_ms + int(found[1]) * UNITS[found[2]] * 1000
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no expiry: write 30d, 12h, or a date such as 2027-01-01") from None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    return int(instant.timestamp() * 1000)


def _act(config: Path, method: str, path: str, wanted: dict[str, Any] | None) -> Any:
    """Ask the running service; act on the store if none runs."""
    from ascproxy.cli.local import ask
    from ascproxy.config.running import run_dir_of

    try:
        return ask(run_dir_of(config), method, path, wanted)
    except NotRunningError:
        return _act_on_store(config, method, path, wanted)


def _act_on_store(config: Path, method: str, path: str, wanted: dict[str, Any] | None) -> Any:
    """A new key needs its tenant, so a valid configuration. A mistake in a file must not keep a key from being revoked:
    the others need only the place of the store, and make none."""
    from ascproxy.config.compile import compile_files, state_dir
    from ascproxy.config.document import read
    from ascproxy.config.load import find
    from ascproxy.control.actions import KeyActions
    from ascproxy.store.env import open_store
    from ascproxy.store.keys import KeyStore

    tenants: list[str] = []
    if method == "POST":
        snapshot = compile_files(config, starting=False).snapshot
        tenants = [tenant.name for tenant in snapshot.tenants]
        env = open_store(Path(snapshot.node.state_dir), write=True)
    else:
        env = open_store(state_dir(read(find(config))), write=method != "GET", create=False)
    try:
        actions = KeyActions(KeyStore(env), lambda: tenants)
        if method == "POST":
            return actions.create(wanted or {})
        if method == "GET":
            return actions.list()
        return actions.revoke(path.rpartition("/")[2])
    finally:
        env.close()


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value) or "all"
    return "-" if value is None else str(value)
