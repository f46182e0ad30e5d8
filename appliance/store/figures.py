"""What metrics and alerts are made of, from the ledger and the counters alone: nothing here ever reads events_log."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from appliance.store.counters import COVERED
from appliance.store.database import Connection, fetch_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What a job has not exported yet. `oldest`: when the first of it arrived, to the minute."""

    job: str
    events: int
    oldest: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketFigures:
    """How it went between a job and a bucket. `errors` are all there were, `failing` those in a row until now."""

    job: str
    bucket: str
    delivered: int
    delivered_bytes: int
    pending: int
    errors: int
    failing: int
    last_success: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run that has come to its end."""

    number: int
    job: str
    failed: bool
    seconds: float
    events: int
    batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRuns:
    """How many of a job's last runs failed without one between that did not, and what the last of them said."""

    job: str
    number: int
    message: str


def backlog(conn: Connection) -> list[Backlog]:
    """Return what waits, by job: of sealed batches what their last bucket has not got, and all that is not sealed."""
    rows = conn.execute(
        f"""
        WITH owed AS (
            SELECT r.job, r.site, min(r.from_id) AS from_id FROM export_ranges r
            JOIN export_batches b USING (job, sequence) WHERE b.state = 'sealed' GROUP BY 1, 2
        ), sealed AS (
            SELECT job, sum(row_count) AS events FROM export_batches WHERE state = 'sealed' GROUP BY 1
        ), coverage AS MATERIALIZED (
            SELECT job, site, active, sealed_to, coalesce(from_id, sealed_to) AS done_to
            FROM export_coverage LEFT JOIN owed USING (job, site) WHERE active OR from_id IS NOT NULL
        ), recent AS MATERIALIZED (
            -- Of the counters hardly any: what every job has is nobody's business here.
            SELECT * FROM event_counts WHERE last_id > (SELECT min(done_to) FROM coverage)
        ), unsealed AS (
            SELECT c.job, sum(n.events) AS events FROM coverage c
            JOIN recent n ON n.last_id > c.sealed_to AND {COVERED} WHERE c.active GROUP BY 1
        ), oldest AS (
            SELECT c.job, min(n.minute) AS minute FROM coverage c
            JOIN recent n ON n.last_id > c.done_to AND {COVERED} GROUP BY 1
        )
        SELECT job, coalesce(s.events, 0) + coalesce(u.events, 0), minute
        FROM (SELECT DISTINCT job FROM export_coverage) jobs
        LEFT JOIN sealed s USING (job) LEFT JOIN unsealed u USING (job) LEFT JOIN oldest USING (job) ORDER BY job
        """  # noqa: S608 - a condition of our own
    )
    return [
        Backlog(job=job, events=int(events), oldest=oldest.astimezone(UTC) if oldest and events else None)
        for job, events, oldest in rows
    ]


def buckets(conn: Connection) -> list[BucketFigures]:
    """Return the figures of every job and bucket there ever was."""
    rows = conn.execute(
        """
        SELECT job, bucket, count(*) FILTER (WHERE state = 'delivered'),
            coalesce(sum(o.bytes) FILTER (WHERE state = 'delivered'), 0),
            count(*) FILTER (WHERE state = 'pending'),
            sum(errors),
            coalesce(max(failures) FILTER (WHERE state = 'pending'), 0),
            max(delivered_at)
        FROM export_deliveries
        LEFT JOIN (SELECT job, sequence, sum(bytes) AS bytes FROM export_objects GROUP BY 1, 2) o USING (job, sequence)
        GROUP BY 1, 2 ORDER BY 1, 2
        """
    )
    return [
        BucketFigures(
            job=job,
            bucket=bucket,
            delivered=delivered,
            delivered_bytes=int(size),
            pending=pending,
            errors=int(errors),
            failing=failing,
            last_success=last.astimezone(UTC) if last else None,
        )
        for job, bucket, delivered, size, pending, errors, failing, last in rows
    ]


def runs_since(conn: Connection, known: Mapping[str, int]) -> list[FinishedRun]:
    """Return the runs that have ended, of each job those with a greater number than the one that is known of it.

    Runs of one job follow one another, so that none ends which is older than one that has.
    """
    rows = conn.execute(
        """
        SELECT id, job, outcome = 'failed', greatest(extract(epoch FROM finished_at - started_at), 0)::float8,
            row_count, batches
        FROM export_runs LEFT JOIN unnest(%s::text[], %s::bigint[]) AS known (job, number) USING (job)
        WHERE outcome <> 'running' AND id > coalesce(number, 0) ORDER BY id
        """,
        (list(known), list(known.values())),
    )
    return [
        FinishedRun(number=number, job=job, failed=failed, seconds=seconds, events=events, batches=batches)
        for number, job, failed, seconds, events, batches in rows
    ]


def failed_runs(conn: Connection) -> list[FailedRuns]:
    """Return the jobs whose last run failed."""
    rows = conn.execute(
        """
        SELECT job, count(*), (array_agg(message ORDER BY id DESC))[1] FROM export_runs r
        WHERE outcome = 'failed' AND id > coalesce(
            (SELECT max(id) FROM export_runs WHERE job = r.job AND outcome = 'done'), 0)
        GROUP BY job ORDER BY job
        """
    )
    return [FailedRuns(job=job, number=number, message=message) for job, number, message in rows]


def database_bytes(conn: Connection) -> int:
    """Return how much disk the database takes."""
    return int(fetch_value(conn, "SELECT pg_database_size(current_database())"))


@dataclass(frozen=True, slots=True, kw_only=True)
class FailingBucket:
    """A bucket that has failed so often since it last went well, with what it said."""

    job: str
    bucket: str
    number: int
    error: str


def failing_buckets(conn: Connection) -> list[FailingBucket]:
    """Return the buckets that a job waits for and whose last attempt failed."""
    rows = conn.execute(
        """
        SELECT job, bucket, max(failures),
            coalesce((array_agg(last_error ORDER BY failures DESC) FILTER (WHERE last_error IS NOT NULL))[1], '')
        FROM export_deliveries WHERE state = 'pending' AND failures > 0 GROUP BY 1, 2 ORDER BY 1, 2
        """
    )
    return [FailingBucket(job=job, bucket=bucket, number=number, error=error) for job, bucket, number, error in rows]
