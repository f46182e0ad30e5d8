"""A bucket that failed is left alone for a while, each time for longer, and tried again before the hour is over."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import S3Server, make_settings, store_events, wait_for
from exporting import World, failing, watch

from appliance.errors import BucketError
from appliance.export.report import Report
from appliance.export.scheduler import Scheduler
from appliance.store import ledger, resting, runs
from appliance.store.database import Database
from appliance.store.ledger import Key

Conn = psycopg.Connection[Any]

DOWN = BucketError("bucket vault: it is down")


@pytest.fixture
def world(db: Database, conn: Conn, s3: S3Server, tmp_path: Path) -> World:
    """One batch that vault did not take."""
    one = World(db, conn, s3, tmp_path)
    store_events(db, 3)
    assert run(one, down=True).failed
    return one


def run(world: World, *, down: bool = False) -> Report:
    """Run the job as its schedule does."""
    exporter = world.exporter()
    if down:
        watch(exporter, failing(DOWN), "vault")
    return exporter.run("acme", spare_resting=True)


def pause(world: World) -> float:
    """Seconds from the last failure to the next attempt."""
    (seconds,) = world.conn.execute(
        "SELECT extract(epoch FROM retry_at - now())::float8 FROM export_deliveries WHERE bucket = 'vault'"
    ).fetchone() or (0,)
    return float(seconds)


def end_pause(world: World) -> None:
    world.conn.execute("UPDATE export_deliveries SET retry_at = now() WHERE retry_at IS NOT NULL")


def test_while_it_rests_the_other_bucket_goes_on_and_the_run_says_so(world: World) -> None:
    store_events(world.db, 2)
    report = run(world)
    assert (report.failed, dict(report.partly), list(report.resting)) == (False, {"client": 1}, ["vault"])
    assert report.summary.startswith("1 batch delivered to client; bucket vault failed and is left alone until ")
    assert world.contents("vault") == {}


def test_once_it_has_rested_it_gets_everything_and_nothing_is_remembered(world: World) -> None:
    store_events(world.db, 2)
    run(world)
    end_pause(world)
    assert run(world).batches == 2
    world.check()
    query = "SELECT DISTINCT failures, retry_at, last_error FROM export_deliveries"
    assert world.conn.execute(query).fetchall() == [(0, None, None)]


def test_a_moment_that_was_noted_while_the_clock_was_days_ahead_is_not_waited_for(world: World) -> None:
    world.conn.execute("UPDATE export_deliveries SET retry_at = now() + interval '3 days' WHERE state = 'pending'")
    with world.db.connection() as conn:
        assert resting.jobs_due(conn) == ["acme"]
    assert run(world).batches == 1
    world.check()


def test_by_hand_it_is_tried_at_once(world: World) -> None:
    assert world.exporter().run("acme").batches == 1


def test_each_pause_is_about_twice_as_long_up_to_an_hour(world: World) -> None:
    pauses = [pause(world)]
    for _ in range(12):
        with world.db.connection() as conn:
            ledger.record_failure(conn, Key("acme", 1), "vault", "down")
        pauses.append(pause(world))
    for number, seconds in enumerate(pauses):
        expected = min(30 * 2**number, 3600)
        assert expected * 0.74 <= seconds <= expected * 1.26
    assert len({round(seconds, 3) for seconds in pauses[-4:]}) > 1


def test_a_number_of_failures_beyond_all_bounds_is_borne(world: World) -> None:
    world.conn.execute("UPDATE export_deliveries SET failures = 2000000000")
    with world.db.connection() as conn:
        ledger.record_failure(conn, Key("acme", 1), "vault", "down")
    assert pause(world) < 3600 * 1.3


def test_while_every_bucket_rests_nothing_new_is_sealed(world: World) -> None:
    world.conn.execute("UPDATE export_deliveries SET state = 'pending', retry_at = now() + interval '1 hour'")
    store_events(world.db, 2)
    assert sorted(run(world).resting) == ["client", "vault"]
    assert world.conn.execute("SELECT count(*) FROM export_batches").fetchone() == (1,)


def test_the_scheduler_tries_again_as_soon_as_the_bucket_has_rested(world: World, tmp_path: Path) -> None:
    settings = make_settings(
        server={"data_dir": str(tmp_path / "data")},
        buckets=world.tables,
        exports={"acme": world.jobs["acme"] | {"schedule": "0 0 1 1 *"}},
    )
    exporter = world.exporter()
    scheduler = Scheduler(
        settings,
        world.db,
        exporter,
        run=lambda job, due=None: exporter.run(job, spare_resting=True, due=due),
        stopping=exporter.means.stopping,
    )
    scheduler.start()
    try:
        due = datetime.now(UTC) - timedelta(seconds=1)
        scheduler._scheduler.modify_job("retries", next_run_time=due)  # noqa: SLF001 - a minute is long
        wait_for(lambda: scheduler._scheduler.get_job("retries").next_run_time > due, "the look")  # noqa: SLF001
        assert world.contents("vault") == {}
        end_pause(world)
        scheduler._scheduler.modify_job("retries", next_run_time=due)  # noqa: SLF001
        wait_for(lambda: world.contents("vault") == world.contents("client"), "the delivery")
        wait_for(lambda: last_outcome(world) == "done", "the run")
    finally:
        scheduler.stop(10)
    world.check()


def last_outcome(world: World) -> str:
    with world.db.connection() as conn:
        return runs.latest(conn, limit=1)[0].outcome
