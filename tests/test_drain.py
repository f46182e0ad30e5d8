"""What the spool holds reaches the table, in whatever state the database is and whatever it thinks of single events."""

import random
import string
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import make_event, make_inbox, start_inbox, wait_for

from appliance.collect import salvage
from appliance.collect.commit import Committer
from appliance.collect.inbox import Inbox, InboxFullError
from appliance.collect.salvage import Salvage
from appliance.collect.spool import Spool
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.events import Event

Conn = psycopg.Connection[Any]


def number_stored(conn: Conn) -> int:
    row = conn.execute("SELECT count(*) FROM events_log").fetchone()
    return int(row[0]) if row else 0


def quarantined(conn: Conn) -> list[tuple[Any, ...]]:
    return conn.execute("SELECT kind, site_id, acknowledged, event_id, reason FROM quarantine ORDER BY id").fetchall()


@pytest.fixture
def refuse(conn: Conn) -> Callable[[str], None]:
    """Make the database fail for some events, in a way that blames no row."""

    def install(condition: str) -> None:
        conn.execute(
            f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {condition} THEN"
            " RAISE EXCEPTION 'no such events'; END IF; RETURN NEW; END $$;"
            " CREATE TRIGGER refuse BEFORE INSERT ON events_log FOR EACH ROW EXECUTE FUNCTION refuse()"
        )

    return install


def test_events_that_came_before_the_database_are_stored_in_their_order(
    db: Database, conn: Conn, tmp_path: Path
) -> None:
    inbox = make_inbox(db, tmp_path)
    inbox.start()
    # Ids of one time are in the order of their time (UUIDv7), and rows go in by their ids.
    events = [make_event(path=f"/{number}", event_id=UUID(int=number)) for number in range(30)]
    assert all(inbox.store([event]).spooled for event in events)
    assert number_stored(conn) == 0
    inbox.use_database()
    wait_for(lambda: number_stored(conn) == 30, "the spool to be drained")
    assert [row[0] for row in conn.execute("SELECT path FROM events_log ORDER BY id")] == [e.path for e in events]
    wait_for(lambda: not inbox.store([make_event()]).spooled, "events to go to the table")
    inbox.close()


def test_small_groups_are_stored_together_and_of_an_event_sent_twice_the_first_wins(
    db: Database, conn: Conn, tmp_path: Path
) -> None:
    inbox = make_inbox(db, tmp_path)
    inbox.start()
    events = [make_event(path="/first") for _ in range(1_500)]
    for event in events:
        inbox.store([event])
        inbox.store([replace(event, path="/second")])
    inbox.use_database()
    wait_for(lambda: number_stored(conn) == 1_500, "the spool to be drained")
    assert conn.execute("SELECT DISTINCT path FROM events_log").fetchall() == [("/first",)]
    (transactions,) = conn.execute("SELECT count(DISTINCT xmin::text) FROM events_log").fetchone() or (0,)
    assert transactions <= 4
    inbox.close()


def test_arrival_times_and_ids_are_those_of_the_arrival(db: Database, conn: Conn, tmp_path: Path) -> None:
    inbox = make_inbox(db, tmp_path)
    inbox.start()
    event = make_event()
    inbox.store([event])
    time.sleep(0.2)
    inbox.use_database()
    wait_for(lambda: number_stored(conn) == 1, "the spool to be drained")
    row = conn.execute("SELECT event_id, created_at, timestamp FROM events_log").fetchone()
    assert row == (event.event_id, event.created_at, event.timestamp)
    inbox.close()


def test_an_event_that_was_stored_before_it_was_spooled_again_is_there_once(
    db: Database, conn: Conn, tmp_path: Path
) -> None:
    first = start_inbox(make_inbox(db, tmp_path))
    events = [make_event() for _ in range(3)]
    first.store(events)
    first.close()
    second = make_inbox(db, tmp_path)
    second.start()
    second.store([*events, make_event()])
    second.use_database()
    wait_for(lambda: number_stored(conn) == 4, "the spool to be drained")
    second.close()
    assert number_stored(conn) == 4


def test_rows_that_the_table_refuses_go_to_the_quarantine_and_their_neighbours_to_the_table(
    db: Database, conn: Conn, tmp_path: Path
) -> None:
    inbox = make_inbox(db, tmp_path)
    inbox.start()
    bad = make_event(ip_address="nowhere", raw_event_data='{"n": 1}')
    assert inbox.store([make_event(), bad, make_event()]).spooled
    inbox.use_database()
    wait_for(lambda: number_stored(conn) == 2, "the spool to be drained")
    ((kind, site, acknowledged, event_id, reason),) = wait_for(lambda: quarantined(conn), "the quarantine")
    assert (kind, site, acknowledged, event_id) == ("database", "shop", True, bad.event_id)
    assert "inet" in reason
    inbox.close()


