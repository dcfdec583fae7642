"""The other commands, and what a mistake on the command line says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unittest

from tests.lab import PROJECT, LabTest, with_setting

HTTPS = "advice: the site is not served over HTTPS; sudo certbot --nginx: see docs/server.md\n"


class Status(LabTest):
    def test_of_a_healthy_site(self) -> None:
        run = self.lab.deploy("status")
        self.assert_status(run, 0)
        for words in (self.lab.linked("current"), "says one", "good: 200 OK", "deployed by"):
            self.assertIn(words, run.stdout)
        self.assertRegex(run.stdout, r"(?m)^lock +free$")

    def test_of_a_site_that_is_down(self) -> None:
        (self.lab.root / "sick").write_text("one")
        run = self.lab.deploy("status")
        self.assert_status(run, 1)
        self.assertIn("BAD: 500 Internal Server Error", run.stdout)

    def test_of_something_else_that_is_down(self) -> None:
        self.lab.setting(
            "status",
            "checks",
            "\n  app: echo at work\n  mail: sh -c 'echo the queue is full; exit 3'",
        )
        run = self.lab.deploy("status")
        self.assert_status(run, 1)
        for line in (
            "app         good: at work",
            "mail        BAD: the queue is full (ended with status 3)",
        ):
            self.assertIn(f"{line}\n", run.stdout)

    def test_the_disk(self) -> None:
        self.assertRegex(self.lab.deploy("status").stdout, r"disk +good: [\d.]+ GB free\n")

    def test_a_run_that_was_cut_off(self) -> None:
        """Between a kill and the next run, `status` says what is unfinished, and exits 1."""
        self.lab.script("services", "block services")
        process = self.lab.blocked("services")
        self.lab.kill(process)
        self.lab.kill_all()
        run = self.lab.deploy("status")
        self.assert_status(run, 1)
        self.assertRegex(
            run.stdout,
            r"unfinished +BAD: a deploy was cut off.*: release; the next run puts it right",
        )
        self.lab.script("services", "")
        self.assert_deployed(self.lab.deploy(), "one")
        self.assert_status(self.lab.deploy("status"), 0)

    def test_for_programs(self) -> None:
        found = json.loads(self.lab.deploy("status", "--json").stdout)
        self.assertEqual(
            (found["release"], found["revision"]), (self.lab.linked("current"), self.lab.head())
        )
        self.assertEqual((found["healthy"], found["lock"]), (True, ""))
        self.assertEqual([*found["checks"]], ["health", "app", "disk"])
        self.assertEqual(found["checks"]["app"], {"good": True, "saw": "at work"})

    def test_during_a_deployment(self) -> None:
        self.lab.script("services", "block services")
        process = self.lab.blocked("services")
        found = json.loads(self.lab.deploy("status", "--json").stdout)
        self.lab.unblock("services")
        self.assert_deployed(self.lab.end(process), "one")
        self.assertRegex(found["lock"], rf"^deploy by .* \(process {process.pid}\), at services$")


class Maintenance(LabTest):
    def test_on_and_off(self) -> None:
        flag = self.lab.workspace / "maintenance"
        for state, there, status in (
            ("on", True, 1),
            ("on", True, 1),
            ("off", False, 0),
            ("off", False, 0),
        ):
            run = self.lab.deploy("maintenance", state)
            self.assert_status(run, 0)
            self.assertEqual((run.stdout, flag.exists()), (f"maintenance is {state}\n", there))
            self.assert_status(self.lab.deploy("status"), status)

    def test_a_deployment_is_possible_meanwhile(self) -> None:
        self.lab.deploy("maintenance", "on")
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("warning: nginx answers 503 to everyone; end it: ", run.stdout)
        self.assertTrue((self.lab.workspace / "maintenance").exists())


class Restart(LabTest):
    def setUp(self) -> None:
        super().setUp()
        for name in ("services", "restart", "proxy"):
            self.lab.first(name, f'echo {name} >> "$LAB/order"')

    def test_everything_in_the_right_order(self) -> None:
        release = self.lab.linked("current")
        since = json.loads(self.lab.deploy("status", "--json").stdout)["ended"]
        self.assert_status(self.lab.deploy("restart"), 0)
        self.assert_live("one")
        self.assertEqual(
            (self.lab.root / "order").read_text().split(), ["services", "proxy", "restart"]
        )
        self.assertEqual((self.lab.linked("current"), self.lab.linked("previous")), (release, ""))
        self.assertEqual(self.lab.results(), ["live", "restarted"])
        self.assertEqual(json.loads(self.lab.deploy("status", "--json").stdout)["ended"], since)

    def test_a_deployment_leaves_nginx_alone(self) -> None:
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual((self.lab.root / "order").read_text().split(), ["services", "restart"])

    def test_what_could_not_start_is_not_restarted(self) -> None:
        (self.lab.workspace / "current" / "boot").write_text("broken")
        run = self.lab.deploy("restart")
        self.assert_failed(run, "restart", "the candidate was not proven")
        self.assertEqual((self.lab.root / "order").read_text().split(), ["services", "proxy"])

    def test_nginx_with_a_mistake_in_its_files(self) -> None:
        self.lab.script("proxy", "echo nginx: unknown directive; exit 1")
        self.assert_failed(self.lab.deploy("restart"), "restart", "nginx: unknown directive")

    def test_it_waits_for_a_deployment(self) -> None:
        self.lab.script("services", "block services")
        process = self.lab.blocked("services")
        self.assert_sentence(self.lab.deploy("restart"), 75, ["deploy by"])
        self.lab.script("services", "")
        restart = self.lab.start("restart", "--wait", "60")
        self.lab.await_waiting(restart)
        self.lab.unblock("services")
        for each in (process, restart):
            self.assert_status(self.lab.end(each), 0)
        self.assertEqual(self.lab.results()[-2:], ["live", "restarted"])
        self.assert_live("one")


class Cron(LabTest):
    """With what cron gives a command: a short PATH, HOME, and no terminal."""

    def deploy(self) -> str:
        """Run the line of the README's crontab; what cron would mail."""
        local = self.lab.root / "home" / ".local"
        local.mkdir(exist_ok=True)
        if not (local / "bin").exists():
            (local / "bin").symlink_to(self.lab.bin)
        environment = {
            "HOME": str(self.lab.root / "home"),
            "LOGNAME": "x",
            "SHELL": "/bin/sh",
            "PATH": "/usr/bin:/bin",
            "LAB": str(self.lab.root),
        }
        run = subprocess.run(
            [sys.executable, "deploy.py", "--if-changed"],
            cwd=self.lab.checkout,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return run.stdout

    def test_nothing_is_mailed_unless_something_is_new(self) -> None:
        self.assertEqual(self.deploy(), "")
        self.lab.push({"app": "two"})
        self.assertIn("is live and healthy", self.deploy())
        self.assert_live("two")
        self.assertEqual(self.deploy(), "")

    def test_a_revision_that_fails_is_mailed_once(self) -> None:
        self.lab.push({"static": "broken"})
        self.assertIn("FAILED: ", self.deploy())
        self.assertEqual(self.deploy(), "")
        self.assertEqual(self.lab.results(), ["live", "failed"])


class NothingDeployed(LabTest):
    deployed = ()

    def test_status(self) -> None:
        run = self.lab.deploy("status")
        self.assert_status(run, 1)
        self.assertRegex(run.stdout, r"(?m)^live +nothing$")

    def test_other_commands(self) -> None:
        self.assertEqual(self.lab.deploy("history").stdout, "")
        self.assert_sentence(self.lab.deploy("logs"), 1, ["there is no such log"])
        self.assert_sentence(
            self.lab.deploy("manage", "check"), 1, ["nothing is live yet", "deploy first"]
        )
        self.assert_sentence(self.lab.deploy("rollback"), 1, ["no earlier healthy release"])
        restart = "FAILED: there is nothing to restart; no release is live yet; deploy first"
        self.assert_sentence(self.lab.deploy("restart"), 1, [restart])
        self.assert_status(self.lab.deploy("check"), 0)


class History(LabTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.push({"app": "two", "static": "broken"}, "breaks the static files")
        self.assert_failed(self.lab.deploy())

    def test_for_humans(self) -> None:
        run = self.lab.deploy("history")
        self.assert_status(run, 0)
        good, bad = run.stdout.splitlines()
        start = r"^\d{8}T\d{6}Z  live +[0-9a-f]{7} +[\d.]+ s  script +says one"
        self.assertRegex(good, start + r"  \(env .* restart [\d.]+\)$")
        self.assertRegex(
            bad, r"  failed +[0-9a-f]{7} .* breaks the static files  \(env .* static [\d.]+\)$"
        )

    def test_for_programs(self) -> None:
        lines = [
            json.loads(line) for line in self.lab.deploy("history", "--json").stdout.splitlines()
        ]
        self.assertEqual(lines, self.lab.history())


class Logs(LabTest):
    def test_the_newest_or_the_one_that_is_named(self) -> None:
        first = self.lab.linked("current")
        newest = self.lab.log()
        self.assertEqual(self.lab.deploy("logs").stdout, newest)
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertIn("a change", self.lab.deploy("logs").stdout)
        self.assertEqual(self.lab.deploy("logs", first).stdout, newest)

    def test_following_ends_when_the_run_ends(self) -> None:
        self.lab.setting("static", "before", "true")  # or something else is told beside that
        self.lab.script("services", "echo the beginning; block services; echo the end")
        process = self.lab.blocked("services")
        following = self.lab.start("logs", "-f")
        assert following.stdout
        seen: list[str] = []
        while "the beginning" not in "".join(seen[-1:]):
            seen.append(following.stdout.readline())
        self.assertIsNone(following.poll())
        self.lab.unblock("services")
        self.assert_deployed(self.lab.end(process), "one")
        run = self.lab.end(following)
        self.assert_status(run, 0)
        self.assertEqual("".join(seen) + run.stdout, self.lab.log())

    def test_following_when_nothing_runs_ends_at_once(self) -> None:
        self.assertEqual(self.lab.deploy("logs", "--follow").stdout, self.lab.log())

    def test_of_a_release_that_never_was(self) -> None:
        run = self.lab.deploy("logs", "20000101T000000Z-0123456")
        self.assert_sentence(run, 1, ["there is no such log", "history"])


class Manage(LabTest):
    def test_it_runs_in_the_live_release_with_its_environment_and_status(self) -> None:
        run = self.lab.deploy("manage", "dumpdata", "-c", "x=1")
        release = (self.lab.workspace / "current").resolve()
        self.assertEqual(
            run.stdout, f"['dumpdata', '-c', 'x=1'] {release} a $ecret = value # of 1\n"
        )
        self.assertEqual(run.returncode, 7)


class SetUp(LabTest):
    """What a server lacks that was never set up, or not since a push changed what it gets."""

    def setUp(self) -> None:
        super().setUp()
        for name in ("systemd", "nginx"):
            shutil.copytree(PROJECT / name, self.lab.checkout / name)

    def test_check(self) -> None:
        run = self.lab.deploy("check")
        self.assert_status(run, 1)
        self.assertRegex(
            run.stdout,
            "problem: not as this checkout has them: /etc/systemd/system/gunicorn.socket, .*; "
            "run: sudo python3 .*/deploy.py setup\n",
        )

    def test_status(self) -> None:
        """It is said; whether the site is well is another question."""
        run = self.lab.deploy("status")
        self.assert_status(run, 0)
        self.assertRegex(run.stdout, "set-up +note: not as .*; run: sudo python3 .*deploy.py setup")


class Check(LabTest):
    def test_a_server_that_is_ready(self) -> None:
        run = self.lab.deploy("check")
        self.assert_status(run, 0)
        self.assertEqual(run.stdout, f"ready to deploy\n{HTTPS}")
        self.assertEqual(self.lab.deploy("check", "--quiet").stdout, "")

    def test_the_monitor_knows_what_status_knows(self) -> None:
        self.lab.setting("status", "checks", "cache: sh -c 'echo it is away; exit 1'")
        self.lab.deploy("maintenance", "on")
        (self.lab.workspace / "journal.json").write_text(
            json.dumps({"run": {"command": "deploy"}, "begun": []})
        )
        run = self.lab.deploy("check", "--quiet")
        self.assert_status(run, 1)
        for problem in (
            "problem: not all is well: cache: it is away (ended with status 1); see: python3 ",
            "problem: nginx answers 503 to everyone; end it: python3 deploy.py maintenance off",
            "problem: a deploy was cut off, or could not take back: nothing; the next run puts ",
        ):
            self.assertIn(problem, run.stdout)

    def test_the_monitor_does_not_mind_a_restart(self) -> None:
        """While a deployment is under way, gunicorn may be what it restarts."""
        self.lab.setting("status", "checks", "gunicorn: false")
        self.lab.push({"app": "two"})
        self.lab.script("services", "block services")
        process = self.lab.blocked("services")
        self.assertEqual(self.lab.deploy("check", "--quiet").stdout, "")
        self.lab.unblock("services")
        self.lab.end(process)

    def test_programs_that_the_environment_brings(self) -> None:
        """The Python that a line for pip names is no program in PATH."""
        self.lab.setting("install", "command", "{python} -m venv {venv}\n    nowhere install")
        self.assertIn("problem: nowhere is not installed, or not in PATH", self.problems(1))

    def test_advice(self) -> None:
        self.lab.setting("check", "command", "sh -c 'echo \"It identified 1 issue.\"; exit 1'")
        self.lab.script(
            "ss",
            """echo 'LISTEN 0 9 127.0.0.1:1 0.0.0.0:*'; echo 'LISTEN 0 9 [::1]:2 [::]:*'
            echo 'LISTEN 0 9 0.0.0.0:5432 0.0.0.0:*'; echo 'LISTEN 0 9 *:80 *:*'
            echo 'LISTEN 0 9 [::]:6379 [::]:*'""",
        )
        self.lab.script("apt-config", "")
        broken = "echo 'DROP INDEX CONCURRENTLY public.an_index;'"
        self.lab.first("database", f'if [ "$1" = invalid ]; then {broken}; exit; fi')
        for backup in (self.lab.workspace / "backups").iterdir():
            os.utime(backup, (0, 0))
        run = self.lab.deploy("check")
        self.assert_status(run, 0)
        advice = [
            line.split(";")[0].removeprefix("advice: ") for line in run.stdout.splitlines()[1:]
        ]
        self.assertEqual(
            advice,
            [
                "Django says: It identified 1 issue. (ended with status 1)",
                "there is no backup of the last two days",
                "an index was not built to its end",
                "the site is not served over HTTPS",
                "port 5432 is open to every address",
                "port 6379 is open to every address",
                "security updates do not install themselves",
            ],
        )
        self.assertEqual(self.lab.deploy("check", "-q").stdout, "")

    def test_debug(self) -> None:
        self.lab.env("SECRET_KEY=x\nDEBUG=True\n")
        self.assertIn("problem: DEBUG is on", self.problems(1))

    def test_a_webhook_that_nobody_wrote_down(self) -> None:
        self.lab.setting("notify", "webhook", "DEPLOY_WEBHOOK")
        self.assertIn(
            "problem: [notify] webhook names DEPLOY_WEBHOOK, which .env does not have; ",
            self.problems(1),
        )

    def test_after_a_deployment_that_failed(self) -> None:
        self.lab.push({"static": "broken"})
        self.assert_failed(self.lab.deploy())
        self.assertRegex(
            self.problems(1), r"the last deployment, \w+: failed, .*the static files are broken"
        )

    def test_a_checkout_that_cannot_follow(self) -> None:
        self.lab.git("checkout", "--quiet", "--detach", folder=self.lab.checkout)
        self.assertIn("is not on the branch main; git -C", self.problems(1))

    def problems(self, count: int) -> str:
        run = self.lab.deploy("check")
        self.assert_status(run, 1)
        self.assertEqual(run.stdout.count("problem: "), count, run.stdout)
        return run.stdout

    def test_every_problem_of_the_server_at_once(self) -> None:
        (self.lab.bin / "services").unlink()
        (self.lab.root / "sick").write_text("one")
        self.lab.git("remote", "set-url", "origin", "/nowhere", folder=self.lab.checkout)
        said = self.problems(3)
        for words in (
            "services is not installed",
            "not healthy: 500",
            "origin has no main, or cannot be reached; try: git ls-remote",
        ):
            self.assertIn(words, said)

    def test_every_problem_of_the_checkout_at_once(self) -> None:
        self.lab.env("export A=1\n")
        self.lab.push({"Pipfile.lock": None})
        said = self.problems(2)
        for words in (".env, line 1: ", "this revision has no Pipfile.lock; run pipenv lock"):
            self.assertIn(words, said)

    def test_what_will_be_deployed_is_looked_at_and_not_what_was(self) -> None:
        """The checkout is good; the revision that the remote has, and this server has not, is not."""
        lock = self.lab.push(
            {"Pipfile.lock": '{"_meta": {"requires": {"python_version": "3.99"}}}'}
        )
        self.assertIn("problem: python3.99 is not on this server; ", self.problems(1))
        self.assert_sentence(
            self.lab.deploy("deploy", "--dry-run"), 1, ["python3.99 is not on this server"]
        )
        self.lab.push({"Pipfile.lock": '{"_meta": {}}'})
        self.lab.script("pipenv", "exit 1")
        self.assertIn("problem: Pipfile.lock is stale", self.problems(1))
        self.assert_sentence(self.lab.deploy("deploy", "--dry-run"), 1, ["Pipfile.lock is stale"])
        known = ("git", "cat-file", "-e", lock)
        done = subprocess.run(known, cwd=self.lab.checkout, stderr=subprocess.DEVNULL, check=False)
        self.assertNotEqual(done.returncode, 0, "what was only looked at was kept")

    def test_secrets_that_git_does_not_ignore(self) -> None:
        (self.lab.checkout / ".gitignore").write_text("media/\n")
        self.assertIn("problem: git does not ignore .env: ", self.problems(1))

    def test_a_shared_file_that_is_not_there(self) -> None:
        self.lab.setting("deploy", "shared", ".env media/ key.local")
        said = "[deploy] shared key.local is not in "
        self.assertIn(f"problem: {said}", self.problems(1))
        self.assertIn(f"warning: {said}", self.lab.deploy().stdout)

    def test_a_command_that_sudo_does_not_allow(self) -> None:
        self.lab.setting("restart", "command", "sudo -n restart gunicorn")
        self.lab.script("sudo", 'echo "sudo: a password is required"; exit 1')
        self.assertIn(
            "`sudo -n --list restart gunicorn` says: sudo: a password is required (ended with",
            self.problems(1),
        )

    def test_it_changes_nothing(self) -> None:
        with self.nothing_touched():
            self.lab.deploy("check")
        self.assertEqual(self.lab.results(), ["live"])


class CommandLine(LabTest):
    @unittest.skipIf(os.geteuid(), "only root can give a folder away")
    def test_what_is_asked_of_another_user_is_what_the_sentence_says(self) -> None:
        os.chown(self.lab.checkout, 65534, 65534)  # who has no right to do it
        run = self.lab.deploy("rollback", "--no-freeze")
        os.chown(self.lab.checkout, 0, 0)
        script = self.lab.checkout / "deploy.py"
        self.assert_sentence(run, 78, [f"python3 {script} rollback --no-freeze"])

    def test_usage(self) -> None:
        for arguments in (
            ["deploi"],
            ["--nonsense"],
            ["deploy", "--wait", "long"],
            ["deploy", "a", "b"],
            ["-c"],
        ):
            with self.subTest(arguments), self.nothing_touched():
                run = self.lab.deploy(*arguments)
                self.assert_status(run, 2)
                self.assertIn("usage: deploy.py", run.stdout)

    def test_help(self) -> None:
        for arguments in (["--help"], ["deploy", "--help"], ["manage", "--help"]):
            run = self.lab.deploy(*arguments)
            self.assert_status(run, 0)
            self.assertIn("usage: deploy.py", run.stdout)

    def test_a_settings_file_that_is_not_there(self) -> None:
        for command in ("deploy", "status", "check", "rollback"):
            run = self.lab.deploy("-c", "nowhere.ini", command)
            self.assert_sentence(
                run, 78, ["nowhere.ini cannot be read: No such file or directory", "with -c"]
            )

    def test_every_mistake_in_the_settings_file_at_once(self) -> None:
        path = self.lab.checkout / "deploy.ini"
        path.write_text(with_setting(path.read_text(), "health", "timeout", "soon") + "[pul]\n")
        with self.nothing_touched():
            run = self.lab.deploy()
        self.assert_sentence(run, 78, ["deploy.ini has 2 mistakes"])
        for words in (
            "[health] timeout 'soon' is not a number of seconds",
            "[pul] is not a section; did you mean pull?",
        ):
            self.assertIn(words, run.stdout)

    def test_another_settings_file(self) -> None:
        settings = (self.lab.checkout / "deploy.ini").read_text()
        (self.lab.checkout / "other.ini").write_text(
            with_setting(settings, "static", "before", "echo the other file")
        )
        run = self.lab.deploy("-c", "other.ini")
        self.assert_deployed(run, "one")
        self.assertIn("| the other file", run.stdout)

    def test_from_another_folder(self) -> None:
        run = self.lab.deploy("-c", str(self.lab.checkout / "deploy.ini"), "status")
        self.assert_status(run, 0)
