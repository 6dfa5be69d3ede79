"""The metrics of a node: their names, and how each is kept in the cells of pages (DESIGN 9, D6).

A page (native/page.h) belongs to one slot. It has header cells with fixed meaning, and series that are found by a key:

* ``exchange\\0listener\\0route\\0provider\\0operation``: the block of native/meter.h, one per combination of labels;
* ``refusals\\0code``: one counter;
* ``ends\\0listener\\0kind\\0file``: when a certificate, CA file or revocation list ends that the worker uses, in
  seconds since 1970; 0: it is no longer used.

Everything here is the same in the worker that writes and in control that reads. Labels come from the configuration and
from closed lists, never from a request: an unknown model does not make a series. What does not do: render
(:mod:`ascproxy.telemetry.exposition`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from ascproxy import _native

PAGE_SIZE = 1 << 20
SEPARATOR = b"\0"
EXCHANGE = b"exchange"
REFUSALS = b"refusals"
LIMITS = b"limits"  # written natively: find_trips of native/py_core.c
EXCHANGE_LABELS = ("listener", "route", "provider", "operation")
READY = 3  # the number of ascproxy.supervisor.slots.State in the cell "state": a contract between processes
# Cells of the shared page, read by every process. Control alone writes the first two, the supervisor the others.
KEY_EPOCH = b"key_epoch"
REVISION = b"revision"
OVERLOAD = b"overload"
MEMORY = b"memory"
MEMORY_LIMIT = b"memory_limit"
RELOAD_FAILED = b"reload_failed"
ENDS = b"ends"


class Kind(Enum):
    """What a metric is to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family. ``name`` is as scraped, a counter's with ``_total``."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeaderMetric:
    """A family kept in one header cell of each page.

    ``per_slot``: one sample with the label ``slot`` each, else the sum over slots; ``fixed`` are further label values.
    """

    metric: Metric
    cell: str
    per_slot: bool = False
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockHistogram:
    """A histogram of the exchange block: ``part`` names its first cell, ``bounds`` are upper bounds in microseconds."""

    metric: Metric
    part: str
    bounds: tuple[int, ...]


