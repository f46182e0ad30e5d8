"""Retention deletes what the ledger proves delivered long enough ago, and nothing else."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from conftest import store_events
from test_coverage import configure, deliver, seal

from appliance.errors import SchemaError
from appliance.store import ledger, marks
from appliance.store.database import Database

Conn = psycopg.Connection[Any]
KEEP_DAYS = 10


def age(conn: Conn, days: float, *, job: str = "acme", bucket: str | None = None) -> None:
    """Let deliveries have happened so many days ago."""
    conn.execute(
        "UPDATE export_deliveries SET delivered_at = now() - %s WHERE job = %s AND bucket = coalesce(%s, bucket)"
        " AND state = 'delivered'",
        (timedelta(days=days), job, bucket),
    )


def delete(db: Database) -> int:
    return marks.delete_old_rows(db, keep_days=KEEP_DAYS, go_on=lambda: True)


def left(conn: Conn) -> list[tuple[str | None, int]]:
    return conn.execute("SELECT site_id, count(*) FROM events_log GROUP BY 1 ORDER BY 1").fetchall()


def export(db: Database, *jobs: str) -> None:
    for job in jobs:
        seal(db, job)
        deliver(db, job)
    marks.mark_settled_rows(db)


def test_rows_go_so_many_days_after_their_last_delivery(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["*"]})
    store_events(db, 3)
    store_events(db, 2, site_id="blog")
    export(db, "acme")
    age(conn, KEEP_DAYS - 0.01)
    assert delete(db) == 0
    age(conn, KEEP_DAYS + 0.01)
    store_events(db, 4)
    assert delete(db) == 5
    assert left(conn) == [("shop", 4)]
    assert delete(db) == 0


def test_the_bucket_that_got_it_last_counts(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["*"]})
    store_events(db, 3)
    export(db, "acme")
    age(conn, 100)
    age(conn, 1, bucket="backup")
    assert delete(db) == 0


def owed(db: Database, _conn: Conn) -> None:
    seal(db, "acme")
    deliver(db, "acme", "client")


def not_marked(db: Database, _conn: Conn) -> None:
    seal(db, "acme")
    deliver(db, "acme")


def another_job_lags(db: Database, _conn: Conn) -> None:
    configure(db, {"acme": ["*"], "other": ["shop"]})
    seal(db, "acme", "other")
    deliver(db, "acme")
    marks.mark_settled_rows(db)


def a_job_came_later(db: Database, _conn: Conn) -> None:
    export(db, "acme")
    configure(db, {"acme": ["*"], "later": ["*"]})


def a_bucket_is_added(db: Database, conn: Conn) -> None:
    export(db, "acme")
    conn.execute(
        "INSERT INTO export_deliveries (job, sequence, bucket, prefix) SELECT job, sequence, 'new', ''"
        " FROM export_batches"
    )


NOT_PROVEN: dict[str, Callable[[Database, Conn], None]] = {
    "a bucket has not got it": owed,
    "it is not marked": not_marked,
    "another job has not delivered it": another_job_lags,
    "a job that came later has yet to export it": a_job_came_later,
    "a bucket that was added is still to get it": a_bucket_is_added,
    "nothing was sealed": lambda _db, _conn: None,
}


@pytest.mark.parametrize("state", NOT_PROVEN.values(), ids=NOT_PROVEN)
def test_a_row_that_is_not_proven_delivered_to_all_stays(
    db: Database, conn: Conn, state: Callable[[Database, Conn], None]
) -> None:
    configure(db, {"acme": ["*"]})
    store_events(db, 3)
    state(db, conn)
    conn.execute("UPDATE export_deliveries SET delivered_at = now() - interval '1 year' WHERE state = 'delivered'")
    assert delete(db) == 0
    assert left(conn) == [("shop", 3)]


@pytest.mark.parametrize("step", [-1, 1], ids=["older", "newer"])
def test_in_a_database_of_another_version_nothing_is_deleted(db: Database, conn: Conn, step: int) -> None:
    configure(db, {"acme": ["*"]})
    store_events(db, 3)
    export(db, "acme")
    age(conn, KEEP_DAYS + 1)
    conn.execute("UPDATE installation SET schema_version = schema_version + %s", (step,))
    with pytest.raises(SchemaError, match="this version of the appliance knows"):
        delete(db)
    assert left(conn) == [("shop", 3)]


def test_exported_at_alone_proves_nothing(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["*"]})
    store_events(db, 3)
    conn.execute("UPDATE events_log SET exported_at = now() - interval '1 year'")
    assert delete(db) == 0


def test_rows_of_sites_that_no_job_covers_are_kept_and_named(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop"]})
    store_events(db, 3)
    store_events(db, 2, site_id="blog")
    export(db, "acme")
    age(conn, 100)
    assert delete(db) == 3
    assert left(conn) == [("blog", 2)]
    assert marks.uncovered_sites(conn) == ["blog"]


def test_a_row_put_by_hand_among_rows_that_were_sealed_before_stays(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["*"]})
    conn.execute("SELECT setval(pg_get_serial_sequence('events_log', 'id'), 100)")
    store_events(db, 3)
    export(db, "acme")
    conn.execute(
        "INSERT INTO events_log (id, event_id, event_type, site_id, timestamp, raw_event_data)"
        " OVERRIDING SYSTEM VALUE VALUES (50, gen_random_uuid(), 'by hand', 'shop', now(), '{}')"
    )
    age(conn, 100)
    assert delete(db) == 3
    assert left(conn) == [("shop", 1)]


def test_it_goes_in_small_steps_stops_between_them_and_goes_on_later(
    db: Database, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "_STEP_IDS", 4)
    configure(db, {"acme": ["*"]})
    store_events(db, 10)
    export(db, "acme")
    age(conn, 100)
    steps = iter([True, False])
    assert marks.delete_old_rows(db, keep_days=KEEP_DAYS, go_on=lambda: next(steps)) == 4
    assert delete(db) == 6
    assert left(conn) == []


def test_a_job_that_begins_after_the_deletion_seals_what_is_left(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["*"]})
    store_events(db, 3)
    export(db, "acme")
    age(conn, 100)
    assert delete(db) == 3
    store_events(db, 2)
    configure(db, {"acme": ["*"], "later": ["shop"]})
    seal(db, "later")
    with db.connection() as connection:
        (key,) = ledger.unsettled(connection, "later")
        assert ledger.load(connection, key).row_count == 2


def test_a_site_that_gets_a_mark_of_its_own_goes_on_where_all_sites_were(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["*"]})
    store_events(db, 3)
    export(db, "acme")
    age(conn, 100)
    assert delete(db) == 3
    configure(db, {"acme": ["*"], "own": ["shop"]})
    store_events(db, 2)
    export(db, "acme", "own")
    age(conn, 100)
    age(conn, 100, job="own")
    assert delete(db) == 2
    assert left(conn) == []
