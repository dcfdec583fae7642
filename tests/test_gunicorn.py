"""gunicorn as gunicorn.conf.py has it serve: the oldest that is supported, one without a control socket, the newest."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path

import deploy
from tests.lab import wait_for
from tests.must_run import skip
from tests.sandbox import DJANGO_OF_PYTHON_311

PROJECT = Path(deploy.__file__).parent
VERSIONS = {"20.1": "==20.1.0", "25.0": "==25.0.3", "newest": ""}
PATIENCE = 30.0  # seconds
TOOLS = Path()  # the folder of all that is installed

WSGI = """\
from django.conf import settings
from django.core.wsgi import get_wsgi_application
settings.configure(ROOT_URLCONF="forms.urls", ALLOWED_HOSTS=["*"], SECRET_KEY="none")
application = get_wsgi_application()
"""
# Who loaded the URLs, and whose child answers: the same process, when no worker had to. And whether the worker
# was warmed up, and need not go through what was loaded when it ends.
URLS = """\
import gc, os
from django.http import HttpResponse
from django.urls import include, path
LOADED_BY, ASKED = os.getpid(), []
def login(request):
    if request.get_host() == "gforms.example.com":
        ASKED.append(os.getpid())
    return HttpResponse()
urlpatterns = [
    path("", lambda request: HttpResponse(f"{LOADED_BY} {os.getppid()} {ASKED == [os.getpid()]} {gc.get_freeze_count() > 1000}")),
    path("admin/login/", login),
    path("more/", include("forms.more")),
]
"""
# One of the first workers does not boot before the file `go` is there; each says when it has. gunicorn's own rest
# between two forks is a minute; `restless` is there if one that replaces another is forked without.
SLOWLY = """
import time
import gunicorn.arbiter
shipped, slow = post_worker_init, int(os.environ.get("SLOW", 3))
gunicorn.arbiter.random = type("Rests", (), {"random": lambda: 600})
def post_fork(server, worker):
    if worker.age > 3 and "spawn_workers" in vars(server):
        Path("restless").touch()
    while worker.age == slow and not Path("go").exists():
        Path("waits").touch()
        time.sleep(0.01)
def post_worker_init(worker):
    shipped(worker)
    booting = Path(f"booting-{worker.age}")
    booting.write_text(str(worker.pid))
    booting.rename(f"booted-{worker.age}")
"""
NEVER = """
def post_fork(server, worker):
    if worker.age == 3:
        raise ValueError("the third one is ill")
"""
# What an application has to do at its end, of which the last is what taking it apart would do.
ENDS = """
import atexit, threading, time
from pathlib import Path
def work():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    Path("thread").touch()
class Part:
    def __del__(self, touch=Path("apart").touch):
        touch()
part = Part()
atexit.register(lambda: (Path("atexit").touch(), print("the last words")))
def login_and_work(request, login=urlpatterns[1].callback):
    threading.Thread(target=work).start()
    return login(request)
urlpatterns[1] = path("admin/login/", login_and_work)
"""
TAKES = """
import os
del os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"]
"""


def setUpModule() -> None:
    """An environment with Django, and each gunicorn in a folder of its own."""
    global TOOLS
    TOOLS = Path(tempfile.mkdtemp(prefix="gunicorn-"))
    unittest.addModuleCleanup(shutil.rmtree, TOOLS)
    run(sys.executable, "-m", "venv", str(TOOLS / "env"))
    pip = [str(TOOLS / "env/bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, f"django=={DJANGO_OF_PYTHON_311}")
    for name, wanted in VERSIONS.items():
        # the oldest one imports pkg_resources
        run(*pip, "--target", str(TOOLS / name), f"gunicorn{wanted}", "setuptools<81")


def run(*command: str) -> None:
    """Run what makes the tools; skip the tests where it cannot be done."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        skip("sandbox", f"{shlex.join(command)}: {done.stdout}{done.stderr}")


