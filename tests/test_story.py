"""The step runner, in process: every step succeeds, fails, is killed or signalled at every cut point.

A cut point is a command that is about to run, or a journal or a history about to be written. Each run is a
fork of this process, so that SIGKILL is the real one; the commands alone are played.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
import unittest
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from unittest import mock

import deploy

STEPS = deploy.STEP_NAMES
SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # fsync costs nothing there
HOOKS = "".join(f"[{step}]\nbefore = step {step}\n" for step in STEPS)
INI = f"""{HOOKS}[deploy]
shared = .env
[install]
command = pipenv install
[services]
command = services
[static]
command = static
[migrate]
shell = shell
command = migrate
[backup]
command = dump
verify = verify
[restore]
command = restore {{act}} {{database}}
[restart]
candidate =
command = restart
main_process =
[health]
url = http://127.0.0.1:1/
deadline = 0.01
[notify]
journal =
"""
INI = INI.replace("[install]\nbefore", "[install]\npython = {python}\nbefore", 1)


class Cut:
    """Counts the cut points of a run, and acts at one of them."""

    def __init__(self, at: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.at, self.act, self.passed = at, act, 0

    def point(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            self.act()


class Played(deploy.Commands):
    """The commands of a server, played: a revision is what `remote` says, a site is what `serving` is."""

    root: Path
    cut: Cut
    failing: str

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        environment: Any,
        timeout: float,
        quiet: bool = False,
        stdin: int = -1,
        stdout: int = -1,
    ) -> str:
        deploy.Signals.check()
        self.cut.point()
        words = [word for word in argv if word not in ("-c", "--literal-pathspecs")]
        name = (
            next(word for word in words[1:] if "=" not in word)
            if words[0] == "git"
            else " ".join(words[:2])
            if words[0] == "step"
            else words[0]
        )
        if name == self.failing:
            raise deploy.CommandFailed(argv, folder, "ended with status 1", [])
        play = getattr(self, f"play_{name.replace('-', '_')}", None)
        if name == "dump":
            os.write(stdout, b"the whole database")
        if name == "shell" and b"\nlist_settings(" in os.pread(stdin, 1 << 20, 0)[-60:]:
            return '["", "", "", ""]'
        return str(play(words, folder) or "") if play else ""

    def text(self, name: str) -> str:
        return (self.root / name).read_text()

    def write(self, name: str, text: str) -> None:
        """Whole, whenever this is killed, as the effects of a real server's commands are."""
        (self.root / f"beside-{name}").write_text(text)
        (self.root / f"beside-{name}").replace(self.root / name)

    def play_fetch(self, words: list[str], folder: Path) -> None:
        pass

    def play_symbolic_ref(self, words: list[str], folder: Path) -> str:
        return "refs/heads/main"

    def play_worktree(self, words: list[str], folder: Path) -> None:
        if "add" not in words:
            return
        release = Path(words[-2])
        (self.root / ".git" / "worktrees" / release.name).mkdir(parents=True)
        release.mkdir()
        lock = {"_meta": {}, "default": {words[-1]: {"version": "==1"}}}
        (release / "Pipfile.lock").write_text(json.dumps(lock))
        (release / "app").write_text(words[-1])

    def play_pipenv(self, words: list[str], folder: Path) -> None:
        release = max((self.root / ".deploy" / "releases").iterdir(), key=lambda each: each.name)
        self.assert_below(release, folder)
        act = json.loads(self.text(".deploy/journal.json"))["begun"][-1]
        (self.root / ".deploy" / act["path"]).mkdir(parents=True)

    @staticmethod
    def assert_below(release: Path, folder: Path) -> None:
        if folder != release:
            raise AssertionError(f"packages are installed for {folder}, not for {release}")

    def play_shell(self, words: list[str], folder: Path) -> str:
        done = self.text("database").split()
        known = [
            {
                "name": name,
                "applied": name in done,
                "reversible": True,
                "atomic": True,
                "replaces": [],
                "incompatible": [],
            }
            for name in ("first", (folder / "app").read_text())
        ]
        facts = {
            "vendor": "postgresql",
            "identity": "",
            "file": "",
            "lock_timeout": "2s",
            "invalid": [],
            "others": [],
            "recorded": done,
        }
        return json.dumps(facts | {"migrations": known})

    def play_migrate(self, words: list[str], folder: Path) -> None:
        done = [*self.text("database").split(), (folder / "app").read_text()]
        self.write("database", " ".join(dict.fromkeys(done)))

    def play_restart(self, words: list[str], folder: Path) -> None:
        self.write("serving", os.readlink(self.root / ".deploy" / "current"))


