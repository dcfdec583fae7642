"""The lock and the journal: one run at a time, and what it has begun is on disk before it happens."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deploy
from tests.speaking import speaking
from tests.test_running import poll

# Takes the lock, starts a command that inherits it, says the command's number, and waits to be killed.
HOLDER = """
import sys; sys.path.insert(0, sys.argv[1])
import deploy, os, pathlib, subprocess, time
folder = pathlib.Path(sys.argv[2])
lock, journal = deploy.Lock(folder), deploy.Journal(folder / "journal.json")
with lock.held(0, journal):
    journal.save(command="deploy", by="ubuntu, ssh from 192.0.2.7", since="2026-11-23 07:15:00 UTC",
                 pid=os.getpid(), step="static")
    journal.begin("release", name="x")
    inherited = lock.inherited if sys.argv[3] else ()
    child = subprocess.Popen(["sleep", "600"], pass_fds=inherited, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(600)
"""


class LockTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.journal = deploy.Journal(self.folder / "journal.json")
        self.shown = self.enterContext(speaking())

    @contextlib.contextmanager
    def held(self, wait: float = 0) -> Iterator[deploy.Lock]:
        lock = deploy.Lock(self.folder)
        with lock.held(wait, self.journal):
            yield lock

    def refused(self, wait: float = 0) -> deploy.Failure:
        with self.assertRaises(deploy.Failure) as caught, self.held(wait):
            pass
        self.assertEqual(caught.exception.status, deploy.LOCKED)
        return caught.exception

    def hold(self, inherited: bool = False) -> tuple[subprocess.Popen[str], int]:
        """Another process that holds the lock, and the number of its command."""
        place = str(Path(deploy.__file__).parent)
        argv = [sys.executable, "-c", HOLDER, place, str(self.folder), "yes" * inherited]
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
            with self.held() as lock:
                self.assertEqual(len(lock.inherited), 1)
            self.assertEqual(lock.inherited, ())

    def test_a_second_one_is_refused_at_once_with_the_holder_named(self) -> None:
        process, _ = self.hold()
        failure = self.refused()
        who = "deploy by ubuntu, ssh from 192.0.2.7 since 2026-11-23 07:15:00"
        for part in (who, str(process.pid), "static"):
            self.assertIn(part, failure.what)
        self.assertNotIn("killed", failure.what)
        self.assertIn("--wait", failure.remedy)

    def test_it_is_refused_within_one_process_too(self) -> None:
        with self.held():
            self.refused()

    def test_another_workspace_is_under_the_same_lock(self) -> None:
        """The lock is on the checkout's .git, which nobody removes; not in the workspace."""
        with self.held():
            self.journal = deploy.Journal(self.folder / "elsewhere" / "journal.json")
            self.refused()

    def test_waiting_ends_with_the_lock(self) -> None:
        taken = threading.Event()

        def wait() -> None:
            with self.held(60):
                taken.set()

        second = threading.Thread(target=wait)
        with self.held():
            self.journal.save(command="rollback", step="restart", pid=os.getpid())
            second.start()
            poll(lambda: "waiting for the lock: rollback by" in self.shown.getvalue(), "it waits")
            self.assertFalse(taken.is_set())
        second.join(20)
        self.assertTrue(taken.is_set())

    def test_waiting_has_an_end(self) -> None:
        with self.held():
            began = time.monotonic()
            self.refused(0.3)
            self.assertGreaterEqual(time.monotonic() - began, 0.3)

    def test_a_killed_holder_leaves_its_journal_and_no_lock(self) -> None:
        process, _ = self.hold()
        self.end(process)
        with self.held():
            self.journal.load()
        self.assertEqual(
            (self.journal.run["step"], self.journal.run["pid"]), ("static", process.pid)
        )
        self.assertEqual(self.journal.begun, [{"act": "release", "name": "x"}])

    def test_a_command_that_outlives_its_killed_holder_still_holds_it(self) -> None:
        process, child = self.hold(inherited=True)
        self.end(process)
        failure = self.refused()
        self.assertIn("it was killed, but a command of it still runs", failure.what)
        self.assertIn(f"fuser -v {self.folder}", failure.what)
        self.kill(child)
        with self.held(20):
            pass

    def test_the_holder(self) -> None:
        lock = deploy.Lock(self.folder)
        self.assertEqual(lock.holder(self.journal), "")
        self.assertEqual(deploy.Lock(self.folder / "nothing").holder(self.journal), "")
        with self.held():
            self.journal.save(
                command="deploy", by="me", since="today", pid=os.getpid(), step="pull"
            )
            who = f"deploy by me since today (process {os.getpid()}), at pull"
            self.assertEqual(lock.holder(self.journal), who)
        self.assertEqual(lock.holder(self.journal), "")

    def test_to_ask_who_holds_it_stands_in_nobodys_way(self) -> None:
        """A `status` that tries the lock at the same moment is no reason for a deployment to give up."""
        real, tried = deploy._flocked, []

        def flocked(descriptor: int) -> bool:
            tried.append(descriptor)
            return len(tried) > 1 and real(descriptor)

        with mock.patch.object(deploy, "_flocked", flocked), self.held():
            self.assertGreater(len(tried), 1)

    def test_it_is_handed_over_to_the_next_version(self) -> None:
        with self.held() as lock, mock.patch.dict(os.environ):
            lock.hand_over("20261124T100000Z")
            self.assertTrue(os.get_inheritable(lock.inherited[0]))
            there = deploy.Lock(self.folder)
            self.assertEqual((there.inherited, there.started), (lock.inherited, "20261124T100000Z"))
            self.assertFalse(os.get_inheritable(lock.inherited[0]))
            self.assertNotIn("DEPLOY_RESUME", os.environ)

    def test_what_is_no_lock_is_not_taken_for_one(self) -> None:
        with open(self.folder / "other", "w") as other:
            for text in (
                "",
                "99 20261124T100000Z",
                f"{other.fileno()} 20261124T100000Z",
                "1",
                "x y",
                "-1 x",
            ):
                with self.subTest(text=text), mock.patch.dict(os.environ, DEPLOY_RESUME=text):
                    lock = deploy.Lock(self.folder)
                    self.assertEqual((lock.inherited, lock.started), ((), ""))


class JournalTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.journal = deploy.Journal(self.folder / "journal.json")

    def read(self) -> dict[str, Any]:
        return dict(json.loads(self.journal.path.read_text()))

    def test_an_act_is_on_disk_before_it_happens_and_gone_when_it_ended(self) -> None:
        with self.journal.doing("partial", path="venvs/x"):
            self.assertEqual(self.read()["begun"], [{"act": "partial", "path": "venvs/x"}])
        self.assertEqual(self.read()["begun"], [])

    def test_one_that_failed_stays(self) -> None:
        with self.assertRaises(KeyError), self.journal.doing("partial", path="venvs/x"):
            raise KeyError
        self.assertEqual(self.read()["begun"], [{"act": "partial", "path": "venvs/x"}])

    def test_it_is_flushed_and_renamed(self) -> None:
        """At every instant there is a whole one, and what replaces it is on disk before."""
        self.journal.begin("release", name="1")
        done: list[str] = []
        fsync, replace = os.fsync, os.replace

        def flushed(descriptor: int) -> None:
            done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            fsync(descriptor)

        def replaced(source: Path, target: Path) -> None:
            self.assertEqual(len(self.read()["begun"]), 1)
            done.append("replace")
            replace(source, target)

        with mock.patch.object(os, "fsync", flushed), mock.patch.object(os, "replace", replaced):
            self.journal.begin("release", name="2")
        self.assertEqual(done, ["journal.new", "replace", self.folder.name])
        self.assertEqual(len(self.read()["begun"]), 2)
        self.assertEqual(self.journal.path.stat().st_mode & 0o777, 0o600)

    def test_what_could_not_be_undone_is_found_by_the_next_run(self) -> None:
        self.journal.stuck = [{"act": "switch"}]
        self.journal.begin("release", name="1")
        later = deploy.Journal(self.journal.path)
        later.load()
        self.assertEqual([act["act"] for act in later.begun], ["switch", "release"])

    def test_it_is_gone_when_all_is_right(self) -> None:
        for begun, there in (([], False), ([{"act": "switch"}], True)):
            with contextlib.closing(self.journal):
                self.journal.begun = list(begun)
                self.journal.save()
            self.assertEqual(self.journal.path.exists(), there)

    def test_a_commit_is_in_the_history_or_will_be(self) -> None:
        """Killed between the two, the next run writes the entry, and undoes nothing."""
        self.journal.begin("switch")
        entry = deploy.Entry(command="deploy", result="live")
        history = mock.Mock(record=mock.Mock(side_effect=KeyboardInterrupt))
        with self.assertRaises(KeyboardInterrupt):
            self.journal.commit(entry, history)
        (act,) = self.read()["begun"]
        site = mock.Mock(history=deploy.History(self.folder / "history.jsonl"))
        for _ in range(2):
            deploy.UNDO[act["act"]](site, act)
        self.assertEqual(site.history.entries(), [entry])

    def test_what_is_no_journal(self) -> None:
        for raw in (b"", b'{"run"', b"\0" * 50, b"\xff", b"{}", b"[]", b"9" * 400, b'{"run": 1, "begun": []}',
                    b'{"run": {}, "begun": 5}', b'{"run": {}, "begun": [5]}', b"[" * 100_000):  # fmt: skip
            with self.subTest(raw=raw[:30]):
                self.journal.path.write_bytes(raw)
                self.journal.load()
                self.assertEqual((self.journal.run, self.journal.begun), ({}, []))
                self.assertIsInstance(self.journal.who(self.folder), str)


class StartedByTest(unittest.TestCase):
    def test_where_it_was_started(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        for variables, place in (
            ({"SSH_CONNECTION": "192.0.2.7 5 10.0.0.1 22"}, "ssh from 192.0.2.7"),
            ({"INVOCATION_ID": "0"}, "systemd"),
            ({}, "script"),
        ):
            with (
                self.subTest(place=place),
                mock.patch.dict(os.environ, variables, clear=True),
                mock.patch.object(os, "isatty", lambda _: False),
            ):
                self.assertEqual(deploy.started_by(), f"{user}, {place}")


if __name__ == "__main__":
    unittest.main()
