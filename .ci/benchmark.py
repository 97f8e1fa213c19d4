"""Compares this server with bare sockets, http.server, and what else of its kind is installed.

Each peer lives in a process of its own, and this one is the client of those that have a port. Each
round goes from peer to peer, so that what else the machine does meets all of them. A cell has the
median of its rounds, and in parentheses how many times slower than bare sockets that is. Every
answer is compared with its file; the status is 1 where one is wrong, or a peer fails or hangs.
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
import selectors
import signal
import socket
import statistics
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import feedtestserver  # noqa: E402

FEED = b"<rss><channel>%s</channel></rss>" % b"".join(b"<item>%04d</item>" % n for n in range(120))
LARGE = 50_000_000  # bytes
CONNECTIONS, TESTS = 512, 1000
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


THOROUGH = Effort(rounds=5, seconds=0.15, budget=1, limit=2, late=10)
QUICK = Effort(rounds=1, seconds=0.05, budget=0, limit=0.5, late=1)

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


def rate(act: Callable[[], object], seconds: float) -> float:
    """How often in a second this can be done; it is done at least once."""
    begin = time.perf_counter()
    for count in itertools.count(1):
        act()
        if (spent := time.perf_counter() - begin) >= seconds:
            return count / spent
    raise AssertionError


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


@contextlib.contextmanager
def floor(folder: str) -> Iterator[int]:
    """Bare sockets: one thread, which reads and sends what it has ready."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * CONNECTIONS) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=be_floor, args=[listening, answers(folder)], daemon=True)
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


class Peer(NamedTuple):
    serving: Callable[[str], contextlib.AbstractContextManager[int]]
    package: str = ""
    get: Callable[[int], bytes] = get


