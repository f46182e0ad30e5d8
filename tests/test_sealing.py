"""Sealing takes no table lock, and yet a row that commits late is never skipped and never sealed twice."""

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import psycopg
import pytest
from conftest import store_events, wait_for

from appliance.store import ledger, sealing
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.ranges import where

INSERT = (
    "INSERT INTO events_log (event_id, event_type, site_id, timestamp, raw_event_data)"
    " VALUES (gen_random_uuid(), 'late', 'shop', now(), '{}') RETURNING id"
)
PATIENT = 60.0


def seal(
    db: Database, *, patience: float = 0, batch_rows: int = 1000, batch_bytes: int = 2**40, job: str = "acme"
) -> Any:
    plan = sealing.Plan(
        job=job,
        format="jsonl",
        compression="gzip",
        object_rows=1000,
        object_bytes=1000,
        batch_rows=batch_rows,
        batch_bytes=batch_bytes,
        schema_version=1,
        buckets={"client": "raw"},
    )
    with db.connection() as conn:
        sealed = sealing.seal_next(conn, plan, patience_seconds=patience)
    return sealed.key if isinstance(sealed, sealing.Sealed) else sealed


@pytest.fixture(autouse=True)
def _covered(db: Database) -> None:
    with db.connection() as conn:
        sealing.sync_coverage(conn, {"acme": ["shop"]})


def rows_of(conn: psycopg.Connection[Any], key: object) -> list[int]:
    assert isinstance(key, ledger.Key), key
    query = psycopg.sql.SQL("SELECT id FROM events_log e WHERE {} ORDER BY id")
    found = [row[0] for row in conn.execute(query.format(where(ledger.load(conn, key).ranges)))]
    assert len(found) == ledger.load(conn, key).row_count, "rows came to a batch after it was sealed"
    return found


def batches(conn: psycopg.Connection[Any], job: str = "acme") -> list[list[int]]:
    keys = conn.execute("SELECT job, sequence FROM export_batches WHERE job = %s ORDER BY sequence", (job,)).fetchall()
    return [rows_of(conn, ledger.Key(*key)) for key in keys]


def sealed_rows(conn: psycopg.Connection[Any], job: str = "acme") -> list[int]:
    return list(chain.from_iterable(batches(conn, job)))


def all_ids(conn: psycopg.Connection[Any]) -> list[int]:
    return [row[0] for row in conn.execute("SELECT id FROM events_log ORDER BY id")]


def sealed_to(conn: psycopg.Connection[Any], site: str = "shop") -> int:
    row = conn.execute("SELECT sealed_to FROM export_coverage WHERE site = %s", (site,)).fetchone()
    assert row is not None
    return int(row[0])


@contextmanager
def writer(conninfo: str, statement: str = INSERT) -> Iterator[psycopg.Connection[Any]]:
    """Hold a transaction open that has written."""
    with psycopg.connect(conninfo, application_name="dawdler") as conn:
        conn.execute(statement)
        yield conn


@contextmanager
def sealing_waits(db: Database, conn: psycopg.Connection[Any]) -> Iterator[Future[Any]]:
    """Seal in a thread that is waiting for the writers it has met."""
    looks = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE %s AND pid <> %s"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(seal, db, patience=PATIENT)
        wait_for(lambda: conn.execute(looks, ("%pg_locks%", conn.info.backend_pid)).fetchone(), "the sealer to wait")
        yield future


def test_a_row_that_commits_late_goes_into_a_later_batch(
    db: Database, conn: psycopg.Connection[Any], conninfo: str
) -> None:
    store_events(db, 2)
    assert rows_of(conn, seal(db)) == [1, 2]
    with writer(conninfo) as late:
        store_events(db, 2)
        assert isinstance(seal(db), sealing.Nothing)
        assert sealed_to(conn) == 2
        late.commit()
    assert rows_of(conn, seal(db)) == [3, 4, 5]


def test_a_transaction_that_rolls_back_leaves_only_a_gap(
    db: Database, conn: psycopg.Connection[Any], conninfo: str
) -> None:
    with writer(conninfo) as late:
        store_events(db, 1)
        late.rollback()
    assert rows_of(conn, seal(db)) == [2]


def test_an_open_transaction_is_named_with_its_process(db: Database, conninfo: str) -> None:
    with writer(conninfo) as late:
        store_events(db, 1)
        (blocker,) = seal(db).blockers
        assert (blocker.pid, blocker.application) == (late.info.backend_pid, "dawdler")
        assert f"process {late.info.backend_pid} (dawdler)" in str(blocker)


