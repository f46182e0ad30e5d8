"""What /collect refuses: with the right status and reason, nothing stored, never a 500."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any
from uuid import uuid4

import pytest
from conftest import Answer, Collector, http, raw_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LIMIT = 32768
EVENTS = 100
SHOP = "https://shop.example.com"


@pytest.fixture
def visitor() -> str:
    """A visitor of the test's own, to find its rows by."""
    return uuid4().hex


def event(visitor: str, **fields: Any) -> dict[str, Any]:
    return {"eventType": "pageview", "siteId": "shop", "visitorId": visitor, **fields}


def stored(collector: Collector) -> int:
    row = collector.conn.execute("SELECT count(*) FROM events_log").fetchone()
    assert row
    return int(row[0])


@pytest.fixture
def stores_nothing(collector: Collector) -> Iterator[None]:
    before = stored(collector)
    yield
    assert stored(collector) == before


def assert_refused(answer: Answer, status: int) -> None:
    assert answer.status == status
    assert answer.headers.get_content_type() == "application/json"
    assert answer.json["error"]


# ---- who may send


@pytest.mark.parametrize("origin", [SHOP, "https://m.example.com:8443", "HTTPS://Shop.Example.com"])
def test_a_page_of_the_site_may_send_and_read_the_answer(collector: Collector, visitor: str, origin: str) -> None:
    answer = collector.post(event(visitor), headers={"Origin": origin})
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert "Origin" in answer.headers["Vary"]
    assert len(collector.rows(visitor)) == 1


def test_a_program_that_names_no_origin_may_send(collector: Collector, visitor: str) -> None:
    answer = collector.post(event(visitor))
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] is None
    assert "Origin" in answer.headers["Vary"]


STRANGERS = [
    "https://evil.example",
    "http://shop.example.com",
    "https://shop.example.com.evil.example",
    "https://shop.example.com:444",
    "https://xshop.example.com",
    "https://sub.shop.example.com",
    "https://shop.example.com@evil.example",
    "null",
    "*",
]


@pytest.mark.parametrize("origin", STRANGERS)
@pytest.mark.usefixtures("stores_nothing")
def test_a_page_of_another_origin_is_refused_and_cannot_read_the_answer(collector: Collector, origin: str) -> None:
    answer = collector.post([event("v"), event("v")], headers={"Origin": origin})
    assert_refused(answer, 403)
    assert answer.headers["Access-Control-Allow-Origin"] is None
    assert "Origin" in answer.headers["Vary"]


@pytest.mark.usefixtures("stores_nothing")
def test_a_page_of_one_site_may_not_send_events_of_another(collector: Collector) -> None:
    for payload in (event("v", siteId="blog"), {**event("v", eventType="batch", siteId="blog"), "events": []}):
        assert_refused(collector.post(payload, headers={"Origin": SHOP}), 403)


@pytest.mark.parametrize("site", ["nowhere", "SHOP", "shop.", "demo", "*"])
@pytest.mark.usefixtures("stores_nothing")
def test_events_of_an_unknown_site_alone_are_refused(collector: Collector, site: str) -> None:
    assert_refused(collector.post([event("v", siteId=site)]), 400 if site == "*" else 403)


@pytest.mark.parametrize(
    ("origin", "allowed"), [(SHOP, True), ("https://blog.example.com", True), ("https://evil.example", False)]
)
def test_a_preflight_tells_a_browser_whether_its_page_may_send(
    collector: Collector, origin: str, *, allowed: bool
) -> None:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    answer = http(collector.box, "OPTIONS", "/collect", headers=asked)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == (origin if allowed else None)
    assert answer.headers["Access-Control-Allow-Methods"] == "POST"
    assert answer.headers["Access-Control-Allow-Headers"].lower() == "content-type, content-encoding"
    assert answer.headers["Access-Control-Allow-Credentials"] is None
    assert "Origin" in answer.headers["Vary"]


def test_a_page_can_read_why_it_was_refused(collector: Collector) -> None:
    for payload, status in [(b"{", 400), (b"x" * (LIMIT + 1), 413)]:
        answer = collector.post(payload, headers={"Origin": SHOP})
        assert_refused(answer, status)
        assert answer.headers["Access-Control-Allow-Origin"] == SHOP


