"""What real clients and real test runners make of the server.

Prints what each client sees of each fault, of a server that is down, of handshakes and client
certificates, of addresses that cannot be reached, of every host inside of intercept(), and of
fixtures by each way; then what the command line says of clients, the runners, and the tables that
the README shows. Fails where one sees something else: a reset that looks like a close, a body that
is cut and looks whole, a bad certificate that is accepted, a coding that nobody can undo, a failure
that a runner does not tell. Checks may be chosen by their names.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import errno
import functools
import http.client
import io
import ipaddress
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import feedparser
import httpx
import requests
import runners
import urllib3

try:
    import pycurl
except ImportError:  # there is not a wheel for every Python
    pycurl = None

HERE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from feedtestserver import FeedTestServer, Request, Response, Step  # noqa: E402

os.environ["no_proxy"] = "*"  # a proxy for the outer world is not for these fetches
DATA = HERE / "data"
BODY = bytes(range(256)) * 40
HOST = "https://example.com"
PATIENCE = 30.0  # seconds; only a broken server or client takes so long
STALLED = 0.5  # seconds until a client gives up on a server that stalls

# The clients: each follows redirects, and gives the status and the body without its coding


class Want(NamedTuple):
    """What to fetch; without a ``ca_file`` the client trusts whom it trusts by itself."""

    url: str
    ca_file: str | None = None
    fields: Mapping[str, str] = {}
    timeout: float = PATIENCE
    body: bytes | None = None  # what is sent, by POST
    certificate: str | None = None  # the client's

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"

    @property
    def context(self) -> ssl.SSLContext | None:
        if not self.ca_file and not self.certificate:
            return None
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.certificate:
            context.load_cert_chain(self.certificate)
        return context


class Answer(NamedTuple):
    status: int
    body: bytes


def decoded(coding: str | None, body: bytes) -> bytes:
    """What urllib and http.client leave to whoever uses them."""
    return zlib.decompress(body, wbits=47) if coding in ("gzip", "deflate") else body


def by_urllib(want: Want) -> Answer:
    request = urllib.request.Request(want.url, want.body, dict(want.fields))
    try:
        found = urllib.request.urlopen(request, timeout=want.timeout, context=want.context)
    except urllib.error.HTTPError as error:
        found = error
    with found:
        return Answer(found.code, decoded(found.headers["Content-Encoding"], found.read()))


def by_http_client(want: Want) -> Answer:
    parts = urllib.parse.urlsplit(want.url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=want.timeout)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.netloc, timeout=want.timeout, context=want.context
        )
    with contextlib.closing(connection):
        connection.request(want.method, parts.path, want.body, dict(want.fields))
        found = connection.getresponse()
        location = found.headers["Location"]
        if location:
            return by_http_client(want._replace(url=urllib.parse.urljoin(want.url, location)))
        return Answer(found.status, decoded(found.headers["Content-Encoding"], found.read()))


def by_requests(want: Want) -> Answer:
    found = requests.request(
        want.method,
        want.url,
        data=want.body,
        headers=want.fields,
        timeout=want.timeout,
        verify=want.ca_file or True,
        cert=want.certificate,
    )
    return Answer(found.status_code, found.content)


def by_urllib3(want: Want) -> Answer:
    retries = urllib3.Retry(3, connect=0, other=0)
    trust = {"ca_certs": want.ca_file, "cert_file": want.certificate}
    with urllib3.PoolManager(retries=retries, **trust) as pool:
        options = {"body": want.body, "headers": want.fields, "timeout": want.timeout}
        found = pool.request(want.method, want.url, **options)
        return Answer(found.status, found.data)


def by_httpx(want: Want) -> Answer:
    found = httpx.request(
        want.method,
        want.url,
        content=want.body,
        headers=want.fields,
        follow_redirects=True,
        timeout=want.timeout,
        verify=want.context or True,
    )
    return Answer(found.status_code, found.content)


def by_aiohttp(want: Want) -> Answer:
    async def fetch() -> Answer:
        body = want.body and io.BytesIO(want.body)
        options = {"data": body, "headers": want.fields, "ssl": want.context or True}
        limit = aiohttp.ClientTimeout(sock_connect=want.timeout, sock_read=want.timeout)
        session = aiohttp.ClientSession(timeout=limit)
        async with session, session.request(want.method, want.url, **options) as found:
            return Answer(found.status, await found.read())

    return asyncio.run(fetch())


def by_pycurl(want: Want) -> Answer:
    """By itself it goes to the proxy of the environment, but trusts only whom it is told."""
    body = io.BytesIO()
    with contextlib.closing(pycurl.Curl()) as curl:
        options = {
            pycurl.URL: want.url,
            pycurl.HTTPHEADER: [f"{name}: {value}" for name, value in want.fields.items()],
            pycurl.FOLLOWLOCATION: 1,
            pycurl.ACCEPT_ENCODING: "",
            pycurl.TIMEOUT_MS: int(want.timeout * 1000),
            pycurl.NOSIGNAL: 1,
            pycurl.WRITEFUNCTION: body.write,
        }
        for option, value in options.items():
            curl.setopt(option, value)
        ca_file = want.ca_file or os.environ.get("CURL_CA_BUNDLE")
        if ca_file:
            curl.setopt(pycurl.CAINFO, ca_file)
        if want.certificate:
            curl.setopt(pycurl.SSLCERT, want.certificate)
        curl.perform()
        return Answer(curl.getinfo(pycurl.RESPONSE_CODE), body.getvalue())


def run(
    *command: str, well: Sequence[int] = (0,), stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        timeout=PATIENCE,
    )
    if done.returncode not in well:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done


def by_curl(want: Want) -> Answer:
    options = [f"-H{name}: {value}" for name, value in want.fields.items()]
    options += ["--cacert", want.ca_file] if want.ca_file else []
    options += ["--cert", want.certificate] if want.certificate else []
    options += ["--data-binary", "@-"] if want.body else []
    options += ["-HExpect:"] if "Expect" not in want.fields else []  # or it sends it by itself
    status = ["-w", "%{stderr}%{http_code}"]
    limit = ["--max-time", f"{want.timeout}"]
    options = ["-sSL", "--compressed", *limit, *status, *options, want.url]
    done = run("curl", *options, stdin=want.body or b"")
    return Answer(int(done.stderr), done.stdout)


def by_wget(want: Want) -> Answer:
    options = [f"--header={name}: {value}" for name, value in want.fields.items()]
    options += [f"--ca-certificate={want.ca_file}"] if want.ca_file else []
    options += [f"--certificate={want.certificate}"] if want.certificate else []
    limit = ["--tries=1", f"--timeout={want.timeout}"]
    # It would wait for the content of a 304, which has none, until the connection ends.
    shown = ["-nv", "-S", "--compression=auto", "--content-on-error", "--no-http-keep-alive", "-O-"]
    done = run("wget", *shown, *limit, *options, want.url, well=(0, 8))  # 8 is for 304 and 404
    statuses = re.findall(rb"^ +HTTP/1\.[01] (\d+)", done.stderr, re.MULTILINE)
    return Answer(int(statuses[-1]), done.stdout)


NODE = """
const fetchOne = async ([url, headers]) => {
    try {
        const found = await fetch(url, {headers});
        const body = Buffer.from(await found.arrayBuffer());
        return [found.status, body.toString("base64")];
    } catch (error) {
        return [0, btoa(`${error} ${error.cause?.code} ${error.cause?.message}`)];
    }
};
Promise.all(JSON.parse(process.argv[1]).map(fetchOne)).then((found) => {
    process.stdout.write(JSON.stringify(found), () => process.exit());
});
"""
#: What Chromium shows. A request that keeps the page waiting is all that --dump-dom waits for.
PAGE = """<!doctype html><pre></pre><script>
const fetchOne = ([url, fields]) => {
    const request = new XMLHttpRequest();
    request.open("GET", url, false);
    request.overrideMimeType("text/plain; charset=x-user-defined");
    for (const [name, value] of Object.entries(fields)) request.setRequestHeader(name, value);
    try {
        request.send();
    } catch (error) {
        return [0, btoa(`${error}`)];
    }
    const bytes = request.responseText.replace(/[^]/g, (letter) =>
        String.fromCharCode(letter.charCodeAt(0) & 255));
    return [request.status, btoa(bytes)];
};
const wants = JSON.parse(decodeURIComponent(location.hash.slice(1)));
document.querySelector("pre").textContent = JSON.stringify(wants.map(fetchOne));
</script>
"""


def to_json(wants: Sequence[Want]) -> str:
    return json.dumps([(want.url, want.fields) for want in wants])


def from_json(found: bytes) -> list[Answer]:
    return [Answer(status, base64.b64decode(body)) for status, body in json.loads(found)]


def all_by_node(wants: Sequence[Want]) -> list[Answer]:
    ca_file = wants[0].ca_file
    variables = {"NODE_EXTRA_CA_CERTS": ca_file} if ca_file else {}
    return from_json(run("node", "-e", NODE, to_json(wants), **variables).stdout)


def all_by_chromium(wants: Sequence[Want]) -> list[Answer]:
    """By a page of the same host, in a home of its own, where the CA is imported."""
    ca_file = wants[0].ca_file or os.environ.get("SSL_CERT_FILE")
    proxy = os.environ.get("http_proxy") if "127.0.0.1" not in wants[0].url else None
    page = urllib.parse.urljoin(wants[0].url, "/page.html")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        store = pathlib.Path(home, ".pki/nssdb")
        store.mkdir(parents=True)
        run("certutil", "-d", f"sql:{store}", "-N", "--empty-password")
        if ca_file:
            trusted = ["-A", "-t", "C,,", "-n", "feedtestserver", "-i", ca_file]
            run("certutil", "-d", f"sql:{store}", *trusted)
        shown = run(
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--disable-background-networking", f"--user-data-dir={home}/profile"),
            f"--timeout={PATIENCE * 1000:.0f}",
            *([f"--proxy-server={proxy}"] if proxy else ["--no-proxy-server"]),
            f"{page}#{urllib.parse.quote(to_json(wants))}",
            HOME=home,
        ).stdout
    found = re.search(rb"<pre>(.+)</pre>", shown)
    if not found:
        raise OSError(f"the page was not shown: {shown[-200:]!r}")
    return from_json(found.group(1))


def by_node(want: Want) -> Answer:
    [answer] = all_by_node([want])
    if not answer.status:
        raise OSError(answer.body.decode())
    return answer


def node_obeys_the_proxy() -> bool:
    """Whether this Node knows NODE_USE_ENV_PROXY."""
    version = tuple(map(int, run("node", "-p", "process.versions.node").stdout.split(b".")))
    return version >= (24,) or (22, 21) <= version < (23,)


# Faults

CLIENTS = {
    "urllib": by_urllib,
    "requests": by_requests,
    "httpx": by_httpx,
    "aiohttp": by_aiohttp,
    "curl": by_curl,
}

NO_ANSWER = (
    *("RemoteDisconnected", "ConnectionError", "RemoteProtocolError"),
    *("ServerDisconnectedError", "52"),
)
CUT = "IncompleteRead", "ChunkedEncodingError", "RemoteProtocolError", "ClientPayloadError", "18"
RESET = (
    *("ConnectionResetError RST", "ConnectionError RST", "ReadError RST"),
    *("ClientOSError RST", "56"),
)
CUT_BY_RESET = (
    *("ConnectionResetError RST", "ChunkedEncodingError RST", "ReadError RST"),
    *("ClientPayloadError RST", "56"),
)
#: While they send a body. Some of them look for a response after their connection was reset.
RESET_UPLOAD = (
    *("URLError RST", "ConnectionError( RST)?", "RemoteProtocolError|(Read|Write)Error RST"),
    *("ClientOSError RST", "5[56]"),
)
# What was not read when the server closes is answered by a reset.
CLOSED_UPLOAD = (
    *("RemoteDisconnected|URLError( RST)?", "ConnectionError( RST)?"),
    *(
        "RemoteProtocolError|(Read|Write)Error( RST)?",
        "ServerDisconnectedError|ClientOSError( RST)?",
    ),
    "5[256]",
)
NO_UPLOAD = (
    *("TimeoutError|URLError", "ReadTimeout|ConnectionError", "(Read|Write)Timeout"),
    *("SocketTimeoutError", "28"),
)
NO_MORE = "TimeoutError", "ConnectionError late", "ReadTimeout", "SocketTimeoutError", "28"
NOTHING = "TimeoutError", "ReadTimeout", "ReadTimeout", "SocketTimeoutError", "28"
WHOLE = ("whole",) * 5

#: What each client is to see of a fault, with a Content-Length and in chunks.
EXPECTED = {
    "close": (NO_ANSWER, NO_ANSWER),
    "reset": (RESET, RESET),
    "stall": (NOTHING, NOTHING),
    "close at headers": (CUT, CUT),
    "reset at headers": (CUT_BY_RESET, CUT_BY_RESET),
    "stall at headers": (NO_MORE, NO_MORE),
    "close at 1000": (CUT, CUT),
    "reset at 1000": (CUT_BY_RESET, CUT_BY_RESET),
    "stall at 1000": (NO_MORE, NO_MORE),
    "close at 50%": (CUT, CUT),
    "reset at 50%": (CUT_BY_RESET, CUT_BY_RESET),
    "stall at 50%": (NO_MORE, NO_MORE),
    "close at 100%": (WHOLE, CUT),
    "reset at 100%": (WHOLE, CUT_BY_RESET),
    "stall at 100%": (WHOLE, NO_MORE),
    "close at end": (WHOLE, WHOLE),
    "reset at end": (WHOLE, WHOLE),
    "stall at end": (WHOLE, WHOLE),
}
#: The same of pauses, for clients with no patience, and with plenty.
PAUSES = {
    ("999 at headers",): (NO_MORE, NO_MORE),
    ("999 at 1000",): (NO_MORE, NO_MORE),
    ("999 at 50%",): (NO_MORE, NO_MORE),
    ("0.1 at headers", "0.1 at 1000", "0.1 at 50%", "0.1 at 100%"): (WHOLE, WHOLE),
}
#: Pauses that are all shorter than the patience of a client, whose limit of time may be for all.
SEVERAL = tuple(f"0.4 at {place}%" for place in (20, 40, 60, 80))
#: A body that takes longer to be sent than what is on its way has room for.
UPLOAD = bytes(20_000_000)
REFUSED = ("413",) * 5
UPLOADS = {
    "413": ({"status": 413, "early": True}, REFUSED),
    "413, and a close": ({"status": 413, "early": True, "fault": "close at end"}, REFUSED),
    "reset": ({"early": True, "fault": "reset"}, RESET_UPLOAD),
    "close": ({"early": True, "fault": "close"}, CLOSED_UPLOAD),
    "stall": ({"early": True, "fault": "stall"}, NO_UPLOAD),
}


class Trial(NamedTuple):
    """What a server does; what each client is to see of it, and what it sends and waits for."""

    title: str
    form: str
    step: Step
    expected: Sequence[str]  # regular expressions
    options: Mapping[str, Any] = {}
    errors: str = ""  # one of the server for each client


def trials() -> Iterator[Trial]:
    impatient = {"timeout": STALLED}
    for form, chunked in ((0, None), (1, 100)):
        framing = {"chunked": chunked}
        words = ("length", "chunks")[form]
        for fault, outcomes in EXPECTED.items():
            step = Response(BODY, fault=fault, **framing)
            waits = "stall" in fault and outcomes[form] != WHOLE
            yield Trial(fault, words, step, outcomes[form], impatient if waits else {})
        for pause, outcomes in PAUSES.items():
            step = Response(BODY, pause=pause, **framing)
            waits = outcomes[form] != WHOLE
            yield Trial(
                pause[0], f"{words}, pause", step, outcomes[form], impatient if waits else {}
            )
    step = Response(BODY, pause=SEVERAL)
    yield Trial("0.4, four times", "pause", step, (*WHOLE[:4], "28"), {"timeout": 1.2})
    for words, headers in (("length", {"Content-Length": f"{len(BODY)}"}), ("chunks", {})):
        yield Trial("a generator", words, streamed(headers), WHOLE)
        yield Trial(
            "raises", words, streamed(headers, raises=True), CUT, errors="ZeroDivisionError"
        )
    for title, (arguments, outcomes) in UPLOADS.items():
        options = {"body": UPLOAD, "timeout": STALLED if "stall" in title else PATIENCE}
        yield Trial(title, "upload", Response(**arguments), outcomes, options)
    for status in (401, 413, 417):
        options = {"body": UPLOAD, "fields": {"Expect": "100-continue"}}
        step = Response(status=status, early=True)
        yield Trial("instead of 100", "upload", step, (f"{status}",) * 5, options)


def streamed(headers: Mapping[str, str], raises: bool = False) -> Step:
    def produce() -> Iterator[bytes]:
        yield from (BODY[begin : begin + 1000] for begin in range(0, 5000, 1000))
        if raises:
            yield b"%d" % (1 // 0)
        yield BODY[5000:]

    return lambda request: Response(produce(), headers=headers)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and all that it came from, as each client keeps it."""
    if error:
        inner = [*error.args, getattr(error, "reason", None), error.__cause__ or error.__context__]
        yield error
        for each in inner:
            if isinstance(each, BaseException) and each is not error:
                yield from causes(each)


