"""What is said: a lost reader changes nothing, any output is survived, and no secret is shown."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.parse
from pathlib import Path
from unittest import mock

import deploy
from tests.lab import LabTest
from tests.speaking import speaking
from tests.terminal import AGAIN, columns

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


class UnitTest(unittest.TestCase):
    """What is said, by this process."""

    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.shown = self.enterContext(speaking())

    def logged(self) -> str:
        """What stands in the log."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def on_terminal(self, columns: int = 80) -> None:
        """Have the console take its stdout for a terminal, without colours."""
        self.enterContext(mock.patch.object(deploy.Console, "terminal", True))
        self.enterContext(mock.patch.dict(os.environ, {"COLUMNS": str(columns), "NO_COLOR": "1"}))


class Saying(UnitTest):
    def test_a_line_begins_with_its_step_and_in_the_log_with_the_time(self) -> None:
        deploy.start_logging(self.folder / "log")
        deploy.say("one")
        deploy.say("two", "static")
        with deploy.console.step("pull", 0):
            deploy.log.warning("three")
        deploy.log.error("four %d")
        lines = [
            *("deploy   one", "static   two", "pull     warning: three"),
            "pull     FAILED: four %d",
        ]
        self.assertEqual(self.shown.getvalue().splitlines(), lines)
        stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC "
        for line, wanted in zip(self.logged().splitlines(), lines, strict=True):
            self.assertRegex(line, f"^{stamp}{re.escape(wanted)}$")
        self.assertEqual((self.folder / "log").stat().st_mode & 0o777, 0o600)

    def test_the_time_is_that_of_utc_wherever_the_server_is(self) -> None:
        self.addCleanup(time.tzset)
        record = logging.makeLogRecord({"msg": "x", "created": 0.0})
        with mock.patch.dict(os.environ, {"TZ": "XXX-9"}):
            time.tzset()
            line = deploy.OneLine("%(asctime)s %(message)s", deploy.MOMENT).format(record)
        self.assertEqual(line, "1970-01-01 00:00:00 UTC x")

    def test_what_is_only_for_the_log(self) -> None:
        deploy.start_logging(self.folder / "log")
        deploy.log.debug("details")
        deploy.log.info("in passing")
        self.assertEqual(self.shown.getvalue(), "deploy   in passing\n")
        self.assertIn("details\n", self.logged())

    def test_nothing_is_shown_while_it_is_hidden_but_all_is_logged(self) -> None:
        deploy.start_logging(self.folder / "log")
        deploy.console.hidden = True
        deploy.log.error("no")
        deploy.console.hidden = False
        deploy.say("yes")
        self.assertEqual(self.shown.getvalue(), "deploy   yes\n")
        self.assertIn("FAILED: no\n", self.logged())

    def test_no_control_character_gets_through_and_a_line_stays_one(self) -> None:
        deploy.start_logging(self.folder / "log")
        controls = "".join(map(chr, (*range(32), *range(127, 160), 0x2028, 0x2029)))
        text = f"a\x1b[2Jb\x1b[1;31mc\x1b[?25ld{controls}e\r\nf\x1b]0;title\x07"
        deploy.say(text)
        deploy.log.warning(text)
        self.assertEqual(deploy.clean("a\x1b[2Jb\x1b[?25lc\r\nd"), "a b c  d")
        for said in (self.shown.getvalue(), self.logged(), deploy.clean(text) + "\n" * 2):
            self.assertEqual(len(said.splitlines()), 2)
            self.assertEqual([each for each in controls if each in said.replace("\n", "")], [])
            self.assertNotIn("[2J", said)

    def test_a_secret_is_nowhere_not_even_in_a_traceback(self) -> None:
        deploy.redactor.hide({"correct horse"})
        deploy.start_logging(self.folder / "log")
        deploy.say("it is correct horse, or correct%20horse")
        try:
            raise KeyError("correct horse")
        except KeyError as error:
            failure = deploy.as_failure(error)
        deploy.log.error(failure.what)
        for said in (self.shown.getvalue(), self.logged()):
            self.assertIn("it is ***, or ***", said)
            self.assertIn("FAILED: KeyError: '***'", said)
            self.assertNotIn("correct", said)
        self.assertIn("Traceback", self.logged())
        self.assertNotIn("Traceback", self.shown.getvalue())

    def test_a_very_long_line_is_whole_in_the_log_alone(self) -> None:
        deploy.start_logging(self.folder / "log")
        deploy.say("x" * 100_000)
        self.assertEqual(self.logged().count("x"), 100_000)
        end = f"… ({100_009 - deploy.WIDTH} more characters in the log)\n"
        self.assertTrue(self.shown.getvalue().endswith(end), self.shown.getvalue()[-80:])
        self.assertEqual(self.shown.getvalue().count("x"), deploy.WIDTH - 9)

    def test_what_cannot_be_encoded_is_replaced(self) -> None:
        deploy.start_logging(self.folder / "log")
        deploy.say("a\udc80b €")
        self.assertEqual(self.shown.getvalue(), "deploy   a?b €\n")
        self.assertIn("a?b €\n", self.logged())

    def test_a_log_that_cannot_be_written_ends_nothing(self) -> None:
        (self.folder / "log").symlink_to("/dev/full")
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            deploy.start_logging(self.folder / "log")
            deploy.say("one")
            with contextlib.suppress(OSError):
                deploy.log.handlers.pop().close()
            deploy.say("two")
        self.assertEqual(self.shown.getvalue(), "deploy   one\ndeploy   two\n")
        self.assertEqual(errors.getvalue(), "")

    def test_a_closed_stdout_is_no_error(self) -> None:
        deploy.start_logging(self.folder / "log")
        with contextlib.redirect_stdout(None):
            deploy.say("said")
        self.assertEqual(self.logged().count("said"), 1)

    def test_a_reader_that_stalls_does_not_hold_a_run_up(self) -> None:
        """Ctrl-S, `| less`, a connection that is dead and was not closed."""
        code = "deploy.console.patience = 0.2\nfor _ in range(1000): deploy.say('x' * 1000)"
        command = [sys.executable, "-c", f"import deploy\ndeploy.start_logging()\n{code}"]
        with subprocess.Popen(command, cwd=Path(deploy.__file__).parent, stdout=-1) as process:
            try:
                self.assertEqual(process.wait(30), 0)
                assert process.stdout
                self.assertGreater(len(process.stdout.read()), 4096)
            finally:
                process.kill()

    def test_a_run_has_that_patience_and_a_look_has_all(self) -> None:
        self.assertIsNone(deploy.Console().patience)
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(deploy, "console") as shown:
            deploy.start_logging(Path(folder, "log"))
            deploy.log.handlers.pop().close()
        self.assertEqual(shown.patience, 20)


