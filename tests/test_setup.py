"""What `setup` puts in place, and that a failure of any command of it leaves nothing of it behind.

systemd, nginx and sudo are played here by a function; tests/server runs the real ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import unittest
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import deploy
from tests.speaking import speaking

PROJECT = Path(deploy.__file__).parent
OLD_UNIT = "[Service]\nExecStart=/somewhere/gunicorn\n"
NGINX = "http { include mime.types; include /etc/nginx/sites-enabled/*; }\n"
OLD_SITE = "server { listen 80; server_name gforms.example.com; }\n"
OTHER_SITE = "server { listen 80; server_name other.example.com; }\n"


class SetupTest(unittest.TestCase):
    """A server in a folder, on which gunicorn runs in the checkout, or not at all."""

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="setup-"))
        self.addCleanup(shutil.rmtree, self.root)
        self.etc, self.checkout = self.root / "etc", self.root / "home" / "gforms"
        for folder in (
            "systemd/system",
            "nginx/sites-available",
            "nginx/sites-enabled",
            "sudoers.d",
        ):
            (self.etc / folder).mkdir(parents=True)
        self.nginx = self.etc / "nginx"
        (self.nginx / "nginx.conf").write_text(NGINX.replace("/etc", str(self.etc)))
        self.enable("default", "server { listen 80 default_server; }\n")
        self.enable("other", OTHER_SITE)
        self.checkout.mkdir(parents=True)
        for name in ("systemd", "nginx"):
            shutil.copytree(PROJECT / name, self.checkout / name)
        (self.checkout / "deploy.ini").write_text("")
        (self.checkout / ".git").mkdir()
        self.env("ALLOWED_HOSTS=gforms.example.com,www.example.com\n")
        self.commands, self.changed = list[str](), ""
        self.active, self.enabled = set[str](), set[str]()
        self.passable = set[str]()  # the folders that nginx's user got through by an access list
        self.loaded, self.groups = (
            "",
            "adm docker",
        )  # the units that systemd knows, the user's groups
        self.failing = 0  # the number of the command that fails, of those that are not questions
        self.installed = {*deploy.PACKAGES}
        etc = {
            "UNITS": self.etc / "systemd/system",
            "NGINX": self.nginx,
            "SUDOERS": self.etc / "sudoers.d",
        }
        for name, path in etc.items():
            self.enterContext(mock.patch.object(deploy, name, path))
        self.enterContext(mock.patch("os.geteuid", return_value=0))

    def env(self, text: str) -> None:
        (self.checkout / ".env").write_text(text)
        (self.checkout / ".env").chmod(0o600)

    def enable(self, name: str, text: str) -> None:
        """A site of nginx, as Debian has them."""
        (self.nginx / "sites-available" / name).write_text(text)
        (self.nginx / "sites-enabled" / name).symlink_to(f"../sites-available/{name}")

    def run_in_place(self) -> None:
        """gunicorn runs in the checkout, as it did before this tool."""
        (self.etc / "systemd/system/gunicorn.service").write_text(OLD_UNIT)
        self.enable("gforms", OLD_SITE)
        self.active = {"gunicorn"}
        self.load()

    def play(self, argv: Sequence[str], folder: Path, *_: object, **__: object) -> str:
        """Play systemd, apt and git, and fail where this must; files are really moved."""
        failed = deploy.CommandFailed(argv, folder, "ended with status 1", [])
        if (
            not re.match("is-|version|-nG|-x", argv[-2])
            and argv[1:2] != ("compose",)
            and "is-" not in argv[1]
        ):
            self.commands.append(" ".join(argv))
            if len(self.commands) == self.failing:
                raise failed
        units = {word.removesuffix(".service") for word in argv[2:] if not word.startswith("-")}
        if argv[:2] == ("systemctl", "is-active") and not units & self.active:
            raise failed
        if argv[:2] == ("systemctl", "is-enabled") and not units & self.enabled:
            raise failed
        if argv == ("systemctl", "daemon-reload"):
            self.load()
        elif argv[0] == "systemctl":
            self.active |= units if argv[1] in ("start", "restart") else set()
            self.active -= units if argv[1] == "stop" else set()
            self.enabled |= units if argv[1] == "enable" else set()
            self.enabled -= units if argv[1] == "disable" else set()
        elif argv[0] == "runuser" and argv[-1] not in self.passable:
            raise failed
        elif argv[0] == "setfacl":
            self.passable -= {argv[-1]}
            self.passable |= {argv[-1]} if argv[1] == "-m" else set()
        elif argv[0] in ("mv", "ln", "rm") and subprocess.call(argv, stderr=subprocess.DEVNULL):
            raise failed
        return {"id": self.groups}.get(argv[0], self.changed if "status" in argv else "0123456")

    def load(self) -> None:
        """Have systemd read its units."""
        units = sorted((self.etc / "systemd/system").iterdir())
        self.loaded = "".join(
            unit.read_text() for unit in units if unit.suffix in (".service", ".socket")
        )

    def set_up(self, *options: str) -> str:
        """What `setup` says."""
        flags = {option.strip("-").replace("-", "_"): True for option in options}
        with speaking() as said, self.playing() as site:
            self.commands.clear()
            self.assertEqual(deploy.setup(site, **flags), 0)
        return said.getvalue()

    @contextlib.contextmanager
    def playing(self, user: str = "ubuntu") -> Iterator[deploy.Site]:
        """The site, whose commands are played, and whose checkout is this user's."""
        site = deploy.Site(self.checkout / "deploy.ini")
        owner, group = mock.Mock(pw_name=user, pw_gid=50), mock.Mock(gr_name="staff")
        with (
            mock.patch.object(site.commands, "run", self.play),
            mock.patch("shutil.which", self.which),
            mock.patch("pwd.getpwuid", return_value=owner),
            mock.patch("grp.getgrgid", return_value=group),
        ):
            yield site

    def which(self, name: str, path: str = "") -> str | None:
        """The program of this name, if it is installed on the server that is played."""
        return f"/usr/bin/{name}" if name in self.installed else None

    def state(self) -> dict[str, str]:
        """Every file, folder and link of /etc with its rights, and what systemd knows."""
        found = {
            "active": " ".join(sorted(self.active)),
            "enabled": " ".join(sorted(self.enabled)),
            "loaded": self.loaded,
            "passable": " ".join(sorted(self.passable)),
        }
        for path in sorted(self.root.rglob("*")):
            text = (
                os.readlink(path)
                if path.is_symlink()
                else path.read_text()
                if path.is_file()
                else ""
            )
            found[str(path)] = f"{path.lstat().st_mode:o} {text}"
        return found

    def sites(self) -> list[str]:
        return sorted(path.name for path in (self.nginx / "sites-enabled").iterdir())


