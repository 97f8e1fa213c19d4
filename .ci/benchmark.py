"""Compares this server with bare sockets, http.server, and what else of its kind is installed.

Each peer lives in a process of its own, and this one is the client of those that have a port. Each
round goes from peer to peer, so that what else the machine does meets all of them. A cell has the
median of its rounds, and in parentheses how many times slower than bare sockets that is. Every
answer is compared with its file; the status is 1 where one is wrong, or a peer fails or hangs.

There are three tables. The second has many connections that stay open, under a load that comes from
wrk where it is installed, else from one more process. The third has this server alone, which holds
open connections of all kinds while somebody else asks, and is then stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import functools
import http.server
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import random
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import feedtestserver  # noqa: E402

FEED = b"<rss><channel>%s</channel></rss>" % b"".join(b"<item>%04d</item>" % n for n in range(120))
LARGE = 50_000_000  # bytes
CONNECTIONS, TESTS = 512, 1000
KEPT = (1, 16, 128, CONNECTIONS)  # connections under load
OPEN = 1000  # connections that wait
SPARE = 256  # descriptors for all else but these
FEW = 3  # rounds with more of them
TABLES = ["base", "load", "open"]
PATIENCE = 20.0  # seconds; only a broken peer makes anybody wait so long
GET = b"GET /feed.xml HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
LAST_GET = b"GET /%s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
QUIT = b"QUIT / HTTP/1.1\r\n\r\n"
URL = "http://127.0.0.1/feed.xml"  # for what has no port


class Failed(Exception):
    """A peer has answered something else than the file, or not at all."""


class Effort(NamedTuple):
    """How much is done for a cell."""

    rounds: int
    seconds: float  # for which a round repeats what it measures
    budget: float  # seconds after which there are no more rounds
    limit: float  # seconds for a run of tests; the rest of it is extrapolated
    late: float  # seconds after which a connection among many has failed
    load_rounds: int
    load: float  # seconds; wrk takes a whole one at least
    load_budget: float
    open_rounds: int  # with OPEN connections


THOROUGH = Effort(
    rounds=5, seconds=0.15, budget=1, limit=2, late=10,
    load_rounds=3, load=1, load_budget=5, open_rounds=20,
)  # fmt: skip
QUICK = Effort(
    rounds=1, seconds=0.05, budget=0, limit=0.5, late=1,
    load_rounds=1, load=0.3, load_budget=0, open_rounds=3,
)  # fmt: skip

# The client


@functools.lru_cache(maxsize=1)
def large_file() -> bytes:
    return random.Random(LARGE).randbytes(LARGE)


@functools.lru_cache(maxsize=1)
def room() -> memoryview:
    """Where a large answer goes; it has been written to, as fresh pages would cost time."""
    return memoryview(bytearray(b"-") * (LARGE + 65536))


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def check(answer: bytes | bytearray, body: bytes = FEED) -> None:
    if not answer.endswith(b"\r\n\r\n" + body):
        raise Failed(f"a wrong answer: {bytes(answer[:80])!r}...")


def get(port: int) -> bytes:
    """The whole answer for the feed, on a connection of its own."""
    answer = b""
    with connect(port) as connection:
        connection.sendall(LAST_GET % b"feed.xml")
        while more := connection.recv(65536):
            answer += more
    return answer


def get_again(connection: socket.socket) -> bytes:
    """The whole answer for the feed, on a connection that may stay open."""
    answer = b""
    connection.sendall(GET)
    while not answer.endswith(FEED) and (more := connection.recv(65536)):
        answer += more
    check(answer)
    return answer


def download(port: int) -> float:
    """Seconds until a large body has come."""
    into, length = room(), 0
    begin = time.perf_counter()
    with connect(port) as connection:
        connection.sendall(LAST_GET % b"episode.mp3")
        while more := connection.recv_into(into[length:]):
            length += more
    seconds = time.perf_counter() - begin
    check(bytes(into[:length]), large_file())
    return seconds


def advance(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> bool | None:
    """Send or read for one connection of many; at its end, whether it got an answer."""
    connection: Any = key.fileobj
    try:
        if key.events == selectors.EVENT_WRITE:
            connection.send(LAST_GET % b"feed.xml")
            selector.modify(connection, selectors.EVENT_READ, key.data)
            return None
        more = connection.recv(65536)
    except OSError:
        return False
    key.data.extend(more)
    if more:
        return None
    if key.data:
        check(key.data)
    return bool(key.data)


def get_at_once(port: int, late: float) -> list[float]:
    """Seconds until each of many connections had its answer; infinite where it never came."""
    times, begun = [], {}
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        deadline = time.perf_counter() + late
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            begun[connection.fileno()] = time.perf_counter()
            connection.connect_ex(("127.0.0.1", port))
            selector.register(connection, selectors.EVENT_WRITE, bytearray())
        while begun and (left := deadline - time.perf_counter()) > 0:
            for key, _ in selector.select(left):
                has_answer = advance(selector, key)
                if has_answer is not None:
                    selector.unregister(key.fileobj)
                    seconds = time.perf_counter() - begun.pop(key.fd)
                    times.append(seconds if has_answer else math.inf)
    return times + [math.inf] * len(begun)


def stays_open(answer: bytes) -> bool:
    head = answer.partition(b"\r\n\r\n")[0].lower()
    return not head.startswith(b"http/1.0") and b"connection: close" not in head


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[math.ceil(len(times) * share) - 1]


def rate(act: Callable[[], object], seconds: float) -> float:
    """How often in a second this can be done; it is done at least once."""
    begin = time.perf_counter()
    for count in itertools.count(1):
        act()
        if (spent := time.perf_counter() - begin) >= seconds:
            return count / spent
    raise AssertionError


# The load: as many GETs as the peer can answer, on connections that stay open


class Load(NamedTuple):
    """What has come of it; times are in seconds."""

    rate: float  # answers in a second
    p99: float
    late: int  # answers that came late
    missing: int  # connections that have ended, or had not all their answers in the end
    busy: float  # share of the time for which the client itself was at work


class Kept:
    """A connection that asks again as soon as it has an answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.answer = b""
        self.begin = 0.0
        self.count = 0

    def ask(self) -> None:
        self.begin = time.perf_counter()
        self.connection.send(GET)

    def read(self) -> float | None:
        """Seconds that an answer took, as soon as it is whole; an exception at the end."""
        more = self.connection.recv(65536)
        if not more:
            raise ConnectionResetError
        self.answer += more
        if not self.answer.endswith(FEED):
            return None
        seconds = time.perf_counter() - self.begin
        check(self.answer)
        self.answer = b""
        self.count += 1
        return seconds