def described(error: Exception) -> str:
    """The type of an exception, with RST where it speaks of one, and so on."""
    found = list(causes(error))
    codes = {each.errno for each in found if isinstance(each, OSError)}
    name = {"timeout": "TimeoutError"}.get(type(error).__name__, type(error).__name__)
    for words, code in (("RST", errno.ECONNRESET), ("refused", errno.ECONNREFUSED)):
        if code in codes or os.strerror(code) in f"{error!r}":
            return f"{name} {words}"
    kinds = {
        "unknown": socket.gaierror,
        "late": (TimeoutError, socket.timeout),
        "EOF": ssl.SSLEOFError,
    }
    words = [word for word, kind in kinds.items() if any(isinstance(each, kind) for each in found)]
    return f"{name} {words[0]}" if words and "Timeout" not in name else name


def outcome(fetch: Callable[[Want], Answer], want: Want) -> str:
    """What came of it: an exception, an exit status, the status of an error, or the body."""
    try:
        answer = fetch(want)
    except subprocess.CalledProcessError as error:
        return f"{error.returncode}"
    except Exception as error:
        return described(error)
    if answer.status >= 400:
        return f"{answer.status}"
    return "whole" if answer.body == BODY else f"{len(answer.body)} bytes"


def ask_all(
    want: Want,
    clients: Mapping[str, Callable[[Want], Answer]] = CLIENTS,
    see: Callable[[Callable[[Want], Answer], Want], str] = outcome,
) -> tuple[str, ...]:
    """What came of it for each client; all at once, since stalls take their time."""
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        return tuple(pool.map(functools.partial(see, want=want), clients.values()))


