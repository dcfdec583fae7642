"""What users ask decides: the rehearsal of the candidate, and the stand-by beside the old gunicorn."""

from __future__ import annotations

import json
import signal
import socket
import sys
import tempfile
import unittest
from pathlib import Path

import deploy
from tests.lab import LabTest, Run, wait_for

LINE = '192.0.2.1 - - [24/Nov/2026:07:15:00 +0000] "{} HTTP/1.1" {} 12 "-" "a browser"\n'
# Tells what a gunicorn would: `told SIDE ROLE REQUESTS ERRORS`, the errors last, so that all is counted when they are;
# SIDE is the token's place in the file.
TOLD = """#!{python} -IS
import json, os, socket, sys
side, role, requests, errors = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
told = json.load(open(os.environ["LAB"] + "/checkout/.deploy/statsd"))
token = "stranger" if side == "stranger" else [*[""] * 9, *told["tokens"]][int(side)]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gunicorn:
    for number in range(requests):
        for said in (f"duration:{20 + number}.5|ms", f"status.{200 if number < requests - errors else 500}:1|c|@1.0"):
            gunicorn.sendto(
                f"{token}.{role}.gunicorn.request.{said}".encode(), ("127.0.0.1", told["port"])
            )
"""
COMMANDS = "\n    standby start\n    restart\n    standby stop"


