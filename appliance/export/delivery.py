"""Bringing one batch to its buckets: its objects one after the other, its manifest last."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.errors import ApplianceError, BatchChangedError, BucketError, ForeignObjectError
from appliance.export import buckets, history, manifest
from appliance.export.buckets import Bucket
from appliance.export.files import LocalObject, described
from appliance.export.means import Means
from appliance.export.objects import MadeObject, write_objects
from appliance.store import ledger, reading
from appliance.store.database import Database
from appliance.store.ledger import Batch, Delivery, Key, ObjectRecord

log = logging.getLogger(__name__)

_UPLOADS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Target:
    """A bucket that a batch is being delivered to."""

    delivery: Delivery
    bucket: Bucket


def target_of(means: Means, batch: Batch, delivery: Delivery) -> Target:
    """Return the target of a delivery. Raises BucketAheadError where history stands that is not ours; BucketError."""
    if delivery.bucket not in means.buckets:
        gone = f"bucket {delivery.bucket}: it is no longer in the configuration, and batches wait for it"
        raise BucketError(gone)
    if not delivery.attempts and not delivery.delivered:
        history.check_first_attempt(means, batch, delivery)
    return Target(delivery, means.buckets[delivery.bucket])


class BatchDelivery:
    """Writes a batch and puts it into each of its targets; a target that fails is dropped, the others go on.

    Without targets the batch is written all the same, once: the next manifest carries the digest of this one's.
    """

    def __init__(  # noqa: PLR0913 - what a run lends it
        self,
        *,
        db: Database,
        conninfo: str,
        all_buckets: Mapping[str, Bucket],
        batch: Batch,
        targets: dict[str, Target],
        directory: Path,
        fail: Callable[[str, BucketError], None],
        note_problem: Callable[[str, BucketError], None],
        safe_point: Callable[[], None],
        in_order: bool | None = None,
    ) -> None:
        self._db = db
        self._conninfo = conninfo
        self._buckets = all_buckets
        self._batch = batch
        self._targets = targets
        self._directory = directory
        self._fail = fail
        self._note_problem = note_problem
        self._safe_point = safe_point
        self._in_order = in_order

    def deliver(self) -> None:
        """Do it. Raises BatchChangedError where the rows have changed before any bucket had the batch.

        Raises BucketError where only a bucket that does not answer can tell which bytes a batch without a manifest has:
        until it has one, no later batch can have one either.
        """
        self._deliver_objects()
        self._deliver_manifest()

    def _deliver_objects(self) -> None:
        try:
            with reading.rows_of(self._conninfo, self._batch, in_order=self._in_order) as rows:
                for made in write_objects(rows, self._batch, self._directory):
                    self._safe_point()
                    local = self._as_recorded(made)
                    self._put_everywhere(made.record.key, local)
        except BatchChangedError as error:
            if self._batch.manifest is None:
                raise
            log.warning("batch %s: %s; copying it from a bucket that has it", self._batch.key, error)
            self._copy_objects()
        except BucketError as error:
            if self._batch.manifest is None:
                raise
            self._hold_back(error)

    def _as_recorded(self, made: MadeObject) -> LocalObject:
        """Return the object with the bytes that were recorded for it when it was first made.

        Another version of a library may compress the same rows to other bytes. Then the bucket that has the object has
        the right ones; where none has it, nobody has seen them, and the new ones are recorded instead. Raises
        BatchChangedError where a manifest names the right ones already, and later ones that somebody has carry its
        digest.
        """
        with self._db.connection() as conn:
            ledger.hold(conn, self._batch)
            recorded = ledger.record_object(conn, self._batch.key, made.record)
        if recorded.sha256 == made.record.sha256:
            return made.local
        log.warning("batch %s: object %d came out with other bytes than before", self._batch.key, recorded.part)
        copy = self._fetch_recorded(recorded)
        if copy is not None:
            return copy
        with self._db.connection() as conn:
            ledger.hold(conn, self._batch)
            if not ledger.replace_object(conn, self._batch.key, made.record):
                raise BatchChangedError(f"object {recorded.part} came out with other bytes than its manifest says")
        self._batch = replace(self._batch, manifest=None)
        return made.local

    def _copy_objects(self) -> None:
        """Bring a batch that cannot be made again from a bucket that has it to those that lack it."""
        with self._db.connection() as conn:
            recorded = ledger.objects(conn, self._batch.key)
        for record in recorded:
            self._safe_point()
            try:
                copy = self._fetch_recorded(record)
            except BucketError as error:
                return self._give_up(error)
            if copy is None:
                gone = (
                    f"batch {self._batch.key}: its rows make another object now, and no bucket has {record.key}: put "
                    "the rows back as they were, or export once with the version of the appliance that sealed it"
                )
                return self._give_up(BucketError(gone))
            self._put_everywhere(record.key, copy)
        return None

    def _hold_back(self, error: BucketError) -> None:
        """Let no target have a later batch before this one: then its manifest could not be made again any more."""
        for name in list(self._targets):
            del self._targets[name]
            self._fail(name, error)

    def _give_up(self, error: BucketError) -> None:
        """Leave this batch for another run. Its targets are not to blame: they go on with the next batch."""
        for name in list(self._targets):
            del self._targets[name]
            self._note_problem(name, error)

    def _fetch_recorded(self, record: ObjectRecord) -> LocalObject | None:
        """Fetch an object from a bucket that holds the recorded bytes; None when it stands nowhere.

        Raises BucketError when a bucket that may have it does not answer or is not there any more.
        """
        unclear: BucketError | None = None
        for delivery in self._batch.deliveries:
            if not (delivery.attempts or delivery.delivered):
                continue
            try:
                copy = self._fetch_from(delivery, record, self._directory / "copy")
            except BucketError as error:
                unclear = error
                continue
            if copy is not None:
                return copy
        if unclear is not None:
            raise unclear
        return None

    def _fetch_from(self, delivery: Delivery, record: ObjectRecord, path: Path) -> LocalObject | None:
        bucket = self._buckets.get(delivery.bucket)
        if bucket is None:
            raise BucketError(
                f"bucket {delivery.bucket}: it is no longer in the configuration, and may have {record.key}"
            )
        key = buckets.join(delivery.prefix, record.key)
        if not bucket.exists(key):
            return None
        bucket.fetch(key, path)
        local = described(path)
        return local if local.sha256 == record.sha256 else None

    def _deliver_manifest(self) -> None:
        text = self._batch.manifest or self._make_manifest()
        path = self._directory / "manifest"
        path.write_text(text, encoding="utf-8")
        local = described(path)
        self._put_everywhere(manifest.manifest_key(self._batch.key), local)
        for name in self._targets:
            with self._db.connection() as conn:
                ledger.record_delivered(conn, self._batch.key, name)

    def _make_manifest(self) -> str:
        with self._db.connection() as conn:
            ledger.hold(conn, self._batch)
            before = ledger.manifest_sha256(conn, Key(self._batch.key.job, self._batch.key.sequence - 1))
            if before is None and self._batch.key.sequence > 1:
                raise ApplianceError(f"batch {self._batch.key}: the batch before it has no manifest yet")
            made = manifest.build(
                self._batch,
                ledger.objects(conn, self._batch.key),
                installation=ledger.installation_id(conn),
                previous_sha256=before,
            )
            return ledger.record_manifest(conn, self._batch.key, made.text, made.sha256)

    def _put_everywhere(self, name: str, local: LocalObject) -> None:
        """Put an object into all buckets at once; one that fails is out for the rest of the run, the others go on.

        One where something else stands does not get this batch, and is not to blame for it: it gets those after it.
        """
        with ThreadPoolExecutor(_UPLOADS_AT_ONCE, thread_name_prefix="put") as threads:
            puts = {
                bucket: threads.submit(target.bucket.put, buckets.join(target.delivery.prefix, name), local)
                for bucket, target in self._targets.items()
            }
            for bucket, put in puts.items():
                try:
                    put.result()
                except ForeignObjectError as error:
                    del self._targets[bucket]
                    self._note_problem(bucket, error)
                except BucketError as error:
                    del self._targets[bucket]
                    self._fail(bucket, error)
