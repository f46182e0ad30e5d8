"""tracking.js: how it is served, what pages can ask of it, and what they can do to it."""

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import http, wait_for
from playwright.sync_api import BrowserContext
from tracking import Site, Visitor, Web, of_type

REPOSITORY = Path(__file__).parent.parent
SOURCE = (REPOSITORY / "tracking.js").read_text()
DOCUMENT = (REPOSITORY / "docs" / "tracking.md").read_text()
MAX_BYTES = 4096
CONTENT_POLICY = (
    "default-src 'none'; script-src {script}; connect-src {connect}; style-src 'unsafe-inline'; img-src data:"
)


# ---- how it is served


def test_it_is_small(web: Web) -> None:
    zipped = http(web.box, "GET", "/tracking.js", headers={"Accept-Encoding": "gzip"})
    assert len(zipped.body) <= MAX_BYTES
    assert len(gzip.decompress(zipped.body)) < len(SOURCE) / 2


def pinned(web: Web) -> tuple[str, str]:
    """Return the immutable name and the integrity that the header tells."""
    link = http(web.box, "GET", "/tracking.js").headers["Link"]
    found = re.fullmatch(r'<(tracking\.[0-9a-f]{16}\.js)>; rel="alternate"; integrity="(sha384-[A-Za-z0-9+/=]+)"', link)
    assert found is not None
    return found[1], found[2]


def test_it_has_a_name_that_never_means_anything_else(web: Web) -> None:
    name, integrity = pinned(web)
    answer = http(web.box, "GET", f"/{name}")
    assert answer.body == http(web.box, "GET", "/tracking.js").body
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "sha384-" + base64.b64encode(hashlib.sha384(answer.body).digest()).decode() == integrity
    zipped = http(web.box, "GET", f"/{name}", headers={"Accept-Encoding": "gzip"})
    assert gzip.decompress(zipped.body) == answer.body
    for other in ("/tracking.0123456789abcdef.js", "/tracking..js", f"/{name}x"):
        assert http(web.box, "GET", other).status == 404


def test_a_browser_runs_it_pinned_and_nothing_else_under_its_hash(web: Web, site: Site, visitor: Visitor) -> None:
    name, integrity = pinned(web)
    site.script = f"{web.box.url}/{name}"
    site.attributes += f' crossorigin="anonymous" integrity="{integrity}"'
    visitor.goes_to()
    visitor.stored("pageview")
    site.attributes = site.attributes.replace(integrity, "sha384-" + "A" * 64)
    visitor.page.goto(site.origin, wait_until="load")
    assert visitor.page.evaluate("window.appliance") is None