class Rehearsal(LabTest):
    """The paths of the web server's log are asked of the candidate."""

    def setUp(self) -> None:
        super().setUp()
        self.log_file = self.lab.root / "access.log"
        self.lab.setting("health", "rehearse", "3")
        self.lab.setting("health", "log", str(self.log_file))

    def log(self, *asked: str) -> None:
        """Requests with their statuses, `GET /path 200` each."""
        lines = (LINE.format(*each.rsplit(" ", 1)) for each in asked)
        self.log_file.write_text("".join(lines))

    def asked(self) -> list[str]:
        """What was asked of the candidate beside the page of the health check."""
        return [path for path in (self.lab.root / "asked").read_text().split() if path != "/"]

    def test_what_only_the_candidate_cannot_answer_refuses_it(self) -> None:
        self.log("GET /a 200", "GET /b 302", "GET /c 200")
        self.lab.push({"app": "two", "broken": "/b /c"})
        self.assert_failed(
            self.lab.deploy(), "the candidate cannot answer what the live release can: /b, /c"
        )
        self.assertEqual(self.asked(), ["/a", "/b", "/c"])

    def test_what_was_broken_before_does_not(self) -> None:
        self.log("GET /a 200")
        self.lab.setting("health", "rehearse", "0")
        self.lab.push({"app": "two", "broken": "/a"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual(self.asked(), [])
        self.lab.setting("health", "rehearse", "3")
        self.lab.push({"app": "three"})
        self.assert_deployed(self.lab.deploy(), "three")
        self.assertEqual(self.asked(), ["/a"])

    def test_the_most_frequent_first_and_nothing_that_changes_anything(self) -> None:
        self.log(
            *["GET /rare 200"], *["GET /often 200"] * 3, *["GET /more 304"] * 2, "GET /last 200",
            *["GET /accounts/logout/ 302", "GET /Sign-Out 302", "GET /a/1/delete/ 200"] * 9,
            *["GET /remove?x 200", "GET /search?q=x 200", "GET /gone 404", "GET /ill 500"] * 9,
            *["POST /form 200", "GET /static/a.css 200", "GET /media/a.png 200"] * 9,
        )  # fmt: skip
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual(self.asked(), ["/often", "/more", "/rare"])

    def test_the_end_of_a_long_log(self) -> None:
        self.log(*["GET /old 200"] * 50_000, *["GET /new 200"] * 60_000)
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual(self.asked(), ["/new"])

    def test_without_a_log(self) -> None:
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn(f"no rehearsal: {self.log_file} cannot be read: No such file", run.stdout)

    def test_one_limit_on_the_time_in_all(self) -> None:
        """What the candidate leaves without an answer is asked of the live release, too."""
        self.log("GET /a 200", "GET /b 200", "GET /c 200")
        self.lab.setting("health", "timeout", "1")
        self.lab.setting("health", "deadline", "1.5")
        script = (self.lab.bin / "gunicorn").read_text()
        wanted = 'read(f"{lab}/hold") == "candidate"'
        self.assertIn(wanted, script)
        self.lab.script("gunicorn", script.replace(wanted, 'path != "/"'))
        self.lab.push({"app": "two"})
        self.assert_failed(self.lab.deploy(), "what the live release can: /a;")

    def test_a_rollback_rehearses_nothing(self) -> None:
        self.log("GET /a 200")
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        (self.lab.root / "asked").unlink()
        self.assert_deployed(self.lab.deploy("rollback"), "one")
        self.assertEqual(self.asked(), [])


class Bake(LabTest):
    """The stand-by with the new release answers beside the old gunicorn."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.script("told", TOLD.replace("{python}", sys.executable))
        self.lab.script("standby", 'echo "standby $1" >> "$LAB/done"')
        self.lab.first("restart", 'echo restart >> "$LAB/done"')
        self.lab.setting("restart", "command", COMMANDS)
        self.bake("0.2")

    def bake(self, seconds: str) -> None:
        self.lab.setting("restart", "bake", seconds)

    def at_start(self, *told: str) -> None:
        """What is told when the stand-by has started: SIDE ROLE REQUESTS ERRORS."""
        lines = "".join(f"told {each}\n" for each in told)
        self.lab.script(
            "standby", f'echo "standby $1" >> "$LAB/done"\n[ $1 = stop ] || {{\n{lines}:\n}}'
        )

    def deploy(self, text: str = "two") -> Run:
        """Deploy a release; what was done before is forgotten."""
        (self.lab.root / "done").unlink(missing_ok=True)
        self.lab.push({"app": text})
        return self.lab.deploy()

    def done(self) -> list[str]:
        """The commands of the restart that ran."""
        return (self.lab.root / "done").read_text().splitlines()

    def test_the_line_and_the_history(self) -> None:
        self.assert_deployed(self.deploy(), "two")
        self.bake("1")
        self.at_start("-2 gunicorn 30 1", "-1 gunicorn-standby 20 0")
        run = self.deploy("three")
        self.assert_deployed(run, "three")
        self.assertIn(
            "the new release answered 20 requests, 0 errors, median 30 ms, longest 40 ms; "
            "the one before 30 requests, 1 error, median 36 ms, longest 50 ms",
            run.stdout,
        )
        entry = self.lab.history()[-1]
        self.assertEqual([entry[key] for key in ("requests", "errors", "slowest")], [50, 1, 0.05])
        self.assertEqual(self.done(), ["standby start", "restart", "standby stop"])
        self.assertEqual((self.lab.workspace / "statsd").stat().st_mode & 0o777, 0o600)

    def test_a_worse_one_is_taken_back_and_the_old_gunicorn_never_stops(self) -> None:
        self.assert_deployed(self.deploy("one"), "one")
        self.at_start("-2 gunicorn 50 0", "-1 gunicorn-standby 40 3")
        run = self.deploy()
        self.assert_failed(
            run, "users get more errors of the new release (40 requests, 3 errors,", "50 requests"
        )
        self.assertEqual(self.done(), ["standby start", "standby stop"])
        self.assertEqual(self.lab.history()[-1]["errors"], 3)

    def test_the_old_release_is_known_however_many_deployments_failed(self) -> None:
        self.assert_deployed(self.deploy("one"), "one")
        for side in ("-2", "-3", "-4"):
            self.at_start(f"{side} gunicorn 50 0", "-1 gunicorn-standby 40 9")
            self.assert_failed(self.deploy(), "users get more errors of the new release")
            self.lab.tick()

    def test_as_many_errors_as_before_are_no_reason(self) -> None:
        self.assert_deployed(self.deploy("one"), "one")
        self.at_start("-2 gunicorn 50 10", "-1 gunicorn-standby 50 20")
        self.assert_deployed(self.deploy(), "two")

    def test_what_others_say_counts_for_nothing(self) -> None:
        self.assert_deployed(self.deploy("one"), "one")
        self.at_start("-2 gunicorn 9 0", "stranger gunicorn 50 50", "-1 candidate 50 50")
        run = self.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("the new release answered 0 requests, 0 errors", run.stdout)

    def test_nobody_who_asks_is_waited_for(self) -> None:
        self.bake("1000")
        self.assert_deployed(self.deploy(), "two")
        self.assertNotIn("requests", self.lab.log())

    def test_enough_requests_end_it(self) -> None:
        self.bake("1000")
        self.assert_deployed(self.deploy("one"), "one")
        self.at_start("-2 gunicorn 20 0", *["-1 gunicorn-standby 50 0"] * 4)
        self.assert_deployed(self.deploy(), "two")

    def test_it_can_be_switched_off(self) -> None:
        self.bake("0")
        self.assert_deployed(self.deploy("one"), "one")
        self.at_start("-2 gunicorn 50 0", "-1 gunicorn-standby 40 40")
        run = self.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("the new release answered 40 requests, 40 errors", run.stdout)

    def test_errors_after_the_switch(self) -> None:
        self.assert_deployed(self.deploy("one"), "one")
        self.at_start("-2 gunicorn 50 0")
        script = (self.lab.bin / "restart").read_text()
        self.lab.script("restart", f"{script}told -1 gunicorn 10 5\n")
        self.assert_failed(
            self.deploy(), "users get more errors of the new release (10 requests, 5 errors"
        )
        whole = ["standby start", "restart", "standby stop"]
        self.assertEqual(self.done(), whole * 2)

    def test_a_standby_that_does_not_start(self) -> None:
        self.lab.first("standby", "[ $1 = stop ] || exit 5")
        self.assert_failed(self.deploy(), "`standby start` ended with status 5")
        self.assertEqual(self.done(), ["standby stop"])

    def test_after_a_kill_all_is_restarted(self) -> None:
        """The machine may have started anew meanwhile, and gunicorn with the new release."""
        self.lab.first("standby", "[ $1 = stop ] || block standby")
        self.lab.push({"app": "two"})
        self.lab.kill(self.lab.blocked("standby"))
        self.lab.kill_all()
        self.lab.script("standby", 'echo "standby $1" >> "$LAB/done"')
        self.assert_status(self.lab.deploy("backup"), 0)
        self.assertEqual(self.done(), ["standby start", "restart", "standby stop"])
        self.assert_live("one")

    def test_a_signal_ends_it(self) -> None:
        self.bake("1000")
        self.assert_deployed(self.deploy("one"), "one")
        self.at_start("-2 gunicorn 9 0", "-1 gunicorn-standby 9 0")
        (self.lab.root / "done").unlink()
        self.lab.push({"app": "two"})
        process = self.lab.start()
        wait_for(
            lambda: (self.lab.root / "done").exists() and set(self.lab.running()) == {process.pid},
            "it waits",
        )
        process.send_signal(signal.SIGTERM)
        self.assert_failed(
            self.lab.end(process), "ended by SIGTERM", status=143, result="interrupted"
        )
        self.assertEqual(self.done(), ["standby start", "standby stop"])

    def test_a_port_that_is_taken(self) -> None:
        self.assert_deployed(self.deploy("one"), "one")
        told = self.lab.workspace / "statsd"
        port = json.loads(told.read_text())["port"]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", port))
            run = self.deploy()
        self.assert_deployed(run, "two")
        self.assertIn(f"another program has port {port}", run.stdout)
        self.lab.tick()
        self.assert_deployed(self.deploy("three"), "three")
        self.assertGreater(json.loads(told.read_text())["port"], 0)


class AnswersTest(unittest.TestCase):
    def answers(self, requests: int, errors: int) -> deploy.Answers:
        return deploy.Answers([1.0] * requests, errors)

    def test_when_one_is_clearly_worse(self) -> None:
        for new, old, worse in (
            ((3, 3), (9, 0), True),
            ((2, 2), (9, 0), False),
            ((100, 3), (100, 0), True),
            ((200, 3), (100, 0), False),
            ((100, 12), (100, 5), False),
            ((100, 13), (100, 5), True),
            ((0, 0), (1, 0), False),
        ):
            with self.subTest(new=new, old=old):
                self.assertEqual(self.answers(*new).worse_than(self.answers(*old)), worse)

    def test_a_torn_file_is_as_none(self) -> None:
        file = Path(self.enterContext(tempfile.TemporaryDirectory()), "statsd")
        for text in ("", "{", "[]", "null"):
            file.write_text(text)
            deploy.Traffic(file)
            self.assertEqual(len(json.loads(file.read_text())["tokens"]), 1, text)


if __name__ == "__main__":
    unittest.main()
