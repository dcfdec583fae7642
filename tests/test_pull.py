"""What stands in the way of a pull is told apart, and nothing is touched."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile
from collections import Counter
from pathlib import Path

import deploy
from tests.lab import LabTest
from tests.must_run import skip

DOCS = Path(deploy.__file__).parent / "docs" / "server.md"
PROJECT = '[project]\nname = "site"\nversion = "1"\nrequires-python = ">=3.11"\n'
WHEEL = "part-1-py3-none-any.whl"
METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: part\nVersion: 1\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "part.py,,\n",
}


class RefusedPull(LabTest):
    """Each has a sentence of its own; afterwards the checkout and the live release are as before."""

    def refused(self, *parts: str, arguments: tuple[str, ...] = ()) -> None:
        with self.nothing_touched():
            run = self.lab.deploy(*arguments)
        self.assert_failed(run, "pull ", *parts)

    def remedied(self) -> None:
        self.assert_deployed(self.lab.deploy(), "two")

    def obey(self, before: str) -> None:
        """Do what the sentence says after these words of it, word for word."""
        said = self.lab.log().splitlines()[-1]
        command = shlex.split(said.rpartition(before)[2])
        self.lab.git(*command[1:], folder=self.lab.checkout)

    def put_away(self) -> None:
        """Put the changes away as the sentence says; then it works."""
        self.obey("put them away: ")
        self.remedied()

    def test_diverged(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.push({"local": ""}, folder=self.lab.checkout)
        self.refused("main in", "origin/main diverged", "git reset --keep ")
        self.obey("needed: ")
        self.remedied()

    def test_diverged_from_an_address(self) -> None:
        address = self.lab.git("remote", "get-url", "origin", folder=self.lab.checkout).strip()
        self.lab.setting("pull", "remote", address)
        self.lab.push({"app": "two"})
        self.lab.push({"local": ""}, folder=self.lab.checkout)
        self.refused(f"{address}/main diverged", "git reset --keep ")
        self.obey("needed: ")
        self.remedied()

    def test_force_pushed(self) -> None:
        self.lab.git("commit", "--quiet", "--amend", "--allow-empty", "--message", "another")
        there = self.lab.git("rev-parse", "--short=7", "HEAD")
        self.refused("origin/main diverged", f"git reset --keep {there}")

    def test_changed_file(self) -> None:
        self.lab.push({"app": "two"})
        (self.lab.checkout / "app").write_text("by hand")
        uploaded = self.lab.checkout / "media" / "upload"  # which git does not ignore here
        uploaded.write_text("of a user")
        self.refused("changes in", "stand in the way: app;", "git stash push --all -- app")
        self.put_away()
        self.assertEqual(uploaded.read_text(), "of a user")

    def test_untracked_file(self) -> None:
        self.lab.push({"app": "two", "added": "by git"})
        (self.lab.checkout / "added").write_text("by hand")
        self.refused("stand in the way: added;")
        self.put_away()

    def test_ignored_file(self) -> None:
        (self.lab.author / ".gitignore").write_text(".env\nmedia/\n")
        self.lab.push({"app": "two", "settings.local": "by git"})
        (self.lab.checkout / "settings.local").write_text("by hand")
        self.refused("stand in the way: settings.local;")
        self.put_away()

    def test_untracked_folder_where_a_file_comes(self) -> None:
        self.lab.push({"app": "two", "data": "by git"})
        (self.lab.checkout / "data").mkdir()
        (self.lab.checkout / "data" / "by hand").write_text("")
        self.refused("stand in the way: data")

    def test_untracked_file_where_a_folder_comes(self) -> None:
        self.lab.push({"app": "two", "data/file": "by git"})
        (self.lab.checkout / "data").write_text("by hand")
        self.refused("stand in the way: data")

    def test_detached_head(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.git("checkout", "--quiet", "--detach", folder=self.lab.checkout)
        self.refused("is not on the branch main", f"git -C {self.lab.checkout} checkout main")
        self.lab.git("checkout", "--quiet", "main", folder=self.lab.checkout)
        self.remedied()

    def test_another_branch(self) -> None:
        self.lab.git("checkout", "--quiet", "-b", "other", folder=self.lab.checkout)
        self.refused("is not on the branch main", "checkout main")

    def test_a_tag_with_the_name_of_the_branch_is_not_the_branch(self) -> None:
        for folder in (self.lab.author, self.lab.checkout):
            with self.subTest(folder=folder.name):
                self.lab.git("tag", "--force", "main", folder=folder)
                self.lab.tick()
                self.lab.push({"app": folder.name})
                self.assert_deployed(self.lab.deploy(), folder.name)

    def test_stale_index_lock(self) -> None:
        self.lab.push({"app": "two"})
        stale = self.lab.checkout / ".git" / "index.lock"
        stale.touch()
        self.refused("another git is at work", f"rm {stale}")
        stale.unlink()
        self.remedied()

    def test_unreachable_remote(self) -> None:
        self.lab.git("remote", "set-url", "origin", "/nowhere", folder=self.lab.checkout)
        self.refused("the remote origin cannot be reached", "git ls-remote origin")

    def test_missing_remote(self) -> None:
        self.lab.git("remote", "remove", "origin", folder=self.lab.checkout)
        self.refused("no remote origin")

    def test_missing_branch(self) -> None:
        self.lab.setting("pull", "branch", "maain")
        self.refused("the remote origin has no branch maain", "mend [pull] branch")

    def test_unknown_revision(self) -> None:
        self.refused(
            "there is no revision 0123abc", "that was pushed", arguments=("deploy", "0123abc")
        )

    def test_revision_that_looks_like_an_option(self) -> None:
        self.refused("there is no revision", arguments=("deploy", "--", "--all"))


class Pull(LabTest):
    def test_what_was_fetched_survives_a_power_cut(self) -> None:
        """Git tells how often it had the disk keep what it wrote: objects, and the checkout's index."""
        told = self.lab.root / "told"
        with open(self.lab.root / "home" / ".gitconfig", "a", encoding="utf-8") as settings:
            settings.write(f"[trace2]\neventTarget = {told}\n")
        self.lab.push({"app": "two"})
        told.unlink()
        self.assert_deployed(self.lab.deploy(), "two")
        events = [json.loads(line) for line in told.read_text().splitlines()]
        names = {each["sid"]: each["name"] for each in events if each["event"] == "cmd_name"}
        kept = Counter(names[each["sid"]] for each in events if each.get("category") == "fsync")
        self.assertGreater(kept["unpack-objects"], 0)
        self.assertGreater(kept["merge"], 0)

    def test_a_change_by_hand_that_is_not_in_the_way_stays(self) -> None:
        self.lab.push({"app": "two"})
        (self.lab.checkout / "static").write_text("by hand")
        (self.lab.checkout / "notes").write_text("by hand")
        self.assert_deployed(self.lab.deploy(), "two")
        texts = {(self.lab.checkout / name).read_text() for name in ("static", "notes")}
        self.assertEqual(
            (texts, (self.lab.workspace / "current" / "static").read_text()), ({"by hand"}, "")
        )

    def test_what_was_removed_is_gone(self) -> None:
        self.lab.push({"app": "two", "old": ""})
        self.assert_deployed(self.lab.deploy(), "two")
        self.lab.push({"app": "three", "old": None})
        self.assert_deployed(self.lab.deploy(), "three")
        self.assertFalse((self.lab.checkout / "old").exists())


