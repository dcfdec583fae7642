"""The fault matrix: python3 -m tests.faults [--seed N] [--runs N] [--only TEXT]

Runs of the tool are killed and signalled at each of their cut points and at random instants, started fifty at once,
and fed with bad input and with secrets; a Markdown table says how many cases there were and what did not hold. Each
case is drawn from the seed, but for the instant at which a process really is when a random signal reaches it.
tests/test_faults.py runs a small part of it with all other tests.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import functools
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import deploy
from tests.lab import Lab, site_port, wait_for, with_setting
from tests.terminal import Terminal, columns
from tests.test_env import Invalid, systemd
from tests.test_health import Server
from tests.test_story import SHM, Cut, Play, Played

Command = Callable[[deploy.Site], int]
NO_SIGNAL = 999
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KNOWN = {0, 1, 2, 3, 75, 77, 78, *(128 + number for number in SIGNALS)}  # statuses of a run


@dataclass
class Row:
    """A line of the table: so many cases of a fault, and what did not hold in which of them."""

    fault: str
    cases: int = 0
    broke: list[str] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""  # why there is no case

    def count(self, case: str, broken: Iterable[object]) -> None:
        """One case more, in which all of this broke."""
        self.cases += 1
        if found := "; ".join(map(str, broken)):
            self.broke.append(f"{case}: {found}")

    def line(self) -> str:
        """The line, in Markdown."""
        held, broke = self.cases - len(self.broke), self.broke[0][:300] if self.broke else "nothing"
        broke = f"skipped: {self.skipped}" if self.skipped else broke
        return f"| {self.fault} | {self.cases} | {held} | {broke} | {self.seconds:.0f} s |"


# ---------------------------------------------------------------------- kills, of commands that are played


class Stage(Play):
    """A play whose runs get real signals, at a cut point or at an instant; it knows restores and a start-over."""

    day = "20261124"  # what the clock says
    fails = 0  # the call of fsync that fails; negative: and all after it
    synced = 0
    greeting = 0  # the signal that meets a new version when it begins

    # a signal, and how many seconds after its start a run gets it
    instant: tuple[int, float] | None = None

    def __init__(self) -> None:
        super().__init__()
        (self.root / "head").write_text("none")
        (self.root / "dump").write_text("the whole database")

    def meanwhile(self, process: int, reading: int) -> None:
        """Send the signal, unless the run has ended by then."""
        if self.instant:
            number, seconds = self.instant
            os.read(reading, 1)  # it has started
            if not select.select([reading], [], [], seconds)[0]:
                os.kill(process, number)

    def status_of(self, command: Command) -> int:
        deploy.Signals.install()
        if self.instant:
            os.write(self.writing, b" ")
            self.instant = None  # it starts only once, even if it starts over
        with (
            mock.patch.object(deploy, "Commands", Actor),
            mock.patch.object(os, "execv", functools.partial(self.start_over, command)),
            mock.patch.object(os, "fsync", self.fsync),
            mock.patch.object(deploy, "clock", functools.partial(self.clock, deploy.clock)),
        ):
            try:
                return super().status_of(command)
            except OSError as error:  # main makes a sentence of it
                (self.root / "said").write_text(deploy.as_failure(error).message())
                return deploy.FAILED

    def clock(self, before: Callable[[str], str], form: str = "") -> str:
        """The time of a clock that was set."""
        return before(form).replace("20261124", self.day)

    def fsync(self, _: int) -> None:
        """As of a disk that may fail."""
        self.synced += 1
        if self.synced == self.fails or 0 < -self.fails <= self.synced:
            (self.root / "failed").touch()
            raise OSError(errno.EIO, "Input/output error")

    def start_over(self, command: Command, *_: object) -> None:
        """What the new version does in the place of this one: it forgets all but the lock."""
        for handler in deploy.log.handlers.copy():
            deploy.log.removeHandler(handler)
            if handler is not deploy.console:
                handler.close()
        deploy.console.label = "deploy"
        deploy.Signals.received, deploy.Signals.shields = self.greeting, 0
        deploy.start_logging()
        status = self.status_of(command)
        os.write(self.writing, str(Actor.cut.passed).encode())
        os._exit(status)


class Actor(Played):
    """Commands whose every effect is whole, whenever they are killed, as those of a real server are."""

    def run(self, argv: Any, folder: Path, *rest: Any, **options: Any) -> str:
        """As Played does, and `git diff`, which writes to a file."""
        words = [word for word in argv if word not in ("-c", "--literal-pathspecs")]
        changed = words[0] == "git" and "diff" in words and "HEAD" in words[-2:-1]
        if changed and words[-1] == "new" != self.text("head") and "--diff-filter=A" not in words:
            os.write(options["stdout"], b"deploy.ini\0")
        return super().run(argv, folder, *rest, **options)

    def play_merge(self, words: list[str], folder: Path) -> None:
        self.write("head", words[-1])

    def play_pipenv(self, words: list[str], folder: Path) -> None:
        act = json.loads(self.text(".deploy/journal.json"))["begun"][-1]
        (self.root / ".deploy" / act["path"]).mkdir(parents=True)

    def play_restore(self, words: list[str], folder: Path) -> str:
        _, act, name = words
        live, new, old = (self.root / f"database{end}" for end in ("", f"-{name}", f"-{name}-old"))
        if act == "load":
            new.write_text("first one")
        elif act == "freeze":
            (self.root / "no-writes").touch()
        elif act == "thaw":
            (self.root / "no-writes").unlink(missing_ok=True)
        elif act == "swap" and new.exists():
            old.write_text(live.read_text())
            new.replace(live)
        elif act == "back" and old.exists():
            old.replace(live)
        elif act == "drop":
            new.unlink(missing_ok=True)
            old.unlink(missing_ok=True)
        return "table 1" if act == "count" else ""


def restore(site: deploy.Site) -> int:
    return deploy.restore_backup(site, site.root / "dump", yes=True)


go_back = functools.partial(deploy.rollback, freeze=False)


class Scene(NamedTuple):
    """A run that is to be killed: what begins, and with what; and which revisions may answer then."""

    name: str
    run: dict[str, Any]
    may: tuple[str, ...] = ("two",)


SCENES = (
    Scene("deploy", {"revision": "three"}, ("two", "three")),
    Scene(
        "deploy, undone after the switch", {"revision": "three", "sick": "three"}, ("two", "three")
    ),
    Scene("deploy, undone before the switch", {"revision": "three", "failing": "static"}),
    Scene("deploy, started over", {"revision": "new"}, ("two", "new")),
    Scene("rollback", {"command": go_back}, ("two", "one")),
    Scene("rollback, frozen", {"command": deploy.rollback}, ("two", "one")),
    Scene("rollback, undone", {"command": go_back, "sick": "one"}, ("two", "one")),
    Scene("restore", {"command": restore}),
    Scene("backup", {"command": deploy.back_up}),
    Scene("restart", {"command": deploy.restart_everything}),
)


@contextlib.contextmanager
def staged() -> Iterator[Stage]:
    """A checkout in which `one` and then `two` were deployed."""
    stage = Stage()
    try:
        for revision in ("one", "two"):
            status, _ = stage.run(revision=revision)
            assert status == 0, (stage.root / "said").read_text()
        yield stage
    finally:
        stage.remove()


def judge(
    row: Row, case: str, stage: Stage, scene: Scene, status: int, number: int, deploys: bool = True
) -> None:
    """Count a run that got a signal, with what did not hold after it; the stage is used up."""
    found = []
    if status not in {-number, 128 + number, 0, 1 if {"sick", "failing"} & scene.run.keys() else 0}:
        found.append(f"the status was {status}")
    if stage.serving() not in scene.may:
        found.append(f"{stage.serving()} answers")
    if status >= 0:
        found += stage.broken(*scene.may)
    if stage.run(deploy.back_up)[0]:
        found.append(f"the next run needs a hand: {(stage.root / 'said').read_text()}")
    found += stage.broken(*scene.may)
    if deploys:
        stage.run(deploy.thaw_deployments)
        if stage.run(revision="four")[0]:
            found.append(f"it does not deploy: {(stage.root / 'said').read_text()}")
        found += stage.broken("four")
    row.count(f"{scene.name}, {case}", found)
    stage.remove()


def rehearse(start: Stage, **run: Any) -> tuple[int, float]:
    """How many cut points a run has, and how many seconds it takes."""
    stage, began = start.copy(), time.monotonic()
    _, count = stage.run(**run)
    seconds = time.monotonic() - began
    stage.remove()
    return count, seconds


def drawn(dice: random.Random, share: float, count: int) -> Iterator[int]:
    """Cut points: all of them, or a share."""
    return (at for at in range(1, count + 1) if dice.random() < share)


def signalled(at: int, number: signal.Signals = signal.SIGKILL) -> Cut:
    """Send a signal to the process that comes to this cut point."""
    return Cut(at, lambda: os.kill(os.getpid(), number))


def at_cut_points(dice: random.Random, row: Row, share: float) -> None:
    """Each signal at every cut point of every scene, or at a share of them."""
    with staged() as start:
        for scene in SCENES:
            count, _ = rehearse(start, **scene.run)
            for number in SIGNALS:
                for at in drawn(dice, share, count):
                    stage, deploys = start.copy(), dice.random() < 0.25
                    status, _ = stage.run(cut=signalled(at, number), **scene.run)
                    judge(row, f"{number.name} at {at}", stage, scene, status, number, deploys)


def in_recovery(dice: random.Random, row: Row, share: float) -> None:
    """SIGKILL at every cut point, and again at every cut point of the run that recovers from it."""
    with staged() as start:
        for scene in SCENES:
            for first in drawn(dice, share, rehearse(start, **scene.run)[0]):
                killed = start.copy()
                killed.run(cut=signalled(first), **scene.run)
                for at in drawn(dice, share, rehearse(killed, command=deploy.back_up)[0]):
                    stage, deploys = killed.copy(), dice.random() < 0.1
                    status, _ = stage.run(deploy.back_up, cut=signalled(at))
                    case = f"at {first}, then at {at} of the recovery"
                    judge(row, case, stage, scene, status, signal.SIGKILL, deploys)
                killed.remove()


def at_random_instants(dice: random.Random, row: Row, count: int) -> None:
    """A signal at a random instant of a random scene: within a write, too."""
    with staged() as start:
        times = {scene.name: rehearse(start, **scene.run)[1] for scene in SCENES}
        for _ in range(count):
            scene, number = dice.choice(SCENES), dice.choice((*SIGNALS, *[signal.SIGKILL] * 4))
            seconds, deploys = dice.uniform(0, times[scene.name]), dice.random() < 0.25
            stage = start.copy()
            stage.instant = number, seconds
            status, _ = stage.run(**scene.run)
            stage.instant = None
            case = f"{number.name} after {seconds * 1000:.1f} ms"
            judge(row, case, stage, scene, status, number, deploys)


# ------------------------------------------------------------------------------- kills, of real processes


def left_in(place: Lab, *texts: str) -> Iterator[str]:
    """What is not right in a lab when no run is at work and none was cut off."""
    try:
        wait_for(lambda: not place.running(), "all has ended", 10)
    except AssertionError:
        yield f"still running: {place.running()}"
    if place.live() != place.current() or place.live() not in texts:
        yield f"{place.live()} answers, {place.current()} is current, it may be {texts}"
    if status := place.git("status", "--porcelain", folder=place.checkout):
        yield f"the checkout is not clean: {status}"
    live = [entry.release for entry in place.entries() if entry.result == "live"]
    there = {path.name for path in (place.workspace / "releases").iterdir()}
    admin = {path.name for path in (place.checkout / ".git" / "worktrees").iterdir()}
    left = {*place.left_over(), *(admin ^ there)}
    names = ("journal*", "candidate*", "*.new", ".*.new", "backups/*.part", "venvs/*/.part")
    left |= {path.name for each in names for path in place.workspace.glob(each)}
    left |= {path.name for path in (place.checkout / ".git").glob("*.lock")}
    left |= {path.name for each in ("database-*", "frozen") for path in place.root.glob(each)}
    if left:
        yield f"left over: {', '.join(left)}"
    if live[-1] != place.linked("current"):
        yield f"the history says that {live[-1]} is live"


def next_run(place: Lab, *words: str) -> list[str]:
    """What did not hold in the run after one that met a fault."""
    run = place.deploy(*words)
    return [f"the next run needs a hand: {run.stdout[-500:]}"] if run.returncode else []


def signal_to(place: Lab, process: subprocess.Popen[str], target: str, number: int) -> None:
    """Send a signal to the tool, to its group, or to everything that it started, too."""
    send = os.killpg if target == "its group" else os.kill
    for each in place.running() if target == "everything" else [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            send(each, number)


def of_real_processes(dice: random.Random, row: Row, count: int) -> None:
    """A signal to the tool, its group, or everything, at a random instant of a real run."""
    with contextlib.closing(Lab(("one", "two"))) as place:
        dump = place.root / "dump"
        commands = {
            "deploy": "deploy",
            "rollback": "rollback --no-freeze",
            "backup": "backup",
            "restore": f"restore {dump} --yes",
            "start-over": "deploy",
        }
        seconds = dict.fromkeys(commands, 1.0)
        tool = (place.author / "deploy.py").read_text()
        for at in range(count):
            name, number = dice.choice(list(commands)), dice.choice(SIGNALS)
            target = dice.choice(("the tool", "its group", "everything"))
            before, text = place.current(), f"text-{at}"
            shutil.copy(place.root / "database", dump)
            more = {"deploy.py": f"{tool}# {at}\n"} if name == "start-over" else {}
            place.push({"app": text, "migrations": f"app.0001_first\napp.{at}\n", **more})
            instant, began = dice.uniform(0, seconds[name]), time.monotonic()
            process = place.start(*commands[name].split())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(instant)
            signal_to(place, process, target, number)
            run = place.end(process)
            if not run.returncode:
                seconds[name] = (seconds[name] + time.monotonic() - began) / 2
            # the first tenth of a second is Python's: it compiles the file, and nothing was begun
            early = run.stdout.startswith("Traceback") and run.returncode == -signal.SIGINT
            traced = re.search(r"(?m)^Traceback", run.stdout) and not early
            found = [run.stdout[-500:]] if traced else []
            fine = {0, -number, 128 + number, *([1] if target == "everything" else [])}
            if run.returncode not in fine:
                found.append(f"the status was {run.returncode}: {run.stdout[-300:]}")
            texts = {before, text, *(place.releases() if name == "rollback" else [])}
            if place.live() not in texts:
                found.append(f"{place.live()} answers")
            found += [*next_run(place, "backup", "--wait", "60"), *left_in(place, *texts)]
            row.count(f"{name}, {number.name} to {target} after {instant:.3f} s", found)


# ---------------------------------------------------------------------------------------- many at once

ALONE = 'mkdir "$LAB/at-work" || touch "$LAB/together"; sleep 0.02; rmdir "$LAB/at-work"'
STARTS = (
    *(["deploy", "--wait", "300"], ["rollback", "--no-freeze", "--wait", "300"], ["deploy"]),
    *(["backup", "--wait", "300"], ["restart", "--wait", "300"], ["--if-changed", "--wait", "300"]),
    *(["status"], ["history"], ["check"], ["logs"], ["rollback"], ["--dry-run"], ["backup"]),
)


def at_once(dice: random.Random, row: Row, count: int) -> None:
    """So many starts of all kinds at once: they take turns, and each tells the truth."""
    with contextlib.closing(Lab(("one", "two"))) as place:
        place.first("services", ALONE)
        place.first("restart", ALONE)
        place.push({"app": "three"})
        before = len(place.history())
        words = [dice.choice(STARTS) for _ in range(count)]
        processes = [place.start(*each) for each in words]
        ended = [place.end(process, 600) for process in processes]
        for each, run in zip(words, ended, strict=True):
            found = [run.stdout[-300:]] if "Traceback" in run.stdout else []
            if run.returncode not in (0, 1, 75, 77):
                found.append(f"the status was {run.returncode}: {run.stdout[-300:]}")
            if run.returncode == 75 and "--wait" in each:
                found.append("it did not get its turn")
            row.count(" ".join(each), found)
        found = ["two were at work at once"] if (place.root / "together").exists() else []
        started = [entry["started"] for entry in place.history()[before:]]
        if len(set(started)) < len(started):
            found.append("two runs have one name")
        place.deploy("thaw")
        found += left_in(place, "one", "two", "three")
        row.count("after all", found)


# ------------------------------------------------------------------------------------ in random sequences

FAULTS = ({"static": "broken"}, {"boot": "broken"}, {"health": "500"}, *[dict[str, str]()] * 6)
SERVED = 'cat docker-compose.yml > "$LAB/served"; ! grep --quiet broken "$LAB/served"'
PASSIVE = ("freeze", "thaw", "check", "status")


class World:
    """A lab in which anything is pushed, and any command is run, beside others and with signals."""

    def __init__(self, dice: random.Random) -> None:
        self.dice, self.lab, self.count = dice, Lab(("one",)), 0
        self.killed = False  # the run before was, and the next one may go back
        self.lab.script("services", SERVED)
        check = f"cache: sh -c '! grep --quiet sickly {self.lab.root}/served'"
        ini = with_setting((self.lab.author / "deploy.ini").read_text(), "status", "checks", check)
        if dice.random() < 0.5:
            three = "\n    true\n    restart\n    true"
            ini = with_setting(ini, "restart", "command", three)
        reverse = dice.choice(("yes", "no"))
        self.ini = with_setting(ini, "migrate", "reverse_on_failure", reverse)
        self.tool = (self.lab.author / "deploy.py").read_text()
        self.migrations, self.compose = ["app.0001_first"], "good"
        first = self.lab.push({"deploy.ini": self.ini, "docker-compose.yml": "good\n", "app": "t0"})
        self.says, self.describes = {first: "t0"}, {first: "good\n"}  # what each revision does
        assert self.lab.deploy().returncode == 0

    def push(self, fault: Mapping[str, str]) -> None:
        """Push a release with a text of its own, and anything else that may be new in one."""
        self.count += 1
        number, dice = self.count, self.dice
        files = {"app": f"t{number}", "static": "", "boot": "", "health": "200", **fault}
        self.migrations = [each for each in self.migrations if "bad" not in each]
        if dice.random() < 0.25:
            kind = dice.choice(("good", "good", "fixed", "remove", "plain", "bad"))
            self.migrations.append(f"app.{number:04}_{kind}")
        if dice.random() < 0.35:
            self.compose = f"{dice.choice(('good', 'good', 'broken', 'sickly'))} {number}"
        files["migrations"] = "\n".join(self.migrations)
        files["docker-compose.yml"] = f"{self.compose}\n"
        for name, text in (("deploy.ini", self.ini), ("deploy.py", self.tool)):
            if dice.random() < 0.1:
                files[name] = f"{text}# {number}\n"
        if dice.random() < 0.15:
            files["Pipfile.lock"] = f'{{"_meta": {{}}, "default": {{}}, "n": {number}}}'
        revision = self.lab.push(files)
        self.says[revision], self.describes[revision] = files["app"], files["docker-compose.yml"]

    def words(self) -> list[str]:
        """Any command line."""
        head, some = self.lab.git("rev-parse", "HEAD"), self.dice.choice(list(self.says))
        release = self.dice.choice(list((self.lab.workspace / "releases").iterdir())).name
        lines = [
            *(["deploy"], ["deploy"], ["deploy"], ["deploy", some], ["deploy", "--at", head]),
            *(["deploy", "--if-changed"], ["deploy", "--prove"], ["rollback"], ["restart"]),
            *(["rollback", "--reverse-migrations"], ["rollback", release], ["backup"]),
            *(["rollback", "--no-freeze"], ["freeze", "x"], ["check"], ["status"]),
        ]
        return self.dice.choice(lines)

    def step(self) -> tuple[str, list[str]]:
        """A few pushes and one command or two: their names, and what did not hold."""
        lab, dice = self.lab, self.dice
        for _ in range(dice.choice((0, 1, 1, 2))):
            self.push(dice.choice(FAULTS))
        if dice.random() < 0.7:
            lab.deploy("thaw")
        words, second = self.words(), [*self.words(), "--wait", "60"]
        before, frozen = lab.current(), (lab.workspace / "frozen").exists()
        number = dice.choice((signal.SIGKILL, signal.SIGTERM, *[None] * 5))
        process = lab.start(*words)
        if number:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.uniform(0.1, 0.6))
            process.send_signal(number)
        alone = number or dice.random() < 0.7 or {words[0], second[0]} & {*PASSIVE}
        runs = [process] if alone else [process, lab.start(*second)]
        ended = [lab.end(each, 120) for each in runs]
        beside = [] if alone else ["beside", *second]
        case = " ".join([*words, *beside, f"{number or ''}"])
        found = [each.stdout[-500:] for each in ended if "Traceback" in each.stdout]
        status = ended[0].returncode
        if status in (-signal.SIGKILL, -signal.SIGTERM):  # the latter before it had begun
            self.killed = True
            lab.await_commands()
        else:
            found += [
                f"{each.returncode}: {each.stdout[-500:]}"
                for each in ended
                if each.returncode in (3, 78)
            ]
            if words[0] not in PASSIVE:
                found += left_in(lab, "one", *self.says.values())
                found += self.judge(words, status, before, frozen) if alone else ()
                self.killed = False
        lab.tick()
        return case, found

    def judge(self, words: list[str], status: int, before: str, frozen: bool) -> Iterator[str]:
        """What is not as the exit status of a single command says."""
        lab, deploys = self.lab, words[0] == "deploy"
        deployed = [
            each for each in lab.entries() if (each.command, each.result) == ("deploy", "live")
        ]
        if (lab.root / "served").read_text() != self.describes[deployed[-1].revision]:
            yield "the services are not those of the last deployment"
        if lab.deploy("status").returncode:
            yield "status says that it is not well"
        if deploys and frozen and not self.killed and status not in (77, 143):
            yield f"frozen, and the status was {status}"
        if status and not self.killed and lab.current() != before:
            yield f"{before} was live, and the status was {status}"
        if not status and words == ["deploy"] and lab.current() != f"t{self.count}":
            yield "0, but it is not live"
        frozen = "--no-freeze" in words or (lab.workspace / "frozen").exists()
        if words[0] == "rollback" and lab.current() != before and not frozen:
            yield "rolled back, and not frozen"


def in_sequences(dice: random.Random, row: Row, count: int) -> None:
    """Pushes, commands and signals in any order, each judged by what the ones before it make true."""
    for _ in range(0, count, 20):
        world = World(dice)
        with contextlib.closing(world.lab):
            for _ in range(min(count, 20)):
                row.count(*world.step())


# ------------------------------------------------------------------------------------------- bad input

NASTY = [
    *("'", '"', "\\", "#", ";", "$", "`", "\t", "\r", "\0", "\x0b", "\x7f", "\u00a0", "\u0085"),
    *("\u2028", "\ufeff", "\ufffe", "\U0001ffff", "é", "€", "\n", "=", ":", "[", "]", "%", " "),
    *("{", "}", "../", "-", "--", "://", "@", "\x1b[2J", "%(x)s", "${X}", "$(id)", "'\"'"),
    *("\ud800", "0", "1e999", "-1", "9" * 30, "NaN", "[deploy]", "[x]", "\n ", "\n\n", "\\\n"),
    *("export ", "٣"),
]
ENV = """# the settings
SECRET_KEY='a $ecret = value # of 1'
DEBUG=False
ALLOWED_HOSTS=gforms.example.com,www.example.com

