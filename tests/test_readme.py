"""What people read: every command in it is understood, and every failure has its row."""

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
DOCS = {path.name: path.read_text(encoding="utf-8") for path in SOURCE.parent.glob("docs/*.md")}
TABLE = DOCS["failures.md"]


# What raises a failure, and which of its arguments is the sentence.
RAISES = {"Failure": 0, "failure": 0, "super().__init__": 0, "require": 1}


def words(said: ast.expr, tree: ast.AST) -> list[str]:
    """What a text says, with … for what is put in; of a name, what it was assigned."""
    if isinstance(said, ast.Constant):
        return [str(said.value)]
    if isinstance(said, ast.JoinedStr):
        parts = (each.value if isinstance(each, ast.Constant) else "…" for each in said.values)
        return ["".join(map(str, parts))]
    if isinstance(said, ast.Name):
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        named = [node for node in assigned if ast.unparse(node.targets[0]) == said.id]
        return [text for node in named for text in words(node.value, tree)]
    return []


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """The line and the words of every failure that a program can raise."""
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef | ast.Module):
            for node in own(function):
                if isinstance(node, ast.Call):
                    at = RAISES.get(ast.unparse(node.func).removeprefix("self."), len(node.args))
                    for said in node.args[at : at + 1]:
                        yield from ((node.lineno, each) for each in words(said, function))


def own(function: ast.AST) -> Iterator[ast.AST]:
    """What is in a function and in no function within it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from own(node)


class CommandsTest(unittest.TestCase):
    def test_every_command_is_understood(self) -> None:
        command = r"python3\s(?:\S*/)?deploy\.py((?: [\w./-]+| \"[^\"]*\"| FILE)*)"
        found = re.findall(command, "\n".join((README, *DOCS.values())))
        self.assertGreater(len(found), 20)
        for command in set(found):
            with self.subTest(command), contextlib.redirect_stderr(io.StringIO()):
                self.assertTrue(deploy.parse_arguments(shlex.split(command))["command"])

    def test_every_command_of_the_tool_is_listed(self) -> None:
        listed = README.split("## The commands")[1].split("| exit status")[0]
        said = io.StringIO()
        with self.assertRaises(SystemExit), contextlib.redirect_stdout(said):
            deploy.parse_arguments(["--help"])
        commands = re.findall(r"^    (\w+) ", said.getvalue(), re.MULTILINE)
        self.assertGreater(len(commands), 10)
        for command in commands:
            self.assertRegex(listed, rf"(?m)^  (\w+, )*{command}\b")


class PageTest(unittest.TestCase):
    def test_one_reads_the_readme_to_its_end(self) -> None:
        lines = README.splitlines()
        self.assertLessEqual(len(lines), 130)
        self.assertLessEqual(max(map(len, lines)), 100)

    def test_every_link_leads_somewhere(self) -> None:
        for name, text in {"../README.md": README, **DOCS}.items():
            for link in re.findall(r"\]\(([^)#:]+)", text):
                with self.subTest(page=name, link=link):
                    self.assertTrue((SOURCE.parent / "docs" / name).parent.joinpath(link).exists())


class SentencesTest(unittest.TestCase):
    def test_every_failure_has_a_row(self) -> None:
        found = dict(sentences(SOURCE.read_text(encoding="utf-8")))
        self.assertGreater(len(found), 40)
        first_column = "\n".join(
            line.split(" | ")[0] for line in TABLE.splitlines() if line.startswith("| ")
        )
        for line, said in found.items():
            with self.subTest(line=line):
                self.assertIn(said, first_column)

    def test_every_row_is_of_a_failure_that_there_is(self) -> None:
        known = {said for _, said in sentences(SOURCE.read_text(encoding="utf-8"))}
        rows = [line.split(" | ")[0] for line in TABLE.splitlines() if line.startswith("| `")]
        self.assertGreater(len(rows), 20)
        for row in rows:
            for _, said in re.findall(r"(`+) ?(.+?) ?\1", row.partition(" after the name")[0]):
                with self.subTest(said):
                    self.assertTrue([each for each in known if each in said])

    def test_a_new_failure_would_be_seen(self) -> None:
        text = (
            'raise Failure(f"the {thing} of {place} broke", "mend it")\n'
            'self.failure("it is odd")\n'
            'def f(a):\n    b = "it was named"\n    if a:\n        raise Failure(b)\n'
            'Failure(what)\nrequire(there, f"no {thing}", "bring it")\nrequire(there)'
        )
        wanted = ["the … of … broke", "it is odd", "no …", "it was named"]
        self.assertEqual([said for _, said in sentences(text)], wanted)