# ---- what may be sent

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "half an object": b'{"eventType": "pageview"',
    "trailing garbage": json.dumps(event("v")).encode() + b"x",
    "two values": json.dumps(event("v")).encode() * 2,
    "NaN": json.dumps(event("v", n=float("nan"))).encode(),
    "Infinity": json.dumps(event("v", n=float("-inf"))).encode(),
    "1e999": json.dumps(event("v")).encode()[:-1] + b', "n": 1e999}',
    "an integer of 5,000 digits": json.dumps(event("v")).encode()[:-1] + b', "n": ' + b"7" * 5000 + b"}",
    "UTF-16": json.dumps(event("v")).encode("utf-16"),
    "Latin-1": '{"eventType": "é"}'.encode("latin-1"),
    "deep lists": json.dumps(event("v")).encode()[:-1] + b', "n": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a number": b"1",
    "a text": b'"pageview"',
    "null": b"null",
    "no events": b"[]",
    "no event among the events": b"[null, 1, {}]",
    "an event without a site": b'{"eventType": "pageview"}',
    "an event without a type": b'{"siteId": "shop"}',
    "binary": bytes(range(256)) * 10,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.usefixtures("stores_nothing")
def test_a_body_that_holds_no_event_is_refused_with_a_reason(collector: Collector, body: bytes) -> None:
    for media in ("application/json", "text/plain"):
        assert_refused(collector.post(body, media=media), 400)


MEDIA = [
    None,
    "",
    "text/html",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "json",
    "text/plainx",
]


@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.usefixtures("stores_nothing")
def test_another_media_type_is_refused(collector: Collector, media: str | None) -> None:
    assert_refused(collector.post(event("v"), media=media), 415)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
@pytest.mark.usefixtures("stores_nothing")
def test_another_method_is_refused(collector: Collector, method: str) -> None:
    answer = http(collector.box, method, "/collect", json.dumps(event("v")).encode(), {"Content-Type": "text/plain"})
    assert answer.status == 405
    assert "POST" in answer.headers["Allow"]


# ---- how much may be sent


def padded(visitor: str, size: int) -> bytes:
    bare = len(json.dumps(event(visitor, pad="")))
    return json.dumps(event(visitor, pad="x" * (size - bare))).encode()


def chunks(body: bytes) -> Iterator[bytes]:
    return (body[n : n + 1000] for n in range(0, len(body), 1000))


SENDINGS: dict[str, Callable[[bytes], bytes | Iterator[bytes]]] = {"whole": lambda body: body, "chunked": chunks}


@pytest.mark.parametrize("sending", SENDINGS.values(), ids=SENDINGS)
def test_a_body_may_be_as_large_as_allowed_and_not_one_byte_more(
    collector: Collector, visitor: str, sending: Callable[[bytes], bytes | Iterator[bytes]]
) -> None:
    assert collector.post(sending(padded(visitor, LIMIT))).status == 200
    assert_refused(collector.post(sending(padded(visitor, LIMIT + 1))), 413)
    (row,) = collector.rows(visitor)
    assert len(json.dumps(row["raw_event_data"])) == LIMIT


@pytest.mark.usefixtures("stores_nothing")
def test_json_that_ends_within_the_limit_does_not_smuggle_a_larger_body_in(collector: Collector) -> None:
    body = json.dumps(event("v")).encode() + b" " * LIMIT
    assert_refused(collector.post(chunks(body)), 413)
    assert_refused(collector.post(body), 413)


def test_a_request_may_hold_as_many_events_as_allowed_and_not_one_more(collector: Collector, visitor: str) -> None:
    assert collector.post([event(visitor)] * EVENTS).json["accepted"] == EVENTS
    too_many = [event(visitor)] * (EVENTS + 1)
    assert_refused(collector.post(too_many), 413)
    assert_refused(collector.post({**event(visitor, eventType="batch"), "events": too_many}), 413)
    assert len(collector.rows(visitor)) == EVENTS


