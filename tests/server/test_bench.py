"""The booted server itself, and the shipped docker-compose.yml and nginx/gforms.conf on it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import unittest
import unittest.mock
from pathlib import Path

import deploy
from tests.server import recipe
from tests.server.bench import (
    HOST,
    PROJECT,
    Answer,
    Server,
    ServerCase,
    behind,
    longest,
    lost,
    require,
)
from tests.server.machine import ended, until

CHECKOUT = "/home/ubuntu/gforms"
SITE = "/etc/nginx/sites-available/gforms.conf"
HASHED = "css/page.0123456789ab.css"

# An application as small as can be: it answers with the request's own headers, or as the path asks it to.
APPLICATION = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(503 if "busy" in self.path else 200)
        if "own" in self.path:
            self.send_header("X-Frame-Options", "SAMEORIGIN")
            self.send_header("Retry-After", "99")
        self.end_headers()
        self.wfile.write(str(self.headers).encode())
    do_POST = do_GET

http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""


def traces(name: str) -> set[str]:
    """Return what there is on this computer of the server whose folder has this name."""
    found = {str(path) for path in Path("/sys/fs/cgroup").glob(f"*{name}")}
    found |= {str(path) for path in Path("/sys/fs/cgroup").glob(f"*/*{name}")}
    found |= {line for line in Path("/proc/self/mounts").read_text().splitlines() if name in line}
    found |= {
        str(path)
        for path in [*recipe.CACHE.glob(name), *Path("/run/systemd/nspawn").glob(f"*/*{name}*")]
    }
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name in (process / "cmdline").read_text() + str((process / "cwd").readlink()):
                found.add(str(process))
    return found


def inhabitants(space: Path) -> set[str]:
    """Return the processes that share a network namespace."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "ns/net").readlink() == space:
                found.add(process.name)
    return found


class RequireTest(unittest.TestCase):
    """Where a server cannot be booted, the tests say why; where they must run, that is a failure."""

    def setUp(self) -> None:
        """Take a needed package away."""
        self.enterContext(unittest.mock.patch.object(recipe, "missing", lambda: ["debootstrap"]))

    def test_skipped_with_the_reason(self) -> None:
        """A missing package is named."""
        with (
            unittest.mock.patch.dict(os.environ, {"TESTS_MUST_RUN": ""}),
            self.assertRaisesRegex(unittest.SkipTest, "missing here: debootstrap"),
        ):
            require()

    def test_failed_where_it_must_run(self) -> None:
        """`server` among the tests that must run makes it a failure."""
        with (
            unittest.mock.patch.dict(os.environ, {"TESTS_MUST_RUN": "unit,server"}),
            self.assertRaisesRegex(AssertionError, "missing here: debootstrap"),
        ):
            require()


