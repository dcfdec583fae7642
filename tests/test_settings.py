"""The settings file: what is accepted, what is refused and how, and that deploy.ini is complete."""

from __future__ import annotations

import configparser
import contextlib
import dataclasses
import re
import tempfile
import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deploy

SHIPPED = Path(deploy.__file__).with_name("deploy.ini")
REORDERED = ("env", "pull", "migrate", "static", "restart")
CURL = "curl http://[::1]/\n    logger done"
LINES = "\n    one a\n\n    # a comment\n    two = b\n"

# (section.key, {text: value})
GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("deploy.steps", {"env pull restart": ("env", "pull", "restart")}),
    ("deploy.steps", {" ".join(REORDERED): REORDERED}),
    ("deploy.workspace", {"var/deploy": "var/deploy", "..x/y": "..x/y"}),
    ("deploy.project", {".": ".", "..hidden/src": "..hidden/src"}),
    ("deploy.shared", {".env media/ a/b": (".env", "media/", "a/b"), "": ()}),
    ("deploy.keep_releases", {"1": 1, "010": 10}),
    ("deploy.keep_logs", {"7": 7}),
    ("env.file", {"conf/production.env": "conf/production.env"}),
    ("pull.remote", {"upstream": "upstream"}),
    ("pull.branch", {"release/2.0": "release/2.0", "größe%s": "größe%s"}),
    ("pull.retries", {"0": 0}),
    ("pull.timeout", {"30": 30.0, "2.5": 2.5, "0.5": 0.5, "010": 10.0}),
    ("install.python", {"python3.12": "python3.12"}),
    ("install.command", {"": ()}),
    ("static.command", {"make  css js": (("make", "css", "js"),)}),
    ("static.command", {LINES: (("one", "a"), ("two", "=", "b"))}),
    ("static.command", {"sh -c 'a && b'": (("sh", "-c", "a && b"),)}),
    ("static.command", {'a "b  c" d\\ e "" $HOME *': (("a", "b  c", "d e", "", "$HOME", "*"),)}),
    ("static.before", {"true": (("true",),)}),
    ("migrate.reverse_on_failure", {"yes": True, "no": False}),
    ("restart.after", {CURL: (("curl", "http://[::1]/"), ("logger", "done"))}),
    (
        "restart.main_process",
        {"systemctl show uvicorn": (("systemctl", "show", "uvicorn"),), "": ()},
    ),
    ("health.url", {each: each for each in ("https://a.org", "http://[::1]:8000/a?b=c;d#e", "")}),
    ("restart.bake", {"0": 0.0, "2.5": 2.5}),
    ("health.expect", {"204": 204}),
    ("health.rehearse", {"0": 0, "50": 50}),
    ("health.headers", {"A: b\n    X-C-d:e: f": {"A": "b", "X-C-d": "e: f"}, "": {}}),
    ("health.contains", {'100 % = "fine"': '100 % = "fine"'}),
    ("status.checks", {"a: b 'c d'\n    e-f:g": {"a": (("b", "c d"),), "e-f": (("g",),)}, "": {}}),
    ("backup.keep", {"3": 3}),
    ("notify.on", {"failure": "failure", "recovery": "recovery", "always": "always"}),
    ("notify.webhook", {"DEPLOY_WEBHOOK": "DEPLOY_WEBHOOK", "": ""}),
)

