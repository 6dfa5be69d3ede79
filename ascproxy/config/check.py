"""What shape cannot say: references, addresses, globs, files. Looks at files, changes nothing, connects to nobody.

Every function reports into the documents, so that all findings of a run come together.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from ascproxy import _native
from ascproxy.config.document import Document, Location
from ascproxy.config.finding import Severity
from ascproxy.config.load import Sheet, Sheets
from ascproxy.config.schema import ListenerSection, NodeFile, ProviderSection, ResourcesFile
from ascproxy.wire.operation import Operation

UNIX = "unix:"
MAX_UNIX_PATH = 107  # sun_path of unix(7), without its NUL
TMPFS_MAGIC = 0x01021994
PRIVATE = "plaintext is for loopback addresses and Unix sockets only"
SCHEMES = ("file", "systemd", "env")


def check(sheets: Sheets, environ: Mapping[str, str]) -> None:
    """Report everything that is wrong with two well-shaped files; a file whose shape is wrong is passed over."""
    if sheets.node.section is not None:
        _check_node(sheets.node, sheets.node.section)
    if sheets.resources is not None and sheets.resources.section is not None:
        _check_resources(sheets.resources, sheets.resources.section, environ)


def split_address(address: str) -> tuple[str, int] | Path:
    """``host:port`` or ``[v6]:port`` as host and port, ``unix:PATH`` as a path. Raises ValueError with a sentence."""
    if address.startswith(UNIX):
        path = address.removeprefix(UNIX)
        if not path or len(os.fsencode(path)) > MAX_UNIX_PATH:
            raise ValueError(f"a Unix socket's path has 1 to {MAX_UNIX_PATH} bytes")
        return Path(path)
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+|[A-Za-z0-9.-]+)):([0-9]{1,5})", address)
    if found is None or int(found[3]) > 65_535 or int(found[3]) == 0:
        raise ValueError(f"{address!r} is no address: write 127.0.0.1:8080, [::1]:8080 or unix:PATH")
    host = found[1] or found[2]
    if host == "localhost":
        return "127.0.0.1", int(found[3])
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{host!r} is no IP address: a listener binds to one, 0.0.0.0 for all") from None
    return host, int(found[3])


def is_private(address: tuple[str, int] | Path) -> bool:
    """Whether only this machine can connect to it."""
    return isinstance(address, Path) or ipaddress.ip_address(address[0]).is_loopback


def under(folder: Path, path: str) -> Path:
    """``path`` from ``folder``, unless it is absolute."""
    return folder / Path(path).expanduser()


# ---- node file -----------------------------------------------------------------------------------------------------


def _check_node(sheet: Sheet[NodeFile], node: NodeFile) -> None:
    document, folder = sheet.document, sheet.document.file.parent
    taken: dict[object, str] = {}
    names: dict[str, str] = {}
    for number, listener in enumerate(node.listeners):
        at: Location = ("listeners", number)
        _check_listener(document, folder, at, listener, taken)
        name = listener.name or listener.address
        if name in names:
            document.report((*at, "name"), f"{name!r} is the name of {names[name]} too; give each its own")
        names[name] = f"listeners[{number}]"
    if (address := _address(document, ("metrics", "address"), node.metrics.address)) is not None:
        if not is_private(address):
            document.report(("metrics", "address"), f"{PRIVATE}; scrape it from this machine or through a tunnel")
        if address in taken:
            document.report(("metrics", "address"), f"{node.metrics.address} is taken by {taken[address]}")
    _check_directories(document, folder, node)
    if node.access_log not in ("stdout", "none"):
        parent = under(folder, node.access_log).parent
        if not parent.is_dir():
            document.report(("access_log",), f"there is no folder {parent} for it; make it, or write stdout or none")


def _check_listener(
    document: Document, folder: Path, at: Location, listener: ListenerSection, taken: dict[object, str]
) -> None:
    address = _address(document, (*at, "address"), listener.address)
    if address is not None:
        if listener.tls is None and not is_private(address):
            document.report((*at, "address"), f"{listener.address}: {PRIVATE}; add tls: {{certificate: ..., key: ...}}")
        if address in taken:
            document.report((*at, "address"), f"{listener.address} is taken by {taken[address]}")
        taken[address] = f"listeners[{at[1]}]"
    tls = listener.tls
    if tls is None:
        return
    paths = {"certificate": tls.certificate, "key": tls.key, "client_ca": tls.client_ca}
    files = {name: under(folder, path) for name, path in paths.items() if path is not None}
    if _all_readable(document, (*at, "tls"), files):
        try:
            _native.TlsContext.server(
                certificate=str(files["certificate"]),
                key=str(files["key"]),
                client_ca=str(files["client_ca"]) if "client_ca" in files else None,
            )
        except _native.TlsError as error:
            document.report((*at, "tls"), str(error))
    _warn_if_open(document, (*at, "tls", "key"), files["key"])


def _check_directories(document: Document, folder: Path, node: NodeFile) -> None:
    state = under(folder, node.state_dir)
    if state.exists() and not (state.is_dir() and os.access(state, os.W_OK | os.X_OK)):
        document.report(("state_dir",), f"{state} is no folder that this user can write to")
    if node.run_dir is None:
        return
    run = under(folder, node.run_dir)
    existing = next(p for p in (run, *run.parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        document.report(("run_dir",), f"{existing} cannot be written to by this user")
    elif not _on_tmpfs(existing):
        reason = f"{run} is not on a tmpfs: counters and sockets would go through a disk; use /dev/shm or /run"
        document.report(("run_dir",), reason, Severity.WARNING)


def _on_tmpfs(path: Path) -> bool:
    """Whether the longest mount point above ``path`` is a tmpfs (proc_mounts(5))."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind in ("tmpfs", "ramfs")


