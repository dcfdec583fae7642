"""A throwaway server in a folder, for testing deploy.py in fractions of a second.

Real git, a real HTTP server and real processes; the application is a few lines of Python whose behaviour is read from
files of its repository, so that a commit can be made that fails in any way:

    app        the text that every page holds
    health     the HTTP status of every page
    boot       `broken` when the application cannot be imported
    migrations the names of its migrations, one a line; one that contains `bad` fails
    static     `broken` when collectstatic fails

What stands in for gunicorn's service is one process outside of the releases that asks `serving` for the release that
it serves, and `restart` is the command that writes it there.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent

MANAGE = '''
import os, pathlib, sys
applied = pathlib.Path(os.environ["LAB"]) / "database"
done = applied.read_text().split() if applied.exists() else []
wanted = pathlib.Path("migrations").read_text().split()
if sys.argv[1] == "collectstatic":
    if pathlib.Path("static").read_text().strip() == "broken":
        sys.exit("the static files are broken")
    pathlib.Path("staticfiles").mkdir(exist_ok=True)
    pathlib.Path("staticfiles/style.css").write_text(pathlib.Path("app").read_text())
elif "--plan" in sys.argv:
    print("Planned operations:")
    for name in wanted:
        if name not in done:
            print(name)
            print("    Create model X")
else:
    for name in wanted:
        if name in done:
            continue
        if "bad" in name:
            sys.exit(f"{name} cannot be applied")
        done.append(name)
        applied.write_text("\\n".join(done))
        print(f"  Applying {name}... OK")
'''

CANDIDATE = '''#!{python}
import http.server, pathlib, socketserver, sys
if pathlib.Path("boot").read_text().strip() == "broken":
    sys.exit("ImportError: cannot import the application")

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(pathlib.Path("health").read_text()))
        self.end_headers()
        self.wfile.write(pathlib.Path("app").read_bytes())
    def address_string(self):
        return "-"

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
Server(sys.argv[1], Page).serve_forever()
'''

PIPENV = '''#!{python}
import os, pathlib, sys
venv = pathlib.Path(os.environ["WORKON_HOME"]) / os.environ["PIPENV_CUSTOM_VENV_NAME"]
(venv / "bin").mkdir(parents=True)
os.symlink(sys.executable, venv / "bin" / "python")
print("installed by", sys.argv)
'''

RESTART = '''#!{python}
import os, pathlib
pathlib.Path(os.environ["LAB"], "serving").write_text(os.path.realpath(os.environ["LAB"] + "/checkout/.deploy/current"))
'''

INI = """
[deploy]
shared = .env media/
[pull]
retries = 0
[install]
retries = 0
[services]
command = true services
[backup]
command = echo the whole database
[restart]
candidate = candidate {{socket}}
command = restart
timeout = 20
[health]
url = http://127.0.0.1:{port}/
headers =
deadline = 3
timeout = 2
"""


class Site:
    """What serves the live site: one HTTP server that answers as the release in `serving` would."""

    def __init__(self, lab: Path) -> None:
        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    release = Path((lab / "serving").read_text())
                    status, text = int((release / "health").read_text()), (release / "app").read_bytes()
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Lab:
    """A remote, its author's clone, the server's checkout, and the site."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="lab-"))
        self.remote, self.author, self.checkout = (self.root / each for each in ("remote", "author", "checkout"))
        self.workspace = self.checkout / ".deploy"
        self.site = Site(self.root)
        self.bin = self.root / "bin"
        self.bin.mkdir()
        for name, text in (("candidate", CANDIDATE), ("pipenv", PIPENV), ("restart", RESTART)):
            self.script(name, text.replace("{python}", sys.executable))
        self.git("init", "--quiet", "--bare", "--initial-branch=main", str(self.remote), folder=self.root)
        self.git("clone", "--quiet", str(self.remote), str(self.author), folder=self.root)
        shutil.copy(PROJECT / "deploy.py", self.author)
        lock = json.dumps({"_meta": {"requires": {}}, "default": {}})
        self.push({"app": "one", "health": "200", "boot": "", "static": "", "migrations": "app.0001_first\n",
                   "manage.py": MANAGE, "Pipfile": "", "Pipfile.lock": lock,
                   "deploy.ini": INI.format(port=self.site.port)}, "the first")
        self.git("clone", "--quiet", str(self.remote), str(self.checkout), folder=self.root)
        self.env("SECRET_KEY='a $ecret = value # of 1'\nDEBUG=False\n")

    def script(self, name: str, text: str) -> None:
        """An executable in the PATH of every deployment."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def env(self, text: str) -> None:
        (self.checkout / ".env").write_text(text)
        (self.checkout / ".env").chmod(0o600)

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "DEPLOY_"))}
        identity = {f"GIT_{who}_{what}": "x@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        return kept | identity | {"LAB": str(self.root), "PATH": f"{self.bin}:{kept['PATH']}",
                                  "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

    def git(self, *arguments: str, folder: Path | None = None) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder or self.author, env=self.environment(), text=True,
                              capture_output=True, check=True)
        return done.stdout.strip()

    def push(self, files: dict[str, str | None], message: str = "a change") -> str:
        """Commit the files (None: removed) and push; the short revision."""
        for name, text in files.items():
            path = self.author / name
            if text is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)
        self.git("push", "--quiet", "origin", "HEAD:main")
        return self.git("rev-parse", "--short=7", "HEAD")

    def setting(self, section: str, key: str, value: str) -> None:
        """Change the server's own settings file: [section] key, without a commit."""
        path = self.checkout / "deploy.ini"
        path.write_text(path.read_text() + f"[{section}]\n{key} = {value}\n")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "deploy.py", *arguments], cwd=self.checkout, env=self.environment() | variables, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def deploy(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run deploy.py in the checkout, as a user would."""
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, "")

    def live(self) -> str:
        """What the site says now."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.site.port}/", timeout=5) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return f"{error.code}"

    def current(self) -> str:
        """The text of the release that `current` points to."""
        return (self.workspace / "current" / "app").read_text()

    def history(self) -> list[dict[str, Any]]:
        path = self.workspace / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def releases(self) -> list[str]:
        return sorted(path.name for path in (self.workspace / "releases").iterdir())

    def close(self) -> None:
        self.site.close()
        shutil.rmtree(self.root)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Poll until the condition holds; its value."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.01)
    return found


class LabTest(unittest.TestCase):
    """A test with a lab of its own, in which the first release is live."""

    deployed = True

    def setUp(self) -> None:
        self.lab = Lab()
        self.addCleanup(self.lab.close)
        if self.deployed:
            self.assert_deployed(self.lab.deploy(), "one")

    def assert_deployed(self, run: subprocess.CompletedProcess[str], text: str) -> None:
        self.assertEqual(run.returncode, 0, run.stdout)
        self.assert_live(text)

    def assert_live(self, text: str) -> None:
        """One release is live: what answers and what `current` says are the same."""
        self.assertEqual((self.lab.live(), self.lab.current()), (text, text))

    @contextlib.contextmanager
    def no_trace(self) -> Iterator[None]:
        """What runs in here leaves no release behind."""
        before = self.lab.releases()
        yield
        self.assertEqual(self.lab.releases(), before)
