"""``python -m ascproxy``, and the entry point of the command ``ascproxy``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; the exit status is 0 fine, 1 findings or refused, 2 usage or unreadable, 3 not running."""
    from ascproxy.cli.app import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
