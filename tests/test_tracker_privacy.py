"""tracking.js: who somebody is, and what is not told of them. In a real browser, against the real server."""

import json
from collections.abc import Callable
from urllib.parse import quote
from uuid import UUID

import pytest
from conftest import wait_for
from playwright.sync_api import BrowserContext
from tracking import Site, Visitor

LEFT_BEHIND = "Object.keys(localStorage).filter((key) => key.startsWith('appliance.')).sort()"
DNT = "Object.defineProperty(navigator, 'doNotTrack', { get: () => '1' });"
GPC = "Object.defineProperty(navigator, 'globalPrivacyControl', { get: () => true });"


def stays_silent(visitor: Visitor, reason: str, path: str = "/", origin: str = "") -> None:
    """Do what is tracked elsewhere; nothing may be sent or stored, and the reason is said."""
    requests: list[str] = []
    visitor.page.on("request", lambda request: requests.append(request.url))
    page = visitor.goes_to(path, origin=origin)
    visitor.hears(reason)
    page.evaluate("""() => {
        appliance.track("asked");
        appliance.identify("u1");
        appliance.page();
        history.pushState(null, "", location.pathname + "?next");
        dispatchEvent(new Event("online"));
    }""")
    page.wait_for_timeout(100)
    visitor.hides()
    page.wait_for_timeout(100)
    assert not [url for url in requests if url.endswith("/collect")]
    assert page.evaluate(LEFT_BEHIND) in ([], ["appliance.optout"])
    assert page.evaluate("document.cookie") == ""
    assert visitor.types() == []


# ---- identity


def test_every_event_has_an_id_of_its_own_that_tells_its_time(visitor: Visitor) -> None:
    visitor.goes_to()
    visitor.page.evaluate("for (let n = 0; n < 40; n++) appliance.track('many', { n })")
    events = visitor.stored("pageview", *["many"] * 40)
    ids = [UUID(event["eventId"]) for event in events]
    assert {one.version for one in ids} == {7}
    assert {one.variant for one in ids} == {"specified in RFC 4122"}
    assert len(set(ids)) == 41
    by_id = sorted(events, key=lambda event: str(event["eventId"]))
    assert [event.get("n") for event in by_id] == [None, *range(40)]


def test_the_visitor_is_the_same_in_all_tabs_and_later(visitor: Visitor, another_tab: Callable[[], Visitor]) -> None:
    visitor.goes_to("/a")
    other = another_tab()
    other.goes_to("/b")
    visitor.goes_to("/c")
    events = visitor.stored(*["pageview"] * 3, "pageleave", "vitals")
    assert len({event["visitorId"] for event in events}) == len({event["sessionId"] for event in events}) == 1
    assert events[0]["visitorId"] != events[0]["sessionId"]


@pytest.mark.parametrize(
    ("minutes", "sessions"), [(29, 1), (31, 2), (-31, 2)], ids=["pause", "silence", "clock set back"]
)
def test_a_session_ends_after_half_an_hour_of_silence_and_the_visitor_stays(
    visitor: Visitor, minutes: int, sessions: int
) -> None:
    visitor.goes_to()
    visitor.stored("pageview")
    visitor.page.evaluate(
        "ms => { const [id, seen] = localStorage['appliance.session'].split('_');"
        " localStorage['appliance.session'] = id + '_' + (Number(seen) - ms); }",
        minutes * 60_000,
    )
    visitor.page.evaluate("appliance.track('later')")
    events = visitor.stored("pageview", "later")
    assert len({event["sessionId"] for event in events}) == sessions
    assert len({event["visitorId"] for event in events}) == 1


