"""Compiles the stub and the load generator when their source is newer than the program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]
LIBRARIES = {"stub": [], "load": ["-lssl", "-lcrypto"]}


class BuildError(Exception):
    """The sentence says what to install or what the compiler said."""


def program(name: str) -> Path:
    """Path of the built program `stub` or `load`."""
    target = BUILD / name
    sources = [HERE / f"{name}.c", HERE / "http.h"]
    if target.exists() and all(target.stat().st_mtime_ns >= s.stat().st_mtime_ns for s in sources):
        return target
    compiler = shutil.which("gcc")
    if compiler is None:
        raise BuildError("no C compiler: apt-get install -y gcc libc6-dev libssl-dev")
    BUILD.mkdir(exist_ok=True)
    done = subprocess.run(
        [compiler, *FLAGS, str(sources[0]), "-o", str(target), *LIBRARIES[name]],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        hint = "\napt-get install -y libssl-dev" if "openssl/" in done.stderr else ""
        raise BuildError(f"{name}.c does not compile:\n{done.stderr}{hint}")
    return target
