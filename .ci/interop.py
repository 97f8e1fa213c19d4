"""What real clients and real test runners make of the server.

Prints what each client sees of each fault, of every host inside of intercept(), and of fixtures by
each way; then the runners, and the tables that the README shows. Fails where one sees something
else: a reset that looks like a close, a body that is cut and looks whole, a bad certificate that is
accepted, a coding that nobody can undo, a failure that a runner does not tell.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import errno
import functools
import http.client
import io
import json
import os
import pathlib
import re
import shutil
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import aiohttp
import feedparser
import httpx
import requests
import runners
import urllib3

try:
    import pycurl
except ImportError:  # there is not a wheel for every Python
    pycurl = None

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from feedtestserver import FeedTestServer, Response  # noqa: E402

os.environ["no_proxy"] = "*"  # a proxy for the outer world is not for these fetches
DATA = HERE / "data"
BODY = bytes(range(256)) * 40
PATIENCE = 30.0  # seconds; only a broken server or client takes so long
STALLED = 0.5  # seconds until a client gives up on a server that stalls

# The clients: each follows redirects, and gives the status and the body without its coding


class Want(NamedTuple):
    """What to fetch; without a ``ca_file`` the client trusts whom it trusts by itself."""

    url: str
    ca_file: str | None = None
    fields: Mapping[str, str] = {}
    timeout: float = PATIENCE

    @property
    def context(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=self.ca_file) if self.ca_file else None


class Answer(NamedTuple):
    status: int
    body: bytes


def decoded(coding: str | None, body: bytes) -> bytes:
    """What urllib and http.client leave to whoever uses them."""
    return zlib.decompress(body, wbits=47) if coding in ("gzip", "deflate") else body


def by_urllib(want: Want) -> Answer:
    request = urllib.request.Request(want.url, headers=dict(want.fields))
    try:
        found = urllib.request.urlopen(request, timeout=want.timeout, context=want.context)
    except urllib.error.HTTPError as error:
        found = error
    with found:
        return Answer(found.code, decoded(found.headers["Content-Encoding"], found.read()))


def by_http_client(want: Want) -> Answer:
    parts = urllib.parse.urlsplit(want.url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=want.timeout)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.netloc, timeout=want.timeout, context=want.context
        )
    with contextlib.closing(connection):
        connection.request("GET", parts.path, headers=dict(want.fields))
        found = connection.getresponse()
        location = found.headers["Location"]
        if location:
            return by_http_client(want._replace(url=urllib.parse.urljoin(want.url, location)))
        return Answer(found.status, decoded(found.headers["Content-Encoding"], found.read()))


def by_requests(want: Want) -> Answer:
    found = requests.get(
        want.url, headers=want.fields, timeout=want.timeout, verify=want.ca_file or True
    )
    return Answer(found.status_code, found.content)


def by_urllib3(want: Want) -> Answer:
    retries = urllib3.Retry(3, connect=0, other=0)
    with urllib3.PoolManager(retries=retries, ca_certs=want.ca_file) as pool:
        found = pool.request("GET", want.url, headers=want.fields, timeout=want.timeout)
        return Answer(found.status, found.data)


def by_httpx(want: Want) -> Answer:
    found = httpx.get(
        want.url,
        headers=want.fields,
        follow_redirects=True,
        timeout=want.timeout,
        verify=want.context or True,
    )
    return Answer(found.status_code, found.content)


def by_aiohttp(want: Want) -> Answer:
    async def fetch() -> Answer:
        options = {"headers": want.fields, "ssl": want.context or True}
        limit = aiohttp.ClientTimeout(sock_read=want.timeout)
        session = aiohttp.ClientSession(timeout=limit)
        async with session, session.get(want.url, **options) as found:
            return Answer(found.status, await found.read())

    return asyncio.run(fetch())


def by_pycurl(want: Want) -> Answer:
    """By itself it goes to the proxy of the environment, but trusts only whom it is told."""
    body = io.BytesIO()
    with contextlib.closing(pycurl.Curl()) as curl:
        options = {
            pycurl.URL: want.url,
            pycurl.HTTPHEADER: [f"{name}: {value}" for name, value in want.fields.items()],
            pycurl.FOLLOWLOCATION: 1,
            pycurl.ACCEPT_ENCODING: "",
            pycurl.TIMEOUT_MS: int(want.timeout * 1000),
            pycurl.NOSIGNAL: 1,
            pycurl.WRITEFUNCTION: body.write,
        }
        for option, value in options.items():
            curl.setopt(option, value)
        ca_file = want.ca_file or os.environ.get("CURL_CA_BUNDLE")
        if ca_file:
            curl.setopt(pycurl.CAINFO, ca_file)
        curl.perform()
        return Answer(curl.getinfo(pycurl.RESPONSE_CODE), body.getvalue())


def run(
    *command: str, well: Sequence[int] = (0,), **environment: str
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
    )
    if done.returncode not in well:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done


def by_curl(want: Want) -> Answer:
    options = [f"-H{name}: {value}" for name, value in want.fields.items()]
    options += ["--cacert", want.ca_file] if want.ca_file else []
    status = ["-w", "%{stderr}%{http_code}"]
    limit = ["--max-time", f"{want.timeout}"]
    done = run("curl", "-sSL", "--compressed", *limit, *status, *options, want.url)
    return Answer(int(done.stderr), done.stdout)


def by_wget(want: Want) -> Answer:
    options = [f"--header={name}: {value}" for name, value in want.fields.items()]
    options += [f"--ca-certificate={want.ca_file}"] if want.ca_file else []
    limit = ["--tries=1", f"--timeout={want.timeout}"]
    # It would wait for the content of a 304, which has none, until the connection ends.
    shown = ["-nv", "-S", "--compression=auto", "--content-on-error", "--no-http-keep-alive", "-O-"]
    done = run("wget", *shown, *limit, *options, want.url, well=(0, 8))  # 8 is for 304 and 404
    statuses = re.findall(rb"^ +HTTP/1\.[01] (\d+)", done.stderr, re.MULTILINE)
    return Answer(int(statuses[-1]), done.stdout)


NODE = """
const fetchOne = async ([url, headers]) => {
    try {
        const found = await fetch(url, {headers});
        const body = Buffer.from(await found.arrayBuffer());
        return [found.status, body.toString("base64")];
    } catch (error) {
        return [0, btoa(`${error} ${error.cause?.code} ${error.cause?.message}`)];
    }
};
Promise.all(JSON.parse(process.argv[1]).map(fetchOne)).then((found) => {
    process.stdout.write(JSON.stringify(found), () => process.exit());
});
"""
#: What Chromium shows. A request that keeps the page waiting is all that --dump-dom waits for.
PAGE = """<!doctype html><pre></pre><script>
const fetchOne = ([url, fields]) => {
    const request = new XMLHttpRequest();
    request.open("GET", url, false);
    request.overrideMimeType("text/plain; charset=x-user-defined");
    for (const [name, value] of Object.entries(fields)) request.setRequestHeader(name, value);
    try {
        request.send();
    } catch (error) {
        return [0, btoa(`${error}`)];
    }
    const bytes = request.responseText.replace(/[^]/g, (letter) =>
        String.fromCharCode(letter.charCodeAt(0) & 255));
    return [request.status, btoa(bytes)];
};
const wants = JSON.parse(decodeURIComponent(location.hash.slice(1)));
document.querySelector("pre").textContent = JSON.stringify(wants.map(fetchOne));
</script>
"""


def to_json(wants: Sequence[Want]) -> str:
    return json.dumps([(want.url, want.fields) for want in wants])


def from_json(found: bytes) -> list[Answer]:
    return [Answer(status, base64.b64decode(body)) for status, body in json.loads(found)]


def all_by_node(wants: Sequence[Want]) -> list[Answer]:
    ca_file = wants[0].ca_file
    variables = {"NODE_EXTRA_CA_CERTS": ca_file} if ca_file else {}
    return from_json(run("node", "-e", NODE, to_json(wants), **variables).stdout)


def all_by_chromium(wants: Sequence[Want]) -> list[Answer]:
    """By a page of the same host, in a home of its own, where the CA is imported."""
    ca_file = wants[0].ca_file or os.environ.get("SSL_CERT_FILE")
    proxy = os.environ.get("http_proxy") if "127.0.0.1" not in wants[0].url else None
    page = urllib.parse.urljoin(wants[0].url, "/page.html")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        store = pathlib.Path(home, ".pki/nssdb")
        store.mkdir(parents=True)
        run("certutil", "-d", f"sql:{store}", "-N", "--empty-password")
        if ca_file:
            trusted = ["-A", "-t", "C,,", "-n", "feedtestserver", "-i", ca_file]
            run("certutil", "-d", f"sql:{store}", *trusted)
        shown = run(
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--disable-background-networking", f"--user-data-dir={home}/profile"),
            f"--timeout={PATIENCE * 1000:.0f}",
            *([f"--proxy-server={proxy}"] if proxy else ["--no-proxy-server"]),
            f"{page}#{urllib.parse.quote(to_json(wants))}",
            HOME=home,
        ).stdout
    found = re.search(rb"<pre>(.+)</pre>", shown)
    if not found:
        raise OSError(f"the page was not shown: {shown[-200:]!r}")
    return from_json(found.group(1))


def by_node(want: Want) -> Answer:
    [answer] = all_by_node([want])
    if not answer.status:
        raise OSError(answer.body.decode())
    return answer


def node_obeys_the_proxy() -> bool:
    """Whether this Node knows NODE_USE_ENV_PROXY."""
    version = tuple(map(int, run("node", "-p", "process.versions.node").stdout.split(b".")))
    return version >= (24,) or (22, 21) <= version < (23,)


# Faults

CLIENTS = {
    "urllib": by_urllib,
    "requests": by_requests,
    "httpx": by_httpx,
    "aiohttp": by_aiohttp,
    "curl": by_curl,
}

NO_ANSWER = (
    "RemoteDisconnected",
    "ConnectionError",
    "RemoteProtocolError",
    "ServerDisconnectedError",
    "52",
)
CUT = "IncompleteRead", "ChunkedEncodingError", "RemoteProtocolError", "ClientPayloadError", "18"
RESET = (
    "ConnectionResetError RST",
    "ConnectionError RST",
    "ReadError RST",
    "ClientOSError RST",
    "56",
)
CUT_BY_RESET = (
    *("ConnectionResetError RST", "ChunkedEncodingError RST", "ReadError RST"),
    *("ClientPayloadError RST", "56"),
)
NO_MORE = "TimeoutError", "ConnectionError", "ReadTimeout", "SocketTimeoutError", "28"
NOTHING = "TimeoutError", "ReadTimeout", "ReadTimeout", "SocketTimeoutError", "28"
WHOLE = ("whole",) * 5

#: What each client is to see of a fault, with a Content-Length and in chunks.
EXPECTED = {
    "close": (NO_ANSWER, NO_ANSWER),
    "reset": (RESET, RESET),
    "stall": (NOTHING, NOTHING),
    "close at headers": (CUT, CUT),
    "reset at headers": (CUT_BY_RESET, CUT_BY_RESET),
    "stall at headers": (NO_MORE, NO_MORE),
    "close at 1000": (CUT, CUT),
    "reset at 1000": (CUT_BY_RESET, CUT_BY_RESET),
    "stall at 1000": (NO_MORE, NO_MORE),
    "close at 50%": (CUT, CUT),
    "reset at 50%": (CUT_BY_RESET, CUT_BY_RESET),
    "stall at 50%": (NO_MORE, NO_MORE),
    "close at 100%": (WHOLE, CUT),
    "reset at 100%": (WHOLE, CUT_BY_RESET),
    "stall at 100%": (WHOLE, NO_MORE),
}


def outcome(fetch: Callable[[Want], Answer], url: str, timeout: float) -> str:
    """What came of it: an exception, with RST where it speaks of one, or an exit status."""
    try:
        body = fetch(Want(url, timeout=timeout)).body
    except subprocess.CalledProcessError as error:
        return f"{error.returncode}"
    except Exception as error:
        name = {"timeout": "TimeoutError"}.get(type(error).__name__, type(error).__name__)
        return f"{name} RST" if os.strerror(errno.ECONNRESET) in f"{error!r}" else name
    return "whole" if body == BODY else f"{len(body)} bytes"


def outcomes_of_all(url: str, timeout: float) -> tuple[str, ...]:
    """What came of it for each client; all at once, since stalls take their time."""
    with concurrent.futures.ThreadPoolExecutor(len(CLIENTS)) as pool:
        return tuple(pool.map(lambda fetch: outcome(fetch, url, timeout), CLIENTS.values()))


def check_faults() -> int:
    """The number of rows that are wrong."""
    failures = 0
    row = "{:18} {:8}" + " {:25}" * len(CLIENTS)
    print(row.format("Fault", "framing", *CLIENTS))
    with FeedTestServer(DATA) as server:
        for fault, outcomes in EXPECTED.items():
            for framing, chunked, expected in zip(("length", "chunks"), (None, 100), outcomes):
                server.respond("/feed.xml", Response(BODY, fault=fault, chunked=chunked))
                stalls = "stall" in fault and expected != WHOLE
                timeout = STALLED if stalls else PATIENCE
                seen = outcomes_of_all(server.get_url("feed.xml"), timeout)
                print(row.format(fault, framing, *seen), flush=True)
                if seen != expected:
                    print(row.format("", "expected", *expected))
                    failures += 1
    print(f"rows: {2 * len(EXPECTED)}, wrong: {failures}\n")
    return failures


# Every host: what is fetched in the same words whatever the client, by a URL that is nowhere

SITE = {
    "example.com/feed.xml": b"<rss version='2.0'><channel><title>News</title></channel></rss>",
    "example.com/old.xml": b"<!--\nStatus: 301\nHeader: Location: http://example.org/old.xml\n-->",
    "example.org/old.xml": b"<!--\nStatus: 302\nHeader: Location: https://example.com/feed.xml\n-->",
}
#: Made before any server: it knows of no proxy, and of no CA but those of the system.
EARLY = httpx.Client(follow_redirects=True)


def get_by_requests_send(url: str) -> bytes:
    """As the reader library does: send() asks neither for proxies nor for REQUESTS_CA_BUNDLE."""
    with requests.Session() as session:
        request = session.prepare_request(requests.Request("GET", url))
        return session.send(request, timeout=PATIENCE).content


def get_by_early_httpx(url: str) -> bytes:
    return EARLY.get(url, headers={"Connection": "close"}, timeout=PATIENCE).content


def get_by_async_httpx(url: str, **options: bool) -> bytes:
    async def fetch() -> bytes:
        async with httpx.AsyncClient(follow_redirects=True, **options) as client:
            return (await client.get(url, timeout=PATIENCE)).content

    return asyncio.run(fetch())


def get_by_direct_httpx(url: str) -> bytes:
    """Without the environment: anyio asks for an address, and takes the port of the URL."""
    return get_by_async_httpx(url, trust_env=False)


def get_by_feedparser(url: str) -> bytes:
    feed = feedparser.parse(url)
    if "title" not in feed.feed:
        raise feed.bozo_exception
    return f"<title>{feed.feed.title}</title>".encode()


def get_by_child(url: str) -> bytes:
    code = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
    return run(sys.executable, "-c", code, url).stdout


def get_by_newsboat(url: str) -> bytes:
    with tempfile.TemporaryDirectory() as home:
        folder = pathlib.Path(home)
        (folder / "urls").write_text(f"{url}\n")
        (folder / "config").write_text("error-log error.txt\n")
        files = ["-u", "urls", "-C", "config", "-c", "cache.db"]
        subprocess.run(
            ["newsboat", *files, "-l", "3", "-d", "log.txt", "-x", "reload"],
            cwd=home,
            env={**os.environ, "HOME": home},
            check=True,
            capture_output=True,
            timeout=PATIENCE,
        )
        with contextlib.closing(sqlite3.connect(folder / "cache.db")) as cache:
            titles = [title for (title,) in cache.execute("SELECT title FROM rss_feed")]
        if not any(titles):
            raise OSError((folder / "log.txt").read_text(errors="replace"))
    return f"<title>{titles[0]}</title>".encode()


def body_by(fetch: Callable[[Want], Answer], url: str) -> bytes:
    return fetch(Want(url)).body


GETTERS = {
    **{name: functools.partial(body_by, fetch) for name, fetch in CLIENTS.items()},
    "http.client": functools.partial(body_by, by_http_client),
    "urllib3": functools.partial(body_by, by_urllib3),
    "requests send()": get_by_requests_send,
    "httpx, early": get_by_early_httpx,
    "httpx async": get_by_async_httpx,
    "httpx direct": get_by_direct_httpx,
    "feedparser": get_by_feedparser,
    "a child": get_by_child,
    "pycurl": functools.partial(body_by, by_pycurl),
    "wget": functools.partial(body_by, by_wget),
    "Node's fetch": functools.partial(body_by, by_node),
    "newsboat": get_by_newsboat,
}


def missing(client: str) -> str:
    """Why a client cannot be asked here; empty where it can."""
    command = {"Node's fetch": "node", "Chromium": "chromium"}.get(client, client)
    needed = [command] if command in ("curl", "wget", "newsboat", "node", "chromium") else []
    needed += ["certutil"] if client == "Chromium" else []
    absent = [name for name in needed if not shutil.which(name)]
    absent += ["pycurl"] if client == "pycurl" and not pycurl else []
    return f"no {absent[0]} here" if absent else ""


#: What a client says of a certificate: Python's words, OpenSSL's, GnuTLS's, curl's, Node's.
WORDS = {
    "expired": "expired",
    "not-yet-valid": "not yet valid|not yet activated",
    "wrong-host": "[Hh]ostname mismatch|do(es not|esn't) match|no alternative cert|ALTNAME_INVALID",
    "self-signed": "self.signed|known issuer|unknown CA|verification failed",
    "unknown": "unable to (get local issuer|verify the first)|known issuer|verification failed",
}
#: All that newsboat says of any.
NOT_OK = "USERERROR: .* SSL peer certificate or SSH remote key was not OK"
FETCHED = "fetched"
FEED, MOVED = "example.com/feed.xml", "example.com/old.xml"
#: The kind of certificate, the URL, and what is to come of it.
ROWS = [
    ("valid", f"http://{FEED}", FETCHED),
    ("valid", f"https://{FEED}", FETCHED),
    ("valid", f"https://{MOVED}", FETCHED),
    *((kind, f"https://{FEED}", kind) for kind in WORDS if kind != "unknown"),
]
#: What is fetched last: the server's own URL, by who does not know its CA.
OUTSIDE = ("valid", "https://127.0.0.1", "unknown")


def seen(get: Callable[[str], bytes], url: str, expected: str) -> str:
    """What came of it: fetched, the fault of a certificate, or an error as it stands."""
    try:
        body = get(url)
    except Exception as error:
        said = f"{error!r} {error}" + (getattr(error, "stderr", None) or b"").decode()
        words = f"{WORDS[expected]}|{NOT_OK}" if expected in WORDS else None
        return expected if words and re.search(words, said) else said
    return FETCHED if b"<title>News</title>" in body else f"{body!r}"


def rows_of(server: FeedTestServer, get: Callable[[str], bytes]) -> Iterator[str]:
    """What one client sees: inside of intercept(), and of a CA that it does not know."""
    with server.intercept():
        for kind, url, expected in ROWS:
            server.certificate = kind
            yield seen(get, url, expected)
    server.certificate = "valid"
    yield seen(get, server.get_url(FEED, "https"), "unknown")


def check_hosts() -> int:
    """The number of clients that see something else than they should."""
    failures = 0
    rows = [*ROWS, OUTSIDE]
    row = "{:16}" + " {:14}" * len(rows)
    print(row.format("Certificate", *(kind for kind, _, _ in rows)))
    print(row.format("URL", *(url.split("/")[0] + url[-9:] for _, url, _ in ROWS), "its own"))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in SITE.items():
            path = pathlib.Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        with FeedTestServer(folder) as server:
            for client, get in GETTERS.items():
                reason = missing(client)
                if client == "Node's fetch" and not reason and not node_obeys_the_proxy():
                    reason = "no proxy"
                if reason:
                    print(row.format(client, reason, *[""] * (len(rows) - 1)))
                    continue
                found = list(rows_of(server, get))
                print(row.format(client, *(cell[:14] for cell in found)), flush=True)
                for cell, (kind, url, expected) in zip(found, rows):
                    if cell != expected:
                        print(f"  {kind} {url}: expected {expected}, found {cell}")
                        failures += 1
            if server.errors:
                print("the server found errors:", *server.errors, sep="\n")
                failures += 1
    print(f"clients: {len(GETTERS)}, wrong: {failures}")
    return failures


# Fixtures, by each way


class Case(NamedTuple):
    """A fixture, and what is to come of it where that is not its own body with status 200."""

    path: str
    status: int = 200
    body_of: str | None = None
    fields: Mapping[str, str] = {}


TARGET = "redirect/target.xml"
CASES = {
    "feed": Case("formats/rss20.rss"),
    **{f"{code}": Case(f"redirect/{code}.xml", 200, TARGET) for code in (301, 302, 307, 308)},
    "gzip": Case("faults/gzip.xml"),
    "deflate": Case("faults/deflate.xml"),
    "chunked": Case("faults/chunked.xml"),
    "304": Case("conditional/etag-strong.xml", 304, "", {"If-None-Match": '"v1"'}),
    "204": Case("status/204.xml", 204, ""),
    "404": Case("status/404.xml", 404),
    "410": Case("status/410.xml", 410),
    "no length": Case("headers/without-content-length.xml"),
    "UTF-8 in a field": Case("charset/utf8-header-bytes.xml"),
    "UTF-8 in the path": Case("formats/Zürich See.xml"),
    "template": Case("template/body.xml"),
    "as it is": Case("faults/status-without-reason.asis"),
    "delay": Case("faults/delay.xml"),
    "drip": Case("faults/rate.xml"),
    "large": Case("binary/large.bin"),
}
#: What is not in data/.
OTHERS = {
    "formats/Zürich See.xml": (DATA / "formats/rss20.rss").read_bytes(),
    "binary/large.bin": bytes(range(256)) * 8192,
    "page.html": PAGE.encode(),
}
HOST = "https://example.com"
Fetch = Callable[[Sequence[Want]], list[Answer]]


def one_by_one(fetch: Callable[[Want], Answer]) -> Fetch:
    """Fetch by one call each, some of them at once; an error stands in the place of a body."""

    def attempt(want: Want) -> Answer:
        try:
            return fetch(want)
        except Exception as error:
            return Answer(0, f"{error!r} {getattr(error, 'stderr', '')}".encode())

    def fetch_all(wants: Sequence[Want]) -> list[Answer]:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return list(pool.map(attempt, wants))

    return fetch_all


class Client(NamedTuple):
    """How to fetch; what the README says of intercept(), and of the CA."""

    fetch: Fetch
    intercepted: str
    note: str


ASKED = {
    "urllib": Client(one_by_one(by_urllib), "yes", "``context=server.ssl_context()``"),
    "http.client": Client(one_by_one(by_http_client), "yes", "``context=server.ssl_context()``"),
    "requests": Client(one_by_one(by_requests), "yes", "``verify=server.ca_file``"),
    "urllib3": Client(one_by_one(by_urllib3), "yes", "``ca_certs=server.ca_file``"),
    "httpx": Client(one_by_one(by_httpx), "yes", "``verify=server.ssl_context()``"),
    "aiohttp": Client(one_by_one(by_aiohttp), "yes", "``ssl=server.ssl_context()``"),
    "pycurl": Client(one_by_one(by_pycurl), "by proxy", "``CAINFO``, inside of intercept() too"),
    "curl": Client(one_by_one(by_curl), "by proxy", "``--cacert``"),
    "wget": Client(
        one_by_one(by_wget), "by proxy", "``--ca-certificate``; leaves deflate as it is"
    ),
    "Node's fetch": Client(
        all_by_node, "by proxy", "``NODE_EXTRA_CA_CERTS``; the proxy from version 24 on"
    ),
    "Chromium": Client(
        all_by_chromium, "by proxy", "``--proxy-server=URL``; ``certutil`` imports the CA"
    ),
}
#: What a client leaves to its user: wget undoes gzip alone.
LEFT = {("wget", "deflate"): functools.partial(decoded, "deflate")}


def expected(case: Case, root: str) -> Answer:
    """The file as it stands, but for what a template and .asis do to it."""
    path = case.path if case.body_of is None else case.body_of
    if not path:
        return Answer(case.status, b"")
    body = OTHERS[path] if path in OTHERS else (DATA / path).read_bytes()
    if path.endswith(".asis"):
        body = body.partition(b"\r\n\r\n")[2]
    if path.startswith("template/"):
        parts = urllib.parse.urlsplit(root)
        port = parts.port or 443
        for name, value in (("base_url", root), ("host", parts.hostname), ("port", port)):
            body = body.replace(b"{{%s}}" % name.encode(), f"{value}".encode())
    return Answer(case.status, body)


def differences(client: str, root: str, ca_file: str | None) -> dict[str, str]:
    """The cases of which a client has seen something else, with what it has seen."""
    wants = [
        Want(f"{root}/{urllib.parse.quote(case.path)}", ca_file, case.fields)
        for case in CASES.values()
    ]
    try:
        answers = ASKED[client].fetch(wants)
    except Exception as error:
        answers = [Answer(0, f"{error!r}".encode())] * len(wants)
    wrong = {}
    for (name, case), answer in zip(CASES.items(), answers):
        if (client, name) in LEFT:
            answer = answer._replace(body=LEFT[client, name](answer.body))
        if answer != expected(case, root):
            wrong[name] = f"{answer.status} {answer.body[:300]!r}"
    return wrong


def copy_fixtures(folder: pathlib.Path) -> None:
    shutil.copytree(DATA, folder)
    for path, content in OTHERS.items():
        (folder / path).write_bytes(content)


def see_all(clients: Sequence[str], root: str, ca_file: str | None) -> dict[str, dict[str, str]]:
    """The differences of each client; several at once, as they mostly wait."""
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda client: differences(client, root, ca_file), clients)
        return dict(zip(clients, found))


def see_each_way(folder: pathlib.Path, here: Sequence[str]) -> dict[str, dict[str, dict[str, str]]]:
    """The differences by way and client."""
    copy_fixtures(folder)
    copy_fixtures(folder / "example.com")
    by_proxy = [name for name in here if name != "Node's fetch" or node_obeys_the_proxy()]
    with FeedTestServer(folder) as server:
        found = {
            "plain": see_all(here, server.base_url, None),
            "HTTPS": see_all(here, server.get_url("", "https").rstrip("/"), server.ca_file),
        }
        with server.intercept():
            found["intercepted"] = see_all(by_proxy, HOST, None)
        # Whatever it is told, a browser asks its maker's hosts as well.
        errors = [error for error in server.errors if "no such host here" not in error]
        server.clear()
    if errors:
        found["intercepted"]["the server"] = dict(enumerate(errors))
    return found


def check_clients() -> int:
    """The number of cells that are wrong."""
    here = [name for name in ASKED if not missing(name)]
    with tempfile.TemporaryDirectory() as folder:
        found = see_each_way(pathlib.Path(folder, "site"), here)
    print(f"Fixtures: {', '.join(CASES)}")
    row = "{:16}" + " {:20}" * len(found)
    print(row.format("Client", *found))
    for name in ASKED:
        cells = [cell_of(seen.get(name), name in here) for seen in found.values()]
        print(row.format(name, *cells))
    wrong = {
        f"{name}, {way}, {case}": what
        for way, seen in found.items()
        for name, cases in seen.items()
        for case, what in cases.items()
    }
    for where, what in wrong.items():
        print(f"  {where}: found {what}")
    print(f"clients: {len(here)}, wrong: {len(wrong)}\n")
    print_table(
        ("Client", "Plain", "HTTPS", "Intercepted", "Its CA, and notes"),
        [
            (name, *(tick_of(name, way, seen) for way, seen in found.items()), ASKED[name].note)
            for name in ASKED
        ],
    )
    return len(wrong)


def cell_of(wrong: Mapping[str, str] | None, is_here: bool) -> str:
    """How many fixtures came as they should, or the names of those that did not."""
    if wrong is None:
        return "no proxy" if is_here else "is not here"
    return ", ".join(wrong) or f"{len(CASES)}/{len(CASES)}"


def tick_of(client: str, way: str, seen: Mapping[str, Mapping[str, str]]) -> str:
    if client not in seen:
        return "-" if missing(client) else "no proxy"
    well = ASKED[client].intercepted if way == "intercepted" else "yes"
    return "no" if seen[client] else well


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as reStructuredText has it, for the README."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    rule = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (head, *rows)
    ]
    print(rule, lines[0], rule, *lines[1:], rule, "", sep="\n", flush=True)


def check_runners() -> int:
    """The number of runners that are wrong."""
    rows, failures = runners.check()
    print_table(("Runner", "Tests", "A failing test shows"), rows)
    return failures


def main() -> int:
    return 1 if check_faults() + check_hosts() + check_clients() + check_runners() else 0


if __name__ == "__main__":
    sys.exit(main())
