"""A stand-in for systemd, for machines that have none: one socket unit and the services that share it.

It reads the real unit files and does what the deployment counts on. It holds the socket and passes it on
(LISTEN_FDS), waits for READY=1 (Type=notify), stops as KillMode=mixed does, restarts what died, and starts
the service on the first connection. It ignores users, hardening, start limits, and orderings between units.

    STANDIN_UNITS   the folder of the unit files
    STANDIN_STATE   a folder for the daemon: its control socket, its log, and one log for every service

`systemctl start` starts a daemon when there is none. `systemctl exit`, which is not systemd's, stops every
unit and ends the daemon; so does the removal of its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pwd
import re
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

LISTENER = 3  # the first descriptor that a service is passed, and therefore ours too
CLEAN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# LISTEN_PID must be the process that reads it, so it is set between fork and exec. PWD is the shell's own.
# A folder that is not there is an exit status, as it is for systemd. The folder and the command follow.
EXECUTE = ["/bin/sh", "-c", 'cd "$0" && unset PWD OLDPWD && export LISTEN_PID=$$ && exec "$@"']
STOPPED = ("inactive", "failed")
CLEAN_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
BECAUSE = {
    "exit-code": "the control process exited with error code.",
    "signal": "a fatal signal was delivered to the control process.",
    "timeout": "a timeout was exceeded.",
    "resources": "of unavailable resources or another system error.",
    "protocol": "the service did not take the steps required by its unit configuration.",
}

# ---------------------------------------------------------------------------------------------- unit files

Settings = dict[str, list[str]]

# In a value, quotes count at its start only; after that they are text, as they are for systemd.
QUOTED = r"""[ \t]*(?:'[^']*(?:'|\Z)|"(?:\\.|[^"\\])*(?:"|\Z))"""
ENTRY = re.compile(
    rf"""[ \t\r\n]*(?:
        [#;][^\r\n]*
      | (?P<key>[^=\r\n]+) = (?P<quoted>(?:{QUOTED})*) (?P<plain>(?:\\.|[^\\\r\n])*)
      | [^\r\n]+
    )""",
    re.VERBOSE | re.DOTALL,
)
PIECE = re.compile(
    r"""[ \t]*(?:'(?P<single>[^']*)(?:'|\Z)|"(?P<double>(?:\\.|[^"\\])*)(?:"|\Z))""", re.DOTALL
)


def parse_unit(text: str) -> Settings:
    """Return the settings of a unit file, each with its values; the sections share no names."""
    settings: Settings = {}
    pending = ""
    for line in text.splitlines():
        if line.lstrip()[:1] in ("#", ";"):
            continue
        line = pending + line
        pending = ""
        if line.endswith("\\"):
            pending = line[:-1] + " "
            continue
        key, equals, value = line.partition("=")
        if not equals:
            continue
        values = settings.setdefault(key.strip(), [])
        if value.strip():
            values.append(value.strip())
        else:
            values.clear()  # an empty assignment takes back the earlier ones
    return settings


def parse_environment(text: str) -> dict[str, str]:
    """Return the variables of an EnvironmentFile, by systemd's rules."""
    found = {}
    for entry in ENTRY.finditer(text):
        name = (entry["key"] or "").rstrip()
        if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            found[name] = _quoted(entry["quoted"]) + _plain(entry["plain"])
    return found


def _quoted(text: str) -> str:
    return "".join(
        _unescape(piece["double"]) if piece["single"] is None else piece["single"]
        for piece in PIECE.finditer(text)
    )


def _unescape(text: str) -> str:
    # In double quotes a backslash hides these characters and a line's end, and is itself before any other.
    text = re.sub(r"\\\n", "", text)
    return re.sub(r'\\(["\\`$])', r"\1", text)


def _plain(text: str) -> str:
    stripped = re.sub(r"(?<!\\)[ \t]+\Z", "", text.lstrip(" \t"))
    return re.sub(r"\\(.)", lambda m: "" if m[1] == "\n" else m[1], stripped, flags=re.DOTALL)


def seconds(text: str) -> float:
    """Return a time span of a unit file in seconds: 90, 90s, 500ms, 1min 30s, infinity."""
    if text == "infinity":
        return float("inf")
    units = {"ms": 0.001, "": 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    return sum(
        float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)\s*([a-z]*)", text)
    )


def listen(address: str) -> socket.socket:
    """Return a listening socket for a ListenStream: host:port, a port, or a path."""
    if address.startswith("/"):
        Path(address).unlink(missing_ok=True)
        made = socket.socket(socket.AF_UNIX)
        made.bind(address)
    else:
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if not host or host.startswith("[") else socket.AF_INET
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host.strip("[]") or "::", int(port)))
    made.listen(4096)
    return made