# (section.key, part of the complaint with {} for the text, *texts)
BAD: tuple[tuple[str, ...], ...] = (
    ("deploy.steps", "must begin with env and pull", "", "pull env restart"),
    ("deploy.steps", "end with restart", "env pull"),
    ("deploy.steps", "name no step twice", "env pull static static restart"),
    ("deploy.steps", "'instal' is not a step; did you mean install?", "env pull instal restart"),
    ("deploy.workspace", "{} is not a path below the checkout", "/srv", "../deploy", "", ".", "./"),
    ("deploy.project", "{} is not a path inside the checkout", "a/..", "a/../../b", "/srv"),
    ("deploy.shared", "'/etc/passwd' is not a path", ".env /etc/passwd"),
    ("deploy.shared", "'.' is not a path", ".env ."),
    ("deploy.keep_releases", "{} is not a whole number of 1 or more", "0", "-1", "five", "1.5", ""),
    ("deploy.keep_logs", "{} is not a whole number of 1 or more", "0"),
    ("env.file", "{} is not a path", "/home/ubuntu/.env"),
    ("pull.retries", "{} is not a whole number", "-1", "1.5", ""),
    ("restart.bake", "{} is not a number of seconds, as in 30, or 0", "-1", "5m", ""),
    ("health.rehearse", "{} is not a whole number", "-1", "all"),
    ("pull.timeout", "{} is not a number of seconds, as in 30 or 2.5", "", "0", "0.0", "-1", "5m"),
    ("pull.timeout", "{} is not a number of seconds", "1e3", "inf", "nan", "30 # seconds"),
    ("install.command", "cannot be split into words: no closing quotation", "pipenv 'install"),
    ("install.before", "cannot be split into words: no escaped character", "true\n    echo \\"),
    ("migrate.reverse_on_failure", "{} is not yes or no", "true", "Yes", ""),
    ("health.url", "{} is not a URL", "127.0.0.1:8000", "ftp://a.org/", "http://", "http://a/ b"),
    ("health.expect", "{} is not an HTTP status, as in 200", "", "2xx", "600"),
    ("health.headers", "'Accept text/html' is not a header", "Accept text/html"),
    ("health.headers", "'two words: c' is not a header", "A: b\n    two words: c"),
    ("status.checks", "is not a name and its command", "nginx:", "systemctl is-active nginx"),
    ("status.checks", "cannot be split into words", "nginx: echo 'a"),
    ("backup.keep", "{} is not a whole number of 1 or more", "0"),
    ("notify.on", "'sometimes' is not one of failure, recovery and always", "sometimes"),
    ("notify.webhook", "{} is not the name of a variable in .env", "https://example.org/hook"),
)


def flat(settings: deploy.Settings) -> dict[str, Any]:
    """`section.key` -> value."""
    found = dataclasses.asdict(settings).items()
    return {f"{section}.{key}": value for section, keys in found for key, value in keys.items()}


def options() -> dict[str, Mapping[str, Any]]:
    """`section.key` -> its kind and default, as the table of sections has them."""
    return {
        f"{section}.{each.name}": each.metadata
        for section, described in deploy.SECTIONS.items()
        for each in dataclasses.fields(described)
    }


class SettingsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()), "deploy.ini")

    def read(self, text: str) -> deploy.Settings:
        """The settings of a file with this text."""
        self.path.write_text(text, encoding="utf-8")
        return deploy.read_settings(self.path)

    def mistakes(self, text: str) -> list[str]:
        """The complaints about a file, without its name, which each must begin with."""
        with self.assertRaises(deploy.Failure) as caught:
            self.read(text)
        failure, prefix = caught.exception, f"{self.path}, "
        self.assertEqual(failure.status, deploy.MISTAKE)
        number = deploy.plural(len(failure.details), "mistake")
        self.assertEqual(failure.what, f"{self.path} has {number}")
        for line in failure.details:
            self.assertTrue(line.startswith(prefix), line)
        return [line.removeprefix(prefix) for line in failure.details]