def test_a_cookie_knows_the_visitor_on_every_host_of_the_domain(site: Site, visitor: Visitor) -> None:
    site.attributes = 'data-storage="cookie" data-domain="shop.test"'
    visitor.goes_to("/a", origin=site.host("www.shop.test"))
    visitor.goes_to("/b", origin=site.host("shop.test"))
    visitor.goes_to("/c", origin=site.host("shop.test"))
    visitor.page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(lambda: visitor.waits() and visitor.types().count("pageview") == 3, "three pageviews")
    events = visitor.events()
    assert len({event["visitorId"] for event in events}) == len({event["sessionId"] for event in events}) == 1
    cookies = {cookie["name"]: cookie for cookie in visitor.page.context.cookies()}
    assert set(cookies) == {"appliance.visitor", "appliance.session"}
    assert {cookie["domain"] for cookie in cookies.values()} == {".shop.test"}
    assert {cookie["sameSite"] for cookie in cookies.values()} == {"Lax"}
    visitor.page.evaluate("appliance.optOut()")
    visitor.goes_to("/d", origin=site.host("www.shop.test"))
    assert {cookie["name"] for cookie in visitor.page.context.cookies()} == {"appliance.optout"}
    visitor.page.evaluate("appliance.track('no')")
    visitor.page.evaluate("appliance.optIn()")
    visitor.page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(lambda: visitor.waits() and visitor.types().count("pageview") == 4, "a pageview")
    assert "no" not in visitor.types()


def test_without_storage_nothing_is_kept_and_nobody_recognised(site: Site, visitor: Visitor) -> None:
    site.attributes += ' data-storage="none"'
    visitor.goes_to("/a")
    visitor.page.evaluate("appliance.track('more')")
    visitor.stored("pageview", "more")
    visitor.goes_to("/b")
    events = visitor.stored("pageview", "more", "pageleave", "vitals", "pageview")
    assert not any("visitorId" in event for event in events)
    assert len({event["sessionId"] for event in events}) == 2
    assert visitor.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


# ---- who is not tracked


@pytest.mark.parametrize("script", [DNT, GPC], ids=["DNT", "GPC"])
@pytest.mark.parametrize("honoured", [True, False])
def test_who_asks_not_to_be_tracked_is_not_unless_the_site_says_so(
    site: Site, visitor: Visitor, script: str, *, honoured: bool
) -> None:
    visitor.page.add_init_script(script)
    site.attributes += " data-debug"
    if honoured:
        stays_silent(visitor, "not tracking DNT or GPC")
        return
    site.attributes += ' data-dnt="off"'
    visitor.goes_to()
    visitor.stored("pageview")


@pytest.mark.parametrize("storage", ["local", "none", "cookie"])
def test_nothing_is_sent_or_stored_before_consent(site: Site, visitor: Visitor, storage: str) -> None:
    site.attributes += f' data-consent="required" data-debug data-storage="{storage}"'
    stays_silent(visitor, "not tracking no consent")
    visitor.page.evaluate("appliance.consent(false); appliance.consent('yes'); appliance.consent()")
    assert visitor.page.evaluate(LEFT_BEHIND) == []
    visitor.page.evaluate("appliance.consent(true); appliance.consent(true)")
    visitor.hides(hidden=False)
    visitor.stored("pageview")


def test_consent_holds_for_the_next_page_until_it_is_withdrawn_with_all_that_was_stored(
    site: Site, visitor: Visitor
) -> None:
    site.attributes += ' data-consent="required"'
    visitor.goes_to("/a")
    visitor.page.evaluate("appliance.consent(true)")
    visitor.goes_to("/b")
    visitor.stored("pageview", "pageleave", "vitals", "pageview")
    visitor.page.evaluate("appliance.track('unsent'); appliance.consent(false); appliance.consent(false)")
    assert visitor.page.evaluate(LEFT_BEHIND) == []
    visitor.goes_to("/c")
    visitor.page.evaluate("appliance.track('no'); dispatchEvent(new Event('online'))")
    visitor.stored("pageview", "pageleave", "vitals", "pageview")


