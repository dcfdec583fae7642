"""The shell of the workflows, for tests that run it as GitHub would."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[1] / ".github" / "workflows"


def shell(workflow: str, job: str, step: str) -> list[str]:
    """The command line that runs the script of a step, as GitHub does it without a `shell`."""
    text = (WORKFLOWS / workflow).read_text()
    found = re.search(rf"(?ms)^  {job}:\n(.*?)(?=^  \S|\Z)", text)
    assert found, f"{workflow} has no job {job}"
    parts = re.split(r"(?m)^      - name: ", found[1])
    named = [part for part in parts if part.startswith(f"{step}\n")]
    assert len(named) == 1, f"{workflow}: {job} has {len(named)} steps {step!r}"
    script = re.search(r"(?m)^        run: \|\n((?:          .*\n|\n)+)", named[0])
    assert script, f"{step} runs nothing"
    return ["bash", "-e", "-c", textwrap.dedent(script[1])]
