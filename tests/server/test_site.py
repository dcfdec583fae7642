"""A site that was set up as a new operator would, deployed over ssh while users ask for it through nginx."""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import time
import unittest
from pathlib import Path

from tests.sandbox import MIGRATION
from tests.server.bench import HOST, PROJECT, Answer, require
from tests.server.machine import finish, until
from tests.server.site import (
    AUTHOR,
    CHECKOUT,
    FULL_RIGHTS,
    OLD_STOPS,
    SETUP,
    STANDBY_STARTS,
    UNITS,
    WORKSPACE,
    Run,
    Site,
    SiteCase,
    record,
)

APPLICATION = "application = get_wsgi_application()"
# Every file that a set-up may touch, with its owner, mode, size, time and target, and since when the units run.
STATE = f"""\
find /etc {CHECKOUT} -xdev -not -path '*/.deploy/*' -printf '%p %u:%g %m %s %T@ %l\\n' | sort
stat --format='%n %U:%G %a' /home/ubuntu
id ubuntu; id www-data
systemctl show --property=Id,ActiveState,UnitFileState,ActiveEnterTimestampMonotonic {" ".join(UNITS)} nginx
pgrep --uid www-data nginx
"""
# What `status` asks.
CHECKS = ("health", "gunicorn", "nginx", "postgresql", "redis", "database", "disk")
STATES: dict[str, list[str]] = {}  # after each stage of the set-up
SAID: dict[str, str] = {}
TOO_EARLY: list[Answer] = []  # what visitors were answered before there was a release


def setUpModule() -> None:
    """From nothing, as a new operator does it: git clone, `.env`, the set-up, a deployment."""
    require()
    SiteCase.site = site = Site()
    unittest.addModuleCleanup(site.close)
    site.boot()
    site.run("apt-get purge --yes 'nginx*' && gpasswd --delete ubuntu docker", timeout=120)
    site.prepare()
    STATES["new server"] = state(site)
    stages = {
        "dry run": f"{SETUP} --dry-run",
        "set-up": SETUP,
        "deployment": "",
        "second set-up": SETUP,
    }
    for stage, command in stages.items():
        began = time.monotonic()
        run = site.operate(command) if command else site.deploy()
        record(f"{stage}: {time.monotonic() - began:.1f} s")
        assert run.status == 0, f"{stage}: {run.text}"
        if not command:
            site.await_rest()
        SAID[stage], STATES[stage] = run.text, state(site)
        if stage == "set-up":
            visit_too_early(site)
    # from here on the deploying user has no rights but those that the set-up gave it
    site.run(f"rm {FULL_RIGHTS} && gpasswd --delete ubuntu sudo")


def visit_too_early(site: Site) -> None:
    """Ask for pages before there is a release, for as long as a unit would need to start and fail a few times."""
    until("nginx has left its own page", 20, lambda: site.http("/").status != 200)
    begun = time.monotonic()
    while time.monotonic() < begun + 3:
        TOO_EARLY.append(site.http(("/", "/admin/login/", "/static/a.css")[len(TOO_EARLY) % 3]))
    SAID["too early"] = site.run("journalctl --output=cat --unit='gunicorn*'").stdout


def deploy_only() -> str:
    """Return what stands before the key in authorized_keys, as docs/server.md shows it."""
    shown = re.search(
        r'^(.*command=".+") ssh-ed25519 ',
        (PROJECT / "docs" / "server.md").read_text(),
        re.MULTILINE,
    )
    assert shown, "docs/server.md shows no such key"
    return shown[1]


def state(site: Site) -> list[str]:
    """Return the state of all that a set-up may change."""
    return site.run(STATE, check=False).stdout.splitlines()


def migration(after: str, operation: str) -> str:
    """Return the text of a migration with one operation."""
    return (
        "from django.db import migrations\n\n\nclass Migration(migrations.Migration):\n"
        f'    dependencies = [("formsApp", "{after}")]\n    operations = [{operation}]\n'
    )


