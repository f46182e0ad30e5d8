"""The servers under test, each started by `python -m bench.servers` as `appliance serve` starts its own.

They differ in one thing only: what stands behind POST /collect.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from flask import Flask, Response, jsonify, request
from psycopg_pool import ConnectionPool

from appliance import log
from appliance.collect.inbox import Done, Inbox, Stored
from appliance.config import Settings
from appliance.runtime import Runtime, create_app
from appliance.server import THREADS, _Gunicorn
from appliance.store.events import EXPORTED_COLUMNS, Event
from appliance.store.programs import die_with_parent

EXPORT_JOB = "bench"
TOKEN = "of-a-throw-away-server"  # noqa: S105 - it listens on loopback and is gone after the measure


class Kind(StrEnum):
    """What stands behind POST /collect."""

    DURABLE = "durable"
    """The appliance as it is."""
    NO_OP = "no-op"
    """A Flask app that reads the body and answers."""
    CHECKS = "checks"
    """The appliance, storing nothing."""
    INSERT = "insert"
    """The appliance, storing with one INSERT and commit a request."""

    @property
    def stores(self) -> bool:
        """Whether an event that was answered is in the table."""
        return self in {Kind.DURABLE, Kind.INSERT}


def settings_of_bench(directory: Path, conninfo: str) -> Settings:
    """Return the configuration of every server under test.

    One site with an origin, so that all checks of a request are made. Whatever would refuse the load for being one is
    switched off here. The export runs when it is asked to.
    """
    bucket = directory / "bucket"
    bucket.mkdir(parents=True, exist_ok=True)
    return Settings.model_validate(
        {
            "server": {"data_dir": str(directory)},
            "database": {"url": conninfo},
            "admin": {"token": TOKEN},
            "collect": {"requests_per_minute_per_address": 0, "requests_per_minute_per_site": 0},
            "sites": [{"id": "shop", "origins": ["https://shop.example.com"]}],
            "buckets": {"bench": {"kind": "directory", "path": str(bucket)}},
            "exports": {EXPORT_JOB: {"client": "bench", "schedule": "0 0 29 2 *"}},
        }
    )


# -- what stands behind POST /collect ---------------------------------------------------------------------------------


class _StandIn(Inbox):
    """Answers in the inbox's place, in the request's own thread."""

    def __init__(self) -> None:
        self._open = False

    def start(self) -> None:
        self._open = True

    def use_database(self) -> None:
        """Nothing is kept back until the database is there."""

    def close(self) -> None:
        self._open = False

    def submit(self, events: Sequence[Event], done: Done) -> None:
        done(self.store(events))

    @property
    def alive(self) -> bool:
        return self._open

    @property
    def database_away(self) -> bool:
        return False


class _NothingStored(_StandIn):
    """Says at once that everything was new."""

    def store(self, events: Sequence[Event]) -> Stored:
        return Stored(frozenset(range(len(events))), {})


class _InsertEach(_StandIn):
    """One INSERT and one commit a request, with as many connections as there are threads."""

    def __init__(self, conninfo: str) -> None:
        super().__init__()
        columns = EXPORTED_COLUMNS[1:]
        values = ", ".join(["%s"] * len(columns))
        self._insert = f"INSERT INTO events_log ({', '.join(columns)}) VALUES ({values})"  # noqa: S608 - our own names
        self._pool = ConnectionPool(conninfo, open=False, min_size=THREADS, max_size=THREADS)

    def start(self) -> None:
        super().start()
        self._pool.open()

    def close(self) -> None:
        super().close()
        self._pool.close()

    def store(self, events: Sequence[Event]) -> Stored:
        with self._pool.connection() as conn:
            for event in events:
                conn.execute(self._insert, event.as_row())
        return Stored(frozenset(range(len(events))), {})


class _Idle:
    """A runtime with nothing in it, for the app that does nothing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = threading.Event()

    def note_unread(self, reason: str) -> None:
        """Note nothing."""

    def start(self) -> None:
        """Start nothing."""

    def stop(self) -> None:
        """Stop nothing."""


def _no_op(settings: Settings) -> Flask:
    app = Flask("no_op", static_folder=None, template_folder=None)
    app.extensions["appliance"] = _Idle(settings)

    @app.post("/collect")
    def collect() -> Response:
        request.get_data()
        return jsonify(accepted=1, duplicates=0, rejected=[])

    return app


def _with(inbox_of: Callable[[Settings], Inbox]) -> Callable[[Settings], Flask]:
    """Return how to make the whole appliance with another inbox."""

    def app_of(settings: Settings) -> Flask:
        runtime = Runtime(settings)
        runtime.inbox = inbox_of(settings)
        return create_app(runtime)

    return app_of


def _durable(settings: Settings) -> Flask:
    """Return the appliance as it is, and a way to run its export as its scheduler does."""
    runtime = Runtime(settings)
    app = create_app(runtime)

    @app.post("/bench/export")
    def export() -> Response:
        started = time.monotonic()
        report = runtime.run_export(EXPORT_JOB)
        seconds = time.monotonic() - started
        return jsonify(rows=report.row_count, seconds=seconds, failed=report.failed, summary=report.summary)

    return app


_APPS: dict[Kind, Callable[[Settings], Flask]] = {
    Kind.DURABLE: _durable,
    Kind.NO_OP: _no_op,
    Kind.CHECKS: _with(lambda _settings: _NothingStored()),
    Kind.INSERT: _with(lambda settings: _InsertEach(settings.database.url.get_secret_value())),
}


# -- the process ------------------------------------------------------------------------------------------------------


class _BenchGunicorn(_Gunicorn):
    """gunicorn with the appliance's own options, and another app where that is asked for."""

    def __init__(self, settings: Settings, listener: int, kind: Kind) -> None:
        self._kind = kind
        super().__init__(settings, listener)

    def load(self) -> Any:
        return _APPS[self._kind](self._settings)


def main() -> None:
    """Serve on an inherited socket: KIND, the socket's number, a directory, the database."""
    kind, listener, directory, conninfo = sys.argv[1:]
    die_with_parent()
    log.configure()
    logging.getLogger().setLevel(logging.WARNING)
    settings = settings_of_bench(Path(directory), conninfo)
    _BenchGunicorn(settings, int(listener), Kind(kind)).run()


if __name__ == "__main__":
    main()
