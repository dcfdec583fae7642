"""A server with a site on it: the author's clone, the checkout that is deployed from, deployments over ssh.

with Site() as site:
    site.prepare()
    assert site.operate("sudo python3 deploy.py setup").status == 0
    assert site.deploy().status == 0
    site.edit("forms/urls.py", "old", "new")
    version = site.push()
    with site.watched("/") as watch:
        running = site.begin()
        running.await_line("restart gunicorn-standby")
        watch.run = running.end()
    assert not watch.lost
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import secrets
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.server.bench import HOST, PROJECT, Load, Sample, Server, longest, lost, require
from tests.server.machine import MachineError, kill_group, until
from tests.server.recipe import CACHE, CERTIFICATES

HOME = "/home/ubuntu"
REMOTE, AUTHOR, CHECKOUT = f"{HOME}/remote.git", f"{HOME}/author", f"{HOME}/gforms"
WORKSPACE = f"{CHECKOUT}/.deploy"
UNITS = ("gunicorn.socket", "gunicorn.service", "gunicorn-standby.service")
SETUP = "sudo python3 deploy.py setup"
FULL_RIGHTS = "/etc/sudoers.d/90-cloud-init-users"  # those that a new server gives its user
STEADY = 1.0  # seconds of load before what is measured begins
# seconds: whoever waited for an import of 3 s, or behind a request of 5 s, waited longer
PATIENCE = 2.5
# the line with which a deployment begins to switch
STANDBY_STARTS = "systemctl restart gunicorn-standby"
OLD_STOPS = "systemctl restart gunicorn"
STANDBY_STOPS = "systemctl stop --no-block gunicorn-standby"

ENV = """\
SECRET_KEY='{key}'
DEBUG=False
HTTPS=False
ALLOWED_HOSTS={host}
DEFAULT_DB_USER=postgres
DEFAULT_DB_PASSWORD='p$x w#1'
DEFAULT_DB_NAME=gforms-db
DEFAULT_DB_HOST=localhost
REDIS_URL=redis://127.0.0.1:6379/0
"""

# The first installation in the checkout, and what starts it: as the server of the script that deploy.py replaces is.
INSTALL = """\
set -e
PIPENV_VENV_IN_PROJECT=1 pipenv install --deploy
docker compose --project-name gforms up --detach --wait
set -a; . ./.env; set +a
.venv/bin/python manage.py migrate --noinput
.venv/bin/python manage.py collectstatic --noinput
"""
UNIT = f"""\
[Unit]
Description=gunicorn
After=network.target

[Service]
User=ubuntu
Group=www-data
WorkingDirectory={{folder}}
EnvironmentFile={CHECKOUT}/.env
ExecStart={{gunicorn}} --workers 5 --bind 127.0.0.1:8000 forms.wsgi:application
Restart=always

[Install]
WantedBy=multi-user.target
"""
NGINX = """\
server {{
    listen 80;
    server_name gforms.example.com;
    location /static/ {{ alias {folder}/staticfiles/; }}
    location / {{
        proxy_pass http://127.0.0.1:8000;
        proxy_set_header Host $host;
    }}
}}
"""
ENABLE = """\
set -e
chmod o+x /home/ubuntu
rm -f /etc/nginx/sites-enabled/default
ln -sf ../sites-available/gforms /etc/nginx/sites-enabled/
nginx -t
systemctl reload nginx
systemctl daemon-reload
systemctl enable gunicorn
systemctl restart gunicorn
"""


@dataclass(frozen=True)
class Run:
    """A command over ssh that has ended: its exit status, and each line with the time when it came."""

    status: int
    lines: Sequence[tuple[float, str]]
    errors: str
    ended: float

    @property
    def text(self) -> str:
        """All that it said."""
        said = "\n".join(line for _, line in self.lines)
        return f"{said}\n{self.errors}(exit status {self.status})"

    @property
    def last(self) -> str:
        """Its last line."""
        return self.lines[-1][1] if self.lines else ""

    def when(self, ending: str) -> float:
        """When the first line with this ending came; the end of it all, if none did."""
        return next((at for at, line in self.lines if line.endswith(ending)), self.ended)


class Running:
    """A command under way over ssh."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Read what it says, as it says it."""
        self._process, self._lines = process, list[tuple[float, str]]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Keep each line with its time."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append((time.monotonic(), line.rstrip("\n")))

    def await_line(self, text: str) -> None:
        """Wait until it says this."""
        self.reach(f"says {text!r}", lambda: any(text in line for _, line in self._lines))

    def reach(self, what: str, reached: Callable[[], bool]) -> None:
        """Wait until it is so far; raise with all that it said when it never will be."""
        deadline, alive = time.monotonic() + 120, True
        while not reached():
            if time.monotonic() > deadline or not alive:
                self.cut()
                raise MachineError(f"it never {what}:\n{self.end().text}")
            alive = self._reader.is_alive()
            time.sleep(0.01)

    def cut(self) -> None:
        """Cut the connection."""
        kill_group(self._process)

    def end(self, seconds: float = 300) -> Run:
        """Wait for the end of the ssh process, with the command's exit status or 255."""
        self._reader.join(seconds)
        late = self._reader.is_alive()
        if late:
            self.cut()
            self._reader.join()
        status = self._process.wait()
        assert self._process.stdout is not None and self._process.stderr is not None
        run = Run(status, self._lines, self._process.stderr.read(), time.monotonic())
        self._process.stdout.close()
        self._process.stderr.close()
        if late:
            raise MachineError(f"it has not ended after {seconds:g} s:\n{run.text}")
        return run


