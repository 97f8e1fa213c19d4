# SPDX-License-Identifier: 0BSD
"""A real HTTP server for the tests of feed readers and other HTTP clients, in one file to copy.

A whole test, with the fixture ``data/feed.xml`` that it fetches::

    import unittest
    import urllib.request
    from feedtestserver import FeedTestServerMixin

    class FetchTest(FeedTestServerMixin, unittest.TestCase):
        def test_sends_a_user_agent(self):
            with urllib.request.urlopen(self.get_url("feed.xml")) as answer:
                self.assertEqual(answer.headers["ETag"], '"v1"')
            request = self.assertRequested("/feed.xml", times=1)
            self.assertIn("Python-urllib", request.headers["User-Agent"])

The fixture says, in a comment, how it is to be served::

    <?xml version="1.0" encoding="utf-8"?>
    <!--
    Header: ETag: "v1"
    Header: Cache-Control: max-age=3600
    Description: a feed that can be fetched conditionally
    -->
    <rss version="2.0"><channel><title>Example</title></channel></rss>

What cannot hold a comment (JSON, gzip, pictures) has the same lines in a file beside it,
``feed.json.headers``. The directives:

    Header: NAME: VALUE      one field line of the answer, sent as it stands; repeats are kept
    Status: CODE [REASON]    the status code, from 200 to 599, and maybe the reason phrase
    Without: NAME            leave out a field that the server would add, such as Content-Type
    Ignore: NAME             act as if the client had not sent this field, such as If-None-Match
    Compress: gzip|deflate   encode the body and say so, whatever the client accepts
    Chunked: SIZE            send the body in chunks of SIZE bytes
    Delay: SECONDS           wait before the status line
    Rate: BYTES              send so many bytes of the body a second, evenly
    Fault: close|reset|stall [at start|headers|N|N%]
                             end the connection (FIN, RST) or never go on: before the status line,
                             after the headers, or when N bytes of the body have arrived
    Template: yes            expand {{base_url}}, {{host}} and {{port}} in the body

Every other key (``Description``, ``Expect``, ...) is kept for the test to read. What is malformed
on purpose stands in a file ``NAME.asis``, a whole answer that is sent as it is. What a fixture can
say, ``Response`` can say, in the same words, and a test can say when::

    self.server.respond("/feed.xml", "v1.xml", 503, Response(delay=2, fault="reset at 50%"))

``self.assertPolite()`` tells what the client did wrong, as the owner of a feed would see it.

HTTPS is spoken on the same port, ``self.get_url("feed.xml", "https")``, with certificates that are
made when they are needed. Inside of ``with self.server.intercept():`` the server is the whole Web:
what fetches ``https://example.com/feed.xml`` gets ``data/example.com/feed.xml``.

The life of a request, in the order of this file:

    FeedTestServer           the thread that a test starts and stops
    StoppableHttpServer      accepts connections until it is told to stop
    FeedTestRequestHandler   reads a request, finds who answers, plans, records, sends
    _parse_head              what a request may look like
    _load                    from a URL to a fixture
    parse_directives         from a fixture's comments to what they ask for
    Response, _plan          the answer as a value, decided before its first byte
    Request                  what came in, as it is kept on record
    _write                   the bytes on the wire

and what there is beside it:

    audit                    what the client did wrong, by the record
    _Tls                     the same bytes in TLS
    _Authority               the certificates that TLS needs
    _Interception            what makes every host lead to the server
    FeedTestServerMixin      a server for each test, and assertions on its record
    main                     the command line: python feedtestserver.py [DIRECTORY]
"""

from __future__ import annotations

import codecs
import contextlib
import datetime
import email.utils
import errno
import functools
import gc
import html
import http
import http.client
import http.server
import importlib
import io
import itertools
import math
import os
import pathlib
import re
import select
import socket
import socketserver
import stat
import struct
import sys
import textwrap
import threading
import time
import types
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, TextIO, Union
from wsgiref.headers import Headers


class _Lazy(types.ModuleType):
    """A module that is imported when it is first used."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)


# Most tests do not need these, and they would double the import time. A module that a single
# function needs is imported in it.
if TYPE_CHECKING:
    import difflib
    import logging
    import ssl
    import tempfile
    import unittest

    _TestCase = unittest.TestCase
else:
    difflib, ssl, tempfile = _Lazy("difflib"), _Lazy("ssl"), _Lazy("tempfile")
    _TestCase = object

__all__ = [
    "DirectiveError",
    "Directives",
    "FeedTestRequestHandler",
    "FeedTestServer",
    "FeedTestServerMixin",
    "Finding",
    "Fixture",
    "HeaderFields",
    "Request",
    "Response",
    "Step",
    "StoppableHttpServer",
    "audit",
    "parse_directives",
    "stop_server",
]
__version__ = "1.0.0"
__unittest = True  # so that the traceback of a failed assertion ends in the test, not in here

#: The origin, the path and the query of a URL, as ``respond()`` compares them.
_Address = tuple[str, str, Optional[str]]

#: Where a server that is bound to all addresses is to be reached.
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}

# The thread that a test starts and stops


class FeedTestServer(threading.Thread):
    """A server for the fixtures in a directory, in a thread of its own.

    ``directory`` is made absolute here and must exist when the server is started. ``host`` is the
    address to listen at, "0.0.0.0" for all. ``port`` 0 takes any free port. A fixed port that is in
    use is tried again until ``bind_timeout`` seconds have passed. Use it as a context manager, or
    call ``start()`` and ``stop()``.
    """

    #: The class that answers requests; a subclass of FeedTestRequestHandler may add do_ methods.
    handler_class: type[FeedTestRequestHandler]
    #: Seconds that stop() waits for a callable that is still running.
    stop_timeout = 5.0
    #: Tells the time in seconds since the epoch: for the Date field and for the record.
    clock: Callable[[], float]

    def __init__(
        self,
        directory: Union[str, os.PathLike[str]] = "data",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        bind_timeout: float = 10.0,
    ) -> None:
        super().__init__(name="feedtestserver", daemon=True)
        self.directory = os.path.abspath(directory)
        self.host = host
        self.port = port
        self.bind_timeout = bind_timeout
        self.clock = time.time
        self._timer = _Timer()
        self._changed = threading.Condition()
        self._httpd: Optional[StoppableHttpServer] = None
        self._pid = os.getpid()
        self._starting: Optional[threading.Thread] = None  # who is in start() just now
        self._connection_numbers = itertools.count(1)
        self._requests: list[Request] = []
        self._errors: list[str] = []
        self._scripts: dict[_Address, _Script] = {}
        self._unanswered: dict[Request, None] = {}  # in the order of their arrival
        self._certificate = "valid"
        self._files: dict[str, str] = {}  # the paths of temporary files, by their names
        self._intercepting = 0
        self._led_here: set[socket.socket] = set()  # connections that intercept() has led here

    # Starting and stopping

    def start(self) -> None:
        """Start to serve; on return, connections are accepted.

        Raises OSError where the directory is missing or the port cannot be had, RuntimeError where
        the server was started before. No thread and no socket is left then.
        """
        with self._changed:
            if self._starting or self._httpd:
                raise RuntimeError("a server is started once only; make a new FeedTestServer")
            self._starting = threading.current_thread()
        try:
            _require_directory(self.directory)
            _logger()  # imported later, out of descriptors or beside a fork(), it could fail
            self._begin_to_serve()
        finally:
            with self._changed:
                self._starting = None
                self._changed.notify_all()

    def _begin_to_serve(self) -> None:
        """Take the port, and serve it in the new thread."""
        self._httpd = httpd = self._bind()
        self._pid = os.getpid()
        try:
            self.port = httpd.server_port
            super().start()
            with self._changed:
                self._changed.wait_for(lambda: httpd.serving or httpd.stopping)
        except BaseException:
            httpd.request_shutdown()
            if self.ident is not None:
                self.join()
            self._httpd = None
            raise

    def _bind(self) -> StoppableHttpServer:
        """Take the port, again after 20 ms while somebody else has it."""
        deadline = time.monotonic() + self.bind_timeout
        handler = functools.partial(self.handler_class, self)
        while True:
            try:
                return StoppableHttpServer(
                    (self.host, self.port), handler, handler_makes_way=True, changed=self._changed
                )
            except OverflowError as error:
                raise OSError(errno.EINVAL, f"there is no port {self.port}: {error}") from error
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                    where = f"port {self.port} of {self.host} cannot be had: {error.strerror}"
                    raise OSError(error.errno, where) from error
            gc.collect()  # so that a leaked socket lets go of the port
            time.sleep(0.02)

    def run(self) -> None:
        """Serve until told to stop; start() calls this in the new thread."""
        assert self._httpd is not None
        self._httpd.serve_forever()

    def stop(self) -> None:
        """End the server and all its connections, at once; on return nothing of it is left.

        Waits ``stop_timeout`` seconds for a callable that is still running, then raises a
        RuntimeError that names its request. Before ``start()``, once all has ended, and in a forked
        child it does nothing. Called from inside a callable it does not wait for that one.
        """
        httpd = self._httpd
        if httpd is None or self._pid != os.getpid():
            return
        if sys.is_finalizing():  # its threads have been stopped, maybe with a lock in their hands
            _remove(self._files, self._pid)
            return
        httpd.request_shutdown()
        with self._changed:
            self._changed.wait_for(lambda: self._starting in (None, threading.current_thread()))
            _remove(self._files, self._pid)
        if not httpd.join(self.stop_timeout):
            with self._changed:
                running = ", ".join(str(request) for request in self._unanswered) or "?"
            raise RuntimeError(
                f"stop() waited {self.stop_timeout:g} s for the callable that answers"
                f" {running}; it must come to an end by itself"
            )
        if self.ident is not None and not httpd.employs(threading.current_thread()):
            self.join()
            # The handler class holds this server; without the cycle it goes with its last user.
            httpd.RequestHandlerClass = socketserver.BaseRequestHandler

    def _wait_ended(self, timeout: Optional[float] = None) -> bool:
        """Wait until QUIT or stop() ended the server, its last answer included; tell whether."""
        return self._httpd is None or self._httpd.join(timeout)

    def __enter__(self) -> FeedTestServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    # Where it is, and what it serves

    @property
    def ready(self) -> bool:
        """Whether connections are accepted."""
        return self._httpd is not None and self._httpd.serving

    @functools.cached_property
    def base_url(self) -> str:
        """The URL of the server's root, without a slash at its end; known once it is started."""
        if not self.port:
            raise RuntimeError("the server has no URL yet: start() must be called first")
        host = _ANY_ADDRESS.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def get_url(self, path: str, scheme: str = "http") -> str:
        """The URL of ``path``, a path as in a URL; blanks and non-ASCII letters are encoded.

        ``scheme`` is "http" or "https", which are spoken on the one port; ValueError otherwise.
        """
        if scheme not in ("http", "https"):
            raise ValueError(f"scheme: found {scheme!r}; it takes 'http' or 'https'")
        return f"{self._root_url(scheme)}/{_quote(path.lstrip('/'))}"

    def _root_url(self, scheme: str) -> str:
        return self.base_url if scheme == "http" else self.base_url.replace("http", scheme, 1)

    def fixtures(self, pattern: str = "**/*") -> list[Fixture]:
        """The fixtures whose path below the directory matches a glob pattern, sorted.

        Hidden ones, whose names begin with a dot, and sidecars are left out.
        """
        found = sorted(pathlib.Path(self.directory).glob(pattern))
        names = (file.relative_to(self.directory).as_posix() for file in found)
        root = _root(self.directory)
        return [
            Fixture(self, name)
            for name in names
            if not _is_hidden(name) and os.path.isfile(root + name) and _may_be_served(root, name)
        ]

    # HTTPS

    @property
    def certificate(self) -> str:
        """Which certificate the next TLS handshakes meet; "valid" at first.

        The others are "expired", "not-yet-valid", "wrong-host" and "self-signed". Setting it to
        anything else raises ValueError.
        """
        return self._certificate

    @certificate.setter
    def certificate(self, kind: str) -> None:
        if kind not in _CERTIFICATE_KINDS:
            kinds = ", ".join(map(repr, _CERTIFICATE_KINDS))
            raise ValueError(f"certificate: found {kind!r:.80}; it takes one of {kinds}")
        self._certificate = kind

    @property
    def ca_file(self) -> str:
        """The path of a file with the certificate of the CA that clients are to trust, in PEM.

        The file is there until ``stop()``. Raises RuntimeError where the server is not running.
        """
        return self._temporary("ca.pem", _authority().pem)

    def ssl_context(self) -> ssl.SSLContext:
        """A new context for clients, which trusts that CA and no other.

        Raises RuntimeError in a forked child where no CA was made before the fork.
        """
        if not _authorities and self._pid != os.getpid():
            raise RuntimeError(
                "the CA was not made before the fork: call ssl_context() or read ca_file before it"
            )
        return ssl.create_default_context(cadata=_authority().pem)

    # Any host

    @contextlib.contextmanager
    def intercept(self) -> Iterator[FeedTestServer]:
        """A context in which this server is the whole Web, for this process and its children.

        Code that fetches ``https://example.com/feed.xml`` gets ``example.com/feed.xml`` below the
        directory, or what ``respond()`` says for that URL. Clients are led here by environment
        variables, which children inherit, and, in this process, by the functions that look names
        up; TLS contexts trust the server's CA as well. At the end all is put back, and connections
        for other hosts are closed. Of several contexts the innermost counts. Raises RuntimeError
        where the server is not running.
        """
        if self._httpd is None or not self.ready:
            raise RuntimeError("intercept() needs a server that is running: call start() first")
        interception = _Interception(self, self._httpd._own_address())
        try:
            yield self
        finally:
            interception.end()

    def _release(self) -> None:
        """End an interception, and with the last one the connections that it has led here.

        Clients would keep them, and come back for hosts that are elsewhere by then.
        """
        if sys.is_finalizing():  # see stop()
            return
        with self._changed:
            self._intercepting -= 1
            if not self._intercepting:
                for connection in self._led_here:
                    _hang_up(connection)

    def _temporary(self, name: str, text: str) -> str:
        """The path of a file of this server's, which is made on first use."""
        with self._changed:
            if name not in self._files:
                if not self.ready:
                    raise RuntimeError(f"{name} is there only while the server is running")
                if not self._files:  # where stop() is forgotten, they go with the process
                    weakref.finalize(self, _remove, self._files, self._pid)
                self._files[name] = _temporary_file(text, name)
            return self._files[name]

    # The record, and the script

    @property
    def requests(self) -> list[Request]:
        """The requests that were answered so far, in order: a snapshot."""
        with self._changed:
            return self._requests.copy()

    @property
    def errors(self) -> list[str]:
        """What was wrong with fixtures and callables so far, in order: a snapshot."""
        with self._changed:
            return self._errors.copy()

    def _take_errors(self) -> list[str]:
        """The errors so far, which no other test of those that share the server is to blame for."""
        with self._changed:
            found, self._errors = self._errors, []
            return found

    def clear(self) -> None:
        """Forget requests, errors and scripted steps."""
        with self._changed:
            self._requests = []  # a new one, as wait_for_request() notes how far it has looked
            self._errors.clear()
            self._scripts.clear()

    def respond(self, path: str, *steps: Step) -> None:
        """Answer each request for ``path`` with the next step; the last one stays.

        ``path`` may carry a query (without one it stands for any query) or be a whole URL. A step
        is a fixture's name, a status code, bytes, a Response, or a callable that takes the Request
        and returns one of these. Steps answer every method, and replace those given before.

        Raises FileNotFoundError for a fixture that does not exist, ValueError or TypeError for what
        cannot be a step.
        """
        if not steps:
            raise ValueError(f"respond({path!r}) needs at least one step")
        for step in steps:
            if not callable(step):
                self._as_response(step)
        with self._changed:
            self._scripts[self._address(path)] = _Script(steps)

    def wait_for_request(
        self,
        path: Optional[str] = None,
        *,
        method: Optional[str] = None,
        headers: Optional[Mapping[str, Optional[str]]] = None,
        body: Optional[Union[bytes, str]] = None,
        times: int = 1,
        timeout: float = 5.0,
    ) -> Request:
        """Wait until ``times`` matching requests were answered, and return the last of them.

        A field of ``headers`` with the value None must be absent. Raises AssertionError, naming
        what did arrive, after ``timeout`` seconds, and at once where the server has stopped;
        ValueError where ``times`` is less than 1.
        """
        wanted = _Wanted(self, path, method, headers, body, times)
        record: list[Request] = []
        found: list[Request] = []
        looked_at = 0

        def has_stopped() -> bool:
            return self._httpd is not None and self._httpd.stopping

        def is_over() -> bool:
            nonlocal record, found, looked_at
            if record is not self._requests:
                record, found, looked_at = self._requests, [], 0
            found += wanted.among(record[looked_at:])
            looked_at = len(record)
            return len(found) >= times or has_stopped()

        with self._changed:
            self._changed.wait_for(is_over, timeout)
            arrived = record.copy()
            limit = "before the server stopped" if has_stopped() else f"within {timeout:g} s"
        if len(found) < times:
            raise AssertionError(wanted.missed(arrived, f"at least {_times(times)} {limit}"))
        return found[-1]

    def _note_request(self, request: Request, connection: socket.socket) -> None:
        """Remember a request that is being answered, so that stop() can name it."""
        with self._changed:
            self._unanswered[request] = None
            if request._origin and self._intercepting:
                self._led_here.add(connection)

    def _note_end(self, connection: socket.socket) -> None:
        if self._led_here:
            with self._changed:
                self._led_here.discard(connection)

    def _record(self, request: Request) -> None:
        """Put a request on record, whose answer is planned."""
        on_record = request.method not in _FOR_THE_SERVER
        with self._changed:
            self._unanswered.pop(request, None)
            request._answered_at = self._timer.now()
            request._values = {}  # they are most of its memory, and there may be many requests
            if on_record:
                self._requests.append(request)
                self._changed.notify_all()
        if on_record:
            self._log(request)

    def _log(self, event: object) -> None:
        """Tell of a request, or of a handshake that failed."""
        _logger().info("%s", event)

    def _now(self) -> float:
        """The time by the server's clock; a clock that fails is an error like any callable's."""
        try:
            now = float(self.clock())
            _http_date(int(now))  # no infinity, and no year 10000, which no Date field can tell
        except BaseException as error:
            words = f"the server's clock: {_shown(error)}"
            if words not in self.errors:  # it is asked more than once for a request
                self._fail(words)
            return time.time()
        return now

    def _fail(self, words: str) -> Response:
        """Note what is wrong with a fixture or a callable; the client gets the same words."""
        with self._changed:
            self._errors.append(words)
        return _text_response(500, words)

    # Who answers: a scripted step, else a fixture, else nobody

    def _next_step(self, request: Request) -> Optional[Step]:
        if not self._scripts:
            return None
        origin, path, query = request._address
        with self._changed:
            script = self._scripts.get((origin, path, query))
            script = script or self._scripts.get((origin, path, None))
            if script is None:
                return None
            step, request._step = script.take()
            return step

    def _perform(self, step: Step, request: Request) -> Response:
        """The response that a step stands for; a callable is called, and may return a callable."""
        return self._perform(step(request), request) if callable(step) else self._as_response(step)

    def _as_response(self, step: Step) -> Response:
        if isinstance(step, Response):
            return step
        if isinstance(step, bytes):
            return Response(step)
        if isinstance(step, int):
            return Response(status=step)
        if isinstance(step, str):
            return self._named(step)
        raise TypeError(
            f"found {step!r:.80} as a step; it takes a fixture's name, a status code, bytes,"
            " a Response, or a callable that returns one of these"
        )

    def _named(self, name: str) -> Response:
        fixture = _load(self.directory, name.lstrip("/"))
        if fixture is None:
            words = f"no such fixture in {self.directory}{self._nearest(name)}"
            if re.match(r"\s*[<{[]|.*\n", name):
                words += "; if it is a body: bodies are bytes, such as b'<rss/>'"
            raise FileNotFoundError(errno.ENOENT, words, name[:80])
        return fixture

    def _fixture_for(self, request: Request) -> Response:
        folder = f"{request._host}/" if request._origin else ""
        for name in _file_names(request._path_as_sent):
            found = _load(self.directory, folder + name)
            if found is not None:
                return found
        return self._not_found(request, folder)

    def _knows(self, request: Request) -> bool:
        """Whether the other host that was asked has a folder, or scripted steps."""
        with self._changed:
            scripted = any(origin == request._origin for origin, _, _ in self._scripts)
        folder = _HOST_FOLDER.fullmatch(request._host)
        return scripted or bool(folder and os.path.isdir(f"{self.directory}/{request._host}"))

    def _unknown_host(self, request: Request) -> Response:
        scripted = f"respond({request.url!r}, ...)"
        folder = os.path.join(self.directory, request._host)
        answers = f"the folder {folder} or {scripted}"
        if not _HOST_FOLDER.fullmatch(request._host):
            answers = scripted  # there is no such folder
        words = f"{request.method} {request.url}: no such host here; {answers} would answer"
        return self._fail(words)._but(status=502)

    def _not_found(self, request: Request, folder: str) -> Response:
        wanted = folder + request.path.lstrip("/") or "/"
        return _text_response(
            404, f"{wanted!r} was not found in {self.directory}{self._nearest(wanted)}"
        )

    def _nearest(self, name: str) -> str:
        import heapq

        below = _names_below(self.directory)
        names = heapq.nsmallest(200, below, lambda other: abs(len(other) - len(name)))
        nearest = difflib.get_close_matches(name[:200], names, 1, 0.0)
        return f"; the nearest name there is {nearest[0]!r}" if nearest else "; it has no fixtures"

    def _address(self, path: str) -> _Address:
        """What a path, or a whole URL, of respond() and the assertions stands for."""
        origin, path = _parted(path)
        path, mark, query = path.partition("#")[0].partition("?")
        if path != "*" and not path.startswith("/"):
            path = f"/{path}"
        origin = "" if self._is_own(origin) else origin
        return origin, _unquote(path), _unquote(query) if mark else None

    def _is_own(self, origin: str) -> bool:
        """Whether an origin such as ``http://127.0.0.1:8000`` is this server, by any local name."""
        return self._is_local(origin) and _host_and_port(origin)[1] == self.port

    def _is_local(self, origin: str) -> bool:
        """Whether an origin is on this machine, at whatever port, or names no host at all.

        Whoever has come here with such a Host field has come to this server. One that listens on
        all addresses has any of them.
        """
        host, port = _host_and_port(origin)
        if self.host in _ANY_ADDRESS and port == self.port and _packed(host):
            return True
        return host in (self.host, *_LOOPBACK, "")


