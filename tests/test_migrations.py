"""What is said of migrations, how they wait for locks, and how they are reversed."""

from __future__ import annotations

import json

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

    def assert_no_backup(self) -> None:
        """None but that of the first deployment."""
        self.assertEqual(len(list((self.lab.workspace / "backups").iterdir())), 1)

    def backup(self) -> str:
        """The name of the newest backup."""
        return str(max((self.lab.workspace / "backups").iterdir()))


class Said(MigrationTest):
    def test_those_that_cannot_be_reversed_or_remove_something_are_named(self) -> None:
        before = self.lab.linked("current")
        self.push("app.0002_open", "app.0003_fixed", "app.0004_remove")
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("to be applied: app.0002_open, app.0003_fixed, app.0004_remove\n", run.stdout)
        notes = [line for line in run.stdout.splitlines() if "note: " in line]
        self.assertEqual(
            notes,
            [
                "migrate  note: app.0003_fixed cannot be reversed",
                f"migrate  note: app.0004_remove: Remove field x from y; {before} cannot go on with that",
            ],
        )

    def test_what_the_live_release_cannot_go_on_with_is_refused_where_that_is_wanted(self) -> None:
        self.lab.setting("migrate", "incompatible", "refuse")
        self.push("app.0002_remove")
        self.assert_failed(
            self.lab.deploy(), "cannot go on after app.0002_remove: Remove field x from y"
        )
        self.assert_applied()
        self.assert_no_backup()

    def test_a_shell_that_lists_nothing_is_no_answer(self) -> None:
        self.push("app.0002_good")
        self.lab.setting("migrate", "shell", "true")
        self.assert_failed(self.lab.deploy(), "[migrate] shell did not answer in JSON")
        self.assert_applied()

    def test_without_a_shell_it_backs_up_and_migrates_every_time(self) -> None:
        self.push("app.0002_good", "app.0003_bad")
        self.lab.setting("migrate", "shell", "")
        run = self.lab.deploy()
        self.assert_failed(
            run, "which migrations were applied is unknown", f"restore {self.backup()} --yes"
        )
        self.assert_applied("app.0002_good")

    def test_with_nothing_planned_it_migrates_without_a_backup(self) -> None:
        """Django notes then what was squashed, and tells the project."""
        self.lab.script("during-migrate", 'touch "$LAB/ran"')
        self.lab.push({"app": "two"})
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("nothing to migrate\n", run.stdout)
        self.assertTrue((self.lab.root / "ran").exists())
        self.assert_no_backup()

    def test_which_takes_no_start_of_its_own_unless_it_fails(self) -> None:
        def starts(text: str) -> int:
            self.lab.push({"app": text})
            self.assert_deployed(self.lab.deploy(), text)
            return self.lab.log().count("$ python manage.py shell")

        usual = starts("two")
        self.lab.script("during-migrate", 'mkdir "$LAB/failed-once" || exit 0; exit 1')
        self.assertEqual(starts("three"), usual + 1)

    def test_then_too_not_before_the_candidate_has_booted(self) -> None:
        self.lab.script("during-migrate", 'touch "$LAB/ran"')
        self.lab.push({"boot": "broken"})
        self.assert_failed(self.lab.deploy(), "the candidate was not proven")
        self.assertFalse((self.lab.root / "ran").exists())


