"""Backups that are whole or not there, and restores that leave a working database in any case."""

from __future__ import annotations

import json
import os
from functools import partialmethod
from pathlib import Path

from tests.lab import LabTest, Run, wait_for


class BackupTest(LabTest):
    """The lab's database is a file of lines, its backup a copy of that."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.setting("backup", "command", "dump")
        self.backups, self.database = self.lab.workspace / "backups", self.lab.root / "database"
        self.before = set(self.backups.iterdir())

    def made(self) -> list[Path]:
        """The backups that were made in this test, and what else is in their folder."""
        return sorted(set(self.backups.iterdir()) - self.before)

    def assert_none_made(self, run: Run, *parts: str) -> None:
        self.assert_failed(run, *parts)
        self.assertEqual(self.made(), [])


class Backup(BackupTest):
    def test_one_line_a_whole_file_and_a_line_of_the_history(self) -> None:
        run = self.lab.deploy("backup")
        (backup,) = self.made()
        self.assert_status(run, 0)
        self.assertEqual(run.stdout, f"backup   backed up: {backup} (0.0 MB)\n")
        self.assertEqual(
            (backup.read_text(), backup.stat().st_mode & 0o777), ("app.0001_first", 0o600)
        )
        self.assertEqual([entry["result"] for entry in self.lab.history()], ["live", "backed up"])
        self.assert_live("one")

    def test_json(self) -> None:
        said = json.loads(self.lab.deploy("backup", "--json").stdout)
        (backup,) = self.made()
        self.assertEqual((said["file"], said["bytes"]), (str(backup), 14))

    def test_a_command_that_fails(self) -> None:
        self.lab.script("dump", "echo half; echo no database >&2; exit 1")
        run = self.lab.deploy("backup")
        self.assert_none_made(run, "`dump` ended with status 1 (no database)", "run it again")
        self.assertNotIn("deploy", run.stdout.splitlines()[-1])  # it would not bring a backup

    def test_a_command_that_is_not_there(self) -> None:
        (self.lab.bin / "dump").unlink()
        self.assert_none_made(self.lab.deploy("backup"), "dump is not installed")

    def test_a_command_that_writes_nothing(self) -> None:
        self.lab.script("dump", "exit 0")
        self.assert_none_made(
            self.lab.deploy("backup"), "the backup is empty", "mend [backup] command"
        )

    def test_a_command_that_succeeds_and_writes_half(self) -> None:
        self.lab.setting("backup", "verify", "sh -c 'tail -n 1 | grep -qx END'")
        self.assert_none_made(
            self.lab.deploy("backup"), ".part is not a whole backup", "ended with status 1"
        )
        self.lab.first("dump", 'trap "echo; echo END" EXIT')
        self.assert_status(self.lab.deploy("backup"), 0)

    def test_no_command(self) -> None:
        self.lab.setting("backup", "command", "")
        self.assert_none_made(
            self.lab.deploy("backup"), "the backup is empty", "mend [backup] command"
        )

    def test_no_room(self) -> None:
        last = self.backups / "29990101T000000Z.dump"
        last.touch()
        os.truncate(last, 1 << 42)
        self.before.add(last)
        self.assert_none_made(
            self.lab.deploy("backup"), "there is no room for a backup", "MB are free", "make room"
        )

    def test_a_deployment_without_a_backup_leaves_the_database_alone(self) -> None:
        self.lab.push({"app": "two", "migrations": "app.0001_first\napp.0002_good\n"})
        self.lab.setting("backup", "verify", "false")
        self.assert_none_made(self.lab.deploy(), "is not a whole backup")
        self.assertEqual(self.database.read_text(), "app.0001_first")

    def test_the_hook_gets_the_file(self) -> None:
        self.lab.setting("backup", "after", f"cp {{file}} {self.lab.root}/copy")
        self.assert_status(self.lab.deploy("backup"), 0)
        self.assertEqual((self.lab.root / "copy").read_text(), "app.0001_first")

    def test_a_hook_that_fails_is_told_and_the_backup_stays(self) -> None:
        self.lab.setting("backup", "after", "sh -c 'exit 6'")
        self.assert_failed(self.lab.deploy("backup"), "`sh -c 'exit 6'` ended with status 6")
        self.assertEqual([path.suffix for path in self.made()], [".dump"])

    def test_beside_a_deployment_it_waits_for_its_turn(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.setting("services", "before", "block services")
        deployment = self.lab.blocked("services")
        self.assert_sentence(
            self.lab.deploy("backup"), 75, ["another run holds the lock: deploy by"]
        )
        waiting = self.lab.start("backup", "--wait", "60")
        self.lab.await_waiting(waiting)
        self.lab.unblock("services")
        for process in (deployment, waiting):
            self.assert_status(self.lab.end(process), 0)
        self.assertEqual(self.lab.results()[-2:], ["live", "backed up"])
        self.assertEqual(len(self.made()), 1)
        self.assert_live("two")

    def test_the_newest_are_kept_and_the_one_of_a_failed_migration_too(self) -> None:
        self.lab.setting("backup", "keep", "1")
        self.lab.push({"app": "two", "migrations": "app.0001_first\napp.0002_good\napp.0003_bad\n"})
        self.assert_failed(self.lab.deploy(), "app.0002_good")
        (named,) = self.made()
        for _ in range(2):
            self.lab.tick()
            self.assert_status(self.lab.deploy("backup"), 0)
        self.assertEqual(len(self.made()), 2)
        self.assertTrue(named.exists())

    def test_what_somebody_else_put_there_is_kept(self) -> None:
        self.lab.setting("backup", "keep", "1")
        theirs = [self.backups / "before-the-fair.dump", self.backups / "LAST-Z.dump"]
        for file in theirs:
            file.touch()
        self.lab.push({"app": "two", "migrations": "app.0001_first\napp.0002_good\n"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertEqual([file.exists() for file in theirs], [True, True])


class Restore(BackupTest):
    """The database holds one line; the backup another two."""

    def setUp(self) -> None:
        super().setUp()
        self.backup = self.lab.root / "a.dump"
        self.backup.write_text("app.0001_first\nrow\n")

    def state(self) -> tuple[str, bool, list[str]]:
        """What the database holds, whether it takes writes, and what else lies beside it."""
        return (
            self.database.read_text(),
            not (self.lab.root / "frozen").exists(),
            [path.name for path in self.lab.root.glob("database-*")],
        )

    def test_the_database_is_replaced_after_a_backup_of_it(self) -> None:
        self.lab.first("database", 'echo "$1" >> "$LAB/acts"')
        run = self.lab.deploy("restore", str(self.backup), "--yes")
        self.assert_status(run, 0)
        self.assertEqual(self.state(), ("app.0001_first\nrow\n", True, []))
        (saved,) = self.made()
        self.assertEqual(saved.read_text(), "app.0001_first")
        self.assertEqual(
            (self.lab.root / "acts").read_text().split(),
            ["room", "load", "count", "count", "freeze", "swap", "end", "thaw", "drop"],
        )
        for said in (
            "takes no writes",
            f"backed up: {saved}",
            "holds 2 tables with 2 rows; the database 1 table",
            "the site answers",
            f"{self.backup} is the database now",
        ):
            self.assertIn(said, run.stdout)
        self.assertEqual(self.lab.results(), ["live", "restored"])

    def test_a_backup_that_lacks_a_migration_of_the_live_release(self) -> None:
        self.lab.push({"migrations": "app.0001_first\napp.0002_good\n"})
        self.assert_deployed(self.lab.deploy(), "one")
        self.lab.tick()
        self.backup.write_text("row\napp.0001_first\n")
        run = self.lab.deploy("restore", str(self.backup), "--yes")
        self.assert_status(run, 0)
        self.assertIn(
            "the restored database lacks app.0002_good; python3 deploy.py applies them", run.stdout
        )
        self.assert_deployed(self.lab.deploy(), "one")
        self.assertEqual(self.database.read_text(), "row\napp.0001_first\napp.0002_good")

    def test_not_without_yes(self) -> None:
        run = self.lab.deploy("restore", str(self.backup))
        self.assertEqual(run.returncode, 2)
        self.assertRegex(
            run.stdout,
            r"FAILED: .*a.dump would replace the database.*; nothing was done; say --yes",
        )
        self.assertEqual(
            (self.state(), self.made(), self.lab.results()),
            (("app.0001_first", True, []), [], ["live"]),
        )

    def test_a_file_that_is_not_there(self) -> None:
        self.assert_sentence(
            self.lab.deploy("restore", "no.dump", "--yes"), 1, ["there is no file", "no.dump"]
        )

    def test_with_test_the_database_and_its_writers_never_notice(self) -> None:
        self.lab.first("database", 'echo "$1" >> "$LAB/acts"')
        run = self.lab.deploy("restore", str(self.backup), "--test")
        self.assert_status(run, 0)
        self.assertEqual(
            (self.lab.root / "acts").read_text().split(),
            ["room", "load", "count", "count", "end", "drop"],
        )
        self.assertEqual((self.state(), self.made()), (("app.0001_first", True, []), []))
        self.assertIn("can be restored; nothing was changed", run.stdout)
        self.assertEqual(self.lab.results(), ["live", "tested"])

    def assert_not_restored(self, *parts: str) -> None:
        """It fails with this sentence, and the database is what it was."""
        run = self.lab.deploy("restore", str(self.backup), "--yes")
        self.assert_failed(run, *parts)
        self.assertEqual(self.state(), ("app.0001_first", True, []))

    def test_a_file_that_is_no_backup(self) -> None:
        self.lab.setting("backup", "verify", "false")
        self.lab.first("database", 'echo "$1" >> "$LAB/acts"')
        self.assert_not_restored("a.dump is not a whole backup")
        self.assertFalse((self.lab.root / "acts").exists())

    def fails_at(self, act: str) -> None:
        self.lab.first(
            "database", f'[ "$1" != {act} ] || {{ echo half > "$LAB/database-$2"; exit 4; }}'
        )
        self.assert_not_restored(f"database {act} restore_", "ended with status 4")

    def test_a_backup_of_the_present_state_that_fails(self) -> None:
        self.lab.script("dump", "exit 1")
        self.assert_not_restored("`dump` ended with status 1")

    def test_a_backup_without_a_table(self) -> None:
        self.lab.first("database", '[ "$1 ${2:+other}" != "count other" ] || exit 0')
        self.assert_not_restored("the backup holds no table")

    def sick_with_it(self, line: str = "") -> None:
        """The site is not healthy while the restored database is live; a line more of `database`."""
        asked = 'cd "$LAB"; [ "$(cat database)" = app.0001_first ]'
        self.lab.first("database", f"trap '{asked} && rm -f sick || echo one > sick' EXIT\n{line}")

    def test_a_site_that_is_not_healthy_with_it(self) -> None:
        self.sick_with_it()
        self.assert_not_restored(
            "the site is not healthy: 500",
            "the database before it is backed up, too: ",
            "-restore.dump",
        )

    def test_the_good_one_is_never_dropped_while_the_restored_one_cannot_be_taken_back(
        self,
    ) -> None:
        self.sick_with_it('[ "$1" != back ] || [ ! -e "$LAB/broken" ] || exit 5')
        broken = self.lab.root / "broken"
        broken.touch()
        for command in (("restore", str(self.backup), "--yes"), ("backup",)):
            self.lab.tick()
            run = self.lab.deploy(*command)
            self.assertEqual(run.returncode, 3, run.stdout)
            _, writes, beside = self.state()
            (old,) = beside
            self.assertEqual(((self.lab.root / old).read_text(), writes), ("app.0001_first", False))
        broken.unlink()
        self.lab.tick()
        self.assert_status(self.lab.deploy("backup"), 0)
        self.assertEqual(self.state(), ("app.0001_first", True, []))

    def test_killed_while_the_site_is_asked_for_its_health_with_the_restored_one(self) -> None:
        self.sick_with_it()
        self.lab.setting("health", "deadline", "5")
        process = self.lab.start("restore", str(self.backup), "--yes")
        wait_for(lambda: (self.lab.root / "sick").exists(), "it is swapped")
        self.lab.kill(process)
        wait_for(lambda: not self.lab.running(), "its command has ended")
        self.lab.tick()
        run = self.lab.deploy("backup")
        self.assert_status(run, 0)
        self.assertIn("not healthy: 500", run.stdout)
        self.assertIn("the one before it comes back", run.stdout)
        self.assertEqual(self.state(), ("app.0001_first", True, []))

    def test_what_was_cut_off_is_bad_in_the_status(self) -> None:
        self.lab.first("database", '[ "$1" != freeze ] || { touch frozen; block database; }')
        process = self.lab.blocked("database", "restore", str(self.backup), "--yes")
        self.lab.kill(process)
        self.lab.unblock("database")
        wait_for(lambda: not self.lab.running(), "its command has ended")
        run = self.lab.deploy("status")
        self.assertEqual(run.returncode, 1, run.stdout)
        self.assertRegex(run.stdout, "unfinished .*restore was cut off.*the next run puts it right")

    def test_no_room_to_load_it(self) -> None:
        self.lab.first("database", '[ "$1" != room ] || { echo 3000000 2000000; exit; }')
        self.assert_not_restored(
            "there is no room to load the backup: 2 MB are free where the database lies, and 3 "
        )
        self.assertEqual(self.made(), [])
        self.lab.first("database", '[ "$1" != room ] || { echo 3000000 4000000; exit; }')
        self.assert_status(self.lab.deploy("restore", str(self.backup), "--test"), 0)

    def test_no_room_for_the_backup_of_the_present_state(self) -> None:
        last = self.backups / "29990101T000000Z.dump"
        last.touch()
        os.truncate(last, 1 << 42)
        self.lab.first("database", 'echo "$1" >> "$LAB/acts"')
        self.assert_not_restored("there is no room for a backup")
        self.assertNotIn("freeze", (self.lab.root / "acts").read_text())

    def test_what_cannot_be_set_for_it_is_told(self) -> None:
        self.lab.first("database", '[ "$1" != load ] || echo permission denied')
        run = self.lab.deploy("restore", str(self.backup), "--test")
        self.assertIn("note: permission denied", run.stdout)

    def test_what_a_cut_off_left_at_work_is_ended(self) -> None:
        self.lab.first("database", 'echo "$1 $PGAPPNAME" >> "$LAB/acts"')
        self.lab.script("dump", 'echo "dump $PGAPPNAME" >> "$LAB/acts"; exit 1')
        self.lab.deploy("backup")
        known = f"deploy.py of {self.lab.checkout}"
        acts = (self.lab.root / "acts").read_text()
        self.assertEqual(acts, f"dump {known}\nend {known}\n")
        self.lab.script("dump", 'cat "$LAB/database"')
        self.lab.script("during-migrate", 'echo "migrate $PGAPPNAME" >> "$LAB/acts"; exit 1')
        self.lab.push({"app": "two", "migrations": "app.0001_first\napp.0002_good\n"})
        self.assert_failed(self.lab.deploy(), "not applied: app.0002_good")
        acts = (self.lab.root / "acts").read_text().removeprefix(acts)
        self.assertEqual(acts, f"which {known}\nmigrate {known}\nend {known}\n")

    def test_writes_that_cannot_be_taken_again_need_a_human_or_another_run(self) -> None:
        self.lab.script("dump", "exit 1")
        self.lab.first("database", '[ "$1" != thaw ] || [ ! -e "$LAB/bin/dump" ] || exit 5')
        self.assert_sentence(
            self.lab.deploy("restore", str(self.backup), "--yes"),
            3,
            ["restore was left half way: run this again"],
        )
        self.assertFalse(self.state()[1])
        (self.lab.bin / "dump").unlink()
        self.lab.deploy("backup")
        self.assertEqual(self.state(), ("app.0001_first", True, []))

    def killed_at(self, act: str) -> None:
        """Killed there, the next run leaves a whole database, old or restored; it takes writes."""
        self.lab.first("database", f'[ "$1 ${{2:+other}}" != "{act} other" ] || block database')
        process = self.lab.blocked("database", "restore", str(self.backup), "--yes")
        self.lab.script(
            "database",
            (self.lab.bin / "database").read_text().replace("|| block database", "|| true"),
        )
        self.lab.kill(process)
        self.lab.unblock("database")
        wait_for(lambda: not self.lab.running(), "its command has ended")
        self.lab.tick()
        run = self.lab.deploy("backup")
        self.assert_status(run, 0)
        self.assertIn("found: a restore by", run.stdout)
        restored = act in ("swap", "thaw", "drop")
        self.assertEqual(
            self.state(), ("app.0001_first\nrow\n" if restored else "app.0001_first", True, [])
        )
        self.assertEqual(self.lab.results(), ["live", "cut off", "backed up"])


for each in ("freeze", "load", "swap"):
    setattr(Restore, f"test_{each}_that_fails", partialmethod(Restore.fails_at, each))
for each in ("freeze", "load", "count", "swap", "thaw", "drop"):
    setattr(Restore, f"test_killed_at_{each}", partialmethod(Restore.killed_at, each))
