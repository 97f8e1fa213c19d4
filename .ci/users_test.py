"""A user's tests, which must run, and pass mypy --strict, where feedtestserver is installed.

mypy --strict reports a ``type: ignore`` that is not needed. So each one below proves that mypy
knows the type there; without the installed types it would be Any.
"""

from __future__ import annotations

import unittest
import urllib.error
import urllib.request

from feedtestserver import (
    DirectiveError,
    FeedTestRequestHandler,
    FeedTestServer,
    FeedTestServerMixin,
    Finding,
    Fixture,
    Request,
    Response,
    Step,
    audit,
    parse_directives,
)


def fetch(url: str) -> bytes:
    headers = {"Accept": "application/rss+xml", "Accept-Encoding": "gzip"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
        body: bytes = response.read()
        return body


def answer(request: Request) -> Response:
    return Response(f"{request.method} {request.path}".encode(), headers={"ETag": '"v1"'})


class Handler(FeedTestRequestHandler):
    def do_PUT(self) -> None:
        self.reply(Response(status=201))


class Server(FeedTestServer):
    handler_class = Handler


class MixinTest(FeedTestServerMixin, unittest.TestCase):
    server_class = Server
    data_directory = "data"
    intercept = True

    def test_answer(self) -> None:
        steps: list[Step] = [answer, 503, b"<rss/>", Response(delay=0)]
        self.server.respond("/feed.xml", *steps)
        self.assertEqual(fetch(self.get_url("feed.xml")), b"GET /feed.xml")
        request = self.assertRequested("/feed.xml", headers={"Cookie": None}, times=1)
        self.assertIn("Python-urllib", request.headers["User-Agent"] or "")
        with self.assertRaises(urllib.error.HTTPError) as caught:
            fetch(self.get_url("feed.xml"))
        caught.exception.close()
        self.assertNotRequested("/other.xml")
        self.assertPolite(ignore=["no-validator"])

    def test_put(self) -> None:
        request = urllib.request.Request(f"{self.base_url}/x", b"1", method="PUT")
        with urllib.request.urlopen(request, context=self.server.ssl_context()) as response:
            self.assertEqual(response.status, 201)


class ServerTest(unittest.TestCase):
    def test_record(self) -> None:
        with FeedTestServer() as server:
            server.clock = lambda: 1e9
            server.respond("/feed.xml", b"<rss/>")
            fetch(server.get_url("feed.xml"))
            request = server.wait_for_request("/feed.xml", times=1, timeout=5)
            server.assert_requested("/feed.xml", headers={"Cookie": None}, times=1)
            server.assert_not_requested("/other.xml", body={"a": [1]})
            server.assert_polite(ignore=["no-validator"])
            self.assertEqual((request.time, server.requests), (1e9, [request]))
            findings: list[Finding] = audit(server.requests)
            self.assertEqual([finding.rule for finding in findings], [])
            fixtures: list[Fixture] = server.fixtures()
            self.assertEqual((fixtures, server.errors), ([], []))

    def test_directives(self) -> None:
        self.assertEqual(parse_directives(b"<!-- Status: 410 -->")["status"], "410")
        with self.assertRaises(DirectiveError) as caught:
            parse_directives(b"<!-- Status: 41 -->", "feed.xml")
        self.assertEqual((caught.exception.source, caught.exception.line), ("feed.xml", 1))


def what_mypy_must_refuse(test: MixinTest, server: Server) -> None:  # it is never called
    none: None
    server.port = "80"  # type: ignore[assignment]
    server.clock = 1.0  # type: ignore[assignment]
    server.respond("/feed.xml", 5.03)  # type: ignore[arg-type]
    server.wait_for_request("/feed.xml", times="1")  # type: ignore[arg-type]
    server.no_such_method()  # type: ignore[attr-defined]
    none = server.requests  # type: ignore[assignment]
    none = server.fixtures()[0].path  # type: ignore[assignment]
    none = server.intercept().__enter__().base_url  # type: ignore[assignment]
    none = server.assert_requested("/feed.xml").url  # type: ignore[assignment]
    none = server.down().__enter__().base_url  # type: ignore[assignment]
    none = server.unused  # type: ignore[assignment]
    server.assert_not_requested("/feed.xml", headers={"Cookie": 1})  # type: ignore[dict-item]
    none = test.server  # type: ignore[assignment]
    none = test.assertRequested("/feed.xml").url  # type: ignore[assignment]
    none = answer(server.requests[0]).status  # type: ignore[assignment]
    none = server.requests[0].response  # type: ignore[assignment]
    none = audit([])[0].request.method  # type: ignore[assignment]
    none = parse_directives(b"").source  # type: ignore[assignment]
    audit(server)  # type: ignore[arg-type]
    parse_directives("")  # type: ignore[arg-type]
    Response("<rss/>")  # type: ignore[arg-type]
    FeedTestServer(bind_timeout=None)  # type: ignore[arg-type]
    del none
