"""One run of an export job: seal, write, deliver, settle.

Everything a run decides is in the ledger before it acts on it, so a run can be killed anywhere and the next one goes
on. Two runs of one job at once do some work twice and still end right; the lease (job.py) only saves that work.
"""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import psycopg

from appliance.errors import BatchChangedError, BucketAheadError, BucketError, ForeignObjectError
from appliance.export import history
from appliance.export.delivery import BatchDelivery, Target, target_of
from appliance.export.means import Means
from appliance.export.report import Report, Tally
from appliance.store import counters, ledger, marks, reading, restoring, sealing
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
# While a bucket gets what it has missed, the others get what is new after so long.
_SEAL_AGAIN_SECONDS = 300
# Events of the last minute or two from which on the collector is busy: about fifty a second.
_BUSY_EVENTS = 4_000


class Run:
    """The state of one run."""

    def __init__(self, means: Means, job: str, tally: Tally) -> None:
        self._means = means
        self._settings = means.settings
        self._db = means.db
        self._buckets = means.buckets
        self._job = job
        self._tally = tally
        self._tried: set[Key] = set()
        self._unanswered: dict[str, BucketError] = {}
        self._unmarked_rows = 0
        self._in_order: dict[Key, bool] = {}
        self._seals_ahead = False
        self._ahead: Future[sealing.Sealed | sealing.Nothing | None] | None = None

    def work(self) -> Report:
        """Deliver what no bucket has, then what is new, then what some have. Raises what Exporter.run raises."""
        try:
            self._deliver_undelivered()
            blockers = self._seal_and_deliver()
        except (BatchChangedError, BucketError):
            # What stops the job is no reason to keep its history from a bucket.
            self._catch_up(seals=False)
            raise
        self._catch_up(seals=True)
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
            self._deliver_undelivered()
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
        if not self._is_free(key):
            return sealing.Nothing()
        with self._db.connection() as conn:
            return sealing.seal_next(conn, self._plan())

    def _deliver_undelivered(self) -> None:
        """Deliver what is sealed and stands nowhere yet, in order: another run's batches too, should it die."""
        with self._db.connection() as conn:
            keys = ledger.undelivered(conn, self._job)
        for key in keys:
            self._try(key)

    def _catch_up(self, *, seals: bool) -> None:
        """Deliver what another bucket has already. That may take long, and the others do not wait for it.

        With `seals` they get every few minutes what is new meanwhile.
        """
        with self._db.connection() as conn:
            # These have their turn, in order: what stops one of them stops those that follow it in the chain.
            nowhere = ledger.undelivered(conn, self._job)
            owed = [key for key in ledger.unsettled(conn, self._job) if key not in nowhere]
        sealed_at = time.monotonic()
        for key in owed:
            self._try(key)
            if seals and time.monotonic() - sealed_at > _SEAL_AGAIN_SECONDS:
                self._seal_and_deliver()
                sealed_at = time.monotonic()

    def _try(self, key: Key) -> None:
        """Deliver a batch, once in this run."""
        if key in self._tried:
            return
        self._tried.add(key)
        try:
            self._deliver(key)
        except ledger.OvertakenError as error:
            log.info("export %s: %s", self._job, error)

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
            log.info(
                "export %s: batch %d delivered (%s)",
                self._job,
                key.sequence,
                counted(batch.row_count, "event", "events"),
            )
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
        """Return the buckets that wait for the batch and can take it, their attempts counted.

        A bucket that is ahead stops the job, unless another has the batch: then it is only this one's history.
        """
        targets = {}
        for delivery in batch.deliveries:
            if delivery.delivered or delivery.bucket in self._tally.broken:
                continue
            try:
                targets[delivery.bucket] = target_of(self._means, batch, delivery)
            except BucketAheadError as error:
                self._note_problem(batch.key, delivery.bucket, error)
                if not any(other.delivered for other in batch.deliveries):
                    raise
            except BucketError as error:
                self._fail(batch.key, delivery.bucket, error)
        with self._db.connection() as conn:
            for name in targets:
                ledger.begin_attempt(conn, batch, name)
        return targets

    def _is_free(self, key: Key) -> bool:
        """Refuse to seal a batch that cannot come to one of its buckets: history is not ours to continue.

        A bucket that does not answer is no reason to stop: it is asked again before the first byte leaves. Return False
        where none has ever taken anything and none answers: were they ahead, as after a new installation with wrong
        keys, nothing could be done any more with a batch that is sealed.
        """
        plan = {name: prefix for name, prefix in self._plan().buckets.items() if name not in self._tally.broken}
        for name, prefix in plan.items():
            if name in self._unanswered:
                continue
            try:
                foreign = history.ahead_of(self._means, key, bucket=name, prefix=prefix)
            except BucketError as error:
                # Asked again and again it would cost its time-out each time; it is told with the first batch it misses.
                log.info("bucket %s does not say whether batch %s stands there: %s", name, key, error)
                self._unanswered[name] = error
                continue
            if foreign is not None:
                raise history.bucket_ahead(name, prefix, foreign)
        if not plan.keys() <= self._unanswered.keys():
            return True
        with self._db.connection() as conn:
            if ledger.has_delivered(conn, self._job):
                return True
        self._tally.broken.update(plan)
        self._tally.problems += [str(self._unanswered[name]) for name in plan]
        return False

    # -- small steps --------------------------------------------------------------------------------------------------

    def _fail(self, key: Key, bucket: str, error: BucketError) -> None:
        """Note why a bucket did not get a batch, and leave it alone for the rest of the run."""
        self._tally.broken.add(bucket)
        self._note_problem(key, bucket, error)

    def _note_problem(self, key: Key, bucket: str, error: BucketError) -> None:
        self._tally.problems.append(str(error))
        with self._db.connection() as conn:
            # What stands in the way of one batch is no reason to keep others from the bucket.
            rests = not isinstance(error, ForeignObjectError | BucketAheadError)
            ledger.record_failure(conn, key, bucket, str(error), rests=rests)
