"""Checked files to a snapshot: absolute paths, numbers, ids, and the name of the revision."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from ascproxy.config.check import check, split_address, split_endpoint
from ascproxy.config.document import Document, under
from ascproxy.config.finding import Finding, InvalidConfigError, has_errors
from ascproxy.config.load import Sheets, load
from ascproxy.config.schema import (
    ListenerLimitsSection,
    ListenerTlsSection,
    NodeFile,
    ProviderSection,
    ResourcesFile,
    RouteSection,
)
from ascproxy.errors import UsageError
from ascproxy.model.node import CertificatePair, ClientAuth, Limits, Listener, ListenerTls, Node
from ascproxy.model.provider import Credential, Endpoint, Provider, ProviderType, UpstreamTimeouts, UpstreamTls
from ascproxy.model.route import Route, Target
from ascproxy.model.snapshot import Snapshot
from ascproxy.model.tenant import Tenant

VLLM_POOL_IDLE_MS = 4_000  # vLLM closes idle connections after 5.0 s
POOL_IDLE_MS = 30_000
REVISION_DIGITS = 12
RUNTIME_DIRECTORY = "RUNTIME_DIRECTORY"  # of systemd.exec(5)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a tmpfs on every supported system; the folder in it is 0700


@dataclass(frozen=True, slots=True)
class Compiled:
    """A configuration that can be used, and what was noticed about it."""

    snapshot: Snapshot
    warnings: tuple[Finding, ...]


def compile_files(
    target: Path, environ: Mapping[str, str] = os.environ, *, starting: bool = True, secrets: bool = True
) -> Compiled:
    """Load, check and compile ``target``, a node file or its folder; ``starting``: by the service itself; ``secrets``:
    this user can see what only workers need.

    Raises :class:`UsageError` if the node file cannot be read, :class:`InvalidConfigError` with every finding of both
    files if one of them is an error.
    """
    sheets = load(target)
    check(sheets, environ, starting=starting, secrets=secrets)
    findings = sheets.findings
    if has_errors(findings) or sheets.node.section is None:
        raise InvalidConfigError(findings)
    return Compiled(snapshot_of(sheets, environ), tuple(findings))


def snapshot_of(sheets: Sheets, environ: Mapping[str, str]) -> Snapshot:
    """The snapshot of two checked files."""
    node_file = sheets.node.section
    assert node_file is not None
    file = sheets.node.document.file
    resources = sheets.resources.section if sheets.resources is not None else None
    folder = sheets.resources.document.file.parent if sheets.resources is not None else file.parent
    resources = resources or ResourcesFile()
    node = _node(node_file, file, environ)
    snapshot = Snapshot(
        revision="",
        node=node,
        tenants=tuple(Tenant(name) for name in resources.tenants),
        credentials=tuple(
            Credential(name, *_source(folder, section.from_)) for name, section in resources.credentials.items()
        ),
        providers=_providers(resources, folder),
        routes=tuple(_route(name, section, node.limits.max_body) for name, section in resources.routes.items()),
    )
    digest = hashlib.sha256(orjson.dumps(snapshot, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return dataclasses.replace(snapshot, revision=digest[:REVISION_DIGITS])


def _node(section: NodeFile, file: Path, environ: Mapping[str, str]) -> Node:
    folder = file.parent
    limits = _limits(Limits(), section.limits)
    log = section.access_log
    return Node(
        name=section.node,
        state_dir=_absolute(folder, section.state_dir),
        run_dir=_run_dir(section.node, section.run_dir, file, environ),
        workers=section.workers or len(os.sched_getaffinity(0)),
        listeners=tuple(
            Listener(
                name=each.name or each.address,
                address=_address(folder, each.address),
                tls=None if each.tls is None else listener_tls(folder, each.tls),
                http2=each.http2,
                limits=_limits(limits, each.limits),
                proxy_protocol=each.proxy_protocol,
            )
            for each in section.listeners
        ),
        metrics_address=_address(folder, section.metrics.address),
        limits=limits,
        access_log=log if log in ("stdout", "none") else _absolute(folder, log),
    )


def listener_tls(folder: Path, section: ListenerTlsSection) -> ListenerTls:
    """A listener's TLS with absolute paths."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else _absolute(folder, path)

    return ListenerTls(
        certificate=_absolute(folder, section.certificate),
        key=_absolute(folder, section.key),
        client_ca=absolute(section.client_ca),
        client_auth=ClientAuth(section.client_auth or ClientAuth.REQUIRED),
        client_crl=absolute(section.client_crl),
        client_depth=section.client_depth,
        certificates=tuple(
            CertificatePair(_absolute(folder, each.certificate), _absolute(folder, each.key))
            for each in section.certificates
        ),
        min_version=section.min_version,
        ticket_keys=absolute(section.ticket_keys),
    )


