#!/usr/bin/env python3
"""Deploy a Django project on the one server that it runs on.

    python3 deploy.py                 deploy what the remote branch holds
    python3 deploy.py rollback        go back to the release before
    python3 deploy.py --help          everything else

A deployment takes seven steps, then checks the health of the site:

    1 env       read .env into the environment of every later command
    2 pull      git fetch, fast-forward the checkout, check the revision out into its own folder
    3 install   the packages of Pipfile.lock, in an environment that releases with this lock share
    4 services  docker compose: the database and the cache are up and healthy
    5 static    collectstatic, into the candidate's own folder
    6 migrate   if a migration is planned: back the database up, then migrate
    7 restart   prove the candidate on a private socket, switch to it, restart gunicorn
                behind its stand-by

Until the switch nothing live is touched but the database. Whatever may have to be undone is in a
journal before it is done; it is undone when a step fails, or by the next run if this one is killed.

Files: this one and deploy.ini beside it, in the git checkout; all that a deployment makes lies in
.deploy/ there (releases, virtual environments, backups, logs, history.jsonl, journal.json), which
git is told to ignore.

Exit status: 0 done, or nothing to do; 1 failed, and what was live before is live and healthy;
2 usage; 3 failed, and a human is needed; 75 another deployment holds the lock; 77 deployments are
frozen; 78 a mistake in deploy.ini or .env; 128+N ended by signal N, and what was live before still
is.

Contents: signals · the story · errors · settings · .env · log · running commands · lock and
journal · history and releases · git · health check · the project's Django · database · site ·
files of the server · candidate · traffic · what changed · notifications · the run · the steps ·
rolling back · backup and restore · the tables · looking · set-up · command line
"""

from __future__ import annotations

import signal
import sys

if sys.version_info < (3, 11):
    sys.exit("deploy.py needs Python 3.11 or later; this is " + sys.version.split()[0])

# ---------------------------------------------------------------------------------------- signals


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; no `except Exception` takes it for a failure of what it ended."""


class Signals:
    """SIGINT and SIGTERM are kept in mind until the next safe point; SIGHUP changes nothing."""

    received = 0  # the number of the first one
    shields = 0  # while there are any, what must be undone is undone

    @classmethod
    def install(cls) -> None:
        """Handle signals from now on; a lost terminal (SIGHUP) ends neither this nor a child."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, every command seems to end with 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, cls.keep)

    @classmethod
    def keep(cls, number: int, _frame: object) -> None:
        """Only note a signal: an exception raised just anywhere would tear an act from its undo."""
        cls.received = cls.received or number

    @classmethod
    def check(cls) -> None:
        """Raise Interrupted if a signal came: called wherever a run waits, again and again."""
        if cls.received and not cls.shields:
            raise Interrupted(cls.received)


if __name__ == "__main__":  # before the rest is imported: a signal that comes meanwhile is kept
    Signals.install()

import argparse
import base64
import configparser
import contextlib
import difflib
import errno
import fcntl
import functools
import glob
import grp
import hashlib
import inspect
import io
import json
import logging
import math
import os
import pwd
import re
import select
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate, chain, pairwise, takewhile
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar
from unicodedata import east_asian_width
from urllib.parse import quote, quote_plus, unquote

SCRIPT, VERSION = Path(__file__).resolve(), "2.0"
OK, FAILED, USAGE, NEEDS_HUMAN, LOCKED, FROZEN, MISTAKE = 0, 1, 2, 3, 75, 77, 78
T = TypeVar("T")


# -------------------------------------------------------------------------------------- the story


def deploy(
    site: Site,
    revision: str = "",
    at: str | None = None,
    if_changed: bool = False,
    dry_run: bool = False,
    prove: bool = False,
    wait: float = 0,
) -> int:
    """Deploy the remote branch, or a revision."""
    if dry_run:
        return preview(site, revision)
    asked = os.environ.get("SSH_ORIGINAL_COMMAND", "")
    if at == "ssh" and (back := re.match("rollback (.+)", asked)):
        return rollback(site, freeze=False, wait=wait, of=back[1])  # another server failed
    with transaction(site, "deploy", wait, asked=revision, hidden=if_changed) as run:
        frozen = why_frozen(site)  # not before: it may have waited for the end of a rollback
        if not frozen:
            run.at = at
            return take_steps(run, if_changed, prove)
        if if_changed:  # nobody else may be asking while it lasts
            return report_health(run) or FROZEN
    raise Failure(f"deployments are frozen {frozen}", "python3 deploy.py thaw ends that", FROZEN)


def take_steps(run: Run, if_changed: bool, prove: bool) -> int:
    """Take all steps of a deployment; or none, if there must be something new and is not."""
    if if_changed and not has_changed(run):
        return report_health(run)
    for step in run.site.settings.deploy.steps:
        if not prove or step not in ("migrate", "restart"):
            run.step(step)
    if prove:
        prove_candidate(run)
        take_back(run.site)  # its packages stay, for the deployment that follows
    else:
        run.commit("live")
    return OK


def rollback(
    site: Site,
    release: str = "",
    reverse_migrations: bool = False,
    freeze: bool = True,
    wait: float = 0,
    of: str = "",
) -> int:
    """Go back to the newest earlier revision, or to the release named."""
    with transaction(site, "rollback", wait) as run:
        run.work_on(site.releases.to_go_back_to(site.releases.without(of) if of else release))
        bad = site.releases.live_name()
        if run.release.name == bad:
            check_health(site, run.release)
            say(f"{run.release.name} is live already")
            return OK
        compare_schemas(run, reverse_migrations)
        run.step("restart")
        if freeze:  # both or neither, or the next run would deploy that once more
            site.journal.begin("freeze", before=text_of(site.frozen))
            freeze_deployments(site, f"rolled back from {bad}")
        run.commit("live")
    return OK


@contextlib.contextmanager
def transaction(
    site: Site, command: str, wait: float = 0, asked: str = "", hidden: bool = False
) -> Iterator[Run]:
    """One run under the lock: all of what it begins is committed, or taken back."""
    with shielded():  # a version that takes over has something to take back already
        site.prepare()
    console.hidden = hidden
    run = Run(site, command, asked)
    with (
        contextlib.closing(run),  # when the lock is free, it notifies of how it ended
        site.lock.held(wait, site.journal),
        contextlib.closing(site.journal),
    ):
        try:
            run.recover()  # a crash is a failure that the next run handles
            yield run
            site.journal.check_done()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is taken back
            with shielded():
                raise run.fail(error) from None


def take_back(site: Site) -> list[str]:
    """Undo what was begun and not committed, last first; what was done, for the user."""
    told: list[str | None] = []
    last_first = site.journal.begun[::-1]
    # what goes back is asked how it is, and needs its services for that
    for act in sorted(last_first, key=lambda act: act["act"] not in SERVICES):
        try:
            told.append(UNDO[act["act"]](site, act))
        except Exception as error:  # noqa: BLE001 - the other acts are undone all the same
            site.journal.stuck.append(act)
            log.warning(f"{act['act']} was not taken back: {as_failure(error)}")
        site.journal.begun.remove(act)
        with contextlib.suppress(OSError):  # to undo it once more does no harm
            site.journal.save()
    return [each for each in told if each]


# ----------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """No signal ends what is done inside: it takes a moment, and is not left half done."""
    Signals.shields += 1
    try:
        yield
    finally:
        Signals.shields -= 1


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether a condition came true within so many seconds; a signal ends the wait."""
    until = time.monotonic() + seconds
    while not condition():
        Signals.check()
        left = until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, 0.01))
    return True


def pause(seconds: float) -> None:
    """Do nothing for so many seconds, unless a signal comes."""
    wait_until(lambda: False, seconds)


class Failure(Exception):
    """What the user reads as a sentence: what failed, and what to do; details come before it."""

    def __init__(
        self,
        what: str,
        remedy: str = "mend it and push",
        status: int = FAILED,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what, self.remedy, self.status, self.details = what, remedy, status, tuple(details)
        self.live = ""  # what is live now, found out when it is handled

    def message(self) -> str:
        """What failed, with what was added to it on the way."""
        return "; ".join((self.what, *getattr(self, "__notes__", ())))


def require(condition: object, what: str, remedy: str, status: int = FAILED) -> None:
    """Failure with this sentence unless the condition holds."""
    if not condition:
        raise Failure(what, remedy, status)


TAIL = 20  # lines of a failed command's output that are shown again


class CommandFailed(Failure):
    """A command ended with another status than 0, or was ended because its time was up."""

    def __init__(self, argv: Sequence[str], folder: Path, ended: str, tail: Sequence[str]) -> None:
        command = shlex.join(argv)
        said = (line.strip() for line in reversed(tail) if "ResourceWarning: " not in line)
        last = next(filter(None, said), "no output")[:200]
        self.last, self.output = f"{last} ({ended})", "\n".join(tail)
        lines = [f"| {line}" for line in tail[-TAIL:]]
        super().__init__(
            f"`{command}` {ended} ({last})",
            "mend that and run it again",
            details=[f"in {folder}: {command}", f"{ended}; its last lines:", *lines],
        )


# --------------------------------------------------------------------------------------- settings

STEP_NAMES = ("env", "pull", "install", "services", "static", "migrate", "restart")
CommandLines = tuple[tuple[str, ...], ...]
Kind = Callable[[str], T]  # the value of a setting's text; ValueError says what is wrong with it


class Unfit(ValueError, argparse.ArgumentTypeError):
    """What is wrong with the text of a setting, or of an argument: argparse shows the latter."""


def matching(pattern: str, meaning: str, convert: Kind[T]) -> Kind[T]:
    """A kind of setting whose text matches the pattern as a whole."""

    def setting(text: str) -> T:
        if not re.fullmatch(pattern, text):
            raise Unfit(f"{text!r} is not {meaning}")
        return convert(text)

    return setting


def _pairs(pattern: str, meaning: str, convert: Kind[T]) -> Kind[dict[str, T]]:
    """A kind of setting with one `name: value` a line."""
    pair = matching(pattern, meaning, lambda line: line.partition(":"))

    def setting(text: str) -> dict[str, T]:
        found = [pair(line.strip()) for line in text.splitlines() if line.strip()]
        return {name: convert(value.strip()) for name, _, value in found}

    return setting


def _command_lines(text: str) -> CommandLines:
    """One command a line, each split as a shell would split it, never given to a shell."""
    try:
        return tuple(tuple(shlex.split(line)) for line in text.splitlines() if line.strip())
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {str(error).lower()}") from None


def _step_order(text: str) -> tuple[str, ...]:
    steps = tuple(text.split())
    for step in (each for each in steps if each not in STEP_NAMES):
        raise ValueError(f"{step!r} is not a step{nearest(step, STEP_NAMES)}")
    if steps[:2] != ("env", "pull") or steps[-1] != "restart" or len(set(steps)) < len(steps):
        raise ValueError("must begin with env and pull, end with restart, and name no step twice")
    return steps


def _shared_paths(text: str) -> tuple[str, ...]:
    return tuple(map(_path_below, text.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the known name that is nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


INSIDE = r"(?!/)(?!(.*/)?\.\.(/|$)).+"
_path_inside = matching(INSIDE, "a path inside the checkout", str)
_path_below = matching(rf"(?!\.?/*$){INSIDE}", "a path below the checkout", str)
_positive_number = matching(r"0*[1-9]\d{0,8}", "a whole number of 1 or more", int)
_whole_number = matching(r"\d{1,9}", "a whole number", int)
_duration = matching(
    r"\d{0,8}[1-9]\d{0,8}(\.\d+)?|\d{1,9}\.\d*[1-9]\d*",
    "a number of seconds, as in 30 or 2.5",
    float,
)


_yes_or_no = matching("yes|no", "yes or no", lambda text: text == "yes")


def _option(kind: Kind[T], default: str) -> T:
    """A key of deploy.ini: its kind, and its default as the shipped file shows it."""
    return field(default_factory=lambda: kind(default), metadata={"kind": kind, "default": default})


@dataclass(frozen=True)
class Step:
    """The section of a step: the operator's own commands before and after it."""

    before: CommandLines = _option(_command_lines, "")
    after: CommandLines = _option(_command_lines, "")


@dataclass(frozen=True)
class DeploySection:
    steps: tuple[str, ...] = _option(_step_order, " ".join(STEP_NAMES))
    workspace: str = _option(_path_below, ".deploy")
    project: str = _option(_path_inside, ".")
    shared: tuple[str, ...] = _option(_shared_paths, ".env logs/ media/")
    keep_releases: int = _option(_positive_number, "5")
    keep_logs: int = _option(_positive_number, "100")


@dataclass(frozen=True)
class EnvSection(Step):
    file: str = _option(_path_below, ".env")


@dataclass(frozen=True)
class PullSection(Step):
    remote: str = _option(str, "origin")
    branch: str = _option(str, "main")
    timeout: float = _option(_duration, "120")
    retries: int = _option(_whole_number, "2")


@dataclass(frozen=True)
class InstallSection(Step):
    lock: str = _option(_path_below, "Pipfile.lock")
    python: str = _option(str, "")
    command: CommandLines = _option(_command_lines, "pipenv install --deploy")
    timeout: float = _option(_duration, "900")


@dataclass(frozen=True)
class ServicesSection(Step):
    command: CommandLines = _option(_command_lines, "docker compose up --detach --wait")
    timeout: float = _option(_duration, "300")


@dataclass(frozen=True)
class StaticSection(Step):
    command: CommandLines = _option(_command_lines, "python manage.py collectstatic --noinput")
    timeout: float = _option(_duration, "300")


@dataclass(frozen=True)
class MigrateSection(Step):
    shell: CommandLines = _option(_command_lines, "python manage.py shell --verbosity 0")
    command: CommandLines = _option(_command_lines, "python manage.py migrate --noinput")
    lock_timeout: float = _option(_duration, "0.5")
    incompatible: str = _option(matching("tell|refuse", "tell or refuse", str), "tell")
    rehearse: bool = _option(_yes_or_no, "no")
    reverse_on_failure: bool = _option(_yes_or_no, "no")
    timeout: float = _option(_duration, "3600")


@dataclass(frozen=True)
class RestartSection(Step):
    candidate: CommandLines = _option(
        _command_lines, "gunicorn --workers 1 --name candidate --bind unix:{socket}"
    )
    command: CommandLines = _option(
        _command_lines,
        "sudo -n systemctl restart gunicorn-standby\n"
        "sudo -n systemctl restart gunicorn\n"
        "sudo -n systemctl stop --no-block gunicorn-standby",
    )
    bake: float = _option(
        matching(r"\d{1,9}(\.\d+)?", "a number of seconds, as in 30, or 0", float), "5"
    )
    main_process: CommandLines = _option(
        _command_lines, "systemctl show --property MainPID --value gunicorn"
    )
    proxy: CommandLines = _option(
        _command_lines, "sudo -n nginx -t\nsudo -n systemctl reload-or-restart nginx"
    )
    timeout: float = _option(_duration, "120")

    def sudo(self, *options: str) -> list[tuple[str, ...]]:
        """The commands that run with sudo, and need a right to."""
        lines = self.before + self.command + self.after + self.proxy
        return [("sudo", "-n", *options, *argv[2:]) for argv in lines if argv[:2] == ("sudo", "-n")]


@dataclass(frozen=True)
class HealthSection:
    url: str = _option(
        matching(r"(https?://[^/\s]+(/\S*)?)?", "a URL, as in http://127.0.0.1:8000/", str),
        "http://127.0.0.1:8000/admin/login/",
    )
    host: str = _option(str, "")
    headers: dict[str, str] = _option(
        _pairs(r"[\w-]+:.*", "a header, as in X-Forwarded-Proto: https", str),
        "X-Forwarded-Proto: https",
    )
    expect: int = _option(matching(r"[1-5]\d\d", "an HTTP status, as in 200", int), "200")
    contains: str = _option(str, "")
    timeout: float = _option(_duration, "5")
    deadline: float = _option(_duration, "30")
    rehearse: int = _option(_whole_number, "20")
    log: str = _option(str, "/var/log/nginx/access.log")


@dataclass(frozen=True)
class StatusSection:
    checks: dict[str, CommandLines] = _option(
        _pairs(
            r"[\w-]+:\s*\S.*",
            "a name and its command, as in nginx: systemctl is-active nginx",
            _command_lines,
        ),
        "gunicorn: systemctl is-active gunicorn\n"
        "nginx: systemctl is-active nginx\n"
        "postgresql: docker exec postgresql pg_isready --host 127.0.0.1\n"
        "redis: docker exec redis redis-cli --user default -e ping\n"
        "database: python manage.py shell -v0 -c "
        "'import gc; from django.db import connection as c; c.connect(); gc.freeze()'",
    )
    timeout: float = _option(_duration, "20")


@dataclass(frozen=True)
class CheckSection:
    command: CommandLines = _option(
        _command_lines, "python manage.py check --deploy --fail-level WARNING"
    )
    timeout: float = _option(_duration, "60")


@dataclass(frozen=True)
class BackupSection:
    command: CommandLines = _option(_command_lines, "sh postgresql/restore.sh dump --compress=zstd")
    verify: CommandLines = _option(
        _command_lines, "docker exec -i postgresql pg_restore --file=/dev/null"
    )
    timeout: float = _option(_duration, "1800")
    keep: int = _option(_positive_number, "10")
    after: CommandLines = _option(_command_lines, "")


@dataclass(frozen=True)
class RestoreSection:
    command: CommandLines = _option(_command_lines, "sh postgresql/restore.sh {act} {database}")
    timeout: float = _option(_duration, "7200")


@dataclass(frozen=True)
class NotifySection:
    on: str = _option(
        matching("failure|recovery|always", "one of failure, recovery and always", str), "failure"
    )
    webhook: str = _option(
        matching(r"([A-Za-z_]\w*)?", "the name of a variable in .env, which holds the URL", str),
        "",
    )
    command: CommandLines = _option(_command_lines, "")
    timeout: float = _option(_duration, "5")
    journal: str = _option(str, "/run/systemd/journal/socket")


@dataclass(frozen=True)
class Settings:
    """What deploy.ini says, a field a section."""

    deploy: DeploySection = field(default_factory=DeploySection)
    env: EnvSection = field(default_factory=EnvSection)
    pull: PullSection = field(default_factory=PullSection)
    install: InstallSection = field(default_factory=InstallSection)
    services: ServicesSection = field(default_factory=ServicesSection)
    static: StaticSection = field(default_factory=StaticSection)
    migrate: MigrateSection = field(default_factory=MigrateSection)
    restart: RestartSection = field(default_factory=RestartSection)
    health: HealthSection = field(default_factory=HealthSection)
    status: StatusSection = field(default_factory=StatusSection)
    check: CheckSection = field(default_factory=CheckSection)
    backup: BackupSection = field(default_factory=BackupSection)
    restore: RestoreSection = field(default_factory=RestoreSection)
    notify: NotifySection = field(default_factory=NotifySection)

    def step_commands(self) -> list[tuple[str, ...]]:
        """The commands of all steps."""
        steps = (self.install, self.services, self.static, self.migrate, self.restart)
        return [argv for step in steps for argv in step.command]

    def static_follows_services(self) -> bool:
        """Whether nothing stands between the two, and Django's shell tells how the second ended."""
        ordered = ("services", "static") in pairwise(self.deploy.steps)
        between = self.services.after or self.static.before
        return ordered and not between and bool(self.inside_shell(self.static.command))

    def inside_shell(self, command: CommandLines) -> list[list[str]]:
        """What manage.py gets of commands that can all run in [migrate] shell, or nothing."""
        ours = all(argv[:2] == ("python", "manage.py") for argv in command)
        return [[*argv[2:]] for argv in command if ours and self.migrate.shell]


SECTIONS: dict[str, Any] = {each.name: each.default_factory for each in fields(Settings)}


def read_settings(path: Path) -> Settings:
    """The settings of a file; the Failure lists every mistake of the file with its line."""
    mistakes: list[tuple[int, str]] = []
    chosen: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for at, section, key, text in _parse_ini(path, mistakes):
        kinds = {each.name: each.metadata["kind"] for each in fields(SECTIONS[section])}
        try:
            if key not in kinds:
                raise ValueError(f"is not a key{nearest(key, kinds)}")
            if key in chosen[section]:
                raise ValueError("is set twice")
            chosen[section][key] = None  # it is there, even if what it says is a mistake
            chosen[section][key] = kinds[key](text)
        except ValueError as error:
            mistakes.append((at, f"[{section}] {key} {error}"))
    refuse(path, mistakes)
    return Settings(**{section: SECTIONS[section](**chosen[section]) for section in SECTIONS})


