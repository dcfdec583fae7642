"""Running commands: what they write arrives whole, and none of them outlives its time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deploy
from tests.speaking import speaking

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
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
            == "Z"
        )
    except OSError:
        return True


class RunningTest(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory())).resolve()
        self.shown = self.enterContext(speaking())
        self.enterContext(mock.patch.multiple(deploy.Signals, received=0, shields=0))
        self.lock = deploy.Lock(self.folder)
        self.commands = deploy.Commands(self.lock)

    def run_python(
        self,
        code: str,
        *arguments: str,
        timeout: float = 60,
        quiet: bool = False,
        stdout: int = subprocess.PIPE,
    ) -> str:
        argv = [sys.executable, "-c", code, *arguments]
        return self.commands.run(argv, self.folder, ENVIRONMENT, timeout, quiet, stdout=stdout)

    def failure(self, code: str, timeout: float = 60, quiet: bool = False) -> deploy.CommandFailed:
        with self.assertRaises(deploy.CommandFailed) as caught:
            self.run_python(code, timeout=timeout, quiet=quiet)
        return caught.exception

    def lines(self) -> list[str]:
        """What the command wrote, as it was shown."""
        shown = self.shown.getvalue().split("\n")
        return [line[11:] for line in shown if line[9:].startswith("| ")]

    def when(self, said: str, act: Callable[[], object]) -> None:
        """Act as soon as something is said that begins so."""

        class Listener(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.getMessage().startswith(said):
                    act()

        deploy.log.addHandler(Listener())


class OutputOfCommandsTest(RunningTest):
    def test_the_command_is_shown_before_its_lines_which_keep_their_order(self) -> None:
        self.run_python("for i in range(2000): print(i)")
        shown = self.shown.getvalue().splitlines()
        self.assertTrue(shown[0].startswith(f"deploy   $ {sys.executable} -c "), shown[0])
        self.assertEqual(self.lines(), [str(i) for i in range(2000)])

    def test_stdout_and_stderr_arrive_in_the_order_in_which_they_were_written(self) -> None:
        self.run_python(
            "import sys\n"
            "for i in range(500): print(i, file=(sys.stdout, sys.stderr)[i % 2], flush=True)"
        )
        self.assertEqual(self.lines(), [str(i) for i in range(500)])

    def test_a_quiet_one_shows_nothing_and_gives_its_stdout_alone(self) -> None:
        code = "import sys; print('a'); print('x', file=sys.stderr); print('\\n b ')"
        found = self.run_python(code, quiet=True)
        self.assertEqual(found, "a\n\n b ")
        self.assertEqual(self.shown.getvalue(), "")

    def test_a_quiet_one_is_in_the_log_with_both_streams(self) -> None:
        deploy.start_logging(self.folder / "log")
        self.run_python("import sys; print('one'); print('two', file=sys.stderr)", quiet=True)
        log = (self.folder / "log").read_text(encoding="utf-8")
        self.assertIn("| one\n", log)
        self.assertIn("| two\n", log)
        self.assertEqual(self.shown.getvalue(), "")

    def test_what_a_quiet_one_gives_is_not_masked_because_it_is_not_shown(self) -> None:
        """A password that is also an application's name must not hide its migrations."""
        deploy.redactor.hide({"admin"})
        self.assertEqual(self.run_python("print('admin.0004_more')", quiet=True), "admin.0004_more")

    def test_what_is_shown_and_logged_is_masked(self) -> None:
        deploy.redactor.hide({"correct-horse-battery"})
        deploy.start_logging(self.folder / "log")
        failure = self.failure("print('it is correct-horse-battery'); raise SystemExit(1)")
        with contextlib.suppress(deploy.CommandFailed):
            self.run_python("print('it is correct-horse-battery'); raise SystemExit(1)", quiet=True)
        for line in failure.details:
            deploy.say(line)
        for text in (self.shown.getvalue(), (self.folder / "log").read_text(encoding="utf-8")):
            self.assertIn("it is ***", text)
            self.assertNotIn("correct-horse-battery", text)

    def test_no_part_of_a_secret_is_in_a_failure_wherever_it_cuts_a_line(self) -> None:
        """Its text is in the history too, and a part of a secret is not recognised there."""
        deploy.redactor.hide({"correct-horse-battery"})
        for quiet in (False, True):
            for before in (*range(0, 201, 50), 180, 190):
                code = f"import sys; sys.exit('-' * {before} + 'correct' + '-horse-battery')"
                failure = self.failure(code, quiet=quiet)
                self.assertNotIn("correct-", " ".join((failure.what, *failure.details)))

    def test_a_large_output_is_captured_whole(self) -> None:
        found = self.run_python("for i in range(20_000): print(f'{i:01023d}')", quiet=True)
        self.assertEqual(len(found), 20_000 * 1024 - 1)
        self.assertEqual([int(line) for line in found.split("\n")], list(range(20_000)))

    def test_a_very_long_line_survives(self) -> None:
        length = (3 << 20) + 17
        deploy.start_logging(self.folder / "log")
        self.run_python(f"print('x' * {length}); print('end')")
        log = (self.folder / "log").read_text(encoding="utf-8")
        self.assertEqual(log.partition("| ")[2].count("x"), length)
        self.assertEqual(self.lines()[-1], "end")
        self.assertLess(max(map(len, self.shown.getvalue().splitlines())), 65_536)

    def test_lines_of_any_kind(self) -> None:
        for raw, *lines in (
            (b"a\nb", "a", "b"),
            (b"a\r\nb\r\n", "a", "b"),
            (b"gr\xf6\xdfe \xe2\x82\xac\n", "gr\ufffd\ufffde €"),
            (b"100 %s %d\n\n  {x}\n", "100 %s %d", "", "  {x}"),
        ):
            with self.subTest(raw=raw):
                before = len(self.lines())
                self.run_python(f"import sys; sys.stdout.buffer.write({raw!r})")
                self.assertEqual(self.lines()[before:], lines)

    def test_stdout_into_a_descriptor(self) -> None:
        with open(self.folder / "dump", "wb") as file:
            code = (
                "import sys; sys.stdout.buffer.write(bytes(range(256))); print(1, file=sys.stderr)"
            )
            found = self.run_python(code, stdout=file.fileno())
        self.assertEqual((self.folder / "dump").read_bytes(), bytes(range(256)))
        self.assertEqual(found, "")

    def test_stderr_beside_a_descriptor_is_shown(self) -> None:
        with (
            open(self.folder / "dump", "wb") as file,
            self.assertRaises(deploy.CommandFailed) as caught,
        ):
            self.run_python("import sys; sys.exit('cannot dump')", stdout=file.fileno())
        self.assertEqual(self.lines(), ["cannot dump"])
        self.assertIn("| cannot dump", caught.exception.details)