def test_consent_can_be_refused_where_it_is_not_required(visitor: Visitor) -> None:
    visitor.goes_to("/a")
    visitor.page.evaluate("appliance.consent(false)")
    visitor.goes_to("/b")
    visitor.page.evaluate("appliance.track('no')")
    assert visitor.page.evaluate(LEFT_BEHIND) == ["appliance.consent"]
    visitor.page.evaluate("appliance.consent(true)")
    events = visitor.stored("pageview")
    assert events[0]["path"] == "/b"


def test_opting_out_holds_until_opting_in_and_survives_a_refusal(site: Site, visitor: Visitor) -> None:
    site.attributes += " data-debug"
    visitor.goes_to("/a")
    first = visitor.stored("pageview")[0]
    visitor.page.evaluate("appliance.track('unsent'); appliance.optOut(); appliance.optOut(); appliance.consent(false)")
    assert "appliance.visitor" not in visitor.page.evaluate(LEFT_BEHIND)
    visitor.goes_to("/b")
    visitor.hears("not tracking opted out")
    visitor.page.evaluate("appliance.track('no'); appliance.consent(true)")
    visitor.page.evaluate("appliance.optIn(); appliance.optIn()")
    events = visitor.stored("pageview", "pageview")
    assert events[1]["path"] == "/b"
    assert events[1]["visitorId"] != first["visitorId"]


@pytest.mark.parametrize("storage", ["local", "none", "cookie"])
def test_an_opt_out_that_was_set_by_hand_holds_however_the_site_stores(
    site: Site, visitor: Visitor, storage: str
) -> None:
    site.before = "<script>localStorage['appliance.optout'] = '1'</script>"
    site.attributes += f' data-debug data-storage="{storage}"'
    stays_silent(visitor, "not tracking opted out")


def test_a_local_page_is_ignored_and_says_so_without_being_asked(site: Site, visitor: Visitor) -> None:
    site.attributes = ""
    stays_silent(visitor, "not tracking localhost")


@pytest.mark.parametrize("host", ["127.0.0.1", "app.localhost"])
def test_these_hosts_are_local_too(site: Site, visitor: Visitor, host: str) -> None:
    site.attributes = ""
    stays_silent(visitor, "not tracking localhost", origin=site.host(host))


@pytest.mark.parametrize("host", ["shop.test", "localhost.shop.test", "127.shop.test"])
def test_these_hosts_are_not_local_and_nothing_is_said_there(site: Site, visitor: Visitor, host: str) -> None:
    site.attributes = ""
    visitor.goes_to(origin=site.host(host))
    visitor.stored("pageview")
    assert visitor.said == []


@pytest.mark.parametrize(
    ("exclude", "path", "tracked"),
    [
        ("/admin/*", "/admin/users", False),
        ("/admin/*", "/admin", True),
        ("/a, /b  /c", "/b", False),
        ("/a, /b  /c", "/bb", True),
        ("*.php", "/x/y.php", False),
        ("/a.b", "/aXb", True),
        ("/(x", "/(x", False),
        ("", "/", True),
        ("*", "/any", False),
    ],
)
def test_paths_that_are_excluded_are_not_tracked(
    site: Site, visitor: Visitor, exclude: str, path: str, *, tracked: bool
) -> None:
    site.attributes += f' data-exclude="{exclude}" data-debug'
    visitor.goes_to(path)
    visitor.page.evaluate("appliance.track('asked')")
    if tracked:
        visitor.stored("pageview", "asked")
    else:
        visitor.hears("held back: asked excluded")
        assert visitor.queue() == []


def test_an_excluded_path_that_is_reached_by_script_hides_itself_and_nothing_else(site: Site, visitor: Visitor) -> None:
    site.attributes += ' data-exclude="/secret*"'
    visitor.goes_to("/open")
    for path in ("/secret", "/open2"):
        visitor.page.evaluate("path => history.pushState(null, '', path)", path)
        visitor.waits()
    events = visitor.stored("pageview", "pageleave", "pageview")
    assert [event["path"] for event in events] == ["/open", "/open", "/open2"]