@contextmanager
def prepared_writer(conninfo: str, name: str) -> Iterator[psycopg.Connection[Any]]:
    """Hold a transaction open that can be prepared; its name is free again afterwards."""
    with psycopg.connect(conninfo, autocommit=True) as late:
        late.execute("BEGIN")
        late.execute(INSERT)
        try:
            yield late
        finally:
            with suppress(psycopg.errors.UndefinedObject):
                late.execute(f"ROLLBACK PREPARED '{name}'")


def test_a_prepared_transaction_blocks_and_is_named(db: Database, conn: psycopg.Connection[Any], conninfo: str) -> None:
    with prepared_writer(conninfo, "forgotten") as late:
        late.execute("PREPARE TRANSACTION 'forgotten'")
        store_events(db, 1)
        (blocker,) = seal(db).blockers
        assert blocker.pid is None
        conn.execute("COMMIT PREPARED 'forgotten'")
        assert rows_of(conn, seal(db)) == [1, 2]
        assert "prepared transaction forgotten" in str(blocker)


def test_a_transaction_that_prepares_while_the_sealer_waits_is_still_waited_for(
    db: Database, conn: psycopg.Connection[Any], conninfo: str
) -> None:
    looked_again = "SELECT 1 FROM pg_stat_activity WHERE query LIKE %s AND query_start > %s AND pid <> %s"
    with prepared_writer(conninfo, "slow") as late:
        store_events(db, 1)
        with sealing_waits(db, conn) as future:
            late.execute("PREPARE TRANSACTION 'slow'")
            (now,) = conn.execute("SELECT clock_timestamp()").fetchone() or (None,)
            values = ("%pg_locks%", now, conn.info.backend_pid)
            wait_for(lambda: future.done() or conn.execute(looked_again, values).fetchone(), "the sealer to look again")
            conn.execute("COMMIT PREPARED 'slow'")
            future.result()
    seal(db)
    assert sorted(sealed_rows(conn)) == all_ids(conn) == [1, 2]


def test_a_writer_that_ends_in_time_is_waited_for(db: Database, conn: psycopg.Connection[Any], conninfo: str) -> None:
    with writer(conninfo) as late:
        store_events(db, 1)
        with sealing_waits(db, conn) as future:
            late.commit()
            assert rows_of(conn, future.result()) == [1, 2]


def test_sealing_waits_for_the_writers_it_met_and_not_for_later_ones(
    db: Database, conn: psycopg.Connection[Any], conninfo: str
) -> None:
    with writer(conninfo) as early:
        store_events(db, 1)
        with sealing_waits(db, conn) as future, writer(conninfo) as later:
            early.commit()
            assert rows_of(conn, future.result()) == [1, 2]
            later.commit()
    assert rows_of(conn, seal(db)) == [3]


def test_a_stricter_isolation_set_as_the_database_default_skips_no_late_row(
    conninfo: str, conn: psycopg.Connection[Any]
) -> None:
    conn.execute(f"ALTER DATABASE {conn.info.dbname} SET default_transaction_isolation = 'repeatable read'")
    with Database(conninfo) as db:
        with writer(conninfo) as late:
            store_events(db, 1)
            with sealing_waits(db, conn):
                late.commit()
        seal(db)
        assert sorted(sealed_rows(conn)) == all_ids(conn) == [1, 2]


@pytest.mark.parametrize(
    ("statement", "blocks"),
    [
        pytest.param(INSERT, True, id="insert"),
        pytest.param("UPDATE events_log SET exported_at = NULL", True, id="update"),
        pytest.param("DELETE FROM events_log WHERE false", True, id="delete"),
        pytest.param("SAVEPOINT a; LOCK events_log IN EXCLUSIVE MODE; " + INSERT, True, id="insert under a lock"),
        pytest.param("SELECT * FROM events_log", False, id="select"),
        pytest.param("SELECT * FROM events_log FOR UPDATE", False, id="select for update"),
        pytest.param("LOCK events_log IN SHARE UPDATE EXCLUSIVE MODE", False, id="the lock of a VACUUM"),
        pytest.param("LOCK events_log IN SHARE MODE", False, id="the lock of CREATE INDEX"),
        pytest.param("DELETE FROM event_counts", False, id="another table"),
    ],
)
def test_only_those_who_write_events_block(
    db: Database, conn: psycopg.Connection[Any], conninfo: str, statement: str, *, blocks: bool
) -> None:
    store_events(db, 1)
    with writer(conninfo, statement):
        sealed = seal(db)
        assert isinstance(sealed, sealing.Nothing) == blocks
        assert bool(batches(conn)) != blocks