class CircumstancesTest(RunningTest):
    def test_no_shell_reads_the_arguments(self) -> None:
        found = self.run_python(
            "import sys; print(sys.argv[1:])", "$HOME", "a b", "*", "; id", "", quiet=True
        )
        self.assertEqual(found, "['$HOME', 'a b', '*', '; id', '']")

    def test_the_folder_and_the_environment_are_those_given(self) -> None:
        found = self.run_python(
            "import os; print(os.getcwd()); print(sorted(os.environ))", quiet=True
        )
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
        code = "import os; print(os.getpid() == os.getpgid(0) == os.getsid(0))"
        self.assertEqual(self.run_python(code, quiet=True), "True")

    def test_descriptors_are_closed_but_for_those_to_inherit(self) -> None:
        code = (
            "import os, sys\nfor each in map(int, sys.argv[1:]):\n"
            " try: os.fstat(each); print('open')\n except OSError: print('closed')"
        )
        with open(self.folder / "a", "w") as lock, open(self.folder / "b", "w") as other:
            self.lock.inherited = (lock.fileno(),)
            found = self.run_python(code, str(lock.fileno()), str(other.fileno()), quiet=True)
        self.assertEqual(found, "open\nclosed")

    def test_a_program_is_looked_for_in_the_path_of_its_environment(self) -> None:
        script = self.folder / "bin" / "hello"
        script.parent.mkdir()
        script.write_text("#!/bin/sh\necho hello\n")
        script.chmod(0o755)
        environment = {"PATH": f"{script.parent}:/usr/bin:/bin"}
        found = self.commands.run(["hello"], self.folder, environment, 60, quiet=True)
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
                self.commands.run([name, "x"], self.folder, {"PATH": str(self.folder)}, 60)
            self.assertIn(f"{name} is not installed, or not in PATH", caught.exception.what)
            self.assertIn(remedy, caught.exception.remedy)

    def test_a_path_that_is_not_there_or_not_executable(self) -> None:
        script = self.folder / "script"
        script.write_text("#!/bin/sh\n")
        binary = self.folder / "binary"
        binary.write_text("not a program")
        binary.chmod(0o755)
        for path, reason in (
            (self.folder / "nothing", "No such file"),
            (script, "Permission denied"),
            (self.folder, "Permission denied"),
            (binary, "Exec format error"),
        ):
            with self.subTest(path=path), self.assertRaises(deploy.Failure) as caught:
                self.commands.run([str(path)], self.folder, ENVIRONMENT, 60)
            self.assertIn(f"`{path}` cannot be started", caught.exception.what)
            self.assertIn(reason, caught.exception.what)

    def test_a_folder_that_is_not_there(self) -> None:
        with self.assertRaises(deploy.Failure) as caught:
            self.commands.run([sys.executable, "-c", ""], self.folder / "nothing", ENVIRONMENT, 60)
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

    def assert_ended(self, numbers: Path) -> None:
        """Both processes end, the one that the command started, too."""
        processes = self.processes(numbers)
        self.assertEqual(len(processes), 2)
        poll(lambda: all(map(gone, processes)), f"the end of {processes}")

    def test_the_limit_ends_the_whole_group_even_what_ignores_sigterm(self) -> None:
        argv, numbers = self.stubborn()
        self.addCleanup(self.end, numbers)
        with (
            mock.patch.object(deploy, "GRACE", 0.3),
            self.late_when(numbers),
            self.assertRaises(deploy.CommandFailed) as caught,
        ):
            self.commands.run(argv, self.folder, ENVIRONMENT, 1800.5)
        self.assertIn("was ended after its time limit of 1800.5 s", caught.exception.what)
        self.assert_ended(numbers)

    def test_sigterm_comes_first_and_is_waited_for(self) -> None:
        with self.late_when(self.folder / "ready"):
            failure = self.failure(
                "import signal, sys, time\n"
                "def end(*_): print('tidied up'); sys.exit()\n"
                "signal.signal(signal.SIGTERM, end); open('ready', 'w'); time.sleep(600)",
                timeout=1800,
            )
        self.assertIn("time limit", failure.what)
        poll(lambda: "tidied up" in self.lines(), "the last word of the command")

    def test_a_signal_ends_the_whole_group(self) -> None:
        argv, numbers = self.stubborn()
        self.addCleanup(self.end, numbers)
        self.when("| ready", lambda: deploy.Signals.keep(signal.SIGINT, None))
        with mock.patch.object(deploy, "GRACE", 0.3), self.assertRaises(deploy.Interrupted):
            self.commands.run(argv, self.folder, ENVIRONMENT, 60)
        self.assert_ended(numbers)

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
            "open(sys.argv[1], 'w').write(str(child.pid)); print('started')",
            str(numbers),
        )
        self.assertLess(time.monotonic() - began, 30)
        self.assertEqual(self.lines(), ["started"])

    def test_a_heartbeat_in_the_silence(self) -> None:
        wait = self.folder / "wait"
        self.when("still running after", wait.touch)
        deploy.console.label = "static"
        code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"
        with mock.patch.object(deploy, "HEARTBEAT", 0.1):
            self.run_python(code, str(wait))
        self.assertRegex(self.shown.getvalue(), r"static   still running after \d+ s: \S*python")

    def test_no_heartbeat_while_there_is_output(self) -> None:
        deploy.console.last = time.monotonic() - 60  # the silence before it is not its own
        self.run_python("import time; time.sleep(0.3)")
        self.assertNotIn("still running", self.shown.getvalue())