PEERS = {
    "floor": Peer(floor),
    "http.server": Peer(http_server),
    "http.server-tuned": Peer(
        functools.partial(http_server, protocol="HTTP/1.1", poll_interval=0.01)
    ),
    "feedtestserver": Peer(this_server),
    "pytest-httpserver": Peer(pytest_httpserver, "pytest_httpserver"),
    "pytest-httpserver-threaded": Peer(
        functools.partial(pytest_httpserver, threaded=True), "pytest_httpserver"
    ),
    "aiohttp": Peer(aiohttp, "aiohttp"),
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


def allow_descriptors() -> None:
    """A connection and a file for each client may be more than a system allows at first."""
    with contextlib.suppress(ImportError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 4096 if most == resource.RLIM_INFINITY else min(4096, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def be_host(name: str, folder: str, pipe: multiprocessing.connection.Connection) -> None:
    """Do what the other end asks for, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the other end that is interrupted
    os.environ["no_proxy"] = "*"
    for noisy in ("werkzeug", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    allow_descriptors()
    acts: dict[str, Callable[..., Any]] = {"cycle": cycle, "get": get_here, "tests": run_tests}
    with contextlib.suppress(EOFError, OSError):
        while True:
            act, *arguments = pipe.recv()
            try:
                if act == "serve":
                    with PEERS[name].serving(folder) as port:
                        pipe.send((True, port))
                        pipe.recv()
                    pipe.send((True, None))
                else:
                    pipe.send((True, acts[act](PEERS[name], folder, *arguments)))
            except Exception as error:
                pipe.send((False, f"{type(error).__name__}: {error}"))


class Host:
    """The process of a peer, as it is seen from this one, and what has been measured there."""

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self.has_port = PEERS[name].get is get
        self.cells: dict[Column, list[float]] = {}
        self.unfinished: list[int] = []
        self.is_scaled = False
        self.failure = ""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=be_host, args=(name, folder, theirs), daemon=True)
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

    def end(self) -> None:
        self.pipe.close()
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


# What is measured: a number for each column, or none where the peer has no such thing


def start_get_stop(host: Host, effort: Effort) -> list[float]:
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
        head = get_again(connection).partition(b"\r\n\r\n")[0].lower()
        if head.startswith(b"http/1.0") or b"connection: close" in head:
            return []
        return [rate(lambda: get_again(connection), effort.seconds)]


def many_at_once(host: Host, effort: Effort) -> list[float]:
    if not host.has_port:
        return []
    with host.serving() as port:
        begin = time.perf_counter()
        times = sorted(get_at_once(port, effort.late))
        seconds = time.perf_counter() - begin
    host.unfinished.append(times.count(math.inf))
    finished = CONNECTIONS - host.unfinished[-1]
    return [finished / seconds, times[math.ceil(CONNECTIONS * 0.99) - 1] * 1000]


def large_body(host: Host, effort: Effort) -> list[float]:
    if not host.has_port:
        return []
    with host.serving() as port:
        return [LARGE / 1e6 / download(port)]


def many_tests(host: Host, effort: Effort) -> list[float]:
    seconds, number = host.ask("tests", effort.limit)
    host.is_scaled |= number < TESTS
    return [seconds * TESTS / number]


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
        for column, number in zip(WORKLOADS.get(measure, []), measure(host, effort)):
            host.cells.setdefault(column, []).append(number)
    except (Failed, EOFError, OSError) as error:
        host.failure = f"{measure.__name__}: {str(error) or type(error).__name__}"
        host.process.kill()
    return time.perf_counter() - begin


def measure_all(hosts: list[Host], effort: Effort) -> None:
    """Round by round; a slow peer, whose time is used up, has fewer of them."""
    for measure in WORKLOADS:
        spent = dict.fromkeys(hosts, 0.0)
        for number in range(effort.rounds):
            for host in hosts:
                if not host.failure and (not number or spent[host] < effort.budget):
                    spent[host] += attempt(measure, host, effort)


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


def print_table(hosts: list[Host], late: float) -> None:
    """A simple table of reStructuredText."""
    columns = [column for columns in WORKLOADS.values() for column in columns]
    rows = list(zip(("peer", "", ""), *(column.title for column in columns)))
    for host in hosts:
        cells = [show_cell(host, hosts[0], column, late) for column in columns]
        rows += zip((host.name, ""), *cells)
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    ruler = "  ".join("=" * width for width in widths)
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    print(ruler, *lines[:3], ruler, *lines[3:], ruler, "", sep="\n")


def print_notes(hosts: list[Host], late: float) -> None:
    spreads = [0.0]
    for host in hosts:
        if any(host.unfinished):
            counts = ", ".join(map(str, host.unfinished))
            print(f"{host.name}: {counts} of {CONNECTIONS} have failed, or had no end in {late} s.")
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


def print_machine(names: list[str], used: str) -> None:
    facts = [time.strftime("%Y-%m-%d"), processor(), f"{os.cpu_count()} cores"]
    facts += [f"{used} used by others before", f"{platform.system()} {platform.release()}"]
    facts += [f"{platform.python_implementation()} {platform.python_version()}"]
    facts += [f"feedtestserver {feedtestserver.__version__}"]
    for package in sorted({PEERS[name].package for name in names} - {""}):
        facts.append(f"{package.replace('_', '-')} {importlib.metadata.version(package)}")
    print(textwrap.fill(", ".join(facts), 100))


# Command line


def peers(names: str) -> list[str]:
    unknown = ", ".join(set(names.split(",")) - set(PEERS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no {unknown}; there are {', '.join(PEERS)}")
    return names.split(",")


def is_installed(name: str) -> bool:
    package = PEERS[name].package
    if package and not importlib.util.find_spec(package):
        print(f"{name} is left out, as it is not installed")
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--peers", type=peers, default=list(PEERS), help="names, with commas")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else THOROUGH
    # The floor, which the others are compared with, is always there, and the first.
    names = [name for name in PEERS if name in ("floor", *arguments.peers) and is_installed(name)]
    allow_descriptors()
    used = used_by_others()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pathlib.Path(folder, "feed.xml").write_bytes(FEED)
        pathlib.Path(folder, "episode.mp3").write_bytes(large_file())
        hosts = [Host(name, folder) for name in names]
        for host in hosts:
            stack.callback(host.end)
            attempt(warm_up, host, effort)
        measure_all(hosts, effort)
    print_table(hosts, effort.late)
    print_notes(hosts, effort.late)
    print_machine(names, used)
    return 1 if any(host.failure for host in hosts) else 0


if __name__ == "__main__":
    sys.exit(main())