class GoodTest(SettingsTest):
    def test_each_value(self) -> None:
        for name, values in GOOD:
            section, key = name.split(".")
            for text, value in values.items():
                with self.subTest(name=name, text=text):
                    self.assertEqual(flat(self.read(f"[{section}]\n{key} = {text}\n"))[name], value)

    def test_an_empty_file_gives_every_default(self) -> None:
        settings = self.read("")
        wanted = {name: option["kind"](option["default"]) for name, option in options().items()}
        self.assertEqual(flat(settings), wanted)
        self.assertEqual(settings.deploy.steps, deploy.STEP_NAMES)
        self.assertEqual((settings.deploy.keep_releases, settings.health.expect), (5, 200))
        self.assertEqual(settings.restart.main_process[0][-2:], ("--value", "gunicorn"))

    def test_what_is_not_named_keeps_its_default(self) -> None:
        settings = self.read("[health]\nexpect = 204\n")
        self.assertEqual(flat(settings), flat(self.read("")) | {"health.expect": 204})

    def test_nothing_changes_them(self) -> None:
        settings = self.read("")
        for place, key in ((settings, "pull"), (settings.pull, "timeout")):
            with self.assertRaises(dataclasses.FrozenInstanceError):
                setattr(place, key, None)

    def test_every_step_has_a_section_and_hooks(self) -> None:
        sections = vars(self.read("[pull]\nbefore = a\n[restart]\nafter = b\n"))
        for step in deploy.STEP_NAMES:
            self.assertIsInstance(sections[step], deploy.Step)
        self.assertEqual((sections["pull"].before, sections["pull"].after), ((("a",),), ()))
        self.assertEqual((sections["restart"].before, sections["restart"].after), ((), (("b",),)))

    def test_ways_of_writing(self) -> None:
        for text in (
            "[health]\nexpect=204",
            "[health]\nexpect: 204\n",
            "[health]\nEXPECT  =  204  \n",
            "# a\n; b\n\n[pull]\n[health]\n\nexpect =\n    204\n",
            "[health]\r\nexpect = 204\r\n",
            "[health]\nhost = a\n[pull]\nbranch = b\n[health]\nexpect = 204\n",
        ):
            with self.subTest(text=text):
                self.assertEqual(self.read(text).health.expect, 204)

    def test_a_continuation_that_looks_like_a_key_or_section_is_part_of_the_value(self) -> None:
        static = self.read(
            "[static]\ncommand = a\n    timeout = 7\n    [pull]\ntimeout = 8\n"
        ).static
        self.assertEqual(static.command, (("a",), ("timeout", "=", "7"), ("[pull]",)))
        self.assertEqual(static.timeout, 8.0)

    def test_the_commands_of_the_steps_and_those_that_run_with_sudo(self) -> None:
        settings = self.read(
            "[install]\ncommand =\n[services]\ncommand = a\n[static]\ncommand = b 1\n    c\n"
            "[migrate]\ncommand = d\n"
            "[restart]\ncommand = sudo -n e 'f g'\n    h\n    sudo k\nproxy = sudo -n i\n"
            "after = sudo -n l\n"
        )
        words = [" ".join(argv) for argv in settings.step_commands()]
        self.assertEqual(words, ["a", "b 1", "c", "d", "sudo -n e f g", "h", "sudo k"])
        self.assertEqual(
            settings.restart.sudo("--list"),
            [("sudo", "-n", "--list", *words) for words in (("e", "f g"), ("l",), ("i",))],
        )


