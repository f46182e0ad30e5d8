"""Why there is no connection to the database, in one sentence that says what to do."""

import psycopg

READ_ONLY = (
    "it takes no writes, as a standby does: name the primary in database.url, or all servers of it with "
    "target_session_attrs=read-write"
)

# What libpq, PostgreSQL and PgBouncer say, and what to do about it. The first that fits counts.
_ADVICE = (
    (
        "certificate verify failed",
        "the server's certificate is signed by nobody that sslrootcert names: correct the file in database.url",
    ),
    (
        "does not match host name",
        "the server's certificate is made out to another name: write the name that stands in it into database.url",
    ),
    ("server does not support SSL", "the server speaks no TLS: turn ssl on there, or take sslmode out of database.url"),
    ("session is read-only", READ_ONLY),
    ("server is in hot standby mode", READ_ONLY),
    ("password authentication failed", "correct the user and the password in database.url"),
    ("no password supplied", "write the password into database.url"),
    # Of a server at a socket libpq says other words: the embedded one has no address that anybody could correct.
    ("accepting TCP/IP connections?", "start that server, or correct host and port in database.url"),
    ("could not translate host name", "correct the host in database.url"),
    ("failed to resolve host", "correct the host in database.url"),
    ('" does not exist', "create it, or correct its name in database.url"),
)


def reason_of(error: Exception) -> str:
    """Return why a connection failed, and what to do about it where that is known."""
    said = str(error).strip()
    # With several servers the failure of each is listed behind that of the last.
    advice = next((todo for words, todo in _ADVICE if words in said), None)
    why = said.partition("\n")[0].removeprefix("connection failed: ").removeprefix("connection is bad: ")
    return f"{why}; {advice}" if advice else why


class NotedConnection(psycopg.Connection[psycopg.rows.TupleRow]):
    """Leaves a note of why it could not be made: the pool only tells that there was none in time."""

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: object) -> "NotedConnection":
        """Connect as psycopg does; `notes`, a list, gets the latest error instead of what it held."""
        notes = kwargs.pop("notes")
        assert isinstance(notes, list)  # noqa: S101 - the pool gives it
        try:
            connection = super().connect(conninfo, **kwargs)  # type: ignore[arg-type]
        except psycopg.Error as error:
            notes[:] = [error]
            raise
        notes.clear()
        return connection
