"""How many events came in when: what the pictures of the admin page are drawn from. Reads the counters alone."""

from dataclasses import dataclass
from datetime import datetime

from appliance.store.database import Connection


@dataclass(frozen=True, slots=True)
class SlotCount:
    """Events of one site that arrived in one minute or on one day (UTC)."""

    slot: datetime
    site_id: str
    events: int


def per_minute(conn: Connection, *, minutes: int) -> list[SlotCount]:
    """Return what came in minute by minute, this minute included. Not for more than days: older minutes are hours."""
    rows = conn.execute(
        "SELECT date_trunc('minute', minute), site_id, sum(events)::bigint FROM event_counts"
        " WHERE minute > now() - %s * interval '1 minute' GROUP BY 1, 2 ORDER BY 1, 2",
        (minutes,),
    )
    return [SlotCount(*row) for row in rows]


def per_day(conn: Connection, *, days: int) -> list[SlotCount]:
    """Return what came in day by day, today included."""
    rows = conn.execute(
        "SELECT date_trunc('day', minute, 'UTC'), site_id, sum(events)::bigint FROM event_counts"
        " WHERE minute >= date_trunc('day', now(), 'UTC') - %s * interval '1 day' GROUP BY 1, 2 ORDER BY 1, 2",
        (days - 1,),
    )
    return [SlotCount(*row) for row in rows]
