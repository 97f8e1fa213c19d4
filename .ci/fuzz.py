"""Sends and parses 25,000 things that are hardly right, and looks for what is not documented.

Connections that begin with anything, while handshakes go all ways and the server is down now and
then; whole requests of odd parts, to which there must be well-formed answers, and for which the
command line must print objects; fixtures, of which there are directives or a DirectiveError; and
inputs of up to half a megabyte that cost twice as much where they are twice as long. The seed is
printed; give it as the argument to have the same again.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import itertools
import json
import logging
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from soak import state  # noqa: E402

from feedtestserver import (  # noqa: E402
    DirectiveError,
    FeedTestServer,
    Response,
    audit,
    parse_directives,
    stop_server,
)
from test_feedtestserver import Answer, hello_for, run_at_once  # noqa: E402

CONNECTIONS, REQUESTS, COMMANDS, FIXTURES = 4_000, 6_000, 1_000, 14_000
CLIENTS = 8
PATIENCE = 30.0  # seconds; only a broken server makes a client wait for it

# What connections begin with

HELLO = hello_for("example.com")
TUNNEL = b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"
BEGINNINGS = [
    HELLO,
    TUNNEL,
    TUNNEL + HELLO,
    TUNNEL + b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n",
    TUNNEL.replace(b"example.com", b"unknown.example") + HELLO,
    TUNNEL.replace(b"example.com", b"refused.example"),
    b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\nGET /pause HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://example.com/feed.xml HTTP/1.1\r\nHost: example.com\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
]

#: How the next handshakes may go; for one that stalls a client would wait too long.
TLS = {
    "handshake": ["complete", "complete", "reset", "close"],
    "client_certificates": ["none", "optional", "required"],
    "certificate": ["valid", "expired", "self-signed"],
}


def beginning(chance: random.Random) -> bytes:
    """Random bytes, or one of these with some bytes changed, cut anywhere."""
    if chance.random() < 0.2:
        return chance.randbytes(chance.randrange(1, 200))
    sent = bytearray(chance.choice(BEGINNINGS))
    for _ in range(chance.randrange(6)):
        sent[chance.randrange(len(sent))] = chance.randrange(256)
    return bytes(sent[: chance.randrange(1, len(sent) + 1)])


def begin(server: FeedTestServer, chance: random.Random) -> None:
    for name, values in TLS.items():
        setattr(server, name, chance.choice(values))
    with contextlib.suppress(ConnectionError):  # where the server is down
        send(server, beginning(chance))


# Whole requests, each part of which may be right

METHODS = ["GET", "HEAD", "POST", "OPTIONS", "BREW", "get", "G\u00e9T", ""]
TARGETS = [
    *("/feed.xml", "/early.xml", "/stream", "/pause", "/", "/none", "http://example.com/feed.xml"),
    *("http://unknown.example/", "*", "//", "/%", "/%zz", "/?q=%00"),
    *("http://", "http://a:99999/", "https://[::1]/", "ftp://a/", "a:80", "/a b", "/" * 20_000),
]
VERSIONS = ["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/1.", "http/1.1", "HTTP/11", ""]
NAMES = [
    *("Host", "Content-Length", "Transfer-Encoding", "Connection", "Expect", "Range", "If-Range"),
    *("If-None-Match", "If-Match", "If-Modified-Since", "If-Unmodified-Since", "X", "X", "X"),
    *("", " X", "X ", "X\0", "h\u00f6st"),
]
VALUES = [
    *("a", "example.com", "a,b", "", "0", "5", "05", "-1", "5,5", "5, 6", "9" * 30, "chunked"),
    *("gzip, chunked", "chunked, chunked", "close", "keep-alive", "100-continue", "bytes=0-1"),
    *("bytes=-5", "bytes=99-", "bytes=1-0", "bytes=0-1,3-4", "pages=1", '"v1"', 'W/"v1"', "*"),
    *("Sat, 07 Mar 2009 10:00:00 GMT", "yesterday", '"', "\0", "\x7f", "caf\u00e9", "x" * 17_000),
]
BODIES = [
    "",
    "",
    "hello",
    "5\r\nhello\r\n0\r\n\r\n",
    "5;a=b\r\nhello\r\n0\r\nT: 1\r\n\r\n",
    "z\r\n",
]
ENDS = ["\r\n"] * 12 + ["\n", "\r", "\r\n "]
#: Those of the reader, those that a fixture's validators lead to, and an unknown host's.
STATUSES = {200, 204, 206, 304, 400, 404, 405, 412, 413, 414, 416, 417, 431, 501, 502, 505}


def whole_request(chance: random.Random) -> bytes:
    lines = [f"{chance.choice(METHODS[:3])} {chance.choice(TARGETS[:8])} HTTP/1.1", "Host: a"]
    if chance.random() < 0.3:
        parts = chance.choice(METHODS), chance.choice(TARGETS), chance.choice(VERSIONS)
        lines = [" ".join(parts)]
    for _ in range(chance.choice([0, 1, 1, 2, 2, 3, 300])):
        lines.append(f"{chance.choice(NAMES)}: {chance.choice(VALUES)}")
    text = chance.choice(ENDS).join([*lines, "", ""]) + chance.choice(BODIES)
    return text.encode("latin-1")


def ask(server: Reached, chance: random.Random) -> None:
    """Send a request; what comes must be answers, as HTTP knows them, with known statuses."""
    sent = whole_request(chance)
    received = send(server, sent)
    try:
        method = "HEAD" if sent.startswith(b"HEAD ") else "GET"
        while received:
            answer = Answer(received, method)
            assert answer.status in STATUSES, answer.status
            if answer.headers["Connection"] == "close":
                break  # where it refuses what it cannot read, it does not know that this is a HEAD
            received, method = answer.rest, "GET"
    except Exception as error:
        raise AssertionError(f"{sent[:500]!r} was answered by {received[:500]!r}") from error


# The server that is sent all that


class Reached(Protocol):
    """A server in this process, or that of the command line."""

    port: int


def send(server: Reached, sent: bytes) -> bytes:
    """Send it, say that this is all, and read what comes to its end."""
    received = bytearray()
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        with contextlib.suppress(OSError):  # it may have been reset
            connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(65536):
            received += data
    return bytes(received)


def send_many(
    server: Any, what: Callable[[Any, random.Random], None], number: int, seed: int
) -> list[str]:
    """Do it that many times, by several clients at once; returns what went wrong."""
    wrong = []

    def run(client: int) -> None:
        chance = random.Random(seed + client)
        try:
            for _ in range(number // CLIENTS):
                what(server, chance)
        except BaseException as error:
            wrong.append(f"{what.__name__}: {error!r}")

    run_at_once([functools.partial(run, client) for client in range(CLIENTS)])
    return wrong


def port_of_no_client() -> int:
    """A free port that systems do not give to clients: one could take it while it is down."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def down_now_and_then(server: FeedTestServer) -> Iterator[None]:
    done = threading.Event()

    def take_down() -> None:
        while not done.wait(0.1):
            with server.down():
                pass

    thread = threading.Thread(target=take_down)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def settle(most: int) -> int:
    """How many descriptors there are once the server has ended its connections."""
    deadline = time.monotonic() + PATIENCE
    while (found := state()["descriptors"]) > most and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def is_alive(server: FeedTestServer) -> bool:
    server.respond("https://example.com/alive", b"alive")
    with urllib.request.urlopen("https://example.com/alive", timeout=PATIENCE) as answer:
        return bool(answer.read() == b"alive")


