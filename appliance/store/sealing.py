"""Sealing: deciding, once and for ever, which rows are a batch.

No table lock is taken and no writer ever waits. B = max(id) is read first; then the transactions are listed that hold
ROW EXCLUSIVE on events_log (every INSERT, COPY and UPDATE takes it and keeps it until it ends). An id up to B that
cannot be seen yet can only belong to one of those, because ids are drawn under that lock and in order. Once each of
them has ended, everything up to B is final. One that stays open delays the seal, not the sealing process: nothing new
is sealed, and the status names it.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg import sql
from psycopg.rows import TupleRow

from appliance.store import ledger
from appliance.store.database import Connection, fetch_value
from appliance.store.events import newest_id
from appliance.store.ledger import Batch, Delivery, Key
from appliance.store.partitions import HOUR, IN_UTC, SITE
from appliance.store.ranges import ALL_SITES, Range, where

# The first so many rows of some ground.
_FIRST = """
    (
        SELECT e.id, {site} AS site, {hour} AS hour, pg_column_size(e.raw_event_data) AS bytes
        FROM events_log e WHERE {condition} ORDER BY e.id LIMIT {rows}
    ) AS first
"""
# How many they are, the id of the last, their bytes, and whether they lie in order.
_LOOK = """
    SELECT coalesce(sum(number), 0)::bigint, coalesce(max(last), 0), coalesce(sum(bytes), 0)::bigint,
        coalesce(bool_and(first > last_before), TRUE)
    FROM (
        SELECT count(*) AS number, min(id) AS first, max(id) AS last, sum(bytes) AS bytes,
            lag(max(id)) OVER (ORDER BY site NULLS FIRST, hour) AS last_before
        FROM {first} GROUP BY site, hour
    ) AS groups
"""
# How many of them stand before, or on, the one that crosses a limit of bytes.
_FITTING = """
    SELECT count(*) FROM (
        SELECT sum(bytes) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before FROM {first}
    ) AS summed WHERE coalesce(before, 0) < {bytes}
"""
# How long a run waits for the writers it met; a group of the inbox takes milliseconds.
PATIENCE_SECONDS = 2.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A transaction that may still bring rows with ids below ones that are already seen."""

    transaction: str
    pid: int | None
    age_seconds: float
    application: str

    def __str__(self) -> str:
        who = f"process {self.pid} ({self.application})" if self.pid else f"prepared transaction {self.application}"
        return f"{who} has held a transaction on events_log open for {self.age_seconds:.0f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the next batch of a job will be frozen with."""

    job: str
    format: str
    compression: str
    object_rows: int
    object_bytes: int
    batch_rows: int
    schema_version: int
    buckets: Mapping[str, str]
    """Prefix by bucket name."""
    batch_bytes: int = 2**62
    """Of raw events as the table holds them, compressed where they are long: cheap to know, and near enough."""
    escape_formulas: bool = False


@dataclass(frozen=True, slots=True)
class Sealed:
    """A batch was sealed. `in_order`: by their ids its rows go through one site and hour after the other."""

    key: Key
    row_count: int
    in_order: bool


@dataclass(frozen=True, slots=True)
class Nothing:
    """No batch was sealed. `blockers`: the open transactions that forbid it, if that is why."""

    blockers: tuple[Writer, ...] = ()


def open_writers(conn: Connection) -> list[Writer]:
    """List the transactions, prepared ones too, that hold ROW EXCLUSIVE on events_log; not this session's own."""
    rows = conn.execute(
        """
        SELECT l.virtualtransaction, l.pid,
            coalesce(extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared)), 0)::float8,
            coalesce(nullif(a.application_name, ''), p.gid, '')
        FROM pg_locks l
        LEFT JOIN pg_stat_activity a ON a.pid = l.pid
        LEFT JOIN pg_locks x ON l.pid IS NULL AND x.pid IS NULL AND x.locktype = 'transactionid'
            AND x.virtualtransaction = l.virtualtransaction
        LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
        WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' AND l.granted
        AND l.relation = 'events_log'::regclass
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND l.pid IS DISTINCT FROM pg_backend_pid()
        ORDER BY 3 DESC
        """
    )
    return [Writer(transaction=t, pid=pid, age_seconds=age, application=name) for t, pid, age, name in rows]


def sync_coverage(conn: Connection, jobs: Mapping[str, Sequence[str]], *, retire: bool = True) -> None:
    """Make the ledger's coverage what the configuration says: site ids, or "*", by job.

    Without `retire` nothing ends: what the ledger covers beyond this configuration may be another process's.

    A job or site that is new starts at the beginning, so that rows that still stand are caught up; one that is gone
    ends, and takes up again where it ended should it come back. No row is covered twice: a site that "*" has covered
    starts where "*" has come to, and "*" leaves out every site with progress of its own.
    """
    ledger.lock_coverage(conn, exclusive=True)
    for job, sites in jobs.items():
        for site in sites:
            conn.execute(
                "INSERT INTO export_coverage (job, site, sealed_to) VALUES (%(job)s, %(site)s,"
                " coalesce((SELECT sealed_to FROM export_coverage WHERE job = %(job)s AND site = '*'), 0))"
                " ON CONFLICT DO NOTHING",
                {"job": job, "site": site},
            )
        conn.execute(
            "UPDATE export_coverage SET active = NOT active WHERE job = %(job)s AND (NOT active OR %(retire)s)"
            " AND active IS DISTINCT FROM (site = ANY(%(sites)s) OR '*' = ANY(%(sites)s))",
            {"job": job, "sites": list(sites), "retire": retire},
        )
    if retire:
        conn.execute("UPDATE export_coverage SET active = false WHERE active AND job <> ALL(%s)", (list(jobs),))


