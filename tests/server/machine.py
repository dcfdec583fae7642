"""One booted Debian system in namespaces of its own: boot it, run commands in it, cut its power.

The machine has its own process, mount and network namespaces, so its ports 22, 80, 5432, 6379 and 8000 are
not this computer's. slirp4netns carries its outgoing connections through an ordinary process: neither
forwarding nor firewall of this computer is touched. The machine's mounts exist in its own mount namespace
alone, and all its processes die with the thread that booted it, however that ends: only a folder and a
control group need a hand.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOSTNAME = "gforms"

# $1: lower, $2: upper, $3: work folder, $4: mount point (no upper: the lower folder is used in place); then
# nspawn's arguments. It waits for one line, which says that the network is there. This computer's /run is
# hidden: what nspawn leaves there goes away with the namespace.
BOOT = """
for group in $GROUPS_OF_MACHINE; do echo 0 > "$group/cgroup.procs"; done
read -r network_is_there
ip link set lo up
mount -t tmpfs run /run
if [ -n "$2" ]; then mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" "$4"
else mount --bind "$1" "$4"; fi
root=$4; shift 4
systemd-nspawn --directory="$root" "$@"
"""

UNSHARE = (
    *("unshare", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child"),
    *("--mount-proc", "--propagation=private"),
)
ENVIRONMENT = {
    "PATH": PATH,
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
}
NSPAWN = (
    *("--register=no", "--keep-unit", "--boot", "--quiet", "--console=read-only"),
    *("--link-journal=no", "--resolv-conf=off", "--timezone=off", f"--hostname={HOSTNAME}"),
    # dockerd needs nearly everything; the clock and the kernel's modules are this computer's, and stay.
    "--capability=all",
    "--drop-capability=CAP_SYS_MODULE,CAP_SYS_TIME",
    "--system-call-filter=add_key keyctl bpf",
)


class MachineError(Exception):
    """The machine did not do what it had to within its time."""


def until(what: str, seconds: float, done: Callable[[], bool], pause: float = 0.05) -> None:
    """Poll until something is so; raise MachineError at the end of the time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise MachineError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)


def control_groups(name: str) -> list[Path]:
    """Return the folders of a machine's control group in every hierarchy that systemd itself would use."""
    top, name = Path("/sys/fs/cgroup"), f"gforms-{name}"
    if (top / "cgroup.procs").exists():
        return [top / name]
    tops = [top / kind for kind in ("unified", "systemd")]
    return [each / name for each in tops if (each / "cgroup.procs").exists()]


def remove_groups(groups: Sequence[Path]) -> bool:
    """Remove control groups with all below them, which works only when no process is left in them."""
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
    return not any(group.exists() for group in groups)


def await_network(process: int) -> None:
    """Wait until a process has a network namespace of its own."""
    ours, network = Path("/proc/self/ns/net").readlink(), Path(f"/proc/{process}/ns/net")
    until("the network namespace", 10, lambda: network.readlink() != ours, 0.005)


def dies_with_us(*command: str) -> list[str]:
    """Return a command that is killed when the thread that starts it ends."""
    return ["setpriv", "--pdeathsig", "KILL", *command]


