"""Rebuilding the events and the ledger from a bucket: batch by batch, each proven, each in one transaction.

It can be cut off anywhere and run again, and be run for one bucket after another. What the ledger has already must be
the same history: the very same manifests.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path

import psycopg

from appliance.errors import ManifestError, RestoreError
from appliance.export import buckets, loading, manifest
from appliance.export.files import described
from appliance.export.manifest import Described
from appliance.export.means import Means, Progress, silent
from appliance.store import ledger, restoring
from appliance.store.database import Connection, first_line
from appliance.store.ledger import Delivery, Key, ObjectRecord
from appliance.words import counted


@dataclass(slots=True)
class Restored:
    """What came of it.

    `moved` events were collected here and got new ids; `damage` is what the bucket does not hold as it was delivered.
    """

    bucket: str
    batches: int = 0
    proven: int = 0
    rows: int = 0
    moved: int = 0
    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """What people are told."""
        batches = counted(self.batches, "batch", "batches")
        brought = f"{counted(self.rows, 'event', 'events')} of {batches} brought back from bucket {self.bucket}"
        if not (self.batches or self.proven or self.damage):
            brought = (
                f"nothing to bring back: the ledger has every batch of bucket {self.bucket} "
                "(to hold the bucket against it: appliance verify)"
            )
        proven = f"{counted(self.proven, 'batch', 'batches')} of the ledger: proven in bucket {self.bucket} as well"
        one, more = "event that was collected here meanwhile waits", "events that were collected here meanwhile wait"
        moved = f"{counted(self.moved, one, more)} to be exported as before"
        return [
            *(f"damaged: {what}" for what in self.damage),
            *self.notes,
            *([moved] if self.moved else []),
            *([proven] if self.proven else []),
            brought,
        ]


class _DamagedError(Exception):
    """A batch does not stand in the bucket as it was delivered."""


class Restore:
    """Restores from one bucket, from below the prefix that is configured for it."""

    def __init__(self, means: Means, bucket: str, *, progress: Progress = silent) -> None:
        self._means = means
        self._db = means.db
        self._bucket = means.buckets[bucket]
        self._prefix = means.settings.buckets[bucket].prefix
        self._progress = progress
        self._outcome = Restored(bucket)
        # The first batch of each job that gives way to the bucket's.
        self._in_the_way: dict[str, Key] = {}

    def run(self) -> Restored:
        """Do it. Raises RestoreError where this database cannot take the bucket's history, and BucketError.

        From the first row on nothing new is sealed, by any job, until a run has come to its end, or is given up.
        """
        with self._means.scratch("restore") as directory:
            found = self._sound(self._manifests(directory))
            absent, unproven = self._compare(found)
            self._note_gaps(found)
            if absent:
                self._bring_back(absent, directory)
            for number, one in enumerate(unproven):
                self._progress(number, len(unproven), f"batch {one.batch.key}")
                self._prove(one)
        self._note_buckets()
        with self._db.connection() as conn:
            restoring.end(conn)
        return self._outcome

    # -- what the bucket says -----------------------------------------------------------------------------------------

    def _manifests(self, directory: Path) -> Iterator[Described]:
        """Read every manifest below the prefix."""
        found = sorted(listed.key for listed in self._bucket.list(buckets.join(self._prefix, f"{manifest.FOLDER}/")))
        if not found:
            below = f" below {self._prefix}/" if self._prefix else ""
            raise RestoreError(f"bucket {self._bucket.name} holds no exports{below}: are bucket and prefix right?")
        for name in found:
            self._means.stop_here_if_told()
            try:
                key = manifest.key_of(name.removeprefix(buckets.join(self._prefix, "")))
                self._bucket.fetch(name, directory / "manifest")
                yield manifest.parse((directory / "manifest").read_bytes(), key)
            except ManifestError as error:
                self._outcome.damage.append(str(error))

    def _sound(self, found: Iterable[Described]) -> list[Described]:
        """Leave out those that the manifest after them does not confirm, and refuse what cannot be brought back."""
        sound: list[Described] = []
        for one in sorted(found, key=lambda d: (d.batch.key.job, d.batch.key.sequence), reverse=True):
            after = sound[-1] if sound else None
            if one.batch.escape_formulas:
                raise RestoreError(
                    f"batch {one.batch.key} was written with escape_formulas: what it changed cannot be told from what "
                    "came so, and nothing can be brought back from it"
                )
            if after and after.batch.key == one.batch.key.next and after.previous_sha256 != one.sha256:
                self._outcome.damage.append(f"batch {one.batch.key}: its manifest is not the one that was delivered")
                continue
            sound.append(one)
        return sound[::-1]

    def _compare(self, found: Sequence[Described]) -> tuple[list[Described], list[Described]]:
        """Return the batches that the ledger lacks, and those of which it does not know that this bucket has them."""
        absent, unproven = [], []
        with self._db.connection() as conn:
            for one in found:
                if not ledger.exists(conn, one.batch.key):
                    absent.append(one)
                    continue
                known = ledger.load(conn, one.batch.key)
                if known.manifest is None and ledger.is_same_seal(known, one.batch):
                    # The next run finds it there.
                    continue
                if known.manifest != one.batch.manifest:
                    if not ledger.was_never_sent(conn, one.batch.key):
                        raise RestoreError(
                            f"the ledger is not empty, and has another batch {one.batch.key} than bucket "
                            f"{self._bucket.name}: restore into a database of its own"
                        )
                    # Sealed while no bucket answered.
                    self._in_the_way.setdefault(one.batch.key.job, one.batch.key)
                    absent.append(one)
                    continue
                if not any(d.delivered and d.bucket == self._bucket.name for d in known.deliveries):
                    unproven.append(one)
        return absent, unproven

    def _note_gaps(self, found: Sequence[Described]) -> None:
        """Say which batches neither this bucket nor the ledger has: another bucket may."""
        for job, batches in groupby(found, key=lambda one: one.batch.key.job):
            with self._db.connection() as conn:
                known = {key.sequence for key in ledger.batches(conn, job)}
            known |= {one.batch.key.sequence for one in batches}
            for before, after in pairwise([0, *sorted(known)]):
                if after > before + 1:
                    self._outcome.notes.append(
                        f"batches {before + 1} to {after - 1} of {job} are not here: if another bucket has them, "
                        "restore from it too"
                    )

    def _note_buckets(self) -> None:
        """Say which buckets batches wait for, and nobody has configured."""
        with self._db.connection() as conn:
            waiting = ledger.waiting_for(conn)
        for name, number in waiting.items():
            if name not in self._means.buckets:
                self._outcome.notes.append(
                    f"{counted(number, 'batch is', 'batches are')} owed to bucket {name}, which is not in the "
                    f"configuration: they stay undelivered without [buckets.{name}]"
                )

    # -- bringing back ------------------------------------------------------------------------------------------------

    def _bring_back(self, absent: Sequence[Described], directory: Path) -> None:
        batches = [one.batch for one in absent]
        highest_id = max(r.to_id for batch in batches for r in batch.ranges)
        with self._db.connection() as conn:
            lowest_id = restoring.begin(conn, self._bucket.name, batches, in_the_way=self._in_the_way.values())
        self._outcome.moved = restoring.make_room(self._db, lowest_id=lowest_id, highest_id=highest_id)
        for number, one in enumerate(absent):
            self._means.stop_here_if_told()
            self._progress(number, len(absent), f"batch {one.batch.key}")
            try:
                self._outcome.rows += self._bring_back_one(one, directory, highest_id=highest_id)
                self._outcome.batches += 1
            except _DamagedError as error:
                self._outcome.damage.append(f"batch {one.batch.key}: {error}")

    def _bring_back_one(self, one: Described, directory: Path, *, highest_id: int) -> int:
        with self._db.connection() as conn:
            restoring.stage(conn)
            for record in one.objects:
                self._stage(conn, one, record, directory / "object")
            if not restoring.is_whole(conn, one.batch):
                raise _DamagedError("its objects hold other rows than its manifest names")
            try:
                stored = restoring.merge(conn, one.batch, highest_id=highest_id)
                deliveries = tuple(self._deliveries(one))
                restoring.record(conn, replace(one.batch, deliveries=deliveries), one.objects, sha256=one.sha256)
            except psycopg.errors.UniqueViolation as error:
                raise RestoreError("another restore into this database is under way") from error
            return stored

    def _stage(self, conn: Connection, one: Described, record: ObjectRecord, path: Path) -> None:
        """Stage the rows of an object, if it is the one that was delivered."""
        where = buckets.join(self._prefix, record.key)
        if not self._bucket.exists(where):
            raise _DamagedError(f"{where} is missing")
        self._bucket.fetch(where, path)
        if described(path).sha256 != record.sha256:
            raise _DamagedError(f"{where} holds other bytes than were delivered")
        try:
            loading.load(conn, one.batch, path)
        except (psycopg.DataError, ValueError) as error:
            raise _DamagedError(f"{where} holds no events: {first_line(error)}") from error

    def _deliveries(self, one: Described) -> Iterator[Delivery]:
        """Find the deliveries of a batch: the one to this bucket is proven, any other is still to be."""
        yield Delivery(bucket=self._bucket.name, prefix=self._prefix, delivered=True)
        yield from (delivery for delivery in one.batch.deliveries if delivery.bucket != self._bucket.name)

    def _prove(self, one: Described) -> None:
        """Let a batch count as delivered to this bucket if all its objects are there as they were delivered."""
        key = one.batch.key
        for record in one.objects:
            self._means.stop_here_if_told()
            where = buckets.join(self._prefix, record.key)
            if self._bucket.sha256(where) != record.sha256:
                self._outcome.damage.append(
                    f"batch {key}: {where} is missing, or holds other bytes than were delivered"
                )
                return
        with self._db.connection() as conn:
            ledger.add_delivery(conn, key, self._bucket.name, self._prefix)
            ledger.record_delivered(conn, key, self._bucket.name)
            ledger.settle(conn, key)
        self._outcome.proven += 1


def give_up(means: Means) -> None:
    """End a restore that cannot be finished: what has come back stays, and jobs go on."""
    with means.db.connection() as conn:
        restoring.end(conn)
