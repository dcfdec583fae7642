"""What deploy.py runs in the project's own Django, on a real PostgreSQL: no write fails because of a migration.

TESTS_DJANGO names the Python of an environment with Django and psycopg; without it one is made, with the sample's.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import unittest
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deploy
from tests.lab import wait_for
from tests.must_run import skip
from tests.sandbox import DJANGO_OF_PYTHON_311, Missing, find_python, reserved_port

MIGRATE = ["migrate", "--noinput"]
SAMPLE = Path(__file__).parent / "sample"
# The release that is live: it inserts rows all the while, each in a transaction of its own, and says how that went.
WRITER = """
import sys, threading
from django.db import connection
from formsApp.models import Form
over, number = threading.Event(), 0
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
while not over.wait(0.01):
    number += 1
    try:
        Form.objects.create(title=f"form {number}", slug=f"form-{number}")
        print("written", flush=True)
    except Exception as error:
        print(f"lost: {error}".splitlines()[0], flush=True)
"""
MIGRATION = """
import uuid
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    {extra}
    dependencies = [("formsApp", "{after}")]
    operations = [{operations}]
"""
# what `restore.sh which` asks
IDENTITY = """select format('%s %s', extract(epoch from pg_postmaster_start_time()), oid)
    from pg_database where datname = current_database()"""
DEADLOCK_TIMEOUT = "select setting::float / 1000 from pg_settings where name = 'deadlock_timeout'"
HAS_OPEN = 'migrations.AddField("form", "open", models.BooleanField(default=True))'


class Cluster:
    """A PostgreSQL of our own, with its data in a temporary folder."""

    def __init__(self) -> None:
        found = sorted(
            Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name)
        )
        if not found:
            skip("postgresql", "no /usr/lib/postgresql/*/bin")
        self.bin, self.root = found[-1], Path(tempfile.mkdtemp(prefix="postgresql-"))
        self.user = pwd.getpwnam("postgres").pw_name if os.geteuid() == 0 else None
        if self.user:  # it does not run as root
            shutil.chown(self.root, self.user)
        self.reserved = reserved_port()
        self.port = str(self.reserved.getsockname()[1])
        self.run("initdb", "--auth=trust", "--username=postgres", "--no-sync")
        options = f"-p {self.port} -k {self.root} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.run("pg_ctl", "start", "--wait", f"--options={options}", f"--log={self.root}/log")

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.bin / program), f"--pgdata={self.root}/data", *arguments]
        subprocess.run(command, user=self.user, cwd="/", stdout=subprocess.DEVNULL, check=True)

    def psql(self, database: str) -> list[str]:
        address = ["--host=127.0.0.1", f"--port={self.port}", "--username=postgres"]
        return [str(self.bin / "psql"), *address, "--quiet", "-tA", f"--dbname={database}"]

    def sql(self, statement: str, database: str = "postgres") -> str:
        command = [*self.psql(database), "--set=ON_ERROR_STOP=1", f"--command={statement}"]
        return subprocess.run(command, text=True, check=True, capture_output=True).stdout.strip()

    def close(self) -> None:
        self.run("pg_ctl", "stop", "--wait", "--mode=immediate")
        self.reserved.close()
        shutil.rmtree(self.root)


def django_python() -> str:
    """A Python with the Django and the psycopg of the sample."""
    if "TESTS_DJANGO" in os.environ:
        return os.environ["TESTS_DJANGO"]
    try:
        python, version = find_python()
    except Missing as missing:
        skip("postgresql", missing)
    folder = Path(tempfile.mkdtemp(prefix="django-"))
    unittest.addModuleCleanup(shutil.rmtree, folder)
    pins = dict(
        re.findall(r'^(\w+) = .*?"==([\d.]+)"', (SAMPLE / "Pipfile").read_text(), re.MULTILINE)
    )
    django = pins["django"] if version >= (3, 12) else DJANGO_OF_PYTHON_311
    packages = [f"django=={django}", f"psycopg[binary]=={pins['psycopg']}"]
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", *packages]
    done = subprocess.run(pip, text=True, capture_output=True, check=False)
    if done.returncode:
        skip("postgresql", done.stderr)
    return str(folder / "bin" / "python")


def setUpModule() -> None:
    DjangoTest.python = django_python()
    DjangoTest.cluster = cluster = Cluster()
    unittest.addModuleCleanup(cluster.close)
    DjangoTest.migrated = Path(tempfile.mkdtemp(prefix="sample-"))
    unittest.addModuleCleanup(shutil.rmtree, DjangoTest.migrated)
    cluster.sql("create database template")
    shutil.copytree(SAMPLE, DjangoTest.migrated, dirs_exist_ok=True)
    DjangoTest.run_in(DjangoTest.migrated, "template", "migrate", "--noinput")


class DjangoTest(unittest.TestCase):
    """A test with a copy of the sample, and of its database after its own migrations."""

    python: str
    cluster: Cluster
    migrated: Path

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sample-"))
        self.addCleanup(shutil.rmtree, self.folder)
        shutil.copytree(SAMPLE, self.folder, dirs_exist_ok=True)
        self.database = self.folder.name.replace("-", "_").lower()
        self.cluster.sql(f"create database {self.database} template template")
        self.addCleanup(self.cluster.sql, f"drop database {self.database} with (force)")

    @classmethod
    def command(cls, database: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
        variables = {
            "SECRET_KEY": "a secret",
            "DEFAULT_DB_HOST": "127.0.0.1",
            "DEFAULT_DB_PORT": cls.cluster.port,
            "DEFAULT_DB_NAME": database,
        }
        return [cls.python, "manage.py", *arguments], os.environ | variables

    @classmethod
    def run_in(
        cls,
        folder: Path,
        database: str,
        *arguments: str,
        sent: str = "",
        fails: bool = False,
        **variables: str,
    ) -> str:
        """What manage.py writes."""
        command, environment = cls.command(database, *arguments)
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment | variables,
            input=sent,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if fails else subprocess.PIPE,
            check=False,
        )
        assert (done.returncode != 0) is fails, f"{done.stdout}{done.stderr}"
        return done.stdout

    def manage(self, *arguments: str, **options: Any) -> str:
        return self.run_in(self.folder, self.database, *arguments, **options)

    def call(self, call: str, **options: Any) -> str:
        """Have Django run a call, as deploy.py does it."""
        return self.manage(
            "shell", "--verbosity", "0", sent=f"{deploy.IN_DJANGO}\n{call}\n", **options
        )

    def migrate(self, lock_timeout: int = 2000, **options: Any) -> str:
        return self.call(f"migrate_in_django(['migrate', '--noinput'], {lock_timeout})", **options)

    def listed(
        self,
        keeps_defaults: bool = True,
        settle: Sequence[Sequence[str]] = (),
        candidate: str = "",
        **options: Any,
    ) -> dict[str, Any]:
        """What Django tells: of the database, and of each migration of formsApp by its number."""
        told: dict[str, Any] = json.loads(
            self.call(
                f"list_migrations({keeps_defaults}, {[*map(list, settle)]}, 500, {candidate!r})",
                **options,
            ).splitlines()[-1]
        )
        known = {each["name"]: each for each in told.pop("migrations")}
        return told | {
            name[9:13]: each for name, each in known.items() if name.startswith("formsApp")
        }

    def sql(self, statement: str) -> str:
        return self.cluster.sql(statement, self.database)

    def add(
        self, *operations: str, after: str = "0001_initial", extra: str = "atomic = True"
    ) -> str:
        """Write the next migration; its name."""
        number = int(after[:4]) + 1
        name, text = f"{number:04}_step", ", ".join(operations)
        text = MIGRATION.format(after=after, operations=text, extra=extra)
        (self.folder / "formsApp" / "migrations" / f"{name}.py").write_text(text)
        return name

    def replace(self, name: str, old: str, new: str) -> None:
        """Change a file of the project."""
        text = (self.folder / name).read_text()
        self.assertIn(old, text)
        (self.folder / name).write_text(text.replace(old, new, 1))

    def columns(self) -> dict[str, str]:
        """The columns of the table of forms that have a default, and which."""
        found = self.sql(
            "select column_name || ':' || column_default from information_schema.columns"
            " where table_name = 'formsApp_form' and column_default is not null"
        )
        return dict(line.split(":", 1) for line in found.splitlines())

    def insert(self) -> str:
        """Insert a row as the first release does; its id."""
        return self.sql(
            """insert into "formsApp_form" (title, slug, description, created_at)
            values ('', gen_random_uuid(), '', now()) returning id"""
        )

    @contextlib.contextmanager
    def writing(self) -> Iterator[list[str]]:
        """How each write of the first release goes, all the while."""
        command, environment = self.command(
            self.database, "shell", "--verbosity", "0", "-c", WRITER
        )
        said: list[str] = []
        with subprocess.Popen(
            command,
            cwd=self.migrated,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin and process.stdout
            lines = process.stdout
            reader = threading.Thread(target=lambda: said.extend(map(str.strip, lines)))
            reader.start()
            try:
                wait_for(lambda: len(said) > 20, "rows are written")
                yield said
                done = len(said)
                wait_for(lambda: len(said) > done + 20, "rows are written afterwards")
            finally:
                process.stdin.close()
                reader.join()

    @contextlib.contextmanager
    def transaction(
        self, statement: str = 'select from "formsApp_form"'
    ) -> Iterator[subprocess.Popen[str]]:
        """A transaction that is left open in this block, or until it is ended."""
        psql = self.cluster.psql(self.database)
        with subprocess.Popen(
            psql, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin and process.stdout
            process.stdin.write(f"begin; {statement}; \\echo open\n")
            process.stdin.flush()
            while process.stdout.readline().strip() != "open":
                pass
            yield process


class CutOff(DjangoTest):
    """A migration whose process was killed does not go on in the database."""

    def test_killed(self) -> None:
        self.add('migrations.RunSQL("select pg_sleep(600)")')
        command, environment = self.command(self.database, "shell", "--verbosity", "0")
        sleeping = (
            "select count(*) from pg_stat_activity where state = 'active' and query like"
            f" '%pg_sleep(600)%' and pid <> pg_backend_pid() and datname = '{self.database}'"
        )
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdin=subprocess.PIPE
        ) as process:
            assert process.stdin
            call = "migrate_in_django(['migrate', '--noinput'], 2000)"
            process.stdin.write(f"{deploy.IN_DJANGO}\n{call}\n")
            process.stdin.close()
            wait_for(lambda: self.sql(sleeping) == "1", "it sleeps")
            process.kill()
        wait_for(lambda: self.sql(sleeping) == "0", "the database noticed")


class Deadlock(DjangoTest):
    """A migration of two tables, and a request that has locked them in the other order."""

    def test_the_request_has_its_way(self) -> None:
        public = 'migrations.AddField("response", "public", models.BooleanField(db_default=False))'
        self.add(HAS_OPEN, 'migrations.RunSQL("select pg_sleep(0.5)")', public)
        form, said = self.insert(), list[str]()
        held = (
            "select count(*) from pg_locks where granted and mode = 'AccessExclusiveLock'"
            " and relation = '\"formsApp_form\"'::regclass"
        )
        migration = threading.Thread(target=lambda: said.append(self.migrate(fails=True)))
        with self.transaction('lock table "formsApp_response" in row exclusive mode') as request:
            migration.start()
            wait_for(lambda: self.sql(held) == "1", "the migration has the first table")
            answer, _ = request.communicate(
                f"""select 'done' from "formsApp_form" where id = {form} for key share; commit;"""
            )
        migration.join()
        self.assertEqual(answer.strip(), "done")
        self.assertRegex(said[0], deploy._LOCKED)

    def test_without_the_right_to_look_sooner_the_lock_timeout_ends_it_sooner(self) -> None:
        self.assertLess(deploy.MigrateSection().lock_timeout, float(self.sql(DEADLOCK_TIMEOUT)))


class Defaults(DjangoTest):
    """A column that is added keeps its default, because the release that is live does not name it."""

    def test_no_write_is_lost(self) -> None:
        self.add(HAS_OPEN)
        with self.writing() as said:
            self.migrate()
        self.assertEqual(set(said), {"written"})
        self.assertEqual(self.sql('select count(*) from "formsApp_form" where not open'), "0")

    def test_by_itself_django_loses_every_one(self) -> None:
        self.add(HAS_OPEN)
        with self.writing() as said:
            self.manage("migrate", "--noinput")
        self.assertRegex(said[-1], 'lost: null value in column "open"')

    def test_only_where_one_is_needed(self) -> None:
        self.add(
            HAS_OPEN,
            'migrations.AddField("form", "maybe", models.IntegerField(null=True, default=3))',
            'migrations.AddField("form", "text", models.TextField(blank=True))',
            'migrations.AddField("form", "once", models.IntegerField(default=4), preserve_default=False)',
            'migrations.AddField("form", "parent", models.ForeignKey("form", models.CASCADE, default=1))',
            'migrations.AddField("form", "others", models.ManyToManyField("form"))',
            'migrations.AddField("form", "changed", models.DateField(auto_now=True))',
        )
        self.migrate()
        kept = self.columns()
        self.assertEqual(kept.keys(), {"open", "text", "once", "parent_id", "changed"})
        self.assertEqual([kept[name] for name in ("open", "once", "parent_id")], ["true", "4", "1"])

    def test_it_is_reversed_and_no_change_of_the_models(self) -> None:
        self.add(HAS_OPEN)
        self.replace(
            "formsApp/models.py",
            "    title =",
            "    open = models.BooleanField(default=True)\n    title =",
        )
        self.migrate()
        self.assertIn("No changes", self.manage("makemigrations", "--check", "--dry-run"))
        self.call("reverse_migrations(['formsApp.0002_step'], 2000)")
        self.assertEqual(self.columns(), {})
        self.assertFalse(self.listed()["0002"]["applied"])
        self.insert()

    def test_another_type_later(self) -> None:
        """PostgreSQL cannot bring the default of before to the new type."""
        after = self.add(
            'migrations.AddField("form", "size", models.CharField(max_length=9, default="7"))'
        )
        self.migrate()
        self.add(
            'migrations.AlterField("form", "size", models.IntegerField(default=8))', after=after
        )
        self.migrate()
        self.assertEqual(self.columns(), {"size": "8"})
        self.assertEqual(
            self.sql(f'select size from "formsApp_form" where id = {self.insert()}'), "8"
        )

    def test_a_default_of_the_database_stays_the_projects_own(self) -> None:
        after = self.add(
            'migrations.RunSQL("alter table \\"formsApp_form\\" alter title set default \'mine\'", "")'
        )
        self.add(
            'migrations.AlterField("form", "title", models.CharField(max_length=300))', after=after
        )
        self.migrate()
        self.assertIn("mine", self.columns()["title"])


class Conflicts(DjangoTest):
    """What the release that is live cannot go on with is named."""

    def judged(self, *operations: str, **options: Any) -> list[str]:
        self.add(*operations)
        found: list[str] = self.listed(**options)["0002"]["incompatible"]
        return found

    def test_what_breaks_it(self) -> None:
        told = {
            'RemoveField("form", "description")': "Remove field description from form",
            'RenameField("response", "text", "words")': "Rename field text on response to words",
            'AlterField("response", "id", models.UUIDField(primary_key=True, unique=True))': "",
            'AlterField("form", "title", models.CharField(max_length=9, unique=True))': "Alter field title on form, which must be unique",
            'AddField("form", "bare", models.IntegerField())': "Add field bare to form, which needs a value",
            'AddField("form", "key", models.UUIDField(default=uuid.uuid4, unique=True))': "Add field key to form, which needs a value",
            'RunSQL("select 1")': "Raw SQL operation, which may be anything",
            'AlterModelTable("form", "other")': "Rename table for form to other",
            'RenameModel("Form", "Sheet")': "Rename model Form to Sheet",
            'DeleteModel("Response")': "Delete model Response",
        }
        operations = [f"migrations.{each}" for each in told]
        self.assertEqual(self.judged(*operations), [each for each in told.values() if each])

    def test_what_does_not(self) -> None:
        self.assertEqual(
            self.judged(
                HAS_OPEN,
                'migrations.CreateModel("Note", [("id", models.BigAutoField(primary_key=True))])',
                'migrations.AddField("note", "bare", models.IntegerField())',
                'migrations.RemoveField("form", "open")',
                'migrations.DeleteModel("Note")',
                'migrations.AlterField("form", "title", models.CharField(max_length=200, null=True))',
                'migrations.AddField("form", "maybe", models.IntegerField(null=True, unique=True))',
                "migrations.RunPython(migrations.RunPython.noop)",
                "migrations.RunSQL(migrations.RunSQL.noop)",
                'migrations.SeparateDatabaseAndState(state_operations=[migrations.DeleteModel("Response")])',
            ),
            [],
        )

    def test_null_no_more(self) -> None:
        after = self.add('migrations.AlterField("form", "title", models.TextField(null=True))')
        self.migrate()
        self.add(
            'migrations.AlterField("form", "title", models.TextField(default=""))', after=after
        )
        self.assertEqual(
            self.listed()["0003"]["incompatible"],
            ["Alter field title on form, which must not be NULL"],
        )

    def test_inside_of_a_separated_one(self) -> None:
        inner = 'migrations.RemoveField("form", "title")'
        self.assertEqual(
            self.judged(f"migrations.SeparateDatabaseAndState(database_operations=[{inner}])"),
            ["Remove field title from form"],
        )

    def test_a_column_that_the_release_before_has_already_forgotten(self) -> None:
        """The two steps of removing one without harm."""
        inner = 'migrations.RemoveField("form", "description")'
        after = self.add(f"migrations.SeparateDatabaseAndState(state_operations=[{inner}])")
        self.migrate()
        self.add(f"migrations.SeparateDatabaseAndState(database_operations=[{inner}])", after=after)
        self.assertEqual(self.listed()["0003"]["incompatible"], [])

    def test_a_default_that_is_not_kept(self) -> None:
        """With a command of the operator's own, or in SQLite, which makes the table anew."""
        told = ["Add field open to form, which needs a value"]
        self.assertEqual(self.judged(HAS_OPEN, keeps_defaults=False), told)
        variables: dict[str, Any] = {"DEFAULT_DB_ENGINE": "django.db.backends.sqlite3"}
        variables["DEFAULT_DB_NAME"] = str(self.folder / "db.sqlite3")
        (self.folder / "formsApp" / "migrations" / "0002_step.py").unlink()
        self.migrate(**variables)
        self.assertEqual(self.judged(HAS_OPEN, **variables), told)
        self.migrate(**variables)
        self.call("reverse_migrations(['formsApp.0002_step'], 2000)", **variables)
        self.assertEqual(self.listed(**variables)["vendor"], "sqlite")