class Machine:
    """A root folder, booted. What changes lies in `folder`; without an overlay the root itself changes."""

    def __init__(
        self, folder: Path, root: Path, binds: Mapping[str, Path], overlay: bool = True
    ) -> None:
        """Prepare to boot `root` with `binds` (path in the machine: folder on this computer)."""
        self.folder, self.root, self.binds, self.overlay = folder, root, dict(binds), overlay
        self.console, self.mount_point = folder / "console.log", folder / "mounted"
        self._groups = control_groups(folder.name)
        self._outer: subprocess.Popen[bytes] | None = None
        self._network: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._entered: list[subprocess.Popen[str]] = []

    # Boot and end

    @property
    def pid(self) -> int:
        """The process on this computer whose network namespace is the machine's."""
        if self._outer is None:
            raise MachineError("the machine is off")
        return self._outer.pid

    def boot(self) -> None:
        """Boot, and return when systemd has nothing left to start."""
        for group in self._groups:
            group.mkdir(exist_ok=True)
        try:
            self._start()
            until("systemd has started", 90, self._has_init)
            until("the machine has booted", 90, self._is_up)
        except BaseException:
            self.power_cut()
            raise

    def _start(self) -> None:
        """Start the outer process, give it a network, and let it go on to boot."""
        binds = [f"--bind={source}:{target}" for target, source in self.binds.items()]
        script = ["sh", "-eu", "-c", BOOT, "boot", *self._layout(), *NSPAWN, *binds]
        groups = " ".join(map(str, self._groups))
        with self.console.open("ab") as console:
            self._outer = subprocess.Popen(
                dies_with_us(*UNSHARE, *script),
                env={**ENVIRONMENT, "GROUPS_OF_MACHINE": groups},
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        await_network(self._outer.pid)
        self._connect()
        assert self._outer.stdin is not None
        self._outer.stdin.write(b"\n")
        self._outer.stdin.close()

    def _layout(self) -> list[str]:
        """Return the four folders that the boot script wants, made."""
        layers = [self.folder / "upper", self.folder / "work"] if self.overlay else []
        for folder in [*layers, self.mount_point]:
            folder.mkdir(exist_ok=True)
        return [str(self.root), *map(str, layers or ("", "")), str(self.mount_point)]

    def _connect(self) -> None:
        """Connect the machine's network to the outside."""
        reader, writer = os.pipe()
        command = ["slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback"]
        try:
            with (self.folder / "network.log").open("ab") as log:
                self._network = subprocess.Popen(
                    dies_with_us(*command, f"--ready-fd={writer}", str(self.pid), "tap0"),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    pass_fds=[writer],
                )
            os.close(writer)
            if not select.select([reader], [], [], 15)[0] or not os.read(reader, 1):
                raise MachineError("slirp4netns did not start: see network.log")
        finally:
            os.close(reader)

    def _has_init(self) -> bool:
        """Look for the machine's process 1."""
        self._still_there()
        for group in self._groups:
            with contextlib.suppress(FileNotFoundError):
                for pid in (group / "payload/init.scope/cgroup.procs").read_text().split():
                    if pid_inside(pid) == "1":
                        self._init = int(pid)
                        return True
        return False

    def _still_there(self) -> None:
        """Raise MachineError when the machine has ended."""
        if self._outer is None or self._outer.poll() is not None:
            raise MachineError(f"the machine ended while it booted:\n{self.console_tail()}")

    def _is_up(self) -> bool:
        """Ask systemd whether everything has been started; a failed unit is the test's own matter."""
        self._still_there()
        state = self.run(["systemctl", "is-system-running"], check=False, timeout=20).stdout.strip()
        return state in ("running", "degraded")

    def console_tail(self) -> str:
        """Return the last lines that the machine wrote on its console."""
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-30:])

    def reboot(self) -> None:
        """Reboot as an operator would, and return when the machine is up again."""
        self._end(["systemctl", "reboot"])
        self.boot()

    def power_off(self) -> None:
        """Shut down in good order."""
        self._end(["systemctl", "poweroff"])

    def _end(self, command: Sequence[str]) -> None:
        """Give a command that ends the machine, wait for the end, and clear up."""
        self.run(command, check=False)
        try:
            until(f"the machine has ended:\n{self.console_tail()}", 120, self._has_ended)
        finally:
            self.power_cut()

    def _has_ended(self) -> bool:
        """See whether the machine is off; let nsenter go on, which stops when its command is stopped.

        systemd stops every process before it kills them: nsenter would never see that its command is dead.
        """
        for process in self._entered:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        return self._outer is None or self._outer.poll() is not None

    def power_cut(self) -> None:
        """Kill every process of the machine at once, as when its power fails; its folders stay."""
        for process in (self._outer, self._network):
            if process is not None:
                process.kill()
                process.wait()
        for entered in self._entered:
            kill_group(entered)
        self._outer = self._network = None
        self._init, self._entered = 0, []
        until("every process of the machine is gone", 30, lambda: remove_groups(self._groups), 0.02)

    # Commands

    def enter(self, user: str, cwd: str = "", env: Mapping[str, str] | None = None) -> list[str]:
        """Return the start of a command line that runs the rest in the machine."""
        if not self._init:
            raise MachineError("the machine is off")
        home = "/root" if user == "root" else f"/home/{user}"
        known = {"HOME": home, "USER": user, "LOGNAME": user, "LANG": "C.UTF-8", "PATH": PATH}
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        settings = [f"{name}={text}" for name, text in (known | dict(env or {})).items()]
        place = ["env", "-i", f"--chdir={cwd or home}"]
        return ["nsenter", f"--target={self._init}", *spaces, "--", *become, *place, *settings]

    def start(
        self, command: Sequence[str] | str, *, user: str = "root", cwd: str = "",
        env: Mapping[str, str] | None = None, stdin: int | IO[str] = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """Start a command in the machine (a string: given to bash) and return its process, with pipes."""
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        process = self.spawn([*self.enter(user, cwd, env), *words], stdin=stdin)
        self._entered = [one for one in self._entered if one.poll() is None] + [process]
        return process

    def spawn(
        self, words: Sequence[str], stdin: int | IO[str] = subprocess.DEVNULL
    ) -> subprocess.Popen[str]:
        """Start a program of this computer in a process group of its own, so that all of it can be killed."""
        return subprocess.Popen(
            list(words), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

    def run(
        self, command: Sequence[str] | str, *, user: str = "root", cwd: str = "",
        env: Mapping[str, str] | None = None, stdin: str = "", timeout: float = 60, check: bool = True,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command in the machine to its end; with `check`, an exit status other than 0 raises."""
        process = self.start(command, user=user, cwd=cwd, env=env, stdin=subprocess.PIPE)
        return finish(process, stdin, timeout, check)

    def in_network(self, *command: str) -> list[str]:
        """Return the command line that runs a program of this computer in the machine's network."""
        return ["nsenter", f"--target={self.pid}", "--net", "--", *command]

    def put(self, path: str, text: str, *, user: str = "root", mode: str = "0644") -> None:
        """Write a file in the machine, with the folders above it."""
        write = 'mkdir -p "${1%/*}" && cat > "$1" && chmod "$2" "$1"'
        self.run(["bash", "-c", write, "put", path, mode], user=user, stdin=text)

    def read(self, path: str) -> str:
        """Return the text of a file in the machine."""
        return self.run(["cat", path]).stdout

    def send(
        self, source: Path, path: str, *, user: str = "root", exclude: Sequence[str] = ()
    ) -> None:
        """Copy a folder of this computer into the machine, as the user's own."""
        unpack = 'mkdir -p "$1" && tar --extract --no-same-owner --directory "$1"'
        with packed(source, exclude) as pack:
            process = self.start(["bash", "-c", unpack, "send", path], user=user, stdin=pack)
            finish(process, None, 60, True)


def finish(
    process: subprocess.Popen[str], stdin: str | None, timeout: float, check: bool
) -> subprocess.CompletedProcess[str]:
    """Wait for a process to end; at the end of the time kill its whole group."""
    try:
        out, err = process.communicate(stdin, timeout)
    except BaseException:
        kill_group(process)
        raise
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check and done.returncode:
        raise MachineError(f"exit {done.returncode}: {shown(process.args)}\n{out}{err}")
    return done


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process with all that it has started, unless it has ended by itself."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def pid_inside(pid: str) -> str:
    """Return the number that a process has in its own process namespace."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((line.split()[-1] for line in status if line.startswith("NSpid:")), pid)


@contextlib.contextmanager
def packed(source: Path, exclude: Sequence[str]) -> Iterator[IO[str]]:
    """Give a folder as a stream of tar."""
    unwanted = [f"--exclude={name}" for name in exclude]
    command = ["tar", "--create", "--directory", str(source), *unwanted, "."]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as packer:
        assert packer.stdout is not None
        yield packer.stdout
    if packer.returncode:
        raise MachineError(f"tar cannot read {source}")


def shown(words: object) -> str:
    """Return a command as a reader knows it, without the way into the machine."""
    listed = [str(word) for word in words] if isinstance(words, list) else [str(words)]
    if "env" in listed:
        inner = listed[listed.index("env") + 3 :]
        listed = [word for word in inner if "=" not in word or " " in word]
    return shlex.join(listed)


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kill a started command, with its group, at the end of a block."""
    try:
        yield process
    finally:
        kill_group(process)
        process.communicate()
