"""A terminal for deploy.py: a pseudo-terminal of a width, and what a reader sees on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tests.lab import wait_for

COLOUR = re.compile(r"\x1b\[\d*m")
AGAIN = "\r\x1b[K"  # with which a line is written anew


class Place(Protocol):
    """Where deploy.py is at work: a Lab, or the sandbox."""

    checkout: Path

    def environment(self) -> dict[str, str]:
        """The variables of its user."""


class Terminal:
    """deploy.py at work on a terminal; `raw` is all that it wrote there until now."""

    def __init__(
        self,
        lab: Place,
        *arguments: str,
        columns: int = 100,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.raw, self.status = "", -1
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.ours, False)
        environment = (
            lab.environment() | {"TERM": "xterm", "LC_ALL": "C.UTF-8"} | dict(variables or {})
        )
        for name in {"COLUMNS", "NO_COLOR"} - set(variables or {}):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "deploy.py", *arguments],
            cwd=lab.checkout,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

    def read(self) -> str:
        """All that was written until now."""
        with contextlib.suppress(OSError):  # there is nothing now, or nobody writes any more
            while chunk := os.read(self.ours, 65536):
                self.raw += chunk.decode(errors="replace")
        return self.raw

    def await_text(self, text: str) -> None:
        """Wait until this was written."""
        wait_for(
            lambda: text in self.read() or self.process.poll() is not None,
            lambda: f"{text}: {self.raw[-2000:]}",
        )
        assert text in self.read(), self.raw

    def end(self, seconds: float = 60) -> int:
        """Wait for its end; the exit status."""
        wait_for(
            lambda: self.read() is not None and self.process.poll() is not None,
            lambda: self.raw,
            seconds,
        )
        self.read()
        os.close(self.ours)
        return self.process.returncode

    def hang_up(self) -> None:
        """Close the terminal while it is at work."""
        os.close(self.ours)

    def frames(self) -> list[str]:
        """Every state of every line, without colours."""
        lines = COLOUR.sub("", self.raw).replace("\r\n", "\n").split("\n")
        return [frame for line in lines for frame in line.split(AGAIN) if frame]

    def screen(self, coloured: bool = False) -> list[str]:
        """What stands there at the end, without colours unless they are asked for."""
        raw = self.raw if coloured else COLOUR.sub("", self.raw)
        lines = raw.replace("\r\n", "\n").rstrip("\n").split("\n")
        return [line.split(AGAIN)[-1] for line in lines]


def columns(text: str) -> int:
    """How many columns a line takes."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
