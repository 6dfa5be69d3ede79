"""The gateway itself, through nothing but its command line: `init`, a few edited lines, `serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from bench import machine, process
from bench.subject import MODEL, Place, Subject

ROOT = Path(__file__).resolve().parent.parent
CALLERS = 1000  # at most so many different keys, or models, are asked for


def environment() -> dict[str, str]:
    """That in which `python -m ascproxy` is this checkout's."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def edit(file: Path, changes: dict[str, Any]) -> None:
    """Sets top-level members of a YAML file."""
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}, sort_keys=False))


@dataclass(frozen=True, slots=True)
class Directory:
    """A configuration that `init` made; it outlives the services that are started from it."""

    path: Path
    facts: dict[str, str]

    @property
    def keys(self) -> Path:
        """The file of the callers' keys, where the store was filled."""
        return self.path / "callers.keys"

    @property
    def models(self) -> Path:
        """The file of the models that are asked for, where there are many routes."""
        return self.path / "callers.models"


def make(path: Path, upstream_port: int) -> Directory:
    """Runs `ascproxy init` for the stub. Raises StartError, which says why."""
    ports = [str(machine.free_port()) for _ in range(3)]
    argv = [sys.executable, "-m", "ascproxy", "init", str(path)]
    argv += ["--upstream", f"http://127.0.0.1:{upstream_port}", "--model", MODEL]
    argv += ["--https-port", ports[0], "--http-port", ports[1], "--metrics-port", ports[2], "--json"]
    done = subprocess.run(argv, cwd=path.parent, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise machine.StartError(
            f"`ascproxy init` ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}".rstrip()
        )
    try:
        made: dict[str, str] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise machine.StartError(f"`ascproxy init --json` did not print JSON ({error}):\n{done.stdout[:400]}") from None
    absent = {"https_url", "http_url", "metrics_url", "api_key"} - made.keys()
    if absent:
        raise machine.StartError(f"`ascproxy init --json` does not name {', '.join(sorted(absent))}")
    return Directory(path, made)


def add_keys(directory: Directory, count: int) -> None:
    """Fills the store up to `count` keys (init made one), and notes those of the callers. Tells its progress on
    standard error. Raises StartError."""
    argv = [sys.executable, "-m", "bench.fill_keys", str(directory.path / "state"), "--out", str(directory.keys)]
    argv += ["--tenant", str(directory.facts["tenant"]), "--callers", str(CALLERS), "--count", str(max(1, count - 1))]
    if subprocess.run(argv, env=environment(), check=False).returncode != 0:
        raise machine.StartError(f"the store could not be filled with {count:,} keys; the lines above say why")


def routes(document: dict[str, Any], count: int) -> dict[str, Any]:
    """The routes of a resources file with copies of its first one: `count` in all, each for a model of its own."""
    first = next(iter(document["routes"].values()))
    more = {f"bench-{n}": {**first, "models": [f"{MODEL}-{n}"]} for n in range(1, count)}
    return {**document["routes"], **more}


def add_routes(directory: Directory, count: int) -> None:
    """`count` routes in all, and the models of the callers, spread over them."""
    file = directory.path / "resources.yaml"
    all_routes = routes(yaml.safe_load(file.read_text()), count)
    edit(file, {"routes": all_routes})
    models = [route["models"][0] for route in all_routes.values()]
    step = max(1, len(models) // CALLERS)
    directory.models.write_text("".join(f"{model}\n" for model in models[::step]))


class Gateway(Subject):
    """`ascproxy serve` with one worker. State is on disk, where it would be; its output goes where the peers log.

    `directory`: one that was made before; without it, each start makes its own.
    """

    name = "ascproxy"

    def __init__(self, place: Place, directory: Directory | None = None, workers: int = 1) -> None:
        super().__init__(place)
        self.directory = directory
        self.wanted = workers
        self.ready_s = 0.0  # from the command to readiness

    @classmethod
    def version(cls) -> str:
        """The package's version and, in a checkout, the commit."""
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return f"ascproxy {done.stdout.strip() or 'of this checkout'}"

    def start(self) -> None:
        """Makes a directory unless there is one, sets the workers, serves, and waits for readiness on the metrics
        address."""
        directory = self.directory = self.directory or make(self.place.state / "gateway", self.place.upstream_port)
        edit(directory.path / "ascproxy.yaml", {"workers": self.wanted})
        made = directory.facts
        self.key = made["api_key"]
        self.port, self.tls_port = urlsplit(made["http_url"]).port or 0, urlsplit(made["https_url"]).port or 0
        health = urlsplit(made["metrics_url"])
        log = self.place.logs / "ascproxy.log"
        begin = time.monotonic()
        with log.open("wb") as output:
            argv = [sys.executable, "-m", "ascproxy", "serve", str(directory.path)]
            self.child = machine.launch(
                argv, self.place.core, stdout=output, stderr=output, cwd=self.place.state, env=environment()
            )
        machine.wait_until(
            lambda: machine.answers(health.hostname or "127.0.0.1", health.port or 0, "/healthz/ready"),
            self.child,
            "`ascproxy serve`",
            log,
        )
        self.ready_s = time.monotonic() - begin

    def status(self) -> dict[str, Any]:
        """What `ascproxy status` says. Raises StartError when it does not."""
        assert self.directory is not None
        argv = [sys.executable, "-m", "ascproxy", "status", "--config", str(self.directory.path), "--json"]
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise machine.StartError(
                f"`ascproxy status` ended with exit code {done.returncode}: {done.stderr}".rstrip()
            )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def workers(self) -> list[int]:
        """The pids of the slots, by the service's own word."""
        alive = {s.pid for s in process.living()}
        return [worker["pid"] for worker in self.status()["workers"] if worker["pid"] in alive]
