"""One run of an export job: seal, write, deliver, settle.

Everything a run decides is in the ledger before it acts on it, so a run can be killed anywhere and the next one goes
on. Two runs of one job at once do some work twice and still end right; the lease only saves that work.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from uuid import UUID, uuid4

import psycopg

from appliance.config import Settings
from appliance.errors import (
    BucketAheadError,
    BucketError,
    DatabaseUnavailableError,
)
from appliance.export import buckets, manifest
from appliance.export.buckets import Bucket
from appliance.export.delivery import BatchDelivery, Target, bucket_ahead, target_of
from appliance.export.means import Means, StoppedError
from appliance.store import counters, ledger, marks, reading, resting, restoring, runs, sealing
from appliance.store.database import Database
from appliance.store.events import EXPORT_SCHEMA_VERSION, newest_id
from appliance.store.ledger import Batch, Key
from appliance.store.sealing import Writer
from appliance.words import counted

log = logging.getLogger(__name__)

# Frozen into each batch: a change here affects batches sealed afterwards.
BATCH_ROWS = 125_000
BATCH_BYTES = 2 * 1024 * 1024 * 1024
OBJECT_ROWS = 500_000
OBJECT_BYTES = 256 * 1024 * 1024
# From so many rows on it is worth a thread to mark and to seal while a batch is delivered.
_BESIDE_ROWS = 20_000
# Events of the last minute or two from which on the collector is busy: about fifty a second.
_BUSY_EVENTS = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one run did. `problems` are deliveries that stay pending, each with its reason.

    `batches` every bucket has now; of those that another bucket still waits for, `partly` says how many each got.
    Buckets that failed before are `resting` until a moment in UTC. Nothing was done where another run was under way
    (`skipped`), or had been made for the moment at which this one was due (`done_elsewhere`).
    """

    job: str
    batches: int = 0
    row_count: int = 0
    partly: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    blockers: tuple[Writer, ...] = ()
    resting: Mapping[str, datetime] = field(default_factory=dict)
    skipped: bool = False
    done_elsewhere: bool = False

    @property
    def failed(self) -> bool:
        """Whether something was not delivered that should have been."""
        return bool(self.problems)

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.skipped:
            return "another run of this job is under way"
        if self.done_elsewhere:
            return "another appliance has run it"
        done = [f"{self.row_count} events in {_batches(self.batches)} delivered"] if self.batches else []
        done += [f"{_batches(number)} delivered to {bucket}" for bucket, number in self.partly.items()]
        waits = [f"nothing new was sealed: {writer}" for writer in self.blockers]
        waits += [f"bucket {name} failed and is left alone until {at:%H:%M:%S}" for name, at in self.resting.items()]
        return "; ".join([*(done or ["nothing new delivered"]), *waits, *self.problems])


def _batches(number: int) -> str:
    return counted(number, "batch", "batches")


@dataclass(slots=True)
class _Tally:
    """What a run has done so far, and which buckets have failed in it."""

    job: str
    batches: int = 0
    row_count: int = 0
    partly: Counter[str] = field(default_factory=Counter)
    broken: set[str] = field(default_factory=set)
    resting: dict[str, datetime] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def report(self, blockers: tuple[Writer, ...] = ()) -> Report:
        problems = tuple(dict.fromkeys(self.problems))
        return Report(
            job=self.job,
            batches=self.batches,
            row_count=self.row_count,
            partly=dict(self.partly),
            problems=problems,
            blockers=blockers,
            resting=dict(self.resting),
        )


