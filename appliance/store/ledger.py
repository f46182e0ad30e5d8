"""Statements on the export ledger: batches, their objects, their deliveries, and how far rows are marked.

States only ever go forward and are set by compare-and-set, so that two runs at once end right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from psycopg import sql

from appliance.errors import ApplianceError, BatchChangedError
from appliance.store.database import Connection, fetch_value
from appliance.store.ranges import Range, where

# As keys of objects have it.
_HOUR = "date=%Y-%m-%d/hour=%H"


# A run has tried several times by itself before (clients.py).
_FIRST_PAUSE_SECONDS = 30
_LONGEST_PAUSE_SECONDS = 3600
# With the quarter that a pause may be longer by.
LONGEST_REST = f"{_LONGEST_PAUSE_SECONDS * 5 // 4} * interval '1 second'"


class OvertakenError(ApplianceError):
    """Another run did this step first; read the ledger again and go on from there."""


@dataclass(frozen=True, slots=True)
class Key:
    """The name of a batch."""

    job: str
    sequence: int

    def __str__(self) -> str:
        return f"{self.job} {self.sequence}"

    @property
    def next(self) -> "Key":
        """The batch after this one."""
        return Key(self.job, self.sequence + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One batch on its way to one bucket."""

    bucket: str
    prefix: str
    delivered: bool = False
    attempts: int = 0
    last_error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A sealed batch as it was frozen."""

    key: Key
    kind: str
    sealed_at: datetime
    row_count: int
    format: str
    compression: str
    object_rows: int
    object_bytes: int
    schema_version: int
    ranges: tuple[Range, ...]
    deliveries: tuple[Delivery, ...]
    manifest: str | None = None
    escape_formulas: bool = False


def is_same_seal(one: Batch, other: Batch) -> bool:
    """Return whether two descriptions are of one batch, whatever has become of it since.

    Two that were sealed apart differ in the moment, to the microsecond, if in nothing else.
    """
    frozen = [replace(batch, deliveries=(), manifest=None) for batch in (one, other)]
    places = [{(delivery.bucket, delivery.prefix) for delivery in batch.deliveries} for batch in (one, other)]
    return frozen[0] == frozen[1] and places[0] == places[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRecord:
    """One object of a batch. `key` is relative to a bucket's prefix; event times in UTC, None without a usable one."""

    part: int
    key: str
    row_count: int
    bytes: int
    sha256: str
    first_event: datetime | None
    last_event: datetime | None


def installation_id(conn: Connection) -> UUID:
    """Return the id of this installation, as its manifests carry it."""
    found: UUID = fetch_value(conn, "SELECT id FROM installation")
    return found


def lock_coverage(conn: Connection, *, exclusive: bool) -> None:
    """Keep changes of coverage (exclusive) apart from what is decided by it, until the transaction ends.

    A lock on one row that nothing else writes: it holds up no event.
    """
    conn.execute("SELECT id FROM installation FOR UPDATE" if exclusive else "SELECT id FROM installation FOR SHARE")


def next_sequence(conn: Connection, job: str) -> int:
    """Return the sequence number after the job's last; unique (job, sequence) decides between two runs."""
    return int(fetch_value(conn, "SELECT coalesce(max(sequence), 0) + 1 FROM export_batches WHERE job = %s", (job,)))


def restoring_from(conn: Connection) -> str | None:
    """Return the bucket from which events are being brought back; nothing is sealed until that is done."""
    found: str | None = fetch_value(conn, "SELECT restoring FROM installation")
    return found


def unsettled(conn: Connection, job: str) -> list[Key]:
    """Return the job's batches that still owe a delivery, oldest first: also settled ones that one more bucket gets."""
    rows = conn.execute(
        "SELECT job, sequence FROM export_batches WHERE job = %(job)s AND state = 'sealed'"
        " UNION SELECT job, sequence FROM export_deliveries WHERE job = %(job)s AND state = 'pending'"
        " ORDER BY sequence",
        {"job": job},
    )
    return [Key(*row) for row in rows]


def has_delivered(conn: Connection, job: str) -> bool:
    """Return whether a bucket has any batch of the job."""
    return bool(
        fetch_value(conn, "SELECT true FROM export_deliveries WHERE job = %s AND state = 'delivered' LIMIT 1", (job,))
    )


def has_been_sent(conn: Connection, job: str, bucket: str, prefix: str) -> bool:
    """Return whether a batch of the job was ever sent to a bucket under this prefix, or is known to stand there."""
    query = (
        "SELECT EXISTS (SELECT 1 FROM export_deliveries WHERE job = %s AND bucket = %s AND prefix = %s"
        " AND (attempts > 0 OR state = 'delivered'))"
    )
    return bool(fetch_value(conn, query, (job, bucket, prefix)))


