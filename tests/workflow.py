"""The shell of the workflows, run as GitHub would; `gh`, which knows how the jobs of a run ended, is played."""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[1] / ".github" / "workflows"
SEVERAL = "deploy-several.yml"
GH = """#!/bin/sh
[ "$1 $2 $3" = "api repos/team/gforms/actions/runs/7/attempts/1/jobs?per_page=100 --jq" ] && jq -r "$4" "$JOBS"
"""


def shell(job: str, step: str) -> list[str]:
    """The command line that runs a step of the workflow for several servers, as GitHub does it."""
    found = re.search(rf"(?ms)^  {job}:\n(.*?)(?=^  \S|\Z)", (WORKFLOWS / SEVERAL).read_text())
    assert found, f"{SEVERAL} has no job {job}"
    parts = re.split(r"(?m)^      - name: ", found[1])
    named = [part for part in parts if part.startswith(f"{step}\n")]
    assert len(named) == 1, f"{SEVERAL}: {job} has {len(named)} steps {step!r}"
    script = re.search(r"(?m)^        run: \|\n((?:          .*\n|\n)+)", named[0])
    assert script, f"{step} runs nothing"
    return ["bash", "-e", "-c", textwrap.dedent(script[1])]


class Runner:
    """A machine of GitHub's that runs the steps of one run: a folder, and how to get where it stands."""

    def __init__(self, folder: Path, sha: str, into: Sequence[str] = ()) -> None:
        """Play `gh` in the folder, which is first in PATH."""
        self.folder, self.into, self.jobs = folder, into, folder / "jobs"
        (folder / "gh").write_text(GH)
        (folder / "gh").chmod(0o755)
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "JOBS": str(self.jobs),
            "GITHUB_REPOSITORY": "team/gforms",
            "GITHUB_RUN_ID": "7",
            "GITHUB_SHA": sha,
            "RUNNER_TEMP": str(folder),
        }

    def run(self, job: str, step: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a step to its end."""
        return subprocess.run(
            [*self.into, *shell(job, step)], env=self.environment | variables, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=300,
        )  # fmt: skip

    def note(self, conclusions: Mapping[str, str]) -> None:
        """Have GitHub know how `Deploy` ended on these servers; other jobs have no such step."""
        jobs: list[dict[str, object]] = [
            {"name": name, "steps": [{"name": "Deploy", "conclusion": said}]}
            for name, said in conclusions.items()
        ]
        jobs += [{"name": "none", "steps": []}, {"name": "tests", "steps": [{"name": "Tests"}]}]
        self.jobs.write_text(json.dumps({"jobs": jobs}))
