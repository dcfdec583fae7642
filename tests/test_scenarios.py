"""What the tests of other deployment tools play, under the names that it has there."""

from __future__ import annotations

import json
import signal
import unittest

from tests.lab import LabTest


class Kamal(LabTest):
    """The integration tests of Kamal."""

    def test_deploying_a_bad_image(self) -> None:
        self.lab.push({"app": "two", "boot": "broken"})
        self.assert_failed(self.lab.deploy(), "the candidate was not proven")

    def test_acquire_release_status_of_the_lock(self) -> None:
        self.lab.deploy("freeze", "Integration Tests")
        self.assertIn("Integration Tests", self.lab.deploy("status").stdout)
        self.lab.push({"app": "two"})
        self.assert_sentence(self.lab.deploy(), 77, ["Integration Tests"])
        self.lab.deploy("thaw")
        self.assert_deployed(self.lab.deploy(), "two")

    def test_deploy_redeploy_rollback_details_and_audit(self) -> None:
        first = self.lab.linked("current")
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assert_deployed(self.lab.deploy("rollback", first), "one")
        self.assertIn(first, self.lab.deploy("status").stdout)
        lines = self.lab.deploy("history", "--json").stdout.splitlines()
        subjects = [json.loads(line)["subject"] for line in lines]
        self.assertEqual(subjects, ["says one", "a change", "says one"])

    def test_stop_and_boot_of_the_app(self) -> None:
        (self.lab.root / "serving").write_text(str(self.lab.root / "nowhere"))
        self.assertNotEqual(self.lab.deploy("status").returncode, 0)
        self.assert_status(self.lab.deploy("restart"), 0)
        self.assert_live("one")

    def test_reboot_of_the_proxy(self) -> None:
        self.lab.script("proxy", "exit 1")
        self.assertEqual(self.lab.deploy("restart").returncode, 1)
        self.assert_live("one")

    def test_maintenance_and_live(self) -> None:
        mark = self.lab.workspace / "maintenance"
        self.assert_status(self.lab.deploy("maintenance", "on"), 0)
        self.assertTrue(mark.exists())
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assert_status(self.lab.deploy("maintenance", "off"), 0)
        self.assertFalse(mark.exists())


class Capistrano(LabTest):
    """The features of Capistrano."""

    def test_checking_linked_files_missing_file(self) -> None:
        (self.lab.checkout / ".env").unlink()
        with self.nothing_touched():
            self.assert_sentence(self.lab.deploy(), 78, [".env cannot be read"])

    def test_symlink_linked_files_and_dirs(self) -> None:
        release = (self.lab.workspace / "current").resolve()
        for name in (".env", "media"):
            self.assertTrue((release / name).samefile(self.lab.checkout / name), name)

    def test_publishing(self) -> None:
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual((self.lab.workspace / "current").resolve().parent.name, "releases")

    def test_failed_releases_are_removed_and_the_current_one_is_not(self) -> None:
        self.lab.setting("deploy", "keep_releases", "1")
        self.lab.push({"app": "two", "static": "broken"})
        for _ in range(4):
            self.assert_failed(self.lab.deploy())
        self.assertEqual(self.lab.releases(), ["one"])

    def test_deploying_the_same_revision_twice(self) -> None:
        self.assert_deployed(self.lab.deploy(), "one")
        self.assertEqual(self.lab.releases(), ["one", "one"])
        self.assert_sentence(self.lab.deploy("rollback"), 1, ["no earlier healthy release"])

    def test_rollback_when_there_is_only_one_release(self) -> None:
        self.assert_failed(self.lab.deploy("rollback"), "no earlier healthy release")

    def test_the_failure_task_runs_when_a_deployment_fails(self) -> None:
        """Its counterpart is the history, which has the failure, and what is live."""
        self.lab.script("services", "exit 4")
        self.assert_failed(self.lab.deploy(), "ended with status 4")

    def test_an_interrupted_deployment(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.first("services", "block services")
        process = self.lab.blocked("services")
        process.send_signal(signal.SIGINT)
        self.assert_failed(self.lab.end(process), status=130, result="interrupted")
        self.lab.script("services", "")
        self.assert_deployed(self.lab.deploy(), "two")


class Deployer(LabTest):
    """The tests of Deployer."""

    def test_keep_releases(self) -> None:
        self.lab.setting("deploy", "keep_releases", "2")
        for text in ("two", "three", "four"):
            self.lab.push({"app": text})
            self.assert_deployed(self.lab.deploy(), text)
        self.assertEqual(self.lab.releases(), ["three", "four"])

    def test_fail_unlocks(self) -> None:
        self.lab.push({"app": "two", "health": "500"})
        self.assert_failed(self.lab.deploy())
        self.lab.push({"health": "200"})
        self.assert_deployed(self.lab.deploy(), "two")

    def test_is_locked(self) -> None:
        self.lab.first("services", "block services")
        process = self.lab.blocked("services")
        self.assert_sentence(self.lab.deploy(), 75, ["another run holds the lock: deploy by"])
        self.lab.unblock("services")
        self.assert_status(self.lab.end(process), 0)

    def test_rollback_of_a_bad_release(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.deploy()
        (self.lab.root / "sick").write_text("two")
        self.assert_deployed(self.lab.deploy("rollback"), "one")
        self.assert_sentence(self.lab.deploy(), 77, ["rolled back"])


class Dokku(LabTest):
    """The checks of Dokku."""

    def test_checks_that_fail_keep_the_old_app(self) -> None:
        self.lab.push({"app": "two", "health": "503"})
        self.assert_failed(self.lab.deploy(), "the candidate was not proven: 503")

    def test_checks_for_content(self) -> None:
        self.lab.setting("health", "contains", "tw")
        self.assert_sentence(self.lab.deploy(), 3, ["but without the text 'tw'"])
        self.assert_live("one")

    def test_listening_check(self) -> None:
        self.lab.setting("restart", "timeout", "1")
        self.lab.script("gunicorn", "exec sleep 60")
        self.assert_failed(self.lab.deploy(), "it has not started after 1 s")

    def test_checks_skipped(self) -> None:
        self.lab.setting("restart", "candidate", "")
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")

    def test_checks_run(self) -> None:
        self.assert_status(self.lab.deploy("status"), 0)
        (self.lab.root / "sick").write_text("one")
        self.assertNotEqual(self.lab.deploy("status").returncode, 0)


if __name__ == "__main__":
    unittest.main()