FEED = b"""<!--
Header: ETag: "v1"
Header: Last-Modified: Sat, 07 Mar 2009 10:00:00 GMT
-->
<rss/>"""
EARLY = b"<!-- Status: 413\nEarly: yes -->"


def fuzz_the_server(seed: int) -> list[str]:
    """What was wrong, which should be nothing."""
    before, said, findings = state(), io.StringIO(), 0
    with tempfile.TemporaryDirectory() as folder:
        # What is asked for is mostly on the host a.
        files = {"feed.xml": FEED, "a/feed.xml": FEED, "a/early.xml": EARLY}
        files["example.com/feed.xml"] = FEED
        for name, data in files.items():
            path = pathlib.Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        with (
            contextlib.redirect_stderr(said),
            FeedTestServer(folder, port=port_of_no_client()) as server,
            server.intercept(),
        ):
            server.respond("http://a/stream", lambda request: Response([b"one", b"two"]))
            server.respond(
                "http://a/pause", Response(b"one", pause=[".001 at headers", ".001 at 1"])
            )
            server.resolve("unknown.example", "unknown")
            server.resolve("refused.example", "refused")
            with down_now_and_then(server):
                wrong = send_many(server, begin, CONNECTIONS, seed)
            for name, values in TLS.items():
                setattr(server, name, values[0])
            wrong += send_many(server, ask, REQUESTS, seed)
            left = settle(before["descriptors"] + CLIENTS) - before["descriptors"]
            wrong += unexpected(server.errors)
            try:  # which looks at whatever was sent
                findings = len(audit(server.requests, every=3600))
            except Exception as error:
                wrong.append(f"audit(): {error!r}")
            server.clear()
            if not is_alive(server):
                wrong.append("it does not answer any more")
    after = state()
    grown = after.pop("KiB", 0) - before.pop("KiB", 0)
    print(f"{CONNECTIONS} connections and {REQUESTS} requests: before {before}, after {after},")
    print(f"memory {grown:+} KiB, descriptors of the running server {left}, findings {findings}")
    if before != after or left > CLIENTS:
        wrong.append("something is left")
    return wrong + said.getvalue().splitlines()


