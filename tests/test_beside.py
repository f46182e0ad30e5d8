"""What a run does beside delivering, in a thread: it marks earlier batches and seals the next one."""

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from conftest import S3Server, store_events
from exporting import CrashError, MortalDatabase, Steps, World, failing, watch

from appliance.errors import BatchChangedError, BucketAheadError, BucketError
from appliance.export import run
from appliance.export.report import Tally
from appliance.store import ledger, marks, runs, sealing
from appliance.store.database import Database
from appliance.store.reading import rows_of

Where = list[tuple[str, str]]


@pytest.fixture
def world(
    db: Database, conn: psycopg.Connection[Any], s3: S3Server, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> World:
    """Let three rows be a batch, and be worth a thread."""
    monkeypatch.setattr(run, "BATCH_ROWS", 3)
    monkeypatch.setattr(run, "_BESIDE_ROWS", 1)
    monkeypatch.setattr(runs, "LEASE_SECONDS", -1)
    return World(db, conn, s3, tmp_path)


def noting(done: Where, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        done.append((name, threading.current_thread().name.partition("_")[0]))
        return function(*args, **options)

    return noted


def test_a_backlog_is_sealed_and_marked_beside_its_deliveries(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    done: Where = []
    monkeypatch.setattr(sealing, "seal_next", noting(done, "seal", sealing.seal_next))
    monkeypatch.setattr(marks, "mark_settled_rows", noting(done, "mark", marks.mark_settled_rows))
    store_events(world.db, 11)
    assert world.export().batches == 4
    # Sealing the first batch and marking the last one is all that nothing else is done beside.
    assert [where for what, where in done if what == "seal"] == ["MainThread", "beside", "beside", "beside"]
    assert [where for what, where in done if what == "mark"] == ["beside", "beside", "beside", "MainThread"]
    assert [manifest["row_count"] for manifest in world.check()] == [3, 3, 3, 2]
    assert world.conn.execute("SELECT 1 FROM events_log WHERE exported_at IS NULL").fetchone() is None


def test_while_many_events_come_in_one_thing_is_done_after_the_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Where = []
    monkeypatch.setattr(run, "_BUSY_EVENTS", 10)
    monkeypatch.setattr(sealing, "seal_next", noting(done, "seal", sealing.seal_next))
    monkeypatch.setattr(marks, "mark_settled_rows", noting(done, "mark", marks.mark_settled_rows))
    store_events(world.db, 11)
    assert world.export().batches == 4
    assert done == [("seal", "MainThread")] * 4 + [("mark", "MainThread")]
    world.check()
    assert world.conn.execute("SELECT 1 FROM events_log WHERE exported_at IS NULL").fetchone() is None


@pytest.mark.parametrize("done", [False, True], ids=["before it", "after it"])
def test_a_run_that_crashes_at_any_step_is_put_right_by_the_next(world: World, *, done: bool) -> None:
    """Threads take turns as they like: which step comes at which number differs, and each must be safe anyway."""
    step, survived = 0, False
    while not survived:
        step += 3
        store_events(world.db, 8)
        survived = exported_until(world, Steps(step, done=done))
        world.check_claims()
        assert not world.export().failed
        world.check()
        assert world.conn.execute("SELECT 1 FROM events_log WHERE exported_at IS NULL").fetchone() is None
    assert step > 60


def exported_until(world: World, steps: Steps) -> bool:
    """Let a run crash at a step; return whether it ended before that."""
    with MortalDatabase(world.db.conninfo) as db:
        db.steps = steps
        try:
            watch(world.exporter(db=db), steps.step).run("acme")
        except CrashError:
            return False
    return steps.count < steps.last


def test_a_bucket_found_ahead_while_another_batch_is_delivered_stops_the_run_after_that(world: World) -> None:
    store_events(world.db, 3)
    assert world.export().batches == 1
    manifest = "raw/_manifests/acme/0000000003.json"
    world.s3.client().put_object(Bucket=world.names["client"], Key=manifest, Body=b"not ours")
    store_events(world.db, 8)
    with pytest.raises(BucketAheadError):
        world.export()
    assert world.conn.execute("SELECT sequence, state FROM export_batches ORDER BY 1").fetchall() == [
        (1, "settled"),
        (2, "settled"),
    ]
    assert world.contents("client")[manifest] == b"not ours"


def test_a_batch_that_was_sealed_beside_one_that_no_bucket_took_is_delivered_later(world: World) -> None:
    store_events(world.db, 8)
    refuses = failing(BucketError("it takes nothing"), calls="put")
    assert watch(world.exporter(), refuses).run("acme").failed
    assert world.conn.execute("SELECT sequence, state FROM export_batches ORDER BY 1").fetchall() == [
        (1, "sealed"),
        (2, "sealed"),
    ]
    assert world.export().batches == 3
    world.check()


def test_what_stops_a_batch_is_told_though_the_next_one_is_sealed_already(world: World) -> None:
    store_events(world.db, 8)
    refuses = failing(BucketError("it takes nothing"), calls="put")
    assert watch(world.exporter(), refuses).run("acme").failed
    world.conn.execute("UPDATE export_batches SET manifest = NULL, manifest_sha256 = NULL")
    world.conn.execute("DELETE FROM events_log WHERE id = 1")
    with pytest.raises(BatchChangedError, match="3 rows were sealed, 2 are there now"):
        world.export()
    assert world.conn.execute("SELECT count(*) FROM export_deliveries WHERE state = 'delivered'").fetchone() == (0,)


def test_rows_deleted_between_sealing_and_reading_stop_the_batch_before_its_end(world: World) -> None:
    store_events(world.db, 3)
    exporter = world.exporter()
    exporter.sync_coverage()
    with world.db.connection() as conn:
        sealed = sealing.seal_next(conn, run.Run(exporter.means, "acme", Tally("acme"))._plan())  # noqa: SLF001
        assert isinstance(sealed, sealing.Sealed)
        assert sealed.in_order
        batch = ledger.load(conn, sealed.key)
    world.conn.execute("DELETE FROM events_log WHERE id = 2")
    with (
        rows_of(world.db.conninfo, batch, in_order=sealed.in_order) as record_batches,
        pytest.raises(BatchChangedError, match="3 rows were sealed, 2 are there now"),
    ):
        list(record_batches)