class Play:
    """A checkout in which runs are played."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="story-", dir=SHM)).resolve()
        (self.root / ".git").mkdir()
        (self.root / "deploy.ini").write_text(INI.replace("{python}", sys.executable))
        (self.root / ".env").write_text("ALLOWED_HOSTS=gforms.example.com\n")
        (self.root / ".env").chmod(0o600)
        (self.root / "database").write_text("first")
        self.now = 0

    def copy(self) -> Self:
        """The same again, elsewhere."""
        other = object.__new__(type(self))
        other.root, other.now = Path(tempfile.mkdtemp(prefix="story-", dir=SHM)).resolve(), self.now
        shutil.copytree(self.root, other.root, symlinks=True, dirs_exist_ok=True)
        return other

    def remove(self) -> None:
        shutil.rmtree(self.root)

    def run(
        self,
        command: Callable[..., int] = deploy.deploy,
        revision: str = "",
        cut: Cut | None = None,
        failing: str = "",
        sick: str = "",
    ) -> tuple[int, int]:
        """Play a run in a fork: its exit status (-9: killed), and the cut points that it passed."""
        self.now += 1
        if revision:
            (self.root / "remote").write_text(revision)
        reading, writing = os.pipe()
        process = os.fork()
        if not process:
            os.close(reading)
            self.writing = writing
            self.play(command, cut or Cut(), failing, sick)
        os.close(writing)
        self.meanwhile(process, reading)
        with open(reading, "rb") as result:
            said = result.read()
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if ended == 99:
            raise AssertionError(said.decode())
        return ended, int(said or 0)

    def meanwhile(self, process: int, reading: int) -> None:
        """What happens while a run is played, which writes to what is read there."""

    def play(self, command: Callable[..., int], cut: Cut, failing: str, sick: str) -> None:
        """In the fork: never returns."""
        status = 99
        try:
            Played.root, Played.cut, Played.failing = self.root, cut, failing
            now, root, save = f"20261124T{self.now:06d}Z", self.root, deploy.Journal.save

            def ask(_health: object, _unix: object) -> deploy.Answer:
                serving = root / ".deploy" / (root / "serving").read_text()
                good = sick not in ("every", (serving / "app").read_text())
                return good, "200 OK" if good else "500"

            def save_or_die(journal: deploy.Journal, **run: object) -> None:
                cut.point()
                save(journal, **run)

            record = deploy.History.record

            def record_or_die(history: deploy.History, entry: deploy.Entry) -> None:
                cut.point()
                record(history, entry)

            def commit(_git: object, *_: str) -> str:
                return (root / "remote").read_text()

            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            with (
                mock.patch.object(deploy, "Commands", Played),
                mock.patch.object(deploy.HealthCheck, "ask", ask),
                mock.patch.object(deploy.Journal, "save", save_or_die),
                mock.patch.object(deploy.History, "record", record_or_die),
                mock.patch.object(deploy.Git, "commit", commit),
                mock.patch.object(deploy, "clock", lambda form="": now if form else "now"),
                mock.patch.object(os, "sync"),
            ):
                deploy.start_logging()
                status = self.status_of(command)
            os.write(self.writing, str(cut.passed).encode())
        except BaseException:  # noqa: BLE001 - the other process shows it
            os.write(self.writing, traceback.format_exc().encode())
            status = 99
        os._exit(status)

    def status_of(self, command: Callable[..., int]) -> int:
        """What main would make of it."""
        try:
            return command(deploy.Site(self.root / "deploy.ini"))
        except (deploy.Failure, deploy.Interrupted) as error:
            failure = deploy.as_failure(error)
            (self.root / "said").write_text(deploy.sentence(failure))
            return failure.status

    def entries(self) -> list[deploy.Entry]:
        return deploy.History(self.root / ".deploy" / "history.jsonl").entries()

    def serving(self) -> str:
        """The revision that answers, which is a whole release's."""
        return (self.root / ".deploy" / (self.root / "serving").read_text() / "app").read_text()

    def current(self) -> str:
        return (self.root / ".deploy" / "current" / "app").read_text()

    def broken(self, *revisions: str) -> Iterator[str]:
        """What is not right when no run is at work and none was cut off."""
        if self.serving() != self.current():
            yield f"{self.serving()} answers, and {self.current()} is current"
        if self.serving() not in revisions:
            yield f"{self.serving()} answers"
        workspace, entries = self.root / ".deploy", self.entries()
        live = [entry for entry in entries if entry.result == "live"]
        if live[-1].revision != self.serving():
            yield f"the history says that {live[-1].revision} is live"
        if len((workspace / "history.jsonl").read_bytes().splitlines()) != len(entries):
            yield "the history is torn"
        releases = {path.name for path in (workspace / "releases").iterdir()}
        admin = {path.name for path in (self.root / ".git" / "worktrees").iterdir()}
        left = [*releases - {entry.release for entry in live}, *admin - releases]
        for each in ("journal*", "backups/*.part", "*.new", ".*.new"):
            left += [path.name for path in workspace.glob(each)]
        left += [path.name for each in ("database-*", "no-writes") for path in self.root.glob(each)]
        venvs = workspace.glob("venvs/*")
        left += [path.name for path in venvs if not (path / ".complete").exists()]
        if left:
            yield f"left over: {', '.join(left)}"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    deploy.Signals.keep(signal.SIGTERM, None)


