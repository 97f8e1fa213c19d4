"""What real feed readers do wrong, as the audit finds it.

Lets each reader poll a feed through some hours of its life, prints the rules that it breaks, and
checks each request against plain words of these rules, written down here a second time. Fails where
the audit accuses a reader of what it has not done, or does not see what it has done.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import feedparser

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from feedtestserver import FeedTestServer, Request, Response, audit  # noqa: E402

os.environ["no_proxy"] = "*"  # a proxy for the outer world is not for these fetches
PATIENCE = 60.0  # seconds; only a broken server or reader takes so long
BEGIN = 1_236_420_000.0
FEED = """<?xml version="1.0" encoding="utf-8"?>
<rss version="2.0"><channel><title>Example</title><link>http://example.com/</link>
<description>A feed</description><item><title>{0}</title><guid>http://example.com/{0}</guid>
<link>http://example.com/{0}</link><description>Words</description></item></channel></rss>
"""
Clock = Callable[[], float]
Poll = Callable[[], object]

# The readers: each is set up for a feed, in a folder of its own, and gives the way to poll it


def feedparser_alone(url: str, folder: pathlib.Path, clock: Clock) -> Poll:
    return lambda: feedparser.parse(url)


def feedparser_in_a_loop(url: str, folder: pathlib.Path, clock: Clock) -> Poll:
    """What its documentation says of etag, modified, 301 and 410."""
    known: dict[str, str] = {}
    gone = False

    def poll() -> None:
        nonlocal url, known, gone
        if gone:
            return
        found = feedparser.parse(url, **known)
        if found.status == 301:
            url = found.href
        if found.status < 400 and found.status != 304:
            known = {name: found[name] for name in ("etag", "modified") if name in found}
        gone = found.status == 410

    return poll


def reader_library(url: str, folder: pathlib.Path, clock: Clock) -> Poll:
    import reader  # not for every Python

    def now() -> datetime.datetime:
        return datetime.datetime.fromtimestamp(clock(), datetime.timezone.utc)

    feeds: Any = reader.make_reader(str(folder / "reader.sqlite"))
    feeds._now = now  # it has a schedule, for which hours are to pass as well
    feeds.add_feed(url)
    return lambda: list(feeds.update_feeds_iter())


def newsboat(url: str, folder: pathlib.Path, clock: Clock) -> Poll:
    (folder / "config").touch()
    (folder / "urls").write_text(url)
    return lambda: run(folder, "newsboat -q -C config -u urls -c cache.db -x reload")


def rss2email(url: str, folder: pathlib.Path, clock: Clock) -> Poll:
    run(folder, "r2e -c config -d data.json new reader@example.com")
    run(folder, f"r2e -c config -d data.json add feed {url}")
    return lambda: run(folder, "r2e -c config -d data.json run --no-send")


def sfeed(url: str, folder: pathlib.Path, clock: Clock) -> Poll:
    (folder / "sfeedrc").write_text(
        f"sfeedpath='{folder}'\nfeeds() {{\n    feed example {url}\n}}\n"
    )
    return lambda: run(folder, "sfeed_update sfeedrc")


def run(folder: pathlib.Path, command: str) -> None:
    """Run a reader; its exit status may tell how the fetch ended."""
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    subprocess.run(
        command.split(),
        cwd=folder,
        env={**os.environ, **home},
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
    )


def version(package: str) -> str:
    """The version of a Python package, or of Debian's; empty where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    if not shutil.which("dpkg-query"):
        return ""
    query = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Version}", package]
    status, _, number = subprocess.run(
        query, check=False, capture_output=True, text=True
    ).stdout.rpartition(" ")
    return number if status.startswith("ii") else ""


READERS = {
    "feedparser": feedparser_alone,
    "feedparser with etag= and modified=": feedparser_in_a_loop,
    "reader": reader_library,
    "newsboat": newsboat,
    "rss2email": rss2email,
    "sfeed": sfeed,
}

# The life of a feed: seconds that pass before each poll, and what is answered then


def answer(*fields: str, status: int = 200, fault: str | None = None) -> Response:
    headers = [field.partition(": ")[::2] for field in (*fields, "Content-Type: text/xml")]
    edition = "second" if fields[:1] == V2[:1] else "first"
    return Response(FEED.format(edition).encode(), status, headers=headers, fault=fault)


V1 = ('ETag: "v1"', "Last-Modified: Fri, 06 Mar 2009 10:00:00 GMT")
V2 = ('ETag: W/"v2, second edition"', "Last-Modified: Sat, 07 Mar 2009 09:00:00 GMT")
TODAY = "Location: /today.xml"
LATER, SOON = 7200, 60
LIVES: dict[str, list[tuple[int, Response]]] = {
    "unchanged": [(LATER, answer(*V1))] * 4,
    "changed": [(LATER, answer(*each)) for each in (V1, V1, V2, V2, V2)],
    "ETag alone": [(LATER, answer(V2[0]))] * 4,
    "date alone": [(LATER, answer(V1[1]))] * 4,
    "ETag lost": [(LATER, answer(*each)) for each in (V1, V1, (), (), ())],
    "cut": [(LATER, answer(*V1, fault=fault)) for fault in ("close at 50%", "reset", None, None)],
    "302": [(LATER, answer(TODAY, status=302))] * 4,
    "301": [(LATER, answer(TODAY, status=301))] * 4,
    "410": [(LATER, answer(*V1)), *[(LATER, answer(status=410))] * 3],
    "429": [
        (LATER, answer(*V1)),
        (LATER, answer("Retry-After: 3600", status=429)),
        (SOON, answer(*V1)),
        (SOON, answer(*V1)),
    ],
    "max-age": [(LATER, answer(*V1, "Cache-Control: max-age=3600")), (SOON, answer(*V1))],
    "cookie": [(LATER, answer(*V1, "Set-Cookie: id=1; Path=/"))] * 3,
}