class Locks(DjangoTest):
    """How long a migration waits for a lock, and what it leaves."""

    INDEX = 'AddIndexConcurrently("form", models.Index(fields=["title"], name="by title"))'

    def test_an_atomic_one_is_limited_whatever_the_project_says(self) -> None:
        self.replace(
            "forms/settings.py",
            '"ENGINE": engine,\n        "NAME": name,\n        "HOST"',
            '"OPTIONS": {"options": "-c lock_timeout=0"}, "ENGINE": engine, "NAME": name, "HOST"',
        )
        self.add(HAS_OPEN)
        self.assertEqual(self.listed(PGOPTIONS="-c lock_timeout=300ms")["lock_timeout"], "0")
        with self.transaction():
            self.assertRegex(self.migrate(300, fails=True), deploy._LOCKED)

    def test_without_such_options_it_is_what_was_asked_for(self) -> None:
        self.assertEqual(self.listed(PGOPTIONS="-c lock_timeout=300ms")["lock_timeout"], "300ms")

    def test_one_that_is_not_atomic_is_not(self) -> None:
        self.add(self.INDEX, extra="atomic = False")
        self.assertFalse(self.listed()["0002"]["atomic"])
        waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        with self.transaction(
            "insert into \"formsApp_form\" values (9, '', 9, '', now())"
        ) as other:
            ended: list[str] = []
            migration = threading.Thread(target=lambda: ended.append(self.migrate(100)))
            migration.start()
            wait_for(lambda: self.sql(waits) == "1", "the index waits")
            migration.join(0.5)
            self.assertEqual(ended, [])
            assert other.stdin
            other.stdin.write("commit;\n")
            other.stdin.flush()
            migration.join()
        self.assertTrue(ended)
        self.assertEqual(self.listed()["invalid"], [])

    def test_an_index_that_is_invalid_is_named(self) -> None:
        self.sql(
            "insert into \"formsApp_form\" values (8, '', 8, '', now()), (9, '', 9, '', now())"
        )
        self.add(
            'migrations.RunSQL("create unique index concurrently \\"by title\\" on \\"formsApp_form\\" (title)")',
            extra="atomic = False",
        )
        self.migrate(fails=True)
        self.assertEqual(self.listed()["invalid"], ['"by title"'])