# ---- what is not told

SECRETS = [
    *("token", "access_token", "csrfToken", "%74oken", "password", "passwd", "PASSWORD", "pwd", "email", "e-mail"),
    *("user_email", "secret", "client_secret", "api_key", "apiKey", "auth", "code", "otp", "pin", "sessionid", "jwt"),
    *("phone", "sig", "key"),
]


def test_parameters_that_tell_a_secret_are_stripped_wherever_an_address_is_told(site: Site, visitor: Visitor) -> None:
    query = "&".join(f"{name}=hunter2-{index}" for index, name in enumerate(SECRETS))
    site.body = f'<a href="/next?{query}&b=2#{query}">next</a>'
    page = visitor.goes_to(f"/start?a=1&{query}&author=jane&token=hunter2#{query}&section=3")
    page.evaluate("setTimeout(() => { throw new Error('x') })")
    page.evaluate("appliance.track('own', { url: location.href })")
    waiting = json.dumps(visitor.queue())
    page.click("a")
    page.wait_for_url("**/next?*")
    events = visitor.stored("pageview", "own", "error", "click", "pageleave", "vitals", "pageview")
    assert "hunter2" not in json.dumps(events) + waiting
    assert events[0]["url"] == f"{site.origin}/start?a=1&author=jane#section=3"
    assert events[0]["query"] == {"a": "1", "author": "jane"}
    assert events[-1]["referrer"] == f"{site.origin}/start?a=1&author=jane"


@pytest.mark.parametrize("search", ["?a=b+c&d=%E2%82%AC", "?q", "?a&a=2", "?x=%ff", "?" + quote("ü=ä")])
def test_an_address_without_secrets_is_told_as_it_is(visitor: Visitor, search: str) -> None:
    visitor.goes_to(f"/page{search}#:~x/y?z")
    (event,) = visitor.stored("pageview")
    assert event["url"] == visitor.page.evaluate("location.href")
    assert event["path"] == "/page"


def test_nothing_that_tells_browsers_apart_is_asked_for(visitor: Visitor) -> None:
    visitor.page.add_init_script("""
        window.asked = [];
        const refuse = (type, name) =>
            Object.defineProperty(type.prototype, name, { get() { asked.push(name); return undefined; } });
        refuse(HTMLCanvasElement, "toDataURL");
        refuse(CanvasRenderingContext2D, "getImageData");
        for (const name of ["plugins", "hardwareConcurrency", "deviceMemory", "userAgent", "userAgentData"]) {
            refuse(Navigator, name);
        }
        const { AudioContext } = window;
        window.AudioContext = class extends AudioContext { constructor() { super(); asked.push("audio"); } };
    """)
    visitor.goes_to()
    visitor.stored("pageview")
    assert visitor.page.evaluate("asked") == []


def test_debug_says_what_was_sent_held_back_and_refused(site: Site, visitor: Visitor) -> None:
    site.attributes += " data-debug"
    site.before = """<script>
        window.appliance = { q: [], beforeSend: (event) => event.eventType !== "private" && event };
    </script>"""
    visitor.goes_to()
    visitor.page.evaluate("appliance.track('private'); appliance.track('  ')")
    visitor.hides()
    visitor.page.evaluate("dispatchEvent(new Event('online'))")
    said = visitor.hears("sent 4")
    assert "held back: private beforeSend" in said
    assert "handed over 4" in said
    assert "eventType must be a text" in said or "rejected" in said


def test_without_debug_nothing_is_written_to_the_console(visitor: Visitor, context: BrowserContext) -> None:
    visitor.goes_to()
    visitor.page.evaluate("appliance.track('x', { n: 10n }); appliance.track(Object.create(null))")
    visitor.hides()
    visitor.stored("pageview", "x", "pageleave", "vitals")
    assert visitor.said == []
    assert context.pages