class Table:
    """Prints a row for each trial, and counts those that are not as they should be."""

    def __init__(self, title: str, form: str, columns: Iterable[str], width: int = 25) -> None:
        self.rows = self.wrong = 0
        self.width = width
        self.show(title, form, columns)

    def show(self, title: str, form: str, cells: Iterable[str]) -> None:
        row = " ".join([f"{title:18} {form:17}", *(f"{cell:{self.width}}" for cell in cells)])
        print(row.rstrip(), flush=True)

    def add(self, title: str, form: str, seen: Sequence[str], expected: Sequence[str]) -> None:
        self.show(title, form, seen)
        self.rows += 1
        if not all(map(re.fullmatch, expected, seen)):
            self.show("", "expected", expected)
            self.wrong += 1

    def end(self) -> int:
        print(f"rows: {self.rows}, wrong: {self.wrong}\n")
        return self.wrong


def check_errors(server: FeedTestServer, expected: Sequence[str] = ()) -> int:
    """Whether these, and no others, are the errors of the server, which are then forgotten."""
    found = [*map(str, server.errors)]
    server.clear()
    right = len(found) == len(expected) and all(map(re.search, expected, found))
    if not right:
        print("the server found errors:", *found, sep="\n  ")
    return not right


def check_faults() -> int:
    """The number of rows that are wrong."""
    table, failures = Table("Fault", "framing", CLIENTS), 0
    with FeedTestServer(DATA) as server:
        for trial in trials():
            server.respond("/feed.xml", trial.step)
            seen = ask_all(Want(server.get_url("feed.xml"), **trial.options))
            table.add(trial.title, trial.form, seen, trial.expected)
            failures += check_errors(server, [trial.errors] * len(CLIENTS) if trial.errors else [])
    return table.end() + failures


