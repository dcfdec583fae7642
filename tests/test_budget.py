"""What deploy.py promises of itself: a file that anyone can read, and that needs only Python."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import statistics
import subprocess
import symtable
import sys
import tempfile
import tokenize
import unittest
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import deploy

SOURCE = Path(deploy.__file__)
TEXT = SOURCE.read_text(encoding="utf-8")
COMMANDS = (
    "deploy",
    "rollback",
    "backup",
    "restore",
    "restart",
    "freeze",
    "thaw",
    "status",
    "history",
    "logs",
    "check",
    "maintenance",
    "manage",
    "setup",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> list[Function]:
    """Every function of the file, those within others too."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def public(body: list[ast.stmt]) -> Iterator[ast.ClassDef | Function]:
    """The classes, functions and methods that a reader may call."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node
            yield from public(node.body)
        elif isinstance(node, Function) and (
            not node.name.startswith("_") or node.name.endswith("__")
        ):
            yield node


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the module of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


# Statements, which no formatting squeezes; it may shrink, and is raised by no accident.
STATEMENTS = 2_941
COLUMNS, CLASS_LINES = 100, 200
FREE = ("the story", "the tables")  # they may name what comes after them
TABLES = {"STEPS", "UNDO"}  # and these may be named before


def rooms(text: str) -> dict[str, int]:
    """The parts of the file between its banners, each with the line where it begins."""
    found = re.finditer(r"(?m)^# -{20,} (.+)$", text)
    return {each[1]: text.count("\n", 0, each.start()) + 1 for each in found}


def names_of_later_rooms(text: str) -> list[str]:
    """What a room names and a later one defines; annotations, which are not run, do not count."""
    begins, tree = rooms(text), ast.parse(text)

    def room(node: ast.stmt) -> int:
        return sum(line <= node.lineno for line in begins.values()) - 1

    defined: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function):
            defined[node.name] = room(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [
                each
                for target in targets
                for each in ast.walk(target)
                if isinstance(each, ast.Name)
            ]
            defined |= {each.id: room(node) for each in names}
    found = []
    for table in symtable.symtable(text, "deploy.py", "exec").get_children():
        here = sum(line <= table.get_lineno() for line in begins.values()) - 1
        if here >= 0 and list(begins)[here] not in FREE:
            later = sorted(
                name for name in globals_of(table) - TABLES if defined.get(name, -1) > here
            )
            found += [f"{list(begins)[here]}: {table.get_name()} names {name}" for name in later]
    return found


def globals_of(table: symtable.SymbolTable) -> set[str]:
    """The globals that a function or class names, or that those within it do."""
    if table.get_name() == "__annotate__":  # from Python 3.14 on, annotations are a function
        return set()
    own = {
        each.get_name() for each in table.get_symbols() if each.is_global() and each.is_referenced()
    }
    return own.union(*map(globals_of, table.get_children()))


class BudgetTest(unittest.TestCase):
    tree: ast.Module

    @classmethod
    def setUpClass(cls) -> None:
        cls.tree = ast.parse(TEXT)

    def test_it_is_short(self) -> None:
        statements = [node for node in ast.walk(self.tree) if isinstance(node, ast.stmt)]
        self.assertLessEqual(len(statements), STATEMENTS)

    def test_its_lines_are_short(self) -> None:
        long = [at for at, line in enumerate(TEXT.splitlines(), start=1) if len(line) > COLUMNS]
        self.assertEqual(long, [])

    def test_its_classes_are_short(self) -> None:
        sizes = {
            node.name: (node.end_lineno or 0) - node.lineno + 1
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ClassDef)
        }
        self.assertGreater(len(sizes), 20)
        self.assertEqual({name: size for name, size in sizes.items() if size > CLASS_LINES}, {})

    def test_no_room_names_a_later_one(self) -> None:
        self.assertGreater(len(rooms(TEXT)), 20)
        self.assertEqual(names_of_later_rooms(TEXT), [])

    def test_a_room_that_names_a_later_one_would_be_seen(self) -> None:
        one, two = (f"# {'-' * 20} {name}\n" for name in ("one", "two"))
        text = f"{one}def f(x: G) -> G:\n    return g()\n{two}G = 1\ndef g(): return f(G)\n"
        self.assertEqual(names_of_later_rooms(text), ["one: f names g"])

    def test_the_table_of_contents_is_that_of_the_rooms(self) -> None:
        listed = (deploy.__doc__ or "").partition("Contents: ")[2].replace("\n", " ").strip()
        self.assertEqual(listed.split(" · "), list(rooms(TEXT)))

    def test_its_functions_are_short(self) -> None:
        lengths = [
            ((node.end_lineno or 0) - node.lineno + 1, node.name)
            for node in functions(self.tree)
            if node.name != "parse_arguments"
        ]
        sizes = sorted(size for size, _ in lengths)
        self.assertGreater(len(sizes), 50)
        self.assertLessEqual(statistics.median(sizes), 10)
        self.assertLess(sizes[len(sizes) * 9 // 10], 30)
        self.assertEqual([(name, size) for size, name in lengths if size > 40], [])

    def test_it_imports_the_standard_library_alone(self) -> None:
        """Django is the project's: the functions of one room are sent to the project, and run there."""
        begin, end = (rooms(TEXT)[name] for name in ("the project's Django", "database"))
        django = [each for each in functions(self.tree) if begin < each.lineno < end]
        inside = {each for function in django for each in imported(function)}
        outside = set(imported(self.tree)) - inside
        self.assertGreater(len(outside), 10)
        self.assertEqual(
            {name.partition(".")[0] for _, name in outside} - sys.stdlib_module_names, set()
        )
        self.assertIn("django", {name.partition(".")[0] for _, name in inside})

    def test_it_starts_without_any_package(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run(
                [sys.executable, "-I", "-S", str(SOURCE), "--help"],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
        self.assertEqual((run.returncode, run.stderr), (0, ""))

    def test_no_shell_and_no_evaluated_text(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                self.assertNotIn(
                    "shell", [keyword.arg for keyword in node.keywords], f"line {node.lineno}"
                )
                name = ast.unparse(node.func)
                self.assertNotIn(
                    name,
                    (
                        "os.system",
                        "os.popen",
                        "eval",
                        "exec",
                        "subprocess.getoutput",
                        "subprocess.getstatusoutput",
                    ),
                    f"line {node.lineno}",
                )

    def test_everything_public_is_annotated_and_has_one_line_that_says_what_it_is(self) -> None:
        for node in public(self.tree.body):
            with self.subTest(name=node.name, line=node.lineno):
                # a section says what it is by its keys
                if not node.name.endswith(("__", "Section")):
                    said = ast.get_docstring(node)
                    self.assertTrue(said)
                    self.assertEqual(len((said or "").splitlines()), 1)
                if isinstance(node, Function):
                    self.assertIsNotNone(node.returns)
                    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    arguments += [each for each in (node.args.vararg, node.args.kwarg) if each]
                    bare = {each.arg for each in arguments if each.annotation is None}
                    self.assertLessEqual(bare, {"self", "cls"})

    def test_python_3_11_reads_it(self) -> None:
        ast.parse(TEXT, feature_version=(3, 11))
        self.assertEqual(list(newer_strings(TEXT)), [])

    def test_the_check_for_newer_strings_finds_them(self) -> None:
        if sys.version_info >= (3, 12):
            self.assertEqual(list(newer_strings("a = f'{b}'\nc = f'{d['e']}'\n")), [2])
            self.assertEqual(list(newer_strings("a = f'{b[\"c\"]}' + 'd'\n")), [])

    def test_an_older_python_is_told_in_a_sentence(self) -> None:
        """As Python 3.10 sees it: what came with 3.11 is not there."""
        code = (
            "import collections, datetime, runpy, sys\n"
            "if hasattr(datetime, 'UTC'): del datetime.UTC\n"
            "sys.modules['tomllib'] = None\n"
            "version = collections.namedtuple('version', 'major minor micro releaselevel serial')\n"
            "sys.version_info = version(3, 10, 0, 'final', 0)\n"
            "sys.version = '3.10.0 (main)'\n"
            "runpy.run_path(sys.argv[1], run_name='__main__')"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(SOURCE)], capture_output=True, text=True, check=False
        )
        self.assertNotIn("Traceback", run.stderr)
        self.assertIn("needs Python 3.11", run.stderr)
        self.assertIn("3.10.0", run.stderr)
        self.assertNotEqual(run.returncode, 0)

    def test_it_can_be_run_as_a_program(self) -> None:
        self.assertTrue(os.access(SOURCE, os.X_OK))
        self.assertTrue(TEXT.startswith("#!/usr/bin/env python3\n"))


class HelpTest(unittest.TestCase):
    def help(self, *arguments: str) -> str:
        with (
            mock.patch.dict(os.environ, COLUMNS="200"),
            contextlib.redirect_stdout(io.StringIO()) as said,
            self.assertRaises(SystemExit) as caught,
        ):
            deploy.parse_arguments([*arguments, "--help"])
        self.assertEqual(caught.exception.code, 0)
        return said.getvalue()

    def test_it_names_every_command(self) -> None:
        said = self.help()
        known = set(deploy.COMMANDS)
        self.assertLessEqual(set(COMMANDS), known)
        for command in known:
            self.assertRegex(said, rf"(?m)^ +{command} +\S", "its name and what it does")

    def test_every_command_has_its_own(self) -> None:
        for command in COMMANDS:
            with self.subTest(command=command):
                said = self.help(command)
                self.assertTrue(re.match(rf"usage: deploy\.py .*{command}", said), said)
                self.assertGreater(len(said.splitlines()), 3)

    def test_the_docstring_names_the_files_the_steps_and_the_exit_statuses(self) -> None:
        said = deploy.__doc__ or ""
        for word in (*deploy.STEP_NAMES, "deploy.ini", ".env", ".deploy/", "75", "78", "128+N"):
            self.assertIn(word, said)


def newer_strings(text: str) -> Iterator[int]:
    """The lines with a string inside an f-string with the same quotes, unknown to Python 3.11."""
    start, end = (getattr(tokenize, name, None) for name in ("FSTRING_START", "FSTRING_END"))
    quotes: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (start, tokenize.STRING):
            mark = token.string.lstrip("rRbBfFuU")[:3]
            mark = mark if mark in ('"""', "'''") else mark[:1]
            if mark in quotes:
                yield token.start[0]
            if token.type == start:
                quotes.append(mark)
        elif token.type == end:
            quotes.pop()
