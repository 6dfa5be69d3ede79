"""The listeners before two scanners that others judge by: sslyze with Mozilla's configurations, and testssl.sh.

Neither is among the development requirements (docs/decisions/0010-tls.md): where one is absent, its tests skip and say
so.
``ASCPROXY_SSLYZE`` and ``ASCPROXY_TESTSSL`` name the programs where they are not in PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.certificates import DAY, Authority
from tests.kit.rig import free_port
from tests.kit.service import Service, Simulator

SSLYZE = os.environ.get("ASCPROXY_SSLYZE") or shutil.which("sslyze")
TESTSSL = os.environ.get("ASCPROXY_TESTSSL") or shutil.which("testssl.sh") or shutil.which("testssl")
QUIET = {"OK", "INFO", "DEBUG"}
# About the test's own CA and certificate, which no listener chooses: in no public store, no revocation, CT or CAA.
OF_THE_CA = (
    "cert_chain_of_trust",
    "cert_revocation",
    "cert_caIssuers",
    "cert_ocspURL",
    "cert_crlDistributionPoints",
    "cert_trust",
    "certificate_transparency",
    "DNS_CAArecord",
    "cert_expirationStatus",
    "cert_extlifeSpan",
    "cert_notAfter",
    "OCSP_stapling",
    "intermediate_cert_badOCSP",
)
# The scanner could not look: its OpenSSL has no engine; it leaves before the ticket of TLS 1.3 comes.
UNSEEN = {"engine_problem", "sessionresumption_ticket"}


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A service with a listener of each version; TLS 1.2 and 1.3 with RSA and ECDSA side by side."""
    folder = tmp_path_factory.mktemp("scanned")
    authority = Authority(folder)
    ecdsa = authority.issue("localhost", common="ecdsa", ends=60 * DAY)
    rsa = authority.issue("localhost", common="rsa", rsa_bits=2048, ends=60 * DAY)
    found: dict[str, Any] = {"intermediate": free_port(), "modern": free_port(), "ca": str(authority.file)}

    def listen(document: dict[str, Any]) -> None:
        pairs = [dict(zip(("certificate", "key"), each.pair, strict=True)) for each in (ecdsa, rsa)]
        document["listeners"] += [
            {"address": f"127.0.0.1:{found['intermediate']}", "tls": {**pairs[0], "certificates": [pairs[1]]}},
            {"address": f"127.0.0.1:{found['modern']}", "tls": {**pairs[0], "min_version": "1.3"}},
        ]

    with (
        Simulator(model="sim-chat") as simulator,
        Service(folder / "d", upstream=simulator.url, models=["sim-chat"], node=listen),
    ):
        yield found


@pytest.mark.skipif(
    SSLYZE is None, reason="no sslyze: pip install sslyze into an environment of its own, put it in PATH"
)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("configuration", ["intermediate", "modern"])
def test_sslyze_finds_mozillas_configuration(ports: dict[str, Any], configuration: str) -> None:
    target = f"localhost:{ports[configuration]}"
    command = [str(SSLYZE), f"--mozilla_config={configuration}", "--certinfo_ca_file", ports["ca"], target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    verdict = done.stdout[done.stdout.find("COMPLIANCE AGAINST") :]
    assert f"{target}: OK - Compliant" in verdict, done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(TESTSSL is None, reason="no testssl.sh: apt-get install testssl.sh")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("configuration", ["intermediate", "modern"])
def test_testssl_finds_nothing_of_ours(ports: dict[str, Any], configuration: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        str(TESTSSL), "--quiet", "--warnings", "off", "--color", "0", "--nodns", "none", "--jsonfile", str(report),
        "--protocols", "--fs", "--server-defaults", "--server-preference", "--vulnerable", "--std",
        f"localhost:{ports[configuration]}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=880, stdin=subprocess.DEVNULL)
    findings = json.loads(report.read_text())
    ids = {finding["id"].split(" ")[0] for finding in findings}
    assert {"TLS1_3", "heartbleed", "ROBOT", "secure_renego"} <= ids, done.stdout  # it has looked
    loud = [
        (finding["id"], finding["severity"], finding["finding"])
        for finding in findings
        if finding["severity"] not in QUIET
        and not finding["id"].startswith(OF_THE_CA)
        and not (finding["severity"] == "WARN" and finding["id"] in UNSEEN)
    ]
    assert loud == []