REQUESTS = Metric(
    "ascproxy_requests_total",
    Kind.COUNTER,
    "Exchanges settled, by the status sent to the client (499: the client went away, other: none of the usual ones).",
    (*EXCHANGE_LABELS, "code"),
)
TOKENS = Metric(
    "ascproxy_tokens_total",
    Kind.COUNTER,
    "Tokens that upstreams reported as used; in: prompt, out: completion.",
    (*EXCHANGE_LABELS, "direction"),
)
REFUSED = Metric(
    "ascproxy_refusals_total", Kind.COUNTER, "Requests that ascproxy answered itself, by public error code.", ("code",)
)
TRIPPED = Metric(
    "ascproxy_limit_trips_total",
    Kind.COUNTER,
    "Times that a limit was reached, by its name; each is explained on the page of limits.",
    ("reason",),
)
HISTOGRAMS = (
    BlockHistogram(
        Metric(
            "ascproxy_gateway_seconds",
            Kind.HISTOGRAM,
            "The gateway's own time: from the complete request to its departure upstream.",
            EXCHANGE_LABELS,
        ),
        "gateway",
        _native.METER_BOUNDS_GATEWAY,
    ),
    BlockHistogram(
        Metric(
            "ascproxy_time_to_first_token_seconds",
            Kind.HISTOGRAM,
            "From the request's departure upstream to the first content of the answer.",
            EXCHANGE_LABELS,
        ),
        "first_token",
        _native.METER_BOUNDS_LATENCY,
    ),
    BlockHistogram(
        Metric(
            "ascproxy_between_tokens_seconds",
            Kind.HISTOGRAM,
            "Pauses between reads of a streamed answer.",
            EXCHANGE_LABELS,
        ),
        "between_tokens",
        _native.METER_BOUNDS_LATENCY,
    ),
    BlockHistogram(
        Metric(
            "ascproxy_request_seconds",
            Kind.HISTOGRAM,
            "From the request's first byte to the end of its exchange.",
            EXCHANGE_LABELS,
        ),
        "request",
        _native.METER_BOUNDS_LATENCY,
    ),
)
UPSTREAM_CONNECTIONS = Metric(
    "ascproxy_upstream_connections", Kind.GAUGE, "Connections to upstreams, by state.", ("state",)
)
HEADER_METRICS = (
    HeaderMetric(
        Metric("ascproxy_in_flight", Kind.GAUGE, "Exchanges between a complete request and its end.", ()), "in_flight"
    ),
    HeaderMetric(Metric("ascproxy_connections", Kind.GAUGE, "Connections of clients.", ()), "connections"),
    HeaderMetric(
        Metric("ascproxy_connections_accepted_total", Kind.COUNTER, "Connections of clients accepted.", ()), "accepted"
    ),
    HeaderMetric(
        Metric("ascproxy_connections_paused", Kind.GAUGE, "Connections and streams of clients that do not drain.", ()),
        "paused",
    ),
    HeaderMetric(
        Metric("ascproxy_tls_handshakes_failed_total", Kind.COUNTER, "TLS handshakes of clients that failed.", ()),
        "tls_failed",
    ),
    HeaderMetric(UPSTREAM_CONNECTIONS, "upstream_busy", fixed=("busy",)),
    HeaderMetric(UPSTREAM_CONNECTIONS, "upstream_idle", fixed=("idle",)),
    HeaderMetric(
        Metric("ascproxy_upstream_connections_opened_total", Kind.COUNTER, "Connections to upstreams opened.", ()),
        "upstream_opened",
    ),
    HeaderMetric(
        Metric("ascproxy_request_bodies_bytes", Kind.GAUGE, "Bytes of request bodies held in memory.", ()), "body_bytes"
    ),
    HeaderMetric(
        Metric("ascproxy_log_lines_dropped_total", Kind.COUNTER, "Access lines that found a full sink.", ()),
        "log_dropped",
    ),
    HeaderMetric(
        Metric("ascproxy_metric_series_lost_total", Kind.COUNTER, "Series that found no room in a page.", ()),
        "series_lost",
    ),
    HeaderMetric(
        Metric("ascproxy_worker_restarts_total", Kind.COUNTER, "Times a slot's worker was replaced.", ("slot",)),
        "restarts",
        per_slot=True,
    ),
    HeaderMetric(
        Metric("ascproxy_worker_in_flight", Kind.GAUGE, "Exchanges in flight in a slot's worker.", ("slot",)),
        "in_flight",
        per_slot=True,
    ),
    HeaderMetric(
        Metric("ascproxy_worker_listening", Kind.GAUGE, "1 while a slot's worker accepts connections.", ("slot",)),
        "listening",
        per_slot=True,
    ),
    HeaderMetric(
        Metric(
            "ascproxy_worker_revision_failed",
            Kind.GAUGE,
            "1 while a slot's worker could not apply the newest revision.",
            ("slot",),
        ),
        "revision_failed",
        per_slot=True,
    ),
    HeaderMetric(
        Metric(
            "ascproxy_worker_memory_bytes",
            Kind.GAUGE,
            "Anonymous memory of a slot's worker, without what it still shares with the supervisor.",
            ("slot",),
        ),
        "memory",
        per_slot=True,
    ),
)
# One cell of the shared page each.
SHARED_METRICS = (
    (
        Metric("ascproxy_memory_bytes", Kind.GAUGE, "Anonymous and shared memory of all processes of the service.", ()),
        MEMORY,
    ),
    (Metric("ascproxy_memory_limit_bytes", Kind.GAUGE, "The `memory_limit` in force.", ()), MEMORY_LIMIT),
    (
        Metric(
            "ascproxy_overload_step",
            Kind.GAUGE,
            "0 none, 1 answers close their connections, 2 requests get 503, 3 nobody accepts.",
            (),
        ),
        OVERLOAD,
    ),
    (
        Metric(
            "ascproxy_reload_failed",
            Kind.GAUGE,
            "1 while the last reload was refused, or not taken by every worker: what was in force before goes on.",
            (),
        ),
        RELOAD_FAILED,
    ),
)
CERTIFICATE_ENDS = Metric(
    "ascproxy_certificate_expiry_timestamp_seconds",
    Kind.GAUGE,
    "When a file that a listener uses ends, in seconds since 1970; kind: server, client_ca or client_crl.",
    ("listener", "kind", "file"),
)
WORKER_REVISION = Metric(
    "ascproxy_worker_revision", Kind.GAUGE, "1 for the revision that a slot's worker decides on.", ("slot", "revision")
)
HEARTBEAT_AGE = Metric(
    "ascproxy_worker_heartbeat_age_seconds", Kind.GAUGE, "Time since a slot's worker last ticked.", ("slot",)
)
# Header cells that say something about the worker that runs now: zeroed when it has gone.
GAUGE_CELLS = (
    "in_flight",
    "connections",
    "upstream_busy",
    "upstream_idle",
    "body_bytes",
    "paused",
    "listening",
    "heartbeat_ns",
    "revision",
    "revision_failed",
    "pid",
    "memory",
)


