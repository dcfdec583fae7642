"""Tests that need more than Python and git skip themselves where that is not there, but never where they must run."""

from __future__ import annotations

import os
import unittest
from typing import NoReturn


def skip(kind: str, reason: object) -> NoReturn:
    """Skip a test of this kind with the reason; fail where TESTS_MUST_RUN (words) names the kind."""
    if kind in os.environ.get("TESTS_MUST_RUN", "").replace(",", " ").split():
        raise AssertionError(f"the {kind} tests must run here: {reason}")
    raise unittest.SkipTest(f"{kind}: {reason}")
