"""A terminal shows a line a step, redrawn in place, and what changed; a pipe the same words, plain."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import deploy
from tests.lab import PROJECT, LabTest
from tests.terminal import Terminal, columns

HISTORY = (PROJECT / "docs" / "history.md").read_text()
FIELDS = [
    "release",
    "revision",
    "subject",
    "command",
    "by",
    "started",
    "ended",
    "seconds",
    "steps",
    "result",
    "message",
    "state",
    "live",
    "inputs",
    "requests",
    "errors",
    "slowest",
]
SECRET = "hunter2 hunter2"
STEP = r"^[✓✗] (\w+) +\d+\.\d s  "


def lock(**versions: str) -> str:
    """A Pipfile.lock with these packages."""
    packages = {name: {"version": f"=={version}"} for name, version in versions.items()}
    return json.dumps({"_meta": {"requires": {}}, "default": packages})


class TerminalTest(LabTest):
    def terminal(self, **variables: str) -> Terminal:
        """Deploy on a terminal, to the end."""
        terminal = Terminal(self.lab, variables=variables)
        terminal.status = terminal.end()
        return terminal

    def steps(self, terminal: Terminal) -> list[str]:
        """The steps that have a line at the end."""
        return [found[1] for line in terminal.screen() if (found := re.match(STEP, line))]

    def test_one_line_a_step_and_then_what_changed(self) -> None:
        self.lab.push(
            {
                "app": "two",
                "Pipfile.lock": lock(django="5.2"),
                "migrations": "app.0001_first\napp.0002_second\n",
            },
            "says two",
        )
        self.lab.script("services", "echo working")
        terminal = self.terminal()
        self.assertEqual(terminal.status, 0, terminal.raw)
        screen = terminal.screen()
        self.assertEqual(self.steps(terminal), list(deploy.STEP_NAMES))
        self.assertRegex(screen[1], "says two$")
        self.assertEqual([line[:5] for line in screen if re.match(r"\w+ +[|$] ", line)], [])
        self.assertEqual(
            [re.sub(r"\b[0-9a-f]{7,}\b", "HASH", line) for line in screen[7:-1]],
            [
                "deploy   commit HASH says two",
                "deploy   migration app.0002_second",
                "deploy   package django: none -> 5.2",
            ],
        )
        self.assertRegex(
            screen[-1], r"is live and healthy; it took \d+\.\d s; see http://127\.0\.0\.1:\d+/$"
        )
        self.assert_live("two")

    def test_while_a_step_runs_its_line_says_what_it_does_and_how_long_that_usually_takes(
        self,
    ) -> None:
        self.lab.script("services", "echo working; block services")
        terminal = Terminal(self.lab)
        terminal.await_text("| working")
        terminal.await_text("━")
        self.lab.await_blocked("services", terminal.process)
        self.lab.unblock("services")
        self.assertEqual(terminal.end(), 0)
        self.assertRegex(
            "\n".join(terminal.frames()),
            r"  services +\d\.\d s  ━{10} usually \d+\.\d s  \| working",
        )
        self.assertNotIn("working", "\n".join(terminal.screen()))

    def test_a_secret_is_in_no_line(self) -> None:
        self.lab.env(f"SECRET_KEY='{SECRET}'\n")
        self.lab.script("services", 'echo "it is $SECRET_KEY"; block services')
        terminal = Terminal(self.lab)
        terminal.await_text("it is ***")
        self.lab.await_blocked("services", terminal.process)
        self.lab.unblock("services")
        self.assertEqual(terminal.end(), 0)
        self.assertNotIn(SECRET, terminal.raw)

    def test_colours_only_without_NO_COLOR(self) -> None:
        self.assertIn("\x1b[32m✓", self.terminal().raw)
        self.assertNotIn("\x1b[3", self.terminal(NO_COLOR="1").raw)

    def test_a_dumb_terminal_is_a_pipe(self) -> None:
        self.lab.script("services", "echo working")
        ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        for terminal in (self.terminal(TERM="dumb"), self.terminal(**ascii_alone)):
            self.assertEqual(terminal.status, 0)
            self.assertNotIn("\x1b", terminal.raw)
            self.assertIn("services | working\r\n", terminal.raw)
            self.assertNotIn("✓", terminal.raw)

    def test_no_line_of_a_step_is_wider_than_the_terminal(self) -> None:
        self.lab.push({"app": "two"}, "日本語の長い件名です。これは四十桁にも六十桁にも入りません")
        for width, shown in ((40, "main is"), (60, "日本語")):
            self.lab.script(
                "services", "echo a line that is longer than forty columns are; block services"
            )
            terminal = Terminal(self.lab, columns=width)
            self.lab.await_blocked("services", terminal.process)
            terminal.await_text("  services ")
            self.lab.unblock("services")
            self.assertEqual(terminal.end(), 0)
            frames = [frame for frame in terminal.frames() if re.match(r"[ ✓✗] ", frame)]
            self.assertGreater(len(frames), 7)
            self.assertLess(max(map(columns, frames)), width)
            self.assertIn(shown, "\n".join(frames))

    def test_the_last_lines_of_a_command_only_when_it_fails(self) -> None:
        self.lab.script("services", "seq 100 199; echo why; exit 1")
        terminal = self.terminal()
        self.assertEqual(terminal.status, 1)
        shown = "\n".join(terminal.screen())
        self.assertEqual(
            [f"| {line}\n" in shown for line in ("100", "180", "181", "why")],
            [False, False, True, True],
        )
        self.assertRegex(shown, r"(?m)^✗ services ")
        self.assertRegex(terminal.screen()[-1], r"^services FAILED: .*is live and healthy; ")
        self.assertIn("| 100", self.lab.log())

    def test_nothing_in_a_commit_moves_the_cursor(self) -> None:
        self.lab.push({"app": "two"}, "a\x1b[2Jb\x1b]0;title\x07c")
        raw = self.terminal().raw
        for harmful in ("\x1b[2J", "\x1b]", "\x07"):
            self.assertNotIn(harmful, raw)

    def test_a_terminal_that_hangs_up_changes_nothing(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "echo working; block services; echo after")
        terminal = Terminal(self.lab)
        terminal.await_text("| working")
        self.lab.await_blocked("services", terminal.process)
        terminal.hang_up()
        self.lab.unblock("services")
        self.assertEqual(terminal.process.wait(60), 0)
        self.assert_live("two")
        self.assertIn("| after", self.lab.log())

    def test_the_new_version_of_the_tool_goes_on_in_the_same_form(self) -> None:
        self.lab.push({"deploy.py": (self.lab.author / "deploy.py").read_text() + "\n# newer\n"})
        terminal = self.terminal()
        self.assertEqual(terminal.status, 0, terminal.raw)
        self.assertEqual(self.steps(terminal), ["env", *deploy.STEP_NAMES])
        self.assertIn("starting over as the new version", "\n".join(terminal.screen()))


class Changes(LabTest):
    """What a deployment says of its changes, in a pipe."""

    def changes(self, *arguments: str) -> list[str]:
        """The lines before the last, as far as they are the run's own."""
        run = self.lab.deploy(*arguments)
        self.assert_status(run, 0)
        lines = [line for line in run.stdout.splitlines() if line.startswith("deploy   ")]
        self.assertIn("is live and healthy", lines.pop())
        return [re.sub(r"\b[0-9a-f]{7,}\b", "HASH", line[9:]) for line in lines]

    def test_nothing_when_nothing_changed(self) -> None:
        self.assertEqual(self.changes(), [])

    def test_commits_are_counted_when_there_are_many(self) -> None:
        for number in range(13):
            self.lab.push({}, f"change {number}")
        self.assertEqual(
            self.changes(),
            [*(f"commit HASH change {12 - each}" for each in range(10)), "and 3 more"],
        )

    def test_packages(self) -> None:
        self.lab.push({"Pipfile.lock": lock(a="1", b="1", c="1")}, "some")
        self.assertEqual(
            self.changes(), ["commit HASH some", *(f"package {each}: none -> 1" for each in "abc")]
        )
        self.lab.push({"Pipfile.lock": lock(a="1", b="2", d="1")}, "others")
        self.assertEqual(
            self.changes(),
            [
                "commit HASH others",
                "package b: 1 -> 2",
                "package c: 1 -> none",
                "package d: none -> 1",
            ],
        )

    def test_a_rollback_takes_back(self) -> None:
        self.lab.push({"app": "two", "Pipfile.lock": lock(a="1")}, "says two")
        self.changes()
        self.lab.tick()
        self.assertEqual(
            self.changes("rollback", "--no-freeze")[1:],
            ["commit taken back HASH says two", "package a: 1 -> none"],
        )

    def test_against_what_was_live_not_what_failed(self) -> None:
        self.lab.push({"app": "two", "health": "500"}, "bad")
        self.assert_status(self.lab.deploy(), 1)
        self.lab.push({"health": "200"}, "good")
        self.assertEqual(self.changes(), ["commit HASH good", "commit HASH bad"])

    def test_a_lock_file_that_cannot_be_read_is_a_warning(self) -> None:
        (self.lab.workspace / "current" / "Pipfile.lock").write_text("{}")
        self.assertIn("warning", "\n".join(self.changes()))
        self.assert_live("one")


