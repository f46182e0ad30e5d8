"""The whole database in one file, and back: PostgreSQL's own pg_dump and pg_restore, out of the wheel."""

import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psycopg

from appliance.errors import BackupError
from appliance.store.database import Connection, fetch_value
from appliance.store.programs import binary

log = logging.getLogger(__name__)

_SHOWN_CHARS = 500


def dump(conninfo: str, file: Path) -> None:
    """Write a backup of the database as it is at this moment; nothing else waits for it.

    The file appears whole or not at all, readable by this user only. Raises BackupError.
    """
    if file.exists():
        raise BackupError(f"{file} is there already: choose another name")
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        unfinished.touch(mode=0o600)
        _run("pg_dump", conninfo, "--format", "custom", "--no-owner", "--no-privileges", "--file", str(unfinished))
        _sync(unfinished)
        # A link does not replace what has come there meanwhile.
        os.link(unfinished, file)
        _sync(file.parent)
    except OSError as error:
        raise BackupError(f"{file} cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_empty(conn: Connection) -> None:
    """Raise BackupError when there is anything in the database that a backup would replace."""
    for table in ("events_log", "export_batches"):
        # The names are our own.
        if fetch_value(conn, f"SELECT true FROM {table} LIMIT 1"):  # noqa: S608
            raise BackupError(
                f"the database is not empty ({table} has rows), and a backup would replace it: give the appliance "
                "another server.data_dir or database.url"
            )


def load(conninfo: str, file: Path) -> None:
    """Replace what is in the database by a backup: all of it, or nothing where that fails. Raises BackupError."""
    if not os.access(file, os.R_OK):
        raise BackupError(f"{file} is not there, or cannot be read by this user")
    options = ("--clean", "--if-exists", "--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error")
    # pg_restore takes only the name of a database from its environment by an option.
    name = psycopg.conninfo.conninfo_to_dict(conninfo).get("dbname", "")
    _run("pg_restore", conninfo, *options, "--dbname", str(name), str(file))


def _run(program: str, conninfo: str, *words: str) -> None:
    parameters = psycopg.conninfo.conninfo_to_dict(conninfo)
    environment = {**os.environ, **_variables(parameters)}
    command = [str(binary(program)), "--no-password", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603 - PostgreSQL's own
    if done.returncode != 0:
        raise BackupError(f"{program} failed: {done.stderr.strip()[:_SHOWN_CHARS]}")


def _variables(parameters: Mapping[str, object]) -> dict[str, str]:
    """Return the variables that tell libpq how to connect: unlike words of a command, no other user can read them."""
    names = {option.keyword.decode(): option.envvar for option in psycopg.pq.Conninfo.get_defaults()}
    return {
        variable.decode(): str(value)
        for keyword, value in parameters.items()
        if (variable := names.get(keyword)) is not None and value is not None
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