def test_a_vacuum_that_runs_does_not_block(db: Database, conn: psycopg.Connection[Any], conninfo: str) -> None:
    store_events(db, 500)
    conn.execute("DELETE FROM events_log WHERE id < 400")
    running = "SELECT 1 FROM pg_stat_progress_vacuum WHERE datname = current_database()"
    with psycopg.connect(conninfo, autocommit=True) as vacuum, ThreadPoolExecutor(1) as pool:
        vacuum.execute("SET vacuum_cost_limit = 1")
        vacuum.execute("SET vacuum_cost_delay = 100")
        future = pool.submit(vacuum.execute, "VACUUM events_log")
        wait_for(lambda: conn.execute(running).fetchone(), "VACUUM")
        assert len(rows_of(conn, seal(db))) == 101
        assert conn.execute(running).fetchone()
        vacuum.cancel()
        with pytest.raises(psycopg.errors.QueryCanceled):
            future.result()


def test_a_writer_in_another_database_does_not_block(
    db: Database, conn: psycopg.Connection[Any], postgres: EmbeddedPostgres
) -> None:
    elsewhere = psycopg.conninfo.make_conninfo(postgres.conninfo, dbname="template_of_tests")
    store_events(db, 1)
    # The table has the same oid there.
    with writer(elsewhere, "LOCK events_log IN ROW EXCLUSIVE MODE"):
        assert rows_of(conn, seal(db)) == [1]


def test_a_seal_that_waits_or_is_not_committed_holds_no_writer_up(
    db: Database, conn: psycopg.Connection[Any], conninfo: str
) -> None:
    conn.execute("SET lock_timeout = '5s'")
    with writer(conninfo) as late:
        store_events(db, 1)
        with sealing_waits(db, conn) as future:
            conn.execute(INSERT)
            assert not future.done()
            late.commit()
    with db.connection() as sealer:
        sealer.execute("UPDATE export_coverage SET sealed_to = sealed_to")
        sealing.open_writers(sealer)
        conn.execute(INSERT)


@pytest.mark.parametrize(
    ("rows", "limit", "sizes"),
    [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (1, 2, [1]), (3, 1, [1, 1, 1]), (0, 2, [])],
)
def test_a_batch_is_cut_by_rows(
    db: Database, conn: psycopg.Connection[Any], rows: int, limit: int, sizes: list[int]
) -> None:
    for _ in range(rows):
        store_events(db, 2, site_id="other")
        store_events(db, 1)
    while not isinstance(seal(db, batch_rows=limit), sealing.Nothing):
        pass
    assert [len(batch) for batch in batches(conn)] == sizes
    assert sealed_rows(conn) == [n for n in all_ids(conn) if n % 3 == 0]


def test_a_cut_through_sites_of_different_progress_loses_and_repeats_nothing(
    db: Database, conn: psycopg.Connection[Any]
) -> None:
    for site in ("shop", "blog", "shop", "wiki", "blog"):
        store_events(db, 3, site_id=site)
    seal(db, batch_rows=4)
    with db.connection() as connection:
        sealing.sync_coverage(connection, {"acme": ["shop", "blog", "wiki"]})
    while not isinstance(seal(db, batch_rows=4), sealing.Nothing):
        pass
    assert sorted(sealed_rows(conn)) == all_ids(conn)
    assert {len(batch) for batch in batches(conn)[:-1]} == {4}


def test_empty_ground_moves_the_coverage_on_without_a_batch(db: Database, conn: psycopg.Connection[Any]) -> None:
    store_events(db, 3, site_id="other")
    assert seal(db) == sealing.Nothing()
    assert (sealed_to(conn), batches(conn)) == (3, [])


def test_empty_ground_under_an_open_transaction_does_not_move_the_coverage_on(
    db: Database, conn: psycopg.Connection[Any], conninfo: str
) -> None:
    with writer(conninfo) as late:
        store_events(db, 3, site_id="other")
        assert seal(db).blockers
        assert sealed_to(conn) == 0
        late.commit()
    assert rows_of(conn, seal(db)) == [1]


def test_a_table_emptied_by_hand_moves_the_coverage_nowhere(db: Database, conn: psycopg.Connection[Any]) -> None:
    store_events(db, 3)
    seal(db)
    conn.execute("DELETE FROM events_log")
    assert seal(db) == sealing.Nothing()
    assert sealed_to(conn) == 3
    store_events(db, 1)
    assert rows_of(conn, seal(db)) == [4]