class SetupTest(SiteCase):
    """What the set-up made of an empty server, and what it lets whom do."""

    def test_dry_run(self) -> None:
        """It shows what would be different, and changes nothing."""
        self.assertEqual(STATES["dry run"], STATES["new server"])
        for shown in (*UNITS, "apt-get install --yes nginx", "/etc/nginx/", "/etc/sudoers.d/",
                      "+ListenStream=127.0.0.1:8000"):  # fmt: skip
            self.assertIn(shown, SAID["dry run"])

    def test_second(self) -> None:
        """It changes nothing, and says so."""
        self.assertEqual(STATES["second set-up"], STATES["deployment"])
        self.assertIn("nothing to change", SAID["second set-up"])

    def test_visitors_before_the_first_release(self) -> None:
        """They are told to come back, and the units do not try to start what is not there again and again."""
        self.assertGreater(len(TOO_EARLY), 5)
        self.assertEqual({answer.status for answer in TOO_EARLY}, {404, 503})
        self.assertEqual({*TOO_EARLY[0].all("Retry-After")}, {"10"})
        self.assertIn("Back in a moment", TOO_EARLY[0].body)
        self.assertLess(len(SAID["too early"].splitlines()), 50, SAID["too early"])
        self.assertNotIn("Scheduled restart job", SAID["too early"])

    def test_checks(self) -> None:
        """What it has put in place is valid, and there after a reboot."""
        units = [f"/etc/systemd/system/{unit}" for unit in UNITS]
        for command in (
            ["systemd-analyze", "verify", *units],
            ["nginx", "-t"],
            ["visudo", "--check"],
        ):
            with self.subTest(command[0]):
                self.site.run(command)
        enabled = self.site.run(["systemctl", "is-enabled", *UNITS], check=False).stdout.split()
        self.assertEqual(enabled[:2], ["enabled", "enabled"])
        weight = ["systemctl", "show", "--property", "CPUWeight", "--value"]
        weights = [self.site.run([*weight, f"{each}.slice"]).stdout for each in ("system", "user")]
        self.assertEqual(weights, ["1000\n", "[not set]\n"])  # so 100

    def test_exposure(self) -> None:
        """systemd itself finds little that the services could do to the system: 2.0 of 10 at most."""
        for unit in ("gunicorn", "gunicorn-standby"):
            said = self.site.run(
                ["systemd-analyze", "security", "--no-pager", "--threshold=20", unit]
            ).stdout
            record(said.splitlines()[-1])

    def test_static_files(self) -> None:
        """nginx's user reads the static files, and not `.env`."""
        self.assertEqual(self.site.run("stat --format=%a /home/ubuntu").stdout, "750\n")
        path = f"{WORKSPACE}/current/staticfiles/{self.site.style().removeprefix('/static/')}"
        as_nginx = ["runuser", "-u", "www-data", "--"]
        self.site.run([*as_nginx, "test", "-r", path])
        self.assertNotEqual(
            self.site.run([*as_nginx, "cat", f"{CHECKOUT}/.env"], check=False).returncode, 0
        )

    def test_uploads(self) -> None:
        """nginx's user reads what the application wrote, and a page among it gets no rights of the site."""
        site, folder = self.site, f"{CHECKOUT}/media/a"
        self.addCleanup(site.run, ["rm", "-r", folder])
        umask = "umask $(systemctl show --value --property=UMask gunicorn)"
        site.run(f"{umask}; mkdir -p {folder}; echo hello > {folder}/b.html", user="ubuntu")
        answer = site.http("/media/a/b.html")
        self.assertEqual((answer.status, answer.body), (200, "hello\n"))
        self.assertEqual([*answer.all("Content-Security-Policy")], ["sandbox"])
        self.assertEqual(site.http("/media/none").status, 404)

    def test_a_boot_after_a_power_cut(self) -> None:
        """What was cut off is put right by a unit, which a boot starts; without such a run, nothing happens."""
        site, unit, journal = self.site, "gforms-recover", f"{WORKSPACE}/journal.json"
        self.assertEqual(site.run(["systemctl", "is-enabled", unit]).stdout, "enabled\n")
        self.assertEqual(site.run(["test", "-e", journal], check=False).returncode, 1)
        site.run(["systemctl", "start", unit])
        cut_off = {
            "run": {"command": "deploy", "by": "x", "started": "20260101T000000Z"},
            "begun": [],
        }
        site.put(journal, json.dumps(cut_off), user="ubuntu")
        site.run(["systemctl", "start", unit], timeout=120)
        said = site.run(["journalctl", "--output=cat", f"--unit={unit}"]).stdout
        self.assertEqual(said.count("found: a deploy by x was cut off"), 1, said)
        self.assertEqual(site.run(["test", "-e", journal], check=False).returncode, 1)
        site.await_rest()

    def test_rights(self) -> None:
        """The deploying user may run the commands of [restart] as root, and nothing else."""
        listed = " ".join(self.site.run(["sudo", "--list", "--other-user=ubuntu"]).stdout.split())
        rights = listed.partition("may run the following commands on ")[2].split(
            "(root) NOPASSWD: "
        )[1:]
        commands = re.findall(
            r"^ +sudo -n (.+)$", (PROJECT / "deploy.ini").read_text(), re.MULTILINE
        )
        self.assertGreater(len(commands), 3)
        self.assertEqual(
            sorted(re.sub(r"^/usr/s?bin/", "", right.strip()) for right in rights), sorted(commands)
        )
        for refused in ("systemctl restart gunicorn nginx", "systemctl stop gunicorn", "systemctl edit gunicorn",
                        "nginx -t -c /tmp/mine", "bash", "-u www-data true"):  # fmt: skip
            with self.subTest(refused):
                done = self.site.run(f"sudo -n {refused}", user="ubuntu", check=False)
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertIn("password is required", done.stderr)

    def test_key_that_may_only_deploy(self) -> None:
        """Whatever is asked for with the key of docs/server.md, deploy.py runs and nothing else; it forwards nothing."""
        site, key = self.site, self.site.key(deploy_only())
        site.run(
            ["chmod", "604", f"{CHECKOUT}/.env"]
        )  # so that each of these runs ends at its beginning
        self.addCleanup(site.run, ["chmod", "600", f"{CHECKOUT}/.env"])
        for option, words in (("-T", ["cat .env; id"]), ("-T", []), ("-s", ["sftp"])):
            with self.subTest(words):
                done = finish(
                    site.spawn(site.ssh_command(*words, key=key, options=[option])), None, 60, False
                )
                self.assertEqual(done.returncode, 78, done.stdout + done.stderr)
                self.assertRegex(
                    done.stdout,
                    r"\A.*everyone on this machine may read it; nothing was touched.*\n\Z",
                )
        for name, *options in (
            ["-W", "127.0.0.1:6379"],
            ["-R", "9999:127.0.0.1:6379", "-oExitOnForwardFailure=yes"],
        ):
            with self.subTest(name):
                self.assertEqual(self.forward(None, name, *options), (0, ""))
                status, said = self.forward(key, name, *options)
                self.assertEqual(status, 255)
                self.assertIn("forwarding failed", said)
        self.assertIn("PTY allocation request failed", self.forward(key, "-tt")[1])

    def forward(self, key: Path | None, *options: str) -> tuple[int, str]:
        """Connect with these options; the exit status and what ssh said."""
        words = [] if "-W" in options else ["true"]
        command = self.site.ssh_command(*words, key=key, options=options)
        done = finish(self.site.spawn(command, stdin=subprocess.PIPE), "QUIT\r\n", 60, False)
        return done.returncode, done.stderr


