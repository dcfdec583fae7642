#!/usr/bin/env python3
"""Deploy a Django project on the one server that it runs on.

    python3 deploy.py                 deploy what the remote branch holds
    python3 deploy.py rollback        go back to the release before
    python3 deploy.py --help          everything else

A deployment takes seven steps, then checks the health of the site:

    1 env       read .env into the environment of every later command
    2 pull      git fetch, fast-forward the checkout, check the revision out into a folder of its own
    3 install   the packages of Pipfile.lock, in a virtual environment that every release with this lock shares
    4 services  docker compose: the database and the cache are up and healthy
    5 static    collectstatic, into the candidate's own folder
    6 migrate   if a migration is planned: back the database up, then migrate
    7 restart   prove the candidate on a private socket, switch to it, restart gunicorn behind its stand-by

Until the switch nothing live is touched but the database; after it, what fails is taken back.

Files: this one and deploy.ini beside it, in the git checkout; all that a deployment makes lies in .deploy/
there (releases, virtual environments, backups, logs, history.jsonl, lock), which git is told to ignore.

Exit status: 0 done, or nothing to do; 1 failed, and what was live before is live and healthy; 2 usage;
3 failed, and a human is needed; 75 another deployment holds the lock; 78 a mistake in deploy.ini or .env;
128+N ended by signal N, and what was live before still is.
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import fcntl
import grp
import hashlib
import io
import json
import math
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote, quote_plus

if sys.version_info < (3, 11):
    sys.exit("deploy.py needs Python 3.11 or later; this is " + sys.version.split()[0])

SCRIPT = Path(__file__).resolve()
HEARTBEAT = 15.0  # seconds without a line of output before one says that the step still runs
DAY = 86_400  # seconds
ROOM = 1 << 30  # bytes of disk that must be free
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
TAIL = 20  # lines of a failed command's output that are shown again
PIECE = 1 << 20  # bytes: a line that is longer is read in pieces
CONTROL = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f]")  # what would move a terminal's cursor
COLOURS = {"✓": 32, "✗": 31, "FAILED:": 31, "warning:": 33}
WIDTH = 4000  # characters of one line on stdout; ssh-action stops reading at 65,536

OK, FAILED, USAGE, NEEDS_HUMAN, LOCKED, MISTAKE = 0, 1, 2, 3, 75, 78


# ---------------------------------------------------------------------------------------------------- errors

class Failure(Exception):
    """What the user reads as a sentence: what failed, and what to do; `details` are lines printed before it."""

    def __init__(
        self, what: str, remedy: str = "mend it and push", status: int = FAILED, details: Sequence[str] = ()
    ) -> None:
        super().__init__(what)
        self.what, self.remedy, self.status, self.details = what, remedy, status, tuple(details)
        self.live = ""  # what is live now, found out when it is handled


class CommandFailed(Failure):
    """A command ended with another status than 0, or was ended because its time was up."""

    def __init__(self, argv: Sequence[str], folder: Path, ended: str, tail: Sequence[str]) -> None:
        command, last = shlex.join(argv), next((line.strip() for line in reversed(tail) if line.strip()), "no output")
        details = [f"in {folder}: {command}", f"{ended}; its last lines:", *(f"| {line}" for line in tail)]
        self.last = f"{last[:200]} ({ended})"
        super().__init__(f"`{command}` {ended} ({last[:200]})", "mend that and deploy again", FAILED, details)


class Interrupted(Failure):
    """SIGINT or SIGTERM came."""

    shielded = False  # while it is, signals change nothing: what must be undone is undone

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}", "deploy again when you are ready", 128 + number)

    @staticmethod
    def install() -> None:
        """Raise Interrupted at the first SIGINT or SIGTERM; no SIGHUP (a lost terminal) ends this or any child."""
        def interrupt(number: int, _frame: object) -> None:
            if not Interrupted.shielded:
                Interrupted.shielded = True  # a second Ctrl-C does not skip the clean-up
                raise Interrupted(number)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, interrupt)


# -------------------------------------------------------------------------------------------------- settings

STEP_NAMES = ("env", "pull", "install", "services", "static", "migrate", "restart")
Commands = tuple[tuple[str, ...], ...]
Kind = Callable[[str], Any]  # the value of a setting's text; ValueError says what is wrong with it


def matching(pattern: str, meaning: str, convert: Kind = str) -> Kind:
    """A kind of setting whose text matches the pattern as a whole."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is not {meaning}")
        return convert(text)
    return parse


def commands(text: str) -> Commands:
    """One command a line, each split as a shell would split it, never given to a shell."""
    try:
        return tuple(tuple(shlex.split(line)) for line in text.splitlines() if line.strip())
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {str(error).lower()}") from None


def step_order(text: str) -> tuple[str, ...]:
    """The names of steps: env and pull first, restart last, none twice."""
    steps = tuple(text.split())
    for step in steps:
        if step not in STEP_NAMES:
            raise ValueError(f"{step!r} is not a step{nearest(step, STEP_NAMES)}")
    if steps[:2] != ("env", "pull") or steps[-1] != "restart" or len(set(steps)) < len(steps):
        raise ValueError("must begin with env and pull, end with restart, and name no step twice")
    return steps


below = matching(r"(?!/|\.?/*$)(?!(.*/)?\.\.(/|$)).+", "a path below the checkout")
inside = matching(r"(?!/)(?!(.*/)?\.\.(/|$)).+", "a path inside the checkout")
seconds = matching(r"\d*[1-9]\d*(\.\d+)?|\d+\.\d*[1-9]\d*", "a number of seconds, as in 30 or 2.5", float)
count = matching(r"\d+", "a whole number", int)
number = matching(r"0*[1-9]\d*", "a whole number of 1 or more", int)
url = matching(r"(https?://[^/\s]+(/\S*)?)?", "a URL, as in http://127.0.0.1:8000/")
status = matching(r"[1-5]\d\d", "an HTTP status, as in 200", int)
named = matching(r"[\w-]+:\s*\S.*", "a name and its command, as in nginx: systemctl is-active nginx",
                 lambda line: line.split(":", 1))
variable = matching(r"([A-Za-z_]\w*)?", "the name of a variable in .env, which holds the URL")
occasion = matching("failure|recovery|always", "one of failure, recovery and always")
header = matching(r"[\w-]+:.*", "a header, as in X-Forwarded-Proto: https", lambda line: line.split(":", 1))
yes_or_no = matching(r"yes|no", "yes or no", lambda text: text == "yes")


def shared_paths(text: str) -> tuple[str, ...]:
    """Paths inside the checkout, one a word."""
    return tuple(below(word) for word in text.split())


def named_commands(text: str) -> dict[str, tuple[str, ...]]:
    """One `name: command` a line, each split as a shell would split it."""
    return {name: commands(command)[0] for name, command in map(named, filter(None, map(str.strip, text.splitlines())))}


def header_lines(text: str) -> dict[str, str]:
    """One `Name: value` a line."""
    pairs = (header(line.strip()) for line in text.splitlines() if line.strip())
    return {name: value.strip() for name, value in pairs}


# Every setting with its kind and its default, as deploy.ini shows them in the same order.
OPTIONS: tuple[tuple[str, str, Kind, str], ...] = (
    ("deploy", "steps", step_order, " ".join(STEP_NAMES)),
    ("deploy", "workspace", below, ".deploy"),
    ("deploy", "project", inside, "."),
    ("deploy", "shared", shared_paths, ".env logs/ media/"),
    ("deploy", "keep_releases", number, "5"),
    ("deploy", "keep_logs", number, "100"),
    ("env", "file", below, ".env"),
    ("pull", "remote", str, "origin"),
    ("pull", "branch", str, "main"),
    ("pull", "timeout", seconds, "120"),
    ("pull", "retries", count, "2"),
    ("install", "python", str, ""),
    ("install", "command", commands, "pipenv install --deploy"),
    ("install", "timeout", seconds, "900"),
    ("services", "command", commands, "docker compose up --detach --wait"),
    ("services", "timeout", seconds, "300"),
    ("static", "command", commands, "python manage.py collectstatic --noinput"),
    ("static", "timeout", seconds, "300"),
    ("migrate", "shell", commands, "python manage.py shell --verbosity 0"),
    ("migrate", "command", commands, "python manage.py migrate --noinput"),
    ("migrate", "lock_timeout", seconds, "2"),
    ("migrate", "reverse_on_failure", yes_or_no, "no"),
    ("migrate", "timeout", seconds, "3600"),
    ("restart", "candidate", commands,
     "gunicorn --preload --name candidate --no-control-socket --bind unix:{socket} forms.wsgi:application"),
    ("restart", "command", commands,
     ("sudo -n systemctl restart gunicorn-standby\n"
      "sudo -n systemctl restart gunicorn\n"
      "sudo -n systemctl stop --no-block gunicorn-standby")),
    ("restart", "proxy", commands, "sudo -n nginx -t\nsudo -n systemctl reload-or-restart nginx"),
    ("restart", "timeout", seconds, "120"),
    ("health", "url", url, "http://127.0.0.1:8000/admin/login/"),
    ("health", "host", str, ""),
    ("health", "headers", header_lines, "X-Forwarded-Proto: https"),
    ("health", "expect", status, "200"),
    ("health", "contains", str, ""),
    ("health", "timeout", seconds, "5"),
    ("health", "deadline", seconds, "30"),
    ("status", "checks", named_commands,
     ("gunicorn: systemctl is-active gunicorn\n"
      "nginx: systemctl is-active nginx\n"
      "postgresql: docker exec postgresql pg_isready --host 127.0.0.1\n"
      "redis: docker exec redis redis-cli -e ping\n"
      "database: python manage.py shell -v 0 -c "
      "'from django.db import connection; connection.ensure_connection()'")),
    ("status", "timeout", seconds, "20"),
    ("check", "command", commands, "python manage.py check --deploy --fail-level WARNING"),
    ("check", "timeout", seconds, "60"),
    ("backup", "command", commands,
     ("docker exec postgresql sh -c "
      "'exec pg_dump --format=custom --compress=zstd -U \"$POSTGRES_USER\" \"$POSTGRES_DB\"'")),
    ("backup", "verify", commands, "docker exec -i postgresql pg_restore --file=/dev/null"),
    ("backup", "timeout", seconds, "1800"),
    ("backup", "keep", number, "10"),
    ("backup", "after", commands, ""),
    ("restore", "command", commands, "sh postgresql/restore.sh {act} {database}"),
    ("restore", "timeout", seconds, "7200"),
    ("notify", "on", occasion, "failure"),
    ("notify", "webhook", variable, ""),
    ("notify", "command", commands, ""),
    ("notify", "timeout", seconds, "5"),
    ("notify", "journal", str, "/run/systemd/journal/socket"),
    *((step, hook, commands, "") for step in STEP_NAMES for hook in ("before", "after")),
)
KINDS = {f"{section}.{key}": kind for section, key, kind, _ in OPTIONS}
SECTIONS = {section: [key for name, key, *_ in OPTIONS if name == section] for section, *_ in OPTIONS}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the known name that is nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def read_settings(path: Path) -> dict[str, Any]:
    """`section.key` -> value for every setting; the Failure lists every mistake of the file with its line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Failure(f"{path} cannot be read: {reason}", "name the settings file with -c", MISTAKE) from None
    settings = {f"{section}.{key}": kind(default) for section, key, kind, default in OPTIONS}
    given: dict[str, tuple[int, list[str]]] = {}
    mistakes: list[tuple[int, str]] = []
    section, value = "", None  # the value that an indented line continues
    # not configparser, which keeps no line numbers and stops at the first mistake
    for at, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip()[0] in "#;":
            continue
        if line[0].isspace() and value is not None:
            value.append(line.strip())
        elif header := re.fullmatch(r"\[([^]]*)\]\s*", line):
            section, value = header[1], None
            if section not in SECTIONS:
                mistakes.append((at, f"[{section}] is not a section{nearest(section, SECTIONS)}"))
        elif entry := re.fullmatch(r"([^\s=:]+)\s*[=:]\s*(.*)", line):
            name, value = f"{section}.{entry[1].lower()}", [entry[2]]
            if name in given:
                mistakes.append((at, f"[{section}] {entry[1]} is set twice"))
            elif name in KINDS:
                given[name] = at, value
            elif section in SECTIONS or not section:
                close = nearest(entry[1], SECTIONS.get(section, ()))
                mistakes.append((at, f"[{section}] {entry[1]} is not a key{close}"))
        else:
            mistakes.append((at, "neither a [section] nor a key = value"))
    for name, (at, parts) in given.items():
        try:
            settings[name] = KINDS[name]("\n".join(parts).strip())
        except ValueError as error:
            mistakes.append((at, f"[{name.replace('.', '] ')} {error}"))
    if mistakes:
        raise mistaken(path, mistakes)
    return settings


def mistaken(path: Path, mistakes: Iterable[tuple[int, str]]) -> Failure:
    """All mistakes of a file, each with its line, as one Failure."""
    details = [f"{path}, line {at}: {what}" for at, what in sorted(mistakes)]
    return Failure(f"{path} has {plural(len(details), 'mistake')}", "mend the lines named above", MISTAKE, details)


# ------------------------------------------------------------------------------------------------------ .env

NONCHARACTERS = "".join(chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF))
# What systemd and Compose read differently, or nobody could mean, with the way to write it; in the order of asking.
REFUSED_LINES = (
    (r"\ufeff.*", "begins with a byte order mark: save the file as UTF-8 without one"),
    (r".*\r", "ends as Windows ends lines: sed -i 's/\\r$//' on the file mends all of them"),
    (r"#.*\\", "a comment that ends with \\ hides the next line from systemd: remove the \\"),
    (r"(?!#|[A-Za-z_]\w*=| *$).*", "is not NAME=value: no space before the name or around =, no export, no colon"),
    (rf".*[\x00-\x1f\x7f\ufdd0-\ufdef{NONCHARACTERS}].*", "holds a control character: a value is one line of text"),
)
REFUSED_VALUES = (
    (r"'(?![^']*'$).*|\"(?![^\"]*\"$).*", "must end with the quote that it begins with, and hold no other {quote}"),
    (r"(?!').*[$\\].*", "holds $ or \\, which its readers read differently: write {name}='…'"),
    (r".*\\'?", "ends with \\, which its readers read differently: no way of writing it is safe"),
    (r"(?!['\"]).*['\"].*|#.*|(?!['\"]).*\s#.*",
     "holds a quote or a #: write {name}='…', or {name}=\"…\" when it holds a '"),
    (r"\s.*|.*\s", "begins or ends with a space: remove it, or write {name}='…'"),
)
SECRET_NAMES = re.compile(r"SECRET|PASS|PWD|TOKEN|KEY|CREDENTIAL|PRIVATE|SALT|DSN|HOOK|AUTH", re.IGNORECASE)
NOT_SECRET = {"true", "false", "yes", "no", "on", "off", "none", "0", "1"}


def read_env(path: Path) -> dict[str, str]:
    """The variables of a `.env`; the Failure names every line that systemd and Compose would not read alike."""
    try:
        mode, text = path.stat().st_mode, path.read_bytes().decode("utf-8")
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}", "write it, one NAME=value a line, and chmod 600 it",
                      MISTAKE) from None
    except UnicodeDecodeError as error:
        at = error.object.count(b"\n", 0, error.start) + 1
        raise Failure(f"{path}, line {at}: not UTF-8", "save the file as UTF-8", MISTAKE) from None
    if mode & 0o007:
        raise Failure(f"{path} holds secrets, and everyone on this machine may read it", f"chmod 600 {path}", MISTAKE)
    values: dict[str, str] = {}
    mistakes = []
    for at, line in enumerate(text.split("\n"), start=1):
        try:
            read_assignment(line, values)
        except ValueError as error:
            mistakes.append((at, str(error)))
    if mistakes:
        raise mistaken(path, mistakes)
    return values


def read_assignment(line: str, values: dict[str, str]) -> None:
    """Add the variable of one line of `.env` to `values`; ValueError says how to write it, never its value."""
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


def secrets_in(variables: Mapping[str, str]) -> set[str]:
    """What must never be shown: values of variables named like a secret, of random look, and passwords in URLs."""
    found = set()
    for name, value in variables.items():
        random_look = re.fullmatch(r"(?=.*\d)(?=.*[A-Za-z])(?!/|.*://).{16,}", value)
        if (SECRET_NAMES.search(name) or random_look) and value.lower() not in NOT_SECRET:
            found.add(value)
        found.update(re.findall(r"://[^/\s:@]*:([^/\s@]+)@", value))
    return found - {""}


# -------------------------------------------------------------------------------------------- output and log

def plural(count: int, noun: str) -> str:
    """`1 mistake`, `2 mistakes`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def clock(form: str = "%Y-%m-%d %H:%M:%S UTC") -> str:
    """The time now, in UTC."""
    return time.strftime(form, time.gmtime())


