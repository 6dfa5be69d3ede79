"""The real service in front of the real simulator: the processes that a user would start, on loopback.

``Simulator`` is ``python -m ascproxy.sim``; ``Service`` is ``ascproxy init`` and ``ascproxy serve``. Both are started
and stopped here and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.kit.rig import free_port

ROOT = Path(__file__).parents[2]
READY_S = 20.0


def wait_for(condition: Callable[[], Any], what: str, seconds: float = READY_S) -> Any:
    """The first true value of ``condition``; fails loudly after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def command(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """``ascproxy ARGS`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ascproxy", *args],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=60, **more,
    )  # fmt: skip


class Simulator:
    """A model server on a port of its own. ``extra`` are further options of ``ascproxy sim``."""

    def __init__(self, *extra: str, model: str = "sim-chat", port: int = 0) -> None:
        self.model = model
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ascproxy.sim", "--port", str(self.port), "--model", model, "--json", *extra],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("{"), f"the simulator did not start: {line!r}"

    def stats(self) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", "/sim/stats")
        stats = json.loads(connection.getresponse().read())
        connection.close()
        assert isinstance(stats, dict)
        return stats

    def set(self, **changes: Any) -> None:
        """Settings of the running simulator, as ``PUT /sim/settings`` takes them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("PUT", "/sim/settings", json.dumps(changes))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class Service:
    """``with Service(folder, upstream=url, models=[...])``: ready when entered, drained when left.

    ``node`` and ``resources`` edit the two files after init, as parsed documents.
    """

    def __init__(
        self,
        folder: Path,
        *,
        upstream: str,
        models: list[str],
        workers: int = 1,
        type: str = "vllm",  # noqa: A002
        node: Callable[[dict[str, Any]], None] | None = None,
        resources: Callable[[dict[str, Any]], None] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        names = [arg for model in models for arg in ("--model", model)]
        done = command(
            "init", str(folder), "--upstream", upstream, "--type", type, *names, "--https-port", str(free_port()),
            "--http-port", str(free_port()), "--metrics-port", str(free_port()), "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.facts: dict[str, Any] = json.loads(done.stdout)
        self.key: str = self.facts["api_key"]
        self.https_port = int(self.facts["https_url"].rsplit(":", 1)[1])
        self.http_port = int(self.facts["http_url"].rsplit(":", 1)[1])
        self.metrics_port = int(self.facts["metrics_url"].rsplit(":", 1)[1])
        self.edit("ascproxy.yaml", lambda document: document.update(workers=workers))
        if node is not None:
            self.edit("ascproxy.yaml", node)
        if resources is not None:
            self.edit("resources.yaml", resources)
        self.env = os.environ | (env or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.out = folder / "serve.out"

    def edit(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        path = self.folder / name
        document = yaml.safe_load(path.read_text())
        change(document)
        path.write_text(yaml.safe_dump(document, sort_keys=False))

    def start(self) -> None:
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ascproxy", "serve", str(self.folder)],
                cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=self.env,
            )  # fmt: skip
        wait_for(self.ready, f"the service is ready; it said:\n{self.said()}")

    def ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"serve ended with {self.process.returncode}:\n{self.said()}")
        with contextlib.suppress(OSError):
            return self.health("ready")[0] == 200
        return False

    def said(self) -> str:
        return self.out.read_text(errors="replace")[-4000:] if self.out.exists() else ""

    def health(self, which: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=5)
        try:
            connection.request("GET", f"/healthz/{which}")
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def metrics(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=5)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        done = command("status", "--config", str(self.folder), "--json")
        assert done.returncode == 0, done.stderr
        status = json.loads(done.stdout)
        assert isinstance(status, dict)
        return status

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.facts["ca"])

    def ask(self, path: str, body: Any = None, *, method: str = "POST", key: str | None = "", **headers: str) -> Any:
        """One request over HTTPS: ``(status, headers, body)``. ``key`` "" is the service's own, None sends none."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.https_port, timeout=30, context=self.tls())
        fields = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        if key is not None:
            fields["authorization"] = f"Bearer {key or self.key}"
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, fields)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGINT (drains for 5 s at most), then the exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the service did not stop:\n{self.said()}") from None
        finally:
            self.process = None

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


@contextlib.contextmanager
def first_light(folder: Path, *sim: str, model: str = "sim-chat", **more: Any) -> Iterator[tuple[Service, Simulator]]:
    """A simulator and the service in front of it."""
    with Simulator(*sim, model=model) as simulator:
        more.setdefault("models", [model])
        with Service(folder / "d", upstream=simulator.url, **more) as service:
            yield service, simulator
