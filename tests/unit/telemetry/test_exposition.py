"""Pages to Prometheus text and back through Prometheus' own parser."""

from __future__ import annotations

import mmap

from prometheus_client.parser import text_string_to_metric_families

from ascproxy import _native
from ascproxy.telemetry import metrics
from ascproxy.telemetry.exposition import PageCollector, render

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def page() -> _native.Page:
    return _native.Page(mmap.mmap(-1, metrics.PAGE_SIZE))


def scrape(*pages: _native.Page, now_ns: int = 0) -> Samples:
    text = render(PageCollector(lambda: pages, lambda: now_ns)).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sample(samples: Samples, name: str, **labels: str) -> float:
    return samples[(name, tuple(sorted(labels.items())))]


CHAT = {"listener": "main", "route": "chat", "provider": "rack-a", "operation": "chat/completions"}


def test_exchanges_of_two_slots_are_summed() -> None:
    pages = page(), page()
    metrics.exchange_block(pages[1], "main", "other", "rack-a", "embeddings")  # cells differ between the slots
    status = _native.METER_OFFSETS["status"]
    for n, each in enumerate(pages, 1):
        block = metrics.exchange_block(each, **CHAT)
        each.add(block + status + _native.METER_STATUSES.index(200), 10 * n)
        each.add(block + status + len(_native.METER_STATUSES), n)
        each.add(block + _native.METER_OFFSETS["tokens_out"], 100 * n)
    samples = scrape(*pages)
    assert sample(samples, "ascproxy_requests_total", **CHAT, code="200") == 30
    assert sample(samples, "ascproxy_requests_total", **CHAT, code="other") == 3
    assert sample(samples, "ascproxy_tokens_total", **CHAT, direction="out") == 300
    assert sample(samples, "ascproxy_tokens_total", **CHAT, direction="in") == 0


def test_histograms_are_cumulative_and_in_seconds() -> None:
    one = page()
    block = metrics.exchange_block(one, **CHAT)
    first = block + _native.METER_OFFSETS["first_token"]
    one.add(first, 2)  # up to 1 ms
    one.add(first + 1, 3)  # up to 2.5 ms
    one.add(first + _native.METER_N_BUCKETS - 1, 1)
    one.add(block + metrics.sum_of("first_token"), 1_500_000)  # microseconds
    samples = scrape(one)
    name = "ascproxy_time_to_first_token_seconds"
    assert sample(samples, f"{name}_bucket", **CHAT, le="0.001") == 2
    assert sample(samples, f"{name}_bucket", **CHAT, le="0.0025") == 5
    assert sample(samples, f"{name}_bucket", **CHAT, le="120.0") == 5
    assert sample(samples, f"{name}_bucket", **CHAT, le="+Inf") == 6
    assert sample(samples, f"{name}_count", **CHAT) == 6
    assert sample(samples, f"{name}_sum", **CHAT) == 1.5


def test_refusals_and_header_cells() -> None:
    pages = page(), page()
    cells = _native.Page.CELLS
    for slot, each in enumerate(pages):
        each.store(cells["slot"], slot)
        each.add(metrics.refusal_cell(each, "invalid_api_key"), 2)
        each.store(cells["in_flight"], 3 + slot)
        each.store(cells["upstream_idle"], 5)
        each.store(cells["restarts"], slot)
    pages[1].store(cells["revision"], metrics.revision_number("00ab12cd34ef"))
    pages[1].store(cells["heartbeat_ns"], 1_000_000_000)
    samples = scrape(*pages, now_ns=3_500_000_000)
    assert sample(samples, "ascproxy_refusals_total", code="invalid_api_key") == 4
    assert sample(samples, "ascproxy_in_flight") == 7
    assert sample(samples, "ascproxy_worker_in_flight", slot="1") == 4
    assert sample(samples, "ascproxy_upstream_connections", state="idle") == 10
    assert sample(samples, "ascproxy_worker_restarts_total", slot="1") == 1
    assert sample(samples, "ascproxy_worker_revision", slot="1", revision="00ab12cd34ef") == 1
    assert sample(samples, "ascproxy_worker_heartbeat_age_seconds", slot="1") == 2.5
    assert not any(name == "ascproxy_worker_revision" and ("slot", "0") in labels for name, labels in samples)


