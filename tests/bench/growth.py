"""How the cost of a deployment grows with the project: python3 -m tests.bench.growth [RUNS]

In the sandbox (real git, Django and gunicorn; SQLite; systemd is played), each case in one of its own: the same change of
the code before and after the project has grown, in one run; medians of the seconds that the history tells.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tests.sandbox import Sandbox

STEPS = ("pull", "static", "migrate", "restart")


def add_files(sandbox: Sandbox) -> None:
    """10,000 small files in a hundred folders."""
    for number in range(10_000):
        path = sandbox.author / "more" / f"{number % 100}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n")


def add_static_files(sandbox: Sandbox) -> None:
    """20,000 static files of 1 KB, which collectstatic copies and names by their hash."""
    for number in range(20_000):
        path = sandbox.author / "formsApp" / "static" / f"{number % 100}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number:1000}\n")


def add_bytes(sandbox: Sandbox) -> None:
    """1 GiB that does not compress, in 64 files."""
    folder = sandbox.author / "large"
    folder.mkdir()
    for number in range(64):
        (folder / f"{number}.bin").write_bytes(os.urandom(16 << 20))


def add_deployments(sandbox: Sandbox) -> None:
    """1,000 past deployments that went live."""
    path = sandbox.checkout / ".deploy" / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    past = [json.dumps(first | {"release": f"20200101T{at:06}Z-0000000"}) for at in range(1000)]
    path.write_text("\n".join(past) + "\n" + "".join(lines))


GROWN: dict[str, Callable[[Sandbox], None]] = {
    "10,000 files more": add_files,
    "20,000 static files more": add_static_files,
    "1,000 past deployments more": add_deployments,
    "1 GiB more in git and in each release": add_bytes,
}


def deploy_change(sandbox: Sandbox) -> dict[str, Any]:
    """Deploy a change of the code; its entry of the history."""
    with open(sandbox.author / "formsApp" / "views.py", "a", encoding="utf-8") as file:
        file.write("# one line more\n")
    sandbox.push("A change of the code")
    status, said = sandbox.deploy()
    assert status == 0, said
    entry: dict[str, Any] = json.loads(sandbox.deploy("history", "--json")[1].splitlines()[-1])
    return entry


def measure(sandbox: Sandbox, runs: int) -> dict[str, float]:
    """The median seconds of a code-only deployment, whole and by step."""
    seen = [deploy_change(sandbox) for _ in range(runs)]
    steps = {name: statistics.median(each["steps"][name] for each in seen) for name in STEPS}
    return {"whole": statistics.median(each["seconds"] for each in seen), **steps}


def rows(runs: int) -> Iterator[str]:
    """A line of the table for each case, before and after."""
    for name, grow in GROWN.items():
        with contextlib.closing(Sandbox(quiet=True)) as sandbox:
            sandbox.build()
            sandbox.edit("deploy.ini", "deadline = 20\n", "deadline = 120\n")
            sandbox.edit("deploy.ini", "retries = 0\n", "retries = 0\ntimeout = 900\n")
            sandbox.push("Be patient")
            assert sandbox.deploy()[0] == 0
            before = measure(sandbox, runs)
            grow(sandbox)
            deploy_change(sandbox)  # which brings all that
            after = measure(sandbox, runs)
        cells = [f"{before[step]:.1f} → {after[step]:.1f}" for step in ("whole", *STEPS)]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    """Print the table."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(
        f"seconds, medians of {runs}\n\n| | whole | {' | '.join(STEPS)} |\n|---|---|---|---|---|---|"
    )
    for row in rows(runs):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