def test_an_event_that_fails_among_others_that_do_not_is_put_aside(
    inbox: Inbox, conn: Conn, refuse: Callable[[str], None]
) -> None:
    refuse("NEW.event_type = 'poison'")
    poison = make_event(event_type="poison")
    assert inbox.store([make_event(), poison, make_event()]).spooled
    wait_for(lambda: number_stored(conn) == 2, "the spool to be drained")
    assert [row[3] for row in wait_for(lambda: quarantined(conn), "the quarantine")] == [poison.event_id]


def test_an_event_that_fails_alone_is_put_aside_once_others_have_come_through(
    inbox: Inbox, conn: Conn, refuse: Callable[[str], None]
) -> None:
    refuse("NEW.event_type = 'poison'")
    poison = make_event(event_type="poison")
    assert inbox.store([poison]).spooled
    time.sleep(1)
    assert quarantined(conn) == []
    wait_for(lambda: not inbox.store([make_event()]).spooled, "other events to be stored")
    assert [row[3] for row in wait_for(lambda: quarantined(conn), "the quarantine")] == [poison.event_id]


@pytest.mark.parametrize(("number", "times"), [(50, 1), (5, 1), (5, 2)], ids=["many", "few", "few, sent twice"])
def test_while_every_event_fails_all_of_them_are_kept_in_the_spool(  # noqa: PLR0913, PLR0917
    db: Database, conn: Conn, tmp_path: Path, refuse: Callable[[str], None], number: int, times: int
) -> None:
    refuse("true")
    inbox = make_inbox(db, tmp_path)
    inbox.start()
    events = [make_event() for _ in range(number)]
    assert all(inbox.store(events).spooled for _ in range(times))
    inbox.use_database()
    assert inbox.store([make_event() for _ in range(5)]).spooled
    time.sleep(1)
    assert (number_stored(conn), quarantined(conn)) == (0, [])
    conn.execute("DROP FUNCTION refuse CASCADE")
    wait_for(lambda: number_stored(conn) == number + 5, "the spool to be drained")
    assert quarantined(conn) == []
    inbox.close()


def test_a_full_spool_refuses_events_and_takes_them_again_when_there_is_room(
    db: Database, conn: Conn, tmp_path: Path
) -> None:
    inbox = Inbox(db, Spool(tmp_path / "spool", max_bytes=20_000))
    inbox.start()
    taken = 0
    with pytest.raises(InboxFullError, match="full"):  # noqa: PT012 - how many fit is what is asked
        while taken < 1000:
            inbox.store([make_event()])
            taken += 1
    assert taken > 10
    inbox.use_database()
    wait_for(lambda: number_stored(conn) == taken, "the spool to be drained")
    assert inbox.store([make_event()]).new == frozenset({0})
    inbox.close()


