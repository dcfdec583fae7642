"""What a backup and a restore cost beside bare pg_dump and pg_restore, in one run, for a generated database.

python3 -m tests.bench.database [GIBIBYTES]     as root, where a server can be booted: see tests/server
"""

from __future__ import annotations

import sys

from tests.sandbox import MIGRATION
from tests.server.site import CHECKOUT, SETUP, Site

# Runs a shell command: its seconds, and the megabytes of the largest process among it and its children.
MEASURE = """
import resource, subprocess, sys, time
began = time.monotonic()
ended = subprocess.run(["sh", "-c", sys.argv[1]], stdout=subprocess.PIPE).returncode
print(ended, time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""
BARE = "docker exec {} postgresql {} -U postgres"
DUMP = f"{CHECKOUT}/.deploy/backups/bare"
WAYS = {
    "bare pg_dump -Fc": f"{BARE.format('', 'pg_dump')} -Fc gforms-db > {DUMP}",
    "bare pg_dump -Fc -Z zstd": f"{BARE.format('', 'pg_dump')} -Fc -Z zstd gforms-db > {DUMP}",
    "deploy.py backup": "python3 deploy.py backup",
    "bare createdb and pg_restore": f"{BARE.format('', 'createdb')} bare && "
    f"{BARE.format('-i', 'pg_restore')} -d bare < {DUMP}",
    "deploy.py restore --test": f"python3 deploy.py restore {DUMP} --test",
    "deploy.py restore --yes": f"python3 deploy.py restore {DUMP} --yes",
}


def fill(site: Site, gibibytes: float) -> None:
    """Fill the database with texts that compress by half."""
    rows = f"generate_series(1, {int(gibibytes * 28_400_000)}) row group by row / 12"
    table = f"create table bulk as select row / 12 as id, string_agg(md5(random()::text), '') as text from {rows}"
    psql = ["docker", "exec", "postgresql", "psql", "-U", "postgres", "gforms-db"]
    jit = "alter system set jit = off"  # its library is not in the stand-in for the image
    key = "alter table bulk add primary key (id)"
    for statement in (jit, "select pg_reload_conf()", table, key):
        site.run([*psql, "-c", statement], timeout=1800)


def main() -> int:
    """Boot a server, deploy, fill the database, and measure each way once."""
    with Site() as site:
        site.prepare()
        for command in (SETUP, "python3 deploy.py"):
            run = site.operate(command)
            assert run.status == 0, run.text
        fill(site, float(sys.argv[1]) if sys.argv[1:] else 1)
        print("database:", site.sql("select pg_size_pretty(pg_database_size(current_database()))"))
        for name, command in WAYS.items():
            words = ["python3", "-c", MEASURE, command]
            done = site.run(words, user="ubuntu", cwd=CHECKOUT, timeout=3600)
            status, seconds, megabytes = done.stdout.split()
            cost = f"{float(seconds):.1f} s, {float(megabytes):.0f} MiB"
            print(f"{name}: {cost} (exit status {status})", flush=True)
        site.edit("deploy.ini", "rehearse = no", "rehearse = yes")
        site.add("formsApp/migrations/0002_more.py", MIGRATION)
        site.push()
        run = site.operate("python3 deploy.py")
        print("a migration that is rehearsed:")
        print("\n".join(line for line in run.text.splitlines() if line.startswith("migrate")))
        assert run.status == 0, run.text
        newest = "grep -h . $(ls -t .deploy/logs/* | head -1) | cut -c1-150"
        print(f"the last restore, step by step:\n{site.run(newest, cwd=CHECKOUT).stdout}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