def fuzz_the_command_line(seed: int) -> list[str]:
    """What was wrong with what it prints: an object a line, whatever it was sent."""
    command = [sys.executable, "-W", "error", "-m", "feedtestserver", str(HERE / "data")]
    with (
        tempfile.TemporaryFile("w+") as err,
        subprocess.Popen(
            [*command, "--port", "0", "--json"], cwd=HERE, stdout=subprocess.PIPE, stderr=err
        ) as process,
    ):
        assert process.stdout
        lines = [process.stdout.readline()]
        port = int(json.loads(lines[0])["url"].rstrip("/").rpartition(":")[2])
        reading = threading.Thread(target=lines.extend, args=[process.stdout])
        reading.start()
        wrong = send_many(types.SimpleNamespace(port=port), ask, COMMANDS, seed)
        stop_server(port)
        reading.join()
        status = process.wait(PATIENCE)
        err.seek(0)
        wrong += err.read().splitlines()
    printed = [*map(json.loads, lines)]
    kinds = collections.Counter(itertools.chain.from_iterable(printed))
    print(f"the command line ended with {status}, and printed {dict(kinds)}")
    if status or kinds["request"] < COMMANDS / 2:
        wrong.append("the command line failed, or has not printed all requests")
    return wrong + unexpected(each["error"] for each in printed if "error" in each)


def unexpected(errors: Iterable[str]) -> list[str]:
    return [error for error in errors if "no such host here" not in error]


# Fixtures

PIECES = [
    *("<!--", "-->", "--", "<![CDATA[", "]]>", "<?xml version='1.0' encoding='utf-8'?>", "<rss>"),
    *("\n", "\n", "\n", "\r\n", "\r", " ", "\t", "\n ", "\n\t", ":", ": ", "\0", "\x7f", "\x85"),
    *("Header", "Status", "Without", "Ignore", "Compress", "Chunked", "Delay", "Rate", "Fault"),
    *("Template", "Pause", "Early", "Next", "Stauts", "header", "Headers", "Description", "Expect"),
    *(
        "caf\u00e9",
        "\u2028",
        "\U0001f600",
        "Status: 404",
        "Header: ETag: x",
        "Rate: 10",
        "Chunked: 9",
    ),
    *("Fault: reset at 50%", "Fault: stall at end", "Delay: .5", "Pause: 1 at 10", "Early: yes"),
    *("Next: a.json", "after", " after 2", "200", "99", "1e3", "-1", "gzip", "yes", "at 50%"),
    *("close", "{{host}}", "{{"),
    "x" * 5000,
]
CODECS = ["utf-8", "utf-8", "latin-1", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le", "cp037"]


def fixture(chance: random.Random) -> bytes:
    text = "".join(chance.choice(PIECES) for _ in range(chance.randrange(40)))
    if chance.random() < 0.7:
        text = f"<!--\n{text}\n-->"
    data = bytearray(text.encode(chance.choice(CODECS), "replace"))
    for _ in range(chance.choice([0, 0, 0, 1, 5]) if data else 0):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def fuzz_directives(seed: int) -> list[str]:
    """Read fixtures, and every tenth of them as a sidecar, which holds no prose."""
    chance, wrong, refused = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "a.json")
        file.touch()
        sidecar = pathlib.Path(f"{file}.headers")
        [served] = FeedTestServer(folder).fixtures("a.json")
        for number in range(FIXTURES):
            data = fixture(chance)
            try:
                if number % 10:
                    directives = parse_directives(data, "feed.xml")
                else:
                    sidecar.write_bytes(data)
                    directives = served.directives
                response = Response(b"", **directives.arguments)
                for name, value in (*response.headers, ("", response.reason or "")):
                    assert not {"\r", "\n", "\0"} & {*name, *value}, f"{name}: {value}"
            except DirectiveError as error:
                refused += 1
                if "\n" in str(error) or len(str(error)) > 500 or not 0 < error.line <= len(data):
                    wrong.append(f"{data[:500]!r}: {error}")
            except Exception as error:
                wrong.append(f"{data[:500]!r}: {error!r}")
    print(f"{FIXTURES} fixtures, of which {refused} have a wrong line")
    return wrong


