"""Payload -> rows: what becomes of each event, and the reason for each that cannot be one."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from appliance.collect.events import MAX_METADATA_CHARS, Arrival, Parsed, TooManyEventsError, parse
from appliance.collect.payload import BadPayloadError, decode
from appliance.store.events import Event

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
ARRIVAL = Arrival(received_at=NOW, user_agent="Browser/1", ip_address="192.0.2.1")
AN_ID = "0198c0de-0000-7000-8000-00000000abcd"
LARGE = {"note": "x" * (MAX_METADATA_CHARS + 1)}


def parsed(payload: Any, *, max_events: int = 500) -> Parsed:
    minted = itertools.count(1)
    return parse(payload, ARRIVAL, max_events=max_events, mint=lambda: UUID(int=next(minted)))


def event(**fields: Any) -> dict[str, Any]:
    return {"eventType": "pageview", "siteId": "shop", **fields}


def batch(*events: Any, **metadata: Any) -> dict[str, Any]:
    return {"eventType": "batch", "siteId": "shop", **metadata, "events": list(events)}


def row_of(payload: Any) -> Event:
    result = parsed(payload)
    assert not result.rejected
    (row,) = result.rows
    return row


def raw(row: Event) -> Any:
    return json.loads(row.raw_event_data)


def test_every_field_of_an_event_has_its_column() -> None:
    sent = event(eventId=AN_ID, sessionId="s1", visitorId="v1", timestamp="2026-03-01T11:59:00Z", extra={"a": [1]})
    sent["url"] = "https://shop.example.com/a/b?c=d#e"
    assert row_of({**sent}) == Event(
        event_id=UUID(AN_ID),
        event_type="pageview",
        session_id="s1",
        visitor_id="v1",
        site_id="shop",
        timestamp=NOW - timedelta(minutes=1),
        url="https://shop.example.com/a/b?c=d#e",
        path="/a/b",
        user_agent="Browser/1",
        ip_address="192.0.2.1",
        raw_event_data=json.dumps(sent, separators=(",", ":")),
        created_at=NOW,
    )


def test_an_event_alone_and_in_an_array_make_the_same_row() -> None:
    assert row_of(event(eventId="x")) == row_of([event(eventId="x")])


@pytest.mark.parametrize("payload", [None, True, 1, 1.5, "event", ""], ids=repr)
def test_a_payload_that_is_neither_event_nor_array_is_refused(payload: object) -> None:
    with pytest.raises(BadPayloadError):
        parsed(payload)


BAD_EVENTS: dict[str, tuple[Any, str]] = {
    "null": (None, "object"),
    "a number": (7, "object"),
    "a text": ("pageview", "object"),
    "a list": ([event()], "object"),
    "an empty object": ({}, "is missing"),
    "no type": ({"siteId": "shop"}, "eventType is missing"),
    "null as type": (event(eventType=None), "eventType"),
    "a number as type": (event(eventType=1), "eventType"),
    "an empty type": (event(eventType=""), "eventType"),
    "a blank type": (event(eventType=" \n"), "eventType"),
    "no site": ({"eventType": "pageview"}, "siteId is missing"),
    "a number as site": (event(siteId=1), "siteId"),
    "an empty site": (event(siteId=""), "siteId"),
    "a site with a slash": (event(siteId="a/../b"), "siteId"),
    "a site with a line break": (event(siteId="shop\n"), "siteId"),
    "a site with a letter beyond ASCII": (event(siteId="shöp"), "siteId"),
    "the star": (event(siteId="*"), "siteId"),
    "markup as site": (event(siteId="<script>"), "siteId"),
    "a site that is too long": (event(siteId="s" * 101), "siteId"),
    "an object as site": (event(siteId={"a": 1}), "siteId"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_EVENTS.values(), ids=BAD_EVENTS)
@pytest.mark.parametrize("enveloped", [False, True], ids=["array", "envelope"])
def test_a_bad_event_is_refused_with_its_index_and_costs_its_neighbours_nothing(
    bad: Any, reason: str, *, enveloped: bool
) -> None:
    items = [event(n=0), bad, event(n=2)]
    result = parsed({"eventType": "batch", "events": items} if enveloped else items)
    assert [raw(row)["n"] for row in result.events] == [0, 2]
    assert result.indexes == (0, 2)
    (rejection,) = result.rejected
    assert rejection.index == 1
    assert reason in rejection.reason


def test_as_many_events_as_allowed_are_taken_and_not_one_more() -> None:
    assert len(parsed([event()] * 3, max_events=3).events) == 3
    for payload in ([event()] * 4, batch(*[event()] * 4), [None] * 4):
        with pytest.raises(TooManyEventsError):
            parsed(payload, max_events=3)


# ---- envelopes


@pytest.mark.parametrize("child", [{}, {"siteId": None, "sessionId": None, "visitorId": None, "url": None}])
def test_a_child_inherits_what_it_does_not_say(child: dict[str, Any]) -> None:
    url = "https://shop.example.com/a"
    row = row_of(batch({"eventType": "click", **child}, sessionId="s", visitorId="v", url=url))
    assert (row.event_type, row.site_id, row.session_id) == ("click", "shop", "s")
    assert (row.visitor_id, row.url, row.path) == ("v", url, "/a")


def test_a_child_keeps_what_it_says_itself() -> None:
    own = event(siteId="blog", sessionId="s2", visitorId="v2", url="https://blog.example.com/b")
    row = row_of(batch(own, sessionId="s", visitorId="v", url="https://shop.example.com/a"))
    assert (row.site_id, row.session_id, row.visitor_id, row.path) == ("blog", "s2", "v2", "/b")


def test_a_child_inherits_neither_type_nor_id_nor_path() -> None:
    first, second = parsed(batch(event(), event(), eventId=AN_ID, path="/envelope")).events
    assert len({first.event_id, second.event_id, UUID(AN_ID)}) == 3
    assert first.path is None
    assert parsed(batch({"n": 1}, event())).rejected[0].reason == "eventType is missing"


def test_small_metadata_travels_in_every_row() -> None:
    rows = parsed(batch(event(n=1), event(n=2), tool="t/1")).rows
    metadata = {"eventType": "batch", "siteId": "shop", "tool": "t/1"}
    assert [raw(row) for row in rows] == [event(n=1, _batch=metadata), event(n=2, _batch=metadata)]


def test_large_metadata_is_one_row_that_the_children_name() -> None:
    result = parsed(batch(event(n=1), event(n=2), **LARGE))
    assert result.metadata
    assert result.metadata.event_type == "batch"
    assert raw(result.metadata) == {"eventType": "batch", "siteId": "shop", **LARGE}
    assert len(result.rows) == 3
    for row in result.events:
        assert raw(row)["_batch"] == {"eventId": str(result.metadata.event_id)}
        assert len(row.raw_event_data) < 200


def test_the_same_envelope_sent_again_has_the_same_row_for_its_metadata() -> None:
    first, again = (parsed(batch(event(n=1), **LARGE)).metadata for _ in range(2))
    other = parsed(batch(event(n=1), note="y" * 3000)).metadata
    assert first
    assert again
    assert other
    assert first.event_id == again.event_id != other.event_id


def test_large_metadata_without_a_site_of_its_own_is_not_lost() -> None:
    result = parsed({"eventType": "batch", **LARGE, "events": [event()]})
    assert any(LARGE["note"] in row.raw_event_data for row in result.rows)


def test_large_metadata_goes_with_the_events_that_name_it_where_its_own_site_is_refused() -> None:
    children = [event(siteId="blog"), event(siteId="shop", n=1), event(siteId="shop")]
    admitted = parsed(batch(*children, **{**LARGE, "siteId": "blog"})).without({"blog": "not from there"})
    assert [row.site_id for row in admitted.rows] == ["shop", "shop", "shop"]
    assert admitted.metadata
    assert raw(admitted.events[0])["_batch"] == {"eventId": str(admitted.metadata.event_id)}
    assert [(rejection.index, rejection.reason) for rejection in admitted.rejected] == [(0, "not from there")]
    assert not admitted.without({"shop": "not for it"}).rows


def test_a_long_address_of_an_envelope_stands_once_in_whole() -> None:
    url = "https://shop.example.com/" + "x" * 40_000
    result = parsed(batch(event(), event(url="/own"), url=url))
    assert result.metadata
    assert (result.metadata.url, raw(result.metadata)["url"]) == (url, url)
    assert [row.url for row in result.events] == [url[:2048], "/own"]
    assert sum(row.chars for row in result.events) < 3_000


def test_a_long_user_agent_is_cut() -> None:
    arrival = replace(ARRIVAL, user_agent="x" * 8_000)
    (row,) = parse(event(), arrival, max_events=1, mint=uuid4).rows
    assert row.user_agent == "x" * 1024


def test_metadata_that_cannot_be_stored_costs_no_event_and_the_reason_stands_in_its_place() -> None:
    result = parsed(batch(event(n=1), event(n=2), numbers=[1e308] * 260, sessionId="s"))
    assert [raw(row)["n"] for row in result.rows] == [1, 2]
    assert [row.session_id for row in result.rows] == ["s", "s"]
    note = raw(result.rows[0])["_batch"]
    assert note["eventType"] == "batch"
    assert "numbers" in note["refused"]


@pytest.mark.parametrize("metadata", [{}, LARGE], ids=["small", "large"])
def test_a_child_that_uses_the_key_batch_keeps_it(metadata: dict[str, Any]) -> None:
    child = event(_batch="mine", __batch=[1])
    row = parsed(batch(child, **metadata)).events[0]
    assert raw(row).items() >= child.items()
    assert len(raw(row)) == len(child) + 1


IMPOSSIBLE = {
    "a number beyond floats": b"1e999",
    "an integer of 5,000 digits": b"9" * 5000,
    "lists nested too deeply": b"[" * 80 + b"]" * 80,
}


@pytest.mark.parametrize("text", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
@pytest.mark.parametrize("name", ["anything", "eventId", "sentAt", "url", "siteId"])
def test_what_the_database_would_not_take_of_an_envelope_costs_its_events_nothing(name: str, text: bytes) -> None:
    body = b'{"eventType": "batch", "%s": %s, "events": [{"eventType": "click", "siteId": "shop"}]}'
    row = row_of(decode(body % (name.encode(), text)))
    assert (row.event_type, row.site_id, row.timestamp) == ("click", "shop", NOW)
    assert row.url is None
    assert "too" in str(raw(row)["_batch"][name])


def test_an_envelope_without_events_is_kept_even_where_the_database_would_not_take_all_of_it() -> None:
    row = row_of(decode(b'{"eventType": "batch", "siteId": "shop", "n": 1e999, "events": []}'))
    assert raw(row)["n"] == "(the number 1e999 is too large)"


UNUSABLE: dict[str, list[Any]] = {"no events": [], "bad events": [None, 7], "events without a type": [{"n": 1}]}


@pytest.mark.parametrize("events", UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("metadata", [{}, {"eventId": AN_ID}, LARGE], ids=["bare", "with an id", "large"])
def test_an_envelope_without_usable_events_is_kept_whole(events: list[Any], metadata: dict[str, Any]) -> None:
    result = parsed(batch(*events, **metadata))
    (row,) = result.rows
    assert row.event_type == "batch"
    assert raw(row).items() >= batch(*events, **metadata).items()
    assert [rejection.index for rejection in result.rejected] == list(range(len(events)))


def test_an_envelope_that_is_kept_whole_keeps_the_id_it_came_with() -> None:
    assert raw(row_of(batch(eventId="order-7"))) == batch(eventId="order-7")


@pytest.mark.parametrize("events", ["none", {"0": 1}, None, 7], ids=repr)
def test_an_envelope_whose_events_are_no_list_is_kept_whole(events: object) -> None:
    assert raw(row_of({**batch(), "events": events})) == {**batch(), "events": events}


def test_two_envelopes_that_differ_in_unusable_events_alone_are_both_kept() -> None:
    first, second = (parsed(batch({"n": n})).rows[0] for n in (1, 2))
    assert first.event_id != second.event_id


def test_an_unusable_envelope_without_a_site_is_refused_with_the_reasons_of_its_events() -> None:
    result = parsed({"eventType": "batch", "events": [None, event(siteId="/")]})
    assert not result.rows
    assert [rejection.index for rejection in result.rejected] == [0, 1]


# ---- ids


@pytest.mark.parametrize("given_id", [AN_ID, AN_ID.upper()])
def test_a_uuid_is_taken_as_it_is(given_id: str) -> None:
    assert row_of(event(eventId=given_id)).event_id == UUID(AN_ID)


NOT_UUIDS = ["order-7", "7", 7, 7.5, True, ["a"], {"a": 1}, AN_ID.replace("-", ""), f"{{{AN_ID}}}", f"{AN_ID}\n", " "]


@pytest.mark.parametrize("given_id", NOT_UUIDS, ids=repr)
def test_an_id_that_is_no_uuid_becomes_the_same_uuid5_every_time(given_id: object) -> None:
    first, again = row_of(event(eventId=given_id, n=1)), row_of(event(eventId=given_id, n=2))
    other_site = row_of(event(eventId=given_id, siteId="blog"))
    assert first.event_id.version == 5
    assert first.event_id == again.event_id != other_site.event_id
    assert raw(first)["eventId"] == given_id


def test_different_ids_never_become_one() -> None:
    values = [value for value in NOT_UUIDS if value != 7]  # the text "7" may be the number
    ids = {row_of(event(eventId=value)).event_id for value in values}
    sites = {row_of(event(siteId=site, eventId=value)).event_id for site, value in [("a", "bc"), ("ab", "c")]}
    assert len(ids) == len(values)
    assert len(sites) == 2


@pytest.mark.parametrize("missing", [{}, {"eventId": None}, {"eventId": ""}], ids=repr)
def test_a_missing_id_is_minted(missing: dict[str, Any]) -> None:
    rows = parsed([event(**missing), event(**missing)]).rows
    assert [row.event_id for row in rows] == [UUID(int=1), UUID(int=2)]


# ---- times

MINUTE_AGO = NOW - timedelta(minutes=1)
TIMES: dict[str, tuple[Any, datetime]] = {
    "Z": ("2026-03-01T11:59:00.000Z", MINUTE_AGO),
    "another zone": ("2026-03-01T13:59:00+02:00", MINUTE_AGO),
    "no zone": ("2026-03-01 11:59:00", MINUTE_AGO),
    "milliseconds": (int(MINUTE_AGO.timestamp() * 1000), MINUTE_AGO),
    "seconds": (int(MINUTE_AGO.timestamp()), MINUTE_AGO),
    "fractions": (MINUTE_AGO.timestamp() + 0.5, MINUTE_AGO + timedelta(seconds=0.5)),
    "29 days ago": ((NOW - timedelta(days=29)).isoformat(), NOW - timedelta(days=29)),
    "31 days ago": ((NOW - timedelta(days=31)).isoformat(), NOW),
    "the future": ((NOW + timedelta(seconds=1)).isoformat(), NOW),
    "the first year": ("0001-01-01T00:00:00+23:59", NOW),
    "the last year": ("9999-12-31T23:59:59-23:59", NOW),
    "no day": ("2026-02-30T00:00:00Z", NOW),
    "no time": ("yesterday", NOW),
    "nothing": ("", NOW),
    "null": (None, NOW),
    "true": (True, NOW),
    "a list": ([2026, 3, 1], NOW),
    "zero": (0, NOW),
    "a negative number": (-1, NOW),
    "a number beyond time": (1e300, NOW),
    "an integer beyond floats": (10**400, NOW),
    "2^63": (2**63, NOW),
}


@pytest.mark.parametrize(("said", "taken"), TIMES.values(), ids=TIMES)
def test_the_time_is_the_clients_unless_it_is_absurd(said: object, taken: datetime) -> None:
    row = row_of(event(timestamp=said))
    assert row.timestamp == taken
    assert row.created_at == NOW
    assert raw(row)["timestamp"] == said


@pytest.mark.parametrize("fast", [timedelta(hours=3), timedelta(days=-4000)], ids=["fast", "very slow"])
@pytest.mark.parametrize("in_envelope", [False, True], ids=["event", "envelope"])
def test_a_clock_that_goes_wrong_is_corrected_by_when_it_sent(fast: timedelta, *, in_envelope: bool) -> None:
    happened = {"timestamp": (MINUTE_AGO + fast).isoformat()}
    sent = {"sentAt": (NOW + fast).isoformat()}
    row = row_of(batch(event(**happened), **sent) if in_envelope else event(**happened, **sent))
    assert row.timestamp == MINUTE_AGO


@pytest.mark.parametrize("sent_at", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", 1e300, "x", {}], ids=repr)
def test_an_absurd_time_of_sending_harms_nothing(sent_at: object) -> None:
    assert row_of(event(timestamp=MINUTE_AGO.isoformat(), sentAt=sent_at)).timestamp in {NOW, MINUTE_AGO}


CORRECTED: dict[str, tuple[Any, Any, datetime]] = {
    "sent at once": ("2026-03-01T10:00:00Z", "2026-03-01T10:00:00Z", NOW),
    "sent after two hours": ("2026-03-01T10:00:00Z", "2026-03-01T12:00:00Z", NOW - timedelta(hours=2)),
    "sent before it happened": ("2026-03-01T10:00:01Z", "2026-03-01T10:00:00Z", NOW),
    "milliseconds, and a text": (0, "1970-01-01T00:01:00Z", MINUTE_AGO),
    "seconds, and milliseconds": (1_000_000_000, 1_000_000_060_000, MINUTE_AGO),
    "in two zones": ("2026-03-01T10:00:00+01:00", "2026-03-01T10:01:00+01:00", MINUTE_AGO),
    "a clock of 1970 after 29 days": (0, 29 * 86_400, NOW - timedelta(days=29)),
    "a clock of 1970 after 30 days": (0, 30 * 86_400, NOW - timedelta(days=30)),
    "a clock of 1970 after 30 days and a second": (0, 30 * 86_400 + 1, NOW),
    "a clock that jumped while it waited": (0, "2026-03-01T12:00:00Z", NOW),
    "from one end of time to the other": ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", NOW),
    "and back": ("9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", NOW),
    "a time of sending that is none": ("2026-03-01T11:59:00Z", "now", MINUTE_AGO),
    "nothing but a time of sending": (None, "2026-03-01T11:59:00Z", NOW),
}


@pytest.mark.parametrize(("said", "sent_at", "taken"), CORRECTED.values(), ids=CORRECTED)
def test_a_time_is_as_long_ago_as_the_clients_own_clock_says(said: object, sent_at: object, taken: datetime) -> None:
    row = row_of(event(timestamp=said, sentAt=sent_at))
    assert row.timestamp == taken
    assert row.created_at == NOW
    assert (raw(row)["timestamp"], raw(row)["sentAt"]) == (said, sent_at)


WRITTEN: dict[str, Callable[[datetime], Any]] = {
    "ISO 8601": lambda moment: moment.isoformat(),
    "ISO 8601 with Z": lambda moment: f"{moment.replace(tzinfo=None).isoformat()}Z",
    "ISO 8601 of another zone": lambda moment: moment.astimezone(
        timezone(timedelta(hours=-9, minutes=-30))
    ).isoformat(),
    "seconds": lambda moment: moment.timestamp(),
    "milliseconds": lambda moment: moment.timestamp() * 1000,
}
writing = st.sampled_from(sorted(WRITTEN)).map(WRITTEN.__getitem__)
ages = st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=30) - timedelta(seconds=1))
MILLISECOND = timedelta(milliseconds=1)


@settings(max_examples=200, deadline=None, database=None)
@given(age=ages, wrong_by=st.timedeltas(timedelta(days=-9_000), timedelta(days=1_000_000)), write=writing)
def test_however_wrong_a_clock_is_an_event_is_dated_by_how_long_it_waited(
    age: timedelta, wrong_by: timedelta, write: Callable[[datetime], Any]
) -> None:
    sent = NOW + wrong_by
    row = row_of(event(timestamp=write(sent - age), sentAt=write(sent)))
    # Rounding may put an event that was sent at once into the future, which is the time of arrival then.
    assert abs(row.timestamp - (NOW - age)) <= MILLISECOND


@settings(max_examples=200, deadline=None, database=None)
@given(age=st.timedeltas(timedelta(days=-400), timedelta(days=400)), write=writing)
def test_without_a_time_of_sending_the_clients_time_is_taken_where_it_is_sane(
    age: timedelta, write: Callable[[datetime], Any]
) -> None:
    # A float is no more exact than that.
    assume(abs(age - timedelta(days=30)) > MILLISECOND)
    row = row_of(event(timestamp=write(NOW - age)))
    sane = timedelta(0) <= age <= timedelta(days=30)
    assert abs(row.timestamp - (NOW - age if sane else NOW)) <= MILLISECOND


@settings(max_examples=100, deadline=None, database=None)
@given(one=ages, other=ages, wrong_by=st.timedeltas(timedelta(days=-9_000), timedelta(days=9_000)))
def test_events_of_one_sending_keep_their_order_and_their_distances(
    one: timedelta, other: timedelta, wrong_by: timedelta
) -> None:
    sent = NOW + wrong_by
    events = [event(timestamp=(sent - age).isoformat()) for age in (one, other)]
    first, second = parsed(batch(*events, sentAt=sent.isoformat())).events
    assert first.timestamp - second.timestamp == other - one


# ---- columns

CUT = [("eventType", "event_type", 50), ("sessionId", "session_id", 100), ("visitorId", "visitor_id", 100)]


@pytest.mark.parametrize(("name", "column", "length"), [*CUT, ("path", "path", 500)])
def test_what_is_too_long_is_cut_in_the_column_and_whole_in_the_raw_data(name: str, column: str, length: int) -> None:
    text = "😀" * (length + 1)
    row = row_of(event(**{name: text}))
    assert getattr(row, column) == text[:length]
    assert raw(row)[name] == text


PATHS: dict[str, tuple[dict[str, Any], str | None]] = {
    "the event's own": ({"path": "/own", "url": "https://a.example/other"}, "/own"),
    "of the URL": ({"url": "https://a.example/x/y?z=1#w"}, "/x/y"),
    "of a bare host": ({"url": "https://a.example"}, "/"),
    "too long in the URL": ({"url": "https://a.example/" + "x" * 600}, "/" + "x" * 499),
    "of an impossible URL": ({"url": "http://[::1"}, None),
    "without a URL": ({}, None),
    "of an empty URL": ({"url": ""}, None),
    "an empty one": ({"path": "", "url": "https://a.example/x"}, "/x"),
    "no text": ({"path": {"a": 1}, "url": ["x"]}, None),
}


@pytest.mark.parametrize(("fields", "path"), PATHS.values(), ids=PATHS)
def test_the_path_is_the_events_own_or_that_of_its_url(fields: dict[str, Any], path: str | None) -> None:
    assert row_of(event(**fields)).path == path


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (2**60 + 1, str(2**60 + 1)), (True, "true"), ({}, None)])
def test_a_visitor_that_is_no_text_is_written_as_one_or_stays_raw(value: object, text: str | None) -> None:
    row = row_of(event(visitorId=value))
    assert row.visitor_id == text
    assert raw(row)["visitorId"] == value


names = [
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
words = st.sampled_from(["batch", "shop", "pageview", "", "http://[", "2026-03-01", AN_ID]) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(names) | words, inner, max_size=8),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None, database=None)
@given(said=values, sent_at=values)
def test_whatever_a_client_says_of_time_its_event_is_dated_within_the_last_30_days(said: Any, sent_at: Any) -> None:
    one = event(timestamp=said, sentAt=sent_at, eventId="x")
    row = row_of(one)
    assert NOW - timedelta(days=30) <= row.timestamp <= NOW
    assert row.created_at == NOW
    assert row.timestamp.tzinfo is not None
    assert raw(row) == one
    assert row == row_of(one)


@settings(max_examples=300, deadline=None, database=None)
@given(payload=st.lists(values, max_size=4) | st.dictionaries(st.sampled_from(names), values, max_size=8))
def test_every_event_of_any_payload_is_either_a_row_or_refused(payload: Any) -> None:
    result = parsed(payload)
    assert len(result.indexes) == len(result.events)
    if isinstance(payload, list):
        assert sorted([*result.indexes, *(rejection.index for rejection in result.rejected)]) == [*range(len(payload))]
    for row in result.rows:
        assert json.loads(row.raw_event_data)
        assert NOW - timedelta(days=30) <= row.timestamp <= NOW


def test_metadata_whose_numbers_are_long_written_out_is_stored_once() -> None:
    short = batch(*[event(n=n) for n in range(3)], numbers=[1e20] * 60)
    long = batch(*[event(n=n) for n in range(3)], numbers=[1e308] * 60)
    assert parsed(short).metadata is None
    assert parsed(long).metadata is not None
    assert max(len(row.raw_event_data) for row in parsed(long).events) < 300


def test_an_event_whose_numbers_become_megabytes_is_refused_and_no_other() -> None:
    result = parsed([event(), event(n=[1e308] * 300), event(n=[-1.5e-300] * 150, text="1e+999," * 900)])
    assert [(one.index, one.reason) for one in result.rejected] == [
        (1, "its numbers are too long when they are written out")
    ]
    assert result.indexes == (0, 2)


def test_an_envelope_and_its_event_may_bear_one_id() -> None:
    sent = batch(event(eventId=AN_ID), eventId=AN_ID, context="x" * 3_000)
    first, again = parsed(sent), parsed(sent)
    assert first.metadata is not None
    assert first.metadata.event_id != first.events[0].event_id == UUID(AN_ID)
    assert raw(first.events[0])["_batch"] == {"eventId": str(first.metadata.event_id)}
    assert first.rows == again.rows