def test_every_family_of_the_table_is_exposed_and_no_other() -> None:
    text = render(PageCollector(lambda: [page()], lambda: 0, page())).decode()
    exposed = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")}
    assert exposed == {metric.name: metric.kind.value for metric in metrics.table()}


def test_a_gone_worker_leaves_its_counters_and_no_gauge() -> None:
    one = page()
    cells = _native.Page.CELLS
    header = {h.cell for h in metrics.HEADER_METRICS}
    for cell in header:
        one.store(cells[cell], 9)
    metrics.zero_gauges(one)
    counters = {h.cell for h in metrics.HEADER_METRICS if h.metric.kind is metrics.Kind.COUNTER}
    assert {cell for cell in header if one.load(cells[cell])} == counters


def test_limits_are_summed_over_slots_and_the_shared_page_is_read_as_it_is() -> None:
    one, two, shared = page(), page(), page()
    for each, n in ((one, 2), (two, 3)):
        each.add(each.series(metrics.LIMITS + metrics.SEPARATOR + b"max_head", 1), n)
    for key, value in ((metrics.MEMORY, 850), (metrics.MEMORY_LIMIT, 1000), (metrics.OVERLOAD, 1)):
        shared.store(shared.series(key, 1), value)
    text = render(PageCollector(lambda: [one, two], lambda: 0, shared)).decode()
    assert 'ascproxy_limit_trips_total{reason="max_head"} 5.0\n' in text
    assert "\nascproxy_memory_bytes 850.0\n" in text
    assert "\nascproxy_memory_limit_bytes 1000.0\n" in text
    assert "\nascproxy_overload_step 1.0\n" in text


def test_two_processes_of_one_slot_are_summed_and_the_newest_ready_one_is_shown() -> None:
    """An upgrade puts two into a slot for a while: no series appears twice."""
    cells = _native.Page.CELLS
    old, new, starting = page(), page(), page()
    for incarnation, (each, state) in enumerate(((old, metrics.READY), (new, metrics.READY), (starting, 2)), 1):
        each.store(cells["state"], state)
        each.store(cells["incarnation"], incarnation)
        each.store(cells["in_flight"], 10 * incarnation)
        each.store(cells["revision"], incarnation)
        each.add(metrics.refusal_cell(each, "invalid_api_key"), incarnation)
    samples = scrape(new, starting, old)
    assert sample(samples, "ascproxy_refusals_total", code="invalid_api_key") == 6
    assert sample(samples, "ascproxy_in_flight") == 60
    assert sample(samples, "ascproxy_worker_in_flight", slot="0") == 20
    assert [key for key in samples if key[0] == "ascproxy_worker_revision"] == [
        ("ascproxy_worker_revision", (("revision", "000000000002"), ("slot", "0")))
    ]


def test_the_files_of_listeners_have_their_ends() -> None:
    name, pages = metrics.CERTIFICATE_ENDS.name, (page(), page())
    for slot, each in enumerate(pages):
        each.store(_native.Page.CELLS["slot"], slot)
    own, authority = ("server", "/tls/a.crt", 1, 2_000), ("client_ca", "/tls/ca.crt", 1, 3_000)
    metrics.show_file_dates(pages[0], {"main": (own, authority)})
    metrics.show_file_dates(pages[1], {"main": (("server", "/tls/a.crt", 1, 1_000), authority)})
    samples = scrape(*pages)
    assert sample(samples, name, listener="main", kind="server", file="/tls/a.crt") == 1_000  # what ends first
    assert sample(samples, name, listener="main", kind="client_ca", file="/tls/ca.crt") == 3_000
    for each in pages:  # the next revision has no client CA, and another listener
        metrics.show_file_dates(each, {"main": (own,), "other": (own,)})
    samples = scrape(*pages)
    assert sorted(dict(labels)["listener"] for family, labels in samples if family == name) == ["main", "other"]
    assert sample(samples, name, listener="main", kind="server", file="/tls/a.crt") == 2_000