class Fixture:
    """A file that is served: its ``path``, its ``url``, and the ``directives`` in it."""

    __slots__ = ("_server", "name")

    def __init__(self, server: FeedTestServer, name: str) -> None:
        self._server = server
        self.name = name

    def __repr__(self) -> str:
        return f"<Fixture {self.name}>"

    @property
    def path(self) -> pathlib.Path:
        """The absolute path of the file."""
        return pathlib.Path(self._server.directory, self.name)

    @property
    def url(self) -> str:
        """Its URL on the server itself."""
        return f"{self._server.base_url}/{urllib.parse.quote(self.name, errors='surrogateescape')}"

    @property
    def directives(self) -> Directives:
        """Its directives, read anew each time; raises DirectiveError for a wrong one."""
        return _directives_of(str(self.path), _read_beginning(str(self.path))[0])


class _Script:
    """The steps for one address; each is taken once, the last one again and again."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.taken = 0

    def take(self) -> tuple[Step, str]:
        """The next step, and what a transcript says of it."""
        self.taken = min(self.taken + 1, len(self.steps))
        step = self.steps[self.taken - 1]
        name = step if isinstance(step, str) else getattr(step, "__name__", "")
        return step, f"step {self.taken} of {len(self.steps)}{name and f': {name}'}"


def _require_directory(path: str, words: str = "there is no such directory to serve") -> None:
    if not os.path.isdir(path):
        number = errno.ENOTDIR if os.path.exists(path) else errno.ENOENT
        raise OSError(number, words, path)


def _remove(files: dict[str, str], owner: int) -> None:
    """Remove the temporary files of a server, unless this is a child of the process it is in."""
    while files and owner == os.getpid():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(files.popitem()[1])


def stop_server(port: int, host: str = "127.0.0.1") -> None:
    """Stop the server on a port, of this process or another, by the HTTP method QUIT.

    Returns when the server is gone. Raises ConnectionRefusedError where there is none,
    PermissionError where it does not take QUIT from here, and ConnectionError where it does not
    answer, or says nothing for 10 seconds.
    """
    status_line = _send_quit((host, port))
    if not status_line:
        # Where nobody is there now, somebody else has stopped it.
        with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
            socket.create_connection((host, port)).close()
            raise ConnectionError(f"{host}:{port} did not answer QUIT")
    elif status_line.split()[1:2] != [b"200"]:
        found = status_line.decode("latin-1").strip()
        raise PermissionError(errno.EPERM, f"{host}:{port} answered QUIT with {found!r}")


def _send_quit(address: tuple[str, int]) -> bytes:
    """The status line that QUIT gets, once the connection has ended; empty where there is none."""
    try:
        with socket.create_connection(address, 10) as connection:
            connection.sendall(b"QUIT / HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as answer:
                status_line = answer.readline()
                answer.read()
    except ConnectionRefusedError:
        raise
    except (ConnectionError, socket.timeout):
        return b""
    return status_line


# The stoppable server: accepting connections


class StoppableHttpServer(http.server.HTTPServer):
    """An HTTP server that serves until told to stop, at once, and many connections at a time.

    The thread that accepts a connection also serves it. Before it waits for anything it makes way,
    that is, it sees to it that another thread accepts, an idle one or a new one. With
    ``handler_makes_way`` the handler does so itself, by ``make_way()`` before it waits and
    ``wait_alone()`` before it reads; then one connection at a time takes one thread only. Without
    it way is made for every connection at once. ``changed`` is the Condition that guards the state.
    For others than this module there are ``serve_forever()`` and ``shutdown()``.
    """

    #: The backlog: connections that may wait to be accepted.
    request_queue_size = 1024
    # On Windows the option would let two servers share a port.
    allow_reuse_address = os.name != "nt"
    allow_reuse_port = False

    def __init__(
        self,
        server_address: tuple[str, int],
        RequestHandlerClass: Callable[..., socketserver.BaseRequestHandler],
        bind_and_activate: bool = True,
        *,
        handler_makes_way: bool = False,
        changed: Optional[threading.Condition] = None,
    ) -> None:
        # Windows has neither poll() nor MSG_DONTWAIT.
        self.handler_makes_way = handler_makes_way and hasattr(select, "poll")
        self.stopping = False
        self._changed = changed or threading.Condition()
        self._accepting = 0  # threads that accept, or are about to
        self._threads: list[threading.Thread] = []  # those that were started to make way
        # These change by operations that are atomic by themselves, as the threads of hundreds of
        # connections would queue for the lock when the server stops; iteration is over copies.
        # At work are threads that accept or serve, and an object for each request_shutdown(); some
        # wait in join() for the others.
        self._working: set[object] = set()
        self._joining: set[object] = set()
        # Connections and the threads that serve them: the open ones, of which each is ended by who
        # takes it out, and those that were hung up on when the server was stopped, which are closed
        # together when their threads are done.
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._hung_up: dict[socket.socket, threading.Thread] = {}
        _open_servers.add(self)
        if ":" in server_address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(server_address, RequestHandlerClass, bind_and_activate)

    def server_bind(self) -> None:
        """Bind the socket, without looking up the host's name as HTTPServer does."""
        self.socket.settimeout(None)  # socket.setdefaulttimeout() is for clients
        # Accepted sockets inherit it: no answer of two parts waits for the client's delayed ACK.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self._listening = self.socket.fileno()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until ``shutdown()``; nothing is polled, so ``poll_interval`` is not used."""
        with self._changed:
            self._working.add(threading.current_thread())
            self._accepting += 1
            self._changed.notify_all()
        self._work()

    @property
    def serving(self) -> bool:
        """Whether connections are accepted."""
        return bool(self._working) and not self.stopping

    def _work(self) -> None:
        """Accept connections and serve them, as each of the server's threads does."""
        try:
            while connection := self._next_connection():
                self._serve(*connection)
                if self.stopping:
                    break
                with self._changed:
                    self._accepting += 1
        finally:
            self._leave(threading.current_thread())

    def _next_connection(self) -> Optional[tuple[socket.socket, Any]]:
        """Accept a connection, as a thread that counts as accepting; None where it is to end."""
        try:
            while not self.stopping:
                try:
                    connection, address = self.get_request()
                except OSError as error:
                    self._not_accepted(error)
                else:
                    self._accepted(connection)
                    return connection, address
            return None
        finally:
            with self._changed:
                self._accepting -= 1
                self._close_unused_port()

    def _not_accepted(self, error: OSError) -> None:
        with self._changed:
            if not self.stopping:
                # Out of descriptors, most likely: connections in the backlog wait for a free one.
                _logger().info("accept failed: %s", error)
                self._changed.wait(0.05)

    def _accepted(self, connection: socket.socket) -> None:
        """Enter a connection among the open ones; it is ended at once where the server stops."""
        with self._changed:
            self._connections[connection] = threading.current_thread()
            if self.stopping:
                _hang_up(connection)
        connection.settimeout(None)  # whatever socket.setdefaulttimeout() says

    def _serve(self, connection: socket.socket, address: Any) -> None:
        if not self.handler_makes_way:
            self.make_way()
        try:
            if self.verify_request(connection, address):
                self.finish_request(connection, address)
        except Exception:
            self.handle_error(connection, address)
        except BaseException:
            self.make_way()  # it ends this thread
            raise
        finally:
            self.shutdown_request(connection)

    def make_way(self) -> None:
        """See to it that connections are accepted while this thread takes its time."""
        with self._changed:
            if self._accepting or self.stopping:
                return
            name = f"port {self.server_port} thread {len(self._threads) + 2}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            self._working.add(thread)
            self._accepting += 1
        try:
            thread.start()
        except RuntimeError as error:  # no more threads: this one accepts again when it has served
            _logger().info("no further thread: %s", error)
            with self._changed:
                self._threads.remove(thread)
                self._working.remove(thread)
                self._accepting -= 1
                self._close_unused_port()

    def watch(self, connection: socket.socket) -> Any:
        """A connection and the port, for ``wait_alone()``; None where way is made at once."""
        if not self.handler_makes_way:
            return None
        watched = select.poll()
        watched.register(connection, select.POLLIN)
        with contextlib.suppress(ValueError):  # the listening socket is closed already
            watched.register(self.socket, select.POLLIN)
        return watched

    def wait_alone(self, watched: Any) -> None:
        """Wait for something to read, and make way as soon as somebody else connects."""
        if watched and not self._accepting and self._listening in dict(watched.poll()):
            self.make_way()

    def shutdown_request(self, request: Any) -> None:
        """End a connection; socketserver calls this when its handler is done."""
        if self._connections.pop(request, None):
            super().shutdown_request(request)

    def reset(self, connection: socket.socket) -> None:
        """End a connection by a reset (RST); a handler that holds a file of it would keep it."""
        # struct linger: yes, for 0 seconds. Its members are short on Windows.
        at_once = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        if self._connections.pop(connection, None):
            with contextlib.suppress(OSError):  # the client was faster
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report a handler's exception, unless the client has just gone or the server stops."""
        if self.stopping or isinstance(sys.exc_info()[1], ConnectionError):
            _logger().info("connection lost", exc_info=True)
        else:
            super().handle_error(request, client_address)

    def shutdown(self) -> None:
        """End the server and all its connections, and wait for its threads, except this one."""
        self.request_shutdown()
        self.join()

    def request_shutdown(self) -> None:
        """Close the port and end all connections but that of this thread, without waiting."""
        work, taken = object(), {}
        self._working.add(work)
        try:
            with self._changed:
                for connection, thread in self._connections.copy().items():
                    is_mine = thread is threading.current_thread()
                    if not is_mine and self._connections.pop(connection, None) is not None:
                        taken[connection] = thread
                self.stopping = True
                self._changed.notify_all()
                self._wake_accepting()
                self._close_unused_port()
            while taken:
                connection, thread = next(iter(taken.items()))
                _hang_up(connection)
                self._hung_up[connection] = thread
                del taken[connection]
        finally:  # after Ctrl-C, say, the next attempt ends the rest
            self._connections.update(taken)
            self._leave(work)

    def _leave(self, work: object) -> None:
        """Strike off what is done; with the last of it the server has ended."""
        self._working.discard(work)
        if self._working <= self._joining:
            with self._changed:
                self._close_hung_up()
                self._changed.notify_all()

    def _close_hung_up(self) -> None:
        """Close what was hung up and is no longer served; with the lock held."""
        for connection, thread in self._hung_up.copy().items():
            if thread not in self._working:
                del self._hung_up[connection]
                connection.close()

    def _close_unused_port(self) -> None:
        """Close the listening socket when the server stops and no thread may be in accept().

        Closed under such a thread, its descriptor could be that of another socket by then.
        """
        if self.stopping and not self._accepting:
            self.server_close()
            self._changed.notify_all()

    def is_last(self, connection: socket.socket) -> bool:
        """Whether a connection goes on though the server stops, as its own thread stops it."""
        return self.stopping and connection in self._connections

    def wait_closed(self) -> None:
        """Wait until the port is closed, which takes no time, after ``request_shutdown()``."""
        with self._changed:
            self._changed.wait_for(lambda: self.socket.fileno() < 0)

    def _wake_accepting(self) -> None:
        try:
            self.socket.shutdown(socket.SHUT_RDWR)  # Linux: accept() fails in every thread
        except OSError:
            # Elsewhere (ENOTCONN), and a second time: one connection for each of those who wait.
            for _ in range(self._accepting):
                with contextlib.suppress(OSError):
                    socket.create_connection(self._own_address()).close()

    def _own_address(self) -> tuple[str, int]:
        return _ANY_ADDRESS.get(self.server_name, self.server_name), self.server_port

    def join(self, timeout: Optional[float] = None) -> bool:
        """Wait until all threads have ended; tell whether they have.

        Those of the server's own that wait here do not wait for each other.
        ``timeout`` is in seconds; None waits however long it takes.
        """
        this = threading.current_thread()
        with self._changed:
            here = {this} & self._working
            self._joining |= here
            self._changed.notify_all()
            ended = self._changed.wait_for(
                lambda: self._working <= (self._joining if here else set()), timeout
            )
            self._close_hung_up()
            threads = set(self._threads) - self._joining if ended else set()
            self._joining -= here
        for thread in threads:
            thread.join()
        return ended

    def employs(self, thread: threading.Thread) -> bool:
        """Whether a thread is one of the server's that are at work."""
        return thread in self._working


#: The servers of this process, for the children that it forks.
_open_servers: weakref.WeakSet[StoppableHttpServer] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child, serve no further, and close the copies of the sockets.

    While there is a copy, the port is not free, and closing a connection does not reset it. What
    was not started yet may still be started in the child.
    """
    for server in _open_servers:
        if server.serving or server.stopping:
            server.stopping = True
            for each in (server.socket, *server._connections, *server._hung_up):
                each.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def _hang_up(connection: socket.socket) -> None:
    """End a connection, and with it what another thread waits for on it."""
    with contextlib.suppress(OSError):  # the client was faster
        connection.shutdown(socket.SHUT_RDWR)


# The handler: a request is read, answered and recorded


class _Refusal(Exception):
    """A request that cannot be understood: the status and the reason that the client gets."""

    def __init__(self, status: int, words: str, request: Optional[Request] = None) -> None:
        super().__init__(words)
        self.status = status
        self.request = request


class FeedTestRequestHandler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of one connection.

    A subclass may add ``do_`` methods; they find the Request in ``self.received``, the
    FeedTestServer in ``self.test_server``, and answer by ``self.reply(Response(...))``. There is
    nothing of what writes and reads bit by bit in the base class (``send_response()``, ``wfile``,
    ``rfile`` and the like): a Response is complete before its first byte is sent.
    """

    server: StoppableHttpServer
    received: Request
    response: Optional[Response]
    # How a connection begins.
    scheme = ""
    tunnel = ""
    tls: Optional[_Tls] = None
    client_left = False
    broken_off = False

    def __init__(self, test_server: FeedTestServer, *args: Any) -> None:
        self.test_server = test_server
        super().__init__(*args)

    def setup(self) -> None:
        """Begin with an empty buffer; neither rfile nor wfile is made."""
        self.connection = self.request
        self.watched = self.server.watch(self.connection)
        self.connection_number = next(self.test_server._connection_numbers)
        self.close_connection = False
        self.lingering = False
        self.heard_at = 0.0
        self.buffer = bytearray()

    def handle(self) -> None:
        """Answer one request after the other until the connection ends."""
        try:
            while not self.close_connection:
                if self.scheme:
                    self.handle_one_request()
                else:
                    self.begin()
        except OSError as error:
            if error.filename is None:
                _logger().info("the client has gone: %s", error)
            else:  # a fixture changed while it was sent
                self.test_server._fail(str(error))

    def handle_one_request(self) -> None:
        """The life of a request: read, find who answers, plan, record, send."""
        try:
            request = self.read()
            plan = self.answer(request)
        except EOFError:
            self.close_connection = True
            return
        except _Refusal as refusal:
            request = self.refused(refusal)
            plan = self.plan(request, _refuse(refusal.status, str(refusal)))
        request.response = plan
        self.test_server._record(request)
        self.write(request)

    def finish(self) -> None:
        """Let a client that may still be sending read the answer before the connection closes."""
        self.test_server._note_end(self.connection)
        if self.tls and not (self.broken_off or self.server.stopping):
            with contextlib.suppress(OSError):  # the client was faster
                self.transmit(self.tls.close())
        if (self.lingering or self.buffer) and not self.server.stopping:  # RFC 9112 9.6
            self.server.make_way()
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                while self.connection.recv(65536):
                    pass

    # Begin, in plain text or in TLS

    def begin(self) -> None:
        """Learn the scheme from the first byte of the connection, or of a tunnel (RFC 8446 5.1)."""
        try:
            while not self.buffer:
                self.receive()
        except EOFError:
            self.close_connection = True
            return
        self.scheme = "https" if self.buffer[0] == _HANDSHAKE else "http"
        if self.scheme == "https":
            self.shake_hands()

    def shake_hands(self) -> None:
        """Begin TLS; a handshake that fails is the client's affair, and logged."""
        self.server.make_way()  # a certificate takes milliseconds
        name = ""
        try:
            while (hello := _client_hello(self.buffer)) is None:
                self.receive()
            name = _server_name(hello)
            self.tls = _Tls(self.certified(name), self.tls, bytes(self.buffer))
            self.buffer.clear()
            self.decipher(b"")
            while not self.tls.established:
                self.receive()
        except (EOFError, OSError, ValueError) as error:
            self.close_connection = self.lingering = True
            if not self.server.stopping:
                host = f" for {name!a:.80}" if name else ""
                why = str(error) or "the client has left"
                self.test_server._log(f"TLS handshake{host} failed: {why}")

    def certified(self, name: str) -> ssl.SSLContext:
        """The TLS for a client that asks for the host of that name, or for none."""
        if name and not re.fullmatch(_SERVER_NAME, name):
            self.send(_UNRECOGNIZED_NAME)
            raise ValueError("that is no name of a host (RFC 6066 3)")
        own = self.connection.getsockname()[0].removeprefix("::ffff:").partition("%")[0]
        host = name or _host_and_port(f"https://{self.tunnel}")[0] or own
        try:
            return _server_context(host.lower(), self.test_server.certificate)
        except OSError as error:
            self.test_server._fail(f"there is no certificate for {host}: {error}")
            raise

    # Read

    def read(self) -> Request:
        """Read one request, whole, its body included.

        Raises EOFError where the client is done or the server stops, _Refusal where the request
        cannot be understood.
        """
        request = None
        try:
            request = _parse_head(self.read_head())
            request.connection = self.connection_number
            request._locate(self.test_server, self.scheme, self.tunnel)
            request.body = self.read_body(request)
        except EOFError:
            if self.server.stopping or not (request or self.buffer):
                raise
            raise _Refusal(400, "the connection ended before the request did", request) from None
        except _Refusal as refusal:
            refusal.request = refusal.request or request
            raise
        request.time, request._came_at = self.test_server._now(), self.heard_at
        self.test_server._note_request(request, self.connection)
        return request

    def receive(self) -> None:
        """Wait for more of what the client says; raises EOFError where no more comes."""
        if self.client_left:
            raise EOFError
        self.server.wait_alone(self.watched)
        self.take_in(self.connection.recv(65536))

    def take_in(self, data: bytes) -> None:
        """Add to the buffer what the client says in these bytes; none are its end."""
        self.heard_at = self.now()
        if self.tls is None:
            self.buffer += data
            self.client_left = not data
        else:
            self.decipher(data)
            self.client_left = self.tls.ended or not data

    def decipher(self, data: bytes) -> None:
        """Add to the buffer what bytes in TLS say; the handshake, too, is answered here."""
        assert self.tls is not None
        try:
            self.buffer += self.tls.open(data)
        finally:
            if sealed := self.tls.seal():  # TLS has something to say itself, maybe an alert
                self.transmit(sealed)

    def read_head(self) -> str:
        """The request line and the field lines, up to the empty line that ends them."""
        searched = 0
        while True:
            while self.buffer.startswith(b"\r\n"):  # RFC 9112 2.2: before a request line, ignored
                del self.buffer[:2]
            end = self.buffer.find(b"\r\n\r\n", max(0, searched - 3))
            if end >= 0:
                if end > _MAX_LINE:
                    _refuse_hopeless(self.buffer[:end], searched)
                return self.take(end + 4).decode("latin-1")
            if self.buffer:
                _refuse_hopeless(self.buffer, searched)
                searched = len(self.buffer)
            self.receive()

    def take(self, size: int) -> bytes:
        """The next bytes of the connection, as many as that."""
        while len(self.buffer) < size:
            self.receive()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def read_body(self, request: Request) -> bytes:
        size = _body_size(request)
        if size == 0:
            return b""
        expectation = request._values.get("expect") or ""
        if expectation.lower() == "100-continue" and request.version != "1.0" and not self.buffer:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self.read_chunks() if size is None else self.take(size)

    def read_chunks(self) -> bytes:
        """A body in the chunked transfer coding (RFC 9112 7.1), decoded."""
        body = bytearray()
        while True:
            size = _chunk_size(self.read_line())
            if size == 0:
                break
            if len(body) + size > _MAX_BODY:
                raise _body_too_large()
            body += self.take(size)
            if self.take(2) != b"\r\n":
                raise _Refusal(400, "the data of a chunk is longer than its size says")
        for _ in range(_MAX_FIELDS + 1):
            trailer = self.read_line(431)
            if not trailer:
                return bytes(body)
            if not _FIELD_LINE.fullmatch(trailer):
                raise _Refusal(400, f"the trailer field {trailer[:80]!r} is malformed")
        raise _Refusal(431, f"there are more than {_MAX_FIELDS} trailer fields")

    def read_line(self, if_too_long: int = 400) -> str:
        while (end := self.buffer.find(b"\n", 0, _MAX_LINE + 2)) < 0:
            if len(self.buffer) >= _MAX_LINE + 2:
                words = f"a line of the chunked body is longer than {_MAX_LINE} bytes"
                raise _Refusal(if_too_long, words)
            self.receive()
        line = self.take(end + 1).decode("latin-1")
        if not line.endswith("\r\n"):
            raise _Refusal(400, f"the line {line[:80]!r} of the chunked body does not end in CR LF")
        return line[:-2]

    def refused(self, refusal: _Refusal) -> Request:
        """What is on record of a request that could not be read."""
        request = refusal.request or Request()
        request._refused = True
        request.connection, request.time = self.connection_number, self.test_server._now()
        request._locate(self.test_server, self.scheme, self.tunnel)
        return request

    # Find who answers

    def answer(self, request: Request) -> Response:
        """The plan of the answer; a 500 where a fixture or the test's own code is wrong."""
        try:
            return self.plan(request, self.find(request))
        except BaseException as error:  # pytest.fail() in a callable raises no Exception
            return self.plan(request, self.test_server._fail(_explain(error, request)))

    def find(self, request: Request) -> Response:
        """The response of the step or of the do_ method for a request, whose host is known."""
        for_the_server = request.method in _FOR_THE_SERVER
        step = None if for_the_server else self.test_server._next_step(request)
        if step is None:
            known = for_the_server or not request._origin or self.test_server._knows(request)
            return self.dispatch(request) if known else self.test_server._unknown_host(request)
        if callable(step):
            self.server.make_way()
        return self.test_server._perform(step, request)

    def dispatch(self, request: Request) -> Response:
        """Call the do_ method of the request's method, and return what it replied."""
        name = f"do_{request.method}"
        method = getattr(self, name, None)
        if method is None:
            return self.not_allowed(request.method)
        if type(self) is not FeedTestRequestHandler:
            self.server.make_way()  # a test's own methods may take their time
        self.received, self.response = request, None
        method()
        if self.response is None:
            raise RuntimeError(f"do_{request.method}() did not call self.reply()")
        return self.response

    def reply(self, response: Response) -> None:
        """Answer the request by this response; a do_ method calls it once."""
        if self.response is not None:
            raise RuntimeError(f"do_{self.received.method}() called self.reply() twice")
        self.response = response

    def do_GET(self) -> None:
        self.reply(self.test_server._fixture_for(self.received))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_OPTIONS(self) -> None:
        self.reply(Response(status=204, headers=[("Allow", self.allowed())]))

    def do_CONNECT(self) -> None:
        """Begin a tunnel to whatever host was asked for, which is here (RFC 9110 9.3.6)."""
        if not self.test_server._intercepting:
            words = "CONNECT is not answered here; inside of server.intercept() it is"
            self.reply(_refuse(405, words, [("Allow", self.allowed())]))
            return
        self.tunnel, self.scheme = self.received.target, ""
        self.reply(Response(status=200, reason="Connection established"))

    def do_QUIT(self) -> None:
        """Stop the server: the port is closed before the answer is sent."""
        if not _is_loopback(self.client_address[0]):
            self.reply(_refuse(403, "QUIT is for clients on this machine only"))
            return
        self.server.request_shutdown()
        self.server.wait_closed()
        self.reply(_text_response(200, "the server has stopped"))

    def allowed(self) -> str:
        methods = sorted(name[3:] for name in dir(self) if name.startswith("do_"))
        return ", ".join(method for method in methods if method not in _FOR_THE_SERVER)

    def not_allowed(self, method: str) -> Response:
        if method not in _METHODS:
            return _refuse(501, f"the method {method[:80]!r} is not known here")
        words = f"{method} is not answered here; respond() can script an answer to it"
        return _refuse(405, words, [("Allow", self.allowed())])

    # Plan

    def plan(self, request: Request, response: Response) -> Response:
        """Decide the answer completely, and whether the connection ends with it."""
        begins_a_tunnel = not self.scheme  # do_CONNECT() has forgotten it
        persistent = begins_a_tunnel or request._persists(response.ignore)
        stopping: bool = self.server.stopping
        date = _http_date(int(self.test_server._now()))
        if response.compress:
            self.server.make_way()
        plan = _plan(request, response, date, persistent and not stopping)
        self.close_connection = plan._closes
        # It may still be sending, unless it has asked for the end itself and gets all in one piece.
        asked = not persistent and "connection" not in response._given and not plan.asis
        self.lingering = plan._closes and not (
            asked and plan._at_once and len(plan._sent) <= _SMALL
        )
        return plan

    # Send

    def write(self, request: Request) -> None:
        """Write the planned answer, and note where the client has not stayed for all of it."""
        assert request.response is not None
        stayed = False
        try:
            _write(request.response, self)
            stayed = not self.client_left
        finally:
            if not stayed:
                request._answered_at = math.inf

    def send(self, data: Union[bytes, memoryview]) -> None:
        """Send it all, in TLS where that is spoken; block by block, as TLS makes a copy."""
        if self.tls is None:
            self.transmit(data)
            return
        for start in range(0, len(data), _BLOCK):
            self.transmit(self.tls.seal(memoryview(data)[start : start + _BLOCK]))

    def transmit(self, data: Union[bytes, memoryview]) -> None:
        """Send bytes; where the client does not take them at once, others are not kept waiting."""
        try:
            sent = self.connection.send(data, _DONT_WAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.server.make_way()
            self.connection.sendall(memoryview(data)[sent:])

    def now(self) -> float:
        return self.test_server._timer.now()

    def pause(self, seconds: float) -> None:
        """Let time pass, unless the client leaves or the server stops; what it says is kept.

        Who shuts down the sending side only is taken to have left, as nothing tells the two apart:
        what is left of the answer is sent without further waits.
        """
        self.server.make_way()
        end = self.now() + seconds
        while (left := end - self.now()) > 0 and not self.client_left:
            if self.server.is_last(self.connection):
                return
            # Who goes on talking meanwhile does not fill the memory.
            event = _LEFT if len(self.buffer) > _MAX_BODY else _READABLE
            if not self.test_server._timer.wait(self.connection, left, event):
                return
            data = self.connection.recv(65536) if event == _READABLE else b""
            self.take_in(data)

    def break_off(self, fault: str) -> None:
        """Carry out a fault: a reset, or silence until the client leaves; a close follows anyway.

        No farewell is said, so that TLS tells the client that something is missing.
        """
        self.broken_off = True
        if fault == "stall":
            self.pause(math.inf)
        elif fault == "reset":
            self.await_arrival()
            self.server.reset(self.connection)

    def await_arrival(self) -> None:
        """Wait until the client's system has all that was sent; a reset would drop the rest."""
        seconds = 0.001
        while _in_flight(self.connection) and not self.server.stopping:
            if self.test_server._timer.wait(self.connection, seconds, _ENDED):
                return
            seconds = min(2 * seconds, 0.02)


# The thread stands first because its reader meets it first; its default can only be named here.
FeedTestServer.handler_class = FeedTestRequestHandler


def _is_loopback(address: str) -> bool:
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def _explain(error: BaseException, request: Request) -> str:
    if isinstance(error, DirectiveError):
        return str(error)
    import traceback  # for what has gone wrong only, so not part of the import time

    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return f"{request.method} {request._shown}: {_shown(error)}\n{''.join(lines)}"


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception as fault:  # in the test's own class
        return f"{type(error).__name__}, whose repr() raises {type(fault).__name__}"


@functools.cache
def _logger() -> logging.Logger:
    import logging  # takes as long as the rest of this module's imports beyond http.server

    return logging.getLogger("feedtestserver")


# Waiting, and what a connection tells meanwhile

# What may happen to it, for poll(): there is something to read, be it the end; the client
# has shut down its sending side, where that has an event of its own; both sides have ended.
_READABLE = getattr(select, "POLLIN", 1)
_LEFT = getattr(select, "POLLRDHUP", _READABLE)
_ENDED = 0
#: Seconds that poll() can wait, 23 days: it counts milliseconds in an int.
_LONGEST_POLL = 2_000_000


class _Timer:
    """Lets time pass where an answer takes its time; a test may put a faster one in its place."""

    def now(self) -> float:
        """Seconds since some point in time."""
        return time.monotonic()

    def wait(self, connection: socket.socket, seconds: float, event: int) -> bool:
        """Wait for an event on a connection, so many seconds at most; tell whether it came."""
        for_ever = seconds > _LONGEST_POLL
        if not hasattr(select, "poll"):  # Windows
            connections = [connection] if event else []
            timeout = None if for_ever else seconds
            return any(select.select(connections, [], [connection], timeout))
        events = select.poll()
        events.register(connection, event)
        return bool(events.poll(None if for_ever else seconds * 1000))


def _in_flight(connection: socket.socket) -> int:
    """How many bytes were sent and have not arrived; 0 where the system does not tell."""
    if sys.platform == "darwin":
        return connection.getsockopt(socket.SOL_SOCKET, 0x1024)  # SO_NWRITE
    if not sys.platform.startswith("linux"):
        return 0
    import fcntl  # for resets only, so not part of the import time
    import termios

    count = fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(count, sys.byteorder)


#: To send what fits into the buffer; on Windows, which has no such thing, way is made before.
_DONT_WAIT: int = getattr(socket, "MSG_DONTWAIT", 0)

# The reader: what a request's head may look like (RFC 9112 2 to 6)

_METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
#: Methods that ask the server itself for something: neither scripted nor on record.
_FOR_THE_SERVER = ("CONNECT", "QUIT")
_MAX_FIELDS = 256
_MAX_LINE, _MAX_HEAD, _MAX_BODY = 16 * 1024, 1024 * 1024, 64 * 1024 * 1024  # in bytes

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIELD_LINE = re.compile(rf"({_TOKEN.pattern}):([^\x00-\x08\x0a-\x1f\x7f]*)")
_REQUEST_LINE = re.compile(rf"({_TOKEN.pattern}) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9]\.[0-9])")
_HEAD = re.compile(rf"{_REQUEST_LINE.pattern}\r\n((?:{_FIELD_LINE.pattern}\r\n)*)\r\n")
_PORT = "[0-9]{0,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_HOST = re.compile(rf"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~!$&'()*+,;=%]*)(?::(?:{_PORT}))?")
_ABSOLUTE_FORM = re.compile(rf"(https?)://(?![:/?]|\Z)({_HOST.pattern})(/.*)?", re.IGNORECASE)
_AUTHORITY_FORM = rf"(?=[^:].*:0*[1-9][0-9]*\Z){_HOST.pattern}"
# A pattern that most tests do not need is a string: re compiles it when it is first used.
_CHUNK_SIZE = (
    r"([0-9A-Fa-f]{1,16})"
    rf"(?:[ \t]*;[ \t]*{_TOKEN.pattern}"
    rf"(?:[ \t]*=[ \t]*(?:{_TOKEN.pattern}|\"(?:[^\"\\\x00-\x08\x0a-\x1f\x7f]"
    r"|\\[^\x00-\x08\x0a-\x1f\x7f])*\"))?)*"
)
#: What no head can hold, in whatever is still missing of it.
_GARBAGE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)|(?<!\r)\n")