class OnTerminal(UnitTest):
    def frames(self) -> list[str]:
        """What was drawn, one after the other."""
        return self.shown.getvalue().split(AGAIN)[1:]

    def test_a_step_is_one_line_with_what_was_said_of_it_the_last_first(self) -> None:
        self.on_terminal()
        with deploy.console.step("static", 0):
            deploy.say("one")
            deploy.log.info("| in passing")
            deploy.log.warning("two")
        self.assertRegex(self.frames()[-1], r"^✓ static +\d+\.\d s  warning: two; one\n$")
        self.assertEqual(self.shown.getvalue().count("\n"), 1)
        deploy.say("after")
        self.assertEqual(self.frames()[-1], "static   after\n")

    def test_a_step_that_fails(self) -> None:
        self.on_terminal()
        with self.assertRaises(ZeroDivisionError), deploy.console.step("static", 0):
            raise ZeroDivisionError
        self.assertRegex(self.frames()[-1], r"^✗ static +\d+\.\d s  \n$")
        self.assertIsNone(deploy.console.line)

    def test_while_it_runs_the_line_is_drawn_again_with_its_command_and_the_usual_time(
        self,
    ) -> None:
        self.on_terminal()
        drawn = re.compile(r"  static +\d+\.\d s  [━╌]{10} usually 9000\.0 s  \| work")
        with deploy.console.step("static", 9000):
            deploy.say("note")
            deploy.log.info("| work")
            seen = deploy.wait_until(lambda: any(map(drawn.fullmatch, self.frames())), 20)
        self.assertTrue(seen, self.frames())

    def test_a_line_of_a_step(self) -> None:
        self.on_terminal(60)
        line = deploy.StepLine("pull", 10)
        line.notes = ["main is 日本語" + "の長い件名" * 9]
        for began, done in ((0, 0), (4, 4), (9.99, 9), (100, 10)):
            line.began = time.monotonic() - began
            self.assertIn(
                f"s  {'━' * done}{'╌' * (10 - done)} usually 10.0 s  main is", line.text()
            )
            for text in (line.text(), line.text("✓")):
                self.assertLessEqual(columns(text), 59)
                self.assertGreaterEqual(columns(text), 57)
                self.assertTrue(text.endswith("…"))
        line.doing = "| working"
        self.assertIn("| working", line.text())
        self.assertNotIn("working", line.text("✓"))
        self.assertNotIn("usually", line.text("✓"))
        self.assertNotIn("usually", deploy.StepLine("pull", 0).text())

    def test_colours_only_without_NO_COLOR(self) -> None:
        self.on_terminal()
        deploy.log.warning("a warning: b")
        self.assertEqual(self.frames()[-1], "deploy   warning: a warning: b\n")
        with mock.patch.dict(os.environ, {"NO_COLOR": ""}):
            deploy.log.warning("a warning: b")
        self.assertEqual(self.frames()[-1], "deploy   \x1b[33mwarning:\x1b[0m a warning: b\n")

    def test_a_pipe_gets_no_escape_sequence(self) -> None:
        with deploy.console.step("static", 5):
            deploy.say("one")
        self.assertEqual(self.shown.getvalue(), "static   one\n")

    def test_fit(self) -> None:
        for text, width, fitted in (
            *(("abc", 3, "abc"), ("abcd", 3, "ab…"), ("日本", 4, "日本"), ("日本", 3, "…")),
            *(("日本語", 5, "日…"), ("", 3, ""), ("e\u0301e", 9, "e\u0301e")),
        ):
            with self.subTest(text=text, width=width):
                self.assertEqual(deploy.fit(text, width), fitted)
                self.assertLessEqual(columns(fitted), width)


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
        self.assertEqual(sum(map(len, re.findall("x{10,}", self.lab.log()))), 3 << 20)
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
        self.lab.script(
            "services", "touch $LAB/talk; (while [ -e $LAB/talk ]; do echo talk; sleep 0.2; done) &"
        )
        run = self.lab.deploy()
        (self.lab.root / "talk").unlink()
        self.assert_deployed(run, "one")

    def test_the_last_lines_of_a_failed_command_are_shown_again(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "seq 100 199; echo why >&2; exit 1")
        run = self.lab.deploy()
        self.assert_failed(run)
        self.assertEqual(
            [run.stdout.count(f"| {line}\n") for line in ("100", "180", "181", "why")], [1, 1, 2, 2]
        )


