"""Run feedparser's own test suite with feedtestserver as its server.

    python .ci/feedparser_suite.py [--cache DIRECTORY]

feedparser's suite (some 4,300 tests) comes with the server that feedtestserver descends from, and
with some 2,200 fixtures that were written for it. The exit status is 1 unless all of this holds:

1. every test that passes with feedparser's own server passes with feedtestserver in its place, and
   feedtestserver has no error to report;
2. no file of feedparser's tests is refused for its directives;
3. each file arrives byte for byte as it is on disk, with the status and the header fields that
   feedparser's server would have read from it, in the same order.

feedparser's source distribution and the one package it depends on are fetched by pip into a virtual
environment of their own. No file of feedparser's is edited: its server is replaced in the imported
module. Each of the three runs is a process of its own, so that the port, which feedparser's tests
have fixed, is free for the next. That release of feedparser needs a Python older than 3.13.
"""

import argparse
import collections
import contextlib
import http.client
import importlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
import urllib.parse
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

RELEASE = "feedparser-6.0.10"
DEPENDENCY = "sgmllib3k==1.0.0"
PORT = 8097  # written into feedparser's tests
FEWEST_TESTS = 4000
TIME_LIMIT = 600  # seconds, for one run
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


# Obtaining feedparser


class Checkout(NamedTuple):
    """feedparser's unpacked source, and an interpreter that has what it depends on."""

    source: pathlib.Path
    python: pathlib.Path


def obtain(directory: pathlib.Path) -> Checkout:
    """Fetch feedparser into the directory, unless an earlier run has."""
    scripts = "Scripts" if os.name == "nt" else "bin"
    checkout = Checkout(directory / RELEASE, directory / "venv" / scripts / "python")
    if not checkout.source.is_dir():
        venv.create(directory / "venv", with_pip=True, clear=True)
        pip(checkout.python, "install", "--no-deps", DEPENDENCY)
        download(checkout.python, RELEASE, directory)
    return checkout


def pip(python: pathlib.Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "--quiet", *arguments], check=True)


def download(python: pathlib.Path, release: str, directory: pathlib.Path) -> None:
    """Fetch and unpack a source, beside the final place first: one that exists is a whole one."""
    name, _, version = release.partition("-")
    options = ("--no-deps", "--no-binary", name, "--dest", str(directory))
    pip(python, "download", *options, f"{name}=={version}")
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        shutil.unpack_archive(directory / f"{release}.tar.gz", folder)
        pathlib.Path(folder, release).rename(directory / release)


# The runs, each in its own process; only there feedparser and feedtestserver can be imported


def start(name: str, checkout: Checkout) -> Any:
    """Call the function of RUNS in a new process; return its report."""
    paths = os.pathsep.join(map(str, (checkout.source, checkout.source / "tests", REPOSITORY)))
    variables = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": paths}
    command = [checkout.python, os.path.abspath(__file__)]
    return report_of(command, name, [], checkout.source, variables, TIME_LIMIT)[0]


