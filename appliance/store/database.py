"""The connection pool, and what a lost database looks like to the rest of the house."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from appliance.errors import DatabaseUnavailableError, StatementFailedError
from appliance.priority import step_back_postgres
from appliance.store.reasons import READ_ONLY, NotedConnection, reason_of
from appliance.store.recovering import Recovery
from appliance.store.watchdog import Watchdog

Connection: TypeAlias = psycopg.Connection[TupleRow]

# One for the inbox, the rest for exports, pages and health checks.
_POOL_SIZE = 8
_CONNECT_TIMEOUT_SECONDS = 5
# The pool's back-off doubles from 1 s within this time: after a long outage it must not sleep on.
_RECONNECT_SECONDS = 4.0
# Requests that wait for a connection hold a thread each.
_MAX_WAITING = 64
# What a server does for us is undone when our machine has lost its power, but only once it notices: by the kernel's own
# limits after two hours (tcp(7)), in which nothing would be sealed. With these it takes a minute.
_NOTICE_OUR_END = """
    SET tcp_keepalives_idle = 30;
    SET tcp_keepalives_interval = 10;
    SET tcp_keepalives_count = 3;
    SET tcp_user_timeout = 60000
"""


class Database:
    """A pool of connections that commit on leaving `connection()` and roll back on an error."""

    def __init__(self, conninfo: str, *, makes_way: bool = False) -> None:
        """With `makes_way` the server's processes behind it, too, work only when nothing else wants to."""
        self.conninfo = conninfo
        self._watchdog = Watchdog()
        self._connect_errors: list[Exception] = []
        self._recovery = Recovery()
        self._pool = ConnectionPool(
            conninfo,
            connection_class=NotedConnection,
            open=False,
            min_size=1,
            max_size=_POOL_SIZE,
            timeout=_CONNECT_TIMEOUT_SECONDS,
            max_waiting=_MAX_WAITING,
            reconnect_timeout=_RECONNECT_SECONDS,
            configure=_configure_to_make_way if makes_way else _configure,
            kwargs={
                "connect_timeout": _CONNECT_TIMEOUT_SECONDS,
                "application_name": "appliance",
                "client_encoding": "UTF8",
                # Behind a pooler each transaction may meet another of the server's processes, which knows nothing of
                # what was prepared before.
                "prepare_threshold": None,
                "notes": self._connect_errors,
            },
        )

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Start the pool's threads; a database that is away is no error here."""
        self._watchdog.start()
        self._pool.open(wait=False)

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()
        self._watchdog.stop()

    @contextmanager
    def connection(
        self,
        *,
        wait_seconds: float = _CONNECT_TIMEOUT_SECONDS,
        answer_seconds: float | None = None,
        autocommit: bool = False,
    ) -> Iterator[Connection]:
        """Lend a connection for one transaction, which must end within `answer_seconds` if these are given.

        With `autocommit` each statement is its own: one way to the server and back instead of three.

        Raises DatabaseUnavailableError when none can be had in time or when it is lost on the way; whether a lost
        transaction was committed is then unknown. StatementFailedError, which is one too, says that it was not.
        """
        try:
            with (
                self._pool.connection(timeout=wait_seconds) as conn,
                self._watchdog.watch(conn, answer_seconds),
                _autocommit(conn) if autocommit else _transaction(conn),
            ):
                self._recovery.over()
                yield conn
        except (PoolTimeout, PoolClosed, TooManyRequests) as error:
            why = " ".join(reason_of(noted) for noted in self._connect_errors) or error
            raise DatabaseUnavailableError(f"the database does not answer ({why})") from error
        except psycopg.errors.UndefinedTable as error:
            raise DatabaseUnavailableError("the database is being prepared") from error
        except psycopg.errors.ReadOnlySqlTransaction as error:
            # A primary that was made a standby: another server takes the writes now.
            self._replace_connections()
            raise DatabaseUnavailableError(f"the database answers, but {READ_ONLY}") from error
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            why = f"the database failed: {first_line(error)}"
            if _is_of_the_statement(error):
                raise StatementFailedError(why) from error
            # After a restart of the server every idle connection is dead.
            self._replace_connections()
            raise DatabaseUnavailableError(why) from error

    def _replace_connections(self) -> None:
        """Replace them all at once, each when it is idle."""
        with suppress(PoolClosed):
            self._pool.drain()

    def why_away(self, otherwise: str) -> str:
        """Say why it does not answer: that it recovers, and since when, or else what the caller knows."""
        return self._recovery.in_words(self._connect_errors) or otherwise

    def pool_figures(self) -> dict[str, int]:
        """Return what psycopg's pool counts of itself."""
        return dict(self._pool.get_stats())

    def ping(self) -> None:
        """Raise DatabaseUnavailableError unless the database answers a query within a second or two."""
        with self.connection(wait_seconds=1, answer_seconds=1) as conn:
            conn.execute("SELECT 1")


