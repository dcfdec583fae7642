"""A small part of the fault matrix, which `python3 -m tests.faults` runs as a whole; and what it found once."""

from __future__ import annotations

import random
import signal
import threading
import unittest
from collections.abc import Callable
from unittest import mock

import deploy
from tests import faults
from tests.lab import LabTest


class MatrixTest(unittest.TestCase):
    def assert_holds(self, least: int, part: Callable[..., object], *arguments: object) -> None:
        """A part of the matrix has so many cases, and all of them hold."""
        row = faults.Row(self.id())
        part(random.Random(self.id()), row, *arguments)
        self.assertGreaterEqual(row.cases, least)
        self.assertEqual(row.broke, [])

    def test_a_signal_at_cut_points(self) -> None:
        self.assert_holds(10, faults.at_cut_points, 0.02)

    def test_killed_again_in_the_recovery(self) -> None:
        self.assert_holds(3, faults.in_recovery, 0.07)

    def test_a_signal_at_random_instants(self) -> None:
        self.assert_holds(20, faults.at_random_instants, 20)

    def test_a_signal_to_real_processes(self) -> None:
        self.assert_holds(2, faults.of_real_processes, 2)

    def test_many_starts_at_once(self) -> None:
        self.assert_holds(6, faults.at_once, 5)

    def test_random_sequences(self) -> None:
        self.assert_holds(8, faults.in_sequences, 8)

    def test_bad_input(self) -> None:
        self.assert_holds(1000, faults.in_env, 1000)
        self.assert_holds(300, faults.in_settings, 300)
        self.assert_holds(200, faults.in_command_lines, 200)
        self.assert_holds(150, faults.in_names, 150, 10)

    def test_secrets_in_every_shape(self) -> None:
        self.assert_holds(40, faults.in_every_shape)

    def test_commands_of_github_and_escapes(self) -> None:
        self.assert_holds(20, faults.in_output)

    def test_limits(self) -> None:
        self.assert_holds(2, faults.within_limits, 3)

    def test_a_clock_that_was_set_back(self) -> None:
        self.assert_holds(15, faults.with_the_clock_set_back, 0.05)

    def test_a_disk_that_fails(self) -> None:
        self.assert_holds(10, faults.on_a_disk_that_fails, 0.03)

    def test_what_breaks_is_counted(self) -> None:
        row = faults.Row("x")
        row.count("one", [])
        row.count("two", ["it broke"])
        self.assertEqual(row.line(), "| x | 2 | 1 | two: it broke | 0 s |")


class StartOverTest(unittest.TestCase):
    def test_a_signal_that_meets_the_new_version_when_it_begins(self) -> None:
        """It has the journal of the version before it to close, and the run to record."""
        with faults.staged() as stage:
            stage.greeting = signal.SIGTERM
            status, _ = stage.run(revision="new")
            self.assertEqual(status, 128 + signal.SIGTERM)
            self.assertEqual(list(stage.broken("two")), [])
            self.assertEqual(stage.entries()[-1].result, "interrupted")


class TornFreezeTest(LabTest):
    def test_it_still_freezes(self) -> None:
        """A rollback that was killed while it wrote why deployments are frozen."""
        for text in (b"", b'{"by": ', b"7", b"\xff"):
            with self.subTest(text):
                (self.lab.workspace / "frozen").write_bytes(text)
                self.assert_sentence(self.lab.deploy(), 77, ["frozen since some time by somebody"])
                self.assertNotIn("Traceback", self.lab.deploy("status").stdout)


class KilledGitTest(LabTest):
    def test_a_git_that_is_killed_leaves_no_lock(self) -> None:
        """As by the kernel when memory is short: what it had locked would stop every later deployment."""
        self.lab.push({"app": "two"})
        lock = 'touch "$LAB/checkout/.git/index.lock"; kill -9 $$'
        self.lab.block_git("merge")
        text = (self.lab.bin / "git").read_text().replace("block pull", lock)
        self.lab.script("git", text)
        self.assert_failed(self.lab.deploy(), "was ended by signal 9")
        self.assert_deployed(self.lab.deploy(), "two")


class NoThreadTest(LabTest):
    def test_a_command_that_nobody_could_read_is_ended(self) -> None:
        with (
            mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no thread")),
            mock.patch.object(
                deploy.Child, "end", autospec=True, side_effect=deploy.Child.end
            ) as end,
            self.assertRaisesRegex(deploy.Failure, "cannot be started in .*: no thread"),
        ):
            deploy.Child(["block", "x"], self.lab.root, self.lab.environment(), [print])
        (child,) = end.call_args.args
        child.process.stdout.close()  # as the thread would have
        self.assertEqual(self.lab.running(), {})


class StartTest(LabTest):
    def test_without_stdin_it_starts_over(self) -> None:
        """The lock, which the new version inherits, had its place: Python does not start with that."""
        tool = (self.lab.author / "deploy.py").read_text()
        self.lab.push({"app": "two", "deploy.py": f"{tool}# anew\n"})
        process = self.lab.start(before="exec 0<&-")
        self.assert_deployed(self.lab.end(process), "two")

    def test_with_sigchld_ignored_a_command_can_fail(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "exit 4")
        run = self.lab.end(self.lab.start(before="trap '' CHLD"))
        self.assert_failed(run, "ended with status 4")

    def test_a_remote_that_hangs(self) -> None:
        faults.impatient(self.lab)
        self.lab.setting("pull", "retries", "0")
        self.lab.script("ssh", "exec sleep 1000")
        faults.fetch_from(self.lab, "ssh://x/y")
        self.assert_failed(self.lab.deploy(), "the remote origin cannot be reached")
