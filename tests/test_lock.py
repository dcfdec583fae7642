"""The lock: one run at a time, free as soon as its holder and the holder's commands are gone."""
from __future__ import annotations

import contextlib
import io
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import deploy
from tests.test_running import poll

# Takes the lock, starts a command that inherits it, says the command's number, and waits to be killed.
HOLDER = """
import sys; sys.path.insert(0, sys.argv[1])
import deploy, os, pathlib, subprocess, time
lock = deploy.Lock(pathlib.Path(sys.argv[2]))
lock.take(0, deploy.Output())
lock.write(command="deploy", by="ubuntu, ssh from 192.0.2.7", since="2026-11-23 07:15:00 UTC",
           pid=os.getpid(), step="static")
child = subprocess.Popen(["sleep", "600"], pass_fds=[lock.descriptor] if sys.argv[3] else [], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


class LockTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "lock"
        self.output = deploy.Output()
        self.shown = io.StringIO()
        redirected = contextlib.redirect_stdout(self.shown)
        redirected.__enter__()
        self.addCleanup(redirected.__exit__, None, None, None)

    def take(self, wait: float = 0) -> tuple[deploy.Lock, dict[str, object]]:
        lock = deploy.Lock(self.path)
        try:
            left = lock.take(wait, self.output)
        except deploy.Failure:
            os.close(lock.descriptor)
            raise
        return lock, left

    def hold(self, inherited: bool = False) -> tuple[subprocess.Popen[str], int]:
        """Another process that holds the lock, and the number of its command."""
        argv = [sys.executable, "-c", HOLDER, str(Path(deploy.__file__).parent), str(self.path), "yes" * inherited]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.addCleanup(self.end, process)
        assert process.stdout
        child = int(process.stdout.readline())
        self.addCleanup(self.kill, child)
        return process, child

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()

    @staticmethod
    def kill(process: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    def test_it_is_taken_and_released_and_taken_again(self) -> None:
        for _ in range(3):
            lock, left = self.take()
            self.assertEqual(left, {})
            lock.write(command="deploy")
            lock.release()
        self.assertEqual(self.path.read_bytes(), b"")
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)

    def test_a_second_one_is_refused_at_once_with_the_holder_named(self) -> None:
        process, _ = self.hold()
        with self.assertRaises(deploy.Failure) as caught:
            self.take()
        self.assertEqual(caught.exception.status, deploy.LOCKED)
        for part in ("deploy by ubuntu, ssh from 192.0.2.7", "since 2026-11-23 07:15:00", str(process.pid), "static"):
            self.assertIn(part, caught.exception.what)
        self.assertNotIn("killed", caught.exception.what)
        self.assertIn("--wait", caught.exception.remedy)

    def test_it_is_refused_within_one_process_too(self) -> None:
        lock, _ = self.take()
        with self.assertRaises(deploy.Failure):
            self.take()
        lock.release()

    def test_waiting_ends_with_the_lock(self) -> None:
        first, _ = self.take()
        first.write(command="rollback", step="restart")
        taken: list[deploy.Lock] = []
        second = threading.Thread(target=lambda: taken.append(self.take(60)[0]))
        with mock.patch.object(deploy, "HEARTBEAT", 0.1):
            second.start()
            try:
                poll(lambda: "waiting for the lock: rollback by" in self.shown.getvalue(), "the line that it waits")
                self.assertEqual(taken, [])
            finally:
                first.release()
                second.join(20)
        self.assertEqual(len(taken), 1)
        taken[0].release()

    def test_waiting_has_an_end(self) -> None:
        first, _ = self.take()
        began = time.monotonic()
        with self.assertRaises(deploy.Failure) as caught:
            self.take(0.3)
        self.assertGreaterEqual(time.monotonic() - began, 0.3)
        self.assertEqual(caught.exception.status, deploy.LOCKED)
        first.release()

    def test_a_killed_holder_leaves_its_text_and_no_lock(self) -> None:
        process, _ = self.hold()
        self.end(process)
        lock, left = self.take()
        self.assertEqual((left["command"], left["step"], left["pid"]), ("deploy", "static", process.pid))
        lock.release()
        self.assertEqual(self.take()[1], {})

    def test_a_command_that_outlives_its_killed_holder_still_holds_it(self) -> None:
        process, child = self.hold(inherited=True)
        self.end(process)
        with self.assertRaises(deploy.Failure) as caught:
            self.take()
        self.assertIn("it was killed, but a command of it still runs", caught.exception.what)
        self.assertIn(str(self.path), caught.exception.what)
        self.kill(child)
        lock, left = self.take(20)
        self.assertEqual(left["command"], "deploy")
        lock.release()

    def test_its_text_changes_in_place_and_shrinks(self) -> None:
        lock, _ = self.take()
        inode = self.path.stat().st_ino
        lock.write(command="deploy", step="a step with a long name", revision="größe")
        lock.write(step="env")
        self.assertEqual(lock.read(), {"command": "deploy", "step": "env", "revision": "größe"})
        self.assertTrue(self.path.read_text(encoding="utf-8").endswith("}\n"))
        self.assertEqual(self.path.stat().st_ino, inode)
        lock.release()

    def test_a_text_that_is_none(self) -> None:
        for raw in (b"", b"{\"command\": \"dep", b"\0\0\0\0", b"\xff\xfe"):
            with self.subTest(raw=raw):
                self.path.write_bytes(raw)
                lock, left = self.take()
                self.assertEqual(left, {})
                self.assertTrue(lock.holder(), "who holds it is unknown, but somebody does")
                lock.release()

    def test_the_holder(self) -> None:
        lock = deploy.Lock(self.path)
        self.assertEqual(lock.holder(), "")
        self.assertFalse(self.path.exists(), "to ask makes nothing")
        lock, _ = self.take()
        lock.write(command="deploy", by="me", since="today", pid=os.getpid(), step="pull")
        self.assertEqual(deploy.Lock(self.path).holder(),
                         f"deploy by me since today (process {os.getpid()}), at pull")
        lock.release()
        self.assertEqual(lock.holder(), "")

    def test_to_ask_who_holds_it_stands_in_nobodys_way(self) -> None:
        """A `status` that tries the lock at the same moment is no reason for a deployment to give up."""
        real, tried = deploy.flocked, []

        def flocked(descriptor: int) -> bool:
            tried.append(descriptor)
            return len(tried) > 1 and real(descriptor)

        with mock.patch.object(deploy, "flocked", flocked):
            lock, _ = self.take()
        lock.release()


class StartedByTest(unittest.TestCase):
    def test_where_it_was_started(self) -> None:
        for variables, place in (({"SSH_CONNECTION": "192.0.2.7 5 10.0.0.1 22"}, "ssh from 192.0.2.7"),
                                 ({"INVOCATION_ID": "0"}, "systemd"), ({}, "cron")):
            with self.subTest(place=place), mock.patch.dict(os.environ, variables, clear=True), \
                    contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual(deploy.started_by(), f"{pwd.getpwuid(os.geteuid()).pw_name}, {place}")