def _parse_ini(path: Path, mistakes: list[tuple[int, str]]) -> Iterator[tuple[int, str, str, str]]:
    """The line, section, key and text of each setting, one that is set twice two times."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        unread = deque(lines)
        setattr(  # noqa: B010 - as documented: it sees each key when its line has been read
            parser, "optionxform", lambda key: f"{len(lines) - len(unread)} {key.lower()}"
        )
        parser.read_file(unread.popleft() for _ in lines)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8")
        remedy = "name the settings file with -c"
        raise Failure(f"{path} cannot be read: {reason}", remedy, MISTAKE) from None
    except configparser.MissingSectionHeaderError as error:
        mistakes.append((error.lineno, "stands before the first [section]"))
    except configparser.ParsingError as error:
        mistakes += [(line, "neither a [section] nor a key = value") for line, _ in error.errors]
    for name in parser.sections():
        if name in SECTIONS:
            for key, text in parser.items(name):
                line, _, key = key.partition(" ")
                yield int(line), name, key, text.strip()
        else:
            headers = (
                at for at, line in enumerate(lines, 1) if line.lstrip().startswith(f"[{name}]")
            )
            mistakes.append((next(headers), f"[{name}] is not a section{nearest(name, SECTIONS)}"))


def refuse(path: Path, mistakes: Iterable[tuple[int, str]]) -> None:
    """Failure with all mistakes of a file, each with its line, if there are any."""
    details = [f"{path}, line {at}: {what}" for at, what in sorted(mistakes)]
    if details:
        what = f"{path} has {plural(len(details), 'mistake')}"
        raise Failure(what, "mend the lines named above", MISTAKE, details)


def plural(number: int, noun: str) -> str:
    """`1 mistake`, `2 mistakes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ------------------------------------------------------------------------------------------- .env

NONCHARACTERS = "".join(
    chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF)
)
# What systemd and Compose read differently, or nobody could mean, with the way to write it.
REFUSED_LINES = (
    (r".*[\udc80-\udcff].*", "is not UTF-8: save the file as UTF-8"),
    (r"\ufeff.*", "begins with a byte order mark: save the file as UTF-8 without one"),
    (r".*\r", "ends as Windows ends lines: sed -i 's/\\r$//' on the file mends all of them"),
    (r"#.*\\", "a comment that ends with \\ hides the next line from systemd: remove the \\"),
    (
        r"(?!#|[A-Za-z_]\w*=| *$).*",
        "is not NAME=value: no space before the name or around =, no export, no colon",
    ),
    (
        rf".*[\x00-\x1f\x7f\ufdd0-\ufdef{NONCHARACTERS}].*",
        "holds a control character: a value is one line of text",
    ),
)
REFUSED_VALUES = (
    (
        r"'(?![^']*'$).*|\"(?![^\"]*\"$).*",
        "must end with the quote that it begins with, and hold no other {quote}",
    ),
    (r"(?!').*[$\\].*", "holds $ or \\, which its readers read differently: write {name}='…'"),
    (r".*\\'?", "ends with \\, which its readers read differently: no way of writing it is safe"),
    (
        r"(?!['\"]).*['\"].*|#.*|(?!['\"]).*\s#.*",
        "holds a quote or a #: write {name}='…', or {name}=\"…\" when it holds a '",
    ),
    (r"\s.*|.*\s", "begins or ends with a space: remove it, or write {name}='…'"),
)


def read_env(path: Path) -> dict[str, str]:
    """The variables of a `.env`; the Failure names each line that is not read alike by all."""
    try:
        mode, text = path.stat().st_mode, path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        remedy = "write it, one NAME=value a line, and chmod 600 it"
        raise Failure(f"{path} cannot be read: {error.strerror}", remedy, MISTAKE) from None
    require(
        not mode & 0o007,
        f"{path} holds secrets, and everyone on this machine may read it",
        f"chmod 600 {path}",
        MISTAKE,
    )
    values: dict[str, str] = {}
    mistakes = []
    for at, line in enumerate(text.split("\n"), start=1):
        try:
            read_assignment(line, values)
        except ValueError as error:
            mistakes.append((at, str(error)))
    refuse(path, mistakes)
    return values


def read_assignment(line: str, values: dict[str, str]) -> None:
    """Add the variable of a line of `.env` to the values; ValueError says how to write it."""
    for pattern, advice in REFUSED_LINES:
        if re.fullmatch(pattern, line, re.ASCII | re.DOTALL):
            raise ValueError(advice)
    name, assigned, raw = line.partition("=")
    if line.startswith("#") or not assigned:
        return
    if name in values:
        raise ValueError(f"{name} is set a second time: remove one of the two lines")
    values[name] = raw[1:-1] if raw[:1] in ("'", '"') else raw
    for pattern, advice in REFUSED_VALUES:
        if re.fullmatch(pattern, raw, re.DOTALL):
            raise ValueError(f"{name} {advice.format(name=name, quote=raw[0])}")


SECRET_NAMES = re.compile(
    r"SECRET|PASS|PWD|\bPW\b|_PW\b|TOKEN|KEY|CREDENTIAL|PRIVATE|SALT|DSN|HOOK|AUTH", re.IGNORECASE
)
RANDOM_LOOK = re.compile(r"(?=.*\d)(?=.*[A-Za-z])(?!/|.*://).{16,}")
NOT_SECRET = {"", "true", "false", "yes", "no", "on", "off", "none", "0", "1"}


def secrets_in(variables: Mapping[str, str]) -> set[str]:
    """What must never be shown: values that are named or look like secrets, and those in URLs."""
    found = set()
    for name, value in variables.items():
        if SECRET_NAMES.search(name) or RANDOM_LOOK.fullmatch(value):
            found |= {value, re.sub(r"^\w+://[^/]*/?", "", value)}  # the path of a webhook
            found |= {line for line in value.split("\\n") if len(line) > 15}  # of a key in a file
        found |= secrets_in_url(value)
    return {each for each in found if each.lower() not in NOT_SECRET}


def secrets_in_url(text: str) -> set[str]:
    """The password of a URL (up to the last @) or of pairs, a token as its user, its query."""
    # up to the last @; where several URLs are joined without a space, of each of them, too
    ends = (r"://(\S*)@", r"://((?:(?!://)\S)*)@")
    logins = [login.partition(":") for end in ends for login in re.findall(end, text)]
    found = {
        *(password or user for user, _, password in logins if password or len(user) > 11),
        *(user for user, _, _ in logins if RANDOM_LOOK.fullmatch(user)),
        *re.findall(r"[?&][^=&\s]+=([^&#\s]{6,})", text),
        *re.findall(r"(?i)(?:key|pass\w*|pwd|secret|token)=([^;&\s]{6,})", text),
    }
    return found | set(map(unquote, found))


# what moves a cursor, and the ##[ by which GitHub's runner knows a command anywhere in a line
CONTROL = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f\u2028\u2029]|##(?=\[)")


@dataclass
class Redactor:
    """Replaces secrets in all that is said, also as Python, JSON, a URL or a shell quotes them."""

    forms: set[bytes] = field(default_factory=set)
    pattern: re.Pattern[bytes] = re.compile(rb"(?!)")

    def hide(self, secrets: Iterable[str]) -> None:
        """Replace these from now on, too."""
        for secret in set(secrets) - {""}:
            self.forms |= _quoted_forms(secret)
        # a short one could be a part of any word; what is escaped before it is none
        alone = rb"(?:(?<!\w)|(?<=\\[bnrt])|(?<=%%[0-9A-F]{2}))%s(?!\w)"
        patterns = [
            (b"%s" if len(form) > 8 else alone) % re.escape(form)
            for form in sorted(self.forms, key=len, reverse=True)
        ]
        self.pattern = re.compile(b"|".join(patterns) or rb"(?!)")

    def mask(self, text: str) -> str:
        """The text without its secrets."""
        return self.pattern.sub(b"***", text.encode("utf-8", "replace")).decode()


def _quoted_forms(secret: str) -> set[bytes]:
    forms = {
        secret,
        repr(secret)[1:-1],
        ascii(secret)[1:-1],
        repr(secret.encode("utf-8", "replace"))[2:-1],
        shlex.quote(" " + secret)[2:-1],
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        json.dumps(secret)[1:-1].replace("/", r"\/"),
        json.dumps(secret)[1:-1].translate({ord(each): f"\\u{ord(each):04x}" for each in "&<>"}),
        re.sub(r"([] '\"\\|&;()<>!{}*[?^$`,])", r"\\\1", secret),  # bash's printf %q
        quote(secret, errors="replace"),
        quote(secret, safe="", errors="replace"),
        quote_plus(secret, errors="replace"),
        secret.encode("utf-8", "replace").hex(),
    }
    shown = forms | {CONTROL.sub(" ", form) for form in forms}
    encoded = {form.encode("utf-8", "replace") for form in shown}
    return encoded | _in_base64(secret.encode("utf-8", "replace"))


def _in_base64(secret: bytes) -> set[bytes]:
    """What base64 makes of it, wherever it begins, without what is its neighbours' as well."""
    return {
        base64.b64encode(bytes(at) + secret, letters)[-(-at * 4 // 3) : (at + len(secret)) * 4 // 3]
        for at in range(3)
        for letters in (b"+/", b"-_")
        if len(secret) > 5  # what any word could hold is no trace of it
    }


redactor = Redactor()


# -------------------------------------------------------------------------------------------- log

log = logging.getLogger("deploy")  # DEBUG: the log file alone; INFO: a command's line, in passing
NOTICE = logging.INFO + 5  # what the tool itself says
MARKS = {logging.WARNING: "warning: ", logging.ERROR: "FAILED: "}
WIDTH = 4000  # characters of one line on stdout; ssh-action stops reading at 65,536
COLOURS = {"✓": 32, "✗": 31, "FAILED:": 31, "warning:": 33}
STAMP, MOMENT = "%Y%m%dT%H%M%SZ", "%Y-%m-%d %H:%M:%S UTC"
RUN = "[0-9]" * 8 + "T" + "[0-9]" * 6 + "Z"  # what a STAMP looks like, in the names of files


def say(text: str, step: str = "") -> None:
    """Say something to the user, in the name of the step that runs or of another."""
    log.log(NOTICE, text, extra={"step": step} if step else None)


def clock(form: str = MOMENT) -> str:
    """The time now, in UTC."""
    return time.strftime(form, time.gmtime())


def clean(text: str) -> str:
    """The text as one line that moves no cursor, without its secrets."""
    return redactor.mask(CONTROL.sub(" ", text))


def fit(text: str, width: int) -> str:
    """The text cut to so many columns of a terminal."""
    ends = accumulate(2 if east_asian_width(letter) in "WF" else 1 for letter in text[: width + 1])
    kept = sum(end <= width for end in ends)
    return text if kept == len(text) else text[: max(kept - 1, 0)] + "…"


class OneLine(logging.Formatter):
    """A record as a line that begins with its step, and its traceback; both without secrets."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and the lines of its traceback if it has one."""
        text = MARKS.get(record.levelno, "") + CONTROL.sub(" ", record.getMessage())
        changed = {"msg": text, "args": (), "step": vars(record).get("step") or console.label}
        lines = super().format(logging.makeLogRecord({**vars(record), **changed})).split("\n")
        return redactor.mask("\n| ".join(CONTROL.sub(" ", line) for line in lines))


class StepLine:
    """The one line of a step on a terminal: while it runs, and when it has ended."""

    def __init__(self, name: str, usual: float) -> None:
        self.name, self.usual, self.began = name, usual, time.monotonic()
        self.notes: list[str] = []  # what was said of it, the last first
        self.doing = ""  # the last line of its command

    def text(self, mark: str = "") -> str:
        """The line as it is now, or with a mark at its end; no longer than the terminal is wide."""
        passed, said = time.monotonic() - self.began, "; ".join(self.notes)
        if not mark:
            done = min(int(10 * passed / self.usual), 10) if self.usual else 0
            progress = f"{'━' * done}{'╌' * (10 - done)} usually {self.usual:.1f} s  "
            said = (progress if self.usual else "") + (self.doing or said)
        columns = shutil.get_terminal_size().columns - 1
        return fit(f"{mark or ' '} {self.name:<8} {passed:6.1f} s  {said}", columns)


class Console(logging.Handler):
    """Shows records on stdout: line by line in a pipe, a step as one line on a terminal."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lock = self.turn = threading.RLock()  # logging's own, for the line that is redrawn
        self.setFormatter(OneLine("%(step)-8s %(message)s"))
        self.label = "deploy"  # the step that speaks
        self.hidden = False  # nothing is shown as long as there may be nothing to do
        self.line: StepLine | None = None  # of the step that runs, on a terminal
        self.last = time.monotonic()  # when a line was shown
        self.patience: float | None = None  # seconds for which a run waits for a reader that stalls

    @functools.cached_property
    def terminal(self) -> bool:
        """Whether stdout is a terminal that can redraw a line; else all is said as in a pipe."""
        stream = sys.stdout
        known = isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() == "utf-8"
        return known and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, or make it a part of the step's line."""
        line = self.format(record)
        self.last = time.monotonic()
        if self.line and record.levelno < NOTICE:
            self.line.doing = line[9:]
        elif self.line:
            self.line.notes.insert(0, line[9:])
        elif not self.hidden:
            more = f" … ({len(line) - WIDTH} more characters in the log)"
            self.show(line[:WIDTH] + (more if len(line) > WIDTH else ""))

    def show(self, text: str, end: str = "\n") -> None:
        """Write to stdout, on a terminal in place of the line there; nobody there is no error."""
        if self.terminal:
            if not os.environ.get("NO_COLOR"):
                for word, colour in COLOURS.items():
                    text = text.replace(word, f"\x1b[{colour}m{word}\x1b[0m", 1)
            text = f"\r\x1b[K{text}"
        try:
            if not select.select((), (1,), (), self.patience)[1]:  # Ctrl-S, or a connection is dead
                raise TimeoutError
            print(text, end=end, flush=True)
        except OSError:  # from now on into nothing, or the interpreter fails to flush at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    @contextlib.contextmanager
    def step(self, name: str, usual: float) -> Iterator[None]:
        """What is said inside is this step's; on a terminal all of it is one line, redrawn."""
        self.label, ended, mark = name, threading.Event(), "✗"
        self.line = line = StepLine(name, usual) if self.terminal and not self.hidden else None

        def redraw(drawn: StepLine) -> None:
            while not ended.wait(0.1):
                with self.turn:
                    if self.line:
                        self.show(drawn.text(), end="")

        if line:
            threading.Thread(target=redraw, args=(line,), daemon=True).start()
        try:
            yield
            mark = "✓"
        finally:
            ended.set()
            with self.turn:
                self.line = None
                if line:
                    self.show(line.text(mark))


console = Console()


def start_logging(log_file: Path | None = None) -> None:
    """Show what is said, or write it to a file, too; a log that cannot be written ends nothing."""
    handler: logging.Handler = console
    if log_file:
        console.patience = 20.0
        log_file.touch(0o600)
        handler = logging.FileHandler(log_file, encoding="utf-8", errors="replace")
        handler.setFormatter(OneLine("%(asctime)s %(step)-8s %(message)s", MOMENT))
    logging.raiseExceptions = log.propagate = False
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)


def as_failure(error: BaseException) -> Failure:
    """Any error as the Failure that the user reads; a traceback nobody foresaw goes to the log."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, Interrupted):
        number = signal.Signals(error.args[0])
        again = "run it again when you are ready"
        return Failure(f"ended by {number.name}", again, 128 + number)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Failure("the disk is full", "make room (df -h shows where), then run it again")
    if isinstance(error, (OSError, MemoryError)) or "start new thread" in str(error):
        refused = re.sub(r"^\[Errno \d+\] ", "", str(error)) or "out of memory"
        return Failure(f"this machine refuses: {refused}", "mend that, then run it again")
    log.debug("nobody foresaw this:", exc_info=error)
    return Failure(f"{type(error).__name__}: {error}", "see the log: python3 deploy.py logs")


def attempt(act: Callable[..., object], *arguments: object) -> None:
    """Do what nothing live depends on: a failure of it is a warning."""
    try:
        act(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it was
        log.warning(str(as_failure(error)))


# ------------------------------------------------------------------------------- running commands

HEARTBEAT = 15.0  # seconds without a line of output before one says that the step still runs
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
GENTLE = 10  # the niceness of what builds, while the site answers its users
LINGER = 5.0  # seconds in which the last lines are read while a child of a command keeps it open
KEPT = 1000  # lines of a command's output in which the cause of its failure is looked for
INSTALLED_BY = {
    "git": "sudo apt-get install git",
    "pipenv": "sudo apt-get install pipenv",
    "uv": "sudo apt-get install pipx, then pipx install uv",
    "poetry": "sudo apt-get install python3-poetry",
    "sudo": "apt-get install sudo",
    "docker": "sudo apt-get install docker.io docker-compose-v2",
    "systemctl": "this server must run systemd",
    "gunicorn": "add gunicorn to the Pipfile, and lock it again",
}
Sink = Callable[[str], None]  # takes a line of output


class Child:
    """A running command in a process group of its own, whose output goes line by line to sinks."""

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        sinks: Sequence[Sink],
        inherited: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
    ) -> None:
        name, together = argv[0], stdout == subprocess.PIPE and len(sinks) == 1
        require(
            "/" in name or shutil.which(name, path=environment.get("PATH")),
            f"{name} is not installed, or not in PATH",
            INSTALLED_BY.get(name, "install it"),
        )
        try:
            self.process = subprocess.Popen(
                argv,
                cwd=folder,
                env=environment,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.STDOUT if together else subprocess.PIPE,
                pass_fds=inherited,
                start_new_session=True,
            )
            streams = filter(None, (self.process.stdout, self.process.stderr))
            self._readers = [
                threading.Thread(target=self._read, args=pair, daemon=True)
                for pair in zip(streams, sinks, strict=True)
            ]
            for reader in self._readers:
                reader.start()
        except (OSError, ValueError, RuntimeError) as error:  # with a NUL in it; or no thread left
            if "process" in vars(self):
                self.end()
            what = f"`{shlex.join(argv)}` cannot be started in {folder}"
            why, remedy = getattr(error, "strerror", error), "mend the command in the settings file"
            raise Failure(f"{what}: {why}", remedy) from None

    def give_way(self) -> None:
        """Have it run after what the site does; the kernel gives its I/O the same rank."""
        niceness, group = max(GENTLE, os.getpriority(os.PRIO_PROCESS, 0)), self.process.pid
        with contextlib.suppress(OSError):  # what sudo runs is not ours to rank
            os.setpriority(os.PRIO_PGRP, group, niceness)
            # where the kernel ranks whole sessions, this one's
            Path(f"/proc/{group}/autogroup").write_text(str(niceness), encoding="ascii")

    def _read(self, stream: IO[bytes], sink: Sink) -> None:
        for line in stream:  # whole lines, however long: a part of a secret would not be known
            sink(line.decode("utf-8", "replace").rstrip("\r\n"))
        stream.close()

    def ended(self, seconds: float) -> bool:
        """Wait up to so long for its end; not for a grandchild that keeps its output open."""
        until = time.monotonic() + seconds
        for reader in self._readers:
            reader.join(max(until - time.monotonic(), 0))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(until - time.monotonic(), 0.01))
            for reader in self._readers:  # it has left lines to read
                reader.join(LINGER)
        return self.process.returncode is not None

    def end(self) -> None:
        """End the whole process group: SIGTERM, and SIGKILL for what is left after the grace."""

        def gone() -> bool:
            self.process.poll()
            os.killpg(self.process.pid, 0)  # ProcessLookupError: it is
            return False

        # nobody of ours is left to get the signal, or to wait for
        ours = (ProcessLookupError, PermissionError, subprocess.TimeoutExpired)
        with contextlib.suppress(*ours), shielded():
            os.killpg(self.process.pid, signal.SIGTERM)
            wait_until(gone, GRACE)
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(GRACE)

    def await_end(self, name: str, began: float, timeout: float) -> str:
        """How it ended, when that was not well; it does not outlive this call."""
        try:
            while not self.ended(0.1):
                Signals.check()
                passed = time.monotonic() - began
                if passed > timeout:
                    return f"was ended after its time limit of {timeout:g} s"
                if min(passed, time.monotonic() - console.last) > HEARTBEAT:
                    log.info(f"still running after {passed:.0f} s: {name}")
        finally:
            if self.process.returncode is None:
                self.end()
                self.ended(1)  # its last words are among the last lines
        status = self.process.returncode
        ended = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
        return ended if status else ""


@dataclass
class Commands:
    """Runs commands one after the other, with their output in the log and their time limited."""

    lock: Lock  # they hold it, too: one that outlives a killed deployer keeps others away
    here: threading.local = field(default_factory=threading.local)  # what holds in this thread

    @property
    def gentle(self) -> bool:
        """Whether the site goes before what this thread does."""
        return bool(vars(self.here).get("gentle"))

    @contextlib.contextmanager
    def giving_way(self, gentle: bool = True) -> Iterator[None]:
        """The site goes before the commands that are begun inside, or it does not."""
        before, self.here.gentle = self.gentle, gentle
        try:
            yield
        finally:
            self.here.gentle = before

    def threads(self, number: int, **here: object) -> futures.ThreadPoolExecutor:
        """So many threads, whose commands give way (gentle) or are another step's (step)."""
        return futures.ThreadPoolExecutor(number, initializer=lambda: vars(self.here).update(here))

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        timeout: float,
        quiet: bool = False,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
    ) -> str:
        """Run a command to its end, or CommandFailed; what a quiet one wrote to stdout."""
        Signals.check()
        lines: list[str] = []
        tail: deque[str] = deque(maxlen=KEPT)
        level = logging.DEBUG if quiet else logging.INFO
        step = {"step": vars(self.here).get("step")}

        def show(line: str) -> None:
            tail.append(redactor.mask(line))
            log.log(level, f"| {line}", extra=step)

        def keep(line: str) -> None:
            lines.append(line)
            show(line)

        log.log(level, f"$ {shlex.join(argv)}", extra=step)
        sinks = [keep, show] if quiet and stdout == subprocess.PIPE else [show]
        began = time.monotonic()
        child = Child(argv, folder, environment, sinks, self.lock.inherited, stdin, stdout)
        if self.gentle:
            child.give_way()
        if ended := child.await_end(argv[0], began, timeout):
            raise CommandFailed(argv, folder, ended, tuple(tail))
        return "\n".join(lines)


def is_at_work(folder: Path, program: str = "") -> bool:
    """Whether a process, or one of this program, has its working folder at or below a folder."""
    for process in Path("/proc").glob("[0-9]*"):  # none where there is no /proc
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            place = os.readlink(process / "cwd").removesuffix(" (deleted)")
            words = re.split(r"[\0 ]", (process / "cmdline").read_text("utf-8", "replace"))
            programs = {os.path.basename(word).rstrip(":") for word in words} | {""}
            if Path(place).is_relative_to(folder) and program in programs:
                return True
    return False


def holders(file: Path) -> Iterator[int]:
    """The numbers of the processes that have a file open."""
    for opened in glob.iglob("/proc/[0-9]*/fd/*"):  # none where there is no /proc
        process = int(opened.split("/")[2])
        with contextlib.suppress(OSError):  # this one was closed just now: the next may be it
            if os.readlink(opened) == str(file) and process != os.getpid():
                yield process


# ------------------------------------------------------------------------------- lock and journal


class Lock:
    """A flock on the checkout's .git: nobody removes that, and it is free once all have gone."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, ""
        self.inherited: tuple[int, ...] = ()  # what commands inherit, so that they hold it, too
        # the version before this one, whose place it takes, left its lock and the time of its start
        found = re.fullmatch(r"(\d{1,9}) (\d{8}T\d{6}Z)", os.environ.pop("DEPLOY_RESUME", ""))
        with contextlib.suppress(OSError):
            if found and os.path.samestat(os.fstat(int(found[1])), path.stat()):
                self.inherited, self.started = (int(found[1]),), found[2]
                os.set_inheritable(int(found[1]), False)

    def hand_over(self, started: str) -> None:
        """Let the program that takes this one's place inherit the lock."""
        os.set_inheritable(self.inherited[0], True)
        os.environ["DEPLOY_RESUME"] = f"{self.inherited[0]} {started}"

    @contextlib.contextmanager
    def held(self, wait: float, journal: Journal) -> Iterator[None]:
        """Hold the lock, taken within so many seconds, or Failure; journal says who else has it."""
        descriptor = self.inherited[0] if self.inherited else os.open(self.path, os.O_RDONLY)
        try:
            # for a moment at least: whoever asks who holds it tries it, too
            taken = wait_until(lambda: _flocked(descriptor), 0.3)
            if wait and not taken:
                say(f"waiting for the lock: {self.holder(journal)}")
                taken = wait_until(lambda: _flocked(descriptor), wait)
            if not taken:
                what = f"another run holds the lock: {self.holder(journal)}"
                raise Failure(what, "wait for it, or use --wait", LOCKED)
            self.inherited = (descriptor,)
            yield
        finally:
            self.inherited = ()
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # for a command that runs on, too
            os.close(descriptor)

    def holder(self, journal: Journal) -> str:
        """Who holds the lock, for a sentence; nothing when it is free."""
        if not self.path.exists():
            return ""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return "" if _flocked(descriptor) else journal.who(self.path)
        finally:
            os.close(descriptor)


