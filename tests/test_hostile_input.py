"""Whatever is sent: bad input costs itself at most, never a good neighbour, an error of ours, or a clean log."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import Collector, http, make_settings, raw_status, wait_for
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from appliance.runtime import Runtime, create_app

LIMIT = 32_768
EVENTS = 100
MAX_LINE_CHARS = 4_000
# Stands in every body and query string of this file, and must never stand in the log.
MARKER = "qzmarkerqz"
ARRIVAL = object()
"""The time of arrival."""


def visitor_id() -> str:
    return f"{MARKER}-{uuid4().hex}"


# ---- the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An input. GOOD in its body stands for a good neighbour, VISITOR for a visitor of the test's own.

    `rows` of it are stored beside the neighbour. `holds` is what stands in one of them, by column or, with a dot in
    front, by key of the raw data.
    """

    body: str
    status: int = 200
    rows: int = 0
    holds: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    pack: Callable[[bytes], bytes | Iterator[bytes]] = bytes


def event(fields: str = "") -> str:
    return '{"eventType": "odd", "siteId": "shop", "visitorId": "VISITOR"' + (fields and f", {fields}") + "}"


def stored(fields: str, **holds: Any) -> Case:
    """An odd event that is stored, and what stands there."""
    return Case(
        body=f"[GOOD, {event(fields)}]", rows=1, holds={name.replace("raw_", "."): holds[name] for name in holds}
    )


def refused(one: str) -> Case:
    """An event that is refused while its neighbours are stored."""
    return Case(body=f"[GOOD, {one}, GOOD]")


def unread(body: str, status: int = 400, **fields: Any) -> Case:
    """A body of which nothing is stored."""
    return Case(body=body, status=status, **fields)


def recoded(encoding: str) -> Callable[[bytes], bytes]:
    return lambda body: body.decode().encode(encoding)


def chunks(body: bytes) -> Iterator[bytes]:
    return (body[n : n + 700] for n in range(0, len(body), 700))


def padded(size: int) -> Callable[[bytes], bytes]:
    return lambda body: body + b" " * (size - len(body))


ZIPPED = {"Content-Encoding": "gzip"}
DEEP = "[" * 70 + "]" * 70
TIMES = {
    "a date before Christ": '"-0044-03-15T12:00:00Z"',
    "the first of all days, far east": '"0001-01-01T00:00:00+14:00"',
    "the last of all days, far west": '"9999-12-31T23:59:59-14:00"',
    "a date beyond PostgreSQL's": '"294277-01-01T00:00:00Z"',
    "a day that never was": '"2026-02-30T00:00:00Z"',
    "a leap second": '"2016-12-31T23:59:60Z"',
    "a word that PostgreSQL takes for a time": '"infinity"',
    "another such word": '"epoch"',
    "a zone that is none": '"2026-03-01T00:00:00+99:99"',
    "a number beyond all years": "1e300",
    "an integer beyond floats": "1" + "0" * 400,
    "a negative number": "-62135596801",
    "an empty time": '""',
    "a time that is an object": '{"$date": 0}',
    "a time with NUL": '"2026-03-01T00:00:00\\u0000Z"',
}

