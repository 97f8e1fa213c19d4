"""Compares this server with bare sockets, Go's and Node's servers, http.server, and test servers.

The result is a table with one row for each peer that is installed. A figure is the median of some
rounds; ~ marks an extrapolated one, and - what a peer cannot do. README.rst explains the columns.

Each peer runs in a process of its own, and this process is the client. A round goes from
peer to peer, so that whatever else the machine does meets all of them. Every response is compared
with its file. The exit status is 1 if one is wrong, or if a peer fails or hangs.
"""

from __future__ import annotations

import argparse
import asyncio
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
import struct
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
KEPT = (1, 16, 128, 512)  # connections that are kept open and asked again and again
NEW = 512  # connections that come at once
TESTS = 1000
SPARE = 256  # descriptors for everything but the connections that are held open
WIDTH = 95
BUDGET = 10.0  # seconds after which a peer gets no more rounds
PATIENCE = 20.0  # seconds; only a broken peer makes anybody wait so long
GET = b"GET /feed.xml HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
LAST_GET = b"GET /%s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
QUIT = b"QUIT / HTTP/1.1\r\n\r\n"
URL = "http://127.0.0.1/feed.xml"  # for what has no port


class Failed(Exception):
    """A peer sent something else than the file, or nothing."""


class Effort(NamedTuple):
    """How much is done for a figure."""

    rounds: int
    seconds: float  # for which a round repeats what it measures
    tests: float  # seconds for a run of tests; the rest of it is extrapolated
    late: float  # seconds after which a connection among many has failed
    load: float  # seconds; wrk takes at least one
    held: int  # connections that are held open
    most: float = math.inf  # connections for which there are descriptors


THOROUGH = Effort(rounds=5, seconds=0.2, tests=3, late=10, load=2, held=10_000)
QUICK = Effort(rounds=1, seconds=0.05, tests=0.5, late=1, load=0.3, held=200)

# The client


@functools.lru_cache(maxsize=1)
def large_file() -> bytes:
    return random.Random(LARGE).randbytes(LARGE)


@functools.lru_cache(maxsize=1)
def buffer() -> memoryview:
    """Room for a large response; it has been written to, as fresh pages would cost time."""
    return memoryview(bytearray(b"-") * (LARGE + 65536))


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def close_by_reset(connection: socket.socket) -> None:
    """Have close() send a reset: else the port stays taken for a minute.

    Once most ports are, the system takes milliseconds to find a free one.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def check(response: bytes, body: bytes = FEED) -> None:
    if not response.endswith(b"\r\n\r\n" + body):
        raise Failed(f"a wrong response: {response[:80]!r}...")


def get(port: int) -> bytes:
    """The whole response, on a connection of its own."""
    response = b""
    with connect(port) as connection:
        connection.sendall(LAST_GET % b"feed.xml")
        while more := connection.recv(65536):
            response += more
        close_by_reset(connection)
    return response


def get_again(connection: socket.socket) -> bytes:
    """The whole response, on a connection that may stay open."""
    response = b""
    connection.sendall(GET)
    while not response.endswith(FEED) and (more := connection.recv(65536)):
        response += more
    check(response)
    return response


def stays_open(response: bytes) -> bool:
    head = response.partition(b"\r\n\r\n")[0].lower()
    return not head.startswith(b"http/1.0") and b"connection: close" not in head


def download(port: int) -> float:
    """The seconds until a large body has come."""
    into, length = buffer(), 0
    begin = time.perf_counter()
    with connect(port) as connection:
        connection.sendall(LAST_GET % b"episode.mp3")
        while more := connection.recv_into(into[length:]):
            length += more
    seconds = time.perf_counter() - begin
    check(bytes(into[:length]), large_file())
    return seconds


def repeat(act: Callable[[], object], seconds: float) -> list[float]:
    """Do this again and again, at least once; the seconds that each took."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        act()
        times.append(time.perf_counter() - begin)
    return times


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[math.ceil(len(times) * share) - 1]


