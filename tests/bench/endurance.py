"""Many deployments under load: python3 -m tests.bench.endurance [ROUNDS [SECONDS]]

As root, where a server can be booted (see tests/server). A round is a change of the code, a rollback, and the change again with a
package (every second time) and a migration; before each of these, so many seconds of steady state. 16 connections
through nginx all the while, four of which answer a form. Said at the end: requests sent and lost, the 99th percentile
and the longest wait of each kind beside those of the steady state in the same run, and rows that were accepted and are there.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tests.bench.compare import add_package_and_migration, ours
from tests.sandbox import CSRF
from tests.server.bench import Sample, longest, lost
from tests.server.site import CHECKOUT, Site

READERS, WRITERS = 12, 4  # connections
PAUSE = 0.02  # seconds, which each waits after an answer
FORM = {**CSRF, "Content-Type": "application/x-www-form-urlencoded"}
OPEN = """insert into "formsApp_form" (title, slug, description, created_at) values ('Open', 'open', '', now())"""
Span = tuple[str, float, float]  # what was done, its beginning and its end


def act(site: Site, name: str, command: str) -> Span:
    """Run a command over ssh, which must succeed."""
    began = time.monotonic()
    run = site.operate(command)
    if run.status:
        raise SystemExit(f"{name}: {run.text}")
    return name, began, time.monotonic()


def play(site: Site, rounds: int, steady: float) -> Iterator[Span]:
    """What is done, one after the other."""
    deploy = f"cd {CHECKOUT} && python3 deploy.py"
    for number in range(rounds):
        for name in ("a change of the code", "a rollback", "a package and a migration"):
            began = time.monotonic()
            time.sleep(steady)
            yield "steady state", began, time.monotonic()
            if name == "a rollback":
                yield act(site, name, f"{deploy} rollback --no-freeze")
                continue
            if name == "a package and a migration":
                add_package_and_migration(site, number % 10)
            site.push()
            yield act(site, name, deploy)
        print(f"round {number + 1} of {rounds} is done", file=sys.stderr)


def line(name: str, samples: Iterable[Sample], good: int) -> str:
    """A line of the table."""
    seen = sorted(samples, key=lambda sample: sample.seconds)
    p99 = seen[int(len(seen) * 0.99)].seconds
    missed = len(lost(seen, good))
    return f"| {name} | {len(seen)} | {missed} | {p99:.3f} s | {longest(seen):.2f} s |"


def main() -> int:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    steady = float(sys.argv[2]) if len(sys.argv) > 2 else 20
    with contextlib.closing(ours().site) as site:
        site.sql(OPEN)
        answer: dict[str, Any] = {"method": "POST", "body": "text=an+answer", "headers": FORM}
        with (
            site.load("/late/", connections=READERS, pause=PAUSE) as readers,
            site.load("/forms/open/", connections=WRITERS, pause=PAUSE, **answer) as writers,
        ):
            spans = list(play(site, rounds, steady))
        accepted = len(writers.samples) - len(lost(writers.samples, 302))
        rows = int(site.sql('select count(*) from "formsApp_response"'))
    print("| while | sent | lost | p99 | longest wait |\n|---|---|---|---|---|")
    for kind, load, good in (("read", readers, 200), ("write", writers, 302)):
        for name, several in itertools.groupby(sorted(spans), key=lambda span: span[0]):
            samples = [each for _, *span in several for each in load.between(span[0], span[1])]
            print(line(f"{name}, {kind}", samples, good))
        print(line(f"all, {kind}", load.samples, good))
    print(f"\n{accepted} answers accepted, {rows} in the database")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