CASES: dict[str, Case] = {
    # what is odd and stored
    "a key twice": stored('"n": 1, "n": 2', raw_n=2),
    "the type twice": stored('"eventType": "odder"', event_type="odder", raw_eventType="odder"),
    "the site twice": stored('"siteId": "blog"', site_id="blog"),
    "NUL in a value": stored(r'"n": "a\u0000b"', raw_n="a\ufffdb"),
    "NUL in a key": stored(r'"a\u0000b": 1', **{"raw_a\ufffdb": 1}),
    "NUL in a column": stored(r'"url": "/\u0000", "sessionId": "\u0000"', url="/\ufffd", session_id="\ufffd"),
    "NUL in the type": stored(r'"eventType": "o\u0000"', event_type="o\ufffd"),
    "a lone high surrogate": stored(r'"n": ["\ud83d"], "path": "\ud83d"', raw_n=["\ufffd"], path="\ufffd"),
    "a lone low surrogate in a key": stored(r'"\ude00": {"\ude00": 1}', **{"raw_\ufffd": {"\ufffd": 1}}),
    "surrogates in the wrong order": stored(r'"n": "\ude00\ud83d"', raw_n="\ufffd\ufffd"),
    "a surrogate pair": stored(r'"n": "\ud83d\ude00"', raw_n="\U0001f600"),
    "what only looks like an escape": stored(r'"n": "\\u0000"', raw_n="\\u0000"),
    "other control characters": stored(r'"url": "\u0001\u001f\u007f\u0085"', url="\x01\x1f\x7f\x85"),
    "no characters": stored(r'"n": "\uffff\ufdd0"', raw_n="\uffff\ufdd0"),
    "2^53 + 1": stored('"n": 9007199254740993', raw_n=2**53 + 1),
    "2^64": stored('"n": 18446744073709551616', raw_n=2**64),
    "an integer of 4,000 digits": stored('"n": ' + "7" * 4000, raw_n=int("7" * 4000)),
    "a negative integer of 400 digits": stored('"n": -' + "7" * 400, raw_n=-int("7" * 400)),
    "the largest float": stored('"n": 1.7976931348623157e308', raw_n=17976931348623157 * 10**292),
    "a float that is almost nothing": stored('"n": 5e-324', raw_n=5e-324),
    "a float that is nothing": stored('"n": 1e-999', raw_n=0.0),
    "minus nothing": stored('"n": -0.0', raw_n=0.0),
    **{name: stored(f'"timestamp": {text}, "sentAt": {text}', timestamp=ARRIVAL) for name, text in TIMES.items()},
    "a type that is too long": stored(f'"eventType": "{"ü" * 51}"', event_type="ü" * 50, raw_eventType="ü" * 51),
    "a session that is too long": stored(
        f'"sessionId": "{"x" * 9000}"', session_id="x" * 100, raw_sessionId="x" * 9000
    ),
    "a path that is too long": stored(f'"path": "{"/x" * 400}"', path="/x" * 250, raw_path="/x" * 400),
    "a URL of 20,000 characters": stored(f'"url": "/{"x" * 20_000}"', url="/" + "x" * 20_000, path="/" + "x" * 499),
    "an impossible URL": stored('"url": "http://[::1"', url="http://[::1", path=None),
    "a URL of characters that become others": stored('"url": "http://ex\u2100mple/x"', path=None),
    "a column that is a list": stored('"url": ["x"], "path": {"a": 1}', url=None, path=None, raw_url=["x"]),
    "a session that is no text": stored('"sessionId": 1e2', session_id="100.0", raw_sessionId=100),
    "a session that is true": stored('"sessionId": true', session_id="true", raw_sessionId=True),
    "columns that are null": stored('"sessionId": null, "url": null', session_id=None, url=None),
    "fields that nobody knows": stored('"a": {"b": [null, {}]}, "_batch": 7', raw_a={"b": [None, {}]}, raw__batch=7),
    "an empty key": stored('"": {"": ""}', raw_={"": ""}),
    "a key of 9,000 characters": stored(f'"{"k" * 9000}": 1', **{"raw_" + "k" * 9000: 1}),
    "keys that scripts fear": stored(
        '"__proto__": {"a": 1}, "$gt": ""', **{"raw_" + "__proto__": {"a": 1}, "raw_$gt": ""}
    ),
    "a thousand fields": stored(", ".join(f'"f{n}": {n}' for n in range(1000)), raw_f999=999),
    "a thousand empty lists": stored(f'"n": [{", ".join(["[]"] * 1000)}]', raw_n=[[]] * 1000),
    "as deep as allowed": stored('"n": ' + "[" * 62 + "]" * 62),
    "what COPY takes for NULL": stored(r'"url": "\\N", "sessionId": "\\N"', url="\\N", session_id="\\N"),
    "what COPY takes for the end": stored(r'"url": "\\.\n\\.\n", "n": "\t\\"', url="\\.\n\\.\n", raw_n="\t\\"),
    "SQL": stored("""\"path": "'); DROP TABLE events_log; --\"""", path="'); DROP TABLE events_log; --"),
    "markup": stored('"url": "<script>alert(1)</script>"', url="<script>alert(1)</script>"),
    "a mark in the middle": stored('"n": "\ufeff"', raw_n="\ufeff"),
    "an id that is a number": stored('"eventId": 1e3', raw_eventId=1000),
    "an id that is a list": stored('"eventId": [1, {"a": null}]', raw_eventId=[1, {"a": None}]),
    "an id of nothing but NUL": stored(r'"eventId": "\u0000"', raw_eventId="\ufffd"),
    "an id of 9,000 characters": stored(f'"eventId": "{"e" * 9000}"', raw_eventId="e" * 9000),
    "a batch within an array": stored('"eventType": "batch", "events": [1]', event_type="batch", raw_events=[1]),
    "white space all around": Case(body=f"\r\n\t [ GOOD ,\n{event()} ] \t", rows=1),
    "JSON that says it is UTF-16": Case(
        body=f"[GOOD, {event()}]", rows=1, headers={"Content-Type": "application/json; charset=utf-16"}
    ),
    "a type with absurd parameters": Case(
        body=f"[GOOD, {event()}]", rows=1, headers={"Content-Type": "text/plain; charset*=utf-8''%ff; a*9=; =;"}
    ),
    "addresses that are none": Case(
        body=f"[GOOD, {event()}]",
        rows=1,
        headers={"X-Forwarded-For": "x" * 5000, "Forwarded": 'for="' * 500},
        holds={"ip_address": "127.0.0.1"},
    ),
    "a browser with a long name": Case(body="[GOOD]", headers={"User-Agent": "x" * 7000}),
    # envelopes
    "an envelope with a number beyond floats": Case(
        body=f'{{"eventType": "batch", "n": 1e999, "events": [GOOD, {event()}]}}',
        rows=1,
        holds={"._batch": {"eventType": "batch", "n": "(the number 1e999 is too large)"}},
    ),
    "an envelope that is too deep": Case(
        body=f'{{"eventType": "batch", "n": {DEEP}, "events": [GOOD, {event()}]}}', rows=1
    ),
    "an envelope that is odd all over": Case(
        body='{"eventType": "batch", "siteId": [], "url": {}, "sentAt": [], "eventId": {}, "events":'
        f" [GOOD, {event()}]}}",
        rows=1,
    ),
    "an envelope of a site that is none": Case(
        body='{"eventType": "batch", "siteId": "../..", "events": [GOOD, {"eventType": "odd"}]}'
    ),
    "an envelope with events that are none": Case(
        body='{"eventType": "batch", "siteId": "shop", "events": [GOOD, null, [], "x", 1e999, {"events": []}]}'
    ),
    "an envelope with an envelope in it": Case(
        body='{"eventType": "batch", "siteId": "shop", "visitorId": "VISITOR", "events":'
        ' [GOOD, {"eventType": "batch", "events": [{"eventType": "odd"}]}]}',
        rows=1,
        holds={"event_type": "batch", ".events": [{"eventType": "odd"}]},
    ),
    "an envelope whose events are no list": Case(
        body='{"eventType": "batch", "siteId": "shop", "visitorId": "VISITOR", "events": {"0": {}}}',
        rows=1,
        holds={".events": {"0": {}}},
    ),
    "an envelope in an envelope that is nothing": Case(
        body='{"eventType": "batch", "siteId": "shop", "visitorId": "VISITOR", "n": 1e999, "events": []}',
        rows=1,
        holds={".events": [], ".n": "(the number 1e999 is too large)"},
    ),
    # what is refused event by event
    "null": refused("null"),
    "a number": refused("1"),
    "a text": refused(f'"{MARKER}"'),
    "an array in the array": refused(f"[{event()}]"),
    "an empty object": refused("{}"),
    "no site": refused('{"eventType": "odd", "visitorId": "VISITOR"}'),
    "no type": refused('{"siteId": "shop", "visitorId": "VISITOR"}'),
    "a type that is null": refused(event('"eventType": null')),
    "a type that is a list": refused(event('"eventType": ["odd"]')),
    "a blank type": refused(event('"eventType": " \\t\\n"')),
    "a site that is null": refused(event('"siteId": null')),
    "a site that is a number": refused(event('"siteId": 7')),
    "an empty site": refused(event('"siteId": ""')),
    "a site with a slash": refused(event('"siteId": "../shop"')),
    "a site with a line break": refused(event('"siteId": "shop\\n"')),
    "a site with NUL": refused(event('"siteId": "shop\\u0000"')),
    "a site in other letters": refused(event('"siteId": "ѕhop"')),  # noqa: RUF001 - that is the point
    "a site of 101 characters": refused(event(f'"siteId": "{"s" * 101}"')),
    "the star": refused(event('"siteId": "*"')),
    "a site that nobody configured": refused(event('"siteId": "nowhere"')),
    "a site whose pages alone may send": refused(event('"siteId": "strict"')),
    "1e999": refused(event('"n": 1e999')),
    "-1e999 in an id": refused(event('"eventId": [-1e999]')),
    "an integer of 5,000 digits": refused(event('"n": ' + "9" * 5000)),
    "a time of 5,000 digits": refused(event('"timestamp": -' + "9" * 5000)),
    "lists nested too deeply": refused(event(f'"n": {DEEP}')),
    "objects nested too deeply": refused(event('"n": ' + '{"a":' * 70 + "1" + "}" * 70)),
    # what cannot be read at all
    "nothing": unread(""),
    "white space": unread(" \r\n\t"),
    "NaN": unread("[GOOD, NaN]"),
    "Infinity": unread('[GOOD, {"n": Infinity}]'),
    "-Infinity": unread('[GOOD, {"n": -Infinity}]'),
    "two values": unread("GOOD GOOD"),
    "two values on two lines": unread("GOOD\nGOOD\n"),
    "garbage behind": unread("[GOOD]]"),
    "a comma too many": unread("[GOOD,]"),
    "a comma too few": unread("[GOOD GOOD]"),
    "a comment": unread("[GOOD] // x"),
    "single quotes": unread("[GOOD, {'eventType': 'odd'}]"),
    "a key without quotes": unread("[GOOD, {eventType: 1}]"),
    "a leading zero": unread('[GOOD, {"n": 01}]'),
    "a plus": unread('[GOOD, {"n": +1}]'),
    "a hexadecimal number": unread('[GOOD, {"n": 0x10}]'),
    "half a number": unread('[GOOD, {"n": 1.}]'),
    "an unknown escape": unread(r'[GOOD, {"n": "\x00"}]'),
    "half an escape": unread(r'[GOOD, {"n": "\u12"}]'),
    "a raw NUL": unread('[GOOD, {"n": "\x00"}]'),
    "a raw line break": unread('[GOOD, {"n": "\n"}]'),
    "NUL behind": unread("[GOOD]\x00"),
    "half of it": unread("[GOOD, {"),
    "a number alone": unread("7"),
    "a text alone": unread(f'"{MARKER}"'),
    "null alone": unread("null"),
    "no events": unread("[]"),
    "a mark in front": unread("\ufeff[GOOD]"),
    "UTF-16": unread("[GOOD]", pack=recoded("utf-16")),
    "UTF-16 without a mark": unread("[GOOD]", pack=recoded("utf-16-le")),
    "UTF-32": unread("[GOOD]", pack=recoded("utf-32")),
    "Latin-1": unread('[GOOD, "é"]', pack=recoded("latin-1")),
    "a surrogate in UTF-8": unread('[GOOD, "\ud800"]'),
    "an overlong slash": unread('[GOOD, "X"]', pack=lambda body: body.replace(b"X", b"\xc0\xaf")),
    "a form": unread(f"eventType=odd&siteId=shop&visitorId={MARKER}"),
    "XML": unread('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>'),
    "30,000 lists": unread("[" * 15_000 + "]" * 15_000),
    "30,000 lists that never end": unread("[" * 30_000),
    # how much
    "as large as allowed": Case(body="[GOOD]", pack=padded(LIMIT)),
    "as large as allowed, in chunks": Case(body="[GOOD]", pack=lambda body: chunks(padded(LIMIT)(body))),
    "a byte too large": unread("[GOOD]", 413, pack=padded(LIMIT + 1)),
    "a byte too large, in chunks": unread("[GOOD]", 413, pack=lambda body: chunks(padded(LIMIT + 1)(body))),
    "ten times too large": unread("[GOOD]", 413, pack=padded(LIMIT * 10)),
    "larger than what is read at all": unread("[GOOD]", 413, pack=padded(2 * 1024 * 1024)),
    "as many events as allowed": Case(body=f"[GOOD, {', '.join([event()] * (EVENTS - 1))}]", rows=EVENTS - 1),
    "an event too many": unread(f"[GOOD, {', '.join([event()] * EVENTS)}]", 413),
    "an event too many in an envelope": unread(
        f'{{"eventType": "batch", "siteId": "shop", "events": [GOOD, {", ".join(["0"] * EVENTS)}]}}', 413
    ),
    "gzip": Case(body="[GOOD]", headers=ZIPPED, pack=gzip.compress),
    "gzip in capitals": Case(body="[GOOD]", headers={"Content-Encoding": " GZip "}, pack=gzip.compress),
    "gzip in chunks": Case(body="[GOOD]", headers=ZIPPED, pack=lambda body: chunks(gzip.compress(body, 0))),
    "gzip of as much as allowed": Case(
        body="[GOOD]", headers=ZIPPED, pack=lambda body: gzip.compress(padded(LIMIT)(body))
    ),
    "gzip of a byte more": unread("[GOOD]", 413, headers=ZIPPED, pack=lambda b: gzip.compress(padded(LIMIT + 1)(b))),
    "a bomb": unread("[GOOD]", 413, headers=ZIPPED, pack=lambda body: gzip.compress(padded(20_000_000)(body))),
    "a bomb in a bomb": unread(
        "[GOOD]", headers=ZIPPED, pack=lambda body: gzip.compress(gzip.compress(padded(20_000_000)(body)))
    ),
    "gzip that is cut off": unread("[GOOD]", headers=ZIPPED, pack=lambda body: gzip.compress(body)[:-3]),
    "gzip with a wrong checksum": unread(
        "[GOOD]", headers=ZIPPED, pack=lambda body: gzip.compress(body)[:-8] + b"8" * 8
    ),
    "gzip with garbage behind": unread("[GOOD]", headers=ZIPPED, pack=lambda body: gzip.compress(body) + b"x"),
    "two gzip files": unread("[GOOD]", headers=ZIPPED, pack=lambda body: gzip.compress(body) * 2),
    "gzip of nothing": unread("", headers=ZIPPED, pack=gzip.compress),
    "no gzip though it says so": unread("[GOOD]", headers=ZIPPED),
    "gzip though it does not say so": unread("[GOOD]", pack=gzip.compress),
    "deflate": unread("[GOOD]", 415, headers={"Content-Encoding": "deflate"}, pack=zlib.compress),
    "gzip twice": unread("[GOOD]", 415, headers={"Content-Encoding": "gzip, gzip"}, pack=gzip.compress),
    "identity": Case(body="[GOOD]", headers={"Content-Encoding": "identity"}),
    # of what kind, and from where
    "HTML": unread("[GOOD]", 415, headers={"Content-Type": "text/html"}),
    "a type of two": unread("[GOOD]", 415, headers={"Content-Type": "application/json, text/plain"}),
    "an empty type": unread("[GOOD]", 415, headers={"Content-Type": ""}),
    "a type beyond ASCII": unread("[GOOD]", 415, headers={"Content-Type": "text/plain\xa0"}),
    "a stranger's page": unread("[GOOD]", 403, headers={"Origin": f"https://{MARKER}.example"}),
    "a page that hides itself": unread("[GOOD]", 403, headers={"Origin": "null"}),
    "an empty origin": unread("[GOOD]", 403, headers={"Origin": ""}),
    "an origin beyond ASCII": unread("[GOOD]", 403, headers={"Origin": "https://shop.example.com\xe9"}),
}