class StoryTest(unittest.TestCase):
    start: Play

    @classmethod
    def setUpClass(cls) -> None:
        """One release is live."""
        deploy.read_settings(deploy.SCRIPT.with_name("deploy.ini"))  # warms what every fork needs
        cls.start = Play()
        cls.addClassCleanup(cls.start.remove)
        assert cls.start.run(revision="one")[0] == 0, (cls.start.root / "said").read_text()

    def setUp(self) -> None:
        self.play = self.start.copy()
        self.addCleanup(lambda: self.play.remove())

    def again(self) -> None:
        """Begin anew with what setUp made."""
        self.play.remove()
        self.play = self.start.copy()

    def assert_one_release(self, *revisions: str) -> None:
        """What answers is one whole release, of one of these revisions."""
        self.assertIn(self.play.serving(), revisions)

    def assert_right(self, *revisions: str) -> None:
        """What answers is what is live, nothing is left over, and the history says the same."""
        self.assertEqual(list(self.play.broken(*revisions)), [])

    def every_cut(self, act: Callable[[], None], first: int = 1, **run: Any) -> list[int]:
        """Play a run once for each of its cut points, and act there; the exit statuses."""
        _, count = self.play.run(**run)
        found = []
        for at in range(first, count + 1):
            self.again()
            with self.subTest(cut=at, of=count):
                found.append(self.play.run(cut=Cut(at, act), **run)[0])
                self.after(found[-1])
        self.assertGreater(len(found), 5)
        return found

    def after(self, status: int) -> None:
        """What must hold after a run of every_cut."""