def was_never_sent(conn: Connection, key: Key) -> bool:
    """Return whether no byte of a batch, or of one after it, has left for any bucket."""
    query = (
        "SELECT NOT EXISTS (SELECT 1 FROM export_deliveries WHERE job = %s AND sequence >= %s"
        " AND (attempts > 0 OR state = 'delivered'))"
    )
    return bool(fetch_value(conn, query, (key.job, key.sequence)))


def undelivered(conn: Connection, job: str) -> list[Key]:
    """Return the job's batches that no bucket has, oldest first."""
    rows = conn.execute(
        "SELECT job, sequence FROM export_batches b WHERE job = %s AND state = 'sealed' AND NOT EXISTS ("
        "SELECT 1 FROM export_deliveries d WHERE d.job = b.job AND d.sequence = b.sequence AND d.state = 'delivered')"
        " ORDER BY sequence",
        (job,),
    )
    return [Key(*row) for row in rows]


def batches(conn: Connection, job: str) -> list[Key]:
    """Return all batches of a job, oldest first."""
    rows = conn.execute("SELECT job, sequence FROM export_batches WHERE job = %s ORDER BY sequence", (job,))
    return [Key(*row) for row in rows]


def batches_arrived(conn: Connection, job: str, start: datetime, end: datetime) -> list[Key]:
    """Return the job's batches with an object of an hour that begins before `end` and ends after `start`, oldest first.

    Objects are named after the hour, in UTC, in which their events arrived. Batches never written yet have none.
    """
    first, last = (moment.astimezone(UTC).strftime(_HOUR) for moment in (start, end - timedelta(microseconds=1)))
    rows = conn.execute(
        "SELECT DISTINCT job, sequence FROM export_objects"
        " WHERE job = %s AND substring(key FROM 'date=[^/]+/hour=[^/]+') BETWEEN %s AND %s ORDER BY sequence",
        (job, first, last),
    )
    return [Key(*row) for row in rows]


def jobs(conn: Connection) -> list[str]:
    """Return every job that has ever sealed a batch."""
    return [row[0] for row in conn.execute("SELECT DISTINCT job FROM export_batches ORDER BY 1")]


def count_rows(conn: Connection, ranges: Sequence[Range]) -> int:
    """Count the rows of a batch that stand in the table now."""
    query = sql.SQL("SELECT count(*) FROM events_log e WHERE {}").format(where(ranges))
    return int(fetch_value(conn, query.as_string()))


def add_delivery(conn: Connection, key: Key, bucket: str, prefix: str) -> None:
    """Let a batch be delivered to one more bucket; one that is to get it, or has it, keeps its delivery."""
    conn.execute(
        "INSERT INTO export_deliveries (job, sequence, bucket, prefix) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (key.job, key.sequence, bucket, prefix),
    )


def waiting_for(conn: Connection) -> dict[str, int]:
    """Return how many batches each bucket is still to get."""
    rows = conn.execute("SELECT bucket, count(*) FROM export_deliveries WHERE state = 'pending' GROUP BY 1 ORDER BY 1")
    return dict(rows.fetchall())


def jobs_with_unsettled(conn: Connection) -> list[str]:
    """Return the jobs that owe a delivery, whether they are still configured or not."""
    rows = conn.execute(
        "SELECT job FROM export_batches WHERE state = 'sealed'"
        " UNION SELECT job FROM export_deliveries WHERE state = 'pending' ORDER BY 1"
    )
    return [job for (job,) in rows]


def exists(conn: Connection, key: Key) -> bool:
    """Return whether a batch of that name is sealed."""
    return (
        fetch_value(conn, "SELECT true FROM export_batches WHERE job = %s AND sequence = %s", (key.job, key.sequence))
        is not None
    )


def insert(conn: Connection, batch: Batch) -> None:
    """Write a sealed batch into the ledger, its deliveries pending. Raises UniqueViolation when its key is taken."""
    key = batch.key
    conn.execute(
        "INSERT INTO export_batches (job, sequence, kind, sealed_at, row_count, format, compression, object_rows,"
        " object_bytes, escape_formulas, schema_version) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            key.job,
            key.sequence,
            batch.kind,
            batch.sealed_at,
            batch.row_count,
            batch.format,
            batch.compression,
            batch.object_rows,
            batch.object_bytes,
            batch.escape_formulas,
            batch.schema_version,
        ),
    )
    for r in batch.ranges:
        conn.execute(
            "INSERT INTO export_ranges (job, sequence, site, except_sites, from_id, to_id)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            (key.job, key.sequence, r.site, list(r.except_sites), r.from_id, r.to_id),
        )
    for delivery in batch.deliveries:
        add_delivery(conn, key, delivery.bucket, delivery.prefix)


