"""What the tool says within a test: its log and its console, fresh, and put away afterwards."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from unittest import mock

import deploy


@contextlib.contextmanager
def speaking() -> Iterator[io.StringIO]:
    """What is shown on stdout, with a console, secrets and log files of this test alone."""
    with (
        mock.patch.object(deploy, "console", deploy.Console()),
        mock.patch.object(deploy, "redactor", deploy.Redactor()),
        mock.patch.object(deploy.log, "handlers", []),
        contextlib.redirect_stdout(io.StringIO()) as shown,
    ):
        deploy.start_logging()
        try:
            yield shown
        finally:
            for handler in deploy.log.handlers:
                handler.close()