def _flocked(descriptor: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def flush(path: Path) -> None:
    """Have a file or a folder on disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


owner_only = functools.partial(os.open, mode=0o600)  # opens a file for its owner alone
Act = dict[str, Any]  # what was begun: its kind as `act`, and what its undo needs to know


@dataclass
class Journal:
    """Who runs, and what was begun and not committed: on disk before it happens."""

    path: Path
    # command, by, since, started, pid, step, release, revision
    run: dict[str, Any] = field(default_factory=dict)
    begun: list[Act] = field(default_factory=list)
    # what this run could not take back; the next one tries it again
    stuck: list[Act] = field(default_factory=list)

    def load(self) -> None:
        """Read what a run left that was cut off; nothing of a file that is no journal."""
        self.run, self.begun = {}, []
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
            found = json.loads(self.path.read_bytes())
            begun = [act for act in found["begun"] if act["act"] in UNDO]
            self.run, self.begun = dict(found["run"]), begun

    def save(self, **run: object) -> None:
        """Have it all on disk when this returns, with changes of who runs."""
        self.run |= run
        self._write(self.begun)

    def _write(self, begun: list[Act]) -> None:
        beside = self.path.with_suffix(".new")
        with open(beside, "w", opener=owner_only, encoding="ascii") as file:
            json.dump({"run": self.run, "begun": self.stuck + begun}, file)
        flush(beside)
        beside.replace(self.path)
        flush(self.path.parent)

    def begin(self, act: str, **facts: object) -> Act:
        """Note an act before it happens; it is undone if it is neither ended nor committed."""
        self.begun.append({"act": act, **facts})
        self.save()
        return self.begun[-1]

    def end(self, act: Act) -> None:
        """An act is over: done for good, or undone."""
        self.begun.remove(act)
        self.save()

    @contextlib.contextmanager
    def doing(self, act: str, **facts: object) -> Iterator[None]:
        """An act that is over when the block ends; if it fails, it remains to be undone."""
        begun = self.begin(act, **facts)
        yield
        self.end(begun)

    def commit(self, entry: Entry, history: History) -> None:
        """What was begun is done for good and in the history, both or, after a kill, neither."""
        act = {"act": "record", "entry": asdict(entry)}
        self._write([act])  # in place of what was begun, which is not taken back any more
        self.begun = [act]
        history.record(entry)
        self.end(act)

    def close(self) -> None:
        """Leave it in good order; what could not be undone stays, for the next run."""
        if not self.begun and not self.stuck:
            self.path.unlink(missing_ok=True)

    def check_done(self) -> None:
        """Failure if something of an earlier run could not be taken back by this one."""
        acts = ", ".join(act["act"] for act in self.stuck)
        require(
            not self.stuck,
            f"what an earlier run left could not be taken back ({acts})",
            "mend what the warning above says, and run it again",
            NEEDS_HUMAN,
        )

    def who(self, lock: Path) -> str:
        """Who runs, for a sentence."""
        self.load()
        if not self.run:
            return "a set-up, or a run that has just begun"
        run = defaultdict(str, {key: str(value)[:200] for key, value in self.run.items()})
        who = "{command} by {by} since {since} (process {pid}), at {step}".format_map(run)
        if Path("/proc/self").exists() and not Path(f"/proc/{run['pid'] or 'nobody'}").exists():
            who += f"; it was killed, but a command of it still runs: fuser -v {lock}"
        return who


def started_by() -> str:
    """Who started this run, and from where: `ubuntu, ssh from 192.0.2.7`."""
    ssh = os.environ.get("SSH_CONNECTION", "").split()
    place = "terminal" if os.isatty(1) else "systemd" if "INVOCATION_ID" in os.environ else "script"
    return f"{user_name(os.geteuid())}, {f'ssh from {ssh[0]}' if ssh else place}"


def user_name(number: int) -> str:
    """The name of a user, or the number of one who has none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


# --------------------------------------------------------------------------- history and releases

FAILURES = ("failed", "interrupted", "cut off", "unhealthy")


@dataclass(frozen=True)
class Entry:
    """A line of the history: one run, how it ended, and what was live then."""

    release: str = ""
    revision: str = ""
    subject: str = ""
    command: str = ""
    by: str = ""
    started: str = ""
    ended: str = ""
    seconds: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)
    result: str = ""
    message: str = ""
    state: str = ""
    live: str = ""
    inputs: str = ""
    requests: int = 0
    errors: int = 0
    slowest: float = 0.0

    @staticmethod
    @functools.cache
    def parse(line: bytes) -> Entry | None:
        """The entry of a line; None for one that a power cut tore, or that is no entry at all."""
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            found, unset = json.loads(line), Entry()
            entry = Entry(**{key: found[key] for key in vars(unset) if key in found})
            alike = [type(vars(entry)[key]) is type(fact) for key, fact in vars(unset).items()]
            numbers = (entry.seconds, entry.slowest, *entry.steps.values())
            if entry.command and all(alike) and all(0 <= each < 1e9 for each in numbers):
                return entry
        return None

    def failed(self) -> bool:
        """Whether somebody should be told."""
        return self.result in FAILURES


@dataclass(frozen=True)
class History:
    """What was run, a line each: the order of the lines counts, for a clock may be set back."""

    path: Path

    def entries(self) -> list[Entry]:
        """The runs that there were, oldest first."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        return list(filter(None, map(Entry.parse, lines)))

    def record(self, entry: Entry) -> None:
        """Append an entry, on disk when this returns; once, though it be asked twice."""
        if entry in self.entries()[-2:]:
            return
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        line = json.dumps(asdict(entry), ensure_ascii=False).encode("utf-8", "replace")
        with open(self.path, "ab", opener=owner_only) as file:
            file.write(b"\n" * torn + line + b"\n")
        flush(self.path)

    def deployments(self) -> list[Entry]:
        """The deployments that there were, however they ended, oldest first."""
        return [entry for entry in self.entries() if entry.command == "deploy"]

    def went_live(self) -> list[Entry]:
        """The entries of runs that made a release live and healthy, oldest first."""
        return [entry for entry in self.entries() if entry.result == "live"]

    def last(self, release: str) -> Entry:
        """The last entry that made a release live; an empty one when there is none."""
        return next((each for each in self.went_live()[::-1] if each.release == release), Entry())

    def oldest_first(self, paths: Iterable[Path], newest: str = "") -> list[Path]:
        """Files named after runs, in the order of the runs; those of the run that is named last."""
        runs = [*self.entries(), Entry(started=newest)]
        order = {run.started: at for at, run in enumerate(runs)}
        return sorted(paths, key=lambda path: (order.get(path.name[:16], -1), path.name))


def finish_record(site: Site, act: Act) -> None:
    """A run that was killed while it committed had done all but this."""
    site.history.record(Entry(**act["entry"]))


@dataclass(frozen=True)
class Release:
    """A folder with a revision in it, and what its commands need; the checkout, too, is one."""

    folder: Path
    revision: str
    project: Path  # the folder of manage.py and Pipfile
    environment: Mapping[str, str]  # .env, and its packages first in PATH once they are installed

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    def plus(self, variables: Mapping[str, str]) -> Release:
        """The same, with more variables for its commands."""
        return replace(self, environment={**self.environment, **variables})


class Releases:
    """The releases in the workspace, and which of them is live."""

    def __init__(
        self,
        workspace: Path,
        history: History,
        project: str,
        environment: Callable[[], Mapping[str, str]],
    ) -> None:
        self.folder, self.history, self.project = workspace / "releases", history, project
        self.current, self.previous = workspace / "current", workspace / "previous"
        self.environment = environment  # of every command, before a release's own packages

    def open(self, folder: Path, revision: str = "") -> Release:
        """The release in a folder, as it is now."""
        project, environment = folder / self.project, dict(self.environment())
        if (project / ".venv").is_symlink():
            venv = str((project / ".venv").resolve())
            environment |= {"VIRTUAL_ENV": venv, "PATH": f"{venv}/bin:{environment['PATH']}"}
        known = revision or self.history.last(folder.name).revision
        return Release(folder, known, project, environment)

    def linked(self, link: Path) -> str:
        """The name of the release that a link points to; nothing unless both are there."""
        name = link.resolve().name
        return name if (self.folder / name).is_dir() else ""

    def live_name(self) -> str:
        """The name of the release that `current` points to, or nothing."""
        return self.linked(self.current)

    def live(self) -> Release | None:
        """The live release, if there is one."""
        name = self.live_name()
        return self.open(self.folder / name) if name else None

    def healthy(self) -> list[str]:
        """The releases that went live and are still there, in the order in which they first did."""
        names = dict.fromkeys(each.release for each in self.history.went_live())
        return [each for each in names if each and (self.folder / each).is_dir()]

    def to_go_back_to(self, name: str) -> Release:
        """The release of this name, or the newest healthy one of another revision."""
        healthy, live = self.healthy(), self.live_name()
        before = healthy[: healthy.index(live)] if live in healthy else healthy
        of = {each: self.history.last(each).revision for each in (*healthy, live)}
        named = [each for each in healthy if name in (each, each[:16])]  # as history shows it
        found = named if name else [each for each in before if of[each] != of[live]]
        remedy = "history shows what there was"
        require(found or name, "there is no earlier healthy release to go back to", remedy)
        require(found, f"{name} is no release that was healthy and is kept", remedy)
        return self.open(self.folder / found[-1])

    def without(self, revision: str) -> str:
        """The release whose place this revision took; the live one, if it took none."""
        live, before = self.live_name(), self.linked(self.previous)
        now, then = (self.history.last(each).revision for each in (live, before))
        return before if now == revision != then else live

    def switch(self, current: str, previous: str) -> None:
        """Make a release the live one, and note which was before: two atomic renames."""
        if previous:
            _link_atomically(self.previous, self.folder / previous)
        else:
            self.previous.unlink(missing_ok=True)
        _link_atomically(self.current, self.folder / current)

    def past_keep(self, count: int) -> list[Path]:
        """The folders to remove: not the newest healthy ones, the live one, the one before it."""
        kept = {*self.healthy()[-count:], self.live_name(), self.linked(self.previous)}
        return [each for each in self.folder.iterdir() if each.name not in kept]


def _link_atomically(link: Path, target: Path) -> None:
    """Make a symbolic link point to a target, so that it survives a power cut."""
    beside = link.with_name(f".{link.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(target, link.parent))
    beside.replace(link)
    attempt(flush, link.parent)  # on a disk that fails, the way back goes on all the same


def link_shared(checkout: Path, release: Path, name: str) -> None:
    """Link a shared path of the checkout into a release, in place of what git has there."""
    source, link = checkout / name, release / name
    if name.endswith("/"):
        source.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        log.warning(f"[deploy] shared {name} is not in {checkout}: this release goes without it")
        return
    require(
        link.parent.resolve().is_relative_to(release.resolve()),
        f"[deploy] shared {name} lies behind a link that leads out of the release",
        "remove that link from the repository, or mend the setting",
    )
    link.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(link, ignore_errors=True)  # it passes over a file and a link
    _link_atomically(link, source)


# -------------------------------------------------------------------------------------------- git


class Git:
    """The checkout's git; a call raises CommandFailed when git itself fails."""

    def __init__(self, checkout: Path, commands: Commands, environment: Mapping[str, str]) -> None:
        self.checkout, self.commands, self._base = checkout, commands, environment
        self.folder = git_folder(checkout)  # with all that git knows of it

    @functools.cached_property
    def environment(self) -> Mapping[str, str]:
        """That of every git: its ssh asks nobody anything, and is the one that was chosen."""
        self.environment = self._base  # that of the question itself, which ssh was chosen
        # git asks this variable first, GIT_SSH last
        ssh = self._base.get("GIT_SSH_COMMAND") or self.ask("config", "core.sshCommand")
        if not ssh and "GIT_SSH" in self._base:  # a program of their own may know no options
            return self._base
        ssh = f"{ssh or 'ssh'} -o BatchMode=yes -o ConnectTimeout=20"
        return {**self._base, "GIT_SSH_COMMAND": ssh}

    def __call__(
        self,
        *arguments: str,
        folder: Path | None = None,
        timeout: float = 120,
        stdout: int = subprocess.PIPE,
    ) -> str:
        # garbage is collected in the foreground: a git left behind would keep the lock
        argv = ["git", "-c", "gc.autoDetach=false", "-c", "maintenance.autoDetach=false"]
        # by default, the objects of a small fetch would not survive a power cut, but their ref
        argv += ["-c", "core.fsync=all", "-c", "core.fsyncMethod=batch"]
        try:
            return self.commands.run(
                [*argv, *arguments],
                folder or self.checkout,
                self.environment,
                timeout,
                quiet=True,
                stdout=stdout,
            )
        except CommandFailed as error:
            if "was ended" in error.last:  # one that is killed, as by a lack of memory, leaves them
                self.remove_stale_locks()
            raise

    def ask(self, *arguments: str, timeout: float = 120) -> str | None:
        """The answer of git, or None when it fails."""
        with contextlib.suppress(CommandFailed):
            return self(*arguments, timeout=timeout)
        return None

    def commit(self, *names: str) -> str:
        """The full hash of the first of these that names a commit, or nothing."""
        verify = ("rev-parse", "--quiet", "--verify", "--end-of-options")
        found = (self.ask(*verify, f"{name}^{{commit}}") for name in names)
        return next(filter(None, found), "")

    def holds(self, revision: str, earlier: str) -> bool:
        """Whether a revision is another one, or comes after it."""
        return self.ask("merge-base", "--is-ancestor", earlier, revision) is not None

    def subject(self, revision: str) -> str:
        """The first line of a commit's message, or nothing."""
        return (revision and self.ask("log", "-1", "--format=%s", revision)) or ""

    def changed(self, *arguments: str) -> set[str]:
        """The paths that `git diff` names, whatever bytes are in them."""
        diff = ("diff", "--name-only", "--no-renames", "--ignore-submodules=all", "-z")
        with tempfile.TemporaryFile() as listed:
            self(*diff, *arguments, stdout=listed.fileno())
            listed.seek(0)
            return {os.fsdecode(name) for name in listed.read().split(b"\0")} - {""}

    def apply(self, revision: str, paths: str, *options: str) -> None:
        """Change files of the checkout from what HEAD has to what a revision has, or back."""
        with tempfile.NamedTemporaryFile() as patch:
            diff = ("diff-tree", "-p", "--binary", "HEAD", revision, "--", paths)
            self(*diff, stdout=patch.fileno())
            self("apply", "--whitespace=nowarn", *options, patch.name)

    def remove_worktree(self, release: Path) -> None:
        """Remove a release's folder and what git knows of it, whatever state it is in."""
        require(
            wait_until(lambda: not is_at_work(release), 3),  # one that was killed may be ending
            f"a process works in {release}, which is not removed therefore",
            f"end it: fuser -v {release}",
        )
        for folder in (self.folder / "worktrees" / release.name, release):
            shutil.rmtree(folder, ignore_errors=True)

    def remove_stale_locks(self) -> None:
        """Remove the lock files of a git that was cut off: a run of ours was, and no git runs."""
        if is_at_work(self.checkout, "git"):
            return
        for lock in self.folder.rglob("*.lock"):
            log.info(f"removed {lock}, which a git that was cut off had left")
            lock.unlink(missing_ok=True)

    def check_fast_forward(self, branch: str, there: str, revision: str) -> None:
        """Failure, told apart by looking, if the checkout cannot follow its remote branch."""
        place, index_lock = self.checkout, self.folder / "index.lock"
        require(
            self.ask("symbolic-ref", "--quiet", "HEAD") == f"refs/heads/{branch}",
            f"{place} is not on the branch {branch}",
            shlex.join(("git", "-C", str(place), "checkout", branch)),
        )
        require(
            self.holds(revision, "HEAD"),
            f"{branch} in {place} and {there} diverged: it has commits that {there} has not",
            # its hash, for a remote may be an address
            f"when git log {revision[:7]}..HEAD shows none that is needed: "
            f"git reset --keep {revision[:7]}",
        )
        require(
            not index_lock.exists(),
            f"another git is at work in {place}, or was cut off there",
            f"when none runs: rm {index_lock}",
        )
        found = sorted(self._in_the_way(revision))
        require(
            not found,
            f"changes in {place} stand in the way: {', '.join(shortened(found))}",
            # these alone: among what git does not know of are uploads
            "commit and push them, or put them away: "
            f"git stash push --all -- {shlex.join(found[:11])}",
        )

    def _in_the_way(self, revision: str) -> set[str]:
        """The paths that a fast-forward would change, and that are not as HEAD has them."""
        changed = self.changed("HEAD", revision)
        parents = {str(parent) for name in changed for parent in Path(name).parents}
        folders = {each for each in parents if (self.checkout / each).is_dir()}
        found = changed & self.changed("HEAD")
        for name in self.changed("--diff-filter=A", "HEAD", revision):
            above = {str(parent) for parent in Path(name).parents}
            if not changed & above:  # what becomes a folder is no obstacle
                way = {name, *above} - folders
                found |= {each for each in way if os.path.lexists(self.checkout / each)}
        return found

    def fast_forward(self, journal: Journal, revision: str) -> None:
        """Bring the checkout to a revision that is known to follow."""
        with journal.doing("fast-forward", target=revision):
            self("merge", "--ff-only", "--quiet", revision, timeout=600)
            os.sync()  # a power cut must leave the program that puts things right


def undo_fast_forward(site: Site, act: Act) -> str:
    """Bring every path that the revision changes back to HEAD's; none else is looked at."""
    site.git.remove_stale_locks()
    target = str(act["target"])
    site.git("read-tree", target)
    site.git("read-tree", "--reset", "-u", target, "HEAD", timeout=600)
    return "undid the fast-forward of the checkout, which was cut off"


def git_folder(checkout: Path) -> Path:
    """The .git of a checkout; of one that is a worktree itself, the folder that the file names."""
    path = checkout / ".git"
    named = path.read_text(encoding="utf-8") if path.is_file() else path.name
    return checkout / named.removeprefix("gitdir:").strip()


def shortened(lines: list[str], most: int = 10) -> list[str]:
    """The first lines of a list, and how many more there are."""
    return lines if len(lines) <= most + 1 else [*lines[:most], f"and {len(lines) - most} more"]


# ----------------------------------------------------------------------------------- health check

Reply = tuple[int, str, bytes]  # status, its reason, and at most a PIECE of the body
Answer = tuple[bool, str]  # whether it is the expected one, and what was seen


def ask(
    url: str,
    headers: Mapping[str, str],
    limit: float,
    data: bytes | None = None,
    unix: Path | None = None,
) -> Reply:
    """Ask once, through no proxy and along no redirect; Failure says why there was no reply."""
    answer: futures.Future[Reply] = futures.Future()

    def listen() -> None:
        try:
            with _send(url, headers, limit, data, unix) as reply:
                answer.set_result((reply.status, reply.reason, reply.read(1 << 20)))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it
            answer.set_exception(Failure(str(getattr(error, "reason", None) or error)))

    # in time as a whole: urllib's own limit holds for each call of a socket alone
    threading.Thread(target=listen, daemon=True).start()
    heard = wait_until(lambda: futures.wait([answer], 0.01).done, limit)  # at once
    require(heard, f"nothing within {limit:g} s", "")
    return answer.result()


def _send(
    url: str, headers: Mapping[str, str], limit: float, data: bytes | None, unix: Path | None
) -> Any:
    from http.client import HTTPConnection, HTTPSConnection  # with ssl, as long to load as the rest
    from urllib.request import HTTPHandler, Request

    class UnixConnection(HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(limit)
            self.sock.connect(str(unix))

    request = Request(url, data, {"User-Agent": "deploy.py", **headers})
    request.timeout = limit
    kind = HTTPSConnection if request.type == "https" else HTTPConnection
    # not through an opener, whose handlers ask proxies and follow redirects
    return HTTPHandler().do_open(UnixConnection if unix else kind, request)


@dataclass(frozen=True)
class HealthCheck:
    """What a healthy site answers to which question: the settings of [health]."""

    of: HealthSection
    host: str

    def ask(self, unix: Path | None) -> Answer:
        """Ask once."""
        where = f"{self.of.url}{' on the private socket' if unix else ''}"
        try:
            status, reason, body = ask(self.of.url, self.headers, self.of.timeout, unix=unix)
        except Failure as why:
            return False, f"no answer from {where} ({why})"
        saw = f"{status} {reason} for {where}"
        if status != self.of.expect:
            return False, f"{saw}, expected {self.of.expect}"
        if self.of.contains.encode() not in body:
            return False, f"{saw}, but without the text {self.of.contains!r}"
        return True, saw

    @property
    def headers(self) -> dict[str, str]:
        """What goes with each question."""
        return self.of.headers | ({"Host": self.host} if self.host else {})

    def address(self) -> str:
        """Where a browser finds the site: by its public name if it has one."""
        if not re.search(r"[A-Za-z-]\.", self.host):
            return self.of.url
        with socket.socket() as probe:
            scheme = "http" if probe.connect_ex(("127.0.0.1", 443)) else "https"
        return f"{scheme}://{self.host}/"

    def wait(
        self, seconds: float, unix: Path | None = None, alive: Callable[[], bool] = lambda: True
    ) -> Answer:
        """Ask until the answer is right, for so many seconds, with growing pauses; once if 0."""
        until, rest = time.monotonic() + seconds, 0.1
        while True:
            good, saw = self.ask(unix)
            if good or time.monotonic() + rest > until or not alive():
                return good, saw
            pause(rest)
            rest = min(rest * 2, 3.0)


# --------------------------------------------------------------------------- the project's Django

# These functions run in the project's own Django and on its Python, which get their source on the
# stdin of `manage.py shell`, below what IN_DJANGO imports; each imports what it needs of Django.


def list_migrations(
    keeps_defaults: bool, commands: list[list[str]], lock_timeout: int, candidate: str
) -> None:
    """Print every migration that the project knows, and what its database is, as JSON."""
    from django.core.management import call_command
    from django.db import connection
    from django.db.migrations.state import ProjectState

    # it refuses what Django's checks find, migrations in conflict, and an inconsistent history
    call_command("migrate", plan=True, skip_checks=False)
    executor, known = _read_migrations()
    live, found = ProjectState(real_apps=executor.loader.unmigrated_apps), []
    for each in (each for each, applied in known if applied):
        each.mutate_state(live, preserve=False)
    kept = keeps_defaults and connection.vendor == "postgresql"
    for each, applied in known:
        conflicts = _find_conflicts(each.operations, each.app_label, live, kept)
        found.append(
            {
                "name": str(each),
                "applied": applied,
                "reversible": all(one.reversible for one in each.operations),
                "atomic": each.atomic,
                "replaces": [".".join(name) for name in each.replaces],
                "incompatible": [] if applied else list(conflicts),
            }
        )
    told = {"migrations": found, **_describe_database(), "settled": False}
    told["recorded"] = [".".join(name) for name in executor.loader.applied_migrations]
    if commands and all(each["applied"] for each in found):
        told["settled"] = _settle(commands, lock_timeout, candidate)
    print("\n" + json.dumps(told))  # a command may have left its last line open


def _settle(commands: list[list[str]], lock_timeout: int, candidate: str) -> bool:
    """Whether a migration of nothing was done, which waits until the candidate has booted."""
    import socket

    until = time.monotonic() + 2
    with socket.socket(socket.AF_UNIX) as probe:
        while candidate and probe.connect_ex(candidate):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
    with contextlib.suppress(Exception, SystemExit):  # it is run by itself, then, and tells why
        for words in commands:
            migrate_in_django(words, lock_timeout)
        return True
    return False


def list_settings(commands: list[list[str]]) -> None:
    """Run commands; print what settings say of static files, uploads and DEBUG, as JSON."""
    from django.conf import settings
    from django.core.management import execute_from_command_line

    for words in commands:
        execute_from_command_line(["manage.py", *words])
    names = ("STATIC_URL", "STATIC_ROOT", "MEDIA_ROOT", "DEBUG")
    print("\n" + json.dumps([str(getattr(settings, name) or "") for name in names]))


def _read_migrations() -> tuple[Any, list[tuple[Any, bool]]]:
    """Django's executor, and every migration in its order, with whether it is applied."""
    from django.db import connection
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connection, print)
    loader = executor.loader
    plan = executor.migration_plan(loader.graph.leaf_nodes(), clean_start=True)
    applied = loader.applied_migrations
    return executor, [(each, (each.app_label, each.name) in applied) for each, _ in plan]