class StepTest(StoryTest):
    def test_every_step_succeeds(self) -> None:
        self.assertEqual(self.play.run(revision="two")[0], 0)
        self.assert_right("two")
        self.assertEqual(tuple(self.play.entries()[-1].steps), STEPS)

    def test_each_step_fails(self) -> None:
        commands = [f"step {step}" for step in STEPS]
        commands += ["fetch", "worktree", "pipenv", "services", "static", "shell", "dump", "verify"]
        for failing in (*commands, "migrate"):
            with self.subTest(failing=failing):
                self.again()
                self.assertEqual(self.play.run(revision="two", failing=failing)[0], 1)
                self.assert_right("one")
                self.assertEqual(self.play.entries()[-1].result, "failed")

    def test_a_restart_that_always_fails_leaves_one_release(self) -> None:
        self.assertEqual(self.play.run(revision="two", failing="restart")[0], 1)
        self.assert_right("one")

    def test_a_sick_release_is_taken_back(self) -> None:
        self.assertEqual(self.play.run(revision="two", sick="two")[0], 1)
        self.assert_right("one")

    def test_a_sick_old_release_needs_a_human_and_is_taken_back_by_the_next_run(self) -> None:
        self.assertEqual(self.play.run(revision="two", sick="every")[0], 3)
        journal = json.loads((self.play.root / ".deploy" / "journal.json").read_text())
        self.assertEqual([act["act"] for act in journal["begun"]], ["switch"])
        self.assertEqual(self.play.run(deploy.back_up)[0], 0)
        self.assert_right("one")


class KilledTest(StoryTest):
    """The next run, be it only a backup, puts right what a killed one left."""

    def after(self, status: int) -> None:
        self.assertEqual(status, -9)
        self.assert_one_release("one", "two")
        self.assertEqual(self.play.run(deploy.back_up)[0], 0)
        self.assert_right("one", "two")
        self.assertEqual(self.play.run(revision="two")[0], 0)
        self.assert_right("two")

    def test_at_every_cut_point(self) -> None:
        self.every_cut(kill, revision="two")

    def test_within_the_undo(self) -> None:
        self.every_cut(kill, revision="two", sick="two")

    def test_within_the_recovery(self) -> None:
        """Killed in the switch, and then again at every cut point of the run that takes it back."""
        _, count = self.play.run(revision="two")
        for first in range(count - 8, count + 1):
            self.again()
            self.play.run(revision="two", cut=Cut(first, kill))
            killed = self.play.copy()
            self.addCleanup(killed.remove)
            _, recovery = self.play.run(deploy.back_up)
            for at in range(1, recovery + 1):
                self.play.remove()
                self.play = killed.copy()
                with self.subTest(first=first, at=at):
                    self.play.run(deploy.back_up, cut=Cut(at, kill))
                    self.assert_one_release("one", "two")
                    self.assertEqual(self.play.run(deploy.back_up)[0], 0)
                    self.assert_right("one", "two")


class SignalledTest(StoryTest):
    def after(self, status: int) -> None:
        if status:
            self.assertEqual(status, 128 + signal.SIGTERM)
            self.assert_right("one")
        else:
            self.assert_right("two")

    def test_at_every_cut_point(self) -> None:
        found = self.every_cut(interrupt, revision="two")
        self.assertEqual(sorted(set(found)), [0, 143])
        self.assertEqual(found, sorted(found, reverse=True), "once committed, it stays so")


class RollbackTest(KilledTest):
    """The same for going back from `two` to `one`."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        assert cls.start.run(revision="two")[0] == 0

    def after(self, status: int) -> None:
        self.assertEqual(self.play.run(deploy.back_up)[0], 0)
        frozen = self.play.root / ".deploy" / "frozen"
        self.assertEqual(frozen.exists(), self.play.serving() == "one", "both, or neither")
        frozen.unlink(missing_ok=True)
        super().after(status)

    def test_at_every_cut_point(self) -> None:
        self.every_cut(kill, command=deploy.rollback)

    def test_within_the_undo(self) -> None:
        self.every_cut(kill, command=deploy.rollback, sick="one")

    def test_it_goes_back(self) -> None:
        self.assertEqual(self.play.run(deploy.rollback)[0], 0)
        self.assert_right("one")

    def test_a_sick_one_is_taken_back(self) -> None:
        self.assertEqual(self.play.run(deploy.rollback, sick="one")[0], 1)
        self.assert_right("two")
