"""Each step and the health check made to fail: what is live, the status, the sentence, what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.lab import MANAGE, LabTest, wait_for

DIES_ONCE = """
import os, sys
died = os.environ["LAB"] + "/died"
if not os.path.exists(died):
    open(died, "w").close()
    sys.exit("half of a file")
"""


class Folders(LabTest):
    """Where nginx looks for static files and uploads, they are."""

    def test_static_files_in_another_folder_of_the_release(self) -> None:
        self.lab.push({"app": "two", "manage.py": MANAGE.replace("staticfiles", "assets")})
        self.assert_deployed(self.lab.deploy(), "two")
        link = self.lab.workspace / "current" / "staticfiles"
        self.assertEqual(os.readlink(link), "assets")
        self.assertEqual((link / "style.css").read_text(), "two")

    def test_static_files_on_another_server(self) -> None:
        folders = ["https://cdn.example.com/", "", ""]
        self.lab.push({"app": "two", "folders": json.dumps(folders), "nginx/gforms.conf": "none"})
        self.assert_deployed(self.lab.deploy(), "two")

    def test_debug(self) -> None:
        self.lab.push({"app": "two", "debug": "True"})
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("Django's DEBUG is on: visitors see settings and source", run.stdout)

    def test_uploads(self) -> None:
        self.lab.setting("deploy", "shared", ".env media/ files/up/")
        for app, folder in (("two", "media"), ("three", "files/up")):
            self.lab.push({"app": app, "folders": json.dumps(["/static/", "staticfiles", folder])})
            self.assert_deployed(self.lab.deploy(), app)
            found = self.lab.workspace / "current" / "media"
            self.assertEqual(found.resolve(), self.lab.checkout / folder)

    def test_static_takes_one_start_of_django_unless_it_fails_there(self) -> None:
        for fails, starts in ((False, 2), (True, 4)):
            with self.subTest(fails=fails):
                if fails:
                    once = 'mkdir "$LAB/failed" 2>/dev/null && exit 1; exit 0'
                    self.lab.script("during-collectstatic", once)
                self.lab.push({"app": f"failing: {fails}"})
                self.assert_deployed(self.lab.deploy(), f"failing: {fails}")
                # also what is collected beside the services
                said = [line for line in self.lab.log().splitlines() if " static   " in line]
                self.assertEqual(sum("$ python manage.py" in line for line in said), starts)
                self.assertRegex(self.lab.log(), r" static   \$ python manage.py collectstatic")

    def test_static_by_another_program(self) -> None:
        self.lab.setting("static", "command", "sh -c 'mkdir staticfiles; touch staticfiles/made'")
        self.assert_deployed(self.lab.deploy(), "one")
        self.assertTrue((self.lab.workspace / "current/staticfiles/made").exists())


class Beside(LabTest):
    """Static files are collected while the services start, where nothing stands between the two."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.push({"app": "two"})
        self.lab.setting("services", "timeout", "20")

    def test_at_once(self) -> None:
        self.lab.script("services", 'until [ -e "$LAB/collecting" ]; do sleep 0.05; done')
        self.lab.script("during-collectstatic", 'touch "$LAB/collecting"')
        self.assert_deployed(self.lab.deploy(), "two")

    def test_what_needs_the_services_is_collected_after_them(self) -> None:
        self.lab.script(
            "services", 'until [ -e "$LAB/tried" ]; do sleep 0.05; done; touch "$LAB/up"'
        )
        self.lab.script(
            "during-collectstatic", '[ -e "$LAB/up" ] || { touch "$LAB/tried"; exit 1; }'
        )
        self.assert_deployed(self.lab.deploy(), "two")
        self.assertIn("collectstatic cannot be done", self.lab.log())

    def test_not_before_a_hook_between_them(self) -> None:
        self.lab.script("during-collectstatic", '[ -e "$LAB/between" ]')
        for app, section, hook in (("three", "services", "after"), ("four", "static", "before")):
            with self.subTest(section=section):
                self.lab.setting(section, hook, f"sh -c 'sleep 0.5; touch {self.lab.root}/between'")
                self.lab.push({"app": app})
                self.assert_deployed(self.lab.deploy(), app)
                self.assertNotIn("collectstatic cannot be done", self.lab.log())
            self.lab.setting(section, hook, "")
            (self.lab.root / "between").unlink()

    def test_services_that_fail_meanwhile(self) -> None:
        """The files of a release that is given up are not collected any more when it is removed."""
        self.lab.script("services", 'until [ -e "$LAB/collecting" ]; do sleep 0.05; done; exit 4')
        self.lab.script(
            "during-collectstatic", 'touch "$LAB/collecting"; sleep 4; mkdir -p "$PWD/staticfiles"'
        )
        self.assert_failed(self.lab.deploy(), "services", "`services up` ended with status 4")
        self.assert_only_good_releases()