class LifeTest(unittest.TestCase):
    """A server boots, reboots, loses its power, and leaves nothing behind."""

    @classmethod
    def setUpClass(cls) -> None:
        """Skip, or fail where these tests must run."""
        require()

    def test_from_boot_to_end(self) -> None:
        """Files outlive a reboot and a power cut, processes do not, and the end is the end."""
        with Server() as server:
            spaces = [self._space(server.pid)]
            server.put("/root/kept", "kept\n")
            process = server.start(["sleep", "600"])
            server.reboot()
            self.assertNotEqual(process.wait(5), 0)
            process.communicate()
            spaces.append(self._space(server.pid))
            server.power_cut()
            server.boot()
            spaces.append(self._space(server.pid))
            self.assertEqual(server.read("/root/kept"), "kept\n")
            self.assertEqual(server.run(["systemctl", "is-system-running"]).stdout, "running\n")
            self.assertTrue(inhabitants(spaces[-1]))
            self.assertGreater(len(traces(server.folder.name)), 3)
        self.assertEqual(traces(server.folder.name), set())
        self.assertEqual([inhabitants(space) for space in spaces], [set()] * 3)

    def _space(self, pid: int) -> Path:
        """Return the network namespace of a process."""
        return Path(f"/proc/{pid}/ns/net").readlink()

    def test_a_server_that_cannot_boot(self) -> None:
        """A boot that fails says why and leaves nothing."""
        server = Server()
        try:
            server.binds["/nowhere"] = Path("/no/such/folder")
            with self.assertRaisesRegex(Exception, "/no/such/folder"):
                server.boot()
        finally:
            server.close()
        self.assertEqual(traces(server.folder.name), set())

    def test_a_killed_test(self) -> None:
        """When the test itself is killed no process lives on, and the next test removes the rest."""
        script = (
            "from tests.server.bench import *; server = Server(); server.boot();"
            "server.start(['sleep', '600']); print(server.folder.name, server.pid, flush=True); input()"
        )
        command = [sys.executable, "-c", script]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=PROJECT, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None
            name, pid = process.stdout.readline().split()
            space = self._space(int(pid))
            process.kill()
        until("every process is gone", 10, lambda: not inhabitants(space))
        recipe.prepared()
        self.assertEqual(traces(name), set())


class CommandTest(ServerCase):
    """Commands by namespace and by ssh, and the way out to the packages."""

    def test_users(self) -> None:
        """Both users run commands in a clean environment; the operator may become root without a password."""
        self.assertEqual(self.server.run(["id", "-un"]).stdout, "root\n")
        self.assertEqual(
            self.server.run("whoami; sudo -n whoami; pwd", user="ubuntu").stdout,
            "ubuntu\nroot\n/home/ubuntu\n",
        )
        self.assertIn("docker", self.server.run(["id", "-nG"], user="ubuntu").stdout)

    def test_failure_and_time(self) -> None:
        """A failed command raises with its output; one that takes too long is killed."""
        with self.assertRaisesRegex(Exception, "exit 3: bash -c 'echo no >&2; exit 3'\nno"):
            self.server.run("echo no >&2; exit 3")
        with self.assertRaises(subprocess.TimeoutExpired):
            self.server.run(["sleep", "67"], timeout=0.5)
        left = self.server.run(["pgrep", "--full", "^sleep 67"], check=False)
        self.assertEqual((left.returncode, left.stdout), (1, ""))

    def test_send(self) -> None:
        """A folder of this computer arrives as the user's own."""
        self.server.send(
            PROJECT / "tests/server", "/home/ubuntu/sent", user="ubuntu", exclude=["__pycache__"]
        )
        listing = self.server.run("stat --format=%U sent/bench.py; ls sent", user="ubuntu").stdout
        self.assertIn("ubuntu\n", listing)
        self.assertNotIn("__pycache__", listing)

    def test_ssh(self) -> None:
        """As ssh-action does: one exec request, no terminal or input, a short PATH, the script's status."""
        done = self.server.ssh('tty; cat; echo "PATH=$PATH"; echo "$-"\nid -un; exit 7')
        self.assertEqual(done.returncode, 7, done.stderr)
        lines = done.stdout.splitlines()
        self.assertEqual((lines[0], lines[-1]), ("not a tty", "ubuntu"))
        self.assertNotIn("/sbin", lines[1])
        self.assertNotIn("i", lines[2])

    def test_ssh_cut(self) -> None:
        """The end of the ssh process cuts the connection; a silent program in the server runs on."""
        script = (
            "trap '' HUP; touch begun; while [ ! -e go-on ]; do sleep 0.1; done; touch finished"
        )
        with ended(self.server.ssh_start(script)):
            until("the script has begun", 20, lambda: self._exists("begun"))
        self.server.put("/home/ubuntu/go-on", "", user="ubuntu")
        until("the script has finished", 20, lambda: self._exists("finished"))

    def _exists(self, name: str) -> bool:
        """Look for a file in the operator's folder."""
        return self.server.run(["test", "-e", name], user="ubuntu", check=False).returncode == 0

    def test_a_key_with_a_command(self) -> None:
        """A key whose entry names a command runs that, whatever is asked for."""
        key = self.server.key('restrict,command="echo only this"')
        self.assertEqual(self.server.ssh("id", key=key).stdout, "only this\n")

    def test_packages_can_be_installed(self) -> None:
        """`pipenv install --deploy` reaches its index; to make a lock, pipenv must be told whom to trust."""
        self.server.put(
            "/home/ubuntu/try/Pipfile", '[packages]\ntyping-extensions = "*"\n', user="ubuntu"
        )
        trust = {"REQUESTS_CA_BUNDLE": str(recipe.CERTIFICATES)}
        for words, env in ((["lock"], trust), (["install", "--deploy"], {})):
            self.server.run(
                ["pipenv", *words], user="ubuntu", cwd="/home/ubuntu/try", env=env, timeout=180
            )


