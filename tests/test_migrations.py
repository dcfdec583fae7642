"""What is said of migrations, how they wait for locks, and how they are reversed."""

from __future__ import annotations

from tests.lab import LabTest, Run, wait_for

FIRST = "app.0001_first"
LOCKED = (
    "echo 'django.db.utils.OperationalError: canceling statement due to lock timeout' >&2; exit 1"
)


class MigrationTest(LabTest):
    def push(self, *names: str, **files: str) -> None:
        """A release with these migrations after the first."""
        self.lab.push({"app": "two", "migrations": "\n".join((FIRST, *names)), **files})

    def assert_applied(self, *names: str) -> None:
        self.assertEqual((self.lab.root / "database").read_text().split(), [FIRST, *names])

    def backup(self) -> str:
        """The name of the newest backup."""
        return str(max((self.lab.workspace / "backups").iterdir()))


class Said(MigrationTest):
    def test_those_that_cannot_be_reversed_or_remove_something_are_named(self) -> None:
        self.push("app.0002_plain", "app.0003_fixed", "app.0004_remove")
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn(
            "to be applied: app.0002_plain, app.0003_fixed, app.0004_remove\n", run.stdout
        )
        notes = [line for line in run.stdout.splitlines() if "note: " in line]
        self.assertEqual(
            notes,
            [
                f"migrate  note: {what}; the release before may not work with that"
                for what in (
                    "app.0003_fixed: it cannot be reversed",
                    "app.0004_remove: Remove field x from y",
                )
            ],
        )

    def test_a_shell_that_lists_nothing_is_no_answer(self) -> None:
        self.push("app.0002_good")
        self.lab.setting("migrate", "shell", "true")
        self.assert_failed(self.lab.deploy(), "[migrate] shell did not list the migrations")
        self.assert_applied()

    def test_without_a_shell_it_backs_up_and_migrates_every_time(self) -> None:
        self.push("app.0002_good", "app.0003_bad")
        self.lab.setting("migrate", "shell", "")
        run = self.lab.deploy()
        self.assert_failed(
            run, "which migrations were applied is unknown", f"restore {self.backup()} --yes"
        )
        self.assert_applied("app.0002_good")


class Locks(MigrationTest):
    def test_a_lock_in_the_way_makes_it_wait_and_try_again(self) -> None:
        self.push("app.0002_good")
        self.lab.script(
            "during-migrate",
            'echo "$PGOPTIONS" > "$LAB/options"\n'
            f'mkdir "$LAB/tried" 2>/dev/null || exit 0\n{LOCKED}',
        )
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn(
            "another transaction held a lock for more than 2 s; trying again in 1 s", run.stdout
        )
        self.assertEqual((self.lab.root / "options").read_text(), "-c lock_timeout=2000ms\n")

    def test_no_longer_than_its_time_limit(self) -> None:
        self.push("app.0002_good")
        self.lab.setting("migrate", "timeout", "2.5")
        self.lab.script("during-migrate", f'echo >> "$LAB/tried"\n{LOCKED}')
        self.assert_failed(
            self.lab.deploy(), "`python manage.py migrate --noinput` ended", "applied: none"
        )
        self.assertLessEqual(len((self.lab.root / "tried").read_text()), 2)

    def test_nothing_else_is_tried_again(self) -> None:
        self.push("app.0002_bad")
        self.assertNotIn("trying again", self.lab.deploy().stdout)


