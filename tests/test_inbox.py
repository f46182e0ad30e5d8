"""Group commit: an answer means that rows are committed once, whatever else is in the group or happens to it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from conftest import make_event, make_inbox, start_inbox, wait_for

from appliance.collect import recent
from appliance.collect.commit import Committer
from appliance.collect.inbox import Inbox, InboxFullError
from appliance.errors import DatabaseUnavailableError
from appliance.store import events as events_store
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.events import Event

Conn = psycopg.Connection[Any]


def stored_ids(conn: Conn) -> list[UUID]:
    return [row[0] for row in conn.execute("SELECT event_id FROM events_log ORDER BY id")]


def end_connections(conn: Conn) -> None:
    conn.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


def test_events_are_committed_before_the_answer(inbox: Inbox, conn: Conn) -> None:
    events = [make_event() for _ in range(5)]
    result = inbox.store(events)
    assert result.new == frozenset(range(5))
    assert set(stored_ids(conn)) == {event.event_id for event in events}


def test_every_column_holds_what_was_handed_in(inbox: Inbox, conn: Conn) -> None:
    text = "\\ \t \n \\N 'quoted' \x01 😀"
    event = make_event(
        url=text, path=text, session_id=None, visitor_id="", user_agent="\\.", raw_event_data='{"a":"\\\\n"}'
    )
    inbox.store([event])
    row = conn.execute(
        "SELECT url, path, session_id, visitor_id, user_agent, raw_event_data FROM events_log"
    ).fetchone()
    assert row == (text, text, None, "", "\\.", {"a": "\\n"})


def test_an_event_twice_in_one_request_is_stored_once_and_the_first_wins(inbox: Inbox, conn: Conn) -> None:
    one = make_event(path="/first")
    result = inbox.store([one, make_event(), make_event(event_id=one.event_id, path="/second")])
    assert (result.new, result.refused) == (frozenset({0, 1}), {})
    assert conn.execute("SELECT path FROM events_log WHERE event_id = %s", (one.event_id,)).fetchall() == [("/first",)]


def test_an_event_sent_again_with_other_content_changes_nothing(inbox: Inbox, conn: Conn) -> None:
    one = make_event(path="/first")
    inbox.store([one])
    result = inbox.store([make_event(), make_event(event_id=one.event_id, path="/second"), make_event()])
    assert result.new == frozenset({0, 2})
    assert conn.execute("SELECT path FROM events_log WHERE event_id = %s", (one.event_id,)).fetchall() == [("/first",)]
    assert len(stored_ids(conn)) == 3


def test_an_event_that_was_stored_before_the_appliance_began_is_stored_once(
    inbox: Inbox, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "_IDS", 1)
    one, other = make_event(), make_event()
    for event in (one, other, make_event()):
        inbox.store([event])
    # Only the last one is remembered.
    assert inbox.store([make_event(), make_event(event_id=one.event_id)]).new == {0}
    assert inbox.store([make_event(event_id=other.event_id)]).new == frozenset()
    assert len(stored_ids(conn)) == 4


def test_an_event_that_comes_again_at_once_does_not_keep_its_group_from_being_copied(
    inbox: Inbox, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_event()
    inbox.store([one])
    monkeypatch.delattr(events_store, "insert_new")
    result = inbox.store([make_event(), make_event(event_id=one.event_id), make_event()])
    assert (result.new, result.refused) == (frozenset({0, 2}), {})
    assert inbox.store([make_event(event_id=one.event_id)]).new == frozenset()
    assert len(stored_ids(conn)) == 3
    assert inbox.tally.duplicates == {"shop": 2}


def test_what_the_database_refused_is_not_taken_for_stored(inbox: Inbox) -> None:
    bad = make_event(event_type=None)
    assert [set(inbox.store([make_event(), bad]).refused) for _ in range(2)] == [{1}, {1}]


NOTICED: dict[str, Callable[[Inbox, Database], object]] = {
    "by another event": lambda inbox, _: inbox.store([make_event()]),
    "by another thread": lambda _, db: suppressed(db.ping),
    "by nobody": lambda *_: None,
}


def suppressed(call: Callable[[], object]) -> None:
    with suppress(DatabaseUnavailableError):
        call()


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside a new one"])
@pytest.mark.parametrize("notice", NOTICED.values(), ids=NOTICED)
def test_a_server_that_has_taken_over_without_the_last_commit_is_asked_about_every_event(
    inbox: Inbox, db: Database, conn: Conn, notice: Callable[[Inbox, Database], object], others: int
) -> None:
    """As a standby that lagged behind: what it has lost is stored when a browser sends it again."""
    one = make_event()
    inbox.store([one])
    conn.execute("DELETE FROM events_log")
    end_connections(conn)
    notice(inbox, db)
    assert inbox.store([one, *(make_event() for _ in range(others))]).new == frozenset(range(1 + others))
    assert one.event_id in stored_ids(conn)


def test_behind_a_pooler_a_server_that_has_taken_over_is_asked_too(inbox: Inbox, conn: Conn) -> None:
    """It keeps our connections, and nobody hears of it."""
    one = make_event()
    inbox.store([one])
    conn.execute("DELETE FROM events_log")
    assert inbox.store([make_event(), one]).new == {0, 1}
    assert one.event_id in stored_ids(conn)


REFUSED_ROWS: dict[str, dict[str, Any]] = {
    "no address": {"ip_address": "nowhere"},
    "no JSON": {"raw_event_data": "{"},
    "too long": {"event_type": "x" * 51},
    "a NUL": {"user_agent": "a\x00b"},
    "no type": {"event_type": None},
    "an escaped NUL": {"raw_event_data": '{"a": "\\u0000"}'},
}


@pytest.mark.parametrize("fields", REFUSED_ROWS.values(), ids=REFUSED_ROWS)
def test_a_row_that_the_database_refuses_costs_its_neighbours_nothing(
    inbox: Inbox, conn: Conn, fields: dict[str, Any]
) -> None:
    good = [make_event() for _ in range(9)]
    result = inbox.store([*good[:4], make_event(**fields), *good[4:]])
    assert set(result.refused) == {4}
    assert result.refused[4]
    assert result.new == frozenset({0, 1, 2, 3, 5, 6, 7, 8, 9})
    assert set(stored_ids(conn)) == {event.event_id for event in good}


def test_refused_rows_and_duplicates_in_one_request_are_told_apart(inbox: Inbox, conn: Conn) -> None:
    old = make_event()
    inbox.store([old])
    bad = [make_event(raw_event_data="{") for _ in range(3)]
    result = inbox.store([bad[0], old, make_event(), bad[1], make_event(), bad[2]])
    assert result.new == frozenset({2, 4})
    assert set(result.refused) == {0, 3, 5}
    assert len(stored_ids(conn)) == 3


def test_one_request_never_pays_for_another_in_its_group(inbox: Inbox, conn: Conn) -> None:
    requests = [[make_event(raw_event_data="{" if n % 4 == 0 else "{}") for _ in range(3)] for n in range(40)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(inbox.store, requests))
    for n, result in enumerate(results):
        assert (len(result.new), len(result.refused)) == ((0, 3) if n % 4 == 0 else (3, 0))
    assert len(stored_ids(conn)) == 90


def test_an_id_that_many_send_at_once_is_new_for_exactly_one(inbox: Inbox, conn: Conn) -> None:
    ids = [uuid4() for _ in range(30)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda _: inbox.store([make_event(event_id=one) for one in ids]), range(20)))
    claimed = sorted(position for result in results for position in result.new)
    assert claimed == list(range(30))
    assert sorted(stored_ids(conn)) == sorted(ids)


def test_two_appliances_that_get_the_same_ids_in_opposite_order_lose_nothing(
    inbox: Inbox, db: Database, conn: Conn, tmp_path: Path
) -> None:
    other = start_inbox(make_inbox(db, tmp_path))
    ids = [uuid4() for _ in range(400)]

    def send(box: Inbox, order: list[UUID]) -> int:
        parts = [order[n : n + 40] for n in range(0, len(order), 40)]
        return sum(len(box.store([make_event(event_id=one) for one in part]).new) for part in parts)

    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(send, [inbox, other], [ids, ids[::-1]]))
    other.close()
    assert sum(counts) == 400
    assert sorted(stored_ids(conn)) == sorted(ids)


# ---- when the database fails


def test_a_restart_of_the_database_costs_no_event(inbox: Inbox, conn: Conn) -> None:
    inbox.store([make_event()])
    end_connections(conn)
    assert inbox.store([make_event(), make_event()]).new == frozenset({0, 1})
    assert len(stored_ids(conn)) == 3


@pytest.fixture
def at_commit(conn: Conn) -> Callable[[str], None]:
    """Make every commit of an event run a statement first."""

    def install(statement: str) -> None:
        conn.execute("CREATE SEQUENCE attempts")
        conn.execute(
            f"CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {statement}; RETURN NULL; END $$;"
            " CREATE CONSTRAINT TRIGGER trouble AFTER INSERT ON events_log DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION trouble()"
        )

    return install


def test_a_connection_lost_while_committing_loses_nothing_and_doubles_nothing(
    inbox: Inbox, conn: Conn, at_commit: Callable[[str], None]
) -> None:
    at_commit("IF nextval('attempts') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF")
    assert inbox.store([make_event() for _ in range(3)]).new == frozenset({0, 1, 2})
    assert len(stored_ids(conn)) == 3


@pytest.mark.parametrize("state", ["XX000", "53100", "40P01", "57014", "0A000", "P0001"])
def test_a_failure_that_blames_no_row_sends_events_to_the_spool_and_later_to_the_table(
    inbox: Inbox, conn: Conn, at_commit: Callable[[str], None], state: str
) -> None:
    at_commit(f"RAISE EXCEPTION 'trouble' USING ERRCODE = '{state}'")
    event = make_event()
    stored = inbox.store([event])
    assert (stored.new, stored.refused, stored.spooled) == (frozenset({0}), {}, True)
    assert stored_ids(conn) == []
    conn.execute("DROP FUNCTION trouble CASCADE")
    wait_for(lambda: stored_ids(conn) == [event.event_id], "the spool to be drained")
    wait_for(lambda: not inbox.store([make_event()]).spooled, "events to go to the table again")


def test_a_check_that_a_user_added_refuses_its_rows_alone(inbox: Inbox, conn: Conn) -> None:
    conn.execute("ALTER TABLE events_log ADD CHECK (event_type <> 'poison')")
    result = inbox.store([make_event(event_type="poison" if n in {3, 7} else "x") for n in range(10)])
    assert set(result.refused) == {3, 7}
    assert len(stored_ids(conn)) == 8


def test_without_a_schema_events_wait_in_the_spool(inbox: Inbox, conn: Conn) -> None:
    conn.execute("ALTER TABLE events_log RENAME TO elsewhere")
    event = make_event()
    assert inbox.store([event]).spooled
    conn.execute("ALTER TABLE elsewhere RENAME TO events_log")
    wait_for(lambda: stored_ids(conn) == [event.event_id], "the spool to be drained")


# ---- its end, and its limit


def test_what_waits_at_the_end_is_stored_and_what_comes_later_is_refused(
    db: Database, conn: Conn, tmp_path: Path
) -> None:
    inbox = make_inbox(db, tmp_path)
    with ThreadPoolExecutor(10) as pool:
        waiting = [pool.submit(inbox.store, [make_event()]) for _ in range(10)]
        wait_for(lambda: len(inbox._waiting) == 10, "all to wait")  # noqa: SLF001 - nothing else shows it
        start_inbox(inbox).close()
        assert all(future.result().new == frozenset({0}) for future in waiting)
    assert len(stored_ids(conn)) == 10
    with pytest.raises(InboxFullError):
        inbox.store([make_event()])


def test_a_full_inbox_refuses_at_once_and_takes_events_again_later(db: Database, conn: Conn, tmp_path: Path) -> None:
    inbox, crowd = make_inbox(db, tmp_path), [make_event() for _ in range(10_000)]
    threads = [threading.Thread(target=inbox.store, args=(part,)) for part in (crowd[:5000], crowd[5000:], crowd)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(inbox._waiting) == 3, "the inbox to fill")  # noqa: SLF001 - nothing else shows it
    with pytest.raises(InboxFullError):
        inbox.store([make_event()])
    start_inbox(inbox)
    for thread in threads:
        thread.join()
    inbox.store([make_event()])
    inbox.close()
    assert len(stored_ids(conn)) == 10_001


def test_no_events_at_all_are_no_trouble(inbox: Inbox, conn: Conn) -> None:
    assert inbox.store([]).new == frozenset()
    assert inbox.store([make_event()]).new == frozenset({0})
    assert len(stored_ids(conn)) == 1


def large() -> Event:
    return make_event(raw_event_data='{"n": "' + "x" * 60_000 + '"}')


def test_groups_are_no_larger_than_memory_allows_and_lose_nothing(
    db: Database, conn: Conn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    copy_in = events_store.copy_in

    def noting(conn: Any, events: Any) -> None:
        sizes.append(sum(event.chars for event in events))
        copy_in(conn, events)

    monkeypatch.setattr(events_store, "copy_in", noting)
    inbox = start_inbox(make_inbox(db, tmp_path))
    events = [large() for _ in range(100)]
    with ThreadPoolExecutor(100) as clients:
        list(clients.map(inbox.store, [[event] for event in events]))
    assert len(stored_ids(conn)) == 100
    assert max(sizes) <= 2_000_000 < sum(sizes)
    # One request alone may be larger than a group.
    assert len(inbox.store([large() for _ in range(50)]).new) == 50
    inbox.close()


def test_what_waits_takes_no_more_memory_than_allowed(db: Database, tmp_path: Path) -> None:
    inbox = make_inbox(db, tmp_path)
    outcomes: list[Any] = []
    # Nobody takes anything out of it yet.
    for _ in range(700):
        inbox.submit([large()], outcomes.append)
    assert 32_000_000 / 60_050 - 1 <= 700 - len(outcomes) <= 32_000_000 / 60_000
    assert {type(outcome) for outcome in outcomes} == {InboxFullError}


def test_a_try_that_was_given_up_leaves_no_connection_that_waits_for_a_lock(
    db: Database, conn: Conn, conninfo: str
) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with psycopg.connect(conninfo) as other:
        other.execute("LOCK TABLE events_log IN SHARE MODE")
        with pytest.raises(DatabaseUnavailableError):
            Committer(db).store([make_event()], within_seconds=0.5)
        wait_for(lambda: conn.execute(waiting).fetchone() == (0,), "it to notice")


def test_events_that_come_again_leave_no_line_in_the_log_of_the_embedded_database(
    inbox: Inbox, conn: Conn, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "_IDS", 1)
    events = [make_event() for _ in range(3)]

    def logged() -> int:
        return sum(path.read_text().count("duplicate key") for path in (postgres.cluster / "log").iterdir())

    before = logged()
    for _ in range(2):
        for event in events:
            inbox.store([event])
    with pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute("INSERT INTO export_marks (site) VALUES ('x'), ('x')")
    # The last of them, which shows that the log has been written so far.
    wait_for(lambda: logged() > before, "the log")
    assert logged() == before + 1
