"""A throwaway server in a folder, for testing deploy.py in fractions of a second.

Real git, a real HTTP server and real processes; the application is a few lines of Python whose behaviour is read from
files of its repository, so that a commit can be made that fails in any way:

    app        the text that every page holds
    health     the HTTP status of every page
    broken     the paths that answer 500
    boot       `broken` when the application cannot be imported
    static     `broken` when collectstatic fails
    folders    STATIC_URL, STATIC_ROOT and MEDIA_ROOT as a list in JSON, when they are not the usual ones
    migrations the names of its migrations, one a line, with =names for those that one replaces; one with `bad` in it
               fails, one with `block` in it blocks, one with `fixed` in it cannot be reversed, one with `remove` in it
               removes a column, one with `plain` in it is not atomic, one with `unrehearsed` in it fails in a rehearsal

Files of the lab itself steer the rest:

    database   the names of the migrations that were applied
    facts      what Django says of its database, as JSON, where that is not the usual
    bin/       the commands of every deployment: pipenv, services, gunicorn, restart, proxy, dump, database (what
               postgresql/restore.sh is on a server; the database takes no writes with `frozen`), and `block NAME`,
               which says that it runs with the file `blocked-NAME`, and ends when that file is removed
    serving    the release that the live site serves; `restart` writes it
    sick       the texts for which the live site answers 500
    hold       `site` or `candidate`: whose answers block, as `block site` would
    asked      the paths that were asked of candidates

A test finds its lab at the same place as the test before it, a fresh copy of one that was made once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from deploy import Entry, History

PROJECT = Path(__file__).resolve().parent.parent
Run = subprocess.CompletedProcess[str]

MANAGE = """
import json, os, socket, sys, time
lab, code = os.environ["LAB"], sys.stdin.read() if sys.argv[1] == "shell" else ""
last = code.strip().rpartition("\\n")[2]
call = os.environ["CALL"] = last.partition(";")[0]  # as in reverse_migrations(['app.0002_x'], 2000)
names = {"list_migrations": "plan", "reverse_migrations": "reverse", "migrate_in_django": "migrate",
         "list_settings": "folders"}
command = sys.argv[1] if not call else names.get(call.partition("(")[0], "rehearse")
undo = call.split("'")[1::2]
def booted(path):
    with socket.socket(socket.AF_UNIX) as probe:
        for _ in range(100):
            if probe.connect_ex(path) == 0:
                return True
            time.sleep(0.02)
    return False
read = lambda path: open(path).read() if os.path.exists(path) else ""
replaces = dict(each.partition("=")[::2] for each in read("migrations").split())
replaces = {name: each.split(",") if each else [] for name, each in replaces.items()}
wanted, recorded = list(replaces), read(f"{lab}/database").split()
done = recorded + [name for name in wanted if replaces[name] and name not in recorded
                   and set(replaces[name]) <= set(recorded)]
during = "collectstatic" if "collectstatic" in call else command
if os.path.exists(f"{lab}/bin/during-{during}"):
    os.system(f"during-{during}") and sys.exit(f"{during} cannot be done")
if command == "collectstatic" or "collectstatic" in call:
    if read("static").strip() == "broken":
        sys.exit("the static files are broken")
    os.mkdir("staticfiles")
    open("staticfiles/style.css", "w").write(read("app"))
if command == "collectstatic":
    pass
elif command == "folders":
    told = json.loads(read("folders") or json.dumps(["/static/", os.path.abspath("staticfiles"), ""]))
    print(json.dumps([*told, read("debug").strip()]))
