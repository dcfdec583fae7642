#!/usr/bin/env python3
"""A real deployment to watch, on any machine with Python 3.11+ and git, without root.

    python3 tests/sandbox.py           play five acts, then remove everything
    python3 tests/sandbox.py --keep    leave the site running at the end, until Ctrl-C

Everything is real: git, pipenv, virtual environments, Django, gunicorn, HTTP, and the deploy.py
beside this folder. Only systemd is played, by tests/standin, with the units that `setup` makes. A
client asks the site for its page all the while, another answers a form, and at the end they tell
what they saw. All lies in one temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import deploy  # also when this file is run as a program
from tests.standin.systemd import Systemd

PIPENV = "pipenv==2026.10.3"
DJANGO_OF_PYTHON_311 = "5.2.8"
FOREIGN = ("GIT_", "PIPENV_", "DEPLOY_", "VIRTUAL_ENV", "PYTHONPATH", "SSH_CONNECTION")

INI = """\
# What differs here from the defaults of deploy.py.
[pull]
retries = 0
[install]
python = {python}
[services]
# no Docker here: the database is SQLite
command =
[backup]
command = {python} {root}/sqlite.py dump
verify = {python} {root}/sqlite.py load :memory:
[restore]
command = {python} {root}/sqlite.py {{act}} {{database}}
[health]
url = http://127.0.0.1:{port}/
headers =
contains = name="release"
deadline = 20
[status]
checks =
    database: python manage.py check --database default
[notify]
journal =
"""

ENV = """\
SECRET_KEY='{secret}'
DEBUG=False
HTTPS=False
ALLOWED_HOSTS=127.0.0.1,localhost
DEFAULT_DB_ENGINE=django.db.backends.sqlite3
DEFAULT_DB_NAME={root}/db.sqlite3
"""

# What postgresql/restore.sh is for PostgreSQL. SQLite cannot refuse writes to others: freeze and
# thaw do nothing.
SQLITE = """\
import os, sqlite3, sys
act, other, live = sys.argv[1], (sys.argv[2:] or [""])[0], "{root}/db.sqlite3"
beside = other if other == ":memory:" else "{root}/" + other
if act == "dump":
    print(*sqlite3.connect(live).iterdump(), sep="\\n")
elif act == "load":
    dump = sys.stdin.read()
    assert dump.endswith("COMMIT;\\n"), "the dump has no end"
    sqlite3.connect(beside).executescript(dump)
elif act == "count":
    database = sqlite3.connect(beside if other else live)
    for name, in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        print(name, *database.execute(f'SELECT count(*) FROM "{{name}}"').fetchone())
elif act in ("swap", "back"):
    new, saved = (beside, beside + "_old") if act == "swap" else (beside + "_old", beside)
    if os.path.exists(new):
        os.link(live, saved)
        os.replace(new, live)
elif act == "drop":
    for path in (beside, beside + "_old"):
        if os.path.exists(path):
            os.unlink(path)
"""

MIGRATION = """\
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("formsApp", "0001_initial")]
    # db_default, not default: the release before does not know the column, and must insert rows
    operations = [
        migrations.AddField("form", "open", models.BooleanField(db_default=True)),
        migrations.AddField("response", "public", models.BooleanField(db_default=False)),
    ]
"""

CSRF = {"Cookie": f"csrftoken={32 * 'a'}", "X-CSRFToken": 32 * "a"}


class Missing(Exception):
    """Something that the sandbox needs is not on this machine."""


def find_python() -> tuple[str, tuple[int, int]]:
    """The Python for the sample: 3.12 or newer if there is one, else this one; and its version."""
    names = [sys.executable, "python3.13", "python3.12", "python3.14", "python3"]
    found = [path for name in names if (path := shutil.which(name))]
    found += map(
        str, sorted(Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python3"), reverse=True)
    )
    versions = {path: version for path in found if (version := python_version(path))}
    new = [path for path in versions if versions[path] >= (3, 12)]
    if not versions:
        raise Missing("this Python has no ensurepip: sudo apt-get install python3-venv")
    chosen = (new or list(versions))[0]
    return chosen, versions[chosen]


def python_version(path: str) -> tuple[int, int] | None:
    """The version of a Python that can make virtual environments, else None."""
    code = "import ensurepip, sys; print(*sys.version_info[:2])"
    done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    return tuple(map(int, done.stdout.split())) if done.returncode == 0 else None  # type: ignore[return-value]


def reserved_port() -> socket.socket:
    """A socket whose port of 127.0.0.1 the system gives to nobody else, but that can be listened on."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    return probe


