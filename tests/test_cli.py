"""The command line: what it means, and that a mistake in it is exit status 2."""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import deploy

DEFAULT = Path(deploy.__file__).resolve().with_name("deploy.ini")


class ParseTest(unittest.TestCase):
    def parse(self, *argv: str) -> argparse.Namespace:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                return deploy.parse_arguments(argv)
        except SystemExit:
            self.fail(f"{argv}: {said.getvalue()}")

    def assert_parsed(self, argv: str, **wanted: Any) -> None:
        found = vars(self.parse(*argv.split()))
        self.assertEqual({key: found.get(key) for key in wanted}, wanted, argv)

    def test_without_a_command_it_is_deploy(self) -> None:
        defaults = {"revision": "", "if_changed": False, "dry_run": False, "wait": 0, "config": DEFAULT}
        self.assert_parsed("", command="deploy", **defaults)
        self.assert_parsed("deploy", command="deploy", **defaults)

    def test_the_options_of_deploy_need_no_command(self) -> None:
        self.assert_parsed("--if-changed", command="deploy", if_changed=True)
        self.assert_parsed("--dry-run", command="deploy", dry_run=True)
        self.assert_parsed("--wait 600", command="deploy", wait=600)
        self.assert_parsed("--wait=2.5 --if-changed", command="deploy", wait=2.5, if_changed=True)

    def test_the_commands(self) -> None:
        self.assert_parsed("deploy v1.2 --wait 5", command="deploy", revision="v1.2", wait=5)
        self.assert_parsed("deploy --dry-run 1a2b3c4", command="deploy", revision="1a2b3c4", dry_run=True)
        self.assert_parsed("rollback", command="rollback", release="", wait=0)
        self.assert_parsed("rollback 20261123T071500Z-1a2b3c4 --wait 5", command="rollback",
                           release="20261123T071500Z-1a2b3c4", wait=5)
        self.assert_parsed("status", command="status", json=False)
        self.assert_parsed("history --json", command="history", json=True)
        self.assert_parsed("logs", command="logs", release="", follow=False)
        self.assert_parsed("logs -f", command="logs", follow=True)
        self.assert_parsed("logs 20261123T071500Z --follow", command="logs", release="20261123T071500Z", follow=True)
        self.assert_parsed("check", command="check")

    def test_what_follows_manage_is_passed_on(self) -> None:
        self.assert_parsed("manage shell", command="manage", arguments=["shell"])
        self.assert_parsed("manage migrate --plan -v 2 deploy", command="manage",
                           arguments=["migrate", "--plan", "-v", "2", "deploy"])
        self.assert_parsed("manage", command="manage", arguments=[])

    def test_the_settings_file_in_all_forms(self) -> None:
        for form in ("-c other.ini", "-cother.ini", "-c=other.ini", "--config other.ini", "--config=other.ini"):
            for rest, command in (("", "deploy"), ("--wait 5", "deploy"), ("deploy v1", "deploy"), ("status", "status"),
                                  ("--if-changed", "deploy")):
                self.assert_parsed(f"{form} {rest}", config=Path("other.ini"), command=command)

    def test_the_last_settings_file_counts(self) -> None:
        self.assert_parsed("-c a.ini --config=b.ini --dry-run", config=Path("b.ini"), command="deploy", dry_run=True)

    def test_a_settings_file_with_the_name_of_a_command(self) -> None:
        self.assert_parsed("-c status", config=Path("status"), command="deploy")
        self.assert_parsed("-c status history", config=Path("status"), command="history")

    def test_usage(self) -> None:
        for argv in ("nonsense", "-x", "--nonsense", "-c", "--config", "--wait", "--wait soon", "deploy a b",
                     "status --if-changed", "rollback --dry-run", "logs a b", "status x", "check --json", "--json"):
            with self.subTest(argv=argv):
                with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as caught:
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
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        self.addCleanup(setattr, deploy.Interrupted, "shielded", False)

    def main(self, *argv: str) -> int:
        with contextlib.redirect_stdout(self.said), contextlib.redirect_stderr(self.said):
            return deploy.main(["-c", str(self.path), *argv])

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
            deploy.Interrupted.shielded = False
            with mock.patch.object(deploy, "Site", side_effect=lambda *_, n=number: signal.raise_signal(n)):
                self.assertEqual(self.main("status"), 128 + number)
            self.assertIn(f"ended by {number.name}", self.sentence())

    def test_a_lost_terminal_ends_nothing(self) -> None:
        signal.signal(signal.SIGHUP, lambda *_: self.fail("it is not ignored"))
        self.assertEqual(self.main("history"), deploy.OK)
        signal.raise_signal(signal.SIGHUP)
        self.assertEqual(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)

    def test_the_second_signal_does_not_skip_the_clean_up(self) -> None:
        deploy.Interrupted.install()
        with self.assertRaises(deploy.Interrupted):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    def test_the_history(self) -> None:
        workspace = deploy.Workspace(self.folder / ".deploy")
        workspace.make()
        entry = {"release": "20261123T071500Z-1a2b3c4", "revision": "1a2b3c4" + "0" * 33, "subject": "größer",
                 "command": "deploy", "by": "me", "started": "20261123T071500Z", "ended": "2026-11-23 07:15:09 UTC",
                 "seconds": 9.25, "steps": {"env": 0.01, "pull": 1.5}, "result": "live", "message": ""}
        workspace.record(entry)
        self.assertEqual(self.main("history"), deploy.OK)
        for part in ("20261123T071500Z", "live", "1a2b3c4 ", "größer", "9.2", "pull 1.5"):
            self.assertIn(part, self.sentence())
        self.assertEqual(self.main("history", "--json"), deploy.OK)
        self.assertEqual(json.loads(self.sentence()), entry)

    def test_logs_of_nothing(self) -> None:
        self.assertEqual(self.main("logs"), deploy.FAILED)
        self.assertIn("there is no such log", self.sentence())

    def test_manage_of_nothing(self) -> None:
        self.assertEqual(self.main("manage", "shell"), deploy.FAILED)
        self.assertIn("nothing is live yet", self.sentence())
