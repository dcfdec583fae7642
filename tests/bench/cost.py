#!/usr/bin/env python3
"""What deploy.py itself costs: python3 -m tests.bench.cost [RUNS]

A deployment whose seven commands are all `true`, the wall time of the process less the time in which a command of its
ran; its peak memory; `--help`; and `--if-changed` with nothing new beside a bare `git fetch` of the same remote. All in
one run, in turn, so that the figures can be compared; each is a median.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.lab import Lab

TRUE = """
[deploy]
shared = .env
[pull]
retries = 0
[services]
command = true
[static]
command = true
[migrate]
command = true
[backup]
command =
[restart]
candidate =
command = true
main_process =
proxy =
[status]
checks =
    app: true
[health]
url =
[notify]
journal =
"""

# Runs deploy.py as a script, and writes the time in which a command of its ran, and the peak memory, to a file.
MEASURED = """
import atexit, resource, runpy, subprocess, sys, time
spans = []
class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        self.began = time.monotonic()
        super().__init__(*arguments, **options)
    def _handle_exitstatus(self, *arguments, **options):
        super()._handle_exitstatus(*arguments, **options)
        spans.append(time.monotonic() - self.began)
subprocess.Popen = Popen
def tell(into=sys.argv[1]):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    open(into, "w").write(f"{sum(spans)} {peak}")
atexit.register(tell)
sys.argv = ["deploy.py"]
runpy.run_path("deploy.py", run_name="__main__")
"""


def main() -> int:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with contextlib.closing(Lab()) as lab:
        own, memory, helps, unchanged, fetches = [], [], [], [], []
        (lab.author / "deploy.ini").write_text(TRUE)
        lab.push({"deploy.ini": TRUE})
        lab.git("pull", "--quiet", folder=lab.checkout)
        result = lab.root / "result"

        def call(*command: str) -> float:
            """Seconds of wall time that a command takes."""
            environment, nowhere, began = lab.environment(), subprocess.DEVNULL, time.monotonic()
            subprocess.run(command, cwd=lab.checkout, env=environment, check=True, stdout=nowhere)
            return time.monotonic() - began

        def next_second() -> None:
            """Two runs that begin in one second wait for each other."""
            time.sleep(1 - time.time() % 1)

        call(sys.executable, "deploy.py")
        for _ in range(runs):
            next_second()
            wall = call(sys.executable, "-c", MEASURED, str(result))
            children, peak = map(float, Path(result).read_text().split())
            own.append(wall - children)
            memory.append(peak / 1024)
            helps.append(call(sys.executable, "deploy.py", "--help"))
            next_second()
            unchanged.append(call(sys.executable, "deploy.py", "--if-changed"))
            fetches.append(call("git", "fetch", "--quiet", "origin", "main"))
    median = statistics.median
    print(
        f"a deployment of commands that are all `true`: {median(own) * 1000:.0f} ms of its own, "
        f"peak memory {median(memory):.1f} MiB"
    )
    print(f"--help: {median(helps) * 1000:.0f} ms")
    print(
        f"--if-changed with nothing new: {median(unchanged) * 1000:.0f} ms; a bare git fetch of the same remote: "
        f"{median(fetches) * 1000:.0f} ms; ratio {median(unchanged) / median(fetches):.1f}"
    )
    print(
        f"({runs} runs each, Python {sys.version.split()[0]}; peak of any command started here: "
        f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
