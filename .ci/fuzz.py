"""Begins 10,000 connections with anything but a proper request, and looks at what is left of them.

What is sent is random bytes, ClientHellos and requests with some bytes changed, cut anywhere. The
seed is printed; give it as the argument to send the same again.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import pathlib
import random
import resource
import socket
import sys
import threading
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from feedtestserver import FeedTestServer  # noqa: E402
from test_feedtestserver import hello_for  # noqa: E402

CONNECTIONS, CLIENTS = 10_000, 8
PATIENCE = 30.0  # seconds; only a broken server makes a client wait for it


HELLO = hello_for("example.com")
TUNNEL = b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"
BEGINNINGS = [
    HELLO,
    TUNNEL,
    TUNNEL + HELLO,
    TUNNEL + b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n",
    b"GET http://example.com/feed.xml HTTP/1.1\r\nHost: example.com\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
]


def beginning(chance: random.Random) -> bytes:
    if chance.random() < 0.2:
        return chance.randbytes(chance.randrange(1, 200))
    sent = bytearray(chance.choice(BEGINNINGS))
    for _ in range(chance.randrange(6)):
        sent[chance.randrange(len(sent))] = chance.randrange(256)
    return bytes(sent[: chance.randrange(1, len(sent) + 1)])


def send(port: int, sent: bytes) -> None:
    """Send it, say that this is all, and read what comes to its end."""
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


def state() -> dict[str, int]:
    gc.collect()
    return {"threads": threading.active_count(), "descriptors": len(os.listdir("/dev/fd"))}


def settle(server: FeedTestServer) -> None:
    """Wait until the server has no connection left, as its threads end them after the clients."""
    assert server._httpd is not None
    deadline = time.monotonic() + PATIENCE
    while server._httpd._connections and time.monotonic() < deadline:
        time.sleep(0.01)


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(2**32)
    logging.getLogger("feedtestserver").disabled = True
    before = state()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failed: list[BaseException] = []
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        FeedTestServer(HERE / "data") as server,
        server.intercept(),
    ):

        def run(number: int) -> None:
            chance = random.Random(seed + number)
            try:
                for _ in range(CONNECTIONS // CLIENTS):
                    send(server.port, beginning(chance))
            except BaseException as error:
                failed.append(error)

        begin = time.perf_counter()
        clients = [threading.Thread(target=run, args=[number]) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        seconds = time.perf_counter() - begin
        settle(server)
        server.respond("https://example.com/feed.xml", b"<rss/>")
        with urllib.request.urlopen("https://example.com/feed.xml", timeout=PATIENCE) as answer:
            alive = answer.read() == b"<rss/>"
        left = state()["descriptors"] - before["descriptors"]
        wrong = [error for error in server.errors if "no such host here" not in error]
    after = state()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    print(
        f"seed {seed}: {CONNECTIONS} connections in {seconds:.1f} s; {grown} KiB more at the peak"
    )
    print(f"before {before}, after {after}; descriptors of the running server: {left}")
    print("alive" if alive else "not alive", *failed, *wrong, said.getvalue(), sep="\n")
    is_well = alive and before == after and left < CLIENTS
    return 0 if is_well and not (failed or wrong or said.getvalue()) else 1


if __name__ == "__main__":
    sys.exit(main())