class Revision(LabTest):
    """`deploy REVISION` deploys it and leaves the checkout on its branch."""

    deployed = ("one", "two")

    def setUp(self) -> None:
        super().setUp()
        self.first, self.second = (entry["revision"] for entry in self.lab.history())

    def takes(self, revision: str, text: str) -> None:
        self.assert_deployed(self.lab.deploy("deploy", revision), text)
        self.assertEqual(self.lab.head(), self.second)
        self.assertEqual(self.lab.git("branch", "--show-current", folder=self.lab.checkout), "main")

    def test_an_older_commit(self) -> None:
        self.takes(self.first[:8], "one")

    def test_a_tag(self) -> None:
        self.lab.git("tag", "v0", self.first)
        self.takes("v0", "one")

    def test_a_tag_that_is_on_no_branch(self) -> None:
        self.lab.push({"app": "three"})
        self.lab.git("tag", "--annotate", "--message", "v", "v1")
        self.lab.git("reset", "--quiet", "--hard", "HEAD~1")
        self.takes("v1", "three")

    def test_another_branch(self) -> None:
        self.lab.git("checkout", "--quiet", "-b", "feature/x")
        for text in ("three", "four"):
            self.lab.push({"app": text})
            self.takes("feature/x", text)

    def test_another_branch_where_the_clone_knows_one(self) -> None:
        """As after git clone --depth or --single-branch; what was removed there is not deployed from memory."""
        only = "+refs/heads/main:refs/remotes/origin/main"
        self.lab.git("config", "remote.origin.fetch", only, folder=self.lab.checkout)
        self.lab.git("checkout", "--quiet", "-b", "feature/x")
        self.lab.push({"app": "three"})
        self.takes("feature/x", "three")
        self.lab.git("checkout", "--quiet", "main")
        self.lab.git("branch", "--quiet", "-D", "feature/x")
        run = self.lab.deploy("deploy", "feature/x")
        self.assert_sentence(run, 1, ["there is no revision feature/x", "live and healthy"])