class ComposeTest(ServerCase):
    """The shipped docker-compose.yml."""

    def setUp(self) -> None:
        """Put it in a checkout with the smallest .env."""
        self.server.put(
            f"{CHECKOUT}/docker-compose.yml",
            (PROJECT / "docker-compose.yml").read_text(),
            user="ubuntu",
        )
        self.server.put(
            f"{CHECKOUT}/.env", "DEFAULT_DB_PASSWORD='a secret'\n", user="ubuntu", mode="0600"
        )
        self.addCleanup(self._compose, "down", "--volumes")

    def _compose(self, *words: str, check: bool = True) -> str:
        """Run Compose as the operator; its standard output and error."""
        command = ["docker", "compose", *words]
        done = self.server.run(command, user="ubuntu", cwd=CHECKOUT, timeout=120, check=check)
        return done.stdout + done.stderr

    def _state(self, name: str) -> tuple[str, str, str]:
        """Return a container's identity, when it started, and its health."""
        form = "{{.Id}} {{.State.StartedAt}} {{.State.Health.Status}}"
        identity, started, health = self.server.run(
            ["docker", "inspect", "--format", form, name]
        ).stdout.split()
        return identity, started, health

    def _check_redis(self) -> str:
        """What the shipped check of deploy.ini writes, all of which ends in the log."""
        done = self.server.run(deploy.StatusSection().checks["redis"][0], user="ubuntu")
        return done.stdout + done.stderr

    def _sql(self, text: str) -> str:
        """Ask the database over TCP, as the application does."""
        command = "PGPASSWORD='a secret' psql -h 127.0.0.1 -U postgres -d gforms-db -tAc"
        return self.server.run(
            ["docker", "exec", "postgresql", "sh", "-c", f'{command} "{text}"']
        ).stdout.strip()

    def test_up_restart_reboot(self) -> None:
        """Up is healthy, up again changes nothing, and the data outlive a reboot and a power cut."""
        self._compose("up", "--detach", "--wait")
        before = [self._state(name) for name in ("postgresql", "redis")]
        self.assertEqual([health for _, _, health in before], ["healthy", "healthy"])
        self._sql("create table kept (number int)")
        self.server.run(["docker", "exec", "redis", "redis-cli", "set", "kept", "1"])
        self._compose("up", "--detach", "--wait")
        self.assertEqual([self._state(name) for name in ("postgresql", "redis")], before)
        for again in (self.server.reboot, self._lose_power):
            again()
            self._compose("up", "--detach", "--wait")
            self.assertEqual(self._state("redis")[0], before[1][0])
            self.assertEqual(self._sql("select count(*) from kept"), "0")
            kept = self.server.run(["docker", "exec", "redis", "redis-cli", "get", "kept"]).stdout
            self.assertEqual(kept, "1\n")

    def _lose_power(self) -> None:
        """Give Redis its second to write, then cut the power and boot again."""
        time.sleep(1.1)
        self.server.power_cut()
        self.server.boot()

    def test_healthy_only_when_the_last_server_answers(self) -> None:
        """While the image's set-up runs a server, which answers on its socket, PostgreSQL is not healthy."""
        slow = {"services": {"postgresql": {"volumes": [f"{CHECKOUT}/init:/docker-entrypoint-initdb.d:ro"],
                                            "healthcheck": {"interval": "200ms"}}}}  # fmt: skip
        self.server.put(f"{CHECKOUT}/docker-compose.override.yml", json.dumps(slow), user="ubuntu")
        self.addCleanup(self.server.run, ["rm", f"{CHECKOUT}/docker-compose.override.yml"])
        wait = "touch /tmp/setting-up; while [ ! -e /tmp/go-on ]; do sleep 0.1; done\n"
        self.server.put(f"{CHECKOUT}/init/wait.sh", wait, user="ubuntu")
        self._compose("up", "--detach")
        inside = ["docker", "exec", "postgresql"]
        check = [*inside, "test", "-e", "/tmp/setting-up"]
        until("the set-up", 30, lambda: self.server.run(check, check=False).returncode == 0)
        self.assertEqual(self.server.run([*inside, "pg_isready"], check=False).returncode, 0)
        time.sleep(1)
        self.assertEqual(self._state("postgresql")[2], "starting")
        self.server.run([*inside, "touch", "/tmp/go-on"])
        until("PostgreSQL is healthy", 30, lambda: self._state("postgresql")[2] == "healthy")
        self.assertEqual(self._sql("select 1"), "1")

    def test_a_changed_password_changes_redis_only(self) -> None:
        """What changed takes effect, and nothing else is touched."""
        self._compose("up", "--detach", "--wait")
        before = self._state("postgresql")
        self.assertEqual(self._check_redis(), "PONG\n")
        self.server.run("echo REDIS_PASSWORD=another >> .env", user="ubuntu", cwd=CHECKOUT)
        self._compose("up", "--detach", "--wait")
        self.assertEqual(self._check_redis(), "PONG\n")
        self.assertEqual(self._state("postgresql"), before)
        asked = "env -u REDISCLI_AUTH redis-cli ping"
        self.assertIn(
            "NOAUTH",
            self.server.run(["docker", "exec", "redis", "sh", "-c", asked], check=False).stdout,
        )
        shown = self.server.run(["ps", "-eo", "args"]).stdout
        self.assertNotIn("another", shown)

    def test_nothing_is_open_to_the_world(self) -> None:
        """Both ports are loopback's, and a missing password is said by name."""
        self._compose("up", "--detach", "--wait")
        ports = self.server.run(["ss", "--listening", "--tcp", "--numeric", "--no-header"]).stdout
        self.assertEqual(set(re.findall(r"(\S+):(?:5432|6379)\s", ports)), {"127.0.0.1"})
        self._compose("down", "--volumes")
        self.server.put(f"{CHECKOUT}/.env", "", user="ubuntu")
        self.assertIn("DEFAULT_DB_PASSWORD", self._compose("config", "--quiet", check=False))
        self.server.put(f"{CHECKOUT}/.env", "DEFAULT_DB_PASSWORD=x\n", user="ubuntu")


