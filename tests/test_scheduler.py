"""The clock: jobs run on their cron lines in UTC, one failing job stops no other, and stopping waits for a run."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any, Self

import apscheduler.schedulers.base
import psycopg
import pytest
from conftest import make_settings, store_events, wait_for
from exporting import Watched, failing, watch

from appliance.errors import BucketError
from appliance.export import scheduler as scheduling
from appliance.export.clock import CronTrigger
from appliance.export.job import Exporter
from appliance.export.report import Report
from appliance.export.scheduler import Scheduler
from appliance.store import runs
from appliance.store.database import Database

NEVER_SOON = "0 0 1 1 *"


class Clock:
    """A scheduler on directory buckets whose jobs come due when the test says so."""

    def __init__(self, db: Database, root: Path, *jobs: str) -> None:
        self.db, self.root, self.stopping = db, root, threading.Event()
        for name in ("acme", "vault"):
            (root / name).mkdir(exist_ok=True)
        self.settings = make_settings(
            server={"data_dir": str(root / "data")},
            buckets={name: {"kind": "directory", "path": str(root / name)} for name in ("acme", "vault")},
            exports={job: {"sites": ["*"], "client": job, "schedule": NEVER_SOON} for job in jobs},
        )
        self.exporter = Exporter(self.settings, db, conninfo=db.conninfo, stopping=self.stopping)
        self.scheduler = Scheduler(self.settings, db, self.exporter, run=self.run, stopping=self.stopping)

    def run(self, job: str, due: datetime | None = None) -> Report:
        return self.exporter.run(job, due=due)

    def due(self, name: str, *, late: timedelta = timedelta()) -> None:
        """Let a job come due now, or let it have come due while nobody ran it."""
        self.scheduler._scheduler.modify_job(name, next_run_time=datetime.now(UTC) - late)  # noqa: SLF001

    def outcomes(self, job: str) -> list[str]:
        with self.db.connection() as conn:
            return [run.outcome for run in runs.latest(conn, limit=50) if run.job == job]

    def wait_run(self, job: str, number: int = 1) -> None:
        def ended() -> list[str]:
            return [outcome for outcome in self.outcomes(job) if outcome != "running"]

        wait_for(lambda: len(ended()) >= number, f"a run of {job}")

    def manifests(self, bucket: str) -> int:
        return len(list((self.root / bucket).rglob("_manifests/**/*.json")))


@pytest.fixture
def clock(db: Database, tmp_path: Path) -> Iterator[Callable[..., Clock]]:
    made: list[Clock] = []

    def make(*jobs: str) -> Clock:
        made.append(Clock(db, tmp_path, *jobs))
        made[-1].scheduler.start()
        return made[-1]

    yield make
    for one in made:
        one.scheduler.stop(10)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("line", "now", "following"),
    [
        pytest.param("5 * * * *", "2026-03-04T10:04:59", "2026-03-04T10:05:00", id="hourly"),
        pytest.param("5 * * * *", "2026-03-04T10:05:00", "2026-03-04T11:05:00", id="never twice at one moment"),
        pytest.param("0 0 * * 0", "2026-03-04T10:00:00", "2026-03-08T00:00:00", id="0 is Sunday"),
        pytest.param("0 0 * * 7", "2026-03-04T10:00:00", "2026-03-08T00:00:00", id="7 is Sunday too"),
        pytest.param("0 0 * * 1", "2026-03-04T10:00:00", "2026-03-09T00:00:00", id="1 is Monday"),
        pytest.param("0 0 1 * 1", "2026-03-03T10:00:00", "2026-03-09T00:00:00", id="day of month or of week"),
        pytest.param("30 2 * * *", "2026-03-29T00:00:00", "2026-03-29T02:30:00", id="no summer time"),
        pytest.param("0 0 29 2 *", "2026-01-01T00:00:00", "2028-02-29T00:00:00", id="a leap day"),
    ],
)
def test_a_cron_line_is_read_as_crontab_reads_it_in_utc(line: str, now: str, following: str) -> None:
    trigger = CronTrigger(line)
    assert trigger.get_next_fire_time(None, at(now)) == at(following)
    assert trigger.get_next_fire_time(at(now), at(now) + timedelta(hours=23)) == at(following)
    elsewhere = at(now).astimezone(timezone(timedelta(hours=5, minutes=45)))
    assert trigger.get_next_fire_time(None, elsewhere) == at(following)


def test_a_job_runs_when_it_is_due_and_again_the_next_time(clock: Callable[..., Clock], db: Database) -> None:
    one = clock("acme")
    for number in (1, 2):
        store_events(db, 2)
        one.due("export acme")
        one.wait_run("acme", number)
        assert one.manifests("acme") == number
    assert one.outcomes("acme") == ["done", "done"]


def test_a_job_that_is_late_is_run_once(clock: Callable[..., Clock], db: Database) -> None:
    one = clock("acme")
    store_events(db, 2)
    one.due("export acme", late=timedelta(days=800))
    one.wait_run("acme")
    # Runs of one job follow one another: had there been a second for the years before, it would stand before this one.
    one.due("export acme")
    one.wait_run("acme", 2)
    assert one.manifests("acme") == 1
    assert len(one.outcomes("acme")) == 2


def test_a_clock_that_is_set_from_1970_to_today_does_not_count_every_minute_between() -> None:
    line, now = CronTrigger("* * * * *"), at("2026-05-01 12:00:30")
    due, moments = at("1970-01-01 00:01:00"), 0
    while due <= now:
        due, moments = line.get_next_fire_time(due, now), moments + 1
    assert (due, moments) == (at("2026-05-01 12:01:00"), 24 * 60 + 1)
    assert line.fired == at("2026-05-01 12:00:00")


class SteppedClock(datetime):
    """The time of day as an administrator has set it."""

    ahead = timedelta()

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) + cls.ahead


def test_after_the_clock_is_set_back_jobs_are_due_when_the_new_time_says_so(
    clock: Callable[..., Clock], monkeypatch: pytest.MonkeyPatch, db: Database
) -> None:
    real_time = time.time
    monkeypatch.setattr(scheduling, "_LOOK_AT_CLOCK_SECONDS", 0.1)
    monkeypatch.setattr(time, "time", lambda: real_time() + SteppedClock.ahead.total_seconds())
    monkeypatch.setattr(apscheduler.schedulers.base, "datetime", SteppedClock)
    monkeypatch.setattr(SteppedClock, "ahead", timedelta(days=800))
    made = clock("acme")
    next_year = datetime.now(UTC) + timedelta(days=367)
    assert made.scheduler.next_runs()["acme"] > next_year
    monkeypatch.setattr(SteppedClock, "ahead", timedelta())
    wait_for(lambda: made.scheduler.next_runs()["acme"] < next_year, "the new time")
    store_events(db, 1)
    made.due("export acme")
    made.wait_run("acme")


def test_what_was_run_for_days_ahead_before_the_clock_was_set_back_does_not_count_as_done(
    clock: Callable[..., Clock], conn: psycopg.Connection[Any]
) -> None:
    made, due = clock("acme"), datetime.now(UTC).replace(microsecond=0)
    made.run("acme", due)
    assert made.run("acme", due).done_elsewhere
    conn.execute("UPDATE export_runs SET due = due + interval '3 days'")
    assert not made.run("acme", due).done_elsewhere


@pytest.mark.parametrize("error", [BucketError("no"), RuntimeError("a bug")], ids=["an error of ours", "any other"])
def test_a_job_that_fails_is_logged_and_stops_neither_the_other_nor_its_next_run(
    clock: Callable[..., Clock], db: Database, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    one = clock("acme", "vault")
    watch(one.exporter, failing(error), "acme")
    store_events(db, 2)
    one.due("export acme")
    one.due("export vault")
    one.wait_run("acme")
    one.wait_run("vault")
    assert (one.outcomes("acme"), one.outcomes("vault")) == (["failed"], ["done"])
    wait_for(lambda: any(r.levelno == logging.ERROR and "acme" in r.getMessage() for r in caplog.records), "the log")
    watch(one.exporter, lambda _call: nullcontext(), "acme")
    one.due("export acme")
    one.wait_run("acme", 2)
    assert one.manifests("acme") == 1


def test_a_retired_job_still_delivers_though_another_retired_one_cannot(
    clock: Callable[..., Clock], db: Database, conn: psycopg.Connection[Any]
) -> None:
    before = clock("acme", "vault")
    store_events(db, 2)
    for job in ("acme", "vault"):
        assert watch(before.exporter, failing(BucketError("down"), calls="put")).run(job).failed
    # acme can never be delivered: its manifest was never made, and one of its rows is gone.
    conn.execute("UPDATE export_batches SET manifest = NULL, manifest_sha256 = NULL WHERE job = 'acme'")
    conn.execute("UPDATE export_ranges SET to_id = 1 WHERE job = 'acme'")
    after = clock()
    after.due("exports no longer configured")
    after.wait_run("acme", 2)
    after.wait_run("vault", 2)
    assert after.outcomes("vault")[0] == "done"


def held_run(one: Clock) -> tuple[threading.Event, threading.Event]:
    """Let the job's bucket keep each caller until it is let go; return (somebody is held, let go)."""
    held, let_go = threading.Event(), threading.Event()

    @contextmanager
    def hold(call: str) -> Iterator[None]:
        if call == "put":
            held.set()
            assert let_go.wait(30)
        yield

    watch(one.exporter, hold, "acme")
    return held, let_go


