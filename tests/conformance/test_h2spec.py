"""h2spec, strict, against the real service: over TLS, and on the plaintext listener with prior knowledge.

h2spec is a program of its own: ``ASCPROXY_H2SPEC`` names it, else it is looked for on PATH.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.service import Service, first_light

TESTS = 147  # as many as 2.6.0 has; a later one may have more
# On a port that speaks both, what is no preface is HTTP/1.1, and is answered as such before the connection is closed;
# h2spec reads that answer as a frame. What is said and done there instead has a test of its own below.
NOT_A_FRAME = ("http2/3.5", "Sends invalid connection preface")

program = os.environ.get("ASCPROXY_H2SPEC") or shutil.which("h2spec")
needs_h2spec = pytest.mark.skipif(
    program is None, reason="no h2spec: ASCPROXY_H2SPEC names the program (docs/testing.md)"
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with first_light(tmp_path_factory.mktemp("h2spec")) as (started, _):
        yield started


def failures(junit: Path) -> dict[tuple[str, str], str]:
    """What did not pass, by section and title, with h2spec's own words; at least TESTS have run, none was left out."""
    suites = ET.parse(junit).getroot().findall("testsuite")
    assert sum(int(suite.get("tests", "0")) for suite in suites) >= TESTS
    assert sum(int(suite.get("skipped", "0")) for suite in suites) == 0
    return {
        (case.get("package", ""), case.get("classname", "")): "".join(fault.itertext())
        for suite in suites
        for case in suite.findall("testcase")
        for fault in (*case.findall("failure"), *case.findall("error"))
    }


def h2spec(folder: Path, *how: str) -> dict[tuple[str, str], str]:
    """One strict run to its end."""
    assert program is not None
    junit = folder / "h2spec.xml"
    done = subprocess.run(
        [program, "--strict", "--timeout", "5", "--junit-report", str(junit), *how],
        check=False, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert junit.exists(), done.stdout + done.stderr
    found = failures(junit)
    assert (done.returncode == 0) is not found, done.stdout
    return found


@needs_h2spec
@pytest.mark.timeout(200)
def test_over_tls_every_case_passes(service: Service, tmp_path: Path) -> None:
    assert h2spec(tmp_path, "--tls", "--insecure", "--port", str(service.https_port)) == {}


@needs_h2spec
@pytest.mark.timeout(200)
def test_with_prior_knowledge_every_case_passes_that_is_http_2(service: Service, tmp_path: Path) -> None:
    found = h2spec(tmp_path, "--port", str(service.http_port))
    found.pop(NOT_A_FRAME, None)
    assert found == {}


def test_what_is_no_preface_is_refused_as_http_1_and_the_connection_closed(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.http_port), timeout=10) as connection:
        connection.sendall(b"INVALID CONNECTION PREFACE\r\n\r\n")
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nConnection: close\r\n" in said or b"\r\nconnection: close\r\n" in said