class LoadTest(SiteCase):
    """Whatever is deployed, no user loses a request, waits for it, or meets half a release."""

    def test_code_only(self) -> None:
        """New code and a new style sheet; whoever loaded the page before still gets the one of that page."""
        site, old, before = self.site, self.site.version(), self.site.style()
        text = site.http(before).body
        site.edit("formsApp/static/formsApp/style.css", "margin: 0;", "margin: 0; color: navy;")
        new = self.push()
        with self.under_load("code only", "/", "/late/", before) as watch:
            watch.run = site.deploy()
        self.assert_live(watch.run, new)
        self.assert_met(watch, old, new)
        self.assertNotEqual(site.style(), before)
        self.assertEqual((site.http(before).status, site.http(before).body), (200, text))
        self.assertIn("color: navy", site.http(site.style()).body)

    def test_packages_and_migration_and_back(self) -> None:
        """A new package and a new column; then the release before, which knows neither."""
        site, old = self.site, self.site.version()
        site.edit("Pipfile", "[packages]\n", '[packages]\nwhitenoise = "*"\n')
        security = '    "django.middleware.security.SecurityMiddleware",\n'
        site.edit(
            "forms/settings.py",
            security,
            f'{security}    "whitenoise.middleware.WhiteNoiseMiddleware",\n',
        )
        site.add("formsApp/migrations/0002_form_open.py", MIGRATION)
        meta = '\n    class Meta:\n        ordering = ["title"]'
        site.edit(
            "formsApp/models.py", meta, f"    open = models.BooleanField(db_default=True)\n{meta}"
        )
        site.lock()
        new = self.push()
        with self.under_load("packages and a migration", "/", "/late/", "/ping/") as watch:
            watch.run = site.deploy()
        self.assert_live(watch.run, new)
        self.assert_met(watch, old, new)
        self.assertIn("to be applied: formsApp.0002_form_open\n", watch.run.text)
        self.assertNotIn("nothing to install", watch.run.text)
        with self.under_load("rollback", "/", "/late/", "/ping/") as watch:
            watch.run = site.operate("python3 deploy.py rollback --no-freeze")
        self.assert_live(watch.run, old)
        self.assert_met(watch, new, old)

    def test_configuration(self) -> None:
        """What changed in `.env` and in docker-compose.yml takes effect; a container that did not change runs on."""
        site, old, containers, other = (
            self.site,
            self.site.version(),
            self.site.containers(),
            "other.example.com",
        )
        self.assertEqual(site.http("http://127.0.0.1:8000/", host=other).status, 400)
        site.run(f"sed -i 's/^ALLOWED_HOSTS=.*/&,{other}/' .env && "
                 "sed -i 's/^    container_name: redis$/&\\n    labels: [changed=yes]/' docker-compose.yml",
                 user="ubuntu", cwd=CHECKOUT)  # fmt: skip
        # what nginx answers to is an affair of `setup`, which `check` would say
        self.addCleanup(site.run, f"sed -i 's/,{other}//' .env", user="ubuntu", cwd=CHECKOUT)
        new = self.push()
        with self.under_load("changed .env", "/", "/late/") as watch:
            watch.run = site.deploy()
        self.assert_live(watch.run, new)
        self.assert_met(watch, old, new)
        self.assertEqual(site.http("http://127.0.0.1:8000/", host=other).status, 200)
        label = ["docker", "inspect", "--format", '{{index .Config.Labels "changed"}}', "redis"]
        self.assertEqual(site.run(label).stdout, "yes\n")
        self.assertEqual(
            [one == other for one, other in zip(site.containers(), containers)], [True, False]
        )

    def test_restart(self) -> None:
        """Everything is restarted in its order, but for containers that run as they should, and nobody notices."""
        site, live = self.site, self.site.version()
        processes, containers = self.processes(), site.containers()
        with self.under_load("restart", "/", "/late/") as watch:
            watch.run = site.operate("python3 deploy.py restart")
        self.assert_live(watch.run, live)
        self.assert_met(watch, live)
        self.assertRegex(watch.run.text, "(?s)docker compose up .*nginx -t\n.*restart nginx\n"
                         ".*restart gunicorn-standby\n.*restart gunicorn\n.*the site answers")  # fmt: skip
        self.assertEqual(
            (set(processes) & set(self.processes()), site.containers()), (set(), containers)
        )

    def processes(self) -> list[str]:
        """Return gunicorn's main process and nginx's workers."""
        found = self.site.run(
            "systemctl show --value --property=MainPID gunicorn; pgrep --uid www-data nginx"
        ).stdout
        self.assertGreater(len(found.split()), 1)
        return found.split()

    def test_slow_import(self) -> None:
        """It takes 3 s to import; a request of 10 s runs across the switch, and old workers import late after it."""
        site, old = self.site, self.site.version()
        site.edit("forms/wsgi.py", APPLICATION, f"__import__('time').sleep(3)\n{APPLICATION}")
        new = self.push()
        site.run(
            ["systemctl", "restart", "gunicorn"]
        )  # workers that have not imported the late module
        with concurrent.futures.ThreadPoolExecutor() as pool, \
                self.under_load("import of 3 s, request of 10 s", "/") as watch:  # fmt: skip
            running = site.begin()
            running.await_line(STANDBY_STARTS)
            # too early, and it ends before the old server has to; too late, and the stand-by takes it
            slow = [pool.submit(self.ask_slowly, delay) for delay in (1, 2)]
            with site.load("/late/", connections=2, pause=0.1) as late:
                watch.run = running.end()
            watch.loads["/late/"] = late
        self.assert_live(watch.run, new)
        self.assert_met(watch, old, new)
        answers, stopped = [one.result() for one in slow], watch.run.when(OLD_STOPS)
        self.assertEqual([status for status, _, _ in answers], [200, 200])
        self.assertTrue(
            [version for _, version, ended in answers if version == old and ended > stopped],
            answers,
        )

    def ask_slowly(self, delay: float) -> tuple[int, str, float]:
        """Send a request of 10 s after a while; its status, who answered, and when."""
        time.sleep(delay)
        answer = self.site.http("/slow/10000/")
        return answer.status, answer.body, time.monotonic()