def test_stopping_waits_for_a_run_that_then_ends_at_its_next_safe_point(
    clock: Callable[..., Clock], db: Database
) -> None:
    one = clock("acme")
    held, let_go = held_run(one)
    # Two objects: between them it may stop.
    store_events(db, 2)
    store_events(db, 2, site_id="blog")
    one.due("export acme")
    assert held.wait(30)
    stopper = threading.Thread(target=one.scheduler.stop, args=(30,))
    stopper.start()
    assert one.stopping.wait(30)
    assert stopper.is_alive()
    let_go.set()
    stopper.join(30)
    assert not stopper.is_alive()
    assert not one.scheduler.alive
    assert one.manifests("acme") == 0
    assert "running" not in one.outcomes("acme")


def test_stopping_does_not_wait_for_ever(clock: Callable[..., Clock], db: Database) -> None:
    one = clock("acme")
    held, let_go = held_run(one)
    store_events(db, 2)
    one.due("export acme")
    assert held.wait(30)
    one.scheduler.stop(0.01)
    assert one.outcomes("acme") == ["running"]
    let_go.set()
    one.wait_run("acme")


def test_a_job_that_still_runs_is_not_started_again_beside_itself(clock: Callable[..., Clock], db: Database) -> None:
    one = clock("acme", "vault")
    held, let_go = held_run(one)
    store_events(db, 2)
    one.due("export acme")
    assert held.wait(30)
    one.due("export acme")
    one.due("export vault")
    one.wait_run("vault")
    let_go.set()
    one.wait_run("acme")
    assert one.outcomes("acme") == ["done"]
    assert isinstance(one.exporter.means.buckets["acme"], Watched)  # it was held at all