def test_of_two_sealers_at_once_one_gets_the_rows_and_the_other_starts_over(
    db: Database, conn: psycopg.Connection[Any]
) -> None:
    store_events(db, 3)
    with ThreadPoolExecutor(1) as pool:
        with db.connection() as first:
            first.execute("SELECT 1 FROM export_coverage FOR UPDATE")
            second = pool.submit(seal, db)
            blocked = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            wait_for(lambda: conn.execute(blocked).fetchone(), "the second sealer")
            first.execute("UPDATE export_coverage SET sealed_to = 3")
        with pytest.raises(ledger.OvertakenError):
            second.result()
    assert batches(conn) == []


def test_every_row_of_many_writers_is_in_exactly_one_batch_of_each_job(
    db: Database, conn: psycopg.Connection[Any], conninfo: str
) -> None:
    with db.connection() as connection:
        sealing.sync_coverage(connection, {"acme": ["shop"], "vault": ["*"]})
    ended = threading.Event()

    def write(seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - no secret
        with psycopg.connect(conninfo) as mine:
            for _ in range(100):
                for _ in range(chance.randint(1, 3)):
                    mine.execute(INSERT)
                mine.execute("SELECT pg_sleep(%s)", (chance.random() / 200,))
                mine.rollback() if chance.random() < 0.1 else mine.commit()

    def keep_sealing(job: str) -> None:
        while True:
            last = ended.is_set()
            # Two sealers of one job collide; the product starts over, and so does this.
            with suppress(ledger.OvertakenError, psycopg.errors.UniqueViolation):
                if isinstance(seal(db, job=job, patience=5, batch_rows=40), sealing.Nothing) and last:
                    return

    with ThreadPoolExecutor(10) as pool:
        sealers = [pool.submit(keep_sealing, job) for job in ("acme", "acme", "vault")]
        for written in [pool.submit(write, seed) for seed in range(6)]:
            written.result()
        ended.set()
        for sealer in sealers:
            sealer.result()
    for job in ("acme", "vault"):
        assert len(batches(conn, job)) > 5
        assert Counter(sealed_rows(conn, job)) == Counter(all_ids(conn))


def test_a_batch_ends_with_the_row_that_crosses_its_limit_of_bytes(db: Database, conn: psycopg.Connection[Any]) -> None:
    store_events(db, 5, raw_event_data=json.dumps({"noise": list(range(300))}))
    (size,) = conn.execute("SELECT min(pg_column_size(raw_event_data)) FROM events_log").fetchone() or (0,)
    while isinstance(seal(db, batch_bytes=2 * size), ledger.Key):
        pass
    assert [len(ids) for ids in batches(conn)] == [2, 2, 1]
    store_events(db, 2)
    assert isinstance(seal(db, batch_bytes=1), ledger.Key)
    assert len(batches(conn)[-1]) == 1


ORDERS = [
    # What comes in, one row after the other: site and hour of arrival.
    ([("shop", 8), ("shop", 8), ("shop", 9)], True),
    ([("shop", 9), ("shop", 8)], False),
    ([("shop", 8), ("shop", 9), ("shop", 8)], False),
    ([("blog", 9), ("shop", 8)], True),
    ([("shop", 8), ("blog", 9)], False),
    ([("blog", 8), ("shop", 8), ("blog", 8)], False),
    # As bytes: a capital stands before every small letter.
    ([("Shop", 8), ("blog", 8)], True),
    ([("blog", 8), ("Shop", 8)], False),
    ([(None, 9), ("blog", 8)], True),
    ([("blog", 8), (None, 9)], False),
]


@pytest.mark.parametrize(("arrivals", "in_order"), ORDERS)
def test_sealing_tells_whether_rows_lie_in_the_order_of_their_objects(
    db: Database, conn: psycopg.Connection[Any], arrivals: list[tuple[str | None, int]], *, in_order: bool
) -> None:
    # Half an hour off: the hours of objects are those of UTC, whatever a database is set to.
    conn.execute("SET timezone = 'Asia/Kolkata'")
    for site, hour in arrivals:
        store_events(db, 1, site_id=site or "shop", created_at=datetime(2026, 1, 5, hour, 45, tzinfo=UTC))
        if site is None:
            conn.execute("UPDATE events_log SET site_id = NULL WHERE id = (SELECT max(id) FROM events_log)")
    sealing.sync_coverage(conn, {"vault": ["*"]})
    plan = sealing.Plan(
        job="vault",
        format="jsonl",
        compression="gzip",
        object_rows=1000,
        object_bytes=1000,
        batch_rows=1000,
        schema_version=1,
        buckets={"client": "raw"},
    )
    with conn.transaction():
        sealed = sealing.seal_next(conn, plan)
    assert isinstance(sealed, sealing.Sealed)
    assert sealed.in_order is in_order