class Gentle(LabTest):
    """What builds a release, or looks how all is, gives way; what the site waits for does not."""

    def test_niceness(self) -> None:
        own = os.nice(0)
        # it is told at once, but not before it begins
        told = "for i in $(seq 99); do [ $(nice) -ge 10 ] && break; sleep 0.05; done; { nice; cat /proc/self/autogroup; }"
        self.lab.first("pipenv", f'{told} > "$LAB/install"')
        self.lab.setting("static", "after", f"sh -c '{told} > {self.lab.root}/static'")
        self.lab.script("during-plan", f'{told} > "$LAB/plan"')
        self.lab.script("during-collectstatic", f'{told} > "$LAB/collectstatic"')
        self.lab.script("cache", f'{told} > "$LAB/check"')
        self.lab.setting("status", "checks", "cache: cache")
        self.lab.script("services", 'nice > "$LAB/services"')
        for name in ("migrate", "restart"):
            self.lab.setting(name, "before", f"sh -c 'nice > {self.lab.root}/{name}'")
        self.lab.push({"app": "two", "Pipfile.lock": '{"_meta": {}, "default": {"a": {}}}'})
        self.assert_deployed(self.lab.deploy(), "two")
        for name in ("install", "static", "collectstatic", "plan", "check"):
            niceness, *session = (self.lab.root / name).read_text().splitlines()
            self.assertEqual(int(niceness), max(own, 10), name)
            if os.geteuid() == 0:  # another user may rank one session in each tenth of a second
                for rank in session:  # one, where the kernel ranks sessions
                    self.assertRegex(rank, f" nice {max(own, 10)}$")
        for name in ("services", "migrate", "restart"):
            self.assertEqual(int((self.lab.root / name).read_text()), own, name)


class Proof(LabTest):
    """A rehearsal: what is built and has answered is removed again, and nothing else has changed."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.push({"app": "two", "migrations": "app.0001_first\napp.0002_good\n"})

    def test_of_a_release_that_works(self) -> None:
        run = self.lab.deploy("--prove")
        self.assert_status(run, 0)
        self.assertIn("the candidate answers: 200 OK", run.stdout)
        self.assert_untouched()
        self.assertEqual(self.lab.results(), ["live"])
        self.assert_deployed(self.lab.deploy(), "two")

    def test_of_one_that_does_not(self) -> None:
        self.lab.push({"boot": "broken"})
        self.assert_failed(self.lab.deploy("--prove"), "the candidate was not proven")
        self.assert_untouched()

    def assert_untouched(self) -> None:
        self.assert_live("one")
        self.assert_only_good_releases()
        self.assertEqual((self.lab.root / "database").read_text(), "app.0001_first")


BUILDS = (
    (
        "psycopg2",
        """Failed to build 'psycopg2' when getting requirements
  error: subprocess-exited-with-error
      Error: pg_config executable not found.
  note: This error originates from a subprocess
""",
        "Error: pg_config executable not found.",
    ),
    (
        "part",
        """Failed to build part
  error: subprocess-exited-with-error
      x.c:1:10: fatal error: nowhere.h: No such file or directory
      error: Command '['gcc']' returned non-zero exit status 1.
error: failed-wheel-build-for-install
""",
        "error: nowhere.h: No such file or directory",
    ),
    (
        "part",
        """error: Failed to build `part @ file:///part.tar.gz`
         [stderr]
         x.c:1:10: fatal error: nowhere.h: No such file or directory
""",
        "error: nowhere.h: No such file or directory",
    ),
    (
        "part",
        """ERROR: Failed building wheel for part
  ╰─> [1 lines of output]
      no config tool found
      [end of output]