DEFAULT_DB_PASSWORD="it's so"
DATABASE_URL=postgres://gforms:hunter2@localhost:5432/gforms?x=1
TITLE=größe und länge
"""


def mutated(dice: random.Random, data: bytes) -> bytes:
    """The data with a few changes."""
    for _ in range(dice.choice((1, 1, 2, 3, 6))):
        at = dice.randrange(len(data) + 1)
        to = min(at + dice.choice((0, 0, 1, 2, 9)), len(data))
        piece = dice.choice(NASTY).encode("utf-8", "surrogatepass")
        kind = dice.randrange(8)
        if kind == 6:
            lines = data.split(b"\n")
            lines.insert(dice.randrange(len(lines) + 1), dice.choice(lines))
            data = b"\n".join(lines)
            continue
        if kind == 4:
            piece = b""
        elif kind == 5:
            piece = bytes([dice.randrange(256)])
        elif kind == 7:
            piece, to = piece * dice.choice((2, 50, 2000)), at
        data = data[:at] + piece + data[to:]
    return data


def mutated_text(dice: random.Random, text: str) -> str:
    return os.fsdecode(mutated(dice, text.encode()))


def late(*_: object) -> None:
    raise AssertionError("not done after 10 s")


def survived(act: Callable[[], object], *statuses: int) -> tuple[object, list[str]]:
    """What it gave, if it was accepted; and what broke, if it neither was nor was refused with such a status."""
    signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            return act(), []
    except deploy.Failure as failure:
        return None, [] if failure.status in statuses else [f"status {failure.status}: {failure}"]
    except SystemExit as end:
        return None, [] if end.code in statuses else [f"status {end.code}"]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a traceback for the user
        return None, [f"{type(error).__name__}: {error}"]
    finally:
        signal.alarm(0)


def in_env(dice: random.Random, row: Row, count: int) -> list[bytes]:
    """Mutations of a .env: refused with 78, or read as systemd reads it; those that were accepted."""
    accepted = []
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        path = Path(folder, ".env")
        path.touch(0o600)
        lines = ENV.encode().splitlines(keepends=True)

        def read() -> dict[str, str]:
            values = deploy.read_env(path)
            deploy.Redactor().hide(deploy.secrets_in(values))
            return values

        for _ in range(count):
            data = mutated(dice, b"".join(dice.sample(lines, dice.randrange(1, len(lines)))))
            path.write_bytes(data)
            values, found = survived(read, deploy.MISTAKE)
            if values is not None:
                accepted.append(data)
                try:
                    if systemd(data.decode()) != values:
                        found = ["systemd reads it differently"]
                except Invalid as error:
                    found = [str(error)]
            row.count(repr(data[:200]), found)
    return accepted


def in_settings(dice: random.Random, row: Row, count: int) -> None:
    """Mutations of deploy.ini: read, or refused with 78."""
    shipped = deploy.SCRIPT.with_name("deploy.ini").read_text()
    sections = re.split(r"(?m)^(?=\[)", re.sub(r"(?m)^#.*\n", "", shipped))[1:]
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        path = Path(folder, "deploy.ini")
        for _ in range(count):
            data = mutated(dice, "".join(dice.sample(sections, dice.randrange(1, 4))).encode())
            path.write_bytes(data)
            _, found = survived(lambda: deploy.read_settings(path), deploy.MISTAKE)
            row.count(repr(data[:200]), found)


def in_command_lines(dice: random.Random, row: Row, count: int) -> None:
    """Random command lines: understood, or refused with 2; help is 0."""
    flags = [flag for names, _ in deploy.ARGUMENTS.values() for flag in names]
    words = [*deploy.COMMANDS, *flags, "-c", "--config", "-h", "--help", "--json=x", "--", "60"]
    words += ["--wait=1", "HEAD", "main", "", "2026-12-24 18:00", "abcdef1", "ssh", "on"]
    for _ in range(count):
        line = [dice.choice(words) for _ in range(dice.randrange(6))]
        line = [mutated_text(dice, word) if dice.random() < 0.3 else word for word in line]
        _, found = survived(functools.partial(deploy.parse_arguments, line), 0, deploy.USAGE)
        row.count(repr(line)[:300], found)


def in_names(dice: random.Random, row: Row, count: int, asked: int) -> None:
    """Mutations of the names of releases and logs, and some of revisions, which git is really asked for."""
    with (
        contextlib.closing(Lab(("one", "two"))) as place,
        mock.patch.dict(os.environ, LAB=str(place.root)),
    ):
        site = deploy.Site(place.checkout / "deploy.ini")
        revision, live = place.head(), place.linked("current")
        good = [revision, revision[:7], "main", "HEAD~1", live, live[:16], "v1.0", "origin/main"]
        for at in range(count):
            name = mutated_text(dice, dice.choice(good))
            act: Callable[[], object] = functools.partial(site.releases.to_go_back_to, name)
            if at < asked:
                act = functools.partial(ask_for, site, name)
            elif at % 2:
                act = functools.partial(deploy.show_logs, site, name)
            _, found = survived(act, deploy.FAILED)
            row.count(repr(name[:200]), found)


def ask_for(site: deploy.Site, name: str) -> None:
    """As the step `pull` asks git for a revision."""
    found = site.git.commit(f"refs/deploy/{name}", name)
    deploy.require(
        not found or re.fullmatch("[0-9a-f]{40}", found), f"{found!r} is no hash", "", 99
    )


# --------------------------------------------------------------------------------------------- secrets

LOOKS = (["status"], ["history"], ["logs"], ["check"], ["history", "--json"], ["status", "--json"])
PEM = r"-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\nBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKB\n-----END PRIVATE KEY-----"


def planted(dice: random.Random) -> dict[str, str]:
    """Secrets of every kind, for .env."""
    letters = string.ascii_letters + string.digits
    token = "".join(dice.choices(letters, k=36)) + "7a"
    return {
        "SECRET_KEY": "pä/ss w+ö&r=d# " + "".join(dice.choices(letters + "-_@:", k=20)),
        "API_TOKEN": f"ghp_{token}",
        "PRIVATE_KEY": PEM,
        "DATABASE_URL": f"postgres://gforms:{token[::-1]}@localhost:5432/gforms",
    }


def shapes(secret: str) -> dict[str, str]:
    """How programs show a value."""
    data = secret.encode()
    basic = base64.b64encode(b"user:" + data).decode()
    return {
        "plain": secret,
        "repr": repr(secret),
        "json": json.dumps(secret),
        "url": urllib.parse.quote(secret, safe=""),
        "form": urllib.parse.quote_plus(secret),
        "base64": base64.b64encode(data).decode(),
        "base64 for URLs": base64.urlsafe_b64encode(b"x" + data).decode(),
        "basic authorization": f"Authorization: Basic {basic}",
        "hexadecimal": data.hex(),
        "over lines": secret.replace("\\n", "\n"),
    }


def telling(secret: str) -> set[str]:
    """The texts of which none may be seen: the secret, and what every shape of it has in its middle."""
    data = secret.encode()
    encoded = {base64.b64encode(b"x" * at + data).decode()[4:-4] for at in range(3)}
    parts = PEM.split(r"\n")[1:3] if secret == PEM else ()
    return {secret, *parts, *encoded, data.hex(), urllib.parse.quote(secret, safe="")}


def in_every_shape(dice: random.Random, row: Row) -> None:
    """Each secret in each shape, in the output of a failing command: shown nowhere."""
    with contextlib.closing(Lab()) as place:
        secrets = planted(dice)
        place.env("".join(f"{name}='{value}'\n" for name, value in secrets.items()))
        secrets["DATABASE_URL"] = secrets["DATABASE_URL"].split("@")[0].rpartition(":")[2]
        token = f"ghp_{''.join(dice.choices(string.ascii_letters, k=30))}01"
        place.push({"app": "two"}, f"says {secrets['API_TOKEN']}")
        place.script("services", 'cat "$LAB/text"; echo "$SECRET_KEY" >&2; exit 1')
        cases = {
            (name, shape): text
            for name, value in secrets.items()
            for shape, text in shapes(value).items()
        }
        (place.root / "text").write_text("".join(f"{text}\n" for text in cases.values()))
        titles: set[str] = set()
        process = place.start()
        while process.poll() is None:
            titles.update(place.running().values())
        said = [place.end(process).stdout]
        said += [place.deploy(*words).stdout for words in LOOKS]
        fetch_from(place, f"https://deploy:{token}@127.0.0.1:1/gforms.git")
        said += [place.deploy(words).stdout for words in ("deploy", "check", "--dry-run", "logs")]
        files = [*place.workspace.glob("*.json*"), *(place.workspace / "logs").iterdir()]
        everything = "\n".join([*said, *titles, *(each.read_text() for each in files)])
        for name, shape in cases:
            seen = [each for each in telling(secrets[name]) if each in everything]
            row.count(f"{name}, {shape}", [f"{seen} is shown"] if seen else [])
        row.count("a token in a remote's URL", ["it is shown"] if token in everything else [])


COMMANDS_OF_GITHUB = (
    *("::error::boom", "  ::set-output name=x::y", "::stop-commands::x", "##[error]boom"),
    *("a ##[add-path]/tmp", "\r::error file=a::b", "\x0b::warning::c", "\u2028::error::d"),
    *("\x1b]0;title\x07", "\x1b[2J\x1b[H", "\x9b31m", "\x1b[8mhidden"),
    *("\x08\x08\x08", "\x85::error::e"),
)


def does_something(line: str) -> bool:
    """Whether a line is a command for GitHub's runner, or moves a terminal's cursor."""
    return bool(re.search(r"^\s*::|##\[|[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", line))


def in_output(_: random.Random, row: Row) -> None:
    """Workflow commands of GitHub and terminal escapes, in a commit's message and a command's output, do nothing."""
    with contextlib.closing(Lab()) as place:
        (place.root / "text").write_text("".join(f"{each}\n" for each in COMMANDS_OF_GITHUB))
        place.script("services", 'cat "$LAB/text"; cat "$LAB/text" >&2; exit 1')
        for text in COMMANDS_OF_GITHUB:
            place.push({"app": text}, text)
        said = [place.deploy().stdout]
        place.script("services", 'cat "$LAB/text"')
        said.append(place.deploy().stdout)
        log = max((place.workspace / "logs").iterdir())
        with contextlib.closing(io.StringIO()) as shown, contextlib.redirect_stdout(shown):
            unforeseen(log)
        said += [place.deploy(*words).stdout for words in LOOKS]
        lines = "".join(said).split("\n")
        found = [repr(line[:100]) for line in lines if does_something(line)]
        row.count("in a message and in output", found)
        row.cases += 2 * len(COMMANDS_OF_GITHUB) - 1


def unforeseen(log: Path) -> None:
    """Write an error that nobody foresaw, whose message has lines, to a log."""
    with mock.patch.object(deploy.log, "handlers", []):
        deploy.start_logging(log)
        try:
            raise RuntimeError("\n".join(COMMANDS_OF_GITHUB))
        except RuntimeError as error:
            deploy.as_failure(error)
        for handler in deploy.log.handlers:
            handler.close()


# ---------------------------------------------------------------------------------------- the machine

TRACED = re.compile(r"(?ms)^(?:\| )?(?:Traceback|Exception ignored|Fatal Python|Exception in).*")
NOBODY = 65534
AS_NOBODY = f'set -- setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "$@"'
PRIVATE = "FAULTS_PRIVATE"  # set where what is mounted is seen by nobody else


def of_a_run(place: Lab, process: subprocess.Popen[str]) -> Iterator[str]:
    """What did not hold in a run that met a fault."""
    try:
        run = place.end(process)
    except subprocess.TimeoutExpired:
        yield f"it hangs, with {place.running()}"
        place.kill_all()
        return
    log = ""
    with contextlib.suppress(OSError, ValueError):
        log = max((place.workspace / "logs").glob("*.log")).read_text(errors="replace")
    if traced := TRACED.search(log) or TRACED.search(run.stdout):
        yield f"a traceback: {traced[0][-400:]}"
    if run.returncode not in KNOWN:
        yield f"the status was {run.returncode}: {run.stdout[-300:]}"


def met(
    place: Lab, *words: str, before: str = "", mend: Callable[[], object] = lambda: None
) -> list[str]:
    """What did not hold in a run that met a fault, and in a plain one when that was mended."""
    was, deploys = place.live(), not words or words[0] == "deploy"
    process = place.start(*words, before=before)
    found = list(of_a_run(place, process))
    may = {0: ["two"], 1: [was]}.get(process.returncode, []) if deploys else []
    if place.live() not in (may or ["one", "two"]):
        found.append(f"{place.live()} answers after status {process.returncode}")
    mend()
    return [*found, *next_run(place, "deploy", "--wait", "60"), *left_in(place, "two")]


@contextlib.contextmanager
def fresh(*deployed: str) -> Iterator[Lab]:
    """A lab in which `two`, with a migration, is to be deployed."""
    with contextlib.closing(Lab(deployed or ("one",))) as place:
        place.push({"app": "two", "migrations": "app.0001_first\napp.0002_two\n"})
        yield place


@contextlib.contextmanager
def mounted(place: Lab) -> Iterator[Callable[[str], None]]:
    """The checkout on a file system of its own; what mounts it anew with other options."""

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place.checkout)], check=True)

    kept = place.checkout.rename(place.root / "kept")
    place.checkout.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place.checkout)], check=True)
    try:
        shutil.copytree(kept, place.checkout, symlinks=True, dirs_exist_ok=True)
        yield remount
    finally:
        wait_for(lambda: not place.running(), "all has ended", 10)
        subprocess.run(["umount", str(place.checkout)], check=True)


WHOLE = "rw,size=1g,nr_inodes=1000000"


def used(place: Lab, limit: str) -> int:
    """What is used of the checkout's disk: bytes, or inodes."""
    disk = os.statvfs(place.checkout)
    bytes_used, inodes = (disk.f_blocks - disk.f_bfree) * 4096, disk.f_files - disk.f_ffree
    return bytes_used if limit == "size" else inodes


