"""What metrics tell of exports, read from the database at most so often that reading costs it little."""

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import psycopg

from appliance.collect.tallies import Histogram
from appliance.errors import DatabaseUnavailableError
from appliance.log import Seldom
from appliance.store import figures
from appliance.store.database import Database, first_line
from appliance.store.figures import Backlog, BucketFigures, FinishedRun

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
# What was read is good for as many times as long as reading it took, whoever asks: however long the history has become,
# the database spends no more than a fiftieth of its time on this.
_GOOD_FOR = 50
_GOOD_FOR_SECONDS = 0.5
_RUN_SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 10_800.0)


@dataclass(slots=True)
class RunTally:
    """The runs of one job that have ended: the ledger keeps the last ones, so they are counted as they come."""

    last: int = 0
    outcomes: Counter[str] = field(default_factory=lambda: Counter(done=0, failed=0))
    seconds: Histogram = field(default_factory=lambda: Histogram(_RUN_SECONDS))
    events: int = 0
    batches: int = 0

    def note(self, run: FinishedRun) -> None:
        """Count a run."""
        self.last = run.number
        self.outcomes["failed" if run.failed else "done"] += 1
        self.seconds.note(run.seconds)
        self.events += run.events
        self.batches += run.batches


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFigures:
    """What the database says."""

    backlog: list[Backlog]
    buckets: list[BucketFigures]
    runs: dict[str, RunTally]
    database_bytes: int


class LedgerReader:
    """Reads, for one scrape at a time."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._runs: dict[str, RunTally] = {}
        self._read: LedgerFigures | None = None
        self._good_until = 0.0
        self._complaints = Seldom(seconds=600)
        self._lock = threading.Lock()

    def read(self) -> LedgerFigures | None:
        """Return the figures; None while the database is away."""
        with self._lock:
            started = time.monotonic()
            if self._read is None or started >= self._good_until:
                self._read = self._fresh()
                took = time.monotonic() - started
                self._good_until = started + max(_GOOD_FOR * took, _GOOD_FOR_SECONDS)
            return self._read

    def _fresh(self) -> LedgerFigures | None:
        try:
            with self._db.connection(wait_seconds=1, answer_seconds=_ANSWER_SECONDS) as conn:
                runs = figures.runs_since(conn, {job: tally.last for job, tally in self._runs.items()})
                read = LedgerFigures(
                    backlog=figures.backlog(conn),
                    buckets=figures.buckets(conn),
                    runs=self._runs,
                    database_bytes=figures.database_bytes(conn),
                )
        except (DatabaseUnavailableError, psycopg.Error) as error:
            if self._complaints.due():
                log.warning("metrics lack what the database knows: %s", first_line(error))
            return None
        for run in runs:
            self._runs.setdefault(run.job, RunTally()).note(run)
        return read
