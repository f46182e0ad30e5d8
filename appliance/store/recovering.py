"""Whether a PostgreSQL that takes no connections is alive and will: it starts, recovers from a crash, or stops."""

from collections.abc import Iterable
from datetime import UTC, datetime

# What it answers for as long as it takes no connections (SQLSTATE 57P03, which libpq keeps to itself). Where a server's
# messages are in another language this is not found. PQping would know, but psycopg keeps the interpreter's lock while
# it waits: with a server that has frozen, for two seconds in which nothing else in the process goes on.
_REFUSES_FOR_NOW = "the database system is "


def refuses_for_now(error: Exception) -> bool:
    """Return whether a connection failed because the server takes none for now."""
    return _REFUSES_FOR_NOW in str(error)


class Recovery:
    """Knows since when a server has been recovering, as far as anybody has asked."""

    def __init__(self) -> None:
        self._since: datetime | None = None

    def over(self) -> None:
        """The server takes connections."""
        self._since = None

    def in_words(self, errors: Iterable[Exception]) -> str:
        """Say that it recovers and since when, by how connections failed last; nothing where that is not why."""
        if not any(map(refuses_for_now, errors)):
            self._since = None
            return ""
        self._since = self._since or datetime.now(UTC)
        return f"PostgreSQL is recovering, since {self._since:%Y-%m-%d %H:%M:%S} UTC"
