"""The health check, against a real HTTP server on loopback."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import socketserver
import tempfile
import threading
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import deploy

ENDLESS = 12  # seconds


class Asked(NamedTuple):
    """A request that a server got."""

    path: str
    headers: dict[str, str]


class Page(http.server.BaseHTTPRequestHandler):
    """Answers as its path says, and keeps what it was asked. What is endless ends after a while."""

    server: Server

    def do_GET(self) -> None:
        headers = {name.lower(): text for name, text in self.headers.items()}
        self.server.asked.append(Asked(self.path, headers))
        name, _, rest = self.path.strip("/").partition("/")
        getattr(self, f"answer_{name}")(rest)

    def answer_status(self, status: str) -> None:
        self.send_response(int(status))
        if status.startswith("3"):
            self.send_header("Location", "/status/200")
        body = "grün und gesund".encode()
        self.send_header("Content-Length", "0" if status == "204" else str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if status == "204" else body)

    def answer_after(self, times: str) -> None:
        """503 so many times, then 200."""
        self.answer_status("200" if len(self.server.asked) > int(times) else "503")

    def answer_drip(self, _rest: str) -> None:
        """A header that never ends, each piece of it in time."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip()

    def answer_body(self, _rest: str) -> None:
        """A body that never ends, and does not hold the text."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        self.drip()

    def drip(self) -> None:
        until = time.monotonic() + ENDLESS
        with contextlib.suppress(OSError):  # the client hung up
            while time.monotonic() < until and not self.server.closing.wait(0.02):
                self.wfile.write(b"x")

    def answer_silent(self, _rest: str) -> None:
        self.server.closing.wait(ENDLESS)

    def answer_nothing(self, _rest: str) -> None:
        self.close_connection = True

    def answer_garbage(self, _rest: str) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def answer_torn(self, _rest: str) -> None:
        """A body that ends in the middle of a piece."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhalf")

    def address_string(self) -> str:
        return "-"

    def log_message(self, *_: object) -> None:
        pass


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Keeps what it was asked."""

    daemon_threads = True
    address: Any = ("127.0.0.1", 0)

    def __init__(self) -> None:
        super().__init__(self.address, Page)
        self.asked: list[Asked] = []
        self.closing = threading.Event()

    def handle_error(self, *_: object) -> None:
        pass  # the client hung up


class UnixServer(Server):
    address_family = socket.AF_UNIX

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        super().__init__()


class HealthTest(unittest.TestCase):
    def setUp(self) -> None:
        self.server = self.serve(Server())
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.errors: list[Any] = []
        hook = mock.patch.object(threading, "excepthook", self.errors.append)
        hook.start()
        self.addCleanup(self.assertEqual, self.errors, [], "an exception that nobody caught")
        self.addCleanup(hook.stop)

    def serve(self, server: Server) -> Server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def stop() -> None:
            server.closing.set()
            server.shutdown()
            server.server_close()
            thread.join()

        self.addCleanup(stop)
        return server

    def check(self, path: str, **changes: Any) -> deploy.HealthCheck:
        settings: dict[str, Any] = {"url": self.address + path, "headers": {}, "timeout": 20.0}
        host = changes.pop("host", "")
        return deploy.HealthCheck(deploy.HealthSection(**(settings | changes)), host)

    def ask(self, path: str, **changes: Any) -> deploy.Answer:
        return self.check(path, **changes).wait(0)


class AnswerTest(HealthTest):
    def test_the_right_status(self) -> None:
        self.assertEqual(self.ask("/status/200"), (True, f"200 OK for {self.address}/status/200"))
        self.assertEqual(self.ask("/status/204", expect=204)[0], True)
        self.assertEqual(self.ask("/status/404", expect=404)[0], True)

    def test_the_wrong_status(self) -> None:
        for answer in ("404 Not Found", "500 Internal Server Error", "204 No Content"):
            url = f"{self.address}/status/{answer[:3]}"
            saw = f"{answer} for {url}, expected 200"
            self.assertEqual(self.ask(f"/status/{answer[:3]}"), (False, saw))

    def test_no_redirect_is_followed(self) -> None:
        for status in (301, 302, 303, 307, 308):
            good, saw = self.ask(f"/status/{status}")
            self.assertFalse(good)
            self.assertTrue(saw.startswith(f"{status} "), saw)
            self.assertTrue(self.ask(f"/status/{status}", expect=status)[0])
        self.assertNotIn("/status/200", [asked.path for asked in self.server.asked])

    def test_the_text(self) -> None:
        self.assertTrue(self.ask("/status/200", contains="grün")[0])
        good, saw = self.ask("/status/200", contains="rot")
        self.assertFalse(good)
        self.assertIn("but without the text 'rot'", saw)
        self.assertFalse(self.ask("/status/500", contains="grün")[0])
        self.assertTrue(self.ask("/status/500", contains="grün", expect=500)[0])

    def test_headers(self) -> None:
        self.ask("/status/200")
        self.assertEqual(
            self.server.asked[-1].headers["host"], self.address.removeprefix("http://")
        )
        headers = {"X-Forwarded-Proto": "https", "X-A": "b: c"}
        self.ask("/status/200", host="gforms.example.org", headers=headers)
        wanted = {"host": "gforms.example.org", "x-forwarded-proto": "https", "x-a": "b: c"}
        wanted["user-agent"] = "deploy.py"
        self.assertLessEqual(wanted.items(), self.server.asked[-1].headers.items())
        self.ask("/status/200", headers={"User-Agent": "another"})
        self.assertEqual(self.server.asked[-1].headers["user-agent"], "another")

    def test_proxies_are_ignored(self) -> None:
        proxy = self.serve(Server())
        address = f"http://127.0.0.1:{proxy.server_address[1]}"
        names = ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy")
        with mock.patch.dict(os.environ, {**dict.fromkeys(names, address), "no_proxy": ""}):
            self.assertTrue(self.ask("/status/200")[0])
        self.assertEqual(proxy.asked, [])


class NoAnswerTest(HealthTest):
    def test_refused(self) -> None:
        with socket.socket() as taken:  # bound, but it does not listen
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
            good, saw = self.ask("", url=url)
        self.assertFalse(good)
        self.assertIn(f"no answer from {url} ", saw)
        self.assertIn("refused", saw)
        self.assertNotIn("urlopen", saw)

    def test_nothing_and_garbage(self) -> None:
        for path in ("/nothing", "/garbage"):
            good, saw = self.ask(path)
            self.assertFalse(good)
            self.assertIn(f"no answer from {self.address}{path} (", saw)

    def test_a_body_that_is_torn(self) -> None:
        good, saw = self.ask("/torn", contains="whole")
        self.assertFalse(good)
        self.assertNotIn("within", saw, "it was not late")

    def test_the_limit_holds_for_the_whole_answer(self) -> None:
        for path, contains in (("/silent", ""), ("/drip", ""), ("/body", "never")):
            with self.subTest(path=path):
                began = time.monotonic()
                good, saw = self.ask(path, timeout=0.5, contains=contains)
                self.assertFalse(good)
                self.assertLess(time.monotonic() - began, ENDLESS - 2)
                self.assertIn(f"no answer from {self.address}{path}", saw)

    def test_a_name_that_does_not_resolve(self) -> None:
        unknown = socket.gaierror(-2, "Name or service not known")
        with mock.patch.object(socket, "getaddrinfo", side_effect=unknown):
            good, saw = self.ask("", url="http://gforms.invalid/")
        self.assertFalse(good)
        self.assertIn("Name or service not known", saw)


class UnixTest(HealthTest):
    def setUp(self) -> None:
        super().setUp()
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()), "candidate.sock")

    def test_the_private_socket_is_asked_and_no_other(self) -> None:
        private = self.serve(UnixServer(self.path))
        check = self.check(
            "/status/200", host="gforms.example.org", headers={"X-Forwarded-Proto": "https"}
        )
        good, saw = check.wait(0, self.path)
        self.assertTrue(good, saw)
        self.assertIn("on the private socket", saw)
        self.assertEqual(len(private.asked), 1)
        self.assertEqual(private.asked[0].headers["host"], "gforms.example.org")
        self.assertEqual(private.asked[0].headers["x-forwarded-proto"], "https")
        self.assertEqual(self.server.asked, [])

    def test_an_https_url_is_asked_for_in_plain_words_there(self) -> None:
        private = self.serve(UnixServer(self.path))
        good, saw = self.check("", url="https://gforms.example.org/status/200").wait(0, self.path)
        self.assertTrue(good, saw)
        self.assertEqual(private.asked[0].headers["host"], "gforms.example.org")

    def test_wrong_status_and_redirect_there(self) -> None:
        self.serve(UnixServer(self.path))
        self.assertIn("500 Internal Server Error", self.check("/status/500").wait(0, self.path)[1])
        self.assertIn("302 Found", self.check("/status/302").wait(0, self.path)[1])

    def test_nobody_there(self) -> None:
        good, saw = self.check("/status/200").wait(0, self.path)
        self.assertFalse(good)
        self.assertIn("no answer from", saw)
        self.assertEqual(self.server.asked, [])


class WaitTest(HealthTest):
    def test_until_it_is_healthy(self) -> None:
        good, saw = self.check("/after/3").wait(60)
        self.assertTrue(good, saw)
        self.assertEqual(len(self.server.asked), 4)

    def test_once_when_there_is_no_time(self) -> None:
        self.assertFalse(self.check("/after/1").wait(0)[0])
        self.assertEqual(len(self.server.asked), 1)

    def paused(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> list[float]:
        """The pauses between the questions, on a clock of its own."""
        now, pauses = [1000.0], []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            now[0] += seconds

        check, clock = self.check("/status/503"), mock.Mock(monotonic=lambda: now[0])
        with (
            mock.patch.object(deploy.HealthCheck, "ask", lambda *_: (False, "503")),
            mock.patch.object(deploy, "pause", pause),
            mock.patch.object(deploy, "time", clock),
        ):
            self.assertEqual(check.wait(seconds, alive=alive), (False, "503"))
        self.assertLessEqual(now[0], 1000 + seconds)
        return pauses

    def test_the_pauses_grow_until_the_deadline(self) -> None:
        pauses = self.paused(60)
        self.assertEqual(pauses, sorted(pauses))
        self.assertLessEqual(pauses[0], 0.2)
        self.assertLessEqual(max(pauses), 5)
        self.assertGreater(len(set(pauses)), 3)
        self.assertGreater(sum(pauses), 50)
        self.assertLess(len(pauses), 40)

    def test_no_further_question_when_it_ended(self) -> None:
        self.assertEqual(self.paused(60, alive=lambda: False), [])
        left = iter((True, True, False))
        self.assertEqual(len(self.paused(60, alive=lambda: next(left))), 2)

    def test_a_signal_ends_it_though_nobody_answers(self) -> None:
        self.enterContext(mock.patch.multiple(deploy.Signals, received=0, shields=0))
        real, began = self.server.closing.wait, time.monotonic()

        def wait(seconds: float) -> bool:
            deploy.Signals.keep(signal.SIGTERM, None)
            return real(seconds)

        with mock.patch.object(self.server.closing, "wait", wait):
            self.assertRaises(deploy.Interrupted, self.check("/silent").wait, 60)
        self.assertLess(time.monotonic() - began, ENDLESS - 2)


class AddressTest(HealthTest):
    def test_where_a_browser_finds_the_site(self) -> None:
        for host, refused, address in (
            ("gforms.example.org", 0, "https://gforms.example.org/"),
            ("gforms.example.org", 111, "http://gforms.example.org/"),  # nothing serves HTTPS
            ("", 0, f"{self.address}/x"),
            ("localhost", 0, f"{self.address}/x"),
            ("192.0.2.7", 0, f"{self.address}/x"),
        ):
            check = self.check("/x", host=host)
            with (
                self.subTest(host=host, refused=refused),
                mock.patch.object(socket.socket, "connect_ex", lambda *_, code=refused: code),
            ):
                self.assertEqual(check.address(), address)
