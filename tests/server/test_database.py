"""The database of the booted server, PostgreSQL in its container: migrations, backups and restores while users write.

The application keeps its connections (CONN_MAX_AGE), which is the harder case for a restore: none of them may go on
with the database that was replaced, and nobody who reads may notice that they are closed (CONN_HEALTH_CHECKS).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Iterator

from tests.sandbox import MIGRATION
from tests.server.bench import HOST, longest, require
from tests.server.machine import finish, until
from tests.server.site import CHECKOUT, SETUP, WORKSPACE, Run, Running, Site, SiteCase, record

DEPLOY = "python3 deploy.py --wait 120"
BACKUPS = f"{WORKSPACE}/backups"
BACK_UP = "python3 deploy.py backup --wait 120"
LIVE = "gforms-db"
PG_DUMP = f"docker exec postgresql pg_dump -Fc -U postgres {LIVE}"
LOADS = "select count(*) > 0 from pg_database where datname ~ '^restore_2'"
IDLE = "select count(*) > 0 from pg_stat_activity where state = 'idle in transaction'"
WAITING = "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' and application_name ~ '^deploy.py of '"
CONCURRENT = "select count(*) > 0 from pg_stat_progress_create_index where phase ~ '^waiting'"
POSTGRES = "django.contrib.postgres.operations"
# Answers to a form, one after the other, as a browser sends them; writes the text of each that was accepted.
WRITER = """
import http.client, sys, threading
over, number = threading.Event(), 0
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
headers = {"Host": sys.argv[1], "Cookie": "csrftoken=" + 32 * "a", "X-CSRFToken": 32 * "a", "Connection": "close",
           "Content-Type": "application/x-www-form-urlencoded"}
while not over.is_set():
    number += 1
    connection = http.client.HTTPConnection("127.0.0.1", 80, timeout=60)
    try:
        connection.request("POST", "/forms/open/", f"text={sys.argv[2]}-{number}", headers)
        print(f"{sys.argv[2]}-{number}" if connection.getresponse().status == 302 else "", flush=True)
    except (OSError, http.client.HTTPException):
        print(flush=True)
    connection.close()
    over.wait(0.02)
"""


def setUpModule() -> None:
    """A server that was set up and deployed to, with a form that is open to everyone, and a table slow to load."""
    require()
    SiteCase.site = site = Site()
    unittest.addModuleCleanup(site.close)
    site.boot()
    site.prepare()
    site.edit(
        "forms/settings.py",
        '"ENGINE": engine,\n',
        '"ENGINE": engine,\n        "CONN_MAX_AGE": 600,\n        "CONN_HEALTH_CHECKS": True,\n',
    )
    site.push()
    for command in ("git pull --quiet", SETUP, DEPLOY):
        run = site.operate(command)
        assert run.status == 0, run.text
    site.sql("""insert into "formsApp_form" (title, slug, description, created_at) values ('Open', 'open', '', now());
                create function slow(integer) returns boolean language sql as 'select pg_sleep(0.5) is not null';
                create table slow (number integer check (slow(number)));
                insert into slow select generate_series(1, 6)""")


class Writer:
    """A user who answers a form all the while, and remembers what was accepted, and when."""

    def __init__(self, site: Site, name: str) -> None:
        """Begin."""
        command = site.in_network(sys.executable, "-c", WRITER, HOST, name)
        self.process = site.spawn(command, stdin=subprocess.PIPE)
        self.asked: list[
            tuple[float, str]
        ] = []  # when each answer came, and the text that it accepted, or nothing
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Keep what was accepted."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.asked.append((time.monotonic(), line.strip()))

    @property
    def accepted(self) -> set[str]:
        """The texts that were accepted."""
        return {text for _, text in self.asked if text}

    def refused(self, since: int) -> int:
        """How many were refused, from this one on."""
        return [bool(text) for _, text in self.asked[since:]].count(False)

    @property
    def gap(self) -> float:
        """The longest time without an accepted text."""
        times = [at for at, text in self.asked if text]
        return max(after - before for before, after in itertools.pairwise(times))

    def end(self) -> None:
        """Send nothing more, and wait for the last answer."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.reader.join(60)
        self.process.stdin = None
        finish(self.process, None, 60, True)