# A server that is down, and the command line

DOWN = (
    *("URLError refused", "ConnectionError refused", "ConnectError refused"),
    *("ClientConnectorError refused", "7"),
)


def check_down() -> int:
    """The number of rows that are wrong."""
    table = Table("Server", "", CLIENTS)
    with FeedTestServer(DATA) as server:
        server.respond("/feed.xml", Response(BODY))
        want = Want(server.get_url("feed.xml"))
        table.add("up", "", ask_all(want), WHOLE)
        with server.down():
            table.add("down", "", ask_all(want), DOWN)
        table.add("up again", "", ask_all(want), WHOLE)
        failures = check_errors(server)
    return table.end() + failures


def check_command_line() -> int:
    """Whether it prints what each client did, as JSON; the number of clients that are wrong."""
    command = [sys.executable, str(HERE / "feedtestserver.py"), str(DATA), "--port", "0"]
    failures = 0
    with subprocess.Popen([*command, "--json", "--strict"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        url = json.loads(process.stdout.readline())["url"]
        for name, fetch in CLIENTS.items():
            fetch(Want(f"{url}formats/rss20.rss", fields={"User-Agent": name, "Cookie": "a=1"}))
            request = json.loads(process.stdout.readline())["request"]
            seen = request["status"], dict(request["headers"]).get("User-Agent")
            failures += seen != (200, name)
        process.terminate()
        findings = [json.loads(line)["finding"] for line in process.stdout]
    accused = {each["client"] for each in findings if each["rule"] == "cookie"}
    right = (process.returncode, accused) == (1, {*CLIENTS})
    print(f"--json: {len(findings)} findings, wrong clients: {failures}, status and end: {right}\n")
    return failures + (not right)


# Handshakes, and certificates of clients

#: What each client says of a handshake to which the server does that.
HANDSHAKES = {
    "stall": ("URLError late", "ReadTimeout", "ConnectTimeout", "ConnectionTimeoutError", "28"),
    "reset": (
        *("URLError RST", "ConnectionError RST", "ConnectError RST", "ClientConnectorError RST"),
        "35",
    ),
    "close": ("URLError EOF", "SSLError EOF", "ConnectError EOF", "ClientConnectorError", "35"),
}
WAYS = "plain", "proxy", "no proxy"
TLS = {"TLS 1.2": ssl.TLSVersion.TLSv1_2, "TLS 1.3": ssl.TLSVersion.TLSv1_3}
#: Who shows a certificate, and what the server knows of it then: a name, or nothing, or an alert.
SHOWN = [
    ("none", "", "nobody"),
    ("none", "own", "nobody"),
    ("optional", "", "nobody"),
    ("optional", "own", "reader"),
    ("optional", "foreign", "refused"),
    ("required", "", "refused"),
    ("required", "own", "reader"),
    ("required", "foreign", "refused"),
]
#: The alerts that say so, in the words of OpenSSL, GnuTLS and curl, and all that wget says of them
#: with TLS 1.3.
ALERTS = "(?i)certificate.required|handshake.failure|unknown.ca|fatal alert|not save SSL session"
#: A certificate that another CA has signed, as that of another process.
FOREIGN = """
from feedtestserver import FeedTestServer
with FeedTestServer() as server, open(server.client_certificate("stranger")) as file:
    print(file.read())
"""
IN_PROCESS = {name: fetch for name, fetch in CLIENTS.items() if name != "curl"}


def set_version(version: ssl.TLSVersion) -> Callable[[ssl.SSLContext], None]:
    def configure(context: ssl.SSLContext) -> None:
        context.minimum_version = context.maximum_version = version

    return configure


@contextlib.contextmanager
def reached(way: str, server: FeedTestServer) -> Iterator[tuple[str, str | None]]:
    """The beginning of a URL by which it is reached that way, and the CA that is to be known."""
    if way == "plain":
        yield server.get_url("", "https").rstrip("/"), server.ca_file
    else:
        with server.intercept(proxy=way == "proxy"):
            yield HOST, None


def check_handshakes() -> int:
    """The number of rows that are wrong."""
    table = Table("Handshake", "way", CLIENTS)
    with FeedTestServer(DATA) as server:
        for way in WAYS:
            for kind, expected in HANDSHAKES.items():
                clients = IN_PROCESS if way == "no proxy" else CLIENTS
                timeout = STALLED if kind == "stall" else PATIENCE
                server.handshake = kind
                with reached(way, server) as (root, ca_file):
                    want = Want(f"{root}/feed.xml", ca_file, timeout=timeout)
                    seen = ask_all(want, clients)
                table.add(kind, way, seen, expected[: len(seen)])
        failures = check_errors(server)
    return table.end() + failures


def named(fetch: Callable[[Want], Answer], want: Want) -> str:
    """Whom the server has recognized, or that it has refused, or an error as it stands."""
    try:
        return fetch(want).body.decode()
    except Exception as error:
        said = f"{error!r} {error}" + (getattr(error, "stderr", None) or b"").decode()
        return "refused" if re.search(ALERTS, said) else said


def check_client_certificates() -> int:
    """The number of rows that are wrong."""
    clients = {
        name: fetch
        for name, fetch in {**CLIENTS, "pycurl": by_pycurl, "wget": by_wget}.items()
        if not missing(name)
    }
    table, failures = Table("Certificate", "way", clients, 10), 0
    with tempfile.TemporaryDirectory() as folder, FeedTestServer(DATA) as server:
        foreign = pathlib.Path(folder, "foreign.pem")
        foreign.write_bytes(run(sys.executable, "-c", FOREIGN, PYTHONPATH=f"{HERE}").stdout)
        files = {"": None, "own": server.client_certificate("reader"), "foreign": f"{foreign}"}
        for words, version in TLS.items():
            server.configure_tls = set_version(version)
            for way, (mode, shown, expected) in itertools.product(WAYS, SHOWN):
                server.respond("*", who_is_it)
                server.client_certificates = mode
                with reached(way, server) as (root, ca_file):
                    want = Want(f"{root}/feed.xml", ca_file, certificate=files[shown])
                    seen = ask_all(want, IN_PROCESS if way == "no proxy" else clients, named)
                title = f"{mode}, {shown}" if shown else mode
                table.add(title, f"{words}, {way}", seen, [expected] * len(seen))
                failures += check_errors(server)
    return table.end() + failures


def who_is_it(request: Request) -> Response:
    return Response((request.client_certificate or "nobody").encode())


# Addresses, and hosts that have none or are down

#: What comes of it by name, for the clients in this process, and by the proxy. There the server
#: itself says what is wrong, and a tunnel is refused.
PUBLIC = "93.184.215.14"
BY_NAME = {
    PUBLIC: ("whole",) * 4,
    f"{PUBLIC} ::1": ("whole",) * 4,
    "unknown": (
        *("URLError unknown", "ConnectionError unknown", "ConnectError unknown"),
        "ClientConnectorDNSError unknown",
    ),
    "refused": (
        *("URLError refused", "ConnectionError refused", "ConnectError refused"),
        "ClientConnectorError refused",
    ),
    "silent": ("URLError late", "ConnectTimeout", "ConnectTimeout", "ConnectionTimeoutError"),
}
#: aiohttp does not go by the environment. wget has 4 for what fails on the network.
BY_PROXY = {
    PUBLIC: (("whole",) * 6, ("whole",) * 6),
    **{
        answer: (
            ("502", "502", "502", BY_NAME[answer][3], "502", "502"),
            ("URLError", "ProxyError", "ProxyError", BY_NAME[answer][3], "56", "4"),
        )
        for answer in ("unknown", "refused")
    },
    "silent": (
        ("TimeoutError", "ReadTimeout", "ReadTimeout", BY_NAME["silent"][3], "28", "4"),
        ("URLError late", "ReadTimeout", "ReadTimeout", BY_NAME["silent"][3], "28", "4"),
    ),
}


def check_addresses() -> int:
    """The number of rows that are wrong."""
    clients = {**CLIENTS, **({} if missing("wget") else {"wget": by_wget})}
    table, failures = Table("Answer", "way", clients), 0
    with FeedTestServer(DATA) as server:
        for scheme in ("http", "https"):
            want = Want(HOST.replace("https", scheme) + "/feed.xml")
            for answer, expected in BY_NAME.items():
                with server.intercept(proxy=False):
                    seen = see_address(server, answer, want, IN_PROCESS)
                table.add(answer, f"{scheme}, name", seen, expected)
                failures += check_addressed(server, answer.split(), len(IN_PROCESS))
            for answer, outcomes in BY_PROXY.items():
                with server.intercept():
                    seen = see_address(server, answer, want, clients)
                table.add(answer, f"{scheme}, proxy", seen, outcomes[scheme == "https"])
                failures += check_addressed(server, [answer, "127.0.0.1"], len(clients))
    return table.end() + failures + check_guard()


def see_address(
    server: FeedTestServer, answer: str, want: Want, clients: Mapping[str, Callable]
) -> tuple[str, ...]:
    server.respond("*", Response(BODY))
    # An answer that is no single word stands for a list.
    words = answer.split()
    server.resolve("*", words if len(words) > 1 else answer)
    timeout = STALLED if answer == "silent" else PATIENCE
    return ask_all(want._replace(timeout=timeout), clients)


def check_addressed(server: FeedTestServer, addresses: Sequence[str], clients: int) -> int:
    """Whether those who got through connected to one of these, and no error was found."""
    found = [request.address for request in server.requests if "502" not in f"{request}"]
    wrong = [address for address in found if address not in addresses]
    if PUBLIC in addresses and len(found) < clients:
        wrong.append(f"{len(found)} requests")
    if wrong:
        print("  request.address:", *wrong)
    return bool(wrong) + check_errors(server)


def check_guard() -> int:
    """A guard that looks at addresses before the fetch, and is led to another one by then."""
    failures = 0
    for name, fetch in IN_PROCESS.items():
        with FeedTestServer(DATA) as server, server.intercept(proxy=False):
            server.respond("*", Response(BODY))
            server.resolve("example.com", PUBLIC, "127.0.0.1")
            server.resolve("private.example", "10.0.0.1")
            verdicts = [is_public(host) for host in ("private.example", "example.com")]
            fetch(Want(f"{HOST}/feed.xml"))
            seen = verdicts, server.requests[-1].address
            print(f"a guard, then {name}: {seen}")
            failures += seen != ([False, True], "127.0.0.1")
    return failures


def is_public(host: str) -> bool:
    found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(address[0]).is_global for *_, address in found)


# Every host: what is fetched in the same words whatever the client, by a URL that is nowhere

SITE = {
    "example.com/feed.xml": b"<rss version='2.0'><channel><title>News</title></channel></rss>",
    "example.com/old.xml": b"<!--\nStatus: 301\nHeader: Location: http://example.org/old.xml\n-->",
    "example.org/old.xml": b"<!--\nStatus: 302\nHeader: Location: https://example.com/feed.xml\n-->",
}
#: Made before any server: it knows of no proxy, and of no CA but those of the system.
EARLY = httpx.Client(follow_redirects=True)


def get_by_requests_send(url: str) -> bytes:
    """As the reader library does: send() asks neither for proxies nor for REQUESTS_CA_BUNDLE."""
    with requests.Session() as session:
        request = session.prepare_request(requests.Request("GET", url))
        return session.send(request, timeout=PATIENCE).content


def get_by_early_httpx(url: str) -> bytes:
    return EARLY.get(url, headers={"Connection": "close"}, timeout=PATIENCE).content


def get_by_async_httpx(url: str, **options: bool) -> bytes:
    async def fetch() -> bytes:
        async with httpx.AsyncClient(follow_redirects=True, **options) as client:
            return (await client.get(url, timeout=PATIENCE)).content

    return asyncio.run(fetch())


def get_by_direct_httpx(url: str) -> bytes:
    """Without the environment: anyio asks for an address, and takes the port of the URL."""
    return get_by_async_httpx(url, trust_env=False)


def get_by_feedparser(url: str) -> bytes:
    feed = feedparser.parse(url)
    if "title" not in feed.feed:
        raise feed.bozo_exception
    return f"<title>{feed.feed.title}</title>".encode()


def get_by_child(url: str) -> bytes:
    code = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
    return run(sys.executable, "-c", code, url).stdout


def get_by_newsboat(url: str) -> bytes:
    with tempfile.TemporaryDirectory() as home:
        folder = pathlib.Path(home)
        (folder / "urls").write_text(f"{url}\n")
        (folder / "config").write_text("error-log error.txt\n")
        files = ["-u", "urls", "-C", "config", "-c", "cache.db"]
        subprocess.run(
            ["newsboat", *files, "-l", "3", "-d", "log.txt", "-x", "reload"],
            cwd=home,
            env={**os.environ, "HOME": home},
            check=True,
            capture_output=True,
            timeout=PATIENCE,
        )
        with contextlib.closing(sqlite3.connect(folder / "cache.db")) as cache:
            titles = [title for (title,) in cache.execute("SELECT title FROM rss_feed")]
        if not any(titles):
            raise OSError((folder / "log.txt").read_text(errors="replace"))
    return f"<title>{titles[0]}</title>".encode()


def body_by(fetch: Callable[[Want], Answer], url: str) -> bytes:
    return fetch(Want(url)).body


GETTERS = {
    **{name: functools.partial(body_by, fetch) for name, fetch in CLIENTS.items()},
    "http.client": functools.partial(body_by, by_http_client),
    "urllib3": functools.partial(body_by, by_urllib3),
    "requests send()": get_by_requests_send,
    "httpx, early": get_by_early_httpx,
    "httpx async": get_by_async_httpx,
    "httpx direct": get_by_direct_httpx,
    "feedparser": get_by_feedparser,
    "a child": get_by_child,
    "pycurl": functools.partial(body_by, by_pycurl),
    "wget": functools.partial(body_by, by_wget),
    "Node's fetch": functools.partial(body_by, by_node),
    "newsboat": get_by_newsboat,
}


def missing(client: str) -> str:
    """Why a client cannot be asked here; empty where it can."""
    command = {"Node's fetch": "node", "Chromium": "chromium"}.get(client, client)
    needed = [command] if command in ("curl", "wget", "newsboat", "node", "chromium") else []
    needed += ["certutil"] if client == "Chromium" else []
    absent = [name for name in needed if not shutil.which(name)]
    absent += ["pycurl"] if client == "pycurl" and not pycurl else []
    return f"no {absent[0]} here" if absent else ""


#: What a client says of a certificate: Python's words, OpenSSL's, GnuTLS's, curl's, Node's.
UNKNOWN = "unable to (get local issuer|verify the first)|known issuer|verification failed"
MISMATCH = "[Hh]ostname mismatch|do(es not|esn't) match|no alternative cert|ALTNAME_INVALID"
WORDS = {
    "expired": "expired",
    "not-yet-valid": "not yet valid|not yet activated",
    "wrong-host": MISMATCH,
    "self-signed": "self.signed|known issuer|unknown CA|verification failed",
    "incomplete-chain": UNKNOWN,
    "no-san": MISMATCH,
    "unknown": UNKNOWN,
}
#: Others go by the common name where there is nothing else, as Python's ssl does by itself.
NEED_SAN = ("requests", "requests send()", "urllib3")
#: All that newsboat says of any.
NOT_OK = "USERERROR: .* SSL peer certificate or SSH remote key was not OK"
FETCHED = "fetched"
FEED, MOVED = "example.com/feed.xml", "example.com/old.xml"
#: The kind of certificate, the URL, and what is to come of it.
ROWS = [
    ("valid", f"http://{FEED}", FETCHED),
    ("valid", f"https://{FEED}", FETCHED),
    ("valid", f"https://{MOVED}", FETCHED),
    *((kind, f"https://{FEED}", kind) for kind in WORDS if kind != "unknown"),
]
#: What is fetched last: the server's own URL, by who does not know its CA.
OUTSIDE = ("valid", "https://127.0.0.1", "unknown")


def seen(get: Callable[[str], bytes], url: str, expected: str) -> str:
    """What came of it: fetched, the fault of a certificate, or an error as it stands."""
    try:
        body = get(url)
    except Exception as error:
        said = f"{error!r} {error}" + (getattr(error, "stderr", None) or b"").decode()
        words = f"{WORDS[expected]}|{NOT_OK}" if expected in WORDS else None
        return expected if words and re.search(words, said) else said
    return FETCHED if b"<title>News</title>" in body else f"{body!r}"


def rows_of(server: FeedTestServer, get: Callable[[str], bytes]) -> Iterator[str]:
    """What one client sees: inside of intercept(), and of a CA that it does not know."""
    with server.intercept():
        for kind, url, expected in ROWS:
            server.certificate = kind
            yield seen(get, url, expected)
    server.certificate = "valid"
    yield seen(get, server.get_url(FEED, "https"), "unknown")


def check_hosts() -> int:
    """The number of clients that see something else than they should."""
    failures = 0
    rows = [*ROWS, OUTSIDE]
    row = "{:16}" + " {:16}" * len(rows)
    print(row.format("Certificate", *(kind for kind, _, _ in rows)))
    print(row.format("URL", *(url.split("/")[0] + url[-9:] for _, url, _ in ROWS), "its own"))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in SITE.items():
            path = pathlib.Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        with FeedTestServer(folder) as server:
            for client, get in GETTERS.items():
                reason = missing(client)
                if client == "Node's fetch" and not reason and not node_obeys_the_proxy():
                    reason = "no proxy"
                if reason:
                    print(row.format(client, reason, *[""] * (len(rows) - 1)))
                    continue
                found = list(rows_of(server, get))
                print(row.format(client, *(cell[:16] for cell in found)), flush=True)
                for cell, (kind, url, expected) in zip(found, rows):
                    if kind == "no-san" and client not in NEED_SAN:
                        expected = FETCHED
                    if cell != expected:
                        print(f"  {kind} {url}: expected {expected}, found {cell}")
                        failures += 1
            if server.errors:
                print("the server found errors:", *server.errors, sep="\n")
                failures += 1
    print(f"clients: {len(GETTERS)}, wrong: {failures}")
    return failures


# Fixtures, by each way


class Case(NamedTuple):
    """A fixture, and what is to come of it where that is not its own body with status 200."""

    path: str
    status: int = 200
    body_of: str | None = None
    fields: Mapping[str, str] = {}


TARGET = "redirect/target.xml"
CASES = {
    "feed": Case("formats/rss20.rss"),
    **{f"{code}": Case(f"redirect/{code}.xml", 200, TARGET) for code in (301, 302, 307, 308)},
    "gzip": Case("faults/gzip.xml"),
    "deflate": Case("faults/deflate.xml"),
    "chunked": Case("faults/chunked.xml"),
    "304": Case("conditional/etag-strong.xml", 304, "", {"If-None-Match": '"v1"'}),
    "204": Case("status/204.xml", 204, ""),
    "404": Case("status/404.xml", 404),
    "410": Case("status/410.xml", 410),
    "no length": Case("headers/without-content-length.xml"),
    "UTF-8 in a field": Case("charset/utf8-header-bytes.xml"),
    "UTF-8 in the path": Case("formats/Zürich See.xml"),
    "template": Case("template/body.xml"),
    "as it is": Case("faults/status-without-reason.asis"),
    "delay": Case("faults/delay.xml"),
    "drip": Case("faults/rate.xml"),
    "pause": Case("faults/pause-chunked.xml"),
    "close at the end": Case("faults/chunked-close-at-end.xml"),
    "reset at the end": Case("faults/chunked-reset-at-end.xml"),
    "early": Case("faults/early-413.xml", 413),
    "large": Case("binary/large.bin"),
}
#: What is not in data/.
OTHERS = {
    "formats/Zürich See.xml": (DATA / "formats/rss20.rss").read_bytes(),
    "binary/large.bin": bytes(range(256)) * 8192,
    "page.html": PAGE.encode(),
}
Fetch = Callable[[Sequence[Want]], list[Answer]]


def one_by_one(fetch: Callable[[Want], Answer]) -> Fetch:
    """Fetch by one call each, some of them at once; an error stands in the place of a body."""

    def attempt(want: Want) -> Answer:
        try:
            return fetch(want)
        except Exception as error:
            return Answer(0, f"{error!r} {getattr(error, 'stderr', '')}".encode())

    def fetch_all(wants: Sequence[Want]) -> list[Answer]:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return list(pool.map(attempt, wants))

    return fetch_all


class Client(NamedTuple):
    """How to fetch; what the README says of intercept(), and of the CA."""

    fetch: Fetch
    intercepted: str
    note: str


ASKED = {
    "urllib": Client(one_by_one(by_urllib), "yes", "``context=server.ssl_context()``"),
    "http.client": Client(one_by_one(by_http_client), "yes", "``context=server.ssl_context()``"),
    "requests": Client(one_by_one(by_requests), "yes", "``verify=server.ca_file``"),
    "urllib3": Client(one_by_one(by_urllib3), "yes", "``ca_certs=server.ca_file``"),
    "httpx": Client(one_by_one(by_httpx), "yes", "``verify=server.ssl_context()``"),
    "aiohttp": Client(one_by_one(by_aiohttp), "yes", "``ssl=server.ssl_context()``"),
    "pycurl": Client(one_by_one(by_pycurl), "by proxy", "``CAINFO``, inside of intercept() too"),
    "curl": Client(one_by_one(by_curl), "by proxy", "``--cacert``"),
    "wget": Client(
        one_by_one(by_wget), "by proxy", "``--ca-certificate``; leaves deflate as it is"
    ),
    "Node's fetch": Client(
        all_by_node, "by proxy", "``NODE_EXTRA_CA_CERTS``; the proxy from version 24 on"
    ),
    "Chromium": Client(
        all_by_chromium, "by proxy", "``--proxy-server=URL``; ``certutil`` imports the CA"
    ),
}
#: What a client leaves to its user: wget undoes gzip alone.
LEFT = {("wget", "deflate"): functools.partial(decoded, "deflate")}


def expected(case: Case, root: str) -> Answer:
    """The file as it stands, but for what a template and .asis do to it."""
    path = case.path if case.body_of is None else case.body_of
    if not path:
        return Answer(case.status, b"")
    body = OTHERS[path] if path in OTHERS else (DATA / path).read_bytes()
    if path.endswith(".asis"):
        body = body.partition(b"\r\n\r\n")[2]
    if path.startswith("template/"):
        parts = urllib.parse.urlsplit(root)
        port = parts.port or 443
        for name, value in (("base_url", root), ("host", parts.hostname), ("port", port)):
            body = body.replace(b"{{%s}}" % name.encode(), f"{value}".encode())
    return Answer(case.status, body)


def differences(client: str, root: str, ca_file: str | None) -> dict[str, str]:
    """The cases of which a client has seen something else, with what it has seen."""
    wants = [
        Want(f"{root}/{urllib.parse.quote(case.path)}", ca_file, case.fields)
        for case in CASES.values()
    ]
    try:
        answers = ASKED[client].fetch(wants)
    except Exception as error:
        answers = [Answer(0, f"{error!r}".encode())] * len(wants)
    wrong = {}
    for (name, case), answer in zip(CASES.items(), answers):
        if (client, name) in LEFT:
            answer = answer._replace(body=LEFT[client, name](answer.body))
        if answer != expected(case, root):
            wrong[name] = f"{answer.status} {answer.body[:300]!r}"
    return wrong


def copy_fixtures(folder: pathlib.Path) -> None:
    shutil.copytree(DATA, folder)
    for path, content in OTHERS.items():
        (folder / path).write_bytes(content)


def see_all(clients: Sequence[str], root: str, ca_file: str | None) -> dict[str, dict[str, str]]:
    """The differences of each client; several at once, as they mostly wait."""
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda client: differences(client, root, ca_file), clients)
        return dict(zip(clients, found))


