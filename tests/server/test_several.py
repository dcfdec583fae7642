"""Two servers behind one nginx and with one database, deployed by the steps of the workflow while users ask."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from pathlib import Path

from tests.must_run import skip
from tests.sandbox import MIGRATION
from tests.server.bench import CLIENT, HOST, PROJECT, Load, Sample, behind, lost, require
from tests.server.machine import dies_with_us, ended, finish, until
from tests.server.network import Network
from tests.server.site import CHECKOUT, REMOTE, SETUP, WORKSPACE, Site, record
from tests.server.test_site import APPLICATION, deploy_only
from tests.workflow import Runner

BALANCER, VISITORS = "10.9.0.1", ("10.9.0.21", "10.9.0.22")
SERVERS = ("10.9.0.2", "10.9.0.3")
URLS = ("/", "/late/", "/ping/")
DATABASE = "/home/ubuntu/database"
NGINX = """\
user www-data;
pid /run/balancer.pid;
error_log /var/log/nginx/balancer.log;
events {}
http { access_log off; include /etc/nginx/balancer.conf; }
"""


class Pair:
    """The two, the network between them, and the way in; the first also has the database, in a folder of its own."""

    def __init__(self, cleanups: contextlib.ExitStack) -> None:
        """Boot them, plug them in, and set each up as an operator would."""
        self.network = Network(*(f"{each}/24" for each in (BALANCER, *VISITORS)))
        cleanups.callback(self.network.close)
        self.sites = self.first, self.second = Site(), Site()
        remote = self.first.folder / "remote"
        remote.mkdir()
        os.chown(remote, 1000, 1000)
        for site, address in zip(self.sites, SERVERS):
            cleanups.callback(site.close)
            site.binds[REMOTE] = remote
            site.boot()
            self.network.plug(site, f"{address}/24")
        self.prepare()
        for running in [site.start_ssh(f"cd {CHECKOUT} && {SETUP}") for site in self.sites]:
            run = running.end()
            assert run.status == 0, run.text
        self.secrets = self.let_in()
        cleanups.enter_context(self.balancer())

    def prepare(self) -> None:
        """Give both a checkout whose settings are those of docs/server.md, and one `.env`; start the database."""
        first, second = self.sites
        first.prepare()
        first.edit("deploy.ini", "command = docker compose up --detach --wait", "command =")
        for name in ("postgresql", "redis"):
            line = next(
                each
                for each in (PROJECT / "deploy.ini").read_text().splitlines(keepends=True)
                if each.startswith(f"    {name}: ")
            )
            first.edit("deploy.ini", line, "")
        shipped = (PROJECT / "nginx/gforms.conf").read_text()
        first.add("nginx/gforms.conf", behind(BALANCER, shipped))
        first.push()
        first.run("git pull --quiet", user="ubuntu", cwd=CHECKOUT)
        env = first.read(f"{CHECKOUT}/.env")
        env = env.replace("=localhost", f"={SERVERS[0]}").replace("//127.0.0.1", f"//{SERVERS[0]}")
        second.run(f"git clone --quiet {REMOTE} {CHECKOUT}", user="ubuntu")
        for site in self.sites:
            site.put(f"{CHECKOUT}/.env", env, user="ubuntu", mode="0600")
        compose = (PROJECT / "docker-compose.yml").read_text()
        assert compose.count("- 127.0.0.1:") == 2
        compose = compose.replace("- 127.0.0.1:", f"- {SERVERS[0]}:")
        first.put(f"{DATABASE}/docker-compose.yml", compose, user="ubuntu")
        first.put(f"{DATABASE}/.env", env, user="ubuntu", mode="0600")
        first.run("docker compose up --detach --wait", cwd=DATABASE, timeout=120)

    def let_in(self) -> dict[str, str]:
        """Make the key that can only deploy, for both; the secrets of the workflow."""
        key = self.first.key(deploy_only())
        line = f"{deploy_only()} {key.with_suffix('.pub').read_text()}"
        add = "umask 077 && mkdir -p ~/.ssh && cat >> ~/.ssh/authorized_keys"
        self.second.run(add, user="ubuntu", stdin=line)
        keys = [site.read("/etc/ssh/ssh_host_ed25519_key.pub") for site in self.sites]
        known = "".join(f"{address} {each}" for address, each in zip(SERVERS, keys))
        return {"AWS_SSH_PRIVATE_KEY": key.read_text(), "AWS_KNOWN_HOSTS": known}

    @contextlib.contextmanager
    def balancer(self) -> Iterator[None]:
        """Run the shipped configuration in the network, with the programs of the first server."""
        text = (PROJECT / "nginx/balancer.conf").read_text()
        for shown, address in zip(("10.0.0.11", "10.0.0.12"), SERVERS):
            assert f"server {shown};" in text
            text = text.replace(f"server {shown};", f"server {address};")
        self.first.put("/etc/nginx/balancer.conf", text)
        self.first.put("/etc/nginx/balancer-main.conf", NGINX)
        command = ["nginx", "-c", "/etc/nginx/balancer-main.conf", "-g", "daemon off;"]
        inside = [
            f"--net={self.network.path}" if word == "--net" else word
            for word in self.first.enter("root")
        ]
        with ended(self.first.spawn(dies_with_us(*inside, *command))):
            until("the balancer answers", 20, lambda: self.ask("/") != 0)
            yield

    # GitHub

    def head(self) -> str:
        """The commit that was pushed last."""
        return self.first.run(
            ["git", "rev-parse", "main"], user="ubuntu", cwd=REMOTE
        ).stdout.strip()

    def workflow(self) -> tuple[list[int], str]:
        """Do as GitHub does with the workflow; the exit status of each step, in their order, and all that was said."""
        with tempfile.TemporaryDirectory() as folder:
            runner = Runner(Path(folder), self.head(), self.network.inside())
            statuses, said, conclusions = list[int](), "", dict[str, str]()

            def step(job: str, name: str, **variables: str) -> int:
                nonlocal said
                done = runner.run(job, name, **variables)
                said += f"{name} {variables.get('SERVER', '')}\n{done.stdout}"
                return done.returncode

            assert step("deploy", "The way in", **self.secrets) == 0, said
            for server in (f"ubuntu@{address}" for address in SERVERS):
                statuses.append(step("deploy", "Deploy", SERVER=server))
                conclusions[server] = "failure" if statuses[-1] else "success"
                if statuses[-1]:
                    runner.note(conclusions)
                    statuses.append(step("rollback", "Roll back"))
                    break
            return statuses, said

    # Users

    def ask(self, path: str, source: str = VISITORS[0], method: str = "GET") -> int:
        """Send one request to the balancer from an address; its status."""
        wish = {"url": f"http://{BALANCER}{path}", "host": HOST, "method": method, "source": source}
        command = self.network.inside(sys.executable, str(CLIENT), "one")
        asked = self.first.spawn(command, stdin=subprocess.PIPE)
        status: int = json.loads(finish(asked, json.dumps(wish), 60, True).stdout)["status"]
        return status

    def load(self, path: str) -> Load:
        """Begin constant load on the balancer."""
        command = dies_with_us(*self.network.inside(sys.executable, str(CLIENT), "load"))
        wish = {"url": f"http://{BALANCER}{path}", "host": HOST, "connections": 2, "pause": 0.1}
        return Load(self.first.spawn(command, stdin=subprocess.PIPE), wish)

    def versions(self) -> list[str]:
        """What is live on each, as a page of it says."""
        for site in self.sites:
            site.await_rest()
        return [site.late() for site in self.sites]


class SeveralTest(unittest.TestCase):
    """However a deployment to both ends, no request is lost, and both have one release then."""

    pair: Pair

    @classmethod
    def setUpClass(cls) -> None:
        """Deploy the first release on one after the other."""
        require()
        if not shutil.which("jq"):
            skip("server", "missing here: jq")
        cleanups = contextlib.ExitStack()
        cls.addClassCleanup(cleanups.close)
        began = time.monotonic()
        cls.pair = Pair(cleanups)
        record(f"two servers: set up in {time.monotonic() - began:.1f} s")
        statuses, said = cls.pair.workflow()
        assert statuses == [0, 0], said
        cls.pair.versions()

    @contextlib.contextmanager
    def under_load(self, name: str, *urls: str) -> Iterator[dict[str, Load]]:
        """Deploy in this block while users ask the balancer: they lose nothing."""
        with contextlib.ExitStack() as stack:
            loads = {url: stack.enter_context(self.pair.load(url)) for url in urls}
            yield loads
            self.pair.versions()
        samples: list[Sample] = [one for load in loads.values() for one in load.samples]
        gone = lost(samples)
        record(f"load: two servers, {name}: {len(samples)} requests sent, {len(gone)} lost")
        self.assertGreater(len(samples), 200)
        self.assertEqual(gone[:3], [], f"{len(gone)} requests were lost")

    def assert_met(self, load: Load, *versions: str) -> None:
        """See that users met these versions, each as a whole, and no other."""
        met = {sample.body for sample in load.samples}
        self.assertEqual(met, {f"{version} {version}" for version in versions})

    def test_a_change_with_a_migration(self) -> None:
        """The first migrates, and the second finds nothing to do; a page of either finds its style sheet meanwhile."""
        pair, old = self.pair, self.pair.first.version()
        style = pair.first.style()
        author = pair.first
        author.edit("formsApp/static/formsApp/style.css", "margin: 0;", "margin: 0; color: navy;")
        author.add("formsApp/migrations/0002_form_open.py", MIGRATION)
        meta = '\n    class Meta:\n        ordering = ["title"]'
        author.edit(
            "formsApp/models.py", meta, f"    open = models.BooleanField(db_default=True)\n{meta}"
        )
        new = author.push()
        with self.under_load("a migration", *URLS, style) as loads:
            statuses, said = pair.workflow()
        self.assertEqual(statuses, [0, 0], said)
        self.assertEqual(pair.versions(), [f"{new} {new}"] * 2, said)
        self.assert_met(loads["/late/"], old, new)
        first, second = said.split(f"Deploy ubuntu@{SERVERS[1]}\n")
        self.assertIn("to be applied: formsApp.0002_form_open\n", first)
        self.assertIn("is live and healthy", first.splitlines()[-1])
        self.assertIn("nothing to migrate\n", second)

    def test_one_that_fails_on_the_second(self) -> None:
        """What it needs is in `.env` of the first only: that one goes back to what was live, without a freeze."""
        pair, old = self.pair, self.pair.first.version()
        releases = [site.current() for site in pair.sites]
        pair.first.run("echo NEEDED=1 >> .env", user="ubuntu", cwd=CHECKOUT)
        pair.first.edit("forms/wsgi.py", APPLICATION, f'os.environ["NEEDED"]\n{APPLICATION}')
        new = pair.first.push()
        self.addCleanup(pair.first.take_back)
        with self.under_load("one that fails on the second", *URLS, pair.first.style()) as loads:
            statuses, said = pair.workflow()
        self.assertEqual(statuses, [0, 1, 0], said)
        self.assertIn("KeyError: 'NEEDED'", said)
        self.assertEqual(pair.versions(), [f"{old} {old}"] * 2, said)
        self.assertEqual([site.current() for site in pair.sites], releases)
        self.assert_met(loads["/late/"], old, new)
        self.assertEqual(
            [site.history()[-1]["command"] for site in pair.sites], ["rollback", "deploy"]
        )
        self.assertNotIn("frozen", pair.first.run(["ls", WORKSPACE]).stdout.split())

    def test_a_page_of_one_finds_its_style_sheet_behind_the_other(self) -> None:
        """While the first has the new release already, nobody misses a file that only it has."""
        folder = f"{WORKSPACE}/current/staticfiles"
        self.pair.first.put(f"{folder}/only.0123456789ab.css", "body {}", user="ubuntu")
        self.assertEqual(self.pair.second.http("/static/only.0123456789ab.css").status, 404)
        met = {self.pair.ask("/static/only.0123456789ab.css") for _ in range(6)}
        self.assertEqual((met, self.pair.ask("/static/none.css")), ({200}, 404))

    def test_each_visitor_has_a_limit_of_his_own(self) -> None:
        """One who tried to log in too often is told so; another one is not."""
        tries = [self.pair.ask("/admin/login/", VISITORS[0], "POST") for _ in range(28)]
        self.assertNotEqual(tries[0], 429)
        self.assertEqual(tries[-1], 429)
        other = {self.pair.ask("/admin/login/", VISITORS[1], "POST") for _ in range(4)}
        self.assertNotIn(429, other)


if __name__ == "__main__":
    unittest.main()
