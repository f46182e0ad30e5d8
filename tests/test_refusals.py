"""The quarantine: what was refused is kept with its reason, as much of it as is promised, and counted."""

import time
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from conftest import make_event, wait_for

from appliance.collect.refusals import Refusals
from appliance.store import quarantine
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.quarantine import KEPT_PER_KIND, Refused

Conn = psycopg.Connection[Any]


@pytest.fixture
def refusals(db: Database) -> Iterator[Refusals]:
    one = Refusals(db)
    one.start()
    yield one
    one.stop()


def number(conn: Conn, kind: str = "%", *, acknowledged: bool = False) -> int:
    row = conn.execute(
        "SELECT count(*) FROM quarantine WHERE kind LIKE %s AND acknowledged = %s", (kind, acknowledged)
    ).fetchone()
    assert row
    return int(row[0])


def counted(conn: Conn) -> dict[tuple[str, str], int]:
    return {(one.kind, one.site_id): one.number for one in quarantine.counts_of_a_day(conn)}


def refused(kind: str = "body", **other: Any) -> Refused:
    values: dict[str, Any] = {"reason": "no JSON", "site_id": "shop", "content": b"{", "refused_at": datetime.now(UTC)}
    return Refused(kind=kind, **{**values, **other})


# ---- the table


def test_what_was_refused_is_kept_as_it_came(db: Database) -> None:
    moment = datetime.now(UTC)
    entries = [
        refused(content=bytes(range(256)), refused_at=moment),
        refused("event", reason="ünï\ncode", site_id=None, content=None),
        refused("size", content=b""),
    ]
    with db.connection() as conn:
        quarantine.keep(conn, entries)
        found = quarantine.newest(conn, limit=10)
        assert quarantine.newest(conn, limit=1) == found[:1]
        assert quarantine.newest(conn, limit=9, kind="event") == found[1:2]
        assert quarantine.newest(conn, limit=9, site_id="shop", below=found[0].id) == found[2:]
    shown = [Refused(**{one.name: getattr(entry, one.name) for one in fields(Refused)}) for entry in found]
    assert shown == entries[::-1]


def test_of_each_kind_the_newest_are_kept_and_none_pushes_out_another_kind(db: Database, conn: Conn) -> None:
    with db.connection() as one:
        quarantine.keep(one, [refused("rare")])
    for n in range(0, KEPT_PER_KIND + 200, 100):
        with db.connection() as one:
            quarantine.keep(one, [refused("flood", content=b"%d" % (n + m)) for m in range(100)])
    assert number(conn, "rare") == 1
    assert number(conn, "flood") == KEPT_PER_KIND
    newest = conn.execute("SELECT content FROM quarantine WHERE kind = 'flood' ORDER BY id LIMIT 1").fetchone()
    assert newest == (b"200",)


def test_events_that_were_acknowledged_are_never_pushed_out_and_stand_there_once(db: Database, conn: Conn) -> None:
    events = [make_event(event_id=uuid4(), raw_event_data=f'{{"n": {n}}}') for n in range(KEPT_PER_KIND + 10)]
    for _ in range(2):
        with db.connection() as one:
            quarantine.keep_acknowledged(one, [(event, "refused by the table") for event in events])
    for _ in range(2):
        with db.connection() as one:
            quarantine.keep(one, [refused("database") for _ in range(KEPT_PER_KIND)])
    assert number(conn, "database", acknowledged=True) == len(events)
    assert number(conn, "database") == KEPT_PER_KIND
    kept = conn.execute(
        "SELECT reason, site_id, content, refused_at FROM quarantine WHERE event_id = %s", (events[3].event_id,)
    ).fetchone()
    assert kept == ("refused by the table", "shop", b'{"n": 3}', events[3].created_at)


def test_refusals_of_an_hour_add_up_and_the_most_frequent_are_named_first(db: Database) -> None:
    with db.connection() as conn:
        for _ in range(3):
            quarantine.count(conn, [(("body", ""), 2), (("origin", "shop"), 5)])
        found = quarantine.counts_of_a_day(conn)
    assert [(one.kind, one.site_id, one.number) for one in found] == [("origin", "shop", 15), ("body", "", 6)]
    assert all(timedelta(0) <= datetime.now(UTC) - one.last_hour <= timedelta(hours=1) for one in found)


