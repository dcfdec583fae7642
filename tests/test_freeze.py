"""Exactly the commit that was tested, a freeze of deployments, and all that must be well at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from tests.lab import ONCE, LabTest, Run, wait_for


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

    def test_not_even_one_that_waited_for_it(self) -> None:
        self.lab.first("restart", f"{ONCE} block restart; }}")
        back = self.lab.blocked("restart", "rollback")
        waiting = self.lab.start("--wait", "60")
        self.lab.await_waiting(waiting)
        self.lab.tick()
        self.lab.unblock("restart")
        self.assert_status(self.lab.end(back), 0)
        run = self.lab.end(waiting)
        self.assert_sentence(run, 77, ("rolled back from", "nothing was touched", "thaw"))
        self.assert_live("one")
        self.assertEqual(self.lab.results(), ["live", "live", "live"])

    def cleaning_up(self) -> subprocess.Popen[str]:
        """A rollback that is in the history, and removes now what is past its keep."""
        self.lab.block_git("worktree prune")
        return self.lab.blocked("pull", "rollback")

    def test_a_signal_at_its_end(self) -> None:
        back = self.cleaning_up()
        back.send_signal(signal.SIGTERM)
        self.lab.unblock("pull")
        self.assert_deployed(self.lab.end(back), "one")
        self.assert_status(self.lab.deploy(), 77)

    def test_a_kill_at_its_end(self) -> None:
        self.lab.kill(self.cleaning_up())
        self.lab.unblock("pull")
        wait_for(lambda: not self.lab.running(), "git has ended")
        self.assert_status(self.lab.deploy(), 77)
        self.assert_live("one")

    def test_a_rollback_that_does_not_hold_leaves_the_freeze_as_it_was(self) -> None:
        for reason in ("", "the fair is on"):
            with self.subTest(reason):
                if reason:
                    self.lab.deploy("freeze", reason)
                (self.lab.root / "was-blocked").unlink(missing_ok=True)
                self.lab.block_git("log", when='[ -e "$LAB/checkout/.deploy/frozen" ]')
                back = self.lab.blocked("pull", "rollback")
                self.lab.kill(back)
                self.lab.unblock("pull")
                wait_for(lambda: not self.lab.running(), "git has ended")
                self.assertIn("rolled back from", self.lab.deploy("status").stdout)
                self.lab.tick()
                self.assert_status(self.lab.deploy("backup"), 0)
                self.assert_live("two")
                self.assertEqual("frozen" in self.lab.deploy("status").stdout, bool(reason))
        self.assert_sentence(self.lab.deploy(), 77, ["the fair is on"])

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

    def test_one_that_was_only_slow_needs_no_human(self) -> None:
        """Nor does what a deployment that fails finds well when it asks again."""
        self.lab.setting("status", "checks", "slow: slow")
        self.lab.script("slow", f"{ONCE} exit 1; }}")
        self.lab.push({"app": "two", "static": "broken"})
        self.assert_failed(self.lab.deploy(), "the static files are broken")
        self.assertTrue((self.lab.root / "was-blocked").exists())

    def test_a_service_that_runs_elsewhere(self) -> None:
        self.lab.setting("restart", "main_process", f"echo {os.getpid()}")
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.assert_sentence(run, 3, (f"the service runs in {os.getcwd()}, not in ",))

    def test_a_name_that_is_nothing_is_no_alarm(self) -> None:
        self.assert_status(self.lab.deploy("deploy", "no-such-branch"), 1)
        self.assertNotIn("no-such-branch", self.lab.deploy("check", "--quiet").stdout)


class ServicesTest(LabTest):
    """A compose file that cannot start is taken back with the release, in the checkout, where it finds all else."""

    def setUp(self) -> None:
        super().setUp()
        self.good = self.lab.push({"docker-compose.yml": "good"})
        self.lab.script(
            "services",
            """cat docker-compose.yml compose.override.yml > "$LAB/running" 2>/dev/null || true
            ! grep broken "$LAB/running" && [ "$(pwd)" = "$LAB/checkout" ]""",
        )
        self.assert_deployed(self.lab.deploy(), "one")
        self.lab.tick()

    def running(self) -> str:
        """What the services are described by, now."""
        return (self.lab.root / "running").read_text()

    def assert_own_files(self) -> None:
        """The checkout has its own compose files, whatever was there meanwhile."""
        self.assertEqual(self.lab.git("status", "--porcelain", folder=self.lab.checkout), "")

    def broken(self) -> Run:
        self.lab.push({"app": "two", "docker-compose.yml": "broken"})
        return self.lab.deploy()

    def test_the_live_release_has_its_services_again(self) -> None:
        self.assert_failed(self.broken(), "put the services back to what", "live and healthy")
        self.assertEqual(self.running(), "good")
        self.assert_own_files()

    def test_what_came_with_it_is_away(self) -> None:
        self.lab.push({"docker-compose.yml": None, "compose.override.yml": "broken"})
        self.assert_failed(self.lab.deploy(), "put the services back to what", "live and healthy")
        self.assertEqual(self.running(), "good")
        self.assert_own_files()

    def test_restart_does_not_try_what_was_taken_back(self) -> None:
        self.broken()
        self.assert_status(self.lab.deploy("restart"), 0)
        self.assertEqual(self.running(), "good")
        self.assert_own_files()

    def test_a_revision_that_is_named_has_its_own(self) -> None:
        self.broken()
        self.lab.tick()
        self.assert_deployed(self.lab.deploy("deploy", self.good), "one")
        self.assertEqual(self.running(), "good")
        self.assert_own_files()

    def test_after_a_rollback_they_are_not_older_than_the_data(self) -> None:
        """A rollback leaves them as they are, and what is taken back or restarted after it, too."""
        self.lab.push({"app": "two", "docker-compose.yml": "better"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.lab.tick()
        self.assert_deployed(self.lab.deploy("rollback", "--no-freeze"), "one")
        self.lab.tick()
        self.assert_failed(self.broken(), "put the services back to what")
        self.assertEqual(self.running(), "better")
        self.lab.tick()
        self.assert_status(self.lab.deploy("restart"), 0)
        self.assertEqual(self.running(), "better")

    def test_they_are_back_before_what_needs_them(self) -> None:
        """The release before is not well with the new ones, and needs nobody for that."""
        self.lab.script("services", 'cp docker-compose.yml "$LAB/running"')
        self.lab.setting("status", "checks", f"cache: grep --quiet good {self.lab.root}/running")
        self.assert_deployed(self.lab.deploy(), "one")
        self.lab.tick()
        self.assert_failed(self.broken(), "not all is well: cache", "put the services back")

    def test_a_kill_while_the_files_of_another_revision_are_there(self) -> None:
        self.broken()
        self.lab.tick()
        self.lab.first("services", f"{ONCE} block services; }}")
        run = self.lab.blocked("services", "deploy", self.good)
        self.assertIn("docker-compose.yml", self.lab.git("status", "-s", folder=self.lab.checkout))
        self.lab.kill(run)
        self.lab.unblock("services")
        wait_for(lambda: not self.lab.running(), "the services are up")
        self.lab.tick()
        self.assert_failed(self.lab.deploy(), "put the services back to what")
        self.assert_own_files()
        self.assertEqual(self.running(), "good")

    def test_what_was_changed_by_hand_stays(self) -> None:
        more = "".join(f"{number}\n" for number in range(20))
        self.lab.push({"docker-compose.yml": f"good\n{more}"})
        self.assert_deployed(self.lab.deploy(), "one")
        self.lab.tick()
        self.lab.push({"app": "two", "docker-compose.yml": f"broken\n{more}"})
        self.lab.deploy()
        file = self.lab.checkout / "docker-compose.yml"
        file.write_text(f"broken\n{more}by hand\n")
        self.assert_status(self.lab.deploy("restart"), 0)
        self.assertEqual(self.running(), f"good\n{more}by hand\n")
        self.assertEqual(file.read_text(), f"broken\n{more}by hand\n")

    def test_services_that_the_push_did_not_touch_are_left_alone(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "exit 1")
        run = self.lab.deploy()
        self.assert_failed(run, "`services up` ended with status 1", "live and healthy")
        self.assertNotIn("put the services back", run.stdout)