def table() -> tuple[Metric, ...]:
    """Every family once, in the order of the operations page."""
    families = [REQUESTS, REFUSED, TRIPPED, *(h.metric for h in HISTOGRAMS), TOKENS]
    families += [h.metric for h in HEADER_METRICS] + [WORKER_REVISION, HEARTBEAT_AGE, CERTIFICATE_ENDS]
    families += [metric for metric, _ in SHARED_METRICS]
    return tuple(dict.fromkeys(families))


def exchange_block(page: _native.Page, listener: str, route: str, provider: str, operation: str) -> int:
    """First cell of the meter block that counts the exchanges with these labels; 0 when the page is full.

    Called while a revision is built, never per request. ``-`` stands for a label that is not known yet.
    """
    key = SEPARATOR.join((EXCHANGE, listener.encode(), route.encode(), provider.encode(), operation.encode()))
    return page.series(key, _native.METER_CELLS)


def sum_of(part: str) -> int:
    """The cell of a histogram's sum in microseconds, from the start of its exchange block."""
    histograms = _native.METER_OFFSETS[part] - _native.METER_OFFSETS["gateway"]
    return _native.METER_OFFSETS["sums"] + histograms // _native.METER_N_BUCKETS


def refusal_cell(page: _native.Page, code: str) -> int:
    """The cell that counts refusals with a public error code; 0 when the page is full."""
    return page.series(REFUSALS + SEPARATOR + code.encode(), 1)


def show_file_dates(page: _native.Page, dates: Mapping[str, Iterable[tuple[str, str, int, int]]]) -> None:
    """Write down when the files end that listeners use now (``TlsContext.file_dates`` by listener), and nothing of
    those that they do not use any more."""
    ends = {
        SEPARATOR.join((ENDS, listener.encode(), kind.encode(), os.fsencode(path))): max(0, until)
        for listener, files in dates.items()
        for kind, path, _, until in files
    }
    for key, cell, _ in page.records():
        if key.startswith(ENDS + SEPARATOR) and key not in ends:
            page.store(cell, 0)
    for key, until in ends.items():
        if cell := page.series(key, 1):  # 0: the page is full
            page.store(cell, until)


def current(pages: Iterable[_native.Page]) -> dict[int, _native.Page]:
    """Of each slot the page of its newest process that is ready, else of its newest: processes of a slot overlap."""
    cells, found = _native.Page.CELLS, dict[int, tuple[tuple[bool, int], _native.Page]]()
    for page in pages:
        slot, rank = page.load(cells["slot"]), (page.load(cells["state"]) == READY, page.load(cells["incarnation"]))
        if slot not in found or rank > found[slot][0]:
            found[slot] = rank, page
    return {slot: page for slot, (_, page) in sorted(found.items())}


def zero_gauges(page: _native.Page) -> None:
    """Forget what the page says about a worker that is gone; its counters stay."""
    for name in GAUGE_CELLS:
        page.store(_native.Page.CELLS[name], 0)


def revision_number(revision: str) -> int:
    """A revision (12 hex digits) as the number that cells hold; 0 means none."""
    return int(revision, 16)


def revision_name(number: int) -> str | None:
    """The revision that a cell holds, or None."""
    return f"{number:012x}" if number else None