def step(
    selector: selectors.BaseSelector, key: selectors.SelectorKey, is_over: bool
) -> float | None:
    """Go on with one connection of many, which is asked to end when it is over."""
    kept: Kept = key.data
    if key.events == selectors.EVENT_WRITE:
        selector.modify(kept.connection, selectors.EVENT_READ, kept)
        kept.ask()
        return None
    seconds = kept.read()
    if seconds is not None:
        if is_over and kept.count > 1:  # the first answer alone may be to one that does not stay
            selector.unregister(kept.connection)
        else:
            kept.ask()
    return seconds


def keep_busy(port: int, connections: int, seconds: float, late: float, patience: float) -> Load:
    """Load a server for some seconds, and until each connection has had two answers."""
    times: list[float] = []
    in_time, missing = 0, 0
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for _ in range(connections):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", port))
            selector.register(connection, selectors.EVENT_WRITE, Kept(connection))
        begin, worked = time.perf_counter(), time.process_time()
        end = now = begin + seconds
        while selector.get_map() and (left := end + patience - time.perf_counter()) > 0:
            ready = selector.select(left)
            is_over = (now := time.perf_counter()) >= end
            for key, _ in ready:
                try:
                    taken = step(selector, key, is_over)
                except OSError:
                    selector.unregister(key.fileobj)
                    missing += 1
                    continue
                if taken is not None:
                    times.append(taken)
                    in_time += not is_over
        busy = (time.process_time() - worked) / (now - begin)
        missing += len(selector.get_map())
    p99 = percentile(times, 0.99) if times else math.inf
    late_ones = sum(taken > late for taken in times)
    return Load(in_time / seconds if seconds else 0, p99, late_ones, missing, busy)


WRK = """
local threads = {}

function setup(thread)
   table.insert(threads, thread)
end

function init(arguments)
   local file = assert(io.open(arguments[1], "rb"))
   feed, wrong = file:read("*a"), 0
   file:close()
end

function response(status, fields, body)
   if status ~= 200 or body ~= feed then wrong = wrong + 1 end
end

function done(summary, latency, requests)
   local wrong, errors = 0, summary.errors
   for _, thread in ipairs(threads) do wrong = wrong + thread:get("wrong") end
   io.write(string.format("\\nfigures %d %d %d %d %d %d\\n", summary.requests, summary.duration,
      latency:percentile(99), errors.timeout, errors.connect + errors.read + errors.write, wrong))
end
"""


def run(*command: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)


def processor_time_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def load_by_wrk(folder: str, port: int, connections: int, seconds: float, late: float) -> Load:
    """It compares every answer, too; of an answer that never comes it does not tell."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}s"]
    command += [f"-T{math.ceil(late)}s", "-s", str(beside(folder, "wrk.lua"))]
    command += [f"http://127.0.0.1:{port}/feed.xml", "--", str(pathlib.Path(folder, "feed.xml"))]
    worked = processor_time_of_children()
    try:
        done = run(*command, timeout=seconds + PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failed(f"no end of {command}") from None
    worked = processor_time_of_children() - worked
    figures = done.stdout.rpartition("\nfigures ")[2].split()
    if done.returncode or len(figures) != 6:
        raise Failed(f"wrk: {(done.stderr or done.stdout).strip()[:200]}")
    count, duration, p99, times_out, errors, wrong = map(int, figures)
    if wrong:
        raise Failed(f"{wrong} wrong answers of {count}")
    spent = duration / 1e6
    return Load(count / spent, p99 / 1e6 if count else math.inf, times_out, errors, worked / spent)


# The peers: contexts with a port. Where one fails its process is ended, so none cleans up then.


@functools.lru_cache(maxsize=1)
def bodies(folder: str) -> dict[str, bytes]:
    return {f"/{path.name}": path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@functools.lru_cache(maxsize=1)
def answers(folder: str) -> dict[bytes, bytes]:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
    return {path.encode(): head % (len(body), body) for path, body in bodies(folder).items()}


def be_floor(listening: socket.socket, ready: dict[bytes, bytes]) -> None:
    """Answer one connection after the other, as a thread for each would only take longer."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(ConnectionError):
                while request := connection.recv(65536):
                    if request == QUIT:
                        return
                    connection.sendall(ready[request.split(b" ", 2)[1]])
                    if b"Connection: close" in request:
                        break


