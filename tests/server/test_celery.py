"""A real Celery worker and beat, set up by the lines of docs/server.md: both follow what is live."""

from __future__ import annotations

import json
import re

from tests.server.bench import SERVER_PAGE
from tests.server.machine import until
from tests.server.site import CHECKOUT, SETUP, SiteCase, record

# Beat sends its own version every second; the worker writes it down beside its own.
CELERY = """\
import os
from pathlib import Path

from celery import Celery

from formsApp.version import VERSION

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "forms.settings")
app = Celery("forms", broker=os.environ["REDIS_URL"])
app.conf.beat_schedule = {"tick": {"task": "tick", "schedule": 1.0, "args": [VERSION]}}


@app.task(name="tick", ignore_result=True)
def tick(sent):
    with Path("logs/ticks").open("a") as file:
        file.write(f"{sent} {VERSION}\\n")
"""
# Some time after its start, as one does that misses a table, say.
CRASH = """\
import time

from celery.signals import beat_init, worker_init


@beat_init.connect
@worker_init.connect
def crash(**_):
    time.sleep(2)
    os._exit(3)
"""
UNITS = ("celery", "celery-beat")


class CeleryTest(SiteCase):
    """What beat sends and what the worker does with it is of the live release."""

    def setUp(self) -> None:
        """Set up a site whose author has written a schedule, and the lines for it."""
        site = self.boot_site()
        celery = 'celery = {version = "*", extras = ["redis"]}'
        site.edit("Pipfile", "[packages]\n", f"[packages]\n{celery}\n")
        site.lock()
        site.add("forms/celery.py", CELERY)
        page = SERVER_PAGE.read_text().partition("\n## Workers\n")[2]
        blocks = re.findall(r"(?ms)^```\w*\n(\[.+?)^```$", page)[:2]
        before, after, checks = re.split(r"\[\w+\]\n", "".join(blocks))[1:]
        hooks = "before =\nafter =\n\n"
        site.edit("deploy.ini", f"{hooks}[restart]", f"{before}after =\n\n[restart]")
        site.edit("deploy.ini", f"{hooks}[health]", f"before =\n{after}\n[health]")
        others = "checks =\n    … those that are there\n"
        site.edit("deploy.ini", "checks =\n", f"checks =\n{checks.removeprefix(others)}")
        site.push()
        site.run("git pull --quiet", user="ubuntu", cwd=CHECKOUT)

    def test_they_follow_what_is_live(self) -> None:
        """From the first deployment on, and back; neither stands in the way of its own cure."""
        site = self.site
        run = site.operate(SETUP)
        self.assertEqual(run.status, 0, run.text)
        self.assert_live(site.deploy(), "2")
        self.await_tick("2")
        first = site.current()
        site.edit("forms/celery.py", "@app.task", f"{CRASH}\n\n@app.task")
        crashing = site.push()
        self.assert_live(site.deploy(), crashing)
        ask = ["systemctl", "is-active", *UNITS]
        crashed = ["activating", "activating"]
        until("both crash", 60, lambda: site.run(ask, check=False).stdout.split() == crashed)
        site.take_back()
        cure = site.push()
        self.assert_live(site.deploy(), cure)
        self.await_tick(cure)
        site.edit("forms/celery.py", "import Celery\n", "import Cellery\n")
        site.push()
        broken = site.deploy()
        self.assertEqual(broken.status, 1, broken.text)
        self.assertRegex(broken.last, "FAILED: `celery --app forms report` .*; .* is live and heal")
        self.await_tick(cure)
        self.assert_live(site.operate(f"python3 deploy.py rollback {first} --no-freeze"), "2")
        self.await_tick("2")
        self.exposure()
        self.assertRegex(
            site.run("stat -c '%U %n' /var/lib/celery-beat/*").stdout, "^ubuntu .*/sched"
        )

    def await_tick(self, version: str) -> None:
        """Wait until both are of this version, and see that `status` finds one of each, and well."""
        site = self.site
        site.run(f"rm -f {CHECKOUT}/logs/ticks")
        ticks = f"tail -n 1 {CHECKOUT}/logs/ticks"
        told = f"{version} {version}\n"
        until(f"{told!r} is told", 30, lambda: site.run(ticks, check=False).stdout == told)
        self.assertEqual(site.run(["pgrep", "-fc", "celery --app forms beat"]).stdout, "1\n")
        said = site.ssh(f"cd {CHECKOUT} && python3 deploy.py status --json").stdout
        checks = json.loads(said)["checks"]
        self.assertEqual([checks[unit]["good"] for unit in UNITS], [True, True], said)

    def exposure(self) -> None:
        """See that systemd finds little that they could do to the system: 3.0 of 10 at most."""
        for unit in UNITS:
            ask = ["systemd-analyze", "security", "--no-pager", "--threshold=30", unit]
            record(self.site.run(ask).stdout.splitlines()[-1])
