"""The sandbox's five acts, with the promises that they show asserted."""
from __future__ import annotations

import json
import unittest
import urllib.request

from tests.must_run import skip
from tests.sandbox import Client, Missing, Sandbox


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
        with Client(sandbox.url).at_work() as client, Client(f"{sandbox.url}late/", by_body=True).at_work() as late:
            self.assert_act(sandbox.act_two(), 0, "2", "is live and healthy")
            with urllib.request.urlopen(f"{sandbox.url}about/", timeout=10) as answer:
                self.assertEqual(answer.status, 200)
            self.assert_act(sandbox.act_three(), 1, "2", "FAILED", "No module named 'no_such_module'",
                            "is live and healthy")
            self.assert_act(sandbox.act_four(), 1, "2", "FAILED", "500 Internal Server Error", "expected 200")
            self.assert_act(sandbox.act_five(), 0, "1", "is live and healthy")
        self.assertEqual(client.errors + late.errors, [])
        self.assertEqual(client.releases, ["1", "2"])
        self.assertEqual(set(late.releases), {"1 1", "2 2"}, "a worker imported a module of another release")
        self.assertGreater(len(client.waits), 100)
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """The failed releases are gone, their logs are not; the history tells all of it."""
        entries = [json.loads(line) for line in self.sandbox.deploy("history", "--json")[1].splitlines()]
        self.assertEqual([entry["result"] for entry in entries], ["live", "live", "failed", "failed", "live"])
        workspace = self.sandbox.checkout / ".deploy"
        live = {entry["release"] for entry in entries if entry["result"] == "live"}
        self.assertEqual({release.name for release in (workspace / "releases").iterdir()}, live)
        self.assertEqual(len(list((workspace / "logs").iterdir())), len(entries))
        self.assertEqual(len(list((workspace / "venvs").iterdir())), 2)
        self.assertEqual((workspace / "current").resolve().name, entries[-1]["release"])