class SignalTest(RunningTest):
    """A signal is noted, and raised where a run waits: nothing is torn, and nothing runs on."""

    def test_right_when_a_command_starts(self) -> None:
        """It is ended, though the signal came in the middle of its start."""
        real, started = subprocess.Popen, []

        def popen(*arguments: Any, **options: Any) -> Any:
            started.append(real(*arguments, **options))
            deploy.Signals.keep(signal.SIGTERM, None)
            return started[-1]

        with mock.patch.object(subprocess, "Popen", popen), self.assertRaises(deploy.Interrupted):
            self.run_python("import time; time.sleep(600)")
        self.assertEqual(started[0].returncode, -signal.SIGTERM)

    def test_before_a_command(self) -> None:
        deploy.Signals.keep(signal.SIGINT, None)
        with mock.patch.object(subprocess, "Popen") as popen:
            for _ in range(2):  # whoever takes the first one for a failure meets it again
                with self.assertRaises(deploy.Interrupted):
                    self.run_python("")
        popen.assert_not_called()

    def test_what_must_be_undone_is_undone(self) -> None:
        deploy.Signals.keep(signal.SIGINT, None)
        with deploy.shielded():
            with deploy.shielded():
                pass
            self.assertEqual(self.run_python("print('undone')", quiet=True), "undone")
        with self.assertRaises(deploy.Interrupted):
            deploy.pause(60)

    def test_it_is_raised_after_what_failed_under_the_shield(self) -> None:
        deploy.Signals.keep(signal.SIGINT, None)
        with self.assertRaises(ZeroDivisionError), deploy.shielded():
            raise ZeroDivisionError
        self.assertRaises(deploy.Interrupted, deploy.Signals.check)

    def test_it_is_no_failure(self) -> None:
        self.assertFalse(issubclass(deploy.Interrupted, Exception))
        failure = deploy.as_failure(deploy.Interrupted(signal.SIGTERM))
        self.assertEqual((failure.what, failure.status), ("ended by SIGTERM", 143))

    def test_the_first_one_counts(self) -> None:
        deploy.Signals.check()
        for number in (signal.SIGTERM, signal.SIGINT):
            deploy.Signals.keep(number, None)
        with self.assertRaises(deploy.Interrupted) as caught:
            deploy.Signals.check()
        self.assertEqual(caught.exception.args, (signal.SIGTERM,))

    def test_which_signals_are_kept_and_which_changes_nothing(self) -> None:
        """A child gets the usual SIGTERM back, and goes on without a terminal as well."""
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import deploy, os, signal, subprocess\n"
            "deploy.Signals.install()\n"
            "os.kill(os.getpid(), signal.SIGHUP); deploy.Signals.check()\n"
            "child = 'import signal; print(*map(signal.getsignal, (1, 15)))'\n"
            "subprocess.run([sys.executable, '-c', child], check=True)\n"
            "for number in (signal.SIGINT, signal.SIGTERM):\n"
            "    deploy.Signals.received = 0\n"
            "    os.kill(os.getpid(), number)\n"
            "    try: deploy.pause(60)\n"
            "    except deploy.Interrupted as error: print(int(error.args[0]), flush=True)\n"
        )
        found = self.run_python(code, str(Path(deploy.__file__).parent), quiet=True)
        self.assertEqual(found.split("\n"), ["1 0", "2", "15"])

    def test_a_wait_ends_with_what_it_waits_for(self) -> None:
        answers = iter([False, False, True])
        self.assertTrue(deploy.wait_until(lambda: next(answers), 60))
        self.assertFalse(deploy.wait_until(lambda: False, 0))
        self.assertTrue(deploy.wait_until(lambda: True, 0))