def test_housekeeping_merges_the_counters(
    clock: Callable[..., Clock], db: Database, conn: psycopg.Connection[Any]
) -> None:
    one = clock("acme")
    for _ in range(3):
        store_events(db, 2, created_at=datetime.now(UTC).replace(second=0) - timedelta(hours=1))
    one.due("housekeeping")
    counted = "SELECT events FROM event_counts"
    wait_for(lambda: conn.execute(counted).fetchall() == [(6,)], "one row a minute")
    assert conn.execute(counted).fetchall() == [(6,)]


def test_a_job_that_is_asked_for_while_it_runs_runs_once_more_however_often_it_was_asked_for(
    db: Database, tmp_path: Path
) -> None:
    clock = Clock(db, tmp_path, "acme")
    begun: list[str] = []
    go_on = threading.Event()

    def run(job: str, _due: datetime | None = None) -> Report:
        begun.append(job)
        assert go_on.wait(10)
        return Report(job=job)

    scheduler = Scheduler(clock.settings, db, clock.exporter, run=run, stopping=clock.stopping)
    assert not scheduler.run_soon("acme")
    scheduler.start()
    assert scheduler.next_runs()["acme"] > datetime.now(UTC)
    assert scheduler.run_soon("acme")
    wait_for(lambda: begun, "the first run")
    assert [scheduler.run_soon("acme") for _ in range(3)] == [True] * 3
    go_on.set()
    wait_for(lambda: len(begun) == 2, "the second run")
    scheduler.run_soon("retired")
    wait_for(lambda: begun[2:], "the run of a job that is no longer configured")
    scheduler.stop(10)
    assert begun == ["acme", "acme", "retired"]
