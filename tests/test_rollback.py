"""Which releases are kept, how to go back to them, and what `--if-changed` and `--dry-run` leave alone."""

from __future__ import annotations

from tests.lab import LabTest, listing, with_setting


class ReleaseTest(LabTest):
    def deploy(self, *texts: str) -> None:
        """Deploy these texts one after the other."""
        for text in texts:
            self.lab.push({"app": text})
            self.assert_deployed(self.lab.deploy(), text)

    def deploy_sick(self, text: str) -> None:
        """A deployment that fails after the switch."""
        (self.lab.root / "sick").write_text(text)
        self.lab.push({"app": text})
        self.assert_status(self.lab.deploy(), 1)
        (self.lab.root / "sick").unlink()


class Rollback(ReleaseTest):
    deployed = ("one", "two", "three")

    def test_to_the_one_before_and_again_to_the_one_before_that(self) -> None:
        self.assert_deployed(self.lab.deploy("rollback"), "two")
        self.assert_deployed(self.lab.deploy("rollback"), "one")
        self.assertEqual(
            [entry["command"] for entry in self.lab.history()[-2:]], ["rollback", "rollback"]
        )
        self.assertEqual(self.lab.history()[-1]["release"], self.lab.linked("current"))

    def test_to_the_one_that_is_named_and_forward_again(self) -> None:
        first, _, third = (entry["release"] for entry in self.lab.history())
        self.assert_deployed(self.lab.deploy("rollback", first), "one")
        self.assertEqual(self.lab.linked("previous"), third)
        self.assert_deployed(self.lab.deploy("rollback", third), "three")

    def test_releases_that_failed_do_not_count(self) -> None:
        self.deploy_sick("four")
        self.assert_deployed(self.lab.deploy("rollback"), "two")

    def test_the_checkout_and_the_packages_are_left_alone(self) -> None:
        head = self.lab.head()
        self.lab.script("pipenv", "exit 1")
        self.assert_deployed(self.lab.deploy("rollback"), "two")
        self.assertEqual(self.lab.head(), head)

    def test_to_one_as_the_history_names_it(self) -> None:
        stamp = self.lab.deploy("history").stdout.split()[0]
        self.assert_deployed(self.lab.deploy("rollback", stamp), "one")

    def test_to_one_that_is_not_there(self) -> None:
        for name in ("20000101T000000Z-0123456", "..", "."):
            with self.nothing_touched():
                run = self.lab.deploy("rollback", name)
            self.assert_sentence(
                run, 1, [f"{name} is no release that was healthy and is kept", "history"]
            )

    def test_to_the_live_one_changes_nothing(self) -> None:
        with self.nothing_touched():
            run = self.lab.deploy("rollback", self.lab.linked("current"))
        self.assert_status(run, 0)
        self.assertIn("is live already", run.stdout)

    def test_to_one_that_is_not_healthy_any_more_stays(self) -> None:
        (self.lab.workspace / "releases" / self.lab.linked("previous") / "health").write_text("500")
        self.assert_failed(
            self.lab.deploy("rollback"), "the candidate was not proven: 500", live="three"
        )

    def test_to_one_that_is_not_healthy_after_the_switch_goes_forward_again(self) -> None:
        (self.lab.root / "sick").write_text("two")
        self.assert_failed(
            self.lab.deploy("rollback"), "the site is not healthy: 500", live="three"
        )
        self.assertEqual(self.lab.releases(), ["one", "two", "three"])


class RollbackToNone(ReleaseTest):
    def test_it_says_so_and_stays(self) -> None:
        with self.nothing_touched():
            run = self.lab.deploy("rollback")
        self.assert_sentence(run, 1, ["there is no earlier healthy release to go back to"])
        self.assert_live("one")