class OperationsTest(SiteCase):
    """What an operator asks and does between two deployments."""

    def bad(self) -> list[str]:
        """Return what `status` finds bad; its exit status must say the same."""
        done = self.site.ssh(f"cd {CHECKOUT} && python3 deploy.py status --json")
        found = json.loads(done.stdout)
        self.assertEqual([*found["checks"]], [*CHECKS])
        bad = [name for name, check in found["checks"].items() if not check["good"]]
        self.assertEqual(
            (done.returncode, found["healthy"]), (1 if bad else 0, not bad), done.stdout
        )
        return bad

    def test_status(self) -> None:
        """It is 0 only if all is well, and names what is not."""
        site = self.site
        site.await_rest()
        self.assertEqual(self.bad(), [])
        site.run(["systemctl", "stop", "nginx"])
        self.addCleanup(site.run, ["systemctl", "start", "nginx"])
        site.run(["docker", "kill", "redis", "postgresql"])
        self.addCleanup(site.run, ["docker", "start", "redis", "postgresql"])
        self.assertEqual(self.bad(), ["health", "nginx", "postgresql", "redis", "database"])
        run = site.operate("python3 deploy.py restart")
        self.assertEqual(run.status, 0, run.text)
        site.await_rest()
        self.assertEqual(self.bad(), [])

    def test_check(self) -> None:
        """A server as `setup` left it is ready, and knows what could be better."""
        done = self.site.ssh(f"cd {CHECKOUT} && python3 deploy.py check")
        self.assertEqual(
            (done.returncode, done.stdout.splitlines()[0]), (0, "ready to deploy"), done.stdout
        )
        self.assertIn("advice: the site is not served over HTTPS", done.stdout)
        self.assertNotIn("is open to every address", done.stdout)
        self.assertEqual(
            self.site.ssh(f"cd {CHECKOUT} && python3 deploy.py check --quiet").stdout, ""
        )

    def test_maintenance(self) -> None:
        """Every address answers 503 with a page and says when to come back; gunicorn can still be asked."""
        site, page = self.site, self.site.http("/")
        style = site.style()
        site.ssh(f"cd {CHECKOUT} && python3 deploy.py maintenance on")
        self.addCleanup(site.ssh, f"cd {CHECKOUT} && python3 deploy.py maintenance off")
        for address in ("/", "/admin/login/", style):
            answer = site.http(address)
            self.assertEqual((answer.status, answer.all("Retry-After")), (503, ["10"]), address)
            self.assertIn("Back in a moment", answer.body)
        self.assertEqual(site.http("http://127.0.0.1:8000/", host=HOST).status, 200)
        site.ssh(f"cd {CHECKOUT} && python3 deploy.py maintenance off")
        self.assertEqual(
            (page.status, site.http("/").status, site.http(style).status), (200, 200, 200)
        )

    def test_timer(self) -> None:
        """Installed when asked for, it deploys what is new, and has nothing to say when nothing is."""
        site = self.site
        site.run(["python3", f"{CHECKOUT}/deploy.py", "setup", "--timer"])
        self.addCleanup(site.run, ["systemctl", "disable", "--now", "gforms-deploy.timer"])
        self.assertEqual(
            site.run(["systemctl", "is-active", "gforms-deploy.timer"]).stdout, "active\n"
        )
        said = site.run(
            ["systemd-analyze", "security", "--no-pager", "--threshold=70", "gforms-deploy"]
        ).stdout
        record(said.splitlines()[-1])
        new = self.push()
        site.run(["systemctl", "start", "gforms-deploy.service"])  # ends when the deployment has
        self.assertEqual(site.late(), f"{new} {new}")
        self.assertIn("systemd", site.history()[-1]["by"])
        before = len(site.history())
        site.run(["systemctl", "start", "gforms-deploy.service"])
        self.assertEqual(len(site.history()), before)
        lines = site.run(
            "journalctl --unit=gforms-deploy --output=cat | tail -n 3"
        ).stdout.splitlines()
        self.assertEqual([line for line in lines if line.startswith("deploy ")], [])
        until(
            "it rests",
            30,
            lambda: (
                site.run("systemctl is-active gforms-deploy", check=False).stdout == "inactive\n"
            ),
        )


