"""Pages as Prometheus metrics: a collector that reads the pages of all slots at scrape time.

Sums are per-slot columns added here; a cell is read whole, and two cells of one exchange may be read a moment apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ascproxy import _native
from ascproxy.telemetry import metrics
from ascproxy.telemetry.metrics import Kind

MICROSECONDS = 1e6
NANOSECONDS = 1e9
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[str, ...]


class PageCollector(Collector):
    """Reads ``pages()``, the pages of all slots, and ``shared``, the shared page, at each collection. ``now_ns`` is
    monotonic.

    Sums are over all pages; what has the label ``slot`` is of the slot's current page.
    """

    def __init__(
        self,
        pages: Callable[[], Sequence[_native.Page]],
        now_ns: Callable[[], int],
        shared: _native.Page | None = None,
    ) -> None:
        self._pages = pages
        self._now_ns = now_ns
        self._shared = shared

    def collect(self) -> Iterator[Metric]:
        pages = self._pages()
        blocks, singles = _sum_series(pages)
        yield _counter(metrics.REQUESTS, _requests(blocks))
        yield _counter(metrics.REFUSED, singles[metrics.REFUSALS])
        yield _counter(metrics.TRIPPED, singles[metrics.LIMITS])
        for histogram in metrics.HISTOGRAMS:
            yield _histogram(histogram, blocks)
        yield _counter(metrics.TOKENS, _tokens(blocks))
        yield from _header_families(pages)
        yield from _worker_families(pages, self._now_ns())
        yield _ends(pages)
        if self._shared is not None:
            yield from _shared_families(self._shared)


def render(collector: PageCollector) -> bytes:
    """The text exposition of everything that the collector knows."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


def _sum_series(pages: Sequence[_native.Page]) -> tuple[dict[Labels, list[int]], dict[bytes, list[tuple[Labels, int]]]]:
    """The blocks of exchanges by their labels, and the series of one cell and one label by their kind."""
    blocks: dict[Labels, list[int]] = {}
    sums: dict[bytes, dict[Labels, int]] = {metrics.REFUSALS: {}, metrics.LIMITS: {}}
    for page in pages:
        for key, first, cells in page.records():
            kind, *labels = key.split(metrics.SEPARATOR)
            names = tuple(label.decode(errors="replace") for label in labels)
            if kind == metrics.EXCHANGE and cells == _native.METER_CELLS and len(names) == len(metrics.EXCHANGE_LABELS):
                block = blocks.setdefault(names, [0] * cells)
                for i in range(cells):
                    block[i] += page.load(first + i)
            elif kind in sums and len(names) == 1:
                sums[kind][names] = sums[kind].get(names, 0) + page.load(first)
    return blocks, {kind: list(found.items()) for kind, found in sums.items()}


def _requests(blocks: dict[Labels, list[int]]) -> Iterator[tuple[Labels, int]]:
    first = _native.METER_OFFSETS["status"]
    codes = (*map(str, _native.METER_STATUSES), "other")
    for labels, block in blocks.items():
        for i, code in enumerate(codes):
            if n := block[first + i]:
                yield (*labels, code), n


def _tokens(blocks: dict[Labels, list[int]]) -> Iterator[tuple[Labels, int]]:
    for labels, block in blocks.items():
        yield (*labels, "in"), block[_native.METER_OFFSETS["tokens_in"]]
        yield (*labels, "out"), block[_native.METER_OFFSETS["tokens_out"]]


def _counter(metric: metrics.Metric, samples: Iterator[tuple[Labels, int]] | list[tuple[Labels, int]]) -> Metric:
    family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _histogram(histogram: metrics.BlockHistogram, blocks: dict[Labels, list[int]]) -> Metric:
    family = HistogramMetricFamily(histogram.metric.name, histogram.metric.help, labels=histogram.metric.labels)
    first = _native.METER_OFFSETS[histogram.part]
    total = metrics.sum_of(histogram.part)
    bounds = (*(str(bound / MICROSECONDS) for bound in histogram.bounds), "+Inf")
    for labels, block in blocks.items():
        cumulative, buckets = 0, []
        for i, bound in enumerate(bounds):
            cumulative += block[first + i]
            buckets.append((bound, cumulative))
        family.add_metric(labels, buckets, block[total] / MICROSECONDS)
    return family


def _header_families(pages: Sequence[_native.Page]) -> Iterator[Metric]:
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for header in metrics.HEADER_METRICS:
        metric = header.metric
        family = families.get(metric.name)
        if family is None:
            kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            family = families[metric.name] = kind(metric.name, metric.help, labels=metric.labels)
        cell = _native.Page.CELLS[header.cell]
        if header.per_slot:
            for slot, page in metrics.current(pages).items():
                family.add_metric((str(slot), *header.fixed), page.load(cell))
        else:
            family.add_metric(header.fixed, sum(page.load(cell) for page in pages))
    yield from families.values()


def _ends(pages: Sequence[_native.Page]) -> Metric:
    """Workers that have not taken the same files yet: the earliest end is the one to know."""
    family = GaugeMetricFamily(
        metrics.CERTIFICATE_ENDS.name, metrics.CERTIFICATE_ENDS.help, labels=metrics.CERTIFICATE_ENDS.labels
    )
    ends: dict[Labels, int] = {}
    for page in metrics.current(pages).values():
        for key, cell, _ in page.records():
            kind, *labels = key.split(metrics.SEPARATOR)
            if kind == metrics.ENDS and len(labels) == len(metrics.CERTIFICATE_ENDS.labels) and (at := page.load(cell)):
                names = tuple(label.decode(errors="replace") for label in labels)
                ends[names] = min(at, ends.get(names, at))
    for names, at in sorted(ends.items()):
        family.add_metric(names, at)
    return family


def _shared_families(shared: _native.Page) -> Iterator[Metric]:
    cells = {key: first for key, first, _ in shared.records()}
    for metric, key in metrics.SHARED_METRICS:
        family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        family.add_metric((), shared.load(cells.get(key, 0)))
        yield family


def _worker_families(pages: Sequence[_native.Page], now_ns: int) -> Iterator[Metric]:
    revision, heartbeat = metrics.WORKER_REVISION, metrics.HEARTBEAT_AGE
    revisions = GaugeMetricFamily(revision.name, revision.help, labels=revision.labels)
    ages = GaugeMetricFamily(heartbeat.name, heartbeat.help, labels=heartbeat.labels)
    for slot, page in metrics.current(pages).items():
        name = metrics.revision_name(page.load(_native.Page.CELLS["revision"]))
        if name is not None:
            revisions.add_metric((str(slot), name), 1)
        if beat := page.load(_native.Page.CELLS["heartbeat_ns"]):
            ages.add_metric((str(slot),), max(0, now_ns - beat) / NANOSECONDS)
    yield revisions
    yield ages