_FIELD_FAULTS = (
    (r"[ \t]", "begins with white space; a value is not folded (RFC 9112 5.2)"),
    (r":", "has no name before its colon (RFC 9112 5)"),
    (r"[^:]*[ \t]:", "has white space before its colon (RFC 9112 5.1)"),
    (r"[^:]*\Z", "has no colon (RFC 9112 5)"),
    (rf"(?!{_TOKEN.pattern}:)", "has a name that is not a token (RFC 9110 5.1)"),
    (r"", "has a control character in its value (RFC 9110 5.5)"),
)


def _parse_head(head: str) -> Request:
    """The request that a head begins; raises _Refusal for what RFC 9112 says to reject."""
    match = _HEAD.fullmatch(head)
    if match is None:
        raise _first_fault(head)
    method, target, version, lines = match.group(1, 2, 3, 4)
    if lines.count("\n") > _MAX_FIELDS:
        words = f"there are more than {_MAX_FIELDS} fields"
        raise _Refusal(431, words, Request(method, target, version))
    request = Request(method, target, version, lines)
    if version[0] != "1":
        raise _Refusal(505, f"HTTP/{version} is not spoken here; HTTP/1.1 is", request)
    if not _is_target(request):
        raise _Refusal(400, f"{target[:80]!r} is no target of {method} (RFC 9112 3.2)", request)
    host = request._values.get("host")
    if host is None and version != "1.0":
        raise _Refusal(400, "there is no Host field (RFC 9112 3.2)", request)
    if host is not None and not _HOST.fullmatch(host):
        raise _Refusal(400, f"the Host field {host[:80]!r} is not one host (RFC 9112 3.2)", request)
    return request


def _is_target(request: Request) -> bool:
    """Whether the target has one of the four forms, and one that goes with the method."""
    if request.method == "CONNECT":
        return bool(re.fullmatch(_AUTHORITY_FORM, request.target))
    if request.target == "*":
        return request.method == "OPTIONS"
    return request.target.startswith("/") or bool(request._origin)


def _first_fault(head: str) -> _Refusal:
    """What is wrong in a head, or in the beginning of one, and where."""
    request_line, *lines = re.split("\r\n|\r|\n", head)
    request = _begun(head)
    bare = re.search(r"\r(?!\n|\Z)|(?<!\r)\n", head)
    if bare:
        name, number = ("CR", "LF")[bare.group() == "\n"], head.count("\n", 0, bare.start()) + 1
        words = f"line {number} has a bare {name}; lines end in CR LF (RFC 9112 2.2)"
        return _Refusal(400, words, request)
    if request is None:
        found = f"{request_line[:80]!r} is no request line"
        return _Refusal(400, f"{found}; it would be METHOD SP TARGET SP HTTP/1.1 (RFC 9112 3)")
    line = next(line for line in lines if line and not _FIELD_LINE.fullmatch(line))
    fault = next(fault for pattern, fault in _FIELD_FAULTS if re.match(pattern, line))
    return _Refusal(400, f"the field line {line[:80]!r} {fault}", request)


def _begun(head: str) -> Optional[Request]:
    """The request that the first line of a head begins; None where it is no request line."""
    start = _REQUEST_LINE.fullmatch(re.split("[\r\n]", head, maxsplit=1)[0])
    return Request(*start.group(1, 2, 3)) if start else None


def _refuse_hopeless(beginning: bytearray, searched: int) -> None:
    """Raise _Refusal where nothing that may follow makes a request of this beginning of one.

    Its first fault counts, so that the status is the same in whichever pieces a head arrives; the
    words go by what has come so far.
    """
    garbage = _GARBAGE.search(beginning, max(0, searched - 1))
    end = garbage.start() if garbage else len(beginning)
    start = beginning.rfind(b"\n", 0, searched) + 1
    for number, line in enumerate(beginning[start:end].split(b"\n"), start):
        if len(line.removesuffix(b"\r")) > _MAX_LINE:
            if number == 0:
                raise _Refusal(414, f"the request line is longer than {_MAX_LINE} bytes")
            raise _head_too_large(beginning, f"a field line is longer than {_MAX_LINE} bytes")
    if end > _MAX_HEAD:
        raise _head_too_large(
            beginning, f"the head of the request is larger than {_MAX_HEAD} bytes"
        )
    if garbage:
        raise _first_fault(beginning.decode("latin-1"))


def _head_too_large(beginning: bytearray, words: str) -> _Refusal:
    return _Refusal(431, words, _begun(beginning.decode("latin-1")))


def _body_too_large() -> _Refusal:
    return _Refusal(413, f"the body is larger than {_MAX_BODY} bytes")


def _body_size(request: Request) -> Optional[int]:
    """The size of a request's body in bytes, None for a chunked one (RFC 9112 6.3)."""
    coding, length = request._values.get("transfer-encoding"), request._values.get("content-length")
    if coding is not None:
        _check_coding(coding, length, request.version)
        return None
    if length is None:
        return 0
    lengths = {value.strip(" \t") for value in length.split(",")}
    if len(lengths) > 1:
        raise _Refusal(400, f"the Content-Lengths differ: {length[:80]!r} (RFC 9112 6.3)")
    digits = lengths.pop()
    if not re.fullmatch("[0-9]+", digits):
        raise _Refusal(400, f"the Content-Length {digits[:80]!r} is not a number (RFC 9110 8.6)")
    size = _number(digits)
    if size > _MAX_BODY:
        raise _body_too_large()
    return size


def _number(digits: str) -> int:
    """A number of bytes; those of more than 18 digits are all the same, as no body is so long."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= 18 else 10**18


def _check_coding(coding: str, length: Optional[str], version: str) -> None:
    """Refuse what RFC 9112 6.1 forbids, and codings that are not known; what is left is chunked."""
    *others, last = _members(coding) or [""]
    if length is not None:
        raise _Refusal(400, "there are both Content-Length and Transfer-Encoding (RFC 9112 6.1)")
    if version == "1.0":
        raise _Refusal(400, "HTTP/1.0 has no Transfer-Encoding (RFC 9112 6.1)")
    if last != "chunked" or "chunked" in others:
        raise _Refusal(400, f"Transfer-Encoding is {coding[:80]!r}; chunked comes once, last")
    if others:
        raise _Refusal(501, f"the transfer coding {others[0][:80]!r} is not known here")


def _chunk_size(line: str) -> int:
    match = re.fullmatch(_CHUNK_SIZE, line)
    if match is None:
        raise _Refusal(400, f"{line[:80]!r} is no chunk size (RFC 9112 7.1)")
    return int(match.group(1), 16)


# Origins: the scheme, the host and the port of a URL


def _origin(scheme: str, authority: str) -> str:
    """An origin in the one form that is compared (RFC 9110 4.2.3).

    It is in lower case, without a default port, and without the dot that ends a name.
    """
    scheme, authority = scheme.lower(), authority.lower().replace(".:", ":")
    default = {"http": ":80", "https": ":443"}.get(scheme, ":")
    return f"{scheme}://{authority.removesuffix(default).removesuffix(':').removesuffix('.')}"


def _parted(url: str) -> tuple[str, str]:
    """The origin of a whole URL, and what comes after; a path alone has no origin.

    Raises ValueError where there is no host in it.
    """
    whole = re.fullmatch("(?is)(https?)://([^/?#]*)(.*)", url)
    if whole is None:
        return "", url
    scheme, authority, rest = whole.groups()
    return _origin(scheme, _sent_authority(authority)), rest


def _sent_authority(authority: str) -> str:
    """The authority of a URL as clients send it: without a user, in ASCII (RFC 9110 4.2, IDNA).

    Raises ValueError where there is no host in it.
    """
    host = authority.rpartition("@")[2]
    with contextlib.suppress(UnicodeError):
        host = host if host.isascii() else host.encode("idna").decode()
    if not _HOST.fullmatch(host) or not host.partition(":")[0]:
        raise ValueError(f"found {authority!r:.80} in a URL; it takes the name of a host there")
    return host


def _host_and_port(origin: str) -> tuple[str, int]:
    """The host of an origin, without the brackets of IPv6, and the port, be it the default one."""
    scheme, _, authority = origin.partition("://")
    host, colon, port = authority.rpartition(":")
    if not (colon and port.isdigit()):
        host, port = authority, {"https": "443"}.get(scheme, "80")
    return host.strip("[]"), int(port)


# Fixture lookup: from a URL to a file, safely, and to what it answers

_CONTENT_TYPES = {
    ".aac": "audio/aac",
    ".atom": "application/atom+xml",
    ".avif": "image/avif",
    ".flac": "audio/flac",
    ".gif": "image/gif",
    ".html": "text/html",
    ".ico": "image/vnd.microsoft.icon",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".m4a": "audio/mp4",
    ".mp3": "audio/mpeg",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".opml": "text/x-opml",
    ".opus": "audio/ogg",
    ".png": "image/png",
    ".rdf": "application/rdf+xml",
    ".rss": "application/rss+xml",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".wav": "audio/wav",
    ".webp": "image/webp",
    ".xml": "application/xml",
}
_SIDECAR = ".headers"
_AS_IS = ".asis"
_INDEXES = ("index.html", "index.xml")
_HOST_FOLDER = re.compile(r"\.*[A-Za-z0-9-][A-Za-z0-9.-]*")
#: Bodies up to this size go out together with their head, and those of files are kept in memory.
_SMALL = 64 * 1024
#: Larger files are read in such blocks, by each who is sent them.
_BLOCK = 256 * 1024


def _quote(path: str) -> str:
    return urllib.parse.quote(path, safe="%/?#[]@!$&'()*+,;=:~", errors="surrogateescape")


def _unquote(path: str) -> str:
    """Percent-decoded; what is not UTF-8 stays as it is in the names of files."""
    if "%" not in path and path.isascii():
        return path
    encoded = path.encode("utf-8", "surrogateescape")
    return urllib.parse.unquote_to_bytes(encoded).decode("utf-8", "surrogateescape")


@functools.lru_cache(maxsize=1024)
def _file_names(path: str) -> tuple[str, ...]:
    """The names of files that may answer the path of a URL; none where it holds tricks."""
    *folders, last = (_unquote(segment) for segment in path[1:].split("/"))
    names = [last] if last else list(_INDEXES)
    for segment in (*folders, *names):
        if segment in ("", ".", "..") or not {"/", "\\", "\0"}.isdisjoint(segment):
            return ()
        if os.name == "nt" and ":" in segment:  # drives, and the streams of NTFS
            return ()
    return tuple("/".join((*folders, name)) for name in names)


def _names_below(directory: str) -> Iterator[str]:
    """The names of the fixtures below a directory, by a quick look that reads no link."""
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not _is_hidden(name) and not _is_sidecar(name):
                path = os.path.relpath(os.path.join(folder, name), directory)
                yield path.replace(os.sep, "/")


def _is_hidden(name: str) -> bool:
    """Whether a fixture is served but not listed."""
    return any(segment.startswith(".") for segment in name.split("/"))


def _is_sidecar(name: str) -> bool:
    return name.lower().endswith(_SIDECAR)


def _root(directory: str) -> str:
    """The real path of a directory, with a slash at its end."""
    return os.path.join(os.path.realpath(directory), "")


def _may_be_served(root: str, name: str) -> bool:
    """Whether a file, and its sidecar, really lie below the root; sidecars are not served."""
    real = os.path.realpath(root + name)
    sidecar = root + name + _SIDECAR
    if not real.startswith(root) or _is_sidecar(real):
        return False
    return not os.path.islink(sidecar) or os.path.realpath(sidecar).startswith(root)


def _stamp(path: str) -> Optional[tuple[float, ...]]:
    """What changes when a file does; None where there is no regular file of that name."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # not there, or a name that no file can have
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    newest = max(found.st_mtime, found.st_ctime)
    return newest, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev


def _load(directory: str, name: str) -> Optional[Response]:
    """What the fixture of that name answers, None where there is none that may be served.

    Raises DirectiveError for a wrong directive, OSError for a file that cannot be read.
    """
    path = f"{directory}/{name}"
    stamp = _stamp(path)
    if stamp is None:
        return None
    sidecar = _stamp(path + _SIDECAR)
    newest = stamp[0] if sidecar is None else max(stamp[0], sidecar[0])
    # A file this new may change again within the resolution of its time stamp.
    load = _load_cached if time.time() - newest > 2 else _load_cached.__wrapped__
    return load(directory, name, stamp, sidecar)


@functools.lru_cache(maxsize=16384)
def _load_cached(
    directory: str, name: str, stamp: tuple[float, ...], sidecar: Optional[tuple[float, ...]]
) -> Optional[Response]:
    """Load a fixture; the stamps have it loaded again when it, or its sidecar, has changed."""
    if not _may_be_served(_root(directory), name):
        return None
    path = f"{directory}/{name}"
    data, size = _read_beginning(path)
    content = data if len(data) == size <= _SMALL else _File(path, size)
    fields = {**_directives_of(path, data).arguments, "asis": name.lower().endswith(_AS_IS)}
    return Response._of(fields, content, _media_type(name))


def _read_beginning(path: str) -> tuple[bytes, int]:
    """The bytes of a file, or of a large one those that may hold directives; and its size."""
    with open(path, "rb") as file:
        data = file.read(_SMALL + 1)
        if len(data) > _SMALL and _comment_goes_on(data):
            data += file.read()
        return data, os.fstat(file.fileno()).st_size


def _directives_of(path: str, data: bytes) -> Directives:
    """The directives of the sidecar where there is one, else those of the fixture's comments."""
    sidecar = path + _SIDECAR
    if not os.path.isfile(sidecar):
        return parse_directives(data, path)
    return Directives(sidecar, _sidecar_lines(pathlib.Path(sidecar).read_bytes()))