def load(conn: Connection, key: Key) -> Batch:
    """Return a batch with its ranges and deliveries."""
    row = conn.execute(
        "SELECT kind, sealed_at, row_count, format, compression, object_rows, object_bytes, escape_formulas,"
        " schema_version, manifest"
        " FROM export_batches WHERE job = %s AND sequence = %s",
        (key.job, key.sequence),
    ).fetchone()
    if row is None:
        raise OvertakenError(f"the ledger has no batch {key}")
    kind, sealed_at, row_count, format_, compression, object_rows, object_bytes, escapes, schema_version, manifest = row
    return Batch(
        key=key,
        kind=kind,
        sealed_at=sealed_at,
        row_count=row_count,
        format=format_,
        compression=compression,
        object_rows=object_rows,
        object_bytes=object_bytes,
        escape_formulas=escapes,
        schema_version=schema_version,
        manifest=manifest,
        ranges=_ranges(conn, key),
        deliveries=deliveries(conn, key),
    )


def _ranges(conn: Connection, key: Key) -> tuple[Range, ...]:
    rows = conn.execute(
        "SELECT site, from_id, to_id, except_sites FROM export_ranges WHERE job = %s AND sequence = %s ORDER BY site",
        (key.job, key.sequence),
    )
    return tuple(Range(site=s, from_id=f, to_id=t, except_sites=tuple(e)) for s, f, t, e in rows)


def deliveries(conn: Connection, key: Key) -> tuple[Delivery, ...]:
    """Return the deliveries of a batch as they stand now, in a fixed order."""
    rows = conn.execute(
        "SELECT bucket, prefix, state = 'delivered', attempts, last_error FROM export_deliveries"
        " WHERE job = %s AND sequence = %s ORDER BY bucket",
        (key.job, key.sequence),
    )
    return tuple(Delivery(bucket=b, prefix=p, delivered=d, attempts=a, last_error=e) for b, p, d, a, e in rows)


def hold(conn: Connection, batch: Batch) -> None:
    """Keep a restore from taking a batch back until the transaction ends.

    Raises OvertakenError when one has; another may bear its name by now.
    """
    held = conn.execute(
        "SELECT 1 FROM export_batches WHERE job = %s AND sequence = %s AND sealed_at = %s FOR NO KEY UPDATE",
        (batch.key.job, batch.key.sequence, batch.sealed_at),
    )
    if held.fetchone() is None:
        raise OvertakenError(f"batch {batch.key} was sent nowhere yet, and a restore has taken it back")


def begin_attempt(conn: Connection, batch: Batch, bucket: str) -> None:
    """Count an attempt. It must be committed before the first byte leaves: later runs then know whose bytes stand.

    Raises OvertakenError as `hold` does.
    """
    hold(conn, batch)
    conn.execute(
        "UPDATE export_deliveries SET attempts = attempts + 1, attempted_at = now()"
        " WHERE job = %s AND sequence = %s AND bucket = %s AND state = 'pending'",
        (batch.key.job, batch.key.sequence, bucket),
    )


def record_failure(conn: Connection, key: Key, bucket: str, error: str, *, rests: bool = True) -> None:
    """Keep why a delivery failed, and when it is to be tried again; one that is completed meanwhile stays so.

    The pause doubles with each failure, up to an hour, give or take a quarter: what failed together must not come back
    together. Until then the bucket `rests`, unless what failed concerns this batch alone.
    """
    conn.execute(
        "UPDATE export_deliveries SET last_error = %(error)s, failures = failures + 1, errors = errors + 1,"
        " retry_at = CASE WHEN %(rests)s THEN now()"
        " + least(%(first)s * 2 ^ least(failures, 30), %(longest)s) * (0.75 + random() / 2) * interval '1 second' END"
        " WHERE job = %(job)s AND sequence = %(sequence)s AND bucket = %(bucket)s AND state = 'pending'",
        {
            "error": error[:1000],
            "rests": rests,
            "first": _FIRST_PAUSE_SECONDS,
            "longest": _LONGEST_PAUSE_SECONDS,
            "job": key.job,
            "sequence": key.sequence,
            "bucket": bucket,
        },
    )


