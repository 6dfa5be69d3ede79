"""What shape cannot say: references, addresses, globs, files. Looks at files, changes nothing, connects to nobody.

Every function reports into the documents, so that all findings of a run come together.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from ascproxy import _native
from ascproxy.clock import wall_ns
from ascproxy.config.document import Document, Location, open_file, under
from ascproxy.config.finding import Severity
from ascproxy.config.load import Sheet, Sheets
from ascproxy.config.schema import (
    ListenerLimitsSection,
    ListenerSection,
    ListenerTlsSection,
    NodeFile,
    ProviderSection,
    ResourcesFile,
    RouteSection,
)
from ascproxy.config.units import show_size
from ascproxy.model.node import Limits
from ascproxy.wire.operation import OPERATIONS, Operation

UNIX = "unix:"
MAX_UNIX_PATH = 107  # sun_path of unix(7), without its NUL
LONGEST_SOCKET = "control.sock"  # of those in run_dir
PRIVATE = "plaintext is for loopback addresses and Unix sockets only"
SCHEMES = ("file", "systemd", "env")
# Limits that are parts of another one.
PARTS = (
    ("max_request_line", "max_head"),
    ("max_field", "max_head"),
    ("max_chunk_extension", "max_chunk_extensions"),
    ("max_connections_per_ip", "max_connections"),
    ("max_unauthenticated_per_ip", "max_connections_per_ip"),
)
NANOSECONDS = 1_000_000_000
DAY_S = 86_400
SOON_S = 14 * DAY_S
COUNTS = ("max_connections", "max_connections_per_ip")
Address = tuple[str, int] | Path


def check(sheets: Sheets, environ: Mapping[str, str], *, starting: bool = True, secrets: bool = True) -> None:
    """Report everything that is wrong with two well-shaped files; a file whose shape is wrong is passed over.

    ``starting``: by the service itself, so that what only its service manager can give has to be there. Without
    ``secrets`` keys, credentials and the access log are taken on trust: they are another user's, whose process says
    what is wrong with them when it uses them.
    """
    if sheets.node.section is not None:
        _check_node(sheets.node, sheets.node.section, secrets)
    if sheets.resources is not None and sheets.resources.section is not None:
        _check_resources(sheets.resources, sheets.resources.section, environ, starting, secrets)


def split_address(address: str, folder: Path) -> Address:
    """``host:port`` or ``[v6]:port`` as host and port, ``unix:PATH`` as a path from ``folder``.

    ``localhost`` is 127.0.0.1: what it resolves to elsewhere is not ours to guess. Raises ValueError with a sentence.
    """
    if address.startswith(UNIX):
        path = Path(os.path.normpath(under(folder, address.removeprefix(UNIX))))
        if address == UNIX or len(os.fsencode(path)) > MAX_UNIX_PATH:
            raise ValueError(f"{path}: a Unix socket's path has at most {MAX_UNIX_PATH} bytes, and a name")
        return path
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+|[A-Za-z0-9.-]+)):([0-9]{1,5})", address)
    if found is None or int(found[3]) > 65_535 or int(found[3]) == 0:
        raise ValueError(f"{address!r} is no address: write 127.0.0.1:8080, [::1]:8080 or unix:PATH")
    host = found[1] or found[2]
    if host == "localhost":
        return "127.0.0.1", int(found[3])
    try:
        return str(ipaddress.ip_address(host)), int(found[3])
    except ValueError:
        raise ValueError(f"{host!r} is no IP address: a listener binds to one, 0.0.0.0 for all") from None


def is_private(address: Address) -> bool:
    """Whether only this machine can connect to it."""
    return isinstance(address, Path) or ipaddress.ip_address(address[0]).is_loopback


def overlap(one: Address, other: Address) -> bool:
    """Whether both cannot be listened on: the same, or one port on all addresses of a family and on one of them."""
    if isinstance(one, Path) or isinstance(other, Path):
        return one == other
    hosts = ipaddress.ip_address(one[0]), ipaddress.ip_address(other[0])
    if one[1] != other[1] or hosts[0].version != hosts[1].version:
        return False
    return hosts[0] == hosts[1] or any(host.is_unspecified for host in hosts)


# ---- node file -----------------------------------------------------------------------------------------------------


def _check_node(sheet: Sheet[NodeFile], node: NodeFile, secrets: bool) -> None:
    document, folder = sheet.document, sheet.document.file.parent
    taken: dict[Address, str] = {}
    names: dict[str, str] = {}
    for number, listener in enumerate(node.listeners):
        at: Location = ("listeners", number)
        _check_listener(document, folder, at, listener, taken=taken, secrets=secrets)
        if listener.proxy_protocol and not node.limits.trusted_peers and not listener.address.startswith(UNIX):
            reason = "nobody could connect: name the load balancer's address in limits.trusted_peers"
            document.report((*at, "proxy_protocol"), reason)
        _check_limits(document, (*at, "limits"), listener.limits, node.limits)
        name = listener.name or listener.address
        if name in names:
            document.report((*at, "name"), f"{name!r} is the name of {names[name]} too; give each its own")
        names[name] = f"listeners[{number}]"
    _check_limits(document, ("limits",), node.limits, node.limits)
    at = ("metrics", "address")
    if (address := _address(document, folder, at, node.metrics.address, taken)) is not None and not is_private(address):
        document.report(at, f"{node.metrics.address}: {PRIVATE}; scrape it from this machine or through a tunnel")
    _check_directories(document, folder, node)
    if node.access_log not in ("stdout", "none") and secrets:
        log = under(folder, node.access_log)
        if not os.path.isdir(log.parent):  # noqa: PTH112 - Path.is_dir raises EACCES
            document.report(
                ("access_log",), f"there is no folder {log.parent} for it; make it, or write stdout or none"
            )
        elif not os.access(log if os.path.lexists(log) else log.parent, os.W_OK):
            document.report(("access_log",), f"{log} cannot be written to by this user")


def _check_listener(
    document: Document,
    folder: Path,
    at: Location,
    listener: ListenerSection,
    *,
    taken: dict[Address, str],
    secrets: bool,
) -> None:
    address = _address(document, folder, (*at, "address"), listener.address, taken)
    if address is not None:
        if listener.tls is None and not is_private(address):
            document.report((*at, "address"), f"{listener.address}: {PRIVATE}; add tls: {{certificate: ..., key: ...}}")
        taken.setdefault(address, f"listeners[{at[1]}]")
    if listener.tls is not None:
        _check_tls(document, folder, (*at, "tls"), listener.tls, secrets)


def _check_tls(document: Document, folder: Path, at: Location, tls: ListenerTlsSection, secrets: bool) -> None:
    public = {"certificate": tls.certificate, "client_ca": tls.client_ca, "client_crl": tls.client_crl}
    private = {"key": tls.key, "ticket_keys": tls.ticket_keys}
    files = {(*at, name): path for name, path in (public | private if secrets else public).items() if path is not None}
    for number, each in enumerate(tls.certificates):
        place = (*at, "certificates", number)
        files |= {(*place, "certificate"): each.certificate} | ({(*place, "key"): each.key} if secrets else {})
    if tls.client_ca is None:
        for name in sorted({"client_auth", "client_crl", "client_depth"} & tls.model_fields_set):
            document.report((*at, name), "needs client_ca: the CAs whose clients it is about")
    for place, path in files.items():
        if place[-1] == "key":
            _warn_if_open(document, place, under(folder, path))
    if not _all_readable(document, {place: under(folder, path) for place, path in files.items()}) or not secrets:
        return
    try:
        context = _native.TlsContext.server(
            certificate=str(under(folder, tls.certificate)),
            key=str(under(folder, tls.key)),
            more=tuple((str(under(folder, e.certificate)), str(under(folder, e.key))) for e in tls.certificates),
            client_ca=None if tls.client_ca is None else str(under(folder, tls.client_ca)),
            client_crl=None if tls.client_crl is None or tls.client_ca is None else str(under(folder, tls.client_crl)),
            client_depth=tls.client_depth,
            ticket_keys=None if tls.ticket_keys is None else str(under(folder, tls.ticket_keys)),
        )
    except _native.TlsError as error:
        named = [place for place, path in files.items() if f" {under(folder, path)}" in str(error)]
        document.report(named[0] if len(named) == 1 else at, str(error))
    else:
        _warn_before_the_end(document, at, context)


def _warn_before_the_end(document: Document, at: Location, context: _native.TlsContext) -> None:
    """Two weeks before the end, but for what lives for weeks only: in the last third of its life."""
    words = {"server": "certificate {} expires", "client_ca": "CA file {} expires", "client_crl": "CRL file {} ends"}
    now = wall_ns() // NANOSECONDS
    for kind, path, since, until in context.file_dates:
        left = until - now
        if left < min(SOON_S, (until - since) // 3):
            what = words[kind].format(path)
            when = datetime.fromtimestamp(until, UTC).strftime("%Y-%m-%d %H:%M UTC")
            due = f"on {when}, in {left // DAY_S} days" if left >= 0 else f"on {when}, which has passed"
            document.report(at, f"{what} {due}; renew it and reload", Severity.WARNING)


def _check_directories(document: Document, folder: Path, node: NodeFile) -> None:
    _check_writable(document, ("state_dir",), under(folder, node.state_dir))
    if node.run_dir is None:
        return
    run = under(folder, node.run_dir)
    socket = run / LONGEST_SOCKET
    if len(os.fsencode(socket)) > MAX_UNIX_PATH:
        most = MAX_UNIX_PATH - len(LONGEST_SOCKET) - 1
        document.report(("run_dir",), f"{run} is too long for the sockets in it: at most {most} bytes")
    elif _check_writable(document, ("run_dir",), run) and not _on_tmpfs(run):
        reason = f"{run} is not on a tmpfs: counters and sockets would go through a disk; use /dev/shm or /run"
        document.report(("run_dir",), reason, Severity.WARNING)


def _check_writable(document: Document, at: Location, path: Path) -> bool:
    """Whether ``path`` is a folder that can be written to, or could be made one."""
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK):  # noqa: PTH112 - Path.is_dir raises EACCES
        return True
    document.report(at, f"{existing} is no folder that this user can write to")
    return False


def _on_tmpfs(path: Path) -> bool:
    """Whether the longest mount point above ``path`` is a tmpfs (proc_mounts(5))."""
    best, kind = "", ""
    real = Path(os.path.realpath(path))
    for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
        _, mount, found, *_ = line.split()
        if real.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind in ("tmpfs", "ramfs")


def _check_limits(document: Document, at: Location, own: ListenerLimitsSection, node: ListenerLimitsSection) -> None:
    """A part that may be larger than its whole is a limit that never speaks."""
    for part, whole in PARTS:
        value = getattr(own, part, None)
        most = getattr(own, whole, None) or getattr(node, whole) or getattr(Limits(), whole)
        if value is not None and value > most:
            shown = str(most) if whole in COUNTS else show_size(most)
            document.report((*at, part), f"is more than {whole}, which is {shown} here; raise that too")


def _address(document: Document, folder: Path, at: Location, text: str, taken: Mapping[Address, str]) -> Address | None:
    try:
        address = split_address(text, folder)
    except ValueError as error:
        document.report(at, str(error))
        return None
    for other, owner in taken.items():
        if overlap(address, other):
            document.report(at, f"{text} is taken by {owner}")
            break
    return address


def _readable(document: Document, at: Location, path: Path) -> bool:
    try:
        with open_file(path):
            return True
    except OSError as error:
        document.report(at, f"cannot read {path}: {(error.strerror or str(error)).lower()}")
        return False


def _all_readable(document: Document, files: Mapping[Location, Path]) -> bool:
    """Looks at every file, so that each one that cannot be read is a finding."""
    return [_readable(document, place, path) for place, path in files.items()].count(False) == 0


def _warn_if_open(document: Document, at: Location, path: Path) -> None:
    """A secret that others than its owner and readers of its group can get at is worth a word."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if mode & stat.S_IROTH:
        document.report(at, f"{path} can be read by every user of this machine: chmod 600", Severity.WARNING)
    elif mode & (stat.S_IWOTH | stat.S_IWGRP):
        document.report(at, f"{path} can be changed by other users than its owner: chmod 600", Severity.WARNING)