def value_of(row: Mapping[str, Any], name: str) -> Any:
    value = row["raw_event_data"][name[1:]] if name.startswith(".") else row[name]
    return str(value) if name == "ip_address" else value


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_odd_input_costs_itself_at_most(collector: Collector, case: Case) -> None:
    visitor = visitor_id()
    good = json.dumps({"eventType": "good", "siteId": "shop", "visitorId": visitor})
    body = case.body.replace("GOOD", good).replace("VISITOR", visitor).encode("utf-8", "surrogatepass")
    answer = collector.post(case.pack(body), headers=case.headers)
    rows = collector.rows(visitor)
    others = [row for row in rows if row["event_type"] != "good"]
    assert answer.status == case.status
    assert len(others) == case.rows
    assert len(rows) - len(others) == (case.body.count("GOOD") if answer.status == 200 else 0)
    if answer.status == 200:
        assert answer.json["accepted"] == len(rows)
        assert all(rejection["reason"] for rejection in answer.json["rejected"])
    else:
        assert answer.json["error"]
    for name, value in case.holds.items():
        assert value_of(others[0], name) == (others[0]["created_at"] if value is ARRIVAL else value)


def test_the_table_names_many_inputs() -> None:
    assert len(CASES) > 150


# ---- anything at all

names = st.sampled_from(
    ["eventType", "siteId", "eventId", "sessionId", "visitorId", "timestamp", "url", "path", "_batch"]
)
words = st.sampled_from(["batch", "shop", "blog", "nowhere", "good", "http://[", "2026-03-01T00:00:00", MARKER])
texts = words | st.text(st.characters(codec=None), max_size=20)
# What Python would not write by itself.
literals = st.sampled_from(
    ["1e999", "-1E999", "9" * 5000, "1" * 309, "-0", "1e-999", DEEP, '"\\u0000"', '"\\ud800"', "{}"]
)


