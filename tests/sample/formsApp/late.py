"""Imported by the first request that needs it: an old worker must never find a newer release's copy."""

VERSION = "1"
