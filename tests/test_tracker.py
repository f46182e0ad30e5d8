"""tracking.js in a real browser, on a page of another origin, against the real server."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from conftest import Appliance, free_port, wait_for
from playwright.sync_api import Browser, BrowserContext, Page, Route

from appliance.store.embedded import EmbeddedPostgres

PAGE = """<!doctype html><title>{title}</title>
{before}
<script async src="{script}" {attributes}></script>
<body><a id="link" href="/next">next</a> <button id="button" data-track="signup">Sign up</button>
<form id="form" onsubmit="return false"><input name="secret" value="hunter2"><button id="send">Send</button></form>
<div style="height: 3000px"></div></body>"""


class Site:
    """A web site of another origin whose pages embed the tracker."""

    def __init__(self) -> None:
        self.port = free_port()
        self.origin = f"http://localhost:{self.port}"
        self.script = ""
        self.attributes = 'data-site="shop"'
        self.before = ""
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                body = PAGE.format(
                    title=path, script=site.script, attributes=site.attributes, before=site.before
                ).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Stay silent."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    running = Site()
    yield running
    running.close()


@pytest.fixture
def box(appliance: Callable[..., Appliance], site: Site) -> Appliance:
    running = appliance(sites=[{"id": "shop", "origins": [site.origin]}]).start()
    site.script = f"{running.url}/tracking.js"
    return running


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    fresh = browser.new_context()
    yield fresh
    fresh.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def stored(box: Appliance) -> list[dict[str, Any]]:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        return [row[0] for row in conn.execute("SELECT raw_event_data FROM events_log ORDER BY timestamp, id")]


def types(box: Appliance) -> list[str]:
    return [event["eventType"] for event in stored(box)]


def wait_for_types(box: Appliance, *wanted: str) -> list[dict[str, Any]]:
    wait_for(lambda: sorted(types(box)) == sorted(wanted), f"{wanted}, not {types(box)}", seconds=15)
    return stored(box)


def test_one_tag_records_a_visit_from_pageview_to_leaving(box: Appliance, site: Site, page: Page) -> None:
    page.goto(f"{site.origin}/first?q=1")
    page.click("#button")
    page.click("#send")
    page.mouse.wheel(0, 1500)
    page.click("#link")
    page.wait_for_url("**/next")
    events = wait_for_types(box, "pageview", "signup", "submit", "click", "click", "pageleave", "pageview")
    assert len({event["visitorId"] for event in events}) == 1
    assert len({event["sessionId"] for event in events}) == 1
    assert len({event["eventId"] for event in events}) == 7
    assert all(event["eventId"][14] == "7" for event in events)
    by_type = {event["eventType"]: event for event in events}
    assert by_type["pageleave"]["url"] == f"{site.origin}/first?q=1"
    assert 50 <= by_type["pageleave"]["scrollDepth"] <= 100
    assert by_type["submit"]["formId"] == "form"
    assert events[0]["title"] == "/first"
    assert "hunter2" not in json.dumps(events)


def test_closing_the_page_sends_what_was_not_sent_yet(box: Appliance, site: Site, page: Page) -> None:
    page.goto(site.origin)
    page.click("#button")
    page.close(run_before_unload=True)
    wait_for_types(box, "pageview", "signup", "pageleave")


def test_what_the_server_refuses_for_now_is_sent_again_and_stored_once(box: Appliance, site: Site, page: Page) -> None:
    answers: list[int] = []

    def refuse_first(route: Route) -> None:
        answers.append(len(answers))
        if len(answers) == 1:
            # The worst case: the server has stored it, and the answer is lost.
            route.fetch()
            route.abort()
        elif len(answers) == 2:
            route.fulfill(status=503, body="{}", headers={"Access-Control-Allow-Origin": "*"})
        else:
            route.continue_()

    page.route("**/collect", refuse_first)
    page.goto(site.origin)
    wait_for(lambda: pump(page) and len(answers) >= 3, "the third try", seconds=20)
    wait_for_types(box, "pageview")


def test_what_cannot_be_sent_on_leaving_is_sent_with_the_next_page(box: Appliance, site: Site, page: Page) -> None:
    page.add_init_script("if (location.pathname === '/offline') navigator.sendBeacon = () => false;")
    page.goto(f"{site.origin}/offline")
    page.click("#button")
    page.goto(f"{site.origin}/online")
    events = wait_for_types(box, "pageview", "signup", "pageleave", "pageview")
    assert {event["path"] for event in events} == {"/offline", "/online"}


def test_a_new_address_without_a_load_is_a_new_pageview(box: Appliance, site: Site, page: Page) -> None:
    page.goto(f"{site.origin}/a")
    page.wait_for_function("window.appliance")
    page.evaluate("history.pushState(null, '', '/b')")
    page.evaluate("history.replaceState(null, '', '/b')")
    page.go_back()
    events = wait_for_types(box, "pageview", "pageleave", "pageview", "pageleave", "pageview")
    assert [e["path"] for e in events if e["eventType"] == "pageview"] == ["/a", "/b", "/a"]
    assert [e["path"] for e in events if e["eventType"] == "pageleave"] == ["/a", "/b"]


def test_a_page_adds_events_of_its_own_and_cannot_forge_the_tracker_s_fields(
    box: Appliance, site: Site, page: Page
) -> None:
    site.attributes = 'data-site="shop" data-auto="off"'
    page.goto(site.origin)
    page.wait_for_function("window.appliance")
    page.evaluate("appliance.track('order', {total: 12.5, items: [{sku: 'q'}], visitorId: 'forged'})")
    (event,) = wait_for_types(box, "order")
    assert (event["total"], event["items"]) == (12.5, [{"sku": "q"}])
    assert event["visitorId"] != "forged"


def test_a_session_ends_after_half_an_hour_of_silence_and_the_visitor_stays(
    box: Appliance, site: Site, page: Page
) -> None:
    page.goto(site.origin)
    wait_for_types(box, "pageview")
    page.evaluate(
        "localStorage.setItem('appliance.session', localStorage.getItem('appliance.session').split(' ')[0] + ' ' + "
        "(Date.now() - 31 * 60000))"
    )
    page.click("#button")
    first, second = wait_for_types(box, "pageview", "signup")
    assert first["sessionId"] != second["sessionId"]
    assert first["visitorId"] == second["visitorId"]


@pytest.mark.parametrize(
    ("attributes", "before", "reason"),
    [
        ("", "", "no data-site"),
        ('data-site="shop"', "<script>localStorage.setItem('appliance.optout', '1')</script>", "opted out"),
    ],
    ids=["no site", "opted out"],
)
def test_the_tracker_says_why_it_does_not_track(  # noqa: PLR0913, PLR0917 - three fixtures and a table
    box: Appliance, site: Site, page: Page, attributes: str, before: str, reason: str
) -> None:
    site.attributes, site.before = attributes, before
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(site.origin)
    wait_for(lambda: pump(page) and any(reason in text for text in said), "a reason", seconds=10)
    assert page.evaluate("window.appliance") is None
    assert types(box) == []


def test_a_page_of_an_origin_that_is_not_the_site_s_stores_nothing_and_is_told(
    appliance: Callable[..., Appliance], site: Site, page: Page
) -> None:
    box = appliance(sites=[{"id": "shop", "origins": ["https://shop.example.com"]}]).start()
    site.script = f"{box.url}/tracking.js"
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(site.origin)
    wait_for(lambda: pump(page) and any(f"is {site.origin} allowed" in text for text in said), "a reason", seconds=10)
    assert types(box) == []


def test_a_browser_without_storage_is_tracked_for_the_page(box: Appliance, site: Site, page: Page) -> None:
    site.before = "<script>Object.defineProperty(window, 'localStorage', {get() { throw new Error('no') }})</script>"
    page.goto(site.origin)
    page.click("#button")
    events = wait_for_types(box, "pageview", "signup")
    assert len({event["visitorId"] for event in events}) == 1


def pump(page: Page) -> bool:
    """Let Playwright deliver what the browser has told it, which it does only while it is asked for something."""
    page.wait_for_timeout(50)
    return True