def _media_type(name: str) -> str:
    """The media type that a name stands for, by the table above and not by the machine's."""
    return _CONTENT_TYPES.get(os.path.splitext(name)[1].lower(), "application/octet-stream")


class _File:
    """A body, or a part of one, that stays on the disk, to be read by each who sends it."""

    __slots__ = ("path", "size", "start")

    def __init__(self, path: str, size: int, start: int = 0) -> None:
        self.path = path
        self.size = size
        self.start = start

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> _File:
        start, stop, _ = part.indices(self.size)
        return _File(self.path, max(0, stop - start), self.start + start)

    def __bytes__(self) -> bytes:
        return b"".join([bytes(block) for block in self.blocks()])

    def __repr__(self) -> str:
        return f"<{self.size} bytes of {self.path}>"

    def blocks(self, size: int = _BLOCK) -> Iterator[memoryview]:
        """Its blocks, each to be used before the next; OSError where it is gone or shorter."""
        left, block = self.size, memoryview(bytearray(min(size, self.size)))
        with io.FileIO(self.path) as file:
            file.seek(self.start)
            while left:
                count = file.readinto(block[:left])
                if not count:
                    raise OSError(errno.EIO, f"the file ends {left} bytes too early", self.path)
                left -= count
                yield block[:count]


# Directives: from a fixture's comments to what they ask for


class DirectiveError(ValueError):
    """A wrong directive; the text says file and line, what was found and what would be right.

    Its parts are ``source``, ``line`` (from 1) and ``sentence``.
    """

    def __init__(self, source: str, line: int, sentence: str) -> None:
        super().__init__(source, line, sentence)
        self.source = source
        self.line = line
        self.sentence = sentence

    def __str__(self) -> str:
        where = f"{self.source}, line {self.line}" if self.source else f"line {self.line}"
        return f"{where}: {self.sentence}"


class Directives(Headers):
    """What the comments of a fixture say, read like wsgiref.headers.Headers: ``d["Expect"]``.

    Known and free keys are all there, in order, as they are spelled.
    """

    def __init__(
        self,
        source: str = "",
        lines: Iterable[tuple[int, str]] = (),
        *,
        prose: bool = False,
        errors: Optional[list[DirectiveError]] = None,
    ) -> None:
        """Read numbered lines, among which there may be ``prose``, as in a comment.

        Raises DirectiveError for the first that is wrong, unless ``errors`` collects them.
        """
        self._fields: dict[str, Any] = {}
        self._lines: list[tuple[str, str]] = []
        super().__init__(self._lines)
        self.source = source
        for number, line in lines:
            try:
                self._read(line, prose)
            except ValueError as error:
                found = DirectiveError(source, number, str(error))
                if errors is None:
                    raise found from None
                errors.append(found)

    def _read(self, line: str, prose: bool) -> None:
        match = _DIRECTIVE.fullmatch(line)
        if match:
            _apply(self._fields, *match.groups())
            self._lines.append((match.group(1).rstrip(" \t"), match.group(2)))
        elif line and not prose:
            right = "KEY: VALUE, such as 'Status: 404' or 'Header: Age: 60'"
            raise ValueError(f"found {_shown_text(line)}; a line of a sidecar is {right}")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for ``Response`` that the known directives amount to."""
        return self._fields.copy()


def parse_directives(data: bytes, source: str = "") -> Directives:
    """Read the directives of a fixture: lines of the comments that begin in its first 4 KiB.

    ``source`` is what errors call the fixture. Raises DirectiveError for a wrong value, a second
    value for what can have one only, a key that looks like a typo of a known one, and a key that is
    the name of a common response field.
    """
    return Directives(source, _comment_lines(data), prose=True)


# Directives: the grammar

_COMMENTS_BEGIN_WITHIN = 4096  # bytes of a fixture in which a comment with directives begins
_BYTE_ORDER_MARK = re.compile("\\A(?:\ufeff|\xef\xbb\xbf)")  # the latter is UTF-8's, as Latin-1
_NEWLINE = re.compile(r"\r\n|\r|\n")
_MARKUP = re.compile(r"<!--|<!\[CDATA\[")
_DIRECTIVE = re.compile(rf"({_TOKEN.pattern}[ \t]*):[ \t]*(.*)", re.DOTALL)
_XML_ENCODING = r"<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z][A-Za-z0-9._-]*)"


class _Text:
    """The bytes of a fixture as text, one character for each byte where they are like ASCII."""

    def __init__(self, data: bytes) -> None:
        self.codec = _codec(data)
        self.text = data.decode(self.codec, "replace")
        self.first = len(data[:_COMMENTS_BEGIN_WITHIN].decode(self.codec, "ignore"))
        if self.codec != "latin-1" and not self.codec.startswith("utf"):
            self.text = self.text.replace("\x85", "\n")  # EBCDIC's own newline

    def value(self, text: str) -> str:
        """A line as it is kept: UTF-8, with other bytes as surrogates, so that none is lost."""
        if self.codec != "latin-1" or text.isascii():
            return text
        return text.encode("latin-1").decode("utf-8", "surrogateescape")


def _codec(data: bytes) -> str:
    """The codec to find comments with: XML, appendix F; Latin-1 for all that is like ASCII."""
    for start, codec in (
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (b"\x00\x00\x00<", "utf-32-be"),
        (b"<\x00\x00\x00", "utf-32-le"),
        (b"\x00<", "utf-16-be"),
        (b"<\x00", "utf-16-le"),
        ("<?xm".encode("cp037"), "cp037"),
    ):
        if data.startswith(start):
            return codec if codec != "cp037" else _ebcdic(data)
    return "latin-1"


def _ebcdic(data: bytes) -> str:
    """The code page that an XML declaration in EBCDIC names; the letters of all are the same."""
    named = re.match(_XML_ENCODING, data[:_COMMENTS_BEGIN_WITHIN].decode("cp037"))
    if named:
        with contextlib.suppress(LookupError, UnicodeError):
            if "<?xml".encode(named.group(1)) == data[:5]:
                return named.group(1)
    return "cp037"


def _comments(text: _Text) -> Iterator[tuple[int, Optional[str]]]:
    """The comments that begin early enough, each with its place; None for one without an end."""
    position = 0
    while True:
        opening = _MARKUP.search(text.text, position, text.first + len("<![CDATA["))
        if opening is None or opening.start() >= text.first:
            return
        start, is_comment = opening.end(), opening.group() == "<!--"
        end = text.text.find("-->" if is_comment else "]]>", start)
        if end < 0:
            yield start, None
            return
        if is_comment:
            yield start, text.text[start:end]
        position = end + 3


def _comment_goes_on(data: bytes) -> bool:
    """Whether the last of the comments in the beginning of a file ends further on."""
    return any(comment is None for _, comment in _comments(_Text(data)))


def _comment_lines(data: bytes) -> Iterator[tuple[int, str]]:
    """The lines of a fixture's comments, each with its number in the file."""
    text = _Text(data)
    for start, comment in _comments(text):
        first = 1 + len(_NEWLINE.findall(text.text, 0, start))
        for offset, line in _logical_lines(comment or ""):
            yield first + offset, text.value(line)


def _sidecar_lines(data: bytes) -> Iterator[tuple[int, str]]:
    """The lines of a sidecar, each with its number."""
    text = _Text(data)
    for number, line in _logical_lines("\n" + _BYTE_ORDER_MARK.sub("", text.text)):
        yield number, text.value(line)


def _logical_lines(part: str) -> Iterator[tuple[int, str]]:
    """The lines of a part of a file, with their continuations, each with its number from 0.

    The indentation that they have in common is removed; the first line, which may follow "<!--",
    does not count for that.
    """
    first, _, rest = _NEWLINE.sub("\n", part).partition("\n")
    lines = [first, *textwrap.dedent(rest).split("\n")]
    number, parts = 0, [""]
    for offset, line in enumerate(lines):
        text = line.strip(" \t")
        continues = text and parts[0] and line[0] in " \t" and not re.match(_KNOWN_KEY, text)
        if continues:
            parts.append(text)
        else:
            yield number, " ".join(parts)
            number, parts = offset, [text]
    yield number, " ".join(parts)


# Directives: the table


class _Rule:
    """One directive: what it takes, in words, and a function that reads it.

    The function is given the text in a fixture, or a value given to ``Response``, and returns the
    fields of the response, or None if it is wrong.
    """

    def __init__(
        self, name: str, takes: str, parse: Callable[[Any], Optional[dict[str, Any]]]
    ) -> None:
        self.name = name
        self.takes = takes
        self.parse = parse


_RULES: dict[str, _Rule] = {}