def fit(text: str, width: int) -> str:
    """The text cut to so many columns of a terminal."""
    from unicodedata import east_asian_width

    ends = accumulate(2 if east_asian_width(letter) in "WF" else 1 for letter in text[:width + 1])
    kept = sum(end <= width for end in ends)
    return text if kept == len(text) else text[:kept - 1] + "…"


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
            bar = f"{'━' * done}{'╌' * (10 - done)} usually {self.usual:.1f} s  " if self.usual else ""
            said = bar + (self.doing or said)
        return fit(f"{mark or ' '} {self.name:<8} {passed:6.1f} s  {said}", shutil.get_terminal_size().columns - 1)


class Output:
    """What a run says: each line goes to the log first, then to stdout, with the secrets replaced."""

    def __init__(self) -> None:
        self.label = "deploy"  # the step that speaks
        self.terminal = (isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty()
                         and os.environ.get("TERM", "dumb") != "dumb"
                         and sys.stdout.encoding.lower() == "utf-8")  # else all is said as in a pipe
        self.line: StepLine | None = None  # of the step that runs, on a terminal
        self.secrets = re.compile(rb"(?!)")
        self.longest = 0  # bytes of the longest secret, in its longest form
        self.log: IO[str] | None = None
        self.quiet = False  # nothing is shown as long as there may be nothing to do
        self.last = time.monotonic()  # when a line was shown
        self.turn = threading.Lock()

    def hide(self, secrets: Iterable[str]) -> None:
        """Replace the secrets in all that is said from now on, also as Python, JSON, a URL or a shell quotes them."""
        forms = {form for secret in secrets
                 for form in (secret, repr(secret)[1:-1], ascii(secret)[1:-1], repr(secret.encode())[2:-1],
                              shlex.quote(" " + secret)[2:-1], json.dumps(secret)[1:-1],
                              json.dumps(secret, ensure_ascii=False)[1:-1],
                              quote(secret), quote(secret, safe=""), quote_plus(secret))}
        alone = rb"(?<!\w)%s(?!\w)"  # a short one could be a part of any word
        patterns = [(b"%s" if len(form) > 8 else alone) % re.escape(form.encode("utf-8", "replace"))
                    for form in sorted(forms, key=len, reverse=True)]
        self.secrets = re.compile(b"|".join(patterns) or rb"(?!)")
        self.longest = max((12 * len(secret) for secret in secrets), default=0)

    def mask(self, text: str) -> str:
        """The text without its secrets."""
        return self.secrets.sub(b"***", text.encode("utf-8", "replace")).decode()

    def say(self, text: str, label: str = "", shown: bool = True, passing: bool = False) -> None:
        """Write one line to the log, and to stdout if it is `shown`; on a terminal, a `passing` one passes by."""
        text = self.mask(text)
        line = f"{label or self.label:<8} {text}"
        with self.turn:
            if self.log:
                with contextlib.suppress(OSError):  # a full disk must not end what could go on
                    self.log.write(f"{clock()} {line}\n")
            if not self.line and (not shown or self.quiet):
                return
            self.last = time.monotonic()
            if self.line and (passing or not shown):
                self.line.doing = text
            elif self.line:
                self.line.notes.insert(0, text)
            else:
                more = f" … ({len(line) - WIDTH} more characters in the log)" if len(line) > WIDTH else ""
                self.show(line[:WIDTH] + more)

    def show(self, text: str, end: str = "\n") -> None:
        """Write to stdout, on a terminal in place of the line there; a reader who hung up is no error."""
        if self.terminal:
            text = CONTROL.sub(" ", text)
            if not os.environ.get("NO_COLOR"):
                for word, colour in COLOURS.items():
                    text = text.replace(word, f"\x1b[{colour}m{word}\x1b[0m", 1)
            text = f"\r\x1b[K{text}"
        try:
            print(text, end=end, flush=True)
        except OSError:  # EPIPE, EIO: from now on into nothing, or the interpreter fails to flush at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    @contextlib.contextmanager
    def step(self, name: str, usual: float) -> Iterator[None]:
        """What is said inside is this step's; on a terminal, all of it is one line, redrawn in place until the end."""
        self.label, ended, mark = name, threading.Event(), "✗"
        self.line = line = StepLine(name, usual) if self.terminal else None

        def redraw() -> None:
            while line and not ended.wait(0.1):
                with self.turn:
                    if self.line:
                        self.show(line.text(), end="")

        threading.Thread(target=redraw, daemon=True).start()
        try:
            yield
            mark = "✓"
        finally:
            ended.set()
            with self.turn:
                self.line = None
                if line:
                    self.show(line.text(mark))

    def open_log(self, path: Path) -> None:
        """There is something to do: show all from now on, and log it to `path` (mode 0600)."""
        self.quiet = False
        if not self.log:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self.log = open(descriptor, "w", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115


# ------------------------------------------------------------------------------------------ running commands

INSTALLED_BY = {
    "git": "sudo apt-get install git", "pipenv": "sudo apt-get install pipenv", "sudo": "apt-get install sudo",
    "docker": "sudo apt-get install docker.io docker-compose-v2", "systemctl": "this server must run systemd",
    "gunicorn": "add gunicorn to the Pipfile, and lock it again",
}


class Child:
    """A running command in a process group of its own, whose output goes line by line to `sinks`."""

    def __init__(
        self, argv: Sequence[str], folder: Path, environment: Mapping[str, str], output: Output,
        sinks: Sequence[Callable[[str], None]], stdout: int | None = None, inherited: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.output = output
        program = shutil.which(argv[0], path=environment.get("PATH")) or argv[0]
        if "/" not in program:
            raise Failure(f"{program} is not installed, or not in PATH", INSTALLED_BY.get(program, "install it"))
        apart = stdout is not None or len(sinks) > 1
        try:
            self.process = subprocess.Popen(
                argv, cwd=folder, env=environment, stdin=stdin, start_new_session=True,
                stdout=subprocess.PIPE if stdout is None else stdout,
                stderr=subprocess.PIPE if apart else subprocess.STDOUT, pass_fds=inherited)
        except OSError as error:
            raise Failure(f"`{shlex.join(argv)}` cannot be started in {folder}: {error.strerror}",
                          "mend the command in the settings file") from None
        streams = [each for each in (self.process.stdout, self.process.stderr) if each]
        self.readers = [threading.Thread(target=self.read, args=pair, daemon=True) for pair in zip(streams, sinks)]
        for reader in self.readers:
            reader.start()

    def read(self, stream: IO[bytes], sink: Callable[[str], None]) -> None:
        """Hand over line after line; a very long one in pieces, none of which ends inside a secret."""
        held = b""
        while chunk := stream.readline(PIECE):
            held, cut = held + chunk, len(held + chunk)
            if not chunk.endswith(b"\n"):
                if cut < PIECE:
                    continue
                held = self.output.secrets.sub(b"***", held)
                cut = len(held) - self.output.longest
            sink(held[:cut].decode("utf-8", "replace").rstrip("\r\n"))
            held = held[cut:]
        if held:
            sink(held.decode("utf-8", "replace"))
        stream.close()

    def ended(self, seconds: float) -> bool:
        """Wait up to `seconds` for its end; a grandchild that keeps its output open is not waited for."""
        until = time.monotonic() + seconds
        for reader in self.readers:
            reader.join(max(until - time.monotonic(), 0))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(until - time.monotonic(), 0.01))
            for reader in self.readers:
                reader.join(1)  # what the command itself wrote is read by then
        return self.process.returncode is not None

    def end(self) -> None:
        """End the whole process group: SIGTERM, and SIGKILL for what is left of it after the grace."""
        until, group = time.monotonic() + GRACE, self.process.pid
        # nobody of ours is left to get the signal, or to wait for
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(group, signal.SIGTERM)
            while time.monotonic() < until:
                self.process.poll()
                os.killpg(group, 0)
                time.sleep(0.02)
            os.killpg(group, signal.SIGKILL)
            self.process.wait(GRACE)


class Runner:
    """Runs commands one after the other: one place for logging, time limits, and the lock that they inherit."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.inherited: tuple[int, ...] = ()  # the lock: a command that outlives a killed deployer still holds it

    def run(
        self, argv: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float,
        quiet: bool = False, stdout: int | None = None, stdin: int = subprocess.DEVNULL,
    ) -> str:
        """Run a command to its end, or CommandFailed; what a `quiet` one wrote to stdout."""
        lines: list[str] = []
        tail: deque[str] = deque(maxlen=TAIL)

        def show(line: str) -> None:
            tail.append(self.output.mask(line))
            self.output.say(f"| {line}", shown=not quiet, passing=True)

        def keep(line: str) -> None:
            lines.append(line)
            show(line)

        self.output.say(f"$ {shlex.join(argv)}", shown=not quiet, passing=True)
        sinks = [keep, show] if quiet else [show]
        child = Child(argv, folder, environment, self.output, sinks, stdout, self.inherited, stdin)
        started = time.monotonic()
        try:
            while not child.ended(0.2):
                passed = time.monotonic() - started
                if passed > timeout:
                    child.end()  # its last words are among the last lines
                    raise CommandFailed(argv, folder, f"was ended after its time limit of {timeout:g} s", tail)
                if time.monotonic() - self.output.last > HEARTBEAT:
                    self.output.say(f"still running after {passed:.0f} s: {argv[0]}", passing=True)
        except BaseException:
            child.end()
            raise
        if status := child.process.returncode:
            ended = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
            raise CommandFailed(argv, folder, ended, tail)
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ lock

# What a cut-off run leaves to put right: the revision of a fast-forward, the database beside the live one, whether
# that takes no writes, the release whose migrations are being reversed.
UNFINISHED = ("target", "database", "frozen", "reversing")


class Lock:
    """A flock, free as soon as its holder and the holder's commands are gone; its text (JSON) says who holds it."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, -1
        self.text: dict[str, Any] = {}

    def take(self, wait: float, output: Output) -> dict[str, Any]:
        """Take the lock within `wait` seconds, or Failure; the text that a run which was cut off left in it."""
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # a moment at least: whoever asks for the holder tries the lock, too
        until, said = time.monotonic() + max(wait, 0.3), -HEARTBEAT
        while not flocked(self.descriptor):
            if time.monotonic() >= until:
                raise Failure(f"another run holds the lock: {self.holder()}", "wait for it, or use --wait", LOCKED)
            if wait and time.monotonic() - said > HEARTBEAT:
                output.say(f"waiting for the lock: {self.holder()}")
                said = time.monotonic()
            time.sleep(0.1)
        return self.read()

    def read(self) -> dict[str, Any]:
        """The lock's text; nothing when its last holder left in good order."""
        return next(iter(json_lines(self.path)), {})

    def write(self, **changes: object) -> None:
        """Change the lock's text, in place: a new file would be another lock."""
        self.text.update(changes)
        raw = json.dumps(self.text, ensure_ascii=False).encode() + b"\n"
        os.pwrite(self.descriptor, raw, 0)
        os.ftruncate(self.descriptor, len(raw))
        if changes.keys() & UNFINISHED:  # after a power cut, what is half done must be known
            os.fsync(self.descriptor)

    def release(self) -> None:
        """Leave in good order; what could not be put right stays in the text, for the next run."""
        if not any(self.text.get(key) for key in UNFINISHED):
            os.ftruncate(self.descriptor, 0)
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # for what a command left running on purpose, too
        os.close(self.descriptor)

    def holder(self) -> str:
        """Who holds the lock, for a sentence; nothing when it is free."""
        if not self.path.exists():
            return ""
        with open(self.path, "rb") as file:
            if flocked(file.fileno()):
                return ""
        text = defaultdict(str, self.read())
        who = "{command} by {by} since {since} (process {pid}), at {step}".format_map(text)
        if text["pid"] and Path("/proc/self").exists() and not Path(f"/proc/{text['pid']}").exists():
            who += f"; it was killed, but a command of it still runs: fuser -v {self.path}"
        return who


def flocked(descriptor: int) -> bool:
    """Try to take the flock of an open file."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line; a line that a power cut tore is passed over."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            found.append(dict(json.loads(line)))
    return found


def user_name(number: int) -> str:
    """The name of a user."""
    return pwd.getpwuid(number).pw_name


def started_by() -> str:
    """Who started this run, and from where: `ubuntu, ssh from 192.0.2.7`."""
    ssh = os.environ.get("SSH_CONNECTION")
    place = "systemd" if "INVOCATION_ID" in os.environ else "cron"
    place = f"ssh from {ssh.split()[0]}" if ssh else "terminal" if os.isatty(1) else place
    return f"{user_name(os.geteuid())}, {place}"


# --------------------------------------------------------------------------------------- releases and history

class Workspace:
    """The folder `.deploy/` of a checkout: the releases, which of them is live, and the history."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.releases, self.venvs, self.backups, self.logs = self.folders = [
            root / name for name in ("releases", "venvs", "backups", "logs")]
        self.current, self.previous, self.history_file = root / "current", root / "previous", root / "history.jsonl"
        self.maintenance = root / "maintenance"  # nginx answers 503 while this file is there

    def make(self) -> None:
        """Make the folders that are not there yet, and have git ignore them all."""
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        (self.root / ".gitignore").write_text("*\n")

    def linked(self, link: Path) -> Path | None:
        """The release that a link points to, if both are there."""
        release = self.releases / os.path.basename(os.readlink(link)) if link.is_symlink() else None
        return release if release and release.is_dir() else None

    def live(self) -> Path | None:
        """The release that `current` points to."""
        return self.linked(self.current)

    def history(self) -> list[dict[str, Any]]:
        """The runs that there were, oldest first."""
        return json_lines(self.history_file)

    def record(self, entry: Mapping[str, object]) -> None:
        """Append a line to the history, on disk when this returns."""
        torn = self.history_file.exists() and not self.history_file.read_bytes().endswith(b"\n")
        with open(self.history_file, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(b"\n" * torn + json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def went_live(self) -> list[dict[str, Any]]:
        """The lines of the history that made a release live and healthy, oldest first."""
        return [entry for entry in self.history() if entry.get("result") == "live"]

    def entry(self, release: Path | None) -> dict[str, Any]:
        """The last line of the history that made `release` live."""
        return next((each for each in reversed(self.went_live()) if release and each["release"] == release.name), {})

    def healthy(self) -> list[Path]:
        """The releases that were once live and healthy and are still there, oldest first."""
        names = sorted({each["release"] for each in self.went_live()})
        return [self.releases / name for name in names if (self.releases / name).is_dir()]

    def earlier(self, release: Path | None) -> Path | None:
        """The newest healthy release older than `release`."""
        return next((each for each in reversed(self.healthy()) if release and each.name < release.name), None)

    def kept(self, count: int) -> set[Path]:
        """The releases to keep: the `count` newest healthy ones, the live one and the one before it."""
        return {each for each in (*self.healthy()[-count:], self.live(), self.linked(self.previous)) if each}


def point(link: Path, target: Path) -> None:
    """Make a symbolic link point to `target`, atomically, and so that it survives a power cut."""
    beside = link.with_name(f".{link.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(target, link.parent))
    beside.replace(link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def share(source: Path, link: Path, folder: bool) -> None:
    """Link a shared path of the checkout into a release, in place of what git has there."""
    if folder:
        source.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        return
    shutil.rmtree(link, ignore_errors=True)
    link.unlink(missing_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(source, link.parent))


def gunicorns(folder: Path, word: str = "gunicorn") -> dict[int, Path]:
    """Process number -> working folder of the gunicorns (with a `word` in their title) at work below `folder`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):  # none where there is no /proc
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            place, title = os.readlink(process / "cwd"), (process / "cmdline").read_bytes()
            if Path(place).is_relative_to(folder) and b"gunicorn" in title and word.encode() in title:
                found[int(process.name)] = Path(place.removesuffix(" (deleted)"))
    return found


# ------------------------------------------------------------------------------------------------------- git

class Git:
    """The checkout's git; a call raises CommandFailed when git itself fails."""

    def __init__(self, checkout: Path, runner: Runner, environment: Mapping[str, str]) -> None:
        self.checkout, self.runner, self.environment = checkout, runner, environment

    def __call__(self, *arguments: str, folder: Path | None = None, timeout: float = 120) -> str:
        # garbage is collected in the foreground: a git left behind would keep the lock
        argv = ["git", "-c", "gc.autoDetach=false", "-c", "maintenance.autoDetach=false", *arguments]
        return self.runner.run(argv, folder or self.checkout, self.environment, timeout, quiet=True)

    def ask(self, *arguments: str) -> str | None:
        """The answer of git, or None when it fails."""
        try:
            return self(*arguments)
        except CommandFailed:
            return None

    def commit(self, *names: str) -> str:
        """The full hash of the first of these that names a commit, or nothing."""
        found = (self.ask("rev-parse", "--quiet", "--verify", f"{name}^{{commit}}") for name in names)
        return next(filter(None, found), "")

    def subject(self, revision: str) -> str:
        """The first line of a commit's message, or nothing."""
        return (revision and self.ask("log", "-1", "--format=%s", revision)) or ""

    def changed(self, *arguments: str) -> set[str]:
        """The paths that `git diff` names."""
        return set(self("diff", "--name-only", "--no-renames", "-z", *arguments).split("\0")) - {""}

    def index_lock(self) -> Path:
        """The file with which git locks the checkout."""
        return self.checkout / self("rev-parse", "--git-path", "index.lock")

    def drop_worktree(self, release: Path) -> None:
        """Remove a release's folder and what git knows of it, whatever state a cut-off run left them in."""
        shutil.rmtree(release, ignore_errors=True)
        self.ask("worktree", "remove", "--force", "--force", str(release))
        self.ask("worktree", "prune")

    def check_fast_forward(self, branch: str, there: str, revision: str) -> None:
        """Failure, the cases told apart by looking, if the checkout cannot follow its remote branch."""
        place = self.checkout
        if self.ask("symbolic-ref", "--quiet", "--short", "HEAD") != branch:
            raise Failure(f"{place} is not on the branch {branch}", f"git -C {place} checkout {branch}")
        if self.ask("merge-base", "--is-ancestor", "HEAD", revision) is None:
            raise Failure(f"{branch} in {place} and {there} diverged: it has commits that {there} has not",
                          f"when git log {there}..HEAD shows none that is needed: git reset --keep {there}")
        if self.index_lock().exists():
            raise Failure(f"another git is at work in {place}, or was cut off there",
                          f"when none runs: rm {self.index_lock()}")
        changed, added = self.changed("HEAD", revision), self.changed("--diff-filter=A", "HEAD", revision)
        in_the_way = changed & self.changed("HEAD") | {each for each in added if os.path.lexists(place / each)}
        in_the_way |= {str(folder) for each in added for folder in Path(each).parents
                       if (place / folder).exists() and not (place / folder).is_dir()} - changed
        if in_the_way:
            raise Failure(f"changes in {place} stand in the way: {', '.join(sorted(in_the_way))}",
                          "commit and push them, or put them away: git stash --include-untracked")


# ---------------------------------------------------------------------------------------------- health check

Answer = tuple[bool, str]  # whether it is the expected one, and what was seen


def http_opener(unix: Path | None) -> Any:
    """A urllib opener that follows no redirect and asks no proxy, through the `unix` socket if there is one."""
    import http.client  # here, because it and ssl take longer to load than all the rest of this file
    import urllib.request

    class Unix(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(str(unix))

    class ThroughUnix(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Unix, request)

        https_open, https_request = http_open, urllib.request.HTTPHandler.http_request

    opener = urllib.request.OpenerDirector()  # with no handler of redirects, proxies or errors
    for handler in [ThroughUnix()] if unix else [urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()]:
        opener.add_handler(handler)
    return opener


class HealthCheck(NamedTuple):
    """What a healthy site answers to which question: the settings of [health]."""

    url: str
    host: str
    headers: dict[str, str]
    expect: int
    contains: str
    timeout: float
    deadline: float

    def ask(self, unix: Path | None) -> Answer:
        """Ask once."""
        import urllib.request

        where = f"{self.url}{' on the private socket' if unix else ''}"
        headers = {"User-Agent": "deploy.py", **self.headers} | ({"Host": self.host} if self.host else {})
        try:
            request = urllib.request.Request(self.url, headers=headers)
            with http_opener(unix).open(request, timeout=self.timeout) as answer:
                saw = f"{answer.status} {answer.reason} for {where}"
                body = answer.read(1 << 20) if self.contains else b""
        except Exception as error:  # noqa: BLE001 - whatever is wrong with an answer, the news is the same
            return False, f"no answer from {where} ({getattr(error, 'reason', None) or error})"
        if answer.status != self.expect:
            return False, f"{saw}, expected {self.expect}"
        if self.contains.encode() not in body:
            return False, f"{saw}, but without the text {self.contains!r}"
        return True, saw

    def address(self) -> str:
        """Where a browser finds the site: by its public name if it has one."""
        public = re.search(r"[A-Za-z-]\.", self.host)
        return f"{self.headers.get('X-Forwarded-Proto', 'http')}://{self.host}/" if public else self.url

    def wait(self, seconds: float, unix: Path | None = None, alive: Callable[[], bool] = lambda: True) -> Answer:
        """Ask until the answer is right, for `seconds` and with growing pauses; once when that is 0."""
        until, rest = time.monotonic() + seconds, 0.1
        while True:
            good, saw = within(self.timeout, lambda: self.ask(unix), self.url)
            if good or time.monotonic() + rest > until or not alive():
                return good, saw
            time.sleep(rest)
            rest = min(rest * 2, 3.0)


def within(seconds: float, ask: Callable[[], Answer], name: str) -> Answer:
    """The answer, if it is there in time; in a thread, because urllib's time limit holds for each socket call alone."""
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else (False, f"no answer from {name} within {seconds:g} s")


# ------------------------------------------------------------------------------------------------------ site

FOREIGN = re.compile(r"GIT_(?!SSH|ASKPASS)|PIPENV_|VIRTUAL_ENV$|PYTHON(PATH|HOME)$|DEPLOY_")
USUAL_PATH = "~/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/snap/bin"


class Site:
    """The checkout with its settings, and what every command needs of it."""

    def __init__(self, options: argparse.Namespace, output: Output) -> None:
        self.options, self.output, self.settings = options, output, read_settings(options.config)
        self.settings_file: Path = options.config.resolve()
        self.settings_text, self.checkout = self.settings_file.read_bytes(), self.settings_file.parent
        self.workspace = Workspace((self.checkout / self.settings["deploy.workspace"]).resolve())
        self.lock, self.runner = Lock(self.workspace.root / "lock"), Runner(output)
        self.git = Git(self.checkout, self.runner, self.base)

    @cached_property
    def base(self) -> dict[str, str]:
        """The environment of every command before `.env`: without git's, pipenv's or Python's own variables."""
        kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        # cron and ssh give a short PATH
        path = dict.fromkeys([*kept.get("PATH", "").split(":"), *os.path.expanduser(USUAL_PATH).split(":")])
        return kept | {
            "PATH": ":".join(filter(None, path)), "PYTHONUNBUFFERED": "1", "GIT_TERMINAL_PROMPT": "0",
            "GIT_SSH_COMMAND": kept.get("GIT_SSH_COMMAND", "ssh") + " -o BatchMode=yes -o ConnectTimeout=20",
            "PIPENV_DONT_LOAD_ENV": "1", "PIPENV_NOSPIN": "1", "PIPENV_IGNORE_VIRTUALENVS": "1", "PIPENV_YES": "1",
            "WORKON_HOME": str(self.workspace.venvs),
        }

    @cached_property
    def variables(self) -> dict[str, str]:
        """What `.env` says; its secrets are hidden from now on."""
        found = read_env(self.checkout / self.settings["env.file"])
        self.output.hide(secrets_in(found) | {found.get(self.settings["notify.webhook"]) or ""} - {""})
        return found

    @cached_property
    def hosts(self) -> list[str]:
        """The public names of the site: those of ALLOWED_HOSTS."""
        return [each for each in re.split(r"[,\s]+", self.variables.get("ALLOWED_HOSTS", "")) if each not in ("", "*")]

    @cached_property
    def health(self) -> HealthCheck | None:
        """The health check; its Host is by default the first of ALLOWED_HOSTS. None when its url is empty."""
        chosen = {key: self.settings[f"health.{key}"] for key in SECTIONS["health"]}
        chosen["host"] = chosen["host"] or next((each.lstrip(".") for each in self.hosts), "")
        return HealthCheck(**chosen) if chosen["url"] else None

    def project(self, release: Path) -> Path:
        """The folder of manage.py and Pipfile in a release."""
        return release / str(self.settings["deploy.project"])

    def environment(self, release: Path) -> dict[str, str]:
        """The environment of a command for a release: `.env`, and its packages first in PATH."""
        found = self.base | self.variables
        if release == self.checkout:
            return found
        venv = (self.project(release) / ".venv").resolve()
        return found | {"VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin:{found['PATH']}", "DEPLOY_RELEASE": str(release)}

    def run(
        self, setting: str, release: Path, more: Mapping[str, str] | None = None, quiet: bool = False,
        stdout: int | None = None, stdin: int = subprocess.DEVNULL, only: Sequence[str] = (),
    ) -> str:
        """Run the commands of a setting in the project of a release, or of the checkout; what quiet ones wrote."""
        limit = self.settings.get(setting.split(".")[0] + ".timeout", 600.0)
        environment, place = self.environment(release) | dict(more or {}), self.project(release)
        return "\n".join(self.runner.run(argv, place, environment, limit, quiet, stdout, stdin)
                         for argv in ([only] if only else self.settings[setting]))

    def find_python(self, lock: Path) -> Path:
        """The real path of the Python that the settings or Pipfile.lock ask for."""
        try:
            requires = json.loads(lock.read_bytes())["_meta"].get("requires", {})
        except (ValueError, KeyError, TypeError):
            raise Failure("Pipfile.lock is not a lock file", RELOCK) from None
        name = self.settings["install.python"] or f"python{requires.get('python_version', '3')}"
        path = shutil.which(name, path=self.base["PATH"])
        if not path:
            raise Failure(f"{name} is not on this server", f"sudo apt-get install {name}, or mend [install] python")
        return Path(path).resolve()

    def check_owner(self) -> None:
        """Failure unless this is a checkout of the user who runs this."""
        if not (self.checkout / ".git").exists():
            raise Failure(f"{self.checkout} is not a git checkout", "keep the settings file in the checkout", MISTAKE)
        owner, user = (user_name(number) for number in (self.checkout.stat().st_uid, os.geteuid()))
        if owner != user:
            raise Failure(f"{self.checkout} belongs to {owner}, and you are {user}",
                          f"run it as its owner: sudo -u {owner} python3 {SCRIPT}")

    def ask_health(self, seconds: float = 0) -> Answer:
        """Whether the site answers its health check within so many seconds, and what was seen."""
        return self.health.wait(seconds) if self.health else (True, "not asked: [health] url is empty")

    def ask_checks(self, release: Path) -> dict[str, Answer]:
        """What the commands of [status] checks found: the last line of each, and whether it ended with status 0."""
        found: dict[str, Answer] = {}
        for name, argv in self.settings["status.checks"].items():
            try:
                said = self.run("status.checks", release, quiet=True, only=argv)
                found[name] = True, (said.splitlines() or ["it ended with status 0"])[-1]
            except Failure as error:
                found[name] = False, error.last if isinstance(error, CommandFailed) else error.what
        return found

    def ask_disk(self) -> Answer:
        """Whether there is room for a deployment, and what the workspace takes."""
        disk = shutil.disk_usage(self.checkout)
        sizes = {each.name: sum(file.lstat().st_size for file in each.rglob("*")) for each in self.workspace.folders}
        taken = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
        return disk.free >= ROOM, f"{disk.free / 1e9:.1f} GB free; {taken}"

    def certificate(self) -> float | None:
        """The days that the site's certificate is still good; None without HTTPS, SSLError when it is refused."""
        import ssl

        name = next((each.lstrip(".") for each in self.hosts), "localhost")
        with contextlib.suppress(ConnectionError, TimeoutError):
            with (socket.create_connection(("127.0.0.1", 443), 5) as raw,
                  ssl.create_default_context().wrap_socket(raw, server_hostname=name) as tls):
                ends = str((tls.getpeercert() or {})["notAfter"])
            return (ssl.cert_time_to_seconds(ends) - time.time()) / DAY
        return None

    def state(self) -> tuple[int, str]:
        """The exit status that a failure deserves, and what is live, asked for now."""
        live = self.workspace.live()
        if self.lock.text.get("database") or self.lock.text.get("reversing"):
            return NEEDS_HUMAN, "the database is left half way: run this again, which puts it right first"
        if not live:
            return FAILED, "no release is live yet"
        if not self.workspace.entry(live):
            return NEEDS_HUMAN, f"{live.name} is switched to, never was healthy, and nothing was live before it"
        good, saw = self.ask_health()
        if not good:
            return NEEDS_HUMAN, f"{live.name} is live and NOT healthy: {saw}"
        return FAILED, f"{live.name} is live{' and healthy' if self.health else ''}"


# ------------------------------------------------------------------------------------------------- candidate

class Candidate(Child):
    """A release's own gunicorn on a private socket, which must answer the health check before any user sees it."""

    def __init__(self, site: Site, release: Path, early: bool = False) -> None:
        self.early = early  # it boots while its static files are written
        self.socket, self.limit = site.workspace.root / "candidate.sock", site.settings["restart.timeout"]
        self.tail: deque[str] = deque(maxlen=TAIL)

        def take(line: str) -> None:
            self.tail.append(f"| {line}")
            site.output.say(f"| {line}", "candidate", shown=False)

        self.socket.unlink(missing_ok=True)
        argv = [word.replace("{socket}", str(self.socket)) for word in site.settings["restart.candidate"][0]]
        # it alone does not inherit the lock, because it would never end after a killed deployer
        super().__init__(argv, site.project(release), site.environment(release), site.output, [take])

    def end(self) -> None:
        """End it, and remove its socket."""
        super().end()
        self.socket.unlink(missing_ok=True)

    def await_boot(self) -> None:
        """Wait until it accepts connections: with --preload, it has been imported then. Else Failure."""
        until = time.monotonic() + self.limit
        while True:
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(self.socket))
                return
            if self.ended(0.05):
                raise self.failure("it does not start")
            if time.monotonic() > until:
                raise self.failure(f"it has not started after {self.limit:g} s")

    def failure(self, saw: str) -> Failure:
        """That it was not proven, and why, as far as its last lines tell."""
        errors = [line[2:] for line in self.tail if re.match(r"\| [A-Za-z][\w.]*: ", line)]
        saw += f" ({errors[-1][:200]})" if errors else ""
        return Failure(f"the candidate was not proven: {saw}",
                       details=["the candidate's last lines:", *self.tail] if self.tail else ())


# ------------------------------------------------------------------------------------------------- the steps

RELOCK = "run pipenv lock, commit Pipfile.lock and push"
LOCK_TIMEOUT = re.compile(r"LockNotAvailable|lock (wait )?timeout", re.IGNORECASE)
# Runs in `manage.py shell`: lists the migrations of the default database, or reverses those of DEPLOY_UNDO.
MIGRATIONS = b"""
import json, os
from django.core.management import call_command
from django.db import connection
from django.db.migrations import DeleteModel, RemoveField
from django.db.migrations.executor import MigrationExecutor

executor = MigrationExecutor(connection, print)
graph, applied, undo = executor.loader.graph, executor.loader.applied_migrations, os.environ.get("DEPLOY_UNDO")
plan = [(each, (each.app_label, each.name) in applied)
        for each, _ in executor.migration_plan(graph.leaf_nodes(), clean_start=True)]
if undo:
    executor.migrate(None, [(each, True) for each, done in reversed(plan) if done and str(each) in undo.split()])
else:
    # it refuses what Django's checks find, migrations in conflict, and an inconsistent history
    call_command("migrate", plan=True, skip_checks=False)
    print(json.dumps([{"name": str(each), "applied": done, "reversible": all(one.reversible for one in each.operations),
                       "removes": [one.describe() for one in each.operations
                                   if isinstance(one, (DeleteModel, RemoveField))]} for each, done in plan]))
"""


def check_reversible(migrations: Iterable[Mapping[str, Any]]) -> None:
    """Failure unless every one of these migrations can be reversed."""
    if fixed := names(each for each in migrations if not each["reversible"]):
        raise Failure(f"no migration was reversed, because {fixed} cannot be", "write a migration that undoes it")


def names(migrations: Iterable[Mapping[str, Any]]) -> str:
    """The names of migrations, for a sentence."""
    return ", ".join(each["name"] for each in migrations)


class Deployment(Site):
    """One run under the lock that may change what is live: a deployment or a rollback."""

    def __init__(self, options: argparse.Namespace, output: Output) -> None:
        super().__init__(options, output)
        self.asked: str = getattr(options, "revision", "")
        self.resumed = os.environ.get("DEPLOY_RESUME", "")  # the lock and start of the version that this one replaces
        self.began, self.started = time.monotonic(), self.resumed[-16:] or clock("%Y%m%dT%H%M%SZ")
        self.release, self.revision = self.checkout, ""  # until there is a candidate
        self.seconds: dict[str, float] = {}
        self.recorded: list[dict[str, Any]] = []  # lines of the history that are still to be told
        self.candidate: Candidate | None = None
        self.replaced: tuple[Path | None, Path | None] | None = None  # current and previous before the switch
        self.migrating: tuple[list[dict[str, Any]], Path | None] | None = None  # what is planned, and the backup

    def pull(self) -> None:
        """Step 2: fetch, fast-forward the checkout, and check the revision out into a folder of its own."""
        remote, branch = self.settings["pull.remote"], self.settings["pull.branch"]
        self.revision = self.revision or self.fetch(remote, branch)
        if not self.asked:
            self.git.check_fast_forward(branch, f"{remote}/{branch}", self.revision)
        self.release = release = self.workspace.releases / f"{self.started}-{self.revision[:7]}"
        self.lock.write(release=release.name, revision=self.revision)
        self.git("worktree", "add", "--quiet", "--detach", str(release), self.revision)
        if (release / ".gitmodules").exists():
            self.git("submodule", "update", "--init", "--recursive", "--quiet", folder=release, timeout=600)
        for name in self.settings["deploy.shared"]:
            share(self.checkout / name, release / name, folder=name.endswith("/"))
        self.output.say(f"{self.asked or branch} is {self.revision[:7]}: {self.git.subject(self.revision)}")
        if not self.asked:
            self.follow()

    def fetch(self, remote: str, branch: str) -> str:
        """Fetch the branch, or everything when a revision was asked for; the full hash of the revision."""
        what, retries = ["--tags", "--force"] if self.asked else [branch], self.settings["pull.retries"]
        try:
            for attempt in range(retries):
                with contextlib.suppress(CommandFailed):
                    self.git("fetch", "--quiet", remote, *what, timeout=self.settings["pull.timeout"])
                    break
                self.output.say("git fetch failed; trying again")
                time.sleep(2.0 * (attempt + 1))
            else:
                self.git("fetch", "--quiet", remote, *what, timeout=self.settings["pull.timeout"])
        except CommandFailed as error:
            if remote not in self.git("remote").split():
                raise Failure(f"the checkout has no remote {remote}", f"git remote add {remote} URL") from None
            if self.git.ask("ls-remote", "--quiet", remote) is None:
                raise Failure(f"the remote {remote} cannot be reached, or refuses this server's key",
                              f"try: git ls-remote {remote}", FAILED, error.details) from None
            if not self.asked and not self.git.ask("ls-remote", remote, f"refs/heads/{branch}"):
                raise Failure(f"the remote {remote} has no branch {branch}", "mend [pull] branch") from None
            raise
        names = [f"refs/remotes/{remote}/{self.asked}", self.asked] if self.asked else ["FETCH_HEAD"]
        found = self.git.commit(*names)
        if not found:
            raise Failure(f"there is no revision {self.asked}", "name a branch, a tag or a commit that was pushed")
        return found

    def follow(self) -> None:
        """Fast-forward the checkout; if that brings another version of this program, become it, with the lock kept."""
        running = {os.path.relpath(path, self.checkout): path for path in (SCRIPT, self.settings_file)}
        changed = self.git.changed("HEAD", self.revision) & set(running)
        tool, settings = (str(self.release / name if name in changed else path) for name, path in running.items())
        try:  # before the checkout follows: a tool that cannot start could never pull what mends it
            if changed:
                self.runner.run([sys.executable, tool, "-c", settings, "history"], self.release, self.base, 60, True)
        except CommandFailed as error:
            raise Failure("the deploy.py or the settings file of this revision does not work", status=MISTAKE,
                          details=error.details) from None
        self.lock.write(target=self.revision)
        self.git("merge", "--ff-only", "--quiet", self.revision)
        self.lock.write(target="")
        if changed and not self.resumed:
            self.output.line = None  # on a terminal, the new version takes this step anew
            self.output.say("deploy.py or its settings changed: starting over as the new version")
            self.git.drop_worktree(self.release)
            os.set_inheritable(self.lock.descriptor, True)
            os.environ["DEPLOY_RESUME"] = f"{self.lock.descriptor} {self.started}"
            os.execv(sys.executable, [sys.executable, str(SCRIPT), *sys.argv[1:]])

    def install(self) -> None:
        """Step 3: the packages of Pipfile.lock, in the virtual environment that belongs to it."""
        project = self.project(self.release)
        lock = project / "Pipfile.lock"
        if not lock.is_file():
            raise Failure("this revision has no Pipfile.lock", RELOCK)
        python = self.find_python(lock)
        made_of = repr((lock.read_bytes(), python, self.settings["install.command"]))
        venv = self.workspace.venvs / f"{python.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
        if (venv / ".complete").exists():
            self.output.say("nothing to install: the environment of this Pipfile.lock is complete")
        else:
            shutil.rmtree(venv, ignore_errors=True)
            pipenv = {"PIPENV_CUSTOM_VENV_NAME": venv.name, "PIPENV_DEFAULT_PYTHON_VERSION": str(python)}
            try:
                self.run("install.command", self.release, pipenv)
            except CommandFailed as error:  # a stale lock is told apart by asking pipenv
                try:
                    self.run("install.command", self.release, pipenv, quiet=True, only=["pipenv", "verify"])
                except Failure:
                    raise Failure("Pipfile.lock is stale: it was not made of this Pipfile", RELOCK, FAILED,
                                  error.details) from None
                raise
            os.sync()  # a power cut must not leave the mark of an environment whose files are empty
            (venv / ".complete").touch()
            sync(venv)
        (project / ".venv").symlink_to(os.path.relpath(venv, project.resolve()))

    def migrate(self) -> None:
        """Step 6: if a migration is planned, back the database up and migrate."""
        planned = [each for each in self.migrations(self.release) if not each["applied"]]
        if not planned and self.settings["migrate.shell"]:
            self.output.say("nothing to migrate")
            return
        self.output.say(f"to be applied: {names(planned) or 'unknown, because [migrate] shell is empty'}")
        for each in planned:
            if marks := ["it cannot be reversed"] * (not each["reversible"]) + each["removes"]:
                self.output.say(f"note: {each['name']}: {'; '.join(marks)}; the release before may not work with that")
        if self.candidate:  # what cannot be imported never touches the database
            self.booted(self.candidate)
        saved = back_up(self, self.release.name) if self.settings["backup.command"] else None
        if not saved:
            self.output.say("no backup: [backup] command is empty")
        self.migrating = planned, saved
        self.patiently(lambda more: self.run("migrate.command", self.release, more))

    def migrations(self, release: Path) -> list[dict[str, Any]]:
        """Every migration that a release knows, in their order: name, applied, reversible, what it removes."""
        if not self.settings["migrate.shell"]:
            return []
        said = self.in_django(release, {}, quiet=True)
        try:
            return list(json.loads(said.splitlines()[-1]))
        except (ValueError, IndexError):
            raise Failure("[migrate] shell did not list the migrations",
                          "it must run the Python that it gets on its stdin, as manage.py shell does") from None

    def in_django(self, release: Path, more: Mapping[str, str], quiet: bool = False) -> str:
        """Run MIGRATIONS in a release; what it wrote if it was quiet."""
        with tempfile.TemporaryFile() as code:  # a file, because manage.py shell passes over a pipe that is empty yet
            code.write(MIGRATIONS)
            code.seek(0)
            return self.run("migrate.shell", release, more, quiet, stdin=code.fileno())

    def patiently(self, act: Callable[[Mapping[str, str]], object]) -> None:
        """Change the schema under a lock timeout; with growing pauses again and again, if only a lock is in the way."""
        limit, pause = self.settings["migrate.lock_timeout"], 1.0
        until = time.monotonic() + self.settings["migrate.timeout"]
        options = self.environment(self.checkout).get("PGOPTIONS", "")
        options += f" -c lock_timeout={limit * 1000:.0f}ms"  # only PostgreSQL reads it
        while True:
            try:
                act({"PGOPTIONS": options.strip()})
                return
            except CommandFailed as error:
                if not LOCK_TIMEOUT.search("\n".join(error.details)) or time.monotonic() + pause > until:
                    raise
            self.output.say(f"another transaction held a lock for more than {limit:g} s; trying again in {pause:g} s")
            time.sleep(pause)  # the requests that waited behind the migration have their turn
            pause = min(pause * 2, 30.0)

    def reverse(self, release: Path, chosen: Sequence[Mapping[str, Any]]) -> None:
        """Reverse migrations with the code of a release, last first."""
        undo = {"DEPLOY_UNDO": " ".join(each["name"] for each in chosen)}
        self.patiently(lambda more: self.in_django(release, {**more, **undo}))

    def settle_schema(self, failure: Failure) -> None:
        """Say which migrations of a deployment that failed were applied; reverse them if [migrate] says so."""
        if not self.migrating:
            return
        planned, saved = self.migrating
        stays = "; the schema stays as it is"
        try:
            done = {each["name"] for each in self.migrations(self.release) if each["applied"]}
            applied, left = ([each for each in planned if (each["name"] in done) is so] for so in (True, False))
            told = f"migrations applied: {names(applied) or 'none'}; not applied: {names(left) or 'none'}"
            failure.what += f"; {told if planned else 'which migrations were applied is unknown'}"
            if applied and self.settings["migrate.reverse_on_failure"]:
                check_reversible(applied)
                self.reverse(self.release, applied)
                stays = "; those applied were reversed"
        except Failure as error:
            stays += f": {error.what}"
        failure.what += stays
        if saved:
            failure.what += f"; the database before it all comes back with: python3 deploy.py restore {saved} --yes"

    def restart(self) -> None:
        """Step 7: prove the candidate, switch to it, restart gunicorn, and check the health of the site."""
        if self.candidate:
            if self.health:
                self.output.say(f"the candidate answers: {self.prove(self.candidate, self.health)}")
            self.candidate.end()
        os.sync()  # a power cut must not leave a release live whose files are empty
        old = self.workspace.live()
        self.replaced = old, self.workspace.linked(self.workspace.previous)
        if old and old != self.release:
            point(self.workspace.previous, old)
        point(self.workspace.current, self.release)
        self.run("restart.command", self.release)
        if self.options.command == "restart":
            self.run("restart.proxy", self.release)
        self.check_health(self.release)

    def booted(self, candidate: Candidate) -> Candidate:
        """The candidate once it has booted, or a fresh one if it met static files that were only half there."""
        try:
            candidate.await_boot()
        except Failure:
            if not candidate.early or not candidate.ended(0):
                raise
            return self.renewed(candidate)
        return candidate

    def renewed(self, candidate: Candidate) -> Candidate:
        """A fresh candidate in place of one that booted before its static files and its schema were there."""
        candidate.end()
        self.candidate = candidate = Candidate(self, self.release)
        candidate.await_boot()
        return candidate

    def prove(self, candidate: Candidate, health: HealthCheck) -> str:
        """How the candidate answered the health check; Failure when it does not."""
        candidate = self.booted(candidate)
        good, saw = health.wait(0, candidate.socket)
        if not good:
            candidate = self.renewed(candidate)
            good, saw = health.wait(health.deadline, candidate.socket, alive=lambda: not candidate.ended(0))
        if not good:
            raise candidate.failure(saw)
        return saw

    def check_health(self, release: Path) -> None:
        """Failure unless the site answers its health check, and from this release."""
        if not self.health:
            return
        good, saw = self.ask_health(self.health.deadline)
        if not good:
            raise Failure(f"the site is not healthy: {saw}")
        places = set(gunicorns(self.checkout).values())
        if places and self.project(release).resolve() not in places:
            raise Failure(f"gunicorn runs in {', '.join(map(str, places))}, not in {release}",
                          f"its service must run in {self.workspace.current}")
        self.output.say(f"the site answers: {saw}")

    def go_back(self, old: Path | None, older: Path | None) -> None:
        """Make `old` live again; whatever fails on the way is said, and what is live is asked for at the end."""
        self.output.say(f"going back to {old.name}" if old else "there is no earlier release to go back to")
        if not old:
            return
        point(self.workspace.current, old)
        if older:
            point(self.workspace.previous, older)
        else:
            self.workspace.previous.unlink(missing_ok=True)
        for argv in self.settings["restart.command"]:
            self.excuse(self.run, "restart.command", old, only=argv)
        self.excuse(self.check_health, old)

    def excuse(self, act: Callable[..., object], *arguments: object, **options: object) -> None:
        """Act; a failure is said, and no more."""
        try:
            act(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - what is live does not depend on it
            self.output.say(f"warning: {as_failure(error, self.output)}")

    # ------------------------------------------------------------------------------------------- around the steps

    def under_lock(self, act: Callable[[], None]) -> int:
        """Act under the lock, after recovery; a failure leaves here as Failure, with all cleaned up."""
        self.check_owner()
        _ = self.variables  # a mistake in it is refused before anything is touched
        os.umask(0o022)  # nginx must be able to read the static files, whoever deploys
        self.workspace.make()
        left = self.take_lock()
        try:
            if not self.resumed:
                self.recover(left)
            act()
        except BaseException as error:  # noqa: BLE001 - a deployment goes back whatever happens
            Interrupted.shielded = True
            failure = as_failure(error, self.output)
            self.open_log()
            if self.candidate:
                self.candidate.end()
            self.excuse(self.undo_fast_forward)
            if self.replaced:
                self.go_back(*self.replaced)
            self.excuse(self.undo_restore)
            self.excuse(self.undo_reversal)
            self.excuse(self.settle_schema, failure)
            found, failure.live = self.state()
            failure.status = NEEDS_HUMAN if found == NEEDS_HUMAN else failure.status
            self.excuse(self.record, "interrupted" if isinstance(error, Interrupted) else "failed", failure.what,
                        failure.live)
            self.excuse(self.sweep)
            raise failure from None
        finally:
            self.lock.release()
            self.runner.inherited = ()
            for entry in self.recorded:
                self.excuse(notify, self, entry)
        return OK

    def take_lock(self) -> dict[str, Any]:
        """Take the lock, or that of the version which this one replaces, and say in it who holds it; what was in it."""
        left = {}
        if self.resumed:
            self.lock.descriptor = int(self.resumed.split()[0])
            os.set_inheritable(self.lock.descriptor, False)
        else:
            left = self.lock.take(self.options.wait, self.output)
        self.runner.inherited = (self.lock.descriptor,)
        self.lock.write(command=self.options.command, by=started_by(), since=clock(), started=self.started,
                        pid=os.getpid(), step="its start", **{key: left.get(key) for key in UNFINISHED})
        return left

    def recover(self, left: Mapping[str, Any]) -> None:
        """Put right what a run that was cut off left behind, and say what was found and done."""
        if left:
            self.open_log()
            self.output.say(f"found: a {left.get('command')} by {left.get('by')} was cut off at {left.get('step')}")
            fields = ("release", "revision", "command", "by", "started")
            self.record("cut off", **{key: left.get(key, "") for key in fields})
        for process in gunicorns(self.workspace.releases, "candidate"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # SIGTERM would have it remove the next one's socket
        self.undo_fast_forward()
        live, lines = self.workspace.live(), self.workspace.went_live()
        proven = self.workspace.releases / lines[-1]["release"] if lines else None
        if live and proven and live != proven and proven.is_dir():
            self.open_log()
            self.output.say(f"found: {live.name} was switched to, and is not known to be healthy")
            self.go_back(proven, self.workspace.earlier(proven))
        if left.get("database") or left.get("reversing"):  # after a power cut, the database may be down
            self.run("services.command", self.checkout)
        self.undo_restore()
        self.undo_reversal()
        self.sweep()

    def undo_fast_forward(self) -> None:
        """Undo the fast-forward of the checkout if it was cut off; every path of it was clean when it began."""
        if not (target := self.lock.text.get("target")):
            return
        self.git.index_lock().unlink(missing_ok=True)  # our own git's: none of ours runs any more
        added, others = (self.git.changed(f"--diff-filter={which}", "HEAD", target) for which in "Aa")
        self.git("reset", "--quiet")
        for name in added:
            (self.checkout / name).unlink(missing_ok=True)
        if others:
            self.git("checkout", "--quiet", "HEAD", "--", *sorted(others))
        self.lock.write(target="")
        self.output.say("undid the fast-forward of the checkout, which was cut off")

    def deploy(self) -> None:
        """Take all steps; with --if-changed only when the branch, `.env` or the settings are not those of last time."""
        if self.options.if_changed and not self.resumed:
            self.output.quiet = True
            self.revision = self.fetch(self.settings["pull.remote"], self.settings["pull.branch"])
            last = [entry["inputs"] for entry in self.workspace.history() if entry.get("inputs")]
            if last[-1:] == [self.inputs()]:
                return
        self.take(self.settings["deploy.steps"])

    def inputs(self) -> str:
        """A fingerprint of all that makes a deployment another one than the last."""
        env = (self.checkout / self.settings["env.file"]).read_bytes()
        return hashlib.sha256(b"\0".join((self.revision.encode(), env, self.settings_text))).hexdigest()

    def rollback(self) -> None:
        """Make the release that was named live again, or the newest healthy one before the live one."""
        live, name = self.workspace.live(), self.options.release
        release = self.workspace.releases / name if name else self.workspace.earlier(live)
        if not release:
            raise Failure("there is no earlier healthy release to go back to", "history shows what there was")
        if release not in self.workspace.healthy():
            raise Failure(f"{name} is no release that was healthy and is kept", "history shows those that were")
        if release == live:
            self.output.say(f"{name} is live already")
            return
        self.release, self.revision = release, self.workspace.entry(release)["revision"]
        self.output.say(f"from {live.name if live else 'nothing'} to {release.name}")
        self.open_log()
        if self.settings["restart.candidate"]:
            self.candidate = Candidate(self, release)  # it boots while the two schemas are compared
        if live and self.settings["migrate.shell"]:
            self.part_schema(live, release)
        self.take(("restart",))
        self.lock.write(reversing=None)

    def part_schema(self, newer: Path, older: Path) -> None:
        """Say which migrations separate two releases; with --reverse-migrations, back up and reverse them."""
        self.output.label = "migrate"
        try:
            known, applied = self.migrations(older), [each for each in self.migrations(newer) if each["applied"]]
        except Failure as error:
            if self.options.reverse_migrations:
                raise
            self.output.say(f"warning: which migrations separate them is unknown: {error}")
            return
        if lacking := names(each for each in known if not each["applied"]):
            raise Failure(f"{older.name} needs {lacking}, which the database lacks",
                          f"deploy it instead: python3 deploy.py deploy {self.revision[:7]}")
        between = [each for each in applied if each["name"] not in {one["name"] for one in known}]
        apart = f"{newer.name} has {names(between) or 'no migration'} more than {older.name}"
        if not self.options.reverse_migrations or not between:
            self.output.say(f"{apart}; the schema stays{', see --reverse-migrations' if between else ''}")
            return
        check_reversible(between)
        self.output.say(f"{apart}, to be reversed")
        if self.candidate:  # what cannot be imported never touches the database
            self.candidate.await_boot()
        back_up(self, f"{self.started}-rollback")
        self.lock.write(step="migrate", reversing=newer.name)
        self.reverse(newer, between)

    def undo_reversal(self) -> None:
        """Apply again what a rollback reversed, if the release that needs it is live after all."""
        live, name = self.workspace.live(), self.lock.text.get("reversing")
        if live and live.name == name:
            self.output.say(f"applying again what was reversed, because {name} is live")
            self.patiently(lambda more: self.run("migrate.command", live, more))
        if name:
            self.lock.write(reversing=None)

    def restart_all(self) -> None:
        """Restart everything that the live release needs, in the order of a deployment; it proves itself first."""
        live = self.workspace.live()
        if not live:
            raise Failure("nothing is live yet", "deploy first: python3 deploy.py")
        self.release, self.revision = live, self.workspace.entry(live).get("revision", "")
        self.take(("services", "restart"))

    def take(self, steps: Sequence[str]) -> None:
        """Take the steps, record the success, remove what is past its keep, and say what is live and what changed."""
        self.open_log()
        old = self.workspace.live()
        for step in steps:
            self.perform(step)
        Interrupted.shielded = True  # what is recorded as live is not taken back
        self.record("restarted" if self.options.command == "restart" else "live")
        self.replaced = None
        self.output.label = "deploy"
        self.excuse(self.sweep, all_of_it=True)
        self.excuse(say_changes, self, old)
        healthy, see = (" and healthy", f"; see {self.health.address()}") if self.health else ("", "")
        self.output.say(f"{self.release.name} is live{healthy}; it took {time.monotonic() - self.began:.1f} s{see}")

    def perform(self, step: str) -> None:
        """Take one step, with its hooks, and say how long it took."""
        self.lock.write(step=step)
        before = (entry.get("steps", {}).get(step) for entry in self.workspace.went_live()[-10:])
        took = sorted(filter(None, before))
        with self.output.step(step, took[len(took) // 2] if took else 0):
            if self.settings.get(f"{step}.command") == () and step != "restart":
                self.output.say("skipped: its command is empty")
                return
            if step in ("static", "migrate", "restart") and self.settings["restart.candidate"] and not self.candidate:
                self.candidate = Candidate(self, self.release, early=step == "static")  # it boots while these steps run
            began = time.monotonic()
            try:
                self.act(step)
            finally:
                self.seconds[step] = round(time.monotonic() - began, 3)
            self.output.say(f"done in {self.seconds[step]:.1f} s", passing=True)

    def act(self, step: str) -> None:
        """What a step does, between its hooks."""
        self.run(f"{step}.before", self.release)
        if step == "env":
            self.output.say(f"{plural(len(self.variables), 'variable')} in {self.settings['env.file']}")
        elif step in ("services", "static"):  # Compose takes the name of its project from the checkout's
            self.run(f"{step}.command", self.release if step == "static" else self.checkout)
        else:
            getattr(self, step)()
        self.run(f"{step}.after", self.release)

    def open_log(self) -> None:
        """There is something to do: show and log all from now on, under a name that no other run has had."""
        while not self.output.log and not self.resumed and (self.workspace.logs / f"{self.started}.log").exists():
            time.sleep(0.1)  # the run before began in this very second
            self.started = clock("%Y%m%dT%H%M%SZ")
        self.output.open_log(self.workspace.logs / f"{self.started}.log")
        self.output.quiet = self.options.command == "backup" and self.options.json  # its stdout is one line of JSON

    def record(self, result: str, message: str = "", state: str = "", **changes: object) -> None:
        """Write this run's line of the history."""
        live, command = self.workspace.live(), self.options.command
        counts = command == "deploy" and self.revision and not self.asked and result in ("live", "failed")
        entry = {
            "release": "" if self.release == self.checkout else self.release.name, "revision": self.revision,
            "subject": self.output.mask(self.git.subject(self.revision)), "command": command, "by": started_by(),
            "started": self.started, "ended": clock(), "seconds": round(time.monotonic() - self.began, 3),
            "steps": self.seconds, "result": result, "message": self.output.mask(message),
            "state": self.output.mask(state), "live": live.name if live else "",
            "inputs": self.inputs() if counts else "",
        } | changes
        self.workspace.record(entry)
        self.recorded.append(entry)

    def sweep(self, all_of_it: bool = False) -> None:
        """Remove the releases that are not kept; `all_of_it`: environments, backups and logs past their keep, too."""
        kept = self.workspace.kept(self.settings["deploy.keep_releases"])
        for release in sorted(set(self.workspace.releases.iterdir()) - kept):
            self.git.drop_worktree(release)
            self.output.say(f"removed the release {release.name}", shown=False)
        for partial in self.workspace.backups.glob("*.part"):
            partial.unlink()
        if all_of_it:
            used = {(self.project(release) / ".venv").resolve() for release in kept}
            for venv in set(self.workspace.venvs.iterdir()) - used:
                shutil.rmtree(venv)
            self.sweep_backups("*-*.dump")
            self.sweep_backups("*Z.dump")
            for log in sorted(self.workspace.logs.glob("*.log"))[:-self.settings["deploy.keep_logs"]]:
                log.unlink()

    def sweep_backups(self, pattern: str) -> None:
        """Keep the newest backups of a kind: those before a change have a `-` in their names, the others do not."""
        for backup in sorted(self.workspace.backups.glob(pattern))[:-self.settings["backup.keep"]]:
            backup.unlink()

    # ---------------------------------------------------------------------------------------- backup and restore

    def backup(self) -> None:
        """Back the database up, by hand or from cron."""
        self.open_log()
        self.output.label = "backup"
        path = back_up(self, self.started)
        self.record("backed up", str(path))
        self.sweep_backups("*Z.dump")  # this kind alone: a failed migration's stays
        if self.options.json:
            print(json.dumps({"file": str(path), "bytes": path.stat().st_size, "started": self.started}))

    def restore(self) -> None:
        """Put a backup in the place of the database; with --test, restore it beside that and drop it again."""
        self.open_log()
        self.output.label = "restore"
        file, test, say = self.options.file, self.options.test, self.output.say
        database = f"restore_{self.started.lower()}"
        verify(self, file)
        before = self.count("")
        say(f"restoring {file} beside the database")
        self.lock.write(step="restore", database=database)
        with open(file, "rb") as dump:
            self.on_database("load", database, dump.fileno())
        say(f"the backup holds {self.count(database)}; the database {before}")
        if not test:
            self.exchange(database)
        self.undo_restore()
        self.record("tested" if test else "restored", str(file))
        say(f"{file} {'can be restored; nothing was changed' if test else 'is the database now, and takes writes'}")

    def exchange(self, database: str) -> None:
        """Put the restored database in the live one's place, and back if the site is not healthy with it."""
        self.output.say("from now on the database takes no writes; reads go on")
        self.lock.write(frozen=True)
        self.on_database("freeze", database)
        back_up(self, f"{self.started}-restore")
        Interrupted.shielded = True  # what follows takes a moment, and is not left half done
        live = self.workspace.live()
        self.on_database("swap", database)
        try:
            if live:
                self.check_health(live)
        except Failure:
            self.on_database("swap", database)
            raise
        with contextlib.suppress(Failure):
            if live and (lacking := names(each for each in self.migrations(live) if not each["applied"])):
                self.output.say(f"note: the restored database lacks {lacking}; python3 deploy.py applies them")

    def undo_restore(self) -> None:
        """Let the database take writes again, and drop the one beside it, be that the restored or the old one."""
        if not (database := self.lock.text.get("database")):
            return
        if self.lock.text.get("frozen"):
            self.on_database("thaw", database)
        self.on_database("drop", database)
        self.lock.write(database=None, frozen=None)

    def on_database(self, act: str, database: str, stdin: int = subprocess.DEVNULL) -> str:
        """Run [restore] command for an act on a database; what it wrote."""
        words = {"{act}": act, "{database}": database}
        return "\n".join(self.run("restore.command", self.checkout, quiet=True, stdin=stdin,
                                  only=[words.get(word, word) for word in argv])
                         for argv in self.settings["restore.command"])

    def count(self, database: str) -> str:
        """How many tables and rows a database holds (empty: the live one), for a sentence; Failure if it has none."""
        rows = [int(found[-1]) for line in self.on_database("count", database).splitlines()
                if (found := re.findall(r"\d+", line))]
        if database and not rows:
            raise Failure("the backup holds no table", "restore another one")
        return f"{plural(len(rows), 'table')} with {plural(sum(rows), 'row')}"


MAKE_ROOM = "make room, as df -h shows where, then try again"


def as_failure(error: BaseException, output: Output) -> Failure:
    """Any error as the Failure that the user reads; the traceback of one that nobody foresaw goes to the log."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Failure("the disk is full", "make room (df -h shows where), then deploy again")
    for line in "".join(traceback.format_exception(error)).splitlines():
        output.say(line, shown=False)
    return Failure(f"{type(error).__name__}: {error}", "see the log: python3 deploy.py logs")


# ---------------------------------------------------------------------------------------------------- backup

def back_up(site: Site, name: str) -> Path:
    """Stream the backup command's output into a file that is whole, and proven, once it has its name."""
    if not site.settings["backup.command"]:
        raise Failure("the database cannot be backed up: [backup] command is empty", "say there how it is")
    path = site.workspace.backups / f"{name}.dump"
    partial = path.with_suffix(".part")
    check_room(path.parent)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        site.run("backup.command", site.checkout, quiet=True, stdout=descriptor)
        os.fsync(descriptor)
        size = os.fstat(descriptor).st_size
        if not size:
            raise Failure("the backup is empty", "mend [backup] command: it must write the dump to its stdout")
        verify(site, partial)
        partial.replace(path)
        sync(path.parent)
    except (CommandFailed, OSError):
        if shutil.disk_usage(path.parent).free < PIECE:
            raise Failure("the backup has filled the disk", MAKE_ROOM) from None
        raise
    finally:
        os.close(descriptor)
        partial.unlink(missing_ok=True)
    site.output.say(f"backed up: {path} ({size / 1e6:.1f} MB)")
    for argv in site.settings["backup.after"]:
        site.run("backup.after", site.checkout, only=[word.replace("{file}", str(path)) for word in argv])
    return path


def check_room(folder: Path) -> None:
    """Failure unless a backup as large as the last one fits on the disk, with some room to spare."""
    sizes = [backup.stat().st_size for backup in sorted(folder.glob("*.dump"))]
    needed, free = sum(sizes[-1:]) * 1.2 + 16 * PIECE, shutil.disk_usage(folder).free
    if free < needed:
        raise Failure(f"there is no room for a backup: {free / 1e6:.0f} MB are free in {folder}, "
                      f"and {needed / 1e6:.0f} are needed", MAKE_ROOM)


def verify(site: Site, file: Path) -> None:
    """Failure unless [backup] verify, which gets it on its stdin, finds that a file is a whole backup."""
    try:
        with open(file, "rb") as dump:
            site.run("backup.verify", site.checkout, quiet=True, stdin=dump.fileno())
    except CommandFailed as error:
        raise Failure(f"{file.name} is not a whole backup: {error.what}", "see what [backup] command writes",
                      details=error.details) from None


# --------------------------------------------------------------------------------------------- what changed

def say_changes(site: Deployment, old: Path | None) -> None:
    """Say what the release of this run changed against the one that was live before it, a line each."""
    before = site.workspace.entry(old).get("revision")
    if not old or not before:
        return
    log = site.git("log", "--left-right", "--format=%m %h %s", f"{before}...{site.revision}").splitlines()
    was, now = (packages(site.project(release) / "Pipfile.lock") for release in (old, site.release))
    moved = [name for name in sorted(was | now) if was.get(name) != now.get(name)]
    for line in (*shortened([f"commit {'taken back ' if line[0] == '<' else ''}{line[2:]}" for line in log]),
                 *(f"migration {each['name']}" for each in (site.migrating or [[]])[0]),
                 *shortened([f"package {name}: {was.get(name, 'none')} -> {now.get(name, 'none')}" for name in moved])):
        site.output.say(line)


def shortened(lines: list[str], most: int = 10) -> list[str]:
    """The first lines of a list, and how many more there are."""
    return lines if len(lines) <= most + 1 else [*lines[:most], f"and {len(lines) - most} more"]


def packages(lock: Path) -> dict[str, str]:
    """The packages of a Pipfile.lock with their versions, or what stands in place of one."""
    found = json.loads(lock.read_bytes())["default"] if lock.is_file() else {}
    return {name: str(each.get("version") or each.get("ref")).removeprefix("==") for name, each in found.items()}


# -------------------------------------------------------------------------------------------- notifications

FAILURES = ("failed", "interrupted", "cut off")


def notify(site: Deployment, entry: Mapping[str, Any]) -> None:
    """Tell the journal, the webhook and the command of [notify] of a line of the history."""
    failed, limit = entry["result"] in FAILURES, site.settings["notify.timeout"]
    text = site.output.mask(announcement(site, entry))
    to_journal(site.settings["notify.journal"], {
        "MESSAGE": text, "PRIORITY": "3" if failed else "6", "SYSLOG_IDENTIFIER": "deploy",
        **{f"DEPLOY_{key.upper()}": str(entry[key]) for key in ("command", "result", "release", "revision", "by")}})
    before = [each["result"] in FAILURES for each in site.workspace.history()
              if each["command"] == entry["command"] and each["started"] < entry["started"]]
    if not failed and site.settings["notify.on"] not in ("always", "recovery" if before[-1:] == [True] else ""):
        return
    if name := site.settings["notify.webhook"]:
        payload = {"text": text, "content": text, "details": entry}
        to = site.variables.get(name, f"no {name} in {site.settings['env.file']}")
        told, saw = within(limit, lambda: post(to, payload, limit), "it")
        if not told:
            site.output.say(f"warning: the webhook was not told: {saw}")
    for argv in site.settings["notify.command"]:
        site.excuse(site.runner.run, [*argv, text], site.checkout, site.environment(site.checkout), limit, quiet=True)


def announcement(site: Site, entry: Mapping[str, Any]) -> str:
    """A line of the history as one sentence, no longer than Discord takes."""
    what = entry["message"] or f"{entry['release']} is live, {entry['subject']}"
    said = (f"{entry['command']} {entry['result']}", what, entry["state"], f"by {entry['by']}", entry["started"])
    place = (site.health and site.health.host) or socket.gethostname()
    return f"{place}: {'; '.join(filter(None, said))}"[:2000]


def post(url: str, payload: Mapping[str, object], limit: float) -> Answer:
    """POST JSON once, with no proxy and no redirect."""
    import urllib.request
    try:
        headers = {"Content-Type": "application/json", "User-Agent": "deploy.py"}
        request = urllib.request.Request(url, json.dumps(payload).encode(), headers)
        with http_opener(None).open(request, timeout=limit) as answer:
            return 200 <= answer.status < 300, f"it answered {answer.status} {answer.reason}"
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the deployment goes on
        return False, str(getattr(error, "reason", None) or error)


def to_journal(path: str, fields: Mapping[str, str]) -> None:
    """One structured entry for systemd's journal, where there is one, in its native protocol."""
    entry = "".join(f"{name}={' '.join(value.split())}\n" for name, value in fields.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.setblocking(False)
        journal.sendto(entry.encode("utf-8", "replace"), path)


# -------------------------------------------------------------------------------------------- other commands

def deploy_command(site: Deployment) -> int:
    """Deploy the remote branch, or a revision."""
    if not site.options.dry_run:
        return site.under_lock(site.deploy)
    site.check_owner()  # from here on nothing is started that changes anything
    remote, branch, say = site.settings["pull.remote"], site.asked or site.settings["pull.branch"], site.output.say
    refs = [f"refs/heads/{branch}", f"refs/tags/{branch}^{{}}", f"refs/tags/{branch}"]  # ^{}: what a tag names
    listed = dict(line.split("\t")[::-1] for line in (site.git.ask("ls-remote", remote, *refs) or "").splitlines())
    revision = next((listed[ref] for ref in refs if ref in listed), "") or site.git.commit(site.asked or "-")
    if not revision:
        raise Failure(f"{remote} has no {branch}, or cannot be reached", f"try: git ls-remote {remote}")
    live = site.workspace.live()
    say(f"would deploy {revision[:7]} ({branch}); live is {live.name if live else 'nothing'}; nothing is changed now")
    builtin = {"env": [f"read {plural(len(site.variables), 'variable')}"],
               "pull": [f"git fetch {remote}", f"git worktree add {site.workspace.releases}/…"]}
    for step in site.settings["deploy.steps"]:
        lines = [shlex.join(argv) for key in ("before", "command", "after")
                 for argv in site.settings.get(f"{step}.{key}", ())] + builtin.get(step, [])
        for line in lines or ["nothing: its command is empty"]:
            say(line, step)
    say(f"ask for {site.settings['health.url'] or 'nothing'}", "health")
    return OK


def rollback_command(site: Deployment) -> int:
    """Go back to the newest earlier release that was healthy, or to the one named."""
    return site.under_lock(site.rollback)


def backup_command(site: Deployment) -> int:
    """Back the database up."""
    return site.under_lock(site.backup)


def restore_command(site: Deployment) -> int:
    """Put a backup in the place of the database, after a backup of that."""
    options = site.options
    options.file = options.file.absolute()
    if not options.file.is_file():
        raise Failure(f"there is no file {options.file}", f"name one of those in {site.workspace.backups}")
    if not (options.yes or options.test):
        raise Failure(f"{options.file} would replace the database, which would be backed up first and take no writes "
                      "meanwhile; nothing was done", "say --yes if you mean it; --test changes nothing", USAGE)
    return site.under_lock(site.restore)


def restart_command(site: Deployment) -> int:
    """Restart everything: the services, gunicorn behind its stand-by, nginx; then the health check."""
    return site.under_lock(site.restart_all)


def status_command(site: Site) -> int:
    """What is live, since when, whether it and all that it needs is well, and who holds the lock; 0 only if all is."""
    live, mask = site.workspace.live(), site.output.mask
    entry, holder = site.workspace.entry(live), site.lock.holder()
    answers = {"health": site.ask_health(), **site.ask_checks(live or site.checkout), "disk": site.ask_disk()}
    if site.workspace.maintenance.exists():
        answers["maintenance"] = False, "nginx answers 503 to everyone; end it: python3 deploy.py maintenance off"
    healthy = bool(live) and all(good for good, _ in answers.values())
    if site.options.json:
        found = {key: entry.get(key) for key in ("revision", "subject", "ended", "by")}
        found |= {"release": live.name if live else None, "healthy": healthy, "lock": holder}
        found["checks"] = {name: {"good": good, "saw": mask(saw)} for name, (good, saw) in answers.items()}
        print(json.dumps(found, indent=2))
    else:
        print(f"{'live':<11} {live.name if live else 'nothing'}  {entry.get('subject', '')}".rstrip())
        print(f"{'since':<11} {entry.get('ended', 'unknown')}, deployed by {entry.get('by', 'unknown')}")
        for name, (good, saw) in answers.items():
            print(f"{name:<11} {'good' if good else 'BAD'}: {mask(saw)}")
        print(f"{'lock':<11} {holder or 'free'}")
    return OK if healthy else FAILED


def history_command(site: Site) -> int:
    """The deployments, newest last, with the time that each step took."""
    for entry in site.workspace.history():
        if site.options.json:
            print(json.dumps(entry))
            continue
        steps = entry.get("steps", {})
        what = [each for each in (entry["command"], entry["result"]) if each not in ("deploy", "live")]
        what = what[-1:] if entry["result"] not in FAILURES else what  # restarted, backed up, restored
        row = (f"{entry['started']}  {' '.join(what) or 'live':<11}  {entry['revision'][:7]:<7}  "
               f"{entry['seconds']:6.1f} s  {entry['by'].rpartition(', ')[2].split(' ')[0]:<8}  ")
        if site.output.terminal:
            width = shutil.get_terminal_size().columns - 1
            site.output.show(fit(f"{row}{bar(steps, width // 8)}  {entry['subject']}", width))
        else:
            took = " ".join(f"{step} {seconds:.1f}" for step, seconds in steps.items())
            print(f"{row}{entry['subject']}{f'  ({took})' if took else ''}")
    return OK


def bar(steps: Mapping[str, float], width: int) -> str:
    """The steps' shares of their time, each drawn with its first letter; a second one with an S in its capital."""
    drawn, passed, total = "", 0.0, sum(steps.values()) or 1
    for step, took in steps.items():
        passed += took
        letter = step[0].upper() if step[0] in drawn else step[0]
        drawn += letter * (round(passed / total * width) - len(drawn))
    return drawn.ljust(width)


def logs_command(site: Site) -> int:
    """The log of a deployment, the newest by default; with -f what is still written to it."""
    logs = sorted(site.workspace.logs.glob(f"{site.options.release.split('-')[0]}*.log"))
    if not logs:
        raise Failure("there is no such log", "history shows the deployments that there were")
    with open(logs[-1], encoding="utf-8") as log:
        following = True
        while following:
            following = site.options.follow and bool(site.lock.holder())
            shutil.copyfileobj(log, sys.stdout)
            sys.stdout.flush()
            time.sleep(0.3 if following else 0)
    return OK


def maintenance_command(site: Site) -> int:
    """Have nginx answer 503 to everyone (on), or let users in again (off); the health check goes past it."""
    site.check_owner()
    site.workspace.make()
    if site.options.state == "on":
        site.workspace.maintenance.touch()
    else:
        site.workspace.maintenance.unlink(missing_ok=True)
    print(f"maintenance is {site.options.state}")
    return OK


def manage_command(site: Site) -> int:
    """manage.py of the live release, in its environment."""
    live = site.workspace.live()
    if not live:
        raise Failure("nothing is live yet", "deploy first: python3 deploy.py")
    os.chdir(site.project(live))
    os.execvpe("python", ["python", "manage.py", *site.options.arguments], site.environment(live))


Findings = Iterator[tuple[str, str]]  # what is wrong, and its remedy


def problems(site: Site) -> Findings:
    """What would make a deployment fail, as far as it can be known beforehand."""
    settings, lock = site.settings, site.project(site.checkout) / "Pipfile.lock"
    programs = [argv[0] for step in STEP_NAMES for argv in settings.get(f"{step}.command", ())]
    for tool in dict.fromkeys(["git", *programs]):
        if tool != "python" and not shutil.which(tool, path=site.base["PATH"]):
            yield f"{tool} is not installed, or not in PATH", INSTALLED_BY.get(tool, "install it")
    tries = [["docker", "compose", "version"], ["docker", "ps", "--quiet"]] if "docker" in programs else []
    tries += [["sudo", "-n", "--list", *argv[2:]] for argv in settings["restart.command"] + settings["restart.proxy"]
              if argv[:2] == ("sudo", "-n")]
    for argv in tries:
        try:
            site.runner.run(argv, site.checkout, site.base, 60, quiet=True)
        except CommandFailed as error:
            yield error.what, f"sudo python3 {SCRIPT} setup, then log in again"
        except Failure:
            continue  # that it is not installed was said
    remote, branch = settings["pull.remote"], settings["pull.branch"]
    for look in (site.check_owner, lambda: site.variables, lambda: site.find_python(lock),
                 lambda: site.git.check_fast_forward(branch, f"{remote}/{branch}", "HEAD")):
        try:
            look()
        except FileNotFoundError as error:
            yield f"{error.filename} is not there", RELOCK
        except Failure as error:
            yield "; ".join((error.what, *error.details)), error.remedy
    with contextlib.suppress(Failure):  # of `.env`, which was said
        healthy, saw = site.ask_health() if site.workspace.live() else (True, "")
        if not healthy:
            yield f"the site is not healthy: {saw}", "see journalctl -u gunicorn, and python3 deploy.py logs"
    for folder in (site.checkout, site.workspace.root):
        if folder.exists() and not os.access(folder, os.W_OK):
            yield f"{folder} cannot be written to", f"sudo chown -R {user_name(os.geteuid())} {folder}"
    if shutil.disk_usage(site.checkout).free < ROOM:
        yield "less than 1 GiB of disk space is free", "make room, as with docker system prune"
    if not site.git.ask("ls-remote", remote, f"refs/heads/{branch}"):
        yield "the remote branch cannot be read", f"try: git ls-remote {remote}"


def alarms(site: Site) -> Findings:
    """What is wrong now, although a deployment would succeed."""
    if site.variables.get("DEBUG", "").lower() in ("true", "yes", "on", "1"):
        yield "DEBUG is on: visitors see settings and source", "DEBUG=False in .env, then deploy"
    if (name := site.settings["notify.webhook"]) and name not in site.variables:
        yield f"[notify] webhook names {name}, which {site.settings['env.file']} does not have", "write it there"
    deployments = [entry for entry in site.workspace.history() if entry["command"] == "deploy"]
    for last in deployments[-1:]:
        if last["result"] != "live":
            yield f"the last deployment, {last['started']}: {last['result']}, {last['message']}", "mend it and push"
    try:
        days = site.certificate()
        if days is not None and days < 14:
            yield f"the certificate ends in {days:.0f} days", "sudo certbot renew"
    except OSError as error:  # SSLError is one
        yield f"browsers refuse the certificate: {error}", "sudo certbot --nginx"


def advice(site: Site) -> Findings:
    """What a careful operator would mend."""
    if live := site.workspace.live():
        try:
            site.run("check.command", live, quiet=True)
        except CommandFailed as error:
            for line in (each for each in error.details if re.match(r"\| .*\(\w+\.[WEC]\d+\)", each)):
                yield f"Django says {line.strip('| ?:').split('. ')[0]}", "see python3 deploy.py manage check --deploy"
    ages = [time.time() - each.stat().st_mtime for each in site.workspace.backups.glob("*.dump")]
    if site.settings["backup.command"] and min(ages, default=math.inf) > 2 * DAY:
        yield "there is no backup of the last two days", "have cron make one every night: see the README"
    with contextlib.suppress(OSError):
        if site.certificate() is None:
            yield "the site is not served over HTTPS", "sudo certbot --nginx: see the README"
    with contextlib.suppress(Failure):
        listening = site.runner.run(["ss", "-Hltn"], site.checkout, site.base, 10, quiet=True)
        places = {line.split()[3].rpartition(":") for line in listening.splitlines()}
        ports = {int(port) for host, _, port in places if not re.match(r"127\.|\[(::ffff:127\.|::1\])", host)}
        for port in sorted(ports - {22, 80, 443}):
            yield f"port {port} is open to every address", "bind it to 127.0.0.1, or close it in the firewall"
    with contextlib.suppress(Failure):
        upgrades = ["apt-config", "dump", "APT::Periodic::Unattended-Upgrade"]
        if '"1"' not in site.runner.run(upgrades, site.checkout, site.base, 10, quiet=True):
            yield "security updates do not install themselves", "sudo apt-get install unattended-upgrades"


def check_command(site: Site) -> int:
    """Is this server ready to deploy, and is all well? Everything at once, each with its remedy; 0 only if so."""
    wrong = list(problems(site)) or list(alarms(site))
    lines = [f"problem: {what}; {remedy}" for what, remedy in wrong] or ["ready to deploy"]
    if not wrong and not site.options.quiet:
        lines += [f"advice: {what}; {remedy}" for what, remedy in advice(site)]
    if wrong or not site.options.quiet:
        print(site.output.mask("\n".join(lines)))
    return FAILED if wrong else OK


# ---------------------------------------------------------------------------------------------------- set-up

PACKAGES = {"git": "git", "sudo": "sudo", "nginx": "nginx", "pipenv": "pipenv", "docker": "docker.io"}
SECURE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # where sudo looks for a program
UNITS, NGINX, SUDOERS = Path("/etc/systemd/system"), Path("/etc/nginx"), Path("/etc/sudoers.d")
ENABLED = NGINX / "sites-enabled"


class Setup(Site):
    """What a server needs before its first deployment: each part is checked, and put in place where it differs."""

    def __init__(self, options: argparse.Namespace, output: Output) -> None:
        super().__init__(options, output)
        output.label, owner = "setup", pwd.getpwuid(self.checkout.stat().st_uid)
        self.user, self.group = owner.pw_name, grp.getgrgid(owner.pw_gid).gr_name
        self.changes, self.undo = 0, contextlib.ExitStack()  # what puts the server back when a later part fails

    def ask(self, *argv: str, shown: bool = False) -> str:
        """What a command wrote, run as root; Failure when it fails."""
        environment = self.base | {"DEBIAN_FRONTEND": "noninteractive"}
        return self.runner.run(argv, self.checkout, environment, 3600, quiet=not shown)

    def holds(self, *argv: str) -> bool:
        """Whether a command ends with status 0."""
        with contextlib.suppress(Failure):
            self.ask(*argv)
            return True
        return False

    def change(self, *argv: str, undo: Sequence[str] = (), shown: bool = False) -> None:
        """Run a command that changes something, and know what takes it back; a dry run only says it."""
        self.changes += 1
        self.output.say(f"$ {shlex.join(argv)}", shown=not shown or self.options.dry_run)
        if not self.options.dry_run:
            if undo:
                self.undo.callback(self.holds, *undo)
            self.ask(*argv, shown=shown)

    def place(self, path: Path, text: str, mode: int = 0o644) -> None:
        """Put a file in its place if it differs, with what was there kept beside it."""
        old = path.read_text(encoding="utf-8") if path.exists() else None
        if text == old:
            return
        self.changes += 1
        self.output.say(f"write {path}")
        if self.options.dry_run:
            for line in difflib.unified_diff((old or "").splitlines(), text.splitlines(), "now", "then", lineterm=""):
                self.output.say(line)
            return
        beside, kept = (path.with_name(f"{path.name}.{ending}") for ending in ("new", clock("%Y%m%dT%H%M%SZ")))
        beside.write_text(text, encoding="utf-8")
        beside.chmod(mode)
        if old is None:
            self.undo.callback(path.unlink, missing_ok=True)
        else:
            shutil.copy2(path, kept)
            self.undo.callback(kept.replace, path)
        beside.replace(path)

    def filled(self, source: Path) -> str:
        """The text of a shipped file, with the path, the user and the names of this site."""
        text = source.read_text(encoding="utf-8").replace("/home/ubuntu/gforms", str(self.checkout))
        text = text.replace("server_name gforms.example.com;", f"server_name {' '.join(self.hosts)};")
        text = re.sub(r"^User=.*", f"User={self.user}", text, flags=re.MULTILINE)
        return re.sub(r"^Group=.*", f"Group={self.group}", text, flags=re.MULTILINE)

    def set_up(self) -> None:
        """Check every part, then put it in place, in an order in which the site that is there goes on."""
        timer = self.options.timer
        units = [each for each in sorted((self.checkout / "systemd").iterdir()) if timer or "deploy" not in each.name]
        running = self.holds("systemctl", "is-active", "gunicorn")
        in_place = running and not self.workspace.live()
        if in_place and (changed := self.as_owner("git", "status", "--porcelain", "--untracked-files=no")):
            raise Failure(f"changes in {self.checkout} are in no commit: {changed.split(maxsplit=1)[1]}",
                          "commit and push them, or what runs now cannot become a release")
        self.packages()
        self.verify_units(units)
        rights, (sites, replaced) = self.rights(), self.sites()
        # a gunicorn that holds the port by itself goes on behind the socket, as it is, with its own unit
        first = [each for each in units if each.suffix == ".socket" or not running]
        self.take_port(self.place_units(first), running)
        self.place_units([each for each in units if each not in first])
        self.enable(units)
        self.place(SUDOERS / re.sub(r"\W", "-", f"{self.checkout.name}-deploy"), rights, 0o440)
        for folder in [*reversed(self.checkout.parents), self.checkout]:  # nginx must reach the static files
            if not folder.stat().st_mode & 0o001:
                self.change("chmod", "o+x", str(folder), undo=("chmod", "o-x", str(folder)))
        if in_place:  # what it runs becomes the first release
            revision = self.as_owner("git", "rev-parse", "HEAD")
            self.change("sudo", "-Hu", self.user, "--", sys.executable, str(SCRIPT), "-c", str(self.settings_file),
                        "deploy", revision, shown=True)
        self.place_sites(sites, replaced)

    def as_owner(self, *argv: str) -> str:
        """What a command of the checkout's owner wrote."""
        return self.ask("sudo", "-Hu", self.user, "--", *argv)

    def packages(self) -> None:
        """The programs of a deployment, and its user's right to Docker."""
        settings, path = self.settings, self.base["PATH"]
        programs = {argv[0] for step in STEP_NAMES for argv in settings.get(f"{step}.command", ())} | {"git", "nginx"}
        missing = [PACKAGES[each] for each in sorted(programs & {*PACKAGES}) if not shutil.which(each, path=path)]
        if "docker" in programs and not self.holds("docker", "compose", "version"):
            known = self.holds("apt-cache", "show", "docker-compose-v2")
            missing.append("docker-compose-v2" if known else "docker-compose")  # Ubuntu's name, and Debian's
        if missing:
            self.change("apt-get", "update")
            self.change("apt-get", "install", "--yes", *missing)
        if "docker" in programs and "docker" not in self.ask("id", "-nG", self.user).split():
            self.change("usermod", "--append", "--groups", "docker", self.user)

    def verify_units(self, units: Sequence[Path]) -> None:
        """Failure when systemd does not accept the units."""
        with tempfile.TemporaryDirectory() as folder:
            for each in units:  # the program that they start is there only after the first deployment
                text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", self.filled(each), flags=re.MULTILINE)
                Path(folder, each.name).write_text(text, encoding="utf-8")
            self.ask("systemd-analyze", "verify", *(f"{folder}/{each.name}" for each in units))

    def place_units(self, units: Sequence[Path]) -> bool:
        """Put the units in their place and have systemd read them; whether one differed."""
        if not self.options.dry_run:
            self.undo.callback(self.holds, "systemctl", "daemon-reload")
        before = self.changes
        for each in units:
            self.place(UNITS / each.name, self.filled(each))
        if self.changes == before:
            return False
        self.change("systemctl", "daemon-reload")
        return True

    def take_port(self, changed: bool, running: bool) -> None:
        """The socket holds the port of the site; a gunicorn that is `running` goes on behind it."""
        if not changed and self.holds("systemctl", "is-active", "gunicorn.socket"):
            return
        if running:
            self.change("systemctl", "stop", "gunicorn.socket", "gunicorn", undo=("systemctl", "restart", "gunicorn"))
        self.change("systemctl", "start", "gunicorn.socket", undo=("systemctl", "stop", "gunicorn.socket"))
        if running:
            self.change("systemctl", "start", "gunicorn")

    def enable(self, units: Sequence[Path]) -> None:
        """What is there after a reboot."""
        for each in units:
            if "[Install]" in each.read_text(encoding="utf-8") and not self.holds("systemctl", "is-enabled", each.name):
                now = ["--now"] if each.suffix == ".timer" else []
                self.change("systemctl", "enable", *now, each.name, undo=("systemctl", "disable", *now, each.name))

    def rights(self) -> str:
        """The sudoers file: the right to run as root what [restart] runs with sudo, and nothing else."""
        rights = []
        for argv in self.settings["restart.command"] + self.settings["restart.proxy"]:
            if argv[:2] == ("sudo", "-n"):
                words = " ".join(re.sub(r"([\\,:=*?!\[\] ])", r"\\\1", word) for word in argv[3:])
                program = shutil.which(argv[2], path=SECURE_PATH) or f"/usr/sbin/{argv[2]}"
                rights.append(f"{self.user} ALL=(root) NOPASSWD: {program} {words or chr(34) * 2}\n")  # "": no argument
        text = f"# What [restart] of {self.settings_file} runs.\n{''.join(rights)}"
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            self.ask("visudo", "--check", "--file", file.name)
        return text

    def sites(self) -> tuple[dict[str, str], list[Path]]:
        """nginx's files for this site, tried with all the others; and those of them that these take the place of."""
        ours = {each.name: self.filled(each) for each in sorted((self.checkout / "nginx").glob("*.conf"))}
        others = {each: each.read_text(encoding="utf-8") for each in sorted(ENABLED.glob("*")) if each.exists()}
        same = re.compile(rf"server_name[^;]*\s({'|'.join(map(re.escape, self.hosts))})[\s;]")
        replaced = [each for each, text in others.items()
                    if each.name not in ours and (each.name == "default" or same.search(text))]
        for each, text in others.items():
            if (each in replaced or each.name in ours) and "managed by Certbot" in text:
                self.output.say(f"{each} is managed by Certbot: nginx is left as it is")
                return {}, []
        if NGINX.exists() or not self.options.dry_run:
            self.try_sites({each.name: text for each, text in others.items() if each not in replaced} | ours)
        return ours, replaced

    def try_sites(self, sites: Mapping[str, str]) -> None:
        """Failure when nginx does not accept its configuration with these sites, and no other, enabled."""
        with tempfile.TemporaryDirectory() as folder:
            staged = Path(folder)
            for each in NGINX.iterdir():  # for what it includes with a relative path
                (staged / each.name).symlink_to(each)
            for name in ("nginx.conf", ENABLED.name):
                (staged / name).unlink()
            main = (NGINX / "nginx.conf").read_text(encoding="utf-8")
            (staged / "nginx.conf").write_text(main.replace(str(ENABLED), f"{staged}/{ENABLED.name}"), encoding="utf-8")
            (staged / ENABLED.name).mkdir()
            for name, text in sites.items():
                (staged / ENABLED.name / name).write_text(text, encoding="utf-8")
            self.ask("nginx", "-t", "-q", "-c", f"{staged}/nginx.conf")

    def place_sites(self, sites: Mapping[str, str], replaced: Sequence[Path]) -> None:
        """Put nginx's files in place and have nginx read them."""
        available, before = NGINX / "sites-available", self.changes
        for each in replaced:
            kept = str(available / f"{each.name}.{clock('%Y%m%dT%H%M%SZ')}")
            self.change("mv", str(each), kept, undo=("mv", kept, str(each)))
        for name, text in sites.items():
            self.place(available / name, text)
            if not (link := ENABLED / name).exists():
                self.change("ln", "-s", f"../sites-available/{name}", str(link), undo=("rm", str(link)))
        if self.changes > before:
            self.change("systemctl", "reload-or-restart", "nginx")


def setup_command(site: Setup) -> int:
    """As root: put in place what a server needs before its first deployment; safe to run again."""
    if os.geteuid():
        raise Failure("only root may set a server up", f"sudo python3 {SCRIPT} setup", MISTAKE)
    if site.user == "root" or not re.fullmatch(r"[\w./+-]+", str(site.checkout)):
        raise Failure(f"{site.checkout} must belong to the user who deploys, and have a plain name",
                      "mend it: chown -R, or mv", MISTAKE)
    if not site.hosts:
        raise Failure("ALLOWED_HOSTS in .env names no host", "write the public names of the site there", MISTAKE)
    if not (site.checkout / "systemd").is_dir():
        raise Failure(f"{site.checkout} has no folder systemd", "commit it, with nginx, beside deploy.py", MISTAKE)
    if holder := site.lock.holder():
        raise Failure(f"another run holds the lock: {holder}", "wait for it", LOCKED)
    try:
        with site.undo:
            site.set_up()
            site.undo.pop_all()
    except Failure as error:
        error.live = "what it had changed was put back, but for packages and groups"
        if isinstance(error, CommandFailed):
            error.remedy = f"mend that, then: sudo python3 {SCRIPT} setup"
        raise
    made = "would be made" if site.options.dry_run else "made; next: log in again, then python3 deploy.py"
    site.output.say(f"{plural(site.changes, 'change')} {made}" if site.changes else "nothing to change")
    return OK


# ---------------------------------------------------------------------------------------------- command line

def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; without a command it is `deploy`."""
    parser = argparse.ArgumentParser(
        prog="deploy.py", description="Deploy a Django project on the one server that it runs on.",
        epilog="Without a command: deploy. Each command has its own --help.")
    parser.add_argument("-c", "--config", type=Path, default=SCRIPT.with_name("deploy.ini"), metavar="FILE",
                        help="the settings file (default: deploy.ini beside deploy.py)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    added = {}
    for act in (deploy_command, rollback_command, backup_command, restore_command, restart_command, status_command,
                history_command, logs_command, check_command, maintenance_command, manage_command, setup_command):
        name = act.__name__.removesuffix("_command")
        added[name] = commands.add_parser(name, help=act.__doc__, description=act.__doc__)
        added[name].set_defaults(act=act)
    deploy = added["deploy"]
    deploy.add_argument("revision", nargs="?", default="", help="a branch, tag or commit (default: [pull] branch)")
    deploy.add_argument("--if-changed", action="store_true",
                        help="do and say nothing unless the branch, .env or the settings changed")
    for name in ("deploy", "setup"):
        added[name].add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    added["setup"].add_argument("--timer", action="store_true", help="deploy what is new every five minutes, too")
    for name in ("rollback", "logs"):
        added[name].add_argument("release", nargs="?", default="", help="a release of the history")
    added["rollback"].add_argument("--reverse-migrations", action="store_true",
                                   help="reverse the migrations that separate the releases, after a backup")
    restore = added["restore"]
    restore.add_argument("file", type=Path, metavar="FILE", help="a backup, as those in .deploy/backups")
    restore.add_argument("--yes", action="store_true", help="do it: what the database holds now is replaced")
    restore.add_argument("--test", action="store_true", help="restore it beside the database, and drop it again")
    for name in ("deploy", "rollback", "backup", "restore", "restart"):
        added[name].add_argument("--wait", type=float, default=0, metavar="SECONDS",
                                 help="wait so long for another run to end (default: do not wait)")
    for name in ("backup", "status", "history"):
        added[name].add_argument("--json", action="store_true", help="for programs")
    added["logs"].add_argument("-f", "--follow", action="store_true", help="go on while it is written")
    added["maintenance"].add_argument("state", choices=["on", "off"])
    added["check"].add_argument("-q", "--quiet", action="store_true", help="say nothing unless there is a problem")
    added["manage"].add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    at = 0
    while at < len(argv) and argv[at].startswith(("-c", "--config")):
        at += 2 if argv[at] in ("-c", "--config") else 1
    if at == len(argv) or (at < len(argv) and argv[at].startswith("-") and argv[at] not in ("-h", "--help")):
        argv = [*argv[:at], "deploy", *argv[at:]]  # so that `deploy.py --wait 60` is understood
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status. Only this turns a failure into a sentence."""
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    Interrupted.install()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    output = Output()
    try:
        locked = ("deploy", "rollback", "backup", "restore", "restart")
        kinds = {**dict.fromkeys(locked, Deployment), "setup": Setup}
        return int(options.act(kinds.get(options.command, Site)(options, output)))
    except Failure as failure:
        error = failure
    except Exception as unforeseen:  # noqa: BLE001 - never a traceback
        error = as_failure(unforeseen, output)
    output.quiet = False
    for line in error.details:
        output.say(line)
    live = error.live or ("nothing was touched" if error.status in (LOCKED, MISTAKE) else "")
    output.say("; ".join(filter(None, (f"FAILED: {error.what}", live, error.remedy))))
    return error.status


if __name__ == "__main__":
    raise SystemExit(main())
