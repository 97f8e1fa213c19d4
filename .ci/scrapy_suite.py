"""Run tests of Scrapy's own suite with feedtestserver as their server.

    python .ci/scrapy_suite.py [--cache DIRECTORY]

Scrapy is a crawler, with Twisted or aiohttp as its HTTP client. Its suite has a server made with
Twisted, which speaks HTTP and HTTPS and acts as a proxy. No file of Scrapy's is edited: the methods
that start and stop that server are replaced in the imported module, and a FeedTestServer is
scripted to respond as it does. The exit status is 1 unless all of this holds:

1. every test that passes with Scrapy's own server passes with feedtestserver in its place, except
   those in EXPECTED, which fail for the reason given there;
2. feedtestserver has no error to report.

So the tests run with feedtestserver, and only those that fail for no such reason run again with
Scrapy's server, to see whether they would pass.
Scrapy's source distribution and what its tests need are fetched by pip into a virtual environment
of their own. That release of Scrapy needs Python 3.10 or newer.
"""

import collections
import functools
import importlib
import json
import os
import pathlib
import random
import re
import ssl
import sys
import time
import urllib.parse
import venv
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from feedparser_suite import count, download, pip, report_of, run_suite_of  # noqa: E402

from feedtestserver import FeedTestRequestHandler, FeedTestServer, Request, Response  # noqa: E402

RELEASE = "scrapy-2.19.0"
OLDEST_PYTHON = (3, 10)
# Its tests turn warnings into errors, so releases that may deprecate something are held back.
DEPENDENCIES = (
    "Twisted==26.10.*",
    "aiohttp==3.14.*",
    "Pillow",
    "pytest==9.1.*",
    "pytest-rerunfailures",
    "pytest-twisted==1.*",
)
FILES = (
    "downloader_handler_aiohttp.py",
    "downloader_handler_twisted_http11.py",
    "crawl.py",
    "engine.py::TestEngine",
    "pipeline_crawl.py",
    "request_attribute_binding.py",
    "request_left.py",
    "spidermiddleware_httperror.py",
    "spidermiddleware_output_chain.py",
)
# Parts of the names of tests that tell nothing about the server, or too little for their time.
LEFT_OUT = (
    "Http2",  # what feedtestserver does not have
    *("Mitm", "RealWebsite", "Tunneling", "dns_error", "conn_failed"),  # other servers, or none
    "http_status_code",  # 40 statuses, for each client and both schemes
    *("fixed_delay", "randomized_delay", "timeout_failure", "short_timeout"),
    "asyncgen",  # in these five Scrapy waits for itself
)
FEWEST_TESTS = 400
TIME_LIMIT = 200  # seconds, for one run

# Tests that pass with Scrapy's own server only: what is in their names, and the reason.
ORGANIZATION = "it looks for Scrapy as the organization in the certificate"
EXPECTED = {
    r"aiohttp\.py.*::test_(response_ssl_certificate|tls_logging)": ORGANIZATION,
    r"twisted_http11.*::test_tls_logging": ORGANIZATION,
    r"engine\.py::TestEngine::test_crawler$": "it looks for Twisted's name in the field Server",
}


# Obtaining Scrapy


class Checkout(NamedTuple):
    """Scrapy's unpacked source, an interpreter that has what its tests need, and its bytecode."""

    source: pathlib.Path
    python: pathlib.Path
    bytecode: pathlib.Path


def obtain(directory: pathlib.Path) -> Checkout:
    """Fetch Scrapy into the directory, unless an earlier run has."""
    scripts = "Scripts" if os.name == "nt" else "bin"
    checkout = Checkout(
        directory / RELEASE, directory / "venv" / scripts / "python", directory / "bytecode"
    )
    if not checkout.source.is_dir():
        venv.create(directory / "venv", with_pip=True, clear=True)
        release = RELEASE.replace("-", "==")
        # Nothing is compiled, as most of it is never imported.
        pip(checkout.python, "install", "--no-compile", release, *DEPENDENCIES)
        download(checkout.python, RELEASE, directory)
    return checkout


# The runs, each in its own process; only there Scrapy and pytest can be imported