def on_a_full_disk(dice: random.Random, row: Row, limit: str, count: int) -> None:
    """A disk with so little left, `size` or `nr_inodes`, from nothing to enough."""
    with fresh() as place, mounted(place):
        before = used(place, limit)
        place.deploy()
        most = used(place, limit) - before + (1 << 18 if limit == "size" else 20)
    lefts = sorted({0, 1, 2, *(dice.randrange(most) for _ in range(count))})
    others = ("backup", "restart", "rollback", "status", "history", "check")
    for left, words in [*((left, []) for left in lefts), *((0, [each]) for each in others)]:
        with fresh() as place, mounted(place) as remount:
            remount(f"{limit}={used(place, limit) + left}")
            found = met(place, *words, mend=lambda: remount(WHOLE))
            row.count(f"{' '.join(words)} with {left} left", found)


def on_a_disk_that_is_read_only(_: random.Random, row: Row) -> None:
    """Every command on a file system that was mounted anew, as one with errors is."""
    for words in (*STARTS, ["freeze", "x"], ["thaw"], ["maintenance", "on"], ["restart"]):
        with fresh("one", "two") as place, mounted(place) as remount:
            remount("ro")
            row.count(" ".join(words), met(place, *words, mend=lambda: remount(WHOLE)))


def within_limits(dice: random.Random, row: Row, count: int) -> None:
    """Little memory, few files, small files, few processes: as many as Python itself needs, or more."""
    limits = [
        *(f"ulimit -n {number}" for number in range(4, 17)),
        *(f"ulimit -v {number}" for number in range(36_000, 120_000, 4_000)),
        *(f"trap '' XFSZ; ulimit -f {number}" for number in (*range(12), 20, 50, 100, 300, 400)),
    ]
    if not os.geteuid():
        limits += [f'{AS_NOBODY}\nset -- prlimit --nproc={each} "$@"' for each in range(1, 16)]
    for limit in sorted(dice.sample(limits, min(count, len(limits)))):
        with fresh() as place:
            if "setpriv" in limit:
                belong(place, NOBODY)
            if not place.deploy("--version", before=limit).returncode:
                row.count(limit, met(place, before=limit, mend=lambda: belong(place, 0)))


