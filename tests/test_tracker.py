"""tracking.js in a real browser, on a page of another origin, against the real server."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from conftest import Appliance, free_port, wait_for
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route

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


# A browser that takes everything and delivers nothing, as one does whose network is gone.
LOSING_BEACON = "navigator.sendBeacon = () => true;"
REFUSING_BEACON = "navigator.sendBeacon = () => false;"


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
    events = wait_for_types(box, "pageview", "signup", "pageleave")
    assert [event["eventType"] for event in events] == ["pageview", "signup", "pageleave"]
    assert {event["url"] for event in events} == {f"{site.origin}/"}


def test_what_the_server_refuses_for_now_is_sent_again_and_stored_once(box: Appliance, site: Site, page: Page) -> None:
    tries: list[list[str]] = []

    def refuse_first(route: Route) -> None:
        tries.append([event["eventId"] for event in sent_with(route.request)])
        if len(tries) == 1:
            # The worst case: the server has stored it, and the answer is lost.
            route.fetch()
            route.abort()
        elif len(tries) == 2:
            route.fulfill(status=503, body="{}", headers={"Access-Control-Allow-Origin": "*"})
        else:
            route.continue_()

    page.route("**/collect", refuse_first)
    page.goto(site.origin)
    wait_for(lambda: pump(page) and len(tries) >= 3, "the third try", seconds=20)
    page.wait_for_load_state("networkidle")
    (event,) = wait_for_types(box, "pageview")
    assert tries == [[event["eventId"]]] * 3


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
    said = console_of(page)
    page.goto(site.origin)
    wait_for(lambda: pump(page) and any(reason in text for text in said), "a reason", seconds=10)
    assert page.evaluate("window.appliance") is None
    assert types(box) == []


def test_a_page_of_an_origin_that_is_not_the_site_s_stores_nothing_and_is_told(
    appliance: Callable[..., Appliance], site: Site, page: Page
) -> None:
    box = appliance(sites=[{"id": "shop", "origins": ["https://shop.example.com"]}]).start()
    site.script = f"{box.url}/tracking.js"
    said = console_of(page)
    page.goto(site.origin)
    wait_for(lambda: pump(page) and any(f"is {site.origin} allowed" in text for text in said), "a reason", seconds=10)
    assert types(box) == []


def test_a_browser_without_storage_is_tracked_for_the_page(box: Appliance, site: Site, page: Page) -> None:
    site.before = "<script>Object.defineProperty(window, 'localStorage', {get() { throw new Error('no') }})</script>"
    page.goto(site.origin)
    page.click("#button")
    events = wait_for_types(box, "pageview", "signup")
    assert len({event["visitorId"] for event in events}) == 1


def test_a_browser_whose_storage_is_full_is_tracked_for_the_page(box: Appliance, site: Site, page: Page) -> None:
    site.before = """<script>
        for (let size = 4 * 1024 * 1024, n = 0; size >= 1; size /= 2)
            try { for (;;) localStorage.setItem(String(n++).padStart(4, "0"), "x".repeat(size)); } catch { }
    </script>"""
    page.goto(site.origin)
    page.click("#button")
    events = wait_for_types(box, "pageview", "signup")
    assert len({event["visitorId"] for event in events}) == 1
    assert len({event["sessionId"] for event in events}) == 1


# ---- events that cannot be sent


def test_an_event_that_json_cannot_hold_is_dropped_with_a_reason_and_the_others_are_sent(
    box: Appliance, site: Site, page: Page
) -> None:
    said = console_of(page)
    page.goto(site.origin)
    page.wait_for_function("window.appliance")
    page.evaluate("""() => {
        const circle = {};
        circle.circle = circle;
        appliance.track("bigint", { total: 10n });
        appliance.track("circle", { circle });
        appliance.track("getter", { get broken() { throw Object.create(null); } });
        appliance.track(Object.create(null));
        appliance.track("good", { toJSON: () => undefined });
    }""")
    page.click("#button")
    events = wait_for_types(box, "pageview", "good", "signup")
    assert all(event["visitorId"] == events[0]["visitorId"] for event in events)
    dropped = [text for text in said if text.startswith("appliance: not tracked")]
    assert len(dropped) == 4
    assert "BigInt" in dropped[0]
    assert "circular" in dropped[1]


def test_a_form_is_recorded_whatever_its_fields_are_named(box: Appliance, site: Site, page: Page) -> None:
    # Fields that hide the form's properties, and that know their form, as those of some frameworks do.
    site.before = """<form id="order" name="quinces" data-track="touched" onsubmit="return false">
        <input name="id"><input name="name"><button id="order-now">Order</button></form>
        <script>for (const field of document.forms.order) field.form_ = field.self = field;</script>"""
    page.goto(site.origin)
    page.click("#order-now")
    page.click("#order", position={"x": 1, "y": 1})
    events = wait_for_types(box, "pageview", "click", "submit", "touched")
    by_type = {event["eventType"]: event for event in events}
    assert (by_type["submit"]["formId"], by_type["submit"]["formName"]) == ("order", "quinces")
    assert by_type["touched"]["elementId"] == "order"


def test_a_page_that_has_redefined_what_the_tracker_reads_is_not_disturbed(
    box: Appliance, site: Site, page: Page
) -> None:
    site.before = "<script>var screen = null;</script>"
    said = console_of(page)
    page.goto(site.origin)
    page.wait_for_function("window.appliance")
    assert page.evaluate("history.pushState(null, '', '/b'); location.pathname") == "/b"
    page.click("#button")
    events = wait_for_types(box, "pageleave", "signup")
    assert [event["path"] for event in events] == ["/", "/b"]
    # One for each pageview.
    assert len([text for text in said if text.startswith("appliance: not tracked")]) == 2


def test_an_event_that_no_request_can_hold_is_dropped_with_a_reason_and_blocks_nothing(
    box: Appliance, site: Site, page: Page
) -> None:
    # One that an earlier page has kept, and one that is too large only in UTF-8.
    site.before = """<script>
        localStorage.setItem("appliance.kept.shop", JSON.stringify([
            { eventType: "kept too large", fill: "x".repeat(70000) }, { eventType: "kept" }]));
    </script>"""
    said = console_of(page)
    page.goto(site.origin)
    page.wait_for_function("window.appliance")
    page.evaluate("appliance.track('too large', {fill: 'é'.repeat(40000)})")
    page.click("#button")
    events = wait_for_types(box, "kept", "pageview", "signup")
    assert not any("fill" in event for event in events)
    assert len([text for text in said if "bytes is dropped" in text]) == 2


def test_large_events_go_in_requests_that_the_browser_lets_pass(box: Appliance, site: Site, page: Page) -> None:
    page.add_init_script("""
        const { fetch } = window;
        window.sent = [];
        window.fetch = (url, options) => {
            sent.push([new Blob([options.body]).size, options.keepalive]);
            return fetch(url, options);
        };
    """)
    page.goto(site.origin)
    page.wait_for_function("window.appliance")
    page.evaluate("""() => {
        for (let n = 0; n < 10; n++) appliance.track("large", { fill: "é".repeat(10000) });
        appliance.track("largest", { fill: "x".repeat(64000) });
    }""")
    events = wait_for_types(box, "pageview", *["large"] * 10, "largest")
    assert [len(event["fill"]) for event in events if event["eventType"] == "largest"] == [64000]
    sent = page.evaluate("sent")
    assert len(sent) >= 6
    assert max(size for size, _ in sent) <= 65536
    # What outlives the page shares 64 KB with all other such requests of the page.
    assert max(size for size, keepalive in sent if keepalive) <= 49152


def test_a_page_whose_own_requests_use_up_what_may_outlive_it_is_tracked(
    box: Appliance, site: Site, page: Page
) -> None:
    page.route("**/hangs", lambda _: None)
    site.before = """<script>
        fetch("/hangs", { method: "POST", body: "x".repeat(65000), keepalive: true }).catch(() => {});
    </script>"""
    page.goto(site.origin)
    page.click("#button")
    wait_for(lambda: pump(page) and len(types(box)) == 2, "both events", seconds=15)
    assert sorted(types(box)) == ["pageview", "signup"]


# ---- leaving


def test_what_is_tracked_without_a_network_is_sent_with_the_next_page(
    box: Appliance, site: Site, page: Page, context: BrowserContext
) -> None:
    page.goto(f"{site.origin}/first")
    wait_for_types(box, "pageview")
    context.set_offline(offline=True)
    page.click("#button")
    with page.expect_event("close"):
        page.close(run_before_unload=True)
    context.set_offline(offline=False)
    context.new_page().goto(f"{site.origin}/second")
    events = wait_for_types(box, "pageview", "signup", "pageleave", "pageview")
    assert [event["path"] for event in events] == ["/first", "/first", "/first", "/second"]


def test_a_page_whose_last_events_could_not_be_sent_keeps_them_on_leaving(
    box: Appliance, site: Site, page: Page
) -> None:
    page.add_init_script(LOSING_BEACON)
    said = console_of(page)
    page.route("**/collect", lambda route: route.abort())
    page.goto(f"{site.origin}/first")
    wait_for(lambda: pump(page) and any("cannot send" in text for text in said), "a failed send", seconds=10)
    page.unroute("**/collect")
    page.goto(f"{site.origin}/second")
    events = wait_for_types(box, "pageview", "pageleave", "pageview")
    assert [event["path"] for event in events] == ["/first", "/first", "/second"]


def test_what_several_tabs_have_kept_is_sent(box: Appliance, site: Site, context: BrowserContext) -> None:
    context.add_init_script(f"if (location.pathname !== '/online') {REFUSING_BEACON}")
    tabs = [context.new_page(), context.new_page()]
    for tab, path in zip(tabs, ("/a", "/b"), strict=True):
        tab.route("**/collect", lambda route: route.abort())
        tab.goto(f"{site.origin}{path}")
        tab.wait_for_function("window.appliance")
    for tab in tabs:
        with tab.expect_event("close"):
            tab.close(run_before_unload=True)
    context.new_page().goto(f"{site.origin}/online")
    events = wait_for_types(box, *["pageview", "pageleave"] * 2, "pageview")
    assert sorted(event["path"] for event in events) == ["/a", "/a", "/b", "/b", "/online"]


def test_the_latest_500_events_are_kept_and_no_more(
    box: Appliance, site: Site, page: Page, context: BrowserContext
) -> None:
    page.add_init_script(REFUSING_BEACON)
    page.route("**/collect", lambda route: route.abort())
    page.goto(site.origin)
    page.wait_for_function("window.appliance")
    page.evaluate("""localStorage.setItem("appliance.kept.shop",
        JSON.stringify(Array.from({ length: 500 }, (_, n) => ({ eventType: "kept", n }))))""")
    with page.expect_event("close"):
        page.close(run_before_unload=True)
    reader = context.new_page()
    # This page takes nothing: it belongs to another site of the same origin.
    site.attributes = 'data-site="blog"'
    reader.goto(site.origin)
    kept = json.loads(reader.evaluate("localStorage.getItem('appliance.kept.shop')"))
    assert [event.get("n", event["eventType"]) for event in kept] == [*range(2, 500), "pageview", "pageleave"]
    assert types(box) == []


# ---- what the server answers


def test_an_event_that_the_server_cannot_read_costs_only_itself(box: Appliance, site: Site, page: Page) -> None:
    said = console_of(page)
    page.goto(site.origin)
    page.wait_for_function("window.appliance")
    page.evaluate("""() => {
        let deep = {};
        for (let n = 0; n < 100; n++) deep = { deep };
        appliance.track("before");
        appliance.track("deep", deep);
        appliance.track("after");
    }""")
    events = wait_for_types(box, "pageview", "before", "after")
    assert {event["eventType"] for event in events} == {"pageview", "before", "after"}
    wait_for(lambda: pump(page) and any("nested too deeply" in text for text in said), "a reason", seconds=10)


def test_a_batch_that_is_too_large_for_the_server_is_sent_in_parts(
    appliance: Callable[..., Appliance], site: Site, page: Page
) -> None:
    box = appliance(
        sites=[{"id": "shop", "origins": [site.origin]}], collect={"max_body_bytes": 4096, "max_batch_events": 10}
    ).start()
    site.script = f"{box.url}/tracking.js"
    said = console_of(page)
    page.goto(site.origin)
    page.wait_for_function("window.appliance")
    page.evaluate("""() => {
        for (let n = 0; n < 12; n++) appliance.track("small", { n });
        appliance.track("too large", { fill: "x".repeat(5000) });
        for (let n = 12; n < 24; n++) appliance.track("small", { n });
    }""")
    events = wait_for_types(box, "pageview", *["small"] * 24)
    assert sorted(event["n"] for event in events if event["eventType"] == "small") == list(range(24))
    wait_for(lambda: pump(page) and any("larger than 4096" in text for text in said), "a reason", seconds=10)
    assert len([text for text in said if "413" in text and text.startswith("appliance")]) == 1


def test_a_page_that_is_left_while_a_batch_is_halved_keeps_what_is_left_of_it(
    box: Appliance, site: Site, page: Page
) -> None:
    page.add_init_script(f"if (location.pathname === '/first') {LOSING_BEACON}")
    asked: list[Route] = []

    def refuse_the_whole_and_hang_on_the_second_half(route: Route) -> None:
        asked.append(route)
        if len(asked) == 1:
            route.fulfill(status=400, body="{}", headers={"Access-Control-Allow-Origin": "*"})
        elif len(asked) != 3:
            route.continue_()

    page.route("**/collect", refuse_the_whole_and_hang_on_the_second_half)
    page.goto(f"{site.origin}/first")
    page.click("#button")
    wait_for(lambda: pump(page) and len(asked) == 3, "the second half", seconds=10)
    page.goto(f"{site.origin}/second")
    page.unroute("**/collect")
    events = wait_for_types(box, "pageview", "signup", "pageleave", "pageview")
    assert sorted(event["path"] for event in events) == ["/first", "/first", "/first", "/second"]


def test_what_the_server_forbids_is_dropped_and_said(
    appliance: Callable[..., Appliance], site: Site, page: Page
) -> None:
    box = appliance(sites=[{"id": "blog", "origins": [site.origin]}]).start()
    site.script = f"{box.url}/tracking.js"
    said = console_of(page)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(site.origin)
    wait_for(lambda: pump(page) and any("is configured here" in text for text in said), "a reason", seconds=10)
    page.wait_for_timeout(3000)
    assert requests.count(f"{box.url}/collect") == 1
    assert types(box) == []


def test_a_server_that_asks_for_a_pause_gets_it(box: Appliance, site: Site, page: Page) -> None:
    tries: list[float] = []

    def ask_for_a_pause(route: Route) -> None:
        tries.append(time.monotonic())
        if len(tries) > 1:
            route.continue_()
            return
        headers = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "Retry-After"}
        route.fulfill(status=429, body="{}", headers={**headers, "Retry-After": "5"})

    page.route("**/collect", ask_for_a_pause)
    page.goto(site.origin)
    wait_for(lambda: pump(page) and tries, "the first try", seconds=10)
    page.wait_for_timeout(500)
    page.evaluate("for (let n = 0; n < 60; n++) appliance.track('more')")
    wait_for(lambda: pump(page) and len(tries) > 1, "the second try", seconds=20)
    assert 4.9 < tries[1] - tries[0] < 15
    page.unroute("**/collect")
    wait_for(lambda: pump(page) and len(types(box)) == 61, "all events", seconds=15)
    events = wait_for_types(box, "pageview", *["more"] * 60)
    assert len({event["eventId"] for event in events}) == 61


# ---- small help


def console_of(page: Page) -> list[str]:
    """Return the list to which everything is added that the page writes to its console."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    return said


def sent_with(request: Request) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(request.post_data or "")["events"]
    return events


def pump(page: Page) -> bool:
    """Let Playwright deliver what the browser has told it, which it does only while it is asked for something."""
    page.wait_for_timeout(50)
    return True
