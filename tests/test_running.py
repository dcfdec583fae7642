"""Running commands: what they write arrives whole and in order, and none of them outlives its time."""
from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deploy

ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"}

# Ignores SIGTERM, and starts a grandchild that does too; the numbers of both are in the file named.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
both = [os.getpid(), os.fork() or os.getpid()]
if both[1] != os.getpid():
    with open(sys.argv[1] + ".part", "w") as file:
        file.write(" ".join(map(str, both)))
    os.rename(sys.argv[1] + ".part", sys.argv[1])
    print("ready")
time.sleep(600)
"""


def poll(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Wait until the condition holds; its value."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.01)
    return found


def gone(process: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class RunningTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.output = deploy.Output()
        self.runner = deploy.Runner(self.output)
        self.shown = io.StringIO()
        redirected = contextlib.redirect_stdout(self.shown)
        redirected.__enter__()
        self.addCleanup(redirected.__exit__, None, None, None)

    def run_python(self, code: str, *arguments: str, timeout: float = 60, quiet: bool = False,
                   stdout: int | None = None) -> str:
        argv = [sys.executable, "-c", code, *arguments]
        return self.runner.run(argv, self.folder, ENVIRONMENT, timeout, quiet, stdout)

    def failure(self, code: str, timeout: float = 60, quiet: bool = False) -> deploy.CommandFailed:
        with self.assertRaises(deploy.CommandFailed) as caught:
            self.run_python(code, timeout=timeout, quiet=quiet)
        return caught.exception

    def lines(self) -> list[str]:
        """What the command wrote, as it was shown."""
        return [line.partition("| ")[2] for line in self.shown.getvalue().split("\n") if line[9:].startswith("| ")]


class OutputOfCommandsTest(RunningTest):
    def test_the_command_is_shown_before_its_lines_which_keep_their_order(self) -> None:
        self.run_python("for i in range(2000): print(i)")
        shown = self.shown.getvalue().splitlines()
        self.assertTrue(shown[0].startswith(f"deploy   $ {sys.executable} -c "), shown[0])
        self.assertEqual(self.lines(), [str(i) for i in range(2000)])

    def test_stdout_and_stderr_arrive_in_the_order_in_which_they_were_written(self) -> None:
        self.run_python("import sys\nfor i in range(500): print(i, file=(sys.stdout, sys.stderr)[i % 2], flush=True)")
        self.assertEqual(self.lines(), [str(i) for i in range(500)])

    def test_a_quiet_one_shows_nothing_and_gives_its_stdout_alone(self) -> None:
        found = self.run_python("import sys; print('a'); print('x', file=sys.stderr); print('\\n b ')", quiet=True)
        self.assertEqual(found, "a\n\n b ")
        self.assertEqual(self.shown.getvalue(), "")

    def test_a_quiet_one_is_in_the_log_with_both_streams(self) -> None:
        self.output.open_log(self.folder / "log")
        self.run_python("import sys; print('one'); print('two', file=sys.stderr)", quiet=True)
        log = (self.folder / "log").read_text(encoding="utf-8")
        self.assertIn("| one\n", log)
        self.assertIn("| two\n", log)
        self.assertEqual(self.shown.getvalue(), "")
        if self.output.log:
            self.output.log.close()

    def test_what_a_quiet_one_gives_is_not_masked_because_it_is_not_shown(self) -> None:
        """A password that is also an application's name must not hide that application's migrations."""
        self.output.hide({"admin"})
        self.assertEqual(self.run_python("print('admin.0004_more')", quiet=True), "admin.0004_more")

    def test_what_is_shown_and_logged_is_masked(self) -> None:
        self.output.hide({"correct-horse-battery"})
        self.output.open_log(self.folder / "log")
        failure = self.failure("print('it is correct-horse-battery'); raise SystemExit(1)")
        with contextlib.suppress(deploy.CommandFailed):
            self.run_python("print('it is correct-horse-battery'); raise SystemExit(1)", quiet=True)
        for line in failure.details:
            self.output.say(line)
        if self.output.log:
            self.output.log.close()
        for text in (self.shown.getvalue(), (self.folder / "log").read_text(encoding="utf-8")):
            self.assertIn("it is ***", text)
            self.assertNotIn("correct-horse-battery", text)

    def test_no_part_of_a_secret_is_in_a_failure_wherever_it_cuts_a_line(self) -> None:
        """Its text is in the history too, and a part of a secret is not recognised there."""
        self.output.hide({"correct-horse-battery"})
        for quiet in (False, True):
            for before in (*range(0, 201, 50), 180, 190):
                code = f"import sys; sys.exit('-' * {before} + 'correct' + '-horse-battery')"
                failure = self.failure(code, quiet=quiet)
                self.assertNotIn("correct-", " ".join((failure.what, *failure.details)))

    def test_a_secret_is_found_wherever_a_very_long_line_is_cut(self) -> None:
        self.output.hide({"correct-horse-battery"})
        with mock.patch.object(deploy, "PIECE", 4096):
            self.run_python("print('correct-horse-battery,' * 2000)")
        text = "".join(self.lines())
        self.assertGreater(text.count("***"), 100)
        for part in ("correct", "horse", "battery"):
            self.assertNotIn(part, text)

    def test_a_large_output_is_captured_whole(self) -> None:
        found = self.run_python("for i in range(20_000): print(f'{i:01023d}')", quiet=True)
        self.assertEqual(len(found), 20_000 * 1024 - 1)
        self.assertEqual([int(line) for line in found.split("\n")], list(range(20_000)))

    def test_a_very_long_line_survives(self) -> None:
        length = 3 * deploy.PIECE + 17
        self.output.open_log(self.folder / "log")
        self.run_python(f"print('x' * {length}); print('end')")
        if self.output.log:
            self.output.log.close()
        log = (self.folder / "log").read_text(encoding="utf-8")
        self.assertEqual(log.partition("| ")[2].count("x"), length)
        self.assertEqual(self.lines()[-1], "end")
        self.assertLess(max(map(len, self.shown.getvalue().splitlines())), 65_536)

    def test_what_has_no_newline_at_its_end_is_shown_too(self) -> None:
        self.run_python("import sys; sys.stdout.write('a\\nb')")
        self.assertEqual(self.lines(), ["a", "b"])

    def test_windows_line_ends_are_taken_off(self) -> None:
        self.run_python("import sys; sys.stdout.write('a\\r\\nb\\r\\n')")
        self.assertEqual(self.lines(), ["a", "b"])

    def test_invalid_utf_8_is_replaced(self) -> None:
        self.run_python("import sys; sys.stdout.buffer.write(b'gr\\xf6\\xdfe \\xe2\\x82\\xac\\n')")
        self.assertEqual(self.lines(), ["gr\ufffd\ufffde €"])

    def test_stdout_into_a_descriptor(self) -> None:
        with open(self.folder / "dump", "wb") as file:
            found = self.run_python("import sys; sys.stdout.buffer.write(bytes(range(256))); print(1, file=sys.stderr)",
                                    stdout=file.fileno())
        self.assertEqual((self.folder / "dump").read_bytes(), bytes(range(256)))
        self.assertEqual(found, "")

    def test_stderr_beside_a_descriptor_is_shown(self) -> None:
        with open(self.folder / "dump", "wb") as file, self.assertRaises(deploy.CommandFailed) as caught:
            self.run_python("import sys; sys.exit('cannot dump')", stdout=file.fileno())
        self.assertEqual(self.lines(), ["cannot dump"])
        self.assertIn("| cannot dump", caught.exception.details)


class CircumstancesTest(RunningTest):
    def test_no_shell_reads_the_arguments(self) -> None:
        found = self.run_python("import sys; print(sys.argv[1:])", "$HOME", "a b", "*", "; id", "", quiet=True)
        self.assertEqual(found, "['$HOME', 'a b', '*', '; id', '']")

    def test_the_folder_and_the_environment_are_those_given(self) -> None:
        found = self.run_python("import os; print(os.getcwd()); print(sorted(os.environ))", quiet=True)
        folder, names = found.split("\n")
        self.assertEqual(folder, str(self.folder))
        self.assertLessEqual(set(ENVIRONMENT), set(names.strip("[]").replace("'", "").split(", ")))
        self.assertNotIn("HOME", names)

    def test_stdin_is_empty_whatever_is_typed(self) -> None:
        reading, writing = os.pipe()
        os.write(writing, b"typed")
        os.close(writing)
        saved = os.dup(0)
        os.dup2(reading, 0)
        try:
            found = self.run_python("import sys; print(repr(sys.stdin.read()))", quiet=True)
        finally:
            os.dup2(saved, 0)
            for each in (saved, reading):
                os.close(each)
        self.assertEqual(found, "''")

    def test_it_is_a_group_and_a_session_of_its_own(self) -> None:
        found = self.run_python("import os; print(os.getpid() == os.getpgid(0) == os.getsid(0))", quiet=True)
        self.assertEqual(found, "True")

    def test_descriptors_are_closed_but_for_those_to_inherit(self) -> None:
        code = ("import os, sys\nfor each in map(int, sys.argv[1:]):\n"
                " try: os.fstat(each); print('open')\n except OSError: print('closed')")
        with open(self.folder / "a", "w") as lock, open(self.folder / "b", "w") as other:
            self.runner.inherited = (lock.fileno(),)
            found = self.run_python(code, str(lock.fileno()), str(other.fileno()), quiet=True)
        self.assertEqual(found, "open\nclosed")

    def test_a_program_is_looked_for_in_the_path_of_its_environment(self) -> None:
        script = self.folder / "bin" / "hello"
        script.parent.mkdir()
        script.write_text("#!/bin/sh\necho hello\n")
        script.chmod(0o755)
        found = self.runner.run(["hello"], self.folder, {"PATH": f"{script.parent}:/usr/bin:/bin"}, 60, quiet=True)
        self.assertEqual(found, "hello")


class FailuresTest(RunningTest):
    def test_the_folder_the_command_the_status_and_the_last_20_lines(self) -> None:
        failure = self.failure("for i in range(50): print(i)\nraise SystemExit(7)")
        self.assertEqual(failure.status, deploy.FAILED)
        self.assertIn("ended with status 7", failure.what)
        self.assertIn(sys.executable, failure.what)
        self.assertIn(str(self.folder), failure.details[0])
        self.assertIn("status 7", failure.details[1])
        self.assertEqual(list(failure.details[2:]), [f"| {i}" for i in range(30, 50)])

    def test_the_last_lines_of_a_quiet_one(self) -> None:
        failure = self.failure("import sys; print('out', flush=True); sys.exit('err')", quiet=True)
        self.assertEqual(sorted(failure.details[2:]), ["| err", "| out"])

    def test_the_end_by_a_signal(self) -> None:
        failure = self.failure("import os; os.kill(os.getpid(), 9)")
        self.assertIn("was ended by signal 9", failure.what)

    def test_a_program_that_is_not_there(self) -> None:
        for name, remedy in (("no-such-program", "install"), ("pipenv", "apt-get install pipenv")):
            with self.subTest(name=name), self.assertRaises(deploy.Failure) as caught:
                self.runner.run([name, "x"], self.folder, {"PATH": str(self.folder)}, 60)
            self.assertIn(f"{name} is not installed, or not in PATH", caught.exception.what)
            self.assertIn(remedy, caught.exception.remedy)

    def test_a_path_that_is_not_there_or_not_executable(self) -> None:
        script = self.folder / "script"
        script.write_text("#!/bin/sh\n")
        binary = self.folder / "binary"
        binary.write_text("not a program")
        binary.chmod(0o755)
        for path, reason in ((self.folder / "nothing", "No such file"), (script, "Permission denied"),
                             (self.folder, "Permission denied"), (binary, "Exec format error")):
            with self.subTest(path=path), self.assertRaises(deploy.Failure) as caught:
                self.runner.run([str(path)], self.folder, ENVIRONMENT, 60)
            self.assertIn(f"`{path}` cannot be started", caught.exception.what)
            self.assertIn(reason, caught.exception.what)

    def test_a_folder_that_is_not_there(self) -> None:
        with self.assertRaises(deploy.Failure) as caught:
            self.runner.run([sys.executable, "-c", ""], self.folder / "nothing", ENVIRONMENT, 60)
        self.assertIn(f"cannot be started in {self.folder / 'nothing'}", caught.exception.what)


class TimeTest(RunningTest):
    def stubborn(self) -> tuple[list[str], Path]:
        numbers = self.folder / "numbers"
        return [sys.executable, "-c", STUBBORN, str(numbers)], numbers

    def processes(self, numbers: Path) -> list[int]:
        return [int(word) for word in numbers.read_text(encoding="utf-8").split()]

    def end(self, numbers: Path) -> None:
        """Nothing is left behind, even if the test failed."""
        for process in self.processes(numbers) if numbers.exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def late_when(self, file: Path) -> contextlib.AbstractContextManager[object]:
        """The clock jumps an hour ahead as soon as the file is there."""
        clock = mock.Mock(wraps=time)
        clock.monotonic = lambda: time.monotonic() + 3600 * file.exists()
        return mock.patch.object(deploy, "time", clock)

    def test_the_limit_ends_the_whole_group_even_what_ignores_sigterm(self) -> None:
        argv, numbers = self.stubborn()
        self.addCleanup(self.end, numbers)
        with mock.patch.object(deploy, "GRACE", 0.3), self.late_when(numbers), \
                self.assertRaises(deploy.CommandFailed) as caught:
            self.runner.run(argv, self.folder, ENVIRONMENT, 1800.5)
        self.assertIn("was ended after its time limit of 1800.5 s", caught.exception.what)
        self.assertEqual(len(self.processes(numbers)), 2)
        for process in self.processes(numbers):
            poll(lambda number=process: gone(number), f"the end of {process}")  # type: ignore[misc]

    def test_sigterm_comes_first_and_is_waited_for(self) -> None:
        ready = self.folder / "ready"
        with self.late_when(ready):
            failure = self.failure(
                "import signal, sys, time\n"
                "def end(*_): print('tidied up'); sys.exit()\n"
                "signal.signal(signal.SIGTERM, end); open('ready', 'w'); time.sleep(600)", timeout=1800)
        self.assertIn("time limit", failure.what)
        poll(lambda: "tidied up" in self.lines(), "the last word of the command")

    def test_an_interruption_ends_the_whole_group(self) -> None:
        argv, numbers = self.stubborn()
        self.addCleanup(self.end, numbers)

        def interrupted(_child: deploy.Child, _seconds: float) -> bool:
            if numbers.exists():
                raise deploy.Interrupted(signal.SIGINT)
            return False

        with mock.patch.object(deploy, "GRACE", 0.3), mock.patch.object(deploy.Child, "ended", interrupted), \
                self.assertRaises(deploy.Interrupted):
            self.runner.run(argv, self.folder, ENVIRONMENT, 60)
        for process in self.processes(numbers):
            poll(lambda number=process: gone(number), f"the end of {process}")  # type: ignore[misc]

    def test_a_command_within_its_limit_is_left_alone(self) -> None:
        self.run_python("import time; time.sleep(0.3); print('done')", timeout=60)
        self.assertEqual(self.lines(), ["done"])

    def test_a_silent_grandchild_that_keeps_the_output_open_is_not_waited_for(self) -> None:
        numbers = self.folder / "numbers"
        self.addCleanup(self.end, numbers)
        began = time.monotonic()
        self.run_python(
            "import subprocess, sys\n"
            "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
            "open(sys.argv[1], 'w').write(str(child.pid)); print('started')", str(numbers))
        self.assertLess(time.monotonic() - began, 30)
        self.assertEqual(self.lines(), ["started"])

    def test_a_heartbeat_in_the_silence(self) -> None:
        wait, seen = self.folder / "wait", threading.Event()
        real = self.output.say

        def say(text: str, label: str = "", shown: bool = True, passing: bool = False) -> None:
            real(text, label, shown, passing)
            if text.startswith("still running after") and not seen.is_set():
                seen.set()
                wait.touch()

        self.output.label = "static"
        with mock.patch.object(deploy, "HEARTBEAT", 0.1), mock.patch.object(self.output, "say", say):
            self.run_python("import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)", str(wait))
        self.assertTrue(seen.is_set())
        self.assertRegex(self.shown.getvalue(), r"static   still running after \d+ s: \S*python")

    def test_no_heartbeat_while_there_is_output(self) -> None:
        self.run_python("import time; time.sleep(0.3)")
        self.assertNotIn("still running", self.shown.getvalue())


class ChildTest(RunningTest):
    def test_it_is_ended_once_and_once_more_does_no_harm(self) -> None:
        child = deploy.Child(["sleep", "600"], self.folder, ENVIRONMENT, self.output, [lambda line: None])
        self.addCleanup(child.end)
        self.assertFalse(child.ended(0))
        child.end()
        self.assertTrue(child.ended(20))
        child.end()
        self.assertEqual(child.process.returncode, -signal.SIGTERM)


class LostReaderTest(RunningTest):
    def test_a_reader_that_hung_up_is_no_error_and_the_log_goes_on(self) -> None:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import deploy, pathlib\n"
            "output = deploy.Output(); output.open_log(pathlib.Path('log'))\n"
            "for i in range(3): output.say(f'line {i}')\n"
            "deploy.Runner(output).run([sys.executable, '-c', 'print(1)'], pathlib.Path('.'), {'PATH': '/bin'}, 60)\n")
        reading, writing = os.pipe()
        os.close(reading)
        try:
            self.run_python(code, str(Path(deploy.__file__).parent), stdout=writing)
        finally:
            os.close(writing)
        self.assertEqual(self.lines(), [], "something was written to stderr")
        log = (self.folder / "log").read_text(encoding="utf-8")
        self.assertIn("line 2\n", log)
        self.assertTrue(log.endswith("| 1\n"), log)

    def test_a_terminal_that_knows_only_ascii(self) -> None:
        code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
                "import deploy, pathlib\n"
                "sys.exit(deploy.main(['-c', 'größe.ini', 'history']))")
        argv = [sys.executable, "-c", code, str(Path(deploy.__file__).parent)]
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
        with self.assertRaises(deploy.CommandFailed) as caught:
            self.runner.run(argv, self.folder, environment, 60)
        self.assertNotIn("Traceback", "\n".join(caught.exception.details))
        self.assertIn(f"ended with status {deploy.MISTAKE}", caught.exception.what)
