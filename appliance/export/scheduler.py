"""Export jobs on their cron lines, and the small housekeeping, in background threads of the worker.

Several appliances on one database each have every line. When a job comes due, one of them runs it; which one is decided
under the job's lease (job.py). The others look every minute whether it has come to its end, and go on with the job if
it never will: that one may have died.
"""

import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Protocol

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

from appliance.config import Settings
from appliance.errors import ApplianceError
from appliance.export.clock import CronTrigger, WallClock
from appliance.export.job import Exporter
from appliance.export.means import StoppedError
from appliance.export.report import Report
from appliance.store import counters, marks, resting, runs
from appliance.store.database import Connection, Database

log = logging.getLogger(__name__)

# Jobs that were taken out of the configuration still deliver what they have sealed.
_RETIRED_SCHEDULE = "50 * * * *"
_HOUSEKEEPING_SCHEDULE = "* * * * *"
_RETRY_SCHEDULE = "* * * * *"
_RETENTION_SCHEDULE = "25 * * * *"
_THREADS = 4
_LOOK_AT_CLOCK_SECONDS = 20.0


class Run(Protocol):
    """Runs a job; with `due` only if no appliance has run it for that moment yet."""

    def __call__(self, job: str, due: datetime | None = None, /) -> Report:
        """Return what it did."""