@dataclass
class Client:
    """Asks a URL all the while, each time on a new connection, and keeps what it saw."""

    url: str
    pause: float = 0  # after each answer
    post: bytes | None = None  # what it sends, if it writes
    by_body: bool = False  # the whole answer tells the releases apart, else its header X-Release
    waits: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)  # that answered, as they were first seen

    def ask(self) -> None:
        """Ask once."""
        began = time.monotonic()
        try:
            request = urllib.request.Request(self.url, self.post, CSRF if self.post else {})
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read().decode()
                version = body if self.by_body else answer.headers.get("X-Release", "none")
        except OSError as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            time.sleep(0.01)
        else:
            if version not in self.releases:
                self.releases.append(version)
        self.waits.append(time.monotonic() - began)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Client]:
        """Ask all the while."""
        done = threading.Event()

        def work() -> None:
            while not done.wait(self.pause):
                self.ask()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            yield self
        finally:
            done.set()
            worker.join()


class Sandbox:
    """A remote, its author's clone, a checkout to deploy from, and the units of the service."""

    def __init__(self, quiet: bool = False) -> None:
        if not shutil.which("git"):
            raise Missing("git is not installed: sudo apt-get install git")
        self.quiet = quiet
        self.python, self.version = find_python()
        self.root = Path(tempfile.mkdtemp(prefix="sandbox-"))
        self.author, self.checkout = self.root / "author", self.root / "gforms"
        self.reserved = reserved_port()
        self.port = int(self.reserved.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/"
        self.systemd: Systemd | None = None

    def environment(self) -> dict[str, str]:
        """The environment of every command: the stand-ins and our own pipenv come first in PATH."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        for who in ("AUTHOR", "COMMITTER"):
            kept |= {f"GIT_{who}_NAME": "author", f"GIT_{who}_EMAIL": "author@example.com"}
        first = f"{PROJECT / 'tests' / 'standin'}:{self.root / 'tools' / 'bin'}"
        return kept | {
            "PATH": f"{first}:{kept.get('PATH', os.defpath)}",
            "STANDIN": str(self.root / "units" / "systemd"),
            "PIPENV_NOSPIN": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
        }

    def run(self, *command: str, folder: Path | None = None, **more: str) -> str:
        """Run a command that must succeed; its stdout."""
        done = subprocess.run(
            command,
            cwd=folder or self.author,
            env=self.environment() | more,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise Missing(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout.strip()

    def build(self) -> None:
        """Make everything but the first release."""
        self.tell("getting pipenv …")
        self.run(self.python, "-m", "venv", "tools", folder=self.root)
        self.run("tools/bin/pip", "install", "--quiet", PIPENV, folder=self.root)
        git = functools.partial(self.run, "git", folder=self.root)
        git("init", "--quiet", "--bare", "--initial-branch=main", "remote.git")
        git("clone", "--quiet", "remote.git", "author")
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(
            PROJECT / "tests" / "sample", self.author, dirs_exist_ok=True, ignore=unwanted
        )
        for folder in ("systemd", "nginx"):
            shutil.copytree(PROJECT / folder, self.author / folder)
        for name in ("deploy.py", "gunicorn.conf.py"):
            shutil.copy(PROJECT / name, self.author)
        self.edit("gunicorn.conf.py", "workers = 5", "workers = 2")
        self.edit("gunicorn.conf.py", '"/admin/login/"', '"/"')
        (self.root / "sqlite.py").write_text(SQLITE.format(root=self.root))
        ini = INI.format(python=self.python, root=self.root, port=self.port)
        (self.author / "deploy.ini").write_text(ini)
        if self.version < (3, 12):
            self.edit("Pipfile", "==6.0.2", f"=={DJANGO_OF_PYTHON_311}")
        self.tell("locking the packages of the sample …")
        self.lock()
        self.push("The first release")
        git("clone", "--quiet", "remote.git", "gforms")
        env = ENV.format(secret=secrets.token_urlsafe(50), root=self.root)
        (self.checkout / ".env").write_text(env)
        (self.checkout / ".env").chmod(0o600)
        self.start_socket()

    def start_socket(self) -> None:
        """Have the stand-in of systemd hold the socket, with the units of `setup`, on this port."""
        (self.root / "units").mkdir()
        site = deploy.Site(self.checkout / "deploy.ini")
        for file in deploy.files_to_place(site, timer=False):
            text = file.text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
            (self.root / "units" / file.path.name).write_text(text)
        self.systemd = Systemd(self.root / "units")

    def lock(self) -> None:
        """Make Pipfile.lock anew."""
        self.run(
            "pipenv",
            "lock",
            WORKON_HOME=str(self.root / "author-env"),
            PIPENV_VENV_IN_PROJECT="0",
            PIPENV_DEFAULT_PYTHON_VERSION=self.python,
            PIPENV_IGNORE_VIRTUALENVS="1",
        )

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text, which must be there, in a file of the author's clone."""
        path = self.author / name
        text = path.read_text()
        assert old in text, f"{old!r} is not in {name}"
        path.write_text(text.replace(old, new))

    def release(self, version: str, before: str) -> None:
        """Change what every page says of its release."""
        for name in ("version.py", "late.py"):
            self.edit(f"formsApp/{name}", f'VERSION = "{before}"', f'VERSION = "{version}"')

    def push(self, message: str) -> None:
        """Commit all, and push it."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)
        self.run("git", "push", "--quiet", "origin", "HEAD:main")

    def deploy(self, *arguments: str) -> tuple[int, str]:
        """Run deploy.py as its user would, before the reader's eyes; exit status and output."""
        self.tell(f"$ python3 deploy.py {' '.join(arguments)}".rstrip())
        lines = []
        # a terminal is shown as one sees it
        to = None if sys.stdout.isatty() and not self.quiet else subprocess.PIPE
        with subprocess.Popen(
            [sys.executable, "deploy.py", *arguments],
            cwd=self.checkout,
            env=self.environment(),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=to,
            stderr=subprocess.STDOUT,
        ) as process:
            for line in process.stdout or ():
                lines.append(line)
                self.tell(line.rstrip("\n"))
        self.tell(f"(exit status {process.returncode})\n")
        return process.returncode, "".join(lines)

    def writer(self, pause: float = 0) -> Client:
        """A client who answers a form all the while, as a browser does."""
        with urllib.request.urlopen(f"{self.url}ping/", timeout=60) as answer:
            answer.read()  # makes the form, and its first answer
        return Client(f"{self.url}forms/ping/", pause, b"text=an+answer")

    def answers(self) -> int:
        """How many answers the database has."""
        with contextlib.closing(sqlite3.connect(self.root / "db.sqlite3")) as database:
            return int(database.execute('SELECT count(*) FROM "formsApp_response"').fetchone()[0])

    def tell(self, text: str) -> None:
        """Print a line, unless this is a test."""
        if not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        """End the service and remove the folder."""
        if self.systemd:
            self.systemd.close()
        self.reserved.close()
        shutil.rmtree(self.root)

    # -- the five acts

    def act_one(self) -> tuple[int, str]:
        """Deploy for the first time."""
        return self.deploy()

    def act_two(self) -> tuple[int, str]:
        """A new package, a migration and a new page."""
        self.release("2", "1")
        self.edit("Pipfile", "[packages]\n", '[packages]\nwhitenoise = "*"\n')
        security = '    "django.middleware.security.SecurityMiddleware",\n'
        whitenoise = '    "whitenoise.middleware.WhiteNoiseMiddleware",\n'
        self.edit("forms/settings.py", security, security + whitenoise)
        (self.author / "formsApp/migrations/0002_form_open.py").write_text(MIGRATION)
        for before, name, default in (
            ("    description = models.TextField(blank=True)\n", "open", True),
            ("    text = models.TextField()\n", "public", False),
        ):
            more = f"    {name} = models.BooleanField(db_default={default})\n"
            self.edit("formsApp/models.py", before, before + more)
        about = '    path("about/", views.index, name="about"),\n'
        self.edit("formsApp/urls.py", "urlpatterns = [\n", f"urlpatterns = [\n{about}")
        self.lock()
        self.push("Serve the static files, close forms, and tell what this is")
        return self.deploy()

    def act_three(self) -> tuple[int, str]:
        """A commit that cannot be imported."""
        self.release("3", "2")
        self.edit("forms/urls.py", "urlpatterns", "import no_such_module\n\nurlpatterns")
        self.push("Use a module that is not there")
        return self.deploy()

    def act_four(self) -> tuple[int, str]:
        """A commit that starts and answers 500."""
        self.release("4", "3")
        self.edit("forms/urls.py", "import no_such_module\n\nurlpatterns", "urlpatterns")
        self.edit("formsApp/views.py", '(request, "formsApp/index.html"', '(request, "no.html"')
        self.push("Use a template that is not there")
        return self.deploy()

    def act_five(self) -> tuple[int, str]:
        """Go back by hand."""
        return self.deploy("rollback", "--no-freeze")


def play(sandbox: Sandbox, keep: bool) -> int:
    """Play the acts before the reader's eyes; 0 if all went as it should."""
    sandbox.build()
    sandbox.tell("\n== 1 == Deploy for the first time.\n")
    statuses = [sandbox.act_one()[0]]
    client, writer = Client(sandbox.url), sandbox.writer(0.02)
    acts = (sandbox.act_two, sandbox.act_three, sandbox.act_four, sandbox.act_five)
    with client.at_work(), writer.at_work():
        for number, act in enumerate(acts, start=2):
            sandbox.tell(f"== {number} == {act.__doc__}\n")
            statuses.append(act()[0])
    sandbox.deploy("history")
    lost = len(client.errors) + len(writer.errors)
    kept = sandbox.answers() - 1 == len(writer.waits) - len(writer.errors)
    sandbox.tell(
        f"All the while a client asked for {sandbox.url}, and another answered a form: "
        f"{len(client.waits)} and {len(writer.waits)} requests, {lost} lost, longest wait "
        f"{max(client.waits + writer.waits):.2f} s; each answer that was accepted is "
        f"{'' if kept else 'NOT '}in the database; "
        f"releases that answered: {' and '.join(client.releases)}."
    )
    good = statuses == [0, 0, 1, 1, 0] and not lost and kept and client.releases == ["1", "2"]
    sandbox.tell("All of it went as it should." if good else "THIS IS NOT AS IT SHOULD BE.")
    if keep:
        sandbox.tell(
            f"The site is at {sandbox.url}, the checkout in {sandbox.checkout}; Ctrl-C ends."
        )
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0 if good else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Play the sandbox; the exit status."""
    about = "Watch real deployments of a sample project, in a temporary folder."
    parser = argparse.ArgumentParser(description=about)
    keep = "leave the site running at the end, until Ctrl-C"
    parser.add_argument("--keep", action="store_true", help=keep)
    options = parser.parse_args(argv)
    try:
        with contextlib.closing(Sandbox()) as sandbox:
            return play(sandbox, options.keep)
    except Missing as missing:
        print(missing)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
