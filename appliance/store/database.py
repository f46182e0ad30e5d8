"""The connection pool, and what a lost database looks like to the rest of the house."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeAlias

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from appliance.errors import DatabaseUnavailableError
from appliance.priority import step_back_postgres
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


class Database:
    """A pool of connections that commit on leaving `connection()` and roll back on an error."""

    def __init__(self, conninfo: str, *, makes_way: bool = False) -> None:
        """With `makes_way` the server's processes behind it, too, work only when nothing else wants to."""
        self.conninfo = conninfo
        self._watchdog = Watchdog()
        self._recovery = Recovery(conninfo)
        self._pool = ConnectionPool(
            conninfo,
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
        transaction was committed is then unknown.
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
            raise DatabaseUnavailableError(f"the database does not answer ({error})") from error
        except psycopg.errors.UndefinedTable as error:
            raise DatabaseUnavailableError("the database is being prepared") from error
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            # After a restart of the server every idle connection is dead: replace them all at once.
            with suppress(PoolClosed):
                self._pool.drain()
            raise DatabaseUnavailableError(f"the database failed: {first_line(error)}") from error

    def why_away(self, otherwise: str) -> str:
        """Say why it does not answer: that it recovers, and since when, or else what the caller knows.

        For those who wait for it anyway: a frozen server takes two seconds to find out.
        """
        return self._recovery.in_words() or otherwise

    def pool_figures(self) -> dict[str, int]:
        """Return what psycopg's pool counts of itself."""
        return dict(self._pool.get_stats())

    def ping(self) -> None:
        """Raise DatabaseUnavailableError unless the database answers a query within a second or two."""
        with self.connection(wait_seconds=1, answer_seconds=1) as conn:
            conn.execute("SELECT 1")


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


def _configure_to_make_way(conn: Connection) -> None:
    _configure(conn)
    if conn.info.host.startswith("/"):
        step_back_postgres(conn.info.backend_pid)


def fetch_value(conn: Connection, query: str, params: Any = None) -> Any:
    """Return the first column of the first row; None without a row."""
    row = conn.execute(query, params).fetchone()
    return row[0] if row else None


def first_line(error: Exception) -> str:
    """Return what an error says without its details, which may hold data."""
    return str(error).strip().partition("\n")[0]
