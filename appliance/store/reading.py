"""The way out of the database: the rows of a sealed batch as a stream of Arrow record batches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from psycopg import sql
from psycopg.conninfo import make_conninfo

from appliance.errors import BatchChangedError, DatabaseUnavailableError
from appliance.priority import step_back_postgres
from appliance.store.database import is_postgres_of_this_machine
from appliance.store.events import EXPORTED_AS_SQL, EXPORTED_COLUMNS
from appliance.store.ledger import Batch
from appliance.store.partitions import HOUR, IN_UTC, SITE
from appliance.store.ranges import where

# How many rows there are, and whether in the order of their ids they go through one site and hour after the other.
_GROUND = """
    SELECT coalesce(sum(number), 0)::bigint, coalesce(bool_and(first > last_before), TRUE)
    FROM (
        SELECT count(*) AS number, min(e.id) AS first,
            lag(max(e.id)) OVER (ORDER BY {site} NULLS FIRST, {hour}) AS last_before
        FROM events_log e WHERE {condition} GROUP BY {site}, {hour}
    ) AS groups
"""
# The partition in one sortable text: date, hour, and the site behind "+"; "-" alone is a row without a site.
_ROWS = """
    SELECT
        CASE WHEN isfinite(coalesce(r.created_at, r.timestamp))
            THEN to_char(coalesce(r.created_at, r.timestamp), 'YYYY-MM-DD HH24') ELSE '- -' END
            || CASE WHEN r.site_id IS NULL THEN ' -' ELSE ' +' || r.site_id END AS partition,
        {content}
    FROM {source}
"""
# Both begin to send at once: sorting whole rows would take as long as reading them, and their room on the disk.
_BY_ID = """
    (SELECT {columns} FROM events_log e WHERE {condition}) AS r
    ORDER BY r.id
"""
_BY_SITE_AND_HOUR = """
    (
        SELECT e.id AS row_id, {site} AS site, {hour} AS hour
        FROM events_log e WHERE {condition}
        ORDER BY 2 NULLS FIRST, 3, 1 OFFSET 0
    ) AS sorted
    CROSS JOIN LATERAL (SELECT {columns} FROM events_log e WHERE e.id = sorted.row_id OFFSET 0) AS r
    ORDER BY sorted.site NULLS FIRST, sorted.hour, sorted.row_id
"""
# Each piece costs the same, however few rows it has; larger ones gain nothing more, and several are held at a time.
_PIECE_OPTION = "adbc.postgresql.batch_size_hint_bytes"
_PIECE_BYTES = 4 << 20
# Of each server that database.url names, until the next one is tried.
_CONNECT_TIMEOUT_SECONDS = 5
_JSON_LINE = sql.SQL("row_to_json(r)::text || E'\\n' AS line")
_MOMENTS = frozenset({"timestamp", "created_at"})
# Texts as JSON lines have them.
_AS_TEXT = {
    "event_id": "r.{}::text",
    "ip_address": "abbrev(r.{})",
    "raw_event_data": "r.{}::text",
    "timestamp": "(to_json(r.{}) #>> '{{}}')",
    "created_at": "(to_json(r.{}) #>> '{{}}')",
}


def load_arrow() -> None:
    """Import what reading takes beforehand; the collector, which never exports, starts without it."""
    import adbc_driver_postgresql.dbapi  # noqa: F401, PLC0415
    import pyarrow.compute  # noqa: PLC0415
    import pyarrow.parquet  # noqa: F401, PLC0415


@contextmanager
def rows_of(conninfo: str, batch: Batch, *, in_order: bool | None = None) -> Iterator[Iterator[Any]]:
    """Lend the rows of a batch as record batches, in the way its format needs them.

    All have the columns partition and timestamp; for text there is line (with its line break), for Parquet there are
    all exported columns. They come ordered by site, hour of arrival and id, from one snapshot, never more than a few MB
    at a time. Raises BatchChangedError when there are more or fewer of them than were sealed, and
    DatabaseUnavailableError when the database fails.

    `in_order` is what sealing has found a moment ago. Without it the rows are looked through first, and their number is
    known before the first one comes; with it only behind the last.
    """
    # Only exports need Arrow: the collector starts without it.
    import adbc_driver_postgresql.dbapi as adbc  # noqa: PLC0415
    import pyarrow as pa  # noqa: PLC0415

    # Arrow's own keeps tens of MB more for itself when threads hand rows to each other.
    pa.set_memory_pool(pa.system_memory_pool())
    parts = {"condition": where(batch.ranges), "columns": EXPORTED_AS_SQL, "site": SITE, "hour": HOUR}
    ground = sql.SQL(_GROUND).format(**parts)
    try:
        with adbc.connect(_patient(conninfo)) as connection, connection.cursor() as cursor:
            for pin in ("ISOLATION LEVEL REPEATABLE READ", "READ ONLY"):
                cursor.execute(f"SET TRANSACTION {pin}")
            # The text of timestamps must not depend on how a server or a role is set up.
            cursor.execute(IN_UTC)
            cursor.execute("SET LOCAL datestyle = 'ISO, MDY'")
            _let_others_go_first(cursor, is_local=is_postgres_of_this_machine(conninfo))
            cursor.adbc_statement.set_options(**{_PIECE_OPTION: str(_PIECE_BYTES)})
            if in_order is None:
                cursor.execute(ground.as_string())
                found, in_order = cursor.fetchone()
                _check_number(batch, found)
            source = sql.SQL(_BY_ID if in_order else _BY_SITE_AND_HOUR).format(**parts)
            cursor.execute(_rows(batch, source).as_string())
            yield _counted(batch, _guarded(cursor.fetch_record_batch()))
    except adbc.Error as error:
        raise DatabaseUnavailableError(f"reading the batch failed: {error}") from error


def _patient(conninfo: str) -> str:
    return make_conninfo(conninfo, client_encoding="UTF8", connect_timeout=_CONNECT_TIMEOUT_SECONDS)


def _counted(batch: Batch, record_batches: Iterable[Any]) -> Iterator[Any]:
    found = 0
    for record_batch in record_batches:
        found += record_batch.num_rows
        yield record_batch
    _check_number(batch, found)


def _check_number(batch: Batch, found: int) -> None:
    if found != batch.row_count:
        raise BatchChangedError(f"{batch.row_count} rows were sealed, {found} are there now")


def _let_others_go_first(cursor: Any, *, is_local: bool) -> None:
    """Make the server's process that reads for us wait for those that store events, where that is in our hands."""
    cursor.execute("SET LOCAL max_parallel_workers_per_gather = 0")
    if is_local:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
        step_back_postgres(pid)


