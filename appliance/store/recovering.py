"""Whether a PostgreSQL that takes no connections is alive and will: it starts, recovers from a crash, or stops."""

from datetime import UTC, datetime

import psycopg
from psycopg.pq import PGconn, Ping

# The least that libpq takes: a server that has frozen does not answer this either.
_ANSWER_SECONDS = 2


def refuses_for_now(conninfo: str) -> bool:
    """Ask a server whether it refuses everybody for now (SQLSTATE 57P03)."""
    asked = psycopg.conninfo.make_conninfo(conninfo, connect_timeout=_ANSWER_SECONDS)
    return PGconn.ping(asked.encode()) == Ping.REJECT


class Recovery:
    """Knows since when a server has been recovering, as far as anybody has asked."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._since: datetime | None = None

    def over(self) -> None:
        """The server takes connections."""
        self._since = None

    def in_words(self) -> str:
        """Say that it recovers and since when; nothing where it is away for another reason."""
        if not refuses_for_now(self._conninfo):
            self._since = None
            return ""
        self._since = self._since or datetime.now(UTC)
        return f"PostgreSQL is recovering, since {self._since:%Y-%m-%d %H:%M:%S} UTC"
