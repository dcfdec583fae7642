"""postgresql/restore.sh on a real PostgreSQL, which runs in a folder of its own for as long as these tests."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from pathlib import Path

from tests.lab import PROJECT, wait_for
from tests.must_run import skip

LIVE, OTHER = """the "live" one's""", "restore_1"
# `docker exec -i -e NAME … container COMMAND …` without a container
DOCKER = """#!/bin/sh
shift
while :; do case $1 in -e) shift 2 ;; -*) shift ;; *) break ;; esac; done
shift
exec "$@"
"""
FACTS = """
SELECT pg_get_userbyid(datdba), pg_encoding_to_char(encoding), datcollate, datctype,
    facts->>'datlocprovider', coalesce(facts->>'datlocale', facts->>'daticulocale'), datconnlimit,
    shobj_description(oid, 'pg_database'), spcname,
    (SELECT array_agg(each::text ORDER BY each::text) FROM aclexplode(datacl) each),
    (SELECT array_agg(format('%s %s', setrole::regrole, setconfig) ORDER BY setrole)
        FROM pg_db_role_setting WHERE setdatabase = d.oid)
FROM (SELECT d.*, spcname FROM pg_database d JOIN pg_tablespace s ON s.oid = dattablespace) d,
    to_jsonb(d) facts
WHERE datname = 'the "live" one''s'
"""


