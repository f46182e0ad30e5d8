"""The counters say what events_log holds without ever counting it."""

from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import make_event, store_events
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.collect.inbox import Inbox
from appliance.store import counters, overview, sealing
from appliance.store.database import Database

Conn = psycopg.Connection[Any]

PLAN = sealing.Plan(
    job="acme",
    format="jsonl",
    compression="gzip",
    object_rows=1000,
    object_bytes=10**6,
    batch_rows=1000,
    schema_version=1,
    buckets={"b": ""},
)


def totals(conn: Conn) -> dict[str, int]:
    return {site.site_id: site.total for site in counters.per_site(conn)}


def test_counts_equal_rows_whatever_was_new_sent_twice_or_refused(inbox: Inbox, conn: Conn) -> None:
    old = [make_event(site_id=site) for site in ("shop", "blog", "shop")]
    bad = make_event(raw_event_data="{")
    inbox.store(old)
    inbox.store([*old, make_event()])
    inbox.store(
        [bad, old[0], make_event(site_id="blog"), make_event(site_id="news"), make_event(event_id=old[1].event_id)]
    )
    inbox.store([bad])
    inbox.store(old)
    rows = conn.execute("SELECT site_id, count(*) FROM events_log GROUP BY site_id").fetchall()
    assert totals(conn) == dict(rows) == {"shop": 3, "blog": 2, "news": 1}


def test_last_hour_and_last_day_count_by_arrival(conn: Conn) -> None:
    for age, events in [("5 minutes", 1), ("61 minutes", 2), ("23 hours", 4), ("25 hours", 8), ("400 days", 16)]:
        conn.execute("INSERT INTO event_counts VALUES (now() - %s::interval, 'shop', %s, 1)", (age, events))
    (site,) = counters.per_site(conn)
    assert (site.total, site.last_hour, site.last_day) == (31, 1, 7)


@pytest.mark.parametrize("duplicate", [UUID(int=2**128 - 1), UUID(int=0)], ids=["last", "first"])
def test_a_count_names_no_id_beyond_its_rows(inbox: Inbox, conn: Conn, duplicate: UUID) -> None:
    inbox.store([make_event(event_id=duplicate)])
    inbox.store([make_event(event_id=UUID(int=1000)), make_event(event_id=duplicate)])
    row = conn.execute("SELECT (SELECT max(last_id) FROM event_counts), max(id) FROM events_log").fetchone()
    assert row
    assert row[0] == row[1]


def test_what_is_sealed_no_longer_counts_as_coming_in(inbox: Inbox, db: Database, conn: Conn) -> None:
    """A duplicate beside the last new event draws an id that no row has: it must not wait for an export for ever."""
    duplicate = make_event(event_id=UUID(int=2**128 - 1))
    inbox.store([duplicate])
    inbox.store([make_event(), duplicate])
    sealing.sync_coverage(conn, {"acme": ["*"]})
    with db.connection() as session:
        sealing.seal_next(session, PLAN)
    (job,) = overview.read(conn).jobs
    assert job.waiting == 2


# ---- merging


def counted(conn: Conn) -> int:
    row = conn.execute("SELECT count(*) FROM event_counts").fetchone()
    return int(row[0]) if row else 0


@pytest.mark.parametrize(
    ("age", "spread", "left"),
    [("1 hour", "1 second", 1), ("3 days 12 hours", "1 minute", 1), ("30 seconds", "0 seconds", 10)],
    ids=["minutes", "hours", "too young"],
)
def test_rows_are_merged_once_they_are_old_enough(conn: Conn, age: str, spread: str, left: int) -> None:
    conn.execute(
        "INSERT INTO event_counts SELECT date_trunc('hour', now()) - %s::interval + n * %s::interval, 'shop', n, n"
        " FROM generate_series(1, 10) n",
        (age, spread),
    )
    if left == 10:
        conn.execute("UPDATE event_counts SET minute = date_trunc('minute', now())")
    counters.merge(conn)
    counters.merge(conn)
    assert counted(conn) == left
    assert totals(conn) == {"shop": 55}


def test_events_that_come_in_while_rows_are_merged_are_counted(db: Database, conn: Conn) -> None:
    conn.execute("INSERT INTO event_counts SELECT now() - interval '1 hour', 'shop', 1, n FROM generate_series(1, 9) n")
    with db.connection() as merging:
        counters.merge(merging)
        store_events(db, 3)
    assert totals(conn) == {"shop": 12}


def test_two_merges_at_once_double_nothing(db: Database, conn: Conn) -> None:
    conn.execute("INSERT INTO event_counts SELECT now() - interval '1 hour', 'shop', 1, n FROM generate_series(1, 9) n")
    with psycopg.connect(db.conninfo) as reader, db.connection() as first:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert totals(reader) == {"shop": 9}
        counters.merge(first)
        first.commit()
        with pytest.raises(psycopg.errors.SerializationFailure):
            counters.merge(reader)
    assert totals(conn) == {"shop": 9}


ages = st.sampled_from(["0 seconds", "30 seconds", "10 minutes", "10 minutes", "2 days", "3 days 5 hours", "9 days"])
rows = st.lists(st.tuples(ages, st.sampled_from(["shop", "blog"]), st.integers(1, 9)), max_size=25)
seals = st.lists(
    st.tuples(st.sampled_from(["shop", "blog", "*"]), st.integers(0, 26)), max_size=3, unique_by=lambda s: s[0]
)


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows, seals=seals)
def test_merging_keeps_totals_and_what_waits_behind_every_seal(
    conn: Conn, rows: list[tuple[str, str, int]], seals: list[tuple[str, int]]
) -> None:
    def state() -> list[Any]:
        per_seal = "SELECT c.site, n.site_id, sum(events) FROM export_coverage c, event_counts n"
        behind = conn.execute(per_seal + " WHERE last_id > sealed_to GROUP BY 1, 2 ORDER BY 1, 2").fetchall()
        return [totals(conn), behind, overview.read(conn).jobs]

    with conn.transaction(force_rollback=True):
        for last_id, (age, site, events) in enumerate(rows, 1):
            values = (age, site, events, last_id)
            conn.execute("INSERT INTO event_counts VALUES (now() - %s::interval, %s, %s, %s)", values)
        for site, sealed_to in seals:
            conn.execute("INSERT INTO export_coverage VALUES ('acme', %s, %s)", (site, sealed_to))
        before = state()
        counters.merge(conn)
        assert state() == before