def belong(place: Lab, user: int) -> None:
    """All of the lab belongs to another user, who may go there."""
    place.root.parent.chmod(0o711)
    for path in (place.root, *place.root.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)


def with_the_clock_set_back(dice: random.Random, row: Row, share: float) -> None:
    """Runs that begin earlier than those before them, some to recover from one that was killed."""
    with staged() as start:
        for scene in SCENES:
            stage = start.copy()
            stage.day = "20200101"
            status, count = stage.run(**scene.run)
            judge(row, "whole", stage, scene, status, 0)
            for at in drawn(dice, share, count):
                stage = start.copy()
                status, _ = stage.run(cut=signalled(at), **scene.run)
                stage.day = "20200101"
                judge(row, f"killed at {at}", stage, scene, status, signal.SIGKILL)


def on_a_disk_that_fails(dice: random.Random, row: Row, share: float) -> None:
    """EIO of each fsync of every run; of it alone, or of all from it on."""
    with staged() as start:
        for scene, sign in itertools.product(SCENES, (1, -1)):
            failed, at = True, 0
            while failed:
                at += 1
                if dice.random() < share:
                    stage = start.copy()
                    stage.fails = sign * at
                    status, _ = stage.run(**scene.run)
                    failed, stage.fails = (stage.root / "failed").exists(), 0
                    # what it could not put right is the next run's, as if it had been killed
                    ended = -NO_SIGNAL if status in (0, 1, 3) else status
                    judge(row, f"fsync {sign * at}", stage, scene, ended, NO_SIGNAL)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def put(path: Path, data: bytes | None) -> None:
    """Put a file in a place, or a folder."""
    remove(path)
    if data is None:
        (path / "within").mkdir(parents=True)
    else:
        path.write_bytes(data)


