"""`appliance backfill`: batches of a time go to their buckets once more, or to a new one, to the same keys."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import S3Server, store_events
from exporting import World, exported_ids, failing, watch

from appliance.errors import BucketError
from appliance.export import backfill
from appliance.export.redeliver import Redelivery
from appliance.export.verify import Verification
from appliance.store.database import Database

Conn = psycopg.Connection[Any]

DAY = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def world(db: Database, conn: Conn, s3: S3Server, tmp_path: Path) -> World:
    """Batch 1 with events of 10:30, batch 2 of 11:00 and 13:59:59, batch 3 of the next day at 0:00."""
    one = World(db, conn, s3, tmp_path)
    for arrivals in ([10.5], [11, 13 + 3599 / 3600], [24]):
        for hours in arrivals:
            store_events(db, 2, created_at=DAY + hours * HOUR)
        assert not one.export().failed
    one.names["archive"] = s3.new_bucket("archive")
    one.tables["archive"] = s3.settings(one.names["archive"], prefix="raw")
    return one


def backfilled(world: World, start: float, end: float, bucket: str | None = None, **means: Any) -> Redelivery:
    """Backfill hours of the day."""
    lent = means.get("means") or world.exporter().means
    steps = backfill.plan(lent, "acme", arrived_from=DAY + start * HOUR, arrived_to=DAY + end * HOUR, bucket=bucket)
    return backfill.carry_out(lent, steps)


@pytest.mark.parametrize(
    ("start", "end", "sequences"),
    [
        pytest.param(0, 24, [1, 2], id="a day"),
        pytest.param(0, 48, [1, 2, 3], id="two days"),
        pytest.param(10, 11, [1], id="an hour"),
        pytest.param(10.9, 10.95, [1], id="a part of an hour is the whole hour"),
        pytest.param(11, 12, [2], id="the hour begins in it"),
        pytest.param(12, 13, [], id="an hour without events, of a batch with earlier and later ones"),
        pytest.param(13.5, 24.5, [2, 3], id="over midnight"),
        pytest.param(24, 25, [3], id="the first hour of a day"),
        pytest.param(-48, 0, [], id="before everything"),
        pytest.param(25, 1000, [], id="after everything"),
    ],
)
def test_batches_with_events_of_the_time_are_chosen_whole(
    world: World, start: float, end: float, sequences: list[int]
) -> None:
    steps = backfill.plan(world.exporter().means, "acme", arrived_from=DAY + start * HOUR, arrived_to=DAY + end * HOUR)
    assert [step.batch.key.sequence for step in steps] == sequences
    assert {step.buckets for step in steps} <= {("client", "vault")}


@pytest.mark.parametrize("rows", ["from the table", "from another bucket"])
def test_what_a_bucket_has_lost_is_there_again_to_the_byte(world: World, rows: str) -> None:
    before = world.everything()
    for key in world.contents("client"):
        world.s3.client().delete_object(Bucket=world.names["client"], Key=key)
    if rows == "from another bucket":
        world.conn.execute("DELETE FROM events_log")
    outcome = backfilled(world, 0, 48)
    assert (outcome.done, outcome.problems) == (["client", "vault"] * 3, [])
    assert world.everything() == before


@pytest.mark.parametrize("rows", ["from the table", "from another bucket"])
def test_a_new_bucket_gets_the_batches_and_then_counts(world: World, rows: str) -> None:
    if rows == "from another bucket":
        world.conn.execute("DELETE FROM events_log")
        world.conn.execute("UPDATE export_marks SET deleted_to = 1000")
    assert backfilled(world, 0, 48, "archive").problems == []
    assert world.contents("archive") == world.contents("client")
    verdict = Verification(world.exporter().means, "acme").run()
    assert (verdict.findings, verdict.objects) == ((), 21)


def test_what_fails_is_delivered_by_the_next_run_of_the_job(world: World) -> None:
    down = watch(world.exporter(), failing(BucketError("bucket archive: it is down")), "archive").means
    outcome = backfilled(world, 0, 48, "archive", means=down)
    assert outcome.done == []
    assert set(outcome.problems) == {"bucket archive: it is down"}
    report = world.export()
    assert (report.failed, report.summary) == (False, "3 batches delivered to archive")
    assert world.contents("archive") == world.contents("client")
    assert exported_ids(world.contents("archive")) == world.rows()


def test_nothing_that_stands_there_is_written_over(world: World) -> None:
    foreign = next(key for key in world.contents("client") if "0000000001-0001" in key)
    world.s3.client().put_object(Bucket=world.names["archive"], Key=foreign, Body=b"somebody else's")
    outcome = backfilled(world, 10, 11, "archive")
    assert outcome.done == []
    assert "other bytes stand" in outcome.problems[0]
    assert world.contents("archive") == {foreign: b"somebody else's"}


def test_a_bucket_that_holds_something_else_costs_the_job_s_own_buckets_nothing(world: World) -> None:
    manifest = "raw/_manifests/acme/0000000001.json"
    world.s3.client().put_object(Bucket=world.names["archive"], Key=manifest, Body=b"of another installation")
    assert any("is ahead" in problem for problem in backfilled(world, 0, 48, "archive").problems)
    store_events(world.db, 3)
    report = world.export()
    assert (report.batches, report.row_count) == (1, 3)
    assert "bucket archive is ahead" in report.summary
    assert exported_ids(world.contents("client")) == world.rows()
    assert world.contents("archive")[manifest] == b"of another installation"
