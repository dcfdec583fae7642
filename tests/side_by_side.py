"""Runs tests in a few processes at a time, because most of them wait most of the time.

A process is given the tests of one class, or of a module that has a set-up, tells what comes of
each as it comes, and is given the next. What a test writes goes to where it would without this.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
PROCESSES = (os.cpu_count() or 1) + 2
SLOW = ("tests.server.", "tests.test_sandbox.")
# the methods of a result that are given a traceback, and where they keep it
FAILED = {"addError": "errors", "addFailure": "failures", "addExpectedFailure": "expectedFailures"}


def told(method: str) -> Callable[..., None]:
    """A method of a result that also tells how it was called, with the traceback as text."""

    def call(self: Teller, test: unittest.TestCase, *details: Any) -> None:
        getattr(unittest.TestResult, method)(self, test, *details)
        if method in FAILED:
            details = (getattr(self, FAILED[method])[-1][1],)
        if not self.shouldStop:
            self.connection.send((method, test.id(), *details))

    return call


class Teller(unittest.TestResult):
    """The result in a process, which tells the real one of all that it is told."""

    connection: Connection
    startTest, stopTest, addSuccess = map(told, ("startTest", "stopTest", "addSuccess"))
    addSkip, addUnexpectedSuccess = map(told, ("addSkip", "addUnexpectedSuccess"))
    addError, addFailure, addExpectedFailure = map(told, FAILED)
    addDuration = told("addDuration")  # from Python 3.12 on

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        """Take a part that failed for a test that did."""
        if err:
            failed = issubclass(err[0], test.failureException)
            (self.addFailure if failed else self.addError)(subtest, err)


def work(connection: Connection, settings: dict[str, bool]) -> None:
    """Ask for tests and run them; a signal makes the one that runs fail, and clean up."""
    teller = Teller()

    def stop(*_: object) -> None:
        if not teller.shouldStop:
            teller.stop()
            raise InterruptedError("the tests were interrupted")

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if not sys.warnoptions:
        warnings.simplefilter("default")  # as unittest does
    while not teller.shouldStop:
        connection.send(())
        if not (names := connection.recv()):
            break
        teller = Teller()
        vars(teller).update(settings, connection=connection)
        unittest.defaultTestLoader.loadTestsFromNames(names).run(teller)


def calls(groups: Iterator[list[str]], settings: dict[str, bool]) -> Iterator[tuple[str, ...]]:
    """What the processes tell while they run all groups of tests; none of them outlives this."""
    processes: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(PROCESSES):
            here, there = SPAWN.Pipe()
            processes[here] = SPAWN.Process(target=work, args=(there, settings), daemon=True)
            processes[here].start()
            there.close()
        while processes:
            for connection in processes.keys() & wait(list(processes)):
                try:
                    if call := connection.recv():
                        yield call
                    else:
                        names = next(groups, [])
                        processes[connection].name = " ".join(names)
                        connection.send(names)
                except EOFError:
                    process = processes.pop(connection)
                    process.join()
                    if process.exitcode:
                        yield "addError", process.name, f"the process ended with {process.exitcode}"
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


class SideBySide(unittest.TestSuite):
    """Tests, a few processes of them at a time."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        """Have them run; what stands for a module that cannot be imported says so here."""
        tests = {test.id(): test for test in flat(self)}
        for test in list(tests.values()):
            if type(test).__module__ == "unittest.loader":
                tests.pop(test.id()).run(result)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("the tests were ended"))
        settings = {"buffer": result.buffer, "tb_locals": result.tb_locals}
        for method, name, *details in calls(iter(grouped(tests.values())), settings):
            # what is no test is the part of one, the set-up of a class, or a process
            test = tests.get(name) or unittest.suite._ErrorHolder(name)  # type: ignore[attr-defined]
            if method in FAILED:
                getattr(result, method)(test, (AssertionError, AssertionError(), None))
                getattr(result, FAILED[method])[-1] = (test, *details)
            else:
                getattr(result, method)(test, *details)
            if result.shouldStop:
                break
        return result


def flat(suite: Iterable[unittest.TestCase | unittest.TestSuite]) -> Iterator[unittest.TestCase]:
    """The tests of a suite and of the suites in it."""
    for test in suite:
        if isinstance(test, unittest.TestCase):
            yield test
        else:
            yield from flat(test)


def grouped(tests: Iterable[unittest.TestCase]) -> list[list[str]]:
    """The names of what one process runs in a row; what takes long comes first."""
    found: dict[str, list[str]] = {}
    for test in tests:
        kind = type(test)
        shared = hasattr(sys.modules[kind.__module__], "setUpModule")
        name = kind.__module__ if shared else f"{kind.__module__}.{kind.__qualname__}"
        found.setdefault(name, []).append(test.id())
    slowest = sorted(found.values(), key=lambda names: (names[0].startswith(SLOW), len(names)))
    return slowest[::-1]