class ComposeTest(SiteCase):
    """A compose file in the repository, and Redis keeps its data in a folder beside it."""

    def colour(self) -> str:
        return self.site.run(
            ["docker", "exec", "redis", "redis-cli", "get", "colour"]
        ).stdout.strip()

    def test_one_that_cannot_start(self) -> None:
        """The services are as they were, with their data, and `restart` does not try it again."""
        site, checkout = self.site, f"{CHECKOUT}/docker-compose.yml"
        good = site.read(checkout).replace("redis_data:/data", "./kept:/data")
        site.run(["rm", checkout])  # git knew nothing of it until now
        ignored = site.read(f"{AUTHOR}/.gitignore").replace("docker-compose.yml", "kept/")
        site.add(".gitignore", ignored)
        site.add("docker-compose.yml", good)
        site.push()
        run = site.deploy()
        self.assertEqual(run.status, 0, run.text)
        site.run(["docker", "exec", "redis", "redis-cli", "set", "colour", "blue"])
        bad = good.replace("redis-cli ping 2>/dev/null", "false").replace("start_period: 1m", "")
        self.assertNotEqual(bad, good)
        site.add("docker-compose.yml", bad.replace("interval: 5s", "interval: 1s"))
        site.push()
        self.addCleanup(site.take_back)
        run = site.deploy()
        self.assertEqual(run.status, 1, run.text)
        for part in ("redis is unhealthy", "put the services back to what", "live and healthy"):
            self.assertIn(part, run.last)
        self.assertEqual(self.colour(), "blue")
        run = site.operate("python3 deploy.py restart")
        self.assertEqual(run.status, 0, run.text)
        self.assertEqual(self.colour(), "blue")


