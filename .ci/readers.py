"""What real feed readers do wrong, as the audit finds it.

Lets each reader poll feeds through some hours of their lives, prints the rules that it breaks, and
checks each request against plain words of these rules, written down here a second time. Fails
where the audit accuses a reader of what it has not done, or does not see what it has done, and
where fewer than twelve of the readers that are installed have run. The last that it prints is a
table for the README.

With names of readers, only these are run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import glob
import http.client
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Union

import feedparser

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from feedtestserver import FeedTestServer, Request, Response, audit  # noqa: E402

os.environ["no_proxy"] = "*"  # a proxy for the outer world is not for these fetches
os.environ["TZ"] = "UTC"
os.environ["SSL_CERT_FILE"] = os.devnull  # nothing is HTTPS, and reading CAs takes long
PATIENCE = 40.0  # seconds; only a broken server or reader takes so long
ENOUGH = 12
AT_ONCE = 4
LIBFAKETIME = "".join(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")[:1])
BEGIN = 1_236_420_000.0
FEED = """<?xml version="1.0" encoding="utf-8"?>
<rss version="2.0"><channel><title>Example</title><link>http://example.com/</link>
<description>A feed</description><item><title>{0}</title><guid>http://example.com/{0}</guid>
<link>http://example.com/{0}</link><description>Words</description></item></channel></rss>
"""
OPML = """<?xml version="1.0" encoding="utf-8"?>
<opml version="2.0"><head><title>Feeds</title></head><body>
{}
</body></opml>
"""
Clock = Callable[[], float]
Poll = Callable[[], object]

# The readers: each is set up for some feeds, in a folder of its own, and gives the way to poll them


class Place(NamedTuple):
    """Where a reader lives: its folder, the time there, the servers, and what ends it."""

    folder: pathlib.Path
    clock: Clock
    servers: list[FeedTestServer]
    ending: contextlib.ExitStack

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write_opml(self, name: str, urls: list[str], more: str = "") -> None:
        outlines = [
            f'<outline type="rss" text="{number}" title="{number}" xmlUrl="{url}" {more}/>'
            for number, url in enumerate(urls)
        ]
        self.write(name, OPML.format("\n".join(outlines)))

    def environment(self, in_its_time: bool) -> dict[str, str]:
        """The environment of a program; ``in_its_time`` it sees the time of the feeds' lives."""
        folder = str(self.folder)
        xdg = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR")
        environment = {
            **os.environ,
            **dict.fromkeys(("HOME", "TMPDIR", *xdg), folder),
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        if in_its_time:
            now = datetime.datetime.fromtimestamp(self.clock(), datetime.timezone.utc)
            environment["LD_PRELOAD"] = LIBFAKETIME
            environment["FAKETIME"] = now.strftime("@%Y-%m-%d %H:%M:%S")
        return environment

    def run(self, command: str, in_its_time: bool = False, patience: float = PATIENCE) -> bool:
        """Run a reader; returns whether it ended, as its status may tell how the fetch did."""
        with self.started(command, in_its_time) as process:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                return False
            return True

    @contextlib.contextmanager
    def started(
        self, command: str, in_its_time: bool = False, **more: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a program, and end it and all that it has started afterwards."""
        with open(self.folder / "output", "ab") as output:
            process = subprocess.Popen(
                shlex.split(command),
                cwd=self.folder,
                env=self.environment(in_its_time),
                start_new_session=True,
                **{"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, **more},
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)

    def quiet(self, seconds: float) -> None:
        """Wait until no request has come for so long."""
        count, since = -1, 0.0
        while count != self.asked() or time.monotonic() < since + seconds:
            if count != self.asked():
                count, since = self.asked(), time.monotonic()
            time.sleep(0.05)

    def asked(self) -> int:
        return sum(len(server.requests) for server in self.servers)


def in_turn(urls: list[str], poll: Callable[[str], object]) -> Poll:
    """Poll the feeds one after the other; an answer that is cut may be an exception."""

    def poll_all() -> None:
        for url in urls:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                poll(url)

    return poll_all


def feedparser_alone(urls: list[str], place: Place) -> Poll:
    return in_turn(urls, feedparser.parse)


def feedparser_in_a_loop(urls: list[str], place: Place) -> Poll:
    """What its documentation says of etag, modified, 301 and 410."""
    known: dict[str, dict[str, str]] = {url: {} for url in urls}
    now_at = {url: url for url in urls}
    gone = set()

    def poll(url: str) -> None:
        if url in gone:
            return
        found = feedparser.parse(now_at[url], **known[url])
        status = found.get("status")  # none of an answer that is cut
        if status == 301:
            now_at[url] = found.href
        if status and status < 400 and status != 304:
            known[url] = {name: found[name] for name in ("etag", "modified") if name in found}
        if status == 410:
            gone.add(url)

    return in_turn(urls, poll)


def fastfeedparser(urls: list[str], place: Place) -> Poll:
    import fastfeedparser  # type: ignore[import-not-found,unused-ignore]

    return in_turn(urls, fastfeedparser.parse)


def reader_library(urls: list[str], place: Place) -> Poll:
    import reader  # not for every Python

    def now() -> datetime.datetime:
        return datetime.datetime.fromtimestamp(place.clock(), datetime.timezone.utc)

    feeds: Any = reader.make_reader(str(place.folder / "reader.sqlite"))
    feeds._now = now  # it has a schedule, for which hours are to pass as well
    for url in urls:
        feeds.add_feed(url)
    return lambda: list(feeds.update_feeds_iter(scheduled=True))


def newsboat(urls: list[str], place: Place) -> Poll:
    place.write("config", "")
    place.write("urls", "\n".join(urls))
    return lambda: place.run("newsboat -q -C config -u urls -c cache.db -x reload")


def rss2email(urls: list[str], place: Place) -> Poll:
    place.write_opml("feeds.opml", urls)
    place.run("r2e -c config -d data.json new reader@example.com")
    place.run("r2e -c config -d data.json opmlimport feeds.opml")
    return lambda: place.run("r2e -c config -d data.json run --no-send")


def sfeed(urls: list[str], place: Place) -> Poll:
    feeds = [f"feed {number} {url}" for number, url in enumerate(urls)]
    place.write("sfeedrc", f"sfeedpath='{place.folder}'\nfeeds() {{\n{chr(10).join(feeds)}\n}}\n")
    return lambda: place.run("sfeed_update sfeedrc")


def feed2exec(urls: list[str], place: Place) -> Poll:
    feeds = [
        f"[{number}]\nurl = {url}\noutput = feed2exec.plugins.null\n"
        for number, url in enumerate(urls)
    ]
    place.write("feed2exec.ini", "\n".join(feeds))
    command = "feed2exec --config feed2exec.ini --database feed2exec.db fetch"
    return lambda: place.run(command, in_its_time=True)


def feed2imap(urls: list[str], place: Place) -> Poll:
    place.write(
        ".feed2imaprc",
        "feeds:\n"
        + "".join(
            f"  - name: feed{number}\n    url: {url}\n    target: maildir://{place.folder}/mail\n"
            for number, url in enumerate(urls)
        ),
    )
    return lambda: place.run("feed2imap", in_its_time=True)


def gpodder(urls: list[str], place: Place) -> Poll:
    place.write_opml("feeds.opml", urls)
    polls = iter(["gpo import feeds.opml"])
    awake_at = 0.0

    def poll() -> None:
        """It sleeps for as long as a Retry-After says, an hour of the feed's life."""
        nonlocal awake_at
        if place.clock() >= awake_at and not place.run(next(polls, "gpo update"), patience=15):
            awake_at = place.clock() + 3600

    return poll


def podget(urls: list[str], place: Place) -> Poll:
    feeds = [f"{url} Feeds Feed {number}\n" for number, url in enumerate(urls)]
    place.write("serverlist", "".join(feeds))
    return lambda: place.run(f"podget -s -d {place.folder} --dir_session {place.folder}")


def greg(urls: list[str], place: Place) -> Poll:
    feeds = [f"[{number}]\nurl = {url}\n" for number, url in enumerate(urls)]
    place.write(".local/share/greg/data/data", "\n".join(feeds))
    return lambda: place.run("greg sync")


def rsstail(urls: list[str], place: Place) -> Poll:
    return in_turn(urls, lambda url: place.run(f"rsstail -1 -u {url}"))


def liferea(urls: list[str], place: Place) -> Poll:
    """It asks for new feeds when it starts, and is told by D-Bus to ask for all of them again."""
    place.write_opml("liferea/feedlist.opml", urls)
    place.write("start", "echo $DBUS_SESSION_BUS_ADDRESS >bus; echo $$ >pid; exec liferea")
    name = "org.gnome.feed.Reader"
    refresh = f"dbus-send --print-reply --dest={name} /{name.replace('.', '/')} {name}.Refresh"

    def start() -> None:
        desktop = place.started("xvfb-run -a dbus-run-session sh start")
        process = place.ending.enter_context(desktop)
        place.quiet(4)
        place.ending.callback(stop, process)

    def stop(desktop: subprocess.Popen[bytes]) -> None:
        """End it alone, so that the others end in order and leave nothing in /tmp."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            os.kill(int((place.folder / "pid").read_text()), signal.SIGTERM)
            desktop.wait(10)

    def poll() -> None:
        if not (place.folder / "bus").exists():
            start()
        else:
            bus = (place.folder / "bus").read_text().strip()
            place.run(f"env DBUS_SESSION_BUS_ADDRESS={bus} {refresh}")
            place.quiet(2)

    return poll


NODE_BEGIN = """
const http = require("http");
const urls = process.argv.slice(2);
const realTimeout = setTimeout;
const timers = [];
let now = 0, pending = 0;
// A schedule is by the time of the feed's life: what is due is called at the next poll.
global.setInterval = (call, every, ...rest) => {
  timers.push({ call: () => call(...rest), every, next: now + every });
};
global.clearInterval = () => {};
for (const name of ["request", "get"]) {
  const original = http[name];
  http[name] = (...rest) => {
    const request = original(...rest);
    pending += 1;
    request.on("close", () => { pending -= 1; });
    return request;
  };
}
const sleep = (time) => new Promise((resolve) => realTimeout(resolve, time));
process.on("uncaughtException", console.error);
process.on("unhandledRejection", console.error);
let poll = null, start = () => {};
"""
NODE_END = """
(async () => {
  for await (const line of require("readline").createInterface({ input: process.stdin })) {
    const first = now === 0;
    now = Number(line);
    if (first) start();
    if (poll) await Promise.race([Promise.allSettled(urls.map(poll)), sleep(2500)]);
    for (const timer of timers) {
      if (timer.next > now) continue;
      timer.next = now + timer.every;
      timer.call();
    }
    await sleep(20);
    for (let tries = 0; pending > 0 && tries < 40; tries += 1) await sleep(20);
    process.stdout.write("polled\\n");
  }
})();
"""
RSS_PARSER = "const parser = new (require('rss-parser'))(); poll = (url) => parser.parseURL(url);"
FEED_EXTRACTOR = "poll = (url) => require('@extractus/feed-extractor').extract(url);"
RSS_TO_JSON = "poll = (url) => require('rss-to-json').parse(url);"
RSS_FEED_EMITTER = """
const emitter = new (require("rss-feed-emitter"))();
emitter.on("error", () => {});
start = () => emitter.add({ url: urls });
"""
FEEDSUB = """
const FeedSub = require("feedsub");
start = () => {
  for (const url of urls) {
    const feed = new FeedSub(url);
    feed.on("error", () => {});
    feed.start(true);
  }
};
"""


def node(program: str) -> Callable[[list[str], Place], Poll]:
    """For Node.js: it gets the URLs, then the time of each poll, and says when it is done."""

    def set_up(urls: list[str], place: Place) -> Poll:
        place.write("reader.js", NODE_BEGIN + program + NODE_END)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        running = place.started(f"node reader.js {' '.join(urls)}", **pipes)
        process = place.ending.enter_context(running)

        def poll() -> None:
            assert process.stdin and process.stdout
            process.stdin.write(f"{place.clock() * 1000}\n".encode())
            process.stdout.readline()

        return poll

    return set_up


class Reader(NamedTuple):
    set_up: Callable[[list[str], Place], Poll]
    package: str
    #: Whether it decides itself when it asks: then asking too often is its own fault.
    has_schedule: bool = False
    #: Whether it takes so long that it polls some of the feeds only.
    is_slow: bool = False
    #: The programs that it is started by.
    needs: tuple[str, ...] = ()

    def version(self) -> str:
        """The version of its package; empty where something is not installed."""
        source, _, name = self.package.partition(":")
        if not all(map(shutil.which, self.needs)):
            return ""
        if source == "npm":
            package = pathlib.Path(os.environ["NODE_PATH"], name, "package.json")
            return json.loads(package.read_text())["version"] if package.exists() else ""
        if source == "PyPI":
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(name)
        if source == "Debian" and shutil.which("dpkg-query"):
            query = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Version}", name]
            asked = subprocess.run(query, check=False, capture_output=True, text=True)
            status, _, number = asked.stdout.rpartition(" ")
            return number if status.startswith("ii") else ""
        return ""


READERS = {
    # The slowest begin.
    "podget": Reader(podget, "Debian:podget", is_slow=True),
    "gpodder": Reader(gpodder, "Debian:gpodder"),
    "liferea": Reader(liferea, "Debian:liferea", needs=("xvfb-run", "dbus-run-session")),
    "feed2exec": Reader(feed2exec, "PyPI:feed2exec"),
    "feedparser": Reader(feedparser_alone, "PyPI:feedparser"),
    "feedparser with etag= and modified=": Reader(feedparser_in_a_loop, "PyPI:feedparser"),
    "fastfeedparser": Reader(fastfeedparser, "PyPI:fastfeedparser"),
    "reader": Reader(reader_library, "PyPI:reader", has_schedule=True),
    "newsboat": Reader(newsboat, "Debian:newsboat"),
    "rss2email": Reader(rss2email, "Debian:rss2email"),
    "sfeed": Reader(sfeed, "Debian:sfeed"),
    "feed2imap": Reader(feed2imap, "Debian:feed2imap"),
    "greg": Reader(greg, "PyPI:greg"),
    "rsstail": Reader(rsstail, "Debian:rsstail"),
    "rss-parser": Reader(node(RSS_PARSER), "npm:rss-parser", needs=("node",)),
    "feed-extractor": Reader(
        node(FEED_EXTRACTOR), "npm:@extractus/feed-extractor", needs=("node",)
    ),
    "rss-to-json": Reader(node(RSS_TO_JSON), "npm:rss-to-json", needs=("node",)),
    "rss-feed-emitter": Reader(
        node(RSS_FEED_EMITTER), "npm:rss-feed-emitter", has_schedule=True, needs=("node",)
    ),
    "feedsub": Reader(node(FEEDSUB), "npm:feedsub", has_schedule=True, needs=("node",)),
}


# The lives of feeds: what is answered at each poll. All of them are lived side by side, each on a
# host of its own, as starting a reader takes longer than what it asks for.


def answer(*fields: str, status: int = 200, fault: str | None = None, delay: float = 0) -> Response:
    headers = [field.partition(": ")[::2] for field in (*fields, "Content-Type: text/xml")]
    edition = "second" if fields[:1] == V2[:1] else "first"
    body = FEED.format(edition).encode()
    return Response(body, status, headers=headers, fault=fault, delay=delay)


def for_members(request: Request) -> Response:
    """Ask for a name and a password, and lead those that give one to another host."""
    if "Authorization" not in request.headers:
        return answer('WWW-Authenticate: Basic realm="members"', status=401)
    port = request.url.split(":")[2].partition("/")[0]
    return answer(f"Location: http://localhost:{port}/today.xml", status=302)


V1 = ('ETag: "v1"', "Last-Modified: Fri, 06 Mar 2009 10:00:00 GMT")
V2 = ('ETag: W/"v2, second edition"', "Last-Modified: Sat, 07 Mar 2009 09:00:00 GMT")
TODAY = "Location: /today.xml"
LATER, SOON = 7200, 60
PAUSES = (LATER, LATER, SOON, LATER, LATER)  # seconds before each poll
EVERY = 1800.0  # seconds between two requests that an owner would put up with
Step = Union[Response, Callable[[Request], Response]]


def cut(fault: str) -> tuple[Response, ...]:
    """An answer that is cut, and what follows if it is asked for again at once."""
    return answer(*V1, fault=fault), answer(*V1)


def answers(*responses: Step) -> list[tuple[Step, ...]]:
    return [(response,) for response in responses]


#: The answers of each feed at each poll; those of the last poll stay.
LIVES: dict[str, dict[str, list[tuple[Step, ...]]]] = {
    "members": {"members": answers(for_members)},  # on 127.0.0.1, which is localhost as well
    "unchanged": {"feed": answers(answer(*V1))},
    "changed": {"feed": answers(answer(*V1), answer(*V1), answer(*V2))},
    "ETag alone": {"feed": answers(answer(V1[0]))},
    "date alone": {"feed": answers(answer(V1[1]))},
    "ETag lost": {"feed": answers(answer(*V1), answer(*V1), answer())},
    "cut": {"feed": [cut("close at 50%"), cut("reset"), *answers(answer(*V1))]},
    "slow": {"feed": answers(answer(*V1), answer(*V1, delay=1.5), answer(*V1))},
    "302": {"feed": answers(answer(TODAY, status=302))},
    "301": {"feed": answers(answer(TODAY, status=301))},
    "404": {"feed": answers(answer(status=404))},
    "410": {"feed": answers(answer(*V1), answer(status=410))},
    "429": {
        "one": answers(answer(*V1)),
        "two": answers(answer(*V1), answer("Retry-After: 3600", status=429), answer(*V1)),
        "three": answers(answer(*V1)),
    },
    "max-age": {"feed": answers(answer(*V1, "Cache-Control: max-age=3600"))},
    "cookie": {"feed": answers(answer(*V1, "Set-Cookie: id=1; Path=/"))},
    "eight feeds": {
        f"{number}": answers(answer(*V1, delay=0.3), answer(*V1)) for number in range(8)
    },
}
LEFT_OUT = ("ETag alone", "date alone", "slow", "404", "cookie", "eight feeds")  # by slow readers


def live(reader: Reader) -> tuple[dict[str, list[Request]], str]:
    """Let a reader poll all feeds; returns what it asked in each life, and what it printed."""
    now = BEGIN
    lives = {name: LIVES[name] for name in LIVES if not (reader.is_slow and name in LEFT_OUT)}
    with contextlib.ExitStack() as ending:
        folder = tempfile.mkdtemp()
        ending.callback(shutil.rmtree, folder, ignore_errors=True)
        servers = [FeedTestServer(host=f"127.0.0.{number}") for number, _ in enumerate(lives, 1)]
        for server in servers:
            server.clock = lambda: now
            server.respond("/today.xml", answer(*V1))
            ending.enter_context(server)
        place = Place(pathlib.Path(folder), lambda: now, servers, ending)
        urls = [
            f"http://{'me:secret@' * (name == 'members')}{server.host}:{server.port}/{name}.xml"
            for server, life in zip(servers, lives.values())
            for name in life
        ]
        place.write("output", "")
        poll = None
        for number, seconds in enumerate(PAUSES):
            now += seconds
            for server, life in zip(servers, lives.values()):
                for name, steps in life.items():
                    server.respond(f"/{name}.xml", *steps[min(number, len(steps) - 1)])
            if poll is None:
                poll = reader.set_up(urls, place)
            poll()
        output = (place.folder / "output").read_text(errors="replace")
        return dict(zip(lives, [server.requests for server in servers])), output


# The rules once more, in plain words that do for these lives


def known(request: Request, requests: list[Request]) -> list[Request]:
    """The GETs whose answers the reader had before it asked."""
    return [each for each in requests if each.method == "GET" and each.ended_at <= request.heard_at]


def is_whole(request: Request) -> bool:
    return request.response is not None and request.response.fault is None


def given(before: list[Request], name: str) -> str | None:
    """What the last 200 or 304 that came whole gave; a 304 may keep it to itself."""
    value = None
    for request in before:
        response = request.response
        if response and response.status in (200, 304) and is_whole(request):
            fields = {field.lower(): text for field, text in response.headers}
            value = fields.get(name.lower(), value if response.status == 304 else None)
    return value


def fields_of(request: Request) -> dict[str, str]:
    return dict(request.response.headers) if request.response else {}


def waits(request: Request, before: list[Request], everywhere: list[Request]) -> bool:
    """Whether its last answer asked to wait for an hour, or a 429 of any feed in an earlier poll.

    In the same poll it may have asked for both at once.
    """
    last = fields_of(before[-1]) if before else {}
    asked = last.get("Retry-After") == "3600" or last.get("Cache-Control") == "max-age=3600"
    if asked and request.time < before[-1].time + 3600:
        return True
    for each in everywhere:
        if statuses([each]) == [429] and each.time < request.time < each.time + 3600:
            since = [own for own in before if own.heard_at > each.heard_at]
            if all(status >= 400 for status in statuses(since)):
                return True
    return False


def is_too_often(request: Request, before: list[Request], everywhere: list[Request]) -> bool:
    last = [each for each in before if is_whole(each)][-1:]
    if not last or request.time >= last[0].time + EVERY:
        return False
    if statuses(last) == [401] and last[0].headers.items() != request.headers.items():
        return False
    redirect = fields_of(everywhere[-1]).get("Location", "nowhere")
    return not request.url.endswith(redirect)


def statuses(before: list[Request]) -> list[int]:
    return [request.response.status for request in before if request.response]


def is_sent_back(request: Request, before: list[Request], field: str, name: str) -> bool:
    sent = request.headers[field]
    redirected = statuses([request])[0] in (301, 302)
    parts = itertools.takewhile(
        lambda each: not (is_whole(each) and statuses([each]) == [200]), reversed(before)
    )
    of_a_part = [fields_of(each).get(name) for each in parts]
    return sent is None or redirected or sent in (given(before, name), *of_a_part)


def is_repeated(request: Request, requests: list[Request]) -> bool:
    return any(
        each.method == "GET"
        and each.url == request.url
        and each.headers.items() == request.headers.items()
        and each.heard_at < request.heard_at < each.ended_at < math.inf
        and is_whole(each)
        for each in requests
    )


def seventh(requests: list[Request]) -> list[Request]:
    """The requests that made the reader ask one host more than six things at once."""
    found = []
    crowded = False
    for request in requests:
        at_once = {
            each.connection
            for each in requests
            if each.heard_at <= request.heard_at < each.ended_at
        }
        if len(at_once) == 1:
            crowded = False
        if len(at_once) > 6 and not crowded:
            crowded = True
            found.append(request)
    return found


#: The rules: of a GET, of what the reader knew of its URL then, and of all that it knew.
RULES: dict[str, Callable[[Request, list[Request], list[Request]], bool]] = {
    "no-validator": lambda request, before, everywhere: (
        bool(given(before, "ETag") or given(before, "Last-Modified"))
        and "If-None-Match" not in request.headers
        and "If-Modified-Since" not in request.headers
    ),
    "wrong-etag": lambda request, before, everywhere: (
        not is_sent_back(request, before, "If-None-Match", "ETag")
    ),
    "wrong-date": lambda request, before, everywhere: (
        not is_sent_back(request, before, "If-Modified-Since", "Last-Modified")
    ),
    "too-early": waits,
    "too-often": is_too_often,
    "moved": lambda request, before, everywhere: 301 in statuses(before),
    "gone": lambda request, before, everywhere: 410 in statuses(before),
    "no-user-agent": lambda request, before, everywhere: "User-Agent" not in request.headers,
    "no-compression": lambda request, before, everywhere: (
        "gzip" not in (request.headers["Accept-Encoding"] or "") and "Range" not in request.headers
    ),
    "no-feed-type": lambda request, before, everywhere: (
        not re.search(r"\*/\*|xml", request.headers["Accept"] or "")
    ),
    "referer": lambda request, before, everywhere: "Referer" in request.headers,
    "cookie": lambda request, before, everywhere: "Cookie" in request.headers and not everywhere,
}


def rules_broken(requests: list[Request]) -> set[tuple[Request, str]]:
    """Which request breaks which rule, by these plain words."""
    broken = {(request, "burst") for request in seventh(requests)}
    for request in requests:
        everywhere = known(request, requests)
        before = [each for each in everywhere if each.url == request.url]
        if request.method == "GET":
            broken.update(
                (request, rule) for rule in RULES if RULES[rule](request, before, everywhere)
            )
            if is_repeated(request, requests):
                broken.add((request, "repeated"))
        if "//localhost:" in request.url and "Authorization" in request.headers:
            broken.add((request, "leaked-credentials"))
    return broken


# What comes of it

IN_ORDER = (
    *("no-validator", "wrong-etag", "wrong-date", "too-early", "too-often", "repeated", "burst"),
    *("moved", "gone", "no-user-agent", "no-compression", "no-feed-type", "referer", "cookie"),
    "leaked-credentials",
)


class Result(NamedTuple):
    text: str
    has_run: bool
    failures: int = 0
    rules: set[str] = set()  # noqa: RUF012


def told(requests: list[Request], findings: set[tuple[Request, str]], rules: list[str]) -> str:
    """The status of each answer, with those of the rules that its request broke."""
    words = []
    for request in requests:
        status = statuses([request])[0] if request.response else "-"
        broken = ", ".join(rule for rule in rules if (request, rule) in findings)
        words.append(f"{status} ({broken})" if broken else f"{status}")
    times = [(word, len(list(group))) for word, group in itertools.groupby(words)]
    return "  ".join(f"{word} x{count}" if count > 1 else word for word, count in times)


def audited(requests: list[Request], every: float | None = None) -> set[tuple[Request, str]]:
    return {(finding.request, finding.rule) for finding in audit(requests, every=every)}


def judge(lives: dict[str, list[Request]]) -> Result:
    """What a reader has done, and how often the audit and the plain words differ."""
    lines, failures = [], 0
    everything = list(itertools.chain(*lives.values()))
    everywhere = audited(everything, EVERY)
    gets = [request for request in everything if request.method == "GET"]
    always = [rule for rule in IN_ORDER if all((request, rule) in everywhere for request in gets)]
    now_and_then = [rule for rule in IN_ORDER if rule not in always]
    if always:
        lines.append(f"  each time: {', '.join(always)}")
    for title, requests in lives.items():
        findings = audited(requests, EVERY)
        lines.append(f"  {title:13}{told(requests, findings, now_and_then) or 'not asked for'}")
        differences = findings ^ rules_broken(requests)
        # What it does elsewhere changes nothing of this, nor how often its owner is to be asked.
        differences |= findings ^ {each for each in everywhere if each[0] in requests}
        differences |= {each for each in findings if each[1] != "too-often"} ^ audited(requests)
        for request, rule in differences:
            lines.append(f"    wrong: {rule} of request {requests.index(request) + 1}")
        failures += len(differences)
    return Result("\n".join(lines), True, failures, {rule for _, rule in everywhere})


def try_out(name: str) -> tuple[Result, float]:
    begin = time.monotonic()
    try:
        lives, output = live(READERS[name])
        if any(lives.values()):
            result = judge(lives)
        else:
            result = Result(f"  it asked for nothing, and said: {output[-2000:]!r}", False)
    except OSError as error:
        result = Result(f"  it cannot be run: {error}", False)
    except Exception:
        result = Result(f"  wrong: {traceback.format_exc()}", False, 1)
    return result, time.monotonic() - begin


def table(rows: list[tuple[str, str, str]]) -> str:
    """A table of reStructuredText, whose last column is wrapped."""
    first, second = (max(map(len, column)) for column in list(zip(*rows))[:2])
    room = 96 - first - second
    edge = f"{'=' * first}  {'=' * second}  {'=' * room}"
    lines = []
    for number, (name, its_version, rules) in enumerate(rows):
        wrapped = textwrap.wrap(rules, room, break_on_hyphens=False)
        cells = itertools.zip_longest([(name, its_version)], wrapped, fillvalue=("", ""))
        lines += [f"{left[0]:{first}}  {left[1]:{second}}  {right}" for left, right in cells]
        if number == 0:
            lines.append(edge)
    return "\n".join([edge, *lines, edge])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help="the only ones to run")
    parser.add_argument("--node-modules", help="where npm has installed readers")
    options = parser.parse_args()
    os.environ["NODE_PATH"] = options.node_modules or ""
    versions = {name: READERS[name].version() for name in options.readers or READERS}
    there = [name for name in versions if versions[name]]
    rows, failures = [], 0
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for name, (result, seconds) in zip(there, pool.map(try_out, there)):
            print(f"{name} {versions[name]} ({seconds:.1f} s)")
            print(result.text, flush=True)
            failures += result.failures
            if result.has_run:
                told_of = result.rules
                if not READERS[name].has_schedule:
                    told_of -= {"too-often"}
                rules = ", ".join(sorted(told_of, key=IN_ORDER.index)) or "nothing"
                rows.append((name, versions[name], rules))
    for name in versions:
        if name not in there:
            print(f"{name}: not installed here")
    heading = ("reader", "version", "what it does wrong")
    print(f"\nOn {datetime.date.today()}:\n\n{table([heading, *sorted(rows)])}\n")
    expected = min(ENOUGH, len(there))
    if len(rows) < expected:
        print(f"wrong: {len(rows)} of {len(there)} readers have run; expected {expected}")
        failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
