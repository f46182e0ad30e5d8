"""tracking.js: what is recorded arrives, once. In a real browser, against the real server."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from conftest import Appliance, wait_for
from playwright.sync_api import BrowserContext, Error, Route
from tracking import CORS, LOSING_BEACON, RUNNING, Site, Visitor, sent_with

from appliance.store.embedded import EmbeddedPostgres

Tab = Callable[[], Visitor]


def answers(visitor: Visitor, *statuses: int, headers: dict[str, str] | None = None) -> list[list[str]]:
    """Answer the first requests so (0: not at all), and let the rest through. Returns the ids that each held."""
    tries: list[list[str]] = []
    left = list(statuses)

    def answer(route: Route) -> None:
        tries.append([event["eventId"] for event in sent_with(route.request)])
        status = left.pop(0) if left else None
        if status is None:
            route.continue_()
        elif status:
            route.fulfill(status=status, body='{"error":"by the test"}', headers={**CORS, **(headers or {})})
        else:
            route.abort()

    visitor.page.route("**/collect", answer)
    return tries


def flushes(visitor: Visitor, tries: list[Any], number: int) -> None:
    """Have the queue sent until there were so many requests, whatever pause was asked for."""
    visitor.page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(lambda: visitor.waits() and len(tries) >= number, f"request {number}")


# ---- what the server answers


@pytest.mark.parametrize("status", [0, 408, 429, 500, 502, 503, 504])
def test_what_cannot_be_stored_now_is_kept_and_sent_again_with_the_same_id(visitor: Visitor, status: int) -> None:
    tries = answers(visitor, status)
    visitor.goes_to()
    flushes(visitor, tries, 1)
    wait_for(lambda: visitor.waits() and visitor.pause()["until"], "a pause")
    assert len(visitor.queue()) == 1
    (event,) = visitor.stored("pageview")
    assert tries == [[event["eventId"]]] * 2
    visitor.has_sent_all()


def test_what_the_server_will_never_take_is_dropped_and_said(site: Site, visitor: Visitor) -> None:
    site.attributes += ' data-debug data-auto="off"'
    statuses = (400, 401, 403, 404, 410, 413, 415, 422)
    tries = answers(visitor, *statuses)
    visitor.goes_to()
    for number, status in enumerate(statuses, start=1):
        visitor.page.evaluate("status => appliance.track(`refused with ${status}`)", status)
        flushes(visitor, tries, number)
        wait_for(lambda: visitor.waits() and not visitor.queue(), f"the end of {status}")
    assert visitor.hears("refused 1").count("by the test") == len(statuses)
    visitor.page.evaluate("appliance.track('later')")
    visitor.stored("later")


def test_an_answer_that_was_lost_costs_no_second_row(visitor: Visitor) -> None:
    tries: list[Route] = []

    def store_and_lose_the_answer(route: Route) -> None:
        tries.append(route)
        if len(tries) == 1:
            route.fetch()
            route.abort()
        else:
            route.continue_()

    visitor.page.route("**/collect", store_and_lose_the_answer)
    visitor.goes_to()
    flushes(visitor, tries, 1)
    flushes(visitor, tries, 2)
    visitor.stored("pageview")


def test_a_request_that_hangs_is_given_up_and_sent_again(visitor: Visitor) -> None:
    # Thirty seconds are half a second here.
    visitor.page.add_init_script("""
        const { set } = Object.getOwnPropertyDescriptor(XMLHttpRequest.prototype, "timeout");
        Object.defineProperty(XMLHttpRequest.prototype, "timeout", {
            set(ms) { window.asked = ms; set.call(this, ms / 60); },
        });
    """)
    asked: list[Route] = []
    visitor.page.route("**/collect", lambda route: asked.append(route) if not asked else route.continue_())
    visitor.goes_to()
    flushes(visitor, asked, 1)
    wait_for(lambda: visitor.waits() and visitor.pause()["until"], "the end of the request")
    assert visitor.page.evaluate("asked") == 30_000
    visitor.stored("pageview")


def test_pauses_grow_and_differ_from_browser_to_browser(visitor: Visitor) -> None:
    tries = answers(visitor, *[503] * 12)
    visitor.goes_to()
    pauses = []
    for number in range(1, 13):
        flushes(visitor, tries, number)
        wait_for(lambda: visitor.waits() and visitor.pause()["until"], "a pause")
        pause = visitor.pause()
        pauses.append((pause["until"] - pause["now"]) / 1000)
    for number, seconds in enumerate(pauses, start=1):
        least = min(2**number, 300)
        assert least - 1 < seconds <= 1.5 * least
    assert len({round(seconds / min(2**n, 300), 1) for n, seconds in enumerate(pauses, start=1)}) > 2


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("120", 119, 180), ("999999999", 7000, 7201), ("soon", 1, 3), ("-5", 1, 3)],
    ids=["seconds", "too long", "no number", "negative"],
)
def test_the_pause_that_the_server_asks_for_holds_for_all_tabs_and_the_next_page(  # noqa: PLR0913, PLR0917 - a table
    visitor: Visitor, another_tab: Tab, asked: str, least: float, most: float, context: BrowserContext
) -> None:
    tries = answers(visitor, 429, headers={"Retry-After": asked})
    visitor.goes_to()
    flushes(visitor, tries, 1)
    wait_for(lambda: visitor.waits() and visitor.pause()["until"], "a pause")
    pause = visitor.pause()
    assert least < (pause["until"] - pause["now"]) / 1000 <= most
    if least > 60:
        handed: list[str] = []
        context.on("request", lambda request: handed.append(request.url))
        other = another_tab()
        other.goes_to("/other")
        visitor.goes_to("/next")
        for tab in (visitor, other):
            tab.page.evaluate("for (let n = 0; n < 60; n++) appliance.track('more')")
            tab.page.wait_for_timeout(1100)
            tab.hides()
        assert not [url for url in handed if url.endswith("/collect")]
        assert len(tries) == 1


def test_an_event_that_the_server_cannot_read_costs_only_itself(site: Site, visitor: Visitor) -> None:
    site.attributes += " data-debug"
    visitor.goes_to()
    visitor.page.evaluate("""() => {
        let deep = {};
        for (let n = 0; n < 100; n++) deep = { deep };
        for (const name of ["before", "deep", "after"]) appliance.track(name, name === "deep" ? deep : {});
        const { site } = document.querySelector("script[data-site]").dataset;
        localStorage[`appliance.queue/${site}/0fffffff-no-json`] = "{";
    }""")
    visitor.stored("pageview", "before", "after")
    visitor.hears("nested too deeply")
    visitor.has_sent_all()


def test_a_batch_that_is_too_large_for_the_server_is_sent_in_parts(
    appliance: Callable[..., Appliance], conninfo: str, site: Site, visitor: Visitor
) -> None:
    limits = {"max_body_bytes": 4096, "max_batch_events": 10}
    box = appliance(database={"url": conninfo}, collect=limits).start()
    site.script = f"{box.url}/tracking.js"
    site.attributes += " data-debug"
    visitor.goes_to()
    visitor.page.evaluate("""() => {
        for (let n = 0; n < 12; n++) appliance.track("small", { n });
        appliance.track("too large", { fill: "x".repeat(5000) });
        for (let n = 12; n < 24; n++) appliance.track("small", { n });
    }""")
    visitor.page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(lambda: visitor.waits() and not visitor.queue(), "the queue to be empty")
    assert visitor.hears("refused 1").count("refused 1") == 1
    with psycopg.connect(conninfo) as conn:
        stored = [row[0] for row in conn.execute("SELECT raw_event_data FROM events_log ORDER BY id")]
    assert sorted(event["n"] for event in stored if event["eventType"] == "small") == list(range(24))


def test_each_send_says_when_it_was_sent(visitor: Visitor) -> None:
    visitor.goes_to()
    (event,) = visitor.stored("pageview")
    sent = datetime.fromisoformat(event["_batch"]["sentAt"])
    assert timedelta(0) <= sent - datetime.fromisoformat(event["timestamp"]) < timedelta(minutes=1)
    assert abs(datetime.now(UTC) - sent) < timedelta(minutes=1)


# ---- batches


def test_events_go_in_batches_by_time_and_by_size(visitor: Visitor) -> None:
    tries = answers(visitor)
    began = time.monotonic()
    visitor.goes_to()
    visitor.page.evaluate("for (let n = 0; n < 5; n++) appliance.track('small', { n })")
    wait_for(lambda: visitor.waits() and tries, "a request")
    assert time.monotonic() - began > 1.9
    assert [len(ids) for ids in tries] == [6]
    # Without timers it can be nothing but their size that sends them.
    visitor.page.evaluate("""
        window.timers = setTimeout;
        setTimeout = () => 0;
        for (let n = 0; n < 30; n++) appliance.track('large', { fill: 'x'.repeat(1000) });
    """)
    wait_for(lambda: visitor.waits() and len(tries) > 1, "a second request")
    visitor.page.evaluate("setTimeout = timers")
    visitor.stored("pageview", *["small"] * 5, *["large"] * 30)


def test_no_request_is_larger_than_64_kilobytes_however_large_the_letters(visitor: Visitor) -> None:
    visitor.page.add_init_script("""
        window.sizes = [];
        const { send } = XMLHttpRequest.prototype;
        XMLHttpRequest.prototype.send = function (body) { sizes.push(new Blob([body]).size); send.call(this, body); };
        const handOver = navigator.sendBeacon.bind(navigator);
        navigator.sendBeacon = (url, body) => { sizes.push(new Blob([body]).size); return handOver(url, body); };
    """)
    visitor.goes_to()
    visitor.page.evaluate("for (let n = 0; n < 12; n++) appliance.track('large', { fill: '界'.repeat(5000) })")
    visitor.stored("pageview", *["large"] * 12)
    visitor.page.evaluate("for (let n = 0; n < 8; n++) appliance.track('left', { fill: '界'.repeat(1000) })")
    visitor.hides()
    sizes = visitor.page.evaluate("sizes")
    assert max(sizes) <= 65536
    assert len(sizes) >= 4


def test_an_event_that_no_request_can_hold_is_dropped_and_blocks_nothing(site: Site, visitor: Visitor) -> None:
    site.attributes += " data-debug"
    visitor.goes_to()
    visitor.page.evaluate("""() => {
        appliance.track("largest", { fill: "x".repeat(64000) });
        appliance.track("too large", { fill: "x".repeat(66000) });
        appliance.track("too large in bytes", { fill: "é".repeat(40000) });
        appliance.track("small");
    }""")
    visitor.stored("pageview", "largest", "small")
    assert "dropped: too large" in visitor.hears("refused 1")


# ---- leaving, and coming back


def test_what_waits_is_handed_over_when_the_page_is_closed(visitor: Visitor) -> None:
    visitor.goes_to("/only")
    visitor.page.evaluate("appliance.track('last')")
    visitor.closes()
    events = visitor.stored("pageview", "last", "pageleave", "vitals")
    assert {event["path"] for event in events} == {"/only"}


def test_what_waits_is_handed_over_when_the_page_is_hidden(visitor: Visitor) -> None:
    visitor.goes_to()
    visitor.page.evaluate("appliance.track('last')")
    visitor.hides()
    visitor.stored("pageview", "last", "pageleave", "vitals", soon=False)


def test_what_the_browser_took_and_did_not_deliver_is_sent_by_the_next_page(visitor: Visitor) -> None:
    visitor.page.add_init_script(LOSING_BEACON)
    visitor.goes_to("/first")
    visitor.goes_to("/second")
    events = visitor.stored("pageview", "pageleave", "vitals", "pageview")
    assert [event["path"] for event in events] == ["/first", "/first", "/first", "/second"]


def test_three_pages_that_are_viewed_offline_arrive_once_when_the_network_is_back(
    visitor: Visitor, context: BrowserContext
) -> None:
    visitor.goes_to("/a")
    visitor.stored("pageview")
    context.set_offline(offline=True)
    for path in ("/b", "/c", "/d"):
        visitor.page.evaluate("path => history.pushState(null, '', path)", path)
        visitor.waits()
    visitor.hides()
    visitor.hides(hidden=False)
    assert visitor.types() == ["pageview"]
    context.set_offline(offline=False)
    events = visitor.stored("pageview", *["pageleave", "pageview"] * 3, "pageleave", "vitals", soon=False)
    assert [event["path"] for event in events if event["eventType"] == "pageview"] == ["/a", "/b", "/c", "/d"]


def test_a_tab_that_was_closed_offline_is_told_by_the_next_one(
    visitor: Visitor, another_tab: Tab, context: BrowserContext
) -> None:
    visitor.goes_to("/first")
    visitor.stored("pageview")
    context.set_offline(offline=True)
    visitor.page.evaluate("appliance.track('last')")
    visitor.closes()
    context.set_offline(offline=False)
    other = another_tab()
    other.goes_to("/second")
    other.stored("pageview", "last", "pageleave", "vitals", "pageview")


def test_a_page_that_crashes_loses_nothing(visitor: Visitor, another_tab: Tab) -> None:
    visitor.goes_to("/first")
    visitor.page.evaluate("appliance.track('last')")
    with visitor.page.expect_event("crash"), suppress(Error):
        visitor.page.goto("chrome://crash")
    other = another_tab()
    other.goes_to("/second")
    other.stored("pageview", "last", "pageview")


def test_a_server_that_is_killed_while_it_is_sent_to_gets_everything_once_when_it_is_back(
    appliance: Callable[..., Appliance], site: Site, visitor: Visitor
) -> None:
    box = appliance(sites=[{"id": site.id, "origins": [site.origin]}]).start()
    site.script = f"{box.url}/tracking.js"
    visitor.goes_to()
    visitor.page.evaluate("for (let n = 0; n < 200; n++) appliance.track('many', { n, fill: 'x'.repeat(900) })")
    asked: list[Route] = []

    def kill_at_the_third(route: Route) -> None:
        asked.append(route)
        if len(asked) == 3:
            box.kill()
            wait_for(lambda: not box.ready(), "the end of the server")
        route.continue_()

    visitor.page.route("**/collect", kill_at_the_third)
    visitor.page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(lambda: visitor.waits() and visitor.pause()["until"], "a failed send")
    box.start()
    visitor.page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(lambda: visitor.waits() and not visitor.queue(), "the queue to be empty")
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        rows = conn.execute("SELECT raw_event_data->>'n' FROM events_log WHERE event_type = 'many'").fetchall()
    assert sorted(int(row[0]) for row in rows) == list(range(200))


# ---- the queue


def test_a_server_that_is_away_for_long_costs_a_bounded_queue(site: Site, visitor: Visitor) -> None:
    site.attributes += " data-debug"
    visitor.page.route("**/collect", lambda route: route.abort())
    visitor.goes_to()
    visitor.page.evaluate("for (let n = 0; n < 300; n++) appliance.track('many', { n, fill: 'x'.repeat(9000) })")
    visitor.hears("no room")
    waiting = visitor.queue()
    assert 900_000 < sum(len(json.dumps(event)) for event in waiting) < 1_100_000
    assert sorted(event["n"] for event in waiting if "n" in event) == list(range(len(waiting) - 1))
    visitor.page.unroute("**/collect")
    visitor.stored("pageview", *["many"] * (len(waiting) - 1))


def test_what_has_waited_for_seven_days_is_not_sent_and_what_is_younger_is(site: Site, visitor: Visitor) -> None:
    day = 86_400_000
    site.before = f"""<script>for (const [name, age] of [["old", {7 * day + 99_999}], ["young", {7 * day - 99_999}]]) {{
        const time = "0" + (Date.now() - age).toString(16);
        const id = time.slice(0, 8) + "-" + time.slice(8) + "-7000-8000-" + Math.random().toFixed(12).slice(2);
        localStorage["appliance.queue/{site.id}/" + id] = JSON.stringify({{ eventType: name, eventId: id }});
    }}</script>"""
    visitor.goes_to()
    visitor.stored("young", "pageview")
    visitor.has_sent_all()


def holds_back(context: BrowserContext) -> list[Route]:
    """Leave the first request without an answer."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)
        if len(held) > 1:
            route.continue_()

    context.route("**/collect", hold)
    return held


