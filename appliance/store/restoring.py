"""Bringing events and their batches back into the database: ids, marks and coverage as they were.

Ids decide what is exported: a job has sealed everything up to an id. So what was collected here meanwhile, under ids
that the batches to come back have too, first gets new ones above them all; then each batch comes back under its own.
"""

from collections.abc import Iterable, Sequence

from psycopg import sql

from appliance.errors import RestoreError
from appliance.store import ledger, sealing
from appliance.store.database import Connection, Database, fetch_value
from appliance.store.events import EXPORTED_AS_SQL
from appliance.store.ledger import Batch, Key, ObjectRecord
from appliance.store.ranges import ALL_SITES, Range, where

# Rows that get a new id in one transaction: collecting goes on beside it.
_STEP_ROWS = 20_000
# Ids are drawn while the sequence is moved on; nobody draws so many in that moment.
_LEAP = 1_000_000

# Whether a range r of the ledger holds a row i.
_HOLDS = (
    "(i.id > r.from_id AND i.id <= r.to_id"
    " AND (i.site_id = r.site OR (r.site = '*' AND NOT coalesce(i.site_id = ANY(r.except_sites), false))))"
)


def begin(conn: Connection, bucket: str, batches: Sequence[Batch], *, in_the_way: Iterable[Key] = ()) -> int:
    """Stop all sealing until `end`, and let marks and coverage start over where batches are to come back.

    Batches that are `in_the_way`, and those after them, are taken back: their rows wait to be sealed as before. A job
    looks again at all that lies behind its own last batch: where it found nothing, rows of another job's batches may
    come back, and they are its rows too. Return the id above which rows come back, or stand here and are in no batch.
    """
    # Waits for a seal that is under way, which holds the same lock shared.
    ledger.lock_coverage(conn, exclusive=True)
    conn.execute("UPDATE installation SET restoring = %s", (bucket,))
    for key in in_the_way:
        _take_back(conn, key)
    conn.execute(
        "UPDATE export_coverage c SET sealed_to = least(c.sealed_to, coalesce((SELECT max(r.to_id) FROM export_ranges r"
        " WHERE r.job = c.job AND (r.site = c.site OR (r.site = '*' AND NOT c.site = ANY(r.except_sites)))), 0))"
    )
    # Coverage moves on over all of this ground, so what has been collected on it meanwhile must move away.
    ground = {(batch.key.job, r.site, r.except_sites) for batch in batches for r in batch.ranges}
    ends = [_sealed_to(conn, job, site, except_sites) for job, site, except_sites in ground]
    lowest_id = min(*ends, *(r.from_id for batch in batches for r in batch.ranges))
    conn.execute(
        "UPDATE export_marks SET marked_to = least(marked_to, %(id)s), deleted_to = least(deleted_to, %(id)s)",
        {"id": lowest_id},
    )
    return lowest_id


def _sealed_to(conn: Connection, job: str, site: str, except_sites: Sequence[str]) -> int:
    """Return how far a job has sealed a site, or, for all sites, each of them; a new one starts where these are."""
    if site == ALL_SITES:
        query = (
            "SELECT CASE WHEN bool_or(site = '*') THEN min(sealed_to) ELSE 0 END FROM export_coverage"
            " WHERE job = %(job)s AND site <> ALL(%(except)s)"
        )
    else:
        query = (
            "SELECT sealed_to FROM export_coverage WHERE job = %(job)s AND site IN (%(site)s, '*')"
            " ORDER BY site = '*' LIMIT 1"
        )
    found = fetch_value(conn, query, {"job": job, "site": site, "except": list(except_sites)})
    return int(found or 0)


def _take_back(conn: Connection, first: Key) -> None:
    """Forget a batch and those after it. Raises RestoreError where a run has begun to send one."""
    after = "WHERE job = %s AND sequence >= %s"
    # A run that has one in hand holds it first, and finds that it is gone (ledger.hold).
    conn.execute(f"SELECT 1 FROM export_batches {after} FOR UPDATE", (first.job, first.sequence))  # noqa: S608
    if not ledger.was_never_sent(conn, first):
        raise RestoreError(f"a run has begun to send batch {first} just now: run this again")
    for table in ("export_deliveries", "export_objects", "export_ranges", "export_batches"):
        conn.execute(f"DELETE FROM {table} {after}", (first.job, first.sequence))  # noqa: S608