class FailureTest(SiteCase):
    """A release that is no good is never seen, and the last line says what is wrong with it and what is live."""

    def rejected(self, sentence: str) -> Run:
        """Deploy the next version while users ask: it fails with this sentence, and nobody has met it."""
        site, live, current = self.site, self.site.version(), self.site.current()
        self.push()
        with self.under_load(
            f"rejected for its {self._testMethodName.removeprefix('test_')}", "/", "/late/"
        ) as watch:
            watch.run = run = site.deploy()
        self.assertEqual(run.status, 1, run.text)
        live_now, remedy = (
            f"{current} is live and healthy",
            "mend (it and push|that and run it again)",
        )
        self.assertRegex(run.last, f"^[a-z]+ +FAILED: {sentence}; {live_now}; {remedy}$")
        self.assertNotIn('deploy.py", line', run.text)
        self.assert_met(watch, live)
        self.assertEqual((site.version(), site.current()), (live, current))
        self.assertEqual(site.history()[-1]["result"], "failed")
        return run

    def test_import(self) -> None:
        """It cannot be imported."""
        self.site.edit("forms/wsgi.py", APPLICATION, f"import no_such_module\n{APPLICATION}")
        self.rejected(
            r"the candidate was not proven: it does not start \(.*No module named 'no_such_module'\)"
        )

    def test_page(self) -> None:
        """It starts, and answers 500."""
        self.site.edit("formsApp/views.py", '"formsApp/index.html"', '"formsApp/none.html"')
        self.rejected(
            r"the candidate was not proven: 500 [^;]*, expected 200 \(.*TemplateDoesNotExist: .*none.html\)"
        )

    def test_migration(self) -> None:
        """The second of two migrations fails; the first stays, and the backup from before it is named."""
        first = "migrations.RunSQL('create table first (number int)', 'drop table first')"
        second = "migrations.RunSQL('select 1 / 0', migrations.RunSQL.noop)"
        self.site.add("formsApp/migrations/0002_first.py", migration("0001_initial", first))
        self.site.add("formsApp/migrations/0003_second.py", migration("0002_first", second))
        stays = "applied: formsApp.0002_first; not applied: formsApp.0003_second; the schema stays as it is"
        run = self.rejected(
            f"`python manage.py shell [^;]*; migrations {stays}; [^;]*restore /[^;]*[.]dump --yes"
        )
        dump = run.last.split("restore ")[1].split(" --yes")[0]
        listed = self.site.run(f"docker exec -i postgresql pg_restore --list < {dump}").stdout
        self.assertIn("formsApp_form", listed)
        self.assertNotIn("first", listed)
        self.assertEqual(self.site.sql("select count(*) from first"), "0")

    def test_static_files(self) -> None:
        """A style sheet names a file that is not there."""
        self.site.edit(
            "formsApp/static/formsApp/style.css", "body {", "body { background: url(none.png);"
        )
        run = self.rejected("`python manage.py collectstatic [^;]*")
        self.assertIn("none.png", run.text)

    def test_service(self) -> None:
        """It was proven, but does not start as the service, which may write less: the one before comes back."""
        self.site.edit(
            "forms/wsgi.py", APPLICATION, f"open(__file__ + '.started', 'w').close()\n{APPLICATION}"
        )
        run = self.rejected("`sudo -n systemctl restart gunicorn-standby` [^;]*")
        self.assertIn("the candidate answers: 200", run.text)
        self.assertIn("going back to", run.text)