def record_delivered(conn: Connection, key: Key, bucket: str) -> None:
    """Set a delivery to delivered: every object and the manifest were checked in the bucket."""
    conn.execute(
        "UPDATE export_deliveries SET state = 'delivered', delivered_at = now(), last_error = NULL,"
        " failures = 0, retry_at = NULL"
        " WHERE job = %s AND sequence = %s AND bucket = %s AND state = 'pending'",
        (key.job, key.sequence, bucket),
    )


def record_object(conn: Connection, key: Key, made: ObjectRecord) -> ObjectRecord:
    """Keep an object's facts before its first upload and return the ones that count: the first ever recorded.

    Raises BatchChangedError when that part had other rows. Other bytes of the same rows are the caller's to look into.
    """
    conn.execute(
        "INSERT INTO export_objects (job, sequence, part, key, row_count, bytes, sha256, first_event, last_event)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (
            key.job,
            key.sequence,
            made.part,
            made.key,
            made.row_count,
            made.bytes,
            made.sha256,
            made.first_event,
            made.last_event,
        ),
    )
    recorded = next(record for record in objects(conn, key) if record.part == made.part)
    if (recorded.key, recorded.row_count) != (made.key, made.row_count):
        raise BatchChangedError(f"batch {key}: object {made.part} came out with other rows than those recorded")
    return recorded


def replace_object(conn: Connection, key: Key, made: ObjectRecord) -> bool:
    """Record an object anew, of which no bucket has the bytes recorded before; return whether that could be.

    The manifest of its batch names those bytes, and each later one carries the digest of the one before it. As long as
    no bucket can have any of these they are forgotten, and made again; otherwise nothing is changed.
    """
    if manifest_sha256(conn, key) is not None:
        if _may_stand_in_a_bucket(conn, key):
            return False
        conn.execute(
            "UPDATE export_batches SET manifest = NULL, manifest_sha256 = NULL WHERE job = %s AND sequence >= %s",
            (key.job, key.sequence),
        )
    conn.execute(
        "UPDATE export_objects SET bytes = %s, sha256 = %s WHERE job = %s AND sequence = %s AND part = %s",
        (made.bytes, made.sha256, key.job, key.sequence, made.part),
    )
    return True


def _may_stand_in_a_bucket(conn: Connection, key: Key) -> bool:
    """Return whether a bucket got this batch, or may have got a later one."""
    query = (
        "SELECT EXISTS (SELECT 1 FROM export_deliveries WHERE job = %(job)s AND sequence >= %(sequence)s"
        " AND (state = 'delivered' OR (sequence > %(sequence)s AND attempts > 0)))"
    )
    return bool(fetch_value(conn, query, {"job": key.job, "sequence": key.sequence}))


def objects(conn: Connection, key: Key) -> list[ObjectRecord]:
    """Return the recorded objects of a batch in the order of their parts."""
    rows = conn.execute(
        "SELECT part, key, row_count, bytes, sha256, first_event, last_event FROM export_objects"
        " WHERE job = %s AND sequence = %s ORDER BY part",
        (key.job, key.sequence),
    )
    return [
        ObjectRecord(part=p, key=k, row_count=n, bytes=b, sha256=h, first_event=f, last_event=t)
        for p, k, n, b, h, f, t in rows
    ]


def manifest_sha256(conn: Connection, key: Key) -> str | None:
    """Return the SHA-256 of a batch's manifest; None before it is made and for a batch that never was."""
    found: str | None = fetch_value(
        conn,
        "SELECT manifest_sha256 FROM export_batches WHERE job = %s AND sequence = %s",
        (key.job, key.sequence),
    )
    return found


def record_manifest(conn: Connection, key: Key, text: str, sha256: str) -> str:
    """Keep the manifest before its first upload and return the one that counts: the first ever recorded."""
    conn.execute(
        "UPDATE export_batches SET manifest = %s, manifest_sha256 = %s"
        " WHERE job = %s AND sequence = %s AND manifest IS NULL",
        (text, sha256, key.job, key.sequence),
    )
    kept: str = fetch_value(
        conn, "SELECT manifest FROM export_batches WHERE job = %s AND sequence = %s", (key.job, key.sequence)
    )
    return kept


def settle(conn: Connection, key: Key) -> bool:
    """Settle a batch whose deliveries are all done; return whether this call did it."""
    done = conn.execute(
        "UPDATE export_batches b SET state = 'settled', settled_at = now()"
        " WHERE job = %s AND sequence = %s AND state = 'sealed' AND NOT EXISTS ("
        "  SELECT 1 FROM export_deliveries d"
        "  WHERE d.job = b.job AND d.sequence = b.sequence AND d.state <> 'delivered')",
        (key.job, key.sequence),
    )
    return done.rowcount == 1