def as_object(fields: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in fields) + "}"


json_texts = st.recursive(
    (st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts).map(
        json.dumps
    )
    | literals,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(names | texts, inner), max_size=8).map(as_object)
    ),
    max_leaves=12,
)
metadata = st.lists(
    st.tuples((names | texts).filter(lambda name: name not in {"eventType", "events"}), json_texts), max_size=4
)
anything = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@anything
@given(before=st.lists(json_texts, max_size=3), after=st.lists(json_texts, max_size=3), envelope=st.none() | metadata)
def test_a_good_event_among_whatever_else_is_stored(
    collector: Collector, before: list[str], after: list[str], envelope: list[tuple[str, str]] | None
) -> None:
    visitor = visitor_id()
    good = json.dumps({"eventType": "good", "siteId": "shop", "visitorId": visitor, "sent": visitor})
    events = f"[{', '.join([*before, good, *after])}]"
    body = events if envelope is None else as_object([*envelope, ("eventType", '"batch"'), ("events", events)])
    assume(len(body) <= LIMIT)
    answer = collector.post(body.encode())
    assert answer.status == 200
    assert [row["raw_event_data"]["sent"] for row in collector.rows(visitor)] == [visitor]


@anything
@given(
    body=st.binary(max_size=500) | json_texts.map(str.encode) | st.binary(max_size=100).map(gzip.compress),
    media=st.sampled_from(["application/json", "text/plain", "text/html", ""]) | st.text("abc/;= \xe9", max_size=20),
    encoding=st.sampled_from([None, "gzip", "identity", "br"]),
    cut=st.integers(min_value=0, max_value=600),
)
def test_whatever_bytes_are_sent_are_answered_in_json_and_never_an_error_of_ours(
    collector: Collector, body: bytes, media: str, encoding: str | None, cut: int
) -> None:
    headers = {"Content-Encoding": encoding} if encoding else {}
    for part in (body, body[:cut]):
        answer = collector.post(part[:LIMIT], media=media, headers=headers)
        assert answer.status in {200, 400, 403, 415}
        assert answer.headers.get_content_type() == "application/json"
        assert answer.json


