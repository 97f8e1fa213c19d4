"""Runs servers by the thousand, and looks at what is left of them, and how long stop() takes.

Each trial has an interpreter of its own, under -X dev -W error, and may print nothing to stderr.
Trials are chosen by their names; without any, all are run, and after --but all others.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import http.client
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from feedtestserver import FeedTestServer, Request, Response, Step  # noqa: E402
from test_feedtestserver import hello_for, run_at_once  # noqa: E402

DATA = HERE / "data"
FEED = "/formats/rss20.rss"
PYTHON = [sys.executable, "-X", "dev", "-W", "error"]
PATIENCE = 60.0  # seconds; only a broken server makes anybody wait so long
GROWTH = 2048  # KiB by which a process may grow whatever it does
os.environ["no_proxy"] = "*"  # a proxy for the outer world is not for these fetches

GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"

TRIALS: dict[str, Callable[[], None]] = {}


def trial(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a trial into the table; it raises an exception where something is wrong."""
    TRIALS[function.__name__.replace("_", "-")] = function
    return function


def state() -> dict[str, int]:
    """What this process has: threads, descriptors, and memory in KiB where the system tells."""
    gc.collect()
    found = {"threads": threading.active_count(), "descriptors": len(os.listdir("/dev/fd"))}
    with contextlib.suppress(OSError):
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        found["KiB"] = pages * os.sysconf("SC_PAGE_SIZE") // 1024
    return found


@contextlib.contextmanager
def leaving_nothing(what: str) -> Iterator[None]:
    """A context that must end in the state in which it began, and with no file in the way."""
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        before, begin = state(), time.perf_counter()
        yield
        seconds, after = time.perf_counter() - begin, state()
        tempfile.tempdir = None
        before["files"], after["files"] = 0, len(os.listdir(folder))
    grown = after.pop("KiB", 0) - before.pop("KiB", 0)
    numbers = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in before)
    print(f"{what}: {seconds:.1f} s; {numbers}, memory {grown:+} KiB", flush=True)
    if before != after or grown > GROWTH:
        raise AssertionError("something is left")


def fetch(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", FEED)
        assert connection.getresponse().read()


# What is left


@trial
def one_after_the_other() -> None:
    def run(servers: int) -> None:
        for _ in range(servers):
            with FeedTestServer(DATA) as server:
                fetch(server.port)

    run(500)  # until all is loaded and all is allocated
    with leaving_nothing("5,000 servers, one after the other"):
        run(5000)


@trial
def with_https_and_look_ups() -> None:
    def run(servers: int) -> None:
        for number in range(servers):
            with FeedTestServer(DATA) as server, server.intercept(proxy=number % 2 == 0):
                meet_everything(server)

    run(50)
    with leaving_nothing("100 that were the whole Web: good and bad handshakes and look-ups"):
        run(100)


def meet_everything(server: FeedTestServer) -> None:
    """Fetch with and without a client certificate; then fail in each way that there is."""
    plain, showing = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for _ in range(2))
    showing.load_cert_chain(server.client_certificate())
    url = "https://example.com/feed.xml"
    server.respond(url, b"<rss/>")

    def fail() -> None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=0.05, context=plain).close()
            raise AssertionError("it was fetched")

    urllib.request.urlopen(url, timeout=PATIENCE, context=plain).close()
    server.client_certificates = "required"
    urllib.request.urlopen(url, timeout=PATIENCE, context=showing).close()
    fail()
    server.client_certificates, server.certificate = "none", "expired"
    fail()
    server.certificate = "valid"
    for server.handshake in ("reset", "close", "stall"):
        fail()
    server.handshake = "complete"
    for answer in ("unknown", "refused", "silent"):
        server.resolve("example.com", answer)
        fail()


@trial
def down_and_back() -> None:
    def run(times: int) -> None:
        with FeedTestServer(DATA) as server:
            server.respond("/x", Response(bytes(1000), pause=["9999 at 50%"]))
            for _ in range(times):
                address = "127.0.0.1", server.port
                with (
                    socket.create_connection(address, PATIENCE),
                    socket.create_connection(address, PATIENCE) as paused,
                ):
                    paused.sendall(GET % b"x")
                    assert paused.recv(1000)
                    with server.down(), socket.socket() as refused:
                        assert refused.connect_ex(address)
                fetch(server.port)
            server.clear()  # or the record would grow

    run(100)
    with leaving_nothing("a server that was down 500 times"):
        run(500)


