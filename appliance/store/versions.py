"""Which versions of PostgreSQL the appliance works with."""

from appliance.errors import SchemaError
from appliance.store.database import Connection, fetch_value

# What is tried with each change of the appliance (tests/servers.py).
OLDEST = 15
NEWEST = 18


def check_server(conn: Connection) -> None:
    """Raise SchemaError where the server is older than any that was tried."""
    major = _major(conn)
    if major < OLDEST:
        raise SchemaError(
            f"the database is PostgreSQL {major}, and the appliance needs {OLDEST} or newer: upgrade that server, or "
            "name another one in database.url"
        )


def doubt(conn: Connection) -> str:
    """Return what to tell of a server that is newer than any that was tried; nothing of others."""
    major = _major(conn)
    if major <= NEWEST:
        return ""
    return (
        f"the database is PostgreSQL {major}, and this version of the appliance was tried with {OLDEST} to {NEWEST}: "
        "look for a newer version of the appliance if something does not work"
    )


def _major(conn: Connection) -> int:
    # Asked for: what the connection says of it is the pooler's word where there is one.
    number: int = fetch_value(conn, "SELECT current_setting('server_version_num')::int")
    return number // 10_000
