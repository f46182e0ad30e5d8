"""Export jobs on their cron lines, and the small housekeeping, in background threads of the worker."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from cronsim import CronSim

from appliance.config import Settings
from appliance.errors import ApplianceError
from appliance.export.job import Exporter, Report
from appliance.export.means import StoppedError
from appliance.store import counters, marks, resting
from appliance.store.database import Database

log = logging.getLogger(__name__)

# Jobs that were taken out of the configuration still deliver what they have sealed.
_RETIRED_SCHEDULE = "50 * * * *"
_HOUSEKEEPING_SCHEDULE = "* * * * *"
_RETRY_SCHEDULE = "* * * * *"
_RETENTION_SCHEDULE = "25 * * * *"
_THREADS = 4


class CronTrigger(BaseTrigger):
    """A cron line in UTC as crontab(5) reads it; APScheduler's own trigger takes 0 for Monday."""

    def __init__(self, line: str) -> None:
        self._line = line

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """Return the first moment after the last run, or after now before the first."""
        return next(CronSim(self._line, (previous_fire_time or now).astimezone(UTC)))

    def __str__(self) -> str:
        return f"cron[{self._line}]"


class Scheduler:
    """Started once in the worker; stopping it lets a run end at its next safe point."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        exporter: Exporter,
        *,
        run: Callable[[str], Report],
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
            self._add(_name_of(name), export.schedule, self._run_export, name)
        self._add("exports no longer configured", _RETIRED_SCHEDULE, self._run_retired)
        self._add("retries", _RETRY_SCHEDULE, self._retry)
        self._add("housekeeping", _HOUSEKEEPING_SCHEDULE, self._merge_counters)
        if self._settings.retention.keep_days:
            self._add("retention", _RETENTION_SCHEDULE, self._delete_old_rows)
        self._scheduler.start()

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

    def _add(self, name: str, line: str, action: Any, *args: str) -> None:
        self._scheduler.add_job(self._guarded, CronTrigger(line), args=(name, action, *args), id=name, name=name)

    def _guarded(self, name: str, action: Any, *args: str) -> None:
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

    def _run_export(self, job: str) -> None:
        with self._idle:
            if job in self._under_way:
                self._again.add(job)
                return
            self._under_way.add(job)
        try:
            while True:
                report = self._run(job)
                log.log(logging.ERROR if report.failed else logging.INFO, "export %s: %s", job, report.summary)
                if not self._is_wanted_again(job):
                    return
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

    def _retry(self) -> None:
        """Let jobs come due whose buckets have rested for long enough; retired ones come due every hour anyway."""
        with self._db.connection() as conn:
            due = resting.jobs_due(conn)
        for job in due:
            if job in self._settings.exports:
                self._scheduler.modify_job(_name_of(job), next_run_time=datetime.now(UTC))

    def _run_retired(self) -> None:
        for job in self._exporter.jobs():
            if job not in self._settings.exports:
                self._guarded(_name_of(job), self._run_export, job)

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