@pytest.mark.parametrize("refused", [b"x" * 30_000, b"x" * 200_000], ids=["small", "too large"])
@pytest.mark.parametrize("media", ["image/png", "text/plain"])
def test_what_is_left_of_a_refused_body_is_not_taken_for_the_next_request(
    collector: Collector, visitor: str, refused: bytes, media: str
) -> None:
    with closing(HTTPConnection("127.0.0.1", collector.box.port, timeout=30)) as connection:
        for body, kind in [(refused, media), (json.dumps(event(visitor)).encode(), "text/plain")]:
            connection.request("POST", "/collect", body, {"Content-Type": kind})
            answer = connection.getresponse()
            answer.read()
    assert answer.status == 200
    assert len(collector.rows(visitor)) == 1


# ---- bytes that no HTTP library sends


HEAD = b"POST /collect HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: text/plain\r\n"
ONE = json.dumps(event("v")).encode()
RAW: dict[str, bytes] = {
    "a body shorter than it claims": HEAD + b"Content-Length: %d\r\n\r\n" % (len(ONE) + 10) + ONE,
    "no body though it claims one": HEAD + b"Content-Length: 10\r\n\r\n",
    "a length that is no number": HEAD + b"Content-Length: ten\r\n\r\n" + ONE,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + ONE,
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: %d\r\n\r\n" % len(ONE) + ONE,
    "a length and chunks": HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk whose size is no number": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + ONE + b"\r\n0\r\n\r\n",
    "chunks that end too soon": HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(ONE) + ONE + b"\r\n",
    "a chunk that ends too soon": HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (len(ONE) + 9) + ONE,
}


@pytest.mark.parametrize("request_bytes", RAW.values(), ids=RAW)
@pytest.mark.usefixtures("stores_nothing")
def test_a_request_that_is_broken_is_refused(collector: Collector, request_bytes: bytes) -> None:
    assert raw_status(collector.box, request_bytes) == 400


AGENTS = {
    "NUL": b"a\x00b",
    "UTF-8": "Bröwser/😀".encode(),
    "Latin-1": b"Br\xf6wser",
    "long": b"x" * 7000,
    "control": b"a\x01b",
}


@pytest.mark.parametrize("agent", AGENTS.values(), ids=AGENTS)
def test_a_strange_user_agent_is_stored_or_refused_but_never_an_error(
    collector: Collector, visitor: str, agent: bytes
) -> None:
    body = json.dumps(event(visitor)).encode()
    status = raw_status(
        collector.box, HEAD + b"User-Agent: %s\r\nContent-Length: %d\r\n\r\n" % (agent, len(body)) + body
    )
    assert (status, len(collector.rows(visitor))) in {(200, 1), (400, 0)}


# ---- anything at all

names = st.sampled_from(
    [
        "eventType",
        "siteId",
        "eventId",
        "sessionId",
        "visitorId",
        "timestamp",
        "sentAt",
        "url",
        "path",
        "events",
        "_batch",
    ]
)
words = st.sampled_from(["batch", "shop", "pageview", "http://[", "2026-03-01T00:00:00", str(uuid4())])
texts = words | st.text(st.characters(codec=None), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(names | texts, inner, max_size=8),
    max_leaves=25,
)
likely = st.fixed_dictionaries(
    {"eventType": words, "siteId": st.just("shop")}, optional={"events": values, "url": values}
)
payloads = likely | st.lists(likely | values, max_size=5) | values
bodies = st.binary(max_size=200) | payloads.map(lambda value: json.dumps(value).encode())


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=bodies, media=st.sampled_from(["application/json", "text/plain; charset=x"]))
def test_whatever_is_sent_is_stored_or_refused_and_never_an_error(
    collector: Collector, body: bytes, media: str
) -> None:
    before = stored(collector)
    answer = collector.post(body, media=media)
    assert answer.status in {200, 400, 403}
    if answer.status == 200:
        assert answer.json["accepted"] <= stored(collector) - before <= answer.json["accepted"] + 1
    else:
        assert answer.json["error"]
        assert stored(collector) == before


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(values, min_size=1, max_size=5))
def test_an_event_that_is_well_formed_but_for_its_values_is_always_stored(
    collector: Collector, values: list[Any]
) -> None:
    fields = ["sessionId", "timestamp", "url", "path", "anything"]
    one = event("v", sentAt=values[0], **dict(zip(fields, values, strict=False)))
    try:
        body = json.dumps(one, allow_nan=False).encode()
    except ValueError:
        return
    answer = collector.post(body)
    assert (answer.status, answer.json["accepted"]) == (200, 1)
