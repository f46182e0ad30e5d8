"""Runs of export jobs: the lease that saves double work, and the record that people read."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from appliance.store.database import Connection, fetch_value

LEASE_SECONDS = 30
RENEW_LEASE_SECONDS = 10.0
_KEPT_RUNS = 500
# Clocks of appliances on one database may differ by so much without a job being run twice.
_CLOCKS_DIFFER = timedelta(minutes=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a job as the status shows it."""

    job: str
    started_at: datetime
    finished_at: datetime | None
    outcome: str
    batches: int
    row_count: int
    message: str

    @property
    def took(self) -> timedelta | None:
        """How long it ran; None while it does."""
        return self.finished_at - self.started_at if self.finished_at else None


def take_lease(conn: Connection, job: str, holder: UUID) -> bool:
    """Take or renew the job's lease for LEASE_SECONDS; False while another holds it.

    A row with an end rather than a session lock: it survives a pooler, and a dead holder's ends by itself. One that
    ends later than any could was taken before the clock was set back, and would hold the job up for as long as that
    (twice the time: a holder may have renewed it in a transaction that began after this one).
    """
    taken = conn.execute(
        "INSERT INTO export_leases AS l (job, holder, expires_at) VALUES (%(job)s, %(holder)s, now() + %(time)s)"
        " ON CONFLICT (job) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at"
        " WHERE l.holder = excluded.holder OR l.expires_at NOT BETWEEN now() AND excluded.expires_at + %(time)s",
        {"job": job, "holder": holder, "time": f"{LEASE_SECONDS} seconds"},
    )
    return taken.rowcount == 1


def release_lease(conn: Connection, job: str, holder: UUID) -> None:
    """Give the lease back, unless it has passed on meanwhile."""
    conn.execute("DELETE FROM export_leases WHERE job = %s AND holder = %s", (job, holder))


def start(conn: Connection, job: str) -> int:
    """Record that a run of the job has started, forget very old ones, and return its id.

    The caller holds the lease, so a run that still counts as running was cut off.
    """
    conn.execute(
        "UPDATE export_runs SET outcome = 'failed', finished_at = now(), message = 'cut off; the next run went on'"
        " WHERE job = %s AND outcome = 'running'",
        (job,),
    )
    conn.execute(
        "DELETE FROM export_runs WHERE job = %(job)s AND id <= ("
        " SELECT id FROM export_runs WHERE job = %(job)s ORDER BY id DESC OFFSET %(kept)s LIMIT 1)",
        {"job": job, "kept": _KEPT_RUNS},
    )
    return int(fetch_value(conn, "INSERT INTO export_runs (job) VALUES (%s) RETURNING id", (job,)))


def is_held(conn: Connection, job: str) -> bool:
    """Return whether anybody holds the job's lease."""
    query = "SELECT EXISTS (SELECT 1 FROM export_leases WHERE job = %s AND expires_at > now())"
    return bool(fetch_value(conn, query, (job,)))


def finish(  # noqa: PLR0913 - the columns of one row
    conn: Connection,
    run_id: int,
    *,
    failed: bool,
    batches: int,
    row_count: int,
    message: str,
    due: datetime | None = None,
) -> None:
    """Record how a run ended; `due`: for which moment of its line it was, if it came to its end.

    An appliance whose clock is far ahead must not keep the others from what will come due.
    """
    conn.execute(
        "UPDATE export_runs SET finished_at = now(), outcome = %s, batches = %s, row_count = %s, message = %s"
        " WHERE id = %s",
        ("failed" if failed else "done", batches, row_count, message[:2000], run_id),
    )
    if due is not None:
        conn.execute("UPDATE export_runs SET due = least(%s, now() + %s) WHERE id = %s", (due, _CLOCKS_DIFFER, run_id))


def is_done(conn: Connection, job: str, due: datetime) -> bool:
    """Return whether the job has been run, by whichever appliance, for this moment of its line or a later one.

    What is noted for a moment further ahead than clocks may differ was noted before the clock was set back.
    """
    query = "SELECT EXISTS (SELECT 1 FROM export_runs WHERE job = %s AND due BETWEEN %s AND now() + %s)"
    return bool(fetch_value(conn, query, (job, due, _CLOCKS_DIFFER)))


_COLUMNS = "job, started_at, finished_at, outcome, batches, row_count, message"


def latest(conn: Connection, *, limit: int) -> list[Run]:
    """Return the newest runs of all jobs, newest first."""
    rows = conn.execute(
        f"SELECT {_COLUMNS} FROM export_runs ORDER BY id DESC LIMIT %s",  # noqa: S608 - column names of our own
        (limit,),
    )
    return [_run(*row) for row in rows]


def last_of_each_job(conn: Connection) -> dict[str, Run]:
    """Return the newest run of each job."""
    rows = conn.execute(
        f"SELECT DISTINCT ON (job) {_COLUMNS} FROM export_runs ORDER BY job, id DESC"  # noqa: S608 - as above
    )
    return {run.job: run for run in (_run(*row) for row in rows)}


def _run(  # noqa: PLR0913, PLR0917 - the columns of one row
    job: str,
    started_at: datetime,
    finished_at: datetime | None,
    outcome: str,
    batches: int,
    row_count: int,
    message: str,
) -> Run:
    return Run(
        job=job,
        started_at=started_at,
        finished_at=finished_at,
        outcome=outcome,
        batches=batches,
        row_count=row_count,
        message=message,
    )
