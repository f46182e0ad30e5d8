"""GET /pixel.gif: a pageview of a page without JavaScript, under the same rules as /collect."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote_from_bytes, urlencode
from uuid import uuid4

import pytest
from conftest import Answer, Collector, http, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.collect.collector import PIXEL

SHOP = "https://shop.example.com"
PAGE = f"{SHOP}/a/b?c=d"


@pytest.fixture
def visitor() -> str:
    """A visitor of the test's own, to find its rows by."""
    return uuid4().hex


def look(
    collector: Collector,
    fields: Mapping[str, str] | str,
    *,
    headers: Mapping[str, str] | None = None,
    method: str = "GET",
    source: str = "127.0.0.1",
) -> Answer:
    query = fields if isinstance(fields, str) else urlencode(fields)
    return http(collector.box, method, f"/pixel.gif?{query}", headers=headers, source=source)


def assert_uncached(answer: Answer) -> None:
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["ETag"] is None
    assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"


def test_it_is_a_picture_that_no_browser_keeps(collector: Collector, visitor: str) -> None:
    answer = look(collector, {"site": "shop", "visitorId": visitor})
    assert (answer.status, answer.body) == (200, PIXEL)
    assert answer.body.startswith(b"GIF89a")
    assert answer.headers.get_content_type() == "image/gif"
    assert_uncached(answer)


def test_a_look_is_stored_as_a_pageview_with_everything_it_says(collector: Collector, visitor: str) -> None:
    one = str(uuid4())
    said = {"site": "shop", "url": PAGE, "visitorId": visitor, "sessionId": "s", "eventId": one, "campaign": "ü 1"}
    assert look(collector, said, headers={"User-Agent": "Reader/1"}).status == 200
    (row,) = collector.rows(visitor)
    assert (row["event_type"], row["site_id"], row["session_id"], str(row["event_id"])) == (
        "pageview",
        "shop",
        "s",
        one,
    )
    assert (row["url"], row["path"], row["user_agent"]) == (PAGE, "/a/b", "Reader/1")
    assert row["timestamp"] == row["created_at"]
    assert row["raw_event_data"].items() >= said.items()


def test_the_page_is_the_one_that_shows_it_unless_it_says_another(collector: Collector, visitor: str) -> None:
    headers = {"Referer": PAGE}
    assert look(collector, {"site": "shop", "visitorId": visitor}, headers=headers).status == 200
    other = {"site": "shop", "visitorId": visitor, "url": f"{SHOP}/other"}
    assert look(collector, other, headers=headers).status == 200
    assert [row["url"] for row in collector.rows(visitor)] == [PAGE, f"{SHOP}/other"]


def test_a_look_with_an_id_is_stored_once(collector: Collector, visitor: str) -> None:
    said = {"site": "shop", "visitorId": visitor, "eventId": f"mail-{visitor}"}
    assert [look(collector, said).status for _ in range(3)] == [200] * 3
    assert len(collector.rows(visitor)) == 1