def report_of(
    command: Sequence[object],
    name: str,
    arguments: Sequence[str],
    source: pathlib.Path,
    variables: Mapping[str, str],
    limit: float,
) -> tuple[Any, str]:
    """Have a script make the report of that name in a new process: the report, and its output.

    ``limit`` is in seconds. Exits if the script takes longer, or fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory, "report.json")
        try:
            process = subprocess.run(
                [*map(str, command), "--run", name, str(report), *arguments],
                cwd=source,
                env={**os.environ, **variables, "TMPDIR": directory},  # where tests leave files
                timeout=limit,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired as error:
            sys.exit(f"{name} took longer than {limit} s\n{(error.stdout or b'').decode()}")
        output = process.stdout.decode(errors="replace")
        if process.returncode:
            sys.exit(f"{name} broke off\n{output}")
        return json.loads(report.read_text("utf-8")), output


class Recorder(unittest.TextTestResult):
    """Keeps the outcome of every test that was started."""

    outcomes: dict[str, str] = {}  # noqa: RUF012 - runtests() does not hand its result out

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self.outcomes[named(test)] = "passed"

    def stopTestRun(self) -> None:
        super().stopTestRun()
        for outcome in ("failures", "errors", "skipped"):
            self.outcomes.update((named(test), outcome) for test, _ in getattr(self, outcome))


def named(test: unittest.TestCase) -> str:
    """The number that feedparser gives to a test, and the file that it stands for."""
    return " ".join(filter(None, (test.id(), test.shortDescription())))


def suite_with_own_server() -> dict[str, Any]:
    socket.create_server(("127.0.0.1", PORT)).close()  # if it is in use, runtests() would hang
    return {"outcomes": run_suite(importlib.import_module("runtests")), "errors": []}


def suite_with_feedtestserver() -> dict[str, Any]:
    runtests: Any = importlib.import_module("runtests")
    runtests.FeedParserTestServer = unittest.mock.Mock()  # to be started; ours runs by then
    with replacement() as server:
        return {"outcomes": run_suite(runtests), "errors": list(map(str, server.errors))}


def run_suite(runtests: Any) -> dict[str, str]:
    unittest.TextTestRunner.resultclass = Recorder  # type: ignore[assignment]
    with contextlib.suppress(SystemExit):
        runtests.runtests()
    return Recorder.outcomes


def replacement() -> Any:
    """A server that answers as feedparser's does, also for the paths it treats specially."""
    feedtestserver = importlib.import_module("feedtestserver")
    server = feedtestserver.FeedTestServer(".", port=PORT)
    server.respond("/-/return-304.xml", 304)
    for path in pathlib.Path("tests", "compression").iterdir():
        coding = "gzip" if path.suffix == ".gz" else "deflate"
        headers = {"Content-Encoding": coding, "Content-type": "application/xml"}
        response = feedtestserver.Response(path.read_bytes(), headers=headers)
        server.respond(f"/{path.as_posix()}", response)
    return server


# What is on the wire