def seize(path: Path, mode: int, owner: int = -1) -> None:
    """Give a path to somebody, with these rights."""
    if path.exists():
        os.chown(path, owner, owner)
        path.chmod(mode)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": remove,
    "empty": lambda path: put(path, b""),
    "garbage": lambda path: put(path, bytes(range(256)) * 40),
    "a folder": lambda path: put(path, None),
    "of mode 000": lambda path: seize(path, 0),
    "of another owner": lambda path: seize(path, 0o700, 0),
}
OURS = ("journal.json", "journal.new", "candidate", "candidate.sock", "statsd", ".current.new")


def kept_files(place: Lab) -> Iterator[Path]:
    """All that the tool keeps, and what it needs of each release."""
    yield from (place.checkout / ".env", place.checkout / "deploy.ini")
    for path in (place.workspace, *sorted(place.workspace.rglob("*"))):
        parts = path.relative_to(place.workspace).parts
        if parts[:1] != ("releases",) or len(parts) < 3 or parts[2][:2] in (".g", ".v", ".e"):
            yield path
    yield from (place.workspace / name for name in OURS)


def with_a_file_damaged(dice: random.Random, row: Row, count: int) -> None:
    """Each file that is kept, damaged in each way; a command of every kind; then a plain run."""
    with contextlib.closing(Lab()) as place:
        names = [str(path.relative_to(place.checkout)) for path in kept_files(place)]
    cases = [(name, how) for name in dict.fromkeys(names) for how in DAMAGES]
    for name, how in dice.sample(cases, min(count, len(cases))):
        of_nobody = how.startswith("of ")
        if of_nobody and not nobody_may():
            continue
        with fresh() as place:
            path, before = place.checkout / name, AS_NOBODY if of_nobody else ""
            kept = path.read_bytes() if path.is_file() else b""
            if of_nobody:
                belong(place, NOBODY)
            DAMAGES[how](path)
            found: list[str] = []
            for words in ("deploy", "status", "history", "rollback --no-freeze", "check", "backup"):
                found += of_a_run(place, place.start(*words.split(), before=before))
            if of_nobody:
                belong(place, 0)
                seize(path, 0o700)
            elif path.parent == place.checkout and path.name != ".deploy":
                put(path, kept)
                path.chmod(0o600)
            elif how == "a folder" or (path.is_file() and f"{name}/" in "".join(names)):
                remove(path)
            place.push({"app": "three"})
            found += next_run(place)
            if place.live() != "three" or list(place.workspace.glob("journal*")):
                found.append(f"{place.live()} answers; {list(place.workspace.glob('journal*'))}")
            row.count(f"{name} {how}", found)


