"""deploy.py beside other ways to deploy the same project: python3 -m tests.bench.compare [ROUNDS [FILE.svg]]

As root, where a server can be booted (see tests/server); Capistrano from Debian (`apt-get install capistrano`), Fabric and
pyinfra from a virtual environment whose `bin` is in PATH. Each tool has a booted server of its own with the same project, as a
careful user of it would set it up. In each round all of them make the same change, one after the other, while clients ask
the page through nginx: the seconds of the whole command, and until the first user got the new release; requests
sent and lost, and how long they waited. `deploy.py` is there twice: as shipped, and with [restart] bake = 0, which
looks at no figures of real requests after the switch, as the others do not.

A table of medians goes to stdout. With FILE.svg, one more switch of deploy.py and of the original script is drawn: what
the clients saw, in each tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.picture import draw_switch
from tests.server.bench import Load, Sample, longest, lost
from tests.server.site import AUTHOR, CHECKOUT, HOME, REMOTE, SETUP, Site

CONNECTIONS, PAUSE = 16, 0.05  # of the clients, and what each waits after an answer, in seconds
PACKAGES = (
    "six",
    "toolz",
    "idna",
    "certifi",
    "attrs",
    "sqlparse",
    "pytz",
    "tomli",
    "zipp",
    "cycler",
)
CAPISTRANO = f"{HOME}/capistrano"
CAPISTRANO_PYTHON = f"{CAPISTRANO}/shared/venvs/gforms/bin/python"

# The script that deploy.py replaces, written anew from what is known of it.
SCRIPT = f"""\
#!/bin/bash
set -e
cd {CHECKOUT}
export $(cat .env | grep -v '^#' | xargs)
git pull origin main
export PIPENV_VENV_IN_PROJECT=1
pipenv install --deploy
pipenv run python manage.py migrate --noinput
pipenv run python manage.py collectstatic --noinput
docker compose up -d
sudo systemctl restart gunicorn
sleep 2
curl -f http://localhost:8000 >/dev/null || echo "Warning: the health check failed"
echo "Deployment Completed Successfully"
"""

# The test server has no curl: this asks as `curl --retry-connrefused` does, and only once with -f.
CURL = """\
#!/usr/bin/python3
import sys, time, urllib.request
asked = urllib.request.Request(sys.argv[-1], headers={"Host": "gforms.example.com"})
until = time.monotonic() + 10
while True:
    try:
        sys.exit(urllib.request.urlopen(asked).status != 200)
    except OSError:
        if "-f" in sys.argv or time.monotonic() > until:
            sys.exit(7)
        time.sleep(0.05)
"""

ENVIRONMENT = f"set -a; . {CHECKOUT}/.env; set +a; export PIPENV_VENV_IN_PROJECT=1"
FABFILE = f"""\
from fabric import task

@task
def deploy(c):
    with c.cd("{CHECKOUT}"), c.prefix("{ENVIRONMENT}"):
        c.run("git pull --ff-only --quiet origin main")
        c.run("pipenv install --deploy")
        c.run("docker compose up --detach --wait")
        c.run(".venv/bin/python manage.py collectstatic --noinput")
        c.run(".venv/bin/python manage.py migrate --noinput")
        c.run("sudo systemctl restart gunicorn")
        c.run("curl http://127.0.0.1:8000/")
"""
PYINFRA = f"""\
from pyinfra.operations import git, server, systemd

prefix = "cd {CHECKOUT} && {ENVIRONMENT} && "
git.repo(name="pull", src="{REMOTE}", dest="{CHECKOUT}", branch="main", pull=True)
for line in (
    "pipenv install --deploy",
    "docker compose up --detach --wait",
    ".venv/bin/python manage.py collectstatic --noinput",
    ".venv/bin/python manage.py migrate --noinput",
):
    server.shell(name=line, commands=[prefix + line])
