"""What a deployment leaves when all goes well."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tests.lab import LabTest, listing

STEPS = ["env", "pull", "install", "services", "static", "migrate", "restart"]


class FreshServer(LabTest):
    deployed = ()

    def test_the_first_release_is_live_and_the_last_line_says_so(self) -> None:
        run = self.lab.deploy()
        self.assert_deployed(run, "one")
        self.assertIn(
            f"{self.lab.linked('current')} is live and healthy", run.stdout.splitlines()[-1]
        )
        self.assert_only_good_releases()

    def test_the_log_holds_all_that_was_said(self) -> None:
        run = self.lab.deploy()
        for line in [
            *run.stdout.splitlines(),
            "| installed by install --deploy",
            "the candidate answers",
        ]:
            self.assertIn(line, self.lab.log())


class FirstDeployment(LabTest):
    def test_the_history_tells_what_was_deployed_and_how_long_each_step_took(self) -> None:
        (entry,) = self.lab.history()
        self.assertEqual(
            (entry["result"], entry["command"], entry["subject"]), ("live", "deploy", "says one")
        )
        self.assertEqual(
            (entry["revision"], entry["release"]), (self.lab.head(), self.lab.linked("current"))
        )
        self.assertEqual(list(entry["steps"]), STEPS)

    def test_the_log_is_for_its_owner_alone(self) -> None:
        (log,) = (self.lab.workspace / "logs").iterdir()
        self.assertEqual(log.stat().st_mode & 0o777, 0o600)

    def test_git_ignores_all_of_it(self) -> None:
        self.assertEqual(
            self.lab.git(
                "status", "--porcelain", "--untracked-files=all", folder=self.lab.checkout
            ),
            "",
        )

    def test_shared_paths_are_those_of_the_checkout(self) -> None:
        current = self.lab.workspace / "current"
        for name in (".env", "media"):
            self.assertTrue((current / name).is_symlink())
            self.assertTrue((current / name).samefile(self.lab.checkout / name))

    def test_nothing_was_live_before(self) -> None:
        self.assertEqual(self.lab.linked("previous"), "")

    def test_the_database_was_backed_up_before_it_was_migrated(self) -> None:
        (backup,) = (self.lab.workspace / "backups").iterdir()
        self.assertEqual(
            (backup.read_text(), backup.stat().st_mode & 0o777), ("the whole database\n", 0o600)
        )
        self.assertLess(
            self.lab.log().index("backed up"), self.lab.log().index("Applying app.0001_first")
        )


class Deployment(LabTest):
    def test_the_second_is_live_and_the_first_is_the_previous_one(self) -> None:
        before = self.lab.linked("current")
        revision = self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual(
            (self.lab.linked("previous"), self.lab.releases()), (before, ["one", "two"])
        )
        self.assertEqual(
            (self.lab.head(), self.lab.history()[-1]["revision"]), (revision, revision)
        )

    def test_a_release_is_never_changed_by_the_next_one(self) -> None:
        release = (self.lab.workspace / "current").resolve()
        before = listing(release, self.lab.workspace / "venvs")
        self.lab.push({"app": "two", "added": ""})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual(listing(release, self.lab.workspace / "venvs"), before)

    def test_each_release_has_the_static_files_of_its_own(self) -> None:
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        texts = [
            path.read_text()
            for path in sorted(self.lab.workspace.glob("releases/*/staticfiles/style.css"))
        ]
        self.assertEqual(texts, ["one", "two"])

    def test_what_users_uploaded_is_in_every_release(self) -> None:
        (self.lab.checkout / "media" / "photo").write_text("a photo")
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual(
            (self.lab.workspace / "current" / "media" / "photo").read_text(), "a photo"
        )

    def test_nothing_new_installs_and_migrates_nothing(self) -> None:
        backups = os.listdir(self.lab.workspace / "backups")
        run = self.lab.deploy()
        self.assert_deployed(run, "one")
        self.assertIn("nothing to install", run.stdout)
        self.assertIn("nothing to migrate", run.stdout)
        self.assertEqual(os.listdir(self.lab.workspace / "backups"), backups)

    def test_a_visitor_sees_one_release_or_the_other_and_no_error(self) -> None:
        seen, done = [self.lab.live()], threading.Event()

        def visit() -> None:
            while not done.is_set():
                seen.append(self.lab.live())

        visitor = threading.Thread(target=visit)
        visitor.start()
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        done.set()
        visitor.join()
        self.assert_deployed(run, "two")
        self.assertEqual(sorted(seen), seen)
        self.assertLessEqual(set(seen), {"one", "two"})

    def test_an_empty_command_skips_its_step_and_says_so(self) -> None:
        self.lab.setting("services", "command", "")
        run = self.lab.deploy()
        self.assert_deployed(run, "one")
        self.assertRegex(run.stdout, r"(?m)^services skipped")

    def test_hooks_run_before_and_after_their_step(self) -> None:
        self.lab.setting("services", "before", "echo it begins")
        self.lab.setting("services", "after", "echo it ended")
        run = self.lab.deploy()
        self.assert_deployed(run, "one")
        self.assertRegex(run.stdout, r"(?s)\| it begins.*\$ services up.*\| it ended")

    def test_a_setting_changed_on_the_server_alone_is_honoured_and_starts_nothing_over(
        self,
    ) -> None:
        path = self.lab.checkout / "deploy.ini"
        path.write_text(path.read_text() + "[static]\nbefore = echo only here\n")
        run = self.lab.deploy()
        self.assert_deployed(run, "one")
        self.assertIn("| only here", run.stdout)
        self.assertNotIn("starting over", run.stdout)

    def test_git_variables_of_the_caller_change_nothing(self) -> None:
        self.lab.push({"app": "two"})
        elsewhere = str(Path(self.lab.root, "author", ".git"))
        run = self.lab.deploy(GIT_DIR=elsewhere, GIT_WORK_TREE="/", GIT_INDEX_FILE="/nowhere")
        self.assert_deployed(run, "two")

    def test_the_order_of_the_steps_is_the_settings_files(self) -> None:
        self.lab.setting("deploy", "steps", "env pull install migrate static services restart")
        self.assert_deployed(self.lab.deploy(), "one")
        self.assertEqual(
            list(self.lab.history()[-1]["steps"]),
            ["env", "pull", "install", "migrate", "static", "services", "restart"],
        )
