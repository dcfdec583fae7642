"""Exactly the commit that was tested, a freeze of deployments, and all that must be well at the end."""

from __future__ import annotations

import os
import time

from tests.lab import LabTest, Run


class AtTest(LabTest):
    """deploy --at: a commit of the branch, and none that is older than what is live."""

    def test_the_commit_and_no_later_one(self) -> None:
        tested = self.lab.push({"app": "two"})
        self.lab.push({"app": "three"})
        self.assert_deployed(self.lab.deploy("deploy", "--at", tested), "two")
        self.assertEqual(self.lab.head(), tested)
        self.lab.tick()
        self.assert_deployed(self.lab.deploy("--if-changed"), "three")

    def test_it_counts_for_if_changed(self) -> None:
        tested = self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy("deploy", "--at", tested[:10]), "two")
        run = self.lab.deploy("--if-changed")
        self.assertEqual((run.returncode, run.stdout), (0, ""))

    def test_of_another_branch(self) -> None:
        self.lab.git("checkout", "--quiet", "-b", "other")
        other = self.lab.push({"app": "two"})
        self.lab.git("checkout", "--quiet", "main")
        with self.nothing_touched():
            run = self.lab.deploy("deploy", "--at", other)
        self.assert_sentence(run, 1, (f"{other} is not on the branch main", "live and healthy"))

    def test_older_than_what_is_live(self) -> None:
        old = self.lab.push({"app": "two"})
        self.lab.push({"app": "three"})
        self.assert_deployed(self.lab.deploy(), "three")
        self.lab.tick()
        run = self.lab.deploy("deploy", "--at", old)
        self.assert_sentence(run, 1, (f"{old[:7]} is older than what is live",))
        self.assert_live("three")

    def test_with_a_key_that_may_only_deploy(self) -> None:
        tested = self.lab.push({"app": "two"})
        self.lab.push({"app": "three"})
        asked = f"export DEPLOY_COMMIT='{tested}'\ncd gforms && python3 deploy.py --at {tested}"
        run = self.lab.deploy("deploy", "--at", "ssh", SSH_ORIGINAL_COMMAND=asked)
        self.assert_deployed(run, "two")

    def test_a_key_with_no_commit_or_two(self) -> None:
        self.lab.push({"app": "two"})
        head = self.lab.head()
        for asked in ("", "id; reboot", f"{head} {'0' * 40}"):
            with self.subTest(asked), self.nothing_touched():
                run = self.lab.deploy("deploy", "--at", "ssh", SSH_ORIGINAL_COMMAND=asked)
                self.assert_sentence(run, 1, ("is not on the branch main",))


class BackOverSshTest(LabTest):
    """What `--at ssh` does for `rollback HASH`: a deployment of this commit is undone, and nothing else."""

    def setUp(self) -> None:
        super().setUp()
        self.one = self.lab.head()
        self.two = self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.lab.tick()

    def back(self, asked: str) -> Run:
        return self.lab.deploy("deploy", "--at", "ssh", SSH_ORIGINAL_COMMAND=asked)

    def test_the_release_before_without_a_freeze(self) -> None:
        self.assert_deployed(self.back(f"rollback {self.two}"), "one")
        self.lab.tick()
        self.assert_deployed(self.lab.deploy("deploy", "--at", self.two), "two")

    def test_what_was_live_before_and_not_what_was_rolled_back(self) -> None:
        self.assert_deployed(self.lab.deploy("rollback", "--no-freeze"), "one")
        self.lab.tick()
        three = self.lab.push({"app": "three"})
        self.assert_deployed(self.lab.deploy(), "three")
        self.lab.tick()
        self.assert_deployed(self.back(f"rollback {three}"), "one")

    def test_a_commit_that_is_not_live_or_was_so_before(self) -> None:
        for commit in ("0" * 40, self.one, self.two[:7], f"{self.two} now"):
            with self.subTest(commit):
                self.stays(f"rollback {commit}")
        self.assert_deployed(self.lab.deploy(), "two")
        self.lab.tick()
        self.stays(f"rollback {self.two}")

    def test_a_deployment_that_goes_on_is_waited_for(self) -> None:
        """Its connection was lost: whatever comes of it is undone."""
        three = self.lab.push({"app": "three"})
        self.lab.script("services", "block services")
        running = self.lab.blocked("services")
        words = ("deploy", "--at", "ssh", "--wait", "60")
        back = self.lab.start(*words, SSH_ORIGINAL_COMMAND=f"rollback {three}")
        self.lab.await_waiting(back)
        self.lab.tick()
        self.lab.unblock("services")
        self.assert_status(self.lab.end(running), 0)
        self.assert_deployed(self.lab.end(back), "two")

    def stays(self, asked: str) -> None:
        live = self.lab.linked("current")
        run = self.back(asked)
        self.assert_status(run, 0)
        self.assertIn(f"{live} is live already", run.stdout)
        self.assertEqual(self.lab.linked("current"), live)


