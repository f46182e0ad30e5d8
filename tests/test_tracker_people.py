"""tracking.js: what people do on a page. In a real browser, against the real server."""

import json
from typing import Any

import pytest
from tracking import Site, Visitor, of_type

FORM = """<form id="order" name="quinces" onsubmit="return false">
    <input name="name"><input name="email" type="email"><input name="pass" type="password">
    <textarea name="text"></textarea><input type="checkbox" name="letter" value="weekly">
    <input type="radio" name="size" value="small"><input type="radio" name="size" value="large">
    <select name="kind"><option value="">-<option value="rare">Rare</select>
    <input type="hidden" name="csrf" value="hidden-value"><input id="no-name"><input type="file" name="picture">
    <button name="go" value="sent-value">Send</button></form>"""

# What is clicked, and what the event then says.
CLICKS: dict[str, tuple[str, dict[str, Any]]] = {
    "a link inside": (
        '<a id=x href="/next">Next  \n page</a>',
        {"text": "Next page", "href": "/next", "outbound": False},
    ),
    "a link outside": (
        '<a id=x href="https://example.com/a">away</a>',
        {"href": "https://example.com/a", "outbound": True},
    ),
    "another port": ('<a id=x href="http://localhost:1/">away</a>', {"outbound": True, "download": False}),
    "an address to write to": ('<a id=x href="mailto:a@b.c">write</a>', {"href": "mailto:a@b.c", "outbound": False}),
    "a script": ('<a id=x href="javascript:void 0">run</a>', {"href": "javascript:void 0", "outbound": False}),
    "no address at all": ('<a id=x href="http://[">broken</a>', {}),
    "a link without an address": ("<a id=x>nowhere</a>", {"text": "nowhere", "href": None}),
    "a file": ('<a id=x href="/list.PDF?v=1">list</a>', {"download": True}),
    "a file by its attribute": ('<a id=x href="/list" download>list</a>', {"download": True}),
    "a link with a secret": ('<a id=x href="/in?token=t0p&a=1#access_token=t0p">in</a>', {"href": "/in?a=1"}),
    "a link in a picture": (
        '<svg width=90 height=90><a id=x href="/svg"><text y=50>Drawn</text></a></svg>',
        {"element": "a", "text": "Drawn", "href": "/svg"},
    ),
    "a button": ("<button id=x><span><b>Press</b> me</span></button>", {"element": "button", "text": "Press me"}),
    "a long text": (f"<button id=x>{'long ' * 50}</button>", {"text": ("long " * 20)[:100]}),
    "a role": ('<div id=x role="button">div</div>', {"element": "div", "text": "div"}),
    "a field's own name": ('<button id=x><input name="closest"></button>', {"element": "button", "text": None}),
    "an emoji that is cut": (f"<button id=x>{'a' * 99}\N{PEAR}</button>", {"element": "button"}),
}


def test_a_click_says_what_was_pressed_and_where_it_leads(site: Site, visitor: Visitor) -> None:
    site.before = '<script>addEventListener("click", (event) => event.preventDefault())</script>'
    page = visitor.goes_to()
    for markup, _ in CLICKS.values():
        page.evaluate("markup => { document.body.innerHTML = markup; }", markup)
        page.locator("#x").dispatch_event("click")
        page.evaluate("appliance.track('after')")
    told = [expected for _, expected in CLICKS.values() if expected]
    events = visitor.stored("pageview", *["click"] * len(told), *["after"] * len(CLICKS))
    clicks = [event for event in events if event["eventType"] == "click"]
    for event, expected in zip(clicks, told, strict=True):
        wanted = {"elementId": "x", **expected}
        if str(wanted.get("href")).startswith("/"):
            wanted["href"] = site.origin + wanted["href"]
        assert {key: event.get(key) for key in wanted} == wanted


def test_clicks_in_shadow_trees_and_with_the_middle_button_count_and_others_do_not(
    site: Site, visitor: Visitor
) -> None:
    site.body = """<p>text</p><a href="/next" id="link">next</a><div id="host"></div><script>
        document.querySelector("#host").attachShadow({ mode: "open" }).innerHTML = "<button><i>deep</i></button>";
    </script>"""
    page = visitor.goes_to()
    page.click("p")
    page.click("i")
    page.click("#link", button="right")
    page.locator("#link").dispatch_event("auxclick", {"button": 1})
    events = visitor.stored("pageview", "click", "click")
    assert [event["text"] for event in events if event["eventType"] == "click"] == ["deep", "next"]


def test_three_quick_clicks_in_one_place_are_rage(site: Site, visitor: Visitor) -> None:
    site.body = '<div id="dead">does nothing</div>'
    page = visitor.goes_to()
    page.click("#dead", click_count=2)
    page.click("#dead", click_count=5, position={"x": 300, "y": 5})
    events = visitor.stored("pageview", "rageclick")
    assert of_type(events, "rageclick")["elementId"] == "dead"