# What may cost no more than its length

SIZE = 500_000
TRIES = 5  # the processor's clock rate may change while it is measured
#: What stands before, again and again in the middle, and at the end.
COMMENTS = [
    ("", "<!--", ""),
    ("", "<![CDATA[", ""),
    ("", "<!-- -->", ""),
    ("<!--", "\n", "-->"),
    ("<!--", "\r", "-->"),
    ("<!--", " ", ": 1-->"),
    ("<!--\n", " \t", "\n-->"),
    ("<!--A: 1\n", " x\n", "-->"),
    ("<!--", "a", ": 1-->"),
    ("<!--", "Header: X: 1\n", "-->"),
    ("<!--", "Status: x\n", "-->"),
    ("<!--", "Vary: x\n", "-->"),
    ("<!--", "Headr", ": 1-->"),
    ("<!--", "Stat", "-->"),
    ("<!--", "a:\n", "-->"),
    ("<!--Header: X: ", "\t", "\x01-->"),
    ("<!--Delay: ", "1", "x-->"),
    ("<!--Fault: ", "reset ", "-->"),
    ("<!--Next: a", " \t", "b-->"),
    ("<!--Next: a", " after", " 2 x-->"),
    ("<!--Status: 200 ", " ", "\x7f-->"),
    ("<!--Header: X: ", "{{host}}", "-->"),
    ("<?xml ", "encoding=", ""),
    ("", "--", ""),
]
HEAD = "POST / HTTP/1.1\r\nHost: a\r\n"
MESSAGES = [
    (HEAD, "a:\r\n", "\r\n"),
    (HEAD, "a", ": 1\r\n\r\n"),
    (HEAD, " ", "\r\n\r\n"),
    ("", "\r\n", "GET / HTTP/1.0\r\n\r\n"),
    ("GET /", "x", " HTTP/1.1\r\n\r\n"),
    ("GET /", "%2e/", " HTTP/1.1\r\n\r\n"),
    (f"{HEAD}Transfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n", "0\r\n\r\n"),
    (f"{HEAD}Transfer-Encoding: chunked\r\n\r\n1", ";a", "\r\nx\r\n0\r\n\r\n"),
    (f"{HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\n", "a: 1\r\n", "\r\n"),
    (f"{HEAD}Content-Length: {SIZE}\r\n\r\n", "x", ""),
    ("", "GET /status/404.xml HTTP/1.1\r\nHost: a\r\n\r\n", ""),
]


def cost(take: Callable[[bytes], object], parts: tuple[str, str, str], size: int) -> float:
    """Seconds of this process's own time."""
    before, again, after = (part.encode() for part in parts)
    data = before + again * (size // len(again)) + after
    begun = time.process_time()
    with contextlib.suppress(DirectiveError):
        take(data)
    return time.process_time() - begun


def check_costs() -> list[str]:
    """Quadratic is what takes four times as long where it is twice as long."""
    wrong, most = [], 0.0
    with FeedTestServer(HERE / "data") as server:
        rows: list[tuple[Callable[[bytes], object], tuple[str, str, str]]] = [
            *((parse_directives, parts) for parts in COMMENTS),
            *((lambda data: send(server, data), parts) for parts in MESSAGES),
        ]
        for take, parts in rows:
            for _ in range(TRIES):
                half, whole = (cost(take, parts, size) for size in (SIZE // 2, SIZE))
                most = max(most, whole)
                if whole <= max(0.2, 3 * half):
                    break
            else:
                wrong.append(f"{parts}: {half:.2f} s for the half, {whole:.2f} s for {SIZE} bytes")
    print(f"{len(rows)} kinds of {SIZE} bytes: {most:.2f} s at most, quadratic: {len(wrong)}")
    return wrong


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(2**32)
    print(f"seed {seed}", flush=True)
    logging.getLogger("feedtestserver").disabled = True
    wrong = [*fuzz_the_server(seed), *fuzz_the_command_line(seed)]
    wrong += [*fuzz_directives(seed), *check_costs()]
    print(*wrong[:20], f"wrong: {len(wrong)}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