HEADERS = """
Accept Accept-Encoding Connection Content-Encoding Content-Length Content-Type Cookie DNT Expect Forwarded Host If-Match
If-Modified-Since If-None-Match If-Range If-Unmodified-Since Keep-Alive Origin PATH_INFO Range Referer REMOTE_USER
SCRIPT_NAME Sec-GPC TE Trailer Transfer-Encoding Upgrade User-Agent X-Forwarded-For X-Forwarded-Proto X-Forwarded-Ssl
"""
VALUES = [
    "gzip",
    "chunked",
    "100-continue",
    "close",
    "https",
    "on",
    "1",
    "bytes=0-",
    '"x"',
    "W/",
    "for=",
    "x" * 5000,
    "/",
]
DATE = "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"
header_names = st.sampled_from(HEADERS.split()) | st.text("abc-_:( \xe9", max_size=8)
header_values = st.sampled_from(
    [*VALUES, DATE, "application/json; charset=\xff", "https://shop.example.com"]
) | st.binary(max_size=40).map(lambda value: value.decode("latin-1"))
headers_of_any_kind = st.lists(st.tuples(header_names, header_values), max_size=4)


def head(method: str, target: str, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


@anything
@given(headers=headers_of_any_kind)
def test_whatever_headers_come_with_it_an_event_is_stored_or_its_sender_told_why_not(
    collector: Collector, headers: list[tuple[str, str]]
) -> None:
    visitor = visitor_id()
    body = json.dumps({"eventType": "good", "siteId": "shop", "visitorId": visitor}).encode()
    usual = [("Host", "x"), ("Connection", "close"), ("Content-Type", "text/plain"), ("Content-Length", str(len(body)))]
    status = raw_status(collector.box, head("POST", "/collect", [*usual, *headers]) + body)
    assert status in {200, 400, 403, 413, 415, 417, 431, 501}
    assert len(collector.rows(visitor)) == (status == 200)


targets = st.sampled_from(
    ["/collect", "/pixel.gif", "/tracking.js", "/health/live", "/", "//", "/admin", "/demo/", "*", "http://x/collect"]
) | st.text("/.%0aé\x7f?#[]:@", max_size=12).map(lambda text: f"/{text}")


@anything
@given(
    method=st.sampled_from(["GET", "HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT", "PATCH", "PRI", "get", "G\xe9T"]),
    target=targets,
    query=st.text("abc=&;%0f+?#\xe9", max_size=20),
    headers=headers_of_any_kind,
)
def test_whatever_is_asked_for_is_answered_and_never_with_an_error_of_ours(
    collector: Collector, method: str, target: str, query: str, headers: list[tuple[str, str]]
) -> None:
    usual = [("Host", "x"), ("Connection", "close")]
    status = raw_status(collector.box, head(method, f"{target}?{MARKER}={query}", [*usual, *headers]))
    assert 200 <= status < 500


@anything
@given(request=st.binary(max_size=300) | st.binary(max_size=100).map(lambda rest: b"POST /collect HTTP/1.1\r\n" + rest))
def test_bytes_that_are_no_request_are_refused(collector: Collector, request: bytes) -> None:
    status = raw_status(collector.box, request)
    # Chance may hit on a method that there is not, and that is spelt well.
    assert (400 <= status < 500 or status == 501) if request else status == 0


# ---- addresses and methods that there are not


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/collect", 405),
        ("PUT", "/collect", 405),
        ("DELETE", "/pixel.gif", 405),
        ("POST", "/tracking.js", 405),
        ("POST", "/health/live", 405),
        ("GET", "/collect/", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/administration", 404),
        ("GET", "/%ff%00<script>", 404),
        ("POST", "/COLLECT", 404),
    ],
)
def test_a_wrong_address_or_method_is_answered_in_json(
    collector: Collector, method: str, path: str, status: int
) -> None:
    answer = http(collector.box, method, f"{path}?{MARKER}", b"{}")
    assert answer.status == status
    assert answer.headers.get_content_type() == "application/json"
    assert answer.json == {"error": "not found" if status == 404 else "method not allowed"}
    assert bool(answer.headers["Allow"]) is (status == 405)


