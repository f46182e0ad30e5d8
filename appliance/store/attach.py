"""Which database it is: the configured one, or the embedded one of the data directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from appliance.config import Settings
from appliance.errors import ConfigError, StartError
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.migrations import current_version, migrate

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
def attached(settings: Settings, *, creates: bool = False, alone: bool = False) -> Iterator[Database]:
    """Lend a command the database, with its schema current.

    The embedded one is started for the command and stopped after it, unless an appliance runs it already. Without
    `creates` there must be one: a command that only reads must not find nothing in a database of its own making, and
    call that a success. Raises StartError.

    An older schema is brought up to date only where no appliance of that version can be running on it, which would
    refuse it at its next start: where the database was started here, and where the caller is `alone` with it. Raises
    SchemaError elsewhere.
    """
    with _running(settings, creates=creates) as started, Database(conninfo_of(settings)) as db:
        with db.connection() as conn:
            # One that has just been started for the first time may not have its tables yet; in the data directory that
            # is nobody else's.
            if _is_external(settings) and not creates and current_version(conn) is None:
                raise StartError(
                    "the database of database.url holds no appliance's tables: start the appliance first, or correct "
                    "database.url"
                )
            migrate(conn, alone=alone or started)
        yield db


def require_database(settings: Settings) -> None:
    """Raise StartError where the data directory should hold the database and does not; nothing is made there."""
    if not (_is_external(settings) or _may_have_database(settings.server.data_dir)):
        raise _no_database(settings.server.data_dir)


def _is_external(settings: Settings) -> bool:
    return bool(settings.database.url.get_secret_value())


@contextmanager
def _running(settings: Settings, *, creates: bool) -> Iterator[bool]:
    """Keep it running meanwhile; yields whether it was started for that."""
    if _is_external(settings):
        yield False
        return
    if not creates:
        require_database(settings)
    postgres = EmbeddedPostgres(settings.server.data_dir)
    if not postgres.acquire():
        # Whoever has it may be making it just now.
        postgres.wait_ready()
        yield False
        return
    try:
        if not creates and not postgres.exists:
            raise _no_database(settings.server.data_dir)
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


def _may_have_database(data_dir: Path) -> bool:
    """Return whether there is one, or somebody may be making it; a directory that cannot be read is told of later."""
    postgres = EmbeddedPostgres(data_dir)
    try:
        return postgres.exists or postgres.lock_path.exists()
    except OSError:
        return True


def _no_database(data_dir: Path) -> StartError:
    return StartError(f"there is no database in {data_dir}: start the appliance first, or correct server.data_dir")