def start(name: str, checkout: Checkout, tests: list[str]) -> Any:
    """Run the tests with the server of that name in a new process; return its report."""
    paths = os.pathsep.join(map(str, (checkout.source, REPOSITORY)))
    variables = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": ""}
    variables["PYTHONPYCACHEPREFIX"] = str(checkout.bytecode)
    command = [checkout.python, os.path.abspath(__file__)]
    report, output = report_of(command, name, tests, checkout.source, variables, TIME_LIMIT)
    return {**report, "output": output}


class Recorder:
    """A plugin of pytest that keeps the outcome of every test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called after setup, call and teardown of a test; the first that did not pass counts."""
        if self.outcomes.get(report.nodeid, "passed") == "passed":
            self.outcomes[report.nodeid] = report.outcome


def run(name: str, tests: list[str]) -> dict[str, Any]:
    errors: list[str] = []
    if name == "feedtestserver":
        replace_servers(errors)
    recorder = Recorder()
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(LEFT_OUT)})"]
    importlib.import_module("pytest").main([*options, *tests], plugins=[recorder])
    return {"outcomes": recorder.outcomes, "errors": errors}


def replace_servers(errors: list[str]) -> None:
    """Make each of Scrapy's servers start a FeedTestServer, with HTTP and HTTPS on one port."""
    base = importlib.import_module("tests.mockserver.http_base").BaseMockServer
    site = os.path.abspath("tests/sample_data/test_site")

    def enter(mock: Any) -> Any:
        mock.server = FeedTestServer(site)
        mock.server.handler_class = Handler
        mock.server.certificate = "self-signed"  # as Scrapy's
        mock.server.start()
        SCRIPTS[mock.module_name](mock.server, mock)
        mock.http_port = mock.https_port = mock.server.port
        mock.host = "localhost"  # which is the common name that its tests look for
        return mock

    def leave(mock: Any, *exc_info: object) -> None:
        errors.extend(mock.server.errors)
        mock.server.stop()

    base.__enter__, base.__exit__ = enter, leave


class Handler(FeedTestRequestHandler):
    def do_GET(self) -> None:
        """Respond to what everything() passes on: show the client's address."""
        self.reply(html(self.client_address[0].encode()))


# What Scrapy's servers respond, see tests/mockserver/http_resources.py in its source


def script_http(server: FeedTestServer, mock: Any) -> None:
    server.respond("*", everything)
    for path, step in ROUTES.items():
        server.respond(path, step)
    for fixture in server.fixtures():
        server.respond(f"/static/{fixture.name}", fixture.name)
    server.respond("/static/", "index.html")
    images = server.fixtures("files/images/*")
    links = "".join(f"<tr><td><a href='{image.path.name}'>image</a>" for image in images)
    listing = f"<table><thead><tr><th>Filename</thead><tbody>{links}</table>"
    server.respond("/static/files/images/", html(listing.encode()))


def script_proxy(server: FeedTestServer, mock: Any) -> None:
    server.respond("*", uri)
    server.respond("*", Response(fault="stall at headers"), method="CONNECT")


def script_simple_https(server: FeedTestServer, mock: Any) -> None:
    def configure(context: ssl.SSLContext) -> None:
        if mock.cipher_string:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(mock.cipher_string)
            # They are for a key of RSA, which feedtestserver's is not.
            context.load_cert_chain(f"tests/{mock.certfile}", f"tests/{mock.keyfile}")
        if mock.tls_min_version:
            context.minimum_version = VERSIONS[mock.tls_min_version]
        if mock.tls_max_version:
            context.maximum_version = VERSIONS[mock.tls_max_version]

    server.respond("/file", text(b"0123456789"))
    server.configure_tls = configure
    if mock.certfile != "keys/localhost.crt":
        server.certificate = "wrong-host"


VERSIONS = {
    "TLSv1.0": ssl.TLSVersion.TLSv1,
    "TLSv1.2": ssl.TLSVersion.TLSv1_2,
    "TLSv1.3": ssl.TLSVersion.TLSv1_3,
}
SCRIPTS = {
    "tests.mockserver.http": script_http,
    "tests.mockserver.proxy_echo": script_proxy,
    "tests.mockserver.simple_https": script_simple_https,
}


def typed(
    media_type: str, body: bytes = b"", status: int = 200, *fields: tuple[str, str], **how: Any
) -> Response:
    return Response(body, status, headers=[("Content-Type", media_type), *fields], **how)


