"""Operational counters: how many events came in, without ever counting events_log (schema.sql counts)."""

from dataclasses import dataclass
from datetime import datetime

from appliance.store.database import Connection, fetch_value

# Any number of our own (store/migrations.py has another).
_LOCK_KEY = 7_217_002
# Whether a row c of export_coverage stands for the site of a row n of event_counts.
COVERED = """
    (c.site = n.site_id OR (c.site = '*' AND NOT EXISTS (
        SELECT 1 FROM export_coverage own WHERE own.job = c.job AND own.site = n.site_id)))
"""


@dataclass(frozen=True, slots=True)
class SiteCount:
    """Events of one site."""

    site_id: str
    total: int
    last_hour: int
    last_day: int
    last_minute: datetime


def merge(conn: Connection) -> None:
    """Make one row a minute of those of a commit each, and one row an hour of minutes that are days old.

    Rows on either side of a seal stay apart, and the first minute stands for all of them: so what waits for an export
    stays exact, and since when. Of several appliances that come to it at once one does it: two that delete the same
    rows in another order would deadlock.
    """
    if not fetch_value(conn, "SELECT pg_try_advisory_xact_lock(%s)", (_LOCK_KEY,)):
        return
    _merge_into(conn, unit="minute", older_than="2 minutes", newer_than="3 days")
    _merge_into(conn, unit="hour", older_than="3 days", newer_than="4 days")


def _merge_into(conn: Connection, *, unit: str, older_than: str, newer_than: str) -> None:
    conn.execute(
        """
        WITH crowded AS (
            SELECT date_trunc(%(unit)s, minute) AS slot, site_id FROM event_counts
            WHERE minute < date_trunc(%(unit)s, now() - %(older)s::interval) AND minute >= now() - %(newer)s::interval
            GROUP BY slot, site_id HAVING count(*) > 1
        ), taken AS (
            DELETE FROM event_counts c USING crowded
            WHERE date_trunc(%(unit)s, c.minute) = slot AND c.site_id = crowded.site_id
            AND c.minute >= now() - %(newer)s::interval
            RETURNING slot, c.minute, c.site_id, events, last_id
        )
        INSERT INTO event_counts (minute, site_id, events, last_id)
        SELECT min(minute), site_id, sum(events), max(last_id) FROM taken
        GROUP BY slot, site_id, (SELECT count(*) FROM export_coverage WHERE sealed_to >= last_id)
        """,
        {"unit": unit, "older": older_than, "newer": newer_than},
    )


def per_site(conn: Connection) -> list[SiteCount]:
    """Return how many events each site has sent."""
    rows = conn.execute(
        """
        SELECT site_id, sum(events)::bigint,
            coalesce(sum(events) FILTER (WHERE minute > now() - interval '1 hour'), 0)::bigint,
            coalesce(sum(events) FILTER (WHERE minute > now() - interval '1 day'), 0)::bigint,
            max(minute)
        FROM event_counts GROUP BY site_id ORDER BY site_id
        """
    )
    return [SiteCount(*row) for row in rows]


def lately(conn: Connection) -> int:
    """Return how many events came in during the last minute or two."""
    return int(
        fetch_value(
            conn, "SELECT coalesce(sum(events), 0) FROM event_counts WHERE minute > now() - interval '2 minutes'"
        )
    )


def site_ids(conn: Connection) -> list[str]:
    """Return every site that has sent."""
    return [site_id for (site_id,) in conn.execute("SELECT DISTINCT site_id FROM event_counts")]
