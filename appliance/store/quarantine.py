"""What was refused, kept aside with its reason, and how often that happened."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from appliance.store.database import Connection
from appliance.store.events import Event

# Newer entries push out older ones of their kind, so that one kind of rubbish does not hide another.
KEPT_PER_KIND = 500
_KEPT_DAYS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Something that was not stored. `content` is as it came (cut), and None where nothing of it may be kept."""

    kind: str
    reason: str
    site_id: str | None
    content: bytes | None
    refused_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept(Refused):
    """An entry of the quarantine. `acknowledged`: its sender was told that it is kept, so it stays for good."""

    id: int
    acknowledged: bool


@dataclass(frozen=True, slots=True)
class RefusalCount:
    """How often a kind of thing was refused of a site in the last day. The site is empty where none was known."""

    kind: str
    site_id: str
    number: int
    last_hour: datetime


def keep(conn: Connection, refused: Sequence[Refused]) -> None:
    """Keep what was refused, and of each kind only the newest."""
    with conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO quarantine (refused_at, kind, reason, site_id, content) VALUES (%s, %s, %s, %s, %s)",
            [(one.refused_at, one.kind, one.reason, one.site_id, one.content) for one in refused],
        )
    for kind in {one.kind for one in refused}:
        conn.execute(
            "DELETE FROM quarantine WHERE kind = %(kind)s AND NOT acknowledged AND id <= ("
            " SELECT id FROM quarantine WHERE kind = %(kind)s AND NOT acknowledged ORDER BY id DESC"
            " OFFSET %(kept)s LIMIT 1)",
            {"kind": kind, "kept": KEPT_PER_KIND},
        )


def keep_acknowledged(conn: Connection, refused: Iterable[tuple[Event, str]]) -> None:
    """Keep events for good that their senders were told are kept, and which the table does not take.

    In one order, so that two appliances on one database that have the same ones cannot deadlock.
    """
    rows = [
        (reason, event.site_id, event.raw_event_data.encode(), event.event_id, event.created_at)
        for event, reason in sorted(refused, key=lambda one: one[0].event_id.int)
    ]
    with conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO quarantine (kind, reason, site_id, content, event_id, refused_at, acknowledged)"
            " VALUES ('database', %s, %s, %s, %s, %s, true) ON CONFLICT DO NOTHING",
            rows,
        )


def count(conn: Connection, numbers: Iterable[tuple[tuple[str, str], int]]) -> None:
    """Add up how often each (kind, site) was refused in this hour."""
    with conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO refusal_counts (hour, kind, site_id, number) VALUES (date_trunc('hour', now()), %s, %s, %s)"
            " ON CONFLICT (hour, kind, site_id) DO UPDATE SET number = refusal_counts.number + excluded.number",
            [(kind, site_id, number) for (kind, site_id), number in numbers],
        )


def forget_old_counts(conn: Connection) -> None:
    """Keep counts for a month."""
    conn.execute("DELETE FROM refusal_counts WHERE hour < now() - %s * interval '1 day'", (_KEPT_DAYS,))


def counts_of_a_day(conn: Connection) -> list[RefusalCount]:
    """Return what was refused in the last 24 hours, the most frequent first."""
    rows = conn.execute(
        "SELECT kind, site_id, sum(number)::bigint, max(hour) FROM refusal_counts"
        " WHERE hour > now() - interval '1 day' GROUP BY kind, site_id ORDER BY 3 DESC, 1, 2"
    )
    return [RefusalCount(*row) for row in rows]


def newest(
    conn: Connection, *, limit: int, kind: str | None = None, site_id: str | None = None, below: int | None = None
) -> list[Kept]:
    """Return what was refused last, newest first: of one kind or site, before one entry, or any."""
    rows = conn.execute(
        "SELECT id, kind, reason, site_id, content, refused_at, acknowledged FROM quarantine"
        " WHERE kind = coalesce(%(kind)s, kind) AND coalesce(site_id, '') = coalesce(%(site)s, site_id, '')"
        " AND id < coalesce(%(below)s, 9223372036854775807) ORDER BY id DESC LIMIT %(limit)s",
        {"kind": kind, "site": site_id, "below": below, "limit": limit},
    )
    return [
        Kept(id=i, kind=k, reason=r, site_id=s, content=c, refused_at=at, acknowledged=a)
        for i, k, r, s, c, at, a in rows
    ]


def sizes(conn: Connection) -> dict[str, int]:
    """Return how many entries are kept of each kind."""
    return dict(conn.execute("SELECT kind, count(*) FROM quarantine GROUP BY kind ORDER BY kind").fetchall())