html = functools.partial(typed, "text/html")
text = functools.partial(typed, "text/plain")


def argument(request: Request, name: str, default: str) -> str:
    return request.query.get(name, [default])[0]


def everything(request: Request) -> Optional[Response]:
    return None if request.path == "/client-ip" else html(b"Scrapy mock HTTP server\n")


def status(request: Request) -> Response:
    return html(b"", int(argument(request, "n", "200")))


def follow(request: Request) -> Response:
    """Links to other pages of so many in total: those below this one, or any."""
    total, show = int(argument(request, "total", "100")), int(argument(request, "show", "1"))
    first = int(argument(request, "n", str(total)))
    numbers: Iterable[int] = range(first, max(first - show, 0), -1)
    if argument(request, "order", "desc") == "rand":
        numbers = [random.randint(1, total) for _ in range(show)]
    links = [
        f"<a href='/follow?{urllib.parse.urlencode({**request.query, 'n': [number]}, doseq=True)}'>"
        f"follow {number}</a><br>"
        for number in numbers
    ]
    page = f"<html> <head></head> <body>{''.join(links)}</body>"
    return html(page.encode(), delay=float(argument(request, "maxlatency", "0")) / 2)


def delay(request: Request) -> Response:
    """Delay the whole response, or send the head at once and the body evenly within that time."""
    seconds = float(argument(request, "n", "1"))
    body = f"Response delayed for {seconds:.3f} seconds\n".encode()
    if argument(request, "b", "1") == "0" or not seconds:
        return html(body, delay=seconds)
    return html(body, chunked=len(body), rate=max(1, int(len(body) / seconds)))


def drop(request: Request) -> Response:
    if argument(request, "abort", "0") != "0":
        return Response(fault="reset")
    return html(b"this connection will be dropped\n", 200, ("Content-Length", "1024"))


def raw(request: Request) -> Response:
    return Response(argument(request, "raw", "HTTP 1.1 200 OK\n").encode(), asis=True)


def echo(request: Request) -> Response:
    """The fields of the request, their names spelled as by Twisted, and its body."""
    fields = {name.title(): request.headers.get_all(name) for name, _ in request.headers.items()}
    return html(json.dumps({"headers": fields, "body": request.body.decode()}).encode())


def payload(request: Request) -> Response:
    is_whole = request.headers["Content-Length"] == "100" and len(request.body) == 100
    return html(request.body if is_whole else b"ERROR")


def body(request: Request) -> Response:
    return html(request.body)


def body_without_type(request: Request) -> Response:
    return typed("", request.body)


def redirect_to(request: Request) -> Response:
    return html(b"redirecting...", 302, ("Location", argument(request, "goto", "/")))


def host(request: Request) -> Response:
    return html(str(request.headers["Host"]).encode())


def content_length(request: Request) -> Response:
    return html(str(request.headers["Content-Length"]).encode())


def compress(request: Request) -> Response:
    if request.headers["Accept-Encoding"] != "gzip":
        return html(b"Did not receive a valid accept-encoding header", 500)
    return html(argument(request, "data", "").encode(), compress="gzip")


def response_headers(request: Request) -> Response:
    fields = {"Content-Type": "text/html", **json.loads(request.body)}
    return Response(json.dumps(fields).encode(), headers=fields)


def set_cookie(request: Request) -> Response:
    cookies = urllib.parse.parse_qsl(urllib.parse.urlsplit(request.target).query)
    return html(b"", 200, *(("Set-Cookie", "=".join(cookie)) for cookie in cookies))


def uri(request: Request) -> Response:
    return html(request.target.encode())