def test_only_one_tab_sends_at_a_time(visitor: Visitor, another_tab: Tab, context: BrowserContext) -> None:
    held = holds_back(context)
    other = another_tab()
    for tab in (visitor, other):
        tab.goes_to(f"/{tab is visitor}")
    for tab in (visitor, other):
        tab.page.evaluate("dispatchEvent(new Event('online'))")
        tab.page.wait_for_timeout(300)
    assert [len(sent_with(route.request)) for route in held] == [2]
    held[0].continue_()
    visitor.stored("pageview", "pageview")
    assert len(held) == 1


def test_without_locks_the_other_tabs_wait_a_moment(
    visitor: Visitor, another_tab: Tab, context: BrowserContext
) -> None:
    held = holds_back(context)
    other = another_tab()
    for tab in (visitor, other):
        tab.goes_to(origin=tab.site.host("shop.test"))
    assert visitor.page.evaluate("navigator.locks") is None
    for tab in (visitor, other):
        tab.hides(hidden=False)
        tab.page.wait_for_timeout(300)
    assert len(held) == 1
    held[0].continue_()
    visitor.stored("pageview", "pageview")


def test_without_locks_a_page_that_had_nothing_to_send_hands_over_what_comes_next(site: Site, visitor: Visitor) -> None:
    visitor.goes_to(origin=site.host("shop.test"))
    visitor.stored("pageview")
    visitor.has_sent_all()
    visitor.hides(hidden=False)
    visitor.page.evaluate("appliance.track('last')")
    visitor.hides()
    visitor.stored("pageview", "last", "pageleave", "vitals", soon=False)