def live(
    set_up: Callable[[str, pathlib.Path, Clock], Poll], life: list[tuple[int, Response]]
) -> list[Request]:
    """Let a reader poll a feed; returns what it has asked."""
    now = BEGIN
    with FeedTestServer(HERE / "data") as server, tempfile.TemporaryDirectory() as folder:
        server.clock = lambda: now
        server.respond("/today.xml", answer(*V1))
        poll = set_up(server.get_url("feed.xml"), pathlib.Path(folder), server.clock)
        for seconds, response in life:
            now += seconds
            server.respond("/feed.xml", response)
            with contextlib.suppress(OSError, http.client.HTTPException):  # an answer that is cut
                poll()
        return server.requests


# The rules once more, in plain words that do for these lives


def given(before: list[Request], name: str) -> str | None:
    """What the last 200 or 304 that came whole gave; a 304 may keep it to itself."""
    value = None
    for request in before:
        response = request.response
        if response and response.status in (200, 304) and response.fault is None:
            fields = {field.lower(): text for field, text in response.headers}
            value = fields.get(name.lower(), value if response.status == 304 else None)
    return value


def waits(request: Request, before: list[Request]) -> bool:
    """Whether an answer just before asked to wait for an hour."""
    last = before[-1].response if before else None
    fields = dict(last.headers) if last else {}
    asked = fields.get("Retry-After") == "3600" or fields.get("Cache-Control") == "max-age=3600"
    return asked and request.time < before[-1].time + 3600


def statuses(before: list[Request]) -> list[int]:
    return [request.response.status for request in before if request.response]


def is_sent_back(request: Request, before: list[Request], field: str, name: str) -> bool:
    sent = request.headers[field]
    redirected = statuses([request])[0] in (301, 302)
    return sent is None or redirected or sent == given(before, name)


RULES: dict[str, Callable[[Request, list[Request]], bool]] = {
    "no-validator": lambda request, before: (
        bool(given(before, "ETag") or given(before, "Last-Modified"))
        and "If-None-Match" not in request.headers
        and "If-Modified-Since" not in request.headers
    ),
    "wrong-etag": lambda request, before: (
        not is_sent_back(request, before, "If-None-Match", "ETag")
    ),
    "wrong-date": lambda request, before: (
        not is_sent_back(request, before, "If-Modified-Since", "Last-Modified")
    ),
    "too-early": waits,
    "moved": lambda request, before: 301 in statuses(before),
    "gone": lambda request, before: 410 in statuses(before),
    "no-user-agent": lambda request, before: "User-Agent" not in request.headers,
    "no-compression": lambda request, before: (
        "gzip" not in (request.headers["Accept-Encoding"] or "")
    ),
    "no-feed-type": lambda request, before: "*/*" not in (request.headers["Accept"] or ""),
    "referer": lambda request, before: "Referer" in request.headers,
    "cookie": lambda request, before: "Cookie" in request.headers and not before,
}


def rules_broken(requests: list[Request]) -> list[tuple[Request, str]]:
    """Which request breaks which rule, by these plain words."""
    broken = []
    for number, request in enumerate(requests):
        before = [each for each in requests[:number] if each.url == request.url]
        for rule, breaks in RULES.items():
            if request.method == "GET" and breaks(request, before):
                broken.append((request, rule))
    return broken


def told(requests: list[Request], findings: list[tuple[Request, str]]) -> str:
    """The status of each answer, with the rules that its request broke."""
    words = []
    for number, request in zip(statuses(requests), requests):
        rules = ", ".join(rule for culprit, rule in findings if culprit is request)
        words.append(f"{number} ({rules})" if rules else f"{number}")
    return "  ".join(words)


def judge(title: str, requests: list[Request]) -> int:
    """Print what a reader has done; returns how often the audit and the plain words differ."""
    findings = [(finding.request, finding.rule) for finding in audit(requests)]
    print(f"  {title:12}{told(requests, findings)}")
    differences = set(findings) ^ set(rules_broken(requests))
    for request, rule in differences:
        print(f"    wrong: {rule} of request {requests.index(request) + 1}")
    return len(differences)


def main() -> int:
    failures = 0
    for name, set_up in READERS.items():
        number = version(name.partition(" ")[0])
        print(f"{name}: {number or 'not installed here'}")
        for title, life in LIVES.items() if number else ():
            requests = live(set_up, life)
            if not requests:
                print(f"  {title}: wrong: nothing was asked")
            failures += judge(title, requests) if requests else 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
