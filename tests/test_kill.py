"""A deployment that was killed at any moment: one whole release is live, and the next run needs no hand."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.lab import LabTest, wait_for


class KillTest(LabTest):
    def kill(self, process: subprocess.Popen[str], at: str, live: str = "one") -> None:
        """Kill the deployer at a point where its command `block AT` runs, and let that end by itself."""
        self.lab.kill(process)
        (self.lab.root / "hold").unlink(missing_ok=True)
        self.assertIn(self.lab.current(), ("one", "two"))
        self.lab.unblock(at)
        self.lab.await_commands()
        self.assertEqual(self.lab.live(), live)

    def recovers(self, step: str, text: str = "two") -> str:
        """A plain run says what it found and deploys, and nothing is left of the killed one; what it said."""
        run = self.lab.deploy()
        self.assert_deployed(run, text)
        self.assertRegex(run.stdout, rf"found: a (deploy|rollback) by .* was cut off at {step}\n")
        self.assertIn("cut off", self.lab.results())
        self.assert_only_good_releases()
        backups = {path.suffix for path in (self.lab.workspace / "backups").iterdir()}
        self.assertEqual(
            (backups, (self.lab.checkout / ".git" / "index.lock").exists()), ({".dump"}, False)
        )
        self.assertEqual(self.lab.git("status", "--porcelain", folder=self.lab.checkout), "")
        self.assertEqual(self.lab.head(), self.lab.history()[-1]["revision"])
        return run.stdout


class DuringAStep(KillTest):
    """With a command that is at work, and ends by itself; tests/test_story.py kills between them."""

    def setUp(self) -> None:
        super().setUp()
        self.revision = self.lab.push(
            {"app": "two", "migrations": "app.0001_first\napp.0002_second\n"}
        )

    def test_pull_before_the_fast_forward(self) -> None:
        self.lab.block_git("merge")
        self.kill(self.lab.blocked("pull"), "pull")
        self.recovers("pull")

    def test_install(self) -> None:
        self.lab.push({"Pipfile.lock": '{"_meta": {}}'})
        script = (self.lab.bin / "pipenv").read_text()
        self.lab.script("pipenv", f"{script}\nblock install\nexit 1")
        self.kill(self.lab.blocked("install"), "install")
        self.lab.script("pipenv", script)
        self.assertIn("installed by", self.recovers("install"))

    def test_services(self) -> None:
        self.lab.first("services", "block services")
        process = self.lab.blocked("services")
        self.lab.script("services", "")
        self.kill(process, "services")
        self.recovers("services")
        entry = next(entry for entry in self.lab.history() if entry["result"] == "cut off")
        self.assertEqual((entry["command"], entry["revision"]), ("deploy", self.revision))
        self.assertTrue((self.lab.workspace / "logs" / f"{entry['started']}.log").exists())

    def test_static(self) -> None:
        self.lab.script("during-collectstatic", "block static")
        process = self.lab.blocked("static")
        (self.lab.bin / "during-collectstatic").unlink()
        self.kill(process, "static")
        self.recovers("static")

    def test_backup(self) -> None:
        self.lab.setting("backup", "command", "sh -c 'echo half of the database; block backup'")
        self.kill(self.lab.blocked("backup"), "backup")
        self.lab.setting("backup", "command", "echo the whole database")
        self.recovers("migrate")

    def test_migrate(self) -> None:
        self.lab.push(
            {"migrations": "app.0001_first\napp.0002_second\napp.0003_block\napp.0004_last\n"}
        )
        process = self.lab.blocked("migrate")
        self.lab.script("block", "exit 0")
        self.kill(process, "migrate")
        self.recovers("migrate")
        self.assertEqual(len((self.lab.root / "database").read_text().split()), 4)

    def test_the_candidate_asked_right_before_the_switch(self) -> None:
        (self.lab.root / "hold").write_text("candidate")
        self.kill(self.lab.blocked("candidate"), "candidate")
        self.recovers("restart")

    def test_the_restart_right_after_the_switch(self) -> None:
        self.lab.first("restart", "block restart; exit 1")
        process = self.lab.blocked("restart")
        self.lab.script(
            "restart", (self.lab.bin / "restart").read_text().replace("block restart; exit 1", "")
        )
        self.assertEqual(self.lab.current(), "two")
        self.kill(process, "restart")
        self.assertIn("going back to", self.recovers("restart"))

    def test_the_health_check(self) -> None:
        (self.lab.root / "hold").write_text("site")
        self.kill(self.lab.blocked("site"), "site", live="two")
        self.recovers("restart")

    def test_going_back(self) -> None:
        (self.lab.root / "sick").write_text("two")
        self.lab.first("restart", "grep -qx two $LAB/checkout/.deploy/current/app || block restart")
        process = self.lab.blocked("restart")
        self.lab.script(
            "restart", (self.lab.bin / "restart").read_text().replace("|| block restart", "|| true")
        )
        (self.lab.root / "sick").unlink()
        self.kill(process, "restart")
        self.recovers("restart")

    def test_the_new_version_of_the_tool(self) -> None:
        tool = (self.lab.author / "deploy.py").read_text()
        self.lab.push({"deploy.py": tool + "\n"})
        self.lab.first("services", "block services")
        process = self.lab.blocked("services")
        self.lab.script("services", "")
        self.kill(process, "services")
        self.recovers("services")


class InTheFastForward(KillTest):
    """git itself was cut off: some files are new, and its lock is there."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.push({"changed": "1", "removed": "1", "same": "1", "file": "1"})
        self.assert_deployed(self.lab.deploy(), "one")
        self.lab.push({"file": None})
        self.lab.push(
            {
                "changed": "2",
                "removed": None,
                "added": "2",
                "deep/added": "2",
                "app": "two",
                "file/in": "2",
            }
        )
        self.lab.block_git("merge")

    def cut_off(self) -> None:
        """Kill the deployer and its git, as a power cut would, with the checkout half changed."""
        process, checkout = self.lab.blocked("pull"), self.lab.checkout
        self.lab.kill(process)
        (self.lab.bin / "git").unlink()
        self.lab.kill_all()
        (checkout / "changed").write_text("2")
        (checkout / "removed").unlink()
        (checkout / "added").write_text("2")
        (checkout / "file").unlink()
        (checkout / "file").mkdir()
        (checkout / "file" / "in").write_text("2")
        (checkout / ".git" / "index.lock").write_text("half an index")
        (self.lab.root / "blocked-pull").unlink(missing_ok=True)

    def test_it_is_undone_and_done_again(self) -> None:
        self.cut_off()
        self.assertIn("undid the fast-forward", self.recovers("pull"))

    def test_what_was_changed_by_hand_stays(self) -> None:
        (self.lab.checkout / "same").write_text("by hand")
        self.cut_off()
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual((self.lab.checkout / "same").read_text(), "by hand")

    def test_a_mistake_in_env_does_not_make_it_forgotten(self) -> None:
        self.cut_off()
        good = (self.lab.checkout / ".env").read_text()
        self.lab.env("export A=1\n")
        self.assert_sentence(self.lab.deploy(), 78, [".env has 1 mistake"])
        self.lab.env(good)
        self.recovers("pull")

    def test_the_recovery_is_cut_off_too(self) -> None:
        self.cut_off()
        (self.lab.root / "was-blocked").unlink()
        self.lab.block_git("read-tree")
        process = self.lab.blocked("pull")
        self.lab.kill(process)
        self.lab.kill_all()
        (self.lab.root / "blocked-pull").unlink(missing_ok=True)
        self.recovers("pull|its start")

    def test_the_journal_says_what_to_undo(self) -> None:
        """The text by which a later version, too, must know what to do."""
        self.cut_off()
        journal = json.loads((self.lab.workspace / "journal.json").read_text())
        act = {"act": "fast-forward", "target": self.lab.git("rev-parse", "HEAD")}
        self.assertEqual((journal["begun"][-1], journal["run"]["step"]), (act, "pull"))
        self.recovers("pull")


