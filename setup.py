"""Builds the native core. Everything else about the package is in pyproject.toml.

One extension module, ``ascproxy._native``, is made of the core units (no ``Python.h``) and the ``py_*.c`` bindings; a
second, ``ascproxy._parsers``, binds the parsers alone so that tests can drive them byte by byte.
"""

import os
import pathlib
import shutil
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
CFLAGS = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-O2",
    "-g",
    "-fvisibility=hidden",
    "-fstack-protector-strong",
    "-fno-strict-aliasing",
]
PARSER_BINDINGS = {"py_parsers.c"}
PARSER_UNITS = {"http1.c", "chunk.c", "jsonscan.c", "sse.c"}


def missing_parts(compiler):
    """Sentences that name what a build needs and the machine lacks, with Debian and RHEL package names."""
    found = []
    if shutil.which(compiler) is None:
        found.append(f"no C compiler ({compiler}): apt-get install gcc  |  dnf install gcc")
    if not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists():
        found.append("no Python.h: apt-get install python3-dev  |  dnf install python3-devel")
    roots = [pathlib.Path("/usr/include"), pathlib.Path("/usr/local/include")]
    if not any((r / "openssl/ssl.h").exists() for r in roots) and "OPENSSL_INCLUDE" not in os.environ:
        found.append("no openssl/ssl.h: apt-get install libssl-dev  |  dnf install openssl-devel")
    if not any((r / "nghttp2/nghttp2.h").exists() for r in roots):
        found.append("no nghttp2/nghttp2.h: apt-get install libnghttp2-dev  |  dnf install libnghttp2-devel")
    return found


class BuildNative(build_ext):
    def build_extensions(self):
        missing = missing_parts(self.compiler.compiler[0])
        if missing:
            raise SystemExit("ascproxy: the native core cannot be built here.\n  " + "\n  ".join(missing))
        super().build_extensions()


def sources(bindings):
    native = ROOT / "native"
    units = sorted(p for p in native.glob("*.c") if not p.name.startswith("py_"))
    if bindings == PARSER_BINDINGS:
        units = [u for u in units if u.name in PARSER_UNITS]
    return [str(p.relative_to(ROOT)) for p in units + sorted(native / b for b in bindings)]


all_bindings = {p.name for p in (ROOT / "native").glob("py_*.c")}
headers = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "native").glob("*.h"))]
extensions = [
    Extension(
        name,
        sources(bindings),
        libraries=["ssl", "crypto", "nghttp2"],
        include_dirs=["native"],
        depends=headers,
        extra_compile_args=CFLAGS,
    )
    for name, bindings in (
        ("ascproxy._native", all_bindings - PARSER_BINDINGS),
        ("ascproxy._parsers", all_bindings & PARSER_BINDINGS),
    )
    if bindings
]

setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
