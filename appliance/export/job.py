"""One run of an export job: seal, write, deliver, settle.

Everything a run decides is in the ledger before it acts on it, so a run can be killed anywhere and the next one goes
on. Two runs of one job at once do some work twice and still end right; the lease only saves that work.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import psycopg

from appliance.config import Settings
from appliance.errors import (
    ApplianceError,
    BatchChangedError,
    BucketAheadError,
    BucketError,
    DatabaseUnavailableError,
)
from appliance.export import buckets, manifest
from appliance.export.buckets import Bucket
from appliance.export.formats import LocalObject, local_object, write_objects
from appliance.store import ledger, reading, runs, sealing
from appliance.store.database import Database
from appliance.store.ledger import Batch, Delivery, Key
from appliance.store.migrations import SCHEMA_VERSION
from appliance.store.sealing import Writer

log = logging.getLogger(__name__)

# Frozen into each batch: a change here affects batches sealed afterwards.
BATCH_ROWS = 500_000
OBJECT_ROWS = 500_000
OBJECT_BYTES = 256 * 1024 * 1024


class StoppedError(ApplianceError):
    """The appliance is shutting down; the next run goes on where this one stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one run did. `problems` are deliveries that stay pending, each with its reason."""

    job: str
    batches: int = 0
    row_count: int = 0
    problems: tuple[str, ...] = ()
    blockers: tuple[Writer, ...] = ()
    skipped: bool = False

    @property
    def failed(self) -> bool:
        """Whether something was not delivered that should have been."""
        return bool(self.problems)

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.skipped:
            return "another run of this job is under way"
        done = f"{self.row_count} events in {self.batches} {'batch' if self.batches == 1 else 'batches'} delivered"
        if not self.batches:
            done = "nothing new delivered"
        waits = [f"nothing new was sealed: {writer}" for writer in self.blockers]
        return "; ".join([done, *waits, *self.problems])


@dataclass(slots=True)
class _Tally:
    """What a run has done so far, and which buckets have failed in it."""

    job: str
    batches: int = 0
    row_count: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    def report(self, blockers: tuple[Writer, ...] = ()) -> Report:
        problems = tuple(dict.fromkeys(self.broken.values()))
        return Report(
            job=self.job, batches=self.batches, row_count=self.row_count, problems=problems, blockers=blockers
        )


@dataclass(frozen=True, slots=True)
class _Target:
    """A bucket that a batch is being delivered to."""

    delivery: Delivery
    bucket: Bucket


class Exporter:
    """Runs export jobs. One for a process; its methods may be called from several threads."""

    def __init__(
        self, settings: Settings, db: Database, *, conninfo: str, stopping: threading.Event | None = None
    ) -> None:
        self._settings = settings
        self._db = db
        self._conninfo = conninfo
        self._buckets = buckets.build(settings)
        self._stopping = stopping or threading.Event()
        self._work_dir = settings.server.data_dir / "tmp"

    def jobs(self) -> list[str]:
        """Return the configured jobs, and those no longer configured that still owe a delivery."""
        with self._db.connection() as conn:
            owing = ledger.jobs_with_unsettled(conn)
        return [*self._settings.exports, *(job for job in owing if job not in self._settings.exports)]

    def sync_coverage(self) -> None:
        """Write into the ledger what the configuration covers: rows are not marked before all their jobs have them."""
        with self._db.connection() as conn:
            sealing.sync_coverage(conn, {name: export.sites for name, export in self._settings.exports.items()})

    def run(self, job: str, *, wait_for_lease: bool = False) -> Report:
        """Deliver everything there is to deliver. A bucket that fails is in the report, the other one goes on.

        Raises BucketAheadError, DatabaseUnavailableError, BatchChangedError, StoppedError. With `wait_for_lease` a run
        that another process has under way, or has left behind, is waited for.
        """
        holder = uuid4()
        with self._lease(job, holder, wait=wait_for_lease) as held:
            if not held:
                return Report(job=job, skipped=True)
            with self._db.connection() as conn:
                run_id = runs.start(conn, job)
            tally = _Tally(job)
            try:
                report = _Run(self, job, holder, tally).work()
            except Exception as error:
                self._record_crash(run_id, tally, error)
                raise
            self._record(run_id, report, failed=report.failed, message=report.summary)
            return report

    def _record(self, run_id: int, report: Report, *, failed: bool, message: str) -> None:
        with self._db.connection() as conn:
            runs.finish(
                conn, run_id, failed=failed, batches=report.batches, row_count=report.row_count, message=message
            )

    def _record_crash(self, run_id: int, tally: _Tally, error: Exception) -> None:
        # The error itself goes on to the caller; a database that is away cannot also note it.
        with suppress(DatabaseUnavailableError):
            self._record(run_id, tally.report(), failed=not isinstance(error, StoppedError), message=str(error))

    @contextmanager
    def _lease(self, job: str, holder: UUID, *, wait: bool) -> Iterator[bool]:
        held = self._take_lease(job, holder)
        if not held and wait:
            log.info("export %s: another run is under way, or was cut off in the last seconds; waiting for it", job)
        while not held and wait:
            time.sleep(0.5)
            held = self._take_lease(job, holder)
        try:
            yield held
        finally:
            with suppress(DatabaseUnavailableError), self._db.connection() as conn:
                runs.release_lease(conn, job, holder)

    def _take_lease(self, job: str, holder: UUID) -> bool:
        with self._db.connection() as conn:
            return runs.take_lease(conn, job, holder)


class _Run:
    """The state of one run."""

    def __init__(self, exporter: Exporter, job: str, holder: UUID, tally: _Tally) -> None:
        self._settings = exporter._settings  # noqa: SLF001 - a run is the inside of its exporter
        self._db = exporter._db  # noqa: SLF001
        self._conninfo = exporter._conninfo  # noqa: SLF001
        self._buckets = exporter._buckets  # noqa: SLF001
        self._stopping = exporter._stopping  # noqa: SLF001
        self._work_dir = exporter._work_dir  # noqa: SLF001
        self._sync_coverage = exporter.sync_coverage
        self._job = job
        self._holder = holder
        self._tally = tally

    def work(self) -> Report:
        self._sync_coverage()
        with self._db.connection() as conn:
            owed = ledger.unsettled(conn, self._job)
        for key in owed:
            self._deliver(key)
        blockers = self._seal_and_deliver()
        ledger.mark_settled_rows(self._db)
        return self._tally.report(blockers)

    def _seal_and_deliver(self) -> tuple[Writer, ...]:
        """Work through everything that is not sealed yet, as long as any bucket takes it."""
        export = self._settings.exports.get(self._job)
        if export is None:
            return ()
        while any(name not in self._tally.broken for name in export.bucket_names):
            sealed = self._seal()
            if isinstance(sealed, sealing.Nothing):
                return sealed.blockers
            self._deliver(sealed)
        return ()

    def _seal(self) -> Key | sealing.Nothing:
        while True:
            try:
                with self._db.connection() as conn:
                    return sealing.seal_next(conn, self._plan())
            except (ledger.OvertakenError, psycopg.errors.UniqueViolation) as error:
                # Its batch is complete in the ledger: look again at what is left.
                log.info("export %s: another run was faster (%s)", self._job, type(error).__name__)

    def _plan(self) -> sealing.Plan:
        export = self._settings.exports[self._job]
        return sealing.Plan(
            job=self._job,
            format=export.format,
            compression=export.compression,
            object_rows=OBJECT_ROWS,
            object_bytes=OBJECT_BYTES,
            batch_rows=BATCH_ROWS,
            schema_version=SCHEMA_VERSION,
            buckets={name: self._settings.buckets[name].prefix for name in export.bucket_names},
        )

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _deliver(self, key: Key) -> None:
        """Bring one batch to every bucket that waits for it and can take it, then settle it if that was the last."""
        self._safe_point()
        with self._db.connection() as conn:
            batch = ledger.load(conn, key)
        targets = {t.delivery.bucket: t for t in self._targets(batch)}
        # A batch whose buckets all fail is still written once: the next manifest needs the digest of its own.
        if targets or batch.manifest is None:
            with self._scratch() as directory:
                self._deliver_objects(batch, targets, directory)
                self._deliver_manifest(batch, targets, directory)
        with self._db.connection() as conn:
            settled = ledger.settle(conn, key)
        if settled:
            log.info("export %s: batch %d delivered (%d events)", self._job, key.sequence, batch.row_count)
            self._tally.batches += 1
            self._tally.row_count += batch.row_count

    def _targets(self, batch: Batch) -> Iterator[_Target]:
        for delivery in batch.deliveries:
            if delivery.delivered or delivery.bucket in self._tally.broken:
                continue
            if delivery.bucket not in self._buckets:
                gone = f"bucket {delivery.bucket}: it is no longer in the configuration, and batches wait for it"
                self._fail(batch.key, delivery.bucket, BucketError(gone))
                continue
            target = _Target(delivery, self._buckets[delivery.bucket])
            try:
                self._prove_not_ahead(batch.key, target)
            except BucketAheadError as error:
                self._fail(batch.key, delivery.bucket, error)
                raise
            except BucketError as error:
                self._fail(batch.key, delivery.bucket, error)
                continue
            with self._db.connection() as conn:
                ledger.begin_attempt(conn, batch.key, delivery.bucket)
            yield target

    def _prove_not_ahead(self, key: Key, target: _Target) -> None:
        """Refuse a bucket that holds this batch's manifest although the ledger never sent anything of it there.

        The ledger is asked again after the bucket: of two runs at once the other may have delivered it meanwhile.
        """
        if target.delivery.attempts:
            return
        where = buckets.join(target.delivery.prefix, manifest.manifest_key(key))
        if not target.bucket.exists(where):
            return
        with self._db.connection() as conn:
            now = next(d for d in ledger.deliveries(conn, key) if d.bucket == target.delivery.bucket)
        if not now.attempts:
            raise BucketAheadError(
                f"bucket {target.delivery.bucket} is ahead: {where} stands there, and this installation has not "
                "written it: restore from it, or choose another prefix"
            )

    def _deliver_objects(self, batch: Batch, targets: dict[str, _Target], directory: Path) -> None:
        try:
            with reading.json_lines(self._conninfo, batch.ranges, expected_rows=batch.row_count) as rows:
                for made in write_objects(rows, batch, directory):
                    self._safe_point()
                    with self._db.connection() as conn:
                        ledger.record_object(conn, batch.key, made.record)
                    self._put_everywhere(batch.key, targets, made.record.key, made.local)
                    made.local.path.unlink()
        except BatchChangedError as error:
            if batch.manifest is None:
                raise
            log.warning("export %s: %s; copying it from a bucket that has it", batch.key, error)
            self._copy_objects(batch, targets, directory)

    def _copy_objects(self, batch: Batch, targets: dict[str, _Target], directory: Path) -> None:
        """Bring a batch whose rows can no longer make its bytes from a bucket that has it to those that lack it."""
        source = next((d for d in batch.deliveries if d.delivered and d.bucket in self._buckets), None)
        if source is None:
            raise BatchChangedError(f"batch {batch.key}: its rows have changed, and no bucket has it whole")
        with self._db.connection() as conn:
            recorded = ledger.objects(conn, batch.key)
        for record in recorded:
            self._safe_point()
            path = directory / "copy"
            self._buckets[source.bucket].fetch(buckets.join(source.prefix, record.key), path)
            local = local_object(path, path.read_bytes())
            if local.sha256 != record.sha256:
                raise BucketError(f"bucket {source.bucket}: {record.key} is not what was delivered there")
            self._put_everywhere(batch.key, targets, record.key, local)

    def _deliver_manifest(self, batch: Batch, targets: dict[str, _Target], directory: Path) -> None:
        text = batch.manifest or self._make_manifest(batch)
        local = local_object(directory / "manifest", text.encode())
        self._put_everywhere(batch.key, targets, manifest.manifest_key(batch.key), local)
        for name in targets:
            with self._db.connection() as conn:
                ledger.record_delivered(conn, batch.key, name)

    def _make_manifest(self, batch: Batch) -> str:
        with self._db.connection() as conn:
            before = ledger.manifest_sha256(conn, Key(batch.key.job, batch.key.sequence - 1))
            if before is None and batch.key.sequence > 1:
                raise ApplianceError(f"batch {batch.key}: the batch before it has no manifest yet")
            made = manifest.build(
                batch,
                ledger.objects(conn, batch.key),
                installation=ledger.installation_id(conn),
                previous_sha256=before,
            )
            return ledger.record_manifest(conn, batch.key, made.text, made.sha256)

    # -- small steps --------------------------------------------------------------------------------------------------

    def _put_everywhere(self, key: Key, targets: dict[str, _Target], name: str, local: LocalObject) -> None:
        """Put an object into each bucket; one that fails is out for the rest of this run and holds no other back."""
        for bucket, target in list(targets.items()):
            try:
                target.bucket.put(buckets.join(target.delivery.prefix, name), local)
            except BucketError as error:
                del targets[bucket]
                self._fail(key, bucket, error)

    def _fail(self, key: Key, bucket: str, error: BucketError) -> None:
        self._tally.broken[bucket] = str(error)
        with self._db.connection() as conn:
            ledger.record_failure(conn, key, bucket, str(error))

    def _safe_point(self) -> None:
        """Stop here when the appliance shuts down, and keep the lease while it does not."""
        if self._stopping.is_set():
            raise StoppedError("stopped with the appliance; the next run goes on")
        with self._db.connection() as conn:
            runs.take_lease(conn, self._job, self._holder)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        self._work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._work_dir, prefix=f"{self._job}-") as name:
            yield Path(name)
