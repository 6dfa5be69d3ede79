"""The peers that come from Debian packages: nginx and haproxy."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

from bench import machine
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

    def start(self) -> None:
        """Writes certificate and configuration, starts, and waits until both ports accept."""
        logs = self.place.logs
        certificate(logs)
        (logs / "keys").write_text(f"Bearer {self.key}\n")
        text = (HERE / self.template).read_text()
        values = {
            "LOGS": str(logs),
            "KEY": self.key,
            "PORT": str(self.port),
            "TLS_PORT": str(self.tls_port),
            "UPSTREAM": str(self.place.upstream_port),
            **{name: value if self.limited else "" for name, value in self.limit.items()},
        }
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        (logs / self.template).write_text(text)
        arguments = [argument.replace("@LOGS@", str(logs)) for argument in self.arguments]
        log = logs / f"{self.name}.log"
        with log.open("wb") as output, (logs / f"{self.name}.err").open("wb") as errors:
            self.child = machine.launch(
                [self.path() or self.program, *arguments], self.place.core, stdout=output, stderr=errors
            )
        machine.wait_until(
            lambda: machine.accepts(self.port) and machine.accepts(self.tls_port),
            self.child,
            self.name,
            logs / f"{self.name}.err",
        )


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