@functools.cache
def nobody_may() -> bool:
    """Whether there is a user without rights who can run this Python."""
    script = f"{AS_NOBODY}\nset -- sh -c '{sys.executable} -c 0'\n{AS_NOBODY}\nexec \"$@\""
    return not os.geteuid() and not subprocess.run(["sh", "-c", script], check=False).returncode


# ----------------------------------------------------------------------------------------- the others

SLOW = ("install", "services", "static", "migrate", "restart")
SHORT = {"pull": "1", "health": "1", **dict.fromkeys(SLOW, "2")}  # seconds


def fetch_from(place: Lab, url: str) -> None:
    """Have this be the checkout's remote."""
    place.git("remote", "set-url", "origin", url, folder=place.checkout)


def impatient(place: Lab, **health: str) -> None:
    """Have all that is waited for come soon, and what is asked be this."""
    ini = (place.author / "deploy.ini").read_text()
    for section, seconds in SHORT.items():
        ini = with_setting(ini, section, "timeout", seconds)
    for key, value in health.items():
        ini = with_setting(ini, "health", key, value)
    place.push({"deploy.ini": ini})
    place.git("pull", "--quiet", folder=place.checkout)


REMOTES = {
    "is gone": "exit 255",
    "says nothing": ":",
    "hangs": "exec sleep 1000",
    "dies": "kill -9 $$",
    "sends garbage": "head -c 1000000 /dev/urandom",
    "sends text": "yes",
    "sends a byte a second": "while :; do printf 0; sleep 1; done",
    "ends in the middle": 'git upload-pack "$LAB/author" | head -c 700',
}


