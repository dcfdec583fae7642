"""What the sandbox needs of systemd, on a machine that may have none: a socket, and its services.

It holds the address, passes it on (LISTEN_FDS), waits for READY=1 (Type=notify), and stops as
KillMode=mixed does. Whatever else the units say is passed over. `systemctl`, beside it, asks it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import deploy

# The address becomes descriptor 3; LISTEN_PID is the process that reads it, so the child sets it.
PASS_ON = """\
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def read_unit(path: Path) -> dict[str, str]:
    """The settings of a unit, the last of each name."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    pairs = (line.partition("=") for line in lines if not line.startswith("#"))
    return {key: value.strip() for key, _, value in pairs}


class Service:
    """A service behind the address; one job at a time."""

    def __init__(self, unit: Path, address: socket.socket) -> None:
        self.unit, self.address, self.lock = unit, address, threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.notify = socket.socket()  # until it starts; open as long as it runs

    def job(self, verb: str) -> bool:
        """Start, stop or restart it; whether that went well."""
        with self.lock:
            if verb != "start":
                self.stop()
            return verb == "stop" or self.start()

    def start(self) -> bool:
        """Start it, and wait until its master or a worker says that it is ready."""
        settings = read_unit(self.unit)
        self.notify.close()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind("")  # the kernel finds a name
        environment = {
            "PATH": os.defpath,
            "HOME": str(self.unit.parent),
            "LISTEN_FDS": "1",
            "NOTIFY_SOCKET": f"@{self.notify.getsockname()[1:].decode()}",
            **deploy.read_env(Path(settings["EnvironmentFile"])),
        }
        passed, argv = self.address.fileno(), shlex.split(settings["ExecStart"])
        with self.unit.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-ISc", PASS_ON, str(passed), *argv],
                cwd=settings["WorkingDirectory"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[passed],
                start_new_session=True,
            )
        if self.is_ready(self.process, float(settings["TimeoutStartSec"])):
            return True
        self.stop()
        return False

    def is_ready(self, process: subprocess.Popen[bytes], seconds: float) -> bool:
        """Wait until it says so, ends, or the time is up."""
        self.notify.settimeout(0.02)
        until = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in self.notify.recv(4096).split(b"\n"):
                    return True
        return False

    def stop(self) -> None:
        """End the master, which lets requests end, and then whatever is left."""
        if self.process:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(float(read_unit(self.unit)["TimeoutStopSec"]))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Systemd:
    """The units of a folder, and whoever asks for them."""

    def __init__(self, units: Path) -> None:
        host, _, port = read_unit(units / "gunicorn.socket")["ListenStream"].partition(":")
        self.address = socket.create_server((host, int(port)), backlog=4096)
        self.services = {unit.stem: Service(unit, self.address) for unit in units.glob("*.service")}
        self.listener = Listener(str(units / "systemd"), "AF_UNIX")
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        """Answer one after the other until somebody says exit."""
        with self.listener:
            while (words := (client := self.listener.accept()).recv()) != ["exit"]:
                threading.Thread(target=self.answer, args=(client, *words)).start()
            client.close()

    def close(self) -> None:
        """End everything."""
        with Client(self.listener.address, "AF_UNIX") as client:
            client.send(["exit"])
        self.thread.join()
        for service in self.services.values():
            service.job("stop")
            service.notify.close()
        self.address.close()

    def answer(self, client: Connection, verb: str, *names: str) -> None:
        """Do what is asked for; the reply is what went wrong, or None."""
        with client:
            if verb == "show":  # of all that it could tell, the main process
                process = self.services[names[-1]].process
                client.send(process.pid if process else 0)
                return
            if "--no-block" in names:
                client.send(None)
            good = self.services[names[-1]].job(verb)
            if "--no-block" not in names:
                client.send(None if good else f"Job for {names[-1]} failed; see its log beside it")
