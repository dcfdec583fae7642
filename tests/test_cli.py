"""The command line: what it means, and that a mistake in it is exit status 2."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import deploy
from tests.speaking import speaking

DEFAULT = Path(deploy.__file__).resolve().with_name("deploy.ini")


class ParseTest(unittest.TestCase):
    def parse(self, *argv: str) -> dict[str, Any]:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                return deploy.parse_arguments(argv)
        except SystemExit:
            self.fail(f"{argv}: {said.getvalue()}")

    def assert_parsed(self, argv: str, **wanted: Any) -> None:
        found = self.parse(*argv.split())
        self.assertEqual({key: found.get(key) for key in wanted}, wanted, argv)

    def refused(self, argv: str) -> str:
        """What is said of a command line that is a mistake."""
        with (
            contextlib.redirect_stderr(io.StringIO()) as said,
            self.assertRaises(SystemExit) as end,
        ):
            deploy.parse_arguments(argv.split())
        self.assertEqual(end.exception.code, 2)
        return said.getvalue().strip()

    def test_a_slip_is_told_with_what_was_meant(self) -> None:
        for argv, meant in (
            ("--rollback", "rollback"),
            ("rolback", "rollback"),
            ("stauts --json", "status"),
            ("deploy --weit 5", "--wait"),
            ("restore a.dump --jes", "--yes"),
        ):
            with self.subTest(argv):
                self.assertTrue(self.refused(argv).endswith(f"; did you mean {meant}?"))
        self.assertNotIn("did you mean", self.refused("xyzzy"))

    def test_an_option_of_another_command_is_not_told_as_what_was_meant(self) -> None:
        said = self.refused("rollback --dry-run")
        self.assertTrue(said.endswith("error: unrecognized arguments: --dry-run"), said)

    def test_a_value_that_cannot_be_is_told_with_what_can(self) -> None:
        for argv, wanted in (
            ("deploy --wait soon", "'soon' is not a number of seconds"),
            ("freeze fair --until today", "'today' is not a time, as in 2026-12-24 18:00"),
            (
                "freeze fair --until 2026-13-24",
                "'2026-13-24' is not a time, as in 2026-12-24 18:00",
            ),
        ):
            with self.subTest(argv):
                self.assertTrue(self.refused(argv).endswith(f": {wanted}"), self.refused(argv))

    def test_help_fits_a_screen(self) -> None:
        for command in ("", *deploy.COMMANDS):
            with (
                self.subTest(command),
                contextlib.redirect_stdout(io.StringIO()) as said,
                self.assertRaises(SystemExit) as end,
            ):
                deploy.parse_arguments([*command.split(), "--help"])
            self.assertEqual(end.exception.code, 0)
            self.assertLessEqual(len(said.getvalue().splitlines()), 34)

    def test_without_a_command_it_is_deploy(self) -> None:
        self.assertEqual(self.parse(), {"command": "deploy", "config": DEFAULT})
        defaults = {"revision": "", "if_changed": False, "dry_run": False, "wait": 0}
        self.assert_parsed("deploy", command="deploy", config=DEFAULT, **defaults)

    def test_the_options_of_deploy_need_no_command(self) -> None:
        self.assert_parsed("--if-changed", command="deploy", if_changed=True)
        self.assert_parsed("--dry-run", command="deploy", dry_run=True)
        self.assert_parsed("--wait 600", command="deploy", wait=600)
        self.assert_parsed("--wait=2.5 --if-changed", command="deploy", wait=2.5, if_changed=True)

    def test_the_commands(self) -> None:
        self.assert_parsed("deploy v1.2 --wait 5", command="deploy", revision="v1.2", wait=5)
        self.assert_parsed(
            "deploy --dry-run 1a2b3c4", command="deploy", revision="1a2b3c4", dry_run=True
        )
        self.assert_parsed("rollback", command="rollback", release="", wait=0)
        self.assert_parsed(
            "rollback 20261123T071500Z-1a2b3c4 --wait 5",
            command="rollback",
            release="20261123T071500Z-1a2b3c4",
            wait=5,
        )
        self.assert_parsed("status", command="status", as_json=False)
        self.assert_parsed("history --json", command="history", as_json=True)
        self.assert_parsed("logs", command="logs", release="", follow=False)
        self.assert_parsed("logs -f", command="logs", follow=True)
        self.assert_parsed(
            "logs 20261123T071500Z --follow",
            command="logs",
            release="20261123T071500Z",
            follow=True,
        )
        self.assert_parsed("check", command="check")

    def test_what_follows_manage_is_passed_on(self) -> None:
        self.assert_parsed("manage shell", command="manage", arguments=["shell"])
        self.assert_parsed(
            "manage migrate --plan -v 2 deploy",
            command="manage",
            arguments=["migrate", "--plan", "-v", "2", "deploy"],
        )
        self.assert_parsed("manage", command="manage", arguments=[])

    def test_the_settings_file_in_all_forms(self) -> None:
        for form in (
            "-c other.ini",
            "-cother.ini",
            "-c=other.ini",
            "--config other.ini",
            "--config=other.ini",
        ):
            for rest, command in (
                ("", "deploy"),
                ("--wait 5", "deploy"),
                ("deploy v1", "deploy"),
                ("status", "status"),
                ("--if-changed", "deploy"),
            ):
                self.assert_parsed(f"{form} {rest}", config=Path("other.ini"), command=command)

    def test_the_last_settings_file_counts(self) -> None:
        self.assert_parsed(
            "-c a.ini --config=b.ini --dry-run",
            config=Path("b.ini"),
            command="deploy",
            dry_run=True,
        )

    def test_a_settings_file_with_the_name_of_a_command(self) -> None:
        self.assert_parsed("-c status", config=Path("status"), command="deploy")
        self.assert_parsed("-c status history", config=Path("status"), command="history")

    def test_usage(self) -> None:
        for argv in (
            "nonsense",
            "-x",
            "--nonsense",
            "-c",
            "--config",
            "--wait",
            "--wait soon",
            "--wait nan",
            "--wait inf",
            "--wait -1",
            "--wait 1e999",
            "deploy a b",
            "status --if-changed",
            "rollback --dry-run",
            "logs a b",
            "status x",
            "check --json",
            "--json",
        ):
            with self.subTest(argv=argv):
                with (
                    contextlib.redirect_stderr(io.StringIO()) as said,
                    self.assertRaises(SystemExit) as caught,
                ):
                    deploy.parse_arguments(argv.split())
                self.assertEqual(caught.exception.code, 2)
                self.assertIn("usage: deploy.py", said.getvalue())


class MainTest(unittest.TestCase):
    """Only `main` turns an error into a sentence and an exit status."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.path = self.folder / "deploy.ini"
        self.path.write_text("")
        self.said = io.StringIO()
        self.enterContext(mock.patch.multiple(deploy.Signals, received=0, shields=0))

    def main(self, *argv: str) -> int:
        with speaking() as said, contextlib.redirect_stderr(self.said):
            status = deploy.main(["-c", str(self.path), *argv])
        self.said.write(said.getvalue())
        return status

    def sentence(self) -> str:
        return self.said.getvalue().splitlines()[-1]

    def test_a_mistake_in_the_settings(self) -> None:
        self.path.write_text("[health]\nurrl = x\n[x]\n")
        self.assertEqual(self.main("status"), deploy.MISTAKE)
        lines = self.said.getvalue().splitlines()
        self.assertEqual(len(lines), 3)
        self.assertIn("line 2: [health] urrl is not a key; did you mean url?", lines[0])
        self.assertIn("FAILED: ", lines[2])

    def test_no_settings_file(self) -> None:
        self.path.unlink()
        self.assertEqual(self.main(), deploy.MISTAKE)
        for part in ("FAILED: ", str(self.path), "No such file or directory", "-c"):
            self.assertIn(part, self.sentence())

    def test_a_folder_that_is_no_checkout(self) -> None:
        (self.folder / ".env").write_text("A=1\n")
        (self.folder / ".env").chmod(0o600)
        self.assertEqual(self.main(), deploy.MISTAKE)
        self.assertIn("is not a git checkout", self.sentence())

    def test_an_error_that_nobody_foresaw_is_a_sentence_too(self) -> None:
        with mock.patch.object(deploy, "Site", side_effect=RuntimeError("out of luck")):
            self.assertEqual(self.main("status"), deploy.FAILED)
        self.assertIn("FAILED: RuntimeError: out of luck", self.sentence())
        self.assertNotIn("Traceback", self.said.getvalue())

    def test_a_full_disk_has_its_own_sentence(self) -> None:
        with mock.patch.object(deploy, "Site", side_effect=OSError(28, "No space left on device")):
            self.assertEqual(self.main("status"), deploy.FAILED)
        self.assertIn("the disk is full", self.sentence())

    def test_signals_have_their_status(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            interrupted = deploy.Interrupted(number)
            with mock.patch.object(deploy, "Site", side_effect=interrupted):
                self.assertEqual(self.main("status"), 128 + number)
            self.assertIn(f"ended by {number.name}", self.sentence())

    def test_a_sentence_is_one_whole_line(self) -> None:
        """Whatever is in it: what is live and what to do stand at its end."""
        what = "a\r\nb\n::error::c \x1b[2J\u2028" + "x" * 9000
        failure = deploy.Failure(what, "mend\nit")
        failure.live = "1 is live"
        with mock.patch.object(deploy, "Site", side_effect=failure):
            self.assertEqual(self.main("status"), deploy.FAILED)
        self.assertEqual(len(self.said.getvalue().splitlines()), 1)
        self.assertTrue(
            self.sentence().startswith("deploy   FAILED: a  b ::error::c "), self.sentence()[:60]
        )
        self.assertTrue(self.sentence().endswith("…; 1 is live; mend it"))
        self.assertLess(len(self.sentence()), 4096)

    def test_a_signal_while_the_interpreter_imports_is_kept(self) -> None:
        """The handlers are there before anything large is imported: never a traceback."""
        code = (
            "import runpy, signal, sys\n"
            "real, sys.argv = __import__, [sys.argv[1], 'status']\n"
            "def late(name, *rest):\n"
            "    if name == 'argparse':\n"
            "        for number in (signal.SIGHUP, signal.SIGINT): signal.raise_signal(number)\n"
            "    return real(name, *rest)\n"
            "import builtins; builtins.__import__ = late\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        checkout = self.folder / "checkout"
        (checkout / ".git").mkdir(parents=True)
        (checkout / "deploy.ini").write_text("[health]\nurl =\n[status]\nchecks = a: sleep 600\n")
        (checkout / ".env").write_text("A=1\n")
        (checkout / ".env").chmod(0o600)
        tool = shutil.copy(deploy.SCRIPT, checkout)
        run = subprocess.run(
            [sys.executable, "-c", code, str(tool)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual((run.returncode, run.stderr), (130, ""))
        self.assertIn("FAILED: ended by SIGINT", run.stdout)

    def test_a_release_is_not_taken_for_the_checkout(self) -> None:
        workspace = self.folder / "gforms" / ".deploy"
        release = workspace / "releases" / "20261124T100000Z-1a2b3c4"
        release.mkdir(parents=True)
        (workspace / "current").symlink_to(release)
        (release / ".git").write_text(f"gitdir: {self.folder}/gforms/.git/worktrees/x\n")
        for place in (release, workspace / "current"):
            self.path = place / "deploy.ini"
            self.path.write_text("")
            for command in ("backup", "status", "logs", "manage"):
                self.assertEqual(self.main(command), deploy.MISTAKE)
                self.assertIn(f"{release} is a release, not the checkout", self.sentence())
                self.assertIn(f"cd {self.folder}/gforms", self.sentence())

    def test_the_history(self) -> None:
        (self.folder / ".deploy").mkdir()
        entry = deploy.Entry(
            release="20261123T071500Z-1a2b3c4", revision="1a2b3c4" + "0" * 33, subject="größer \x1b[2J",
            command="deploy", by="me", started="20261123T071500Z", ended="2026-11-23 07:15:09 UTC",
            seconds=9.25, steps={"env": 0.01, "pull": 1.5}, result="live")  # fmt: skip
        deploy.History(self.folder / ".deploy" / "history.jsonl").record(entry)
        self.assertEqual(self.main("history"), deploy.OK)
        for part in ("20261123T071500Z", "live", "1a2b3c4 ", "größer", "9.2", "pull 1.5"):
            self.assertIn(part, self.sentence())
        self.assertEqual(self.main("history", "--json"), deploy.OK)
        self.assertEqual(json.loads(self.sentence()), vars(entry))

    def test_logs_of_nothing(self) -> None:
        self.assertEqual(self.main("logs"), deploy.FAILED)
        self.assertIn("there is no such log", self.sentence())

    def test_manage_of_nothing(self) -> None:
        self.assertEqual(self.main("manage", "shell"), deploy.FAILED)
        self.assertIn("nothing is live yet", self.sentence())