def reserve_listener() -> None:
    """Put nothing in the place of the listening socket, so that no other file takes its descriptor."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing != LISTENER:
        os.dup2(nothing, LISTENER)
        os.close(nothing)


# -------------------------------------------------------------------------------------------- the services


@dataclass
class Process:
    """A main process that was started; `dead` is set once it has been waited for."""

    popen: subprocess.Popen[bytes]
    dead: threading.Event = field(default_factory=threading.Event)

    def result(self) -> str:
        """Say how it ended, in systemd's words."""
        code = self.popen.returncode
        return (
            "exit-code" if code > 0 else "signal" if -code not in (0, *CLEAN_SIGNALS) else "success"
        )


class Service:
    """One service unit: a job at a time, which the lock sees to."""

    def __init__(self, manager: Manager, name: str, settings: Settings) -> None:
        self.manager = manager
        self.name = name
        self.settings = settings
        self.lock = threading.RLock()
        self.cancelled = threading.Event()
        self.state, self.result, self.status, self.restarts = "inactive", "success", 0, 0
        self.process: Process | None = None

    def setting(self, key: str, default: str = "") -> str:
        """Return the last value of a setting."""
        return (self.settings.get(key) or [default])[-1]

    def start(self) -> str:
        """Start it unless it is active; return the reason why it failed, if it did."""
        with self.lock:
            return "" if self.state == "active" else self._boot()

    def restart(self) -> str:
        """Stop it and start it."""
        with self.lock:
            self.stop()
            return self._boot()

    def stop(self) -> str:
        """Stop it, and a start that is still going on with it."""
        self.cancelled.set()
        with self.lock:
            self.cancelled.clear()
            if self.process:
                self.state = "deactivating"
                self._end(self.process)
            if self.state != "failed":
                self.state, self.result = "inactive", "success"
        return ""

    def _boot(self) -> str:
        self.manager.pull_socket(self)
        self.state = "activating"
        why = "resources"
        with contextlib.suppress(OSError, ValueError):
            why = self._spawn()
        if not why:
            self.state, self.result = "active", "success"
            return ""
        if self.process:
            self._end(self.process)
        if why == "canceled":
            self.state = "inactive"
        else:
            self._rest(why)
        return why

    def _spawn(self) -> str:
        environment = self._environment()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            # A name in the abstract namespace: no file to leave behind, no limit to the length of a path.
            name = f"standin-{os.getpid()}-{secrets.token_hex(8)}"
            notify.bind(f"\0{name}")
            environment["NOTIFY_SOCKET"] = f"@{name}"
            passed = self.manager.pass_socket(self, environment)
            process = self._execute(environment, passed)
            threading.Thread(target=self._watch, args=[process], daemon=True).start()
            if self.setting("Type") == "notify":
                return self._await_ready(process, notify)
        return ""

    def _execute(self, environment: dict[str, str], passed: tuple[int, ...]) -> Process:
        with (self.manager.state / f"{self.name}.log").open("ab") as log:
            popen = subprocess.Popen(
                [
                    *EXECUTE,
                    self.setting("WorkingDirectory", "/"),
                    *shlex.split(self.setting("ExecStart")),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=passed,
                start_new_session=True,
                umask=int(self.setting("UMask", "0022"), 8),
            )
        self.process = Process(popen)
        return self.process

    def _environment(self) -> dict[str, str]:
        user = pwd.getpwuid(os.getuid())
        names = {
            "HOME": user.pw_dir,
            "USER": user.pw_name,
            "LOGNAME": user.pw_name,
            "SHELL": user.pw_shell,
        }
        environment = {
            "PATH": CLEAN_PATH,
            "LANG": "C.UTF-8",
            "INVOCATION_ID": secrets.token_hex(16),
            **names,
        }
        for line in self.settings.get("Environment", []):
            for name, _, value in (word.partition("=") for word in shlex.split(line)):
                environment[name] = value
        for name in self.settings.get("EnvironmentFile", []):
            path = Path(name.removeprefix("-"))
            if path.exists() or not name.startswith("-"):
                environment.update(parse_environment(path.read_text(encoding="utf-8")))
        return environment

    def _await_ready(self, process: Process, notify: socket.socket) -> str:
        notify.settimeout(0.02)
        deadline = time.monotonic() + seconds(self.setting("TimeoutStartSec", "90"))
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in notify.recv(4096).split(b"\n"):
                    return ""
            if process.dead.is_set():
                why = process.result()
                return "protocol" if why == "success" else why
            if self.cancelled.is_set():
                return "canceled"
        return "timeout"

    def _watch(self, process: Process) -> None:
        process.popen.wait()
        process.dead.set()
        with self.lock:
            if self.process is process:  # nobody asked it to stop
                self._end(process)
                self._rest(process.result())

    def _end(self, process: Process) -> None:
        # KillMode=mixed: the main process is asked, whatever is left after that or the time is killed.
        process.popen.send_signal(signal.SIGTERM)
        limit = seconds(self.setting("TimeoutStopSec", "90"))
        process.dead.wait(min(limit, threading.TIMEOUT_MAX))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGKILL)
        process.dead.wait()
        self.status = abs(process.popen.returncode)
        self.process = None

    def _rest(self, result: str) -> None:
        """Take the state that a process leaves behind, and come back when the unit says so."""
        self.result = result
        self.state = "inactive" if result == "success" else "failed"
        again = {"always": True, "on-failure": self.state == "failed"}
        if again.get(self.setting("Restart", "no"), False) and not self.manager.closing:
            self.state = "auto-restart"
            timer = threading.Timer(seconds(self.setting("RestartSec", "100ms")), self._return)
            timer.daemon = True
            timer.start()

    def _return(self) -> None:
        with self.lock:
            if self.state == "auto-restart":
                self.restarts += 1
                self._boot()