class WhichDatabase(MigrationTest):
    """No migration touches another database than the one that is backed up, or one that was lost."""

    def assert_refused(self, *parts: str, **facts: object) -> None:
        (self.lab.root / "facts").write_text(json.dumps(facts))
        self.push("app.0002_good")
        self.assert_failed(self.lab.deploy(), *parts)
        self.assertNotIn("app.0002_good", (self.lab.root / "database").read_text())
        self.assert_no_backup()

    def test_one_that_is_empty_while_a_release_is_live(self) -> None:
        (self.lab.root / "database").write_text("")
        name = self.lab.linked("current")
        self.assert_refused(
            f"the database is empty, though {name} is live: it was lost, or is another one",
            "python3 deploy.py manage migrate",
        )

    def test_another_one_than_django_uses(self) -> None:
        self.lab.first("database", 'if [ "$1" = which ]; then echo 1 2; exit; fi')
        self.assert_refused("is not the one that Django uses", identity="1 3")

    def test_the_same_one(self) -> None:
        self.lab.first("database", 'if [ "$1" = which ]; then echo 1 2; exit; fi')
        (self.lab.root / "facts").write_text('{"identity": "1 2"}')
        self.push("app.0002_good")
        self.assert_deployed(self.lab.deploy(), "two")

    def test_one_of_which_nobody_knows(self) -> None:
        self.lab.first("database", '[ "$1" != which ]')
        (self.lab.root / "facts").write_text('{"identity": "1 2"}')
        self.push("app.0002_good")
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("warning: whether what is backed up is what Django uses", run.stdout)

    def test_sqlite_beside_a_backup_of_postgresql(self) -> None:
        self.lab.setting("backup", "command", "docker exec postgresql pg_dump")
        self.assert_refused("Django's database is sqlite, and", vendor="sqlite")

    def test_sqlite_beside_the_backup_that_is_shipped(self) -> None:
        self.lab.setting("backup", "command", "sh postgresql/restore.sh dump --compress=zstd")
        self.assert_refused("Django's database is sqlite, and", vendor="sqlite")

    def test_a_file_of_sqlite_in_the_release(self) -> None:
        """The next release would begin with the one that git has, or with none."""
        told = "db.sqlite3: what is written there would end with its release"
        self.assert_refused(told, vendor="sqlite", file="db.sqlite3")

    def test_a_file_of_sqlite_in_a_shared_folder(self) -> None:
        self.lab.setting("deploy", "shared", "data/")
        (self.lab.root / "facts").write_text('{"vendor": "sqlite", "file": "data/db.sqlite3"}')
        self.push("app.0002_good")
        self.assert_deployed(self.lab.deploy(), "two")

    def test_sqlite_with_a_backup_of_its_own(self) -> None:
        (self.lab.root / "facts").write_text('{"vendor": "sqlite"}')
        self.push("app.0002_good")
        self.assert_deployed(self.lab.deploy(), "two")

    def test_a_second_one_with_migrations(self) -> None:
        self.assert_refused("archive of DATABASES can have migrations", others=["archive"])

    def test_a_second_one_that_the_operator_takes_care_of(self) -> None:
        self.lab.setting("migrate", "before", "echo --database=archive")
        (self.lab.root / "facts").write_text('{"others": ["archive"]}')
        self.push("app.0002_good")
        self.assert_deployed(self.lab.deploy(), "two")


class Rehearsal(MigrationTest):
    def setUp(self) -> None:
        super().setUp()
        self.lab.setting("migrate", "rehearse", "yes")
        self.lab.first("database", 'echo "$1 $2" >> "$LAB/acts"')

    def assert_copied(self) -> None:
        """A copy was made, and it is gone."""
        acts = [
            (*line.split(), "")[:2] for line in (self.lab.root / "acts").read_text().splitlines()
        ]
        copies = [name for act, name in acts if act == "load"]
        self.assertEqual(len(copies), 1)
        self.assertIn(("drop", copies[0]), acts)
        self.assertFalse((self.lab.root / f"database-{copies[0]}").exists())

    def test_it_tells_what_the_migration_takes(self) -> None:
        self.push("app.0002_good")
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertRegex(run.stdout, r"rehearsed on a copy of the database in \d")
        self.assertIn("note: it keeps table locked for 4.0 s", run.stdout)
        self.assertNotIn("another locked", run.stdout)
        self.assert_copied()

    def test_one_that_fails_there_never_reaches_the_database(self) -> None:
        self.push("app.0002_unrehearsed")
        self.assert_failed(
            self.lab.deploy(), "it cannot be applied to these data", "that was the rehearsal"
        )
        self.assert_applied()
        self.assert_copied()

    def test_it_needs_a_command_of_manage_py(self) -> None:
        self.lab.setting("migrate", "command", "python -s manage.py migrate --noinput")
        self.push("app.0002_good")
        self.assert_failed(self.lab.deploy(), "there is no way to rehearse a migration")
        self.assert_applied()


