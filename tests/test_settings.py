"""The settings file: what is accepted, what is refused and how, and that the shipped deploy.ini is complete."""
from __future__ import annotations

import configparser
import contextlib
import re
import tempfile
import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deploy

SHIPPED = Path(deploy.__file__).with_name("deploy.ini")

# (section, key, text, value)
GOOD: tuple[tuple[str, str, str, Any], ...] = (
    ("deploy", "steps", "env pull restart", ("env", "pull", "restart")),
    ("deploy", "steps", "env pull migrate static restart", ("env", "pull", "migrate", "static", "restart")),
    ("deploy", "workspace", "var/deploy", "var/deploy"),
    ("deploy", "project", ".", "."),
    ("deploy", "project", "..hidden/src", "..hidden/src"),
    ("deploy", "shared", ".env media/ a/b", (".env", "media/", "a/b")),
    ("deploy", "shared", "", ()),
    ("deploy", "keep_releases", "1", 1),
    ("deploy", "keep_releases", "010", 10),
    ("env", "file", "conf/production.env", "conf/production.env"),
    ("pull", "remote", "upstream", "upstream"),
    ("pull", "branch", "release/2.0", "release/2.0"),
    ("pull", "branch", "größe%s", "größe%s"),
    ("pull", "retries", "0", 0),
    ("pull", "timeout", "30", 30.0),
    ("pull", "timeout", "2.5", 2.5),
    ("pull", "timeout", "0.5", 0.5),
    ("pull", "timeout", "010", 10.0),
    ("install", "python", "python3.12", "python3.12"),
    ("install", "command", "", ()),
    ("static", "command", "make  css js", (("make", "css", "js"),)),
    ("static", "command", "sh -c 'a && b'", (("sh", "-c", "a && b"),)),
    ("static", "command", 'echo "a  b" c\\ d "" $HOME *', (("echo", "a  b", "c d", "", "$HOME", "*"),)),
    ("static", "command", "\n    one a\n\n    # a comment\n    two = b\n", (("one", "a"), ("two", "=", "b"))),
    ("static", "before", "true", (("true",),)),
    ("restart", "after", "curl http://[::1]/\n    logger done", (("curl", "http://[::1]/"), ("logger", "done"))),
    ("health", "url", "https://example.org", "https://example.org"),
    ("health", "url", "http://[::1]:8000/a?b=c;d#e", "http://[::1]:8000/a?b=c;d#e"),
    ("health", "url", "", ""),
    ("health", "expect", "204", 204),
    ("health", "headers", "A: b\n    X-C-d:e: f", {"A": "b", "X-C-d": "e: f"}),
    ("health", "headers", "", {}),
    ("health", "contains", "100 % = \"fine\"", "100 % = \"fine\""),
    ("backup", "keep", "3", 3),
    ("notify", "on", "recovery", "recovery"),
    ("notify", "webhook", "DEPLOY_WEBHOOK", "DEPLOY_WEBHOOK"),
    ("notify", "webhook", "", ""),
)

# (section, key, text, part of the complaint)
BAD: tuple[tuple[str, str, str, str], ...] = (
    ("deploy", "steps", "", "must begin with env and pull"),
    ("deploy", "steps", "pull env restart", "must begin with env and pull"),
    ("deploy", "steps", "env pull", "end with restart"),
    ("deploy", "steps", "env pull static static restart", "name no step twice"),
    ("deploy", "steps", "env pull instal restart", "'instal' is not a step; did you mean install?"),
    ("deploy", "workspace", "/srv/deploy", "'/srv/deploy' is not a path"),
    ("deploy", "workspace", "../deploy", "not a path"),
    ("deploy", "workspace", "", "not a path"),
    ("deploy", "project", "a/..", "not a path"),
    ("deploy", "project", "a/../../b", "not a path"),
    ("deploy", "shared", ".env /etc/passwd", "'/etc/passwd' is not a path"),
    ("deploy", "keep_releases", "0", "not a whole number of 1 or more"),
    ("deploy", "keep_releases", "-1", "not a whole number of 1 or more"),
    ("deploy", "keep_releases", "five", "'five' is not a whole number"),
    ("env", "file", "/home/ubuntu/.env", "not a path"),
    ("pull", "retries", "-1", "not a whole number"),
    ("pull", "retries", "1.5", "not a whole number"),
    ("pull", "timeout", "", "not a number of seconds"),
    ("pull", "timeout", "0", "not a number of seconds"),
    ("pull", "timeout", "0.0", "not a number of seconds"),
    ("pull", "timeout", "-1", "not a number of seconds"),
    ("pull", "timeout", "5m", "'5m' is not a number of seconds, as in 30 or 2.5"),
    ("pull", "timeout", "1e3", "not a number of seconds"),
    ("pull", "timeout", "inf", "not a number of seconds"),
    ("pull", "timeout", "nan", "not a number of seconds"),
    ("pull", "timeout", "30 # seconds", "not a number of seconds"),
    ("install", "command", "pipenv 'install", "cannot be split into words: no closing quotation"),
    ("install", "before", "true\n    echo \\", "cannot be split into words: no escaped character"),
    ("health", "url", "127.0.0.1:8000", "'127.0.0.1:8000' is not a URL"),
    ("health", "url", "ftp://example.org/", "not a URL"),
    ("health", "url", "http://", "not a URL"),
    ("health", "url", "http://a/ b", "not a URL"),
    ("health", "expect", "", "not an HTTP status"),
    ("health", "expect", "2xx", "'2xx' is not an HTTP status"),
    ("health", "expect", "600", "not an HTTP status"),
    ("health", "headers", "Accept text/html", "not a header"),
    ("health", "headers", "A: b\n    two words: c", "'two words: c' is not a header"),
    ("backup", "keep", "0", "not a whole number of 1 or more"),
    ("notify", "on", "sometimes", "'sometimes' is not one of failure, recovery and always"),
    ("notify", "webhook", "https://example.org/hook", "is not the name of a variable in .env"),
)


class SettingsTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "deploy.ini"

    def read(self, text: str) -> dict[str, Any]:
        self.path.write_text(text, encoding="utf-8")
        return deploy.read_settings(self.path)

    def mistakes(self, text: str) -> list[str]:
        """The complaints about a file, without its name, which each must begin with."""
        with self.assertRaises(deploy.Failure) as caught:
            self.read(text)
        failure, prefix = caught.exception, f"{self.path}, "
        self.assertEqual(failure.status, deploy.MISTAKE)
        self.assertIn(str(self.path), failure.what)
        self.assertIn(deploy.plural(len(failure.details), "mistake"), failure.what)
        for line in failure.details:
            self.assertTrue(line.startswith(prefix), line)
        return [line.removeprefix(prefix) for line in failure.details]


class GoodTest(SettingsTest):
    def test_each_value(self) -> None:
        for section, key, text, value in GOOD:
            with self.subTest(section=section, key=key, text=text):
                self.assertEqual(self.read(f"[{section}]\n{key} = {text}\n")[f"{section}.{key}"], value)

    def test_an_empty_file_gives_every_default(self) -> None:
        settings = self.read("")
        self.assertEqual(set(settings), {f"{section}.{key}" for section, key, *_ in deploy.OPTIONS})
        for section, key, kind, default in deploy.OPTIONS:
            self.assertEqual(settings[f"{section}.{key}"], kind(default), f"{section}.{key}")
        self.assertEqual(settings["deploy.steps"], deploy.STEP_NAMES)
        self.assertEqual((settings["deploy.keep_releases"], settings["health.expect"]), (5, 200))

    def test_what_is_not_named_keeps_its_default(self) -> None:
        default = self.read("")
        settings = self.read("[health]\nexpect = 204\n")
        self.assertEqual(settings, default | {"health.expect": 204})

    def test_ways_of_writing(self) -> None:
        for text in ("[health]\nexpect=204", "[health]\nexpect: 204\n", "[health]\nEXPECT  =  204  \n",
                     "# a\n; b\n\n[pull]\n[health]\n\nexpect =\n    204\n", "[health]\r\nexpect = 204\r\n",
                     "[health]\nhost = a\n[pull]\nbranch = b\n[health]\nexpect = 204\n"):
            with self.subTest(text=text):
                self.assertEqual(self.read(text)["health.expect"], 204)

    def test_a_continuation_that_looks_like_a_key_or_section_is_part_of_the_value(self) -> None:
        settings = self.read("[static]\ncommand = a\n    timeout = 7\n    [pull]\ntimeout = 8\n")
        self.assertEqual(settings["static.command"], (("a",), ("timeout", "=", "7"), ("[pull]",)))
        self.assertEqual(settings["static.timeout"], 8.0)


