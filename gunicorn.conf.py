"""How gunicorn serves the project: as the service, as its stand-by, and as a candidate.

gunicorn (20.1 to 27) reads this file by itself in the folder where it starts, and passes over
names that it does not know, such as `control_socket_disable` before 25.1. What stands in its
command line goes before this.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from gunicorn.instrument.statsd import Statsd

wsgi_app = "forms.wsgi:application"
workers = 5
preload_app = True  # a release that cannot be imported does not start at all
graceful_timeout = 30  # for requests under way at its end; TimeoutStopSec of the unit is longer
control_socket_disable = True
if Path("/dev/shm").is_dir():
    worker_tmp_dir = "/dev/shm"  # for the heartbeats: a slow disk must not get a worker killed

# A page that each worker asks of itself before any user does, so that none waits for what a first
# request loads: best one that has a template, and does without the database.
warm_up = "/admin/login/"

# What runs this: the name of a unit, which sets it, or a deployment that proves the release.
role = os.environ.get("DEPLOY_ROLE", "candidate")


# -- It is ready when its workers are, each of which says so in a pipe. gunicorn says it before it
# -- forks them, so it is not let; a unit that sets no role might not hear a worker
# -- (NotifyAccess=all), and hears gunicorn itself.

notify_socket = os.environ.pop("NOTIFY_SOCKET", "") if "DEPLOY_ROLE" in os.environ else ""
if notify_socket.startswith("@"):
    notify_socket = "\0" + notify_socket[1:]
ready_workers, ready = os.pipe()
os.set_blocking(ready, False)  # nobody reads what those say that replace one
# -- Twisted, which daphne and Channels may import, takes systemd's socket out of the environment.
systemd_socket = {name: os.environ[name] for name in os.environ if name.startswith("LISTEN_")}


def on_starting(_server: Any) -> None:
    """Load the URLs before there are workers: a mistake in them ends the start."""
    from django.urls import get_resolver

    list(get_resolver().url_patterns)
    gc.freeze()  # what is loaded stays shared by the workers: one that ends does not go through it
    os.environ.update(systemd_socket)  # gunicorn looks for it after this


def when_ready(server: Any) -> None:
    """Fork the first workers one right after the other: gunicorn rests up to 0.1 s after each."""

    def spawn_at_once() -> None:
        del server.spawn_workers  # later ones are forked its way: one that crashes has to rest
        for _ in range(server.num_workers):
            server.spawn_worker()

    server.spawn_workers = spawn_at_once


def post_worker_init(worker: Any) -> None:
    """Warm a worker up; the last of the first ones tells systemd when all are ready."""
    with contextlib.suppress(Exception):  # what is wrong with a page is the health check's business
        ask_for_page(worker.wsgi)
    with contextlib.suppress(BlockingIOError):
        os.write(ready, b".")
    if notify_socket and worker.age == worker.cfg.workers:
        for _ in range(worker.age):
            os.read(ready_workers, 1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.connect(notify_socket)
            systemd.send(b"READY=1")


def ask_for_page(application: Any) -> None:
    """Have the application answer a first request, which loads what it loads when it needs it."""
    hosts = re.findall(r"[^,\s*]+", os.environ.get("ALLOWED_HOSTS", ""))
    host = next(iter(hosts), "localhost").lstrip(".")
    environ: dict[str, Any] = {"PATH_INFO": warm_up, "HTTP_HOST": host, "REMOTE_ADDR": "127.0.0.1"}
    environ["HTTP_X_FORWARDED_PROTO"] = "https"
    setup_testing_defaults(environ)
    with contextlib.closing(application(environ, lambda *_: None)) as answer:
        list(answer)


# -- A worker that is done does not take apart what it has loaded, which five at once do for a tenth
# -- of a second, on the processors of those that take their place.

done = False


@atexit.register  # now, before the application does anything: so it comes after all of that
def leave_at_once() -> None:
    """End a worker when its threads have ended and all that is to be done at its end is."""
    if done:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def worker_exit(_server: Any, _worker: Any) -> None:
    """Note that a worker was not ended by an error."""
    global done
    ended = sys.exc_info()[1]
    done = isinstance(ended, SystemExit) and not ended.code


# -- A deployment compares what the old release and the new one answer. Where it says a port, in
# -- .deploy/statsd, each request is told there: its status and how long it took, by token and role.


class Figures(Statsd):
    """gunicorn's own, which would log a traceback for each request while nobody listens."""

    def _sock_send(self, msg: str) -> None:
        if self.sock:
            with contextlib.suppress(OSError):
                try:
                    self.sock.send(msg.encode())
                except ConnectionRefusedError:  # of the one before: nobody listened then
                    self.sock.send(msg.encode())


def statsd_file() -> Path:
    """The file of the workspace in which this release lies."""
    if path := os.environ.get("DEPLOY_STATSD"):
        return Path(path)
    releases = [each for each in Path(__file__).absolute().parents if each.name == "releases"]
    return releases[0].with_name("statsd")


with contextlib.suppress(OSError, LookupError, TypeError, ValueError):  # then nobody is told
    told = json.loads(statsd_file().read_text(encoding="utf-8"))
    host, prefix = f"127.0.0.1:{int(told['port'])}", f"{told['token']}.{role}"
    statsd_host, statsd_prefix, logger_class = host, prefix, Figures
