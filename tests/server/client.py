"""The HTTP client of the tests, a program of its own in the server's network: one request, or constant load.

`client.py one`: reads {url, host, method, body, headers, source} from standard input, writes {status,
headers, body}; the source is the address of this computer that it asks from.
`client.py load`: reads {url, host, connections, pause} from the first line, sends requests until standard
input ends, then writes one line of JSON: a list of [began, seconds, status, beginning of the body]. Status
0 is a request without a whole answer; the text then says why. Every request has a connection of its own:
what is refused is seen.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 30.0
KEPT = 120

Row = tuple[float, float, int, str]


def ask(wish: dict[str, Any]) -> tuple[int, list[tuple[str, str]], bytes]:
    """Send one request on a new connection and read the whole answer."""
    parts = urlsplit(wish["url"])
    source = (wish["source"], 0) if "source" in wish else None
    host, port = parts.hostname or "", parts.port
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT, source_address=source)
    try:
        path = parts.path + ("?" + parts.query if parts.query else "")
        headers = {"Host": wish["host"], "Connection": "close", **wish.get("headers", {})}
        connection.request(wish.get("method", "GET"), path, wish.get("body") or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()
    finally:
        connection.close()


def measured(wish: dict[str, Any]) -> Row:
    """Send one request and tell when, for how long and with what result."""
    began = time.monotonic()
    try:
        status, _, body = ask(wish)
        text = body[:KEPT].decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        status, text = 0, f"{type(error).__name__}: {error}"
    return began, time.monotonic() - began, status, sys.intern(text)


def repeat(wish: dict[str, Any], rows: list[Row], over: threading.Event) -> None:
    """Send request after request until it is over."""
    while not over.is_set():
        rows.append(measured(wish))
        over.wait(wish["pause"])


def load() -> None:
    """Keep several connections busy until standard input ends; say `ready` once the first answers are in."""
    wish = json.loads(sys.stdin.readline())
    rows: list[Row] = []
    over = threading.Event()
    threads = [
        threading.Thread(target=repeat, args=(wish, rows, over)) for _ in range(wish["connections"])
    ]
    for thread in threads:
        thread.start()
    while len(rows) < len(threads):
        time.sleep(0.01)
    print("ready", flush=True)
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    print(json.dumps(sorted(rows)), flush=True)


def one() -> None:
    """Send the one request that standard input describes."""
    try:
        status, headers, body = ask(json.load(sys.stdin))
    except (OSError, http.client.HTTPException) as error:
        status, headers, body = 0, [], f"{type(error).__name__}: {error}".encode()
    print(json.dumps({"status": status, "headers": headers, "body": body.decode(errors="replace")}))


if __name__ == "__main__":
    load() if sys.argv[1:] == ["load"] else one()