class Locks(MigrationTest):
    def test_a_lock_in_the_way_makes_it_wait_and_try_again(self) -> None:
        self.push("app.0002_good")
        self.lab.script(
            "during-migrate",
            'echo "$CALL$PGOPTIONS" > "$LAB/call"\n'
            f'mkdir "$LAB/tried" 2>/dev/null || exit 0\n{LOCKED}',
        )
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn(
            "a lock of another transaction was in the way; trying again in 1 s", run.stdout
        )
        called = "migrate_in_django(['migrate', '--noinput'], 500)"
        self.assertEqual((self.lab.root / "call").read_text().strip(), called)

    def other_command(self, *names: str) -> str:
        """The PGOPTIONS of a command that is not manage.py's own."""
        self.lab.setting("migrate", "command", "python -s manage.py migrate --noinput")
        self.lab.script("during-migrate", 'echo "$PGOPTIONS" > "$LAB/options"')
        self.push(*names)
        self.assert_deployed(self.lab.deploy(), "two")
        return (self.lab.root / "options").read_text().strip()

    def test_another_command_is_told_by_postgresqls_own_variable(self) -> None:
        self.assertEqual(self.other_command("app.0002_good"), "-c lock_timeout=500ms")

    def test_but_not_where_a_limit_would_leave_one_half_done(self) -> None:
        self.assertEqual(self.other_command("app.0002_plain"), "")

    def test_a_limit_that_does_not_reach_the_database_is_told(self) -> None:
        self.lab.setting("migrate", "command", "python -s manage.py migrate --noinput")
        (self.lab.root / "facts").write_text('{"lock_timeout": "0"}')
        self.push("app.0002_good")
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("warning: lock_timeout does not reach the database", run.stdout)

    def test_one_that_is_not_atomic_is_never_tried_again(self) -> None:
        self.push("app.0002_plain")
        (self.lab.root / "facts").write_text('{"invalid": ["an_index"]}')
        self.lab.script("during-migrate", LOCKED)
        run = self.lab.deploy()
        self.assert_failed(run, "not built to its end: DROP INDEX CONCURRENTLY an_index")
        self.assertNotIn("trying again", run.stdout)

    def test_no_longer_than_its_time_limit(self) -> None:
        self.push("app.0002_good")
        self.lab.setting("migrate", "timeout", "2.5")
        self.lab.script("during-migrate", f'echo >> "$LAB/tried"\n{LOCKED}')
        self.assert_failed(
            self.lab.deploy(), "`python manage.py shell --verbosity 0` ended", "applied: none"
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
        self.assert_status(self.lab.deploy("thaw"), 0)
        self.assert_deployed(self.lab.deploy("deploy", newer[-7:]), "two")
        self.assert_applied(*self.more)

    def test_nothing_separates_two_releases(self) -> None:
        self.lab.push({"app": "three"})
        self.assert_deployed(self.lab.deploy(), "three")
        self.lab.tick()
        self.lab.script("during-plan", 'echo listed >> "$LAB/plans"')
        run = self.reverse()
        self.assert_deployed(run, "two")
        self.assertIn("has no migration more than", run.stdout)
        self.assert_applied(*self.more)
        self.assertEqual((self.lab.root / "plans").read_text(), "listed\n", "one start is enough")

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
        self.assert_failed(self.reverse(), "[migrate] shell did not answer in JSON", live="two")
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

    def lost(self) -> tuple[str, str]:
        return (
            "app.0002_good, app.0003_good was reversed and applied again",
            "is only in the backup: python3 deploy.py restore",
        )

    def test_they_are_applied_again_when_the_rollback_fails_after_them(self) -> None:
        (self.lab.root / "sick").write_text("one")
        self.assert_failed(
            self.reverse(), "the site is not healthy", *self.lost(), status=3, live="two"
        )
        self.assert_applied(*self.more)

    def test_they_are_applied_again_when_one_cannot_be_reversed_after_all(self) -> None:
        self.lab.script("after-reverse", "exit 1")
        self.assert_failed(
            self.reverse(),
            "manage.py shell --verbosity 0` ended with status 1",
            "app.0003_good was reversed and applied again",
            status=3,
            live="two",
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


class RollbackOverASquash(RollbackTest):
    """The tables of the squashed migrations are those of the older release, too."""

    squashed = "app.0001_squashed=app.0001_first,app.0002_good"

    def squash(self, *lines: str) -> None:
        """Deploy a release with these migrations after the one with two more."""
        self.lab.push({"app": "three", "migrations": "\n".join(lines)})
        self.assert_deployed(self.lab.deploy(), "three")
        self.lab.tick()

    def test_it_is_no_difference(self) -> None:
        self.squash(self.squashed, "app.0003_good")
        run = self.reverse()
        self.assert_deployed(run, "two")
        self.assertIn("has no migration more than", run.stdout)
        self.assert_applied(*self.more, "app.0001_squashed")

    def test_what_came_after_it_is_reversed(self) -> None:
        self.squash(self.squashed, "app.0003_good", "app.0004_good")
        self.assert_deployed(self.reverse(), "two")
        self.assert_applied(*self.more, "app.0001_squashed")

    def assert_left_alone(self, *names: str) -> None:
        before = (self.lab.root / "database").read_text()
        run = self.lab.deploy("rollback", *names, "--reverse-migrations")
        self.assert_failed(run, "was squashed in between", live="three")
        self.assertEqual((self.lab.root / "database").read_text(), before)

    def test_one_of_which_the_older_release_knows_a_part(self) -> None:
        older = self.lab.linked("current")
        self.squash(FIRST, *self.more, "app.0004_good")
        self.squash(f"{self.squashed},app.0003_good,app.0004_good")
        self.assert_left_alone(older)

    def test_one_that_does_not_say_what_it_replaced(self) -> None:
        with open(self.lab.root / "database", "a") as database:
            database.write("\napp.0001_squashed")
        self.squash("app.0001_squashed", "app.0003_good")
        self.assert_left_alone()