def _directive(takes: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Enter a function into the table under its name."""

    def enter(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
        name = parse.__name__.strip("_").capitalize()
        _RULES[name.lower()] = _Rule(name, takes, parse)
        return parse

    return enter


@_directive("a field name, a colon, and a value without control characters (RFC 9110 5.1, 5.5)")
def _header(text: str) -> Optional[dict[str, Any]]:
    name, colon, value = text.partition(":")
    value = value.strip(" \t")
    if not colon or not _TOKEN.fullmatch(name) or _UNSENDABLE.search(value):
        return None
    if name.lower() == "status":
        return _parsed("Status", value)
    return {"headers": [(name, value)]}


@_directive("three digits from 200 to 599, and a reason phrase if it is not the usual one")
def _status(text: str) -> Optional[dict[str, Any]]:
    match = re.fullmatch(r"([2-5][0-9][0-9])(?:[ \t]+(.*))?", text)
    if match is None or _UNSENDABLE.search(text):
        return None
    return {"status": int(match.group(1)), "reason": match.group(2)}


@_directive("one field name, of a field that the server would add")
def _without(text: str) -> Optional[dict[str, Any]]:
    return {"without": [text]} if _TOKEN.fullmatch(text) else None


@_directive("one field name, of a field that a client may send")
def _ignore(text: str) -> Optional[dict[str, Any]]:
    return {"ignore": [text]} if _TOKEN.fullmatch(text) else None


@_directive("gzip or deflate")
def _compress(found: Any) -> Optional[dict[str, Any]]:
    coding = found.lower() if isinstance(found, str) else found
    return {"compress": coding} if coding in ("gzip", "deflate") else None


@_directive("the size of a chunk in bytes, a whole number from 1 to 999999999999")
def _chunked(found: Any) -> Optional[dict[str, Any]]:
    return _whole_number("chunked", found)


@_directive("a number of seconds from 0 to 999999999, such as 0.5")
def _delay(found: Any) -> Optional[dict[str, Any]]:
    seconds = float(found) if _is_text(_SECONDS, found) else found
    return {"delay": seconds} if _is_number(seconds) and 0 <= seconds < 10**9 else None


@_directive("bytes a second, a whole number from 1 to 999999999999")
def _rate(found: Any) -> Optional[dict[str, Any]]:
    return _whole_number("rate", found)


@_directive(
    "close, reset or stall, and maybe a place: at start, at headers, at a number of bytes,"
    " at 0% to 100%"
)
def _fault(found: Any) -> Optional[dict[str, Any]]:
    fault = " ".join(found.lower().split()) if isinstance(found, str) else found
    return {"fault": fault} if _is_text(_FAULT, fault) else None


@_directive("yes")
def _template(found: Any) -> Optional[dict[str, Any]]:
    return {"template": True} if found is True or _is_text("(?i)yes", found) else None


def _whole_number(field: str, found: Any) -> Optional[dict[str, Any]]:
    number = int(found) if _is_text(_WHOLE_NUMBER, found) else found
    is_whole = _is_number(number) and isinstance(number, int)
    return {field: number} if is_whole and 0 < number < 10**12 else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(pattern: str, found: object) -> bool:
    return isinstance(found, str) and re.fullmatch(pattern, found) is not None


_WHOLE_NUMBER = "[1-9][0-9]{0,11}"
_SECONDS = r"[0-9]{1,9}(?:\.[0-9]+)?|\.[0-9]+"
_FAULT = (
    "(?P<kind>close|reset|stall)(?: at (?:"
    "(?P<place>start|headers)|(?P<percent>100|[1-9]?[0-9])%|(?P<bytes>0|[1-9][0-9]{0,11})"
    "))?"
)

#: Fields that people paste into fixtures as they stand in a response.
_RESPONSE_FIELDS = (
    "cache-control|content-(?:encoding|length|type)|etag|expires|last-modified|location"
    "|retry-after|set-cookie|transfer-encoding|vary|www-authenticate"
)

#: Control characters, and surrogates that stand for no byte.
_UNSENDABLE = re.compile("[\\x00-\\x08\\x0a-\\x1f\\x7f\\ud800-\\udc7f\\udd00-\\udfff]")
#: What begins a line of its own, though it is indented.
_KNOWN_KEY = rf"(?i:{'|'.join(_RULES)}|{_RESPONSE_FIELDS})[ \t]*:"


def _apply(fields: dict[str, Any], key: str, found: object) -> None:
    """Add what a directive says to the fields of a response; raises ValueError if it is wrong.

    ``found`` is the text in a fixture, or a value given to ``Response``.
    """
    if key.lower() not in _RULES:
        _check_free_key(key, found)
        return
    for field, value in _parsed(key, found).items():
        if isinstance(value, list):
            fields.setdefault(field, []).extend(value)
        elif field in fields:
            name = _RULES[key.lower()].name
            shown = _shown_text(found)
            raise ValueError(f"{name}: found a second value, {shown}; it takes one only")
        else:
            fields[field] = value


def _parsed(key: str, found: object) -> dict[str, Any]:
    fields = _RULES[key.lower()].parse(found)
    if fields is None:
        raise ValueError(_sentence(key, found))
    return fields


def _sentence(key: str, found: object) -> str:
    """What was found, and what would be right."""
    rule = _RULES[key.lower()]
    return f"{rule.name}: found {_shown_text(found)}; it takes {rule.takes}"


def _shown_text(found: object) -> str:
    """What an error shows of a text, or of a value as a fixture would have it."""
    text = found if isinstance(found, str) else repr(found)
    return repr(_readable(text[:80]))


def _readable(text: str) -> str:
    """Text for people: bytes that were kept as surrogates are read as Latin-1."""
    return re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte.group()) & 0xFF), text)


def _check_free_key(key: str, value: object) -> None:
    """Raise ValueError for a key that is not for the test to read, but a mistake."""
    if meant := _meant(key):
        raise ValueError(f"found the key {key[:80]!r}; the directive is {meant}")
    name = key.rstrip(" \t")
    if re.fullmatch(_RESPONSE_FIELDS, name, re.IGNORECASE):
        line = f"{name}: {value}".rstrip(" ")
        right = f"a response field is written {_shown_text(f'Header: {line}')}"
        raise ValueError(f"found {_shown_text(line)}; {right}")


@functools.lru_cache(maxsize=1024)
def _meant(key: str) -> Optional[str]:
    """The directive that an unknown key looks like a typo of; None if there is none."""
    for rule in _RULES.values():
        if key.rstrip(" \t").lower() == rule.name.lower():
            return rule.name
        alike = 2 * min(len(key), len(rule.name)) / (len(key) + len(rule.name))
        if key[0].lower() == rule.name[0].lower() and alike >= 0.8:
            matcher = difflib.SequenceMatcher(None, key.lower(), rule.name.lower())
            if matcher.ratio() >= 0.8:
                return rule.name
    return None


# The answer as a value, decided before its first byte

#: What ``Response`` takes as ``headers``: names and values, in pairs or in a mapping.
HeaderFields = Union[Mapping[str, Union[str, int]], Iterable[tuple[str, Union[str, int]]]]

#: All that a response says beside its body, in the order of the constructor's arguments.
_DEFAULTS = {
    "status": 200,
    "reason": None,
    "headers": (),
    "without": (),
    "ignore": (),
    "compress": None,
    "chunked": None,
    "delay": 0,
    "rate": None,
    "fault": None,
    "template": False,
    "asis": False,
}


class Response:
    """An answer: everything that a fixture can say, in the same words.

    ``body`` is bytes, before any coding. ``reason`` None is the usual phrase. ``headers`` is a
    sequence of (name, value) pairs or a mapping, ``without`` and ``ignore`` are sequences of names.
    ``compress`` is "gzip" or "deflate", ``chunked`` the size of a chunk in bytes, ``delay`` in
    seconds, ``rate`` in bytes of the body a second, and ``fault`` is written as in a fixture.
    ``template``: expressions in the body are expanded. ``asis``: the body is the whole answer.
    Raises ValueError, with the sentence of the directive, for a wrong value, and TypeError for a
    body that is no bytes.
    """

    status: int
    reason: Optional[str]
    headers: tuple[tuple[str, str], ...]
    without: tuple[str, ...]
    ignore: tuple[str, ...]
    compress: Optional[str]
    chunked: Optional[int]
    delay: float
    rate: Optional[int]
    fault: Optional[str]
    template: bool
    asis: bool
    #: The body before any content coding, and its coded forms by coding, each made once.
    _content: Union[bytes, _File]
    _codings: dict[str, bytes]
    _media_type: Optional[str]
    #: On a 304 that stands for a 200: the fields of the 200 that it leaves out, for the audit.
    _unsaid: Optional[tuple[tuple[str, str], ...]] = None
    _given: frozenset[str]
    _left_out: frozenset[str]
    _has_expressions: bool
    _planned: tuple[tuple[Any, ...], Response]
    # A plan has these too: its bytes, whether it ends the connection, whether it takes no time.
    _head: bytes
    _sent: Union[bytes, _File]
    _closes: bool
    _at_once: bool

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        *,
        reason: Optional[str] = None,
        headers: HeaderFields = (),
        without: Sequence[str] = (),
        ignore: Sequence[str] = (),
        compress: Optional[str] = None,
        chunked: Optional[int] = None,
        delay: float = 0,
        rate: Optional[int] = None,
        fault: Optional[str] = None,
        template: bool = False,
        asis: bool = False,
    ) -> None:
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise TypeError(f"body: found {body!r:.80}; it takes bytes")
        said: list[tuple[str, object]] = [
            *(("Header", text) for text in _header_texts(headers)),
            *(("Without", text) for text in _name_texts("Without", without)),
            *(("Ignore", text) for text in _name_texts("Ignore", ignore)),
        ]
        if not isinstance(status, int):
            raise ValueError(_sentence("Status", status))
        if status != 200 or reason is not None:
            said.append(("Status", f"{status}" if reason is None else f"{status} {reason}"))
        mechanics = (("Compress", compress), ("Chunked", chunked), ("Rate", rate), ("Fault", fault))
        said += [(key, value) for key, value in mechanics if value is not None]
        said.append(("Delay", delay))
        if template is not False:
            said.append(("Template", template))
        if not isinstance(asis, bool):
            raise ValueError(f"asis: found {asis!r:.80}; it takes True or False")
        fields: dict[str, Any] = {"asis": asis}
        for key, value in said:
            _apply(fields, key, value)
        self._set(fields, bytes(body))

    @classmethod
    def _of(cls, fields: dict[str, Any], content: Union[bytes, _File], media_type: str) -> Response:
        """The response that a fixture amounts to."""
        response = cls.__new__(cls)
        response._set(fields, content, media_type)
        return response

    def _set(
        self, fields: dict[str, Any], content: Union[bytes, _File], media_type: Optional[str] = None
    ) -> None:
        """Take the fields as the rules of the directives have made them."""
        lists = {name: tuple(fields.get(name, ())) for name in ("headers", "without", "ignore")}
        self.__dict__.update({**_DEFAULTS, **fields, **lists})
        texts = (self.reason or "", *(value for _, value in self.headers))
        self.__dict__.update(
            _content=content,
            _codings={},
            _media_type=media_type,
            _given=frozenset(name.lower() for name, _ in self.headers),
            _left_out=frozenset(name.lower() for name in self.without),
            _has_expressions=self.template or any("{{" in text for text in texts),
            _planned=((), None),
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set: a Response is a value, make another one")

    @property
    def body(self) -> bytes:
        """The body, before any coding; that of a large fixture is read from its file, when asked.

        Raises OSError where that file is gone or shorter by then.
        """
        return bytes(self._content)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Response):
            return NotImplemented
        return self._said() == other._said() and self.body == other.body

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        said = "".join(f", {name}={value!r}" for name, value in self._said().items() if value)
        return f"Response({self._content!r:.80}{said})"

    def _said(self) -> dict[str, Any]:
        """All that is not the body, in the order of the constructor's arguments."""
        return {name: getattr(self, name) for name in _DEFAULTS}

    def _mechanics(self) -> list[str]:
        """What happens to it on its way, for who reads a transcript."""
        notes = [f"Delay: {self.delay:g}"] if self.delay else []
        notes += [f"Rate: {self.rate}"] if self.rate else []
        notes += [f"Fault: {self.fault}"] if self.fault else []
        return [*notes, "as it is"] if self.asis else notes

    def _but(self, **changes: Any) -> Response:
        """A copy with some fields changed; the new values are not checked."""
        copy = object.__new__(Response)
        copy.__dict__.update(self.__dict__, _planned=((), None), **changes)
        if copy._content is not self._content:
            copy.__dict__["_codings"] = {}
        if "headers" in changes:
            copy.__dict__["_given"] = frozenset(name.lower() for name, _ in changes["headers"])
        return copy

    def _all(self, name: str) -> list[str]:
        """The values that are given for a field, by its lower-case name."""
        if name not in self._given:
            return []
        return [value for given, value in self.headers if given.lower() == name]

    def _members(self, name: str) -> list[str]:
        """The members of a field whose value is a list (RFC 9110 5.6.1), in lower case."""
        return _members(",".join(self._all(name)))

    def _value(self, name: str) -> Optional[str]:
        """The value of a field as a client would send it back."""
        values = self._all(name)
        return _as_sent(values[0]) if values else None


def _as_sent(text: str) -> str:
    """A field's value as a client may read its bytes: in Latin-1."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _header_texts(headers: HeaderFields) -> Iterator[str]:
    """What the Header directives would say; ValueError for what is no name and value."""
    pairs = headers.items() if hasattr(headers, "items") else headers
    for pair in pairs if hasattr(pairs, "__iter__") else [pairs]:
        name, value = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (pair, None)
        is_text = isinstance(value, (str, int)) and not isinstance(value, bool)
        if not isinstance(name, str) or ":" in name or not is_text:
            raise ValueError(_sentence("Header", f"{pair!r}"))
        yield f"{name}: {value}"


def _name_texts(key: str, names: Sequence[str]) -> Iterator[str]:
    """What the directives of that key would say; ValueError for what is no sequence of names."""
    if isinstance(names, (str, bytes)) or not hasattr(names, "__iter__"):
        raise ValueError(f"{_sentence(key, names)}, in a sequence")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(_sentence(key, name))
        yield name


def _text_response(status: int, words: str, headers: Sequence[tuple[str, str]] = ()) -> Response:
    """What the server has to say itself, in plain text."""
    body = words.encode("utf-8", "backslashreplace") + b"\n"
    media_type = ("Content-Type", "text/plain; charset=utf-8")
    return Response(body, status, headers=[media_type, *headers])


def _refuse(status: int, words: str, headers: Sequence[tuple[str, str]] = ()) -> Response:
    """The answer to what a client did wrong, the last one on its connection."""
    return _text_response(status, words, [*headers, ("Connection", "close")])


# The plan: what the answer to this request is (RFC 9110 13 and 14, RFC 9112 6 and 9)

_CONDITIONS = {"if-match", "if-none-match", "if-modified-since", "if-unmodified-since"}
_SELECTING = {*_CONDITIONS, "range"}
_NOT_ABOUT_CONTENT = {"connection", "date", "server"}
_IN_304 = {"cache-control", "content-location", "date", "etag", "expires", "server", "vary"}
_ENTITY_TAG = re.compile(r'(?:W/)?"[!\x23-\x7e\x80-\xff]*"')
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)"
_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_DAY = "(?:0[1-9]|[12][0-9]|3[01])"
_YEAR = "(?:0[1-9]|[1-9][0-9])[0-9][0-9]"
_WEEKDAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_HTTP_DATE = (
    f"{_WEEKDAY}, {_DAY} {_MONTH} {_YEAR} {_TIME} GMT"
    f"|{_WEEKDAY}(?:s|nes|rs|ur)?day, {_DAY}-{_MONTH}-[0-9]{{2}} {_TIME} GMT"
    f"|{_WEEKDAY} {_MONTH} (?: [1-9]|[12][0-9]|3[01]) {_TIME} {_YEAR}"
)
_RANGE_SPEC = "([0-9]+)-([0-9]*)|-([0-9]+)"
_EXPRESSION = re.compile(r"\{\{(base_url|host|port)\}\}")
_SERVER = f"feedtestserver/{__version__}"


def _plan(request: Request, response: Response, date: str, persistent: bool) -> Response:
    """What the response to this request is, complete; requests that are alike share it."""
    alike = date, persistent, request.version, request.method, request._path_as_sent
    plain = not response._has_expressions and _SELECTING.isdisjoint(request._values)
    shared_by, shared = response._planned  # read once: other threads replace it
    if plain and shared_by == alike:
        return shared
    response = _expand(request, response)
    if response.asis:
        plan = _verbatim(response)
    else:
        selected = response if plain else _select(request, response)
        plan = _complete(request, _sendable(request, selected), date, persistent)
    if plain:
        response.__dict__["_planned"] = alike, plan
    return plan


def _expand(request: Request, response: Response) -> Response:
    """Fill in {{base_url}}, {{host}} and {{port}}, in the headers and, if asked, in the body."""
    if not response._has_expressions:
        return response
    values = request._origin_values()

    def expanded(text: str) -> str:
        return _EXPRESSION.sub(lambda match: values[match.group(1)], text)

    content = response._content
    if response.template:
        content = bytes(content)
        codec = _codec(content)
        for name, value in values.items():
            content = content.replace(f"{{{{{name}}}}}".encode(codec), value.encode(codec))
    headers = tuple((name, expanded(value)) for name, value in response.headers)
    reason = response.reason and expanded(response.reason)
    return response._but(headers=headers, reason=reason, _content=content)


def _select(request: Request, response: Response) -> Response:
    """What the request's conditions and its Range make of a 200 (13.2.2)."""
    if response.status != 200 or request.method in ("OPTIONS", "TRACE"):
        return response
    response = _precondition(request, response)
    if response.status != 200 or request.method != "GET":
        return response
    return _in_range(request, response)


def _precondition(request: Request, response: Response) -> Response:
    """The response, or the 304 or 412 that the request's conditions make of it (13.2.2)."""
    asked = {name: request._sent(name, response.ignore) for name in _CONDITIONS}
    etag, modified = response._value("etag"), response._value("last-modified")
    reads = request.method in ("GET", "HEAD")
    if asked["if-match"] is not None:
        if not _has_tag(asked["if-match"], etag, weakly=False):
            return _precondition_failed(response, "If-Match", asked["if-match"])
    elif _is_newer(modified, asked["if-unmodified-since"]):
        return _precondition_failed(response, "If-Unmodified-Since", asked["if-unmodified-since"])
    tags = asked["if-none-match"]
    if tags is not None:
        if _has_tag(tags, etag, weakly=True):
            return (
                _not_modified(response)
                if reads
                else _precondition_failed(response, "If-None-Match", tags)
            )
    elif reads and _is_newer(modified, asked["if-modified-since"]) is False:
        return _not_modified(response)
    return response


def _has_tag(tags: str, etag: Optional[str], *, weakly: bool) -> bool:
    """Whether the list of a condition names an entity tag (8.8.3.2); ``*`` names any."""
    if tags == "*":
        return True
    if etag is None or (etag.startswith("W/") and not weakly):
        return False
    if tags == etag:  # also one that is malformed, as servers do send them
        return True
    named = _ENTITY_TAG.findall(tags)
    if weakly:
        return etag.removeprefix("W/") in [tag.removeprefix("W/") for tag in named]
    return etag in named


def _is_newer(modified: Optional[str], date: Optional[str]) -> Optional[bool]:
    """Whether a Last-Modified is later than a date; None where one is missing or is no date."""
    if modified is None or date is None:
        return None
    if modified == date:
        return False
    then, since = _seconds(modified), _seconds(date)
    return None if then is None or since is None else then > since


def _seconds(http_date: str) -> Optional[float]:
    """Seconds since the epoch, from any of the three formats of RFC 9110 5.6.7."""
    parsed = email.utils.parsedate_tz(http_date) if re.fullmatch(_HTTP_DATE, http_date) else None
    if parsed is None:
        return None
    try:
        datetime.date(*parsed[:3])
    except ValueError:  # 30 February
        return None
    return email.utils.mktime_tz(parsed)


def _not_modified(response: Response) -> Response:
    """The 304 for a 200, with the fields that RFC 9110 15.4.5 asks for."""
    kept = _IN_304 if "etag" in response._given else _IN_304 | {"last-modified"}
    headers = tuple(field for field in response.headers if field[0].lower() in kept)
    unsaid = tuple(field for field in response.headers if field not in headers)
    return response._but(status=304, reason=None, headers=headers, _unsaid=unsaid)


def _precondition_failed(response: Response, name: str, value: Optional[str]) -> Response:
    return _error_instead_of(response, 412, f"{name} does not hold: {value}")


def _error_instead_of(
    response: Response, status: int, words: str, headers: Sequence[tuple[str, str]] = ()
) -> Response:
    """What the server says itself instead; of the response, what is not about its content stays."""
    error = _text_response(status, words, headers)
    kept = [field for field in response.headers if field[0].lower() in _NOT_ABOUT_CONTENT]
    return response._but(
        status=status,
        reason=None,
        headers=(*error.headers, *kept),
        compress=None,
        chunked=None,
        _content=error._content,
    )


def _in_range(request: Request, response: Response) -> Response:
    """The response, or the 206 or 416 that the request's Range makes of it (RFC 9110 14.2)."""
    asked = request._sent("range", response.ignore)
    refused = "none" in response._members("accept-ranges")
    if asked is None or refused or not _is_still(request, response):
        return response
    content = _coded(response)
    size = len(content)
    part = _part(asked, size)
    if part is None:
        return response
    if not part:
        words = f"Range asks for {asked[:80]!r} of {size} bytes"
        return _error_instead_of(response, 416, words, [("Content-Range", f"bytes */{size}")])
    # A true Content-Length of the whole would be a false one of the part.
    whole = ("content-length", str(size))
    headers = [field for field in response.headers if (field[0].lower(), field[1]) != whole]
    added = [("Content-Range", f"bytes {part[0]}-{part[-1]}/{size}")]
    if response.compress:
        added.append(("Content-Encoding", response.compress))
    headers += _unsettled(response, added)
    return response._but(
        status=206,
        reason=None,
        headers=tuple(headers),
        compress=None,
        _content=content[part.start : part.stop],
    )


def _is_still(request: Request, response: Response) -> bool:
    """Whether If-Range, where it is sent, names what the response is now: strongly (13.1.5)."""
    validator = request._sent("if-range", response.ignore)
    if validator is None:
        return True
    is_etag = validator == response._value("etag") and not validator.startswith("W/")
    return is_etag or validator == response._value("last-modified")


def _part(asked: str, size: int) -> Optional[range]:
    """The bytes that a Range of one part asks for, maybe none; None where it asks for the whole.

    So do several parts, other units, and what is malformed (RFC 9110 14.1.2, 14.2).
    """
    unit, _, specs = asked.partition("=")
    parts = _members(specs)
    is_one = unit.lower() == "bytes" and len(parts) == 1
    match = re.fullmatch(_RANGE_SPEC, parts[0]) if is_one else None
    if match is None:
        return None
    first, last, suffix = (_number(digits) if digits else None for digits in match.groups())
    if suffix is not None:
        # An empty body has no last byte that a Content-Range could name: it is sent whole.
        return range(max(0, size - suffix), size) if size or not suffix else None
    assert first is not None
    if last is None:
        return range(first, size)
    return range(first, min(last + 1, size)) if first <= last else None


def _sendable(request: Request, response: Response) -> Response:
    """The response without what cannot be: codings and chunks of nothing, chunks by HTTP/1.0."""
    if response.compress and _has_no_content(request, response):
        response = response._but(compress=None)
    if response.chunked and (_has_no_content(request, response) or request.version == "1.0"):
        response = response._but(chunked=None)
    return response


def _has_no_content(request: Request, response: Response) -> bool:
    """Whether what follows the head is no body, be it a tunnel (RFC 9112 6.3)."""
    return response.status in (204, 304) or (request.method == "CONNECT" and response.status == 200)


def _complete(request: Request, response: Response, date: str, persistent: bool) -> Response:
    """A response with the fields that the server adds to it, and its head as it will be sent."""
    content = _coded(response)
    framing = ("Content-Length", str(len(content)))
    if response.chunked:
        framing = ("Transfer-Encoding", "chunked")
    bodiless = _has_no_content(request, response) or request.method == "HEAD"
    headers = [*response.headers, *_unsettled(response, _added(request, response, date, framing))]
    if _has_no_content(request, response):
        # Some clients believe that chunks come, whatever the status says.
        framed = "transfer-encoding" not in response._given
    else:
        framed = bodiless or _is_framed(headers, framing)
    announced = not persistent or not framed or _ends_by_its_own_word(request, response)
    if announced or request.version == "1.0":
        connection = "close" if announced else "keep-alive"
        headers += _unsettled(response, [("Connection", connection)])
    if bodiless:
        response, content = response._but(_content=b"", chunked=None), b""
    return response._but(
        headers=tuple(headers),
        _head=_head(response.status, _reason(response), headers),
        _sent=content,
        _closes=announced or response.fault is not None,
        _at_once=not (response.chunked or _takes_its_time(response)),
    )


def _coded(response: Response) -> Union[bytes, _File]:
    """The content as it is sent: in its content coding (RFC 9110 8.4.1), made once for all."""
    if response.compress is None:
        return response._content
    if response.compress not in response._codings:
        import zlib  # for these responses only, so not part of the import time

        compressor = zlib.compressobj(wbits={"gzip": 31, "deflate": 15}[response.compress])
        coded = compressor.compress(bytes(response._content)) + compressor.flush()
        response._codings[response.compress] = coded
    return response._codings[response.compress]


def _added(
    request: Request, response: Response, date: str, framing: tuple[str, str]
) -> Iterator[tuple[str, str]]:
    """The fields that the server would add."""
    yield "Date", date
    yield "Server", _SERVER
    if _has_no_content(request, response):
        return
    yield "Content-Type", response._media_type or _media_type(request._path_as_sent)
    if response.compress:
        yield "Content-Encoding", response.compress
    if response.chunked or "transfer-encoding" not in response._given:
        yield framing


def _unsettled(response: Response, fields: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Those of the fields to add that the response neither gives nor leaves out itself."""
    for name, value in fields:
        if name.lower() not in response._given and name.lower() not in response._left_out:
            yield name, value


def _is_framed(headers: Iterable[tuple[str, str]], framing: tuple[str, str]) -> bool:
    """Whether a client can tell where the body ends though the connection goes on."""
    names = ("transfer-encoding", "content-length")
    said = [(name.lower(), value.lower()) for name, value in headers if name.lower() in names]
    return said == [(framing[0].lower(), framing[1])]


def _ends_by_its_own_word(request: Request, response: Response) -> bool:
    """Whether the Connection field that the response gives, or leaves out, ends the connection."""
    has_a_word = "connection" in response._given | response._left_out
    return has_a_word and not _goes_on(request.version, response._members("connection"))


def _goes_on(version: str, options: Sequence[str]) -> bool:
    """Whether a connection persists, by the options of a Connection field (RFC 9112 9.3)."""
    return "close" not in options and (version != "1.0" or "keep-alive" in options)


def _members(value: str) -> list[str]:
    """The members of a list, in lower case, without the empty ones (RFC 9110 5.6.1.2)."""
    members = [member.strip(" \t") for member in value.lower().split(",")]
    return [member for member in members if member]


def _takes_its_time(response: Response) -> bool:
    """Whether there is more to sending it than the bytes."""
    return bool(response.delay or response.rate or response.fault)


def _verbatim(response: Response) -> Response:
    """An answer that is all in its body; the record has what can be made of its head."""
    status, lines = _first_head(bytes(response._content[:_MAX_LINE])) or (response.status, [])
    fields = (line.partition(":") for line in lines)
    return response._but(
        status=status,
        reason=None,
        headers=tuple((name.strip(), value.strip()) for name, colon, value in fields if colon),
        compress=None,
        chunked=None,
        _head=b"",
        _sent=response._content,
        _closes=True,
        _at_once=not _takes_its_time(response),
    )


def _first_head(answer: bytes) -> Optional[tuple[int, list[str]]]:
    """The status and the field lines of an answer, of a final one if there are others before."""
    found = None
    for head in re.split(b"\r?\n\r?\n", answer):
        first, *lines = head.decode("utf-8", "surrogateescape").split("\n")
        status = re.match(r"HTTP/[^ \r]* +([1-9][0-9][0-9])(?![0-9])", first)
        if status is None or (found and found[0] >= 200):
            break
        found = int(status.group(1)), lines
    return found


@functools.lru_cache(maxsize=8)
def _http_date(seconds: int) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


# The request, as it is kept on record


class Request:
    """What a client sent; what could not be read of it is empty.

    ``method`` and ``target`` are as sent, ``version`` is "1.1" or "1.0", ``body`` is decoded from
    a chunked transfer coding. ``time`` is when it was read, in seconds since the epoch, by the
    server's clock; ``connection`` a number that is equal for requests that shared a connection;
    ``response`` the answer as it was planned, with all its fields, None until then.
    """

    __slots__ = (
        "_answered_at",
        "_base_url",
        "_came_at",
        "_lines",
        "_origin",
        "_path_as_sent",
        "_query_string",
        "_refused",
        "_step",
        "_values",
        "body",
        "connection",
        "method",
        "response",
        "target",
        "time",
        "version",
    )

    def __init__(
        self,
        method: str = "",
        target: str = "",
        version: str = "",
        lines: str = "",
    ) -> None:
        self.method = method
        self.target = target
        self.version = version
        self.body = b""
        self.time = 0.0
        self.connection = 0
        self.response: Optional[Response] = None
        self._lines = lines
        self._base_url = ""
        self._origin = ""
        self._step = ""
        self._refused = False
        # By the server's timer, as its clock may stand still: when the last of it came, and when
        # its answer began; infinity: the client did not stay for all of that.
        self._came_at = 0.0
        self._answered_at = 0.0
        self._values = self._read_values()
        self._read_target(target)

    def _read_target(self, target: str) -> None:
        if not target.isascii():  # raw UTF-8, read as Latin-1
            target = target.encode("latin-1").decode("utf-8", "surrogateescape")
        self._path_as_sent, _, self._query_string = target.partition("?")
        absolute = _ABSOLUTE_FORM.fullmatch(self._path_as_sent)
        if absolute:
            self._origin = _origin(*absolute.group(1, 2))
            self._path_as_sent = absolute.group(3) or "/"

    def _read_values(self) -> dict[str, str]:
        """The values by lower-case name, those of repeated fields joined as a list."""
        values: dict[str, str] = {}
        for name, value in _FIELD_LINE.findall(self._lines):
            name = name.lower()
            value = value.strip(" \t")
            values[name] = f"{values[name]}, {value}" if name in values else value
        return values

    def _locate(self, server: FeedTestServer, scheme: str = "http", tunnel: str = "") -> None:
        """Find the origin that was asked, by a scheme, maybe in a tunnel; the server's own is "".

        The target tells it, else the tunnel, else, inside of intercept(), the Host field.
        """
        self._base_url = server._root_url(scheme)
        if not self._origin and tunnel:
            self._origin = _origin(scheme, tunnel)
        elif not self._origin and server._intercepting:
            host = self._values.get("host", "")
            named = _origin(scheme, host if _HOST.fullmatch(host) else "")
            self._origin = "" if server._is_local(named) else named
        if self._origin and server._is_own(self._origin):
            self._origin = ""

    def __str__(self) -> str:
        answer = f" -> {self.response.status}" if self.response else ""
        return f"{self.method} {self._shown}{answer}" if self.method else f"(unreadable){answer}"

    def __repr__(self) -> str:
        return f"<Request {self}>"

    @property
    def headers(self) -> Headers:
        """The fields, case-insensitive, with repeats kept; Latin-1, as wsgiref has them."""
        lines = _FIELD_LINE.findall(self._lines)
        return _headers((name, value.strip(" \t")) for name, value in lines)

    @property
    def url(self) -> str:
        """The whole URL that was asked for."""
        if not self._path_as_sent.startswith("/"):
            return self._base_url if self.target else ""
        query = f"?{self._query_string}" if "?" in self.target else ""
        return f"{self._origin or self._base_url}{self._path_as_sent}{query}"

    @property
    def path(self) -> str:
        """The path of the URL, percent-decoded."""
        return _unquote(self._path_as_sent)

    @property
    def query(self) -> dict[str, list[str]]:
        """The query of the URL, as ``urllib.parse.parse_qs`` reads it."""
        return urllib.parse.parse_qs(self._query_string)

    @property
    def _shown(self) -> str:
        """The target, or the whole URL where another host was asked."""
        return self.url if self._origin else self.target

    @property
    def _host(self) -> str:
        """The name of the other host that was asked, without its port; empty for the server."""
        return _host_and_port(self._origin)[0]

    @property
    def _address(self) -> _Address:
        """What respond() compares: origin, path and query, decoded."""
        query = _unquote(self._query_string) if "?" in self.target else None
        return self._origin, self.path, query

    def _sent(self, name: str, ignored: Sequence[str]) -> Optional[str]:
        """The value of a field, unless the answer is to ignore that it was sent."""
        if ignored and name in [other.lower() for other in ignored]:
            return None
        return self._values.get(name)

    def _persists(self, ignored: Sequence[str]) -> bool:
        """Whether the client would go on with the connection (RFC 9112 9.3)."""
        return _goes_on(self.version, _members(self._sent("connection", ignored) or ""))

    def _origin_values(self) -> dict[str, str]:
        """The values of the template expressions."""
        origin = self._origin or self._base_url
        host, port = _host_and_port(origin)
        return {"base_url": origin, "host": host, "port": str(port)}


#: What ``respond()`` takes as a step: a fixture's name, a status code, bytes, a Response, or a
#: callable that takes the Request and returns one of these.
Step = Union[str, int, bytes, Response, Callable[[Request], Any]]


def _headers(pairs: Iterable[tuple[str, str]]) -> Headers:
    """Fields with whatever values; some Pythons refuse what they would not send themselves."""
    fields: list[tuple[str, str]] = []
    headers = Headers(fields)
    fields.extend(pairs)
    return headers


# The bytes on the wire

#: Steps a second in which a body is dripped, unless they would be less than a byte.
_STEPS_A_SECOND = 10
#: Chunks that are made at a time, which takes a millisecond.
_CHUNKS_AT_ONCE = 1000
_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
# As RFC 9110 calls them, which not every Python does.
_PHRASES.update({413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable"})
_PHRASES[422] = "Unprocessable Content"


def _write(plan: Response, wire: FeedTestRequestHandler) -> None:
    """Write a planned response: delay, status line and fields, body; a fault breaks it off.

    ``wire`` is what sends, lets time pass, and breaks off.
    """
    if plan._at_once:
        _write_at_once(plan, wire.send)
        return
    fault, limit = _fault_of(plan)
    wire.pause(plan.delay)
    if limit is not None:
        wire.send(plan._head)
        _write_body(plan, wire, limit)
    if fault:
        wire.break_off(fault)
    elif plan.chunked:
        wire.send(b"\r\n0\r\n\r\n" if plan._sent else b"0\r\n\r\n")


def _write_at_once(plan: Response, send: Callable[[Union[bytes, memoryview]], object]) -> None:
    """Write an answer without delay, rate, fault and chunks, in as few pieces as it is in."""
    head, content = plan._head, plan._sent
    if isinstance(content, _File):
        send(head)
        for block in content.blocks():
            send(block)
    elif len(content) <= _SMALL:
        send(head + content)
    else:
        send(head)
        send(content)


def _write_body(plan: Response, wire: FeedTestRequestHandler, end: int) -> None:
    """Write the bytes of the body up to an end, dripped and in chunks where that is planned."""
    position, begin = 0, wire.now()
    for block in _blocks(plan._sent, _step_size(plan), end):
        if plan.rate:
            wire.pause(begin + (position + len(block)) / plan.rate - wire.now())
        wire.send(_in_chunks(block, position, plan) if plan.chunked else block)
        position += len(block)


def _step_size(plan: Response) -> int:
    """How many bytes to send at a time: a step of the rate, some chunks, or a block."""
    dripped = max(1, plan.rate // _STEPS_A_SECOND) if plan.rate else _BLOCK
    return min(_BLOCK, dripped, plan.chunked * _CHUNKS_AT_ONCE if plan.chunked else _BLOCK)


def _fault_of(plan: Response) -> tuple[Optional[str], Optional[int]]:
    """What happens, if anything, and where in the body; None: before the status line."""
    size = len(plan._sent)
    match = re.fullmatch(_FAULT, plan.fault or "")
    if match is None:
        return None, size
    kind, place, percent, count = match.group("kind", "place", "percent", "bytes")
    if percent or count:
        return kind, int(count) if count else size * int(percent) // 100
    return kind, 0 if place == "headers" else None


def _blocks(content: Union[bytes, _File], size: int, end: int) -> Iterator[memoryview]:
    """What comes before an end, in blocks of that size, the last one maybe smaller."""
    if isinstance(content, _File):
        yield from content[:end].blocks(size)
        return
    part = memoryview(content)[:end]
    for start in range(0, len(part), size):
        yield part[start : start + size]


def _in_chunks(block: memoryview, position: int, plan: Response) -> bytes:
    """A block of the body with the chunk sizes that belong between its bytes (RFC 9112 7.1)."""
    size = plan.chunked
    assert size
    parts: list[Union[bytes, memoryview]] = []
    start = 0
    while start < len(block):
        at = position + start
        if at % size == 0:
            end_of_last = b"\r\n" if at else b""  # goes out with what comes after it
            parts.append(b"%s%x\r\n" % (end_of_last, min(size, len(plan._sent) - at)))
        end = start + size - at % size
        parts.append(block[start:end])
        start = end
    return b"".join(parts)


def _reason(response: Response) -> str:
    return _PHRASES.get(response.status, "") if response.reason is None else response.reason


def _head(status: int, reason: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The status line and the field lines; text goes out as UTF-8, other bytes as they were."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
    return f"HTTP/1.1 {status} {reason}\r\n{lines}\r\n".encode("utf-8", "surrogateescape")


# The audit: what a client did wrong, as the feed's owner would see it


class Finding(str):
    """What a client did wrong, in a sentence: which request, what was sent, and what was due.

    ``rule`` is the name of the rule that was broken, ``request`` the Request that broke it.
    """

    rule: str
    request: Request


def audit(requests: Iterable[Request]) -> list[Finding]:
    """What the client that sent these requests did wrong, in their order.

    The rules are those by which the owners of feeds judge readers:

        no-validator     it asked again without the validators that it had
        wrong-etag       it sent an If-None-Match that is not the last ETag
        wrong-date       it sent an If-Modified-Since that is not the last Last-Modified
        too-early        it asked again before Retry-After or max-age had passed
        moved            it asked for the old URL again after a 301 or 308
        gone             it asked again after a 410
        no-user-agent    it sent no User-Agent
        no-compression   it does not accept gzip
        no-feed-type     its Accept names no type of feeds
        referer, cookie  it sent a Referer, or a cookie that no answer had set

    Each GET is judged by what the client could know of its URL: the answers that had come whole
    before it asked. Time is that of ``request.time``. Requests that were refused are not audited.
    """
    client = _Client()
    in_order = sorted(requests, key=lambda request: request._came_at)
    answered = [request for request in in_order if request.response and not request._refused]
    return [finding for request in answered for finding in client.ask(request)]


# The audit: what the client knows

#: The validators that answers give, the conditions that send them back, and who says so.
_VALIDATORS = {
    "ETag": ("If-None-Match", "RFC 9110 13.1.2"),
    "Last-Modified": ("If-Modified-Since", "RFC 9110 13.1.3"),
}
_NO_VALIDATORS: dict[str, tuple[str, ...]] = dict.fromkeys(_VALIDATORS, ())
_REDIRECTS = (301, 302, 303, 307, 308)
#: How long these are fresh says nothing: they ask for another request at once.
_ASK_FOR_MORE = (*_REDIRECTS, 206, 401, 406, 407, 412, 416)
#: Request fields that choose between representations which a client may keep side by side; not so
#: Accept-Encoding and User-Agent, which most answers vary with.
_CHOOSING = ("accept", "accept-language", "authorization", "cookie")
_PAGE = "text/html"


class _Client:
    """The client, as it goes from one request to the next and learns from the answers."""

    def __init__(self) -> None:
        self.urls: dict[str, _Known] = {}
        self.cookies: set[str] = set()
        self.numbers = itertools.count(1)
        self.on_their_way: list[_Exchange] = []

    def ask(self, request: Request) -> list[Finding]:
        """The findings about the next request, whose answer it knows later on."""
        self.catch_up(request._came_at)
        known = self.what_is_known_of(request.url)
        exchange = _Exchange(next(self.numbers), request, known, self.cookies)
        findings = []
        if request.method == "GET":
            known.gets += 1
            if known.kept is None and exchange.status == 304:
                known.suppose(exchange)
            findings = exchange.findings()
        self.hear(exchange)
        return findings

    def what_is_known_of(self, url: str) -> _Known:
        return self.urls.setdefault(_comparable(url), _Known())

    def catch_up(self, now: float) -> None:
        """Learn from the answers that have come whole by now, in the order in which they came."""
        for exchange in sorted(self.on_their_way, key=lambda exchange: exchange.arrival):
            if exchange.arrival <= now:
                self.on_their_way.remove(exchange)
                exchange.known.learn(exchange)

    def hear(self, exchange: _Exchange) -> None:
        """Note what the head of an answer tells, even if its body is lost, for catch_up()."""
        for value in exchange.given.get_all("Set-Cookie"):
            self.cookies.update(_cookies(value.partition(";")[0]))
        if exchange.request.method not in ("GET", "HEAD"):
            return
        if exchange.status < 400:
            exchange.known.add(exchange.validators)
        if exchange.location:
            exchange.leads_to = self.what_is_known_of(exchange.location)
            exchange.leads_to.come_from(exchange.known)
        if exchange.request.method == "GET":
            if exchange.status >= 400 or exchange.arrival == math.inf:
                exchange.known.failed = exchange.number
            if exchange.arrival < math.inf:
                self.on_their_way.append(exchange)


class _Known:
    """What the client knows of one URL."""

    def __init__(self) -> None:
        self.gets = 0
        self.failed = 0  # the number of the last GET that met an error or was cut; 0: none
        #: The last answer that came whole, and the last with a word on when to ask again.
        self.last: Optional[_Exchange] = None
        self.waiting: Optional[_Exchange] = None
        #: A 301 or 308, and a 410, that still hold.
        self.moved: Optional[_Exchange] = None
        self.gone: Optional[_Exchange] = None
        #: Of its copy: the last 200 or 304, its type and its validators.
        self.kept: Optional[_Exchange] = None
        self.media_type = ""
        self.validators = _NO_VALIDATORS
        #: Whether these are to be sent back.
        self.must_validate = False
        #: Validators that may be sent back as well: given since without a copy, as by HEAD or with
        #: half a body; and those of other URLs, from where or to where redirects have led.
        self.others = _NO_VALIDATORS
        self.brought = _NO_VALIDATORS
        #: All validators, and the types of all bodies, that this URL ever gave.
        self.ever_given: set[str] = set()
        self.media_types: set[str] = set()
        #: The URLs whose redirects lead here just now.
        self.sources: set[_Known] = set()

    def may_send(self, name: str) -> tuple[str, ...]:
        given = self.validators, self.others, self.brought
        return sum((each[name] for each in given), ())

    @property
    def has_validators(self) -> bool:
        return any(map(self.may_send, _VALIDATORS))

    def add(self, validators: dict[str, tuple[str, ...]]) -> None:
        """Note validators that the client may have kept."""
        self.others = _joined(self.others, validators)
        self.ever_given.update(*validators.values())

    def come_from(self, source: _Known) -> None:
        """Expect what a redirect sends here, with the validators that may be sent there."""
        sources = {source, *source.sources}
        source.sources = set()
        self.sources |= sources
        may_come = {name: source.may_send(name) for name in _VALIDATORS}
        self.brought = _joined(self.brought, may_come)

    def learn(self, exchange: _Exchange) -> None:
        """Learn from an answer that has come whole."""
        self.last = exchange
        if exchange.status < 400 or exchange.waits():
            self.waiting = exchange
        before = self.moved
        if exchange.status < 400 or exchange.status == 410:
            self.moved = self.gone = None
        if exchange.status in (301, 308) and exchange.location:
            self.moved = exchange
            if before and before.leads_to is exchange.leads_to:
                exchange.since = before.since
        elif exchange.status == 410:
            self.gone = exchange
        elif exchange.status in (200, 304):
            self.keep(exchange)

    def keep(self, exchange: _Exchange) -> None:
        """Take the validators of a 200, or those that a 304 carries (RFC 9111 4.3.4)."""
        is_page = exchange.media_type == _PAGE and self.media_type not in ("", _PAGE)
        given = exchange.validators
        replaced = [name for name in given if exchange.status == 200 or given[name]]
        if is_page:  # in the place of a feed, of which the client may keep its copy
            self.others = _joined(self.others, self.validators)
        else:
            self.others = {**self.others, **dict.fromkeys(replaced, ())}
            self.brought = {**self.brought, **dict.fromkeys(replaced, ())}
            self.media_type = exchange.media_type
        if exchange.status == 200:
            self.media_types.add(exchange.media_type)
        if replaced:
            storable = "no-store" not in _members(exchange.value("Cache-Control"))
            self.must_validate = storable and not is_page
        self.kept = exchange
        self.validators = {**self.validators, **{name: given[name] for name in replaced}}
        for source in self.sources:
            source.brought = self.validators
            if exchange.status == 200:  # this copy took the place of the source's own
                source.must_validate = False
        self.sources = set()

    def suppose(self, exchange: _Exchange) -> None:
        """Take what the first 304 confirms as given before the record began."""
        for name, given in exchange.validators.items():
            said = given or tuple(exchange.unsaid.get_all(name))
            if not said and exchange.plan._unsaid is None:  # a 304 of the test's own
                said = tuple(sent for sent in exchange.sends_back(name) if sent != "*")
            self.validators = {**self.validators, name: said}


class _Exchange:
    """A request and its answer.

    ``known`` and ``cookies`` are the client's, and go on changing. The rules look at them before
    the client has heard this answer.
    """

    def __init__(self, number: int, request: Request, known: _Known, cookies: set[str]) -> None:
        assert request.response is not None
        # Its place among all; of redirects in a row that lead to the same URL, that of the first.
        self.number = self.since = number
        self.request, self.plan = request, request.response
        self.time, self.status = request.time, self.plan.status
        self.known, self.cookies = known, cookies
        self.leads_to: Optional[_Known] = None
        self.sent = request._read_values()
        self.given = _headers((name, _as_sent(value)) for name, value in self.plan.headers)
        self.unsaid = _headers((name, _as_sent(value)) for name, value in self.plan._unsaid or ())
        self.validators = {name: self.spellings(name) for name in _VALIDATORS}
        self.location = self.find_location()
        self.arrival = self.find_arrival()
        self.media_type = self.find_media_type()

    def findings(self) -> list[Finding]:
        """What is wrong with the request, which is a GET."""
        which = f"GET {self.request._shown} ({_ordinal(self.known.gets)} request)"
        findings = []
        for name, rule in _POLITENESS.items():
            if wrong := rule(self):
                finding = Finding(f"{which}: {wrong}")
                finding.rule, finding.request = name, self.request
                findings.append(finding)
        return findings

    # What was asked

    def said(self, name: str) -> str:
        """A sentence's beginning: what was sent in a field, if anything."""
        value = self.sent.get(name.lower())
        return f"no {name} was sent" if value is None else f"{name} was {_legible(value)}"

    def sends_back(self, name: str) -> list[str]:
        """What it sends back of a validator: the value of the condition, and its list's members."""
        value = self.sent.get(_VALIDATORS[name][0].lower())
        if value is None:
            return []
        # Commas part the members, unless they are in an entity tag.
        members = re.findall('(?:[^",]|"[^"]*")+', value) if name == "ETag" else []
        return [value, *(member.strip(" \t") for member in members)]

    @property
    def is_another_variant(self) -> bool:
        """Whether an answer before was to a request for another representation (RFC 9111 4.1)."""
        before = [each for each in (self.known.kept, self.known.last) if each]
        return any(
            each.sent.get(name) != self.sent.get(name)
            for each in before
            for name in _members(each.value("Vary"))
            if name in _CHOOSING
        )

    # What was answered

    def value(self, name: str) -> str:
        """The value of a field of the answer, that of repeated ones as a list; empty for none."""
        return ", ".join(self.given.get_all(name))

    def spellings(self, name: str) -> tuple[str, ...]:
        """The values of a field; clients may read one that is given twice as a list."""
        values = tuple(filter(None, self.given.get_all(name)))
        return (*values, ", ".join(values)) if len(values) > 1 else values

    def find_location(self) -> str:
        """Where a redirect leads to; empty for other answers, and where it leads nowhere."""
        location = self.given["Location"] if self.status in _REDIRECTS else None
        if not location:
            return ""
        try:
            as_text = location.encode("latin-1").decode("utf-8", "surrogateescape")
            return urllib.parse.urljoin(self.request.url, as_text)
        except ValueError:
            return ""

    def find_arrival(self) -> float:
        """When the answer can have come whole, at the earliest; infinity where it never did.

        Infinity, too, where the client did not stay for it, and for an answer that is sent as it
        is, since nobody knows what clients make of it.
        """
        plan, size = self.plan, len(self.plan._sent)
        fault, end = _fault_of(plan)
        has_body = self.request.method != "HEAD" and not _has_no_content(self.request, plan)
        promised = (
            _number_or_zero(self.value("Content-Length")) if has_body and not plan.chunked else 0
        )
        broken_off = fault and (end is None or end < size or plan.chunked)
        if broken_off or promised > size or plan.asis:
            return math.inf
        return self.request._answered_at + plan.delay + (size / plan.rate if plan.rate else 0)

    def find_media_type(self) -> str:
        """The type of what the URL is known to have, or may have by its name."""
        said = self.value("Content-Type").partition(";")[0].strip(" \t").lower()
        if said and 200 <= self.status < 300:
            return said
        return self.known.media_type or _media_type(self.request._path_as_sent)

    def waits(self, fresh_as_well: bool = True) -> list[tuple[float, str]]:
        """Until when the answer asks to wait, or is fresh, and by which words."""
        waits = (_end_of_wait(self), _end_of_freshness(self) if fresh_as_well else None)
        return [wait for wait in waits if wait]

    @property
    def leads_nowhere(self) -> bool:
        """Whether a client that follows this redirect meets an error, or goes round in circles."""
        passed: set[_Known] = set()
        known = self.leads_to
        while known and known not in passed:
            worked = known.kept.number if known.kept else 0
            # It has failed after this redirect, and not worked since the first of its kind.
            if known.failed > self.number and worked < self.since:
                return True
            passed.add(known)
            known = known.last.leads_to if known.last else None
        return known is not None


def _end_of_wait(answer: _Exchange) -> Optional[tuple[float, str]]:
    """Until when an answer asks to wait, and by which words (RFC 9110 10.2.3)."""
    value = answer.given["Retry-After"] if answer.status in (429, 503) else None
    if value is None:
        return None
    end = _seconds(value)
    if end is None and re.fullmatch("[0-9]+", value):
        # Clients may count from Date, which has no fractions.
        end = math.floor(answer.time) + _number_or_zero(value)
    said = f"Retry-After was {_legible(value)} (RFC 9110 10.2.3)"
    return None if end is None else (end, said)


def _end_of_freshness(answer: _Exchange) -> Optional[tuple[float, str]]:
    """Until when an answer is fresh, and by which words (RFC 9111 4.2)."""
    directives = _members(answer.value("Cache-Control"))
    # Also no-cache with the names of fields, which clients may read as without (5.2.2.4).
    is_stale = any(directive.startswith(("no-cache", "no-store")) for directive in directives)
    if is_stale or answer.status in _ASK_FOR_MORE or "*" in _members(answer.value("Vary")):
        return None
    came, said_date = answer.time, _seconds(answer.value("Date"))
    date = came if said_date is None else said_date
    lifetime: float
    max_ages = [each[len("max-age=") :] for each in directives if each.startswith("max-age=")]
    expires = answer.given["Expires"]
    if max_ages:
        # The least, where there are several (4.2.1).
        lifetime = min(_number_or_zero(max_age.strip('"')) for max_age in max_ages)
        said = f"Cache-Control was {_legible(answer.value('Cache-Control'))}"
    elif expires is not None:
        lifetime = (_seconds(expires) or 0) - date  # what is no date has passed (5.3)
        said = f"Expires was {_legible(expires)}"
    else:
        return None
    # A 304 changes only the fields that it carries (3.2): an Age before it may still hold.
    ages = _members(answer.value("Age")) or _members(answer.unsaid["Age"] or "")
    age = _number_or_zero(ages[0]) if ages else 0
    said += f" and Age was {age}" if age else ""
    return came + lifetime - max(age, came - date), f"{said} (RFC 9111 4.2)"


def _number_or_zero(value: str) -> int:
    """The number that a Content-Length, an Age or the like gives; 0 where it gives none."""
    return _number(value) if re.fullmatch("[0-9]+", value) else 0


def _comparable(url: str) -> str:
    """A URL in the one form that is compared (RFC 3986 6.2), by whatever name of this machine."""
    try:
        origin, path = _parted(url)
    except ValueError:  # nobody gets there
        return url
    host, port = _host_and_port(origin)
    if host in _LOOPBACK:
        origin = f"{origin.partition(':')[0]}://localhost:{port}"
    return f"{origin}/{_unquote(path.partition('#')[0].removeprefix('/'))}"


def _joined(
    some: dict[str, tuple[str, ...]], others: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    return {name: tuple(dict.fromkeys(some[name] + others[name])) for name in _VALIDATORS}


# The audit: the rules

#: The rules by their names; each tells what is wrong with a GET, or None.
_POLITENESS: dict[str, Callable[[_Exchange], Optional[str]]] = {}
#: Types that compression does little for.
_MEDIA = "(?:audio|font|image|video)/.*"
#: Types that no feed is served as, and those and the wildcards that an Accept for feeds may name.
_NO_FEED = f"{_MEDIA}|text/(?:css|javascript|plain)|{_PAGE}"
_FEED = r".*(?:atom|json|opml|rdf|rss|xml).*|(?:\*|application|text)/\*|\*"


def _politeness(rule: Callable[[_Exchange], Optional[str]]) -> Callable[[_Exchange], Optional[str]]:
    """Enter a rule into the table, by the name of its function.

    Its sentence names the section that defines the field or the status. Owners of feeds may ask for
    more: where Accept or Accept-Encoding is missing, anything goes by RFC 9110 12.5.
    """
    _POLITENESS[rule.__name__.strip("_").replace("_", "-")] = rule
    return rule


@_politeness
def _no_validator(get: _Exchange) -> Optional[str]:
    sends_one = not {"if-none-match", "if-modified-since"}.isdisjoint(get.sent)
    goes_on = {"range", "if-range"} <= get.sent.keys()  # with the rest of a part (13.1.5)
    if sends_one or goes_on or get.is_another_variant or not get.known.must_validate:
        return None
    if get.known.sources and not any(source.has_validators for source in get.known.sources):
        return None  # it came for another URL, of which it has no copy
    is_quoted = re.compile('(?:W/)?"[^"]*"').fullmatch  # blanks occur, though they may not
    for name, is_sound in (("ETag", is_quoted), ("Last-Modified", email.utils.parsedate_tz)):
        for value in filter(is_sound, get.known.validators[name]):
            last = f"the last {name} given was {_legible(value)} ({_VALIDATORS[name][1]})"
            return f"neither If-None-Match nor If-Modified-Since was sent, but {last}"
    return None


@_politeness
def _wrong_etag(get: _Exchange) -> Optional[str]:
    return _wrong_validator(get, "ETag")


@_politeness
def _wrong_date(get: _Exchange) -> Optional[str]:
    return _wrong_validator(get, "Last-Modified")


def _wrong_validator(get: _Exchange, name: str) -> Optional[str]:
    sent, known = get.sends_back(name), get.known
    # An error at first does not tell what the client had before the record began.
    is_unknown = known.kept is None and get.status >= 400
    # What is sent to a redirect is meant for where it leads: it is how a 304 comes through it.
    if not sent or is_unknown or get.status in _REDIRECTS:
        return None
    # Byte for byte, and W/ as well, which is more than the comparison of RFC 9110 8.8.3.2 asks for.
    right = {*known.may_send(name), *(known.ever_given if get.is_another_variant else ())}
    if not right.isdisjoint(sent):
        return None
    given = f"no {name} was given" + (" with the last 200" if known.media_types else "")
    if last := known.validators[name] or known.others[name]:
        given = f"the last {name} given was {_legible(last[-1])}"
    condition, source = _VALIDATORS[name]
    return f"{get.said(condition)}, but {given} ({source})"


@_politeness
def _too_early(get: _Exchange) -> Optional[str]:
    last = get.known.waiting
    if last is None:
        return None
    for end, said in last.waits(fresh_as_well=not get.is_another_variant):
        if last.time <= get.time < end:  # before that answer, the clock was set back
            passed, left = math.floor(get.time - last.time), math.ceil(end - get.time)
            return f"asked again after {passed} s, {left} s too early, as {said}"
    return None


@_politeness
def _moved(get: _Exchange) -> Optional[str]:
    redirect, was_led_here = get.known.moved, get.known.sources
    if redirect is None or was_led_here or redirect.leads_nowhere:
        return None
    section = {301: "15.4.2", 308: "15.4.9"}[redirect.status]
    where = f"{_quote(redirect.location):.200} (RFC 9110 {section})"
    return f"asked for the old URL again, but a {redirect.status} had moved it to {where}"


@_politeness
def _gone(get: _Exchange) -> Optional[str]:
    if get.known.gone is None:
        return None
    return "asked again, but a 410 had said that it is gone for good (RFC 9110 15.5.11)"


@_politeness
def _no_user_agent(get: _Exchange) -> Optional[str]:
    if get.sent.get("user-agent"):
        return None
    right = "it should name the program and its version"
    return f"{get.said('User-Agent')}; {right} (RFC 9110 10.1.5)"


@_politeness
def _no_compression(get: _Exchange) -> Optional[str]:
    accepted = _accepted(get.sent.get("accept-encoding", ""))
    is_no_text = re.fullmatch(_MEDIA, get.media_type) or "range" in get.sent
    if is_no_text or accepted.get("gzip", accepted.get("x-gzip", accepted.get("*"))):
        return None
    return f"{get.said('Accept-Encoding')}; it should list gzip (RFC 9110 12.5.3)"


@_politeness
def _no_feed_type(get: _Exchange) -> Optional[str]:
    accepted = _accepted(get.sent.get("accept", ""))
    names_one = any(is_so and re.fullmatch(_FEED, name) for name, is_so in accepted.items())
    asks_for_page = accepted.get(_PAGE) and _PAGE in get.known.media_types
    # By its name it is a feed, whatever it is served as.
    is_feed = re.fullmatch(_FEED, _media_type(get.request._path_as_sent))
    is_other = re.fullmatch(_NO_FEED, get.media_type) and not is_feed
    if names_one or asks_for_page or is_other:
        return None
    right = "it should name application/atom+xml, application/rss+xml or another feed type"
    return f"{get.said('Accept')}; {right} (RFC 9110 12.5.1)"


@_politeness
def _referer(get: _Exchange) -> Optional[str]:
    if "referer" not in get.sent:
        return None
    return f"{get.said('Referer')}, but nobody has followed a link (RFC 9110 10.1.3)"


@_politeness
def _cookie(get: _Exchange) -> Optional[str]:
    sent = "; ".join(get.request.headers.get_all("Cookie"))
    # $Version and the like are no cookies (RFC 2965). Who may have which is not looked at.
    pairs = [pair for pair in _cookies(sent) if not pair.startswith("$")]
    unknown = "; ".join(pair for pair in pairs if pair not in get.cookies)
    if not unknown:
        return None
    not_set = f"no answer had set {_legible(unknown)}"
    return f"Cookie was {_legible(sent)}, but {not_set} (RFC 6265 5.4)"


def _accepted(value: str) -> dict[str, bool]:
    """The members of an Accept field, and whether they are accepted (RFC 9110 12.4.2)."""
    members = (member.partition(";") for member in _members(value))
    not_at_all = r"[ \t]*q[ \t]*=[ \t]*0(?:\.0*)?[ \t]*"
    return {
        name.strip(" \t"): not any(re.fullmatch(not_at_all, each) for each in parameters.split(";"))
        for name, _, parameters in members
    }


def _cookies(value: str) -> list[str]:
    """The pairs of a Cookie field, without quotes, as some clients drop them (RFC 6265 4.1.1)."""
    pairs = ([part.strip().strip('"') for part in pair.split("=", 1)] for pair in value.split(";"))
    return [pair for pair in ("=".join(parts).strip("=") for parts in pairs) if pair]


def _legible(value: str) -> str:
    """What a sentence shows of a field's value, which is in Latin-1."""
    return value.encode("latin-1").decode("utf-8", "backslashreplace")[:200] or "blank"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


# The audit: as it is told to a person

#: Findings of each rule that are shown.
_SHOWN = 5


def _judgement(client: str, findings: Sequence[Finding]) -> str:
    """What a person reads of the findings: rule by rule, the first ones of each."""
    lines = [f"{client} was not polite:" if findings else f"{client} was polite"]
    for rule in _POLITENESS:
        broken = [finding for finding in findings if finding.rule == rule]
        lines += [f"  {finding} [{rule}]" for finding in broken[:_SHOWN]]
        if len(broken) > _SHOWN:
            lines.append(f"  and {len(broken) - _SHOWN} more [{rule}]")
    return "\n".join(lines)


def _rules_to_ignore(names: Iterable[str]) -> set[str]:
    """The names as a set; raises ValueError for what is no sequence of the names of rules."""
    is_sequence = hasattr(names, "__iter__") and not isinstance(names, str)
    ignored = list(names) if is_sequence else []
    rules = list(_POLITENESS)
    if not is_sequence or any(name not in rules for name in ignored):
        takes = f"it takes a sequence of the rules {', '.join(map(repr, rules))}"
        raise ValueError(f"ignore: found {names!r:.80}; {takes}")
    return set(ignored)


# TLS, which any connection and any tunnel may begin with


class _Tls:
    """The server's end of TLS, between the bytes that come in and those that go out.

    ``outer`` is the TLS that this one runs inside of, if any, as clients may speak TLS to a proxy;
    ``sent`` is what the client has said so far.
    """

    def __init__(self, context: ssl.SSLContext, outer: Optional[_Tls], sent: bytes) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(sent)
        self._end = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._outer = outer
        #: Whether hands are shaken, and whether the client has said that no more will come.
        self.established, self.ended = False, False

    def open(self, data: bytes) -> bytes:
        """What the client says in these bytes; raises ssl.SSLError where they are wrong."""
        self._incoming.write(self._outer.open(data) if self._outer else data)
        opened = bytearray()
        with contextlib.suppress(ssl.SSLWantReadError):
            if not self.established:
                self._end.do_handshake()
                self.established = True
            while plain := self._end.read(65536):
                opened += plain
            self.ended = True
        return bytes(opened)

    def seal(self, data: Union[bytes, memoryview] = b"") -> bytes:
        """The bytes that say this to the client, and what TLS itself has to say."""
        while data:
            data = data[self._end.write(data) :]
        sealed = self._outgoing.read()
        return self._outer.seal(sealed) if self._outer else sealed

    def close(self) -> bytes:
        """The bytes that say that no more will come (RFC 8446 6.1)."""
        with contextlib.suppress(ssl.SSLError):  # it would wait for the client to say the same
            self._end.unwrap()
        sealed = self.seal()
        return sealed + self._outer.close() if self._outer else sealed


#: The first byte of a TLS handshake; no request can begin with it.
_HANDSHAKE = 22
_CLIENT_HELLO = 1
#: More than any client says in its first message, in bytes and in records.
_MAX_HELLO, _MAX_RECORDS = 128 * 1024, 64
_SERVER_NAME = "[A-Za-z0-9._-]{1,253}"
#: The alert unrecognized_name, fatal (RFC 6066 3).
_UNRECOGNIZED_NAME = b"\x15\x03\x03\x00\x02\x02\x70"


def _client_hello(sent: Union[bytes, bytearray]) -> Optional[bytes]:
    """The first message of a handshake (RFC 8446 4 and 5.1); None while it is incomplete.

    What is no such message is returned as far as it goes: OpenSSL has the words to refuse it.
    """
    message, position, records = b"", 0, 0
    while position + 5 <= len(sent):
        kind, _, size = struct.unpack_from(">BHH", sent, position)
        records += 1
        if kind != _HANDSHAKE or not 0 < size <= 2**14 or records > _MAX_RECORDS:
            return message
        message += sent[position + 5 : position + 5 + size]
        position += 5 + size
        length = int.from_bytes(message[1:4], "big")
        if message and (message[0] != _CLIENT_HELLO or length > _MAX_HELLO):
            return message
        if len(message) >= max(4, 4 + length):
            return message
    return None


def _server_name(hello: bytes) -> str:
    """The host that a ClientHello names, "" where it names none (RFC 8446 4.1.2, RFC 6066 3).

    ``ssl`` has a callback for this, which is not called for a name that is not ASCII, but has
    something printed to stderr.
    """
    stream = io.BytesIO(hello)
    stream.read(4 + 2 + 32)  # the message's type and length, the version, the random
    for size in (1, 2, 1):  # the session's id, the cipher suites, the compression methods
        _vector(stream, size)
    extensions = io.BytesIO(_vector(stream, 2))
    while kind := extensions.read(2):
        content = _vector(extensions, 2)
        if kind == b"\x00\x00":
            return content[5:].decode("latin-1")  # after two lengths and the type of the name
    return ""


def _vector(stream: io.BytesIO, size: int) -> bytes:
    """What follows its own length, which is a number of that many bytes (RFC 8446 3.4)."""
    return stream.read(int.from_bytes(stream.read(size), "big"))


# Certificates: a throwaway CA, in Python integers and DER (RFC 5280, RFC 5480, SEC 1). It is for
# tests only: nothing in it is constant-time, so whoever can measure how long a signature takes
# learns about the key. The keys are thrown away with the process.

#: What FeedTestServer.certificate may be.
_CERTIFICATE_KINDS = ("valid", "expired", "not-yet-valid", "wrong-host", "self-signed")
_ONE_DAY = 24 * 60 * 60  # in seconds
_LIFETIME = 397 * _ONE_DAY  # browsers take no certificate of more than 398 days
#: When a certificate begins to be valid, if not yesterday, in seconds from now.
_BEGINNINGS = {"expired": -_ONE_DAY - _LIFETIME, "not-yet-valid": _ONE_DAY}
_WRONG_HOST = "wrong-host.invalid"

# The curve P-256, y**2 = x**3 - 3*x + b: the prime of its field, its base point and the order of
# that (SEC 2, 2.4.2, where it is called secp256r1).
_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
_BASE = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

# Tags of ASN.1 (X.690 8), and object identifiers.
_INTEGER, _BIT_STRING, _OCTET_STRING, _OID, _UTF8_STRING = 2, 3, 4, 6, 12
_UTC_TIME, _GENERALIZED_TIME, _SEQUENCE, _SET = 0x17, 0x18, 0x30, 0x31
_EC_PUBLIC_KEY, _PRIME256V1 = "1.2.840.10045.2.1", "1.2.840.10045.3.1.7"  # RFC 5480 2.1.1
_ECDSA_WITH_SHA256 = "1.2.840.10045.4.3.2"  # RFC 5758 3.2
_ORGANIZATION, _COMMON_NAME = "2.5.4.10", "2.5.4.3"
_SUBJECT_KEY_IDENTIFIER, _KEY_USAGE, _SUBJECT_ALT_NAME = "2.5.29.14", "2.5.29.15", "2.5.29.17"
_BASIC_CONSTRAINTS, _AUTHORITY_KEY_IDENTIFIER = "2.5.29.19", "2.5.29.35"
_EXTENDED_KEY_USAGE, _SERVER_AUTH = "2.5.29.37", "1.3.6.1.5.5.7.3.1"
_TRUE = b"\x01\x01\xff"
# Key usages, the first bit and the sixth, and how many bits come after (RFC 5280 4.2.1.3).
_DIGITAL_SIGNATURE, _KEY_CERT_SIGN = (b"\x80", 7), (b"\x04", 2)


@functools.lru_cache(maxsize=256)
def _server_context(host: str, kind: str) -> ssl.SSLContext:
    """The TLS of a server that goes by that name or address, with a certificate of that kind."""
    authority = _authority()
    chain = _pem("EC PRIVATE KEY", authority.server_key.der()) + _pem(
        "CERTIFICATE", authority.certify(host, kind)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    path = _temporary_file(chain, "key.pem")
    try:
        context.load_cert_chain(path)
    finally:
        os.unlink(path)
    return context


def _authority() -> _Authority:
    """The one CA of this process, made when it is needed."""
    # Where two threads make one at once, the first that is done counts for both.
    return _authorities.get("") or _authorities.setdefault("", _Authority())


class _Authority:
    """A CA, with its certificate, and the key that all servers share, as making one takes time."""

    def __init__(self) -> None:
        self.key, self.server_key = _Key("CA"), _Key("server")
        extensions = (
            _extension(_BASIC_CONSTRAINTS, _sequence(_TRUE, _integer(0)), critical=True),
            _extension(_KEY_USAGE, _bit_string(*_KEY_CERT_SIGN), critical=True),
        )
        begin = _system_time() - _ONE_DAY
        self.certificate = _certificate(self.key, self.key, begin, extensions)

    @property
    def pem(self) -> str:
        """The certificate of the CA, in PEM."""
        return _pem("CERTIFICATE", self.certificate)

    def certify(self, host: str, kind: str) -> bytes:
        """A certificate for a server, in DER, of one of the kinds that _CERTIFICATE_KINDS names."""
        begin = _system_time() + _BEGINNINGS.get(kind, -_ONE_DAY)
        issuer = self.server_key if kind == "self-signed" else self.key
        name = _general_name(_WRONG_HOST if kind == "wrong-host" else host)
        extensions = (
            _extension(_BASIC_CONSTRAINTS, _sequence(), critical=True),
            _extension(_KEY_USAGE, _bit_string(*_DIGITAL_SIGNATURE), critical=True),
            _extension(_EXTENDED_KEY_USAGE, _sequence(_oid(_SERVER_AUTH))),
            _extension(_SUBJECT_ALT_NAME, _sequence(name)),
        )
        return _certificate(self.server_key, issuer, begin, extensions)


_authorities: dict[str, _Authority] = {}


class _Key:
    """A key pair on P-256, and the name of who has it, which no other has."""

    def __init__(self, role: str) -> None:
        self.secret = _random_below(_ORDER)
        x, y = _times_base(self.secret)
        #: The public key (SEC 1, 2.3.3), and the identifier that is made of it (RFC 7093 2).
        self.point = b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big")
        self.identifier = _sha256(self.point)[:20]
        self.name = f"{role} {self.identifier.hex()[:16]}"

    def info(self) -> bytes:
        """The public key, as a certificate has it (RFC 5480 2)."""
        algorithm = _sequence(_oid(_EC_PUBLIC_KEY), _oid(_PRIME256V1))
        return _sequence(algorithm, _bit_string(self.point))

    def der(self) -> bytes:
        """The private key, as a file has it (SEC 1, C.4)."""
        secret = _der(_OCTET_STRING, self.secret.to_bytes(32, "big"))
        public = _der(0xA1, _bit_string(self.point))
        return _sequence(_integer(1), secret, _der(0xA0, _oid(_PRIME256V1)), public)

    def sign(self, message: bytes) -> bytes:
        """An ECDSA signature with SHA-256, in DER (SEC 1, 4.1.3; RFC 3279 2.2.3)."""
        digest = int.from_bytes(_sha256(message), "big")
        nonce = _random_below(_ORDER)
        r = _times_base(nonce)[0] % _ORDER
        s = (digest + r * self.secret) * pow(nonce, -1, _ORDER) % _ORDER
        return _sequence(_integer(r), _integer(s))


def _times_base(scalar: int) -> tuple[int, int]:
    """The base point of P-256 that many times, once at least and less often than its order.

    Doubling and adding, in coordinates (x/z**2, y/z**3), which need no division until the end. The
    base is added to an even multiple of itself, so never to itself, and never to its opposite, as
    the sum is no multiple of the order: either would take another formula.
    """
    base_x, base_y = _BASE
    x, y, z = base_x, base_y, 1
    for bit in f"{scalar:b}"[1:]:
        slope, square = 3 * (x - z * z) * (x + z * z) % _P, y * y % _P
        middle = 4 * x * square % _P
        x, z = (slope * slope - 2 * middle) % _P, 2 * y * z % _P
        y = (slope * (middle - x) - 8 * square * square) % _P
        if bit == "1":
            width, height = (base_x * z * z - x) % _P, (base_y * z * z * z - y) % _P
            square = width * width % _P
            cube, middle = width * square % _P, x * square % _P
            x, z = (height * height - cube - 2 * middle) % _P, width * z % _P
            y = (height * (middle - x) - y * cube) % _P
    inverse = pow(z, -1, _P)
    return x * inverse**2 % _P, y * inverse**3 % _P


def _random_below(limit: int) -> int:
    """A number from 1 that cannot be guessed; with 64 bits to spare none is likelier by much."""
    size = limit.bit_length() // 8 + 8
    return int.from_bytes(os.urandom(size), "big") % (limit - 1) + 1


def _sha256(data: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


def _certificate(subject: _Key, issuer: _Key, begin: float, extensions: Sequence[bytes]) -> bytes:
    """A certificate in DER (RFC 5280 4.1), with the extensions that every one has."""
    algorithm = _sequence(_oid(_ECDSA_WITH_SHA256))
    identifier = _sequence(_der(0x80, issuer.identifier))
    extensions = (
        *extensions,
        _extension(_SUBJECT_KEY_IDENTIFIER, _der(_OCTET_STRING, subject.identifier)),
        _extension(_AUTHORITY_KEY_IDENTIFIER, identifier),
    )
    content = _sequence(
        _der(0xA0, _integer(2)),  # version 3
        _integer(_random_below(2**127)),
        algorithm,
        _distinguished_name(issuer.name),
        _sequence(_time_of(begin), _time_of(begin + _LIFETIME)),
        _distinguished_name(subject.name),
        subject.info(),
        _der(0xA3, _sequence(*extensions)),
    )
    return _sequence(content, algorithm, _bit_string(issuer.sign(content)))


def _distinguished_name(common_name: str) -> bytes:
    """A distinguished name (RFC 5280 4.1.2.4); that of the host is a subjectAltName."""
    parts = ((_ORGANIZATION, "feedtestserver"), (_COMMON_NAME, common_name))
    return _sequence(
        *(
            _der(_SET, _sequence(_oid(kind), _der(_UTF8_STRING, text.encode())))
            for kind, text in parts
        )
    )


def _general_name(host: str) -> bytes:
    """An address, or else a name, as a subjectAltName has it (RFC 5280 4.2.1.6)."""
    address = _packed(host)
    return _der(0x87, address) if address else _der(0x82, host.encode("ascii"))


def _extension(kind: str, value: bytes, critical: bool = False) -> bytes:
    return _sequence(_oid(kind), _TRUE if critical else b"", _der(_OCTET_STRING, value))


def _time_of(seconds: float) -> bytes:
    """A point in time: in two digits of its year until 2049 (RFC 5280 4.1.2.5)."""
    text = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(seconds))
    if text < "2050":
        return _der(_UTC_TIME, text[2:].encode())
    return _der(_GENERALIZED_TIME, text.encode())


def _system_time() -> float:
    """Seconds since the epoch by the clock that the clients' TLS goes by.

    It is that of a new file: a test may have replaced time.time(), which OpenSSL does not notice.
    """
    with tempfile.TemporaryFile() as file:
        return os.fstat(file.fileno()).st_mtime


def _der(tag: int, *contents: bytes) -> bytes:
    """A value in DER: its tag, its length, its contents (X.690 8.1 and 10.1)."""
    content = b"".join(contents)
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8 or 1, "big")
    if len(content) > 127:
        length = bytes([0x80 + len(length)]) + length
    return bytes([tag]) + length + content


def _sequence(*contents: bytes) -> bytes:
    return _der(_SEQUENCE, *contents)


def _bit_string(octets: bytes, unused: int = 0) -> bytes:
    """Bits, but for some at the end of the last byte (X.690 8.6)."""
    return _der(_BIT_STRING, bytes([unused]), octets)


def _integer(number: int) -> bytes:
    """A number from 0; its first bit is its sign (X.690 8.3)."""
    return _der(_INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _oid(text: str) -> bytes:
    """An object identifier, in seven bits a byte (X.690 8.19)."""
    first, second, *others = map(int, text.split("."))
    octets = bytearray()
    for number in (40 * first + second, *others):
        septets = [number & 127]
        while number := number >> 7:
            septets.append(number & 127 | 128)
        octets += bytes(reversed(septets))
    return _der(_OID, bytes(octets))


def _pem(label: str, der: bytes) -> str:
    """DER in PEM (RFC 7468)."""
    import base64

    lines = textwrap.wrap(base64.b64encode(der).decode(), 64)
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])


def _temporary_file(text: str, name: str) -> str:
    """The path of a new file for nobody but its owner (mode 0600)."""
    descriptor, path = tempfile.mkstemp(f"-{name}", "feedtestserver-")
    try:
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    except BaseException:
        os.unlink(path)
        raise
    return path


def _packed(host: str) -> Optional[bytes]:
    """An IP address in bytes; None for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            return socket.inet_pton(family, host)
    return None


# Any host: a server in the place of the whole Web, for this process and its children


#: Those that have begun, the innermost last.
_interceptions: list[_Interception] = []


class _Interception:
    """What makes every host lead to a server, from its making to its ``end()``.

    Each keeps what it found in place, and the innermost is in force. One that ends before another
    inside of it leaves to that one what it had found, so that in the end all is as it was.
    """

    lock = threading.Lock()

    def __init__(self, server: FeedTestServer, address: tuple[str, int]) -> None:
        import urllib.request

        self.server = server
        self.address = address
        self.ports: set[int] = set()
        variables = _variables(server.base_url, server.ca_file)
        variables["WGETRC"] = server._temporary("wgetrc", f"ca_certificate = {server.ca_file}\n")
        replaced: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (socket, "getaddrinfo", self.getaddrinfo),
            (socket, "gethostbyname", self.gethostbyname),
            (socket, "gethostbyname_ex", self.gethostbyname_ex),
            (socket, "gethostbyaddr", self.gethostbyname_ex),
            *((socket.socket, name, self.connect) for name in ("connect", "connect_ex")),
            *((socket.socket, name, self.connect) for name in ("sendto", "sendmsg")),
            (socket.socket, "bind", self.bind),
            # Private, but what all Pythons have and all that begins TLS goes through; after
            # wrap_socket() itself hands would be shaken already.
            (ssl.SSLContext, "_wrap_socket", self.wrap_socket),
            (ssl.SSLContext, "_wrap_bio", self.wrap_bio),
        )
        with self.lock:
            attributes: dict[tuple[Any, str], Any] = {
                (owner, name): _instead(getattr(owner, name), method)
                for owner, name, method in replaced
                if hasattr(owner, name)  # Windows has no sendmsg()
            }
            # urllib makes a new one when it is needed, with the proxies of then.
            attributes[urllib.request, "_opener"] = None
            self.found = _set_variables(variables), _set_attributes(attributes)
            _interceptions.append(self)
            server._intercepting += 1

    def end(self) -> None:
        """Put back what was found."""
        with self.lock:
            position = _interceptions.index(self)
            del _interceptions[position]
            if position < len(_interceptions):
                _interceptions[position].found = self.found
            else:
                variables, attributes = self.found
                _set_variables(variables)
                _set_attributes(attributes)
            self.server._release()  # who comes back now goes elsewhere

    # What is called in the place of the original, which comes first among the arguments

    def getaddrinfo(
        self,
        original: Callable[..., Any],
        host: Any,
        port: Any,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        """Find the server, with its port, for every name but localhost."""
        if not _is_elsewhere(host) or flags & socket.AI_NUMERICHOST:
            return original(host, port, family, type, proto, flags)
        if flags & socket.AI_PASSIVE:  # to listen at, not to connect to
            return original(self.address[0], port, family, type, proto)
        self.expect(port)
        return original(*self.address, family, type, proto)

    def gethostbyname(self, original: Callable[..., Any], host: Any) -> Any:
        if not _is_elsewhere(host):
            return original(host)
        self.expect(None)
        return self.address[0]

    def gethostbyname_ex(self, original: Callable[..., Any], host: Any) -> Any:
        if not _is_elsewhere(host):
            return original(host)
        self.expect(None)
        return host, [], [self.address[0]]

    def connect(
        self, original: Callable[..., Any], connection: socket.socket, *arguments: Any
    ) -> Any:
        """Connect or send to the server where the address, the last argument, is by a name."""
        if arguments and _is_internet(connection, arguments[-1]):
            *others, address = arguments
            if _is_elsewhere(address[0]) or self.is_meant(connection, address):
                arguments = (*others, (*self.address, *address[2:]))
        return original(connection, *arguments)

    def bind(self, original: Callable[..., Any], connection: socket.socket, address: Any) -> Any:
        if _is_internet(connection, address) and _is_elsewhere(address[0]):
            address = (self.address[0], *address[1:])
        return original(connection, address)

    def expect(self, port: Any) -> None:
        """Remember a port that was asked for with a name; where none was told, those of the Web."""
        try:
            self.ports |= {int(port)} if port else {80, 443}
        except (TypeError, ValueError):  # the name of a service
            self.ports |= {80, 443}

    def is_meant(self, connection: socket.socket, address: tuple[Any, ...]) -> bool:
        """Whether the server is meant by its address and a port that stood with a name.

        Some clients take no more than the address from what getaddrinfo() finds. Where a service on
        this machine listens at that port, the service is meant.
        """
        host, port = self.address
        is_stream = connection.type == socket.SOCK_STREAM
        if address[0] != host or address[1] not in self.ports - {port} or not is_stream:
            return False
        with socket.socket(connection.family) as probe:
            probe.settimeout(0.1)
            # Of _socket.socket, where it is not replaced: connect_ex itself would come back here.
            return super(socket.socket, probe).connect_ex(address) == errno.ECONNREFUSED

    def wrap_socket(
        self,
        original: Callable[..., Any],
        context: ssl.SSLContext,
        connection: socket.socket,
        server_side: bool,
        server_hostname: Optional[str] = None,
        **others: Any,
    ) -> Any:
        """Begin TLS as the context says, but trust the CA as well where it leads to the server."""
        try:
            is_here = connection.getpeername()[:2] == self.address
        except OSError:  # it is yet to be connected
            is_here = _is_elsewhere(server_hostname)
        if server_side or not is_here:
            return original(context, connection, server_side, server_hostname, **others)
        others["session"] = None  # it would be of the other context
        tls = original(context, connection, server_side, server_hostname, **others)
        tls.context = _trusting()
        return tls

    def wrap_bio(
        self, original: Callable[..., Any], context: ssl.SSLContext, *args: Any, **kwargs: Any
    ) -> Any:
        """The same where nothing tells whether the bytes lead to the server: trust both.

        A certificate of the client's, for a service on this machine, is not sent then.
        """
        tls = original(context, *args, **kwargs)
        if not tls.server_side:
            tls.context = _trusting(*context.get_ca_certs(binary_form=True))
        return tls


def _renew_the_lock() -> None:
    """In a forked child there is no thread that would release it."""
    _Interception.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_the_lock)

_ABSENT = object()


def _variables(proxy: str, ca_file: str) -> dict[str, Optional[str]]:
    """The environment variables that lead clients to a proxy; None for those that lead away."""
    to_proxy = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    to_ca = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
    return {
        **dict.fromkeys(to_proxy, proxy),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1,::1"),
        **dict.fromkeys(("all_proxy", "ALL_PROXY")),
        **dict.fromkeys(to_ca, ca_file),
        "NODE_USE_ENV_PROXY": "1",  # else Node does not look at the others
    }


def _set_variables(variables: Mapping[str, Optional[str]]) -> dict[str, Optional[str]]:
    """Set environment variables, or unset them where it says None; returns what they were."""
    found = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    return found


def _set_attributes(attributes: Mapping[tuple[Any, str], Any]) -> dict[tuple[Any, str], Any]:
    """Set attributes of modules and classes, or delete them; returns what they were."""
    found = {(owner, name): vars(owner).get(name, _ABSENT) for owner, name in attributes}
    for (owner, name), value in attributes.items():
        if value is not _ABSENT:
            setattr(owner, name, value)
        else:
            delattr(owner, name)
    return found


def _instead(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a method, with the original and the arguments."""

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(original, *args, **kwargs)

    return function


def _is_internet(connection: socket.socket, address: Any) -> bool:
    """Whether an address, as methods of sockets take it, is one of a host and a port."""
    families = (socket.AF_INET, socket.AF_INET6)
    is_pair = isinstance(address, tuple) and len(address) > 1 and isinstance(address[1], int)
    return connection.family in families and is_pair


def _is_elsewhere(host: Any) -> bool:
    """Whether a host is a name that could lead to the network: neither localhost nor an address."""
    name = bytes(host).decode("latin-1") if isinstance(host, (bytes, bytearray)) else host
    if not isinstance(name, str) or name.lower() in ("", "localhost"):
        return False
    try:
        socket.inet_aton(name)  # also 127.1, as connect() and getaddrinfo() read it
    except (OSError, ValueError):
        return _packed(name.partition("%")[0]) is None
    return False


@functools.lru_cache(maxsize=64)
def _trusting(*certificates: bytes) -> ssl.SSLContext:
    """A context that trusts the CA and these certificates.

    It takes the place of the client's own when a TLS object was made from that: whether and how to
    verify stays as the client has said, and only whom to trust is new. Added to the client's own,
    the CA could not be taken out again.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=b"".join([_authority().certificate, *certificates]))
    return context


# The test's side: what is looked for in the record, and the mixin


class _Wanted:
    """Requests as wait_for_request() and the assertions describe them."""

    def __init__(
        self,
        server: FeedTestServer,
        path: Optional[str],
        method: Optional[str],
        headers: Optional[Mapping[str, Optional[str]]],
        body: Optional[Union[bytes, str]],
        times: Optional[int] = None,
    ) -> None:
        if times is not None and times < 1:
            raise ValueError(f"times: found {times}; it takes 1 or more, else assertNotRequested()")
        self.path = path
        self.address = None if path is None else server._address(path)
        self.method = method
        self.headers = headers or {}
        self.body = body.encode() if isinstance(body, str) else body

    def among(self, requests: Iterable[Request]) -> list[Request]:
        return [request for request in requests if self.matches(request)]

    def matches(self, request: Request) -> bool:
        return (
            (self.address is None or self.is_at(request._address))
            and self.method in (None, request.method)
            and self.body in (None, request.body)
            and all(self.has_field(request.headers, *field) for field in self.headers.items())
        )

    def is_at(self, address: _Address) -> bool:
        """Whether an address is the one that is looked for; no query stands for any."""
        assert self.address is not None
        wanted_query, query = self.address[2], address[2]
        return self.address[:2] == address[:2] and wanted_query in (None, query)

    @staticmethod
    def has_field(headers: Headers, name: str, value: Optional[str]) -> bool:
        values = headers.get_all(name)
        return not values if value is None else value in values

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.method, self.path))) or "a request"
        fields = [
            f"without {name}" if value is None else f"with {name}: {value}"
            for name, value in self.headers.items()
        ]
        if self.body is not None:
            fields.append(f"with the body {self.body!r:.200}")
        return f"{what} {' and '.join(fields)}" if fields else what

    def missed(self, requests: Sequence[Request], expected: str) -> str:
        """What to say where it was not requested as often as expected."""
        found = _times(len(self.among(requests)))
        transcript = _transcript(requests, self.headers, with_bodies=self.body is not None)
        return f"{self} was requested {found}, expected {expected}\n{transcript}"


def _transcript(
    requests: Iterable[Request], fields: Iterable[str] = (), with_bodies: bool = False
) -> str:
    """What did arrive, with the fields and the bodies that were asked for."""
    lines = []
    for request in requests:
        notes = [request._step] if request._step else []
        notes += request.response._mechanics() if request.response else []
        lines.append(f"  {request} ({'; '.join(notes)})" if notes else f"  {request}")
        for name in fields:
            lines += [f"      {name}: {value}" for value in request.headers.get_all(name)]
        if with_bodies:
            lines.append(f"      {request.body!r:.200}")
    return "\n".join(["The server got:", *lines]) if lines else "The server got no request."


def _times(number: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(number, f"{number} times")


class FeedTestServerMixin(_TestCase):
    """Gives each test of a ``unittest.TestCase`` class a server of its own, ``self.server``.

    Put it before TestCase among the bases. The server is stopped after the test, and fails it
    where a fixture, a directive or a callable was wrong. Where the class has a ``server`` already,
    which must be running, ``setUp()`` takes that one, and whoever has started it stops it.
    """

    #: The directory to serve, relative to the file that defines the test class.
    data_directory: Union[str, os.PathLike[str]] = "data"
    #: The class of the server.
    server_class: type[FeedTestServer] = FeedTestServer
    #: Further keyword arguments for it.
    server_options: Mapping[str, Any] = {}
    #: Whether each test runs inside of ``self.server.intercept()``.
    intercept = False
    _own_server: Optional[FeedTestServer] = None

    def setUp(self) -> None:
        """Start the server, unless the class has one that its tests share."""
        super().setUp()
        if self._own_server and not self._own_server.ready:  # of an earlier run of this TestCase
            del self.server
        if self.server is not self._own_server:
            self._share_server()

    def _share_server(self) -> None:
        """Use a server that the class, or the test, has started itself."""
        if not getattr(self.server, "ready", False):
            raise RuntimeError(f"{type(self).__name__}.server is not running: start() it before")
        self.addCleanup(self._look_for_errors)
        self._begin_interception()

    @functools.cached_property
    def server(self) -> FeedTestServer:
        """The server, started by setUp() or, where that was not called, on first use."""
        module = sys.modules[type(self).__module__]
        folder = os.path.dirname(os.path.abspath(getattr(module, "__file__", None) or "x"))
        directory = os.path.join(folder, self.data_directory)
        server = self.server_class(directory, **self.server_options)
        server.start()
        self.server = self._own_server = server  # known even if the rest fails
        self.addCleanup(self._stop_server)
        self._begin_interception()
        return server

    def _begin_interception(self) -> None:
        if self.intercept:
            self._interception = self.server.intercept()
            self._interception.__enter__()
            self.addCleanup(self._end_interception)

    def _end_interception(self) -> None:
        self._interception.__exit__(None, None, None)

    def _stop_server(self) -> None:
        try:
            self.server.stop()
        finally:
            self._report(self.server.errors)

    def _look_for_errors(self) -> None:
        self._report(self.server._take_errors())

    def _report(self, errors: Sequence[str]) -> None:
        if errors:
            self.fail("\n".join(["the server found errors:", *errors]))

    def __getstate__(self) -> dict[str, Any]:
        """What a parallel runner sends to another process, where the server cannot go."""
        kept_here = ("server", "_own_server", "_interception")
        return {name: value for name, value in self.__dict__.items() if name not in kept_here}

    @property
    def base_url(self) -> str:
        """The URL of the server's root, without a slash at its end."""
        return self.server.base_url

    def get_url(self, path: str, scheme: str = "http") -> str:
        """The URL of ``path`` on the server, by "http" or "https"."""
        return self.server.get_url(path, scheme)

    def assertRequested(
        self,
        path: str,
        *,
        method: Optional[str] = None,
        headers: Optional[Mapping[str, Optional[str]]] = None,
        body: Optional[Union[bytes, str]] = None,
        times: Optional[int] = None,
        msg: Any = None,
    ) -> Request:
        """Fail unless ``path`` was requested, exactly ``times`` times where that is given.

        Returns the last of the matching requests. A field of ``headers`` with the value None must
        be absent.
        """
        wanted = _Wanted(self.server, path, method, headers, body, times)
        requests = self.server.requests
        found = wanted.among(requests)
        if not found or times not in (None, len(found)):
            expected = "at least once" if times is None else _times(times)
            self.fail(self._formatMessage(msg, wanted.missed(requests, expected)))
        return found[-1]

    def assertNotRequested(
        self,
        path: str,
        *,
        method: Optional[str] = None,
        headers: Optional[Mapping[str, Optional[str]]] = None,
        body: Optional[Union[bytes, str]] = None,
        msg: Any = None,
    ) -> None:
        """Fail if ``path`` was requested."""
        wanted = _Wanted(self.server, path, method, headers, body)
        requests = self.server.requests
        if wanted.among(requests):
            self.fail(self._formatMessage(msg, wanted.missed(requests, _times(0))))

    def assertPolite(self, msg: Any = None, *, ignore: Sequence[str] = ()) -> None:
        """Fail where ``audit()`` finds that the client has broken a rule that is not ignored.

        Raises ValueError where ``ignore`` names no rule.
        """
        ignored = _rules_to_ignore(ignore)
        requests = self.server.requests
        findings = [finding for finding in audit(requests) if finding.rule not in ignored]
        if findings:
            message = f"{_judgement('the client', findings)}\n{_transcript(requests)}"
            self.fail(self._formatMessage(msg, message))


# The command line


class _ShownServer(FeedTestServer):
    """The server of the command line: it prints a line per request, and lists its fixtures."""

    #: Sends a byte when the server has ended.
    sender: Optional[socket.socket] = None

    def run(self) -> None:
        """Serve until told to stop, then tell the command line."""
        _block_signals()
        try:
            super().run()
            self._wait_ended()
        finally:
            if self.sender:
                with contextlib.suppress(BlockingIOError):  # a full buffer does as well
                    self.sender.send(b"\0")

    def _log(self, event: object) -> None:
        _say(event, sys.stdout)

    def _fail(self, words: str) -> Response:
        _say(words, sys.stderr)
        return super()._fail(words)

    def _not_found(self, request: Request, folder: str) -> Response:
        if not request.path.endswith("/") or not _file_names(request._path_as_sent):
            return super()._not_found(request, folder)
        below = f"{folder}{request.path.lstrip('/')}"
        listed = [fixture for fixture in self.fixtures() if fixture.name.startswith(below)]
        if not listed and request.path != "/":
            return super()._not_found(request, folder)
        page = _readable(_index_page(self, request.path, listed))
        media_type = ("Content-Type", "text/html; charset=utf-8")
        return Response(page.encode("utf-8", "backslashreplace"), headers=[media_type])


def _say(text: object, stream: Optional[TextIO]) -> None:
    """Print lines, whatever the stream can encode and whether or not anybody still reads it.

    What is not printable, and could do something to a terminal, is shown by its number.
    """
    if stream is None:  # there is none, as under pythonw
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = "".join(
        each if each.isprintable() or each in "\n\t\xa0\u3000" else ascii(each)[1:-1]
        for each in f"{text}\n"
    )
    try:
        stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BlockingIOError:
        pass  # what is in the buffer is written the next time
    except OSError:
        _discard_output(stream)


def _discard_output(stream: TextIO) -> None:
    """Redirect a stream that nobody reads any more to the null device.

    The interpreter would fail to flush it at exit.
    """
    with contextlib.suppress(OSError), open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())


_INDEX_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem }}
body {{ padding: 0 1rem }}
h1 {{ font-size: 1.25rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ border-bottom: 1px solid #8884; padding: .4rem .8rem .4rem 0 }}
th, td {{ text-align: left; vertical-align: top }}
td:first-child {{ white-space: nowrap }}
td:nth-child(3) {{ min-width: 18rem; overflow-wrap: anywhere }}
ul {{ list-style: none; margin: 0; padding: 0 }}
code {{ font-size: .875rem }}
.wrong {{ color: light-dark(#b00020, #ff8a80) }}
</style>
<h1>{title}</h1>
<table>
<thead><tr><th>Fixture<th>Status<th>Fields<th>Description</thead>
<tbody>
{rows}
</tbody>
</table>
</html>
"""


def _index_page(server: FeedTestServer, path: str, fixtures: Iterable[Fixture]) -> str:
    """A page that lists fixtures with the answer each will give."""
    rows = "\n".join(_index_row(server, fixture) for fixture in fixtures)
    return _INDEX_PAGE.format(title=html.escape(f"Fixtures in {path}"), rows=rows)


def _index_row(server: FeedTestServer, fixture: Fixture) -> str:
    request = Request("GET", fixture.url[len(server.base_url) :], "1.1")
    request._locate(server)
    link = f"<a href='{html.escape(request.target)}'>{html.escape(fixture.name)}</a>"
    try:
        description = html.escape(fixture.directives["Description"] or "")
        plan = _plan(request, server._named(fixture.name), "", True)
    except (DirectiveError, OSError) as error:
        return f"<tr><td>{link}<td>500<td colspan='2' class='wrong'>{html.escape(str(error))}"
    status = html.escape(_shown_status(plan))
    fields = "".join(
        f"<li><code>{html.escape(f'{name}: {value}')}</code>"
        for name, value in plan.headers
        if (name, value) not in (("Date", ""), ("Server", _SERVER))
    )
    fields += "".join(f"<li><em>{html.escape(text)}</em>" for text in plan._mechanics())
    return f"<tr><td>{link}<td>{status}<td><ul>{fields}</ul><td>{description}"


def _shown_status(plan: Response) -> str:
    if _fault_of(plan)[1] is None:
        return "no answer"
    if plan.asis:
        return bytes(plan._sent[:80]).decode("latin-1").partition("\n")[0].rstrip("\r")
    return f"{plan.status} {_reason(plan)}"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit status."""
    options = _options(arguments)
    try:
        if options.record:
            return _record_feed(*options.record)
        if options.check:
            return _check(options.directory)
        return _serve(options.directory, options.bind, options.port)
    except (OSError, ValueError, http.client.HTTPException) as error:
        _say(f"feedtestserver: {error}", sys.stderr)
        return 1


def _options(arguments: Optional[Sequence[str]]) -> Any:
    import argparse  # for the command line only

    parser = argparse.ArgumentParser(
        prog="feedtestserver",
        description="Serve a directory of fixtures, each as the directives in its comments say.",
    )
    parser.add_argument("directory", nargs="?", default="data", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any")
    parser.add_argument("--bind", default="127.0.0.1", help="address; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="read every directive, report errors")
    parser.add_argument(
        "--record",
        nargs=2,
        metavar=("URL", "FILE"),
        help="fetch a live feed into FILE, its status and headers into FILE.headers",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(arguments)


def _serve(directory: str, host: str, port: int) -> int:
    """Serve until Ctrl-C, SIGTERM or QUIT; then say what the clients did wrong."""
    with _signals_as_bytes() as (receiver, sender):
        server = _ShownServer(directory, host=host, port=port, bind_timeout=0)
        server.sender = sender
        with server:
            _say(f"{server.base_url}/", sys.stdout)
            receiver.recv(1)
        for judgement in _judge_each_client(server.requests):
            _say(f"\n{judgement}", sys.stdout)
    return 0


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket pair: a byte arrives at the first at Ctrl-C and at SIGTERM.

    An exception raised by a signal handler can come at any point: where it is swallowed, or while
    a lock is being released. So the handlers do nothing, and the byte wakes whoever receives it.
    Afterwards the handlers are as before, or, if this is the program itself, the signals are
    blocked: the interpreter takes a moment to end.
    """
    import signal  # for the command line only

    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        fd_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, lambda number, frame: None) for number in signals]
        try:
            yield receiver, sender
        finally:
            if __name__ == "__main__":
                _block_signals()
            for number, handler in zip(signals, before):
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd_before)


def _block_signals() -> None:
    """Keep Ctrl-C and SIGTERM from this thread, and from those that it starts."""
    import signal  # for the command line only

    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _judge_each_client(requests: Iterable[Request]) -> Iterator[str]:
    """The findings about each client, which are told apart by what they call themselves."""
    clients: dict[str, list[Request]] = {}
    for request in requests:
        if not request._refused:
            # Without digits, as some readers tell the number of their subscribers.
            name = re.sub("[0-9]+", "", request.headers["User-Agent"] or "")
            clients.setdefault(name, []).append(request)
    for sent in clients.values():
        called = sent[0].headers["User-Agent"]
        yield _judgement(_legible(called) if called else "a client without a name", audit(sent))


def _check(directory: str) -> int:
    """Report everything that is wrong with the directives below a directory, by file and line."""
    _require_directory(directory)
    found = sorted(pathlib.Path(os.path.abspath(directory)).rglob("*"))
    paths = [str(path) for path in found if path.is_file()]
    errors = [str(error) for path in paths for error in _errors_in(path)]
    fixtures = sum(not _is_sidecar(path) for path in paths)
    _say("\n".join([*errors, f"fixtures: {fixtures}, errors: {len(errors)}"]), sys.stdout)
    return 1 if errors else 0


def _errors_in(path: str) -> Iterator[object]:
    """What is wrong with a file: a sidecar, or a fixture with its directives in comments."""
    errors: list[DirectiveError] = []
    try:
        if _is_sidecar(path):
            fixture = path[: -len(_SIDECAR)]
            if not os.path.isfile(fixture):
                yield f"{path}: there is no {fixture} beside it"
            Directives(path, _sidecar_lines(pathlib.Path(path).read_bytes()), errors=errors)
        elif not os.path.isfile(path + _SIDECAR):
            lines = _comment_lines(_read_beginning(path)[0])
            Directives(path, lines, prose=True, errors=errors)
    except OSError as error:
        yield error
    yield from errors


# What an answer says to one client or one connection only (RFC 9110 7.6.1, RFC 6265).
_NOT_RECORDED = {
    "authentication-info",
    "authorization",
    "connection",
    "content-length",
    "date",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authentication-info",
    "proxy-authorization",
    "proxy-connection",
    "set-cookie",
    "set-cookie2",
    "status",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}


def _record_feed(url: str, name: str) -> int:
    """Fetch a URL, redirects included, into a new file and its sidecar.

    No request is sent if the files cannot be written.
    """
    import urllib.request  # for the command line only

    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"found the URL {url!r}; it takes one of http or https")
    for path in (name, name + _SIDECAR):
        _require_writable(path)
    request = urllib.request.Request(url, headers={"User-Agent": _SERVER})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.request.HTTPError as error:
        answer = error
    # Where urllib would not follow a redirect, its own words, in several lines, are the reason.
    if "\n" in str(answer.reason) or not answer.url.startswith(("http://", "https://")):
        answer.close()
        raise ValueError(f"{url}: {str(answer.reason).splitlines()[0]}")
    with answer:
        body = answer.read()
        lines = _recorded_lines(answer.status, answer.reason, answer.headers.items())
    with open(name + _SIDECAR, "xb") as sidecar, open(name, "xb") as file:
        sidecar.write(lines)
        file.write(body)
    _say(f"{answer.url}: {answer.status}, {len(body)} bytes in {name}", sys.stdout)
    return 0


def _require_writable(path: str) -> None:
    """Raise OSError unless a new file of that name can be made."""
    _require_directory(os.path.dirname(path) or ".", "there is no such folder to write to")
    try:
        open(path, "xb").close()
    except FileExistsError as error:
        error.strerror = "the file exists and is not overwritten"
        raise
    os.unlink(path)


def _recorded_lines(status: int, reason: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The sidecar of an answer; raises DirectiveError for what no fixture can say."""
    headers = list(headers)
    options = ",".join(value for name, value in headers if name.lower() == "connection")
    left_out = _NOT_RECORDED | {option.strip().lower() for option in options.split(",")}
    lines = [f"Status: {status} {reason}".rstrip()]
    for name, value in headers:
        if name.lower() not in left_out:
            value = re.sub("\r?\n[ \t]+", " ", value).strip(" \t")  # what was folded
            lines.append(f"Header: {name}: {value}".rstrip(" "))
    sidecar = ("\n".join(lines) + "\n").encode("latin-1")
    Directives("the response", _sidecar_lines(sidecar))  # raises what is wrong
    return sidecar


if __name__ == "__main__":
    sys.exit(main())
