"""Who is not there is told how a run ended; what is told, or cannot be, never matters to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import deploy
from tests.lab import LabTest, Run, wait_for

SECRET = "hunter2 hunter2"


class Webhook:
    """A server on loopback that keeps what is sent to it, and answers as it is told to."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.status, self.headers = 200, dict[str, str]()
        self.before: Callable[[], Any] = lambda: None
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.before()
                hook.paths.append(self.path)
                hook.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(hook.status)
                for name, value in hook.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def do_GET(self) -> None:
                hook.paths.append(f"GET {self.path}")
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/services/T0-secret-path"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class NotifyTest(LabTest):
    def setUp(self) -> None:
        super().setUp()
        self.webhook = Webhook()
        self.addCleanup(self.webhook.close)
        self.lab.setting("notify", "webhook", "ALERTS")
        self.url(self.webhook.url)
        self.assert_deployed(self.lab.deploy(), "one")  # the settings are a commit
        self.webhook.told.clear()

    def url(self, url: str) -> None:
        self.lab.env(f"SECRET_KEY='{SECRET}'\nALERTS={url}\nALLOWED_HOSTS=gforms.example.com\n")

    def fails(self, text: str = "two") -> Run:
        """Deploy what fails."""
        self.lab.tick()
        self.lab.push({"app": text, "static": "broken"}, "says nothing good")
        run = self.lab.deploy()
        self.assert_status(run, 1)
        return run

    def succeeds(self, text: str = "two") -> Run:
        """Deploy what is good."""
        self.lab.tick()
        self.lab.push({"app": text, "static": ""}, f"says {text}")
        run = self.lab.deploy()
        self.assert_deployed(run, text)
        return run

    def results(self) -> list[str]:
        """The results that the webhook was told."""
        return [each["details"]["result"] for each in self.webhook.told]

    def on(self, occasion: str) -> None:
        self.lab.setting("notify", "on", occasion)


class Occasions(NotifyTest):
    def test_failures_by_default(self) -> None:
        self.succeeds()
        self.assertEqual(self.webhook.told, [])
        run = self.fails()
        self.assertEqual(self.results(), ["failed"])
        told = self.webhook.told[0]
        self.assertEqual(told["text"], told["content"])
        self.assertEqual(told["details"], self.lab.history()[-1])
        for part in (
            "gforms.example.com: deploy failed; `python manage.py collectstatic",
            "the static files are broken",
            "is live and healthy",
            "; by ",
        ):
            self.assertIn(part, told["text"])
        self.assertNotIn("warning", run.stdout)

    def test_the_first_success_after_a_failure(self) -> None:
        self.on("recovery")
        self.succeeds()
        self.fails()
        self.fails()
        self.succeeds("three")
        self.succeeds("four")
        self.assertEqual(self.results(), ["failed", "failed", "live"])
        self.assertIn("is live, says three", self.webhook.told[-1]["text"])

    def test_always(self) -> None:
        self.on("always")
        self.succeeds()
        self.fails()
        self.lab.tick()
        self.assert_status(self.lab.deploy("rollback"), 0)
        self.assertEqual(
            [each["details"]["command"] for each in self.webhook.told],
            ["deploy", "deploy", "rollback"],
        )

    def test_a_rollback_that_fails(self) -> None:
        self.succeeds()
        (self.lab.root / "sick").write_text("one two")
        self.lab.tick()
        self.assertEqual(self.lab.deploy("rollback").returncode, 3)
        self.assertIn("gforms.example.com: rollback failed; ", self.webhook.told[0]["text"])
        self.assertIn("NOT healthy", self.webhook.told[0]["text"])

    def test_one_that_could_not_be_written_into_the_history(self) -> None:
        """On a full disk, say, which somebody has to know of."""
        site = deploy.Site(self.lab.checkout / "deploy.ini")
        deploy.notify(site, deploy.Entry(command="deploy", result="failed", message="it is full"))
        self.assertEqual(self.results(), ["failed"])

    def test_one_that_was_cut_off_is_told_by_the_next(self) -> None:
        self.lab.script("services", "block services")
        self.lab.tick()
        self.lab.kill(self.lab.blocked("services"))
        self.lab.unblock("services")
        self.lab.kill_all()
        self.lab.script("services", "")
        self.lab.tick()
        self.assert_deployed(self.lab.deploy(), "one")
        self.assertEqual(self.results(), ["cut off"])

    def test_nothing_of_what_touched_nothing(self) -> None:
        """Or a mistake in .env would be told every five minutes by cron."""
        self.on("always")
        self.lab.script("services", "block services")
        first = self.lab.blocked("services")
        self.assertEqual(self.lab.deploy().returncode, 75)
        self.lab.unblock("services")
        self.assertEqual(self.lab.end(first).returncode, 0)
        self.assertEqual(self.results(), ["live"])
        self.lab.env("what is this\n")
        self.assertEqual(self.lab.deploy("--if-changed").returncode, 78)
        self.assertEqual(self.results(), ["live"])

    def test_the_lock_is_free_by_then(self) -> None:
        free = []

        def look() -> None:
            lock = os.open(self.lab.checkout / ".git", os.O_RDONLY)
            free.append(
                deploy._flocked(lock) and not (self.lab.workspace / "journal.json").exists()
            )
            os.close(lock)

        self.webhook.before = look
        self.fails()
        self.assertEqual(free, [True])