def be_floor_for_many(listening: socket.socket, ready: dict[bytes, bytes]) -> None:
    """Answer whichever connection has something to read."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(listening, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                connection: Any = key.fileobj
                if connection is listening:
                    connection = stack.enter_context(listening.accept()[0])
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                request = b""
                with contextlib.suppress(ConnectionError):
                    request = connection.recv(65536)
                    if request == QUIT:
                        return
                    if request:
                        connection.sendall(ready[request.split(b" ", 2)[1]])
                if not request:
                    selector.unregister(connection)
                    connection.close()


@contextlib.contextmanager
def floor(
    folder: str, be: Callable[[socket.socket, dict[bytes, bytes]], None] = be_floor
) -> Iterator[int]:
    """Bare sockets: one thread, which reads and sends what it has ready."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * CONNECTIONS) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=be, args=[listening, answers(folder)], daemon=True)
        thread.start()
        yield port
        try:
            listening.shutdown(socket.SHUT_RDWR)  # ends accept() on Linux, and is refused elsewhere
        except OSError:
            with connect(port) as connection:
                connection.sendall(QUIT)
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def http_server(
    folder: str, protocol: str = "HTTP/1.0", poll_interval: float = 0.5
) -> Iterator[int]:
    """What the library has, with its defaults: stopping waits for the next poll."""
    handler = type("Handler", (QuietHandler,), {"protocol_version": protocol})
    with QuietServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=[poll_interval], daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def this_server(folder: str) -> Iterator[int]:
    with feedtestserver.FeedTestServer(folder) as server:
        yield server.port


@contextlib.contextmanager
def pytest_httpserver(folder: str, threaded: bool = False) -> Iterator[int]:
    make_server = importlib.import_module("pytest_httpserver").HTTPServer
    with make_server(threaded=threaded) as server:
        for path, body in bodies(folder).items():
            server.expect_request(path).respond_with_data(body)
        yield server.port


@contextlib.contextmanager
def aiohttp(folder: str) -> Iterator[int]:
    """Its test server and static files, in a loop of another thread, for clients that block."""
    application = importlib.import_module("aiohttp.web").Application()
    application.router.add_static("/", folder)
    server = importlib.import_module("aiohttp.test_utils").TestServer(application, host="127.0.0.1")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start_server(), loop).result()
    yield server.port
    asyncio.run_coroutine_threadsafe(server.close(), loop).result()
    asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@contextlib.contextmanager
def responses(folder: str) -> Iterator[int]:
    """No server: it answers in the place of requests, in its process."""
    with importlib.import_module("responses").RequestsMock() as mock:
        mock.add("GET", URL, body=bodies(folder)["/feed.xml"])
        yield 0


def get_by_requests(port: int) -> bytes:
    body: bytes = importlib.import_module("requests").get(URL).content
    return b"\r\n\r\n" + body


# Programs print their port, and end with their input. One runs as long as the process of its peer.

GO = """
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
)

func serve(answer http.ResponseWriter, request *http.Request) {
	http.ServeFile(answer, request, filepath.Join(os.Args[1], filepath.Base(request.URL.Path)))
}

func main() {
	listening, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listening.Addr().(*net.TCPAddr).Port)
	go http.Serve(listening, http.HandlerFunc(serve))
	io.Copy(io.Discard, os.Stdin)
}
"""

NODE = """
'use strict';
const fs = require('fs');
const path = require('path');
const folder = process.argv[2];
const bodies = new Map();
for (const name of fs.readdirSync(folder)) {
  bodies.set('/' + name, fs.readFileSync(path.join(folder, name)));
}
const server = require('http').createServer((request, response) => {
  const body = bodies.get(request.url);
  response.writeHead(body ? 200 : 404, {'Content-Length': body ? body.length : 0});
  response.end(body);
});
server.listen({host: '127.0.0.1', port: 0, backlog: 1024}, () => {
  console.log(server.address().port);
});
process.stdin.on('close', () => process.exit()).resume();
"""


def beside(folder: str, name: str) -> pathlib.Path:
    """Where the programs are: not among what is served."""
    return pathlib.Path(folder).parent / name


def make_go(folder: str) -> None:
    source = beside(folder, "peer.go")
    source.write_text(GO)
    command = ["go", "build", "-o", str(beside(folder, "peer")), str(source)]
    quiet = {"GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": ""}
    subprocess.run(
        command, env={**os.environ, **quiet}, cwd=source.parent, check=True, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=3 * PATIENCE,
    )  # fmt: skip


def make_node(folder: str) -> None:
    beside(folder, "peer.js").write_text(NODE)


@functools.lru_cache(maxsize=1)
def running(*command: str) -> tuple[subprocess.Popen[bytes], int]:
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(program.communicate)
    assert program.stdout
    return program, int(program.stdout.readline())