def spans(events: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Return a trace's events that have a length and one of these names."""
    return [event for event in events if event["name"] in names and "dur" in event]


def test_it_makes_the_browser_lay_out_nothing_while_it_loads(
    site: Site, visitor: Visitor, context: BrowserContext
) -> None:
    """What makes a large page late is not the script but a layout that it asks for. `make bench` looks at the time."""
    site.body = "<p>row</p>" * 3000
    # A page that has just changed has to be laid out before anything of its layout can be read.
    change = "document.documentElement.style.fontSize = '20px';"
    context.route("**/tracking.js", lambda route: route.fulfill(body=change + route.fetch().text()))
    events: list[dict[str, Any]] = []
    assert context.browser is not None
    session = context.browser.new_browser_cdp_session()
    session.on("Tracing.dataCollected", lambda data: events.extend(data["value"]))
    session.send("Tracing.start", {"traceConfig": {"includedCategories": ["devtools.timeline", "v8"]}})
    visitor.goes_to()
    done: list[Any] = []
    session.on("Tracing.tracingComplete", lambda data: done.append(data))  # noqa: PLW0108 - Playwright marks what it is given
    session.send("Tracing.end")
    wait_for(lambda: visitor.waits() and done, "the trace")
    ours = [
        event
        for event in spans(events, "EvaluateScript", "FunctionCall")
        if "tracking.js" in str(event["args"].get("data", {}).get("url"))
    ]
    assert "EvaluateScript" in {event["name"] for event in ours}
    layouts = spans(events, "Layout", "UpdateLayoutTree")
    assert layouts
    assert not [
        layout["name"]
        for layout in layouts
        for event in ours
        if event["tid"] == layout["tid"] and event["ts"] <= layout["ts"] < event["ts"] + event["dur"]
    ]


def test_listeners_are_passive(visitor: Visitor) -> None:
    visitor.page.add_init_script("""
        window.listeners = [];
        const { addEventListener } = window;
        window.addEventListener = function (name, react, options) {
            if (document.currentScript?.src.endsWith("tracking.js")) listeners.push([name, options]);
            addEventListener.apply(this, arguments);
        };
    """)
    visitor.goes_to()
    blocking = {"scroll", "wheel", "touchstart", "touchmove", "pointermove", "keydown", "click"}
    listeners = visitor.page.evaluate("listeners")
    assert {name for name, _ in listeners} > {"scroll", "pointermove", "click"}
    assert all(options["passive"] for name, options in listeners if name in blocking)
    assert not {"unload", "beforeunload"} & {name for name, _ in listeners}


# ---- what pages can ask of it


def test_a_page_adds_events_of_its_own_and_cannot_forge_the_tracker_s_fields(site: Site, visitor: Visitor) -> None:
    site.attributes += ' data-auto="off"'
    visitor.goes_to()
    visitor.page.evaluate("""appliance.track("order", { total: 12.5, items: [{ sku: "q" }], siteId: "forged",
        eventId: "forged", visitorId: "forged", sessionId: "forged", timestamp: 0, eventType: "forged", sentAt: 1 })""")
    (event,) = visitor.stored("order")
    assert (event["total"], event["items"]) == (12.5, [{"sku": "q"}])
    assert "forged" not in json.dumps(event)
    assert visitor.events()[0]["timestamp"] > "2020"
    assert not {"siteId", "sentAt"} & event.keys()


def test_a_page_says_who_somebody_is_and_counts_its_own_views(site: Site, visitor: Visitor) -> None:
    site.attributes += ' data-pageview="off"'
    visitor.goes_to("/a")
    visitor.page.evaluate("""() => {
        appliance.identify("u-7", { plan: "small" });
        appliance.page({ title: "Step 2", path: "/step/2" });
        appliance.page();
    }""")
    visitor.hides()
    events = visitor.stored("identify", "pageleave", "pageview", "pageleave", "pageview", "pageleave", "vitals")
    identify = of_type(events, "identify")
    assert (identify["userId"], identify["traits"]) == ("u-7", {"plan": "small"})
    views = [event for event in events if event["eventType"] == "pageview"]
    assert [(view["title"], view["path"]) for view in views] == [("Step 2", "/step/2"), ("A page", "/a")]


def test_calls_before_the_script_is_there_are_kept_in_their_order(site: Site, visitor: Visitor) -> None:
    site.before = f"""{stub()}<script>
        appliance.identify("u-7");
        appliance.track("early", {{ n: 1 }});
        appliance.track("early", {{ n: 2 }});
        appliance.unknown && appliance.unknown();
    </script>"""
    visitor.goes_to()
    events = visitor.stored("identify", "early", "early", "pageview")
    assert [event.get("n") for event in events] == [None, 1, 2, None]


def test_an_early_refusal_is_heard_before_anything_is_tracked(site: Site, visitor: Visitor) -> None:
    site.before = f"{stub()}<script>appliance.track('early'); appliance.optOut()</script>"
    visitor.goes_to()
    visitor.waits()
    assert visitor.queue() == []


def stub() -> str:
    """Return the stub as the documentation has it."""
    (found,) = re.findall(r"^    <script>\n(?:    .*\n)+?    </script>\n", DOCUMENT, re.MULTILINE)
    return str(found)


# A hook, and what is stored of the event that it sees; None: nothing.
HOOKS: list[tuple[str, dict[str, Any] | None]] = [
    ("(event) => ({ ...event, extra: 1 })", {"extra": 1}),
    ("(event) => { delete event.visitorId; return event; }", {"visitorId": None}),
    ("(event) => ({ ...event, siteId: 'forged', eventId: 'forged' })", {"siteId": None}),
    ("(event) => ({ ...event, eventType: 'renamed' })", {"eventType": "renamed"}),
    ("null", {"eventType": "seen"}),
    ("(event) => null", None),
    ("(event) => false", None),
    ("(event) => {}", None),
    ("() => { throw new Error('broken') }", None),
    ("'no function'", None),
]


def test_a_hook_sees_each_event_and_may_change_or_drop_it(visitor: Visitor) -> None:
    visitor.goes_to()
    for number, (hook, _) in enumerate(HOOKS):
        visitor.page.evaluate(
            f"number => {{ appliance.beforeSend = {hook}; appliance.track('seen', {{ number }}); }}", number
        )
    visitor.page.evaluate("appliance.beforeSend = undefined; appliance.track('after')")
    kept = [number for number, (_, stored) in enumerate(HOOKS) if stored]
    types = ["renamed" if "renamed" in HOOKS[number][0] else "seen" for number in kept]
    events = visitor.stored("pageview", *types, "after")
    by_number = {event["number"]: event for event in events if "number" in event}
    assert sorted(by_number) == kept
    for number, event in by_number.items():
        stored = HOOKS[number][1] or {}
        assert {key: event.get(key) for key in stored} == stored
    assert "forged" not in json.dumps(events)


def test_a_hook_that_was_set_before_sees_the_first_event(site: Site, visitor: Visitor) -> None:
    site.before = f"{stub()}<script>appliance.beforeSend = (event) => ({{ ...event, extra: 1 }})</script>"
    visitor.goes_to()
    (event,) = visitor.stored("pageview")
    assert event["extra"] == 1


# What a page may call by mistake: nothing of it may throw, or stop what comes after it.
MISTAKES = [
    "track()",
    "track(null, null)",
    "track({}, [])",
    "track(Symbol('x'))",
    "track(Object.create(null))",
    "track('bigint', { total: 10n, kept: 1 })",
    "track('circle', (() => { const circle = { kept: 1 }; circle.circle = circle; return circle; })())",
    "track('getter', { get broken() { throw Object.create(null); }, kept: 1 })",
    "track('json', { toJSON() { return 'forged'; }, inner: { toJSON() { throw 1; } }, kept: 1 })",
    "track('function', { f() {}, s: Symbol('s'), u: undefined, kept: 1 })",
    "track('proxy', new Proxy({}, { ownKeys() { throw 1; } }))",
    "track('text', 'a text')",
    "track('x'.repeat(1e4), { kept: 1 })",
    "track('url', { url: 'http://[', kept: 1 })",
    "track('path', { path: { toString() { throw 1; } }, kept: 1 })",
    "track('batch', { events: [], kept: 1 })",
    'track(\'__proto__\', JSON.parse(\'{"__proto__": { "a": 1 }, "constructor": 1, "kept": 1}\'))',
    "track('\\ud800', { '\\udfff': '\\u0000\\ud800', kept: 1 })",
    "identify()",
    "identify(10n, { a: 10n })",
    "page(null)",
    "page(7)",
    "consent()",
    "consent({})",
    "optIn({})",
    "optOut(null)",
]


def test_nothing_that_a_page_calls_throws_or_stops_what_comes_after(visitor: Visitor) -> None:
    errors: list[str] = []
    visitor.page.on("pageerror", lambda error: errors.append(str(error)))
    visitor.goes_to()
    for call in MISTAKES:
        visitor.page.evaluate(f"() => {{ appliance.{call}; appliance.{call}; }}")
        visitor.page.evaluate("appliance.optIn(); appliance.consent(true)")
        visitor.page.evaluate("call => appliance.track('after', { call })", call)
        visitor.page.evaluate("dispatchEvent(new Event('online'))")
        wait_for(lambda: visitor.waits() and not visitor.queue(), f"what comes after {call}")
    events = visitor.events()
    assert [event["call"] for event in events if event["eventType"] == "after"] == MISTAKES
    assert errors == []
    assert "forged" not in json.dumps([event for event in events if event["eventType"] != "after"])
    kept = [call for call in MISTAKES if "kept" in call and "http://[" not in call]
    assert sum(event.get("kept") == 1 for event in events) == 2 * len(kept)


def test_a_script_that_is_embedded_twice_tracks_once(site: Site, visitor: Visitor) -> None:
    site.before = f'<script src="{site.script}" data-site="{site.id}" {site.attributes}></script>'
    site.attributes += " data-debug"
    visitor.goes_to()
    visitor.hears("loaded twice")
    visitor.stored("pageview")


def test_a_tag_without_a_site_says_so_and_its_functions_do_nothing(site: Site, visitor: Visitor) -> None:
    site.before = f'<script src="{site.script}"></script>'
    visitor.goes_to()
    assert "not tracking no data-site" in visitor.hears("no data-site")
    visitor.page.evaluate("appliance.track('x'); appliance.page(); appliance.optIn(); appliance.consent(true)")
    assert visitor.page.evaluate("Object.keys(localStorage).filter((key) => key.includes('queue'))") == []


# ---- what pages can do to it

HOSTILE = {
    "arrays": """for (const name of Object.getOwnPropertyNames(Array.prototype)) {
        if (typeof Array.prototype[name] === "function" && name !== "constructor") {
            Array.prototype[name] = () => { throw new Error("no arrays"); };
        }
    }
    Array.prototype.extra = Array.prototype.more = {};""",
    "fetch": "window.fetch = () => { throw new Error('no fetch'); };",
    "fetch that never answers": "window.fetch = () => new Promise(() => {});",
    "objects": "Object.prototype.extra = 'inherited';",
    "a screen that is gone": "var screen = null; window.frames = null;",
    "no beacons": "navigator.sendBeacon = undefined;",
    "no observers": "window.PerformanceObserver = undefined;",
    "JSON of old libraries": "Array.prototype.toJSON = function () { return 'an array'; };",
    "an element of that name": """document.documentElement.insertAdjacentHTML("beforeend",
        "<form id=appliance><input name=q></form>");""",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_page_that_has_replaced_what_the_tracker_might_use_is_tracked_and_not_disturbed(
    site: Site, visitor: Visitor, name: str, when: str
) -> None:
    # What is done here is done by the page itself: the tools of the test need arrays, too.
    does = """
        addEventListener("load", () => {
            AFTER
            appliance.track("own", { total: 1 });
            document.querySelector("button").click();
            history.pushState(null, "", "/next");
            setTimeout(() => dispatchEvent(new Event("online")), 50);
        });"""
    before, after = (HOSTILE[name], "") if when == "before" else ("", HOSTILE[name])
    site.before = f"<script>{before}{does.replace('AFTER', after)}</script>"
    site.body = "<button>Press</button>"
    visitor.page.goto(site.origin, wait_until="load")
    wanted = {"own", "click", "pageleave", "pageview"} - ({"pageview"} if "screen" in name else set())
    wait_for(lambda: set(visitor.types()) >= wanted, "all events")
    assert {event["path"] for event in visitor.events()} >= {"/"}


def test_a_strict_content_policy_needs_the_collector_in_two_places(site: Site, visitor: Visitor) -> None:
    box = site.web.box.url
    site.headers["Content-Security-Policy"] = CONTENT_POLICY.format(script=box, connect=box)
    blocked: list[str] = []
    visitor.page.on("console", lambda message: blocked.append(message.text))
    visitor.page.goto(site.origin)
    visitor.page.wait_for_selector("body", state="attached")
    wait_for(lambda: visitor.waits() and visitor.types() == ["pageview"], "a pageview")
    assert blocked == []
    assert f"script-src {'https://events.example.com'}" in DOCUMENT
    assert f"connect-src {'https://events.example.com'}" in DOCUMENT


def test_it_works_under_a_path_of_the_site_behind_a_proxy(site: Site, visitor: Visitor) -> None:
    site.script = "/first-party/tracking.js"
    requests: list[str] = []
    visitor.page.on("request", lambda request: requests.append(request.url))
    visitor.goes_to("/deep/page")
    visitor.stored("pageview")
    assert f"{site.origin}/first-party/collect" in requests
    assert not [url for url in requests if not url.startswith((site.origin, "data:"))]


def test_an_endpoint_can_be_elsewhere(site: Site, visitor: Visitor) -> None:
    site.attributes += ' data-endpoint="/first-party/collect"'
    visitor.goes_to()
    visitor.stored("pageview")


def test_the_demo_site_is_tracked_from_another_origin_than_the_collector_s(
    web: Web, site: Site, visitor: Visitor
) -> None:
    demo = http(web.box, "GET", "/demo/").body.decode()
    assert 'src="/tracking.js" data-site="demo"' in demo
    site.page = demo.replace('src="/tracking.js"', 'src="{script}"')
    page = visitor.goes_to()
    page.click("#signup")
    page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(lambda: visitor.waits() and len(web.stored("demo")) == 2, "two events")
    assert [event["eventType"] for event in web.stored("demo")] == ["pageview", "signup"]
    assert {event["url"] for event in web.stored("demo")} == {f"{site.origin}/"}


# ---- what is written about it


def test_the_documentation_has_every_attribute_that_is_read_and_no_other() -> None:
    read = {f"data-{name}" for name in re.findall(r"options\.(\w+)", SOURCE)} | {"data-site", "data-debug"}
    assert "{ site } = options" in SOURCE
    assert '"debug" in options' in SOURCE
    automatic = {f"data-{name}" for name in AUTOMATIC}
    told = set(re.findall(r"`(data-[a-z]+)(?:=|`)", DOCUMENT))
    assert told - {"data-track"} == read | automatic


AUTOMATIC = set(re.findall(r'(?:auto|recordAs|tell)\("(\w+)"', SOURCE))


def examples() -> dict[str, dict[str, Any]]:
    found = re.findall(r"^### `(\w+)`$.*?^    (\{.*?^    \})$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return {name: json.loads(text) for name, text in found}


def test_the_documentation_has_an_example_of_every_event() -> None:
    assert {"pageview", "click", "vitals"} < AUTOMATIC
    assert set(examples()) == AUTOMATIC | {"identify"}
    assert all(example["eventType"] == name for name, example in examples().items())


# An interaction that takes no time is not measured, and one that was measured is told a moment later.
_SLOW = "for (const begun = performance.now(); performance.now() - begun < 50; );"
_MEASURING = """() => new PerformanceObserver((list) => {
    window.measured ||= list.getEntries().some((entry) => entry.interactionId);
}).observe({ type: "event", durationThreshold: 16 })"""


def test_the_examples_have_the_fields_of_the_events_as_they_arrive(site: Site, visitor: Visitor) -> None:
    site.body = f"""<a id="away" href="https://example.com/list.pdf" onclick="return false">The list</a>
        <form id="order" name="order" onsubmit="return false"><input name="name" value="x">
        <button id="go" onclick="{_SLOW}">Go</button></form>
        <p id="dead">dead</p><div style="height: 3000px"></div>"""
    page = visitor.goes_to("/?utm_source=letter")
    page.evaluate(_MEASURING)
    page.click("#away")
    page.click("#go")
    page.click("#dead", click_count=3)
    page.evaluate("setTimeout(() => { throw new Error('no') })")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#dead')); document.execCommand('copy')")
    page.evaluate("appliance.identify('u-7', { plan: 'small' })")
    page.evaluate("scrollTo(0, 9999)")
    page.wait_for_function("window.measured")
    page.wait_for_timeout(150)
    visitor.hides()
    page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(lambda: visitor.waits() and set(visitor.types()) == set(examples()), "every event")
    arrived: dict[str, set[str]] = {}
    for event in visitor.events():
        arrived.setdefault(event["eventType"], set()).update(event)
    assert {name: set(example) for name, example in examples().items()} == arrived