@pytest.mark.parametrize(("method", "path", "status"), [("PUT", "/admin/", 405), ("GET", "/admin/nowhere", 404)])
def test_people_are_told_in_a_page(collector: Collector, method: str, path: str, status: int) -> None:
    answer = http(collector.box, method, path)
    assert answer.status == status
    assert answer.headers.get_content_type() == "text/html"


def test_a_failure_of_ours_is_answered_without_details_and_stands_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Runtime(make_settings(server={"data_dir": tmp_path}, database={"url": "dbname=nowhere"})))

    def fail() -> str:
        raise RuntimeError("the reason")

    app.add_url_rule("/fails", view_func=fail)
    answer = app.test_client().get(f"/fails?{MARKER}")
    assert (answer.status_code, answer.mimetype) == (500, "application/json")
    assert answer.get_json() == {"error": "internal server error"}
    assert "the reason" in caplog.text
    assert MARKER not in caplog.text


# ---- the quarantine

KEPT: dict[str, tuple[bytes, dict[str, str], str, str]] = {
    "a broken body": (b'{"n": "CONTENT"', {}, "body", "not JSON"),
    "no gzip": (b"CONTENT", ZIPPED, "body", "not gzip"),
    "a body that is too large": (b"CONTENT" + b" " * LIMIT, {}, "size", "larger than 32768"),
    "too many events": (b'["CONTENT"' + b", 0" * EVENTS + b"]", {}, "size", "101 events"),
    "another media type": (b"CONTENT", {"Content-Type": "text/html"}, "media type", "application/json"),
    "an event without a type": (b'[{"siteId": "shop", "n": "CONTENT"}]', {}, "event", "eventType is missing"),
    "a number beyond floats": (
        b'[{"n": "CONTENT", "eventType": "x", "siteId": "shop", "m": 1e999}]',
        {},
        "event",
        "large",
    ),
}