class History(LabTest):
    """What `history` shows to eyes and to programs."""

    deployed = ("one", "two")

    def test_a_terminal_gets_a_table_as_wide_as_it_is(self) -> None:
        self.lab.push(
            {"app": "three", "health": "500"}, "says three, and is very, very, very ill indeed"
        )
        self.lab.deploy(SSH_CONNECTION="192.0.2.7 1 192.0.2.8 22")
        self.lab.tick()
        self.lab.deploy("rollback")
        for width in (40, 80, 120):
            terminal = Terminal(self.lab, "history", columns=width)
            self.assertEqual(terminal.end(), 0)
            lines = terminal.screen()
            self.assertEqual(len(lines), 4)
            self.assertLess(max(map(columns, lines)), width)
        entry = self.lab.history()[2]
        self.assertRegex(
            lines[2],
            rf"^{entry['started']}  failed       {entry['revision'][:7]}  +\d+\.\d s  ssh       "
            r"[eipsSmr]{12,} +says three",
        )
        self.assertRegex(lines[3], r"^\w+  rollback     \w{7} .* s  \S+ +r{14,}  says one$")

    def test_a_pipe_gets_it_plain_and_uncut(self) -> None:
        subject = "says three " + "at great length " * 20
        self.lab.push({"app": "three"}, subject.strip())
        self.lab.deploy()
        run = self.lab.deploy("history", COLUMNS="40")
        self.assertRegex(
            run.stdout.splitlines()[-1], rf"{subject.strip()}  \(env \d.* restart \d+\.\d\)$"
        )
        self.assertNotIn("\x1b", run.stdout)

    def test_the_fields_for_programs_are_those_of_the_readme(self) -> None:
        lines = self.lab.deploy("history", "--json").stdout.splitlines()
        table = HISTORY.split("`history --json`")[-1].split("\n\n")[1]
        documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
        self.assertEqual(documented, FIELDS)
        for line in lines:
            self.assertEqual(list(json.loads(line)), FIELDS)

    def test_a_failed_step_has_its_time(self) -> None:
        self.lab.script("services", "exit 1")
        self.lab.deploy()
        self.assertEqual(
            list(self.lab.history()[-1]["steps"]), ["env", "pull", "install", "services"]
        )


class Closed(LabTest):
    def test_a_closed_stdout_changes_nothing(self) -> None:
        self.lab.push({"app": "two"})
        run = subprocess.run(
            ["sh", "-c", f"exec {sys.executable} -S deploy.py >&-"],
            cwd=self.lab.checkout,
            text=True,
            env=self.lab.environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assert_live("two")
