"""The summary of the deploying workflow: what its step shows of a deployment, and that it never does harm."""
from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap

from tests.lab import PROJECT, LabTest, Run

WORKFLOW = (PROJECT / ".github" / "workflows" / "deploy.yml").read_text()
SSH = '''#!{python} -IS
import os, re, subprocess, sys
lab = os.environ["LAB"]
options = dict(word.split("=", 1) for word in sys.argv if "=" in word and word[0].isupper())
open(lab + "/called", "w").write(open(options["UserKnownHostsFile"]).read())
key = sys.argv[sys.argv.index("-i") + 1]
assert os.stat(key).st_mode & 0o777 == 0o600 and open(key).read() == "the private key\\n"
assert options["StrictHostKeyChecking"] == "yes" and sys.argv[-2] == "ubuntu@gforms.example.com"
if os.path.exists(lab + "/refused"):
    sys.exit("Permission denied (publickey).")
command = sys.argv[-1]
if os.path.exists(lab + "/forced"):
    os.environ["SSH_ORIGINAL_COMMAND"] = command
    command = open(lab + "/forced").read()
sys.exit(subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL).returncode)
'''


class SummaryTest(LabTest):
    def setUp(self) -> None:
        super().setUp()
        if not shutil.which("ssh-keygen"):
            self.skipTest("ssh-keygen is not installed")
        self.assertRegex(WORKFLOW, r"name: Summary\n +if: always\(\)\n +continue-on-error: true\n")
        self.script = textwrap.dedent(WORKFLOW.split("name: Summary\n")[1].split("run: |\n")[1])
        self.fingerprints = [self.host_key(name) for name in ("good", "bad")]
        self.lab.script("ssh-keyscan", '[ "$3" = gforms.example.com ]; echo "# gforms.example.com:22 SSH-2.0" >&2; '
                                       "sed 's/^/gforms.example.com /' $LAB/bad.pub $LAB/good.pub")
        self.lab.script("ssh", SSH.replace("{python}", sys.executable))
        self.lab.script("python3", f'exec {sys.executable} -S "$@"')

    def host_key(self, name: str) -> str:
        """Make a key of a host; its fingerprint."""
        path = str(self.lab.root / name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
        said = subprocess.run(["ssh-keygen", "-l", "-f", path], capture_output=True, text=True, check=True).stdout
        return said.split()[1]

    def summary(self, fingerprint: str = "") -> tuple[Run, str]:
        """Run the step as GitHub runs it; how it ended, and what the page shows."""
        page = self.lab.root / "page"
        page.write_text("")
        environment = self.lab.environment() | {
            "AWS_HOST": "gforms.example.com", "AWS_USERNAME": "ubuntu", "AWS_SSH_PRIVATE_KEY": "the private key",
            "AWS_HOST_FINGERPRINT": fingerprint or self.fingerprints[0], "AWS_DEPLOY_PATH": str(self.lab.checkout),
            "GITHUB_STEP_SUMMARY": str(page)}
        run = subprocess.run(["bash", "-e", "-c", self.script], env=environment, cwd=self.lab.root, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        return run, page.read_text()

    def test_the_release_the_steps_with_their_times_and_the_changes(self) -> None:
        self.lab.push({"app": "two"}, "says two")
        self.lab.script("services", "echo something long")
        self.assert_deployed(self.lab.deploy(), "two")
        run, page = self.summary()
        self.assertEqual((run.returncode, run.stdout), (0, ""))
        for step in ("env", "pull", "install", "services", "static", "migrate", "restart"):
            self.assertRegex(page, rf"(?m)^    {step} +done in \d+\.\d s$")
        self.assertRegex(page, r"(?m)^    deploy   commit \w+ says two$")
        self.assertRegex(page, r"(?m)^    deploy   \w+-\w+ is live and healthy; it took ")
        self.assertNotIn("something long", page)
        self.assertNotIn("$ ", page)
        self.assertEqual((self.lab.root / "called").read_text().split()[2],
                         (self.lab.root / "good.pub").read_text().split()[1])
        self.assertEqual(len((self.lab.root / "called").read_text().splitlines()), 1)

    def test_of_a_failure(self) -> None:
        self.lab.script("services", "echo why; exit 1")
        self.assert_status(self.lab.deploy(), 1)
        page = self.summary()[1]
        self.assertRegex(page, r"(?m)^    services FAILED: `services up` ended with status 1 \(why\); .* is live and ")

    def test_a_server_with_another_key_is_not_logged_in_to(self) -> None:
        run, page = self.summary("SHA256:something")
        self.assertEqual((run.returncode, page), (0, ""))
        self.assertIn("::warning::No summary: ", run.stdout)
        self.assertFalse((self.lab.root / "called").exists())

    def test_a_server_that_refuses_fails_no_job(self) -> None:
        (self.lab.root / "refused").touch()
        run, _ = self.summary()
        self.assertEqual(run.returncode, 0)
        self.assertIn("::warning::No summary: ", run.stdout)

    def test_a_key_that_may_only_deploy_does_not_deploy_again(self) -> None:
        readme = (PROJECT / "README.md").read_text()
        forced = re.search(r'restrict,command="([^"]*)"', readme)
        assert forced
        command = forced[1].replace("/home/ubuntu/gforms", shlex.quote(str(self.lab.checkout)))
        (self.lab.root / "forced").write_text(command)
        self.lab.push({"app": "two"})
        run, page = self.summary()
        self.assertEqual(run.returncode, 0)
        self.assertIn("is live and healthy", page)
        self.assert_live("one")
        self.assertEqual(len(self.lab.history()), 1)
