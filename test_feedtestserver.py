# SPDX-License-Identifier: 0BSD
"""The tests of feedtestserver: python -m unittest."""

import ast
import asyncio
import contextlib
import copy
import email.utils
import errno
import functools
import gc
import gzip
import html.parser
import http.client
import importlib.util
import io
import itertools
import json
import logging
import os
import pathlib
import pickle
import random
import re
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
import types
import typing
import unittest
import urllib.error
import urllib.parse
import urllib.request
import zlib
from http.server import SimpleHTTPRequestHandler
from unittest import mock

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
DOCSTRING = ast.get_docstring(ast.parse(SOURCE))  # python -OO has none at run time
CLOSE = {"Connection": "close"}
INFINITY = float("inf")
PATIENCE = 20  # seconds; only a broken server makes a test wait for it
NOW = 1_236_420_000.0  # 2009-03-07 10:00:00 GMT
NOW_DATE = "Sat, 07 Mar 2009 10:00:00 GMT"


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


def run_script(script, *arguments):
    """Run a script, which may fork: no child has output of its parent's in its buffers then.

    From 3.12 on, Python warns of a fork beside threads.
    """
    options = ("-u", "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script))
    return run(*options, *map(str, arguments))


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


class NoTimePasses:
    """Stands in for a server's timer: time passes at once, and ``waits`` says for how long."""

    def __init__(self):
        self.waits = []
        self.time = 0.0

    def now(self):
        return self.time

    def wait(self, connection, seconds, event):
        self.waits.append(round(seconds, 6))
        happened = feedtestserver._Timer().wait(connection, 0, event)
        self.time += 0 if happened or seconds == INFINITY else seconds
        return happened


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
            except UnicodeEncodeError:
                self.skipTest(f"no file is called {name!a} here")
        return pathlib.Path(os.path.realpath(folder.name))

    def serve(self, files=(), server_class=FeedTestServer, **options):
        server = server_class(self.make_directory(files), **options)
        server.clock = lambda: NOW
        self.addCleanup(self.look_for_thread_errors, len(thread_errors))
        server.start()
        self.addCleanup(server.stop)
        return server

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


# The examples


def blocks(text):
    """The literal blocks of a text in reStructuredText, dedented."""
    found = re.findall(r"::\n\n((?:    .*\n|\n)+)", text)
    return [textwrap.dedent(block).strip("\n") + "\n" for block in found]


def readme_examples():
    """The files of each section of the README, by name; recipes are methods of its last file."""
    sections = re.split(r"\n-{3,}\n", (HERE / "README.rst").read_text("utf-8"))
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


class ExampleTest(ServerTestCase):
    def run_tests(self, files):
        folder = self.make_directory({name: text.encode() for name, text in files.items()})
        module = (HERE / "feedtestserver.py").read_bytes()
        (folder / "feedtestserver.py").write_bytes(module)
        return run("-W", "error", "-m", "unittest", cwd=folder)

    def test_examples_of_the_readme_run_as_they_stand(self):
        examples = [files for files in readme_examples() if any("test" in name for name in files)]
        tests = (HERE / "README.rst").read_text("utf-8").count("def test_")
        self.assertGreater(tests, 20)
        for files in examples:
            with self.subTest(sorted(files)):
                done = self.run_tests(files)
                self.assertEqual(done.returncode, 0, done.stderr)
                tests -= int(re.search(r"Ran (\d+) tests?", done.stderr).group(1))
        self.assertEqual(tests, 0)

    def test_it_can_be_copied_into_a_package_of_tests(self):
        [first] = [files for files in readme_examples() if "test_fetch.py" in files]
        said = "from .feedtestserver import FeedTestServerMixin"
        self.assertIn(said, (HERE / "README.rst").read_text("utf-8"))
        test = first["test_fetch.py"].replace(said.replace(" .", " "), said)
        files = {"tests/test_fetch.py": test, "tests/data/feed.xml": first["data/feed.xml"]}
        folder = self.make_directory({name: text.encode() for name, text in files.items()})
        (folder / "tests" / "feedtestserver.py").write_text(SOURCE, "utf-8")
        (folder / "tests" / "__init__.py").touch()
        done = run("-W", "error", "-m", "unittest", cwd=folder)
        self.assertRegex(done.stderr, r"Ran 2 tests in .*\n\nOK\n$")

    def test_readme_and_table_name_the_same_directives(self):
        said = re.findall(r"^``(\w+): ", (HERE / "README.rst").read_text("utf-8"), re.MULTILINE)
        self.assertEqual(said, [rule.name for rule in feedtestserver._RULES.values()])

    def test_readme_and_table_name_the_same_rules_of_politeness(self):
        [section] = re.findall(
            r"(?s)\nTesting politeness\n.*?\nRecipes\n", (HERE / "README.rst").read_text("utf-8")
        )
        said = re.findall(r"^``([a-z-]+)`` +", section, re.MULTILINE)
        self.assertEqual(said, list(feedtestserver._POLITENESS))

    def test_readme_shows_what_assert_polite_says(self):
        [files] = [files for files in readme_examples() if "test_politeness.py" in files]
        test = files["test_politeness.py"].replace("@unittest.expectedFailure", "")
        done = self.run_tests({**files, "test_politeness.py": test})
        said = re.search(r"(?s)AssertionError: .*?\n\n", done.stderr).group()
        shown = blocks((HERE / "README.rst").read_text("utf-8"))
        [shown] = [block for block in shown if block.startswith("AssertionError: the client")]
        self.assertEqual(said.split(), shown.split())

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

    def test_docstring_and_table_name_the_same_directives(self):
        listed = re.search(r"The directives:\n\n(.*?)\n\n", DOCSTRING, re.DOTALL)
        said = re.findall(r"^    (\w+): ", listed.group(1), re.MULTILINE)
        self.assertEqual(said, [rule.name for rule in feedtestserver._RULES.values()])


class PublicNamesTest(unittest.TestCase):
    def test_all_is_sorted_and_documented(self):
        self.assertEqual(feedtestserver.__all__, sorted(feedtestserver.__all__))
        kinds = (ast.ClassDef, ast.FunctionDef)
        defined = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, kinds)}
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
                "Rate: 1000",
                "Fault:  Reset  at 50%",
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
                rate=1000,
                fault="reset at 50%",
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
            " at start, at headers, at a number of bytes, at 0% to 100%"
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
            ("Rate: 0", f"Rate: found '0'; {rate}"),
            ("Rate: -1", f"Rate: found '-1'; {rate}"),
            ("Rate: 0100", f"Rate: found '0100'; {rate}"),
            ("Rate: fast", f"Rate: found 'fast'; {rate}"),
            ("Fault: explode", f"Fault: found 'explode'; {fault}"),
            ("Fault: reset at", f"Fault: found 'reset at'; {fault}"),
            ("Fault: reset at end", f"Fault: found 'reset at end'; {fault}"),
            ("Fault: reset at 101%", f"Fault: found 'reset at 101%'; {fault}"),
            ("Fault: reset at -1", f"Fault: found 'reset at -1'; {fault}"),
            ("Fault: reset at 007", f"Fault: found 'reset at 007'; {fault}"),
            ("Fault: reset at 1.5%", f"Fault: found 'reset at 1.5%'; {fault}"),
            ("Fault: reset 50%", f"Fault: found 'reset 50%'; {fault}"),
            ("Fault:", f"Fault: found ''; {fault}"),
            ("Template: no", "Template: found 'no'; it takes yes"),
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
        long = "a" * 1_000_000
        for data, items in (
            (b"<!--" * 250_000, []),
            (b"<![CDATA[" * 100_000, []),
            (b"<!--" + b"\n" * 1_000_000 + b"A: 1-->", [("A", "1")]),
            (b"<!--\nA: 1\n" + b" x\n" * 300_000 + b"-->", [("A", "1" + " x" * 300_000)]),
            (f"<!--{long}: 1-->".encode(), [(long, "1")]),
            (b"<!--" + b" " * 1_000_000 + b": 1-->", []),
            (b"<!--A: 1\n" + b" \t" * 500_000 + b"\nB: 2-->", [("A", "1"), ("B", "2")]),
            (b"<!--" + b"Header: X: 1\n" * 70_000 + b"-->", [("Header", "X: 1")] * 70_000),
            (b"<!--" + b"Headr" * 200_000 + b": 1-->", [("Headr" * 200_000, "1")]),
            (b"<?xml " * 160_000, []),
            ("<?xml ".encode("cp037") * 160_000, []),
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
                head = planned(Response(**directives.arguments))._head
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
                head = planned(Response(**directives.arguments))._head
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
            (["Rate: 1"], {"rate": 1}),
            (["Fault: close"], {"fault": "close"}),
            (["Fault: RESET at START"], {"fault": "reset at start"}),
            (["Fault: stall at 0"], {"fault": "stall at 0"}),
            (["Fault: reset at 100%"], {"fault": "reset at 100%"}),
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
            ({"rate": -1}, "Rate: -1"),
            ({"rate": 0}, "Rate: 0"),
            ({"fault": "explode"}, "Fault: explode"),
            ({"fault": "reset at 101%"}, "Fault: reset at 101%"),
            ({"fault": ("reset", 100)}, "Fault: ('reset', 100)"),
        ):
            with self.subTest(arguments), self.assertRaises(ValueError) as caught:
                Response(**arguments)
            name = line.partition(":")[0]
            takes = feedtestserver._RULES[name.lower()].takes
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

    def test_status_may_be_of_the_enumeration(self):
        self.assertEqual(Response(status=http.HTTPStatus.GONE), Response(status=410))

    def test_it_is_a_value(self):
        response = Response()
        with self.assertRaisesRegex(AttributeError, "^status cannot be set: a Response is a value"):
            response.status = 404

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


def planned(response, *fields, method="GET", path="/feed.xml", version="1.1", persistent=True):
    """The plan for a request with these field lines."""
    lines = "".join(f"{line}\r\n" for line in fields)
    request = Request(method, path, version, lines)
    request._base_url = "http://127.0.0.1:8000"
    return feedtestserver._plan(request, response, NOW_DATE, persistent)


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
                    self.assertFalse(plan._closes)

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
                self.assertEqual(plan._closes, closes)

    def test_body_of_unknown_length_ends_with_the_connection(self):
        for headers in ([], [("Content-Length", "5"), ("Content-Length", "6")]):
            with self.subTest(headers):
                without = [] if headers else ["Content-Length"]
                response = Response(b"12345", headers=headers, without=without)
                self.assertTrue(planned(response)._closes)
                self.assertFalse(planned(response, method="HEAD")._closes)

    def test_connection_left_out(self):
        response = Response(without=["connection", "transfer-encoding"])
        self.assertFalse(planned(response)._closes)
        self.assertTrue(planned(response, version="1.0")._closes)
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
                self.assertEqual((plan.chunked, plan._closes), (chunked, closes))

    def test_content_coding(self):
        for coding, wbits in (("gzip", 31), ("deflate", 15)):
            with self.subTest(coding):
                response = Response(b"12345" * 100, compress=coding)
                plan = planned(response)
                fields = dict(plan.headers)
                self.assertEqual(fields["Content-Encoding"], coding)
                self.assertEqual(fields["Content-Length"], str(len(plan._sent)))
                self.assertEqual(zlib.decompress(plan._sent, wbits), b"12345" * 100)
                self.assertEqual((plan.compress, plan.body), (coding, response.body))
                self.assertEqual(planned(response, method="HEAD").headers, plan.headers)
                self.assertIs(planned(response, "Range: x")._sent, plan._sent)  # made once
                expanding = response._but(headers=(("X", "{{port}}"),), _has_expressions=True)
                self.assertIs(planned(expanding)._sent, plan._sent)
                other = planned(plan._but(_content=b"other"))
                self.assertEqual(zlib.decompress(other._sent, wbits), b"other")
                self.assertEqual(planned(plan)._sent, plan._sent)
        for response, sent in (
            (Response(compress="gzip", headers={"Content-Encoding": "br"}), ["br"]),
            (Response(compress="gzip", without=["content-encoding"]), []),
        ):
            plan = planned(response)
            self.assertEqual(plan._all("content-encoding"), sent)
            self.assertEqual(zlib.decompress(plan._sent, 31), b"")

    def test_what_has_no_content_has_no_coding_either(self):
        for response in (
            Response(b"x", 204, compress="gzip", chunked=1),
            Response(b"x", 304, compress="gzip", chunked=1),
        ):
            plan = planned(response)
            self.assertEqual(self.names(plan), ["Date", "Server"])
            self.assertEqual((plan.compress, plan.chunked, plan._sent), (None, None, b""))

    def test_a_transfer_coding_of_nothing_ends_with_the_connection(self):
        for status in (204, 304):
            response = Response(status=status, headers={"Transfer-Encoding": "chunked"})
            self.assertTrue(planned(response)._closes)
            self.assertFalse(planned(Response(status=status, chunked=5))._closes)

    def test_a_fault_is_not_announced(self):
        for fault in ("close", "reset at 50%", "stall at headers"):
            with self.subTest(fault):
                plan = planned(Response(b"12345", fault=fault))
                self.assertEqual(plan.headers, planned(Response(b"12345")).headers)
                self.assertTrue(plan._closes)

    def test_an_answer_as_it_is(self):
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
                self.assertEqual((plan._head, plan._sent, plan._closes), (b"", body, True))
                self.assertEqual((plan.status, plan.reason, plan.headers), (status, None, ()))
                self.assertEqual((plan.chunked, plan.compress, plan.delay), (None, None, 1))
        hinted = b"HTTP/1.1 103 Hints\r\nA: 1\r\n\r\nHTTP/1.1 204 No\nB : \xff \r\nnone\r\n\r\nC: 3"
        plan = planned(Response(hinted, asis=True))
        self.assertEqual((plan.status, plan.headers), (204, (("B", "\udcff"),)))
        template = Response(b"HTTP/1.1 200 {{port}}\r\n\r\n", asis=True, template=True)
        self.assertEqual(planned(template)._sent, b"HTTP/1.1 200 8000\r\n\r\n")

    def test_a_plain_plan_is_shared_by_requests_that_are_alike(self):
        response = Response(b"12345")
        self.assertIs(planned(response), planned(response))
        self.assertEqual(planned(response)._planned, ((), None))  # it holds no older plan
        for other in (
            {"method": "HEAD"},
            {"version": "1.0"},
            {"path": "/feed.rss"},
            {"persistent": False},
        ):
            with self.subTest(other):
                plan, other = planned(response), planned(response, **other)
                self.assertNotEqual((other._head, other.body), (plan._head, plan.body))
        plan = planned(response)
        later = feedtestserver._plan(Request("GET", "/feed.xml", "1.1"), response, "", True)
        self.assertNotEqual(later._head, plan._head)

    def test_plans_that_threads_share_are_their_own(self):
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        response = Response(b"12345")

        def plan(method, size):
            sizes = {len(planned(response, method=method).body) for _ in range(2000)}
            self.assertEqual(sizes, {size})

        run_at_once([functools.partial(plan, *a) for a in (("GET", 5), ("HEAD", 0)) * 2])

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

    def test_other_methods(self):
        self.check(self.BOTH, [(304, 'If-None-Match: "v1"')], method="HEAD")
        self.check(
            self.BOTH, [(412, 'If-None-Match: "v1"'), (412, "If-None-Match: *")], method="PUT"
        )
        self.check(self.BOTH, [(200, f"If-Modified-Since: {self.MODIFIED}")], method="PUT")
        for method in ("OPTIONS", "TRACE"):
            table = [(200, 'If-Match: "v2"'), (200, 'If-None-Match: "v1"')]
            self.check(self.BOTH, table, method=method)

    def test_only_a_200_changes(self):
        for status in (201, 206, 301, 404, 500):
            self.check(
                self.BOTH,
                [(status, 'If-None-Match: "v1"'), (status, 'If-Match: "v2"')],
                status=status,
            )

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
                self.assertFalse(plan._closes)

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
                response = Response(self.BODY, headers={"ETag": etag, "Last-Modified": date})
                fields = ("Range: bytes=0-1", f"If-Range: {validator}")
                self.assertEqual(planned(response, *fields).status, status)
                ignoring = response._but(ignore=("if-range",))
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
            self.assertEqual(plan._mechanics(), ["Delay: 1", "Rate: 2", "Fault: close"])
            self.assertEqual((plan.chunked, plan.compress, plan._closes), (None, None, True))
            self.assertEqual(plan._all("content-type"), ["text/plain; charset=utf-8"])

    def test_conditions_come_first(self):
        response = Response(self.BODY, headers={"ETag": '"1"'})
        for condition, status in (('If-None-Match: "1"', 304), ('If-Match: "2"', 412)):
            self.assertEqual(planned(response, "Range: bytes=0-1", condition).status, status)

    def test_a_part_of_the_coded_body(self):
        response = Response(self.BODY, compress="gzip")
        whole, part = planned(response), planned(response, "Range: bytes=3-")
        self.assertEqual(part._sent, whole._sent[3:])
        size = len(whole._sent)
        fields = dict(part.headers)
        self.assertEqual(fields["Content-Range"], f"bytes 3-{size - 1}/{size}")
        self.assertEqual(fields["Content-Encoding"], "gzip")
        self.assertEqual(planned(part)._sent, part._sent)

    def test_given_fields(self):
        for given, sent in (("10", "2"), ("99", "99")):
            response = Response(self.BODY, headers={"Content-Length": given})
            plan = planned(response, "Range: bytes=0-1")
            self.assertEqual(plan._all("content-length"), [sent])
            self.assertEqual(plan._closes, given == "99")
        response = Response(self.BODY, headers={"Content-Range": "bytes 1-2/3"})
        self.assertEqual(
            planned(response, "Range: bytes=0-1")._all("content-range")[0][6:], "1-2/3"
        )
        response = Response(self.BODY, without=["content-range"])
        self.assertEqual(planned(response, "Range: bytes=0-1")._all("content-range"), [])