class FreezeTest(LabTest):
    """A freeze refuses deployments, with a status of its own, until thaw or its time."""

    def test_until_it_is_thawed(self) -> None:
        self.assert_status(self.lab.deploy("freeze", "the fair is on"), 0)
        self.lab.push({"app": "two"})
        with self.nothing_touched():
            run = self.lab.deploy()
            quiet = self.lab.deploy("--if-changed")
        self.assert_sentence(run, 77, ("the fair is on", "nothing was touched", "thaw"))
        self.assertEqual((quiet.returncode, quiet.stdout), (77, ""))
        self.assertRegex(self.lab.deploy("status").stdout, "frozen +note: since .*the fair is on")
        self.assert_status(self.lab.deploy("thaw"), 0)
        self.assert_deployed(self.lab.deploy(), "two")

    def test_until_a_time(self) -> None:
        self.lab.push({"app": "two"})
        later = time.strftime("%Y-%m-%d %H:%M", time.gmtime(time.time() + 7200))
        self.lab.deploy("freeze", "a fair", "--until", later)
        self.assert_status(self.lab.deploy(), 77)
        past = self.lab.deploy("freeze", "a fair", "--until", "2026-01-02")
        self.assert_sentence(past, 2, ["2026-01-02 is past", "name a time to come"])
        self.assert_status(self.lab.deploy(), 77)
        note = self.lab.workspace / "frozen"
        note.write_text(note.read_text().replace(later, "2026-01-02"))
        self.assert_deployed(self.lab.deploy(), "two")

    def test_a_secret_in_its_reason(self) -> None:
        self.lab.env("SECRET_KEY=correct-horse-battery\n")
        self.lab.deploy("freeze", "the key correct-horse-battery is out")
        run = self.lab.deploy()
        self.assert_status(run, 77)
        self.assertIn("the key *** is out", run.stdout)


class FreezeAfterRollbackTest(LabTest):
    deployed = ("one", "two")

    def test_the_next_push_does_not_bring_it_back(self) -> None:
        run = self.lab.deploy("rollback")
        self.assert_deployed(run, "one")
        self.assertRegex(run.stdout, r"deployments are frozen: rolled back from \S+; .* thaw")
        self.assert_status(self.lab.deploy(), 77)

    def test_unless_it_was_said(self) -> None:
        self.assert_deployed(self.lab.deploy("rollback", "--no-freeze"), "one")
        self.lab.tick()
        self.assert_deployed(self.lab.deploy(), "two")


class TruthTest(LabTest):
    """Exit status 0 means that all that `status` asks is well, from the release's own processes."""

    def test_a_check_that_fails_takes_the_release_back(self) -> None:
        check = "page: sh -c 'grep --quiet one app'"  # it runs in what is live
        self.lab.setting("status", "checks", check)
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.assert_failed(run, "not all is well: page: ", "live and healthy")

    def test_what_the_restart_itself_breaks_is_seen(self) -> None:
        """It was well until then, and is again on the way back."""
        self.lab.script("service", '! grep -qx two "$LAB/restarted"')
        self.lab.script(
            "slowly", 'restart; cp "$LAB/checkout/.deploy/current/app" "$LAB/restarted"'
        )
        self.lab.setting("status", "checks", "service: service")
        self.lab.setting("restart", "command", "\n    true\n    slowly\n    true")
        (self.lab.root / "restarted").touch()
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.assert_failed(run, "not all is well: service: ", "live and healthy")

    def test_what_is_sick_on_the_old_release_too_needs_a_human(self) -> None:
        self.lab.setting("status", "checks", "page: false")
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.assert_sentence(run, 3, ("not all is well: page: ", "NOT healthy: page: "))
        self.assert_live("one")

    def test_a_service_that_runs_elsewhere(self) -> None:
        self.lab.setting("restart", "main_process", f"echo {os.getpid()}")
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.assert_sentence(run, 3, (f"the service runs in {os.getcwd()}, not in ",))

    def test_a_name_that_is_nothing_is_no_alarm(self) -> None:
        self.assert_status(self.lab.deploy("deploy", "no-such-branch"), 1)
        self.assertNotIn("no-such-branch", self.lab.deploy("check", "--quiet").stdout)


class ServicesTest(LabTest):
    """A compose file that cannot start is taken back with the release."""

    def test_the_live_release_has_its_services_again(self) -> None:
        self.lab.push({"docker-compose.yml": "good"})
        self.lab.script(
            "services", 'cp docker-compose.yml "$LAB/running"; grep -q good "$LAB/running"'
        )
        self.assert_deployed(self.lab.deploy(), "one")
        self.lab.tick()
        self.lab.push({"app": "two", "docker-compose.yml": "broken"})
        run = self.lab.deploy()
        self.assert_failed(run, "put the services back to what", "live and healthy")
        self.assertEqual((self.lab.root / "running").read_text(), "good")

    def test_services_that_the_push_did_not_touch_are_left_alone(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "exit 1")
        run = self.lab.deploy()
        self.assert_failed(run, "`services up` ended with status 1", "live and healthy")
        self.assertNotIn("put the services back", run.stdout)