class Scheduler:
    """Started once in the worker; stopping it lets a run end at its next safe point."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        exporter: Exporter,
        *,
        run: Run,
        stopping: threading.Event,
    ) -> None:
        self._settings = settings
        self._db = db
        self._exporter = exporter
        self._run = run
        self._stopping = stopping
        self._running = 0
        self._under_way: set[str] = set()
        self._again: set[str] = set()
        # What another appliance has under way, and for which moment.
        self._elsewhere: dict[str, datetime] = {}
        self._idle = threading.Condition()
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(_THREADS)},
            # A late run is still run, once: by default one that is a second late vanishes.
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )

    @property
    def alive(self) -> bool:
        """Whether the clock is running."""
        return bool(self._scheduler.running)

    def start(self) -> None:
        """Begin to run jobs on their lines."""
        for name, export in self._settings.exports.items():
            line = CronTrigger(export.schedule)
            self._add(_name_of(name), line, self._run_due, name, line)
        retired, retries = CronTrigger(_RETIRED_SCHEDULE), CronTrigger(_RETRY_SCHEDULE)
        self._add("exports no longer configured", retired, self._run_retired, retired)
        self._add("retries", retries, self._retry, retries)
        self._add("housekeeping", CronTrigger(_HOUSEKEEPING_SCHEDULE), self._merge_counters)
        if self._settings.retention.keep_days:
            self._add("retention", CronTrigger(_RETENTION_SCHEDULE), self._delete_old_rows)
        self._scheduler.start()
        threading.Thread(target=self._watch_clock, args=(WallClock(),), name="clock", daemon=True).start()

    def next_runs(self) -> dict[str, datetime]:
        """Return when each configured job runs next; nothing while the clock does not run."""
        due = {name: self._scheduler.get_job(_name_of(name)) for name in self._settings.exports if self.alive}
        return {name: job.next_run_time for name, job in due.items() if job is not None}

    def run_soon(self, job: str) -> bool:
        """Run a job now, or once more when the run that is under way has ended; False while the clock does not run."""
        if not self.alive:
            return False
        with self._idle:
            if job in self._under_way:
                self._again.add(job)
                return True
        # Beside its line, not by bringing that forward: a line that has not quite ended would swallow it.
        self._scheduler.add_job(self._guarded, args=(_name_of(job), self._run_export, job), name=f"{job} by hand")
        return True

    def stop(self, timeout_seconds: float) -> None:
        """Start nothing more and wait for what runs; what does not end in time is cut off, which every run survives."""
        self._stopping.set()
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
        deadline = time.monotonic() + timeout_seconds
        with self._idle:
            while self._running and (left := deadline - time.monotonic()) > 0:
                self._idle.wait(left)

    def _add(self, name: str, line: CronTrigger, action: Any, *args: Any) -> None:
        self._scheduler.add_job(self._guarded, line, args=(name, action, *args), id=name, name=name)

    def _guarded(self, name: str, action: Any, *args: Any) -> None:
        """Run one job; the boundary where its errors are logged, because APScheduler would only count them."""
        with self._idle:
            self._running += 1
        try:
            action(*args)
        except StoppedError as error:
            log.info("%s: %s", name, error)
        except ApplianceError as error:
            log.error("%s: %s", name, error)  # noqa: TRY400 - the message says it all
        except Exception:
            log.exception("%s failed", name)
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _watch_clock(self, clock: WallClock) -> None:
        """Where the clock is set back, let every line be due next when it says so, and not when it said so before.

        A thread of its own: the scheduler sleeps until the moments that it once worked out, which may be days ahead.
        """
        while not self._stopping.wait(_LOOK_AT_CLOCK_SECONDS):
            if clock.was_set_back():
                log.warning("the clock was set back: export jobs go by its new time")
                for line in self._scheduler.get_jobs():
                    line.reschedule(line.trigger)

    def _run_due(self, job: str, line: CronTrigger) -> None:
        self._run_export(job, line.fired)

    def _run_export(self, job: str, due: datetime | None = None) -> None:
        """Run a job: in any case, or (`due`) unless another appliance has run it for that moment."""
        if due is not None and self._is_done(job, due):
            log.info("export %s: another appliance has run it", job)
            return
        with self._idle:
            if job in self._under_way:
                self._again.add(job)
                return
            self._under_way.add(job)
        try:
            while True:
                report = self._run(job, due)
                log.log(logging.ERROR if report.failed else logging.INFO, "export %s: %s", job, report.summary)
                if report.skipped and due is not None:
                    self._elsewhere[job] = due
                if not self._is_wanted_again(job):
                    return
                due = None
        except BaseException:
            with self._idle:
                self._under_way.discard(job)
                self._again.discard(job)
            raise

    def _is_wanted_again(self, job: str) -> bool:
        """Return whether somebody has asked for the job while it ran; if not, it no longer runs."""
        with self._idle:
            again = job in self._again and not self._stopping.is_set()
            self._again.discard(job)
            if not again:
                self._under_way.discard(job)
            return again

    def _is_done(self, job: str, due: datetime) -> bool:
        with self._db.connection() as conn:
            return runs.is_done(conn, job, due)

    def _retry(self, line: CronTrigger) -> None:
        """Let jobs come due whose buckets have rested for long enough, and those that another appliance has left.

        Retired ones come due every hour anyway.
        """
        with self._db.connection() as conn:
            wanted = {*resting.jobs_due(conn), *self._left_behind(conn)}
        for job in wanted & self._settings.exports.keys():
            # The same moment on every appliance, so that one of them runs it.
            self._scheduler.modify_job(_name_of(job), next_run_time=line.fired)

    def _left_behind(self, conn: Connection) -> Iterator[str]:
        """Return the jobs that another appliance had under way and has neither ended nor goes on with."""
        for job, due in list(self._elsewhere.items()):
            done = runs.is_done(conn, job, due)
            if not done and runs.is_held(conn, job):
                continue
            del self._elsewhere[job]
            if not done:
                yield job

    def _run_retired(self, line: CronTrigger) -> None:
        for job in self._exporter.jobs():
            if job not in self._settings.exports:
                self._guarded(_name_of(job), self._run_export, job, line.fired)

    def _merge_counters(self) -> None:
        with self._db.connection() as conn:
            counters.merge(conn)

    def _delete_old_rows(self) -> None:
        keep_days = self._settings.retention.keep_days
        deleted = marks.delete_old_rows(self._db, keep_days=keep_days, go_on=lambda: not self._stopping.is_set())
        with self._db.connection() as conn:
            uncovered = marks.uncovered_sites(conn)
        log.info("retention: %d rows deleted, delivered %d days ago or more", deleted, keep_days)
        if uncovered:
            log.warning("retention: no job exports %s: their rows are kept", ", ".join(uncovered))


def _name_of(job: str) -> str:
    return f"export {job}"
