"""Which database it is: the configured one, or the embedded one of the data directory."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from appliance.config import Settings
from appliance.errors import ConfigError
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.migrations import migrate

# A server whose machine has lost its power or its network says nothing more. By the kernel's own limits an export would
# wait two hours for it (tcp(7)), while a standby has long taken over. What the URL says of these counts.
_GIVING_UP = {
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}


def conninfo_of(settings: Settings) -> str:
    """Return how to connect to the database. Raises ConfigError where database.url is none."""
    url = settings.database.url.get_secret_value()
    if not url:
        return EmbeddedPostgres(settings.server.data_dir).conninfo
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    except psycopg.ProgrammingError as error:
        raise ConfigError(["database.url: write it as postgresql://user:password@host/name"]) from error
    return make_conninfo(**{**_GIVING_UP, **given})


@contextmanager
def attached(settings: Settings) -> Iterator[Database]:
    """Lend a command the database, with its schema current.

    The embedded one is started for the command and stopped after it, unless an appliance runs it already.
    """
    with _running(settings), Database(conninfo_of(settings)) as db:
        with db.connection() as conn:
            migrate(conn)
        yield db


@contextmanager
def _running(settings: Settings) -> Iterator[None]:
    if settings.database.url.get_secret_value():
        yield
        return
    postgres = EmbeddedPostgres(settings.server.data_dir)
    if not postgres.acquire():
        postgres.wait_ready()
        yield
        return
    try:
        if postgres.upgrade.needed:
            postgres.upgrade.run()
        pid = postgres.start()
        try:
            postgres.wait_ready()
            yield
        finally:
            postgres.stop(pid)
            postgres.wait_stopped()
    finally:
        postgres.release()
