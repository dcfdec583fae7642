"""The README says what to do about everything that the tool can say on failure."""
from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import unittest
from collections.abc import Iterator
from pathlib import Path

import deploy

SOURCE = Path(deploy.__file__)
README = SOURCE.with_name("README.md").read_text(encoding="utf-8")
TABLE = README.split("## It is 3 a.m. and …")[1].split("\n## ")[0]


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """The line and the words of every failure that a program can raise, with … for what it puts in."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and re.search(r"\b([Ff]ailure|super\(\)\.__init__)$", ast.unparse(node.func)):
            said = node.args[0] if node.args else None
            if isinstance(said, ast.Constant):
                yield node.lineno, str(said.value)
            elif isinstance(said, ast.JoinedStr):
                parts = (each.value if isinstance(each, ast.Constant) else "…" for each in said.values)
                yield node.lineno, "".join(map(str, parts))


class CommandsTest(unittest.TestCase):
    def test_every_command_is_understood(self) -> None:
        found = re.findall(r"python3 (?:\S*/)?deploy\.py((?: [\w./-]+| \"\$[^\"]*\"| FILE)*)", README)
        self.assertGreater(len(found), 20)
        for command in set(found):
            with self.subTest(command), contextlib.redirect_stderr(io.StringIO()):
                self.assertTrue(deploy.parse_arguments(shlex.split(command)).command)

    def test_every_command_of_the_tool_is_listed(self) -> None:
        listed = README.split("## The commands")[1].split("| exit status")[0]
        said = io.StringIO()
        with self.assertRaises(SystemExit), contextlib.redirect_stdout(said):
            deploy.parse_arguments(["--help"])
        commands = re.findall(r"^    (\w+) ", said.getvalue(), re.MULTILINE)
        self.assertGreater(len(commands), 10)
        for command in commands:
            self.assertRegex(listed, rf"(?m)^  (\w+, )*{command}\b")


class SentencesTest(unittest.TestCase):
    def test_every_failure_has_a_row(self) -> None:
        found = dict(sentences(SOURCE.read_text(encoding="utf-8")))
        self.assertGreater(len(found), 40)
        first_column = "\n".join(line.split(" | ")[0] for line in TABLE.splitlines() if line.startswith("| "))
        for line, words in found.items():
            with self.subTest(line=line):
                self.assertIn(words, first_column)

    def test_every_row_is_of_a_failure_that_there_is(self) -> None:
        said = {words for _, words in sentences(SOURCE.read_text(encoding="utf-8"))}
        for row in (line for line in TABLE.splitlines() if line.startswith(("| `", "| ``"))):
            with self.subTest(row[:60]):
                first = row.split(" | ")[0]
                self.assertTrue([words for words in said if words in first])

    def test_a_new_failure_would_be_seen(self) -> None:
        text = 'raise Failure(f"the {thing} of {place} broke", "mend it")\nself.failure("it is odd")\nFailure(what)'
        self.assertEqual([words for _, words in sentences(text)], ["the … of … broke", "it is odd"])
