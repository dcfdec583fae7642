"""The picture of a switch: what users were answered, in each tenth of a second, as an SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from tests.server.bench import Sample

BIN = 0.1  # seconds
COLOURS = {"old": "#7a8ea8", "new": "#2f9e6e", "lost": "#d64545"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 960, 150, 60, 70, 70
Switch = tuple[Sequence[Sample], float, str, str]  # requests, start, the versions before and after


def kind(sample: Sample, before: str, after: str) -> str:
    """Who answered a request: the old release, the new one, or nobody."""
    if sample.status != 200:
        return "lost"
    return "new" if sample.body.split(" ")[0] == after else "old"


def draw_switch(switches: Mapping[str, Switch]) -> str:
    """An SVG with a panel for each way: stacked bars of requests by who answered them."""
    height = TOP + len(switches) * (HEIGHT + GAP)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        (
            '<text x="20" y="30" font-size="17" font-weight="600" fill="#222">'
            "One deployment, as users see it: requests answered in each tenth of a second</text>"
        ),
    ]
    names = {"old": "the old release", "new": "the new release", "lost": "nobody (lost)"}
    for at, (name, text) in enumerate(names.items()):
        x = 20 + at * 170
        parts.append(f'<rect x="{x}" y="42" width="12" height="12" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 18}" y="53" fill="#444">{text}</text>')
    lasting = max(
        max(each.began for each in made) - began for made, began, _, _ in switches.values()
    )
    for row, (name, switch) in enumerate(switches.items()):
        parts += panel(name, switch, TOP + row * (HEIGHT + GAP) + 30, lasting)
    return "\n".join([*parts, "</svg>", ""])


def panel(name: str, switch: Switch, top: int, lasting: float) -> list[str]:
    """The bars of one way, their scale, and its figures in words."""
    samples, began, before, after = switch
    bins: dict[int, Counter[str]] = {}
    for sample in samples:
        at = math.floor((sample.began + sample.seconds - began + 1) / BIN)
        if at >= 0:
            bins.setdefault(at, Counter())[kind(sample, before, after)] += 1
    most = max(sum(each.values()) for each in bins.values())
    width = (WIDTH - LEFT - 20) / ((lasting + 1.5) / BIN)
    dropped = sum(each["lost"] for each in bins.values())
    slowest = max(sample.seconds for sample in samples)
    parts = [
        (
            f'<text x="20" y="{top - 8}" font-weight="600" fill="#222">{name}: {len(samples):,} requests, '
            f"{dropped:,} lost, longest wait {slowest:.2f} s</text>"
        ),
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end" fill="#666">{most}</text>',
        f'<line x1="{LEFT}" y1="{top + HEIGHT}" x2="{WIDTH - 20}" y2="{top + HEIGHT}" stroke="#999"/>',
    ]
    for at, counted in sorted(bins.items()):
        y = float(top + HEIGHT)
        for who, colour in COLOURS.items():
            tall = counted[who] / most * (HEIGHT - 10)
            y -= tall
            if counted[who]:
                parts.append(
                    f'<rect x="{LEFT + at * width:.1f}" y="{y:.1f}" width="{max(width - 0.5, 0.5):.1f}" '
                    f'height="{tall:.1f}" fill="{colour}"/>'
                )
    for second in range(int(lasting) + 1):
        x = LEFT + (second + 1) / BIN * width
        parts.append(
            f'<text x="{x:.0f}" y="{top + HEIGHT + 16}" text-anchor="middle" fill="#666">{second} s</text>'
        )
    return parts