def _is_of_the_statement(error: psycopg.Error) -> bool:
    """Return whether the server lives and would do other things: a limit or a time-out was met, or a lock not had.

    Classes 54 and 55 of PostgreSQL's errors, query_canceled and configuration_limit_exceeded. A lack of disk or memory
    (53), the system's own errors (58) and a lost connection concern all that follows.
    """
    state = error.sqlstate or ""
    return state[:2] in {"54", "55"} or state in {"57014", "53400"}


@contextmanager
def _transaction(conn: Connection) -> Iterator[None]:
    """End what the block did here, where the watchdog still looks, and not on the way back to the pool."""
    try:
        yield
        conn.commit()
    except BaseException:
        with suppress(psycopg.Error):
            conn.rollback()
        raise


@contextmanager
def _autocommit(conn: Connection) -> Iterator[None]:
    conn.autocommit = True
    try:
        yield
    finally:
        # A connection that was lost cannot be set to anything, and does not go back to the pool.
        with suppress(psycopg.Error):
            conn.autocommit = False


def _configure(conn: Connection) -> None:
    # Sealing looks again and again for what has been committed meanwhile: a database whose default is stricter would
    # show it the same picture each time. psycopg says so at each BEGIN, so a pooler in between is no trouble.
    conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    if conn.info.hostaddr:
        # What a pooler does with it: the connection it comes to is one between the two servers, and none the worse.
        conn.execute(_NOTICE_OUR_END)
        conn.commit()
    elif conn.pgconn.parameter_status(b"is_superuser") == b"on":
        # The embedded server: what fails here is told in our own log. In that one, which nothing bounds within a day,
        # each event that comes again would leave a line.
        conn.execute("SET log_min_messages = log")
        conn.commit()
    if not (conn.pgconn.parameter_status(b"DateStyle") or b"").startswith(b"ISO"):
        # psycopg reads no other. Poolers know this setting, and keep it for each of their clients.
        conn.execute("SET datestyle = 'ISO, MDY'")
        conn.commit()


def _configure_to_make_way(conn: Connection) -> None:
    _configure(conn)
    if is_postgres_of_this_machine(conn.info.dsn):
        # It writes: a commit of events waits for the same log.
        step_back_postgres(conn.info.backend_pid, holds_locks=True)


def is_postgres_of_this_machine(conninfo: str) -> bool:
    """Return whether a PostgreSQL of this machine listens there itself, at a socket of its own.

    A pooler shares the server's processes out, and one that has once stepped back would do so for everybody after us.
    PostgreSQL puts a lock file beside its socket, a pooler does not.
    """
    parameters = conninfo_to_dict(conninfo)
    directory, port = str(parameters.get("host", "")), parameters.get("port") or "5432"
    return directory.startswith("/") and os.access(f"{directory}/.s.PGSQL.{port}.lock", os.F_OK)


def fetch_value(conn: Connection, query: str, params: Any = None) -> Any:
    """Return the first column of the first row; None without a row."""
    row = conn.execute(query, params).fetchone()
    return row[0] if row else None


def first_line(error: Exception) -> str:
    """Return what an error says without its details, which may hold data."""
    return str(error).strip().partition("\n")[0]
