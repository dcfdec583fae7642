"""One deployment at a time, with a lock that cannot go stale and that says who holds it."""

from __future__ import annotations

import os
import time

from tests.lab import LabTest, wait_for


class TwoAtOnce(LabTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.push({"app": "two"})
        self.lab.script("services", "block services")
        self.holder = self.lab.blocked("services")
        self.lab.script("services", "")

    def end_holder(self) -> None:
        self.lab.unblock("services")
        self.assert_deployed(self.lab.end(self.holder), "two")

    def test_the_second_is_refused_at_once_and_told_who_holds_the_lock(self) -> None:
        with self.nothing_touched():
            for arguments in ([], ["rollback"], ["--if-changed"]):
                run = self.lab.deploy(*arguments)
                self.assert_sentence(
                    run,
                    75,
                    [
                        "another run holds the lock: deploy by ",
                        f"(process {self.holder.pid})",
                        "at services",
                        "--wait",
                    ],
                )
        self.end_holder()
        self.assertEqual(self.lab.results(), ["live", "live"])

    def test_the_second_waits_when_told_to(self) -> None:
        waiting = self.lab.start("--wait", "60")
        self.lab.await_waiting(waiting)
        self.lab.tick()
        self.end_holder()
        self.assert_deployed(self.lab.end(waiting), "two")
        self.assertEqual(self.lab.results(), ["live", "live", "live"])

    def test_it_waits_no_longer_than_told(self) -> None:
        self.assert_sentence(
            self.lab.deploy("rollback", "--wait", "0.3"), 75, ["another run holds the lock: deploy"]
        )
        self.end_holder()

    def test_reading_commands_need_no_lock(self) -> None:
        for command in ("status", "history", "logs", "check"):
            with self.subTest(command):
                self.assert_status(self.lab.deploy(command), 0)
        self.end_holder()

    def test_a_command_that_outlives_a_killed_deployer_holds_the_lock(self) -> None:
        self.lab.kill(self.holder)
        self.assert_sentence(
            self.lab.deploy(),
            75,
            [
                f"(process {self.holder.pid})",
                "it was killed, but a command of it still runs",
                "fuser -v",
            ],
        )
        self.lab.unblock("services")
        wait_for(lambda: not self.lab.running(), "the command has ended")
        self.assert_deployed(self.lab.deploy(), "two")


class StartedTogether(LabTest):
    def test_one_after_the_other_is_live(self) -> None:
        now = int(time.time())
        wait_for(lambda: int(time.time()) > now, "a new second")
        both = [self.lab.start("--wait", "60") for _ in range(2)]
        for process in both:
            self.assert_status(self.lab.end(process), 0)
        self.assertEqual(self.lab.results(), ["live", "live", "live"])
        self.assertEqual(len(self.lab.releases()), 3)
        self.assert_live("one")


class Lock(LabTest):
    def test_it_is_free_after_every_end(self) -> None:
        self.lab.script("services", "exit 1")
        self.assert_failed(self.lab.deploy())
        self.assert_failed(self.lab.deploy())
        self.assertFalse((self.lab.workspace / "journal.json").exists())

    def test_it_is_free_after_a_kill_when_nothing_runs(self) -> None:
        self.lab.script("services", "block services")
        process = self.lab.blocked("services")
        self.lab.kill(process)
        self.lab.kill_all()
        self.lab.script("services", "")
        self.assert_deployed(self.lab.deploy(), "one")

    def test_a_text_that_makes_no_sense_stops_nobody(self) -> None:
        for text in (
            b"garbage\n",
            b'{"pid": ',
            b"[1, 2]",
            b"null",
            b"7",
            b"\0" * 100,
            b"\xff\xfe",
            b'{"pid": 1}',
        ):
            with self.subTest(text):
                (self.lab.workspace / "journal.json").write_bytes(text)
                run = self.lab.deploy("rollback", self.lab.linked("current"))
                self.assert_status(run, 0)

    def test_a_torn_history_stops_nobody(self) -> None:
        path = self.lab.workspace / "history.jsonl"
        whole = path.read_bytes()
        for text in (b'{"result": "li', b"\0" * 100, b"null\n", b"7\n", b"\xff\n"):
            with self.subTest(text):
                path.write_bytes(whole + text)
                self.assert_status(self.lab.deploy("status"), 0)
                self.assert_status(self.lab.deploy("history"), 0)
        self.assert_deployed_after_torn_line()

    def assert_deployed_after_torn_line(self) -> None:
        self.lab.push({"app": "two"})
        self.assert_status(self.lab.deploy(), 0)
        self.assert_live("two")
        history = (self.lab.workspace / "history.jsonl").read_text(errors="replace")
        self.assertIn('"result": "live"', history.splitlines()[-1])

    def test_what_a_command_left_running_does_not_hold_it(self) -> None:
        self.lab.script("services", "block services > /dev/null 2>&1 &")
        self.assert_deployed(self.lab.deploy(), "one")
        self.lab.script("services", "")
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.lab.unblock("services")
        self.assert_deployed(run, "two")

    def test_nobody_else_may_read_it(self) -> None:
        self.lab.script("services", "block services")
        process = self.lab.blocked("services")
        self.assertEqual(os.stat(self.lab.workspace / "journal.json").st_mode & 0o777, 0o600)
        self.lab.unblock("services")
        self.assert_deployed(self.lab.end(process), "one")
