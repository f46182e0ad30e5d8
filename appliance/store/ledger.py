"""Statements on the export ledger: batches, their objects, their deliveries, and how far rows are marked.

States only ever go forward and are set by compare-and-set, so that two runs at once end right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from appliance.errors import ApplianceError, BatchChangedError
from appliance.store.database import Connection, Database, fetch_value
from appliance.store.events import mark_exported
from appliance.store.ranges import ALL_SITES, Range, where

# Rows looked at in one transaction: short, because it makes the sealing of other jobs wait.
_MARK_STEP_ROWS = 20_000


class OvertakenError(ApplianceError):
    """Another run did this step first; read the ledger again and go on from there."""


@dataclass(frozen=True, slots=True)
class Key:
    """The name of a batch."""

    job: str
    sequence: int

    def __str__(self) -> str:
        return f"{self.job} {self.sequence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One batch on its way to one bucket."""

    bucket: str
    prefix: str
    delivered: bool
    attempts: int
    last_error: str | None


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
    manifest: str | None
    ranges: tuple[Range, ...]
    deliveries: tuple[Delivery, ...]
    escape_formulas: bool = False


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


def unsettled(conn: Connection, job: str) -> list[Key]:
    """Return the job's batches that still owe a delivery, oldest first."""
    rows = conn.execute(
        "SELECT job, sequence FROM export_batches WHERE job = %s AND state = 'sealed' ORDER BY sequence", (job,)
    )
    return [Key(*row) for row in rows]


def jobs_with_unsettled(conn: Connection) -> list[str]:
    """Return the jobs that owe a delivery, whether they are still configured or not."""
    return [row[0] for row in conn.execute("SELECT DISTINCT job FROM export_batches WHERE state = 'sealed' ORDER BY 1")]


def exists(conn: Connection, key: Key) -> bool:
    """Return whether a batch of that name is sealed."""
    return (
        fetch_value(conn, "SELECT true FROM export_batches WHERE job = %s AND sequence = %s", (key.job, key.sequence))
        is not None
    )


def load(conn: Connection, key: Key) -> Batch:
    """Return a batch with its ranges and deliveries."""
    row = conn.execute(
        "SELECT kind, sealed_at, row_count, format, compression, object_rows, object_bytes, escape_formulas,"
        " schema_version, manifest"
        " FROM export_batches WHERE job = %s AND sequence = %s",
        (key.job, key.sequence),
    ).fetchone()
    if row is None:
        raise ApplianceError(f"the ledger has no batch {key}")
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


def begin_attempt(conn: Connection, key: Key, bucket: str) -> None:
    """Count an attempt. It must be committed before the first byte leaves: later runs then know whose bytes stand."""
    conn.execute(
        "UPDATE export_deliveries SET attempts = attempts + 1, attempted_at = now()"
        " WHERE job = %s AND sequence = %s AND bucket = %s AND state = 'pending'",
        (key.job, key.sequence, bucket),
    )


def record_failure(conn: Connection, key: Key, bucket: str, error: str) -> None:
    """Keep why a delivery failed; one that another run has completed meanwhile stays completed."""
    conn.execute(
        "UPDATE export_deliveries SET last_error = %s"
        " WHERE job = %s AND sequence = %s AND bucket = %s AND state = 'pending'",
        (error[:1000], key.job, key.sequence, bucket),
    )


