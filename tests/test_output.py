"""What is said: a lost reader changes nothing, any output is survived, and no secret is shown."""
from __future__ import annotations

import json
import re
import shlex
import signal
import urllib.parse

from tests.lab import LabTest

SECRET = 'pä/ss "w\\ö&r=d# 4711'
FORMS = {
    "plain": SECRET,
    "repr": repr(SECRET),
    "ascii": ascii(SECRET),
    "json": json.dumps(SECRET),
    "json with its letters": json.dumps(SECRET, ensure_ascii=False),
    "url": urllib.parse.quote(SECRET),
    "url without slash": urllib.parse.quote(SECRET, safe=""),
    "form": urllib.parse.quote_plus(SECRET),
    "shell": shlex.quote(SECRET),
}


class LostOutput(LabTest):
    def test_a_reader_that_hangs_up_changes_nothing(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "echo before; block services; echo after")
        process = self.lab.blocked("services")
        assert process.stdout
        process.stdout.close()
        self.lab.unblock("services")
        self.assertEqual(process.wait(60), 0)
        self.assert_live("two")
        for line in ("| before", "| after", "restart  done in", "is live and healthy; it took"):
            self.assertIn(line, self.lab.log())

    def test_a_lost_connection_changes_nothing(self) -> None:
        """As sshd ends it: the terminal hangs up, then nobody reads."""
        self.lab.push({"app": "two"})
        self.lab.script("services", "block services")
        process = self.lab.blocked("services")
        assert process.stdout
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        self.lab.unblock("services")
        self.assertEqual(process.wait(60), 0)
        self.assert_live("two")

    def test_a_failure_that_nobody_reads_is_in_the_log(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "block services; exit 5")
        process = self.lab.blocked("services")
        assert process.stdout
        process.stdout.close()
        self.lab.unblock("services")
        self.assertEqual(process.wait(60), 1)
        self.assertIn("FAILED: `services up` ended with status 5", self.lab.log())
        self.assert_live("one")


class AnyOutput(LabTest):
    def test_a_line_of_three_megabytes_without_an_end(self) -> None:
        self.lab.script("services", "head -c 3145728 /dev/zero | tr '\\0' x")
        run = self.lab.deploy()
        self.assert_deployed(run, "one")
        self.assertEqual(sum(map(len, re.findall("x{100,}", self.lab.log()))), 3 << 20)
        self.assertLess(max(map(len, run.stdout.splitlines())), 1 << 16)

    def test_bytes_that_are_no_text(self) -> None:
        self.lab.script("services", "head -c 100000 /dev/urandom; printf '\\377\\0\\r\\nend\\n'")
        run = self.lab.deploy()
        self.assert_deployed(run, "one")
        self.assertIn("| end", run.stdout)

    def test_what_a_command_leaves_running_does_not_hold_the_step(self) -> None:
        self.lab.script("services", "block services & echo started")
        run = self.lab.deploy()
        self.assertTrue((self.lab.root / "blocked-services").exists() or "started" in run.stdout)
        self.assertIn("block services", " ".join(self.lab.running().values()))
        self.lab.unblock("services")
        self.assert_deployed(run, "one")
        self.assertIn("| started", run.stdout)

    def test_what_a_command_leaves_talking_does_not_hold_the_step(self) -> None:
        self.lab.setting("services", "timeout", "4")
        self.lab.script("services", "touch $LAB/talk; (while [ -e $LAB/talk ]; do echo talk; sleep 0.2; done) &")
        run = self.lab.deploy()
        (self.lab.root / "talk").unlink()
        self.assert_deployed(run, "one")

    def test_the_last_lines_of_a_failed_command_are_shown_again(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "seq 100 199; echo why >&2; exit 1")
        run = self.lab.deploy()
        self.assert_failed(run)
        self.assertEqual([run.stdout.count(f"| {line}\n") for line in ("100", "180", "181", "why")], [1, 1, 2, 2])