# ---- resources file ------------------------------------------------------------------------------------------------


def _check_resources(
    sheet: Sheet[ResourcesFile], file: ResourcesFile, environ: Mapping[str, str], starting: bool, secrets: bool
) -> None:
    document, folder = sheet.document, sheet.document.file.parent
    seen = {"starting": starting, "secrets": secrets}
    for name, credential in file.credentials.items():
        _check_credential(document, ("credentials", name, "from"), credential.from_, environ, **seen)
    contexts: dict[tuple[str | None, ...], str] = {}
    for name, provider in file.providers.items():
        _check_provider(document, folder, ("providers", name), provider, file=file, contexts=contexts, secrets=secrets)
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
        _warn_if_unserved(document, at, route, file)
    _check_overlaps(document, file)


def _check_credential(
    document: Document, at: Location, source: str, environ: Mapping[str, str], *, starting: bool, secrets: bool
) -> None:
    scheme, colon, place = source.partition(":")
    if not colon or scheme not in SCHEMES or not place:
        document.report(at, "is no source of a credential: write file:PATH, systemd:NAME or env:VARIABLE")
    elif scheme == "systemd" and ("/" in place or place in (".", "..")):
        document.report(at, f"{place!r} is no name of a systemd credential")
    elif not secrets:
        return
    elif scheme == "file":
        path = under(document.file.parent, place)
        if _readable(document, at, path):
            _check_secret(document, at, path)
            _warn_if_open(document, at, path)
    elif scheme == "systemd":
        credentials = environ.get("CREDENTIALS_DIRECTORY")
        if credentials is None:
            if starting:
                document.report(at, f"systemd gave no credentials: add LoadCredential={place}:PATH to the unit")
            else:
                reason = f"only the service itself can see it: its unit needs LoadCredential={place}:PATH"
                document.report(at, reason, Severity.WARNING)
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
    document: Document,
    folder: Path,
    at: Location,
    provider: ProviderSection,
    *,
    file: ResourcesFile,
    contexts: dict[tuple[str | None, ...], str],
    secrets: bool,
) -> None:
    """``contexts``: what is wrong, if anything, with the files of contexts that were tried already."""
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
    if not secrets:  # a certificate can only be tried together with its key
        files.pop("key", None)
    if files and not secure:
        document.report((*at, "tls"), "has no effect: no endpoint is https", Severity.WARNING)
    if (tls.certificate is None) != (tls.key is None):
        document.report((*at, "tls"), "certificate and key come together; one of them is missing")
    elif (files or secure) and _all_readable(document, {(*at, "tls", name): path for name, path in files.items()}):
        paths = {name: str(path) for name, path in files.items()}
        certificate = paths.get("certificate") if secrets else None
        wrong = _try_context(contexts, paths.get("ca"), certificate, paths.get("key"))
        if wrong:
            document.report((*at, "tls"), wrong)
    if "key" in files:
        _warn_if_open(document, (*at, "tls", "key"), files["key"])


