"""What real clients make of each fault: the exception that they raise, or their exit status.

Prints the matrix, and fails where a client sees something else: a reset that looks like a close, or
a body that is cut and looks whole.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import os
import pathlib
import subprocess
import sys
import urllib.request
from collections.abc import Callable

import aiohttp
import httpx
import requests

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
    return httpx.get(url, timeout=timeout).content


def fetch_by_aiohttp(url: str, timeout: float) -> bytes:
    async def fetch() -> bytes:
        limit = aiohttp.ClientTimeout(sock_read=timeout)
        async with aiohttp.ClientSession(timeout=limit) as session, session.get(url) as answer:
            return await answer.read()

    return asyncio.run(fetch())


def fetch_by_curl(url: str, timeout: float) -> bytes:
    command = ["curl", "--silent", "--max-time", f"{timeout}", url]
    return subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout


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


def main() -> int:
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
    print(f"rows: {2 * len(EXPECTED)}, wrong: {failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
