"""The deploying workflow: its time limits, and what its summary shows of a deployment. `gh` is played here."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import textwrap
import unittest
from pathlib import Path

import deploy
from tests.lab import PROJECT, LabTest, Run
from tests.must_run import skip
from tests.workflow import SEVERAL, WORKFLOWS, Runner, shell

WORKFLOW = (PROJECT / ".github" / "workflows" / "deploy.yml").read_text()
GH = r"""case "$*" in
    "api repos/team/gforms/actions/runs/7/attempts/2/jobs --jq .jobs[] | select(.name == \"deploy\").id") echo 42;;
    "api repos/team/gforms/actions/jobs/42/logs") cat $LAB/job;;
    *) exit 1;;
esac"""
JOB = """##[group]Run appleboy/ssh-action@029f5b4aeeeb58fdfe1410a5d17f967dacf36262
  script: cd "$AWS_DEPLOY_PATH" && python3 deploy.py deploy --at "$DEPLOY_COMMIT" --wait 600
======CMD======
cd "$AWS_DEPLOY_PATH" && python3 deploy.py deploy --at "$DEPLOY_COMMIT" --wait 600
======END======
{said}
==============================================
"""


class LimitsTest(unittest.TestCase):
    """The connection is there until the tool has ended by its own limits, so that nobody waits for news in vain."""

    def limit(self, key: str) -> int:
        found = re.search(rf"(?m)^ +{key}: (\d+)m?$", WORKFLOW)
        assert found, key
        return int(found[1]) * 60

    def test_longer_than_those_of_the_tool_together(self) -> None:
        settings = deploy.Settings()
        steps = (settings.install, settings.services, settings.static, settings.migrate)
        own = sum(step.timeout * max(len(step.command), 1) for step in steps)
        own += (
            settings.pull.timeout * (settings.pull.retries + 1) + 600 * 3
        )  # worktree, submodules, fast-forward
        own += (
            settings.migrate.timeout + settings.backup.timeout * 2
        )  # the listing; a backup and its proof
        own += (
            settings.restart.timeout * 4 + settings.health.deadline * 2
        )  # the way back takes no less
        wait = re.search(r"--wait (\d+)", WORKFLOW)
        assert wait
        self.assertGreater(self.limit("command_timeout"), own + int(wait[1]))
        self.assertGreater(self.limit("timeout-minutes"), self.limit("command_timeout"))


class SummaryTest(LabTest):
    def summary(self, run: Run) -> list[str]:
        """The page after a deployment that said this, as ssh-action shows it in the job's log."""
        page, script = (
            self.lab.root / "page",
            WORKFLOW.split("- name: Summary\n")[1].split("run: |\n")[1],
        )
        said = "\n".join(f"out: {line}" for line in run.stdout.splitlines())
        lines = JOB.format(said=said).splitlines()
        (self.lab.root / "job").write_text(
            "".join(f"2026-11-23T12:00:00.1234567Z {line}\n" for line in lines)
        )
        self.lab.script("gh", GH)
        environment = self.lab.environment() | {
            "GITHUB_REPOSITORY": "team/gforms",
            "GITHUB_RUN_ID": "7",
            "GITHUB_RUN_ATTEMPT": "2",
            "GITHUB_STEP_SUMMARY": str(page),
        }
        subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", textwrap.dedent(script)],
            env=environment,
            check=True,
        )
        return page.read_text().splitlines()

    def test_the_release_the_steps_with_their_times_and_the_changes(self) -> None:
        self.lab.push({"app": "two"}, "says two")
        self.lab.script("services", "echo something long")
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        page = self.summary(run)
        wanted = [f"    {line}" for line in run.stdout.splitlines() if line[9] not in "$|"]
        self.assertEqual(page, ["### What the server said", *wanted])
        for step in ("env", "pull", "install", "services", "static", "migrate", "restart"):
            self.assertRegex("\n".join(page), rf"(?m)^    {step} +done in \d+\.\d s$")
        self.assertRegex(page[-2], r"^    deploy   commit \w+ says two$")
        self.assertRegex(page[-1], r"^    deploy   \w+-\w+ is live and healthy; it took ")

    def test_of_a_failure(self) -> None:
        self.lab.script("services", "echo why; exit 1")
        run = self.lab.deploy()
        self.assert_status(run, 1)
        sentence = self.summary(run)[-1]
        self.assertRegex(
            sentence,
            r"^    services FAILED: `services up` ended with status 1 \(why\); .* is live and ",
        )


