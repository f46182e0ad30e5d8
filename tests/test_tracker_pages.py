"""tracking.js: pages that are looked at, and for how long. In a real browser, against the real server."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import browser_options, wait_for
from playwright.sync_api import Browser
from tracking import Site, Visitor, of_type

LONG = '<div style="height: 4000px"></div>'


def paths(events: list[dict[str, Any]], event_type: str = "pageview") -> list[str]:
    return [event["path"] for event in events if event["eventType"] == event_type]


def test_a_pageview_says_what_was_looked_at_and_where_the_visitor_came_from(site: Site, visitor: Visitor) -> None:
    site.title = "Quinces & pears"
    site.body = '<a href="/shop?utm_source=letter&utm_campaign=autumn&gclid=g1&fbclid=f1&msclkid=m1&ttclid=t1">shop</a>'
    page = visitor.goes_to("/start?q=1")
    page.click("a")
    page.wait_for_url("**/shop?*")
    event = visitor.stored("pageview", "click", "pageleave", "vitals", "pageview")[-1]
    assert event["url"].startswith(f"{site.origin}/shop?utm_source=letter")
    assert (event["path"], event["title"]) == ("/shop", "Quinces & pears")
    assert event["referrer"] == f"{site.origin}/start?q=1"
    campaign = {"utm_source": "letter", "utm_campaign": "autumn"}
    assert event["query"] == {**campaign, "gclid": "g1", "fbclid": "f1", "msclkid": "m1", "ttclid": "t1"}
    assert event["language"] == page.evaluate("navigator.language")
    assert event["timeZone"] == page.evaluate("Intl.DateTimeFormat().resolvedOptions().timeZone")
    assert event["screen"] == page.evaluate("({ width: screen.width, height: screen.height })")
    assert event["viewport"] == {"width": 1280, "height": 720}


def test_every_real_change_of_the_address_is_a_pageview_and_nothing_else_is(visitor: Visitor) -> None:
    page = visitor.goes_to("/a")
    for script in (
        "history.pushState(null, '', '/b')",
        "history.pushState(null, '', '/b')",
        "history.replaceState({ scroll: 7 }, '')",
        "history.replaceState(null, '', '/c?page=2')",
        "history.pushState(null, '', '#part')",
        "location.hash = 'other'",
        "history.back()",
    ):
        page.evaluate(script)
        visitor.waits()
    page.evaluate("history.go(-2)")
    page.wait_for_url("**/b")
    visitor.waits()
    events = visitor.stored(*["pageview", "pageleave"] * 3, "pageview")
    assert paths(events) == ["/a", "/b", "/c", "/b"]
    assert paths(events, "pageleave") == ["/a", "/b", "/c"]


def test_a_page_that_is_changed_by_script_is_told_with_its_new_title(visitor: Visitor) -> None:
    page = visitor.goes_to("/a")
    page.evaluate("history.pushState(null, '', '/b'); document.title = 'The second'")
    events = visitor.stored("pageview", "pageleave", "pageview")
    assert [event["title"] for event in events] == ["A page", "A page", "The second"]


def test_the_part_behind_the_hash_is_the_page_where_the_site_says_so(site: Site, visitor: Visitor) -> None:
    site.attributes += ' data-hash="on"'
    page = visitor.goes_to("/#/one")
    page.evaluate("location.hash = '#/two'")
    visitor.waits()
    events = visitor.stored("pageview", "pageleave", "pageview")
    assert [event["url"] for event in events if event["eventType"] == "pageview"] == [
        f"{site.origin}/#/one",
        f"{site.origin}/#/two",
    ]


def test_a_page_that_is_prerendered_is_not_seen_until_it_is_shown(site: Site, visitor: Visitor) -> None:
    site.before = """<script>
        let prerendering = true;
        Object.defineProperty(document, "prerendering", { get: () => prerendering });
        window.appliance = { q: [], track: (...values) => appliance.q.push(["track", values]) };
        window.shown = () => { prerendering = false; document.dispatchEvent(new Event("prerenderingchange")); };
    </script>"""
    visitor.page.goto(site.origin, wait_until="load")
    visitor.page.evaluate("appliance.track('early')")
    visitor.waits()
    assert visitor.queue() == []
    visitor.page.evaluate("shown()")
    visitor.stored("pageview", "early")


@pytest.fixture
def caching_browser(browser: Browser) -> Iterator[Browser]:
    """A browser with its back-forward cache, which Playwright otherwise turns off."""
    with_cache = browser.browser_type.launch(**browser_options(), ignore_default_args=["--disable-back-forward-cache"])
    yield with_cache
    with_cache.close()


def test_time_is_counted_while_the_page_is_in_view_and_engaged_while_the_visitor_does_something(
    visitor: Visitor,
) -> None:
    visitor.page.clock.install()
    page = visitor.goes_to("/read")
    page.clock.fast_forward(10_000)
    page.mouse.move(50, 50)
    page.clock.fast_forward(60_000)
    visitor.hides()
    page.clock.fast_forward(500_000)
    visitor.hides(hidden=False)
    page.clock.fast_forward(5_000)
    page.keyboard.press("a")
    visitor.hides()
    events = visitor.stored("pageview", "pageleave", "vitals", "pageleave")
    first, second = (event for event in events if event["eventType"] == "pageleave")
    # Ten seconds until the mouse moved, and fifteen in which the visitor may have read on.
    assert (first["visibleMs"] // 1000, first["engagedMs"] // 1000) == (70, 25)
    assert (second["visibleMs"] // 1000, second["engagedMs"] // 1000) == (5, 5)


def test_leaving_is_told_by_a_page_that_is_closed(site: Site, visitor: Visitor) -> None:
    site.body = LONG
    visitor.goes_to("/long")
    visitor.closes()
    events = visitor.stored("pageview", "pageleave", "vitals")
    leave = of_type(events, "pageleave")
    assert (leave["path"], leave["scrollDepth"]) == ("/long", 18)
    assert 0 <= leave["engagedMs"] <= leave["visibleMs"] < 60_000


def test_how_far_a_page_was_scrolled_is_told_once_for_each_mark(site: Site, visitor: Visitor) -> None:
    site.body = LONG
    page = visitor.goes_to("/long")
    for top in (0, 1500, 1600, 0, 9999, 0, 9999):
        page.evaluate("top => scrollTo(0, top)", top)
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    visitor.hides()
    events = visitor.stored("pageview", *["scroll"] * 5, "pageleave", "vitals")
    assert [event["depth"] for event in events if event["eventType"] == "scroll"] == [25, 50, 75, 90, 100]
    assert of_type(events, "pageleave")["scrollDepth"] == 100


def test_web_vitals_are_told_once_when_the_page_is_left(site: Site, visitor: Visitor) -> None:
    site.body = """<h1>Large</h1><button onclick="const end = Date.now() + 60; while (Date.now() < end);">slow</button>
        <script>
            const seen = (type) => new Promise((done) => {
                new PerformanceObserver(done).observe({ type, buffered: true, durationThreshold: 16 });
                setTimeout(done, 3000);
            });
            window.shift = async () => {
                await seen("largest-contentful-paint");
                document.body.insertAdjacentHTML("afterbegin", "<p style='height: 300px'>shift</p>");
                await seen("layout-shift");
            };
        </script>"""
    page = visitor.goes_to("/vitals")
    page.evaluate("shift()")
    page.click("button")
    page.evaluate("seen('event')")
    for _ in range(2):
        visitor.hides()
        visitor.hides(hidden=False)
    events = visitor.stored("pageview", "click", "vitals", "pageleave", "pageleave")
    vitals = of_type(events, "vitals")
    assert vitals["path"] == "/vitals"
    assert 0 < vitals["ttfb"] < vitals["lcp"] < 10_000
    assert 0 < vitals["cls"] < 1
    assert 50 <= vitals["inp"] < 5_000


def test_a_page_from_the_back_forward_cache_is_looked_at_again(caching_browser: Browser, site: Site) -> None:
    context = caching_browser.new_context()
    visitor = Visitor(site, context.new_page())
    page = visitor.goes_to("/first")
    visitor.stored("pageview")
    page.evaluate("window.before = true")
    visitor.goes_to("/second")
    page.evaluate("history.back()")
    wait_for(lambda: visitor.waits() and re.search("/first$", page.url), "the first page")
    assert page.evaluate("window.before") is True
    events = visitor.stored("pageview", "pageleave", "vitals", "pageview", "pageleave", "vitals", "pageview")
    assert paths(events) == ["/first", "/second", "/first"]
    context.close()
