"""The sandbox's five acts, with the promises that they show asserted; and real migrations, taken back."""

from __future__ import annotations

import json
import re
import sqlite3
import unittest
import urllib.request

from tests.must_run import skip
from tests.sandbox import MIGRATION, Client, Missing, Sandbox


class FiveActs(unittest.TestCase):
    """Real git, pipenv, Django and gunicorn; each act begins with what the one before left."""

    def setUp(self) -> None:
        try:
            self.sandbox = Sandbox(quiet=True)
            self.addCleanup(self.sandbox.close)
            self.sandbox.build()
        except Missing as missing:
            skip("sandbox", missing)

    def assert_act(self, act: tuple[int, str], status: int, version: str, *sentences: str) -> None:
        """The act ended with this status and these words in its last line, and this version answers now."""
        last = act[1].splitlines()[-1]
        self.assertEqual(act[0], status, act[1])
        for sentence in sentences:
            self.assertIn(sentence, last, act[1])
        with urllib.request.urlopen(self.sandbox.url, timeout=10) as answer:
            self.assertEqual(answer.headers["X-Release"], version)
        with self.subTest("the secret is not in the output"):
            secret = (self.sandbox.checkout / ".env").read_text().split("'")[1]
            self.assertNotIn(secret, act[1])

    def test_no_request_is_lost_and_no_broken_release_is_seen(self) -> None:
        sandbox = self.sandbox
        self.assert_act(sandbox.act_one(), 0, "1", "is live and healthy")
        client, late = Client(sandbox.url, 0.02), Client(f"{sandbox.url}late/", 0.02, by_body=True)
        writer = sandbox.writer(0.02)
        with client.at_work(), late.at_work(), writer.at_work():
            self.assert_act(sandbox.act_two(), 0, "2", "is live and healthy")
            with urllib.request.urlopen(f"{sandbox.url}about/", timeout=10) as answer:
                self.assertEqual(answer.status, 200)
            self.assert_act(
                sandbox.act_three(),
                1,
                "2",
                "FAILED",
                "No module named 'no_such_module'",
                "is live and healthy",
            )
            self.assert_act(
                sandbox.act_four(), 1, "2", "FAILED", "500 Internal Server Error", "expected 200"
            )
            self.assert_act(sandbox.act_five(), 0, "1", "is live and healthy")
        self.assertEqual(client.errors + late.errors + writer.errors, [])
        self.assertEqual(sandbox.answers() - 1, len(writer.waits))
        self.assertEqual(client.releases, ["1", "2"])
        self.assertEqual(
            set(late.releases), {"1 1", "2 2"}, "a worker imported a module of another release"
        )
        self.assertGreater(len(client.waits), 100)
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """The failed releases are gone, their logs are not; the history tells all of it."""
        entries = [
            json.loads(line) for line in self.sandbox.deploy("history", "--json")[1].splitlines()
        ]
        self.assertEqual(
            [entry["result"] for entry in entries], ["live", "live", "failed", "failed", "live"]
        )
        workspace = self.sandbox.checkout / ".deploy"
        live = {entry["release"] for entry in entries if entry["result"] == "live"}
        self.assertEqual({release.name for release in (workspace / "releases").iterdir()}, live)
        self.assertEqual(len(list((workspace / "logs").iterdir())), len(entries))
        self.assertEqual(len(list((workspace / "venvs").iterdir())), 2)
        self.assertEqual((workspace / "current").resolve().name, entries[-1]["release"])


FIXED = """\
from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("formsApp", "0002_form_open")]
    operations = [migrations.RemoveField("form", "open"), migrations.RunSQL("SELECT 1")]
"""


class Migrations(unittest.TestCase):
    """Of the older Django that is supported; the five acts and the booted server have the newer one."""

    def setUp(self) -> None:
        try:
            self.sandbox = Sandbox(quiet=True)
            self.addCleanup(self.sandbox.close)
            self.sandbox.version = (3, 11)
            self.sandbox.build()
        except Missing as missing:
            skip("sandbox", missing)

    def columns(self) -> list[str]:
        """The columns of the form's table."""
        with sqlite3.connect(self.sandbox.root / "db.sqlite3") as database:
            found = [name for _, name, *_ in database.execute("PRAGMA table_info(formsApp_form)")]
        database.close()
        return found

    def deploy(self, status: int, *arguments: str) -> str:
        """Run deploy.py, which ends with this status; what it said."""
        ended, said = self.sandbox.deploy(*arguments)
        self.assertEqual(ended, status, said)
        return said

    def test_they_are_listed_reversed_and_restored(self) -> None:
        sandbox, migrations = self.sandbox, self.sandbox.author / "formsApp/migrations"
        self.deploy(0)
        (migrations / "0002_form_open.py").write_text(MIGRATION)
        sandbox.push("Close forms")
        self.assertIn("to be applied: formsApp.0002_form_open\n", self.deploy(0))
        self.assertIn("open", self.columns())

        with self.subTest("rollback --reverse-migrations"):
            said = self.deploy(0, "rollback", "--no-freeze", "--reverse-migrations")
            self.assertIn("has formsApp.0002_form_open more than", said)
            self.assertNotIn("open", self.columns())
            self.assertIn("to be applied: formsApp.0002_form_open\n", self.deploy(0))

        with self.subTest("reverse_on_failure"):
            sandbox.edit(
                "deploy.ini", "[health]\n", "[migrate]\nreverse_on_failure = yes\n[health]\n"
            )
            (migrations / "0003_more.py").write_text(
                FIXED.replace(', migrations.RunSQL("SELECT 1")', "")
            )
            sandbox.edit(
                "formsApp/views.py",
                'render(request, "formsApp/index.html"',
                'render(request, "no.html"',
            )
            sandbox.push("Use a template that is not there")
            said = self.deploy(1)
            self.assertIn(
                "note: formsApp.0003_more: Remove field open from form; ",
                said,
            )
            self.assertIn(
                "applied: formsApp.0003_more; not applied: none; those applied were reversed", said
            )
            self.assertIn("open", self.columns())

        with self.subTest("one that cannot be reversed"):
            (migrations / "0003_more.py").write_text(FIXED)
            sandbox.push("Add a migration that stays")
            said = self.deploy(1)
            self.assertIn(
                "note: formsApp.0003_more cannot be reversed\n",
                said,
            )
            self.assertIn("no migration was reversed, because formsApp.0003_more cannot be", said)
            self.assertNotIn("open", self.columns())

        with self.subTest("the command of the sentence"):
            found = re.search(r"comes back with: python3 deploy.py (restore) (\S+) (--yes);", said)
            assert found, said
            self.deploy(0, found[1], found[2], "--test")
            self.assertNotIn("open", self.columns())
            self.deploy(0, *found.groups())
            self.assertIn("open", self.columns())
        self.assertEqual([path.name for path in sandbox.root.glob("restore_*")], [])