class NginxTest(ServerCase):
    """The shipped nginx/gforms.conf."""

    @classmethod
    def setUpClass(cls) -> None:
        """Put the site in place, two releases with static files, and the small application."""
        super().setUpClass()
        server = cls.server
        server.put(SITE, (PROJECT / "nginx/gforms.conf").read_text())
        server.run(f"rm /etc/nginx/sites-enabled/default && ln -s {SITE} /etc/nginx/sites-enabled/")
        server.run("chmod o+x /home/ubuntu && nginx -t && systemctl reload nginx")
        until(
            "nginx has read the file", 20, lambda: server.http("/").status == 503
        )  # a reload does not wait
        for release, name in (
            ("new", HASHED),
            ("new", "plain.css"),
            ("old", "old.ba9876543210.js"),
            ("old", "plain.css"),
        ):
            path = f"{CHECKOUT}/.deploy/releases/{release}/staticfiles/{name}"
            server.put(path, f"/* {release} */\n" * 300, user="ubuntu")
        links = "ln -s releases/new current && ln -s releases/old previous"
        server.run(links, user="ubuntu", cwd=f"{CHECKOUT}/.deploy")

    def _application(self) -> None:
        """Run the small application until the end of the test."""
        address = "http://127.0.0.1:8000/"
        self.addCleanup(
            until, "the application is gone", 20, lambda: self.server.http(address).status == 0
        )
        self.enterContext(ended(self.server.start(["python3", "-c", APPLICATION])))
        until("the application answers", 20, lambda: self.server.http(address).status == 200)

    def test_static_files(self) -> None:
        """The live release's file, else the previous one's; for ever when its name has a hash."""
        for name, owner, cache in (
            (HASHED, "new", "public, max-age=31536000, immutable"),
            ("plain.css", "new", "no-cache"),
            ("plain.css?v=page.0123456789ab.css", "new", "no-cache"),
            ("old.ba9876543210.js", "old", "public, max-age=31536000, immutable"),
        ):
            with self.subTest(name):
                answer = self.server.http(f"/static/{name}")
                self.assertEqual((answer.status, answer.body[:6]), (200, f"/* {owner}"))
                self.assertEqual(answer.all("Cache-Control"), [cache])
        missing = self.server.http("/static/none.0123456789ab.css")
        self.assertEqual((missing.status, missing.all("Cache-Control")), (404, []))

    def test_the_switch_is_seen_at_once(self) -> None:
        """Nothing remembers what `current` was."""
        self.assertIn("new", self.server.http("/static/plain.css").body)
        folder = f"{CHECKOUT}/.deploy"
        self.server.run("ln -sfn releases/old current", user="ubuntu", cwd=folder)
        self.addCleanup(self.server.run, "ln -sfn releases/new current", user="ubuntu", cwd=folder)
        self.assertIn("old", self.server.http("/static/plain.css").body)

    def test_nothing_else_of_the_folder_is_served(self) -> None:
        """No way leads out of the static files, and no folder is listed."""
        self.server.put(f"{CHECKOUT}/.deploy/releases/new/secret.txt", "secret", user="ubuntu")
        for path in (
            "/static/../secret.txt",
            "/static../secret.txt",
            "/static/%2e%2e/secret.txt",
            "/static/",
            "/static",
        ):
            with self.subTest(path):
                self.assertNotIn("secret", self.server.http(path).body)
                self.assertNotEqual(self.server.http(path).status, 200)

    def test_gzip(self) -> None:
        """Text is sent compressed to whoever takes it."""
        answer = self.server.http(f"/static/{HASHED}", headers={"Accept-Encoding": "gzip"})
        self.assertEqual(answer.all("Content-Encoding"), ["gzip"])
        self.assertEqual(answer.all("Vary"), ["Accept-Encoding"])

    def test_away(self) -> None:
        """Without an application: a page, 503, and when to come back."""
        answer = self.server.http("/")
        self.assertEqual((answer.status, answer.all("Retry-After")), (503, ["10"]))
        self.assertIn("Back in a moment", answer.body)
        self.assertEqual(answer.all("X-Frame-Options"), ["DENY"])

    def test_what_the_application_gets_and_says(self) -> None:
        """It learns who asks from nginx alone; its own headers win, and nginx adds what it leaves out."""
        self._application()
        claims = {
            "X-Forwarded-For": "203.0.113.9",
            "X-Forwarded-Host": "elsewhere",
            "X-Forwarded-Proto": "https",
        }
        answer = self.server.http("/", headers=claims)
        for line in (f"Host: {HOST}", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: http\n"):
            self.assertIn(line, answer.body.replace("\r", ""))
        self.assertNotIn("elsewhere", answer.body)
        self.assertEqual(answer.all("Server"), ["nginx"])
        for name in ("X-Content-Type-Options", "X-Frame-Options", "Referrer-Policy", "Permissions-Policy",
                     "Cross-Origin-Opener-Policy"):  # fmt: skip
            self.assertEqual(len(answer.all(name)), 1, name)
        own = self.server.http("/own/busy")
        self.assertEqual(
            (own.status, own.all("X-Frame-Options"), own.all("Retry-After")),
            (503, ["SAMEORIGIN"], ["99"]),
        )

    def test_behind_a_load_balancer(self) -> None:
        """With the lines that nginx/gforms.conf shows, it believes that one what it says of a visitor, and no one else."""
        self._application()
        wanted = {
            "127.0.0.1": ("X-Forwarded-For: 203.0.113.9", "X-Forwarded-Proto: https"),
            "192.0.2.1": ("X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: http"),
        }
        claims = {"X-Forwarded-For": "198.51.100.7, 203.0.113.9", "X-Forwarded-Proto": "https"}
        shipped = (PROJECT / "nginx/gforms.conf").read_text()
        self.addCleanup(self._use, shipped, "X-Forwarded-For: 127.0.0.1", claims)
        for address, lines in wanted.items():
            with self.subTest(address):
                answer = self._use(behind(address, shipped), lines[0], claims)
                self.assertIn(f"{lines[1]}\n", answer.body.replace("\r", ""))
        self._use(behind("127.0.0.1", shipped), wanted["127.0.0.1"][0], claims)
        said = self.server.http("/", headers=claims | {"X-Forwarded-Proto": "ftp://"}).body
        self.assertIn("X-Forwarded-Proto: http\n", said.replace("\r", ""))

    def _use(self, text: str, line: str, claims: dict[str, str]) -> Answer:
        """Have nginx use this text, until a request with these headers arrives with this line; the answer to it."""
        self.server.put(SITE, text)
        self.server.run("nginx -t && systemctl reload nginx")
        until("nginx has read it", 20, lambda: line in self.server.http("/", headers=claims).body)
        return self.server.http("/", headers=claims)

    def test_unknown_host(self) -> None:
        """Whoever asks for another name gets no answer."""
        self.assertEqual(self.server.http("/", host="elsewhere.example.com").status, 0)
        self.assertEqual(self.server.http("/", host="127.0.0.1").status, 0)

    def test_limits(self) -> None:
        """Attempts to log in are limited, looks at the form are not; an upload may be 20 MB."""
        self._application()
        self.assertEqual(
            self.server.http("/upload", method="POST", body="x" * 19_000_000).status, 200
        )
        self.assertEqual(
            self.server.http("/upload", method="POST", body="x" * 22_000_000).status, 413
        )
        tries = [
            self.server.http("/admin/login/?next=/", method="POST", body="x").status
            for _ in range(16)
        ]
        self.assertEqual((tries[0], tries[-1]), (200, 429))
        looks = {self.server.http("/admin/login/").status for _ in range(16)}
        self.assertEqual(looks, {200})

    def test_load(self) -> None:
        """The load client counts every request, and sees a server that goes away."""
        self._application()
        with self.server.load("/", connections=2) as load:
            time.sleep(1)
            stopped = time.monotonic()
            self.server.run(["systemctl", "stop", "nginx"])
            time.sleep(0.2)
            self.server.run(["systemctl", "start", "nginx"])
        early = load.between(0, stopped)
        self.assertGreater(len(early), 50)
        self.assertEqual(lost(early[:-4]), [])
        self.assertTrue(lost(load.samples))
        self.assertLess(longest(early), 5)


if __name__ == "__main__":
    unittest.main()
