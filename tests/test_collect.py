"""POST /collect on the real server: what is answered 2xx stands in events_log, once and whole."""

import gzip
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from conftest import Answer, Appliance, Collector, http, running, wait_for

from appliance.store.embedded import EmbeddedPostgres


@pytest.fixture
def visitor() -> str:
    """A visitor of the test's own, to find its rows by."""
    return uuid4().hex


def event(visitor: str, **fields: Any) -> dict[str, Any]:
    return {"eventType": "pageview", "siteId": "shop", "visitorId": visitor, **fields}


def accepted(number: int, duplicates: int = 0) -> dict[str, Any]:
    return {"accepted": number, "duplicates": duplicates, "rejected": []}


SHAPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "event": lambda one: one,
    "array": lambda one: [one],
    "envelope": lambda one: {"eventType": "batch", "events": [one]},
}


@pytest.mark.parametrize("media", ["application/json", "text/plain", "text/plain;charset=UTF-8", "Application/JSON"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_event_is_stored_whatever_it_is_sent_as(
    collector: Collector, visitor: str, shape: Callable[[dict[str, Any]], Any], media: str
) -> None:
    answer = collector.post(shape(event(visitor)), media=media)
    assert (answer.status, answer.json) == (200, accepted(1))
    assert len(collector.rows(visitor)) == 1


def test_every_column_of_events_log_is_filled(collector: Collector, visitor: str) -> None:
    before, one = datetime.now(UTC), str(uuid4())
    sent = event(visitor, eventId=one, sessionId="s1", url="https://shop.example.com/a/b?c#d", other={"a": [1, None]})
    sent["timestamp"] = (before - timedelta(minutes=5)).isoformat()
    assert collector.post(sent, headers={"User-Agent": "Browser/1"}).json == accepted(1)
    (row,) = collector.rows(visitor)
    assert before <= row.pop("created_at") <= datetime.now(UTC)
    assert row.pop("id") > 0
    assert str(row.pop("ip_address")) == "127.0.0.1"
    assert row == {
        "event_id": UUID(one),
        "event_type": "pageview",
        "session_id": "s1",
        "visitor_id": visitor,
        "site_id": "shop",
        "timestamp": before - timedelta(minutes=5),
        "url": "https://shop.example.com/a/b?c#d",
        "path": "/a/b",
        "user_agent": "Browser/1",
        "raw_event_data": sent,
        "exported_at": None,
    }


def test_children_inherit_from_their_envelope_and_keep_its_metadata(collector: Collector, visitor: str) -> None:
    metadata = {"eventType": "batch", "siteId": "shop", "visitorId": visitor, "sessionId": "s", "tool": "t/1"}
    children = [{"eventType": "click"}, {"eventType": "view", "siteId": "blog", "sessionId": "own"}]
    assert collector.post({**metadata, "url": "https://x.example/p", "events": children}).json == accepted(2)
    rows = collector.rows(visitor)
    assert {(row["site_id"], row["session_id"], row["path"]) for row in rows} == {
        ("shop", "s", "/p"),
        ("blog", "own", "/p"),
    }
    assert {row["raw_event_data"]["_batch"]["tool"] for row in rows} == {"t/1"}


def test_large_metadata_is_stored_once_and_named_by_the_children(collector: Collector, visitor: str) -> None:
    envelope = {"eventType": "batch", "siteId": "shop", "visitorId": visitor, "note": "x" * 9000}
    children = [{"eventType": "click", "eventId": str(uuid4())} for _ in range(50)]
    assert collector.post({**envelope, "events": children}).json == accepted(50)
    assert collector.post({**envelope, "events": children}).json == accepted(0, 50)
    rows = collector.rows(visitor)
    (metadata,) = [row for row in rows if row["event_type"] == "batch"]
    assert metadata["raw_event_data"] == envelope
    names = [row["raw_event_data"]["_batch"]["eventId"] for row in rows if row["event_type"] == "click"]
    assert names == [str(metadata["event_id"])] * 50


def test_the_row_of_an_envelope_does_not_pass_for_its_event(collector: Collector, visitor: str) -> None:
    event = {"eventType": "click", "siteId": "shop", "visitorId": visitor, "eventId": str(uuid4())}
    assert collector.post(event).json == accepted(1)
    envelope = {"eventType": "batch", "siteId": "shop", "visitorId": visitor, "note": "x" * 9000}
    assert collector.post({**envelope, "events": [event]}).json == accepted(0, 1)


def test_an_envelope_without_usable_events_is_kept_whole(collector: Collector, visitor: str) -> None:
    envelope = {"eventType": "batch", "siteId": "shop", "visitorId": visitor, "events": [7, {"n": 1}]}
    answer = collector.post(envelope)
    assert (answer.status, answer.json["accepted"]) == (200, 1)
    assert [rejection["index"] for rejection in answer.json["rejected"]] == [0, 1]
    (row,) = collector.rows(visitor)
    assert row["event_type"] == "batch"
    assert row["raw_event_data"].items() >= envelope.items()


def test_bad_events_are_refused_by_index_with_a_reason_and_their_neighbours_stored(
    collector: Collector, visitor: str
) -> None:
    answer = collector.post(
        [event(visitor, n=0), None, {"siteId": "shop"}, event(visitor, siteId="a/b"), event(visitor, n=4)]
    )
    assert (answer.status, answer.json["accepted"]) == (200, 2)
    assert [rejection["index"] for rejection in answer.json["rejected"]] == [1, 2, 3]
    assert all(rejection["reason"] for rejection in answer.json["rejected"])
    assert {row["raw_event_data"]["n"] for row in collector.rows(visitor)} == {0, 4}


def test_an_event_of_an_unknown_site_costs_its_neighbours_nothing(collector: Collector, visitor: str) -> None:
    answer = collector.post([event(visitor), event(visitor, siteId="nowhere")])
    assert (answer.status, answer.json.get("accepted")) == (200, 1)
    assert [rejection["index"] for rejection in answer.json["rejected"]] == [1]
    assert len(collector.rows(visitor)) == 1


# ---- ids


def test_an_event_sent_twice_is_stored_once(collector: Collector, visitor: str) -> None:
    one = event(visitor, eventId=str(uuid4()))
    assert collector.post([one, event(visitor), one]).json == accepted(2, 1)
    assert collector.post(one).json == accepted(0, 1)
    assert len(collector.rows(visitor)) == 2


def test_of_two_contents_with_one_id_the_first_wins(collector: Collector, visitor: str) -> None:
    one = event(visitor, eventId=str(uuid4()))
    assert collector.post({**one, "n": 1}).json == accepted(1)
    assert collector.post([{**one, "n": 2}, {**one, "n": 3}]).json == accepted(0, 2)
    (row,) = collector.rows(visitor)
    assert row["raw_event_data"]["n"] == 1


def test_an_id_that_is_no_uuid_is_the_same_uuid_every_time(collector: Collector, visitor: str) -> None:
    one = event(visitor, eventId=f"order-{visitor}")
    assert collector.post(one).json == accepted(1)
    assert collector.post(one).json == accepted(0, 1)
    assert collector.post({**one, "siteId": "blog"}).json == accepted(1)
    shop, blog = (row["event_id"] for row in collector.rows(visitor))
    assert shop.version == blog.version == 5
    assert shop != blog


def test_a_missing_id_is_minted_in_the_order_of_time(collector: Collector, visitor: str) -> None:
    for _ in range(2):
        assert collector.post([event(visitor), event(visitor)]).json == accepted(2)
    ids = [row["event_id"] for row in collector.rows(visitor)]
    assert len(set(ids)) == 4
    # The version's 4 bits stand behind 48 bits of milliseconds.
    assert [(one.int >> 76) & 0xF for one in ids] == [7] * 4
    now = datetime.now(UTC).timestamp() * 1000
    assert all(abs((one.int >> 80) - now) < 60_000 for one in ids)


def test_many_who_send_the_same_ids_at_once_lose_nothing_and_double_nothing(collector: Collector, visitor: str) -> None:
    ids = [str(uuid4()) for _ in range(120)]

    def send(first: int) -> tuple[int, int]:
        part = [ids[(first + n) % len(ids)] for n in range(40)]
        answer = collector.post([event(visitor, eventId=one) for one in part]).json
        assert answer["accepted"] + answer["duplicates"] == 40
        return answer["accepted"], answer["duplicates"]

    with ThreadPoolExecutor(12) as pool:
        totals = list(pool.map(send, range(0, 480, 8)))
    assert sum(new for new, _ in totals) == 120
    assert sorted(str(row["event_id"]) for row in collector.rows(visitor)) == sorted(ids)


# ---- values that are hard to keep


def test_integers_keep_their_digits_beyond_floats(collector: Collector, visitor: str) -> None:
    numbers = [2**53 + 1, -(2**63) - 1, 10**300 + 7]
    assert collector.post(event(visitor, numbers=numbers)).json == accepted(1)
    assert collector.rows(visitor)[0]["raw_event_data"]["numbers"] == numbers


def test_what_jsonb_refuses_is_replaced_in_keys_and_values(collector: Collector, visitor: str) -> None:
    sent = event(visitor, **{"k\x00": "v\x00", "\ud800": ["\udc00"]}, url="/\x00", sessionId="\udfff", kept="\\u0000")
    assert collector.post(sent).json == accepted(1)
    (row,) = collector.rows(visitor)
    raw = row["raw_event_data"]
    assert (raw["k\ufffd"], raw["\ufffd"], raw["kept"]) == ("v\ufffd", ["\ufffd"], "\\u0000")
    assert (row["url"], row["session_id"]) == ("/\ufffd", "\ufffd")


def test_fields_that_are_too_long_are_cut_in_the_column_and_whole_in_the_raw_data(
    collector: Collector, visitor: str
) -> None:
    long = {"eventType": "😀" * 51, "sessionId": "é" * 101, "path": "/" + "ü" * 500}
    assert collector.post(event(visitor, **long)).json == accepted(1)
    (row,) = collector.rows(visitor)
    assert (row["event_type"], row["session_id"], row["path"]) == ("😀" * 50, "é" * 100, "/" + "ü" * 499)
    assert row["raw_event_data"].items() >= long.items()


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", 10**400, -1, "x", []])
def test_a_time_out_of_range_becomes_the_time_of_arrival(collector: Collector, visitor: str, moment: Any) -> None:
    assert collector.post(event(visitor, timestamp=moment, sentAt=moment)).json == accepted(1)
    (row,) = collector.rows(visitor)
    assert row["timestamp"] == row["created_at"]
    assert row["raw_event_data"]["timestamp"] == moment


# ---- addresses

FORWARDED = "203.0.113.77"


@pytest.mark.parametrize(
    ("source", "address"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.2", FORWARDED)], ids=["stranger", "trusted proxy"]
)
def test_a_forwarded_address_counts_only_from_a_trusted_proxy(
    collector: Collector, visitor: str, source: str, address: str
) -> None:
    headers = {"X-Forwarded-For": f"198.51.100.1, {FORWARDED}, 10.1.2.3", "X-Real-IP": "198.51.100.9"}
    assert collector.post(event(visitor), source=source, headers=headers).json == accepted(1)
    assert str(collector.rows(visitor)[0]["ip_address"]) == address


def test_each_site_of_a_request_keeps_as_much_of_the_address_as_it_says(collector: Collector, visitor: str) -> None:
    events = [event(visitor, siteId=site) for site in ("shop", "truncated", "dropped")]
    assert collector.post(events, source="127.0.0.2", headers={"X-Forwarded-For": FORWARDED}).json == accepted(3)
    kept = {row["site_id"]: row["ip_address"] and str(row["ip_address"]) for row in collector.rows(visitor)}
    assert kept == {"shop": FORWARDED, "truncated": "203.0.113.0", "dropped": None}


# ---- the database goes away


def test_while_the_database_is_away_events_wait_in_the_spool_and_afterwards_all_are_stored_once(
    appliance: Callable[..., Appliance], postgres: EmbeddedPostgres, conninfo: str
) -> None:
    box = appliance(database={"url": conninfo}).start()
    name = psycopg.conninfo.conninfo_to_dict(conninfo)["dbname"]
    events = json.dumps([event("v", eventId=str(uuid4())) for _ in range(3)]).encode()

    def send() -> Answer:
        return http(box, "POST", "/collect", events, {"Content-Type": "text/plain"})

    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        away = send()
        assert (away.status, away.json) == (202, accepted(3))
        assert send().status == 202
        ready = http(box, "GET", "/health/ready")
        assert (ready.status, ready.json["status"]) == (200, "degraded")
        assert http(box, "GET", "/tracking.js").status == 200
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    wait_for(box.ready, "the spool to be drained")
    back = send()
    assert (back.status, back.json) == (200, accepted(0, 3))
    with psycopg.connect(conninfo) as reader:
        assert reader.execute("SELECT count(*) FROM events_log").fetchone() == (3,)


def test_connections_that_are_cut_again_and_again_lose_nothing_and_double_nothing(
    collector: Collector, visitor: str
) -> None:
    """What is answered 200 is stored, and what is answered 202 a little later."""
    done = threading.Event()

    def cut() -> None:
        while not done.wait(0.05):
            collector.conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    def send(_: int) -> str:
        one = str(uuid4())
        assert collector.post(event(visitor, eventId=one)).status in {200, 202}
        return one

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(send, range(150)))
    finally:
        done.set()
        cutter.join()
    wait_for(collector.box.ready, "the spool to be drained")
    assert sorted(str(row["event_id"]) for row in collector.rows(visitor)) == sorted(ids)


# ---- tracking.js


def test_the_tracker_is_cached_by_its_tag_and_served_small(collector: Collector) -> None:
    plain = http(collector.box, "GET", "/tracking.js")
    zipped = http(collector.box, "GET", "/tracking.js", headers={"Accept-Encoding": "br, gzip"})
    assert gzip.decompress(zipped.body) == plain.body
    assert b"sendBeacon" in plain.body
    assert plain.headers.get_content_type() == "text/javascript"
    assert (plain.headers["Content-Encoding"], zipped.headers["Content-Encoding"]) == (None, "gzip")
    assert plain.headers["ETag"] != zipped.headers["ETag"]
    for encoding, answer in [("", plain), ("gzip", zipped)]:
        assert answer.headers["Vary"] == "Accept-Encoding"
        assert "max-age" in answer.headers["Cache-Control"]
        headers = {"Accept-Encoding": encoding, "If-None-Match": f'"other", {answer.headers["ETag"]}'}
        again = http(collector.box, "GET", "/tracking.js", headers=headers)
        assert (again.status, again.body) == (304, b"")
        assert again.headers["ETag"] == answer.headers["ETag"]


@pytest.mark.parametrize("year", ["1994", "0", "9" * 30, "-1"])
def test_the_tracker_is_served_whole_whatever_date_is_asked_about(collector: Collector, year: str) -> None:
    headers = {"If-Modified-Since": f"Mon, 01 Jan {year} 00:00:00 GMT", "Range": "bytes=0-9"}
    answer = http(collector.box, "GET", "/tracking.js", headers={**headers, "If-Range": headers["If-Modified-Since"]})
    assert answer.status == 200
    assert b"sendBeacon" in answer.body


@pytest.mark.parametrize("encoding", ["gzip;q=0", "identity", "br"])
def test_the_tracker_is_not_zipped_for_who_cannot_read_it(collector: Collector, encoding: str) -> None:
    answer = http(collector.box, "GET", "/tracking.js", headers={"Accept-Encoding": encoding})
    assert answer.headers["Content-Encoding"] is None
    assert b"sendBeacon" in answer.body


def test_without_sites_events_of_every_site_are_taken_from_everywhere(
    conninfo: str, tmp_path_factory: pytest.TempPathFactory, visitor: str
) -> None:
    with running(tmp_path_factory.mktemp("open"), database={"url": conninfo}) as box:
        headers = {"Content-Type": "text/plain", "Origin": "https://any.example"}
        answer = http(box, "POST", "/collect", json.dumps(event(visitor, siteId="any")).encode(), headers)
    assert (answer.status, answer.json) == (200, accepted(1))
    assert answer.headers["Access-Control-Allow-Origin"] == "https://any.example"