def test_counts_are_told_for_a_day_and_forgotten_after_a_month(db: Database, conn: Conn) -> None:
    for hours, kind in [(2, "today"), (30, "yesterday"), (24 * 31, "long ago")]:
        conn.execute(
            "INSERT INTO refusal_counts VALUES (now() - %s * interval '1 hour', %s, '', 1)",
            (hours, kind),
        )
    with db.connection() as one:
        quarantine.forget_old_counts(one)
    assert list(counted(conn)) == [("today", "")]
    assert conn.execute("SELECT count(*) FROM refusal_counts").fetchone() == (2,)


# ---- the thread that fills it


def test_what_is_noted_stands_in_the_table_a_little_later(refusals: Refusals, conn: Conn) -> None:
    refusals.note("body", "no JSON", content=b"{")
    refusals.note("origin", "not from there", site_id="shop")
    wait_for(lambda: number(conn) == 2, "the quarantine")
    found = conn.execute("SELECT kind, reason, site_id, content FROM quarantine ORDER BY kind").fetchall()
    assert found == [("body", "no JSON", "", b"{"), ("origin", "not from there", "shop", None)]
    assert counted(conn) == {("body", ""): 1, ("origin", "shop"): 1}


def test_of_a_flood_a_few_are_kept_and_all_are_counted(refusals: Refusals, conn: Conn) -> None:
    for n in range(5_000):
        refusals.note("event", f"reason {n}", content=b"x" * 100_000)
    refusals.note("body", "no JSON", content=b"{")
    refusals.note("event", "many at once", site_id="shop", number=7)
    refusals.stop()
    assert counted(conn) == {("event", ""): 5_000, ("event", "shop"): 7, ("body", ""): 1}
    assert 20 <= number(conn, "event") <= 60
    assert number(conn, "body") == 1
    assert conn.execute("SELECT max(length(content)) FROM quarantine").fetchone() == (16_384,)


def test_stopping_writes_what_waits(refusals: Refusals, conn: Conn) -> None:
    refusals.note("body", "no JSON", content=b"{")
    refusals.stop()
    assert number(conn) == 1


def test_one_who_was_never_started_stops(db: Database) -> None:
    Refusals(db).stop()


def test_counts_that_are_old_are_forgotten_without_being_asked(refusals: Refusals, conn: Conn) -> None:
    conn.execute("INSERT INTO refusal_counts VALUES (now() - interval '40 days', 'body', '', 1)")
    refusals.note("body", "no JSON")
    refusals.stop()
    assert conn.execute("SELECT count(*) FROM refusal_counts").fetchone() == (1,)


def lock_out(admin: Conn, name: str) -> None:
    admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))


def test_while_the_database_is_away_refusals_wait_within_bounds_and_none_is_miscounted(
    db: Database, refusals: Refusals, postgres: EmbeddedPostgres, conninfo: str
) -> None:
    name = str(psycopg.conninfo.conninfo_to_dict(conninfo)["dbname"])
    db.ping()
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        lock_out(admin, name)
        refusals.note("body", "the first", content=b"{")
        for n in range(100):
            refusals.note("event", f"reason {n}", content=b"x")
        # Longer than it waits between two attempts.
        time.sleep(3)
        refusals.note("body", "the last", content=b"[")
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    with psycopg.connect(conninfo, autocommit=True) as conn:
        wait_for(lambda: counted(conn), "the quarantine")
        wait_for(lambda: number(conn, "body") == 2, "what waited")
        assert counted(conn) == {("body", ""): 2, ("event", ""): 100}
        assert number(conn, "event") == 20


def test_before_the_schema_is_there_refusals_wait(refusals: Refusals, conn: Conn) -> None:
    conn.execute("ALTER TABLE quarantine RENAME TO later")
    refusals.note("body", "no JSON", content=b"{")
    time.sleep(2.5)
    conn.execute("ALTER TABLE later RENAME TO quarantine")
    wait_for(lambda: number(conn) == 1, "the quarantine")
    assert counted(conn) == {("body", ""): 1}
