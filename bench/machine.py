"""The machine under the measurement: its cores, ports, volatile folder and children."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import platform
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1


class StartError(Exception):
    """Something did not start; the sentence says what and shows the end of its output."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where. The stub and the load share a core on a machine with two."""

    proxy: int
    load: int
    stub: int
    all: tuple[int, ...] = ()


def cores() -> Cores:
    """Picks cores from those this process may use. Raises StartError with fewer than two."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise StartError("the proxy needs a core that it does not share with the load: this process may use only one")
    return Cores(proxy=usable[-1], load=usable[0], stub=usable[1] if len(usable) > 2 else usable[0], all=tuple(usable))


def volatile_dir() -> Path:
    """Where logs go that must not cost a disk: a tmpfs if there is one."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path("/tmp")


def free_port() -> int:
    """A free TCP port of 127.0.0.1 below the ephemeral range, from which the load's own connections are taken."""
    for _ in range(200):
        port = random.randint(20000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise StartError("no free port between 20000 and 32000")


def launch(
    argv: list[str],
    core: int | set[int],
    *,
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int | None = None,
    stdin: int = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts argv on one core or several, as leader of a session of its own, which ends when this process does."""
    libc = ctypes.CDLL(None)
    allowed = core if isinstance(core, set) else {core}

    def before_exec() -> None:  # safe here: the harness has one thread
        os.sched_setaffinity(0, allowed)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(
        argv,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        env=env,
        start_new_session=True,
        preexec_fn=before_exec,  # noqa: PLW1509
    )


def stop(child: subprocess.Popen[bytes], patience_s: float = 15) -> None:
    """SIGTERM, then SIGKILL to its session, and waits."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, for a sentence about why something did not start."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def wait_until(
    ready: Callable[[], bool], child: subprocess.Popen[bytes], what: str, log: Path, patience_s: float = 20
) -> None:
    """Polls every 5 ms. Raises StartError when the child ends first or the patience does."""
    end = time.monotonic() + patience_s
    while not ready():
        if child.poll() is not None:
            raise StartError(f"{what} ended with exit code {child.returncode} before it was ready:\n{tail(log)}")
        if time.monotonic() > end:
            raise StartError(f"{what} is not ready after {patience_s:.0f} s:\n{tail(log)}")
        time.sleep(0.005)


def answers(host: str, port: int, path: str) -> bool:
    """Whether GET path is answered with 200."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def descriptors() -> int:
    """How many files a process may open here, once it has raised its soft limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def accepts(port: int) -> bool:
    """Whether something listens on 127.0.0.1:port."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def description() -> dict[str, str]:
    """What the head of the table says about the machine."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