""",
        "no config tool found",
    ),
)


class BeforeTheSwitch(LabTest):
    """What is live is not even touched."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.push({"app": "two"})
        self.touched = self.lab.root / "serving"
        self.since = self.touched.stat().st_mtime_ns

    def tearDown(self) -> None:
        self.assertEqual(self.touched.stat().st_mtime_ns, self.since, "the live site was restarted")

    def test_env_with_a_refused_line(self) -> None:
        self.lab.env("GOOD=1\nexport BAD=1\n")
        with self.nothing_touched():
            run = self.lab.deploy()
        self.assert_sentence(
            run, 78, [".env has 1 mistake", "nothing was touched", "mend the lines named above"]
        )
        self.assertIn(".env, line 2: ", run.stdout)
        self.assert_live("one")
        self.assertEqual(self.lab.results(), ["live"])

    def test_install(self) -> None:
        self.lab.push({"Pipfile": "# another", "Pipfile.lock": '{"_meta": {}}'})
        self.lab.script("pipenv", '[ "$1" = verify ] || { echo no such package; exit 3; }')
        run = self.lab.deploy()
        self.assert_failed(
            run, "install", "`pipenv install --deploy` ended with status 3", "mend", "run it again"
        )
        self.assertIn("| no such package", run.stdout)

    def test_install_of_a_package_that_cannot_be_built(self) -> None:
        """The cause stands far above the last line: each as pip, pipenv or uv say it."""
        self.lab.push({"Pipfile.lock": '{"_meta": {}}'})
        for package, said, cause in BUILDS:
            with self.subTest(cause):
                (self.lab.root / "said").write_text(said + "at the end\n" * 30)
                self.lab.script("pipenv", '[ "$1" = verify ] || { cat "$LAB/said"; exit 1; }')
                self.assert_failed(
                    self.lab.deploy(), f"the package {package} cannot be built: {cause}; "
                )

    def test_a_warning_of_python_at_its_end_is_no_cause(self) -> None:
        warning = (
            "sys:1: ResourceWarning: Enable tracemalloc to get the object allocation traceback"
        )
        self.lab.script("services", f"echo no space left; echo '{warning}'; exit 4")
        self.assert_failed(self.lab.deploy(), "ended with status 4 (no space left)")

    def test_install_of_a_stale_lock(self) -> None:
        self.lab.push({"Pipfile.lock": '{"_meta": {}}'})
        self.lab.script("pipenv", "exit 1")
        self.assert_failed(self.lab.deploy(), "Pipfile.lock is stale", "run pipenv lock")

    def test_install_that_failed_is_built_again(self) -> None:
        self.lab.push({"Pipfile.lock": '{"_meta": {}}'})
        script = (self.lab.bin / "pipenv").read_text()
        self.lab.script("pipenv", f'{script}\n[ "$1" = verify ] || exit 1')
        self.assert_failed(self.lab.deploy())
        self.lab.script("pipenv", script)
        run = self.lab.deploy()
        self.assert_deployed(run, "two")
        self.assertIn("installed by", run.stdout)
        self.since = self.touched.stat().st_mtime_ns

    def test_services(self) -> None:
        self.lab.script("services", "echo no space left; exit 4")
        run = self.lab.deploy()
        self.assert_failed(run, "services", "`services up` ended with status 4")
        self.assertIn("| no space left", run.stdout)
        self.assertIn(f"in {self.lab.checkout}: services up", run.stdout)

    def test_services_that_are_not_installed(self) -> None:
        (self.lab.bin / "services").unlink()
        self.assert_failed(self.lab.deploy(), "services is not installed, or not in PATH")

    def test_services_past_their_time_limit(self) -> None:
        self.lab.setting("services", "timeout", "0.2")
        self.lab.script("services", "block services & block services")
        self.assert_failed(
            self.lab.deploy(), "`services up` was ended after its time limit of 0.2 s"
        )

    def test_static(self) -> None:
        self.lab.push({"static": "broken"})
        run = self.lab.deploy()
        self.assert_failed(
            run, "static", "`python manage.py collectstatic --noinput` ended with status 1"
        )
        self.assertIn("| the static files are broken", run.stdout)

    def test_static_past_its_time_limit(self) -> None:
        self.lab.setting("static", "timeout", "0.3")
        self.lab.script("during-collectstatic", "block static")
        self.assert_failed(
            self.lab.deploy(), "collectstatic --noinput` was ended after its time limit of 0.3 s"
        )

    def test_static_files_that_nginx_does_not_find(self) -> None:
        nginx = "location ^~ /static/ {"
        for folders, words in (
            (
                ["/static/", "/srv/static", ""],
                "STATIC_ROOT is /srv/static, where nginx does not look",
            ),
            (["/static/", "assets", ""], "/assets, where nginx does not look"),
            (
                ["/assets/", "staticfiles", ""],
                "nginx/gforms.conf has no location for STATIC_URL = '/assets/'",
            ),
        ):
            with self.subTest(folders):
                self.lab.push({"folders": json.dumps(folders), "nginx/gforms.conf": nginx})
                self.assert_failed(self.lab.deploy(), "static", words, "write STATIC_")

    def test_uploads_that_would_end_with_their_release(self) -> None:
        for folder in ("uploads", ".", ".."):
            self.lab.push({"folders": json.dumps(["/static/", "staticfiles", folder])})
            self.assert_failed(
                self.lab.deploy(), "MEDIA_ROOT is /", "into [deploy] shared and push"
            )

    def test_migrate_in_the_middle(self) -> None:
        self.lab.push(
            {"migrations": "app.0001_first\napp.0002_good\napp.0003_bad\napp.0004_good\n"}
        )
        run = self.lab.deploy()
        backup = max((self.lab.workspace / "backups").iterdir())
        self.assert_failed(
            run,
            "migrate",
            "; migrations applied: app.0002_good; not applied: app.0003_bad, "
            "app.0004_good; the schema stays as it is; the database before it all comes back with: "
            f"python3 deploy.py restore {backup} --yes;",
        )
        self.assertEqual(
            (self.lab.root / "database").read_text().split(), ["app.0001_first", "app.0002_good"]
        )
        self.assertEqual(backup.read_text(), "the whole database\n")

    def test_migrate_at_the_first(self) -> None:
        self.lab.push({"migrations": "app.0001_first\napp.0002_bad\n"})
        self.assert_failed(
            self.lab.deploy(), "migrations applied: none; not applied: app.0002_bad;"
        )

    def test_the_plan(self) -> None:
        self.lab.script("during-plan", "echo no database; exit 1")
        run = self.lab.deploy()
        self.assert_failed(
            run, "migrate", "`python manage.py shell --verbosity 0` ended with status 1"
        )
        self.assertIn("| no database", run.stdout)

    def assert_not_migrated(self) -> None:
        self.assertEqual((self.lab.root / "database").read_text(), "app.0001_first")
        self.assertEqual(
            len(list((self.lab.workspace / "backups").iterdir())), 1, "half a backup is left"
        )

    def test_the_backup(self) -> None:
        self.lab.push({"migrations": "app.0001_first\napp.0002_good\n"})
        self.lab.setting("backup", "command", "sh -c 'echo half; echo no database >&2; exit 2'")
        run = self.lab.deploy()
        self.assert_failed(run, "migrate", "ended with status 2")
        self.assertIn("| no database", run.stdout)
        self.assert_not_migrated()

    def test_the_backup_is_empty(self) -> None:
        self.lab.push({"migrations": "app.0001_first\napp.0002_good\n"})
        self.lab.setting("backup", "command", "true")
        self.assert_failed(
            self.lab.deploy(), "migrate", "the backup is empty", "mend [backup] command"
        )
        self.assert_not_migrated()

    def test_a_candidate_that_cannot_boot_never_touches_the_database(self) -> None:
        self.lab.push({"boot": "broken", "migrations": "app.0001_first\napp.0002_good\n"})
        run = self.lab.deploy()
        self.assert_failed(
            run, "migrate", "the candidate was not proven: it does not start", "mend it and push"
        )
        self.assertIn("| ImportError: cannot import the application", run.stdout)
        self.assert_not_migrated()

    def test_a_candidate_that_cannot_boot(self) -> None:
        self.lab.push({"boot": "broken"})
        self.assert_failed(
            self.lab.deploy(), "migrate", "the candidate was not proven: it does not start"
        )

    def test_one_that_dies_is_not_tried_again(self) -> None:
        self.lab.setting("deploy", "steps", "env pull install services migrate restart")
        self.lab.first("gunicorn", DIES_ONCE)
        self.assert_failed(
            self.lab.deploy(), "migrate", "the candidate was not proven: it does not start"
        )

    def test_a_candidate_that_boots_for_ever(self) -> None:
        self.lab.setting("restart", "timeout", "0.3")
        self.lab.script("gunicorn", "exec block candidate")
        self.assert_failed(
            self.lab.deploy(),
            "migrate",
            "the candidate was not proven: it has not started after 0.3 s",
        )

    def test_a_candidate_that_answers_500(self) -> None:
        self.lab.push({"health": "500"})
        self.assert_failed(
            self.lab.deploy(),
            "restart",
            "the candidate was not proven: 500 Internal Server Error",
            "on the private socket, expected 200",
            "mend it and push",
        )

    def test_a_candidate_without_the_text(self) -> None:
        self.lab.setting("health", "contains", "one")
        self.assert_failed(
            self.lab.deploy(), "the candidate was not proven: 200 OK", "without the text 'one'"
        )

    def test_a_candidate_that_never_answers(self) -> None:
        self.lab.setting("health", "timeout", "0.3")
        (self.lab.root / "hold").write_text("candidate")
        self.assert_failed(self.lab.deploy(), "the candidate was not proven: no answer from")


