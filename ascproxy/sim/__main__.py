"""``python -m ascproxy.sim``: the same options as ``ascproxy sim``, up in a fraction of the time.

The command line's libraries take longer to import than the simulator; this door uses argparse and prints no colours.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ascproxy.errors import AscproxyError
from ascproxy.sim.command import run
from ascproxy.sim.settings import Options, options


def main() -> int:
    """Parse the arguments and serve. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ascproxy.sim", description="Simulate a model server (vLLM or TGI)."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON line when listening.")
    for name, option in options().items():
        flag = f"--{name.replace('_', '-')}"
        described: dict[str, Any] = {"help": option.metadata["help"], "default": option.default}
        if name == "request_ids":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **described)
        elif name == "model":
            parser.add_argument(flag, action="append", help=described["help"])
        else:
            kind = Path if "Path" in str(option.type) else type(option.default) if option.default is not None else str
            parser.add_argument(flag, type=kind, **described)
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    given["model"] = tuple(given["model"] or Options().model)
    try:
        return run(Options(**given), as_json=as_json)
    except AscproxyError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