class Client:
    """A connection among many, and the response that is coming on it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.begin = time.perf_counter()
        self.received = b""
        self.count = 0

    def has_response(self) -> bool:
        more = self.connection.recv(65536)
        if not more:
            raise ConnectionResetError
        self.received += more
        if not self.received.endswith(FEED):
            return False
        check(self.received)
        self.count += 1
        return True

    def ask(self, request: bytes) -> None:
        if self.count:
            self.begin = time.perf_counter()  # else connecting counts
        self.received = b""
        self.connection.send(request)


def ask_many(
    port: int, connections: int, request: bytes, late: float, *, each: int = 1, seconds: float = 0.0
) -> list[float]:
    """Send GETs on many connections at once; the seconds until each of the responses was there.

    That lasts for some seconds, and until each connection has had so many responses. A response
    that is late or does not come takes infinite time.
    """
    times: list[float] = []
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for _ in range(connections):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            close_by_reset(connection)
            client = Client(connection)
            connection.connect_ex(("127.0.0.1", port))
            selector.register(connection, selectors.EVENT_WRITE, client)
        end = time.perf_counter() + seconds
        while selector.get_map() and (left := end + late - time.perf_counter()) > 0:
            for key, _ in selector.select(left):
                client = key.data
                try:
                    if key.events == selectors.EVENT_WRITE:
                        selector.modify(key.fileobj, selectors.EVENT_READ, client)
                        client.ask(request)
                    elif client.has_response():
                        now = time.perf_counter()
                        times.append(now - client.begin)
                        if client.count >= each and now >= end:
                            selector.unregister(key.fileobj)
                        else:
                            client.ask(request)
                except OSError:
                    selector.unregister(key.fileobj)
                    times.append(math.inf)
        return times + [math.inf] * len(selector.get_map())


class Load(NamedTuple):
    """What came of many GETs on connections that stay open."""

    rate: float  # responses in a second
    p99: float  # seconds
    missing: int  # responses that were late or did not come


def load_by_hand(port: int, connections: int, seconds: float, late: float) -> Load:
    begin = time.perf_counter()
    times = ask_many(port, connections, GET, late, seconds=seconds)
    spent, missing = time.perf_counter() - begin, times.count(math.inf)
    return Load((len(times) - missing) / spent, percentile(times, 0.99), missing)


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
   io.write(string.format("\\nfigures %d %d %d %d %d\\n", summary.requests, summary.duration,
      latency:percentile(99), errors.timeout + errors.connect + errors.read + errors.write, wrong))
end
"""