def _address(document: Document, at: Location, text: str) -> tuple[str, int] | Path | None:
    try:
        return split_address(text)
    except ValueError as error:
        document.report(at, str(error))
        return None


def _readable(document: Document, at: Location, path: Path) -> bool:
    try:
        with path.open("rb"):
            return True
    except OSError as error:
        document.report(at, f"cannot read {path}: {(error.strerror or str(error)).lower()}")
        return False


def _all_readable(document: Document, at: Location, files: Mapping[str, Path]) -> bool:
    """Looks at every file, so that each one that cannot be read is a finding."""
    return [_readable(document, (*at, name), path) for name, path in files.items()].count(False) == 0


def _warn_if_open(document: Document, at: Location, path: Path) -> None:
    """A secret that everybody on the machine can read is worth a word."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if mode & stat.S_IROTH:
        document.report(at, f"{path} can be read by every user of this machine: chmod 600", Severity.WARNING)


# ---- resources file ------------------------------------------------------------------------------------------------


def _check_resources(sheet: Sheet[ResourcesFile], file: ResourcesFile, environ: Mapping[str, str]) -> None:
    document, folder = sheet.document, sheet.document.file.parent
    for name, credential in file.credentials.items():
        _check_credential(document, folder, ("credentials", name, "from"), credential.from_, environ)
    for name, provider in file.providers.items():
        _check_provider(document, folder, ("providers", name), provider, file)
    for name, route in file.routes.items():
        at: Location = ("routes", name)
        for number, operation in enumerate(route.operations):
            if operation not in set(Operation) - {Operation.MODELS}:
                known = ", ".join(o for o in Operation if o is not Operation.MODELS)
                document.report((*at, "operations", number), f"{operation!r} is no operation; operations: {known}")
        for number, tenant in enumerate(route.tenants):
            if tenant not in file.tenants:
                document.report((*at, "tenants", number), f"there is no tenant {tenant}; add it below tenants")
        for number, target in enumerate(route.targets):
            if target.provider not in file.providers:
                known = ", ".join(file.providers) or "none yet"
                reason = f"there is no provider {target.provider}; providers: {known}"
                document.report((*at, "targets", number, "provider"), reason)
    _check_overlaps(document, file)


def _check_credential(document: Document, folder: Path, at: Location, source: str, environ: Mapping[str, str]) -> None:
    scheme, colon, place = source.partition(":")
    if not colon or scheme not in SCHEMES or not place:
        document.report(at, "is no source of a credential: write file:PATH, systemd:NAME or env:VARIABLE")
    elif scheme == "file":
        path = under(folder, place)
        if _readable(document, at, path):
            _check_secret(document, at, path)
            _warn_if_open(document, at, path)
    elif scheme == "systemd":
        credentials = environ.get("CREDENTIALS_DIRECTORY")
        if "/" in place:
            document.report(at, f"{place!r} is no name of a systemd credential")
        elif credentials is None:
            document.report(at, f"systemd gave no credentials: add LoadCredential={place}:PATH to the unit")
        elif _readable(document, at, Path(credentials) / place):
            _check_secret(document, at, Path(credentials) / place)
    elif not environ.get(place):
        document.report(at, f"the environment variable {place} is not set")
    else:
        reason = "env: is for trying out: every process of this user can read it; use file: or systemd:"
        document.report(at, reason, Severity.WARNING)


def _check_secret(document: Document, at: Location, path: Path) -> None:
    """Would it load? The value itself is never shown."""
    try:
        _native.SecretArena().load(str(path))
    except _native.SecretError as error:
        document.report(at, str(error))


def _check_provider(
    document: Document, folder: Path, at: Location, provider: ProviderSection, file: ResourcesFile
) -> None:
    if provider.credential is not None and provider.credential not in file.credentials:
        known = ", ".join(file.credentials) or "none yet"
        reason = f"there is no credential {provider.credential}; credentials: {known}"
        document.report((*at, "credential"), reason)
    seen: set[str] = set()
    secure = False
    for number, url in enumerate(provider.endpoints):
        place: Location = (*at, "endpoints", number)
        if url.rstrip("/") in seen:
            document.report(place, f"{url} is there twice; remove one")
        seen.add(url.rstrip("/"))
        try:
            parts = split_endpoint(url)
        except ValueError as error:
            document.report(place, str(error))
            continue
        secure = secure or parts.scheme == "https"
        if parts.scheme == "http" and not _stays_inside(parts.hostname or ""):
            reason = f"{url} sends prompts and credentials unencrypted; use https, or an address of your own network"
            document.report(place, reason, Severity.WARNING)
    tls = provider.tls
    files = {name: under(folder, path) for name, path in tls.model_dump().items() if path is not None}
    if files and not secure:
        document.report((*at, "tls"), "has no effect: no endpoint is https", Severity.WARNING)
    if (tls.certificate is None) != (tls.key is None):
        document.report((*at, "tls"), "certificate and key come together; one of them is missing")
    elif _all_readable(document, (*at, "tls"), files):
        try:
            paths = {name: str(path) for name, path in files.items()}
            _native.TlsContext.client(ca=paths.get("ca"), certificate=paths.get("certificate"), key=paths.get("key"))
        except _native.TlsError as error:
            document.report((*at, "tls"), str(error))
    if "key" in files:
        _warn_if_open(document, (*at, "tls", "key"), files["key"])


def split_endpoint(url: str) -> SplitResult:
    """A base URL in its parts. Raises ValueError with a sentence."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"{url!r} is no base URL: write http://host:port or https://host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL must not carry a credential: name one with credential:")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has a query or fragment, which is never sent; remove it")
    if re.fullmatch(r"[A-Za-z0-9._:-]+", parts.hostname) is None or re.fullmatch(r"[!-~]*", parts.path) is None:
        raise ValueError(f"{url!r} is no base URL: host and path are plain ASCII")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ValueError(f"{url!r} ends in /v1, which the gateway adds itself; remove it")
    return parts


def _stays_inside(host: str) -> bool:
    """Loopback, private and link-local addresses, and names without a dot."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan"))
    return address.is_private or address.is_loopback or address.is_link_local


def _check_overlaps(document: Document, file: ResourcesFile) -> None:
    """Two routes that claim the same name for the same caller and operation: nobody could say which one answers."""
    claims: dict[str, list[tuple[str, frozenset[str], frozenset[str]]]] = {}
    for name, route in file.routes.items():
        tenants = frozenset(route.tenants or file.tenants)
        operations = frozenset(route.operations or Operation)
        for number, model in enumerate(route.models):
            for other, other_tenants, other_operations in claims.get(model, ()):
                if tenants & other_tenants and operations & other_operations:
                    what = "is there twice" if other == name else f"belongs to route {other} too"
                    document.report(("routes", name, "models", number), f"{model!r} {what}; one route must answer")
                    break
            claims.setdefault(model, []).append((name, tenants, operations))