class Bystanders(KillTest):
    """What is not ours is not ended, whatever it is called."""

    def test_a_server_that_is_called_candidate(self) -> None:
        folder = (self.lab.workspace / "current").resolve()
        argv = [sys.executable, "-c", "input()", "gunicorn", "--name", "candidate-portal"]
        with subprocess.Popen(argv, cwd=folder, stdin=subprocess.PIPE, text=True) as server:
            self.assert_status(self.lab.deploy("backup"), 0)
            self.lab.push({"app": "two"})
            self.assert_deployed(self.lab.deploy(), "two")
            self.assertIsNone(server.poll())
            server.communicate("\n")

    def test_a_candidate_whose_deployer_was_killed(self) -> None:
        """It is known by the file that it has open, whatever title it gave itself."""
        (self.lab.root / "hold").write_text("candidate")
        self.lab.kill(self.lab.blocked("candidate"))
        (self.lab.root / "hold").unlink()
        self.lab.unblock("candidate")
        self.assertIn("gunicorn", " ".join(self.lab.running().values()))
        self.assert_status(self.lab.deploy("backup"), 0)
        self.assertNotIn("gunicorn", " ".join(self.lab.running().values()))


class Rollback(KillTest):
    deployed = ("one", "two")

    def test_right_before_the_switch(self) -> None:
        (self.lab.root / "hold").write_text("candidate")
        self.kill(self.lab.blocked("candidate", "rollback"), "candidate", live="two")
        self.recovers("restart")

    def test_right_after_the_switch(self) -> None:
        self.lab.first("restart", "block restart; exit 1")
        process = self.lab.blocked("restart", "rollback")
        self.lab.script(
            "restart", (self.lab.bin / "restart").read_text().replace("block restart; exit 1", "")
        )
        self.kill(process, "restart", live="two")
        self.recovers("restart")


class FirstDeployment(KillTest):
    deployed = ()

    def test_before_the_switch(self) -> None:
        self.lab.first("services", "block services")
        process = self.lab.blocked("services")
        self.lab.script("services", "")
        self.lab.kill(process)
        self.lab.unblock("services")
        wait_for(lambda: not self.lab.running(), "the orphan has ended")
        self.recovers("services", "one")

    def test_after_the_switch(self) -> None:
        self.lab.first("restart", "block restart; exit 1")
        process = self.lab.blocked("restart")
        self.lab.script(
            "restart", (self.lab.bin / "restart").read_text().replace("block restart; exit 1", "")
        )
        self.lab.kill(process)
        self.lab.unblock("restart")
        wait_for(lambda: not self.lab.running(), "the orphan has ended")
        run = self.lab.deploy()
        self.assert_deployed(run, "one")
        self.assertEqual(self.lab.results(), ["cut off", "live"])