def unfinished(bucket: str) -> str:
    """Say why nothing new is exported."""
    return (
        f"nothing new is sealed until the restore from bucket {bucket} has come to its end: run `appliance restore "
        f"{bucket}` again if none is under way"
    )


def end(conn: Connection) -> None:
    """Let sealing go on."""
    conn.execute("UPDATE installation SET restoring = NULL")


# -- room for the ids -------------------------------------------------------------------------------------------------


def make_room(db: Database, *, lowest_id: int, highest_id: int) -> int:
    """Give rows with an id above `lowest_id` and up to `highest_id` new ids above those; return how many that were.

    Rows of batches that are in the ledger stay. Raises RestoreError while a transaction may still bring others.
    """
    with db.connection() as conn:
        conn.execute(
            "SELECT setval('events_log_id_seq', %(id)s + %(leap)s)"
            " WHERE %(id)s >= (SELECT last_value FROM events_log_id_seq)",
            {"id": highest_id, "leap": _LEAP},
        )
    with db.connection() as conn:
        blockers = sealing.outwait(conn, sealing.PATIENCE_SECONDS)
    if blockers:
        raise RestoreError(f"{blockers[0]}: end it, then run this again")
    moved = 0
    while number := _move_some(db, lowest_id, highest_id):
        moved += number
    return moved


def _move_some(db: Database, lowest_id: int, highest_id: int) -> int:
    with db.connection() as conn:
        known_id = fetch_value(conn, "SELECT coalesce(max(to_id), 0) FROM export_ranges")
        # DEFAULT draws the next id, under the lock that sealing looks for.
        moved = conn.execute(
            "UPDATE events_log SET id = DEFAULT WHERE id IN ("  # noqa: S608 - a condition of our own
            "SELECT i.id FROM events_log i WHERE i.id > %s AND i.id <= %s"
            f" AND NOT EXISTS (SELECT 1 FROM export_ranges r WHERE {_HOLDS}) ORDER BY i.id LIMIT %s)",
            (lowest_id, highest_id, _STEP_ROWS),
        )
        # What was counted under those ids waits to be exported as before.
        conn.execute(
            "UPDATE event_counts SET last_id = (SELECT max(id) FROM events_log) WHERE last_id > %s AND last_id <= %s",
            (known_id, highest_id),
        )
        return moved.rowcount


# -- one batch --------------------------------------------------------------------------------------------------------


def stage(conn: Connection) -> None:
    """Make room for the rows of one batch, until the transaction ends: `restored`, and `lines` for those in JSON."""
    conn.execute(
        sql.SQL("CREATE TEMPORARY TABLE restored ON COMMIT DROP AS SELECT {} FROM events_log WITH NO DATA").format(
            EXPORTED_AS_SQL
        )
    )
    conn.execute("CREATE TEMPORARY TABLE lines (line TEXT NOT NULL) ON COMMIT DROP")


def unpack_lines(conn: Connection) -> None:
    """Turn staged lines of JSON into staged rows."""
    conn.execute(
        sql.SQL(
            "INSERT INTO restored ({0}) SELECT {0} FROM lines, jsonb_populate_record(NULL::restored, line::jsonb)"
        ).format(EXPORTED_AS_SQL)
    )
    conn.execute("TRUNCATE lines")


def is_whole(conn: Connection, batch: Batch) -> bool:
    """Return whether the staged rows are as many as the batch has, and lie where it says."""
    query = sql.SQL("SELECT count(*), count(*) FILTER (WHERE {}) FROM restored e").format(where(batch.ranges))
    return conn.execute(query).fetchone() == (batch.row_count, batch.row_count)