class NewServerTest(SetupTest):
    def test_units(self) -> None:
        self.set_up()
        for name in ("gunicorn.service", "gunicorn.socket", "system.slice"):
            shipped = (
                (PROJECT / "systemd" / name)
                .read_text()
                .replace("/home/ubuntu/gforms", str(self.checkout))
            )
            wanted = shipped.replace("Group=ubuntu", "Group=staff")
            self.assertEqual((self.etc / "systemd/system" / name).read_text(), wanted)
        placed = self.etc / "systemd/system"
        service, standby = (
            (placed / name).read_text() for name in ("gunicorn.service", "gunicorn-standby.service")
        )
        standby = standby.replace(", stand-by during a restart", "")
        self.assertEqual(service.removeprefix(standby), "[Install]\nWantedBy=multi-user.target\n")
        self.assertNotEqual(service, standby)
        self.assertEqual(self.enabled, {"gunicorn", "gunicorn.socket", "gforms-recover"})
        self.assertEqual(self.active, {"gunicorn.socket"})

    def test_a_unit_with_other_words_in_another_order(self) -> None:
        """Its stand-by differs in what it says of itself, and in that no boot starts it."""
        unit, start = "[Unit]\nDescription=our site{}\n", "[Service]\nExecStart=/x a:application\n"
        install = "[Install]\nWantedBy=multi-user.target\n"
        (self.checkout / "systemd/gunicorn.service").write_text(unit.format("") + install + start)
        self.set_up()
        standby = (self.etc / "systemd/system/gunicorn-standby.service").read_text()
        self.assertEqual(standby, unit.format(", stand-by during a restart") + start)

    def test_site(self) -> None:
        self.set_up()
        self.assertEqual(self.sites(), ["gforms.conf", "other"])
        text = (self.nginx / "sites-enabled/gforms.conf").read_text()
        self.assertIn("    server_name gforms.example.com www.example.com;\n", text)
        self.assertIn(f"alias {self.checkout}/.deploy/current/staticfiles/;", text)
        self.assertNotIn("/home/ubuntu", text)
        self.assertEqual(self.commands[-1], "systemctl reload-or-restart nginx")

    def test_every_file_is_checked_before_anything_reads_it(self) -> None:
        """sudo reads no name that holds a dot, nginx nothing before it is reloaded."""
        self.set_up()
        order = [command for command in self.commands if not command.startswith(("mv ", "ln "))]
        rights = self.etc / "sudoers.d/gforms-deploy.new"
        for command, check in zip(
            order,
            ("systemd-analyze verify ", f"visudo --check --file {rights}", "nginx -t -q"),
            strict=False,
        ):
            self.assertTrue(command.startswith(check), command)
        self.assertEqual(order[3], "systemctl daemon-reload")

    def test_only_the_files_that_are_shipped_are_taken(self) -> None:
        """What a project has for another purpose beside them is its own."""
        for name in ("nginx/nginx.conf", "systemd/other.service"):
            (self.checkout / name).write_text("nothing of ours")
        self.set_up()
        self.assertEqual(self.sites(), ["gforms.conf", "other"])
        self.assertFalse((self.etc / "systemd/system/other.service").exists())

    def test_a_slice_that_the_project_does_not_have(self) -> None:
        """All services of a server are more than this site: it is the operator's to say."""
        (self.checkout / "systemd/system.slice").unlink()
        self.set_up()
        self.assertFalse((self.etc / "systemd/system/system.slice").exists())

    def test_a_shipped_file_that_is_not_there(self) -> None:
        for name in ("nginx/gforms.conf", "systemd/gunicorn.socket"):
            before = self.state()
            (self.checkout / name).rename(self.checkout / "away")
            with self.assertRaisesRegex(deploy.Failure, f"{name} is not there"):
                self.set_up()
            (self.checkout / "away").rename(self.checkout / name)
            self.assertEqual(self.state(), before)

    def test_the_folders_that_the_settings_name(self) -> None:
        """In the units and in nginx's site, whatever the name of the checkout begins with."""
        self.checkout = self.checkout.rename(self.root / "home" / "gforms.2")
        (self.checkout / "deploy.ini").write_text(
            "[deploy]\nproject = server\nworkspace = made/here\nshared = .env server/media/ data/\n"
            "[env]\nfile = server/prod.env\n"
        )
        (self.checkout / "server").mkdir()
        (self.checkout / ".env").rename(self.checkout / "server" / "prod.env")
        self.set_up()
        root, unit = str(self.checkout), self.etc / "systemd/system/gunicorn.service"
        for line in (
            f"WorkingDirectory={root}/made/here/current/server",
            f"ExecStart={root}/made/here/current/server/.venv/bin/gunicorn",
            f"EnvironmentFile={root}/server/prod.env",
            f"ReadWritePaths=-{root}/server/media -{root}/data",
        ):
            self.assertIn(f"\n{line}\n", unit.read_text())
        text = (self.nginx / "sites-enabled/gforms.conf").read_text()
        for folder in ("made/here/maintenance", "made/here/current/staticfiles"):
            self.assertIn(f" {root}/{folder}", text)

    def test_a_database_is_restored_in_the_checkout(self) -> None:
        """Where the script for it lies, though manage.py may lie elsewhere."""
        (self.checkout / "deploy.ini").write_text("[deploy]\nproject = server\n")
        with (
            self.playing() as site,
            mock.patch.object(site.commands, "run", return_value="") as run,
        ):
            site.database.restore("drop", "restored")
        self.assertEqual(run.call_args.args[1], self.checkout)

    def test_another_checkout_that_is_served(self) -> None:
        """Its units are not written over."""
        unit, root = self.etc / "systemd/system/gunicorn.service", self.checkout
        unit.write_text(f"[Service]\nWorkingDirectory={root}2\n")
        before = self.state()
        with self.assertRaisesRegex(
            deploy.Failure, f"{unit} serves another checkout, in {root}2"
        ) as raised:
            self.set_up()
        self.assertIn(f"sudo rm {unit}", raised.exception.remedy)
        self.assertEqual((self.state(), self.commands), (before, []))

    def test_the_groups_of_the_user(self) -> None:
        """One reads nginx's log, one asks Docker."""
        self.groups = "admin dockers"
        self.set_up()
        self.assertEqual(self.commands[0], "usermod --append --groups adm,docker ubuntu")

    def test_it_holds_the_lock(self) -> None:
        held, play = dict[str, str](), self.play

        def look(argv: Sequence[str], *rest: Any, **more: Any) -> str:
            lock = deploy.Lock(self.checkout / ".git")
            held[argv[0]] = lock.holder(deploy.Journal(self.checkout / "journal"))
            return play(argv, *rest, **more)

        with mock.patch.object(self, "play", look):
            self.set_up()
        self.assertEqual(held["nginx"], "a set-up, or a run that has just begun")
        with (
            self.playing() as site,
            site.lock.held(0, site.journal),
            self.assertRaisesRegex(deploy.Failure, "another run holds the lock: ") as raised,
        ):
            self.set_up("--timer")
        self.assertEqual(raised.exception.status, 75)

    def test_packages(self) -> None:
        self.set_up()
        self.assertNotIn("apt-get update", self.commands)
        self.installed -= {"nginx", "docker"}
        self.set_up()
        self.assertIn("apt-get install --yes docker.io nginx", self.commands)
        (self.checkout / "deploy.ini").write_text("[services]\ncommand =\n")
        self.set_up()
        self.assertIn("apt-get install --yes nginx", self.commands)

    def test_workers_that_are_named(self) -> None:
        units = [self.etc / f"systemd/system/{name}.service" for name in ("celery", "celery-beat")]
        self.set_up()
        self.assertEqual([unit for unit in units if unit.exists()], [])
        (self.checkout / "deploy.ini").write_text(
            "[restart]\nafter =\n    sudo -n systemctl restart --no-block celery\n"
            "    sudo -n systemctl restart celery-beat\n"
        )
        self.set_up()
        for unit in units:
            text = unit.read_text()
            self.assertIn(f"WorkingDirectory={self.checkout}/.deploy/current\n", text)
            self.assertNotIn("/home/ubuntu", text)
            self.assertIn(unit.stem, self.enabled)
        rights = (self.etc / "sudoers.d/gforms-deploy").read_text()
        for command in ("restart --no-block celery", "restart celery-beat"):
            self.assertIn(f"systemctl {command}\n", rights)

    def test_rights(self) -> None:
        (self.checkout / "deploy.ini").write_text(
            "[restart]\ncommand =\n    sudo -n systemctl restart a=b*\n    true\n"
            "    sudo -n systemctl\nproxy =\n"
        )
        self.installed.add("systemctl")
        self.set_up()
        file = self.etc / "sudoers.d/gforms-deploy"
        rights = [
            f"ubuntu ALL=(root) NOPASSWD: /usr/bin/systemctl {words}"
            for words in ("restart a\\=b\\*", '""')
        ]
        self.assertEqual(file.read_text().splitlines()[1:], rights)
        self.assertEqual(file.stat().st_mode & 0o777, 0o440)

    def test_the_way_to_the_static_files(self) -> None:
        """nginx passes through a folder that is closed to others, and nobody else does."""
        self.checkout.parent.chmod(0o750)
        self.set_up()
        self.assertEqual(self.passable, {str(self.root), str(self.checkout.parent)})
        self.assertEqual(self.checkout.parent.stat().st_mode & 0o777, 0o750)

    def test_a_second_time(self) -> None:
        self.assertRegex(
            self.set_up(),
            r"(?m)^setup    \d+ changes made; next: log in again, then python3 deploy.py$",
        )
        before = self.state()
        self.assertEqual(self.set_up(), "setup    nothing to change\n")
        self.assertEqual(self.state(), before)

    def test_a_changed_unit_is_kept(self) -> None:
        self.set_up()
        unit = self.etc / "systemd/system/gunicorn.service"
        unit.write_text("edited by hand")
        self.set_up()
        kept = [
            path.read_text()
            for path in unit.parent.iterdir()
            if path.name.startswith(f"{unit.name}.")
        ]
        self.assertEqual(kept, ["edited by hand"])

    def test_what_differs_can_be_asked_without_a_change(self) -> None:
        """Each file that is to be placed says itself whether it is as it should be."""
        self.set_up()
        with self.playing() as site:
            placed = deploy.files_to_place(site, timer=True)
        differing = [each.path.name for each in placed if deploy.text_of(each.path) != each.text]
        self.assertEqual(len(placed), 9)
        self.assertEqual(differing, ["gforms-deploy.service", "gforms-deploy.timer"])

    def test_a_dry_run(self) -> None:
        before = self.state()
        said = self.set_up("--dry-run")
        self.assertEqual(self.state(), before)
        for line in (
            "+ListenStream=127.0.0.1:8000",
            "$ systemctl start gunicorn.socket",
            "changes would be made",
        ):
            self.assertIn(line, said)
        self.assertEqual(said.count("setup    write "), 7, said)

    def test_the_timer_only_when_asked_for(self) -> None:
        self.set_up()
        self.assertFalse((self.etc / "systemd/system/gforms-deploy.timer").exists())
        self.set_up("--timer")
        self.assertIn("gforms-deploy.timer", self.enabled)
        self.assertIn(
            f"WorkingDirectory={self.checkout}\n",
            (self.etc / "systemd/system/gforms-deploy.service").read_text(),
        )
        self.assertEqual(self.set_up(), "setup    nothing to change\n")

    def test_what_certbot_wrote_is_left_alone(self) -> None:
        self.set_up()
        site = self.nginx / "sites-available/gforms.conf"
        site.write_text(f"{site.read_text()}listen 443 ssl; # managed by Certbot\n")
        before = self.state()
        self.assertEqual(self.set_up(), "setup    nothing to change\n")
        self.assertEqual(self.state(), before)
        self.assertEqual(self.drift(), [])

    def test_what_certbot_wrote_lacks_lines(self) -> None:
        """It says which, before anything is touched."""
        self.enable("shop", f"{OLD_SITE} # managed by Certbot\n")
        before = self.state()
        with self.assertRaisesRegex(
            deploy.Failure, r"shop is managed by Certbot, and lacks \d+"
        ) as raised:
            self.set_up()
        self.assertIn("    server 127.0.0.1:8000 fail_timeout=0;", raised.exception.details)
        self.assertNotIn("    listen 80;", raised.exception.details)
        self.assertEqual((self.state(), self.commands), (before, []))

    def drift(self) -> list[str]:
        with self.playing() as site:
            return deploy.drift(site)

    def test_an_owner_without_a_name(self) -> None:
        """In a container, say, where there is no set-up, but a status."""
        unknown = mock.patch("pwd.getpwuid", side_effect=KeyError("no such uid"))
        with self.playing() as site, unknown:
            self.assertEqual(deploy.drift(site), [])

    def test_what_differs_is_named(self) -> None:
        """After a push that changes what set-up places; also where set-up never was."""
        self.assertIn(f"{self.etc}/systemd/system/gunicorn.socket, ", self.drift()[0])
        self.set_up()
        self.assertEqual(self.drift(), [])
        with open(self.checkout / "systemd/gunicorn.socket", "a") as unit:
            unit.write("Backlog=9\n")
        found = f"not as this checkout has them: {self.etc}/systemd/system/gunicorn.socket"
        self.assertEqual(self.drift(), [found])
        with speaking() as said, self.playing() as site:
            run = mock.Mock(site=site, migrated=[], release=mock.Mock(project=self.checkout))
            with mock.patch.object(site, "git", return_value=""):
                deploy.say_changes(run, "before")
        self.assertIn(f"{found}; run: sudo python3 {deploy.SCRIPT} setup\n", said.getvalue())

    def test_a_checkout_of_root(self) -> None:
        for user, words in (
            ("root", "must belong to the user who deploys"),
            ("ubuntu", "names no host"),
        ):
            self.env("ALLOWED_HOSTS=*\n")
            with (
                self.playing(user) as site,
                self.assertRaisesRegex(deploy.Failure, words),
            ):
                deploy.setup(site)


