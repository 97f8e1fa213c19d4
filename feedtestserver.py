# SPDX-License-Identifier: 0BSD
"""A real HTTP server for the tests of feed readers and other HTTP clients, in one file to copy.

A whole test, with the fixture ``data/feed.xml`` that it fetches::

    import unittest
    import urllib.request
    from feedtestserver import FeedTestServerMixin

    class FetchTest(FeedTestServerMixin, unittest.TestCase):
        def test_sends_a_user_agent(self):
            with urllib.request.urlopen(self.get_url("feed.xml")) as response:
                self.assertEqual(response.headers["ETag"], '"v1"')
            request = self.assertRequested("/feed.xml", times=1)
            self.assertIn("Python-urllib", request.headers["User-Agent"])

The fixture says, in a comment, how to serve it::

    <?xml version="1.0" encoding="utf-8"?>
    <!--
    Header: ETag: "v1"
    Header: Cache-Control: max-age=3600
    Description: a feed that can be fetched conditionally
    -->
    <rss version="2.0"><channel><title>Example</title></channel></rss>

What cannot hold a comment (JSON, gzip, pictures) has the same lines in a file beside it,
``feed.json.headers``. The directives:

    Header: NAME: VALUE      one field line of the response, as it stands; repeats are kept
    Status: CODE [REASON]    the status code, from 200 to 599, and maybe the reason phrase
    Without: NAME            leave out a field that the server would add, such as Content-Type
    Ignore: NAME             act as if the client had not sent this field, such as If-None-Match
    Compress: gzip|deflate   encode the body and say so, whatever the client accepts
    Chunked: SIZE            send the body in chunks of SIZE bytes
    Delay: SECONDS           wait before the status line
    Pause: SECONDS at headers|N|N%
                             wait once so much has been sent, then go on; may be repeated
    Rate: BYTES              send so many bytes of the body a second, evenly
    Fault: close|reset|stall [at start|headers|N|N%|end]
                             end the connection (FIN, RST) or send no more: before the status line,
                             after the headers, once N bytes of the body have arrived, or after the
                             last byte of the response
    Early: yes               respond as soon as the head of the request is there, and close
    Template: yes            expand {{base_url}}, {{host}} and {{port}} in the body
    Next: NAME [after N]     after N responses (default 1), serve the fixture NAME of this folder

Every other key (``Description``, ``Expect``, ...) is kept for the test to read. What is malformed
on purpose goes into a file ``NAME.asis``, a whole response that is sent as it is. What a fixture
can say, but for Next, ``Response`` can say in the same words, and a test can say when::

    self.server.respond("/feed.xml", "v1.xml", 503, Response(delay=2, fault="reset at 50%"))

``self.assertPolite()`` tells what the client did wrong, as the owner of a feed would see it. Under
any other test runner, ``with FeedTestServer("data") as server:`` has all of this, with
``server.assert_requested()`` and so on.

HTTPS is spoken on the same port, ``self.get_url("feed.xml", "https")``, with certificates that are
made when they are needed; ``self.server.certificate`` and ``handshake`` say how the next handshakes
go. Inside ``with self.server.intercept():`` every host name leads to the server: code that fetches
``https://example.com/feed.xml`` gets ``data/example.com/feed.xml``, and
``self.server.resolve("example.com", "refused")`` says what look-ups of a host find.

The life of a request, in the order of this file:

    FeedTestServer           the thread that a test starts and stops
    _Site                    who responds: the scripted steps, then the fixtures
    _Record                  what has arrived, and waiting for it
    StoppableHttpServer      one thread, one selector, one conversation for each connection
    FeedTestRequestHandler   the conversation: read, find the response, plan, record, send
    _parse_head              what a request may look like
    _Address                 what respond() and the assertions are about: a URL or a pattern
    _load                    from a URL to a fixture
    parse_directives         from a fixture's comments to what they ask for
    Response, _plan          the response as a value, decided before its first byte
    Request                  what came in, as it is kept on record
    _timeline                the bytes on the wire

and what there is beside it:

    audit                    what the client did wrong, by the record
    _Tls                     the same bytes in TLS
    _certificate             the certificates that TLS needs
    _OtherHosts              what makes every host name lead to the server
    _Wanted                  what a test looks for in the record
    FeedTestServerMixin      a server for each test of a unittest.TestCase
    main                     the command line: python feedtestserver.py [DIRECTORY]
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import datetime
import email.utils
import errno
import functools
import gc
import heapq
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
import selectors
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
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Optional, TextIO, TypeVar, Union
from wsgiref.headers import Headers


class _Lazy(types.ModuleType):
    """A module that is imported when it is first used."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)


# Most tests do not need these, and they would double the import time. A module that a single
# function needs is imported in it.
if TYPE_CHECKING:
    import difflib
    import hashlib
    import json
    import logging
    import signal
    import ssl
    import tempfile
    import unittest

    _TestCase = unittest.TestCase
else:
    difflib, hashlib, json = _Lazy("difflib"), _Lazy("hashlib"), _Lazy("json")
    signal, ssl, tempfile = _Lazy("signal"), _Lazy("ssl"), _Lazy("tempfile")
    _TestCase = object

__all__ = ["DirectiveError", "Directives", "FeedTestRequestHandler", "FeedTestServer"]
__all__ += ["FeedTestServerMixin", "Finding", "Fixture", "HeaderFields", "Request", "Response"]
__all__ += ["Step", "StoppableHttpServer", "audit", "parse_directives", "stop_server"]
__version__ = "2.0.0"
# unittest and pytest leave out this file's frames, so that a traceback ends in the test.
__unittest = __tracebackhide__ = True

_T = TypeVar("_T")
_Given = TypeVar("_Given")
#: Names and values of fields.
_Fields = Sequence[tuple[str, str]]
#: Fields that are looked for in requests; one whose value is None must be absent.
_WantedFields = Optional[Mapping[str, Optional[str]]]
#: A body that is looked for in requests; a dict or a list is compared as JSON.
_WantedBody = Optional[Union[bytes, str, dict[str, Any], list[Any]]]
#: What configure_tls may be.
_TlsFunction = Optional[Callable[["ssl.SSLContext"], object]]

#: Where a server that is bound to all addresses can be reached.
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
#: A port is in use; Windows also says EACCES, for one that is bound for all addresses.
_IN_USE = {errno.EADDRINUSE} | ({errno.EACCES} if os.name == "nt" else set())

# The thread that a test starts and stops


class _Setting(Generic[_T, _Given]):
    """An attribute of a FeedTestServer, which its _Site keeps.

    ``check`` returns what to keep of a value that is set, or raises ValueError.
    """

    def __init__(self, initial: _T, check: Callable[[_Given], _T], before_start: bool = False):
        self.initial, self.check, self.before_start = initial, check, before_start

    def __set_name__(self, owner: object, name: str) -> None:
        self.name = name

    def __get__(self, server: Optional[FeedTestServer], owner: object = None) -> _T:
        return self.initial if server is None else vars(server._site).get(self.name, self.initial)

    def __set__(self, server: FeedTestServer, value: _Given) -> None:
        if self.before_start and server._httpd:
            raise RuntimeError(f"{self.name} can only be set before start()")
        vars(server._site)[self.name] = self.check(value)


def _choice(name: str, words: str) -> _Setting[str, str]:
    """A setting that takes one of these words; at first it is the first one."""
    values = words.split()

    def check(value: str) -> str:
        if value not in values:
            raise _wrong(name, value, f"one of {', '.join(map(repr, values))}")
        return value

    return _Setting(values[0], check)


def _checked_seconds(name: str, given: float) -> float:
    """Seconds to wait, or fewer than 0 for none; raises ValueError for what is no number."""
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not is_number or math.isnan(given):
        raise _wrong(name, given, "a number of seconds")
    return given


def _directory(given: Optional[Union[str, os.PathLike[str]]], folder: str = "") -> str:
    """The path of a directory to serve, "" for none; None is ``data`` if the folder has it."""
    if given is None:
        given = "data" if os.path.isdir(os.path.join(folder, "data")) else ""
    return os.path.abspath(os.path.join(folder, given)) if given else ""


def _host(given: str) -> str:
    if not isinstance(given, str):
        raise _wrong("host", given, "an address, such as '127.0.0.1'")
    return given


def _port(given: int) -> int:
    if isinstance(given, bool) or not (isinstance(given, int) and 0 <= given < 65536):
        raise _wrong("port", given, "a whole number from 0 to 65535")
    return given


def _tls_function(given: _TlsFunction) -> _TlsFunction:
    if not (given is None or callable(given)):
        raise _wrong("configure_tls", given, "a function that takes an ssl.SSLContext, or None")
    return given


def _wrong(name: str, found: object, right: str) -> ValueError:
    return ValueError(f"{name}: found {found!r:.80}; it takes {right}")


class FeedTestServer(threading.Thread):
    """A server for the fixtures in a directory, in a thread of its own.

    ``directory`` is made absolute here and must exist when the server is started. None, the
    default, is ``data`` if that exists, else no directory; "" is no directory. ``host`` is the
    address to listen at, "0.0.0.0" for all. ``port`` 0 takes any free port; one that is in use is
    tried again until ``bind_timeout`` seconds have passed. ``stop()`` waits ``stop_timeout``
    seconds for test code that is still running. ``clock`` tells the time in seconds since the
    epoch, for the Date field and for the record; it is called in the thread that serves all
    connections, so it must return at once. All of these are attributes, too; ``directory``,
    ``host`` and ``port`` can only be set before ``start()``.

    Use it as a context manager, or call ``start()`` and ``stop()``. At its end, ``with`` raises an
    AssertionError for errors in fixtures and test code. If another exception is on its way, that
    one gets them as a note.
    """

    #: The directory that is served, an absolute path; "" if there is none.
    directory = _Setting("", _directory, before_start=True)
    #: The address to listen at, and the port; once started, the one that was bound.
    host = _Setting("127.0.0.1", _host, before_start=True)
    port = _Setting(0, _port, before_start=True)
    #: Seconds that start() tries to bind the port, and that stop() waits for test code.
    bind_timeout = _Setting(10.0, functools.partial(_checked_seconds, "bind_timeout"))
    stop_timeout = _Setting(5.0, functools.partial(_checked_seconds, "stop_timeout"))
    #: The class of the conversations; a subclass of FeedTestRequestHandler may add do_ methods.
    handler_class: type[FeedTestRequestHandler]
    #: The certificate that the next TLS handshakes get. "incomplete-chain" is signed by an
    #: intermediate CA that is not sent; "no-san" has the host as its common name only.
    certificate = _choice(
        "certificate", "valid expired not-yet-valid wrong-host self-signed incomplete-chain no-san"
    )
    #: What the next TLS handshakes do once the ClientHello has arrived.
    handshake = _choice("handshake", "complete stall reset close")
    #: Whether the next TLS handshakes ask for a certificate of the client. One that is shown must
    #: be signed by the server's CA; see client_certificate().
    client_certificates = _choice("client_certificates", "none optional required")
    #: A function that each of the next TLS handshakes calls with its context, or None. It may
    #: change the context before that is used: ``context.maximum_version = ...``. It runs in a
    #: worker thread, and what it raises is one of ``errors``.
    configure_tls = _Setting(None, _tls_function)
    # Whether the interpreter ends. It has stopped the threads then, maybe while they held a lock,
    # removed the files, and emptied this module, so this is kept here.
    _at_end = staticmethod(sys.is_finalizing)

    def __init__(
        self,
        directory: Optional[Union[str, os.PathLike[str]]] = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        bind_timeout: float = 10.0,
        stop_timeout: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name="feedtestserver", daemon=True)
        self._site, self._record = _Site(), _Record()
        self.bind_timeout, self.stop_timeout, self.clock = bind_timeout, stop_timeout, clock
        self._connection_numbers = itertools.count(1)
        self._files: dict[str, str] = {}  # the paths of temporary files, by name
        self._httpd: Optional[_FixtureServer] = None
        self._starting = threading.RLock()  # held by start(), and by whoever changes _files
        self._joining = threading.RLock()  # Thread.join() may fail where several call it at once
        self._pid = os.getpid()
        self.directory, self.host, self.port = directory, host, port

    # Starting and stopping

    def start(self) -> None:
        """Start to serve; on return, connections are accepted.

        Raises OSError if the directory is missing or the port cannot be bound, RuntimeError if the
        server was started before. No thread and no socket is left then.
        """
        with self._starting:
            if self._httpd:
                raise RuntimeError("a server is started once only; make a new FeedTestServer")
            if self.directory:
                _require_directory(self.directory)
            kind: Any = self.handler_class
            if not (isinstance(kind, type) and issubclass(kind, FeedTestRequestHandler)):
                right = "a subclass of FeedTestRequestHandler"
                raise TypeError(f"handler_class: found {kind!r:.80}; it takes {right}")
            _logger()  # imported later, out of descriptors or beside a fork(), it could fail
            address, handler = (self.host, self.port), functools.partial(self.handler_class, self)
            self._httpd = self._when_free(lambda: _FixtureServer(address, handler))
            self._pid = os.getpid()
            self._site.port = self._httpd.server_port
            try:
                self._httpd.started = True
                super().start()
            except BaseException:
                self.stop()
                self._httpd.server_close()
                self._httpd = None
                raise

    def _when_free(self, bind: Callable[[], _T]) -> _T:
        """Call a function that binds the port, again every 20 ms while the port is in use."""
        deadline = time.perf_counter() + self.bind_timeout
        while True:
            try:
                return bind()
            except OSError as error:
                if error.errno not in _IN_USE or time.perf_counter() >= deadline:
                    where = f"cannot bind {self.host}:{self.port}: {error.strerror}"
                    raise OSError(error.errno, where) from error
            gc.collect()  # closes leaked sockets that have the port
            time.sleep(0.02)

    def run(self) -> None:
        """Serve until told to stop; start() calls this in the new thread."""
        httpd = self._httpd
        if httpd is None:  # start() was interrupted
            return
        try:
            httpd.serve_forever()
        finally:
            self._record.end()
            # The handler class refers to this server; without the cycle it is freed at once.
            httpd.RequestHandlerClass = socketserver.BaseRequestHandler

    def stop(self) -> None:
        """End the server and all its connections, at once; on return nothing of it is left.

        Waits ``stop_timeout`` seconds for test code that is still running, then raises a
        RuntimeError that names its request. Does nothing before ``start()``, after everything has
        ended, and in a forked child. Called from inside test code it does not wait for test code.
        """
        if self._at_end() or self._pid != os.getpid():
            return
        with self._starting:
            httpd = self._httpd
        if httpd is None:
            return
        deadline = time.perf_counter() + self.stop_timeout
        httpd.close_port(stopping=True)
        try:
            # Even an immediate end takes a moment.
            seconds = min(max(self.stop_timeout, 1), threading.TIMEOUT_MAX)
            if httpd.is_own_thread():
                deadline = time.perf_counter() + seconds
            elif self.is_alive():
                with self._joining:
                    self.join(seconds)
            self._await_end(httpd, "stop()", deadline)
        finally:
            self._site.hosts.close()
            with self._starting:  # once it is not ready any more, no other files are made
                _remove(self._files, self._pid)

    def _await_end(self, httpd: _FixtureServer, name: str, deadline: float) -> None:
        if running := httpd.join(deadline - time.perf_counter()):
            names = ", ".join(running)
            waited = f"waited {self.stop_timeout:g} s for the test code that responds to {names}"
            raise RuntimeError(f"{name} {waited}; it has to return by itself")

    @contextlib.contextmanager
    def down(self) -> Iterator[FeedTestServer]:
        """A context in which clients are refused: the port is closed, and no connection is left.

        Afterwards the server is there again on the same port, with its script and its record as
        they were. A ``stop()`` inside is final. Waits for test code as ``stop()`` does. Raises
        RuntimeError if that takes too long, or if the server is not running or already down, and
        OSError if another process has taken the port.
        """
        with self._starting:
            httpd = self._running("down()")
            httpd.closed = True  # from now on it is not running for others
            httpd.close_port(stopping=False)
        deadline = time.perf_counter() + self.stop_timeout
        try:
            # Bound but not listening: clients are refused, and the port stays ours.
            self._when_free(lambda: httpd.call(httpd.bind_again))
            self._await_end(httpd, "down()", deadline)
            yield self
        finally:
            if not self._at_end():
                self._when_free(lambda: httpd.call(lambda: httpd.bind_again(listening=True)))

    def _running(self, name: str) -> _FixtureServer:
        """What serves; raises RuntimeError if nothing does."""
        if self._httpd is None or self._httpd.closed:
            why = "call start() first"
            if self._httpd:
                why = "it has stopped" if self._httpd.stopping else "it is down"
            raise RuntimeError(f"{name} needs a server that is running: {why}")
        return self._httpd

    def __enter__(self) -> FeedTestServer:
        self.start()
        return self

    def __exit__(self, kind: object, error: Optional[BaseException], traceback: object) -> None:
        still_running = ""
        try:
            self.stop()
        except RuntimeError as failure:
            if error is None and not self.errors:
                raise
            still_running = f"{failure}\n"
        if words := still_running + _what_failed(self.errors):
            if error is None:
                raise AssertionError(words)
            _add_note(error, words)

    # Where it is, and what it serves

    @property
    def ready(self) -> bool:
        """Whether connections are accepted."""
        return self._httpd is not None and not self._httpd.closed

    @property
    def base_url(self) -> str:
        """The URL of the server's root, without a slash at its end.

        Raises RuntimeError where it is not known yet, before ``start()``.
        """
        if not self.port:
            raise RuntimeError("the server has no URL yet: start() must be called first")
        return self._site.root_url()

    def get_url(self, path: str, scheme: str = "http") -> str:
        """The URL of ``path``, a path as in a URL; blanks and non-ASCII letters are encoded.

        ``scheme`` is "http" or "https", which are spoken on the one port; ValueError otherwise.
        """
        if scheme not in ("http", "https"):
            raise _wrong("scheme", scheme, "'http' or 'https'")
        return f"{scheme}{self.base_url[4:]}/{_quote(path.lstrip('/'))}"

    def fixtures(self, pattern: str = "**/*") -> list[Fixture]:
        """The fixtures whose path below the directory matches a glob pattern, sorted.

        Hidden ones, whose names begin with a dot, and sidecars are left out.
        """
        if not self.directory:
            return []
        found = sorted(pathlib.Path(self.directory).glob(pattern))
        names = [path.relative_to(self.directory).as_posix() for path in found]
        names = [name for name in names if "/." not in f"/{name}"]
        return [Fixture(self, name) for name in names if _may_be_served(self.directory, name)]

    # HTTPS

    @property
    def ca_file(self) -> str:
        """The path of a file with the certificate of the CA that clients are to trust, in PEM.

        The file is there until ``stop()``. Raises RuntimeError if the server is not running.
        """
        return self._temporary("ca_file", "ca.pem", _ca_certificate)

    def client_certificate(self, name: str = "client") -> str:
        """The path of a PEM file with a key and a certificate of the CA for a client (mode 0600).

        ``name``, 1 to 64 characters, is its common name (RFC 5280 A.1), which is
        ``request.client_certificate`` later. The file is there until ``stop()``. Raises ValueError
        for any other name, RuntimeError if the server is not running.
        """
        allowed = "[^\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]{1,64}"
        if not (isinstance(name, str) and re.fullmatch(allowed, name)):
            right = "1 to 64 characters without control characters (RFC 5280 A.1)"
            raise _wrong("client_certificate", name, right)
        what = f"client_certificate({name!r})"
        return self._temporary(what, "client.pem", lambda: _key_and_certificate(name, "client"))

    def ssl_context(self) -> ssl.SSLContext:
        """A new context for clients, which trusts that CA and no other.

        Raises RuntimeError in a forked child where no CA was made before the fork.
        """
        if not _key_pairs and self._pid != os.getpid():
            raise RuntimeError("the CA was not made before the fork: read ca_file before it")
        return ssl.create_default_context(cadata=_ca_certificate())

    def _temporary(self, what: str, name: str, text: Callable[[], str]) -> str:
        """The path of a temporary file of this server, which is made on first use."""
        with self._starting:
            if self._httpd is None or self._httpd.stopping:
                raise RuntimeError(f"{what} is there only while the server is running")
            if not self._files:  # if stop() is forgotten, they go with the process
                weakref.finalize(self, _remove, self._files, self._pid)
            if what not in self._files:
                self._files[what] = _temporary_file(text(), name)
            return self._files[what]

    # Any host

    @contextlib.contextmanager
    def intercept(self, proxy: bool = True) -> Iterator[FeedTestServer]:
        """A context in which every host name leads to this server, also in child processes.

        Code that fetches ``https://example.com/feed.xml`` gets ``example.com/feed.xml`` below the
        directory, or what ``respond()`` says for that URL. In this process, the functions that look
        names up and those that connect lead to this server, and TLS contexts trust its CA as well.
        With ``proxy``, so do environment variables, which children inherit. Without, this process
        connects as it would anywhere else, each host by a connection of its own. At the end all is
        put back, and connections for other hosts are closed. Of several contexts the innermost
        counts. Raises RuntimeError if the server is not running, ValueError for another ``proxy``.
        """
        if not isinstance(proxy, bool):
            raise _wrong("proxy", proxy, "True or False")
        httpd, hosts = self._running("intercept()"), self._site.hosts
        hosts.address = _ANY_ADDRESS.get(httpd.server_name, httpd.server_name), httpd.server_port
        variables: _Variables = {}
        if proxy:
            lines = f"ca_certificate = {self.ca_file}\n"
            wgetrc = self._temporary("wgetrc", "wgetrc", lambda: lines)
            variables = _variables(self.base_url, self.ca_file, wgetrc)
        interception = _Interception(hosts, variables)
        try:
            yield self
        finally:
            if not self._at_end():
                interception.end()
                # Clients would keep these connections, and come back for hosts that are elsewhere.
                if not hosts.are_here:
                    hosts.close()
                    httpd.call(lambda: httpd.end_connections(lambda each: each.is_intercepted))

    def resolve(self, host: str, *answers: Union[str, Sequence[str]]) -> None:
        """Have the look-ups of a host find these answers, one after the other; the last one stays.

        An answer is an IP address, a sequence of them, "unknown" (there is no such name), "refused"
        (connections are refused) or "silent" (they are never established). Connections to these
        addresses lead to the server, inside of ``intercept()``. To a client that uses the proxy,
        each request and each CONNECT is a look-up: it gets a 502 if the host is unknown or refuses.
        A ``*`` in ``host`` matches any characters; each host then has its own sequence. A host by
        its name goes before patterns, and of those the one given last counts. Raises ValueError
        for what is no host or no answer.
        """
        self._site.hosts.resolve(host, answers)

    # The record, and the script

    @property
    def requests(self) -> list[Request]:
        """The requests that were responded to so far, in order: a snapshot."""
        with self._record.lock:
            return self._record.requests.copy()

    @property
    def errors(self) -> list[str]:
        """What was wrong with fixtures and test code so far, in order: a snapshot."""
        with self._record.lock:
            return self._record.errors.copy()

    def clear(self) -> None:
        """Forget requests, errors, steps, what ``resolve()`` was told, and where Next has led."""
        self._record.clear()
        self._site.clear()

    @property
    def unused(self) -> list[str]:
        """A sentence for each scripted step that no request has taken so far."""
        return self._site.unused()

    def respond(self, path: str, *steps: Step, method: Optional[str] = None) -> None:
        """Respond to each request for ``path`` by the next step; the last one stays.

        ``path`` may be a whole URL, and have a query, whose parameters may come in any order;
        without one it stands for any query. A ``*`` in it matches any characters; "*" alone is
        every request to whatever host. URLs are compared in the normal form of RFC 3986 6.2.2.

        A step is a fixture's name, a status code, bytes, a Response, or a callable that takes the
        Request and returns one of these; a coroutine function is run by ``asyncio.run()``. A
        callable that returns None passes: the next best match responds. The best is an exact
        address, then one with a query, then one with a method; of two patterns the one given last.
        After them come the fixtures.

        Without ``method``, steps respond to every method but CONNECT. For "CONNECT", ``path`` is
        the https URL of the host. Steps replace those given before for the same address and method.

        Raises FileNotFoundError for a fixture that does not exist, ValueError for an address that
        no request can have, ValueError or TypeError for what cannot be a step.
        """
        if not steps:
            raise ValueError(f"respond({path!r}) needs at least one step")
        self._site.respond(path, steps, method)

    def wait_for_request(
        self,
        path: Optional[str] = None,
        *,
        method: Optional[str] = None,
        headers: _WantedFields = None,
        body: _WantedBody = None,
        times: int = 1,
        timeout: Optional[float] = 5.0,
    ) -> Request:
        """Wait until ``times`` matching requests have arrived, and return the last of them.

        Requests are described as for ``assert_requested()``. Raises AssertionError, naming what did
        arrive, after ``timeout`` seconds, if that is not None, and at once if the server has
        stopped; ValueError if ``times`` is less than 1.
        """
        wanted = _Wanted(self._site, path, method, headers, body, times)
        if timeout is not None:
            timeout = min(_checked_seconds("timeout", timeout), threading.TIMEOUT_MAX)
        return self._record.wait(wanted, times, timeout)

    def assert_requested(
        self,
        path: str,
        *,
        method: Optional[str] = None,
        headers: _WantedFields = None,
        body: _WantedBody = None,
        times: Optional[int] = None,
    ) -> Request:
        """Raise AssertionError unless ``path`` was requested, ``times`` times if that is given.

        Returns the last of the matching requests. ``path`` and ``method`` mean what they mean in
        ``respond()``. A field of ``headers`` with the value None must be absent. A ``body`` that is
        a dict or a list is compared as JSON. Raises ValueError or TypeError for what no request can
        match.
        """
        wanted = _Wanted(self._site, path, method, headers, body, times)
        return wanted.check(self.requests, times or 1, times or math.inf)[-1]

    def assert_not_requested(
        self,
        path: Optional[str] = None,
        *,
        method: Optional[str] = None,
        headers: _WantedFields = None,
        body: _WantedBody = None,
    ) -> None:
        """Raise AssertionError if ``path`` was requested; without it, if anything was."""
        _Wanted(self._site, path, method, headers, body).check(self.requests, 0, 0)

    def assert_polite(self, *, ignore: Sequence[str] = (), every: Optional[float] = None) -> None:
        """Raise AssertionError if ``audit()`` finds that the client has broken a rule.

        ``ignore`` names rules that may be broken; ``every`` is how many seconds the client should
        wait before it asks for a URL again. Raises ValueError for an unknown rule, and for an
        interval that is no positive number.
        """
        ignored, requests = _rules_to_ignore(ignore), self.requests
        found = audit(requests, every=every)
        findings = [finding for finding in found if finding.rule not in ignored]
        if findings:
            judgement = _judgement("the client", findings)
            raise AssertionError(f"{judgement}\n{_transcript(requests)}")


def _add_note(error: BaseException, words: str) -> None:
    """Have an exception that is on its way show these words as well."""
    if sys.version_info >= (3, 11):
        with contextlib.suppress(Exception):  # it may be frozen
            error.add_note(words)
    else:
        while error.__context__ is not None:
            error = error.__context__
        error.__context__ = AssertionError(words)


def _what_failed(errors: Sequence[str], unused: Sequence[str] = ()) -> str:
    """What fails a test besides its own assertions; "" if there is nothing."""
    lines = ["the server found errors:", *errors] if errors else []
    lines += ["the server has unused steps:", *unused] if unused else []
    return "\n".join(lines)


def _require_directory(path: str) -> None:
    if not os.path.isdir(path):
        number = errno.ENOTDIR if os.path.exists(path) else errno.ENOENT
        raise OSError(number, "there is no such directory to serve", path)


class Fixture:
    """A file that is served: its ``path``, its ``url``, and the ``directives`` in it."""

    def __init__(self, server: FeedTestServer, name: str) -> None:
        self._server, self.name = server, name
        #: The absolute path of the file.
        self.path = pathlib.Path(server.directory, name)

    def __repr__(self) -> str:
        return f"<Fixture {self.name}>"

    @property
    def url(self) -> str:
        """Its URL on the server itself."""
        return f"{self._server.base_url}/{urllib.parse.quote(self.name, errors='surrogateescape')}"

    @property
    def directives(self) -> Directives:
        """Its directives, read anew each time; raises DirectiveError for a wrong one."""
        return _read(self._server.directory, self.name)[0].checked()


def _remove(files: dict[str, str], owner: int) -> None:
    """Remove temporary files, unless this is a child of the process that made them."""
    for name, path in list(files.items()) if owner == os.getpid() else ():
        with contextlib.suppress(OSError):  # on Windows: open elsewhere; tried again at exit
            os.unlink(path)
            del files[name]