@contextlib.contextmanager
def go(folder: str) -> Iterator[int]:
    """The server of Go's library, and files."""
    yield running(str(beside(folder, "peer")), folder)[1]


@contextlib.contextmanager
def node(folder: str) -> Iterator[int]:
    """The server of Node's library, and what it has in memory."""
    yield running("node", str(beside(folder, "peer.js")), folder)[1]


class Program(NamedTuple):
    make: Callable[[str], None]
    version: tuple[str, ...]  # the command that prints it


PROGRAMS = {
    "go": Program(make_go, ("go", "version")),
    "node": Program(make_node, ("node", "--version")),
}


class Peer(NamedTuple):
    serving: Callable[[str], contextlib.AbstractContextManager[int]]
    package: str = ""
    get: Callable[[int], bytes] = get
    serving_many: Callable[[str], contextlib.AbstractContextManager[int]] | None = None
    program: str = ""  # there is nothing to start and stop then in the process that asks


OWN = "feedtestserver"
PEERS = {
    "floor": Peer(floor, serving_many=functools.partial(floor, be=be_floor_for_many)),
    "http.server": Peer(http_server),
    "http.server-tuned": Peer(
        functools.partial(http_server, protocol="HTTP/1.1", poll_interval=0.01)
    ),
    OWN: Peer(this_server),
    "pytest-httpserver": Peer(pytest_httpserver, "pytest_httpserver"),
    "pytest-httpserver-threaded": Peer(
        functools.partial(pytest_httpserver, threaded=True), "pytest_httpserver"
    ),
    "aiohttp": Peer(aiohttp, "aiohttp"),
    "go": Peer(go, program="go"),
    "node": Peer(node, program="node"),
    "responses": Peer(responses, "responses", get_by_requests),
}

# What is done in the process of a peer


def cycle(peer: Peer, folder: str, seconds: float) -> float:
    """Milliseconds to start, to get one answer, and to stop."""
    times = []

    def act() -> None:
        begin = time.perf_counter()
        with peer.serving(folder) as port:
            answer = peer.get(port)
        times.append(time.perf_counter() - begin)
        check(answer)

    rate(act, seconds)
    return statistics.median(times) * 1000


def get_here(peer: Peer, folder: str, seconds: float) -> float:
    with peer.serving(folder) as port:
        return rate(lambda: check(peer.get(port)), seconds)


def run_tests(peer: Peer, folder: str, limit: float) -> tuple[float, int]:
    """Seconds that a run took, and how many tests it had done by the limit."""

    class Tests(unittest.TestCase):
        def setUp(self) -> None:
            serving = peer.serving(folder)
            self.port = serving.__enter__()
            self.addCleanup(serving.__exit__, None, None, None)

        def runTest(self) -> None:
            check(peer.get(self.port))

        def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
            if result and time.perf_counter() - begin > limit and result.testsRun:
                result.stop()  # which is after this one
            return super().run(result)

    suite = unittest.TestSuite(Tests() for _ in range(TESTS))
    runner = unittest.TextTestRunner(io.StringIO(), verbosity=0)
    begin = time.perf_counter()
    result = runner.run(suite)
    seconds = time.perf_counter() - begin
    if wrong := result.failures + result.errors:
        raise Failed(wrong[0][1].splitlines()[-1])
    return seconds, result.testsRun


def acts_of_peer(name: str, folder: str) -> dict[str, Callable[..., Any]]:
    peer, stack = PEERS[name], contextlib.ExitStack()

    def serve(many: bool) -> int:
        serving = (many and peer.serving_many) or peer.serving
        return stack.enter_context(serving(folder))

    return {
        "cycle": functools.partial(cycle, peer, folder),
        "get": functools.partial(get_here, peer, folder),
        "tests": functools.partial(run_tests, peer, folder),
        "serve": serve,
        "stop": stack.close,
    }


def acts_of_load() -> dict[str, Callable[..., Any]]:
    return {"load": keep_busy}


# What is done in the processes of a server with many open connections, and of those who hold them


def acts_of_holder(folder: str) -> dict[str, Callable[..., Any]]:
    servers: list[feedtestserver.FeedTestServer] = []

    def serve() -> int:
        server = feedtestserver.FeedTestServer(folder)
        response = functools.partial(feedtestserver.Response, FEED)
        server.respond("/stalled", response(fault="stall at headers"))
        server.respond("/delayed", response(delay=3600))
        server.respond("/throttled", response(rate=1))
        server.start()
        servers.append(server)
        return server.port

    def stop() -> float:
        server = servers.pop()
        begin = time.perf_counter()
        server.stop()
        return time.perf_counter() - begin

    return {"serve": serve, "stop": stop, "peak": peak_memory}