class DatabaseCase(SiteCase):
    """A test with a user who writes; none of what was accepted is ever lost."""

    def setUp(self) -> None:
        """Nothing is shared but the site."""
        self.name = self._testMethodName

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writer]:
        """All that was accepted in this block is in the database after it, and the site works."""
        writer = Writer(self.site, self.name)
        until(
            "every worker accepts answers",
            30,
            lambda: len(writer.asked) > 20 and writer.refused(-20) == 0,
        )
        try:
            yield writer
            done = len(writer.accepted)
            until("answers are accepted again", 60, lambda: len(writer.accepted) > done + 10)
        finally:
            writer.end()
        self.assertEqual(writer.accepted - self.rows(), set())
        record(
            f"{self.name}: {len(writer.accepted)} rows accepted, none lost, longest pause {writer.gap:.1f} s"
        )

    def rows(self) -> set[str]:
        """The texts that the database holds."""
        return set(self.site.sql('select text from "formsApp_response"').split())

    def applied(self) -> list[str]:
        """The migrations that this test applied."""
        return self.site.sql(
            "select name from django_migrations where name ~ '^0[1-9]' order by id"
        ).split()

    def push_migrations(self, *operations: str, imports: str = "") -> None:
        """Push migrations, 0101 and so on, which are gone from the database and the branch after the test; those
        with imports of their own are not atomic."""
        self.addCleanup(self.site.sql, "delete from django_migrations where name ~ '^0[1-9]'")
        after = "0001_initial"
        for number, operation in enumerate(operations, start=101):
            name = f"0{number}_step"
            self.site.add(f"formsApp/migrations/{name}.py", migration(after, operation, imports))
            after = name
        self.push()

    def push_column(self) -> None:
        """Push a migration that adds a column with a default to the table of answers."""
        self.push_migrations(
            'migrations.AddField("response", "late", models.BooleanField(default=False))'
        )
        self.addCleanup(self.site.sql, 'alter table "formsApp_response" drop column late')

    def deploy(self) -> Run:
        """Deploy."""
        return self.site.operate(DEPLOY)

    @contextlib.contextmanager
    def transaction(self, statement: str) -> Iterator[None]:
        """Leave a transaction open in this block."""
        psql = ["docker", "exec", "--interactive", "postgresql", "psql", "-U", "postgres", LIVE]
        process = self.site.start(psql, stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(f"begin; {statement};\n")
        process.stdin.flush()
        until("the transaction is idle", 30, lambda: self.site.sql(IDLE) == "t")
        try:
            yield
        finally:
            finish(process, "rollback;\n", 30, True)

    def write_settings(self, name: str, command: str) -> None:
        """Write settings with another backup command."""
        ini, backup = (
            self.site.read(f"{CHECKOUT}/deploy.ini"),
            r"(?m)(^\[backup\]\n(?:#.*\n)*command = ).*",
        )
        self.assertRegex(ini, backup)
        self.site.put(f"{CHECKOUT}/{name}", re.sub(backup, rf"\1{command}", ini), user="ubuntu")
        self.addCleanup(self.site.run, ["rm", f"{CHECKOUT}/{name}"])

    def kill_when(self, what: str, running: Running, query: str) -> None:
        """Kill the deployer, and nothing else, as soon as a query answers `t`."""
        running.reach(what, lambda: self.site.sql(query).startswith("t"))
        self.kill(running)

    def kill(self, running: Running) -> None:
        """Kill the deployer, and nothing else."""
        pid = json.loads(self.site.read(f"{WORKSPACE}/journal.json"))["run"]["pid"]
        self.site.run(["kill", "-9", str(pid)])
        running.end()

    def assert_nothing_left(self) -> None:
        """Neither half a backup, nor a second database, nor one that takes no writes."""
        self.assertNotIn(".part", self.site.run(["ls", BACKUPS]).stdout)
        self.assertEqual(self.site.sql("select datname from pg_database where datname ~ '_2'"), "")
        self.assertEqual(self.site.sql("show default_transaction_read_only"), "off")


def migration(after: str, operation: str, imports: str = "") -> str:
    """Return the text of a migration with one operation; with imports it is not atomic."""
    return (
        f"from django.db import migrations, models\n{imports}\n\nclass Migration(migrations.Migration):\n"
        f'    dependencies = [("formsApp", "{after}")]\n    operations = [{operation}]\n'
        f"    atomic = {not imports}\n"
    )


def sql(forwards: str, backwards: str = "select 1") -> str:
    """Return an operation."""
    return f"migrations.RunSQL({forwards!r}, {backwards!r})"


def asleep(seconds: str) -> str:
    """Return the query for whether a migration sleeps."""
    return f"select count(*) > 1 from pg_stat_activity where state = 'active' and query like '%pg_sleep({seconds})%'"


class MigrationTest(DatabaseCase):
    """A migration that fails, and one that waits."""

    def test_second_of_three_fails(self) -> None:
        """The sentence says all, and the command in it brings back the database of before."""
        self.push_migrations(
            sql("create table one ()", "drop table one"), sql("select 1 / 0"), sql("select 3")
        )
        version = self.site.version()
        with self.writing():
            run = self.deploy()
            self.assertEqual(run.status, 1, run.text)
            self.assertRegex(
                run.last,
                r"division by zero\); migrations applied: formsApp.0101_step; not applied: "
                r"formsApp.0102_step, formsApp.0103_step; the schema stays as it is; ",
            )
            self.assertIn(f"{self.site.current()} is live and healthy", run.last)
            self.assertEqual((self.site.version(), self.applied()), (version, ["0101_step"]))
        found = re.search(r"comes back with: (python3 deploy.py restore \S+ --yes);", run.last)
        assert found, run.last
        self.assertEqual(self.site.operate(found[1]).status, 0)
        self.assertEqual((self.applied(), self.site.sql("select to_regclass('one')")), ([], ""))
        self.assert_nothing_left()

    def test_column_with_a_default(self) -> None:
        """The release of before inserts rows without it, and none of its answers is refused."""
        self.push_column()
        with self.writing() as writer:
            before = len(writer.asked)
            run = self.deploy()
            self.assertEqual((run.status, writer.refused(before)), (0, 0), run.text)

    def test_failure_after_the_migration(self) -> None:
        """The release of before goes on with the schema of the one that failed, and so do its users."""
        index = 'render(request, "formsApp/index.html"'
        self.site.edit("formsApp/views.py", index, 'render(request, "no.html"')
        self.push_column()
        with self.writing() as writer:
            before = len(writer.asked)
            run = self.deploy()
            self.assertEqual(run.status, 1, run.text)
            self.assertIn("migrations applied: formsApp.0101_step", run.last)
            done = len(writer.asked)
            until("more is asked afterwards", 60, lambda: len(writer.asked) > done + 50)
            self.assertEqual(writer.refused(before), 0)

    def test_index_concurrently(self) -> None:
        """It waits for a transaction of eight seconds, longer than the lock timeout; nobody else does."""
        operation = (
            'AddIndexConcurrently("response", models.Index(fields=["text"], name="by_text"))'
        )
        self.push_migrations(operation, imports=f"from {POSTGRES} import AddIndexConcurrently")
        self.addCleanup(self.site.sql, "drop index by_text")
        with self.writing() as writer:
            before = len(writer.asked)
            with self.transaction('update "formsApp_response" set text = text where id = 1'):
                began = time.monotonic()
                running = self.site.start_ssh(f"cd {CHECKOUT} && {DEPLOY}")
                running.reach("waits", lambda: self.site.sql(CONCURRENT) == "t")
                until("eight seconds are over", 20, lambda: time.monotonic() - began > 8)
            run = running.end()
            self.assertEqual((run.status, writer.refused(before)), (0, 0), run.text)
        self.assertNotIn("trying again", run.text)
        valid = "select indisvalid from pg_index where indexrelid = 'by_text'::regclass"
        self.assertEqual(self.site.sql(valid), "t")

    def test_lock_in_the_way(self) -> None:
        """It tries again until the lock is gone; readers wait for no longer than the lock timeout each time."""
        self.site.add("formsApp/migrations/0101_step.py", MIGRATION)
        self.addCleanup(
            self.site.sql,
            """delete from django_migrations where name ~ '^0[1-9]';
                                          alter table "formsApp_form" drop column open;
                                          alter table "formsApp_response" drop column public""",
        )
        version = self.push()
        with self.site.watched("/") as watch:
            with self.transaction('select count(*) from "formsApp_form"'):
                running = self.site.start_ssh(f"cd {CHECKOUT} && {DEPLOY}")
                running.await_line("trying again in 2 s")
            run = running.end()
        self.assert_live(run, version)
        self.assertIn("was in the way; trying again in 1 s", run.text)
        self.assertEqual(watch.lost, [])
        waited = longest(watch.samples)
        record(
            f"{self.name}: longest wait of another reader {waited:.2f} s of {len(watch.samples)} requests"
        )
        self.assertLess(waited, 0.5 + 2)


class BackupTest(DatabaseCase):
    """A disk that fills up, a dump that is not whole; of a database of some megabytes."""

    @classmethod
    def setUpClass(cls) -> None:
        """Make it large."""
        text = "md5(random()::text) || md5(i::text)"
        cls.site.sql(f"create table bulk as select {text} from generate_series(1, 550000) i")
        cls.addClassCleanup(cls.site.sql, "drop table bulk")

    def test_disk_full(self) -> None:
        """A sentence, half a backup removed, and the database untouched."""
        self.push_migrations(sql("create table never ()", "drop table never"))
        self.site.run(f"mount -t tmpfs -o size=17m,mode=0777 backups {BACKUPS}")
        try:
            run = self.deploy()
            self.assertEqual(self.site.run(["ls", "-A", BACKUPS]).stdout, "")
        finally:
            self.site.run(["umount", BACKUPS])
        self.assertEqual(run.status, 1, run.text)
        self.assertIn("FAILED: the backup has filled the disk", run.last)
        self.assertIn(f"{self.site.current()} is live and healthy; make room", run.last)
        self.assertEqual((self.applied(), self.site.sql("select to_regclass('never')")), ([], ""))

    def test_truncated_dump(self) -> None:
        """A command that succeeds with half a dump, whose list of contents is whole."""
        self.push_migrations(sql("create table never ()", "drop table never"))
        self.write_settings("half.ini", f"sh -c '{PG_DUMP} | head -c 3000000'")
        before = self.site.run(["ls", BACKUPS]).stdout
        run = self.site.operate("python3 deploy.py -c half.ini --wait 120")
        self.assertEqual(run.status, 1, run.text)
        self.assertRegex(
            run.last, r"part is not a whole backup: .*could not read from input file: end of file"
        )
        self.assertEqual((self.applied(), self.site.run(["ls", BACKUPS]).stdout), ([], before))


class KillTest(DatabaseCase):
    """SIGKILL to the deployer while a user writes: the next run needs no hand, and no accepted row is lost."""

    def assert_recovered(self, cut_off: str, command: str) -> None:
        """The next run, whatever it is, finds what was cut off, and ends well."""
        run = self.site.operate(command)
        self.assertEqual(run.status, 0, run.text)
        self.assertIn(f"found: a {cut_off} by ubuntu, ssh from", run.text)

    def test_backup(self) -> None:
        """During the dump, which waits for a lock."""
        with self.writing():
            with self.transaction("lock table slow"):
                running = self.site.start_ssh(f"cd {CHECKOUT} && {BACK_UP}")
                self.kill_when("dumps", running, WAITING)
            self.assert_recovered("backup", BACK_UP)
        self.assert_nothing_left()

    def test_migration_and_reversal(self) -> None:
        """During a migration; and when a rollback reverses it."""
        self.push_migrations(
            sql("create table made (); select pg_sleep(2)", "drop table made; select pg_sleep(3)")
        )
        with self.writing():
            running = self.site.start_ssh(f"cd {CHECKOUT} && {DEPLOY}")
            self.kill_when("migrates", running, asleep("2"))
            self.assert_recovered("deploy", DEPLOY)
            self.assertEqual(
                (self.applied(), self.site.sql("select to_regclass('made')")),
                (["0101_step"], "made"),
            )
            running = self.site.start_ssh(
                f"cd {CHECKOUT} && python3 deploy.py rollback --reverse-migrations"
            )
            self.kill_when("reverses", running, asleep("3"))
            self.assert_recovered("rollback", BACK_UP)
            self.assertEqual(
                (self.applied(), self.site.sql("select to_regclass('made')")),
                (["0101_step"], "made"),
            )

    def test_restore_while_it_loads(self) -> None:
        """The backup is loaded beside the database: nobody notices."""
        backup = self.back_up()
        with self.writing() as writer:
            before = len(writer.asked)
            running = self.site.start_ssh(
                f"cd {CHECKOUT} && python3 deploy.py restore {backup} --yes"
            )
            self.kill_when("loads", running, LOADS)
            self.assert_recovered("restore", BACK_UP)
            self.assertEqual(writer.refused(before), 0)
        self.assert_nothing_left()

    def test_restore_while_it_backs_up(self) -> None:
        """No more writes are accepted, because a restore would lose them; until the next run."""
        backup = self.back_up()
        self.write_settings("slow.ini", f"sh -c 'sleep 3; {PG_DUMP}'")
        with self.writing() as writer:
            running = self.site.start_ssh(
                f"cd {CHECKOUT} && python3 deploy.py -c slow.ini restore {backup} --yes"
            )
            running.reach("backs up", lambda: ".part" in self.site.run(["ls", BACKUPS]).stdout)
            self.kill(running)
            done = len(writer.accepted)
            self.assertEqual([self.site.http("/").status for _ in range(9)][-1], 200, "reads go on")
            self.assertEqual(len(writer.accepted), done)
            self.assert_recovered("restore", BACK_UP)
        self.assert_nothing_left()

    def back_up(self) -> str:
        """A backup of now."""
        run = self.site.operate(f"{BACK_UP} --json")
        self.assertEqual(run.status, 0, run.text)
        return str(json.loads(run.text.splitlines()[0])["file"])

    def test_restore_to_its_end(self) -> None:
        """What was accepted is in the backup of the state before, or in the database that is live now."""
        backup = self.back_up()
        writer = Writer(self.site, self.name)
        until("answers are accepted", 30, lambda: len(writer.accepted) > 20)
        with self.site.watched("/") as watch:
            run = self.site.operate(f"python3 deploy.py restore {backup} --yes")
        done = len(writer.accepted)
        until("answers are accepted again", 60, lambda: len(writer.accepted) > done + 20)
        writer.end()
        self.assertEqual(run.status, 0, run.text)
        found = re.search(r"backed up: (\S+-restore.dump) ", run.text)
        assert found, run.text
        text = (
            "docker exec -i postgresql pg_restore --data-only --table=formsApp_response --file=- < "
            + found[1]
        )
        before = self.site.run(["bash", "-c", text], user="ubuntu").stdout
        saved, live = set(re.findall(rf"{self.name}-\d+", before)), self.rows()
        self.assertEqual(writer.accepted - saved - live, set())
        self.assertTrue(writer.accepted - saved and writer.accepted - live)
        # a session that is in the middle of a request when its time is up takes that one with it
        self.assertLessEqual(len(watch.lost), 1)
        record(
            f"{self.name}: {len(writer.accepted)} rows accepted, none lost, longest pause {writer.gap:.1f} s; "
            f"{len(watch.lost)} of {len(watch.samples)} readers were not answered"
        )
        self.assert_nothing_left()

    def test_restore_for_a_test(self) -> None:
        """It changes nothing, and no writer notices."""
        backup = self.back_up()
        with self.writing() as writer:
            before = len(writer.asked)
            run = self.site.operate(f"python3 deploy.py restore {backup} --test")
            self.assertEqual((run.status, writer.refused(before)), (0, 0), run.text)
        self.assert_nothing_left()


if __name__ == "__main__":
    unittest.main()
