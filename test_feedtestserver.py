# SPDX-License-Identifier: 0BSD
"""The tests of feedtestserver: python -m unittest."""

import _thread
import array
import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import email.utils
import enum
import errno
import functools
import gc
import gzip
import hashlib
import html.parser
import http.client
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import pickle
import queue
import random
import re
import runpy
import select
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import typing
import unittest
import urllib.error
import urllib.parse
import urllib.request
import zlib
from http.server import SimpleHTTPRequestHandler
from unittest import mock
from xml.etree import ElementTree

import feedtestserver
from feedtestserver import (
    DirectiveError,
    FeedTestRequestHandler,
    FeedTestServer,
    FeedTestServerMixin,
    Request,
    Response,
    StoppableHttpServer,
    audit,
    parse_directives,
    stop_server,
)

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = (HERE / "feedtestserver.py").read_text("utf-8")
README = (HERE / "README.rst").read_text("utf-8")
TREE = ast.parse(SOURCE)
DOCSTRING = ast.get_docstring(TREE)  # python -OO has none at run time
CLOSE = {"Connection": "close"}
INFINITY = float("inf")
PATIENCE = 20  # seconds; only a broken server makes a test wait for it
NOW = 1_236_420_000.0  # 2009-03-07 10:00:00 GMT
NOW_DATE = "Sat, 07 Mar 2009 10:00:00 GMT"
#: Whether the system tells what has arrived of what was sent, so that a reset can wait for it.
TELLS_WHAT_ARRIVES = sys.platform == "darwin" or sys.platform.startswith("linux")


#: Settings for Python, clients and TLS, and those of them that the tests' interpreters need.
SETTINGS = re.compile("(?i)PYTHON.*|SSL.*|NODE.*|.*_PROXY|.*_CA_BUNDLE|.*COLOR.*")
NEEDED = {"PYTHONHOME", "PYTHONPATH", "PYTHONPLATLIBDIR", "PYTHONUTF8", "PYTHONCOERCECLOCALE"}
NEEDED |= {"PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHON_GIL"}


#: What setUpModule() has changed; twice where a test runs tests of this module.
changes = []
#: Exceptions raised in threads, which fail no test by themselves.
thread_errors = []


def setUpModule():
    """Give the tests, and all that they start, an environment without anybody's settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in NEEDED or not SETTINGS.fullmatch(name)
    }
    # Windows and macOS know of proxies without the environment, and terminals may have colours.
    kept.update(no_proxy="*", NO_COLOR="1")
    handle_error, excepthook = socketserver.BaseServer.handle_error, threading.excepthook

    def note_in_handler(server, request, client_address):
        thread_errors.append(sys.exc_info()[1])
        handle_error(server, request, client_address)

    def note_in_thread(arguments):
        if arguments.exc_type is not SystemExit:
            thread_errors.append(arguments.exc_value)
        excepthook(arguments)

    changes.append(contextlib.ExitStack())
    for change in (
        mock.patch.dict(os.environ, kept, clear=True),
        mock.patch.object(socketserver.BaseServer, "handle_error", note_in_handler),
        mock.patch.object(threading, "excepthook", note_in_thread),
    ):
        changes[-1].enter_context(change)


def tearDownModule():
    changes.pop().close()


def comment(*lines):
    """A feed with these lines in a comment."""
    return "\n".join(["<!--", *lines, "-->", "<rss/>"]).encode()


def run(*arguments, cwd=HERE):
    """Run another interpreter with these arguments to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding=sys.getfilesystemencoding(),
        errors="surrogateescape",
        timeout=60,
        check=False,
    )


#: Runs each script that it reads in a fork of itself, which has imported the module already.
RUN_SCRIPTS = """
import os, signal, sys, feedtestserver
for line in sys.stdin:
    script, sys.argv[1:], files = eval(line)
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]))
else:
    sys.exit()
signal.alarm(60)
for descriptor, path in enumerate([os.devnull, *files]):
    opened = os.open(path, os.O_RDWR)
    os.dup2(opened, descriptor)
    os.close(opened)
exec(script)
"""
#: A parent that forks has no output of its own in its buffers, which its children would print too.
#: From 3.12 on, Python warns of a fork beside threads.
SCRIPT_OPTIONS = ("-u", "-W", "ignore::DeprecationWarning", "-c")
#: On macOS, libraries of the system may crash in a fork.
SCRIPTS_MAY_BE_FORKED = hasattr(os, "fork") and sys.platform != "darwin"


@functools.cache
def script_runner():
    """The process that runs scripts; it ends with the tests of this module."""
    pipe, program = subprocess.PIPE, [sys.executable, *SCRIPT_OPTIONS, RUN_SCRIPTS]
    process = subprocess.Popen(program, cwd=HERE, stdin=pipe, stdout=pipe, text=True)
    changes[0].callback(script_runner.cache_clear)
    return changes[0].enter_context(process)


def run_script(script, *arguments):
    """Run a script, which may fork, to its end in a process that has just imported the module."""
    script, arguments = textwrap.dedent(script), [str(argument) for argument in arguments]
    if not SCRIPTS_MAY_BE_FORKED:
        return run(*SCRIPT_OPTIONS, script, *arguments)
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        runner = script_runner()
        print(ascii((script, arguments, [*map(str, files)])), file=runner.stdin, flush=True)
        status = int(runner.stdout.readline())
        output = [file.read_text(sys.getfilesystemencoding(), "surrogateescape") for file in files]
        return subprocess.CompletedProcess(arguments, status, *output)


def run_at_once(functions):
    """Call each in a thread of its own, wait for all of them, and raise what one has raised."""
    errors = []

    def call(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=[function]) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), PATIENCE)


def exchange(server, *parts):
    """Send bytes and return all that comes until the server closes."""
    with connect(server) as connection:
        for part in parts:
            connection.sendall(part)
        return read_all(connection)


def read_all(connection):
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def legible(text):
    """A text as the server sends it; a path in it may have bytes that the locale does not know."""
    return f"{text}".encode("utf-8", "backslashreplace").decode()


def shown(error):
    """An exception as a traceback shows it, with its context and its notes."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def open_descriptors():
    """How many of the first thousand descriptors are open."""
    gc.collect()
    found = 0
    for descriptor in range(1000):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            found += 1
    return found


def read_to_the_end(connection):
    """All that comes, and how it ends: FIN or RST."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        return received, "RST"
    return received, "FIN"


def close_by_reset(connection):
    """Close a connection by an RST instead of a FIN."""
    # struct linger: yes, for 0 seconds. Its members are short on Windows.
    at_once = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    connection.close()


@functools.cache
def rst():
    """How a reset is seen here: "RST", but "FIN" under Wine, which sends none."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listening.getsockname(), PATIENCE))
        connection, _ = listening.accept()
        close_by_reset(connection)
        return read_to_the_end(client)[1]


@functools.cache
def another_module():
    """The module once more, with a CA of its own."""
    spec = importlib.util.spec_from_file_location("other", HERE / "feedtestserver.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, other=module):
        spec.loader.exec_module(module)
    return module


class NoTimePasses:
    """While it is in force, servers wait for no time: it passes at once.

    ``waits`` says for how many seconds they would have waited, and ``time`` is what their clock
    shows, by which timers go. Each wait takes ``late`` seconds more than it should.
    """

    def __init__(self, test, late=0.0):
        self.late = late
        self.waits = []
        self.time = 0.0
        for change in (
            mock.patch.object(
                selectors, "DefaultSelector", self.selector(selectors.DefaultSelector)
            ),
            mock.patch.object(feedtestserver.time, "perf_counter", lambda: self.time),
        ):
            change.start()
            test.addCleanup(change.stop)

    def selector(self, base):
        clock = self

        class Selector(base):
            def select(self, timeout=None):
                if timeout is None:
                    return super().select()
                found = super().select(0)
                if not found and timeout:
                    clock.waits.append(round(timeout, 6))
                    clock.time += timeout + clock.late
                return found

        return Selector


class Holding:
    """Stands in for the waits of NoTimePasses: each one lasts until the test has looked at it."""

    def __init__(self, test):
        self.begun, self.go_on = queue.SimpleQueue(), threading.Semaphore(0)
        test.addCleanup(self.go_on.release, 1000)

    def append(self, seconds):
        self.begun.put(seconds)
        self.go_on.acquire(timeout=3 * PATIENCE)


class Produced:
    """An iterator of these items, which raises those that are exceptions and notes its calls."""

    def __init__(self, *items):
        self.items, self.asked, self.closed = iter(items), 0, threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        item = next(self.items)
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self):
        self.closed.set()


async def async_items():
    yield b"one"


class Answer:
    """One answer, parsed from the bytes by http.client."""

    def __init__(self, data, method="GET"):
        stream = io.BytesIO(data)
        response = http.client.HTTPResponse(_Stream(stream), method=method)
        response.begin()
        self.status, self.reason, self.headers = response.status, response.reason, response.headers
        self.body = response.read()
        self.rest = stream.read()


class _Stream:
    def __init__(self, stream):
        self.stream = stream

    def makefile(self, mode):
        return _Unclosed(self.stream)


class _Unclosed(io.BufferedIOBase):
    def __init__(self, stream):
        self.stream = stream

    def readable(self):
        return True

    def read(self, size=-1):
        return self.stream.read(size)

    def readline(self, size=-1):
        return self.stream.readline(size)


def ask(server, target, method="GET"):
    """The answer to a request for a target, which is sent as it stands."""
    host = f"127.0.0.1:{server.port}"
    head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    return Answer(exchange(server, head.encode("utf-8", "surrogateescape")), method)


class ServerTestCase(unittest.TestCase):
    """Makes directories and servers that go away with the test."""

    def make_directory(self, files=()):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        for name, data in dict(files).items():
            path = pathlib.Path(folder.name, name)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except (UnicodeEncodeError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EINVAL:
                    raise
                self.skipTest(f"no file is called {name!a} here")
        return pathlib.Path(os.path.realpath(folder.name))

    def serve(self, files=(), server_class=FeedTestServer, **options):
        server = server_class(self.make_directory(files), **options)
        server.clock = lambda: NOW
        self.addCleanup(self.look_for_thread_errors, len(thread_errors))
        server.start()
        self.addCleanup(server.stop)
        return server

    def assert_reset(self, seen, data):
        """Data, and then a reset, which may overtake it if nobody knows what has arrived."""
        self.assertEqual(seen[1], rst())
        if TELLS_WHAT_ARRIVES:
            self.assertEqual(seen[0], data)

    def make_link(self, path, target):
        try:
            path.symlink_to(target)
        except OSError as error:
            self.skipTest(f"no symbolic links here: {error}")
        if not path.is_symlink():  # Wine
            self.skipTest("no symbolic links here")

    def change_directory(self, folder):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)

    def look_for_thread_errors(self, known):
        self.assertEqual(thread_errors[known:], [])

    def get(self, server, path, method="GET", body=None, headers=()):
        """One request by http.client, which follows nothing; returns status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            response.content = response.read()
            return response

    def assert_silent(self, server, connection):
        """A connection is open and nothing comes, though another has been served meanwhile."""
        self.assertEqual(self.get(server, "/none").status, 404)
        timeout = connection.gettimeout()
        connection.setblocking(False)
        with self.assertRaises(BlockingIOError):
            self.fail(f"there is {connection.recv(65536)[:1000]!r}")
        connection.settimeout(timeout)


# The examples


def blocks(text):
    """The literal blocks of a text in reStructuredText, dedented."""
    found = re.findall(r"::\n\n((?:    .*\n|\n)+)", text)
    return [textwrap.dedent(block).strip("\n") + "\n" for block in found]


def readme_examples():
    """The files of each section of the README, by name; recipes are methods of its last file."""
    sections = re.split(r"\n-{3,}\n", README)
    for section in sections:
        files = {}
        for name, block in re.findall(
            r"(?:^``([\w./-]+)``)?::\n\n((?:    .*\n|\n)+)", section, re.MULTILINE
        ):
            text = textwrap.dedent(block).strip("\n") + "\n"
            if name:
                files[name] = text
            elif text.startswith("def "):
                files[list(files)[-1]] += textwrap.indent(f"\n{text}", "    ")
        yield files


def readme_directives():
    """The keys in the README's table of directives."""
    return re.findall(r"(?m)^``(\w+): [^`]*`` ", README)


def known_directives():
    """The keys that are directives, of all the words of the module."""
    known = set()
    for key in {word.capitalize() for word in re.findall("[A-Za-z]+", SOURCE)}:
        try:
            parse_directives(comment(f"{key}: a /b"))  # a wrong value of each
        except DirectiveError as error:
            if error.sentence.startswith(f"{key}: "):
                known.add(key)
    return known


class ExampleTest(ServerTestCase):
    #: What stands in for pytest, as no test needs more than Python: it runs each function with the
    #: fixture around it, which is resumed as pytest does it, without the exception of the test.
    AS_PYTEST = {
        "pytest.py": "def fixture(function): return function",
        "test_as_pytest.py": textwrap.dedent("""
            import functools, unittest, conftest, test_with_pytest

            def with_fixture(test):
                @functools.wraps(test)
                def run():
                    fixture = conftest.server()
                    try:
                        test(server=next(fixture))
                    finally:
                        next(fixture, None)
                return run

            def load_tests(loader, tests, pattern):
                for name, test in vars(test_with_pytest).items():
                    if name.startswith("test_"):
                        tests.addTest(unittest.FunctionTestCase(with_fixture(test)))
                return tests
        """),
    }

    #: Runs the tests of each folder. The module is not copied there, as it would be compiled again.
    RUN_TESTS = """if True:
        import os, sys, unittest
        sys.path.append(sys.argv.pop(1))
        for folder in sys.argv[1:]:
            os.chdir(folder)
            before = set(sys.modules)
            loader = unittest.TestLoader()
            done = unittest.main(None, argv=["unittest"], testLoader=loader, exit=False)
            if not done.result.wasSuccessful():
                sys.exit(1)
            for name in set(sys.modules) - before:
                if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == folder:
                    del sys.modules[name]
    """

    def run_tests(self, *examples):
        """Run the tests of some examples, each in a folder of its own, until some fail."""
        folders = []
        for files in examples:
            if "conftest.py" in files:
                files = {**files, **self.AS_PYTEST}
            data = {name: text.encode() for name, text in files.items()}
            folders.append(str(self.make_directory(data)))
        return run("-W", "error", "-c", self.RUN_TESTS, str(HERE), *folders)

    def test_examples_of_the_readme_run_as_they_stand(self):
        examples = [files for files in readme_examples() if any("test" in name for name in files)]
        tests = README.count("def test_")
        self.assertGreater(tests, 20)
        if rst() != "RST":
            examples = [
                {
                    name: re.sub(r".*\(ConnectionResetError, .*\n", "", text)
                    for name, text in files.items()
                }
                for files in examples
            ]
        done = self.run_tests(*examples)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(sum(map(int, re.findall(r"Ran (\d+) test", done.stderr))), tests)

    def test_examples_for_pytest_fail_for_a_wrong_fixture_and_a_wrong_assertion(self):
        [files] = [files for files in readme_examples() if "conftest.py" in files]
        fetching = "def test_fetch(server):\n"
        self.assertIn(fetching, files["test_with_pytest.py"])
        fetch_typo = """
            import contextlib
            with contextlib.suppress(OSError):
                urlopen(server.get_url("typo.xml"))
        """
        for more, said in (
            (fetch_typo, "typo.xml, line 1: found the key 'Stauts'"),
            ('server.assert_requested("/feed.xml")', "The server got no request"),
        ):
            more = textwrap.indent(textwrap.dedent(more).strip(), "    ")
            test = files["test_with_pytest.py"].replace(fetching, f"{fetching}{more}\n")
            typo = {"data/typo.xml": "<!-- Stauts: 404 -->"}
            with self.subTest(more):
                done = self.run_tests({**files, **typo, "test_with_pytest.py": test})
                self.assertRegex(done.stderr, r"\nFAILED \(failures=1\)\n$")
                self.assertIn(said, done.stderr)

    def test_asynchronous_tests_wait_as_the_readme_says(self):
        [said] = re.findall(r"``await (asyncio\..*?)``", README)

        async def fetch_and_wait():
            fetching = asyncio.to_thread(self.get, server, "/feed.xml")
            waiting = eval(said, {"asyncio": asyncio, "server": server})
            return await asyncio.gather(waiting, fetching)

        server = self.serve({"feed.xml": b"<rss/>"})
        request, response = asyncio.run(fetch_and_wait())
        self.assertEqual((request.path, response.status), ("/feed.xml", 200))

    def test_it_can_be_copied_into_a_package_of_tests(self):
        [first] = [files for files in readme_examples() if "test_fetch.py" in files]
        said = "from .feedtestserver import FeedTestServerMixin"
        self.assertIn(said, README)
        test = first["test_fetch.py"].replace(said.replace(" .", " "), said)
        files = {"tests/test_fetch.py": test, "tests/data/feed.xml": first["data/feed.xml"]}
        folder = self.make_directory({name: text.encode() for name, text in files.items()})
        (folder / "tests" / "feedtestserver.py").write_text(SOURCE, "utf-8")
        (folder / "tests" / "__init__.py").touch()
        done = run("-W", "error", "-m", "unittest", cwd=folder)
        self.assertRegex(done.stderr, r"Ran 1 test in .*\n\nOK\n$")

    def test_readme_and_docstring_list_the_directives_that_are_known(self):
        readme = readme_directives()
        listed = re.search(r"The directives:\n\n(.*?)\n\n", DOCSTRING, re.DOTALL)
        self.assertEqual(re.findall(r"^    (\w+): ", listed.group(1), re.MULTILINE), readme)
        self.assertEqual(sorted(readme), sorted(known_directives()))

    def test_readme_lists_the_arguments_of_the_server_which_are_attributes(self):
        [listed] = re.findall(r"``FeedTestServer\(([^()]*=[^()]*)\)``", README)
        listed = re.findall(r"(\w+)=", listed)
        self.assertEqual(listed, list(inspect.signature(FeedTestServer).parameters))
        server = FeedTestServer(self.make_directory())
        self.assertEqual([name for name in listed if not hasattr(server, name)], [])

    def test_readme_lists_the_rules_of_politeness_that_are_known(self):
        [section] = re.findall(r"(?s)\nTesting politeness\n-+\n.*?\n-{3,}\n", README)
        listed = re.findall(r"^``([a-z-]+)``  +", section, re.MULTILINE)
        with self.assertRaises(ValueError) as caught:
            FeedTestServer().assert_polite(ignore=["nonsense"])
        known = str(caught.exception).partition("the rules ")[2]
        self.assertEqual(known, ", ".join(map(repr, listed)))

    def test_readme_lists_the_kinds_of_certificates_that_are_known(self):
        [table] = re.findall(r"(?s)\n(``valid``  .*?)\n===", README)
        with self.assertRaises(ValueError) as caught:
            FeedTestServer().certificate = "nonsense"
        known = re.findall("'([a-z-]+)'", str(caught.exception).partition("takes ")[2])
        self.assertEqual(sorted(re.findall(r"(?m)^``([a-z-]+)``  +", table)), sorted(known))

    def test_readme_shows_what_assert_polite_says(self):
        [files] = [files for files in readme_examples() if "test_politeness.py" in files]
        test = files["test_politeness.py"].replace("@unittest.expectedFailure", "")
        done = self.run_tests({**files, "test_politeness.py": test})
        said = re.search(r"(?s)AssertionError: .*?\n\n", done.stderr).group()
        shown = blocks(README)
        [shown] = [block for block in shown if block.startswith("AssertionError: the client")]
        self.assertEqual(said.split(), shown.split())

    #: A reader that keeps the last ETag, and what is printed of it by the script below.
    POLITE_READER = textwrap.dedent("""
        import pathlib, sys, urllib.error, urllib.request
        etag = pathlib.Path("etag")
        fields = {"User-Agent": "reader/1", "Accept": "*/*", "Accept-Encoding": "gzip"}
        if etag.exists():
            fields["If-None-Match"] = etag.read_text()
        try:
            request = urllib.request.Request(sys.argv[1], headers=fields)
            with urllib.request.urlopen(request, timeout=20) as response:
                etag.write_text(response.headers["ETag"])
        except urllib.error.HTTPError as error:
            sys.exit(error.code != 304)
    """)
    JUDGEMENT = """
        GET /feed.xml -> 200
        GET /feed.xml -> 304
        GET /feed.xml -> 304
        GET /feed.xml -> 200

        reader/1 was polite
    """

    def test_shell_script_of_the_readme_tests_readers(self):
        if os.name == "nt" or not all(map(shutil.which, ("sh", "mkfifo", "curl"))):
            self.skipTest("there is no sh, mkfifo or curl here")
        [files] = [files for files in readme_examples() if "check_reader.sh" in files]
        self.assertLessEqual(files["check_reader.sh"].count("\n"), 10)
        shown = blocks(README)
        [shown] = [block for block in shown if block.startswith("$ sh check_reader.sh ")]
        command, _, judgement = shown[len("$ ") :].partition("\n")
        # The module is not copied to where the script runs, as it would be compiled again.
        module = f"'{sys.executable}' -m feedtestserver"
        script = files["check_reader.sh"].replace("python3 feedtestserver.py", module)
        self.assertIn(module, script)
        files = {**files, "check_reader.sh": script, "reader.py": self.POLITE_READER}
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        for arguments, words, status in (
            (command.split(), judgement, 1),
            (["sh", "check_reader.sh", sys.executable, "reader.py"], self.JUDGEMENT, 0),
        ):
            folder = self.make_directory({name: text.encode() for name, text in files.items()})
            settings = {"PYTHONPATH": os.pathsep.join(paths), "CURL_HOME": str(folder)}
            done = subprocess.run(
                arguments,
                cwd=folder,
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            with self.subTest(arguments):
                out = re.sub(r"(?m)^curl/\S+", "curl/7.88.1", done.stdout)
                self.assertEqual((out.split(), done.stderr), (words.split(), ""))
                self.assertEqual(done.returncode, status)

    def test_every_block_of_the_readme_is_run_or_compared(self):
        """In files of an example, or by a test that looks for a block that begins like this."""
        compared = (
            "python feedtestserver.py data\n",
            "python -m unittest\n",  # .ci/run runs it
            "AssertionError: ",
            "malformed field line ",
            '{"url": ',
            "$ sh check_reader.sh ",
            "=====",  # figures
        )
        files = "".join(itertools.chain(*(each.values() for each in readme_examples())))
        for block in blocks(README):
            if block not in files and textwrap.indent(block, "    ") not in files:
                with self.subTest(block):
                    self.assertTrue(block.startswith(compared))

    def test_readme_says_how_large_the_module_is(self):
        [size] = re.findall(r"The file has about (\d+) KB ", README)
        self.assertAlmostEqual(int(size), len(SOURCE.encode()) / 1000, delta=15)

    def test_command_of_the_readme_serves_fixtures(self):
        [command] = [block for block in blocks(README) if block.startswith("python feedtestserver")]
        program = [sys.executable, *command.split()[1:], "--port", "0"]
        with subprocess.Popen(program, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
            self.addCleanup(process.kill)
            url = process.stdout.readline().strip()
            with urllib.request.urlopen(f"{url}fixtures.opml", timeout=PATIENCE) as response:
                self.assertIn(b"<opml", response.read())
            stop_server(urllib.parse.urlsplit(url).port)
            self.assertEqual(process.wait(PATIENCE), 0)

    def test_cheat_sheet_of_the_readme_can_be_typed_in(self):
        [sheet] = re.findall(r"(?s)\nI want to .*?\n=+ +=+\n(.*?)\n=+ +=+\n", README)
        files = dict.fromkeys(["feed.xml", "v1.xml", "v2.xml"], b"<rss/>")
        polite = {"User-Agent": "reader/1", "Accept": "*/*", "Accept-Encoding": "gzip"}

        class Test(FeedTestServerMixin, unittest.TestCase):
            data_directory = self.make_directory(files)
            runTest = None

        test = Test()
        self.addCleanup(test.doCleanups)
        test.setUp()
        for _ in range(2):
            self.get(test.server, "/feed.xml", headers=polite)
        typed_in = 0
        for code in re.findall("``(.*?)``", sheet):
            with self.subTest(code):
                if attribute := re.match(r"(\w+) = ", code):
                    self.assertTrue(hasattr(FeedTestServerMixin, attribute.group(1)))
                elif argument := re.match(r"(\w+)=", code):
                    arguments = inspect.signature(test.assertRequested).parameters
                    self.assertIn(argument.group(1), arguments)
                elif code.isidentifier():
                    self.assertTrue(hasattr(test.server.fixtures()[0], code))
                elif code.startswith("self.assertNot"):
                    with self.assertRaises(AssertionError):
                        exec(code, {"self": test})
                else:
                    exec(code, {"self": test, "Response": Response})
                typed_in += 1
        self.assertGreater(typed_in, 30)

    def test_readme_shows_how_a_test_fails(self):
        v1 = b'<!-- Header: ETag: "v1" -->'
        server = self.serve({"v1.xml": v1})
        server.respond("/feed.xml", "v1.xml", Response(status=503, fault="reset at 50%"), 200)
        self.get(server, "/feed.xml")
        with contextlib.suppress(ConnectionError):
            self.get(server, "/feed.xml", headers={"If-None-Match": 'W/"v1"'})
        with self.assertRaises(AssertionError) as caught:
            server.assert_requested("/feed.xml", headers={"If-None-Match": '"v1"'})
        self.assert_shown(f"AssertionError: {caught.exception}")
        refused = exchange(server, b"GET / HTTP/1.1\r\nHost: a\r\nAccept : */*\r\n\r\n")
        self.assert_shown(Answer(refused).body.decode())

        wrong = b"<!--\nHeader: A: b\nStauts: 404\n-->"
        for target, files in (
            ("/feed.xml", {"data/feed.xml": wrong}),
            ("https://example.net/feed.xml", {"data/feed.xml": v1}),
        ):
            folder = self.make_directory(files)
            with contextlib.ExitStack() as stack:
                caught = stack.enter_context(self.assertRaises(AssertionError))
                server = stack.enter_context(FeedTestServer(folder / "data"))
                stack.enter_context(server.intercept())
                ask(server, target)
            said = f"{caught.exception}".replace(str(folder), "/home/me/project")
            self.assert_shown(f"AssertionError: {said.replace(os.sep, '/')}")

    def assert_shown(self, words):
        """That a block of the README is this text, but for blanks."""
        self.assertIn(words.split(), [block.split() for block in blocks(README)])

    def test_docstring_runs_as_it_stands(self):
        test, fixture = blocks(DOCSTRING)[:2]
        done = self.run_tests({"test_example.py": test, "data/feed.xml": fixture})
        self.assertIn("Ran 1 test", done.stderr)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_docstring_names_what_is_there(self):
        in_order, others = re.search(
            r"(?s)in the order of this file:\n\n(.*)\n\nand what .*:\n\n(.*)", DOCSTRING
        ).groups()
        for text, fewest in ((in_order, 8), (others, 5)):
            names = re.findall(r"^    ([A-Za-z_]+)(?:, (\w+))? ", text, re.MULTILINE)
            self.assertGreater(len(names), fewest)
            places = [
                re.search(rf"(?m)^(class|def) {name}\b", SOURCE).start()
                for name in itertools.chain(*names)
                if name
            ]
            self.assertEqual(places, sorted(places))


class PublicNamesTest(unittest.TestCase):
    def test_all_is_sorted_and_documented(self):
        self.assertEqual(feedtestserver.__all__, sorted(feedtestserver.__all__))
        kinds = (ast.ClassDef, ast.FunctionDef)
        defined = {node.name: node for node in TREE.body if isinstance(node, kinds)}
        public = {name for name in defined if not name.startswith("_")} - {"main"}
        aliases = {"HeaderFields", "Step"}
        self.assertEqual(set(feedtestserver.__all__), public | aliases)
        for name in public:
            with self.subTest(name):
                self.assertTrue(ast.get_docstring(defined[name]))
        for name in aliases:
            self.assertRegex(SOURCE, f"(?m)^#: What .*\n(#: .*\n)*{name} = ")

    def test_type_hints_can_be_read(self):
        found = 0
        for name in feedtestserver.__all__:
            public = getattr(feedtestserver, name)
            is_alias = not isinstance(public, (type, types.FunctionType))
            for each in () if is_alias else (public, *self.methods(public)):
                with self.subTest(name, each=each):
                    found += bool(typing.get_type_hints(each))
        self.assertGreater(found, 80)

    def methods(self, public):
        """The functions of a class of the module, those of its properties included."""
        for name, member in vars(public).items() if isinstance(public, type) else ():
            member = getattr(member, "fget", None) or getattr(member, "func", member)
            member = getattr(member, "__func__", member)
            if isinstance(member, types.FunctionType) and (name[0] != "_" or name == "__init__"):
                yield member

    def test_types_of_arguments_say_what_they_take(self):
        hints = typing.get_type_hints(FeedTestServer.respond)
        self.assertEqual(hints["steps"], feedtestserver.Step)
        self.assertIn(Response, typing.get_args(feedtestserver.Step))
        hints = typing.get_type_hints(Response.__init__)
        self.assertEqual(hints["headers"], feedtestserver.HeaderFields)
        hints = typing.get_type_hints(FeedTestServer.ssl_context)
        self.assertIs(hints["return"], ssl.SSLContext)
        self.assertIsInstance(
            FeedTestServer(HERE / "data").fixtures("*/*.xml")[0], feedtestserver.Fixture
        )

    def test_importing_it_imports_little(self):
        code = (
            "import http.server, sys; before = set(sys.modules); import feedtestserver;"
            "print(*sorted(set(sys.modules) - before))"
        )
        done = run("-BIS", "-c", f"import sys; sys.path[:0] = [{str(HERE)!r}];{code}")
        imported = set(done.stdout.split())
        self.assertIn("feedtestserver", imported, done.stderr)
        costly = {"argparse", "dataclasses", "difflib", "inspect", "logging", "ssl", "unittest"}
        self.assertEqual(costly & imported, set())


# Directives


class DirectiveTest(unittest.TestCase):
    def items(self, *lines):
        return parse_directives(comment(*lines)).items()

    def test_grammar(self):
        for data, items in (
            (b"<rss/>", []),
            (b"", []),
            (b"<!-- Status: 410 -->", [("Status", "410")]),
            (b"<!--Status:410-->", [("Status", "410")]),
            (b"<!--Status:410", []),
            (b"<!--", []),
            (b"<!---->", []),
            (b"Status: 410", []),
            (b"<!-- a -->\n<!--\nStatus: 410\n-->", [("Status", "410")]),
            (b"<!--\r\nA: 1\r\nB: 2\r\n-->", [("A", "1"), ("B", "2")]),
            (b"<!--\rA: 1\rB: 2\r-->", [("A", "1"), ("B", "2")]),
            (b"<!--\nA:\n-->", [("A", "")]),
            (b"<!--\nA: 1:2\nA:3\n-->", [("A", "1:2"), ("A", "3")]),
            (b"<!--\nprose and: no key\nhttp is no key\n-->", []),
            (b"<!--\nKey :1\n-->", [("Key", "1")]),
            (b"<![CDATA[<!-- A: 1 -->]]><!-- B: 2 -->", [("B", "2")]),
            (b"<![CDATA[<!-- A: 1 --><!-- B: 2 -->", []),
            (b"<!-- A: 1 --" + b" " * 9999 + b"-->", [("A", "1 --")]),
        ):
            with self.subTest(data[:60]):
                self.assertEqual(parse_directives(data).items(), items)

    def test_comments_begin_in_the_first_4_kib(self):
        for before, found in ((4095, ["410"]), (4096, [])):
            with self.subTest(before):
                directives = parse_directives(b" " * before + b"<!-- Status: 410 -->")
                self.assertEqual(directives.get_all("Status"), found)
        text = "<!-- Status: 410 -->"
        for before, found in ((2047, ["410"]), (2048, [])):
            with self.subTest(before):
                directives = parse_directives(("<" + " " * (before - 1) + text).encode("utf-16-be"))
                self.assertEqual(directives.get_all("Status"), found)

    def test_common_indentation_is_removed(self):
        self.assertEqual(
            parse_directives(b"<!-- A: 1\n     B: 2\n       goes on\n\n     C: 3\n  -->").items(),
            [("A", "1"), ("B", "2 goes on"), ("C", "3")],
        )

    def test_indented_lines_continue(self):
        for lines, items in (
            (["A: 1", " 2", "\t3"], [("A", "1 2 3")]),
            (["A:", " 2"], [("A", " 2".strip())]),
            (["A: 1", " Status: 410"], [("A", "1"), ("Status", "410")]),
            (["A: 1", " status: 410"], [("A", "1"), ("status", "410")]),
            (["A: 1", " B: 2"], [("A", "1 B: 2")]),
            (["A: 1", " Header: Vary: *"], [("A", "1"), ("Header", "Vary: *")]),
            (["A: 1", "", " B: 2", "C: 3"], [("A", "1"), ("B", "2"), ("C", "3")]),
            (["Header: X: 1,", "        2", "B: 3"], [("Header", "X: 1, 2"), ("B", "3")]),
        ):
            with self.subTest(lines):
                self.assertEqual(self.items(*lines), items)
        self.assertEqual(parse_directives(b"<!--A: 1--><!--\n B: 2\nC: 3-->")["A"], "1")

    def test_reads_like_wsgiref_headers(self):
        directives = parse_directives(comment("Expect: a", "EXPECT: b", "Header: X: 1"))
        self.assertEqual(directives["expect"], "a")
        self.assertEqual(directives.get_all("Expect"), ["a", "b"])
        self.assertIsNone(directives["SkipUnless"])
        self.assertEqual(len(directives), 3)
        self.assertIn("Header", directives)

    def test_arguments_are_those_of_response(self):
        directives = parse_directives(
            comment(
                "header: A: 1",
                "Header: a:2",
                "Header: B:",
                "Status: 404 Not Here",
                "Without: Date",
                "without: Server",
                "Ignore: Range",
                "Compress: GZIP",
                "Chunked: 100",
                "Delay: 1.5",
                "Pause: 2 at 50%",
                "pause:  .5  AT  Headers",
                "Rate: 1000",
                "Fault:  Reset  at 50%",
                "Early: Yes",
                "Template: YES",
            )
        )
        self.assertEqual(
            Response(b"x", **directives.arguments),
            Response(
                b"x",
                404,
                reason="Not Here",
                headers=[("A", "1"), ("a", "2"), ("B", "")],
                without=["Date", "Server"],
                ignore=["Range"],
                compress="gzip",
                chunked=100,
                delay=1.5,
                pause=["2 at 50%", ".5 at headers"],
                rate=1000,
                fault="reset at 50%",
                early=True,
                template=True,
            ),
        )

    def test_status_as_feedparser_wrote_it(self):
        self.assertEqual(
            parse_directives(comment("Header: Status: 301")).arguments,
            {"status": 301, "reason": None},
        )

    def test_errors_say_file_and_line_and_both_sides(self):
        status = (
            "it takes three digits from 200 to 599, and a reason phrase if it is not the usual one"
        )
        header = (
            "it takes a field name, a colon, and a value without control characters"
            " (RFC 9110 5.1, 5.5)"
        )
        size = "it takes the size of a chunk in bytes, a whole number from 1 to 999999999999"
        delay = "it takes a number of seconds from 0 to 999999999, such as 0.5"
        rate = "it takes bytes a second, a whole number from 1 to 999999999999"
        fault = (
            "it takes close, reset or stall, and maybe a place:"
            " at start, at headers, at a number of bytes, at 0% to 100%, or at end"
        )
        pause = (
            "it takes seconds and a place, such as 0.5 at 50%:"
            " at headers, at a number of bytes, at 0% to 100%"
        )
        for line, sentence in (
            ("Status: abc", f"Status: found 'abc'; {status}"),
            ("Status: 199", f"Status: found '199'; {status}"),
            ("Status: 600", f"Status: found '600'; {status}"),
            ("Status: 0200", f"Status: found '0200'; {status}"),
            ("Status: \u0662\u0660\u0660", f"Status: found '\u0662\u0660\u0660'; {status}"),
            ("Status:", f"Status: found ''; {status}"),
            ("Status: 200 a\x00", f"Status: found '200 a\\x00'; {status}"),
            ("Header: Status: 99", f"Status: found '99'; {status}"),
            ("Header: X", f"Header: found 'X'; {header}"),
            ("Header: X Y: 1", f"Header: found 'X Y: 1'; {header}"),
            ("Header: X : 1", f"Header: found 'X : 1'; {header}"),
            ("Header: : 1", f"Header: found ': 1'; {header}"),
            ("Header: X: a\x00b", f"Header: found 'X: a\\x00b'; {header}"),
            ("Header: X: a\x7fb", f"Header: found 'X: a\\x7fb'; {header}"),
            ("Header: \u00e9: b", f"Header: found '\u00e9: b'; {header}"),
            (
                "Without: a b",
                (
                    "Without: found 'a b';"
                    " it takes one field name, of a field that the server would add"
                ),
            ),
            (
                "Ignore: a,b",
                "Ignore: found 'a,b'; it takes one field name, of a field that a client may send",
            ),
            ("Compress: br", "Compress: found 'br'; it takes gzip or deflate"),
            ("Chunked: 0", f"Chunked: found '0'; {size}"),
            ("Chunked: 1000000000000", f"Chunked: found '1000000000000'; {size}"),
            ("Chunked: yes", f"Chunked: found 'yes'; {size}"),
            ("Chunked: 1.5", f"Chunked: found '1.5'; {size}"),
            ("Delay: soon", f"Delay: found 'soon'; {delay}"),
            ("Delay: -1", f"Delay: found '-1'; {delay}"),
            ("Delay: 1000000000", f"Delay: found '1000000000'; {delay}"),
            ("Delay: 1e3", f"Delay: found '1e3'; {delay}"),
            ("Delay: inf", f"Delay: found 'inf'; {delay}"),
            ("Delay: 1 s", f"Delay: found '1 s'; {delay}"),
            ("Delay: \u0661", f"Delay: found '\u0661'; {delay}"),
            ("Pause: 2", f"Pause: found '2'; {pause}"),
            ("Pause:", f"Pause: found ''; {pause}"),
            ("Pause: at 5", f"Pause: found 'at 5'; {pause}"),
            ("Pause: 2 at", f"Pause: found '2 at'; {pause}"),
            ("Pause: 2 at start", f"Pause: found '2 at start'; {pause}"),
            ("Pause: 2 at end", f"Pause: found '2 at end'; {pause}"),
            ("Pause: 2 at -1", f"Pause: found '2 at -1'; {pause}"),
            ("Pause: 2 at 007", f"Pause: found '2 at 007'; {pause}"),
            ("Pause: 2 at 101%", f"Pause: found '2 at 101%'; {pause}"),
            ("Pause: 2 at 1.5%", f"Pause: found '2 at 1.5%'; {pause}"),
            ("Pause: 2 at 1000000000000", f"Pause: found '2 at 1000000000000'; {pause}"),
            ("Pause: 2 50%", f"Pause: found '2 50%'; {pause}"),
            ("Pause: -1 at 3", f"Pause: found '-1 at 3'; {pause}"),
            ("Pause: 1000000000 at 3", f"Pause: found '1000000000 at 3'; {pause}"),
            ("Pause: 1e3 at 3", f"Pause: found '1e3 at 3'; {pause}"),
            ("Pause: inf at 3", f"Pause: found 'inf at 3'; {pause}"),
            ("Pause: \u0661 at 3", f"Pause: found '\u0661 at 3'; {pause}"),
            ("Pause: 2 seconds at 5", f"Pause: found '2 seconds at 5'; {pause}"),
            ("Pause: 2 at 5 bytes", f"Pause: found '2 at 5 bytes'; {pause}"),
            ("Pause: 2 at 5, 3 at 6", f"Pause: found '2 at 5, 3 at 6'; {pause}"),
            ("Rate: 0", f"Rate: found '0'; {rate}"),
            ("Rate: -1", f"Rate: found '-1'; {rate}"),
            ("Rate: 0100", f"Rate: found '0100'; {rate}"),
            ("Rate: fast", f"Rate: found 'fast'; {rate}"),
            ("Fault: explode", f"Fault: found 'explode'; {fault}"),
            ("Fault: reset at", f"Fault: found 'reset at'; {fault}"),
            ("Fault: reset at the end", f"Fault: found 'reset at the end'; {fault}"),
            ("Fault: end", f"Fault: found 'end'; {fault}"),
            ("Fault: reset at 101%", f"Fault: found 'reset at 101%'; {fault}"),
            ("Fault: reset at -1", f"Fault: found 'reset at -1'; {fault}"),
            ("Fault: reset at 007", f"Fault: found 'reset at 007'; {fault}"),
            ("Fault: reset at 1.5%", f"Fault: found 'reset at 1.5%'; {fault}"),
            ("Fault: reset 50%", f"Fault: found 'reset 50%'; {fault}"),
            ("Fault:", f"Fault: found ''; {fault}"),
            ("Early: no", "Early: found 'no'; it takes yes"),
            ("Early: true", "Early: found 'true'; it takes yes"),
            ("Early:", "Early: found ''; it takes yes"),
            ("Template: no", "Template: found 'no'; it takes yes"),
            ("Pauses: 2 at 5", "found the key 'Pauses'; the directive is Pause"),
            ("Pauze: 2 at 5", "found the key 'Pauze'; the directive is Pause"),
            ("Earli: yes", "found the key 'Earli'; the directive is Early"),
            ("Earl: yes", "found the key 'Earl'; the directive is Early"),
            ("Chunk: 100", "found the key 'Chunk'; the directive is Chunked"),
            ("Delays: 100", "found the key 'Delays'; the directive is Delay"),
            ("Headers: X: 1", "found the key 'Headers'; the directive is Header"),
            ("Stauts: 404", "found the key 'Stauts'; the directive is Status"),
            ("STATSU: 404", "found the key 'STATSU'; the directive is Status"),
            ("Status : 404", "found the key 'Status '; the directive is Status"),
            ("Status      : 404", "found the key 'Status      '; the directive is Status"),
            ("Templates: yes", "found the key 'Templates'; the directive is Template"),
            (
                "Location: /x",
                "found 'Location: /x'; a response field is written 'Header: Location: /x'",
            ),
            (
                'etag :  "v1"',
                "found 'etag: \"v1\"'; a response field is written 'Header: etag: \"v1\"'",
            ),
            (
                "Content-Type:",
                "found 'Content-Type:'; a response field is written 'Header: Content-Type:'",
            ),
            (
                "Expires: " + "x" * 200,
                (
                    f"found {'Expires: ' + 'x' * 71!r};"
                    f" a response field is written {'Header: Expires: ' + 'x' * 63!r}"
                ),
            ),
            ("Status: Z\u00fcrich", f"Status: found 'Z\u00fcrich'; {status}"),
            ("Header: X" + "y" * 200, f"Header: found {'X' + 'y' * 79!r}; {header}"),
        ):
            with self.subTest(line), self.assertRaises(DirectiveError) as caught:
                parse_directives(b"<?xml version='1.0'?>\r\n" + comment("A: 1", line), "feed.xml")
            self.assertEqual(str(caught.exception), f"feed.xml, line 4: {sentence}")
            self.assertEqual((caught.exception.source, caught.exception.line), ("feed.xml", 4))
            again = pickle.loads(pickle.dumps(caught.exception))
            self.assertEqual(str(again), str(caught.exception))

    def test_data_is_bytes(self):
        for data in ("<!-- A: 1 -->", None, 5):
            words = f"^data: found {data!r}; it takes bytes$"
            with self.subTest(data), self.assertRaisesRegex(TypeError, words):
                parse_directives(data)

    def test_bytes_that_are_not_utf_8_are_legible_in_errors(self):
        with self.assertRaises(DirectiveError) as caught:
            parse_directives(b"<!-- Status: Z\xfcrich -->")
        self.assertIn("found 'Z\u00fcrich'; it takes", caught.exception.sentence)

    def test_response_fields_without_header_are_errors(self):
        names = (
            *("Cache-Control", "Content-Encoding", "Content-Length", "Content-Type", "ETag"),
            *("Expires", "Last-Modified", "Location", "Retry-After", "Set-Cookie", "Vary"),
            *("Transfer-Encoding", "WWW-Authenticate"),
        )
        for name in (*names, *map(str.lower, names)):
            with self.subTest(name), self.assertRaises(DirectiveError) as caught:
                parse_directives(comment("Description: a", f"{name}: b", "Header: X: c"))
            self.assertEqual(
                str(caught.exception),
                f"line 3: found '{name}: b'; a response field is written 'Header: {name}: b'",
            )
            self.assertEqual(self.items(f"Header: {name}: b"), [("Header", f"{name}: b")])
            for lines in (["Status: 302", f"  {name}: b"], ["Header: X: 1", f"\t{name} : b", " c"]):
                with self.assertRaises(DirectiveError) as caught:
                    parse_directives(comment(*lines))
                self.assertEqual(caught.exception.line, 3)
                self.assertIn(f"found '{name}: b", caught.exception.sentence)

    def test_second_value_is_an_error(self):
        for first, second, sentence in (
            (
                "Status: 200",
                "Status: 404",
                "Status: found a second value, '404'; it takes one only",
            ),
            (
                "Status: 200",
                "Header: Status: 404",
                "Header: found a second value, 'Status: 404'; it takes one only",
            ),
            (
                "Template: yes",
                "Template: yes",
                "Template: found a second value, 'yes'; it takes one only",
            ),
            ("Early: yes", "early: YES", "Early: found a second value, 'YES'; it takes one only"),
        ):
            with self.subTest(second), self.assertRaises(DirectiveError) as caught:
                parse_directives(comment(first, second))
            self.assertEqual(str(caught.exception), f"line 3: {sentence}")

    def test_keys_that_are_no_typos(self):
        for key in (
            *("Description", "Expect", "SkipUnless", "Author", "State", "Heading", "xHeader"),
            *("Date", "Server", "Accept", "Content", "Cookie"),
        ):
            with self.subTest(key):
                self.assertEqual(self.items(f"{key}: 1"), [(key, "1")])

    def test_line_of_an_error_counts_from_the_first_line_of_the_directive(self):
        with self.assertRaises(DirectiveError) as caught:
            parse_directives(b"<a>\n<!-- A: 1\n B: 2\n   3 -->\n<!--\n\nStatus: 7\n  8\n-->")
        self.assertEqual(caught.exception.line, 7)
        with self.assertRaises(DirectiveError) as caught:
            parse_directives(b"<a>\r\r\n<!--\rStatus: 7\r-->")
        self.assertEqual(caught.exception.line, 4)

    def test_hostile_comments_are_read_to_their_end(self):
        """That this takes linear time is for .ci/fuzz.py to show."""
        long = "a" * 100_000
        for data, items in (
            (b"<!--" * 25_000, []),
            (b"<![CDATA[" * 10_000, []),
            (b"<!--" + b"\n" * 100_000 + b"A: 1-->", [("A", "1")]),
            (b"<!--\nA: 1\n" + b" x\n" * 30_000 + b"-->", [("A", "1" + " x" * 30_000)]),
            (f"<!--{long}: 1-->".encode(), [(long, "1")]),
            (b"<!--" + b" " * 100_000 + b": 1-->", []),
            (b"<!--A: 1\n" + b" \t" * 50_000 + b"\nB: 2-->", [("A", "1"), ("B", "2")]),
            (b"<!--" + b"Header: X: 1\n" * 7_000 + b"-->", [("Header", "X: 1")] * 7_000),
            (b"<!--" + b"Headr" * 20_000 + b": 1-->", [("Headr" * 20_000, "1")]),
            (b"<?xml " * 16_000, []),
            ("<?xml ".encode("cp037") * 16_000, []),
        ):
            with self.subTest(data[:20]):
                self.assertTrue(parse_directives(data).items() == items)  # too long to be shown


class DirectiveEncodingTest(unittest.TestCase):
    TEXT = (
        "<?xml version='1.0' encoding='{}'?>\n"
        "<!--\nHeader: X-Name: caf\u00e9\nExpect: \u00fc\n-->\n<rss/>"
    )

    def test_encodings(self):
        for codec, named in (
            ("utf-8", "utf-8"),
            ("utf-8-sig", "utf-8"),
            ("utf-16", "utf-16"),
            ("utf-16-le", "utf-16"),
            ("utf-16-be", "utf-16"),
            ("utf-32", "utf-32"),
            ("utf-32-le", "utf-32"),
            ("utf-32-be", "utf-32"),
            ("cp037", "cp037"),
            ("cp037", "ebcdic-cp-us"),
            ("cp500", "cp500"),
            ("cp1140", "cp1140"),
            ("cp1026", "cp1026"),
        ):
            with self.subTest(codec, named=named):
                directives = parse_directives(self.TEXT.format(named).encode(codec))
                self.assertEqual(
                    directives.items(), [("Header", "X-Name: caf\u00e9"), ("Expect", "\u00fc")]
                )
                head = planned(Response(**directives.arguments)).head
                self.assertIn(b"\r\nX-Name: caf\xc3\xa9\r\n", head)

    def test_byte_order_marks_of_both_orders(self):
        for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
            with self.subTest(codec):
                data = ("\ufeff\n" + self.TEXT.format("utf-16")).encode(codec)
                self.assertEqual(parse_directives(data)["Expect"], "\u00fc")

    def test_ebcdic_newline(self):
        data = self.TEXT.format("cp500").replace("\n", "\x85").encode("cp500")
        self.assertEqual(len(parse_directives(data)), 2)

    def test_ebcdic_with_an_unknown_or_false_code_page_is_read_all_the_same(self):
        for named in ("no-such-codec", "utf-8", "hex", "ascii"):
            with self.subTest(named):
                self.assertEqual(len(parse_directives(self.TEXT.format(named).encode("cp037"))), 2)

    def test_other_bytes_go_out_as_they_stand(self):
        for value in (
            b"caf\xe9",
            b"\xff\xfe",
            b"caf\xc3\xa9",
            b"\x83e\x83X\x83g",
            b"a\xa0",
            b"\x85b",
            b"\xed\xa0\x80",
        ):
            with self.subTest(value):
                directives = parse_directives(b"<!--\nHeader: X-Name: " + value + b"\n-->")
                head = planned(Response(**directives.arguments)).head
                self.assertIn(b"\r\nX-Name: " + value + b"\r\n", head)


# Response and plan


class ResponseTest(unittest.TestCase):
    def test_python_says_what_a_fixture_says(self):
        for lines, arguments in (
            (["Status: 410"], {"status": 410}),
            (["Status: 200 Fine"], {"reason": "Fine"}),
            (
                ["Header: A: caf\u00e9", "Header: B: {{port}}"],
                {"headers": {"A": "caf\u00e9", "B": "{{port}}"}},
            ),
            (["Header: A: 1", "Header: A: 2"], {"headers": [("A", "1"), ("A", "2")]}),
            (["Header: Status: 301"], {"headers": {"Status": "301"}}),
            (["Without: Date", "Ignore: Range"], {"without": ["Date"], "ignore": ("Range",)}),
            (["Template: yes"], {"template": True}),
            (["Compress: gzip"], {"compress": "gzip"}),
            (["Compress: Deflate"], {"compress": "deflate"}),
            (["Chunked: 100"], {"chunked": 100}),
            (["Delay: 2"], {"delay": 2}),
            (["Delay: 0.0000001"], {"delay": 1e-7}),
            (["Delay: 0"], {"delay": 0}),
            (["Delay: .5"], {"delay": 0.5}),
            (["Pause: 2 at headers"], {"pause": ["2 at headers"]}),
            (["Pause: 3 at 9", "Pause:  .5  At 50%"], {"pause": ("3 at 9", ".5 AT 50%")}),
            (["Pause: 1 at 1", "Rate: 5", "Pause: 1 at 1"], {"pause": ["1 at 1"] * 2, "rate": 5}),
            (["Rate: 1"], {"rate": 1}),
            (["Early: YES"], {"early": True}),
            (["Early: yes"], {"early": "yes"}),
            (["Fault: close"], {"fault": "close"}),
            (["Fault: RESET at START"], {"fault": "reset at start"}),
            (["Fault: stall at 0"], {"fault": "stall at 0"}),
            (["Fault: reset at 100%"], {"fault": "reset at 100%"}),
            (["Fault: Stall at END"], {"fault": "stall at end"}),
        ):
            with self.subTest(lines):
                parsed = parse_directives(comment(*lines)).arguments
                self.assertEqual(Response(**parsed), Response(**arguments))

    def test_wrong_values_have_the_sentence_of_the_directive(self):
        for arguments, line in (
            ({"status": 99}, "Status: 99"),
            ({"status": True}, "Status: True"),
            ({"status": 200, "reason": "a\r\nX: 1"}, "Status: 200 a\\r"),
            ({"headers": {"X Y": "1"}}, "Header: X Y: 1"),
            ({"headers": {"X": "a\nb"}}, "Header"),
            ({"headers": {"X": "a\rb"}}, "Header"),
            ({"headers": {"X": "a\x00b"}}, "Header"),
            ({"headers": {"X\r\nY": "b"}}, "Header"),
            ({"without": ["a b"]}, "Without: a b"),
            ({"ignore": [""]}, "Ignore:"),
            ({"template": "no"}, "Template: no"),
            ({"compress": "br"}, "Compress: br"),
            ({"compress": ""}, "Compress:"),
            ({"compress": True}, "Compress: True"),
            ({"chunked": 0}, "Chunked: 0"),
            ({"chunked": True}, "Chunked: True"),
            ({"chunked": 1.0}, "Chunked: 1.0"),
            ({"delay": "soon"}, "Delay: soon"),
            ({"delay": -1}, "Delay: -1"),
            ({"delay": None}, "Delay: None"),
            ({"delay": False}, "Delay: False"),
            ({"delay": 1e16}, "Delay: 1e+16"),
            ({"delay": 1e9}, "Delay: 1000000000.0"),
            ({"chunked": 10**12}, "Chunked: 1000000000000"),
            ({"rate": 10**12}, "Rate: 1000000000000"),
            ({"delay": [1]}, "Delay: [1]"),
            ({"delay": float("nan")}, "Delay: nan"),
            ({"delay": float("inf")}, "Delay: inf"),
            ({"pause": ["2"]}, "Pause: 2"),
            ({"pause": ["1 at 5", "2 at start"]}, "Pause: 2 at start"),
            ({"pause": ("2 at end",)}, "Pause: 2 at end"),
            ({"pause": ["-1 at 3"]}, "Pause: -1 at 3"),
            ({"pause": ["2 at 101%"]}, "Pause: 2 at 101%"),
            ({"pause": ["2 seconds at 5"]}, "Pause: 2 seconds at 5"),
            ({"pause": [""]}, "Pause:"),
            ({"pause": [2]}, "Pause: 2"),
            ({"pause": [("2", 5)]}, "Pause: ('2', 5)"),
            ({"pause": [None]}, "Pause: None"),
            ({"pause": [b"2 at 5"]}, "Pause: b'2 at 5'"),
            ({"early": "no"}, "Early: no"),
            ({"early": 1}, "Early: 1"),
            ({"early": None}, "Early: None"),
            ({"rate": -1}, "Rate: -1"),
            ({"rate": 0}, "Rate: 0"),
            ({"fault": "explode"}, "Fault: explode"),
            ({"fault": "reset at 101%"}, "Fault: reset at 101%"),
            ({"fault": "reset at the end"}, "Fault: reset at the end"),
            ({"fault": ("reset", 100)}, "Fault: ('reset', 100)"),
        ):
            with self.subTest(arguments), self.assertRaises(ValueError) as caught:
                Response(**arguments)
            name = line.partition(":")[0]
            with self.assertRaises(DirectiveError) as directive:
                parse_directives(comment(f"{name}: a b"))
            takes = directive.exception.sentence.partition("; it takes ")[2]
            self.assertRegex(
                str(caught.exception), f"^{name}: found .*; it takes {re.escape(takes)}$"
            )
            if name not in ("Status", "Header"):
                with self.assertRaises(DirectiveError) as directive:
                    parse_directives(comment(line))
                self.assertEqual(directive.exception.sentence, str(caught.exception))

    def test_values_are_kept_as_they_are(self):
        for name, value in (
            ("delay", 1e-10),
            ("delay", 5e-324),
            ("delay", 0.1 + 0.2),
            ("delay", 123_456_789.123_456_7),
            ("delay", 999_999_999),
            ("chunked", 999_999_999_999),
            ("rate", 1),
            ("template", True),
        ):
            with self.subTest(name, value=value):
                kept = getattr(Response(**{name: value}), name)
                self.assertEqual((kept, type(kept)), (value, type(value)))

    def test_asis_is_true_or_false(self):
        with self.assertRaisesRegex(ValueError, "^asis: found 'yes'; it takes True or False$"):
            Response(asis="yes")

    def test_names_as_one_string_are_an_error(self):
        for names in ("Date", b"Date", [1], [None], None, 5):
            with (
                self.subTest(names),
                self.assertRaisesRegex(ValueError, "^Without: found .*; it ta"),
            ):
                Response(without=names)

    def test_pauses_as_one_string_are_an_error(self):
        for pauses in ("2 at 50%", b"2 at 50%", 2, None, True):
            with (
                self.subTest(pauses),
                self.assertRaisesRegex(ValueError, "^Pause: found .*; it ta.*, in a sequence$"),
            ):
                Response(pause=pauses)

    def test_pauses_are_a_tuple_of_texts(self):
        self.assertEqual(Response().pause, ())
        for pauses in (["2 at 50%", "1 at headers"], iter(["2 at 50%", "1 at headers"])):
            self.assertEqual(Response(pause=pauses).pause, ("2 at 50%", "1 at headers"))
        self.assertEqual(Response(pause=["0.50 at 7"]).pause, ("0.50 at 7",))
        self.assertNotEqual(Response(pause=["2 at 5"]), Response(pause=["3 at 5"]))
        self.assertIs(Response().early, False)
        response = Response(b"x", pause=("2 at 5",), early=True)
        text = "Response(b'x', status=200, pause=('2 at 5',), early=True)"
        self.assertEqual((repr(response), eval(text)), (text, response))

    def test_members_of_enumerations_are_values_like_any_other(self):
        class Word(str, enum.Enum):
            GZIP, CLOSE, YES, PAUSE = "gzip", "close at 5", "yes", "2 at 5"

        class Number(enum.IntEnum):
            FIVE = 5

        for arguments, plain in (
            ({"compress": Word.GZIP}, {"compress": "gzip"}),
            ({"fault": Word.CLOSE}, {"fault": "close at 5"}),
            ({"template": Word.YES}, {"template": True}),
            ({"early": Word.YES, "pause": [Word.PAUSE]}, {"early": True, "pause": ["2 at 5"]}),
            ({"rate": Number.FIVE, "chunked": Number.FIVE}, {"rate": 5, "chunked": 5}),
        ):
            with self.subTest(arguments):
                self.assertEqual(repr(Response(**arguments)), repr(Response(**plain)))

    def test_headers_that_are_no_pairs_are_an_error(self):
        for headers in (
            "X: 1",
            [("X",)],
            ["XY"],
            {"X": None},
            {"X": b"a"},
            {b"X": "a"},
            {"X:Y": "1"},
            {"X": "\ud800"},
            {"X": True},
            None,
            5,
        ):
            with (
                self.subTest(headers),
                self.assertRaisesRegex(ValueError, "^Header: found .*; it ta"),
            ):
                Response(headers=headers)
        with self.assertRaisesRegex(ValueError, "^Status: found '404 Foo'; it takes"):
            Response(status="404 Foo")
        self.assertEqual(Response(headers={"Age": 5}).headers, (("Age", "5"),))

    def test_body_is_bytes(self):
        self.assertEqual(Response(bytearray(b"x")).body, b"x")
        for body in ("text", 5, None):
            with (
                self.subTest(body),
                self.assertRaisesRegex(TypeError, "^body: found .* it takes bytes"),
            ):
                Response(body)

    def test_body_may_be_an_iterable(self):
        """It is not iterated before it is sent, nor by a comparison."""
        items = Produced(b"one")
        response = Response(items, 201, headers={"A": "1"})
        self.assertIs(response.body, items)
        self.assertRegex(repr(response), r"^Response\(.*Produced.*, status=201, headers=")
        self.assertEqual(response, Response(items, 201, headers={"A": "1"}))
        self.assertNotEqual(response, Response(items))
        self.assertNotEqual(response, Response(Produced(b"one"), 201, headers={"A": "1"}))
        self.assertNotEqual(response, Response(b"one", 201, headers={"A": "1"}))
        self.assertEqual((items.asked, items.closed.is_set()), (0, False))
        self.assertLess(len(repr(Response([bytes(1000)] * 1000))), 200)
        for body in ("text", 5, None, object(), async_items(), async_items, int, {}, {b"a": b"b"}):
            with (
                self.subTest(body),
                self.assertRaisesRegex(TypeError, "^body: found .* it takes bytes, or an iterable"),
            ):
                Response(body)

    def test_what_an_iterable_cannot_do(self):
        places = "found '{}' with the body [b'one']; a percentage needs bytes, or a Content-Length"
        for arguments, words in (
            ({"template": True}, "Template: found the body [b'one']; it takes bytes"),
            ({"compress": "gzip"}, "Compress: found the body [b'one']; it takes bytes"),
            ({"pause": ["2 at 50%"]}, f"Pause: {places.format('2 at 50%')}"),
            ({"pause": ["2 at 5", "1 at 0%"]}, f"Pause: {places.format('1 at 0%')}"),
            ({"fault": "close at 100%"}, f"Fault: {places.format('close at 100%')}"),
        ):
            with self.subTest(arguments):
                with self.assertRaises(ValueError) as caught:
                    Response([b"one"], **arguments)
                self.assertEqual(str(caught.exception), words)
                Response(b"one", **arguments)
                if "percentage" in words:
                    Response([b"one"], headers={"content-LENGTH": "3"}, **arguments)

    def test_status_may_be_of_the_enumeration(self):
        self.assertEqual(Response(status=http.HTTPStatus.GONE), Response(status=410))

    def test_it_is_a_value(self):
        response = Response()
        words = "^status cannot be set: a Response is a value, make another one$"
        with self.assertRaisesRegex(AttributeError, words):
            response.status = 404
        with self.assertRaisesRegex(AttributeError, words):
            del response.status
        self.assertEqual(response.status, 200)

    def test_nothing_that_is_made_of_it_changes_it(self):
        for response in (
            Response(b"x" * 999, headers={"ETag": '"1"'}, compress="gzip"),
            Response(b"{{port}}", headers={"ETag": "{{port}}"}, chunked=1, template=True),
        ):
            before = copy.deepcopy(vars(response))
            for fields in ((), ("Range: bytes=0-1",), ("If-None-Match: *",), ("If-Match: x",)):
                with self.subTest(response, fields=fields):
                    planned(response, *fields)
                    self.assertEqual(vars(response), before)

    def test_repr_is_python(self):
        response = Response(b"x", 404, reason="No", headers={"A": "1"}, without=["Date"])
        self.assertEqual(
            repr(response),
            "Response(b'x', status=404, reason='No', headers=(('A', '1'),), without=('Date',))",
        )
        self.assertEqual(eval(repr(response)), response)
        asis = Response(b"x", asis=True)
        self.assertEqual(repr(asis), "Response(b'x', status=200, asis=True)")
        self.assertNotEqual(asis, Response(b"x"))
        with self.assertRaises(TypeError):
            hash(response)


class Planned:
    """How a response would be sent: its attributes as planned, its bytes, and how it ends."""

    def __init__(self, plan):
        self.response = plan.response
        self.head, self.sent, self.closes = plan.head, plan.content, plan.closes
        parts = feedtestserver._timeline(plan) if plan.whole is None else [plan.whole]
        self.timeline = [
            part
            if isinstance(part, str)
            else round(part, 6)
            if isinstance(part, float)
            else bytes(part)
            for part in parts
        ]

    def __getattr__(self, name):
        return getattr(self.response, name)

    def values(self, name):
        """The values of a field, by its lower-case name."""
        return [value for given, value in self.response.headers if given.lower() == name]


def planned(response, *fields, method="GET", path="/feed.xml", version="1.1", persistent=True):
    """The plan for a request with these field lines."""
    pairs = [tuple(part.strip() for part in field.split(":", 1)) for field in fields]
    head = feedtestserver._Head(method, path, version, pairs)
    request = Request(head, "http://127.0.0.1:8000", head.origin)
    return Planned(feedtestserver._plan(request, response, NOW_DATE, persistent))


class PlanTest(unittest.TestCase):
    SERVER = ("Server", f"feedtestserver/{feedtestserver.__version__}")

    def names(self, plan):
        return [name for name, _ in plan.headers]

    def test_fields_that_the_server_adds(self):
        plan = planned(Response(b"12345", headers={"X": "1"}))
        self.assertEqual(
            plan.headers,
            (
                ("X", "1"),
                ("Date", NOW_DATE),
                self.SERVER,
                ("Content-Type", "application/xml"),
                ("Content-Length", "5"),
            ),
        )
        self.assertEqual(plan.body, b"12345")

    def test_given_fields_win(self):
        given = [
            ("date", "x"),
            ("SERVER", "y"),
            ("content-type", ""),
            ("Content-length", "5"),
            ("Connection", "close"),
        ]
        self.assertEqual(planned(Response(b"12345", headers=given)).headers, tuple(given))

    def test_without(self):
        names = ["Date", "SERVER", "content-type"]
        self.assertEqual(self.names(planned(Response(without=names))), ["Content-Length"])

    def test_content_types_are_of_the_table(self):
        for path, media_type in (
            ("/a.xml", "application/xml"),
            ("/a.rss", "application/rss+xml"),
            ("/a.ATOM", "application/atom+xml"),
            ("/a.rdf", "application/rdf+xml"),
            ("/a.opml", "text/x-opml"),
            ("/a.json", "application/json"),
            ("/a.html", "text/html"),
            ("/a.txt", "text/plain"),
            *((f"/a.{name}", f"image/{name}") for name in ("avif", "gif", "jpeg", "png", "webp")),
            ("/a.jpg", "image/jpeg"),
            ("/a.svg", "image/svg+xml"),
            ("/a.ico", "image/vnd.microsoft.icon"),
            *((f"/a.{name}", f"audio/{name}") for name in ("aac", "flac", "ogg", "wav")),
            ("/a.mp3", "audio/mpeg"),
            ("/a.m4a", "audio/mp4"),
            *((f"/a.{name}", "audio/ogg") for name in ("oga", "opus")),
            ("/a.gz", "application/octet-stream"),
            ("/a", "application/octet-stream"),
            ("/a.xml/", "application/octet-stream"),
            ("/", "application/octet-stream"),
        ):
            with self.subTest(path):
                self.assertIn(("Content-Type", media_type), planned(Response(), path=path).headers)

    def test_no_content(self):
        for status in (204, 304):
            for method in ("GET", "HEAD"):
                with self.subTest(status, method=method):
                    plan = planned(Response(b"12345", status), method=method)
                    self.assertEqual(self.names(plan), ["Date", "Server"])
                    self.assertEqual(plan.body, b"")
                    self.assertFalse(plan.closes)

    def test_a_205_has_no_content_and_says_so(self):
        for arguments in ({}, {"compress": "gzip"}, {"chunked": 2}, {"rate": 1}):
            for method in ("GET", "HEAD", "POST"):
                with self.subTest(arguments, method=method):
                    plan = planned(Response(b"12345", 205, **arguments), method=method)
                    self.assertEqual(self.names(plan), ["Date", "Server", "Content-Length"])
                    self.assertEqual(plan.values("content-length"), ["0"])
                    self.assertEqual(b"".join(plan.timeline), plan.head)
                    self.assertFalse(plan.closes)
        self.assertTrue(planned(Response(status=205, without=["Content-Length"])).closes)
        self.assertTrue(planned(Response(b"1", 205, headers={"Content-Length": "1"})).closes)

    def test_head_has_the_fields_of_get(self):
        response = Response(b"12345", headers={"ETag": '"1"'})
        get, head = planned(response), planned(response, method="HEAD")
        self.assertEqual(get.headers, head.headers)
        self.assertEqual((get.body, head.body), (b"12345", b""))

    def test_connection(self):
        for version, persistent, headers, sent in (
            ("1.1", True, {}, None),
            ("1.1", False, {}, "close"),
            ("1.0", True, {}, "keep-alive"),
            ("1.0", False, {}, "close"),
            ("1.1", True, {"Content-Length": "4"}, "close"),
            ("1.1", True, {"Content-Length": "5"}, None),
            ("1.1", True, {"Transfer-Encoding": "chunked"}, "close"),
            ("1.1", True, {"Connection": "close"}, "close"),
            ("1.1", True, {"Connection": "x,\tClose"}, "x,\tClose"),
            ("1.1", True, {"Connection": "closed"}, "closed"),
            ("1.1", False, {"Connection": "keep-alive"}, "keep-alive"),
            ("1.0", True, {"Connection": "keep-alive"}, "keep-alive"),
            ("1.0", True, {"Connection": "x"}, "x"),
            ("1.0", True, {"Connection": "close, keep-alive"}, "close, keep-alive"),
        ):
            with self.subTest(version, persistent=persistent, headers=headers):
                plan = planned(
                    Response(b"12345", headers=headers), version=version, persistent=persistent
                )
                self.assertEqual(dict(plan.headers).get("Connection"), sent)
                closing = ("close", "x,\tClose", "x", "close, keep-alive")
                closes = not persistent or sent in closing
                self.assertEqual(plan.closes, closes)

    def test_body_of_unknown_length_ends_with_the_connection(self):
        for headers in ([], [("Content-Length", "5"), ("Content-Length", "6")]):
            with self.subTest(headers):
                without = [] if headers else ["Content-Length"]
                response = Response(b"12345", headers=headers, without=without)
                self.assertTrue(planned(response).closes)
                self.assertFalse(planned(response, method="HEAD").closes)

    def test_connection_left_out(self):
        response = Response(without=["connection", "transfer-encoding"])
        self.assertFalse(planned(response).closes)
        self.assertTrue(planned(response, version="1.0").closes)
        self.assertIn("Content-Length", self.names(planned(response)))

    def test_no_length_beside_a_transfer_coding(self):
        plan = planned(Response(b"12345", headers={"Transfer-Encoding": "chunked"}))
        self.assertNotIn("Content-Length", self.names(plan))

    def test_chunks_take_the_place_of_a_length(self):
        for version, method, headers, without, framing, chunked, closes in (
            ("1.1", "GET", {}, [], [("Transfer-Encoding", "chunked")], 4, False),
            ("1.1", "HEAD", {}, [], [("Transfer-Encoding", "chunked")], None, False),
            ("1.0", "GET", {}, [], [("Content-Length", "5")], None, False),
            ("1.1", "GET", {}, ["content-length"], [("Transfer-Encoding", "chunked")], 4, False),
            ("1.1", "GET", {}, ["Transfer-Encoding"], [], 4, True),
            ("1.1", "GET", {"Transfer-Encoding": "Chunked"}, [], [], 4, False),
            ("1.1", "GET", {"Transfer-Encoding": "gzip, chunked"}, [], [], 4, True),
            (
                *("1.1", "GET", {"Content-Length": "5"}, []),
                *([("Content-Length", "5"), ("Transfer-Encoding", "chunked")], 4, True),
            ),
        ):
            with self.subTest(version, method=method, headers=headers, without=without):
                response = Response(b"12345", chunked=4, headers=headers, without=without)
                plan = planned(response, version=version, method=method)
                names = ("Content-Length", "Transfer-Encoding")
                found = [field for field in plan.headers if field[0] in names]
                self.assertEqual(found, framing or list(headers.items()))
                self.assertEqual((plan.chunked, plan.closes), (chunked, closes))

    def test_content_coding(self):
        for coding, wbits in (("gzip", 31), ("deflate", 15)):
            with self.subTest(coding):
                response = Response(b"12345" * 100, compress=coding)
                plan = planned(response)
                fields = dict(plan.headers)
                self.assertEqual(fields["Content-Encoding"], coding)
                self.assertEqual(fields["Content-Length"], str(len(plan.sent)))
                self.assertEqual(zlib.decompress(plan.sent, wbits), b"12345" * 100)
                self.assertEqual((plan.compress, plan.body), (coding, response.body))
                self.assertEqual(planned(response, method="HEAD").headers, plan.headers)
                self.assertIs(planned(response, "Range: x").sent, plan.sent)  # made once
                self.assertEqual(planned(plan.response).head, plan.head)  # as a step, later
                self.assertEqual(planned(plan.response).sent, plan.sent)
                response = Response(b"{{port}}", template=True, compress=coding)
                self.assertEqual(zlib.decompress(planned(response).sent, wbits), b"8000")
        for response, sent in (
            (Response(compress="gzip", headers={"Content-Encoding": "br"}), ["br"]),
            (Response(compress="gzip", without=["content-encoding"]), []),
        ):
            plan = planned(response)
            self.assertEqual(plan.values("content-encoding"), sent)
            self.assertEqual(zlib.decompress(plan.sent, 31), b"")

    def test_what_has_no_content_has_no_coding_either(self):
        for response in (
            Response(b"x", 204, compress="gzip", chunked=1),
            Response(b"x", 304, compress="gzip", chunked=1),
        ):
            plan = planned(response)
            self.assertEqual(self.names(plan), ["Date", "Server"])
            self.assertEqual((plan.compress, plan.chunked, plan.sent), (None, None, b""))

    def test_a_transfer_coding_of_nothing_ends_with_the_connection(self):
        for status in (204, 304):
            response = Response(status=status, headers={"Transfer-Encoding": "chunked"})
            self.assertTrue(planned(response).closes)
            self.assertFalse(planned(Response(status=status, chunked=5)).closes)

    def test_a_fault_is_not_announced(self):
        for fault in ("close", "reset at 50%", "stall at headers"):
            with self.subTest(fault):
                plan = planned(Response(b"12345", fault=fault))
                self.assertEqual(plan.headers, planned(Response(b"12345")).headers)
                self.assertTrue(plan.closes)

    def test_a_response_as_it_is(self):
        for body, arguments, status in (
            (b"HTTP/1.1 410 Gone\r\n\r\n", {}, 410),
            (b"HTTP/1.1  302\r\n\r\n", {}, 302),
            (b"ICY 404 Not Found\r\n\r\n", {}, 200),
            (b"garbage", {"status": 503}, 503),
            (b"", {}, 200),
        ):
            with self.subTest(body):
                response = Response(
                    body,
                    asis=True,
                    chunked=3,
                    compress="gzip",
                    **{"headers": {"ETag": '"1"'}, "delay": 1, "reason": "Fine", **arguments},
                )
                plan = planned(response, 'If-None-Match: "1"', "Range: bytes=0-1", version="1.0")
                self.assertEqual((plan.head, plan.sent, plan.closes), (b"", body, True))
                self.assertEqual((plan.status, plan.reason, plan.headers), (status, None, ()))
                self.assertEqual((plan.chunked, plan.compress, plan.delay), (None, None, 1))
        hinted = b"HTTP/1.1 103 Hints\r\nA: 1\r\n\r\nHTTP/1.1 204 No\nB : \xff \r\nnone\r\n\r\nC: 3"
        plan = planned(Response(hinted, asis=True))
        self.assertEqual((plan.status, plan.headers), (204, (("B", "\udcff"),)))
        template = Response(b"HTTP/1.1 200 {{port}}\r\n\r\n", asis=True, template=True)
        self.assertEqual(planned(template).sent, b"HTTP/1.1 200 8000\r\n\r\n")

    def test_templates(self):
        response = Response(
            b"{{base_url}} {{host}} {{port}} {{other}} {{ host }} {host}",
            reason="at {{port}}",
            headers={"Location": "{{base_url}}/x", "X": "{{x}}"},
            template=True,
        )
        plan = planned(response)
        self.assertEqual(
            plan.body, b"http://127.0.0.1:8000 127.0.0.1 8000 {{other}} {{ host }} {host}"
        )
        self.assertEqual(plan.reason, "at 8000")
        self.assertEqual(
            plan.headers[:2], (("Location", "http://127.0.0.1:8000/x"), ("X", "{{x}}"))
        )
        self.assertIn(("Content-Length", str(len(plan.body))), plan.headers)

    def test_without_template_only_headers_are_expanded(self):
        plan = planned(Response(b"{{host}}", headers={"X": "{{host}}"}))
        self.assertEqual((plan.body, plan.headers[0]), (b"{{host}}", ("X", "127.0.0.1")))

    def test_template_of_another_host(self):
        plan = planned(
            Response(b"{{base_url}} {{host}} {{port}}", template=True),
            path="https://Example.com/feed",
        )
        self.assertEqual(plan.body, b"https://example.com example.com 443")

    def test_template_in_other_encodings(self):
        for codec in ("utf-16", "utf-16-be", "utf-32", "cp500"):
            with self.subTest(codec):
                text = "<?xml version='1.0' encoding='{}'?><a>{}</a>"
                plan = planned(
                    Response(text.format(codec, "{{host}}").encode(codec), template=True)
                )
                self.assertEqual(plan.body.decode(codec), text.format(codec, "127.0.0.1"))


class ConditionTest(unittest.TestCase):
    """RFC 9110 section 13, as a table of conditions and what they make of a 200."""

    BEFORE, MODIFIED, AFTER = (email.utils.formatdate(NOW + s, usegmt=True) for s in (-60, 0, 60))
    BOTH = {"ETag": '"v1"', "Last-Modified": MODIFIED}

    def check(self, headers, table, method="GET", **arguments):
        for status, *fields in table:
            with self.subTest(fields, headers=headers):
                plan = planned(Response(b"x", headers=headers, **arguments), *fields, method=method)
                self.assertEqual(plan.status, status)

    def test_if_none_match(self):
        self.check(
            {"ETag": '"v1"'},
            [
                (304, 'If-None-Match: "v1"'),
                (304, 'if-none-match:"v1" '),
                (304, 'If-None-Match: W/"v1"'),
                (304, "If-None-Match: *"),
                (304, 'If-None-Match: "v0", "v1"'),
                (304, 'If-None-Match: "v0",W/"v1","v2"'),
                (304, 'If-None-Match: "v0"', 'If-None-Match: "v1"'),
                (200, 'If-None-Match: "v2"'),
                (200, 'If-None-Match: "V1"'),
                (200, "If-None-Match: v1"),
                (200, "If-None-Match:"),
                (200, 'If-None-Match: "v1'),
                (200, 'If-None-Match: "v1x"'),
                (200, 'If-None-Match: "x""v1 "'),
            ],
        )
        self.check(
            {"ETag": 'W/"v1"'}, [(304, 'If-None-Match: "v1"'), (304, 'If-None-Match: W/"v1"')]
        )
        self.check(
            {"ETag": '"a,b"'}, [(304, 'If-None-Match: "a,b"'), (200, 'If-None-Match: "a", "b"')]
        )
        self.check({"ETag": "v1"}, [(304, "If-None-Match: v1"), (200, 'If-None-Match: "v1"')])
        self.check({}, [(304, "If-None-Match: *"), (200, 'If-None-Match: "v1"')])
        self.check({"ETag": '"caf\u00e9"'}, [(304, 'If-None-Match: "caf\xc3\xa9"')])

    def test_if_modified_since(self):
        self.check(
            {"Last-Modified": self.MODIFIED},
            [
                (304, f"If-Modified-Since: {self.MODIFIED}"),
                (304, f"If-Modified-Since: {self.AFTER}"),
                (200, f"If-Modified-Since: {self.BEFORE}"),
                (304, "If-Modified-Since: Saturday, 07-Mar-09 10:00:00 GMT"),
                (304, "If-Modified-Since: Sat Mar  7 10:00:00 2009"),
                (200, "If-Modified-Since: Sat Mar  7 09:59:59 2009"),
                (200, "If-Modified-Since: yesterday"),
                (200, "If-Modified-Since:"),
                (200, "If-Modified-Since: 0"),
                (200, "If-Modified-Since: Sat, 07 Mar 2009 10:00"),
                (200, "If-Modified-Since: Sat, 07 Mar 2009 12:00:00 +0100"),
                (200, "If-Modified-Since: Sun, 32 Mar 2009 10:00:00 GMT"),
                (200, "If-Modified-Since: Mon, 30 Feb 2099 10:00:00 GMT"),
                (200, "If-Modified-Since: Xyz, 07 Mar 2099 10:00:00 GMT"),
                (200, "If-Modified-Since: Sat, 01 Jan 0050 00:00:00 GMT"),
                (304, "If-Modified-Since: Wednesday, 11-Mar-09 10:00:00 GMT"),
                (200, "If-Modified-Since: Sat, 07 Mar 2009 25:61:00 GMT"),
                (200, f"If-Modified-Since: {self.AFTER}, {self.AFTER}"),
                (200, f"If-Modified-Since: {self.AFTER}", f"If-Modified-Since: {self.AFTER}"),
            ],
        )
        self.check({}, [(200, f"If-Modified-Since: {self.AFTER}")])
        self.check(
            {"Last-Modified": "then"},
            [(304, "If-Modified-Since: then"), (200, f"If-Modified-Since: {self.AFTER}")],
        )

    def test_precedence(self):
        self.check(
            self.BOTH,
            [
                (304, 'If-None-Match: "v1"', f"If-Modified-Since: {self.BEFORE}"),
                (200, 'If-None-Match: "v2"', f"If-Modified-Since: {self.MODIFIED}"),
                (412, 'If-Match: "v2"', 'If-None-Match: "v1"'),
                (304, 'If-Match: "v1"', 'If-None-Match: "v1"'),
                (
                    304,
                    'If-Match: "v1"',
                    f"If-Unmodified-Since: {self.BEFORE}",
                    'If-None-Match: "v1"',
                ),
            ],
        )

    def test_if_match_compares_strongly(self):
        self.check(
            {"ETag": '"v1"'},
            [(200, 'If-Match: "v1"'), (200, "If-Match: *"), (200, 'If-Match: "v0", "v1"')],
        )
        self.check({"ETag": '"v1"'}, [(412, 'If-Match: "v2"'), (412, 'If-Match: W/"v1"')])
        self.check(
            {"ETag": 'W/"v1"'},
            [(412, 'If-Match: W/"v1"'), (412, 'If-Match: "v1"'), (200, "If-Match: *")],
        )
        self.check({}, [(412, 'If-Match: "v1"'), (200, "If-Match: *")])

    def test_if_unmodified_since(self):
        self.check(
            self.BOTH,
            [
                (200, f"If-Unmodified-Since: {self.MODIFIED}"),
                (200, f"If-Unmodified-Since: {self.AFTER}"),
                (412, f"If-Unmodified-Since: {self.BEFORE}"),
                (200, "If-Unmodified-Since: never"),
            ],
        )
        self.check({}, [(200, f"If-Unmodified-Since: {self.BEFORE}")])

    def every_condition(self, not_modified, failed):
        """A condition of each kind, and what a response with that validator becomes of it."""
        return [
            (not_modified, 'If-None-Match: "v1"'),
            (not_modified, "If-None-Match: *"),
            (not_modified, f"If-Modified-Since: {self.MODIFIED}"),
            (failed, 'If-Match: "v2"'),
            (failed, f"If-Unmodified-Since: {self.BEFORE}"),
        ]

    def test_methods(self):
        for method in ("GET", "HEAD"):
            self.check(self.BOTH, self.every_condition(304, 412), method=method)
        for method in ("DELETE", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"):
            for status in (200, 201, 204, 412):
                table = self.every_condition(status, status)
                self.check(self.BOTH, table, method=method, status=status)

    def test_statuses(self):
        for status in (200, 201, 202, 203, 204, 205, 206, 226, 299):
            self.check(self.BOTH, self.every_condition(304, 412), status=status)
        for status in (300, 301, 304, 401, 404, 410, 412, 500, 503):
            self.check(self.BOTH, self.every_condition(status, status), status=status)

    def test_ignore(self):
        self.check(
            self.BOTH,
            [
                (200, 'If-None-Match: "v1"'),
                (304, f"If-Modified-Since: {self.MODIFIED}"),
                (304, 'If-None-Match: "v1"', f"If-Modified-Since: {self.MODIFIED}"),
            ],
            ignore=["If-None-MATCH"],
        )

    def test_fields_of_a_304(self):
        kept = [
            ("Cache-Control", "no-cache"),
            ("content-location", "/x"),
            ("Expires", "0"),
            ("Vary", "A"),
            ("ETag", '"v1"'),
        ]
        others = [
            ("Last-Modified", self.MODIFIED),
            ("Content-Type", "text/xml"),
            ("X-Other", "1"),
            ("Content-Length", "1"),
        ]
        plan = planned(Response(b"x", headers=[*kept, *others]), 'If-None-Match: "v1"')
        self.assertEqual(plan.headers, (*kept, ("Date", NOW_DATE), PlanTest.SERVER))
        self.assertEqual(plan.body, b"")
        plan = planned(Response(b"x", headers=others), "If-None-Match: *")
        self.assertEqual(plan.headers[0], ("Last-Modified", self.MODIFIED))

    def test_a_304_keeps_the_date_and_the_server_of_the_200(self):
        given = (("Date", "then"), ("Server", "other"), ("ETag", '"v1"'))
        plan = planned(Response(headers=given), 'If-None-Match: "v1"')
        self.assertEqual(plan.headers, given)

    def test_a_304_without_an_etag(self):
        response = Response(headers={"Last-Modified": self.MODIFIED}, without=["ETag"])
        plan = planned(response, f"If-Modified-Since: {self.MODIFIED}")
        self.assertIn(("Last-Modified", self.MODIFIED), plan.headers)

    def test_a_304_has_no_reason_of_the_200_and_obeys_without(self):
        response = Response(reason="Fine", headers={"ETag": '"v1"'}, without=["Date"])
        plan = planned(response, 'If-None-Match: "v1"')
        self.assertIsNone(plan.reason)
        self.assertEqual([name for name, _ in plan.headers], ["ETag", "Server"])


class RangeTest(unittest.TestCase):
    BODY = b"0123456789"

    def test_parts(self):
        for asked, content_range, body in (
            ("bytes=0-3", "bytes 0-3/10", b"0123"),
            ("bytes=3-3", "bytes 3-3/10", b"3"),
            ("bytes=4-", "bytes 4-9/10", b"456789"),
            ("bytes=0-", "bytes 0-9/10", BODY := self.BODY),
            ("bytes=8-99", "bytes 8-9/10", b"89"),
            ("bytes=2-18446744073709551615", "bytes 2-9/10", b"23456789"),
            ("bytes=-3", "bytes 7-9/10", b"789"),
            ("bytes=-99", "bytes 0-9/10", BODY),
            ("Bytes=0-3", "bytes 0-3/10", b"0123"),
            ("bytes= 0-3 ,, ", "bytes 0-3/10", b"0123"),
            ("bytes=" + "0" * 9999 + "1-3", "bytes 1-3/10", b"123"),
        ):
            with self.subTest(asked[:40]):
                plan = planned(Response(BODY, reason="Fine"), f"Range: {asked}")
                self.assertEqual((plan.status, plan.reason, plan.body), (206, None, body))
                fields = dict(plan.headers)
                self.assertEqual(fields["Content-Range"], content_range)
                self.assertEqual(fields["Content-Length"], str(len(body)))
                self.assertFalse(plan.closes)

    def test_no_such_part(self):
        for asked, body in (
            ("bytes=10-", self.BODY),
            ("bytes=10-20", self.BODY),
            (f"bytes={'9' * 9999}-", self.BODY),
            ("bytes=-0", self.BODY),
            ("bytes=-0", b""),
            ("bytes=0-", b""),
        ):
            with self.subTest(asked[:40], body=body):
                plan = planned(Response(body, delay=1, headers={"ETag": '"1"'}), f"Range: {asked}")
                self.assertEqual((plan.status, plan.delay), (416, 1))
                self.assertEqual(dict(plan.headers)["Content-Range"], f"bytes */{len(body)}")
                self.assertNotIn("ETag", dict(plan.headers))
                self.assertRegex(plan.body, rb"^Range asks for '.*' of \d+ bytes\n$")

    def test_the_whole(self):
        for field in (
            *("Range: bytes=0-1,3-4", "Range: bytes=4-3", "Range: bytes=", "Range: bytes=-"),
            *("Range: bytes=a-b", "Range: bytes=1", "Range: lines=0-3", "Range: 0-3"),
            *("Range: bytes=0x1-2", "Range: bytes=1-2-3", "Range: bytes=\xb2-", "If-Range: x"),
        ):
            with self.subTest(field):
                plan = planned(Response(self.BODY), field)
                self.assertEqual((plan.status, plan.body), (200, self.BODY))
        for response, method in (
            (Response(self.BODY), "POST"),
            (Response(self.BODY, 203), "GET"),
            (Response(self.BODY, 404), "GET"),
            (Response(self.BODY, ignore=["range"]), "GET"),
            (Response(self.BODY, headers={"Accept-Ranges": "None"}), "GET"),
        ):
            with self.subTest(response, method=method):
                plan = planned(response, "Range: bytes=0-1", method=method)
                self.assertEqual((plan.status, plan.body), (response.status, self.BODY))
        self.assertEqual(planned(Response(b""), "Range: bytes=-5").status, 200)
        head = planned(Response(self.BODY), "Range: bytes=0-1", method="HEAD")
        self.assertEqual((head.status, dict(head.headers)["Content-Length"]), (200, "10"))

    def test_if_range(self):
        date = "Sat, 07 Mar 2009 09:00:00 GMT"
        for etag, validator, status in (
            ('"1"', '"1"', 206),
            ('"1"', '"2"', 200),
            ('"1"', 'W/"1"', 200),
            ('W/"1"', 'W/"1"', 200),
            ('W/"1"', '"1"', 200),
            ("unquoted", "unquoted", 206),
            ('"1"', "*", 200),
            ('"1"', '"2", "1"', 200),
            ('"1"', date, 206),
            ('"1"', "Sat, 07 Mar 2009 09:00:01 GMT", 200),
            ('"1"', "Saturday, 07-Mar-09 09:00:00 GMT", 200),
        ):
            with self.subTest(etag, validator=validator):
                headers = {"ETag": etag, "Last-Modified": date}
                fields = ("Range: bytes=0-1", f"If-Range: {validator}")
                response = Response(self.BODY, headers=headers)
                self.assertEqual(planned(response, *fields).status, status)
                ignoring = Response(self.BODY, headers=headers, ignore=["if-range"])
                self.assertEqual(planned(ignoring, *fields).status, 206)
        self.assertEqual(
            planned(Response(self.BODY), "Range: bytes=0-1", "If-Range: x").status, 200
        )

    def test_what_is_not_about_the_content_stays_in_an_error(self):
        fields = [("Server", "x"), ("ETag", '"1"'), ("Connection", "close"), ("Age", "1")]
        response = Response(
            b"x",
            headers=fields,
            without=["date"],
            delay=1,
            rate=2,
            chunked=3,
            compress="gzip",
            fault="close",
        )
        for field, status in (("Range: bytes=99-", 416), ('If-Match: "2"', 412)):
            plan = planned(response, field)
            names = [name for name, _ in plan.headers]
            self.assertEqual(plan.status, status)
            self.assertEqual(
                [name for name in names if name != "Content-Range"],
                ["Content-Type", "Server", "Connection", "Content-Length"],
            )
            self.assertEqual((plan.delay, plan.rate, plan.fault), (1, 2, "close"))
            self.assertEqual((plan.chunked, plan.compress, plan.closes), (None, None, True))
            self.assertEqual(plan.values("content-type"), ["text/plain; charset=utf-8"])

    def test_conditions_come_first(self):
        response = Response(self.BODY, headers={"ETag": '"1"'})
        for condition, status in (('If-None-Match: "1"', 304), ('If-Match: "2"', 412)):
            self.assertEqual(planned(response, "Range: bytes=0-1", condition).status, status)

    def test_a_part_of_the_coded_body(self):
        response = Response(self.BODY, compress="gzip")
        whole, part = planned(response), planned(response, "Range: bytes=3-")
        self.assertEqual(part.sent, whole.sent[3:])
        size = len(whole.sent)
        fields = dict(part.headers)
        self.assertEqual(fields["Content-Range"], f"bytes 3-{size - 1}/{size}")
        self.assertEqual(fields["Content-Encoding"], "gzip")
        self.assertEqual(planned(part.response).sent, part.sent)

    def test_given_fields(self):
        for given, sent in (("10", "2"), ("99", "99")):
            response = Response(self.BODY, headers={"Content-Length": given})
            plan = planned(response, "Range: bytes=0-1")
            self.assertEqual(plan.values("content-length"), [sent])
            self.assertEqual(plan.closes, given == "99")
        response = Response(self.BODY, headers={"Content-Range": "bytes 1-2/3"})
        self.assertEqual(
            planned(response, "Range: bytes=0-1").values("content-range"), ["bytes 1-2/3"]
        )
        response = Response(self.BODY, without=["content-range"])
        self.assertEqual(planned(response, "Range: bytes=0-1").values("content-range"), [])


class WireTest(ServerTestCase):
    def test_a_small_response_is_one_send(self):
        plan = planned(
            Response(b"<rss/>", headers=[("A", "1"), ("a", ""), ("B", "x  y")], without=["Server"])
        )
        self.assertEqual(
            plan.timeline,
            [
                (
                    b"HTTP/1.1 200 OK\r\nA: 1\r\na: \r\nB: x  y\r\n"
                    b"Date: Sat, 07 Mar 2009 10:00:00 GMT\r\n"
                    b"Content-Type: application/xml\r\nContent-Length: 6\r\n\r\n<rss/>"
                )
            ],
        )

    def test_reasons(self):
        for arguments, line in (
            ({"status": 404}, b"HTTP/1.1 404 Not Found"),
            ({"status": 404, "reason": "Gone fishing"}, b"HTTP/1.1 404 Gone fishing"),
            ({"status": 599}, b"HTTP/1.1 599 "),
            ({"status": 200, "reason": "caf\u00e9"}, b"HTTP/1.1 200 caf\xc3\xa9"),
            ({"status": 413}, b"HTTP/1.1 413 Content Too Large"),
            ({"status": 414}, b"HTTP/1.1 414 URI Too Long"),
            ({"status": 416}, b"HTTP/1.1 416 Range Not Satisfiable"),
            ({"status": 422}, b"HTTP/1.1 422 Unprocessable Content"),
        ):
            with self.subTest(arguments):
                [sent] = planned(Response(**arguments)).timeline
                self.assertEqual(sent.partition(b"\r\n")[0], line)

    def test_a_large_body_is_not_copied(self):
        body = bytes(1_000_000)
        self.assertIs(planned(Response(body)).sent, body)

    def test_slowness_chunks_and_faults(self):
        head, body = object(), b"0123456789"
        end = b"0\r\n\r\n"
        for arguments, expected in (
            ({"delay": 2.5}, [2.5, head, body]),
            ({"chunked": 4}, [head, b"4\r\n0123\r\n4\r\n4567\r\n2\r\n89\r\n", end]),
            ({"chunked": 5}, [head, b"5\r\n01234\r\n5\r\n56789\r\n", end]),
            ({"chunked": 99}, [head, b"a\r\n0123456789\r\n", end]),
            ({"rate": 40}, [head, 0.1, b"0123", 0.2, b"4567", 0.25, b"89"]),
            ({"rate": 58}, [head, 0.086207, b"01234", 0.172414, b"56789"]),
            ({"rate": 1000}, [head, 0.01, body]),
            ({"rate": 2, "fault": "close at 2"}, [head, 0.5, b"0", 1, b"1", "close"]),
            ({"fault": "close"}, ["close"]),
            ({"fault": "reset at start", "delay": 1}, [1, "reset"]),
            ({"fault": "stall at headers"}, [head, "stall"]),
            ({"fault": "stall at 0%"}, [head, "stall"]),
            ({"fault": "close at 4"}, [head, b"0123", "close"]),
            ({"fault": "close at 10"}, [head, body, "close"]),
            ({"fault": "close at end"}, [head, body, "close"]),
            ({"fault": "close at 11"}, [head, body, "close"]),
            ({"fault": "reset at 59%"}, [head, b"01234", "reset"]),
            ({"fault": "reset at 9%"}, [head, "reset"]),
            ({"fault": "reset at 10%"}, [head, b"0", "reset"]),
            ({"fault": "reset at 100%"}, [head, body, "reset"]),
            ({"chunked": 4, "fault": "close at 6"}, [head, b"4\r\n0123\r\n4\r\n45", "close"]),
            ({"chunked": 4, "fault": "close at 4"}, [head, b"4\r\n0123\r\n", "close"]),
            (
                {"chunked": 10, "fault": "stall at end"},
                [head, b"a\r\n0123456789\r\n", end, "stall"],
            ),
            (
                {"chunked": 4, "fault": "stall at 100%"},
                [head, b"4\r\n0123\r\n4\r\n4567\r\n2\r\n89\r\n", "stall"],
            ),
            (
                {"chunked": 3, "rate": 40, "delay": 1},
                [
                    *(1, head, 0.1, b"3\r\n012\r\n3\r\n3", 0.2, b"45\r\n3\r\n67"),
                    *(0.25, b"8\r\n1\r\n9\r\n", end),
                ],
            ),
        ):
            with self.subTest(arguments):
                plan = planned(Response(body, **arguments))
                expected = [plan.head if part is head else part for part in expected]
                self.assertEqual(plan.timeline, expected)
        plan = planned(Response(b"", chunked=4))
        self.assertEqual(plan.timeline, [plan.head, b"0\r\n\r\n"])
        plan = planned(Response(body, chunked=4, rate=1), method="HEAD")
        self.assertEqual(plan.timeline, [plan.head])

    def test_lateness_does_not_add_up(self):
        clock = NoTimePasses(self, late=0.04)
        server = self.serve()
        for rate, waits in ((40, [0.1, 0.06, 0.01]), (400, [0.025])):
            with self.subTest(rate):
                server.respond("/", Response(b"0123456789", rate=rate))
                clock.waits.clear()
                self.assertEqual(self.get(server, "/").content, b"0123456789")
                self.assertEqual(clock.waits, waits)

    def test_many_small_chunks(self):
        head, *parts = planned(Response(bytes(2500), chunked=1)).timeline
        self.assertEqual(b"".join(parts), b"1\r\n\0\r\n" * 2500 + b"0\r\n\r\n")
        self.assertEqual(Answer(head + b"".join(parts)).body, bytes(2500))

    def test_six_lines_and_six_arguments_are_the_same_bytes(self):
        body = b"0123456789" * 50 + comment(
            *("Compress: gzip", "Chunked: 100", "Rate: 1000", "Fault: reset at 50%"),
            *("Header: Content-Length: 7", "Without: Date"),
        )
        said = Response(
            body,
            compress="gzip",
            chunked=100,
            rate=1000,
            fault="reset at 50%",
            headers={"Content-Length": "7"},
            without=["Date"],
        )
        read = Response(body, **parse_directives(body).arguments)
        coded = planned(said).sent
        self.assertEqual(zlib.decompress(coded, 31), body)
        half, chunk = len(coded) // 2, b"%x" % min(100, len(coded))
        self.assertLess(half, 100)
        for response in (said, read):
            self.assertEqual(
                planned(response).timeline,
                [
                    (
                        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n"
                        + f"Server: feedtestserver/{feedtestserver.__version__}\r\n".encode()
                        + b"Content-Type: application/xml\r\nContent-Encoding: gzip\r\n"
                        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
                    ),
                    half / 1000,
                    chunk + b"\r\n" + coded[:half],
                    "reset",
                ],
            )


# Fixture lookup


class LookupTest(ServerTestCase):
    def test_file_names(self):
        names = ("x", "a/x", "a/b/x", "my x", "%", "%2e%2e/x", "a+b", ".hidden/x")
        names += ("index.html", "index.xml", "a/index.xml", "empty/x")
        server = self.serve({name: name.encode() for name in names})
        for path, name in (
            ("/x", "x"),
            ("/a/b/x", "a/b/x"),
            ("/", "index.html"),
            ("/a/", "a/index.xml"),
            ("/empty/", None),
            ("/my%20x", "my x"),
            ("/%25", "%"),
            ("/a+b", "a+b"),
            ("/.hidden/x", ".hidden/x"),
            ("/%252e%252e/x", "%2e%2e/x"),
            ("/..", None),
            ("/../x", None),
            (f"/../{os.path.basename(server.directory)}/x", None),
            ("/a/../x", None),
            ("/%2e%2e/x", None),
            ("/a/%2e%2e/x", None),
            ("/a/%2E./x", None),
            ("/./x", None),
            ("/a/.", None),
            ("/a%2Fx", None),
            ("/a/..%2fx", None),
            ("/a%5Cx", None),
            ("/a\\x", None),
            ("/a/..\\x", None),
            ("/x%00", None),
            ("/x%00.xml", None),
            ("//x", None),
            ("/a//x", None),
            ("//", None),
        ):
            with self.subTest(path):
                response = self.get(server, path)
                self.assertEqual(response.status, 200 if name else 404)
                if name:
                    self.assertEqual(response.content.decode(), name)

    def test_file_names_that_are_not_ascii(self):
        for name, path in (("caf\u00e9", "/caf%C3%A9"), ("\udce9", "/%E9")):
            with self.subTest(path):
                try:
                    server = self.serve({name: b"<rss/>"})
                except OSError as error:
                    self.skipTest(f"no file is called {name!a} here: {error}")
                self.assertEqual(self.get(server, path).content, b"<rss/>")

    def test_sidecars(self):
        for lines, status in (
            (b"Status: 410", 410),
            (b"\xef\xbb\xbfStatus: 410\r\n", 410),
            ("Status: 410\n".encode("utf-16"), 410),
            (b"\n \t\n  Status: 410\n", 410),
            (b"Status: 410\n  Gone:\n  forever\n", 410),
            (b"  Status:\n    410\n  A: 1\n", 410),
            (b"", 200),
        ):
            with self.subTest(lines):
                server = self.serve({"a.xml": comment("Status: 404"), "a.xml.headers": lines})
                self.assertEqual(self.get(server, "/a.xml").status, status)

    def test_lines_of_a_sidecar_that_are_no_directives_are_errors(self):
        takes = "a line of a .headers file is KEY: VALUE, such as 'Header: Age: 60'"
        for lines, number, found in (
            (b"HTTP/1.1 200 OK\r\nDate: x\r\nContent-Type: text/xml\r\n\r\n", 1, "HTTP/1.1 200 OK"),
            (b"Status: 404\n\n  indented\n", 3, "indented"),
            (b"\n# prose: with a colon", 2, "# prose: with a colon"),
            (b"<!--\nStatus: 410\n-->", 1, "<!--"),
            (b": x", 1, ": x"),
            (b"Z\xfcrich: x", 1, "Z\u00fcrich: x"),
            (b"x" * 200, 1, "x" * 80),
        ):
            server = self.serve({"a.json": b"{}", "a.json.headers": lines})
            self.assertEqual(self.get(server, "/a.json").status, 500)
            path = os.path.join(server.directory, "a.json.headers")
            with self.subTest(lines):
                self.assertEqual(
                    server.errors, [f"{path}, line {number}: found {found!r}; {takes}"]
                )

    def test_links_out_are_not_followed(self):
        outside = self.make_directory({"secret.xml": b"<secret/>"})
        server = self.serve({"in/feed.xml": b"<in/>", "feed.xml": b"<rss/>"})
        directory = pathlib.Path(server.directory)
        self.make_link(directory / "out", outside)
        self.make_link(directory / "out.xml", outside / "secret.xml")
        self.make_link(directory / "feed.xml.headers", outside / "secret.xml")
        self.make_link(directory / "link.xml", "in/feed.xml")
        for path, status in (
            ("/out/secret.xml", 404),
            ("/out.xml", 404),
            ("/feed.xml", 404),
            ("/link.xml", 200),
        ):
            with self.subTest(path):
                response = self.get(server, path)
                self.assertEqual(response.status, status)
                self.assertNotIn(b"<secret/>", response.content)
        names = [fixture.name for fixture in server.fixtures()]
        self.assertEqual(names, ["in/feed.xml", "link.xml"])

    def test_nothing_but_regular_files_is_served(self):
        server = self.serve({"folder/feed.xml": b"x", "feed.json": b"{}", "feed.json.headers": b""})
        if hasattr(os, "mkfifo"):
            os.mkfifo(os.path.join(server.directory, "pipe.xml"))
            os.mkfifo(os.path.join(server.directory, "folder", "feed.xml.headers"))
            self.assertEqual(self.get(server, "/folder/feed.xml").content, b"x")
        for path in (
            "/folder",
            "/pipe.xml",
            "/feed.json.headers",
            "/" + "x" * 3000,
            "/CON",
            "/C:/x",
            "/x%0d%0aX:1",
        ):
            with self.subTest(path):
                self.assertEqual(self.get(server, path).status, 404)
        self.assertEqual(server.errors, [])

    def test_names_that_begin_with_a_dot_are_served_and_not_listed(self):
        server = self.serve({".hidden.xml": b"1", ".folder/feed.xml": b"2", "feed.xml": b"3"})
        self.assertEqual(self.get(server, "/.hidden.xml").content, b"1")
        self.assertEqual(self.get(server, "/.folder/feed.xml").content, b"2")
        self.assertEqual([fixture.name for fixture in server.fixtures()], ["feed.xml"])

    def test_fixtures(self):
        server = self.serve(
            {
                "b/x y.xml": comment("Expect: 1"),
                "a.json": b"{}",
                "a.json.headers": b"Expect: 2",
                "b/c.txt": b"",
            }
        )
        fixtures = server.fixtures()
        self.assertEqual([fixture.name for fixture in fixtures], ["a.json", "b/c.txt", "b/x y.xml"])
        self.assertEqual([fixture.directives["Expect"] for fixture in fixtures], ["2", None, "1"])
        self.assertEqual(fixtures[2].path, pathlib.Path(server.directory, "b", "x y.xml"))
        self.assertEqual(fixtures[2].url, f"{server.base_url}/b/x%20y.xml")
        self.assertEqual(repr(fixtures[2]), "<Fixture b/x y.xml>")
        self.assertEqual([fixture.name for fixture in server.fixtures("*.json")], ["a.json"])
        self.assertEqual(server.fixtures("*.none"), [])

    def let_time_pass(self):
        """Have files look older than they are, so that what they say is kept."""
        now = time.time
        change = mock.patch("time.time", lambda: now() + 10)
        change.start()
        self.addCleanup(change.stop)

    def test_a_changed_file_is_served_changed(self):
        for kept in (False, True):
            if kept:
                self.let_time_pass()
            with self.subTest(kept=kept):
                self.check_changes()

    def test_a_request_that_is_sent_after_a_change_gets_what_was_changed(self):
        """Also if the server looks at the file for others just then."""
        server = self.serve({"feed.xml": b"<old/>"})
        busy, go_on, late = threading.Event(), threading.Event(), []
        requests = iter(("first", "second", "third"))

        def clock():  # which is called for each request, in the thread that serves
            request = next(requests, None)
            if request == "first":
                busy.set()
                go_on.wait(PATIENCE)
            elif request == "third":
                pathlib.Path(server.directory, "feed.xml").write_bytes(b"<changed/>")
                late.append(connect(server))
                late[0].sendall(LAST)
            return time.time()

        with connect(server) as early, connect(server) as connection:
            self.get(server, "/feed.xml")  # so that these are accepted
            server.clock = clock
            early.sendall(HEAD + b"\r\n")
            self.assertTrue(busy.wait(PATIENCE))
            connection.sendall(HEAD + b"\r\n" + LAST)
            with connect(server):
                go_on.set()
                self.assertIn(b"<old/>", read_all(connection))
        with late[0]:
            self.assertEqual(Answer(read_all(late[0])).body, b"<changed/>")

    def check_changes(self):
        server = self.serve({"feed.xml": comment("Status: 404")})
        path = pathlib.Path(server.directory, "feed.xml")
        sidecar = pathlib.Path(f"{path}.headers")

        def status():
            return self.get(server, "/feed.xml").status

        self.assertEqual(status(), 404)
        path.write_bytes(comment("Status: 410 Gone"))
        self.assertEqual(status(), 410)
        sidecar.write_bytes(b"Status: 403")
        self.assertEqual(status(), 403)
        sidecar.write_bytes(b"Status: 402 Other")
        self.assertEqual(status(), 402)
        sidecar.unlink()
        self.assertEqual(status(), 410)
        new = path.with_name("new.xml")
        new.write_bytes(comment("Status: 411 Gone"))
        for each in (new, path):
            os.utime(each, (NOW, NOW))
        self.assertEqual(status(), 410)
        os.replace(new, path)
        self.assertEqual(status(), 411)
        path.unlink()
        self.assertEqual(status(), 404)

    def test_all_requests_for_a_file_that_does_not_change_share_one_body(self):
        for kept in (False, True):
            if kept:
                self.let_time_pass()
            server = self.serve({"feed.xml": b"<rss/>"})
            for _ in range(2):
                self.get(server, "/feed.xml")
            first, second = (request.response.body for request in server.requests)
            with self.subTest(kept=kept):
                self.assertIs(first, second)

    def test_a_body_is_shared_until_anything_of_a_new_file_changes(self):
        server = self.serve({"feed.xml": b"one"})
        path = pathlib.Path(server.directory, "feed.xml")
        sidecar = pathlib.Path(f"{path}.headers")
        for file, data, seen in (
            (path, b"one", (b"one", 200, None)),
            (path, b"two", (b"two", 200, None)),
            (sidecar, b"Status: 403", (b"two", 403, None)),
            (sidecar, b"Status: 404", (b"two", 404, None)),
            (sidecar, b"Description: a", (b"two", 200, "a")),
            (sidecar, b"Description: b", (b"two", 200, "b")),
            (path, b"one", (b"one", 200, "b")),
        ):
            file.write_bytes(data)
            with self.subTest(data):
                answers = [self.get(server, "/feed.xml") for _ in range(2)]
                first, second = (request.response for request in server.requests[-2:])
                self.assertIs(first.body, second.body)
                for answer in answers:
                    found = answer.content, answer.status, second.description
                    self.assertEqual(found, seen)

    @unittest.skipUnless(os.name == "nt", "only Windows drops dots and blanks")
    def test_dots_and_blanks_at_the_end_make_another_name(self):
        server = self.serve({"feed.xml": b"<rss/>", "sub/feed.xml": b"<sub/>"})
        for path in (
            "/feed.xml.",
            "/feed.xml%20",
            "/sub./feed.xml",
            "/sub%20/feed.xml",
            "/FEED.xml.",
        ):
            with self.subTest(path):
                self.assertEqual(self.get(server, path).status, 404)
                with self.assertRaises(FileNotFoundError):
                    server.respond("/x", urllib.parse.unquote(path))
        self.assertEqual(self.get(server, "/sub/feed.xml").content, b"<sub/>")

    @unittest.skipUnless(os.name == "nt", "only Windows has such paths")
    def test_a_directory_with_the_prefix_of_long_paths(self):
        directory = self.make_directory(
            {"sub/feed.xml": b"<rss/>", "sub/wrong.xml": comment("Status: x")}
        )
        with FeedTestServer(f"\\\\?\\{directory}") as server:
            self.assertEqual(self.get(server, "/sub/feed.xml").content, b"<rss/>")
            self.assertEqual(self.get(server, "/sub/wrong.xml").status, 500)
            self.assertEqual(
                [fixture.name for fixture in server.fixtures()], ["sub/feed.xml", "sub/wrong.xml"]
            )
            [error] = server.errors
            self.assertTrue(
                error.startswith(f"{server.directory}\\sub\\wrong.xml, line 2: "), error
            )
            server.clear()

    def test_a_sibling_with_a_longer_name_is_outside(self):
        directory = self.make_directory({"data/feed.xml": b"1", "data-secret/feed.xml": b"2"})
        self.make_link(directory / "data" / "link.xml", "../data-secret/feed.xml")
        with FeedTestServer(directory / "data") as server:
            self.assertEqual(self.get(server, "/feed.xml").status, 200)
            self.assertEqual(self.get(server, "/link.xml").status, 404)

    def test_without_a_directory_no_file_is_served(self):
        names = ("feed.xml", "index.html", "a.example/feed.xml", "data/feed.xml")
        folder = self.make_directory(dict.fromkeys(names, b"here"))
        self.change_directory(folder)
        server = FeedTestServer("")
        self.addCleanup(server.stop)
        server.start()
        self.assertEqual(server.fixtures(), [])
        path = f"{folder.as_posix()}/feed.xml".lstrip("/")
        absolute = [f"{start}{urllib.parse.quote(path)}" for start in ("/", "//", "/%2F", "/./")]
        encoded = "/" + urllib.parse.quote(path, safe="")
        for target in ("/", *(f"/{name}" for name in names), "/etc/passwd", *absolute, encoded):
            answer = Answer(exchange(server, f"GET {target} HTTP/1.0\r\n\r\n".encode()))
            with self.subTest(target):
                self.assertEqual(answer.status, 404)
        self.assertEqual(server.errors, [])
        with server.intercept():
            wire = exchange(server, b"GET http://a.example/feed.xml HTTP/1.0\r\n\r\n")
            self.assertEqual(Answer(wire).status, 502)
        self.assertRegex(
            server.errors[0], r"^GET http://a.example/feed.xml: no such host here; resp"
        )

    def test_steps_without_a_directory(self):
        with FeedTestServer("") as server:
            for name in ("feed.xml", "/feed.xml", str(HERE / "data" / "feed.xml")):
                with self.assertRaisesRegex(FileNotFoundError, "no directory"):
                    server.respond("/x", name)
            server.respond("/x", b"abc", 410, Response(b"def"), lambda request: "feed.xml")
            responses = [self.get(server, "/x") for _ in range(4)]
            self.assertEqual([each.status for each in responses], [200, 410, 200, 500])
            self.assertEqual(responses[0].content + responses[2].content, b"abcdef")
            [error] = server.errors
            self.assertIn("no directory", error)
            server.clear()

    def test_404_names_the_nearest_fixture_or_scripted_address(self):
        server = self.serve(
            {"atom/feed.xml": b"1", "rss/other.xml": b"2", "fed.HEADERS": b"", "v1.xml": b""}
        )
        server.respond("search?q=caf\u00e9 au lait", 200)
        server.respond("/api/v2/*", 200, method="POST")
        server.respond("http://a.example", 200)
        for target, found, nearest in (
            ("/atom/fed.xml", "atom/fed.xml' was not found", "'atom/feed.xml'"),
            ("/search?q=cafe", "'search", "'search?q=caf\u00e9 au lait'"),
            ("/api/v2", "api/v2", "'/api/v2/*'"),
            ("//v1.xml", "/v1.xml' was not found", "'v1.xml'"),
            ("http://a.example/x", "a.example/x", "'http://a.example'"),
        ):
            with self.subTest(target):
                answer = ask(server, target)
                text = answer.body.decode()
                self.assertEqual(answer.status, 404)
                self.assertIn(found, text)
                self.assertIn(nearest, text)
        self.assertIn("POST", ask(server, "/api/v2/x").body.decode())
        self.assertNotIn("'v1.xml' was not found", ask(server, "//v1.xml").body.decode())
        text = ask(server, "http://a.example/x").body.decode()
        hint = "'http://a[.]example' is for / alone, 'http://a[.]example/[*]' for all"
        self.assertRegex(text, hint)

    def test_404_takes_the_query_into_account(self):
        server = self.serve()
        server.respond("/search?q=AT%26T", 200)
        server.respond("/sea", 200)
        text = ask(server, "/search?q=AT&T").body.decode()
        self.assertIn("the nearest is '/search?q=AT%26T'", text)

    def test_404_says_that_the_steps_have_passed(self):
        server = self.serve()
        for address in ("/feed.xml", "/feed.*", "/feed.xml?a"):
            server.clear()
            server.respond("/other", 200)
            server.respond(address, lambda request: None)
            with self.subTest(address):
                text = ask(server, "/feed.xml?a").body.decode()
                self.assertRegex(text, "the nearest is '/other'; the steps for it have passed\n")
        self.assertNotIn("passed", ask(server, "/fed.xml").body.decode())

    def test_404_shows_the_pattern_for_all_paths_of_a_host(self):
        server = self.serve()
        own, of_tls = server.base_url, server.get_url("", "https")
        for address, method, pattern in (
            (own, None, f"{own}/*"),
            (f"{own}/", None, f"{own}/*"),
            (own, "POST", f"{own}/*"),
            (f"{own}?q=1", None, ""),
            (f"{own}/?", None, ""),
            (f"{own}/x", None, ""),
            (of_tls, "CONNECT", ""),
        ):
            server.clear()
            server.respond(address, 200, method=method)
            with self.subTest(address, method=method):
                text = ask(server, "/y").body.decode()
                hint = f"; {address!r} is for / alone, {pattern!r} for all paths\n"
                self.assertEqual(hint in text, bool(pattern), text)
                self.assertEqual("alone" in text, bool(pattern), text)

    def test_404_names_nothing_that_is_not_served(self):
        server = self.serve({"a.xml.headers": b"", ".git/a.xml": b"", ".a.xml": b"", "z": b""})
        for path in ("/a.xml.header", "/.git/a.xm", "/.a.xm"):
            self.assertRegex(ask(server, path).body, b"nearest .* 'z'\n")
        server = self.serve()
        text = ask(server, "/").body.decode()
        self.assertIn(f"'/' was not found in {legible(server.directory)}", text)
        self.assertNotIn("nearest", text)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "there are no pipes here")
    def test_404_names_neither_links_to_directories_nor_pipes(self):
        server = self.serve({"z/z": b""})
        os.mkfifo(os.path.join(server.directory, "pipe.xml"))
        self.make_link(pathlib.Path(server.directory, "link.xml"), "z")
        for path in ("/pipe.xm", "/link.xm"):
            self.assertRegex(ask(server, path).body, b"nearest .* 'z/z'\n")

    def test_404_where_the_directory_has_gone(self):
        folder = self.make_directory({"a/feed.xml": b"", "b/feed.xml": b""})
        server = FeedTestServer(folder)
        self.addCleanup(server.stop)
        server.start()
        shutil.rmtree(folder)
        answer = ask(server, "/feed.xml")
        self.assertEqual((answer.status, server.errors), (404, []))

    def test_404_without_a_directory(self):
        with FeedTestServer("") as server:
            text = ask(server, "/fed.xml").body.decode()
            self.assertRegex(text, "fed.xml' was not found(?!.* in )")
            self.assertNotIn("nearest", text)
            server.respond("/feed.xml", b"<rss/>")
            self.assertIn("'/feed.xml'", ask(server, "/fed.xml").body.decode())

    def test_404_looks_at_some_of_many_files_only(self):
        server = self.serve({f"{number}.xml": b"" for number in range(10)})
        scan, seen = os.scandir, []

        class Scan(contextlib.ExitStack):
            """The files of a directory, as if there were a thousand times as many."""

            def __init__(self, path):
                super().__init__()
                self.entries = itertools.cycle(self.enter_context(scan(path)))

            def __iter__(self):
                for entry in itertools.islice(self.entries, 10_000):
                    seen.append(entry)
                    yield entry

        with mock.patch("os.scandir", Scan):
            self.assertRegex(ask(server, "/none.xml").body, rb"nearest .* '\d.xml'")
        self.assertTrue(0 < len(seen) < 10_000, len(seen))


class NextTest(ServerTestCase):
    """The life of a feed in files: which of them a URL is served from."""

    #: A feed with two editions, and its end.
    LIFE = {"a": "Next: b.xml after 2", "b": "Next: c.xml", "c": "Status: 410"}

    def live(self, life=LIFE, folder="", **others):
        """Serve fixtures of these names with these directives; each body ends in its name."""
        names = {name if "." in name else f"{name}.xml": said for name, said in life.items()}
        bodies = {
            folder + name: comment(*said.split("; ")) + name[0].encode()
            for name, said in names.items()
        }
        return self.serve({**bodies, **others})

    def editions(self, server, number, target="/a.xml", **options):
        """The names of the fixtures that the next responses come from, a letter each."""
        return "".join(
            self.get(server, target, **options).content[-1:].decode() for _ in range(number)
        )

    def test_which_fixture_responds(self):
        for life, editions in (
            ({"a": "Next: b.xml", "b": ""}, "abbb"),
            (self.LIFE, "aabccc"),
            ({"a": "Next: b.xml after 1", "b": "Next: c.xml after 3", "c": ""}, "abbbccc"),
            ({"a": "next:  b.xml   After  2", "b": ""}, "aabb"),
            ({"a": "Next: b.xml", "b": "Next: a.xml"}, "ababab"),
            ({"a": "Next: b.xml after 2", "b": "Next: c.xml", "c": "Next: b.xml"}, "aabcbcb"),
            ({"a": "Next: a.xml after 2"}, "aaaaa"),
        ):
            with self.subTest(life):
                server = self.live(life)
                self.assertEqual(self.editions(server, len(editions)), editions)

    def test_on_the_wire(self):
        server = self.live({"a": 'Header: ETag: "1"; Next: b.xml after 2', "b": "Status: 410"})
        conditional = HEAD.replace(b"feed", b"a") + b'If-None-Match: "1"\r\n'
        wire = exchange(server, 2 * (conditional + b"\r\n") + conditional + CLOSING)
        dated = f"Date: {NOW_DATE}\r\nServer: {Answer(wire).headers['Server']}\r\n".encode()
        unchanged = b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\n%s\r\n' % dated
        self.assertEqual(wire[: 2 * len(unchanged)], 2 * unchanged)
        gone = Answer(wire[2 * len(unchanged) :])
        self.assertEqual((gone.status, gone.headers["ETag"], gone.rest), (410, None, b""))
        self.assertEqual(gone.body, comment("Status: 410") + b"b")

    def test_each_response_to_a_get_counts(self):
        for said, fields, status in (
            ('Header: ETag: "1"', {"If-None-Match": '"1"'}, 304),
            ("", {"Range": "bytes=0-1"}, 206),
            ("", {"Range": "bytes=999-"}, 416),
            ('Header: ETag: "1"', {"If-Match": '"2"'}, 412),
            ("Status: 503; Header: Retry-After: 0", {}, 503),
            ("Status: 301; Header: Location: /c.xml", {}, 301),
            ("Without: Content-Length; Fault: close at 50%", {}, 200),
        ):
            server = self.live({"a": f"{said}; Next: b.xml after 2".lstrip("; "), "b": ""})
            with self.subTest(said, status=status):
                for _ in range(2):
                    self.assertEqual(self.get(server, "/a.xml", headers=fields).status, status)
                self.assertEqual(self.editions(server, 1), "b")

    def test_responses_that_are_cut_count(self):
        for fault in ("close", "reset", "close at headers", "close at 50%", "reset at 5"):
            server = self.live({"a": f"Fault: {fault}; Next: b.xml after 2", "b": ""})
            with self.subTest(fault):
                for _ in range(2):
                    with self.assertRaises((ConnectionError, http.client.HTTPException)):
                        self.get(server, "/a.xml")
                self.assertEqual(self.editions(server, 1), "b")

    def test_a_delayed_response_counts_though_the_client_has_left(self):
        server = self.live({"a": "Delay: 86400; Next: b.xml", "b": ""})
        with connect(server) as connection:
            connection.sendall(LAST.replace(b"feed", b"a"))
            server.wait_for_request("/a.xml")
        self.assertEqual(self.editions(server, 2), "bb")

    def test_pipelined_requests_count_in_order(self):
        server = self.live({"a": "Next: b.xml after 3", "b": "Next: a.xml after 2"})
        one = HEAD.replace(b"feed", b"a")
        wire = exchange(server, 9 * (one + b"\r\n") + one + CLOSING)
        self.assertEqual(re.findall(rb"-->\n<rss/>(.)", wire), [*map(bytes, zip(b"aaabbaaabb"))])

    def test_a_get_with_a_body_counts_once(self):
        """Also if the response does not wait for that body."""
        for early in ("", "; Early: yes"):
            server = self.live({"a": f"Next: b.xml after 2{early}", "b": "Next: a.xml" + early})
            with self.subTest(early):
                self.assertEqual(self.editions(server, 6, body=b"12345"), "aabaab")

    def test_other_methods_do_not_count(self):
        server = self.live({"a": "Next: b.xml; Header: X: a", "b": "Header: X: b; Header: Y: 2"})
        for edition in "ab":
            for method, status in (("HEAD", 200), ("POST", 405), ("OPTIONS", 204), ("BREW", 501)):
                for _ in range(2):
                    response = ask(server, "/a.xml", method)
                    self.assertEqual(response.status, status)
                    if method == "HEAD":  # from the present one
                        self.assertEqual(response.headers["X"], edition)
            self.assertEqual(self.editions(server, 1), edition)

    def test_refused_requests_do_not_count(self):
        server = self.live()
        for line in (b"Host: y\r\n", b"Accept : */*\r\n", b"Content-Length: x\r\n"):
            wire = exchange(server, HEAD.replace(b"feed", b"a") + line + b"\r\n")
            self.assertEqual(Answer(wire).status, 400)
        self.assertEqual(self.editions(server, 3), "aab")

    def test_looking_at_a_fixture_does_not_count(self):
        server = self.live()
        for _ in range(2):
            [fixture] = server.fixtures("a.*")
            self.assertEqual(fixture.directives["Next"], "b.xml after 2")
            self.assertEqual(Response(**fixture.directives.arguments), Response())
            server.respond("/other", "a.xml")
            self.assertEqual(ask(server, "/a.xm").status, 404)
        self.assertEqual(self.editions(server, 3), "aab")

    def test_each_path_has_a_life_of_its_own_whatever_the_query(self):
        server = self.live()
        targets = ("/a.xml", "/a.xml?x=1", "/%61.xml", "/b.xml", "/b.xml?y", "/a.xml?", "/b.xml")
        found = [self.editions(server, 1, target) for target in targets]
        self.assertEqual(found, ["a", "a", "b", "b", "c", "c", "c"])
        self.assertEqual(self.editions(server, 2, f"{server.base_url}/a.xml"), "cc")

    def test_http_and_https_share_a_life(self):
        server = self.live()
        context = server.ssl_context()
        with (
            connect(server) as connection,
            context.wrap_socket(connection, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(LAST.replace(b"feed", b"a"))
            self.assertTrue(read_all(tls).endswith(b"a"))
        self.assertEqual(self.editions(server, 3), "abc")

    def test_an_index(self):
        life = {"index": "Next: b.xml after 2", "b": "Next: c.html", "c.html": ""}
        for folder in ("", "sub/"):
            server = self.live(life, folder)
            with self.subTest(folder):
                self.assertEqual(self.editions(server, 4, f"/{folder}"), "iibc")
                self.assertEqual(self.editions(server, 3, f"/{folder}index.xml"), "iib")

    def test_next_is_in_the_same_folder(self):
        server = self.live(
            self.LIFE, "one/two/", **{"b.xml": b"not this one", "a.xml": b"nor this"}
        )
        self.assertEqual(self.editions(server, 4, "/one/two/a.xml"), "aabc")
        self.assertEqual(self.editions(server, 3, "/a.xml"), "sss")

    def test_hosts_have_lives_of_their_own(self):
        files = {
            f"{folder}{name}": data
            for folder in ("", "b.example/")
            for name, data in (("a.xml", comment("Next: z.xml") + b"a"), ("z.xml", b"z"))
        }
        server = self.live(self.LIFE, "a.example/", **files)
        with server.intercept():
            found = []
            for url in (
                *("http://a.example/a.xml", "https://a.example/a.xml", "http://b.example/a.xml"),
                *("http://A.example:80/a.xml?q", server.get_url("a.xml"), "http://b.example/a.xml"),
            ):
                with urllib.request.urlopen(url) as response:
                    found.append(response.read()[-1:])
        self.assertEqual(b"".join(found), b"aaabaz")

    def test_sidecars(self):
        server = self.serve(
            {
                "a.json": b'{"title": "a"}',
                "a.json.headers": b'Header: ETag: "a"\nNext: b.json after 2\n',
                "b.json": b'{"title": "b"}',
                "b.json.headers": b"Next: c.xml",
                "c.xml": comment("Status: 404"),
                "c.xml.headers": b"Status: 410",
            }
        )
        seen = [self.get(server, "/a.json") for _ in range(5)]
        self.assertEqual([each.headers["ETag"] for each in seen], ['"a"', '"a"', None, None, None])
        self.assertEqual([each.status for each in seen], [200, 200, 200, 410, 410])
        kinds = ["application/json"] * 3 + ["application/xml"] * 2
        self.assertEqual([each.headers["Content-Type"] for each in seen], kinds)

    def test_responses_that_are_sent_as_they_are(self):
        odd = b"HTTP/1.1 299 Odd\r\nX: 1\r\n\r\n"
        server = self.serve(
            {
                "a.xml": comment("Next: b.asis"),
                "b.asis": odd + comment("Next: c.asis after 2"),
                "c.asis": odd + b"c",
                "c.asis.headers": b"Next: a.xml",
            }
        )
        request = LAST.replace(b"feed", b"a")
        seen = [exchange(server, request) for _ in range(5)]
        self.assertEqual(seen[1:4], [odd + comment("Next: c.asis after 2")] * 2 + [odd + b"c"])
        self.assertEqual(
            [Answer(each).body for each in (seen[0], seen[4])], [comment("Next: b.asis")] * 2
        )

    def test_names_with_blanks_and_other_letters(self):
        for name, said in (
            ("b c.xml", "b c.xml"),
            ("b  c.xml", "b  c.xml after 1"),
            ("b hereafter.xml", "b hereafter.xml"),
            ("b%20c.xml", "b%20c.xml"),
            ("b\u00e9\u4e2d.xml", "b\u00e9\u4e2d.xml"),
            (".b.xml", ".b.xml"),
            ("b", "b after 1"),
        ):
            with self.subTest(name):
                server = self.serve({"a.xml": comment(f"Next: {said}") + b"a", name: b"b"})
                self.assertEqual(self.editions(server, 3), "abb")
        with self.subTest("UTF-16"):
            data = comment("Next: b\u00e9.xml").decode().encode("utf-16")
            server = self.serve({"a.xml": data, "b\u00e9.xml": b"b"})
            self.assertEqual(self.editions(server, 3)[1:], "bb")

    def test_requests_at_once_count_exactly(self):
        life = {
            "a": "Next: b.xml after 7",
            "b": "Next: c.xml after 13",
            "c": "Next: a.xml after 10",
        }
        server, found = self.live(life), []
        run_at_once([lambda: found.extend(self.editions(server, 6))] * 10)
        self.assertEqual(sorted(found), sorted("a" * 14 + "b" * 26 + "c" * 20))
        in_order = [request.response.body[-1:] for request in server.requests]
        self.assertEqual(b"".join(in_order), (b"a" * 7 + b"b" * 13 + b"c" * 10) * 2)

    def test_clear_begins_anew_and_down_does_not(self):
        server = self.live()
        self.assertEqual(self.editions(server, 3), "aab")
        with server.down():
            pass
        self.assertEqual(self.editions(server, 1), "c")
        server.clear()
        self.assertEqual(self.editions(server, 4), "aabc")

    def test_two_servers_for_one_directory(self):
        server = self.live()
        self.assertEqual(self.editions(server, 3), "aab")
        with FeedTestServer(server.directory) as other:
            self.assertEqual(self.editions(other, 3), "aab")
        self.assertEqual(self.editions(server, 1), "c")

    def test_a_step_that_names_it(self):
        for address, step in (
            ("/x", "a.xml"),
            ("/*", "/a.xml"),
            ("/x", lambda request: "a.xml"),
        ):
            server = self.live()
            server.respond(address, step)
            with self.subTest(address, step=step):
                self.assertEqual(self.editions(server, 1, "/x"), "a")
                self.assertEqual(ask(server, "/x", "HEAD").status, 200)
                self.assertEqual(ask(server, "/x", "POST").status, 200)
                self.assertEqual(self.editions(server, 3, "/x?q"), "abc")
                if "*" in address:
                    self.assertEqual(self.editions(server, 3, "/y"), "aab")

    def test_a_step_that_is_followed_by_others(self):
        server = self.live()
        server.respond("/x", 503, "a.xml")
        self.assertEqual(
            [self.get(server, "/x").status for _ in range(5)], [503, 200, 200, 200, 410]
        )

    def test_methods_of_a_subclass(self):
        class Handler(FeedTestRequestHandler):
            def do_GET(self):
                super().do_GET()

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve({"a.xml": comment("Next: b.xml after 2") + b"a", "b.xml": b"b"}, Server)
        self.assertEqual(self.editions(server, 4), "aabb")

    def test_a_transcript_shows_which_fixture_responded(self):
        server = self.live({"a": "Delay: 0.001; Next: b.xml", "b": "Next: c.xml", "c": ""}, "sub/")
        server.respond("/x", "sub/b.xml")
        for path in ("/sub/a.xml", "/x", "/sub/a.xml", "/x", "/sub/a.xml"):
            self.get(server, path)
        with self.assertRaises(AssertionError) as caught:
            server.assert_not_requested()
        self.assertEqual(
            str(caught.exception).splitlines()[2:],
            [
                "  GET /sub/a.xml -> 200 (Delay: 0.001; Next: b.xml after 1)",
                "  GET /x -> 200 (step 1 of 1: sub/b.xml; Next: c.xml after 1)",
                "  GET /sub/a.xml -> 200 (Next has led to sub/b.xml; Next: c.xml after 1)",
                "  GET /x -> 200 (step 1 of 1: sub/b.xml, Next has led to sub/c.xml)",
                "  GET /sub/a.xml -> 200 (Next has led to sub/c.xml)",
            ],
        )

    def test_it_is_for_fixtures_only(self):
        with self.assertRaisesRegex(TypeError, "next"):
            Response(next="b.xml")
        server = self.live()
        self.editions(server, 1)
        self.assertNotIn("next", repr(server.requests[0].response))

    TAKES = "it takes the name of a fixture in the same folder, and maybe after N, N from 1"

    def wrong_ones(self, *said):
        """These directives in turn, each from line 3 of a.xml on, the server and that path."""
        files = {"b.xml": b"b", "b.xml.headers": b"", "sub/b.xml": b"", "sub/c.xml": b""}
        server = self.serve(files)
        path = pathlib.Path(server.directory, "a.xml")
        for each in said:
            server.clear()
            path.write_bytes(comment("Description: x", *each.splitlines()))
            yield each, server, path

    def assert_told(self, server, error):
        """That an error is told wherever a.xml is asked for, named or checked."""
        response = self.get(server, "/a.xml")
        self.assertEqual((response.status, server.errors), (500, [error]))
        self.assertEqual(response.content.decode(), legible(error) + "\n")
        with self.assertRaises(DirectiveError) as caught:
            server.respond("/x", "a.xml")
        self.assertEqual(str(caught.exception), error)
        with self.assertRaises(DirectiveError):
            self.assertFalse(server.fixtures("a.xml")[0].directives)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(feedtestserver.main(["--check", server.directory]), 1)
        self.assertEqual(out.getvalue().splitlines()[0], legible(error))

    def test_what_is_no_name_and_number(self):
        for said, server, path in self.wrong_ones(
            *("Next:", "Next: b.xml after 0", "Next: b.xml after", "Next: b.xml after x"),
            *("Next: b.xml after -1", "Next: b.xml after 1.5", "Next: b.xml after \u0662"),
            *("Next: b.xml after 2 3", "Next: b.xml after 1000000000000", "Next: b after b.xml"),
            *("Next: sub/b.xml", "Next: /b.xml", "Next: ../b.xml", "Next: sub\\b.xml"),
            "Next: b\0.xml",
            *("Next: http://a.example/b.xml", "Next: {{base_url}}/b.xml"),
        ):
            with self.subTest(said):
                words = f"Next: found {said[6:]!r}; {self.TAKES}"
                self.assert_told(server, f"{path}, line 3: {words}")
                with self.assertRaises(DirectiveError):  # without a folder
                    parse_directives(comment(said))

    def test_a_name_that_is_not_there(self):
        names = ("none.xml", ".", "..", "sub", "b.xml 2", "b.xml.headers", "c.xml", "{{host}}.xml")
        for said, server, path in self.wrong_ones(
            *(f"Next: {name}" for name in ("after", "after 2", *names, "x" * 300)),
            "Next: none.xml after 1000",
        ):
            with self.subTest(said):
                name = said[6:].removesuffix(" after 1000")
                words = f"Next: found {name!r:.80}; there is no such fixture in the same folder"
                self.assert_told(server, f"{path}, line 3: {words}")
                parse_directives(comment(said))

    def test_a_second_one_and_a_typo(self):
        second = "Next: found a second value, 'b.xml'; it takes one only"
        typo = "found the key 'Nexxt'; the directive is Next"
        wrong_ones = self.wrong_ones("next: b.xml after 3\nNext: b.xml", "Nexxt: b.xml")
        for (said, server, path), words in zip(wrong_ones, (f"4: {second}", f"3: {typo}")):
            with self.subTest(said):
                self.assert_told(server, f"{path}, line {words}")

    def test_wrong_ones_later_in_the_life(self):
        """Are told by their own file and line, and only when it comes to them."""
        for b, words in (
            ("Next: none.xml", "line 2: Next: found 'none.xml'; "),
            ("Description: x; Next: b.xml after 0", "line 3: Next: found 'b.xml after 0'; "),
            ("Stauts: 404", "line 2: found the key 'Stauts'; "),
        ):
            server = self.live({"a": "Next: b.xml", "b": b})
            self.assertEqual(self.editions(server, 1), "a")
            with self.subTest(b):
                self.assertEqual([self.get(server, "/a.xml").status for _ in range(2)], [500, 500])
                path = os.path.join(server.directory, "b.xml")
                for error in server.errors:
                    self.assertTrue(error.startswith(f"{path}, {words}"), error)

    def test_next_outside_of_the_directory(self):
        outside = self.make_directory({"secret.xml": b"<secret/>"})
        server = self.serve({"a.xml": comment("Next: link.xml")})
        self.make_link(pathlib.Path(server.directory, "link.xml"), outside / "secret.xml")
        self.assertEqual([self.get(server, "/a.xml").status for _ in range(2)], [500, 500])
        self.assertIn("Next: found 'link.xml'; ", server.errors[0])

    def test_files_that_change(self):
        server = self.live()
        folder = pathlib.Path(server.directory)
        self.assertEqual(self.editions(server, 3), "aab")
        (folder / "b.xml").write_bytes(b"B")  # it is the last one now
        self.assertEqual(self.editions(server, 2), "BB")
        (folder / "b.xml").write_bytes(comment("Next: d.xml") + b"b")
        self.assertEqual(self.get(server, "/a.xml").status, 500)
        self.assertIn("found 'd.xml'", server.errors[0])
        (folder / "d.xml").write_bytes(comment("Next: c.xml") + b"d")
        self.assertEqual(self.editions(server, 2), "dc")
        (folder / "a.xml").write_bytes(b"A")  # it has no other life any more
        self.assertEqual(self.editions(server, 2), "AA")

    def test_a_file_that_goes_away_and_comes_back(self):
        self.check_that_it_comes_back()

    def test_a_file_that_goes_away_where_what_leads_to_it_is_kept(self):
        now = time.time
        with mock.patch("time.time", lambda: now() + 10):
            self.check_that_it_comes_back()

    def check_that_it_comes_back(self):
        """Before its time and in it; what is wrong then is the line that leads to it."""
        for before, file in (("a", "b"), ("aab", "b"), ("aab", "c"), ("aabc", "c")):
            server = self.live({"a": "Next: b.xml after 2", "b": "Next: c.xml", "c": ""})
            path = os.path.join(server.directory, f"{file}.xml")
            with self.subTest(before, file=file):
                self.assertEqual(self.editions(server, len(before)), before)
                os.rename(path, path + ".old")
                while self.get(server, "/a.xml").status == 200:
                    pass
                previous = os.path.join(server.directory, "a.xml" if file == "b" else "b.xml")
                words = f"{previous}, line 2: Next: found '{file}.xml'; there is no such fixture"
                self.assertTrue(server.errors[0].startswith(words), server.errors)
                os.rename(path + ".old", path)
                self.assertIn(self.editions(server, 3)[-1], "bc")

    def test_the_audit_judges_by_what_was_served(self):
        server = self.live(
            {
                "a": 'Header: ETag: "1"; Next: b.xml after 2',
                "b": 'Header: ETag: "2"; Next: c.xml',
                "c": "Status: 410",
            }
        )
        sent = (None, '"1"', '"1"', '"2"')
        for etag in sent:
            fields = {**POLITE, "If-None-Match": etag} if etag else POLITE
            self.get(server, "/a.xml", headers=fields)
        self.assertEqual([each.response.status for each in server.requests], [200, 304, 200, 410])
        server.assert_polite()
        self.get(server, "/a.xml", headers=fields)
        self.assertEqual([finding.rule for finding in audit(server.requests)], ["gone"])


# Reading requests


HEAD = b"GET /feed.xml HTTP/1.1\r\nHost: x\r\n"
CLOSING = b"Connection: close\r\n\r\n"
LAST = HEAD + CLOSING


#: Good heads and bad ones, maybe with a body.
HEADS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
]
HEADS += [
    line + b"\r\nHost: x\r\n\r\n"
    for line in (
        *(b"\r\n\r\nGET / HTTP/1.1", b"\rGET / HTTP/1.1", b"\nGET / HTTP/1.1"),
        *(b"GET / HTTP/1.1\n", b"GET  / HTTP/1.1", b"GET /", b"GET /\0 HTTP/1.1", b"\0", b" "),
        *(b"GET /\xc3\xa9?\xe9 HTTP/1.1", b"GET /#a HTTP/1.1", b"GET http://x/ HTTP/1.1"),
        *(b"GET https://x/ HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET * HTTP/1.1"),
        *(b"GET / HTTP/1.0", b"GET / HTTP/2.0", b"GET / http/1.1", b"get / HTTP/1.1"),
        *(b"BREW / HTTP/1.1", b"CONNECT x:1 HTTP/1.1", b"CONNECT x HTTP/1.1"),
    )
]
HEADS += [
    b"GET / HTTP/1.1\r\nHost: " + rest + b"\r\n\r\n"
    for rest in (
        *(b"[::1]:8", b"[:", b"a%zz", b"", b"x\r\nHost: x", b"x\r\nA: b", b"x\r\nA:"),
        *(b"x\r\nA:\t b \t", b"x\r\nA: caf\xe9", b"x\r\nA", b"x\r\nA : b", b"x\r\n A: b"),
        *(b"x\r\n: b", b"x\r\nA(: b", b"x\r\nA: \0", b"x\r\nA: \r", b"x\r\nA: \n", b"x\r\n\n"),
        *(b"x\r\n\r", b"x\r\nA: b\r\n c", b"x\r\nExpect: 100-continue", b"x\r\nExpect: x"),
        *(b"x\r\nContent-Length: 0", b"x\r\nContent-Length: x", b"x\r\nContent-Length: 0, 1"),
        *(b"x\r\nTransfer-Encoding: x", b"x\r\nTransfer-Encoding: x, chunked"),
    )
]


@contextlib.contextmanager
def arriving(server, first=None, then=65536):
    """While it is in force, a server receives so many bytes at first, and then so many at a time.

    Without any number, it receives one byte at a time.
    """
    sizes, receive = {}, socket.socket.recv

    def receive_a_piece(connection, size, *flags):
        if connection.getsockname()[1:2] == (server.port,):
            size = min(size, sizes.get(connection, first or 1))
            sizes[connection] = then if first else 1
        return receive(connection, size, *flags)

    with mock.patch.object(socket.socket, "recv", receive_a_piece):
        yield


class ReaderTest(ServerTestCase):
    FEED = {"feed.xml": b"<rss/>"}

    def test_refusals(self):
        """Each response is well-formed, says why, and is the last on its connection."""
        server = self.serve(self.FEED)
        many = b"".join(b"X-%d: 1\r\n" % n for n in range(1000))
        for status, words, request in (
            (400, "malformed request line", b"GET /feed.xml\r\n\r\n"),
            (400, "malformed request line", b"GET  /feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed request line", b"GET /feed.xml HTTP/1.1 \r\nHost: x\r\n\r\n"),
            (400, "malformed request line", b"GET /fe ed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed request line", b"GET /feed.xml http/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed request line", b"GET /feed.xml HTTP/11.1\r\nHost: x\r\n\r\n"),
            (400, "malformed request line", b"G(T /feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed request line", b" GET /feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (
                400,
                "the control character '\\x00' after 'GET /'",
                b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
            ),
            (400, "malformed target 'feed.xml'", b"GET feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target '*' for GET", b"GET * HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET http://u@x/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET http://x:65536/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET /feed.xml#top HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET /feed.xml?a#b HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET /# HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET http://x/#top HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET http://x#top HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET http://[::1::]/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "malformed target", b"GET http://a%zz/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "without TLS", b"GET https://x/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (
                400,
                "malformed field line 'Bad : y'",
                HEAD + b"Accept: */*\r\n" * 200 + b"Bad : y\r\n\r\n",
            ),
            (400, "malformed field line 'A   ", HEAD + b"A" + b" " * 16_000 + b"B\r\n\r\n"),
            (400, "Transfer-Encoding is ','", HEAD + b"Transfer-Encoding: , \r\n\r\n"),
            (
                400,
                "the control character '\\n' after 'GET /feed.xml HTTP/1.1'",
                b"GET /feed.xml HTTP/1.1\nHost: x\n\n",
            ),
            (400, "the control character '\\n' after 'Host: x'", HEAD[:-2] + b"\n\r\n"),
            (400, "the control character '\\r' after 'X: a'", HEAD + b"X: a\rb\r\n\r\n"),
            (400, "there is no Host field", b"GET /feed.xml HTTP/1.1\r\n\r\n"),
            (400, "the Host field 'x, x' is not a valid host", HEAD + b"Host: x\r\n\r\n"),
            (400, "the Host field 'x, y' is not a valid host", HEAD + b"Host: y\r\n\r\n"),
            (400, "the Host field 'x/y' is", b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n"),
            (400, "the Host field 'x:y' is", b"GET / HTTP/1.1\r\nHost: x:y\r\n\r\n"),
            (400, "the Host field 'a b' is", b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n"),
            (
                400,
                "malformed field line 'X : 1'; expected TOKEN: VALUE, ",
                HEAD + b"X : 1\r\n\r\n",
            ),
            (400, "malformed field line ' X: 1'", HEAD + b" X: 1\r\n\r\n"),
            (400, "malformed field line '\\tfolded'", HEAD + b"X: 1\r\n\tfolded\r\n\r\n"),
            (400, "malformed field line ': 1'", HEAD + b": 1\r\n\r\n"),
            (400, "malformed field line 'X'", HEAD + b"X\r\n\r\n"),
            (400, "malformed field line 'X(: 1'", HEAD + b"X(: 1\r\n\r\n"),
            (400, "the control character '\\x00' after 'X: a'", HEAD + b"X: a\x00\r\n\r\n"),
            (400, "the control character '\\x0b' after 'X: a'", HEAD + b"X: a\x0b\r\n\r\n"),
            (400, "the control character '\\x7f' after 'X: a'", HEAD + b"X: a\x7f\r\n\r\n"),
            (
                400,
                "the control character '\\x7f' after 'GET /'",
                b"GET /\x7f HTTP/1.1\r\nHost: x\r\n\r\n",
            ),
            (
                400,
                "the control character '\\x00' after '  ",
                HEAD + b"X:" + b" " * 16_000 + b"\x00\r\n\r\n",
            ),
            (
                400,
                "Transfer-Encoding goes neither with Content-Length nor with",
                HEAD + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
            ),
            (
                400,
                "the Content-Length '1, 2' is not one",
                HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
            ),
            (400, "the Content-Length '1,2' is not one", HEAD + b"Content-Length: 1,2\r\n\r\nxx"),
            (400, "the Content-Length '+1' is not", HEAD + b"Content-Length: +1\r\n\r\nx"),
            (400, "the Content-Length '-1' is not", HEAD + b"Content-Length: -1\r\n\r\nx"),
            (400, "the Content-Length '1_0' is not", HEAD + b"Content-Length: 1_0\r\n\r\nx"),
            (400, "the Content-Length '0x1' is not", HEAD + b"Content-Length: 0x1\r\n\r\nx"),
            (400, "the Content-Length '' is not", HEAD + b"Content-Length:\r\n\r\n"),
            (400, "the Content-Length '\xb2' is not", HEAD + b"Content-Length: \xb2\r\n\r\n"),
            (413, "the body is larger than", HEAD + b"Content-Length: 67108865\r\n\r\nx"),
            (
                413,
                "the body is larger than",
                HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nx",
            ),
            (400, "Transfer-Encoding is 'gzip'", HEAD + b"Transfer-Encoding: gzip\r\n\r\n"),
            (
                400,
                "Transfer-Encoding is 'chunked, chunked'",
                HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n",
            ),
            (400, "Transfer-Encoding is 'xchunked'", HEAD + b"Transfer-Encoding: xchunked\r\n\r\n"),
            (
                501,
                "transfer coding 'gzip' is not",
                HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
            ),
            (
                400,
                "nor with HTTP/1.0",
                b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            ),
            (
                414,
                "the request line is longer than 16384",
                b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            ),
            (414, "the request line is longer than 16384", b"GET /" + b"x" * 20000),
            (431, "a field line is longer than 16384", HEAD + b"X: " + b"x" * 20000 + b"\r\n\r\n"),
            (431, "a field line is longer than 16384", HEAD + b"X: " + b"x" * 20000),
            (431, "more than 256 fields", HEAD + many + b"\r\n"),
            (505, "HTTP/2.0 is not supported; use HTTP/1.1", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            (505, "HTTP/0.9 is not supported; use HTTP/1.1", b"GET / HTTP/0.9\r\n\r\n"),
            (501, "' is not implemented", b"X" * 10_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n"),
            (
                501,
                "the method is longer than 16384",
                b"X" * 20_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
            ),
            (501, "the method is longer than 16384", b"X" * 20_000),
            (501, "the method 'BREW' is not implemented", b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n"),
            (501, "the method 'get' is not implemented", b"get / HTTP/1.1\r\nHost: x\r\n\r\n"),
            (
                405,
                "POST is not allowed here; in Python, respond() can script",
                b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
            ),
            (
                405,
                "CONNECT is not accepted here; inside of server.intercept() it is, and for",
                b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
            ),
        ):
            with self.subTest(words, request=request[:60]):
                answer = Answer(exchange(server, request))
                self.assertEqual(answer.status, status, answer.body)
                self.assertIn(words, answer.body.decode())
                self.assertEqual(answer.headers["Connection"], "close")
                self.assertEqual(answer.headers["Date"], NOW_DATE)
                self.assertEqual(answer.headers["Content-Type"], "text/plain; charset=utf-8")
                self.assertEqual(answer.rest, b"")
        self.assertEqual(server.errors, [])

    def test_hosts(self):
        """RFC 9110 7.2: a host of RFC 3986 3.2.2, and maybe a port."""
        server = self.serve(self.FEED)
        for status, hosts in (
            (
                200,
                ["", "x", "x.", "X:80", "x:", "x:0", "x:65535", "a_b.example", "a%41", "a%c3%a9"],
            ),
            (200, ["127.0.0.1", "1.2.3", "999.1.1.1", "x!$&'()*+,;=~-"]),
            (200, ["[::1]", "[::1]:80", "[::1]:", "[::]", "[1:2:3:4:5:6:7:8]", "[::ffff:1.2.3.4]"]),
            (400, ["x:65536", "x:-1", "x:a", "x:80:80", "x: 80", "x y", "x/", "x?", "x#", "u@x"]),
            (400, ["a%zz", "a%", "a%4", "%", "a%4%31", 'x"', "x|y", "x\\y", "x<", "caf\xe9"]),
            (400, ["[:::::]", "[127.0.0.1]", "[1::2::3]", "[::1", "::1", "::1]", "[]", "[::1]x"]),
            (400, ["[:]", "[::12345]", "[1:2:3:4:5:6:7]", "[1:2:3:4:5:6:7:8:9]", "[::1.2.3]"]),
            (400, ["[::g]", "[::1]:65536", "[[::1]]", "x[::1]", "[x]", "[::1]::1"]),
        ):
            for host in hosts:
                with self.subTest(host):
                    head = f"GET /feed.xml HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                    answer = Answer(exchange(server, head.encode("latin-1")))
                    self.assertEqual(answer.status, status)
                    if status == 400:
                        self.assertIn(f"the Host field {host!r} is", answer.body.decode())

    def test_the_pieces_in_which_a_request_arrives_change_nothing(self):
        server = self.serve(self.FEED)
        server.respond("/", lambda request: request.body)

        def verdict():
            before = len(server.requests)
            return exchange(server, last), [str(request) for request in server.requests[before:]]

        for number, head in enumerate(HEADS, sys.version_info.minor):
            last = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            at_once = verdict()
            self.assertRegex(at_once[0], b"^HTTP/1.1 [245]")
            self.assertTrue(exchange(server, HEAD + b"\r\n" + last).endswith(at_once[0]), last)
            # To save time, each version of Python takes other places.
            for cut in (*range(1 + number % 11, len(last), 11), None):
                with self.subTest(last, cut=cut), arriving(server, cut):
                    self.assertEqual(verdict(), at_once)

    def test_the_pieces_in_which_long_lines_arrive_change_nothing(self):
        line, chunked = b"X: " + b"x" * 16_381, LAST[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
        overlong, head = b"X: " + b"x" * 16_382, LAST[:-2]
        server = self.serve(self.FEED)
        for expected, request in (
            ("GET /feed.xml -> 200", head + line + b"\r\n\r\n"),
            ("GET /feed.xml -> 431", head + overlong + b"\r\n\r\n"),
            ("GET /feed.xml -> 431", head + b"A" + b" " * 60_000 + b"B\r\n\r\n"),
            ("GET /feed.xml -> 431", head + overlong + b"\r\nno colon\r\nX: \0\r\n\r\n"),
            ("GET /feed.xml -> 400", head + b"X: \0\r\n" + overlong + b"\r\n\r\n"),
            ("GET /feed.xml -> 400", head + b"no colon\r\n" + line + b"\r\n\r\n"),
            ("GET /feed.xml -> 400", head + line + b"\r\nX: \r\r\n\r\n"),
            ("GET /feed.xml -> 400", head + line + b"\0\r\n\r\n"),
            ("GET /feed.xml -> 431", head + line + b"xx\0\r\n\r\n"),
            ("GET /feed.xml -> 400", head + (line + b"\r\n") * 70 + b"\0\r\n\r\n"),
            (
                "(unreadable) -> 414",
                b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + overlong + b"\r\n\r\n",
            ),
            ("(unreadable) -> 414", b"GET /" + b"x" * 20_000 + b"\n\r\n"),
            ("(unreadable) -> 501", b"x" * 20_000 + b" / HTTP/1.1\r\n\r\n"),
            ("GET /feed.xml -> 200", chunked + b"1;" + b"x" * 16_382 + b"\r\nx\r\n0\r\n\r\n"),
            ("GET /feed.xml -> 400", chunked + b"1;" + b"x" * 16_383 + b"\r\nx\r\n0\r\n\r\n"),
            ("GET /feed.xml -> 200", chunked + b"0\r\n" + line + b"\r\n\r\n"),
            ("GET /feed.xml -> 431", chunked + b"0\r\n" + overlong + b"\r\n\r\n"),
        ):
            for size in (4_999, 16_384, 65_536):
                with self.subTest(request=request[:80], size=size), arriving(server, size, size):
                    exchange(server, request)
                    self.assertEqual(str(server.requests[-1]), expected)

    def test_a_field_that_is_repeated_a_hundred_thousand_times(self):
        """Its values are not joined one after the other, which would take seconds."""
        server = self.serve(self.FEED)
        answer = Answer(exchange(server, HEAD + b"a:\r\n" * 200_000 + b"\r\n"))
        self.assertEqual((answer.status, answer.body[:14]), (431, b"there are more"))
        [request] = server.requests
        fields = [("Host", "x"), *[("a", "")] * 255]  # what was read until then
        self.assertEqual((request.path, request.headers.items()), ("/feed.xml", fields))

    def test_chunks_that_are_refused(self):
        server = self.serve(self.FEED)
        server.respond("/", 200)
        for words, body in (
            ("malformed chunk size ''", b"\r\n"),
            ("malformed chunk size 'x'", b"x\r\n"),
            ("malformed chunk size '0x1'", b"0x1\r\na\r\n0\r\n\r\n"),
            ("malformed chunk size '+1'", b"+1\r\na\r\n0\r\n\r\n"),
            ("malformed chunk size '-1'", b"-1\r\na\r\n0\r\n\r\n"),
            ("malformed chunk size ' 1'", b" 1\r\na\r\n0\r\n\r\n"),
            ("malformed chunk size '1 '", b"1 \r\na\r\n0\r\n\r\n"),
            ("malformed chunk size '1_0'", b"1_0\r\na\r\n0\r\n\r\n"),
            ("malformed chunk size '1;'", b"1;\r\na\r\n0\r\n\r\n"),
            ("found the control character", b'1;a="\r"\r\na\r\n0\r\n\r\n'),
            ("found the control character", b'1;a="\\\x00"\r\na\r\n0\r\n\r\n'),
            ("the body is larger than", b"1" * 17 + b"\r\n"),
            ("lines end in CR LF", b"1\na\r\n0\r\n\r\n"),
            ("longer than its size says", b"1\r\nab\r\n0\r\n\r\n"),
            ("malformed field line 'X : 1'", b"0\r\nX : 1\r\n\r\n"),
            ("more than 256 fields", b"0\r\n" + b"X: 1\r\n" * 300 + b"\r\n"),
            ("is longer than 16384 bytes", b"1;" + b"x" * 20000),
        ):
            with self.subTest(words, body=body[:20]):
                head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                answer = Answer(exchange(server, head + body))
                status = {"more than 256 fields": 431, "the body is larger than": 413}.get(
                    words, 400
                )
                self.assertEqual(answer.status, status)
                self.assertIn(words, answer.body.decode())
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        for size in (b"4000001", b"f" * 16, b"0" * 999 + b"4000001"):
            self.assertEqual(Answer(exchange(server, head, size + b"\r\n")).status, 413)

    def test_chunk_sizes_have_any_number_of_leading_zeros(self):
        server = self.serve()
        server.respond("/", lambda request: request.body)
        head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        for zeros in (0, 1, 15, 16, 17, 100, 16_000):
            for chunk in (b"%sa\r\n0123456789\r\n", b"%sA;b=c\r\n0123456789\r\n"):
                with self.subTest(chunk, zeros=zeros):
                    size = b"0" * zeros
                    body = chunk % size * 2 + b"%s0\r\n\r\n" % size
                    sent = head + b"Transfer-Encoding: chunked\r\n\r\n" + body
                    answer = Answer(exchange(server, sent))
                    self.assertEqual((answer.status, answer.body), (200, b"0123456789" * 2))

    def test_an_end_in_the_middle_is_refused(self):
        server = self.serve(self.FEED)
        for part in (b"GET /feed.xml HT", HEAD, HEAD + b"Content-Length: 5\r\n\r\nabc"):
            with self.subTest(part), connect(server) as connection:
                connection.sendall(part)
                connection.shutdown(socket.SHUT_WR)
                answer = Answer(read_all(connection))
                self.assertEqual(answer.status, 400)
                self.assertEqual(answer.body, b"the connection ended before the request did\n")
        self.assertEqual(exchange_end(server, b""), b"")
        self.assertEqual(exchange_end(server, b"\r\n"), b"")

    def test_a_refusal_is_read_though_the_client_still_sends(self):
        server = self.serve(self.FEED)
        with connect(server) as connection:
            connection.sendall(HEAD + b"Content-Length: 99999999\r\n\r\n")
            for _ in range(400):
                connection.sendall(bytes(65536))
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(Answer(read_all(connection)).status, 413)

    def test_refused_requests_are_on_record(self):
        server = self.serve(self.FEED)
        exchange(server, b"\x00")
        exchange(server, HEAD + b"A: 2\r\nX : 1\r\n\r\n")
        exchange(server, HEAD + b"Content-Length: x\r\n\r\n")
        exchange(server, b"GET /x HTTP/1.1\nHost: x\n\n")
        exchange(server, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n")
        requests = server.requests
        self.assertEqual(
            [str(request) for request in requests],
            [
                "(unreadable) -> 400",
                "GET /feed.xml -> 400",
                "GET /feed.xml -> 400",
                "(unreadable) -> 400",
                "CONNECT x:1 -> 405",
            ],
        )
        unreadable = requests[0]
        self.assertEqual(
            (
                unreadable.method,
                unreadable.target,
                unreadable.url,
                unreadable.path,
                unreadable.body,
            ),
            ("", "", "", "", b""),
        )
        self.assertEqual((unreadable.query, len(unreadable.headers), unreadable.time), ({}, 0, NOW))
        self.assertEqual(requests[1].headers.items(), [("Host", "x"), ("A", "2")])
        self.assertEqual(requests[2].headers["Content-Length"], "x")

    def test_a_head_that_is_cut_off_is_on_record(self):
        """As far as it came in whole lines."""
        server = self.serve(self.FEED)
        for part in (b"", b"X", b"X: 1", b"X: 1\r"):
            exchange_end(server, HEAD + b"A: 2\r\n" + part)
            request = server.requests[-1]
            with self.subTest(part):
                self.assertEqual((str(request), request.refused), ("GET /feed.xml -> 400", True))
                self.assertEqual(request.headers.items(), [("Host", "x"), ("A", "2")])
        exchange_end(server, b"GET /feed.xml HT")
        self.assertEqual(str(server.requests[-1]), "(unreadable) -> 400")

    def test_what_is_read(self):
        server = self.serve(self.FEED)
        fields = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 8180) for n in range(100))
        for request in (
            HEAD + b"\r\n",
            b"\r\n\r\n" + HEAD + b"\r\n",
            HEAD + fields + b"\r\n",
            b"GET /feed.xml?" + b"x" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /feed.xml HTTP/1.1\r\nhost:\r\n\r\n",
            b"GET /feed.xml HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
            b"GET /feed.xml HTTP/1.1\r\nHost: x\r\nX:\t a\tb \t\r\nY: caf\xe9\r\n\r\n",
            b"GET /feed.xml HTTP/1.2\r\nHost: x\r\n\r\n",
            b"GET /feed.xml HTTP/1.0\r\n\r\n",
            b"GET http://127.0.0.1:%d/feed.xml HTTP/1.1\r\nHost: other\r\n\r\n" % server.port,
            b"GET HTTP://LocalHost:%d/feed.xml HTTP/1.1\r\nHost: other\r\n\r\n" % server.port,
            HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
            HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
            HEAD + b"Content-Length: 003\r\n\r\nabc",
        ):
            with self.subTest(request[:60]):
                with connect(server) as connection:
                    connection.sendall(request)
                    connection.shutdown(socket.SHUT_WR)
                    answer = Answer(read_all(connection))
                self.assertEqual((answer.status, answer.body, answer.rest), (200, b"<rss/>", b""))
        self.assertEqual(server.requests[6].headers.items()[1:], [("X", "a\tb"), ("Y", "caf\xe9")])

    def test_byte_by_byte(self):
        server = self.serve(self.FEED)
        server.respond("/", lambda request: request.body)
        request = (
            b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        request += b'3\r\nabc\r\n2;x=y;z="\\""\r\nde\r\n0\r\nTrailer: 1\r\n\r\n'
        answer = Answer(exchange(server, *(bytes([byte]) for byte in request)))
        self.assertEqual(answer.body, b"abcde")


def exchange_end(server, data):
    """Send bytes and the end of the connection, return all that comes."""
    with connect(server) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


# TLS and its certificates


def hello_for(name):
    """What a client says first that asks for a host of that name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


class TlsClient:
    """The client's end of a handshake, of which each byte is at hand before it is sent."""

    def __init__(self, server, name="localhost", *, context=None, trusting=True, tunnel=""):
        context = context or server.ssl_context()
        if not trusting:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self.hello = self.outgoing.read()
        self.connection = connect(server)
        if tunnel:
            request = f"CONNECT {tunnel} HTTP/1.1\r\nHost: {tunnel}\r\n\r\n"
            self.connection.sendall(request.encode())
            self.connection.recv(65536)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.connection.close()

    def shake_hands(self, hello=None):
        """Send the hello, or these bytes instead, and go on; the certificate that comes, in DER."""
        self.connection.sendall(self.hello if hello is None else hello)
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.connection.sendall(self.outgoing.read())
                received = self.connection.recv(65536)
                if not received:
                    raise EOFError from None
                self.incoming.write(received)
        self.connection.sendall(self.outgoing.read())
        return self.tls.getpeercert(binary_form=True)

    def names(self):
        return [name for _, name in self.tls.getpeercert()["subjectAltName"]]


class ClientHelloTest(ServerTestCase):
    def test_the_host_that_it_names(self):
        server = self.serve()
        for name in ("localhost", "a.example", "x" * 63 + ".example", "127.0.0.1"):
            with self.subTest(name), TlsClient(server, name) as client:
                client.shake_hands()
                self.assertEqual(client.names(), [name])

    def test_nothing_is_sent_before_its_last_byte(self):
        server = self.serve()
        with TlsClient(server) as client:
            for byte in client.hello[:-1]:
                client.connection.send(bytes([byte]))
            self.assertEqual(self.get(server, "/").status, 404)  # one loop serves all in turn
            client.connection.setblocking(False)
            with self.assertRaises(BlockingIOError):
                client.connection.recv(1)
            client.connection.settimeout(PATIENCE)
            client.shake_hands(client.hello[-1:])
            self.assertEqual(client.names(), ["localhost"])

    def test_the_pieces_in_which_a_handshake_arrives_change_nothing(self):
        server = self.serve()
        for first in (None, 1, 5, 6, 9, 100):
            with (
                self.subTest(first),
                arriving(server, first),
                TlsClient(server, "a.example") as client,
            ):
                client.shake_hands()
                self.assertEqual(client.names(), ["a.example"])

    def test_it_may_come_in_several_records(self):
        server = self.serve()
        for count in (60, 10, 2):
            with self.subTest(count), TlsClient(server, "a.example") as client:
                message = client.hello[5:]
                size = -(-len(message) // count)
                pieces = [message[at : at + size] for at in range(0, len(message), size)]
                records = [struct.pack(">BHH", 22, 0x301, len(piece)) + piece for piece in pieces]
                client.shake_hands(b"".join(records))
                self.assertEqual(client.names(), ["a.example"])

    def test_what_is_no_hello_is_refused_at_once(self):
        server = self.serve()
        for words, sent in (
            ("a ServerHello", b"\x16\x03\x01\x00\x04\x02\x00\x00\x00"),
            ("a hello of 16 MiB", b"\x16\x03\x01\x00\x04\x01\xff\xff\xff"),
            ("another type of record", b"\x16\x03\x01\x00\x01\x01\x17\x03\x01\x00\x01x"),
        ):
            with self.subTest(words):
                self.assertRegex(exchange(server, sent), b"(?s)^\\x15\\x03...\\x02.$")  # fatal
        self.assertEqual(server.errors, [])

    def test_records_that_are_too_many_too_long_or_empty(self):
        server = self.serve()
        for words, sent in (
            ("many records", b"\x16\x03\x01\x00\x01\x01" * 65),
            ("a record of more than 2**14 bytes", b"\x16\x03\x01\x40\x01"),
            ("a record of none", b"\x16\x03\x01\x00\x00"),
        ):
            with self.subTest(words):
                self.assertRegex(exchange_end(server, sent), b"(?s)^(\\x15\\x03.*)?$")
        self.assertEqual(server.errors, [])

    def test_hellos_that_are_cut_or_changed(self):
        """They end the connection, and nothing else."""
        server = self.serve()
        with TlsClient(server, "a.example") as client:
            hello = client.hello
        for size in range(1, len(hello), 11):
            for sent in (
                hello[:size],
                hello[:size] + b"\0" + hello[size + 1 :],
                hello[:size] + b"\xff" + hello[size + 1 :],
            ):
                with self.subTest(sent):
                    received = exchange_end(server, sent)
                    self.assertIn(received[:1], (b"", b"\x15", b"\x16"))  # an alert, a handshake
        self.assertEqual(server.errors, [])
        with TlsClient(server, "a.example") as client:
            client.shake_hands()


def asn1(data):
    """The values in DER: tag and contents of each, which are a list where they are constructed."""
    values = []
    while data:
        tag, start, length = data[0], 2, data[1]
        if length > 127:
            start = length - 128 + 2
            length = int.from_bytes(data[2:start], "big")
        contents, data = data[start : start + length], data[start + length :]
        values.append((tag, asn1(contents) if tag & 0x20 else contents))
    return values


def at_system_time(seconds):
    """A context in which this is the time by which certificates are made, in any thread."""
    FeedTestServer().ssl_context()  # makes the CA, which other tests need at the true time
    return mock.patch.object(feedtestserver, "_system_time", lambda: seconds)


class CertificateTest(ServerTestCase):
    KINDS = ("valid", "expired", "not-yet-valid", "wrong-host", "self-signed")
    KINDS += ("incomplete-chain", "no-san")
    KEY_USAGE, ALTERNATIVE_NAME, BASIC_CONSTRAINTS = (
        b"\x55\x1d\x0f",
        b"\x55\x1d\x11",
        b"\x55\x1d\x13",
    )
    SUBJECT_KEY, AUTHORITY_KEY = b"\x55\x1d\x0e", b"\x55\x1d\x23"
    EXTENDED_KEY_USAGE = b"\x55\x1d\x25"
    #: Hosts that no other test has asked for, as a certificate is made once for each.
    hosts = (f"host-{number}.example" for number in itertools.count())

    def setUp(self):
        super().setUp()
        self.server = self.serve()

    def certify(self, name=None, kind="valid", tunnel=""):
        """The parts of the certificate that a client gets who asks for that host."""
        self.server.certificate = kind
        name = name or next(self.hosts)
        with TlsClient(self.server, name, trusting=False, tunnel=tunnel) as client:
            return self.parsed(client.shake_hands())

    def authority(self):
        """The parts of the certificate of the CA."""
        return self.parsed(ssl.PEM_cert_to_DER_cert(self.pem()))

    def pem(self):
        return pathlib.Path(self.server.ca_file).read_text("ascii")

    def parsed(self, certificate):
        """The parts of a certificate, by name; extensions as {OID: (critical, value)}."""
        [(_, [(_, content), (_, algorithm), _])] = asn1(certificate)
        names = ["version", "serial", "algorithm", "issuer", "validity", "subject"]
        names += ["key", "extensions"]
        parts = {name: contents for name, (_, contents) in zip(names, content)}
        self.assertEqual(parts["algorithm"], algorithm)
        [(_, extensions)] = parts["extensions"]
        parts["extensions"] = {}
        for _, ((_, oid), *flag, (_, value)) in extensions:
            self.assertIn(flag, ([], [(1, b"\xff")]))
            parts["extensions"][oid] = bool(flag), asn1(value)
        return parts

    def identifier(self, parts):
        """The identifier of the key that a certificate is for (RFC 7093 2)."""
        _, (_, key) = parts["key"]
        return hashlib.sha256(key[1:]).digest()[:20]  # the first byte counts unused bits

    def test_openssl_verifies_it(self):
        names = ("a.example", "127.0.0.1", "x" * 63 + ".example", ".".join(["y" * 49] * 5))
        for name in (*names, *itertools.islice(self.hosts, 10)):
            with self.subTest(name), TlsClient(self.server, name) as client:
                client.tls.context.verify_flags |= ssl.VERIFY_X509_STRICT
                client.shake_hands()
                self.assertEqual(client.names(), [name])

    def test_the_common_name_is_the_host(self):
        for name in ("localhost", "a.example", "127.0.0.1", "x" * 56 + ".example"):
            with self.subTest(name), TlsClient(self.server, name) as client:
                client.shake_hands()
                self.assertEqual(client.tls.getpeercert()["subject"], ((("commonName", name),),))

    def test_the_common_name_of_bad_certificates(self):
        for kind in ("self-signed", "wrong-host", "incomplete-chain"):
            name = next(self.hosts)
            parts = self.certify(name, kind)
            [(_, [(_, [_, (_, common_name)])])] = parts["subject"]
            _, [(_, [(_, alternative)])] = parts["extensions"][self.ALTERNATIVE_NAME]
            with self.subTest(kind):
                self.assertEqual(common_name, alternative)
                self.assertEqual(common_name == name.encode(), kind != "wrong-host")

    def test_a_host_that_is_too_long_for_a_common_name(self):
        """RFC 5280 A.1"""
        for name in ("x" * 57 + ".example", ".".join(["y" * 49] * 5)):
            with self.subTest(name), TlsClient(self.server, name) as client:
                client.shake_hands()
                [[(_, common_name)]] = client.tls.getpeercert()["subject"]
                self.assertLessEqual(len(common_name), 64)
                self.assertEqual(client.names(), [name])

    def test_one_without_alternative_names_has_the_host_as_its_common_name_alone(self):
        self.server.certificate = "no-san"
        names = ("localhost", "127.0.0.1", "x" * 56 + ".example", "x" * 57 + ".example")
        context = self.server.ssl_context()
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        for name in (*names, ".".join(["y" * 49] * 5)):
            with self.subTest(name), TlsClient(self.server, name, context=context) as client:
                client.shake_hands()
                found = client.tls.getpeercert()
                [[(_, common_name)]] = found["subject"]
                self.assertNotIn("subjectAltName", found)
                self.assertEqual(common_name == name, len(name) <= 64)
                self.assertTrue(0 < len(common_name) <= 64)
        others = self.certify()["extensions"].keys() - {self.ALTERNATIVE_NAME}
        self.assertEqual(self.certify(kind="no-san")["extensions"].keys(), others)

    def test_what_the_ca_says_of_itself(self):
        parts = self.authority()
        key = self.identifier(parts)
        self.assertEqual(parts["issuer"], parts["subject"])
        self.assertEqual(parts["version"], [(2, b"\x02")])
        self.assertEqual(
            parts["extensions"],
            {
                self.BASIC_CONSTRAINTS: (True, [(0x30, [(1, b"\xff"), (2, b"\0")])]),
                self.KEY_USAGE: (True, [(3, b"\x02\x04")]),  # keyCertSign, the sixth bit
                self.SUBJECT_KEY: (False, [(4, key)]),
                self.AUTHORITY_KEY: (False, [(0x30, [(0x80, key)])]),
            },
        )

    def test_what_it_says_of_a_server(self):
        server_auth = bytes.fromhex("2b06010505070301")
        address = bytes.fromhex("20010db8" + "0" * 23 + "1")
        for host, tunnel, name in (
            ("example.com", "", (0x82, b"example.com")),
            ("127.0.0.1", "", (0x87, b"\x7f\0\0\x01")),
            ("2001:db8::1", "[2001:db8::1]:443", (0x87, address)),
        ):
            with self.subTest(host), self.server.intercept():
                parts = self.certify(host, tunnel=tunnel)
                self.assertNotEqual(parts["issuer"], parts["subject"])
                key, authority = self.identifier(parts), self.identifier(self.authority())
                self.assertEqual(
                    parts["extensions"],
                    {
                        self.BASIC_CONSTRAINTS: (True, [(0x30, [])]),
                        self.KEY_USAGE: (True, [(3, b"\x07\x80")]),  # digitalSignature
                        self.EXTENDED_KEY_USAGE: (False, [(0x30, [(6, server_auth)])]),
                        self.ALTERNATIVE_NAME: (False, [(0x30, [name])]),
                        self.SUBJECT_KEY: (False, [(4, key)]),
                        self.AUTHORITY_KEY: (False, [(0x30, [(0x80, authority)])]),
                    },
                )

    def test_when_it_is_valid(self):
        noon = 1_236_427_200  # 2009-03-07 12:00:00
        for kind, begin, end in (
            ("valid", b"090306120000Z", b"100407120000Z"),
            ("wrong-host", b"090306120000Z", b"100407120000Z"),
            ("self-signed", b"090306120000Z", b"100407120000Z"),
            ("incomplete-chain", b"090306120000Z", b"100407120000Z"),
            ("no-san", b"090306120000Z", b"100407120000Z"),
            ("expired", b"080203120000Z", b"090306120000Z"),
            ("not-yet-valid", b"090308120000Z", b"100409120000Z"),
        ):
            with self.subTest(kind), at_system_time(noon):
                parts = self.certify(kind=kind)
                self.assertEqual(parts["validity"], [(0x17, begin), (0x17, end)])

    def test_years_from_2050_on_have_four_digits(self):
        """RFC 5280 4.1.2.5"""
        for seconds, begin in (
            (2_524_607_999, (0x17, b"491231235959Z")),
            (2_524_608_000, (0x18, b"20500101000000Z")),
        ):
            with self.subTest(seconds), at_system_time(seconds + 24 * 60 * 60):
                self.assertEqual(self.certify()["validity"][0], begin)

    def test_its_issuer(self):
        theirs = self.authority()["subject"]
        for kind in self.KINDS:
            with self.subTest(kind):
                parts = self.certify(kind=kind)
                mine = parts["subject"] == parts["issuer"]
                self.assertEqual(mine, kind == "self-signed")
                others = ("self-signed", "incomplete-chain")
                self.assertEqual(parts["issuer"] == theirs, kind not in others)

    def test_the_issuer_of_one_whose_chain_is_incomplete(self):
        """An intermediate CA, which is neither the CA nor the server."""
        parts, authority = self.certify(kind="incomplete-chain"), self.authority()
        _, [(_, [(_, issuer)])] = parts["extensions"][self.AUTHORITY_KEY]
        self.assertNotIn(issuer, (self.identifier(parts), self.identifier(authority)))
        self.assertNotIn(parts["issuer"], (parts["subject"], authority["subject"]))

    def test_what_it_says_of_a_client(self):
        client_auth = bytes.fromhex("2b06010505070302")
        pem = pathlib.Path(self.server.client_certificate("J\u00fcrgen")).read_text("ascii")
        pem = re.search("(?s)-----BEGIN CERT.*?-----END CERTIFICATE-----", pem)[0]
        parts, authority = self.parsed(ssl.PEM_cert_to_DER_cert(pem)), self.authority()
        [(_, [(_, [_, (_, common_name)])])] = parts["subject"]
        self.assertEqual(common_name.decode(), "J\u00fcrgen")
        self.assertEqual(parts["issuer"], authority["subject"])
        self.assertNotEqual(parts["serial"], authority["serial"])
        for oid, value in (
            (self.BASIC_CONSTRAINTS, (True, [(0x30, [])])),
            (self.KEY_USAGE, (True, [(3, b"\x07\x80")])),  # digitalSignature
            (self.EXTENDED_KEY_USAGE, (False, [(0x30, [(6, client_auth)])])),
            (self.SUBJECT_KEY, (False, [(4, self.identifier(parts))])),
            (self.AUTHORITY_KEY, (False, [(0x30, [(0x80, self.identifier(authority))])])),
        ):
            with self.subTest(oid.hex()):
                self.assertEqual(parts["extensions"][oid], value)

    def test_no_two_have_a_serial_number_in_common(self):
        serials = {self.certify()["serial"] for _ in range(3)} | {self.authority()["serial"]}
        self.assertEqual(len(serials), 4)
        for serial in serials:
            self.assertTrue(0 < len(serial) <= 20)
            self.assertLess(serial[0], 128)

    def test_each_process_has_a_ca_of_its_own(self):
        done = run_script("""
        from feedtestserver import FeedTestServer
        with FeedTestServer("") as server, open(server.ca_file) as file:
            print(file.read())
        """)
        theirs = self.parsed(ssl.PEM_cert_to_DER_cert(done.stdout.strip()))
        for part in ("serial", "subject", "key"):
            self.assertNotEqual(theirs[part], self.authority()[part])

    def test_it_goes_by_the_system_s_clock_whatever_python_s_says(self):
        with mock.patch("time.time", lambda: 0.0):
            (_, begin), _ = self.certify()["validity"]
        self.assertNotIn(begin[:2], (b"69", b"70"))

    def test_the_lines_of_pem(self):
        pem = self.pem()
        self.assertEqual(ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(pem)), pem)
        self.assertLessEqual(max(map(len, pem.splitlines())), 64)
        self.assertTrue(pem.endswith("-----END CERTIFICATE-----\n"))


# End to end


class ProtocolTest(ServerTestCase):
    FEED = {"feed.xml": comment('Header: ETag: "v1"'), "b.xml": b"<b/>"}

    def test_urllib(self):
        server = self.serve(self.FEED)
        with urllib.request.urlopen(server.get_url("feed.xml")) as answer:
            self.assertEqual(answer.read(), self.FEED["feed.xml"])
            self.assertEqual(answer.headers["ETag"], '"v1"')
        request = urllib.request.Request(
            server.get_url("feed.xml"), headers={"If-None-Match": '"v1"'}
        )
        with self.assertRaises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        caught.exception.close()
        self.assertEqual(caught.exception.code, 304)

    def test_keep_alive(self):
        server = self.serve(self.FEED)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            for path, status in (("/feed.xml", 200), ("/none", 404), ("/b.xml", 200)):
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
                self.assertEqual(response.status, status)
        self.assertEqual(len({request.connection for request in server.requests}), 1)
        self.get(server, "/b.xml")
        self.assertNotEqual(server.requests[-1].connection, server.requests[0].connection)

    def test_a_request_to_close_that_is_ignored(self):
        server = self.serve()
        server.respond("/", Response(ignore=["connection"]))
        one = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        self.assertEqual(exchange_end(server, one + one).count(b"HTTP/1.1 200 OK"), 2)

    def test_a_304_ends_the_connection_if_the_200_would(self):
        server = self.serve({"feed.xml": comment("Header: Connection: close")})
        one = HEAD + b"If-None-Match: *\r\n\r\n"
        answer = Answer(exchange_end(server, one + one))
        self.assertEqual((answer.status, answer.headers["Connection"]), (304, "close"))
        self.assertEqual(answer.rest, b"")

    def test_pipelining(self):
        server = self.serve(self.FEED)
        one = b"GET /b.xml HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        rest = exchange(server, one * 20 + last + one)
        for _ in range(20):
            answer = Answer(rest)
            self.assertEqual((answer.status, answer.body), (200, b"<b/>"))
            rest = answer.rest
        self.assertEqual((Answer(rest).status, Answer(rest).rest), (404, b""))
        self.assertEqual(len(server.requests), 21)

    def test_http_1_0(self):
        server = self.serve(self.FEED)
        answer = Answer(exchange(server, b"GET /b.xml HTTP/1.0\r\n\r\n"))
        self.assertEqual((answer.body, answer.headers["Connection"]), (b"<b/>", "close"))
        kept = b"GET /b.xml HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
        answer = Answer(exchange(server, kept + b"GET /b.xml HTTP/1.0\r\n\r\n"))
        self.assertEqual(answer.headers["Connection"], "keep-alive")
        self.assertEqual(Answer(answer.rest).body, b"<b/>")

    def test_head(self):
        server = self.serve(self.FEED)
        wire = exchange(server, b"HEAD /feed.xml HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = wire.partition(b"\r\n\r\n")
        self.assertIn(b"\r\nContent-Length: %d\r\n" % len(self.FEED["feed.xml"]), head)
        self.assertEqual(body, b"")

    def test_options(self):
        server = self.serve(self.FEED)
        for target in ("*", "/feed.xml", "/none"):
            with self.subTest(target):
                response = self.get(server, target, "OPTIONS")
                self.assertEqual(
                    (response.status, response.headers["Allow"]), (204, "GET, HEAD, OPTIONS")
                )
                self.assertIsNone(response.headers["Content-Length"])
        for method in ("DELETE", "PATCH", "POST", "PUT", "TRACE"):
            response = self.get(server, "/feed.xml", method)
            self.assertEqual(
                (response.status, response.headers["Allow"]), (405, "GET, HEAD, OPTIONS")
            )

    def test_expect_100_continue(self):
        server = self.serve()
        server.respond("/", lambda request: request.body)
        head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        with connect(server) as connection:
            connection.sendall(head)
            interim = connection.recv(65536)
            self.assertEqual(interim, b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(b"abc")
            self.assertEqual(Answer(read_all(connection)).body, b"abc")
        self.assertRegex(exchange(server, head + b"abc"), rb"(?s)^HTTP/1.1 200 .*\r\n\r\nabc$")
        old = b"POST / HTTP/1.0\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        with connect(server) as connection:
            connection.sendall(old)
            connection.sendall(b"abc")
            self.assertRegex(read_all(connection), b"^HTTP/1.1 200 ")

    def test_expect_is_a_list(self):
        server = self.serve()
        server.respond("/", lambda request: request.body)
        for continues, *values in (
            (True, "100-Continue"),
            (True, "100-continue, foo"),
            (True, "foo ,\t100-continue"),
            (True, ",100-continue"),
            (True, "100-continue, ,"),
            (True, "100-continue", "100-continue"),
            (True, "foo", "100-continue"),
            (True, "100-continue", ""),
            (False, "foo"),
            (False, "foo=100-continue"),
            (False, "100-continued"),
            (False, "100 continue"),
            (False, ""),
        ):
            head = "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            head += "".join(f"Expect: {value}\r\n" for value in values)
            for framing, body in (
                ("Content-Length: 3", b"abc"),
                ("Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n"),
            ):
                with self.subTest(values, framing=framing), connect(server) as connection:
                    connection.sendall(f"{head}{framing}\r\n\r\n".encode())
                    if continues:
                        interim = connection.recv(65536)
                        self.assertEqual(interim, b"HTTP/1.1 100 Continue\r\n\r\n")
                    connection.sendall(body)
                    received = read_all(connection)
                    self.assertRegex(received, b"^HTTP/1.1 200 ")
                    self.assertEqual(Answer(received).body, b"abc")

    def test_expect_that_is_ignored(self):
        server = self.serve({"feed.xml": comment("Ignore: Expect")})
        server.respond("/x", Response(ignore=["expect"]))
        for line in (b"GET /feed.xml", b"POST /x"):
            head = line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
            with self.subTest(line), connect(server) as connection:
                connection.sendall(head + b"Expect: 100-continue\r\n" + CLOSING)
                self.assert_silent(server, connection)
                connection.sendall(b"abc")
                self.assertRegex(read_all(connection), b"^HTTP/1.1 200 ")
            self.assertEqual(server.requests[-1].body, b"abc")

    def test_a_response_without_content_and_the_next_one(self):
        server = self.serve(self.FEED)
        for status in (204, 205, 304):
            for arguments in ({}, {"chunked": 2}, {"compress": "gzip"}, {"rate": 1000}):
                server.respond("/", Response(b"12345", status, **arguments))
                for method in ("GET", "HEAD", "POST"):
                    with self.subTest(status, arguments=arguments, method=method):
                        self.check_the_next_one(server, method, status)

    def check_the_next_one(self, server, method, status):
        """Both in one go, so that bytes too many would be taken for the next response."""
        first = f"{method} / HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        last = b"GET /b.xml HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = Answer(exchange(server, first + last), method)
        length = "0" if status == 205 else None
        self.assertEqual((answer.status, answer.body), (status, b""))
        self.assertEqual(answer.headers["Content-Length"], length)
        self.assertIsNone(answer.headers["Transfer-Encoding"])
        self.assertEqual(Answer(answer.rest).body, b"<b/>")

    def test_requests_that_differ_share_no_response(self):
        """They may share what was made of it."""
        server = self.serve()
        response = Response(b"12345", headers={"ETag": '"1"'})
        server.respond("/feed.xml", response)
        server.respond("/feed.rss", response)
        seen = []
        for _ in range(2):
            for now, request, *values in (
                (NOW, b"GET /feed.xml HTTP/1.1", 200, "application/xml", None, b"12345"),
                (NOW, b"GET /feed.xml HTTP/1.0", 200, "application/xml", "close", b"12345"),
                (NOW, b"HEAD /feed.xml HTTP/1.1", 200, "application/xml", None, b""),
                (NOW, b"GET /feed.rss HTTP/1.1", 200, "application/rss+xml", None, b"12345"),
                (NOW + 1, b"GET /feed.xml HTTP/1.1", 200, "application/xml", None, b"12345"),
                (NOW, b"GET /feed.xml HTTP/1.1\r\nIf-None-Match: *", 304, None, None, b""),
                (
                    NOW,
                    b"GET /feed.xml HTTP/1.1\r\nRange: bytes=1-2",
                    206,
                    "application/xml",
                    None,
                    b"23",
                ),
            ):
                server.clock = lambda now=now: now
                with self.subTest(request):
                    received = exchange_end(server, request + b"\r\nHost: x\r\n\r\n")
                    answer = Answer(received, request.split()[0].decode())
                    fields = [answer.headers[name] for name in ("Content-Type", "Connection")]
                    self.assertEqual([answer.status, *fields, answer.body], values)
                    date = email.utils.formatdate(now, usegmt=True)
                    self.assertEqual(answer.headers["Date"], date)
                    seen.append(received)
        self.assertEqual(seen[:7], seen[7:])
        self.assertEqual(len(set(seen)), 7)

    def test_conditions_hold_for_a_fixture_of_any_2xx_and_for_no_script_of_a_put(self):
        server = self.serve({"feed.xml": comment("Status: 203", 'Header: ETag: "v1"')})
        for method, fields, status in (
            ("GET", {"If-None-Match": '"v1"'}, 304),
            ("HEAD", {"If-None-Match": '"v1"'}, 304),
            ("GET", {"If-Match": '"v2"'}, 412),
            ("GET", {"If-None-Match": '"v2"'}, 203),
        ):
            with self.subTest(method, fields=fields):
                self.assertEqual(self.get(server, "/feed.xml", method, None, fields).status, status)
        server.respond("/feed.xml", Response(status=201, headers={"ETag": '"v1"'}))
        for fields in ({"If-None-Match": "*"}, {"If-Match": '"v0"'}):
            with self.subTest(fields):
                self.assertEqual(self.get(server, "/feed.xml", "PUT", b"", fields).status, 201)

    def test_a_large_file(self):
        body = os.urandom(1_000_000) * 4
        server = self.serve(
            {"enclosure.mp3": body, "enclosure.mp3.headers": b"Header: X-Size: large"}
        )
        response = self.get(server, "/enclosure.mp3")
        self.assertEqual(
            (response.headers["X-Size"], response.headers["Content-Type"]), ("large", "audio/mpeg")
        )
        self.assertEqual(response.content, body)
        self.assertEqual(server.requests[0].response.body, body)

    def test_a_comment_that_ends_late_in_a_large_file_counts(self):
        server = self.serve(
            {"feed.xml": b"<!--\nStatus: 404\n" + b" " * 300_000 + b"-->" + b"x" * 300_000}
        )
        self.assertEqual(self.get(server, "/feed.xml").status, 404)

    def test_a_file_that_shrinks_while_it_is_sent_is_sent_as_it_was(self):
        server = self.serve({"a.bin": bytes(20_000_000)})
        path = os.path.join(server.directory, "a.bin")
        with connect(server) as connection:
            connection.sendall(b"GET /a.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            server.wait_for_request("/a.bin")
            os.truncate(path, 10)
            self.assertEqual(read_all(connection).partition(b"\r\n\r\n")[2], bytes(20_000_000))
        self.assertEqual(len(self.get(server, "/a.bin").content), 10)

    def test_a_large_body_to_a_client_that_leaves(self):
        server = self.serve({"a.bin": bytes(10_000_000)})
        with connect(server) as connection:
            connection.sendall(b"GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            connection.recv(10)
        self.assertEqual(self.get(server, "/none").status, 404)
        self.assertEqual(server.errors, [])

    def test_wrong_length_ends_the_connection(self):
        server = self.serve()
        server.respond("/", Response(b"12345", headers={"Content-Length": "4"}))
        wire = exchange(
            server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        self.assertTrue(wire.endswith(b"\r\n\r\n12345"))

    def test_directives_that_are_wrong_are_a_500_with_the_same_words(self):
        server = self.serve(
            {"feed.xml": b"<!--\nStatus: x\n-->", "a.json": b"{}", "a.json.headers": b"Stauts: 1\n"}
        )
        for name, words in (
            ("feed.xml", "line 2: Status: found 'x'; it takes three digits"),
            ("a.json.headers", "line 1: found the key 'Stauts'; the directive is Status"),
        ):
            response = self.get(server, "/" + name.replace(".headers", ""))
            where = legible(os.path.join(server.directory, name))
            self.assertEqual(response.status, 500)
            self.assertEqual(
                response.content.decode()[: len(where) + 2 + len(words)], f"{where}, {words}"
            )
            self.assertEqual(legible(server.errors[-1]), response.content.decode().rstrip("\n"))

    def test_other_hosts(self):
        server = self.serve(
            {"example.com/feed.xml": comment("Header: L: {{base_url}}"), "feed.xml": b"own"}
        )
        for target, status in (
            ("http://example.com/feed.xml", 200),
            ("http://EXAMPLE.com.:8080/feed.xml", 200),
            ("http://example.com/none", 404),
            ("http://example.com", 404),
            ("http://example.com?x", 404),
            ("http://127.0.0.1/feed.xml", 502),
            ("http://unknown.example/feed.xml", 502),
            ("http://../feed.xml", 502),
            ("http://..%2f/feed.xml", 502),
            ("http://[::1]/feed.xml", 502),
        ):
            with self.subTest(target):
                request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                self.assertEqual(Answer(exchange(server, request.encode())).status, status)
        first = server.requests[0]
        self.assertEqual(str(first), "GET http://example.com/feed.xml -> 200")
        self.assertEqual(
            (first.path, dict(first.response.headers)["L"]), ("/feed.xml", "http://example.com")
        )
        self.assertEqual(server.requests[1].url, "http://example.com:8080/feed.xml")
        self.assertEqual(len(server.errors), 5)
        self.assertEqual(
            server.errors[1],
            "GET http://unknown.example/feed.xml: no such host here; the folder"
            f" {os.path.join(server.directory, 'unknown.example')}"
            " or respond('http://unknown.example/feed.xml', ...) would respond",
        )

    def test_a_target_in_https_needs_tls_or_an_interception(self):
        server = self.serve({"example.com/feed.xml": b"<rss/>"})
        request = b"GET https://Example.com:8443/feed.xml HTTP/1.1\r\nHost: x\r\n"
        request += b"Connection: close\r\n\r\n"
        answer = Answer(exchange(server, request))
        self.assertEqual(answer.status, 400)
        self.assertEqual(answer.body, b"an https URL was asked for without TLS (RFC 9110 7.4)\n")
        with server.intercept():
            self.assertEqual(Answer(exchange(server, request)).body, b"<rss/>")
        context = server.ssl_context()
        with context.wrap_socket(connect(server), server_hostname="localhost") as connection:
            connection.sendall(request)
            self.assertEqual(Answer(read_all(connection)).body, b"<rss/>")
        self.assertEqual(server.requests[1].url, "https://example.com:8443/feed.xml")
        self.assertEqual(Answer(exchange(server, request)).status, 400)
        self.assertEqual(server.errors, [])

    def test_a_name_in_the_host_field_is_the_server_itself(self):
        server = self.serve({"example.com/feed.xml": b"other", "feed.xml": b"own"})
        self.assertEqual(
            self.get(server, "/feed.xml", headers={"Host": "example.com"}).content, b"own"
        )

    def test_handlers_may_add_methods(self):
        class Handler(FeedTestRequestHandler):
            def do_POST(self):
                self.reply(Response(self.received.body, 201))

            def do_PATCH(self):
                pass

            def do_PUT(self):
                self.reply(Response())
                self.reply(Response())

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve({}, Server)
        response = self.get(server, "/x", "POST", b"abc")
        self.assertEqual((response.status, response.content), (201, b"abc"))
        self.assertEqual(
            self.get(server, "/x", "DELETE").headers["Allow"],
            "GET, HEAD, OPTIONS, PATCH, POST, PUT",
        )
        self.assertEqual(server.errors, [])
        for method, words in (
            ("PATCH", "do_PATCH() did not call self.reply()"),
            ("PUT", "do_PUT() called self.reply() twice"),
        ):
            self.assertEqual(self.get(server, "/x", method).status, 500)
            self.assertIn(words, server.errors[-1])

    def test_nothing_is_printed_and_the_log_stays_below_warning(self):
        server = self.serve(self.FEED)
        with (
            self.assertLogs("feedtestserver", logging.DEBUG) as logs,
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(out),
        ):
            self.get(server, "/b.xml")
            exchange(server, b"\x00")
            server.stop()
        self.assertEqual(out.getvalue(), "")
        self.assertEqual(
            [record.getMessage() for record in logs.records],
            ["GET /b.xml -> 200", "(unreadable) -> 400"],
        )
        self.assertLess(max(record.levelno for record in logs.records), logging.WARNING)


class SendingTestCase(ServerTestCase):
    """Asks for one response, and looks at what comes of it, and when."""

    BODY = bytes(range(256)) * 4
    GET = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"
    LAST = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    POST = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"
    #: Stands for the head of a response.
    A_HEAD = "head"
    #: More than a client may send while nobody reads it, what the system keeps for it included.
    TOO_MUCH = 200_000_000

    def serve_one(self, server_class=FeedTestServer, **arguments):
        server = self.serve(server_class=server_class)
        server.respond("/x", Response(**{"body": self.BODY, **arguments}))
        return server

    def fetch(self, server):
        """What comes of the body, and how it ends."""
        with connect(server) as connection:
            connection.sendall(self.GET)
            received, end = read_to_the_end(connection)
        return self.body(received), end

    def body(self, received):
        """What comes after the head, which has to be whole; None where there is no head."""
        head, found, body = received.partition(b"\r\n\r\n")
        self.assertEqual(bool(head), bool(found))
        return body if head else None

    def assert_stalls(self, server, arrived):
        """So much comes of the body, or None for nothing at all; then it is open and silent."""
        with connect(server) as connection:
            connection.sendall(self.GET)
            server.wait_for_request("/x")
            received = b""
            while arrived is not None and not received.endswith(b"\r\n\r\n" + arrived):
                data = connection.recv(65536)
                self.assertTrue(data, "the connection has ended")
                received += data
            self.assert_silent(server, connection)

    def watched(self, response):
        """A server with that response, and an event: the first connection has come to its end.

        It does not come when the server stops, which cuts the code of the connection off.
        """

        class Handler(FeedTestRequestHandler):
            def converse(self):
                by_reset = yield from super().converse()
                if self.connection_number == 1:
                    finished.set()
                return by_reset

        class Server(FeedTestServer):
            handler_class = Handler

        finished = threading.Event()
        server = self.serve(server_class=Server)
        server.respond("/x", response)
        return server, finished

    def receive(self, connection, size):
        """The next bytes, as many as that; fewer if the connection ends before."""
        received = bytearray()
        while left := size - len(received):
            data = connection.recv(min(left, 65536))
            if not data:
                break
            received += data
        return bytes(received)

    def receive_head(self, connection):
        """A head, and nothing of what follows it."""
        head = b""
        while not head.endswith(b"\r\n\r\n") and (data := connection.recv(1)):
            head += data
        return head

    def connect_to_read_late(self, server):
        """A connection whose system takes little before it is read; the rest is with the server."""
        connection = socket.socket()
        self.addCleanup(connection.close)
        connection.settimeout(PATIENCE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        return connection

    def send_without_end(self, server, connection):
        """How many bytes a client gets rid of until the server takes no more, or it is too much."""
        sent = refused = 0
        data = bytes(1_000_000)
        connection.setblocking(False)
        while sent < self.TOO_MUCH and refused < 5:
            try:
                sent += connection.send(data)
                refused = 0
            except BlockingIOError:
                if select.select([], [connection], [], 0.002)[1]:
                    continue
                refused += 1
                self.assertEqual(self.get(server, "/y").status, 204)
        return sent

    def assert_seen(self, arguments, *expected, request=LAST):
        """What comes of a response, and what it waits for, in order, up to the end."""
        server = self.serve_one(**arguments)
        waits = self.clock.waits = Holding(self)
        with connect(server) as connection:
            connection.sendall(request)
            for part in expected:
                if part is self.A_HEAD:
                    self.assertRegex(self.receive_head(connection), rb"(?s)^HTTP/1.1 .*\r\n\r\n$")
                elif isinstance(part, bytes):
                    self.assertEqual(self.receive(connection, len(part)), part)
                else:
                    self.assertEqual(waits.begun.get(timeout=PATIENCE), part)
                    self.assert_nothing_more(connection)
                    waits.go_on.release()
            self.assertEqual(read_all(connection), b"")
        self.assertTrue(waits.begun.empty())
        self.assertEqual(server.errors, [])
        server.stop()

    def assert_nothing_more(self, connection, error=BlockingIOError):
        """The server waits meanwhile."""
        connection.setblocking(False)
        with self.assertRaises(error):
            self.fail(f"there is {connection.recv(65536)!r}")
        connection.settimeout(PATIENCE)


class FaultTest(SendingTestCase):
    """Slowness and faults, as the client sees them."""

    def test_places(self):
        NoTimePasses(self)
        big = os.urandom(3_000_000)
        for body, place, arrived in (
            (self.BODY, "", None),
            (self.BODY, " at start", None),
            (self.BODY, " at headers", b""),
            (self.BODY, " at 100", self.BODY[:100]),
            (self.BODY, " at 50%", self.BODY[:512]),
            (self.BODY, " at 100%", self.BODY),
            (self.BODY, " at end", self.BODY),
            (big, " at 2500000", big[:2_500_000]),
        ):
            with self.subTest(place, kind="close"):
                server = self.serve_one(body=body, fault=f"close{place}")
                self.assertEqual(self.fetch(server), (arrived, "FIN"))
                server.stop()
            with self.subTest(place, kind="reset"):
                server = self.serve_one(body=body, fault=f"reset{place}")
                self.assert_reset(self.fetch(server), arrived)
                server.stop()
            with self.subTest(place, kind="stall"):
                server = self.serve_one(body=body, fault=f"stall{place}")
                self.assert_stalls(server, arrived)
                server.stop()

    def test_at_the_end_all_of_it_has_come(self):
        """What is sent is what is sent without the fault, the last chunk included."""
        tag = {"headers": {"ETag": '"1"'}}
        conditional = self.GET.replace(b"\r\n\r\n", b'\r\nIf-None-Match: "1"\r\n\r\n')
        ranged = self.GET.replace(b"\r\n\r\n", b"\r\nRange: bytes=5-9\r\n\r\n")
        server = self.serve()
        for request, arguments in (
            (self.GET, {}),
            (self.GET, {"chunked": 100}),
            (self.GET, {"compress": "gzip", "chunked": 7}),
            (self.GET, {"body": b""}),
            (self.GET, {"body": b"", "chunked": 9}),
            (self.GET, {"status": 204}),
            (self.GET, {"status": 304, "chunked": 9}),
            (self.GET, {"body": bytes(3_000_000), "chunked": 99_999}),
            (self.GET.replace(b"GET", b"HEAD"), {"compress": "deflate"}),
            (b"GET /x HTTP/1.0\r\n\r\n", {"chunked": 9}),
            (conditional, tag),
            (ranged, {}),
            (self.GET, {"body": b"HTTP/1.1 200 OK\r\n\r\nabc", "asis": True}),
        ):
            arguments = {"body": self.BODY, **arguments}
            server.respond("/x", Response(**arguments))
            whole = exchange_end(server, request)
            for kind in ("close", "reset", "stall"):
                server.respond("/x", Response(**arguments, fault=f"{kind} at end"), 204)
                with self.subTest(request, kind=kind), connect(server) as connection:
                    connection.sendall(request + self.GET)
                    received = self.receive(connection, len(whole)) if kind == "stall" else None
                    if kind == "stall":
                        self.assertEqual(received, whole)
                        self.assert_silent(server, connection)
                    elif kind == "reset":
                        self.assert_reset(read_to_the_end(connection), whole)
                    else:
                        self.assertEqual(read_to_the_end(connection), (whole, "FIN"))
                    self.assertEqual(len(server.unused), 1)
                    record = [each for each in server.requests if each.path == "/x"]
                    self.assertEqual(record[-1].response.fault, f"{kind} at end")
        self.assertEqual(server.errors, [])

    def test_urllib_gets_what_ends_at_the_end(self):
        for kind in ("close", "stall"):
            for chunked in (None, 30):
                server = self.serve_one(fault=f"{kind} at end", chunked=chunked)
                with self.subTest(kind, chunked=chunked):
                    with urllib.request.urlopen(server.get_url("x"), timeout=PATIENCE) as answer:
                        self.assertEqual(answer.read(), self.BODY)
                    server.stop()

    def test_how_long_a_response_takes(self):
        clock = NoTimePasses(self)
        for arguments, waits in (
            ({}, []),
            ({"delay": 2.5}, [2.5]),
            ({"rate": 1000, "body": bytes(250)}, [0.1, 0.1, 0.05]),
            ({"rate": 5, "body": bytes(3)}, [0.2, 0.2, 0.2]),
            ({"rate": 1000, "body": bytes(250), "chunked": 7}, [0.1, 0.1, 0.05]),
            ({"rate": 1000, "body": bytes(250), "delay": 1}, [1, 0.1, 0.1, 0.05]),
            ({"rate": 1000, "body": bytes(250), "fault": "close at 110"}, [0.1, 0.01]),
            ({"rate": 1000, "body": b""}, []),
        ):
            with self.subTest(arguments):
                server = self.serve_one(headers=CLOSE, **arguments)
                exchange(server, self.GET)
                self.assertEqual(clock.waits, waits)
                server.stop()
                clock.waits.clear()

    def test_urllib_tells_them_apart(self):
        for fault, error in (
            ("close", http.client.RemoteDisconnected),
            ("reset", ConnectionResetError),
            ("close at 100", http.client.IncompleteRead),
            ("reset at 100", ConnectionResetError),
            ("stall", socket.timeout),
            ("stall at 100", socket.timeout),
        ):
            for chunked in (
                (None, 30) if error is not ConnectionResetError or rst() == "RST" else ()
            ):
                with self.subTest(fault, chunked=chunked):
                    server = self.serve_one(fault=fault, chunked=chunked)
                    url, timeout = server.get_url("x"), 0.05 if "stall" in fault else PATIENCE
                    with self.assertRaises(error) as caught, contextlib.ExitStack() as stack:
                        stack.enter_context(urllib.request.urlopen(url, timeout=timeout)).read()
                    self.assertIs(type(caught.exception), error)
                    server.stop()

    @unittest.skipUnless(TELLS_WHAT_ARRIVES, "the system does not tell what has arrived")
    def test_a_reset_waits_until_what_was_sent_has_arrived(self):
        clock = NoTimePasses(self)
        server = self.serve_one(body=bytes(60_000), fault="reset at 50000")
        with self.connect_to_read_late(server) as connection:
            connection.sendall(self.GET)
            self.wait_in_vain(server, clock)
            received, end = read_to_the_end(connection)
        self.assertEqual((self.body(received), end), (bytes(50_000), "RST"))

    def wait_in_vain(self, server, clock):
        """Let time pass for the server, which serves others meanwhile."""
        server.wait_for_request("/x")
        for _ in range(1000):
            self.get(server, "/none")
            if len(clock.waits) >= 5:
                return
        self.fail("it waits for no time")

    @unittest.skipUnless(TELLS_WHAT_ARRIVES, "the system does not tell what has arrived")
    def test_a_reset_that_waits_ends_when_the_client_leaves_or_the_server_stops(self):
        for leaves in (True, False):
            clock = NoTimePasses(self)
            server, finished = self.watched(Response(bytes(60_000), fault="reset at 50000"))
            with self.subTest(leaves=leaves), self.connect_to_read_late(server) as connection:
                connection.sendall(self.GET)
                self.wait_in_vain(server, clock)
                self.assertFalse(finished.is_set())
                if leaves:
                    close_by_reset(connection)
                    self.assertTrue(finished.wait(PATIENCE))
                server.stop()
                self.assertEqual(finished.is_set(), leaves)

    def test_waits_end_when_the_client_leaves_or_the_server_stops(self):
        for arguments in (
            {"delay": 86400},
            {"delay": 999_999_999},
            {"rate": 1},
            {"rate": 1, "chunked": 100},
            {"fault": "stall"},
            {"fault": "stall at headers"},
            {"fault": "stall at 50%"},
            {"fault": "stall at 100%"},
            {"fault": "stall at end"},
            {"pause": ["86400 at headers"]},
            {"pause": ["86400 at 50%"], "chunked": 100},
        ):
            for leaves in (True, False):
                server, finished = self.watched(Response(self.BODY, **arguments))
                with self.subTest(arguments, leaves=leaves), connect(server) as connection:
                    connection.sendall(self.GET)
                    server.wait_for_request("/x")
                    self.assertEqual(self.get(server, "/none").status, 404)
                    self.assertFalse(finished.is_set())
                    if leaves:
                        connection.close()
                        self.assertTrue(finished.wait(PATIENCE))
                        self.assertEqual(self.get(server, "/none").status, 404)
                    server.stop()
                    self.assertEqual(finished.is_set(), leaves)
                    self.assertEqual(server.errors, [])

    def test_the_rest_of_a_slow_body_is_not_sent_when_the_server_stops(self):
        server = self.serve_one(rate=1)
        with connect(server) as connection:
            connection.sendall(self.GET)
            server.wait_for_request("/x")
            server.stop()
            received, _ = read_to_the_end(connection)
        self.assertLess(len(received.partition(b"\r\n\r\n")[2]), len(self.BODY) // 2)

    def test_a_reset_awaits_a_client_that_has_shut_down_the_sending_side(self):
        body = os.urandom(3_000_000)
        server = self.serve_one(body=body, fault="reset at 100%")
        with connect(server) as connection:
            connection.sendall(self.GET)
            connection.shutdown(socket.SHUT_WR)
            received, end = read_to_the_end(connection)
        self.assert_reset((received.partition(b"\r\n\r\n")[2], end), body)

    def test_a_client_that_resets_during_a_callable_is_no_error(self):
        begun, gone = threading.Event(), threading.Event()

        def respond(request):
            begun.set()
            gone.wait(PATIENCE)
            return b""

        server = self.serve()
        server.respond("/x", respond)
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.assertTrue(begun.wait(PATIENCE))
            close_by_reset(connection)
        gone.set()
        server.wait_for_request("/x")
        server.stop()
        self.assertEqual(server.errors, [])

    def test_what_comes_during_a_callable_that_fails_resets_nothing(self):
        begun, go_on = threading.Event(), threading.Event()

        def fail(request):
            begun.set()
            go_on.wait(PATIENCE)
            raise ValueError("no response")

        server = self.serve()
        server.respond("/x", fail)
        with connect(server) as connection:
            connection.sendall(b"POST /x HTTP/1.0\r\nContent-Length: 1\r\n\r\n1")
            self.assertTrue(begun.wait(PATIENCE))
            connection.sendall(b"\r\n")
            go_on.set()
            self.assertEqual(Answer(read_all(connection)).status, 500)

    def test_a_reset_though_more_was_sent(self):
        server = self.serve_one(fault="reset at 100")
        with connect(server) as connection:
            connection.sendall(self.GET * 3)
            received, end = read_to_the_end(connection)
        self.assert_reset((received.partition(b"\r\n\r\n")[2], end), self.BODY[:100])
        server.stop()
        self.assertEqual(len(server.requests), 1)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_reset_though_a_forked_child_has_the_connection(self):
        script = """
        import os, signal, socket, sys
        from feedtestserver import FeedTestServer, Response
        with FeedTestServer(sys.argv[1]) as server:
            server.respond("/x", 204, Response(fault="reset"))
            with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
                connection.sendall(b"GET /x HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
                connection.recv(1000)
                child = os.fork()
                if not child:
                    signal.pause()
                connection.sendall(b"GET /x HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
                try:
                    print(connection.recv(1000))
                except OSError as error:
                    print(type(error).__name__)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.stdout, done.stderr), ("ConnectionResetError\n", ""))

    def test_a_half_closed_client_gets_the_rest_at_once(self):
        for arguments in (
            {},
            {"delay": 86400},
            {"delay": 86400, "rate": 1},
            {"rate": 1, "chunked": 100},
            {"pause": ["86400 at headers", "86400 at 50%"], "chunked": 100},
            {"body": os.urandom(300_000), "rate": 1000},
        ):
            server = self.serve_one(**arguments)
            with self.subTest(arguments), connect(server) as connection:
                connection.sendall(self.GET)
                connection.shutdown(socket.SHUT_WR)
                wire = read_all(connection)
                self.assertEqual(Answer(wire).body, arguments.get("body", self.BODY))
                server.stop()

    def test_a_client_that_half_closes_during_a_wait(self):
        for arguments in ({"delay": 86400}, {"rate": 1}, {"pause": ["86400 at 9"]}):
            server = self.serve_one(**arguments)
            with self.subTest(arguments), connect(server) as connection:
                connection.sendall(self.GET)
                server.wait_for_request("/x")
                self.assertEqual(self.get(server, "/none").status, 404)
                connection.shutdown(socket.SHUT_WR)
                self.assertEqual(Answer(read_all(connection)).body, self.BODY)
                server.stop()

    def test_a_client_that_half_closes_during_a_callable(self):
        for arguments in ({}, {"delay": 86400, "rate": 1}):
            server, begun, go_on = self.serve_a_blocking_callable(Response(b"x", **arguments))
            with self.subTest(arguments), connect(server) as connection:
                connection.sendall(self.GET)
                self.assertTrue(begun.wait(PATIENCE))
                connection.shutdown(socket.SHUT_WR)
                self.assert_silent(server, connection)
                go_on.set()
                self.assertEqual(Answer(read_all(connection)).body, b"x")
                server.stop()

    def test_a_client_that_half_closes_before_a_request_is_whole(self):
        server = self.serve_one()
        for sent, status in ((b"", None), (self.GET[:20], 400), (self.POST, 400)):
            with self.subTest(sent), connect(server) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                received = read_all(connection)
                self.assertEqual(Answer(received).status if received else None, status)
        self.assertEqual([request.response.status for request in server.requests], [400, 400])
        self.assertEqual(server.errors, [])

    def test_a_client_that_connects_and_sends_nothing(self):
        server, finished = self.watched(Response(self.BODY, headers=CLOSE))
        with connect(server) as leaves, connect(server) as stays:
            self.assert_silent(server, leaves)
            self.assert_silent(server, stays)
            self.assertFalse(finished.is_set())
            leaves.close()
            self.assertTrue(finished.wait(PATIENCE))
            self.assert_silent(server, stays)
            stays.sendall(self.GET)
            self.assertEqual(Answer(read_all(stays)).body, self.BODY)
        self.assertEqual([request.path for request in server.requests].count("/x"), 1)
        self.assertEqual(server.errors, [])

    def test_a_close_is_no_reset_though_more_was_sent(self):
        closing = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        plain = {"headers": {"ETag": '"1"'}}
        asis = {"body": b"HTTP/1.0 200 OK\r\n\r\n" + bytes(3_000_000), "asis": True}
        for request, arguments in (
            (self.GET, {"fault": "close at 100%"}),
            (self.GET, {"fault": "close at end"}),
            (closing, {"fault": "close at 100%"}),
            (b"GET /x HTTP/1.0\r\n\r\n", {"fault": "close at 100%"}),
            (b"GET /x HTTP/1.0\r\n\r\n", asis),
            (b"GET /x HTTP/1.0\r\n\r\n", plain),
        ):
            server = self.serve_one(**{"body": bytes(3_000_000), **arguments})
            with connect(server) as connection:
                connection.sendall(request)
                server.wait_for_request("/x")
                connection.sendall(b"more")
                received, end = read_to_the_end(connection)
            self.assertEqual((len(received.partition(b"\r\n\r\n")[2]), end), (3_000_000, "FIN"))

    def test_requests_that_arrive_meanwhile_are_kept_and_end_no_wait(self):
        for arguments in ({"delay": 86400}, {"rate": 1}, {"pause": ["86400 at 9"]}):
            server = self.serve_one(**arguments)
            server.respond("/y", Response(b"y"))
            with self.subTest(arguments), connect(server) as connection:
                connection.sendall(self.GET)
                server.wait_for_request("/x")
                connection.sendall(b"GET /y HTTP/1.1\r\nHost: x\r\n\r\n")
                self.assertEqual(self.get(server, "/none").status, 404)
                self.assertEqual([request.path for request in server.requests], ["/x", "/none"])
                connection.shutdown(socket.SHUT_WR)
                first = Answer(read_all(connection))
                self.assertEqual((first.body, Answer(first.rest).body), (self.BODY, b"y"))
                server.stop()

    def serve_a_blocking_callable(self, response=204):
        """A server with a callable, and events: it has begun, it is to go on."""

        def respond(request):
            begun.set()
            go_on.wait(3 * PATIENCE)
            return response

        begun, go_on = threading.Event(), threading.Event()
        server = self.serve()
        self.addCleanup(go_on.set)
        server.respond("/x", respond)
        return server, begun, go_on

    def test_a_client_that_keeps_sending_during_a_wait_is_not_read_without_end(self):
        for arguments in ({"delay": 86400}, {"fault": "stall"}, {"body": bytes(20_000_000)}):
            server = self.serve_one(**arguments)
            server.respond("/y", 204)
            with self.subTest([*arguments]), connect(server) as connection:
                connection.sendall(self.GET)
                server.wait_for_request("/x")
                self.assertLess(self.send_without_end(server, connection), self.TOO_MUCH)
                server.stop()

    def test_a_client_that_keeps_sending_during_a_callable_is_not_read_without_end(self):
        for is_new in (True, False):
            server, begun, go_on = self.serve_a_blocking_callable()
            server.respond("/y", 204)
            with self.subTest(is_new=is_new), connect(server) as connection:
                if not is_new:
                    connection.sendall(b"GET /y HTTP/1.1\r\nHost: x\r\n\r\n")
                    self.assertIn(b" 204 ", connection.recv(65536))
                connection.sendall(self.GET)
                self.assertTrue(begun.wait(PATIENCE))
                self.assertLess(self.send_without_end(server, connection), self.TOO_MUCH)
                go_on.set()

    def test_pipelined_requests_during_a_callable(self):
        server, begun, go_on = self.serve_a_blocking_callable(b"x")
        server.respond("/y", b"y", lambda request: request.body)
        post = b"POST /y HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n"
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.assertTrue(begun.wait(PATIENCE))
            connection.sendall(b"GET /y HTTP/1.1\r\nHost: x\r\n\r\n" + self.GET)
            connection.sendall(post + b"Connection: close\r\n\r\n" + bytes(200_000))
            self.assert_silent(server, connection)
            self.assertEqual([request.path for request in server.requests], ["/none"])
            go_on.set()
            answers = [Answer(read_all(connection))]
        while answers[-1].rest:
            answers.append(Answer(answers[-1].rest))
        self.assertEqual([answer.body for answer in answers], [b"x", b"y", b"x", bytes(200_000)])
        self.assertEqual(
            [str(request) for request in server.requests[1:]],
            ["GET /x -> 200", "GET /y -> 200", "GET /x -> 200", "POST /y -> 200"],
        )
        self.assertEqual(len({request.connection for request in server.requests[1:]}), 1)

    def test_a_client_that_leaves_during_a_callable(self):
        server, begun, go_on = self.serve_a_blocking_callable()
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.assertTrue(begun.wait(PATIENCE))
        self.assertEqual(self.get(server, "/none").status, 404)
        go_on.set()
        self.assertEqual(str(server.wait_for_request("/x")), "GET /x -> 204")
        self.assertEqual(self.get(server, "/none").status, 404)
        self.assertEqual(server.errors, [])

    def test_no_client_delays_another(self):
        """Whatever the server is waiting for, the next client gets its response."""

        class Handler(FeedTestRequestHandler):
            def do_PUT(self):
                self.reply(block(self.received))

        class Server(FeedTestServer):
            handler_class = Handler

        def block(request):
            begun.release()
            go_on.wait(3 * PATIENCE)
            return Response(status=204)

        begun, go_on = threading.Semaphore(0), threading.Event()
        server = self.serve({"x.bin": bytes(5_000_000)}, server_class=Server)
        self.addCleanup(go_on.set)
        steps = (
            block,
            Response(fault="stall"),
            Response(self.BODY, fault="stall at 50%"),
            Response(delay=86400),
            Response(self.BODY, rate=1),
            Response(bytes(20_000_000)),
            Response(bytes(20_000_000), chunked=100),
            "x.bin",
        )
        for number, step in enumerate(steps):
            server.respond(f"/{number}", step)
        gets = [b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(len(steps))]
        with contextlib.ExitStack() as stack:
            for sent in (
                *gets,
                *(b"", self.GET[:20], self.POST, b"\x16\x03\x01\x02\x00\x01", self.GET),
                self.GET.replace(b"GET", b"PUT"),
                gets[-1] * 500,
                b"refused\r\n\r\n",
            ):
                with self.subTest(sent[:50]):
                    stack.enter_context(connect(server)).sendall(sent)
                    if sent == gets[0] or sent.startswith(b"PUT"):
                        self.assertTrue(begun.acquire(timeout=PATIENCE))
                    elif sent in gets:
                        server.wait_for_request(sent.split()[1].decode())
                    self.assertEqual(self.get(server, "/none").status, 404)
            go_on.set()
        self.assertEqual(server.errors, [])

    def test_many_stalls_delay_no_other_client(self):
        for arguments in ({"fault": "stall"}, {"pause": ["86400 at 50%"]}):
            server = self.serve_one(**arguments)
            threads = threading.active_count()
            with self.subTest(arguments), contextlib.ExitStack() as stack:
                for _ in range(100):
                    stack.enter_context(connect(server)).sendall(self.GET)
                server.wait_for_request("/x", times=100)
                self.assertEqual(self.get(server, "/none").status, 404)
                self.assertEqual(threading.active_count(), threads)
                server.stop()

    def test_compressing_delays_no_other_client(self):
        begun, go_on = threading.Event(), threading.Event()
        compressobj = zlib.compressobj

        def slow(*args, **kwargs):
            begun.set()
            go_on.wait(3 * PATIENCE)
            return compressobj(*args, **kwargs)

        body = bytes(3_000_000)
        server = self.serve_one(body=body, compress="gzip", headers=CLOSE)
        self.addCleanup(go_on.set)
        with mock.patch.object(zlib, "compressobj", slow), connect(server) as connection:
            connection.sendall(self.GET)
            self.assertTrue(begun.wait(PATIENCE))
            self.assert_silent(server, connection)
            go_on.set()
            self.assertEqual(gzip.decompress(Answer(read_all(connection)).body), body)

    def test_large_downloads_take_turns(self):
        """Also where they are sent in many small pieces, as fast as the client takes them."""
        for size, most, arguments in (  # the last block has to wait, but counts
            (3_000_000, 800_000, {}),
            (80_000, 400_000, {"chunked": 1}),  # which are sent as 480,000
            (1_000_000, 800_000, {"chunked": 1000}),
            (1_000_000, 800_000, {"rate": 10_000}),
        ):
            with self.subTest(arguments):
                sent = self.sent_in_turn(os.urandom(size), arguments)
                before = itertools.takewhile(lambda part: part[0] == 1, sent)
                self.assertLess(sum(size for _, size in before), most)

    def sent_in_turn(self, body, arguments):
        """What two clients, who ask at once, are sent: the number of the connection, and bytes."""
        sent, held, go_on = [], threading.Event(), threading.Event()

        class Handler(FeedTestRequestHandler):
            def send(self, data):
                sent.append((self.connection_number, len(data)))
                yield from super().send(data)

        class Server(FeedTestServer):
            handler_class = Handler

        def hold():
            held.set()
            go_on.wait(3 * PATIENCE)
            return NOW

        def fetch(connection):
            self.assertTrue(read_all(connection).endswith(b"\r\n\r\n" + coded))

        size, coded = arguments.get("chunked"), body
        if size:
            chunks = [body[start : start + size] for start in range(0, len(body), size)]
            coded = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
        server = self.serve(server_class=Server)
        server.respond("/x", Response(body, **arguments))
        self.addCleanup(go_on.set)
        server.clock = hold  # it is called in the thread that serves both
        with connect(server) as first, connect(server) as second:
            for connection in (first, second):
                connection.sendall(self.GET)
                connection.shutdown(socket.SHUT_WR)  # what is slow goes on at once
                self.assertTrue(held.wait(PATIENCE))
            go_on.set()
            run_at_once([functools.partial(fetch, connection) for connection in (first, second)])
        server.stop()
        return sent

    def test_a_client_that_pipelines_many_requests_takes_turns_with_others(self):
        def hold():
            held.set()
            go_on.wait(3 * PATIENCE)
            return NOW

        held, go_on = threading.Event(), threading.Event()
        server = self.serve_one(body=b"x")
        server.respond("/y", 204)
        self.addCleanup(go_on.set)
        server.clock = hold  # it is called in the thread that serves all
        with connect(server) as first, connect(server) as second:
            first.sendall(self.GET)
            self.assertTrue(held.wait(PATIENCE))
            first.setblocking(False)
            sent = first.send(self.GET * 1000)
            first.settimeout(PATIENCE)
            first.shutdown(socket.SHUT_WR)
            second.sendall(b"GET /y HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            go_on.set()
            run_at_once([functools.partial(read_all, each) for each in (first, second)])
        paths = [request.path for request in server.requests]
        self.assertGreaterEqual(len(paths), sent // len(self.GET))
        self.assertLess(paths.index("/y"), len(paths) // 2)

    def test_a_callable_that_stops_the_server_and_responds_by_a_stall(self):
        server = self.serve()

        def respond(request):
            server.stop()
            return Response(self.BODY, delay=86400, fault="stall at 100")

        server.respond("/x", respond)
        self.assertEqual(self.fetch(server), (self.BODY[:100], "FIN"))

    def test_http_1_0_gets_no_chunks(self):
        server = self.serve_one(chunked=10)
        answer = exchange(server, b"GET /x HTTP/1.0\r\n\r\n")
        self.assertTrue(answer.endswith(b"\r\n\r\n" + self.BODY))
        self.assertIsNone(server.requests[0].response.chunked)
        self.get(server, "/x")
        self.assertEqual(server.requests[1].response.chunked, 10)

    def test_large_files(self):
        clock = NoTimePasses(self)
        body = os.urandom(700_001)
        changes = {
            "plain": b"",
            "small-chunks": b"Chunked: 70",
            "chunks": b"Chunked: 99999",
            "large-chunks": b"Chunked: 400000",
            "slow": b"Rate: 33333",
            "packed": b"Compress: gzip",
            "reset": b"Fault: reset at 600000",
            "cut": b"Fault: close at 50%",
        }
        files = {f"{name}.bin.headers": line for name, line in changes.items()}
        server = self.serve({**files, **dict.fromkeys((f"{name}.bin" for name in changes), body)})
        for name in ("plain", "small-chunks", "chunks", "large-chunks", "slow"):
            with self.subTest(name):
                self.assertEqual(self.get(server, f"/{name}.bin").content, body)
        self.assertEqual(len(clock.waits), -(-700_001 // 3333))
        response = self.get(server, "/plain.bin", headers={"Range": "bytes=300000-599999"})
        self.assertEqual((response.status, response.content), (206, body[300_000:600_000]))
        self.assertEqual(server.requests[-1].response.body, body[300_000:600_000])
        self.assertEqual(gzip.decompress(self.get(server, "/packed.bin").content), body)
        server.respond("/x", "reset.bin")
        self.assert_reset(self.fetch(server), body[:600_000])
        with self.assertRaises(http.client.IncompleteRead) as caught:
            self.get(server, "/cut.bin", headers={"Range": "bytes=100000-499999"})
        self.assertEqual(caught.exception.partial, body[100_000:300_000])

    def test_resumed(self):
        body, etag = os.urandom(5000), b'Header: ETag: "1"\n'
        files = {"a.mp3": body, "a.mp3.headers": etag, "cut.mp3": body}
        server = self.serve({**files, "cut.mp3.headers": etag + b"Fault: close at 40%"})
        server.respond("/a.mp3", "cut.mp3", "a.mp3")
        with self.assertRaises(http.client.IncompleteRead) as caught:
            self.get(server, "/a.mp3")
        first = caught.exception.partial
        self.assertEqual(len(first), 2000)
        headers = {"Range": f"bytes={len(first)}-", "If-Range": '"1"'}
        rest = self.get(server, "/a.mp3", headers=headers)
        self.assertEqual((rest.status, first + rest.content), (206, body))

    def test_a_response_as_it_is(self):
        wire = b"HTTP/1.1 200 OK\nSet-Cookie : a\nContent-Length: ten\n\n<rss/>"
        server = self.serve({"odd.asis": wire, "ODD.ASIS": wire, "large.asis": wire * 9999})
        for path, method in (("/odd.asis", "GET"), ("/ODD.ASIS", "GET"), ("/odd.asis", "HEAD")):
            request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-1\r\n\r\n"
            self.assertEqual(exchange(server, request.encode() * 2), wire)
            self.assertEqual(server.requests[-1].response.status, 200)
        self.assertEqual(len(server.requests), 3)
        request = b"GET /large.asis HTTP/1.1\r\nHost: x\r\n\r\n"
        self.assertEqual(exchange(server, request), wire * 9999)
        server.respond("/x", "odd.asis", Response(wire, asis=True, rate=100, fault="reset at 9"))
        self.assertEqual(exchange(server, self.GET), wire)
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.assert_reset(read_to_the_end(connection), wire[:9])

    def test_directives_of_a_response_as_it_is(self):
        clock = NoTimePasses(self)
        wire = b"HTTP/1.1 204 \r\n\r\n" + comment("Status: 410", "Delay: 3", "Expect: x")
        server = self.serve({"slow.asis": wire})
        self.assertEqual(exchange(server, b"GET /slow.asis HTTP/1.1\r\nHost: x\r\n\r\n"), wire)
        self.assertEqual(clock.waits, [3])
        self.assertEqual(str(server.requests[0]), "GET /slow.asis -> 204")

    def test_a_response_on_record_can_be_given_again(self):
        NoTimePasses(self)
        slow = {"rate": 1000, "delay": 1, "pause": ["1 at 3", "2 at headers"]}
        server = self.serve_one(compress="gzip", chunked=5, **slow)
        first = self.get(server, "/x")
        server.respond("/x", server.requests[0].response)
        again = self.get(server, "/x")
        self.assertEqual(first.headers.items(), again.headers.items())
        self.assertEqual(first.content, again.content)


class PauseTest(SendingTestCase):
    """Pauses, as the client sees them."""

    BODY = b"0123456789"

    def setUp(self):
        self.clock = NoTimePasses(self)

    def test_places(self):
        head = self.A_HEAD
        for places, *expected in (
            (["2 at headers"], head, 2, self.BODY),
            (["2 at 0"], head, 2, self.BODY),
            (["2 at 0%"], head, 2, self.BODY),
            (["2 at 4"], head, b"0123", 2, b"456789"),
            (["2 at 50%"], head, b"01234", 2, b"56789"),
            (["2 at 59%"], head, b"01234", 2, b"56789"),
            (["2 at 10"], head, self.BODY, 2),
            (["2 at 100%"], head, self.BODY, 2),
            (["2 at 11"], head, self.BODY),
            (["2 at 999999999999"], head, self.BODY),
            ([".25 at 4"], head, b"0123", 0.25, b"456789"),
            (["0 at 4"], head, self.BODY),
            (["3 at 8", "1 at headers", "2 at 50%"], head, 1, b"01234", 2, b"567", 3, b"89"),
            (["1 at 80%", "2 at 11", "3 at 2"], head, b"01", 3, b"234567", 1, b"89"),
            (["2 at 5", "1 at 50%", "3 at 5"], head, b"01234", 2, 1, 3, b"56789"),
            (["2 at 50%", "1 at 50%"], head, b"01234", 2, 1, b"56789"),
            (["1 at headers", "2 at headers"], head, 1, 2, self.BODY),
        ):
            with self.subTest(places):
                self.assert_seen({"pause": places}, *expected)

    def test_combined_with_other_directives(self):
        head = self.A_HEAD
        coded = packed(self.BODY)
        half = len(coded) // 2
        asis = b"HTTP/1.1 200 OK\r\n\r\n0123"
        for arguments, *expected in (
            ({"delay": 3, "pause": ["2 at headers"]}, 3, head, 2, self.BODY),
            ({"delay": 3, "pause": ["2 at 4"]}, 3, head, b"0123", 2, b"456789"),
            (
                {"rate": 40, "pause": ["2 at 4", "1 at 8"]},
                *(head, 0.1, b"0123", 2, 0.1, b"4567", 1, 0.05, b"89"),
            ),
            ({"rate": 40, "pause": ["2 at headers"], "body": b"0123"}, head, 2, 0.1, b"0123"),
            ({"rate": 40, "pause": ["2 at 4"], "body": b"0123"}, head, 0.1, b"0123", 2),
            (
                {"chunked": 4, "pause": ["2 at 6"]},
                *(head, b"4\r\n0123\r\n4\r\n45", 2, b"67\r\n2\r\n89\r\n0\r\n\r\n"),
            ),
            (
                {"chunked": 4, "pause": ["2 at 4"]},
                *(head, b"4\r\n0123\r\n", 2, b"4\r\n4567\r\n2\r\n89\r\n0\r\n\r\n"),
            ),
            (
                {"chunked": 4, "pause": ["2 at 100%"]},
                *(head, b"4\r\n0123\r\n4\r\n4567\r\n2\r\n89\r\n", 2, b"0\r\n\r\n"),
            ),
            (
                {"chunked": 9, "pause": ["2 at headers"], "body": b"0123"},
                *(head, 2, b"4\r\n0123\r\n0\r\n\r\n"),
            ),
            (
                {"chunked": 4, "rate": 40, "pause": ["2 at 4"], "body": b"0123"},
                *(head, 0.1, b"4\r\n0123\r\n", 2, b"0\r\n\r\n"),
            ),
            ({"compress": "gzip", "pause": ["2 at 3"]}, head, coded[:3], 2, coded[3:]),
            ({"compress": "gzip", "pause": ["2 at 50%"]}, head, coded[:half], 2, coded[half:]),
            ({"fault": "close", "pause": ["2 at headers"]},),
            ({"fault": "close at headers", "pause": ["2 at headers"]}, head, 2),
            ({"fault": "close at headers", "pause": ["2 at 1"]}, head),
            ({"fault": "close at 4", "pause": ["2 at 4", "1 at 5"]}, head, b"0123", 2),
            ({"fault": "close at 4", "pause": ["2 at 3"]}, head, b"012", 2, b"3"),
            ({"fault": "close at 50%", "pause": ["2 at 6"]}, head, b"01234"),
            ({"fault": "close at end", "pause": ["2 at 100%"]}, head, self.BODY, 2),
            (
                {"fault": "close at end", "pause": ["2 at 4"], "chunked": 4, "body": b"0123"},
                *(head, b"4\r\n0123\r\n", 2, b"0\r\n\r\n"),
            ),
            (
                {"headers": {"Content-Length": "4"}, "pause": ["2 at 7"]},
                head,
                b"0123456",
                2,
                b"789",
            ),
            ({"asis": True, "body": asis, "pause": ["2 at 9"]}, asis[:9], 2, asis[9:]),
            ({"asis": True, "body": asis, "pause": ["2 at 0"]}, 2, asis),
            ({"body": b"", "pause": ["2 at headers", "1 at 1"]}, head, 2),
            ({"body": b"", "chunked": 4, "pause": ["2 at headers"]}, head, 2, b"0\r\n\r\n"),
        ):
            with self.subTest(arguments):
                self.assert_seen(arguments, *expected)

    def test_places_that_are_never_reached(self):
        head = self.A_HEAD
        pauses = {"pause": ["2 at 5", "1 at headers", "3 at 50%"]}
        tagged = {**pauses, "headers": {"ETag": '"1"'}}
        conditional = self.LAST.replace(b"\r\n\r\n", b'\r\nIf-None-Match: "1"\r\n\r\n')
        for request, arguments in (
            (self.LAST.replace(b"GET", b"HEAD"), pauses),
            (self.LAST.replace(b"GET", b"HEAD"), {**pauses, "chunked": 4}),
            (self.LAST, {**pauses, "status": 204}),
            (self.LAST, {**pauses, "status": 304}),
            (conditional, tagged),
        ):
            with self.subTest(request, arguments=arguments):
                self.assert_seen(arguments, head, 1, request=request)

    def test_a_place_counts_in_the_part_that_a_range_asks_for(self):
        request = self.LAST.replace(b"\r\n\r\n", b"\r\nRange: bytes=2-7\r\n\r\n")
        for pause, *expected in (
            ("2 at 50%", b"234", 2, b"567"),
            ("2 at 4", b"2345", 2, b"67"),
            ("2 at 7", b"234567"),
        ):
            with self.subTest(pause):
                self.assert_seen({"pause": [pause]}, self.A_HEAD, *expected, request=request)

    def test_http_1_0(self):
        request = b"GET /x HTTP/1.0\r\n\r\n"
        arguments = {"pause": ["2 at 4"], "chunked": 3}
        self.assert_seen(arguments, self.A_HEAD, b"0123", 2, b"456789", request=request)

    def test_in_tls(self):
        server = self.serve()
        server.respond("/x", Response(self.BODY, pause=["2 at headers", "1 at 4"]))
        context = server.ssl_context()
        with context.wrap_socket(connect(server), server_hostname="localhost") as connection:
            waits = self.clock.waits = Holding(self)
            connection.sendall(self.LAST)
            self.receive_head(connection)
            for seconds, part in ((2, b"0123"), (1, b"456789")):
                self.assertEqual(waits.begun.get(timeout=PATIENCE), seconds)
                self.assert_nothing_more(connection, ssl.SSLWantReadError)
                waits.go_on.release()
                self.assertEqual(self.receive(connection, len(part)), part)
            self.assertEqual(read_all(connection), b"")

    def test_the_clock_of_rate_stands_still(self):
        """Wherever the place is, the body takes as long as without the pause."""
        for places in (["2 at 3", "3 at 7"], ["5 at headers"], ["1 at 1", "4 at 100%"]):
            for chunked in (None, 3):
                with self.subTest(places, chunked=chunked):
                    arguments = {"rate": 40, "pause": places, "chunked": chunked}
                    server = self.serve_one(headers=CLOSE, **arguments)
                    self.clock.waits.clear()
                    self.assertEqual(Answer(exchange(server, self.GET)).body, self.BODY)
                    self.assertAlmostEqual(sum(self.clock.waits), 5.25, 3)
                    server.stop()

    def test_it_changes_no_byte(self):
        """Whatever else happens to the response on its way."""
        chance = random.Random(16)
        server = self.serve()
        for _ in range(60):
            arguments = {
                "body": chance.randbytes(chance.choice((0, 1, 40, 300))),
                "chunked": chance.choice((None, 1, 7, 40)),
                "rate": chance.choice((None, 33, 1000)),
                "compress": chance.choice((None, None, "gzip")),
                "fault": chance.choice((None, None, "close at 20", "close at 75%", "close at end")),
            }
            ends = ("headers", "0", "7", "20", "40", "41", "33%", "75%", "100%")
            pauses = [f"1 at {chance.choice(ends)}" for _ in range(chance.randrange(1, 5))]
            with self.subTest(pauses, arguments=arguments):
                server.respond("/x", Response(**arguments), Response(**arguments, pause=pauses))
                self.assertEqual(exchange(server, self.LAST), exchange(server, self.LAST))

    def test_a_pause_begins_when_its_place_is_reached(self):
        """However late that is, it takes as long as it says."""
        self.clock.late = 0.5
        server = self.serve_one(delay=1, pause=["2 at 4", "3 at 5"])
        self.assertEqual(self.get(server, "/x").content, self.BODY)
        self.assertEqual(self.clock.waits, [1, 2, 3])
        self.clock.waits.clear()
        body = bytes(12_000_000)
        server.respond("/x", Response(body, pause=["2 at 100%"]))
        with self.connect_to_read_late(server) as connection:
            connection.sendall(self.GET)
            server.wait_for_request("/x", times=2)
            self.assertEqual(self.get(server, "/none").status, 404)
            self.clock.time += 100  # it does not read so long
            self.receive_head(connection)
            self.assertEqual(len(self.receive(connection, len(body))), len(body))
            connection.sendall(LAST)
            self.assertEqual(Answer(read_all(connection)).status, 404)
        self.assertEqual(self.clock.waits, [2])

    def test_a_large_body(self):
        body = os.urandom(3_000_000)
        places = ["2 at 2500000", "1 at 10%", "3 at 100%", "4 at 262144"]
        pauses = "".join(f"Pause: {place}\n" for place in places).encode()
        server = self.serve({"x.bin": body, "x.bin.headers": pauses})
        # A client that goes by the length might leave during the last pause.
        received = exchange(server, self.LAST.replace(b"/x", b"/x.bin"))
        self.assertTrue(Answer(received).body == body)  # too long to be shown
        self.assertEqual(self.clock.waits, [4, 1, 2, 3])

    def test_the_connection_goes_on(self):
        server = self.serve_one(pause=["2 at 4"])
        rest = exchange(server, self.GET * 2 + LAST)
        for body in (self.BODY, self.BODY):
            answer = Answer(rest)
            self.assertEqual((answer.body, answer.headers["Connection"]), (body, None))
            rest = answer.rest
        self.assertEqual(Answer(rest).status, 404)
        self.assertEqual(self.clock.waits, [2, 2])

    def test_pauses_of_a_fixture(self):
        lines = ("Pause: 3 at 80%", "pause:  1  AT  Headers", "Pause: 2 at 5")
        server = self.serve({"feed.xml": comment(*lines)})
        self.assertEqual(self.get(server, "/feed.xml").content, comment(*lines))
        self.assertEqual(self.clock.waits, [1, 2, 3])
        response = server.requests[0].response
        self.assertEqual(sorted(response.pause), ["1 at headers", "2 at 5", "3 at 80%"])


class StreamTest(SendingTestCase):
    """Bodies that are iterables, as the client and the test see them."""

    OLD = b"GET /x HTTP/1.0\r\n\r\n"

    def test_one_that_is_cut_has_not_come_whole(self):
        """Nor if neither chunks nor a length tell how long it would be."""
        for without in ((), ("Transfer-Encoding",)):
            server = self.serve()
            arguments = {"headers": {"ETag": '"1"'}, "without": without, "fault": "reset at 1"}
            server.respond("/x", Response([b"a", b"bc"], **arguments))
            request = b"".join(b"%s: %s\r\n" % (k.encode(), v.encode()) for k, v in POLITE.items())
            for _ in range(2):
                with self.subTest(without), connect(server) as connection:
                    connection.sendall(self.GET[:-2] + request + b"\r\n")
                    self.assertEqual(read_to_the_end(connection)[1], rst())
            self.assertEqual(audit(server.requests), [])

    def gated(self, *items):
        """A generator of these, the event of its end, and what lets it go on, item by item."""

        def generate():
            try:
                for item in items:
                    go_on.acquire(timeout=3 * PATIENCE)
                    yield item
                go_on.acquire(timeout=3 * PATIENCE)
            finally:
                ended.set()

        ended, go_on = threading.Event(), threading.Semaphore(0)
        self.addCleanup(go_on.release, 1000)
        return generate(), ended, go_on

    def endless(self, item, most=INFINITY):
        """A generator of that item, the list of what it has produced, and the event of its end."""

        def generate():
            try:
                while len(produced) < most:
                    produced.append(len(item))
                    yield item
            finally:
                ended.set()

        produced, ended = [], threading.Event()
        return generate(), produced, ended

    def chunks(self, data, whole=True):
        """The chunks of a body, the last of which may be cut short unless it has come whole."""
        found = []
        while data:
            size, _, data = data.partition(b"\r\n")
            self.assertRegex(size[:20], rb"^[0-9a-fA-F]+$")
            found.append(data[: int(size, 16)])
            data = data[len(found[-1]) + 2 :]
        self.assertEqual(found[-1:] == [b""], whole)
        return list(filter(None, found))

    def one_error(self, server, *words):
        """The one error there is, which names the request and begins in the test's code."""
        [error] = server.errors
        for word in ("GET /x", *words):
            self.assertIn(word, error)
        server.clear()
        return error

    # What is sent

    def test_whatever_produces_bytes(self):
        class Iterable:
            def __iter__(self):
                return iter([b"a", b"bc"])

        old_request = b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"

        class Odd:
            """It has no truth, and its length and comparison mean something else."""

            __hash__ = None

            def __iter__(self):
                return iter([b"ab", b"c"])

            def __len__(self):
                return 10**9

            def __bool__(self):
                raise ZeroDivisionError

            __eq__ = __bool__

        numbers = array.array("H", [1, 2])
        for make, body in (
            (Odd, b"abc"),
            (lambda: [b"a", b"bc"], b"abc"),
            (lambda: (b"a", b"bc"), b"abc"),
            (lambda: iter([b"a", b"bc"]), b"abc"),
            (lambda: (item for item in (b"a", b"bc")), b"abc"),
            (lambda: map(bytes, [[97], [98, 99]]), b"abc"),
            (lambda: Produced(b"a", b"bc"), b"abc"),
            (Iterable, b"abc"),
            (lambda: io.BytesIO(b"a\nbc"), b"a\nbc"),
            (lambda: [bytearray(b"a"), memoryview(b"-bc")[1:], b""], b"abc"),
            (lambda: [memoryview(numbers), b"abc"], bytes(numbers) + b"abc"),
            (lambda: [memoryview(b"a-b-c")[::2]], b"abc"),
            (lambda: [b"", b"a", b"", b"", b"bc", b""], b"abc"),
            (lambda: [b""], b""),
            (list, b""),
            (lambda: itertools.repeat(b"abcde" * 100, 50), b"abcde" * 5000),
            (lambda: [bytes(700_001), b"x"], bytes(700_001) + b"x"),
        ):
            with self.subTest(body[:10]):
                server = self.serve()
                server.respond("/x", lambda request, make=make: Response(make()))
                answer = Answer(exchange(server, self.GET + self.LAST))
                for _ in range(2):
                    self.assertEqual((answer.status, answer.body == body), (200, True))
                    self.assertEqual(answer.headers.get_all("Transfer-Encoding"), ["chunked"])
                    self.assertIsNone(answer.headers["Content-Length"])
                    answer = Answer(answer.rest) if answer.rest else answer
                old = Answer(exchange(server, old_request))
                self.assertEqual((old.body == body, old.headers["Connection"]), (True, "close"))
                self.assertIsNone(old.headers["Transfer-Encoding"])
                for request, coding in zip(server.requests, ("chunked", "chunked", None)):
                    headers = dict(request.response.headers)
                    self.assertEqual(headers.get("Transfer-Encoding"), coding)
                    self.assertNotIn("Content-Length", headers)
                self.assertEqual(server.errors, [])
                server.stop()

    def test_each_item_is_sent_as_soon_as_it_is_there(self):
        """The head is sent before the first one is there, and the last chunk only at the end."""
        length = {"Content-Length": "6"}
        for request, arguments, parts in (
            (self.GET, {}, [b"3\r\none", b"\r\n", b"3\r\ntwo"]),
            (self.GET, {"headers": length}, [b"one", b"", b"two"]),
            (self.OLD, {}, [b"one", b"", b"two"]),
            (self.OLD, {"headers": length}, [b"one", b"", b"two"]),
        ):
            with self.subTest(request, arguments=arguments):
                items, ended, go_on = self.gated(b"one", b"two")
                server = self.serve()
                server.respond("/x", Response(items, **arguments))
                with connect(server) as connection:
                    connection.sendall(request)
                    self.assertIn(b" 200 OK\r\n", self.receive_head(connection))
                    [recorded] = server.requests  # before the first byte
                    self.assertEqual(str(recorded), "GET /x -> 200")
                    self.assert_silent(server, connection)
                    go_on.release()
                    self.assertEqual(self.receive(connection, len(parts[0])), parts[0])
                    self.assertFalse(ended.is_set())
                    go_on.release()
                    rest = self.receive(connection, len(parts[1] + parts[2]))
                    self.assertEqual(rest, parts[1] + parts[2])
                    self.assertFalse(ended.is_set())
                    go_on.release()
                    connection.shutdown(socket.SHUT_WR)
                    rest = b"\r\n0\r\n\r\n" if b"\r\n" in parts else b""
                    self.assertEqual(read_all(connection), rest)
                    self.assertTrue(ended.wait(PATIENCE))
                self.assertEqual(server.errors, [])
                server.stop()

    def test_a_buffer_that_the_generator_uses_again(self):
        def items():
            buffer = bytearray()
            for letter in b"abc":
                buffer[:] = bytes([letter]) * (100 - letter // 2)
                yield buffer
                buffer.clear()

        server = self.serve()
        server.respond("/x", Response(items()))
        self.assertEqual(self.get(server, "/x").content, b"a" * 52 + b"b" * 51 + b"c" * 51)
        self.assertEqual(server.errors, [])

    def test_chunks_of_a_size(self):
        """No item waits for the next one to fill a chunk."""
        server = self.serve()
        for size, items in (
            (4, [b"0123456789", b"a"]),
            (1, [b"012", b"", b"3456"]),
            (300_000, [bytes(700_000), b"x"]),
        ):
            with self.subTest(size):
                server.respond("/x", Response(items, chunked=size))
                received = exchange(server, self.LAST)
                chunks = self.chunks(received.partition(b"\r\n\r\n")[2])
                self.assertEqual(b"".join(chunks), b"".join(items))
                self.assertLessEqual(max(map(len, chunks)), size)
                self.assertEqual(server.requests[-1].response.chunked, size)
        items, _, go_on = self.gated(b"01", b"2345")
        server.respond("/x", Response(items, chunked=4))
        with connect(server) as connection:
            connection.sendall(self.LAST)
            self.receive_head(connection)
            go_on.release()
            self.assertEqual(self.receive(connection, 5), b"2\r\n01")
            go_on.release(2)
            self.assertEqual(b"".join(self.chunks(b"2\r\n01" + read_all(connection))), b"012345")

    def test_a_length_that_is_right(self):
        server = self.serve()
        for items, length in (([b"one", b"", b"two"], 6), ([], 0), ([bytes(300_000)] * 2, 600_000)):
            with self.subTest(length):
                server.respond("/x", Response(items, headers={"content-length": f"{length}"}))
                for request in (
                    self.GET,
                    self.OLD.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n"),
                ):
                    answer = Answer(exchange(server, request + self.LAST))
                    self.assertEqual(answer.headers.get_all("Content-Length"), [f"{length}"])
                    self.assertIsNone(answer.headers["Transfer-Encoding"])
                    self.assertEqual(answer.body, b"".join(items))
                    self.assertEqual(Answer(answer.rest).body, b"".join(items))
        self.assertEqual(server.errors, [])

    def test_a_length_that_is_wrong(self):
        server = self.serve()
        for items, length in (
            ([b"one", b"two"], 5),
            ([b"one", b"two"], 7),
            ([b"one"], 0),
            ([], 1),
            ([bytes(300_000)], 299_999),
        ):
            for request in (self.GET, self.OLD):
                with self.subTest(items, length=length, request=request):
                    body = Produced(*items)
                    server.respond("/x", Response(body, headers={"Content-Length": f"{length}"}))
                    received = exchange(server, request + self.GET)  # the connection ends
                    sent = received.partition(b"\r\n\r\n")[2]
                    self.assertEqual(sent, b"".join(items)[:length])
                    self.assertTrue(body.closed.wait(PATIENCE))
                    self.one_error(server, f"{length}")

    def test_where_no_content_is_sent_nothing_is_produced(self):
        server = self.serve()
        tag = {"headers": {"ETag": '"1"'}}
        for method, fields, arguments, status in (
            ("HEAD", {}, {}, 200),
            ("HEAD", {}, {"headers": {"Content-Length": "3"}}, 200),
            ("HEAD", {}, {"chunked": 2, "rate": 1, "pause": ["1 at 2"]}, 200),
            ("GET", {}, {"status": 204}, 204),
            ("GET", {}, {"status": 205}, 205),
            ("GET", {}, {"status": 304}, 304),
            ("GET", {"If-None-Match": '"1"'}, tag, 304),
            ("GET", {"If-Match": '"2"'}, tag, 412),
            ("HEAD", {"If-None-Match": "*"}, tag, 304),
        ):
            with self.subTest(method, fields=fields, arguments=arguments):
                body = Produced(b"one")  # it is closed all the same
                server.respond("/x", Response(body, **arguments), 204)
                lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
                first = f"{method} /x HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()
                answer = Answer(exchange_end(server, first + self.LAST), method)
                self.assertEqual((answer.status, Answer(answer.rest).status), (status, 204))
                if method == "HEAD":
                    length = arguments.get("headers", {}).get("Content-Length")
                    self.assertEqual(answer.headers["Content-Length"], length)
                self.assertTrue(body.closed.wait(PATIENCE))
                self.assertEqual(body.asked, 0)
        self.assertEqual(server.errors, [])

    def test_however_it_is_cut_into_items(self):
        NoTimePasses(self)
        chance = random.Random(16)
        server = self.serve()
        for _ in range(60):
            body = chance.randbytes(chance.choice((0, 1, 40, 300)))
            cuts = sorted(chance.choices(range(len(body) + 1), k=chance.randrange(9)))
            items = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)])]
            end = chance.choice((None, None, 0, 5, 39))
            arguments = {
                "chunked": chance.choice((None, 1, 7, 40)),
                "rate": chance.choice((None, 33, 1000)),
                "pause": chance.choice(((), ["1 at 5", "1 at headers"], ["1 at 40", "2 at 39"])),
            }
            with self.subTest(items, end=end, arguments=arguments):
                fault = None if end is None else f"close at {min(end, len(body))}"
                server.respond("/x", Response(items, fault=fault, **arguments))
                received = exchange(server, self.LAST).partition(b"\r\n\r\n")[2]
                sent = b"".join(self.chunks(received, whole=not fault))
                self.assertEqual(sent, body if end is None else body[:end])
        self.assertEqual(server.errors, [])

    def test_range_is_ignored(self):
        server = self.serve()
        for headers in ({"ETag": '"1"'}, {"Content-Length": "6"}):
            server.respond("/x", Response([b"one", b"two"], headers=headers))
            response = self.get(server, "/x", headers={"Range": "bytes=1-2"})
            self.assertEqual((response.status, response.content), (200, b"onetwo"))
            self.assertIsNone(response.headers["Content-Range"])

    def test_returned_by_callables_and_do_methods(self):
        class Handler(FeedTestRequestHandler):
            def do_POST(self):
                self.reply(Response(iter([b"post", self.received.body]), 201))

        class Server(FeedTestServer):
            handler_class = Handler

        async def respond(request):
            return Response(iter([b"later"]))

        server = self.serve(server_class=Server)
        server.respond("/a", lambda request: Response(iter([request.method.encode(), b"!"])))
        server.respond("/b", respond)
        for _ in range(2):
            self.assertEqual(self.get(server, "/a").content, b"GET!")
            self.assertEqual(self.get(server, "/b").content, b"later")
            response = self.get(server, "/x", "POST", b"ed")
            self.assertEqual((response.status, response.content), (201, b"posted"))
        self.assertEqual(server.errors, [])

    def test_in_tls(self):
        items, ended, go_on = self.gated(b"one", bytes(300_000))
        server = self.serve()
        server.respond("/x", Response(items))
        context = server.ssl_context()
        with context.wrap_socket(connect(server), server_hostname="localhost") as connection:
            connection.sendall(self.LAST)
            self.receive_head(connection)
            go_on.release()
            self.assertEqual(self.receive(connection, 6), b"3\r\none")
            self.assertFalse(ended.is_set())
            go_on.release(2)
            chunks = self.chunks(b"3\r\none" + read_all(connection))
            self.assertEqual(b"".join(chunks), b"one" + bytes(300_000))
        self.assertEqual(server.errors, [])

    def test_workers_iterate_it(self):
        """And close it: not the thread that serves, which it might block."""

        class Items(Produced):
            def __iter__(self):
                threads.add(threading.current_thread())
                return self

            def __next__(self):
                threads.add(threading.current_thread())
                return super().__next__()

            def close(self):
                threads.add(threading.current_thread())
                super().close()

        for arguments in ({}, {"fault": "close at 1"}):
            threads = set()
            server = self.serve()
            server.respond("/x", Response(Items(b"one", b"two"), **arguments))
            exchange(server, self.LAST)
            server.stop()
            self.assertTrue(threads)
            self.assertTrue(threads.isdisjoint({server, threading.current_thread()}))

    def test_what_is_produced_may_come_from_the_server_itself(self):
        def items():
            yield b"".join(str(request).encode() for request in server.requests)
            yield self.get(server, "/y").content

        server = self.serve()
        server.respond("/x", Response(items()))
        server.respond("/y", b"!")
        self.assertEqual(self.get(server, "/x").content, b"GET /x -> 200!")

    def test_the_clock_is_for_requests_and_not_for_items(self):
        def items():
            for _ in range(5):
                yield b"%d" % len(asked)

        asked, server = [], self.serve()
        server.clock = lambda: asked.append(NOW) or NOW
        server.respond("/x", Response(items()))
        self.assertEqual(self.get(server, "/x").content, b"11111")

    def test_an_iterator_that_is_used_up_is_empty(self):
        server = self.serve()
        body = (item for item in [b"one"])
        server.respond("/x", Response(body))
        self.assertEqual(self.get(server, "/x").content, b"one")
        self.assertEqual(self.get(server, "/x").content, b"")
        self.assertEqual(server.errors, [])
        server.respond("/x", Response([b"one"]))  # this one is none
        for _ in range(2):
            self.assertEqual(self.get(server, "/x").content, b"one")

    def test_as_it_is(self):
        """Then the iterable produces the head as well."""
        wire = [b"HTTP/1.1 203 Odd\r\n", b"Content-Length: 3\r\n\r\n", b"", b"one"]
        server = self.serve()
        server.respond(
            "/x", Response(wire, asis=True, fault="close at 43"), Response(wire, asis=True)
        )
        self.assertEqual(exchange(server, self.GET), b"".join(wire)[:43])
        self.assertEqual(exchange(server, self.GET * 2), b"".join(wire))
        self.assertEqual(server.errors, [])

    def test_a_framing_that_is_given(self):
        """The iterable has to keep to it; without any, the connection ends with the body."""
        server = self.serve()
        for arguments, items, coding in (
            (
                {"headers": {"Transfer-Encoding": "chunked"}},
                [b"3\r\nabc", b"\r\n0\r\n\r\n"],
                "chunked",
            ),
            ({"without": ["Transfer-Encoding"]}, [b"a", b"bc"], None),
        ):
            with self.subTest(arguments):
                server.respond("/x", Response(items, **arguments))
                received = exchange(server, self.GET * 2)
                answer = Answer(received)
                self.assertEqual((answer.body, answer.rest), (b"abc", b""))
                self.assertEqual(answer.headers["Transfer-Encoding"], coding)
        # It would not have a Content-Length anyway.
        server.respond("/x", Response([b"a", b"bc"], without=["Content-Length"]))
        answer = Answer(exchange(server, self.GET + self.LAST))
        for each in (answer, Answer(answer.rest)):
            self.assertEqual((each.body, each.headers["Transfer-Encoding"]), (b"abc", "chunked"))
        self.assertEqual(server.errors, [])

    def test_expressions_in_its_headers(self):
        server = self.serve()
        server.respond("/x", Response([b"{{port}}"], headers={"X-Port": "{{port}}"}))
        response = self.get(server, "/x")
        self.assertEqual(response.headers["X-Port"], f"{server.port}")
        self.assertEqual(response.content, b"{{port}}")

    # What happens to it on its way

    def test_slowness_pauses_and_faults(self):
        self.clock = NoTimePasses(self)
        head, whole = self.A_HEAD, b"0123456789"
        length = {"Content-Length": "10"}
        for arguments, *expected in (
            ({"delay": 3}, 3, head, b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n"),
            ({"pause": ["2 at headers"]}, head, 2, b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n"),
            ({"headers": length, "pause": ["2 at 6"]}, head, b"012345", 2, b"6789"),
            ({"headers": length, "pause": ["2 at 4"]}, head, b"0123", 2, b"456789"),
            (
                {"headers": length, "pause": ["2 at 50%", "1 at 2"]},
                *(head, b"01", 1, b"234", 2, b"56789"),
            ),
            ({"headers": length, "pause": ["2 at 11"]}, head, whole),
            ({"fault": "close at headers"}, head),
            ({"headers": length, "fault": "close at 6"}, head, b"012345"),
            ({"headers": length, "fault": "close at 4"}, head, b"0123"),
            ({"headers": length, "fault": "close at 60%"}, head, b"012345"),
            ({"headers": length, "fault": "close at 4", "pause": ["2 at 4"]}, head, b"0123", 2),
            ({"fault": "close at end"}, head, b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n"),
            ({"headers": length, "fault": "close at end"}, head, whole),
        ):
            with self.subTest(arguments):
                self.assert_seen({**arguments, "body": [b"0123", b"456789"]}, *expected)

    def test_rate(self):
        clock = NoTimePasses(self)
        server = self.serve()
        for rate, items, seconds in (
            (1000, [bytes(100), bytes(100), bytes(50)], 0.25),
            (5, [b"123"], 0.6),
            (5, [b"1", b"", b"2", b"3"], 0.6),
            (10_000, [bytes(30_000)], 3),
        ):
            for arguments in ({}, {"chunked": 7}, {"pause": ["2 at 1"]}):
                with self.subTest(items[0][:10], rate=rate, arguments=arguments):
                    server.respond("/x", Response(items, rate=rate, **arguments))
                    clock.waits.clear()
                    self.assertEqual(self.get(server, "/x").content, b"".join(items))
                    total = seconds + 2 * ("pause" in arguments)
                    self.assertAlmostEqual(sum(clock.waits), total, 3)

    def test_places_inside_of_the_chunks(self):
        """A chunk may be as long as its item, or end at the place: only its data counts."""
        clock = NoTimePasses(self)
        server = self.serve()
        for kind in ("close", "reset"):
            for place in (1, 4, 6, 9):
                with self.subTest(kind, place=place):
                    body = Produced(b"0123", b"456789")
                    server.respond("/x", Response(body, fault=f"{kind} at {place}"))
                    with connect(server) as connection:
                        connection.sendall(self.GET)
                        received, end = read_to_the_end(connection)
                    self.assertEqual(end, "FIN" if kind == "close" else rst())
                    if kind == "close" or TELLS_WHAT_ARRIVES:
                        chunks = self.chunks(received.partition(b"\r\n\r\n")[2], whole=False)
                        self.assertEqual(b"".join(chunks), b"0123456789"[:place])
                    self.assertTrue(body.closed.wait(PATIENCE))
        server.respond("/x", Response([b"0123", b"456789"], pause=["2 at 6", "1 at 11"]))
        clock.waits.clear()
        self.assertEqual(self.get(server, "/x").content, b"0123456789")
        self.assertEqual(clock.waits, [2])
        self.assertEqual(server.errors, [])

    def test_a_stall_in_it(self):
        body = Produced(b"0123", b"456789")
        server = self.serve()
        server.respond("/x", Response(body, headers={"Content-Length": "10"}, fault="stall at 6"))
        self.assert_stalls(server, b"012345")
        self.assertTrue(body.closed.wait(PATIENCE))
        self.assertEqual(server.errors, [])

    def test_a_client_that_does_not_read(self):
        """No more is produced than a block, or two, and what the client's system holds."""
        for size, arguments, most in (
            (10_000, {}, 100),
            (10_000, {"chunked": 1000}, 100),
            (1_000_000, {}, 2),
            (1_000_000, {"pause": ["86400 at 1"]}, 1),
            (1_000_000, {"rate": 1}, 1),
        ):
            items, produced, ended = self.endless(bytes(size), 1000)
            server = self.serve()
            server.respond("/x", Response(items, **arguments))
            with self.subTest(arguments), self.connect_to_read_late(server) as connection:
                connection.sendall(self.GET)
                server.wait_for_request("/x")
                before, alike = -1, 0
                while alike < 20:
                    self.assertEqual(self.get(server, "/none").status, 404)
                    before, alike = len(produced), alike + 1 if len(produced) == before else 0
                self.assertLessEqual(len(produced), most)
                self.assertFalse(ended.is_set())
                server.stop()
                self.assertTrue(ended.is_set())
                self.assertEqual(server.errors, [])

    def test_small_items_do_not_pile_up(self):
        items, produced, ended = self.endless(b"0123456789")
        server = self.serve()
        server.respond(
            "/x", Response(items, headers={"Content-Length": "999"}, pause=["86400 at 25"])
        )
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.receive_head(connection)
            self.assertEqual(self.receive(connection, 25), b"0123456789012345678901234")
            self.assert_silent(server, connection)
            self.assertLessEqual(len(produced), 4)
            self.assertFalse(ended.is_set())

    # What is wrong with it

    def test_what_it_raises_is_an_error_and_ends_the_connection(self):
        class Failed(BaseException):
            pass

        server = self.serve()
        for error in (
            *(ValueError("broken"), Failed("broken"), SystemExit("broken"), EOFError("broken")),
            *(KeyboardInterrupt("broken"), asyncio.CancelledError("broken")),
            *(GeneratorExit("broken"), BrokenPipeError("broken"), OSError(2, "broken", "file")),
        ):
            for request, headers, tells in (
                (self.GET, {}, True),
                (self.LAST, {}, True),
                (self.GET, {"Content-Length": "9"}, True),
                (self.OLD, {"Content-Length": "9"}, True),
                (self.OLD, {}, False),
            ):
                with self.subTest(error, request=request, headers=headers):
                    body = Produced(b"one", error)
                    server.respond("/x", Response(body, headers=headers))
                    with connect(server) as connection:
                        connection.sendall(request + self.GET)
                        received, end = read_to_the_end(connection)
                    self.assertEqual(end, "FIN" if tells else rst())
                    if tells or TELLS_WHAT_ARRIVES:
                        self.assertEqual(received.count(b" 200 OK\r\n"), 1)
                        sent = received.partition(b"\r\n\r\n")[2].removeprefix(b"3\r\n")
                        self.assertIn(sent, (b"one", b"one\r\n"))
                    self.assertTrue(body.closed.wait(PATIENCE))
                    text = self.one_error(server, type(error).__name__, "broken", "__next__")
                    [first, *_] = re.findall('File "(.*?)", line', text)
                    self.assertEqual(os.path.basename(first), os.path.basename(__file__))
        self.assertEqual(self.get(server, "/none").status, 404)

    def test_what_is_wrong_before_the_first_item(self):
        class Wrong:
            def __init__(self, make):
                self.make = make

            def __iter__(self):
                return self.make()

        def stop():
            raise ZeroDivisionError

        server = self.serve()
        for make, word in ((stop, "ZeroDivisionError"), (lambda: 5, "TypeError")):
            with self.subTest(word):
                server.respond("/x", Response(Wrong(make)))
                with connect(server) as connection:
                    connection.sendall(self.GET)
                    received, _ = read_to_the_end(connection)
                self.assertNotIn(b"0\r\n\r\n", received)
                self.one_error(server, word)

    def test_items_that_are_no_bytes(self):
        server = self.serve()
        for item in ("two", 2, None, [b"two"], {"two": 2}, 2.5, Response(b"two")):
            for request, tells in ((self.GET, True), (self.OLD, False)):
                with self.subTest(item, request=request):
                    body = Produced(b"one", item, b"three")
                    server.respond("/x", Response(body))
                    with connect(server) as connection:
                        connection.sendall(request)
                        received, end = read_to_the_end(connection)
                    self.assertEqual(end, "FIN" if tells else rst())
                    self.assertNotIn(b"three", received)
                    self.assertFalse(received.endswith(b"0\r\n\r\n"))
                    self.assertTrue(body.closed.wait(PATIENCE))
                    self.assertEqual(body.asked, 2)
                    self.one_error(server, repr(item), "bytes")

    def test_what_its_end_raises_is_an_error_too(self):
        def ends_badly():
            try:
                yield b"one"
                yield b"two"
            finally:
                raise ZeroDivisionError

        def goes_on():
            try:
                yield b"one"
                yield b"two"
            except GeneratorExit:
                yield b"three"

        server = self.serve()
        for make, word in ((ends_badly, "ZeroDivisionError"), (goes_on, "ignored GeneratorExit")):
            with self.subTest(word):
                server.respond("/x", Response(make(), fault="close at 1"))
                with connect(server) as connection:
                    connection.sendall(self.GET)
                    self.assertEqual(read_to_the_end(connection)[1], "FIN")
                while not server.errors:
                    self.assertEqual(self.get(server, "/none").status, 404)
                self.one_error(server, word)

    def test_no_thread_can_be_started_for_the_next_item(self):
        def fail(thread):
            raise RuntimeError("can't start new thread")

        def items():
            no_thread.start()
            yield b"one"
            yield b"two"

        no_thread = mock.patch.object(threading.Thread, "start", fail)
        self.addCleanup(no_thread.stop)
        length = {"headers": {"Content-Length": "9"}}
        for request, arguments, tells in (
            (self.GET, {}, True),
            (self.OLD, length, True),
            (self.OLD, {}, False),
        ):
            server = self.serve()
            server.respond("/x", Response(items(), **arguments))
            with self.subTest(request, arguments=arguments), connect(server) as connection:
                connection.sendall(request)
                received, end = read_to_the_end(connection)
                no_thread.stop()
                self.assertEqual(end, "FIN" if tells else rst())
                self.assertFalse(received.endswith(b"0\r\n\r\n"))
                self.one_error(server, 'RuntimeError("can\'t start new thread")')

    def test_one_iterator_for_two_at_once(self):
        """That is an error in the test; the server goes on."""

        def items():
            begun.set()
            go_on.wait(3 * PATIENCE)
            yield b"one"

        begun, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        server = self.serve()
        server.respond("/x", Response(items()))
        with connect(server) as first, connect(server) as second:
            first.sendall(self.LAST)
            self.assertTrue(begun.wait(PATIENCE))
            second.sendall(self.LAST)
            self.assertFalse(read_all(second).endswith(b"0\r\n\r\n"))
            self.assertIn("ValueError('generator already executing')", server.errors[0])
            go_on.set()
            read_all(first)
        self.assertEqual(self.get(server, "/none").status, 404)

    # When it is closed

    def test_closed_when_the_client_leaves_or_the_server_stops_or_is_down(self):
        for arguments in (
            {},
            {"pause": ["86400 at 3"]},
            {"rate": 1},
            {"fault": "stall at 1"},
            {"fault": "stall at end"},
            {"headers": {"Content-Length": "999999999"}},
        ):
            for how in ("leaves", "resets", "stop", "down"):
                large = itertools.repeat(bytes(1_000_000), 100)
                body = Produced(b"one", *(() if "end" in f"{arguments}" else large))
                server = self.serve()
                server.respond("/x", Response(body, **arguments))
                with self.subTest(arguments, how=how), connect(server) as connection:
                    connection.sendall(self.GET)
                    server.wait_for_request("/x")
                    self.assertEqual(self.get(server, "/none").status, 404)
                    if how == "leaves":
                        connection.close()
                    elif how == "resets":
                        close_by_reset(connection)
                    elif how == "stop":
                        server.stop()
                        self.assertTrue(body.closed.is_set())
                    else:
                        with server.down():
                            self.assertTrue(body.closed.is_set())
                        self.assertEqual(self.get(server, "/none").status, 404)
                    self.assertTrue(body.closed.wait(PATIENCE))
                    self.assertEqual(server.errors, [])
                    server.stop()

    def test_closed_though_it_was_not_begun(self):
        """It may be an open file."""
        for method, arguments in (
            ("HEAD", {}),
            ("GET", {"status": 304}),
            ("GET", {"fault": "reset"}),
            ("GET", {"fault": "close at headers"}),
        ):
            with self.subTest(method, arguments=arguments):
                body = Produced(b"one")
                server = self.serve()
                server.respond("/x", Response(body, **arguments))
                with connect(server) as connection:
                    connection.sendall(self.LAST.replace(b"GET", method.encode()))
                    read_to_the_end(connection)
                self.assertTrue(body.closed.wait(PATIENCE))
                self.assertEqual(body.asked, 0)
                server.stop()
        for arguments in ({"delay": 86400}, {"pause": ["86400 at headers"]}, {"fault": "stall"}):
            for leaves in (False, True):
                with self.subTest(arguments, leaves=leaves):
                    body = Produced(b"one")
                    server = self.serve()
                    server.respond("/x", Response(body, **arguments))
                    with connect(server) as connection:
                        connection.sendall(self.GET)
                        server.wait_for_request("/x")
                        if leaves:
                            close_by_reset(connection)
                            self.assertTrue(body.closed.wait(PATIENCE))
                        server.stop()
                    self.assertTrue(body.closed.is_set())

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_forked_child_leaves_it_to_its_parent(self):
        """No test code runs in the child, and no thread; whether or not something else has it."""
        script = """
        import gc, os, socket, sys, threading
        from feedtestserver import FeedTestServer, Response

        def items():
            try:
                yield b"one"
                yield b"two"
            finally:
                print("closed in", "the parent" if os.getpid() == parent else "a child")

        class Body:
            def __iter__(self):
                return items()

        parent = os.getpid()
        for body in items(), Body():
            with FeedTestServer(sys.argv[1]) as server:
                server.respond("/x", Response(body, pause=["86400 at 3"]))
                with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
                    connection.sendall(b"GET /x HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
                    received = b""
                    while not received.endswith(b"one\\r\\n"):
                        received += connection.recv(1000)
                    child = os.fork()
                    if not child:
                        for thread in set(threading.enumerate()) - {threading.current_thread()}:
                            print("a thread in the child")
                            thread.join()
                        gc.collect()
                        os._exit(0)
                    os.waitpid(child, 0)
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.stdout, done.stderr), ("closed in the parent\n" * 2, ""))

    def test_an_open_file_is_closed_though_it_was_not_read(self):
        path = self.make_directory({"body": b"one"}) / "body"
        for method, arguments in (
            ("HEAD", {}),
            ("GET", {"status": 204}),
            ("GET", {"delay": 86400}),
        ):
            server = self.serve()
            with self.subTest(method, arguments=arguments), path.open("rb") as body:
                server.respond("/x", Response(body, **arguments))
                with connect(server) as connection:
                    connection.sendall(self.GET.replace(b"GET", method.encode()))
                    server.wait_for_request("/x")
                    server.stop()
                self.assertTrue(body.closed)

    def test_an_iterable_and_its_iterator_are_closed_once_each(self):
        """As in PEP 3333; they may be two objects."""

        class Items:
            def __iter__(self):
                return iterator

            def close(self):
                closed.append("iterable")

        class Iterator(Produced):
            def close(self):
                closed.append("iterator")

        for arguments, is_one, what in (
            ({}, False, ["iterable", "iterator"]),
            ({"fault": "close at 1"}, False, ["iterable", "iterator"]),
            ({"status": 204}, False, ["iterable"]),
            ({}, True, ["iterator"]),
            ({"fault": "close at 1"}, True, ["iterator"]),
        ):
            closed, iterator = [], Iterator(b"one", b"two")
            server = self.serve()
            server.respond("/x", Response(iterator if is_one else Items(), **arguments))
            with self.subTest(arguments, is_one=is_one):
                exchange(server, self.LAST)
                server.stop()
                self.assertEqual((sorted(closed), server.errors), (what, []))

    def test_closed_at_its_end(self):
        server = self.serve()
        body = Produced(b"one")
        server.respond("/x", Response(body))
        self.assertEqual(self.get(server, "/x").content, b"one")
        self.assertTrue(body.closed.wait(PATIENCE))
        self.assertEqual(body.asked, 2)

    def test_a_client_that_leaves_an_endless_stream(self):
        for item in (b"0123456789" * 100, b"x", bytes(1_000_000)):
            for by_reset in (False, True):
                with self.subTest(len(item), by_reset=by_reset):
                    items, _, ended = self.endless(item)
                    server = self.serve()
                    server.respond("/x", Response(items))
                    connection = connect(server)
                    connection.sendall(self.GET)
                    self.receive_head(connection)
                    self.receive(connection, 1)
                    self.assertEqual(self.get(server, "/none").status, 404)
                    close_by_reset(connection) if by_reset else connection.close()
                    self.assertTrue(ended.wait(PATIENCE))
                    server.stop()
                    self.assertEqual(server.errors, [])

    def test_endless_empty_items_delay_no_other_client(self):
        items, _, ended = self.endless(b"")
        server = self.serve()
        server.respond("/x", Response(items))
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.receive_head(connection)
            self.assert_silent(server, connection)
            self.assertFalse(ended.is_set())
            server.stop()
        self.assertTrue(ended.is_set())
        self.assertEqual(server.errors, [])

    def test_a_client_that_leaves_an_endless_stream_of_empty_items(self):
        """Nothing is sent that could fail, and still the server learns that it has gone."""
        server = self.serve()
        for by_reset in (False, True):
            items, _, ended = self.endless(b"")
            server.respond("/x", Response(items))
            with self.subTest(by_reset=by_reset), connect(server) as connection:
                connection.sendall(self.GET)
                self.receive_head(connection)
                close_by_reset(connection) if by_reset else connection.close()
                self.assertTrue(ended.wait(PATIENCE))
        self.assertEqual(server.errors, [])

    def test_a_client_that_leaves_while_the_next_item_is_produced(self):
        """A generator cannot be closed while it runs, so it is closed when it yields."""
        for by_reset in (False, True):
            items, ended, go_on = self.gated(b"one", bytes(1000), bytes(1000), bytes(1000))
            server = self.serve()
            server.respond("/x", Response(items))
            with self.subTest(by_reset=by_reset):
                connection = connect(server)
                connection.sendall(self.GET)
                go_on.release()
                self.receive_head(connection)
                self.assertEqual(self.receive(connection, 6), b"3\r\none")
                close_by_reset(connection) if by_reset else connection.close()
                self.assertEqual(self.get(server, "/none").status, 404)
                self.assertFalse(ended.is_set())
                go_on.release(4)
                self.assertTrue(ended.wait(PATIENCE))
                server.stop()
                self.assertEqual(server.errors, [])

    def test_a_half_closed_client_gets_all_of_it(self):
        items, _, go_on = self.gated(b"one", b"two")
        server = self.serve()
        for body, arguments in (
            ([b"one", b"two"], {}),
            ([b"", b"one", b"", b"", b"two", b""], {}),
            ([b"one", b"two"], {"delay": 86400, "rate": 1, "pause": ["86400 at 4"]}),
            (items, {}),
        ):
            server.respond("/x", Response(body, **arguments))
            with self.subTest(arguments), connect(server) as connection:
                connection.sendall(self.GET)
                connection.shutdown(socket.SHUT_WR)
                self.assertEqual(self.get(server, "/none").status, 404)
                go_on.release(3)
                self.assertEqual(Answer(read_all(connection)).body, b"onetwo")

    @unittest.skipUnless(sys.platform.startswith("linux"), "elsewhere a refusal comes later")
    def test_a_client_that_has_left_is_sent_no_more_items(self):
        """What it does not take tells that this is no half-close."""
        asked, ended, go_on = [], threading.Event(), threading.Semaphore(0)

        def items():
            try:
                while True:
                    asked.append(len(asked))
                    go_on.acquire(timeout=PATIENCE)
                    yield b"x"
            finally:
                ended.set()

        server = self.serve()
        for delay, expected in ((86400, []), (0, [0, 1])):
            server.respond("/x", Response(items(), delay=delay))
            with self.subTest(delay=delay), connect(server) as connection:
                connection.sendall(self.GET)
                if not delay:
                    go_on.release()
                    self.receive_head(connection)
                    self.assertEqual(self.receive(connection, 4), b"1\r\nx")
                    self.receive(connection, 2)
                connection.close()
                self.assertEqual(self.get(server, "/none").status, 404)
                if not delay:
                    go_on.release()
                    self.assertTrue(ended.wait(PATIENCE))
                self.assertEqual(asked, expected)
        server.stop()
        self.assertEqual(asked, [0, 1])

    def test_closing_it_delays_no_other_client(self):
        """The code that runs when a generator is closed is test code, and may block."""

        def items():
            try:
                while True:
                    yield b"one"
            finally:
                closing.set()
                go_on.wait(3 * PATIENCE)
                ended.set()

        closing, go_on, ended = threading.Event(), threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        server = self.serve()
        server.respond("/x", Response(items()))
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.receive_head(connection)
        self.assertTrue(closing.wait(PATIENCE))
        self.assertEqual(self.get(server, "/none").status, 404)
        server.stop_timeout = 0.01
        with self.assertRaisesRegex(RuntimeError, "GET /x -> 200; it has to return by itself"):
            server.stop()
        go_on.set()
        server.stop_timeout = PATIENCE
        server.stop()
        self.assertTrue(ended.is_set())
        self.assertEqual(server.errors, [])

    def test_stop_and_down_wait_for_what_is_being_produced(self):
        for down in (False, True):
            items, ended, go_on = self.gated(b"one", b"two")
            server = self.serve()
            server.respond("/x", Response(items))
            with self.subTest(down=down), connect(server) as connection:
                connection.sendall(self.GET)
                go_on.release()
                self.receive_head(connection)
                self.assertEqual(self.receive(connection, 6), b"3\r\none")
                server.stop_timeout = 0.01
                with self.assertRaisesRegex(RuntimeError, "GET /x -> 200; it has to return by i"):
                    if down:
                        with server.down():
                            self.fail("it was entered")
                    else:
                        server.stop()
                self.assertFalse(ended.is_set())
                go_on.release(3)
                server.stop_timeout = PATIENCE
                server.stop()
                self.assertTrue(ended.is_set())
                self.assertEqual(server.errors, [])
                self.assertFalse(server.is_alive())

    def test_a_stream_that_stops_the_server(self):
        def items():
            try:
                yield b"one"
                server.stop()
                yield b"two"
            finally:
                ended.set()

        before = set(threading.enumerate())
        for request in (self.LAST, self.GET):
            ended = threading.Event()
            server = self.serve()
            server.respond("/x", Response(items()))
            with self.subTest(request), connect(server) as connection:
                connection.sendall(request)  # it ends though the client stays
                self.assertIn(b"one", read_to_the_end(connection)[0])
                self.assertTrue(ended.wait(PATIENCE))
                for thread in set(threading.enumerate()) - before:
                    thread.join(PATIENCE)
                self.assertEqual(set(threading.enumerate()), before)
            self.assertEqual(server.errors, [])

    def test_what_waits_for_the_client_needs_no_thread(self):
        before = set(threading.enumerate())
        server = self.serve()
        server.respond("/x", lambda request: Response(iter([b"one", b"two"]), pause=["86400 at 3"]))
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                connection = stack.enter_context(connect(server))
                connection.sendall(self.GET)
                self.receive_head(connection)
                self.assertEqual(self.receive(connection, 6), b"3\r\none")
            self.assertEqual(self.get(server, "/none").status, 404)
            for thread in set(threading.enumerate()) - before - {server}:
                thread.join(PATIENCE)
                self.assertFalse(thread.is_alive())
            server.stop()
            self.assertEqual(set(threading.enumerate()), before)

    def test_a_client_that_keeps_sending_is_not_read_without_end(self):
        server = self.serve()
        server.respond("/y", 204)
        items, _, go_on = self.gated(b"one")
        server.respond("/x", Response(items))
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.receive_head(connection)
            self.assertLess(self.send_without_end(server, connection), self.TOO_MUCH)
            go_on.release(2)

    def test_what_is_pipelined_behind_it_is_kept(self):
        items, _, go_on = self.gated(b"one")
        server = self.serve()
        server.respond("/x", Response(items), 204)
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.receive_head(connection)
            connection.sendall(self.LAST)
            self.assertEqual(self.get(server, "/none").status, 404)
            go_on.release(2)
            self.assertTrue(read_all(connection).startswith(b"3\r\none\r\n0\r\n\r\nHTTP/1.1 204 "))

    def test_it_delays_no_other_client(self):
        class Slow:
            def __iter__(self):
                go_on.acquire(timeout=3 * PATIENCE)
                return iter([b"one"])

        large, _, _ = self.endless(bytes(1_000_000))
        small, _, _ = self.endless(b"x")
        blocked, _, go_on = self.gated(b"one")
        server = self.serve()
        with contextlib.ExitStack() as stack:
            for items in (large, small, blocked, Slow()):
                server.respond("/x", Response(items))
                connection = stack.enter_context(connect(server))
                connection.sendall(self.GET)
                self.receive_head(connection)
            for _ in range(3):
                self.assertEqual(self.get(server, "/none").status, 404)
            go_on.release(3)
            server.stop()
        self.assertEqual(server.errors, [])


class EarlyTest(SendingTestCase):
    """Responses that do not wait for the body of the request."""

    HEAD = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
    EXPECT = b"Expect: 100-continue\r\n"
    GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"

    def serve_early(self, status=417, **arguments):
        server = self.serve()
        server.respond("/x", Response(b"no", status, early=True, **arguments))
        return server

    def test_a_final_status_instead_of_100_continue(self):
        for status in (417, 413, 401, 200, 204):
            for framing in (b"Content-Length: 9\r\n", b"Transfer-Encoding: chunked\r\n"):
                for sent in (b"", b"abc"):
                    with self.subTest(status, framing=framing, sent=sent):
                        server = self.serve_early(status)
                        head = b"POST /x HTTP/1.1\r\nHost: x\r\n" + framing + self.EXPECT
                        with connect(server) as connection:
                            connection.sendall(head + b"\r\n" + sent)
                            received = read_all(connection)
                        answer = Answer(received)
                        self.assertTrue(received.startswith(b"HTTP/1.1 %d " % status), received)
                        self.assertEqual(answer.headers.get_all("Connection"), ["close"])
                        self.assertEqual(answer.body, b"" if status == 204 else b"no")
                        [request] = server.requests
                        self.assertEqual((request.body, request.refused), (b"", False))
                        self.assertEqual(request.headers["Expect"], "100-continue")
                        self.assertEqual(server.errors, [])
                        server.stop()

    def test_while_the_client_is_sending(self):
        """What it still sends is thrown away, and resets nothing, however much it is."""
        size = 5_000_000
        for first in (b"HTTP/1.1", b"HTTP/1.1\r\nConnection: close", b"HTTP/1.0"):
            for sent in (0, size // 2):
                head = b"PUT /x %s\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (first, size)
                server = self.serve_early(413)
                with self.subTest(first, sent=sent), connect(server) as connection:
                    connection.sendall(head + bytes(sent))
                    self.assertIn(b" 413 ", self.receive_head(connection))
                    connection.sendall(bytes(size - sent))
                    self.assertEqual(read_to_the_end(connection), (b"no", "FIN"))
                    server.stop()

    def test_chunks_without_end_are_thrown_away(self):
        """Nothing counts or keeps them, also while the response waits for its time."""
        head = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"f4240\r\n%s\r\n" % bytes(1_000_000)
        for arguments in ({}, {"delay": 86400}):
            server = self.serve_early(401, **arguments)
            with self.subTest(arguments), connect(server) as connection:
                connection.sendall(head)
                for _ in range(80):  # the limit for a body that is read is 64 MiB
                    connection.sendall(chunk)
                connection.shutdown(socket.SHUT_WR)
                self.assertEqual(Answer(read_all(connection)).body, b"no")
                self.assertEqual(server.requests[0].body, b"")
                server.stop()

    def test_a_client_that_reads_when_all_is_sent(self):
        size = 5_000_000
        server = self.serve_early(413)
        response = self.get(server, "/x", "PUT", bytes(size))
        self.assertEqual((response.status, response.content), (413, b"no"))
        self.assertEqual(response.headers["Connection"], "close")
        request = server.assert_requested("/x", method="PUT", body=b"", times=1)
        self.assertEqual(request.headers["Content-Length"], f"{size}")

    def test_a_response_that_takes_its_time_to_a_large_request(self):
        """The client reads nothing until all is sent; it does not wait for the response."""
        NoTimePasses(self)
        for arguments in ({"delay": 3}, {"pause": ["2 at headers"]}, {"rate": 100_000}):
            server = self.serve()
            server.respond("/x", Response(bytes(50_000), early=True, **arguments))
            with self.subTest(arguments):
                response = self.get(server, "/x", "PUT", bytes(20_000_000))
                self.assertEqual(response.content, bytes(50_000))
                server.stop()

    def test_no_more_than_the_head_is_waited_for(self):
        for sent in (b"", b"half"):
            server = self.serve_early(401)
            with self.subTest(sent), connect(server) as connection:
                connection.sendall(self.HEAD + b"\r\n" + sent)
                self.assertEqual(Answer(read_all(connection)).body, b"no")
                self.assertEqual(str(server.requests[0]), "POST /x -> 401")
                server.stop()

    def test_where_there_is_no_body(self):
        for request, method in (
            (self.GET, "GET"),
            (self.GET.replace(b"GET", b"HEAD"), "HEAD"),
            (self.GET.replace(b"GET", b"DELETE"), "DELETE"),
            (self.HEAD.replace(b" 9", b" 0") + b"\r\n", "POST"),
            (b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "GET"),
        ):
            server = self.serve_early(200)
            with self.subTest(request):
                answer = Answer(exchange(server, request), method)
                self.assertEqual(answer.headers.get_all("Connection"), ["close"])
                self.assertEqual(answer.body, b"" if method == "HEAD" else b"no")
                server.stop()

    def test_what_is_pipelined_behind_it_is_thrown_away(self):
        server = self.serve_early(200)
        received = exchange(server, self.HEAD + b"\r\n" + bytes(9) + self.GET * 5)
        self.assertEqual(Answer(received).rest, b"")
        received = exchange(server, self.GET * 5)
        self.assertEqual(Answer(received).rest, b"")
        self.assertEqual(len(server.requests), 2)

    def test_one_that_is_pipelined_behind_others(self):
        server = self.serve_early()
        server.respond("/y", 204)
        first = self.GET.replace(b"/x", b"/y")
        answer = Answer(exchange(server, first + self.HEAD + self.EXPECT + b"\r\n"))
        self.assertEqual((answer.status, Answer(answer.rest).status), (204, 417))
        with self.assertRaisesRegex(AssertionError, "POST /x -> 417 \\(step 1 of 1; Early: yes\\)"):
            server.assert_not_requested("/x")

    def test_the_connection_stays_open_for_what_the_client_sends(self):
        """Until the client has closed it, or the server stops."""
        server = self.serve_early()
        with connect(server) as connection:
            connection.sendall(self.HEAD + b"\r\n")
            self.assertEqual(Answer(read_all(connection)).status, 417)
            for _ in range(5):
                self.assertEqual(self.get(server, "/none").status, 404)
                connection.sendall(bytes(100_000))
            server.stop()
        self.assertEqual(server.errors, [])

    def test_a_fixture(self):
        files = {
            "early.xml": comment("Status: 413", "EARLY: Yes"),
            "late.xml": comment("Status: 413"),
        }
        server = self.serve(files)
        server.respond("/x", "early.xml")
        request = self.HEAD + self.EXPECT + b"\r\n"
        answer = Answer(exchange(server, request))
        self.assertEqual((answer.status, answer.body), (413, files["early.xml"]))
        self.assertIs(server.requests[0].response.early, True)
        answer = Answer(exchange(server, self.GET.replace(b"/x", b"/early.xml") * 2))
        self.assertEqual((answer.status, answer.headers["Connection"]), (413, "close"))
        self.assertEqual(answer.rest, b"")
        for path, step in ((b"/early.xml", None), (b"/y", "late.xml")):
            if step:
                server.respond(path.decode(), step)
            with self.subTest(path), connect(server) as connection:
                connection.sendall(request.replace(b"/x", path))
                self.assertEqual(self.receive(connection, len(self.GO_ON)), self.GO_ON)
                connection.sendall(b"123456789")
                connection.shutdown(socket.SHUT_WR)
                self.assertEqual(Answer(read_all(connection)).status, 413 if step else 405)
            self.assertEqual(server.requests[-1].body, b"123456789")
        self.assertEqual(server.errors, [])

    def test_an_upload_is_broken_off(self):
        upload = self.HEAD.replace(b" 9", b" 60000000") + b"\r\nhalf"
        for fault, data, end in (
            ("close", b"", "FIN"),
            ("close at headers", None, "FIN"),
            ("reset", b"", "RST"),
            ("reset at 1", b"n", "RST"),
            ("reset at end", b"no", "RST"),
        ):
            with self.subTest(fault), connect(self.serve_early(fault=fault)) as connection:
                connection.sendall(upload)
                received, seen = read_to_the_end(connection)
                if end == "RST":
                    self.assert_reset((received.partition(b"\r\n\r\n")[2], seen), data)
                else:
                    self.assertEqual(seen, end)
                    self.assertEqual(received.endswith(b"\r\n\r\n"), data is None)

    def test_the_client_cannot_send_the_rest_of_what_is_broken_off(self):
        """It is not thrown away, as it is where nothing is broken off."""
        head = self.HEAD.replace(b" 9", b" 60000000") + b"\r\n"
        for fault in ("close", "close at headers", "close at 1"):
            server = self.serve_early(fault=fault)
            with (
                self.subTest(fault),
                connect(server) as connection,
                self.assertRaises(ConnectionError),
            ):
                connection.sendall(head)
                server.wait_for_request("/x")
                connection.sendall(bytes(60_000_000))

    def test_a_response_that_is_whole_arrives_though_the_upload_goes_on(self):
        with connect(self.serve_early(fault="close at end")) as connection:
            connection.sendall(self.HEAD.replace(b" 9", b" 20000000") + b"\r\n" + bytes(20_000_000))
            received, seen = read_to_the_end(connection)
        self.assertEqual((Answer(received).body, seen), (b"no", "FIN"))

    def test_an_upload_that_stalls(self):
        for fault, arrived in (("stall", None), ("stall at headers", b""), ("stall at end", b"no")):
            server = self.serve_early(fault=fault)
            with self.subTest(fault), connect(server) as connection:
                connection.sendall(self.HEAD.replace(b" 9", b" 60000000") + b"\r\nhalf")
                server.wait_for_request("/x")
                if arrived is not None:
                    self.receive_head(connection)
                    self.assertEqual(self.receive(connection, len(arrived)), arrived)
                connection.sendall(b"more")
                self.assert_silent(server, connection)
                server.stop()
                self.assertEqual(server.errors, [])

    def test_slowly(self):
        clock = NoTimePasses(self)
        request = self.HEAD + self.EXPECT + b"\r\nhalf"
        for arguments, waits in (
            ({"delay": 3}, [3]),
            ({"pause": ["2 at headers", "1 at 1"]}, [2, 1]),
            ({"rate": 4}, [0.25, 0.25]),
            ({"chunked": 1}, []),
        ):
            clock.waits.clear()
            server = self.serve_early(**arguments)
            with self.subTest(arguments):
                self.assertEqual(Answer(exchange(server, request)).body, b"no")
                self.assertEqual(clock.waits, waits)
                server.stop()

    def test_what_the_client_sends_meanwhile_ends_no_wait(self):
        server = self.serve_early(delay=86400)
        with connect(server) as connection:
            connection.sendall(self.HEAD + b"\r\nhalf")
            server.wait_for_request("/x")
            for _ in range(3):
                connection.sendall(b"more")
                self.assert_silent(server, connection)
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(Answer(read_all(connection)).status, 417)

    def test_a_body_that_is_malformed_is_not_noticed(self):
        server = self.serve_early(200)
        head = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        for body in (b"no size\r\n", b"3\r\nabcdef\r\n", b"\x00" * 100, b"\n\n"):
            with self.subTest(body):
                self.assertEqual(Answer(exchange(server, head + body)).status, 200)
        with connect(server) as connection:  # and not that it ends too early
            connection.sendall(self.HEAD + b"\r\nhalf")
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(Answer(read_all(connection)).status, 200)
        self.assertEqual([request.refused for request in server.requests], [False] * 5)

    def test_a_head_that_is_wrong_is_refused(self):
        server = self.serve()
        server.respond("/x", Response(status=201, early=True), 202)
        for lines, status in (
            (b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n", 400),
            (b"Content-Length: x\r\n", 400),
            (b"Content-Length: 9\r\nContent-Length: 8\r\n", 400),
            (b"Transfer-Encoding: gzip\r\n", 400),
            (b"Bad Name: x\r\nContent-Length: 9\r\n", 400),
            (b"Content-Length: 67108865\r\n", 413),
        ):
            with self.subTest(lines):
                request = b"POST /x HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n"
                self.assertEqual(Answer(exchange(server, request)).status, status)
        self.assertEqual(len(server.unused), 2)  # these took no step
        for status in (201, 202):
            self.assertEqual(self.get(server, "/x", "POST", b"abc").status, status)

    def test_a_fixture_that_is_wrong_is_one_error(self):
        for data, words in (
            (comment("Early: maybe"), "line 2: Early: found 'maybe'; it takes yes"),
            (None, "feed.xml"),
        ):
            server = self.serve({"feed.xml": b"<rss/>"})
            server.respond("/x", "feed.xml")
            path = pathlib.Path(server.directory, "feed.xml")
            path.write_bytes(data) if data else path.unlink()
            with self.subTest(words):
                self.assertEqual(self.get(server, "/x", "POST", b"abc").status, 500)
                [error] = server.errors
                self.assertIn(words, error)
                self.assertEqual(server.requests[0].body, b"abc")
                server.stop()

    def test_each_request_takes_one_step(self):
        server = self.serve()
        early = Response(status=417, early=True)
        server.respond("/x", 201, early, early, 202, early)
        for status in (201, 417, 417, 202, 417, 417):
            self.assertEqual(self.get(server, "/x", "POST", b"abc").status, status)
            body = b"" if status == 417 else b"abc"
            self.assertEqual(server.requests[-1].body, body)
        self.assertEqual(server.unused, [])

    def test_a_request_that_does_not_come_whole_takes_no_step_unless_it_is_early(self):
        server = self.serve()
        server.respond("/x", 201, Response(status=417, early=True), 202)
        for sent in (self.HEAD + b"\r\nhalf", self.HEAD + self.EXPECT + b"\r\n"):
            with connect(server) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                received = read_all(connection).removeprefix(self.GO_ON)
                self.assertEqual(Answer(received).status, 400)
        self.assertEqual(len(server.unused), 3)
        self.assertEqual(self.get(server, "/x", "POST", b"abc").status, 201)
        with connect(server) as connection:
            connection.sendall(self.HEAD + b"\r\nhalf")
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(Answer(read_all(connection)).status, 417)
        self.assertEqual(self.get(server, "/x", "POST", b"abc").status, 202)

    def test_steps_for_methods_and_patterns(self):
        server = self.serve()
        server.respond("/x", Response(status=413, early=True), method="PUT")
        server.respond("/*", Response(status=401, early=True))
        server.respond("/x", 201, method="POST")
        for method, path, status in (
            ("PUT", "/x", 413),
            ("POST", "/x", 201),
            ("PATCH", "/x", 401),
            ("POST", "/y", 401),
        ):
            with self.subTest(method, path=path):
                self.assertEqual(self.get(server, path, method, b"abc").status, status)
                body = b"abc" if status == 201 else b""
                self.assertEqual(server.requests[-1].body, body)

    def test_it_means_nothing_in_what_a_callable_returns(self):
        class Handler(FeedTestRequestHandler):
            def do_PATCH(self):
                self.reply(Response(self.received.body, early=True))

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve(server_class=Server)
        server.respond("/x", lambda request: Response(request.body, early=True), method="POST")
        for method in (b"POST", b"PATCH"):
            with self.subTest(method), connect(server) as connection:
                connection.sendall(self.HEAD.replace(b"POST", method) + self.EXPECT + b"\r\n")
                self.assertEqual(self.receive(connection, len(self.GO_ON)), self.GO_ON)
                connection.sendall(b"123456789" + LAST)
                answer = Answer(read_all(connection))
                self.assertEqual(answer.body, b"123456789")
                self.assertIsNone(answer.headers["Connection"])
                self.assertEqual(Answer(answer.rest).status, 404)
        self.assertEqual(server.requests[0].body, b"123456789")

    def test_a_fixture_beside_another_method_of_the_handler(self):
        class Handler(FeedTestRequestHandler):
            def do_PATCH(self):
                self.reply(Response())

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve({"x": comment("Early: yes")}, Server)
        for method in (b"GET", b"HEAD"):
            head = self.HEAD.replace(b"POST", method)
            with self.subTest(method):
                answer = Answer(exchange(server, head + self.EXPECT + b"\r\n"), method.decode())
                self.assertEqual((answer.status, answer.headers["Connection"]), (200, "close"))

    def test_it_means_nothing_in_a_do_get_of_the_handler(self):
        """It is called in a worker thread, with the whole request, for HEAD as well."""

        class Handler(FeedTestRequestHandler):
            def do_GET(self):
                calls.append((self.received.body, threading.current_thread() is server))
                super().do_GET()

        class Server(FeedTestServer):
            handler_class = Handler

        calls = []
        server = self.serve({"x": comment("Early: yes")}, Server)
        for method in (b"GET", b"HEAD"):
            with self.subTest(method), connect(server) as connection:
                connection.sendall(self.HEAD.replace(b"POST", method) + self.EXPECT + b"\r\n")
                self.assertEqual(self.receive(connection, len(self.GO_ON)), self.GO_ON)
                connection.sendall(b"123456789" + LAST)
                answer = Answer(read_all(connection), method.decode())
                self.assertEqual(calls, [(b"123456789", False), (b"", False)])
                calls.clear()
                self.assertIsNone(answer.headers["Connection"])
                self.assertEqual(Answer(answer.rest).status, 404)

    def test_it_means_nothing_behind_a_callable_that_passes(self):
        """The callable is asked first, and that with the whole request."""
        bodies = []
        server = self.serve()
        server.respond("/*", Response(b"no", 401, early=True))
        server.respond("/x", lambda request: bodies.append(request.body))
        with connect(server) as connection:
            connection.sendall(self.HEAD + self.EXPECT + b"\r\n")
            self.assertEqual(self.receive(connection, len(self.GO_ON)), self.GO_ON)
            connection.sendall(b"123456789")
            connection.shutdown(socket.SHUT_WR)
            answer = Answer(read_all(connection))
        self.assertEqual((answer.status, answer.body, bodies), (401, b"no", [b"123456789"]))
        self.assertIsNone(answer.headers["Connection"])
        self.assertEqual((server.requests[0].body, server.unused), (b"123456789", []))

    def test_it_means_nothing_for_a_response_as_it_is(self):
        wire = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        server = self.serve()
        server.respond("/x", Response(wire, asis=True, early=True))
        with connect(server) as connection:
            connection.sendall(self.HEAD + self.EXPECT + b"\r\n")
            self.assertEqual(self.receive(connection, len(self.GO_ON)), self.GO_ON)
            connection.sendall(b"123456789")
            self.assertEqual(read_all(connection), wire)
        self.assertEqual(server.requests[0].body, b"123456789")

    def test_a_connection_field_that_is_given(self):
        server = self.serve_early(200, headers={"Connection": "keep-alive"})
        answer = Answer(exchange(server, self.HEAD + b"\r\n"))  # it ends all the same
        self.assertEqual(answer.headers.get_all("Connection"), ["keep-alive"])
        server.respond("/x", Response(early=True, without=["Connection"]))
        answer = Answer(exchange(server, self.HEAD + b"\r\n"))
        self.assertIsNone(answer.headers["Connection"])

    def test_a_stream(self):
        """It is sent while the client is still sending."""
        first = threading.Event()

        def items():
            yield b"one"
            first.wait(3 * PATIENCE)
            yield b"two"

        self.addCleanup(first.set)
        server = self.serve()
        server.respond("/x", Response(items(), early=True))
        with connect(server) as connection:
            connection.sendall(self.HEAD.replace(b" 9", b" 9000000") + b"\r\n" + bytes(1000))
            self.assertIn(b"\r\nConnection: close\r\n", self.receive_head(connection))
            self.assertEqual(self.receive(connection, 6), b"3\r\none")
            first.set()
            connection.sendall(bytes(8_999_000))
            self.assertEqual(read_to_the_end(connection), (b"\r\n3\r\ntwo\r\n0\r\n\r\n", "FIN"))
        self.assertEqual(server.errors, [])

    def test_what_comes_during_a_stream_is_thrown_away(self):
        """It is read between the items, however much it is."""

        def items():
            while not sent.is_set():
                yield b""
            yield b"one"

        sent = threading.Event()
        self.addCleanup(sent.set)
        server = self.serve()
        server.respond("/x", Response(items(), early=True))
        with connect(server) as connection:
            connection.sendall(self.HEAD.replace(b" 9", b" 30000000") + b"\r\n")
            self.receive_head(connection)
            connection.sendall(bytes(30_000_000))
            sent.set()
            self.assertEqual(read_all(connection), b"3\r\none\r\n0\r\n\r\n")
        self.assertEqual(server.errors, [])

    def test_in_tls(self):
        server = self.serve_early(413)
        context = server.ssl_context()
        with context.wrap_socket(connect(server), server_hostname="localhost") as connection:
            connection.sendall(self.HEAD.replace(b" 9", b" 4000000") + self.EXPECT + b"\r\n")
            self.assertIn(b"HTTP/1.1 413 ", self.receive_head(connection))
            connection.sendall(bytes(4_000_000))
            self.assertEqual(read_all(connection), b"no")
        self.assertEqual(server.requests[0].body, b"")

    def test_judged_like_any_other(self):
        server = self.serve_early(200, headers={"ETag": '"1"'})
        for _ in range(2):
            self.get(server, "/x", headers=POLITE)
        self.assertEqual([finding.rule for finding in audit(server.requests)], ["no-validator"])


def packed(data):
    """A gzip stream as the server makes it."""
    compressor = zlib.compressobj(wbits=31)
    return compressor.compress(data) + compressor.flush()


def unpacked(data):
    """What a gzip stream unpacks to, in pieces: it may be a bomb."""
    decompressor = zlib.decompressobj(31)
    while data and not decompressor.eof:
        yield decompressor.decompress(data, 1 << 20)
        data = decompressor.unconsumed_tail


class DataTest(FeedTestServerMixin, ServerTestCase):
    """Every fixture of data/ is served as it says itself."""

    def setUp(self):
        self.clock = NoTimePasses(self)
        super().setUp()

    def received(self, fixture):
        """All that comes for a fixture, whether the connection then goes on, and how it ends."""
        target = fixture.url[len(self.base_url) :].encode()
        both = (
            b"GET %s HTTP/1.1\r\nHost: x\r\n\r\nGET /the-end HTTP/1.1\r\nHost: x\r\n\r\n" % target
        )
        with connect(self.server) as connection:
            connection.sendall(both)
            if "stall" in fixture.directives.get("Fault", ""):
                self.server.wait_for_request(fixture.url)
                received, end = self.received_until_silence(connection), "silence"
            else:
                received, end = read_to_the_end(connection)
        wire, goes_on, _ = received.partition(b"HTTP/1.1 299 The end\r\n")
        return wire, bool(goes_on), end

    def received_until_silence(self, connection):
        """All that comes until another has been served, and nothing has come meanwhile."""
        received = b""
        while True:
            self.assertEqual(self.get(self.server, "/the-end").status, 299)
            connection.setblocking(False)
            try:
                data = connection.recv(65536)
            except BlockingIOError:
                return received
            self.assertTrue(data, "the connection has ended")
            received += data

    def seen(self, fixture):
        """What a fixture looks like on the wire, and to http.client."""
        self.clock.waits.clear()
        wire, goes_on, end = self.received(fixture)
        waits = [*self.clock.waits, *[INFINITY] * (end == "silence")]
        seen = {"wire": wire, "goes_on": goes_on, "end": end, "waits": waits, "error": None}
        seen["sent"] = wire.partition(b"\r\n\r\n")[2]
        seen.update(status=None, reason=None, headers=None, body=None)
        response = http.client.HTTPResponse(_Stream(io.BytesIO(wire)))
        try:
            response.begin()
            seen.update({name: getattr(response, name) for name in ("status", "reason", "headers")})
            seen["body"] = response.read()
        except http.client.IncompleteRead as error:
            seen.update(body=error.partial, error="IncompleteRead")
        except http.client.HTTPException as error:
            seen.update(error=type(error).__name__)
        return seen

    def test_fixtures(self):
        fixtures = self.server.fixtures()
        self.assertGreater(len(fixtures), 100)
        self.server.respond("/the-end", Response(status=299, reason="The end", headers=CLOSE))
        for fixture in fixtures:
            seen = self.seen(fixture)
            target = fixture.url[len(self.base_url) :]
            names = {
                **seen,
                "file": fixture.path.read_bytes(),
                "get": functools.partial(self.get, self.server, target, headers=()),
                "packed": packed,
                "unpacked": unpacked,
                "base_url": self.base_url,
                "host": "127.0.0.1",
                "port": str(self.server.port),
                "gzip": gzip,
                "json": json,
                "zlib": zlib,
            }
            expectations = fixture.directives.get_all("Expect")
            self.assertTrue(expectations, fixture)
            self.assertTrue(fixture.directives["Description"], fixture)
            for expectation in expectations:
                if '"RST"' in expectation and rst() != "RST":
                    continue
                with self.subTest(fixture.name, expect=expectation):
                    self.assertTrue(eval(expectation, names), f"{seen!r:.1000}")

    def test_every_directive_is_shown(self):
        shown = {
            key.lower()
            for fixture in self.server.fixtures()
            for key, _ in fixture.directives.items()
        }
        known = readme_directives()
        self.assertIn("Template", known)
        self.assertEqual({key.lower() for key in known} - shown, set())


# HTTPS


#: The versions of TLS that there are.
TLS_VERSIONS = [ssl.TLSVersion.TLSv1_2] + [ssl.TLSVersion.TLSv1_3] * ssl.HAS_TLSv1_3


class TlsTestCase(ServerTestCase):
    def context(self, server, version=TLS_VERSIONS[-1], certificate=None):
        """One for clients that speak at most that version, and maybe show a certificate."""
        context = server.ssl_context()
        context.maximum_version = version
        if certificate:
            context.load_cert_chain(certificate)
        return context

    def shake_hands(self, server, name="localhost", context=None, session=None):
        """A connection in TLS to a server."""
        context, connection = context or server.ssl_context(), connect(server)
        self.addCleanup(connection.close)
        # A request need not wait until the end of the handshake is acknowledged.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secure = context.wrap_socket(connection, server_hostname=name, session=session)
        self.addCleanup(secure.close)
        return secure

    def exchange(self, server, *parts, context=None):
        with self.shake_hands(server, context=context) as connection:
            for part in parts:
                connection.sendall(part)
            return read_all(connection)


class TlsTest(TlsTestCase):
    FILES = {"feed.xml": comment("Header: X-URL: {{base_url}}")}

    def refused(self, server, sent):
        """What a client gets for a handshake that fails, and what is logged of it."""
        with self.assertLogs("feedtestserver", "INFO") as logged:
            with connect(server) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                answer = read_all(connection)
            server.stop()  # so that all is logged
        [record] = logged.records
        return answer, record.getMessage()

    def test_the_first_byte_tells_the_scheme(self):
        server = self.serve(self.FILES)
        for scheme in ("http", "https", "http", "https"):
            url = server.get_url("feed.xml", scheme)
            self.assertEqual(url, f"{scheme}://127.0.0.1:{server.port}/feed.xml")
            with urllib.request.urlopen(url, context=server.ssl_context()) as answer:
                self.assertEqual(answer.headers["X-URL"], f"{scheme}://127.0.0.1:{server.port}")
            self.assertEqual(server.requests[-1].url, url)
            self.assertEqual(str(server.requests[-1]), "GET /feed.xml -> 200")
        # Under either scheme it is the same address.
        server.wait_for_request("/feed.xml", times=4)

    def test_a_scheme_that_is_not_spoken(self):
        with self.assertRaisesRegex(ValueError, "scheme: found 'gopher'; it takes 'http' or"):
            self.serve().get_url("feed.xml", "gopher")

    def test_a_path_or_a_whole_url_is_the_same_script_under_either_scheme(self):
        server = self.serve()
        server.respond("/feed.xml", b"1", b"2", b"3")
        server.respond(server.get_url("v1.xml", "https"), b"4")
        bodies = []
        for path, scheme in (("feed.xml", "http"), ("feed.xml", "https"), ("v1.xml", "http")):
            url = server.get_url(path, scheme)
            with urllib.request.urlopen(url, context=server.ssl_context()) as answer:
                bodies.append(answer.read())
        self.assertEqual(bodies, [b"1", b"2", b"4"])
        server.wait_for_request(server.get_url("feed.xml", "https"), times=2)

    def test_a_certificate_for_whatever_host_is_asked(self):
        server = self.serve()
        context = server.ssl_context()
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        for name, alternative in (
            ("localhost", ("DNS", "localhost")),
            ("Example.COM", ("DNS", "example.com")),
            ("xn--bcher-kva.example", ("DNS", "xn--bcher-kva.example")),
            ("a_b.example", ("DNS", "a_b.example")),
            ("x" * 63 + ".example", ("DNS", "x" * 63 + ".example")),
            ("127.0.0.1", ("IP Address", "127.0.0.1")),
        ):
            with self.subTest(name), self.shake_hands(server, name, context) as connection:
                self.assertEqual(connection.getpeercert()["subjectAltName"], (alternative,))

    def test_an_address_of_version_6(self):
        try:
            server = self.serve(self.FILES, host="::1")
        except OSError as error:
            self.skipTest(f"no IPv6: {error}")
        url = server.get_url("feed.xml", "https")
        with urllib.request.urlopen(url, context=server.ssl_context()) as answer:
            self.assertEqual(answer.headers["X-URL"], f"https://[::1]:{server.port}")

    def test_an_address_of_version_4_in_one_of_version_6(self):
        try:
            server = self.serve(self.FILES, host="::")
            connect(server).close()
        except OSError as error:
            self.skipTest(f"no address stands for both: {error}")
        url = f"https://127.0.0.1:{server.port}/feed.xml"
        with urllib.request.urlopen(url, context=server.ssl_context()) as answer:
            self.assertEqual(answer.status, 200)

    def test_http_1_1_is_what_is_agreed_on(self):
        server = self.serve()
        context = server.ssl_context()
        context.set_alpn_protocols(["h2", "http/1.1"])
        with self.shake_hands(server, context=context) as connection:
            self.assertEqual(connection.selected_alpn_protocol(), "http/1.1")

    def test_one_handshake_for_many_requests(self):
        server = self.serve(self.FILES)
        answer = self.exchange(server, HEAD + b"\r\n", HEAD + b"\r\n" + LAST)
        self.assertEqual(answer.count(b"HTTP/1.1 200 OK"), 3)
        self.assertEqual(len({request.connection for request in server.requests}), 1)

    def test_large_bodies_in_both_directions(self):
        body = bytes(range(251)) * 40_000
        server = self.serve({"large.bin": body})
        server.respond("/echo", lambda request: request.body)
        url = server.get_url("large.bin", "https")
        with urllib.request.urlopen(url, context=server.ssl_context()) as answer:
            self.assertEqual(answer.read(), body)
        url = server.get_url("echo", "https")
        with urllib.request.urlopen(url, body, context=server.ssl_context()) as answer:
            self.assertEqual(answer.read(), body)

    def test_the_mechanics_are_those_of_http(self):
        response = Response(b"0123456789", chunked=4, rate=20, delay=3, compress="gzip")
        clock = NoTimePasses(self)
        server = self.serve()
        server.respond("/feed.xml", response)
        secret, waits = self.exchange(server, LAST), clock.waits.copy()
        clock.waits.clear()
        self.assertEqual((secret, waits), (exchange(server, LAST), clock.waits))
        self.assertEqual(waits[0], 3)
        self.assertEqual(Answer(secret).headers["Content-Encoding"], "gzip")

    def test_a_proper_end_is_announced_and_a_fault_is_not(self):
        server = self.serve()
        context = server.ssl_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # the types of its records can be seen
        for fault, end in (
            (None, (21, "FIN")),  # an alert: close_notify
            ("close at 5", (23, "FIN")),
            ("close at 100%", (23, "FIN")),
            ("reset at 5", (23, rst())),
        ):
            with self.subTest(fault), self.shake_hands(server, context=context) as secure:
                server.respond("/feed.xml", Response(b"0123456789", fault=fault))
                secure.sendall(LAST)
                with socket.socket(fileno=secure.detach()) as connection:
                    connection.settimeout(PATIENCE)
                    received, seen = read_to_the_end(connection)
                types = []
                while received:
                    types.append(received[0])
                    received = received[5 + int.from_bytes(received[3:5], "big") :]
                self.assertEqual((types[-1], seen), end)
                self.assertEqual(set(types[:-1]) - {23}, set())

    def test_a_client_that_has_to_wait_may_leave(self):
        class Handler(FeedTestRequestHandler):
            def converse(self):
                by_reset = yield from super().converse()
                finished.set()
                return by_reset

        class Server(FeedTestServer):
            handler_class = Handler

        for arguments in ({"delay": 999_999_999}, {"body": bytes(999), "rate": 1}):
            finished = threading.Event()
            server = self.serve(server_class=Server)
            server.respond("/feed.xml", Response(**arguments))
            with self.subTest(arguments):
                with self.shake_hands(server) as connection:
                    connection.sendall(LAST)
                    server.wait_for_request("/feed.xml")
                    self.assertFalse(finished.is_set())
                self.assertTrue(finished.wait(PATIENCE))

    def request_by_hand(self, server, end=b"", meanwhile=None):
        """Send a request in TLS, then an end of the client's side; all that comes in TCP.

        The end is a close_notify where it is None, else bytes before the end of TCP itself.
        """
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = server.ssl_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with connect(server) as connection:
            done = False
            while not done:
                try:
                    client.do_handshake()
                    done = True
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(65536))
            client.write(HEAD + b"\r\n")
            if meanwhile:
                connection.sendall(outgoing.read())
                meanwhile()
            if end is None:
                with contextlib.suppress(ssl.SSLWantReadError):  # it would wait for the server's
                    client.unwrap()
            connection.sendall(outgoing.read() + (end or b""))
            if end is not None:
                connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def test_an_end_in_tls_or_of_tcp_ends_the_connection_after_the_response(self):
        for end in (None, b""):
            server = self.serve(self.FILES)
            with self.subTest(end):
                self.assertGreater(len(self.request_by_hand(server, end)), 100)
                server.wait_for_request("/feed.xml")

    def test_an_end_in_tls_or_of_tcp_ends_a_delay(self):
        for end in (None, b""):
            server = self.serve()
            server.respond("/feed.xml", Response(bytes(1000), delay=999_999_999))
            wait = functools.partial(server.wait_for_request, "/feed.xml")
            with self.subTest(end):
                self.assertGreater(len(self.request_by_hand(server, end, wait)), 1000)

    def test_what_is_no_tls_ends_the_connection(self):
        body = bytes(10_000)
        for arguments in ({}, {"delay": 999_999_999}):
            server = self.serve()
            server.respond("/feed.xml", Response(body, **arguments))
            wait = functools.partial(server.wait_for_request, "/feed.xml")
            with self.subTest(arguments):
                received = self.request_by_hand(server, b"\x17\x03\x03\x00\x05wrong", wait)
                self.assertEqual(len(received) > len(body), not arguments)
                self.assertEqual((server.errors, len(server.requests)), ([], 1))

    def test_bad_certificates(self):
        server = self.serve(self.FILES)
        self.assertEqual(server.certificate, "valid")
        for kind, words in (
            ("expired", "certificate has expired"),
            ("not-yet-valid", "certificate is not yet valid"),
            ("wrong-host", "Hostname mismatch, certificate is not valid for 'localhost'"),
            ("self-signed", "self.signed certificate"),
        ):
            with self.subTest(kind):
                server.certificate = kind
                self.assertEqual(server.certificate, kind)
                with self.assertRaisesRegex(ssl.SSLCertVerificationError, words):
                    self.shake_hands(server)
        server.certificate = "valid"
        self.assertIn(b"200 OK", self.exchange(server, LAST))
        self.assertEqual(server.errors, [])

    def test_a_kind_of_certificate_that_there_is_not(self):
        server = self.serve()
        for kind in ("revoked", "", None, ["valid"]):
            with (
                self.subTest(kind),
                self.assertRaisesRegex(
                    ValueError,
                    "^certificate: found .*; it takes one of 'valid', 'expired', 'not-yet-valid',"
                    " 'wrong-host', 'self-signed', 'incomplete-chain', 'no-san'$",
                ),
            ):
                server.certificate = kind
        self.assertEqual(server.certificate, "valid")

    def test_a_chain_with_a_hole(self):
        server = self.serve(self.FILES)
        server.certificate = "incomplete-chain"
        for version, name in itertools.product(TLS_VERSIONS, ("localhost", "127.0.0.1")):
            context = self.context(server, version)
            with self.subTest(name, version=version):
                with self.assertRaises(ssl.SSLCertVerificationError) as caught:
                    self.shake_hands(server, name, context)
                self.assertEqual(caught.exception.verify_code, 20)
                words = "unable to get local issuer certificate"
                self.assertEqual(caught.exception.verify_message, words)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                self.assertIn(b"200 OK", self.exchange(server, LAST, context=context))
        with server.intercept(), self.assertRaises(urllib.error.URLError) as caught:
            urllib.request.urlopen("https://a.example/")
        self.assertEqual(caught.exception.reason.verify_code, 20)
        self.assertEqual(server.errors, [])

    def test_a_host_in_the_common_name_alone(self):
        """Browsers and urllib3 ignore it; Python goes by it unless it is told not to."""
        server = self.serve(self.FILES)
        server.certificate = "no-san"
        for version, (name, by_common_name, words) in itertools.product(
            TLS_VERSIONS,
            (
                ("localhost", True, ""),
                ("localhost", False, "Hostname mismatch, .* not valid for 'localhost'"),
                ("127.0.0.1", True, "IP address mismatch, .* not valid for '127.0.0.1'"),
                ("x" * 57 + ".example", True, "Hostname mismatch"),
            ),
        ):
            context = self.context(server, version)
            with self.subTest(name, version=version, by_common_name=by_common_name):
                if context.hostname_checks_common_name != by_common_name:
                    context.hostname_checks_common_name = by_common_name
                if words:
                    with self.assertRaisesRegex(ssl.SSLCertVerificationError, words):
                        self.shake_hands(server, name, context)
                context.check_hostname = context.check_hostname and not words
                with self.shake_hands(server, name, context) as connection:
                    self.assertNotIn("subjectAltName", connection.getpeercert())
        self.assertEqual(server.errors, [])

    def test_a_client_that_does_not_know_the_ca(self):
        server = self.serve()
        words = "unable to get local issuer certificate"
        with self.assertRaisesRegex(ssl.SSLCertVerificationError, words):
            self.shake_hands(server, context=ssl.create_default_context())
        self.assertEqual(server.errors, [])

    def test_handshakes_that_fail_are_refused_and_logged(self):
        hello = hello_for("a.example")
        for words, sent, answer in (
            ("TLS handshake failed: ", b"\x16\xff\xff\x00\x02ab", b""),
            ("TLS handshake failed: ", b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", b"\x15"),
            ("TLS handshake failed: the client has left", b"\x16", b""),
            ("TLS handshake failed: the client has left", hello[:-1], b""),
            ("TLS handshake for 'a.example' failed: the client has left", hello, b"\x16"),
            # What is no name of a host is taken for none, which RFC 6066 3 allows.
            (
                "TLS handshake failed: the client has left",
                hello.replace(b"a.example", b"../etc.no"),
                b"\x16",
            ),
            (
                "TLS handshake failed: the client has left",
                hello.replace(b"a.example", b"a.examp\xe9\xff"),
                b"\x16",
            ),
            ("TLS handshake failed: ", hello.replace(b"a.example", b"a.ex\0mple"), b"\x15"),
        ):
            with self.subTest(words, sent=sent[:60]):
                server = self.serve()
                got, logged = self.refused(server, sent)
                self.assertRegex(logged, words)
                self.assertTrue(got.startswith(answer), got)
                self.assertEqual((server.errors, server.requests), ([], []))

    def test_what_a_client_refuses_is_logged_with_its_alert(self):
        server = self.serve()
        with self.assertLogs("feedtestserver", "INFO") as logged:
            outgoing, incoming = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = ssl.create_default_context().wrap_bio(
                incoming, outgoing, server_hostname="localhost"
            )
            with connect(server) as connection:
                with self.assertRaises(ssl.SSLCertVerificationError):
                    while True:
                        with contextlib.suppress(ssl.SSLWantReadError):
                            client.do_handshake()
                        connection.sendall(outgoing.read())
                        incoming.write(connection.recv(65536))
                connection.sendall(outgoing.read())
                connection.shutdown(socket.SHUT_WR)
                read_all(connection)
            server.stop()
        self.assertRegex(
            logged.records[0].getMessage(), "TLS handshake for 'localhost' failed: .*unknown ca"
        )

    def new_host(self):
        """A host that has no certificate yet, as those that were made are kept."""
        return f"{os.urandom(8).hex()}.example"

    def test_a_certificate_that_cannot_be_made_is_an_error(self):
        server, host = self.serve(), self.new_host()
        no_room = mock.patch("tempfile.mkstemp", side_effect=OSError(errno.ENOSPC, "no room"))
        with no_room, connect(server) as connection:
            connection.sendall(hello_for(host))
            self.assertEqual(read_all(connection), b"")
        [error] = server.errors
        words = f"the certificate for {host}: OSError({errno.ENOSPC}, 'no room')\n"
        self.assertTrue(error.startswith(words), error)

    def test_making_a_certificate_delays_no_other_client(self):
        begun, go_on, mkstemp = threading.Event(), threading.Event(), tempfile.mkstemp

        def slow(*args, **kwargs):
            begun.set()
            go_on.wait(3 * PATIENCE)
            return mkstemp(*args, **kwargs)

        server, host = self.serve(), self.new_host()
        self.addCleanup(go_on.set)
        with mock.patch("tempfile.mkstemp", slow), connect(server) as connection:
            connection.sendall(hello_for(host))
            self.assertTrue(begun.wait(PATIENCE))
            self.assert_silent(server, connection)
            go_on.set()
            self.assertEqual(connection.recv(1), b"\x16")

    def test_first_bytes_of_any_kind(self):
        chance = random.Random(2009)
        hello = hello_for("a.example")
        threads, descriptors = set(threading.enumerate()), open_descriptors()
        server = self.serve()
        for number in range(200):
            sent = bytearray(hello if number % 2 else chance.randbytes(40))
            for _ in range(chance.randrange(4)):
                sent[chance.randrange(len(sent))] = chance.randrange(256)
            with connect(server) as connection:
                connection.sendall(sent[: chance.randrange(1, len(sent) + 1)])
                connection.shutdown(socket.SHUT_WR)
                read_to_the_end(connection)
        self.assertIn(b" 404 ", exchange(server, LAST))
        self.assertIn(b" 404 ", self.exchange(server, LAST))
        server.stop()
        self.assertEqual(server.errors, [])
        self.assertEqual(set(threading.enumerate()) - threads, set())
        self.assertLessEqual(open_descriptors(), descriptors)

    def test_stop_ends_handshakes_that_are_half_done(self):
        threads = set(threading.enumerate())
        server = self.serve()
        server.respond("/feed.xml", bytes(20_000_000))
        with contextlib.ExitStack() as stack:
            unread = stack.enter_context(self.shake_hands(server))
            unread.sendall(LAST)
            server.wait_for_request("/feed.xml")
            connections = [stack.enter_context(connect(server)) for _ in range(4)]
            for connection, size in zip(connections, (1, 5, 100, None)):
                connection.sendall(hello_for("a.example")[:size])
                self.assertEqual(self.get(server, "/none").status, 404)
            stack.enter_context(self.shake_hands(server))
            server.stop()
            self.assertEqual(set(threading.enumerate()) - threads, set())
            for connection in connections:
                read_to_the_end(connection)

    def test_the_file_of_the_ca(self):
        server = self.serve(self.FILES)
        path = server.ca_file
        self.assertEqual(server.ca_file, path)
        if os.name == "posix":
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        context = ssl.create_default_context(cafile=path)
        with urllib.request.urlopen(server.get_url("feed.xml", "https"), context=context) as answer:
            self.assertEqual(answer.status, 200)
        server.stop()
        self.assertFalse(os.path.exists(path))
        with self.assertRaisesRegex(
            RuntimeError, "ca_file is there only while the server is running"
        ):
            _ = server.ca_file
        with self.assertRaises(RuntimeError):
            _ = FeedTestServer(HERE).ca_file

    def test_no_file_is_left(self):
        folder, server = self.make_directory(), self.serve(self.FILES)
        with mock.patch("tempfile.tempdir", str(folder)):
            # The key is in a file for as long as it is read.
            self.shake_hands(server, self.new_host()).close()
            self.assertEqual(list(folder.iterdir()), [])
            self.assertEqual([server.ca_file], [str(path) for path in folder.iterdir()])
            server.stop()
        self.assertEqual(list(folder.iterdir()), [])

    def test_stop_though_the_file_of_the_ca_is_open(self):
        server = self.serve()
        with open(server.ca_file, "rb"):  # Windows does not remove it meanwhile
            server.stop()
        self.assertFalse(server.ready)
        with self.assertRaises(ConnectionRefusedError):
            connect(server)

    def test_no_file_is_left_where_there_is_no_room(self):
        folder = self.make_directory()

        def full(descriptor, *args):
            os.close(descriptor)
            raise OSError(errno.ENOSPC, "No space left on device")

        server = self.serve()
        with (
            mock.patch("tempfile.tempdir", str(folder)),
            mock.patch.object(feedtestserver, "open", full, create=True),
            self.assertRaisesRegex(OSError, "No space left"),
        ):
            _ = server.ca_file
        self.assertEqual(os.listdir(folder), [])

    def test_no_second_stop_returns_before_the_files_are_gone(self):
        server = self.serve()
        path, unlink, left = server.ca_file, os.unlink, []
        removing, second = threading.Event(), threading.Event()

        def stop_too():
            removing.wait(PATIENCE)
            second.set()
            server.stop()
            left.append(os.path.exists(path))

        def slow(path):
            removing.set()
            second.wait(PATIENCE)
            for _ in range(20):  # the second stop() has time to return too early
                run_at_once([lambda: None])
            unlink(path)

        with mock.patch("os.unlink", slow):
            run_at_once([server.stop, stop_too])
        self.assertEqual(left, [False])

    def test_the_file_goes_with_a_process_that_forgets_to_stop(self):
        code = (
            "import feedtestserver, os, sys\n"
            "server = feedtestserver.FeedTestServer('data'); server.start()\n"
            "paths = server.ca_file, server.client_certificate()\n"
            "print(*paths, sep='\\n', flush=True)\n"
            "if hasattr(os, 'fork'):\n"
            "    child = os.fork()\n"
            "    if not child: sys.exit()\n"
            "    os.waitpid(child, 0)\n"
            "assert all(map(os.path.exists, paths))\n"
        )
        done = run_script(code)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        paths = done.stdout.splitlines()
        self.assertEqual([os.path.exists(path) for path in paths], [False] * 2)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_child_has_the_ca_of_its_parent_or_none(self):
        code = (
            "import feedtestserver, os, sys\n"
            "server = feedtestserver.FeedTestServer('data'); server.start()\n"
            "for _ in range(2):\n"
            "    child = os.fork()\n"
            "    if not child:\n"
            "        try: server.ssl_context()\n"
            "        except RuntimeError as error: print(error, flush=True)\n"
            "        os._exit(0)\n"
            "    os.waitpid(child, 0)\n"
            "    server.ssl_context()\n"
            "server.stop()\n"
        )
        done = run_script(code)
        words = "the CA was not made before the fork: read ca_file before it\n"
        self.assertEqual((done.stdout, done.stderr), (words, ""))

    def test_no_certificate_is_made_before_it_is_needed(self):
        code = (
            "import feedtestserver, os, sys, urllib.request\n"
            "made, urandom = [], os.urandom\n"
            "def random(size): made.append('certificate'); return urandom(size)\n"
            "os.urandom = random\n"
            "def note(event, _): event.startswith('tempfile') and made.append(event)\n"
            "sys.addaudithook(note)\n"
            "with feedtestserver.FeedTestServer('data') as server:\n"
            "    url = server.fixtures('*/*.xml')[0].url\n"
            "    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).close()\n"
            "    assert not made, made\n"
            "    server.ca_file\n"
            "print('certificate' in made, 'tempfile.mkstemp' in made)\n"
        )
        done = run_script(code)
        self.assertEqual((done.stdout, done.stderr), ("True True\n", ""))


class HandshakeTest(TlsTestCase):
    WAYS = ("stall", "reset", "close")

    def ended(self):
        """How it ends for those that do not stall, as it is seen here."""
        return ("reset", rst()), ("close", "FIN")

    def test_it_is_completed_unless_told_otherwise(self):
        server = self.serve()
        self.assertEqual(server.handshake, "complete")
        for way in (*self.WAYS, "complete"):
            server.handshake = way
            self.assertEqual(server.handshake, way)
        self.assertIn(b" 404 ", self.exchange(server, LAST))

    def test_a_way_that_there_is_not(self):
        server = self.serve()
        server.handshake = "close"
        words = "^handshake: found .*; it takes one of 'complete', 'stall', 'reset', 'close'$"
        for way in ("slow", "", "Stall", None, True, ["stall"], b"stall"):
            with self.subTest(way), self.assertRaisesRegex(ValueError, words):
                server.handshake = way
        self.assertEqual(server.handshake, "close")

    def test_nothing_is_sent_before_the_end(self):
        server = self.serve()
        for version, (way, end) in itertools.product(TLS_VERSIONS, self.ended()):
            context, server.handshake = self.context(server, version), way
            with self.subTest(way), TlsClient(server, context=context) as client:
                client.connection.sendall(client.hello)
                self.assertEqual(read_to_the_end(client.connection), (b"", end))
        self.assertEqual((server.errors, server.requests), ([], []))

    def test_what_it_is_for_urllib(self):
        server = self.serve()
        closed = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
        reset = ConnectionResetError if rst() == "RST" else closed
        own, other = server.get_url("/", "https"), "https://a.example/"
        context = server.ssl_context()
        for way, error, seconds in (
            ("reset", reset, PATIENCE),
            ("close", closed, PATIENCE),
            ("stall", OSError, 0.05),
        ):
            server.handshake = way
            for url, proxy in ((own, True), (other, True), (other, False)):
                with self.subTest(way, url=url, proxy=proxy), server.intercept(proxy=proxy):
                    with self.assertRaises(urllib.error.URLError) as caught:
                        urllib.request.urlopen(url, timeout=seconds, context=context)
                    self.assertIsInstance(caught.exception.reason, error)
                    self.assertEqual("timed out" in str(caught.exception), way == "stall")
        self.assertEqual((server.errors, server.requests), ([], []))

    def test_one_that_stalls_stays_so(self):
        server = self.serve()
        server.handshake = "stall"
        with TlsClient(server) as client:
            client.connection.sendall(client.hello)
            for _ in range(2):  # the first may be served in the turn before
                self.assert_silent(server, client.connection)
            server.handshake = "complete"
            client.connection.sendall(b"\x16\x03\x01\xff\xff" + bytes(1000))
            self.assertIn(b" 404 ", self.exchange(server, LAST))
            self.assert_silent(server, client.connection)
            server.stop()
            self.assertEqual(read_to_the_end(client.connection)[0], b"")
        self.assertEqual(server.errors, [])

    def test_a_client_may_leave_one_that_stalls(self):
        class Handler(FeedTestRequestHandler):
            def converse(self):
                by_reset = yield from super().converse()
                finished.put(self.client_address)
                return by_reset

        class Server(FeedTestServer):
            handler_class = Handler

        finished, server = queue.Queue(), self.serve(server_class=Server)
        server.handshake = "stall"
        for leave in (socket.socket.close, close_by_reset):
            with self.subTest(leave), TlsClient(server) as client:
                client.connection.sendall(client.hello)
                self.assert_silent(server, client.connection)
                address = client.connection.getsockname()
                leave(client.connection)
                while finished.get(timeout=PATIENCE) != address:  # the other is assert_silent()'s
                    pass
        self.assertEqual(server.errors, [])

    def test_those_that_stall_need_no_thread_and_end_with_the_server(self):
        for down in (False, True):
            threads = set(threading.enumerate())
            server = self.serve()
            server.respond("https://a.example/", 204)
            server.handshake = "stall"
            with self.subTest(down=down), contextlib.ExitStack() as stack:
                clients = [
                    TlsClient(server, "a.example", tunnel=at) for at in ("", "a.example:443")
                ]
                clients += [TlsClient(server) for _ in range(5)]
                for client in map(stack.enter_context, clients):
                    client.connection.sendall(client.hello)
                self.assert_silent(server, client.connection)
                self.assertEqual(set(threading.enumerate()) - threads, {server})
                if down:
                    stack.enter_context(server.down())
                else:
                    server.stop()
                self.assertEqual(set(threading.enumerate()) - threads, {server} if down else set())
                for client in clients:
                    self.assertEqual(read_to_the_end(client.connection)[0], b"")

    def test_in_a_tunnel(self):
        for inside in (False, True):
            server = self.serve()
            server.respond("https://a.example/feed.xml", 204)
            for way, end in (("stall", None), *self.ended()):
                server.handshake = way
                with (
                    self.subTest(way, inside=inside),
                    server.intercept() if inside else contextlib.nullcontext(),
                    TlsClient(server, "a.example", tunnel="a.example:443") as client,
                    TlsClient(server, "a.example", tunnel="a.example:443") as later,
                ):
                    client.connection.sendall(client.hello)
                    if end:
                        self.assertEqual(read_to_the_end(client.connection), (b"", end))
                    else:
                        self.assert_silent(server, client.connection)
                    server.handshake = "complete"
                    later.shake_hands()
            self.assertEqual(server.errors, [])

    def test_inside_of_another_one(self):
        """Clients may speak TLS to a proxy, too."""
        server = self.serve()
        server.respond("https://a.example/", 204)
        for way, end in self.ended():
            server.handshake = "complete"
            with self.subTest(way), self.shake_hands(server) as outer:
                outer.sendall(b"CONNECT a.example:443 HTTP/1.1\r\nHost: a\r\n\r\n")
                self.assertIn(b" 200 ", outer.recv(65536))
                server.handshake = way
                outer.sendall(hello_for("a.example"))
                # In TLS, Python 3.11 takes a reset for an end.
                with socket.socket(fileno=outer.detach()) as connection:
                    connection.settimeout(PATIENCE)
                    received, seen = read_to_the_end(connection)
                self.assertEqual((len(received) > 100, seen), (False, end))
        self.assertEqual(server.errors, [])

    def test_it_is_looked_up_once_the_hello_is_whole(self):
        server = self.serve()
        for before, then, end in (
            ("complete", "close", "FIN"),
            ("close", "reset", rst()),
            ("complete", "stall", ""),
            ("stall", "complete", None),
            ("reset", "complete", None),
        ):
            with self.subTest(before=before, then=then), TlsClient(server) as client:
                server.handshake = before
                client.connection.sendall(client.hello[:-1])
                self.assert_silent(server, client.connection)
                server.handshake = then
                if end is None:
                    client.shake_hands(client.hello[-1:])
                    continue
                client.connection.sendall(client.hello[-1:])
                if end:
                    self.assertEqual(read_to_the_end(client.connection), (b"", end))
                else:
                    self.assert_silent(server, client.connection)

    def test_a_hello_in_pieces(self):
        server = self.serve()
        for way, end in self.ended():
            server.handshake = way
            for first in (None, 1, 5, 100):
                with (
                    self.subTest(way, first=first),
                    arriving(server, first),
                    TlsClient(server) as client,
                ):
                    client.connection.sendall(client.hello)
                    self.assertEqual(read_to_the_end(client.connection), (b"", end))
        self.assertEqual(server.errors, [])

    def test_http_and_what_has_begun_before_are_not_concerned(self):
        server = self.serve()
        with self.shake_hands(server) as connection:
            for way in self.WAYS:
                server.handshake = way
                with self.subTest(way), TlsClient(server) as later:
                    later.connection.sendall(later.hello)
                    connection.sendall(HEAD + b"\r\n")
                    self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 404 "))
                    self.assertEqual(self.get(server, "/none").status, 404)
                    server.handshake = "complete"
                    with self.assertRaises((OSError, EOFError)):
                        later.connection.settimeout(0 if way == "stall" else PATIENCE)
                        later.shake_hands(b"")

    def test_it_is_logged(self):
        for way in self.WAYS:
            server = self.serve()
            server.handshake = way
            with self.assertLogs("feedtestserver", "DEBUG") as logged:
                with TlsClient(server, "a.example") as client:
                    client.connection.sendall(client.hello)
                    if way == "stall":
                        self.assert_silent(server, client.connection)
                        self.assertIn("TLS handshake", logged.output[0])  # before the client leaves
                    else:
                        read_to_the_end(client.connection)
                self.get(server, "/none")  # the client that left before was noticed by then
                server.stop()
            records = [each for each in logged.records if "TLS" in each.getMessage()]
            with self.subTest(way):
                [record] = records
                self.assertIn("TLS handshake for 'a.example'", record.getMessage())
                self.assertLess(record.levelno, logging.WARNING)
                self.assertEqual(server.errors, [])

    def test_it_may_be_set_before_start(self):
        server = FeedTestServer(self.make_directory())
        server.handshake = "close"
        with server, TlsClient(server) as client:
            client.connection.sendall(client.hello)
            self.assertEqual(read_to_the_end(client.connection), (b"", "FIN"))


#: A certificate that its own key has signed, valid from 2009 to 2109, and that key. Its subject is
#: one relative name of two attributes, UID=42 + CN=the client (RFC 5280 4.1.2.4).
SELF_SIGNED = """\
-----BEGIN EC PRIVATE KEY-----
MDECAQEEIAcNFtv+Ulqz7jYOKL9GhWZIbV4uDdiGYq7gJQz0+6qEoAoGCCqGSM49
AwEH
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBojCCAUigAwIBAgIQMkGC7WGrSL2FUj3u8c8pizAKBggqhkjOPQQDAjAnMSUw
EAYKCZImiZPyLGQBAQwCNDIwEQYDVQQDDAp0aGUgY2xpZW50MCAXDTA5MDMwNzEy
MDAwMFoYDzIxMDkwMjExMTIwMDAwWjAnMSUwEAYKCZImiZPyLGQBAQwCNDIwEQYD
VQQDDAp0aGUgY2xpZW50MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEVIADPAkq
WlUt5aLTLC1T0J/4LQy82uUxA7UujEXr3ZKBId9AM8t6H5RkG8G9Ee8As0RvKuEK
o3KM3yBDlsaxmqNUMFIwDAYDVR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMCB4AwEwYD
VR0lBAwwCgYIKwYBBQUHAwIwHQYDVR0OBBYEFOwZlLPsn7BVJtdKIVMgx62UAlwP
MAoGCCqGSM49BAMCA0gAMEUCIQD6dyAV2orF+xihgB2eeUecz1YZvdduNjaDfZgr
1gEtPQIgKmz8k/q4VwOEIXg/h1rvpjP/lKyJLreoWzCaMBqUflo=
-----END CERTIFICATE-----
"""


class ClientCertificateTest(TlsTestCase):
    VALUES = ("none", "optional", "required")

    def setUp(self):
        super().setUp()
        self.server = self.serve()

    def shown_by(self, certificate, version=TLS_VERSIONS[-1], server=None):
        """What a request says of its client, which shows the certificate in this file, or none."""
        server = server or self.server
        context = self.context(server, version, certificate)
        self.assertIn(b" 404 ", self.exchange(server, LAST, context=context))
        return server.requests[-1].client_certificate

    def test_it_may_be_asked_for(self):
        path = self.server.client_certificate()
        self.assertEqual(self.server.client_certificates, "none")
        for version, (value, with_it, without) in itertools.product(
            TLS_VERSIONS,
            (("none", None, None), ("optional", "client", None), ("required", "client", "")),
        ):
            self.server.client_certificates = value
            with self.subTest(value, version=version):
                self.assertEqual(self.server.client_certificates, value)
                self.assertEqual(self.shown_by(path, version), with_it)
                if without is None:
                    self.assertIsNone(self.shown_by(None, version))
        self.assertEqual(self.server.errors, [])

    def test_whether_it_is_asked_for(self):
        """In TLS 1.2 it can be seen on the wire (RFC 5246 7.3)."""
        context = self.context(self.server, ssl.TLSVersion.TLSv1_2)
        for value in self.VALUES:
            self.server.client_certificates = value
            with self.subTest(value), TlsClient(self.server, context=context) as client:
                client.connection.sendall(client.hello)
                received, messages, types = b"", b"", []
                while not received.endswith(b"\x0e\0\0\0"):  # ServerHelloDone
                    received += client.connection.recv(65536)
                while received:
                    end = 5 + int.from_bytes(received[3:5], "big")
                    messages, received = messages + received[5:end], received[end:]
                while messages:
                    types.append(messages[0])
                    messages = messages[4 + int.from_bytes(messages[1:4], "big") :]
                self.assertEqual(13 in types, value != "none", types)  # CertificateRequest

    def wrong_certificates(self):
        """Files with certificates that no server should accept, and its alert for each."""
        with at_system_time(1_236_427_200):
            expired = self.server.client_certificate("of 2009")
        folder = self.make_directory({"self-signed.pem": SELF_SIGNED.encode()})
        other = self.serve(server_class=another_module().FeedTestServer)
        return (
            (expired, "certificate.expired"),
            (str(folder / "self-signed.pem"), "unknown.ca"),
            (other.client_certificate(), "unknown.ca"),
        )

    def test_a_client_that_is_refused(self):
        """It learns that in the handshake, in TLS 1.3 by what it reads first."""
        missing = "handshake.failure|certificate.required"
        cases = [(None, missing, ("required",))]
        cases += [(*wrong, ("optional", "required")) for wrong in self.wrong_certificates()]
        for version, (path, alert, values) in itertools.product(TLS_VERSIONS, cases):
            context = self.context(self.server, version, path)
            for value in values:
                self.server.client_certificates = value
                with (
                    self.subTest(alert, version=version, value=value),
                    self.assertRaisesRegex(ssl.SSLError, f"(?i)alert.({alert})"),
                    self.shake_hands(self.server, context=context) as connection,
                ):
                    self.assertEqual(connection.version(), "TLSv1.3")
                    connection.sendall(LAST)
                    connection.recv(1)
                self.assertEqual((self.server.errors, self.server.requests), ([], []))

    def test_it_is_logged(self):
        for version in TLS_VERSIONS:
            server = self.serve()
            server.client_certificates = "required"
            with self.assertLogs("feedtestserver", "DEBUG") as logged:
                with (
                    self.assertRaises(ssl.SSLError),
                    self.shake_hands(server, context=self.context(server, version)) as connection,
                ):
                    connection.recv(1)
                server.stop()
            with self.subTest(version):
                [record] = logged.records
                self.assertRegex(
                    record.getMessage(),
                    "^TLS handshake for 'localhost' failed: .*(?i:peer did not return a cert)",
                )
                self.assertLess(record.levelno, logging.WARNING)

    def test_one_of_another_ca_which_the_server_trusts(self):
        """Its common name is one of two attributes of the same part of its subject."""
        folder = self.make_directory({"client.pem": SELF_SIGNED.encode()})
        self.server.client_certificates = "required"
        self.server.configure_tls = lambda context: context.load_verify_locations(
            cadata=SELF_SIGNED[SELF_SIGNED.index("-----BEGIN CERT") :]
        )
        for version in TLS_VERSIONS:
            with self.subTest(version):
                name = self.shown_by(str(folder / "client.pem"), version)
                self.assertEqual(name, "the client")

    def test_a_value_that_there_is_not(self):
        self.server.client_certificates = "optional"
        words = "^client_certificates: found .*; it takes one of 'none', 'optional', 'required'$"
        for value in ("always", "", None, True, ssl.CERT_REQUIRED, ["none"]):
            with self.subTest(value), self.assertRaisesRegex(ValueError, words):
                self.server.client_certificates = value
        self.assertEqual(self.server.client_certificates, "optional")

    def test_each_request_of_the_connection_has_it(self):
        self.server.client_certificates = "required"
        self.server.respond("/feed.xml", lambda request: request.client_certificate.encode())
        context = self.context(self.server, certificate=self.server.client_certificate("me"))
        sent = HEAD + b"\r\n", b"GET /feed.xml HTTP/1.1\r\nHost: x\r\nbad line\r\n\r\n"
        answer = Answer(self.exchange(self.server, *sent, context=context))
        self.assertEqual(answer.body, b"me")
        ask(self.server, "/none")
        self.assertEqual(
            [(each.response.status, each.client_certificate) for each in self.server.requests],
            [(200, "me"), (400, "me"), (404, None)],
        )

    def test_before_start(self):
        server = FeedTestServer(self.make_directory())
        server.client_certificates = "required"
        with server:
            self.assertEqual(self.shown_by(server.client_certificate("x"), server=server), "x")

    def test_a_connection_that_has_begun_before_goes_on(self):
        with self.shake_hands(self.server) as connection:
            self.server.client_certificates = "required"
            connection.sendall(LAST)
            self.assertIn(b" 404 ", read_all(connection))
        self.assertIsNone(self.server.requests[0].client_certificate)

    def test_tls_to_a_proxy_and_to_the_site_behind_it(self):
        """A client may show one to each, or to one of them."""
        server = self.server
        server.client_certificates = "optional"
        server.respond("https://a.example/", 200, method="CONNECT")
        server.respond("https://a.example/feed.xml", 204)
        paths = {name: server.client_certificate(name) for name in ("proxy's", "site's")}
        paths[None] = None
        for times, (outer_name, name) in enumerate(itertools.product(paths, repeat=2), 1):
            context = self.context(server, certificate=paths[name])
            client = TlsClient(server, "a.example", context=context)
            client.connection.close()
            outer_context = self.context(server, certificate=paths[outer_name])
            client.connection = self.shake_hands(server, context=outer_context)
            with self.subTest(outer=outer_name, inner=name), client:
                client.connection.sendall(b"CONNECT a.example:443 HTTP/1.1\r\nHost: a\r\n\r\n")
                self.assertIn(b" 200 ", client.connection.recv(65536))
                client.shake_hands()
                client.tls.write(LAST.replace(b": x", b": a.example"))
                client.connection.sendall(client.outgoing.read())
                request = server.wait_for_request("https://a.example/feed.xml", times=times)
                self.assertEqual(request.client_certificate, name)
                self.assertEqual(request.tunnel.client_certificate, outer_name)

    def clients(self):
        """Three that show what their contexts say: over a proxy, directly, and without a socket."""

        def by_urllib(url, context):
            urllib.request.urlopen(url, timeout=PATIENCE, context=context).close()

        def by_http_client(url, context):
            host = urllib.parse.urlsplit(url).netloc
            with contextlib.closing(http.client.HTTPSConnection(host, context=context)) as client:
                client.request("GET", "/")
                client.getresponse().read()

        async def by_asyncio(url, context):
            parts = urllib.parse.urlsplit(url)
            reader, writer = await asyncio.open_connection(
                parts.hostname, parts.port or 443, ssl=context
            )
            writer.write(b"GET / HTTP/1.1\r\nHost: %s\r\n" % parts.netloc.encode())
            writer.write(b"Connection: close\r\n\r\n")
            await reader.read()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

        return by_urllib, by_http_client, lambda *where: asyncio.run(by_asyncio(*where))

    def test_in_an_interception(self):
        """Contexts keep their certificates, each its own."""
        server = self.server
        server.respond("https://a.example/", 204)
        server.client_certificates = "optional"
        ways = (TLS_VERSIONS[0], True), (TLS_VERSIONS[-1], False)
        for (version, proxy), fetch in itertools.product(ways, self.clients()):
            for name in ("me", None, "you"):
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.maximum_version = version
                if name:
                    context.load_cert_chain(server.client_certificate(name))
                with self.subTest(fetch.__name__, name=name, version=version, proxy=proxy):
                    with server.intercept(proxy=proxy):
                        fetch("https://a.example/", context)
                    request = server.requests[-1]
                    self.assertEqual(request.url, "https://a.example/")
                    self.assertEqual(request.client_certificate, name)
                    self.assertEqual(context.get_ca_certs(), [])
        self.assertEqual(server.errors, [])

    def test_threads_that_share_a_context_in_an_interception(self):
        """The context may be used for the first time there."""

        def fetch():
            connection = socket.create_connection(("a.example", 443), PATIENCE)
            with (
                connection,
                context.wrap_socket(
                    connection, server_hostname="a.example", do_handshake_on_connect=False
                ) as connection,
            ):
                begun.wait(PATIENCE)
                connection.sendall(LAST)
                read_all(connection)

        server = self.server
        server.respond("https://a.example/", 204)
        server.client_certificates = "optional"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(server.client_certificate("me"))
        begun = threading.Barrier(4)
        with server.intercept(proxy=False):
            run_at_once([fetch] * 4)
        self.assertEqual([each.client_certificate for each in server.requests], ["me"] * 4)

    def test_many_contexts_in_an_interception(self):
        """A handshake ends as it has begun, however many begin meanwhile."""
        server = self.server
        server.respond("https://a.example/", 204)
        server.client_certificates = "optional"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(server.client_certificate("me"))
        with server.intercept(proxy=False):
            connection = socket.create_connection(("a.example", 443), PATIENCE)
            with (
                connection,
                context.wrap_socket(
                    connection, server_hostname="a.example", do_handshake_on_connect=False
                ) as connection,
            ):
                for _ in range(70):
                    other = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    other.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="a.example")
                connection.do_handshake()
                connection.sendall(LAST)
                read_all(connection)
        self.assertEqual(server.requests[0].client_certificate, "me")

    def test_a_service_beside_an_interception(self):
        service = self.serve(server_class=another_module().FeedTestServer)
        service.respond("/", 204)
        service.client_certificates = "required"
        context = self.context(service, certificate=service.client_certificate("me"))
        for fetch in self.clients():
            with self.subTest(fetch.__name__):
                with self.server.intercept():
                    fetch(service.get_url("/", "https"), context)
                self.assertEqual(service.requests[-1].client_certificate, "me")
                service.clear()
                service.respond("/", 204)
        self.assertEqual(self.server.requests, [])

    def test_two_servers_of_a_process_have_one_ca(self):
        others = self.serve()
        for server in (self.server, others):
            server.client_certificates = "required"
        paths = [server.client_certificate("x") for server in (self.server, others)]
        self.assertNotEqual(*paths)
        self.server.stop()
        self.assertEqual(list(map(os.path.exists, paths)), [False, True])
        third = self.serve()
        third.client_certificates = "required"
        self.assertEqual(self.shown_by(paths[1], server=third), "x")


class ClientCertificateFileTest(TlsTestCase):
    def setUp(self):
        super().setUp()
        self.server = self.serve()
        self.server.client_certificates = "required"
        self.folder = self.make_directory()
        change = mock.patch("tempfile.tempdir", str(self.folder))
        change.start()
        self.addCleanup(change.stop)

    def shown_by(self, path):
        """What the server says of who shows the certificate in this file."""
        context = self.context(self.server, certificate=path)
        self.exchange(self.server, LAST, context=context)
        return self.server.requests[-1].client_certificate

    def test_it_holds_a_certificate_and_its_key_for_its_owner_only(self):
        path = self.server.client_certificate()
        self.assertIs(type(path), str)
        self.assertEqual(self.server.client_certificate("client"), path)
        self.assertEqual([path], [str(path) for path in self.folder.iterdir()])
        if os.name == "posix":
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        text = pathlib.Path(path).read_text("ascii")
        labels = re.findall(r"(?m)^-----BEGIN (?:EC )?(.*)-----$", text)
        self.assertEqual(sorted(labels), ["CERTIFICATE", "PRIVATE KEY"])
        self.assertEqual(self.shown_by(path), "client")

    def test_it_is_there_only_while_the_server_is_running(self):
        path = self.server.client_certificate()
        with self.server.down():
            self.assertTrue(os.path.exists(path))
        self.assertEqual(self.shown_by(path), "client")
        self.server.stop()
        self.assertFalse(os.path.exists(path))
        self.assertEqual(list(self.folder.iterdir()), [])
        for server in (self.server, FeedTestServer(self.folder)):
            with self.assertRaisesRegex(RuntimeError, "is there only while the server is running"):
                server.client_certificate()
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_any_name_of_1_to_64_characters(self):
        names = ["a", "A", "x" * 64, "\U0001d11e" * 64, " a ", "u\u0308", "\u00fc", ".."]
        names += ["../x", "/x", "C:\\x", "nul", "*", "ca.pem", "ca_file", "wgetrc"]
        known = [self.server.ca_file]
        with self.server.intercept():  # makes a file, too
            known += set(map(str, self.folder.iterdir())) - {*known}
        for name in names:
            with self.subTest(name):
                path = self.server.client_certificate(name)
                self.assertNotIn(path, known)
                known.append(path)
                self.assertEqual(os.path.dirname(path), str(self.folder))
                self.assertEqual(self.shown_by(path), name)
                self.assertEqual(self.server.client_certificate(name), path)
        self.assertEqual(sorted(known), sorted(map(str, self.folder.iterdir())))
        self.server.stop()
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_what_is_no_name(self):
        words = "^client_certificate: found .*; it takes 1 to 64 characters without"
        for name in (
            *("", "x" * 65, "\u00e9" * 65, None, 5, b"x", ["x"], "\ud800"),
            *("\0", "a\0b", "a\n", "a\r\nb", "\t", "\x1b[0m", "\x7f", "\x85"),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, words):
                self.server.client_certificate(name)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_threads_that_ask_at_once_get_the_same(self):
        paths = []
        run_at_once([lambda: paths.append(self.server.client_certificate())] * 4)
        self.assertEqual(paths, [str(path) for path in self.folder.iterdir()] * 4)

    def test_a_test_s_own_step_may_make_one(self):
        self.server.respond("/", lambda request: self.server.client_certificate("x").encode())
        self.assertEqual(ask(self.server, "/").body.decode(), self.server.client_certificate("x"))


class ConfigureTlsTest(TlsTestCase):
    def at_most(self, context):
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    def test_what_it_sets_counts_for_this_handshake_only(self):
        server = self.serve()
        self.assertIsNone(server.configure_tls)
        ours = self.context(server, ssl.TLSVersion.TLSv1_2)
        ours.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384")
        ours.set_alpn_protocols(["http/1.1", "h2"])
        for cipher, protocol in (("ECDHE-ECDSA-AES128-GCM-SHA256", "h2"),) * 2 + (
            ("ECDHE-ECDSA-AES256-GCM-SHA384", "http/1.1"),
            ("ECDHE-ECDSA-AES128-GCM-SHA256", None),
        ):

            def configure(context, cipher=cipher, protocol=protocol):
                context.set_ciphers(cipher)
                context.set_alpn_protocols([protocol] if protocol else ["none of these"])

            server.configure_tls = configure
            self.assertIs(server.configure_tls, configure)
            with (
                self.subTest(cipher, protocol=protocol),
                self.shake_hands(server, context=ours) as connection,
            ):
                self.assertEqual(connection.cipher()[0], cipher)
                self.assertEqual(connection.selected_alpn_protocol(), protocol)
        server.configure_tls = None
        with self.shake_hands(server, context=ours) as connection:
            self.assertEqual(connection.selected_alpn_protocol(), "http/1.1")

    def test_the_version(self):
        server, other = self.serve(), self.serve()
        newest = self.shake_hands(server).version()
        for configure, version in ((self.at_most, "TLSv1.2"), (None, newest)) * 2:
            server.configure_tls = configure
            with self.subTest(version), self.shake_hands(server) as connection:
                self.assertEqual(connection.version(), version)
                self.assertEqual(self.shake_hands(other).version(), newest)

    def test_it_is_called_once_for_each_handshake_with_a_context_of_its_own(self):
        server, seen = self.serve(), []
        server.respond("https://a.example/", 204)
        server.configure_tls = seen.append
        for version in (*TLS_VERSIONS, TLS_VERSIONS[0]):
            self.shake_hands(server, context=self.context(server, version)).close()
        with TlsClient(server, "a.example", tunnel="a.example:443") as client:
            self.assertEqual(len(seen), len(TLS_VERSIONS) + 1)
            client.shake_hands()
        self.get(server, "/none")
        self.assertEqual(len(set(map(id, seen))), len(TLS_VERSIONS) + 2)
        for context in seen:
            self.assertIsInstance(context, ssl.SSLContext)
            self.assertEqual(context.protocol, ssl.PROTOCOL_TLS_SERVER)

    def test_any_callable_will_do(self):
        class Configure:
            """It counts as false."""

            def __len__(self):
                return 0

            def __call__(self, context):
                called.append(context)
                return context

        async def later(context):
            await asyncio.sleep(0)
            called.append(context)

        server, called = self.serve(), []
        for configure in (Configure(), functools.partial(Configure()), called.append, later):
            server.configure_tls = configure
            self.assertIs(server.configure_tls, configure)
            self.assertIn(b" 404 ", self.exchange(server, LAST))
        self.assertEqual(len(called), 4)

    def test_what_cannot_be_called(self):
        server = self.serve()
        server.configure_tls = self.at_most
        words = "^configure_tls: found .*; it takes a function"
        for value in (1, 0, "", "x", (), False, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)):
            with self.subTest(value), self.assertRaisesRegex(ValueError, words):
                server.configure_tls = value
        self.assertEqual(server.configure_tls, self.at_most)

    def test_before_start(self):
        server = FeedTestServer(self.make_directory())
        server.configure_tls = self.at_most
        with server, self.shake_hands(server) as connection:
            self.assertEqual(connection.version(), "TLSv1.2")

    def test_what_it_raises_is_an_error(self):
        class Odd(BaseException):
            pass

        class Unshown(Exception):
            def __repr__(self):
                raise ZeroDivisionError

        server = self.serve()
        for error, words in (
            (ZeroDivisionError("zero"), r"ZeroDivisionError\('zero'\)"),
            (ValueError("x"), "ValueError"),
            (RuntimeError("x"), "RuntimeError"),
            (OSError(errno.ENOENT, "x", "name"), "FileNotFoundError"),
            (ConnectionResetError("x"), "ConnectionResetError"),
            (ssl.SSLError(1, "x"), "SSLError"),
            (ssl.SSLWantReadError(2, "x"), "SSLWantReadError"),
            (EOFError(), "EOFError"),
            (StopIteration(1), "StopIteration"),
            (GeneratorExit(), "GeneratorExit"),
            (SystemExit(1), "SystemExit"),
            (KeyboardInterrupt(), "KeyboardInterrupt"),
            (Odd(), "Odd"),
            (Unshown(), r"Unshown, whose repr\(\) raises ZeroDivisionError"),
        ):

            def broken(context, error=error):
                raise error

            with self.subTest(words):
                server.clear()
                server.configure_tls = broken
                with self.assertRaises(OSError):
                    self.shake_hands(server)
                [found] = server.errors
                self.assertRegex(found, words)
                self.assertIn("configure_tls", found)
                self.assertIn("in broken\n    raise error\n", found)
                self.assertEqual(found.count("\n  File "), 1)
                self.assertEqual(server.requests, [])
                server.configure_tls = None
                self.assertIn(b" 404 ", self.exchange(server, LAST))

    def test_a_setting_that_there_is_not(self):
        server = self.serve()
        server.configure_tls = lambda context: context.set_ciphers("none of these")
        with self.assertRaises(OSError):
            self.shake_hands(server)
        self.assertRegex(server.errors[0], "(?s)No cipher can be selected.*, in <lambda>")
        with self.assertRaisesRegex(AssertionError, "No cipher can be selected"):
            server.__exit__(None, None, None)

    def test_it_may_block(self):
        """Others are served meanwhile, in TLS as well."""
        entered, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        def configure(context):
            if not entered.is_set():
                entered.set()
                release.wait(PATIENCE)
            context.maximum_version = ssl.TLSVersion.TLSv1_2

        server = self.serve()
        server.configure_tls = configure
        with TlsClient(server) as client:
            client.connection.sendall(client.hello)
            self.assertTrue(entered.wait(PATIENCE))
            self.assert_silent(server, client.connection)
            for host in ("localhost", "a.example"):
                self.assertEqual(self.shake_hands(server, host).version(), "TLSv1.2")
            server.configure_tls = None
            self.assertIn(b" 404 ", self.exchange(server, LAST))
            self.assert_silent(server, client.connection)
            release.set()
            client.shake_hands(b"")
            self.assertEqual(client.tls.version(), "TLSv1.2")

    def test_it_may_use_the_server(self):
        server, seen = self.serve(), []

        def configure(context):
            seen.append(self.get(server, "/none").status)
            seen.append(os.path.exists(server.client_certificate("x")))
            seen.append(os.path.exists(server.ca_file))
            server.configure_tls = None
            seen.append(self.exchange(server, LAST)[:12])

        server.configure_tls = configure
        self.assertIn(b" 404 ", self.exchange(server, LAST))
        self.assertEqual(seen, [404, True, True, b"HTTP/1.1 404"])

    def test_it_may_stop_the_server(self):
        threads, stopped = set(threading.enumerate()), threading.Event()
        server = self.serve()
        server.configure_tls = lambda context: (server.stop(), stopped.set())
        with connect(server) as connection:
            connection.sendall(hello_for("localhost"))
            self.assertTrue(stopped.wait(PATIENCE))
            server.stop()
            read_to_the_end(connection)
        self.assertEqual(set(threading.enumerate()) - threads, set())
        self.assertEqual(server.errors, [])

    def test_stop_waits_for_it(self):
        threads = set(threading.enumerate())
        server, entered, release = self.serve(), threading.Event(), threading.Event()
        self.addCleanup(release.set)
        server.configure_tls = lambda context: (entered.set(), release.wait(PATIENCE), 1 / 0)
        server.stop_timeout = 0.01
        words = r"\(\) waited 0.01 s for the test code .* a\.example; it has to return by itself$"
        with connect(server) as connection:
            connection.sendall(hello_for("a.example"))
            self.assertTrue(entered.wait(PATIENCE))
            with self.assertRaisesRegex(RuntimeError, "^down" + words), server.down():
                self.fail("it was entered")
            with self.assertRaisesRegex(RuntimeError, "^stop" + words):
                server.stop()
            self.assertEqual(read_to_the_end(connection)[0], b"")
            release.set()
            server.stop_timeout = PATIENCE
            server.stop()
        self.assertEqual(set(threading.enumerate()) - threads, set())
        self.assertRegex(server.errors[0], "(?s)ZeroDivisionError.*, in <lambda>")

    def test_what_it_raises_after_the_client_has_left_is_an_error_all_the_same(self):
        server, entered, release = self.serve(), threading.Event(), threading.Event()
        self.addCleanup(release.set)
        server.configure_tls = lambda context: (entered.set(), release.wait(PATIENCE), 1 / 0)
        for leave in (socket.socket.close, close_by_reset):
            entered.clear()
            connection = connect(server)
            connection.sendall(hello_for("localhost"))
            self.assertTrue(entered.wait(PATIENCE))
            leave(connection)
        release.set()
        server.stop()
        self.assertEqual(["ZeroDivisionError" in error for error in server.errors], [True] * 2)


class SessionTest(TlsTestCase):
    """A client that comes back with a session finds what has changed since then."""

    def setUp(self):
        super().setUp()
        self.server = self.serve()

    def clients(self, certificate=None):
        """Words and a context for each kind of session: in tickets, and by number in TLS 1.2."""
        versions = [(version, True) for version in TLS_VERSIONS]
        for version, has_tickets in (*versions, (ssl.TLSVersion.TLSv1_2, False)):
            context = self.context(self.server, version, certificate)
            context.options |= 0 if has_tickets else ssl.OP_NO_TICKET
            yield f"{version.name}, {has_tickets=}", context

    def visit(self, context, session=None):
        """One request; what there is to know of its connection."""
        with self.shake_hands(self.server, context=context, session=session) as connection:
            connection.sendall(LAST)
            self.assertIn(b" 404 ", read_all(connection))
            self.assertIsNotNone(connection.session)
            return types.SimpleNamespace(
                session=connection.session,
                is_resumed=connection.session_reused,
                version=connection.version(),
                protocol=connection.selected_alpn_protocol(),
            )

    def test_another_certificate(self):
        for kind in ("expired", "incomplete-chain"):
            for words, context in self.clients():
                self.server.certificate = "valid"
                session = self.visit(context).session
                self.server.certificate = kind
                with self.subTest(kind, words=words):
                    with self.assertRaises(ssl.SSLCertVerificationError):
                        self.visit(context, session)
                    self.server.certificate = "valid"
                    self.visit(context, session)

    def test_another_end_of_the_handshake(self):
        for words, context in self.clients():
            self.server.handshake = "complete"
            session = self.visit(context).session
            self.server.handshake = "close"
            with self.subTest(words), self.assertRaises(ssl.SSLError):
                self.visit(context, session)

    def test_a_client_that_has_to_show_a_certificate_now(self):
        for before in ("none", "optional"):
            for words, context in self.clients():
                self.server.client_certificates = before
                session = self.visit(context).session
                self.server.clear()
                self.server.client_certificates = "required"
                with self.subTest(before, words=words):
                    with self.assertRaises(ssl.SSLError):
                        self.visit(context, session)
                    self.assertEqual(self.server.requests, [])

    def test_a_client_that_shows_its_certificate_whenever_it_is_asked(self):
        for words, context in self.clients(self.server.client_certificate("me")):
            session = None
            for value, name in (
                *(("none", None), ("optional", "me"), ("required", "me"), ("none", None)),
                ("required", "me"),
            ):
                self.server.client_certificates = value
                visit = self.visit(context, session)
                session = visit.session
                with self.subTest(words, value=value):
                    self.assertFalse(visit.is_resumed)
                    self.assertEqual(self.server.requests[-1].client_certificate, name)

    def test_a_client_s_certificate_is_known_though_nothing_has_changed(self):
        for value in ("optional", "required"):
            self.server.client_certificates = value
            for words, context in self.clients(self.server.client_certificate("me")):
                session = None
                for number in range(3):
                    session = self.visit(context, session).session
                    with self.subTest(words, value=value, number=number):
                        self.assertEqual(self.server.requests[-1].client_certificate, "me")

    def test_another_configuration(self):
        def other(context):
            context.set_alpn_protocols(["other"])

        def own(context):
            context.set_alpn_protocols(["own"])

        for words, context in self.clients():
            session = None
            context.set_alpn_protocols(["http/1.1", "own", "other"])
            for configure, protocol in (
                *((None, "http/1.1"), (own, "own"), (other, "other"), (own, "own")),
                (None, "http/1.1"),
            ):
                self.server.configure_tls = configure
                visit = self.visit(context, session)
                session = visit.session
                with self.subTest(words, protocol=protocol):
                    self.assertFalse(visit.is_resumed)
                    self.assertEqual(visit.protocol, protocol)

    def test_another_version(self):
        def at_most(context):
            context.maximum_version = ssl.TLSVersion.TLSv1_2

        context = self.server.ssl_context()
        newest, session = self.visit(context).version, None
        for configure, version in ((None, newest), (at_most, "TLSv1.2")) * 2:
            self.server.configure_tls = configure
            visit = self.visit(context, session)
            session = visit.session
            with self.subTest(version):
                self.assertFalse(visit.is_resumed)
                self.assertEqual(visit.version, version)

    def test_what_configures_it_is_called_for_each(self):
        for words, context in self.clients():
            called, session = [], None
            self.server.configure_tls = called.append
            for _ in range(3):
                session = self.visit(context, session).session
            with self.subTest(words):
                self.assertEqual(len(set(map(id, called))), 3)


# Any host


class AnyHostTestCase(ServerTestCase):
    """Fetches from hosts that a server stands in for."""

    FILES = {
        "example.com/feed.xml": comment("Header: X-URL: {{base_url}}"),
        "example.com/moved.xml": comment("Status: 301", "Header: Location: //example.org/new.xml"),
        "example.com/secure.xml": comment(
            "Status: 301", "Header: Location: https://{{host}}/feed.xml"
        ),
        "example.com/index.html": b'<link rel="alternate" href="/feed.xml">',
        "example.org/new.xml": b"<new/>",
        "feed.xml": b"<own/>",
    }
    URL = "https://example.com/feed.xml"

    def fetch(self, url, **options):
        with urllib.request.urlopen(url, timeout=PATIENCE, **options) as answer:
            return answer.read()

    def fetch_directly(self, url, context=None):
        """By http.client, which knows of no proxy."""
        parts = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=PATIENCE)
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                parts.netloc, timeout=PATIENCE, context=context
            )
        with contextlib.closing(connection):
            connection.request("GET", parts.path)
            return connection.getresponse().read()

    def places(self):
        """All that intercept() may change."""
        modules = ("socket", "ssl", "select", "asyncio.windows_events", "_overlapped")
        classes = [socket.socket, ssl.SSLContext, ssl.SSLSocket, ssl.SSLObject]
        classes.append(getattr(asyncio, "IocpProactor", object))  # of Windows
        return (
            dict(os.environ),
            [dict(vars(sys.modules[name])) for name in modules if name in sys.modules],
            [dict(vars(owner)) for owner in classes],
            urllib.request._opener,
        )

    def intercepts(self, server):
        """Whether a server is the whole Web just now, and not only its own host."""
        request = b"GET /x HTTP/1.1\r\nHost: nobody.example\r\nConnection: close\r\n\r\n"
        return Answer(exchange(server, request)).status == 502

    def unused_port(self):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            return listening.getsockname()[1]

    def called(self, name):
        """The addresses that a method of sockets gets, and a context in which it does no more."""
        called = []

        def note(connection, address):
            called.append(address)

        return called, mock.patch.object(socket.socket, name, note)


class InterceptionTest(AnyHostTestCase):
    def test_code_with_the_url_written_into_it(self):
        server = self.serve(self.FILES)
        with server.intercept() as entered:
            self.assertIs(entered, server)
            for fetch in (self.fetch, self.fetch_directly):
                for scheme in ("http", "https"):
                    with self.subTest(fetch.__name__, scheme=scheme):
                        url = f"{scheme}://example.com/feed.xml"
                        self.assertIn(b"<rss/>", fetch(url))
                        request = server.requests[-1]
                        self.assertEqual(request.url, url)
                        self.assertEqual(str(request), f"GET {url} -> 200")
                        given = request.response.headers[0]
                        self.assertEqual(given, ("X-URL", f"{scheme}://example.com"))
        self.assertEqual([request.method for request in server.requests], ["GET"] * 4)
        self.assertEqual(server.errors, [])

    def test_other_ports_of_a_host(self):
        server = self.serve(self.FILES)
        server.respond("http://example.com:8080/only", b"8080")
        with server.intercept():
            for fetch in (self.fetch, self.fetch_directly):
                self.assertEqual(fetch("http://example.com:8080/only"), b"8080")
                self.assertIn(b"<rss/>", fetch("https://example.com:8443/feed.xml"))
                self.assertEqual(server.requests[-1].url, "https://example.com:8443/feed.xml")
            with self.assertRaises(urllib.error.HTTPError) as caught:
                self.fetch("http://example.com/only")
            caught.exception.close()
            self.assertEqual(caught.exception.code, 404)

    def test_an_index_for_autodiscovery(self):
        with self.serve(self.FILES).intercept():
            self.assertIn(b'rel="alternate"', self.fetch("https://example.com/"))
            self.assertIn(b'rel="alternate"', self.fetch("https://example.com"))
            for fetch in (self.fetch, self.fetch_directly):
                self.assertIn(b'rel="alternate"', fetch("https://example.com./"))
                self.assertIn(b'rel="alternate"', fetch("https://example.com.:8443/"))

    def test_a_folder_with_an_underscore(self):
        with self.serve({"_my_blog.example/feed.xml": b"<rss/>"}).intercept():
            self.assertEqual(self.fetch("http://_my_blog.example/feed.xml"), b"<rss/>")

    def test_redirects_from_host_to_host_and_to_https(self):
        server = self.serve(self.FILES)
        with server.intercept():
            self.assertEqual(self.fetch("https://example.com/moved.xml"), b"<new/>")
            self.assertIn(b"<rss/>", self.fetch("http://example.com/secure.xml"))
        self.assertEqual(
            [str(request) for request in server.requests],
            [
                "GET https://example.com/moved.xml -> 301",
                "GET https://example.org/new.xml -> 200",
                "GET http://example.com/secure.xml -> 301",
                "GET https://example.com/feed.xml -> 200",
            ],
        )

    def test_whole_urls_in_respond_and_in_what_is_waited_for(self):
        server = self.serve()
        server.respond("https://example.com/feed.xml", b"1", b"2")
        server.respond("http://example.com/feed.xml", 410)
        server.respond("https://b\u00fccher.example/", b"3")
        server.respond("https://me:secret@192.0.2.1/", b"4")
        server.respond("http://[2001:db8::1]/", b"5")
        with server.intercept():
            self.assertEqual(self.fetch("https://EXAMPLE.com:443/feed.xml"), b"1")
            self.assertEqual(self.fetch("https://example.com/feed.xml"), b"2")
            with self.assertRaises(urllib.error.HTTPError) as caught:
                self.fetch("http://example.com/feed.xml")
            caught.exception.close()
            self.assertEqual(self.fetch("https://xn--bcher-kva.example/"), b"3")
            self.assertEqual(self.fetch("https://192.0.2.1/"), b"4")
            self.assertEqual(self.fetch("http://[2001:db8::1]/"), b"5")
        server.wait_for_request("https://example.com/feed.xml", times=2)
        server.wait_for_request("https://b\u00fccher.example/")

    def test_contexts_from_before_are_trusted_with_it_and_stay_as_they_are(self):
        server = self.serve(self.FILES)
        context = ssl.create_default_context()
        before = context.get_ca_certs()
        with server.intercept():
            self.assertIn(b"<rss/>", self.fetch_directly(self.URL, context))
            self.assertIn(b"<rss/>", self.fetch(self.URL, context=context))
            self.assertEqual(context.get_ca_certs(), before)
        with connect(server) as connection, self.assertRaises(ssl.SSLCertVerificationError):
            context.wrap_socket(connection, server_hostname="example.com")

    def service(self):
        """A server with a CA of its own, and a context that trusts it."""
        service = self.serve(self.FILES, another_module().FeedTestServer)
        context = service.ssl_context()
        self.fetch(service.get_url("feed.xml", "https"), context=context)
        return service, context

    def test_services_with_certificates_of_their_own(self):
        service, context = self.service()
        mine = ssl.create_default_context()
        url = service.get_url("feed.xml", "https")

        async def read(context, hostname):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", service.port, ssl=context, server_hostname=hostname
            )
            writer.write(LAST)
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            return answer

        server = self.serve(self.FILES)
        with server.intercept():
            self.assertEqual(self.fetch(url, context=context), b"<own/>")
            self.assertIn(b"<own/>", asyncio.run(read(context, "127.0.0.1")))
            mine.load_verify_locations(cadata=context.get_ca_certs(True)[0])
            self.assertIn(b"<own/>", asyncio.run(read(mine, "127.0.0.1")))
            with self.assertRaises(ssl.SSLCertVerificationError):
                asyncio.run(read(ssl.create_default_context(), "127.0.0.1"))
        self.assertEqual(server.requests, [])

    def test_contexts_of_servers_and_for_services_are_not_touched(self):
        service, context = self.service()
        seen = []
        wrap_socket = ssl.SSLContext._wrap_socket

        def note(*arguments, **others):
            seen.append(wrap_socket(*arguments, **others))
            return seen[-1]

        stub = mock.patch.object(ssl.SSLContext, "_wrap_socket", note)
        server = self.serve(self.FILES)
        with stub, server.intercept():
            self.fetch(service.get_url("feed.xml", "https"), context=context)
            self.assertIs(seen[-1].context, context)
            self.fetch_directly(self.URL, context)
            self.assertIs(seen[-1].context, context)  # again, as it may have a certificate to show
            listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls = listening.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
            self.assertIs(tls.context, listening)
            with contextlib.closing(connect(server)) as connection:
                tls = listening.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                self.assertIs(seen[-1].context, listening)
                tls.close()

    def test_tls_over_a_pair_of_sockets(self):
        """These are no internet sockets, except on Windows."""
        server, (one, another) = self.serve(), socket.socketpair()
        context = server.ssl_context()
        with server.intercept(), one, another:
            tls = context.wrap_socket(
                one, server_hostname="a.example", do_handshake_on_connect=False
            )
            with tls:
                self.assertIs(tls.context, context)

    def test_sessions(self):
        server = self.serve(self.FILES)
        context = ssl.create_default_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        session = None
        with server.intercept():
            for _ in range(2):
                connection = context.wrap_socket(
                    connect(server), server_hostname="example.com", session=session
                )
                with connection:
                    session = connection.session
                    connection.sendall(LAST.replace(b"Host: x", b"Host: example.com"))
                    self.assertIn(b"<rss/>", read_all(connection))

    def test_what_a_context_demands_is_still_demanded(self):
        server = self.serve(self.FILES)
        strict = ssl.create_default_context()
        strict.verify_flags |= ssl.VERIFY_X509_STRICT
        lax = ssl.create_default_context()
        lax.check_hostname, lax.verify_mode = False, ssl.CERT_NONE
        with server.intercept():
            self.assertIn(b"<rss/>", self.fetch_directly(self.URL, strict))
            for kind in ("expired", "wrong-host", "self-signed"):
                server.certificate = kind
                with self.assertRaises(ssl.SSLCertVerificationError):
                    self.fetch_directly(self.URL, strict)
                self.assertIn(b"<rss/>", self.fetch_directly(self.URL, lax))

    def test_a_context_keeps_its_ciphers_and_its_security_level(self):
        """What is agreed upon, or why a handshake fails, is the same as outside."""

        def shake_hands(address, context):
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(ciphers)
            with socket.create_connection(address, PATIENCE) as connection:
                try:
                    with context.wrap_socket(connection, server_hostname="a.example") as tls:
                        return tls.cipher()[0]
                except ssl.SSLError as error:
                    return error.reason

        server, cipher = self.serve(), "ECDHE-ECDSA-AES256-GCM-SHA384"
        for ciphers, is_refused in (
            ("AES128-SHA", True),  # it is for another kind of certificate
            (cipher, False),
            ("ECDHE-ECDSA-AES128-GCM-SHA256", False),
            # More than the key of the certificate; Python 3.9 does not tell the level.
            *[(f"{cipher}:@SECLEVEL=4", True)] * hasattr(ssl.SSLContext, "security_level"),
        ):
            with self.subTest(ciphers):
                outside = shake_hands(("127.0.0.1", server.port), server.ssl_context())
                self.assertEqual(outside != ciphers, is_refused)
                with server.intercept(proxy=False):
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    inside = shake_hands(("a.example", 443), context)
                self.assertEqual(inside, outside)
        self.assertEqual(server.errors, [])

    def test_sockets_that_are_connected_after_they_were_wrapped(self):
        server = self.serve(self.FILES)
        context = ssl.create_default_context()
        connection = context.wrap_socket(socket.socket(), server_hostname="example.com")
        with server.intercept(), connection:
            connection.connect(("example.com", 443))
            connection.sendall(b"GET /feed.xml HTTP/1.0\r\nHost: example.com\r\n\r\n")
            self.assertIn(b"<rss/>", read_all(connection))

    def test_asyncio(self):
        server = self.serve(self.FILES)
        context = ssl.create_default_context()

        async def fetch():
            reader, writer = await asyncio.open_connection("example.com", 443, ssl=context)
            writer.write(b"GET /feed.xml HTTP/1.0\r\nHost: example.com\r\n\r\n")
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            return answer

        with server.intercept():
            self.assertIn(b"<rss/>", asyncio.run(fetch()))
        self.assertEqual(server.requests[0].url, self.URL)

    def test_names_are_at_the_server(self):
        server = self.serve()
        here = ("127.0.0.1", server.port)
        with server.intercept():
            for name in ("example.com", "EXAMPLE.com.", b"example.com", "a.localhost", "a\0b"):
                found = socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)
                self.assertEqual([address for *_, address in found], [here])
            for port in (None, "http", "\u00b2"):
                found = socket.getaddrinfo("example.com", port, type=socket.SOCK_STREAM)
                self.assertEqual([address for *_, address in found], [here])
            found = socket.getaddrinfo("x", 81, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.assertEqual([address for *_, address in found], [("127.0.0.1", 81)])
            self.assertEqual(socket.gethostbyname("example.com"), "127.0.0.1")
            for find in (socket.gethostbyname_ex, socket.gethostbyaddr):
                self.assertEqual(find("example.com"), ("example.com", [], ["127.0.0.1"]))
            with self.assertRaises(socket.gaierror):
                socket.getaddrinfo("example.com", 80, socket.AF_INET6)
            with self.assertRaises(socket.gaierror):
                socket.getaddrinfo("example.com", 80, flags=socket.AI_NUMERICHOST)

    def test_addresses_that_a_name_could_be_taken_for(self):
        for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
            for host in ("fe80::1%eth0", "::1", "1", "127.1", "0x7f.1", b"::1", "", None, 1):
                found = mock.patch.object(socket, name)
                with self.subTest(name, host=host), found as find, self.serve().intercept():
                    arguments = (host, 80) if name == "getaddrinfo" else (host,)
                    self.assertIs(getattr(socket, name)(*arguments), find.return_value)
                    self.assertIs(find.call_args.args[0], host)

    def test_localhost_and_addresses_are_left_alone(self):
        names = ("localhost", "LOCALHOST", "127.0.0.1", "192.0.2.1", "127.1", b"192.0.2.1", None)

        def look_up(name):
            try:
                return socket.getaddrinfo(name, 8, type=socket.SOCK_STREAM)
            except OSError as error:  # not every system knows localhost
                return repr(error)

        outside = [look_up(name) for name in names]
        with self.serve().intercept():
            self.assertEqual([look_up(name) for name in names], outside)
            self.assertEqual(socket.gethostbyname("192.0.2.1"), "192.0.2.1")
        self.assertEqual(outside[3][0][4], ("192.0.2.1", 8))

    def test_whichever_port_a_client_takes_for_a_name(self):
        server, port = self.serve(self.FILES), self.unused_port()
        for words, find, address in (
            ("a name", lambda: None, ("example.com", 80)),
            ("a port", lambda: socket.getaddrinfo("example.com", port), ("127.0.0.1", port)),
            ("digits", lambda: socket.getaddrinfo("example.com", f"{port}"), ("127.0.0.1", port)),
        ):
            with self.subTest(words), server.intercept():
                find()
                for connect_by in ("connect", "connect_ex"):
                    with socket.socket() as connection:
                        self.assertFalse(getattr(connection, connect_by)(address))
                        connection.sendall(b"GET /feed.xml HTTP/1.0\r\nHost: example.com\r\n\r\n")
                        self.assertIn(b"<rss/>", read_all(connection))

    def test_the_ports_of_the_web_where_none_was_told(self):
        server = self.serve(self.FILES)
        for port in (80, 443):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    self.skipTest("there is a web server on this machine")
        for find in (
            lambda: socket.getaddrinfo("example.com", None),
            lambda: socket.getaddrinfo("example.com", "http"),
            lambda: socket.gethostbyname("example.com"),
            lambda: socket.gethostbyname_ex("example.com"),
        ):
            with server.intercept():
                find()
                for port in (80, 443):
                    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
                        connection.sendall(LAST.replace(b"Host: x", b"Host: example.com"))
                        self.assertIn(b"<rss/>", read_all(connection))

    def test_services_on_this_machine_are_left_alone(self):
        """Also at the port that a host was asked for."""
        with socket.create_server(("127.0.0.1", 0)) as service, self.serve().intercept():
            for name in ("localhost", "example.com"):
                unknown = (OSError,) if name == "localhost" else ()  # not every system knows it
                with contextlib.suppress(*unknown):
                    socket.getaddrinfo(name, service.getsockname()[1])
                with socket.create_connection(service.getsockname()) as connection:
                    self.assertEqual(connection.getpeername(), service.getsockname())

    def test_addresses_are_connected_to_as_they_are(self):
        server = self.serve()
        called, stub = self.called("connect")
        with stub, server.intercept(), socket.socket() as client:
            socket.gethostbyname("example.com")
            for address in (("192.0.2.1", 80), ("192.0.2.1", 443), ("localhost", 80), "x", ()):
                client.connect(address)
                self.assertEqual(called.pop(), address)

    def test_datagrams_and_listening_sockets(self):
        server = self.serve()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, server.intercept():
            receiver.bind(("example.com", 0))
            self.assertEqual(receiver.getsockname()[0], "127.0.0.1")
            receiver.settimeout(PATIENCE)
            has_sendmsg = hasattr(socket.socket, "sendmsg")  # Windows has none
            sends = [
                lambda sender: sender.sendto(b"2", ("example.com", 9)),
                lambda sender: sender.sendto(b"2", 0, ("example.com", 9)),
                lambda sender: sender.sendmsg([b"2"], [], 0, ("example.com", 9)),
            ]
            for send in sends if has_sendmsg else sends[:2]:
                # Nobody is there, which the next call on the same socket would say.
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    self.assertEqual(send(sender), 1)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"1", receiver.getsockname())
                self.assertEqual(receiver.recv(9), b"1")
                socket.getaddrinfo("example.com", receiver.getsockname()[1])
                sender.sendto(b"5", receiver.getsockname())
                self.assertEqual(receiver.recv(9), b"5")
                sender.connect(receiver.getsockname())
                if has_sendmsg:
                    self.assertEqual(sender.sendmsg((b"3", b"4")), 2)

    @unittest.skipUnless(socket.has_ipv6, "no IPv6 here")
    def test_more_than_host_and_port(self):
        server = self.serve()
        server.resolve("example.com", "2001:db8::1")
        called, stub = self.called("connect")
        with stub, server.intercept(), socket.socket(socket.AF_INET6) as client:
            client.connect(("example.com", 80, 1, 2))
        self.assertEqual(called[0][2:], (1, 2))

    def outlive_an_interception(self, server, connection, target):
        """Ask for a feed on the same connection before an interception and after it."""
        request = b"GET %s HTTP/1.1\r\nHost: example.com\r\n" % target
        connection.sendall(request + b"\r\n")
        self.assertIn(b"<rss/>", connection.recv(65536))
        with server.intercept():
            pass
        connection.sendall(request + b"Connection: close\r\n\r\n")
        self.assertIn(b"<rss/>", read_all(connection))

    def test_clients_of_a_proxy_stay_connected(self):
        server = self.serve(self.FILES)
        with connect(server) as connection:
            self.outlive_an_interception(server, connection, b"http://example.com/feed.xml")

    def test_the_end_of_an_inner_one_closes_no_connection(self):
        server = self.serve(self.FILES)
        with connect(server) as connection, server.intercept():
            self.outlive_an_interception(server, connection, b"/feed.xml")

    def test_clients_that_stay_connected_are_disconnected_at_the_end(self):
        server = self.serve(self.FILES)
        own, pooled = connect(server), connect(server)
        with own, pooled:
            with server.intercept():
                for connection, host in ((own, b"localhost"), (pooled, b"example.com")):
                    connection.sendall(b"GET /feed.xml HTTP/1.1\r\nHost: %s\r\n\r\n" % host)
                    self.assertIn(b" 200 OK", connection.recv(65536))
            while data := pooled.recv(65536):
                self.assertNotIn(b"HTTP/", data)
            own.sendall(LAST)
            self.assertIn(b"<own/>", read_all(own))

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "no sockets in files here")
    def test_connections_of_other_kinds_are_left_alone(self):
        path = str(self.make_directory() / "x")
        with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
            listening.bind(path)
            listening.listen()
            with self.serve().intercept():
                client.connect(path)

    def test_all_is_put_back(self):
        variables = {"http_proxy": "http://192.0.2.1:1", "NO_PROXY": ""}
        variables.update(dict.fromkeys(("all_proxy", "ALL_PROXY"), "socks5://x"))
        with mock.patch.dict(os.environ, variables):
            for name in ("https_proxy", "SSL_CERT_FILE", "WGETRC"):
                os.environ.pop(name, None)
            urllib.request.install_opener(urllib.request.build_opener())
            self.addCleanup(urllib.request.install_opener, None)
            before, server = self.places(), self.serve(self.FILES)
            with self.assertRaises(ZeroDivisionError), server.intercept():
                self.assertFalse({"all_proxy", "ALL_PROXY"} & set(os.environ))
                self.assertIn(b"<rss/>", self.fetch(self.URL))
                os.environ["http_proxy"] = "changed"
                os.environ.pop("SSL_CERT_FILE")
                raise ZeroDivisionError
            self.assertEqual(self.places(), before)
            self.assertFalse(self.intercepts(server))

    def test_the_environment_that_children_inherit(self):
        server = self.serve()
        with server.intercept():
            for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
                self.assertEqual(os.environ[name], server.base_url)
            for name in ("no_proxy", "NO_PROXY"):
                self.assertEqual(os.environ[name], "localhost,127.0.0.1,::1")
            for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
                self.assertEqual(os.environ[name], server.ca_file)
            self.assertEqual(os.environ["NODE_EXTRA_CA_CERTS"], server.ca_file)
            self.assertEqual(os.environ["NODE_USE_ENV_PROXY"], "1")
            wgetrc = pathlib.Path(os.environ["WGETRC"])
            text = f"ca_certificate = {server.ca_file}\n"
            self.assertEqual(wgetrc.read_bytes(), text.encode("utf-8", "surrogateescape"))
        server.stop()
        self.assertFalse(wgetrc.exists())

    def test_children(self):
        server = self.serve(self.FILES)
        code = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read())"
        with server.intercept():
            done = run("-c", code, "https://example.com/moved.xml")
            self.assertIn("<new/>", done.stdout, done.stderr)

    def test_the_innermost_counts(self):
        before = self.places()
        outer, inner = self.serve({"a.example/x": b"outer"}), self.serve({"a.example/x": b"inner"})
        with outer.intercept():
            self.assertEqual(self.fetch("https://a.example/x"), b"outer")
            within = self.places()
            with inner.intercept():
                for fetch in (self.fetch, self.fetch_directly):
                    self.assertEqual(fetch("http://a.example/x"), b"inner")
                with outer.intercept():
                    self.assertEqual(self.fetch_directly("https://a.example/x"), b"outer")
            self.assertEqual(self.places()[:3], within[:3])
            self.assertEqual(self.fetch("https://a.example/x"), b"outer")
            self.assertEqual(self.fetch_directly("https://a.example/x"), b"outer")
        self.assertEqual(self.places(), before)

    def test_they_may_end_in_any_order(self):
        before = self.places()
        for order in itertools.permutations(range(3)):
            servers = [self.serve({"a.example/x": b"%d" % number}) for number in range(3)]
            contexts = [server.intercept() for server in servers]
            for context in contexts:
                context.__enter__()
            begun = list(range(3))
            for number in order:
                contexts[number].__exit__(None, None, None)
                begun.remove(number)
                with self.subTest(order, begun=begun):
                    intercepting = [self.intercepts(server) for server in servers]
                    self.assertEqual(intercepting, [number in begun for number in range(3)])
                    if begun:
                        self.assertEqual(self.fetch("http://a.example/x"), b"%d" % begun[-1])
            self.assertEqual(self.places(), before)

    def test_a_server_that_is_down(self):
        server, before = self.serve(self.FILES), self.places()
        with server.intercept():
            with server.down():
                for fetch in (self.fetch, self.fetch_directly):
                    with self.assertRaises(OSError) as caught:
                        fetch(self.URL)
                    reason = getattr(caught.exception, "reason", caught.exception)
                    self.assertIsInstance(reason, ConnectionRefusedError)
            for fetch in (self.fetch, self.fetch_directly):
                self.assertIn(b"<rss/>", fetch(self.URL))
        self.assertEqual(self.places(), before)

    def test_the_end_while_the_server_is_down(self):
        server, before = self.serve(self.FILES), self.places()
        interception = server.intercept()
        interception.__enter__()
        with server.down():
            interception.__exit__(None, None, None)
            self.assertEqual(self.places(), before)
        self.assertEqual(self.get(server, "/feed.xml").content, b"<own/>")

    def test_it_needs_a_server_that_is_running(self):
        before, server = self.places(), FeedTestServer(self.make_directory())
        needs = r"intercept\(\) needs a server that is running: "
        for change, words in (
            (lambda: None, needs + r"call start\(\) first"),
            (server.start, None),
            (server.stop, needs + "it has stopped"),
        ):
            change()
            if not server.ready:
                with self.assertRaisesRegex(RuntimeError, words), server.intercept():
                    self.fail("it was entered")
        self.assertEqual(self.places(), before)

    def test_a_host_that_is_not_known(self):
        server = self.serve(self.FILES)
        server.respond("http://example.net/feed.xml", b"")
        directory = os.path.join(server.directory, "")
        with server.intercept():
            for url, answers in (
                ("https://unknown.example/a?b", f"the folder {directory}unknown.example or "),
                ("http://unknown.example/a", f"the folder {directory}unknown.example or "),
                ("https://example.net/a", f"the folder {directory}example.net or "),
                ("http://[2001:db8::1]/a", ""),
            ):
                with self.subTest(url), self.assertRaises(urllib.error.HTTPError) as caught:
                    self.fetch(url)
                words = (
                    f"GET {url}: no such host here; {answers}respond('{url}', ...) would respond"
                )
                with caught.exception as error:
                    self.assertEqual(error.code, 502)
                    self.assertEqual(error.read().decode(), legible(words + "\n"))
                self.assertEqual(server.errors[-1], words)
        self.assertEqual(len(server.errors), 4)

    def test_a_host_that_a_pattern_matches_is_known(self):
        server = self.serve()
        server.respond("https://*.example/feed.xml", 204)
        server.respond("http://only.example/*", 204, method="POST")
        with server.intercept():
            for url, status in (
                ("https://a.example/feed.xml", 204),
                ("https://a.example/other.xml", 404),
                ("http://only.example/", 404),
                ("http://a.example/feed.xml", 502),
                ("https://a.example.org/feed.xml", 502),
            ):
                with self.subTest(url):
                    self.assertEqual(ask(server, url).status, status)
            self.assertEqual(len(server.errors), 2)
            server.respond("*", lambda request: None)
            self.assertEqual(ask(server, "https://a.example.org/feed.xml").status, 404)
        self.assertEqual(len(server.errors), 2)

    def test_a_step_for_connect_alone_makes_no_host_known(self):
        server = self.serve()
        with server.intercept():
            for address in ("https://a.example", "https://*", "*"):
                server.clear()
                server.respond(address, 200, method="CONNECT")
                with self.subTest(address):
                    self.assertEqual(ask(server, "https://a.example/x").status, 502)
                    [error] = server.errors
                    self.assertIn("GET https://a.example/x: no such host here", error)

    def test_a_host_that_is_not_known_whatever_the_method(self):
        server = self.serve(self.FILES)
        with server.intercept():
            for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS", "BREW"):
                for host, status in ((b"unknown.example", 502), (b"example.com", None)):
                    request = b"%s / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
                    wire = exchange(server, request % (method.encode(), host))
                    with self.subTest(method, host=host):
                        self.assertEqual(Answer(wire, method).status == 502, status == 502)
        self.assertEqual(len(server.errors), 6)

    def test_a_server_on_all_addresses_is_itself_by_any_of_them(self):
        server = self.serve({"x": b"ours", "192.0.2.1/x": b"theirs"}, host="0.0.0.0")
        with server.intercept():
            for host, body in ((f"192.0.2.1:{server.port}", b"ours"), ("192.0.2.1", b"theirs")):
                request = f"GET /x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                self.assertEqual(Answer(exchange(server, request.encode())).body, body)

    def test_tunnels(self):
        server = self.serve(self.FILES)
        get = b"GET /feed.xml HTTP/1.1\r\nHost: other.example\r\nConnection: close\r\n\r\n"
        with server.intercept():
            for version, more in (("1.1", ""), ("1.0", ""), ("1.1", "Connection: close\r\n")):
                request = f"CONNECT example.com:80 HTTP/{version}\r\nHost: a\r\n{more}\r\n".encode()
                for parts in ((request + get,), (request, get)):
                    with self.subTest(parts):
                        head, _, rest = exchange(server, *parts).partition(b"\r\n\r\n")
                        self.assertTrue(head.startswith(b"HTTP/1.1 200 Connection established\r\n"))
                        self.assertNotRegex(head.lower(), b"content-|transfer-|: close")
                        self.assertEqual(Answer(rest).headers["X-URL"], "http://example.com")
            own = f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
            self.assertIn(b"<own/>", exchange(server, own, get))
        self.assertEqual([request.method for request in server.requests], ["GET"] * 7)
        self.assertEqual(server.requests[0].url, "http://example.com/feed.xml")
        self.assertEqual(server.errors, [])

    def test_a_tunnel_begins_with_any_2xx_and_with_nothing_else(self):
        class Handler(FeedTestRequestHandler):
            def do_CONNECT(self):
                if self.received.target == "example.com:80":
                    self.reply(Response(status=201))
                else:
                    super().do_CONNECT()
                    raise ValueError("no tunnel")

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve(self.FILES, server_class=Server)
        get = b"GET /feed.xml HTTP/1.1\r\nHost: other.example\r\nConnection: close\r\n\r\n"
        connect = b"CONNECT %s:80 HTTP/1.1\r\nHost: a\r\n\r\n"
        with server.intercept():
            answer = Answer(exchange(server, connect % b"example.com" + get), "HEAD")
            self.assertEqual((answer.status, Answer(answer.rest).status), (201, 200))
            answer = Answer(exchange(server, connect % b"example.net" + get))
            self.assertEqual((answer.status, Answer(answer.rest).status), (500, 502))
        request, refused, _ = server.requests
        self.assertEqual(request.url, "http://example.com/feed.xml")
        self.assertEqual((refused.method, refused.response.status), ("CONNECT", 500))

    def test_tls_in_tls(self):
        """As a client does that speaks TLS to the proxy as well."""
        server = self.serve(self.FILES)
        context = server.ssl_context()
        connection = context.wrap_socket(
            connect(server), server_hostname="localhost", suppress_ragged_eofs=False
        )
        with server.intercept(), connection as outer:
            outer.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nHost: a\r\n\r\n")
            self.assertIn(b"200 Connection established", outer.recv(65536))
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            inner = context.wrap_bio(incoming, outgoing, server_hostname="example.com")

            def done(function, *arguments):
                while True:
                    try:
                        return function(*arguments)
                    except ssl.SSLWantReadError:
                        outer.sendall(outgoing.read())
                        incoming.write(outer.recv(65536))

            done(inner.do_handshake)
            inner.write(LAST)
            answer = b""
            while data := done(inner.read, 65536):
                answer += data
            self.assertEqual(outer.recv(9), b"")
        self.assertIn(b"<rss/>", answer)
        self.assertEqual(server.requests[0].url, self.URL)

    def test_where_a_tunnel_may_not_lead(self):
        server = self.serve(self.FILES)
        with server.intercept():
            for target in (
                *("example.com", "example.com:", "example.com:0", "example.com:65536", ":443"),
                *("example.com:https", "../:443", "a/b:443", "me@example.com:443", "a:1:2", "*"),
                *("[::1]", "[::1:443", "::1:443", "/feed.xml", "https://example.com/feed.xml"),
                *("b\u00fccher.example:443", "a\0b:443"),
            ):
                request = f"CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
                server.clear()
                with self.subTest(target):
                    self.assertEqual(Answer(exchange(server, request)).status, 400)
                    self.assertEqual([each.response.status for each in server.requests], [400])
                    self.assertEqual(server.errors, [])

    def test_odd_hosts_in_tunnels(self):
        server = self.serve({"secret.xml": b"", **self.FILES})
        get = b"GET /secret.xml HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with server.intercept():
            for host in (b"..", b".", b"a%2f..", b"%2e%2e", b"x" * 300, b"[::1]", b"a&b", b"..."):
                request = b"CONNECT %s:22 HTTP/1.1\r\nHost: x\r\n\r\n" % host
                with self.subTest(host):
                    wire = exchange(server, request, get)
                    answer = Answer(wire.partition(b"\r\n\r\n")[2])
                    self.assertEqual(answer.status, 502)
                    self.assertIn(b"no such host here", answer.body)

    def test_the_host_field(self):
        server = self.serve({"a.example/x": b"theirs", "x": b"ours"})
        for host, body in (
            ("a.example", b"theirs"),
            ("A.EXAMPLE:80", b"theirs"),
            ("a.example:8080", b"theirs"),
            (f"127.0.0.1:{server.port}", b"ours"),
            ("127.0.0.1", b"ours"),
            ("localhost", b"ours"),
            ("[::1]:1", b"ours"),
            ("", b"ours"),
        ):
            request = f"GET /x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            with self.subTest(host):
                self.assertEqual(Answer(exchange(server, request)).body, b"ours")
                with server.intercept():
                    self.assertEqual(Answer(exchange(server, request)).body, body)
        with server.intercept():
            for host in (b"a.example:\xb343", b"a.example:99999", b"a b", b"a, b"):
                wire = exchange(server, b"GET /x HTTP/1.1\r\nHost: %s\r\n\r\n" % host)
                self.assertEqual(Answer(wire).status, 400)
                self.assertEqual(server.requests[-1].url, f"{server.base_url}/x")
        self.assertEqual(server.errors, [])
        old = exchange(server, b"GET /x HTTP/1.0\r\n\r\n")
        self.assertTrue(old.endswith(b"ours"))

    def test_the_target_counts_more_than_the_tunnel_and_the_tunnel_more_than_the_host(self):
        server = self.serve({f"{name}.example/x": name.encode() for name in "abc"})
        tunnel = b"CONNECT b.example:80 HTTP/1.1\r\nHost: c.example\r\n\r\n"
        rest = b" HTTP/1.1\r\nHost: c.example\r\nConnection: close\r\n\r\n"
        with server.intercept():
            for sent, body in (
                (tunnel + b"GET http://a.example/x" + rest, b"a"),
                (tunnel + b"GET /x" + rest, b"b"),
                (b"GET /x" + rest, b"c"),
            ):
                self.assertTrue(exchange(server, sent).endswith(b"\r\n\r\n" + body))

    def test_nothing_leaves_the_machine(self):
        """No name is looked up, and nothing is connected to but the loopback interface."""
        folder = self.make_directory(self.FILES)
        code = (
            "import ipaddress, socket, sys, urllib.request, http.client, asyncio, feedtestserver\n"
            "import warnings; warnings.simplefilter('error')\n"
            "def hook(event, arguments):\n"
            "    if event in ('socket.connect', 'socket.sendto', 'socket.bind'):\n"
            "        events.append((event, arguments[1][0]))\n"
            "    elif event in ('socket.getaddrinfo', 'socket.gethostbyname'):\n"
            "        events.append((event, arguments[0]))\n"
            "    elif event in ('socket.gethostbyaddr', 'socket.getnameinfo'):\n"
            "        events.append((event, 'a name'))\n"
            "events = []\n"
            "sys.addaudithook(hook)\n"
            "def fetch_directly(kind):\n"
            "    connection = kind('example.com')\n"
            "    connection.request('GET', '/feed.xml')\n"
            "    assert b'<rss/>' in connection.getresponse().read()\n"
            "    connection.close()\n"
            "async def stream():\n"
            "    reader, writer = await asyncio.open_connection('example.com', 80)\n"
            "    writer.close()\n"
            "with feedtestserver.FeedTestServer(sys.argv[1]) as server, server.intercept():\n"
            "    for url in ('http://example.com/feed.xml', 'https://example.com/moved.xml'):\n"
            "        urllib.request.urlopen(url).close()\n"
            "    try: urllib.request.urlopen('https://unknown.example/')\n"
            "    except urllib.request.HTTPError as error: error.close()\n"
            "    server.clear()\n"
            "    fetch_directly(http.client.HTTPConnection)\n"
            "    fetch_directly(http.client.HTTPSConnection)\n"
            "    asyncio.run(stream())\n"
            "    socket.gethostbyname('example.com')\n"
            "    socket.create_connection(('example.net', 80)).close()\n"
            "    connection = socket.socket()\n"
            "    connection.connect(('example.net', 80))\n"
            "    connection.close()\n"
            "    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:\n"
            "        datagrams.bind(('example.net', 0))\n"
            "        datagrams.sendto(b'x', ('example.net', 9))\n"
            "assert len(events) > 10, events\n"
            "for event, host in events:\n"
            "    assert ipaddress.ip_address(host).is_loopback, (event, host)\n"
        )
        done = run_script(code, folder)
        self.assertEqual((done.returncode, done.stderr), (0, ""))


class WithoutProxyTest(AnyHostTestCase):
    """Inside of intercept(proxy=False)."""

    def test_clients_connect_as_in_production(self):
        server = self.serve(self.FILES)
        with server.intercept(proxy=False) as entered:
            self.assertIs(entered, server)
            for fetch in (self.fetch, self.fetch_directly):
                for scheme in ("http", "https"):
                    with self.subTest(fetch.__name__, scheme=scheme):
                        self.assertIn(b"<rss/>", fetch(f"{scheme}://example.com/feed.xml"))
                        request = server.requests[-1]
                        self.assertEqual(request.url, f"{scheme}://example.com/feed.xml")
                        self.assertEqual((request.target, request.tunnel), ("/feed.xml", None))
                        self.assertEqual(request.headers["Host"], "example.com")
            self.assertIn(b"<rss/>", self.fetch("http://example.com:8080/feed.xml"))
            self.assertEqual(server.requests[-1].headers["Host"], "example.com:8080")
        self.assertEqual(len({request.connection for request in server.requests}), 5)
        self.assertEqual(server.errors, [])

    def test_the_proxy_is_the_default(self):
        parameter = inspect.signature(FeedTestServer.intercept).parameters["proxy"]
        self.assertIs(parameter.default, True)
        server = self.serve(self.FILES)
        with server.intercept(proxy=True):
            self.assertIn(b"<rss/>", self.fetch(self.URL))
            self.assertEqual(os.environ["https_proxy"], server.base_url)
        self.assertEqual(server.requests[0].tunnel.method, "CONNECT")

    def test_the_environment_stays_as_it_is(self):
        variables = {"http_proxy": "http://192.0.2.1:1", "SSL_CERT_FILE": "none", "all_proxy": "x"}
        with mock.patch.dict(os.environ, variables):
            before = dict(os.environ)
            with self.serve().intercept(proxy=False):
                self.assertEqual(dict(os.environ), before)
                os.environ["SSL_CERT_FILE"] = "changed"
            self.assertEqual(dict(os.environ), {**before, "SSL_CERT_FILE": "changed"})

    def test_each_host_has_connections_of_its_own(self):
        server = self.serve()
        server.respond("*", b"x")
        hosts = ("a.example", "b.example", "a.example", "b.example")
        with server.intercept(proxy=False), contextlib.ExitStack() as stack:
            pool = {}
            for host in hosts:
                if host not in pool:
                    pool[host] = http.client.HTTPConnection(host, timeout=PATIENCE)
                    stack.callback(pool[host].close)
                pool[host].request("GET", "/")
                self.assertEqual(pool[host].getresponse().read(), b"x")
        self.assertEqual([request.host for request in server.requests], list(hosts))
        first, second, third, fourth = (request.connection for request in server.requests)
        self.assertEqual((third, fourth), (first, second))
        self.assertNotEqual(first, second)

    def test_asyncio(self):
        server = self.serve(self.FILES)

        async def fetch(port, context):
            reader, writer = await asyncio.open_connection("example.com", port, ssl=context)
            writer.write(b"GET /feed.xml HTTP/1.0\r\nHost: example.com\r\n\r\n")
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            return answer

        with server.intercept(proxy=False):
            self.assertIn(b"<rss/>", asyncio.run(fetch(443, ssl.create_default_context())))
            self.assertIn(b"<rss/>", asyncio.run(fetch(80, None)))
        urls = [request.url for request in server.requests]
        self.assertEqual(urls, [self.URL, "http://example.com/feed.xml"])

    def test_tls_that_begins_before_the_connection(self):
        server, context = self.serve(self.FILES), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        with server.intercept(proxy=False):
            for name in (None, "example.com"):
                with (
                    self.subTest(name),
                    context.wrap_socket(socket.socket(), server_hostname=name) as connection,
                ):
                    connection.connect(("example.com", 443))
                    connection.sendall(LAST.replace(b"Host: x", b"Host: example.com"))
                    self.assertIn(b" 200 OK", read_all(connection))
            context.verify_mode = ssl.CERT_REQUIRED
            server.certificate = "self-signed"
            with (
                self.assertRaises(ssl.SSLCertVerificationError),
                context.wrap_socket(socket.socket()) as connection,
            ):
                connection.connect(("example.com", 443))

    def test_a_session_is_resumed_again_and_again(self):
        server = self.serve(self.FILES)
        for version in TLS_VERSIONS:
            context, session, resumed = ssl.create_default_context(), None, []
            context.maximum_version = version
            with self.subTest(version), server.intercept(proxy=False):
                for _ in range(4):
                    plain = socket.create_connection(("example.com", 443), PATIENCE)
                    with context.wrap_socket(
                        plain, server_hostname="example.com", session=session
                    ) as connection:
                        connection.sendall(LAST.replace(b"Host: x", b"Host: example.com"))
                        self.assertIn(b" 200 OK", read_all(connection))
                        session = connection.session
                        resumed.append(connection.session_reused)
            self.assertEqual(resumed, [False, True, True, True])

    def test_wrong_certificates_are_refused(self):
        server, context = self.serve(self.FILES), ssl.create_default_context()
        with server.intercept(proxy=False):
            for kind in ("expired", "wrong-host", "self-signed"):
                server.certificate = kind
                with self.subTest(kind), self.assertRaises(ssl.SSLCertVerificationError):
                    self.fetch_directly(self.URL, context)
            with self.assertRaises(urllib.error.URLError) as caught:
                self.fetch(self.URL, context=context)
            self.assertIsInstance(caught.exception.reason, ssl.SSLCertVerificationError)
        self.assertEqual((server.requests, server.errors), ([], []))

    def test_a_server_that_is_down_refuses_connections(self):
        server, url = self.serve(self.FILES), "http://example.com/feed.xml"
        with server.intercept(proxy=False):
            with server.down():
                with self.assertRaises(ConnectionRefusedError):
                    self.fetch_directly(url)
                with self.assertRaises(urllib.error.URLError) as caught:
                    self.fetch(url)
                self.assertIsInstance(caught.exception.reason, ConnectionRefusedError)
            self.assertIn(b"<rss/>", self.fetch(url))
            server.stop()
            with self.assertRaises(ConnectionRefusedError):
                self.fetch_directly(url)

    def test_a_host_that_is_not_known(self):
        server = self.serve(self.FILES)
        with server.intercept(proxy=False):
            with self.assertRaises(urllib.error.HTTPError) as caught:
                self.fetch("http://unknown.example/a")
            caught.exception.close()
            self.assertEqual(caught.exception.code, 502)
        [error] = server.errors
        self.assertIn("GET http://unknown.example/a: no such host here", error)

    def test_all_is_put_back(self):
        before, server = self.places(), self.serve(self.FILES)
        for inside in (lambda: None, lambda: 1 / 0):
            with contextlib.suppress(ZeroDivisionError), server.intercept(proxy=False):
                self.assertNotEqual(self.places(), before)
                self.assertIn(b"<rss/>", self.fetch(self.URL))
                inside()
            self.assertEqual(self.places(), before)
            self.assertFalse(self.intercepts(server))

    def test_clients_that_stay_connected_are_disconnected_at_the_end(self):
        server = self.serve(self.FILES)
        with server.intercept(proxy=False):
            pooled = socket.create_connection(("example.com", 80), PATIENCE)
            pooled.sendall(b"GET /feed.xml HTTP/1.1\r\nHost: example.com\r\n\r\n")
            self.assertIn(b" 200 OK", pooled.recv(65536))
        with pooled:
            while data := pooled.recv(65536):
                self.assertNotIn(b"HTTP/", data)

    def places(self):
        """All but urllib's opener, which urlopen() itself may make."""
        return super().places()[:3]

    def test_inside_of_another_the_environment_leads_to_the_outer_one(self):
        outer, inner = (self.serve({"a.example/x": name}) for name in (b"outer", b"inner"))
        before = self.places()
        with outer.intercept():
            within = self.places()
            with inner.intercept(proxy=False):
                self.assertEqual(dict(os.environ), within[0])
                for scheme in ("http", "https"):
                    self.assertEqual(self.fetch(f"{scheme}://a.example/x"), b"outer")
                    self.assertEqual(self.fetch_directly(f"{scheme}://a.example/x"), b"inner")
            self.assertEqual(self.fetch_directly("http://a.example/x"), b"outer")
            self.assertEqual(self.places(), within)
        self.assertEqual(self.places(), before)

    def test_another_inside_leads_there_with_both(self):
        outer, inner = (self.serve({"a.example/x": name}) for name in (b"outer", b"inner"))
        before = self.places()
        with outer.intercept(proxy=False):
            within = self.places()
            with inner.intercept():
                for fetch in (self.fetch, self.fetch_directly):
                    self.assertEqual(fetch("http://a.example/x"), b"inner")
            self.assertEqual(self.places(), within)
            for fetch in (self.fetch, self.fetch_directly):
                self.assertEqual(fetch("http://a.example/x"), b"outer")
        self.assertEqual(self.places(), before)

    def test_one_server_both_ways(self):
        server, before = self.serve(self.FILES), self.places()
        for first, second in ((True, False), (False, True), (False, False)):
            with server.intercept(proxy=first):
                with server.intercept(proxy=second):
                    self.assertIn(b"<rss/>", self.fetch_directly("http://example.com/feed.xml"))
                    self.assertEqual(
                        os.environ.get("http_proxy"), server.base_url if first or second else None
                    )
                self.assertEqual(os.environ.get("http_proxy"), server.base_url if first else None)
                self.assertIn(b"<rss/>", self.fetch_directly("http://example.com/feed.xml"))
            self.assertEqual(self.places(), before)

    #: Whether each of those that are begun one inside of the other goes by the environment as well.
    NESTED = (
        *itertools.product((True, False), repeat=2),
        (True, False, True),
        (False, True, False),
    )

    def test_they_may_end_in_any_order(self):
        before = self.places()
        servers = [self.serve({"a.example/x": b"%d" % number}) for number in range(3)]
        for proxies in self.NESTED:
            for order in itertools.permutations(range(len(proxies))):
                contexts = [each.intercept(proxy=proxy) for each, proxy in zip(servers, proxies)]
                for context in contexts:
                    context.__enter__()
                begun = list(range(len(proxies)))
                for number in order:
                    contexts[number].__exit__(None, None, None)
                    begun.remove(number)
                    with self.subTest(proxies, order=order, begun=begun):
                        proxy = max((each for each in begun if proxies[each]), default=None)
                        url = None if proxy is None else servers[proxy].base_url
                        self.assertEqual(os.environ.get("http_proxy"), url)
                        if begun:
                            innermost = begun[-1]
                            found = self.fetch_directly("http://a.example/x")
                            self.assertEqual(found, b"%d" % innermost)
                            found = self.fetch("http://a.example/x")
                            self.assertEqual(found, b"%d" % (innermost if url is None else proxy))
                self.assertEqual(self.places(), before)

    def test_it_needs_a_server_that_is_running(self):
        before, server = self.places(), FeedTestServer(self.make_directory())
        words = r"intercept\(\) needs a server that is running: call start\(\) first"
        with self.assertRaisesRegex(RuntimeError, words), server.intercept(proxy=False):
            self.fail("it was entered")
        self.assertEqual(self.places(), before)


PUBLIC, OTHER = "93.184.216.34", "93.184.216.35"
STREAM = socket.SOCK_STREAM


def connect_at_once(address, family=socket.AF_INET):
    """A connection by a socket that does not block, and the number of the error, or 0."""
    connection = socket.socket(family)
    connection.setblocking(False)
    error = connection.connect_ex(address)
    if error in (errno.EINPROGRESS, errno.EWOULDBLOCK):
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_WRITE)
            selector.select(PATIENCE)
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    connection.settimeout(PATIENCE)
    return connection, error


class ResolveTest(AnyHostTestCase):
    """What look-ups find, by server.resolve()."""

    #: Those that may be a service's on this machine are asked for at a port that nobody has.
    ADDRESSES = (PUBLIC, "10.0.0.1", "127.0.0.1", "127.0.0.2", "169.254.169.254", "0.0.0.0")
    ADDRESSES_6 = ("2001:db8::1", "::1", "::ffff:10.0.0.1", "fe80::1", "2001:DB8:0::2")
    #: Ways to look up a host, and what each finds first.
    LOOK_UPS = {
        "getaddrinfo": lambda host: socket.getaddrinfo(host, 80, type=STREAM)[0][4][0],
        "gethostbyname": lambda host: f"{socket.gethostbyname(host)}",
        "gethostbyname_ex": lambda host: socket.gethostbyname_ex(host)[2][0],
        "gethostbyaddr": lambda host: socket.gethostbyaddr(host)[2][0],
        "asyncio": lambda host: asyncio.run(ResolveTest.look_up(host))[0][4][0],
        "create_connection": lambda host: ResolveTest.peer(
            socket.create_connection((host, 80), PATIENCE)
        ),
        "connect": lambda host: ResolveTest.peer_of_a_name("connect", host),
        "connect_ex": lambda host: ResolveTest.peer_of_a_name("connect_ex", host),
        "urlopen": lambda host: urllib.request.urlopen(f"http://{host}/").read().decode(),
    }

    @staticmethod
    async def look_up(host, **options):
        return await asyncio.get_running_loop().getaddrinfo(host, 80, type=STREAM, **options)

    @staticmethod
    def peer(connection):
        with connection:
            return connection.getpeername()[0]

    @staticmethod
    def peer_of_a_name(method, host):
        with socket.socket() as connection:
            getattr(connection, method)((host, 80))
            return connection.getpeername()[0]

    def serve_all(self, **options):
        """A server inside of intercept(), which responds to whatever is asked by its address."""
        server = self.serve()
        server.respond("*", lambda request: request.address.encode())
        context = server.intercept(**{"proxy": False, **options})
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return server

    def found(self, host, port=80, **options):
        return [each[4][0] for each in socket.getaddrinfo(host, port, type=STREAM, **options)]

    def ask(self, server, connection):
        """One request on a connection; the address that it went to as the server sees it."""
        connection.sendall(LAST.replace(b"Host: x", b"Host: a.example"))
        self.assertIn(b" 200 OK", read_all(connection))
        return server.requests[-1].address

    def need_ipv6(self):
        try:
            socket.socket(socket.AF_INET6).close()
        except OSError as error:
            self.skipTest(f"no IPv6 here: {error}")

    # What is found

    def test_each_look_up_takes_the_next_answer_and_the_last_stays(self):
        server = self.serve_all()
        answers = [f"203.0.113.{number}" for number in range(1, len(self.LOOK_UPS) + 1)]
        server.resolve("a.example", *answers)
        found = {name: find("a.example") for name, find in self.LOOK_UPS.items()}
        self.assertEqual(found, dict(zip(self.LOOK_UPS, answers)))
        for name, find in self.LOOK_UPS.items():
            with self.subTest(name):
                self.assertEqual(find("a.example"), answers[-1])
        self.assertEqual(server.errors + server.unused, [])

    def test_answers_given_before_inside_and_in_another_thread(self):
        server = FeedTestServer("")
        server.resolve("a.example", PUBLIC)
        server.resolve("b.example", OTHER)
        server.start()
        self.addCleanup(server.stop)
        with server.intercept(proxy=False):
            self.assertEqual(self.found("a.example"), [PUBLIC])
            run_at_once([functools.partial(server.resolve, "a.example", OTHER)])
            self.assertEqual(self.found("a.example"), [OTHER])
            self.assertEqual(self.found("b.example"), [OTHER])
        with server.intercept(proxy=False):
            self.assertEqual(self.found("a.example"), [OTHER])

    def test_results_of_getaddrinfo_are_as_usual(self):
        """As those for the address itself."""

        def look_up(host, *arguments, **options):
            try:
                return socket.getaddrinfo(host, *arguments, **options)
            except OSError as error:
                return type(error)

        calls = [
            ((80,), {}),
            ((443, 0, STREAM), {}),
            (("443", socket.AF_INET, 0, socket.IPPROTO_TCP), {}),
            (("https",), {"type": STREAM}),
            ((b"http",), {"type": STREAM}),
            ((None, socket.AF_UNSPEC, socket.SOCK_DGRAM), {}),
            ((0,), {"proto": socket.IPPROTO_UDP}),
            (("no-such-service",), {}),
            ((80, socket.AF_INET6), {"type": STREAM}),
            ((80, socket.AF_INET), {"type": STREAM}),
        ]
        addresses = (PUBLIC, "2001:db8::1", "::1")
        usual = {address: [look_up(address, *a, **o) for a, o in calls] for address in addresses}
        server = self.serve_all()
        for address in addresses:
            server.resolve("a.example", address)
            with self.subTest(address):
                found = [look_up("a.example", *a, **o) for a, o in calls]
                self.assertEqual(found, usual[address])

    def test_both_families_in_the_order_given(self):
        server = self.serve_all()
        for addresses in (["2001:db8::1", PUBLIC, OTHER], [PUBLIC, "2001:db8::1", OTHER]):
            server.resolve("a.example", addresses)
            with self.subTest(addresses):
                self.assertEqual(self.found("a.example"), addresses)
                self.assertEqual(self.found("a.example", family=socket.AF_INET), [PUBLIC, OTHER])
                family = self.found("a.example", family=socket.AF_INET6)
                self.assertEqual(family, ["2001:db8::1"])
                self.assertEqual(socket.gethostbyname("a.example"), PUBLIC)
                names = ("a.example", [], [PUBLIC, OTHER])
                self.assertEqual(socket.gethostbyname_ex("a.example"), names)

    def test_what_the_machine_has_does_not_matter(self):
        """AI_ADDRCONFIG leaves out the families that this machine has no address of."""
        server = self.serve_all()
        server.resolve("a.example", ["2001:db8::1", PUBLIC])
        found = self.found("a.example", flags=socket.AI_ADDRCONFIG)
        self.assertEqual(found, ["2001:db8::1", PUBLIC])

    def test_a_family_of_which_there_is_no_address(self):
        server = self.serve_all()
        server.resolve("six.example", "2001:db8::1")
        server.resolve("four.example", [PUBLIC])
        for find in (
            lambda: socket.getaddrinfo("six.example", 80, socket.AF_INET),
            lambda: socket.gethostbyname("six.example"),
            lambda: socket.gethostbyname_ex("six.example"),
            lambda: socket.getaddrinfo("four.example", 80, socket.AF_INET6),
        ):
            with self.assertRaises(socket.gaierror):
                self.fail(f"{find()}")

    def test_a_look_up_of_digits_alone_is_none(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC, OTHER)
        with self.assertRaises(socket.gaierror):
            socket.getaddrinfo("a.example", 80, flags=socket.AI_NUMERICHOST)
        self.assertEqual(self.found("192.0.2.1"), ["192.0.2.1"])
        self.assertEqual(self.found("a.example"), [PUBLIC])

    def test_what_is_no_name_is_not_looked_up(self):
        def look_up(host, flags=0):
            try:
                return socket.getaddrinfo(host, 80, type=STREAM, flags=flags)
            except OSError as error:  # not every system knows localhost
                return repr(error)

        hosts = [("localhost",), ("192.0.2.1",), ("::1",), ("",), (None,)]
        hosts.append((None, socket.AI_PASSIVE))
        outside = [look_up(*each) for each in hosts]
        server = self.serve_all()
        server.resolve("*", "unknown")
        self.assertEqual([look_up(*each) for each in hosts], outside)
        self.assertEqual(self.get(server, "/x").content, b"127.0.0.1")
        with self.assertRaises(socket.gaierror):
            self.found("a.example")

    def test_all_spellings_of_a_host_are_one_host(self):
        server = self.serve_all()
        spellings = ("a.example", "A.Example", "a.example.", b"a.example", b"A.example.")
        for given in ("a.example", "A.EXAMPLE", "a.example.", "*.example", "*"):
            answers = [f"203.0.113.{number}" for number in range(len(spellings))]
            server.clear()
            server.resolve(given, *answers)
            with self.subTest(given):
                self.assertEqual([self.found(host) for host in spellings], [[a] for a in answers])
        for given in ("b\u00fccher.example", "xn--bcher-kva.example", "B\u00dcCHER.example"):
            server.clear()
            server.resolve(given, "203.0.113.1", "203.0.113.2", "203.0.113.3")
            for number, host in enumerate(
                ("b\u00fccher.example", "xn--bcher-kva.example", "B\u00fccher.example."), 1
            ):
                with self.subTest(given, host=host):
                    self.assertEqual(self.found(host), [f"203.0.113.{number}"])

    def test_what_an_address_is_called_is_not_looked_up_in_the_network(self):
        server = self.serve()
        server.resolve("a.example", OTHER)
        for ask, name, *arguments in (
            ("gethostbyaddr", "gethostbyaddr", PUBLIC),
            ("gethostbyaddr", "gethostbyaddr", OTHER),
            ("gethostbyaddr", "gethostbyaddr", "2001:db8::1"),
            ("gethostbyaddr", "gethostbyaddr", "127.0.0.77"),
            ("getfqdn", "gethostbyaddr", PUBLIC),
            ("getfqdn", "gethostbyaddr", OTHER),
            ("getnameinfo", "getnameinfo", (PUBLIC, 80), 0),
            ("getnameinfo", "getnameinfo", (OTHER, 80), 0),
            ("getnameinfo", "getnameinfo", ("127.0.0.77", 80), 0),
            ("getnameinfo", "getnameinfo", ("2001:db8::1", 80, 0, 0), 0),
        ):
            stub = mock.patch.object(socket, name)
            with contextlib.suppress(OSError), stub as find, server.intercept(proxy=False):
                getattr(socket, ask)(*arguments)
            with self.subTest(ask, arguments=arguments):
                for call in find.call_args_list:
                    self.assertEqual(name, "getnameinfo")
                    self.assertTrue(call.args[1] & socket.NI_NUMERICHOST)

    def test_no_such_name(self):
        server = self.serve_all()
        server.resolve("none.example", "unknown")
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            for find in (
                *(functools.partial(find, "none.example") for find in self.LOOK_UPS.values()),
                lambda: socket.getaddrinfo("none.example", None),
                lambda: socket.getaddrinfo("NONE.example.", 80, socket.AF_INET6),
                lambda: tcp.connect(("none.example", 80)),
                lambda: tcp.connect_ex(("none.example", 80)),
                lambda: udp.sendto(b"x", ("none.example", 9)),
            ):
                with self.assertRaises(OSError) as caught:
                    self.fail(f"{find()}")
                reason = getattr(caught.exception, "reason", caught.exception)
                self.assertIsInstance(reason, socket.gaierror)
                self.assertEqual(reason.errno, socket.EAI_NONAME)
                self.assertTrue(reason.strerror)
        self.assertEqual((server.requests, server.errors), ([], []))

    def test_answers_of_every_kind_one_after_the_other(self):
        server = self.serve_all()
        answers = ("unknown", PUBLIC, "refused", ["2001:db8::1", OTHER], "unknown", OTHER)
        server.resolve("a.example", *answers)

        def fetch():
            try:
                return self.fetch_directly("http://a.example/").decode()
            except OSError as error:
                return type(error)

        self.assertEqual(fetch(), socket.gaierror)
        self.assertEqual(fetch(), PUBLIC)
        self.assertEqual(fetch(), ConnectionRefusedError)
        self.assertEqual(self.found("a.example"), ["2001:db8::1", OTHER])
        self.assertEqual([fetch() for _ in range(3)], [socket.gaierror, OTHER, OTHER])

    def test_patterns(self):
        server = self.serve_all()
        server.resolve("*", "203.0.113.1", "203.0.113.2")
        server.resolve("*.example.com", "203.0.113.3", "203.0.113.4", "203.0.113.5")
        server.resolve("b.example.com", "203.0.113.6")
        server.resolve("c*.example.com", "203.0.113.7")
        for host, *last in (
            ("a.example.com", 3, 4, 5, 5),
            ("d.example.com", 3, 4),
            ("d.example.com", 5),
            ("a.d.example.com", 3, 4),
            ("example.com", 1, 2, 2),
            ("notexample.com", 1),
            ("a.example.com.org", 1),
            ("b.example.com", 6),
            ("B.EXAMPLE.com.", 6),
            ("a.b.example.com", 3),
            ("c.example.com", 7),
            ("cc.example.com", 7),
            ("x", 1, 2),
        ):
            with self.subTest(host):
                found = [self.found(host) for _ in last]
                self.assertEqual(found, [[f"203.0.113.{number}"] for number in last])

    def test_of_two_patterns_the_one_given_last(self):
        server = self.serve_all()
        server.resolve("b.example", OTHER)
        for host, answer in (("a*", "192.0.2.1"), ("*e", "192.0.2.2"), ("a*", "192.0.2.3")):
            server.resolve(host, answer)
            self.assertEqual(self.found("a.example"), [answer])
        self.assertEqual(self.found("c.example"), ["192.0.2.2"])
        server.resolve("*", "192.0.2.4")
        self.assertEqual(self.found("a.example"), ["192.0.2.4"])
        self.assertEqual(self.found("b.example"), [OTHER])

    def test_what_is_given_again_begins_anew(self):
        server = self.serve_all()
        for host in ("a.example", "*.example"):
            server.resolve(host, PUBLIC, OTHER)
            self.assertEqual([*self.found("a.example"), *self.found("a.example")], [PUBLIC, OTHER])
            server.resolve(host, PUBLIC, "unknown")
            with self.subTest(host):
                self.assertEqual(self.found("a.example"), [PUBLIC])
                with self.assertRaises(socket.gaierror):
                    self.found("a.example")
            server.clear()

    def test_clear_forgets_answers(self):
        server = self.serve_all()
        server.resolve("a.example", "unknown")
        server.resolve("*", PUBLIC, OTHER)
        self.assertEqual(self.found("b.example"), [PUBLIC])
        server.clear()
        for host in ("a.example", "b.example"):
            self.assertEqual(socket.gethostbyname(host), "127.0.0.1")
        server.respond("*", b"x")
        self.assertEqual(self.fetch_directly("http://a.example/"), b"x")
        server.resolve("*", PUBLIC)
        self.assertEqual(self.found("b.example"), [PUBLIC])

    def test_hosts_without_answers_are_at_the_server(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC)
        self.assertEqual(self.found("a.example"), [PUBLIC])
        found = socket.getaddrinfo("b.example", 443, type=STREAM)
        self.assertEqual([each[4] for each in found], [("127.0.0.1", server.port)])
        self.assertEqual(self.fetch_directly("http://b.example/"), b"127.0.0.1")

    def test_answers_are_for_inside_alone(self):
        server, before = self.serve(), self.places()
        server.resolve("a.example", PUBLIC)
        self.assertEqual(self.places(), before)
        with server.intercept(proxy=False):
            self.assertEqual(self.found("a.example"), [PUBLIC])
        self.assertEqual(self.places(), before)

    def test_each_answer_is_found_once_by_however_many_threads(self):
        server = self.serve_all()
        answers = [f"203.0.113.{number}" for number in range(100)]
        for host in ("a.example", "*.example"):
            server.clear()
            server.resolve(host, *answers)
            found = []

            def look_up(found=found):
                for _ in range(10):
                    found.append(socket.gethostbyname("a.example"))

            run_at_once([look_up] * 10)
            self.assertEqual(sorted(found), sorted(answers))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_child_forked_during_a_look_up_may_look_names_up(self):
        script = """
        import os, signal, socket, threading
        import feedtestserver

        class Host(str):
            def lower(self):
                return self

            def removesuffix(self, suffix):
                return self

            def __hash__(self):  # it is taken during the look-up
                begun.set()
                forked.wait(20)
                return hash(str(self))

        begun, forked = threading.Event(), threading.Event()
        with feedtestserver.FeedTestServer("") as server, server.intercept(proxy=False):
            server.resolve("a.example", "192.0.2.1")
            look_up = threading.Thread(target=socket.gethostbyname, args=[Host("a.example")])
            look_up.start()
            print(begun.wait(20))
            child = os.fork()
            if not child:
                signal.alarm(20)
                os._exit(socket.gethostbyname("a.example") != "192.0.2.1")
            print(os.waitpid(child, 0)[1])
            forked.set()
            look_up.join()
        """
        done = run_script(script)
        self.assertEqual((done.stdout, done.stderr), ("True\n0\n", ""))

    def test_the_innermost_server_answers(self):
        outer, inner = self.serve(), self.serve()
        for server in (outer, inner):
            server.respond("*", lambda request: request.address.encode())
        outer.resolve("a.example", PUBLIC, OTHER, "192.0.2.1")
        inner.resolve("a.example", "2001:db8::1", "192.0.2.2")
        outer.resolve("b.example", "unknown")
        with outer.intercept(proxy=False):
            self.assertEqual(self.found("a.example"), [PUBLIC])
            with inner.intercept(proxy=False):
                self.assertEqual(self.found("a.example"), ["2001:db8::1"])
                self.assertEqual(self.fetch_directly("http://a.example/"), b"192.0.2.2")
                self.assertEqual(self.fetch_directly("http://b.example/"), b"127.0.0.1")
            self.assertEqual(self.fetch_directly("http://a.example/"), OTHER.encode())
            with self.assertRaises(socket.gaierror):
                self.found("b.example")
        self.assertEqual((len(outer.requests), len(inner.requests)), (1, 2))

    def test_an_address_of_the_outer_server_leads_there_from_inside_of_another(self):
        outer, inner = self.serve(), self.serve()
        outer.respond("*", lambda request: request.address.encode())
        outer.resolve("a.example", PUBLIC)
        with outer.intercept(proxy=False):
            before = socket.create_connection(("a.example", 443), PATIENCE)
            with inner.intercept(proxy=False), before:
                context = ssl.create_default_context()
                tls = context.wrap_socket(before, server_hostname="a.example")
                now = socket.create_connection((PUBLIC, 80), PATIENCE)
                for connection, port in ((tls, 443), (now, 80)):
                    with connection:
                        self.assertEqual(connection.getpeername(), (PUBLIC, port))
                        self.assertEqual(self.ask(outer, connection), PUBLIC)
        self.assertEqual(inner.requests, [])

    # Wrong arguments

    def assert_wrong(self, kind, found, right, host, *answers):
        """Those are no arguments of resolve(), which says what was found, and what it takes."""
        with self.subTest(host, answers=answers):
            with self.assertRaises(kind) as caught:
                self.server.resolve(host, *answers)
            self.assertEqual(str(caught.exception), f"resolve(): found the {found}; {right}")

    def test_what_is_no_answer(self):
        self.server = self.serve_all()
        self.server.resolve("a.example", PUBLIC)
        right = "it takes an IP address, a list of them, or one of 'unknown', 'refused', 'silent'"
        for kind, *wrong in (
            (
                ValueError,
                "1.2.3",
                "127.1",
                "256.1.1.1",
                "example.com",
                "8.8.8.8:80",
                "",
                " 8.8.8.8",
            ),
            (ValueError, "8.8.8.8\n", "[::1]", "::1::", "1.2.3.4/24", "http://8.8.8.8", "*"),
            (ValueError, "fe80::1%1", "3232235777", [], ["8.8.8.8", "example.com"], ["unknown"]),
            (ValueError, 5, None, b"8.8.8.8", 1.5, ["8.8.8.8", 5], [["8.8.8.8"]], [None]),
        ):
            for answer in wrong:
                self.assert_wrong(kind, f"answer {answer!r}", right, "a.example", answer)
                self.assert_wrong(kind, f"answer {answer!r}", right, "a.example", OTHER, answer)
        with self.assertRaisesRegex(ValueError, "at least one answer"):
            self.server.resolve("a.example")
        self.assertEqual(self.found("a.example"), [PUBLIC])  # nothing has changed

    def test_what_is_no_host(self):
        self.server = self.serve_all()
        right = "it takes the name of a host, without a port, such as 'a.example' or '*.example'"
        for kind, *wrong in (
            (ValueError, "http://a.example", "https://*", "a.example:80", "*:80", "a.example/"),
            (ValueError, "a.example/x", "", "a.example?x", "a.example#x", "me@a.example"),
            (ValueError, "localhost", "LOCALHOST", "127.0.0.1", "192.0.2.1", "::1", "[::1]"),
            (ValueError, "2001:db8::1", "127.1", "fe80::1%1"),
            (ValueError, 5, None, b"a.example", ["a.example"]),
        ):
            for host in wrong:
                self.assert_wrong(kind, f"host {host!r}", right, host, PUBLIC)
        self.assertEqual(socket.gethostbyname("a.example"), "127.0.0.1")

    # Connections to what was found

    def test_they_lead_to_the_server_and_keep_the_address(self):
        server, port = self.serve_all(), self.unused_port()
        for address in self.ADDRESSES:
            server.resolve("a.example", address)
            with (
                self.subTest(address),
                socket.create_connection(("a.example", port), PATIENCE) as connection,
            ):
                self.assertEqual(connection.getpeername(), (address, port))
                self.assertEqual(self.ask(server, connection), address)
        self.assertEqual(self.fetch(f"http://a.example:{port}/"), address.encode())
        self.assertEqual(server.requests[-1].url, f"http://a.example:{port}/")
        self.assertEqual(server.errors, [])

    def test_those_of_version_6_as_well(self):
        self.need_ipv6()
        server, port = self.serve_all(), self.unused_port()
        for address in self.ADDRESSES_6:
            server.resolve("a.example", address)
            [(*_, usual)] = socket.getaddrinfo(address, port, type=STREAM)
            with (
                self.subTest(address),
                socket.create_connection(("a.example", port), PATIENCE) as connection,
            ):
                self.assertEqual(connection.getpeername(), usual)
                self.assertEqual(self.ask(server, connection), usual[0])

    def test_the_first_of_a_list_is_the_one_that_a_client_connects_to(self):
        server = self.serve_all()
        server.resolve("a.example", [PUBLIC, OTHER])
        self.assertEqual(self.fetch("http://a.example/"), PUBLIC.encode())
        self.need_ipv6()
        server.resolve("a.example", ["2001:db8::1", PUBLIC])
        self.assertEqual(self.fetch("http://a.example/"), b"2001:db8::1")

    def test_however_a_client_connects(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC)
        self.found("a.example")
        address = (PUBLIC, 80)

        def with_(prepare, method="connect"):
            connection = socket.socket()
            prepare(connection)
            self.assertFalse(getattr(connection, method)(address))
            return connection

        def handed_on(hand_on):
            with socket.create_connection(address, PATIENCE) as connection:
                return hand_on(connection)

        for words, open_connection in {
            "connect": lambda: with_(lambda connection: None),
            "connect_ex": lambda: with_(lambda connection: None, "connect_ex"),
            "a timeout": lambda: with_(lambda connection: connection.settimeout(PATIENCE)),
            "no blocking": lambda: connect_at_once(address)[0],
            "bound": lambda: with_(lambda connection: connection.bind(("127.0.0.1", 0))),
            "bound to any": lambda: with_(lambda connection: connection.bind(("", 0))),
            "from": lambda: socket.create_connection(address, PATIENCE, ("127.0.0.1", 0)),
            "dup": lambda: handed_on(lambda connection: connection.dup()),
            "fromfd": lambda: handed_on(
                lambda each: socket.fromfd(each.fileno(), each.family, each.type)
            ),
            "detach": lambda: handed_on(lambda each: socket.socket(fileno=each.detach())),
        }.items():
            with self.subTest(words), open_connection() as connection:
                connection.settimeout(PATIENCE)
                self.assertEqual(connection.getpeername(), address)
                self.assertEqual(self.ask(server, connection), PUBLIC)

    def test_connecting_twice(self):
        """Clients that do not block ask in this way whether they are connected."""
        server = self.serve_all()
        server.resolve("a.example", PUBLIC)
        self.found("a.example")
        connection, error = connect_at_once((PUBLIC, 80))
        with connection:
            self.assertEqual(error, 0)
            self.assertIn(connection.connect_ex((PUBLIC, 80)), (0, errno.EISCONN))
            self.assertEqual(self.ask(server, connection), PUBLIC)

    def test_tls(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC)
        self.found("a.example")
        context = ssl.create_default_context()
        plain = socket.create_connection(("a.example", 443), PATIENCE)
        late = context.wrap_socket(socket.socket(), server_hostname="a.example")
        late.connect((PUBLIC, 443))
        for tls in (context.wrap_socket(plain, server_hostname="a.example"), late):
            with tls:
                self.assertEqual(tls.getpeername(), (PUBLIC, 443))
                self.assertEqual(self.ask(server, tls), PUBLIC)
        self.assertEqual(self.fetch("https://a.example/"), PUBLIC.encode())

    def test_asyncio(self):
        server = self.serve_all()

        async def ask(port, **options):
            reader, writer = await asyncio.open_connection("a.example", port, **options)
            peer = writer.get_extra_info("peername")
            writer.write(LAST.replace(b"Host: x", b"Host: a.example"))
            await reader.read()
            writer.close()
            await writer.wait_closed()
            return peer, server.requests[-1].address

        server.resolve("a.example", PUBLIC)
        self.assertEqual(asyncio.run(ask(80)), ((PUBLIC, 80), PUBLIC))
        context = ssl.create_default_context()
        self.assertEqual(asyncio.run(ask(443, ssl=context)), ((PUBLIC, 443), PUBLIC))
        server.resolve("a.example", [OTHER, "2001:db8::1"])
        found = asyncio.run(ask(80, happy_eyeballs_delay=PATIENCE))
        self.assertEqual(found, ((OTHER, 80), OTHER))
        server.resolve("a.example", "refused", "unknown")
        with self.assertRaises(ConnectionRefusedError):
            asyncio.run(ask(80))
        with self.assertRaises(socket.gaierror):
            asyncio.run(ask(80))

    def test_an_address_that_was_never_found_is_left_alone(self):
        server = self.serve()
        server.resolve("a.example", PUBLIC)
        for method in ("connect", "connect_ex"):
            called, stub = self.called(method)
            with stub, server.intercept(proxy=False), socket.socket() as client:
                getattr(client, method)((OTHER, 80))
                socket.gethostbyname("a.example")
                getattr(client, method)((OTHER, 80))
                self.assertEqual(called, [(OTHER, 80), (OTHER, 80)])
                getattr(client, method)((PUBLIC, 80))
                self.assertEqual(called[2:], [("127.0.0.1", server.port)])

    def test_an_address_that_was_found_before_still_leads_there(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC, "refused", OTHER)
        self.found("a.example")
        with self.assertRaises(ConnectionRefusedError):
            self.fetch_directly("http://a.example/")
        self.assertEqual(self.found("a.example"), [OTHER])
        for address in (PUBLIC, OTHER, PUBLIC):
            with socket.create_connection((address, 8080), PATIENCE) as connection:
                self.assertEqual(self.ask(server, connection), address)

    def test_other_spellings_of_an_address_that_was_found(self):
        server = self.serve_all()
        server.resolve("a.example", ["2001:db8::1", PUBLIC])
        self.found("a.example")
        with socket.socket() as connection:
            connection.connect((PUBLIC.encode(), 80))
            self.assertEqual(connection.getpeername(), (PUBLIC, 80))
            self.assertEqual(self.ask(server, connection), PUBLIC)
        self.need_ipv6()
        for host in ("2001:db8::1", "2001:DB8:0:0::1", b"2001:db8::1"):
            with self.subTest(host), socket.socket(socket.AF_INET6) as connection:
                connection.connect((host, 80))
                self.assertEqual(connection.getpeername(), ("2001:db8::1", 80, 0, 0))
                self.assertEqual(self.ask(server, connection), "2001:db8::1")

    def test_all_requests_of_a_connection_have_its_address(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC, OTHER)
        connection = http.client.HTTPConnection("a.example", timeout=PATIENCE)
        with contextlib.closing(connection):
            for _ in range(2):
                connection.request("GET", "/")
                self.assertEqual(connection.getresponse().read(), PUBLIC.encode())
                self.assertEqual(self.fetch("http://a.example/"), OTHER.encode())
                server.clear()
                server.respond("*", lambda request: request.address.encode())
                server.resolve("a.example", OTHER)

    def test_connections_at_the_same_time(self):
        server = self.serve_all()
        addresses = [f"203.0.113.{number}" for number in range(10)]
        for number, address in enumerate(addresses):
            server.resolve(f"{number}.example", address)

        def fetch(number, address):
            for _ in range(5):
                with socket.create_connection((f"{number}.example", 80), PATIENCE) as connection:
                    self.assertEqual(connection.getpeername(), (address, 80))
                    connection.sendall(LAST)
                    self.assertTrue(read_all(connection).endswith(b"\r\n\r\n" + address.encode()))

        run_at_once([functools.partial(fetch, *each) for each in enumerate(addresses)])

    def test_addresses_of_this_machine_at_whatever_port(self):
        server, port = self.serve_all(), self.unused_port()
        for address in (PUBLIC, "127.0.0.2"):
            server.resolve("a.example", address)
            with self.subTest(address):
                found = self.fetch_directly(f"http://a.example:{server.port}/")
                self.assertEqual(found, address.encode())
        server.resolve("a.example", "127.0.0.1")
        with socket.socket() as connection:  # which looks the name up itself
            connection.connect(("a.example", port))
            self.assertEqual(connection.getpeername(), ("127.0.0.1", port))
            self.assertEqual(self.ask(server, connection), "127.0.0.1")

    def test_an_address_of_this_machine_that_nobody_has_looked_up(self):
        server, port = self.serve_all(), self.unused_port()
        server.resolve("a.example", "127.0.0.2")
        with socket.create_connection(("127.0.0.2", port), PATIENCE) as connection:
            self.assertEqual(connection.getpeername(), ("127.0.0.2", port))
            self.assertEqual(self.ask(server, connection), "127.0.0.2")
        with self.assertRaises(ConnectionRefusedError):  # it is the server's, but not its port
            socket.create_connection(("127.0.0.1", port), PATIENCE)

    def test_hosts_that_share_an_address(self):
        server = self.serve_all()
        server.resolve("*.example", PUBLIC)
        for host in ("a.example", "b.example"):
            self.assertEqual(self.fetch(f"http://{host}/"), PUBLIC.encode())
            self.assertEqual(server.requests[-1].url, f"http://{host}/")

    def test_a_service_on_this_machine_is_meant(self):
        server = self.serve_all()
        server.resolve("a.example", "127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as service:
            service.settimeout(PATIENCE)
            port = service.getsockname()[1]
            with socket.create_connection(("a.example", port), PATIENCE) as connection:
                self.assertEqual(connection.getpeername(), ("127.0.0.1", port))
                peer = None
                while peer != connection.getsockname():
                    accepted, peer = service.accept()
                    accepted.close()
        other = self.serve({"x": b"other"})
        self.assertEqual(self.fetch(f"http://a.example:{other.port}/x"), b"other")
        self.assertEqual(other.requests[0].address, "127.0.0.1")
        self.assertEqual(server.requests, [])

    @unittest.skipUnless(sys.platform.startswith("linux"), "elsewhere only connecting tells of it")
    def test_a_service_on_this_machine_sees_nobody_but_its_client(self):
        server = self.serve_all()
        for address in ("127.0.0.1", "127.0.0.2"):
            server.resolve("a.example", address)
            with self.subTest(address), socket.create_server((address, 0)) as service:
                service.settimeout(PATIENCE)
                port = service.getsockname()[1]
                with socket.create_connection(("a.example", port), PATIENCE) as connection:
                    accepted, peer = service.accept()
                    accepted.close()
                    self.assertEqual(peer, connection.getsockname())
        self.assertEqual(server.requests, [])

    def test_a_service_on_this_machine_is_meant_by_version_6(self):
        try:
            service = self.serve({"x": b"service"}, host="::1")
        except OSError as error:
            self.skipTest(f"no IPv6 here: {error}")
        server = self.serve_all()
        server.resolve("a.example", "::1")
        self.assertEqual(self.fetch(f"http://a.example:{service.port}/x"), b"service")
        self.assertEqual(server.requests, [])

    def use_again(self, server, name):
        """A connection to the server itself, from an address that a client has had before."""
        address = ("127.0.0.1", server.port)
        try:
            connection = socket.create_connection(address, PATIENCE, name)
        except OSError as error:
            self.skipTest(f"the system keeps the port: {error}")
        with connection:
            self.assertEqual(connection.getpeername(), address)
            self.assertEqual(self.ask(server, connection), "127.0.0.1")
            self.assertEqual(server.requests[-1].url, "http://a.example/feed.xml")

    def test_a_port_of_the_client_that_is_used_again(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC)
        connection = socket.create_connection(("a.example", 80), PATIENCE, ("127.0.0.1", 0))
        name = connection.getsockname()
        connection.sendall(HEAD + b"\r\n")
        self.assertIn(b" 200 OK", connection.recv(65536))
        close_by_reset(connection)
        self.use_again(server, name)
        self.assertEqual([each.address for each in server.requests], [PUBLIC, "127.0.0.1"])

    def test_a_port_of_a_client_that_could_not_connect(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC)
        self.found("a.example")
        with socket.socket() as connection, server.down():
            connection.bind(("127.0.0.1", 0))
            name = connection.getsockname()
            with self.assertRaises(ConnectionRefusedError):
                connection.connect((PUBLIC, 80))
        self.use_again(server, name)

    def test_sockets_that_lead_nowhere_have_no_peer(self):
        """Others have the one that they had outside."""
        server = self.serve_all()
        server.resolve("a.example", PUBLIC)
        self.found("a.example")
        with socket.socket() as unconnected, self.assertRaises(OSError) as caught:
            unconnected.getpeername()
        self.assertEqual(caught.exception.errno, errno.ENOTCONN)
        listening = socket.create_server(("127.0.0.1", 0))
        with listening, socket.create_connection(listening.getsockname()) as connection:
            accepted, _ = listening.accept()
            with accepted:
                self.assertEqual(accepted.getpeername(), connection.getsockname())
            self.assertEqual(connection.getpeername(), listening.getsockname())
        one, another = socket.socketpair()
        with one, another:
            self.assertEqual(one.getpeername(), another.getsockname())

    def test_datagrams_do_not_leave_the_machine(self):
        server = self.serve()
        server.resolve("a.example", PUBLIC)
        with contextlib.ExitStack() as stack:
            methods = ("sendto", "connect")
            called = [stack.enter_context(self.noted(method)) for method in methods]
            stack.enter_context(server.intercept(proxy=False))
            [(*_, address)] = socket.getaddrinfo("a.example", 443, type=socket.SOCK_DGRAM)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", address)
                client.connect(address)
                client.sendto(b"x", ("a.example", 443))
        self.assertEqual(address, (PUBLIC, 443))
        self.assertEqual([len(addresses) for addresses in called], [2, 1])
        self.assertEqual({host for addresses in called for host, _ in addresses}, {"127.0.0.1"})

    @contextlib.contextmanager
    def noted(self, name):
        """The addresses that a method of sockets gets as its last argument."""
        called = []
        with mock.patch.object(socket.socket, name, lambda *each: called.append(each[-1])):
            yield called

    def test_while_the_server_is_down_and_after_it_has_stopped(self):
        server = self.serve_all()
        server.resolve("a.example", PUBLIC)
        self.found("a.example")
        with server.down(), self.assertRaises(ConnectionRefusedError):
            socket.create_connection((PUBLIC, 80), PATIENCE)
        self.assertEqual(self.fetch("http://a.example/"), PUBLIC.encode())
        server.stop()
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(("a.example", 80), PATIENCE)

    def test_a_server_on_all_addresses(self):
        for host in ("0.0.0.0", "::"):
            with self.subTest(host):
                try:
                    server = self.serve(host=host)
                    for address in ("127.0.0.1", "::1")[: 1 + (host == "::")]:
                        socket.create_connection((address, server.port), PATIENCE).close()
                except OSError as error:  # "::" is all of version 6 alone on some systems
                    self.skipTest(f"not at addresses of both versions here: {error}")
                server.respond("*", lambda request: request.address.encode())
                server.resolve("a.example", PUBLIC)
                server.resolve("b.example", "2001:db8::1")
                with server.intercept(proxy=False):
                    self.assertEqual(self.fetch("http://a.example/"), PUBLIC.encode())
                    self.need_ipv6()
                    self.assertEqual(self.fetch("http://b.example/"), b"2001:db8::1")

    def test_a_server_on_an_address_of_version_6(self):
        try:
            server = self.serve(host="::1")
        except OSError as error:
            self.skipTest(f"no IPv6 here: {error}")
        server.respond("*", lambda request: request.address.encode())
        server.resolve("a.example", "2001:db8::1")
        server.resolve("b.example", PUBLIC)
        with self.noted("connect") as called, server.intercept(proxy=False):
            with contextlib.suppress(OSError):  # a socket of version 4 cannot come here
                socket.create_connection(("b.example", 80), PATIENCE).close()
            self.assertNotIn((PUBLIC, 80), called)
        with server.intercept(proxy=False):
            self.assertEqual(self.fetch("http://a.example/"), b"2001:db8::1")

    # Hosts that cannot be connected to

    def test_a_host_that_refuses_connections(self):
        server = self.serve_all()
        server.resolve("*.example", "refused")
        for connect_to in (
            lambda host: socket.create_connection((host, 80)),
            lambda host: socket.create_connection((host, 80), PATIENCE),
            lambda host: self.peer_of_a_name("connect", host),
            lambda host: self.fetch_directly(f"http://{host}/"),
            lambda host: self.fetch_directly(f"https://{host}:8443/"),
            lambda host: self.fetch(f"http://{host}/"),
        ):
            with self.assertRaises(OSError) as caught:
                self.fail(f"{connect_to('a.example')}")
            reason = getattr(caught.exception, "reason", caught.exception)
            self.assertIsInstance(reason, ConnectionRefusedError)
            self.assertEqual(reason.errno, errno.ECONNREFUSED)
        [(family, *_, address)] = socket.getaddrinfo("a.example", 80, type=STREAM)
        with socket.socket(family) as connection:
            self.assertEqual(connection.connect_ex(address), errno.ECONNREFUSED)
        connection, error = connect_at_once(address, family)
        connection.close()
        self.assertEqual(error, errno.ECONNREFUSED)
        self.assertEqual((server.requests, server.errors), ([], []))

    def test_a_host_that_refuses_while_others_do_not(self):
        server = self.serve_all()
        server.resolve("a.example", "refused")
        with self.assertRaises(ConnectionRefusedError):
            self.fetch_directly("http://a.example/")
        for host in ("b.example", "c.example"):
            self.assertEqual(self.fetch_directly(f"http://{host}/"), b"127.0.0.1")
        server.resolve("a.example", PUBLIC)
        self.assertEqual(self.fetch_directly("http://a.example/"), PUBLIC.encode())

    def test_a_host_that_is_silent(self):
        server = self.serve_all()
        server.resolve("a.example", "silent")
        with self.assertRaises(socket.timeout):
            socket.create_connection(("a.example", 80), 0.01)
        with self.assertRaises(urllib.error.URLError) as caught:
            urllib.request.urlopen("http://a.example/", timeout=0.01)
        self.assertIsInstance(caught.exception.reason, socket.timeout)
        with socket.socket() as connection:
            connection.settimeout(0.01)
            error = connection.connect_ex(("a.example", 80))
            self.assertIn(error, (errno.EWOULDBLOCK, errno.ETIMEDOUT))

        async def connect():
            await asyncio.wait_for(asyncio.open_connection("a.example", 80), 0.01)

        with self.assertRaises(asyncio.TimeoutError):
            asyncio.run(connect())
        self.assertEqual(self.fetch("http://b.example/"), b"127.0.0.1")
        self.assertEqual((len(server.requests), server.errors), (1, []))

    def test_a_silent_host_and_a_socket_that_does_not_block(self):
        server = self.serve_all()
        server.resolve("a.example", "silent")
        [(family, *_, address)] = socket.getaddrinfo("a.example", 80, type=STREAM)
        with socket.socket(family) as one, socket.socket(family) as another:
            for connection in (one, another):
                connection.setblocking(False)
            with self.assertRaises(BlockingIOError) as caught:
                one.connect(address)
            pending = (errno.EINPROGRESS, errno.EWOULDBLOCK)
            self.assertIn(caught.exception.errno, pending)
            self.assertIn(another.connect_ex(address), pending)
            with selectors.DefaultSelector() as selector:
                for connection in (one, another):
                    selector.register(connection, selectors.EVENT_WRITE)
                for _ in range(3):
                    self.assertEqual(self.fetch("http://b.example/"), b"127.0.0.1")
                    self.assertEqual(selector.select(0), [])
            for connection in (one, another):
                with self.assertRaises(OSError) as caught:
                    connection.getpeername()
                self.assertEqual(caught.exception.errno, errno.ENOTCONN)
                self.assertIn(connection.connect_ex(address), (*pending, errno.EALREADY))
        self.assertEqual((len(server.requests), server.errors), (3, []))

    def start_to_connect(self, server):
        """A thread that connects to a silent host, without a timeout; and what that raises."""
        server.resolve("a.example", "silent")
        [(family, *_, address)] = socket.getaddrinfo("a.example", 80, type=STREAM)
        connection, raised = socket.socket(family), []
        self.addCleanup(connection.close)

        def connect_silently():
            try:
                connection.connect(address)
            except OSError as error:
                raised.append(error)

        thread = threading.Thread(target=connect_silently, daemon=True)
        thread.start()
        while not self.is_inside(thread, "connect_silently"):
            self.get(server, "/")
        self.assertEqual(raised, [])
        return thread, raised

    def is_inside(self, thread, name):
        """Whether a thread has come to something that a function of that name calls."""
        self.assertTrue(thread.is_alive(), "it did not wait")
        frame = sys._current_frames().get(thread.ident)
        names = [frame.f_code.co_name for frame, _ in traceback.walk_stack(frame)] if frame else []
        return name in names[1:]

    def test_the_end_of_an_inner_context_does_not_end_it(self):
        server = self.serve()
        server.resolve("a.example", "silent")
        with server.intercept(proxy=False), socket.socket() as connection:
            connection.setblocking(False)
            connection.connect_ex((socket.gethostbyname("a.example"), 80))
            descriptors = open_descriptors()
            with server.intercept(proxy=False):
                pass
            self.assertEqual(open_descriptors(), descriptors)

    def test_the_end_of_a_context_and_of_a_server_ends_the_wait_for_a_silent_host(self):
        """Both at once, as TCP itself waits for a second before it tries again."""
        first, second, context = self.serve(), self.serve(), contextlib.ExitStack()
        context.enter_context(first.intercept(proxy=False))
        connecting = [self.start_to_connect(first)]
        with second.intercept(proxy=False):
            connecting.append(self.start_to_connect(second))
            context.close()
            second.stop()
            for thread, raised in connecting:
                thread.join(PATIENCE)
                self.assertFalse(thread.is_alive())
                self.assertEqual(len(raised), 1)
        self.assertEqual(first.errors + second.errors, [])

    def test_neither_a_socket_nor_a_thread_is_left(self):
        descriptors, threads = open_descriptors(), set(threading.enumerate())
        with FeedTestServer("") as server, server.intercept(proxy=False):
            server.respond("*", 204)
            for answer in (PUBLIC, OTHER, "unknown", "refused", "silent", "silent"):
                server.resolve("a.example", answer)
                timeout = 0.01 if answer == "silent" else PATIENCE
                connection = http.client.HTTPConnection("a.example", timeout=timeout)
                with contextlib.suppress(OSError), contextlib.closing(connection):
                    connection.request("GET", "/")
                    connection.getresponse().read()
        self.assertEqual(len(server.requests), 2)
        self.assertEqual(open_descriptors(), descriptors)
        self.assertEqual(set(threading.enumerate()) - threads, set())

    # Readers that refuse private addresses

    def guarded(self, url):
        """Fetch a URL unless its host has a private address, which is looked up for that alone."""
        parts = urllib.parse.urlsplit(url)
        for *_, address in socket.getaddrinfo(parts.hostname, parts.port, type=STREAM):
            if not ipaddress.ip_address(address[0]).is_global:
                raise PermissionError(address[0])
        return self.fetch(url)

    def well_guarded(self, url):
        """Fetch a URL unless the connection leads to a private address."""
        parts = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.connect()
            address = connection.sock.getpeername()[0]
            if not ipaddress.ip_address(address).is_global:
                raise PermissionError(address)
            connection.request("GET", parts.path)
            return connection.getresponse().read()

    def test_a_guard(self):
        server, port = self.serve_all(), self.unused_port()
        url = f"http://a.example:{port}/"
        for fetch in (self.guarded, self.well_guarded):
            for address in self.ADDRESSES:
                server.resolve("a.example", address)
                with self.subTest(fetch.__name__, address=address):
                    if address == PUBLIC:
                        self.assertEqual(fetch(url), PUBLIC.encode())
                    else:
                        with self.assertRaisesRegex(PermissionError, re.escape(address)):
                            fetch(url)
        self.assertEqual([request.address for request in server.requests], [PUBLIC] * 2)

    def test_an_address_that_changes_between_the_look_up_and_the_connection(self):
        server, port = self.serve_all(), self.unused_port()
        url = f"http://evil.example:{port}/"
        server.resolve("evil.example", PUBLIC, "127.0.0.1")
        self.assertEqual(self.guarded(url), b"127.0.0.1")
        self.assertEqual(server.requests[-1].address, "127.0.0.1")
        server.resolve("evil.example", PUBLIC, "127.0.0.1")
        self.assertEqual(self.well_guarded(url), PUBLIC.encode())
        with self.assertRaises(PermissionError):
            self.well_guarded(url)
        self.assertEqual(len(server.requests), 2)

    def test_failing_over_to_another_host(self):
        server = self.serve_all()
        server.resolve("a.example", "refused", PUBLIC)
        server.resolve("b.example", "unknown")

        def fetch_from_any(*hosts):
            for host in hosts:
                with contextlib.suppress(urllib.error.URLError):
                    return host, self.fetch(f"http://{host}/").decode()
            return None

        hosts = ("a.example", "b.example", "c.example")
        self.assertEqual(fetch_from_any(*hosts), ("c.example", "127.0.0.1"))
        self.assertEqual(fetch_from_any(*hosts), ("a.example", PUBLIC))

    # To a client that goes by the proxy

    def test_each_request_to_a_proxy_is_a_look_up(self):
        server = self.serve_all(proxy=True)
        server.resolve("a.example", PUBLIC, "unknown", "refused", OTHER)
        statuses = [200, 502, 502, 200, 200]
        found = [ask(server, "http://a.example/x") for _ in statuses]
        self.assertEqual([answer.status for answer in found], statuses)
        for answer in found[1:3]:
            self.assertIn(b"a.example", answer.body)
        self.assertNotEqual(found[1].body, found[2].body)
        self.assertEqual([each.response.status for each in server.requests], statuses)
        self.assertEqual({each.address for each in server.requests}, {"127.0.0.1"})
        self.assertEqual({each.url for each in server.requests}, {"http://a.example/x"})
        self.assertEqual(server.errors, [])

    def test_what_a_proxy_does_not_look_up(self):
        server = self.serve_all(proxy=True)
        server.resolve("*", "unknown")
        port = server.port
        for host in ("192.0.2.1", "[2001:db8::1]", f"127.0.0.1:{port}", f"localhost:{port}"):
            with self.subTest(host):
                self.assertEqual(ask(server, f"http://{host}/x").status, 200)
        self.assertEqual(ask(server, "http://a.example/x").status, 502)

    def test_a_request_to_a_proxy_that_fails_takes_no_step(self):
        server = self.serve_all(proxy=True)
        server.respond("http://a.example/x", b"1", b"2")
        server.resolve("a.example", "unknown", "refused", PUBLIC)
        bodies = [ask(server, "http://a.example/x").body for _ in range(4)]
        self.assertEqual(bodies[2:], [b"1", b"2"])

    def test_requests_to_a_proxy_that_share_a_connection(self):
        server = self.serve_all(proxy=True)
        server.resolve("a.example", PUBLIC, OTHER, "unknown")
        get = b"GET http://%s.example/x HTTP/1.1\r\nHost: x\r\n"
        parts = [get % host + b"\r\n" for host in (b"a", b"b", b"a", b"b")]
        received = exchange(server, *parts, get % b"a" + b"Connection: close\r\n\r\n")
        statuses = re.findall(rb"HTTP/1.1 (\d+) ", received)
        self.assertEqual(statuses, [b"200"] * 4 + [b"502"])
        self.assertEqual({each.address for each in server.requests}, {"127.0.0.1"})

    def test_a_connect_is_a_look_up_and_what_comes_through_is_none(self):
        server = self.serve_all(proxy=True)
        server.resolve("a.example", PUBLIC, "unknown", "refused", OTHER)
        connect_to = b"CONNECT a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n"
        head = HEAD.replace(b"Host: x", b"Host: a.example")
        gets = (head + b"\r\n", head + b"\r\n", head + CLOSING)
        for opens in (True, False, False, True):
            if opens:
                wire = exchange(server, connect_to + b"\r\n", *gets)
            else:
                wire = exchange(server, connect_to + CLOSING)
            found = re.findall(rb"HTTP/1.1 (\d+) ", wire)
            self.assertEqual(found, [b"200"] * 4 if opens else [b"502"])
        self.assertEqual({request.address for request in server.requests}, {"127.0.0.1"})
        refused = [request for request in server.requests if request.method == "CONNECT"]
        self.assertEqual([request.response.status for request in refused], [502, 502])
        self.assertEqual((len(server.requests), server.errors), (8, []))

    def test_clients_that_go_by_the_environment(self):
        server = self.serve_all(proxy=True)
        server.resolve("a.example", PUBLIC, "unknown", "refused", OTHER, "unknown")
        self.assertEqual(self.fetch("http://a.example/"), b"127.0.0.1")
        with self.assertRaises(urllib.error.HTTPError) as caught:
            self.fetch("http://a.example/")
        caught.exception.close()
        self.assertEqual(caught.exception.code, 502)
        with self.assertRaisesRegex(OSError, "502"):
            self.fetch("https://a.example/")
        self.assertEqual(self.fetch("https://a.example/"), b"127.0.0.1")
        with self.assertRaises(socket.gaierror):
            self.fetch_directly("http://a.example/")
        self.assertEqual(server.errors, [])

    def test_what_is_connected_directly_is_looked_up_once(self):
        server = self.serve_all(proxy=True)
        server.resolve("a.example", PUBLIC, OTHER, "unknown")
        for address in (PUBLIC, OTHER):
            self.assertEqual(self.fetch_directly("http://a.example/"), address.encode())
        with self.assertRaises(socket.gaierror):
            self.fetch_directly("http://a.example/")
        with connect(server) as connection:
            self.assertEqual(self.ask(server, connection), "127.0.0.1")

    def test_a_silent_host_behind_a_proxy(self):
        server = self.serve()
        server.resolve("a.example", "silent")
        with server.intercept(), connect(server) as one, connect(server) as another:
            one.sendall(b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n")
            another.sendall(b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n")
            for connection in (one, another):
                self.assert_silent(server, connection)
            server.stop()
            for connection in (one, another):
                self.assertEqual(read_to_the_end(connection)[0], b"")
        self.assertEqual(server.errors, [])

    def test_nothing_leaves_the_machine_whatever_is_found(self):
        code = """
        import asyncio, contextlib, ipaddress, socket, sys, urllib.request, http.client
        import feedtestserver, warnings
        warnings.simplefilter("error")
        events = []
        def hook(event, arguments):
            if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
                events.append((event, arguments[1][0]))
            elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
                name = arguments[1][0] if event == "socket.bind" else arguments[0]
                names.append((event, name))
            elif event in ("socket.gethostbyaddr", "socket.getnameinfo"):
                names.append((event, "a name"))
        names = []
        def fetch(url, timeout):
            try:
                urllib.request.urlopen(url, timeout=timeout).close()
            except urllib.request.HTTPError as error:
                error.close()
            except OSError:
                pass
            with contextlib.suppress(OSError):
                host = url.split("/")[2]
                connection = http.client.HTTPConnection(host, timeout=timeout)
                with contextlib.closing(connection):
                    connection.request("GET", "/")
                    connection.getresponse().read()
        async def stream(host, timeout):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, 80), timeout)
                writer.close()
        def datagrams(host):
            with contextlib.suppress(OSError):
                for family, *_, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
                    with socket.socket(family, socket.SOCK_DGRAM) as sender:
                        sender.sendto(b"x", address)
                        sender.connect(address)
        sys.addaudithook(hook)
        with feedtestserver.FeedTestServer("") as server:
            server.respond("*", lambda request: seen.append(request.address) or 204)
            seen = []
            for proxy in (False, True):
                with server.intercept(proxy=proxy):
                    for answer in (
                        "93.184.216.34", "198.51.100.2", "2001:db8::1",
                        ["2001:db8::1", "198.51.100.1"], "unknown", "refused", "silent",
                    ):
                        server.resolve("*.example", answer)
                        timeout = 0.02 if answer == "silent" else 20
                        fetch("http://a.example/", timeout)
                        if answer == "198.51.100.2":
                            fetch("https://a.example/", timeout)
                        asyncio.run(stream("b.example", timeout))
                        datagrams("c.example")
                        for find in (socket.gethostbyname, socket.gethostbyname_ex):
                            with contextlib.suppress(OSError):
                                find("d.example")
            print(server.errors)
        print({"93.184.216.34", "198.51.100.2"} <= set(seen))
        for event, host in events:
            address = ipaddress.ip_address(host)
            address = getattr(address, "ipv4_mapped", None) or address
            if not address.is_loopback:
                print(event, host)
        for event, host in names:
            if host:  # to read an address reaches nobody
                ipaddress.ip_address(host.partition("%")[0])
        print(len(events) > 20)
        """
        done = run_script(code)
        self.assertEqual(done.stderr, "")
        self.assertEqual(done.stdout, "[]\nTrue\nTrue\n")


class TunnelTest(ServerTestCase):
    NOT_YET = Response(status=407, headers={"Proxy-Authenticate": 'Basic realm="x"'})
    OPENED = [200, 204]

    def fetch(self, server, to="a.example:443", fields="", times=1):
        """Ask for a tunnel and, if it opens, for /x through it, in TLS; the status of each."""
        with connect(server) as connection:
            head = f"CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{fields}Connection: close\r\n\r\n"
            connection.sendall(head.encode())
            received = connection.recv(65536)
            if not received.startswith(b"HTTP/1.1 2"):
                return [Answer(received + read_all(connection)).status]
            self.assertTrue(received.endswith(b"\r\n\r\n"))  # there is no body (RFC 9110 9.3.6)
            self.assertNotRegex(received.lower(), b"content-|transfer-")
            name = to.rpartition(":")[0]
            get = f"GET /x HTTP/1.1\r\nHost: {name}\r\n".encode()
            with server.ssl_context().wrap_socket(connection, server_hostname=name) as tls:
                tls.sendall((get + b"\r\n") * (times - 1) + get + b"Connection: close\r\n\r\n")
                statuses = re.findall(rb"HTTP/1.1 (\d+) ", received + read_all(tls))
                return [int(status) for status in statuses]

    def within(self, server, inside):
        return server.intercept() if inside else contextlib.nullcontext()

    def test_a_407_and_then_a_tunnel(self):
        for inside in (False, True):
            server = self.serve()
            server.respond("https://a.example/", self.NOT_YET, 200, method="CONNECT")
            server.respond("https://a.example/x", 204)
            with self.subTest(inside=inside), self.within(server, inside):
                self.assertEqual(self.fetch(server), [407])
                fields = "Proxy-Authorization: Basic eDp5\r\n"
                self.assertEqual(self.fetch(server, fields=fields), self.OPENED)
                refused, accepted, request = server.requests
                self.assertIn(("Proxy-Authenticate", 'Basic realm="x"'), refused.response.headers)
                self.assertEqual((refused.method, refused.target), ("CONNECT", "a.example:443"))
                self.assertIsNone(refused.headers["Proxy-Authorization"])
                self.assertEqual(accepted.headers["Proxy-Authorization"], "Basic eDp5")
                self.assertEqual((refused.tunnel, accepted.tunnel), (None, None))
                self.assertIs(request.tunnel, accepted)
                self.assertEqual(request.url, "https://a.example/x")
                self.assertEqual(server.errors + server.unused, [])

    def test_one_that_is_scripted_to_open_early(self):
        server = self.serve()
        server.respond("https://a.example/", Response(early=True), method="CONNECT")
        server.respond("https://a.example/x", 204)
        self.assertEqual(self.fetch(server), self.OPENED)
        self.assertEqual(server.errors, [])

    def test_one_that_just_opened_is_not_on_record_but_in_what_came_through_it(self):
        server = self.serve()
        server.respond("https://a.example/x", 204)
        for inside in (True, False):
            server.clear()
            server.respond("https://a.example/x", 204)
            with self.subTest(inside=inside), self.within(server, inside):
                self.assertEqual(self.fetch(server, fields="N: 1\r\n", times=2), [200, 204, 204])
                self.assertEqual(self.fetch(server, fields="N: 2\r\n"), self.OPENED)
                ask(server, "/x")
                first, second, third, direct = server.requests
                self.assertIs(first.tunnel, second.tunnel)
                for request, number in ((first, "1"), (third, "2")):
                    self.assertEqual(request.method, "GET")
                    self.assertEqual(request.tunnel.method, "CONNECT")
                    self.assertEqual(request.tunnel.target, "a.example:443")
                    self.assertEqual(request.tunnel.headers["N"], number)
                    self.assertEqual(request.tunnel.response.status, 200)
                self.assertIsNone(direct.tunnel)

    def test_a_tunnel_in_a_tunnel(self):
        server = self.serve()
        server.respond("https://*/x", 204)
        tunnels = [
            b"CONNECT %s.example:443 HTTP/1.1\r\nHost: x\r\n\r\n" % name for name in (b"a", b"b")
        ]
        exchange(server, *tunnels, b"GET /x HTTP/1.1\r\nbad line\r\n\r\n")
        [refused] = server.requests
        self.assertEqual(refused.response.status, 400)
        self.assertEqual(refused.tunnel.target, "b.example:443")
        self.assertEqual(refused.tunnel.tunnel.target, "a.example:443")
        self.assertIsNone(refused.tunnel.tunnel.tunnel)

    def test_hosts_for_which_it_opens_outside_of_an_interception(self):
        for address, method, opens, others in (
            ("https://a.example/x", None, "a.example:443 A.example:443", "b.example:443"),
            ("https://a.example/y", "POST", "a.example:443", "b.example:443"),
            ("https://a.example:8443/x", None, "a.example:8443", "b.example:8443"),
            ("https://*.example/x", None, "a.example:443", "a.example.org:443"),
            ("https://*/*", None, "a.example:443 b.test:443", ""),
            ("http://a.example/x", None, "", "a.example:443 a.example:80"),
            ("/x", None, "", "a.example:443"),
            ("*", None, "", "a.example:443"),
            ("*", "CONNECT", "a.example:443", ""),
        ):
            server = self.serve()
            server.respond(address, 204, method=method)
            for to in (*opens.split(), *others.split()):
                with self.subTest(address, to=to):
                    status, *through = self.fetch(server, to)
                    self.assertEqual(status // 100, 2 if to in opens.split() else 4)
                    self.assertEqual(through == [502], method == "CONNECT")
                    if not through:
                        refused = server.requests[-1]
                        self.assertEqual((refused.method, status), ("CONNECT", 405))
                        self.assertIn(("Allow", "GET, HEAD, OPTIONS"), refused.response.headers)
                        self.assertIn(b"respond(", refused.response.body)
            server.clear()
            self.assertEqual(self.fetch(server), [405])
            with server.intercept():
                pass
            self.assertEqual(self.fetch(server), [405])

    def test_a_scripted_2xx_opens_the_tunnel(self):
        def check(request):
            return 201 if request.headers["Proxy-Authorization"] else self.NOT_YET

        def pass_on(request):
            return None

        signed = "Proxy-Authorization: x\r\n"
        for address, step, fields, outside, inside in (
            ("https://a.example/", 201, "", [201, 204], [201, 204]),
            ("https://a.example", b"body", "", [200, 204], [200, 204]),
            ("https://A.example:443/", 502, "", [502], [502]),
            ("https://*.example", 407, "", [407], [407]),
            ("*", 407, "", [407], [407]),
            ("*", check, "", [407], [407]),
            ("*", check, signed, [201, 204], [201, 204]),
            ("*", pass_on, "", [405], [200, 204]),
            ("https://*", pass_on, "", [200, 204], [200, 204]),
            ("https://b.example/", 407, "", [405], [200, 204]),
            ("https://a.example:8443/", 407, "", None, [200, 204]),
        ):
            for intercepting, statuses in ((False, outside), (True, inside)):
                server = self.serve()
                server.respond("*", 204)
                server.respond(address, step, method="CONNECT")
                with self.subTest(address, inside=intercepting), self.within(server, intercepting):
                    if statuses:
                        self.assertEqual(self.fetch(server, fields=fields), statuses)
                        self.assertEqual(server.errors, [])

    def test_one_whose_step_passed_is_on_record(self):
        for inside in (False, True):
            server = self.serve()
            server.respond("https://a.example", lambda request: None, method="CONNECT")
            server.respond("https://a.example/x", 204)
            with self.subTest(inside=inside), self.within(server, inside):
                fields = {"Proxy-Authorization": "Basic eDp5"}
                statuses = self.fetch(server, fields="Proxy-Authorization: Basic eDp5\r\n")
                self.assertEqual(statuses, self.OPENED)
                tunnel = server.assert_requested(
                    "https://a.example", method="CONNECT", headers=fields, times=1
                )
                self.assertIs(server.assert_requested("https://a.example/x").tunnel, tunnel)

    def test_a_step_without_a_method_takes_no_connect(self):
        server = self.serve()
        for address, method in (("*", None), ("https://a.example/*", None), ("*", "GET")):
            server.clear()
            server.respond(address, 204, method=method)
            with self.subTest(address, method=method), server.intercept():
                self.assertEqual(self.fetch(server), self.OPENED)
                self.assertEqual([request.method for request in server.requests], ["GET"])

    def test_addresses_that_match_a_connect(self):
        server = self.serve()
        server.respond("https://a.example/", 407, method="CONNECT")
        for to in ("a.example:443", "b.example:80"):  # scripted, and refused
            self.fetch(server, to)
        scripted, refused = server.requests
        for address, method, found in (
            ("https://a.example/", "CONNECT", scripted),
            ("https://A.example:443", "CONNECT", scripted),
            ("https://a*", "CONNECT", scripted),
            ("https://b.example:80/", "CONNECT", refused),
            ("https://*:80/", "CONNECT", refused),
            ("*", "CONNECT", refused),
            (None, "CONNECT", refused),
            ("https://b.example/", "CONNECT", None),
            ("https://a.example/", None, None),
            ("https://a*", None, None),
            ("https://a.example/", "GET", None),
        ):
            with self.subTest(address, method=method):
                if found:
                    request = server.wait_for_request(address, method=method, timeout=0)
                    self.assertIs(request, found)
                else:
                    with self.assertRaises(AssertionError):
                        server.wait_for_request(address, method=method, timeout=0)


# What nobody gets


class OutsideTest(ServerTestCase):
    """Not one byte from outside of the directory, however it is asked for."""

    SECRET = b"not for you"
    #: Below the folder in whose ``data`` the server is.
    FILES = {
        "secret.xml": SECRET,
        "secret.xml.headers": b"Header: X-Secret: " + SECRET,
        "data-secret/secret.xml": SECRET,
        "outside/index.html": SECRET,
        "data/feed.xml": b"<rss/>",
        "data/feed.xml.headers": b"Header: X-Mine: 1",
        "data/folder/feed.xml": b"<rss/>",
        "data/example.com/feed.xml": b"<rss/>",
    }
    #: Links in ``data``, and what they lead to.
    LINKS = {
        "out": "..",
        "out.xml": "../secret.xml",
        "absolute.xml": "{outer}/secret.xml",
        "out.asis": "../secret.xml",
        "folder/feed.xml.headers": "../../secret.xml.headers",
        "folder/index.html": "../../secret.xml",
        "sibling.xml": "../data-secret/secret.xml",
        "loop": "loop",
        "linked.example": "../outside",
        "example.com/out": "../..",
    }
    PATHS = re.findall(
        r"\S+",
        """
        /../secret.xml /./../secret.xml /folder/../../secret.xml /.../secret.xml /%2e%2e/secret.xml
        /%2E./secret.xml /.%2e/secret.xml /%2e%2e%2fsecret.xml /..%2fsecret.xml /..%5csecret.xml
        /..\\secret.xml /folder/..%2f..%2fsecret.xml /%252e%252e/secret.xml /..%252fsecret.xml
        /%c0%ae%c0%ae/secret.xml /..;/secret.xml /..%c0%afsecret.xml /%u002e%u002e/secret.xml
        /\uff0e\uff0e/secret.xml /..%00/secret.xml /%00/../secret.xml /feed.xml%00/../../secret.xml
        /secret.xml%00 /feed.xml/../../secret.xml /folder//../../secret.xml /~/secret.xml
        //secret.xml //{outer}/secret.xml /{outer}/secret.xml /%2f{outer}%2fsecret.xml
        /file://{outer}/secret.xml /C:/secret.xml /C:%5csecret.xml /c:secret.xml
        /%5c%5clocalhost%5cshare%5csecret.xml /feed.xml::$DATA /feed.xml:secret /out/secret.xml
        /out.xml /absolute.xml /out.asis /sibling.xml /out/data/ /folder/ /folder/feed.xml
        /folder/index.html /loop /loop/ /loop/secret.xml /feed.xml.headers /feed.xml.HEADERS
        /feed.xml%2eheaders /feed.xml.headers/ /linked.example/ /linked.example/index.html
        /example.com/out/secret.xml /example.com/../../secret.xml /data/../../secret.xml / /data/
        /.. /dev/null /proc/self/environ /CON
    """,
    )
    PATHS += ["/" + "../" * 300, "/" + "%2e%2e%2f" * 300]
    HOSTS = re.findall(
        r"\S+",
        """
        .. ... . ../.. ..%2f.. %2e%2e .%2e ..\\.. %00 example.com%00 linked.example LINKED.example
        example.com/.. example.com%2f.. example.com/out - c: ~ {outer} localhost/../.. [..] [::1]
        ..:80 \uff0e\uff0e \u2025 out feed.xml folder data %6f%75%74
    """,
    )
    HOSTS += ["a b", "a\tb"]

    def setUp(self):
        outer = self.make_directory(self.FILES)
        self.outer = str(outer)
        for name, target in self.LINKS.items():
            self.make_link(outer / "data" / name, target.format(outer=outer))
        self.server = FeedTestServer(outer / "data")
        self.server.start()
        self.addCleanup(self.server.stop)

    def ask(self, *requests):
        """All that comes for these requests, in which ``{outer}`` is filled in."""
        with contextlib.suppress(ConnectionResetError):
            texts = (text.replace("{outer}", self.outer) for text in requests)
            sent = [text.encode("utf-8", "surrogateescape") for text in texts]
            return exchange(self.server, *sent)
        return b""

    def check(self, *requests):
        with self.subTest(requests):
            wire = self.ask(*requests)
            self.assertNotIn(self.SECRET, wire)
            *_, status = re.findall(rb"(?m)^HTTP/1.1 (...)", wire)
            self.assertIn(status, (b"400", b"404", b"502"))

    def test_what_is_inside(self):
        answer = Answer(self.ask("GET /feed.xml HTTP/1.0\r\n\r\n"))
        self.assertEqual((answer.body, answer.headers["X-Mine"]), (b"<rss/>", "1"))

    def test_paths(self):
        for path in self.PATHS:
            self.check(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            self.check(f"GET {path}?feed.xml#feed.xml HTTP/1.0\r\n\r\n")
        self.assertEqual(self.server.errors, [])

    def test_paths_of_other_hosts(self):
        with self.server.intercept():
            for path in self.PATHS:
                self.check(f"GET http://example.com{path} HTTP/1.0\r\n\r\n")
                self.check(f"GET {path} HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n")
                self.check(
                    "CONNECT example.com:80 HTTP/1.1\r\nHost: x\r\n\r\n",
                    f"GET {path} HTTP/1.0\r\n\r\n",
                )
        self.assertEqual(self.server.errors, [])

    def test_hosts(self):
        with self.server.intercept():
            for host in self.HOSTS:
                for path in ("/secret.xml", "/out/secret.xml", "/", "/%2e%2e/x"):
                    self.check(f"GET http://{host}{path} HTTP/1.0\r\n\r\n")
                    self.check(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
                    self.check(
                        f"CONNECT {host}:80 HTTP/1.1\r\nHost: x\r\n\r\n",
                        f"GET {path} HTTP/1.0\r\n\r\n",
                    )
        for error in self.server.errors:
            self.assertIn("no such host here", error)

    def test_names_of_fixtures(self):
        for path in self.PATHS:
            name = urllib.parse.unquote(path.replace("{outer}", self.outer), errors="replace")
            with self.subTest(name), self.assertRaises(FileNotFoundError):
                self.server.respond("/x", name)

    def test_what_is_listed(self):
        names = {fixture.name for fixture in self.server.fixtures()}
        self.assertEqual(names, {"feed.xml", "example.com/feed.xml"})
        self.assertNotIn(b"secret", self.ask("GET /secre.xml HTTP/1.0\r\n\r\n"))


class InjectionTest(ServerTestCase):
    """What a client or a file name says stays a text where it comes out again."""

    def head(self, wire):
        """The names of the fields of an answer."""
        lines = wire.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        self.assertNotRegex("".join(lines), "[\r\n\0]")
        return {line.partition(":")[0].lower() for line in lines[1:]}

    def test_no_line_break_gets_into_a_field_line(self):
        template = comment("Header: Location: {{base_url}}/x", "Header: X: {{host}} {{port}}")
        files = {"feed.xml": template, "example.com/feed.xml": template}
        server = self.serve(files)
        right = {"location", "x", "date", "server", "content-type", "content-length", "connection"}
        breaks = ("%0d%0aInjected:1", "%0aInjected:1", "\rInjected:1", "\nInjected:1", "\0", "%00")
        breaks += ("%E5%98%8A%E5%98%8DInjected:1", "\u560a\u560dInjected:1", "\u2028Injected:1")
        breaks += ("\x85Injected:1", "\r\n Injected:1")
        with server.intercept():
            for text in breaks:
                for request in (
                    f"GET /feed.xml{text} HTTP/1.0\r\n\r\n",
                    f"GET /feed.xml?{text} HTTP/1.0\r\n\r\n",
                    f"GET http://example.com{text}/feed.xml HTTP/1.0\r\n\r\n",
                    f"GET http://example.com:80{text}/feed.xml HTTP/1.0\r\n\r\n",
                    f"GET http://{text}@example.com/feed.xml HTTP/1.0\r\n\r\n",
                    f"GET /feed.xml HTTP/1.0\r\nHost: example.com{text}\r\n\r\n",
                    f"GET{text} /feed.xml HTTP/1.0\r\n\r\n",
                    f"CONNECT a{text}:443 HTTP/1.0\r\n\r\nGET /feed.xml HTTP/1.0\r\n\r\n",
                    f"OPTIONS {text} HTTP/1.0\r\n\r\n",
                ):
                    with self.subTest(request):
                        found = self.head(exchange(server, request.encode()))
                        self.assertIn("date", found)
                        self.assertLessEqual(found, right | {"allow"})
            wire = exchange(server, b"GET http://example.com:8/feed.xml HTTP/1.0\r\n\r\n")
        self.assertEqual(self.head(wire), right)
        self.assertIn(b"\r\nLocation: http://example.com:8/x\r\nX: example.com 8\r\n", wire)

    def test_a_callable_that_hands_a_line_break_on(self):
        server = self.serve()
        server.respond("/\r\nInjected: 1", lambda request: Response(headers={"X": request.path}))
        wire = exchange(server, b"GET /%0d%0aInjected:%201 HTTP/1.0\r\n\r\n")
        self.assertNotIn("injected", self.head(wire))
        self.assertEqual(Answer(wire).status, 500)
        self.assertIn(
            "it takes a field name, a colon, and a value without control", server.errors[0]
        )


# Life cycle


class LifeCycleTest(ServerTestCase):
    #: For the beginning of a script.
    TAKE_DESCRIPTORS = """
        import os, resource
        def take_descriptors():
            files = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
            try:
                while True:
                    files.append(open(os.devnull))
            except OSError:
                return files
    """

    def setUp(self):
        super().setUp()
        self.threads = set(threading.enumerate())

    def assert_no_thread_is_left(self):
        self.assertEqual(set(threading.enumerate()) - self.threads, set())

    def assert_gone(self, server):
        self.assertFalse(server.is_alive())
        self.assertFalse(server.ready)
        self.assert_no_thread_is_left()
        self.assert_refused(server)

    def assert_refused(self, server):
        with self.assertRaises(ConnectionRefusedError):
            connect(server).close()

    def connect_until_refused(self, server):
        """Return when stop(), which another thread calls, has closed the port."""
        with contextlib.suppress(ConnectionError):
            while True:
                connect(server).close()

    def make_room(self, descriptors):
        """Let this process have so many descriptors for the time of the test."""
        if not importlib.util.find_spec("resource"):
            return
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if resource.RLIM_INFINITY not in (now, most) and most < descriptors:
            self.skipTest(f"this system allows no more than {most} descriptors")
        if now != resource.RLIM_INFINITY and now < descriptors:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, most))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (now, most))

    def test_with(self):
        with FeedTestServer(self.make_directory()) as server:
            self.assertTrue(server.ready)
            self.assertEqual(server.base_url, f"http://127.0.0.1:{server.port}")
            self.assertIsInstance(server, threading.Thread)
        self.assert_gone(server)

    def test_errors_of_the_server_are_raised_at_the_end(self):
        def fail(request):
            raise AssertionError("no token was sent")

        directory = self.make_directory({"wrong.xml": b"<!-- Status: x -->"})
        for target, words in (
            ("/wrong.xml", "wrong.xml, line 1: Status: found 'x'"),
            ("/failing", "GET /failing: ZeroDivisionError('division by zero')"),
            ("/asserting", "GET /asserting: AssertionError('no token was sent')"),
            ("http://a.example/x", "GET http://a.example/x: no such host here"),
        ):
            with self.subTest(target):
                with (
                    self.assertRaises(AssertionError) as caught,
                    FeedTestServer(directory) as server,
                    server.intercept(),
                ):
                    server.respond("/failing", lambda request: 1 / 0)
                    server.respond("/asserting", fail)
                    exchange(server, f"GET {target} HTTP/1.0\r\n\r\n".encode())
                self.assertIs(type(caught.exception), AssertionError)
                first, second, *_ = str(caught.exception).splitlines()
                self.assertEqual(first, "the server found errors:")
                self.assertIn(words, second)
                self.assert_gone(server)

    def test_all_errors_are_raised_at_the_end_and_none_that_was_cleared(self):
        with self.assertRaises(AssertionError) as caught, FeedTestServer("") as server:
            for number in range(3):
                server.respond(f"/{number}", lambda request: 1 / 0)
                self.assertEqual(self.get(server, f"/{number}").status, 500)
                if not number:
                    server.clear()
            server.stop()
        found = re.findall("(?m)^GET (.*): ZeroDivisionError", str(caught.exception))
        self.assertEqual(found, ["/1", "/2"])

    def test_errors_that_come_while_it_stops_are_raised_too(self):
        entered = threading.Event()

        def step(request):
            entered.set()
            self.connect_until_refused(server)
            raise ZeroDivisionError

        with socket.socket() as connection:
            words = r"^the server found errors:\nGET /: ZeroDivisionError"
            server = FeedTestServer("", stop_timeout=PATIENCE)
            with self.assertRaisesRegex(AssertionError, words), server:
                server.respond("/", step)
                connection.connect(("127.0.0.1", server.port))
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                self.assertTrue(entered.wait(PATIENCE))
        self.assert_gone(server)

    def test_an_exception_of_the_test_comes_before_errors_of_the_server(self):
        class Frozen(Exception):
            """As attrs makes them: what a traceback shows may be set, but for notes."""

            def __setattr__(self, name, value):
                if name == "__notes__":
                    raise AttributeError(name)
                super().__setattr__(name, value)

        class Empty(Exception):
            """As those that hold others."""

            def __len__(self):
                return 0

        for error in (
            *(AssertionError("mine"), KeyError("mine", 2), KeyboardInterrupt(), SystemExit(3)),
            *(unittest.SkipTest("later"), Frozen("mine"), Empty("mine")),
        ):
            arguments = error.args
            with self.subTest(repr(error)):
                with self.assertRaises(type(error)) as caught, FeedTestServer("") as server:
                    cause_an_error(server)
                    raise error
                self.assertIs(caught.exception, error)
                self.assertEqual((error.args, error.__cause__), (arguments, None))
                # Before 3.11, traceback shows no context of an exception that counts as false.
                if not isinstance(error, Frozen if sys.version_info >= (3, 11) else Empty):
                    words = "the server found errors:\nGET /wrong: ZeroDivisionError"
                    self.assertIn(words, shown(error))
                self.assert_gone(server)

    def test_an_exception_of_the_test_gets_no_note_where_there_are_no_errors(self):
        error = KeyError("mine")
        with self.assertRaises(KeyError) as caught, FeedTestServer("") as server:
            cause_an_error(server)
            server.clear()
            raise error
        self.assertIs(caught.exception, error)
        self.assertFalse(hasattr(error, "__notes__"))
        self.assert_gone(server)

    def test_a_stop_that_fails_hides_neither_an_exception_nor_errors(self):
        """They are told together: at the end of ``with``, or as a note of what is on its way."""
        for error, is_wrong, expected in (
            (None, False, RuntimeError),
            (KeyError("mine"), False, KeyError),
            (None, True, AssertionError),
            (KeyError("mine"), True, KeyError),
        ):
            entered, release = threading.Event(), threading.Event()
            self.addCleanup(release.set)

            def block(request, entered=entered, release=release):
                entered.set()
                release.wait(PATIENCE)
                return 204

            server = FeedTestServer("", stop_timeout=0.01)
            with self.subTest(error, is_wrong=is_wrong), socket.socket() as connection:
                with self.assertRaises(expected) as caught, server:
                    if is_wrong:
                        server.respond("/wrong", lambda request: 1 / 0)
                        self.get(server, "/wrong")
                    server.respond("/x", block)
                    connection.connect(("127.0.0.1", server.port))
                    connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
                    self.assertTrue(entered.wait(PATIENCE))
                    if error:
                        raise error
                text = shown(caught.exception)
                self.assertIn("responds to GET /x; it has to return by itself", text)
                if error:
                    self.assertIs(caught.exception, error)
                    self.assertIn("KeyError: 'mine'", text)
                if is_wrong:
                    told = "the server found errors:\nGET /wrong: ZeroDivisionError"
                    self.assertIn(told, text)
                release.set()
                server.stop_timeout = PATIENCE
                server.stop()
                self.assert_gone(server)

    def test_stop_is_idempotent(self):
        server = FeedTestServer(self.make_directory())
        server.stop()
        server.start()
        server.stop()
        server.stop()
        self.assert_gone(server)

    def test_started_once_only(self):
        server = self.serve()
        for _ in range(2):
            with self.assertRaisesRegex(RuntimeError, "a server is started once only"):
                server.start()
            server.stop()
        self.assert_gone(server)

    def test_started_by_two_at_once(self):
        def start():
            try:
                server.start()
            except RuntimeError as error:
                errors.append(f"{error}")

        def server_bind(httpd):
            other.start()  # which may be done once only
            bind(httpd)

        server, errors = FeedTestServer(self.make_directory()), []
        self.addCleanup(server.stop)
        other, bind = threading.Thread(target=start), StoppableHttpServer.server_bind
        with mock.patch.object(StoppableHttpServer, "server_bind", server_bind):
            server.start()
            other.join()
        self.assertEqual(errors, ["a server is started once only; make a new FeedTestServer"])
        self.get(server, "/")
        server.stop()
        self.assert_gone(server)

    @unittest.skipUnless(importlib.util.find_spec("resource"), "no limit can be set here")
    def test_started_without_descriptors(self):
        """Nothing is imported on first use then: its file could not be opened."""
        script = """
        import socket, sys, feedtestserver
        server = feedtestserver.FeedTestServer(sys.argv[1])
        connections = [socket.socket() for _ in range(3)]
        files = take_descriptors()
        while not server.ready:
            try:
                server.start()
            except OSError as error:
                print(error.errno)
                files.pop().close()
        address = "127.0.0.1", server.port
        for each in connections:
            each.connect(address)
        for each in files + connections:
            each.close()
        with socket.create_connection(address, 20) as connection:
            connection.sendall(b"QUIT / HTTP/1.0\\r\\n\\r\\n")
            print(connection.recv(12))
        """
        done = run_script(self.TAKE_DESCRIPTORS + script, self.make_directory())
        self.assertEqual(done.stderr, "")
        *errors, last = done.stdout.splitlines()
        self.assertEqual((set(errors), last), ({f"{errno.EMFILE}"}, "b'HTTP/1.1 200'"))

    def test_a_handler_class_of_another_kind(self):
        for kind in (SimpleHTTPRequestHandler, FeedTestServer, 5, None):
            server = FeedTestServer("")
            server.handler_class = kind
            words = "^handler_class: found .*; it takes a subclass of FeedTestRequestHandler$"
            with self.subTest(kind), self.assertRaisesRegex(TypeError, words):
                server.start()
            self.assertEqual((server.ready, server.is_alive()), (False, False))
            self.assert_no_thread_is_left()
            server.handler_class = FeedTestRequestHandler
            with server:
                self.assertEqual(self.get(server, "/").status, 404)

    def test_missing_directory(self):
        directory = self.make_directory({"file": b""})
        for name, error in (("none", FileNotFoundError), ("file", NotADirectoryError)):
            server = FeedTestServer(directory / name)
            with self.assertRaisesRegex(error, "there is no such directory to serve.*" + name):
                server.start()
            server.stop()
        self.change_directory(directory)
        with self.assertRaisesRegex(FileNotFoundError, "no such directory to serve.*data"):
            FeedTestServer("data").start()
        self.assert_no_thread_is_left()

    def test_the_directory_by_default(self):
        """It is data in the current directory, if there is such a folder when it is made."""
        with_data, with_file, empty = map(
            self.make_directory, ({"data/feed.xml": b""}, {"data": b""}, {})
        )
        self.change_directory(HERE)
        for folder, arguments, directory in (
            (with_data, (), with_data / "data"),
            (with_data, (None,), with_data / "data"),
            (with_data, ("data",), with_data / "data"),
            (with_data, ("",), None),
            (with_file, (), None),
            (empty, (), None),
        ):
            os.chdir(folder)
            server = FeedTestServer(*arguments)
            os.chdir(HERE)
            with self.subTest(folder=os.listdir(folder), arguments=arguments), server:
                self.assertEqual(server.directory or None, directory and str(directory))
                names = [fixture.name for fixture in server.fixtures()]
                self.assertEqual(names, ["feed.xml"] if directory else [])
                status = self.get(server, "/feed.xml").status
                self.assertEqual(status, 200 if directory else 404)

    def test_keywords_are_attributes(self):
        for values in (
            {"host": "127.0.0.1", "port": 0, "bind_timeout": 10.0, "stop_timeout": 5.0},
            {"host": "0.0.0.0", "port": 1, "bind_timeout": 2.5, "stop_timeout": 0.5},
        ):
            server = FeedTestServer("", clock=lambda: NOW, **values)
            self.assertEqual({name: getattr(server, name) for name in values}, values)
            self.assertEqual(server.clock(), NOW)
        self.assertEqual(
            (FeedTestServer().host, FeedTestServer().port, FeedTestServer().bind_timeout),
            ("127.0.0.1", 0, 10.0),
        )
        self.assertEqual((FeedTestServer().stop_timeout, FeedTestServer().clock), (5.0, time.time))
        with FeedTestServer("", clock=lambda: NOW) as server:
            self.assertEqual(self.get(server, "/").headers["Date"], NOW_DATE)
            server.clock, server.stop_timeout = (lambda: NOW + 1), 2.5
            self.assertEqual(
                self.get(server, "/").headers["Date"], NOW_DATE.replace(":00 ", ":01 ")
            )
            self.assertEqual([request.time for request in server.requests], [NOW, NOW + 1])
            self.assertEqual(server.stop_timeout, 2.5)

    def test_timeouts_are_seconds(self):
        server = self.serve()
        self.get(server, "/x")

        def wait(timeout):
            self.assertEqual([server.wait_for_request("/x", timeout=timeout)], server.requests)

        setters = [("timeout", wait)]
        for name in ("bind_timeout", "stop_timeout"):
            setters.append((name, functools.partial(setattr, server, name)))
            setters.append((name, lambda value, name=name: FeedTestServer(**{name: value})))
        for name, set_it in setters:
            for value in (0, 0.5, -1, INFINITY, 1e308):
                with self.subTest(name, value=value):
                    set_it(value)
            for value in ("5", True, float("nan"), *([] if name == "timeout" else [None])):
                words = f"^{name}: found {value!r}; it takes a number of seconds$"
                with self.subTest(name, value=value), self.assertRaisesRegex(ValueError, words):
                    set_it(value)

    def test_the_longest_timeouts(self):
        for seconds in (INFINITY, 1e308):
            options = {"bind_timeout": seconds, "stop_timeout": seconds}
            with self.subTest(seconds), FeedTestServer("", **options) as server:
                fetching = threading.Thread(target=self.get, args=(server, "/x"))
                fetching.start()
                self.assertEqual(server.wait_for_request("/x", timeout=seconds).path, "/x")
                fetching.join()
                with server.down():
                    self.assert_refused(server)
            self.assert_gone(server)

    def test_a_server_that_runs_no_test_code_needs_no_stop_timeout(self):
        for seconds in (0, -1):
            server = self.serve(stop_timeout=seconds)
            with connect(server):
                with server.down():
                    self.assert_refused(server)
                self.assertEqual(self.get(server, "/").status, 404)
                server.stop()
            self.assert_gone(server)

    def test_where_it_is_and_what_it_serves_is_set_before_start(self):
        settings = {"directory": str(HERE), "host": "0.0.0.0", "port": 1}

        def check(moment):
            before = {name: getattr(server, name) for name in settings}
            for name, value in settings.items():
                words = rf"(?s)(?=.*\b{name}\b).*start\(\)"
                with self.subTest(moment, name=name):
                    with self.assertRaisesRegex(RuntimeError, words):
                        setattr(server, name, value)
                    self.assertEqual(getattr(server, name), before[name])

        server = FeedTestServer(self.make_directory() / "none", host="192.0.2.1")
        self.addCleanup(server.stop)
        with self.assertRaises(OSError):
            server.start()
        server.directory, server.host, server.port, server.bind_timeout = "", "127.0.0.1", 0, 2.0
        server.start()
        check("running")
        with server.down():
            check("down")
        server.stop()
        check("stopped")

    def test_directory_is_made_absolute_at_once(self):
        self.assertEqual(FeedTestServer("x").directory, os.path.join(os.getcwd(), "x"))

    def test_no_url_before_start(self):
        with self.assertRaisesRegex(RuntimeError, r"start\(\) must be called first"):
            FeedTestServer().get_url("x")

    def test_port_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = FeedTestServer(self.make_directory(), port=port, bind_timeout=0)
            with self.assertRaisesRegex(OSError, f"cannot bind 127.0.0.1:{port}: ") as caught:
                server.start()
            self.assertEqual(caught.exception.errno, errno.EADDRINUSE)
        server.start()
        server.stop()
        self.assert_gone(server)

    def test_other_errors_are_not_tried_again(self):
        server = FeedTestServer(self.make_directory(), host="192.0.2.1", bind_timeout=1000)
        self.addCleanup(server.stop)  # a system may let it have any address
        with self.assertRaises(OSError) as caught:
            server.start()
        self.assertEqual(caught.exception.errno, errno.EADDRNOTAVAIL)

    def test_down_keeps_port_script_and_record(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        server.respond("/x", 201, 202, 203)
        self.assertEqual(self.get(server, "/x").status, 201)
        cause_an_error(server)
        where = server.base_url, server.port, server.ca_file, server.get_url("x", "https")
        with connect(server) as idle, connect(server) as half, connect(server) as kept:
            half.sendall(b"GET / HT")
            kept.sendall(HEAD + b"\r\n")
            self.assertTrue(kept.recv(65536).endswith(b"<rss/>"))
            record, errors = server.requests, server.errors
            with server.down():
                self.assertEqual((server.ready, server.is_alive()), (False, True))
                self.assert_refused(server)
                for connection in (idle, half, kept):
                    self.assertEqual(read_all(connection), b"")
                self.assertEqual(
                    (server.base_url, server.port, server.ca_file, server.get_url("x", "https")),
                    where,
                )
                self.assertTrue(os.path.exists(server.ca_file))
                self.assertEqual((server.requests, server.errors), (record, errors))
        self.assertTrue(server.ready)
        self.assertEqual(self.get(server, "/x").status, 202)
        self.assertEqual((server.requests[:-1], server.errors), (record, errors))
        numbers = [request.connection for request in server.requests]
        self.assertEqual((len(set(numbers)), numbers[-1]), (4, max(numbers)))
        self.assertEqual(
            (server.base_url, server.port, server.ca_file, server.get_url("x", "https")), where
        )
        self.assertTrue(os.path.exists(server.ca_file))
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
            context = ssl.create_default_context(cafile=server.ca_file)
            with context.wrap_socket(connection, server_hostname="localhost") as connection:
                connection.sendall(LAST)
                self.assertTrue(read_all(connection).endswith(b"<rss/>"))
        server.stop()
        self.assert_gone(server)
        self.assertFalse(os.path.exists(where[2]))

    def test_down_ends_whatever_takes_its_time(self):
        server = self.serve({"a.bin": bytes(20_000_000)})
        server.respond("/late", Response(delay=1000))
        server.respond("/slow", Response(bytes(1000), rate=1))
        server.respond("/stalled", Response(fault="stall at headers"))
        paths = ("/a.bin", "/late", "/slow", "/stalled")
        with contextlib.ExitStack() as opened:
            connections = [opened.enter_context(connect(server)) for _ in paths]
            for path, connection in zip(paths, connections):
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                server.wait_for_request(path)
            with server.down():
                for connection in connections:
                    with contextlib.suppress(ConnectionError):
                        self.assertLess(len(read_all(connection)), 20_000_000)
        self.assertEqual(self.get(server, "/none").status, 404)

    def test_down_ten_times_in_a_row(self):
        server = self.serve()
        with server.down():
            before = open_descriptors()
        for _ in range(10):
            self.assertEqual(self.get(server, "/").status, 404)
            with server.down():
                self.assertFalse(server.ready)
        with server.down():
            self.assert_refused(server)
            self.assertEqual(open_descriptors(), before)
            self.assertEqual(set(threading.enumerate()) - self.threads, {server})
        server.stop()
        self.assert_gone(server)
        self.assertEqual(len({request.connection for request in server.requests}), 10)

    def test_down_needs_a_server_that_is_running(self):
        server = FeedTestServer("")
        self.addCleanup(server.stop)
        words = r"down\(\) needs a server that is running: "
        with self.assertRaisesRegex(RuntimeError, words + r"call start\(\) f"), server.down():
            self.fail("it was entered before start()")
        server.start()
        with server.down():
            with self.assertRaisesRegex(RuntimeError, words + "it is down"), server.down():
                self.fail("it was entered twice")
            self.assertFalse(server.ready)
            self.assert_refused(server)
        self.assertEqual(self.get(server, "/").status, 404)
        server.stop()
        with self.assertRaisesRegex(RuntimeError, words + "it has stopped"), server.down():
            self.fail("it was entered after stop()")
        self.assert_gone(server)

    def test_stop_while_it_is_down_is_final(self):
        def in_the_block(server):
            server.stop()
            self.assert_gone(server)

        def in_another_thread(server):
            run_at_once([server.stop] * 3)

        for stop in (in_the_block, in_another_thread):
            server = self.serve()
            path = server.ca_file
            with self.subTest(stop.__name__):
                with server.down():
                    stop(server)
                    self.assertFalse(os.path.exists(path))
                self.assert_gone(server)
                self.assertEqual(server.errors, [])
        with FeedTestServer("") as server, server.down():
            server.stop()
        self.assert_gone(server)

    def test_an_exception_while_it_is_down(self):
        server = self.serve()
        for error in (KeyError("mine"), KeyboardInterrupt(), GeneratorExit()):
            with self.subTest(repr(error)):
                with self.assertRaises(type(error)) as caught, server.down():
                    raise error
                self.assertIs(caught.exception, error)
                self.assertIsNone(error.__context__)
                self.assertEqual(self.get(server, "/").status, 404)

    def test_no_other_server_gets_the_port_while_it_is_down(self):
        server = self.serve()
        with connect(server):
            exchange(server, LAST)
            with (
                server.down(),
                self.assertRaises(OSError) as caught,
                FeedTestServer("", port=server.port, bind_timeout=0),
            ):
                self.fail("another server has the port")
            self.assertIn(caught.exception.errno, (errno.EADDRINUSE, errno.EACCES))
            self.assertEqual(self.get(server, "/").status, 404)
            server.stop()
            if os.name != "nt":  # where a port may be in use while its connections end
                with FeedTestServer("", port=server.port, bind_timeout=0) as another:
                    self.assertEqual(self.get(another, "/").status, 404)

    def test_the_port_is_taken_when_it_goes_down(self):
        def server_bind(httpd):
            if not taken:
                taken.append(socket.create_server(("127.0.0.1", server.port)))
                self.addCleanup(taken[0].close)
            bind(httpd)

        server, bind, taken = self.serve(bind_timeout=0), StoppableHttpServer.server_bind, []
        with (
            mock.patch.object(StoppableHttpServer, "server_bind", server_bind),
            self.assertRaisesRegex(OSError, f"cannot bind 127.0.0.1:{server.port}: ") as caught,
            server.down(),
        ):
            self.fail("it was entered without the port")
        self.assertIn(caught.exception.errno, (errno.EADDRINUSE, errno.EACCES))
        self.assertFalse(server.ready)
        taken[0].close()
        server.stop()
        self.assert_gone(server)

    def test_down_waits_for_test_code(self):
        server, entered, returned = self.serve(), threading.Event(), []

        def step(request):
            entered.set()
            self.connect_until_refused(server)
            returned.append(request)
            return 204

        server.respond("/", step)
        server.stop_timeout = PATIENCE
        with connect(server) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(entered.wait(PATIENCE))
            with server.down():
                self.assertEqual(len(returned), 1)
        self.assertEqual(self.get(server, "/none").status, 404)
        self.assertEqual(server.errors, [])

    def test_down_keeps_the_port_while_it_waits_for_test_code(self):
        """Else a client that connects again and again may get it as a port of its own."""
        server, entered, refused = self.serve(), threading.Event(), []

        def step(request):
            entered.set()
            self.connect_until_refused(server)
            end = time.monotonic() + PATIENCE
            while not refused and time.monotonic() < end:
                with socket.socket() as client:
                    try:
                        client.bind(("127.0.0.1", server.port))
                    except OSError as error:
                        refused.append(error.errno)
            return 204

        server.respond("/", step)
        server.stop_timeout = 2 * PATIENCE
        with connect(server) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(entered.wait(PATIENCE))
            close_by_reset(connection)  # else the system keeps the port for a while
        with server.down():
            self.assertEqual(len(refused), 1)
        self.assertEqual(self.get(server, "/none").status, 404)

    def test_down_names_the_test_code_that_runs(self):
        server, entered, release = self.serve(), threading.Event(), threading.Event()
        self.addCleanup(release.set)
        words = r"waited 0.01 s for the test code that responds to GET /slow\?x=1; it has to return"
        server.stop_timeout = 0.01
        server.respond("/slow", lambda request: (entered.set(), release.wait(PATIENCE), 204)[-1])
        with connect(server) as connection:
            connection.sendall(b"GET /slow?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(entered.wait(PATIENCE))
            with self.assertRaisesRegex(RuntimeError, words), server.down():
                self.fail("it was entered")
            self.assertTrue(server.ready)
            self.assertEqual(self.get(server, "/none").status, 404)
            release.set()
            server.stop_timeout = PATIENCE
            with server.down():
                self.assert_refused(server)
        self.assertEqual(self.get(server, "/none").status, 404)
        server.stop()
        self.assert_gone(server)
        self.assertEqual(server.errors, [])

    def test_test_code_that_outlives_a_down_that_fails_is_still_waited_for(self):
        server, entered, release = self.serve(), threading.Event(), threading.Event()
        self.addCleanup(release.set)
        server.stop_timeout = 0.01
        server.respond("/x", lambda request: (entered.set(), release.wait(PATIENCE), 204)[-1])
        with connect(server) as connection:
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(entered.wait(PATIENCE))
            for _ in range(2):
                with self.assertRaisesRegex(RuntimeError, "GET /x; it has to"), server.down():
                    self.fail("it was entered")
            with self.assertRaisesRegex(RuntimeError, "GET /x; it has to return by itself"):
                server.stop()
        self.connect_until_refused(server)
        release.set()
        server.stop_timeout = PATIENCE
        server.stop()
        self.assert_gone(server)

    def test_down_from_inside_a_callable(self):
        """The server is there again at once, though the callable goes on."""
        server, statuses, ended = self.serve(), [], threading.Event()

        def step(request):
            try:
                with server.down():
                    self.assert_refused(server)
                statuses.append(self.get(server, "/none").status)
            finally:
                ended.set()
            return 204

        server.respond("/", step)
        server.stop_timeout = PATIENCE
        with connect(server) as idle:
            with contextlib.suppress(ConnectionError):
                self.get(server, "/")
            self.assertTrue(ended.wait(2 * PATIENCE))
            self.assertEqual(read_all(idle), b"")
        self.assertEqual(statuses, [404])
        self.assertEqual(self.get(server, "/none").status, 404)
        server.stop()
        self.assert_gone(server)
        self.assertEqual(server.errors, [])

    def test_test_code_that_goes_on_after_its_own_down_is_still_waited_for(self):
        server, entered, release = self.serve(), threading.Event(), threading.Event()
        self.addCleanup(release.set)

        def step(request):
            with server.down():
                pass
            entered.set()
            release.wait(PATIENCE)
            return 204

        server.respond("/x", step)
        with connect(server) as connection:
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(entered.wait(PATIENCE))
            server.stop_timeout = 0.01
            with self.assertRaisesRegex(RuntimeError, "GET /x; it has to return by itself"):
                server.stop()
        release.set()
        server.stop_timeout = PATIENCE
        server.stop()
        self.assert_gone(server)

    def test_a_callable_that_stops_a_server_that_it_had_down(self):
        def step_before(request):
            with server.down():
                pass
            server.stop()
            ended.set()
            return 204

        def step_meanwhile(request):
            with server.down():
                server.stop()
            ended.set()
            return 204

        for step in (step_before, step_meanwhile):
            server, ended = self.serve(), threading.Event()
            server.respond("/", step)
            with self.subTest(step.__name__):
                with contextlib.suppress(ConnectionError):
                    self.get(server, "/")
                self.assertTrue(ended.wait(PATIENCE))
                server.stop()
                self.assert_gone(server)
                self.assertEqual(server.errors, [])

    def test_down_from_ten_threads(self):
        server, seen = self.serve(), []

        def go_down():
            with contextlib.suppress(RuntimeError), server.down():  # another one may be inside
                seen.append(server.ready)

        run_at_once([go_down] * 10)
        self.assertEqual(set(seen), {False})
        self.assertEqual(self.get(server, "/").status, 404)
        server.stop()
        self.assert_gone(server)

    def test_stop_while_it_goes_down_or_returns(self):
        def go_down(server):
            with contextlib.suppress(RuntimeError):  # it has stopped
                for _ in range(3):
                    with server.down():
                        pass

        for _ in range(20):
            server = self.serve()
            run_at_once([functools.partial(go_down, server), server.stop])
            self.assertEqual((server.ready, server.is_alive()), (False, False))
        self.assert_gone(server)

    def test_its_thread_lives_while_it_is_down(self):
        server = self.serve()
        joining = threading.Thread(target=server.join)
        joining.start()
        with server.down():
            server.join(0.001)
            self.assertTrue(server.is_alive())
            with self.assertRaises(ConnectionRefusedError):
                stop_server(server.port)
        self.assertTrue(joining.is_alive())
        stop_server(server.port)
        joining.join(PATIENCE)
        self.assertFalse(joining.is_alive())
        server.stop()
        self.assert_gone(server)

    def test_leaked_sockets_are_collected(self):
        class Leak:
            def __init__(self):
                self.me = self
                self.socket = socket.create_server(("127.0.0.1", 0))
                self.port = self.socket.getsockname()[1]

            def __del__(self):
                self.socket.close()

        gc.disable()
        self.addCleanup(gc.enable)
        port = Leak().port
        with FeedTestServer(self.make_directory(), port=port, bind_timeout=PATIENCE) as server:
            self.assertEqual(server.port, port)

    def test_stop_ends_connections_of_all_kinds(self):
        server = self.serve({"a.bin": bytes(20_000_000)})
        idle, half, body, unread, kept = (connect(server) for _ in range(5))
        half.sendall(b"GET / HT")
        body.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        unread.sendall(b"GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        kept.sendall(b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for_request("/a.bin")
        server.wait_for_request("/none")
        server.stop()
        for connection in (idle, half, body, unread, kept):
            with contextlib.closing(connection), contextlib.suppress(ConnectionError):
                read_all(connection)
        self.assert_gone(server)
        self.assertEqual(len(server.requests), 2)

    def test_stop_ends_300_idle_connections(self):
        self.make_room(1000)
        server = self.serve({"feed.xml": b"<rss/>"})
        with contextlib.ExitStack() as opened:
            connections = [opened.enter_context(connect(server)) for _ in range(300)]
            for connection in connections[::2]:  # these are kept alive
                connection.sendall(HEAD + b"\r\n")
                connection.recv(65536)
            self.assertEqual(self.get(server, "/feed.xml").status, 200)
            server.stop()
            self.assert_gone(server)
            for connection in connections:
                self.assertEqual(read_all(connection), b"")

    def test_only_test_code_takes_threads(self):
        def note(thread):
            started.append(thread)
            start(thread)

        files = {"feed.xml": b"<rss/>", "delay.xml": comment("Delay: 86400")}
        files.update({"rate.xml": comment("Rate: 1"), "stall.xml": comment("Fault: stall")})
        server, started, start = self.serve(files), [], threading.Thread.start
        server.respond("/status", 204)
        server.respond("/callable", lambda request: 204)
        with (
            contextlib.ExitStack() as opened,
            mock.patch.object(threading.Thread, "start", note),
        ):
            for name in (*files, "status", "none") * 5:
                connection = opened.enter_context(connect(server))
                connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            server.wait_for_request(times=30, timeout=PATIENCE)
            self.assertEqual(started, [])
            self.assertEqual(self.get(server, "/callable").status, 204)
            self.assertEqual(len(started), 1)
            server.stop()
            self.assertEqual(len(started), 1)
        self.assert_gone(server)

    def test_twenty_callables_at_once(self):
        all_of_them = threading.Barrier(20)

        def step(request):
            all_of_them.wait(PATIENCE)
            return 204

        def fetch():
            statuses.append(self.get(server, "/").status)

        server, statuses = self.serve(), []
        server.respond("/", step)
        run_at_once([fetch] * 20)
        self.assertEqual(statuses, [204] * 20)
        server.stop()
        self.assert_gone(server)

    def test_stop_from_ten_threads(self):
        server = self.serve()
        run_at_once([server.stop] * 10)
        self.assert_gone(server)

    def test_stop_names_the_test_code_that_runs(self):
        entered, release = threading.Semaphore(0), threading.Event()
        self.addCleanup(release.set)

        def block(request):
            entered.release()
            release.wait(PATIENCE)
            return 200

        class Handler(FeedTestRequestHandler):
            def do_POST(self):
                self.reply(Response(status=block(self.received)))

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve(server_class=Server)
        server.stop_timeout = 0.01
        server.respond("/slow", block)
        with connect(server) as first, connect(server) as second:
            first.sendall(b"GET /slow?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(entered.acquire(timeout=PATIENCE))
            second.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            self.assertTrue(entered.acquire(timeout=PATIENCE))
            for _ in range(2):
                with self.assertRaisesRegex(
                    RuntimeError,
                    r"^stop\(\) waited 0.01 s for the test code that responds to"
                    r" GET /slow\?x=1, POST /x; it has to return by itself$",
                ):
                    server.stop()
                self.connect_until_refused(server)
                self.assertEqual((read_all(first), read_all(second)), (b"", b""))
            release.set()
            server.stop_timeout = PATIENCE
            server.stop()
        self.assert_gone(server)
        self.assertEqual(server.errors, [])

    def test_stop_while_it_starts(self):
        class Server(FeedTestServer):
            def run(self):
                stopping.start()
                begun.set()
                test.connect_until_refused(self)
                super().run()

        test, begun = self, threading.Event()
        server = Server(self.make_directory())
        stopping = threading.Thread(target=server.stop)
        server.start()
        self.assertTrue(begun.wait(PATIENCE))
        stopping.join()
        self.assert_gone(server)

    def test_stop_that_is_interrupted_and_called_again(self):
        """By Ctrl-C, while it waits for a callable."""
        if threading.current_thread() is not threading.main_thread():
            self.skipTest("only the main thread is interrupted by signals")
        if not hasattr(signal, "pthread_kill"):
            self.skipTest("a signal wakes no waiting thread here")

        def interrupt(*_):
            if not interrupted.is_set():
                interrupted.set()
                raise KeyboardInterrupt

        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, interrupt))
        main, entered, interrupted = threading.get_ident(), threading.Event(), threading.Event()
        caught = threading.Event()
        self.addCleanup(caught.set)
        self.addCleanup(interrupted.set)

        def step(request):
            entered.set()
            self.connect_until_refused(server)
            # A signal is lost on a thread that is just about to wait.
            while not interrupted.wait(0.05):
                signal.pthread_kill(main, signal.SIGINT)
            caught.wait(PATIENCE)
            return 200

        server = self.serve()
        server.respond("/", step)
        server.stop_timeout = PATIENCE
        with connect(server) as idle, connect(server) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(entered.wait(PATIENCE))
            with self.assertRaises(KeyboardInterrupt):
                server.stop()
            caught.set()
            server.stop()
            self.assert_gone(server)
            self.assertEqual((read_all(idle), read_all(connection)), (b"", b""))

    def test_stop_by_another_thread_while_it_starts(self):
        server = FeedTestServer(self.make_directory())
        stopping, bind = threading.Thread(target=server.stop), StoppableHttpServer.server_bind

        def server_bind(httpd):
            bind(httpd)
            stopping.start()

        with mock.patch.object(StoppableHttpServer, "server_bind", server_bind):
            server.start()
        stopping.join()
        self.assert_gone(server)

    def test_a_client_that_has_gone_when_it_is_accepted(self):
        accept = StoppableHttpServer.get_request

        def get_request(httpd):
            connection, address = accept(httpd)
            if gone:
                close_by_reset(gone.pop())
            return connection, address

        with mock.patch.object(StoppableHttpServer, "get_request", get_request):
            server, gone = self.serve({"feed.xml": b"<rss/>"}), []
            for sent in (b"", b"GET / HT", HEAD + b"\r\n", b"\x16\x03\x01"):
                client = socket.socket()
                client.bind(("127.0.0.1", 0))
                gone.append(client)
                client.connect(("127.0.0.1", server.port))
                with self.subTest(sent), contextlib.suppress(OSError):
                    client.sendall(sent)
                self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")
            self.assertEqual(gone, [])
            server.stop()
        self.assert_gone(server)
        self.assertEqual(server.errors, [])

    def test_stop_from_two_callables(self):
        server = self.serve()
        both = threading.Barrier(2)

        def step(request):
            both.wait(PATIENCE)
            server.stop()
            return 200

        def fetch():
            with contextlib.suppress(ConnectionError):  # each ends the other's connection
                self.get(server, "/")

        server.respond("/", step)
        run_at_once([fetch] * 2)
        server.stop()
        self.assert_gone(server)
        self.assertEqual(server.errors, [])

    def test_no_file_is_made_by_a_server_that_stops(self):
        def read(server):
            with contextlib.suppress(RuntimeError):
                paths.append(server.ca_file)

        paths = []
        for _ in range(20):
            server = self.serve()
            run_at_once([functools.partial(read, server), server.stop])
        self.assertEqual([path for path in paths if os.path.exists(path)], [])

    @unittest.skipUnless(hasattr(signal, "SIGUSR1"), "there is no SIGUSR1 here")
    def test_stop_in_a_signal_handler_during_stop(self):
        script = """
        import os, signal, socket, threading
        from feedtestserver import FeedTestServer
        server, begun, signalled = FeedTestServer(), threading.Event(), threading.Event()
        def respond(request):
            begun.set()
            while server.ready:
                pass
            # The first stop() waits for this function until the second one has begun.
            while not signalled.wait(0.05):
                os.kill(os.getpid(), signal.SIGUSR1)
            return 204
        def stop(*arguments):
            if not signalled.is_set():
                signalled.set()
                server.stop()
                print("stopped")
        signal.signal(signal.SIGUSR1, stop)
        server.directory = "."
        server.start()
        server.respond("/", respond)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            begun.wait()
            server.stop()
        """
        done = run_script(script)
        self.assertEqual((done.stdout, done.stderr), ("stopped\n", ""))

    def test_stop_from_ten_threads_while_a_callable_runs(self):
        server = self.serve()
        entered = threading.Event()

        def step(request):
            entered.set()
            self.connect_until_refused(server)
            return 200

        server.respond("/", step)
        server.stop_timeout = PATIENCE
        with connect(server) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(entered.wait(PATIENCE))
            run_at_once([server.stop] * 10)
        self.assert_gone(server)

    def test_a_port_that_cannot_be(self):
        for port in (-1, 70000, 8.5, "80", True, None):
            words = f"port: found {port!r}; it takes a whole number from 0 to 65535"
            with self.assertRaisesRegex(ValueError, words):
                FeedTestServer(self.make_directory(), port=port)
        with self.assertRaisesRegex(ValueError, "host: found None; it takes an address"):
            FeedTestServer(self.make_directory(), host=None)

    def test_quit_from_ten_threads(self):
        server = self.serve()
        errors = []

        def stop():
            try:
                stop_server(server.port)
            except ConnectionRefusedError:
                pass
            except OSError as error:
                errors.append(error)

        run_at_once([stop] * 10)
        server.stop()
        self.assertEqual(errors, [])
        self.assert_gone(server)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    @unittest.skipIf(sys.version_info >= (3, 13), "no thread made before fork() starts after it")
    def test_started_in_a_forked_child(self):
        script = """
        import os, sys, feedtestserver
        server = feedtestserver.FeedTestServer(sys.argv[1])
        child = os.fork()
        if not child:
            server.start()
            server.stop()
            os._exit(server.is_alive())
        print(os.waitpid(child, 0)[1])
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.stdout, done.stderr), ("0\n", ""))

    def test_a_clock_that_fails_is_an_error(self):
        for clock, words in (
            (lambda: 1 / 0, "ZeroDivisionError"),
            (lambda: None, "TypeError"),
            (sys.exit, "SystemExit"),
            (lambda: float("nan"), "ValueError"),
            (lambda: INFINITY, "OverflowError"),
            (lambda: 253402300800.0, ""),  # the year 10000: a ValueError, on Windows an OSError
            (lambda: -1e18, ""),
        ):
            server = self.serve({"feed.xml": b"<rss/>"})
            server.clock = clock
            with self.subTest(words):
                self.assertEqual(self.get(server, "/feed.xml").status, 200)
                [error] = server.errors
                self.assertIn(f"the server's clock: {words}", error)

    def test_a_handler_that_exits_leaves_the_server_well(self):
        class Handler(FeedTestRequestHandler):
            def do_POST(self):
                sys.exit("from do_POST()")

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve({"feed.xml": b"<rss/>"}, Server)
        server.respond("/exit", lambda request: sys.exit("from a callable"))
        for method, path, words in (
            ("POST", "/feed.xml", "SystemExit('from do_POST()')"),
            ("GET", "/exit", "SystemExit('from a callable')"),
        ):
            with self.subTest(method):
                self.assertEqual(self.get(server, path, method).status, 500)
                self.assertIn(words, server.errors[-1])
                self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")

    def test_a_fault_of_the_server_itself_ends_it(self):
        """Callers that wait for a request are told so at once."""

        def fail(*arguments):
            raise ZeroDivisionError

        class Selector(selectors.DefaultSelector):
            def select(self, timeout=None):
                return fail() if failing else super().select(timeout)

        for owner, name, function in (
            (StoppableHttpServer, "get_request", fail),
            (selectors, "DefaultSelector", Selector),
        ):
            failing = []
            with (
                self.subTest(name),
                mock.patch.object(owner, name, function),
                contextlib.redirect_stderr(io.StringIO()),
                FeedTestServer(self.make_directory()) as server,
            ):
                failing.append(True)
                with contextlib.suppress(ConnectionError), connect(server) as connection:
                    read_all(connection)
                server.join(PATIENCE)
                with self.assertRaisesRegex(AssertionError, "before the server stopped"):
                    server.wait_for_request("/x", timeout=PATIENCE)
                server.stop()
                self.assert_gone(server)
                self.assertIsInstance(thread_errors.pop(), ZeroDivisionError)

    def test_stop_from_inside_a_callable(self):
        for seconds in (PATIENCE, *[0] * 5):
            server = self.serve(stop_timeout=seconds)

            def step(request, server=server):
                server.stop()
                return b"stopped"

            server.respond("/", step)
            with self.subTest(seconds):
                self.assertEqual(self.get(server, "/").content, b"stopped")
                server.stop_timeout = PATIENCE
                server.stop()
                self.assert_gone(server)

    def test_stop_from_inside_a_do_method(self):
        class Handler(FeedTestRequestHandler):
            def do_POST(self):
                self.test_server.stop()
                self.reply(Response(b"stopped"))

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve(server_class=Server)
        self.assertEqual(self.get(server, "/", "POST").content, b"stopped")
        server.stop()
        self.assert_gone(server)

    def test_stop_from_the_clock(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        server.clock = lambda: server.stop() or NOW
        with connect(server):
            self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")
            server.stop()
        self.assert_gone(server)
        self.assertEqual(server.errors, [])

    def test_quit(self):
        server = self.serve()
        with connect(server):
            stop_server(server.port)
            with self.assertRaises(ConnectionRefusedError):
                stop_server(server.port)
            server.join()
            server.stop()
        self.assert_gone(server)
        self.assertEqual(server.requests, [])

    def test_quit_is_not_for_steps(self):
        server = self.serve()
        server.respond("/", 200)
        stop_server(server.port)
        self.assertFalse(server.ready)

    def test_quit_waits_for_no_client(self):
        server = self.serve()
        with connect(server) as idle, connect(server) as connection:
            connection.sendall(b"QUIT / HTTP/1.1\r\nHost: x\r\n\r\n")
            server.join(PATIENCE)
            self.assertFalse(server.is_alive())
            self.assertEqual(Answer(read_all(connection)).body, b"the server stops\n")
            self.assertEqual(read_all(idle), b"")
        server.stop()
        self.assert_gone(server)

    def test_quit_waits_for_test_code(self):
        server = self.serve()
        server.respond("/", lambda request: stop_server(server.port) or b"stopped")
        with contextlib.suppress(ConnectionError):
            self.get(server, "/")
        server.stop()
        self.assert_gone(server)

    def test_quit_while_another_thread_stops_the_server(self):
        def join_later(httpd, timeout=None):
            if threading.current_thread() is server:  # it has closed the port
                other = threading.Thread(target=httpd.close_port, args=(True,))
                other.start()
                other.join()
            return join(httpd, timeout)

        server, join = self.serve(), StoppableHttpServer.join
        with mock.patch.object(StoppableHttpServer, "join", join_later):
            stop_server(server.port)
            server.join(PATIENCE)
        self.assert_gone(server)

    def test_quit_where_nobody_responds(self):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]

            def close():
                with listening.accept()[0] as connection:
                    connection.recv(65536)

            thread = threading.Thread(target=close)
            thread.start()
            words = f"^127.0.0.1:{port} did not respond to QUIT"
            with self.assertRaisesRegex(ConnectionError, words):
                stop_server(port)
            thread.join()

    def test_quit_where_the_other_end_is_silent(self):
        connect = socket.create_connection

        def connect_impatiently(address, timeout=None):
            self.assertEqual(timeout, 10)
            socket.create_connection = connect
            return connect(address, 0.01)

        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            impatiently = mock.patch.object(socket, "create_connection", connect_impatiently)
            with impatiently, self.assertRaisesRegex(ConnectionError, "did not respond to QUIT"):
                stop_server(port)

    def test_quit_is_for_clients_on_this_machine(self):
        accept = StoppableHttpServer.get_request
        for address, loopback in (
            ("127.0.0.1", True),
            ("127.1.2.3", True),
            ("::1", True),
            ("::ffff:127.0.0.1", True),
            ("192.0.2.1", False),
            ("1127.0.0.1", False),
            ("::2", False),
        ):

            def get_request(httpd, address=address):
                return accept(httpd)[0], (address, 1)

            server = self.serve()
            with self.subTest(address):
                with mock.patch.object(StoppableHttpServer, "get_request", get_request):
                    if loopback:
                        stop_server(server.port)
                    else:
                        words = "responded to QUIT with 'HTTP/1.1 403 Forbidden'$"
                        with self.assertRaisesRegex(PermissionError, words):
                            stop_server(server.port)
                self.assertEqual(server.ready, not loopback)
                self.assertEqual(server.requests, [])

    def test_the_default_timeout_is_for_clients(self):
        self.addCleanup(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(1e-6)
        server = self.serve({"feed.xml": b"<rss/>"})
        with connect(server) as connection:
            server.respond("/x", lambda request: server.wait_for_request("/y") and 200)
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
            self.get(server, "/y")
            self.assertRegex(connection.recv(65536), b"^HTTP/1.1 200 ")
            self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")
            connection.sendall(LAST)
            self.assertTrue(read_all(connection).endswith(b"<rss/>"))

    def test_many_connections_at_once(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        connections = [connect(server) for _ in range(100)]
        for connection in connections:
            connection.sendall(HEAD + b"\r\n")
        for connection in connections:
            with contextlib.closing(connection):
                self.assertTrue(connection.recv(65536).endswith(b"<rss/>"))
        server.stop()
        self.assert_gone(server)

    def test_accept_without_descriptors_waits_for_one(self):
        clock = NoTimePasses(self)
        accept = StoppableHttpServer.get_request
        failures = [OSError(errno.EMFILE, "Too many open files")] * 3

        def get_request(httpd):
            if failures:
                raise failures.pop()
            return accept(httpd)

        with mock.patch.object(StoppableHttpServer, "get_request", get_request):
            server = self.serve({"feed.xml": b"<rss/>"})
            with self.assertLogs("feedtestserver", logging.INFO) as logged:
                self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")
            server.stop()
        self.assertEqual("\n".join(logged.output).count("accept failed: [Errno "), 3)
        self.assertEqual(clock.waits, [0.05] * 3)
        self.assert_gone(server)

    @unittest.skipUnless(importlib.util.find_spec("resource"), "no limit can be set here")
    def test_connections_wait_until_there_is_a_descriptor(self):
        script = """
        import logging, socket, sys, threading, feedtestserver

        class Handler(logging.Handler):
            def emit(self, record):
                if record.getMessage().startswith("accept failed: [Errno 24]"):
                    failed.set()

        failed = threading.Event()
        logger = logging.getLogger("feedtestserver")
        logger.addHandler(Handler())
        logger.setLevel("INFO")
        with feedtestserver.FeedTestServer(sys.argv[1]) as server:
            connections = [socket.socket() for _ in range(3)]
            for each in connections:
                each.settimeout(20)
            files = take_descriptors()
            for each in connections:
                each.connect(("127.0.0.1", server.port))
                each.sendall(b"GET /feed.xml HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
            print(failed.wait(20), server.requests)
            for each in files:
                each.close()
            for each in connections:
                print(each.recv(15))
        """.replace("24", str(errno.EMFILE))
        directory = self.make_directory({"feed.xml": b"<rss/>"})
        done = run_script(self.TAKE_DESCRIPTORS + script, directory)
        self.assertEqual((done.stdout, done.stderr), ("True []\n" + "b'HTTP/1.1 200 OK'\n" * 3, ""))

    def test_stop_while_it_waits_for_a_descriptor(self):
        failed = threading.Event()

        def get_request(httpd):
            failed.set()
            raise OSError(errno.EMFILE, "Too many open files")

        with mock.patch.object(StoppableHttpServer, "get_request", get_request):
            server = self.serve()
            with connect(server) as connection:
                self.assertTrue(failed.wait(PATIENCE))
                server.stop()
                self.assert_gone(server)
                self.assertEqual(read_to_the_end(connection)[0], b"")

    def test_no_thread_can_be_started(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        server.respond("/x", lambda request: 204)

        def fail(thread):
            raise RuntimeError("can't start new thread")

        with mock.patch.object(threading.Thread, "start", fail):
            for _ in range(3):
                self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")
            self.assertEqual(self.get(server, "/x").status, 500)
            server.respond("/y", Response([b"one"]))
            with self.assertRaises(http.client.IncompleteRead):
                self.get(server, "/y")
            for path, error in zip(("/x", "/y"), server.errors):
                self.assertIn(f'GET {path}: RuntimeError("can\'t start new thread")', error)
            self.assertEqual(len(server.errors), 2)
            pipelined = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n" * 30
            last = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            self.assertEqual(exchange(server, pipelined + last).count(b"HTTP/1.1 500 "), 31)
            self.assertEqual(len(set(server.errors[2:])), 1)  # none is about those before it
        self.assertEqual(self.get(server, "/x").status, 204)
        self.assertEqual(self.get(server, "/y").content, b"one")
        server.stop()
        self.assert_gone(server)

    def test_no_thread_for_the_server(self):
        with FeedTestServer(self.make_directory()) as first:
            self.get(first, "/")  # so that nothing is opened for the first time below
        server, before = FeedTestServer(self.make_directory()), open_descriptors()

        def fail(thread):
            raise RuntimeError("can't start new thread")

        with (
            mock.patch.object(threading.Thread, "start", fail),
            self.assertRaisesRegex(RuntimeError, "can't start new thread"),
        ):
            server.start()
        server.stop()
        self.assertEqual(open_descriptors(), before)
        self.assertFalse(server.ready)
        self.assert_refused(server)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_forked_child_leaves_the_server_alone(self):
        """Whether it stops it, ends, or serves something itself; open connections go on as well."""
        script = """
        import http.client, os, sys
        import feedtestserver

        def get(connection):
            connection.request("GET", "/feed.xml")
            return connection.getresponse().read()

        def connect(server):
            return http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)

        with feedtestserver.FeedTestServer(sys.argv[1]) as server:
            kept = connect(server)
            print(get(kept))
            for child_does in "stop", "exit", "serve", "down":
                child = os.fork()
                if not child:
                    if child_does == "stop":
                        server.stop()
                        os._exit(0)
                    if child_does == "down":
                        try:
                            with server.down():
                                pass
                        except RuntimeError:
                            pass
                        os._exit(0)
                    if child_does == "serve":
                        with feedtestserver.FeedTestServer(sys.argv[1]) as other:
                            os._exit(get(connect(other)) != b"<rss/>")
                    sys.exit()
                print(child_does, os.waitpid(child, 0)[1], get(kept), get(connect(server)))
        """
        done = run_script(script, self.make_directory({"feed.xml": b"<rss/>"}))
        lines = [f"{does} 0 b'<rss/>' b'<rss/>'\n" for does in ("stop", "exit", "serve", "down")]
        self.assertEqual((done.stdout, done.stderr), ("b'<rss/>'\n" + "".join(lines), ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_in_a_forked_child_it_is_not_running(self):
        script = """
        import os, feedtestserver
        with feedtestserver.FeedTestServer("") as server:
            child = os.fork()
            if not child:
                print(server.ready)
                for context in server.down, server.intercept:
                    try:
                        with context():
                            print("it was entered")
                    except RuntimeError as error:
                        print(error)
                os._exit(0)
            print(os.waitpid(child, 0)[1], server.ready)
        """
        done = run_script(script)
        self.assertEqual(done.stderr, "")
        needs = "() needs a server that is running"
        lines = [line.partition(":")[0] for line in done.stdout.splitlines()]
        self.assertEqual(lines, ["False", f"down{needs}", f"intercept{needs}", "0 True"])

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_child_forked_before_the_thread_serves_leaves_the_server_alone(self):
        script = """
        import os, threading, urllib.request, feedtestserver
        may_serve = threading.Event()
        class Late(feedtestserver.FeedTestServer):
            def run(self):
                may_serve.wait()
                super().run()
        with Late("") as server:
            server.respond("/", b"from the parent")
            child = os.fork()
            if not child:
                print(server.ready)
                server.stop()
                os._exit(0)
            print(os.waitpid(child, 0)[1], server.ready)
            may_serve.set()
            print(urllib.request.urlopen(server.base_url, timeout=20).read())
        """
        done = run_script(script)
        self.assertEqual((done.stdout, done.stderr), ("False\n0 True\nb'from the parent'\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_child_forked_in_a_callable_does_not_serve(self):
        script = """
        import os, sys
        import urllib.request, feedtestserver
        def step(request):
            child = os.fork()
            if not child:
                if request.query:
                    server.stop()
                    os._exit(0)
                sys.exit()
            return f"{os.waitpid(child, 0)[1]}".encode()
        with feedtestserver.FeedTestServer(sys.argv[1]) as server:
            server.respond("/x", step)
            for path in ("x", "x?stop=1") * 2:
                print(urllib.request.urlopen(server.get_url(path), timeout=20).read())
        print(len(server.requests), server.errors)
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.stdout, done.stderr), ("b'0'\n" * 4 + "4 []\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_child_forked_while_the_server_is_down_leaves_it_alone(self):
        """Whether it leaves the block, or keeps what it has when the server comes back."""
        script = """
        import http.client, os, sys
        import feedtestserver
        with feedtestserver.FeedTestServer("", bind_timeout=1) as server:
            for child_does in "leave", "stay":
                from_parent, to_child = os.pipe()
                with server.down():
                    child = os.fork()
                    if not child and child_does == "leave":
                        sys.exit()
                    if not child:
                        os.close(to_child)
                        os._exit(len(os.read(from_parent, 1)))
                    if child_does == "leave":
                        print(os.waitpid(child, 0)[1])
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
                connection.request("GET", "/")
                print(child_does, connection.getresponse().status)
                connection.close()
                os.close(to_child)
            print(os.waitpid(child, 0)[1])
        """
        done = run_script(script)
        self.assertEqual((done.stdout, done.stderr), ("0\nleave 404\nstay 404\n0\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_forked_child_does_not_keep_the_port(self):
        script = """
        import os, socket, sys
        import feedtestserver
        (ready, begin), (end, finish) = os.pipe(), os.pipe()
        with feedtestserver.FeedTestServer(sys.argv[1]) as server:
            port = server.port
        with feedtestserver.FeedTestServer(sys.argv[1], port=port) as server:
            if not os.fork():
                os.write(begin, b"x")
                os.read(end, 1)
                os._exit(0)
            os.read(ready, 1)
        try:
            with socket.socket() as other:
                other.bind(("127.0.0.1", port))
                print("free")
        finally:
            os.write(finish, b"x")
            os.wait()
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.stdout, done.stderr), ("free\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_child_forked_during_the_beginning_of_an_interception_may_begin_one(self):
        script = """
        import os, sys, threading, feedtestserver

        def set_slowly(*arguments):
            if threading.current_thread() is beginning:
                begun.set()
                forked.wait(20)
            set_variable(*arguments)

        def intercept():
            with server.intercept():
                pass

        begun, forked = threading.Event(), threading.Event()
        environment = type(os.environ)
        set_variable, environment.__setitem__ = environment.__setitem__, set_slowly
        with feedtestserver.FeedTestServer(sys.argv[1]) as server:
            beginning = threading.Thread(target=intercept)
            beginning.start()
            print(begun.wait(20))
            child = os.fork()
            if not child:
                with feedtestserver.FeedTestServer(sys.argv[1]) as other, other.intercept():
                    os._exit(0)
            print(os.waitpid(child, 0)[1])
            forked.set()
            beginning.join()
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.stdout, done.stderr), ("True\n0\n", ""))

    def test_a_server_that_is_stopped_when_the_interpreter_has_ended_its_threads(self):
        script = """
        import sys, feedtestserver
        def serve():
            with feedtestserver.FeedTestServer(sys.argv[1]) as server, server.intercept():
                yield
        server = serve()
        next(server)
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_an_interpreter_ends_with_a_server_that_was_never_stopped(self):
        script = "import sys, feedtestserver; feedtestserver.FeedTestServer(sys.argv[1]).start()"
        done = run_script(script, HERE)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_all_addresses(self):
        server = self.serve({"feed.xml": b"<rss/>"}, host="0.0.0.0")
        self.assertEqual(server.base_url, f"http://127.0.0.1:{server.port}")
        self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")

    def test_ipv6(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            self.skipTest(f"no IPv6 here: {error}")
        server = self.serve({"feed.xml": b"<rss/>"}, host="::1")
        self.assertEqual(server.base_url, f"http://[::1]:{server.port}")
        with urllib.request.urlopen(server.get_url("feed.xml")) as response:
            self.assertEqual(response.read(), b"<rss/>")
        stop_server(server.port, "::1")

    def test_no_name_is_looked_up(self):
        script = """
        import sys, urllib.request, feedtestserver
        looked_up = []
        events = ("socket.getaddrinfo", "socket.gethostby", "socket.getnameinfo")
        def note(event, args):
            if event.startswith(events):
                looked_up.append(args)
        sys.addaudithook(note)
        with feedtestserver.FeedTestServer(sys.argv[1]) as server:
            print(looked_up)
            urllib.request.urlopen(server.get_url("feed.xml")).close()
        print({args[0] for args in looked_up} - {"127.0.0.1"})
        """
        directory = self.make_directory({"feed.xml": b"<rss/>"})
        done = run_script(script, directory)
        self.assertEqual((done.stdout, done.stderr), ("[]\nset()\n", ""))


class StoppableHttpServerTest(unittest.TestCase):
    """It serves any handler class."""

    def start(self, handler, server_class=StoppableHttpServer):
        threads = set(threading.enumerate())
        server = server_class(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.addCleanup(lambda: self.assertEqual(set(threading.enumerate()) - threads, set()))
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        return server, thread

    def connect(self, server):
        connection = socket.create_connection(server.server_address, PATIENCE)
        self.addCleanup(connection.close)
        return connection

    def assert_refused(self, server):
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(server.server_address, PATIENCE).close()

    def test_any_handler(self):
        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        server, thread = self.start(functools.partial(Handler, directory=HERE / "data"))
        url = f"http://127.0.0.1:{server.server_port}/headers/plain.xml"
        with urllib.request.urlopen(url) as response:
            self.assertEqual(
                response.read(), (HERE / "data" / "headers" / "plain.xml").read_bytes()
            )
        server.shutdown()
        thread.join()
        self.assert_refused(server)

    def test_many_handlers_at_once_end_with_shutdown(self):
        """Though each waits for its client, and shutdown() waits for each."""
        ended, entered = [], threading.Semaphore(0)

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.sendall(self.request.recv(1).upper())
                entered.release()
                with contextlib.suppress(OSError):  # on Windows
                    self.request.recv(1)
                ended.append(self)

        server, thread = self.start(Handler)
        connections = [self.connect(server) for _ in range(20)]
        for connection in connections:
            connection.sendall(b"x")
        for connection in connections:
            self.assertEqual(connection.recv(1), b"X")
            self.assertTrue(entered.acquire(timeout=PATIENCE))
        server.shutdown()
        self.assertEqual(len(ended), 20)
        for connection in connections:
            self.assertEqual(read_all(connection), b"")
        thread.join()
        self.assert_refused(server)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_forked_child_leaves_the_connections_of_handlers_alone(self):
        script = """
        import os, socket, socketserver, threading
        from feedtestserver import StoppableHttpServer
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                for line in self.rfile:
                    self.wfile.write(line)
        server = StoppableHttpServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with socket.create_connection(server.server_address, 20) as connection:
            connection.sendall(b"1")
            connection.sendall(b"\\n")
            print(connection.recv(9))
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
            connection.sendall(b"2\\n")
            print(connection.recv(9))
        server.shutdown()
        thread.join()
        """
        done = run_script(script)
        self.assertEqual((done.stdout, done.stderr), ("b'1\\n'\nb'2\\n'\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_made_before_a_fork_it_may_serve_in_both_processes(self):
        script = """
        import os, socket, socketserver, threading
        from feedtestserver import StoppableHttpServer
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                self.wfile.write(self.rfile.readline())
        def serve_once():
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            with socket.create_connection(server.server_address, 20) as connection:
                connection.sendall(b"1\\n")
                print(connection.recv(9))
            server.shutdown()
            thread.join()
        server = StoppableHttpServer(("127.0.0.1", 0), Handler)
        child = os.fork()
        if not child:
            serve_once()
            os._exit(0)
        os.waitpid(child, 0)
        serve_once()
        """
        done = run_script(script)
        self.assertEqual((done.stdout, done.stderr), ("b'1\\n'\n" * 2, ""))

    def test_a_listening_socket_in_tls(self):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                self.wfile.write(self.rfile.readline())

        host, context = (
            f"{random.getrandbits(64):x}.example",
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        )
        load = ssl.SSLContext.load_cert_chain

        def load_here_as_well(other, path):
            load(other, path)
            load(context, path)

        with (
            mock.patch.object(ssl.SSLContext, "load_cert_chain", load_here_as_well),
            FeedTestServer(HERE / "data") as maker,
        ):
            trusting = maker.ssl_context()
            trusting.wrap_socket(connect(maker), server_hostname=host).close()
        server = StoppableHttpServer(("127.0.0.1", 0), Handler)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        silent = self.connect(server)  # its handshake is nobody else's affair
        with trusting.wrap_socket(self.connect(server), server_hostname=host) as connection:
            connection.sendall(b"line\n")
            self.assertEqual(read_all(connection), b"line\n")
        server.shutdown()
        self.assertEqual(read_to_the_end(silent)[0], b"")

    def test_functions_posted_while_the_loop_is_busy(self):
        """More often than the buffer of the socket pair that wakes it has room for."""
        called = []

        def post_another():
            called.append(None)
            if len(called) < 2000:
                thread.submit(server.post, post_another).result(PATIENCE)

        server, _ = self.start(socketserver.BaseRequestHandler)
        read_all(self.connect(server))  # it serves from now on
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            server.post(post_another)
            while len(called) < 2000:
                server.call(lambda: None)
        self.assertEqual(len(called), 2000)

    def test_a_handler_whose_client_does_not_read_ends_with_shutdown(self):
        started = threading.Event()

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                started.set()
                while True:
                    self.request.sendall(bytes(65536))

        server, thread = self.start(Handler)
        self.connect(server)
        self.assertTrue(started.wait(PATIENCE))
        server.shutdown()
        thread.join()

    def test_a_handler_that_blocks_delays_no_other(self):
        entered, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                if self.request.recv(1) == b"!":
                    entered.set()
                    release.wait(3 * PATIENCE)
                self.request.sendall(b"done")

        server, _ = self.start(Handler)
        blocked = self.connect(server)
        blocked.sendall(b"!")
        self.assertTrue(entered.wait(PATIENCE))
        for _ in range(3):
            connection = self.connect(server)
            connection.sendall(b".")
            self.assertEqual(read_all(connection), b"done")
        release.set()
        self.assertEqual(read_all(blocked), b"done")

    def test_a_handler_may_use_timeouts_and_files(self):
        class Handler(socketserver.StreamRequestHandler):
            timeout = PATIENCE

            def handle(self):
                self.wfile.write(self.rfile.readline().upper())

        server, _ = self.start(Handler)
        connection = self.connect(server)
        connection.sendall(b"abc\n")
        self.assertEqual(read_all(connection), b"ABC\n")

    def test_connections_that_are_not_verified_are_closed(self):
        class Server(StoppableHttpServer):
            def verify_request(self, request, client_address):
                return False

        server, _ = self.start(lambda *arguments: self.fail("it was not to be called"), Server)
        for _ in range(3):
            self.assertEqual(read_all(self.connect(server)), b"")

    def test_a_connection_ends_if_there_is_no_thread_for_its_handler(self):
        failed = []

        class Server(StoppableHttpServer):
            def handle_error(self, request, client_address):
                failed.append(f"{sys.exc_info()[1]}")

        server, _ = self.start(lambda *arguments: self.fail("it was not to be called"), Server)
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no thread")):
            self.assertEqual(read_all(self.connect(server)), b"")
        self.assertEqual(failed, ["no thread"])

    def test_closed_while_it_serves_it_stops(self):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                for line in self.rfile:
                    self.wfile.write(line)

        server, thread = self.start(Handler)
        with server:
            connection = self.connect(server)
            connection.sendall(b"1\n")
            self.assertEqual(connection.recv(9), b"1\n")
        thread.join()
        self.assertEqual(read_all(connection), b"")
        self.assert_refused(server)

    def test_to_serve_it_has_to_listen(self):
        with (
            StoppableHttpServer(("127.0.0.1", 0), self.fail, bind_and_activate=False) as server,
            self.assertRaisesRegex(RuntimeError, "server_activate.. must be called before"),
        ):
            server.serve_forever()

    def test_shutdown_before_it_serves(self):
        server = StoppableHttpServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        server.shutdown()
        server.serve_forever()
        self.assertLess(server.socket.fileno(), 0)

    def test_shutdown_in_a_signal_handler_of_the_thread_that_serves(self):
        script = """
        import selectors, signal, socketserver
        from feedtestserver import StoppableHttpServer

        class Selector(selectors.DefaultSelector):
            def select(self, timeout=None):
                signal.raise_signal(signal.SIGTERM)  # the last moment before it waits
                return super().select(timeout)

        selectors.DefaultSelector = Selector
        server = StoppableHttpServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        signal.signal(signal.SIGTERM, lambda *arguments: server.shutdown())
        server.serve_forever()
        print(server.socket.fileno())
        """
        done = run_script(script)
        self.assertEqual((done.stdout, done.stderr), ("-1\n", ""))

    def test_shutdown_again(self):
        server, thread = self.start(SimpleHTTPRequestHandler)
        run_at_once([server.shutdown] * 10)
        server.shutdown()
        thread.join()
        self.assert_refused(server)

    def test_shutdown_from_a_handler(self):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.server.shutdown()
                self.request.sendall(b"done")

        server, thread = self.start(Handler)
        self.assertEqual(read_all(self.connect(server)), b"done")
        thread.join()
        self.assert_refused(server)

    def test_shutdown_from_a_handler_ends_the_others(self):
        entered, ended = threading.Event(), []

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                if self.request.recv(1) == b"!":
                    self.server.shutdown()
                    ended.append("shutdown")
                else:
                    entered.set()
                    with contextlib.suppress(OSError):  # on Windows
                        self.request.recv(1)
                    ended.append("waiting")

        server, thread = self.start(Handler)
        waiting = self.connect(server)
        waiting.sendall(b".")
        self.assertTrue(entered.wait(PATIENCE))
        self.connect(server).sendall(b"!")
        self.assertEqual(read_all(waiting), b"")
        thread.join()
        server.shutdown()
        self.assertEqual(sorted(ended), ["shutdown", "waiting"])

    def test_shutdown_from_two_handlers(self):
        both = threading.Barrier(2)

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                both.wait(PATIENCE)
                self.server.shutdown()

        server, thread = self.start(Handler)
        for connection in [self.connect(server) for _ in range(2)]:
            self.assertEqual(read_to_the_end(connection)[0], b"")
        thread.join()
        server.shutdown()
        self.assert_refused(server)

    def test_shutdown_after_a_handler_that_exits(self):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                sys.exit()

        server, thread = self.start(Handler)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            for _ in range(3):
                self.assertEqual(read_all(self.connect(server)), b"")
            server.shutdown()
        thread.join()
        self.assertEqual(stderr.getvalue(), "")

    def test_shutdown_after_an_interrupted_accept(self):
        server = StoppableHttpServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)

        def interrupt():
            raise KeyboardInterrupt

        server.get_request = interrupt
        self.connect(server)
        with self.assertRaises(KeyboardInterrupt):
            server.serve_forever()
        server.shutdown()
        self.assertLess(server.socket.fileno(), 0)
        self.assert_refused(server)

    def test_shutdown_returns_whatever_fails(self):
        """Its own methods, say, which a subclass may override."""

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                entered.set()
                self.request.recv(1)
                raise ValueError

        for name, gets_far in (
            ("get_request", False),
            ("verify_request", False),
            ("finish_request", True),
            ("handle_error", True),
            ("shutdown_request", True),
            ("close_request", True),
            ("server_close", True),
        ):

            def fail(server, *arguments, name=name):
                if name != "get_request":
                    getattr(StoppableHttpServer, name)(server, *arguments)
                raise ZeroDivisionError

            entered = threading.Event()
            server_class = type("Server", (StoppableHttpServer,), {name: fail})
            server = server_class(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            stopping = threading.Thread(target=server.shutdown, daemon=True)
            known = len(thread_errors)
            with self.subTest(name), contextlib.redirect_stderr(io.StringIO()):
                thread.start()
                with contextlib.suppress(ConnectionError):
                    waiting, sending = self.connect(server), self.connect(server)
                    self.assertTrue(not gets_far or entered.wait(PATIENCE))
                    sending.sendall(b"x")
                stopping.start()
                for each in (stopping, thread):
                    each.join(PATIENCE)
                    self.assertFalse(each.is_alive())
                if gets_far:
                    self.assertEqual(read_to_the_end(waiting)[0], b"")
                self.assert_refused(server)
            kinds = set(map(type, thread_errors[known:]))
            self.assertLessEqual(kinds, {ZeroDivisionError, ValueError})
            del thread_errors[known:]

    def test_an_exception_of_a_handler_is_reported(self):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                raise ValueError("a fault of the handler")

        server, thread = self.start(Handler)
        known = len(thread_errors)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            self.assertEqual(read_all(self.connect(server)), b"")
            server.shutdown()
            thread.join()
        self.assertIn("a fault of the handler", stderr.getvalue())
        self.assertIsInstance(thread_errors.pop(), ValueError)
        self.assertEqual(len(thread_errors), known)

    def test_a_lost_connection_is_not(self):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                raise ConnectionResetError

        server, thread = self.start(Handler)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            self.assertEqual(read_all(self.connect(server)), b"")
            server.shutdown()
            thread.join()
        self.assertEqual(stderr.getvalue(), "")

    def test_a_server_that_never_serves(self):
        with StoppableHttpServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
            self.assertGreaterEqual(server.socket.fileno(), 0)
        self.assertLess(server.socket.fileno(), 0)
        server.shutdown()
        self.assert_refused(server)


# The record and the script


class RequestTest(ServerTestCase):
    def test_fields(self):
        server = self.serve()
        server.respond("/caf\u00e9", 201)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.putrequest("POST", "/caf%C3%A9?a=1&a=2&b=%20")
            connection.putheader("X-Twice", "1")
            connection.putheader("x-twice", "2")
            connection.putheader("Content-Length", "3")
            connection.endheaders(b"abc")
            connection.getresponse().read()
        [request] = server.requests
        self.assertEqual((request.method, request.target), ("POST", "/caf%C3%A9?a=1&a=2&b=%20"))
        self.assertEqual(request.url, f"{server.base_url}/caf%C3%A9?a=1&a=2&b=%20")
        self.assertEqual(request.path, "/caf\u00e9")
        self.assertEqual(request.query, {"a": ["1", "2"], "b": [" "]})
        self.assertEqual(request.headers.get_all("X-TWICE"), ["1", "2"])
        self.assertEqual(request.headers["host"], f"127.0.0.1:{server.port}")
        self.assertIsNone(request.headers["Accept"])
        self.assertEqual((request.body, request.time, request.connection), (b"abc", NOW, 1))
        self.assertEqual((request.response.status, request.response.body), (201, b""))
        self.assertIn(("Date", NOW_DATE), request.response.headers)
        self.assertEqual(str(request), "POST /caf%C3%A9?a=1&a=2&b=%20 -> 201")
        self.assertEqual(repr(request), f"<Request {request}>")

    def test_url_is_what_the_client_asked_for(self):
        server = self.serve({"feed.xml": comment("Template: yes", "Header: L: {{base_url}}/l")})
        port = server.port
        for start, host, url in (
            ("GET /feed.xml", f"127.0.0.1:{port}", f"http://127.0.0.1:{port}/feed.xml"),
            ("GET /feed.xml", f"localhost:{port}", f"http://localhost:{port}/feed.xml"),
            ("GET /feed.xml?a=%20&b", "feed.example", "http://feed.example/feed.xml?a=%20&b"),
            ("GET /feed.xml", "feed.example:8080", "http://feed.example:8080/feed.xml"),
            ("GET /feed.xml", f"[::1]:{port}", f"http://[::1]:{port}/feed.xml"),
            ("OPTIONS *", "feed.example", "http://feed.example"),
            ("GET /feed.xml", "", f"{server.base_url}/feed.xml"),
            ("GET /feed.xml", None, f"{server.base_url}/feed.xml"),
            ("GET http://a.example/feed.xml", "b.example", "http://a.example/feed.xml"),
            (f"GET http://localhost:{port}/feed.xml", "x", f"http://localhost:{port}/feed.xml"),
        ):
            field = "" if host is None else f"Host: {host}\r\nConnection: close\r\n"
            version = "1.0" if host is None else "1.1"
            answer = Answer(exchange(server, f"{start} HTTP/{version}\r\n{field}\r\n".encode()))
            request = server.requests[-1]
            with self.subTest(start, host=host):
                self.assertEqual(request.url, url)
                self.assertEqual(dict(request.headers).get("Host"), host)
                if answer.status == 200:  # the server is itself by whatever name it is called
                    self.assertEqual(answer.headers["L"], f"{server.base_url}/l")
                    self.assertEqual(str(request), f"{start} -> 200")
                    self.assertIs(server.wait_for_request("/feed.xml", timeout=0), request)

    def test_url_in_https(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        for host in (f"localhost:{server.port}", f"127.0.0.1:{server.port}", "feed.example"):
            name = host.partition(":")[0]
            tls = server.ssl_context().wrap_socket(connect(server), server_hostname=name)
            with self.subTest(host), tls:
                request = f"GET /feed.xml?x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                tls.sendall(request.encode())
                self.assertTrue(read_all(tls).endswith(b"<rss/>"))
                self.assertEqual(server.requests[-1].url, f"https://{host}/feed.xml?x")

    def test_address_is_the_one_that_the_client_connected_to(self):
        for host, addresses in (
            ("127.0.0.1", {"127.0.0.1": socket.AF_INET}),
            ("0.0.0.0", {"127.0.0.1": socket.AF_INET}),
            ("::1", {"::1": socket.AF_INET6}),
            ("::", {"::1": socket.AF_INET6, "127.0.0.1": socket.AF_INET}),
        ):
            with self.subTest(host):
                try:
                    server = self.serve(host=host)
                except OSError as error:
                    self.skipTest(f"no IPv6 here: {error}")
                for address, family in addresses.items():
                    with socket.socket(family) as connection:
                        try:
                            connection.connect((address, server.port))
                        except OSError as error:
                            self.skipTest(f"{host} is for one family alone: {error}")
                        connection.sendall(LAST)
                        read_all(connection)
                    self.assertEqual(server.requests[-1].address, address)

    def test_address_of_any_request(self):
        seen = []
        server = self.serve({"feed.xml": b"<rss/>"})
        server.respond("https://*", lambda request: seen.append(request.address) or 204)
        exchange(server, b"nonsense\r\n\r\n")
        self.get(server, "/none", "BREW")
        with server.ssl_context().wrap_socket(connect(server), server_hostname="a.example") as tls:
            tls.sendall(LAST)
            read_all(tls)
        with server.intercept():
            urllib.request.urlopen("https://a.example/").close()
        self.assertEqual({request.address for request in server.requests}, {"127.0.0.1"})
        self.assertEqual(server.requests[-1].tunnel.address, "127.0.0.1")
        self.assertEqual(seen, ["127.0.0.1"])

    def test_json_reads_the_body(self):
        server = self.serve()
        for body, value in (
            (b'{"a": [1, 2.5, true, null, "\\u00fc"]}', {"a": [1, 2.5, True, None, "\u00fc"]}),
            ('"\u00fc"'.encode(), "\u00fc"),
            (b" [] ", []),
            (b"<rss/>", ValueError),
            (b"{'a': 1}", ValueError),
            (b'"\xff"', ValueError),
            (b"", ValueError),
            (b"[" * 100_000, ValueError),
            (b"[1, 2" + b" " * 1_000_000, ValueError),
        ):
            self.get(server, "/x", "POST", body)
            request = server.requests[-1]
            with self.subTest(body[:40]):
                if value is not ValueError:
                    self.assertEqual(request.json(), value)
                    continue
                with self.assertRaises(ValueError) as caught:
                    request.json()
                self.assertIn(repr(body[:10])[:-1], str(caught.exception))
                self.assertLess(len(str(caught.exception)), 1000)

    def test_raw_utf_8_in_a_target_is_read_as_it_was_meant(self):
        server = self.serve({"caf\u00e9.xml": b"<rss/>"})
        data = "GET /caf\u00e9.xml HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        self.assertEqual(Answer(exchange_end(server, data)).status, 200)
        self.assertEqual(server.requests[0].path, "/caf\u00e9.xml")

    def test_raw_bytes_in_a_target_are_shown_as_utf_8_or_else_as_latin_1(self):
        server = self.serve()
        for target in ("/\u00e9".encode(), b"/\xe9"):
            answer = Answer(exchange(server, b"GET %s HTTP/1.0\r\n\r\n" % target))
            with self.subTest(target):
                self.assertEqual(f"{server.requests[-1]}", "GET /\u00e9 -> 404")
                self.assertIn("'/\u00e9' was not found", answer.body.decode())
        with self.assertRaises(AssertionError) as caught:
            server.assert_requested("/x")
        self.assertEqual(f"{caught.exception}".count("\n  GET /\u00e9 -> 404"), 2)

    def test_recorded_before_the_first_byte_is_sent(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        for number in range(1, 200):
            self.get(server, "/feed.xml")
            self.assertEqual(len(server.requests), number)

    def test_requests_is_a_snapshot(self):
        server = self.serve()
        before = server.requests
        self.get(server, "/none")
        self.assertEqual(before, [])
        server.requests.clear()
        self.assertEqual(len(server.requests), 1)

    def test_get_url(self):
        server = self.serve()
        for path, encoded in (
            ("feed.xml", "feed.xml"),
            ("/feed.xml", "feed.xml"),
            ("", ""),
            ("my feed.xml", "my%20feed.xml"),
            ("my%20feed.xml", "my%20feed.xml"),
            ("caf\u00e9?q=\u00fc&r=1", "caf%C3%A9?q=%C3%BC&r=1"),
        ):
            with self.subTest(path):
                self.assertEqual(server.get_url(path), f"{server.base_url}/{encoded}")


class RespondTest(ServerTestCase):
    FILES = {"v1.xml": b"<v1/>", "v2.xml": b"<!-- Status: 203 --><v2/>", "v3.json": b"{}"}

    def transcript(self, server):
        """What a failed assertion shows of the requests, line by line."""
        with self.assertRaises(AssertionError) as caught:
            server.wait_for_request("/nowhere", timeout=0)
        return str(caught.exception).splitlines()[2:]

    def statuses(self, server, path, number):
        return [self.get(server, path).status for _ in range(number)]

    def test_steps_of_every_kind(self):
        server = self.serve(self.FILES)
        server.respond(
            "/feed.xml",
            "v1.xml",
            "/v2.xml",
            404,
            b"<bytes/>",
            Response(b"<response/>", 201),
            lambda request: 410,
            lambda request: request.headers["X"].encode(),
            lambda request: "v3.json",
            lambda request: lambda request: Response(status=418),
        )
        said = [self.get(server, "/feed.xml", headers={"X": "x"}) for _ in range(11)]
        self.assertEqual(
            [response.status for response in said],
            [200, 203, 404, 200, 201, 410, 200, 200, 418, 418, 418],
        )
        self.assertEqual(said[0].content, b"<v1/>")
        self.assertEqual(said[3].content, b"<bytes/>")
        self.assertEqual(said[3].headers["Content-Type"], "application/xml")
        self.assertEqual(said[6].content, b"x")
        self.assertEqual(said[7].headers["Content-Type"], "application/json")

    def test_steps_respond_to_every_method(self):
        server = self.serve(self.FILES)
        server.respond("/feed.xml", b"<rss/>")
        for method in ("GET", "HEAD", "POST", "OPTIONS", "BREW"):
            with self.subTest(method):
                self.assertEqual(self.get(server, "/feed.xml", method).status, 200)
        server.respond("/*", 202)
        self.assertEqual(ask(server, "*", "OPTIONS").status, 204)
        server.respond("*", 203)
        self.assertEqual(ask(server, "*", "OPTIONS").status, 203)

    def test_a_response_on_record_can_be_given_again(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        self.get(server, "/feed.xml")
        server.respond("/again", lambda request: server.requests[0].response)
        first, again = (self.get(server, path) for path in ("/feed.xml", "/again"))
        self.assertEqual(first.headers.items(), again.headers.items())
        self.assertEqual(first.content, again.content)

    def test_steps_honour_conditions(self):
        server = self.serve()
        server.respond("/feed.xml", Response(b"<rss/>", headers={"ETag": '"v1"'}))
        self.assertEqual(
            self.get(server, "/feed.xml", headers={"If-None-Match": '"v1"'}).status, 304
        )

    def test_paths(self):
        server = self.serve()
        server.respond("bare", 201)
        server.respond("/my feed.xml", 202)
        server.respond("/caf%C3%A9", 203)
        server.respond("/?feed=rss2", 206)
        server.respond("/", 208)
        server.respond("https://Example.com:443/feed.xml", 209)
        server.respond(f"{server.base_url}/own", 210)
        server.respond("http://[::1]:99/x?a b=\u00fc", 211)
        server.respond("/?url=http://example.com/", 212)
        for target, status in (
            ("/bare", 201),
            ("/bare?any=query", 201),
            ("/my%20feed.xml", 202),
            ("/caf%c3%a9", 203),
            ("/?feed=rss2", 206),
            ("/?feed=atom", 208),
            ("/", 208),
            ("https://example.com/feed.xml", 209),
            ("http://example.com/feed.xml", 502),
            ("https://example.com/other.xml", 404),
            ("/feed.xml", 404),
            ("/own", 210),
            (f"{server.base_url}/bare", 201),
            ("http://[::1]:99/x?a%20b=%C3%BC", 211),
            ("/?url=http://example.com/", 212),
        ):
            with self.subTest(target), contextlib.ExitStack() as opened:
                connection = opened.enter_context(connect(server))
                if target.startswith("https:"):  # without TLS it is refused
                    context = server.ssl_context()
                    tls = context.wrap_socket(connection, server_hostname="127.0.0.1")
                    connection = opened.enter_context(tls)
                request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                connection.sendall(request.encode())
                self.assertEqual(Answer(read_all(connection)).status, status)

    def test_steps_are_replaced_and_cleared(self):
        server = self.serve()
        server.respond("/x", 201, 202)
        server.respond("/x", 203)
        self.assertEqual(self.statuses(server, "/x", 2), [203, 203])
        server.clear()
        self.assertEqual(self.statuses(server, "/x", 1), [404])
        self.assertEqual(len(server.requests), 1)

    def test_steps_are_checked_at_the_call(self):
        server = self.serve({"v1.xml": b"", "wrong.xml": b"<!-- Status: x -->"})
        for steps, error, words in (
            ((), ValueError, r"respond\('/x'\) needs at least one step"),
            *(
                ((step,), TypeError, f"found {re.escape(repr(step))} as a step; it takes a fixture")
                for step in (None, 1.5, [], ["v1.xml"], {"a": 1})
            ),
            ((99,), ValueError, "Status: found '99'"),
            ((True,), ValueError, "Status: found 'True'"),
            (
                ("v2.xml",),
                FileNotFoundError,
                "no such fixture in .*; the nearest .*'v1.xml'",
            ),
            (("../v1.xml",), FileNotFoundError, "no such fixture"),
            (("wrong.xml",), DirectiveError, "line 1: Status: found 'x'"),
            *(
                ((body,), FileNotFoundError, "; if it is a body: bodies are bytes, such as b'<rs")
                for body in ("<rss/>", ' {"a": 1}', "[]", "two\nlines", "<" + "x" * 300)
            ),
        ):
            with self.subTest(steps), self.assertRaisesRegex(error, words):
                server.respond("/x", *steps)
        self.assertEqual(self.statuses(server, "/x", 1), [404])

    def test_a_callable_that_fails_is_a_500_with_its_words(self):
        server = self.serve()

        def raising(error):
            def step(request):
                raise error

            return step

        for step, words in (
            (lambda request: 1 / 0, "GET /x: ZeroDivisionError('division by zero')"),
            (lambda request: 1.5, 'GET /x: TypeError("found 1.5 as a step;'),
            (lambda request: "none.xml", "no such fixture in"),
            # Like pytest's outcomes, these are no Exception, or mean something to a generator.
            (raising(KeyboardInterrupt()), "GET /x: KeyboardInterrupt("),
            (raising(SystemExit()), "GET /x: SystemExit("),
            (raising(StopIteration()), "GET /x: StopIteration("),
            (raising(GeneratorExit()), "GET /x: GeneratorExit("),
        ):
            server.clear()
            server.respond("/x", step)
            with self.subTest(words):
                response = self.get(server, "/x")
                [error] = server.errors
                self.assertEqual(response.status, 500)
                self.assertIn(words, error)
                self.assertEqual(response.content.decode(), legible(error) + "\n")

    def test_callables_without_end_are_an_error(self):
        server, number = self.serve(), itertools.count(1)

        def respond_by(step):
            return step if next(number) % 100_000 else 204  # it ends in any case

        def itself(request):
            return respond_by(itself)

        def another(request):
            return respond_by(functools.partial(another))

        for step in (itself, another):
            server.clear()
            server.respond("/x", step)
            with self.subTest(step.__name__):
                self.assertEqual(self.get(server, "/x").status, 500)
                [error] = server.errors
                self.assertIn("GET /x: RecursionError(", error)
        server.stop()
        self.assertFalse(server.is_alive())

    def test_an_exception_that_cannot_be_shown(self):
        class Fault(Exception):
            def __repr__(self):
                raise ZeroDivisionError

        def step(request):
            raise Fault

        server = self.serve()
        server.respond("/", step)
        self.assertEqual(self.get(server, "/").status, 500)
        [words] = server.errors
        self.assertIn("GET /: Fault, whose repr() raises ZeroDivisionError\nTraceback", words)

    def test_each_step_is_taken_once_by_ten_threads(self):
        server = self.serve()
        for address in ("/x", "/*", "*"):
            server.clear()
            server.respond(address, *range(200, 250), 599)
            statuses = []

            def fetch(statuses=statuses):
                statuses.extend(self.statuses(server, "/x", 5))

            with self.subTest(address):
                run_at_once([fetch] * 10)
                self.assertEqual(sorted(statuses), list(range(200, 250)))
                # The record pairs each with its own step.
                transcript = "\n".join(self.transcript(server))
                recorded = re.findall(r"GET /x -> (\d+) \(step (\d+) of 51", transcript)
                self.assertEqual(len(recorded), 50)
                for status, step in recorded:
                    self.assertEqual(int(status) - 199, int(step))
                self.assertEqual(len(server.unused), 1)

    def test_steps_that_pass_are_taken_once_by_ten_threads(self):
        server, passed = self.serve(), []
        server.respond("*", *range(200, 250), 599)
        server.respond("/x", *[passed.append] * 50, 598)
        statuses = []
        run_at_once([lambda: statuses.extend(self.statuses(server, "/x", 5))] * 10)
        self.assertEqual(sorted(statuses), list(range(200, 250)))
        self.assertEqual(len(passed), 50)
        self.assertEqual(len(server.unused), 2)

    def test_sequences_are_each_for_one_url(self):
        server = self.serve(self.FILES)
        server.respond("/a", "v1.xml", 304, 503, Response(b"", 201), "v2.xml", 410)
        server.respond("/b", 301, 302)
        statuses = [self.get(server, path).status for path in ("/a", "/b") * 7]
        self.assertEqual(statuses[::2], [200, 304, 503, 201, 203, 410, 410])
        self.assertEqual(statuses[1::2], [301, 302, 302, 302, 302, 302, 302])

    def test_a_transcript_shows_which_step_responded(self):
        server = self.serve(self.FILES)

        def not_modified(request):
            return 304

        pauses = ["0.001 at 50%", "0.002 at headers"]
        broken = Response(b"12", delay=0.001, pause=pauses, rate=99999, fault="close at 1")
        server.respond("/x", "v1.xml", not_modified, broken, 410)
        for path in ("/x", "/v1.xml", "/x", "/x", "/x", "/x"):
            with contextlib.suppress(http.client.IncompleteRead):
                self.get(server, path)
        self.assertEqual(
            self.transcript(server),
            [
                "  GET /x -> 200 (step 1 of 4: v1.xml)",
                "  GET /v1.xml -> 200",
                "  GET /x -> 304 (step 2 of 4: not_modified)",
                (
                    "  GET /x -> 200 (step 3 of 4; Delay: 0.001; Pause: 0.001 at 50%;"
                    " Pause: 0.002 at headers; Rate: 99999; Fault: close at 1)"
                ),
                "  GET /x -> 410 (step 4 of 4)",
                "  GET /x -> 410 (step 4 of 4)",
            ],
        )

    def test_steps_for_one_method(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        server.respond("/feed.xml", 201, method="POST")
        server.respond("/new.xml", 202, method="PUT")
        server.respond("/get", 203, method="GET")
        server.respond("*", 299, method="brew")
        for path, method, status in (
            ("/feed.xml", "GET", 200),
            ("/feed.xml", "HEAD", 200),
            ("/feed.xml", "POST", 201),
            ("/feed.xml", "PUT", 405),
            ("/feed.xml", "OPTIONS", 204),
            ("/feed.xml", "brew", 299),
            ("/feed.xml", "BREW", 501),
            ("/new.xml", "PUT", 202),
            ("/new.xml", "POST", 405),
            ("/new.xml", "GET", 404),
            ("/get", "GET", 203),
            ("/get", "HEAD", 404),
        ):
            with self.subTest(path, method=method):
                self.assertEqual(ask(server, path, method).status, status)

    def test_the_best_match_responds(self):
        """In whatever order they were given."""
        server = self.serve({"x": b"", "folder/x": b""})
        for better, worse, target in (
            (("/x", None), ("/*", None), "/x"),
            (("/x", None), ("*", None), "/x"),
            (("/x", None), ("/*", "GET"), "/x"),
            (("/x", None), ("/*?a=1", "GET"), "/x?a=1"),
            (("http://a.example/x", None), ("http://*/x", None), "http://a.example/x"),
            (("/x?a=1", None), ("/x", None), "/x?a=1"),
            (("/x?a=1", None), ("/x", "GET"), "/x?a=1"),
            (("/x?", None), ("/x", None), "/x"),
            (("/x?a=1", "GET"), ("/x?a=1", None), "/x?a=1"),
            (("/x", "GET"), ("/x", None), "/x"),
            (("/*?a=1", None), ("/*", None), "/x?a=1"),
            (("/*?a=*", None), ("/*", "GET"), "/x?a=1"),
            (("/*", "GET"), ("/*", None), "/x"),
            (("/folder/*", "GET"), ("/*", None), "/folder/x"),
        ):
            for order in ((better, worse), (worse, better)):
                server.clear()
                for address, method in order:
                    status = 201 if (address, method) == better else 202
                    server.respond(address, status, method=method)
                with self.subTest(order, target=target):
                    self.assertEqual(ask(server, target).status, 201)

    def test_of_two_patterns_the_one_given_last_responds(self):
        server = self.serve({"ab": b""})
        for addresses in itertools.permutations(("/a*", "/*b", "*", "/*")):
            server.clear()
            for address in (addresses[-1], *addresses):  # once more, and then it is the last
                server.respond(address, 202 if address == addresses[-1] else 201)
            with self.subTest(addresses):
                self.assertEqual(ask(server, "/ab").status, 202)
                self.assertEqual(len(server.unused), 3)

    def test_a_step_that_passes(self):
        def pass_on(request):
            return None

        def fallback(request):
            return 203

        server = self.serve({"feed.xml": b"<rss/>"})
        for scripts, method, target, status, step in (
            ([("/x", pass_on)], "GET", "/x", 404, ""),
            ([("/x", pass_on)], "POST", "/x", 405, ""),
            ([("/feed.xml", pass_on)], "GET", "/feed.xml", 200, ""),
            ([("*", pass_on), ("/feed.*", pass_on)], "GET", "/feed.xml", 200, ""),
            ([("*", pass_on)], "BREW", "/feed.xml", 501, ""),
            ([("/x", fallback), ("/x?a", pass_on)], "GET", "/x?a", 203, "fallback"),
            ([("/x?a", fallback), ("/*", pass_on)], "GET", "/x?a", 203, "fallback"),
            ([("*", fallback), ("/*", pass_on), ("/x", pass_on)], "GET", "/x", 203, "fallback"),
            ([("*", "feed.xml"), ("/x", lambda request: pass_on)], "GET", "/x", 200, "feed.xml"),
        ):
            server.clear()
            for address, *steps in scripts:
                server.respond(address, *steps)
            with self.subTest(scripts):
                self.assertEqual(ask(server, target, method).status, status)
                [line] = self.transcript(server)
                self.assertNotIn("pass_on", line)
                self.assertEqual("step 1 of 1" in line, bool(step), line)
                self.assertIn(step, line)
                self.assertEqual(server.errors, [])

    def test_a_step_that_passes_counts_as_taken(self):
        server, passed = self.serve(), []
        server.respond("/x", lambda request: None, 201, passed.append)
        server.respond("/*", 202, 203)
        self.assertEqual(self.statuses(server, "/x", 5), [202, 201, 203, 203, 203])
        self.assertEqual(passed, server.requests[2:])  # the last one stays
        self.assertEqual(server.unused, [])

    def test_a_step_may_script_others(self):
        server = self.serve()
        server.respond("/x", lambda request: server.respond("/x", 201))
        self.assertEqual(self.statuses(server, "/x", 2), [404, 201])

    def test_coroutine_functions(self):
        async def respond(request):
            await asyncio.sleep(0)
            return int(request.query["n"][0])

        async def pass_on(request):
            await asyncio.sleep(0)

        async def fail(request):
            await asyncio.sleep(0)
            raise ZeroDivisionError("in a coroutine")

        class Responder:
            async def __call__(self, request):
                return await respond(request)

        server = self.serve()
        for step, status in (
            (respond, 203),
            (functools.partial(respond), 203),
            (Responder(), 203),
            (Responder().__call__, 203),
            (lambda request: respond, 203),
            (lambda request: Responder(), 203),
            (pass_on, 299),
            (lambda request: pass_on, 299),
            (fail, 500),
        ):
            server.clear()
            server.respond("*", 299)
            server.respond("/x", step)
            with self.subTest(step):
                self.assertEqual(ask(server, "/x?n=203").status, status)
                self.assertEqual(len(server.errors), status == 500)
        self.assertIn("GET /x?n=203: ZeroDivisionError('in a coroutine')", server.errors[0])

    def test_unused_has_a_sentence_for_each_step_left(self):
        def not_modified(request):
            return 304

        server = self.serve(self.FILES)
        self.assertEqual(server.unused, [])
        server.respond("HTTP://A.example/caf\u00e9/*", 410, "v1.xml", not_modified)
        server.respond("feed.xml", 503, method="POST")
        for sentence, words in zip(
            server.unused,
            (
                ("HTTP://A.example/caf\u00e9/*", "step 1 of 3"),
                ("HTTP://A.example/caf\u00e9/*", "v1.xml"),
                ("HTTP://A.example/caf\u00e9/*", "not_modified"),
                ("POST", "feed.xml", "step 1 of 1"),
            ),
        ):
            for each in words:
                self.assertIn(each, sentence)
        sentences = server.unused
        self.assertEqual(len(sentences), 4)
        ask(server, "/feed.xml")  # by another method
        self.assertEqual(server.unused, sentences)
        for number in (1, 2, 3, 3):
            ask(server, "http://a.example/caf%C3%A9/feed.xml")
            self.assertEqual(server.unused, sentences[number:])
        ask(server, "/feed.xml", "POST")
        self.assertEqual(server.unused, [])

    def test_unused_is_in_the_order_of_the_calls(self):
        server = self.serve()
        addresses = ["/*", "/b", "http://*/x", "/a", "/b?c", "*", "http://a.example/"]
        for address in ("/a", "*", *addresses):  # of two calls for one address the last counts
            server.respond(address, 200)
        found = [re.findall("'(.*)'", sentence) for sentence in server.unused]
        self.assertEqual(found, [[address] for address in addresses])

    def test_unused_steps_are_forgotten_when_they_are_replaced_or_cleared(self):
        server = self.serve()
        server.respond("/caf\u00e9", 201, 202)
        server.respond("/caf%c3%a9", 203)
        server.respond("/caf%C3%A9", 203, method="GET")
        server.respond("/*", 204)
        server.respond("/*", 205, 206)
        self.assertEqual(len(server.unused), 4)
        server.clear()
        self.assertEqual(server.unused, [])


class AddressTest(ServerTestCase):
    """What an address matches, in respond() and in the assertions."""

    #: Spellings of one address.
    EQUAL = [
        "/~user /%7Euser /%7euser",
        "/a-b.c_d~e9Z /%61%2D%62%2E%63%5F%64%7e%65%39%5a",
        "/caf\u00e9 /caf%C3%A9 /caf%c3%a9",
        "/caf%E9 /caf%e9 /caf\udce9",
        "/a%2Fb /a%2fb",
        "/a|b /a%7Cb /a%7cb",
        '/"<>\\^`{} /%22%3C%3E%5C%5E%60%7B%7D',
        "/100% /100%25",
        "/%zz%2 /%25zz%252",
        "/%%41 /%25A",
        "/a/../b/. /a/%2E%2e/b/%2E",
        "/x?q=a+b /x?q=a%20b",
        "/x?a+b /x?a%20b=",
        "/x?q=%41%54 /x?q=AT",
        "/x?q=\u00fc /x?q=%C3%BC /x?q=%c3%bc",
        "/x?q=%E9 /x?q=\udce9",
        "/x? /x?& /x?&&",
        "/x?q=1%2B1 /x?q=1%2b1",
        "/x?q=100%|\\ /x?q=100%25%7c%5C",
        "/x?b=%7e&a /x?a=&b=~",
        "http://a.example/%7E http://A.EXAMPLE/~ HTTP://a.example:80/~",
        "https://a.example/ https://a.example:443/ https://a.example./",
        "http://a.example/x http://%61.%45xample/x http://a%2Eexample/x",
    ]
    #: Different addresses.
    DIFFERENT = [
        "/a%2Fb.xml /a/b.xml",
        "/a%3Fb /a?b",
        "/a%3Bb /a;b",
        "/a+b /a%20b",
        "/a+b /a%2Bb",
        "/a%2541 /a%41",
        "/a%2525 /a%25",
        "/a/./b /a/b",
        "/a/../b /b",
        "/a//b /a/b",
        "/a/ /a",
        "/A /a",
        "/caf%E9 /caf%C3%A9",
        "/x?q=AT%26T /x?q=AT&T",
        "/x?q=1%2B1 /x?q=1+1",
        "/x?u=a/b /x?u=a%2Fb",
        "/x?u=a?b /x?u=a%3Fb",
        "/x?a%3D1 /x?a=1",
        "/x?a=1;b=2 /x?a=1&b=2",
        "/x?A=1 /x?a=1",
        "/x?q=%2526 /x?q=%26",
        "http://a.example/x https://a.example/x",
        "http://a.example/x http://a.example:8080/x",
        "http://a.example/x /x",
    ]

    def matches(self, server, address, target):
        server.clear()
        server.respond(address, 299)
        status = ask(server, target).status
        [request] = server.requests
        self.assertIs(server.wait_for_request(request.url, timeout=0), request)
        if status == 299:
            server.wait_for_request(address, times=1, timeout=0)
        else:
            with self.assertRaises(AssertionError):
                server.wait_for_request(address, timeout=0)
        return status == 299

    def check(self, *rows):
        """Rows of an address, the targets that it matches, and others that it does not."""
        server = self.serve()
        with server.intercept():
            for row in rows:
                address, matching, others = (
                    text.replace("{own}", server.base_url).replace("{port}", f"{server.port}")
                    for text in row
                )
                for target in (*matching.split(), *others.split()):
                    with self.subTest(address, target=target):
                        expected = target in matching.split()
                        self.assertEqual(self.matches(server, address, target), expected)

    def test_paths(self):
        self.check(
            ("/feed.xml", "/feed.xml /feed.xml?a", "/feed.xml/ /feed http://127.0.0.1:9/feed.xml"),
            ("feed.xml", "/feed.xml", "/x/feed.xml http://a.example/feed.xml"),
            ("{own}/feed.xml", "/feed.xml {own}/feed.xml", "/x http://a.example/feed.xml"),
            ("", "/ /?a", "/x"),
            ("?a=1", "/?a=1", "/ /x?a=1"),
            ("go/ftp://a.example/x", "/go/ftp://a.example/x", "/x"),
            ("/?u=http://a.example/", "/?u=http://a.example/", "/ http://a.example/"),
            ("/my feed.xml", "/my%20feed.xml", "/my+feed.xml /my%2520feed.xml /my"),
            ("/\r\n\x7f", "/%0D%0A%7F", "/"),
            ("//feed.xml", "//feed.xml", "/feed.xml"),
        )

    def test_patterns_of_paths(self):
        self.check(
            (
                "/api/*",
                "/api/ /api/a /api/a/b /api//?x=1",
                "/api /apix /x/api/ http://a.example/api/",
            ),
            ("api/*", "/api/a", "/x/api/a"),
            ("/*.xml", "/.xml /a.xml /a/b.xml?x", "/a.xmlx /xml /a.xml/ /?a.xml"),
            ("*.xml", "/a.xml /a/b.xml", "/a.json http://a.example/a.xml"),
            ("/a*b*c", "/abc /a/b/c /abbbc?d /acbc", "/ab /acb /abcd /xabc"),
            ("/*", "/ /x /x/y?z", "http://a.example/ https://a.example/x"),
            ("/a**b", "/ab /axb", "/a"),
            (f"/{'*a' * 120}", f"/{'ba' * 120} /{'a' * 120}", f"/{'a' * 119} /{'ba' * 120}b"),
            ("/caf\u00e9 *", "/caf%c3%a9%20 /caf\u00e9%20/x", "/caf\u00e9"),
            ("/%7Euser/*", "/~user/x /%7euser/", "/user/"),
            ("/a%2f*", "/a%2Fb /a%2f/b", "/a/b"),
            ("/a%2Ab", "/a%2Ab /a%2ab", "/a*b /aXb"),
            ("/a%2*", "/a%252 /a%252F", "/a%2F /a%20"),
            ("{own}/api/*", "/api/a {own}/api/a", "/apx http://a.example/api/a"),
            ("/[a-z].x?", "/[a-z].x", "/b.x /[a-z].xy"),
            ("/(a|b)+*", "/(a|b)+ /(a%7cb)+c", "/a /aa"),
        )

    def test_patterns_of_hosts(self):
        self.check(
            ("*", "/ /x/y?z http://a.example/ http://a.example:8080/x?y https://a.example/", ""),
            (
                "http://*.example.com/*",
                "http://a.example.com/ http://A.b.example.com./x/y?z http://a.example.com:80/",
                "/ http://example.com/ https://a.example.com/ http://a.example.com:8080/",
            ),
            (
                "http://*.example.com/",
                "http://a.example.com/ http://A.b.example.com./",
                "http://a.example.com.b.example/ http://b.example/.example.com/",
            ),
            ("HTTP://A*.EXAMPLE/x", "http://a.example/x http://ab.example/x", "http://b.example/x"),
            (
                "http://*/x",
                "http://a.example/x http://192.0.2.1/x http://[::2]/x",
                "http://a.example:8080/x http://[::2]:8080/x http://a.example/x/x",
            ),
            (
                "http://*:8080/x",
                "http://a.example:8080/x http://[::2]:8080/x",
                "http://a.example/x http://a.example:808/x http://a.example:18080/x",
            ),
            ("http://a.example*/x", "http://a.example/x", "http://a.example:8080/x"),
            ("https://*:443/*", "https://a.example/x", "https://a.example:8443/x"),
            (
                "http://*.b\u00fccher.example/",
                "http://a.xn--bcher-kva.example/",
                "http://a.example/",
            ),
            ("http://a.example/*", "http://a.example/ http://a.example/x", "/ http://b.example/x"),
            # The server itself is a host, too.
            (
                "http://*:{port}/x",
                "/x {own}/x http://localhost:{port}/x http://a.example:{port}/x",
                "/y http://a.example/x",
            ),
            (
                "http://127.0.0.*:{port}/x",
                "/x {own}/x",
                "/y http://localhost:{port}/x http://127.0.0.1/x",
            ),
        )

    def test_a_name_in_the_host_field(self):
        """Outside of intercept() it is the server itself, whose URL has that name."""
        server, path, url = self.serve(), "/x", "http://foo.test/x"
        for addresses in ([path], [url], ["http://*.test/x"], [path, url], [url, path]):
            server.clear()
            for address in addresses:
                server.respond(address, 201 if address == addresses[0] or address == url else 202)
            with self.subTest(addresses):
                wire = exchange(server, b"GET /x HTTP/1.0\r\nHost: foo.test\r\n\r\n")
                [request] = server.requests
                self.assertEqual((Answer(wire).status, request.url), (201, url))
                for address in (*addresses, path, request.url):
                    self.assertIs(server.assert_requested(address), request)
                self.assertEqual(len(server.unused), len(addresses) - 1)

    def test_many_patterns_of_hosts(self):
        server = self.serve()
        for number in range(600):  # more than re keeps
            server.respond(f"http://*.a{number}.example/*", 200 + number % 300)
        for number in (0, 1, 300, 599):
            with self.subTest(number):
                status = ask(server, f"http://www.a{number}.example/x").status
                self.assertEqual(status, 200 + number % 300)
        self.assertEqual(ask(server, "http://www.a600.example/x").status, 502)
        self.assertEqual(len(server.unused), 596)

    def test_a_host_alone_is_its_root(self):
        self.check(
            ("http://a.example", "http://a.example/ http://a.example/?q", "http://a.example/x /"),
            ("http://a.example?q=1", "http://a.example/?q=1", "http://a.example/"),
            ("http://me:secret@a.example", "http://a.example/", "http://secret/ http://me/"),
            ("https://*", "https://a.example/ https://b.example/?q", "https://a.example/x"),
            ("http://*?q=*", "http://a.example/?q=1", "http://a.example/ http://a.example/x?q=1"),
        )

    def test_queries(self):
        one = "/x?a=1&b=2"
        self.check(
            ("/x", "/x /x? /x?a=1 /x?&", "/y"),
            ("/x?", "/x /x? /x?&&", "/x?a /x?a= /y"),
            ("/x?&", "/x /x?", "/x?a"),
            (one, f"{one} /x?b=2&a=1 /x?&b=2&&a=1&", f"/x /x?a=1 {one}&c=3 {one}&b=2 /x?a=2&b=1"),
            ("/x?b=2&&a=1&", f"{one} /x?b=2&a=1", "/x?a=1"),
            ("/x?a=1&a=2", "/x?a=2&a=1", "/x?a=1 /x?a=1&a=1 /x?a=1&a=1&a=2 /x?a=1&a=2&a=2"),
            ("/x?a=1&a=1", "/x?a=1&a=1", "/x?a=1 /x?a=1&a=1&a=1"),
            ("/x?a", "/x?a /x?a=", "/x /x?a=a /x?a&a= /x?a=="),
            ("/x?a=", "/x?a /x?a=", "/x /x?b"),
            ("/x?a=b=c", "/x?a=b=c", "/x?a=b /x?a=b%3Dc"),
            ("/x?q=a b", "/x?q=a+b /x?q=a%20b", "/x?q=a%2Bb /x?q=ab"),
        )

    def test_patterns_of_queries(self):
        self.check(
            (
                "/x?q=*",
                "/x?q /x?q= /x?q=1 /x?q=a/b=c /x?q=AT%26T /x?&q=1&",
                "/x /x? /x?q=1&r=2 /x?q=1&q=2 /x?qq=1 /x?r=1 /y?q=1",
            ),
            ("/x?*=1", "/x?a=1 /x?b%26=1 /x?=1", "/x /x?a=2 /x?a=11 /x?a=1&b=1 /x?a=0&b=1"),
            ("/x?*", "/x?a /x?a=1", "/x?a&b /x?a=1&b=2"),
            ("/x?*=", "/x?a /x?a= /x?*", "/x?a=1 /x?a&b"),
            ("/x?a*", "/x?a /x?a=1 /x?ab=1", "/x?b /x?a&a"),
            ("/x?*b", "/x?a=b /x?ab /x?ab= /x?b", "/x?a /x?b=a /x?a&b"),
            ("/x?a*c", "/x?a=c /x?abc /x?abc= /x?ab=c", "/x?ab /x?abc=d"),
            ("/*?a=1&b=2", "/x?b=2&a=1", "/x?a=1 /x?b=1&a=2"),
            ("/x?a=*&b=*", "/x?a=1&b=2 /x?b&a", "/x?a=1 /x?a=1&a=2 /x?a=1&b=2&c=3"),
            # Not the first match that comes, but one for each.
            ("/x?*=1&a=*", "/x?a=1&b=1 /x?b=1&a=1 /x?a=1&a=2 /x?a=2&b=1", "/x?b=1&c=1 /x?a=2&b=2"),
            ("/x?q=caf%c3%a9*", "/x?q=caf\u00e9+au+lait", "/x?q=cafe"),
            ("/x?q=%2A", "/x?q=%2a", "/x?q=a /x?q=*"),
            ("/*?q=1", "/?q=1 /a/b?q=1", "/ /?q=2"),
            (
                "http://*/?q=*",
                "http://a.example/?q=1",
                "http://a.example/ http://a.example:81/?q=1",
            ),
        )

    def test_patterns_of_many_equal_parameters(self):
        server = self.serve()
        many = sys.getrecursionlimit() + 1  # so that no function may call itself for each
        server.respond("/x?" + "&".join(["id=*"] * many), 299)
        for number, status in ((many - 1, 404), (many, 299), (many + 1, 404)):
            target = "/x?" + "&".join(["id=1"] * number)
            self.assertEqual(ask(server, target).status, status)
        self.assertEqual(server.errors, [])

    def test_the_normal_form(self):
        server = self.serve()
        with server.intercept():
            for spellings in self.EQUAL:
                for one, other in itertools.permutations(spellings.split(), 2):
                    with self.subTest(one, other=other):
                        self.assertTrue(self.matches(server, one, other))
                        server.respond(other, 201)
                        server.respond(one, 202)
                        self.assertEqual(ask(server, other).status, 202)
                        self.assertEqual(server.unused, [])
            for spellings in self.DIFFERENT:
                for one, other in itertools.permutations(spellings.split(), 2):
                    with self.subTest(one, other=other):
                        self.assertFalse(self.matches(server, one, other))
                        server.respond(one, 201)
                        server.respond(other, 202)
                        self.assertEqual(ask(server, one).status, 201)
                        self.assertEqual(ask(server, other).status, 202)

    def refuses(self, error, words, function, *args, **kwargs):
        with self.subTest(args, **kwargs), self.assertRaisesRegex(error, words):
            function(*args, **kwargs)

    def test_what_cannot_be_matched(self):
        server = self.serve()
        for address, words in (
            ("https://", "(?i)host"),
            ("http:///x", "(?i)host"),
            ("http://:80/", ":80"),
            ("http://exa mple/", "exa mple"),
            ("http://exa mple*/", r"exa mple\*"),
            ("https://a:b/", "a:b"),
            ("http://a.example:99999/", "99999"),
            ("http://a.example:*/", r"(?i)\*.*port|port.*\*"),
            ("http://a.example:80*/", r"(?i)80\*.*port|port.*80\*"),
            ("https://*:*/x", r"(?i)\*.*port|port.*\*"),
            ("*://a.example/", r"\*.*scheme|scheme.*\*|\*://.*http"),
            ("http*://a.example/", r"http\*"),
            ("ftp://a.example/x", "ftp.*http|http.*ftp"),
            ("feed://*/x", "feed.*http|http.*feed"),
        ):
            self.refuses(ValueError, words, server.respond, address, 200)
            self.refuses(ValueError, words, server.wait_for_request, address, timeout=0)
        for address in (
            "http://a.example",
            "https://a.example/x",
            "https://a.example?q",
            "/x",
            "x",
        ):
            words = f"(?s){re.escape(address)}.*https|https.*{re.escape(address)}"
            self.refuses(ValueError, words, server.respond, address, 200, method="CONNECT")
            self.refuses(
                ValueError, words, server.wait_for_request, address, method="CONNECT", timeout=0
            )
        for path in (b"/x", 1, pathlib.PurePosixPath("/x"), ["/x"]):
            words = re.escape(repr(path))
            self.refuses(TypeError, words, server.respond, path, 200)
            self.refuses(TypeError, words, server.wait_for_request, path, timeout=0)
        self.refuses(TypeError, "None", server.respond, None, 200)
        self.assertEqual(server.unused, [])

    def test_methods_that_no_request_has(self):
        server = self.serve()
        for method, words in (
            (1, "^method: found 1;"),
            ("post", "'post'.*'?POST"),
            ("Get", "'Get'.*'?GET"),
            ("connect", "'connect'.*'?CONNECT"),
            ("QUIT", "'QUIT'"),
            ("", "''"),
            ("GET ", "'GET '"),
            ("GET/POST", "'GET/POST'"),
            ("caf\u00e9", "'caf\u00e9'"),
        ):
            self.refuses(ValueError, words, server.respond, "/x", 200, method=method)
            self.refuses(ValueError, words, server.wait_for_request, "/x", method=method, timeout=0)
        self.assertEqual(server.unused, [])


class WaitTest(ServerTestCase):
    def test_it_waits_for_the_last_of_so_many(self):
        server = self.serve()
        thread = threading.Thread(target=self.fetch, args=(server, 3))
        thread.start()
        request = server.wait_for_request("/x", times=3, timeout=PATIENCE)
        self.assertEqual(request.query, {"n": ["2"]})
        thread.join()

    def fetch(self, server, number):
        for n in range(number):
            self.get(server, f"/x?n={n}")

    def field_value(self, text, looked_at):
        """The value of a field that notes each time when it is looked at."""

        class Value(str):
            def __eq__(self, other):
                looked_at()
                return f"{self}" == other

            __hash__ = str.__hash__

        return Value(text)

    def test_filters(self):
        server = self.serve()
        self.get(server, "/x", "POST", b"abc", {"X": "1"})
        for arguments, found in (
            ({}, True),
            ({"path": "x"}, True),
            ({"path": "/y"}, False),
            ({"path": "/x?"}, True),
            ({"path": "/x?a"}, False),
            ({"path": "/*", "method": "POST"}, True),
            ({"path": "http://*/x"}, False),
            ({"method": "POST"}, True),
            ({"method": "GET"}, False),
            ({"headers": {"x": "1"}}, True),
            ({"headers": {"X": "2"}}, False),
            ({"headers": {"Y": None}}, True),
            ({"headers": {"X": None}}, False),
            ({"body": b"abc"}, True),
            ({"body": "abc"}, True),
            ({"body": b""}, False),
        ):
            with self.subTest(arguments):
                if found:
                    self.assertIs(
                        server.wait_for_request(**arguments, timeout=0), server.requests[0]
                    )
                else:
                    with self.assertRaises(AssertionError):
                        server.wait_for_request(**arguments, timeout=0)

    def test_without_a_limit(self):
        server = self.serve()
        self.get(server, "/x")
        request = server.wait_for_request("/x", timeout=None)
        self.assertEqual([request], server.requests)

    def test_none_is_not_to_be_waited_for(self):
        with self.assertRaisesRegex(ValueError, "^times: found 0; it takes 1 or more"):
            self.serve().wait_for_request(times=0)

    def test_it_looks_at_each_request_once(self):
        """And once more at its end."""
        server = self.serve()
        looked_at, begun = [], threading.Event()

        def look():
            looked_at.append(1)
            begun.set()

        fields = {"N": self.field_value("1", look)}
        options = {"headers": fields, "times": 30, "timeout": PATIENCE}
        waiter = threading.Thread(target=server.wait_for_request, kwargs=options)
        for number in range(30):
            self.get(server, "/x", headers={"N": "1"})
            if number == 10:
                waiter.start()
                self.assertTrue(begun.wait(PATIENCE))
        waiter.join()
        self.assertLessEqual(len(looked_at), 2 * 30)

    def test_what_was_cleared_does_not_count(self):
        server = self.serve()
        both, found = threading.Semaphore(0), []
        fields = {"N": self.field_value("1", both.release)}

        def wait():
            found.append(server.wait_for_request(headers=fields, times=3, timeout=PATIENCE))

        for _ in range(2):
            self.get(server, "/old", headers={"N": "1"})
        waiter = threading.Thread(target=wait)
        waiter.start()
        for _ in range(2):
            self.assertTrue(both.acquire(timeout=PATIENCE))
        server.clear()
        for number in range(3):
            self.get(server, f"/{number}", headers={"N": "1"})
        waiter.join()
        self.assertEqual(found, server.requests[2:])

    def test_it_says_what_did_arrive(self):
        server = self.serve()
        self.get(server, "/other", headers={"X": "1"})
        with self.assertRaises(AssertionError) as caught:
            server.wait_for_request(
                "/x", method="GET", headers={"X": "1"}, body=b"", times=2, timeout=0
            )
        self.assertEqual(
            str(caught.exception),
            "expected GET /x with X: 1 and with the body b'' at least twice within 0 s;"
            " it was not requested\n"
            "The server got:\n  GET /other -> 404\n      X: 1\n      b''",
        )

    def test_it_does_not_wait_for_a_server_that_has_stopped(self):
        server = self.serve()
        thread = threading.Thread(target=server.stop)
        thread.start()
        with self.assertRaisesRegex(AssertionError, "at least once before the server stopped; it"):
            server.wait_for_request("/x", timeout=PATIENCE)
        thread.join()

    def test_it_does_not_wait_for_a_server_that_has_stopped_while_it_was_down(self):
        def stop_while_it_is_down():
            with server.down():
                server.stop()

        server = self.serve()
        thread = threading.Thread(target=stop_while_it_is_down)
        thread.start()
        with self.assertRaisesRegex(AssertionError, " before the server stopped; it was not"):
            server.wait_for_request("/x", timeout=PATIENCE)
        thread.join()

    def test_it_goes_on_while_the_server_is_down(self):
        server, looked_at, found = self.serve(), threading.Event(), []
        fields = {"N": self.field_value("1", looked_at.set)}

        def wait():
            found.append(server.wait_for_request(headers=fields, times=2, timeout=PATIENCE))

        self.get(server, "/1", headers={"N": "1"})
        waiter = threading.Thread(target=wait)
        waiter.start()
        self.assertTrue(looked_at.wait(PATIENCE))
        with server.down(), self.assertRaisesRegex(AssertionError, " within 0 s; it was not"):
            server.wait_for_request("/2", timeout=0)
        self.get(server, "/2", headers={"N": "1"})
        waiter.join()
        self.assertEqual(found, server.requests[1:])


class AssertionTest(ServerTestCase):
    """The server's own assertions, which need no TestCase."""

    def failure(self, function, *args, **kwargs):
        """The words of a plain AssertionError."""
        with self.assertRaises(AssertionError) as caught:
            function(*args, **kwargs)
        self.assertIs(type(caught.exception), AssertionError)
        return str(caught.exception)

    def test_assert_requested(self):
        server = self.serve()
        for number in "12":
            self.get(server, f"/x?n={number}", headers={"N": number})
        first, last = server.requests
        for arguments, request in (
            ({}, last),
            ({"times": 2, "method": "GET", "body": b""}, last),
            ({"headers": {"n": "1", "M": None}, "times": 1}, first),
        ):
            with self.subTest(arguments):
                self.assertIs(server.assert_requested("/x", **arguments), request)
        self.assertIs(server.assert_requested("x?n=1"), first)
        self.assertIs(server.assert_requested(server.get_url("x"), times=2), last)
        transcript = "\nThe server got:\n  GET /x?n=1 -> 404\n      N: 1\n  GET /x?n=2 -> 404"
        for path, arguments, words in (
            ("/y", {}, "/y"),
            ("/x", {"times": 2}, "/x"),
            ("/x", {"method": "POST"}, "POST /x"),
            ("/x", {"headers": {"N": "3"}}, "/x with N: 3"),
            ("/x", {"headers": {"n": None}}, "/x without n"),
            ("", {}, "expected / with N: 1 "),
        ):
            with self.subTest(path, **arguments):
                arguments = {"headers": {"N": "1"}, **arguments}
                failure = self.failure(server.assert_requested, path, **arguments)
                self.assertIn(words, failure.partition("\n")[0])
                self.assertIn(transcript.lower(), failure.lower())

    def test_assert_not_requested(self):
        server = self.serve()
        server.assert_not_requested()
        server.assert_not_requested("/x")
        self.get(server, "/x", "POST", b"abc")
        for arguments in (
            {"path": "/y"},
            {"method": "GET"},
            {"body": "ab"},
            {"headers": {"N": "1"}},
        ):
            with self.subTest(arguments):
                self.assertIsNone(server.assert_not_requested(**arguments))
        for arguments, what in (
            ({}, "request"),
            ({"path": "/x"}, "/x"),
            ({"method": "POST"}, "POST"),
            ({"headers": {"N": None}}, "request without N"),
        ):
            with self.subTest(arguments):
                self.assertEqual(
                    self.failure(server.assert_not_requested, **arguments),
                    f"expected no {what}; got 1\nThe server got:\n  POST /x -> 405",
                )
        self.assertIn("b'abc'", self.failure(server.assert_not_requested, body="abc"))

    def test_not_requested_at_all_means_refused_requests_and_other_hosts_too(self):
        server = self.serve()
        for sent, line in (
            (b"\0", "(unreadable) -> 400"),
            (b"GET http://a.example/ HTTP/1.0\r\n\r\n", "GET http://a.example/ -> 502"),
        ):
            server.clear()
            server.assert_not_requested()
            exchange_end(server, sent)
            with self.subTest(sent):
                self.assertIn(line, self.failure(server.assert_not_requested))

    def test_assert_polite(self):
        server = self.serve()
        server.respond("/x", 200)
        server.assert_polite()
        self.get(server, "/x", headers={**POLITE, "Referer": "a"})
        failure = self.failure(server.assert_polite)
        self.assertRegex(failure, r"^the client was not polite:\n  GET /x .*\[referer\]\nThe serv")
        server.assert_polite(ignore=["referer"])
        server.assert_polite(ignore=["referer"], every=60)
        for ignore in ("referer", ["refer"], None, 5):
            with self.subTest(ignore), self.assertRaisesRegex(ValueError, "^ignore: found "):
                server.assert_polite(ignore=ignore)

    def test_assert_polite_with_an_interval(self):
        server = self.serve()
        server.respond("/x", 200)
        for _ in range(2):
            self.get(server, "/x", headers=POLITE)
        server.assert_polite()
        server.assert_polite(every=None)
        server.assert_polite(every=60, ignore=["too-often", "burst"])
        failure = self.failure(server.assert_polite, every=60, ignore=["repeated"])
        self.assertRegex(
            failure,
            r"\Athe client was not polite:\n"
            r"  GET /x \(2nd request\): .*\b0 s\b.*\b60 s\b.* \[too-often\]\nThe server got:\n",
        )
        for every in (0, -1, float("nan"), INFINITY, True, "60"):
            for arguments in ({}, {"ignore": ["too-often"]}):
                with (
                    self.subTest(every, **arguments),
                    self.assertRaisesRegex(ValueError, "^every: found .*; it takes a positive num"),
                ):
                    server.assert_polite(every=every, **arguments)

    def test_a_body_as_json(self):
        server, value = self.serve(), {"b": [1, None, {"c": True}], "a": "\u00fc"}
        for body, wire, found in (
            (value, b' {"a":\n"\\u00fc", "b": [1,null,\t{"c":true}]} ', True),
            (value, '{"b":[1,null,{"c":true}],"a":"\u00fc"}'.encode(), True),
            (value, b'{"a": "\\u00fc", "b": [1, null, {"c": 1}]}', False),
            (value, b'{"a": "\\u00fc", "b": [true, null, {"c": true}]}', False),
            ([1, 2], b"[2, 1]", False),
            ([0], b"[false]", False),
            ({"a": None}, b"{}", False),
            ({}, b"{}", True),
            ({}, b"[]", False),
            ([], b"[]", True),
            ([], b"", False),
            ({"a": 1}, b"{'a': 1}", False),
            ([], b"\xff", False),
            ([], b"[" * 100_000, False),
            ("[1, 2]", b"[1,2]", False),
            ("[1,2]", b"[1,2]", True),
            ({"a": 1}, b'{"a": 1.0}', True),
            ({"a": 1}, b'{"a": 1e0}', True),
            ({"a": 1.0}, b'{"a": 1}', True),
            ([100, 0, 1.5], b"[1e2, -0.0, 15E-1]", True),
            ([-0.0], b"[0]", True),
            ([1], b"[1.5]", False),
            ([1.5], b"[1]", False),
            ([1], b'["1"]', False),
            (["1"], b"[1.0]", False),
            ([1], b"[true]", False),
            ([True], b"[1.0]", False),
        ):
            server.clear()
            self.get(server, "/x", "POST", wire)
            [request] = server.requests
            with self.subTest(body, wire=wire[:60]):
                if found:
                    self.assertIs(server.assert_requested("/x", body=body, times=1), request)
                    self.assertIs(server.wait_for_request(body=body, timeout=0), request)
                    self.failure(server.assert_not_requested, body=body)
                else:
                    server.assert_not_requested(body=body)
                    self.failure(server.wait_for_request, body=body, timeout=0)
                    failure = self.failure(server.assert_requested, "/x", body=body)
                    self.assertIn(f"\n      {wire!r:.60}"[:60], failure)
        failure = self.failure(server.assert_requested, "/x", body={"a": 2})
        self.assertIn('/x with the JSON body {"a": 2} ', failure)

    def test_arguments_are_checked_at_the_call(self):
        """Also where nothing has arrived with which they could be compared."""
        server = self.serve()
        functions = [server.assert_requested, server.assert_not_requested, server.wait_for_request]
        endless = [1]
        endless.append(endless)
        for error, arguments in (
            (TypeError, {"path": b"/x"}),
            (TypeError, {"path": 5}),
            (TypeError, {"body": 5}),
            (TypeError, {"body": True}),
            (TypeError, {"body": {"a": b""}}),
            (TypeError, {"body": [{1, 2}]}),
            (TypeError, {"body": {1: 2, "a": object()}}),
            (TypeError, {"body": {"a": {1, 2}}}),
            (TypeError, {"body": [float("nan")]}),
            (TypeError, {"body": endless}),
            (TypeError, {"headers": {"X": 1}}),
            (TypeError, {"headers": {"X": b"1"}}),
            (TypeError, {"headers": {"X": ["1"]}}),
            (TypeError, {"headers": {1: "x"}}),
            (TypeError, {"headers": {"": "x"}}),
            (TypeError, {"headers": {"X Y": "x"}}),
            (TypeError, {"headers": {"X:": None}}),
            (TypeError, {"headers": "X: 1"}),
            (ValueError, {"method": 1}),
            (ValueError, {"path": "http:///x"}),
            (ValueError, {"path": "http://a.example:*/x"}),
            (ValueError, {"path": "*://a.example/x"}),
            (ValueError, {"times": 0}),
            (ValueError, {"times": -1}),
            (ValueError, {"times": "2"}),
            (ValueError, {"times": 1.5}),
        ):
            [name] = arguments
            words = "" if name == "path" else f"^{name}: found "
            for function in functions[:: 2 if name == "times" else 1]:
                call = f"{function.__name__}({arguments})"
                with self.subTest(call), self.assertRaisesRegex(error, words):
                    function(**{"path": "/x", **arguments})

    def test_addresses_mean_what_they_mean_in_respond(self):
        server = self.serve()
        server.respond("http://*.example/*", 200)
        for target in ("/api/a?x=1&y=2", "/api/b", "http://a.example/api"):
            exchange(server, f"GET {target} HTTP/1.0\r\n\r\n".encode())
        first, second, third = server.requests
        for path, times, last in (
            ("/api/*", 2, second),
            ("api/a?y=2&x=1", 1, first),
            ("/%61pi/b?", 1, second),
            ("http://*.example/*", 1, third),
            ("*", 3, third),
        ):
            with self.subTest(path):
                self.assertIs(server.assert_requested(path, times=times), last)
                self.assertIs(server.wait_for_request(path, times=times, timeout=0), last)
                self.failure(server.assert_not_requested, path)
        server.assert_not_requested("/api")


# The audit

#: What a polite client sends in any case; a transcript may say otherwise.
POLITE = {"User-Agent": "reader/1", "Accept-Encoding": "gzip", "Accept": "application/rss+xml"}

#: Titles, requests and responses: "METHOD TARGET | FIELD -> STATUS | FIELD !! RULES", where
#: +SECONDS is the time that passes before, "no FIELD" leaves one out, and the rules are those that
#: the request breaks; it keeps all others. "every SECONDS" says how often the client may ask.
#: Each request has a connection of its own and waits for the one before, unless it begins with the
#: number of its connection: "1: GET ..." is only sent. Its response begins at "1 comes", or the
#: client gives it up at "1 leaves". "1-3: GET /{}.xml ..." are three of these, with their numbers.
TRANSCRIPTS = {
    # Validators that are to be sent back
    "a conditional GET": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: "v1"
    """,
    "an unconditional GET": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml -> 200 | ETag: "v1" !! no-validator
        GET /feed.xml -> 200 | ETag: "v1" !! no-validator
    """,
    "an unconditional GET after a date": """
        GET /feed.xml -> 200 | Last-Modified: YESTERDAY
        GET /feed.xml -> 200 !! no-validator
    """,
    "one of two validators is enough": """
        GET /feed.xml -> 200 | ETag: "v1" | Last-Modified: YESTERDAY
        GET /feed.xml | If-Modified-Since: YESTERDAY -> 304
        GET /feed.xml | If-None-Match: "v1" -> 304
    """,
    "both validators": """
        GET /feed.xml -> 200 | ETag: "v1" | Last-Modified: YESTERDAY
        GET /feed.xml | If-None-Match: "v1" | If-Modified-Since: YESTERDAY -> 304
    """,
    "no validator is given": """
        GET /feed.xml -> 200
        GET /feed.xml -> 200
    """,
    "an empty validator is none": """
        GET /feed.xml -> 200 | ETag: | Last-Modified:
        GET /feed.xml -> 200
    """,
    "what is malformed need not be sent back": """
        GET /feed.xml -> 200 | ETag: v1 | Last-Modified: yesterday
        GET /feed.xml -> 200 | ETag: v1 | Last-Modified: yesterday
        GET /feed.xml | If-None-Match: v1 | If-Modified-Since: yesterday -> 304
    """,
    "a 200 without validators ends those before": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200
        GET /feed.xml -> 200
        GET /feed.xml | If-None-Match: "v1" -> 200 !! wrong-etag
    """,
    "a 304 without validators keeps those before": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 304
        GET /feed.xml -> 200 !! no-validator
    """,
    "an error keeps the validators": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 500
        GET /feed.xml | If-None-Match: "v1" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 404 | ETag: "lost"
        GET /feed.xml | If-None-Match: "lost" -> 404 !! wrong-etag
        GET /feed.xml -> 200 !! no-validator
    """,
    "what must not be stored cannot be sent back": """
        GET /feed.xml -> 200 | ETag: "v1" | Cache-Control: max-age=60, no-store
        GET /feed.xml | If-None-Match: "v1" -> 304
        GET /feed.xml -> 200
    """,
    "a validator that only a 304 gave": """
        GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: "v1"
        GET /feed.xml -> 200 !! no-validator
    """,
    "a delta": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | A-IM: feed | If-None-Match: "v1" -> 226 | ETag: "v2" | IM: feed
        GET /feed.xml | A-IM: feed | If-None-Match: "v2" -> 226 | ETag: "v3" | IM: feed
        GET /feed.xml | If-None-Match: "v0" -> 200 !! wrong-etag
    """,
    "no part was asked for": """
        GET /1.mp3 -> 200 | ETag: "v1"
        GET /1.mp3 | If-Range: "v1" -> 200 !! no-validator
    """,
    "the rest of a download": """
        GET /1.mp3 -> 200 | ETag: "v1" | Content-Type: audio/mpeg
        GET /1.mp3 | Range: bytes=3- | If-Range: "v1" -> 206 | ETag: "v1"
        GET /1.mp3 | If-None-Match: "v1" -> 304
    """,
    "a part is no copy": """
        GET /1.mp3 | Range: bytes=0-2 -> 206 | ETag: "v1"
        GET /1.mp3 | Range: bytes=3-5 -> 206 | ETag: "v1"
    """,
    # The last ETag, byte for byte
    "a changed ETag": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v2" -> 304 | ETag: "v2"
    """,
    "a changed ETag that is not noticed": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2" !! wrong-etag
    """,
    "a 200 after a 304": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v2" -> 304 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2" !! wrong-etag
    """,
    "an ETag that a 304 gives": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: W/"v1"
        GET /feed.xml | If-None-Match: W/"v1" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 304 !! wrong-etag
    """,
    "an ETag that a 304 gives, with the length of what it does not send": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: "v2" | Content-Length: 100
        GET /feed.xml | If-None-Match: "v1" -> 304 !! wrong-etag
    """,
    "an ETag that a later response has overtaken": """
        1: GET /feed.xml -> 200 | ETag: "v1"
        2: GET /feed.xml | Cache-Control: no-cache -> 200 | ETag: "v2"
        2 comes
        1 comes
        GET /feed.xml | If-None-Match: "v2" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v1" -> 200 !! wrong-etag
    """,
    "a weak ETag": """
        GET /feed.xml -> 200 | ETag: W/"v1"
        GET /feed.xml | If-None-Match: W/"v1" -> 304
    """,
    "a weak ETag made strong": """
        GET /feed.xml -> 200 | ETag: W/"v1"
        GET /feed.xml | If-None-Match: "v1" -> 304 !! wrong-etag
    """,
    "a strong ETag made weak": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: W/"v1" -> 304 !! wrong-etag
    """,
    "an ETag that lost its quotes": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: v1 -> 200 !! wrong-etag
    """,
    "an ETag that was quoted once more": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: ""v1"" -> 200 !! wrong-etag
        GET /feed.xml | If-None-Match: "\\"v1\\"" -> 200 !! wrong-etag
    """,
    "an ETag that never had quotes": """
        GET /feed.xml -> 200 | ETag: v1
        GET /feed.xml | If-None-Match: v1 -> 304
        GET /feed.xml | If-None-Match: "v1" -> 200 !! wrong-etag
    """,
    "an ETag with a comma": """
        GET /feed.xml -> 200 | ETag: W/"v1, second edition"
        GET /feed.xml | If-None-Match: W/"v1, second edition" -> 304
        GET /feed.xml -> 200 !! no-validator
    """,
    "a list of ETags": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2, b"
        GET /feed.xml | If-None-Match: "v1", "v2, b" -> 304
        GET /feed.xml | If-None-Match: "v1","v0" -> 200 !! wrong-etag
        GET /feed.xml | If-None-Match: "v1, "v2, b" -> 200 !! wrong-etag
    """,
    "any ETag will do": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: * -> 304 !! wrong-etag
    """,
    "a blank If-None-Match": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: -> 200 | ETag: !! wrong-etag
        GET /feed.xml | If-None-Match: -> 200 !! wrong-etag
    """,
    "a made up ETag": """
        GET /feed.xml | If-None-Match: "made up" -> 200 !! wrong-etag
        GET /feed.xml | If-None-Match: "made up" -> 200 !! wrong-etag
    """,
    "two ETags in one response": """
        GET /feed.xml -> 200 | ETag: "v1" | ETag: "v2"
        GET /feed.xml | If-None-Match: "v1" -> 304
        GET /feed.xml | If-None-Match: "v2" -> 304
        GET /feed.xml | If-None-Match: "v1", "v2" -> 304
        GET /feed.xml | If-None-Match: "v3" -> 200 !! wrong-etag
    """,
    "what a first 304 confirms was given before the record began": """
        GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: "v1"
        GET /old.xml | If-None-Match: "v1" -> 304
        GET /old.xml | If-None-Match: "v1" -> 304
        GET /new.xml | If-None-Match: "v1" -> 304 | ETag: W/"v1" !! wrong-etag
        GET /list.xml | If-None-Match: "v1", "v2" -> 304
        GET /list.xml | If-None-Match: "v2" -> 304
        GET /any.xml | If-None-Match: * -> 304 !! wrong-etag
    """,
    "an error at first tells nothing of what was given before": """
        GET /feed.xml | If-None-Match: "v1" | If-Modified-Since: YESTERDAY -> 503
        GET /feed.xml | If-None-Match: "v1" | If-Modified-Since: YESTERDAY -> 304
        GET /feed.xml | If-None-Match: "v2" -> 500 !! wrong-etag
    """,
    "a first 304 for both validators": """
        GET /feed.xml | If-None-Match: "v1" | If-Modified-Since: YESTERDAY -> 304 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" | If-Modified-Since: YESTERDAY -> 304 | ETag: "v1"
    """,
    # The last Last-Modified, byte for byte
    "a changed date": """
        GET /feed.xml -> 200 | Last-Modified: YESTERDAY
        GET /feed.xml | If-Modified-Since: YESTERDAY
            -> 200 | Last-Modified: Sat, 07 Mar 2009 09:00:00 GMT
        GET /feed.xml | If-Modified-Since: Sat, 07 Mar 2009 09:00:00 GMT -> 304
        GET /feed.xml | If-Modified-Since: YESTERDAY -> 200 !! wrong-date
    """,
    "the time of the last fetch": """
        GET /feed.xml -> 200 | Last-Modified: YESTERDAY
        GET /feed.xml | If-Modified-Since: Sat, 07 Mar 2009 10:00:00 GMT -> 304 !! wrong-date
    """,
    "the same date in another format": """
        GET /feed.xml -> 200 | Last-Modified: YESTERDAY
        GET /feed.xml | If-Modified-Since: Friday, 06-Mar-09 10:00:00 GMT -> 304 !! wrong-date
        GET /feed.xml | If-Modified-Since: Fri, 6 Mar 2009 10:00:00 GMT -> 304 !! wrong-date
    """,
    "a date where none was given": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" | If-Modified-Since: Sat, 07 Mar 2009 10:00:00 GMT
            -> 304 !! wrong-date
    """,
    "two dates in one response": """
        GET /feed.xml -> 200 | Last-Modified: YESTERDAY | Last-Modified: NOW
        GET /feed.xml | If-Modified-Since: YESTERDAY -> 304
        GET /feed.xml | If-Modified-Since: NOW -> 304
        GET /feed.xml | If-Modified-Since: YESTERDAY, NOW -> 304
    """,
    "the beginning of time, at first": """
        GET /feed.xml | If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT -> 200 !! wrong-date
    """,
    "a right ETag with a wrong date": """
        GET /feed.xml -> 200 | ETag: "v1" | Last-Modified: YESTERDAY
        GET /feed.xml | If-None-Match: "v1" | If-Modified-Since: Thu, 05 Mar 2009 10:00:00 GMT
            -> 304 !! wrong-date
    """,
    # What is not known by a GET that came whole
    "HEAD before GET": """
        HEAD /feed.xml | no User-Agent -> 200 | ETag: "v1" | Cache-Control: max-age=60
        GET /feed.xml -> 200 | ETag: "v1"
        HEAD /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 304
    """,
    "HEAD tells of a change": """
        GET /feed.xml -> 200 | ETag: "v1"
        HEAD /feed.xml -> 200 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        HEAD /feed.xml -> 200 | ETag: "v3"
        GET /feed.xml | If-None-Match: "v3" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 200 !! wrong-etag
    """,
    "HEAD tells of the end": """
        HEAD /feed.xml -> 410
        GET /feed.xml -> 410
        HEAD /old.xml -> 301 | Location: /feed.xml
        GET /old.xml -> 200
    """,
    "only GET is judged": """
        POST /hub | no User-Agent | no Accept | no Accept-Encoding -> 429 | Retry-After: 60
        POST /hub | Referer: http://127.0.0.1/ | Cookie: a=1 -> 410
        OPTIONS /hub -> 200 | ETag: "v1"
        GET /hub | If-None-Match: "v1" -> 200 !! wrong-etag
    """,
    "a response that is broken off": """
        GET /feed.xml -> 200 | ETag: "v1" | Cache-Control: max-age=60 | Fault: reset at 50%
        GET /feed.xml -> 200 | ETag: "v1" | Fault: close
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2" | Fault: close at headers
        GET /feed.xml | If-None-Match: "v1" -> 410 | Fault: reset
        GET /feed.xml | If-None-Match: "v2" -> 200 | ETag: "v2"
        GET /feed.xml -> 200 !! no-validator
    """,
    "a response that came whole before it broke off": """
        GET /feed.xml -> 200 | ETag: "v1" | Fault: close at 100%
        GET /feed.xml -> 200 !! no-validator
    """,
    "a connection that ended after all of the response": """
        GET /feed.xml -> 200 | ETag: "v1" | Fault: close at end
        GET /feed.xml -> 200 | ETag: "v2" | Chunked: 3 | Fault: close at end !! no-validator
        GET /feed.xml -> 200 | ETag: "v2" | Chunked: 3 | Fault: reset at end !! no-validator
        GET /feed.xml | If-None-Match: "v2" -> 304 | ETag: "v2" | Fault: close at end
        GET /feed.xml | If-None-Match: "v2" -> 410 | Fault: close at end
        GET /feed.xml | If-None-Match: "v2" -> 410 !! gone
    """,
    "a response that promises more": """
        GET /feed.xml -> 200 | ETag: "v1" | Content-Length: 100
        GET /feed.xml -> 200 | ETag: "v1"
    """,
    "a response in chunks with a false length": """
        GET /feed.xml -> 200 | ETag: "v1" | Chunked: 3 | Content-Length: 100
        GET /feed.xml -> 200 | ETag: "v1" !! no-validator
    """,
    "an end of chunks that never came": """
        GET /feed.xml -> 200 | ETag: "v1" | Chunked: 3 | Fault: close at 100%
        GET /feed.xml -> 200 | ETag: "v1"
    """,
    "a page instead of the feed": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | Content-Type: text/html; charset=utf-8
        GET /feed.xml -> 200 | Content-Type: text/html
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "page" | Content-Type: text/html
        GET /feed.xml -> 200 | ETag: "page" | Content-Type: text/html
        GET /feed.xml | If-None-Match: "page" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2" !! wrong-etag
        GET /feed.xml | If-None-Match: "page" -> 200 | ETag: "v2" !! wrong-etag
    """,
    "a feed that is called a page": """
        GET /index.html -> 200 | ETag: "v1" | Content-Type: application/rss+xml
        GET /index.html | If-None-Match: "v1" -> 304 | ETag: "v1"
        GET /index.html -> 200 !! no-validator
    """,
    "a page that a redirect leads to": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 302 | Location: /login
        GET /login | If-None-Match: "v1" -> 200 | Content-Type: text/html | Set-Cookie: a=1
        GET /feed.xml | If-None-Match: "v1" -> 304
    """,
    "a page that always was one": """
        GET / -> 200 | ETag: "p1" | Content-Type: text/html
        GET / | If-None-Match: "p1" -> 200 | ETag: "p2" | Content-Type: text/html
        GET / | If-None-Match: "p1" -> 200 !! wrong-etag
    """,
    "two URLs": """
        GET /a.xml -> 200 | ETag: "a"
        GET /b.xml -> 200 | ETag: "b"
        GET /b.xml?page=2 -> 200 | ETag: "b2"
        GET http://example.com/a.xml -> 200 | ETag: "c"
        GET /a.xml | If-None-Match: "a" -> 304
        GET /b.xml | If-None-Match: "b" -> 304
        GET /b.xml?page=2 | If-None-Match: "b" -> 200 !! wrong-etag
        GET http://example.com/a.xml | If-None-Match: "a" -> 200 !! wrong-etag
        GET /b.xml -> 200 !! no-validator
    """,
    "two representations of one resource": """
        GET / | Accept: text/html
            -> 200 | ETag: "h" | Vary: Accept | Content-Type: text/html | Cache-Control: max-age=60
        GET / | Accept: application/rss+xml
            -> 200 | ETag: "f" | Vary: accept-encoding, ACCEPT | Cache-Control: max-age=60
        GET / | Accept: text/html | If-None-Match: "h" -> 503
        GET / | Accept: text/html | If-None-Match: "h" -> 304 | ETag: "h" | Vary: Accept
        GET / | Accept: application/rss+xml | If-None-Match: "f" -> 304 | ETag: "f" | Vary: Accept
        GET / | Accept: application/rss+xml -> 200 | Vary: Accept !! no-validator
        GET / | Accept: image/png | If-None-Match: "x" -> 200 !! wrong-etag no-feed-type
    """,
    "what varies with other things than what is wanted": """
        GET /feed.xml -> 200 | ETag: "v1" | Vary: Accept-Encoding, User-Agent, If-None-Match
        GET /feed.xml | User-Agent: other/2 | no Accept-Encoding
            -> 200 | ETag: "v1" | Vary: Accept-Encoding !! no-validator no-compression
        GET /feed.xml | Accept-Encoding: gzip, br | If-None-Match: "v2" -> 200 !! wrong-etag
    """,
    "an error for one variant": """
        GET /feed.xml -> 404 | Vary: Accept | Cache-Control: max-age=60
        GET /feed.xml | Accept: */* -> 200
    """,
    "a wait is for all variants": """
        GET /feed.xml -> 429 | Retry-After: 60 | Vary: Accept
        GET /feed.xml | Accept: */* -> 200 | Cache-Control: max-age=60 | Vary: Accept !! too-early
        GET /feed.xml | Accept: text/* -> 200
    """,
    # Redirects
    "a 304 through a temporary redirect": """
        GET /feed.xml -> 302 | Location: /today.xml
        GET /today.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 302 | Location: /today.xml
        GET /today.xml | If-None-Match: "v1" -> 304
        GET /feed.xml -> 302 | Location: /today.xml
        GET /today.xml -> 200 !! no-validator
    """,
    "a made up ETag through a redirect": """
        GET /feed.xml -> 307 | Location: today.xml
        GET /today.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: v1 -> 307 | Location: today.xml
        GET /today.xml | If-None-Match: v1 -> 200 !! wrong-etag
    """,
    "a redirect that leads elsewhere each day": """
        GET /feed.xml -> 302 | Location: /monday.xml
        GET /monday.xml -> 200 | ETag: "monday"
        GET /feed.xml | If-None-Match: "monday" -> 302 | Location: /tuesday.xml#top
        GET /tuesday.xml | If-None-Match: "monday" -> 200 | ETag: "tuesday"
        GET /feed.xml | If-None-Match: "monday" -> 302 | Location: /tuesday.xml
        GET /tuesday.xml | If-None-Match: "monday" -> 200 !! wrong-etag
    """,
    "a redirect that is there no more": """
        GET /feed.xml -> 302 | Location: /today.xml
        GET /today.xml -> 200 | ETag: "v1"
        GET /today.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "f1"
        GET /feed.xml | If-None-Match: "v1" -> 200 !! wrong-etag
    """,
    "a redirect to another copy": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 302 | Location: /sorry.html
        GET /sorry.html | If-None-Match: "v1" -> 200 | Content-Type: text/html
        GET /feed.xml -> 302 | Location: /today.xml
        GET /today.xml -> 200 | ETag: "v2"
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml -> 302 | Location: /today.xml !! no-validator
        GET /today.xml -> 304 !! no-validator
        GET /feed.xml -> 200 | ETag: "v1" !! no-validator
    """,
    "a redirect to a copy that came in another way": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /alias.xml -> 302 | Location: /feed.xml
        GET /feed.xml -> 200 | ETag: "v1"
        GET /alias.xml -> 302 | Location: /feed.xml
        GET /feed.xml -> 200 !! no-validator
    """,
    "a redirect with an ETag of its own": """
        GET /feed.xml -> 302 | Location: /today.xml | ETag: "r"
        GET /today.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "r" -> 200
    """,
    "a 304 that a redirect leads to, at the second attempt": """
        GET /old.xml -> 200 | ETag: "v1"
        GET /old.xml | If-None-Match: "v1" -> 301 | Location: /new.xml
        HEAD /new.xml -> 200
        GET /new.xml | If-None-Match: "v1" -> 401
        GET /new.xml | If-None-Match: "v1" -> 503
        GET /new.xml | If-None-Match: "v1" -> 304
        GET /new.xml | If-None-Match: "v1" -> 200
        GET /new.xml | If-None-Match: "v1" -> 200 !! wrong-etag
    """,
    "redirects of two URLs to one, at the same time": """
        GET /a.xml -> 200 | ETag: "a"
        GET /b.xml -> 200 | ETag: "b"
        GET /a.xml | If-None-Match: "a" -> 302 | Location: /all.xml
        GET /b.xml | If-None-Match: "b" -> 302 | Location: /all.xml
        GET /all.xml | If-None-Match: "a" -> 503
        GET /all.xml | If-None-Match: "b" -> 503
        GET /a.xml | If-None-Match: "b" -> 200 !! wrong-etag
    """,
    "redirects to odd places": """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1"
            -> 302 | Location: HTTP://user@Example.com:80?b%7Ec
        GET http://example.com/?b~c | If-None-Match: "v1" -> 200
        GET /feed.xml | If-None-Match: "v1" -> 302 | Location: http://:80/
        GET /feed.xml | If-None-Match: "v1" -> 302 | Location: http://a..b:\u00b2/
        GET /feed.xml | If-None-Match: "v1" -> 301 | Location: mailto:a@example.com
    """,
    "a Location that is of no redirect": """
        GET /a.xml -> 200 | ETag: "v1" | Location: /b.xml
        GET /b.xml | If-None-Match: "v1" -> 200 !! wrong-etag
    """,
    "a feed that moves takes its validators along": """
        GET /old.xml -> 200 | ETag: "v1" | Last-Modified: YESTERDAY
        GET /old.xml | If-None-Match: "v1" | If-Modified-Since: YESTERDAY
            -> 301 | Location: http://example.com/b%C3%BCcher?x=1
        GET http://example.com/b%C3%BCcher?x=1 | If-None-Match: "v1" | If-Modified-Since: YESTERDAY
            -> 200 | ETag: "v2"
        GET http://example.com/b%C3%BCcher?x=1 | If-None-Match: "v2" -> 304
    """,
    "a feed that comes back from a redirect": """
        GET /feed.xml -> 302 | Location: /today.xml
        GET /today.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        GET /feed.xml | If-None-Match: "v2" -> 304
    """,
    "a chain of redirects": """
        GET /a.xml -> 302 | Location: /b.xml
        GET /b.xml -> 303 | Location: /c.xml
        GET /c.xml -> 200 | ETag: "v1"
        GET /a.xml | If-None-Match: "v1" -> 302 | Location: /b.xml
        GET /b.xml | If-None-Match: "v1" -> 303 | Location: /d.xml
        GET /d.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        GET /a.xml | If-None-Match: "v2" -> 200
        GET /b.xml | If-None-Match: "v2" -> 200
    """,
    "a permanent redirect that is remembered": """
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 200 | ETag: "v1"
        GET /new.xml | If-None-Match: "v1" -> 304
    """,
    "a permanent redirect that is forgotten": """
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 200
        GET /old.xml -> 301 | Location: /new.xml !! moved
        GET /new.xml -> 200
        GET /old.xml -> 503 !! moved
        GET /old.xml -> 200 !! moved
        GET /old.xml -> 200
    """,
    "a permanent redirect that is not followed": """
        GET /old.xml -> 308 | Location: https://example.com/old.xml
        GET /old.xml -> 308 | Location: https://example.com/old.xml !! moved
    """,
    "a temporary redirect": """
        GET /old.xml -> 307 | Location: /new.xml | Cache-Control: max-age=60
        GET /new.xml -> 200
        GET /old.xml -> 307 | Location: /new.xml
        GET /new.xml -> 200
    """,
    "a permanent redirect to an error that is still on its way": """
        GET /old.xml -> 301 | Location: /new.xml
        1: GET /new.xml -> 404
        GET /old.xml -> 301 | Location: /new.xml
        1 comes
    """,
    "a permanent redirect to nowhere": """
        GET /old.xml -> 301
        GET /old.xml -> 301 | Location: http://[
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 404
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 200 | Fault: reset
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 302 | Location: /newer.xml
        GET /newer.xml -> 500
        GET /old.xml -> 200
    """,
    "a permanent redirect that no client can follow": """
        GET /old.xml -> 301 | Location: mailto:a@example.com
        GET /old.xml -> 308 | Location: http://:80/
        GET /old.xml -> 200
    """,
    "a permanent redirect that was found to work": """
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 200
        GET /new.xml -> 500
        GET /old.xml -> 301 | Location: /new.xml !! moved
        GET /new.xml -> 503
        GET /old.xml -> 301 | Location: /newer.xml !! moved
        GET /newer.xml -> 503
        GET /old.xml -> 200
    """,
    "a permanent redirect to what has worked before only": """
        GET /new.xml -> 200
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 502
        GET /old.xml -> 200
    """,
    "a permanent redirect that failed once": """
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 503
        GET /old.xml -> 301 | Location: /new.xml
        GET /old.xml -> 301 | Location: /new.xml !! moved
    """,
    "a permanent redirect whose end was looked at": """
        GET /old.xml -> 301 | Location: /new.xml
        HEAD /new.xml -> 200
        GET /new.xml -> 200
        GET /old.xml -> 200 !! moved
    """,
    "a loop of permanent redirects": """
        GET /a.xml -> 301 | Location: /b.xml
        GET /b.xml -> 301 | Location: /a.xml
        GET /a.xml -> 301 | Location: /b.xml
        GET /b.xml -> 301 | Location: /a.xml
        GET /loop.xml -> 301 | Location: /loop.xml
        GET /loop.xml -> 301 | Location: /loop.xml
        GET /a.xml -> 301 | Location: /b.xml
        GET /a.xml -> 301 | Location: /b.xml
    """,
    "a permanent redirect that a temporary one leads to": """
        GET /feed.xml -> 302 | Location: /old.xml
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 200
        GET /feed.xml -> 302 | Location: /old.xml
        GET /old.xml -> 301 | Location: /new.xml
        GET /new.xml -> 200
        GET /old.xml -> 200 !! moved
    """,
    "a redirect that sets a cookie": """
        GET /feed.xml -> 302 | Location: /feed.xml | Set-Cookie: seen=1; Path=/
        GET /feed.xml | Cookie: seen=1 -> 200 | ETag: "v1"
        GET /feed.xml | Cookie: seen=1 | If-None-Match: "v1" -> 304
    """,
    # Too early
    "Retry-After in seconds": """
        GET /feed.xml -> 429 | Retry-After: 120
        +119 GET /feed.xml -> 429 | Retry-After: 120 !! too-early
        +120 GET /feed.xml -> 503 | Retry-After: 60
        +59 GET /feed.xml -> 503 !! too-early
        +1 GET /feed.xml -> 200
    """,
    "Retry-After as a date": """
        GET /feed.xml -> 503 | Retry-After: Sat, 07 Mar 2009 11:00:00 GMT
        +3599 GET /feed.xml -> 503 | Retry-After: Saturday, 07-Mar-09 12:00:00 GMT !! too-early
        +3601 GET /feed.xml -> 200
    """,
    "Retry-After that says nothing": """
        GET /feed.xml -> 503 | Retry-After: soon
        GET /feed.xml -> 503 | Retry-After: -1
        GET /feed.xml -> 503 | Retry-After: 1.5
        GET /feed.xml -> 503 | Retry-After: Sat, 07 Mar 2009 09:00:00 GMT
        GET /feed.xml -> 500 | Retry-After: 60
        GET /feed.xml -> 200 | Retry-After: 60
        GET /feed.xml -> 200
    """,
    "Retry-After of another URL": """
        GET /a.xml -> 429 | Retry-After: 120
        GET /b.xml -> 200
    """,
    "max-age": """
        GET /feed.xml -> 200 | Cache-Control: public, Max-Age=60
        +59 GET /feed.xml -> 200 | Cache-Control: max-age="60" !! too-early
        +60 GET /feed.xml -> 200 | Cache-Control: max-age=0
        GET /feed.xml -> 200
    """,
    "max-age of a 304": """
        GET /feed.xml -> 200 | ETag: "v1" | Cache-Control: max-age=60
        +60 GET /feed.xml | If-None-Match: "v1" -> 304 | Cache-Control: max-age=60
        +59 GET /feed.xml | If-None-Match: "v1" -> 304 !! too-early
        GET /feed.xml | If-None-Match: "v1" -> 304
    """,
    "max-age less Age": """
        GET /feed.xml -> 200 | Cache-Control: max-age=60 | Age: 50
        +10 GET /feed.xml -> 200 | Cache-Control: max-age=60 | Age: 50
        +9 GET /feed.xml -> 200 | Cache-Control: max-age=60 | Age: 70 !! too-early
        GET /feed.xml -> 200 | Cache-Control: max-age=60 | Age: old
        +59 GET /feed.xml -> 200 | Cache-Control: max-age=60 | Age: 50 | Age: 0 !! too-early
        +10 GET /feed.xml -> 200
    """,
    "max-age less the age that Date tells": """
        GET /feed.xml -> 200 | Cache-Control: max-age=60 | Date: Sat, 07 Mar 2009 09:59:10 GMT
        +10 GET /feed.xml -> 200 | Cache-Control: max-age=60 | Date: Thu, 01 Jan 1970 00:00:00 GMT
        GET /feed.xml -> 200 | Cache-Control: max-age=60 | Date: now
        GET /feed.xml -> 200 | Cache-Control: max-age=60 | Date: Sat, 07 Mar 2009 12:00:00 GMT
            !! too-early
        +60 GET /feed.xml -> 200
    """,
    "max-age twice, or malformed": """
        GET /feed.xml -> 200 | Cache-Control: max-age=60, max-age=10
        +10 GET /feed.xml -> 200 | Cache-Control: max-age=soon
        GET /feed.xml -> 200 | Cache-Control: max-age
        GET /feed.xml -> 200 | Cache-Control: s-maxage=60
        GET /feed.xml -> 200 | Cache-Control: max-age=99999999999999999999
        GET /feed.xml -> 200 !! too-early
    """,
    "Expires": """
        GET /feed.xml -> 200 | Expires: Sat, 07 Mar 2009 10:01:00 GMT
        +59 GET /feed.xml -> 200 | Expires: Sat, 07 Mar 2009 10:01:00 GMT !! too-early
        +1 GET /feed.xml -> 200 | Expires: 0
        GET /feed.xml -> 200 | Expires: Sat, 07 Mar 2009 10:00:00 GMT
        GET /feed.xml -> 200 | Expires: NOW | Date: YESTERDAY
        GET /feed.xml -> 200
    """,
    "Expires where there is a max-age": """
        GET /feed.xml -> 200 | Expires: Sat, 07 Mar 2009 11:00:00 GMT | Cache-Control: max-age=10
        +10 GET /feed.xml
            -> 200 | Expires: Sat, 07 Mar 2009 09:00:00 GMT | Cache-Control: max-age=10
        +9 GET /feed.xml -> 200 !! too-early
    """,
    "no-cache": """
        GET /feed.xml -> 200 | Cache-Control: no-cache, max-age=60
        GET /feed.xml -> 200 | Cache-Control: max-age=60, no-cache="Set-Cookie, Age"
        GET /feed.xml -> 200 | Cache-Control: no-store, max-age=60
        GET /feed.xml -> 200 | Cache-Control: max-age=60 | Vary: *
        GET /feed.xml -> 200
    """,
    "no-cache does without time, not without validators": """
        GET /feed.xml -> 200 | ETag: "v1" | Cache-Control: no-cache, max-age=60
        GET /feed.xml | If-None-Match: "v1" -> 304 | Cache-Control: no-cache, max-age=60
        GET /feed.xml -> 200 !! no-validator
    """,
    "a reload by the client": """
        GET /feed.xml -> 200 | Cache-Control: max-age=60
        GET /feed.xml | Cache-Control: no-cache -> 200 !! too-early
    """,
    "a password that was asked for": """
        GET /feed.xml -> 401 | WWW-Authenticate: Basic | Cache-Control: max-age=60
        GET /feed.xml | Authorization: Basic dTpw -> 200
    """,
    "what asks for another request at once": """
        GET /feed.xml | Range: bytes=99- -> 416 | Cache-Control: max-age=60
        GET /feed.xml -> 406 | Cache-Control: max-age=60
        GET /feed.xml -> 407 | Cache-Control: max-age=60
        GET /feed.xml -> 412 | Cache-Control: max-age=60
        GET /feed.xml -> 200
    """,
    "an error takes nothing back that was said of time": """
        GET /feed.xml -> 429 | Retry-After: 120
        +60 GET /feed.xml -> 429 !! too-early
        +59 GET /feed.xml -> 200 | Cache-Control: max-age=60 !! too-early
        +59 GET /feed.xml -> 500 !! too-early
        +1 GET /feed.xml -> 200
    """,
    "parts of a file that is fresh": """
        GET /1.mp3 | Range: bytes=0-2 -> 206 | Cache-Control: max-age=60
        GET /1.mp3 | Range: bytes=3-5 -> 206 | Cache-Control: max-age=60
    """,
    "an error that is fresh": """
        GET /feed.xml -> 404 | Cache-Control: max-age=60
        +59 GET /feed.xml -> 404 !! too-early
    """,
    "a clock that was set back": """
        GET /feed.xml -> 200 | Cache-Control: max-age=60
        +-3600 GET /feed.xml -> 200
    """,
    "Retry-After of a 429 for a sister": """
        GET /a.xml -> 429 | Retry-After: 120
        +1 GET /b.xml -> 404 !! too-early
        +118 GET /c.xml -> 404 !! too-early
        +1 GET /d.xml -> 200
    """,
    "a 429 after what was asked for before": """
        GET /a.xml -> 200
        GET /b.xml -> 429 | Retry-After: 60
        +1 GET /a.xml -> 200 !! too-early
        GET /a.xml -> 200
    """,
    "a later 429 that says nothing of time": """
        GET /a.xml -> 429 | Retry-After: 3600
        +60 GET /b.xml -> 429 !! too-early
        +60 GET /c.xml -> 404 !! too-early
    """,
    "a 429 that is over": """
        GET /a.xml -> 429 | Retry-After: 120
        +120 GET /b.xml -> 200
        +1 GET /a.xml -> 200
    """,
    "a 429 of another origin": """
        GET http://a.example/feed.xml -> 429 | Retry-After: 120
        GET http://b.example/feed.xml -> 200
        GET http://a.example:8080/feed.xml -> 200
        GET https://a.example/feed.xml -> 200
        GET http://www.a.example/feed.xml -> 200
        +1 GET http://A.example:80/other.xml -> 200 !! too-early
    """,
    "a 429 that says nothing of time": """
        GET /a.xml -> 429
        GET /b.xml -> 429 | Retry-After: soon
        GET /c.xml -> 429 | Retry-After: -1
        GET /d.xml -> 429 | Retry-After: 0
        GET /e.xml -> 429 | Retry-After: Sat, 07 Mar 2009 09:00:00 GMT
        GET /f.xml -> 200
    """,
    "a 429 until a date": """
        GET /a.xml -> 429 | Retry-After: Sat, 07 Mar 2009 11:00:00 GMT
        +3599 GET /b.xml -> 404 !! too-early
        +1 GET /b.xml -> 200
    """,
    "a URL that is served after all": """
        GET /a.xml -> 429 | Retry-After: 3600
        +60 GET /b.xml -> 200 | ETag: "v1" !! too-early
        +60 GET /b.xml | If-None-Match: "v1" -> 304
        +60 GET /c.xml -> 302 | Location: /d.xml !! too-early
        +60 GET /c.xml -> 302 | Location: /b.xml
        GET /b.xml | If-None-Match: "v1" -> 304
        +60 GET /a.xml -> 200 !! too-early
        +60 GET /a.xml -> 200
    """,
    "an error does not end the wait for a 429": """
        GET /a.xml -> 429 | Retry-After: 3600
        +60 GET /b.xml -> 404 !! too-early
        +60 GET /b.xml -> 500 !! too-early
        +60 GET /b.xml -> 200 | Fault: reset !! too-early
        +60 GET /b.xml -> 200 !! too-early
    """,
    "a later 429 that is shorter": """
        GET /a.xml -> 429 | Retry-After: 3600
        +60 GET /a.xml -> 429 | Retry-After: 60 !! too-early
        +60 GET /a.xml -> 200
        GET /b.xml -> 200
    """,
    "a later 429 that is longer": """
        GET /a.xml -> 429 | Retry-After: 60
        +60 GET /a.xml -> 429 | Retry-After: 120
        +60 GET /b.xml -> 404 !! too-early
        +60 GET /b.xml -> 200
    """,
    "what is said of one URL goes before what is said of all": """
        GET /a.xml -> 429 | Retry-After: 3600
        +60 GET /b.xml -> 503 | Retry-After: 60 !! too-early
        +60 GET /b.xml -> 200
    """,
    "a 429 does not shorten what was said of other URLs": """
        GET /a.xml -> 200 | Cache-Control: max-age=3600
        GET /b.xml -> 503 | Retry-After: 3600
        GET /c.xml -> 429 | Retry-After: 60
        +60 GET /a.xml -> 200 !! too-early
        GET /b.xml -> 200 !! too-early
        GET /c.xml -> 200
    """,
    "a 429 that did not come whole": """
        GET /a.xml -> 429 | Retry-After: 60 | Fault: close at 50%
        GET /b.xml -> 200
        1: GET /c.xml -> 429 | Retry-After: 60
        1 leaves
        GET /d.xml -> 200
    """,
    "a 429 while other requests are on their way": """
        1: GET /a.xml -> 429 | Retry-After: 60
        2-3: GET /{}.xml -> 200
        1-3 come
        +1 GET /d.xml -> 200 !! too-early
    """,
    "a 429 to one of several that were asked for at once": """
        GET /a.xml -> 429 | Retry-After: 60
        GET /b.xml -> 429 | Retry-After: 60
        GET /c.xml -> 200
    """,
    "a 429 to what is no GET": """
        POST /hub -> 429 | Retry-After: 60
        +1 GET /a.xml -> 200 !! too-early
        HEAD http://a.example/b.xml -> 429 | Retry-After: 60
        +1 GET http://a.example/c.xml -> 404 !! too-early
        +58 GET http://a.example/c.xml -> 404 !! too-early
        +1 GET http://a.example/c.xml -> 200
    """,
    "looking by HEAD whether a 429 is over": """
        GET /a.xml -> 429 | Retry-After: 60
        HEAD /b.xml -> 200
        POST /hub -> 200
    """,
    "a clock that was set back after a 429": """
        GET /a.xml -> 429 | Retry-After: 60
        +-3600 GET /b.xml -> 200
    """,
    "a 503 is about its URL": """
        GET /a.xml -> 503 | Retry-After: 3600
        GET /b.xml -> 200
        GET /a.xml?page=2 -> 200
        +60 GET /a.xml -> 200 !! too-early
    """,
    # Too often
    "the interval is kept": """
        every 3600
        GET /feed.xml -> 200
        +3600 GET /feed.xml -> 404
        +3601 GET /feed.xml -> 500
        +86400 GET /feed.xml -> 200
    """,
    "a feed every minute": """
        every 3600
        GET /feed.xml -> 200 | ETag: "v1"
        +60 GET /feed.xml | If-None-Match: "v1" -> 304 !! too-often
        +60 GET /feed.xml | If-None-Match: "v1" -> 304 !! too-often
        +3600 GET /feed.xml | If-None-Match: "v1" -> 304
    """,
    "a feed every minute, where nobody says how often": """
        GET /feed.xml -> 200 | ETag: "v1"
        +60 GET /feed.xml | If-None-Match: "v1" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 304
    """,
    "a second too soon": """
        every 3600
        GET /feed.xml -> 200
        +3599 GET /feed.xml -> 200 !! too-often
        +3600 GET /feed.xml -> 200
    """,
    "the interval begins with each request, also one that came too soon": """
        every 3600
        GET /feed.xml -> 200
        +1800 GET /feed.xml -> 200 !! too-often
        +1800 GET /feed.xml -> 200 !! too-often
    """,
    "an interval with decimals": """
        every 1.5
        GET /feed.xml -> 200
        +1 GET /feed.xml -> 200 !! too-often
        +2 GET /feed.xml -> 200
        +1.5 GET /feed.xml -> 200
    """,
    "the same errors every minute": """
        every 3600
        GET /feed.xml -> 404
        +60 GET /feed.xml -> 404 !! too-often
        +60 GET /feed.xml -> 500 !! too-often
        +60 GET /feed.xml -> 403 !! too-often
        +60 GET /feed.xml -> 410 !! too-often
        +60 GET /feed.xml -> 410 !! too-often gone
    """,
    "each URL has an interval of its own": """
        every 3600
        GET /a.xml -> 200
        GET /b.xml -> 200
        GET /a.xml?page=2 -> 200
        GET http://example.com/a.xml -> 200
        GET http://example.com:8080/a.xml -> 200
        GET https://example.com/a.xml -> 200
        +60 GET /b.xml -> 200 !! too-often
    """,
    "twenty feeds of one host, one after the other": "every 3600\n"
    + "\n".join(f"+1 GET /{number}.xml -> 200" for number in range(20)),
    "a clock that stands still": """
        every 0.001
        GET /feed.xml -> 200
        GET /feed.xml -> 200 !! too-often
        GET /other.xml -> 200
    """,
    "a clock that was set back within the interval": """
        every 3600
        GET /feed.xml -> 200
        +-1800 GET /feed.xml -> 200
        +60 GET /feed.xml -> 200 !! too-often
        +3600 GET /feed.xml -> 200
    """,
    "a retry after a reset": """
        every 3600
        GET /feed.xml -> 200 | Fault: reset
        GET /feed.xml -> 200 | Fault: close
        GET /feed.xml -> 200 | Fault: reset at headers
        GET /feed.xml -> 200
        GET /feed.xml -> 200 !! too-often
    """,
    "a retry after a body that was cut": """
        every 3600
        GET /feed.xml -> 200 | Fault: close at 50%
        GET /feed.xml -> 200 | Chunked: 3 | Fault: close at 50%
        GET /feed.xml -> 200 | Content-Length: 100
        GET /feed.xml -> 200
    """,
    "a retry after a timeout": """
        every 3600
        1: GET /feed.xml -> 200
        1 leaves
        2: GET /feed.xml -> 200 | Pause: 3600 at 3
        2 leaves
        GET /feed.xml -> 200
        GET /feed.xml -> 200 !! too-often
    """,
    "a reset does not excuse what was too soon before it": """
        every 3600
        GET /feed.xml -> 200
        +60 GET /feed.xml -> 200 | Fault: reset !! too-often
        +60 GET /feed.xml -> 200 !! too-often
        +3600 GET /feed.xml -> 200 | Fault: reset
        GET /feed.xml -> 200
    """,
    "a password that is sent once it is asked for": """
        every 3600
        GET /feed.xml -> 401 | WWW-Authenticate: Basic
        GET /feed.xml | Authorization: Basic dTpw -> 200
        +3600 GET /feed.xml -> 401 | WWW-Authenticate: Basic
        GET /feed.xml | Authorization: Basic dTpw -> 200
        +60 GET /feed.xml | Authorization: Basic dTpw -> 200 !! too-often
    """,
    "a 401 that is asked for again as it was": """
        every 3600
        GET /feed.xml -> 401 | WWW-Authenticate: Basic
        GET /feed.xml -> 401 | WWW-Authenticate: Basic !! too-often
        GET /feed.xml | Authorization: Basic dTpw -> 401 | WWW-Authenticate: Basic
        GET /feed.xml | Authorization: Basic dTpw -> 401 | WWW-Authenticate: Basic !! too-often
    """,
    "a new nonce": """
        every 3600
        GET /feed.xml -> 401 | WWW-Authenticate: Digest nonce="1"
        GET /feed.xml | Authorization: Digest nonce="1" -> 200
        +3600 GET /feed.xml | Authorization: Digest nonce="1"
            -> 401 | WWW-Authenticate: Digest nonce="2", stale=true
        GET /feed.xml | Authorization: Digest nonce="2" -> 200
    """,
    "a retry after a reset, with the password that was asked for": """
        every 3600
        GET /feed.xml -> 401 | WWW-Authenticate: Basic
        GET /feed.xml | Authorization: Basic dTpw -> 200 | Fault: reset
        GET /feed.xml | Authorization: Basic dTpw -> 200
        GET /feed.xml | Authorization: Basic dTpw -> 200 !! too-often
    """,
    "a password for the proxy": """
        every 3600
        GET http://example.com/ -> 407 | Proxy-Authenticate: Basic
        GET http://example.com/ | Proxy-Authorization: Basic dTpw -> 200
        GET http://example.com/ | Proxy-Authorization: Basic dTpw -> 200 !! too-often
    """,
    "a file in parts": """
        every 3600
        GET /1.mp3 | Range: bytes=0-2 -> 206 | ETag: "v1"
        GET /1.mp3 | Range: bytes=3-5 | If-Range: "v1" -> 206 | ETag: "v1"
        GET /1.mp3 | Range: bytes=6- | If-Range: "v1" -> 206 | ETag: "v1"
        +3600 GET /1.mp3 | Range: bytes=9- | If-Range: "v1" -> 206
    """,
    "the same part again": """
        every 3600
        GET /1.mp3 | Range: bytes=0-2 -> 206 | ETag: "v1"
        GET /1.mp3 | Range: bytes=0-2 -> 206 | ETag: "v1" !! too-often
    """,
    "a download that is resumed": """
        every 3600
        GET /1.mp3 -> 200 | ETag: "v1" | Fault: reset at 50%
        GET /1.mp3 | Range: bytes=3- | If-Range: "v1" -> 206 | ETag: "v1" | Fault: reset at 1
        GET /1.mp3 | Range: bytes=4- | If-Range: "v1" -> 206 | ETag: "v1"
        +60 GET /2.mp3 -> 200 | ETag: "w1" | Fault: close at 50%
        GET /2.mp3 | Range: bytes=3- | If-Range: "w1" -> 200 | ETag: "w2"
    """,
    "a part beyond the end": """
        every 3600
        GET /1.mp3 | Range: bytes=99- -> 416 | Content-Range: bytes */6
        GET /1.mp3 -> 200
        GET /2.mp3 | Range: bytes=99- -> 416 | Content-Range: bytes */6
        GET /2.mp3 | Range: bytes=99- -> 416 | Content-Range: bytes */6 !! too-often
    """,
    "what asks for the same request again": """
        every 3600
        GET /a.xml -> 408
        GET /a.xml -> 200
        GET https://a.example/ -> 421
        GET https://a.example/ -> 200
        GET /b.xml -> 425
        GET /b.xml -> 200
        GET /b.xml -> 200 !! too-often
    """,
    "another type of what there is": """
        every 3600
        GET /feed.xml | Accept: application/atom+xml -> 406
        GET /feed.xml | Accept: */* -> 200
        GET /feed.xml | Accept: */* -> 200 !! too-often
    """,
    "a condition that did not hold": """
        every 3600
        GET /feed.xml | If-Match: "v0" -> 412
        GET /feed.xml -> 200
        GET /other.xml | If-Match: "v0" -> 412
        GET /other.xml | If-Match: "v0" -> 412 !! too-often
    """,
    "a redirect to the same URL, with a cookie": """
        every 3600
        GET /feed.xml -> 302 | Location: /feed.xml | Set-Cookie: seen=1
        GET /feed.xml | Cookie: seen=1 -> 200
        +3600 GET /feed.xml | Cookie: seen=1 -> 200
        +60 GET /feed.xml | Cookie: seen=1 -> 200 !! too-often
    """,
    "two URLs that redirect to one, and that one itself": """
        every 3600
        GET /feed.xml -> 200
        +3600 GET /a.xml -> 302 | Location: /feed.xml
        GET /feed.xml -> 200
        GET /b.xml -> 302 | Location: /feed.xml
        GET /feed.xml -> 200
        GET /feed.xml -> 200 !! too-often
    """,
    "a redirect to the same URL, which is cut the first time": """
        every 3600
        GET /feed.xml -> 303 | Location: /feed.xml
        GET /feed.xml -> 401 | Fault: reset
        GET /feed.xml -> 200
    """,
    "two variants": """
        every 3600
        GET /feed.xml | Accept-Language: de -> 200 | Vary: Accept-Language
        GET /feed.xml | Accept-Language: fr -> 200 | Vary: Accept-Language
        +3600 GET /feed.xml | Accept-Language: de -> 304 | Vary: Accept-Language
    """,
    "what varies with the client only": """
        every 3600
        GET /feed.xml -> 200 | Vary: Accept-Encoding, User-Agent
        GET /feed.xml | Accept-Encoding: gzip, br -> 200 !! too-often
    """,
    "two URLs that redirect to one": """
        every 3600
        GET /a.xml -> 302 | Location: /feed.xml
        GET /feed.xml -> 200 | ETag: "v1"
        GET /b.xml -> 302 | Location: /feed.xml
        GET /feed.xml | If-None-Match: "v1" -> 304
        GET /feed.xml | If-None-Match: "v1" -> 304 !! too-often
    """,
    "a redirect excuses nothing but its target": """
        every 3600
        GET /feed.xml -> 200
        GET /a.xml -> 302 | Location: /b.xml
        GET /feed.xml -> 200 !! too-often
        GET /b.xml -> 200
    """,
    "a retry after a reset, of what a redirect asked for": """
        every 3600
        GET /feed.xml -> 200
        +60 GET /alias.xml -> 302 | Location: /feed.xml
        GET /feed.xml -> 200 | Fault: reset
        GET /feed.xml -> 200
    """,
    "a redirect that comes after what it leads to": """
        every 3600
        1: GET /alias.xml -> 302 | Location: /feed.xml
        2: GET /feed.xml -> 200
        2 comes
        1 comes
        GET /feed.xml -> 200
        GET /feed.xml -> 200 !! too-often
    """,
    "a redirect of which the client awaits only the head": """
        every 60
        GET /feed.xml -> 200
        1: GET /alias.xml -> 302 | Location: /feed.xml | Pause: 3600 at headers
        1 leaves
        GET /feed.xml -> 200
        GET /feed.xml -> 200 !! too-often
    """,
    "a redirect whose head never came": """
        every 60
        GET /feed.xml -> 200
        GET /alias.xml -> 302 | Location: /feed.xml | Fault: reset
        GET /feed.xml -> 200 !! too-often
    """,
    "there and back": """
        every 3600
        GET /a.xml -> 302 | Location: /b.xml | Set-Cookie: a=1
        GET /b.xml -> 302 | Location: /a.xml
        GET /a.xml | Cookie: a=1 -> 200
        +3600 GET /a.xml | Cookie: a=1 -> 200
    """,
    "a redirect every minute": """
        every 3600
        GET /feed.xml -> 307 | Location: /today.xml
        GET /today.xml -> 200
        +60 GET /feed.xml -> 307 | Location: /today.xml !! too-often
        GET /today.xml -> 200
    """,
    "a chain of redirects over three origins": """
        every 3600
        GET http://a.example/feed.xml -> 301 | Location: https://a.example/feed.xml
        GET https://a.example/feed.xml -> 302 | Location: //b.example/feed.xml
        GET https://b.example/feed.xml -> 308 | Location: http://c.example/
        GET http://c.example/ -> 200
        +3600 GET https://a.example/feed.xml -> 302 | Location: http://c.example/
        GET http://c.example/ -> 200
    """,
    "HEAD and then GET, within the interval": """
        every 3600
        HEAD /feed.xml -> 200
        GET /feed.xml -> 200
        HEAD /feed.xml -> 200
        +3600 HEAD /feed.xml -> 200
        GET /feed.xml -> 200
    """,
    "a HEAD begins no interval and ends none": """
        every 3600
        GET /feed.xml -> 200
        +60 HEAD /feed.xml -> 200
        +60 GET /feed.xml -> 200 !! too-often
    """,
    "methods that change something may come at any time": """
        every 3600
        POST /hub -> 200
        POST /hub -> 200
        PUT /1 -> 200
        PUT /1 -> 200
        OPTIONS /hub -> 200
        OPTIONS /hub -> 200
    """,
    "a Retry-After that is shorter than the interval": """
        every 3600
        GET /feed.xml -> 503 | Retry-After: 60
        +60 GET /feed.xml -> 200 !! too-often
    """,
    "a max-age beside the interval": """
        every 3600
        GET /a.xml -> 200 | Cache-Control: max-age=7200
        GET /b.xml -> 200 | Cache-Control: max-age=60
        +60 GET /b.xml -> 200 !! too-often
        +3540 GET /a.xml -> 200 !! too-early
        +60 GET /a.xml -> 200 | Cache-Control: max-age=61 !! too-often
        +60 GET /a.xml -> 200 !! too-early too-often
    """,
    "nothing has come whole yet": """
        every 3600
        1: GET /feed.xml -> 200
        2: GET /feed.xml | Cache-Control: no-cache -> 200
        1-2 come
        3: GET /feed.xml -> 200 !! too-often
        3 comes
    """,
    "the same connection or another one": """
        every 3600
        1: GET /feed.xml -> 200
        1 comes
        1: GET /feed.xml -> 200 !! too-often
        1 comes
        GET /feed.xml -> 200 !! too-often
    """,
    "a clock that was set forward": """
        every 3600
        GET /feed.xml -> 200 | Cache-Control: max-age=60
        +86400 GET /feed.xml -> 503 | Retry-After: 60
        +86400 GET /feed.xml -> 200
    """,
    "a feed that moves": """
        every 3600
        GET /old.xml -> 200 | ETag: "v1"
        +3600 GET /old.xml | If-None-Match: "v1" -> 301 | Location: /new.xml
        GET /new.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        +3600 GET /new.xml | If-None-Match: "v2" -> 304
    """,
    "a year of a feed": """
        every 3600
        GET /feed.xml -> 200 | ETag: "v1" | Cache-Control: max-age=1800
        +3600 GET /feed.xml | If-None-Match: "v1" -> 304 | ETag: "v1" | Cache-Control: max-age=7200
        +7200 GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2" | Fault: close at 50%
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2"
        +3600 GET /feed.xml | If-None-Match: "v2" -> 503 | Retry-After: 86400
        +86400 GET /feed.xml | If-None-Match: "v2" -> 500
        +3600 GET /feed.xml | If-None-Match: "v2" -> 404
        +3600 GET /feed.xml | If-None-Match: "v2" -> 302 | Location: /sorry.xml
        GET /sorry.xml | If-None-Match: "v2" -> 200
        +3600 GET /feed.xml | If-None-Match: "v2" -> 410
    """,
    "a login by a form": """
        every 3600
        GET /feed.xml -> 302 | Location: /login
        GET /login -> 200 | Content-Type: text/html
        POST /login -> 303 | Location: /feed.xml | Set-Cookie: id=1
        GET /feed.xml | Cookie: id=1 -> 200
        +3600 GET /feed.xml | Cookie: id=1 -> 304
    """,
    "a token that is no longer good": """
        every 3600
        GET http://a.example/ | Authorization: Bearer old -> 401 | WWW-Authenticate: Bearer
        POST http://login.example/token -> 200
        GET http://a.example/ | Authorization: Bearer new -> 200
        +3600 GET http://a.example/ | Authorization: Bearer new -> 200
    """,
    "an episode: looked at, fetched in parts, and fetched again when it has changed": """
        every 3600
        HEAD http://a.example/1.mp3 -> 302 | Location: http://b.example/1.mp3
        HEAD http://b.example/1.mp3 -> 200 | ETag: "v1"
        GET http://a.example/1.mp3 -> 302 | Location: http://b.example/1.mp3
        GET http://b.example/1.mp3 | Range: bytes=0-2 -> 206 | ETag: "v1"
        GET http://b.example/1.mp3 | Range: bytes=3- | If-Range: "v1" -> 206 | Fault: reset at 50%
        GET http://b.example/1.mp3 | Range: bytes=4- | If-Range: "v1" -> 200 | ETag: "v2"
    """,
    # Gone
    "gone": """
        GET /feed.xml -> 410
        GET /feed.xml -> 410 !! gone
        GET /feed.xml -> 503 !! gone
        GET /feed.xml -> 200 !! gone
        GET /feed.xml -> 404
        GET /feed.xml -> 404
        GET /other.xml -> 200
    """,
    "moved, and then gone": """
        GET /feed.xml -> 301 | Location: /new.xml
        GET /feed.xml -> 410 !! moved
        GET /feed.xml -> 410 !! gone
    """,
    "gone, and at a new address": """
        GET /feed.xml -> 410
        GET /feed.xml -> 301 | Location: /new.xml !! gone
        GET /feed.xml -> 200 !! moved
        GET /feed.xml -> 200
    """,
    # Methods that change what there is
    "a change ends what was known": """
        GET /1.xml -> 200 | ETag: "v1" | Cache-Control: max-age=60
        POST /1.xml -> 200
        GET /1.xml -> 200 | ETag: "v1" | Cache-Control: max-age=60
        DELETE /1.xml -> 303 | Location: /list
        GET /1.xml | If-None-Match: "v1" -> 410
        PUT /1.xml -> 201
        GET /1.xml -> 301 | Location: /2.xml
        GET /2.xml -> 200
        PUT /1.xml -> 200
        GET /1.xml -> 200 | ETag: "v1" | Cache-Control: max-age=60
        GET /1.xml -> 200 !! no-validator too-early
    """,
    "the ETag of what was put": """
        GET /1.xml -> 200 | ETag: "v1"
        PUT /1.xml -> 200 | ETag: "v2"
        GET /1.xml | If-None-Match: "v2" -> 304
        GET /1.xml | If-None-Match: "v0" -> 304 !! wrong-etag
    """,
    "a change that failed, and methods that change nothing": """
        GET /1.xml -> 200 | ETag: "v1" | Cache-Control: max-age=60
        POST /1.xml -> 500
        OPTIONS /1.xml -> 200
        TRACE /1.xml -> 200
        PROPFIND /1.xml -> 207
        GET /1.xml -> 410 !! no-validator too-early
        OPTIONS /1.xml -> 200
        DELETE /1.xml -> 404
        GET /1.xml | If-None-Match: "v1" -> 410 !! too-early gone
    """,
    # What each request says
    "who asks": """
        GET /feed.xml | no User-Agent -> 200 !! no-user-agent
        GET /feed.xml | User-Agent: -> 200 !! no-user-agent
        GET /feed.xml | User-Agent: - -> 200
    """,
    "compression": """
        GET /feed.xml | no Accept-Encoding -> 200 !! no-compression
        GET /feed.xml | Accept-Encoding: -> 200 !! no-compression
        GET /feed.xml | Accept-Encoding: identity -> 200 !! no-compression
        GET /feed.xml | Accept-Encoding: br, deflate -> 200 !! no-compression
        GET /feed.xml | Accept-Encoding: gzip;a=b;q=0 -> 200 !! no-compression
        GET /feed.xml | Accept-Encoding: *, gzip; Q=0.000 -> 200 !! no-compression
        GET /feed.xml | Accept-Encoding: *;q=0 -> 200 !! no-compression
        GET /feed.xml | Accept-Encoding: br, GZip;q=0.001 -> 200
        GET /feed.xml | Accept-Encoding: x-gzip -> 200
        GET /feed.xml | Accept-Encoding: * -> 200
        GET /feed.xml | Accept-Encoding: deflate, gzip;q=1.0, *;q=0.5 -> 200
        GET /feed.xml | Accept-Encoding: identity | Accept-Encoding: gzip -> 200
        GET /feed.xml | Accept-Encoding: gzip ; q=0.5 -> 200
        GET /1.mp3 | Accept-Encoding: identity -> 200
        GET /feed.xml | Accept-Encoding: identity | Range: bytes=0-2 -> 206
    """,
    "types": """
        GET /feed.xml | no Accept -> 200 !! no-feed-type
        GET /feed.xml | Accept: -> 200 !! no-feed-type
        GET /feed.xml | Accept: text/html, image/png -> 200 !! no-feed-type
        GET /feed.xml | Accept: image/* -> 200 !! no-feed-type
        GET /feed.xml | Accept: text/html, application/rss+xml;q=0 -> 304 !! no-feed-type
        GET /feed.xml | Accept: */* -> 200
        GET /feed.xml | Accept: text/html, application/*;q=0.1 -> 200
        GET /feed.xml | Accept: text/* -> 200
        GET /feed.xml | Accept: text/xml -> 200
        GET /feed.xml | Accept: application/xml;q=0.9;charset=utf-8 -> 200
        GET /feed.xml | Accept: Application/RSS+XML -> 200
        GET /feed.xml | Accept: text/html;level=1, application/rdf -> 200
        GET /feed.xml | Accept: application/feed+json -> 200
        GET /feed.xml | Accept: application/atom -> 200
        GET /feed.xml | Accept: text/x-opml -> 200
        GET /feed.xml | Accept: * -> 200
    """,
    "what is no feed": """
        GET /favicon.ico | no Accept -> 404
        GET /cover | Accept: image/* -> 200 | Content-Type: image/png
        GET / | Accept: text/html -> 200 | Content-Type: Text/HTML ; charset=utf-8
        GET / | Accept: text/html -> 304
        GET /1.mp3 | no Accept -> 301 | Location: /2.mp3
        GET /a.xml | no Accept -> 200 | Content-Type: text/html !! no-feed-type
        GET /b.rss | no Accept -> 200 | Content-Type: text/plain !! no-feed-type
        GET /robots.txt | Accept: text/plain -> 404
        GET /1 | no Accept -> 200 | Content-Type: Video/MP4 ; codecs=a
        GET /2 | no Accept -> 200 | Content-Type: font/woff2
        GET /3 | no Accept -> 200 | Content-Type: text/css
        GET /4 | no Accept -> 404 | Content-Type: text/html !! no-feed-type
    """,
    "a Referer": """
        GET /feed.xml | Referer: https://example.com/ -> 200 !! referer
    """,
    "cookies that were set": """
        GET /login.xml
            -> 302 | Location: /feed.xml | Set-Cookie: id=1; HttpOnly | Set-Cookie: b="2"
        GET /feed.xml | Cookie: b="2"; id=1 -> 200 | Set-Cookie: id=3
        GET /feed.xml | Cookie: id=3; b=2 -> 200
        GET /feed.xml | Cookie: id=3 | Cookie: b=2 -> 200 | Set-Cookie: =d | Set-Cookie: e
        GET /feed.xml | Cookie: d; e=;; -> 200
        GET /feed.xml | Cookie: $Version=1; id=3; $Path="/" -> 200
        GET /feed.xml | Cookie: -> 200
    """,
    "cookies that were not set": """
        GET /feed.xml | Cookie: id=1 -> 200 | Set-Cookie: id=2 !! cookie
        GET /feed.xml | Cookie: id=1 -> 200 !! cookie
        GET /feed.xml | Cookie: id=2; lang=en -> 200 !! cookie
        GET /feed.xml | Cookie: id=2 | Cookie: lang=en -> 200 !! cookie
    """,
    "a cookie that the response to a form has set": """
        POST /login -> 200 | Set-Cookie: id=1
        GET /feed.xml | Cookie: id=1 -> 200
    """,
    # The same request again, while the response is on its way
    "the same feed twice at once": """
        1: GET /feed.xml -> 200
        2: GET /feed.xml -> 200 !! repeated
        1-2 come
    """,
    "the same feed three times at once": """
        1: GET /feed.xml -> 200
        2-3: GET /feed.xml -> 200 !! repeated
        1-3 come
    """,
    "the same request in one connection, before the response": """
        1: GET /feed.xml -> 200
        1: GET /feed.xml -> 200
        1: GET /other.xml -> 200
        1 1 1 come
    """,
    "the response to the second request comes first": """
        1: GET /feed.xml -> 200
        2: GET /feed.xml -> 200 !! repeated
        2 comes
        1 comes
    """,
    "the second response is cut, or not awaited": """
        1: GET /feed.xml -> 200
        2: GET /feed.xml -> 200 | Fault: reset !! repeated
        3: GET /feed.xml -> 200 !! repeated
        2 comes
        3 leaves
        1 comes
    """,
    "a third one, given up while the second is on its way": """
        1: GET /feed.xml -> 200
        2: GET /feed.xml -> 200 !! repeated
        1 comes
        3: GET /feed.xml -> 200 !! repeated
        3 leaves
        2 comes
    """,
    "a third one, when the first has come": """
        1: GET /feed.xml -> 200
        2: GET /feed.xml -> 200 !! repeated
        1 comes
        3: GET /feed.xml -> 200 !! repeated
        2-3 come
        GET /feed.xml -> 200
    """,
    "again, but on another connection as the first was cut": """
        1: GET /feed.xml -> 200 | Fault: reset at 50%
        2: GET /feed.xml -> 200
        1-2 come
    """,
    "again, but the client has given up the first": """
        1: GET /feed.xml -> 200
        2: GET /feed.xml -> 200
        1 leaves
        2 comes
        3: GET /feed.xml -> 200
        3 leaves
        GET /feed.xml -> 200
    """,
    "parts of a file at once": """
        1: GET /1.mp3 | Range: bytes=0-2 -> 206
        2: GET /1.mp3 | Range: bytes=3-5 -> 206
        3: GET /1.mp3 | Range: bytes=6- -> 206
        1-3 come
    """,
    "two languages at once": """
        1: GET /feed.xml | Accept-Language: de -> 200 | Vary: Accept-Language
        2: GET /feed.xml | Accept-Language: fr -> 200 | Vary: Accept-Language
        1-2 come
    """,
    "HEAD and GET at once": """
        1: HEAD /feed.xml -> 200
        2: GET /feed.xml -> 200
        3: HEAD /feed.xml -> 200
        1-3 come
    """,
    "two forms at once": """
        1-2: POST /hub -> 200
        1-2 come
    """,
    "two URLs at once": """
        1: GET /feed.xml -> 200
        2: GET /feed.xml?page=2 -> 200
        3: GET http://example.com/feed.xml -> 200
        4: GET https://example.com/feed.xml -> 200
        5: GET http://example.com:8080/feed.xml -> 200
        1-5 come
    """,
    "one after the other, in one connection and in two": """
        1: GET /feed.xml -> 200
        1 comes
        1: GET /feed.xml -> 200
        1 comes
        2: GET /feed.xml -> 200
        2 comes
    """,
    "with and without a password at once": """
        1: GET /feed.xml -> 401
        2: GET /feed.xml | Authorization: Basic dTpw -> 200
        1-2 come
    """,
    "the same again, when the first has come or was given up": """
        1: GET /feed.xml -> 200
        1 comes
        2: GET /feed.xml -> 200 | Pause: 3600 at 3
        2 leaves
        3: GET /feed.xml -> 200
        3 comes
    """,
    "two redirects to one feed at once": """
        1: GET /a.xml -> 302 | Location: /feed.xml
        2: GET /b.xml -> 302 | Location: /feed.xml
        1-2 come
        3-4: GET /feed.xml -> 200
        3-4 come
    """,
    "a stream of events beside a feed": """
        1: GET /events -> 200 | Pause: 3600 at 3
        GET /feed.xml -> 200
        GET /feed.xml -> 200
        1 leaves
        GET /events -> 200
    """,
    # Too many requests at once
    "six at once": """
        1-6: GET /{}.xml -> 200
        1-6 come
    """,
    "seven at once": """
        1-6: GET /{}.xml -> 200
        7: GET /7.xml -> 200 !! burst
        1-7 come
    """,
    "twenty at once": """
        1-6: GET /{}.xml -> 200
        7: GET /7.xml -> 200 !! burst
        8-20: GET /{}.xml -> 200
        1-20 come
    """,
    "twenty hosts at once": """
        1-20: GET http://{}.example/feed.xml -> 200
        1-20 come
    """,
    "six for each of two hosts at once": """
        1-6: GET http://a.example/{}.xml -> 200
        7-12: GET http://b.example/{}.xml -> 200
        1-12 come
    """,
    "seven at once for two ports and two schemes": """
        1-3: GET http://a.example/{}.xml -> 200
        4-5: GET http://a.example:8080/{}.xml -> 200
        6-7: GET https://a.example/{}.xml -> 200
        1-7 come
    """,
    "seven at once for one host that is spelled in many ways": """
        1-3: GET http://a.example/{}.xml -> 200
        4-5: GET http://a.example:80/{}.xml -> 200
        6: GET http://A.EXAMPLE/6.xml -> 200
        7: GET HTTP://A.example/7.xml -> 200 !! burst
        1-7 come
    """,
    "eight in one connection": """
        1: GET /1.xml -> 200
        1: GET /2.xml -> 200
        1: GET /3.xml -> 200
        1: GET /4.xml -> 200
        1: GET /5.xml -> 200
        1: GET /6.xml -> 200
        1: GET /7.xml -> 200
        1: GET /8.xml -> 200
        1 1 1 1 1 1 1 1 come
    """,
    "twelve in six connections": """
        1-6: GET /{}.xml -> 200
        1-6: GET /more/{}.xml -> 200
        1-6 1-6 come
    """,
    "ten one after the other": """
        1-6: GET /{}.xml -> 200
        1-6 come
        7-10: GET /{}.xml -> 200
        7-10 come
    """,
    "one takes the place of another": """
        1-6: GET /{}.xml -> 200
        1 comes
        7: GET /7.xml -> 200
        2-3 come
        8-9: GET /{}.xml -> 200
        4-9 come
    """,
    "six connections that are used again and again": """
        1-6: GET /{}.xml -> 200
        1-3 come
        1-3: GET /more/{}.xml -> 200
        1-6 come
        1-6: GET /most/{}.xml -> 200
        1-6 come
    """,
    "one connection to a proxy for many hosts": """
        1: GET http://a.example/ -> 200
        1: GET http://b.example/ -> 200
        1: GET http://a.example/more.xml -> 200
        1 1 1 come
    """,
    "the icons of twelve sites, and six pictures of one": """
        1-12: GET http://{}.example/favicon.ico -> 200
        13-18: GET http://a.example/{}.png -> 200
        1-18 come
    """,
    "seven timeouts, one after the other": """
        1: GET /feed.xml -> 200 | Pause: 3600 at headers
        1 leaves
        2: GET /feed.xml -> 200 | Pause: 3600 at headers
        2 leaves
        3: GET /feed.xml -> 200 | Pause: 3600 at headers
        3 leaves
        4: GET /feed.xml -> 200 | Pause: 3600 at headers
        4 leaves
        5: GET /feed.xml -> 200 | Pause: 3600 at headers
        5 leaves
        6: GET /feed.xml -> 200 | Pause: 3600 at headers
        6 leaves
        7: GET /feed.xml -> 200
        7 comes
    """,
    "six that stall or are cut, again and again": """
        1-6: GET /{}.xml -> 200 | Fault: stall at 3
        7-12: GET /{}.xml -> 200 | Fault: stall at 3
        1-6 leave
        13-18: GET /{}.xml -> 200 | Pause: 3600 at headers | Fault: close at 3
        7-12 leave
        19-24: GET /{}.xml -> 200
        13-18 leave
        19-24 come
    """,
    "one that is given up, or cut, makes room": """
        1-5: GET /{}.xml -> 200
        6: GET /6.xml -> 200 | Fault: reset at 50%
        1 leaves
        7: GET /7.xml -> 200
        6 comes
        8: GET /8.xml -> 200
        2-5 7-8 come
    """,
    "seven at once by any method": """
        1-3: HEAD /{}.xml -> 200
        4-5: POST /hub -> 200
        6: OPTIONS /hub -> 200
        7: HEAD /feed.xml -> 200 !! burst
        1-7 come
    """,
    "two crowds": """
        1-6: GET /{}.xml -> 200
        7: GET /7.xml -> 200 !! burst
        1-7 come
        11-16: GET /{}.xml -> 200
        17: GET /17.xml -> 200 !! burst
        11-17 come
    """,
    "one crowd that never goes away": """
        1-6: GET /{}.xml -> 200
        7: GET /7.xml -> 200 !! burst
        1-6 come
        8-12: GET /{}.xml -> 200
        13: GET /13.xml -> 200
        7-13 come
    """,
    "a crowd for each of two hosts": """
        1-6: GET http://a.example/{}.xml -> 200
        11-16: GET http://b.example/{}.xml -> 200
        7: GET http://a.example/7.xml -> 200 !! burst
        17: GET http://b.example/17.xml -> 200 !! burst
        1-7 11-17 come
    """,
    "one feed seven times at once": """
        1: GET /feed.xml -> 200
        2-6: GET /feed.xml -> 200 !! repeated
        7: GET /feed.xml -> 200 !! repeated burst
        1-7 come
    """,
    # Credentials that a redirect leads to another origin
    "a password for another origin": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password that is left behind": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ -> 200
    """,
    "a password within its origin": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: /today.xml
        GET http://a.example/today.xml | Authorization: Basic dTpw
            -> 307 | Location: HTTP://A.example:80/tonight.xml
        GET http://a.example/tonight.xml | Authorization: Basic dTpw -> 200
    """,
    "a password for another port": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://a.example:8080/
        GET http://a.example:8080/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password for another port, in TLS": """
        GET https://a.example/ | Authorization: Basic dTpw
            -> 302 | Location: https://a.example:8443/
        GET https://a.example:8443/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password that goes from plain text to TLS": """
        GET http://a.example/ | Authorization: Basic dTpw -> 301 | Location: https://a.example/
        GET https://a.example/ | Authorization: Basic dTpw -> 200
    """,
    "a password that comes home, to TLS": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: https://b.example/
        GET https://b.example/ -> 302 | Location: https://a.example/feed.xml
        GET https://a.example/feed.xml | Authorization: Basic dTpw -> 200
    """,
    "a password that goes from plain text to TLS at another host": """
        GET http://a.example/ | Authorization: Basic dTpw -> 301 | Location: https://www.a.example/
        GET https://www.a.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password in plain text": """
        GET https://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://a.example/
        GET http://a.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password for a host above": """
        GET http://www.a.example/ | Authorization: Basic dTpw -> 302 | Location: http://a.example/
        GET http://a.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password that the other origin asks for as well": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ -> 401 | WWW-Authenticate: Basic
        GET http://b.example/ | Authorization: Basic dTpw -> 200
    """,
    "a password that the other origin has asked for before": """
        GET http://b.example/other.xml -> 401 | WWW-Authenticate: Basic
        GET http://b.example/other.xml | Authorization: Basic eDp5 -> 200
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw -> 200
    """,
    "a password that is asked for when it was sent": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw
            -> 401 | WWW-Authenticate: Basic !! leaked-credentials
        GET http://b.example/ | Authorization: Basic eDp5 -> 200
    """,
    "another origin's own password": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic eDp5 -> 200
    """,
    "a password that the other origin had before": """
        GET http://b.example/other.xml | Authorization: Basic dTpw -> 200
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw -> 200
    """,
    "one password for two feeds": """
        GET http://a.example/ | Authorization: Basic dTpw -> 200
        GET http://b.example/ | Authorization: Basic dTpw -> 200
        GET http://a.example/ | Authorization: Basic dTpw -> 200 | Location: http://c.example/
        GET http://c.example/ | Authorization: Basic dTpw -> 201 | Location: http://d.example/
        GET http://d.example/ | Authorization: Basic dTpw -> 200
    """,
    "a password for the target alone": """
        GET http://a.example/ -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw -> 200
    """,
    "a password for two origins, before a redirect from one to the other": """
        1: GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        2: GET http://b.example/ | Authorization: Basic dTpw -> 200
        1-2 come
    """,
    "a password for two origins, and a redirect that did not come": """
        GET http://a.example/ | Authorization: Basic dTpw
            -> 302 | Location: http://b.example/ | Fault: reset
        1: GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        1 leaves
        GET http://b.example/ | Authorization: Basic dTpw -> 200
    """,
    "a password for another feed of the first origin": """
        GET http://a.example/private.xml | Authorization: Basic dTpw -> 200
        GET http://a.example/ -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw -> 200
    """,
    "a password in the Location": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://x:y@b.example/
        GET http://b.example/ | Authorization: Basic eDp5 -> 200
    """,
    "a password at the end of a chain": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ -> 302 | Location: http://c.example/
        GET http://c.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password at the beginning of a chain": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: /today.xml
        GET http://a.example/today.xml -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password for another origin each time": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password all along a chain": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ | Authorization: Basic dTpw
            -> 302 | Location: http://c.example/ !! leaked-credentials
        GET http://c.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "a password that comes back to its origin": """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        GET http://b.example/ -> 302 | Location: http://a.example/back.xml
        GET http://a.example/back.xml | Authorization: Basic dTpw -> 200
    """,
    "a password with other methods": """
        HEAD http://a.example/ | Authorization: Basic dTpw -> 302 | Location: http://b.example/
        HEAD http://b.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
        POST http://a.example/hub | Authorization: Basic dTpw
            -> 307 | Location: http://c.example/hub
        POST http://c.example/hub | Authorization: Basic dTpw -> 200 !! leaked-credentials
        POST http://a.example/form | Authorization: Basic dTpw -> 303 | Location: http://d.example/
        GET http://d.example/ | Authorization: Basic dTpw -> 200 !! leaked-credentials
    """,
    "another scheme of credentials": """
        GET http://a.example/ | Authorization: Bearer secret -> 308 | Location: //b.example/
        GET http://b.example/ | Authorization: Bearer secret -> 200 !! leaked-credentials
    """,
    "a cookie for another origin": """
        GET http://a.example/login -> 200 | Set-Cookie: id=1
        GET http://a.example/ | Cookie: id=1 -> 302 | Location: http://b.example/
        GET http://b.example/ | Cookie: id=1 -> 200 !! leaked-credentials
    """,
    "a cookie that is left behind": """
        GET http://a.example/login -> 200 | Set-Cookie: id=1
        GET http://a.example/ | Cookie: id=1 -> 302 | Location: http://b.example/
        GET http://b.example/ -> 200 | Set-Cookie: b=2
        GET http://b.example/more.xml | Cookie: b=2 -> 200
    """,
    "a cookie that the redirect has set": """
        GET http://a.example/ -> 302 | Location: http://b.example/ | Set-Cookie: id=1; Path=/
        GET http://b.example/ | Cookie: id=1 -> 200 !! leaked-credentials
    """,
    "a cookie that was not sent with what was redirected": """
        GET http://a.example/login -> 200 | Set-Cookie: id=1; Path=/login
        GET http://a.example/ -> 302 | Location: http://b.example/
        GET http://b.example/ | Cookie: id=1 -> 200 !! leaked-credentials
    """,
    "a cookie for all hosts of a domain": """
        GET http://a.example.com/ -> 302 | Location: http://b.example.com/
            | Set-Cookie: id=1; Domain=example.com | Set-Cookie: c=2; Path=/; DOMAIN=.Example.com
        GET http://b.example.com/ | Cookie: id=1; c=2 -> 302 | Location: https://example.com/
        GET https://example.com/ | Cookie: id=1; c=2 -> 200
    """,
    "a cookie for all hosts of another domain": """
        GET http://a.example.com/ -> 302 | Location: http://badexample.com/
            | Set-Cookie: id=1; Domain=example.com
        GET http://badexample.com/ | Cookie: id=1 -> 200 !! leaked-credentials
    """,
    "a cookie for hosts below": """
        GET http://a.example.com/ -> 302 | Location: http://b.example.com/
            | Set-Cookie: id=1; Domain=a.example.com
        GET http://b.example.com/ | Cookie: id=1 -> 200 !! leaked-credentials
    """,
    "a cookie for a domain that is not one's own": """
        GET http://a.example.com/ -> 302 | Location: http://example.org/
            | Set-Cookie: id=1; Domain=example.org
        GET http://example.org/ | Cookie: id=1 -> 200 !! leaked-credentials
    """,
    "a cookie that both have set": """
        GET http://b.example/other.xml -> 200 | Set-Cookie: lang=en
        GET http://a.example/ -> 302 | Location: http://b.example/ | Set-Cookie: lang=en
        GET http://b.example/ | Cookie: lang=en -> 200
    """,
    "a cookie of the same name": """
        GET http://b.example/other.xml -> 200 | Set-Cookie: id=2
        GET http://a.example/ -> 302 | Location: http://b.example/ | Set-Cookie: id=1
        GET http://b.example/ | Cookie: id=2 -> 200
    """,
    "a cookie at another port and by another scheme": """
        GET http://a.example/ -> 302 | Location: http://a.example:8080/ | Set-Cookie: id=1
        GET http://a.example:8080/ | Cookie: id=1 -> 302 | Location: https://a.example/
        GET https://a.example/ | Cookie: id=1 -> 200
    """,
    "a cookie that was set before the record began, at another port": """
        GET http://a.example/ | Cookie: id=1 -> 302 | Location: http://a.example:8080/ !! cookie
        GET http://a.example:8080/ | Cookie: id=1 -> 200 !! cookie
    """,
    "a cookie where a password is asked for": """
        GET http://b.example/other.xml -> 401 | WWW-Authenticate: Basic
        GET http://a.example/ -> 302 | Location: http://b.example/ | Set-Cookie: id=1
        GET http://b.example/ | Cookie: id=1 -> 200 !! leaked-credentials
    """,
    "one cookie of two": """
        GET http://b.example/other.xml -> 200 | Set-Cookie: b=2
        GET http://a.example/ -> 302 | Location: http://b.example/ | Set-Cookie: id=1
        GET http://b.example/ | Cookie: b=2; id=1 -> 200 !! leaked-credentials
    """,
    "a cookie of a host that has led nowhere": """
        GET http://c.example/ -> 200 | Set-Cookie: id=1
        GET http://a.example/ -> 302 | Location: http://b.example/
        GET http://b.example/ | Cookie: id=1 -> 200
    """,
    "a login at another host, and back": """
        GET http://a.example/ -> 302 | Location: https://login.example/?to=a | Set-Cookie: a=1
        GET https://login.example/?to=a -> 302 | Location: http://a.example/?ok | Set-Cookie: b=2
        GET http://a.example/?ok | Cookie: a=1 -> 302 | Location: / | Set-Cookie: a=3
        GET http://a.example/ | Cookie: a=3 -> 200
        GET https://login.example/?to=a | Cookie: b=2 -> 302 | Location: http://a.example/?ok
    """,
    "cookies without a redirect": """
        GET http://a.example/ -> 200 | Set-Cookie: id=1
        GET http://b.example/ | Cookie: id=1 -> 200
    """,
    "a password and a cookie": """
        GET http://a.example/ | Authorization: Basic dTpw
            -> 302 | Location: http://b.example/ | Set-Cookie: id=1
        GET http://b.example/ | Authorization: Basic dTpw | Cookie: id=1
            -> 200 !! leaked-credentials
    """,
    "all at once": """
        GET /feed.xml | no User-Agent | no Accept | no Accept-Encoding
            -> 200 | ETag: "v1" | Cache-Control: max-age=9
            !! no-user-agent no-compression no-feed-type
        GET /feed.xml | Referer: a | Cookie: b=c | If-Modified-Since: now
            -> 410 !! wrong-date too-early referer cookie
        GET /feed.xml -> 410 !! no-validator too-early gone
    """,
}


#: Transcripts, and what is said of them.
SENTENCES = [
    (
        """
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: W/"v2"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: W/"v2"
        GET /feed.xml -> 200 | Last-Modified: YESTERDAY
        GET /feed.xml | no User-Agent | Referer: http://a/ -> 200
        """,
        """
        GET /feed.xml (3rd request): If-None-Match was "v1", but the last ETag given was W/"v2"
            (RFC 9110 13.1.2)
        GET /feed.xml (4th request): neither If-None-Match nor If-Modified-Since was sent, but the
            last ETag given was W/"v2" (RFC 9110 13.1.2)
        GET /feed.xml (5th request): neither If-None-Match nor If-Modified-Since was sent, but the
            last Last-Modified given was YESTERDAY (RFC 9110 13.1.3)
        GET /feed.xml (5th request): no User-Agent was sent; it should name the program and its
            version (RFC 9110 10.1.5)
        GET /feed.xml (5th request): Referer was http://a/, but no link was followed
            (RFC 9110 10.1.3)
        """,
    ),
    (
        """
        GET /a | If-None-Match: "v1" | If-Modified-Since: now -> 200
        GET /a | If-None-Match: "v1" -> 429 | Retry-After: 120
        +10 GET /a | no Accept | Accept-Encoding: br
            -> 200 | Cache-Control: max-age=60, public | Age: 10
        +49 GET /a | Accept: text/html -> 301 | Location: b
        GET /a | Cookie: a=1; b=2 -> 410
        """,
        """
        GET /a (1st request): If-None-Match was "v1", but no ETag was given (RFC 9110 13.1.2)
        GET /a (1st request): If-Modified-Since was now, but no Last-Modified was given
            (RFC 9110 13.1.3)
        GET /a (2nd request): If-None-Match was "v1", but no ETag was given with the last 200
            (RFC 9110 13.1.2)
        GET /a (3rd request): asked again after 10 s, 110 s too early, as Retry-After was 120
            (RFC 9110 10.2.3)
        GET /a (3rd request): Accept-Encoding was br; it should list gzip (RFC 9110 12.5.3)
        GET /a (3rd request): no Accept was sent; it should name application/atom+xml,
            application/rss+xml or another feed type (RFC 9110 12.5.1)
        GET /a (4th request): asked again after 49 s, 1 s too early, as Cache-Control was
            max-age=60, public and Age was 10 (RFC 9111 4.2)
        GET /a (4th request): Accept was text/html; it should name application/atom+xml,
            application/rss+xml or another feed type (RFC 9110 12.5.1)
        GET /a (5th request): asked for the old URL again, but a 301 had moved it to BASE/b
            (RFC 9110 15.4.2)
        GET /a (5th request): Cookie was a=1; b=2, but no response had set a=1; b=2 (RFC 6265 5.4)
        """,
    ),
    (
        """
        GET http://example.com/?a -> 410
        GET http://example.com/?a -> 503 | Expires: Sat, 07 Mar 2009 11:00:00 GMT | Expires: 0
        +10 GET http://example.com/?a -> 308 | Location: https://example.com/
        GET http://example.com/?a -> 200
        """,
        """
        GET http://example.com/?a (2nd request): asked again, but a 410 had said that it is gone for
            good (RFC 9110 15.5.11)
        GET http://example.com/?a (3rd request): asked again after 10 s, 3590 s too early, as
            Expires was Sat, 07 Mar 2009 11:00:00 GMT (RFC 9111 4.2)
        GET http://example.com/?a (3rd request): asked again, but a 410 had said that it is gone for
            good (RFC 9110 15.5.11)
        GET http://example.com/?a (4th request): asked for the old URL again, but a 308 had moved it
            to https://example.com/ (RFC 9110 15.4.9)
        """,
    ),
    (
        """
        every 3600
        GET /feed.xml -> 200
        +60 GET /feed.xml -> 404
        +3599.5 GET /feed.xml -> 200
        """,
        """
        GET /feed.xml (2nd request): asked again after 60 s; once in 3600 s is enough
        GET /feed.xml (3rd request): asked again after 3599 s; once in 3600 s is enough
        """,
    ),
    (
        """
        every 2592000
        GET /feed.xml -> 200
        GET /feed.xml -> 200
        """,
        "GET /feed.xml (2nd request): asked again after 0 s; once in 2592000 s is enough",
    ),
    (
        """
        every 1.5
        GET /feed.xml -> 200
        +1 GET /feed.xml -> 200
        """,
        "GET /feed.xml (2nd request): asked again after 1 s; once in 1.5 s is enough",
    ),
    (
        """
        GET /a.xml -> 429 | Retry-After: 120
        +10 GET /b.xml -> 200
        GET http://example.com/a.xml -> 429 | Retry-After: Sat, 07 Mar 2009 11:00:00 GMT
        +60 GET http://example.com/b.xml -> 200
        """,
        """
        GET /b.xml (1st request): asked 10 s after the 429 to /a.xml, 110 s too early, as
            Retry-After was 120 (RFC 6585 4)
        GET http://example.com/b.xml (1st request): asked 60 s after the 429 to
            http://example.com/a.xml, 3530 s too early, as Retry-After was
            Sat, 07 Mar 2009 11:00:00 GMT (RFC 6585 4)
        """,
    ),
    (
        """
        GET /feed.xml -> 200
        1: GET /feed.xml -> 200
        2: GET /feed.xml -> 200
        1 comes
        3: GET /feed.xml -> 200
        2-3 come
        """,
        """
        GET /feed.xml (3rd request): asked the same again while the response to the 2nd was on its
            way, and it came whole
        GET /feed.xml (4th request): asked the same again while the response to the 3rd was on its
            way, and it came whole
        """,
    ),
    (
        """
        1-7: GET /{}.xml -> 200
        8-13: HEAD http://example.com/{}.xml -> 200
        14: HEAD http://example.com/a.xml -> 200
        1-14 come
        """,
        """
        GET /7.xml (1st request): this was the seventh request in flight at once to BASE; six are
            enough (RFC 9112 9.4)
        HEAD http://example.com/a.xml: this was the seventh request in flight at once to
            http://example.com; six are enough (RFC 9112 9.4)
        """,
    ),
    (
        """
        GET http://a.example/ | Authorization: Basic dTpw -> 302 | Location: https://b.example/x
        GET https://b.example/x | Authorization: Basic dTpw -> 302 | Location: http://c.example:8080
        GET http://c.example:8080/ | Authorization: Basic dTpw -> 200
        POST /hub -> 303 | Location: http://a.example/hub | Set-Cookie: id=1; Path=/
        POST http://a.example/hub | Cookie: a=2; id=1 -> 200
        """,
        """
        GET https://b.example/x (1st request): Authorization of http://a.example was sent to
            https://b.example, to which a redirect had led (RFC 9110 15.4)
        GET http://c.example:8080/ (1st request): Authorization of http://a.example was sent to
            http://c.example:8080, to which a redirect had led (RFC 9110 15.4)
        POST http://a.example/hub: the cookie id of BASE was sent to http://a.example, to which a
            redirect had led (RFC 9110 15.4)
        """,
    ),
]


def unfolded(text):
    """Its lines, where those that are indented more continue the ones before."""
    text = text.replace("YESTERDAY", "Fri, 06 Mar 2009 10:00:00 GMT").replace("NOW", NOW_DATE)
    return re.sub("\n +", " ", textwrap.dedent(text.rstrip()).strip()).split("\n")


def numbers(text):
    """The numbers in "1-3 5": 1, 2, 3 and 5; None for those of no connection."""
    if not text:
        return [None]
    parts = [part.partition("-") for part in text.split()]
    return [n for first, _, last in parts for n in range(int(first), int(last or first) + 1)]


class TranscriptLine:
    """A request, the response to it, and the rules that the client breaks with it."""

    FORM = re.compile(r"(?:\+(?P<pause>\S+) )?(?:(?P<numbers>[-0-9 ]+): )?(\S+) (\S+)")

    def __init__(self, line, number=None):
        self.number = number  # of the connection, if others come before the response does
        line, _, rules = line.replace("{}", str(number)).partition(" !! ")
        asked, _, responded = line.partition(" -> ")
        self.rules = rules.split()
        pause, _, self.method, self.target = self.FORM.match(asked).groups()
        self.pause = float(pause or 0)
        sent = asked.split(" | ")[1:]
        left_out = [name for name in POLITE if f"no {name}" in sent]
        fields = [text.partition(":") for text in sent if not text.startswith("no ")]
        self.sent = [(name, value.strip()) for name, _, value in fields]
        left_out += [name for name, _ in self.sent]
        self.sent += [field for field in POLITE.items() if field[0] not in left_out]
        status, *given = responded.split(" | ")
        self.status = int(status)
        self.response = self.make_response([text.partition(":")[::2] for text in given])
        self.step = self.response if number is None else self.respond_late
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.last_on_connection = True

    def respond_late(self, request):
        """A step that waits until the transcript says that the response comes."""
        self.request = request
        self.begun.set()
        if not self.response.pause:
            self.go_on.wait(3 * PATIENCE)
        return self.response

    def head(self, server):
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.sent)
        begin = f"{self.method} {self.target} HTTP/1.1"
        host = server.base_url.partition("//")[2]
        end = "Connection: close\r\n" if self.last_on_connection else ""
        return f"{begin}\r\nHost: {host}\r\n{end}{fields}\r\n".encode("latin-1")

    def play(self, server, connections):
        if self.number is not None:
            connections[self.number].send(self, self.head(server))
            return
        with connect(server) as connection:
            connection.sendall(self.head(server))
            read_to_the_end(connection)
        self.request = server.requests[-1]

    def make_response(self, given):
        mechanics = {"Fault": "fault", "Chunked": "chunked", "Pause": "pause"}
        options = {mechanics[name]: value.strip() for name, value in given if name in mechanics}
        if "pause" in options:
            options["pause"] = [options["pause"]]
        headers = [(name, value.strip()) for name, value in given if name not in mechanics]
        body = b"" if 300 <= self.status < 400 else b"<rss/>"
        # The transcript says what the response is, whatever the request was.
        ignore = ["If-None-Match", "If-Modified-Since", "Range"]
        return Response(body, self.status, headers=headers, ignore=ignore, **options)


class TranscriptEvent:
    """What becomes of the requests that are in flight on some connections."""

    FORM = re.compile("(?P<numbers>[-0-9 ]+) (?P<event>come|leave)s?")
    pause = 0

    def __init__(self, numbers, event):
        self.numbers, self.event = numbers, event

    def play(self, server, connections):
        for number in self.numbers:
            getattr(connections[number], self.event)()


class TranscriptConnection:
    """A connection with a number, and the requests that are in flight on it."""

    def __init__(self, server):
        self.socket, self.in_flight = connect(server), []

    def send(self, line, head):
        self.socket.sendall(head)
        self.in_flight.append(line)
        if len(self.in_flight) == 1:  # else it is pipelined
            self.await_begin()

    def await_begin(self):
        if not self.in_flight[0].begun.wait(PATIENCE):
            raise AssertionError(f"{self.in_flight[0].target} has not arrived")

    def come(self):
        """Receive a response, and know that the server is done with it."""
        line = self.in_flight.pop(0)
        line.go_on.set()
        if line.last_on_connection:
            read_to_the_end(self.socket)
        else:
            response = http.client.HTTPResponse(self.socket, method=line.method)
            response.begin()
            response.read()
        if self.in_flight:
            self.await_begin()

    def leave(self):
        """Leave, and know that the server has noticed it.

        The server takes the end of what is sent for that, so there is something to wait for.
        """
        with contextlib.suppress(OSError):  # where the server was faster
            self.socket.shutdown(socket.SHUT_WR)
        for line in self.in_flight:
            line.go_on.set()
        self.in_flight.clear()
        read_to_the_end(self.socket)

    def close(self):
        """End a connection on which nothing is in flight."""
        if self.in_flight:
            raise AssertionError(f"{self.in_flight[0].target} neither comes nor leaves")
        self.leave()
        self.socket.close()


class Transcript:
    """The lines of a transcript in order, and how often the client may ask."""

    def __init__(self, text):
        self.options, self.steps = {}, []
        for line in unfolded(text):
            if every := re.fullmatch(r"every (\S+)", line):
                self.options = {"every": float(every[1])}
            elif event := TranscriptEvent.FORM.fullmatch(line):
                self.steps.append(TranscriptEvent(numbers(event["numbers"]), event["event"]))
            else:
                asked = numbers(TranscriptLine.FORM.match(line)["numbers"])
                self.steps += [TranscriptLine(line, number) for number in asked]
        self.lines = [step for step in self.steps if isinstance(step, TranscriptLine)]
        last = {line.number: line for line in self.lines}
        for line in self.lines:
            line.last_on_connection = line.number is None or last[line.number] is line


def any_life(seed, clock, urls):
    """Responses to whatever is asked, one after the other, as a seed decides."""
    pick = random.Random(seed).choice
    others = [302, 303, 307, 401, 404, 429, 500, 503] * 2 + [301, 308, 410]
    faults = [None] * 12 + ["reset", "close", "close at headers", "close at 3", "close at end"]

    def date(seconds):
        return email.utils.formatdate(clock() + seconds, usegmt=True)

    while True:
        status = pick([200] * 14 + others)
        may_have = {
            "ETag": ['"1"', 'W/"2"', '"3, 4"'] if status == 200 else [],
            "Last-Modified": [date(-60), "Fri, 06 Mar 2009 10:00:00 GMT"] * (status == 200),
            "Cache-Control": ["max-age=60", "max-age=9000"] if status in (200, 404) else [],
            "Expires": [date(5000), "0"] if status in (200, 404) else [],
            "Retry-After": ["60", "7200", date(7200), "soon"] * (status in (429, 503)),
            "Set-Cookie": ["a=1; Path=/", "b=2"],
        }
        fields = {name: pick([*values, None]) for name, values in may_have.items()}
        if 300 < status < 400:
            fields["Location"] = pick(urls)
        given = {name: value for name, value in fields.items() if value}
        # Clients may follow a redirect that is cut, or ask for it again.
        fault = None if "Location" in given else pick(faults)
        yield Response(b"<rss/>", status, headers=given, fault=fault)


class ReferenceClient:
    """A reader that is polite, but for the rule that it breaks.

    It asks for one thing at a time, once an interval, and for what it did not get whole once more.
    """

    def __init__(self, fetch, clock, every, urls, breaks=""):
        self.fetch, self.clock, self.every, self.breaks = fetch, clock, every, breaks
        self.urls, self.validators, self.moved, self.gone = urls, {}, {}, set()
        self.cookies, self.passwords = collections.defaultdict(dict), {}
        #: When it last asked for a URL, and when a URL or an origin is to be asked again.
        self.asked, self.wait = {}, collections.defaultdict(float)

    def poll(self):
        for url in self.urls:
            self.visit(url)

    def visit(self, url):
        """Ask for a URL if it is time to, and follow where its redirects lead."""
        url, by_redirect, brings = self.place(url), False, None
        for _ in range(4):
            if not self.may_ask(url, by_redirect):
                return
            origin, _, _ = url.rpartition("/")
            response = self.ask_twice(url, brings)
            if response and response.status == 401 and origin not in self.passwords:
                self.passwords[origin] = f"Basic {origin[7:].encode().hex()}"
                response = self.ask_twice(url)
            if not (response and response.headers["Location"]):
                return
            by_redirect = True
            brings = self.passwords.get(origin) if self.breaks == "leaked-credentials" else None
            url = response.headers["Location"]

    def place(self, url):
        """Where a URL has moved to for good; None if that is in circles."""
        passed = []
        while url in self.moved and self.breaks != "moved":
            passed.append(url)
            url = self.moved[url]
            if url in passed:
                return None
        return url

    def may_ask(self, url, by_redirect):
        if url is None or (url in self.gone and self.breaks != "gone"):
            return False
        every = self.every / 4 if self.breaks == "too-often" else self.every
        waits = max(self.wait[url], self.wait[url.rpartition("/")[0]])
        is_due = by_redirect or self.clock() >= self.asked.get(url, 0) + every
        return is_due and (self.clock() >= waits or self.breaks == "too-early")

    def ask_twice(self, url, brings=None):
        return self.ask(url, brings) or self.ask(url, brings)

    def ask(self, url, brings):
        """Ask once; returns the response, or None if it was cut."""
        self.asked[url] = self.clock()
        origin, _, _ = url.rpartition("/")
        host = urllib.parse.urlsplit(url).hostname
        fields = {"Authorization": brings or self.passwords.get(origin)}
        if self.breaks != "no-validator":
            fields.update(self.validators.get(url, {}))
        fields["Cookie"] = "; ".join(f"{k}={v}" for k, v in self.cookies[host].items())
        sent = {name: value for name, value in {**POLITE, **fields}.items() if value}
        response = self.fetch(url, sent)
        if response:
            self.learn(url, origin, host, response)
        return response

    def learn(self, url, origin, host, response):
        status, fields, now = response.status, response.headers, self.clock()
        if fields["Set-Cookie"]:
            name, _, value = fields["Set-Cookie"].partition(";")[0].partition("=")
            self.cookies[host][name] = value
        if status in (200, 304):
            pairs = (("If-None-Match", "ETag"), ("If-Modified-Since", "Last-Modified"))
            given = {condition: fields[name] for condition, name in pairs if fields[name]}
            self.validators[url] = {
                **(self.validators.get(url, {}) if status == 304 else {}),
                **given,
            }
        if status in (301, 308):
            self.moved[url] = fields["Location"]
        if status == 410:
            self.gone.add(url)
        waits = [self.wait[url], self.until(fields["Retry-After"], now)]
        if max_age := re.match("max-age=(.*)", fields["Cache-Control"] or ""):
            waits.append(now + int(max_age[1]))
        elif fields["Expires"]:
            waits.append(self.until(fields["Expires"], now))
        self.wait[url] = max(waits)
        if status == 429:
            self.wait[origin] = max(self.wait[origin], waits[1])

    def until(self, text, now):
        """The time that a Retry-After or an Expires tells; 0 if none."""
        if re.fullmatch("[0-9]+", text or ""):
            return now + int(text)
        date = email.utils.parsedate_tz(text or "")
        return email.utils.mktime_tz(date) if date else 0


class AuditTest(ServerTestCase):
    def play(self, transcript, server=None):
        """Ask and respond as a transcript says; returns its lines with the requests on record."""
        script = Transcript(transcript)
        lines = script.lines
        with contextlib.ExitStack() as stack:
            server = server or stack.enter_context(FeedTestServer(""))
            server.clear()
            if any(line.target.startswith("https:") for line in lines):
                stack.enter_context(server.intercept(proxy=False))
            now, passed, real = NOW, 0, feedtestserver.time.perf_counter
            server.clock = lambda: now
            # However slow the machine is, nothing takes time but what the transcript says.
            slow = mock.patch.object(
                feedtestserver.time, "perf_counter", lambda: real() / 1000 + passed
            )
            stack.enter_context(slow)
            for target in {line.target for line in lines}:
                steps = [line.step for line in lines if line.target == target]
                server.respond(target, *steps)
            connections = collections.defaultdict(lambda: TranscriptConnection(server))
            for step in script.steps:
                now += step.pause
                passed += max(step.pause, 0)
                step.play(server, connections)
            for connection in connections.values():
                connection.close()
            self.assertEqual(len(server.requests), len(lines))
            self.base_url, self.options = server.base_url, script.options
            return [(line, line.request) for line in lines]

    def later(self):
        """A context in which a few seconds have passed."""
        real = feedtestserver.time.perf_counter
        return mock.patch.object(feedtestserver.time, "perf_counter", lambda: real() + 5)

    def rules_broken(self, server):
        server.stop()  # so that all responses have ended
        return {finding.rule for finding in audit(server.requests)}

    def test_requests_that_are_given_up_after_some_time_are_a_burst(self):
        server = self.serve()
        server.respond("/feed.xml", Response(fault="stall"))
        with contextlib.ExitStack() as stack:
            for _ in range(7):
                stack.enter_context(connect(server)).sendall(LAST)
            server.wait_for_request("/feed.xml", times=7)
            stack.enter_context(self.later())
            server.stop()
        self.assertIn("burst", self.rules_broken(server))

    def test_one_request_after_the_other_that_is_given_up_is_no_burst(self):
        """The server cannot know when a client has left while test code works for it."""

        def step(request):
            begun.release()
            go_on.wait(PATIENCE)
            return 200

        server, begun, go_on = self.serve(), threading.Semaphore(0), threading.Event()
        server.respond("/feed.xml", step)
        for _ in range(8):
            with connect(server) as connection:
                connection.sendall(LAST)
                self.assertTrue(begun.acquire(timeout=PATIENCE))
        with self.later():
            go_on.set()
            server.wait_for_request("/feed.xml", times=8)
        self.assertNotIn("burst", self.rules_broken(server))

    def sentences(self, transcript):
        requests = [request for _, request in self.play(transcript)]
        findings = audit(requests, **self.options)
        return [finding.replace(self.base_url, "BASE") for finding in findings]

    def rules(self):
        """The names of all rules, as the words for a wrong one tell them."""
        with self.assertRaises(ValueError) as caught:
            MixinTest().assertPolite(ignore=["none of them"])
        return re.findall("'([a-z-]+)'", f"{caught.exception}")

    def test_transcripts(self):
        self.assertGreaterEqual(len(TRANSCRIPTS), 200)
        broken, server = set(), self.serve()
        for title, transcript in TRANSCRIPTS.items():
            played = self.play(transcript, server)
            findings = audit((request for _, request in played), **self.options)
            for line, request in played:
                rules = [finding.rule for finding in findings if finding.request is request]
                broken.update(rules)
                with self.subTest(title, request=request):
                    self.assertEqual(request.response.status, line.status)
                    self.assertEqual(rules, line.rules)
        self.assertEqual(broken, set(self.rules()))
        self.assertGreaterEqual(len(broken), 15)

    def test_sentences(self):
        for transcript, sentences in SENTENCES:
            with self.subTest(transcript):
                self.assertEqual(self.sentences(transcript), unfolded(sentences))

    def test_no_sentence_tells_a_password(self):
        for scheme, secret in (
            ("Basic", "dXNlcjpzZWNyZXQ="),
            ("Bearer", "c2VjcmV0"),
            ("x", "y0z1"),
        ):
            for method in ("GET", "HEAD", "POST"):
                sent = f"Authorization: {scheme} {secret}"
                [finding] = self.sentences(f"""
                {method} http://a.example/ | {sent} -> 307 | Location: http://u:secret@b.example/
                {method} http://b.example/ | {sent} -> 200
                """)
                with self.subTest(finding):
                    self.assertRegex(finding, rf"^{method} http://b\.example/.*: Authorization")
                    self.assertNotIn(secret, finding)
                    self.assertNotIn("secret", finding)

    def test_sentences_are_of_a_readable_length(self):
        long = "x" * 5000
        transcript = f"""
        GET /a -> 200 | ETag: "{long}" | Last-Modified: {long} | Cache-Control: max-age=9, {long}
        GET /a | If-None-Match: {long} | If-Modified-Since: {long}y
            -> 429 | Retry-After: {"9" * 5000}
        GET /a | Cookie: a={long} | Referer: {long} | Accept: {long} | Accept-Encoding: {long}
            -> 301 | Location: /{long}
        GET /a -> 200 | Expires: {long}
        """
        findings = self.sentences(transcript)
        self.assertEqual(len(findings), 11)
        self.assertLess(max(map(len, findings)), 550)

    def test_sentences_are_legible(self):
        findings = self.sentences("""
        GET /a -> 200 | ETag: "\u00e9\udcff"
        GET /a | If-None-Match: "\u00c3\u00a9" | Referer: -> 200 | ETag: "\u00e9\udcff"
        GET /a | If-None-Match: "\u00c3\u00a9\u00ff" -> 301 | Location: /\u00fc\udcff
        GET /a | If-None-Match: "\u00c3\u00a9\u00ff" -> 304
        """)
        for finding, said in zip(
            findings,
            (
                'If-None-Match was "\u00e9", but the last ETag given was "\u00e9\\xff"',
                "Referer was blank, but",
                "had moved it to BASE/%C3%BC%FF (",
            ),
        ):
            self.assertIn(said, finding)
            finding.encode()
        self.assertEqual(len(findings), 3)

    def test_ordinals(self):
        server = self.serve()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as client:
            for _ in range(123):
                client.request("GET", "/none", headers={**POLITE, "Referer": "a"})
                client.getresponse().read()
        found = [re.search(r"\((\S+) request\): Referer", f)[1] for f in audit(server.requests)]
        ordinals = " ".join(found[n - 1] for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 111, 123))
        self.assertEqual(ordinals, "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 111th 123rd")

    def test_a_finding_is_a_sentence_that_knows_its_request(self):
        [(_, request)] = self.play("GET /a | no User-Agent -> 200")
        [finding] = audit([request])
        self.assertIsInstance(finding, str)
        self.assertEqual((finding.rule, finding.request), ("no-user-agent", request))
        copied = copy.copy(finding)
        self.assertEqual((copied, copied.rule), (finding, "no-user-agent"))
        self.assertIs(copied.request, request)
        self.assertEqual(pickle.loads(pickle.dumps(finding)).request.target, "/a")

    def test_nothing_to_audit(self):
        self.assertEqual(audit([]), [])
        self.assertEqual(audit([], every=60), [])

    def test_the_rules_in_their_order(self):
        self.assertEqual(
            " ".join(self.rules()),
            "no-validator wrong-etag wrong-date too-early too-often repeated burst moved gone"
            " no-user-agent no-compression no-feed-type referer cookie leaked-credentials",
        )

    def test_findings_are_in_the_order_of_the_requests(self):
        played = self.play("""
        every 60
        1: GET /feed.xml -> 200
        2: GET /feed.xml -> 200
        GET /other.xml | no User-Agent -> 200
        GET /other.xml | Referer: a | Cookie: b=1 -> 200
        1-2 come
        """)
        findings = audit((request for _, request in reversed(played)), every=60)
        self.assertEqual(
            [(finding.request.target, finding.rule) for finding in findings],
            [
                ("/feed.xml", "repeated"),
                ("/other.xml", "no-user-agent"),
                ("/other.xml", "too-often"),
                ("/other.xml", "referer"),
                ("/other.xml", "cookie"),
            ],
        )

    def test_requests_that_are_still_in_flight(self):
        server = self.serve()
        server.respond("/feed.xml", Response(delay=3600))
        fields = "".join(f"{name}: {value}\r\n" for name, value in POLITE.items())
        with contextlib.ExitStack() as stack:
            for times in range(1, 10):
                connection = stack.enter_context(connect(server))
                connection.sendall(f"GET /feed.xml HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode())
                server.wait_for_request("/feed.xml", times=times)
            [finding] = audit(server.requests, every=60)
            self.assertEqual((finding.rule, finding.request), ("burst", server.requests[6]))

    def test_requests_that_get_nothing_were_in_flight(self):
        server = self.serve()
        begun, released = threading.Semaphore(0), threading.Event()

        def respond(request):
            begun.release()
            released.wait(PATIENCE)
            return Response(fault="close")

        server.respond("*", respond)
        fields = "".join(f"{name}: {value}\r\n" for name, value in POLITE.items())
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connect(server)) for _ in range(7)]
            for number, connection in enumerate(connections):
                connection.sendall(f"GET /{number} HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode())
                self.assertTrue(begun.acquire(timeout=PATIENCE))
            released.set()
            for connection in connections:
                self.assertEqual(connection.recv(1), b"")
        self.assertEqual([finding.rule for finding in audit(server.requests)], ["burst"])

    def live(self, seed, breaks=""):
        """The rules that a client breaks with a server that may do anything."""

        def fetch(url, fields):
            server.respond(url, next(life))
            try:
                connection.request("GET", url, headers=fields)
                response = connection.getresponse()
                response.read()
                return response
            except (http.client.HTTPException, OSError):
                connection.close()
                return None

        server, now, every, pauses = self.serve(), NOW, 3600, random.Random(seed)
        server.clock = lambda: now
        hosts = ("a.example", "a.example:8080", "b.example")
        urls = [f"http://{host}/{number}.xml" for host in hosts for number in "12"]
        life = any_life(seed, server.clock, urls)
        client = ReferenceClient(fetch, server.clock, every, urls, breaks)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            for _ in range(25):
                client.poll()
                now += pauses.choice([every / 4, every / 2, every, 2 * every])
        requests = server.requests
        found = audit(requests, every=every)
        self.assertEqual([f"{f} [{f.rule}]" for f in found if f.rule != breaks], [])
        first = requests[: len(requests) // 2]  # what comes later does not change the verdict
        self.assertEqual(audit(first, every=every), [f for f in found if f.request in first])
        return {finding.rule for finding in found}

    def test_a_polite_client_is_polite_whatever_a_server_does(self):
        for seed in range(3):
            with self.subTest(seed=seed):
                self.assertEqual(self.live(seed), set())

    def test_a_client_that_breaks_one_rule_breaks_no_other(self):
        rules = ("no-validator", "too-early", "too-often", "moved", "gone", "leaked-credentials")
        for rule in rules:
            with self.subTest(rule):
                self.assertEqual(self.live(3, rule), {rule})

    def test_clients_that_left_while_a_function_ran_are_no_crowd(self):
        """The server learns only afterwards that they have given up, one after the other."""
        server = self.serve()
        asked, go_on = threading.Semaphore(0), threading.Event()

        def respond_late(request):
            asked.release()
            go_on.wait(3 * PATIENCE)
            return 200

        server.respond("/feed.xml", respond_late)
        fields = "".join(f"{name}: {value}\r\n" for name, value in POLITE.items())
        for _ in range(8):
            with connect(server) as connection:
                connection.sendall(f"GET /feed.xml HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode())
                self.assertTrue(asked.acquire(timeout=PATIENCE))
        go_on.set()
        server.wait_for_request("/feed.xml", times=8)
        server.stop()
        self.assertEqual(audit(server.requests), [])

    def test_what_is_no_interval(self):
        for every in (
            *(0, -1, 0.0, -0.5, float("nan"), INFINITY, -INFINITY),
            *(True, False, "60", "", b"60", [60], (60, 60), datetime.timedelta(hours=1), 1j),
        ):
            with self.subTest(every), self.assertRaises(ValueError) as caught:
                audit([], every=every)
            self.assertRegex(
                f"{caught.exception}",
                r"\Aevery: found .{1,80}; it takes a positive number of seconds\Z",
            )
        with self.assertRaisesRegex(ValueError, "^every: found 0; it takes a positive number of"):
            audit((1 / 0 for _ in "x"), every=0)
        with self.assertRaises(TypeError):
            audit([], 60)

    def test_what_is_an_interval(self):
        requests = [request for _, request in self.play("GET /a -> 200\n+1 GET /a -> 200")]
        for every, rules in (
            (None, []),
            (1, []),
            (0.5, []),
            (1.001, ["too-often"]),
            (2, ["too-often"]),
            (1e300, ["too-often"]),
            (10**400, ["too-often"]),
            (5e-324, []),
        ):
            with self.subTest(f"{every!r:.9}"):
                self.assertEqual([f.rule for f in audit(requests, every=every)], rules)

    def test_any_order_of_the_record_will_do(self):
        requests = [request for _, request in self.play(TRANSCRIPTS["an unconditional GET"])]
        findings = audit(requests)
        self.assertEqual(audit(reversed(requests)), findings)
        self.assertEqual([finding.request for finding in findings], requests[1:])

    def test_refused_requests_are_not_audited(self):
        server = self.serve({"feed.xml": comment('Header: ETag: "v1"')})
        for line in ("GET /feed.xml HTTP/1.1\r\nBad Name: x", "GET /feed.xml HTTP/1.1", "GET"):
            exchange(server, f"{line}\r\nCookie: a=1\r\n\r\n".encode())
        self.assertEqual(len(server.requests), 3)
        self.assertEqual(audit(server.requests), [])
        self.get(server, "/feed.xml", headers={"Cookie": "a=1"})
        self.assertIn("GET /feed.xml (1st request): Cookie was", audit(server.requests)[-1])

    def test_what_an_asis_response_gives_may_be_sent_back(self):
        hint = b'HTTP/1.1 103 Early Hints\r\nETag: "hint"\r\n\r\n'
        response = (
            b'HTTP/1.1 200 OK\netag: "v1"\r\nSet-Cookie: a=1; Path=/\nConnection: x\n\n<rss/>'
        )
        more = b'\n\nHTTP/1.1 200 OK\nETag: "body"'
        server = self.serve({"a.asis": hint + response + more})
        for fields in (
            {},
            {"If-None-Match": '"v1"', "Cookie": "a=1"},
            {"If-None-Match": '"body"'},
        ):
            self.get(server, "/a.asis", headers={**POLITE, **fields})
        [finding] = audit(server.requests)
        self.assertIn('If-None-Match was "body", but the last ETag given was "v1"', finding)

    def test_an_asis_response_sets_no_rule_for_clients(self):
        server = self.serve({"gone.asis": b"HTTP/1.1 410 Gone\r\n\r\n" + bytes(100_000)})
        for _ in range(2):
            self.get(server, "/gone.asis", headers=POLITE)
        os.remove(server.fixtures()[0].path)
        self.assertEqual(audit(server.requests), [])

    def test_the_last_validator_is_named(self):
        for transcript, said in (
            ('HEAD /a -> 200 | ETag: "v1"\nHEAD /a -> 200 | ETag: "v2"', 'was "v2" ('),
            ('GET /a -> 200 | ETag: "v1" | ETag: "v2"', 'was "v1", "v2" ('),
        ):
            [finding] = self.sentences(f'{transcript}\nGET /a | If-None-Match: "x" -> 200')
            self.assertIn(f"but the last ETag given {said}", finding)

    def test_validators_of_others_are_not_named(self):
        for transcript, said in (
            ('HEAD /a -> 302 | Location: /b | ETag: "r"', "no ETag was given ("),
            ("GET /b | If-Modified-Since: NOW -> 304 | Last-Modified: NOW", "no ETag was given ("),
            ("GET /b -> 200", "no ETag was given with the last 200 ("),
        ):
            [finding] = self.sentences(f'{transcript}\nGET /b | If-None-Match: "x" -> 200')
            self.assertIn(f'If-None-Match was "x", but {said}', finding)

    def test_what_the_304_of_a_fixture_does_not_say(self):
        both = 'Header: ETag: "v1"', "Header: Last-Modified: Fri, 06 Mar 2009 10:00:00 GMT"
        age = "Header: Cache-Control: max-age=3600", "Header: Age: 3000"
        server = self.serve({"feed.xml": comment(*both, *age), "etag.xml": comment(both[0])})
        now = NOW
        server.clock = lambda: now
        for path, modified, etag, seconds, rules in (
            ("/feed.xml", "Fri, 06 Mar 2009 10:00:00 GMT", '"v1"', 0, []),
            ("/feed.xml", "Fri, 06 Mar 2009 10:00:00 GMT", '"v1"', 600, []),
            (
                "/feed.xml",
                "Sat, 07 Mar 2009 09:00:00 GMT",
                '"v1"',
                599,
                ["wrong-date", "too-early"],
            ),
            ("/feed.xml?1", "Sat, 07 Mar 2009 09:00:00 GMT", None, 0, ["wrong-date"]),
            ("/feed.xml?2", None, 'W/"v1"', 0, ["wrong-etag"]),
            ("/etag.xml", "Sat, 07 Mar 2009 09:00:00 GMT", '"v1"', 0, ["wrong-date"]),
        ):
            now += seconds
            fields = {"If-Modified-Since": modified, "If-None-Match": etag}
            sent = {name: value for name, value in fields.items() if value}
            self.assertEqual(self.get(server, path, headers={**POLITE, **sent}).status, 304)
            last = server.requests[-1]
            found = [f.rule for f in audit(server.requests) if f.request is last]
            with self.subTest(path, seconds=seconds):
                self.assertEqual(found, rules)

    def test_the_server_has_many_names(self):
        server = self.serve()
        to_b = {"Location": f"HTTP://LOCALHOST:{server.port}/b"}
        first = Response(headers={"ETag": '"v1"'})
        server.respond("/a", first, Response(status=302, headers=to_b))
        server.respond("/b", 200)
        for path, etag in (("/a", ""), ("/a", '"v1"'), ("/b", '"v1"')):
            fields = {"If-None-Match": etag} if etag else {}
            self.get(server, path, headers={**POLITE, **fields})
        self.assertEqual(audit(server.requests), [])

    def test_the_names_of_this_machine_are_origins_of_their_own(self):
        """Also those of which the URLs are taken for the same."""
        password = {**POLITE, "Authorization": "Basic dTpw"}
        for name, rules in (("127.0.0.1", []), ("localhost", ["leaked-credentials"])):
            server = self.serve()
            host = f"{name}:{server.port}"
            server.respond("/a", Response(status=302, headers={"Location": f"http://{host}/b"}))
            server.respond("/b", 200)
            self.get(server, "/a", headers=password)
            self.get(server, "/b", headers={**password, "Host": host})
            with self.subTest(host):
                self.assertEqual([finding.rule for finding in audit(server.requests)], rules)

    def test_urls_are_told_apart_by_their_scheme_and_redirects_lead_over_it(self):
        server = self.serve()
        to = [("Location", server.get_url("/b\u00fccher#top", "https"))]
        server.respond(
            "/feed.xml", Response(headers=[("ETag", '"v1"')]), Response(status=302, headers=to)
        )
        server.respond("/b\u00fccher", Response(headers=[("ETag", '"v2"')]))
        fields = {**POLITE, "If-None-Match": '"v1"'}
        self.get(server, "/feed.xml", headers=POLITE)
        self.get(server, "/feed.xml", headers=fields)
        context = server.ssl_context()
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context)
        with contextlib.closing(connection):
            connection.request("GET", "/b%C3%BCcher", headers=fields)
            connection.getresponse().read()
        self.assertEqual(audit(server.requests), [])
        self.get(server, "/b%C3%BCcher", headers=fields)
        self.assertEqual([finding.rule for finding in audit(server.requests)], ["wrong-etag"])

    def test_a_response_sets_no_rule_for_requests_before_it(self):
        server = self.serve()
        asked, released = threading.Event(), threading.Event()

        def respond_late(request):
            asked.set()
            released.wait(PATIENCE)
            return Response(headers={"ETag": '"late"', "Cache-Control": "max-age=60"})

        early = Response(headers={"ETag": '"early"'})
        for_later = {"ETag": '"later"', "Cache-Control": "max-age=60"}
        slow = Response(bytes(60), rate=1, headers=for_later)
        delayed = Response(delay=60, headers=for_later)
        paused = Response(b"<rss/>", pause=["60 at 1"], headers=for_later)
        server.respond("/feed.xml", respond_late, delayed, slow, paused, early, 200)
        get = functools.partial(self.get, server, "/feed.xml", headers=POLITE)
        other = {**POLITE, "Pragma": "no-cache"}  # so that the next one does not repeat it
        first = threading.Thread(target=get, kwargs={"headers": other})
        first.start()
        self.assertTrue(asked.wait(PATIENCE))
        with contextlib.ExitStack() as stack:
            for times in (1, 2, 3):  # these get their responses a minute later
                connection = stack.enter_context(connect(server))
                connection.sendall(b"GET /feed.xml HTTP/1.0\r\n\r\n")
                server.wait_for_request("/feed.xml", times=times)
            get()
            released.set()
            first.join()
            get()
            requests = server.requests
            findings = [finding for finding in audit(requests) if finding.request in requests[3:]]
        self.assertEqual([finding.rule for finding in findings[:2]], ["no-validator", "too-early"])
        self.assertEqual({f"{f.request.response.status}" for f in findings}, {"200"})
        self.assertEqual({f.partition(" request")[0] for f in findings}, {"GET /feed.xml (6th"})

    def test_pipelined_requests_are_not_judged_by_responses_that_come_later(self):
        server = self.serve()
        server.respond(
            "/feed.xml", Response(headers={"ETag": '"v1"', "Cache-Control": "max-age=9"})
        )
        lines = "".join(f"{name}: {value}\r\n" for name, value in POLITE.items())
        request = f"GET /feed.xml HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode()
        with connect(server) as connection:
            connection.sendall(request * 2)
            server.wait_for_request("/feed.xml", times=2)
        self.assertEqual(audit(server.requests), [])

    def test_times_may_be_fractions(self):
        server = self.serve()
        now = NOW + 0.75
        server.clock = lambda: now
        response = Response(headers={"Cache-Control": "max-age=60"})
        server.respond(
            "/a", response, response, Response(status=503, headers={"Retry-After": "60"})
        )
        said = []
        for seconds in (0, 59.25, 59.25, 59.75, 59.5):
            now += seconds
            self.get(server, "/a", headers=POLITE)
            said.append([f.partition("asked again after ")[2][:9] for f in audit(server.requests)])
        early = "59 s, 1 s"
        self.assertEqual(said, [[], [], [early], [early], [early, early]])

    def test_what_a_client_did_not_wait_for_binds_it_no_more(self):
        clock = NoTimePasses(self)
        large = Response(bytes(20_000_000), headers={"ETag": '"v1"'})
        for response in (Response(delay=60, headers={"ETag": '"v1"'}), large):
            with self.subTest(response.delay):
                left = threading.Event()

                def respond_late(request, left=left, response=response):
                    left.wait(PATIENCE)
                    return response

                server = self.serve()
                server.respond("/feed.xml", respond_late, response)
                connection = connect(server)
                connection.sendall(b"GET /feed.xml HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n")
                connection.close()
                left.set()
                server.wait_for_request("/feed.xml")
                clock.time += 100
                self.get(server, "/feed.xml", headers=POLITE)
                self.get(server, "/feed.xml", headers=POLITE)
                server.stop()
                rules = [finding.rule for finding in audit(server.requests)[2:]]
                self.assertEqual(rules, ["no-validator"])

    def test_streams_bind_once_they_have_come_whole(self):
        def live():
            yield b"<rss/>"
            go_on.wait(3 * PATIENCE)

        def broken():
            yield b"<rss/>"
            raise ZeroDivisionError

        go_on = threading.Event()
        self.addCleanup(go_on.set)
        length = ("Content-Length", "6")
        for items, fields, fault, rules in (
            ((item for item in [b"<rss/>"]), [], None, ["no-validator"]),
            ((item for item in [b"<rss/>"]), [length], "close at 100%", ["no-validator"]),
            ((item for item in [b"<rss/>!"]), [("Content-Length", "7")], "close at 99%", []),
            (live(), [], None, []),
            (live(), [length], None, []),
            (broken(), [], None, []),
        ):
            go_on.clear()
            server = self.serve()
            response = Response(items, headers=[("ETag", '"v1"'), *fields], fault=fault)
            server.respond("/feed.xml", response, 200)
            fields = {**POLITE, "Host": f"127.0.0.1:{server.port}", "Connection": "close"}
            lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            with self.subTest(items, fault=fault), connect(server) as connection:
                connection.sendall(f"GET /feed.xml HTTP/1.1\r\n{lines}\r\n".encode())
                received = b""
                while b"<rss/>" not in received:
                    received += connection.recv(65536)
                if items.__name__ != "live":
                    read_to_the_end(connection)
                self.get(server, "/feed.xml", headers=POLITE)
                self.assertEqual([finding.rule for finding in audit(server.requests)], rules)
                go_on.set()

    def test_large_responses_bind_once_the_last_byte_is_sent(self):
        """However soon the client asks again: here the server does nothing in between."""

        def send_and_wait(connection, data):
            sent = send(connection, data)
            sizes.append(sent)
            if sent == len(data) and sum(sizes) > size:
                asked_again.wait(PATIENCE)
            return sent

        send = socket.socket.send
        for size in (130_000, 200_000, 500_000):
            sizes, asked_again, server = [], threading.Event(), self.serve()
            server.respond("/feed.xml", Response(bytes(size), headers={"ETag": '"v1"'}))
            with (
                self.subTest(size),
                mock.patch.object(socket.socket, "send", send_and_wait),
                contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as first,
                contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as second,
            ):
                for connection in (first, second):
                    connection.timeout = PATIENCE
                    connection.request("GET", "/feed.xml", headers=POLITE)
                    if connection is second:
                        asked_again.set()
                    self.assertEqual(connection.getresponse().read(), bytes(size))
                rules = [finding.rule for finding in audit(server.requests)]
                self.assertEqual(rules, ["no-validator"])

    def test_a_callable_may_audit(self):
        server = self.serve()
        found = []

        def step(request):
            found.extend(audit([*server.requests, request]))
            return 200

        server.respond("/feed.xml", step)
        for _ in range(2):
            self.get(server, "/feed.xml")
        self.assertEqual({finding.request for finding in found}, {server.requests[0]})


# The mixin


def run_test(test_class, name="test"):
    """Run one test of a class; returns the result."""
    result = unittest.TestResult()
    test_class(name).run(result)
    return result


def cause_an_error(server):
    """Let a callable of the test be wrong."""
    server.respond("/wrong", lambda request: 1 / 0)
    exchange(server, b"GET /wrong HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")


class MixinTest(FeedTestServerMixin, ServerTestCase):
    data_directory = HERE / "data"
    #: The file of a test.
    NOT_KEPT = b"""
import feedtestserver, unittest
class Test(feedtestserver.FeedTestServerMixin, unittest.TestCase):
    def test(self):
        self.used = self.server.directory
"""

    def failure(self, function, *args, **kwargs):
        with self.assertRaises(self.failureException) as caught:
            function(*args, **kwargs)
        return str(caught.exception)

    def test_urls(self):
        self.assertEqual(self.base_url, self.server.base_url)
        self.assertEqual(self.get_url("/a b"), f"{self.base_url}/a%20b")

    def test_assert_requested(self):
        for number in "12":
            self.get(self.server, "/x", headers={"N": number})
        self.assertIs(self.assertRequested("/x"), self.server.requests[1])
        self.assertIs(
            self.assertRequested("x", headers={"N": "1"}, times=1), self.server.requests[0]
        )
        self.assertNotRequested("/y")
        self.assertNotRequested("/x", method="POST")
        self.assertNotRequested("/x", headers={"N": "3"})
        self.assertNotRequested("/x", body=b"x")
        self.get(self.server, "//x")
        self.get(self.server, "*", "OPTIONS")
        self.assertRequested("//x", times=1)
        self.assertRequested("*", method="OPTIONS")
        with self.assertRaises(ValueError):
            self.assertRequested("/y", times=0)

    def test_addresses_are_those_of_respond(self):
        ask(self.server, "/caf\u00e9?b&a=1")
        for address in ("/caf%c3%a9", "caf%C3%A9?a=1&b=", "/c*?b&*=1", "*"):
            with self.subTest(address):
                self.assertRequested(address, times=1)
                self.assertIn(address, self.failure(self.assertNotRequested, address))
        for address in ("/caf%c3%a9?", "/c*?a=1", "http://*/caf%C3%A9"):
            with self.subTest(address):
                self.assertNotRequested(address)
                self.assertIn(address, self.failure(self.assertRequested, address))
        for address in ("http:///x", "ftp://a.example/x", "http://a.example:*/"):
            for function in (self.assertRequested, self.assertNotRequested):
                with self.subTest(address), self.assertRaises(ValueError):
                    function(address)

    def test_a_connect_is_found_by_its_method_only(self):
        ask(self.server, "a.example:443", "CONNECT")
        self.assertRequested("https://a.example/", method="CONNECT", times=1)
        self.assertNotRequested("https://a.example/")
        self.assertNotRequested("https://b.example/", method="CONNECT")

    def test_failures_show_what_did_arrive(self):
        self.assertEqual(
            self.failure(self.assertRequested, "/x"),
            "expected /x at least once; it was not requested\nThe server got no request.",
        )
        self.get(self.server, "/x", headers={"N": "1"})
        self.get(self.server, "/y", "POST", b"abc")
        self.assertEqual(
            self.failure(self.assertRequested, "/x", times=2, method="GET", msg="twice a day"),
            "expected GET /x twice; it was requested once\n"
            "The server got:\n  GET /x -> 404\n  POST /y -> 405 : twice a day",
        )
        self.assertEqual(
            self.failure(self.assertRequested, "/x", headers={"n": "2"}),
            "expected /x with n: 2 at least once; it was not requested\n"
            "The server got:\n  GET /x -> 404\n      n: 1\n  POST /y -> 405",
        )
        self.assertEqual(
            self.failure(self.assertNotRequested, "/x", headers={"M": None}),
            "expected no /x without M; got 1\nThe server got:\n  GET /x -> 404\n  POST /y -> 405",
        )
        self.assertIn("\n      b'abc'", self.failure(self.assertRequested, "/y", body="def"))

    def test_assert_polite(self):
        self.assertPolite()
        self.server.respond("/x", Response(headers={"ETag": '"v1"'}))
        self.get(self.server, "/x", headers=POLITE)
        self.assertPolite()
        self.get(self.server, "/x", headers={**POLITE, "Referer": "a"})
        self.assertEqual(
            self.failure(self.assertPolite, "as we are"),
            "the client was not polite:\n"
            "  GET /x (2nd request): neither If-None-Match nor If-Modified-Since was sent, but the"
            ' last ETag given was "v1" (RFC 9110 13.1.2) [no-validator]\n'
            "  GET /x (2nd request): Referer was a, but no link was followed"
            " (RFC 9110 10.1.3) [referer]\n"
            "The server got:\n"
            "  GET /x -> 200 (step 1 of 1)\n"
            "  GET /x -> 200 (step 1 of 1) : as we are",
        )
        self.assertPolite(ignore=("no-validator", "referer", "cookie"))
        self.assertNotIn("[referer]", self.failure(self.assertPolite, ignore={"referer"}))

    def test_assert_polite_shows_the_first_of_many(self):
        for _ in range(5):
            self.get(self.server, "/x", headers={**POLITE, "Referer": "a"})
        self.assertNotIn("more", self.failure(self.assertPolite))
        for _ in range(3):
            self.get(self.server, "/x", headers={**POLITE, "Referer": "a"})
        failure = self.failure(self.assertPolite)
        self.assertEqual(failure.count("[referer]\n  GET"), 4)
        self.assertIn("(5th request): Referer was a, but", failure)
        self.assertIn("\n  and 3 more [referer]\nThe server got:\n", failure)

    def test_assert_polite_knows_what_to_ignore(self):
        message = "(?s)ignore: found .{1,80}; it takes a sequence of the rules 'no-validator', "
        for ignore in ("referer", ["referer", "validator"], [""], "", None, 5, [["x"]], ["x" * 99]):
            with self.subTest(ignore), self.assertRaisesRegex(ValueError, message):
                self.assertPolite(ignore=ignore)
        for name in ("too-often", "repeated", "burst", "leaked-credentials"):
            with self.subTest(name):
                self.assertPolite(ignore=[name])
                with self.assertRaisesRegex(ValueError, f", '{name}'"):
                    self.assertPolite(ignore=[name, "often"])

    def test_assert_polite_with_an_interval(self):
        for _ in range(3):
            self.get(self.server, "/x", headers=POLITE)
        self.assertPolite()
        self.assertPolite(every=60, ignore=["too-often"])
        failure = self.failure(self.assertPolite, "once a minute", every=60)
        self.assertRegex(failure, r"\n  GET /x \(2nd request\): .*\b60 s\b.* \[too-often\]\n")
        self.assertRegex(
            failure, r"\n  GET /x \(3rd request\): .*\b60 s\b.* \[too-often\]\nThe ser"
        )
        self.assertTrue(failure.endswith(" : once a minute"), failure)
        for every in (0, -1, float("nan"), INFINITY, True, "60"):
            with (
                self.subTest(every),
                self.assertRaisesRegex(ValueError, "^every: found .*; it takes a positive number"),
            ):
                self.assertPolite(every=every)

    def test_assertions_are_those_of_the_server(self):
        self.get(self.server, "/x", "POST", b'{"a": 1}', {"Referer": "a"})
        for mine, of_the_server, arguments in (
            (self.assertRequested, self.server.assert_requested, {"path": "/y", "body": {"a": 2}}),
            (self.assertNotRequested, self.server.assert_not_requested, {"path": "/x"}),
            (self.assertNotRequested, self.server.assert_not_requested, {}),
            (self.assertNotRequested, self.server.assert_not_requested, {"body": {"a": 1}}),
        ):
            words = self.failure(of_the_server, **arguments)
            with self.subTest(mine.__name__, **arguments):
                self.assertEqual(self.failure(mine, **arguments), words)
                self.assertEqual(self.failure(mine, **arguments, msg="m"), f"{words} : m")
        self.assertIs(self.assertRequested("/x", body={"a": 1}), self.server.requests[0])
        self.assertNotRequested(method="GET")

    def test_a_server_may_have_assertions_of_its_own(self):
        class Failure(Exception):
            pass

        class Server(FeedTestServer):
            def fail(self, *args, **kwargs):
                raise AssertionError("the server's words")

            assert_requested = assert_not_requested = assert_polite = fail

        class Test(FeedTestServerMixin, unittest.TestCase):
            server_class = Server
            failureException = Failure

            def test(self):
                self.assertRequested("/x", msg="mine")

            def test_not(self):
                self.assertNotRequested(msg="mine")

            def test_polite(self):
                self.assertPolite("mine")

        for name in ("test", "test_not", "test_polite"):
            with self.subTest(name):
                [(_, words)] = run_test(Test, name).failures
                self.assertTrue(words.endswith("Failure: the server's words : mine\n"), words)

    def test_errors_of_the_server_hide_no_failure_of_the_test(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            def test(self):
                cause_an_error(self.server)
                raise KeyError("mine")

        result = run_test(Test)
        [(_, error)], [(_, failure)] = result.errors, result.failures
        self.assertIn("KeyError: 'mine'", error)
        self.assertIn("the server found errors:\nGET /wrong: ZeroDivisionError", failure)

    def test_errors_of_the_server_fail_the_test(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            def test(self):
                self.server.respond("/x", lambda request: 1 / 0)
                with self.assertRaises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(self.get_url("/x"))
                caught.exception.close()

            def test_cleared(self):
                self.test()
                self.server.clear()

        result = run_test(Test)
        self.assertEqual((len(result.failures), result.errors), (1, []))
        self.assertIn("the server found errors:\nGET /x: ZeroDivisionError", result.failures[0][1])
        self.assertTrue(run_test(Test, "test_cleared").wasSuccessful())

    def test_strict_fails_a_test_that_leaves_steps(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            strict = True

            def test_left(self):
                self.server.respond("/caf\u00e9/*", 201, 202)
                self.server.respond("/x", 203, method="POST")
                ask(self.server, "/caf%C3%A9/x")
                Test.sentences = self.server.unused

            def test_left_beside_an_error(self):
                self.test_left()
                cause_an_error(self.server)

            def test_left_beside_a_failure(self):
                self.test_left()
                self.fail("in its own words")

        for name, others in (
            ("test_left", ()),
            ("test_left_beside_an_error", ["GET /wrong: ZeroDivisionError"]),
            ("test_left_beside_a_failure", ["AssertionError: in its own words"]),
        ):
            with self.subTest(name):
                result = run_test(Test, name)
                words = "".join(words for _, words in result.failures)
                self.assertEqual((len(Test.sentences), result.errors), (2, []))
                for sentence in (*Test.sentences, *others):
                    self.assertEqual(words.count(sentence), 1, words)
        Test.strict = False
        self.assertTrue(run_test(Test, "test_left").wasSuccessful())

    def test_strict_where_no_step_is_left(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            strict = True

            def test_taken(self):
                self.server.respond("/x", 201, 202)
                for _ in range(3):
                    ask(self.server, "/x")

            def test_cleared(self):
                self.server.respond("/x", 201)
                self.server.clear()

            def test_replaced(self):
                self.server.respond("/x", 201, 202)
                self.server.respond("/x", 203)
                ask(self.server, "/x")

            def test_nothing(self):
                pass

        for name in ("test_taken", "test_cleared", "test_replaced", "test_nothing"):
            with self.subTest(name):
                self.assertTrue(run_test(Test, name).wasSuccessful())

    def test_strict_with_a_server_that_the_class_shares(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__
            strict = True

            @classmethod
            def setUpClass(cls):
                cls.server = FeedTestServer(HERE / "data")
                cls.server.start()
                cls.addClassCleanup(cls.server.stop)

            def test_1(self):
                self.server.respond("/left", 201)

            def test_2(self):
                ask(self.server, "/")

            def test_3(self):
                self.server.respond("/taken", 201, 202)
                ask(self.server, "/taken")

            def test_4(self):
                self.server.respond("/x", 201)
                for path in ("/x", "/left", "/taken"):
                    ask(self.server, path)

        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(Test).run(result)
        self.assertEqual((result.testsRun, result.errors), (4, []))
        failed = [(test.id().rpartition(".")[2], words) for test, words in result.failures]
        self.assertEqual([name for name, _ in failed], ["test_1", "test_3"])
        for (_, words), address in zip(failed, ("/left", "/taken")):
            self.assertIn(address, words.splitlines()[-1])
        self.assertNotIn("/left", failed[1][1])

    def test_tracebacks_of_failures_end_in_the_test(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            def test(self):
                self.assertRequested("/x")

        [(_, traceback)] = run_test(Test).failures
        self.assertEqual(traceback.count("File "), 1)
        self.assertIn('self.assertRequested("/x")', traceback)

    def test_a_server_for_each_test_that_is_gone_after_it(self):
        servers = []

        class Test(FeedTestServerMixin, unittest.TestCase):
            def test(self):
                servers.append(self.server)

        test = Test("test")
        for _ in range(2):
            test.run()
        self.assertEqual([server.is_alive() for server in servers], [False, False])
        self.assertIsNot(*servers)

    def test_no_thread_is_left(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            def test(self):
                self.server.respond("/", lambda request: 204)
                urllib.request.urlopen(self.base_url).close()

        threads = set(threading.enumerate())
        self.assertTrue(run_test(Test).wasSuccessful())
        self.assertEqual(set(threading.enumerate()), threads)

    def test_test_code_that_does_not_return_is_an_error_of_the_test(self):
        entered, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        class Test(FeedTestServerMixin, unittest.TestCase):
            def test(self):
                self.server.stop_timeout = 0.01
                self.server.respond("/x", lambda request: entered.set() or release.wait(PATIENCE))
                connection = connect(self.server)
                self.addCleanup(connection.close)
                connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
                entered.wait(PATIENCE)
                Test.used = self.server

        [(_, words)] = run_test(Test).errors
        self.assertIn("the test code that responds to GET /x; it has to return by itself", words)
        release.set()
        Test.used.stop_timeout = PATIENCE
        Test.used.stop()

    def test_errors_are_told_with_test_code_that_does_not_return(self):
        entered, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        class Test(FeedTestServerMixin, ServerTestCase):
            def test(self):
                Test.used = self.server
                self.server.respond("/wrong", lambda request: 1 / 0)
                self.get(self.server, "/wrong")
                self.server.stop_timeout = 0.01
                self.server.respond("/x", lambda request: entered.set() or release.wait(PATIENCE))
                connection = connect(self.server)
                self.addCleanup(connection.close)
                connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
                entered.wait(PATIENCE)

        [(_, words)] = run_test(Test).failures
        self.assertIn("the test code that responds to GET /x; it has to return by itself", words)
        self.assertIn("the server found errors:\nGET /wrong: ZeroDivisionError", words)
        release.set()
        Test.used.stop_timeout = PATIENCE
        Test.used.stop()

    def test_a_forgotten_setup(self):
        outer = self

        class Test(FeedTestServerMixin, unittest.TestCase):
            def setUp(self):
                pass

            def test(self):
                outer.assertTrue(self.server.ready)
                Test.used = self.server

            def test_without(self):
                pass

        self.assertTrue(run_test(Test).wasSuccessful())
        self.assertFalse(Test.used.is_alive())
        self.assertTrue(run_test(Test, "test_without").wasSuccessful())

    def test_a_server_that_is_used_before_setup_is_kept(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            def setUp(self):
                self.server.respond("/x", 203)
                super().setUp()

            def test(self):
                with urllib.request.urlopen(self.get_url("/x")) as response:
                    self.assertEqual(response.status, 203)

        result = run_test(Test)
        self.assertTrue(result.wasSuccessful(), result.failures + result.errors)

    def test_the_record_is_there_for_cleanups(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            def setUp(self):
                self.addCleanup(lambda: self.assertRequested("/x"))
                super().setUp()

            def test(self):
                with self.assertRaises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(self.get_url("/x"))
                caught.exception.close()

        result = run_test(Test)
        self.assertTrue(result.wasSuccessful(), result.failures + result.errors)

    def test_cooperates_with_other_bases(self):
        calls = []

        class Base(unittest.TestCase):
            def setUp(self):
                super().setUp()
                calls.append("setUp")

        class Test(FeedTestServerMixin, Base):
            def test(self):
                calls.append("test")

        self.assertTrue(run_test(Test).wasSuccessful())
        self.assertEqual(calls, ["setUp", "test"])

    def test_class_attributes(self):
        class Server(FeedTestServer):
            pass

        class Test(FeedTestServerMixin, unittest.TestCase):
            data_directory = "data/formats"
            server_class = Server
            server_options = {"bind_timeout": 3.0, "stop_timeout": 4.0, "clock": lambda: NOW}

            def test(self):
                Test.used = self.server

        self.assertTrue(run_test(Test).wasSuccessful())
        self.assertIsInstance(Test.used, Server)
        self.assertEqual(Test.used.directory, str(HERE / "data" / "formats"))
        self.assertEqual((Test.used.bind_timeout, Test.used.stop_timeout), (3.0, 4.0))
        self.assertEqual(Test.used.clock(), NOW)

    def test_the_directory_by_default(self):
        """It is data beside the file of the class, if there is such a folder, wherever it runs."""
        with_data, with_file, empty = map(
            self.make_directory, ({"data/feed.xml": b""}, {"data": b""}, {})
        )

        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = "elsewhere"

            def test(self):
                self.used = self.server.directory

        self.assertIsNone(Test.data_directory)
        self.change_directory(HERE)
        for folder, name, found in (
            (with_data, None, with_data / "data"),
            (with_data, "data", with_data / "data"),
            (with_data, "", None),
            (with_file, None, None),
            (empty, None, None),
        ):
            module = types.ModuleType("elsewhere")
            module.__file__ = str(folder / "test_it.py")
            for current in (with_data, empty):
                os.chdir(current)
                with (
                    self.subTest(folder=os.listdir(folder), name=name, current=os.listdir(current)),
                    mock.patch.dict(sys.modules, elsewhere=module),
                    mock.patch.object(Test, "data_directory", name),
                ):
                    test = Test("test")
                    result = test.run()
                    self.assertEqual((result.errors, result.failures), ([], []))
                    self.assertEqual(test.used or None, found and str(found))

    def test_a_class_of_a_module_that_is_not_kept(self):
        """As runpy.run_path() makes it. The data is then in the current directory."""
        folder = self.make_directory({"data/feed.xml": b"", "test_it.py": self.NOT_KEPT})
        test_class = runpy.run_path(str(folder / "test_it.py"))["Test"]
        self.assertNotIn(test_class.__module__, sys.modules)
        self.change_directory(folder)
        test = test_class("test")
        result = test.run()
        self.assertEqual((result.errors, result.failures), ([], []))
        self.assertEqual(test.used, str(folder / "data"))

    def test_a_missing_directory_is_an_error_of_the_test(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            data_directory = "no-such-directory"

            def test(self):
                pass

        result = run_test(Test)
        self.assertIn("there is no such directory to serve", result.errors[0][1])

    def test_a_server_that_the_class_shares(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__
            intercept = True

            @classmethod
            def setUpClass(cls):
                cls.server = FeedTestServer(HERE / "data")
                cls.server.start()
                cls.addClassCleanup(cls.server.stop)

            def test_1(self):
                self.server.respond("http://example.com/", 204)
                urllib.request.urlopen("http://example.com/").close()

            def test_2(self):
                self.assertRequested("http://example.com/", times=1)
                cause_an_error(self.server)

            def test_3(self):
                self.assertTrue(self.server.ready)

        before = dict(os.environ)
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(Test).run(result)
        self.assertEqual((result.testsRun, result.errors), (3, []))
        [(test, words)] = result.failures
        self.assertEqual(test.id().rpartition(".")[2], "test_2")
        self.assertIn("found errors:\nGET /wrong: ZeroDivisionError", words)
        self.assertFalse(Test.server.is_alive())
        self.assertEqual(dict(os.environ), before)

    def test_a_server_that_the_test_has_started_itself(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__

            def setUp(self):
                self.server = FeedTestServer(HERE / "data")
                self.server.start()
                self.addCleanup(self.server.stop)
                super().setUp()

            def test(self):
                cause_an_error(self.server)

        [(_, words)] = run_test(Test).failures
        self.assertIn("found errors:\nGET /wrong: ZeroDivisionError", words)

    def test_a_shared_server_that_is_not_running(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__
            server = FeedTestServer(HERE / "data")

            def test(self):
                pass

        [(_, words)] = run_test(Test).errors
        self.assertIn("Test.server is not running: start() it first", words)

    def test_asyncio(self):
        class Test(FeedTestServerMixin, unittest.IsolatedAsyncioTestCase):
            async def test(self):
                self.server.respond("/x", b"abc")
                reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
                writer.write(b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                self.assertTrue((await reader.read()).endswith(b"abc"))
                writer.close()
                await writer.wait_closed()
                self.assertRequested("/x")

        result = run_test(Test)
        self.assertTrue(result.wasSuccessful(), result.failures + result.errors)

    def test_failing_subtests_can_be_pickled(self):
        """Django's parallel runner sends them to another process."""
        test = PickledTest("test")
        test.run(unittest.TestResult())
        self.assertTrue(test.pickled)

    def test_a_test_keeps_its_own_cleanups_on_its_way_to_another_process(self):
        test = PickledTest("test")
        test.addCleanup(test.note_that_it_ended)
        test = pickle.loads(pickle.dumps(test))
        test.run(unittest.TestResult())
        self.assertTrue(test.ended)

    def test_a_test_can_be_sent_to_another_process_to_be_run_there(self):
        result = unittest.TestResult()
        test = pickle.loads(pickle.dumps(PickledTest("test")))
        test.run(result)
        self.assertTrue(result.wasSuccessful(), result.failures + result.errors)
        self.assertTrue(test.pickled)


class InterceptingMixinTest(FeedTestServerMixin, ServerTestCase):
    intercept = True

    def test_the_whole_test_runs_inside(self):
        self.server.respond("https://example.com/feed.xml", b"<rss/>")
        with urllib.request.urlopen("https://example.com/feed.xml") as response:
            self.assertEqual(response.read(), b"<rss/>")
        self.assertRequested("https://example.com/feed.xml", times=1)
        self.assertNotRequested("/feed.xml")

    def test_keyword_arguments(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__
            intercept = {"proxy": False}

            def runTest(self):
                seen.append(dict(os.environ))
                self.server.respond("http://example.com/feed.xml", b"<rss/>")
                self.server.resolve("example.com", "192.0.2.1")
                connection = http.client.HTTPConnection("example.com", timeout=PATIENCE)
                with contextlib.closing(connection):
                    connection.request("GET", "/feed.xml")
                    self.assertEqual(connection.getresponse().read(), b"<rss/>")
                request = self.assertRequested("http://example.com/feed.xml", times=1)
                self.assertEqual(request.address, "192.0.2.1")

        seen, before = [], dict(os.environ)
        result = Test().run()
        self.assertTrue(result.wasSuccessful(), result.errors + result.failures)
        self.assertEqual(seen, [before])
        self.assertEqual(self.server.requests, [])

    def test_what_is_false_and_what_is_not(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__

            def runTest(self):
                found = socket.getaddrinfo("a.example", 80)
                seen.append((found != outside, os.environ.get("http_proxy")))

        # The test itself is inside of another server's.
        outside, before = socket.getaddrinfo("a.example", 80), os.environ.get("http_proxy")
        for value, is_begun, proxy in (
            *((value, False, False) for value in (False, None, 0)),
            *((value, True, True) for value in (True, {}, {"proxy": True})),
            ({"proxy": False}, True, False),
        ):
            test, seen = Test(), []
            test.intercept = value
            with self.subTest(value):
                result = test.run()
                self.assertTrue(result.wasSuccessful(), result.errors)
                [(is_other, variable)] = seen
                self.assertEqual((is_other, variable != before), (is_begun, proxy))

    def test_arguments_that_intercept_does_not_have(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__

            def runTest(self):
                raise AssertionError("it was not to be run")

        threads = set(threading.enumerate())
        for value, expected in (
            ({"proxies": False}, "^TypeError: .*proxies"),
            ("no", "^ValueError: proxy: found 'no'; it takes True or False$"),
            (1, "^ValueError: proxy: found 1; it takes True or False$"),
            (("proxy",), r"^ValueError: proxy: found \('proxy',\); it takes True or False$"),
        ):
            Test.intercept = value
            result = Test().run()
            with self.subTest(value):
                [(_, words)] = result.errors
                self.assertRegex(words.splitlines()[-1], expected)
        self.assertEqual(set(threading.enumerate()) - threads, set())

    def test_an_unknown_host_fails_the_test(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__
            intercept = True

            def runTest(self):
                with self.assertRaises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen("https://unknown.example/feed.xml")
                caught.exception.close()

        result = Test().run()
        [(_, words)] = result.failures
        self.assertIn("GET https://unknown.example/feed.xml: no such host here; the folder", words)
        self.assertIn("respond('https://unknown.example/feed.xml', ...) would respond", words)

    def test_all_is_put_back_before_the_server_stops(self):
        events = []

        class Server(FeedTestServer):
            @contextlib.contextmanager
            def intercept(self):
                with super().intercept():
                    events.append("begin")
                    yield self
                events.append("end")

            def stop(self):
                events.append("stop")
                super().stop()

        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__
            server_class = Server
            intercept = True

            def setUp(self):
                pass  # the server is started on first use

            def runTest(self):
                events.append(self.server.ready)

        before = dict(os.environ)
        result = Test().run()
        self.assertTrue(result.wasSuccessful(), result.errors)
        self.assertEqual(events, ["begin", True, "end", "stop"])
        self.assertEqual(dict(os.environ), before)

    def test_what_keeps_it_from_beginning_fails_the_test_and_leaves_nothing(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__
            intercept = True

            def runTest(self):
                raise AssertionError("it was not to be run")

        threads = set(threading.enumerate())
        with mock.patch("tempfile.mkstemp", side_effect=OSError("no room")):
            result = Test().run()
        last_lines = [words.splitlines()[-1] for _, words in result.errors]
        self.assertEqual(last_lines, ["OSError: no room"])
        self.assertEqual(set(threading.enumerate()) - threads, set())


class PickledTest(FeedTestServerMixin, unittest.TestCase):
    intercept = True
    pickled = b""
    ended = False

    def note_that_it_ended(self):
        self.ended = True

    def test(self):
        with self.subTest(number=1):
            outcome, self._outcome = self._outcome, None
            self.pickled = pickle.dumps(self)
            self._outcome = outcome
        self.assertTrue(self.server.ready)


# The command line


class CommandLineTestCase(ServerTestCase):
    """Runs the command line, in this process or in one of its own."""

    def run_main(self, *arguments):
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            status = feedtestserver.main([str(argument) for argument in arguments])
        return status, out.getvalue(), err.getvalue()

    def serve_main(self, client, *arguments, out=None, stop=None):
        """Serve by the command line in this process, to a client that is called with the URL.

        When that returns, the server is stopped. Returns the status and what was printed, unless
        that went to a stream of the test's.
        """
        errors = []

        def use(url):
            try:
                client(url)
            except BaseException as error:
                errors.append(error)
            finally:
                (stop or self.stop_by_quit)(None, url)

        class Output:
            def write(self, text):
                if not threads:
                    threads.append(threading.Thread(target=use, args=[url_in(text)]))
                    threads[0].start()
                return stream.write(text)

            def __getattr__(self, name):
                return getattr(stream, name)

        threads = []
        stream = out or io.StringIO()
        with (
            contextlib.redirect_stdout(Output()),
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            arguments = [*map(str, arguments), "--port", "0"]
            status = feedtestserver.main(arguments)
        threads[0].join()
        if errors:
            raise errors[0]
        return status, None if out else stream.getvalue(), err.getvalue()

    def serve_json(self, client, *arguments, **options):
        """Serve with --json; returns the status and the objects, as pairs of a kind and a value."""
        status, out, err = self.serve_main(client, *arguments, "--json", **options)
        self.assertEqual(err, "")
        return status, self.objects(out)

    def objects(self, out):
        """The objects that were printed: one a line, the URL first, all else in its order."""
        self.assertTrue(out.isascii() and out.endswith("\n"), out)
        found = []
        for line in out.split("\n")[:-1]:
            [(kind, value)] = json.loads(line, parse_constant=self.fail).items()
            # No surrogate stands alone, so parsers of other languages take it.
            json.dumps(value, ensure_ascii=False).encode()
            found.append((kind, value))
        kinds = " ".join(kind for kind, _ in found)
        self.assertRegex(kinds, r"\Aurl( request)*( finding| error)*\Z")
        return found

    def start(self, directory, *options, script=None, arguments=()):
        """The command line in a process of its own, with options of Python; and its URL.

        A script would be compiled each time.
        """
        program = ["-m", "feedtestserver"] if script is None else [str(script)]
        process = subprocess.Popen(
            [sys.executable, *options, *program, str(directory), "--port", "0", *arguments],
            cwd=HERE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        url = url_in(process.stdout.readline())
        self.assertRegex(url, r"^http://127\.0\.0\.1:\d+/$")
        return process, url

    def stop_by_quit(self, process, url):
        stop_server(at(url).port)

    def stop_by_interrupt(self, process, url):
        process.send_signal(signal.SIGINT)

    def stop_by_termination(self, process, url):
        process.send_signal(signal.SIGTERM)

    #: On Windows, no other process can be sent one of these signals.
    SIGNALS = (stop_by_interrupt, stop_by_termination) if os.name != "nt" else ()

    def read(self, url):
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def url_in(line):
    """The URL that the command line prints first, as text or in an object."""
    return json.loads(line)["url"] if line.startswith("{") else line.strip()


def at(url):
    """What stands for the server with this URL."""
    return types.SimpleNamespace(port=int(url.rstrip("/").rpartition(":")[2]))


class CommandLineTest(CommandLineTestCase):
    def test_serves_until_told_to_stop(self):
        directory = self.make_directory({"feed.xml": b"<rss/>", "wrong.xml": b"<!-- Status: x -->"})

        script = HERE / "feedtestserver.py"
        for stop in (CommandLineTest.stop_by_quit, *self.SIGNALS):
            with self.subTest(stop.__name__):
                process, url = self.start(directory, script=script)
                script = None  # once is enough
                self.assertEqual(self.read(url + "feed.xml"), (200, b"<rss/>"))
                self.assertEqual(self.read(url + "wrong.xml")[0], 500)
                stop(self, process, url)
                out, err = process.communicate(timeout=PATIENCE)
                self.assertEqual(process.returncode, 0)
                log, findings = out.split("Python-urllib", 1)
                self.assertEqual(log, "GET /feed.xml -> 200\nGET /wrong.xml -> 500\n\n")
                self.assertRegex(findings, r"^/3\.\d+ was not polite:\n  GET /feed.xml \(1st re")
                self.assertEqual(findings.count("[no-compression]\n"), 2)
                self.assertTrue(findings.endswith("\n\nerrors: 1\n"), findings)
                self.assertEqual(err.count("\n"), 1)
                self.assertIn("Status: found 'x'", err)

    @unittest.skipUnless(CommandLineTestCase.SIGNALS, "no process can be sent a signal here")
    def test_a_signal_ends_it_at_any_moment(self):
        """Whatever clients wait for, and though more signals come while it ends."""
        files = {"feed.xml": b"<rss/>", "delay.xml": comment("Delay: 86400")}
        files.update({"stall.xml": comment("Fault: stall at headers"), "large.bin": bytes(9999999)})
        directory = self.make_directory(files)
        for stop in self.SIGNALS:
            process, url = self.start(directory)
            with self.subTest(stop.__name__), contextlib.ExitStack() as opened:
                opened.enter_context(connect(at(url))).sendall(b"GET / HT")
                for name in files:
                    connection = opened.enter_context(connect(at(url)))
                    connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    # It is printed before the first byte is sent.
                    self.assertEqual(process.stdout.readline(), f"GET /{name} -> 200\n")
                sender = threading.Thread(target=self.keep_sending, args=(stop, process, url))
                sender.start()
                try:
                    out, err = process.communicate(timeout=PATIENCE)
                finally:
                    process.kill()
                    process.wait()
                    sender.join()
                self.assertEqual((process.returncode, err), (0, ""))
                self.assertIn("[no-compression]\n", out)

    def keep_sending(self, stop, process, url):
        while process.returncode is None:
            stop(self, process, url)

    def test_main_puts_back_what_it_has_set_for_signals(self):
        def settings():
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

        def start_and_look(server):
            start(server)
            seen.extend(settings())
            hosts.append(server.host)

        seen, hosts, before, start = [], [], settings(), FeedTestServer.start
        with mock.patch.object(FeedTestServer, "start", start_and_look):
            status, out, _ = self.serve_main(
                lambda url: self.read(f"{url}none"), self.make_directory(), "--bind", "0.0.0.0"
            )
        self.assertEqual((status, out.count("GET /none -> 404\n")), (0, 1))
        self.assertEqual((settings(), hosts), (before, ["0.0.0.0"]))
        for inside, outside in zip(seen, before):
            self.assertNotEqual(inside, outside)

    def test_main_leaves_no_thread(self):
        threads = set(threading.enumerate())
        self.serve_main(self.read, self.make_directory())
        self.assertEqual(set(threading.enumerate()), threads)

    def test_judges_each_client_by_its_name(self):
        def client(url):
            for name in ("reader (1 user)", "other/1", "reader (20 user)", "x" * 999, None):
                fields = {**POLITE, "User-Agent": name} if name else {"Accept": "*/*"}
                lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
                # What cannot be read is nobody's.
                sent = f"GET /feed.xml HTTP/1.1\r\nHost: a\r\n{lines}\r\nnonsense\r\n\r\n"
                exchange(at(url), sent.encode())

        directory = self.make_directory({"feed.xml": comment('Header: ETag: "v1"')})
        _, out, _ = self.serve_main(client, directory)
        log, first, *others, nameless = out.split("\n\n")
        self.assertEqual(log.count("\nGET /feed.xml -> 200\n(unreadable) -> 400"), 5)
        self.assertRegex(
            first, r"^reader \(1 user\) was not polite:\n.*\(2nd request\): neither .*\]$"
        )
        self.assertEqual(others, ["other/1 was polite", f"{'x' * 200} was polite"])
        self.assertRegex(nameless, r"^a client without a name was not polite:\n(.*\]\n){2}$")

    def test_goes_on_where_nobody_reads_what_it_prints(self):
        """Whether or not Python keeps what it prints in a buffer."""
        directory = self.make_directory({"feed.xml": b"<rss/>", "wrong.xml": b"<!-- Status: x -->"})
        stop = self.SIGNALS[-1] if self.SIGNALS else CommandLineTest.stop_by_quit
        for options, closed, arguments in (
            ((), "stdout", []),
            (("-u",), "stderr", []),
            (("-u",), "both", ["--json", "--strict"]),
        ):
            with self.subTest(options, closed=closed):
                process, url = self.start(directory, *options, arguments=arguments)
                for name in ("stdout", "stderr"):
                    if closed in (name, "both"):
                        getattr(process, name).close()
                for path, status in (("feed.xml", 200), ("wrong.xml", 500), ("feed.xml", 200)):
                    self.assertEqual(self.read(url + path)[0], status)
                stop(self, process, url)
                self.assertEqual(process.wait(PATIENCE), 1 if arguments else 0)
                if closed == "stdout":
                    self.assertRegex(process.stderr.read(), "^.*Status: found 'x'.*\n$")
                elif closed == "stderr":
                    self.assertIn("GET /feed.xml -> 200\n\nPython", process.stdout.read())

    def test_serves_and_ends_though_nobody_reads_its_full_pipe(self):
        """It waits a while for that at its end, which this copy of the module does not."""
        patient = re.compile(r"^_PATIENCE = 5\.0$", re.MULTILINE)
        copied, changes = patient.subn("_PATIENCE = 0.0", SOURCE)
        self.assertEqual(changes, 1)
        script = self.make_directory({"feedtestserver.py": copied.encode()}) / "feedtestserver.py"
        directory = self.make_directory({"feed.xml": b"<rss/>"})
        process, url = self.start(directory, script=script, arguments=["--json", "--strict"])
        line = f"GET /feed.xml?{'x' * 1000} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        with connect(at(url)) as connection:
            for _ in range(3):
                connection.sendall(line * 100)
                received = b""
                while received.count(b"<rss/>") < 100:
                    received += connection.recv(65536)
        (self.SIGNALS[-1] if self.SIGNALS else CommandLineTest.stop_by_quit)(self, process, url)
        self.assertEqual(process.wait(PATIENCE), 1)
        self.assertEqual(process.stderr.read(), "")

    def test_prints_what_the_stream_can_encode(self):
        directory = self.make_directory({"caf\u00e9.xml": comment("Status: \u20ac")})
        for encoding, shown in (
            ("ascii", b"caf\\xe9"),
            ("latin-1", b"caf\xe9"),
            ("utf-8", "caf\u00e9"),
        ):
            stream = io.TextIOWrapper(io.BytesIO(), encoding, newline="")
            with self.subTest(encoding), contextlib.redirect_stdout(stream):
                self.assertEqual(feedtestserver.main(["--check", str(directory)]), 1)
                shown = shown if isinstance(shown, bytes) else shown.encode()
                self.assertIn(shown + b".xml, line 2: Status: ", stream.buffer.getvalue())

    def test_prints_nothing_where_there_is_nowhere_to(self):
        """As under pythonw."""
        directory = self.make_directory({"feed.xml": comment("Status: x")})
        with mock.patch.multiple(sys, stdout=None, stderr=None):
            self.assertEqual(feedtestserver.main(["--check", str(directory)]), 1)
            self.assertEqual(feedtestserver.main(["--check", str(directory / "none")]), 1)

    def test_prints_nothing_that_a_terminal_obeys(self):
        def client(url):
            begin = b"GET /\x9b31m\xe9\xa0 HTTP/1.1\r\nHost: a\r\n"
            exchange(at(url), begin, b"Connection: close\r\nUser-Agent: reader\x9b31m\r\n\r\n")

        _, out, _ = self.serve_main(client, self.make_directory())
        self.assertIn("GET /\\x9b31m\xe9\xa0 -> 404\n", out)
        self.assertIn("\nreader\\x9b31m was not polite:\n", out)

    def test_prints_names_of_files_that_a_terminal_would_obey(self):
        name = "a\x1b[2J\x7f\u202e\t\u3000caf\u00e9.xml"
        try:
            directory = self.make_directory({name: comment("Status: x")})
        except OSError as error:
            self.skipTest(f"no file is called {name!a} here: {error}")
        _, out, _ = self.run_main("--check", directory)
        self.assertIn("a\\x1b[2J\\x7f\\u202e\t\u3000caf\u00e9.xml, line 2: Status: ", out)

    def test_lists_the_fixtures(self):
        directory = self.make_directory(
            {
                "<b>.xml": comment('Header: ETag: "<v1>"', "Description: \u00fcber <all>"),
                "gone.xml": comment("Status: 410"),
                "sub/x y.xml": b"<x/>",
                "latin-1.xml": b"<!--\nHeader: X: Z\xfcrich\nDescription: G\xf6teborg\n-->",
                "wrong.xml": comment("Status: <x>"),
                "life.xml": comment("Next: gone.xml after 2"),
                "slow.xml": comment(
                    *("Delay: 2", "Rate: 10", "Pause: 2 at 50%", "Pause: .5 at headers"),
                    *("Fault: reset at 50%", "Chunked: 9", "Early: yes"),
                ),
                "odd.asis": b"HTTP/1.1 299 Odd\r\n\r\n",
                "reset.xml": comment("Fault: reset"),
            }
        )
        odd = ("none/", "su*/", "[/", "**/", "../", "/", "./", "sub//", "x/" * 3000)
        pages = {}

        def client(url):
            for path in ("", "sub/", *odd, "gone.xml/", "%2e%2e/", "x" * 300 + "/"):
                pages[path] = self.get(at(url), f"/{path}")

        self.serve_main(client, directory)
        response, below, *others = pages.values()
        self.assertEqual({other.status for other in others}, {404})
        page = response.content.decode()
        self.assertEqual(response.headers["Content-Type"], "text/html; charset=utf-8")
        for text in (
            "<a href='/%3Cb%3E.xml'>&lt;b&gt;.xml</a> -> 200 OK\n",
            '<meta name="referrer" content="no-referrer">',
            "\n      \u00fcber &lt;all&gt;\n      ETag: &quot;&lt;v1&gt;&quot;\n",
            "<a href='/gone.xml'>gone.xml</a> -> 410 Gone\n",
            "\n      G\u00f6teborg\n      X: Z\u00fcrich\n",
            "<a href='/sub/x%20y.xml'>sub/x y.xml</a> -> 200 OK\n",
            "Status: found &#x27;&lt;x&gt;&#x27;",
            "\n      Content-Type: application/xml\n",
            "\n      Delay: 2\n      Pause: 2 at 50%\n      Pause: .5 at headers\n",
            "\n      Rate: 10\n      Fault: reset at 50%\n      Early: yes\n",
            "\n      Transfer-Encoding: chunked\n",
            "odd.asis</a> -> 299\n      as it is\n",
            "\n      Next: gone.xml after 2\n",
            "reset.xml</a> -> 200 OK\n",
        ):
            with self.subTest(text):
                self.assertIn(text, page)
        self.assertIn("<title>Fixtures in /</title>", page)
        self.assertRegex(page, "wrong.xml</a> -> 500\n      .*line 2: Status")
        for text in ("Server: ", "Date: "):
            self.assertNotIn(text, page)
        self.assertIn("sub/x y.xml", below.content.decode())
        self.assertNotIn("gone.xml", below.content.decode())

    def test_an_index_comes_before_the_list(self):
        def client(url):
            self.assertEqual(self.read(url), (200, b"<p>"))

        self.serve_main(client, self.make_directory({"index.html": b"<p>"}))

    def test_check(self):
        directory = self.make_directory({"a.xml": comment("Status: 404"), "b/c.xml": b"<x/>"})
        self.assertEqual(self.run_main("--check", directory), (0, "fixtures: 2, errors: 0\n", ""))
        (directory / "b" / "d.xml").write_bytes(comment("A: 1", "Stauts: 404", "Vary: *"))
        (directory / "e.json").write_bytes(b"{}")
        (directory / "e.json.headers").write_bytes(b"Status: 1\n\nWithout: a b\n")
        (directory / "f.json.headers").write_bytes(b"Status: 1\n")
        (directory / "f.xml").write_bytes(b"<!-- Delay: x -->\n<!-- Rate: x -->")
        (directory / ".hidden.xml").write_bytes(b"")
        (directory / "b" / ".headers").write_bytes(b"")
        (directory / "g.HEADERS").write_bytes(b"")

        def at(*names):
            return legible(directory.joinpath(*names))

        def wrong(directive):
            with self.assertRaises(DirectiveError) as caught:
                parse_directives(f"<!-- {directive} -->".encode())
            return f"{caught.exception}".removeprefix("line 1: ")

        typo = "found the key 'Stauts'; the directive is Status"
        pasted = "found 'Vary: *'; a response field is written 'Header: Vary: *'"
        status, out, _ = self.run_main("--check", directory)
        self.assertEqual(status, 1)
        self.assertEqual(
            out.splitlines(),
            [
                f"{at('b', '.headers')}: there is no {at('b')}{os.sep} beside it",
                f"{at('b', 'd.xml')}, line 3: {typo}",
                f"{at('b', 'd.xml')}, line 4: {pasted}",
                f"{at('e.json.headers')}, line 1: {wrong('Status: 1')}",
                f"{at('e.json.headers')}, line 3: {wrong('Without: a b')}",
                f"{at('f.json.headers')}: there is no {at('f.json')} beside it",
                f"{at('f.json.headers')}, line 1: {wrong('Status: 1')}",
                f"{at('f.xml')}, line 1: {wrong('Delay: x')}",
                f"{at('f.xml')}, line 2: {wrong('Rate: x')}",
                f"{at('g.HEADERS')}: there is no {at('g')} beside it",
                "fixtures: 6, errors: 10",
            ],
        )

    def test_data_is_right(self):
        status, out, _ = self.run_main("--check", HERE / "data")
        self.assertEqual(status, 0, out)

    def test_bad_input(self):
        new = self.make_directory() / "none"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for arguments, words in (
                ((HERE / "none",), f"there is no such directory to serve: {str(HERE / 'none')!r}"),
                (("--check", HERE / "none"), f"no such directory to serve: {str(HERE / 'none')!r}"),
                ((HERE, "--port", 99999), "port: found 99999; it takes"),
                (("--record", "file:///etc/hosts", new), "it takes one of http or https"),
                ((HERE, "--port", port), f"cannot bind 127.0.0.1:{port}: "),
                (("--record", "http://127.0.0.1:1/", HERE / "README.rst"), "exists: "),
                (("--record", f"http://127.0.0.1:{port}x/", new), f"found '127.0.0.1:{port}x'"),
                (("--record", "feed.xml", new), "found the URL 'feed.xml'; it takes one"),
                (("--record", f"http://a:b@127.0.0.1:{port}/", new), "without a user"),
            ):
                with self.subTest(arguments):
                    status, out, err = self.run_main(*arguments)
                    self.assertEqual((status, out), (1, ""))
                    self.assertIn(words, err)
                    self.assertEqual(err.count("\n"), 1)

    def test_ca_is_written_before_the_url_is_printed(self):
        directory = self.make_directory({"feed.xml": b"<rss/>"})
        file = directory / "ca.pem"

        def client(url):
            url = f"https{url[4:]}feed.xml"
            context = ssl.create_default_context(cafile=str(file))
            with urllib.request.urlopen(url, timeout=PATIENCE, context=context) as response:
                self.assertEqual(response.read(), b"<rss/>")

        _, out, _ = self.serve_main(client, directory, "--ca", file)
        self.assertIn("\nGET /feed.xml -> 200\n", out)
        status, out, err = self.run_main(directory, "--port", 0, "--ca", directory)
        self.assertEqual((status, out, err.count("\n")), (1, "", 1))

    def test_ca_is_not_written_where_the_port_is_taken(self):
        file = self.make_directory({"ca.pem": b"of the other server"}) / "ca.pem"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            status, _, err = self.run_main(file.parent, "--port", port, "--ca", file)
        self.assertEqual(status, 1)
        self.assertIn("cannot bind", err)
        self.assertEqual(file.read_bytes(), b"of the other server")

    def test_ca_without_a_name_is_an_error(self):
        ended = run("-m", "feedtestserver", self.make_directory(), "--port", "0", "--ca", "")
        self.assertEqual((ended.returncode, ended.stdout, ended.stderr.count("\n")), (1, "", 1))

    def test_help_tells_the_defaults(self):
        with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit):
            feedtestserver.main(["--help"])
        defaults = "default: data", "default: 8000", "default: 127.0.0.1"
        for text in (*defaults, "--json", "--strict", "--every"):
            self.assertIn(text, " ".join(out.getvalue().split()))

    def test_readme_lists_the_options(self):
        with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit):
            feedtestserver.main(["--help"])
        known = set(re.findall(r"(?m)^  (?:-h, )?(--[a-z]+)", out.getvalue()))
        listed = re.findall(r"(?m)^``(--[a-z]+).*`` ", README)
        self.assertEqual(sorted(listed), sorted(known - {"--help", "--version"}))

    def test_readme_shows_what_is_printed_as_json(self):
        """By the requests that it shows, to the fixtures of the example that follows."""
        [shown] = [block for block in blocks(README) if block.startswith('{"url": ')]
        [files] = [files for files in readme_examples() if "check_reader.sh" in files]
        directory = self.make_directory({name: text.encode() for name, text in files.items()})
        # Lines are broken between the tokens of JSON.
        shown = [json.loads(text) for text in re.split(r"\n(?={)", shown)]

        def client(url):
            for request in (each["request"] for each in shown if "request" in each):
                target = urllib.parse.urlsplit(request["url"]).path
                lines = [f"{request['method']} {target} HTTP/1.0"]
                lines += [f"{name}: {value}" for name, value in request["headers"]]
                text = "\r\n".join([*lines, "", request["body"]])
                exchange(at(url), text.replace("127.0.0.1:8000", url.split("/")[2]).encode())

        status, out, err = self.serve_main(client, directory / "data", "--json")
        host = url_in(out.splitlines()[0]).split("/")[2]
        said = [*map(json.loads, out.replace(host, "127.0.0.1:8000").splitlines())]
        for each in (*shown, *said):
            each.get("request", {}).pop("time", None)
        self.assertEqual((said, err, status), (shown, "", 0))

    def test_version(self):
        with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit) as end:
            feedtestserver.main(["--version"])
        self.assertEqual(out.getvalue().split(), ["feedtestserver", feedtestserver.__version__])
        self.assertEqual(end.exception.code, 0)

    def test_record(self):
        body = gzip.compress(b"<rss/>")
        server = self.serve()
        server.respond("/moved", Response(status=302, headers={"Location": "/feed.xml"}))
        server.respond(
            "/feed.xml",
            Response(
                body,
                200,
                reason="Fine",
                headers=[
                    ("Content-Type", "application/rss+xml"),
                    ("Content-Encoding", "gzip"),
                    ("ETag", '"v1"'),
                    ("X-Name", "caf\u00e9"),
                    ("X-Blank", ""),
                    ("X-Blanks", '"a  b" voil\u00e0 l\u00e0'),
                    ("Set-Cookie", "a=1"),
                    ("Authentication-Info", "secret"),
                    ("Connection", "close, X-Hop"),
                    ("X-Hop", "1"),
                    ("Keep-Alive", "5"),
                    ("X-Twice", "1"),
                    ("X-Twice", "2"),
                ],
            ),
        )
        name = self.make_directory() / "live.xml"
        status, out, _ = self.run_main("--record", server.get_url("/moved"), name)
        self.assertEqual(status, 0)
        expected = f"{server.get_url('/feed.xml')}: 200, {len(body)} bytes in {legible(name)}\n"
        self.assertEqual(out, expected)
        agent = server.requests[0].headers["User-Agent"]
        self.assertEqual(agent, f"feedtestserver/{feedtestserver.__version__}")
        self.assertEqual(name.read_bytes(), body)
        self.assertEqual(
            name.with_name("live.xml.headers").read_bytes(),
            b"Status: 200 Fine\n"
            b"Header: Content-Type: application/rss+xml\nHeader: Content-Encoding: gzip\n"
            b'Header: ETag: "v1"\nHeader: X-Name: caf\xc3\xa9\nHeader: X-Blank:\n'
            b'Header: X-Blanks: "a  b" voil\xc3\xa0 l\xc3\xa0\n'
            b"Header: X-Twice: 1\nHeader: X-Twice: 2\nHeader: Server: %s\n"
            % self.get(server, "/feed.xml").headers["Server"].encode(),
        )
        again = self.serve({path.name: path.read_bytes() for path in name.parent.iterdir()})
        response = self.get(again, "/live.xml")
        self.assertEqual((response.reason, response.content), ("Fine", body))
        self.assertEqual(response.headers.get_all("X-Twice"), ["1", "2"])

    def test_record_of_urls_that_urllib_does_not_take_as_they_are(self):
        server = self.serve()
        server.respond("/caf\u00e9.xml", b"<rss/>")
        base = f"127.0.0.1:{server.port}"
        for url in (f"HTTP://{base}/caf%C3%A9.xml", f"http://{base}/caf\u00e9.xml"):
            name = self.make_directory() / "live.xml"
            with self.subTest(url):
                status, _, err = self.run_main("--record", url, name)
                self.assertEqual((status, err, name.read_bytes()), (0, "", b"<rss/>"))
                self.assertEqual(server.requests[-1].target, "/caf%C3%A9.xml")

    def test_record_keeps_errors_of_the_origin_too(self):
        server = self.serve({"gone.xml": comment("Status: 410")})
        name = self.make_directory() / "gone.xml"
        self.assertEqual(self.run_main("--record", server.get_url("gone.xml"), name)[0], 0)
        self.assertEqual(
            parse_directives(b"<!--\n" + name.with_name("gone.xml.headers").read_bytes() + b"-->")[
                "Status"
            ],
            "410 Gone",
        )

    def test_record_of_what_no_fixture_says(self):
        names = (
            *("Authentication-Info", "Authorization", "Connection", "Content-Length", "Date"),
            *("Keep-Alive", "Proxy-Authenticate", "Proxy-Authentication-Info", "Set-Cookie", "TE"),
            *("Proxy-Authorization", "Proxy-Connection", "Set-Cookie2", "Status", "Trailer"),
            *("Transfer-Encoding", "Upgrade"),
        )
        left_out = "".join(f"{name}: close\r\n" for name in names)
        for head, expected in (
            (f"200 OK\r\n{left_out}X: a\r\n\tb\r\n", b"Status: 200 OK\nHeader: X: a b\n"),
            ("999 \r\n", None),
            ("200 OK\r\nX: a\x0bb\r\n", None),
            ('200 OK\r\nX Y: a\r\nETag: "v1"\r\n', None),
        ):
            server = self.serve({"odd.asis": f"HTTP/1.1 {head}\r\n".encode()})
            name = self.make_directory() / "odd.xml"
            with self.subTest(head):
                status, _, err = self.run_main("--record", server.get_url("odd.asis"), name)
                self.assertEqual((status, err.count("\n")), (0, 0) if expected else (1, 1))
                if expected:
                    self.assertEqual(name.with_name("odd.xml.headers").read_bytes(), expected)
                else:
                    self.assertEqual(list(name.parent.iterdir()), [])

    def test_record_of_redirects_that_are_not_followed(self):
        for location, words in (("/feed.xml", "infinite loop"), ("file:///x", "file:///x")):
            feed = comment("Status: 302", f"Header: Location: {location}")
            server = self.serve({"feed.xml": feed})
            name = self.make_directory() / "feed.xml"
            with self.subTest(location):
                status, _, err = self.run_main("--record", server.get_url("feed.xml"), name)
                self.assertEqual((status, list(name.parent.iterdir())), (1, []))
                self.assertIn(words, err)

    def test_record_sends_no_request_where_it_cannot_write(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        for name, kept in (
            ("none/feed.xml", "feed.xml"),
            ("file/feed.xml", "feed.xml"),
            ("file", "file"),
            ("lonely", "lonely.headers"),
            ("folder", "folder"),
            ("x" * 250, ".headers"),  # with the sidecar's ending it is too long
        ):
            directory = self.make_directory({"file": b"mine", "lonely.headers": b"mine"})
            (directory / "folder").mkdir()
            before = sorted(directory.rglob("*"))
            with self.subTest(name):
                url = server.get_url("feed.xml")
                status, out, err = self.run_main("--record", url, directory / name)
                self.assertEqual((status, out, err.count("\n")), (1, "", 1))
                self.assertIn(f"{kept}'", err)
                self.assertEqual(sorted(directory.rglob("*")), before)
                self.assertEqual((directory / "file").read_bytes(), b"mine")
        self.assertEqual(server.requests, [])

    def test_record_leaves_nothing_where_the_response_is_cut(self):
        server = self.serve()
        server.respond("/", Response(b"abc", headers={"Content-Length": "10"}))
        name = self.make_directory() / "cut.xml"
        status, _, err = self.run_main("--record", server.get_url("/"), name)
        self.assertEqual((status, list(name.parent.iterdir())), (1, []))
        self.assertIn("IncompleteRead", err)


class JsonTest(CommandLineTestCase):
    """What --json prints, --strict says by the status, and --every judges."""

    def send_polite(self, url, path="feed.xml", **fields):
        return self.get(at(url), f"/{path}", headers={**POLITE, **fields})

    def test_tells_each_request_as_it_was_sent(self):
        body = 'caf\u00e9 "\\n'.encode() + b"\xff\x00\n"
        first = b"Host: a.example\r\nX-One: 1\r\naccept: */*\r\nX-ONE:  2 \r\nX-Blank:\r\n"
        last = b"Host: a.example\r\nContent-Length: %d\r\nConnection: close\r\n" % len(body)

        def client(url):
            exchange(
                at(url),
                b"GET /feed.xml?a=%%20b HTTP/1.1\r\n%b\r\n" % first,
                b"POST /feed.xml HTTP/1.1\r\n%b\r\n%b" % (last, body),
            )
            exchange(at(url), b"HEAD /none HTTP/1.0\r\n\r\n")
            urls.append(url)

        urls = []
        status, printed = self.serve_json(client, self.make_directory({"feed.xml": b"<rss/>"}))
        self.assertEqual((status, printed[0]), (0, ("url", *urls)))
        requests = [value for kind, value in printed if kind == "request"]
        for request in requests:
            self.assertGreater(request.pop("time"), NOW)
        one, same, other = [request.pop("connection") for request in requests]
        self.assertEqual(same, one)
        self.assertNotEqual(other, one)
        self.assertEqual(
            requests,
            [
                {
                    "method": "GET",
                    "url": "http://a.example/feed.xml?a=%20b",
                    "headers": [
                        ["Host", "a.example"],
                        ["X-One", "1"],
                        ["accept", "*/*"],
                        ["X-ONE", "2"],
                        ["X-Blank", ""],
                    ],
                    "body": "",
                    "status": 200,
                },
                {
                    "method": "POST",
                    "url": "http://a.example/feed.xml",
                    "headers": [
                        ["Host", "a.example"],
                        ["Content-Length", f"{len(body)}"],
                        ["Connection", "close"],
                    ],
                    "body": 'caf\u00e9 "\\n\\xff\x00\n',
                    "status": 405,
                },
                {
                    "method": "HEAD",
                    "url": f"{urls[0]}none",
                    "headers": [],
                    "body": "",
                    "status": 404,
                },
            ],
        )

    def test_tells_what_it_refused(self):
        def client(url):
            for data in (
                b"nonsense\r\n\r\n",
                b"\x00\xff\r\n\r\n",
                b"GET /a HTTP/1.1\r\nHost: b\r\nX : 1\r\n\r\n",
                b"GET /a HTTP/2.0\r\nHost: b\r\n\r\n",
                b"\x16\x03\x01\x00\x05hello",  # a handshake that fails is no request
            ):
                exchange(at(url), data)

        status, printed = self.serve_json(client, self.make_directory(), "--strict")
        seen = [(each["method"], each["url"], each["status"]) for _, each in printed[1:]]
        unreadable = ("", "", 400)
        self.assertEqual(status, 0)
        self.assertEqual(seen[:3], [unreadable, unreadable, ("GET", "http://b/a", 400)])
        self.assertEqual([status for *_, status in seen[3:]], [505])

    def test_a_fault_before_the_status_line_leaves_no_status(self):
        files = {
            "reset.xml": comment("Fault: reset"),
            "close.xml": comment("Status: 503", "Fault: close at start"),
            "headers.xml": comment("Status: 503", "Fault: close at headers"),
            "odd.asis": b"HTTP/1.1 299 Odd\r\n\r\n",
        }

        def client(url):
            for name in files:
                with connect(at(url)) as connection:
                    connection.sendall(f"GET /{name} HTTP/1.0\r\n\r\n".encode())
                    read_to_the_end(connection)

        _, printed = self.serve_json(client, self.make_directory(files))
        seen = [value["status"] for kind, value in printed if kind == "request"]
        self.assertEqual(seen, [None, None, 503, 299])

    def test_fields_and_bodies_of_any_bytes(self):
        long = "x" * 3000

        def client(url):
            exchange(
                at(url),
                b"GET /\xff\xc3\xa9?\xff HTTP/1.1\r\nHost: a\r\nConnection: close\r\n",
                b"Latin-1: caf\xe9\r\nUTF-8: caf\xc3\xa9\r\nUser-Agent: \x80<\"'\\\r\n",
                b"Accept: %b\r\nAccept-Encoding: gzip\r\n\r\n" % long.encode(),
            )

        stream = io.TextIOWrapper(io.BytesIO(), "ascii", newline="")
        directory = self.make_directory()
        status, _, err = self.serve_main(client, directory, "--json", out=stream)
        self.assertEqual((status, err), (0, ""))
        _, (_, request), *findings = self.objects(stream.buffer.getvalue().decode())
        headers = dict(request["headers"])
        self.assertEqual((headers["UTF-8"], headers["Latin-1"]), ("caf\u00e9", "caf\\xe9"))
        self.assertEqual(headers["Accept"], long)
        self.assertEqual([value["rule"] for _, value in findings], ["no-feed-type"])
        self.assertEqual(findings[0][1]["client"], "\\x80<\"'\\")

    def test_tells_findings_of_each_client_and_errors_at_the_end(self):
        files = {"feed.xml": comment('Header: ETag: "v1"'), "wrong.xml": b"<!-- Status: x -->"}
        directory = self.make_directory(files)

        def client(url):
            self.assertEqual(self.send_polite(url, "wrong.xml").status, 500)
            for name in ("reader (1 user)", "other/1", *("reader (20 users)",) * 7):
                self.send_polite(url, **{"User-Agent": name.replace("users", "user")})
            self.get(at(url), "/none", headers={"Accept": "*/*"})
            urls.append(url)

        urls = []
        status, printed = self.serve_json(client, directory)
        findings = [value for kind, value in printed if kind == "finding"]
        errors = [value for kind, value in printed if kind == "error"]
        self.assertEqual((status, len(printed)), (0, 1 + 11 + len(findings) + len(errors)))
        self.assertEqual(
            [(finding["client"], finding["rule"]) for finding in findings],
            [
                *[("reader (1 user)", "no-validator")] * 7,
                ("a client without a name", "no-user-agent"),
                ("a client without a name", "no-compression"),
            ][: len(findings)],
        )
        self.assertEqual(set(findings[0]), {"client", "rule", "text", "url"})
        said = [finding["text"].partition(":")[0] for finding in findings]
        ordinals = ["2nd", "3rd", "4th", "5th", "6th", "7th", "8th"]
        self.assertEqual(said[:7], [f"GET /feed.xml ({each} request)" for each in ordinals])
        self.assertEqual({finding["url"] for finding in findings[:7]}, {f"{urls[0]}feed.xml"})
        self.assertEqual(findings[-1]["url"], f"{urls[0]}none")
        [error] = errors
        self.assertIn(f"{legible(directory / 'wrong.xml')}, line 1: Status: found 'x'", error)

    def test_findings_come_in_the_order_of_the_requests(self):
        """Only the end of the first response shows that the client had asked twice at once."""
        files = {"large.xml": b" " * 8_000_000, "gone.xml": comment("Status: 410")}
        lines = "".join(f"{name}: {value}\r\n" for name, value in POLITE.items())
        sent = f"GET /large.xml HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}\r\n".encode()

        def client(url):
            with connect(at(url)) as first, connect(at(url)) as second:
                for connection in (first, second):
                    connection.sendall(sent)
                    self.assertIn(b" 200 ", connection.recv(100))
                for _ in range(2):
                    self.send_polite(url, "gone.xml")
                for connection in (first, second):
                    while connection.recv(1 << 20):
                        pass

        _, printed = self.serve_json(client, self.make_directory(files))
        rules = [value["rule"] for kind, value in printed if kind == "finding"]
        self.assertEqual(rules, ["repeated", "gone"])

    def test_the_sentences_are_those_of_the_text(self):
        def client(url):
            self.get(at(url), "/feed.xml", headers={"User-Agent": "reader/1"})
            self.get(at(url), "/feed.xml", headers={"Cookie": "a=1"})

        directory = self.make_directory({"feed.xml": b"<rss/>"})
        _, text, _ = self.serve_main(client, directory)
        _, printed = self.serve_json(client, directory)
        told = [f"  {each['text']} [{each['rule']}]" for kind, each in printed if kind == "finding"]
        said = [line for line in text.splitlines() if line.startswith("  ")]
        self.assertGreater(len(said), 3)
        self.assertEqual(sorted(told), sorted(said))

    def test_ends_with_status_0_however_it_is_told_to(self):
        """Windows has no SIGTERM that comes from outside."""

        def interrupt(process, url):
            _thread.interrupt_main()

        def terminate(process, url):
            os.kill(os.getpid(), signal.SIGTERM)

        directory = self.make_directory({"feed.xml": b"<rss/>"})
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self.addCleanup(signal.signal, signal.SIGTERM, handler)
        for stop in (self.stop_by_quit, interrupt, *((terminate,) if os.name != "nt" else ())):
            with self.subTest(stop.__name__):
                get = functools.partial(self.send_polite, Accept="text/html")
                status, printed = self.serve_json(get, directory, stop=stop)
                kinds = [kind for kind, _ in printed]
                self.assertEqual((status, kinds), (0, ["url", "request", "finding"]))

    def test_a_line_is_there_at_once(self):
        """In a process, whose output is kept in a buffer unless it is flushed."""
        directory = self.make_directory({"feed.xml": comment("Fault: stall at headers")})
        process, url = self.start(directory, arguments=["--json", "--strict"])
        with connect(at(url)) as connection:
            connection.sendall(b"GET /feed.xml HTTP/1.0\r\n\r\n")
            line = process.stdout.readline()
            self.assertEqual(json.loads(line)["request"]["url"], f"{url}feed.xml")
            (self.SIGNALS[-1] if self.SIGNALS else CommandLineTest.stop_by_quit)(self, process, url)
            out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, err), (1, ""))
        self.assertEqual(
            {kind for line in out.splitlines() for kind in json.loads(line)}, {"finding"}
        )

    def test_goes_on_where_nobody_reads_what_it_prints(self):
        """What it would have said of the client, its status says."""
        directory = self.make_directory({"feed.xml": b"<rss/>", "wrong.xml": b"<!-- Status: x -->"})
        for fields, path, options, expected in (
            ({}, "feed.xml", ["--json", "--strict"], 1),
            ({}, "feed.xml", ["--strict"], 1),
            (POLITE, "wrong.xml", ["--json", "--strict"], 1),
            (POLITE, "feed.xml", ["--json", "--strict"], 0),
            ({}, "feed.xml", ["--json"], 0),
        ):
            reading, writing = os.pipe()
            with (
                self.subTest(path, fields=fields, options=options),
                os.fdopen(reading) as reader,
                os.fdopen(writing, "w") as out,
            ):

                def client(url, reader=reader, fields=fields, path=path):
                    reader.close()
                    for _ in range(3):
                        self.get(at(url), f"/{path}", headers=fields)

                status, _, _ = self.serve_main(client, directory, *options, out=out)
                self.assertEqual(status, expected)

    def test_strict_tells_findings_and_errors_by_the_status(self):
        directory = self.make_directory({"feed.xml": b"<rss/>", "wrong.xml": b"<!-- Status: x -->"})
        for path, fields, expected in (
            ("feed.xml", POLITE, 0),
            ("feed.xml", {}, 1),
            ("wrong.xml", POLITE, 1),
            ("none", POLITE, 0),
            ("", {}, 0),  # the page lists what is wrong with a fixture, which nobody has asked for
            (None, {}, 0),
        ):

            def client(url, path=path, fields=fields):
                if path is None:
                    exchange(at(url), b"nonsense\r\n\r\n")
                else:
                    self.get(at(url), f"/{path}", headers=fields)

            for options in ([], ["--json"]):
                with self.subTest(path, fields=fields, options=options):
                    status, _, _ = self.serve_main(client, directory, *options, "--strict")
                    self.assertEqual(status, expected)
                    self.assertEqual(self.serve_main(client, directory, *options)[0], 0)

    def test_every_says_how_often_a_client_may_ask(self):
        def client(url):
            self.send_polite(url)
            self.send_polite(url, **{"If-None-Match": '"v1"'})

        directory = self.make_directory({"feed.xml": comment('Header: ETag: "v1"')})
        status, printed = self.serve_json(client, directory, "--strict", "--every", "3600")
        self.assertEqual((status, [kind for kind, _ in printed][3:]), (1, ["finding"]))
        self.assertEqual(printed[3][1]["rule"], "too-often")
        status, text, _ = self.serve_main(client, directory, "--strict", "--every", "3600")
        self.assertEqual((status, text.count(" [too-often]\n")), (1, 1))
        self.assertEqual(self.serve_main(client, directory, "--strict")[0], 0)

    def test_every_takes_a_positive_number(self):
        directory = self.make_directory()
        for value in ("0", "-1", "nan", "inf", "-inf", "1e999", "x", ""):
            with (
                self.subTest(value),
                contextlib.redirect_stdout(io.StringIO()) as out,
                contextlib.redirect_stderr(io.StringIO()) as err,
            ):
                try:
                    arguments = [str(directory), "--port", "0", "--json", f"--every={value}"]
                    status = feedtestserver.main(arguments)
                except SystemExit as end:
                    status = end.code
                self.assertNotIn(status, (0, None))
                self.assertEqual(out.getvalue(), "")
                self.assertRegex(err.getvalue(), "every.*positive number of seconds")
                self.assertIn(value, err.getvalue())


class Page(html.parser.HTMLParser):
    """A page as a browser has it: its elements, their attributes, and its text."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.attributes, self.texts = [], [], []
        self.feed(content.decode())
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data):
        if self.elements[-1:] not in (["script"], ["style"]):
            self.texts.append(data)


class PageTest(CommandLineTestCase):
    """The page at /, which shows what there is, what came in, and what was wrong with it."""

    #: What a client may send in place of a name, a target or a field's value.
    NASTY = (
        b"<script>alert(1)</script>",
        b"\"'><img/src=x/onerror=alert(1)>",
        b"]]>&lt;--></td></table></style></title>",
        b"{title}{0}%s%(a)s\\1\\x41",
        b"\xff\xfe\xc3\xa9\xe2\x80\xae\xed\xa0\x80",
        b"\x80\x9b31m\x85\xa0",
        b"\x01\x1b[2J\x7f\x0b\x0c",
        b"x" * 5000,
    )

    def page(self, url, path=""):
        status, content = self.read(url + path)
        self.assertEqual(status, 200)
        return Page(content)

    def ask_by_hand(self, url, line, fields=b"", host=b"a"):
        begin = b"%b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n" % (line, host)
        return exchange(at(url), begin, fields, b"\r\n")

    def assert_in_order(self, texts, whole):
        """Each text is in the whole, after the one before."""
        position = 0
        for text in texts:
            self.assertIn(text, whole[position:])
            position = whole.index(text, position) + len(text)

    def test_shows_what_came_in(self):
        def client(url):
            before.append(self.page(url).text)
            for method, target, name in (
                ("GET", "/feed.xml?1", "first/1"),
                ("HEAD", "/none", "second/2"),
                ("GET", "http://other.example/x", "third/3"),
            ):
                self.get(at(url), target, method, headers={**POLITE, "User-Agent": name})
            after.append(self.page(url).text)

        before, after = [], []
        self.serve_main(client, self.make_directory({"feed.xml": comment("Status: 299 Odd")}))
        for text in (*before, *after):
            self.assertIn("feed.xml -> 299 Odd ", text)
        self.assertNotIn("GET", before[0])
        self.assertIn("The server got no request.", before[0])
        self.assertNotIn("got no request", after[0])
        shown = after[0]
        for method, target, status, name in (
            ("GET", "/feed.xml?1", "299", "first/1"),
            ("HEAD", "/none", "404", "second/2"),
        ):
            with self.subTest(target):
                self.assertRegex(shown, rf"{method}\W+{re.escape(target)}\W+{status}\b.*{name}")
        self.assert_in_order(("other.example/x", "HEAD", "/none", "/feed.xml?1"), shown)

    def test_its_own_requests_are_not_judged(self):
        """Browsers send them with cookies and a Referer, and refuse what they like.

        They are printed, but neither judged nor on the page; what the page asks for is not printed.
        """
        files = {"feed.xml": b"<rss/>", "sub/feed.xml": b"<rss/>"}
        fields = {"Cookie": "a=1", "Referer": "http://a/", "Accept": "text/html"}
        own = ("/", "/?1", "/sub/", "/favicon.ico", "/fixtures.opml", "/fixtures.opml?1")

        def client(url):
            for target in (*own, "/?refresh", "/sub/?refresh"):
                for method in ("GET", "HEAD"):
                    self.get(at(url), target, method, headers={**fields, "User-Agent": "seen/1"})
            texts.append(self.page(url).text)

        texts = []
        directory = self.make_directory(files)
        printed = 1 + 2 * len(own) + 1  # the URL, those of the client, and self.page()
        for options in (["--strict"], ["--json", "--strict", "--every", "60"]):
            with self.subTest(options):
                status, out, err = self.serve_main(client, directory, *options)
                self.assertEqual((status, out.count("\n"), err), (0, printed, ""))
                self.assertNotIn("seen/1", texts.pop())

    def test_other_requests_for_the_same_paths_are_the_client_s(self):
        def client(url):
            self.get(at(url), "/", "POST", headers=POLITE)
            exchange(at(url), b"GET / HTTP/1.1\r\n\r\n")
            self.get(at(url), "/none/", headers=POLITE)

        _, printed = self.serve_json(client, self.make_directory())
        seen = [(each["method"], each["status"]) for kind, each in printed if kind == "request"]
        self.assertEqual(seen, [("POST", 405), ("GET", 400), ("GET", 404)])

    def test_names_and_values_of_fixtures_are_text(self):
        markup = "<script>x</script><b onclick='x' id=\"x\">&lt;"
        odd = (markup, f"'>{markup}", f'">{markup}', "--></table>", "]]></td>", "{title}")
        files = {"plain/a.xml": b"", "plain/b.xml": comment("Status:")}
        for number, text in enumerate(odd):
            name = text.replace("/", "\\") if os.name != "nt" else "plain"
            lines = comment(f"Description: {text}", f"Header: X: {text}", f"Status: 200 {text}")
            files[f"{number}/{name}.xml"] = lines
            files[f"{number}/wrong{name}.xml"] = comment(f"Status: {text}")

        def client(url):
            for folder in ("plain", *range(len(odd))):
                page = self.page(url, f"{folder}/")
                markups.append((set(page.elements), {name for name, _ in page.attributes}))

        markups = []
        self.serve_main(client, self.make_directory(files))
        plain, *others = markups
        self.assertIn("pre", plain[0])
        for text, found in zip(odd, others):
            with self.subTest(text):
                self.assertEqual(found, plain)

    def test_an_index_comes_before_the_page(self):
        """So do an icon and a list of feeds, and they are judged like all fixtures."""
        for name, target in (
            ("index.html", "/"),
            ("index.xml", "/"),
            ("sub/index.html", "/sub/"),
            ("favicon.ico", "/favicon.ico"),
            ("fixtures.opml", "/fixtures.opml"),
        ):

            def client(url, target=target):
                self.assertEqual(self.get(at(url), target).content, b"mine")

            with self.subTest(name):
                status, printed = self.serve_json(
                    client, self.make_directory({name: b"mine"}), "--strict"
                )
                rules = [value["rule"] for kind, value in printed if kind == "finding"]
                self.assertEqual((status, printed[1][1]["status"]), (1, 200))
                self.assertIn("no-user-agent", rules)

    def test_reads_itself_anew_where_the_root_has_an_index(self):
        def client(url):
            status, content = self.read(f"{url}sub/")
            self.assertEqual(status, 200)
            for target in re.findall(r'fetch\("(.*?)"\)', content.decode()):
                status, shown = self.read(urllib.parse.urljoin(f"{url}sub/", target))
                self.assertEqual(status, 200)
                self.assertNotIn(b"mine", shown)

        directory = self.make_directory({"index.html": b"mine", "sub/feed.xml": b"<rss/>"})
        self.assertEqual(len(self.serve_json(client, directory)[1]), 2)

    def test_has_no_page_for_what_is_outside(self):
        """Whatever is there: these are requests like any other that is not found."""
        targets = ("/../", "/%2e%2e/", "/sub/../", "//", "/none/", "/sub%00/")

        def client(url):
            for target in targets:
                for query in ("", "?refresh", "?reload"):
                    with self.subTest(target + query):
                        self.assertEqual(self.get(at(url), target + query).status, 404)

        _, printed = self.serve_json(client, self.make_directory({"sub/feed.xml": b"<rss/>"}))
        kinds = [kind for kind, value in printed if kind == "request"]
        self.assertEqual(len(kinds), 3 * len(targets))

    def test_tests_have_no_page(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        for target in ("/", "/favicon.ico", "/fixtures.opml"):
            self.assertEqual(self.get(server, target).status, 404)
        self.assertEqual(len(server.requests), 3)

    def test_shows_the_findings_that_are_told_at_the_end(self):
        files = {"feed.xml": comment('Header: ETag: "v1"'), "gone.xml": comment("Status: 410")}

        def client(url):
            for name, path in (
                *(("reader/1", "feed.xml"),) * 2,
                *(("other/1 <b>", "gone.xml"),) * 2,
                ("polite/1", "feed.xml"),
            ):
                self.get(at(url), f"/{path}", headers={**POLITE, "User-Agent": name})
            self.get(at(url), "/none")
            texts.append(self.page(url).text)

        texts = []
        directory = self.make_directory(files)
        _, printed = self.serve_json(client, directory, "--every", "3600")
        found = [value for kind, value in printed if kind == "finding"]
        rules = {each["rule"] for each in found}
        self.assertLess({"no-validator", "gone", "too-often", "no-user-agent"}, rules)
        for finding in found:
            for text in (finding["client"], finding["text"], finding["rule"]):
                self.assertIn(text, texts[0])
        self.assertIn("polite/1", texts[0])

    def test_escapes_what_clients_send(self):
        def send(url, text):
            fields = b"".join(
                b"%b: %b\r\n" % (name, text)
                for name in (b"User-Agent", b"Accept", b"Referer", b"Cookie", b"If-None-Match")
            )
            self.ask_by_hand(url, b"GET /" + text, fields)
            self.ask_by_hand(url, b"GET http://other.example/" + text, fields, b"other.example")
            self.ask_by_hand(url, b"FOO /" + text, fields)
            exchange(at(url), text + b"\r\n\r\n")

        def look(url, text):
            send(url, b"plain")
            plain = self.page(url)
            send(url, text)
            status, content = self.read(url)
            page, shown = Page(content), content.decode()
            self.assertEqual(status, 200)
            self.assertEqual(set(page.elements), set(plain.elements))
            names = {name for name, _ in plain.attributes}
            self.assertEqual({name for name, _ in page.attributes}, names)
            self.assertEqual(set(re.findall("[^\n\t -~\xa0-\U0010ffff]|\u202e", shown)), set())
            if len(text) < 100 and text.decode("latin-1").isprintable():
                self.assertIn(f"/{text.decode('latin-1')}", page.text)

        directory = self.make_directory({"feed.xml": b"<rss/>"})
        for text in self.NASTY:
            with self.subTest(text):
                client = functools.partial(look, text=text)
                status, printed = self.serve_json(client, directory, "--strict")
                refused = [v for kind, v in printed if kind == "request" and v["status"] != 200]
                self.assertEqual((status, len(refused)), (1, 8))

    def test_shows_the_last_of_many_requests_and_how_many_there_were(self):
        fields = "".join(f"{name}: {value}\r\n" for name, value in POLITE.items())

        def client(url):
            head = f"GET /feed.xml?{{}} HTTP/1.1\r\nHost: a\r\n{fields}"
            heads = [f"{head}\r\n".format(number) for number in range(1, 500)]
            heads.append(f"{head}Connection: close\r\n\r\n".format(500))
            exchange(at(url), "".join(heads).encode())
            texts.append(self.page(url).text)

        texts = []
        status, out, _ = self.serve_main(client, self.make_directory({"feed.xml": b"<rss/>"}))
        self.assertEqual((status, out.count("GET /feed.xml?")), (0, 500))
        self.assertRegex(texts[0], "(?<![?0-9])500(?![0-9])")
        self.assert_in_order(("/feed.xml?500 ", "/feed.xml?499 "), texts[0])
        self.assertEqual(re.findall("/feed.xml.1 ", texts[0]), [])

    def test_does_not_wait_for_other_requests(self):
        files = {"stall.xml": comment("Fault: stall at headers"), "none.xml": comment("Rate: 1")}

        def client(url):
            with connect(at(url)) as first, connect(at(url)) as second:
                for connection, name in ((first, "stall.xml"), (second, "none.xml")):
                    connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                    self.assertIn(b" 200 ", connection.recv(65536))
                text = self.page(url).text
                self.assert_in_order(("/none.xml", "/stall.xml"), text)
                self.assertIn("no User-Agent", text)

        self.serve_main(client, self.make_directory(files))

    def test_is_a_page_for_any_browser(self):
        """Light and dark, on a phone, without anything from elsewhere; and it reads itself anew."""

        def client(url):
            for path in ("", "sub/"):
                with self.subTest(path):
                    response, head = (
                        self.get(at(url), f"/{path}", method) for method in ("GET", "HEAD")
                    )
                    self.assertEqual((head.status, head.content), (200, b""))
                    for name in ("Content-Type", "Content-Length"):
                        self.assertEqual(head.headers[name], response.headers[name])
                    page, text = Page(response.content), response.content.decode()
                    self.assertIn("sub/feed.xml", page.text)
                    self.assertRegex(text, "<meta name=.?color-scheme.? content=.light dark.")
                    self.assertRegex(text, "<meta name=.?viewport.? content=.?width=device-width")
                    refresh = [*page.attributes, *response.headers.items()]
                    self.assertIn(
                        "refresh", {f"{each}".lower() for pair in refresh for each in pair}
                    )
                    for name, value in page.attributes:
                        if name in ("href", "src", "action", "data", "srcset"):
                            self.assertRegex(value, r"\A(?:/(?!/)|data:|#)")
                    self.assertNotRegex(text, r"url\((?!.?data:)|@import|https?://")

        self.serve_main(client, self.make_directory({"sub/feed.xml": b"<rss/>", "a.xml": b"<a/>"}))

    def test_to_look_at_a_feed_does_not_go_on_with_its_life(self):
        files = {
            "feed.xml": comment("Status: 298", "Next: gone.xml"),
            "gone.xml": comment("Status: 410"),
        }

        def client(url):
            for _ in range(3):
                self.assertIn("feed.xml -> 298 ", self.page(url).text)
                self.read(f"{url}fixtures.opml")
            self.assertEqual(self.get(at(url), "/feed.xml").status, 298)
            for path in ("", "?reload"):
                self.assertIn("feed.xml -> 410 Gone ", self.page(url, path).text)
            self.assertEqual(self.get(at(url), "/feed.xml").status, 410)

        self.serve_main(client, self.make_directory(files))


class FeedListTest(CommandLineTestCase):
    """/fixtures.opml: all feeds, to subscribe to at once."""

    FEEDS = {
        "a & b's.xml": b"<rss>1</rss>",
        "100%;#.json": b"{}",
        "sub/deep er/feed.rss": b"<rss>2</rss>",
        "example.com/feed.atom": b"<rss>3</rss>",
        "feed": b"<rss>4</rss>",
        "feed.rdf": b"<rdf/>",
        "odd.asis": b"HTTP/1.1 200 OK\r\n\r\n<rss>5</rss>",
        "index.xml": b"<rss>6</rss>",
    }

    def outlines(self, content):
        """The names and URLs of the feeds in a list."""
        root = ElementTree.fromstring(content)
        self.assertEqual((root.tag, [child.tag for child in root]), ("opml", ["head", "body"]))
        self.assertEqual(root.get("version"), "2.0")
        self.assertTrue(root.findtext("head/title"))
        for outline in root.find("body"):
            self.assertEqual((outline.tag, outline.get("type")), ("outline", "rss"))
        return sorted((each.get("text"), each.get("xmlUrl")) for each in root.find("body"))

    def list_of(self, url, headers=()):
        response = self.get(at(url), "/fixtures.opml", headers=headers)
        self.assertEqual(response.status, 200)
        self.assertEqual(response.headers.get_content_type(), "text/x-opml")
        return self.outlines(response.content)

    def test_lists_each_feed_once_by_a_url_that_works(self):
        def client(url):
            listed = self.list_of(url)
            self.assertEqual([name for name, _ in listed], sorted(self.FEEDS))
            for name, feed in listed:
                with self.subTest(name):
                    self.assertTrue(feed.startswith(url), feed)
                    body = self.FEEDS[name].rpartition(b"\r\n")[2]
                    self.assertEqual(self.read(feed), (200, body))

        self.serve_main(client, self.make_directory(self.FEEDS))

    def test_lists_names_that_xml_or_urls_do_not_hold(self):
        for name in (
            "caf\u00e9 \u20ac.xml",
            "\U0001f4f0.xml",
            "<b>\"'&amp;?.xml",
            "a\x01\x1b\tb.xml",
            "a\nb.xml",
            "a\ufffe\uffff\ufdd0.xml",
            "a\udcff.xml",
        ):
            with self.subTest(ascii(name)):
                try:
                    directory = self.make_directory({name: b"<rss/>"})
                except OSError as error:
                    self.skipTest(f"no file is called {name!a} here: {error}")

                def client(url, name=name):
                    [(text, feed)] = self.list_of(url)
                    self.assertTrue(feed.isascii(), feed)
                    self.assertEqual(self.read(feed), (200, b"<rss/>"))
                    if name.isprintable():
                        self.assertEqual(text, name)

                self.serve_main(client, directory)

    def test_lists_feeds_whatever_they_respond(self):
        """Readers meet feeds with a wrong type, and pages in their place, as of a 503."""
        files = {
            "busy.xml": comment("Status: 503", "Header: Content-Type: text/html"),
            "feed.html": comment("Header: Content-Type: application/rss+xml"),
            "odd.asis": b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\n\r\n<rss/>",
            "plain.xml": comment("Header: Content-Type: text/plain; charset=utf-8"),
            "gone.xml": comment("Status: 410"),
            "moved.xml": comment("Status: 301", "Header: Location: /gone.xml"),
            "reset.xml": comment("Fault: reset"),
            "wrong.xml": comment("Status: x"),
        }
        status, _, _ = self.serve_main(
            lambda url: self.assertEqual([name for name, _ in self.list_of(url)], sorted(files)),
            self.make_directory(files),
            "--strict",
        )
        self.assertEqual(status, 0)

    def test_lists_no_pages_and_no_media(self):
        names = (
            *("page.html", "PAGE2.HTML", "sub/index.html", "page.htm", "notes.txt", "style.css"),
            *("logo.png", "logo.svg", "photo.jpg", "icon.ico", "sound.mp3", "sound.ogg"),
            *("film.mp4", "film.webm", "font.woff2", "mine.opml", "script.js"),
            *(".hidden.xml", ".folder/feed.xml", "sub/.feed.xml", "feed.json.headers"),
        )
        directory = self.make_directory({**dict.fromkeys(names, b""), "feed.json": b"{}"})
        self.serve_main(
            lambda url: self.assertEqual(self.list_of(url), [("feed.json", f"{url}feed.json")]),
            directory,
        )

    def test_lists_nothing_where_there_is_nothing(self):
        self.serve_main(lambda url: self.assertEqual(self.list_of(url), []), self.make_directory())

    def test_feeds_are_where_the_list_was_asked_for(self):
        """By the name that the client used, and by HTTPS if it did."""

        def client(url):
            for host in (f"localhost:{at(url).port}", "reader.example", "[::1]:81", "a&b'c:1"):
                with self.subTest(host):
                    listed = self.list_of(url, {"Host": host})
                    self.assertEqual(listed, [("a b.xml", f"http://{host}/a%20b.xml")])
            data = exchange(at(url), b"GET /fixtures.opml HTTP/1.0\r\n\r\n")
            self.assertEqual(self.outlines(Answer(data).body)[0][1], f"{url}a%20b.xml")
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            secure = url.replace("http:", "https:")
            with urllib.request.urlopen(
                f"{secure}fixtures.opml", timeout=PATIENCE, context=context
            ) as response:
                self.assertEqual(self.outlines(response.read())[0][1], f"{secure}a%20b.xml")

        self.serve_main(client, self.make_directory({"a b.xml": b"<rss/>"}))

    def test_head_and_other_methods(self):
        def client(url):
            get, head, post = (
                self.get(at(url), "/fixtures.opml", method) for method in ("GET", "HEAD", "POST")
            )
            self.assertEqual((head.status, head.content, post.status), (200, b"", 405))
            for name in ("Content-Type", "Content-Length"):
                self.assertEqual(head.headers[name], get.headers[name])
            self.assertEqual(self.get(at(url), "/sub/fixtures.opml").status, 404)
            self.assertIn(("href", "/fixtures.opml"), Page(self.read(url)[1]).attributes)

        self.serve_main(client, self.make_directory({"sub/feed.xml": b"<rss/>"}))


if __name__ == "__main__":
    unittest.main()