class Submodules(LabTest):
    def test_they_are_checked_out_in_each_release(self) -> None:
        part = self.lab.root / "part"
        self.lab.git("init", "--quiet", "--initial-branch=main", str(part), folder=self.lab.root)
        for text in ("part one", "part two"):
            self.lab.push({"part": text}, folder=part)
            if text == "part one":
                self.lab.git("submodule", "--quiet", "add", str(part), "part")
            self.lab.git("pull", "--quiet", "origin", "main", folder=self.lab.author / "part")
            self.lab.push({"app": text})
            self.assert_deployed(self.lab.deploy(), text)
            self.assertEqual((self.lab.workspace / "current" / "part" / "part").read_text(), text)
        self.assert_only_good_releases()

    def test_one_that_cannot_be_had(self) -> None:
        part = self.lab.root / "part"
        self.lab.git("init", "--quiet", "--initial-branch=main", str(part), folder=self.lab.root)
        self.lab.push({"part": "x"}, folder=part)
        self.lab.git("submodule", "--quiet", "add", str(part), "part")
        self.lab.push({"app": "two"})
        shutil.rmtree(part)
        with self.nothing_touched():
            run = self.lab.deploy()
        self.assert_failed(run, "pull ", "submodule update")


class Install(LabTest):
    """What the install step needs and does not find."""

    def test_no_lock_file(self) -> None:
        self.lab.push({"app": "two", "Pipfile.lock": None})
        self.assert_failed(
            self.lab.deploy(), "install", "this revision has no Pipfile.lock", "run pipenv lock"
        )

    def test_not_a_lock_file(self) -> None:
        for text in ("<<<<<<< HEAD", "[]", "{}"):
            with self.subTest(text):
                self.lab.push({"app": "two", "Pipfile.lock": text})
                self.assert_failed(
                    self.lab.deploy(), "Pipfile.lock is not a lock file", "run pipenv lock"
                )

    def test_no_pipenv(self) -> None:
        (self.lab.bin / "pipenv").unlink()
        usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/snap/bin"
        if shutil.which("pipenv", path=usual):  # deploy.py would find it
            self.lab.setting("install", "command", "pipenv-of-nowhere install")
        self.lab.push({"app": "two", "Pipfile.lock": '{"_meta": {}}'})
        tools = Path(self.lab.bin)
        for name in ("git", "sh", "readlink", "mv", "true", "mkdir", "ln", "echo"):
            (tools / name).symlink_to(shutil.which(name) or name)
        run = self.lab.deploy(PATH=str(tools))
        name, remedy = (
            ("pipenv-of-nowhere", "install it")
            if shutil.which("pipenv", path=usual)
            else ("pipenv", "sudo apt-get install pipenv")
        )
        self.assert_failed(run, "install", f"{name} is not installed, or not in PATH", remedy)

    def test_no_python(self) -> None:
        self.lab.push(
            {"app": "two", "Pipfile.lock": '{"_meta": {"requires": {"python_version": "3.99"}}}'}
        )
        self.assert_failed(
            self.lab.deploy(),
            "install",
            "python3.99 is not on this server",
            "sudo apt-get install python3.99",
        )

    def test_another_lock_has_an_environment_of_its_own(self) -> None:
        self.lab.push({"app": "two", "Pipfile.lock": '{"_meta": {}, "default": {}}'})
        self.assert_deployed(self.lab.deploy(), "two")
        environments = {path.resolve() for path in self.lab.workspace.glob("releases/*/.venv")}
        self.assertEqual(len(environments), 2)

    def test_a_lock_that_does_not_know_the_pipfile_finds_no_environment(self) -> None:
        """A package in the Pipfile, and nobody ran pipenv lock: pipenv refuses that, if it is asked."""
        self.lab.push({"Pipfile": "[packages]\nredis = '*'\n"})
        self.lab.script("pipenv", "exit 1")
        self.assert_failed(self.lab.deploy(), "Pipfile.lock is stale")

    def test_a_lock_of_packages_in_the_release_has_an_environment_for_each_release(self) -> None:
        for text in ("two", "three"):
            lock = '{"_meta": {}, "default": {"part": {\n"editable": true, "path": "./part"}}}'
            self.lab.push({"app": text, "Pipfile.lock": lock})
            self.assert_deployed(self.lab.deploy(), text)
            self.lab.tick()
        environments = {path.resolve() for path in self.lab.workspace.glob("releases/*/.venv")}
        self.assertEqual(len(environments), 3)

    def test_a_python_that_the_pipfile_does_not_ask_for(self) -> None:
        self.lab.script("python3.98", "echo 3.98")
        self.lab.setting("install", "python", "python3.98")
        lock = '{"_meta": {"requires": {"python_version": "3.99"}}}'
        self.lab.push({"app": "two", "Pipfile.lock": lock})
        self.assert_failed(
            self.lab.deploy(),
            "install",
            "[install] python is Python 3.98, and the Pipfile asks for 3.99; ",
            "empty [install] python",
        )

    def test_another_lock_than_that_of_pipenv(self) -> None:
        self.lab.script("uv", 'mkdir -p "$VIRTUAL_ENV/bin"; cp "$LAB/python" "$2/bin"')
        self.lab.push({"app": "two", "Pipfile": None, "Pipfile.lock": None, "uv.lock": ""})
        self.assert_failed(self.lab.deploy(), "this revision has no Pipfile.lock")
        self.lab.setting("install", "lock", "uv.lock\ncommand = uv {python} {venv}")
        self.assert_deployed(self.lab.deploy(), "two")


