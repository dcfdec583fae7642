"""Ended by a signal: what was live before still is, and nothing runs on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.lab import ONCE, LabTest, Run

NOT_TWICE = f"{ONCE} block restart; }}"


class SignalTest(LabTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.push({"app": "two"})

    def send(self, process: subprocess.Popen[str], number: signal.Signals) -> Run:
        process.send_signal(number)
        return self.lab.end(process)

    def assert_interrupted(self, run: Run, number: signal.Signals) -> None:
        self.assert_failed(
            run,
            f"ended by {number.name}",
            "run it again",
            status=128 + number,
            result="interrupted",
        )


class BeforeTheSwitch(SignalTest):
    def ended_by(self, number: signal.Signals) -> None:
        self.lab.script("services", "block grandchild & block services")
        process = self.lab.start()
        for name in ("services", "grandchild"):
            self.lab.await_blocked(name, process)
        self.assert_interrupted(self.send(process, number), number)

    def test_sigint_ends_the_command_and_what_that_started(self) -> None:
        self.ended_by(signal.SIGINT)

    def test_sigterm_ends_the_command_and_what_that_started(self) -> None:
        self.ended_by(signal.SIGTERM)

    def test_the_next_run_needs_no_hand(self) -> None:
        self.lab.script("services", "exec block services")
        self.assert_interrupted(
            self.send(self.lab.blocked("services"), signal.SIGINT), signal.SIGINT
        )
        self.lab.script("services", "")
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertNotIn("cut off", run.stdout)

    def test_while_the_candidate_is_asked(self) -> None:
        (self.lab.root / "hold").write_text("candidate")
        self.assert_interrupted(
            self.send(self.lab.blocked("candidate"), signal.SIGTERM), signal.SIGTERM
        )

    def test_in_the_middle_of_the_fast_forward(self) -> None:
        self.lab.block_git("merge")
        process = self.lab.blocked("pull")
        (self.lab.checkout / "app").write_text("two")
        self.assert_interrupted(self.send(process, signal.SIGINT), signal.SIGINT)
        self.assert_deployed(self.lab.deploy(), "two")

    def test_while_it_waits_for_the_lock(self) -> None:
        self.lab.script("services", "exec block services")
        holder, waiting = self.lab.blocked("services"), self.lab.start("--wait", "60")
        self.lab.await_waiting(waiting)
        run = self.send(waiting, signal.SIGINT)
        self.assert_sentence(run, 130, ["ended by SIGINT; nothing was touched"])
        self.lab.unblock("services")
        self.assert_deployed(self.lab.end(holder), "two")

    def test_sighup_is_ignored_by_it_and_its_commands(self) -> None:
        self.lab.script("services", "exec block services")
        process = self.lab.blocked("services")
        for number in self.lab.running():
            os.kill(number, signal.SIGHUP)
        self.lab.unblock("services")
        self.assert_deployed(self.lab.end(process), "two")


class AfterTheSwitch(SignalTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.script("restart", (self.lab.bin / "restart").read_text() + NOT_TWICE)

    def test_it_goes_back(self) -> None:
        run = self.send(self.lab.blocked("restart"), signal.SIGINT)
        self.assertIn(f"going back to {self.lab.linked('current')}", run.stdout)
        self.assert_interrupted(run, signal.SIGINT)

    def test_a_second_signal_does_not_skip_the_way_back(self) -> None:
        self.lab.first("restart", "grep -qx two $LAB/checkout/.deploy/current/app || block back")
        process = self.lab.blocked("restart")
        process.send_signal(signal.SIGINT)
        self.lab.await_blocked("back", process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        self.lab.unblock("back")
        self.assert_interrupted(self.lab.end(process), signal.SIGINT)
        self.assertEqual(self.lab.results(), ["live", "interrupted"])

    def test_a_human_is_needed_when_the_old_release_does_not_come_back(self) -> None:
        process = self.lab.blocked("restart")
        (self.lab.root / "sick").write_text("one")
        run = self.send(process, signal.SIGTERM)
        self.assert_sentence(run, 3, ["ended by SIGTERM", "is live and NOT healthy"])


LAST = """
import os, runpy, sys
class Last:
    def __del__(self, kill=os.kill, me=os.getpid()):
        kill(me, 15)  # when Python's own handlers have gone
last, sys.argv = Last(), ["deploy.py", "history"]
runpy.run_path("deploy.py", run_name="__main__")
"""


class AfterTheHealthCheck(SignalTest):
    def test_what_is_done_is_not_undone_by_the_end_of_python(self) -> None:
        run = subprocess.run(
            [sys.executable, "-c", LAST], cwd=self.lab.checkout, capture_output=True, check=False
        )
        self.assertEqual(run.returncode, 0)

    def test_what_is_live_and_healthy_is_not_taken_back(self) -> None:
        self.lab.block_git("log", when="grep -qx two $LAB/checkout/.deploy/current/app")
        process = self.lab.blocked("pull")
        process.send_signal(signal.SIGINT)
        self.lab.unblock("pull")
        self.assert_deployed(self.lab.end(process), "two")
        self.assertEqual(self.lab.results(), ["live", "live"])