SHA = "0123456789abcdef0123456789abcdef01234567"
# what is asked of each server, and what it answers: the number in a file of its name, 0 where there is none
SSH = """#!/bin/sh
echo "$4 $5" >> "$RUNNER_TEMP/asked"
exit "$(cat "$RUNNER_TEMP/$4 ${5%% *}" 2>/dev/null || echo 0)"
"""


class SeveralTest(unittest.TestCase):
    """The steps of the workflow for several servers; `ssh` is played here, and two servers are booted elsewhere."""

    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.runner = Runner(self.folder, SHA)
        (self.folder / "ssh").write_text(SSH)
        (self.folder / "ssh").chmod(0o755)

    def run_step(self, job: str, step: str, **variables: str) -> tuple[int, list[str]]:
        """Run a step; its exit status, and what servers were asked for."""
        asked = self.folder / "asked"
        asked.write_text("")
        done = self.runner.run(job, step, **variables)
        return done.returncode, asked.read_text().splitlines()

    def test_one_server_is_asked_for_the_commit(self) -> None:
        self.assertEqual(
            self.run_step("deploy", "Deploy", SERVER="web-1"), (0, [f"web-1 deploy {SHA}"])
        )

    def test_a_failure_is_one(self) -> None:
        for status in (1, 3, 75, 77):
            (self.folder / "web-1 deploy").write_text(str(status))
            done = self.run_step("deploy", "Deploy", SERVER="web-1")
            self.assertEqual(done, (status, [f"web-1 deploy {SHA}"]))

    def test_a_lost_connection_is_a_failure_and_what_comes_of_it_is_taken_back(self) -> None:
        (self.folder / "web-1 deploy").write_text("255")
        done = self.run_step("deploy", "Deploy", SERVER="web-1")
        self.assertEqual(done, (255, [f"web-1 deploy {SHA}", f"web-1 rollback {SHA}"]))

    def test_a_secret_that_is_not_set(self) -> None:
        for missing in ("AWS_SSH_PRIVATE_KEY", "AWS_KNOWN_HOSTS"):
            secrets = {"AWS_SSH_PRIVATE_KEY": "key", "AWS_KNOWN_HOSTS": "host"} | {missing: ""}
            self.assertEqual(self.run_step("deploy", "The way in", **secrets)[0], 1)

    def test_the_way_in_is_the_same_for_both(self) -> None:
        ways = [shell(job, "The way in") for job in ("deploy", "rollback")]
        self.assertEqual(ways[0], ways[1])

    def test_back_go_those_that_were_done_or_may_be(self) -> None:
        """Not the one that failed, which did so by itself, nor those that were not begun, nor other jobs."""
        if not shutil.which("jq"):
            skip("jq", "it is not here")
        self.runner.note(
            {"web-1": "success", "web-2": "cancelled", "web-3": "failure", "web-4": "skipped"}
        )
        wanted = [f"web-1 rollback {SHA}", f"web-2 rollback {SHA}"]
        self.assertEqual(self.run_step("rollback", "Roll back"), (0, wanted))
        (self.folder / "web-1 rollback").write_text("1")
        self.assertEqual(self.run_step("rollback", "Roll back"), (1, wanted))
        self.runner.jobs.unlink()
        self.assertNotEqual(self.run_step("rollback", "Roll back")[0], 0)

    def test_one_after_the_other_and_no_second_attempt(self) -> None:
        text = (WORKFLOWS / SEVERAL).read_text()
        self.assertRegex(text, r"(?m)^      max-parallel: 1\n      fail-fast: true\b")
        self.assertRegex(text, r"(?m)^        if: github\.run_attempt != 1$")
        failed = """contains(fromJSON('["failure", "cancelled"]'), needs.deploy.result)"""
        self.assertIn(f"always() && {failed} && github.run_attempt == 1 }}}}\n", text)
        self.assertEqual(self.run_step("deploy", "No second attempt")[0], 1)