@trial
def on_the_command_line() -> None:
    """Each line is an object, whoever asks at once, and none is missing."""
    command = [*PYTHON, "-m", "feedtestserver", str(DATA), "--port", "0", "--json"]
    requests = 16 * 100
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        port = int(json.loads(process.stdout.readline())["url"].rstrip("/").rpartition(":")[2])
        lines: list[str] = []
        reading = threading.Thread(target=lines.extend, args=[process.stdout])
        reading.start()
        run_at_once([lambda: [fetch(port) for _ in range(requests // 16)]] * 16)
        process.terminate()
        reading.join(PATIENCE)
        assert process.wait(PATIENCE) == 0
    kinds = collections.Counter(kind for line in lines for kind in json.loads(line))
    print(f"--json: {dict(kinds)}")
    assert kinds["request"] == requests


@trial
def at_once() -> None:
    def run(number: int) -> None:
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(FeedTestServer(DATA)) for _ in range(number)]
            for server in servers:
                fetch(server.port)

    run(200)
    with leaving_nothing("200 servers at once"):
        run(200)


#: How many connections wait, and how many of them for code of the test.
WAITING, IN_TEST_CODE = 1000, 10


@trial
def waiting() -> None:
    run_waiting()
    with leaving_nothing(f"{WAITING} connections that are paused or streaming"):
        threads = run_waiting()
    print(f"meanwhile {threads} threads more, of which {IN_TEST_CODE} run code of the test")
    assert threads == 1 + IN_TEST_CODE, "there are threads for what does not need any"


def run_waiting() -> int:
    """Have connections wait in the middle of a response; returns how many threads that takes."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def blocks() -> Iterator[bytes]:
        begun.release()
        go_on.wait(PATIENCE)
        yield b"ended"

    def items() -> Iterator[bytes]:
        yield from itertools.repeat(b"item", 1000)

    steps: dict[str, Callable[[], Response]] = {
        "/paused": lambda: Response(bytes(1000), pause=["9999 at 50%"]),
        "/slow": lambda: Response(bytes(1000), rate=1, chunked=10),
        "/paused-stream": lambda: Response(items(), pause=["9999 at 10"]),
        "/slow-stream": lambda: Response(items(), rate=1),
        "/code": lambda: Response(blocks()),
    }
    paths = [*itertools.islice(itertools.cycle([*steps][:-1]), WAITING - IN_TEST_CODE)]
    paths += ["/code"] * IN_TEST_CODE
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(FeedTestServer(DATA))
        for path, step in steps.items():
            server.respond(path, *(step() for _ in range(paths.count(path))))
        for path in paths:
            address = "127.0.0.1", server.port
            connection = stack.enter_context(socket.create_connection(address, PATIENCE))
            connection.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
            assert connection.recv(1000)  # the head; the rest waits
        for _ in range(IN_TEST_CODE):
            assert begun.acquire(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        # What has produced an item is about to end.
        while threading.active_count() - before > 1 + IN_TEST_CODE and time.monotonic() < deadline:
            time.sleep(0.01)
        threads = threading.active_count() - before
        go_on.set()
    return threads


@trial
def in_processes() -> None:
    children = [
        subprocess.Popen([*PYTHON, __file__, "one-of-many"], stdout=-1, stderr=subprocess.STDOUT)
        for _ in range(16)
    ]
    outputs = [child.communicate(timeout=PATIENCE)[0].decode() for child in children]
    print("16 processes at once, each with", outputs[0], end="")
    assert all(child.returncode == 0 for child in children), "\n".join(outputs)


def one_of_many() -> None:
    def run() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(50):
                fetch(stack.enter_context(FeedTestServer(DATA)).port)

    run()
    with leaving_nothing("50 servers"):
        run()


# Children


def be_a_child(port: int) -> None:
    """Ask the parent's server, and start one more, as the child of a test may do."""
    fetch(port)
    with FeedTestServer(DATA) as server:
        fetch(server.port)


@trial
def beside_children() -> None:
    # Of fork() beside threads, which is what this is about.
    warnings.simplefilter("ignore", DeprecationWarning)
    for method in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context(method)
        with FeedTestServer(DATA) as server:
            fetch(server.port)
            target = functools.partial(be_a_child, server.port)
            children = [context.Process(target=target) for _ in range(20)]
            for child in children:
                child.start()
                fetch(server.port)
            for child in children:
                child.join(PATIENCE)
            statuses = [child.exitcode for child in children]
            fetch(server.port)
            count = len(server.requests)
        print(f"20 children by {method}: statuses {set(statuses)}, requests {count}", flush=True)
        assert (set(statuses), count) == ({0}, 42), "the parent's server is not what it was"


# The end of an interpreter that has never stopped its server

CONVERSATION = """
import socket, sys, threading, feedtestserver
from feedtestserver import Response
server = feedtestserver.FeedTestServer(sys.argv[1])
server.start()
GET = b"GET /x HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"
entered = threading.Event()

def connect(sent, wait_for=0):
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(sent)
    connection.recv(wait_for)
    connection.detach()  # it is open until the end, and that is not to be warned of

def wait(request):
    entered.set()
    threading.Event().wait()

"""
ENDS = {
    "at once": "",
    "after an answer": "connect(GET, 1)",
    "in half a request": "connect(b'GET / HT')",
    "in half a handshake": "connect(bytes([22, 3, 1, 2, 0, 1]))",
    "stalled": "server.respond('/x', Response(fault='stall at headers')); connect(GET, 1)",
    "in a delay": "server.respond('/x', Response(delay=9999)); connect(GET);"
    " server.wait_for_request()",
    "in a body that is not read": "server.respond('/x', Response(bytes(50_000_000)));"
    " connect(GET, 1)",
    "in a callable": "server.respond('/x', wait); connect(GET); entered.wait()",
    "with a file of the CA": "server.ca_file",
    "as the whole Web": "server.intercept().__enter__()",
    "by an exception": "raise SystemExit(0)",
}


@trial
def never_stopped() -> None:
    with leaving_nothing(f"{len(ENDS)} interpreters that have never stopped their server"):
        for when, end in ENDS.items():
            command = [*PYTHON, "-c", CONVERSATION + end, str(DATA)]
            environment = {**os.environ, "TMPDIR": tempfile.gettempdir(), "PYTHONPATH": str(HERE)}
            done = subprocess.run(
                command, env=environment, timeout=PATIENCE, capture_output=True, check=False
            )
            assert (done.returncode, done.stderr) == (0, b""), f"{when}: {done}"


# How long stop() takes

HELLO = hello_for("example.com")
ANSWERS: dict[str, Step] = {
    "/large": Response(bytes(20_000_000)),
    "/stalled": Response(bytes(1000), fault="stall at 50%"),
    "/delayed": Response(delay=9999),
    "/dripping": Response(bytes(100_000), rate=100),
    "/paused": Response(bytes(1000), pause=["9999 at 50%"]),
    "/streaming": lambda request: Response(itertools.repeat(b"item"), rate=100),
}
#: How many of each, and what they have sent.
CONNECTIONS = {
    "idle": (100, b""),
    "half-sent": (100, b"GET / HT"),
    "unread large": (50, GET % b"large"),
    "stalled": (50, GET % b"stalled"),
    "delayed": (50, GET % b"delayed"),
    "dripping": (50, GET % b"dripping"),
    "paused": (50, GET % b"paused"),
    "streaming": (20, GET % b"streaming"),
    "half a handshake": (25, HELLO[:100]),
    "hello, and no more": (25, HELLO),
    "stalled handshake": (25, HELLO),
    "tunnel": (25, b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n"),
}
LIMIT = 50  # milliseconds that stop() may take, but for one in a hundred
TIMES_FLOOR = 3  # or so many times what bare threads take, where the machine is busy


def connections_to(server: FeedTestServer, kinds: Iterable[str]) -> list[socket.socket]:
    """Open them, and return once the server has read what they have sent."""
    connections = []
    for kind in kinds:
        number, sent = CONNECTIONS[kind]
        server.handshake = "stall" if kind == "stalled handshake" else "complete"
        for _ in range(number):
            address = "127.0.0.1", server.port
            connections.append(socket.create_connection(address, PATIENCE))
            connections[-1].sendall(sent)
        if sent.startswith(b"GET /") and sent.endswith(b"\r\n\r\n"):
            server.wait_for_request(sent.split()[1].decode(), times=number, timeout=PATIENCE)
        fetch(server.port)  # its connection is accepted and read after the others
    return connections


class Arrivals:
    """A child that goes on connecting to a port until it is refused."""

    def __init__(self) -> None:
        command = [*PYTHON, __file__, "arrive"]
        self.child = subprocess.Popen(command, stdin=-1, stdout=-1, bufsize=0)

    def at(self, port: int) -> None:
        """Have it connect there; returns when it is at it."""
        assert self.child.stdin and self.child.stdout
        self.child.stdin.write(b"%d\n" % port)
        self.child.stdout.readline()

    def end(self) -> None:
        self.child.communicate(timeout=PATIENCE)
        assert self.child.returncode == 0


def arrive() -> None:
    for line in sys.stdin:
        with contextlib.ExitStack() as stack, contextlib.suppress(ConnectionError):
            for number in itertools.count():
                address = "127.0.0.1", int(line)
                connection = stack.enter_context(socket.create_connection(address, PATIENCE))
                connection.sendall(b"GET / HT")
                if number == 0:
                    print("begun", flush=True)


def time_of_stop(kinds: Iterable[str], way: Way, arrivals: Arrivals) -> float:
    """Milliseconds that it takes to stop a server with such connections, and new ones arriving."""
    server = FeedTestServer(DATA)
    server.stop()  # which does nothing yet
    for path, answer in ANSWERS.items():
        server.respond(path, answer)
    server.respond("https://a.example/", b"")  # opens a tunnel
    server.start()
    stop = way(server)
    connections = connections_to(server, kinds)
    arrivals.at(server.port)
    begin = time.perf_counter()
    stop()
    milliseconds = (time.perf_counter() - begin) * 1000
    server.stop()
    with FeedTestServer(DATA, port=server.port, bind_timeout=0):
        pass  # the port was free at once
    for connection in connections:
        connection.close()
    return milliseconds


def time_of_threads(number: int) -> float:
    """Milliseconds to wake up so many threads that wait for their connection, and to join them."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=number))
        accepted, threads = [], []
        for _ in range(number):
            stack.enter_context(socket.create_connection(listening.getsockname(), PATIENCE))
            accepted.append(stack.enter_context(listening.accept()[0]))
            threads.append(threading.Thread(target=accepted[-1].recv, args=[1]))
            threads[-1].start()
        begin = time.perf_counter()
        for connection in accepted:
            connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        return (time.perf_counter() - begin) * 1000


# Each way is prepared before the others connect, and returns what stops the server.


def by_itself(server: FeedTestServer) -> Callable[[], None]:
    return server.stop


def by_ten_threads(server: FeedTestServer) -> Callable[[], None]:
    return functools.partial(run_at_once, [server.stop] * 10)


def by_request(server: FeedTestServer, sent: bytes) -> Callable[[], None]:
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE)

    def stop() -> None:
        with connection:
            connection.sendall(sent)
            while connection.recv(65536):
                pass
        server.stop()

    return stop


def by_a_callable(server: FeedTestServer) -> Callable[[], None]:
    def answer(request: Request) -> bytes:
        server.stop()
        return b"stopped"

    server.respond("/stop", answer)
    return by_request(server, GET % b"stop")


def by_quit(server: FeedTestServer) -> Callable[[], None]:
    return by_request(server, b"QUIT / HTTP/1.0\r\n\r\n")


def by_down(server: FeedTestServer) -> Callable[[], None]:
    """Not for good, but the connections have ended then, too."""

    def down() -> None:
        with server.down():
            pass

    return down


Way = Callable[[FeedTestServer], Callable[[], None]]
WAYS: dict[str, Way] = {
    "stop()": by_itself,
    "ten threads": by_ten_threads,
    "a callable": by_a_callable,
    "QUIT": by_quit,
    "down()": by_down,
}


@trial
def stop() -> None:
    everything = "all of these", list(CONNECTIONS)
    rows = [(kind, [kind], "stop()", 10) for kind in CONNECTIONS]
    rows += [(*everything, way, 20 if way == "stop()" else 5) for way in WAYS]
    print(f"{'ms to stop':20} {'connections':>11} {'stopped by':11}  p50   p99 | threads   p99")
    arrivals = Arrivals()
    late = []
    for name, kinds, way, stops in rows:
        number = sum(CONNECTIONS[kind][0] for kind in kinds)
        times = sorted(time_of_stop(kinds, WAYS[way], arrivals) for _ in range(stops))
        floor = sorted(time_of_threads(number) for _ in range(stops))
        median, last = stops // 2, math.ceil(stops * 0.99) - 1
        print(f"{name:20} {number:11} {way:11} {times[median]:4.1f} {times[last]:5.1f} |", end="")
        print(f"    {floor[median]:4.1f} {floor[last]:5.1f}", flush=True)
        if times[last] > max(LIMIT, TIMES_FLOOR * floor[last]):
            late.append(f"{name} by {way}")
        elif times[last] > LIMIT:
            print(f"  more than {LIMIT} ms, but less than {TIMES_FLOOR} times bare threads")
    arrivals.end()
    assert not late, f"stop() takes too long: {', '.join(late)}"


def run(name: str) -> bool:
    """Run a trial in an interpreter of its own; whether all was well."""
    done = subprocess.run([*PYTHON, __file__, name, "--here"], stderr=subprocess.PIPE, check=False)
    sys.stderr.write(done.stderr.decode())
    return done.returncode == 0 and not done.stderr


def allow_descriptors() -> None:
    """As many as the system lets this process have; both ends of each connection take one."""
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(arguments: list[str]) -> int:
    allow_descriptors()
    parts = {"arrive": arrive, "one-of-many": one_of_many}
    if arguments[:1] and arguments[0] in parts:
        parts[arguments[0]]()
        return 0
    if arguments[1:] == ["--here"]:
        TRIALS[arguments[0]]()
        return 0
    names = arguments or list(TRIALS)
    if arguments[:1] == ["--but"]:
        names = [name for name in TRIALS if name not in arguments]
    wrong = [name for name in names if not run(name)]
    print(f"trials: {len(names)}, wrong: {wrong or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