systemd.service(name="restart", service="gunicorn", restarted=True, _sudo=True)
"""
CAPFILE = """\
require "capistrano/setup"
require "capistrano/deploy"
require "capistrano/scm/git"
install_plugin Capistrano::SCM::Git
"""
RECIPE = f"""\
lock "~> 3.17"
set :application, "gforms"
set :repo_url, "{REMOTE}"
set :branch, "main"
set :deploy_to, "{CAPISTRANO}"
set :format, :simpletext
set :log_level, :info
append :linked_files, ".env", "docker-compose.yml"
append :linked_dirs, "media"
set :keep_releases, 5
set :ssh_options, auth_methods: %w[publickey], keys: [ENV.fetch("KEY")], keys_only: true, verify_host_key: :never, config: false
server "127.0.0.1", user: "ubuntu", roles: %w[app]

def django(command)
  "bash -c 'set -a; . ./.env; set +a; {CAPISTRANO_PYTHON} manage.py #{{command}}'"
end

namespace :django do
  task :prepare do
    on roles(:app) do
      within release_path do
        # one environment at a path that stays: the scripts in it name that
        execute "cd #{{release_path}} && WORKON_HOME={CAPISTRANO}/shared/venvs PIPENV_CUSTOM_VENV_NAME=gforms pipenv install --deploy"
        execute "cd #{{release_path}} && docker compose --project-name gforms up --detach --wait"
        execute "cd #{{release_path}} && #{{django('collectstatic --noinput')}}"
        execute "cd #{{release_path}} && #{{django('migrate --noinput')}}"
      end
    end
  end
  task :restart do
    on roles(:app) do
      execute "sudo systemctl restart gunicorn"
    end
  end