@dataclass
class Watch:
    """What users saw of some addresses while a block ran, and the deployment that ran in it."""

    began: float
    loads: dict[str, Load]
    run: Run = field(default_factory=lambda: Run(0, [], "", time.monotonic()))

    @property
    def samples(self) -> list[Sample]:
        """Every request to every address."""
        return [sample for load in self.loads.values() for sample in load.samples]

    @property
    def lost(self) -> list[Sample]:
        """The requests that were not answered as they should have been."""
        return lost(self.samples)

    @property
    def late(self) -> set[str]:
        """What the address that imports late answered: the version of the code and that of the late module."""
        return {sample.body for sample in self.loads["/late/"].samples if sample.status}

    def longest(self, start: float, end: float) -> float:
        """Return the longest wait of the requests that were under way between two instants."""
        return max(longest(load.between(start, end)) for load in self.loads.values())

    def unanswered(self) -> bool:
        """Whether nobody got an answer in the midst of gunicorn's restart, if there was one."""
        stops, over = self.run.when(OLD_STOPS), self.run.when(STANDBY_STOPS)
        begin, end = (stops + part * (over - stops) for part in (0.4, 0.7))
        answers = (each.began + each.seconds for each in self.loads["/late/"].samples)
        return stops < over and not any(begin <= at <= end for at in answers)

    def told(self, name: str) -> str:
        """Return the figures as a line for the record."""
        begun, switch = self.began + STEADY, self.run.when(STANDBY_STARTS)
        steady, build = self.longest(self.began, begun), self.longest(begun, switch)
        switched = "no switch"
        if switch < self.run.ended:
            waited, wanted = self.longest(switch, time.monotonic()), max(2 * steady, 0.1)
            switched = f"switch {waited:.2f} s (wanted: {wanted:.2f})"
        return (
            f"load: {name}: {len(self.samples)} requests sent, {len(self.lost)} lost; longest wait: "
            f"steady state {steady:.2f} s, build {build:.2f} s, {switched}"
        )


