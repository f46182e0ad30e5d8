"""The windows as a person sees them: every page, light and dark, on a phone and on a desk; and nothing hostile runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from playwright.sync_api import Browser, ConsoleMessage, Page, Request
from windows import PATHS, Windows, fill, needs_axe, page_of, two_buckets, windows

from appliance.store.embedded import EmbeddedPostgres

LOOKS = [("light", 1280), ("light", 390), ("dark", 1280), ("dark", 390)]


@pytest.fixture(scope="module")
def house(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windows]:
    directory = tmp_path_factory.mktemp("windows")
    with windows(postgres, directory, "looked_at", **two_buckets(directory)) as one:
        fill(one)
        one.post("/exports/verify", job="acme")
        one.post("/exports/probe", bucket="acme")
        wait_for(lambda: "works" in one.get("/exports") and "under way" not in one.get("/exports"), "errands to end")
        yield one


def names(path: str) -> str:
    return path.strip("/").replace("/", "-") or "overview"


def violations(page: Page, axe: str) -> list[str]:
    page.evaluate(axe)
    found: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']]}" for one in found["violations"]
    ]


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_every_page_is_whole_and_accessible(
    house: Windows, browser: Browser, tmp_path: Path, scheme: Any, width: int
) -> None:
    axe = needs_axe()
    pages = (*PATHS, "/exports/acme", "/exports/acme/1", "/exports/nothing", "/quarantine?kind=event")
    with page_of(browser, house, color_scheme=scheme, viewport={"width": width, "height": 844}) as page:
        for path in pages:
            page.goto(f"/admin{path}", wait_until="load")
            page.screenshot(path=tmp_path / f"{names(path).replace('?', '-')}-{scheme}-{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
            assert page.locator("h1").count() == 1, path
            assert violations(page, axe) == [], path


def test_events_appear_while_somebody_looks_and_only_those_that_were_asked_for(
    house: Windows, browser: Browser
) -> None:
    with page_of(browser, house, viewport={"width": 390, "height": 844}) as page:
        page.goto("/admin/live")
        page.get_by_label("Site").select_option("shop")
        page.get_by_role("button", name="Show").click()
        page.get_by_text("Live: events appear as they arrive.").wait_for()
        house.send({"eventType": "arrived", "siteId": "blog"}, origin="https://blog.example.com")
        house.send({"eventType": "arrived", "siteId": "shop", "basket": [{"article": "quince"}]})
        first = page.locator("#events li").first
        first.locator(".type").get_by_text("arrived").wait_for()
        assert page.locator("#events .type").get_by_text("arrived").count() == 1
        first.locator("summary").click()
        assert '"article": "quince"' in first.locator("pre").inner_text()
        page.get_by_role("button", name="Pause").click()
        house.send({"eventType": "later", "siteId": "shop"})
        page.get_by_role("button", name="Go on").click()
        page.locator("#events .type").get_by_text("later").wait_for()


def test_without_javascript_every_page_says_the_same(house: Windows, browser: Browser) -> None:
    with page_of(browser, house, java_script_enabled=False) as page:
        for path, words in (
            ("/", "One thing needs you."),
            ("/live", "The newest events."),
            ("/install", "Events arrive:"),
            ("/exports", "2 objects of 1 batch read, nothing found wrong"),
            ("/quarantine", "eventType is missing"),
            ("/configuration", "[[sites]] shop"),
        ):
            page.goto(f"/admin{path}")
            assert page.get_by_text(words).count() > 0, path
        page.goto("/admin/exports")
        page.get_by_role("button", name="Run now").first.click()
        page.get_by_text("The job runs now").wait_for()


def test_the_overview_renews_itself_and_leaves_alone_what_somebody_uses(house: Windows, browser: Browser) -> None:
    with page_of(browser, house) as page:
        page.locator("#live").evaluate("live => (live.dataset.old = 'yes')")
        page.locator("#live:not([data-old])").wait_for()
        assert page.get_by_role("heading", name="One thing needs you.").count() == 1


# ---- what hostile visitors send

MARKUP = [
    "<script>window.owned = 1</script>",
    "<img src=//evil.example/x onerror='window.owned = 1'>",
    '"><svg onload=window.owned=1>',
    "{{ 7 * 7 }}{% raw %}",
    "</pre></main></template><iframe src='javascript:window.owned=1'>",
    "javascript:window.owned=1",
    "\u202e\x01\x1b[2J</title><style>*{display:none}</style>",
    "\u2028</script><script src=//evil.example/x></script>",
]


def send_markup(house: Windows) -> None:
    """Fill every field that an admin can see: what visitors can send, and what could stand in the ledger."""
    for text in MARKUP:
        fields = {"visitorId": text[:8], "sessionId": text, "path": text, "url": text, "title": text, text: [text]}
        house.send({"eventType": text[:50], "siteId": "shop", **fields})
        clean = text.replace("\x00", "")
        house.execute("INSERT INTO event_counts VALUES (now(), %s, 1, 1)", clean)
        house.execute(
            "INSERT INTO events_log (event_id, event_type, site_id, visitor_id, path, timestamp, raw_event_data)"
            " VALUES (gen_random_uuid(), %s, %s, %s, %s, now(), jsonb_build_object(%s::text, %s::text))",
            *(clean[:50], clean, clean, clean, clean, clean),
        )
        house.execute(
            "INSERT INTO quarantine (refused_at, kind, reason, site_id, content) VALUES (now(), %s, %s, %s, %s)",
            *(clean, clean, clean, clean.encode()),
        )
        house.execute("INSERT INTO refusal_counts VALUES (now(), %s, %s, 3), (now(), %s, '', 3)", clean, clean, clean)
        house.execute("INSERT INTO export_runs (job, outcome, message) VALUES (%s, 'failed', %s)", clean, clean)
        house.execute("INSERT INTO export_coverage (job, site) VALUES (%s, '*')", clean)
        house.execute(
            "INSERT INTO export_batches (job, sequence, row_count, format, compression, object_rows, object_bytes,"
            " schema_version) VALUES (%s, 1, 1, %s, %s, 1, 1, 1)",
            *(clean, clean, clean),
        )
        house.execute("INSERT INTO export_objects VALUES (%s, 1, 1, %s, 1, 1, %s)", clean, clean, clean)
        house.execute(
            "INSERT INTO export_deliveries (job, sequence, bucket, prefix, last_error) VALUES (%s, 1, %s, %s, %s)",
            *(clean, clean, clean, clean),
        )


def watch(page: Page, own: str) -> list[str]:
    """Return the list in which everything is noted that a page must not do."""
    seen: list[str] = []

    def note_request(request: Request) -> None:
        if not request.url.startswith(own):
            seen.append(f"request {request.url}")

    def note_console(message: ConsoleMessage) -> None:
        # A job that somebody wrote into the ledger by hand may have a name that is no part of an address.
        if message.type == "error" and "404" not in message.text:
            seen.append(f"console {message.text}")

    page.on("dialog", lambda dialog: seen.append(f"dialog {dialog.message}"))
    page.on("pageerror", lambda error: seen.append(f"error {error}"))
    page.on("request", note_request)
    page.on("console", note_console)
    return seen


def test_nothing_that_visitors_send_runs_or_leaves_the_page(house: Windows, browser: Browser) -> None:
    send_markup(house)
    with page_of(browser, house) as page:
        seen = watch(page, house.box.url)
        page.goto("/admin/exports")
        links = page.locator("main a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
        assert len(links) > 2 * len(MARKUP)
        for path in [*(f"/admin{path}" for path in PATHS), *links]:
            page.goto(path)
            assert page.locator("h1").is_visible(), path
            page.evaluate("document.querySelectorAll('details').forEach(one => (one.open = true))")
            assert page.locator("img, iframe, object, embed, base, main style, main script").count() == 0, path
            assert page.locator("[onload], [onerror], [href^='javascript'], [href^='//']").count() == 0, path
            assert page.evaluate("document.scripts.length") <= 1, path
            assert page.evaluate("window.owned") is None, path
        page.goto("/admin/live")
        page.get_by_text("Live: events appear as they arrive.").wait_for()
        send = {"eventType": MARKUP[1][:50], "siteId": "shop", "path": MARKUP[4], "latest": MARKUP[0]}
        house.send(send)
        newest = page.locator("#events li").first
        newest.locator(".path").get_by_text(MARKUP[4]).wait_for()
        assert MARKUP[0] in (newest.locator("pre").text_content() or "")
        assert page.evaluate("window.owned") is None
        assert page.locator("#events img, #events iframe, #events script").count() == 0
        assert seen == []