class Wire:
    """Keeps what _write() does: what is sent, how many seconds it waits, how it breaks off."""

    def __init__(self):
        self.done = []
        self.time = 0.0

    def now(self):
        return self.time

    def send(self, data):
        self.done.append(bytes(data))

    def pause(self, seconds):
        if seconds > 0:
            self.done.append(round(seconds, 6))
            self.time += seconds

    def break_off(self, fault):
        self.done.append(fault)


class WireTest(unittest.TestCase):
    def written(self, plan):
        wire = Wire()
        feedtestserver._write(plan, wire)
        return wire.done

    def test_a_small_answer_is_one_send(self):
        plan = planned(
            Response(b"<rss/>", headers=[("A", "1"), ("a", ""), ("B", "x  y")], without=["Server"])
        )
        self.assertEqual(
            self.written(plan),
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
                [sent] = self.written(planned(Response(**arguments)))
                self.assertEqual(sent.partition(b"\r\n")[0], line)

    def test_a_large_body_is_not_copied(self):
        body = bytes(1_000_000)
        wire = mock.Mock()
        feedtestserver._write(planned(Response(body)), wire)
        self.assertIs(wire.send.mock_calls[-1].args[0], body)

    def test_slowness_chunks_and_faults(self):
        head, body = object(), b"0123456789"
        end = b"\r\n0\r\n\r\n"
        for arguments, expected in (
            ({"delay": 2.5}, [2.5, head, body]),
            ({"chunked": 4}, [head, b"4\r\n0123\r\n4\r\n4567\r\n2\r\n89", end]),
            ({"chunked": 5}, [head, b"5\r\n01234\r\n5\r\n56789", end]),
            ({"chunked": 99}, [head, b"a\r\n0123456789", end]),
            ({"rate": 40}, [head, 0.1, b"0123", 0.1, b"4567", 0.05, b"89"]),
            ({"rate": 58}, [head, 0.086207, b"01234", 0.086207, b"56789"]),
            ({"rate": 1000}, [head, 0.01, body]),
            ({"rate": 2, "fault": "close at 2"}, [head, 0.5, b"0", 0.5, b"1", "close"]),
            ({"fault": "close"}, ["close"]),
            ({"fault": "reset at start", "delay": 1}, [1, "reset"]),
            ({"fault": "stall at headers"}, [head, "stall"]),
            ({"fault": "stall at 0%"}, [head, "stall"]),
            ({"fault": "close at 4"}, [head, b"0123", "close"]),
            ({"fault": "close at 10"}, [head, body, "close"]),
            ({"fault": "close at 11"}, [head, body, "close"]),
            ({"fault": "reset at 59%"}, [head, b"01234", "reset"]),
            ({"fault": "reset at 9%"}, [head, "reset"]),
            ({"fault": "reset at 10%"}, [head, b"0", "reset"]),
            ({"fault": "reset at 100%"}, [head, body, "reset"]),
            ({"chunked": 4, "fault": "close at 6"}, [head, b"4\r\n0123\r\n4\r\n45", "close"]),
            ({"chunked": 4, "fault": "close at 4"}, [head, b"4\r\n0123", "close"]),
            (
                {"chunked": 4, "fault": "stall at 100%"},
                [head, b"4\r\n0123\r\n4\r\n4567\r\n2\r\n89", "stall"],
            ),
            (
                {"chunked": 3, "rate": 40, "delay": 1},
                [
                    *(1, head, 0.1, b"3\r\n012\r\n3\r\n3", 0.1, b"45\r\n3\r\n67"),
                    *(0.05, b"8\r\n1\r\n9", end),
                ],
            ),
        ):
            with self.subTest(arguments):
                plan = planned(Response(body, **arguments))
                expected = [plan._head if part is head else part for part in expected]
                self.assertEqual(self.written(plan), expected)
        plan = planned(Response(b"", chunked=4))
        self.assertEqual(self.written(plan), [plan._head, b"0\r\n\r\n"])
        plan = planned(Response(body, chunked=4, rate=1), method="HEAD")
        self.assertEqual(self.written(plan), [plan._head])

    def test_lateness_does_not_add_up(self):
        wire = Wire()
        write = wire.send

        def send(data):
            write(data)
            wire.time += 0.04

        wire.send = send
        plan = planned(Response(b"0123456789", rate=40))
        feedtestserver._write(plan, wire)
        self.assertEqual(wire.done, [plan._head, 0.1, b"0123", 0.06, b"4567", 0.01, b"89"])
        wire.done.clear()
        plan = planned(Response(b"0123456789", rate=400))
        feedtestserver._write(plan, wire)
        self.assertEqual(wire.done, [plan._head, 0.025, b"0123456789"])

    def test_small_chunks_are_made_a_thousand_at_a_time(self):
        done = self.written(planned(Response(bytes(2500), chunked=1)))
        self.assertEqual([len(data) for data in done[1:]], [5998, 6000, 3000, 7])

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
        coded = planned(said)._sent
        self.assertEqual(zlib.decompress(coded, 31), body)
        half, chunk = len(coded) // 2, b"%x" % min(100, len(coded))
        self.assertLess(half, 100)
        for response in (said, read):
            self.assertEqual(
                self.written(planned(response)),
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
        for path, names in (
            ("/feed.xml", ("feed.xml",)),
            ("/a/b/feed.xml", ("a/b/feed.xml",)),
            ("/", ("index.html", "index.xml")),
            ("/a/", ("a/index.html", "a/index.xml")),
            ("/my%20feed.xml", ("my feed.xml",)),
            ("/caf%C3%A9", ("caf\u00e9",)),
            ("/%E9", ("\udce9",)),
            ("/%25", ("%",)),
            ("/a+b", ("a+b",)),
            ("/.hidden/x", (".hidden/x",)),
            ("/..", ()),
            ("/../x", ()),
            ("/a/../x", ()),
            ("/%2e%2e/x", ()),
            ("/%2E./x", ()),
            ("/./x", ()),
            ("/a/.", ()),
            ("/a%2Fb", ()),
            ("/..%2fx", ()),
            ("/a%5Cb", ()),
            ("/..\\x", ()),
            ("/a%00.xml", ()),
            ("//x", ()),
            ("/a//x", ()),
            ("//", ()),
            ("/%252e%252e/x", ("%2e%2e/x",)),
        ):
            with self.subTest(path):
                self.assertEqual(feedtestserver._file_names(path), names)

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
        takes = "a line of a sidecar is KEY: VALUE, such as 'Status: 404' or 'Header: Age: 60'"
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
        try:
            (directory / "out").symlink_to(outside)
            (directory / "out.xml").symlink_to(outside / "secret.xml")
            (directory / "feed.xml.headers").symlink_to(outside / "secret.xml")
            (directory / "link.xml").symlink_to("in/feed.xml")
        except OSError as error:
            self.skipTest(f"no symbolic links here: {error}")
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
        """Have files look older than they are, so that what they answer is kept."""
        time = feedtestserver.time
        feedtestserver.time = types.SimpleNamespace(
            time=lambda: time.time() + 10, monotonic=time.monotonic, sleep=time.sleep
        )
        self.addCleanup(setattr, feedtestserver, "time", time)

    def test_a_changed_file_is_served_changed(self):
        for kept in (False, True):
            if kept:
                self.let_time_pass()
            with self.subTest(kept=kept):
                self.check_changes()

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

    def test_a_file_that_does_not_change_is_read_once(self):
        directory = str(self.make_directory({"feed.xml": b"<rss/>"}))
        first = feedtestserver._load(directory, "feed.xml")
        self.assertIsNot(feedtestserver._load(directory, "feed.xml"), first)
        self.let_time_pass()
        first = feedtestserver._load(directory, "feed.xml")
        self.assertIs(feedtestserver._load(directory, "feed.xml"), first)

    def test_a_sibling_with_a_longer_name_is_outside(self):
        directory = self.make_directory({"data/feed.xml": b"1", "data-secret/feed.xml": b"2"})
        try:
            (directory / "data" / "link.xml").symlink_to("../data-secret/feed.xml")
        except OSError as error:
            self.skipTest(f"no symbolic links here: {error}")
        self.assertIsNone(feedtestserver._load(str(directory / "data"), "link.xml"))

    def test_404_names_the_nearest_fixture(self):
        server = self.serve({"atom/feed.xml": b"1", "rss/other.xml": b"2", "fed.HEADERS": b""})
        text = self.get(server, "/atom/fed.xml").content.decode()
        self.assertEqual(
            text,
            f"'atom/fed.xml' was not found in {legible(server.directory)};"
            " the nearest name there is 'atom/feed.xml'\n",
        )
        server = self.serve({"a.xml.headers": b"", ".git/a.xml": b"", ".a.xml": b"", "z": b""})
        for path in ("/a.xml.header", "/.git/a.xm", "/.a.xm"):
            self.assertIn(b"the nearest name there is 'z'\n", self.get(server, path).content)
        server = self.serve()
        text = self.get(server, "/").content.decode()
        expected = f"'/' was not found in {legible(server.directory)}; it has no fixtures\n"
        self.assertEqual(text, expected)


# Reading requests


HEAD = b"GET /feed.xml HTTP/1.1\r\nHost: x\r\n"
LAST = HEAD + b"Connection: close\r\n\r\n"


class ReaderTest(ServerTestCase):
    FEED = {"feed.xml": b"<rss/>"}

    def test_refusals(self):
        """Each answer is well-formed, says why, and is the last on its connection."""
        server = self.serve(self.FEED)
        many = b"".join(b"X-%d: 1\r\n" % n for n in range(1000))
        for status, words, request in (
            (400, "is no request line", b"GET /feed.xml\r\n\r\n"),
            (400, "is no request line", b"GET  /feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no request line", b"GET /feed.xml HTTP/1.1 \r\nHost: x\r\n\r\n"),
            (400, "is no request line", b"GET /fe ed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no request line", b"GET /feed.xml http/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no request line", b"GET /feed.xml HTTP/11.1\r\nHost: x\r\n\r\n"),
            (400, "is no request line", b"G(T /feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no request line", b" GET /feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no request line", b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "'feed.xml' is no target of GET", b"GET feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "'*' is no target of GET", b"GET * HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no target of GET", b"GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no target of GET", b"GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no target of GET", b"GET http://u@x/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "is no target of GET", b"GET http://x:65536/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "the Host field 'x:99999' is", b"GET / HTTP/1.1\r\nHost: x:99999\r\n\r\n"),
            (400, "has white space", HEAD + b"Accept: */*\r\n" * 200 + b"Bad : y\r\n\r\n"),
            (400, "has no colon", HEAD + b"A" + b" " * 16_000 + b"B\r\n\r\n"),
            (400, "Transfer-Encoding is ','", HEAD + b"Transfer-Encoding: , \r\n\r\n"),
            (400, "line 1 has a bare LF", b"GET /feed.xml HTTP/1.1\nHost: x\n\n"),
            (400, "line 2 has a bare LF", HEAD[:-2] + b"\n\r\n"),
            (400, "line 3 has a bare CR", HEAD + b"X: a\rb\r\n\r\n"),
            (400, "there is no Host field", b"GET /feed.xml HTTP/1.1\r\n\r\n"),
            (400, "the Host field 'x, x' is not one host", HEAD + b"Host: x\r\n\r\n"),
            (400, "the Host field 'x, y' is not one host", HEAD + b"Host: y\r\n\r\n"),
            (400, "the Host field 'x/y' is", b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n"),
            (400, "the Host field 'x:y' is", b"GET / HTTP/1.1\r\nHost: x:y\r\n\r\n"),
            (400, "the Host field 'a b' is", b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n"),
            (
                400,
                "'X : 1' has white space before its colon (RFC 9112 5.1)",
                HEAD + b"X : 1\r\n\r\n",
            ),
            (400, "' X: 1' begins with white space", HEAD + b" X: 1\r\n\r\n"),
            (400, "'\\tfolded' begins with white space", HEAD + b"X: 1\r\n\tfolded\r\n\r\n"),
            (400, "': 1' has no name before its colon", HEAD + b": 1\r\n\r\n"),
            (400, "'X' has no colon", HEAD + b"X\r\n\r\n"),
            (400, "'X(: 1' has a name that is not a token", HEAD + b"X(: 1\r\n\r\n"),
            (400, "'X: a\\x00' has a control character", HEAD + b"X: a\x00\r\n\r\n"),
            (400, "'X: a\\x0b' has a control character", HEAD + b"X: a\x0b\r\n\r\n"),
            (400, "'X: a\\x7f' has a control character", HEAD + b"X: a\x7f\r\n\r\n"),
            (400, "is no request line", b"GET /\x7f HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, "has a control character", HEAD + b"X:" + b" " * 16_000 + b"\x00\r\n\r\n"),
            (
                400,
                "both Content-Length and Transfer-Encoding",
                HEAD + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
            ),
            (
                400,
                "the Content-Lengths differ: '1, 2'",
                HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
            ),
            (400, "the Content-Lengths differ: '1,2'", HEAD + b"Content-Length: 1,2\r\n\r\nxx"),
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
                "HTTP/1.0 has no Transfer-Encoding",
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
            (431, "the head of the request is larger", HEAD + b"X: %s\r\n" % (b"x" * 8000) * 200),
            (505, "HTTP/2.0 is not spoken here", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            (505, "HTTP/0.9 is not spoken here", b"GET / HTTP/0.9\r\n\r\n"),
            (501, "the method 'BREW' is not known", b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n"),
            (501, "the method 'get' is not known", b"get / HTTP/1.1\r\nHost: x\r\n\r\n"),
            (
                405,
                "POST is not answered here",
                b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
            ),
            (
                405,
                "CONNECT is not answered here",
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

    def test_the_pieces_in_which_a_request_arrives_change_nothing(self):
        line, chunked = b"X: " + b"x" * 16_381, HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        overlong = b"X: " + b"x" * 16_382
        for expected, request in (
            ("GET /feed.xml", HEAD + line + b"\r\n\r\n"),
            ("431 GET /feed.xml", HEAD + overlong + b"\r\n\r\n"),
            ("431 GET /feed.xml", HEAD + b"A" + b" " * 60_000 + b"B\r\n\r\n"),
            ("431 GET /feed.xml", HEAD + overlong + b"\r\nno colon\r\nX: \0\r\n\r\n"),
            ("400 GET /feed.xml", HEAD + b"X: \0\r\n" + overlong + b"\r\n\r\n"),
            ("400 GET /feed.xml", HEAD + b"no colon\r\n" + line + b"\r\n\r\n"),
            ("400 GET /feed.xml", HEAD + line + b"\r\nX: \r\r\n\r\n"),
            ("431 GET /feed.xml", HEAD + (line + b"\r\n") * 70 + b"\0\r\n\r\n"),
            ("414 ", b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + overlong + b"\r\n\r\n"),
            ("414 ", b"GET /" + b"x" * 20_000 + b"\n\r\n"),
            ("GET /feed.xml", chunked + b"1;" + b"x" * 16_382 + b"\r\nx\r\n0\r\n\r\n"),
            ("400 GET /feed.xml", chunked + b"1;" + b"x" * 16_383 + b"\r\nx\r\n0\r\n\r\n"),
            ("GET /feed.xml", chunked + b"0\r\n" + line + b"\r\n\r\n"),
            ("431 GET /feed.xml", chunked + b"0\r\n" + overlong + b"\r\n\r\n"),
        ):
            for size in (1_499, 16_384, len(request) - 2, len(request)):
                with self.subTest(request=request[:80], size=size):
                    pieces = [request[i : i + size] for i in range(0, len(request), size)]
                    self.assertEqual(self.read_in_pieces(pieces), expected)

    def read_in_pieces(self, pieces):
        """The request, or the status of its refusal, that comes of these results of recv()."""
        handler = feedtestserver.FeedTestRequestHandler.__new__(
            feedtestserver.FeedTestRequestHandler
        )
        handler.connection = mock.Mock(recv=mock.Mock(side_effect=[*pieces, b""]))
        handler.server, handler.watched = mock.Mock(), None
        handler.connection_number = 1
        handler.test_server, handler.buffer = FeedTestServer(port=1), bytearray()
        try:
            return str(handler.read())
        except feedtestserver._Refusal as refusal:
            return f"{refusal.status} {refusal.request or ''}"

    def test_a_field_that_is_repeated_a_hundred_thousand_times(self):
        """Its values are not joined one after the other, which would take seconds."""
        server = self.serve(self.FEED)
        answer = Answer(exchange(server, HEAD + b"a:\r\n" * 200_000 + b"\r\n"))
        self.assertEqual((answer.status, answer.body[:14]), (431, b"there are more"))
        [request] = server.requests
        self.assertEqual((request.path, request.headers.items()), ("/feed.xml", []))

    def test_chunks_that_are_refused(self):
        server = self.serve(self.FEED)
        server.respond("/", 200)
        for words, body in (
            ("'' is no chunk size", b"\r\n"),
            ("'x' is no chunk size", b"x\r\n"),
            ("'0x1' is no chunk size", b"0x1\r\na\r\n0\r\n\r\n"),
            ("'+1' is no chunk size", b"+1\r\na\r\n0\r\n\r\n"),
            ("'-1' is no chunk size", b"-1\r\na\r\n0\r\n\r\n"),
            ("' 1' is no chunk size", b" 1\r\na\r\n0\r\n\r\n"),
            ("'1 ' is no chunk size", b"1 \r\na\r\n0\r\n\r\n"),
            ("'1_0' is no chunk size", b"1_0\r\na\r\n0\r\n\r\n"),
            ("'1;' is no chunk size", b"1;\r\na\r\n0\r\n\r\n"),
            ("is no chunk size", b'1;a="\r"\r\na\r\n0\r\n\r\n'),
            ("is no chunk size", b'1;a="\\\x00"\r\na\r\n0\r\n\r\n'),
            ("' is no chunk size", b"1" * 17 + b"\r\n"),
            ("does not end in CR LF", b"1\na\r\n0\r\n\r\n"),
            ("longer than its size says", b"1\r\nab\r\n0\r\n\r\n"),
            ("the trailer field 'X : 1' is", b"0\r\nX : 1\r\n\r\n"),
            ("more than 256 trailer fields", b"0\r\n" + b"X: 1\r\n" * 300 + b"\r\n"),
            ("is longer than 16384 bytes", b"1;" + b"x" * 20000),
        ):
            with self.subTest(words, body=body[:20]):
                head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                answer = Answer(exchange(server, head + body))
                self.assertEqual(answer.status, 431 if "more than" in words else 400)
                self.assertIn(words, answer.body.decode())
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.assertEqual(Answer(exchange(server, head, b"4000001\r\n")).status, 413)

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
        exchange(server, HEAD + b"X : 1\r\n\r\n")
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
                "GET /x -> 400",
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
        self.assertEqual(requests[2].headers["Content-Length"], "x")

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


class ClientHelloTest(unittest.TestCase):
    def name_in(self, sent):
        return feedtestserver._server_name(feedtestserver._client_hello(sent))

    def test_the_host_that_it_names(self):
        for asked, name in (
            ("localhost", "localhost"),
            ("a.example", "a.example"),
            ("x" * 63 + ".example", "x" * 63 + ".example"),
            ("127.0.0.1", ""),
        ):
            with self.subTest(asked):
                self.assertEqual(self.name_in(hello_for(asked)), name)

    def test_it_is_incomplete_until_its_last_byte(self):
        hello = hello_for("a.example")
        for size in range(len(hello)):
            self.assertIsNone(feedtestserver._client_hello(hello[:size]))
        self.assertEqual(self.name_in(hello + b"more"), "a.example")

    def test_it_may_come_in_several_records(self):
        message = hello_for("a.example")[5:]
        for size in (len(message) // 60, 50, 100):
            with self.subTest(size):
                pieces = [message[at : at + size] for at in range(0, len(message), size)]
                records = [struct.pack(">BHH", 22, 0x301, len(piece)) + piece for piece in pieces]
                self.assertEqual(self.name_in(b"".join(records)), "a.example")
                self.assertIsNone(feedtestserver._client_hello(b"".join(records[:-1])))

    def test_nothing_is_waited_for_after_what_is_no_hello(self):
        for words, sent in (
            ("many records", b"\x16\x03\x01\x00\x01\x01" * 65),
            ("a record of more than 2**14 bytes", b"\x16\x03\x01\x40\x01"),
            ("a record of none", b"\x16\x03\x01\x00\x00"),
            ("a ServerHello", b"\x16\x03\x01\x00\x04\x02\x00\x00\x00"),
            ("a hello of 16 MiB", b"\x16\x03\x01\x00\x04\x01\xff\xff\xff"),
            ("another type of record", b"\x16\x03\x01\x00\x01\x01\x17\x03\x01\x00\x01x"),
        ):
            with self.subTest(words):
                self.assertIsNotNone(feedtestserver._client_hello(sent))
                self.assertEqual(self.name_in(sent), "")

    def test_hellos_that_are_cut_or_changed(self):
        message = hello_for("a.example")[5:]
        for size in range(len(message)):
            with self.subTest(size):
                self.assertIsInstance(feedtestserver._server_name(message[:size]), str)
                for byte in (b"\0", b"\xff"):
                    changed = message[:size] + byte + message[size + 1 :]
                    self.assertIsInstance(feedtestserver._server_name(changed), str)


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


class CertificateTest(unittest.TestCase):
    KEY_USAGE, ALTERNATIVE_NAME, BASIC_CONSTRAINTS = (
        b"\x55\x1d\x0f",
        b"\x55\x1d\x11",
        b"\x55\x1d\x13",
    )
    SUBJECT_KEY, AUTHORITY_KEY = b"\x55\x1d\x0e", b"\x55\x1d\x23"
    EXTENDED_KEY_USAGE = b"\x55\x1d\x25"

    @classmethod
    def setUpClass(cls):
        cls.authority = feedtestserver._Authority()

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

    def test_multiples_of_the_base_point(self):
        x, y = feedtestserver._BASE
        twice = (
            0x7CF27B188D034F7E8A52380304B51AC3C08969E277F21B35A60B48FC47669978,
            0x07775510DB8ED040293D9AC69F7430DBBA7DADE63CE982299E04B79D227873D1,
        )
        often = (
            0x339150844EC15234807FE862A86BE77977DBFB3AE3D96F4C22795513AEAAB82F,
            0xB1C14DDFDC8EC1B2583F51E85A5EB3A155840F2034730E9B5ADA38B674336A21,
        )
        opposite = (x, feedtestserver._P - y)
        order = feedtestserver._ORDER
        for scalar, point in (
            (1, (x, y)),
            (2, twice),
            (112233445566778899, often),
            (order - 1, opposite),
        ):
            with self.subTest(scalar):
                self.assertEqual(feedtestserver._times_base(scalar), point)

    def test_der(self):
        for value, expected in (
            (feedtestserver._der(4), "0400"),
            (feedtestserver._der(4, b"ab", b"c"), "0403616263"),
            (feedtestserver._der(4, b"x" * 127)[:3], "047f78"),
            (feedtestserver._der(4, b"x" * 128)[:4], "04818078"),
            (feedtestserver._der(4, b"x" * 256)[:5], "0482010078"),
            (feedtestserver._integer(0), "020100"),
            (feedtestserver._integer(127), "02017f"),
            (feedtestserver._integer(128), "02020080"),
            (feedtestserver._integer(256), "02020100"),
            (feedtestserver._oid("2.5.29.17"), "0603551d11"),
            (feedtestserver._oid("1.2.840.113549"), "06062a864886f70d"),
            (feedtestserver._time_of(2524607999), (b"\x17\x0d" + b"491231235959Z").hex()),
            (feedtestserver._time_of(2524608000), (b"\x18\x0f" + b"20500101000000Z").hex()),
        ):
            with self.subTest(expected):
                self.assertEqual(value.hex(), expected)

    def test_what_the_ca_says_of_itself(self):
        parts = self.parsed(self.authority.certificate)
        key = self.authority.key.identifier
        self.assertEqual(len(key), 20)
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
        for host, name in (
            ("example.com", (0x82, b"example.com")),
            ("127.0.0.1", (0x87, b"\x7f\0\0\x01")),
            ("2001:db8::1", (0x87, bytes.fromhex("20010db8" + "0" * 23 + "1"))),
        ):
            with self.subTest(host):
                parts = self.parsed(self.authority.certify(host, "valid"))
                self.assertNotEqual(parts["issuer"], parts["subject"])
                self.assertEqual(
                    parts["extensions"],
                    {
                        self.BASIC_CONSTRAINTS: (True, [(0x30, [])]),
                        self.KEY_USAGE: (True, [(3, b"\x07\x80")]),  # digitalSignature
                        self.EXTENDED_KEY_USAGE: (False, [(0x30, [(6, server_auth)])]),
                        self.ALTERNATIVE_NAME: (False, [(0x30, [name])]),
                        self.SUBJECT_KEY: (False, [(4, self.authority.server_key.identifier)]),
                        self.AUTHORITY_KEY: (
                            False,
                            [(0x30, [(0x80, self.authority.key.identifier)])],
                        ),
                    },
                )

    def test_when_it_is_valid(self):
        noon = 1_236_427_200  # 2009-03-07 12:00:00
        for kind, begin, end in (
            ("valid", b"090306120000Z", b"100407120000Z"),
            ("wrong-host", b"090306120000Z", b"100407120000Z"),
            ("self-signed", b"090306120000Z", b"100407120000Z"),
            ("expired", b"080203120000Z", b"090306120000Z"),
            ("not-yet-valid", b"090308120000Z", b"100409120000Z"),
        ):
            with self.subTest(kind), mock.patch("feedtestserver._system_time", lambda: noon):
                parts = self.parsed(self.authority.certify("example.com", kind))
                self.assertEqual(parts["validity"], [(0x17, begin), (0x17, end)])

    def test_who_has_signed_it(self):
        theirs = self.parsed(self.authority.certificate)["subject"]
        for kind in feedtestserver._CERTIFICATE_KINDS:
            with self.subTest(kind):
                parts = self.parsed(self.authority.certify("example.com", kind))
                mine = parts["subject"] == parts["issuer"]
                self.assertEqual(mine, kind == "self-signed")
                self.assertEqual(parts["issuer"] == theirs, kind != "self-signed")

    def test_no_two_have_a_serial_number_or_a_ca_in_common(self):
        certificates = [self.authority.certify("a.example", "valid") for _ in range(3)]
        certificates.append(feedtestserver._Authority().certify("a.example", "valid"))
        parsed = [self.parsed(certificate) for certificate in certificates]
        self.assertEqual(len({parts["serial"] for parts in parsed}), 4)
        self.assertTrue(all(0 < len(parts["serial"]) <= 20 for parts in parsed))
        self.assertTrue(all(parts["serial"][0] < 128 for parts in parsed))
        self.assertNotEqual(parsed[0]["issuer"], parsed[3]["issuer"])

    def test_it_goes_by_the_system_s_clock_whatever_python_s_says(self):
        begun = self.parsed(self.authority.certificate)["validity"]
        with mock.patch("time.time", lambda: 0.0):
            later = self.parsed(feedtestserver._Authority().certificate)["validity"]
        self.assertEqual(begun[0][1][:4], later[0][1][:4])

    def test_the_lines_of_pem(self):
        pem = self.authority.pem
        self.assertEqual(ssl.PEM_cert_to_DER_cert(pem), self.authority.certificate)
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

    def test_a_large_file_is_streamed(self):
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

    def test_a_file_that_shrinks_while_it_is_sent(self):
        server = self.serve({"a.bin": bytes(20_000_000)})
        path = os.path.join(server.directory, "a.bin")
        with connect(server) as connection:
            connection.sendall(b"GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
            server.wait_for_request("/a.bin")
            os.truncate(path, 10)
            self.assertLess(len(read_all(connection)), 20_000_000)
        self.assertRegex(server.errors[0], "the file ends [0-9]+ bytes too early: .*a.bin")
        response = server.requests[0].response
        self.assertEqual(repr(response._content), f"<20000000 bytes of {path}>")
        os.remove(path)
        with self.assertRaises(FileNotFoundError):
            self.assertEqual(response.body, b"")

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
            ("https://EXAMPLE.com:8443/feed.xml", 200),
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
        self.assertEqual(server.requests[1].url, "https://example.com:8443/feed.xml")
        self.assertEqual(len(server.errors), 5)
        self.assertEqual(
            server.errors[1],
            "GET http://unknown.example/feed.xml: no such host here; the folder"
            f" {os.path.join(server.directory, 'unknown.example')}"
            " or respond('http://unknown.example/feed.xml', ...) would answer",
        )

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


class FaultTest(ServerTestCase):
    """Slowness and faults, as the client sees them."""

    BODY = bytes(range(256)) * 4
    GET = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"

    def serve_one(self, server_class=FeedTestServer, **arguments):
        server = self.serve(server_class=server_class)
        server.respond("/x", Response(**{"body": self.BODY, **arguments}))
        server._timer = NoTimePasses()
        return server

    def fetch(self, server):
        """What comes of the body, and how it ends; the head has to be whole or not there."""
        with connect(server) as connection:
            connection.sendall(self.GET)
            received, end = read_to_the_end(connection)
        head, found, body = received.partition(b"\r\n\r\n")
        self.assertEqual(bool(head), bool(found))
        return body if head else None, end

    def test_places(self):
        big = os.urandom(3_000_000)
        for body, place, arrived in (
            (self.BODY, "", None),
            (self.BODY, " at start", None),
            (self.BODY, " at headers", b""),
            (self.BODY, " at 100", self.BODY[:100]),
            (self.BODY, " at 50%", self.BODY[:512]),
            (self.BODY, " at 100%", self.BODY),
            (big, " at 2500000", big[:2_500_000]),
        ):
            for kind, end in (("close", "FIN"), ("reset", "RST"), ("stall", "FIN")):
                with self.subTest(place, kind=kind):
                    server = self.serve_one(body=body, fault=kind + place)
                    self.assertEqual(self.fetch(server), (arrived, end))
                    self.assertEqual(INFINITY in server._timer.waits, kind == "stall")
                    server.stop()

    def test_urllib_tells_them_apart(self):
        for fault, error in (
            ("close", http.client.RemoteDisconnected),
            ("reset", ConnectionResetError),
            ("close at 100", http.client.IncompleteRead),
            ("reset at 100", ConnectionResetError),
            ("stall", socket.timeout),
            ("stall at 100", socket.timeout),
        ):
            for chunked in (None, 30):
                with self.subTest(fault, chunked=chunked):
                    server = self.serve_one(fault=fault, chunked=chunked)
                    server._timer = feedtestserver._Timer()
                    url, timeout = server.get_url("x"), 0.05 if "stall" in fault else PATIENCE
                    with self.assertRaises(error) as caught, contextlib.ExitStack() as stack:
                        stack.enter_context(urllib.request.urlopen(url, timeout=timeout)).read()
                    self.assertIs(type(caught.exception), error)
                    server.stop()

    def test_a_reset_waits_until_what_was_sent_has_arrived(self):
        for in_flight, waits in (([0], []), ([900, 900, 5, 0], [0.001, 0.002, 0.004])):
            server = self.serve_one(fault="reset at 100")
            with mock.patch.object(feedtestserver, "_in_flight", side_effect=in_flight):
                self.assertEqual(self.fetch(server), (self.BODY[:100], "RST"))
            self.assertEqual(server._timer.waits, waits)

    @unittest.skipUnless(sys.platform.startswith("linux"), "only Linux is asked")
    def test_what_is_in_flight(self):
        sender, receiver = socket.socketpair()
        with sender, receiver:
            self.assertEqual(feedtestserver._in_flight(sender), 0)
            sender.sendall(b"x")
            self.assertGreater(feedtestserver._in_flight(sender), 0)

    def watched(self, response):
        """A server with that answer, and events: it waits, it is done with a connection."""

        class Handler(FeedTestRequestHandler):
            def finish(self):
                super().finish()
                finished.set()

        class Timer(feedtestserver._Timer):
            def wait(self, connection, seconds, event):
                waiting.set()
                return super().wait(connection, seconds, event)

        class Server(FeedTestServer):
            handler_class = Handler

        waiting, finished = threading.Event(), threading.Event()
        server = self.serve(server_class=Server)
        server._timer = Timer()
        server.respond("/x", response)
        return server, waiting, finished

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
        ):
            for leaves in (True, False):
                server, waiting, finished = self.watched(Response(self.BODY, **arguments))
                with self.subTest(arguments, leaves=leaves), connect(server) as connection:
                    connection.sendall(self.GET)
                    self.assertTrue(waiting.wait(PATIENCE))
                    if leaves:
                        connection.close()
                        self.assertTrue(finished.wait(PATIENCE))
                        self.assertEqual(self.get(server, "/none").status, 404)
                    server.stop()
                    self.assertEqual(server.errors, [])

    def test_who_waits_does_not_hurry_when_the_server_stops(self):
        """Sending the rest at once, hundreds would keep the server from ending them."""
        waiting, waits_again = threading.Event(), threading.Event()

        class Timer(feedtestserver._Timer):
            def wait(self, connection, seconds, event):
                if server._httpd.stopping:
                    waits_again.set()
                    return super().wait(connection, seconds, event)
                waiting.set()
                with server._changed:
                    server._changed.wait_for(lambda: server._httpd.stopping, PATIENCE)
                return False

        def hang_up(connection):
            waits_again.wait(PATIENCE)
            connection.shutdown(socket.SHUT_RDWR)

        server = self.serve()
        server._timer = Timer()
        server.respond("/x", Response(self.BODY, rate=10))
        with connect(server) as connection:
            connection.sendall(self.GET)
            self.assertTrue(waiting.wait(PATIENCE))
            with mock.patch.object(feedtestserver, "_hang_up", hang_up):
                server.stop()
            self.assertTrue(waits_again.is_set())
            body = read_all(connection).partition(b"\r\n\r\n")[2]
        self.assertEqual(body, self.BODY[:1])

    def test_a_reset_that_waits_ends_when_the_client_leaves_or_the_server_stops(self):
        for leaves in (True, False):
            server, waiting, finished = self.watched(Response(self.BODY, fault="reset at 100"))
            never = mock.patch.object(feedtestserver, "_in_flight", return_value=1)
            with self.subTest(leaves=leaves), never, connect(server) as connection:
                connection.sendall(self.GET)
                self.assertTrue(waiting.wait(PATIENCE))
                if leaves:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    connection.close()
                    self.assertTrue(finished.wait(PATIENCE))
                server.stop()

    def test_a_reset_awaits_a_client_that_has_shut_down_the_sending_side(self):
        body = os.urandom(3_000_000)
        server = self.serve_one(body=body, fault="reset at 100%")
        server._timer = feedtestserver._Timer()
        with connect(server) as connection:
            connection.sendall(self.GET)
            connection.shutdown(socket.SHUT_WR)
            received, end = read_to_the_end(connection)
        self.assertEqual((received.partition(b"\r\n\r\n")[2] == body, end), (True, "RST"))

    def test_a_reset_though_more_was_sent(self):
        server = self.serve_one(fault="reset at 100")
        with connect(server) as connection:
            connection.sendall(self.GET * 3)
            received, end = read_to_the_end(connection)
        self.assertEqual((received.partition(b"\r\n\r\n")[2], end), (self.BODY[:100], "RST"))
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

    def test_who_shuts_down_the_sending_side_gets_the_rest_at_once(self):
        server = self.serve()
        server.respond("/x", Response(self.BODY, delay=86400, rate=1, headers=CLOSE))
        with connect(server) as connection:
            connection.sendall(self.GET)
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(Answer(read_all(connection)).body, self.BODY)

    def test_a_close_is_no_reset_though_more_was_sent(self):
        closing = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        plain = {"headers": {"ETag": '"1"'}}
        asis = {"body": b"HTTP/1.0 200 OK\r\n\r\n" + bytes(3_000_000), "asis": True}
        for request, arguments in (
            (self.GET, {"fault": "close at 100%"}),
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

    def test_requests_that_arrive_meanwhile_are_kept(self):
        class Timer(NoTimePasses):
            def wait(self, connection_there, seconds, event):
                if self.waits:
                    return super().wait(connection_there, seconds, event)
                self.waits.append(seconds)
                connection.sendall(b"GET /y HTTP/1.1\r\nHost: x\r\n\r\n")
                self.time += 0.25
                return feedtestserver._Timer().wait(connection_there, PATIENCE, event)

        server = self.serve_one(delay=1, rate=100_000)
        server.respond("/y", Response(b"y", headers=CLOSE))
        server._timer = Timer()
        with connect(server) as connection:
            connection.sendall(self.GET)
            first = Answer(read_all(connection))
        self.assertEqual(server._timer.waits[:2], [1, 0.75])
        self.assertEqual((first.body, Answer(first.rest).body), (self.BODY, b"y"))

    @unittest.skipIf(feedtestserver._LEFT == feedtestserver._READABLE, "poll() knows no POLLRDHUP")
    def test_no_more_than_so_much_is_kept(self):
        class Timer(NoTimePasses):
            def wait(self, connection, seconds, event):
                self.waits.append(event)
                if event == feedtestserver._READABLE:
                    return feedtestserver._Timer().wait(connection, PATIENCE, event)
                self.time += seconds
                return False

        server = self.serve_one(delay=1, headers=CLOSE)
        server._timer = Timer()
        limit = mock.patch.object(feedtestserver, "_MAX_BODY", 1_000_000)
        with limit, connect(server) as connection:
            connection.sendall(self.GET + b"GET /y HTTP/1.1\r\nHost: x\r\n\r\n" * 60_000)
            self.assertEqual(Answer(read_all(connection)).body, self.BODY)
        self.assertEqual(server._timer.waits[-1], feedtestserver._LEFT)
        self.assertLess(len(server._timer.waits), 1000)

    def test_waits_keep_nobody_else_waiting(self):
        server = self.serve()
        server.respond("/x", Response(fault="stall"))
        with contextlib.ExitStack() as stack:
            for number in range(1, 6):
                stack.enter_context(connect(server)).sendall(self.GET)
                server.wait_for_request("/x", times=number)
                self.assertEqual(self.get(server, "/none").status, 404)

    def test_codings_keep_nobody_else_waiting(self):
        begun, ended = threading.Event(), threading.Event()

        def coded(response):
            if response.compress:
                begun.set()
                ended.wait(3 * PATIENCE)
            return response._content

        server = self.serve_one(compress="gzip")
        with mock.patch.object(feedtestserver, "_coded", coded), connect(server) as connection:
            connection.sendall(self.GET)
            self.assertTrue(begun.wait(PATIENCE))
            self.assertEqual(self.get(server, "/none").status, 404)
            ended.set()

    def test_chunks_keep_nobody_else_waiting(self):
        server = self.serve_one(chunked=1)
        begun, ended = threading.Event(), threading.Event()

        def in_chunks(*args):
            begun.set()
            ended.wait(3 * PATIENCE)
            return b""

        slow = mock.patch.object(feedtestserver, "_in_chunks", in_chunks)
        with slow, connect(server) as connection:
            connection.sendall(self.GET)
            self.assertTrue(begun.wait(PATIENCE))
            self.assertEqual(self.get(server, "/none").status, 404)
            ended.set()

    def test_a_callable_that_stops_the_server_and_answers_by_a_stall(self):
        server = self.serve()

        def answer(request):
            server.stop()
            return Response(self.BODY, delay=86400, fault="stall at 100")

        server.respond("/x", answer)
        self.assertEqual(self.fetch(server), (self.BODY[:100], "FIN"))

    def test_http_1_0_gets_no_chunks(self):
        server = self.serve_one(chunked=10)
        answer = exchange(server, b"GET /x HTTP/1.0\r\n\r\n")
        self.assertTrue(answer.endswith(b"\r\n\r\n" + self.BODY))
        self.assertIsNone(server.requests[0].response.chunked)
        self.get(server, "/x")
        self.assertEqual(server.requests[1].response.chunked, 10)

    def test_large_files(self):
        body = os.urandom(700_001)
        server = self.serve({"a.bin": body})
        server._timer = NoTimePasses()
        plain = server._named("a.bin")
        for changes in (
            {"chunked": 7},
            {"chunked": 99_999},
            {"chunked": 400_000},
            {"rate": 33_333},
        ):
            with self.subTest(changes):
                server.respond("/x", plain._but(**changes))
                self.assertEqual(self.get(server, "/x").content, body)
        self.assertEqual(len(server._timer.waits), -(-700_001 // 3333))
        response = self.get(server, "/a.bin", headers={"Range": "bytes=300000-599999"})
        self.assertEqual((response.status, response.content), (206, body[300_000:600_000]))
        self.assertEqual(server.requests[-1].response.body, body[300_000:600_000])
        server.respond("/x", plain._but(compress="gzip"))
        self.assertEqual(gzip.decompress(self.get(server, "/x").content), body)
        server.respond("/x", plain._but(fault="reset at 600000"))
        self.assertEqual(self.fetch(server), (body[:600_000], "RST"))
        server.respond("/x", plain._but(fault="close at 50%"))
        with self.assertRaises(http.client.IncompleteRead) as caught:
            self.get(server, "/x", headers={"Range": "bytes=100000-499999"})
        self.assertEqual(caught.exception.partial, body[100_000:300_000])

    def test_resumed(self):
        body = os.urandom(5000)
        server = self.serve({"a.mp3": body, "a.mp3.headers": b'Header: ETag: "1"'})
        server.respond("/a.mp3", server._named("a.mp3")._but(fault="close at 40%"), "a.mp3")
        with self.assertRaises(http.client.IncompleteRead) as caught:
            self.get(server, "/a.mp3")
        first = caught.exception.partial
        headers = {"Range": f"bytes={len(first)}-", "If-Range": '"1"'}
        rest = self.get(server, "/a.mp3", headers=headers)
        self.assertEqual((rest.status, first + rest.content), (206, body))

    def test_an_answer_as_it_is(self):
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
            self.assertEqual(read_to_the_end(connection), (wire[:9], "RST"))

    def test_directives_of_an_answer_as_it_is(self):
        wire = b"HTTP/1.1 204 \r\n\r\n" + comment("Status: 410", "Delay: 3", "Expect: x")
        server = self.serve({"slow.asis": wire})
        server._timer = NoTimePasses()
        self.assertEqual(exchange(server, b"GET /slow.asis HTTP/1.1\r\nHost: x\r\n\r\n"), wire)
        self.assertEqual(server._timer.waits, [3])
        self.assertEqual(str(server.requests[0]), "GET /slow.asis -> 204")

    def test_an_answer_on_record_can_be_given_again(self):
        server = self.serve_one(compress="gzip", chunked=5, rate=1000, delay=1)
        first = self.get(server, "/x")
        server.respond("/x", server.requests[0].response)
        again = self.get(server, "/x")
        self.assertEqual(first.headers.items(), again.headers.items())
        self.assertEqual(first.content, again.content)


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

    def received(self, fixture):
        """All that comes for a fixture, whether the connection then goes on, and how it ends."""
        target = fixture.url[len(self.base_url) :].encode()
        both = (
            b"GET %s HTTP/1.1\r\nHost: x\r\n\r\nGET /the-end HTTP/1.1\r\nHost: x\r\n\r\n" % target
        )
        with connect(self.server) as connection:
            connection.sendall(both)
            received, end = read_to_the_end(connection)
        wire, goes_on, _ = received.partition(b"HTTP/1.1 299 The end\r\n")
        return wire, bool(goes_on), end

    def seen(self, fixture):
        """What a fixture looks like on the wire, and to http.client."""
        self.server._timer = timer = NoTimePasses()
        wire, goes_on, end = self.received(fixture)
        seen = {"wire": wire, "goes_on": goes_on, "end": end, "waits": timer.waits, "error": None}
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
                with self.subTest(fixture.name, expect=expectation):
                    self.assertTrue(eval(expectation, names), f"{seen!r:.1000}")

    def test_every_directive_is_shown(self):
        shown = {
            key.lower()
            for fixture in self.server.fixtures()
            for key, _ in fixture.directives.items()
        }
        self.assertEqual(set(feedtestserver._RULES) - shown, set())


# HTTPS


class TlsTest(ServerTestCase):
    FILES = {"feed.xml": comment("Header: X-URL: {{base_url}}")}

    def shake_hands(self, server, name="localhost", context=None):
        """A connection in TLS to a server."""
        context, connection = context or server.ssl_context(), connect(server)
        self.addCleanup(connection.close)
        return context.wrap_socket(connection, server_hostname=name)

    def exchange(self, server, *parts):
        with self.shake_hands(server) as connection:
            for part in parts:
                connection.sendall(part)
            return read_all(connection)

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
        self.assertEqual(server.requests[0]._address, server.requests[1]._address)

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
        server = self.serve()
        server._timer = NoTimePasses()
        server.respond("/feed.xml", response)
        secret, plain = self.exchange(server, LAST), exchange(server, LAST)
        self.assertEqual(secret, plain)
        self.assertEqual(server._timer.waits[0], 3)

    def test_a_proper_end_is_announced_and_a_fault_is_not(self):
        server = self.serve()
        context = server.ssl_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # the types of its records can be seen
        for fault, end in (
            (None, (21, "FIN")),  # an alert: close_notify
            ("close at 5", (23, "FIN")),
            ("close at 100%", (23, "FIN")),
            ("reset at 5", (23, "RST")),
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

    def test_who_is_made_to_wait_may_leave(self):
        server = self.serve()
        server.respond("/feed.xml", Response(delay=999_999_999))
        finished = self.finished(server)
        with self.shake_hands(server) as connection:
            connection.sendall(LAST)
            server.wait_for_request("/feed.xml")
        self.assertTrue(finished.wait(PATIENCE))

    def finished(self, server):
        """An event that comes when a connection has ended on the server's side."""
        finished = threading.Event()
        end = server._httpd.shutdown_request

        def end_and_tell(connection):
            end(connection)
            finished.set()

        server._httpd.shutdown_request = end_and_tell
        return finished

    def request_then_close_notify(self, server, meanwhile=None):
        """Send a request, say in TLS that no more will come, and return all that comes in TCP."""
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
            with contextlib.suppress(ssl.SSLWantReadError):  # it would wait for the server's
                client.unwrap()
            connection.sendall(outgoing.read())
            return read_all(connection)

    def test_a_close_notify_ends_the_connection_after_the_response(self):
        server = self.serve(self.FILES)
        self.assertGreater(len(self.request_then_close_notify(server)), 100)
        server.wait_for_request("/feed.xml")

    def test_a_close_notify_ends_a_delay(self):
        server = self.serve()
        server.respond("/feed.xml", Response(bytes(1000), delay=999_999_999))
        received = self.request_then_close_notify(
            server, lambda: server.wait_for_request("/feed.xml")
        )
        self.assertGreater(len(received), 1000)

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
                    r"certificate: found .*; it takes one of 'valid', 'expired', 'not-yet",
                ),
            ):
                server.certificate = kind
        self.assertEqual(server.certificate, "valid")

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
            (
                "TLS handshake for '../etc.no' failed: that is no name of a host",
                hello.replace(b"a.example", b"../etc.no"),
                b"\x15\x03\x03\x00\x02\x02\x70",
            ),
            (
                r"TLS handshake for 'a.examp\\xe9\\xff' failed: that is no name of a host",
                hello.replace(b"a.example", b"a.examp\xe9\xff"),
                b"\x15\x03\x03\x00\x02\x02\x70",
            ),
            (
                r"TLS handshake for 'a.ex\\x00mple' failed: that is no name of a host",
                hello.replace(b"a.example", b"a.ex\0mple"),
                b"\x15\x03\x03\x00\x02\x02\x70",
            ),
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

    def test_a_certificate_that_cannot_be_made_is_an_error(self):
        server = self.serve()
        feedtestserver._server_context.cache_clear()
        no_room = mock.patch("tempfile.mkstemp", side_effect=OSError(errno.ENOSPC, "no room"))
        with no_room, connect(server) as connection:
            connection.sendall(hello_for("a.example"))
            self.assertEqual(read_all(connection), b"")
        error = f"there is no certificate for a.example: [Errno {errno.ENOSPC}] no room"
        self.assertEqual(server.errors, [error])

    def test_first_bytes_of_any_kind(self):
        chance = random.Random(2009)
        hello = hello_for("a.example")
        threads, descriptors = set(threading.enumerate()), open_descriptors()
        server = self.serve()
        for number in range(500):
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
        server = self.serve()
        server.respond("/feed.xml", bytes(20_000_000))
        with contextlib.ExitStack() as stack:
            unread = stack.enter_context(self.shake_hands(server))
            unread.sendall(LAST)
            server.wait_for_request("/feed.xml")
            for size in (1, 5, 100, None):
                connection = stack.enter_context(connect(server))
                connection.sendall(hello_for("a.example")[:size])
            stack.enter_context(self.shake_hands(server))
            server.stop()
            self.assertEqual(server._httpd._working, set())

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
            RuntimeError, "ca.pem is there only while the server is running"
        ):
            _ = server.ca_file
        with self.assertRaises(RuntimeError):
            _ = FeedTestServer(HERE).ca_file

    def test_no_file_is_left(self):
        folder, server = self.make_directory(), self.serve(self.FILES)
        with mock.patch("tempfile.tempdir", str(folder)):
            feedtestserver._server_context.cache_clear()
            self.exchange(server, LAST)  # the key is in a file for as long as it is read
            self.assertEqual(list(folder.iterdir()), [])
            self.assertEqual([server.ca_file], [str(path) for path in folder.iterdir()])
            server.stop()
        self.assertEqual(list(folder.iterdir()), [])

    def test_no_file_is_left_where_there_is_no_room(self):
        folder = self.make_directory()
        full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        server = self.serve()
        with (
            mock.patch("tempfile.tempdir", str(folder)),
            mock.patch.object(feedtestserver, "open", full, create=True),
            self.assertRaisesRegex(OSError, "No space left"),
        ):
            _ = server.ca_file
        os.close(full.call_args.args[0])
        self.assertEqual(os.listdir(folder), [])

    def test_no_second_stop_returns_before_the_files_are_gone(self):
        server = self.serve()
        unlink, held = os.unlink, []

        def note(path):
            # Another thread's stop() would wait.
            run_at_once([lambda: held.append(not server._changed.acquire(blocking=False))])
            unlink(path)

        _ = server.ca_file
        with mock.patch("os.unlink", note):
            server.stop()
        self.assertEqual(held, [True])

    def test_the_file_goes_with_a_process_that_forgets_to_stop(self):
        code = (
            "import feedtestserver, os, sys\n"
            "server = feedtestserver.FeedTestServer('data'); server.start()\n"
            "print(server.ca_file, flush=True)\n"
            "if hasattr(os, 'fork'):\n"
            "    child = os.fork()\n"
            "    if not child: sys.exit()\n"
            "    os.waitpid(child, 0)\n"
            "assert os.path.exists(server.ca_file)\n"
        )
        done = run_script(code)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertFalse(os.path.exists(done.stdout.strip()))

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
        words = (
            "the CA was not made before the fork: call ssl_context() or read ca_file before it\n"
        )
        self.assertEqual((done.stdout, done.stderr), (words, ""))

    def test_nothing_is_made_for_who_does_not_need_it(self):
        code = (
            "import feedtestserver, sys, urllib.request\n"
            "with feedtestserver.FeedTestServer('data') as server:\n"
            "    url = server.fixtures('*/*.xml')[0].url\n"
            "    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).close()\n"
            "print(feedtestserver._authorities, server._files)"
        )
        done = run("-B", "-c", code)
        self.assertEqual((done.stdout, done.stderr), ("{} {}\n", ""))


# Any host


class InterceptionTest(ServerTestCase):
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
        names = ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr")
        return (
            dict(os.environ),
            [getattr(socket, name) for name in names],
            [dict(vars(owner)) for owner in (socket.socket, ssl.SSLContext)],
            urllib.request._opener,
        )

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

    def test_urls_without_a_host(self):
        for url in ("https://", "http:///x", "http://:80/", "http://exa mple/", "https://a:b/"):
            with (
                self.subTest(url),
                self.assertRaisesRegex(
                    ValueError, "found '.*' in a URL; it takes the name of a host there"
                ),
            ):
                self.serve().respond(url, 200)

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
        authority = feedtestserver._Authority()
        with mock.patch.object(feedtestserver, "_authority", lambda: authority):
            service = self.serve(self.FILES)
            context = service.ssl_context()
            feedtestserver._server_context.cache_clear()
            self.addCleanup(feedtestserver._server_context.cache_clear)
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
            self.assertIsNot(seen[-1].context, context)
            listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls = listening.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
            self.assertIs(tls.context, listening)
            with contextlib.closing(connect(server)) as connection:
                tls = listening.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                self.assertIs(seen[-1].context, listening)
                tls.close()

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
        for host in ("fe80::1%eth0", "::1", "1", "127.1", "0x7f.1", b"::1", "", None, 1):
            with self.subTest(host):
                self.assertFalse(feedtestserver._is_elsewhere(host))

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

    def unused_port(self):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            return listening.getsockname()[1]

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
        for find in (
            lambda: socket.getaddrinfo("example.com", None),
            lambda: socket.getaddrinfo("example.com", "http"),
            lambda: socket.gethostbyname("example.com"),
            lambda: socket.gethostbyname_ex("example.com"),
        ):
            with server.intercept():
                find()
                self.assertEqual(feedtestserver._interceptions[-1].ports, {80, 443})

    def test_services_on_this_machine_are_left_alone(self):
        """Also at the port that a host was asked for."""
        with socket.create_server(("127.0.0.1", 0)) as service, self.serve().intercept():
            for name in ("localhost", "example.com"):
                unknown = (OSError,) if name == "localhost" else ()  # not every system knows it
                with contextlib.suppress(*unknown):
                    socket.getaddrinfo(name, service.getsockname()[1])
                with socket.create_connection(service.getsockname()) as connection:
                    self.assertEqual(connection.getpeername(), service.getsockname())

    def called(self, name):
        """The addresses that a method of sockets gets, and a context in which it does no more."""
        called = []

        def note(connection, address):
            called.append(address)

        return called, mock.patch.object(socket.socket, name, note)

    def test_addresses_are_connected_to_as_they_are(self):
        called, stub = self.called("connect")
        with stub, self.serve().intercept(), socket.socket() as client:
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
            for send in (
                lambda sender: sender.sendto(b"2", ("example.com", 9)),
                lambda sender: sender.sendto(b"2", 0, ("example.com", 9)),
                lambda sender: sender.sendmsg([b"2"], [], 0, ("example.com", 9)),
            ):
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
                self.assertEqual(sender.sendmsg((b"3", b"4")), 2)

    @unittest.skipUnless(socket.has_ipv6, "no IPv6 here")
    def test_more_than_host_and_port(self):
        called, stub = self.called("connect")
        with stub, self.serve().intercept(), socket.socket(socket.AF_INET6) as client:
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

    def test_who_comes_to_a_proxy_stays_connected(self):
        server = self.serve(self.FILES)
        with connect(server) as connection:
            self.outlive_an_interception(server, connection, b"http://example.com/feed.xml")

    def test_the_end_of_an_inner_one_hangs_up_on_nobody(self):
        server = self.serve(self.FILES)
        with connect(server) as connection, server.intercept():
            self.outlive_an_interception(server, connection, b"/feed.xml")

    def test_who_stays_connected_is_hung_up_on_in_the_end(self):
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
        server.stop()
        self.assertEqual(server._led_here, set())

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
            self.assertEqual(server._intercepting, 0)

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
            for url, body in ((self.URL, "<rss/>"), ("https://example.com/moved.xml", "<new/>")):
                with self.subTest(url):
                    done = run("-c", code, url)
                    self.assertIn(body, done.stdout, done.stderr)

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
                    counts = [server._intercepting for server in servers]
                    self.assertEqual(counts, [number in begun for number in range(3)])
                    if begun:
                        self.assertEqual(self.fetch("http://a.example/x"), b"%d" % begun[-1])
            self.assertEqual(self.places(), before)

    def test_it_needs_a_server_that_is_running(self):
        before, server = self.places(), FeedTestServer(self.make_directory())
        words = r"intercept\(\) needs a server that is running: call start\(\) first"
        for change in (lambda: None, server.start, server.stop):
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
                words = f"GET {url}: no such host here; {answers}respond('{url}', ...) would answer"
                with caught.exception as error:
                    self.assertEqual(error.code, 502)
                    self.assertEqual(error.read().decode(), legible(words + "\n"))
                self.assertEqual(server.errors[-1], words)
        self.assertEqual(len(server.errors), 4)

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

    def test_connect_is_a_405_outside(self):
        server = self.serve(self.FILES)
        for _ in range(2):
            answer = Answer(exchange(server, b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n"))
            self.assertEqual(answer.status, 405)
            self.assertEqual(answer.headers["Allow"], "GET, HEAD, OPTIONS")
            self.assertIn(b"inside of server.intercept() it is", answer.body)
            with server.intercept():
                pass
        self.assertEqual(server.requests, [])

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
                with self.subTest(target):
                    self.assertEqual(Answer(exchange(server, request)).status, 400)
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
        done = run("-W", "error", "-c", code, str(folder))
        self.assertEqual((done.returncode, done.stderr), (0, ""))


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
            try:
                (outer / "data" / name).symlink_to(target.format(outer=outer))
            except OSError as error:
                self.skipTest(f"no symbolic links here: {error}")
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

    def test_names_and_values_are_text_in_the_listing(self):
        server = self.serve({}, feedtestserver._ShownServer)
        with contextlib.redirect_stdout(io.StringIO()):
            server.directory = str(self.make_directory({"a.xml": b"", "b.xml": comment("Status:")}))
            plain = self.tags(server)
        markup = "<script>x</script><b onclick='x' id=\"x\">&lt;"
        for odd in (markup, f"'>{markup}", f'">{markup}', "--></table>", "]]></td>", "{title}"):
            name = odd.replace("/", "\\") if os.name != "nt" else "plain"
            lines = comment(f"Description: {odd}", f"Header: X: {odd}", f"Status: 200 {odd}")
            wrong = comment(f"Status: {odd}")
            files = {f"{name}.xml": lines, f"wrong{name}.xml": wrong}
            server.directory = str(self.make_directory(files))
            with self.subTest(odd), contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual(self.tags(server), plain)

    def tags(self, server):
        """The elements of the listing, with the names of their attributes."""
        found = set()

        class Parser(html.parser.HTMLParser):
            def handle_starttag(self, tag, attributes):
                found.add(" ".join([tag, *sorted(name for name, _ in attributes)]))

        parser = Parser()
        parser.feed(self.get(server, "/").content.decode())
        parser.close()
        return found


# Life cycle


class LifeCycleTest(ServerTestCase):
    def setUp(self):
        super().setUp()
        self.threads = set(threading.enumerate())

    def assert_no_thread_is_left(self):
        self.assertEqual(set(threading.enumerate()) - self.threads, set())

    def assert_gone(self, server):
        self.assertFalse(server.is_alive())
        self.assertFalse(server.ready)
        self.assert_no_thread_is_left()
        with self.assertRaises(ConnectionRefusedError):
            connect(server)

    def test_with(self):
        with FeedTestServer(self.make_directory()) as server:
            self.assertTrue(server.ready)
            self.assertEqual(server.base_url, f"http://127.0.0.1:{server.port}")
            self.assertIsInstance(server, threading.Thread)
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
        class Server(FeedTestServer):
            def _bind(self):
                with test.assertRaisesRegex(RuntimeError, "a server is started once only"):
                    self.start()
                return super()._bind()

        test = self
        with Server(self.make_directory()) as server:
            self.assertTrue(server.ready)
        self.assert_gone(server)

    @unittest.skipUnless(importlib.util.find_spec("resource"), "no limit can be set here")
    def test_started_without_descriptors(self):
        """Nothing is imported on first use then: its file could not be opened."""
        script = """
        import os, resource, socket, sys, feedtestserver
        server = feedtestserver.FeedTestServer(sys.argv[1])
        connections = [socket.socket() for _ in range(3)]
        files = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        try:
            while True:
                files.append(open(os.devnull))
        except OSError:
            pass
        while not server.ready:
            try:
                server.start()
            except OSError as error:
                print(error.strerror)
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
        done = run_script(script, self.make_directory())
        self.assertEqual(done.stderr, "")
        *errors, last = done.stdout.splitlines()
        self.assertEqual((set(errors), last), ({os.strerror(errno.EMFILE)}, "b'HTTP/1.1 200'"))

    def test_missing_directory(self):
        directory = self.make_directory({"file": b""})
        for name, error in (("none", FileNotFoundError), ("file", NotADirectoryError)):
            server = FeedTestServer(directory / name)
            with self.assertRaisesRegex(error, "there is no such directory to serve.*" + name):
                server.start()
            server.stop()
        self.assert_no_thread_is_left()

    def test_directory_is_made_absolute_at_once(self):
        self.assertEqual(FeedTestServer("x").directory, os.path.join(os.getcwd(), "x"))

    def test_no_url_before_start(self):
        with self.assertRaisesRegex(RuntimeError, r"start\(\) must be called first"):
            FeedTestServer().get_url("x")

    def test_port_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = FeedTestServer(self.make_directory(), port=port, bind_timeout=0)
            with self.assertRaisesRegex(
                OSError, f"port {port} of 127.0.0.1 cannot be had: "
            ) as caught:
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

    def test_no_connection_keeps_another_waiting(self):
        """Whatever the only thread is busy with, the next connection is answered."""
        release, entered = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        def block():
            entered.set()
            release.wait(3 * PATIENCE)  # longer than a client waits

        class Handler(FeedTestRequestHandler):
            def do_POST(self):
                block()
                self.reply(Response())

            def do_GET(self):
                if self.received.path == "/get":
                    block()
                super().do_GET()

        class Server(FeedTestServer):
            handler_class = Handler

        def step(request):
            block()
            return 200

        for name, sent in (
            ("idle", b""),
            ("half a head", b"GET / HT"),
            ("half a body", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"),
            ("kept alive", b"GET /feed.xml HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("large response, not read", b"GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("responses not read", b"GET /b.bin HTTP/1.1\r\nHost: x\r\n\r\n" * 500),
            ("refused, not closed", b"GET /\r\n\r\n"),
            ("callable", b"GET /block HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("do_ method that calls another", b"HEAD /get HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("do_ method", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"),
        ):
            files = {"feed.xml": b"<rss/>", "a.bin": bytes(20_000_000), "b.bin": bytes(60_000)}
            server = self.serve(files, Server if "do_" in name else FeedTestServer)
            server.respond("/block", step)
            with self.subTest(name), connect(server) as connection:
                connection.sendall(sent)
                if "callable" in name or "do_" in name:
                    self.assertTrue(entered.wait(PATIENCE))
                elif "read" in name:
                    server.wait_for_request()
                for _ in range(3):
                    self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")
            release.set()
            server.stop()
            release.clear()
            entered.clear()

    def test_one_connection_after_the_other_takes_one_thread(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        for _ in range(5):
            exchange(server, HEAD + b"Connection: close\r\n\r\n")
        self.assertEqual(server._httpd._threads, [])

    def test_stop_from_ten_threads(self):
        server = self.serve()
        run_at_once([server.stop] * 10)
        self.assert_gone(server)

    def test_stop_names_the_callable_that_runs(self):
        server = self.serve()
        server.stop_timeout = 0.01
        entered, release = threading.Event(), threading.Event()

        def answer(request):
            entered.set()
            release.wait(PATIENCE)
            return 200

        server.respond("/slow", answer)
        with connect(server) as connection:
            connection.sendall(b"GET /slow?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
            entered.wait(PATIENCE)
            with self.assertRaisesRegex(
                RuntimeError,
                r"^stop\(\) waited 0.01 s for the callable that answers GET /slow\?x=1;"
                " it must come to an end by itself$",
            ):
                server.stop()
            with self.assertRaises(ConnectionRefusedError):
                connect(server)
            release.set()
            server.stop_timeout = PATIENCE
            server.stop()
        self.assert_gone(server)

    def test_stop_while_it_starts(self):
        class Server(FeedTestServer):
            def run(self):
                self._httpd.request_shutdown()
                super().run()

        server = Server(self.make_directory())
        server.start()
        server.stop()
        self.assert_gone(server)

        class Bound(FeedTestServer):
            def _bind(self):
                httpd = self._httpd = super()._bind()
                self.stop()
                return httpd

        server = Bound(self.make_directory())
        server.start()
        server.stop()
        self.assert_gone(server)

    def test_stop_that_is_interrupted_and_called_again(self):
        server = self.serve()
        hang_up, connections = feedtestserver._hang_up, [connect(server) for _ in range(3)]
        while len(server._httpd._connections) < 3:
            exchange(server, b"\n")
        interrupted = mock.Mock(side_effect=[None, KeyboardInterrupt])
        patch = mock.patch.object(feedtestserver, "_hang_up", interrupted)
        with patch, self.assertRaises(KeyboardInterrupt):
            server.stop()
        hang_up(interrupted.call_args_list[0].args[0])  # which the mock has not done
        server.stop()
        self.assert_gone(server)
        for connection in connections:
            with connection:
                self.assertEqual(read_all(connection), b"")

    def test_stop_by_another_thread_while_it_starts(self):
        class Server(FeedTestServer):
            def _bind(self):
                self._httpd = httpd = super()._bind()
                stopping.start()
                with self._changed:
                    self._changed.wait_for(lambda: httpd.stopping, PATIENCE)
                return httpd

        server = Server(self.make_directory())
        stopping = threading.Thread(target=server.stop)
        server.start()
        stopping.join()
        self.assert_gone(server)

    def test_stop_while_a_connection_is_accepted_that_is_gone(self):
        server = self.serve()
        accept, accepted, go_on = server._httpd.get_request, threading.Event(), threading.Event()

        def get_request():
            connection, address = accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            accepted.set()
            go_on.wait(PATIENCE)
            return connection, address

        server._httpd.get_request = get_request
        with contextlib.suppress(ConnectionError):
            exchange(server, HEAD + b"Connection: close\r\n\r\n")  # ends the accept() before
        connect(server).close()
        accepted.wait(PATIENCE)
        server._httpd.request_shutdown()
        go_on.set()
        server.stop()
        self.assert_gone(server)

    def test_stop_from_two_callables(self):
        server = self.serve()
        both = threading.Barrier(2)

        def answer(request):
            both.wait(PATIENCE)
            server.stop()
            return 200

        def fetch():
            with contextlib.suppress(ConnectionError):  # each ends the other's connection
                self.get(server, "/")

        server.respond("/", answer)
        run_at_once([fetch] * 2)
        server.stop()
        self.assert_gone(server)
        self.assertEqual(server.errors, [])

    def test_a_port_that_cannot_be(self):
        for port in (-1, 70000):
            server = FeedTestServer(self.make_directory(), port=port)
            with self.assertRaisesRegex(OSError, f"there is no port {port}: "):
                server.start()

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
            (lambda: 253402300800.0, "ValueError"),  # the year 10000
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
            def plan(self, request, response):
                return sys.exit() if request.path == "/exit" else super().plan(request, response)

        class Server(FeedTestServer):
            handler_class = Handler

        server = self.serve({"feed.xml": b"<rss/>"}, Server)
        self.assertEqual(exchange(server, b"GET /exit HTTP/1.1\r\nHost: x\r\n\r\n"), b"")
        self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")

    def test_stop_from_inside_a_callable(self):
        server = self.serve()

        def answer(request):
            server.stop()
            return b"stopped"

        server.respond("/", answer)
        self.assertEqual(self.get(server, "/").content, b"stopped")
        server.stop()
        self.assert_gone(server)

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
        with connect(server) as connection:
            connection.sendall(b"QUIT / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(server._wait_ended(PATIENCE))
            self.assertEqual(Answer(read_all(connection)).body, b"the server has stopped\n")
        server.stop()
        self.assert_gone(server)

    def test_quit_where_nobody_answers(self):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]

            def hang_up():
                with listening.accept()[0] as connection:
                    connection.recv(65536)

            thread = threading.Thread(target=hang_up)
            thread.start()
            with self.assertRaisesRegex(ConnectionError, f"^127.0.0.1:{port} did not answer QUIT"):
                stop_server(port)
            thread.join()

    def test_quit_where_nobody_says_anything(self):
        connect = socket.create_connection

        def connect_impatiently(address, timeout=None):
            self.assertEqual(timeout, 10)
            socket.create_connection = connect
            return connect(address, 0.01)

        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            impatiently = mock.patch.object(socket, "create_connection", connect_impatiently)
            with impatiently, self.assertRaisesRegex(ConnectionError, "did not answer QUIT"):
                stop_server(port)

    def test_quit_is_for_clients_on_this_machine(self):
        for address, loopback in (
            ("127.0.0.1", True),
            ("127.1.2.3", True),
            ("::1", True),
            ("::ffff:127.0.0.1", True),
            ("192.0.2.1", False),
            ("1127.0.0.1", False),
            ("::2", False),
        ):
            with self.subTest(address):
                self.assertEqual(feedtestserver._is_loopback(address), loopback)

        class Elsewhere(FeedTestRequestHandler):
            def do_QUIT(self):
                self.client_address = ("192.0.2.1", 1)
                super().do_QUIT()

        server = self.serve()
        server._httpd.RequestHandlerClass = lambda *args: Elsewhere(server, *args)
        with self.assertRaisesRegex(PermissionError, "answered QUIT with 'HTTP/1.1 403 Forbidden'"):
            stop_server(server.port)
        self.assertTrue(server.ready)

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
        server = self.serve({"feed.xml": b"<rss/>"})
        httpd = server._httpd
        accept, failures = httpd.get_request, [OSError(errno.EMFILE, "Too many open files")] * 3

        def get_request():
            accepted = accept()
            with contextlib.suppress(IndexError):
                failure = failures.pop()
                accepted[0].close()
                raise failure
            return accepted

        httpd.get_request = get_request
        with self.assertLogs("feedtestserver", logging.INFO) as logged:
            while failures:
                with contextlib.suppress(ConnectionError):
                    exchange(server, HEAD + b"Connection: close\r\n\r\n")
            self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")
            server.stop()
        self.assertEqual("\n".join(logged.output).count("accept failed: [Errno "), 3)

    def test_no_thread_to_be_had(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        start = threading.Thread.start

        def fail(thread):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = fail
        self.addCleanup(setattr, threading.Thread, "start", start)
        for _ in range(3):
            self.assertEqual(self.get(server, "/feed.xml").content, b"<rss/>")
        server.stop()

    def test_no_thread_for_the_server(self):
        server = FeedTestServer(self.make_directory())
        start = threading.Thread.start

        def fail(thread):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = fail
        self.addCleanup(setattr, threading.Thread, "start", start)
        with self.assertRaisesRegex(RuntimeError, "can't start new thread"):
            server.start()
        server.stop()
        with self.assertRaises(ConnectionRefusedError):
            connect(server)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_forked_child_leaves_the_server_alone(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        script = """
        import os, sys
        import urllib.request, feedtestserver
        with feedtestserver.FeedTestServer(sys.argv[1]) as server:
            child = os.fork()
            if not child:
                server.stop()
                os._exit(0)
            os.waitpid(child, 0)
            print(urllib.request.urlopen(server.get_url("feed.xml")).read())
            child = os.fork()
            if not child:
                sys.exit()
            os.waitpid(child, 0)
            print(urllib.request.urlopen(server.get_url("feed.xml")).read())
        """
        done = run_script(script, server.directory)
        self.assertEqual((done.stdout, done.stderr), ("b'<rss/>'\nb'<rss/>'\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork() here")
    def test_a_child_forked_in_a_callable_serves_nobody(self):
        script = """
        import os, sys
        import urllib.request, feedtestserver
        def answer(request):
            child = os.fork()
            if not child:
                sys.exit()
            return f"{os.waitpid(child, 0)[1]}".encode()
        with feedtestserver.FeedTestServer(sys.argv[1]) as server:
            server.respond("/x", answer)
            for _ in range(3):
                print(urllib.request.urlopen(server.get_url("x"), timeout=20).read())
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.stdout, done.stderr), ("b'0'\n" * 3, ""))

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
        import os, sys, feedtestserver
        feedtestserver._Interception.lock.acquire()  # as another thread may have
        child = os.fork()
        if not child:
            with feedtestserver.FeedTestServer(sys.argv[1]) as server, server.intercept():
                os._exit(0)
        print(os.waitpid(child, 0)[1])
        """
        done = run_script(script, self.make_directory())
        self.assertEqual((done.stdout, done.stderr), ("0\n", ""))

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
        with urllib.request.urlopen(server.get_url("feed.xml")) as answer:
            self.assertEqual(answer.read(), b"<rss/>")
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

    def start(self, handler):
        server = StoppableHttpServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        return server, thread

    def test_any_handler(self):
        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        server, thread = self.start(functools.partial(Handler, directory=HERE / "data"))
        url = f"http://127.0.0.1:{server.server_port}/headers/plain.xml"
        with urllib.request.urlopen(url) as answer:
            self.assertEqual(answer.read(), (HERE / "data" / "headers" / "plain.xml").read_bytes())
        server.shutdown()
        thread.join()
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(server.server_address)

    def test_shutdown_before_it_serves(self):
        server = StoppableHttpServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        server.shutdown()
        server.serve_forever()
        self.assertLess(server.socket.fileno(), 0)

    def test_shutdown_from_a_handler(self):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.server.shutdown()
                self.request.sendall(b"done")

        server, thread = self.start(Handler)
        with socket.create_connection(server.server_address, PATIENCE) as connection:
            self.assertEqual(read_all(connection), b"done")
        thread.join()

    def test_shutdown_after_a_handler_that_exits(self):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                sys.exit()

        server, _ = self.start(Handler)
        for _ in range(3):
            with socket.create_connection(server.server_address, PATIENCE) as connection:
                self.assertEqual(read_all(connection), b"")
        server.shutdown()
        self.assertEqual(server._working, set())

    def test_shutdown_after_an_interrupted_accept(self):
        server = StoppableHttpServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)

        def interrupt():
            raise KeyboardInterrupt

        server.get_request = interrupt
        with self.assertRaises(KeyboardInterrupt):
            server.serve_forever()
        server.shutdown()
        self.assertLess(server.socket.fileno(), 0)

    def test_an_exception_of_a_handler_is_reported(self):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                raise ValueError("a fault of the handler")

        server, _ = self.start(Handler)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            with socket.create_connection(server.server_address, PATIENCE) as connection:
                self.assertEqual(read_all(connection), b"")
            server.shutdown()
        self.assertIn("a fault of the handler", stderr.getvalue())

    def test_a_lost_connection_is_not(self):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                raise ConnectionResetError

        server, _ = self.start(Handler)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            with socket.create_connection(server.server_address, PATIENCE) as connection:
                self.assertEqual(read_all(connection), b"")
            server.shutdown()
        self.assertEqual(stderr.getvalue(), "")

    def test_where_shutdown_of_a_listening_socket_does_nothing(self):
        """Elsewhere than on Linux, accept() is woken by connections."""

        class Listening(socket.socket):
            def shutdown(self, how):
                raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

        class Deaf(StoppableHttpServer):
            def server_bind(self):
                super().server_bind()
                self.socket = Listening(fileno=self.socket.detach())

        server = Deaf(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        connections = [socket.create_connection(server.server_address, PATIENCE) for _ in range(3)]
        server.shutdown()
        thread.join()
        for connection in connections:
            connection.close()
        self.assertLess(server.socket.fileno(), 0)


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

    def test_raw_utf_8_in_a_target_is_read_as_it_was_meant(self):
        server = self.serve({"caf\u00e9.xml": b"<rss/>"})
        answer = Answer(
            exchange_end(server, "GET /caf\u00e9.xml HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        )
        self.assertEqual(answer.status, 200)
        self.assertEqual(server.requests[0].path, "/caf\u00e9.xml")

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

    def test_steps_answer_every_method(self):
        server = self.serve(self.FILES)
        server.respond("/feed.xml", b"<rss/>")
        for method in ("GET", "HEAD", "POST", "OPTIONS", "BREW"):
            with self.subTest(method):
                self.assertEqual(self.get(server, "/feed.xml", method).status, 200)

    def test_an_answer_on_record_can_be_given_again(self):
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
            with self.subTest(target):
                request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                self.assertEqual(Answer(exchange(server, request.encode())).status, status)

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
            ((None,), TypeError, "found None as a step; it takes a fixture's name"),
            ((99,), ValueError, "Status: found '99'"),
            ((True,), ValueError, "Status: found 'True'"),
            (
                ("v2.xml",),
                FileNotFoundError,
                "no such fixture in .*; the nearest name there is 'v1.xml'",
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

        def outcome(request):
            raise KeyboardInterrupt("as pytest's outcomes are no Exception")

        for step, words in (
            (lambda request: 1 / 0, "GET /x: ZeroDivisionError('division by zero')"),
            (lambda request: None, 'GET /x: TypeError("found None as a step;'),
            (lambda request: "none.xml", "no such fixture in"),
            (outcome, "GET /x: KeyboardInterrupt("),
        ):
            server.clear()
            server.respond("/x", step)
            with self.subTest(words):
                response = self.get(server, "/x")
                [error] = server.errors
                self.assertEqual(response.status, 500)
                self.assertIn(words, error)
                self.assertEqual(response.content.decode(), legible(error) + "\n")

    def test_an_exception_that_cannot_be_shown(self):
        class Fault(Exception):
            def __repr__(self):
                raise ZeroDivisionError

        def answer(request):
            raise Fault

        server = self.serve()
        server.respond("/", answer)
        self.assertEqual(self.get(server, "/").status, 500)
        [words] = server.errors
        self.assertIn("GET /: Fault, whose repr() raises ZeroDivisionError\nTraceback", words)

    def test_each_step_is_taken_once_by_ten_threads(self):
        server = self.serve()
        server.respond("/x", *range(200, 250), 599)
        statuses = []

        def fetch():
            statuses.extend(self.statuses(server, "/x", 5))

        run_at_once([fetch] * 10)
        self.assertEqual(sorted(statuses), list(range(200, 250)))
        for request in server.requests:  # the record pairs each with its own step
            self.assertEqual(request._step, f"step {request.response.status - 199} of 51")

    def test_sequences_are_each_for_one_url(self):
        server = self.serve(self.FILES)
        server.respond("/a", "v1.xml", 304, 503, Response(b"", 201), "v2.xml", 410)
        server.respond("/b", 301, 302)
        statuses = [self.get(server, path).status for path in ("/a", "/b") * 7]
        self.assertEqual(statuses[::2], [200, 304, 503, 201, 203, 410, 410])
        self.assertEqual(statuses[1::2], [301, 302, 302, 302, 302, 302, 302])

    def test_a_transcript_shows_which_step_answered(self):
        server = self.serve(self.FILES)

        def answer(request):
            return 304

        broken = Response(b"12", delay=0.001, rate=99999, fault="close at 1")
        server.respond("/x", "v1.xml", answer, broken, 410)
        for path in ("/x", "/v1.xml", "/x", "/x", "/x", "/x"):
            with contextlib.suppress(http.client.IncompleteRead):
                self.get(server, path)
        with self.assertRaises(AssertionError) as caught:
            server.wait_for_request("/y", timeout=0)
        self.assertEqual(
            str(caught.exception).splitlines()[1:],
            [
                "The server got:",
                "  GET /x -> 200 (step 1 of 4: v1.xml)",
                "  GET /v1.xml -> 200",
                "  GET /x -> 304 (step 2 of 4: answer)",
                "  GET /x -> 200 (step 3 of 4; Delay: 0.001; Rate: 99999; Fault: close at 1)",
                "  GET /x -> 410 (step 4 of 4)",
                "  GET /x -> 410 (step 4 of 4)",
            ],
        )


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

    def test_filters(self):
        server = self.serve()
        self.get(server, "/x", "POST", b"abc", {"X": "1"})
        for arguments, found in (
            ({}, True),
            ({"path": "x"}, True),
            ({"path": "/y"}, False),
            ({"path": "/x?"}, False),
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

    def test_none_is_not_to_be_waited_for(self):
        with self.assertRaisesRegex(ValueError, "^times: found 0; it takes 1 or more"):
            self.serve().wait_for_request(times=0)

    def test_it_looks_at_each_request_once(self):
        server = self.serve()
        matches = feedtestserver._Wanted.matches
        with mock.patch.object(feedtestserver._Wanted, "matches", autospec=True) as looked_at:
            looked_at.side_effect = matches
            waiter = threading.Thread(target=server.wait_for_request, kwargs={"times": 30})
            for number in range(30):
                self.get(server, "/x")
                if number == 10:
                    waiter.start()
            waiter.join()
        self.assertEqual(looked_at.call_count, 30)

    def test_what_was_cleared_does_not_count(self):
        server = self.serve()
        begun, found = threading.Event(), []
        among = feedtestserver._Wanted.among

        def note(wanted, requests):
            begun.set()
            return among(wanted, requests)

        def wait():
            found.append(server.wait_for_request(times=2))

        self.get(server, "/old")
        with mock.patch.object(feedtestserver._Wanted, "among", note):
            waiter = threading.Thread(target=wait)
            waiter.start()
            begun.wait(PATIENCE)
            server.clear()
            self.get(server, "/1")
            self.get(server, "/2")
            waiter.join()
        self.assertEqual(found, server.requests[1:])

    def test_it_says_what_did_arrive(self):
        server = self.serve()
        self.get(server, "/other", headers={"X": "1"})
        with self.assertRaises(AssertionError) as caught:
            server.wait_for_request(
                "/x", method="GET", headers={"X": "1"}, body=b"", times=2, timeout=0
            )
        self.assertEqual(
            str(caught.exception),
            "GET /x with X: 1 and with the body b'' was requested not at all,"
            " expected at least twice within 0 s\n"
            "The server got:\n  GET /other -> 404\n      X: 1\n      b''",
        )

    def test_it_does_not_wait_for_a_server_that_has_stopped(self):
        server = self.serve()
        thread = threading.Thread(target=server.stop)
        thread.start()
        with self.assertRaisesRegex(AssertionError, "at least once before the server stopped\nThe"):
            server.wait_for_request("/x", timeout=PATIENCE)
        thread.join()


# The audit

#: What a polite client sends in any case; a transcript may say otherwise.
POLITE = {"User-Agent": "reader/1", "Accept-Encoding": "gzip", "Accept": "application/rss+xml"}

#: Titles, and what is asked and answered: "METHOD TARGET | FIELD -> STATUS | FIELD !! RULES", where
#: +SECONDS is the time that passes before, "no FIELD" leaves one out, and the rules are those that
#: the request breaks; it keeps all others.
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
    "two ETags in one answer": """
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
    "two dates in one answer": """
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
    "an answer that is broken off": """
        GET /feed.xml -> 200 | ETag: "v1" | Cache-Control: max-age=60 | Fault: reset at 50%
        GET /feed.xml -> 200 | ETag: "v1" | Fault: close
        GET /feed.xml -> 200 | ETag: "v1"
        GET /feed.xml | If-None-Match: "v1" -> 200 | ETag: "v2" | Fault: close at headers
        GET /feed.xml | If-None-Match: "v1" -> 410 | Fault: reset
        GET /feed.xml | If-None-Match: "v2" -> 200 | ETag: "v2"
        GET /feed.xml -> 200 !! no-validator
    """,
    "an answer that came whole before it broke off": """
        GET /feed.xml -> 200 | ETag: "v1" | Fault: close at 100%
        GET /feed.xml -> 200 !! no-validator
    """,
    "an answer that promises more": """
        GET /feed.xml -> 200 | ETag: "v1" | Content-Length: 100
        GET /feed.xml -> 200 | ETag: "v1"
    """,
    "an answer in chunks with a false length": """
        GET /feed.xml -> 200 | ETag: "v1" | Chunked: 3 | Content-Length: 100
        GET /feed.xml -> 200 | ETag: "v1" !! no-validator
    """,
    "an end of chunks that never came": """
        GET /feed.xml -> 200 | ETag: "v1" | Chunked: 3 | Fault: close at 100%
        GET /feed.xml -> 200 | ETag: "v1"
    """,
    "a page in the place of the feed": """
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
    "a cookie that the answer to a form has set": """
        POST /login -> 200 | Set-Cookie: id=1
        GET /feed.xml | Cookie: id=1 -> 200
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
        GET /feed.xml (5th request): Referer was http://a/, but nobody has followed a link
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
        GET /a (5th request): Cookie was a=1; b=2, but no answer had set a=1; b=2 (RFC 6265 5.4)
        """,
    ),
    (
        """
        GET http://example.com/?a -> 410
        GET http://example.com/?a -> 503 | Expires: Sat, 07 Mar 2009 11:00:00 GMT
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
]


def unfolded(text):
    """Its lines, where those that are indented more continue the ones before."""
    text = text.replace("YESTERDAY", "Fri, 06 Mar 2009 10:00:00 GMT").replace("NOW", NOW_DATE)
    return re.sub("\n +", " ", textwrap.dedent(text.rstrip()).strip()).split("\n")


class TranscriptLine:
    """What is asked, what is answered, and which rules that breaks."""

    def __init__(self, line):
        line, _, rules = line.partition(" !! ")
        asked, _, answered = line.partition(" -> ")
        self.rules = rules.split()
        pause, self.method, self.target = re.match(r"(?:\+(\S+) )?(\S+) (\S+)", asked).groups()
        self.pause = int(pause or 0)
        sent = asked.split(" | ")[1:]
        left_out = [name for name in POLITE if f"no {name}" in sent]
        fields = [text.partition(":") for text in sent if not text.startswith("no ")]
        self.sent = [(name, value.strip()) for name, _, value in fields]
        left_out += [name for name, _ in self.sent]
        self.sent += [field for field in POLITE.items() if field[0] not in left_out]
        status, *given = answered.split(" | ")
        self.status = int(status)
        self.response = self.answer([text.partition(":")[::2] for text in given])

    def answer(self, given):
        mechanics = {"Fault": "fault", "Chunked": "chunked"}
        options = {mechanics[name]: value.strip() for name, value in given if name in mechanics}
        headers = [(name, value.strip()) for name, value in given if name not in mechanics]
        body = b"" if 300 <= self.status < 400 else b"<rss/>"
        # The transcript says what is answered, whatever was asked.
        ignore = ["If-None-Match", "If-Modified-Since", "Range"]
        return Response(body, self.status, headers=headers, ignore=ignore, **options)


class AuditTest(ServerTestCase):
    def play(self, transcript):
        """Ask and answer what a transcript says; returns its lines with the requests on record."""
        lines = [TranscriptLine(line) for line in unfolded(transcript)]
        with FeedTestServer(HERE / "data") as server:
            now = NOW
            server.clock = lambda: now
            for target in {line.target for line in lines}:
                steps = [line.response for line in lines if line.target == target]
                server.respond(target, *steps)
            for line in lines:
                now += line.pause
                self.send(server, line)
            self.assertEqual(len(server.requests), len(lines))
            return list(zip(lines, server.requests))

    def send(self, server, line):
        fields = "".join(f"{name}: {value}\r\n" for name, value in line.sent)
        begin = f"{line.method} {line.target} HTTP/1.1"
        lines = f"{begin}\r\nHost: a\r\nConnection: close\r\n{fields}\r\n"
        with connect(server) as connection:
            connection.sendall(lines.encode("latin-1"))
            read_to_the_end(connection)

    def sentences(self, transcript):
        requests = [request for _, request in self.play(transcript)]
        return [finding.replace(requests[0]._base_url, "BASE") for finding in audit(requests)]

    def test_transcripts(self):
        self.assertGreaterEqual(len(TRANSCRIPTS), 60)
        broken = set()
        for title, transcript in TRANSCRIPTS.items():
            played = self.play(transcript)
            findings = audit(request for _, request in played)
            for line, request in played:
                rules = [finding.rule for finding in findings if finding.request is request]
                broken.update(rules)
                with self.subTest(title, request=request):
                    self.assertEqual(request.response.status, line.status)
                    self.assertEqual(rules, line.rules)
        self.assertEqual(broken, set(feedtestserver._POLITENESS))

    def test_sentences(self):
        for transcript, sentences in SENTENCES:
            with self.subTest(transcript):
                self.assertEqual(self.sentences(transcript), unfolded(sentences))

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
        ordinals = [feedtestserver._ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 111, 123)]
        self.assertEqual(" ".join(ordinals), "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 111th 123rd")

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

    def test_what_an_asis_answer_gives_may_be_sent_back(self):
        hint = b'HTTP/1.1 103 Early Hints\r\nETag: "hint"\r\n\r\n'
        answer = b'HTTP/1.1 200 OK\netag: "v1"\r\nSet-Cookie: a=1; Path=/\nConnection: x\n\n<rss/>'
        more = b'\n\nHTTP/1.1 200 OK\nETag: "body"'
        server = self.serve({"a.asis": hint + answer + more})
        for fields in (
            {},
            {"If-None-Match": '"v1"', "Cookie": "a=1"},
            {"If-None-Match": '"body"'},
        ):
            self.get(server, "/a.asis", headers={**POLITE, **fields})
        [finding] = audit(server.requests)
        self.assertIn('If-None-Match was "body", but the last ETag given was "v1"', finding)

    def test_an_asis_answer_binds_nobody(self):
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

    def test_answers_that_come_later_bind_nobody_before(self):
        server = self.serve()
        asked, answered = threading.Event(), threading.Event()

        def answer_late(request):
            asked.set()
            answered.wait(PATIENCE)
            return Response(headers={"ETag": '"late"', "Cache-Control": "max-age=60"})

        early = Response(headers={"ETag": '"early"'})
        for_later = {"ETag": '"later"', "Cache-Control": "max-age=60"}
        slow = Response(bytes(60), rate=1, headers=for_later)
        delayed = Response(delay=60, headers=for_later)
        server.respond("/feed.xml", answer_late, delayed, slow, early, 200)
        get = functools.partial(self.get, server, "/feed.xml", headers=POLITE)
        first = threading.Thread(target=get)
        first.start()
        asked.wait(PATIENCE)
        with contextlib.ExitStack() as stack:
            for times in (1, 2):  # these are answered a minute later
                connection = stack.enter_context(connect(server))
                connection.sendall(b"GET /feed.xml HTTP/1.1\r\nHost: a\r\n\r\n")
                server.wait_for_request("/feed.xml", times=times)
            get()
            answered.set()
            first.join()
            get()
            requests = server.requests
            findings = [finding for finding in audit(requests) if finding.request in requests[2:]]
        self.assertEqual([finding.rule for finding in findings[:2]], ["no-validator", "too-early"])
        self.assertEqual({f"{f.request.response.status}" for f in findings}, {"200"})
        self.assertEqual({f.partition(" request")[0] for f in findings}, {"GET /feed.xml (5th"})

    def test_pipelined_requests_bind_nobody_either(self):
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
        large = Response(bytes(20_000_000), headers={"ETag": '"v1"'})
        for response in (Response(delay=60, headers={"ETag": '"v1"'}), large):
            with self.subTest(response.delay):
                server = self.serve()
                server._timer = NoTimePasses()
                left = threading.Event()

                def answer(request, left=left, response=response):
                    left.wait(PATIENCE)
                    return response

                server.respond("/feed.xml", answer, response)
                connection = connect(server)
                connection.sendall(b"GET /feed.xml HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n")
                connection.close()
                left.set()
                server.wait_for_request("/feed.xml")
                server._timer.time += 100
                self.get(server, "/feed.xml", headers=POLITE)
                self.get(server, "/feed.xml", headers=POLITE)
                server.stop()
                rules = [finding.rule for finding in audit(server.requests)[2:]]
                self.assertEqual(rules, ["no-validator"])

    def test_a_callable_may_audit(self):
        server = self.serve()
        found = []

        def answer(request):
            found.extend(audit([*server.requests, request]))
            return 200

        server.respond("/feed.xml", answer)
        for _ in range(2):
            self.get(server, "/feed.xml")
        self.assertEqual({finding.request for finding in found}, {server.requests[0]})


# The mixin


def run_test(test_class, name="test"):
    """Run one test of a class; returns the result."""
    result = unittest.TestResult()
    test_class(name).run(result)
    return result


class MixinTest(FeedTestServerMixin, ServerTestCase):
    data_directory = HERE / "data"

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

    def test_failures_show_what_did_arrive(self):
        self.assertEqual(
            self.failure(self.assertRequested, "/x"),
            "/x was requested not at all, expected at least once\nThe server got no request.",
        )
        self.get(self.server, "/x", headers={"N": "1"})
        self.get(self.server, "/y", "POST", b"abc")
        self.assertEqual(
            self.failure(self.assertRequested, "/x", times=2, method="GET", msg="twice a day"),
            "GET /x was requested once, expected twice\n"
            "The server got:\n  GET /x -> 404\n  POST /y -> 405 : twice a day",
        )
        self.assertEqual(
            self.failure(self.assertRequested, "/x", headers={"n": "2"}),
            "/x with n: 2 was requested not at all, expected at least once\n"
            "The server got:\n  GET /x -> 404\n      n: 1\n  POST /y -> 405",
        )
        self.assertEqual(
            self.failure(self.assertNotRequested, "/x", headers={"M": None}),
            "/x without M was requested once, expected not at all\n"
            "The server got:\n  GET /x -> 404\n  POST /y -> 405",
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
            "  GET /x (2nd request): Referer was a, but nobody has followed a link"
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
                with urllib.request.urlopen(self.get_url("/x")) as answer:
                    self.assertEqual(answer.status, 203)

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
            server_options = {"bind_timeout": 3.0}

            def test(self):
                Test.used = self.server

        self.assertTrue(run_test(Test).wasSuccessful())
        self.assertIsInstance(Test.used, Server)
        self.assertEqual(Test.used.directory, str(HERE / "data" / "formats"))
        self.assertEqual(Test.used.bind_timeout, 3.0)

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
                self.server._fail("the fault of the second")

            def test_3(self):
                self.assertTrue(self.server.ready)

        before = dict(os.environ)
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(Test).run(result)
        self.assertEqual((result.testsRun, result.errors), (3, []))
        [(test, words)] = result.failures
        self.assertEqual(test.id().rpartition(".")[2], "test_2")
        self.assertTrue(words.endswith("found errors:\nthe fault of the second\n"))
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
                self.server._fail("its fault")

        [(_, words)] = run_test(Test).failures
        self.assertTrue(words.endswith("found errors:\nits fault\n"))

    def test_a_shared_server_that_is_not_running(self):
        class Test(FeedTestServerMixin, unittest.TestCase):
            __module__ = __name__
            server = FeedTestServer(HERE / "data")

            def test(self):
                pass

        [(_, words)] = run_test(Test).errors
        self.assertIn("Test.server is not running: start() it before", words)

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


class InterceptingMixinTest(FeedTestServerMixin, ServerTestCase):
    intercept = True

    def test_the_whole_test_runs_inside(self):
        self.server.respond("https://example.com/feed.xml", b"<rss/>")
        with urllib.request.urlopen("https://example.com/feed.xml") as answer:
            self.assertEqual(answer.read(), b"<rss/>")
        self.assertRequested("https://example.com/feed.xml", times=1)
        self.assertNotRequested("/feed.xml")

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
        self.assertIn("respond('https://unknown.example/feed.xml', ...) would answer", words)

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

    def test(self):
        with self.subTest(number=1):
            outcome, self._outcome = self._outcome, None
            self.pickled = pickle.dumps(self)
            self._outcome = outcome
        self.assertTrue(self.server.ready)


# The command line


class CommandLineTest(ServerTestCase):
    def run_main(self, *arguments):
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            status = feedtestserver.main([str(argument) for argument in arguments])
        return status, out.getvalue(), err.getvalue()

    def start(self, directory, *options):
        """The command line in a process of its own, with options of Python; and its URL."""
        command = [sys.executable, *options, str(HERE / "feedtestserver.py"), str(directory)]
        process = subprocess.Popen(
            [*command, "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        url = process.stdout.readline().strip()
        self.assertRegex(url, r"^http://127\.0\.0\.1:\d+/$")
        return process, url

    def stop_by_quit(self, process, url):
        stop_server(int(url.rstrip("/").rpartition(":")[2]))

    def stop_by_interrupt(self, process, url):
        process.send_signal(signal.SIGINT)

    def stop_by_termination(self, process, url):
        process.send_signal(signal.SIGTERM)

    #: On Windows, no other process can be sent one of these signals.
    SIGNALS = (stop_by_interrupt, stop_by_termination) if os.name != "nt" else ()

    def read(self, url):
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def test_serves_until_told_to_stop(self):
        directory = self.make_directory({"feed.xml": b"<rss/>", "wrong.xml": b"<!-- Status: x -->"})

        for stop in (CommandLineTest.stop_by_quit, *self.SIGNALS):
            with self.subTest(stop.__name__):
                process, url = self.start(directory)
                self.assertEqual(self.read(url + "feed.xml"), (200, b"<rss/>"))
                self.assertEqual(self.read(url + "wrong.xml")[0], 500)
                stop(self, process, url)
                out, err = process.communicate(timeout=PATIENCE)
                self.assertEqual(process.returncode, 0)
                log, findings = out.split("Python-urllib", 1)
                self.assertEqual(log, "GET /feed.xml -> 200\nGET /wrong.xml -> 500\n\n")
                self.assertRegex(findings, r"^/3\.\d+ was not polite:\n  GET /feed.xml \(1st re")
                self.assertEqual(findings.count("[no-compression]\n"), 2)
                self.assertEqual(err.count("\n"), 1)
                self.assertIn("Status: found 'x'", err)

    @unittest.skipUnless(SIGNALS, "no process can be sent a signal here")
    def test_a_signal_ends_it_at_any_moment(self):
        """Whatever clients wait for, and when more signals come while it ends."""
        files = {"feed.xml": b"<rss/>", "delay.xml": comment("Delay: 86400")}
        files.update({"stall.xml": comment("Fault: stall at headers"), "large.bin": bytes(9999999)})
        directory = self.make_directory(files)
        for stop, (name, often) in itertools.product(
            self.SIGNALS, zip(("feed.xml", *files, "half"), (False, True) * 3)
        ):
            process, url = self.start(directory)
            host, port = url[len("http://") : -1].split(":")
            with (
                self.subTest(stop.__name__, name=name, often=often),
                socket.create_connection((host, int(port)), PATIENCE) as connection,
            ):
                if name == "half":
                    connection.sendall(b"GET / HT")
                    name = "feed.xml"
                    self.assertEqual(self.read(url + name)[0], 200)
                else:
                    connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                # It is printed before the first byte is sent.
                self.assertEqual(process.stdout.readline(), f"GET /{name} -> 200\n")
                sender = threading.Thread(target=self.send, args=(stop, process, url, often))
                sender.start()
                try:
                    out, err = process.communicate(timeout=PATIENCE)
                finally:
                    process.kill()
                    process.wait()
                    sender.join()
                self.assertEqual((process.returncode, err), (0, ""))
                self.assertIn("[no-compression]\n", out)

    def send(self, stop, process, url, often):
        stop(self, process, url)
        while often and process.returncode is None:
            stop(self, process, url)

    def test_main_puts_back_what_it_has_set_for_signals(self):
        def settings():
            wakeup = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(wakeup)
            return [wakeup, *map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))]

        class Server(feedtestserver._ShownServer):
            def start(self):
                super().start()
                seen.extend(settings())
                hosts.append(self.host)
                stop_server(self.port)

        seen, hosts, before = [], [], settings()
        options = ("--port", "0", "--bind", "0.0.0.0")
        with mock.patch.object(feedtestserver, "_ShownServer", Server):
            self.assertEqual(self.run_main(self.make_directory(), *options)[0], 0)
        self.assertEqual((settings(), hosts), (before, ["0.0.0.0"]))
        for inside, outside in zip(seen, before):
            self.assertNotEqual(inside, outside)

    def test_judges_each_client_by_its_name(self):
        server = self.serve({"feed.xml": comment('Header: ETag: "v1"')})
        for name in ("reader (1 user)", "other/1", "reader (20 user)", "x" * 999):
            self.get(server, "/feed.xml", headers={**POLITE, "User-Agent": name})
        exchange(server, b"nonsense\r\nUser-Agent: y\r\n\r\n")
        exchange(
            server, b"GET /feed.xml HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n", b"nonsense\r\n\r\n"
        )
        first, *others, nameless = feedtestserver._judge_each_client(server.requests)
        self.assertRegex(
            first, r"^reader \(1 user\) was not polite:\n.*\(2nd request\): neither .*\]$"
        )
        self.assertEqual(others, ["other/1 was polite", f"{'x' * 200} was polite"])
        self.assertRegex(nameless, r"^a client without a name was not polite:\n(.*\]\n?){2}$")

    def test_goes_on_where_nobody_reads_what_it_prints(self):
        """Whether or not Python keeps what it prints in a buffer."""
        directory = self.make_directory({"feed.xml": b"<rss/>", "wrong.xml": b"<!-- Status: x -->"})
        stop = self.SIGNALS[-1] if self.SIGNALS else CommandLineTest.stop_by_quit
        for options, closed in itertools.product(((), ("-u",)), ("stdout", "stderr", "both")):
            with self.subTest(options, closed=closed):
                process, url = self.start(directory, *options)
                for name in ("stdout", "stderr"):
                    if closed in (name, "both"):
                        getattr(process, name).close()
                for path, status in (("feed.xml", 200), ("wrong.xml", 500), ("feed.xml", 200)):
                    self.assertEqual(self.read(url + path)[0], status)
                stop(self, process, url)
                self.assertEqual(process.wait(PATIENCE), 0)
                if closed == "stdout":
                    self.assertRegex(process.stderr.read(), "^.*Status: found 'x'.*\n$")
                elif closed == "stderr":
                    self.assertIn("GET /feed.xml -> 200\n\nPython", process.stdout.read())

    def test_prints_what_the_stream_can_encode(self):
        stream = io.TextIOWrapper(io.BytesIO(), "ascii", newline="")
        feedtestserver._say("caf\u00e9", stream)
        self.assertEqual(stream.buffer.getvalue(), b"caf\\xe9\n")
        feedtestserver._say("nobody", None)

    def test_prints_nothing_that_a_terminal_obeys(self):
        stream = io.StringIO()
        feedtestserver._say("GET /\x9b31m\u202e\x1b[2J caf\u00e9\n\t\xa0\u30002\x7f", stream)
        self.assertEqual(
            stream.getvalue(), "GET /\\x9b31m\\u202e\\x1b[2J caf\u00e9\n\t\xa0\u30002\\x7f\n"
        )

    def test_lists_the_fixtures(self):
        directory = self.make_directory(
            {
                "<b>.xml": comment('Header: ETag: "<v1>"', "Description: \u00fcber <all>"),
                "gone.xml": comment("Status: 410"),
                "sub/x y.xml": b"<x/>",
                "latin-1.xml": b"<!--\nHeader: X: Z\xfcrich\nDescription: G\xf6teborg\n-->",
                "wrong.xml": comment("Status: <x>"),
                "slow.xml": comment("Delay: 2", "Rate: 10", "Fault: reset at 50%", "Chunked: 9"),
                "odd.asis": b"HTTP/1.1 <299> OK\r\n\r\n",
                "reset.xml": comment("Fault: reset"),
                "reset.asis": b"HTTP/1.1 298 OK\r\n\r\n",
                "reset.asis.headers": b"Fault: reset",
            }
        )
        server = self.serve({}, feedtestserver._ShownServer)
        server.directory = str(directory)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            response = self.get(server, "/")
            below = self.get(server, "/sub/").content.decode()
            odd = (
                "/none/",
                "/su*/",
                "/[/",
                "/**/",
                "/../",
                "//",
                "/./",
                "/sub//",
                "/" + "x/" * 3000,
            )
            for path in (*odd, "/gone.xml/", "/%2e%2e/", "/" + "x" * 300 + "/"):
                self.assertEqual(self.get(server, path).status, 404)
        page = response.content.decode()
        self.assertEqual(response.headers["Content-Type"], "text/html; charset=utf-8")
        for text in (
            "<a href='/%3Cb%3E.xml'>&lt;b&gt;.xml</a>",
            '<meta name="referrer" content="no-referrer">',
            "ETag: &quot;&lt;v1&gt;&quot;",
            "\u00fcber &lt;all&gt;",
            "410 Gone",
            "<code>X: Z\u00fcrich</code>",
            "<td>G\u00f6teborg",
            "<a href='/sub/x%20y.xml'>sub/x y.xml</a>",
            "Status: found &#x27;&lt;x&gt;&#x27;",
            "Content-Type: application/xml",
            "<em>Delay: 2</em><li><em>Rate: 10</em><li><em>Fault: reset at 50%</em>",
            "<code>Transfer-Encoding: chunked</code>",
            "<td>HTTP/1.1 &lt;299&gt; OK<td><ul><li><em>as it is</em></ul>",
            "<td>no answer<td>",
        ):
            with self.subTest(text):
                self.assertIn(text, page)
        self.assertIn("<title>Fixtures in /</title>", page)
        self.assertRegex(page, "wrong.xml</a><td>500<td colspan='2' class='wrong'>.*line 2: Status")
        for text in ("HTTP/1.1 298", "Server: ", "Date: "):
            self.assertNotIn(text, page)
        self.assertIn("sub/x y.xml", below)
        self.assertNotIn("gone.xml", below)

    def test_an_index_comes_before_the_list(self):
        server = self.serve({"index.html": b"<p>"}, feedtestserver._ShownServer)
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(self.get(server, "/").content, b"<p>")

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

        takes = {name: f"it takes {rule.takes}" for name, rule in feedtestserver._RULES.items()}
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
                f"{at('e.json.headers')}, line 1: Status: found '1'; {takes['status']}",
                f"{at('e.json.headers')}, line 3: Without: found 'a b'; {takes['without']}",
                f"{at('f.json.headers')}: there is no {at('f.json')} beside it",
                f"{at('f.json.headers')}, line 1: Status: found '1'; {takes['status']}",
                f"{at('f.xml')}, line 1: Delay: found 'x'; {takes['delay']}",
                f"{at('f.xml')}, line 2: Rate: found 'x'; {takes['rate']}",
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
                ((HERE, "--port", 99999), "there is no port 99999"),
                (("--record", "file:///etc/hosts", new), "it takes one of http or https"),
                ((HERE, "--port", port), f"port {port} of 127.0.0.1 cannot be had"),
                (
                    ("--record", "http://127.0.0.1:1/", HERE / "README.rst"),
                    "the file exists and is not overwritten",
                ),
                (("--record", f"http://127.0.0.1:{port}x/", new), "nonnumeric port: "),
                (("--record", "feed.xml", new), "found the URL 'feed.xml'; it takes one"),
            ):
                with self.subTest(arguments):
                    status, out, err = self.run_main(*arguments)
                    self.assertEqual((status, out), (1, ""))
                    self.assertIn(words, err)
                    self.assertEqual(err.count("\n"), 1)

    def test_help_tells_the_defaults(self):
        with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit):
            feedtestserver.main(["--help"])
        for text in ("default: data", "default: 8000", "default: 127.0.0.1"):
            self.assertIn(text, " ".join(out.getvalue().split()))

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
            % feedtestserver._SERVER.encode(),
        )
        again = self.serve({path.name: path.read_bytes() for path in name.parent.iterdir()})
        response = self.get(again, "/live.xml")
        self.assertEqual((response.reason, response.content), ("Fine", body))
        self.assertEqual(response.headers.get_all("X-Twice"), ["1", "2"])

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
        left_out = [(name, "close") for name in names]
        lines = feedtestserver._recorded_lines(200, "OK", [*left_out, ("X", "a\r\n\tb")])
        self.assertEqual(lines, b"Status: 200 OK\nHeader: X: a b\n")
        for status, headers in ((999, []), (200, [("X", "a\x0bb")])):
            with self.assertRaises(DirectiveError):
                feedtestserver._recorded_lines(status, "", headers)

    def test_record_of_redirects_that_are_not_followed(self):
        for location, words in (("/feed.xml", "infinite loop"), ("file:///x", "file:///x")):
            feed = comment("Status: 302", f"Header: Location: {location}")
            server = self.serve({"feed.xml": feed})
            name = self.make_directory() / "feed.xml"
            with self.subTest(location):
                status, _, err = self.run_main("--record", server.get_url("feed.xml"), name)
                self.assertEqual((status, list(name.parent.iterdir())), (1, []))
                self.assertIn(words, err)

    def test_record_asks_nobody_where_it_cannot_write(self):
        server = self.serve({"feed.xml": b"<rss/>"})
        for name, words in (
            ("none/feed.xml", "there is no such folder to write to: '{}none'"),
            ("file/feed.xml", "there is no such folder to write to: '{}file'"),
            ("file", "the file exists and is not overwritten: '{}file'"),
            ("lonely", "the file exists and is not overwritten: '{}lonely.headers'"),
            ("folder", "the file exists and is not overwritten: '{}folder'"),
            ("x" * 250, ""),  # with the sidecar's ending it is too long
        ):
            directory = self.make_directory({"file": b"mine", "lonely.headers": b"mine"})
            (directory / "folder").mkdir()
            before = sorted(directory.rglob("*"))
            with self.subTest(name):
                url = server.get_url("feed.xml")
                status, out, err = self.run_main("--record", url, directory / name)
                self.assertEqual((status, out, err.count("\n")), (1, "", 1))
                words = words.replace("'{}", repr(os.path.join(directory, ""))[:-1])
                self.assertIn(legible(words), err)
                self.assertEqual(sorted(directory.rglob("*")), before)
                self.assertEqual((directory / "file").read_bytes(), b"mine")
        self.assertEqual(server.requests, [])

    def test_record_leaves_nothing_where_the_answer_is_cut(self):
        server = self.serve()
        server.respond("/", Response(b"abc", headers={"Content-Length": "10"}))
        name = self.make_directory() / "cut.xml"
        status, _, err = self.run_main("--record", server.get_url("/"), name)
        self.assertEqual((status, list(name.parent.iterdir())), (1, []))
        self.assertIn("IncompleteRead", err)


if __name__ == "__main__":
    unittest.main()