class Site(Server):
    """A server with a remote repository, its author's clone, and the checkout that is deployed from."""

    def __init__(self) -> None:
        """Nothing has been pushed yet."""
        super().__init__()
        self.number = 0

    def prepare(self) -> None:
        """Push the first version, clone it where it is deployed from, and write `.env` there."""
        self.run(
            f"git init --quiet --bare --initial-branch=main {REMOTE} && git clone --quiet {REMOTE} {AUTHOR} && "
            "git config --global user.name Author && git config --global user.email author@example.com",
            user="ubuntu",
        )
        self.send(PROJECT / "tests/sample", AUTHOR, user="ubuntu", exclude=["__pycache__"])
        for folder in ("systemd", "nginx", "postgresql"):
            self.send(PROJECT / folder, f"{AUTHOR}/{folder}", user="ubuntu")
        for name in ("deploy.py", "gunicorn.conf.py"):
            self.add(name, (PROJECT / name).read_text())
        self.edit("gunicorn.conf.py", '"/admin/login/"', '"/"')
        self.add("deploy.ini", settings())
        self.lock()
        self.push()
        self.run(f"git clone --quiet {REMOTE} {CHECKOUT}", user="ubuntu")
        compose = (PROJECT / "docker-compose.yml").read_text()
        env = ENV.format(key=secrets.token_urlsafe(50), host=HOST)
        self.put(f"{CHECKOUT}/docker-compose.yml", compose, user="ubuntu")
        self.put(f"{CHECKOUT}/.env", env, user="ubuntu", mode="0600")

    def serve_in_place(
        self,
        folder: str = CHECKOUT,
        gunicorn: str = f"{CHECKOUT}/.venv/bin/gunicorn",
        install: str = INSTALL,
    ) -> None:
        """Have a gunicorn serve from where it is deployed to, as without deploy.py."""
        self.run(install, user="ubuntu", cwd=CHECKOUT, timeout=300)
        unit = UNIT.format(folder=folder, gunicorn=gunicorn)
        self.put("/etc/systemd/system/gunicorn.service", unit)
        self.put("/etc/nginx/sites-available/gforms", NGINX.format(folder=folder))
        self.run(ENABLE)
        self.await_page()

    # The author

    def add(self, name: str, text: str) -> None:
        """Write a file of the author's clone."""
        self.put(f"{AUTHOR}/{name}", text, user="ubuntu")

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text, which must be there, in a file of the author's clone."""
        text = self.read(f"{AUTHOR}/{name}")
        assert old in text, f"{old!r} is not in {name}"
        self.add(name, text.replace(old, new))

    def lock(self) -> None:
        """Make Pipfile.lock of Pipfile, once for all tests."""
        pipfile = self.read(f"{AUTHOR}/Pipfile")
        kept = CACHE / f"{hashlib.sha256(pipfile.encode()).hexdigest()[:12]}.lock"
        if not kept.exists():
            env = {"REQUESTS_CA_BUNDLE": str(CERTIFICATES), "WORKON_HOME": f"{HOME}/author-env"}
            self.run(["pipenv", "lock"], user="ubuntu", cwd=AUTHOR, env=env, timeout=180)
            made = self.folder / kept.name
            made.write_text(self.read(f"{AUTHOR}/Pipfile.lock"))
            made.replace(kept)
        self.add("Pipfile.lock", kept.read_text())

    def push(self) -> str:
        """Push what has been changed as the next version, which is returned."""
        self.number += 1
        self.run(
            f"sed -i 's/^VERSION = .*/VERSION = \"{self.number}\"/' formsApp/version.py formsApp/late.py && "
            f"git add --all && git commit --quiet --message 'Version {self.number}' && "
            "git push --quiet origin HEAD:main",
            user="ubuntu",
            cwd=AUTHOR,
        )
        return str(self.number)

    def take_back(self) -> None:
        """Undo the last version in the author's clone; the next push brings that."""
        self.run(["git", "revert", "--no-edit", "HEAD"], user="ubuntu", cwd=AUTHOR)

    # Whoever deploys, over ssh

    def start_ssh(self, script: str, key: Path | None = None) -> Running:
        """Start a script over ssh."""
        return Running(self.ssh_start(script, key=key))

    def begin(self, key: Path | None = None) -> Running:
        """Start a deployment of what was pushed last, as the workflow does."""
        head = self.run(["git", "rev-parse", "main"], user="ubuntu", cwd=REMOTE).stdout.strip()
        return self.start_ssh(workflow_script(head), key)

    def deploy(self) -> Run:
        """Run a deployment to its end, as the workflow does."""
        return self.begin().end()

    def operate(self, command: str) -> Run:
        """Run an operator's command in the checkout to its end."""
        return self.start_ssh(f"cd {CHECKOUT} && {command}").end()

    # What there is to see

    def late(self) -> str:
        """Return what the address that imports late answers: twice the live version."""
        answer = self.http("/late/")
        return answer.body if answer.status == 200 else f"{answer.status}"

    def version(self) -> str:
        """Return the live version, from a header of the page."""
        return "".join(self.http("/").all("X-Release"))

    def style(self) -> str:
        """Return the address of the style sheet that the page asks for."""
        found = re.search(r'rel="stylesheet" href="([^"]+)"', self.http("/").body)
        assert found, "the page asks for no style sheet"
        return found[1]

    def history(self) -> list[dict[str, Any]]:
        """Return the runs that there were, oldest first."""
        return [json.loads(line) for line in self.read(f"{WORKSPACE}/history.jsonl").splitlines()]

    def current(self) -> str:
        """Return the name of the live release."""
        return Path(self.run(["readlink", f"{WORKSPACE}/current"]).stdout.strip()).name

    def await_rest(self) -> None:
        """Wait until the socket and the service are there, and the stand-by has gone."""
        states = ["systemctl", "is-active", *UNITS]
        rest = ["active", "active", "inactive"]
        until("it rests", 60, lambda: self.run(states, check=False).stdout.split() == rest)

    def await_page(self) -> None:
        """Wait for the page, which needs the database."""
        until("the page is there", 90, lambda: self.http("/").status == 200)

    def sql(self, text: str) -> str:
        """Ask the database."""
        psql = 'psql --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" -tA'
        command = ["docker", "exec", "--interactive", "postgresql", "sh", "-c", psql]
        return self.run(command, stdin=text, check=False).stdout.strip()

    def containers(self) -> list[str]:
        """Return when the containers of PostgreSQL and Redis were started."""
        ask = "docker inspect --format {{.Id}}{{.State.StartedAt}} postgresql redis"
        return self.run(ask.split()).stdout.split()

    @contextlib.contextmanager
    def watched(self, *urls: str) -> Iterator[Watch]:
        """Ask for these all the while; at first nothing else happens."""
        with contextlib.ExitStack() as stack:
            begin = functools.partial(self.load, connections=2, pause=0.1)
            loads = {url: stack.enter_context(begin(url)) for url in urls}
            watch = Watch(time.monotonic(), loads)
            time.sleep(STEADY)
            yield watch