class Kept(ReleaseTest):
    deployed = ("one", "two")

    def keep(self, count: int) -> None:
        self.lab.setting("deploy", "keep_releases", str(count))

    def test_the_newest_that_were_healthy(self) -> None:
        self.keep(2)
        self.deploy("three", "four")
        self.assertEqual(self.lab.releases(), ["three", "four"])
        self.assert_only_good_releases()

    def test_failed_ones_push_no_good_one_out(self) -> None:
        self.keep(2)
        for text in ("three", "four"):
            self.deploy_sick(text)
        self.deploy("five")
        self.assertEqual(self.lab.releases(), ["two", "five"])

    def test_the_live_and_the_previous_one_always(self) -> None:
        self.keep(1)
        self.deploy("three")
        self.assert_deployed(self.lab.deploy("rollback", "--no-freeze"), "two")
        self.assertEqual(self.lab.releases(), ["two", "three"])
        self.assert_deployed(self.lab.deploy("deploy", "HEAD"), "three")
        self.assertEqual(self.lab.releases(), ["two", "three"])

    def test_the_environments_of_those_alone(self) -> None:
        self.keep(1)
        for text in ("two", "three"):
            self.lab.push({"Pipfile.lock": f'{{"_meta": {{}}, "default": "{text}"}}'})
            self.deploy(text)
        used = {path.resolve() for path in self.lab.workspace.glob("releases/*/.venv")}
        self.assertEqual(set((self.lab.workspace / "venvs").iterdir()), used)
        self.assertEqual(len(used), 2)
        self.assert_deployed(self.lab.deploy("rollback"), "two")

    def test_logs(self) -> None:
        self.lab.setting("deploy", "keep_logs", "2")
        self.deploy("four", "five")
        self.assertEqual(len([*(self.lab.workspace / "logs").iterdir()]), 2)
        self.assertIn("is live and healthy", self.lab.log())

    def test_the_backups_that_the_settings_say(self) -> None:
        self.lab.setting("backup", "keep", "1")
        self.lab.push({"migrations": "app.0001_first\napp.0002_second\n"})
        self.deploy("two")
        (backup,) = (self.lab.workspace / "backups").iterdir()
        self.assertEqual(backup.stem, self.lab.linked("current"))


class IfChanged(ReleaseTest):
    def assert_silent(self) -> None:
        """Nothing to do: no word, no log, no line in the history, nothing touched."""

        def state() -> object:
            return self.lab.history(), sorted((self.lab.workspace / "logs").iterdir())

        before = state()
        with self.nothing_touched():
            run = self.lab.deploy("--if-changed")
        self.assertEqual((run.returncode, run.stdout), (0, ""))
        self.assertEqual(state(), before)

    def test_nothing_new_says_nothing(self) -> None:
        self.assert_silent()

    def test_a_new_commit_is_deployed_once(self) -> None:
        self.lab.push({"app": "two"})
        run = self.lab.deploy("--if-changed")
        self.assert_deployed(run, "two")
        self.assertIn("pull     main is", run.stdout)
        self.assert_silent()

    def test_another_env_is_deployed_once(self) -> None:
        self.lab.env("SECRET_KEY=another\n")
        self.assert_deployed(self.lab.deploy("--if-changed"), "one")
        self.assertEqual(len(self.lab.history()), 2)
        self.assert_silent()

    def test_another_settings_file_is_deployed_once(self) -> None:
        path = self.lab.checkout / "deploy.ini"
        path.write_text(with_setting(path.read_text(), "static", "before", "echo new"))
        self.assert_deployed(self.lab.deploy("--if-changed"), "one")
        self.assertEqual(len(self.lab.history()), 2)
        self.assert_silent()

    def test_a_revision_that_failed_is_not_tried_again(self) -> None:
        self.lab.push({"app": "two", "static": "broken"})
        self.assert_failed(self.lab.deploy("--if-changed"))
        self.assert_silent()

    def test_a_deployment_that_was_cut_off_is_tried_again(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "block services")
        self.lab.kill(self.lab.blocked("services", "--if-changed"))
        self.lab.kill_all()
        self.lab.script("services", "")
        self.assert_deployed(self.lab.deploy("--if-changed"), "two")

    def test_what_was_rolled_back_stays_rolled_back(self) -> None:
        self.deploy("two")
        self.assert_deployed(self.lab.deploy("rollback", "--no-freeze"), "one")
        self.assert_silent()

    def test_an_older_revision_that_was_asked_for_stays(self) -> None:
        first = self.lab.head()
        self.deploy("two")
        self.assert_deployed(self.lab.deploy("deploy", first), "one")
        self.assert_silent()

    def test_a_remote_that_is_away_is_said_once(self) -> None:
        def run() -> tuple[int, str]:
            done = self.lab.deploy("--if-changed")
            return done.returncode, done.stdout

        self.lab.git("remote", "set-url", "origin", "/nowhere", folder=self.lab.checkout)
        status, said = run()
        self.assertEqual(status, 1)
        self.assertIn("the remote origin cannot be reached", said)
        self.assertEqual(run(), (1, ""))
        self.lab.git("remote", "set-url", "origin", str(self.lab.author), folder=self.lab.checkout)
        status, said = run()
        self.assertEqual(status, 0)
        self.assertIn("healthy again", said)
        self.assertEqual(run(), (0, ""))
        self.assertEqual(self.lab.results(), ["live", "unhealthy", "healthy"])