def test_a_lock_that_somebody_holds_on_the_table_sends_events_to_the_spool(
    inbox: Inbox, conn: Conn, conninfo: str
) -> None:
    with psycopg.connect(conninfo) as other:
        other.execute("LOCK TABLE events_log IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        assert inbox.store([make_event()]).spooled
        # Two seconds are given to the database; after that nobody waits for it.
        assert 1.5 < time.monotonic() - started < 8
        started = time.monotonic()
        assert all(inbox.store([make_event()]).spooled for _ in range(20))
        assert time.monotonic() - started < 2
    wait_for(lambda: number_stored(conn) == 21, "the spool to be drained")


def test_a_database_that_is_gone_for_good_keeps_nobody_waiting(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    with Database(psycopg.conninfo.make_conninfo(postgres.conninfo, dbname="there_is_none")) as db:
        inbox = make_inbox(db, tmp_path)
        inbox.start()
        inbox.use_database()
        assert all(inbox.store([make_event()]).spooled for _ in range(5))
        started = time.monotonic()
        inbox.close()
        assert time.monotonic() - started < 8


def test_what_the_server_cannot_do_for_one_event_costs_no_other(db: Database, conn: Conn, tmp_path: Path) -> None:
    """An index of one's own has a largest key: an error of the statement, which names no row."""
    conn.execute("CREATE INDEX ON events_log (url)")
    inbox = start_inbox(make_inbox(db, tmp_path))
    poison = make_event(url="".join(random.choices(string.ascii_letters, k=9_000)))  # noqa: S311 - no secret
    neighbours = [make_event() for _ in range(5)]
    assert inbox.store([*neighbours, poison]).spooled
    assert not inbox.database_away
    wait_for(lambda: inbox.store([make_event()]) and number_stored(conn) >= 6, "events beside the spool")
    ((_, _, acknowledged, event_id, reason),) = wait_for(lambda: quarantined(conn), "the quarantine")
    assert (acknowledged, event_id) == (True, poison.event_id)
    assert "index row" in reason
    wait_for(lambda: not inbox.store([make_event()]).spooled, "events to go to the table")
    stored = {row[0] for row in conn.execute("SELECT event_id FROM events_log")}
    assert {event.event_id for event in neighbours} <= stored
    inbox.close()


def too_long_for_an_index(number: int) -> list[Event]:
    """Events of which each fails for itself, in a way that blames no row, and the ids of which follow each other."""
    url = "".join(random.choices(string.ascii_letters, k=9_000))  # noqa: S311 - no secret
    return [make_event(event_id=UUID(int=n + 1), url=url) for n in range(number)]


def test_many_events_that_fail_in_a_row_cost_no_other_and_are_put_aside_once_others_come_through(
    db: Database, conn: Conn, tmp_path: Path
) -> None:
    conn.execute("CREATE INDEX ON events_log (url)")
    inbox = make_inbox(db, tmp_path)
    inbox.start()
    poison = too_long_for_an_index(40)
    good = [make_event() for _ in range(3)]
    for events in ([good[0]], poison, [good[1]]):
        assert inbox.store(events).spooled
    inbox.use_database()
    wait_for(lambda: not inbox.store([make_event()]).spooled, "events to go to the table")
    assert inbox.store([good[2], *too_long_for_an_index(1)]).spooled
    wait_for(lambda: len(quarantined(conn)) == 40, "the quarantine")
    assert {row[3] for row in quarantined(conn)} == {event.event_id for event in poison}
    ids = [event.event_id for event in good]
    there = "SELECT count(*) FROM events_log WHERE event_id = ANY(%s)"
    wait_for(lambda: conn.execute(there, (ids,)).fetchone() == (3,), "the spool to be drained")
    inbox.close()


def test_a_lock_that_comes_and_goes_puts_nothing_aside(conn: Conn, conninfo: str, tmp_path: Path) -> None:
    """Where each statement fails at once (lock_timeout), many have failed before others are stored."""
    with Database(psycopg.conninfo.make_conninfo(conninfo, options="-c lock_timeout=100ms")) as db:
        inbox = make_inbox(db, tmp_path)
        inbox.start()
        for _ in range(10):
            inbox.store([make_event() for _ in range(50)])
        with psycopg.connect(conninfo) as other:
            other.execute("LOCK TABLE events_log IN SHARE MODE")
            inbox.use_database()
            time.sleep(4)
        wait_for(lambda: number_stored(conn) == 500, "the spool to be drained")
        inbox.close()
    assert quarantined(conn) == []


def test_an_event_that_was_sent_twice_and_fails_only_at_first_is_stored(db: Database, conn: Conn) -> None:
    committer, event, good = Committer(db), make_event(), make_event()
    attempt = Salvage(committer, others_are_stored=False)
    attempt._store([good])  # noqa: SLF001 - the lock that has come and gone since
    attempt._outcome.stuck[event.event_id] = "a lock"  # noqa: SLF001
    attempt._try_again([event, event])  # noqa: SLF001
    assert attempt._outcome.stuck == {}  # noqa: SLF001
    assert number_stored(conn) == 2


def test_each_event_that_fails_alone_waits_for_others_to_come_through(
    inbox: Inbox, conn: Conn, refuse: Callable[[str], None]
) -> None:
    refuse("NEW.event_type = 'poison'")
    assert inbox.store([make_event(event_type="poison")]).spooled
    wait_for(lambda: inbox.store([make_event()]) and quarantined(conn), "the quarantine")
    assert inbox.store([make_event(event_type="poison")]).spooled
    time.sleep(1)
    assert len(quarantined(conn)) == 1


def test_ids_that_are_taken_are_no_fault_of_the_events(
    inbox: Inbox, conn: Conn, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a copy by hand, which leaves the sequence behind."""
    for _ in range(30):
        inbox.store([make_event()])
    conn.execute("ALTER SEQUENCE events_log_id_seq RESTART WITH 1")
    good = [make_event() for _ in range(5)]
    assert inbox.store(good).spooled
    wait_for(lambda: "SELECT setval" in caplog.text, "what can be done")
    conn.execute("SELECT setval(pg_get_serial_sequence('events_log', 'id'), max(id)) FROM events_log")
    wait_for(lambda: number_stored(conn) == 35, "the spool to be drained")
    assert quarantined(conn) == []


def test_what_takes_longer_than_a_statement_may_is_stored_in_parts(
    db: Database, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END $$;"
        " CREATE TRIGGER dawdle BEFORE INSERT ON events_log FOR EACH ROW EXECUTE FUNCTION dawdle()"
    )
    events = [make_event() for _ in range(40)]
    monkeypatch.setattr(salvage, "STATEMENT_SECONDS", 1)
    outcome = Salvage(Committer(db), others_are_stored=False).store(events)
    # One that was cut off in its commit is stored all the same, and its events are duplicates then.
    assert (outcome.refused, outcome.stuck) == ({}, {})
    assert number_stored(conn) == 40


def test_a_spool_file_that_cannot_be_read_keeps_nothing_else_back(db: Database, conn: Conn, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000)
    (tmp_path / "spool" / "000000000001.journal").mkdir(parents=True)
    inbox = Inbox(db, spool)
    inbox.start()
    assert inbox.store([make_event()]).spooled
    inbox.use_database()
    wait_for(lambda: not inbox.store([make_event()]).spooled, "events to go to the table")
    wait_for(lambda: spool.empty, "the spool to be drained")
    assert number_stored(conn) >= 2
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["000000000001.damaged"]
    inbox.close()