class Exporter:
    """Runs export jobs. One for a process; its methods may be called from several threads."""

    def __init__(
        self, settings: Settings, db: Database, *, conninfo: str, stopping: threading.Event | None = None
    ) -> None:
        self.means = Means.of(settings, db, conninfo=conninfo, stopping=stopping)

    def jobs(self) -> list[str]:
        """Return the configured jobs, and those no longer configured that still owe a delivery."""
        with self.means.db.connection() as conn:
            owing = ledger.jobs_with_unsettled(conn)
        return [*self.means.settings.exports, *(job for job in owing if job not in self.means.settings.exports)]

    def sync_coverage(self, *, retire: bool = True) -> None:
        """Write into the ledger what the configuration covers: rows are not marked before all their jobs have them.

        Only `serve` ends what is no longer configured: a command that was given another file by mistake would end the
        jobs of the appliance that runs, and rows would be marked that they have not delivered.
        """
        jobs = {name: export.sites for name, export in self.means.settings.exports.items()}
        with self.means.db.connection() as conn:
            sealing.sync_coverage(conn, jobs, retire=retire)

    def run(
        self, job: str, *, wait_for_lease: bool = False, spare_resting: bool = False, due: datetime | None = None
    ) -> Report:
        """Deliver everything there is to deliver. A bucket that fails is in the report, the other one goes on.

        Raises BucketAheadError, DatabaseUnavailableError, BatchChangedError, StoppedError, and BucketError where only a
        bucket that does not answer knows what a batch was made of. With `wait_for_lease` a run that another process has
        under way, or has left behind, is waited for; with `spare_resting` buckets are left alone for a while after they
        have failed. Of several appliances whose clocks say that the job is `due`, one runs it.
        """
        holder = uuid4()
        with self._lease(job, holder, wait=wait_for_lease) as held:
            if not held:
                return Report(job=job, skipped=True)
            with self.means.db.connection() as conn:
                # Under the lease: the one that had it before has said what it has done before it let go.
                if due is not None and runs.is_done(conn, job, due):
                    return Report(job=job, done_elsewhere=True)
                run_id = runs.start(conn, job)
                rests = resting.until(conn, job) if spare_resting else {}
            tally = _Tally(job, broken=set(rests), resting=rests)
            try:
                report = _Run(self, job, tally).work()
            except Exception as error:
                self._record_crash(run_id, tally, error, due)
                raise
            self._record(run_id, report, failed=report.failed, message=report.summary, due=due)
            return report

    def _record(self, run_id: int, report: Report, *, failed: bool, message: str, due: datetime | None) -> None:
        with self.means.db.connection() as conn:
            runs.finish(
                conn,
                run_id,
                failed=failed,
                batches=report.batches,
                row_count=report.row_count,
                message=message,
                due=due,
            )

    def _record_crash(self, run_id: int, tally: _Tally, error: Exception, due: datetime | None) -> None:
        # What was cut off, another appliance may go on with at once.
        stopped = isinstance(error, StoppedError)
        unfinished = stopped or isinstance(error, DatabaseUnavailableError)
        # The error itself goes on to the caller; a database that is away cannot also note it.
        with suppress(DatabaseUnavailableError):
            self._record(
                run_id, tally.report(), failed=not stopped, message=str(error), due=None if unfinished else due
            )

    @contextmanager
    def _lease(self, job: str, holder: UUID, *, wait: bool) -> Iterator[bool]:
        held = self._take_lease(job, holder)
        if not held and wait:
            log.info("export %s: another run is under way, or was cut off in the last seconds; waiting for it", job)
        while not held and wait:
            time.sleep(0.5)
            held = self._take_lease(job, holder)
        ended = threading.Event()
        if held:
            threading.Thread(target=self._renew_lease, args=(job, holder, ended), daemon=True).start()
        try:
            yield held
        finally:
            ended.set()
            with suppress(DatabaseUnavailableError), self.means.db.connection() as conn:
                runs.release_lease(conn, job, holder)

    def _renew_lease(self, job: str, holder: UUID, ended: threading.Event) -> None:
        """Keep the lease while the run lasts: one large object may take longer than a lease does."""
        while not ended.wait(runs.RENEW_LEASE_SECONDS):
            with suppress(DatabaseUnavailableError):
                self._take_lease(job, holder)

    def _take_lease(self, job: str, holder: UUID) -> bool:
        with self.means.db.connection() as conn:
            return runs.take_lease(conn, job, holder)