class Systemd:
    """What a service tells its manager, on a socket of either kind."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0") if address[0] == "@" else address)

    def await_ready(self) -> None:
        """Wait until it says that it is ready."""
        self.socket.settimeout(PATIENCE)
        assert b"READY=1" in self.socket.recv(4096).split(b"\n")

    def heard(self) -> bool:
        """Whether it has said anything more."""
        self.socket.setblocking(False)
        try:
            return bool(self.socket.recv(4096))
        except BlockingIOError:
            return False


class Gunicorn:
    """A gunicorn in a release of a project in a folder, with the shipped settings and three workers."""

    def __init__(self, case: unittest.TestCase, version: str) -> None:
        self.case, self.version = case, version
        self.root = Path(tempfile.mkdtemp(prefix="gunicorn-"))
        case.addCleanup(shutil.rmtree, self.root)
        self.workspace = self.root / ".deploy"
        self.project = self.workspace / "releases" / "one" / "site"
        (self.project / "forms").mkdir(parents=True)
        for name, text in (("wsgi", WSGI), ("urls", URLS), ("more", "urlpatterns = []\n")):
            (self.project / "forms" / f"{name}.py").write_text(text)
        shipped = (PROJECT / "gunicorn.conf.py").read_text().replace("workers = 5", "workers = 3")
        (self.project / "gunicorn.conf.py").write_text(shipped)
        self.address, self.log = self.root / "socket", self.root / "log"

    def add(self, name: str, text: str) -> None:
        """Add a text at the end of a file of the project."""
        with (self.project / name).open("a") as file:
            file.write(text)

    def start(
        self, *options: str, systemd: Systemd | None = None, listener: int = 0, **variables: str
    ) -> None:
        """Start it, as a unit with these variables would, or without any as a deployment would."""
        variables |= {"PATH": os.defpath, "HOME": str(self.root)}
        variables |= {"PYTHONPATH": str(TOOLS / self.version), "PYTHONDONTWRITEBYTECODE": "1"}
        variables["ALLOWED_HOSTS"] = ".gforms.example.com *"  # the first name, and no pattern
        if systemd:
            variables["NOTIFY_SOCKET"] = systemd.address
        passed: list[str] = []
        if listener:
            passed = ["bash", "-c", f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{listener}', "sh"]
        script = [str(TOOLS / "env/bin/python"), str(TOOLS / self.version / "bin/gunicorn")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*passed, *script, *(options or ("--bind", f"unix:{self.address}"))],
                cwd=self.project,
                env=variables,
                stdout=log,
                stderr=log,
                pass_fds=[listener] if listener else (),
                start_new_session=True,
            )
        self.case.addCleanup(self.end)

    def end(self) -> None:
        """End it with all of its workers, of whom one that has just been forked would not hear SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def reach(self, name: str) -> None:
        """Wait until a file of the project is there."""
        wait_for((self.project / name).exists, lambda: f"{name}: {self.log.read_text()}", PATIENCE)

    def children(self) -> list[int]:
        """The process numbers of its workers."""
        master = self.process.pid
        found = Path(f"/proc/{master}/task/{master}/children").read_text()
        return list(map(int, found.split()))

    def ask(self) -> str:
        """Ask it for its page, as soon as it listens; the answer's body."""
        with socket.socket(socket.AF_UNIX) as client:
            wait_for(lambda: not client.connect_ex(str(self.address)), "it listens", PATIENCE)
            client.settimeout(PATIENCE)
            client.sendall(b"GET / HTTP/1.0\r\nHost: none\r\n\r\n")
            head, _, body = b"".join(iter(functools.partial(client.recv, 4096), b"")).partition(
                b"\r\n\r\n"
            )
        self.case.assertIn(b"200 OK", head, self.log.read_text())
        return body.decode()


class GunicornCase(unittest.TestCase):
    """A test case that is tried with every gunicorn."""

    def each(self, test: Callable[[Gunicorn], None]) -> None:
        for version in VERSIONS:
            with self.subTest(version):
                test(Gunicorn(self, version))


