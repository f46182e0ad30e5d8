"""Buckets that are left alone for a while after they have failed."""

from datetime import UTC, datetime

from appliance.store.database import Connection
from appliance.store.ledger import LONGEST_REST

# Further ahead than any pause reaches is a moment that was noted while the clock was wrong.
_RESTS = f"(retry_at > now() AND retry_at <= now() + {LONGEST_REST})"


def until(conn: Connection, job: str) -> dict[str, datetime]:
    """Return the buckets that are left alone because of what has failed, and until when."""
    rows = conn.execute(
        "SELECT bucket, max(retry_at) FROM export_deliveries"  # noqa: S608 - a condition of our own
        f" WHERE job = %s AND state = 'pending' AND {_RESTS} GROUP BY 1 ORDER BY 1",
        (job,),
    )
    return {bucket: retry_at.astimezone(UTC) for bucket, retry_at in rows}


def jobs_due(conn: Connection) -> list[str]:
    """Return the jobs with a delivery that has failed and has rested for long enough."""
    rows = conn.execute(
        "SELECT DISTINCT job FROM export_deliveries"  # noqa: S608 - a condition of our own
        f" WHERE state = 'pending' AND retry_at IS NOT NULL AND NOT {_RESTS} ORDER BY 1"
    )
    return [job for (job,) in rows]


def end_rest(conn: Connection, job: str, bucket: str | None = None) -> int:
    """Let the job's next run try its failed deliveries at once: to one bucket, or to all; return how many those are."""
    woken = conn.execute(
        "UPDATE export_deliveries SET retry_at = now() WHERE job = %(job)s AND state = 'pending' AND retry_at > now()"
        " AND bucket = coalesce(%(bucket)s, bucket)",
        {"job": job, "bucket": bucket},
    )
    return woken.rowcount