def test_asking_about_the_picture_is_no_look(collector: Collector, visitor: str) -> None:
    answer = look(collector, {"site": "shop", "visitorId": visitor}, method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert_uncached(answer)
    assert not collector.rows(visitor)


@pytest.mark.parametrize("header", ["If-None-Match", "If-Modified-Since", "Range"])
def test_every_look_counts_whatever_the_browser_has_already(collector: Collector, visitor: str, header: str) -> None:
    answer = look(collector, {"site": "shop", "visitorId": visitor}, headers={header: "*"})
    assert (answer.status, answer.body) == (200, PIXEL)
    assert len(collector.rows(visitor)) == 1


SENDERS: dict[str, tuple[str, dict[str, str], int, int]] = {
    "a page of the site": ("shop", {"Referer": PAGE}, 200, 1),
    "a page of the site in capitals": ("shop", {"Referer": "HTTPS://SHOP.EXAMPLE.COM/"}, 200, 1),
    "a page of the site by its origin alone": ("shop", {"Referer": SHOP}, 200, 1),
    "a mail or a page that hides": ("shop", {}, 200, 1),
    "a page that hides with an empty header": ("shop", {"Referer": ""}, 200, 1),
    "a stranger's page": ("shop", {"Referer": "https://evil.example/shop.example.com"}, 403, 0),
    "a stranger's page that looks like ours": ("shop", {"Referer": f"{SHOP}.evil.example/"}, 403, 0),
    "a stranger's page with our name for its user": ("shop", {"Referer": f"{SHOP}@evil.example/"}, 403, 0),
    "a page at another port": ("shop", {"Referer": f"{SHOP}:444/"}, 403, 0),
    "a page without encryption": ("shop", {"Referer": "http://shop.example.com/"}, 403, 0),
    "a page of another site": ("blog", {"Referer": PAGE}, 403, 0),
    "an address that is none": ("shop", {"Referer": "http://[::1"}, 403, 0),
    "a page without a host": ("shop", {"Referer": "about:blank"}, 403, 0),
    "an app": ("shop", {"Referer": "android-app://com.example/"}, 403, 0),
    "an unknown site": ("nowhere", {"Referer": PAGE}, 403, 0),
    "an impossible site": ("../shop", {}, 400, 0),
    "an empty site": ("", {}, 400, 0),
    "a page where one must be named": ("strict", {"Referer": "https://strict.example.com/x"}, 200, 1),
    "none where one must be named": ("strict", {}, 403, 0),
    "a visitor who wants no tracking": ("polite", {"DNT": "1"}, 200, 0),
    "a visitor who wants no tracking, by another name": ("polite", {"Sec-GPC": "1"}, 200, 0),
    "a visitor who does not mind": ("polite", {"DNT": "0"}, 200, 1),
}


@pytest.mark.parametrize("sender", SENDERS.values(), ids=SENDERS)
def test_a_look_is_taken_from_whom_an_event_would_be(
    collector: Collector, visitor: str, sender: tuple[str, dict[str, str], int, int]
) -> None:
    site, headers, status, rows = sender
    answer = look(collector, {"site": site, "visitorId": visitor}, headers=headers)
    assert answer.status == status
    assert answer.headers.get_content_type() == ("image/gif" if status == 200 else "application/json")
    assert_uncached(answer)
    assert len(collector.rows(visitor)) == rows


@pytest.mark.parametrize(
    ("site", "address"), [("shop", "203.0.113.77"), ("truncated", "203.0.113.0"), ("dropped", None)]
)
def test_a_site_keeps_as_much_of_the_address_as_it_says(
    collector: Collector, visitor: str, site: str, address: str | None
) -> None:
    headers = {"X-Forwarded-For": "203.0.113.77"}
    assert look(collector, {"site": site, "visitorId": visitor}, headers=headers, source="127.0.0.2").status == 200
    (row,) = collector.rows(visitor)
    assert (row["ip_address"] and str(row["ip_address"])) == address


ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "a site twice": ("site=shop&site=blog", {"site_id": "shop"}),
    "an event's own names": (
        "site=shop&siteId=blog&eventType=batch&events=[]",
        {"site_id": "shop", "event_type": "pageview"},
    ),
    "NUL": ("site=shop&url=%00", {"url": "\ufffd"}),
    "bytes that are no text": ("site=shop&url=%ff%fe%80", {"url": "\ufffd\ufffd\ufffd"}),
    "half a surrogate": ("site=shop&sessionId=%ed%a0%80", {}),
    "percent signs": ("site=shop&url=%&sessionId=%zz%2", {"url": "%", "session_id": "%zz%2"}),
    "what COPY takes for NULL": ("site=shop&url=%5CN", {"url": "\\N"}),
    "line breaks": ("site=shop&url=%0d%0aSet-Cookie:x", {"url": "\r\nSet-Cookie:x"}),
    "a name of nothing": ("site=shop&=x&&&=", {}),
    "a session that is too long": ("site=shop&sessionId=" + "x" * 2_000, {"session_id": "x" * 100}),
    "a time of digits": ("site=shop&timestamp=1772366340000&sentAt=99999999999999999999", {}),
    "JSON": ("site=shop&url=%7B%22a%22:1e999%7D", {"url": '{"a":1e999}'}),
    "five hundred fields": ("site=shop&" + "&".join(f"a{n}=" for n in range(500)), {}),
}


@pytest.mark.parametrize(("query", "holds"), ODD.values(), ids=ODD)
def test_an_odd_query_is_stored_as_far_as_it_can_be(
    collector: Collector, visitor: str, query: str, holds: dict[str, Any]
) -> None:
    answer = look(collector, f"{query}&visitorId={visitor}")
    assert (answer.status, answer.body) == (200, PIXEL)
    (row,) = collector.rows(visitor)
    assert row["timestamp"] == row["created_at"]
    assert {name: row[name] for name in holds} == holds


def test_a_query_that_is_too_long_is_refused(collector: Collector, visitor: str) -> None:
    answer = look(collector, {"site": "shop", "visitorId": visitor, "url": "x" * 9_000})
    assert answer.status == 414
    assert not collector.rows(visitor)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_another_method_is_refused(collector: Collector, visitor: str, method: str) -> None:
    answer = look(collector, {"site": "shop", "visitorId": visitor}, method=method)
    assert answer.status == 405
    assert answer.json["error"]
    assert not collector.rows(visitor)


def test_a_look_that_names_no_site_is_kept_in_the_quarantine(collector: Collector, visitor: str) -> None:
    def found() -> Any:
        assert look(collector, {"visitorId": visitor}).status == 400
        return collector.conn.execute(
            "SELECT kind, reason FROM quarantine WHERE position(%s in content) > 0 LIMIT 1", (visitor.encode(),)
        ).fetchone()

    assert wait_for(found, "the quarantine") == ("event", "siteId is missing")


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.lists(st.tuples(st.sampled_from(["url", "sessionId", "x"]) | st.text(max_size=5), st.binary(max_size=30)))
)
def test_whatever_is_said_in_bytes_a_look_is_stored(collector: Collector, fields: list[tuple[str, bytes]]) -> None:
    visitor = uuid4().hex
    said = "&".join(f"{quote_from_bytes(name.encode())}={quote_from_bytes(value)}" for name, value in fields)
    answer = look(collector, f"site=shop&visitorId={visitor}&{said}"[:4_000])
    assert (answer.status, answer.body) == (200, PIXEL)
    assert len(collector.rows(visitor)) == 1