class _Run:
    """The state of one run."""

    def __init__(self, exporter: Exporter, job: str, tally: _Tally) -> None:
        self._means = exporter.means
        self._settings = exporter.means.settings
        self._db = exporter.means.db
        self._buckets = exporter.means.buckets
        self._sync_coverage = exporter.sync_coverage
        self._job = job
        self._tally = tally
        self._tried: set[Key] = set()
        self._unanswered: set[str] = set()
        self._unmarked_rows = 0
        self._in_order: dict[Key, bool] = {}
        self._seals_ahead = False
        self._ahead: Future[sealing.Sealed | sealing.Nothing | None] | None = None

    def work(self) -> Report:
        self._sync_coverage(retire=False)
        self._deliver_owed()
        blockers = self._seal_and_deliver()
        self._mark()
        return self._tally.report(blockers)

    def _mark(self) -> None:
        marks.mark_settled_rows(self._db, go_on=self._means.go_on)

    def _seal_and_deliver(self) -> tuple[Writer, ...]:
        """Work through everything that is not sealed yet, as long as any bucket takes it."""
        export = self._settings.exports.get(self._job)
        if export is None or self._restoring():
            return ()
        with self._db.connection() as conn:
            goal = newest_id(conn)
        while any(name not in self._tally.broken for name in export.bucket_names):
            sealed = self._next_sealed()
            if isinstance(sealed, sealing.Nothing):
                return sealed.blockers
            # What has come in meanwhile is for the next run: under steady traffic there is always more, and one run
            # would seal it in ever smaller batches and never end.
            is_last = sealed is not None and self._end_of(sealed.key) >= goal
            self._seals_ahead = sealed is not None and sealed.row_count >= _BESIDE_ROWS and not is_last
            self._deliver_owed()
            if is_last:
                return ()
        return ()

    def _restoring(self) -> bool:
        with self._db.connection() as conn:
            bucket = ledger.restoring_from(conn)
        if bucket is not None:
            self._tally.problems.append(restoring.unfinished(bucket))
        return bucket is not None

    def _end_of(self, key: Key) -> int:
        with self._db.connection() as conn:
            return max(r.to_id for r in ledger.load(conn, key).ranges)

    def _next_sealed(self) -> sealing.Sealed | sealing.Nothing | None:
        """Return the next batch, sealed beside the one before it or now; None when another run was faster."""
        ahead, self._ahead = self._ahead, None
        sealed = ahead.result() if ahead else self._try_to_seal()
        if isinstance(sealed, sealing.Sealed):
            self._in_order[sealed.key] = sealed.in_order
        return sealed

    def _try_to_seal(self) -> sealing.Sealed | sealing.Nothing | None:
        try:
            return self._seal()
        except (ledger.OvertakenError, psycopg.errors.UniqueViolation) as error:
            log.info("export %s: another run was faster (%s)", self._job, type(error).__name__)
            return None

    def _seal(self) -> sealing.Sealed | sealing.Nothing:
        with self._db.connection() as conn:
            key = sealing.next_key(conn, self._job)
        if key is None:
            return sealing.Nothing()
        # It takes a while, and so does what the database is asked here.
        threading.Thread(target=reading.load_arrow, daemon=True).start()
        # Outside the transaction that seals: a bucket that hangs must not hold up what other jobs decide.
        self._prove_free(key)
        with self._db.connection() as conn:
            return sealing.seal_next(conn, self._plan())

    def _deliver_owed(self) -> None:
        """Deliver what is sealed and not tried in this run yet, in order: another run's batches too, should it die."""
        with self._db.connection() as conn:
            owed = ledger.unsettled(conn, self._job)
        for key in owed:
            if key not in self._tried:
                self._tried.add(key)
                self._deliver(key)

    def _plan(self) -> sealing.Plan:
        export = self._settings.exports[self._job]
        return sealing.Plan(
            job=self._job,
            format=export.format,
            compression=export.codec,
            object_rows=OBJECT_ROWS,
            object_bytes=OBJECT_BYTES,
            escape_formulas=export.escape_formulas,
            batch_rows=BATCH_ROWS,
            batch_bytes=BATCH_BYTES,
            schema_version=EXPORT_SCHEMA_VERSION,
            buckets={name: self._settings.buckets[name].prefix for name in export.bucket_names},
        )

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _deliver(self, key: Key) -> None:
        """Bring one batch to every bucket that waits for it and can take it, then settle it if that was the last."""
        self._means.stop_here_if_told()
        with self._db.connection() as conn:
            batch = ledger.load(conn, key)
        targets = self._targets(batch)
        # A batch whose buckets all fail is still written once: the next manifest needs the digest of its own.
        if targets or batch.manifest is None:
            with self._means.scratch(self._job) as directory, self._beside():
                BatchDelivery(
                    db=self._db,
                    conninfo=self._means.conninfo,
                    all_buckets=self._buckets,
                    batch=batch,
                    targets=targets,
                    directory=directory,
                    fail=partial(self._fail, key),
                    note_problem=partial(self._note_problem, key),
                    safe_point=self._means.stop_here_if_told,
                    # What this run has sealed it need not look through once more.
                    in_order=self._in_order.pop(key, None),
                ).deliver()
        with self._db.connection() as conn:
            settled = ledger.settle(conn, key)
        if settled:
            log.info("export %s: batch %d delivered (%d events)", self._job, key.sequence, batch.row_count)
            self._tally.batches += 1
            self._tally.row_count += batch.row_count
            self._unmarked_rows += batch.row_count
        else:
            # Those that failed are no longer among the targets.
            self._tally.partly.update(list(targets))

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """While the block delivers a batch, mark the ones before it and seal the next: both only read and write rows.

        That has ended when the block's batch settles: what is marked does not depend on who is faster. What sealing
        raises is raised when the next batch is wanted.
        """
        marks_now = self._unmarked_rows >= _BESIDE_ROWS
        if (marks_now or self._seals_ahead) and self._collector_is_busy():
            # Commits of events would wait for all that is written to the log at once: one thing after the other, then.
            marks_now = self._seals_ahead = False
        with ThreadPoolExecutor(1, thread_name_prefix="beside") as thread:
            marking = thread.submit(self._mark) if marks_now else None
            self._ahead = thread.submit(self._try_to_seal) if self._seals_ahead else None
            self._seals_ahead = False
            yield
            if marking is not None:
                self._unmarked_rows = 0
                marking.result()

    def _collector_is_busy(self) -> bool:
        with self._db.connection() as conn:
            return counters.lately(conn) > _BUSY_EVENTS

    def _targets(self, batch: Batch) -> dict[str, Target]:
        """Return the buckets that wait for the batch and can take it, their attempts counted."""
        targets = {}
        for delivery in batch.deliveries:
            if delivery.delivered or delivery.bucket in self._tally.broken:
                continue
            try:
                targets[delivery.bucket] = target_of(self._means, batch, delivery)
            except BucketError as error:
                self._fail(batch.key, delivery.bucket, error)
                if isinstance(error, BucketAheadError):
                    raise
        with self._db.connection() as conn:
            for name in targets:
                ledger.begin_attempt(conn, batch.key, name)
        return targets

    def _prove_free(self, key: Key) -> None:
        """Refuse to seal a batch whose manifest stands in one of its buckets already: history is not ours to continue.

        A bucket that does not answer is no reason to stop: it is asked again before the first byte leaves.
        """
        for name, prefix in self._plan().buckets.items():
            if name in self._tally.broken or name in self._unanswered:
                continue
            try:
                stands = self._manifest_stands(self._buckets[name], prefix, key)
            except BucketError as error:
                # Asked again and again it would cost its time-out each time; it is told with the first batch it misses.
                log.info("bucket %s does not say whether batch %s stands there: %s", name, key, error)
                self._unanswered.add(name)
                continue
            if stands:
                with self._db.connection() as conn:
                    if ledger.exists(conn, key):
                        raise ledger.OvertakenError(f"another run has sealed batch {key}")
                raise bucket_ahead(name, prefix, key)

    @staticmethod
    def _manifest_stands(bucket: Bucket, prefix: str, key: Key) -> bool:
        return bucket.exists(buckets.join(prefix, manifest.manifest_key(key)))

    # -- small steps --------------------------------------------------------------------------------------------------

    def _fail(self, key: Key, bucket: str, error: BucketError) -> None:
        """Note why a bucket did not get a batch, and leave it alone for the rest of the run."""
        self._tally.broken.add(bucket)
        self._note_problem(key, bucket, error)

    def _note_problem(self, key: Key, bucket: str, error: BucketError) -> None:
        self._tally.problems.append(str(error))
        with self._db.connection() as conn:
            ledger.record_failure(conn, key, bucket, str(error))