def _find_conflicts(operations: Any, app: str, live: Any, keeps_defaults: bool) -> Iterator[str]:
    """The operations after which a release with this state of its models cannot go on."""
    from django.db import migrations

    for one in operations:
        if isinstance(one, migrations.SeparateDatabaseAndState):
            yield from _find_conflicts(one.database_operations, app, live, keeps_defaults)
        if isinstance(one, migrations.RunSQL) and one.sql:
            yield f"{one.describe()}, which may be anything"
        name = getattr(one, "model_name", "") or getattr(one, "name", "")
        model = live.models.get((app, name.lower()))  # what it does not know, it cannot miss
        if model and model.options.get("managed", True) and not model.options.get("proxy"):
            yield from _judge_operation(one, model.fields, keeps_defaults)


def _judge_operation(one: Any, fields: Any, keeps_defaults: bool) -> list[str]:
    """Why a release that knows these fields of a model cannot go on after an operation on it."""
    from django.db import migrations

    old: Any = fields.get(getattr(one, "name", ""))
    new: Any = getattr(one, "field", None)
    both = old is not None and new is not None
    rules = (
        (migrations.DeleteModel, True, ""),
        (migrations.RenameModel, True, ""),
        (migrations.AlterModelTable, True, ""),
        (migrations.AddConstraint, True, ""),
        (migrations.RemoveField, old, ""),
        (migrations.RenameField, old, ""),
        (migrations.AlterField, both and old.null and not new.null, ", which must not be NULL"),
        (migrations.AlterField, both and new.unique and not old.unique, ", which must be unique"),
        (migrations.AddField, new and _needs_value(new, keeps_defaults), ", which needs a value"),
    )
    return [one.describe() + why for kind, holds, why in rules if holds and isinstance(one, kind)]


def _needs_value(field: Any, keeps_defaults: bool) -> bool:
    """Whether a row cannot be inserted without naming this field."""
    if field.null or field.many_to_many or _has_database_default(field):
        return False
    auto = getattr(field, "auto_now", False) or getattr(field, "auto_now_add", False)
    filled = field.has_default() or auto or (field.blank and field.empty_strings_allowed)
    return field.unique or not (filled and keeps_defaults)


def _has_database_default(field: Any) -> bool:
    """Whether the project itself has the database fill a field in."""
    from django.db.models import NOT_PROVIDED

    default = getattr(field, "db_default", NOT_PROVIDED)  # from Django 5.0 on
    return default is not NOT_PROVIDED or getattr(field, "generated", False)


def _describe_database() -> dict[str, Any]:
    """What there is to know of the database, and the aliases of others that have migrations."""
    from django.apps import apps
    from django.db import connection, connections, router

    identity, lock_timeout, invalid = "", "", []
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT format('%s %s', extract(epoch FROM pg_postmaster_start_time()), oid),"
                " current_setting('lock_timeout'),"
                " ARRAY(SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid AND"
                " indexrelid NOT IN (SELECT index_relid FROM pg_stat_progress_create_index))"
                " FROM pg_database WHERE datname = current_database()"
            )
            identity, lock_timeout, invalid = cursor.fetchone()
    return {
        "vendor": connection.vendor,
        "file": str(connection.settings_dict["NAME"]) if connection.vendor == "sqlite" else "",
        "identity": identity,
        "lock_timeout": lock_timeout,
        "invalid": invalid,
        "others": [
            each
            for each in connections
            if each != connection.alias
            and not connections[each].settings_dict["TEST"]["MIRROR"]
            and any(router.allow_migrate_model(each, model) for model in apps.get_models())
        ],
    }


def _guard_schema_editor(lock_timeout: int) -> None:
    """Have no transaction wait longer for a lock, and have added columns keep their defaults."""
    from django.db import connection

    editor = connection.SchemaEditorClass
    enter, add_field, alter_field = editor.__enter__, editor.add_field, editor.alter_field

    def enter_limited(self: Any) -> Any:
        enter(self)
        if self.atomic_migration:  # what is not would be left half done
            with self.connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = {lock_timeout}")
        return self

    def add_keeping_default(self: Any, model: Any, field: Any) -> None:
        if not field.null:  # the release that is live inserts rows without naming it
            self.skip_default_on_alter = lambda _: True  # asked before the default is dropped
        add_field(self, model, field)
        vars(self).pop("skip_default_on_alter", None)

    def alter_with_default(self: Any, model: Any, old: Any, new: Any, strict: bool = False) -> None:
        # the default that was kept stands in the way of another type
        moved = old.column and new.column and not (old.primary_key or _has_database_default(new))
        moved = moved and old.get_internal_type() != new.get_internal_type()
        column = f"ALTER TABLE {self.quote_name(model._meta.db_table)} ALTER COLUMN"
        if moved:
            self.execute(f"{column} {self.quote_name(old.column)} DROP DEFAULT", None)
        alter_field(self, model, old, new, strict)
        default = self.effective_default(new) if moved and not new.null else None
        if default is not None:
            self.execute(f"{column} {self.quote_name(new.column)} SET DEFAULT %s", [default])

    if connection.vendor == "postgresql":
        _limit_session()
        editor.__enter__ = enter_limited
        editor.add_field, editor.alter_field = add_keeping_default, alter_with_default


def _limit_session() -> None:
    """What is cut off here ends there; and in a deadlock with a request, this is what gives way."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(
            # the one from PostgreSQL 14 on; the other is for a superuser to set
            "SELECT set_config(name, limits.value, false) FROM pg_settings JOIN (VALUES"
            " ('client_connection_check_interval', '2s'), ('deadlock_timeout', '100ms')"
            ") AS limits (name, value) USING (name)"
            " WHERE context <> 'superuser' OR current_setting('is_superuser') = 'on'"
        )


def migrate_in_django(words: list[str], lock_timeout: int) -> None:
    """Run a command of manage.py that migrates."""
    from django.core.management import execute_from_command_line

    _guard_schema_editor(lock_timeout)
    execute_from_command_line(["manage.py", *words])


def reverse_migrations(names: list[str], lock_timeout: int) -> None:
    """Reverse those of these migrations that are applied, last first."""
    _guard_schema_editor(lock_timeout)
    executor, known = _read_migrations()
    undo = [each for each, applied in reversed(known) if applied and str(each) in names]
    executor.migrate(None, [(each, True) for each in undo])


def rehearse(words: list[str], database: str) -> None:
    """Run a command that migrates on another database; print how long it kept tables locked."""
    from django.db import connection

    connection.close()
    connection.settings_dict["NAME"] = database
    seen: dict[Any, list[float]] = {}  # when each lock was
    over = threading.Event()

    def watch() -> None:
        with connection.copy().cursor() as cursor:
            while not over.wait(0.05):
                cursor.execute(
                    # a table that a transaction under way has made is not in pg_class yet
                    "SELECT DISTINCT relname, virtualtransaction FROM pg_locks"
                    " JOIN pg_class c ON c.oid = relation"
                    " JOIN pg_database d ON d.oid = database AND datname = current_database()"
                    " WHERE granted AND relkind IN ('r', 'p') AND mode IN ('AccessExclusiveLock',"
                    " 'ExclusiveLock', 'ShareRowExclusiveLock', 'ShareLock')"
                )
                for lock in cursor.fetchall():
                    seen.setdefault(lock, []).append(time.monotonic())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        migrate_in_django(words, 0)
    finally:
        over.set()
        watcher.join()
    print(json.dumps([[table, at[-1] - at[0]] for (table, _), at in seen.items()]))


# read now: while this waits for the lock, another run may bring another version of this file. With
# gc.freeze(), its end does not go through all that is loaded, which would take a third of its time.
IN_DJANGO = (
    "from __future__ import annotations\nimport contextlib, gc, json, threading, time\n\n"
    + "\n\n".join(
        inspect.getsource(each)
        for each in (
            list_migrations,
            _settle,
            list_settings,
            _read_migrations,
            _find_conflicts,
            _judge_operation,
            _needs_value,
            _has_database_default,
            _describe_database,
            _guard_schema_editor,
            _limit_session,
            migrate_in_django,
            reverse_migrations,
            rehearse,
        )
    )
)


# --------------------------------------------------------------------------------------- database

_LOCKED = re.compile(r"LockNotAvailable|lock (wait )?timeout|deadlock", re.IGNORECASE)
_MAKE_ROOM = "make room, as df -h shows where, then try again"


@dataclass(frozen=True)
class Migration:
    """What Django knows of one migration."""

    name: str
    applied: bool
    reversible: bool
    atomic: bool
    replaces: list[str]
    incompatible: list[str]  # what the release that is live cannot go on with

    def is_in(self, names: set[str]) -> bool:
        """Whether these name it, or all that it replaces."""
        return names.issuperset(self.replaces or [self.name]) or self.name in names


@dataclass(frozen=True)
class Schema:
    """What Django knows of its migrations and of its database."""

    migrations: list[Migration]
    vendor: str
    file: str  # the one of SQLite
    identity: str
    lock_timeout: str
    invalid: list[str]  # indexes that were not built to their end
    others: list[str]  # the aliases of other databases with migrations
    recorded: list[str]  # the names of all that are applied, of releases that are gone, too
    settled: bool = False  # nothing was left to apply, and [migrate] command has run for all that


def all_names(migrations: Iterable[Migration]) -> set[str]:
    """The names of migrations, and of those that they replace."""
    return {name for each in migrations for name in (each.name, *each.replaces)}


def list_names(migrations: Iterable[Migration]) -> str:
    """The names of migrations, for a sentence."""
    return ", ".join(each.name for each in migrations)


@dataclass(frozen=True)
class Database:
    """The database of the site: its migrations, its backups, and one that is restored beside it."""

    site: Site

    def look(self, release: Release, commands: Sequence[list[str]] = ()) -> Schema:
        """What a release's Django knows of the database; these run if nothing is left to apply."""
        settings, place = self.site.settings, self._limited(self._known(release))
        limit = round(settings.migrate.lock_timeout * 1000)
        path = str(self.site.candidate_socket) if settings.restart.candidate else ""
        told = self.ask_django(place, "list_migrations", bool(self.guarded), commands, limit, path)
        told["migrations"] = [Migration(**each) for each in told["migrations"]]
        return Schema(**told)

    def ask_django(
        self, release: Release, function: str, *arguments: object, timeout: float = 0
    ) -> Any:
        """What a function prints as JSON, in its last line, in a release's own Django."""
        try:
            said = self._in_django(release, function, *arguments, timeout=timeout)
            return json.loads(said.splitlines()[-1])
        except (ValueError, IndexError):
            raise Failure(
                "[migrate] shell did not answer in JSON",
                "it must run the Python that it gets on its stdin, as manage.py shell does",
            ) from None

    @property
    def guarded(self) -> list[list[str]]:
        """[migrate] command, if it can run where Django's schema editor is guarded, or nothing."""
        return self.site.settings.inside_shell(self.site.settings.migrate.command)

    def _limited(self, release: Release) -> Release:
        """The release with a lock timeout for any other command; only PostgreSQL reads it."""
        if self.guarded:
            return release
        limit = f"-c lock_timeout={self.site.settings.migrate.lock_timeout * 1000:.0f}ms"
        options = release.environment.get("PGOPTIONS", "")
        return release.plus({"PGOPTIONS": f"{options} {limit}".strip()})

    def _in_django(
        self,
        release: Release,
        function: str,
        *arguments: object,
        quiet: bool = True,
        timeout: float = 0,
    ) -> str:
        section = self.site.settings.migrate
        with tempfile.TemporaryFile() as file:  # it would pass over a pipe that is empty yet
            file.write(f"{IN_DJANGO}\n{function}{arguments}; gc.freeze()\n".encode())
            file.seek(0)
            return self.site.run(section.shell, release, timeout or section.timeout, quiet, file)

    def migrate(self, release: Release, undo: Sequence[Migration] = ()) -> None:
        """Apply what the database lacks, or undo these; again, while only a lock is in the way."""
        section, rest = self.site.settings.migrate, 1.0
        until = time.monotonic() + section.timeout
        while True:
            try:
                self._change(self._known(release), undo)
                return
            except CommandFailed as error:
                in_the_way = _LOCKED.search("\n".join(error.details))
                if not in_the_way or time.monotonic() + rest > until:
                    raise
                if not all(each.atomic for each in undo or self._left(release)[:1]):
                    raise  # a part of it is done
            say(f"a lock of another transaction was in the way; trying again in {rest:g} s")
            pause(rest)  # the requests that waited behind the migration have their turn
            rest = min(rest * 2, 30.0)

    def _left(self, release: Release) -> list[Migration]:
        known = self.look(release).migrations if self.site.settings.migrate.shell else []
        return [each for each in known if not each.applied]

    def _change(self, release: Release, undo: Sequence[Migration]) -> None:
        section = self.site.settings.migrate
        limit, names = round(section.lock_timeout * 1000), [each.name for each in undo]
        if undo:
            self._in_django(release, "reverse_migrations", names, limit, quiet=False)
        elif self.guarded:
            for words in self.guarded:
                self._in_django(release, "migrate_in_django", words, limit, quiet=False)
        else:
            atomic = all(each.atomic for each in self._left(release))
            place = self._limited(release) if atomic else release
            self.site.run(section.command, place, section.timeout)

    def rehearse(self, release: Release, backup: Path, name: str) -> None:
        """Migrate a database that is restored beside the live one, and say what that takes."""
        section, load = self.site.settings.migrate, self.site.settings.restore.command
        require(
            self.guarded and load,
            "there is no way to rehearse a migration",
            "it takes [migrate] shell, [restore] command, and python manage.py in [migrate] "
            "command; or say rehearse = no",
        )
        self.check_room_to_load(backup)
        with self.site.journal.doing("restore", database=name, frozen=False):
            with open(backup, "rb") as dump:
                self.restore("load", name, dump)
            for words in self.guarded:
                began = time.monotonic()
                try:
                    locks = self.ask_django(release, "rehearse", words, name)
                except CommandFailed as error:
                    error.add_note("that was the rehearsal; the database was not touched")
                    raise
                say(f"rehearsed on a copy of the database in {time.monotonic() - began:.1f} s")
                for table, seconds in locks:
                    if seconds > section.lock_timeout:
                        say(f"note: it keeps {table} locked for {seconds:.1f} s, and requests wait")
            self.restore("drop", name)

    def back_up(self, name: str) -> Path:
        """Write a backup to a file that is whole, and proven, once it has its name."""
        path = self.site.backups / f"{name}.dump"
        partial = path.with_suffix(".part")
        check_room(path.parent)
        with self.site.journal.doing("partial", path=f"backups/{partial.name}"):
            self._dump(partial)
            self.verify(partial)
            partial.replace(path)
            flush(path.parent)
        say(f"backed up: {path} ({path.stat().st_size / 1e6:.1f} MB)")
        self.site.run(self.site.settings.backup.after, self.site.checkout, 600, file=path)
        return path

    def _dump(self, partial: Path) -> None:
        section, place = self.site.settings.backup, self._known(self.site.checkout)
        with open(partial, "wb", opener=owner_only) as file:
            try:
                self.site.run(section.command, place, section.timeout, quiet=True, stdout=file)
                os.fsync(file.fileno())
            except (CommandFailed, OSError):
                require(
                    shutil.disk_usage(partial.parent).free > (1 << 20),
                    "the backup has filled the disk",
                    _MAKE_ROOM,
                )
                raise
        require(
            partial.stat().st_size,
            "the backup is empty",
            "mend [backup] command: it must write the dump to its stdout",
        )

    def verify(self, file: Path) -> None:
        """Failure unless [backup] verify finds that the file on its stdin is a whole backup."""
        section = self.site.settings.backup
        try:
            with open(file, "rb") as dump:
                self.site.run(section.verify, self.site.checkout, section.timeout, True, dump)
        except CommandFailed as error:
            raise Failure(
                f"{file.name} is not a whole backup: {error.what}",
                "see what [backup] command writes",
                details=error.details,
            ) from None

    def restore(self, act: str, database: str, dump: IO[bytes] | None = None) -> str:
        """Run [restore] command for an act on a database beside the live one; what it wrote."""
        section, place = self.site.settings.restore, self._known(self.site.checkout)
        return self.site.run(
            section.command, place, section.timeout, True, dump, act=act, database=database
        )

    def _known(self, place: Release) -> Release:
        return place.plus({"PGAPPNAME": f"deploy.py of {self.site.root}"})

    def end_sessions(self) -> None:
        """End what commands that were cut off, of whichever run, have left at work in it."""
        with contextlib.suppress(Failure):
            self.restore("end", "")

    def invalid_indexes(self) -> str:
        """The statements that drop the indexes which were not built to their end."""
        with contextlib.suppress(Failure):
            return " ".join(self.restore("invalid", "").split())
        return ""

    def check_room_to_load(self, file: Path) -> None:
        """Failure unless there is room beside the database, for as much as there is in a backup."""
        said = [int(number) for number in self.restore("room", "").split()]
        if len(said) == 2:  # it can be seen where the data lies
            needed, free = max(said[0], 4 * file.stat().st_size), said[1]
            require(
                free > needed,
                f"there is no room to load the backup: {free / 1e6:.0f} MB are free where the "
                f"database lies, and {needed / 1e6:.0f} are needed",
                _MAKE_ROOM,
            )

    def count(self, database: str) -> str:
        """How many tables and rows a database has (empty: the live one); Failure if it has none."""
        said = self.restore("count", database)  # a line for each table, its number of rows last
        rows = [int(number) for number in re.findall(r"(?m)(\d+)\D*?$", said)]
        require(rows or not database, "the backup holds no table", "restore another one")
        return f"{plural(len(rows), 'table')} with {plural(sum(rows), 'row')}"


def remove_partial(site: Site, act: Act) -> None:
    """Remove a backup or a virtual environment that was cut off."""
    path = site.workspace / act["path"]
    if path.parent == site.backups:
        site.database.end_sessions()
    shutil.rmtree(path, ignore_errors=True)  # it passes over a file
    path.unlink(missing_ok=True)


def check_room(folder: Path) -> None:
    """Failure unless a backup as large as the largest fits in the folder of them."""
    largest = max((each.stat().st_size for each in folder.glob("*.dump")), default=0)
    needed, free = largest * 1.2 + (16 << 20), shutil.disk_usage(folder).free
    require(
        free > needed,
        f"there is no room for a backup: {free / 1e6:.0f} MB are free in {folder}, "
        f"and {needed / 1e6:.0f} are needed",
        _MAKE_ROOM,
    )


# ------------------------------------------------------------------------------------------- site

MAINTENANCE = ("nginx answers 503 to everyone", "end it: python3 deploy.py maintenance off")
FOREIGN = re.compile(r"GIT_(?!SSH|ASKPASS)|PIPENV_|VIRTUAL_ENV$|PYTHON(PATH|HOME)$|DEPLOY_")
USUAL_PATH = "~/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/snap/bin"


