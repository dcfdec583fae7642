"""The tests. All together they run side by side; what is named runs in this process alone."""

from __future__ import annotations

import unittest
from pathlib import Path


def load_tests(
    loader: unittest.TestLoader, _standard: unittest.TestSuite, pattern: str | None
) -> unittest.TestSuite:
    """What discovery gives for this folder."""
    from tests.side_by_side import SideBySide

    here = Path(__file__).parent
    return SideBySide(loader.discover(str(here), pattern or "test*.py", str(here.parent)))