def workflow_script(commit: str) -> str:
    """Return the shipped workflow's script, as ssh-action v1.0.3 sends it: after a line for each of its `envs`."""
    text = (PROJECT / ".github/workflows/deploy.yml").read_text()
    found = re.search(r"(?m)^ +envs: AWS_DEPLOY_PATH,DEPLOY_COMMIT\n +script: (.+)$", text)
    assert found, "the workflow gives the action other variables or another script now"
    return f"export AWS_DEPLOY_PATH='{CHECKOUT}'\nexport DEPLOY_COMMIT='{commit}'\n{found[1]}"


def settings() -> str:
    """Return the shipped settings with another question: a page that needs the database and a template."""
    text, login = (PROJECT / "deploy.ini").read_text(), "url = http://127.0.0.1:8000/admin/login/\n"
    assert login in text, "deploy.ini asks for another page now"
    text = text.replace("\ndeadline = 30\n", "\ndeadline = 4\n")
    return text.replace(login, "url = http://127.0.0.1:8000/\n")


def record(line: str) -> None:
    """Tell whoever keeps the figures."""
    print(line, file=sys.stderr, flush=True)


class SiteCase(unittest.TestCase):
    """A test case on a site that is asked by users while it is deployed."""

    site: Site

    def boot_site(self) -> Site:
        """Boot a server of this test's own, with a checkout that nothing was set up for."""
        require()
        self.site = site = Site()
        self.addCleanup(site.close)
        site.boot()
        site.prepare()
        return site

    @contextlib.contextmanager
    def under_load(self, name: str, *urls: str) -> Iterator[Watch]:
        """Deploy in this block while users ask: they lose nothing, and do not wait for the deployment."""
        with self.site.watched(*urls) as watch:
            yield watch
            self.site.await_rest()
        record(watch.told(name))
        self.assertGreater(len(watch.samples), 50)
        self.assertEqual(watch.lost[:3], [], f"{len(watch.lost)} requests were lost")
        self.assertLess(longest(watch.samples), PATIENCE)
        self.assertFalse(watch.unanswered(), "nobody answers while gunicorn restarts")

    def assert_live(self, run: Run, version: str) -> None:
        """See that a deployment made a version live, and said so."""
        self.assertEqual(run.status, 0, run.text)
        said = rf"^deploy   {self.site.current()} is live and healthy; it took [\d.]+ s"
        self.assertRegex(run.last, said)
        self.assertEqual(self.site.late(), f"{version} {version}", run.text)

    def assert_met(self, watch: Watch, *versions: str) -> None:
        """See that users met these versions, each as a whole, and no other."""
        self.assertEqual(watch.late, {f"{version} {version}" for version in versions})

    def push(self) -> str:
        """Push the next version, which no later test builds upon; return its number."""
        number = self.site.push()
        self.addCleanup(self.site.take_back)
        return number
