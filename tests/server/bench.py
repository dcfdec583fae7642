"""A throwaway server for a test: booted from the clean root, driven over ssh and HTTP, gone at the end.

with Server() as server:
    server.run(["systemctl", "status"])                       # as root; user="ubuntu" for the operator
    server.ssh("cd gforms && python3 deploy.py --wait 600")   # as ssh-action v1.0.3 does it
    with server.load("/admin/login/") as load:                # through nginx on port 80
        server.reboot()
    assert lost(load.samples)
    server.power_cut()
    server.boot()
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.must_run import skip
from tests.server import recipe
from tests.server.machine import Machine, MachineError, dies_with_us, finish

PROJECT = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).with_name("client.py")
HOST = "gforms.example.com"
SERVER_PAGE = PROJECT / "docs" / "server.md"
DOCKER = "/var/lib/docker"

# No file of settings is read; the host's key is known, as the workflow's fingerprint makes sure. The algorithms
# stand in the order of ssh-action v1.0.3's library, so the key that it would see must be the one of the documentation.
SSH_SETTINGS = (
    "BatchMode=yes",
    "ConnectTimeout=30",
    "HostKeyAlgorithms=ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,ssh-ed25519",
    "IdentitiesOnly=yes",
    "LogLevel=ERROR",
    "RequestTTY=no",
    "StrictHostKeyChecking=yes",
)


@dataclass(frozen=True)
class Answer:
    """What came back for one request; status 0: no whole answer, and `body` says why."""

    status: int
    headers: list[tuple[str, str]]
    body: str

    def all(self, name: str) -> list[str]:
        """Return every value of a header."""
        return [text for known, text in self.headers if known.lower() == name.lower()]


@dataclass(frozen=True)
class Sample:
    """One request of a load: when it began (time.monotonic), its length, status and beginning of the body."""

    began: float
    seconds: float
    status: int
    body: str


def lost(samples: Iterable[Sample], expected: int = 200) -> list[Sample]:
    """Return the requests that were not answered as they should have been."""
    return [sample for sample in samples if sample.status != expected]


def longest(samples: Iterable[Sample]) -> float:
    """Return the longest wait in seconds."""
    return max((sample.seconds for sample in samples), default=0.0)


class Load:
    """Constant load in the background; `samples` has every request once the block has ended."""

    def __init__(self, process: subprocess.Popen[str], wish: Mapping[str, object]) -> None:
        """Start the load and wait for its first answers."""
        self.samples: list[Sample] = []
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(wish) + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "ready\n":
            raise MachineError(f"the load did not start: {finish(process, None, 5, False).stderr}")

    def __enter__(self) -> Self:
        """Go on while the block runs."""
        return self

    def __exit__(self, *failure: object) -> None:
        """End the load and collect what it has seen."""
        done = finish(self._process, "", 60, check=failure[0] is None)
        if done.returncode == 0:
            self.samples = [Sample(*row) for row in json.loads(done.stdout)]

    def between(self, start: float, end: float) -> list[Sample]:
        """Return the requests that were under way at any time between two instants."""
        return [one for one in self.samples if one.began < end and one.began + one.seconds > start]


class Server(Machine):
    """A copy of the clean server that leaves nothing behind; a context manager."""

    def __init__(self) -> None:
        """Make the copy; the first one ever builds the clean server."""
        self._own_key: Path | None = None
        self._locks = contextlib.ExitStack()
        ready, folder = self._claim()
        (recipe.CACHE / "pip").mkdir(exist_ok=True)
        os.chown(recipe.CACHE / "pip", 1000, 1000)
        binds = {DOCKER: folder / "docker", "/home/ubuntu/.cache": recipe.CACHE / "pip"}
        super().__init__(folder, ready / "root", binds)
        self._copy_images(ready / "docker")

    def _claim(self) -> tuple[Path, Path]:
        """Lock the clean server and a new folder, so that nobody sweeps them away while they are in use."""
        ready = recipe.prepared()
        with recipe.locked(recipe.CACHE, fcntl.LOCK_EX):
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=recipe.CACHE))
            self._locks.enter_context(recipe.locked(ready, fcntl.LOCK_SH))
            self._locks.enter_context(recipe.locked(folder, fcntl.LOCK_EX))
        return ready, folder

    def _copy_images(self, source: Path) -> None:
        """Copy Docker's folder; an image's layers are never written to, so links to them are enough."""
        target = self.folder / "docker"
        target.mkdir(mode=0o710)
        for part in source.iterdir():
            links = ["--link"] if part.name == "overlay2" else []
            copy = ["cp", "--archive", *links, str(part), str(target)]
            subprocess.run(copy, check=True, timeout=120)

    def __enter__(self) -> Self:
        """Boot."""
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        """End it and remove it."""
        self.close()

    def close(self) -> None:
        """End every process of the server and remove its folder."""
        self.power_cut()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._locks.close()

    # ssh

    def key(self, options: str = "") -> Path:
        """Make a key pair and let it in as `ubuntu`, with the options of authorized_keys if there are any."""
        number = len(list(self.folder.glob("key-*.pub")))
        private = self.folder / f"key-{number}"
        make = f"ssh-keygen -q -t ed25519 -C test-{number} -f {private} -N".split()
        subprocess.run([*make, ""], check=True, stdin=subprocess.DEVNULL, timeout=30)
        line = f"{options} {private.with_suffix('.pub').read_text()}".lstrip()
        add = "umask 077 && mkdir -p ~/.ssh && cat >> ~/.ssh/authorized_keys"
        self.run(add, user="ubuntu", stdin=line)
        return private

    def ssh_command(
        self, *words: str, key: Path | None = None, options: Sequence[str] = ()
    ) -> list[str]:
        """Return the ssh command: one exec request, no terminal, no environment, the host's key known."""
        known = self.folder / "known_hosts"
        if not known.exists():
            shown = re.search(r"ssh-keygen -l -f\s+(/\S+\.pub)", SERVER_PAGE.read_text())
            assert shown, "docs/server.md does not say which key the fingerprint is of"
            known.write_text(f"127.0.0.1 {self.read(shown[1])}")
        settings = [f"UserKnownHostsFile={known}", *SSH_SETTINGS]
        shared = [word for setting in settings for word in ("-o", setting)]
        if key is None:
            key = self._own_key = self._own_key or self.key()
        return self.in_network(
            "ssh", "-F", "none", "-i", str(key), *shared, *options, "ubuntu@127.0.0.1", *words
        )

    def ssh(self, script: str, *, key: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a script over ssh as ssh-action v1.0.3 does; its exit status is the script's, or 255."""
        return finish(self.ssh_start(script, key=key), None, 120, False)

    def ssh_start(self, script: str, *, key: Path | None = None) -> subprocess.Popen[str]:
        """Start a script over ssh; to cut the connection, kill the process that is returned."""
        return self.spawn(self.ssh_command(script, key=key))

    # HTTP

    def http(
        self, url: str = "/", *, host: str = HOST, method: str = "GET", body: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:  # fmt: skip
        """Send one request from inside the server's network; a bare path goes to port 80."""
        wish = {"url": full(url), "host": host, "method": method, "body": body}
        asked = json.dumps(wish | {"headers": dict(headers or {})})
        command = self.in_network(sys.executable, str(CLIENT), "one")
        done = finish(self.spawn(command, stdin=subprocess.PIPE), asked, 60, True)
        answer: dict[str, Any] = json.loads(done.stdout)
        headers_seen = [(name, text) for name, text in answer["headers"]]
        return Answer(answer["status"], headers_seen, answer["body"])

    def load(
        self, url: str = "/", *, host: str = HOST, connections: int = 4, pause: float = 0.01,
        **more: object,
    ) -> Load:  # fmt: skip
        """Begin constant load: each connection asks again `pause` seconds after its last answer.

        `more` is what else client.py knows of a request: its method, body and headers.
        """
        command = dies_with_us(*self.in_network(sys.executable, str(CLIENT), "load"))
        wish = {"url": full(url), "host": host, "connections": connections, "pause": pause} | more
        return Load(self.spawn(command, stdin=subprocess.PIPE), wish)


def full(url: str) -> str:
    """Return the whole address of a path on the server's port 80."""
    return url if "://" in url else f"http://127.0.0.1{url}"


def behind(address: str, text: str) -> str:
    """Return nginx/gforms.conf with its lines for a load balancer, at this address, in force."""
    lines = r"# ((?:set_real_ip_from|real_ip_header|real_ip_recursive) .+?;)"
    text, count = re.subn(lines, r"\1", text)
    assert count == 3 and "set_real_ip_from 10.0.0.10;" in text, "nginx/gforms.conf has other lines"
    return text.replace("set_real_ip_from 10.0.0.10;", f"set_real_ip_from {address};")


def require() -> None:
    """Skip the test where no server can be booted; fail instead where TESTS_MUST_RUN names `server`."""
    reason = ""
    if os.geteuid() != 0:
        reason = "a server can be booted by root only"
    elif recipe.missing():
        reason = "missing here: " + ", ".join(recipe.missing())
    if reason:
        skip("server", reason)


class ServerCase(unittest.TestCase):
    """A test case with one server, booted once for the class."""

    server: Server

    @classmethod
    def setUpClass(cls) -> None:
        """Boot the server; unittest removes it even when a later class set-up fails."""
        require()
        cls.server = Server()
        cls.addClassCleanup(cls.server.close)
        cls.server.boot()