class ServingTest(GunicornCase):
    """How it starts, and who is told that it has."""

    def systemd(self, address: str) -> Systemd:
        systemd = Systemd(address)
        self.addCleanup(systemd.socket.close)
        return systemd

    def test_the_service_is_ready_when_all_of_its_workers_are(self) -> None:
        """Once, and not again when a worker has to be replaced."""

        def test(gunicorn: Gunicorn) -> None:
            gunicorn.add("gunicorn.conf.py", SLOWLY)
            for slow, address in (("3", f"{gunicorn.root}/notify"), ("1", f"@{gunicorn.root}")):
                systemd = self.systemd(address)
                gunicorn.start(systemd=systemd, DEPLOY_ROLE="gunicorn", SLOW=slow)
                for name in ("booted-2", "waits"):
                    gunicorn.reach(name)
                self.assertFalse(systemd.heard(), "it was ready too early")
                gunicorn.add("go", "")
                systemd.await_ready()
                gunicorn.reach("booted-3")
                os.kill(int((gunicorn.project / "booted-3").read_text()), signal.SIGKILL)
                gunicorn.reach("booted-4")
                self.assertFalse(systemd.heard(), "it was ready again")
                self.assertFalse((gunicorn.project / "restless").exists())
                gunicorn.end()
                for name in ("booted-1", "booted-2", "booted-3", "booted-4", "waits", "go"):
                    (gunicorn.project / name).unlink()

        self.each(test)

    def test_the_service_is_never_ready_when_a_worker_does_not_boot(self) -> None:
        def test(gunicorn: Gunicorn) -> None:
            systemd = self.systemd(f"@{gunicorn.root}")
            gunicorn.add("gunicorn.conf.py", NEVER)
            gunicorn.start(systemd=systemd, DEPLOY_ROLE="gunicorn")
            self.assertEqual(gunicorn.process.wait(PATIENCE), 3, gunicorn.log.read_text())
            self.assertFalse(systemd.heard())

        self.each(test)

    def test_a_mistake_in_the_urls_ends_the_start(self) -> None:
        """Before it listens, and with the reason in the last line, where a deployment looks for it."""

        def test(gunicorn: Gunicorn) -> None:
            systemd = self.systemd(f"@{gunicorn.root}")
            gunicorn.add("forms/more.py", "import no_such_module\n")
            gunicorn.start(systemd=systemd, DEPLOY_ROLE="gunicorn")
            self.assertEqual(gunicorn.process.wait(PATIENCE), 1)
            last = gunicorn.log.read_text().splitlines()[-1]
            self.assertEqual(last, "ModuleNotFoundError: No module named 'no_such_module'")
            self.assertFalse(gunicorn.address.exists())
            self.assertFalse(systemd.heard())

        self.each(test)

    def test_the_candidate(self) -> None:
        """Its one worker is warm, with the URLs that gunicorn loaded for all; it opens no other way in."""

        def test(gunicorn: Gunicorn) -> None:
            command = deploy.RestartSection().candidate[0]
            self.assertEqual(command[0], "gunicorn")
            gunicorn.start(*(word.format(socket=gunicorn.address) for word in command[1:]))
            master = str(gunicorn.process.pid)
            self.assertEqual(gunicorn.ask(), f"{master} {master} True True")
            gunicorn.process.terminate()
            self.assertEqual(gunicorn.process.wait(PATIENCE), 0)
            self.assertEqual(gunicorn.log.read_text().count("Booting worker"), 1)
            self.assertEqual({each.name for each in gunicorn.root.iterdir()}, {".deploy", "log"})

        self.each(test)

    def test_a_worker_ends_when_all_is_done_and_is_not_taken_apart(self) -> None:
        def test(gunicorn: Gunicorn) -> None:
            gunicorn.add("forms/urls.py", ENDS)
            gunicorn.start("--workers", "1", "--bind", f"unix:{gunicorn.address}")
            worker = int(gunicorn.ask() and gunicorn.children()[0])
            os.kill(worker, signal.SIGTERM)
            wait_for(lambda: worker not in gunicorn.children(), "it ends", PATIENCE)
            done = {each.name for each in gunicorn.project.iterdir()}
            self.assertLessEqual({"thread", "atexit"}, done)
            self.assertNotIn("apart", done)
            said = gunicorn.log.read_text()
            self.assertIn("the last words", said)
            self.assertNotIn("exited with code", said)

        self.each(test)

    def test_an_application_that_takes_the_socket_of_systemd(self) -> None:
        """As Twisted does, which comes with daphne: gunicorn is to listen on it all the same."""

        def test(gunicorn: Gunicorn) -> None:
            gunicorn.add("forms/wsgi.py", TAKES)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(gunicorn.address))
                listener.listen()
                gunicorn.start("--name", "one", listener=listener.fileno())
                self.assertIn(" True True", gunicorn.ask())

        self.each(test)

    def test_a_unit_that_hears_its_main_process_only(self) -> None:
        """It sets no role, so gunicorn itself says that it is ready."""

        def test(gunicorn: Gunicorn) -> None:
            systemd = self.systemd(f"@{gunicorn.root}")
            gunicorn.add("gunicorn.conf.py", SLOWLY)
            gunicorn.start(systemd=systemd)
            systemd.await_ready()
            gunicorn.add("go", "")

        self.each(test)


