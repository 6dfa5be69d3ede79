"""The scenarios of bench/scenarios, run by locust for a few requests against the real service and the simulator."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import packages
from tests.kit.service import ROOT, Service, first_light

LOCUST = packages.program(packages.LOCUST)
SCENARIOS = ROOT / "bench" / "scenarios"
pytestmark = pytest.mark.skipif(LOCUST is None, reason=f"locust is not installed: {packages.how_to(packages.LOCUST)}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with first_light(tmp_path_factory.mktemp("scenarios"), "--rate", "0", "--tokens", "8") as (running, _):
        yield running


def locust(service: Service, *names: str, more: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Some users, until there were some requests."""
    files = ",".join(str(SCENARIOS / f"{name}.py") for name in names)
    given = {
        **os.environ,
        "OPENAI_BASE_URL": f"https://127.0.0.1:{service.https_port}/v1",
        "OPENAI_API_KEY": service.key,
        "SSL_CERT_FILE": service.facts["ca"],
    }
    shape = () if len(names) > 1 else ("-u", "4", "-r", "4")
    return subprocess.run(
        [str(LOCUST), "-f", files, "--headless", *shape, "--requests", "12", "-t", "50", "--json", "--skip-log", *more],
        env=given | env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The statistics by name."""
    return {row["name"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("chat", {"chat"}), ("stream", {"stream", "first token", "last token"}), ("embed", {"embed"})],
)
def test_every_answer_is_whole_and_its_own(service: Service, name: str, expected: set[str]) -> None:
    done = locust(service, name, more=("--markers",))
    assert done.returncode == 0, done.stderr
    found = rows(done)
    assert expected <= found.keys()
    for row in expected:
        assert found[row]["num_requests"] >= 3, found[row]
        assert found[row]["num_failures"] == 0, found[row]


def test_a_repetition_under_one_key_has_the_same_answer_or_is_a_failure(service: Service) -> None:
    """What the scenario reports is what is so, whether or not the gateway knows the header by now."""
    body = {"model": "sim-chat", "messages": [{"role": "user", "content": "hi"}]}
    key = str(uuid.uuid4())
    ids = {json.loads(service.ask("/v1/chat/completions", body, Idempotency_Key=key)[2])["id"] for _ in range(2)}
    done = locust(service, "duplicate")
    found = rows(done)
    assert found["first"]["num_failures"] == 0
    repeated = found["duplicate"]
    assert repeated["num_requests"] >= 3
    assert repeated["num_failures"] == (0 if len(ids) == 1 else repeated["num_requests"])
    assert (done.returncode == 0) == (len(ids) == 1)


@pytest.mark.parametrize("shape", ["ramp", "spike", "soak"])
def test_a_shape_brings_the_users(service: Service, shape: str) -> None:
    done = locust(service, "chat", shape)
    assert done.returncode == 0, done.stderr
    assert rows(done)["chat"]["num_requests"] >= 1


def test_an_answer_that_is_not_the_requests_own_is_a_failure(service: Service, tmp_path: Path) -> None:
    """A model that says nothing back stands for one that says another's."""
    muddled = tmp_path / "muddled.py"
    muddled.write_text(
        f"import sys; sys.path.insert(0, {str(SCENARIOS)!r})\n"
        "from chat import Chat\n"
        "class Muddled(Chat):\n"
        "    def chat(self):\n"
        "        body, marker = super().chat()\n"
        "        return body | {'user': 'somebody-else'}, marker\n"
        "del Chat\n"
    )
    done = subprocess.run(
        [
            *(str(LOCUST), "-f", str(muddled), "--headless", "-u", "1", "--requests", "1", "-t", "50"),
            *("--json", "--skip-log", "--markers"),
        ],
        env={
            **os.environ,
            "OPENAI_BASE_URL": f"https://127.0.0.1:{service.https_port}/v1",
            "OPENAI_API_KEY": service.key,
            "SSL_CERT_FILE": service.facts["ca"],
        },
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    found = rows(done)["chat"]
    assert found["num_failures"] == found["num_requests"] >= 1


@pytest.mark.parametrize("missing", ["OPENAI_API_KEY", "OPENAI_BASE_URL"])
def test_what_is_not_set_is_named_before_anything_is_sent(service: Service, missing: str) -> None:
    done = locust(service, "chat", **{missing: ""})
    assert done.returncode != 0
    assert missing in done.stderr