class Facts(DjangoTest):
    """What else is told."""

    def test_the_database_is_the_one_that_psql_sees(self) -> None:
        told = self.listed()
        self.assertEqual(told["identity"], self.sql(IDENTITY))
        self.assertNotEqual(told["identity"], self.cluster.sql(IDENTITY))
        self.assertEqual((told["vendor"], told["others"]), ("postgresql", []))

    def test_other_databases_with_migrations(self) -> None:
        settings = self.folder / "forms" / "settings.py"
        settings.write_text(
            settings.read_text()
            + 'DATABASES["replica"] = DATABASES["default"] | {"TEST": {"MIRROR": "default"}}\n'
            + 'DATABASES["archive"] = DATABASES["default"] | {}\n'
        )
        self.assertEqual(self.listed()["others"], ["archive"])
        (self.folder / "forms" / "routers.py").write_text(
            "class Router:\n    def allow_migrate(self, db, *_, **__):\n        return db == 'default'\n"
        )
        settings.write_text(settings.read_text() + 'DATABASE_ROUTERS = ["forms.routers.Router"]\n')
        self.assertEqual(self.listed()["others"], [])

    def test_squashed_ones_tell_what_they_replace(self) -> None:
        self.add(HAS_OPEN)
        self.migrate()
        self.manage("squashmigrations", "formsApp", "0002", "--noinput")
        replaced = ["formsApp.0001_initial", "formsApp.0002_step"]
        told = self.listed()["0001"]
        self.assertEqual((told["replaces"], told["applied"]), (replaced, True))
        self.migrate()
        rows = self.sql("select count(*) from django_migrations where name like '0001_squash%'")
        self.assertEqual(rows, "1", "a migration without anything to apply records it")

    def squash(self) -> None:
        self.add(HAS_OPEN)
        self.migrate()
        self.manage("squashmigrations", "formsApp", "0002", "--noinput")

    def noted(self) -> str:
        """How many squashed migrations Django has noted."""
        return self.sql("select count(*) from django_migrations where name like '0001_squash%'")

    def test_with_nothing_to_apply_it_is_settled_in_the_same_start(self) -> None:
        self.squash()
        self.assertFalse(self.listed()["settled"])
        self.assertEqual(self.noted(), "0", "who only looks changes nothing")
        self.assertTrue(self.listed(settle=[MIGRATE])["settled"])
        self.assertEqual(self.noted(), "1")

    def test_but_not_before_the_candidate_has_booted(self) -> None:
        self.squash()
        path = str(self.folder / "candidate.sock")
        self.assertFalse(self.listed(settle=[MIGRATE], candidate=path)["settled"])
        self.assertEqual(self.noted(), "0")
        with socket.socket(socket.AF_UNIX) as candidate:
            candidate.bind(path)
            candidate.listen()
            self.assertTrue(self.listed(settle=[MIGRATE], candidate=path)["settled"])

    def test_nor_where_something_is_to_be_applied(self) -> None:
        self.add(HAS_OPEN)
        told = self.listed(settle=[MIGRATE])
        self.assertEqual((told["settled"], told["0002"]["applied"]), (False, False))

    def test_what_fails_then_is_only_said_not_to_be_settled(self) -> None:
        for command in (["migrate", "--no-such-option"], ["no_such_command"]):
            self.assertFalse(self.listed(settle=[MIGRATE, command])["settled"])

    def test_settings_after_commands_whatever_these_say(self) -> None:
        speak = ["shell", "--verbosity", "0", "--command", "print('collected', end='')"]
        said = self.call(f"list_settings([{speak}])")
        self.assertIn("collected", said)
        url, static_root, _, debug = json.loads(said.splitlines()[-1])
        root = str(self.folder / "staticfiles")
        self.assertEqual((url, static_root, debug), ("/static/", root, ""))
        self.call("list_settings([['no_such_command']])", fails=True)

    def test_what_cannot_be_reversed(self) -> None:
        self.add('migrations.RunSQL("select 1")')
        self.assertFalse(self.listed()["0002"]["reversible"])