def record_delivered(conn: Connection, key: Key, bucket: str) -> None:
    """Set a delivery to delivered: every object and the manifest were checked in the bucket."""
    conn.execute(
        "UPDATE export_deliveries SET state = 'delivered', delivered_at = now(), last_error = NULL"
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


def replace_object(conn: Connection, key: Key, made: ObjectRecord) -> None:
    """Record an object anew, of which no bucket ever got the bytes recorded before."""
    conn.execute(
        "UPDATE export_objects SET bytes = %s, sha256 = %s WHERE job = %s AND sequence = %s AND part = %s",
        (made.bytes, made.sha256, key.job, key.sequence, made.part),
    )


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


def mark_settled_rows(db: Database) -> int:
    """Set exported_at on every row that all jobs covering it have settled; return how many rows that were.

    It starts where it last ended, by site, so a crash or a job that lags behind costs nothing: the next run goes on.
    It reads what is committed, after the settling: of two jobs that settle at once the later sees both.
    """
    with db.connection() as conn:
        sites = _marked_sites(conn)
    return sum(step for site in sites for step in _mark_steps(db, site))


def _mark_steps(db: Database, site: str) -> Iterator[int]:
    """Mark a site's rows, a bounded number in a transaction; yield how many each step has marked."""
    while True:
        with db.connection() as conn:
            marked = _mark_step(conn, site)
        if marked is None:
            return
        yield marked


def _marked_sites(conn: Connection) -> list[str]:
    """Give every site that a job names a mark of its own; it starts where the common one has come to.

    The common mark stays locked until the transaction ends: it must not move on over a site that just gets its own.
    """
    conn.execute("INSERT INTO export_marks (site) VALUES ('*') ON CONFLICT DO NOTHING")
    common = fetch_value(conn, "SELECT marked_to FROM export_marks WHERE site = '*' FOR UPDATE")
    conn.execute(
        "INSERT INTO export_marks (site, marked_to) SELECT DISTINCT site, %s::bigint FROM export_coverage"
        " ON CONFLICT DO NOTHING",
        (common,),
    )
    return [row[0] for row in conn.execute("SELECT site FROM export_marks ORDER BY site")]


def _mark_step(conn: Connection, site: str) -> int | None:
    """Mark the next rows of a site; None when there is nothing left to mark."""
    # A job that begins to cover these rows just now must not find them marked as exported.
    lock_coverage(conn, exclusive=False)
    named = [name for name in _marked_sites(conn) if name != ALL_SITES]
    marked_to = fetch_value(conn, "SELECT marked_to FROM export_marks WHERE site = %s", (site,))
    target = _settled_to(conn, site)
    if target is None or target <= marked_to:
        return None
    end = _step_end(conn, marked_to, target)
    stretch = Range(site=site, from_id=marked_to, to_id=end, except_sites=tuple(named) if site == ALL_SITES else ())
    conn.execute("UPDATE export_marks SET marked_to = %s WHERE site = %s", (end, site))
    return mark_exported(conn, where([stretch]))


def _step_end(conn: Connection, marked_to: int, target: int) -> int:
    """Return where a step ends: by rows, not by ids, because a sequence may have leapt."""
    row = conn.execute(
        "SELECT count(*), max(id) FROM"
        " (SELECT id FROM events_log WHERE id > %s AND id <= %s ORDER BY id LIMIT %s) AS step",
        (marked_to, target, _MARK_STEP_ROWS),
    ).fetchone()
    assert row is not None  # noqa: S101 - an aggregate always returns a row
    found, last_id = row
    return int(last_id) if found == _MARK_STEP_ROWS else target


def _settled_to(conn: Connection, site: str) -> int | None:
    """Return the id up to which every job that covers the site has settled; None where no job ever covered it.

    Batches that a job sealed before it lost the site count too: they are still to be delivered. Where no job covers the
    site any more, what one has delivered is exported.
    """
    query = """
        SELECT least(
            coalesce(min(c.sealed_to) FILTER (WHERE c.active), max(c.sealed_to)),
            (SELECT min(r.from_id) FROM export_ranges r JOIN export_batches b USING (job, sequence)
             WHERE b.state = 'sealed'
             AND (r.site = %(site)s OR (r.site = '*' AND NOT %(site)s = ANY(r.except_sites))))
        )
        FROM export_coverage c
        WHERE (c.site = %(site)s OR (c.site = '*' AND NOT EXISTS (
            SELECT 1 FROM export_coverage own WHERE own.job = c.job AND own.site = %(site)s)))
        HAVING count(*) > 0
    """
    found: int | None = fetch_value(conn, query, {"site": site})
    return found