class ChildTest(RunningTest):
    def test_it_is_ended_once_and_once_more_does_no_harm(self) -> None:
        child = deploy.Child(["sleep", "600"], self.folder, ENVIRONMENT, [lambda line: None])
        self.addCleanup(child.end)
        self.assertFalse(child.ended(0))
        child.end()
        self.assertTrue(child.ended(20))
        child.end()
        self.assertEqual(child.process.returncode, -signal.SIGTERM)

    def test_what_sudo_has_made_root_s_cannot_be_ranked_and_runs_all_the_same(self) -> None:
        child = deploy.Child(["true"], self.folder, ENVIRONMENT, [lambda line: None])
        self.addCleanup(child.end)
        with mock.patch("os.setpriority", side_effect=PermissionError(1, "not permitted")):
            child.give_way()
        self.assertTrue(child.ended(20))
        self.assertEqual(child.process.returncode, 0)


class CandidatesTest(unittest.TestCase):
    def test_one_that_opens_and_closes_files_is_seen_whenever_one_looks(self) -> None:
        busy = "import os\nprint(flush=True)\nwhile True:\n    os.close(os.open('/', os.O_RDONLY))"
        with tempfile.NamedTemporaryFile() as mark:
            last = fcntl.fcntl(mark.fileno(), fcntl.F_DUPFD, 50)  # looked at after those
            self.addCleanup(os.close, last)
            process = subprocess.Popen(
                [sys.executable, "-c", busy], pass_fds=(last,), stdout=subprocess.PIPE
            )
            with process:
                self.addCleanup(process.kill)
                assert process.stdout
                process.stdout.readline()
                path = Path(mark.name).resolve()
                seen = [list(deploy.holders(path)) for _ in range(200)]
                process.kill()
        self.assertEqual(seen, [[process.pid]] * 200)

    def test_one_that_has_forked_while_it_was_ended(self) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            mark, look = Path(folder) / "candidate", deploy.holders
            site = mock.Mock(candidate_mark=mark, candidate_socket=Path(folder) / "socket")

            started: list[subprocess.Popen[bytes]] = []

            def start() -> None:
                with mark.open("w") as file:
                    started.append(subprocess.Popen(["sleep", "60"], pass_fds=(file.fileno(),)))
                stack.callback(started[-1].wait)
                stack.callback(started[-1].kill)

            def look_and_fork(file: Path) -> list[int]:
                found = list(look(file))
                if len(started) == 1:
                    start()
                return found

            start()

            with mock.patch("deploy.holders", look_and_fork), mock.patch("deploy.GRACE", 2.0):
                deploy.end_candidates(site, {})
            self.assertEqual([each.wait(5) for each in started], [-signal.SIGKILL] * 2)


class LostReaderTest(RunningTest):
    def test_a_reader_that_hung_up_is_no_error_and_the_log_goes_on(self) -> None:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import deploy, pathlib\n"
            "deploy.start_logging(); deploy.start_logging(pathlib.Path('log'))\n"
            "for i in range(3): deploy.say(f'line {i}')\n"
            "here = pathlib.Path('.')\n"
            "commands = deploy.Commands(deploy.Lock(here))\n"
            "commands.run([sys.executable, '-c', 'print(1)'], here, {'PATH': '/bin'}, 60)\n"
        )
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
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import deploy, pathlib\n"
            "sys.exit(deploy.main(['-c', 'größe.ini', 'history']))"
        )
        argv = [sys.executable, "-c", code, str(Path(deploy.__file__).parent)]
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
        with self.assertRaises(deploy.CommandFailed) as caught:
            self.commands.run(argv, self.folder, environment, 60)
        self.assertNotIn("Traceback", "\n".join(caught.exception.details))
        self.assertIn(f"ended with status {deploy.MISTAKE}", caught.exception.what)