class Rehearsal(DjangoTest):
    """A migration on a copy of the database."""

    def setUp(self) -> None:
        super().setUp()
        self.copy = f"{self.database}_copy"
        self.cluster.sql(f"create database {self.copy} template {self.database}")
        self.addCleanup(self.cluster.sql, f"drop database {self.copy} with (force)")

    def rehearse(self, statement: str, **options: Any) -> str:
        self.add(HAS_OPEN, f"migrations.RunSQL({statement!r})")
        said = self.call(f"rehearse(['migrate', '--noinput'], {self.copy!r})", **options)
        self.assertFalse(self.listed()["0002"]["applied"])
        self.assertEqual(self.columns(), {})
        return said

    def test_it_tells_which_tables_were_locked_and_how_long(self) -> None:
        said = self.rehearse("create table made (); lock table made; select pg_sleep(1)")
        locks = dict(json.loads(said.splitlines()[-1]))
        self.assertEqual(locks.keys(), {"formsApp_form"})
        self.assertTrue(0.8 < locks["formsApp_form"] < 10, locks)
        self.assertEqual(self.cluster.sql("select to_regclass('made')", self.copy), "made")

    def test_one_that_fails_leaves_the_database_alone(self) -> None:
        self.assertIn("division by zero", self.rehearse("select 1 / 0", fails=True))


if __name__ == "__main__":
    unittest.main()