def peak_memory() -> float | None:
    """In MB, of this process so far; none where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return None


class Waiting(NamedTuple):
    """A kind of connection that stays open, and what it waits for."""

    kind: str
    request: bytes
    has_answer: bool = False
    has_head: bool = False
    rest: bytes = b""  # what may come of the body, at some time


def for_path(path: bytes) -> bytes:
    return GET.replace(b"/feed.xml", path)


WAITING = (
    Waiting("idle", b""),
    Waiting("half a head", GET[: len(GET) // 2]),
    Waiting("kept alive", GET, has_answer=True),
    Waiting("stalled", for_path(b"/stalled"), has_head=True),
    Waiting("delayed", for_path(b"/delayed")),
    Waiting("throttled", for_path(b"/throttled"), has_head=True, rest=FEED),
)


class Held:
    """One such connection; whatever comes on it, but should not, is an error."""

    def __init__(self, port: int, waiting: Waiting) -> None:
        self.waiting = waiting
        self.came = b""
        self.connection = connect(port)
        if waiting.has_answer:
            get_again(self.connection)
            return
        self.connection.sendall(waiting.request)
        answer = b""
        while waiting.has_head and b"\r\n\r\n" not in answer:
            if not (more := self.connection.recv(65536)):
                break
            answer += more
        head, _, self.came = answer.partition(b"\r\n\r\n")
        if waiting.has_head and not head.startswith(b"HTTP/1.1 200 "):
            raise Failed(f"a wrong answer, {waiting.kind}: {head[:80]!r}...")

    def has_ended(self) -> bool:
        """Read what there is, or until the end where the socket has a time limit."""
        ended = True
        try:
            while more := self.connection.recv(65536):
                self.came += more
        except (BlockingIOError, socket.timeout):
            ended = False
        except ConnectionError:
            pass
        if not self.waiting.rest.startswith(self.came):
            raise Failed(f"a wrong answer, {self.waiting.kind}: {self.came[:80]!r}...")
        return ended


def acts_of_crowd() -> dict[str, Callable[..., Any]]:
    crowd: list[Held] = []

    def hold(port: int, number: int) -> None:
        for _ in range(number):
            crowd.append(Held(port, WAITING[len(crowd) % len(WAITING)]))

    def look() -> None:
        for held in crowd:
            held.connection.setblocking(False)
            if held.has_ended():
                raise Failed(f"a connection has ended too early, {held.waiting.kind}")

    def leave() -> None:
        """See that the server has ended them all."""
        for held in crowd:
            held.connection.settimeout(PATIENCE / 2)
            if not held.has_ended():
                raise Failed(f"a connection is open though the server is not, {held.waiting.kind}")
            held.connection.close()
        crowd.clear()

    return {"hold": hold, "look": look, "leave": leave}


# Processes


def allow_descriptors(wanted: int) -> float:
    """How many a process may have, and those that it starts; a system may allow fewer at first."""
    with contextlib.suppress(ImportError):
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if now == resource.RLIM_INFINITY:
            return math.inf
        if most != resource.RLIM_INFINITY:
            wanted = min(wanted, most)
        with contextlib.suppress(ValueError, OSError):
            if now < wanted:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
                now = wanted
        return now
    return math.inf


Acts = Callable[..., "dict[str, Callable[..., Any]]"]


def be_helper(
    make_acts: Acts, arguments: tuple[str, ...], pipe: multiprocessing.connection.Connection
) -> None:
    """Do what the other end asks for, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the other end that is interrupted
    os.environ["no_proxy"] = "*"
    for noisy in ("werkzeug", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    acts = make_acts(*arguments)
    with contextlib.suppress(EOFError, OSError):
        while True:
            act, *values = pipe.recv()
            try:
                answer = True, acts[act](*values)
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            pipe.send(answer)


class Helper:
    """A process, as it is seen from this one."""

    def __init__(self, make_acts: Acts, *arguments: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments_of_all = (make_acts, arguments, theirs)
        self.process = context.Process(target=be_helper, args=arguments_of_all, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *act: object) -> Any:
        self.pipe.send(act)
        if not self.pipe.poll(PATIENCE):
            raise Failed(f"no end of {act} after {PATIENCE:.0f} s")
        is_well, value = self.pipe.recv()
        if not is_well:
            raise Failed(value)
        return value

    def end(self) -> None:
        self.pipe.close()
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


class Host(Helper):
    """The process of a peer, and what has been measured there."""

    def __init__(self, name: str, folder: str) -> None:
        super().__init__(acts_of_peer, name, folder)
        self.name = name
        self.folder = folder
        self.has_port = PEERS[name].get is get
        self.is_program = bool(PEERS[name].program)
        self.cells: dict[Column, list[float]] = {}
        self.unfinished: dict[str, list[int]] = {}
        self.busy = 0.0  # the most that a client was, under load
        self.is_scaled = False
        self.failure = ""
        self.clients: Helper | None = None

    @contextlib.contextmanager
    def serving(self, many: bool = False) -> Iterator[int]:
        yield self.ask("serve", many)
        self.ask("stop")

    def load(self, port: int, connections: int, effort: Effort, patience: float) -> Load:
        """A load from another process than this one."""
        if has_wrk():
            return load_by_wrk(self.folder, port, connections, effort.load, effort.late)
        if not self.clients:
            self.clients = Helper(acts_of_load)
        found: Load = self.clients.ask(
            "load", port, connections, effort.load, effort.late, patience
        )
        return found

    def end(self) -> None:
        super().end()
        if self.clients:
            self.clients.end()


class Holder(Helper):
    """The process of a server with so many open connections, and of those who hold them."""

    def __init__(self, folder: str, number: int, rounds: int) -> None:
        super().__init__(acts_of_holder, folder)
        self.crowd = Helper(acts_of_crowd)
        self.number = number
        self.rounds = rounds
        self.gets: list[float] = []
        self.stops: list[float] = []
        self.peak: float | None = None
        self.failure = ""

    def end(self) -> None:
        super().end()
        self.crowd.end()


@functools.lru_cache(maxsize=1)
def has_wrk() -> bool:
    return shutil.which("wrk") is not None


# What is measured: a number for each column, or none where the peer has no such thing


def start_get_stop(host: Host, effort: Effort) -> list[float]:
    if host.is_program:
        return []
    return [host.ask("cycle", effort.seconds)]


def new_connections(host: Host, effort: Effort) -> list[float]:
    if not host.has_port:
        return [host.ask("get", effort.seconds)]
    with host.serving() as port:
        return [rate(lambda: check(get(port)), effort.seconds)]


def keep_alive(host: Host, effort: Effort) -> list[float]:
    if not host.has_port:
        return []
    with host.serving() as port, connect(port) as connection:
        if not stays_open(get_again(connection)):
            return []
        return [rate(lambda: get_again(connection), effort.seconds)]


def many_at_once(host: Host, effort: Effort) -> list[float]:
    if not host.has_port:
        return []
    with host.serving() as port:
        begin = time.perf_counter()
        times = get_at_once(port, effort.late)
        seconds = time.perf_counter() - begin
    unfinished = times.count(math.inf)
    host.unfinished.setdefault(f"of {CONNECTIONS} at once", []).append(unfinished)
    return [(CONNECTIONS - unfinished) / seconds, percentile(times, 0.99) * 1000]


def large_body(host: Host, effort: Effort) -> list[float]:
    if not host.has_port:
        return []
    with host.serving() as port:
        return [LARGE / 1e6 / download(port)]


def many_tests(host: Host, effort: Effort) -> list[float]:
    if host.is_program:
        return []
    seconds, number = host.ask("tests", effort.limit)
    host.is_scaled |= number < TESTS
    return [seconds * TESTS / number]


def under_load(host: Host, effort: Effort, connections: int) -> list[float]:
    """Where wrk is the client, this process is one before, as wrk overlooks what never comes."""
    if not host.has_port:
        return []
    patience = PATIENCE / 2 if host.name == OWN else effort.late
    with host.serving(many=True) as port:
        with connect(port) as connection:
            if not stays_open(get_again(connection)):
                return []
        loads = []
        if has_wrk():
            loads.append(keep_busy(port, connections, effort.seconds, effort.late, patience))
        loads.append(host.load(port, connections, effort, patience))
    missing, late = sum(load.missing for load in loads), sum(load.late for load in loads)
    if missing and host.name == OWN:
        raise Failed(f"{missing} answers are missing")
    host.unfinished.setdefault(f"with {connections} kept alive", []).append(missing + late)
    host.busy = max(host.busy, loads[-1].busy)
    p99 = math.inf if missing > connections / 100 else loads[-1].p99
    return [loads[-1].rate, p99 * 1000]


class Column(NamedTuple):
    title: tuple[str, str, str]  # line by line, the unit last
    is_time: bool  # so less is better


Measure = Callable[[Host, Effort], "list[float]"]
WORKLOADS: dict[Measure, list[Column]] = {
    start_get_stop: [Column(("start,", "GET, stop", "ms"), True)],
    new_connections: [Column(("new con-", "nections", "GETs/s"), False)],
    keep_alive: [Column(("keep-", "alive", "GETs/s"), False)],
    many_at_once: [
        Column((f"{CONNECTIONS}", "at once", "GETs/s"), False),
        Column((f"{CONNECTIONS}", "at once", "p99 ms"), True),
    ],
    large_body: [Column(("large", "body", "MB/s"), False)],
    many_tests: [Column((f"{TESTS:,}", "tests", "s"), True)],
}


LOADS: dict[Measure, list[Column]] = {
    functools.partial(under_load, connections=number): [
        Column((f"{number}", "kept", "GETs/s"), False),
        Column((f"{number}", "kept", "p99 ms"), True),
    ]
    for number in KEPT
}


def warm_up(host: Host, effort: Effort) -> list[float]:
    """Look at the bytes before any time is taken; what is made once is made then."""
    if not host.has_port:
        host.ask("get", 0)
        return []
    with host.serving() as port:
        check(get(port))
        download(port)
    return []


def attempt(measure: Measure, host: Host, effort: Effort) -> float:
    """Enter a round into the cells; the seconds that it took."""
    begin = time.perf_counter()
    try:
        columns = {**WORKLOADS, **LOADS}.get(measure, [])
        for column, number in zip(columns, measure(host, effort)):
            host.cells.setdefault(column, []).append(number)
    except (Failed, EOFError, OSError) as error:
        host.failure = f"{name_of(measure)}: {str(error) or type(error).__name__}"
        host.process.kill()
    return time.perf_counter() - begin


def name_of(measure: Measure) -> str:
    if isinstance(measure, functools.partial):
        values = ", ".join(f"{key}={value}" for key, value in measure.keywords.items())
        return f"{measure.func.__name__}({values})"
    return measure.__name__


def measure_all(
    hosts: list[Host], measures: Iterable[Measure], effort: Effort, rounds: int, budget: float
) -> None:
    """Round by round; a slow peer, whose time is used up, has fewer of them."""
    for measure in measures:
        spent = dict.fromkeys(hosts, 0.0)
        for number in range(rounds):
            for host in hosts:
                if not host.failure and (not number or spent[host] < budget):
                    spent[host] += attempt(measure, host, effort)


def hold_open(holder: Holder, effort: Effort) -> None:
    """A round: the time that others' GETs take, and that it takes to stop."""

    def act() -> None:
        begin = time.perf_counter()
        answer = get(port)
        holder.gets.append(time.perf_counter() - begin)
        check(answer)

    port = holder.ask("serve")
    for first in range(0, holder.number, OPEN):  # so that none of these acts takes long
        holder.crowd.ask("hold", port, min(OPEN, holder.number - first))
    rate(act, effort.seconds)
    holder.crowd.ask("look")
    holder.stops.append(holder.ask("stop"))
    holder.crowd.ask("leave")
    holder.peak = holder.ask("peak")


def hold_all_open(holders: list[Holder], effort: Effort) -> None:
    for number in range(effort.open_rounds):
        for holder in holders:
            if number < holder.rounds and not holder.failure:
                try:
                    hold_open(holder, effort)
                except (Failed, EOFError, OSError) as error:
                    holder.failure = str(error) or type(error).__name__
                    holder.process.kill()
                    holder.crowd.process.kill()


# What is printed


def show(number: float) -> str:
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def show_cell(host: Host, floor: Host, column: Column, late: float) -> tuple[str, str]:
    if column not in host.cells:
        return "failed" if host.failure else "-", ""
    number = statistics.median(host.cells[column])
    if number == math.inf:
        return f">{late * 1000:,.0f}", ""
    value = show(number)
    if host.is_scaled and column in WORKLOADS[many_tests]:
        value = f"~{value}"
    if column not in floor.cells or not number:
        return value, ""
    ratio = number / statistics.median(floor.cells[column])
    return value, f"({show(ratio if column.is_time else 1 / ratio)})"


def say(text: str) -> None:
    print(textwrap.fill(text, 100))


def print_rows(rows: list[tuple[str, ...]], head: int) -> None:
    """A simple table of reStructuredText, of which some rows are its head."""
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    ruler = "  ".join("=" * width for width in widths)
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    print(ruler, *lines[:head], ruler, *lines[head:], ruler, "", sep="\n")


def print_table(hosts: list[Host], floor: Host, columns: list[Column], late: float) -> None:
    rows = list(zip(("peer", "", ""), *(column.title for column in columns)))
    for host in hosts:
        cells = [show_cell(host, floor, column, late) for column in columns]
        rows += zip((host.name, ""), *cells)
    print_rows(rows, 3)


def print_loads(hosts: list[Host], late: float) -> None:
    """Without those peers that keep no connection open."""
    columns = [column for columns in LOADS.values() for column in columns]
    shown = [host for host in hosts if host.failure or not host.cells.keys().isdisjoint(columns)]
    print_table(shown, hosts[0], columns, late)
    client = f"wrk {version_of('wrk', '-v')}" if has_wrk() else "another process of this script"
    busy = ", ".join(f"{host.busy:.0%} with {host.name}" for host in shown if host.busy)
    say(f"The load came from {client}. It was busy for {busy} of the time at most.")
    if others := ", ".join(host.name for host in hosts if host not in shown):
        say(f"Not there, as they keep no connection open: {others}.")


def print_open(holders: list[Holder]) -> None:
    rows: list[tuple[str, ...]] = [
        ("open con-", "GET of", "GET of", "stop()", "stop()", "peak"),
        ("nections", "another", "another", "", "", "memory"),
        ("", "p50 ms", "p99 ms", "p50 ms", "p99 ms", "MB"),
    ]
    for holder in holders:
        cells = [f"{holder.number:,}"]
        for times in (holder.gets, holder.stops):
            shares = (0.5, 0.99) if times else ()
            cells += [show(percentile(times, share) * 1000) for share in shares] or ["failed"] * 2
        cells.append("-" if holder.peak is None else show(holder.peak))
        rows.append(tuple(cells))
    print_rows(rows, 3)
    kinds = ", ".join(waiting.kind for waiting in WAITING)
    say(f"This is {OWN}. The open connections are, in equal parts: {kinds}.")
    for holder in holders:
        say(f"With {holder.number:,}: {len(holder.stops)} rounds, {len(holder.gets):,} GETs.")
        if holder.failure:
            print(f"{OWN} has failed with {holder.number:,} open: {holder.failure}")


def print_notes(hosts: list[Host], late: float) -> None:
    spreads = [0.0]
    for host in hosts:
        for what, unfinished in host.unfinished.items():
            if any(unfinished):
                counts = ", ".join(map(str, unfinished))
                print(f"{host.name}: {counts} {what} have failed, or had no end in {late} s.")
        if host.failure:
            print(f"{host.name} has failed: {host.failure}")
        for numbers in host.cells.values():
            if len(numbers) > 1 and max(numbers) < math.inf:
                median = statistics.median(numbers)
                spreads.append(max(abs(number / median - 1) for number in numbers))
    if any(spreads):
        half, most = statistics.median(spreads), max(spreads)
        print(
            f"Rounds are within {half:.0%} of their median in half of the cells, {most:.0%} in all."
        )


def ticks() -> tuple[int, int] | None:
    """In how many ticks the processors were busy since the system started, and of how many."""
    with contextlib.suppress(OSError):
        numbers = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        idle, total = sum(map(int, numbers[3:5])), sum(map(int, numbers))
        return total - idle, total
    return None


def used_by_others() -> str:
    """How busy the machine is while this process does nothing for a second."""
    before = ticks()
    time.sleep(1)
    after = ticks()
    if not before or not after:
        return "unknown"
    return f"{(after[0] - before[0]) / (after[1] - before[1]):.0%}"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(*command: str) -> str:
    """What a program prints of itself that looks like one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = run(*command)
        if found := re.search(r"\d+(\.\d+)+", done.stdout + done.stderr):
            return found[0]
    return "?"


def print_machine(names: list[str], used: str) -> None:
    facts = [time.strftime("%Y-%m-%d"), processor(), f"{os.cpu_count()} cores"]
    facts += [f"{used} used by others before", f"{platform.system()} {platform.release()}"]
    facts += [f"{platform.python_implementation()} {platform.python_version()}"]
    facts += [f"feedtestserver {feedtestserver.__version__}"]
    for package in sorted({PEERS[name].package for name in names} - {""}):
        facts.append(f"{package.replace('_', '-')} {importlib.metadata.version(package)}")
    for program in sorted({PEERS[name].program for name in names} - {""}):
        facts.append(f"{program} {version_of(*PROGRAMS[program].version)}")
    say(", ".join(facts))


# Command line


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(known)

    def names(text: str) -> list[str]:
        unknown = ", ".join(set(text.split(",")) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown}; there are {', '.join(known)}")
        return text.split(",")

    return names


def is_installed(name: str, folder: str) -> bool:
    package, program = PEERS[name].package, PEERS[name].program
    if not (shutil.which(program) if program else not package or importlib.util.find_spec(package)):
        print(f"{name} is left out, as it is not installed")
        return False
    if program:
        try:
            PROGRAMS[program].make(folder)
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", None) or str(error).encode()
            print(f"{name} is left out, as it does not build: {why.decode(errors='replace')[:200]}")
            return False
    return True


def numbers_of_open(wanted: int) -> list[int]:
    """How many connections are held open: as many as the descriptors are enough for."""
    numbers = [OPEN, wanted] if wanted else [OPEN]
    most = allow_descriptors(max(4096, max(numbers) + SPARE)) - SPARE
    if most < max(numbers):
        most = max(int(most), 0)
        print(f"The system allows descriptors for no more than {most:,} open connections")
    return sorted({0, *(int(min(number, most)) for number in numbers)})


def compare(hosts: list[Host], tables: list[str], effort: Effort) -> None:
    for host in hosts:
        attempt(warm_up, host, effort)
    if "base" in tables:
        measure_all(hosts, WORKLOADS, effort, effort.rounds, effort.budget)
        columns = [column for columns in WORKLOADS.values() for column in columns]
        print_table(hosts, hosts[0], columns, effort.late)
    if "load" in tables:
        measure_all(hosts, LOADS, effort, effort.load_rounds, effort.load_budget)
        print_loads(hosts, effort.late)
    print_notes(hosts, effort.late)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument(
        "--peers", type=some_of(PEERS), default=list(PEERS), help="names, with commas"
    )
    parser.add_argument(
        "--tables", type=some_of(TABLES), default=TABLES, help=f"of {', '.join(TABLES)}"
    )
    parser.add_argument(
        "--open", type=int, default=0, help="hold so many connections open, too, such as 10000"
    )
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else THOROUGH
    numbers = numbers_of_open(arguments.open)
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        folder = os.path.join(root, "served")
        os.mkdir(folder)
        pathlib.Path(folder, "feed.xml").write_bytes(FEED)
        pathlib.Path(folder, "episode.mp3").write_bytes(large_file())
        beside(folder, "wrk.lua").write_text(WRK)
        # The floor, which the others are compared with, is always there, and the first.
        names = [name for name in PEERS if name in ("floor", *arguments.peers)]
        if arguments.tables == ["open"]:
            names = [name for name in names if name == OWN]
        names = [name for name in names if is_installed(name, folder)]
        used = used_by_others()
        hosts: list[Host] = []
        holders: list[Holder] = []
        if arguments.tables != ["open"]:
            for name in names:
                hosts.append(Host(name, folder))
                stack.callback(hosts[-1].end)
            compare(hosts, arguments.tables, effort)
        if "open" in arguments.tables and OWN in names:
            for number in numbers:
                rounds = effort.open_rounds if number <= OPEN else FEW
                holders.append(Holder(folder, number, rounds))
                stack.callback(holders[-1].end)
            hold_all_open(holders, effort)
            if hosts:
                print()
            print_open(holders)
    print_machine(names, used)
    failures = [host.failure for host in hosts] + [holder.failure for holder in holders]
    return 1 if any(failures) else 0


if __name__ == "__main__":
    sys.exit(main())
