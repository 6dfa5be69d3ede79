"""``make run`` with the real simulator and the real gateway: what a person sees, and what is left afterwards."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tools/first_light.py"


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_light", DRIVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Run:
    """The driver, started with its temporary files below ``folder``."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, DRIVER, *arguments],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_until(self, text: str) -> str:
        """What it printed up to and including the line with ``text``."""
        assert self.process.stdout is not None
        seen = ""
        for line in self.process.stdout:
            seen += line
            if text in line:
                return seen
        raise AssertionError(seen + (self.process.communicate()[1]))

    def end(self) -> tuple[int, str, str]:
        """Exit code, the rest of the output, and errors. Nothing it made may be left."""
        out, err = self.process.communicate(timeout=60)
        assert not list(self.folder.iterdir())
        return self.process.returncode, out, err


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.process.communicate(timeout=60)


def children(pid: int) -> dict[str, int]:
    """Module name -> pid of the services that the driver started."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        arguments = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        found[arguments[2]] = int(child)
    return found


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_once_shows_a_streamed_answer_and_leaves_nothing(tmp_path: Path, runs: list[Run]) -> None:
    runs.append(Run(tmp_path, "--once"))
    code, out, err = runs[0].end()
    assert (code, err) == (0, "")
    pieces = re.search(r"(\d+) pieces, streamed over HTTPS", out)
    assert pieces is not None
    assert int(pieces[1]) > 1
    assert out.endswith("Stopped.\n")


def test_it_stays_up_until_interrupted_and_stops_both(tmp_path: Path, runs: list[Run], driver: ModuleType) -> None:
    runs.append(Run(tmp_path))
    seen = runs[0].read_until("Up until Ctrl-C.")
    url, key = re.findall(r"https://[\w.:]+", seen)[0], re.findall(r"Bearer (\S+)'", seen)[0]
    ca = re.findall(r"--cacert (\S+)", seen)[0]
    model = re.findall(r"model (\S+)", seen)[0]
    answer = driver.stream_chat({"https_url": url, "api_key": key, "ca": ca, "models": [model]})
    assert "".join(answer)
    lines = seen[seen.index("export SSL_CERT_FILE") : seen.index("Up until")]
    assert lines.count("python3 -c") == 2
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    tried = subprocess.run(
        ["bash", "-euc", lines], env={"PATH": path}, capture_output=True, text=True, check=False, timeout=60
    )
    assert (tried.returncode, len(tried.stdout.splitlines()), all(tried.stdout.splitlines())) == (0, 2, True), tried
    services = children(runs[0].process.pid)
    ports = [
        int(port)
        for port in re.findall(r"https?://127\.0\.0\.1:(\d+)|https://localhost:(\d+)", seen)
        for port in port
        if port
    ]
    runs[0].process.send_signal(signal.SIGINT)
    code, out, err = runs[0].end()
    assert (code, err) == (0, "")
    assert out.endswith("Stopped.\n")
    assert set(services) == {"ascproxy.supervisor", "ascproxy.sim"}
    assert not [pid for pid in services.values() if Path(f"/proc/{pid}").exists()]
    assert len(ports) > 2
    assert all(map(refuses, ports))


def test_a_gateway_that_dies_is_told_with_its_log(tmp_path: Path, runs: list[Run]) -> None:
    runs.append(Run(tmp_path))
    runs[0].read_until("Up until Ctrl-C.")
    os.kill(children(runs[0].process.pid)["ascproxy.supervisor"], signal.SIGKILL)
    code, _, err = runs[0].end()
    assert code == 1
    assert err.startswith("The gateway went away.\n")
    assert "--- the last lines of the gateway's log ---" in err


def test_an_upstream_that_is_not_there_is_named(tmp_path: Path, runs: list[Run], driver: ModuleType) -> None:
    port = driver.free_port()
    runs.append(Run(tmp_path, "--once", "--upstream", f"http://127.0.0.1:{port}"))
    code, _, err = runs[0].end()
    assert code == 1
    assert f"127.0.0.1:{port}" in err
    assert "Traceback" not in err


def test_a_port_that_is_taken_is_named(tmp_path: Path, runs: list[Run], driver: ModuleType) -> None:
    with socket.socket() as taken:
        port = driver.free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        runs.append(Run(tmp_path, "--once", "--https-port", str(port)))
        code, _, err = runs[0].end()
    assert code == 1
    assert str(port) in err
    assert "Traceback" not in err