def test_what_is_refused_is_kept_with_its_kind_and_reason(collector: Collector) -> None:
    content = {name: visitor_id() for name in KEPT}
    # Of many refusals at once, as other tests make them, only some are kept.
    wait_for(lambda: is_kept(collector, visitor_id().encode()), "the quarantine", seconds=20)
    for name, (body, headers, _, _) in KEPT.items():
        answer = collector.post(body.replace(b"CONTENT", content[name].encode()), headers=headers)
        assert answer.status >= 400
    assert wait_for(lambda: is_kept(collector, visitor_id().encode()), "the quarantine", seconds=20)
    for name, (_, _, kind, reason) in KEPT.items():
        found = collector.conn.execute(
            "SELECT kind, reason, length(content) FROM quarantine WHERE position(%s in content) > 0",
            (content[name].encode(),),
        ).fetchall()
        assert [one[0] for one in found] == [kind], name
        assert reason in found[0][1], name
        assert 0 < found[0][2] <= 16_384, name


def is_kept(collector: Collector, body: bytes) -> bool:
    """Post what is no JSON and wait for the moment when it is written."""
    assert collector.post(body).status == 400

    def written() -> Any:
        return collector.conn.execute("SELECT 1 FROM quarantine WHERE content = %s", (body,)).fetchone()

    try:
        return bool(wait_for(written, "a refusal", seconds=5))
    except AssertionError:
        return False