@functools.lru_cache(maxsize=1)
def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def run(*command: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def load_by_wrk(folder: str, port: int, connections: int, seconds: float, late: float) -> Load:
    """wrk compares every response, too."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}s"]
    command += [f"-T{math.ceil(late)}s", "-s", str(beside(folder, "wrk.lua"))]
    command += [f"http://127.0.0.1:{port}/feed.xml", "--", str(pathlib.Path(folder, "feed.xml"))]
    try:
        done = run(*command, timeout=seconds + PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failed(f"no end of {command}") from None
    figures = done.stdout.rpartition("\nfigures ")[2].split()
    if done.returncode or len(figures) != 5:
        raise Failed(f"wrk: {(done.stderr or done.stdout).strip()[:200]}")
    count, duration, p99, missing, wrong = map(int, figures)
    if wrong:
        raise Failed(f"{wrong} wrong responses of {count}")
    return Load(count / duration * 1e6, p99 / 1e6 if count else math.inf, missing)


# The peers: context managers that give a port. If one fails, its process is killed, so none of them
# cleans up after an exception.


@functools.lru_cache(maxsize=1)
def bodies(folder: str) -> dict[str, bytes]:
    return {f"/{path.name}": path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@functools.lru_cache(maxsize=1)
def ready_responses(folder: str) -> dict[bytes, bytes]:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
    return {path.encode(): head % (len(body), body) for path, body in bodies(folder).items()}


def respond_bare(listening: socket.socket, ready: dict[bytes, bytes]) -> None:
    """Respond on whichever connection has something to read."""
    with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                connection: Any = key.fileobj
                if connection is listening:
                    selector.register(listening.accept()[0], selectors.EVENT_READ)
                    continue
                request = b""
                with contextlib.suppress(ConnectionError):
                    request = connection.recv(65536)
                    if request == QUIT:
                        return
                    if request:
                        connection.sendall(ready[request.split(b" ", 2)[1]])
                if not request or b"Connection: close" in request:
                    selector.unregister(connection)
                    connection.close()


@contextlib.contextmanager
def floor(folder: str) -> Iterator[int]:
    """Bare sockets: one thread, which sends what it has ready."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * NEW) as listening:
        port = listening.getsockname()[1]
        arguments = [listening, ready_responses(folder)]
        thread = threading.Thread(target=respond_bare, args=arguments, daemon=True)
        thread.start()
        yield port
        try:
            listening.shutdown(socket.SHUT_RDWR)  # ends accept() on Linux; an error elsewhere
        except OSError:
            with connect(port) as connection:
                connection.sendall(QUIT)
        thread.join()


@contextlib.contextmanager
def this_server(folder: str) -> Iterator[int]:
    with feedtestserver.FeedTestServer(folder) as server:
        yield server.port


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
    """The library's server; its defaults are those here, and stopping waits for the next poll."""
    handler = type("Handler", (QuietHandler,), {"protocol_version": protocol})
    with QuietServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=[poll_interval], daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def pytest_httpserver(folder: str) -> Iterator[int]:
    with importlib.import_module("pytest_httpserver").HTTPServer() as server:
        for path, body in bodies(folder).items():
            server.expect_request(path).respond_with_data(body)
        yield server.port


@contextlib.contextmanager
def aiohttp(folder: str) -> Iterator[int]:
    """Its test server and static files, in the loop of another thread, for clients that block."""
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
    """No server: it responds instead of requests, in its process."""
    with importlib.import_module("responses").RequestsMock() as mock:
        mock.add("GET", URL, body=bodies(folder)["/feed.xml"])
        yield 0


def get_by_requests(port: int) -> bytes:
    body: bytes = importlib.import_module("requests").get(URL).content
    return b"\r\n\r\n" + body


# The peers in other languages. A program prints the port of its server. For each line with a number
# of seconds it starts another server, gets the feed and stops it, for so long; it prints the median
# in milliseconds. It ends with its input.

GO = """
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"time"
)

const lastGet = "GET /feed.xml HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nConnection: close\\r\\n\\r\\n"

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func serve(response http.ResponseWriter, request *http.Request) {
	http.ServeFile(response, request, filepath.Join(os.Args[1], filepath.Base(request.URL.Path)))
}

func cycle(feed []byte) float64 {
	begin := time.Now()
	server := httptest.NewServer(http.HandlerFunc(serve))
	connection, err := net.Dial("tcp", server.Listener.Addr().String())
	check(err)
	_, err = io.WriteString(connection, lastGet)
	check(err)
	response, err := io.ReadAll(connection)
	check(err)
	connection.Close()
	server.Close()
	milliseconds := time.Since(begin).Seconds() * 1000
	if !bytes.HasSuffix(response, append([]byte("\\r\\n\\r\\n"), feed...)) {
		panic("a wrong response")
	}
	return milliseconds
}

func main() {
	feed, err := os.ReadFile(filepath.Join(os.Args[1], "feed.xml"))
	check(err)
	listening, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	fmt.Println(listening.Addr().(*net.TCPAddr).Port)
	go http.Serve(listening, http.HandlerFunc(serve))
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		seconds, err := strconv.ParseFloat(lines.Text(), 64)
		check(err)
		times := []float64{}
		for begin := time.Now(); len(times) == 0 || time.Since(begin).Seconds() < seconds; {
			times = append(times, cycle(feed))
		}
		sort.Float64s(times)
		fmt.Println(times[len(times)/2])
	}
}
"""

NODE = """
'use strict';
const fs = require('fs');
const http = require('http');
const net = require('net');
const path = require('path');
const folder = process.argv[2];
const bodies = new Map();
for (const name of fs.readdirSync(folder)) {
  bodies.set('/' + name, fs.readFileSync(path.join(folder, name)));
}
const lastGet = 'GET /feed.xml HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nConnection: close\\r\\n\\r\\n';
const expected = Buffer.concat([Buffer.from('\\r\\n\\r\\n'), bodies.get('/feed.xml')]);

function serve(request, response) {
  const body = bodies.get(request.url);
  response.writeHead(body ? 200 : 404, {'Content-Length': body ? body.length : 0});
  response.end(body);
}

function cycle() {
  return new Promise((resolve, reject) => {
    const begin = process.hrtime.bigint();
    const server = http.createServer(serve);
    server.listen({host: '127.0.0.1', port: 0}, () => {
      const parts = [];
      const connection = net.connect(server.address().port, '127.0.0.1');
      connection.on('error', reject);
      connection.on('data', (part) => parts.push(part));
      connection.on('end', () => server.close(() => {
        const milliseconds = Number(process.hrtime.bigint() - begin) / 1e6;
        if (!expected.equals(Buffer.concat(parts).subarray(-expected.length))) {
          throw new Error('a wrong response');
        }
        resolve(milliseconds);
      }));
      connection.write(lastGet);
    });
  });
}

async function measure(seconds) {
  const times = [];
  for (const end = Date.now() + seconds * 1000; !times.length || Date.now() < end;) {
    times.push(await cycle());
  }
  times.sort((one, other) => one - other);
  console.log(times[Math.floor(times.length / 2)]);
}

const server = http.createServer(serve);
// These limits would end the connections that are held open.
server.keepAliveTimeout = server.headersTimeout = server.requestTimeout = 0;
server.listen({host: '127.0.0.1', port: 0, backlog: 1024}, () => {
  console.log(server.address().port);
});
require('readline').createInterface({input: process.stdin})
    .on('line', (line) => measure(Number(line)))
    .on('close', () => process.exit());
"""


def beside(folder: str, name: str) -> pathlib.Path:
    """Where the programs are: not among what is served."""
    return pathlib.Path(folder).parent / name


class Program(NamedTuple):
    """Names of files are of those beside the folder."""

    source: str
    file: str
    build: tuple[str, ...]
    command: tuple[str, ...]  # its last word is the name of a file
    version: tuple[str, ...]  # the command that prints it


PROGRAMS = {
    "go": Program(
        GO,
        "peer.go",
        ("go", "build", "-o", "peer.exe", "peer.go"),
        ("peer.exe",),
        ("go", "version"),
    ),
    "node": Program(NODE, "peer.js", (), ("node", "peer.js"), ("node", "--version")),
}


def make_program(name: str, folder: str) -> None:
    program = PROGRAMS[name]
    source = beside(folder, program.file)
    source.write_text(program.source)
    if program.build:
        settings = {"GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": ""}
        subprocess.run(
            program.build, env={**os.environ, **settings}, cwd=source.parent, check=True,
            capture_output=True, stdin=subprocess.DEVNULL, timeout=6 * PATIENCE,
        )  # fmt: skip


@functools.lru_cache(maxsize=1)
def running(name: str, folder: str) -> tuple[subprocess.Popen[str], int]:
    """A program and its port; it runs as long as the process of its peer."""
    *words, file = PROGRAMS[name].command
    program = subprocess.Popen(
        [*words, str(beside(folder, file)), folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return program, int(read_line(program))


def read_line(program: subprocess.Popen[str]) -> str:
    assert program.stdout
    if line := program.stdout.readline():
        return line
    raise Failed("the program has ended")


def cycle_of_program(name: str, folder: str, seconds: float) -> float:
    program, _ = running(name, folder)
    assert program.stdin
    program.stdin.write(f"{seconds}\n")
    program.stdin.flush()
    return float(read_line(program))


@contextlib.contextmanager
def serving_program(folder: str, name: str) -> Iterator[int]:
    yield running(name, folder)[1]


class Peer(NamedTuple):
    serving: Callable[[str], contextlib.AbstractContextManager[int]]
    package: str = ""
    program: str = ""
    get: Callable[[int], bytes] = get
    has_port: bool = True
    can_hold: bool = False  # many connections, without a thread for each of them


OWN = "feedtestserver"
PEERS = {
    "floor": Peer(floor, can_hold=True),
    OWN: Peer(this_server, can_hold=True),
    "go": Peer(functools.partial(serving_program, name="go"), program="go", can_hold=True),
    "node": Peer(functools.partial(serving_program, name="node"), program="node", can_hold=True),
    "http.server": Peer(http_server),
    "http.server-tuned": Peer(
        functools.partial(http_server, protocol="HTTP/1.1", poll_interval=0.01)
    ),
    "pytest-httpserver": Peer(pytest_httpserver, "pytest_httpserver"),
    "aiohttp": Peer(aiohttp, "aiohttp", can_hold=True),
    "responses": Peer(responses, "responses", get=get_by_requests, has_port=False),
}

# What is done in the process of a peer


def cycle(name: str, folder: str, seconds: float) -> float:
    """The milliseconds that it takes to start, to get one response, and to stop."""
    peer = PEERS[name]
    if peer.program:
        return cycle_of_program(name, folder, seconds)

    def act() -> None:
        with peer.serving(folder) as port:
            check(peer.get(port))

    return statistics.median(repeat(act, seconds)) * 1000


def run_tests(name: str, folder: str, limit: float) -> tuple[float, int]:
    """The seconds that a run took, and how many tests it had done by the limit."""
    peer = PEERS[name]

    class Tests(unittest.TestCase):
        def setUp(self) -> None:
            serving = peer.serving(folder)
            self.port = serving.__enter__()
            self.addCleanup(serving.__exit__, None, None, None)

        def runTest(self) -> None:
            check(peer.get(self.port))

        def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
            if result and time.perf_counter() - begin > limit and result.testsRun:
                result.stop()  # after this test
            return super().run(result)

    suite = unittest.TestSuite(Tests() for _ in range(TESTS))
    runner = unittest.TextTestRunner(io.StringIO(), verbosity=0)
    begin = time.perf_counter()
    result = runner.run(suite)
    seconds = time.perf_counter() - begin
    if wrong := result.failures + result.errors:
        raise Failed(wrong[0][1].splitlines()[-1])
    return seconds, result.testsRun


def memory(name: str, folder: str) -> float | None:
    """The resident set in MB; None where the system does not tell."""
    program = PEERS[name].program
    process = running(program, folder)[0].pid if program else "self"
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
    return None


def acts_of(name: str, folder: str) -> dict[str, Callable[..., Any]]:
    stack = contextlib.ExitStack()

    def stop() -> float:
        begin = time.perf_counter()
        stack.close()
        return time.perf_counter() - begin

    return {
        "serve": lambda: stack.enter_context(PEERS[name].serving(folder)),
        "stop": stop,
        "cycle": functools.partial(cycle, name, folder),
        "tests": functools.partial(run_tests, name, folder),
        "memory": functools.partial(memory, name, folder),
    }


def be_peer(name: str, folder: str, pipe: multiprocessing.connection.Connection) -> None:
    """Do what the other end asks for, until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end
    os.environ["no_proxy"] = "*"
    for noisy in ("werkzeug", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    acts = acts_of(name, folder)
    with contextlib.suppress(EOFError, OSError):
        while True:
            act, *values = pipe.recv()
            try:
                answer = True, acts[act](*values)
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            pipe.send(answer)


class Host:
    """The process of a peer, as it is seen from here, and what was measured with it."""

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self.folder = folder
        self.peer = PEERS[name]
        self.figures: dict[str, list[float]] = {}  # by the names of the columns
        self.missing: dict[str, int] = {}  # connections that failed, by what they were for
        self.is_extrapolated = False
        self.busy = 0.0  # the most that the client was, under load
        self.failure = ""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=be_peer, args=(name, folder, theirs), daemon=True)
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

    @contextlib.contextmanager
    def serving(self) -> Iterator[int]:
        yield self.ask("serve")
        self.ask("stop")

    def count_missing(self, what: str, number: int) -> None:
        if number and self.name == OWN:
            raise Failed(f"{number} {what} have failed")
        self.missing[what] = max(number, self.missing.get(what, 0))

    def end(self) -> None:
        self.pipe.close()
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


# What is measured: figures by the names of their columns, or none where a peer has no such thing

Figures = dict[str, float]


def start_get_stop(host: Host, effort: Effort) -> Figures:
    return {"cycle": host.ask("cycle", effort.seconds)}


def many_tests(host: Host, effort: Effort) -> Figures:
    if host.peer.program:
        return {}
    seconds, number = host.ask("tests", effort.tests)
    host.is_extrapolated |= number < TESTS
    return {"tests": seconds * TESTS / number}


def one_by_one(host: Host, effort: Effort) -> Figures:
    with host.serving() as port:
        return {"one by one": 1 / statistics.mean(repeat(lambda: check(get(port)), effort.seconds))}


def time_limit(host: Host, effort: Effort) -> float:
    """This server fails if a connection among many is late, so it gets more time."""
    return PATIENCE / 2 if host.name == OWN else effort.late


def kept_open(host: Host, effort: Effort, connections: int) -> Figures:
    if connections > effort.most:
        return {}
    late = time_limit(host, effort)
    with host.serving() as port:
        with connect(port) as connection:
            if not stays_open(get_again(connection)):
                return {}
        # A response that never comes is not in wrk's figures, so try each connection before.
        missing = ask_many(port, connections, GET, late, each=2).count(math.inf)
        begin, worked = time.perf_counter(), sum(os.times()[:4])  # wrk's included
        if has_wrk():
            load = load_by_wrk(host.folder, port, connections, effort.load, late)
        else:
            load = load_by_hand(port, connections, effort.load, late)
        busy = (sum(os.times()[:4]) - worked) / (time.perf_counter() - begin)
    host.busy = max(host.busy, busy)
    missing = min(missing + load.missing, connections)
    host.count_missing(f"of {connections} kept open", missing)
    p99 = math.inf if missing > connections / 100 else load.p99 * 1000
    return {f"kept {connections}": load.rate, f"kept {connections} p99": p99}


def new_at_once(host: Host, effort: Effort) -> Figures:
    if effort.most < NEW:
        return {}
    late = time_limit(host, effort)
    with host.serving() as port:
        begin = time.perf_counter()
        times = ask_many(port, NEW, LAST_GET % b"feed.xml", late)
        seconds = time.perf_counter() - begin
    missing = times.count(math.inf)
    host.count_missing(f"of {NEW} new", missing)
    return {"new": (NEW - missing) / seconds, "new p99": percentile(times, 0.99) * 1000}


def large_body(host: Host, effort: Effort) -> Figures:
    with host.serving() as port:
        return {"large": LARGE / 1e6 / download(port)}


def held_open(host: Host, effort: Effort) -> Figures:
    """In a process of its own, as memory that is free again would be used first."""
    if not host.peer.can_hold or not effort.held:
        return {}
    fresh = Host(host.name, host.folder)
    try:
        return hold(fresh, effort)
    except (Failed, EOFError, OSError):
        fresh.process.kill()
        raise
    finally:
        fresh.end()


def hold(host: Host, effort: Effort) -> Figures:
    """Half of the connections have sent nothing yet; on the others there was one response."""
    port = host.ask("serve")
    repeat(lambda: check(get(port)), effort.seconds)
    before = host.ask("memory")
    deadline = time.perf_counter() + 3 * PATIENCE
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(port)) for _ in range(effort.held // 2)]
        while len(held) < effort.held:
            held.append(stack.enter_context(connect(port)))
            get_again(held[-1])
            if time.perf_counter() > deadline:
                raise Failed(f"no more than {len(held)} connections were open in time")
        times = repeat(lambda: check(get(port)), 5 * effort.seconds)
        after = host.ask("memory")
        for connection in held:
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                raise Failed(f"{connection.recv(80)!r} came on a connection that was held open")
        stop = host.ask("stop")
    figures = {f"held p{share}": percentile(times, share / 100) * 1000 for share in (50, 99)}
    if before and after:
        figures["held memory"] = after - before
    if not host.peer.program:
        figures["held stop"] = stop * 1000
    return figures


def warm_up(host: Host, effort: Effort) -> Figures:
    """Compare the bytes before any time is taken; what is made once is made then."""
    host.ask("cycle", 0)
    if host.peer.has_port:
        with host.serving() as port:
            check(get(port))
            download(port)
    return {}


Measure = Callable[[Host, Effort], Figures]
WITHOUT_PORT: list[Measure] = [start_get_stop, many_tests]
WITH_PORT: list[Measure] = [
    *(functools.partial(kept_open, connections=number) for number in KEPT),
    new_at_once,
    large_body,
    held_open,
]


def attempt(measure: Measure, host: Host, effort: Effort) -> float:
    """Enter the figures of a round; the seconds that it took."""
    begin = time.perf_counter()
    try:
        for column, number in measure(host, effort).items():
            host.figures.setdefault(column, []).append(number)
    except (Failed, EOFError, OSError) as error:
        what = getattr(measure, "func", measure).__name__
        host.failure = f"{what}: {str(error) or type(error).__name__}"
        host.process.kill()
    return time.perf_counter() - begin


def measure_all(hosts: list[Host], measures: Iterable[Measure], effort: Effort) -> None:
    """Round by round; a slow peer gets fewer of them."""
    for measure in measures:
        spent = dict.fromkeys(hosts, 0.0)
        for number, host in itertools.product(range(effort.rounds), hosts):
            is_possible = host.peer.has_port or measure in WITHOUT_PORT
            is_due = not number or spent[host] < BUDGET
            if is_possible and is_due and not host.failure:
                spent[host] += attempt(measure, host, effort)


# What is printed

Columns = dict[str, tuple[str, ...]]  # the lines of the titles, the unit last


def columns_of_table(held: int) -> Columns:
    return {
        "cycle": ("start", "GET", "stop", "ms"),
        "tests": (f"{TESTS:,}", "tests", "", "s"),
        **{f"kept {number}": ("kept", "open", f"{number}", "GETs/s") for number in KEPT},
        "new p99": (f"{NEW}", "new at", "once", "p99 ms"),
        "large": ("large", "body", "", "MB/s"),
        "held p99": (f"{held:,}", "held", "GET", "p99 ms"),
        "held memory": (f"{held:,}", "held", "memory", "MB"),
    }


def columns_of_second_table(held: int) -> Columns:
    return {
        "one by one": ("new", "one by", "one", "GETs/s"),
        "new": (f"{NEW}", "new at", "once", "GETs/s"),
        **{f"kept {number} p99": ("kept", "open", f"{number}", "p99 ms") for number in KEPT},
        "held p50": (f"{held:,}", "held", "GET", "p50 ms"),
        "held stop": (f"{held:,}", "held", "stop", "ms"),
    }


def show(number: float) -> str:
    """Three significant digits."""
    digits = 2 - math.floor(math.log10(abs(number))) if number else 0
    return f"{round(number, digits):,.{max(digits, 0)}f}"


def show_figure(host: Host, column: str, effort: Effort) -> str:
    if column not in host.figures:
        return "failed" if host.failure else "-"
    number = statistics.median(host.figures[column])
    if number == math.inf:
        return f">{effort.late:.0f} s"
    is_extrapolated = host.is_extrapolated and column == "tests"
    return f"~{show(number)}" if is_extrapolated else show(number)


def print_table(hosts: list[Host], columns: Columns, effort: Effort) -> None:
    """As a simple table of reStructuredText."""
    rows = list(zip(("", "", "", "peer"), *columns.values()))
    rows += [(host.name, *(show_figure(host, name, effort) for name in columns)) for host in hosts]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    ruler = "  ".join("=" * width for width in widths)
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    print(ruler, *lines[:4], ruler, *lines[4:], ruler, "", sep="\n")


def say(text: str) -> None:
    print(textwrap.fill(text, WIDTH))


def spread(hosts: list[Host]) -> float:
    """How far rounds are from the median of their cell, in half of the cells."""
    cells = [numbers for host in hosts for numbers in host.figures.values() if len(numbers) > 1]
    spreads = [0.0]
    for numbers in cells:
        median = statistics.median(numbers)
        if median and max(numbers) < math.inf:
            spreads.append(max(max(numbers) / median - 1, 1 - min(numbers) / median))
    return statistics.median(spreads)


def print_notes(hosts: list[Host], effort: Effort) -> None:
    failed = []
    for host in hosts:
        numbers = [f"{number} {what}" for what, number in host.missing.items() if number]
        failed += [f"{host.name} {', '.join(numbers)}"] if numbers else []
    if failed:
        say(f"Connections that failed, or had no end in {effort.late:.0f} s: {'; '.join(failed)}.")
    busy = ", ".join(f"{host.name} ({host.busy:.0%})" for host in hosts if host.busy > 0.8)
    notes = f"The load came from {'wrk ' + version_of('wrk', '-v') if has_wrk() else 'this script'}"
    notes += f", which was itself the limit with {busy}." if busy else "."
    if effort.rounds > 1:
        notes += f" In half of the cells, all rounds are within {spread(hosts):.0%} of the median."
    say(notes)
    for host in hosts:
        if host.failure:
            say(f"{host.name} has failed: {host.failure}")


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


def print_machine(hosts: list[Host], load: tuple[float, ...]) -> None:
    facts = [time.strftime("%Y-%m-%d"), processor(), f"{os.cpu_count()} cores"]
    if load:
        facts.append(f"load average {load[0]:.2f} before")
    facts += [f"{platform.system()} {platform.release()}"]
    facts += [f"{platform.python_implementation()} {platform.python_version()}"]
    facts += [f"feedtestserver {feedtestserver.__version__}"]
    for host in hosts:
        if package := host.peer.package:
            facts.append(f"{package.replace('_', '-')} {importlib.metadata.version(package)}")
        if program := host.peer.program:
            facts.append(f"{program} {version_of(*PROGRAMS[program].version)}")
    say(", ".join(facts))


# Command line


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


def limit_connections(effort: Effort) -> Effort:
    most = max(allow_descriptors(max(4096, effort.held + SPARE)) - SPARE, 0)
    if most >= effort.held:
        return effort
    print(f"The system has descriptors for no more than {most:,} connections")
    return effort._replace(held=int(most), most=most)


def names_of_peers(text: str) -> list[str]:
    if unknown := ", ".join(set(text.split(",")) - set(PEERS)):
        raise argparse.ArgumentTypeError(f"no {unknown}; there are {', '.join(PEERS)}")
    return text.split(",")


def is_usable(name: str, folder: str) -> bool:
    package, program = PEERS[name].package, PEERS[name].program
    if not (shutil.which(program) if program else not package or importlib.util.find_spec(package)):
        print(f"{name} is left out, as it is not installed")
        return False
    if program:
        try:
            make_program(program, folder)
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", None) or str(error).encode()
            print(f"{name} is left out, as it does not build: {why.decode(errors='replace')[:200]}")
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    parser.add_argument("--all", action="store_true", help="print a second table, too")
    parser.add_argument("--rounds", type=int, help=f"{THOROUGH.rounds} by default")
    parser.add_argument(
        "--peers", type=names_of_peers, default=list(PEERS), help="names, with commas"
    )
    arguments = parser.parse_args()
    effort = limit_connections(QUICK if arguments.quick else THOROUGH)
    if arguments.rounds:
        effort = effort._replace(rounds=arguments.rounds)
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        folder = os.path.join(root, "served")
        os.mkdir(folder)
        pathlib.Path(folder, "feed.xml").write_bytes(FEED)
        pathlib.Path(folder, "episode.mp3").write_bytes(large_file())
        beside(folder, "wrk.lua").write_text(WRK)
        names = [name for name in PEERS if name in arguments.peers and is_usable(name, folder)]
        load = os.getloadavg() if hasattr(os, "getloadavg") else ()
        hosts: list[Host] = []
        for name in names:
            hosts.append(Host(name, folder))
            stack.callback(hosts[-1].end)
            attempt(warm_up, hosts[-1], effort)
        measure_all(hosts, WITHOUT_PORT + WITH_PORT, effort)
        print_table(hosts, columns_of_table(effort.held), effort)
        if arguments.all:
            measure_all(hosts, [one_by_one], effort)
            print_table(hosts, columns_of_second_table(effort.held), effort)
    print_notes(hosts, effort)
    print_machine(hosts, load)
    return 1 if any(host.failure for host in hosts) else 0


if __name__ == "__main__":
    sys.exit(main())