def _try_context(
    contexts: dict[tuple[str | None, ...], str], ca: str | None, certificate: str | None, key: str | None
) -> str:
    """What is wrong with these files, "" for nothing. Tried once: reading the system's authorities takes 30 ms."""
    found = contexts.get((ca, certificate, key))
    if found is None:
        try:
            _native.TlsContext.client(ca=ca, certificate=certificate, key=key)
            found = ""
        except _native.TlsError as error:
            found = str(error)
        contexts[ca, certificate, key] = found
    return found


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


def _warn_if_unserved(document: Document, at: Location, route: RouteSection, file: ResourcesFile) -> None:
    """Operations that the route names and none of its targets has: no dialect is translated, so they are 404."""
    if any(target.provider not in file.providers for target in route.targets):
        return  # a finding already
    types = {file.providers[target.provider].type.value for target in route.targets}
    for number, name in enumerate(route.operations):
        shape = OPERATIONS.get(Operation(name)) if name in set(Operation) - {Operation.MODELS} else None
        if shape is not None and not shape.served_by & types:
            reason = f"no target of this route serves {name}, which is answered by {', '.join(sorted(shape.served_by))}"
            document.report((*at, "operations", number), f"{reason}: remove it or add a target", Severity.WARNING)


def _check_overlaps(document: Document, file: ResourcesFile) -> None:
    """Two routes that claim the same name for the same caller and operation: nobody could say which one answers.

    A route that names the tenant wins over one for all tenants (:mod:`ascproxy.gateway.router`): those two may meet.
    """
    everybody = ""  # no tenant's name
    claims: dict[tuple[str, str], list[tuple[frozenset[str], str]]] = {}  # operations and route
    for name, route in file.routes.items():
        operations = frozenset(route.operations or Operation)
        for number, model in enumerate(route.models):
            others = [claims.setdefault((model, tenant), []) for tenant in dict.fromkeys(route.tenants or [everybody])]
            found = next((o for owners in others for o in owners if o[0] & operations), None)
            if found is not None:
                what = "is there twice" if found[1] == name else f"belongs to route {found[1]} too"
                document.report(("routes", name, "models", number), f"{model!r} {what}; one route must answer")
            else:
                for owners in others:
                    owners.append((operations, name))