class Trouble(NotifyTest):
    """Whatever the webhook does, the deployment ends as it would without it."""

    def setUp(self) -> None:
        super().setUp()
        self.on("always")

    def assert_warned(self, run: Run, reason: str) -> None:
        self.assertRegex(run.stdout, rf"deploy   warning: the webhook was not told: {reason}\n")
        self.assertNotIn("secret-path", run.stdout + self.lab.log())

    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.url(f"http://127.0.0.1:{port}/secret-path")
        self.assert_warned(self.succeeds(), r"\[Errno 111\] Connection refused")
        self.assertIn("FAILED: ", self.fails().stdout.splitlines()[-1])

    def test_it_never_answers(self) -> None:
        self.lab.setting("notify", "timeout", "0.5")
        done = threading.Event()
        self.addCleanup(done.set)
        self.webhook.before = lambda: done.wait(60)
        began = time.monotonic()
        run = self.succeeds()
        self.assertLess(time.monotonic() - began, 30)
        self.assert_warned(run, r"(timed out|nothing within 0\.5 s)")

    def test_it_answers_a_byte_at_a_time(self) -> None:
        """Each byte is in time, the answer never is."""
        self.lab.setting("notify", "timeout", "1")
        done = threading.Event()
        self.addCleanup(done.set)

        def trickle() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not done.wait(0.1):
                    connection.sendall(b"x")

        with socket.create_server(("127.0.0.1", 0)) as server:
            self.url(f"http://127.0.0.1:{server.getsockname()[1]}/secret-path")
            trickling = threading.Thread(target=trickle)
            trickling.start()
            self.assert_warned(self.succeeds(), "nothing within 1 s")
            done.set()
            trickling.join()

    def test_it_answers_500(self) -> None:
        self.webhook.status = 500
        self.assert_warned(self.succeeds(), "it answered 500 Internal Server Error")

    def test_204_is_good(self) -> None:
        self.webhook.status = 204
        self.assertNotIn("warning", self.succeeds().stdout)

    def test_a_redirect_is_not_followed(self) -> None:
        self.webhook.status, self.webhook.headers = 302, {"Location": "/elsewhere"}
        self.assert_warned(self.succeeds(), "it answered 302 Found")
        self.assertEqual(self.webhook.paths, ["/services/T0-secret-path"])

    def test_no_proxy_is_asked(self) -> None:
        self.lab.push({"app": "two"})
        run = self.lab.deploy(http_proxy="http://127.0.0.1:9/", HTTP_PROXY="http://127.0.0.1:9/")
        self.assert_deployed(run, "two")
        self.assertEqual(self.results(), ["live"])

    def test_what_is_no_url(self) -> None:
        for url in (
            "file:///etc/secret-path",
            "secret-path",
            "http://[secret-path",
            "http://127.0.0.1:port/secret-path",
        ):
            self.url(url)
            self.lab.tick()
            run = self.lab.deploy()
            self.assert_deployed(run, "one")
            self.assert_warned(run, ".+")

    def test_a_variable_that_is_not_there(self) -> None:
        self.lab.env("SECRET_KEY=x\n")
        self.assert_warned(self.succeeds(), ".*no ALERTS in .env.*")

    def test_no_secret_is_told(self) -> None:
        self.lab.script("services", 'echo "it is $SECRET_KEY" >&2; exit 1')
        self.assert_status(self.lab.deploy(), 1)
        self.assertIn("it is ***", self.webhook.told[-1]["text"])
        self.assertNotIn("hunter2", json.dumps(self.webhook.told))

    def test_a_long_sentence_is_one_that_discord_takes(self) -> None:
        self.lab.tick()
        self.lab.push({"app": "two"}, "subject " * 400)
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual(len(self.webhook.told[-1]["content"]), 2000)