class IfChangedAndSick(LabTest):
    """Exit 0 would say that the site answers: nothing new is no reason not to ask."""

    def test_it_is_said_once_and_again_when_it_has_changed(self) -> None:
        def run() -> tuple[int, str]:
            done = self.lab.deploy("--if-changed")
            return done.returncode, done.stdout

        self.assertEqual(run(), (0, ""))
        (self.lab.root / "sick").write_text("one")
        status, said = run()
        self.assertEqual(status, 3)
        self.assertRegex(
            said, r"^deploy   nothing was deployed, and the site is not healthy: 500 .*status\n$"
        )
        self.assertEqual(run(), (3, ""))
        (self.lab.root / "sick").unlink()
        status, said = run()
        self.assertEqual(status, 0)
        self.assertRegex(
            said, r"^deploy   nothing was deployed, and the site is healthy again; .*\n$"
        )
        self.assertEqual(run(), (0, ""))
        self.assertEqual(self.lab.results(), ["live", "unhealthy", "healthy"])
        self.assert_live("one")

    def test_all_that_status_asks(self) -> None:
        self.lab.script("cache", '[ ! -e "$LAB/no-cache" ]')
        self.lab.setting("status", "checks", "cache: cache")
        self.assert_deployed(self.lab.deploy(), "one")
        (self.lab.root / "no-cache").touch()
        run = self.lab.deploy("--if-changed")
        self.assert_status(run, 3)
        self.assertIn("nothing was deployed, and not all is well: cache: no output", run.stdout)

    def test_in_a_freeze(self) -> None:
        """Which a rollback begins, too: just then somebody has to hear that the site is down."""
        self.lab.push({"app": "two"})
        self.assert_status(self.lab.deploy("freeze", "the fair is on"), 0)
        for sick, status, said in (
            (False, 77, ""),
            (True, 3, "the site is not healthy: 500"),
            (True, 3, ""),
            (False, 77, "the site is healthy again"),
            (False, 77, ""),
        ):
            with self.subTest(sick=sick, said=said):
                if sick:
                    (self.lab.root / "sick").write_text("one")
                else:
                    (self.lab.root / "sick").unlink(missing_ok=True)
                run = self.lab.deploy("--if-changed")
                self.assert_status(run, status)
                self.assertIn(said, run.stdout)
                self.assertEqual(bool(run.stdout), bool(said))
        self.assert_live("one")


class RollbackToWhatIsLive(LabTest):
    def test_with_the_site_sick(self) -> None:
        (self.lab.root / "sick").write_text("one")
        run = self.lab.deploy("rollback", self.lab.linked("current"))
        self.assert_sentence(run, 3, ["the site is not healthy: 500", "is live and NOT healthy"])


class RollbackBehindTheSameRevision(ReleaseTest):
    def test_it_goes_to_another_revision(self) -> None:
        self.lab.push({"app": "two"})
        for _ in range(2):
            self.assert_deployed(self.lab.deploy(), "two")
            self.lab.tick()
        self.assert_status(self.lab.deploy("rollback"), 0)
        self.assert_live("one")


class DryRun(LabTest):
    def says(self, *arguments: str) -> str:
        """What a dry run says; it must not change so much as a time of change."""
        before = listing(self.lab.root)
        run = self.lab.deploy("deploy", "--dry-run", *arguments)
        self.assertEqual(listing(self.lab.root), before)
        self.assert_status(run, 0)
        return run.stdout

    def test_it_says_what_it_would_do_and_changes_nothing(self) -> None:
        revision = self.lab.push({"app": "two"})
        said = self.says()
        for words in (
            f"would deploy {revision[:7]}",
            "live is",
            "pipenv install --deploy",
            "services up",
            "python manage.py migrate --noinput",
            "restart  restart",
            "nothing is changed",
        ):
            self.assertIn(words, said)

    def test_of_a_tag(self) -> None:
        revision = self.lab.push({"app": "two"})
        self.lab.git("tag", "--annotate", "--message", "v", "v1")
        self.assertIn(f"would deploy {revision[:7]} (v1)", self.says("v1"))

    def test_of_what_is_not_there(self) -> None:
        before = listing(self.lab.root)
        self.assert_sentence(
            self.lab.deploy("deploy", "--dry-run", "nowhere"), 1, ["origin has no nowhere"]
        )
        self.assertEqual(listing(self.lab.root), before)


class FirstDryRun(DryRun):
    deployed = ()
