"""What h2load says, read; and a load that goes wrong is told apart from one that does not."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from bench import command, h2load, lines, machine
from bench.subject import Place, Subject

FIXED = """\
starting benchmark...
spawning thread #0: 8 total client(s). 4000 total requests
TLS Protocol: TLSv1.3
Cipher: TLS_AES_128_GCM_SHA256
Server Temp Key: X25519 253 bits
Application protocol: h2
progress: 100% done

finished in 217.73ms, 18371.21 req/s, 27.37MB/s
requests: 4000 total, 4000 started, 4000 done, 4000 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 4000 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 5.96MB (6248588) total, 171.93KB (176052) headers (space savings 66.91%), 5.72MB (6000000) data
                     min         max         mean         sd        +/- sd
time for request:      385us     30.94ms      2.94ms      3.64ms    97.93%
time for connect:     3.53ms      9.74ms      6.77ms      2.19ms    62.50%
time to 1st byte:    38.20ms     41.27ms     40.41ms       997us    87.50%
req/s           :    2305.98     2591.99     2380.98       95.09    87.50%
"""
CUT = """\
Warm-up phase is over for thread #0.
Main benchmark duration is started for thread #0.
Process Request Failure:2
Main benchmark duration is over for thread #0. Stopping all clients.
Application protocol: h2c

finished in 4.30s, 9399.75 req/s, 14.00MB/s
requests: 37665 total, 37599 started, 37665 done, 37590 succeeded, 75 failed, 66 errored, 0 timeout
status codes: 37590 2xx, 0 3xx, 3 4xx, 6 5xx
traffic: 56.01MB (58728082) total, 1.68MB (1760667) headers (space savings 66.95%), 57.30MB (60082500) data
                     min         max         mean         sd        +/- sd
time for request:      532us       1.02s     12.54ms      4.94ms    69.31%
"""


def test_a_run_without_a_fault_is_read() -> None:
    assert h2load.parse(FIXED) == h2load.Told(
        protocol="h2",
        requests=4000,
        succeeded=4000,
        failed=0,
        errored=0,
        timeout=0,
        statuses={"2xx": 4000, "3xx": 0, "4xx": 0, "5xx": 0},
        data_bytes=6_000_000,
        mean_us=2940.0,
        max_us=30_940.0,
    )
    assert (h2load.parse(FIXED).wrong, h2load.parse(FIXED).complaint()) == (0, "")


def test_what_went_wrong_is_counted_once_and_said() -> None:
    told = h2load.parse(CUT)
    assert (told.wrong, told.succeeded, told.max_us) == (75, 37_590, 1_020_000.0)
    assert told.complaint() == "75 failed, of them 66 without an answer; answers: 37590 2xx, 3 4xx, 6 5xx"


def test_a_redirection_is_no_good_answer() -> None:
    told = h2load.parse(FIXED.replace("4000 2xx, 0 3xx", "3990 2xx, 10 3xx"))
    assert told.wrong == 10
    assert "10 3xx" in told.complaint()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (FIXED.replace("protocol: h2", "protocol: http/1.1"), "does not speak HTTP/2, but http/1.1"),
        (FIXED.partition("finished")[0], "did not say `requests`"),
        (FIXED.replace("2.94ms", "2.94min"), "duration '2.94min'"),
        ("", "did not say `Application protocol`"),
    ],
)
def test_what_cannot_be_read_is_not_taken_for_a_measurement(output: str, said: str) -> None:
    with pytest.raises(machine.StartError, match=said):
        h2load.parse(output)


def test_the_request_is_as_long_as_those_of_the_other_lines() -> None:
    assert len(h2load.body()) == h2load.BODY_BYTES
    assert json.loads(h2load.body())["messages"][0]["role"] == "user"


# -- a program in the place of h2load, which says what it is told to


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What h2load will say; its arguments are noted beside it."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "h2load"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/says\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return tmp_path / "says"


def load(folder: Path, *, connections: int = 500, expect_bytes: int | None = 1500) -> h2load.H2Load:
    core = min(os.sched_getaffinity(0))
    subject = Subject(Place(core, 1, folder, folder), port=1, tls_port=2, key="k")
    return h2load.H2Load(
        subject, core, "H2 on x", tls=True, connections=connections, streams=8, seconds=1.5, warmup=0.3,
        expect_bytes=expect_bytes,
    )  # fmt: skip


def test_a_window_is_what_h2load_says_it_is(says: Path, tmp_path: Path) -> None:
    says.write_text(FIXED)
    asked = load(tmp_path)
    asked.ready()
    asked.stop()
    says.write_text(f"{h2load.BEGUN} for thread #0.\n{h2load.OVER} for thread #0.\n{FIXED}")
    asked._start(*asked.span)
    try:
        asked.begin()
        asked.end()
        told = asked.report()
    finally:
        asked.stop()
    assert (told["requests"], told["seconds"], told["errors"]) == (4000, 1.5, {"failed": 0, "first": ""})
    assert told["latency_us"] == {"mean": 2940.0, "max": 30_940.0}
    probe, *_, window = (tmp_path / "asked").read_text().splitlines()
    assert "--requests=4000 --clients=500 --max-concurrent-streams=8 " in probe
    assert "--duration=1500ms --warm-up-time=550ms " in window
    assert probe.endswith("--header=content-type: application/json https://127.0.0.1:2/v1/chat/completions")


@pytest.mark.parametrize(
    ("output", "changes", "said"),
    [
        (FIXED, {"expect_bytes": 1499}, "4000 answers had 6,000,000 bytes, and not 1499 each"),
        (FIXED, {"connections": 501}, "only 4000 answers"),
        (CUT, {}, "75 failed"),
    ],
)
def test_a_subject_that_answers_wrongly_is_not_measured(
    output: str, changes: dict[str, int], said: str, says: Path, tmp_path: Path
) -> None:
    says.write_text(output)
    asked = load(tmp_path, **changes)
    try:
        with pytest.raises(machine.StartError, match=f"H2 on x: {said}"):
            asked.ready()
    finally:
        asked.stop()


def test_a_load_that_ends_before_its_window_is_no_measurement(says: Path, tmp_path: Path) -> None:
    says.write_text(FIXED)
    asked = load(tmp_path)
    try:
        asked.ready()
        with pytest.raises(machine.StartError, match="ended before it was measured"):
            asked.begin()
    finally:
        asked.stop()


def test_without_h2load_its_line_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2load, "PROGRAM", "h2load-that-is-not-there")
    run = command.Run(command.options(["--only", "W1,H2", "--peers", "bare"]))
    assert run.chosen.only == ["W1"]
    assert run.notes == [f"h2load-that-is-not-there is not installed: apt-get install -y {h2load.PACKAGE}"]


def test_the_line_stays_below_the_requests_that_a_connection_may_have() -> None:
    line = replace(lines.LINES["H2"])
    assert line.connections * 10_000 > 10 * 30_000  # ten seconds at more than what was seen
    assert (line.tls, line.saturates, line.streams > 1) == (True, True, True)
