"""The gateway itself, through nothing but its command line: `init`, one edited line, `serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from bench import machine
from bench.subject import MODEL, Subject

ROOT = Path(__file__).resolve().parent.parent


class Gateway(Subject):
    """`ascproxy serve` with one worker. State is on disk, where it would be; its output goes where the peers log."""

    name = "ascproxy"

    @classmethod
    def version(cls) -> str:
        """The package's version and, in a checkout, the commit."""
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return f"ascproxy {done.stdout.strip() or 'of this checkout'}"

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}

    def _init(self, folder: Path) -> dict[str, str]:
        ports = [str(machine.free_port()) for _ in range(3)]
        argv = [sys.executable, "-m", "ascproxy", "init", str(folder)]
        argv += ["--upstream", f"http://127.0.0.1:{self.place.upstream_port}", "--model", MODEL]
        argv += ["--https-port", ports[0], "--http-port", ports[1], "--metrics-port", ports[2], "--json"]
        done = subprocess.run(
            argv, cwd=self.place.state, env=self._environment(), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise machine.StartError(
                f"`ascproxy init` ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}".rstrip()
            )
        try:
            made: dict[str, str] = json.loads(done.stdout)
        except json.JSONDecodeError as error:
            raise machine.StartError(
                f"`ascproxy init --json` did not print JSON ({error}):\n{done.stdout[:400]}"
            ) from None
        absent = {"https_url", "http_url", "metrics_url", "api_key"} - made.keys()
        if absent:
            raise machine.StartError(f"`ascproxy init --json` does not name {', '.join(sorted(absent))}")
        return made

    def start(self) -> None:
        """Makes a directory, sets one worker, serves, and waits for readiness on the metrics address."""
        folder = self.place.state / "gateway"
        made = self._init(folder)
        node = folder / "ascproxy.yaml"
        node.write_text(yaml.safe_dump({**yaml.safe_load(node.read_text()), "workers": 1}, sort_keys=False))
        self.key = made["api_key"]
        self.port, self.tls_port = urlsplit(made["http_url"]).port or 0, urlsplit(made["https_url"]).port or 0
        health = urlsplit(made["metrics_url"])
        log = self.place.logs / "ascproxy.log"
        with log.open("wb") as output:
            argv = [sys.executable, "-m", "ascproxy", "serve", str(folder)]
            self.child = machine.launch(
                argv, self.place.core, stdout=output, stderr=output, cwd=self.place.state, env=self._environment()
            )
        machine.wait_until(
            lambda: machine.answers(health.hostname or "127.0.0.1", health.port or 0, "/healthz/ready"),
            self.child,
            "`ascproxy serve`",
            log,
        )