class Site:
    """The checkout with its settings, and the parts that every command works with."""

    def __init__(self, config: Path) -> None:
        self.settings, self.settings_file = read_settings(config), config.resolve()
        self.root = self.settings_file.parent
        self.workspace = (self.root / self.settings.deploy.workspace).resolve()
        self.venvs, self.backups = self.workspace / "venvs", self.workspace / "backups"
        self.logs = self.workspace / "logs"
        self.frozen = self.workspace / "frozen"  # deployments are refused while it is there
        self.maintenance = self.workspace / "maintenance"  # nginx answers 503 while it is there
        self.candidate_mark = self.workspace / "candidate"  # its processes have it open
        self.candidate_socket = self.workspace / "candidate.sock"
        self.lock = Lock(git_folder(self.root))
        self.journal = Journal(self.workspace / "journal.json")
        self.history = History(self.workspace / "history.jsonl")
        self.commands = Commands(self.lock)
        self.git = Git(self.root, self.commands, self.base)
        self.releases = Releases(
            self.workspace,
            self.history,
            self.settings.deploy.project,
            lambda: self.base | self.variables,
        )
        self.database = Database(self)
        self.data_lost = False  # what was in the database is only in a backup
        redactor.hide(secrets_in_url(self.settings.pull.remote))

    @functools.cached_property
    def base(self) -> dict[str, str]:
        """The environment of every command before `.env`, without git's, pipenv's, Python's own."""
        kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        # cron and ssh give a short PATH
        path = f"{kept.get('PATH', '')}:{os.path.expanduser(USUAL_PATH)}".split(":")
        return {"LANG": "C.UTF-8", **kept} | {
            "PATH": ":".join(filter(None, dict.fromkeys(path))),
            "PYTHONUNBUFFERED": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "PIPENV_DONT_LOAD_ENV": "1",
            "PIPENV_NOSPIN": "1",
            "PIPENV_IGNORE_VIRTUALENVS": "1",
            "PIPENV_YES": "1",
            "WORKON_HOME": str(self.venvs),
        }

    @functools.cached_property
    def variables(self) -> dict[str, str]:
        """What `.env` says; its secrets are hidden from now on."""
        found = read_env(self.root / self.settings.env.file)
        hook = found.get(self.settings.notify.webhook, "")
        redactor.hide({*secrets_in(found), hook, re.sub(r"^\w+://[^/]*/?", "", hook)})
        return found

    @functools.cached_property
    def checkout(self) -> Release:
        """The checkout, as a place to run commands in: at its top, wherever manage.py is."""
        return Release(self.root, "", self.root, self.base | self.variables)

    @functools.cached_property
    def hosts(self) -> list[str]:
        """The public names of the site: those of ALLOWED_HOSTS."""
        allowed = self.variables.get("ALLOWED_HOSTS", "")
        return [each for each in re.findall(r"[^,\s]+", allowed) if each != "*"]

    @functools.cached_property
    def health(self) -> HealthCheck | None:
        """The health check, its Host by default the first of ALLOWED_HOSTS; None without a url."""
        section, host = self.settings.health, next(iter(self.hosts), "").lstrip(".")
        return HealthCheck(section, section.host or host) if section.url else None

    def run(
        self,
        lines: CommandLines,
        place: Release,
        timeout: float,
        quiet: bool = False,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
        **words: object,
    ) -> str:
        """Run commands in a release's project, with {words} filled in; what quiet ones wrote."""
        filled = {f"{{{name}}}": str(value) for name, value in words.items()}
        return "\n".join(
            self.commands.run(
                [filled.get(word, word) for word in argv],
                place.project,
                place.environment,
                timeout,
                quiet,
                stdin.fileno() if stdin else subprocess.DEVNULL,
                stdout.fileno() if stdout else subprocess.PIPE,
            )
            for argv in lines
        )

    def check_release(self) -> None:
        """Failure in a release, where nothing seems to be live."""
        if self.root.parent.name == "releases" and (self.root.parents[1] / "current").is_symlink():
            raise Failure(
                f"{self.root} is a release, not the checkout",
                f"run it there: cd {self.lock.path.parents[2]}",
                MISTAKE,
            )

    def check_place(self) -> None:
        """Failure unless this is a checkout, and of the user who runs this."""
        self.check_release()
        require(
            self.lock.path.exists(),
            f"{self.root} is not a git checkout",
            "keep the settings file in the checkout",
            MISTAKE,
        )
        owner, user = (user_name(each) for each in (self.root.stat().st_uid, os.geteuid()))
        command = ("python3", str(SCRIPT), *sys.argv[1:])
        require(
            owner == user,
            f"{self.root} belongs to {owner}, and you are {user}",
            f"run it as its owner: sudo -u {owner} {shlex.join(command)}",
            MISTAKE,
        )

    def prepare(self) -> None:
        """Look at all that can be wrong before the lock is taken, and make the workspace."""
        self.check_place()
        _ = self.variables  # a mistake in it is refused before anything is touched
        os.umask(0o022)  # nginx must be able to read the static files, whoever deploys
        for folder in (self.releases.folder, self.venvs, self.backups, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        (self.workspace / ".gitignore").write_text("*\n", encoding="ascii")
        urls = self.git.ask("config", "--get-regexp", r"^(remote|submodule)\..*url$|^url\.") or ""
        redactor.hide(secrets_in_url(urls))


def freeze_deployments(site: Site, reason: str, until: str = "") -> int:
    """Refuse deployments until `thaw` or a time; rollback still works."""
    site.prepare()
    require(
        not until or until > clock("%Y-%m-%d %H:%M"),
        f"{until} is past",
        "name a time to come",
        USAGE,
    )
    site.frozen.write_text(
        json.dumps(
            {"by": started_by(), "since": clock(), "until": until, "reason": redactor.mask(reason)}
        )
    )
    say(f"deployments are frozen: {reason}; end it: python3 deploy.py thaw")
    return OK


def thaw_deployments(site: Site) -> int:
    """Let deployments go on."""
    site.prepare()
    site.frozen.unlink(missing_ok=True)
    say("deployments go on")
    return OK


def why_frozen(site: Site) -> str:
    """Since when and why deployments are frozen, or nothing."""
    if not site.frozen.exists():
        return ""
    freeze = {"by": "somebody", "since": "some time", "until": "", "reason": "its note is torn"}
    with contextlib.suppress(ValueError, TypeError):  # it was cut off while it was written
        freeze |= json.loads(site.frozen.read_text())
    over = freeze["until"] and freeze["until"] <= clock("%Y-%m-%d %H:%M")
    return "" if over else "since {since} by {by}: {reason}".format_map(freeze)


def freeze_as_before(site: Site, act: Act) -> None:
    """The rollback that froze deployments did not hold."""
    site.frozen.unlink(missing_ok=True)
    if act["before"]:
        site.frozen.write_text(act["before"])


def ask_commands(site: Site, lines: CommandLines, place: Release, timeout: float) -> Answer:
    """Whether commands end well, and what they wrote, or the last of it and how they ended."""
    try:
        return True, site.run(lines, place, timeout, quiet=True)
    except Failure as error:
        return False, error.last if isinstance(error, CommandFailed) else error.what


def ask_checks(site: Site) -> dict[str, Answer]:
    """What the [status] checks find, all at once: their last lines, and whether they ended well."""
    place, section = site.releases.live() or site.checkout, site.settings.status
    # they are many, and users go first
    with site.commands.threads(max(len(section.checks), 1), gentle=True) as pool:
        answers = {
            name: pool.submit(ask_commands, site, lines, place, section.timeout)
            for name, lines in section.checks.items()
        }
    found = {name: answer.result() for name, answer in answers.items()}
    return {
        name: (good, said.rpartition("\n")[2] or "it ended with status 0")
        for name, (good, said) in found.items()
    }


def ask_health(site: Site) -> Answer:
    """Whether the site answers its health check now, and what was seen."""
    return site.health.wait(0) if site.health else (True, "not asked: [health] url is empty")


def check_health(site: Site, release: Release) -> None:
    """Failure unless the site answers its health check, from this release, and all else is well."""
    check_service(site, release)
    check_status(site)


def check_service(site: Site, release: Release) -> None:
    """Failure unless the site answers its health check, and its service runs in this release."""
    if site.health:
        good, saw = site.health.wait(site.settings.health.deadline)
        require(good, f"the site is not healthy: {saw}", "mend it and push")
        say(f"the site answers: {saw}")
    if process := site.settings.restart.main_process:
        number, place = site.run(process, release, 20, quiet=True).strip(), "no folder to be seen"
        with contextlib.suppress(OSError):
            place = os.readlink(f"/proc/{number}/cwd")
        require(
            place == str(release.project.resolve()),
            f"the service runs in {place}, not in {release.folder}",
            f"its unit must run in {site.releases.current}, as your own user",
        )


def check_status(site: Site) -> None:
    """Failure unless the [status] checks find all well."""
    bad = _sick(site)
    require(not bad, f"not all is well: {bad}", "see: python3 deploy.py status")


def _sick(site: Site, again: bool = True) -> str:
    """The [status] checks that find something wrong, with what they saw."""
    answers = ask_checks(site).items()
    bad = ", ".join(f"{name}: {saw}" for name, (good, saw) in answers if not good)
    if bad and again:
        pause(2)  # one that was only slow is asked once more
        return _sick(site, again=False)
    return bad


def what_is_live(site: Site) -> Answer:
    """Whether all is as it should be, asked for now, and what is live."""
    live, stuck = site.releases.live_name(), ", ".join(act["act"] for act in site.journal.stuck)
    good, saw = ask_health(site)
    sick = _sick(site) if live and good else ""
    if not live:
        good, what = True, "no release is live yet"
    elif live not in site.releases.healthy():
        good, what = False, f"{live} is live, never was healthy, and nothing was live before it"
    elif not good or sick:
        good, what = False, f"{live} is live and NOT healthy: {sick or saw}"
    else:
        what = f"{live} is live{' and healthy' if site.health else ''}"
    if stuck:
        what += f"; {stuck} was left half way: run this again, which puts it right first"
    return good and not stuck and not site.data_lost, what


# ---------------------------------------------------------------------------- files of the server

UNITS, NGINX, SUDOERS = Path("/etc/systemd/system"), Path("/etc/nginx"), Path("/etc/sudoers.d")
SERVICE, TIMER = (
    ("gunicorn.socket", "gunicorn.service", "gforms-recover.service"),
    ("gforms-deploy.service", "gforms-deploy.timer"),
)
SETUP = f"sudo python3 {SCRIPT} setup"
SECURE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # sudo's own PATH
CERTBOT = "managed by Certbot"


@dataclass(frozen=True)
class Placed:
    """A file that set-up places: its text, its rights, and a command that judges it beforehand."""

    path: Path
    text: str
    mode: int = 0o644
    check: tuple[str, ...] = ()

    def difference(self) -> list[str]:
        """What differs in its place; of a file that Certbot manages, only the lines it lacks."""
        old, lines = text_of(self.path), self.text.splitlines()
        if CERTBOT in old:
            return [line for line in lines if line.strip() not in old]
        return [*difflib.unified_diff(old.splitlines(), lines, "now", "then", lineterm="")]


def text_of(path: Path) -> str:
    """The text of a file; nothing when it is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def sites_in_the_way(site: Site) -> list[Path]:
    """The files of nginx that are in use for a public name of the site, and the default one."""
    hosts = "|".join(map(re.escape, site.hosts))
    same = re.compile(rf"server_name[^;]*\s({hosts})[\s;]")
    return [
        each
        for each in sorted(NGINX.glob("sites-enabled/*"))
        if same.search(text_of(each)) or (each.name == "default" and CERTBOT not in text_of(each))
    ]


def files_to_place(site: Site, timer: bool) -> list[Placed]:
    """The units, the rights and nginx's site, as they are to be; whoever asks need not be root."""
    names = [*SERVICE, *TIMER] if timer else [*SERVICE]
    workers = [f"{argv[-1]}.service" for argv in site.settings.restart.after if "systemctl" in argv]
    # what a checkout need not have
    names += [
        each for each in ("system.slice", *workers) if (site.root / "systemd" / each).exists()
    ]
    units = {name: _fill_in(site, f"systemd/{name}") for name in names}
    standby = re.sub(r"(?ms)^\[Install\]$.*?(?=^\[|\Z)", "", units["gunicorn.service"])
    units["gunicorn-standby.service"] = re.sub(
        r"(?m)^(Description=.*)", r"\1, stand-by during a restart", standby
    )
    rights = SUDOERS / re.sub(r"\W", "-", f"{site.root.name}-deploy")
    sites = [each.resolve() for each in sites_in_the_way(site) if CERTBOT in text_of(each)]
    sites.append(NGINX / "sites-available/gforms.conf")
    return [
        *(Placed(UNITS / name, text) for name, text in units.items()),
        Placed(rights, _sudo_rights(site), 0o440, ("visudo", "--check", "--file")),
        Placed(sites[0], _fill_in(site, "nginx/gforms.conf")),
    ]


def _fill_in(site: Site, name: str) -> str:
    text, owner = text_of(site.root / name), pwd.getpwuid(site.root.stat().st_uid)
    require(text, f"{site.root / name} is not there", "commit it, beside deploy.py", MISTAKE)
    root, current = (re.escape(str(path)) for path in (site.root, site.releases.current))
    shared = [f"-{site.root / each}" for each in site.settings.deploy.shared if each.endswith("/")]
    for pattern, ours in (
        (r"/home/ubuntu/gforms", str(site.root)),
        (rf"ReadWritePaths=-{root}/.*", f"ReadWritePaths={' '.join(shared)}"),
        (rf"{root}/\.env$", str(site.root / site.settings.env.file)),
        (rf"{root}/\.deploy/", f"{site.workspace}/"),
        (rf"{current}(?=/\.venv/|$)", str(site.releases.current / site.settings.deploy.project)),
        (r"server_name gforms\.example\.com;", f"server_name {' '.join(site.hosts)};"),
        (r"^User=.*", f"User={owner.pw_name}"),
        (r"^Group=.*", f"Group={grp.getgrgid(owner.pw_gid).gr_name}"),
    ):
        text = re.sub(pattern, ours, text, flags=re.MULTILINE)
    return text


def _sudo_rights(site: Site) -> str:
    text = f"# What [restart] of {site.settings_file} runs.\n"
    for _, _, name, *arguments in site.settings.restart.sudo():
        words = " ".join(re.sub(r"([\\,:=*?!\[\] ])", r"\\\1", word) for word in arguments) or '""'
        program = shutil.which(name, path=SECURE_PATH) or f"/usr/sbin/{name}"
        text += f"{site.root.owner()} ALL=(root) NOPASSWD: {program} {words}\n"  # "": no argument
    return text


def drift(site: Site) -> list[str]:
    """Which files on the server are not as the checkout has them: one sentence, or none."""
    # a project without the shipped files has its own; and an owner may have no name
    with contextlib.suppress(Failure, OSError, KeyError):
        files = files_to_place(site, timer=(UNITS / TIMER[1]).exists())
        found = [str(each.path) for each in files if each.mode == 0o644 and each.difference()]
        return [f"not as this checkout has them: {', '.join(found)}"] if found else []
    return []


# -------------------------------------------------------------------------------------- candidate

# what nginx answered below 400, and anybody may ask for once more
_ASKED = re.compile(
    r'"GET (?!/static/|/media/)(?!\S*(?:(?:log|sign)[-_]?out|delete|remove))'
    r'(/[^ ?"\\]*) HTTP/[\d.]+" [1-3]\d\d ',
    re.IGNORECASE,
)


class Candidate:
    """A release's own gunicorn on a private socket, which must answer before any user sees it."""

    def __init__(self, site: Site, release: Release) -> None:
        self._site, self._socket = site, site.candidate_socket
        self._tail: deque[str] = deque(maxlen=TAIL)
        self.act = site.journal.begin("candidate")
        argv = [
            word.replace("{socket}", str(self._socket))
            for word in site.settings.restart.candidate[0]
        ]
        # it does not inherit the lock, for it would never end after a killed deployer; but the next
        # run knows it by this file, which it and all its workers have open
        with open(site.candidate_mark, "w", encoding="ascii") as mark:
            self.child = Child(
                argv, release.project, release.environment, [self._keep_line], (mark.fileno(),)
            )
            self.child.give_way()

    def _keep_line(self, line: str) -> None:
        self._tail.append(f"| {redactor.mask(line)}")
        log.debug(f"| {line}", extra={"step": "candidate"})

    def await_boot(self) -> None:
        """Wait until it accepts connections, with --preload after its import; else Failure."""

        def booted() -> bool:
            if self.child.ended(0):
                raise self.failure("it does not start")
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(self._socket)) == 0

        limit = self._site.settings.restart.timeout
        if not wait_until(booted, limit):
            raise self.failure(f"it has not started after {limit:g} s")

    def prove(self, health: HealthCheck) -> None:
        """Have it answer the health check, or Failure."""
        self.await_boot()
        good, saw = health.wait(health.of.deadline, self._socket, lambda: not self.child.ended(0))
        if not good:
            raise self.failure(saw)
        say(f"the candidate answers: {saw}")

    def rehearse(self, health: HealthCheck) -> None:
        """Failure if it cannot answer what users ask for most, and the live release can."""
        section, until = health.of, time.monotonic() + health.of.deadline
        try:
            with open(section.log, "rb") as lines:
                lines.seek(max(os.fstat(lines.fileno()).st_size - (4 << 20), 0))
                asked = Counter(_ASKED.findall(lines.read().decode("ascii", "replace")))
        except OSError as error:
            say(f"no rehearsal: {section.log} cannot be read: {error.strerror}")
            return

        def status(path: str, unix: Path | None) -> int:
            with contextlib.suppress(Failure):
                return ask(
                    "/".join(section.url.split("/")[:3]) + path,
                    health.headers,
                    min(section.timeout, until - time.monotonic()),
                    unix=unix,
                )[0]
            return 0

        broken = [
            path
            for path, _ in asked.most_common(section.rehearse)
            if not 0 < status(path, self._socket) < 500 and 0 < status(path, None) < 400
        ]
        require(
            not broken,
            f"the candidate cannot answer what the live release can: {', '.join(broken)}",
            "mend it and push",
        )

    def failure(self, saw: str) -> Failure:
        """That it was not proven, and why, as far as its last lines tell."""
        errors = [line[2:202] for line in self._tail if re.match(r"\| [A-Za-z][\w.]*: ", line)]
        saw += f" ({errors[-1]})" if errors else ""
        return Failure(
            f"the candidate was not proven: {saw}",
            details=["the candidate's last lines:", *self._tail] if self._tail else (),
        )


def end_candidates(site: Site, _act: Act) -> None:
    """End every candidate, with SIGKILL: after SIGTERM one might remove the socket of the next."""

    def gone() -> bool:
        found = list(holders(site.candidate_mark))
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not found

    wait_until(gone, GRACE)  # again and again: one that boots may just have forked
    for path in (site.candidate_socket, site.candidate_mark):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------- traffic

_TOLD = re.compile(r"\A(\w+)\.(?!candidate\.).*\.request\.(?:duration:(\d+\.?\d*)\||status\.5)")


@dataclass
class Answers:
    """What users got of one release."""

    times: list[float] = field(default_factory=list)  # of each request, in milliseconds
    errors: int = 0  # those with a status of 500 or more

    def __str__(self) -> str:
        times = sorted(self.times) or [0.0]
        return (
            f"{plural(len(self.times), 'request')}, {plural(self.errors, 'error')}, "
            f"median {times[len(times) // 2]:.0f} ms, longest {times[-1]:.0f} ms"
        )

    def worse_than(self, other: Answers) -> bool:
        """Whether its share of errors is clearly greater than that of one that was asked, too."""
        return self.errors > max(2, len(self.times) * (2 * other.errors / len(other.times) + 0.02))


class Traffic:
    """What users get of the old release and of the new one, as gunicorn.conf.py has it told."""

    def __init__(self, file: Path) -> None:
        self.old, self.new = Answers(), Answers()
        told: dict[str, Any] = {"port": 0, "tokens": []}
        with contextlib.suppress(OSError, ValueError, TypeError):
            told |= json.loads(file.read_bytes())
        # several: while deployments fail, the old release goes on with the one that it began with
        tokens = [*told["tokens"][-9:], os.urandom(16).hex()]
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind(("127.0.0.1", told["port"]))
        except OSError:  # its number is 0 then, and the next run has another one
            say(f"another program has port {told['port']}: what users get now is not counted")
        port = self._socket.getsockname()[1]
        file.touch(0o600)  # whoever knows a token has a say
        file.write_text(json.dumps({"port": port, "token": tokens[-1], "tokens": tokens}))
        sides = {**dict.fromkeys(tokens, self.old), tokens[-1]: self.new}
        threading.Thread(target=self._count, args=(sides,), daemon=True).start()

    def _count(self, sides: Mapping[str, Answers]) -> None:
        while True:
            for token, took in _TOLD.findall(self._socket.recv(1024).decode("ascii", "replace")):
                answers = sides.get(token, Answers())  # what anybody else says counts for nothing
                if took:
                    answers.times.append(float(took))
                else:
                    answers.errors += 1

    def watch(self, seconds: float, enough: float = math.inf) -> None:
        """Wait so long, if users ask; Failure if they get clearly more errors of the new one."""
        if seconds and self.old.times:
            wait_until(
                lambda: len(self.new.times) >= enough or self.new.worse_than(self.old), seconds
            )
            require(
                not self.new.worse_than(self.old),
                f"users get more errors of the new release ({self.new}) "
                f"than of the old one ({self.old})",
                "mend it and push",
            )


# ----------------------------------------------------------------------------------- what changed


def say_changes(run: Run, before: str) -> None:
    """Say what the release of this run changed against the one before it, a line each."""
    if not before:
        return
    site, release = run.site, run.release
    old = site.releases.open(site.releases.folder / before)
    between = f"{old.revision or release.revision}...{release.revision}"
    marked = site.git("log", "--left-right", "--format=%m%h %s", between).splitlines()
    commits = [f"commit {'taken back ' if line[:1] == '<' else ''}{line[1:]}" for line in marked]
    was, now = _packages(old), _packages(release)
    moved = [
        f"package {name}: {was.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted(was | now)
        if was.get(name) != now.get(name)
    ]
    migrations = [f"migration {each.name}" for each in run.migrated]
    # where there is no service, there was no set-up either
    has_service = (UNITS / SERVICE[1]).exists()
    differs = [f"{each}; run: {SETUP}" for each in (drift(site) if has_service else ())]
    for line in (*shortened(commits), *migrations, *shortened(moved), *differs):
        say(line)


def _packages(release: Release) -> dict[str, str]:
    """The packages of a Pipfile.lock with their versions, or what stands in place of one."""
    lock = release.project / "Pipfile.lock"
    found = json.loads(lock.read_bytes())["default"] if lock.is_file() else {}
    return {
        name: str(each.get("version") or each.get("ref")).removeprefix("==")
        for name, each in found.items()
    }


# ---------------------------------------------------------------------------------- notifications


def notify(site: Site, entry: Entry) -> None:
    """Tell the journal of systemd, the webhook and the command of [notify] of an entry."""
    section, text = site.settings.notify, clean(_announcement(site, entry))
    _tell_journal(section.journal, entry, text)
    # all, if this one could not be written
    entries = takewhile(entry.__ne__, site.history.entries())
    before = [each for each in entries if each.command == entry.command]
    recovered = any(each.failed() for each in before[-1:])
    wanted = section.on == "always" or (section.on == "recovery" and recovered)
    if not entry.failed() and not wanted:
        return
    if section.webhook:
        try:
            _post(site, {"text": text, "content": text, "details": asdict(entry)})
        except Failure as why:
            log.warning(f"the webhook was not told: {why}")
    for argv in section.command:
        attempt(site.run, ((*argv, text),), site.checkout, section.timeout, True)


def _announcement(site: Site, entry: Entry) -> str:
    """An entry of the history as one sentence, no longer than Discord takes."""
    what = entry.message or f"{entry.release} is live, {entry.subject}"
    said = (f"{entry.command} {entry.result}", what, entry.state, f"by {entry.by}", entry.started)
    place = (site.health and site.health.host) or socket.gethostname()
    return f"{place}: {'; '.join(filter(None, said))}"[:2000]


def _post(site: Site, payload: Mapping[str, object]) -> None:
    section = site.settings.notify
    require(
        section.webhook in site.variables, f"no {section.webhook} in {site.settings.env.file}", ""
    )
    url, data = site.variables[section.webhook], json.dumps(payload).encode()
    status, reason, _ = ask(url, {"Content-Type": "application/json"}, section.timeout, data)
    require(200 <= status < 300, f"it answered {status} {reason}", "")


