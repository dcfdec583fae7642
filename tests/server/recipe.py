"""The server's root folder and its Docker images: built once from Debian's packages, kept in a cache folder.

The images are stand-ins, for the tests must run where none can be pulled: `postgres:18` and `redis:8` are
made of Debian's packages, with entry scripts that behave as the real ones do wherever docker-compose.yml
relies on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.server.machine import (
    PATH,
    Machine,
    MachineError,
    control_groups,
    finish,
    packed,
    remove_groups,
)

SUITE = "trixie"
CACHE = Path(os.environ.get("GFORMS_SERVER_CACHE", "/var/cache/gforms-server"))
HERE = Path(__file__).parent
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

# What this computer needs (Debian's and Ubuntu's names), each with a program by which it is recognised.
HOST_PACKAGES = {
    "debootstrap": "debootstrap",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "systemd-container": "systemd-nspawn",
    "slirp4netns": "slirp4netns",
    "iproute2": "ip",
    "util-linux": "nsenter",
    "mount": "mount",
    "tar": "tar",
    "openssh-client": "ssh",
}
SERVER_PACKAGES = (
    "ca-certificates,dbus,docker-cli,docker-compose,docker.io,git,iproute2,iptables,less,libpam-systemd,"
    "nginx-light,openssh-server,pipenv,procps,python3,python3-venv,sudo,systemd,systemd-sysv"
)
IMAGE_PACKAGES = "postgresql,redis-server"
UNWANTED = (
    "./var/cache/*",
    "./usr/lib/llvm-*",
    "./usr/lib/*/libLLVM*",
    "./dev/*",
    "./proc/*",
    "./sys/*",
)

# In two stages, so that dpkg can be told in between to leave out what nobody reads here and not to wait for
# the disk.
BOOTSTRAP = r"""
debootstrap --variant=minbase --foreign --include="$2" "$3" "$1"
mkdir -p "$1/etc/dpkg/dpkg.cfg.d"
printf '%s
' force-unsafe-io path-exclude=/usr/share/{doc,locale,man}/'*' > "$1/etc/dpkg/dpkg.cfg.d/quick"
exec chroot "$1" /debootstrap/debootstrap --second-stage
"""

# As Amazon's Ubuntu images are: a user `ubuntu` who may do everything without a password, its folder closed
# to others. It is a member of `docker`, which a new one is not: a test of the set-up takes it out of the
# group again.
CONFIGURE = r"""
useradd --create-home --uid 1000 --user-group --shell /bin/bash --groups adm,docker,sudo ubuntu
chmod 0750 /home/ubuntu
echo 'ubuntu ALL=(ALL) NOPASSWD:ALL' > /etc/sudoers.d/90-cloud-init-users
chmod 0440 /etc/sudoers.d/90-cloud-init-users
printf '127.0.0.1 localhost gforms\n::1 localhost\n' > /etc/hosts
echo gforms > /etc/hostname
rm -f /etc/resolv.conf
echo 'nameserver 10.0.2.3' > /etc/resolv.conf
units="apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer systemd-modules-load.service tmp.mount"
for unit in $units; do ln -s /dev/null "/etc/systemd/system/$unit"; done
apt-get clean
rm -rf /etc/dpkg/dpkg.cfg.d/quick /var/lib/apt/lists/*
"""


def missing() -> list[str]:
    """Return the packages that this computer lacks."""
    return [
        name
        for name, sign in HOST_PACKAGES.items()
        if not (Path(sign).exists() or shutil.which(sign))
    ]


def pip_settings() -> str:
    """Return the settings by which pip in the server uses the index that pip on this computer uses."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    index = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    lines = ["[global]", "disable-pip-version-check = true", f"cert = {CERTIFICATES}"]
    return "\n".join([*lines, *([f"index-url = {index}"] if index else []), ""])


def key() -> str:
    """Return the name of what would be built now: it changes with everything that goes into it."""
    parts = [SUITE, pip_settings(), CERTIFICATES.read_text() if CERTIFICATES.exists() else ""]
    parts += [
        path.read_text() for path in [HERE / "recipe.py", *sorted((HERE / "images").iterdir())]
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def locked(path: Path, how: int) -> Iterator[bool]:
    """Hold the lock of a folder for a block; with LOCK_NB the value says whether it could be had."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def prepared() -> Path:
    """Return the folder with `root` and `docker`, built now if it has never been."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE, fcntl.LOCK_EX):
        sweep()
        ready = CACHE / f"root-{key()}"
        if not ready.exists():
            building = Path(tempfile.mkdtemp(prefix="new-", dir=CACHE))
            try:
                build(building)
                building.rename(ready)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
        return ready


def sweep() -> None:
    """Remove what killed tests and builds have left, and old recipes: the folders that nobody locks."""
    outdated = [path for path in CACHE.glob("root-*") if path.name != f"root-{key()}"]
    for folder in [*CACHE.glob("run-*"), *CACHE.glob("new-*"), *outdated]:
        with locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
            if free:
                shutil.rmtree(folder, ignore_errors=True)
                remove_groups(control_groups(folder.name))


def build(folder: Path) -> None:
    """Build the root and the images in a new folder: about a minute and a half on two cores."""
    folder.chmod(0o755)
    began = time.monotonic()
    bootstrap(folder)
    configure(folder / "root")
    say(f"the two roots are there after {time.monotonic() - began:.0f} s")
    (folder / "docker").mkdir()
    machine = Machine(
        folder, folder / "root", {"/var/lib/docker": folder / "docker"}, overlay=False
    )
    machine.boot()
    try:
        load_images(machine, folder / "image")
        machine.power_off()
    finally:
        machine.power_cut()
    shutil.rmtree(folder / "image")
    say(f"built in {time.monotonic() - began:.0f} s")


def bootstrap(folder: Path) -> None:
    """Unpack the packages of the server and of the images, both at once."""
    wanted = {"root": SERVER_PACKAGES, "image": IMAGE_PACKAGES}
    started = {}
    for name, packages in wanted.items():
        with (folder / f"{name}.log").open("wb") as log:
            command = ["bash", "-euc", BOOTSTRAP, "bootstrap", str(folder / name), packages, SUITE]
            started[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
    try:
        for name, process in started.items():
            if process.wait(1200):
                raise MachineError(
                    "debootstrap failed:\n" + (folder / f"{name}.log").read_text()[-2000:]
                )
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def configure(root: Path) -> None:
    """Make the root an operator's new server, with this computer's way to pip's index."""
    environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
    command = ["chroot", str(root), "bash", "-euc", CONFIGURE]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True, timeout=120)
    (root / "etc/pip.conf").write_text(pip_settings())
    if CERTIFICATES.exists():
        shutil.copyfile(CERTIFICATES, root / CERTIFICATES.relative_to("/"))


def load_images(machine: Machine, image: Path) -> None:
    """Make the two stand-in images in the booted machine's Docker."""
    for script in ("postgres.sh", "redis.sh"):
        shutil.copy(HERE / "images" / script, image / "usr/local/bin" / script)
        (image / "usr/local/bin" / script).chmod(0o755)
    (image / "docker-entrypoint-initdb.d").mkdir()
    with packed(image, UNWANTED) as pack:
        finish(machine.start(["docker", "import", "-", "gforms-base"], stdin=pack), None, 180, True)
    dockerfile = (HERE / "images/Dockerfile").read_text()
    for target, tag in (("postgres", "postgres:18"), ("redis", "redis:8")):
        words = [
            "docker",
            "build",
            "--quiet",
            f"--target={target}",
            "--build-arg=BASE=gforms-base",
            "-t",
            tag,
            "-",
        ]
        machine.run(words, stdin=dockerfile, env={"DOCKER_BUILDKIT": "0"}, timeout=120)
    machine.run(["docker", "rmi", "gforms-base"])


def say(text: str) -> None:
    """Tell whoever waits for the build how far it is."""
    print(f"server: {text}", file=sys.stderr, flush=True)