class TakeoverTest(SetupTest):
    def setUp(self) -> None:
        super().setUp()
        self.run_in_place()

    def test_it_goes_on_behind_the_socket_and_becomes_a_release(self) -> None:
        self.set_up()
        order = [
            self.commands.index(each)
            for each in self.commands
            if re.search(
                r"^systemctl (stop gunicorn.socket gunicorn|start)|deploy 0123456"
                r"|reload-or-restart nginx$",
                each,
            )
        ]
        self.assertEqual(
            [self.commands[at].split()[-1] for at in order],
            ["--prove", "gunicorn", "gunicorn.socket", "gunicorn", "600", "nginx"],
        )
        for at in (order[0], order[4]):
            self.assertIn("sudo -Hu ubuntu -- ", self.commands[at])
        self.assertEqual(self.sites(), ["gforms.conf", "other"])

    def test_its_own_unit_starts_it_behind_the_socket(self) -> None:
        unit, seen = self.etc / "systemd/system/gunicorn.service", []
        play = self.play

        def watch(argv: Sequence[str], *rest: Any, **more: Any) -> str:
            if argv == ("systemctl", "start", "gunicorn"):
                seen.append(unit.read_text())
            return play(argv, *rest, **more)

        with mock.patch.object(self, "play", watch):
            self.set_up()
        self.assertEqual(seen, [OLD_UNIT])
        self.assertNotEqual(unit.read_text(), OLD_UNIT)

    def test_what_cannot_be_a_release_is_not_even_touched(self) -> None:
        """It is built, and its candidate answers, before anything of the site is changed."""
        before, self.failing = self.state(), 4
        with self.assertRaises(deploy.CommandFailed):
            self.set_up()
        self.assertTrue(self.commands[-1].endswith("deploy 0123456 --prove"), self.commands)
        self.assertEqual(self.state(), before)

    def test_a_unix_socket(self) -> None:
        """In the unit or in nginx: its address cannot change while the site goes on."""
        unit, site = (
            self.etc / "systemd/system/gunicorn.service",
            self.nginx / "sites-enabled/gforms",
        )
        for path, line in (
            (unit, "--bind unix:/run/gunicorn.sock"),
            (site, "# http://unix:/run/x"),
        ):
            kept = path.read_text()
            path.write_text(f"{kept}{line}\n")
            before = self.state()
            with self.assertRaisesRegex(deploy.Failure, "behind a unix socket") as raised:
                self.set_up()
            self.assertIn("proxy_pass http://127.0.0.1:8000; in nginx", raised.exception.remedy)
            self.assertEqual(self.state(), before)
            path.write_text(kept)

    def test_changes_that_are_in_no_commit(self) -> None:
        self.changed, before = " M forms/settings.py", self.state()
        with self.assertRaisesRegex(deploy.Failure, "forms/settings.py"):
            self.set_up()
        self.assertEqual(self.state(), before)

    def test_a_failure_of_any_command_puts_everything_back(self) -> None:
        before, saved = self.state(), Path(f"{self.root}.saved")
        self.addCleanup(shutil.rmtree, saved)
        shutil.copytree(self.root, saved, symlinks=True)
        self.set_up()
        commands = [*self.commands]
        self.assertGreater(len(commands), 12)
        shutil.rmtree(self.root)
        shutil.copytree(saved, self.root, symlinks=True)
        self.active, self.enabled, self.passable = {"gunicorn"}, set(), set()
        self.load()
        for self.failing, command in enumerate(commands, start=1):
            with self.subTest(command):
                with self.assertRaises(deploy.CommandFailed) as raised:
                    self.set_up()
                self.assertEqual(self.state(), before)
                self.assertIn("put back", raised.exception.live)

    def test_a_signal_puts_everything_back(self) -> None:
        """The commands of the way back run, although they would end with the signal themselves."""
        self.enterContext(mock.patch.multiple(deploy.Signals, received=0, shields=0))
        before, play = self.state(), self.play

        def interrupt(argv: Sequence[str], *rest: Any, **more: Any) -> str:
            deploy.Signals.check()
            said = play(argv, *rest, **more)
            if argv == ("systemctl", "start", "gunicorn.socket"):
                deploy.Signals.keep(signal.SIGINT, None)
            return said

        with (
            mock.patch.object(self, "play", interrupt),
            self.assertRaisesRegex(deploy.Failure, "SIGINT") as raised,
        ):
            self.set_up()
        self.assertEqual(self.state(), before)
        self.assertEqual(raised.exception.status, 128 + signal.SIGINT)
        self.assertIn("put back", raised.exception.live)