# --------------------------------------------------------------------------------------------- the manager


@dataclass
class Request:
    """What a client asks."""

    verb: str
    units: list[str]
    properties: list[str]
    value: bool = False
    quiet: bool = False
    no_block: bool = False
    now: bool = False


@dataclass
class Reply:
    """What it is told."""

    status: int = 0
    out: str = ""
    err: str = ""


class Manager:
    """All units of a folder, and the socket that they share."""

    def __init__(self, units: Path, state: Path) -> None:
        self.units = units
        self.state = state
        self.socket: Settings = {}
        self.socket_name = ""
        self.lock = threading.Lock()  # of the socket
        self.listening = self.closing = False
        self.services: dict[str, Service] = {}
        self.activation: threading.Thread | None = None
        self.load()

    def load(self) -> None:
        """Read the unit files; what is running keeps running."""
        for path in sorted(self.units.glob("*.service")):
            settings = parse_unit(path.read_text(encoding="utf-8"))
            self.services.setdefault(
                path.name, Service(self, path.name, settings)
            ).settings = settings
        for path in self.units.glob("*.socket"):
            self.socket_name = path.name
            self.socket = parse_unit(path.read_text(encoding="utf-8"))

    def answer(self, request: Request) -> Reply:
        """Do what a client asks."""
        units = [name if "." in name else f"{name}.service" for name in request.units]
        if request.verb in ("start", "stop", "restart"):
            return self._jobs(request, units)
        if request.verb == "enable" and request.now:
            return self._jobs(Request("start", units, []), units)
        if request.verb in ("is-active", "is-failed"):
            return self._ask(request, units)
        if request.verb == "show":
            return Reply(out="\n".join(self._show(request, name) for name in units))
        return self._rare(request.verb, units)

    def _rare(self, verb: str, units: list[str]) -> Reply:
        if verb == "daemon-reload":
            self.load()
        if verb == "exit":
            self.close()
        return self._reset(units) if verb == "reset-failed" else Reply()

    def _reset(self, units: list[str]) -> Reply:
        reply = Reply()
        for service in self.services.values():
            if service.state == "failed" and (not units or service.name in units):
                service.state, service.result = "inactive", "success"
            elif (
                service.name in units
                and service.state == "inactive"
                and not service.setting("WantedBy")
            ):
                # systemd forgets a unit that is inactive and that nothing refers to, and then says so.
                missing = f"{service.name}: Unit {service.name} not loaded."
                reply = Reply(1, "", f"{reply.err}Failed to reset failed state of unit {missing}\n")
        return reply

    def _jobs(self, request: Request, units: list[str]) -> Reply:
        reply = Reply()
        for name in units:
            if name not in (*self.services, self.socket_name):
                reply.status = 5
                reply.err += f"Failed to {request.verb} {name}: Unit {name} not found.\n"
            elif request.no_block:
                threading.Thread(target=self._job, args=[request.verb, name], daemon=True).start()
            elif why := self._job(request.verb, name):
                reply.status = 1
                reply.err += why
        return reply

    def _job(self, verb: str, name: str) -> str:
        if self.closing and verb != "stop":
            why = "canceled"
        elif name == self.socket_name:
            why = self._socket_job(verb)
        else:
            service = self.services[name]
            why = {"start": service.start, "stop": service.stop, "restart": service.restart}[verb]()
        if why == "canceled":
            return f"Job for {name} canceled.\n"
        if why == "busy":
            return 'Job failed. See "journalctl -xe" for details.\n'
        hint = f'See "systemctl status {name}" and "journalctl -xeu {name}" for details.'
        return f"Job for {name} failed because {BECAUSE[why]}\n{hint}\n" if why else ""

    def _socket_job(self, verb: str) -> str:
        if verb != "start":
            self.unlisten()
        return "" if verb == "stop" else self.listen()

    def listen(self) -> str:
        """Take the address of the socket unit; return the reason why not, if not."""
        with self.lock:
            if self.listening:
                return ""
            service = self.services.get(self._activated())
            if service and service.state not in (*STOPPED, "auto-restart"):
                return "busy"  # systemd refuses a socket whose service is active without it
            try:
                made = listen(self.socket["ListenStream"][-1])
            except OSError as error:
                print(f"{self.socket_name}: {error}", file=sys.stderr, flush=True)
                return "resources"
            with made:
                os.dup2(made.fileno(), LISTENER)
            self.listening = True
            return ""

    def unlisten(self) -> None:
        """Give the address back; the descriptor stays taken."""
        with self.lock:
            if self.listening:
                reserve_listener()
            self.listening = False

    def pull_socket(self, service: Service) -> None:
        """Start the socket before a service that uses it."""
        if self._shared_with(service):
            self.listen()

    def pass_socket(self, service: Service, environment: dict[str, str]) -> tuple[int, ...]:
        """Return the descriptors that a service is passed, and say so in its environment."""
        if not (self._shared_with(service) and self.listening):
            return ()
        environment.update(LISTEN_FDS="1", LISTEN_FDNAMES=self.socket_name)
        return (LISTENER,)

    def _shared_with(self, service: Service) -> bool:
        return (
            self.socket_name in service.setting("Sockets").split()
            or service.name == self._activated()
        )

    def _activated(self) -> str:
        named = self.socket.get("Service", [])
        return named[-1] if named else self.socket_name.replace(".socket", ".service")

    def wants_connection(self) -> bool:
        """Tell whether the next connection should start the service of the socket."""
        service = self.services.get(self._activated())
        if not self.listening or self.closing or service is None:
            return False
        if service.state not in STOPPED or (self.activation and self.activation.is_alive()):
            return False
        if not service.lock.acquire(blocking=False):  # in the middle of a restart
            return False
        service.lock.release()
        return True

    def activate(self) -> None:
        """Start the service of the socket, without waiting for it."""
        service = self.services[self._activated()]
        self.activation = threading.Thread(target=service.start, daemon=True)
        self.activation.start()

    def _state(self, name: str) -> str:
        if name == self.socket_name:
            return "active" if self.listening else "inactive"
        service = self.services.get(name)
        return service.state if service else "inactive"

    def _ask(self, request: Request, units: list[str]) -> Reply:
        wanted = request.verb.removeprefix("is-")
        states = [self._state(name).replace("auto-restart", "activating") for name in units]
        status = 0 if wanted in states else 3 if wanted == "active" else 1
        return Reply(status, "" if request.quiet else "".join(f"{state}\n" for state in states))

    def _show(self, request: Request, name: str) -> str:
        properties = self._properties(name)
        wanted = [word for given in request.properties for word in given.split(",")] or list(
            properties
        )
        shown = [key for key in properties if key in wanted]
        return "".join(f"{'' if request.value else key + '='}{properties[key]}\n" for key in shown)

    def _properties(self, name: str) -> dict[str, str]:
        state, service = self._state(name), self.services.get(name)
        running = "listening" if name == self.socket_name else "running"
        sub = {
            "active": running,
            "inactive": "dead",
            "activating": "start",
            "deactivating": "stop-sigterm",
        }
        known = {
            "Id": name,
            "LoadState": "loaded" if service or name == self.socket_name else "not-found",
            "ActiveState": "activating" if state == "auto-restart" else state,
            "SubState": sub.get(state, state),
        }
        if service:
            process = service.process
            known |= {"MainPID": str(process.popen.pid if process else 0), "Result": service.result}
            known |= {"ExecMainStatus": str(service.status), "NRestarts": str(service.restarts)}
        return known

    def close(self) -> None:
        """Stop everything, for good."""
        self.closing = True
        self.unlisten()
        for service in self.services.values():
            service.stop()


