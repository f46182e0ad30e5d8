"""For the tests of tracking.js: pages of another origin that embed it, and one appliance for all of them."""

import http.server
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from conftest import Appliance, free_port, running, wait_for
from playwright.sync_api import Browser, BrowserContext, Page, Request

from appliance.store.embedded import EmbeddedPostgres

PAGE = """<!doctype html><title>{title}</title><link rel="icon" href="data:,">
{before}
<script async src="{script}" {attributes}></script>
<body>{body}</body>"""

# As the browser does it when a tab goes behind another, which tabs without a window never do.
HIDDEN = """(hidden) => {
    Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
    document.dispatchEvent(new Event("visibilitychange", { bubbles: true }));
}"""
# A browser that takes everything and delivers nothing, as one does whose network is gone.
LOSING_BEACON = "navigator.sendBeacon = () => true;"
RUNNING = "window.appliance && appliance.track && !appliance.q"
CORS = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "Retry-After"}


@dataclass
class Web:
    """The appliance that all these tests share. Each test has a site, so that none sees another's events."""

    box: Appliance
    conn: psycopg.Connection[Any]
    numbers: Iterator[int] = field(default_factory=count)

    def stored(self, site_id: str) -> list[dict[str, Any]]:
        """Return a site's events in the order in which the browser made them, which their ids tell."""
        found = self.conn.execute(
            "SELECT raw_event_data FROM events_log WHERE site_id = %s ORDER BY event_id", (site_id,)
        )
        return [row[0] for row in found]


@pytest.fixture(scope="session")
def web(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute("CREATE DATABASE tracking TEMPLATE template_of_tests")
    url = psycopg.conninfo.make_conninfo(postgres.conninfo, dbname="tracking")
    sites = [{"id": f"site-{n}"} for n in range(300)]
    config = {"database": {"url": url}, "server": {"demo": True}, "sites": sites}
    with (
        running(tmp_path_factory.mktemp("tracking"), **config) as box,
        psycopg.connect(url, autocommit=True) as connection,
    ):
        yield Web(box, connection)


class Site:
    """A web site of another origin than the appliance's, whose pages embed the tracker as the test says."""

    def __init__(self, web: Web) -> None:
        self.web = web
        self.id = f"site-{next(web.numbers)}"
        self.port = free_port()
        self.origin = f"http://localhost:{self.port}"
        self.script = f"{web.box.url}/tracking.js"
        self.attributes = 'data-localhost="on"'
        self.title = "A page"
        self.before = ""
        self.body = ""
        self.page = PAGE
        self.headers: dict[str, str] = {}
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answer(self)

            def do_POST(self) -> None:
                site.answer(self)

            def log_message(self, *_: Any) -> None:
                """Stay silent."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Answer with the page; what is below /first-party/ is passed on to the appliance, as a proxy would do."""
        path = urlsplit(request.path).path
        headers = {"Content-Type": "text/html; charset=utf-8", **self.headers}
        if path.startswith("/first-party/"):
            body = self._passed_on(request, path.removeprefix("/first-party"))
            headers["Content-Type"] = "text/javascript"
        else:
            attributes = f'data-site="{self.id}" {self.attributes}'
            parts = {"title": self.title, "before": self.before, "script": self.script, "body": self.body}
            body = self.page.format(attributes=attributes, **parts).encode()
        request.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def _passed_on(self, request: http.server.BaseHTTPRequestHandler, path: str) -> bytes:
        data = request.rfile.read(int(request.headers.get("Content-Length") or 0)) or None
        kept = {name: value for name in ("Content-Type", "Origin") if (value := request.headers.get(name))}
        passed = urllib.request.Request(self.web.box.url + path, data, kept)  # noqa: S310 - to the appliance
        with urllib.request.urlopen(passed, timeout=10) as answer:  # noqa: S310
            return bytes(answer.read())

    def host(self, name: str) -> str:
        """Return the origin of the site's pages under another name, which is neither local nor served over TLS."""
        return f"http://{name}:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def site(web: Web) -> Iterator[Site]:
    one = Site(web)
    yield one
    one.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    fresh = browser.new_context()
    yield fresh
    fresh.close()


class Visitor:
    """Somebody who looks at the site's pages in one tab."""

    def __init__(self, site: Site, page: Page) -> None:
        self.site = site
        self.page = page
        self.said: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))

    def goes_to(self, path: str = "/", *, origin: str = "") -> Page:
        """Load a page, and wait until the tracker is there."""
        self.page.goto((origin or self.site.origin) + path)
        self.page.wait_for_function(RUNNING)
        return self.page

    def hides(self, *, hidden: bool = True) -> None:
        self.page.evaluate(HIDDEN, hidden)

    def closes(self) -> None:
        with self.page.expect_event("close"):
            self.page.close(run_before_unload=True)

    def hears(self, words: str) -> str:
        """Wait until the console says it, and return all of it."""
        wait_for(lambda: self.waits() and any(words in text for text in self.said), f"{words!r} in {self.said}")
        return "\n".join(self.said)

    def waits(self) -> bool:
        """Let Playwright deliver what the browser has told it, which it does only while it is asked for something."""
        self.page.wait_for_timeout(30)
        return True

    def pause(self) -> dict[str, Any]:
        """Return until when the tracker of this site waits, and now."""
        key = f"appliance.pause/{self.site.id}"
        pause: dict[str, Any] = self.page.evaluate(
            "key => ({ until: Number(localStorage[key] || 0), now: Date.now() })", key
        )
        return pause

    def queue(self) -> list[dict[str, Any]]:
        """Return what waits in the browser."""
        items: dict[str, str] = self.page.evaluate("({ ...localStorage })")
        return [json.loads(text) for key, text in items.items() if key.startswith(f"appliance.queue/{self.site.id}/")]

    def has_sent_all(self) -> None:
        """Wait until nothing waits in the browser."""
        wait_for(lambda: self.waits() and not self.queue(), "the queue to be empty")

    def stored(self, *types: str, soon: bool = True) -> list[dict[str, Any]]:
        """Wait until exactly events of these types are stored. `soon`: have the queue sent at once."""
        found: list[str] = []

        def arrived() -> bool:
            if not self.page.is_closed():
                self.waits()
            found[:] = self.types()
            return sorted(found) == sorted(types)

        if soon and not self.page.is_closed():
            self.page.evaluate("dispatchEvent(new Event('online'))")
        with suppress(AssertionError):
            wait_for(arrived, "the events")
        assert sorted(found) == sorted(types)
        return self.events()

    def events(self) -> list[dict[str, Any]]:
        return self.site.web.stored(self.site.id)

    def types(self) -> list[str]:
        return [event["eventType"] for event in self.events()]


@pytest.fixture
def visitor(site: Site, context: BrowserContext) -> Visitor:
    return Visitor(site, context.new_page())


@pytest.fixture
def another_tab(site: Site, context: BrowserContext) -> Callable[[], Visitor]:
    """More tabs of the same visitor."""
    return lambda: Visitor(site, context.new_page())


def sent_with(request: Request) -> list[dict[str, Any]]:
    """Return the events of a request."""
    events: list[dict[str, Any]] = json.loads(request.post_data or "")["events"]
    return events


def of_type(events: list[dict[str, Any]], event_type: str) -> dict[str, Any]:
    """Return the only event of a type."""
    (found,) = [event for event in events if event["eventType"] == event_type]
    return found