PAGE = b"<body><p class='one'>Works</p><p class='two'>World</p></body>"
REDIRECT = b"""
<html>
    <head>
        <meta %s content="0;URL=/redirected">
    </head>
    <body bgcolor="#FFFFFF" text="#000000">
    <a href="/redirected">click here</a>
    </body>
</html>
"""
NOT_FOUND = b"""
<html>
  <head><title>404 - No Such Resource</title></head>
  <body>
    <h1>No Such Resource</h1>
    <p>File not found.</p>
  </body>
</html>
"""
BAD_HEADER = b"""HTTP/1.1 200 OK
Content-Length: 5
Content-Type: text/html
X-Folded-Header: one
\ttwo
<meta http-equiv="Content-Type" content="text/html; charset=utf-8" />
X-After-Bad-Header: works

Works"""
ROUTES: dict[str, Any] = {
    "/status": status,
    "/follow": follow,
    "/delay": delay,
    "/partial": html(b"partial content\n", 200, ("Content-Length", "1024")),
    "/drop": drop,
    "/raw": raw,
    "/bad-header": Response(BAD_HEADER.replace(b"\n", b"\r\n"), asis=True),
    "/echo": echo,
    "/payload": payload,
    "/alpayload": body,
    "/static/*": html(NOT_FOUND, 404),
    "/redirect-to": redirect_to,
    "/text": text(b"Works"),
    "/html": html(PAGE),
    "/enc-gb18030": typed("text/html; charset=gb18030", b"<p>gb18030 encoding</p>"),
    "/redirect": html(REDIRECT % b'http-equiv="refresh"', 302, ("Location", "/redirected")),
    "/redirect-no-meta-refresh": html(
        REDIRECT % b'http-no-equiv="do-not-refresh-me"', 302, ("Location", "/redirected")
    ),
    "/redirected": text(b"Redirected here"),
    "/numbers": text(b"".join(b"%d" % number for number in range(2**18))),
    "/wait": Response(fault="stall"),
    "/hang-after-headers": html(b"some bytes", chunked=10, fault="stall at 100%"),
    "/host": host,
    "/broken": html(b"partial", 200, ("Content-Length", "20")),
    "/chunked": html(b"chunked content\n", chunked=8),
    "/broken-chunked": html(b"chunked content\n", chunked=8, fault="close at 100%"),
    "/contentlength": content_length,
    "/nocontenttype": body_without_type,
    "/largechunkedfile": html(b"x" * 2**20, chunked=1024),
    "/compress": compress,
    "/duplicate-header": html(b"", 200, ("Set-Cookie", "a=b"), ("Set-Cookie", "c=d")),
    "/response-headers": response_headers,
    "/set-cookie": set_cookie,
    "/uri/*": uri,
}


# The verdict


def judge(own: dict[str, str], ours: dict[str, str]) -> list[str]:
    """What is wrong with our run, in the light of that of some tests with Scrapy's own server."""
    passed = sum(outcome == "passed" for outcome in ours.values())
    problems = [] if passed >= FEWEST_TESTS else [f"only {passed} tests passed"]
    problems += [
        f"passed, though it is in EXPECTED: {test}"
        for test, outcome in ours.items()
        if outcome == "passed" and reason_for(test)
    ]
    problems += [
        f"failed, and passed with its own server: {test}"
        for test, outcome in own.items()
        if outcome == "passed"
    ]
    return problems


def reason_for(test: str) -> str:
    """Why a test is expected to fail; empty if it is not."""
    return next((reason for name, reason in EXPECTED.items() if re.search(name, test)), "")


def verify(checkout: Checkout) -> list[str]:
    """Run the tests, print what was counted, and return what is wrong."""
    print(f"{RELEASE}, Python {sys.version.split()[0]}")
    began = time.perf_counter()
    ours = start("feedtestserver", checkout, [f"tests/test_{name}" for name in FILES])
    print(
        f"with feedtestserver: {count(ours['outcomes'])}, {len(ours['errors'])} server errors, "
        f"{time.perf_counter() - began:.0f} s"
    )
    failed = [test for test, outcome in ours["outcomes"].items() if outcome == "failed"]
    for reason, number in collections.Counter(map(reason_for, failed)).items():
        print(f"{number} failed: {reason or 'that is not expected'}")
    own: dict[str, Any] = {"outcomes": {}}
    if again := [test for test in failed if not reason_for(test)]:
        own = start("own", checkout, again)
        print(f"these with Scrapy's own server: {count(own['outcomes'])}")
    problems = [
        *judge(own["outcomes"], ours["outcomes"]),
        *(f"server error: {error}" for error in ours["errors"]),
    ]
    if problems:
        print(ours["output"])
    return problems


def main() -> int:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    needed = f"{RELEASE} needs Python {oldest} or newer" if sys.version_info < OLDEST_PYTHON else ""
    return run_suite_of("Scrapy", needed, run, obtain, verify)


if __name__ == "__main__":
    sys.exit(main())