# ---------------------------------------------------------------------------------------------- the daemon


def serve(units: Path, state: Path) -> None:
    """Be the daemon: answer clients until one says exit, a signal does, or the folder is gone."""
    ended = threading.Event()
    # Whoever started the first client may have ignored signals, and a service would inherit that.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    reserve_listener()
    manager = Manager(units, state)
    with _only_one(state), socket.socket(socket.AF_UNIX) as control:
        os.chdir(state)  # a relative name, because the path of a socket may have 107 bytes at most
        Path("control").unlink(missing_ok=True)
        control.bind("control")
        control.listen()
        while not ended.is_set() and (state / "control").exists():
            watched = [control.fileno(), *([LISTENER] if manager.wants_connection() else [])]
            readable = select.select(watched, [], [], 0.1)[0]
            if control.fileno() in readable:
                client = control.accept()[0]
                threading.Thread(
                    target=_serve_client, args=[manager, client, ended], daemon=True
                ).start()
            if LISTENER in readable:
                manager.activate()
        manager.close()
        Path("control").unlink(missing_ok=True)


@contextlib.contextmanager
def _only_one(state: Path) -> Iterator[None]:
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(0) from None  # two clients started one at once: the other one is it
        yield


def _serve_client(manager: Manager, client: socket.socket, ended: threading.Event) -> None:
    with client, client.makefile("rw", encoding="utf-8") as stream, contextlib.suppress(OSError):
        request = Request(**json.loads(stream.readline()))
        reply = manager.answer(request)
        if request.verb == "exit":
            ended.set()
        stream.write(json.dumps(asdict(reply)) + "\n")