class Cluster:
    """A PostgreSQL that listens on a socket in a folder of its own."""

    def __init__(self, programs: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="restore-"))
        self.folder.chmod(0o755)
        self.data = self.folder / "data"
        self.environment = {
            "PATH": f"{self.folder}:{programs}:{os.environ['PATH']}",
            "PGHOST": str(self.folder),
            "DEFAULT_DB_NAME": LIVE,
        }
        docker = self.folder / "docker"
        docker.write_text(DOCKER)
        docker.chmod(0o755)
        self.owner = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        if self.owner:
            shutil.chown(self.folder, self.owner)
        initdb = ["initdb", f"--pgdata={self.data}", "--username=postgres", "--auth=trust"]
        self.command([*initdb, "--no-sync", "--encoding=UTF8", "--locale=C"], self.owner)
        settings = ["fsync=off", "listen_addresses=", f"unix_socket_directories={self.folder}"]
        settings += ["autovacuum_naptime=1s", "log_destination=stderr"]
        self.process = subprocess.Popen(
            [programs / "postgres", "-D", self.data, *(f"-c{each}" for each in settings)],
            user=self.owner,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ready = ["pg_isready", "--quiet", "--username=postgres"]
        wait_for(lambda: self.run(ready).returncode == 0, "PostgreSQL answers")

    def run(self, argv: list[str], owner: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv,
            env=self.environment,
            user=owner,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def command(self, argv: list[str], owner: str | None = None) -> str:
        """What a command that succeeds writes."""
        done = self.run(argv, owner)
        if done.returncode:
            raise AssertionError(f"{argv}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def sql(self, *statements: str, database: str = "postgres", user: str = "postgres") -> str:
        argv = ["psql", "-XqAt", f"--username={user}", f"--dbname={database}"]
        return self.command([*argv, *(f"--command={each}" for each in statements)])

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)  # a fast shutdown
        self.process.wait(60)
        shutil.rmtree(self.folder)


class Session:
    """Somebody who stays connected to a database."""

    def __init__(self, cluster: Cluster, user: str, database: str = LIVE) -> None:
        self.process = subprocess.Popen(
            ["psql", "-XqAt", f"--username={user}", f"--dbname={database}"],
            env=cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.ask("SELECT 1")

    def ask(self, statement: str) -> str:
        """What a statement answers, or why it cannot."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # the session was ended
            self.process.stdin.write(f"{statement};\n\\echo done\n")
            self.process.stdin.flush()
        answer = ""
        while (line := self.process.stdout.readline()) not in ("done\n", ""):
            answer += line
        return answer.strip()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # it was ended, or closed before
            self.process.communicate(timeout=30)
        assert self.process.stdout
        self.process.stdout.close()


def setUpModule() -> None:
    """Start PostgreSQL, with a role for each kind of user."""
    global cluster
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr/pgsql").glob("*/bin")]
    usual = shutil.which("initdb")
    if usual:
        folders.append(Path(usual).resolve().parent)
    if not folders:
        skip("postgresql", "PostgreSQL is not installed: apt-get install postgresql")
    newest = max(
        folders, key=lambda folder: [int(each) for each in re.findall(r"\d+", str(folder))]
    )
    cluster = Cluster(newest)
    unittest.addModuleCleanup(cluster.close)
    cluster.sql("CREATE ROLE app LOGIN CREATEDB", "CREATE ROLE reader LOGIN")


class RestoreCase(unittest.TestCase):
    """The live database holds one row, and the backup of it another one."""

    user = "postgres"
    options = ""  # of the live database

    def setUp(self) -> None:
        self.live = '"' + LIVE.replace('"', '""') + '"'
        self.dump = cluster.folder / "dump"
        self.drop_all()
        self.addCleanup(self.drop_all)
        self.dump.touch()
        cluster.sql(f"CREATE DATABASE {self.live} OWNER {self.user} {self.options}")
        self.sql("CREATE TABLE answers AS SELECT 'of the backup' AS text")
        self.make_dump()
        self.sql("UPDATE answers SET text = 'of today'")

    @staticmethod
    def drop_all() -> None:
        for name in cluster.sql("SELECT datname FROM pg_database WHERE oid > 16383").splitlines():
            cluster.command(["dropdb", "--force", "--username=postgres", name])

    def make_dump(self) -> None:
        self.act("dump", "--compress=1", f"--file={self.dump}")

    def sql(self, *statements: str) -> str:
        """Ask the live database as its owner."""
        return cluster.sql(*statements, database=LIVE, user=self.user)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start an act."""
        with open(self.dump, "rb") as dump:
            return subprocess.Popen(
                ["sh", PROJECT / "postgresql/restore.sh", *words],
                env=cluster.environment | {"DEFAULT_DB_USER": self.user},
                stdin=dump,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def end(self, process: subprocess.Popen[str]) -> str:
        """What an act wrote, which ends well, and in time."""
        output, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, output)
        return output.strip()

    def act(self, *words: str) -> str:
        """Do an act to its end."""
        return self.end(self.start(*words))

    @staticmethod
    def kill(process: subprocess.Popen[str]) -> None:
        """SIGKILL to a script and to all that it runs."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def session(self, database: str = LIVE) -> Session:
        session = Session(cluster, self.user, database)
        self.addCleanup(session.close)
        return session

    def databases(self) -> list[str]:
        return cluster.sql("SELECT datname FROM pg_database WHERE oid > 16383 ORDER BY 1").split(
            "\n"
        )

    def holds(self) -> str:
        return self.sql("SELECT text FROM answers")

    def insert(self) -> str:
        """What a new session gets that writes."""
        session = self.session()
        try:
            return session.ask("INSERT INTO answers VALUES ('new')")
        finally:
            session.close()

    def await_state(self, what: str, query: str) -> None:
        wait_for(lambda: cluster.sql(query) == "t", what)

    @staticmethod
    def at_work() -> str:
        """Whether anybody is connected to the database that is loaded."""
        return cluster.sql(f"SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = '{OTHER}'")


class Acts(RestoreCase):
    """Every act, alone and again."""

    def test_from_the_first_act_to_the_last(self) -> None:
        self.assertEqual(self.act("load", OTHER), "")
        self.assertEqual(self.act("count", OTHER), "answers|1")
        self.act("freeze", OTHER)
        self.assertIn("read-only transaction", self.insert())
        self.act("swap", OTHER)
        self.assertEqual(self.holds(), "of the backup")
        self.assertIn("read-only transaction", self.insert())
        self.act("thaw", OTHER)
        self.assertEqual(self.insert(), "")
        self.act("drop", OTHER)
        self.assertEqual(self.databases(), [LIVE])

    def test_each_may_be_repeated(self) -> None:
        for _ in range(2):
            self.act("load", OTHER)
        for _ in range(2):
            self.act("freeze", OTHER)
        for _ in range(2):
            self.act("swap", OTHER)
            self.assertEqual(self.databases(), ["restore_1_old", LIVE])
            self.assertEqual(self.holds(), "of the backup")
        for _ in range(2):
            self.act("back", OTHER)
            self.assertEqual(self.databases(), [OTHER, LIVE])
            self.assertEqual(self.holds(), "of today")
        for _ in range(2):
            self.act("thaw", OTHER)
            self.act("drop", OTHER)
        self.assertEqual((self.databases(), self.insert()), ([LIVE], ""))

    def test_the_old_one_survives_whatever_is_loaded(self) -> None:
        self.act("load", OTHER)
        self.act("swap", OTHER)
        self.act("load", OTHER)
        self.assertEqual(self.databases(), [OTHER, "restore_1_old", LIVE])

    def test_nothing_is_exchanged_for_what_is_not_there(self) -> None:
        process = self.start("swap", OTHER)
        self.assertIn("does not exist", process.communicate(timeout=60)[0])
        self.assertNotEqual(process.returncode, 0)
        self.assertEqual((self.databases(), self.holds()), ([LIVE], "of today"))

    def test_a_transaction_that_is_under_way_comes_to_its_end(self) -> None:
        session = self.session()
        self.assertEqual(session.ask("BEGIN; INSERT INTO answers VALUES ('late')"), "")
        freeze = self.start("freeze", OTHER)
        self.await_state(
            "it is frozen", "SELECT count(*) > 0 FROM pg_db_role_setting WHERE setrole = 0"
        )
        time.sleep(1)  # not a wait: so long does the transaction go on
        self.assertEqual(session.ask("COMMIT"), "")
        self.end(freeze)
        self.assertIn("terminating connection", session.ask("INSERT INTO answers VALUES ('no')"))
        self.assertEqual(self.holds(), "of today\nlate")

    def test_a_transaction_that_never_ends_is_ended(self) -> None:
        session = self.session()
        session.ask("BEGIN; INSERT INTO answers VALUES ('late')")
        self.act("freeze", OTHER)
        self.assertIn("terminating connection", session.ask("COMMIT"))
        self.assertEqual(self.holds(), "of today")

    def test_those_who_could_not_write_can_write_after_it(self) -> None:
        self.act("freeze", OTHER)
        session = self.session()
        self.act("thaw", OTHER)
        self.assertIn("terminating connection", session.ask("SELECT 1"))
        self.assertEqual(self.insert(), "")

    def test_a_swap_that_is_killed_has_changed_nothing_and_is_put_right(self) -> None:
        self.act("load", OTHER)
        session = self.session()
        session.ask("BEGIN; SELECT 1")  # it is in the way for a moment
        looking = self.session("postgres")  # whoever connects while it swaps waits
        swap = self.start("swap", OTHER)
        at_work = "pg_stat_get_activity(NULL) WHERE application_name = 'deploy.py'"
        wait_for(lambda: looking.ask(f"SELECT count(*) FROM {at_work}") == "1", "it swaps")
        self.kill(swap)
        self.act("end")
        self.assertEqual((self.databases(), self.holds()), ([OTHER, LIVE], "of today"))
        self.act("swap", OTHER)
        self.assertEqual(self.holds(), "of the backup")

    def slow_load(self) -> subprocess.Popen[str]:
        """A load that takes half a minute, and has begun."""
        self.sql(
            "CREATE FUNCTION slow() RETURNS bool LANGUAGE sql AS 'SELECT true'",
            "CREATE TABLE slow AS SELECT 1",
            "ALTER TABLE slow ADD CHECK (slow())",
            "CREATE OR REPLACE FUNCTION slow() RETURNS bool LANGUAGE sql "
            "AS 'SELECT pg_sleep(30) IS NOT NULL'",
        )
        self.make_dump()
        load = self.start("load", OTHER)
        self.await_state(
            "it loads",
            f"SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = '{OTHER}' "
            "AND query LIKE 'COPY%'",
        )
        return load

    def test_nothing_of_a_client_that_was_killed_goes_on(self) -> None:
        self.kill(self.slow_load())
        wait_for(lambda: self.at_work() == "f", "its statement has ended", 10)

    def test_what_is_left_at_work_ends(self) -> None:
        load = self.slow_load()
        self.act("end")
        self.assertEqual(self.at_work(), "f")
        output, _ = load.communicate(timeout=10)
        self.assertIn("terminating connection", output)
        self.assertEqual(self.session().ask("SELECT 1"), "1")

    def test_the_database_is_told_as_those_who_are_connected_see_it(self) -> None:
        query = (
            "SELECT format('%s %s', extract(epoch FROM pg_postmaster_start_time()), oid) "
            "FROM pg_database WHERE datname = current_database()"
        )
        self.assertEqual(self.act("which"), cluster.sql(query, database=LIVE, user="reader"))
        self.assertNotEqual(self.act("which"), cluster.sql(query, user="reader"))

    def test_indexes_that_are_not_valid_are_listed(self) -> None:
        self.sql("INSERT INTO answers VALUES ('of today')")
        self.assertEqual(self.act("invalid"), "")
        with self.assertRaisesRegex(AssertionError, "could not create unique"):
            self.sql('CREATE UNIQUE INDEX CONCURRENTLY "Once" ON answers (text)')
        said = self.act("invalid")
        self.assertEqual(said, 'DROP INDEX CONCURRENTLY public."Once";')
        self.sql(said)
        self.assertEqual(self.act("invalid"), "")

    def room(self) -> list[int]:
        return [int(line) for line in self.act("room").splitlines()]

    def test_the_room_that_is_needed_and_that_there_is(self) -> None:
        needed, free = self.room()
        size = int(self.sql("SELECT pg_database_size(current_database())"))
        self.assertAlmostEqual(needed, size * 2.5, delta=size)
        self.assertAlmostEqual(free, shutil.disk_usage(cluster.data).free, delta=1 << 30)
        self.sql(
            "CREATE TABLE large AS SELECT repeat(i::text, 99) FROM generate_series(1, 99999) i"
        )
        self.assertGreater(self.room()[0], needed + (20 << 20))

    def test_nobody_waits_behind_one_who_has_looked_at_the_list_of_databases(self) -> None:
        self.act("load", OTHER)
        for database in ("postgres", LIVE):
            looking = self.session(database)
            looking.ask("BEGIN; SELECT count(*) FROM pg_database")
        with self.users("postgres") as users:
            self.act("swap", OTHER)
        self.assertLess(users.longest, 4)
        self.assertEqual((users.refused, self.holds()), ([], "of the backup"))

    @contextlib.contextmanager
    def users(self, database: str) -> Iterator[Users]:
        """Users who connect all the while."""
        users = Users(database, self.user)
        wait_for(lambda: users.served > 5, "users are served")
        try:
            yield users
        finally:
            users.close()


class Users:
    """Some who connect to a database, ask, and go, again and again."""

    def __init__(self, database: str, user: str) -> None:
        self.database, self.user = database, user
        self.served, self.longest, self.over = 0, 0.0, threading.Event()
        self.refused: list[str] = []
        self.threads = [threading.Thread(target=self.ask) for _ in range(3)]
        for thread in self.threads:
            thread.start()

    def ask(self) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            try:
                cluster.sql("SELECT 1", database=self.database, user=self.user)
                self.served += 1
            except AssertionError as error:
                self.refused.append(str(error))
            self.longest = max(self.longest, time.monotonic() - began)

    def close(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


class Superuser(Acts):
    """What only the user of the shipped container can do."""

    def test_users_who_connect_meanwhile_are_all_served(self) -> None:
        self.act("load", OTHER)
        with self.users(LIVE) as users:
            for act in ("freeze", "swap", "back", "swap", "thaw", "drop"):
                self.act(act, OTHER)
        self.assertEqual(users.refused, [])


class Owner(Acts):
    """A role that owns the database, and may create others, as on a hosted PostgreSQL; autovacuum is at work there."""

    user = "app"

    def setUp(self) -> None:
        super().setUp()
        slow = "autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1"
        at_once = "autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0"
        self.sql(
            f"CREATE TABLE vacuumed (i) WITH ({slow}, {at_once}) AS "
            "SELECT repeat(i::text, 500) FROM generate_series(1, 9999) i",
            "DELETE FROM vacuumed",
        )
        self.await_state(
            "autovacuum works there",
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' "
            "AND datname LIKE '%live%'",
        )

    def room(self) -> list[int]:
        """Where the data lies is not for everybody to see."""
        return [*super().room(), shutil.disk_usage(cluster.data).free]

    def test_what_it_may_not_set_is_told(self) -> None:
        cluster.sql(f"ALTER ROLE reader IN DATABASE {self.live} SET work_mem = '8MB'")
        self.assertIn("permission denied", self.act("load", OTHER))


class Kept(RestoreCase):
    """What is set for the live database is set for the one that takes its place."""

    options = "TEMPLATE template0 ENCODING LATIN1 LOCALE 'C' CONNECTION LIMIT 77"

    def setUp(self) -> None:
        super().setUp()
        cluster.sql(
            f'ALTER DATABASE {self.live} SET search_path = "$user", public',
            f"ALTER DATABASE {self.live} SET datestyle = 'ISO, DMY'",
            f"ALTER DATABASE {self.live} SET work_mem = '7MB'",
            f"ALTER ROLE {self.user} IN DATABASE {self.live} SET search_path = ''",
            f"COMMENT ON DATABASE {self.live} IS 'it''s ours'",
            f"REVOKE ALL ON DATABASE {self.live} FROM public",
            f"GRANT CONNECT ON DATABASE {self.live} TO reader WITH GRANT OPTION",
        )

    def test_all_of_it(self) -> None:
        before = cluster.sql(FACTS)
        for expected in ("LATIN1|C|C", "|77|it's ours|", "search_path", "work_mem=7MB", "ISO, DMY"):
            self.assertIn(expected, before)
        self.assertEqual(self.act("load", OTHER), "")
        for act in ("freeze", "swap", "thaw", "drop"):
            self.act(act, OTHER)
            if act == "swap":
                self.assertEqual(self.sql("SELECT text FROM public.answers"), "of the backup")
        self.assertEqual(cluster.sql(FACTS), before)


class KeptByOwner(Kept):
    """The same without a superuser."""

    user = "app"


class KeptWithoutGrants(Kept):
    """What every database has by itself stays, too; and a locale of ICU."""

    options = "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de' CONNECTION LIMIT 5"

    def setUp(self) -> None:
        RestoreCase.setUp(self)

    def test_all_of_it(self) -> None:
        before = cluster.sql(FACTS)
        self.assertIn("|i|de|5|", before)
        for act in ("load", "swap", "thaw", "drop"):
            self.act(act, OTHER)
        rights = "SELECT has_database_privilege('reader', {}, 'CONNECT, TEMP')"
        self.assertEqual(cluster.sql(FACTS).split("|{")[0], before.split("|{")[0].rstrip("|"))
        quoted = LIVE.replace("'", "''")
        self.assertEqual(cluster.sql(rights.format(f"'{quoted}'")), "t")


del Acts  # it is there for its two kinds of user
cluster: Cluster

if __name__ == "__main__":
    unittest.main()