def _limits(base: Limits, section: ListenerLimitsSection) -> Limits:
    """``base`` with what ``section`` says; a time is ``NAME`` in the file and ``NAME_ms`` in the noun."""
    fields = {f.name for f in dataclasses.fields(Limits)}
    said = section.model_dump(exclude_none=True)
    if "trusted_peers" in said:
        said["trusted_peers"] = tuple(said["trusted_peers"])
    return dataclasses.replace(base, **{n if n in fields else f"{n}_ms": value for n, value in said.items()})


def run_dir(document: Document, environ: Mapping[str, str]) -> Path:
    """The run directory that a node file leads to. Raises :class:`UsageError` if it leads to none."""
    data = document.data if isinstance(document.data, dict) else {}
    node, said = data.get("node"), data.get("run_dir")
    if isinstance(said, str) and said:
        return Path(_absolute(document.file.parent, said))
    if not isinstance(node, str):
        raise UsageError(f"{document.file} names no node; check it with: ascproxy check {document.file}")
    return Path(_run_dir(node, None, document.file, environ))


def state_dir(document: Document) -> Path:
    """The state folder that a node file leads to, whatever else is wrong with it."""
    said = document.data.get("state_dir") if isinstance(document.data, dict) else None
    usual = str(NodeFile.model_fields["state_dir"].default)
    return Path(_absolute(document.file.parent, said if isinstance(said, str) and said else usual))


def _run_dir(node: str, said: str | None, file: Path, environ: Mapping[str, str]) -> str:
    if said is not None:
        return _absolute(file.parent, said)
    if given := environ.get(RUNTIME_DIRECTORY):
        return given.split(":")[0]
    short = hashlib.sha256(os.fsencode(file)).hexdigest()[:8]
    return str(SHARED_MEMORY / f"ascproxy-{node}-{short}")


def _providers(resources: ResourcesFile, folder: Path) -> tuple[Provider, ...]:
    providers = []
    number = 0
    for name, section in resources.providers.items():
        endpoints = []
        for url in section.endpoints:
            parts = split_endpoint(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            endpoints.append(Endpoint(number, url, parts.scheme, parts.hostname or "", port, parts.path.rstrip("/")))
            number += 1
        providers.append(_provider(name, section, tuple(endpoints), folder))
    return tuple(providers)


def _provider(name: str, section: ProviderSection, endpoints: tuple[Endpoint, ...], folder: Path) -> Provider:
    files = {k: _absolute(folder, v) for k, v in section.tls.model_dump(exclude_none=True).items()}
    times = {f"{k}_ms": v for k, v in section.timeouts.model_dump(exclude_none=True).items()}
    usual_idle_ms = VLLM_POOL_IDLE_MS if section.type is ProviderType.VLLM else POOL_IDLE_MS
    return Provider(
        name=name,
        type=section.type,
        endpoints=endpoints,
        credential=section.credential,
        region=section.region,
        tls=UpstreamTls(**files),
        timeouts=UpstreamTimeouts(**times),
        pool_idle_ms=section.pool_idle if section.pool_idle is not None else usual_idle_ms,
        request_headers=tuple(section.request_headers),
    )


def _route(name: str, section: RouteSection, max_body: int) -> Route:
    limits = section.limits
    return Route(
        name=name,
        models=tuple(section.models),
        targets=tuple(Target(each.provider, each.model) for each in section.targets),
        operations=tuple(section.operations),
        tenants=tuple(section.tenants),
        max_body=limits.max_body if limits.max_body is not None else max_body,
        retry_ambiguous=section.retry_ambiguous,
        usage=section.usage,
        first_byte_ms=limits.first_byte,
        between_tokens_ms=limits.between_tokens,
        total_ms=limits.total,
    )


def _source(folder: Path, source: str) -> tuple[str, str]:
    scheme, _, place = source.partition(":")
    return scheme, _absolute(folder, place) if scheme == "file" else place


def _absolute(folder: Path, path: str) -> str:
    return str(Path(os.path.normpath(under(folder, path))))


def _address(folder: Path, text: str) -> str:
    address = split_address(text, folder)
    if isinstance(address, Path):
        return f"unix:{address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
