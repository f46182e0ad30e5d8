"""Ends connections to a database that has frozen: stopped, or behind a network that swallows everything.

Such a server closes nothing and answers nothing, and the client's library would wait for ever. No time-out of the
server helps, since it is the server that is frozen.
"""

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1


class Watchdog:
    """Cuts the socket of each watched connection whose time is over; who waits for it gets an OperationalError."""

    def __init__(self) -> None:
        self._deadlines: dict[psycopg.Connection, float] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    @contextmanager
    def watch(self, conn: psycopg.Connection, seconds: float | None) -> Iterator[None]:
        """Let the block use the connection for that long; for ever where that is None."""
        if seconds is None:
            yield
            return
        with self._lock:
            self._deadlines[conn] = time.monotonic() + seconds
        try:
            yield
        finally:
            # Under the lock, so that nobody cuts a connection that has gone back to the pool.
            with self._lock:
                self._deadlines.pop(conn, None)

    def _look(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            with self._lock:
                now = time.monotonic()
                overdue = [conn for conn, deadline in self._deadlines.items() if deadline < now]
                for conn in overdue:
                    if _cut(conn):
                        del self._deadlines[conn]


def _cut(conn: psycopg.Connection) -> bool:
    """Cut its socket; return False where that has to be tried again."""
    try:
        # The descriptor is our own: the library closes its own when it notices.
        descriptor = os.dup(conn.fileno())
    except psycopg.OperationalError:
        # It was closed in this moment.
        return True
    except OSError as error:
        # Out of descriptors: there may be one a moment later.
        return error.errno == errno.EBADF
    log.warning("the database does not answer, giving up a connection to it")
    with suppress(OSError), socket.socket(fileno=descriptor) as own:
        own.shutdown(socket.SHUT_RDWR)
    return True
