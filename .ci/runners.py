"""What real test runners make of the mixin.

Runs the same tests, all of which pass, in a folder of their own with each runner, then with two
that fail: the words of the server and its transcript must come through in the runner's output.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parents[1]
PATIENCE = 60.0  # seconds; only a broken server or runner takes so long
AT_ONCE = 2

FEED = '<!-- Header: ETag: "v1" -->\n<rss version="2.0"><channel/></rss>\n'
SLIP = "<!-- Stauts: 404 -->\n<rss/>\n"

#: The tests of a class; the ten numbers see to it that parallel runners have something to share.
TESTS = """
import unittest
import urllib.request
from feedtestserver import FeedTestServerMixin


def fetch(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read()


class Common(FeedTestServerMixin):
    def test_fetch(self):
        self.assertIn(b"<rss", fetch(self.get_url("feed.xml")))
        self.assertRequested("/feed.xml", times=1)

    def test_server_of_its_own(self):
        self.assertEqual(self.server.requests, [])

    def test_steps(self):
        self.server.respond("/feed.xml", b"one", b"two")
        url = self.get_url("feed.xml")
        self.assertEqual([fetch(url), fetch(url)], [b"one", b"two"])

    def test_every_number(self):
        for number in range(10):
            with self.subTest(number=number):
                fetch(self.get_url(f"feed.xml?{number}"))
        self.assertRequested("/feed.xml", times=10)
"""
WEB = """

class Intercepted(FeedTestServerMixin, unittest.TestCase):
    intercept = True

    def test_every_host(self):
        self.server.respond("https://example.com/feed.xml", b"<rss/>")
        self.assertEqual(fetch("https://example.com/feed.xml"), b"<rss/>")
"""
PLAIN = """

class First(Common, unittest.TestCase):
    pass


class Second(Common, unittest.TestCase):
    pass
"""
ASYNC = """

class Asynchronous(Common, unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.url = self.get_url("feed.xml")

    async def test_in_a_thread(self):
        self.assertIn(b"<rss", await asyncio.to_thread(fetch, self.url))
        self.assertRequested("/feed.xml", times=1)
"""
DJANGO = """
import django.test
from django.contrib.contenttypes.models import ContentType

class Transactions(Common, django.test.TransactionTestCase):
    def test_database(self):
        ContentType.objects.create(app_label="feeds", model="feed")
        self.assertIn(b"<rss", fetch(self.get_url("feed.xml")))


class Rollbacks(Transactions, django.test.TestCase):
    pass
"""
FAILING = """

class Failing(FeedTestServerMixin, {base}):
    def test_transcript(self):
        fetch(self.get_url("feed.xml?no"))
        self.assertRequested("/feed.xml", headers={{"If-None-Match": '"v1"'}})

    def test_error_of_the_server(self):
        with self.assertRaises(urllib.error.HTTPError) as caught:
            fetch(self.get_url("slip.xml"))
        caught.exception.close()
"""
#: What the two failing tests are to show: the words of the assertion, the record, the slip.
SHOWN = (
    r"""expected /feed\.xml with If-None-Match: "v1" at least once; it was not requested""",
    r"The server got:\s+(E +)?GET /feed\.xml\?no -> 200",
    r"the server found errors:",
    r"slip\.xml, line 1: found the key 'Stauts'; the directive is Status",
)
SETTINGS = """
SECRET_KEY = "of no use"
INSTALLED_APPS = ["django.contrib.contenttypes"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
"""
DISCOVER = """
import os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
import django
from django.test.runner import DiscoverRunner
if __name__ == "__main__":
    django.setup()
    runner = DiscoverRunner(parallel=int(sys.argv[1]), verbosity=1)
    sys.exit(bool(runner.run_tests(["."])))
"""


class Runner(NamedTuple):
    """What to run after ``python``, the tests, how many pass, and the words that say so."""

    command: str
    tests: str
    passed: int
    says: str
    package: str = "unittest"
    base: str = "unittest.TestCase"


UNITTEST, PYTEST = r"Ran {} tests? in .*\n\nOK\n", r"\b{} passed in "
PLAIN_TESTS, ASYNC_TESTS = TESTS + PLAIN + WEB, "import asyncio" + TESTS + ASYNC
DJANGO_TESTS = TESTS + DJANGO + WEB
ASYNC_BASE, TEST_CASE = "unittest.IsolatedAsyncioTestCase", "django.test.TestCase"
PARALLEL = "-m unittest_parallel --level test -j 2"
RUNNERS = {
    "unittest": Runner("-m unittest", PLAIN_TESTS, 9, UNITTEST),
    "IsolatedAsyncioTestCase": Runner("-m unittest", ASYNC_TESTS, 5, UNITTEST, base=ASYNC_BASE),
    "pytest": Runner("-m pytest", PLAIN_TESTS, 9, PYTEST, "pytest"),
    "pytest, asynchronous": Runner("-m pytest", ASYNC_TESTS, 5, PYTEST, "pytest", ASYNC_BASE),
    "pytest-xdist": Runner("-m pytest -n 4", PLAIN_TESTS, 9, PYTEST, "xdist"),
    "unittest-parallel": Runner(PARALLEL, PLAIN_TESTS, 9, UNITTEST, "unittest_parallel"),
    "Django": Runner("discover.py 1", DJANGO_TESTS, 11, UNITTEST, "django", TEST_CASE),
    "Django, in parallel": Runner("discover.py 2", DJANGO_TESTS, 11, UNITTEST, "django", TEST_CASE),
}


def write_project(folder: pathlib.Path, tests: str) -> None:
    files = {
        "data/feed.xml": FEED,
        "data/slip.xml": SLIP,
        "settings.py": SETTINGS,
        "discover.py": DISCOVER,
        "test_feed.py": tests,
    }
    (folder / "data").mkdir(parents=True)
    shutil.copy(HERE / "feedtestserver.py", folder)
    for name, content in files.items():
        (folder / name).write_text(content)


def run(runner: Runner, tests: str) -> tuple[int, str]:
    """Run tests in a folder of their own; the status and all that was printed."""
    with tempfile.TemporaryDirectory() as folder:
        write_project(pathlib.Path(folder), tests)
        done = subprocess.run(
            [sys.executable, *runner.command.split()],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder, "NO_COLOR": "1", "COLUMNS": "100"},
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
        )
    return done.returncode, done.stdout.decode(errors="replace")


def try_runner(name: str) -> tuple[tuple[str, str, str], str]:
    """A row of the table, and what was printed where it is wrong."""
    runner = RUNNERS[name]
    if not importlib.util.find_spec(runner.package):
        return (name, "-", "-"), ""
    status, said = run(runner, runner.tests)
    passed = not status and re.search(runner.says.format(runner.passed), said)
    failing = runner.tests + "\nimport urllib.error\n" + FAILING.format(base=runner.base)
    status, told = run(runner, failing)
    unseen = [words for words in SHOWN if not re.search(words, told)]
    shown = status and not unseen
    row = name, f"{runner.passed} passed" if passed else "wrong", "yes" if shown else "no"
    complaint = "" if passed else said
    return row, complaint + ("" if shown else f"{told}\nmissing: {unseen}")


def check() -> tuple[list[tuple[str, str, str]], int]:
    """The rows of the table, and how many are wrong; prints what these runners printed."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(try_runner, RUNNERS))
    wrong = [complaint for _, complaint in found if complaint]
    for complaint in wrong:
        print(complaint)
    print(f"runners: {len(RUNNERS)}, wrong: {len(wrong)}\n")
    return [row for row, _ in found], len(wrong)