def _tell_journal(path: str, entry: Entry, text: str) -> None:
    """One structured entry for systemd's journal, where there is one, in its native protocol."""
    told = {
        "MESSAGE": text,
        "PRIORITY": "3" if entry.failed() else "6",
        "SYSLOG_IDENTIFIER": "deploy",
        "DEPLOY_COMMAND": entry.command,
        "DEPLOY_RESULT": entry.result,
        "DEPLOY_RELEASE": entry.release,
        "DEPLOY_REVISION": entry.revision,
        "DEPLOY_BY": entry.by,
    }
    lines = "".join(f"{name}={' '.join(value.split())}\n" for name, value in told.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.setblocking(False)
        journal.sendto(lines.encode("utf-8", "replace"), path)


# ---------------------------------------------------------------------------------------- the run


class Run:
    """One run under the lock: what it works on, how long its steps take, and how it ends."""

    def __init__(self, site: Site, command: str, asked: str) -> None:
        self.site, self.command, self.asked = site, command, asked
        self.resumed = site.lock.started  # by the version of this program that this one replaces
        self.started, self._began = self.resumed or clock(STAMP), time.monotonic()
        self.at: str | None = (
            None  # the commit of the branch that is to be deployed, instead of its newest
        )
        self.release, self.revision = site.checkout, ""  # until there is a candidate
        self.trouble = ""  # with the remote, of a run that only looks for something new
        self.migrated: list[Migration] = []
        self.candidate: Candidate | None = None
        self.static: futures.Future[Any] | None = None  # begun beside the services
        self.traffic: Traffic | None = None
        self._durations: dict[str, float] = {}
        self._entries: list[Entry] = []  # of the history, still to be told
        self._log: Path | None = None

    def recover(self) -> None:
        """Note who runs; take back what a run that was cut off had begun, and say what it was."""
        site, journal = self.site, self.site.journal
        while not self.resumed and (site.logs / f"{self.started}.log").exists():
            pause(0.1)  # the run before began in this very second
            self.started = clock(STAMP)
        journal.load()
        left = defaultdict(str, {key: str(value) for key, value in journal.run.items()})
        journal.run = {}
        journal.save(
            command=self.command,
            started=self.started,
            step="its start",
            by=started_by(),
            since=clock(),
            pid=os.getpid(),
        )
        self._log = site.logs / f"{self.started}.log"
        start_logging(self._log)
        if self.resumed or not left:
            return
        console.hidden = False
        say("found: a {command} by {by} was cut off at {step}".format_map(left))
        keys = ("command", "by", "started", "release", "revision")
        self.record("cut off", **{key: left[key] for key in keys})
        site.git.remove_stale_locks()
        if any(act["act"] in ("migrate", "reversal", "restore") for act in journal.begun):
            STEPS["services"](self)  # after a power cut, the database may be down
        for told in take_back(site):
            say(told)
        if any(act["act"] == "restore" for act in journal.stuck):  # all that follows makes it worse
            journal.check_done()

    def work_on(self, release: Release) -> None:
        """This is the release that the run is about."""
        self.release, self.revision = release, release.revision
        self.site.journal.save(release=release.name, revision=release.revision)

    def step(self, name: str) -> None:
        """Take one step, with its hooks, and say how long it took."""
        console.hidden = False
        site, section, began = self.site, vars(self.site.settings)[name], time.monotonic()
        site.journal.save(step=name)
        before = [entry.steps.get(name, 0.0) for entry in site.history.went_live()[-10:]]
        times = sorted(filter(None, before))
        with console.step(name, times[len(times) // 2] if times else 0):
            if vars(section).get("command") == () and name != "restart":
                say("skipped: its command is empty")
                return
            try:
                with site.commands.giving_way(name in ("pull", "install", "static")):
                    site.run(section.before, self.release, 600)
                    STEPS[name](self)
                    if name != "restart":  # which has its own place for them
                        site.run(section.after, self.release, 600)
            finally:
                self._durations[name] = round(time.monotonic() - began, 3)
            log.info(f"done in {self._durations[name]:.1f} s")

    def start_candidate(self) -> None:
        """Have the release's own gunicorn boot on its private socket, unless it does so already."""
        if self.site.settings.restart.candidate and not self.candidate:
            self.candidate = Candidate(self.site, self.release)

    def end_candidate(self) -> None:
        """It has been proven, or what it booted with is not what will be there."""
        if self.candidate:
            end_candidates(self.site, self.candidate.act)
            self.candidate.child.process.wait()
            self.site.journal.end(self.candidate.act)
            self.candidate = None

    def commit(self, result: str, message: str = "") -> None:
        """What this run did is done for good; say what is live, if that is what it changed."""
        health, releases = self.site.health, self.site.releases
        with shielded():  # what is recorded is not taken back any more
            self.record(result, message)
            attempt(self._remove_what_is_past_its_keep)
            if result not in ("live", "restarted"):
                return
            self.site.journal.stuck.clear()  # whatever it was, a release is live and healthy
            console.label = "deploy"
            if result == "live":
                attempt(say_changes, self, releases.linked(releases.previous))
            what = f"{self.release.name} is live{' and healthy' if health else ''}"
            see = f"; see {health.address()}" if health else ""
            if self.site.maintenance.exists():
                log.warning("; ".join(MAINTENANCE))
            say(f"{what}; it took {time.monotonic() - self._began:.1f} s{see}")

    def fail(self, error: BaseException) -> Failure:
        """Take back what was begun; the failure, with what is live now."""
        console.hidden = False
        failure = as_failure(error)
        for told in take_back(self.site):
            failure.add_note(told)
        good, failure.live = what_is_live(self.site)
        if not good:
            failure.status = NEEDS_HUMAN
        result = "interrupted" if isinstance(error, Interrupted) else "failed"
        attempt(self.record, result, failure.message(), failure.live)
        return failure

    def close(self) -> None:
        """Notify of what the history has of this run; a log of nothing is not kept."""
        with shielded():
            for entry in self._entries:
                attempt(notify, self.site, entry)
        if self._log and not self._entries:
            self._log.unlink(missing_ok=True)

    def inputs(self) -> str:
        """A fingerprint of all that makes a deployment another one than the last."""
        inputs = repr((self.revision, self.site.variables, self.site.settings))
        return hashlib.sha256(inputs.encode()).hexdigest()

    def record(self, result: str, message: str = "", state: str = "", **changes: Any) -> None:
        """Write this run's entry of the history; one of success commits all that was begun."""
        counts = self.command == "deploy" and self.revision and not self.asked
        answers = [self.traffic.old, self.traffic.new] if self.traffic else []
        entry = Entry(
            command=self.command,
            result=result,
            started=self.started,
            by=started_by(),
            ended=clock(),
            release="" if self.release is self.site.checkout else self.release.name,
            revision=self.revision,
            subject=clean(self.site.git.subject(self.revision)),
            seconds=round(time.monotonic() - self._began, 3),
            steps=dict(self._durations),
            message=clean(message),
            state=clean(state),
            live=self.site.releases.live_name(),
            inputs=self.inputs() if counts and result in ("live", "failed") else "",
            requests=sum(len(each.times) for each in answers),
            errors=sum(each.errors for each in answers),
            slowest=round(max((0.0, *(time for each in answers for time in each.times))) / 1000, 3),
        )
        self._entries.append(replace(entry, **changes))
        if result in FAILURES:
            self.site.history.record(self._entries[-1])
        else:
            self.site.journal.commit(self._entries[-1], self.site.history)

    def _remove_what_is_past_its_keep(self) -> None:
        site, keep, backups = self.site, self.site.settings.deploy, self.site.settings.backup.keep
        for folder in site.releases.past_keep(keep.keep_releases):
            attempt(site.git.remove_worktree, folder)
        site.git.ask("worktree", "prune")  # what a release that was removed by hand left there
        left = site.releases.folder.iterdir()
        used = {(each / keep.project / ".venv").resolve() for each in left}
        for venv in set(site.venvs.iterdir()) - used:
            shutil.rmtree(venv)
        for files, count in (
            (site.backups.glob(f"{RUN}-*.dump"), backups),  # those made before a change
            (site.backups.glob(f"{RUN}.dump"), backups),  # those made by hand or by cron
            (site.logs.glob(f"{RUN}.log"), keep.keep_logs),
        ):
            for file in site.history.oldest_first(files, self.started)[:-count]:
                file.unlink()


# -------------------------------------------------------------------------------------- the steps

COMPOSE = "*compose*.y*ml"  # the files that describe the services, as git matches paths
RELOCK = "run pipenv lock, commit Pipfile.lock and push"
# What a lock file (of pipenv, uv, poetry, pip) takes from the release's own folder, or may.
LOCAL = re.compile(
    r"""(?mx) "(path|editable)": | "file":\ "(?!https?:) | =\ \{\ (path|editable|directory)\ =
    | ^type\ =\ "(file|directory)" | ^(-[erc]\b|--(editable|requirement|constraint)\b)
    | ^(\.|/|file:|[\w.-]+/) | @\ *(\.|/|file:)"""
)
UNBUILT = re.compile(r"[Ff]ailed (?:to build|building wheel for) [`'\"]?([^\s`'\"]+)")
CAUSE = re.compile(r"\b\w*(?:[Ee]rror|Exception): (?!subprocess-|failed-|Failed to |Command ).+")
LAST_WORDS = re.compile(r"\S.*(?=\s*(?:\[end of output\]|note: This error originates))")


def read_environment(run: Run) -> None:
    """Step 1: .env, which was read before anything was touched."""
    say(f"{plural(len(run.site.variables), 'variable')} in {run.site.settings.env.file}")


def pull(run: Run) -> None:
    """Step 2: fetch, fast-forward the checkout, check the revision out into a folder of its own."""
    site, section = run.site, run.site.settings.pull
    revision = run.revision or _fetch(run)
    if not run.asked:
        site.git.check_fast_forward(section.branch, f"{section.remote}/{section.branch}", revision)
    folder = site.releases.folder / f"{run.started}-{revision[:7]}"
    run.work_on(site.releases.open(folder, revision))
    site.journal.begin("release", name=folder.name)
    site.git("worktree", "add", "--quiet", "--detach", str(folder), revision, timeout=600)
    if (folder / ".gitmodules").exists():
        site.git("submodule", "update", "--init", "--recursive", folder=folder, timeout=600)
    for name in site.settings.deploy.shared:
        link_shared(site.root, folder, name)
    say(f"{run.asked or section.branch} is {revision[:7]}: {site.git.subject(revision)}")
    if not run.asked:
        _follow(run)


def _fetch(run: Run) -> str:
    """Fetch the branch, or everything when a revision was asked for; the full hash of that."""
    git, section = run.site.git, run.site.settings.pull
    # every branch, though the checkout may have been cloned for one
    every = ["--tags", "--force", "--prune", "refs/heads/*:refs/deploy/*"]
    what = every if run.asked else [f"refs/heads/{section.branch}"]
    for left in reversed(range(section.retries + 1)):
        try:
            git("fetch", "--quiet", section.remote, *what, timeout=section.timeout)
            break
        except CommandFailed as error:
            if not left:
                raise _why_not_fetched(run, error) from None
        say("git fetch failed; trying again")
        pause(2.0 * (section.retries - left + 1))
    asked = [f"refs/deploy/{run.asked}", run.asked]
    found = git.commit(*(asked if run.asked else ["FETCH_HEAD"]))
    require(
        found,
        f"there is no revision {run.asked}",
        "name a branch, a tag or a commit that was pushed",
    )
    return _commit_to_deploy(run, run.at, found) if run.at else found


def _commit_to_deploy(run: Run, asked: str, head: str) -> str:
    """The commit of --at: one of the branch, and none that is older than what is live."""
    git, live = run.site.git, run.site.releases.live()
    if asked == "ssh":  # with a key that may only deploy, it stands in what was asked for
        words = re.findall(r"\b[0-9a-f]{40}\b", os.environ.get("SSH_ORIGINAL_COMMAND", ""))
        asked = " and ".join(sorted(set(words))) or "no commit"
    commit = git.commit(asked)
    require(
        commit and git.holds(head, commit),
        f"{asked} is not on the branch {run.site.settings.pull.branch}",
        "push it there, or name the whole hash of a commit that is",
    )
    newer = live and live.revision not in ("", commit) and git.holds(live.revision, commit)
    require(
        not newer,
        f"{commit[:7]} is older than what is live",
        "deploy the newest, or go back: python3 deploy.py rollback",
    )
    return commit


def _why_not_fetched(run: Run, error: CommandFailed) -> Failure:
    git, pull = run.site.git, run.site.settings.pull
    remote, branch, limit = pull.remote, pull.branch, pull.timeout
    if remote not in git("remote").split() and not re.search("[/:]", remote):
        return Failure(f"the checkout has no remote {remote}", f"git remote add {remote} URL")
    if git.ask("ls-remote", "--quiet", remote, timeout=limit) is None:
        return Failure(
            f"the remote {remote} cannot be reached, or refuses this server's key",
            f"try: git ls-remote {remote}",
            details=error.details,
        )
    if not run.asked and not git.ask("ls-remote", remote, f"refs/heads/{branch}", timeout=limit):
        return Failure(f"the remote {remote} has no branch {branch}", "mend [pull] branch")
    return error


def remove_release(site: Site, act: Act) -> None:
    """Remove the folder of a release that never went live."""
    folder = site.releases.folder / Path(act["name"]).name
    if folder.name != site.releases.live_name():  # nothing was live before it: a human looks at it
        attempt(site.git.remove_worktree, folder)  # if it stays, a later run removes it


def _follow(run: Run) -> None:
    """Fast-forward the checkout; if that brings another version of this program, become it."""
    site, folder = run.site, run.release.folder
    running = {os.path.relpath(path, site.root): path for path in (SCRIPT, site.settings_file)}
    changed = site.git.changed("HEAD", run.revision) & set(running)
    if changed:  # before the checkout follows: a tool that cannot start could never pull its cure
        tool, ini = (folder / name if name in changed else running[name] for name in running)
        trial = [sys.executable, str(tool), "-c", str(ini), "history"]
        try:
            site.commands.run(trial, folder, site.base, 60, quiet=True)
        except CommandFailed as error:
            raise Failure(
                "the deploy.py or the settings file of this revision does not work",
                status=MISTAKE,
                details=error.details,
            ) from None
    site.git.fast_forward(site.journal, run.revision)
    if changed and not run.resumed:
        console.line = None  # on a terminal, the new version takes this step anew
        say("deploy.py or its settings changed: starting over as the new version")
        take_back(site)
        Signals.check()  # the new version knows nothing of a signal that came before it
        site.lock.hand_over(run.started)
        os.execv(sys.executable, [sys.executable, str(SCRIPT), *sys.argv[1:]])


def install(run: Run) -> None:
    """Step 3: the packages of the lock file, in the virtual environment that belongs to it."""
    site, project = run.site, run.release.project
    python, lock = find_python(site, project), project / site.settings.install.lock
    asked = text_of(project / "Pipfile")  # a lock that is stale must not find what it once made
    made_of = repr((lock.read_bytes(), python, site.settings.install.command)) + asked
    if LOCAL.search(lock.read_text(encoding="utf-8", errors="replace")):
        made_of += run.release.name  # another release's code would be in it
    key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    venv = site.venvs / f"{python.name}-{key}"
    if (venv / ".complete").exists():
        say(f"nothing to install: the environment of this {lock.name} is complete")
    else:
        _build(run, venv, python)
    (project / ".venv").symlink_to(os.path.relpath(venv, project.resolve()))
    run.work_on(site.releases.open(run.release.folder, run.revision))


def _build(run: Run, venv: Path, python: Path) -> None:
    section, site = run.site.settings.install, run.site
    place = run.release.plus(
        {
            "PIPENV_CUSTOM_VENV_NAME": venv.name,
            "PIPENV_DEFAULT_PYTHON_VERSION": str(python),
            "UV_PROJECT_ENVIRONMENT": str(venv),
            "UV_PYTHON": str(python),
            "VIRTUAL_ENV": str(venv),
            "PATH": f"{venv}/bin:{run.release.environment['PATH']}",
            "COLUMNS": "300",  # or pipenv breaks what went wrong into lines of 80
        }
    )
    shutil.rmtree(venv, ignore_errors=True)
    with site.journal.doing("partial", path=f"venvs/{venv.name}"):
        try:
            site.run(section.command, place, section.timeout, python=python, venv=venv)
        except CommandFailed as error:
            check_lock(site, place, error.details)
            raise _why_not_built(error) from None
        os.sync()  # a power cut must not leave the mark of one whose files are empty
        (venv / ".complete").touch()
        flush(venv)


def check_lock(site: Site, place: Release, details: Sequence[str] = ()) -> None:
    """Failure if pipenv, when it is what installs, takes the lock for a stale one."""
    section = site.settings.install
    if "pipenv" not in [argv[0] for argv in section.command]:
        return
    try:  # told apart by asking, not by the message
        site.run((("pipenv", "verify"),), place, section.timeout, quiet=True)
    except CommandFailed:
        stale = "Pipfile.lock is stale: it was not made of this Pipfile"
        raise Failure(stale, RELOCK, details=details) from None


def _why_not_built(error: CommandFailed) -> Failure:
    """The package that cannot be built and the cause, which stand far above the last line."""
    package = UNBUILT.search(error.output)
    if not package:
        return error
    cause = CAUSE.search(error.output) or LAST_WORDS.search(error.output)
    return Failure(
        f"the package {package[1]} cannot be built: {cause[0][:300] if cause else error.last}",
        "install what it needs on the server, or lock a version that needs no building",
        details=error.details,
    )


def find_python(site: Site, project: Path) -> Path:
    """The real path of the Python that the settings or Pipfile.lock ask for."""
    section, lock, wanted = site.settings.install, project / site.settings.install.lock, ""
    remedy = RELOCK if lock.name == "Pipfile.lock" else "commit it and push, or mend [install] lock"
    require(lock.is_file(), f"this revision has no {section.lock}", remedy)
    if lock.name == "Pipfile.lock":
        try:
            requires = json.loads(lock.read_bytes())["_meta"].get("requires", {})
            wanted = requires.get("python_version", "")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Failure("Pipfile.lock is not a lock file", RELOCK) from None
    name = section.python or f"python{wanted or 3}"
    path = shutil.which(name, path=site.base["PATH"]) or ""
    other = "mend [install] python" if section.python else "name one that is here in the Pipfile"
    require(path, f"{name} is not on this server", f"sudo apt-get install {name}, or {other}")
    if section.python and wanted:  # which pipenv would take instead, and say nothing
        version = (path, "-c", "import sys; print(*sys.version_info[:2], sep='.')")
        found = site.commands.run(version, site.root, site.base, 60, quiet=True)
        require(
            found == wanted,
            f"[install] python is Python {found}, and the Pipfile asks for {wanted}",
            "empty [install] python, or change python_version in the Pipfile and run pipenv lock",
        )
    return Path(path).resolve()


def start_services(run: Run) -> None:
    """Step 4: database and cache are up, as this revision describes them."""
    site, before = run.site, services_revision(run.site)
    new = run.revision if run.command == "deploy" else ""  # else they stay as they are
    revision = new or before
    if before and site.git.changed(before, revision, "--", COMPOSE):
        site.journal.begin("services", revision=before)
    with contextlib.ExitStack() as unless_it_fails:
        pool = unless_it_fails.enter_context(site.commands.threads(1, step="static"))
        if new and site.settings.static_follows_services():
            run.static = pool.submit(_collect_in_shell, site, run.release)
        run_services(site, revision)
        unless_it_fails.pop_all()


def services_revision(site: Site) -> str:
    """The revision whose services are up: the last deployed, though it was rolled back."""
    live = [each.revision for each in site.history.deployments() if each.result == "live"]
    return site.git.commit(*live[-1:])


def run_services(site: Site, revision: str) -> None:
    """Run [services] command in the checkout, which has a revision's compose files meanwhile."""
    section = site.settings.services
    if not revision or not site.git.changed("HEAD", revision, "--", COMPOSE):
        site.run(section.command, site.checkout, section.timeout)
        return
    act = site.journal.begin("compose", revision=revision)
    try:
        site.git.apply(revision, COMPOSE)
        site.run(section.command, site.checkout, section.timeout)
    finally:
        with shielded():
            own_compose_files(site, act)
            site.journal.end(act)


def own_compose_files(site: Site, act: Act) -> None:
    """The checkout has its own compose files again, each of those that were changed."""
    for name in site.git.changed("HEAD", act["revision"], "--", COMPOSE):
        with contextlib.suppress(CommandFailed):  # this one was not changed, or not yet
            site.git.apply(act["revision"], name, "--reverse")


def restore_services(site: Site, act: Act) -> str:
    """Have the services as the revision before describes them."""
    run_services(site, act["revision"])
    return f"put the services back to what {act['revision'][:7]} describes"


def collect_static(run: Run) -> None:
    """Step 5: collectstatic, into the candidate's own folder, where nginx finds it."""
    run.end_candidate()  # in another order of the steps, it has booted without its static files
    site, section = run.site, run.site.settings.static
    told: list[Any] = []
    if site.settings.inside_shell(section.command):
        log.info(f"$ {'; '.join(map(shlex.join, section.command))}")
        with contextlib.suppress(CommandFailed):  # it is run by itself, then, and tells why
            told = run.static.result() if run.static else _collect_in_shell(site, run.release)
    if not told:
        site.run(section.command, run.release, section.timeout)
    if site.settings.migrate.shell:
        ask = site.database.ask_django
        _hold_to_nginx(run, *(told or ask(run.release, "list_settings", [])))


def _collect_in_shell(site: Site, release: Release) -> Any:
    """Collect static files in the start of Django that tells what _hold_to_nginx asks."""
    section, ask = site.settings.static, site.database.ask_django
    commands = site.settings.inside_shell(section.command)
    with site.commands.giving_way():
        return ask(release, "list_settings", commands, timeout=section.timeout)


def _hold_to_nginx(run: Run, url: str, static_root: str, media_root: str, debug: str) -> None:
    """Have static files and uploads where nginx/gforms.conf looks, or say what to write."""
    folder, project, nginx = run.release.folder, run.release.project, "nginx/gforms.conf"
    roots = (static_root, media_root)
    if debug:
        log.warning("Django's DEBUG is on: visitors see settings and source")
    static, media = places = [(project / root).resolve() for root in roots]
    for root, place, name in zip(roots, places, ("staticfiles", "media"), strict=True):
        link = folder / name
        if root and place != link.resolve() and (link.is_symlink() or not link.exists()):
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(place, folder))
    served = url.startswith("/") and text_of(folder / nginx)  # else another server has them
    require(
        not served or f" {url} {{" in served,
        f"{nginx} has no location for STATIC_URL = {url!r}",
        "write STATIC_URL = '/static/' in Django's settings and push",
    )
    require(
        not served or (static == (folder / "staticfiles").resolve() and folder in static.parents),
        f"STATIC_ROOT is {static}, where nginx does not look, or which releases share",
        "write STATIC_ROOT = BASE_DIR / 'staticfiles' in Django's settings and push",
    )
    require(
        not media_root or not (media.is_relative_to(folder) or folder.is_relative_to(media)),
        f"MEDIA_ROOT is {media}: what is uploaded there would end with its release",
        f"write {os.path.relpath(media, folder)}/ into [deploy] shared and push",
    )


def migrate(run: Run) -> None:
    """Step 6: if a migration is planned, back the database up and migrate."""
    database, planned = run.site.database, []
    run.start_candidate()  # it boots while the migrations are listed
    if run.site.settings.migrate.shell:
        with run.site.commands.giving_way(), futures.ThreadPoolExecutor() as pool:
            which = pool.submit(database.restore, "which", "")
            schema = database.look(run.release, database.guarded)
        _check_database(run.site, schema, run.release, which)
        planned = [each for each in schema.migrations if not each.applied]
        _tell_of_risks(run, schema, planned)
        if not planned:
            say("nothing to migrate")
            if run.candidate:
                run.candidate.await_boot()
            if not schema.settled:  # Django notes what is squashed, and tells the project
                database.migrate(run.release)
            return
    say(f"to be applied: {list_names(planned) or 'unknown, because [migrate] shell is empty'}")
    change_schema(run, "migrate", run.release, planned=[each.name for each in planned])
    run.migrated = planned


def _check_database(
    site: Site, schema: Schema, release: Release, which: futures.Future[str]
) -> None:
    """Failure unless this is the database, the only one, that is backed up and not lost."""
    migrate, backup, live = site.settings.migrate, site.settings.backup, site.releases.live_name()
    named = " ".join(chain(*migrate.before, *migrate.command, *migrate.after))
    others = [each for each in schema.others if not re.search(rf"\b{re.escape(each)}\b", named)]
    require(
        not others,
        f"{', '.join(others)} of DATABASES can have migrations, and only default is backed up and "
        "migrated",
        "do both in [migrate] before, or have a router's allow_migrate say no",
    )
    require(
        not live or any(each.applied for each in schema.migrations),
        f"the database is empty, though {live} is live: it was lost, or is another one",
        "compare .env and docker volume ls; to fill a new one: python3 deploy.py restore FILE "
        "--yes, or: python3 deploy.py manage migrate",
    )
    require(
        not schema.file or release.folder not in (release.project / schema.file).resolve().parents,
        f"the database is {schema.file}: what is written there would end with its release",
        "move it into a folder of [deploy] shared, in Django's settings too, and push",
    )
    require(
        schema.vendor == "postgresql" or not re.search("pg_dump|postgresql", str(backup.command)),
        f"Django's database is {schema.vendor}, and [backup] command backs PostgreSQL up",
        "say there how yours is, or nothing",
    )
    if schema.identity and backup.command and site.settings.restore.command:
        try:
            seen = which.result().strip()
        except CommandFailed as error:
            log.warning(f"whether what is backed up is what Django uses is unknown: {error.what}")
            return
        require(
            seen in (schema.identity, ""),
            "the database that is backed up is not the one that Django uses",
            "compare the database's variables in .env with [backup] and [restore] command",
        )


def _tell_of_risks(run: Run, schema: Schema, planned: Iterable[Migration]) -> None:
    section, live = run.site.settings.migrate, run.site.releases.live_name()
    unlimited = schema.vendor == "postgresql" and schema.lock_timeout == "0"
    if unlimited and not run.site.database.guarded:
        log.warning("lock_timeout does not reach the database: OPTIONS or a pooler hold it up")
    for each in planned:
        if not each.reversible:
            say(f"note: {each.name} cannot be reversed")
        if each.incompatible and live:
            what = f"{each.name}: {'; '.join(each.incompatible)}"
            require(
                section.incompatible == "tell",
                f"{live} cannot go on after {what}",
                "deploy a release that does without it first, or say [migrate] incompatible = tell",
            )
            say(f"note: {what}; {live} cannot go on with that")


def change_schema(
    run: Run, act: str, release: Release, undo: Sequence[Migration] = (), **facts: object
) -> None:
    """Back up, then apply what a release knows, or undo some of it: nothing undone without one."""
    database = run.site.database
    if run.candidate:  # what cannot be imported never touches the database
        run.candidate.await_boot()
    wanted, name = run.site.settings.backup.command or undo, f"{run.started}-{release.revision[:7]}"
    backup = str(database.back_up(name)) if wanted else ""
    if backup and run.site.settings.migrate.rehearse and not undo:
        database.rehearse(release, Path(backup), f"rehearsal_{run.started.lower()}")
    run.site.journal.begin(act, release=release.name, backup=backup, **facts)
    database.migrate(release, undo)
    run.end_candidate()  # it has booted on the schema before


def tell_of_migrations(site: Site, act: Act) -> str:
    """Say which migrations were applied; reverse them if [migrate] says so."""
    release = site.releases.open(site.releases.folder / act["release"])
    told, stays = "which migrations were applied is unknown", "the schema stays as it is"
    site.database.end_sessions()
    try:
        schema = site.database.look(release)
        known = schema.migrations
        done = [each for each in known if each.name in act["planned"] and each.applied]
        left = [each for each in known if each.name in act["planned"] and not each.applied]
        told = (
            f"migrations applied: {list_names(done) or 'none'}; "
            f"not applied: {list_names(left) or 'none'}"
        )
        for index in schema.invalid:
            told += f"; an index was not built to its end: DROP INDEX CONCURRENTLY {index}"
        if done and site.settings.migrate.reverse_on_failure:
            check_reversible(done)
            site.database.migrate(release, undo=done)
            stays = "those applied were reversed"
    except Failure as error:
        stays += f": {error.what}"
    if act["backup"]:
        stays += (
            "; the database before it all comes back with: "
            f"python3 deploy.py restore {act['backup']} --yes"
        )
    return f"{told}; {stays}"


def check_reversible(migrations: Iterable[Migration]) -> None:
    """Failure unless every one of these migrations can be reversed."""
    fixed = list_names(each for each in migrations if not each.reversible)
    require(
        not fixed,
        f"no migration was reversed, because {fixed} cannot be",
        "write a migration that undoes it",
    )


def prove_candidate(run: Run) -> None:
    """Have the candidate answer the health check, before any user sees it."""
    run.start_candidate()
    if run.candidate and run.site.health:
        run.candidate.prove(run.site.health)
        if run.command == "deploy" and run.site.settings.health.rehearse:
            run.candidate.rehearse(run.site.health)
    run.end_candidate()


def restart(run: Run) -> None:
    """Step 7: prove the candidate, switch to it, restart gunicorn, check the health of the site."""
    site, section, releases = run.site, run.site.settings.restart, run.site.releases
    prove_candidate(run)
    os.sync()  # a power cut must not leave a release live whose files are empty
    old, older = releases.live_name(), releases.linked(releases.previous)
    traffic = run.traffic = Traffic(site.workspace / "statsd")
    act = site.journal.begin("switch", to=run.release.name, old=old, older=older)
    releases.switch(run.release.name, older if run.release.name == old else old)
    has_standby = len(section.command) > 2
    # while the old gunicorn has not stopped; not on disk, for after a kill that is not known
    act["way_back"] = section.command[-1:] if has_standby else section.command
    site.run(section.command[:1], run.release, section.timeout)
    bake = section.bake if has_standby and run.command == "deploy" else 0
    traffic.watch(bake, enough=200)
    del act["way_back"]
    site.run(section.command[1:], run.release, section.timeout)
    check_service(site, run.release)
    site.run(section.after, run.release, 600)  # before it is asked how the workers are
    check_status(site)
    traffic.watch(min(bake, 2))
    if traffic.old.times or traffic.new.times:
        say(f"the new release answered {traffic.new}; the one before {traffic.old}")


def go_back(site: Site, act: Act) -> str | None:
    """Make the release before live again: switch, restart, and check the health of the site."""
    of_old = [each.result for each in site.history.entries() if each.release == act["old"]]
    if not act["old"] or (of_old and "live" not in of_old):  # that one never answered
        return "there is no earlier release to go back to"
    section, place = site.settings.restart, site.releases.open(site.releases.folder / act["old"])
    say(f"going back to {place.name}")
    site.releases.switch(place.name, act["older"])
    # the site itself is asked whether a failure matters; the next run takes the whole way
    for argv in (*act.pop("way_back", section.command), *section.after):
        attempt(site.run, (argv,), place, section.timeout)
    check_health(site, place)
    return None


def has_changed(run: Run) -> bool:
    """Whether the branch, .env or the settings are not those of the last deployment."""
    try:
        run.revision = _fetch(run)
    except Failure as failure:
        if run.at:
            raise
        run.trouble = f"{failure.what}; {failure.remedy}"  # the remote is away: no news
        return False
    last = [entry.inputs for entry in run.site.history.entries() if entry.inputs]
    return last[-1:] != [run.inputs()]


def report_health(run: Run) -> int:
    """The exit status when nothing is deployed; what is wrong, the remote, too, is said once."""
    good, saw = ask_health(run.site)
    sick = "" if good else f"the site is not healthy: {saw}"
    if good and (bad := _sick(run.site)):
        sick = f"not all is well: {bad}"
    wrong = "; ".join(filter(None, (run.trouble, sick)))
    last = (run.site.history.deployments() or [Entry()])[-1]
    known = last.message if last.result == "unhealthy" else ""
    if known != clean(wrong):
        console.hidden = False
        found = wrong or "the site is healthy again"
        say(f"nothing was deployed, and {found}; see: python3 deploy.py status")
        run.record("unhealthy" if wrong else "healthy", wrong)
    return NEEDS_HUMAN if sick else FAILED if wrong else OK


# ----------------------------------------------------------------------------------- rolling back


def compare_schemas(run: Run, reverse_migrations: bool) -> None:
    """Say which migrations separate two releases; back up and reverse them if asked to."""
    site, older = run.site, run.release
    newer = site.releases.live() or older  # if none is live, the database must be as it knows it
    say(f"from {site.releases.live_name() or 'nothing'} to {older.name}")
    run.start_candidate()  # it boots while the two schemas are compared
    console.label = "migrate"
    try:
        known, applied = _list_both(site.database, older, newer)
    except Failure as error:
        if reverse_migrations:
            raise
        log.warning(f"which migrations separate them is unknown: {error}")
        return
    has, needs = all_names(applied), all_names(known)
    lacking = list_names(each for each in known if not each.applied and not each.is_in(has))
    require(
        not lacking,
        f"{older.name} needs {lacking}, which the database lacks",
        f"deploy it instead: python3 deploy.py deploy {run.revision[:7]}",
    )
    between = [each for each in applied if not each.is_in(needs)]
    apart = f"{newer.name} has {list_names(between) or 'no migration'} more than {older.name}"
    if reverse_migrations and between:
        check_reversible(between)
        squashed = [each for each in between if needs.intersection(each.replaces)]
        squashed += [each for each in known if not each.is_in(has)]
        require(
            not squashed,
            f"no migration was reversed, because {list_names(squashed)} was squashed in between, "
            "and its tables would go",
            "roll back without --reverse-migrations",
        )
        say(f"{apart}, to be reversed")
        site.journal.save(step="migrate")
        change_schema(run, "reversal", newer, between)
    else:
        say(f"{apart}; the schema stays{', see --reverse-migrations' if between else ''}")


def _list_both(
    database: Database, older: Release, newer: Release
) -> tuple[list[Migration], list[Migration]]:
    """What the older release knows, and what is applied of what the newer one knows."""
    schema = database.look(older)
    known = schema.migrations
    if all(each.applied for each in known) and all_names(known).issuperset(schema.recorded):
        return known, known  # there is nothing that only the newer one could tell
    return known, [each for each in database.look(newer).migrations if each.applied]


def apply_again(site: Site, act: Act) -> str | None:
    """Apply again what a rollback reversed, if the release that needs it is live after all."""
    live = site.releases.live()
    if not live or live.name != act["release"]:
        return None
    lost = list_names(each for each in site.database.look(live).migrations if not each.applied)
    if not lost:
        return None
    site.database.migrate(live)
    site.data_lost = True
    return (
        f"{lost} was reversed and applied again, because {live.name} is live; what was in its "
        f"columns is only in the backup: python3 deploy.py restore {act['backup']} --yes"
    )


# ----------------------------------------------------------------------------- backup and restore


def back_up(site: Site, as_json: bool = False, wait: float = 0) -> int:
    """Back the database up."""
    with transaction(site, "backup", wait) as run:
        console.label, console.hidden = "backup", as_json  # its stdout is one line of JSON then
        path = site.database.back_up(run.started)
        run.commit("backed up", str(path))
    if as_json:
        made = {"file": str(path), "bytes": path.stat().st_size, "started": run.started}
        console.show(json.dumps(made))
    return OK


def restore_backup(
    site: Site, file: Path, yes: bool = False, test: bool = False, wait: float = 0
) -> int:
    """Put a backup in the place of the database, which is backed up."""
    file = file.absolute()
    require(file.is_file(), f"there is no file {file}", f"name one of those in {site.backups}")
    require(
        yes or test,
        f"{file} would replace the database, which would be backed up first and take no "
        "writes meanwhile; nothing was done",
        "say --yes if you mean it; --test changes nothing",
        USAGE,
    )
    with transaction(site, "restore", wait) as run:
        console.label = "restore"
        site.journal.save(step="restore")
        site.database.verify(file)
        say(f"restoring {file} beside the database")
        site.database.check_room_to_load(file)
        name, facts = f"restore_{run.started.lower()}", ("frozen", "swapped", "sick")
        act = site.journal.begin("restore", database=name, **dict.fromkeys(facts, False))
        with open(file, "rb") as dump:
            for told in site.database.restore("load", name, dump).splitlines():
                say(f"note: {told}")
        holds, before = site.database.count(act["database"]), site.database.count("")
        say(f"the backup holds {holds}; the database {before}")
        if not test:
            _exchange(run, act)
        end_restore(site, act)
        site.journal.end(act)
        run.commit("tested" if test else "restored", str(file))
        now = "can be restored; nothing was changed" if test else "is the database now"
        say(f"{file} {now}")
    return OK


def _exchange(run: Run, act: Act) -> None:
    """Put the restored database in the live one's place; back again if the site is not well."""
    site, database, live = run.site, run.site.database, run.site.releases.live()
    check_room(site.backups)
    say("from now on the database takes no writes; reads go on")
    act["frozen"] = True
    site.journal.save()
    database.restore("freeze", act["database"])
    saved = database.back_up(f"{run.started}-restore")
    act["swapped"] = True
    site.journal.save()
    with shielded():  # what follows takes a moment, and is not left half done
        try:
            database.restore("swap", act["database"])
            if live:
                check_health(site, live)
        except Failure as error:
            act["sick"] = True
            error.add_note(f"the database before it is backed up, too: {saved}")
            raise
        act["swapped"] = False  # it stays, whatever happens from now on
        site.journal.save()
    with contextlib.suppress(Failure):
        known = database.look(live).migrations if live else []
        if lacking := list_names(each for each in known if not each.applied):
            say(f"note: the restored database lacks {lacking}; python3 deploy.py applies them")


def end_restore(site: Site, act: Act) -> None:
    """Have a database live that the site is well with, and takes writes; drop the one beside it."""
    site.database.end_sessions()
    if act.get("swapped"):
        if _is_sick(site, act):
            site.database.restore("back", act["database"])
        act["swapped"] = False  # what is live now stays, for it takes writes
        site.journal.save()
    if act["frozen"]:
        site.database.restore("thaw", act["database"])
    site.database.restore("drop", act["database"])


def _is_sick(site: Site, act: Act) -> bool:
    live = site.releases.live()
    if live and not act["sick"]:
        try:
            check_health(site, live)
        except Failure as failure:
            say(f"{failure.what} with the restored database; the one before it comes back")
            return True
    return bool(act["sick"])


def restart_everything(site: Site, wait: float = 0) -> int:
    """Restart everything: services, nginx, gunicorn."""
    with transaction(site, "restart", wait) as run:
        live = site.releases.live()
        if not live:
            raise Failure("there is nothing to restart", "deploy first: python3 deploy.py")
        run.work_on(live)
        run.step("services")
        console.label = "restart"
        site.run(site.settings.restart.proxy, live, site.settings.restart.timeout)
        run.step("restart")  # last: it ends with a look whether all is well
        run.commit("restarted")
    return OK


# ------------------------------------------------------------------------------------- the tables

STEPS: dict[str, Callable[[Run], None]] = {
    "env": read_environment,
    "pull": pull,
    "install": install,
    "services": start_services,
    "static": collect_static,
    "migrate": migrate,
    "restart": restart,
}
SERVICES = ("compose", "services")  # the acts of step 4
# each may be called again; it says what was done if the user should know, or raises Failure
UNDO: dict[str, Callable[[Site, Act], str | None]] = {
    "record": finish_record,
    "fast-forward": undo_fast_forward,
    "candidate": end_candidates,
    "partial": remove_partial,
    "services": restore_services,
    "compose": own_compose_files,
    "release": remove_release,
    "migrate": tell_of_migrations,
    "switch": go_back,
    "reversal": apply_again,
    "freeze": freeze_as_before,
    "restore": end_restore,
}


# ---------------------------------------------------------------------------------------- looking

DAY = 86_400  # seconds
ROOM = 1 << 30  # bytes of disk that must be free
Finding = tuple[object, str, str]  # whether it is so, what is wrong then, and its remedy


def preview(site: Site, asked: str) -> int:
    """Say what a deployment would do; nothing is started that changes anything."""
    site.check_place()
    revision = _look_ahead(site, asked)
    say(
        f"would deploy {revision[:7]} ({asked or site.settings.pull.branch}); "
        f"live is {site.releases.live_name() or 'nothing'}; nothing is changed now"
    )
    own = {
        "env": [f"read {plural(len(site.variables), 'variable')}"],
        "pull": [
            f"git fetch {site.settings.pull.remote}",
            f"git worktree add {site.releases.folder}/…",
        ],
    }
    for name in site.settings.deploy.steps:
        step = vars(site.settings)[name]
        commands = [*step.before, *vars(step).get("command", ()), *step.after]
        lines = [*map(shlex.join, commands), *own.get(name, [])]
        for line in lines or ["nothing: its command is empty"]:
            say(line, name)
    say(f"ask for {site.settings.health.url or 'nothing'}", "health")
    return OK


def _look_ahead(site: Site, asked: str = "") -> str:
    """The revision that would be deployed; Failure if its lock or its Python is missing."""
    section, install = site.settings.pull, site.settings.install
    remote, branch = section.remote, asked or section.branch
    refs = (f"heads/{branch}", f"tags/{branch}^{{}}", f"tags/{branch}")  # ^{}: a tag's commit
    answers = (
        site.git.ask("ls-remote", "--", remote, f"refs/{ref}", timeout=section.timeout)
        for ref in refs
    )
    revision = next(filter(None, answers), "").partition("\t")[0] or site.git.commit(asked)
    require(
        revision, f"{remote} has no {branch}, or cannot be reached", f"try: git ls-remote {remote}"
    )
    with tempfile.TemporaryDirectory() as folder:  # all that git fetches goes there, too
        away = {"GIT_INDEX_FILE": f"{folder}/.index", "GIT_OBJECT_DIRECTORY": folder}
        away["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(site.git.folder / "objects")
        git, project = Git(site.root, site.commands, site.base | away), Path(folder, "tree")
        if not site.git.commit(revision):
            seen = ("--no-tags", "--no-write-fetch-head", "--refmap=", "--", remote, branch)
            git("fetch", "--quiet", *seen, timeout=section.timeout)
        project.mkdir()
        git(f"--work-tree={project}", "read-tree", "--reset", "-u", revision, timeout=600)
        project /= site.settings.deploy.project
        if install.command and "install" in site.settings.deploy.steps:
            find_python(site, project)
            check_lock(site, Release(project, revision, project, site.base))
    return revision


def _ask_all(site: Site, holder: str) -> dict[str, Answer]:
    """What is asked about the site and all that it needs, each with its answer."""
    answers = {"health": ask_health(site), **ask_checks(site)}
    free = shutil.disk_usage(site.root).free
    answers["disk"] = free >= ROOM, f"{free / 1e9:.1f} GB free"
    for found in drift(site):
        answers["set-up"] = True, f"{found}; run: {SETUP}"
    if why := why_frozen(site):
        answers["frozen"] = True, f"{why}; end it: python3 deploy.py thaw"
    for name, (is_so, what, remedy) in _find_left(site, holder).items():
        if is_so:
            answers[name] = False, f"{what}; {remedy}"
    return answers


def _find_left(site: Site, holder: str) -> dict[str, Finding]:
    """What somebody has to end, or a run that was cut off has left."""
    site.journal.load()
    acts = ", ".join(act["act"] for act in site.journal.begun) or "nothing"
    return {
        "maintenance": (site.maintenance.exists(), *MAINTENANCE),
        "unfinished": (
            site.journal.run and not holder,
            f"a {site.journal.run.get('command')} was cut off, or could not take back: {acts}",
            "the next run puts it right: python3 deploy.py restart",
        ),
    }


def show_status(site: Site, as_json: bool = False) -> int:
    """What is live, and whether it and all that it needs is well."""
    site.check_release()
    live, holder = site.releases.live_name(), site.lock.holder(site.journal)
    entry, answers = site.history.last(live or "-"), _ask_all(site, holder)
    healthy = live != "" and all(good for good, _ in answers.values())
    if as_json:
        found = {key: vars(entry)[key] or None for key in ("revision", "subject", "ended", "by")}
        found |= {"release": live or None, "healthy": healthy, "lock": holder}
        checks = {key: {"good": good, "saw": clean(saw)} for key, (good, saw) in answers.items()}
        console.show(json.dumps(found | {"checks": checks}, indent=2))
    else:
        rows: dict[str, str] = {
            "live": f"{live or 'nothing'}  {entry.subject}".rstrip(),
            "since": f"{entry.ended}, deployed by {entry.by}" if entry.ended else "unknown",
            **{key: f"{'good' if good else 'BAD'}: {saw}" for key, (good, saw) in answers.items()},
            **{key: f"note: {answers[key][1]}" for key in ("set-up", "frozen") if key in answers},
            "lock": holder or "free",
        }
        for key, text in rows.items():
            console.show(clean(f"{key:<11} {text}"))
    return OK if healthy else FAILED


def show_history(site: Site, as_json: bool = False) -> int:
    """The runs, newest last, with the time that each step took."""
    for entry in site.history.entries():
        console.show(json.dumps(asdict(entry)) if as_json else _row(entry))
    return OK


def _row(entry: Entry) -> str:
    what = [each for each in (entry.command, entry.result) if each not in ("deploy", "live")]
    what = what if entry.failed() else what[-1:]  # restarted, backed up, restored
    place = entry.by.rpartition(", ")[2].split(" ")[0]
    row = (
        f"{entry.started}  {' '.join(what) or 'live':<11}  {entry.revision[:7]:<7}  "
        f"{entry.seconds:6.1f} s  {place:<8}  "
    )
    if console.terminal:
        width = shutil.get_terminal_size().columns - 1
        return fit(clean(f"{row}{_bar(entry.steps, width // 8)}  {entry.subject}"), width)
    took = " ".join(f"{step} {seconds:.1f}" for step, seconds in entry.steps.items())
    return clean(f"{row}{entry.subject}{f'  ({took})' if took else ''}")


def _bar(steps: Mapping[str, float], width: int) -> str:
    """The steps' shares of their time, each drawn with its first letter; of static a capital."""
    whole = sum(steps.values()) or 1
    drawn = "".join(
        ("S" if step == "static" else step[:1]) * round(took / whole * width)
        for step, took in steps.items()
    )
    return drawn[:width].ljust(width)


def show_logs(site: Site, release: str = "", follow: bool = False) -> int:
    """The log of a run, by default the newest."""
    site.check_release()
    started = release.split("-")[0]
    found = [each for each in site.logs.glob("*.log") if each.name.startswith(started)]
    require(found, "there is no such log", "history shows the deployments that there were")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    with open(newest, encoding="utf-8", errors="replace") as lines:
        following = True
        while following:
            following = follow and bool(site.lock.holder(site.journal))
            for line in lines:
                console.show(clean(line.rstrip("\n")))
            pause(0.3 if following else 0)
    return OK


def maintenance(site: Site, state: str) -> int:
    """Have nginx answer 503 to everyone, or let users in again."""
    site.prepare()
    if state == "on":
        site.maintenance.touch()
    else:
        site.maintenance.unlink(missing_ok=True)
    console.show(f"maintenance is {state}")
    return OK


def run_manage(site: Site, arguments: Sequence[str]) -> int:
    """manage.py of the live release, in its environment."""
    site.check_release()
    live = site.releases.live()
    if not live:
        raise Failure("nothing is live yet", "deploy first: python3 deploy.py")
    os.chdir(live.project)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.execvpe("python", ["python", "manage.py", *arguments], dict(live.environment))


def check_server(site: Site, quiet: bool = False) -> int:
    """Is this server ready to deploy, and is all well? With remedies."""
    bare = Release(site.root, "", site.root, site.base)  # the checkout, whatever is in its .env
    problems = _worded("problem", _find_problems(site, bare))
    advice: list[str] = []
    if not problems and not quiet:
        advice = ["ready to deploy", *_worded("advice", _find_advice(site, bare))]
    for line in problems + advice:
        console.show(clean(line))
    return FAILED if problems else OK


def _worded(kind: str, findings: Iterable[Finding]) -> list[str]:
    return [f"{kind}: {what}; {remedy}" for is_so, what, remedy in findings if is_so]


def _find_problems(site: Site, bare: Release) -> Iterator[Finding]:
    """What would make a deployment fail, as far as it can be known beforehand; and alarms."""
    remote, branch = site.settings.pull.remote, site.settings.pull.branch
    looks: tuple[Callable[[], object], ...] = (
        site.check_place,
        lambda: site.variables,
        lambda: _look_ahead(site),
        lambda: site.git.check_fast_forward(branch, f"{remote}/{branch}", "HEAD"),
    )
    for look in looks:
        try:
            look()
        except Failure as error:
            yield True, "; ".join((error.what, *error.details)), error.remedy
    yield from _find_missing(site, bare)
    yield from [
        *(
            (
                not (site.root / name).exists(),
                f"[deploy] shared {name} is not in {site.root}",
                "put it there, or mend the setting",
            )
            for name in site.settings.deploy.shared
            if not name.endswith("/") and name != site.settings.env.file
        ),
        (
            site.releases.current.is_symlink() and not site.releases.live_name(),
            f"{site.releases.current} leads to no release that is there",
            "deploy: python3 deploy.py",
        ),
        (
            shutil.disk_usage(site.root).free < ROOM,
            "less than 1 GiB of disk space is free",
            "make room, as with docker system prune",
        ),
    ]
    with contextlib.suppress(Failure):  # of `.env`, which was said
        yield from ((True, found, f"run: {SETUP}") for found in drift(site))
        yield from _find_alarms(site)


def _find_missing(site: Site, bare: Release) -> Iterator[Finding]:
    """The programs and rights that a deployment needs and this user lacks."""
    commands = (("git",), *site.settings.step_commands(), *site.settings.restart.proxy)
    programs = dict.fromkeys(
        argv[0]
        for argv in commands
        if argv[0] not in ("python", "{python}", "pip")  # those of the environment
    )
    there = [each for each in programs if shutil.which(each, path=site.base["PATH"])]
    for tool in programs:
        remedy = INSTALLED_BY.get(tool, "install it")
        yield tool not in there, f"{tool} is not installed, or not in PATH", remedy
    docker = (("docker", "compose", "version"), ("docker", "ps", "--quiet"))
    tries = (argv for argv in (*docker, *site.settings.restart.sudo("--list")) if argv[0] in there)
    for argv in tries:
        good, saw = ask_commands(site, (argv,), bare, 60)
        remedy = f"sudo python3 {SCRIPT} setup, then log in again"
        yield not good, f"`{shlex.join(argv)}` says: {saw}", remedy
    for folder in filter(Path.exists, (site.root, site.workspace)):
        remedy = f"sudo chown -R {user_name(os.geteuid())} {folder}"
        yield not os.access(folder, os.W_OK), f"{folder} cannot be written to", remedy


def _find_alarms(site: Site) -> list[Finding]:
    """What is wrong now, although a deployment would succeed."""
    webhook, debug = site.settings.notify.webhook, site.variables.get("DEBUG", "")
    live, holder = site.releases.live_name(), site.lock.holder(site.journal)
    good, saw = ask_health(site) if live else (True, "")
    sick = _sick(site) if live and not holder else ""  # a deployment restarts what is asked
    last = (site.history.deployments() or [Entry()])[-1]
    return [
        (
            not good,
            f"the site is not healthy: {saw}",
            "see journalctl -u gunicorn, and python3 deploy.py logs",
        ),
        (sick, f"not all is well: {sick}", "see: python3 deploy.py status"),
        *_find_left(site, holder).values(),
        (
            debug.lower() in ("true", "yes", "on", "1"),
            "DEBUG is on: visitors see settings and source",
            "DEBUG=False in .env, then deploy",
        ),
        (
            site.git.ask("check-ignore", "--quiet", site.settings.env.file) is None,
            f"git does not ignore {site.settings.env.file}: its secrets may end in a commit",
            "add it to .gitignore; git rm --cached, and new secrets, if it is in one already",
        ),
        (
            webhook and webhook not in site.variables,
            f"[notify] webhook names {webhook}, which {site.settings.env.file} does not have",
            "write it there",
        ),
        (
            last.failed() and last.revision,  # one of a revision that is not there changed nothing
            f"the last deployment, {last.started}: {last.result}, {last.message}",
            "mend it and push",
        ),
        _look_at_certificate(site),
    ]


def _look_at_certificate(site: Site) -> Finding:
    import ssl

    name = next((each.lstrip(".") for each in site.hosts), "localhost")
    try:
        with (
            socket.create_connection(("127.0.0.1", 443), 5) as raw,
            ssl.create_default_context().wrap_socket(raw, server_hostname=name) as tls,
        ):
            ends = str((tls.getpeercert() or {})["notAfter"])
    except (ConnectionError, TimeoutError):
        return False, "the site is not served over HTTPS", "sudo certbot --nginx"
    except OSError as error:  # SSLError is one
        return True, f"browsers refuse the certificate: {error}", "sudo certbot --nginx"
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / DAY
    return days < 14, f"the certificate ends in {days:.0f} days", "sudo certbot renew"


def _find_advice(site: Site, bare: Release) -> list[Finding]:
    """What a careful operator would mend."""
    live, section = site.releases.live(), site.settings.check
    passed, saw = ask_commands(site, section.command, live, section.timeout) if live else (True, "")
    ages = [time.time() - each.stat().st_mtime for each in site.backups.glob("*.dump")]
    backed_up = not site.settings.backup.command or min(ages, default=math.inf) < 2 * DAY
    listening = ask_commands(site, (("ss", "-Hltn"),), bare, 10)[1]
    outside = r"(?m)^LISTEN +\d+ +\d+ +(?!127\.|\[::ffff:127\.|\[::1\])\S+:(\d+)"
    ports = set(map(int, re.findall(outside, listening)))
    apt = (("apt-config", "dump", "APT::Periodic::Unattended-Upgrade"),)
    known, updates = ask_commands(site, apt, bare, 10)
    invalid = site.database.invalid_indexes()
    return [
        (not passed, f"Django says: {saw}", "see python3 deploy.py manage check --deploy"),
        (
            not backed_up,
            "there is no backup of the last two days",
            "have cron make one every night: see docs/database.md",
        ),
        (bool(invalid), "an index was not built to its end", invalid),
        (
            443 not in ports,
            "the site is not served over HTTPS",
            "sudo certbot --nginx: see docs/server.md",
        ),
        *(
            (
                True,
                f"port {port} is open to every address",
                "bind it to 127.0.0.1, or close it in the firewall",
            )
            for port in sorted(ports - {22, 80, 443})
        ),
        (
            known and '"1"' not in updates,
            "security updates do not install themselves",
            "sudo apt-get install unattended-upgrades",
        ),
    ]


# ----------------------------------------------------------------------------------------- set-up

PACKAGES = {
    "git": "git",
    "sudo": "sudo",
    "nginx": "nginx",
    "pipenv": "pipenv",
    "docker": "docker.io",
    "setfacl": "acl",
}


class Server:
    """The server of the checkout: what is changed on it, as root, and how that is undone."""

    def __init__(self, site: Site, dry_run: bool) -> None:
        self.site, self.dry_run, self.user = site, dry_run, site.root.owner()
        self.as_owner = ("sudo", "-Hu", self.user, "--")
        self.changes, self.undo = 0, contextlib.ExitStack()  # puts it back when a later part fails

    def ask(self, *argv: str, quiet: bool = True) -> str:
        """What a command wrote, run as root; Failure when it fails."""
        environment = self.site.base | {"DEBIAN_FRONTEND": "noninteractive"}
        return self.site.commands.run(argv, self.site.root, environment, 3600, quiet)

    def holds(self, *argv: str) -> bool:
        """Whether a command ends with status 0."""
        with contextlib.suppress(Failure):
            self.ask(*argv)
            return True
        return False

    def change(self, *argv: str, undo: Sequence[str] = ()) -> None:
        """Run a command that changes something, and know its undo; a dry run only says it."""
        self.changes += 1
        if self.dry_run:
            say(f"$ {shlex.join(argv)}")
            return
        if undo:
            self.undo.callback(self.holds, *undo)
        self.ask(*argv, quiet=False)

    def place(self, file: Placed) -> None:
        """Put a file in its place if it differs, with what was there kept beside it."""
        path, difference = file.path, file.difference()
        if not difference:
            return
        self.changes += 1
        say(f"write {path}")
        if self.dry_run:
            for line in difference:
                say(line)
            return
        beside, kept = (path.with_name(f"{path.name}.{end}") for end in ("new", clock(STAMP)))
        self.undo.callback(beside.unlink, missing_ok=True)
        beside.write_text(file.text, encoding="utf-8")
        beside.chmod(file.mode)
        if file.check:
            self.ask(*file.check, str(beside))
        if path.exists():
            shutil.copy2(path, kept)
            self.undo.callback(kept.replace, path)
        else:
            self.undo.callback(path.unlink, missing_ok=True)
        beside.replace(path)


def _install_programs(server: Server) -> None:
    path = server.site.base["PATH"]
    commands = server.site.settings.step_commands()
    programs = {"git", "nginx", "setfacl", *(argv[0] for argv in commands)}
    wanted = sorted(programs & PACKAGES.keys())
    missing = [PACKAGES[each] for each in wanted if not shutil.which(each, path=path)]
    if "docker" in programs and not server.holds("docker", "compose", "version"):
        in_ubuntu = server.holds("apt-cache", "show", "docker-compose-v2")
        missing.append("docker-compose-v2" if in_ubuntu else "docker-compose")
    if missing:
        server.change("apt-get", "update")
        server.change("apt-get", "install", "--yes", *missing)
    groups = {"adm", *({"docker"} & programs)}  # adm reads the logs of nginx and of the journal
    if lacking := groups - {*server.ask("id", "-nG", server.user).split()}:
        server.change("usermod", "--append", "--groups", ",".join(sorted(lacking)), server.user)


def _verify_units(server: Server, units: Sequence[Placed]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for unit in units:  # what they start is there only after the first deployment
            text = re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", unit.text)
            Path(folder, unit.path.name).write_text(text, encoding="utf-8")
        server.ask("systemd-analyze", "verify", "--man=no", *map(str, Path(folder).iterdir()))


def _place_units(server: Server, units: Sequence[Placed]) -> bool:
    """Put units in their place, for now and after a reboot; whether one differed."""
    before = server.changes
    if not server.dry_run:
        server.undo.callback(server.holds, "systemctl", "daemon-reload")
    for unit in units:
        server.place(unit)
    changed = server.changes > before
    if changed:
        server.change("systemctl", "daemon-reload")
    for name in [unit.path.name for unit in units if "[Install]" in unit.text]:
        if not server.holds("systemctl", "is-enabled", name):
            words = ["--now", name] if name in TIMER else [name]
            server.change("systemctl", "enable", *words, undo=("systemctl", "disable", *words))
    return changed


def _place_site(server: Server, file: Placed) -> bool:
    """Put nginx's file in place of those with its names; whether nginx has to read it anew."""
    enabled, before = NGINX / "sites-enabled", server.changes
    link = enabled / file.path.name
    for each in sorted({*sites_in_the_way(server.site)} - {link}):
        kept = str(file.path.with_name(f"{each.name}.{clock(STAMP)}"))
        server.change("mv", str(each), kept, undo=("mv", kept, str(each)))
    server.place(file)
    if not link.exists():
        server.change("ln", "-s", str(file.path), str(link), undo=("rm", str(link)))
    if not server.dry_run:
        server.ask("nginx", "-t", "-q")
    return server.changes > before


def _take_port(server: Server, changed: bool, running: bool) -> None:
    """The socket holds the port of the site; a gunicorn that is running goes on behind it."""
    name, restart = "gunicorn.socket", ("systemctl", "restart", "gunicorn")
    if not changed and server.holds("systemctl", "is-active", name):
        return
    if running:
        server.change("systemctl", "stop", name, "gunicorn", undo=restart)
    server.change("systemctl", "start", name, undo=("systemctl", "stop", name))
    if running:
        server.change("systemctl", "start", "gunicorn")


def _check_takeover(server: Server, files: Sequence[Placed], in_place: bool) -> None:
    """Failure if what is there would be left half taken over, before anything is touched."""
    for file in files:
        old = text_of(file.path)
        folder = "".join(re.findall(r"(?m)^WorkingDirectory=(.*)", old))
        require(
            folder in file.text or Path(folder).is_relative_to(server.site.root),
            f"{file.path} serves another checkout, in {folder}",
            f"if that is not needed any more: sudo rm {file.path}",
        )
        if CERTBOT in old and (lacking := file.difference()):
            raise Failure(
                f"{file.path} is {CERTBOT}, and lacks {plural(len(lacking), 'line')}",
                f"write those above into it, then: {SETUP} && sudo systemctl reload nginx",
                details=lacking,
            )
    there = (*(file.path for file in files), *sites_in_the_way(server.site))
    require(
        not in_place or not re.search(r"\bunix:|ListenStream=/", "".join(map(text_of, there))),
        "gunicorn is behind a unix socket, and cannot go on while it gets another address",
        "write --bind 127.0.0.1:8000 in its unit, proxy_pass http://127.0.0.1:8000; in nginx's "
        "site, and: sudo systemctl disable --now gunicorn.socket; sudo systemctl daemon-reload; "
        f"sudo systemctl restart gunicorn nginx; then: {SETUP}",
    )
    changed = in_place and server.ask(
        *server.as_owner, "git", "status", "--porcelain", "--untracked-files=no"
    )
    require(
        not changed,
        f"changes in {server.site.root} are in no commit: {changed and changed.strip()}",
        "commit and push them, or what runs now cannot become a release",
    )


def _set_up(server: Server, timer: bool) -> None:
    """Every part in its place, in an order in which a site that is there goes on."""
    site, files = server.site, files_to_place(server.site, timer)
    *units, rights, nginx_site = files
    running = server.holds("systemctl", "is-active", "gunicorn")
    in_place = running and not site.releases.live_name()
    _check_takeover(server, files, in_place)
    _install_programs(server)
    _verify_units(server, units)
    deploy_py = (*server.as_owner, sys.executable, str(SCRIPT), "-c", str(site.settings_file))
    if in_place:  # what it runs becomes the first release, if that can be built and answers
        revision = server.ask(*server.as_owner, "git", "rev-parse", "HEAD")
        server.change(*deploy_py, "deploy", revision, "--prove")
    with site.lock.held(0, site.journal):
        server.place(rights)
        new_site = _place_site(server, nginx_site)
        # a gunicorn that holds the port by itself goes on behind the socket, with its own unit
        first = [unit for unit in units if not running or unit.path.suffix == ".socket"]
        _take_port(server, _place_units(server, first), running)
        _place_units(server, [unit for unit in units if unit not in first])
        for folder in map(str, [*reversed(site.root.parents), site.root]):
            nginx_passes = ("runuser", "-u", "www-data", "--", "test", "-x", folder)
            if not os.stat(folder).st_mode & 0o001 and not server.holds(*nginx_passes):
                undo = ("setfacl", "-x", "u:www-data", folder)
                server.change("setfacl", "-m", "u:www-data:x", folder, undo=undo)
    if in_place:
        server.change(*deploy_py, "deploy", revision, "--wait", "600")
    if new_site or in_place:
        server.change("systemctl", "reload-or-restart", "nginx")


def setup(site: Site, dry_run: bool = False, timer: bool = False) -> int:
    """As root: put in place what a server needs; safe to run again."""
    console.label, root, section = "setup", site.root, site.settings.deploy
    names = (section.workspace, section.project, site.settings.env.file, *section.shared)
    require(not os.geteuid(), "only root may set a server up", SETUP, MISTAKE)
    require(
        root.owner() != "root" and re.fullmatch(r"[\w./+-]+", f"{root}{''.join(names)}"),
        f"{root} must belong to the user who deploys, and have a plain name, as all paths in it",
        "mend it: chown -R, or mv",
        MISTAKE,
    )
    require(
        site.hosts,
        "ALLOWED_HOSTS in .env names no host",
        "write the public names of the site there",
        MISTAKE,
    )
    server = Server(site, dry_run)
    try:
        _set_up(server, timer)
    except BaseException as error:  # noqa: BLE001 - whatever it is, all is put back
        with shielded():
            server.undo.close()
        failure = as_failure(error)
        failure.live = "what it had changed was put back, but for packages and groups"
        if type(error) is not Failure:  # which has a remedy of its own
            failure.remedy = f"mend that, then: {SETUP}"
        raise failure from None
    made = "would be made" if dry_run else "made; next: log in again, then python3 deploy.py"
    say(f"{plural(server.changes, 'change')} {made}" if server.changes else "nothing to change")
    return OK


# ----------------------------------------------------------------------------------- command line


def _flag(help_text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": help_text}


OWN_OPTIONS = ("-h", "--help", "--version")  # of no command
# The arguments of all commands, under the names that the commands have for them.
ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "revision": (
        ("revision",),
        {"nargs": "?", "default": "", "help": "a branch, tag or commit (default: [pull] branch)"},
    ),
    "at": (
        ("--at",),
        {
            "type": matching(r"[0-9a-f]{7,40}|ssh", "the hash of a commit, or ssh", str),
            "metavar": "COMMIT",
            "help": "exactly this commit of the branch (ssh: what SSH_ORIGINAL_COMMAND asks for)",
        },
    ),
    "freeze": (
        ("--freeze",),
        {
            "action": argparse.BooleanOptionalAction,
            "default": True,
            "help": "refuse deployments afterwards, until `thaw`",
        },
    ),
    "reason": (("reason",), {"help": "why, for whoever wants to deploy"}),
    "until": (
        ("--until",),
        {
            "type": matching(
                r"(\d{4}-(0\d|1[0-2])-([0-2]\d|3[01])( ([01]\d|2[0-3]):[0-5]\d)?)?",
                "a time, as in 2026-12-24 18:00",
                str,
            ),
            "default": "",
            "metavar": "TIME",
            "help": "in UTC, as in '2026-12-24 18:00'",
        },
    ),
    "if_changed": (
        ("--if-changed",),
        _flag("do and say nothing unless the branch, .env or the settings changed"),
    ),
    "dry_run": (("--dry-run",), _flag("say what would be done, change nothing")),
    "prove": (
        ("--prove",),
        _flag("build the release, have its candidate answer, and remove it again"),
    ),
    "wait": (
        ("--wait",),
        {
            "type": matching(r"\d{1,9}(\.\d+)?", "a number of seconds", float),
            "default": 0.0,
            "metavar": "SECONDS",
            "help": "wait so long for another run to end (default: do not wait)",
        },
    ),
    "release": (
        ("release",),
        {"nargs": "?", "default": "", "help": "a release of the history"},
    ),
    "reverse_migrations": (
        ("--reverse-migrations",),
        _flag("reverse the migrations that separate the releases, after a backup"),
    ),
    "file": (
        ("file",),
        {"type": Path, "metavar": "FILE", "help": "a backup, as those in .deploy/backups"},
    ),
    "yes": (("--yes",), _flag("do it: what the database holds now is replaced")),
    "test": (("--test",), _flag("restore it beside the database, and drop it again")),
    "as_json": (("--json",), {"dest": "as_json", **_flag("for programs")}),
    "follow": (("-f", "--follow"), _flag("go on while it is written")),
    "state": (("state",), {"choices": ["on", "off"]}),
    "quiet": (("-q", "--quiet"), _flag("say nothing unless there is a problem")),
    "arguments": (("arguments",), {"nargs": argparse.REMAINDER, "metavar": "ARGS"}),
    "timer": (("--timer",), _flag("deploy what is new every five minutes, too")),
}
COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "deploy": (deploy, "revision at if_changed dry_run prove wait"),
    "rollback": (rollback, "release reverse_migrations freeze wait"),
    "backup": (back_up, "as_json wait"),
    "restore": (restore_backup, "file yes test wait"),
    "restart": (restart_everything, "wait"),
    "freeze": (freeze_deployments, "reason until"),
    "thaw": (thaw_deployments, ""),
    "status": (show_status, "as_json"),
    "history": (show_history, "as_json"),
    "logs": (show_logs, "release follow"),
    "check": (check_server, "quiet"),
    "maintenance": (maintenance, "state"),
    "manage": (run_manage, "arguments"),
    "setup": (setup, "dry_run timer"),
}


class Parser(argparse.ArgumentParser):
    """argparse's own, which names what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, with the nearest command or option, and exit with status 2."""
        wrong = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^' ]+)", message)
        flags = [flag for names, _ in ARGUMENTS.values() for flag in names if flag[:2] == "--"]
        known = {*flags, *COMMANDS} - {*message.split()}  # the option of another command is wrong
        super().error(message + (nearest(wrong[1], known) if wrong else ""))


def parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """The command line as `config`, `command` and its arguments; by default it is `deploy`."""
    parser = Parser(
        prog="deploy.py",
        description="Deploy a Django project on the one server that it runs on.",
        epilog="Without a command: deploy. Each command has its own --help.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=18),
    )
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        default=SCRIPT.with_name("deploy.ini"),
        metavar="FILE",
        help="the settings file (default: deploy.ini beside deploy.py)",
    )
    parser.add_argument("--version", action="version", version=f"deploy.py {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (function, arguments) in COMMANDS.items():
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        for argument in arguments.split():
            flags, options = ARGUMENTS[argument]
            added.add_argument(*flags, **options)
    parser.set_defaults(command="deploy")
    at = 0  # of the first word that is no settings file
    while at < len(argv) and argv[at].startswith(("-c", "--config")):
        at += 2 if argv[at] in ("-c", "--config") else 1
    words = [*argv]
    if words[at:] and words[at].startswith("-") and words[at] not in OWN_OPTIONS:
        words.insert(at, "deploy")  # so that `deploy.py --wait 60` is understood
    return vars(parser.parse_args(words))


def sentence(failure: Failure) -> str:
    """What failed, what is live, and what to do, as one line that is shown whole."""
    still = failure.status in (LOCKED, FROZEN, MISTAKE) or failure.status > 128  # while it waited
    untouched = "nothing was touched" if still else ""
    rest = clean("; ".join(filter(None, (failure.live or untouched, failure.remedy))))
    return f"{fit(clean(failure.message()), WIDTH - 20 - len(rest))}; {rest}"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status. Only this turns a failure into a sentence."""
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:  # one of them was closed: the lock, which
        os.set_inheritable(spare, True)  # a new version inherits, would be its stdin
    os.close(spare)
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    start_logging()
    command, _ = COMMANDS[options.pop("command")]
    try:
        return command(Site(options.pop("config")), **options)
    except (Exception, Interrupted) as error:  # noqa: BLE001 - never a traceback
        failure = as_failure(error)
    console.hidden = False
    for line in failure.details:
        say(line)
    log.error(sentence(failure))
    return failure.status


if __name__ == "__main__":
    ended = main()
    for each in (signal.SIGINT, signal.SIGTERM):  # or it would seem that what is done was not
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(ended)
