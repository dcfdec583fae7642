"""The summary of the deploying workflow: what it shows of a deployment. `gh` is played here."""

from __future__ import annotations

import subprocess
import textwrap

from tests.lab import PROJECT, LabTest, Run

WORKFLOW = (PROJECT / ".github" / "workflows" / "deploy.yml").read_text()
GH = r"""case "$*" in
    "api repos/team/gforms/actions/runs/7/attempts/2/jobs --jq .jobs[] | select(.name == \"deploy\").id") echo 42;;
    "api repos/team/gforms/actions/jobs/42/logs") cat $LAB/job;;
    *) exit 1;;
esac"""
JOB = """##[group]Run appleboy/ssh-action@v1.0.3
  script: cd "$AWS_DEPLOY_PATH" && python3 deploy.py --wait 600
======CMD======
cd "$AWS_DEPLOY_PATH" && python3 deploy.py --wait 600
======END======
{said}
==============================================
"""


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
