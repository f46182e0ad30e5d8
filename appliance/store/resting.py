"""Buckets that are left alone for a while after they have failed."""

from appliance.store.database import Connection


def end_rest(conn: Connection, job: str, bucket: str | None = None) -> int:
    """Let the job's next run try its failed deliveries at once: to one bucket, or to all; return how many those are."""
    woken = conn.execute(
        "UPDATE export_deliveries SET retry_at = now() WHERE job = %(job)s AND state = 'pending' AND retry_at > now()"
        " AND bucket = coalesce(%(bucket)s, bucket)",
        {"job": job, "bucket": bucket},
    )
    return woken.rowcount