class FiguresTest(GunicornCase):
    """What a deployment is told of the requests."""

    def listener(self) -> socket.socket:
        """A port of loopback that takes what is told."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(PATIENCE)
        return listener

    def write(self, path: Path, listener: socket.socket) -> None:
        path.write_text(json.dumps({"port": listener.getsockname()[1], "token": "t0k3n"}))

    def assert_told(self, listener: socket.socket, role: str) -> None:
        """A request's status and time come, and nothing of another role."""
        wanted = {"request.status.200:1|c|@1.0", "request.duration"}
        while wanted:
            said = listener.recv(4096).decode()
            prefix = f"t0k3n.{role}.gunicorn."
            self.assertTrue(said.startswith(prefix), said)
            wanted -= {said.removeprefix(prefix), said.removeprefix(prefix).partition(":")[0]}

    def test_each_request_is_told_with_its_role_and_nobody_need_listen(self) -> None:
        def test(gunicorn: Gunicorn) -> None:
            listener = self.listener()
            self.write(gunicorn.workspace / "statsd", listener)
            gunicorn.start(DEPLOY_ROLE="gunicorn-standby")
            gunicorn.ask()
            self.assert_told(listener, "gunicorn-standby")
            listener.close()
            for _ in range(10):
                gunicorn.ask()
            gunicorn.end()
            self.assertNotIn("rror", gunicorn.log.read_text())

        self.each(test)

    def test_a_deployment_tells_the_old_one_from_the_new_one(self) -> None:
        """Each says the token that was there when it started; the candidate counts for neither."""

        def test(old: Gunicorn) -> None:
            file = old.workspace / "statsd"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
                free.bind(("127.0.0.1", 0))
                told = {"port": free.getsockname()[1], "token": "before", "tokens": ["before"]}
            file.write_text(json.dumps(told))
            old.start(*("--workers", "1", "--bind", f"unix:{old.address}"), DEPLOY_ROLE="gunicorn")
            for _ in range(2):  # nobody listens yet: the next datagram is refused in their place
                old.ask()
            traffic = deploy.Traffic(file)
            candidate, new = Gunicorn(self, old.version), Gunicorn(self, old.version)
            candidate.start(DEPLOY_STATSD=str(file))
            candidate.ask()
            new.start(DEPLOY_ROLE="gunicorn-standby", DEPLOY_STATSD=str(file))
            for asked in (old, new, new):
                asked.ask()
            wait_for(lambda: len(traffic.old.times + traffic.new.times) == 3, "all are counted")
            self.assertEqual((len(traffic.old.times), len(traffic.new.times)), (1, 2))
            self.assertEqual((traffic.old.errors, traffic.new.errors), (0, 0))

        self.each(test)

    def test_another_place_for_the_file(self) -> None:
        def test(gunicorn: Gunicorn) -> None:
            here, there = self.listener(), self.listener()
            self.write(gunicorn.workspace / "statsd", there)
            self.write(gunicorn.root / "elsewhere", here)
            gunicorn.start(DEPLOY_STATSD=str(gunicorn.root / "elsewhere"))
            gunicorn.ask()
            self.assert_told(here, "candidate")

        self.each(test)

    def test_a_file_that_is_no_good_changes_nothing(self) -> None:
        for text in (
            "",
            "[]",
            "{}",
            '{"port": "x", "token": "t"}',
            '{"port": 99999, "token": "t"}',
        ):
            with self.subTest(text):
                gunicorn = Gunicorn(self, "newest")
                (gunicorn.workspace / "statsd").write_text(text)
                gunicorn.start()
                gunicorn.ask()
                gunicorn.end()
                self.assertNotIn("rror", gunicorn.log.read_text())


if __name__ == "__main__":
    unittest.main()