def with_a_bad_remote(_: random.Random, row: Row) -> None:
    """A remote behind an ssh that does this."""
    for case, does in REMOTES.items():
        for words in ((), ("--if-changed",), ("check",), ("--dry-run",)):
            with fresh() as place:
                impatient(place)
                place.push({"app": "two"})
                place.script("ssh", does)
                fetch_from(place, "ssh://x/gforms")
                mend = functools.partial(fetch_from, place, str(place.author))
                row.count(f"{' '.join(words)} {case}", met(place, *words, mend=mend))


INSTEAD = {
    "hangs": "exec sleep 1000",
    "hangs and ignores SIGTERM": "trap '' TERM; while :; do sleep 1; done",
    "dies": "kill -9 $$",
    "does nothing": "exit 0",
    "fails": "exit 200",
    "says no more": "exec >&- 2>&-; exec sleep 1000",
}
FIRST = {
    "prints 10 MB in a line": "head -c 10000000 /dev/zero | tr '\\0' x",
    "prints 10 MB in lines": "yes a line of its own that is not short | head -c 10000000",
    "prints garbage": "head -c 100000 /dev/urandom",
    "leaves a process": "sleep 3 &",
}
GITS = ("fetch", "merge", "worktree", "diff", "rev-parse", "config", "log")


def with_a_bad_program(dice: random.Random, row: Row, count: int) -> None:
    """Each program of the settings, and git, that does each of these."""
    programs = ("pipenv", "services", "gunicorn", "restart", "../python")
    cases = [(name, does) for name in programs for does in ("is missing", *INSTEAD, *FIRST)]
    cases += [(f"git {name}", does) for name in GITS for does in ("dies", "fails", *FIRST)]
    cases.remove(("restart", "does nothing"))  # what serves can be seen on a server alone
    for name, does in dice.sample(cases, min(count, len(cases))):
        with fresh() as place:
            impatient(place)
            place.push({"Pipfile.lock": '{"_meta": {"requires": {}}, "default": {"x": {}}}'})
            script, _, word = name.partition(" ")
            if word:
                place.script("git", f'exec {shutil.which("git")} "$@"')
            kept = (place.bin / script).read_text()
            if does == "is missing":
                (place.bin / script).unlink()
            elif word:
                text = INSTEAD.get(does) or FIRST[does]
                place.first(script, f'case " $* " in *" {word} "*) {text};; esac')
            elif does in INSTEAD:
                place.script(script, INSTEAD[does])
            else:
                place.first(script, FIRST[does])
            mend = functools.partial(mend_program, place, script, kept)
            row.count(f"{name} {does}", met(place, mend=mend))


def mend_program(place: Lab, script: str, text: str) -> None:
    """Put a program back, and the Python that was copied into environments."""
    place.script(script, text)
    for python in place.workspace.glob("venvs/*/bin/python"):
        shutil.copy(place.root / "python", python)


ANSWERS = ("status/302", "status/404", "drip", "body", "silent", "nothing", "garbage", "torn")
CANDIDATES = {
    "dies after its answer": "os._exit(0)",
    "dies": "os.kill(os.getpid(), 9)",
    "hangs": "time.sleep(1000)",
    "sends a byte a second": "[(connection.sendall(b'H'), time.sleep(1)) for _ in range(1000)]",
    "sends garbage": "connection.sendall(bytes(range(256)) * 9)",
    "redirects": "connection.sendall(b'HTTP/1.1 302 Found\\r\\nLocation: /\\r\\n\\r\\n')",
    "answers without an end": "while True: connection.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n')",
}


def with_a_bad_address(_: random.Random, row: Row) -> None:
    """A site, and a candidate, that answer so."""
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    here = f"127.0.0.1:{server.server_address[1]}"
    urls = [*(f"http://{here}/{each}" for each in ANSWERS), f"https://{here}/"]
    urls += ["http://nowhere.invalid/", "http://127.0.0.1:1/"]
    good = {"url": f"http://127.0.0.1:{site_port()}/", "contains": ""}
    for bad in (*({"url": url} for url in urls), {"contains": "another text"}):
        with fresh() as place:
            impatient(place, **bad)
            found = met(place, mend=functools.partial(impatient, place, **good))
            row.count(" ".join(bad.values()), found)
    for case, does in CANDIDATES.items():
        with fresh() as place:
            impatient(place)
            gunicorn = (place.bin / "gunicorn").read_text()
            call = re.search(r"connection\.sendall.*", gunicorn)
            assert call
            after = f"{call[0]}; {does}" if "after" in case else does
            place.script("gunicorn", gunicorn.replace(call[0], after))
            mend = functools.partial(place.script, "gunicorn", gunicorn)
            row.count(f"a candidate that {case}", met(place, mend=mend))
    server.closing.set()
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------- terminal and ssh

