"""The version that every page shows, so that a client can tell which release answered."""

VERSION = "1"