FORBIDDEN = (
    "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
)
NULL = "Object.defineProperty(window, 'localStorage', { get: () => null });"
UNLOCKABLE = "navigator.locks.request = () => Promise.reject(new DOMException('no', 'SecurityError'));"
FULL = """for (let size = 4 * 1024 * 1024, n = 0; size >= 1; size /= 2)
    try { for (;;) localStorage.setItem(String(n++).padStart(4, "0"), "x".repeat(size)); } catch { }"""


@pytest.mark.parametrize(
    "script", [FORBIDDEN, FORBIDDEN + UNLOCKABLE, NULL, FULL], ids=["no", "no locks", "null", "full"]
)
def test_a_browser_that_stores_nothing_is_tracked_for_the_page(site: Site, visitor: Visitor, script: str) -> None:
    site.before = f"<script>{script}</script>"
    tries = answers(visitor, 503)
    visitor.goes_to()
    flushes(visitor, tries, 1)
    visitor.page.evaluate("appliance.track('second')")
    events = visitor.stored("pageview", "second")
    assert len({event["visitorId"] for event in events}) == len({event["sessionId"] for event in events}) == 1


def test_two_sites_on_one_origin_do_not_send_each_other_s_events(site: Site, visitor: Visitor) -> None:
    other = f"{site.id}.more"
    site.before = (
        f"""<script>localStorage["appliance.queue/{other}/01900000-other"] = '{{"eventType":"foreign"}}'</script>"""
    )
    visitor.goes_to()
    visitor.stored("pageview")
    assert visitor.page.evaluate(f"localStorage['appliance.queue/{other}/01900000-other']") is not None


def test_the_tracker_is_there_before_the_load_of_the_page_ends(visitor: Visitor) -> None:
    visitor.page.goto(visitor.site.origin, wait_until="load")
    assert visitor.page.evaluate(RUNNING)
