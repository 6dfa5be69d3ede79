"""A booted systemd host on this machine: a minimal Debian in systemd-nspawn, in a network namespace of its own.

The root is made by debootstrap once and kept (``ASCPROXY_HOST_ROOT``, else below the user's cache folder); each host
runs on a copy. Needs root. Nothing is in the machine's own network: the namespace has a loopback and no way out.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = "systemd,systemd-sysv,dbus,procps,python3,libssl3,libnghttp2-14"
PROGRAMS = ("debootstrap", "systemd-nspawn", "nsenter", "ip")
BOOT_S = 60.0


def missing() -> str | None:
    """Why no host can run here, None if one can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return f"no {program} here: apt-get install debootstrap systemd-container iproute2"
    return None


def suite() -> str:
    """This machine's Debian: packages that were built here must run there."""
    found = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    assert found is not None, "not a Debian"
    return found[1]


def base_root() -> Path:
    """The root that hosts are copies of, made if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    root = Path(os.environ.get("ASCPROXY_HOST_ROOT", cache / "ascproxy" / f"host-{suite()}"))
    ready = root / "ready"  # holds the packages that it was made with
    if not ready.exists() or ready.read_text() != PACKAGES:
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite(), str(root)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        ready.write_text(PACKAGES)
    return root


class Host:
    """``with Host(folder) as host``: booted. ``run`` executes in it, ``outside`` in its network only."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.console = folder / "console"
        self.namespace = f"ascproxy-{os.getpid()}"
        shutil.copytree(base_root(), self.root, symlinks=True, ignore=_special)
        self.nspawn: subprocess.Popen[bytes] | None = None
        self.init = 0

    def __enter__(self) -> Host:
        _do("ip", "netns", "add", self.namespace)
        try:
            self.outside("ip", "link", "set", "lo", "up")
            self.boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self.nspawn is not None:
            self.nspawn.terminate()  # a clean power-off
            try:
                self.nspawn.wait(30)
            except subprocess.TimeoutExpired:
                self.nspawn.kill()
                self.nspawn.wait()
        _do("ip", "netns", "delete", self.namespace)

    def boot(self) -> None:
        """Boot, and wait until systemd has started everything."""
        command = [
            "systemd-nspawn", "-q", "-D", str(self.root), "--boot", "--register=no", "--keep-unit", "--capability=all",
            f"--network-namespace-path=/run/netns/{self.namespace}", "--console=pipe",
        ]  # fmt: skip
        with self.console.open("wb") as console:
            self.nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        until(self._find_init, "the host's init", BOOT_S, self.said)
        until(
            lambda: self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded"),
            "the host has booted", BOOT_S, self.said,
        )  # fmt: skip

    def said(self) -> str:
        return self.console.read_text(errors="replace")[-4000:]

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in the host."""
        return _do("nsenter", "-t", str(self.init), "-m", "-u", "-i", "-n", "-p", "--", *command, check=check)

    def outside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command of this machine in the host's network."""
        return _do(*self.within(*command))

    def within(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def _find_init(self) -> bool:
        assert self.nspawn is not None
        assert self.nspawn.poll() is None, self.said()
        children = Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children")
        for pid in children.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                self.init = int(pid)
        return self.init != 0


def install(root: Path, version: str) -> Path:
    """Put ascproxy and what it needs at run time into the root as ``/opt/ascproxy/VERSION``, without any network.

    What ``make install PREFIX=/opt/ascproxy/VERSION`` makes there, from the environment that runs the tests.
    """
    prefix = root / "opt" / "ascproxy" / version
    packages = prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    wanted = re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "requirements/runtime.txt").read_text(), re.MULTILINE)
    for name in wanted:
        try:
            files = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another interpreter or system than this one
        for file in files:
            if not file.parts[0].startswith(("..", "/")) and "__pycache__" not in file.parts:
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(file.locate()), packages / file)
    shutil.copytree(ROOT / "ascproxy", packages / "ascproxy", ignore=shutil.ignore_patterns("__pycache__"))
    stated = packages / "ascproxy" / "__init__.py"
    stated.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', stated.read_text()))
    compileall.compile_dir(packages, quiet=1, stripdir=str(root))  # as pip does: the service cannot write there
    (prefix / "bin").mkdir()
    (prefix / "bin" / "python").symlink_to("/usr/bin/python3")
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    script = prefix / "bin" / "ascproxy"
    script.write_text(
        f"#!/opt/ascproxy/{version}/bin/python\nimport sys\nfrom ascproxy.__main__ import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return prefix


def point_to(root: Path, version: str) -> None:
    """Let the link ``/opt/ascproxy/current`` lead to a version."""
    new = root / "opt" / "ascproxy" / "current.new"
    new.symlink_to(version)
    new.rename(new.with_name("current"))


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0, said: Callable[[], str] = str) -> Any:
    """The first true value of ``condition``; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s: {what}\n{said()}"
        time.sleep(0.02)


def _special(folder: str, names: list[str]) -> list[str]:
    """Device nodes and sockets are not copied: the host makes its own."""
    return [n for n in names if not (p := Path(folder, n)).is_symlink() and not p.is_dir() and not p.is_file()]


def _do(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done