class Secrets(LabTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.env(f"SECRET_KEY='{SECRET}'\nDATABASE_URL=postgres://me:hunter2hunter@db/x\nDEBUG=False\n")

    def everything(self, said: str) -> str:
        """All that the tool said, and wrote for a human."""
        files = (*self.lab.workspace.glob("logs/*"), self.lab.workspace / "history.jsonl", self.lab.workspace / "lock")
        return "\n".join([said, *(path.read_text() for path in files)])

    def assert_hidden(self, output: str) -> None:
        self.assertIn("***", output)
        for name, form in FORMS.items():
            with self.subTest(name):
                self.assertNotIn(form.strip("'\""), output)
        self.assertNotIn("hunter2", output)

    def prints(self, text: str, status: int) -> str:
        """Deploy with a command that prints the text; all that was said."""
        (self.lab.root / "text").write_text(text)
        self.lab.script("services", f"cat $LAB/text; exit {status}")
        return self.everything(self.lab.deploy().stdout)

    def test_of_a_failing_command_in_any_form(self) -> None:
        self.assert_hidden(self.prints("\n".join([*FORMS.values(), "postgres://me:hunter2hunter@db/x"]), 1))

    def test_in_the_middle_of_a_line_of_three_megabytes(self) -> None:
        filler = "." * ((1 << 20) - len(SECRET.encode()) // 2)
        self.assert_hidden(self.prints(f"{filler}{SECRET}{filler}{SECRET}{filler}{SECRET}", 1))

    def test_across_the_place_where_the_sentence_cuts_a_line(self) -> None:
        for length in (190, 195):
            said = self.prints("." * length + SECRET, 1)
            self.assertNotIn(SECRET[:5], said)

    def test_on_stderr_of_the_backup(self) -> None:
        self.lab.push({"migrations": "app.0001_first\napp.0002_second\n"})
        self.lab.setting("backup", "command", "sh -c 'echo \"$SECRET_KEY\" >&2; exit 1'")
        self.assert_hidden(self.everything(self.lab.deploy().stdout))

    def test_of_a_candidate_that_does_not_boot(self) -> None:
        self.lab.script("gunicorn", 'echo "$SECRET_KEY"; exit 1')
        self.assert_hidden(self.everything(self.lab.deploy().stdout))

    def test_that_stands_in_a_command_of_the_settings(self) -> None:
        self.lab.setting("services", "command", "services --password hunter2hunter")
        self.lab.script("services", "exit 1")
        self.assert_hidden(self.everything(self.lab.deploy().stdout))

    def test_that_is_what_the_page_must_hold(self) -> None:
        self.lab.setting("health", "contains", "hunter2hunter")
        self.assert_hidden(self.everything(self.lab.deploy().stdout))

    def test_in_what_other_commands_say(self) -> None:
        self.lab.setting("services", "command", "services --password hunter2hunter")
        self.lab.script("services", 'echo "$SECRET_KEY"; exit 1')
        self.lab.deploy()
        commands = (["history", "--json"], ["status", "--json"], ["logs"], ["check"], ["--dry-run"])
        self.assert_hidden("\n".join(self.lab.deploy(*command).stdout for command in commands))

    def test_of_a_refused_line(self) -> None:
        self.lab.env(f"SECRET_KEY={SECRET}\nPASSWORD=\"{SECRET}\n{SECRET}=1\n")
        run = self.lab.deploy()
        self.assert_sentence(run, 78, [".env has 3 mistakes"])
        for part in ("ss ", "4711"):
            self.assertNotIn(part, run.stdout)

    def test_in_no_process_title(self) -> None:
        look = 'cat /proc/[0-9]*/cmdline 2> /dev/null | tr "\\0" " " >> $LAB/titles || true'
        for name in ("services", "during-collectstatic", "during-plan", "during-migrate", "restart"):
            if name.startswith("during"):
                self.lab.script(name, look)
            else:
                self.lab.first(name, look)
        self.lab.push({"migrations": "app.0001_first\napp.0002_second\n"})
        self.assert_deployed(self.lab.deploy(), "one")
        titles = (self.lab.root / "titles").read_text(errors="replace")
        self.assertGreater(titles.count("deploy.py"), 4)
        for secret in (SECRET, "hunter2"):
            self.assertNotIn(secret, titles)
