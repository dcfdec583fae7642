"""By hand: `python3 -m tests.server packages` (what this computer needs), `build`, or `shell` (a server)."""

from __future__ import annotations

import subprocess
import sys

from tests.server import recipe
from tests.server.bench import Server


def shell() -> None:
    """Boot a throwaway server, open a shell in it, and remove it afterwards."""
    with Server() as server:
        subprocess.run([*server.enter("root"), "bash"], check=False)


def main() -> int:
    """Do what the first argument says."""
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command == "packages":
        print("\n".join(recipe.HOST_PACKAGES))
    elif command == "build":
        print(recipe.prepared())
    elif command == "shell":
        shell()
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