class SomebodyIsThere(LabTest):
    """A shell in the folder of a release that failed, say, is no reason to wake anybody."""

    def test_it_is_removed_by_a_later_one(self) -> None:
        self.lab.push({"app": "two"})
        self.lab.script("services", "block services; exit 1")
        run = self.lab.blocked("services")
        folder = max((self.lab.workspace / "releases").iterdir())
        with subprocess.Popen(["sleep", "600"], cwd=folder) as shell:
            self.lab.unblock("services")
            done = self.lab.end(run)
            shell.kill()
        self.assert_sentence(done, 1, ["`services up` ended with status 1", "live and healthy"])
        self.assertIn(f"warning: a process works in {folder}, which is not removed", done.stdout)
        self.lab.script("services", "")
        self.lab.tick()
        self.assert_deployed(self.lab.deploy(), "two")
        self.assert_only_good_releases()


class AfterTheSwitch(LabTest):
    """What was live before is live again."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.push({"app": "two"})

    def sick(self, *texts: str) -> None:
        (self.lab.root / "sick").write_text(" ".join(texts))

    def test_a_restart_that_fails(self) -> None:
        self.lab.first("restart", "grep -qx one $LAB/checkout/.deploy/current/app || exit 5")
        self.assert_failed(
            self.lab.deploy(), "restart", "`restart` ended with status 5", "run it again"
        )

    def test_a_restart_that_fails_every_time_and_leaves_the_old_release_running(self) -> None:
        self.lab.script("restart", "exit 5")
        self.assert_failed(self.lab.deploy(), "restart", "`restart` ended with status 5")

    def test_a_site_that_is_not_healthy(self) -> None:
        self.sick("two")
        run = self.lab.deploy()
        self.assert_failed(
            run,
            "the site is not healthy: 500 Internal Server Error for http://127.0.0.1",
            "mend it",
        )
        self.assertIn(f"going back to {self.lab.linked('current')}", run.stdout)

    def test_a_restart_that_leaves_the_old_release_running(self) -> None:
        release = (self.lab.workspace / "current").resolve()
        self.lab.script("restart", ":")
        with subprocess.Popen(
            [sys.executable, "-c", "input()"], cwd=release, stdin=subprocess.PIPE
        ) as old:
            self.lab.setting("restart", "main_process", f"echo {old.pid}")
            run = self.lab.deploy()
            old.communicate(b"\n")
        self.assert_failed(run, f"the service runs in {release}, not in ", "its unit must run in")

    def test_a_program_that_cannot_be_seen(self) -> None:
        """Whose answers they are is unknown then: exit 0 would not be the truth."""
        self.lab.setting("restart", "main_process", "echo 0")
        run = self.lab.deploy()
        self.assert_sentence(run, 3, ["the service runs in no folder to be seen, not in "])
        self.assert_live("one")

    def test_the_previous_release_is_what_it_was(self) -> None:
        self.sick("three", "four")
        for text in ("three", "four"):
            self.lab.push({"app": text})
            self.assert_failed(self.lab.deploy())
            self.assertEqual(self.lab.linked("previous"), "")

    def test_a_hook_after_the_restart(self) -> None:
        self.lab.setting("restart", "after", "sh -c 'exit 6'")
        self.assert_failed(self.lab.deploy(), "restart", "`sh -c 'exit 6'` ended with status 6")

    def test_the_old_release_does_not_come_back_healthy(self) -> None:
        self.sick("one", "two")
        run = self.lab.deploy()
        self.assert_sentence(run, 3, [f"{self.lab.linked('current')} is live and NOT healthy: 500"])
        self.assertEqual((self.lab.current(), self.lab.results()), ("one", ["live", "failed"]))

    def test_a_mended_push_needs_no_hand(self) -> None:
        self.sick("one", "two")
        self.assert_sentence(self.lab.deploy(), 3, [])
        self.lab.push({"app": "three"})
        self.assert_deployed(self.lab.deploy(), "three")
        self.assert_only_good_releases()


class Workers(LabTest):
    def test_they_restart_after_the_switch_and_on_the_way_back(self) -> None:
        release = '"$(basename "$(readlink "$LAB/checkout/.deploy/current")")"'
        self.lab.script("workers", f'echo {release} >> "$LAB/restarted"')
        self.lab.setting("restart", "after", "workers")
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        live = self.lab.linked("current")
        self.lab.tick()
        (self.lab.root / "sick").write_text("three")
        self.lab.push({"app": "three"})
        self.assert_failed(self.lab.deploy(), live="two")
        self.assertEqual((self.lab.root / "restarted").read_text().split(), [live, live])

    def test_they_are_asked_how_they_are_when_they_have_restarted(self) -> None:
        """Those of the release before may crash again and again: this one is their cure."""
        self.lab.script("workers", 'cp "$LAB/checkout/.deploy/current/app" "$LAB/worker"')
        self.lab.setting("restart", "after", "workers")
        self.lab.setting("status", "checks", f"worker: grep -qx two {self.lab.root}/worker")
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        self.lab.push({"app": "three"})
        self.assert_failed(self.lab.deploy(), "not all is well: worker: ", live="two")


class Hooks(LabTest):
    """A hook that fails is as if its step failed; tests/test_story.py has those before each step."""

    def test_before_and_after_a_step(self) -> None:
        self.lab.push({"app": "two"})
        for hook in ("before", "after"):
            with self.subTest(hook=hook):
                self.lab.setting("services", hook, "sh -c 'exit 6'")
                self.assert_failed(
                    self.lab.deploy(), "services ", "`sh -c 'exit 6'` ended with status 6"
                )
                self.lab.setting("services", hook, "")


class FirstDeploymentFails(LabTest):
    deployed = ()

    def test_before_the_switch(self) -> None:
        self.lab.push({"static": "broken"})
        run = self.lab.deploy()
        self.assert_sentence(run, 1, ["no release is live yet"])
        self.assertEqual(
            (self.lab.linked("current"), self.lab.releases(), self.lab.results()),
            ("", [], ["failed"]),
        )

    def test_after_the_switch_a_human_is_needed(self) -> None:
        (self.lab.root / "sick").write_text("one")
        run = self.lab.deploy()
        self.assert_sentence(run, 3, ["the site is not healthy: 500", "nothing was live before it"])
        self.assertEqual(self.lab.results(), ["failed"])

    def test_after_the_switch_a_mended_push_needs_no_hand(self) -> None:
        (self.lab.root / "sick").write_text("one")
        self.assert_sentence(self.lab.deploy(), 3, [])
        self.lab.push({"app": "two"})
        self.assert_deployed(self.lab.deploy(), "two")
        wait_for(lambda: not self.lab.running(), "all has ended")

    def test_one_that_never_answered_is_not_gone_back_to(self) -> None:
        (self.lab.root / "sick").write_text("one two")
        self.assert_sentence(self.lab.deploy(), 3, [])
        self.lab.push({"app": "two"})
        self.assert_sentence(
            self.lab.deploy(), 3, ["there is no earlier release to go back to", "never was healthy"]
        )
        self.assertEqual((self.lab.workspace / "current" / "app").read_text(), "two")