class Answer(NamedTuple):
    """What one can know of it from the file alone: not the fields that any server adds."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes


def files_on_the_wire() -> dict[str, Any]:
    """Ask for each file over one connection; list those that do not arrive as expected."""
    report: dict[str, Any] = {"files": 0, "fields": 0, "refused": [], "different": []}
    feedtestserver = importlib.import_module("feedtestserver")
    with feedtestserver.FeedTestServer(".") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for path in fixtures():
            expected = as_feedparser_reads(path)
            compare(path, expected, ask(connection, path, expected), report)
        connection.close()
        report["connections"] = len({request.connection for request in server.requests})
    return report


def fixtures() -> Iterator[pathlib.Path]:
    """All files but the program, whose docstring shows what directives look like."""
    paths = sorted(pathlib.Path("tests").rglob("*"))
    return (path for path in paths if path.is_file() and path.suffix != ".py")


def as_feedparser_reads(path: pathlib.Path) -> Answer:
    """What FeedParserTestRequestHandler.send_head() makes of a file, by its own expression."""
    pattern = importlib.import_module("runtests").FeedParserTestRequestHandler.headers_re
    body = path.read_bytes()
    headers = {name.decode(): value.decode().strip() for name, value in pattern.findall(body)}
    status = int(headers.pop("Status", 200))
    return Answer(status, list(headers.items()), b"" if status in (204, 304) else body)


def ask(connection: http.client.HTTPConnection, path: pathlib.Path, expected: Answer) -> Answer:
    connection.request("GET", "/" + urllib.parse.quote(path.as_posix()))
    response = connection.getresponse()
    added = {"connection", "content-length", "content-type", "date", "server"}
    added -= {name.lower() for name, _ in expected.fields}
    fields = [
        (name, value.encode("latin-1").decode(errors="replace"))
        for name, value in response.getheaders()
        if name.lower() not in added
    ]
    return Answer(response.status, fields, response.read())


def compare(path: pathlib.Path, expected: Answer, got: Answer, report: dict[str, Any]) -> None:
    report["files"] += 1
    report["fields"] += len(expected.fields)
    if got.status == 500 != expected.status:
        report["refused"].append(f"{path.as_posix()}: {got.body.decode(errors='replace').strip()}")
        return
    report["different"] += [
        f"{path.as_posix()}: {what} {found!r:.200}, expected {right!r:.200}"
        for what, right, found in zip(Answer._fields, expected, got)
        if found != right
    ]


RUNS = {
    run.__name__: run
    for run in (suite_with_own_server, suite_with_feedtestserver, files_on_the_wire)
}


# The verdict


def judge(own: dict[str, str], ours: dict[str, str]) -> list[str]:
    """What is wrong with our run of the suite, in the light of its own one."""
    problems = [
        f"only {len(outcomes)} tests were run"
        for outcomes in (own, ours)
        if len(outcomes) < FEWEST_TESTS
    ]
    for test in sorted(own.keys() | ours.keys()):
        before, now = own.get(test, "not run"), ours.get(test, "not run")
        if now not in (before, "passed"):
            problems.append(f"{now} (with its own server: {before}): {test}")
    return problems


def count(outcomes: dict[str, str]) -> str:
    counts = sorted(collections.Counter(outcomes.values()).items())
    return ", ".join([f"{len(outcomes)} tests", *(f"{number} {word}" for word, number in counts)])


def verify(checkout: Checkout) -> list[str]:
    """Do the three runs, print what they counted, and return what is wrong."""
    print(f"{RELEASE}, Python {sys.version.split()[0]}")
    own = start("suite_with_own_server", checkout)
    print(f"suite with its own server: {count(own['outcomes'])}")
    ours = start("suite_with_feedtestserver", checkout)
    print(
        f"suite with feedtestserver: {count(ours['outcomes'])}, {len(ours['errors'])} server errors"
    )
    wire = start("files_on_the_wire", checkout)
    print(
        f"files on the wire: {wire['files']} with {wire['fields']} header fields, "
        f"{len(wire['refused'])} refused, {len(wire['different'])} differences, "
        f"{wire['connections']} connection(s)"
    )
    return [
        *judge(own["outcomes"], ours["outcomes"]),
        *(f"server error: {error}" for error in ours["errors"]),
        *(f"{word}: {line}" for word in ("refused", "different") for line in wire[word]),
    ]


def run_suite_of(
    name: str,
    wrong_python: str,
    make_report: Callable[[str, list[str]], Any],
    obtain: Callable[[pathlib.Path], Any],
    verify: Callable[[Any], list[str]],
) -> int:
    """The command line of a script like this one; ``wrong_python`` says why it cannot run here."""
    parser = argparse.ArgumentParser(description=f"Run {name}'s tests with feedtestserver.")
    words = f"where {name} is kept for the next time"
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIRECTORY", help=words)
    parser.add_argument("--fetch", action="store_true", help="fetch it into there, and no more")
    parser.add_argument("--run", nargs="+", metavar=("NAME", "REPORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run, report, *tests = arguments.run
        pathlib.Path(report).write_text(json.dumps(make_report(run, tests)), "utf-8")
        return 0
    if wrong_python:
        parser.error(wrong_python)
    with contextlib.ExitStack() as stack:
        temporary = arguments.cache or stack.enter_context(tempfile.TemporaryDirectory())
        checkout = obtain(pathlib.Path(temporary).resolve())
        problems = [] if arguments.fetch else verify(checkout)
    print("\n".join(problems) or "ok")
    return 1 if problems else 0


def main() -> int:
    needed = f"{RELEASE} needs a Python older than 3.13" if sys.version_info >= (3, 13) else ""
    return run_suite_of("feedparser", needed, lambda run, _: RUNS[run](), obtain, verify)


if __name__ == "__main__":
    sys.exit(main())
