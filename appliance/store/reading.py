"""The way out of the database: the rows of a sealed batch as a stream of Arrow record batches."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from psycopg import sql
from psycopg.conninfo import make_conninfo

from appliance.errors import BatchChangedError, DatabaseUnavailableError
from appliance.store.events import EXPORTED_COLUMNS
from appliance.store.ranges import Range, where

# The partition in one sortable text: date, hour, and the site behind "+"; "-" alone is a row without a site. Arrival
# decides the hour; a row put there by hand may lack it.
_ROWS = """
    SELECT
        CASE WHEN isfinite(coalesce(r.created_at, r.timestamp))
            THEN to_char(coalesce(r.created_at, r.timestamp), 'YYYY-MM-DD HH24') ELSE '- -' END
            || CASE WHEN r.site_id IS NULL THEN ' -' ELSE ' +' || r.site_id END AS partition,
        row_to_json(r)::text || E'\\n' AS line,
        CASE WHEN r.timestamp >= '0001-01-03' AND r.timestamp < '9999-12-30' THEN r.timestamp END AS event_time
    FROM (SELECT {columns} FROM events_log e WHERE {condition}) AS r
    ORDER BY r.site_id COLLATE "C" NULLS FIRST, date_trunc('hour', coalesce(r.created_at, r.timestamp)), r.id
"""
_COLUMNS = sql.SQL(", ").join(sql.Identifier(column) for column in EXPORTED_COLUMNS)


@contextmanager
def json_lines(conninfo: str, ranges: Sequence[Range], *, expected_rows: int) -> Iterator[Iterator[Any]]:
    """Lend the rows as record batches with the columns partition, line (JSON text with its newline) and event_time.

    They come ordered by site, hour of arrival and id, from one snapshot, and never more than a few MB at a time.
    Raises BatchChangedError before the first row when there are more or fewer of them than expected, and
    DatabaseUnavailableError when the database fails.
    """
    # Only exports need Arrow: the collector starts without it.
    import adbc_driver_postgresql.dbapi as adbc  # noqa: PLC0415

    condition = where(ranges)
    count = sql.SQL("SELECT count(*) FROM events_log e WHERE {}").format(condition).as_string()
    rows = sql.SQL(_ROWS).format(columns=_COLUMNS, condition=condition).as_string()
    try:
        with adbc.connect(make_conninfo(conninfo, client_encoding="UTF8")) as connection, connection.cursor() as cursor:
            for pin in ("ISOLATION LEVEL REPEATABLE READ", "READ ONLY"):
                cursor.execute(f"SET TRANSACTION {pin}")
            # The text of timestamps must not depend on how a server or a role is set up.
            cursor.execute("SET LOCAL timezone = 'UTC'")
            cursor.execute("SET LOCAL datestyle = 'ISO, MDY'")
            cursor.execute(count)
            found = cursor.fetchone()[0]
            if found != expected_rows:
                raise BatchChangedError(f"{expected_rows} rows were sealed, {found} are there now")
            cursor.execute(rows)
            yield _guarded(cursor.fetch_record_batch())
    except adbc.Error as error:
        raise DatabaseUnavailableError(f"reading the batch failed: {error}") from error


def _guarded(record_batches: Iterable[Any]) -> Iterator[Any]:
    """Tell a connection lost while rows stream, which Arrow reports as an OSError, from errors of the reader."""
    try:
        yield from record_batches
    except OSError as error:
        raise DatabaseUnavailableError(f"reading the batch failed: {error}") from error