def stop_server(port: int, host: str = "127.0.0.1") -> None:
    """Stop the server on a port, of this process or another, by the HTTP method QUIT.

    Returns when the server is gone. Raises ConnectionRefusedError if there is none,
    PermissionError if it does not take QUIT from here, and ConnectionError if it does not
    respond, or says nothing for 10 seconds.
    """
    try:
        with socket.create_connection((host, port), 10) as connection:
            connection.sendall(b"QUIT / HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as response:
                # At the end of the response it is gone.
                status_line = response.read().decode("latin-1").partition("\r\n")[0]
    except (BrokenPipeError, ConnectionAbortedError, ConnectionResetError, socket.timeout):
        status_line = ""
    if not status_line:
        # If nobody is there now, somebody else has stopped it.
        with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
            socket.create_connection((host, port)).close()
            raise ConnectionError(f"{host}:{port} did not respond to QUIT")
    elif " 200 " not in status_line:
        raise PermissionError(errno.EPERM, f"{host}:{port} responded to QUIT with {status_line!r}")


# Who responds: a scripted step, else a fixture, else nobody


class _Site:
    """The fixtures and the scripted steps, and the address by which the server itself is meant."""

    def __init__(self) -> None:
        self.directory, self.host, self.port = "", "", 0
        self._lock = threading.Lock()
        #: Responds, if it can, where neither a step nor a fixture does; called with the folder.
        self.listing: Callable[[Request, str], Optional[Response]] = lambda request, folder: None
        self.hosts = _OtherHosts()
        #: By address and method, in the order in which they were given.
        self._scripts: dict[tuple[Any, ...], _Script] = {}
        #: By host, path and first fixture: which one has led to which by Next, and responses since.
        self._lives: dict[tuple[str, str, str], tuple[str, str, int]] = {}
        # The last turn of the server, and the fixtures that were looked up in it; and in any.
        self._seen: tuple[Optional[int], dict[str, Optional[Response]]] = (None, {})
        self._fixtures: dict[str, Response] = {}

    def respond(self, path: str, steps: Sequence[Step], method: Optional[str]) -> None:
        """Script the responses for an address; see FeedTestServer.respond()."""
        address = self.address(path, _checked_method(method))
        for step in steps:
            if not callable(step):
                self.response(step)
        with self._lock:
            self._scripts.pop(address.key, None)  # the one given last comes last
            self._scripts[address.key] = _Script(address, steps)

    def clear(self) -> None:
        """Forget the scripted steps, what look-ups find, and where Next has led."""
        self.hosts.clear()
        with self._lock:
            self._scripts.clear()
            self._lives.clear()

    def scripts(self) -> list[_Script]:
        """The steps for each address, in order: a snapshot."""
        with self._lock:
            return list(self._scripts.values())

    def unused(self, once: bool = False) -> list[str]:
        """A sentence for each step that no request has taken; with ``once``, not again later."""
        return [sentence for script in self.scripts() for sentence in script.unused(once)]

    def matching(self, request: Request) -> list[_Script]:
        """The scripts for a request, the best match first.

        A step of each is taken only when those before it have passed.
        """
        if not self._scripts:
            return []
        paths = (None, _normal(request.head.path))  # a quick look first, as there may be many
        may_match = [script for script in self.scripts() if script.address.path in paths]
        found = [script for script in reversed(may_match) if script.address.covers(request)]
        return sorted(found, key=lambda script: script.address.rank, reverse=True)

    def foreseen(self, request: Request, by_fixture: bool) -> Optional[Response]:
        """The response to a request whose body has not come yet, as far as that is known.

        A callable is asked with the whole request, and so is a do_ method of the test. What is
        wrong with it is told when it is planned.
        """
        with contextlib.suppress(Exception):
            if scripts := self.matching(request):
                return self.response(scripts[0].next_step, request)  # TypeError: a callable
            if by_fixture and request.method in ("GET", "HEAD"):
                return self.fixture_for(request, None)
        return None

    def response(self, step: Step, request: Optional[Request] = None) -> Response:
        """The response of a step that is no callable; raises what respond() raises."""
        if isinstance(step, Response):
            return step
        if isinstance(step, bytes):
            return Response(step)
        if isinstance(step, int):
            return Response(status=step)
        if isinstance(step, str):
            return self.following(request, step, self.fixture(step))
        right = "a fixture's name, a status code, bytes, a Response, or a function of the request"
        raise TypeError(f"found {step!r:.80} as a step; it takes {right}")

    def fixture(self, name: str) -> Response:
        """What the fixture of that name responds; raises FileNotFoundError if there is none."""
        if fixture := self.load(name.lstrip("/")):
            return fixture
        words = f"no such fixture{_nearest(self.directory, name)}"
        if re.match(r"\s*[<{[]|.*\n", name):
            words += "; if it is a body: bodies are bytes, such as b'<rss/>'"
        raise FileNotFoundError(errno.ENOENT, words, name[:80])

    def load(self, name: str) -> Optional[Response]:
        """See _load(). All clients share one body, also of a new file, which is read each time."""
        fixture = _load(self.directory, name)
        if fixture is None:
            return None
        known = self._fixtures.get(name, fixture)
        if known is fixture or vars(known) != vars(fixture):
            known = self._fixtures[name] = fixture
        return known

    def following(self, request: Optional[Request], name: str, fixture: Response) -> Response:
        """The fixture that Next has led to by now. A response to a GET counts.

        Raises DirectiveError if one is not there.
        """
        if request is None or fixture.next is None:
            return fixture
        key = request.host, _normal(request.head.path), name
        with self._lock:
            before, now, count = self._lives.get(key, (name, name, 0))
            self.fixture(before)  # where what it leads to is gone, this names the line
            fixture = self.fixture(now)
            if fixture.next and count >= fixture.next[1]:
                before, now, count = now, fixture.next[0], 0
                fixture = self.fixture(now)
            if request.method == "GET" and request.heard_at:  # else this only looks ahead
                self._lives[key] = before, now, count + 1
        if now != name:
            request.step = ", ".join(filter(None, (request.step, f"Next has led to {now}")))
        return fixture

    def fixture_for(self, request: Request, turn: Optional[int]) -> Response:
        """What the fixture at the path of a request responds, or a 404.

        Each file is looked up once in a turn, as all requests of a turn were sent before it began.
        """
        folder = f"{request.host}/" if request.origin else ""
        if turn is None or turn != self._seen[0]:
            self._seen = turn, {}
        seen = self._seen[1]
        for name in _file_names(request.head.path):
            name = folder + name
            if name not in seen:
                seen[name] = self.load(name)
            if fixture := seen[name]:
                return self.following(request, name, fixture)
        return self.listing(request, folder) or self.not_found(request, folder)

    def not_found(self, request: Request, folder: str) -> Response:
        """The 404 that names the nearest fixture or scripted address."""
        scripted, hint = {}, ""
        for address in (script.address for script in self.scripts()[-_SOME_NAMES:]):
            if address.covers(request):
                hint = "; the steps for it have passed"
            else:
                scripted[_bare(address.given)] = str(address)
            if address.is_host_alone and address.is_at(request) and request.head.path != "/":
                all_paths = f"{address.given.rstrip('/')}/*"
                hint = f"; {address.given!r} is for / alone, {all_paths!r} for all paths"
        nearest = _nearest(self.directory, _bare(request.shown), scripted)
        return _text_response(404, f"{request.shown!r:.200} was not found{nearest}{hint}")

    def has_tunnel_to(self, request: Request) -> bool:
        """Whether a CONNECT is for the host of an https URL that respond() was given."""
        return any(each.address.is_https and each.address.is_at(request) for each in self.scripts())

    def unknown_host(self, request: Request) -> str:
        """What to say of a request to a host that has neither a folder nor steps; "" if it has."""
        may_be_there = self.directory and _HOST_FOLDER.fullmatch(request.host)
        folder = _path_of(self.directory, request.host) if may_be_there else ""
        addresses = (each.address for each in self.scripts() if each.address.method != "CONNECT")
        if os.path.isdir(folder) or any(address.is_at(request) for address in addresses):
            return ""
        right = f"the folder {folder} or " if folder else ""
        right += f"respond({request.url!r}, ...)"
        return f"{request.method} {request.url}: no such host here; {right} would respond"

    def unreachable(self, request: Request) -> Optional[Response]:
        """What a proxy responds that cannot connect to the host, by resolve(); None if it can."""
        is_for_proxy = not request.tunnel and _is_elsewhere(request.host)
        found = self.hosts.look_up(request.host) if is_for_proxy else None
        if found not in _ANSWERS.values():
            return None
        request.step = "by resolve()"
        if found == (_SILENT,):
            return Response(status=504, fault="stall")
        why = "refuses connections" if found else "is unknown"
        return _text_response(502, f"{request.host} {why}, as resolve() says")

    # Addresses: whose they are

    def address(self, given: str, method: Optional[str]) -> _Address:
        """What an address of respond() and the assertions stands for.

        Raises ValueError if no request can have it, TypeError if it is no text.
        """
        if not isinstance(given, str):
            raise TypeError(f"address: found {given!r:.80}; it takes a path, a URL or a pattern")
        if re.match(r"(?i)(?!https?:)[a-z*][a-z0-9*+.-]*://", given):
            raise ValueError(f"found the URL {given!r:.80}; its scheme must be http or https")
        origin, rest = _parted(given)
        origin = "" if self._is_own(origin) else origin
        return _Address(given, *(("*", "*") if given == "*" else (origin, rest)), method)

    def origin_of(self, head: _Head, scheme: str, tunnel: Optional[Request]) -> str:
        """The origin that a request is for; "" if it is the server itself.

        The target tells it, else the tunnel, else, inside of intercept(), the Host field.
        """
        origin = head.origin or (_origin(scheme, tunnel.target) if tunnel else "")
        if not origin and self.hosts.are_here:
            named = _origin(scheme, head.values.get("host", ""))
            origin = "" if self._is_local(named) else named
        return "" if origin and self._is_own(origin) else origin

    def root_url(self, scheme: str = "http") -> str:
        """The URL of the server's root, without a slash at its end."""
        host = _ANY_ADDRESS.get(self.host, self.host)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def _is_own(self, origin: str) -> bool:
        """Whether an origin such as ``http://127.0.0.1:8000`` is this server, by any local name."""
        return self._is_local(origin) and _host_and_port(origin)[1] == self.port

    def _is_local(self, origin: str) -> bool:
        """Whether an origin is on this machine, at whatever port, or names no host at all.

        A client that has come here with such a Host field means this server. A server that listens
        on all addresses has any of them.
        """
        host, port = _host_and_port(origin)
        is_any = self.host in _ANY_ADDRESS and port == self.port and _ip_address(host) != ""
        return is_any or host in (self.host, *_LOOPBACK, "")


class _Script:
    """The steps for one address; each is taken once, the last one again and again."""

    def __init__(self, address: _Address, steps: Sequence[Step]) -> None:
        self.address, self.steps = address, steps
        #: How many of the steps were taken, and how many unused() looks at.
        self.taken, self.expected = 0, len(steps)

    @property
    def next_step(self) -> Step:
        return self.steps[min(self.taken, len(self.steps) - 1)]

    def take(self, request: Request) -> Step:
        """The next step; the transcript of the request will name it."""
        step, request.is_scripted = self.next_step, True
        self.taken = min(self.taken + 1, len(self.steps))
        of = f" of {self.address}" if self.address.is_pattern else ""
        request.step = self._called(self.taken, of)
        return step

    def unused(self, once: bool) -> Iterator[str]:
        """A sentence for each step that no request has taken; with ``once``, not again later."""
        for number in range(self.taken + 1, self.expected + 1):
            yield f"no request took {self._called(number, f' of respond({self.address})')}"
        self.expected = 0 if once else self.expected

    def _called(self, number: int, of: str) -> str:
        step = self.steps[number - 1]
        name = step if isinstance(step, str) else getattr(step, "__name__", "")
        return f"step {number} of {len(self.steps)}{of}{name and f': {name}'}"


# The record: what has arrived, and waiting for it


class _Record:
    """The requests and the errors so far, in order; ``lock`` guards them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._waiting = 0  # threads in wait()
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self._ended = False  # the server, so that nothing more will come
        #: Told of each request, each handshake that failed, and each error.
        self.log: Callable[[object], None] = _log

    def take_errors(self) -> list[str]:
        """Return and forget the errors, so that each is charged to the test that caused it."""
        with self.lock:
            found, self.errors = self.errors, []
            return found

    def add(self, request: Request) -> None:
        """Put a request on record whose response is planned."""
        with self.lock:
            self.requests.append(request)
            if self._waiting:
                self._changed.notify_all()
        self.log(request)

    def fail(self, words: str, once: bool = False) -> None:
        """Put an error on record; with ``once``, unless it is there already."""
        self.log(words)
        with self.lock:
            if not (once and words in self.errors):
                self.errors.append(words)

    def clear(self) -> None:
        """Forget requests and errors."""
        with self.lock:
            self.requests, self.errors = [], []

    def end(self) -> None:
        """Note that nothing more will come."""
        with self.lock:
            self._ended = True
            self._changed.notify_all()

    def wait(self, wanted: _Wanted, times: int, timeout: Optional[float]) -> Request:
        """Wait for so many requests that match, and return the last of them.

        Raises AssertionError after ``timeout`` seconds, and once the server has ended.
        """
        record: list[Request] = []
        found, position = 0, 0  # how many match of the first so many

        def is_over() -> bool:
            nonlocal record, found, position
            if record is not self.requests:  # clear() makes a new one
                record, found, position = self.requests, 0, 0
            found += len(wanted.among(record[position:]))
            position = len(record)
            return self._ended or found >= times

        with self.lock:
            self._waiting += 1
            try:
                self._changed.wait_for(is_over, timeout)
            finally:
                self._waiting -= 1
            record, ended = self.requests, self._ended
        # Without the lock, as the words take their time, and the server waits for it.
        limit = " before the server stopped" if ended else f" within {timeout or 0:g} s"
        return wanted.check(record, times, limit=limit)[-1]


# The stoppable server: one thread, one selector, one conversation for each connection

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
#: Connections that are accepted before others are served again.
_ACCEPTED_AT_ONCE = 16
#: Bytes that are sent and received on one connection before others are served again.
_A_TURN = 128 * 1024
#: The longest that a selector waits, in seconds; epoll counts milliseconds in an int.
_LONGEST_WAIT = 24 * 60 * 60.0
#: Windows' select() takes no more than 512 sockets.
_MAX_CONNECTIONS = 500 if os.name == "nt" else sys.maxsize


class _Call:
    """Yielded to call a function in a worker thread: its result, or its exception is raised.

    ``name`` says what is at work, if ``stop()`` has to wait for it.
    """

    def __init__(self, function: Callable[[], Any], name: object) -> None:
        self.function, self.name = function, name


#: What a conversation yields whenever it has to wait: a call; or what its socket has to be ready
#: for, if anything, and until when, by time.perf_counter(). Then it is told whether it is ready.
_Yielded = Union[_Call, tuple[int, float]]
#: The code of a connection. If what it yields fails, that OSError or RuntimeError is raised in it.
#: It returns whether the connection ends by a reset (RST).
_Conversation = Generator[_Yielded, Any, bool]
#: A part of such code.
_Part = Generator[_Yielded, Any, _T]


class StoppableHttpServer(http.server.HTTPServer):
    """An HTTP server that serves until told to stop, at once, and many connections at a time.

    One thread waits for all connections, on one selector. A handler class of ``socketserver``
    blocks, so each of its connections gets a worker thread and a blocking socket; a subclass may
    override ``conversation()`` to avoid the thread. ``serve_forever()`` returns after
    ``shutdown()``, when the port is closed and all connections have ended. Nothing is polled.
    """

    #: The backlog: connections that may wait to be accepted.
    request_queue_size = 1024
    # On Windows the option would let two servers share a port.
    allow_reuse_address = os.name != "nt"
    allow_reuse_port = False

    def __init__(
        self,
        server_address: tuple[str, int],
        RequestHandlerClass: Callable[..., Any],
        bind_and_activate: bool = True,
    ) -> None:
        #: Whether the server has been told to stop, and whether the port is closed.
        self.stopping, self.closed = False, True
        self.started = False  # whether a thread serves, or is about to
        #: Counts the turns of the loop. What is received in a turn was sent before it began.
        self.turn = 0
        self._begin()
        if ":" in server_address[0]:
            self.address_family = socket.AF_INET6
        self._opened: list[Any] = []  # what server_close() closes besides the port
        super().__init__(server_address, RequestHandlerClass, bind_and_activate)
        _open_servers.add(self)

    def _begin(self) -> None:
        """Begin with no thread and no connection, also in a forked child."""
        # For all threads, guarded by the lock: the one that serves; functions that it is to call;
        # the workers, each named after what it does, and for which connection; those that have
        # ended; whether the port is closed, and all connections have ended but the one spared.
        # `with` on a lock cannot be interrupted by Ctrl-C half-way, as it can on a Condition.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: Optional[threading.Thread] = None
        self._calls: collections.deque[Callable[[], object]] = collections.deque()
        self._running: dict[threading.Thread, Optional[_Connection]] = {}
        self._ended: list[threading.Thread] = []
        self._quiet = False
        # Used by the thread that serves only; `current` is the connection that it is busy with.
        self.connections: dict[socket.socket, _Connection] = {}
        self.current: Optional[_Connection] = None
        self._timers: list[tuple[float, int, Callable[[], object]]] = []  # a heap

    def server_bind(self) -> None:
        """Bind the socket, without looking up the host's name as HTTPServer does."""
        # Accepted sockets inherit it: no response of two parts waits for the client's delayed ACK.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def server_activate(self) -> None:
        """Listen, and have the selector watch for connections."""
        super().server_activate()
        self.socket.setblocking(False)
        if not self._opened:
            self.selector = selectors.DefaultSelector()
            self._opened.append(self.selector)
            self._waker, self._woken = pair = socket.socketpair()
            self._opened += pair
            for each in pair:
                each.setblocking(False)
            self.selector.register(self._woken, _READ, self._run_calls)
        self.closed = False
        self._go_on_accepting()

    # Serving

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until ``shutdown()``; nothing is polled, so ``poll_interval`` is not used."""
        if not (self._opened or self.stopping):
            raise RuntimeError("server_activate() must be called before serve_forever()")
        with self._lock:
            self._thread, self.started = threading.current_thread(), True
        try:
            while self.connections or not self.stopping:
                timeout = None
                if self._timers:
                    timeout = min(self._timers[0][0] - time.perf_counter(), _LONGEST_WAIT)
                ready = self.selector.select(timeout)
                self.turn += 1
                # New connections come last: a client may have closed another one before.
                ready.sort(key=lambda each: each[0].fileobj is self.socket)
                for key, _ in ready:
                    key.data()
                while self._timers and self._timers[0][0] <= time.perf_counter():
                    heapq.heappop(self._timers)[2]()
        finally:
            try:
                self._close_port(None, stopping=True)
                self._timers.clear()
                self.server_close()
            finally:
                with self._lock:
                    self._thread = None
                    while self._calls:
                        self._calls.popleft()()
                    self._changed.notify_all()

    def call_at(self, when: float, function: Callable[[], object]) -> None:
        """Call a function at a time of ``time.perf_counter()``."""
        # Of two at the same time, neither comes first; but functions cannot be compared.
        heapq.heappush(self._timers, (when, id(function), function))

    def _accept(self) -> None:
        if hasattr(self.socket, "do_handshake_on_connect"):  # in TLS; the handler's thread does it
            self.socket.do_handshake_on_connect = False
        # More at a time when many are open, so that a new one does not wait for all of them.
        for _ in range(min(1 + len(self.connections), _ACCEPTED_AT_ONCE)):
            if self.closed:  # by an earlier event of this turn
                return
            try:
                if len(self.connections) >= _MAX_CONNECTIONS:
                    raise OSError(errno.EMFILE, "there are too many connections")
                connection, address = self.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors, most likely: connections wait in the backlog for a free one.
                _logger().info("accept failed: %s", error)
                self.selector.unregister(self.socket)
                self.call_at(time.perf_counter() + 0.05, self._go_on_accepting)
                return
            connection.setblocking(False)
            self.connections[connection] = begun = _Connection(self, connection, address)
            begun.resume()  # it has often sent its request already

    def _go_on_accepting(self) -> None:
        with contextlib.suppress(KeyError):  # it is accepting, after bind_again()
            if not self.closed:
                self.selector.register(self.socket, _READ, self._accept)

    def conversation(self, request: socket.socket, client_address: Any) -> _Conversation:
        """What happens on a connection: the blocking handler, in a worker thread."""
        # Another socket, as this one is closed whenever the server is stopped.
        copy = socket.fromfd(request.fileno(), request.family, request.type, request.proto)
        if hasattr(request, "context"):  # the listening socket was wrapped in TLS
            how = {"server_side": True, "do_handshake_on_connect": False}
            copy = request.context.wrap_socket(copy, **how)
        handle = functools.partial(self._handle, copy, client_address)
        try:
            yield _Call(handle, f"the handler of {client_address!r:.80}")
        except GeneratorExit:
            with contextlib.suppress(OSError):  # it is closed, or the client was faster
                request.shutdown(socket.SHUT_RDWR)  # wakes the handler; Windows needs more
            if os.name == "nt":
                socket.close(copy.detach())
            raise
        except RuntimeError:  # there are no more threads
            copy.close()
            raise
        return False

    def _handle(self, request: socket.socket, client_address: Any) -> None:
        request.settimeout(None)
        try:
            if self.verify_request(request, client_address):
                self.finish_request(request, client_address)
        except BaseException:
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report a handler's exception, unless the client has just gone or the server stops.

        SystemExit ends the connection, as it would end a thread, and is not reported either.
        """
        if self.stopping or isinstance(sys.exc_info()[1], (ConnectionError, SystemExit)):
            _logger().info("connection lost", exc_info=True)
        else:
            super().handle_error(request, client_address)

    # Workers, and calls from other threads

    def run_in_worker(self, connection: Optional[_Connection], call: _Call) -> None:
        """Call a function in a worker thread, and resume the connection with the result, if any.

        Raises RuntimeError if there are no more threads.
        """
        resume = connection.resume if connection else lambda *result: None

        def work() -> None:
            try:
                resumed = functools.partial(resume, call.function())
            except BaseException as error:
                resumed = functools.partial(resume, None, error)
            self.post(resumed)
            del resumed  # an exception refers to this frame
            with self._lock:
                self._running.pop(thread, None)
                self._ended.append(thread)
                self._changed.notify_all()

        thread = threading.Thread(target=work, name=str(call.name), daemon=True)
        with self._lock:
            self._ended = [each for each in self._ended if each.is_alive()]
            thread.start()
            self._running[thread] = connection  # it needs the lock to end

    def post(self, function: Callable[[], object]) -> None:
        """Have a function called by the thread that serves; if there is none, call it here."""
        with self._lock:
            if self._thread in (None, threading.current_thread()):
                function()
                return
            self._calls.append(function)
            with contextlib.suppress(OSError):  # it is full, or closed: at the end all are called
                self._waker.send(b"\0")

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called by the thread that serves, and wait until that is done.

        Raises the OSError that it raises.
        """
        done = threading.Lock()  # an Event in which Ctrl-C comes may keep a lock of its own
        done.acquire()
        errors: list[OSError] = []

        def run() -> None:
            try:
                function()
            except OSError as error:
                errors.append(error)
            finally:
                done.release()

        self.post(run)
        done.acquire()
        if errors:
            raise errors.pop()

    def _run_calls(self) -> None:
        """Call the functions that have been posted so far; others are served before the next."""
        with contextlib.suppress(OSError):
            self._woken.recv(4096)
        for _ in range(len(self._calls)):
            with self._lock:
                function = self._calls.popleft()
            function()

    # Stopping

    def shutdown(self) -> None:
        """End the server and all its connections, and wait until its threads have ended.

        In one of these, such as a handler's, it waits for the port and the connections only.
        """
        self.close_port(stopping=True)
        self.join()

    def close_port(self, stopping: bool) -> None:
        """Close the port and end all connections but the one that this thread works for.

        Unless ``stopping``, the server serves on, so that bind_again() can open the port. This does
        not wait; join() does.
        """
        this = threading.current_thread()
        with self._lock:
            self._quiet = False
            own = self.current if this is self._thread else self._running.get(this)
        self.post(functools.partial(self._close_port, own, stopping))
        if this is self._thread:  # in a signal handler, after which select() would wait on
            with contextlib.suppress(OSError):
                self._waker.send(b"\0")

    def bind_again(self, listening: bool = False) -> None:
        """Bind the port after close_port(); clients are refused unless this listens, too."""
        if self.stopping:
            return
        if self.socket.fileno() < 0:
            self.socket = socket.socket(self.address_family, self.socket_type)
            try:
                self.server_bind()
            except BaseException:
                self.socket.close()
                raise
        if self.allow_reuse_address:  # else others could bind the port while this does not listen
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, listening)
        if listening:
            self.server_activate()

    def _close_port(self, spared: Optional[_Connection], stopping: bool) -> None:
        self.closed, self.stopping = True, self.stopping or stopping
        with contextlib.suppress(KeyError, ValueError):  # it is not accepting, or closed
            if self._opened:
                self.selector.unregister(self.socket)
        self.socket.close()
        self.end_connections(lambda each: each is not spared)
        with self._lock:
            self._quiet = True
            self._changed.notify_all()

    def end_connections(self, is_meant: Callable[[_Connection], bool]) -> None:
        """End the connections that are meant, and what happens on them."""
        for connection in filter(is_meant, list(self.connections.values())):
            connection.end()

    def join(self, timeout: Optional[float] = None) -> list[str]:
        """Wait until all threads have ended, after close_port(); tell what still runs, in words.

        If the server serves on, only the workers have to end. A worker waits for the port and the
        connections only. ``timeout`` is in seconds; None waits as long as it takes.
        """
        is_own = self.is_own_thread()
        timeout = timeout if timeout is None else min(timeout, threading.TIMEOUT_MAX)

        def has_ended() -> bool:
            others = self._running or (self.stopping and self._thread)
            return self._quiet and (is_own or not others)

        with self._lock:
            # The thread that serves waits for nothing: others may have it close the port once more.
            is_serving = threading.current_thread() is self._thread
            if not (is_serving or self._changed.wait_for(has_ended, timeout)):
                names = list(dict.fromkeys(thread.name for thread in self._running))
                return names or ["all requests, maybe the clock"]
            for thread in self._ended:  # one of us at a time, as Thread.join() needs it
                thread.join()
        return []

    def is_own_thread(self) -> bool:
        """Whether this thread is the one that serves, or a worker."""
        with self._lock:
            return threading.current_thread() in (self._thread, *self._running)

    def server_close(self) -> None:
        """Close the port, and what the thread that serves waits on; that is stopped before."""
        if self._thread not in (None, threading.current_thread()):
            self.shutdown()  # at its end it calls this itself
            return
        super().server_close()
        self._close_selector()

    def _close_selector(self) -> None:
        while self._opened:
            self._opened.pop().close()

    def leave_to_the_parent(self) -> None:
        """In a forked child, serve no further, and close the copies of the sockets.

        While there is a copy, the port is not free, and closing a connection does not reset it. The
        epoll set is the parent's as well, so nothing is unregistered. A server that does not serve
        yet may do so in the child, with a selector of its own.
        """
        for connection in self.connections.values():
            connection.socket.close()  # before the conversation ends, which could shut it down
            # It is kept, as test code in it may clean up when it goes, which is the parent's.
            _left_to_the_parent.append(connection.conversation)
            connection.conversation = None
        self._begin()  # nobody here would release the lock
        if self.started or self.stopping:
            self.stopping = self.closed = True
            self.server_close()
        elif self._opened:
            self._close_selector()
            self.server_activate()


#: In a forked child, the conversations of its parent.
_left_to_the_parent: list[object] = []
#: The servers of this process, for the children that it forks.
_open_servers: weakref.WeakSet[StoppableHttpServer] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    # No thread here would release the other ones.
    _Key.lock, _OtherHosts.lock = threading.Lock(), threading.RLock()
    for server in _open_servers:
        with contextlib.suppress(OSError):  # out of descriptors
            server.leave_to_the_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


class _Connection:
    """A connection, its conversation, and what that waits for."""

    #: Whether it is here only because of intercept().
    is_intercepted = False

    def __init__(self, server: StoppableHttpServer, connection: socket.socket, address: Any):
        self._server, self.socket, self._address = server, connection, address
        #: None once it has ended.
        self.conversation: Optional[_Conversation] = server.conversation(connection, address)
        self._events = 0  # that the selector watches for
        self._awaited: Optional[_Yielded] = None
        self._timer = -math.inf  # the last time at which a timer calls _go_on()
        self._spent = 0  # bytes sent and received in this turn

    def resume(self, value: Any = None, error: Optional[BaseException] = None) -> None:
        """Go on with the conversation until it has to wait, or has ended."""
        if self.conversation is None:  # it has ended while a worker was at work for it
            return
        current, self._server.current, self._spent = self._server.current, self, 0
        try:
            if error is None:
                awaited = self.conversation.send(value)
            else:
                awaited = self.conversation.throw(error)
            while error := self._await(awaited):
                awaited = self.conversation.throw(error)
        except StopIteration as stop:
            self._close(by_reset=stop.value)
        except GeneratorExit:
            self._close()
        except Exception:  # what else there is ends the server, which closes all connections
            self._server.handle_error(self.socket, self._address)
            self._close()
        self._server.current, error = current, None  # an exception refers to this frame

    def _await(self, awaited: _Yielded) -> Optional[BaseException]:
        """Have what comes of this resume the conversation later; return what fails at once."""
        self._awaited = awaited
        try:
            if isinstance(awaited, _Call):
                self._watch(0)
                self._server.run_in_worker(self, awaited)
                return None
            events, until = awaited
            self._watch(events)
            if until < math.inf and until != self._timer:  # else it goes on then anyway
                self._timer = until
                self._server.call_at(until, functools.partial(self._go_on, is_ready=False))
        except (OSError, RuntimeError) as error:
            return error
        return None

    def _go_on(self, is_ready: bool = True) -> None:
        """Resume the conversation if what it waits for has come, and not for an earlier wait."""
        if isinstance(self._awaited, tuple):
            events, until = self._awaited
            if (is_ready and events) or until <= time.perf_counter():
                self._awaited = None
                self.resume(is_ready)

    def receive(self, until: float = math.inf) -> _Part[Optional[bytes]]:
        """Receive bytes, or b"" at their end; None if ``until`` comes first."""
        # A new client has often sent its request already, and others have sent something since.
        is_ready = not self._events
        if is_ready:
            self._server.turn += 1  # as this may have been sent just now
        while True:
            if is_ready and self._spent <= _A_TURN:  # else others are served first
                try:
                    data = self.socket.recv(65536)
                    self._spent += len(data) + 1000  # as a small block takes its time as well
                    return data
                except BlockingIOError:
                    pass
            if until < math.inf and until <= time.perf_counter():
                return None
            is_ready = yield _READ, until

    def send(self, data: Union[bytes, memoryview]) -> _Part[None]:
        """Send all of it, as the client takes it."""
        while True:
            sent = 0
            try:
                if self._spent <= _A_TURN:
                    sent = self.socket.send(data)
            except BlockingIOError:
                pass
            self._spent += sent + 1000
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
            yield _WRITE, math.inf

    def _watch(self, events: int) -> None:
        """Have the selector watch for these events, or for none."""
        if events == self._events:
            return
        if self._events:
            self._server.selector.unregister(self.socket)
            self._events = 0  # what it is if this fails
        if events:
            self._server.selector.register(self.socket, events, self._go_on)
            self._events = events

    def end(self) -> None:
        """End the conversation where it waits, and close the connection."""
        self.resume(error=GeneratorExit())

    def _close(self, by_reset: bool = False) -> None:
        self.conversation = self._awaited = None
        self._watch(0)
        self._server.connections.pop(self.socket, None)
        with contextlib.suppress(OSError):  # the client was faster
            if by_reset:
                # struct linger: yes, for 0 seconds. Its members are short on Windows.
                at_once = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            else:
                # close() sends no FIN while a forked child has a copy, and RST if bytes are unread.
                self.socket.shutdown(socket.SHUT_WR)
        self.socket.close()


class _FixtureServer(StoppableHttpServer):
    """The server of a FeedTestServer, whose conversations need no thread."""

    def conversation(self, request: socket.socket, client_address: Any) -> _Conversation:
        """The conversation of the handler."""
        handler: Any = self.RequestHandlerClass
        return bool((yield from handler(request, client_address, self).converse()))


# The conversation: a request is read, responded to and recorded


class _Refusal(Exception):
    """A request that cannot be understood: the status, and the reason that the client gets."""

    #: What could be read of its head, if it is the head that is wrong.
    head: Optional[_Head] = None


class FeedTestRequestHandler:
    """The conversation on one connection: one request after the other, each with its response.

    A subclass may add ``do_`` methods. They run in a worker thread, find the Request in
    ``self.received`` and the FeedTestServer in ``self.test_server``, and respond by
    ``self.reply(Response(...))``.
    """

    received: Request
    response: Optional[Response]
    # How a connection begins.
    scheme = ""
    tunnel: Optional[Request] = None
    base_url = ""
    tls: Optional[_Tls] = None
    client_certificate: Optional[str] = None
    head: Optional[_Head] = None
    stream: Optional[_Stream] = None
    empty_items = 0  # of it, in a row
    client_left = closing = lingering = False
    #: Whether the response does not wait for the body of the request; None if there is none.
    is_early: Optional[bool] = None
    #: Why the connection ends without a proper end: the kind of the fault, or an error.
    broken_off = ""
    heard_at = sent_at = 0.0
    #: When the client may have left.
    left_at = math.inf
    #: The Date field, of when the request came or the test's code responded.
    date = ""

    def __init__(
        self, test_server: FeedTestServer, sock: socket.socket, client: Any, server: _FixtureServer
    ) -> None:
        self.test_server, self.server = test_server, server
        self.site, self.record = test_server._site, test_server._record
        self.connection, self.client_address = sock, client
        self.transport = server.connections[sock]
        self.connection_number = next(test_server._connection_numbers)
        self.address = self.site.hosts.accepted(client[1]) or _own_address(sock, server.server_name)
        self.buffer = bytearray()

    def converse(self) -> _Conversation:
        """The life of a connection, as a generator; see _Conversation."""
        try:
            while not (self.closing or self.server.stopping):
                yield from (self.exchange() if self.scheme else self.begin())
        except EOFError:
            pass
        except OSError as error:
            self.broken_off = "error"
            _logger().info("the client has gone: %s", error)
        with contextlib.suppress(OSError):  # the client was faster
            yield from self.await_arrival() if self.broken_off == "reset" else self.finish()
        return self.broken_off == "reset"

    def exchange(self) -> _Part[None]:
        """The life of a request: read, find the response, plan, record, send."""
        try:
            request = yield from self.read()
            plan = yield from self.respond(request)
        except _Refusal as refusal:
            request = self.arrived(self.request(refusal.head or self.head or _Head()))
            request.refused = True
            plan = self.plan(request, _refuse(*refusal.args))
        request.response = plan.response
        # What has begun a tunnel is request.tunnel of what comes through it.
        if request.method != "QUIT" and (request.is_scripted or self.tunnel is not request):
            self.record.add(request)
        try:
            yield from (
                self.send_parts(request, plan) if plan.whole is None else self.send(plan.whole)
            )
            request.is_delivered = not self.client_left
        finally:
            # A pause at the end does not count, if the client stays for it.
            is_sent = request.is_delivered and plan.whole is None
            request.ended_at = self.sent_at if is_sent else min(time.perf_counter(), self.left_at)
            self.leave_stream(request)

    def finish(self) -> _Part[None]:
        """Let a client that may still be sending read the response before the connection closes.

        See RFC 9112 9.6.
        """
        if self.tls and not self.broken_off:
            yield from self.transport.send(self.tls.close())
        if (self.lingering or self.buffer) and not self.server.stopping:
            self.connection.shutdown(socket.SHUT_WR)
            while (yield from self.transport.receive()):
                pass

    # Begin, in plain text or in TLS

    def begin(self) -> _Part[None]:
        """Learn the scheme from the first byte of the connection, or of a tunnel (RFC 8446 5.1)."""
        while not self.buffer:
            yield from self.receive()
        self.scheme = "https" if self.buffer[0] == _HANDSHAKE else "http"
        self.base_url = self.site.root_url(self.scheme)
        if self.scheme == "https":
            yield from self.handshake()

    def handshake(self) -> _Part[None]:
        """Begin TLS; a handshake that fails is logged and is no error, as clients may test that."""
        name, how = "", "complete"
        try:
            while (hello := _client_hello(self.buffer)) is None:
                yield from self.receive()
            name = _server_name(hello)
            how = self.test_server.handshake
            if how != "complete":
                raise ValueError(f"server.handshake is {how!r}")
            context = yield _Call(lambda: self.certified(name), f"a TLS handshake {name}".rstrip())
            self.tls = _Tls(context, self.tls, bytes(self.buffer))
            self.buffer.clear()
            yield from self.decipher(b"")
            while not self.tls.established:
                yield from self.receive()
            self.client_certificate = self.tls.client_name()
        except (EOFError, OSError, RuntimeError, ValueError) as error:
            self.closing = self.lingering = True
            host = f" for {name!r:.80}" if name else ""
            self.record.log(f"TLS handshake{host} failed: {str(error) or 'the client has left'}")
            if how != "complete":
                yield from self.break_off(how)

    def certified(self, name: str) -> ssl.SSLContext:
        """The TLS for a client that asks for the host of that name, or for none."""
        tunnel = self.tunnel.head.origin if self.tunnel else ""
        host = (name or _host_and_port(tunnel)[0] or self.address).lower()
        kind, asked = self.test_server.certificate, self.test_server.client_certificates
        configure = self.test_server.configure_tls
        # In a context of its own, no session of another one can be resumed.
        is_shared = configure is None and asked == "none"
        make = _server_context if is_shared else _server_context.__wrapped__
        what = f"the certificate for {host}"
        try:
            with _Key.lock:  # else clients that come at once would each have one made
                context = make(host, kind, asked)
            if configure is not None:
                what = f"configure_tls for {host}"
                _called(configure, context)
        except BaseException as error:
            self.record.fail(_explain(error, what))
            raise RuntimeError(f"{what} failed") from None
        return context

    # Read

    def read(self) -> _Part[Request]:
        """Read one request, whole, its body included.

        Raises EOFError if the client is done, _Refusal if the request cannot be understood.
        """
        self.head = None
        try:
            self.head = head = yield from self.read_head()
            if self.scheme == "http" and head.is_for_https and not self.site.hosts.are_here:
                raise _Refusal(400, "an https URL was asked for without TLS (RFC 9110 7.4)")
            request = self.request(head)
            self.is_early = None
            if head.body_size != 0:
                own, base = type(self), FeedTestRequestHandler
                by_fixture = (own.do_GET, own.do_HEAD) == (base.do_GET, base.do_HEAD)
                response, self.is_early = self.site.foreseen(request, by_fixture), False
                if response and not (response.asis or _begins_tunnel(head, response)):
                    self.is_early = response.early
                if not self.is_early:
                    yield from self.go_on(_ignoring(head, response.ignore) if response else head)
                    request.body = yield from self.read_body(head)
        except EOFError:
            if not (self.head or self.buffer):
                raise
            raise _Refusal(400, "the connection ended before the request did") from None
        return self.arrived(request)

    def request(self, head: _Head) -> Request:
        """Make the Request that goes on record."""
        origin = self.site.origin_of(head, self.scheme, self.tunnel)
        if origin and self.site.hosts.are_here:
            self.transport.is_intercepted = True
        request = Request(head, self.base_url, origin)
        request.tunnel, request.connection = self.tunnel, self.connection_number
        request.address, request.client_certificate = self.address, self.client_certificate
        return request

    def arrived(self, request: Request) -> Request:
        """The request, with the time when the last of it has come."""
        request.time, request.heard_at = self.time(), self.heard_at
        return request

    def receive(self, until: float = math.inf) -> _Part[None]:
        """Wait for what the client sends, and add it to the buffer.

        Raises EOFError if no more comes.
        """
        if self.client_left:
            raise EOFError
        data = yield from self.transport.receive(until)
        if data is None:
            return
        self.heard_at, self.client_left = time.perf_counter(), not data
        if self.tls:
            yield from self.decipher(data)
        else:
            self.buffer += data
        if self.is_early:  # it is the rest of the request
            self.buffer.clear()

    def decipher(self, data: bytes) -> _Part[None]:
        """Add to the buffer what bytes in TLS say; the handshake is responded to here as well."""
        assert self.tls is not None
        try:
            self.buffer += self.tls.open(data)
        finally:
            if sealed := self.tls.seal():  # TLS has something to say itself, maybe an alert
                yield from self.transport.send(sealed)
        self.client_left = self.client_left or self.tls.ended

    def read_head(self) -> _Part[_Head]:
        """Read the request line and the field lines, up to the empty line that ends them."""
        while not self.buffer or self.buffer == b"\r" or self.buffer.startswith(b"\r\n"):
            if len(self.buffer) < 2:
                yield from self.receive()
            else:  # RFC 9112 2.2: an empty line before a request line is ignored
                del self.buffer[:2]
        end = self.buffer.find(b"\r\n\r\n", 0, _SMALL_HEAD) + 4
        if end > 4:
            data = bytes(self.buffer[:end])
            del self.buffer[:end]
            return _parse_head(data)
        reader = _HeadReader()
        while (head := reader.read(self.buffer)) is None:
            self.head = reader.so_far()  # in case that no more comes
            yield from self.receive()
        yield from self.take(reader.position)
        return head

    def take(self, size: int) -> _Part[bytes]:
        """The next bytes of the connection, as many as that."""
        while len(self.buffer) < size:
            yield from self.receive()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def go_on(self, head: _Head) -> _Part[None]:
        """Let a client go on that waits with its body for a 100 (RFC 9110 10.1.1)."""
        expected = _members(head.values.get("expect", ""))
        if "100-continue" in expected and head.version != "1.0" and not self.buffer:
            yield from self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def read_body(self, head: _Head) -> _Part[bytes]:
        """Read the body of a request, and decode its chunks (RFC 9112 7.1)."""
        if head.body_size is not None:
            return (yield from self.take(head.body_size))
        body = bytearray()
        while size := _chunk_size((yield from self.read_line(too_long=400))):
            _check_size(len(body) + size)
            body += yield from self.take(size)
            if (yield from self.take(2)) != b"\r\n":
                raise _Refusal(400, "the data of a chunk is longer than its size says")
        trailers = 0
        while trailer := (yield from self.read_line(too_long=431)):
            _field(trailer, trailers)
            trailers += 1
        return bytes(body)

    def read_line(self, too_long: int) -> _Part[str]:
        """The next line, without its end; see _line_at()."""
        while (line := _line_at(self.buffer, 0, too_long)) is None:
            yield from self.receive()
        del self.buffer[: len(line) + 2]
        return line

    # Find who responds

    def respond(self, request: Request) -> _Part[_Plan]:
        """The plan of the response: of the best match that does not pass, else of a do_ method.

        It is a 500 if a fixture or the test's own code is wrong.
        """
        try:
            if request.head.origin and (response := self.site.unreachable(request)):
                return self.plan(request, response)
            for step in self.steps(request):
                if callable(step):
                    response = yield from self.work(request, self.perform, request, step)
                    self.time()
                    # Early means nothing in what a callable returns, unless it was foreseen.
                    self.is_early = bool(self.is_early)
                else:
                    response = self.site.response(step, request)
                if response is not None:
                    break
            assert response is not None
            if len(response.content) > _MUCH and (response.compress or response.template):
                return (yield from self.work(request, self.plan, request, response))
            return self.plan(request, response)
        except Exception as error:
            return self.plan(request, self.report(request, error))

    def steps(self, request: Request) -> Iterator[Step]:
        """The steps for a request; where all of them pass, what its do_ method responds."""
        for script in self.site.matching(request):
            yield script.take(request)  # only when those before it have passed
        request.step = ""
        # A method of a subclass is test code, which may take its time.
        yield self.unscripted(request) if type(self) is FeedTestRequestHandler else self.unscripted

    def work(self, request: Request, function: Callable[..., _T], *arguments: object) -> _Part[_T]:
        """Call a function for a request that may block, and look whether the client has left."""
        begin, was_there = time.perf_counter(), not self.client_left
        result: _T = yield _Call(functools.partial(function, *arguments), request)
        try:
            if was_there and len(self.buffer) <= _A_TURN:
                yield from self.receive(until=-math.inf)
        except OSError:  # no error of the function
            self.client_left = True
        if was_there and self.client_left:  # it may have left as soon as that began
            self.left_at = begin
        return result

    def perform(self, request: Request, step: Callable[[Request], Any]) -> Optional[Response]:
        """What test code responds, None if it passes; a callable may return another one.

        What it raises is put on record here, in case the connection ends first.
        """
        try:
            result = _called(step, request)
            return None if result is None else self.site.response(result, request)
        except BaseException as error:  # pytest.fail() raises no Exception
            return self.report(request, error)

    def unscripted(self, request: Request) -> Response:
        """Call the do_ method of the request's method, and return what it replied."""
        is_for_host = request.origin and request.method not in _FOR_THE_SERVER
        if is_for_host and (words := self.site.unknown_host(request)):
            self.record.fail(words)
            return _text_response(502, words)
        self.received, self.response = request, None
        name = f"do_{request.method}"
        method = getattr(self, name, None)
        if method is None:
            return self.not_allowed(request.method)
        method()
        if self.response is None:
            raise RuntimeError(f"{name}() did not call self.reply()")
        return self.response

    def report(self, request: Request, error: BaseException) -> Response:
        """Put on record what is wrong with a fixture or test code; the client gets the same."""
        words = _explain(error, request)
        self.record.fail(words)
        return _text_response(500, words)

    def reply(self, response: Response) -> None:
        """Respond to the request by this response; a do_ method calls it once.

        Raises TypeError if it is no Response, RuntimeError the second time.
        """
        if not isinstance(response, Response):
            raise TypeError(f"reply(): found {response!r:.80}; it takes a Response")
        if self.response is not None:
            raise RuntimeError(f"do_{self.received.method}() called self.reply() twice")
        self.response = response

    def do_GET(self) -> None:
        # A method in a subclass may have changed the file just now.
        turn = self.server.turn if type(self) is FeedTestRequestHandler else None
        self.reply(self.site.fixture_for(self.received, turn))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_OPTIONS(self) -> None:
        self.reply(Response(status=204, headers=[("Allow", self.allowed())]))

    def do_CONNECT(self) -> None:
        """Begin a tunnel to the host that was asked for, if that is here (RFC 9110 9.3.6)."""
        response = Response(status=200, reason="Connection established")
        if not (self.site.hosts.are_here or self.site.has_tunnel_to(self.received)):
            words = "CONNECT is not accepted here; inside of server.intercept() it is"
            words += ", and for the hosts of https URLs that respond() was given"
            response = _refuse(405, words, [("Allow", self.allowed())])
        self.reply(response)

    def do_QUIT(self) -> None:
        """Stop the server: the port is closed before the response is sent."""
        response = _refuse(403, "QUIT is for clients on this machine only")
        if re.match(r"(?:::ffff:)?127\.|::1\Z", self.client_address[0]):
            self.server.shutdown()  # in a thread of the server's own, it waits for the port only
            response = _text_response(200, "the server stops")
        self.reply(response)

    def allowed(self) -> str:
        """The methods that there are do_ methods for, as the Allow field lists them."""
        methods = sorted(name[3:] for name in dir(self) if name.startswith("do_"))
        return ", ".join(method for method in methods if method not in _FOR_THE_SERVER)

    def not_allowed(self, method: str) -> Response:
        if method not in _METHODS:
            return _refuse(501, f"the method {method[:80]!r} is not implemented")
        words = f"{method} is not allowed here; in Python, respond() can script a response to it"
        return _refuse(405, words, [("Allow", self.allowed())])

    # Plan

    def plan(self, request: Request, response: Response) -> _Plan:
        """Decide the response completely, and whether the connection ends with it."""
        begins_tunnel = _begins_tunnel(request.head, response)
        if response.early and (begins_tunnel or self.is_early is False):
            response = _with(response, early=False)
        persistent = begins_tunnel or _ignoring(request.head, response.ignore).persists
        lasting = persistent and not (self.server.stopping or self.is_early or response.early)
        plan = _shared_plan(request, response, self.date, lasting)
        if isinstance(response.content, _Items):
            report = functools.partial(self.report, request)
            self.stream = _Stream(response.content, bool(plan.response.chunked), report)
        if begins_tunnel:  # its first byte tells the scheme, as that of a connection does
            self.tunnel, self.scheme = request, ""
        if plan.closes:
            self.closing = True
            # It may still be sending, unless it has asked for the end and gets all in one piece.
            asked = not persistent and not response.asis and response.value("connection") is None
            self.lingering = not asked or plan.whole is None
        if self.is_early:  # a fault before the end breaks the upload off
            self.buffer.clear()
            self.lingering = response.fault is None or response.fault.endswith("at end")
        return plan

    def time(self) -> float:
        """The time by the server's clock; a clock that fails is an error in the test's code."""
        try:
            now = float(self.test_server.clock())
            self.date = _http_date(int(now))  # no infinity, and no year 10000, which none can tell
        except BaseException as error:
            self.record.fail(f"the server's clock: {_shown(error)}", once=True)
            now = time.time()
            self.date = _http_date(int(now))
        return now

    # Send

    def send_parts(self, request: Request, plan: _Plan) -> _Part[None]:
        """Send the planned response, part by part."""
        begin = time.perf_counter()
        if self.stream:  # so that the system does not take much more than the client
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BLOCK // 2)
        for part in _timeline(plan, self.stream):
            now = time.perf_counter()
            if isinstance(part, str):
                self.sent_at = now  # nothing more is sent
                yield from self.break_off(part)
            elif isinstance(part, _Stream):
                yield from self.produce(request, part)
            elif isinstance(part, float):
                yield from self.pause_until(part + (now if isinstance(part, _Pause) else begin))
            else:
                yield from self.send(part)
                self.sent_at = time.perf_counter()
            if isinstance(part, (_Pause, _Stream)):  # meanwhile, the clock of Rate stands still
                begin += time.perf_counter() - now

    def produce(self, request: Request, stream: _Stream) -> _Part[None]:
        """Wait for the next item of the body."""
        # Where a client has not merely half-closed but left, its system has refused the last item.
        if self.client_left and self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise EOFError
        try:
            yield from self.work(request, stream.next)
        except RuntimeError as error:  # there are no more threads
            stream.fail(error)
        if stream.has_failed:
            self.broken_off = "error" if stream.is_framed else "reset"
            raise EOFError
        is_empty = stream.item is not None and not len(stream.item)
        self.empty_items = self.empty_items + 1 if is_empty else 0
        # Where nothing is sent, no error tells that the client has left for good.
        if self.client_left and self.empty_items > 9:
            raise EOFError

    def leave_stream(self, request: Request) -> None:
        """Have a worker close a body that is not sent whole; a forked child leaves it alone."""
        stream, self.stream = self.stream, None
        if stream and stream.item is not None and self.server.is_own_thread():
            with contextlib.suppress(RuntimeError):  # there are no more threads
                self.server.run_in_worker(None, _Call(stream.close, request))

    def send(self, data: Union[bytes, memoryview]) -> _Part[None]:
        """Send all of it, in TLS if that is spoken."""
        return self.transport.send(data if self.tls is None else self.tls.seal(data))

    def pause_until(self, end: float) -> _Part[None]:
        """Let time pass, unless the client leaves or the server stops; what it sends is kept.

        A half-close cannot be told from a disconnect, so the rest is sent without further delay.
        """
        while time.perf_counter() < end and not (self.client_left or self.server.stopping):
            if len(self.buffer) <= _MAX_BODY:
                yield from self.receive(end)
            else:  # so that a client cannot exhaust the memory
                yield 0, end

    def break_off(self, fault: str) -> _Part[None]:
        """Begin a fault; a stall is silence until the client leaves. The connection ends after it.

        No close_notify is sent, so that TLS tells the client that something is missing.
        """
        self.broken_off = fault
        if fault == "stall":
            yield from self.pause_until(math.inf)

    def await_arrival(self) -> _Part[None]:
        """Wait until the client's system has all that was sent; a reset would drop the rest."""
        seconds = 0.001
        while _in_flight(self.connection) and not self.server.stopping:
            if self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return  # the client has left
            yield 0, time.perf_counter() + seconds
            seconds = min(2 * seconds, 0.02)


# FeedTestServer comes first in the file, so its default can only be set here.
FeedTestServer.handler_class = FeedTestRequestHandler


def _called(step: Callable[[Any], Any], argument: object) -> Any:
    """What comes of a callable in the end: no coroutine, and no other callable."""
    result = step(argument)
    if isinstance(result, Coroutine):
        import asyncio  # for coroutine functions only

        result = asyncio.run(result)
    return _called(result, argument) if callable(result) else result


def _explain(error: BaseException, what: Union[Request, str]) -> str:
    if isinstance(error, DirectiveError):
        return str(error)
    import traceback  # for what has gone wrong only, so not part of the import time

    frames = error.__traceback__
    while frames and frames.tb_frame.f_globals is globals():
        frames = frames.tb_next  # it begins in the test's code
    lines = traceback.format_exception(type(error), error, frames)
    what = what if isinstance(what, str) else f"{what.method} {what.shown}"
    return f"{what}: {_shown(error)}\n{''.join(lines)}"


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except BaseException as fault:  # in the test's own class
        return f"{type(error).__name__}, whose repr() raises {type(fault).__name__}"


@functools.cache
def _logger() -> logging.Logger:
    import logging  # takes as long as the rest of this module's imports beyond http.server

    return logging.getLogger("feedtestserver")


def _log(event: object) -> None:
    _logger().info("%s", event)


def _own_address(connection: socket.socket, name: str) -> str:
    """The IP address of our end of a connection; that of a server with a ``name`` is known."""
    address = connection.getsockname()[0] if name in _ANY_ADDRESS else name
    return str(address).removeprefix("::ffff:").partition("%")[0]


def _in_flight(connection: socket.socket) -> int:
    """How many bytes were sent and have not arrived; 0 if the system does not tell."""
    if sys.platform == "darwin":
        return connection.getsockopt(socket.SOL_SOCKET, 0x1024)  # SO_NWRITE
    if not sys.platform.startswith("linux"):
        return 0
    import fcntl  # for resets only, so not part of the import time
    import termios

    count = fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(count, sys.byteorder)


# The reader: what a request's head may look like (RFC 9112 2 to 6)

_METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
#: Methods that are for the server itself, not for a resource.
_FOR_THE_SERVER = ("CONNECT", "QUIT")
_MAX_FIELDS = 256
_MAX_LINE, _MAX_BODY = 16 * 1024, 64 * 1024 * 1024  # in bytes
#: Heads up to this size are kept, as clients that keep a connection send the same ones again.
_SMALL_HEAD = 2048

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIELD_LINE = re.compile(rf"({_TOKEN.pattern}):(.*)")
_REQUEST_LINE = re.compile(rf"({_TOKEN.pattern}) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9]\.[0-9])")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_NAME = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+"
_AUTHORITY = re.compile(rf"(\[([0-9A-Fa-f]*:[0-9A-Fa-f:.]*)\]|{_NAME})(?::([0-9]{{0,5}}))?")
#: What no line can hold.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)|(?<!\r)\n")
#: What is too long, by the status that says so.
_TOO_LONG = {400: "a chunk size", 414: "the request line", 431: "a field line", 501: "the method"}


class _Head:
    """The head of a request. It is never changed, as requests that are alike share it."""

    def __init__(
        self, method: str = "", target: str = "", version: str = "", fields: _Fields = ()
    ) -> None:
        self.method, self.target, self.version, self.fields = method, target, version, fields
        values: dict[str, list[str]] = {}
        for name, value in fields:
            values.setdefault(name.lower(), []).append(value)
        #: The values by lower-case name, those of repeated fields joined as a list.
        self.values = {name: ", ".join(repeated) for name, repeated in values.items()}
        if not target.isascii():  # raw UTF-8, read as Latin-1
            target = _as_utf_8(target, "surrogateescape")
        #: The path as it was sent, the query, and the origin that the target names, if any.
        self.path, self.has_query, self.query = target.partition("?")
        self.origin = ""
        absolute = _URL.fullmatch(self.path)
        if absolute and (origin := _origin(*absolute.group(1, 2))):
            self.origin, self.path = origin, absolute.group(3) or "/"
        self.is_for_https = self.origin.startswith("https:")
        if method == "CONNECT":  # the https URL of the host
            self.origin, self.path = _origin("https", target), "/"
        self.is_conditional = not _SELECTING.isdisjoint(self.values)
        self.persists = _persists(version, _members(self.values.get("connection", "")))
        #: The size of the body in bytes; None if it is chunked.
        self.body_size: Optional[int] = 0


class _HeadReader:
    """Reads a head line by line, so that it gets the same verdict in whatever pieces it arrives."""

    def __init__(self) -> None:
        #: Where the first line begins that is not complete yet.
        self.position = 0
        self._start = ("", "", "")  # method, target, version
        self._fields: list[tuple[str, str]] = []

    def read(self, data: Union[bytes, bytearray]) -> Optional[_Head]:
        """Read the lines that are complete; the head, if the empty one was among them.

        ``data`` is all that has come. Raises _Refusal for what RFC 9112 says to reject.
        """
        try:
            while True:
                line = _line_at(data, self.position, 431 if self._start[0] else 414)
                if line is None:
                    return None
                self.position += len(line) + 2
                if not line:
                    return _checked(self.so_far())
                if self._start[0]:
                    self._fields.append(_field(line, len(self._fields)))
                else:
                    self._start = _request_line(line)
        except _Refusal as refusal:
            refusal.head = self.so_far()
            raise

    def so_far(self) -> _Head:
        return _Head(*self._start, tuple(self._fields))


def _line_at(data: Union[bytes, bytearray], position: int, too_long: int) -> Optional[str]:
    """The line that begins there, without its CR LF; None if the end of it has not come yet.

    Raises _Refusal for a control character, and with the status ``too_long`` for what is too long.
    Only what comes first counts, so that no verdict depends on what has not come yet.
    """
    limit = position + _MAX_LINE + 2
    end = data.find(b"\n", position, limit) + 1
    line = data[position : end or limit].decode("latin-1")
    if found := _CONTROL.search(line):
        before = line[: found.start()][-80:]
        what = f"the control character {found.group()!r} after {before!r}"
        right = "lines end in CR LF (RFC 9112 2.2)"
        if found.group() not in "\r\n":
            right = "no line may hold it (RFC 9110 5.5)"
        raise _Refusal(400, f"found {what}; {right}")
    if end:
        return line[:-2]
    if len(line) < _MAX_LINE + 2:
        return None
    status = 501 if too_long == 414 and " " not in line else too_long
    raise _Refusal(status, f"{_TOO_LONG[status]} is longer than {_MAX_LINE} bytes")


def _request_line(line: str) -> tuple[str, str, str]:
    """The method, the target and the version."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        found = f"malformed request line {line[:80]!r}"
        raise _Refusal(400, f"{found}; expected METHOD SP TARGET SP HTTP/1.1 (RFC 9112 3)")
    return match[1], match[2], match[3]


def _field(line: str, number: int) -> tuple[str, str]:
    """The name and the value of a field, before which there were so many others."""
    match = _FIELD_LINE.fullmatch(line)
    if match is None:
        right = "TOKEN: VALUE, no white space before TOKEN or the colon (RFC 9112 5)"
        raise _Refusal(400, f"malformed field line {line[:80]!r}; expected {right}")
    if number == _MAX_FIELDS:
        raise _Refusal(431, f"there are more than {_MAX_FIELDS} fields")
    return match.group(1), match.group(2).strip(" \t")


@functools.lru_cache(maxsize=256)
def _parse_head(data: bytes) -> _Head:
    """The head that these bytes are; raises _Refusal for what RFC 9112 says to reject."""
    head = _HeadReader().read(data)
    assert head is not None  # as the empty line is there
    return head


def _checked(head: _Head) -> _Head:
    """The head, with the size of its body; raises _Refusal unless what it says makes sense."""
    if head.version[0] != "1":
        raise _Refusal(505, f"HTTP/{head.version} is not supported; use HTTP/1.1")
    if not _is_target(head):
        what = f"malformed target {head.target[:80]!r} for {head.method:.80}"
        raise _Refusal(400, f"{what} (RFC 9112 3.2)")
    host = head.values.get("host")
    if host is None and head.version != "1.0":
        raise _Refusal(400, "there is no Host field (RFC 9112 3.2)")
    if host and not _origin("http", host):
        raise _Refusal(400, f"the Host field {host[:80]!r} is not a valid host (RFC 9112 3.2)")
    head.body_size = _body_size(head)
    return head


def _is_target(head: _Head) -> bool:
    """Whether the target has one of the four forms, and one that goes with the method."""
    if head.method == "CONNECT":
        return bool(head.origin and re.fullmatch(".+:0*[1-9][0-9]*", head.target))
    if head.target == "*":
        return head.method == "OPTIONS"
    return (head.target.startswith("/") or bool(head.origin)) and "#" not in head.target


def _check_size(size: int) -> None:
    if size > _MAX_BODY:
        raise _Refusal(413, f"the body is larger than {_MAX_BODY} bytes")


def _body_size(head: _Head) -> Optional[int]:
    """The size of a request's body in bytes, None for a chunked one (RFC 9112 6)."""
    coding, length = head.values.get("transfer-encoding"), head.values.get("content-length", "0")
    if coding is None:
        size, *others = {_number(each.strip(" \t")) for each in length.split(",")}
        if size is None or others:
            words = f"the Content-Length {length[:80]!r} is not one number"
            raise _Refusal(400, f"{words} (RFC 9110 8.6, RFC 9112 6.3)")
        _check_size(size)
        return size
    *before, last = _members(coding) or [""]
    if "content-length" in head.values or head.version == "1.0":
        words = "Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0"
        raise _Refusal(400, f"{words} (RFC 9112 6.1)")
    if last != "chunked" or "chunked" in before:
        raise _Refusal(400, f"Transfer-Encoding is {coding[:80]!r}; chunked comes once, last")
    if before:
        raise _Refusal(501, f"the transfer coding {before[0][:80]!r} is not implemented")
    return None


def _number(text: str) -> Optional[int]:
    """A whole number, of bytes or seconds; None for anything else.

    Those of more than 18 digits are all the same, as nothing is so long.
    """
    return min(int(text.lstrip("0")[:19] or "0"), 10**18) if re.fullmatch("[0-9]+", text) else None


def _chunk_size(line: str) -> int:
    match = re.fullmatch(r"([0-9A-Fa-f]+)(?:[ \t]*;.+)?", line)
    if match is None:
        raise _Refusal(400, f"malformed chunk size {line[:80]!r} (RFC 9112 7.1)")
    return int(match.group(1), 16)


# Addresses: URLs and patterns of them, as they are compared

_INTERNET = (socket.AF_INET, socket.AF_INET6)
_URL = re.compile("(?is)(https?)://([^/?#]*)(.*)")
#: The regular expression for a ``*`` in a host, which matches neither a port nor a slash.
_IN_HOST = r"(?:\[[^/]*\]|[^/:\[]*?)"
#: What _normal() looks at: encoded bytes, and characters that no URI may hold (RFC 3986 2).
_NOT_NORMAL = re.compile(r"%[0-9A-Fa-f]{2}|[^!#$&-;=?@A-Z\[\]_a-z~]")


class _Address:
    """The URL or the pattern that respond() or an assertion was given, and maybe a method.

    ``origin`` is "" for the server itself and "*" for any host; ``rest`` is what comes after it.
    Raises ValueError if no request can match.
    """

    def __init__(self, given: str, origin: str, rest: str, method: Optional[str]) -> None:
        path, mark, query = rest.partition("#")[0].partition("?")
        path = _normal(path if path.startswith("/") or given == "*" else f"/{path}")
        self.given, self.method = given, method
        self.is_pattern = "*" in f"{origin}{path}{query}"
        self.query = _parameters(query, "[=*]") if mark else None
        self.key = origin, path, self.query, method
        # Also where that is the server itself, whose origin is "".
        self.is_https = given.lower().startswith("https:")
        if method == "CONNECT" and not re.fullmatch(r"(?i)\*|https://[^/?#]+(/\**)?", given):
            words = "the https URL of a host, such as 'https://a.example'"
            raise ValueError(f"found {given!r:.80} with the method CONNECT; it takes {words}")
        self.is_host_alone = method != "CONNECT" and re.fullmatch("(?i)https?://[^/?#]+/?", given)
        #: Of the addresses that match, the one with the highest rank responds.
        is_exact = not self.is_pattern
        self.rank = is_exact, is_exact and origin != "", self.query is not None, method is not None
        self._has_origin = _glob(origin, ".*?" if origin == "*" else _IN_HOST)
        #: The one path that matches; None for a pattern.
        self.path = None if "*" in path else path
        self._has_path = _glob(path)
        # What is compared of a parameter ``a`` is ``a=``, which a pattern ``*a`` fits as well.
        self._has_parameters = [
            _glob(each, end=r"\Z" if "=" in each else r"=?\Z") for each in self.query or ()
        ]

    def __str__(self) -> str:
        return f"{self.given!r}, method={self.method!r}" if self.method else repr(self.given)

    def covers(self, request: Request) -> bool:
        """Whether a request matches; without a method, any but CONNECT and QUIT."""
        if self.method != request.method and (self.method or request.method in _FOR_THE_SERVER):
            return False
        if not (self._has_path(_normal(request.head.path)) and self.is_at(request)):
            return False
        if self.query is None:
            return True
        return _can_pair(self._has_parameters, _parameters(request.head.query))

    def is_at(self, request: Request) -> bool:
        """Whether the host of a request is this one, or fits the pattern."""
        return any(map(self._has_origin, request.origins))


@functools.lru_cache(maxsize=256)
def _normal(text: str) -> str:
    """A path or a query in the normal form of RFC 3986 6.2.2."""

    def normal(match: re.Match[str]) -> str:
        encoded = match.group().encode("utf-8", "surrogateescape")
        return urllib.parse.quote(urllib.parse.unquote_to_bytes(encoded), safe="")

    return _NOT_NORMAL.sub(normal, text)


@functools.lru_cache(maxsize=256)
def _parameters(query: str, complete: str = "=") -> tuple[str, ...]:
    """The parameters of a query, sorted; one that is not ``complete`` gets a ``=``."""
    parameters = (each for each in _normal(query.replace("+", "%20")).split("&") if each)
    return tuple(sorted(each if re.search(complete, each) else f"{each}=" for each in parameters))


def _can_pair(patterns: Sequence[Callable[[str], object]], texts: Sequence[str]) -> bool:
    """Whether patterns and texts can be paired, each pattern with a text that it fits.

    By Kuhn's algorithm.
    """
    taken: dict[int, int] = {}  # the pattern of each text

    def find(pattern: int, tried: set[int]) -> bool:
        """Find a text for a pattern, moving another pattern if need be."""
        for text in sorted(range(len(texts)), key=taken.__contains__):  # the free ones first
            if text not in tried and patterns[pattern](texts[text]):
                tried.add(text)
                if text not in taken or find(taken[text], tried):
                    taken[text] = pattern
                    return True
        return False

    return len(patterns) == len(texts) and all(find(each, set()) for each in range(len(patterns)))


def _glob(pattern: str, star: str = ".*?", end: str = r"\Z") -> Callable[[str], object]:
    """A function that tells whether a text matches a pattern, given what a ``*`` in it stands for.

    Once what follows a ``*`` has matched, no other match is tried (an atomic group; ``re`` has
    them from Python 3.11), so the time is linear.
    """
    pieces = [re.escape(piece) for piece in pattern.split("*")]
    pieces[-1] += end
    expression = pieces[0]
    for number, piece in enumerate(pieces[1:]):
        expression += f"(?=(?P<p{number}>{star}{piece}))(?P=p{number})"
    return re.compile(f"(?s){expression}").match


def _bare(address: str) -> str:
    """An address without its scheme and the slash that it begins with, as names are compared."""
    return re.sub("(?i)^https?://|^/", "", address)


def _origin(scheme: str, authority: str) -> str:
    """An origin in the one form that is compared (RFC 9110 4.2.3, RFC 3986 3.2.2).

    It is in lower case, without a default port, and without the dot that ends a name. "" if the
    authority is not one host, maybe with a port.
    """
    match = _AUTHORITY.fullmatch(authority)
    host, address, port = match.groups("") if match else ("", "", "")
    if not host or (address and not _ip_address(address)) or int(port or 0) > 65535:
        return ""
    default = "80" if scheme.lower() == "http" else "443"
    end = f":{port}" if port and port != default else ""
    return f"{scheme}://{_normal(host).removesuffix('.')}{end}".lower()


def _parted(url: str) -> tuple[str, str]:
    """The origin of a whole URL, and what comes after; a path alone has no origin.

    The origin is as clients send it, without a user and in ASCII (RFC 9110 4.2, IDNA). Raises
    ValueError where there is no host in it.
    """
    whole = _URL.fullmatch(url)
    if whole is None:
        return "", url
    scheme, authority, rest = whole.groups()
    origin = _origin(scheme, _host_name(authority.rpartition("@")[2]))
    if not origin:
        found = f"found {authority!r:.80} in a URL"
        raise ValueError(f"{found}; it takes the name of a host, and maybe a port")
    return origin, rest


def _host_and_port(origin: str) -> tuple[str, int]:
    """The host of an origin, without the brackets of IPv6, and its port, maybe the default one."""
    parts = urllib.parse.urlsplit(origin)
    default = 443 if parts.scheme == "https" else 80
    return parts.hostname or "", default if parts.port is None else parts.port


def _host_name(host: Any) -> str:
    """A host as it is compared, in ASCII and in lower case (IDNA, RFC 4343); "" if it is no text.

    Look-ups and sockets take it in bytes as well.
    """
    name = host.decode("latin-1") if isinstance(host, (bytes, bytearray)) else host
    if not isinstance(name, str):
        return ""
    with contextlib.suppress(UnicodeError):
        name = name if name.isascii() else name.encode("idna").decode()
    return name.lower()


def _ip_address(host: Any) -> str:
    """An IP address in the one form that is compared; "" for anything else."""
    for family in _INTERNET:
        with contextlib.suppress(OSError, TypeError, ValueError):
            return socket.inet_ntop(family, socket.inet_pton(family, host))
    return ""


# Fixture lookup: from a URL to a file, safely, and to its response

#: The endings of names by their type, each with its subtype where that is not the ending itself.
_ENDINGS = {
    "application": "atom=atom+xml json rdf=rdf+xml rss=rss+xml xml",
    "audio": "aac flac m4a=mp4 mp3=mpeg oga=ogg ogg opus=ogg wav",
    "image": "avif gif ico=vnd.microsoft.icon jpeg jpg=jpeg png svg=svg+xml webp",
    "text": "html opml=x-opml txt=plain",
}
_CONTENT_TYPES = {
    f".{ending}": f"{kind}/{subtype or ending}"
    for kind, endings in _ENDINGS.items()
    for ending, _, subtype in (each.partition("=") for each in endings.split())
}
_ANY_TYPE = "application/octet-stream"
_SIDECAR = ".headers"
_HOST_FOLDER = re.compile(r"\.*[A-Za-z0-9_-][A-Za-z0-9._-]*")
#: Bodies up to this size are sent together with their head.
_SMALL = 64 * 1024
#: Bodies from this size on are compressed or expanded in a worker thread: it takes some 20 ms.
_MUCH = 1_000_000
#: Larger ones are sent in such blocks.
_BLOCK = 256 * 1024
#: Names that are looked at for the nearest one.
_SOME_NAMES = 500


def _quote(path: str) -> str:
    return urllib.parse.quote(path, safe="%/?#[]@!$&'()*+,;=:~", errors="surrogateescape")


def _unquote(path: str) -> str:
    """Percent-decoded; what is not UTF-8 stays as it is in the names of files."""
    return urllib.parse.unquote(path, errors="surrogateescape")


@functools.lru_cache(maxsize=1024)
def _file_names(path: str) -> tuple[str, ...]:
    """The names of files that a path may mean; none for one that would lead elsewhere."""
    *folders, last = (_unquote(segment) for segment in path[1:].split("/"))
    names = [last] if last else ["index.html", "index.xml"]
    for segment in (*folders, *names):
        if segment in ("", ".", "..") or not {"/", "\\", "\0"}.isdisjoint(segment):
            return ()
    return tuple("/".join((*folders, name)) for name in names)


def _path_of(directory: str, name: str) -> str:
    """The path of a fixture, whose name has slashes on Windows as well."""
    return f"{directory}{os.sep}{name.replace('/', os.sep)}"


def _names(directory: str, folder: str = "") -> Iterator[str]:
    """The names of fixtures, as they are found; those that are hidden are left out."""
    with contextlib.suppress(OSError), os.scandir(_path_of(directory, folder)) as entries:
        for entry in entries:
            name = folder + entry.name
            if entry.name.startswith(".") or _is_sidecar(name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _names(directory, f"{name}/")
            elif entry.is_file():
                yield name


def _nearest(directory: str, wanted: str, scripted: Optional[dict[str, str]] = None) -> str:
    """What to say of the nearest name of a fixture or of these, given with how they are shown.

    A large directory is not looked at as a whole.
    """
    some = itertools.islice(_names(directory), _SOME_NAMES if directory else 0)
    names, letters = {**{name: repr(name) for name in some}, **(scripted or {})}, set(wanted)

    def difference(name: str) -> int:
        return len(letters.symmetric_difference(name)) + abs(len(name) - len(wanted))

    near = heapq.nsmallest(50, names, difference)  # as difflib takes its time
    nearest = difflib.get_close_matches(wanted[:200], near, 1, 0.0)
    if nearest:
        found = f"the nearest is {names[nearest[0]]}"
    else:
        found = "there are no fixtures" if directory else "there is no directory"
    return f" in {directory}; {found}" if directory else f"; {found}"


def _is_sidecar(name: str) -> bool:
    return name.lower().endswith(_SIDECAR)


def _may_be_served(directory: str, name: str) -> bool:
    """Whether it is a file that, with its sidecar, really lies in the directory, and no sidecar."""
    root = os.path.join(os.path.realpath(directory), "")
    path = root + name.replace("/", os.sep)
    real, sidecar = os.path.realpath(path), os.path.realpath(path + _SIDECAR)
    # Drives, streams of NTFS, and other names of a file: Windows drops dots and blanks at the end.
    is_odd = os.name == "nt" and re.search(r":|[. ](?:/|\Z)", name)
    is_inside = real.startswith(root) and sidecar.startswith(root)
    return is_inside and os.path.isfile(real) and not (is_odd or _is_sidecar(real))


#: Responses of fixtures, with the stamps of the file and its sidecar when they were loaded.
_loaded: dict[tuple[str, str], tuple[object, Optional[Response]]] = {}


def _stamp(path: str) -> Optional[tuple[int, ...]]:
    """What changes when a regular file does: its times in nanoseconds, its size and where it is.

    None if there is none of that name.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # not there, or a name that no file can have
        return None
    stamp = found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev
    return stamp if stat.S_ISREG(found.st_mode) else None


def _load(directory: str, name: str) -> Optional[Response]:
    """What the fixture of that name responds; None if there is none that may be served.

    Raises DirectiveError for a wrong directive, OSError for a file that cannot be read.
    """
    path = _path_of(directory, name)
    stamp = _stamp(path) if directory else None
    if stamp is None:
        return None
    # Most fixtures have none, and access() raises nothing then, which is faster.
    sidecar = _stamp(path + _SIDECAR) if os.access(path + _SIDECAR, os.F_OK) else None
    loaded = _loaded.get((directory, name))
    if loaded is not None and loaded[0] == (stamp, sidecar):
        return loaded[1]
    response = _read_fixture(directory, name) if _may_be_served(directory, name) else None
    # A file this new may change again within the resolution of its time stamp, and the fixture to
    # which Next leads may go away.
    is_new = time.time() - max(*stamp[:2], *(sidecar or ())[:2]) / 1e9 < 2
    if not (is_new or (response and response.next)):
        if len(_loaded) >= 16384:
            _loaded.clear()
        _loaded[directory, name] = (stamp, sidecar), response
    return response


def _read_fixture(directory: str, name: str) -> Response:
    directives, content = _read(directory, name)
    response = Response(**directives.checked().arguments, asis=name.lower().endswith(".asis"))
    about = {"description": directives["Description"], "next": directives.next}
    return _with(response, content=content, media_type=_media_type(name), **about)


def _read(directory: str, name: str) -> tuple[Directives, bytes]:
    """The directives of a fixture, or of its sidecar where there is one, and its content."""
    path = _path_of(directory, name)
    data = content = pathlib.Path(path).read_bytes()
    is_sidecar = os.path.isfile(path + _SIDECAR)
    if is_sidecar:
        path += _SIDECAR
        data = pathlib.Path(path).read_bytes()
    directives = Directives(path, data, is_sidecar)
    if directives.next:
        beside, count, line = directives.next
        following = f"{name[: name.rfind('/') + 1]}{beside}"
        directives.next = following, count, line
        if not _may_be_served(directory, following):
            words = f"Next: found {beside!r:.80}; there is no such fixture in the same folder"
            directives.errors.append(DirectiveError(path, line, words))
    return directives, content


def _media_type(name: str) -> str:
    """The media type that a name stands for, by the table above and not by the machine's."""
    return _CONTENT_TYPES.get(os.path.splitext(name)[1].lower(), _ANY_TYPE)


class _Items:
    """A body that is an iterable of bytes; its size is not known, so len() is the largest there is.

    Raises ValueError if the response says what such a body cannot have.
    """

    def __init__(self, items: Iterable[bytes], response: Response) -> None:
        self.items = items
        #: The size that a Content-Length promises, in bytes.
        self.size = _number(response.value("content-length") or "")
        said = [("Compress", response.compress), ("Template", response.template)]
        if wrong := [name for name, value in said if value]:
            raise ValueError(f"{wrong[0]}: found the body {items!r:.80}; it takes bytes")
        for line in response.mechanics():
            name, _, place = line.partition(": ")
            if place.endswith("%") and self.size is None:
                right = "a percentage needs bytes, or a Content-Length"
                raise ValueError(f"{name}: found {place!r} with the body {items!r:.80}; {right}")

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, part: slice) -> bytes:
        return b""

    def __bytes__(self) -> bytes:
        return b""

    def __repr__(self) -> str:
        return repr(self.items)


class _Stream:
    """Such a body on its way to one client. Workers call next() and close(), which run test code.

    What goes wrong is given to ``report``.
    """

    def __init__(self, content: _Items, is_chunked: bool, report: Callable[..., object]) -> None:
        self._report = report
        #: Whether the client can tell that something is missing.
        self.is_framed = is_chunked or content.size is not None
        self._blocks = _blocks_of(content.items, None if is_chunked else content.size)
        self._lock = threading.Lock()  # one at a time, as generators need it
        #: The item being sent; None at the end, when all is closed.
        self.item = next(self._blocks, None)
        self.has_failed = False

    def next(self) -> None:
        """Set ``item`` to the next one, maybe an empty one, or ``has_failed``."""
        self._advance(lambda: next(self._blocks, None))

    def close(self) -> None:
        """Close the iterator and the iterable, once next() is not at work any more."""
        self._advance(self._blocks.close)

    def _advance(self, step: Callable[[], Optional[memoryview]]) -> None:
        with self._lock:
            try:
                self.item = step()
            except BaseException as error:  # in test code
                self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the body by an error."""
        self.item, self.has_failed = None, True
        self._report(error)


def _blocks_of(items: Iterable[bytes], size: Optional[int]) -> Generator[memoryview, None, None]:
    """The items of a body, after an empty one that runs no test code.

    At the end, it closes the iterator and then the iterable itself (as PEP 3333 does).
    """
    with contextlib.ExitStack() as closing:
        if hasattr(items, "close"):
            closing.callback(items.close)
        yield memoryview(b"")
        iterator, left = iter(items), math.inf if size is None else size
        if iterator is not items and hasattr(iterator, "close"):
            closing.callback(iterator.close)
        for item in iterator:
            if not isinstance(item, (bytes, bytearray, memoryview)):
                raise TypeError(f"found {item!r:.80} in a body; it takes bytes")
            block = memoryview(bytes(item))
            yield block[: int(min(left, len(block)))]
            left -= len(block)
            if left < 0:
                raise ValueError(f"the body is longer than its Content-Length of {size} bytes")
        if size is not None and left:
            raise ValueError(f"the body ended after {size - left} of the {size} bytes promised")


_Content = Union[bytes, _Items]


def _size(content: _Content) -> Optional[int]:
    """The size of a body in bytes; None if only its end tells."""
    return content.size if isinstance(content, _Items) else len(content)


# Directives: from a fixture's comments to what they ask for


class DirectiveError(ValueError):
    """A wrong directive; the text says file and line, what was found and what would be right.

    Its parts are ``source``, ``line`` (from 1) and ``sentence``.
    """

    def __init__(self, source: str, line: int, sentence: str) -> None:
        super().__init__(source, line, sentence)
        self.source, self.line, self.sentence = source, line, sentence

    def __str__(self) -> str:
        where = f"{self.source}, line {self.line}" if self.source else f"line {self.line}"
        return f"{where}: {self.sentence}"


#: What Next says: the name of a fixture, and after how many responses; and in which line.
_Next = tuple[str, int, int]


class Directives(Headers):
    """What the comments of a fixture say, read like wsgiref.headers.Headers: ``d["Expect"]``.

    Known and free keys are all there, in order, as they are spelled. ``arguments`` are the keyword
    arguments for ``Response`` that the known ones amount to, but for Next, which is ``next``: name,
    number and line, or None. ``errors`` tell what is wrong.
    """

    next: Optional[_Next] = None

    def __init__(self, source: str, data: bytes, is_sidecar: bool = False) -> None:
        """Read a sidecar, or the comments of a fixture, in which there may be prose."""
        self.source = source
        self.arguments: dict[str, Any] = {}
        self.errors: list[DirectiveError] = []
        self._lines: list[tuple[str, str]] = []
        super().__init__(self._lines)
        parts = [(0, b"\n" + _like_ascii(data))] if is_sidecar else _comments(data)
        lines = (line for start, part in parts for line in _logical_lines(part or b"", start))
        for number, line in lines:
            match = _DIRECTIVE.fullmatch(line)
            try:
                if match:
                    _apply(self.arguments, *match.groups())
                    if "next" in self.arguments and not self.next:
                        self.next = (*self.arguments["next"], number)
                    self._lines.append((match.group(1).rstrip(" \t"), match.group(2)))
                elif line and is_sidecar:
                    right = "a line of a .headers file is KEY: VALUE, such as 'Header: Age: 60'"
                    raise ValueError(f"found {_shown_text(line)}; {right}")
            except ValueError as error:
                self.errors.append(DirectiveError(source, number, str(error)))
        self.arguments.pop("next", None)

    def checked(self) -> Directives:
        """These directives; raises the first of ``errors``, if there are any."""
        if self.errors:
            raise self.errors[0]
        return self


def parse_directives(data: bytes, source: str = "") -> Directives:
    """Read the directives of a fixture: lines of the comments that begin in its first 4 KiB.

    ``source`` is what errors call the fixture. Raises DirectiveError for a wrong value, a second
    value for what can have one only, a key that looks like a typo of a known one, and a key that is
    the name of a common response field; TypeError for what is not bytes.
    """
    if not isinstance(data, (bytes, bytearray)):
        raise TypeError(f"data: found {data!r:.80}; it takes bytes")
    return Directives(source, data).checked()


# Directives: the grammar

_COMMENTS_BEGIN_WITHIN = 4096  # bytes of a fixture in which a comment with directives begins
#: A comment or a CDATA section, to the end of the file where it has none.
_MARKUP = re.compile(rb"(?s)<!--(.*?)(-->|\Z)|<!\[CDATA\[.*?(\]\]>|\Z)")
_DIRECTIVE = re.compile(rf"({_TOKEN.pattern}[ \t]*):[ \t]*(.*)", re.DOTALL)
_XML_ENCODING = r"<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z][A-Za-z0-9._-]*)"


def _codec(data: bytes) -> str:
    """The codec of a text; UTF-8 for all that is like ASCII (XML, appendix F)."""
    for codec in ("utf-32-be", "utf-32-le", "utf-16-be", "utf-16-le"):
        if data.startswith(("\ufeff".encode(codec), "<".encode(codec))):
            return codec
    if not data.startswith("<?xm".encode("cp037")):
        return "utf-8"
    # EBCDIC; the declaration, whose letters are the same in all code pages, names the one.
    named = re.match(_XML_ENCODING, data[:_COMMENTS_BEGIN_WITHIN].decode("cp037"))
    with contextlib.suppress(LookupError, UnicodeError):
        if named and "<?xml".encode(named.group(1)) == data[:5]:
            return named.group(1)
    return "cp037"


def _like_ascii(data: bytes) -> bytes:
    """A text in UTF-8 if it is not like ASCII; any other as it is, so that no byte is lost."""
    codec = _codec(data)
    if codec != "utf-8":
        data = data.decode(codec, "replace").replace("\x85", "\n").encode()  # EBCDIC's newline
    return data.removeprefix(codecs.BOM_UTF8)


def _comments(data: bytes) -> Iterator[tuple[int, Optional[bytes]]]:
    """The comments that begin early enough, each with its line; None for one without an end."""
    limit, data = len(_like_ascii(data[:_COMMENTS_BEGIN_WITHIN])), _like_ascii(data)
    begins_early = b"<!" in data[: limit + 1]  # else a large file is not searched to its end
    for markup in _MARKUP.finditer(data) if begins_early else ():
        comment, end_of_comment, end_of_cdata = markup.groups()
        if markup.start() >= limit:
            return
        if not (end_of_comment or end_of_cdata):
            yield 0, None
        elif end_of_comment:
            yield len(data[: markup.start(1)].splitlines()), comment


def _logical_lines(part: bytes, start: int) -> list[tuple[int, str]]:
    """The lines of a part of a file, with their continuations, each with its number.

    ``start`` is the number of the first one. That may follow "<!--", so it does not count for the
    indentation that the lines have in common, which is removed. Bytes that are not UTF-8 are kept
    as surrogates.
    """
    text = b"\n".join(part.splitlines()).decode("utf-8", "surrogateescape")
    first, _, rest = text.partition("\n")
    found = [(start, [first.strip(" \t")])]
    for number, line in enumerate(textwrap.dedent(rest).split("\n"), start + 1):
        text, before = line.strip(" \t"), found[-1][1]
        if text and before[0] and line[0] in " \t" and not re.match(_KNOWN_KEY, text):
            before.append(text)
        else:
            found.append((number, [text]))
    return [(number, " ".join(words)) for number, words in found]


# Directives: the table

#: All but control characters, and surrogates that stand for no byte.
_SENDABLE = "[^\\x00-\\x08\\x0a-\\x1f\\x7f\\ud800-\\udc7f\\udd00-\\udfff]*"
_FIELD_NAME = f"({_TOKEN.pattern})"
_HEADER = f"{_FIELD_NAME}:({_SENDABLE})"
_STATUS = rf"([2-5][0-9][0-9])(?:[ \t]+(?![ \t])({_SENDABLE}))?"
_COUNT = "([1-9][0-9]{0,11})"
_SECONDS = r"([0-9]{1,9}(?:\.[0-9]+)?|\.[0-9]+)"
_PLACE = "headers|(?:100|[1-9]?[0-9])%|0|[1-9][0-9]{0,11}"
_PAUSE = rf"(?ai){_SECONDS}[ \t]+at[ \t]+({_PLACE})"
_FAULT = rf"(?ai)(close|reset|stall)(?:[ \t]+at[ \t]+(start|{_PLACE}|end))?"
# What they take, for errors.
_FIELD = "a field name, a colon, and a value without control characters (RFC 9110 5.1, 5.5)"
_CODE = "three digits from 200 to 599, and a reason phrase if it is not the usual one"
_FROM_1 = "a whole number from 1 to 999999999999"
_PLACES = "at headers, at a number of bytes, at 0% to 100%"
_FAULTS = f"close, reset or stall, and maybe a place: at start, {_PLACES}, or at end"
_OTHER_FIXTURE = "the name of a fixture in the same folder, and maybe after N, N from 1"


def _header(name: str, value: str) -> dict[str, Any]:
    value = value.strip(" \t")
    return _parsed("Status", value) if name.lower() == "status" else {"headers": (name, value)}


def _status(code: str, reason: Optional[str]) -> dict[str, Any]:
    return {"status": int(code), "reason": reason}


def _with_place(what: str, place: Optional[str]) -> str:
    return f"{what} at {place}".lower() if place else what.lower()


def _next(text: str) -> Optional[tuple[str, int]]:
    name, *number = re.split(r"(?i)[ \t]after(?![^ \t])", text, maxsplit=1)
    name, count = name.rstrip(" \t"), number[0].strip(" \t") if number else "1"
    return (name, int(count)) if name and re.fullmatch(_COUNT, count) else None


#: By directive: its pattern, with (?ai) where its case does not matter; what makes of the groups
#: the value of the field of that name, several fields in a dict, or None for what is wrong; and
#: what it takes, for errors.
_RULES: dict[str, tuple[str, Callable[..., Any], str]] = {
    "Header": (_HEADER, _header, _FIELD),
    "Status": (_STATUS, _status, _CODE),
    "Without": (_FIELD_NAME, str, "one field name, of a field that the server would add"),
    "Ignore": (_FIELD_NAME, str, "one field name, of a field that a client may send"),
    "Compress": ("(?ai)(gzip|deflate)", str.lower, "gzip or deflate"),
    "Chunked": (_COUNT, int, f"the size of a chunk in bytes, {_FROM_1}"),
    "Delay": (_SECONDS, float, "a number of seconds from 0 to 999999999, such as 0.5"),
    "Pause": (_PAUSE, _with_place, f"seconds and a place, such as 0.5 at 50%: {_PLACES}"),
    "Rate": (_COUNT, int, f"bytes a second, {_FROM_1}"),
    "Fault": (_FAULT, _with_place, _FAULTS),
    "Early": ("(?ai)(yes)", bool, "yes"),
    "Template": ("(?ai)(yes)", bool, "yes"),
    "Next": (r"([^/\\\0]*)", _next, _OTHER_FIXTURE),
}

#: Fields of a response that are sequences, as their directives may be repeated.
_REPEATED = ("headers", "without", "ignore", "pause")
#: Fields that people paste into fixtures as they stand in a response.
_RESPONSE_FIELDS = (
    "cache-control|content-(?:encoding|length|type)|etag|expires|last-modified|location"
    "|retry-after|set-cookie|transfer-encoding|vary|www-authenticate"
)
#: What begins a line of its own, though it is indented.
_KNOWN_KEY = rf"(?i:{'|'.join(_RULES)}|{_RESPONSE_FIELDS})[ \t]*:"


def _apply(fields: dict[str, Any], key: str, found: object) -> None:
    """Add what a directive says to the fields of a response; raises ValueError if it is wrong.

    ``found`` is the text in a fixture, or a value given to ``Response``.
    """
    name = key.capitalize()
    if name not in _RULES:
        _check_free_key(key, found)
        return
    for field, value in _parsed(name, found).items():
        if field in _REPEATED:
            fields.setdefault(field, []).append(value)
        elif field in fields:
            shown = _shown_text(found)
            raise ValueError(f"{name}: found a second value, {shown}; it takes one only")
        else:
            fields[field] = value


def _parsed(name: str, found: object) -> dict[str, Any]:
    """The fields of a response that a directive sets; raises ValueError if it is wrong."""
    pattern, convert, _ = _RULES[name]
    text = found if isinstance(found, str) else _directive_text(found, convert)
    match = re.fullmatch(pattern, text)
    value = convert(*match.groups()) if match else None
    if value is None:
        raise ValueError(_sentence(name, found))
    if convert is float and not isinstance(found, str):
        value = found  # as its text is rounded
    return value if isinstance(value, dict) else {name.lower(): value}


def _directive_text(value: object, convert: object) -> str:
    """A value given to ``Response``, as a fixture would have it; "" for what none can have."""
    if isinstance(value, bool):
        return "yes" if value and convert is bool else ""
    if isinstance(value, float) and convert is float:
        return f"{value:.9f}"
    return f"{value}" if isinstance(value, int) and convert in (int, float) else ""


def _sentence(name: str, found: object) -> str:
    """What was found, and what would be right."""
    return f"{name}: found {_shown_text(found)}; it takes {_RULES[name][2]}"


def _shown_text(found: object) -> str:
    """What an error shows of a text, or of a value as a fixture would have it."""
    text = found if isinstance(found, str) else repr(found)
    return repr(_readable(text[:80]))


def _readable(text: str) -> str:
    """Text for people: bytes that were kept as surrogates are read as Latin-1."""
    return re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte.group()) & 0xFF), text)


def _check_free_key(key: str, value: object) -> None:
    """Raise ValueError for a key that is not for the test to read, but a mistake."""
    name = key.rstrip(" \t")
    if meant := _meant(name.capitalize()):
        raise ValueError(f"found the key {key[:80]!r}; the directive is {meant}")
    if re.fullmatch(_RESPONSE_FIELDS, name, re.IGNORECASE):
        line = f"{name}: {value}".rstrip(" ")
        right = f"a response field is written {_shown_text(f'Header: {line}')}"
        raise ValueError(f"found {_shown_text(line)}; {right}")


@functools.lru_cache(maxsize=1024)
def _meant(name: str) -> Optional[str]:
    """The directive that an unknown key looks like a typo of, if there is one."""
    # Beyond these lengths the ratio is less, and difflib need not be imported.
    alike = [key for key in _RULES if key[0] == name[0] and 2 / 3 <= len(name) / len(key) <= 3 / 2]
    return next(iter(difflib.get_close_matches(name, alike, 1, 0.8) if alike else ()), None)


# The response as a value, complete before its first byte

#: What ``Response`` takes as ``headers``: names and values, in pairs or in a mapping.
HeaderFields = Union[Mapping[str, Union[str, int]], Iterable[tuple[str, Union[str, int]]]]


class Response:
    """A response: all that a fixture can say but Next, in the same words. It is immutable.

    ``body`` is bytes, before any coding. ``reason`` None is the usual phrase. ``headers`` is a
    sequence of (name, value) pairs or a mapping, ``without`` and ``ignore`` are sequences of names.
    ``compress`` is "gzip" or "deflate", ``chunked`` the size of a chunk in bytes, ``delay`` in
    seconds, ``rate`` in bytes of the body a second. ``pause``, a sequence of texts such as
    "2 at 50%", and ``fault`` are written as in a fixture. ``early``: it does not wait for the
    request's body. ``template``: expressions in the body are expanded. ``asis``: the body is the
    whole response.

    ``body`` may also be an iterable of bytes, such as a generator. The head is sent at once, and
    each item as soon as it is produced: in chunks, unless Content-Length or Transfer-Encoding is
    given. It is iterated in worker threads, one item at a time, and closed when the client leaves
    or the server stops. What it raises is an error of the server and ends the connection. Range is
    ignored. An iterator can be used up: for several requests, respond by a callable.

    Raises ValueError, with the sentence of the directive, for a wrong value, and for what such a
    body cannot have: a coding, a template, a place in per cent without a Content-Length. Raises
    TypeError for what is no body.
    """

    status: int
    reason: Optional[str]
    headers: tuple[tuple[str, str], ...]
    without: tuple[str, ...]
    ignore: tuple[str, ...]
    compress: Optional[str]
    chunked: Optional[int]
    delay: float
    pause: tuple[str, ...]
    rate: Optional[int]
    fault: Optional[str]
    early: bool
    template: bool
    asis: bool
    # For this module: the body before any coding; what Content-Type it gets; of a fixture, its
    # description, which one is the next, and after how many responses; on a 304 that stands for
    # another response, that one; and whether there is something to expand.
    content: _Content
    media_type: Optional[str] = None
    description: Optional[str] = None
    next: Optional[_Next] = None
    confirms: Optional[Response] = None
    has_expressions: bool

    def __init__(
        self,
        body: Union[bytes, Iterable[bytes]] = b"",
        status: int = 200,
        *,
        reason: Optional[str] = None,
        headers: HeaderFields = (),
        without: Sequence[str] = (),
        ignore: Sequence[str] = (),
        compress: Optional[str] = None,
        chunked: Optional[int] = None,
        delay: float = 0,
        pause: Sequence[str] = (),
        rate: Optional[int] = None,
        fault: Optional[str] = None,
        early: bool = False,
        template: bool = False,
        asis: bool = False,
    ) -> None:
        in_memory = isinstance(body, (bytes, bytearray, memoryview))
        if not in_memory and (isinstance(body, (str, Mapping)) or not hasattr(body, "__iter__")):
            raise TypeError(f"body: found {body!r:.80}; it takes bytes, or an iterable of bytes")
        if not isinstance(status, int):
            raise ValueError(_sentence("Status", status))
        if not isinstance(asis, bool):
            raise ValueError(f"asis: found {asis!r:.80}; it takes True or False")
        said = [*_header_texts(headers), *_each("Without", without), *_each("Ignore", ignore)]
        said += _each("Pause", pause)
        if status != 200 or reason is not None:
            said.append(("Status", f"{status}" if reason is None else f"{status} {reason}"))
        mechanics = [("compress", compress), ("chunked", chunked), ("delay", delay), ("rate", rate)]
        mechanics += [("fault", fault), ("early", early), ("template", template)]
        # By identity, as False is equal to 0 and still no delay.
        said += [(name, value) for name, value in mechanics if value is not _DEFAULTS[name]]
        fields: dict[str, Any] = {"asis": asis}
        for name, value in said:
            _apply(fields, name, value)
        for name in _REPEATED:
            fields[name] = tuple(fields.get(name, ()))
        fields["has_expressions"] = "template" in fields or "{{" in f"{reason}{fields['headers']}"
        vars(self).update(_DEFAULTS | fields)
        vars(self)["content"] = bytes(body) if in_memory else _Items(body, self)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set: a Response is a value, make another one")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    @property
    def body(self) -> Any:
        """The body in bytes, before any coding, or the iterable as it was given."""
        return self.content.items if isinstance(self.content, _Items) else self.content

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Response):
            return NotImplemented
        return self._said() == other._said() and self.body == other.body

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        said = "".join(f", {name}={value!r}" for name, value in self._said().items() if value)
        return f"Response({self.content!r:.80}{said})"

    def _said(self) -> dict[str, Any]:
        """All that is not the body, in the order of the constructor's arguments."""
        return {name: getattr(self, name) for name in _DEFAULTS}

    def coded(self) -> _Content:
        """The content as it is sent: in its content coding (RFC 9110 8.4.1)."""
        return _compressed(self.content, self.compress) if self.compress else self.content

    def mechanics(self) -> list[str]:
        """What happens to it on its way, for the reader of a transcript."""
        said = [("Delay", f"{self.delay:g}" if self.delay else ""), *_each("Pause", self.pause)]
        said += [("Rate", self.rate), ("Fault", self.fault), ("Early", "yes" if self.early else "")]
        notes = [f"{name}: {value}" for name, value in said if value]
        if self.next:
            notes.append(f"Next: {self.next[0].rpartition('/')[2]} after {self.next[1]}")
        return [*notes, "as it is"] if self.asis else notes

    def members(self, name: str) -> list[str]:
        """The members of a field whose value is a list (RFC 9110 5.6.1), in lower case."""
        return _members(",".join(_given(self.headers, name)))

    def value(self, name: str) -> Optional[str]:
        """The value of a field, by its lower-case name, as a client would send it back."""
        return next(iter(_given(self.headers, name)), None)


#: All that a response says beside its body, in the order of the constructor's arguments.
_DEFAULTS: dict[str, Any] = {"status": 200, **(Response.__init__.__kwdefaults__ or {})}


def _with(response: Response, **changes: Any) -> Response:
    """A copy with some fields changed; the new values are not checked."""
    copy = Response.__new__(Response)
    vars(copy).update(vars(response) | changes)
    return copy


@functools.lru_cache(maxsize=16)
def _compressed(content: _Content, coding: str) -> bytes:
    """A body in "gzip" or "deflate"; the last ones are kept, as this takes its time."""
    import zlib  # for these responses only, so not part of the import time

    compressor = zlib.compressobj(wbits={"gzip": 31, "deflate": 15}[coding])
    return compressor.compress(bytes(content)) + compressor.flush()


def _as_sent(text: str) -> str:
    """A field's value as a client may read its bytes: in Latin-1."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _header_texts(headers: HeaderFields) -> Iterator[tuple[str, object]]:
    """The Header directives that say the same; ValueError for what is no name and value."""
    pairs = headers.items() if hasattr(headers, "items") else headers
    for key, pair in _each("Header", pairs):
        name, value = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (pair, None)
        is_text = isinstance(value, (str, int)) and not isinstance(value, bool)
        if not isinstance(name, str) or ":" in name or not is_text:
            raise ValueError(_sentence(key, f"{pair!r}"))
        yield key, f"{name}: {value}"


def _each(key: str, values: Iterable[object]) -> list[tuple[str, object]]:
    """The directives of that key for a sequence of values; ValueError where it is none."""
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise ValueError(f"{_sentence(key, values)}, in a sequence")
    return [(key, value) for value in values]


def _text_response(status: int, words: str, headers: Sequence[tuple[str, str]] = ()) -> Response:
    """What the server has to say itself, in plain text."""
    fields = [("Content-Type", "text/plain; charset=utf-8"), *headers]
    return Response(words.encode("utf-8", "backslashreplace") + b"\n", status, headers=fields)


def _refuse(status: int, words: str, headers: Sequence[tuple[str, str]] = ()) -> Response:
    """The response to what a client did wrong, the last one on its connection."""
    return _text_response(status, words, [*headers, ("Connection", "close")])


# The plan: the response to this request, complete (RFC 9110 13 and 14, RFC 9112 6 and 9)

_SELECTING = {"if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "range"}
_IN_304 = {"cache-control", "connection", "content-location", "date", "etag", "expires"}
_IN_304 |= {"server", "vary"}
_HTTP_DATE = (
    "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
    "(?:, [0-9]{2} [A-Z][a-z]{2} (?!00)[0-9]{4} [0-9:]{8} GMT"
    "|(?:s|nes|rs|ur)?day, [0-9]{2}-[A-Z][a-z]{2}-[0-9]{2} [0-9:]{8} GMT"
    "| [A-Z][a-z]{2} [ 1-3][0-9] [0-9:]{8} (?!00)[0-9]{4})"
)
_SERVER = f"feedtestserver/{__version__}"
_IN_CHUNKS = ("Transfer-Encoding", "chunked")


class _Plan:
    """A response as it is sent, decided completely before its first byte.

    ``response`` has all its fields, as it goes on record; ``closes`` tells whether the connection
    ends with it. ``whole`` is all of it, if it is small, and nothing happens to it on its way.
    """

    def __init__(self, response: Response, head: bytes, content: _Content, closes: bool) -> None:
        self.response, self.head, self.content, self.closes = response, head, content, closes
        is_slow = response.delay or response.pause or response.rate or response.fault
        is_in_parts = is_slow or response.chunked or len(content) > _SMALL
        self.whole = None if is_in_parts else head + bytes(content)


#: Plans for requests that are alike. Each is kept with its response, so that no other response gets
#: that id(). Threads may use it at once: at worst a plan is made twice.
_shared_plans: dict[tuple[Any, ...], tuple[Response, _Plan]] = {}


def _shared_plan(request: Request, response: Response, date: str, persistent: bool) -> _Plan:
    """The plan of ``_plan()``, which may have been made for another request of the same second."""
    head = request.head
    if head.is_conditional or response.has_expressions or len(response.content) > _SMALL:
        return _plan(request, response, date, persistent)
    alike = date, id(response), persistent, head.version, head.method, head.path
    found = _shared_plans.get(alike)
    if found is None:
        if len(_shared_plans) > 100:
            _shared_plans.clear()
        found = _shared_plans[alike] = response, _plan(request, response, date, persistent)
    return found[1]


def _plan(request: Request, response: Response, date: str, persistent: bool) -> _Plan:
    """What the response to this request is, complete."""
    response = _expand(request, response)
    if response.asis:
        return _verbatim(response)
    head = _ignoring(request.head, response.ignore)
    return _complete(head, _select(head, response), date, persistent)


def _ignoring(head: _Head, ignored: tuple[str, ...]) -> _Head:
    """The head as it would be if the client had not sent these fields."""
    if not ignored:
        return head
    names = [name.lower() for name in ignored]
    fields = [field for field in head.fields if field[0].lower() not in names]
    return _Head(head.method, head.target, head.version, fields)


def _expand(request: Request, response: Response) -> Response:
    """Fill in {{base_url}}, {{host}} and {{port}}, in the headers and, if asked, in the body."""
    if not response.has_expressions:
        return response
    origin = request.origin or request.base_url
    host, port = _host_and_port(origin)
    headers, reason, content = response.headers, response.reason, response.content
    for name, value in (("{{base_url}}", origin), ("{{host}}", host), ("{{port}}", str(port))):
        headers = tuple((field, text.replace(name, value)) for field, text in headers)
        reason = reason and reason.replace(name, value)
        if response.template:
            content = bytes(content)
            codec = _codec(content)
            content = content.replace(name.encode(codec), value.encode(codec))
    return _with(response, headers=headers, reason=reason, content=content)


def _select(head: _Head, response: Response) -> Response:
    """What the request's conditions and its Range make of a response (RFC 9110 13.2.2).

    For methods other than GET and HEAD, the script decides by itself.
    """
    sent, is_success = head.values, 200 <= response.status < 300
    if not (head.is_conditional and is_success and head.method in ("GET", "HEAD")):
        return response
    if _is_same(head, response, "if-match", "if-unmodified-since") is False:
        name = "If-Match" if "if-match" in sent else "If-Unmodified-Since"
        return _error_for(response, 412, f"{name} does not hold: {sent[name.lower()]}")
    if _is_same(head, response, "if-none-match", "if-modified-since"):
        return _not_modified(response)
    if "range" in sent and head.method == "GET" and response.status == 200:
        return _in_range(sent["range"], sent.get("if-range"), response)
    return response


def _is_same(head: _Head, response: Response, by_tag: str, by_date: str) -> Optional[bool]:
    """Whether the response is unchanged: by the entity tags that are sent, else by the date.

    None where neither is sent, or the dates cannot be compared.
    """
    if by_tag in head.values:
        return _has_tag(head.values[by_tag], response.value("etag"), by_tag == "if-none-match")
    modified, date = response.value("last-modified") or "", head.values.get(by_date, "")
    if date and date == modified:
        return True
    then, since = _seconds(modified), _seconds(date)
    return None if then is None or since is None else then <= since


def _has_tag(tags: str, etag: Optional[str], weakly: bool) -> bool:
    """Whether the list of a condition names an entity tag (8.8.3.2); ``*`` names any."""
    if tags == "*":
        return True
    if etag is None or (etag.startswith("W/") and not weakly):
        return False
    # All of it is a tag, too, as servers send malformed ones.
    named = [tags, *re.findall(r'(?:W/)?"[!\x23-\x7e\x80-\xff]*"', tags)]
    if weakly:
        etag, named = etag.removeprefix("W/"), [tag.removeprefix("W/") for tag in named]
    return etag in named


@functools.lru_cache(maxsize=256)
def _seconds(http_date: str) -> Optional[float]:
    """Seconds since the epoch, from any of the three formats of RFC 9110 5.6.7."""
    if re.fullmatch(_HTTP_DATE, http_date):
        with contextlib.suppress(TypeError, ValueError):  # 30 February
            date = email.utils.parsedate_to_datetime(http_date)
            return date.replace(tzinfo=datetime.timezone.utc).timestamp()
    return None


def _not_modified(response: Response) -> Response:
    """The 304 for a response, with the fields that RFC 9110 15.4.5 asks for."""
    kept = _IN_304 | {"last-modified"} if response.value("etag") is None else _IN_304
    headers = tuple(field for field in response.headers if field[0].lower() in kept)
    return _become(response, 304, headers, confirms=response)


def _error_for(response: Response, status: int, words: str, headers: _Fields = ()) -> Response:
    """Replace the response by an error; keep only fields that are not about its content."""
    error = _text_response(status, words, headers)
    kept = {"connection", "date", "server"}
    others = [field for field in response.headers if field[0].lower() in kept]
    headers = (*error.headers, *others)
    return _become(response, status, headers, chunked=None, content=error.content)


def _become(response: Response, status: int, headers: _Fields, **changes: Any) -> Response:
    """The response with another status. Its content is sent without any further coding."""
    return _with(response, status=status, reason=None, headers=headers, compress=None, **changes)


def _in_range(asked: str, validator: Optional[str], response: Response) -> Response:
    """The response, or the 206 or 416 that Range and If-Range make of it (RFC 9110 14.2)."""
    content = response.coded()
    size, has_parts = len(content), "none" not in response.members("accept-ranges")
    part = _part(asked, size) if has_parts and not isinstance(content, _Items) else None
    is_weak = validator is not None and validator.startswith("W/")
    # If-Range compares strongly (13.1.5); without it, any part is right.
    right = (None, response.value("etag"), response.value("last-modified"))
    if part is None or is_weak or validator not in right:
        return response
    if not part:
        words = f"Range asks for {asked[:80]!r} of {size} bytes"
        return _error_for(response, 416, words, [("Content-Range", f"bytes */{size}")])
    # A true Content-Length of the whole would be a false one of the part.
    whole = ("content-length", str(size))
    kept = [field for field in response.headers if (field[0].lower(), field[1]) != whole]
    added = [("Content-Range", f"bytes {part[0]}-{part[-1]}/{size}")]
    added += [("Content-Encoding", response.compress)] if response.compress else []
    headers = (*kept, *_unset(response, added))
    return _become(response, 206, headers, content=content[part.start : part.stop])


def _part(asked: str, size: int) -> Optional[range]:
    """The bytes that a Range of one part asks for, maybe none; None where it asks for the whole.

    So do several parts, other units, and what is malformed (RFC 9110 14.1.2, 14.2).
    """
    # FIRST-LAST, FIRST- or -SUFFIX; the list may have empty members.
    match = re.fullmatch(r"(?i)bytes=[ \t,]*(?=-?[0-9])([0-9]*)-([0-9]*)[ \t,]*", asked)
    if match is None:
        return None
    first, last = map(_number, match.groups())
    if first is None:
        # An empty body has no last byte that a Content-Range could name: it is sent whole.
        return range(size)[max(0, size - (last or 0)) :] if size or not last else None
    if last is None:
        return range(size)[first:]
    return range(size)[first : last + 1] if first <= last else None


def _has_no_content(head: _Head, response: Response) -> bool:
    """Whether no content follows the head (RFC 9112 6.3)."""
    return response.status in (204, 205, 304) or _begins_tunnel(head, response)


def _begins_tunnel(head: _Head, response: Response) -> bool:
    """Whether a tunnel follows the head: after any 2xx to a CONNECT (RFC 9110 9.3.6)."""
    return head.method == "CONNECT" and 200 <= response.status < 300


def _complete(head: _Head, response: Response, date: str, persistent: bool) -> _Plan:
    """A response with the fields that the server adds to it, and its head as it will be sent."""
    added = [("Date", date), ("Server", _SERVER)]
    framing: Optional[_Fields]
    if _has_no_content(head, response):
        # RFC 9110 15.3.6
        framing = [("Content-Length", "0")] if response.status == 205 else []
        response = _with(response, compress=None, chunked=None, content=b"")
    else:
        chunked, framing = _framing(head, response)
        response = _with(response, chunked=chunked)
        added.append(("Content-Type", response.media_type or _media_type(head.path)))
    if response.compress:
        added.append(("Content-Encoding", response.compress))
    if response.chunked or response.value("transfer-encoding") is None:
        added += framing or []
    headers = [*response.headers, *_unset(response, added)]
    persistent = persistent and (head.method == "HEAD" or _is_framed(headers, framing))
    if not persistent or head.version == "1.0":
        headers += _unset(response, [("Connection", "keep-alive" if persistent else "close")])
    content = response.coded()
    if head.method == "HEAD":
        response, content = _with(response, content=b"", chunked=None), b""
    planned = _with(response, headers=tuple(headers))
    # The response may give the Connection field, or leave out the one that HTTP/1.0 needs.
    persistent = persistent and _persists(head.version, planned.members("connection"))
    closes = not persistent or response.fault is not None
    return _Plan(planned, _response_head(planned), content, closes)


def _framing(head: _Head, response: Response) -> tuple[Optional[int], Optional[_Fields]]:
    """The size of the chunks, and the fields that tell where the body ends (RFC 9112 6.3).

    HTTP/1.0 has no chunks, and an iterable comes in chunks unless its framing is given. The fields
    are None if only the end of the connection tells.
    """
    chunked, size = response.chunked, _size(response.coded())
    if size is None and response.value("content-length") is None and not chunked:
        chunked = _BLOCK if _unset(response, [_IN_CHUNKS]) else None
    if chunked and head.version != "1.0":
        return chunked, [_IN_CHUNKS]
    return None, None if size is None else [("Content-Length", str(size))]


def _is_framed(headers: _Fields, framing: Optional[_Fields]) -> bool:
    """Whether fields frame the body truly, so that a client can tell its end from what follows."""
    # Without content, only a transfer coding misleads: some clients believe that chunks come then,
    # whatever the status says.
    names = ("Transfer-Encoding", "Content-Length") if framing else ("Transfer-Encoding",)
    said = [(name.title(), value.lower()) for name, value in headers if name.title() in names]
    return said == framing


def _unset(response: Response, fields: _Fields) -> _Fields:
    """The default fields that the response neither sets nor suppresses."""
    settled = {name.lower() for name in (*dict(response.headers), *response.without)}
    return [field for field in fields if field[0].lower() not in settled]


def _persists(version: str, options: Sequence[str]) -> bool:
    """Whether a connection persists, by the options of a Connection field (RFC 9112 9.3)."""
    return "close" not in options and (version != "1.0" or "keep-alive" in options)


def _members(value: str) -> list[str]:
    """The members of a list, in lower case, without the empty ones (RFC 9110 5.6.1.2)."""
    return [member for part in value.lower().split(",") if (member := part.strip(" \t"))]


def _verbatim(response: Response) -> _Plan:
    """A response that is all in its body; the record has what can be made of its head.

    If others come before the final one, it is the head of that.
    """
    status, lines = response.status, [""]
    for head in re.split(b"\r?\n\r?\n", bytes(response.content[:_MAX_LINE])):
        first, *others = head.decode("utf-8", "surrogateescape").split("\n")
        found = re.match(r"HTTP/[^ \r]* +([1-9][0-9][0-9])(?![0-9])", first)
        if found:
            status, lines = int(found.group(1)), others
        if not found or status >= 200:
            break
    fields = (line.partition(":") for line in lines)
    headers = tuple((name.strip(), value.strip()) for name, colon, value in fields if colon)
    planned = _become(response, status, headers, chunked=None)
    return _Plan(planned, b"", response.content, closes=True)


@functools.lru_cache(maxsize=8)
def _http_date(seconds: int) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


# The request, as it is kept on record


class Request:
    """What a client sent; what could not be read of it is empty.

    ``method`` and ``target`` are as sent, ``version`` is "1.1" or "1.0", ``body`` is decoded from
    a chunked transfer coding. ``time`` is when it was read, in seconds since the epoch, by the
    server's clock; ``connection`` a number that is equal for requests that shared a connection;
    ``address`` the IP address that the client connected to, as it believes; see ``resolve()``;
    ``client_certificate`` the common name of the certificate that the client showed, or None;
    ``tunnel`` the CONNECT that opened the tunnel that it came through, or None; ``response`` the
    response as it was planned, with all its fields, None until then; ``step`` which scripted step
    gave it, if any.
    """

    body = b""
    time = 0.0
    connection = 0
    address = ""
    client_certificate: Optional[str] = None
    tunnel: Optional[Request] = None
    response: Optional[Response] = None
    step = ""
    refused = is_scripted = False
    is_own = False  # it was for a page of the server's own
    # By time.perf_counter(), as the server's clock may stand still: when the last of it came, and
    # when its response ended; and whether that was sent whole, to a client that stayed.
    heard_at = 0.0
    ended_at = math.inf
    is_delivered = False

    def __init__(self, head: _Head, base_url: str, origin: str) -> None:
        self.head = head
        self.method, self.target, self.version = head.method, head.target, head.version
        #: The URL of the server's root, and the origin that was asked for if it is another one.
        self.base_url, self.origin = base_url, origin

    def __str__(self) -> str:
        status = f" -> {self.response.status}" if self.response else ""
        return f"{self.method} {self.shown}{status}" if self.method else f"(unreadable){status}"

    def __repr__(self) -> str:
        return f"<Request {self}>"

    @property
    def headers(self) -> Headers:
        """The fields, case-insensitive, with repeats kept; Latin-1, as wsgiref has them."""
        fields: list[tuple[str, str]] = []
        headers = Headers(fields)
        fields.extend(self.head.fields)  # some Pythons would refuse what they do not send
        return headers

    @property
    def url(self) -> str:
        """The whole URL that was asked for."""
        if not self.head.path.startswith("/"):
            return self.origins[0] if self.target else ""
        return f"{self.origins[0]}{self.head.path}{self.head.has_query}{self.head.query}"

    @functools.cached_property
    def origins(self) -> list[str]:
        """Those that an address may have: that of the URL, and "" for the server itself.

        The URL has what the target says, or the tunnel, or the Host field.
        """
        named = _origin(self.base_url.partition(":")[0], self.head.values.get("host", ""))
        asked = self.origin or self.head.origin or named or self.base_url
        return [asked] if self.origin else [asked, ""]

    @property
    def path(self) -> str:
        """The path of the URL, percent-decoded."""
        return _unquote(self.head.path)

    @property
    def query(self) -> dict[str, list[str]]:
        """The query of the URL, as ``urllib.parse.parse_qs`` reads it."""
        return urllib.parse.parse_qs(self.head.query)

    @property
    def shown(self) -> str:
        """The target, or the whole URL if another host was asked."""
        if self.origin and self.method != "CONNECT":
            return _readable(self.url)
        return _readable(_as_utf_8(self.target, "surrogateescape"))

    @property
    def host(self) -> str:
        """The name of the other host that was asked, without its port; empty for the server."""
        return _host_and_port(self.origin)[0]

    def json(self) -> Any:
        """The body, read as JSON; raises ValueError if it is none."""
        try:
            return json.loads(self.body)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{self}: the body {self.body!r:.80} is no JSON: {error}") from None


#: What ``respond()`` takes as a step: a fixture's name, a status code, bytes, a Response, or a
#: callable that takes the Request and returns one of these, or None to pass.
Step = Union[str, int, bytes, Response, Callable[[Request], Any]]


# The bytes on the wire

# As RFC 9110 calls them, which not every Python does.
_PHRASES = {**http.client.responses, 413: "Content Too Large", 414: "URI Too Long"}
_PHRASES.update({416: "Range Not Satisfiable", 422: "Unprocessable Content"})


class _Pause(float):
    """So many seconds to wait, in which the clock of Rate stands still."""


#: What happens to a response on its way: bytes, pauses, times, the stream's next item, the fault.
_Event = Union[bytes, memoryview, float, str, _Stream]


def _timeline(plan: _Plan, stream: Optional[_Stream] = None) -> Iterator[_Event]:
    """What happens to a response, in order: delay, status line and fields, body, fault.

    Bytes are sent, and a _Pause is waited for. Another number is the time of what comes next, in
    seconds from the first of these, without pauses. The stream is asked for its next item, and a
    str is the fault that ends the connection.
    """
    content, rate, chunked = plan.content, plan.response.rate, plan.response.chunked
    # At a rate, a block takes a tenth of a second, unless that is less than a byte. There are a
    # thousand chunks in it at most, which are made in a millisecond.
    paced = max(1, rate // 10) if rate else _BLOCK
    most = min(_BLOCK, paced, chunked * 1000 if chunked else _BLOCK)
    # What is left of the block; None at the end of the body.
    block: Optional[memoryview] = memoryview(content if isinstance(content, bytes) else b"")
    position, begin, size = 0, 0, len(content)  # the latter two of what comes in chunks
    for place, event in _events(plan):
        while block is not None and position < place:
            part = block[: int(min(most, place - position))]
            if part:
                if rate:
                    yield (position + len(part)) / rate
                yield _in_chunks(part, position - begin, chunked, size) if chunked else part
                block, position = block[len(part) :], position + len(part)
            elif stream and isinstance(content, _Items):
                yield stream
                block, begin, size = stream.item, position, len(stream.item or b"")
            else:
                block = None
        if event and (position >= place or not isinstance(event, _Pause)):
            yield event


def _events(plan: _Plan) -> list[tuple[float, Union[_Pause, bytes, str]]]:
    """What happens to a response beside its body, in order, each with its place.

    What is empty does not happen.
    """
    response, size = plan.response, _size(plan.content) or 0
    events: list[tuple[float, Union[_Pause, bytes, str]]]
    events = [(-1, _Pause(response.delay)), (0, plan.head)]
    for pause in response.pause:
        seconds, _, place = pause.partition(" at ")
        if place == "headers" or len(plan.content):  # else no other place is reached
            events.append((_place(place, size), _Pause(seconds)))
    events.sort(key=lambda event: event[0])
    events.append((math.inf, b"0\r\n\r\n" if response.chunked else b""))
    end, fault = _fault_place(response, size), (response.fault or "").partition(" ")[0]
    return [*(event for event in events if event[0] <= end), (end, fault)]


def _fault_place(response: Response, size: int = 0) -> float:
    """Where the fault ends a response whose content has that size; infinity if there is none."""
    place = "end" if response.fault is None else response.fault.partition(" at ")[2] or "start"
    return _place(place, size)


def _place(text: str, size: int) -> float:
    """A place in a content of that size, in bytes; -1 is before the status line."""
    if text.endswith("%"):
        return size * int(text[:-1]) // 100
    named = {"start": -1, "headers": 0, "end": math.inf}
    return named[text] if text in named else int(text)


def _has_status_line(response: Response) -> bool:
    return _fault_place(response) >= 0


def _in_chunks(block: memoryview, position: int, size: int, whole: int) -> bytes:
    """A block of what is cut into chunks, with what belongs between its bytes (RFC 9112 7.1)."""
    parts: list[Union[bytes, memoryview]] = []
    # The first chunk may have begun before the block.
    for start in range(-(position % size), len(block), size):
        end = min(start + size, whole - position)
        parts += [b"%x\r\n" % (end - start)] if start >= 0 else []
        parts.append(block[max(0, start) : end])
        parts += [b"\r\n"] if end <= len(block) else []
    return b"".join(parts)


def _reason(response: Response) -> str:
    return _PHRASES.get(response.status, "") if response.reason is None else response.reason


def _response_head(response: Response) -> bytes:
    """The status line and the field lines; text goes out as UTF-8, other bytes as they were."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in response.headers])
    head = f"HTTP/1.1 {response.status} {_reason(response)}\r\n{lines}\r\n"
    return head.encode("utf-8", "surrogateescape")


# The audit: what a client did wrong, as the feed's owner would see it


class Finding(str):
    """What a client did wrong, in a sentence: which request, what was sent, and what was due.

    ``rule`` is the name of the rule that was broken, ``request`` the Request that broke it.
    """

    rule: str
    request: Request


def audit(requests: Iterable[Request], *, every: Optional[float] = None) -> list[Finding]:
    """What the client that sent these requests did wrong, in their order.

    The rules are those by which the owners of feeds judge readers:

        no-validator     it asked again without the validators that it had
        wrong-etag       it sent an If-None-Match that is not the last ETag
        wrong-date       it sent an If-Modified-Since that is not the last Last-Modified
        too-early        it asked again before Retry-After or max-age had passed; the Retry-After
                         of a 429 counts for the whole origin
        too-often        with ``every`` only: it asked again sooner than so many seconds later
        repeated         it asked the same again while the response was on its way
        burst            it had more than six requests to one origin in flight at once
        moved            it asked for the old URL again after a 301 or 308
        gone             it asked again after a 410
        no-user-agent    it sent no User-Agent
        no-compression   it does not accept gzip
        no-feed-type     its Accept names no type of feeds
        referer, cookie  it sent a Referer, or a cookie that no response had set
        leaked-credentials
                         it sent the Authorization or a Cookie of one origin to another one that
                         a redirect had led it to

    Each GET is judged by what the client could know: the responses that had come whole before it
    asked. A burst and leaked credentials are found with any method. Time is that of
    ``request.time``; what was in flight is by real time. Requests that were refused are not
    audited. Raises ValueError if ``every`` is no positive number.
    """
    client = _Client(_checked_every(every))
    for request in sorted(requests, key=lambda request: request.heard_at):
        client.ask(request)
    client.catch_up(math.inf)
    return [client.found[place] for place in sorted(client.found)]


# The audit: what an exchange is

#: The validators that responses give: the conditions that send them back, the sections on these,
#: and which values are well-formed; blanks occur in an ETag, though they may not.
_VALIDATORS: dict[str, tuple[str, str, Callable[[str], object]]] = {
    "ETag": ("If-None-Match", "RFC 9110 13.1.2", functools.partial(re.fullmatch, '(?:W/)?"[^"]*"')),
    "Last-Modified": ("If-Modified-Since", "RFC 9110 13.1.3", email.utils.parsedate_tz),
}
#: "Authorization" and its value, or "Cookie" and a pair of name and value.
_Credential = tuple[str, str]
_REDIRECTS = (301, 302, 303, 307, 308)
#: Methods that change nothing, besides GET and HEAD (RFC 9110 9.2.1, 4918, 3253, 5323).
_SAFE = ("OPTIONS", "PROPFIND", "REPORT", "SEARCH", "TRACE")
#: How long these are fresh says nothing: they ask for another request at once, some for the same.
_ASK_AGAIN = (408, 421, 425)
_ASK_FOR_MORE = (*_REDIRECTS, *_ASK_AGAIN, 206, 401, 406, 407, 412, 416)
#: Request fields that choose between representations which a client may keep side by side; not so
#: Accept-Encoding and User-Agent, which most responses vary with.
_CHOOSING = {"accept", "accept-language", "authorization", "cookie"}


class _Exchange:
    """A request and its response: what can be read from them, and what was known before."""

    # How many GETs of its URL there were, with this one, and which response had asked for it.
    gets = 0
    expected_by: Optional[_Exchange] = None
    # Known later: an earlier one like it that was on its way, and came whole; and whether this one
    # has come whole, to a client that waited for it.
    repeats: Optional[_Exchange] = None
    is_whole = False

    def __init__(self, request: Request, response: Response, client: _Client) -> None:
        self.request, self.response, self.status = request, response, response.status
        self.client, self.number = client, next(client.numbers)
        self.is_get, self.sent = request.method == "GET", request.head.values
        self.known = client.urls[_comparable(request.url)]
        self.origin = client.origin(request.origins[0])
        self.validators = {name: _spellings(response, name) for name in _VALIDATORS}
        self.directives, self.varies = response.members("cache-control"), response.members("vary")
        self.credentials = self.find_credentials()
        #: Where a redirect leads to, and the target; empty, and None, for other responses.
        self.location = self.find_location() if self.status in _REDIRECTS else ""
        self.leads_to = client.urls[_comparable(self.location)] if self.location else None
        self.is_cut, self.leaks = self.looks_cut(), self.find_leaks()

    # The request

    def said(self, name: str) -> str:
        """The beginning of a sentence: what was sent in a field, if anything."""
        value = self.sent.get(name.lower())
        return f"no {name} was sent" if value is None else f"{name} was {_legible(value)}"

    def sends_back(self, name: str) -> list[str]:
        """What it sends back of a validator: the value of the condition, and its list's members."""
        value = self.sent.get(_VALIDATORS[name][0].lower())
        # Commas separate entity tags, and may be inside of one.
        members = re.findall('(?:[^",]|"[^"]*")+', value or "") if name == "ETag" else []
        return [] if value is None else [value, *(member.strip(" \t") for member in members)]

    def find_credentials(self) -> list[_Credential]:
        """The fields and values that tell who it is from: Authorization, and each cookie."""
        value = self.sent.get("authorization")
        found = [("Authorization", value)] if value else []
        if "cookie" in self.sent:  # $Version and the like are none (RFC 2965)
            pairs = _cookies("; ".join(self.request.headers.get_all("Cookie")))
            found += [("Cookie", pair) for pair in pairs if pair[0] != "$"]
        return found

    def find_leaks(self) -> dict[_Credential, _Origin]:
        """The credentials in it that belong to an origin that redirected here, and to which.

        The two may share them: a cookie that is for both, or what this origin has asked for.
        """
        leaks: dict[_Credential, _Origin] = {}
        here, source = self.origin, self.known.led_from
        for field, value in self.credentials if source else ():
            domains = self.client.cookies.get(value, ())
            owner = self.known.carried.get((field, value))
            if source and owner is None and _covers(domains, source.host):
                owner = source
            if owner is None or owner is here or (field, value) in here.credentials:
                continue
            if field == "Cookie":
                is_shared = _covers([owner.host, *domains], here.host)
            else:  # from http to https, it is the same site
                is_secured = here.name.startswith("https:") and owner.name.startswith("http:")
                is_shared = here.asks or (is_secured and owner.host == here.host)
            if not is_shared:
                leaks[field, value] = owner
        return leaks

    # The response

    def find_location(self) -> str:
        """The URL in Location; empty where no client can follow."""
        location = self.response.value("location") or ""
        as_text = _as_utf_8(location, "surrogateescape")
        with contextlib.suppress(ValueError):  # from urljoin(), or there is no host in it
            url = urllib.parse.urljoin(self.request.url, as_text)
            if location and _parted(url)[0]:
                return url
        return ""

    def looks_cut(self) -> bool:
        """Whether the response ends too early, or clients may read it in one of several ways."""
        response, content = self.response, self.response.coded()
        size = _size(content)
        whole = math.inf if response.chunked or size is None else size
        ends_early = _fault_place(response, size or 0) < whole
        head = self.request.head
        has_length = not (
            response.chunked or head.method == "HEAD" or _has_no_content(head, response)
        )
        length = _number(response.value("content-length") or "") or 0
        return ends_early or (has_length and length > (size or 0)) or response.asis

    def media_type(self) -> str:
        """The type of what the URL is known to have, or may have by its name."""
        given = self.response.value("content-type") if 200 <= self.status < 300 else None
        known = (given or "").partition(";")[0].strip(" \t").lower() or self.known.media_type
        return known or _media_type(self.request.head.path)

    def confirmed(self, name: str) -> tuple[str, ...]:
        """What a 304 confirms of a validator that was given before the record began."""
        if self.response.confirms:
            return _spellings(self.response.confirms, name)
        # A 304 of the test's own confirms what was sent.
        sent = (value for value in self.sends_back(name) if value != "*")
        return self.validators[name] or tuple(sent)

    def retry_after(self) -> Optional[tuple[float, str]]:
        """Until when it asks to wait, and in which words, if it does (RFC 9110 10.2.3)."""
        if self.status not in (429, 503):
            return None
        value = self.response.value("retry-after") or ""
        end, seconds = _seconds(value), _number(value)
        if seconds is not None:  # clients may count from Date, which has no fractions
            end = math.floor(self.request.time) + seconds
        return None if end is None else (end, f"Retry-After was {_legible(value)}")

    def freshness(self) -> Optional[tuple[float, str]]:
        """Until when it is fresh, and by which words, if it tells (RFC 9111 4.2)."""
        # Also no-cache with the names of fields, which clients may read as without (5.2.2.4).
        is_stale = any(each.startswith(("no-cache", "no-store")) for each in self.directives)
        max_ages = [each[8:] for each in self.directives if each.startswith("max-age=")]
        name, value = "Expires", self.response.value("expires")
        if max_ages:
            name, value = "Cache-Control", ", ".join(_given(self.response.headers, "cache-control"))
        if not value or is_stale or self.status in _ASK_FOR_MORE or "*" in self.varies:
            return None
        came, date = self.request.time, _seconds(self.response.value("date") or "")
        date = came if date is None else date
        lifetime = (_seconds(value) or 0) - date  # what is no date has passed (5.3)
        if max_ages:  # the least of several (4.2.1)
            lifetime = min(_number(max_age.strip('"')) or 0 for max_age in max_ages)
        # A 304 changes only the fields that it carries (3.2): an Age before it may still hold.
        age = _number([*(self.response.confirms or self.response).members("age"), "0"][0]) or 0
        said = f"{name} was {_legible(value)}" + (f" and Age was {age}" if age else "")
        return came + lifetime - max(age, came - date), said


@functools.lru_cache(maxsize=1024)
def _comparable(url: str) -> str:
    """A URL in the one form that is compared (RFC 3986 6.2), by whatever name of this machine."""
    with contextlib.suppress(ValueError):  # there is no host in it
        origin, path = _parted(url)
        host, port = _host_and_port(origin)
        if host in _LOOPBACK:
            origin = f"{origin.partition(':')[0]}://localhost:{port}"
        return f"{origin}/{_unquote(path.partition('#')[0].removeprefix('/'))}"
    return url


@functools.lru_cache(maxsize=1024)
def _given(fields: _Fields, name: str) -> list[str]:
    """The values of a response field, by its name in lower case, as clients may read them."""
    return [_as_sent(text) for field, text in fields if field.lower() == name]


def _spellings(response: Response, name: str) -> tuple[str, ...]:
    """The values of a validator; clients may read one that is given twice as a list."""
    values = [value for value in _given(response.headers, name.lower()) if value]
    return (*values, ", ".join(values)) if values else ()


def _cookies(value: str) -> list[str]:
    """The pairs of a Cookie field, without quotes, as some clients drop them (RFC 6265 4.1.1)."""
    pairs = ([part.strip().strip('"') for part in pair.split("=", 1)] for pair in value.split(";"))
    return [pair for pair in ("=".join(parts).strip("=") for parts in pairs) if pair]


def _covers(domains: Iterable[str], host: str) -> bool:
    """Whether a cookie of these hosts, or of domains such as ".example.com", is for a host."""
    return any(f".{host}".endswith(each) if each[0] == "." else host == each for each in domains)


def _as_utf_8(value: str, errors: str = "backslashreplace") -> str:
    """A target or a field's value, which is in Latin-1, as it was most likely meant."""
    return value.encode("latin-1").decode("utf-8", errors)


def _legible(value: str) -> str:
    """What a sentence shows of a field's value."""
    return _as_utf_8(value)[:200] or "blank"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


# The audit: what the client knows

_PAGE = "text/html"


class _Origin:
    """What the client knows of one origin: a scheme, a host and a port."""

    def __init__(self, name: str) -> None:
        self.name, self.host = name, _host_and_port(name)[0]
        #: The last 429 that said when to come back (RFC 6585 4).
        self.too_many: Optional[_Exchange] = None
        #: What is in flight; and since nothing was, the request that was too many, and the GETs by
        #: what is equal for those that are the same.
        self.in_flight: set[_Exchange] = set()
        self.seventh: Optional[_Exchange] = None
        self.alike: dict[object, list[_Judged]] = collections.defaultdict(list)
        #: What the client has sent it of its own accord, and whether it has asked for a password.
        self.credentials: set[_Credential] = set()
        self.asks = False


class _Validator:
    """The ETag or the Last-Modified of one URL, and what the client may send back of it."""

    def __init__(self) -> None:
        #: The values in the last 200, or in a 304 since.
        self.last: tuple[str, ...] = ()
        #: Those given since without a copy, as by HEAD or with half a body; and those of other
        #: URLs, from or to which redirects have led.
        self.others: dict[str, None] = {}
        self.from_redirects: set[str] = set()
        #: All that were ever given.
        self.ever_given: set[str] = set()

    def may_be_sent(self) -> set[str]:
        return {*self.last, *self.others, *self.from_redirects}


class _Known:
    """What the client knows of one URL."""

    def __init__(self) -> None:
        self.gets = 0
        #: The last response that came whole, the last with a word on when to ask again, and the
        #: last 200 or 304; the number of the last GET that met an error, or did not come whole.
        self.last: Optional[_Exchange] = None
        self.waiting: Optional[_Exchange] = None
        self.copy: Optional[_Exchange] = None
        self.failed = 0
        #: The type of what the client keeps, and those of all bodies that this URL ever gave.
        self.media_type = ""
        self.media_types: set[str] = set()
        self.validators = {name: _Validator() for name in _VALIDATORS}
        self.must_validate = False
        #: A 301, 308 or 410 that still holds; the number of the first that led to the same URL.
        self.permanent: Optional[_Exchange] = None
        self.since = 0
        #: The URLs whose redirects lead here just now.
        self.sources: set[_Known] = set()
        #: The origin of the last of them, and the credentials that were sent there, or to those
        #: before it in a chain, with the origins that they were for.
        self.led_from: Optional[_Origin] = None
        self.carried: dict[_Credential, _Origin] = {}
        #: By the URLs that gave them: responses that ask for one request here at once.
        self.expected: dict[_Known, _Exchange] = {}

    def is_other_variant(self, get: _Exchange) -> bool:
        """Whether the last response was to a request for another representation (RFC 9111 4.1)."""
        return any(
            before.sent.get(name) != get.sent.get(name)
            for before in filter(None, (self.copy, self.last))
            for name in _CHOOSING.intersection(before.varies)
        )

    def expecting(self, get: _Exchange) -> Optional[_Exchange]:
        """The response that has asked for this request, if any; each asks for one.

        The very same request again is only what a redirect asks for, or one of _ASK_AGAIN.
        """
        for response in self.expected.values():
            asks_again = response.leads_to or response.status in _ASK_AGAIN
            if asks_again or response.sent != get.sent:
                return response
        return None

    def leads_nowhere(self, redirect: _Exchange) -> bool:
        """Whether a client that follows the redirect meets an error, or goes round in circles."""
        passed: set[_Known] = set()
        last: Optional[_Exchange] = redirect
        while last and last.leads_to:
            target = last.leads_to
            worked = target.copy.number if target.copy else 0
            # It has failed after this redirect, and not worked since the first of its kind.
            if target in passed or (target.failed > redirect.number and worked < self.since):
                return True
            passed.add(target)
            last = target.last
        return False

    def expect(self, redirect: _Exchange) -> None:
        """Expect one request, as a redirect leads here, and note whose credentials came with it."""
        self.expected[redirect.known] = redirect
        if not redirect.request.is_delivered:
            return
        self.led_from = redirect.origin
        sent = set(redirect.credentials).difference(redirect.leaks)
        self.carried = {**dict.fromkeys(sent, redirect.origin), **redirect.known.carried}

    def hear(self, exchange: _Exchange) -> None:
        """Note what the head of a response to a GET or HEAD tells."""
        target, before = exchange.leads_to, {self, *self.sources}
        for name, validator in self.validators.items():
            if exchange.status < 400:
                validator.others.update(dict.fromkeys(exchange.validators[name]))
                validator.ever_given.update(exchange.validators[name])
            if target:
                target.validators[name].from_redirects.update(validator.may_be_sent())
        if target:
            self.sources = set()
            target.sources |= before
        if exchange.is_get and exchange.status >= 400:
            self.failed = exchange.number

    def forget(self, exchange: _Exchange) -> None:
        """Forget what a request that changed something has made invalid (RFC 9111 4.4)."""
        self.permanent, self.must_validate = None, False
        if self.waiting and not self.waiting.retry_after():
            self.waiting = None
        self.allow(exchange)

    def allow(self, exchange: _Exchange) -> None:
        """Let the client send validators back that it need not have taken."""
        for name, validator in self.validators.items():
            validator.others.update(dict.fromkeys(exchange.validators[name]))

    def learn(self, exchange: _Exchange) -> None:
        """Learn from the response to a GET, which has ended."""
        status, leads_to, asked_for = exchange.status, exchange.leads_to, exchange.expected_by
        if not exchange.is_whole:  # it was cut, or the client has left
            self.failed = max(self.failed, exchange.number)
            return
        self.last = exchange
        self.expected = {url: one for url, one in self.expected.items() if one is not asked_for}
        if status in _ASK_FOR_MORE and not leads_to:
            self.expected[self] = exchange
        if status < 400 or exchange.retry_after() or exchange.freshness():
            self.waiting = exchange
        if status < 400 or status == 410:
            if not self.permanent or self.permanent.leads_to is not leads_to:
                self.since = exchange.number
            is_permanent = status == 410 or (status in (301, 308) and leads_to)
            self.permanent = exchange if is_permanent else None
        if status in (200, 304):
            self.replace(exchange)

    def replace(self, exchange: _Exchange) -> None:
        """Take the validators of a 200, or those that a 304 carries (RFC 9111 4.3.4)."""
        is_new, media_type = exchange.status == 200, exchange.media_type()
        if is_new:
            self.media_types.add(media_type)
        if self.copy and exchange.number < self.copy.number:  # a later one has overtaken it
            self.allow(exchange)
            return
        # A page instead of a feed, of which the client may keep its copy.
        is_page = media_type == _PAGE and self.media_type not in ("", _PAGE)
        is_stored = "no-store" not in exchange.directives
        for name, values in exchange.validators.items():
            if is_new or values:
                validator, self.must_validate = self.validators[name], is_stored and not is_page
                if is_page:
                    validator.others.update(dict.fromkeys(validator.last))
                else:
                    validator.others, validator.from_redirects = {}, set()
                validator.last = values
        if not is_page:
            self.media_type = media_type
        self.copy = exchange
        for source in self.sources:
            for name, validator in source.validators.items():
                validator.from_redirects = set(self.validators[name].last)
            # A new copy has replaced the source's own.
            source.must_validate = source.must_validate and not is_new
        self.sources = set()


class _Client:
    """The client, as it goes from one request to the next and learns from the responses."""

    def __init__(self, every: Optional[float]) -> None:
        #: Seconds after which a URL may be asked for again, if anybody has said so.
        self.every = every
        self.urls: dict[str, _Known] = collections.defaultdict(_Known)
        self.origin = functools.lru_cache(maxsize=None)(_Origin)  # one of each name
        #: Each cookie that was set, with the hosts that it is for; ".a.example" and below.
        self.cookies: dict[str, set[str]] = {}
        self.numbers = itertools.count(1)
        #: What is wrong with the requests so far, by their numbers and those of the rules.
        self.found: dict[tuple[int, int], Finding] = {}
        #: A heap of the exchanges that were judged, by when they end, until they are learned from.
        self.ended: list[tuple[float, int, _Judged]] = []

    def ask(self, request: Request) -> None:
        """Judge the next request, whose response the client knows later on."""
        self.catch_up(request.heard_at)
        if request.response is None or request.refused or request.method == "CONNECT":
            return
        exchange = _Judged(request, request.response, self)
        known, origin = exchange.known, exchange.origin
        origin.in_flight.add(exchange)
        # More than browsers have; of those on one connection, one counts.
        if not origin.seventh and len({each.request.connection for each in origin.in_flight}) > 6:
            origin.seventh = exchange
        if exchange.is_get:
            known.gets += 1
            exchange.gets, exchange.expected_by = known.gets, known.expecting(exchange)
            origin.alike[known, request.head.fields].append(exchange)
            if exchange.status == 304 and not known.copy:
                for name, validator in known.validators.items():
                    validator.last = exchange.confirmed(name)
        self.judge(exchange, _POLITENESS if exchange.is_get else ("burst", "leaked-credentials"))
        self.note_credentials(exchange)
        if request.method in ("GET", "HEAD"):
            known.hear(exchange)
        elif request.method not in _SAFE and exchange.status < 400:
            known.forget(exchange)
        # When a client leaves is not seen at once, so its last second is not held against it.
        has_left = not request.is_delivered and request.ended_at != math.inf
        ended_at = max(request.heard_at, request.ended_at - 1) if has_left else request.ended_at
        exchange.is_whole = request.is_delivered and not exchange.is_cut
        heapq.heappush(self.ended, (ended_at, exchange.number, exchange))

    def catch_up(self, now: float) -> None:
        """Learn from what has ended by now, and judge what was asked for twice meanwhile."""
        while self.ended and self.ended[0][0] <= now:
            exchange = heapq.heappop(self.ended)[2]
            origin, target = exchange.origin, exchange.leads_to
            if target and _has_status_line(exchange.response):
                target.expect(exchange)
            if exchange.is_whole and exchange.status == 429 and exchange.retry_after():
                origin.too_many = exchange
            if exchange.is_get:
                if exchange.is_whole:
                    self.judge_repeats(exchange)
                exchange.known.learn(exchange)
            origin.in_flight.discard(exchange)
            if not origin.in_flight:
                origin.seventh = None
                origin.alike.clear()

    def judge_repeats(self, before: _Exchange) -> None:
        """Judge those that were the same as one that has come whole, and asked meanwhile."""
        alike = before.origin.alike[before.known, before.request.head.fields]
        while alike and alike[-1].number > before.number:
            later = alike.pop()
            is_pipelined = later.request.connection == before.request.connection
            is_in_time = later.request.heard_at < before.request.ended_at
            if is_in_time and not (is_pipelined or later.expected_by):
                later.repeats = before
                self.judge(later, ["repeated"])

    def judge(self, exchange: _Judged, rules: Iterable[str]) -> None:
        """Judge a request by these rules."""
        request = exchange.request
        for place, (rule, find) in enumerate(_POLITENESS.items()):
            wrong = next(find(exchange), None) if rule in rules else None
            if wrong is not None:
                which = f" ({_ordinal(exchange.gets)} request)" if exchange.is_get else ""
                finding = Finding(f"{request.method} {request.shown}{which}: {wrong}")
                finding.rule, finding.request = rule, request
                self.found[exchange.number, place] = finding

    def note_credentials(self, exchange: _Exchange) -> None:
        """Note whose the credentials in it are, and those that the response sets or asks for."""
        origin = exchange.origin
        origin.asks = origin.asks or exchange.status == 401
        origin.credentials.update(set(exchange.credentials).difference(exchange.leaks))
        for value in _given(exchange.response.headers, "set-cookie"):
            pair, _, attributes = value.partition(";")
            found = re.search(r"(?i)(?:\A|;)\s*domain\s*=\s*\.?([^\s;]+)", attributes)
            domain = f".{found.group(1).lower()}" if found else origin.host
            for cookie in _cookies(pair):
                host = domain if _covers([domain], origin.host) else origin.host
                self.cookies.setdefault(cookie, set()).add(host)


# The audit: the rules

#: Types that compression does little for.
_MEDIA = "(?:audio|font|image|video)/.*"
#: Types that no feed is served as, and those and the wildcards that an Accept for feeds may name.
_NO_FEED = f"{_MEDIA}|text/(?:css|javascript|plain)|{_PAGE}"
_FEED = r".*(?:atom|json|opml|rdf|rss|xml).*|(?:\*|application|text)/\*|\*"


class _Judged(_Exchange):
    """A request, and the rules: a method for each, which yields what is wrong with the request.

    What it yields first counts. The sentence names the section that defines the field or the
    status. Owners of feeds may ask for more: if Accept or Accept-Encoding is missing, RFC 9110 12.5
    allows anything.
    """

    def no_validator(self) -> Iterator[str]:
        known, sent = self.known, self.sent
        sends_one = "if-none-match" in sent or "if-modified-since" in sent
        asks_for_rest = "range" in sent and "if-range" in sent  # RFC 9110 13.1.5
        others = [each for source in known.sources for each in source.validators.values()]
        # It comes for another URL, of which it has no copy.
        is_lost = bool(others) and not any(each.may_be_sent() for each in others)
        is_excused = sends_one or asks_for_rest or is_lost or known.is_other_variant(self)
        if is_excused or not known.must_validate:
            return
        for name, (_, section, is_well_formed) in _VALIDATORS.items():
            for value in filter(is_well_formed, known.validators[name].last):
                last = f"the last {name} given was {_legible(value)} ({section})"
                yield f"neither If-None-Match nor If-Modified-Since was sent, but {last}"

    def wrong_etag(self) -> Iterator[str]:
        return self._wrong_validator("ETag")

    def wrong_date(self) -> Iterator[str]:
        return self._wrong_validator("Last-Modified")

    def _wrong_validator(self, name: str) -> Iterator[str]:
        known, validator, sent = self.known, self.known.validators[name], self.sends_back(name)
        # An error at first does not tell what the client had before the record began, and what is
        # sent to a redirect is meant for its target: so a 304 can come through it.
        if not sent or self.status in _REDIRECTS or (self.status >= 400 and known.copy is None):
            return
        may_be_sent = validator.may_be_sent()
        if known.is_other_variant(self):
            may_be_sent |= validator.ever_given
        # Byte for byte, and W/ as well, which is more than RFC 9110 8.8.3.2 asks for.
        if may_be_sent.isdisjoint(sent):
            given = f"no {name} was given" + (" with the last 200" if known.media_types else "")
            if last := validator.last or (*validator.others,):
                given = f"the last {name} given was {_legible(last[-1])}"
            condition, section, _ = _VALIDATORS[name]
            yield f"{self.said(condition)}, but {given} ({section})"

    def too_early(self) -> Iterator[str]:
        last, limit, now = self.known.waiting, self.origin.too_many, self.request.time
        waits = []
        if last:
            fresh = None if self.known.is_other_variant(self) else last.freshness()
            waits = [(last, last.retry_after(), "RFC 9110 10.2.3"), (last, fresh, "RFC 9111 4.2")]
        # Within a second, it may have asked for both URLs at once.
        if limit and not (last and last.number >= limit.number) and now >= limit.request.time + 1:
            waits.append((limit, limit.retry_after(), "RFC 6585 4"))
        for before, wait, source in waits:
            if wait and before.request.time <= now < wait[0]:  # else the clock was set back
                passed, left = math.floor(now - before.request.time), math.ceil(wait[0] - now)
                asked = f"again after {passed} s"
                if before is not last:
                    asked = f"{passed} s after the 429 to {before.request.shown:.200}"
                yield f"asked {asked}, {left} s too early, as {wait[1]} ({source})"

    def too_often(self) -> Iterator[str]:
        every, last = self.client.every, self.known.last
        if every and last and not (self.expected_by or self.known.is_other_variant(self)):
            passed = self.request.time - last.request.time
            if 0 <= passed < every:
                interval = f"{every}".removesuffix(".0")
                yield f"asked again after {math.floor(passed)} s; once in {interval} s is enough"

    def repeated(self) -> Iterator[str]:
        if self.repeats:
            before = f"the response to the {_ordinal(self.repeats.gets)} was on its way"
            yield f"asked the same again while {before}, and it came whole"

    def burst(self) -> Iterator[str]:
        if self.origin.seventh is self:
            which = f"this was the seventh request in flight at once to {self.origin.name}"
            yield f"{which}; six are enough (RFC 9112 9.4)"

    def moved(self) -> Iterator[str]:
        redirect, known = self.known.permanent, self.known
        if redirect and redirect.leads_to and not (known.sources or known.leads_nowhere(redirect)):
            section = {301: "15.4.2", 308: "15.4.9"}[redirect.status]
            where = f"{_quote(redirect.location):.200} (RFC 9110 {section})"
            yield f"asked for the old URL again, but a {redirect.status} had moved it to {where}"

    def gone(self) -> Iterator[str]:
        if self.known.permanent and self.known.permanent.status == 410:
            yield "asked again, but a 410 had said that it is gone for good (RFC 9110 15.5.11)"

    def no_user_agent(self) -> Iterator[str]:
        if not self.sent.get("user-agent"):
            right = "it should name the program and its version"
            yield f"{self.said('User-Agent')}; {right} (RFC 9110 10.1.5)"

    def no_compression(self) -> Iterator[str]:
        accepted = _accepted(self.sent.get("accept-encoding", ""))
        is_accepted = accepted.get("gzip", accepted.get("x-gzip", accepted.get("*")))
        if not (is_accepted or "range" in self.sent or re.fullmatch(_MEDIA, self.media_type())):
            yield f"{self.said('Accept-Encoding')}; it should list gzip (RFC 9110 12.5.3)"

    def no_feed_type(self) -> Iterator[str]:
        accepted = _accepted(self.sent.get("accept", ""))
        if any(is_so and re.fullmatch(_FEED, name) for name, is_so in accepted.items()):
            return
        asks_for_page = accepted.get(_PAGE) and _PAGE in self.known.media_types
        # By its name it is a feed, whatever it is served as.
        is_feed = re.fullmatch(_FEED, _media_type(self.request.head.path))
        is_other = re.fullmatch(_NO_FEED, self.media_type()) and not is_feed
        if not (asks_for_page or is_other):
            right = "it should name application/atom+xml, application/rss+xml or another feed type"
            yield f"{self.said('Accept')}; {right} (RFC 9110 12.5.1)"

    def referer(self) -> Iterator[str]:
        if "referer" in self.sent:
            yield f"{self.said('Referer')}, but no link was followed (RFC 9110 10.1.3)"

    def cookie(self) -> Iterator[str]:
        sent = [pair for field, pair in self.credentials if field == "Cookie"]
        # Which origin may have which is not checked.
        unknown = [pair for pair in sent if pair not in self.client.cookies]
        if unknown:
            was = f"Cookie was {_legible('; '.join(self.request.headers.get_all('Cookie')))}"
            yield f"{was}, but no response had set {_legible('; '.join(unknown))} (RFC 6265 5.4)"

    def leaked_credentials(self) -> Iterator[str]:
        for (field, value), owner in self.leaks.items():
            name = _legible(value.partition("=")[0])
            what = field if field == "Authorization" else f"the cookie {name}"
            led = f"sent to {self.origin.name}, to which a redirect had led"
            yield f"{what} of {owner.name} was {led} (RFC 9110 15.4)"


#: The rules by their names, in the order of the methods.
_POLITENESS: dict[str, Callable[[_Judged], Iterator[str]]] = {
    name.replace("_", "-"): rule for name, rule in vars(_Judged).items() if name[0] != "_"
}


@functools.lru_cache(maxsize=256)
def _accepted(value: str) -> dict[str, bool]:
    """The members of an Accept field, and whether they are accepted (RFC 9110 12.4.2)."""
    is_refused = re.compile(r";[ \t]*q[ \t]*=[ \t]*0(?:\.0*)?[ \t]*(?:;|\Z)").search
    members = _members(value)
    return {member.partition(";")[0].strip(" \t"): not is_refused(member) for member in members}


# The audit: as it is told to a person


def _judgement(client: str, findings: Sequence[Finding]) -> str:
    """What a person reads of the findings: rule by rule, the first five of each."""
    lines = [f"{client} was not polite:" if findings else f"{client} was polite"]
    for rule in _POLITENESS:
        broken = [f"  {finding} [{rule}]" for finding in findings if finding.rule == rule]
        lines += broken[:5]
        if len(broken) > 5:
            lines.append(f"  and {len(broken) - 5} more [{rule}]")
    return "\n".join(lines)


def _checked_every(every: object) -> Optional[float]:
    """The interval, or None; raises ValueError if it is no positive number."""
    is_number = isinstance(every, (int, float)) and not isinstance(every, bool)
    if every is None or (is_number and 0 < every < math.inf):  # type: ignore[operator]
        return every  # type: ignore[return-value]
    raise ValueError(f"every: found {every!r:.80}; it takes a positive number of seconds")


def _rules_to_ignore(names: Iterable[str]) -> set[str]:
    """The names as a set; raises ValueError unless they are a sequence of the names of rules."""
    with contextlib.suppress(TypeError):  # for an object that cannot be in a set, or is none
        if not isinstance(names, str) and _POLITENESS.keys() >= (ignored := set(names)):
            return ignored
    rules = ", ".join(map(repr, _POLITENESS))
    raise ValueError(f"ignore: found {names!r:.80}; it takes a sequence of the rules {rules}")


# TLS, which any connection and any tunnel may begin with


class _Tls:
    """The server's end of TLS, between the bytes that come in and those that go out.

    ``outer`` is the TLS that this one runs inside of, if any, as clients may use TLS to a proxy;
    ``sent`` is what the client has sent so far.
    """

    def __init__(self, context: ssl.SSLContext, outer: Optional[_Tls], sent: bytes) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(sent)
        self._end = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._outer = outer
        #: Handshake complete; close_notify received.
        self.established, self.ended = False, False

    def open(self, data: bytes) -> bytes:
        """Decrypt what the client has sent; raises ssl.SSLError if it is wrong."""
        self._incoming.write(self._outer.open(data) if self._outer else data)
        opened = bytearray()
        with contextlib.suppress(ssl.SSLWantReadError):
            if not self.established:
                self._end.do_handshake()
                self.established = True
            while plain := self._end.read(65536):
                opened += plain
            self.ended = True
        if self._outer and self._outer.ended:
            self.ended = True
        return bytes(opened)

    def seal(self, data: Union[bytes, memoryview] = b"") -> bytes:
        """Encrypt data for the client; the messages of TLS itself go with it."""
        while data:
            data = data[self._end.write(data) :]
        sealed = self._outgoing.read()
        return self._outer.seal(sealed) if self._outer else sealed

    def client_name(self) -> Optional[str]:
        """The common name of the client's certificate, if it has shown one."""
        subject: Any = (self._end.getpeercert() or {}).get("subject", ())
        pairs = itertools.chain(*subject)
        return next((value for name, value in pairs if name == "commonName"), None)

    def close(self) -> bytes:
        """The close_notify that ends the data (RFC 8446 6.1)."""
        with contextlib.suppress(ssl.SSLError):  # it would wait for the client's close_notify
            self._end.unwrap()
        sealed = self.seal()
        return sealed + self._outer.close() if self._outer else sealed


#: What a server sends after its certificate: its key or signature, or that it is done; of a resumed
#: session, which has none, only the last.
_AFTER_CERTIFICATE = (12, 14, 15, 20)
#: The first byte of a TLS handshake; no request can begin with it.
_HANDSHAKE = 22
#: More than any client sends in its first message, in bytes.
_MAX_HELLO = 32 * 1024


def _client_hello(sent: Union[bytes, bytearray]) -> Optional[bytes]:
    """The first message of a handshake (RFC 8446 4 and 5.1); None while it is incomplete.

    Anything else is returned as far as it goes: OpenSSL has the words to refuse it.
    """
    message, records = b"", io.BytesIO(sent)
    while header := records.read(3):  # the type of a record, and a version
        message += _vector(records, 2)
        length = 4 + int.from_bytes(message[1:4], "big")
        is_right = header[0] == _HANDSHAKE and message[:1] in (b"", b"\x01")
        if len(message) >= length or length > _MAX_HELLO or not is_right:
            return message
    return message if len(sent) > _MAX_HELLO else None


def _server_name(hello: bytes) -> str:
    """The host that a ClientHello names, "" if that is none (RFC 8446 4.1.2, RFC 6066 3).

    ``ssl`` has a callback for this, but for a name that is not ASCII it prints to stderr instead.
    """
    stream = io.BytesIO(hello)
    stream.read(4 + 2 + 32)  # the message's type and length, the version, the random
    for size in (1, 2, 1):  # the session's id, the cipher suites, the compression methods
        _vector(stream, size)
    extensions = io.BytesIO(_vector(stream, 2))
    while kind := extensions.read(2):
        content = _vector(extensions, 2)
        if kind == b"\x00\x00":
            name = content[5:].decode("latin-1")  # after two lengths and the type of the name
            return name if re.fullmatch("[A-Za-z0-9._-]{1,253}", name) else ""
    return ""


def _vector(stream: io.BytesIO, size: int) -> bytes:
    """What follows its own length, which is a number of that many bytes (RFC 8446 3.4)."""
    return stream.read(int.from_bytes(stream.read(size), "big"))


# Certificates: a throwaway CA, in Python integers and DER (RFC 5280, RFC 5480, SEC 1). It is for
# tests only: nothing in it is constant-time, so the time that a signature takes tells about the
# key. The keys are thrown away with the process.

_ONE_DAY = 24 * 60 * 60  # in seconds
_LIFETIME = 397 * _ONE_DAY  # browsers take no certificate of more than 398 days
#: When a certificate begins to be valid, if not yesterday, in seconds from now.
_BEGINNINGS = {"expired": -_ONE_DAY - _LIFETIME, "not-yet-valid": _ONE_DAY}
#: Whose key signs a certificate, if not the CA's. Nobody gets the intermediate CA's certificate.
_ISSUERS = {"self-signed": "server", "incomplete-chain": "intermediate CA"}

# The curve P-256, y**2 = x**3 - 3*x + b: the prime of its field, its base point and the order of
# that (SEC 2, 2.4.2, where it is called secp256r1).
_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
_BASE_X = 0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296
_BASE_Y = 0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

# Object identifiers in DER (X.690 8.19).
_EC_PUBLIC_KEY = bytes.fromhex("06072a8648ce3d0201")  # 1.2.840.10045.2.1 (RFC 5480 2.1.1)
_PRIME256V1 = bytes.fromhex("06082a8648ce3d030107")  # 1.2.840.10045.3.1.7 (RFC 5480 2.1.1)
#: How certificates are signed: ecdsa-with-SHA256, 1.2.840.10045.4.3.2 (RFC 5758 3.2).
_ALGORITHM = bytes.fromhex("300a06082a8648ce3d040302")
_COMMON_NAME = bytes.fromhex("0603550403")  # 2.5.4.3 (RFC 5280 A.1)
_TRUE = b"\x01\x01\xff"


@functools.lru_cache(maxsize=256)
def _server_context(host: str, kind: str, client_certificates: str = "none") -> ssl.SSLContext:
    """The TLS of a server of that name or address, with a certificate of that kind."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    if client_certificates != "none":
        context.verify_mode = ssl.VerifyMode[f"CERT_{client_certificates.upper()}"]
        context.load_verify_locations(cadata=_ca_certificate())
    path = _temporary_file(_key_and_certificate(host, kind), "key.pem")
    try:
        context.load_cert_chain(path)
    finally:
        os.unlink(path)
    return context


def _key_and_certificate(name: str, kind: str) -> str:
    """What a server or a client shows that it is ``name``, in PEM; see _certificate()."""
    return _key("server").pem() + _certificate(name, kind)


@functools.cache
def _ca_certificate() -> str:
    """The certificate of the one CA of this process, in PEM."""
    return _certificate("", "CA")


def _key(owner: str) -> _Key:
    """The key of the "CA", of the "intermediate CA" or, as making one takes time, of all others."""
    # If two threads make one at once, both get the one that is done first.
    return _key_pairs.get(owner) or _key_pairs.setdefault(owner, _Key(owner))


class _Key:
    """A key pair on P-256, and a name of its own for its owner."""

    #: Held while a certificate is made.
    lock = threading.Lock()

    def __init__(self, owner: str) -> None:
        self.secret = _random_below(_ORDER)
        x, y = _times_base(self.secret)
        #: The public key (SEC 1, 2.3.3), and the identifier that is made of it (RFC 7093 2).
        self.point = b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big")
        self.identifier = hashlib.sha256(self.point).digest()[:20]
        self.name = f"feedtestserver {owner} {self.identifier.hex()[:16]}"

    def pem(self) -> str:
        """The private key, as a file has it (SEC 1, C.4; RFC 7468)."""
        secret = _octet_string(self.secret.to_bytes(32, "big"))
        public = _der(0xA1, _bit_string(self.point))  # GnuTLS asks for it
        der = _sequence(_integer(1), secret, _der(0xA0, _PRIME256V1), public)
        return ssl.DER_cert_to_PEM_cert(der).replace("CERTIFICATE-----", "EC PRIVATE KEY-----")

    def sign(self, message: bytes) -> bytes:
        """An ECDSA signature with SHA-256, in DER (SEC 1, 4.1.3; RFC 3279 2.2.3)."""
        digest = int.from_bytes(hashlib.sha256(message).digest(), "big")
        nonce = _random_below(_ORDER)
        r = _times_base(nonce)[0] % _ORDER
        s = (digest + r * self.secret) * pow(nonce, -1, _ORDER) % _ORDER
        return _sequence(_integer(r), _integer(s))


_key_pairs: dict[str, _Key] = {}


def _times_base(scalar: int) -> tuple[int, int]:
    """The base point of P-256 that many times, once at least and less often than its order.

    Doubling and adding, in coordinates (x/z**2, y/z**3), which need no division until the end. The
    base is added to an even multiple of itself, so never to itself, and never to its opposite, as
    the sum is no multiple of the order: either would take another formula.
    """
    x, y, z = _BASE_X, _BASE_Y, 1
    for bit in f"{scalar:b}"[1:]:
        slope, square = 3 * (x - z * z) * (x + z * z) % _P, y * y % _P
        middle = 4 * x * square % _P
        x, z = (slope * slope - 2 * middle) % _P, 2 * y * z % _P
        y = (slope * (middle - x) - 8 * square * square) % _P
        if bit == "1":
            width, height = (_BASE_X * z * z - x) % _P, (_BASE_Y * z * z * z - y) % _P
            square = width * width % _P
            cube, middle = width * square % _P, x * square % _P
            x, z = (height * height - cube - 2 * middle) % _P, width * z % _P
            y = (height * (middle - x) - y * cube) % _P
    inverse = pow(z, -1, _P)
    return x * inverse**2 % _P, y * inverse**3 % _P


def _random_below(limit: int) -> int:
    """A number from 1 that cannot be guessed; with 64 bits to spare none is likelier by much."""
    return int.from_bytes(os.urandom(32 + 8), "big") % (limit - 1) + 1


@functools.lru_cache(maxsize=256)
def _certificate(name: str, kind: str) -> str:
    """A certificate in PEM (RFC 5280 4.1).

    It is for a server of that name, of a kind of FeedTestServer.certificate; for a "client" of that
    name; or for the "CA".
    """
    key, issuer = _key("CA" if kind == "CA" else "server"), _key(_ISSUERS.get(kind, "CA"))
    name = "wrong-host.invalid" if kind == "wrong-host" else name
    # A common name has up to 64 characters (RFC 5280 A.1).
    subject = _distinguished_name(name if 0 < len(name) <= 64 else key.name)
    begin = _system_time() + _BEGINNINGS.get(kind, -_ONE_DAY)
    content = _sequence(
        _der(0xA0, _integer(2)),  # version 3
        _integer(_random_below(2**127)),
        _ALGORITHM,
        subject if issuer is key else _distinguished_name(issuer.name),
        _sequence(_time_of(begin), _time_of(begin + _LIFETIME)),
        subject,
        _sequence(_sequence(_EC_PUBLIC_KEY, _PRIME256V1), _bit_string(key.point)),
        _der(0xA3, _sequence(*_extensions(name, kind, key, issuer))),
    )
    signature = _bit_string(issuer.sign(content))
    return ssl.DER_cert_to_PEM_cert(_sequence(content, _ALGORITHM, signature))


def _distinguished_name(common_name: str) -> bytes:
    """A distinguished name (RFC 5280 4.1.2.4); the host is named in a subjectAltName."""
    pair = _sequence(_COMMON_NAME, _der(0x0C, common_name.encode()))  # UTF8String
    return _sequence(_der(0x31, pair))  # SET


def _extensions(name: str, kind: str, key: _Key, issuer: _Key) -> Iterator[bytes]:
    """The extensions of a certificate (RFC 5280 4.2.1), by their names there."""
    yield _extension(14, _octet_string(key.identifier))  # subjectKeyIdentifier
    yield _extension(35, _sequence(_der(0x80, issuer.identifier)))  # authorityKeyIdentifier
    # Those that restrict what the key is for are critical: basicConstraints and keyUsage.
    if kind == "CA":
        yield _extension(19, _sequence(_TRUE, _integer(0)), _TRUE)  # it may sign no other CA
        yield _extension(15, b"\x03\x02\x02\x04", _TRUE)  # keyCertSign, the sixth bit
        return
    yield _extension(19, _sequence(), _TRUE)  # no CA
    yield _extension(15, b"\x03\x02\x07\x80", _TRUE)  # digitalSignature, the first bit
    # extKeyUsage: id-kp-clientAuth, 1.3.6.1.5.5.7.3.2, or id-kp-serverAuth, 1.3.6.1.5.5.7.3.1
    purpose = "2" if kind == "client" else "1"
    yield _extension(37, _sequence(bytes.fromhex(f"06082b0601050507030{purpose}")))
    if kind not in ("client", "no-san"):
        host = _der(0x82, name.encode("ascii"))
        if address := _ip_address(name):
            host = _der(0x87, socket.inet_pton(_INTERNET[":" in address], address))
        yield _extension(17, _sequence(host))  # subjectAltName


def _extension(number: int, value: bytes, critical: bytes = b"") -> bytes:
    """The extension whose object identifier is 2.5.29 and this number."""
    return _sequence(b"\x06\x03\x55\x1d" + bytes([number]), critical, _octet_string(value))


def _time_of(seconds: float) -> bytes:
    """A point in time: in two digits of its year until 2049 (RFC 5280 4.1.2.5)."""
    text = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(seconds)).encode()
    return _der(0x17, text[2:]) if text < b"2050" else _der(0x18, text)


def _system_time() -> float:
    """Seconds since the epoch by the clock that the clients' TLS uses.

    It is that of a new file: a test may have replaced time.time(), but OpenSSL does not use that.
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


_sequence = functools.partial(_der, 0x30)
_octet_string = functools.partial(_der, 4)
_bit_string = functools.partial(_der, 3, b"\0")  # all bits of its last byte are used (X.690 8.6)


def _integer(number: int) -> bytes:
    """A number from 0; its first bit is its sign (X.690 8.3)."""
    return _der(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _temporary_file(text: str, name: str) -> str:
    """The path of a new file that only its owner can read (mode 0600)."""
    descriptor, path = tempfile.mkstemp(f"-{name}", "feedtestserver-")
    try:
        with open(descriptor, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
    except BaseException:
        os.unlink(path)
        raise
    return path


# Any host: every host name leads to the server, in this process and its children

#: Those that have begun, the innermost last; and what puts back the functions they replace.
_interceptions: list[_Interception] = []
_replaced = contextlib.ExitStack()

_Function = Callable[..., Any]
#: The addresses that a look-up finds.
_Found = tuple[str, ...]
#: Environment variables; None for those that are not set.
_Variables = Mapping[str, Optional[str]]
#: What look-ups find for hosts that refuse connections, or never respond.
_REFUSED, _SILENT = "127.254.0.1", "127.254.0.2"
_ANSWERS: dict[str, _Found] = {"unknown": (), "refused": (_REFUSED,), "silent": (_SILENT,)}
#: What socket.socket is a subclass of: its own methods are not replaced.
_Socket: Any = socket.SocketType


class _OtherHosts:
    """The hosts that a server stands in for: what look-ups find, and where connections lead."""

    #: Also held while an interception begins or ends.
    lock = threading.RLock()

    def __init__(self) -> None:
        #: Where the server is, from intercept() on.
        self.address = "", 0
        #: By host or pattern: the answers, and how often each host was looked up.
        self._answers: dict[str, tuple[list[_Found], collections.Counter[str]]] = {}
        #: All addresses that were ever answers, as clients remember them; the ports of look-ups.
        self._addresses: set[str] = set()
        self._ports: set[int] = set()
        #: By a client's port: the address and the port that it believes to be connected to, and
        #: whether that connection was accepted.
        self._clients: dict[int, tuple[tuple[str, int], bool]] = {}
        self._dead_ends: list[Any] = []

    @property
    def are_here(self) -> bool:
        """Whether this is inside of an interception by this server."""
        return bool(_interceptions) and any(each.hosts is self for each in _interceptions)

    # What look-ups find

    def resolve(self, host: str, answers: Sequence[Union[str, Sequence[str]]]) -> None:
        """See FeedTestServer.resolve()."""
        name = _host_name(host).removesuffix(".") if isinstance(host, str) else ""
        if not (re.fullmatch(r"[a-z0-9*_-]+(?:\.[a-z0-9*_-]+)*", name) and _is_elsewhere(name)):
            right = "the name of a host, without a port, such as 'a.example' or '*.example'"
            raise ValueError(f"resolve(): found the host {host!r:.80}; it takes {right}")
        if not answers:
            raise ValueError(f"resolve({host!r:.80}) needs at least one answer")
        found = [_answer(answer) for answer in answers]
        with self.lock:
            self._answers.pop(name, None)  # of two patterns the one given last comes last
            self._answers[name] = found, collections.Counter()
            self._addresses.update(*found)

    def clear(self) -> None:
        """Forget the answers."""
        with self.lock:
            self._answers.clear()

    def look_up(self, host: Any) -> Optional[_Found]:
        """The addresses of a host, none if it is unknown; None if resolve() says nothing of it."""
        name = _host_name(host).removesuffix(".")
        with self.lock:
            fitting = [each for each in self._answers if _glob(each)(name)]
            if not fitting:
                return None
            answers, taken = self._answers[name if name in fitting else fitting[-1]]
            taken[name] += 1
            return answers[min(taken[name], len(answers)) - 1]

    # Inside of intercept(), these are called instead of the functions of the same name, each with
    # the original as its first argument.

    def getaddrinfo(self, original: _Function, host: Any, port: Any, *args: int, **how: int) -> Any:
        """Find the server, or what resolve() says, for each name but localhost."""
        how.update(zip(("family", "type", "proto", "flags"), args))
        flags = how.pop("flags", 0)
        if flags & socket.AI_NUMERICHOST or not _is_elsewhere(host):
            return original(host, port, **how, flags=flags)
        if flags & socket.AI_PASSIVE:  # an address to listen at
            return original(self.address[0], port, **how)
        is_number = isinstance(port, (int, str)) and f"{port}".isdecimal()
        self._ports |= {int(port)} if port and is_number else {80, 443}
        addresses = self.look_up(host)
        if addresses is None:
            return original(*self.address, **how)
        found = []
        for address in addresses:
            with contextlib.suppress(socket.gaierror):  # another family is asked for
                found += original(address, port, **how)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found

    def gethostbyname(self, original: _Function, host: Any) -> Any:
        return _addresses(host)[0] if _is_elsewhere(host) else original(host)

    def gethostbyname_ex(self, original: _Function, host: Any) -> Any:
        return (host, [], _addresses(host)) if _is_elsewhere(host) else original(host)

    def gethostbyaddr(self, original: _Function, host: Any) -> Any:
        if _may_be_looked_up(host):
            raise socket.herror(1, "Unknown host")
        return self.gethostbyname_ex(original, host)

    def getnameinfo(self, original: _Function, address: Any, flags: int) -> Any:
        is_asked = _may_be_looked_up(address[0])
        return original(address, flags | socket.NI_NUMERICHOST if is_asked else flags)

    def connect(self, original: _Function, owner: Any, *arguments: Any) -> Any:
        """Connect or send to where the address, the last argument, leads."""
        connection = owner if isinstance(owner, socket.socket) else arguments[0]
        if arguments and _is_internet(connection, arguments[-1]):
            arguments = (*arguments[:-1], self._destination(connection, arguments[-1]))
        return original(owner, *arguments)

    connect_ex = sendto = sendmsg = connect

    def bind(self, original: _Function, connection: socket.socket, address: Any) -> Any:
        if _is_internet(connection, address) and _is_elsewhere(address[0]):
            address = (self.address[0], *address[1:])
        return original(connection, address)

    def getpeername(self, original: _Function, connection: socket.socket) -> Any:
        """The address that the client believes it is connected to."""
        peer = original(connection)
        if not self._is_here(connection.family, peer):
            return peer
        with self.lock:
            believed, _ = self._clients.get(_Socket.getsockname(connection)[1], (peer[:2], True))
        return (*believed, *peer[2:])

    def wrap_socket(self, original: _Function, own: Any, *args: Any, **how: Any) -> Any:
        """Begin TLS; to the server, trust its CA."""
        sock, is_server, name = args
        is_known = True
        try:
            is_here = self._is_here(sock.family, _Socket.getpeername(sock))
        except OSError:  # not connected yet
            is_here, is_known = not name or _is_elsewhere(name), False
        if is_server or not is_here:
            return original(own, *args, **how)
        return self._begin_tls(is_known, original, own, args, how)

    def wrap_bio(self, original: _Function, own: Any, *ends: Any, **how: Any) -> Any:
        """Begin TLS where nothing tells whether it is to the server."""
        if how.get("server_side"):
            return original(own, *ends, **how)
        return self._begin_tls(False, original, own, ends, how)

    def _begin_tls(self, is_known: bool, original: _Function, own: Any, args: Any, how: Any) -> Any:
        """Begin TLS by the client's own context, but verify the server by another one.

        That trusts the CA and, unless it is known to be this server, the CAs of the client's own.
        """
        trusted = [] if is_known else own.get_ca_certs(binary_form=True)
        pem = "".join(map(ssl.DER_cert_to_PEM_cert, trusted))
        trusting = _trusting(own, pem + _ca_certificate())
        if sys.implementation.name == "pypy":
            # Elsewhere, the callback comes with the context. Later on it changes nothing.
            own._msg_callback = trusting._msg_callback
        tls = original(own, *args, **how)
        tls.context = trusting
        return tls

    # Where connections lead

    def _destination(self, connection: socket.socket, address: tuple[Any, ...]) -> tuple[Any, ...]:
        """The address at which what a client connects to really is; raises socket.gaierror."""
        host, port, *rest = address
        if _is_elsewhere(host):  # connect() looks names up itself
            host, port = socket.getaddrinfo(host, port, connection.family)[0][4][:2]
        numeric = _ip_address(_host_name(host))
        if numeric in (_REFUSED, _SILENT):
            return _at(connection, self._dead_end(numeric), rest)
        if not (numeric and self._is_meant(connection, numeric, port)):
            return (host, port, *rest)
        real = _at(connection, self.address, rest)
        if connection.type == socket.SOCK_STREAM:
            with contextlib.suppress(OSError):  # it has a port already
                _Socket.bind(connection, (real[0], 0))
            with self.lock:
                self._clients[_Socket.getsockname(connection)[1]] = (numeric, port), False
        return real

    def _is_meant(self, connection: socket.socket, address: str, port: int) -> bool:
        """Whether the server is meant by an IP address and a port.

        It is by what resolve() gave, unless a service on this machine listens there; and by its own
        address at ports that were looked up with a name, as some clients take only the address
        from what getaddrinfo() finds.
        """
        if (address, port) == self.address:
            return True
        if address != self.address[0] and address not in self._addresses:
            return False
        with contextlib.closing(_Socket(connection.family, socket.SOCK_STREAM)) as probe:
            try:
                probe.bind((address, 0))
            except OSError:  # it is none of this machine
                return True
        is_told = address != self.address[0] or port in self._ports
        is_stream = connection.type == socket.SOCK_STREAM
        return is_told and is_stream and not _is_served(connection.family, address, port)

    def _is_here(self, family: int, peer: Any) -> bool:
        """Whether the peer of a connection is the server."""
        if family not in _INTERNET:
            return False
        host, port = peer[0].removeprefix("::ffff:"), peer[1]
        is_local = host == self.address[0] or re.match(r"127\.|::1\Z", host)
        return port == self.address[1] and bool(is_local)

    def _dead_end(self, address: str) -> Any:
        """Where, on this machine, connections are refused or never established."""
        with self.lock:
            if not self.are_here:  # what would be opened here is closed already
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            self._dead_ends = self._dead_ends or _dead_ends()
            return self._dead_ends[address == _REFUSED].getsockname()

    def close(self) -> None:
        """Forget what clients did, and end attempts at connections that are never established."""
        _trusting.cache_clear()
        with self.lock:
            self._ports.clear()
            while self._dead_ends:
                self._dead_ends.pop().close()

    def accepted(self, port: int) -> Optional[str]:
        """The address that a client of this process, newly connected from a port, has looked up."""
        with self.lock:
            address, was_accepted = self._clients.pop(port, (None, True))
            if address is None or was_accepted:  # of an earlier connection from that port
                return None
            self._clients[port] = address, True
            return address[0]


def _answer(given: Union[str, Sequence[str]]) -> _Found:
    """The addresses of an answer of resolve(), in the form that is compared."""
    if isinstance(given, str) and given in _ANSWERS:
        return _ANSWERS[given]
    found = tuple(map(_ip_address, given if isinstance(given, (list, tuple)) else [given]))
    if not (found and all(found)):
        right = f"an IP address, a list of them, or one of {', '.join(map(repr, _ANSWERS))}"
        raise ValueError(f"resolve(): found the answer {given!r:.80}; it takes {right}")
    return found


def _may_be_looked_up(host: Any) -> bool:
    """Whether that is an IP address whose name this machine may not know by itself."""
    return _ip_address(_host_name(host)) not in ("", *_LOOPBACK)


def _is_elsewhere(host: Any) -> bool:
    """Whether a host is a name that could lead to the network: neither localhost nor an address."""
    name = _host_name(host)
    with contextlib.suppress(OSError, ValueError):
        socket.inet_aton(name)  # also 127.1, as connect() and getaddrinfo() read it
        return False
    return name not in ("", "localhost") and not _ip_address(name.partition("%")[0])


class _Interception:
    """What makes every host lead to a server, until ``end()``; the innermost one comes first."""

    def __init__(self, hosts: _OtherHosts, variables: _Variables) -> None:
        self.hosts = hosts
        with hosts.lock:
            if not _interceptions:
                _replace_functions()
            #: The environment, and the opener of urllib, that it has replaced.
            self.found = _swap(variables, None) if variables else None
            _interceptions.append(self)

    def end(self) -> None:
        """Put back what was found; one inside of this that has replaced it as well keeps it."""
        with self.hosts.lock:
            position = _interceptions.index(self)
            del _interceptions[position]
            inner = next((each for each in _interceptions[position:] if each.found), None)
            if self.found and inner:
                inner.found = self.found
            elif self.found:
                _swap(*self.found)
            if not _interceptions:
                _replaced.close()


def _replace_functions() -> None:
    """Have each of these functions call the methods of the interceptions."""
    owners: list[tuple[Any, str]] = [
        (socket, "getaddrinfo gethostbyname gethostbyname_ex gethostbyaddr getnameinfo"),
        (socket.socket, "connect connect_ex sendto sendmsg bind getpeername"),
        # Private, but in all Pythons, and called by all that begins TLS; after wrap_socket()
        # itself the handshake would be over.
        (ssl.SSLContext, "_wrap_socket _wrap_bio"),
    ]
    if os.name == "nt":  # asyncio connects by a function of its own there
        proactor: Any = importlib.import_module("asyncio.windows_events")
        owners.append((proactor.IocpProactor, "connect"))
    for owner, names in owners:
        for name in names.split():
            if hasattr(owner, name):  # Windows has no sendmsg()
                _replace(owner, name)


def _replace(owner: Any, name: str) -> None:
    """Have one function call the method of the innermost interception, until none is left.

    What that leaves alone, it hands to the method of the next one out.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        call = original
        for interception in _interceptions[:]:
            call = functools.partial(getattr(interception.hosts, name.lstrip("_")), call)
        return call(*args, **kwargs)

    if name in vars(owner):
        _replaced.callback(setattr, owner, name, original)
    else:  # the class inherits it
        _replaced.callback(delattr, owner, name)
    setattr(owner, name, function)


def _variables(proxy: str, ca_file: str, wgetrc: str) -> _Variables:
    """The environment variables that lead clients to a proxy, and none that lead away."""
    names_of: dict[Optional[str], str] = {
        proxy: "http_proxy https_proxy HTTP_PROXY HTTPS_PROXY",
        ca_file: "SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NODE_EXTRA_CA_CERTS",
        wgetrc: "WGETRC",
        "localhost,127.0.0.1,::1": "no_proxy NO_PROXY",
        "1": "NODE_USE_ENV_PROXY",  # else Node ignores the others
        None: "all_proxy ALL_PROXY",
    }
    return {name: value for value, names in names_of.items() for name in names.split()}


def _swap(variables: _Variables, opener: Any) -> tuple[_Variables, Any]:
    """Set environment variables, and the opener of urllib; returns what was there.

    With an opener of None, urllib makes a new one, with the proxies of then.
    """
    import urllib.request

    found = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    found_opener, urllib.request._opener = urllib.request._opener, opener  # type: ignore[attr-defined]
    return found, found_opener


def _addresses(host: Any) -> list[Any]:
    """The addresses (IPv4) of a name; raises socket.gaierror if it has none."""
    found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    return [address[0] for *_, address in found]


def _at(connection: socket.socket, real: tuple[str, int], rest: Any) -> tuple[Any, ...]:
    """An address as a socket of its family takes it, with what else stands in another one."""
    host, port = real
    if connection.family == socket.AF_INET and ":" in host:
        host = "127.0.0.1"  # a server at :: is there as well
    elif connection.family == socket.AF_INET6 and ":" not in host:
        host = f"::ffff:{host}"
        with contextlib.suppress(OSError):  # it has a port already
            connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return (host, port, *rest)


def _is_internet(connection: socket.socket, address: Any) -> bool:
    """Whether an address, as methods of sockets take it, is one of a host and a port."""
    is_pair = isinstance(address, tuple) and len(address) > 1 and isinstance(address[1], int)
    return connection.family in _INTERNET and is_pair


def _is_served(family: int, address: str, port: int) -> bool:
    """Whether a service on this machine listens at an address that it has."""
    with contextlib.closing(_Socket(family, socket.SOCK_STREAM)) as probe:
        if sys.platform.startswith("linux"):
            # There bind() tells it, so that the service sees no connection but its client's.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                return False
            except PermissionError:  # for a port below 1024
                pass
            except OSError:
                return True
        probe.settimeout(0.1)
        return not probe.connect_ex((address, port))


def _dead_ends() -> list[Any]:
    """Sockets; those to the first are never established, those to the second are refused."""
    listener, *clients = (_Socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(9))
    backlog = 1
    if os.name == "nt":
        with contextlib.suppress(OSError):  # Wine does not have it
            # SO_CONDITIONAL_ACCEPT: connections wait until they are accepted.
            listener.setsockopt(socket.SOL_SOCKET, 0x3002, 1)
            backlog = socket.SOMAXCONN
    listener.bind(("127.0.0.1", 0))
    listener.listen(backlog)
    for client in clients:  # once the backlog is full, the system ignores others
        client.bind(("127.0.0.1", 0))  # else a connection to this port may get it itself
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
    return [listener, *clients]


@functools.lru_cache(maxsize=64)
def _trusting(own: Any, certificates: str) -> Any:
    """A context that trusts these certificates, in PEM.

    It replaces the client's own after a TLS object was made from that: whether and how to verify
    stays as it was, and only whom to trust is new. The CA could not be removed from the client's
    own context again. Once the server is verified, the client's own is back, as that has the
    client's certificate.
    """
    context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=certificates)
    level = getattr(own, "security_level", None)  # from Python 3.10
    ciphers = [each["name"] for each in own.get_ciphers()]
    context.set_ciphers(":".join(ciphers if level is None else [*ciphers, f"@SECLEVEL={level}"]))

    def go_on(tls: Any, direction: str, version: int, kind: int, message: int, data: bytes) -> None:
        is_verified = kind == _HANDSHAKE and message in _AFTER_CERTIFICATE
        if direction == "read" and is_verified and tls._sslobj.context is not own:
            # OpenSSL goes on using the first one until the handshake is over, so it is kept.
            tls._trusting, tls._sslobj.context = tls._sslobj.context, own

    context._msg_callback = go_on
    return context


# The test's side: what is looked for in the record, and the mixin


class _Wanted:
    """Requests as wait_for_request() and the assertions describe them."""

    def __init__(
        self,
        site: _Site,
        path: Optional[str],
        method: Optional[str],
        headers: _WantedFields,
        body: _WantedBody,
        times: Optional[int] = None,
    ) -> None:
        if times is not None and not (isinstance(times, int) and times >= 1):
            raise _wrong("times", times, "1 or more; use assert_not_requested() for none")
        if not isinstance(headers or {}, Mapping):
            raise TypeError(f"headers: found {headers!r:.80}; it takes names mapped to values")
        self.path, self.method = "/" if path == "" else path, _checked_method(method)
        self.fields = dict(headers or {})
        for name, value in self.fields.items():
            is_name = isinstance(name, str) and _TOKEN.fullmatch(name)
            if not (is_name and isinstance(value, (str, type(None)))):
                found = f"found {value!r:.80} for {name!r:.80}"
                raise TypeError(f"headers: {found}; a name is a token, and its value a str or None")
        self.address = None if path is None else site.address(path, method)
        self.is_json = isinstance(body, (dict, list))
        try:
            body = _canonical(json.dumps(body)) if self.is_json else body
        except (RecursionError, TypeError, ValueError) as error:
            raise TypeError(f"body: found {body!r:.80}; JSON cannot say that: {error}") from None
        if not isinstance(body, (bytes, str, type(None))):
            raise TypeError(f"body: found {body!r:.80}; it takes bytes, a str, a dict or a list")
        self.body = body.encode() if isinstance(body, str) else body

    def among(self, record: Iterable[Request]) -> list[Request]:
        """The requests of a record that match."""
        return list(filter(self.matches, record))

    def matches(self, request: Request) -> bool:
        if self.address is not None and not self.address.covers(request):
            return False
        for name, value in self.fields.items():
            # A field that is not there has the value None.
            if value not in (request.headers.get_all(name) or (None,)):
                return False
        is_by_method = self.method in (None, request.method)
        return is_by_method and (self.body is None or self.body == self.body_of(request))

    def body_of(self, request: Request) -> Optional[bytes]:
        """The body in the form that is compared."""
        try:
            return _canonical(request.body).encode() if self.is_json else request.body
        except (RecursionError, ValueError):
            return None

    def check(
        self, record: list[Request], least: int, most: float = math.inf, limit: str = ""
    ) -> list[Request]:
        """Those of a record that match; AssertionError unless there are so many of them."""
        found = self.among(record)
        if not least <= len(found) <= most:
            at_least = "" if least == most else "at least "
            expected = f"expected {self} {at_least}{_times(least)}{limit}"
            was = f"it was requested {_times(len(found))}" if found else "it was not requested"
            if not most:
                expected = f"expected no {str(self).removeprefix('any ')}"
                was = f"got {len(found)}"
            shown = _transcript(record, self.fields, body=self.body is not None)
            raise AssertionError(f"{expected}; {was}\n{shown}")
        return found

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.method, self.path))) or "any request"
        fields = [
            f"without {name}" if value is None else f"with {name}: {value}"
            for name, value in self.fields.items()
        ]
        if self.body is not None:
            shown = f"JSON body {self.body.decode()}" if self.is_json else f"body {self.body!r}"
            fields.append(f"with the {shown:.200}")
        return f"{what} {' and '.join(fields)}" if fields else what


def _checked_method(method: Optional[str]) -> Optional[str]:
    """A method; raises ValueError for one that is on no request that is scripted or on record."""
    if method is None:
        return None
    if not (isinstance(method, str) and _TOKEN.fullmatch(method)):
        raise _wrong("method", method, "a token, such as 'GET' (RFC 9110 9.1)")
    if method == "QUIT":
        raise _wrong("method", method, "any other: QUIT stops the server, and is not on record")
    if method not in _METHODS and method.upper() in _METHODS:
        raise _wrong("method", method, f"{method.upper()!r}, as case matters (RFC 9110 9.1)")
    return method


def _canonical(text: Union[str, bytes]) -> str:
    """JSON in the form that is compared; a number that is whole has no decimals."""

    def read_number(digits: str) -> float:
        number = float(digits)
        return int(number) if number.is_integer() else number

    return json.dumps(json.loads(text, parse_float=read_number), sort_keys=True, allow_nan=False)


def _transcript(requests: Iterable[Request], fields: Iterable[str] = (), body: bool = False) -> str:
    """The requests that arrived, with the fields and the bodies that were asked for."""
    lines = []
    for request in requests:
        mechanics = request.response.mechanics() if request.response else []
        notes = "; ".join(filter(None, [request.step, *mechanics]))
        lines.append(f"  {request} ({notes})" if notes else f"  {request}")
        for name in fields:
            lines += [f"      {name}: {value}" for value in request.headers.get_all(name)]
        lines += [f"      {request.body!r:.200}"] if body else []
    return "\n".join(["The server got:", *lines]) if lines else "The server got no request."


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


class FeedTestServerMixin(_TestCase):
    """Gives each test of a ``unittest.TestCase`` class its own server, ``self.server``.

    Put it before TestCase among the bases. The server is stopped after the test, which fails if a
    fixture, a directive or a callable was wrong. If the class has a ``server`` already, which must
    be running, ``setUp()`` takes that one, and does not stop it.
    """

    #: The directory to serve, relative to the file that defines the test class. None is ``data`` if
    #: that exists, else no directory; "" is no directory.
    data_directory: Optional[Union[str, os.PathLike[str]]] = None
    #: The class of the server.
    server_class: type[FeedTestServer] = FeedTestServer
    #: Further keyword arguments for it.
    server_options: Mapping[str, Any] = {}
    #: Whether each test runs inside of ``self.server.intercept()``; or keyword arguments for that.
    intercept: Union[bool, Mapping[str, Any]] = False
    #: Whether a test fails if there are scripted steps that no request took.
    strict = False
    _own_server: Optional[FeedTestServer] = None

    def setUp(self) -> None:
        """Start the server, unless the class has one that its tests share."""
        super().setUp()
        if self._own_server and not self._own_server.ready:  # of an earlier run of this TestCase
            del self.server
        if self.server is not self._own_server:
            if not getattr(self.server, "ready", False):
                raise RuntimeError(f"{type(self).__name__}.server is not running: start() it first")
            self._begin()

    @functools.cached_property
    def server(self) -> FeedTestServer:
        """The server, started by setUp() or, if that was not called, on first use."""
        module = sys.modules.get(type(self).__module__)
        folder = os.path.dirname(os.path.abspath(getattr(module, "__file__", None) or "x"))
        server = self.server_class(_directory(self.data_directory, folder), **self.server_options)
        server.start()
        self.server = self._own_server = server  # known even if the rest fails
        self._begin()
        return server

    def _begin(self) -> None:
        self._contexts = contextlib.ExitStack()
        self.addCleanup(self._end)
        if self.server is self._own_server:
            self._contexts.callback(self.server.stop)
        how: Any = self.intercept
        if how or how == {}:
            if not isinstance(how, Mapping):
                how = {} if how is True else {"proxy": how}
            self._contexts.enter_context(self.server.intercept(**how))

    def _end(self) -> None:  # by its name, as _contexts is left out of a copy
        try:
            self._contexts.close()
        finally:  # where test code still runs, the failure has that as its context
            unused = self.server._site.unused(once=True) if self.strict else []
            if words := _what_failed(self.server._record.take_errors(), unused):
                self.fail(words)

    @contextlib.contextmanager
    def _failing(self, msg: Any) -> Iterator[None]:
        """Let a failed assertion of the server fail the test, with its message."""
        try:
            yield
        except AssertionError as error:
            raise self.failureException(self._formatMessage(msg, str(error))) from None

    def __getstate__(self) -> dict[str, Any]:
        """What a parallel runner sends to another process: all but the server."""
        kept_here = ("server", "_own_server", "_contexts")
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
        headers: _WantedFields = None,
        body: _WantedBody = None,
        times: Optional[int] = None,
        msg: Any = None,
    ) -> Request:
        """Fail unless ``path`` was requested; see ``FeedTestServer.assert_requested()``."""
        with self._failing(msg):
            return self.server.assert_requested(
                path, method=method, headers=headers, body=body, times=times
            )

    def assertNotRequested(
        self,
        path: Optional[str] = None,
        *,
        method: Optional[str] = None,
        headers: _WantedFields = None,
        body: _WantedBody = None,
        msg: Any = None,
    ) -> None:
        """Fail if ``path`` was requested; without it, if anything was."""
        with self._failing(msg):
            self.server.assert_not_requested(path, method=method, headers=headers, body=body)

    def assertPolite(
        self, msg: Any = None, *, ignore: Sequence[str] = (), every: Optional[float] = None
    ) -> None:
        """Fail if the client has broken a rule; see ``FeedTestServer.assert_polite()``."""
        with self._failing(msg):
            self.server.assert_polite(ignore=ignore, every=every)


# The command line


class _Server(FeedTestServer):
    """The server of the command line: prints what comes in, and shows it on a page of its own.

    Each User-Agent is taken for one client.
    """

    def __init__(self, options: Any) -> None:
        import queue  # for the command line only

        super().__init__(options.directory, host=options.bind, port=options.port, bind_timeout=0)
        self.options, self.every = options, options.every
        self.stop_timeout = 60.0  # for a page about many requests
        self._site.listing, self._record.log = self.own_page, self.note
        #: Texts and streams to print them to, in a thread: a slow reader must not delay the server.
        self.texts: queue.SimpleQueue[Optional[tuple[str, Optional[TextIO]]]] = queue.SimpleQueue()
        self.printer = threading.Thread(target=self.print_texts, daemon=True)

    def run(self) -> None:
        """Serve until told to stop."""
        url = f"{self.base_url}/"
        self.tell(url, url=url)
        super().run()

    # What is printed

    def note(self, event: object) -> None:
        """Print a request, unless the page refreshes itself; to stderr what has gone wrong."""
        if not isinstance(event, Request):
            self.tell(event, sys.stderr)
        elif not (event.is_own and event.head.query in ("refresh", "reload")):
            self.tell(event, request=_as_json(event) if self.options.json else None)

    def report(self) -> int:
        """Tell what the clients did wrong; returns how many findings and errors there were."""
        count = len(self.errors)
        for client, findings in self.clients():
            count += len(findings)
            self.tell(f"\n{_judgement(client, findings)}")
            for each in findings:
                told = {"client": client, "rule": each.rule, "text": _readable(each)}
                self.tell(finding={**told, "url": _readable(each.request.url)})
        for words in self.errors:
            self.tell(error=_readable(words))
        if self.errors:  # as text, they are on stderr already
            self.tell(f"\nerrors: {len(self.errors)}")
        return count

    def tell(self, text: object = None, stream: Optional[TextIO] = None, **as_json: object) -> None:
        """Print a text, to stdout by default; with --json an object, where there is one."""
        if self.options.json:
            text = json.dumps(as_json) if as_json else None
        if text is not None:
            self.texts.put((f"{text}", stream or sys.stdout))

    def print_texts(self) -> None:
        """Print what is told, until that is None."""
        for text in iter(self.texts.get, None):
            _say(*text)

    def finish_printing(self) -> None:
        """Wait until all is printed, or nothing is read for _PATIENCE seconds."""
        self.texts.put(None)
        before = None
        while self.printer.is_alive() and self.texts.qsize() != before:
            before = self.texts.qsize()
            self.printer.join(_PATIENCE)

    # What came in

    def judged(self) -> list[Request]:
        """The requests so far, but for those for its own pages."""
        return [request for request in self.requests if not request.is_own]

    def clients(self) -> Iterator[tuple[str, list[Finding]]]:
        """What each client calls itself, and what it did wrong.

        Digits do not tell clients apart, as some name the number of their subscribers.
        """
        sent: dict[str, list[Request]] = collections.defaultdict(list)
        for request in self.judged():
            if not request.refused:
                sent[re.sub("[0-9]+", "", _client_name(request))].append(request)
        for requests in sent.values():
            yield _client_name(requests[0]), audit(requests, every=self.every)

    # Its own pages

    def own_page(self, request: Request, folder: str) -> Optional[Response]:
        """The page of a folder without an index, and what belongs to it; else None."""
        path, request.is_own = request.path, True
        if path == "/favicon.ico":
            return Response(status=404)
        if path == "/fixtures.opml":
            return _page(self.list_of_feeds(request.origins[0]), "text/x-opml")
        if path.endswith("/") and not folder and (path == "/" or self.below(path)):
            if request.head.query == "refresh":
                return _page(self.seen(), "text/plain")
            return _page(self.index(path), "text/html")
        request.is_own = False
        return None

    def below(self, path: str) -> list[Fixture]:
        """The fixtures below a path."""
        return [each for each in self.fixtures() if each.name.startswith(path[1:])]

    def index(self, path: str) -> Iterator[str]:
        """The page: what was seen so far, and the fixtures below a path."""
        title, seen = html.escape(f"Fixtures in {path}"), html.escape(next(self.seen()))
        fixtures = "\n".join(map(self.described, self.below(path)))
        yield _INDEX_PAGE.format(title=title, seen=seen, fixtures=fixtures)

    def seen(self) -> Iterator[str]:
        """What each client did wrong, and the last requests, as text."""
        texts = [_judgement(name, findings) for name, findings in self.clients()]
        requests = self.judged()
        last = requests[:-101:-1]
        if len(last) > 1:
            texts.append(f"The last {len(last)} of {len(requests)} requests, the newest first:")
        yield "\n\n".join([*texts, _transcript(last, ["User-Agent"])])

    def described(self, fixture: Fixture) -> str:
        """A fixture with a link to it, and the response that it will give."""
        try:
            response = self.response_of(fixture)
            status = f"{response.status} {_reason(response)}"
            added = (("Date", ""), ("Server", _SERVER))
            lines = [": ".join(field) for field in response.headers if field not in added]
            lines = [response.description or "", *lines, *response.mechanics()]
        except (DirectiveError, OSError) as error:
            status, lines = "500", [str(error)]
        path = html.escape(fixture.url[len(self.base_url) :])
        text = html.escape("\n      ".join(filter(None, [status.rstrip(), *lines])))
        return f"<a href='{path}'>{html.escape(fixture.name)}</a> -> {text}"

    def response_of(self, fixture: Fixture) -> Response:
        """The response that a GET of a fixture would get; raises DirectiveError, or OSError."""
        request = Request(_Head("GET", fixture.url[len(self.base_url) :], "1.1"), self.base_url, "")
        response = self._site.following(request, fixture.name, self._site.fixture(fixture.name))
        return _plan(request, response, "", True).response

    def list_of_feeds(self, origin: str) -> Iterator[str]:
        """All feeds, to subscribe to at once (OPML 2.0)."""
        lines = ["<opml version='2.0'><head><title>Fixtures</title></head><body>"]
        for fixture in self.fixtures():
            types = [_media_type(fixture.name)]
            with contextlib.suppress(DirectiveError, OSError):  # its response is what is wrong
                types += self.response_of(fixture).members("content-type")
            has_ending = os.path.splitext(fixture.name)[1].lower() not in ("", ".asis")
            is_unknown = not has_ending and set(types) == {_ANY_TYPE}
            if is_unknown or any(re.match(_FEED_TYPE, each) for each in types):
                url = html.escape(f"{origin}{fixture.url[len(self.base_url) :]}")
                name = html.escape(fixture.name)
                lines.append(f"<outline type='rss' text='{name}' xmlUrl='{url}'/>")
        lines.append("</body></opml>\n")
        yield "\n".join(lines)


#: The types of feeds; those of pages, pictures and OPML are none.
_FEED_TYPE = r"(?!image/|[^;]*(?:html|opml))[^;]*(?:atom|json|rdf|rss|xml)"
#: Seconds that the command line waits at its end for some of its output to be read.
_PATIENCE = 5.0


def _page(texts: Iterator[str], media_type: str) -> Response:
    """A page of the server's own; it is made in a worker thread, as all bodies in parts are."""
    body = (_printable(_readable(text)).encode() for text in texts)
    return Response(body, headers={"Content-Type": f"{media_type}; charset=utf-8"})


def _client_name(request: Request) -> str:
    """What a client calls itself."""
    name = request.head.values.get("user-agent")
    return _legible(name) if name else "a client without a name"


def _as_json(request: Request) -> dict[str, object]:
    """What another program may want to know of a request, with its body as text."""
    response = request.response
    return {
        "method": request.method,
        "url": _readable(request.url),
        "headers": [[name, _as_utf_8(value)] for name, value in request.head.fields],
        "body": request.body.decode("utf-8", "backslashreplace"),
        "status": response.status if response and _has_status_line(response) else None,
        "time": request.time,
        "connection": request.connection,
    }


def _printable(text: str) -> str:
    """Text in which characters that are not printable are shown by their numbers."""

    def shown(match: re.Match[str]) -> str:
        return match[0] if match[0].isprintable() else ascii(match[0])[1:-1]

    return re.sub(r"[^ -~\n\t\xa0\u3000]", shown, text)


def _say(text: object, stream: Optional[TextIO]) -> None:
    """Print lines, whatever the stream can encode, even if nobody reads it any more.

    Characters that are not printable, and could control a terminal, are shown by their numbers.
    """
    if stream is None:  # as under pythonw
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(_printable(f"{text}\n").encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BlockingIOError:
        pass  # what is in the buffer is written the next time
    except OSError:  # nobody reads it any more; at exit, the interpreter would fail to flush it
        with contextlib.suppress(OSError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), stream.fileno())


_INDEX_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>pre {{ overflow-wrap: anywhere; white-space: pre-wrap }}</style>
<noscript><meta http-equiv="refresh" content="2; url=?reload"></noscript>
<pre id="seen">{seen}</pre>
<script>
setTimeout(async function refresh() {{
  try {{
    const response = await fetch("?refresh"), text = await response.text()
    if (response.ok && text !== seen.textContent) {{
      const page = await (await fetch("?reload")).text()
      const now = new DOMParser().parseFromString(page, "text/html").querySelectorAll("pre")
      document.querySelectorAll("pre").forEach((old, place) => old.replaceWith(now[place]))
    }}
  }} finally {{
    setTimeout(refresh, 2000)
  }}
}}, 2000)
</script>
<h2>{title}</h2>
<p>All feeds, to subscribe to at once: <a href="/fixtures.opml">fixtures.opml</a>
<pre id="fixtures">{fixtures}</pre>
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit status."""
    import argparse  # for the command line only

    def every(text: str) -> Optional[float]:
        with contextlib.suppress(ValueError):
            return _checked_every(float(text))
        right = "a positive number of seconds"
        raise argparse.ArgumentTypeError(f"found {text!r:.80}; it takes {right}")

    parser = argparse.ArgumentParser("feedtestserver", description="Serve a directory of fixtures.")
    add = parser.add_argument
    add("directory", nargs="?", default="data", help="default: %(default)s")
    add("--port", type=int, default=8000, help="default: %(default)s; 0: any")
    add("--bind", default="127.0.0.1", help="address; default: %(default)s")
    add("--ca", metavar="FILE", help="write the CA's certificate to FILE (PEM), for HTTPS")
    add("--check", action="store_true", help="read every directive, report errors")
    add("--json", action="store_true", help="print JSON, one object a line")
    add("--strict", action="store_true", help="status 1 if there were findings or errors")
    add("--every", metavar="SECONDS", type=every, help="how soon a URL may be asked for again")
    add("--record", nargs=2, metavar=("URL", "FILE"), help="keep a live feed in FILE, FILE.headers")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    try:
        if options.record:
            return _record_feed(*options.record)
        return _check(options.directory) if options.check else _serve(options)
    except (OSError, ValueError, http.client.HTTPException) as error:
        _say(f"feedtestserver: {error}", sys.stderr)
        return 1


def _serve(options: Any) -> int:
    """Serve until Ctrl-C, SIGTERM or QUIT; then say what the clients did wrong.

    The signals are only noted, as an exception raised by their handler could come at any point:
    where it is swallowed, or while a lock is being released.
    """
    noted: list[int] = []
    server = _Server(options)
    with contextlib.ExitStack() as at_end:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda number, _: noted.append(number))
            at_end.callback(signal.signal, number, before)
        server.start()
        at_end.callback(server.stop)
        if options.ca is not None:
            pathlib.Path(options.ca).write_text(_ca_certificate(), "ascii")
        server.printer.start()  # so that the file is there when the URL is told
        while server.is_alive() and not noted:
            server.join(0.1)
        server.stop()
        status = 1 if server.report() and options.strict else 0
        server.finish_printing()
        if __name__ == "__main__":
            # The interpreter takes a moment to end, waits for its output to be read, and could get
            # a signal meanwhile that nobody notes any more.
            os._exit(status)
    return status


def _check(directory: str) -> int:
    """Report everything that is wrong with the directives below a directory, by file and line."""
    _require_directory(directory)
    directory = os.path.abspath(directory)
    found = sorted(pathlib.Path(directory).rglob("*"))
    names = [path.relative_to(directory).as_posix() for path in found if path.is_file()]
    errors: list[object] = []
    for name in names:
        path = _path_of(directory, name)
        fixture = path[: -len(_SIDECAR)]
        try:
            if not _is_sidecar(name):
                errors += _read(directory, name)[0].errors
            elif not os.path.isfile(fixture):
                errors.append(f"{path}: there is no {fixture} beside it")
                errors += Directives(path, pathlib.Path(path).read_bytes(), is_sidecar=True).errors
        except OSError as error:
            errors.append(error)
    fixtures = sum(not _is_sidecar(name) for name in names)
    summary = f"fixtures: {fixtures}, errors: {len(errors)}"
    _say("\n".join(map(str, [*errors, summary])), sys.stdout)
    return 1 if errors else 0


# What a response says to one client or one connection only (RFC 9110 7.6.1, RFC 6265).
_NOT_RECORDED = (
    "authentication-info|authorization|connection|content-length|date|keep-alive|proxy-.*"
    "|set-cookie2?|status|te|trailer|transfer-encoding|upgrade"
)


def _record_feed(url: str, name: str) -> int:
    """Fetch a URL, redirects included, into a new file and its sidecar.

    They are made first, so that no request is sent if they cannot be written.
    """
    import email.errors  # for the command line only
    import urllib.request

    malformed = (
        email.errors.FirstHeaderLineIsContinuationDefect,
        email.errors.MissingHeaderBodySeparatorDefect,
    )
    origin, rest = _parted(url)
    if not origin or "@" in urllib.parse.urlsplit(url).netloc:
        raise ValueError(f"found the URL {url!r}; it takes one of http or https, without a user")
    with contextlib.ExitStack() as at_failure:
        for path in (name, name + _SIDECAR):
            open(path, "xb").close()
            at_failure.callback(os.unlink, path)
        request = urllib.request.Request(origin + _quote(rest), headers={"User-Agent": _SERVER})
        try:
            response = urllib.request.urlopen(request, timeout=60)
        except urllib.request.HTTPError as error:
            response = error
        with response:
            # If urllib did not follow a redirect, its own words, in several lines, are the reason.
            if "\n" in str(response.reason) or not response.url.startswith(("http://", "https://")):
                raise ValueError(f"{url}: {str(response.reason).splitlines()[0]}")
            if any(isinstance(each, malformed) for each in response.headers.defects):
                raise ValueError(
                    f"{url}: the head of the response is malformed: keep it in an .asis"
                )
            body = response.read()
            pathlib.Path(name + _SIDECAR).write_bytes(_recorded_lines(response))
            pathlib.Path(name).write_bytes(body)
        at_failure.pop_all()
    _say(f"{response.url}: {response.status}, {len(body)} bytes in {name}", sys.stdout)
    return 0


def _recorded_lines(response: Any) -> bytes:
    """The sidecar of a response; raises DirectiveError for what no fixture can say."""
    options = _members(",".join(response.headers.get_all("Connection", [])))
    lines = [f"Status: {response.status} {response.reason}".rstrip()]
    for name, value in response.headers.items():
        if name.lower() not in options and not re.fullmatch(_NOT_RECORDED, name.lower()):
            value = re.sub("\r?\n[ \t]+", " ", value).strip(" \t")  # what was folded
            lines.append(f"Header: {name}: {value}".rstrip(" "))
    sidecar = ("\n".join(lines) + "\n").encode("latin-1")
    Directives("the response", sidecar, is_sidecar=True).checked()
    return sidecar


if __name__ == "__main__":
    sys.exit(main())
