"""The peers: nginx and haproxy from Debian packages; envoy, vllm-router and LiteLLM, where wanted, from Python's.

All of them check one key and write a line per request, where they can; what they cannot do is said at the class. None
has a feature on that the gateway has not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar

from bench import machine, packages, process
from bench.subject import Place, Subject

HERE = Path(__file__).resolve().parent
KEY = "asc_bench_0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"


def certificate(folder: Path) -> None:
    """Writes ca.pem, server.pem (the leaf) and server.key for localhost, P-256, and server.both for haproxy."""
    subject = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "7"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    ca = ["-x509", "-subj", "/CN=bench CA", "-keyout", "ca.key", "-out", "ca.pem"]
    leaf = ["-x509", *name, "-addext", "basicConstraints=critical,CA:FALSE", "-CA", "ca.pem", "-CAkey", "ca.key"]
    for request in (ca, [*leaf, "-keyout", "server.key", "-out", "server.pem"]):
        done = subprocess.run(
            ["openssl", "req", *subject, *request], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise machine.StartError(f"openssl req: {done.stderr}")
    (folder / "server.both").write_text((folder / "server.pem").read_text() + (folder / "server.key").read_text())


class Peer(Subject):
    """A proxy with one configuration file made from a template beside this module, where @NAME@ stands for a value."""

    program = ""
    package = ""
    template = ""
    arguments: tuple[str, ...] = ()
    patience_s = 20.0
    checks_key = True
    limit: ClassVar[dict[str, str]] = {}
    limited = False  # also limits the rate of each caller, as the gateway does once it has everything on

    def __init__(self, place: Place) -> None:
        super().__init__(place, port=machine.free_port(), tls_port=machine.free_port(), key=KEY)

    @classmethod
    def path(cls) -> str | None:
        """The program, also from the folders of administration that are not on every user's PATH."""
        return shutil.which(cls.program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")

    @classmethod
    def missing(cls) -> str | None:
        """Names the package."""
        return None if cls.path() else f"{cls.name} is not installed: apt-get install -y {cls.package}"

    @classmethod
    def version(cls) -> str:
        """What the program says of itself, first line."""
        done = subprocess.run([cls.path() or cls.program, "-v"], capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).splitlines()[0].removeprefix("nginx version: ")

    def environment(self) -> dict[str, str] | None:
        """Variables of the program; None: this process's own."""
        return None

    def serving(self) -> bool:
        """Whether it can be asked."""
        return all(machine.accepts(port) for port in (self.port, self.tls_port) if port)

    def start(self) -> None:
        """Writes certificate and configuration, starts, and waits until it can be asked."""
        logs = self.place.logs
        certificate(logs)
        (logs / "keys").write_text(f"Bearer {self.key}\n")
        values = {
            "LOGS": str(logs),
            "KEY": self.key,
            "PORT": str(self.port),
            "TLS_PORT": str(self.tls_port),
            "UPSTREAM": str(self.place.upstream_port),
            "DESCRIPTORS": str(machine.descriptors()),
            "CONNECTIONS": str(8192 if self.place.callers < 3000 else 32768),
            # haproxy refuses to start with more callers than descriptors for both sides.
            "CALLERS": str(min(16384, (machine.descriptors() - 256) // 2)),
            **{name: value if self.limited else "" for name, value in self.limit.items()},
        }

        def filled(text: str) -> str:
            for name, value in values.items():
                text = text.replace(f"@{name}@", value)
            return text

        if self.template:
            (logs / self.template).write_text(filled((HERE / self.template).read_text()))
        arguments = [filled(argument) for argument in self.arguments]
        log = logs / f"{self.name}.log"
        with log.open("wb") as output, (logs / f"{self.name}.err").open("wb") as errors:
            self.child = machine.launch(
                [self.path() or self.program, *arguments],
                self.place.core,
                stdout=output,
                stderr=errors,
                env=self.environment(),
            )
        machine.wait_until(self.serving, self.child, self.name, logs / f"{self.name}.err", self.patience_s)

    def pause(self) -> None:
        """Stops every process of it: some work on what their callers have left behind for a long time."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for member in process.select(self.pid, process.living()) if self.pid is not None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, number)

    def stop(self) -> None:
        """Also ends one that waits for its turn."""
        self.resume()
        super().stop()

    def workers(self) -> list[int]:
        """The children of the master that a started peer is."""
        return process.children(self.pid) if self.pid is not None else []


class Nginx(Peer):
    """nginx: a master and one worker."""

    name = "nginx"
    program = "nginx"
    package = "nginx-light"
    template = "nginx.conf"
    # The prefix is the run's own folder, so that no path of the installation is touched.
    arguments = ("-p", "@LOGS@", "-e", "@LOGS@/nginx.error.log", "-c", "@LOGS@/nginx.conf")
    limit: ClassVar[dict[str, str]] = {
        "LIMIT_ZONE": "limit_req_zone $http_authorization zone=callers:10m rate=1000000r/s;",
        "LIMIT": "limit_req zone=callers burst=100000 nodelay;",
    }


class Haproxy(Peer):
    """haproxy: a master and one worker, as its systemd unit runs it."""

    name = "haproxy"
    program = "haproxy"
    package = "haproxy"
    template = "haproxy.cfg"
    arguments = ("-W", "-db", "-f", "@LOGS@/haproxy.cfg")
    limit: ClassVar[dict[str, str]] = {
        "LIMIT": "stick-table type string len 80 size 100k expire 10m store http_req_rate(1s)\n"
        "    http-request track-sc0 req.hdr(authorization)\n"
        "    http-request deny deny_status 429 if { sc_http_req_rate(0) gt 1000000 }"
    }


class PackagedPeer(Peer):
    """A peer that comes as a Python package in an environment of its own (bench/install)."""

    @classmethod
    def path(cls) -> str | None:
        """The program in the package's environment."""
        found = packages.program(cls.name)
        return str(found) if found else None

    @classmethod
    def missing(cls) -> str | None:
        """Names the command that installs it."""
        return None if cls.path() else f"{cls.name} is not installed: {packages.how_to(cls.name)}"

    @classmethod
    def version(cls) -> str:
        """What is pinned is what is installed."""
        return packages.PACKAGES[cls.name].requirement.replace("==", " ")

    def workers(self) -> list[int]:
        """One process does everything."""
        return [self.pid] if self.pid is not None else []


class Envoy(PackagedPeer):
    """envoy: one process with one worker thread (and a main thread), key check, JSON access log."""

    name = "envoy"
    template = "envoy.yaml"
    # No admin interface, no hot restart: nothing that shares memory or a port with another one's envoy.
    arguments = ("-c", "@LOGS@/envoy.yaml", "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning")
    limit: ClassVar[dict[str, str]] = {
        "LIMIT": "- name: envoy.filters.http.local_ratelimit\n"
        "                typed_config:\n"
        '                  "@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.'
        "LocalRateLimit\n"
        "                  stat_prefix: callers\n"
        "                  token_bucket: {max_tokens: 1000000, tokens_per_fill: 1000000, fill_interval: 1s}\n"
        "                  filter_enabled: {default_value: {numerator: 100}}\n"
        "                  filter_enforced: {default_value: {numerator: 100}}"
    }


class VllmRouter(PackagedPeer):
    """vllm-router: the model servers' own balancer, in Rust. It checks no key (its --api-key is for the model server),
    logs to standard output and has no TLS; its threads are as many as the cores it may use, which is one."""

    name = "vllm-router"
    checks_key = False
    # Round robin and nothing learned: its other policies read every prompt. No health checks meanwhile.
    arguments: tuple[str, ...] = (
        *("--host", "127.0.0.1", "--port", "@PORT@", "--worker-urls", "http://127.0.0.1:@UPSTREAM@"),
        *("--policy", "round_robin", "--log-level", "info", "--health-check-interval-secs", "3600"),
        *("--prometheus-port", "@METRICS@", "--prometheus-host", "127.0.0.1"),
        *("--max-concurrent-requests", "16384", "--request-timeout-secs", "600"),
    )

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.tls_port = 0
        self.arguments = tuple(a.replace("@METRICS@", str(machine.free_port())) for a in VllmRouter.arguments)

    def serving(self) -> bool:
        """Its port accepts before its model server was found to be well."""
        return machine.answers("127.0.0.1", self.port, "/health")


class LiteLLM(PackagedPeer):
    """LiteLLM's proxy: one process, the master key, a line per request. It parses answers and makes them anew, so their
    length is not checked. It listens with TLS or without."""

    name = "litellm"
    template = "litellm.yaml"
    rewrites = True
    patience_s = 180.0  # its imports alone take many seconds
    answers_within_s = 180.0

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.arguments = ("--config", "@LOGS@/litellm.yaml", "--host", "127.0.0.1", "--num_workers", "1", "--port")
        if place.tls:
            self.port = 0
            tls = ("--ssl_certfile_path", "@LOGS@/server.pem", "--ssl_keyfile_path", "@LOGS@/server.key")
            self.arguments += ("@TLS_PORT@", *tls)
        else:
            self.tls_port = 0
            self.arguments += ("@PORT@",)

    def environment(self) -> dict[str, str] | None:
        """Nothing is fetched from elsewhere and nothing told elsewhere; the price list is the package's own."""
        return {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