# ---------------------------------------------------------------------------------------------- the client


def main() -> int:
    """Be systemctl."""
    units, state = (Path(os.environ[f"STANDIN_{name}"]).resolve() for name in ("UNITS", "STATE"))
    request = parse_arguments(sys.argv[1:])
    state.mkdir(parents=True, exist_ok=True)
    os.chdir(state)
    client = connect()
    if client is None and (request.verb in ("start", "restart") or request.now):
        client = start_daemon(units, state)
    # Without a daemon nothing runs, which any other question can be answered from.
    reply = ask(client, request) if client else Manager(units, state).answer(request)
    if request.verb == "exit":
        with (state / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the daemon is gone
    sys.stdout.write(reply.out)
    sys.stderr.write(reply.err)
    return reply.status


def parse_arguments(arguments: list[str]) -> Request:
    """Understand a command line of systemctl."""
    parser = argparse.ArgumentParser("systemctl", description="A stand-in for systemd's.")
    verbs = "start stop restart is-active is-failed show reset-failed daemon-reload enable exit"
    parser.add_argument("verb", choices=verbs.split())
    parser.add_argument("units", nargs="*")
    parser.add_argument("-p", "--property", action="append", default=[], dest="properties")
    parser.add_argument("-q", "--quiet", action="store_true")
    for flag in ("--value", "--no-block", "--now"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--no-pager", "--no-ask-password", "--system"):
        parser.add_argument(flag, action="store_true", dest="ignored")
    options = vars(parser.parse_intermixed_args(arguments))
    options.pop("ignored")
    return Request(**options)


def connect() -> socket.socket | None:
    """Reach the daemon of the working directory, if there is one."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect("control")
    except OSError:
        client.close()
        return None
    return client


def start_daemon(units: Path, state: Path) -> socket.socket:
    """Start a daemon that has nothing of its caller's: no descriptors, no session, no environment."""
    with (state / "daemon.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, __file__, str(units), str(state)],
            cwd=state,
            env={"PATH": CLEAN_PATH, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    for _ in range(500):
        if client := connect():
            return client
        time.sleep(0.02)
    raise SystemExit(f"systemctl: the daemon did not start; see {state / 'daemon.log'}")


def ask(client: socket.socket, request: Request) -> Reply:
    """Send a request to the daemon; return its reply."""
    with client, client.makefile("rw", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(request)) + "\n")
        stream.flush()
        line = stream.readline()
    return Reply(**json.loads(line)) if line else Reply(1, "", "systemctl: the daemon went away\n")


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