def _rows(batch: Batch, source: sql.Composable) -> sql.Composable:
    return sql.SQL(_ROWS).format(content=_content(batch), source=source)


def _content(batch: Batch) -> sql.Composable:
    if batch.format == "parquet":
        return sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(_typed(column), sql.Identifier(column)) for column in EXPORTED_COLUMNS
        )
    line = _csv_line(escape_formulas=batch.escape_formulas) if batch.format == "csv" else _JSON_LINE
    return sql.SQL("{} AS timestamp, {}").format(_in_range("timestamp"), line)


def _typed(column: str) -> sql.Composable:
    """Return a column as Parquet gets it: a number, a moment or a text."""
    if column in _MOMENTS:
        return _in_range(column)
    return _as_text(column) if column in _AS_TEXT else sql.SQL("r.{}").format(sql.Identifier(column))


def _csv_line(*, escape_formulas: bool) -> sql.Composable:
    """Return a line of RFC 4180. NULL is nothing and an empty text is "", as PostgreSQL's COPY reads and writes it."""
    cells = [_csv_cell(column, escape_formulas=escape_formulas) for column in EXPORTED_COLUMNS if column != "id"]
    return sql.SQL("r.id || ',' || {} || E'\\r\\n' AS line").format(sql.SQL(" || ',' || ").join(cells))


def _csv_cell(column: str, *, escape_formulas: bool) -> sql.Composable:
    text = _as_text(column)
    if escape_formulas:
        # What spreadsheets take for the beginning of a formula (OWASP, CSV injection).
        text = sql.SQL("CASE WHEN {0} ~ E'^[=+@\\t\\r-]' THEN '''' || {0} ELSE {0} END").format(text)
    return sql.SQL("""coalesce('"' || replace({}, '"', '""') || '"', '')""").format(text)


def _as_text(column: str) -> sql.Composable:
    return sql.SQL(_AS_TEXT.get(column, "r.{}")).format(sql.Identifier(column))


def _in_range(column: str) -> sql.Composable:
    """Return a moment; NULL where Arrow and others have none: infinity, and years that have not four digits."""
    return sql.SQL("CASE WHEN r.{0} >= '0001-01-03' AND r.{0} < '9999-12-30' THEN r.{0} END").format(
        sql.Identifier(column)
    )


def _guarded(record_batches: Iterable[Any]) -> Iterator[Any]:
    """Tell a connection lost while rows stream, which Arrow reports as an OSError, from errors of the reader."""
    try:
        yield from record_batches
    except OSError as error:
        raise DatabaseUnavailableError(f"reading the batch failed: {error}") from error