class Secrets(LabTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.env(
            f"SECRET_KEY='{SECRET}'\nDATABASE_URL=postgres://me:hunter2hunter@db/x\nDEBUG=False\n"
        )

    def everything(self, said: str) -> str:
        """All that the tool said, and wrote for a human."""
        files = (*self.lab.workspace.glob("logs/*"), *self.lab.workspace.glob("*.json*"))
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
        self.assert_hidden(
            self.prints("\n".join([*FORMS.values(), "postgres://me:hunter2hunter@db/x"]), 1)
        )

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

    def test_in_the_address_of_a_remote(self) -> None:
        token = "ghp_0123456789abcdef"
        url = f"https://{token}@127.0.0.1:1/gforms.git"
        self.lab.git("remote", "set-url", "origin", url, folder=self.lab.checkout)
        run = self.lab.deploy()
        self.assert_sentence(run, 1, ["the remote origin cannot be reached"])
        self.assertNotIn(token, self.everything(run.stdout))

    def test_in_a_remote_that_is_an_address_of_a_submodule_or_of_insteadOf(self) -> None:
        address = "http://x:hunter2hunter@127.0.0.1:1/gforms.git"
        library = self.lab.root / "library"
        self.lab.git("init", "--quiet", "--template=", str(library))
        self.lab.push({"x": "1"}, folder=library)
        self.lab.git("submodule", "--quiet", "add", "../library", "library")
        self.lab.push({"app": "two"})
        at = {"folder": self.lab.checkout}
        self.lab.git("config", "submodule.library.url", address, **at)
        said = self.lab.deploy().stdout
        self.assertIn("Cloning into", said)
        self.lab.git("config", f"url.{address}.insteadOf", str(self.lab.author), **at)
        said += self.lab.deploy().stdout
        self.lab.git("config", "--remove-section", f"url.{address}", **at)
        self.lab.setting("pull", "remote", address)
        for command in (["check"], ["--dry-run"], []):
            said += self.lab.deploy(*command).stdout
        self.assertNotIn("hunter2", self.everything(said))

    def test_where_a_sentence_is_cut(self) -> None:
        error = f"ValueError: {'.' * 170} {SECRET}"
        self.lab.push({"app": "two"})
        self.lab.script("gunicorn", f"echo {shlex.quote(error)}; exit 1")
        run = self.lab.deploy()
        self.assertIn("ValueError", run.stdout.splitlines()[-1])
        self.assertNotIn(SECRET[:9], self.everything(run.stdout))

    def test_in_what_other_commands_say(self) -> None:
        self.lab.setting("services", "command", "services --password hunter2hunter")
        self.lab.script("services", 'echo "$SECRET_KEY"; exit 1')
        self.lab.deploy()
        commands = (["history", "--json"], ["status", "--json"], ["logs"], ["check"], ["--dry-run"])
        self.assert_hidden("\n".join(self.lab.deploy(*command).stdout for command in commands))

    def test_of_a_refused_line(self) -> None:
        self.lab.env(f'SECRET_KEY={SECRET}\nPASSWORD="{SECRET}\n{SECRET}=1\n')
        run = self.lab.deploy()
        self.assert_sentence(run, 78, [".env has 3 mistakes"])
        for part in ("ss ", "4711"):
            self.assertNotIn(part, run.stdout)

    def test_in_no_process_title(self) -> None:
        look = 'cat /proc/[0-9]*/cmdline 2> /dev/null | tr "\\0" " " >> $LAB/titles || true'
        for name in (
            "services",
            "during-collectstatic",
            "during-plan",
            "during-migrate",
            "restart",
        ):
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