UNREAD: dict[str, tuple[bytes, int]] = {
    "the body is too large": (b"POST /collect HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 413),
    "the head of the request is too large": (b"GET /%s HTTP/1.1\r\n" % (b"x" * 40_000), 431),
    "the length of the body is no number": (b"POST /collect HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "its client ended in the middle of it": (b"POST /collect HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", 400),
    "it is no request that can be read (InvalidHTTPVersion)": (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400),
}


def test_what_is_refused_before_it_is_read_can_be_seen_too(collector: Collector) -> None:
    def reasons() -> set[str]:
        return {r for (r,) in collector.conn.execute("SELECT DISTINCT reason FROM quarantine WHERE kind = 'request'")}

    for request, status in UNREAD.values():
        assert raw_status(collector.box, request) == status
    wait_for(lambda: set(UNREAD) <= reasons(), "the quarantine")


UNWANTED: dict[str, tuple[bytes, dict[str, str]]] = {
    "a stranger's event": (b'{"eventType": "x", "siteId": "shop", "n": "CONTENT"}', {"Origin": "https://evil.example"}),
    "a stranger's bad event": (b'[{"siteId": "shop", "n": "CONTENT"}, null]', {"Origin": "https://evil.example"}),
    "a stranger's broken body": (b'{"n": "CONTENT"', {"Origin": "https://evil.example"}),
    "a stranger's large body": (b"CONTENT" + b" " * LIMIT, {"Origin": "https://evil.example"}),
    "a stranger's type": (b"CONTENT", {"Origin": "https://evil.example", "Content-Type": "text/html"}),
    "a bad event of another site": (b'[{"siteId": "blog", "n": "CONTENT"}]', {"Origin": "https://shop.example.com"}),
    "a bad event in an envelope of another site": (
        b'{"eventType": "batch", "siteId": "blog", "events": [{"n": "CONTENT"}]}',
        {"Origin": "https://shop.example.com"},
    ),
    "a bad event of a visitor who wants no tracking": (b'[{"siteId": "polite", "n": "CONTENT"}]', {"DNT": "1"}),
    "a broken body of one": (b'{"n": "CONTENT"', {"Sec-GPC": "1"}),
    "an event of one": (b'{"eventType": "x", "siteId": "polite", "n": "CONTENT"}', {"DNT": "1"}),
    "a bad event where a page must send": (b'[{"siteId": "strict", "n": "CONTENT"}]', {}),
}


def test_nothing_is_kept_of_those_whom_a_site_does_not_want(collector: Collector) -> None:
    content = visitor_id().encode()
    for body, headers in UNWANTED.values():
        assert collector.post(body.replace(b"CONTENT", content), headers=headers).status >= 200
    wait_for(lambda: is_kept(collector, visitor_id().encode()), "the quarantine", seconds=20)
    stored_rows = collector.conn.execute(
        "SELECT count(*) FROM events_log WHERE raw_event_data::text LIKE %s", (f"%{content.decode()}%",)
    )
    assert stored_rows.fetchone() == (0,)
    kept = collector.conn.execute("SELECT count(*) FROM quarantine WHERE position(%s in content) > 0", (content,))
    assert kept.fetchone() == (0,)


# ---- the log, after all of this


def test_the_log_has_short_lines_and_nothing_of_what_was_sent(collector: Collector) -> None:
    for body, headers in [(b"{" + MARKER.encode(), {}), (MARKER.encode() * 9000, {}), (MARKER.encode(), ZIPPED)]:
        collector.post(body, headers=headers)
    for path in ("/collect", "/pixel.gif", "/tracking.js", "/nowhere", "/admin/", "/health/ready"):
        for query in (MARKER, f"site=shop&url={MARKER}", MARKER + "x" * 3_000, f"%0a{MARKER}%00"):
            http(collector.box, "GET", f"{path}?{query}", headers={"X-Forwarded-For": "192.0.2.1"})
    raw_status(collector.box, f"GET /pixel.gif?{MARKER} HTTP/9.9\r\n\r\n".encode())
    before = len(collector.box.log.splitlines())
    for path in ("/collect", "/pixel.gif?site=shop", "/tracking.js", "/nowhere"):
        assert http(collector.box, "HEAD", path).body == b""
    lines = collector.box.log.splitlines()
    assert len(lines) == before > 0
    assert max(map(len, lines)) <= MAX_LINE_CHARS
    assert not [line for line in lines if MARKER in line]
    assert not [line for line in lines if "Traceback" in line]
