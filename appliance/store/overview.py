"""What the status shows, from the ledger and the counters alone."""

from dataclasses import dataclass
from datetime import UTC, datetime

from appliance.store import counters, ledger, runs, sealing
from appliance.store.database import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketState:
    """How far one bucket of a job has come."""

    job: str
    bucket: str
    delivered: int
    pending: int
    last_delivered_at: datetime | None
    last_error: str | None
    retry_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One job: rows that wait, rows that are exported, and whether anything covers new rows."""

    job: str
    active: bool
    waiting: int
    exported: int
    buckets: tuple[BucketState, ...]
    oldest_waiting: datetime | None = None
    """When the first of the rows that wait came in; of a batch that is sealed already: when it was sealed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The state of the appliance at one moment."""

    sites: tuple[counters.SiteCount, ...]
    jobs: tuple[JobState, ...]
    runs: tuple[runs.Run, ...]
    open_writers: tuple[sealing.Writer, ...]
    restoring: str | None
    """The bucket from which events are being brought back: until that is done nothing is sealed."""

    @property
    def events(self) -> int:
        """Events that ever came in."""
        return sum(site.total for site in self.sites)


# A transaction younger than this is everyday business and not worth a line.
_WRITER_WORTH_NAMING_SECONDS = 5.0


def read(conn: Connection, *, run_limit: int = 20) -> Overview:
    """Return the overview."""
    writers = [w for w in sealing.open_writers(conn) if w.age_seconds >= _WRITER_WORTH_NAMING_SECONDS]
    return Overview(
        sites=tuple(counters.per_site(conn)),
        jobs=tuple(_jobs(conn)),
        runs=tuple(runs.latest(conn, limit=run_limit)),
        open_writers=tuple(writers),
        restoring=ledger.restoring_from(conn),
    )


def _jobs(conn: Connection) -> list[JobState]:
    buckets = _buckets(conn)
    rows = conn.execute(
        f"""
        SELECT job, bool_or(active),
            (SELECT coalesce(sum(events), 0) FROM event_counts n JOIN export_coverage c ON c.job = k.job
             AND c.active AND n.last_id > c.sealed_to AND {counters.COVERED})
            + (SELECT coalesce(sum(row_count), 0) FROM export_batches b WHERE b.job = k.job AND b.state = 'sealed'),
            (SELECT coalesce(sum(row_count), 0) FROM export_batches b WHERE b.job = k.job AND b.state = 'settled'),
            least(
                (SELECT min(minute) FROM event_counts n JOIN export_coverage c ON c.job = k.job
                 AND c.active AND n.last_id > c.sealed_to AND {counters.COVERED}),
                (SELECT min(sealed_at) FROM export_batches b WHERE b.job = k.job AND b.state = 'sealed'))
        FROM export_coverage k GROUP BY job ORDER BY job
        """  # noqa: S608 - a condition of our own
    )
    return [
        JobState(
            job=job,
            active=active,
            waiting=int(waiting),
            exported=int(exported),
            buckets=tuple(buckets.get(job, ())),
            oldest_waiting=oldest.astimezone(UTC) if oldest else None,
        )
        for job, active, waiting, exported, oldest in rows
    ]


def _buckets(conn: Connection) -> dict[str, list[BucketState]]:
    rows = conn.execute(
        """
        SELECT job, bucket, count(*) FILTER (WHERE state = 'delivered'), count(*) FILTER (WHERE state = 'pending'),
            max(delivered_at),
            (array_agg(last_error ORDER BY sequence) FILTER (WHERE last_error IS NOT NULL))[1],
            max(retry_at) FILTER (WHERE state = 'pending')
        FROM export_deliveries GROUP BY job, bucket ORDER BY job, bucket
        """
    )
    states: dict[str, list[BucketState]] = {}
    for job, bucket, delivered, pending, last, error, retry_at in rows:
        state = BucketState(
            job=job,
            bucket=bucket,
            delivered=delivered,
            pending=pending,
            last_delivered_at=last,
            last_error=error,
            retry_at=retry_at.astimezone(UTC) if retry_at else None,
        )
        states.setdefault(job, []).append(state)
    return states
