"""Which database it is: the configured one, or the embedded one of the data directory."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from appliance.config import Settings
from appliance.errors import ConfigError
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.migrations import migrate


def conninfo_of(settings: Settings) -> str:
    """Return how to connect to the database. Raises ConfigError where database.url is none."""
    url = settings.database.url.get_secret_value()
    if not url:
        return EmbeddedPostgres(settings.server.data_dir).conninfo
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        raise ConfigError(["database.url: write it as postgresql://user:password@host/name"]) from error
    return url


@contextmanager
def attached(settings: Settings, *, alone: bool = False) -> Iterator[Database]:
    """Lend a command the database, with its schema current.

    The embedded one is started for the command and stopped after it, unless an appliance runs it already.

    An older schema is brought up to date only where no appliance of that version can be running on it, which would
    refuse it at its next start: where the database was started here, and where the caller is `alone` with it. Raises
    SchemaError elsewhere.
    """
    with _running(settings) as started, Database(conninfo_of(settings)) as db:
        with db.connection() as conn:
            migrate(conn, alone=alone or started)
        yield db


@contextmanager
def _running(settings: Settings) -> Iterator[bool]:
    """Keep it running meanwhile; yields whether it was started for that."""
    if settings.database.url.get_secret_value():
        yield False
        return
    postgres = EmbeddedPostgres(settings.server.data_dir)
    if not postgres.acquire():
        postgres.wait_ready()
        yield False
        return
    try:
        if postgres.upgrade.needed:
            postgres.upgrade.run()
        pid = postgres.start()
        try:
            postgres.wait_ready()
            yield True
        finally:
            postgres.stop(pid)
            postgres.wait_stopped()
    finally:
        postgres.release()