ENVIRONMENTS = (
    *(f"exec {a} {b} {c}" for a in ("", "0<&-") for b in ("", "1>&-") for c in ("", "2>&-")),
    *("exec >/dev/full", "exec >/dev/full 2>&1"),
    *("exec 1</dev/null", "exec 5</dev/null 9</dev/null"),
    *(f"export {each}=" for each in ("LANG=C LC_ALL", "LANG=C; unset LC_ALL LC_CTYPE; export X")),
    "export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii",
    *("unset LANG LC_ALL LC_CTYPE", "export LC_ALL=nonsense", "export LANG=de_DE LC_ALL=de_DE"),
    *("export PYTHONWARNINGS=error PYTHONDEVMODE=1", "export PYTHONOPTIMIZE=2 PYTHONHASHSEED=7"),
    *("unset HOME", "export HOME=/nowhere", "export HOME=", "unset PATH", "export PATH=/nowhere"),
    *("export PATH=", "export TMPDIR=/nowhere", "export COLUMNS=0 LINES=0", "unset TERM USER"),
    'mkdir "$LAB/gone"; cd "$LAB/gone"; rmdir "$LAB/gone"',
    *("umask 077", "umask 000", "umask 777", "trap '' TERM INT HUP PIPE QUIT USR1", "trap '' CHLD"),
    'env -i true; set -- env -i LAB="$LAB" PATH="$LAB/bin" "$@"',
)


def in_odd_environments(dice: random.Random, row: Row, count: int) -> None:
    """A start without what most have; of a deployment, one that starts over, and one that fails."""
    kinds = ("", ", starting over", ", failing")
    cases = [(before, kind) for before in ENVIRONMENTS for kind in kinds]
    for before, kind in dice.sample(cases, min(count, len(cases))):
        with fresh() as place:
            place.push({"app": "two"}, "größe und länge, 値")
            if kind == ", starting over":
                ini = (place.author / "deploy.ini").read_text()
                place.push({"deploy.ini": f"{ini}# anew\n"})
            elif kind:
                place.push({"boot": "broken"})
            mend = functools.partial(place.push, {"boot": ""})
            row.count(f"{before}{kind}", met(place, before=before, mend=mend))
            written = [path for path in place.workspace.rglob("*") if path.stat().st_mode & 0o002]
            row.broke += [f"{before}{kind}: everyone may write {written}"] if written else []


def with_output_cut(_: random.Random, row: Row) -> None:
    """The reader goes after each line, reads late, or stops the tool and lets it go on."""
    with fresh() as place:
        said = place.deploy().stdout.count("\n")
    pipe = 'exec bash -c \'set -o pipefail; then=$1; shift; "$@" 2>&1 | eval "$then"\' bash'
    flood = "yes a line of its own that is not short | head -c 1000000"
    readers = [*(f"head -n {lines}" for lines in range(said + 1)), "(sleep 2; cat)", "exec 0<&-"]
    for reader in readers:
        for name in ("", "restart", "gunicorn"):
            with fresh() as place:
                if name:
                    kept = (place.bin / name).read_text()
                    place.first(name, flood) if name == "restart" else place.script(name, "exit 1")
                mend = functools.partial(place.script, name, kept) if name else (lambda: None)
                found = met(place, before=f'{pipe} "{reader}" "$@"', mend=mend)
                row.count(f"{reader}{name and f', with a bad {name}'}", found)


def with_ctrl_z(dice: random.Random, row: Row, count: int) -> None:
    """Stopped at a random instant, for a moment, as with Ctrl-Z and fg, on a terminal of 20 columns."""
    for _ in range(count):
        with fresh() as place:
            terminal, instant = Terminal(place, columns=20), dice.uniform(0, 0.6)
            with contextlib.suppress(subprocess.TimeoutExpired):
                terminal.process.wait(instant)
            for number in (signal.SIGTSTP, signal.SIGSTOP, signal.SIGCONT):
                terminal.process.send_signal(number)
                time.sleep(0.1)
            status = terminal.end()
            wide = [frame for frame in terminal.frames() if "  " in frame and columns(frame) > 20]
            steps = [frame for frame in wide if re.match(rf"[ ✓✗] (?:{'|'.join(SHORT)})", frame)]
            found = [f"wider than the terminal: {steps}"] if steps else []
            found += [f"the status was {status}: {terminal.raw[-300:]}"] if status else []
            row.count(f"after {instant:.3f} s", [*found, *left_in(place, "two")])


# ------------------------------------------------------------------------------------------- the table


MOUNTING = (on_a_full_disk, on_a_disk_that_is_read_only)


def parts(runs: int) -> dict[str, tuple[Any, ...]]:
    """What makes each row of the table, and its arguments but for dice and row, for about so many kills."""
    inputs, share = runs * 12, 1.0 if runs >= 5000 else 0.1
    return {
        "a signal at every cut point of every run": (at_cut_points, share),
        "SIGKILL, and again in the recovery": (in_recovery, 0.4 if runs >= 5000 else 0.1),
        "a signal at a random instant": (at_random_instants, max(runs - 1600, 50)),
        "a signal to real processes": (of_real_processes, max(runs // 100, 5)),
        "50 starts at once": (at_once, 50),
        "random sequences of pushes, commands and signals": (in_sequences, max(runs // 20, 20)),
        "mutations of `.env`": (in_env, inputs * 9 // 20),
        "mutations of `deploy.ini`": (in_settings, inputs * 5 // 20),
        "mutations of command lines": (in_command_lines, inputs * 4 // 20),
        "mutations of names": (in_names, inputs * 2 // 20, runs // 20),
        "secrets in every shape": (in_every_shape,),
        "commands of GitHub, escapes": (in_output,),
        "no space left": (on_a_full_disk, "size", runs // 50),
        "no inodes left": (on_a_full_disk, "nr_inodes", runs // 100),
        "a read-only disk": (on_a_disk_that_is_read_only,),
        "limits of memory, files, processes": (within_limits, runs // 25),
        "a clock that was set back": (with_the_clock_set_back, share),
        "a disk that fails": (on_a_disk_that_fails, 1.0),
        "a file that is damaged": (with_a_file_damaged, runs // 20),
        "a remote that is gone, hangs, lies": (with_a_bad_remote,),
        "a program that is missing, hangs, dies, lies": (with_a_bad_program, runs // 40),
        "an address that is gone, hangs, lies": (with_a_bad_address,),
        "a start without what most have": (in_odd_environments, runs // 40),
        "output that is cut, or read late": (with_output_cut,),
        "Ctrl-Z, and 20 columns": (with_ctrl_z, runs // 250),
    }


def main() -> int:
    """Print the table; 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=20261124)
    parser.add_argument("--runs", type=int, default=5000, help="kills, about (default: 5000)")
    parser.add_argument("--only", default="", help="the rows whose fault holds this text")
    options = parser.parse_args()
    if not os.geteuid() and shutil.which("unshare") and not os.environ.get(PRIVATE):
        os.environ[PRIVATE] = "yes"
        argv = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", *argv])
    print("| fault | cases | held | what did not | time |\n|---|---|---|---|---|", flush=True)
    rows = []
    for fault, (act, *arguments) in parts(options.runs).items():
        if options.only in fault:
            row, began = Row(fault), time.monotonic()
            if act in MOUNTING and not os.environ.get(PRIVATE):
                row.skipped = "only root can mount what nobody else sees"
            else:
                act(random.Random(f"{options.seed} {fault}"), row, *arguments)
            row.seconds = time.monotonic() - began
            rows.append(row)
            print(row.line(), flush=True)
    for broken in (f"{row.fault}: {each}" for row in rows for each in row.broke):
        print(broken, file=sys.stderr)
    seconds = sum(row.seconds for row in rows)
    print(f"\nSeed {options.seed}, {sum(row.cases for row in rows)} cases, {seconds:.0f} s.")
    return int(any(row.broke for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