class OtherTools(LabTest):
    """uv, Poetry and pip themselves, with the lines of docs/server.md."""

    def get(self, name: str) -> None:
        """Put a tool into the PATH of the deployments, from an environment of its own."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.addCleanup(shutil.rmtree, folder)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [f"{folder}/bin/pip", "install", "--quiet", name],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                skip("sandbox", f"{command}: {done.stdout}{done.stderr}")
        self.lab.script(name, f'exec {folder}/bin/{name} "$@"')
        self.tool = f"{folder}/bin/{name}"

    def lock(self, *arguments: str) -> None:
        """Make a lock as the author does."""
        command = [self.tool, *arguments]
        done = subprocess.run(
            command, cwd=self.lab.author, capture_output=True, text=True, check=False
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def settings(self, name: str) -> None:
        """Write the section of docs/server.md that has this lock."""
        found = re.search(rf"(?s)```ini\n\[install\]\nlock = ({name}.*?)\n```", DOCS.read_text())
        assert found, name
        self.lab.setting("install", "lock", found[1])

    def environment(self) -> Path:
        """That of the live release."""
        environment = (self.lab.workspace / "current" / ".venv").resolve()
        self.assertEqual(environment.parent, self.lab.workspace / "venvs")
        return environment

    def test_uv(self) -> None:
        self.get("uv")
        (self.lab.author / "pyproject.toml").write_text(PROJECT)
        self.lock("lock", "--offline")
        self.settings("uv.lock")
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.lab.tick()
        self.assertIn("uv = ", (self.environment() / "pyvenv.cfg").read_text())
        lock = (self.lab.author / "uv.lock").read_text()
        stale = f'{PROJECT}dependencies = ["nothing-of-this-name"]\n'
        self.lab.push({"pyproject.toml": stale, "uv.lock": f"{lock}# another\n"})
        self.assert_failed(self.lab.deploy(), "install", "`uv sync --locked --no-dev`", live="two")

    def test_poetry(self) -> None:
        self.get("poetry")
        with zipfile.ZipFile(self.lab.author / WHEEL, "w") as wheel:
            wheel.writestr("part.py", "")
            for name, text in METADATA.items():
                wheel.writestr(f"part-1.dist-info/{name}", text)
        wanted = (
            f'dependencies = ["part"]\n[tool.poetry.dependencies]\npart = {{path = "{WHEEL}"}}\n'
        )
        (self.lab.author / "pyproject.toml").write_text(PROJECT + wanted)
        self.lock("lock")
        self.settings("poetry.lock")
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertTrue(list(self.environment().glob("lib/*/site-packages/part.py")))

    def test_pip(self) -> None:
        self.settings("requirements.txt")
        self.lab.push({"app": "two", "requirements.txt": "# nothing\n"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertTrue((self.environment() / "bin" / "pip").exists())


class LocalPackages(unittest.TestCase):
    """The patterns by which a lock is told that takes packages from the release's own folder."""

    def test_locks(self) -> None:
        for text, is_local in (
            ('        "part": {\n            "path": "./part"', True),
            ('            "file": "./part.tar.gz",', True),
            ('            "file": "https://a.example.com/part.whl",', False),
            ('source = { editable = "part" }', True),
            ('source = { directory = "part" }', True),
            ('source = { virtual = "." }', False),
            ('source = { registry = "https://a.example.com/simple" }', False),
            ('[package.source]\ntype = "directory"', True),
            ("django==6.0.2", False),
            ("-e ./part", True),
            ("-r base.txt", True),
            ("./part", True),
            ("part @ file:///srv/part", True),
            ("part @ https://a.example.com/part.whl", False),
            ("--index-url https://a.example.com/simple", False),
        ):
            with self.subTest(text):
                self.assertEqual(bool(deploy.LOCAL.search(text)), is_local)
