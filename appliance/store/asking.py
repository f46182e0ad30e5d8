"""Asking the database of database.url whether the appliance could work with it, without changing anything there."""

from dataclasses import dataclass

import psycopg

from appliance.errors import SchemaError
from appliance.store.database import Connection
from appliance.store.reasons import READ_ONLY, reason_of
from appliance.store.versions import check_server

_CONNECT_TIMEOUT_SECONDS = 5


@dataclass(frozen=True, slots=True)
class DatabaseAnswer:
    """What it said: its version, and what is in the way."""

    version: str = ""
    problem: str = ""

    @property
    def line(self) -> str:
        """Both in one line."""
        said = f"answers (PostgreSQL {self.version})" if self.version else "does not answer"
        return f"the database of database.url {said}" + (f": {self.problem}" if self.problem else "")


def ask(conninfo: str) -> DatabaseAnswer:
    """Connect once and look: whether it is there, new enough, takes writes, and lets this role make tables."""
    try:
        with psycopg.connect(conninfo, connect_timeout=_CONNECT_TIMEOUT_SECONDS) as conn:
            version = conn.info.parameter_status("server_version") or ""
            return DatabaseAnswer(version, "; ".join(_problems(conn)))
    except psycopg.Error as error:
        return DatabaseAnswer(problem=reason_of(error))


def _problems(conn: Connection) -> list[str]:
    row = conn.execute(
        "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool,"
        " coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)"
    ).fetchone()
    read_only, may_create = row or (False, True)
    found = []
    try:
        check_server(conn)
    except SchemaError as error:
        found.append(str(error))
    if read_only:
        found.append(READ_ONLY)
    if not may_create:
        found.append("the user of database.url may not make tables there: let it own the database")
    return found