elif command == "plan":
    assert "json.dumps" in code
    print("Planned operations:")
    known = [{"name": name, "applied": name in done, "reversible": "fixed" not in name, "atomic": "plain" not in name,
              "replaces": replaces[name], "incompatible": ["Remove field x from y"] * ("remove" in name)}
             for name in wanted]
    settled = "[['migrate'" in call and all(each["applied"] for each in known) and booted(call.split("'")[-2])
    if settled and os.path.exists(f"{lab}/bin/during-migrate"):
        settled = not os.system("during-migrate")
    if settled:
        open(f"{lab}/database", "w").write("\\n".join(dict.fromkeys(done)))
    facts = {"vendor": "postgresql", "file": "", "identity": "", "lock_timeout": "2s", "invalid": [], "others": [],
             "settled": settled, "recorded": done}
    print(json.dumps(facts | {"migrations": known} | json.loads(read(f"{lab}/facts") or "{}")))
elif command == "rehearse":
    if any("unrehearsed" in name for name in wanted):
        sys.exit("it cannot be applied to these data")
    print(json.dumps([["table", 4.0], ["another", 0.1]]))
elif command == "reverse":
    for name in reversed([name for name in wanted if name in undo and name in done]):
        done = [each for each in done if each not in (name, *replaces[name])]
        open(f"{lab}/database", "w").write("\\n".join(done))
        print(f"  Unapplied {name}", flush=True)
        if os.path.exists(f"{lab}/bin/after-reverse"):
            os.system(f"after-reverse {name}") and sys.exit(f"{name} cannot be reversed")
elif command == "migrate":
    open(f"{lab}/database", "w").write("\\n".join(dict.fromkeys(done)))
    for name in wanted:
        if name in done:
            continue
        if "bad" in name:
            sys.exit(f"{name} cannot be applied")
        if "block" in name:
            os.system("block migrate")
        done.append(name)
        open(f"{lab}/database", "w").write("\\n".join(done))
        print(f"  Applying {name}... OK", flush=True)
else:
    print(sys.argv[1:], os.getcwd(), os.environ["SECRET_KEY"])
    sys.exit(7)
"""

CANDIDATE = """#!{python} -IS
import os, socket, sys, threading, time
lab = os.environ["LAB"]
read = lambda path: open(path).read().strip() if os.path.exists(path) else ""
if read("boot") == "broken":
    sys.exit("ImportError: cannot import the application")

def answer(connection):
    if request := connection.recv(65536).decode():
        path = request.split(" ")[1]
        with open(f"{lab}/asked", "a") as asked:
            asked.write(f"{path}\\n")
        if read(f"{lab}/hold") == "candidate":
            open(f"{lab}/blocked-candidate", "w").close()
            while os.path.exists(f"{lab}/blocked-candidate"):
                time.sleep(0.02)
        number = "500" if path in read("broken").split() else read("health")
        status = number + (" OK" if number == "200" else " Internal Server Error")
        connection.sendall(f"HTTP/1.1 {status}\\r\\nConnection: close\\r\\n\\r\\n{read('app')}".encode())
    connection.close()

server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("booted", flush=True)
while True:
    threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
"""

BLOCK = """#!{python} -IS
import os, sys, time
file = os.environ["LAB"] + "/blocked-" + sys.argv[1]
open(file, "w").close()
while os.path.exists(file):
    time.sleep(0.02)
