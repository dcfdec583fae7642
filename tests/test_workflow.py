"""The deploying workflow: its time limits, and what its summary shows of a deployment. `gh` is played here."""

from __future__ import annotations

import re
import subprocess
import textwrap
import unittest

import deploy
from tests.lab import PROJECT, LabTest, Run

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