def merge(conn: Connection, batch: Batch, *, highest_id: int) -> int:
    """Store the staged rows of a batch under their own ids and return how many were not there yet.

    An event that was sent again meanwhile, and stands above `highest_id`, gives way to what was exported. Raises
    RestoreError unless the batch's ranges hold its rows and nothing else in the end.
    """
    conn.execute("ANALYZE restored")
    _drop_repeats(conn, highest_id)
    conn.execute("DELETE FROM restored r USING events_log e WHERE e.id = r.id AND e.event_id = r.event_id")
    _check_other_batches(conn, batch.key)
    missing = fetch_value(conn, "SELECT count(*) FROM restored")
    stored = conn.execute(
        sql.SQL(
            "INSERT INTO events_log ({0}) OVERRIDING SYSTEM VALUE SELECT {0} FROM restored ORDER BY id"
            " ON CONFLICT DO NOTHING"
        ).format(EXPORTED_AS_SQL)
    ).rowcount
    if stored != missing or ledger.count_rows(conn, batch.ranges) != batch.row_count:
        raise RestoreError(
            f"batch {batch.key}: other events stand under the ids of its events, and other jobs have exported them: "
            "restore into a database of its own"
        )
    return stored


def _drop_repeats(conn: Connection, highest_id: int) -> None:
    """Remove events collected here that are among the staged ones, and take back that they were counted."""
    conn.execute(
        "WITH repeats AS ("  # noqa: S608 - a condition of our own
        " DELETE FROM events_log i USING restored e WHERE i.id > %s AND i.event_id = e.event_id"
        f" AND NOT EXISTS (SELECT 1 FROM export_ranges r WHERE {_HOLDS})"
        " RETURNING i.id, i.site_id, i.created_at)"
        " INSERT INTO event_counts (minute, site_id, events, last_id)"
        " SELECT date_trunc('minute', coalesce(created_at, now())), site_id, -count(*), max(id)"
        " FROM repeats WHERE site_id IS NOT NULL GROUP BY 1, 2",
        (highest_id,),
    )


def _check_other_batches(conn: Connection, key: Key) -> None:
    """A row that comes back must not appear in a batch that was exported without it."""
    bounds = conn.execute("SELECT coalesce(min(id), 0), coalesce(max(id), 0) FROM restored").fetchone()
    assert bounds is not None  # noqa: S101 - an aggregate always returns a row
    row = conn.execute(
        "SELECT r.job, r.sequence FROM export_ranges r WHERE r.from_id < %s AND r.to_id >= %s"  # noqa: S608 - as above
        f" AND EXISTS (SELECT 1 FROM restored i WHERE {_HOLDS}) LIMIT 1",
        (bounds[1], bounds[0]),
    ).fetchone()
    if row is not None:
        raise RestoreError(
            f"batch {key}: the batch {Key(*row)} was exported without rows of it: restore into a database of its own"
        )


def record(conn: Connection, batch: Batch, objects: Sequence[ObjectRecord], *, sha256: str) -> None:
    """Write a batch into the ledger as it was, with its deliveries as they are given, and what its job has covered.

    `sha256` is the digest of its manifest.
    """
    assert batch.manifest is not None  # noqa: S101 - it comes from one
    key = batch.key
    ledger.insert(conn, batch)
    for made in objects:
        ledger.record_object(conn, key, made)
    ledger.record_manifest(conn, key, batch.manifest, sha256)
    for delivery in batch.deliveries:
        if delivery.delivered:
            ledger.record_delivered(conn, key, delivery.bucket)
    ledger.settle(conn, key)
    _cover(conn, key.job, batch.ranges)


def _cover(conn: Connection, job: str, ranges: Sequence[Range]) -> None:
    """Move the job's coverage on to where the batch ends: also that of sites which "*" covered when it was sealed."""
    for r in ranges:
        conn.execute(
            "INSERT INTO export_coverage AS c (job, site, sealed_to, active) VALUES (%s, %s, %s, false)"
            " ON CONFLICT (job, site) DO UPDATE SET sealed_to = greatest(c.sealed_to, excluded.sealed_to)",
            (job, r.site, r.to_id),
        )
        if r.site == ALL_SITES:
            conn.execute(
                "UPDATE export_coverage SET sealed_to = greatest(sealed_to, %s) WHERE job = %s AND site <> ALL(%s)",
                (r.to_id, job, list(r.except_sites)),
            )