"""

PIPENV = """#!/bin/sh -e
[ "$1" != verify ] || exit 0
mkdir "$WORKON_HOME/$PIPENV_CUSTOM_VENV_NAME" "$WORKON_HOME/$PIPENV_CUSTOM_VENV_NAME/bin"
cp "$LAB/python" "$WORKON_HOME/$PIPENV_CUSTOM_VENV_NAME/bin/python"
echo "installed by $*"
"""

RESTART = """#!/bin/sh -e
readlink -f "$LAB/checkout/.deploy/current" > "$LAB/serving.new"
mv "$LAB/serving.new" "$LAB/serving"
"""

DATABASE = """#!/bin/sh -e
cd "$LAB"
case $1 in
freeze) touch frozen;;
load) cat > "database-$2";;
count) sed "s/$/ 1/" "database${2:+-$2}";;
swap) [ ! -e "database-$2" ] || { ln -f database "database-$2_old"; mv "database-$2" database; };;
back) [ ! -e "database-$2_old" ] || { ln -f database "database-$2"; mv "database-$2_old" database; };;
thaw) rm -f frozen;;
drop) rm -f "database-$2" "database-$2_old";;
esac
"""

# what follows it, and a }, a script does only once
ONCE = '[ -e "$LAB/was-blocked" ] || { touch "$LAB/was-blocked";'
NOTHING = "#!/bin/sh\n"
UPGRADES = """#!/bin/sh
echo 'APT::Periodic::Unattended-Upgrade "1";'
"""
SCRIPTS = {
    "gunicorn": CANDIDATE,
    "block": BLOCK,
    "pipenv": PIPENV,
    "../python": '#!/bin/sh -e\nexec {python} -IS "$@"',  # -IS: without what makes it start slowly
    "restart": RESTART,
    "services": NOTHING,
    "proxy": NOTHING,
    "ss": NOTHING,
    "apt-config": UPGRADES,
    "dump": '#!/bin/sh -e\ncat "$LAB/database"',
    "database": DATABASE,
}

INI = """
[deploy]
shared = .env media/
[pull]
retries = 0
[services]
command = services up
[backup]
command = echo the whole database
verify = grep --quiet .
[restore]
command = database {{act}} {{database}}
[restart]
candidate = gunicorn {{socket}}
command = restart
main_process =
proxy = proxy
timeout = 20
[status]
checks =
    app: echo at work
