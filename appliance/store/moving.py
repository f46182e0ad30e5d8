"""From one database into another: every table of the appliance, in one transaction on either side.

By COPY over two connections and not by pg_dump: the programs out of the wheel speak no TLS, and what version 18 writes
an older server does not read.
"""

from collections.abc import Callable, Iterator

from psycopg import sql

from appliance.errors import BackupError
from appliance.store.database import Connection, fetch_value

# Each behind those it refers to.
TABLES = (
    "installation",
    "events_log",
    "event_counts",
    "quarantine",
    "refusal_counts",
    "export_coverage",
    "export_batches",
    "export_ranges",
    "export_objects",
    "export_deliveries",
    "export_marks",
    "export_leases",
    "export_runs",
)
# Of these the ids go on where they were.
_NUMBERED = ("events_log", "quarantine", "export_runs")


def copy_everything(source: Connection, target: Connection, *, tell: Callable[[int], None]) -> None:
    """Copy all of the source into the target, whose tables are there and hold nothing. The caller commits.

    `tell` is told now and then how many bytes have been copied. Raises BackupError where less arrived than was sent.
    """
    # One picture of all tables, should anybody still write.
    source.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    # The fresh schema brought an installation's id, and an appliance that was started on it what it covers. From now on
    # this is the installation that the buckets know.
    target.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(map(sql.Identifier, TABLES))))
    # What it counts is copied too.
    target.execute("ALTER TABLE events_log DISABLE TRIGGER USER")
    copied = 0
    for table in TABLES:
        for size in _copy_table(source, target, table):
            copied += size
            tell(copied)
    target.execute("ALTER TABLE events_log ENABLE TRIGGER USER")
    for table in _NUMBERED:
        _copy_numbering(source, target, table)


def mark_moved(source: Connection) -> None:
    """Let nobody go on with a database by mistake whose events and history are in another one."""
    source.execute("UPDATE installation SET moved_at = now()")


def _copy_table(source: Connection, target: Connection, table: str) -> Iterator[int]:
    """Copy one table, and yield the size of each piece that has gone."""
    # By name: steps of migrations put columns at the end, where schema.sql has them in their place.
    columns = sql.SQL(", ").join(map(sql.Identifier, _columns(source, table)))
    named = sql.SQL("{} ({})").format(sql.Identifier(table), columns)
    # Binary: it depends on no setting of either server.
    read = sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(named)
    write = sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(named)
    with source.cursor() as sending, target.cursor() as receiving:
        with sending.copy(read) as rows, receiving.copy(write) as copy:
            for piece in rows:
                copy.write(piece)
                yield len(piece)
        if sending.rowcount != receiving.rowcount:
            raise BackupError(f"{table}: {sending.rowcount} rows were sent, {receiving.rowcount} arrived")


def _columns(conn: Connection, table: str) -> list[str]:
    query = (
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped"
        " ORDER BY attnum"
    )
    return [name for (name,) in conn.execute(query, (table,))]


def _copy_numbering(source: Connection, target: Connection, table: str) -> None:
    name = fetch_value(source, "SELECT pg_get_serial_sequence(%s, 'id')", (table,))
    query = sql.SQL("SELECT last_value, is_called FROM {}").format(sql.Identifier(*name.split(".")))
    last, called = source.execute(query).fetchone() or (1, False)
    target.execute("SELECT setval(pg_get_serial_sequence(%s, 'id'), %s, %s)", (table, last, called))