class ReverseOnFailure(MigrationTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.setting("migrate", "reverse_on_failure", "yes")

    def assert_reversed(self, *parts: str) -> None:
        run = self.lab.deploy()
        self.assert_failed(
            run,
            "migrations applied: app.0002_good, app.0003_good;",
            "those applied were reversed",
            f"restore {self.backup()} --yes",
            *parts,
        )
        self.assertLess(
            *map(run.stdout.index, ("Unapplied app.0003_good", "Unapplied app.0002_good"))
        )
        self.assert_applied()

    def test_a_migration_that_fails(self) -> None:
        self.push("app.0002_good", "app.0003_good", "app.0004_bad")
        self.assert_reversed("not applied: app.0004_bad")

    def test_a_candidate_that_fails_after_them(self) -> None:
        self.push("app.0002_good", "app.0003_good", health="500")
        self.assert_reversed("the candidate was not proven")

    def test_a_site_that_fails_after_the_switch(self) -> None:
        self.push("app.0002_good", "app.0003_good")
        (self.lab.root / "sick").write_text("two")
        self.lab.script("during-reverse", 'cp "$LAB/serving" "$LAB/served"')
        self.assert_reversed("the site is not healthy")
        self.assertEqual(
            (self.lab.root / "served").read_text(),
            (self.lab.root / "serving").read_text(),
            "the schema was taken from under the release that needs it",
        )

    def test_a_hook_that_fails_after_them(self) -> None:
        self.push("app.0002_good", "app.0003_good")
        self.lab.setting("migrate", "after", "false")
        self.assert_reversed("`false` ended with status 1")

    def test_one_that_cannot_be_reversed_stops_it(self) -> None:
        self.push("app.0002_fixed", "app.0003_good", "app.0004_bad")
        self.assert_failed(
            self.lab.deploy(),
            "migrations applied: app.0002_fixed, app.0003_good; ",
            "the schema stays as it is: no migration was reversed, "
            "because app.0002_fixed cannot be",
        )
        self.assert_applied("app.0002_fixed", "app.0003_good")

    def test_a_reversal_that_fails_is_told(self) -> None:
        self.push("app.0002_good", "app.0003_good", "app.0004_bad")
        self.lab.script("after-reverse", "exit 1")
        self.assert_failed(
            self.lab.deploy(),
            "the schema stays as it is: `python manage.py shell --verbosity 0` ended",
        )

    def test_it_is_not_done_unless_it_is_wanted(self) -> None:
        self.lab.setting("migrate", "reverse_on_failure", "no")
        self.push("app.0002_good", health="500")
        self.assert_failed(
            self.lab.deploy(),
            "migrations applied: app.0002_good; not applied: none; the schema stays",
        )
        self.assert_applied("app.0002_good")


class RollbackTest(MigrationTest):
    """From a release with two migrations more."""

    more: tuple[str, ...] = ("app.0002_good", "app.0003_good")

    def setUp(self) -> None:
        super().setUp()
        self.push(*self.more)
        self.assert_deployed(self.lab.deploy(), "two")
        self.lab.tick()

    def names(self) -> tuple[str, str]:
        """The newer release and the older one."""
        older, newer = sorted(path.name for path in (self.lab.workspace / "releases").iterdir())
        return newer, older

    def reverse(self) -> Run:
        return self.lab.deploy("rollback", "--reverse-migrations")


class Rollback(RollbackTest):
    def test_without_the_option_the_schema_stays_and_is_said_to(self) -> None:
        newer, older = self.names()
        run = self.lab.deploy("rollback")
        self.assert_deployed(run, "one")
        self.assertIn(
            f"{newer} has app.0002_good, app.0003_good more than {older}; the schema stays, "
            "see --reverse-migrations\n",
            run.stdout,
        )
        self.assert_applied(*self.more)

    def test_with_it_they_are_reversed_before_the_switch_after_a_backup(self) -> None:
        self.lab.setting("backup", "command", "dump")
        self.lab.script("during-reverse", 'cp "$LAB/serving" "$LAB/served"; pwd > "$LAB/code"')
        before = (self.lab.root / "serving").read_text()
        self.assert_deployed(self.reverse(), "one")
        self.assert_applied()
        with open(self.backup()) as backup:
            self.assertEqual(backup.read().split(), [FIRST, *self.more])
        self.assertEqual(
            [(self.lab.root / name).read_text() for name in ("served", "code")], [before, before]
        )

    def test_a_release_whose_migrations_were_reversed_must_be_deployed(self) -> None:
        newer = self.names()[0]
        self.assert_deployed(self.reverse(), "one")
        self.lab.tick()
        run = self.lab.deploy("rollback", newer)
        self.assert_failed(
            run,
            f"{newer} needs app.0002_good, app.0003_good, which the database lacks",
            f"deploy it instead: python3 deploy.py deploy {newer[-7:]}",
        )
        self.assert_deployed(self.lab.deploy("deploy", newer[-7:]), "two")
        self.assert_applied(*self.more)

    def test_nothing_separates_two_releases(self) -> None:
        self.lab.push({"app": "three"})
        self.assert_deployed(self.lab.deploy(), "three")
        self.lab.tick()
        run = self.reverse()
        self.assert_deployed(run, "two")
        self.assertIn("has no migration more than", run.stdout)
        self.assert_applied(*self.more)

    def test_a_list_that_cannot_be_had_does_not_hinder_a_rollback(self) -> None:
        self.lab.script("during-plan", "exit 1")
        run = self.lab.deploy("rollback")
        self.assert_deployed(run, "one")
        self.assertIn("warning: which migrations separate them is unknown", run.stdout)

    def test_but_it_does_when_they_must_be_reversed(self) -> None:
        self.lab.script("during-plan", "exit 1")
        self.assert_failed(self.reverse(), "ended with status 1", live="two")

    def test_nor_are_they_passed_over_for_want_of_a_shell(self) -> None:
        self.lab.setting("migrate", "shell", "")
        self.assert_failed(
            self.reverse(), "[migrate] shell did not list the migrations", live="two"
        )
        self.assert_applied(*self.more)

    def test_out_of_a_state_where_none_is_live_the_database_must_have_what_it_needs(self) -> None:
        newer = self.names()[0]
        self.assert_deployed(self.reverse(), "one")
        (self.lab.workspace / "current").unlink()
        self.lab.tick()
        run = self.lab.deploy("rollback", newer)
        self.assert_sentence(
            run, 1, [f"{newer} needs app.0002_good, app.0003_good", "no release is live yet"]
        )
        self.assertEqual(self.lab.live(), "one")

    def test_a_release_that_cannot_boot_leaves_them_alone(self) -> None:
        (self.lab.workspace / "releases" / self.names()[1] / "boot").write_text("broken")
        self.lab.script("during-reverse", 'touch "$LAB/reversed"')
        self.assert_failed(self.reverse(), "the candidate was not proven", live="two")
        self.assertFalse((self.lab.root / "reversed").exists())

    def test_they_are_applied_again_when_the_rollback_fails_after_them(self) -> None:
        (self.lab.root / "sick").write_text("one")
        self.assert_failed(self.reverse(), "the site is not healthy", live="two")
        self.assert_applied(*self.more)

    def test_they_are_applied_again_when_one_cannot_be_reversed_after_all(self) -> None:
        self.lab.script("after-reverse", "exit 1")
        self.assert_failed(
            self.reverse(), "manage.py shell --verbosity 0` ended with status 1", live="two"
        )
        self.assert_applied(*self.more)

    def kill(self) -> None:
        """Kill the deployer and all its commands between the two."""
        self.lab.script("after-reverse", "block reverse")
        process = self.lab.blocked("reverse", "rollback", "--reverse-migrations")
        self.lab.kill(process)
        self.lab.kill_all()
        (self.lab.root / "blocked-reverse").unlink(missing_ok=True)
        self.assert_applied("app.0002_good")
        self.lab.tick()

    def test_killed_between_them_the_next_run_applies_them_again(self) -> None:
        self.kill()
        run = self.lab.deploy("backup")
        self.assert_status(run, 0)
        self.assertIn("found: a rollback by", run.stdout)
        self.assert_live("two")
        self.assert_applied(*self.more)

    def test_the_run_after_that_does_it_if_the_next_one_cannot(self) -> None:
        self.kill()
        self.lab.script("during-migrate", "exit 1")
        self.assert_sentence(
            self.lab.deploy("backup"), 3, ["reversal was left half way: run this again"]
        )
        (self.lab.bin / "during-migrate").unlink()
        self.lab.tick()
        self.assert_status(self.lab.deploy("backup"), 0)
        self.assert_applied(*self.more)


class RollbackOverOneThatStays(RollbackTest):
    more = ("app.0002_fixed", "app.0003_good")

    def test_with_it_nothing_is_done(self) -> None:
        run = self.reverse()
        self.assert_failed(
            run, "no migration was reversed, because app.0002_fixed cannot be", live="two"
        )
        self.assert_applied(*self.more)
        wait_for(lambda: not self.lab.running(), "the candidate has ended")
