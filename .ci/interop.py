"""What real clients make of each fault, and of HTTPS where every host is the server.

Prints both matrices, and fails where a client sees something else: a reset that looks like a close,
a body that is cut and looks whole, a bad certificate that is accepted or called by another name.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import http.client
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import aiohttp
import feedparser
import httpx
import requests
import urllib3

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from feedtestserver import FeedTestServer, Response  # noqa: E402

os.environ["no_proxy"] = "*"  # a proxy for the outer world is not for these fetches
BODY = bytes(range(256)) * 40
PATIENCE = 30.0  # seconds; only a broken server or client takes so long
STALLED = 0.5  # seconds until a client gives up on a server that stalls


def fetch_by_urllib(url: str, timeout: float) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        body: bytes = answer.read()
        return body


def fetch_by_requests(url: str, timeout: float) -> bytes:
    return requests.get(url, timeout=timeout).content


def fetch_by_httpx(url: str, timeout: float) -> bytes:
    return httpx.get(url, follow_redirects=True, timeout=timeout).content


def fetch_by_aiohttp(url: str, timeout: float) -> bytes:
    async def fetch() -> bytes:
        limit = aiohttp.ClientTimeout(sock_read=timeout)
        async with aiohttp.ClientSession(timeout=limit) as session, session.get(url) as answer:
            return await answer.read()

    return asyncio.run(fetch())


def fetch_by_command(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout


def fetch_by_curl(url: str, timeout: float) -> bytes:
    return fetch_by_command("curl", "-sSL", "--max-time", f"{timeout}", url)


CLIENTS = {
    "urllib": fetch_by_urllib,
    "requests": fetch_by_requests,
    "httpx": fetch_by_httpx,
    "aiohttp": fetch_by_aiohttp,
    "curl": fetch_by_curl,
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


def outcome(fetch: Callable[[str, float], bytes], url: str, timeout: float) -> str:
    """What came of it: an exception, with RST where it speaks of one, or an exit status."""
    try:
        body = fetch(url, timeout)
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
    with FeedTestServer(HERE / "data") as server:
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


def get_by_http_client(url: str) -> bytes:
    parts = urllib.parse.urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    connection = kinds[parts.scheme](parts.netloc, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        if answer.status in (301, 302):
            return get_by_http_client(answer.headers["Location"])
        return answer.read()


def get_by_urllib3(url: str) -> bytes:
    with urllib3.PoolManager(retries=urllib3.Retry(3, connect=0, other=0)) as pool:
        return pool.request("GET", url, timeout=PATIENCE).data


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


def get_by_wget(url: str) -> bytes:
    return fetch_by_command("wget", "-nv", "-O-", url)


def get_by_child(url: str) -> bytes:
    code = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
    return fetch_by_command(sys.executable, "-c", code, url)


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


GETTERS = {
    **{name: functools.partial(fetch, timeout=PATIENCE) for name, fetch in CLIENTS.items()},
    "http.client": get_by_http_client,
    "urllib3": get_by_urllib3,
    "requests send()": get_by_requests_send,
    "httpx, early": get_by_early_httpx,
    "httpx async": get_by_async_httpx,
    "httpx direct": get_by_direct_httpx,
    "feedparser": get_by_feedparser,
    "a child": get_by_child,
    "wget": get_by_wget,
    "newsboat": get_by_newsboat,
}

#: What a client says of a certificate: Python's words, OpenSSL's, GnuTLS's, curl's.
WORDS = {
    "expired": "expired",
    "not-yet-valid": "not yet valid|not yet activated",
    "wrong-host": "[Hh]ostname mismatch|doesn't match|does not match|no alternative certificate",
    "self-signed": "self.signed|known issuer|unknown CA|verification failed",
    "unknown": "unable to get local issuer|known issuer|verification failed",
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
                if client in ("wget", "newsboat") and not shutil.which(client):
                    print(row.format(client, "is not here", *[""] * (len(rows) - 1)))
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


def main() -> int:
    return 1 if check_faults() + check_hosts() else 0


if __name__ == "__main__":
    sys.exit(main())