class BadTest(SettingsTest):
    def test_each_value(self) -> None:
        for section, key, text, complaint in BAD:
            with self.subTest(section=section, key=key, text=text):
                found = self.mistakes(f"\n[{section}]\n{key} = {text}\n")
                self.assertEqual(len(found), 1)
                self.assertTrue(found[0].startswith(f"line 3: [{section}] {key} "), found)
                self.assertIn(complaint, found[0])

    def test_every_mistake_in_one_go_with_its_line_and_the_nearest_name(self) -> None:
        found = self.mistakes(
            "[deploy]\nkeep_release = 5\n\n[helth]\nurl = x\n[health]\nexpect = 20\ncontains = a\ncontains = b\n"
            "[static]\ntimeout = 5 minutes\ncommand =\n    true\n    'open\nzzz = 1\n[DEFAULT]\n")
        self.assertEqual(found, [
            "line 2: [deploy] keep_release is not a key; did you mean keep_releases?",
            "line 4: [helth] is not a section; did you mean health?",
            "line 7: [health] expect '20' is not an HTTP status, as in 200",
            "line 9: [health] contains is set twice",
            "line 11: [static] timeout '5 minutes' is not a number of seconds, as in 30 or 2.5",
            "line 12: [static] command cannot be split into words: no closing quotation",
            "line 15: [static] zzz is not a key",
            "line 16: [DEFAULT] is not a section",
        ])

    def test_a_line_that_is_no_setting(self) -> None:
        self.assertEqual(self.mistakes("[health]\nexpect = 204\nnonsense\nhost = a\n"),
                         ["line 3: neither a [section] nor a key = value"])

    def test_a_line_that_is_no_setting_beside_a_mistake(self) -> None:
        self.assertEqual(self.mistakes("[health]\nnonsense\nexpect = x\n"),
                         ["line 2: neither a [section] nor a key = value",
                          "line 3: [health] expect 'x' is not an HTTP status, as in 200"])

    def test_a_key_before_the_first_section(self) -> None:
        found = self.mistakes("# settings\nexpect = 204\n[health]\nexpect = 204\ntimeout = 3\n")
        self.assertEqual([line.split(":")[0] for line in found], ["line 2"], found)

    def test_no_setting_is_passed_over(self) -> None:
        """However a line is written: it is taken, or it is complained of; the default is never kept in silence."""
        for text in ("[health]\n  expect = 204\n  host = a\n", "  [health]\n  expect = 204\n",
                     "[health] # see [1]\nexpect = 204\n", "[health] \nexpect = 204\n", "[health]]\nexpect = 204\n",
                     "[health];\nexpect = 204\n", "[health]\n\texpect = 204\n", "[ health ]\nexpect = 204\n"):
            with self.subTest(text=text):
                self.path.write_text(text, encoding="utf-8")
                with contextlib.suppress(deploy.Failure):
                    self.assertEqual(deploy.read_settings(self.path)["health.expect"], 204)

    def test_a_path_that_would_destroy_the_checkout(self) -> None:
        self.mistakes("[deploy]\nworkspace = .\n")
        self.mistakes("[deploy]\nshared = .env .\n")

    def test_files_that_cannot_be_read(self) -> None:
        missing = self.path.with_name("other.ini")
        for path, raw, reason in ((missing, None, "No such file"), (self.path.parent, None, "Is a directory"),
                                  (self.path, b"[health]\nhost = \xff\n", "UTF-8")):
            with self.subTest(path=path):
                if raw:
                    path.write_bytes(raw)
                with self.assertRaises(deploy.Failure) as caught:
                    deploy.read_settings(path)
                self.assertEqual(caught.exception.status, deploy.MISTAKE)
                self.assertIn(str(path), caught.exception.what)
                self.assertIn(reason.lower(), caught.exception.what.lower())
                self.assertIn("-c", caught.exception.remedy)


class NearestTest(unittest.TestCase):
    def test_nearest(self) -> None:
        self.assertEqual(deploy.nearest("brunch", ["branch", "remote"]), "; did you mean branch?")
        self.assertEqual(deploy.nearest("xyz", ["branch", "remote"]), "")


class ShippedTest(unittest.TestCase):
    """deploy.ini as it is shipped."""

    text: str
    shipped: Mapping[str, Mapping[str, str]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = SHIPPED.read_text(encoding="utf-8")
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(cls.text)
        cls.shipped = {section: dict(parser[section]) for section in parser.sections()}

    def test_it_is_accepted_and_says_nothing_but_the_defaults(self) -> None:
        settings = deploy.read_settings(SHIPPED)
        for section, key, kind, default in deploy.OPTIONS:
            self.assertEqual(settings.pop(f"{section}.{key}"), kind(default))
        self.assertEqual(settings, {})

    def test_every_option_is_there_with_its_default_in_the_same_order_and_nothing_else(self) -> None:
        wanted: dict[str, dict[str, str]] = {}
        for section, key, _, default in deploy.OPTIONS:
            wanted.setdefault(section, {})[key] = default
        found = {section: {key: value.strip() for key, value in keys.items()} for section, keys in self.shipped.items()}
        self.assertEqual(found, wanted)
        self.assertEqual([(section, *keys) for section, keys in found.items()],
                         [(section, *keys) for section, keys in wanted.items()])

    def test_it_reads_well(self) -> None:
        lines = self.text.splitlines()
        self.assertLessEqual(len(lines), 200)
        for at, line in enumerate(lines, start=1):
            self.assertLessEqual(len(line), 120, f"line {at}")
            self.assertEqual(line, line.rstrip(), f"line {at}")

    def test_every_key_but_hooks_is_explained(self) -> None:
        """There is a comment above it, or above the line before it."""
        above = ""
        explained = True
        for line in self.text.splitlines():
            if line.startswith("["):
                explained = False
            elif found := re.match(r"(\w+) *=", line):
                explained = above.startswith("#") or (explained and found[1] in ("branch", "before", "after"))
                self.assertTrue(explained or found[1] in ("before", "after"), line)
            above = line
