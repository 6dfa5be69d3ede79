"""A real vLLM on CPU behind the real service; only with ``make test-real``, which names its environment."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.rig import free_port
from tests.kit.service import ROOT, Service, wait_for

VARIABLE = "ASCPROXY_VLLM"
MODEL = "tiny"
START_S = 180


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(VARIABLE):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a real vLLM: make test-real"))


class Vllm:
    """``vllm serve`` of the tiny model on a port of its own. ``name`` is what its answers call the model; it knows it
    by the common name as well. That tells which of several servers has answered.

    A server is 2.8 GB of memory and one busy thread: three of them, as many as ever run at once, fit into 16 GB.
    """

    def __init__(self, folder: Path, *extra: str, name: str = MODEL, port: int = 0) -> None:
        env = Path(os.environ[VARIABLE]).absolute()
        model = folder / MODEL
        texts = sorted((ROOT / "docs").glob("*.md"))
        make = [str(env / "bin/python"), str(ROOT / "tests/real/make_tiny_model.py"), str(model), *map(str, texts)]
        subprocess.run(make, check=True)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = (folder / "vllm.log").open("wb")
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [
                str(env / "bin/vllm"), "serve", str(model), "--served-model-name", *dict.fromkeys((name, MODEL)),
                "--host", "127.0.0.1", "--port", str(self.port), "--load-format", "dummy", "--enforce-eager",
                "--max-model-len", "2048", "--max-num-seqs", "16", "--dtype", "float32", "--enable-auto-tool-choice",
                "--tool-call-parser", "hermes", "--enable-request-id-headers", *extra,
            ],
            env=os.environ | quiet | small | {"PATH": f"{env / 'bin'}:{os.environ['PATH']}"},
            cwd=folder, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(self._up, f"vLLM answers; its log is {folder / 'vllm.log'}", START_S)
        except BaseException:
            self.stop()
            raise

    def _up(self) -> bool:
        assert self.process.poll() is None, f"vLLM ended with {self.process.returncode}"
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def warm(self) -> None:
        """Let it generate once: the first tokens of a fresh server take seconds, and no test means to measure those."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        asked = json.dumps({"model": MODEL, "prompt": "light", "max_tokens": 50, "ignore_eos": True})
        try:
            connection.request("POST", "/v1/completions", asked, {"content-type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
        finally:
            connection.close()

    def stop(self) -> None:
        """Kill all of its processes, if they are still there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    server = Vllm(tmp_path_factory.mktemp("vllm"))
    try:
        server.warm()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def service(vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("gateway") / "d", upstream=vllm.url, models=[MODEL]) as running:
        yield running