def see_each_way(folder: pathlib.Path, here: Sequence[str]) -> dict[str, dict[str, dict[str, str]]]:
    """The differences by way and client."""
    copy_fixtures(folder)
    copy_fixtures(folder / "example.com")
    by_proxy = [name for name in here if name != "Node's fetch" or node_obeys_the_proxy()]
    with FeedTestServer(folder) as server:
        found = {
            "plain": see_all(here, server.base_url, None),
            "HTTPS": see_all(here, server.get_url("", "https").rstrip("/"), server.ca_file),
        }
        with server.intercept():
            found["intercepted"] = see_all(by_proxy, HOST, None)
        # Whatever it is told, a browser asks its maker's hosts as well.
        errors = [error for error in server.errors if "no such host here" not in error]
        server.clear()
    if errors:
        found["intercepted"]["the server"] = dict(enumerate(errors))
    return found


def check_clients() -> int:
    """The number of cells that are wrong."""
    here = [name for name in ASKED if not missing(name)]
    with tempfile.TemporaryDirectory() as folder:
        found = see_each_way(pathlib.Path(folder, "site"), here)
    print(f"Fixtures: {', '.join(CASES)}")
    row = "{:16}" + " {:20}" * len(found)
    print(row.format("Client", *found))
    for name in ASKED:
        cells = [cell_of(seen.get(name), name in here) for seen in found.values()]
        print(row.format(name, *cells))
    wrong = {
        f"{name}, {way}, {case}": what
        for way, seen in found.items()
        for name, cases in seen.items()
        for case, what in cases.items()
    }
    for where, what in wrong.items():
        print(f"  {where}: found {what}")
    print(f"clients: {len(here)}, wrong: {len(wrong)}\n")
    print_table(
        ("Client", "Plain", "HTTPS", "Intercepted", "Its CA, and notes"),
        [
            (name, *(tick_of(name, way, seen) for way, seen in found.items()), ASKED[name].note)
            for name in ASKED
        ],
    )
    return len(wrong)


def cell_of(wrong: Mapping[str, str] | None, is_here: bool) -> str:
    """How many fixtures came as they should, or the names of those that did not."""
    if wrong is None:
        return "no proxy" if is_here else "is not here"
    return ", ".join(wrong) or f"{len(CASES)}/{len(CASES)}"


def tick_of(client: str, way: str, seen: Mapping[str, Mapping[str, str]]) -> str:
    if client not in seen:
        return "-" if missing(client) else "no proxy"
    well = ASKED[client].intercepted if way == "intercepted" else "yes"
    return "no" if seen[client] else well


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as reStructuredText has it, for the README."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    rule = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (head, *rows)
    ]
    print(rule, lines[0], rule, *lines[1:], rule, "", sep="\n", flush=True)


def check_runners() -> int:
    """The number of runners that are wrong."""
    rows, failures = runners.check()
    print_table(("Runner", "Tests", "A failing test shows"), rows)
    return failures


def main() -> int:
    checks = (
        *(check_faults, check_down, check_command_line, check_handshakes),
        *(check_client_certificates, check_addresses, check_hosts, check_clients, check_runners),
    )
    wanted = [check for check in checks if check.__name__ in sys.argv] or checks
    return 1 if sum(check() for check in wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