end
after "deploy:updated", "django:prepare"
after "deploy:published", "django:restart"
after "deploy:finishing_rollback", "django:restart"
"""


@dataclass
class Figures:
    """What a command cost, and what users saw of it."""

    seconds: float
    first: float | None  # seconds until the first user got the new release; None: nobody did
    sent: int
    lost: int
    longest: float
    p99: float


@dataclass
class Way:
    """A way to deploy, on a server of its own."""

    name: str
    site: Site
    change: list[str]  # the command that brings what was pushed
    back: list[str] | None  # the command that goes back; None: take the commit back and deploy
    nothing: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    figures: dict[str, list[Figures]] = field(default_factory=dict)

    def run(self, command: list[str]) -> None:
        """Run a command of this way on this computer, in the network of its server."""
        variables = [f"{name}={text}" for name, text in self.environment.items()]
        process = self.site.spawn(["env", *variables, *command])
        said, errors = process.communicate(timeout=600)
        if process.returncode:
            log = self.site.run("journalctl --unit gunicorn --lines 40 --no-pager").stdout
            raise SystemExit(f"{self.name}: `{' '.join(command)}` failed:\n{said}\n{errors}\n{log}")

    def watched(self, command: list[str], rest: float = 1) -> tuple[Load, float, float]:
        """Run a command while clients ask, a second before it and `rest` after: what they saw, its start and end."""
        with self.site.load("/late/", connections=CONNECTIONS, pause=PAUSE) as load:
            time.sleep(1)
            began = time.monotonic()
            self.run(command)
            ended = time.monotonic()
            time.sleep(rest)
        return load, began, ended

    def measure(self, kind: str, command: list[str], version: str) -> None:
        """Run a command while clients ask, and keep what was seen of it."""
        load, began, ended = self.watched(command)
        samples = load.between(began, ended + 1)
        waits = sorted(sample.seconds for sample in samples)
        new = [each.began + each.seconds for each in samples if each.body.startswith(f"{version} ")]
        figures = Figures(
            seconds=ended - began,
            first=min(new) - began if new and kind != "nothing new" else None,
            sent=len(samples),
            lost=len(lost(samples)),
            longest=longest(samples),
            p99=waits[int(len(waits) * 0.99)] if waits else 0.0,
        )
        self.figures.setdefault(kind, []).append(figures)


def prepared(plain_password: bool) -> Site:
    """A booted server with the project in its checkout, and nothing deployed yet."""
    site = Site()
    site.boot()
    site.prepare()
    site.put("/usr/local/bin/curl", CURL, mode="0755")
    if plain_password:  # the original script reads no other
        quoted, env = r"(?m)^(SECRET_KEY|DEFAULT_DB_PASSWORD)=.*$", site.read(f"{CHECKOUT}/.env")
        plain = re.sub(quoted, r"\1=plain1", env)
        site.put(f"{CHECKOUT}/.env", plain, user="ubuntu", mode="0600")
    return site


def ours(name: str = "deploy.py", bake: int = 5) -> Way:
    """deploy.py, after its own set-up."""
    site = prepared(False)
    if bake != 5:
        site.edit("deploy.ini", "bake = 5", f"bake = {bake}")
        site.push()
        site.run("git pull --quiet", user="ubuntu", cwd=CHECKOUT)
    for command in (SETUP, "python3 deploy.py"):
        run = site.operate(command)
        if run.status:
            raise SystemExit(run.text)
    site.await_rest()
    call = f"cd {CHECKOUT} && python3 deploy.py"
    options = ("", " rollback --no-freeze", " --if-changed")
    change, back, nothing = (site.ssh_command(call + more) for more in options)
    return Way(name, site, change, back, nothing)


def unbaked() -> Way:
    """The same, without a look at real requests after the switch."""
    return ours("deploy.py, bake = 0", 0)


def original() -> Way:
    """The shell script that deploy.py replaces."""
    site = prepared(True)
    site.serve_in_place()
    site.put(f"{HOME}/deploy.sh", SCRIPT, user="ubuntu", mode="0755")
    command = site.ssh_command(f"{HOME}/deploy.sh")
    return Way("the original script", site, command, None, command)


def engine(name: str, file: str, text: str, call: str) -> Way:
    """Fabric or pyinfra, from this computer, in place."""
    site = prepared(True)
    site.serve_in_place()
    path = site.folder / file
    path.write_text(text)
    words = site.in_network(*call.format(path=path, key=site.key()).split())
    return Way(name, site, words, None, words)


def fabric() -> Way:
    """Fabric, with the tasks of a careful user."""
    call = "fab -r {path.parent} -i {key} -H ubuntu@127.0.0.1 deploy"
    return engine("Fabric 3.2", "fabfile.py", FABFILE, call)


def pyinfra() -> Way:
    """pyinfra, with the operations of a careful user."""
    ssh = "--data ssh_strict_host_key_checking=no --data ssh_known_hosts_file=/dev/null"
    call = f"pyinfra -y 127.0.0.1 --user ubuntu --key {{key}} {ssh} {{path}}"
    return engine("pyinfra 3", "deploy_site.py", PYINFRA, call)


def capistrano() -> Way:
    """Capistrano with the same steps, its own folders and links."""
    site = prepared(True)
    shared = f"{CAPISTRANO}/shared"
    site.run(
        f"mkdir -p {shared}/venvs {shared}/media && cp {CHECKOUT}/.env {CHECKOUT}/docker-compose.yml {shared}/",
        user="ubuntu",
    )
    folder = site.folder / "capistrano"
    (folder / "config" / "deploy").mkdir(parents=True)
    (folder / "Capfile").write_text(CAPFILE)
    (folder / "config" / "deploy.rb").write_text(RECIPE)
    (folder / "config" / "deploy" / "production.rb").touch()
    cap = site.in_network("sh", "-c", f"cd {folder} && cap production $0", "deploy")
    back = site.in_network("sh", "-c", f"cd {folder} && cap production $0", "deploy:rollback")
    way = Way("Capistrano 3.17", site, cap, back, cap, {"KEY": str(site.key())})
    # the first deployment restarts what is not there yet
    site.put("/etc/systemd/system/gunicorn.service", "[Service]\nExecStart=/bin/sleep 600\n")
    way.run(cap)
    site.serve_in_place(f"{CAPISTRANO}/current", f"{shared}/venvs/gforms/bin/gunicorn", "true")
    return way


WAYS = (ours, unbaked, original, capistrano, fabric, pyinfra)
NEEDED = {capistrano: "cap", fabric: "fab", pyinfra: "pyinfra"}


@contextlib.contextmanager
def ways() -> Iterator[list[Way]]:
    """Every way that can be had here, each on its booted server; they end with the block."""
    with contextlib.ExitStack() as stack:
        made = []
        for make in WAYS:
            if (program := NEEDED.get(make)) and not shutil.which(program):
                print(f"{make.__name__} is left out: {program} is not in PATH", file=sys.stderr)
                continue
            made.append(make())
            stack.callback(made[-1].site.close)
        yield made


def add_package_and_migration(site: Site, number: int) -> None:
    """One package more in the lock, and one more migration, which adds a table."""
    pipfile = site.read(f"{AUTHOR}/Pipfile")
    site.add("Pipfile", pipfile.replace("[packages]\n", f'[packages]\n{PACKAGES[number]} = "*"\n'))
    site.lock()
    folder = f"{AUTHOR}/formsApp/migrations"
    names = site.run(f"ls {folder} | grep -E '^0' | sort | tail -n 1").stdout.strip()
    before, following = names.removesuffix(".py"), f"{number + 2:04}_bench"
    site.add(
        f"formsApp/migrations/{following}.py",
        "from django.db import migrations\n\n\nclass Migration(migrations.Migration):\n"
        f'    dependencies = [("formsApp", "{before}")]\n'
        f'    operations = [migrations.RunSQL("CREATE TABLE bench{number} (id int)", "DROP TABLE bench{number}")]\n',
    )


def play(way: Way, number: int) -> None:
    """One round of one way: a change of the code, back again, a package and a migration, nothing new."""
    site = way.site
    way.measure("code only", way.change, site.push())
    before = str(site.number - 1)
    if way.back:
        way.measure("going back", way.back, before)
    else:
        site.take_back()
        site.run(["git", "push", "--quiet", "origin", "HEAD:main"], user="ubuntu", cwd=AUTHOR)
        way.measure("going back", way.change, before)
    add_package_and_migration(site, number)
    way.measure("package and migration", way.change, site.push())
    way.measure("nothing new", way.nothing, str(site.number))


def table(made: list[Way]) -> str:
    """The medians of every way, and their ratio to the original script."""
    base = {way.name: way for way in made}["the original script"].figures
    lines = [
        "| change | way | seconds | × the original | first user | sent | lost | longest wait | p99 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in base:
        against = statistics.median(each.seconds for each in base[kind])
        for way in made:
            seen = way.figures[kind]
            took = statistics.median(each.seconds for each in seen)
            firsts = [each.first for each in seen if each.first is not None]
            first = f"{statistics.median(firsts):.1f} s" if firsts else ""
            lines.append(
                f"| {kind} | {way.name} | {took:.1f} | {took / against:.2f} | {first} | "
                f"{sum(each.sent for each in seen)} | {sum(each.lost for each in seen)} | "
                f"{max(each.longest for each in seen):.2f} s | "
                f"{statistics.median(each.p99 for each in seen):.3f} s |"
            )
    return "\n".join(lines)


def switch_of(way: Way) -> tuple[list[Sample], float, str, str]:
    """The requests around one more change of the code: all of them, its start, and the two versions."""
    before, version = str(way.site.number), way.site.push()
    load, began, _ = way.watched(way.change, rest=2)
    return load.samples, began, before, version


def main() -> int:
    """Measure and print; draw if asked to."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with ways() as made:
        for number in range(rounds):
            for way in made:
                play(way, number)
                print(f"round {number + 1} of {rounds}: {way.name} is done", file=sys.stderr)
        print(f"{rounds} rounds, {CONNECTIONS} connections, {os.cpu_count()} cores\n")
        print(table(made))
        if len(sys.argv) > 2:
            chosen = [way for way in made if way.name in ("deploy.py", "the original script")]
            drawn = draw_switch({way.name: switch_of(way) for way in chosen})
            Path(sys.argv[2]).write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