def test_a_form_says_which_fields_were_filled_and_never_with_what(site: Site, visitor: Visitor) -> None:
    site.body = FORM
    page = visitor.goes_to()
    page.fill("[name=name]", "typed-name")
    page.fill("[name=email]", "typed@example.com")
    page.fill("[name=pass]", "typed-password")
    page.check("[name=letter]")
    page.check("[value=large]")
    page.fill("#no-name", "typed-too")
    page.click("button")
    waiting = json.dumps(visitor.queue())
    events = visitor.stored("pageview", "click", "submit")
    event = of_type(events, "submit")
    assert (event["formId"], event["formName"]) == ("order", "quinces")
    assert event["fields"] == ["name", "email", "pass", "letter", "size", "no-name"]
    for value in ("typed", "weekly", "large", "hidden-value", "sent-value"):
        assert value not in json.dumps(events) + waiting


def test_a_form_is_recorded_whatever_its_fields_are_named(site: Site, visitor: Visitor) -> None:
    # Fields that hide the form's properties, and that know their form, as those of some frameworks do.
    site.body = """<form id="order" name="quinces" data-track="ordered" data-track-kind="rare" onsubmit="return false">
        <input name="id"><input name="name"><input name="tagName"><button>Order</button></form>
        <script>for (const field of document.forms.order) field.form_ = field.self = field;</script>"""
    page = visitor.goes_to()
    page.click("input")
    page.click("button")
    events = visitor.stored("pageview", "click", "ordered")
    event = of_type(events, "ordered")
    assert (event["formId"], event["formName"], event["kind"], event["fields"]) == ("order", "quinces", "rare", [])


def test_what_somebody_typed_is_not_told_as_the_text_of_what_was_pressed(site: Site, visitor: Visitor) -> None:
    site.body = """<div data-track="box"><textarea>typed before</textarea><p id="box">box</p></div>
        <div contenteditable><button id="inside">typed inside</button></div>
        <section data-track="editor"><div contenteditable id="editor">typed here</div></section>"""
    page = visitor.goes_to()
    for name in ("box", "inside", "editor"):
        page.locator(f"#{name}").dispatch_event("click")
    events = visitor.stored("pageview", "box", "click", "editor")
    assert "typed" not in json.dumps(events)


def test_attributes_make_events_without_code(site: Site, visitor: Visitor) -> None:
    site.body = """<button data-track="signup" data-track-plan="small" data-track-list-price="9.50" data-tracked="no">
        <b>Sign up</b></button>"""
    page = visitor.goes_to()
    page.click("b")
    event = of_type(visitor.stored("pageview", "signup"), "signup")
    assert (event["plan"], event["listPrice"], event["text"]) == ("small", "9.50", "Sign up")
    assert not {"track", "tracked", "ed"} & event.keys()


def test_copying_tells_how_much_and_not_what(site: Site, visitor: Visitor) -> None:
    site.body = "<p>Quinces are hard</p>"
    page = visitor.goes_to()
    page.evaluate("getSelection().selectAllChildren(document.querySelector('p')); document.execCommand('copy')")
    event = of_type(visitor.stored("pageview", "copy"), "copy")
    assert event["length"] == len("Quinces are hard")
    assert "hard" not in json.dumps(event)


def test_errors_of_the_page_are_told_up_to_a_bound(site: Site, visitor: Visitor) -> None:
    site.body = """<img src="data:,no">
        <script>window.fails = () => { throw new Error("No quinces " + "x".repeat(900)); };</script>"""
    page = visitor.goes_to("/page?password=hunter2")
    page.evaluate("setTimeout(fails)")
    page.evaluate("void [new TypeError('rejected'), 'a text', undefined].map((reason) => Promise.reject(reason))")
    page.evaluate("for (let n = 0; n < 30; n++) setTimeout(() => { throw n; })")
    events = visitor.stored("pageview", *["error"] * 10)
    errors = [event for event in events if event["eventType"] == "error"]
    messages = [event["message"] for event in errors]
    assert {"rejected", "a text", "undefined"} <= set(messages)
    (first,) = [event for event in errors if "quinces" in event["message"]]
    assert len(first["message"]) == 300
    assert (first["file"], first["line"]) == (f"{site.origin}/page", 5)
    assert "hunter2" not in json.dumps(events)


def does_everything(visitor: Visitor) -> None:
    page = visitor.page
    page.click("#dead", click_count=3)
    page.click("[name=go]")
    page.evaluate("scrollTo(0, 9999)")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#dead')); document.execCommand('copy')")
    page.evaluate("setTimeout(() => { throw new Error('no') })")
    visitor.waits()
    visitor.hides()


EVERYTHING = ["pageview", "rageclick", "click", "submit", *["scroll"] * 5, "copy", "error", "pageleave", "vitals"]


@pytest.mark.parametrize("off", [*dict.fromkeys(EVERYTHING), "auto", ""])
def test_what_is_tracked_unasked_is_turned_off_by_its_own_attribute(site: Site, visitor: Visitor, off: str) -> None:
    site.body = f'<div id="dead">dead</div>{FORM}<div style="height: 3000px"></div>'
    site.attributes += f' data-{off}="off"' if off else ""
    visitor.goes_to()
    does_everything(visitor)
    visitor.page.evaluate("appliance.track('asked')")
    visitor.stored("asked", *[one for one in EVERYTHING if off not in {one, "auto"}])