class Command(NotifyTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.setting("notify", "command", "\n    tell us\n    sh -c 'echo \"$0\" > $LAB/also'")
        self.lab.setting("notify", "timeout", "20")

    def test_it_gets_the_sentence_as_its_last_argument(self) -> None:
        self.lab.script("tell", 'printf "%s|" "$#" "$1" "$2" > $LAB/told')
        self.fails()
        told = (self.lab.root / "told").read_text()
        self.assertTrue(told.startswith("2|us|gforms.example.com: deploy failed; "), told)
        self.assertEqual((self.lab.root / "also").read_text(), told.split("|", 2)[2][:-1] + "\n")

    def test_one_that_fails_is_a_warning(self) -> None:
        self.lab.script("tell", "echo no route; exit 4")
        run = self.fails()
        self.assertRegex(run.stdout, r"warning: `tell us .* ended with status 4 \(no route\)")
        self.assertTrue((self.lab.root / "also").exists())
        self.assertIn("FAILED: `python manage.py", run.stdout.splitlines()[-1])

    def test_one_that_hangs_is_ended(self) -> None:
        self.lab.setting("notify", "timeout", "0.5")
        self.lab.script("tell", "block tell")
        run = self.fails()
        self.assertIn("was ended after its time limit of 0.5 s", run.stdout)
        wait_for(lambda: not self.lab.running(), "nothing runs on")

    def test_one_that_is_not_there_is_a_warning(self) -> None:
        self.assertIn("warning: tell is not installed", self.fails().stdout)


class Journal(LabTest):
    def test_each_line_of_the_history_is_an_entry(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            path = self.lab.root / "journal"
            journal.bind(str(path))
            journal.settimeout(20)
            self.lab.setting("notify", "journal", str(path))
            self.lab.env(f"SECRET_KEY='{SECRET}'\n")
            self.lab.script("services", 'echo "$SECRET_KEY"; exit 1')
            self.lab.deploy()
            fields = dict(
                line.split("=", 1) for line in journal.recv(1 << 16).decode().splitlines()
            )
            entry = self.lab.history()[-1]
            self.assertEqual(
                {name: fields[name] for name in fields if name != "MESSAGE"},
                {
                    "PRIORITY": "3",
                    "SYSLOG_IDENTIFIER": "deploy",
                    "DEPLOY_COMMAND": "deploy",
                    "DEPLOY_RESULT": "failed",
                    "DEPLOY_RELEASE": entry["release"],
                    "DEPLOY_REVISION": entry["revision"],
                    "DEPLOY_BY": entry["by"],
                },
            )
            self.assertIn(
                "deploy failed; `services up` ended with status 1 (***)", fields["MESSAGE"]
            )
            self.lab.script("services", "")
            self.lab.tick()
            self.assert_deployed(self.lab.deploy(), "one")
            self.assertIn(b"PRIORITY=6\n", journal.recv(1 << 16))

    def test_a_journal_that_reads_nothing_is_not_waited_for(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            path = self.lab.root / "journal"
            journal.bind(str(path))
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
                other.setblocking(False)
                with self.assertRaises(BlockingIOError):
                    for _ in range(100_000):
                        other.sendto(b"x", str(path))
            self.lab.setting("notify", "journal", str(path))
            self.assert_deployed(self.lab.deploy(), "one")

    def test_a_value_with_a_newline_is_one_line(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            path = self.lab.root / "journal"
            journal.bind(str(path))
            journal.settimeout(20)
            deploy._tell_journal(str(path), deploy.Entry(by="a\nb"), "two\nlines=1")
            lines = journal.recv(1000).splitlines()
            self.assertEqual((lines[0], lines[-1]), (b"MESSAGE=two lines=1", b"DEPLOY_BY=a b"))
