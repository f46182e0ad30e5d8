"""Holding the buckets against the ledger: what is missing, altered, foreign or doubled there."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from appliance.errors import BatchChangedError, BucketError
from appliance.export import buckets, manifest
from appliance.export.buckets import Bucket
from appliance.export.history import bucket_ahead
from appliance.export.means import Means, Progress, silent
from appliance.export.redeliver import redeliver
from appliance.store import ledger, marks
from appliance.store.ledger import Batch, Key

log = logging.getLogger(__name__)

_MANIFEST = re.compile(r"(?P<sequence>\d{10})\.json")
_PART = re.compile(r"(?P<job>.+)-(?P<sequence>\d{10})-(?P<part>\d{4,})\.[a-z.]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be. `kind`: missing, altered, foreign, doubled, chain or rows."""

    kind: str
    job: str
    bucket: str
    key: str
    what: str

    @property
    def name(self) -> str:
        """Its kind and where it is; what concerns no bucket but the table names none."""
        return " ".join(filter(None, (f"{self.kind}:", self.bucket, self.key)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was looked at, what is damaged, and which buckets could not be asked."""

    job: str
    batches: int
    objects: int
    bytes: int
    findings: tuple[Finding, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Repair:
    """What stands in its bucket again, and what could not be repaired, each with its reason."""

    repaired: tuple[Finding, ...]
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Expected:
    """What must stand at a key."""

    batch: Key
    bytes: int
    sha256: str


@dataclass(slots=True)
class _Bucket:
    """What the ledger says of one bucket, by whole key."""

    prefixes: set[str] = field(default_factory=set)
    expected: dict[str, _Expected] = field(default_factory=dict)
    perhaps: set[str] = field(default_factory=set)
    """Keys of batches that are still owed: what stands there is compared when they are delivered."""


class Verification:
    """Verifies one job."""

    def __init__(self, means: Means, job: str, progress: Progress = silent) -> None:
        self._means = means
        self._job = job
        self._progress = progress
        self._sequences: set[int] = set()
        self._objects = 0
        self._bytes = 0
        self._findings: list[Finding] = []
        self._problems: list[str] = []

    def run(self) -> Verdict:
        """Read every object of every bucket of the job."""
        batches = self._load()
        self._sequences = {batch.key.sequence for batch in batches}
        self._check_chain(batches)
        self._check_rows(batches)
        for name, expected in self._by_bucket(batches).items():
            bucket = self._means.buckets.get(name)
            if bucket is None:
                self._note_gone(name, expected)
                continue
            try:
                self._check_bucket(bucket, expected)
            except BucketError as error:
                self._problems.append(str(error))
        return Verdict(
            job=self._job,
            batches=len(batches),
            objects=self._objects,
            bytes=self._bytes,
            findings=tuple(self._findings),
            problems=tuple(self._problems),
        )

    def _note_gone(self, name: str, known: _Bucket) -> None:
        """Who has left with all that was owed is no problem, and must not hide one for ever."""
        gone = f"bucket {name}: it is no longer in the configuration"
        if known.perhaps:
            self._problems.append(f"{gone}, and batches wait for it")
        else:
            log.info("%s, and is not looked at", gone)

    def _load(self) -> list[Batch]:
        with self._means.db.connection() as conn:
            return [ledger.load(conn, key) for key in ledger.batches(conn, self._job)]

    def _note(self, kind: str, bucket: str, key: str, what: str) -> None:
        self._findings.append(Finding(kind=kind, job=self._job, bucket=bucket, key=key, what=what))

    # -- the ledger itself --------------------------------------------------------------------------------------------

    def _check_chain(self, batches: list[Batch]) -> None:
        """Each manifest carries the digest of the one before it, and no sequence number is left out."""
        before: Batch | None = None
        for batch in batches:
            where = manifest.manifest_key(batch.key)
            if before is not None and batch.key.sequence != before.key.sequence + 1:
                self._note("chain", "", where, f"batch {before.key.sequence + 1} is missing in the ledger")
            elif batch.manifest is not None and not manifest.follows(
                batch.manifest, before.manifest if before else None
            ):
                self._note("chain", "", where, "it does not carry the digest of the manifest before it")
            before = batch

    def _check_rows(self, batches: list[Batch]) -> None:
        """Rows that still stand must be those that were sealed; retention takes them from the beginning."""
        for batch in batches:
            with self._means.db.connection() as conn:
                if marks.touched_by_retention(conn, batch.ranges):
                    continue
                found = ledger.count_rows(conn, batch.ranges)
            if found != batch.row_count:
                what = f"{batch.row_count} rows were sealed, {found} are in the table"
                self._note("rows", "", manifest.manifest_key(batch.key), what)

    # -- a bucket -----------------------------------------------------------------------------------------------------

    def _by_bucket(self, batches: list[Batch]) -> Mapping[str, _Bucket]:
        found = self._configured()
        for batch in batches:
            with self._means.db.connection() as conn:
                objects = ledger.objects(conn, batch.key)
            for delivery in batch.deliveries:
                bucket = found.setdefault(delivery.bucket, _Bucket())
                bucket.prefixes.add(delivery.prefix)
                for key, expected in _objects_of(batch, objects):
                    whole = buckets.join(delivery.prefix, key)
                    if delivery.delivered:
                        bucket.expected[whole] = expected
                    else:
                        bucket.perhaps.add(whole)
        return found

    def _configured(self) -> dict[str, _Bucket]:
        """Return the buckets that the job has now: a ledger that was lost names none, and they may be full."""
        export = self._means.settings.exports.get(self._job)
        names = export.bucket_names if export else ()
        return {name: _Bucket(prefixes={self._means.settings.buckets[name].prefix}) for name in names}

    def _check_bucket(self, bucket: Bucket, known: _Bucket) -> None:
        standing = dict(self._standing(bucket, known.prefixes))
        if not self._sequences:
            self._check_not_ahead(bucket, known.prefixes, standing.keys() - self._sealed_meanwhile(standing))
        for number, (key, expected) in enumerate(known.expected.items()):
            self._means.stop_here_if_told()
            self._progress(number, len(known.expected), f"{bucket.name}: {key}")
            self._check_object(bucket, key, expected, standing.get(key))
        names = {_name(key) for key in known.expected}
        unknown = standing.keys() - known.expected.keys() - known.perhaps
        for key in sorted(unknown - self._sealed_meanwhile(unknown)):
            if _name(key) in names:
                self._note("doubled", bucket.name, key, "the same part of this batch stands at another key too")
            else:
                self._note("foreign", bucket.name, key, "the ledger knows no such object of this job")

    def _check_not_ahead(self, bucket: Bucket, prefixes: set[str], keys: set[str]) -> None:
        """Raise BucketAheadError where batches stand of which this ledger has not one: the database was lost."""
        for prefix in sorted(prefixes):
            folder = buckets.join(prefix, manifest.folder(self._job))
            found = [sequence for key in keys if key.startswith(folder) and (sequence := _sequence_of(key)) is not None]
            if found:
                raise bucket_ahead(bucket.name, prefix, Key(self._job, min(found)))

    def _sealed_meanwhile(self, keys: Iterable[str]) -> set[str]:
        """Return those that belong to batches which a run has sealed since the ledger was read."""
        with self._means.db.connection() as conn:
            sequences = {key.sequence for key in ledger.batches(conn, self._job)} - self._sequences
        return {key for key in keys if _sequence_of(key) in sequences}

    def _standing(self, bucket: Bucket, prefixes: set[str]) -> Iterator[tuple[str, int]]:
        """List what bears the job's name. Jobs may share a prefix, and others may keep their own things there."""
        for prefix in sorted(prefixes):
            for listed in bucket.list(buckets.join(prefix, "site=")):
                match = _PART.fullmatch(_name(listed.key))
                if match and match["job"] == self._job:
                    yield listed.key, listed.bytes
            for listed in bucket.list(buckets.join(prefix, manifest.folder(self._job))):
                yield listed.key, listed.bytes

    def _check_object(self, bucket: Bucket, key: str, expected: _Expected, size: int | None) -> None:
        if size is None:
            self._note("missing", bucket.name, key, f"it belongs to batch {expected.batch}")
            return
        self._objects += 1
        self._bytes += size
        if size != expected.bytes:
            self._note("altered", bucket.name, key, f"{expected.bytes} bytes were delivered, {size} stand there")
        elif bucket.sha256(key) != expected.sha256:
            self._note("altered", bucket.name, key, "other bytes stand there than were delivered")


def repair(means: Means, verdict: Verdict) -> Repair:
    """Deliver again what is missing, from the table or from the other bucket.

    What is altered or foreign is left alone: nothing in a bucket is ever written over.
    """
    missing = [finding for finding in verdict.findings if finding.kind == "missing"]
    left = [
        ": ".join(filter(None, (one.bucket, one.key, one.what))) for one in verdict.findings if one.kind != "missing"
    ]
    repaired: list[Finding] = []
    for sequence, bucket in sorted({(_batch_of(one), one.bucket) for one in missing}):
        problems = _deliver_again(means, Key(verdict.job, sequence), bucket)
        left += problems
        if not problems:
            repaired += [one for one in missing if (_batch_of(one), one.bucket) == (sequence, bucket)]
    return Repair(tuple(repaired), tuple(left))


def _deliver_again(means: Means, key: Key, bucket: str) -> list[str]:
    """Return why it could not be done; one batch that cannot be made again must not keep the others from it."""
    try:
        return redeliver(means, key, [bucket]).problems
    except (BatchChangedError, BucketError, ledger.OvertakenError) as error:
        return [str(error)]


def _objects_of(batch: Batch, objects: list[ledger.ObjectRecord]) -> Iterator[tuple[str, _Expected]]:
    for record in objects:
        yield record.key, _Expected(batch.key, record.bytes, record.sha256)
    if batch.manifest is not None:
        text = batch.manifest.encode()
        yield manifest.manifest_key(batch.key), _Expected(batch.key, len(text), manifest.digest(text))


def _batch_of(finding: Finding) -> int:
    sequence = _sequence_of(finding.key)
    assert sequence is not None  # noqa: S101 - what is missing has a name that we gave it
    return sequence


def _sequence_of(key: str) -> int | None:
    """Return the sequence of the batch that a key belongs to; None where its name is nobody's."""
    match = _PART.fullmatch(_name(key)) or _MANIFEST.fullmatch(_name(key))
    return int(match["sequence"]) if match else None


def _name(key: str) -> str:
    return key.rpartition("/")[2]