[check]
command =
[health]
url = http://127.0.0.1:{port}/
headers =
deadline = 0.5
timeout = 10
rehearse = 0
[notify]
journal =
"""


@cache
def home() -> Path:
    """Where the labs of this process lie: `lab`, and the copies of it that were kept."""
    folder = Path(tempfile.mkdtemp(prefix="lab-")).resolve()
    atexit.register(shutil.rmtree, folder)
    return folder


@cache
def site_port() -> int:
    """The port of the live site, which answers as the release in `serving` would."""
    lab = home() / "lab"

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                if words(lab / "hold") == ["site"]:
                    block(lab / "blocked-site")
                release = Path((lab / "serving").read_text().strip())
                status, text = int((release / "health").read_text()), (release / "app").read_text()
                sick = text in words(lab / "sick") or self.path in words(release / "broken")
                self.send_response(500 if sick else status)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    atexit.register(server.server_close)
    return int(server.server_address[1])


def words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def block(file: Path) -> None:
    file.touch()
    wait_for(lambda: not file.exists(), f"{file} is removed")


class Lab:
    """The author's repository, the server's clone of it, and the site, with releases of these texts deployed."""

    def __init__(self, deployed: Sequence[str] = ("one",)) -> None:
        self.root = home() / "lab"
        self.author, self.checkout = self.root / "author", self.root / "checkout"
        self.workspace, self.bin = self.checkout / ".deploy", self.root / "bin"
        self.processes: list[subprocess.Popen[str]] = []
        kept = home() / "-".join(("kept", *deployed))
        if kept.exists():
            shutil.copytree(kept, self.root, symlinks=True)
            return
        try:
            self.make()
            for text in deployed:
                self.push({"app": text}, f"says {text}")
                run = self.deploy()
                assert run.returncode == 0, run.stdout
                self.tick()
        except BaseException:
            self.close()
            raise
        shutil.copytree(self.root, kept, symlinks=True, ignore=shutil.ignore_patterns("*.sock"))

    def make(self) -> None:
        (self.root / "home").mkdir(parents=True)
        (self.root / "home" / ".gitconfig").write_text(
            '[user]\nname = x\nemail = x@example.com\n[protocol "file"]\nallow = always\n'
        )
        self.bin.mkdir()
        for name, text in SCRIPTS.items():
            self.script(name, text.replace("{python}", sys.executable))
        self.git(
            *["init", "--quiet", "--initial-branch=main", "--template=", "author"], folder=self.root
        )
        shutil.copy(PROJECT / "deploy.py", self.author)
        lock = json.dumps({"_meta": {"requires": {}}, "default": {}})
        self.push(
            {
                "app": "one",
                "health": "200",
                "boot": "",
                "static": "",
                "migrations": "app.0001_first\n",
                "manage.py": MANAGE,
                "Pipfile": "",
                "Pipfile.lock": lock,
                ".gitignore": ".env\nmedia/\n*.local\n",
                "deploy.ini": INI.format(port=site_port()),
            },
            "the first",
        )
        self.git("clone", "--quiet", "--template=", "author", "checkout", folder=self.root)
        self.env("SECRET_KEY='a $ecret = value # of 1'\nDEBUG=False\n")

    # ------------------------------------------------------------------------------------------------- making changes

    def script(self, name: str, text: str) -> None:
        """A command in the PATH of every deployment; a shell script when the text names no interpreter."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text if text.startswith("#!") else f"#!/bin/sh -e\n{text}\n")
        path.chmod(0o755)

    def first(self, name: str, text: str) -> None:
        """Have a command do this before what it does."""
        interpreter, rest = (self.bin / name).read_text().split("\n", 1)
        self.script(name, f"{interpreter}\n{text}\n{rest}")

    def block_git(self, command: str, when: str = "true") -> None:
        """Have `git COMMAND` block before it begins, as `block pull` would; once, and only if `when` holds."""
        self.script(
            "git",
            f'''case " $* " in *" {command} "*)
            if [ ! -e "$LAB/was-blocked" ] && {when}; then touch "$LAB/was-blocked"; block pull; fi;; esac
            exec {shutil.which("git")} "$@"''',
        )

    def env(self, text: str) -> None:
        (self.checkout / ".env").write_text(text)
        (self.checkout / ".env").chmod(0o600)

    def environment(self) -> dict[str, str]:
        ours = {"LAB": str(self.root), "HOME": str(self.root / "home")}
        ours["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        return {
            name: value
            for name, value in (os.environ | ours).items()
            if not name.startswith(("GIT_", "DEPLOY_"))
        }

    def git(self, *arguments: str, folder: Path | None = None) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder or self.author,
            env=self.environment(),
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def push(
        self, files: Mapping[str, str | None], message: str = "a change", folder: Path | None = None
    ) -> str:
        """Commit the files (None: removed) in the author's repository, or elsewhere; the full hash."""
        place = folder or self.author
        for name, text in files.items():
            path = place / name
            if text is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        self.git("add", "--all", folder=place)
        self.git("commit", "--quiet", "--allow-empty", "--message", message, folder=place)
        return self.git("rev-parse", "HEAD", folder=place)

    def setting(self, section: str, key: str, value: str) -> None:
        """Change [section] key in the settings of the next push, and deploy nothing yet."""
        ini = (self.author / "deploy.ini").read_text()
        self.push({"deploy.ini": with_setting(ini, section, key, value)})
        self.git("pull", "--quiet", folder=self.checkout)

    # --------------------------------------------------------------------------------------------------------- running

    def start(self, *arguments: str, before: str = "", **variables: str) -> subprocess.Popen[str]:
        """Start deploy.py in the checkout, in a session of its own, as a shell does that ran something before."""
        shell = ["sh", "-c", f'{before}\nexec "$@"', "sh"] if before else []
        command = [*shell, sys.executable, "-S", str(self.checkout / "deploy.py"), *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.checkout,
            env=self.environment() | variables,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    @staticmethod
    def end(process: subprocess.Popen[str], seconds: float = 60) -> Run:
        """Wait for the end of what was started; its status and all that it said."""
        output, _ = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(process.args, process.returncode, output, "")

    def deploy(self, *arguments: str, **variables: str) -> Run:
        """Run deploy.py in the checkout, as a user would."""
        return self.end(self.start(*arguments, **variables))

    def blocked(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        """Start deploy.py and wait until its command `block NAME` runs."""
        process = self.start(*arguments)
        self.await_blocked(name, process)
        return process

    def await_blocked(self, name: str, process: subprocess.Popen[str]) -> None:
        """Wait until `block NAME` runs."""
        wait_for(
            lambda: (self.root / f"blocked-{name}").exists() or process.poll() is not None,
            f"{name} blocks",
        )
        assert process.poll() is None, self.end(process).stdout

    def unblock(self, name: str) -> None:
        """Let `block NAME` end."""
        (self.root / f"blocked-{name}").unlink()

    def await_waiting(self, process: subprocess.Popen[str]) -> None:
        """Wait until a deploy.py has opened the lock that another one holds."""
        folder, lock = Path(f"/proc/{process.pid}/fd"), self.checkout / ".git"
        wait_for(
            lambda: any(link.is_symlink() and link.readlink() == lock for link in folder.iterdir()),
            "it waits",
        )
        assert process.poll() is None, self.end(process).stdout

    def kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL to the deployer alone."""
        process.kill()
        process.wait()

    def await_commands(self) -> None:
        """Wait until the commands that a killed deployer left have ended; a candidate never does."""
        wait_for(
            lambda: not [each for each in self.running().values() if "gunicorn" not in each],
            "the commands of the killed run have ended",
        )

    def kill_all(self) -> None:
        """SIGKILL to all that a killed deployer left running, as a power cut would."""
        for number in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        wait_for(lambda: not self.running(), "all was killed")

    def tick(self) -> None:
        """Wait for the next second, so that the next run is named after another one."""
        now = int(time.time())
        wait_for(lambda: int(time.time()) > now, "the next second")

    # --------------------------------------------------------------------------------------------------------- looking

    def live(self) -> str:
        """What the site says now."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{site_port()}/", timeout=20) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return f"{error.code}"
        except OSError:
            return "no answer"

    def linked(self, name: str) -> str:
        """The release that `current` or `previous` points to; nothing when there is no such link."""
        link = self.workspace / name
        return (self.workspace / os.readlink(link)).name if link.is_symlink() else ""

    def current(self) -> str:
        """The text of the release that `current` points to."""
        return (self.workspace / "current" / "app").read_text()

    def head(self) -> str:
        """The revision of the checkout."""
        return self.git("rev-parse", "HEAD", folder=self.checkout)

    def history(self) -> list[dict[str, Any]]:
        path = self.workspace / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def entries(self) -> list[Entry]:
        """The lines of the history that are whole."""
        return History(self.workspace / "history.jsonl").entries()

    def results(self) -> list[str]:
        return [entry.result for entry in self.entries()]

    def log(self) -> str:
        """The log of the newest run."""
        return max((self.workspace / "logs").iterdir()).read_text()

    def releases(self) -> list[str]:
        """The texts of the releases that are there, oldest first."""
        return [
            (path / "app").read_text() for path in sorted((self.workspace / "releases").iterdir())
        ]

    def left_over(self) -> set[str]:
        """The releases that were never live and healthy, or of which either git or the tool knows nothing."""
        good = {entry.release for entry in self.entries() if entry.result == "live"}
        there = {path.name for path in (self.workspace / "releases").iterdir()}
        trees = self.git("worktree", "list", "--porcelain", folder=self.checkout).split("\n\n")
        known = {Path(tree.split()[1]).name for tree in trees} - {"checkout"}
        return (there - good) | (there ^ known)

    def running(self) -> dict[int, str]:
        """Every process that this lab started, or that those started: number and command."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"LAB={self.root}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    command = (process / "cmdline").read_bytes()
                    found[int(process.name)] = command.replace(b"\0", b" ").decode()
        return found

    def close(self) -> None:
        """End what still runs, which is an error, and remove the folder."""
        for process in self.processes:
            self.kill(process)
            assert process.stdout
            process.stdout.close()
        for file in self.root.glob("blocked-*"):
            file.unlink()
        try:
            wait_for(lambda: not self.running(), lambda: f"all has ended: {self.running()}", 10)
        finally:
            self.kill_all()
            shutil.rmtree(self.root)


def with_setting(ini: str, section: str, key: str, value: str) -> str:
    """The settings file with [section] key set to another value."""
    lines, inside = [], False
    for line in ini.strip().splitlines():
        inside = line == f"[{section}]" if line.startswith("[") else inside
        if not (inside and line.startswith(f"{key} =")):
            lines.append(line)
    if f"[{section}]" not in lines:
        lines.append(f"[{section}]")
    lines.insert(lines.index(f"[{section}]") + 1, f"{key} = {value}")
    return "\n".join(lines) + "\n"


def wait_for(
    condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 30
) -> Any:
    """Poll until the condition holds; its value."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            said = what if isinstance(what, str) else what()
            raise AssertionError(f"after {seconds:g} s still not: {said}")
        time.sleep(0.01)
    return found


def listing(*folders: Path) -> dict[str, tuple[int, ...]]:
    """Every path below the folders with its kind, rights, size and time of change."""
    found: dict[str, tuple[int, ...]] = {}
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            state = path.lstat()
            found[str(path)] = (state.st_mode, state.st_size, state.st_mtime_ns, state.st_ino)
    return found


class LabTest(unittest.TestCase):
    """A test with a lab of its own, in which these releases were deployed."""

    deployed: tuple[str, ...] = ("one",)

    def setUp(self) -> None:
        self.lab = Lab(self.deployed)
        self.addCleanup(self.lab.close)

    def assert_status(self, run: Run, status: int) -> None:
        self.assertEqual(run.returncode, status, run.stdout)
        self.assertNotIn("Traceback", run.stdout)

    def assert_live(self, text: str) -> None:
        """One release is live: what answers and what `current` says are the same."""
        self.assertEqual((self.lab.live(), self.lab.current()), (text, text))

    def assert_deployed(self, run: Run, text: str) -> None:
        self.assert_status(run, 0)
        self.assert_live(text)
        self.assertEqual(self.lab.history()[-1]["result"], "live")

    def assert_sentence(self, run: Run, status: int, parts: Iterable[str]) -> None:
        """It failed with this status, and its last line is a sentence with these parts."""
        self.assert_status(run, status)
        sentence = (run.stdout.splitlines() or [""])[-1]
        self.assertRegex(sentence, r"^\w+ +FAILED: [^;]+; .+")
        for part in parts:
            self.assertIn(part, sentence)

    def assert_failed(
        self, run: Run, *parts: str, status: int = 1, result: str = "failed", live: str = "one"
    ) -> None:
        """It failed with a sentence, `live` is as live as before, and nothing but the log is left of what failed."""
        self.assert_live(live)
        name, entry = self.lab.linked("current"), self.lab.history()[-1]
        self.assert_sentence(run, status, [*parts, f"{name} is live and healthy"])
        self.assertEqual((entry["result"], entry["live"]), (result, name))
        self.assertIn(entry["message"], run.stdout.splitlines()[-1])
        log = self.lab.workspace / "logs" / f"{entry['started']}.log"
        self.assertIn(run.stdout.splitlines()[-1], log.read_text())
        self.assert_only_good_releases()

    def assert_only_good_releases(self) -> None:
        """Every release that is there was once live and healthy, git knows of no other, and no command runs on."""
        self.assertEqual(self.lab.left_over(), set())
        wait_for(lambda: not self.lab.running(), lambda: f"all has ended: {self.lab.running()}", 10)

    @contextlib.contextmanager
    def nothing_touched(self) -> Iterator[None]:
        """The checkout and what is live are afterwards as before."""

        def state() -> object:
            files = [path for path in self.lab.checkout.iterdir() if path.is_file()]
            links = self.lab.linked("current"), self.lab.linked("previous")
            texts = {path.name: path.read_bytes() for path in files}
            return self.lab.head(), texts, links, self.lab.releases()

        before = state()
        yield
        self.assertEqual(state(), before)
