"""Brings a database to the current schema: schema.sql on an empty one, numbered steps on an older one.

Steps are files `migrations/NNNN_what.sql` beside this module; the step NNNN leads from version NNNN - 1.
"""

from datetime import UTC, datetime
from pathlib import Path

from appliance.errors import SchemaError
from appliance.resources import read_resource
from appliance.store.database import Connection, fetch_value
from appliance.store.versions import check_server

SCHEMA_VERSION = 10

_STEPS = Path(__file__).parent / "migrations"
# Any number will do, as long as it is always the same: two processes that start at once take turns.
_LOCK_KEY = 7_217_001


def migrate(conn: Connection, *, alone: bool = True) -> None:
    """Make the schema current, in one transaction. Does nothing when it is.

    Unless the caller is `alone` with the database, an older schema is left to the appliance that runs on it.

    Raises SchemaError when the database was made by a newer version, is to be left alone, or has been moved to another
    one, and when the server is too old.
    """
    with conn.transaction():
        # What another process did while this one waited for the lock must be seen, whatever the database's default.
        conn.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        check_server(conn)
        take_turn(conn)
        if not alone:
            check_version(conn)
        bring_up_to_date(conn)
        _check_not_moved(conn)


def _check_not_moved(conn: Connection) -> None:
    moved_at: datetime | None = fetch_value(conn, "SELECT moved_at FROM installation")
    if moved_at is not None:
        when = f"{moved_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        raise SchemaError(
            f"all of this database was moved to another one ({when}): start with the configuration of that one. To use "
            'this one all the same, set "moved_at" in its table "installation" to NULL'
        )


def check_version(conn: Connection) -> None:
    """Raise SchemaError where the database is of another version of the appliance; one that holds none is no matter.

    Another appliance on it may be upgraded first, and a program under one that still runs.
    """
    version = current_version(conn)
    if version is None:
        return
    _check_not_newer(version)
    if version < SCHEMA_VERSION:
        raise SchemaError(
            f"the database has schema {version}, this version of the appliance knows {SCHEMA_VERSION}: start the "
            "appliance of this version first, which brings it up to date, or use the version that runs on it"
        )


def _check_not_newer(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"the database has schema {version}, this version of the appliance knows {SCHEMA_VERSION}: "
            "run the newer version that made it"
        )


def take_turn(conn: Connection) -> None:
    """Wait until nobody else changes the schema, and keep them off until the transaction ends."""
    conn.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK_KEY,))


def bring_up_to_date(conn: Connection) -> None:
    """Make the schema current within the transaction of a caller whose turn it is. Raises SchemaError."""
    version = current_version(conn)
    if version is None:
        conn.execute(read_resource("schema.sql"))
        conn.execute("INSERT INTO installation (schema_version) VALUES (%s)", (SCHEMA_VERSION,))
        return
    _check_not_newer(version)
    for step in range(version + 1, SCHEMA_VERSION + 1):
        _run_step(conn, step)


def current_version(conn: Connection) -> int | None:
    """Return the schema's version, or None in a database that holds no appliance."""
    if fetch_value(conn, "SELECT to_regclass('installation')") is None:
        return None
    version: int | None = fetch_value(conn, "SELECT schema_version FROM installation")
    return version


def _run_step(conn: Connection, step: int) -> None:
    (file,) = _STEPS.glob(f"{step:04d}_*.sql")
    conn.execute(file.read_text(encoding="utf-8"))
    conn.execute("UPDATE installation SET schema_version = %s", (step,))