class BadTest(SettingsTest):
    def test_each_value(self) -> None:
        for name, complaint, *texts in BAD:
            section, key = name.split(".")
            for text in texts:
                with self.subTest(name=name, text=text):
                    found = self.mistakes(f"\n[{section}]\n{key} = {text}\n")
                    self.assertEqual(len(found), 1, found)
                    self.assertTrue(found[0].startswith(f"line 3: [{section}] {key} "), found)
                    self.assertIn(complaint.replace("{}", repr(text)), found[0])

    def test_every_mistake_in_one_go_with_its_line_and_the_nearest_name(self) -> None:
        found = self.mistakes(
            "[deploy]\nkeep_release = 5\n\n[helth]\nurl = x\n[health]\nexpect = 20\n"
            "contains = a\ncontains = b\n[static]\ntimeout = 5 minutes\ncommand =\n    true\n"
            "    'open\nzzz = 1\n[DEFAULT]\n[restart]\nproces = x\n"
        )
        self.assertEqual(
            found,
            [
                "line 2: [deploy] keep_release is not a key; did you mean keep_releases?",
                "line 4: [helth] is not a section; did you mean health?",
                "line 7: [health] expect '20' is not an HTTP status, as in 200",
                "line 9: [health] contains is set twice",
                "line 11: [static] timeout '5 minutes' is not a number of seconds, as in 30 or 2.5",
                "line 12: [static] command cannot be split into words: no closing quotation",
                "line 15: [static] zzz is not a key",
                "line 16: [DEFAULT] is not a section",
                "line 18: [restart] proces is not a key; did you mean main_process?",
            ],
        )

    def test_a_key_that_is_set_again_in_any_way_of_writing(self) -> None:
        """Also where the section begins again, and where what it said first was a mistake."""
        self.assertEqual(
            self.mistakes("[health]\nexpect = x\nEXPECT: 200\n[pull]\n[health]\nexpect=201\n"),
            [
                "line 2: [health] expect 'x' is not an HTTP status, as in 200",
                "line 3: [health] expect is set twice",
                "line 6: [health] expect is set twice",
            ],
        )

    def test_a_line_that_is_no_setting(self) -> None:
        neither = "neither a [section] nor a key = value"
        for text, *wanted in (
            ("[health]\nexpect = 204\nnonsense\nhost = a\n", f"line 3: {neither}"),
            ("[health]\nexpect\n[pull\n", f"line 2: {neither}", f"line 3: {neither}"),
            (
                "[health]\nexpect = x\nnonsense\n",
                "line 2: [health] expect 'x' is not an HTTP status, as in 200",
                f"line 3: {neither}",
            ),
            (
                "# a\nexpect = 204\n[health]\nhost = a\n",
                "line 2: stands before the first [section]",
            ),
        ):
            with self.subTest(text=text):
                self.assertEqual(self.mistakes(text), wanted)

    def test_no_setting_is_passed_over(self) -> None:
        """However it is written, it is taken or complained of: the default is never kept."""
        for text in (
            "[health]\n  expect = 204\n  host = a\n",
            "  [health]\n  expect = 204\n",
            "[health] # see [1]\nexpect = 204\n",
            "[health] \nexpect = 204\n",
            "[health]]\nexpect = 204\n",
            "[health];\nexpect = 204\n",
            "[health]\n\texpect = 204\n",
            "[ health ]\nexpect = 204\n",
            "\ufeff[health]\nexpect = 204\n",
        ):
            with self.subTest(text=text), contextlib.suppress(deploy.Failure):
                self.assertEqual(self.read(text).health.expect, 204)

    def test_files_that_cannot_be_read(self) -> None:
        self.path.write_bytes(b"[health]\nhost = \xff\n")
        for path, reason in (
            (self.path.with_name("other.ini"), "No such file"),
            (self.path.parent, "Is a directory"),
            (self.path, "it is not UTF-8"),
        ):
            with self.subTest(path=path), self.assertRaises(deploy.Failure) as caught:
                deploy.read_settings(path)
            self.assertEqual(caught.exception.status, deploy.MISTAKE)
            self.assertIn(f"{path} cannot be read: {reason}", caught.exception.what)
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
        self.assertEqual(deploy.read_settings(SHIPPED), deploy.Settings())

    def test_every_option_is_there_with_its_default_and_nothing_else(self) -> None:
        wanted = {name: option["default"] for name, option in options().items()}
        sections = self.shipped.items()
        found = {
            f"{name}.{key}": text.strip() for name, keys in sections for key, text in keys.items()
        }
        self.assertEqual(found, wanted)

    def test_the_order_is_that_of_the_table_with_the_hooks_of_a_step_last(self) -> None:
        self.assertEqual(list(self.shipped), list(deploy.SECTIONS))
        for section, keys in self.shipped.items():
            described = [each.name for each in dataclasses.fields(deploy.SECTIONS[section])]
            if issubclass(deploy.SECTIONS[section], deploy.Step):
                described = [*described[2:], *described[:2]]
                self.assertEqual(described[-2:], ["before", "after"])
            self.assertEqual(list(keys), described)

    def test_it_reads_well(self) -> None:
        lines = self.text.splitlines()
        self.assertLessEqual(len(lines), 200)
        for at, line in enumerate(lines, start=1):
            self.assertLessEqual(len(line), 120, f"line {at}")
            self.assertEqual(line, line.rstrip(), f"line {at}")

    def test_every_key_but_hooks_is_explained(self) -> None:
        """There is a comment above it; `branch` has the one above the line before it."""
        above = ""
        for line in self.text.splitlines():
            found = re.match(r"(\w+) *=", line)
            if found and found[1] not in ("branch", "before"):
                hook = found[1] == "after" and above.startswith("before")
                self.assertTrue(hook or above.startswith("# "), line)
            above = line