def next_key(conn: Connection, job: str) -> Key | None:
    """Return the name that the job's next batch will have; None when there cannot be rows for one yet."""
    ground = _ranges_up_to(newest_id(conn), _active_coverage(conn, job))
    return Key(job, ledger.next_sequence(conn, job)) if ground else None


def seal_next(conn: Connection, plan: Plan, *, patience_seconds: float = PATIENCE_SECONDS) -> Sealed | Nothing:
    """Seal the job's next batch if there are rows for it.

    Two runs at once are right: the second to write the sequence, or to move the coverage on, fails with UniqueViolation
    or OvertakenError, and its transaction comes to nothing.
    """
    # What a job covers must not change between being read here and being frozen.
    ledger.lock_coverage(conn, exclusive=False)
    if ledger.restoring_from(conn) is not None:
        return Nothing()
    coverage = _active_coverage(conn, plan.job)
    newest = newest_id(conn)
    ranges = _ranges_up_to(newest, coverage)
    if not ranges:
        return Nothing()
    blockers = outwait(conn, patience_seconds)
    if blockers:
        return Nothing(blockers)
    cut = _cut(conn, ranges, plan)
    end = cut.last_id if cut.more else newest
    frozen = _ranges_up_to(end, coverage)
    _advance_coverage(conn, plan.job, frozen)
    if cut.row_count == 0:
        return Nothing()
    key = Key(plan.job, ledger.next_sequence(conn, plan.job))
    ledger.insert(conn, _batch(key, plan, frozen, cut.row_count, sealed_at=fetch_value(conn, "SELECT now()")))
    return Sealed(key, cut.row_count, cut.in_order)


def _active_coverage(conn: Connection, job: str) -> dict[str, tuple[int, bool]]:
    rows = conn.execute("SELECT site, sealed_to, active FROM export_coverage WHERE job = %s ORDER BY site", (job,))
    return {site: (sealed_to, active) for site, sealed_to, active in rows}


def _ranges_up_to(end: int, coverage: Mapping[str, tuple[int, bool]]) -> list[Range]:
    named = tuple(site for site in coverage if site != ALL_SITES)
    return [
        Range(site=site, from_id=sealed_to, to_id=end, except_sites=named if site == ALL_SITES else ())
        for site, (sealed_to, active) in coverage.items()
        if active and sealed_to < end
    ]


def outwait(conn: Connection, patience_seconds: float) -> tuple[Writer, ...]:
    """Wait for the writers of this moment, not for later ones, and return those that stayed open."""
    met = {writer.transaction for writer in open_writers(conn)}
    deadline = time.monotonic() + patience_seconds
    while met:
        left = [writer for writer in open_writers(conn) if writer.transaction in met]
        if not left or time.monotonic() >= deadline:
            return tuple(left)
        time.sleep(_POLL_SECONDS)
    return ()


@dataclass(frozen=True, slots=True)
class _Cut:
    """The rows of the next batch: how many, the last one's id, their order, and whether there may be more behind it."""

    row_count: int
    last_id: int
    in_order: bool
    more: bool


def _cut(conn: Connection, ranges: Sequence[Range], plan: Plan) -> _Cut:
    """Find where the next batch ends. The row that crosses the limit of bytes is its last."""
    conn.execute(IN_UTC)
    found, last_id, size, in_order = _one_row(conn, sql.SQL(_LOOK).format(first=_first(ranges, plan.batch_rows)))
    more = found == plan.batch_rows
    if size >= plan.batch_bytes:
        # Seldom: this takes longer than all the rest.
        fitting = sql.SQL(_FITTING).format(first=_first(ranges, found), bytes=sql.Literal(plan.batch_bytes))
        (rows,) = _one_row(conn, fitting)
        more = more or rows < found
        found, last_id, _, in_order = _one_row(conn, sql.SQL(_LOOK).format(first=_first(ranges, rows)))
    return _Cut(found, last_id, in_order=in_order, more=more)


def _first(ranges: Sequence[Range], rows: int) -> sql.Composed:
    return sql.SQL(_FIRST).format(site=SITE, hour=HOUR, condition=where(ranges), rows=sql.Literal(rows))


def _one_row(conn: Connection, query: sql.Composed) -> TupleRow:
    row = conn.execute(query).fetchone()
    assert row is not None  # noqa: S101 - an aggregate always returns a row
    return row


def _advance_coverage(conn: Connection, job: str, frozen: Iterable[Range]) -> None:
    """Move the coverage on by compare-and-set: another run that was faster makes this one start over."""
    for r in frozen:
        moved = conn.execute(
            "UPDATE export_coverage SET sealed_to = %s WHERE job = %s AND site = %s AND sealed_to = %s AND active",
            (r.to_id, job, r.site, r.from_id),
        )
        if moved.rowcount != 1:
            raise ledger.OvertakenError(f"another run of {job} has sealed these rows")


def _batch(key: Key, plan: Plan, frozen: Sequence[Range], row_count: int, *, sealed_at: datetime) -> Batch:
    return Batch(
        key=key,
        kind="batch",
        sealed_at=sealed_at,
        row_count=row_count,
        format=plan.format,
        compression=plan.compression,
        object_rows=plan.object_rows,
        object_bytes=plan.object_bytes,
        escape_formulas=plan.escape_formulas,
        schema_version=plan.schema_version,
        ranges=tuple(frozen),
        deliveries=tuple(Delivery(bucket=bucket, prefix=prefix) for bucket, prefix in plan.buckets.items()),
    )