class InterruptionTest(SiteCase):
    """Whatever is cut off, one whole release answers, and the next run needs no hand."""

    def test_connection_cut(self) -> None:
        """The deployment goes on without its reader, and ends well; a second one waits for it meanwhile.

        The first is begun with the key that can do nothing else.
        """
        site, new = self.site, self.push()
        first = site.begin(site.key(deploy_only()))
        first.await_line("static   $")
        first.cut()
        run = site.deploy()
        first.end()
        self.assertIn("waiting for the lock: deploy by ubuntu, ssh from 127.0.0.1 since", run.text)
        self.assert_live(run, new)
        entries = site.history()[-2:]
        self.assertEqual(
            [(entry["result"], entry["command"]) for entry in entries], [("live", "deploy")] * 2
        )
        log = site.read(f"{WORKSPACE}/logs/{entries[0]['started']}.log")
        for said in (
            "env      9 variables",
            "static   | ",
            "systemctl restart gunicorn",
            "the site answers",
        ):
            self.assertIn(said, log)
        self.assertRegex(log.splitlines()[-1], f"{entries[0]['release']} is live and healthy")

    def test_reboot_and_power_cut(self) -> None:
        """Right after the switch, and when all is done."""
        site, new = self.site, self.push()
        for interrupt in (site.reboot, self.lose_power):
            running = site.begin()
            running.await_line("restart  $ ")
            interrupt()
            run = running.end(30)
            site.await_page()
            self.assertRegex(site.late(), r"^(\d+) \1$", run.text)
            self.assertEqual(site.http(site.style()).status, 200)
        run = site.operate("python3 deploy.py deploy --wait 120")
        recovered = site.run("journalctl --output=cat --unit=gforms-recover").stdout
        self.assertIn(
            "found: a deploy by ubuntu, ssh from 127.0.0.1 was cut off at restart\n",
            recovered + run.text,
        )
        self.assert_live(run, new)
        results = [entry["result"] for entry in site.history()[-5:]]
        self.assertIn("cut off", results)  # whom a reboot ends first may fail by itself
        site.reboot()
        site.await_page()
        self.assertEqual(site.late(), f"{new} {new}")
        self.assertNotIn("journal.json", site.run(["ls", WORKSPACE]).stdout)

    def lose_power(self) -> None:
        """Cut the power and boot again."""
        self.site.power_cut()
        self.site.boot()


if __name__ == "__main__":
    unittest.main()
