"""The checkout's git, real git: fast-forwards that are refused or undone, locks and worktrees left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import deploy
from tests.speaking import speaking
from tests.test_running import poll

Files = Mapping[str, str | None]  # text, `-> target` for a link, None for nothing

DEEP = f"{'n' * 250}/" * 9  # a thousand of these are more than one command can be given
# (what it is, the commit that is there, the commit that comes)
CHANGES: tuple[tuple[str, Files, Files], ...] = (
    ("changed, added, removed", {"a": "1", "b": "1"}, {"a": "2", "b": None, "c/d": "2"}),
    ("a file becomes a folder", {"a": "1"}, {"a": None, "a/b/c": "2"}),
    ("a folder becomes a file", {"a/b": "1", "a/c": "1"}, {"a/b": None, "a/c": None, "a": "2"}),
    ("a folder becomes a link", {"a/b": "1"}, {"a/b": None, "a": "-> elsewhere"}),
    ("a link becomes a folder", {"a": "-> b", "b/c": "1"}, {"a": None, "a/c": "2"}),
    (
        "odd names",
        {":(top)a": "1", "-b": "1", "c d": "1"},
        {":(top)a": "2", "-b": None, ":!e": "2"},
    ),
    ("CR LF in names", {"a\r\nb": "1", "c\n": "1"}, {"a\r\nb": "2", "c\n": None, "d\r\n": "2"}),
    (
        "names that are not UTF-8",
        {"\udcff\udcfe": "1", "\udce9": "1"},
        {"\udcff\udcfe": "2", "\udce9": None},
    ),
    (
        "names longer than a command line",
        {f"{DEEP}{at}": "1" for at in range(1000)},
        {f"{DEEP}{at}": "2" for at in range(1000)},
    ),
)


class GitTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name).resolve()
        self.shown = self.enterContext(speaking())
        self.begin()

    def begin(self) -> None:
        """A new checkout."""
        self.checkout = self.root / "checkout"
        shutil.rmtree(self.checkout, ignore_errors=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        self.environment = {**kept, "HOME": str(self.root), "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(
            ["git", "init", "--quiet", "--initial-branch=main", str(self.checkout)],
            env=self.environment,
            check=True,
        )
        commands = deploy.Commands(deploy.Lock(self.checkout))
        self.git = deploy.Git(self.checkout, commands, self.environment)
        self.journal = deploy.Journal(self.root / "journal.json")

    def commit(self, files: Files) -> str:
        """Commit the files; the hash."""
        for name in sorted(files, key=lambda name: files[name] is not None):
            path, text = self.checkout / name, files[name]
            if text is None:
                path.unlink()
                for parent in path.relative_to(self.checkout).parents:
                    if parent.name and not any((self.checkout / parent).iterdir()):
                        (self.checkout / parent).rmdir()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("-> "):
                path.symlink_to(text.removeprefix("-> "))
            else:
                path.write_text(text)
        self.git("add", "--all")
        author = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        self.git(*author, "commit", "--quiet", "--allow-empty", "--message", "a commit")
        return self.git.commit("HEAD")

    def two(self, first: Files, second: Files) -> tuple[str, str]:
        """Two commits, of which the first is checked out."""
        self.begin()
        commits = self.commit({**first, "same": "1"}), self.commit(second)
        self.git("reset", "--quiet", "--hard", commits[0])
        return commits

    def undo(self, target: str) -> None:
        """Undo a fast-forward to this revision, as a run that finds it in the journal does."""
        act = {"act": "fast-forward", "target": target}
        deploy.UNDO[act["act"]](mock.Mock(git=self.git), act)

    def assert_clean(self, revision: str) -> None:
        self.assertEqual(
            (self.git.commit("HEAD"), self.git("status", "--porcelain")), (revision, "")
        )


class FastForwardTest(GitTest):
    def test_a_clean_checkout_follows_whatever_changes(self) -> None:
        for what, first, second in CHANGES:
            with self.subTest(what):
                _, there = self.two(first, second)
                self.git.check_fast_forward("main", "origin/main", there)
                self.git.fast_forward(self.journal, there)
                self.assert_clean(there)
                self.assertEqual(self.journal.begun, [])

    def test_it_is_on_the_disk_before_it_is_over(self) -> None:
        """A power cut right after it must leave the program that puts things right."""
        _, there = self.two({"a": "1"}, {"a": "2"})
        seen = []

        def sync() -> None:
            begun = [act["act"] for act in json.loads(self.journal.path.read_bytes())["begun"]]
            seen.append(((self.checkout / "a").read_text(), begun))

        with mock.patch.object(os, "sync", sync):
            self.git.fast_forward(self.journal, there)
        self.assertEqual(seen, [("2", ["fast-forward"])])

    def test_one_that_was_cut_off_is_undone_wherever(self) -> None:
        """The files are written; the index, too; or one of two files is."""
        for what, first, second in CHANGES:
            for index in (True, False):
                with self.subTest(what, index=index):
                    here, there = self.two(first, second)
                    self.git("read-tree", "--reset", "-u", there)
                    if not index:
                        self.git("read-tree", here)
                    (self.checkout / "same").write_text("by hand")
                    self.undo(there)
                    self.assertEqual((self.checkout / "same").read_text(), "by hand")
                    (self.checkout / "same").write_text("1")
                    self.assert_clean(here)
                    self.undo(there)
                    self.assert_clean(here)

    def test_what_stands_in_the_way(self) -> None:
        _, there = self.two({"a": "1", "b": "1"}, {"a": "2", "c/d": "2", "e": "2"})
        for path, text in (
            ("a", "by hand"),
            ("c", "a file"),
            ("e", "not known"),
            ("c/d", "not known"),
        ):
            with self.subTest(path):
                place = self.checkout / path
                place.parent.mkdir(exist_ok=True)
                place.write_text(text)
                with self.assertRaisesRegex(deploy.Failure, f"stand in the way: {path}$"):
                    self.git.check_fast_forward("main", "origin/main", there)
                self.assertEqual(place.read_text(), text)
                self.git("clean", "-qfdx")
                self.git("checkout", "--quiet", "--", ".")
        (self.checkout / "b").write_text("of no concern")
        self.git.check_fast_forward("main", "origin/main", there)

    def test_a_submodule_that_moves_is_no_obstacle(self) -> None:
        part = self.root / "part"
        self.addCleanup(shutil.rmtree, part)
        self.begin()
        shutil.copytree(self.checkout, part)
        there = deploy.Git(part, self.git.commands, self.environment)
        name = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        there(*name, "commit", "--quiet", "--allow-empty", "--message", "one")
        self.git(
            "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(part), "sub"
        )
        first = self.commit({})
        there(*name, "commit", "--quiet", "--allow-empty", "--message", "two")
        self.git("-C", "sub", "pull", "--quiet", str(part), "main")
        second, third = self.commit({}), self.commit({"a": "1"})
        self.git("reset", "--quiet", "--hard", first)
        for revision in (second, third):
            self.git.check_fast_forward("main", "origin/main", revision)
            self.git.fast_forward(self.journal, revision)
        self.assertEqual(self.git.commit("HEAD"), third)


class SshTest(GitTest):
    def test_the_ssh_that_was_chosen_is_the_one_that_runs(self) -> None:
        for name in ("command", "config", "program"):
            path = self.root / name
            path.write_text(f'#!/bin/sh\necho "{name}: $*" >&2\nexit 1\n')
            path.chmod(0o755)
        quiet = "-o BatchMode=yes -o ConnectTimeout=20"
        program = {"GIT_SSH": f"{self.root}/program"}
        command = {"GIT_SSH_COMMAND": f"{self.root}/command -i key"}
        for config, variables, wanted in (
            ("", program, "program: "),
            (f"{self.root}/config -i key", program, f"config: -i key {quiet}"),
            (f"{self.root}/config -i key", command | program, f"command: -i key {quiet}"),
        ):
            with self.subTest(wanted):
                self.begin()
                if config:
                    self.git("config", "core.sshCommand", config)
                there = deploy.Git(
                    self.checkout, self.git.commands, {**self.environment, **variables}
                )
                with self.assertRaises(deploy.CommandFailed) as caught:
                    there("ls-remote", "ssh://git@127.0.0.1/gforms")
                self.assertIn(wanted, caught.exception.output)


class LeftBehindTest(GitTest):
    LOCKS = (
        "index.lock",
        "HEAD.lock",
        "refs/heads/main.lock",
        "refs/remotes/origin/main.lock",
        "objects/maintenance.lock",
        "modules/part/index.lock",
        "config.lock",
    )

    def locks(self) -> list[Path]:
        found = [self.checkout / ".git" / name for name in self.LOCKS]
        for path in found:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return found

    def test_the_locks_of_a_git_that_was_cut_off(self) -> None:
        self.commit({"a": "1"})
        locks = self.locks()
        self.git.remove_stale_locks()
        self.assertEqual([path for path in locks if path.exists()], [])
        self.commit({"a": "2"})

    def test_those_of_a_git_that_works_stay(self) -> None:
        code = "import sys; print(1, flush=True); sys.stdin.read()"
        argv = [sys.executable, "-c", code, "git"]
        with subprocess.Popen(
            argv, cwd=self.checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            process.stdout.read(1)
            locks = self.locks()
            self.git.remove_stale_locks()
            self.assertTrue(all(path.exists() for path in locks))
            process.communicate(b"")

    def test_a_release_in_which_a_process_works_is_not_removed(self) -> None:
        self.commit({"a": "1"})
        release = self.root / "releases" / "20261124T100000Z-1a2b3c4"
        self.git("worktree", "add", "--quiet", "--detach", str(release))
        with subprocess.Popen(["sleep", "600"], cwd=release) as process:
            poll(lambda: deploy.is_at_work(release), "it works there")
            with self.assertRaisesRegex(deploy.Failure, "a process works in"):
                self.git.remove_worktree(release)
            self.assertTrue((release / "a").exists())
            process.kill()
        self.git.remove_worktree(release)
        self.assertEqual((release.exists(), self.git("worktree", "list").count("\n")), (False, 0))

    def test_a_worktree_that_was_cut_off_at_any_point_goes_with_all_that_git_knows_of_it(
        self,
    ) -> None:
        self.commit({"a": "1"})
        release = self.root / "releases" / "20261124T100000Z-1a2b3c4"
        known = self.checkout / ".git" / "worktrees" / release.name
        for folder, locked in ((True, True), (False, True), (True, False), (False, False)):
            with self.subTest(folder=folder, locked=locked):
                self.git("worktree", "add", "--quiet", "--detach", str(release))
                if locked:
                    (known / "locked").write_text("initializing")
                if not folder:
                    shutil.rmtree(release)
                self.git.remove_worktree(release)
                self.assertFalse(known.exists() or release.exists())


if __name__ == "__main__":
    unittest.main()
