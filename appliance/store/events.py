"""Statements on events_log, one function each, taking a connection."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any
from uuid import UUID

import psycopg

from appliance.store.database import Connection, fetch_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One row to be stored. Text fits its column, `raw_event_data` is JSON text that jsonb takes."""

    event_id: UUID
    event_type: str
    session_id: str | None
    visitor_id: str | None
    site_id: str
    timestamp: datetime
    url: str | None
    path: str | None
    user_agent: str | None
    ip_address: str | None
    raw_event_data: str
    created_at: datetime

    @property
    def chars(self) -> int:
        """How long its long texts are: about what it takes in memory, one to four bytes each."""
        return len(self.raw_event_data) + len(self.url or "") + len(self.user_agent or "")

    def as_row(self) -> tuple[Any, ...]:
        """Return the values in the order of INSERTED_COLUMNS."""
        row: tuple[Any, ...] = _values_of(self)
        return row


INSERTED_COLUMNS = tuple(field.name for field in fields(Event))
# What the clients' buckets get of a row; exported_at is the appliance's own business.
EXPORTED_COLUMNS = ("id", *INSERTED_COLUMNS)
EXPORTED_AS_SQL = psycopg.sql.SQL(", ").join(psycopg.sql.Identifier(column) for column in EXPORTED_COLUMNS)
# The number that manifests give to this set of columns; the database's own schema may change without it.
EXPORT_SCHEMA_VERSION = 1

_INSERTED = ", ".join(INSERTED_COLUMNS)
_values_of = attrgetter(*INSERTED_COLUMNS)
# All events of a request have arrived at one moment.
_arrival_text = lru_cache(64)(datetime.isoformat)


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """What the admin page shows of a row. `raw` is the event as JSON text."""

    id: int
    event_type: str
    site_id: str | None
    timestamp: datetime
    created_at: datetime | None
    path: str | None
    visitor_id: str | None
    raw: str


# Of a filter that hardly anything fits, the newest so many rows are looked through, and no more.
_LOOKED_THROUGH = 20_000
_RAW_CHARS = 20_000


def copy_in(conn: Connection, events: Sequence[Event]) -> None:
    """Store all events with one COPY: the fast way, for events that are all new.

    Raises psycopg.errors.UniqueViolation when one of them is stored already; nothing is stored then.
    """
    _copy(conn, "events_log", events)


def without_stored(conn: Connection, events: Sequence[Event]) -> list[Event]:
    """Return those events whose event id is not in the table."""
    ids = [event.event_id for event in events]
    stored = {one for (one,) in conn.execute("SELECT event_id FROM events_log WHERE event_id = ANY(%s)", (ids,))}
    return [event for event in events if event.event_id not in stored]


def insert_new(conn: Connection, events: Sequence[Event]) -> set[UUID]:
    """Store those events whose event id is not stored yet and return their event ids.

    Rows go in by event_id: two appliances on one database that are fed the same ids in opposite order would deadlock.
    Of equal ids the first is stored. The staging table has no ids: they are drawn only under the lock on events_log.
    """
    conn.execute(
        f"CREATE TEMPORARY TABLE staged_events ON COMMIT DROP"  # noqa: S608 - column names of our own
        f" AS SELECT {_INSERTED} FROM events_log WITH NO DATA"
    )
    _copy(conn, "staged_events", events)
    rows = conn.execute(
        f"INSERT INTO events_log ({_INSERTED})"  # noqa: S608 - column names of our own
        f" SELECT {_INSERTED} FROM staged_events ORDER BY event_id, ctid"
        " ON CONFLICT (event_id) DO NOTHING RETURNING event_id"
    )
    return {event_id for (event_id,) in rows}


def _copy(conn: Connection, table: str, events: Sequence[Event]) -> None:
    with conn.cursor().copy(f"COPY {table} ({_INSERTED}) FROM STDIN") as copy:
        for event in events:
            copy.write_row(_as_text(event))


def _as_text(event: Event) -> tuple[str | None, ...]:
    """Return the values in the order of INSERTED_COLUMNS, for COPY.

    It takes psycopg four times as long to find out what a UUID and a moment are, and Python half as long again to do
    this for whatever columns there are.
    """
    return (
        event.event_id.hex,
        event.event_type,
        event.session_id,
        event.visitor_id,
        event.site_id,
        event.timestamp.isoformat(),
        event.url,
        event.path,
        event.user_agent,
        event.ip_address,
        event.raw_event_data,
        _arrival_text(event.created_at),
    )


def newest_id(conn: Connection) -> int:
    """Return the largest id that can be seen; 0 in an empty table."""
    return int(fetch_value(conn, "SELECT coalesce(max(id), 0) FROM events_log"))


def newest(
    conn: Connection, *, limit: int, after: int = 0, site_id: str | None = None, event_type: str | None = None
) -> list[StoredEvent]:
    """Return the rows that came in last, newest first: behind an id, of a site, of a type; among the newest alone."""
    rows = conn.execute(
        "SELECT id, event_type, site_id, timestamp, created_at, path, visitor_id, left(raw_event_data::text, %(chars)s)"
        " FROM events_log WHERE id > %(after)s AND id > (SELECT max(id) FROM events_log) - %(looked)s"
        " AND (%(site)s::text IS NULL OR site_id = %(site)s) AND (%(type)s::text IS NULL OR event_type = %(type)s)"
        " ORDER BY id DESC LIMIT %(limit)s",
        {
            "chars": _RAW_CHARS,
            "after": after,
            "looked": _LOOKED_THROUGH,
            "site": site_id,
            "type": event_type,
            "limit": limit,
        },
    )
    return [StoredEvent(*row) for row in rows]


def mark_exported(conn: Connection, condition: psycopg.sql.Composable) -> int:
    """Set exported_at where the condition holds and it is not set yet; return how many rows that were."""
    query = psycopg.sql.SQL("UPDATE events_log AS e SET exported_at = now() WHERE exported_at IS NULL AND {}")
    return conn.execute(query.format(condition)).rowcount


def delete_exported(conn: Connection, condition: psycopg.sql.Composable) -> int:
    """Delete the rows where the condition holds and exported_at is set; return how many that were."""
    query = psycopg.sql.SQL("DELETE FROM events_log AS e WHERE exported_at IS NOT NULL AND {}")
    return conn.execute(query.format(condition)).rowcount
