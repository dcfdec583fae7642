"""A terminal as one sees it, drawn from a real run: python3 -m tests.bench.terminal FILE.svg

The second and fourth act of the sandbox: a release that goes live, and one that does not. Its folder is shown as
/home/ubuntu; nothing else is changed.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from tests.sandbox import Sandbox
from tests.terminal import Terminal

COLUMNS, LETTER, LINE, EDGE = 100, 7.83, 18, 20  # letters; the rest in pixels, for a size of 13
COLOURS = {"": "#d8dee9", "1": "#ffffff", "2": "#8a94a6", "31": "#ff6b6b", "32": "#5fd38d"}
COLOURS |= {"33": "#f0c674", "36": "#7cc7d8"}
SGR = re.compile(r"\x1b\[(\d*)m")


class Filmed(Sandbox):
    """The sandbox, with its deployments on a terminal of a width."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def deploy(self, *arguments: str) -> tuple[int, str]:
        """Deploy on a terminal, and keep what stands there at the end."""
        terminal = Terminal(self, *arguments, columns=COLUMNS)
        status = terminal.end(300)
        self.lines += ["$ " + " ".join(("python3 deploy.py", *arguments))]
        self.lines += [*terminal.screen(coloured=True), f"\x1b[2m(exit status {status})\x1b[0m", ""]
        return status, terminal.raw


def draw(lines: list[str]) -> str:
    """The SVG of a terminal with these lines and their colours."""
    rows = [row for line in lines for row in wrap(line)]
    width, height = round(COLUMNS * LETTER) + 2 * EDGE, len(rows) * LINE + 3 * EDGE
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-size="13" '
            'font-family="ui-monospace, Menlo, Consolas, monospace">'
        ),
        f'<rect width="{width}" height="{height}" rx="8" fill="#1d2330"/>',
    ]
    parts += [
        f'<circle cx="{EDGE + 18 * at}" cy="{EDGE}" r="6" fill="{colour}"/>'
        for at, colour in enumerate(("#ff6b6b", "#f0c674", "#5fd38d"))
    ]
    for number, pieces in enumerate(rows):
        spans = "".join(
            f'<tspan fill="{COLOURS[code.lstrip("0")]}">{escape(text)}</tspan>'
            for code, text in pieces
        )
        y = 2 * EDGE + (number + 1) * LINE
        parts.append(f'<text x="{EDGE}" y="{y}" xml:space="preserve">{spans}</text>')
    return "\n".join([*parts, "</svg>", ""])


def wrap(line: str) -> Iterator[list[tuple[str, str]]]:
    """The rows that a line takes: pieces of a colour each."""
    first, *rest = SGR.split(line)
    row: list[tuple[str, str]] = []
    left = COLUMNS
    for code, whole in [("", first), *zip(rest[::2], rest[1::2], strict=True)]:
        text = whole
        while len(text) > left:
            yield [*row, (code, text[:left])]
            text, row, left = text[left:], [], COLUMNS
        row, left = [*row, (code, text)], left - len(text)
    yield row


def main() -> int:
    """Play, and write the picture."""
    with contextlib.closing(Filmed()) as sandbox:
        sandbox.build()
        shown, statuses = [], []
        for act in (sandbox.act_one, sandbox.act_two, sandbox.act_three, sandbox.act_four):
            sandbox.lines.clear()
            statuses.append(act()[0])
            if act in (sandbox.act_two, sandbox.act_four):
                shown += [line.replace(str(sandbox.root), "/home/ubuntu") for line in sandbox.lines]
    Path(sys.argv[1]).write_text(draw(shown[:-1]), encoding="utf-8")
    return 0 if statuses == [0, 0, 1, 1] else 1


if __name__ == "__main__":
    raise SystemExit(main())
