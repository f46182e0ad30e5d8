"""The whole database in one file, and back: PostgreSQL's own pg_dump and pg_restore, out of the wheel."""

import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import psycopg
from psycopg import sql

from appliance.disk import place, sync
from appliance.errors import BackupError
from appliance.store.database import Connection, fetch_value, first_line
from appliance.store.migrations import SCHEMA_VERSION, bring_up_to_date, take_turn
from appliance.store.moving import TABLES
from appliance.store.programs import binary

log = logging.getLogger(__name__)

_SHOWN_CHARS = 500
_LOOK_SECONDS = 0.2
_MUST_HAVE_TLS = frozenset({"require", "verify-ca", "verify-full"})
# What pg_restore writes.
_ROWS_FOLLOW = b" FROM stdin;\n"
_ROWS_END = b"\\.\n"
_OF_INSTALLATION = re.compile(rb"COPY \S+ \((.+)\) FROM stdin;")
_UNKNOWN_BEFORE_17 = b"SET transaction_timeout = 0;\n"
# Some servers stamp each column with an option of their own (PostgreSQL 15.20 does), which pg_dump repeats and no other
# server takes. The appliance sets no options of columns, so none is lost.
_COLUMN_OPTION = re.compile(rb"ALTER TABLE ONLY \S+ ALTER COLUMN \S+ SET \(.*\);\n")


def dump(conninfo: str, file: Path, *, tell: Callable[[int], None] = lambda _size: None) -> None:
    """Write a backup of the database as it is at this moment; nothing else waits for it.

    `tell` is told now and then how many bytes have been written. The file appears whole or not at all, readable by this
    user only. Raises BackupError.
    """
    if file.exists():
        raise BackupError(f"{file} is there already: choose another name")
    try:
        # A name of its own: two backups at once, or what a killed one has left running, must not share a file.
        descriptor, name = tempfile.mkstemp(prefix=f"{file.name}.", suffix=".unfinished", dir=file.parent)
        os.close(descriptor)
    except OSError as error:
        raise BackupError(f"{file} cannot be written: {error.strerror}") from error
    unfinished = Path(name)
    try:
        _dump(conninfo, unfinished, tell)
        sync(unfinished)
        if not place(unfinished, file):
            raise BackupError(f"{file} has come there meanwhile, and stays: choose another name")
        sync(file.parent)
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


def check_version(file: Path) -> None:
    """Raise BackupError when a file is no backup, or one of a newer version: before anything is made or changed."""
    if not os.access(file, os.R_OK):
        raise BackupError(f"{file} is not there, or cannot be read by this user")
    command = [str(binary("pg_restore")), "--data-only", "--table=installation", "--file=-", str(file)]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - PostgreSQL's own
    if done.returncode != 0:
        raise BackupError(f"{file} is no whole backup, take another file: {_failed('pg_restore', done.stderr)}")
    version = _version_in(done.stdout.splitlines())
    if version is None:
        raise BackupError(f"{file} is no backup of an appliance: it has no table installation with a row")
    if version > SCHEMA_VERSION:
        raise BackupError(
            f"{file} has schema {version}, this version of the appliance knows {SCHEMA_VERSION}: "
            "put it back with the newer version that made it"
        )


def _version_in(script: Iterable[bytes]) -> int | None:
    lines = iter(script)
    columns = next((found[1] for line in lines if (found := _OF_INSTALLATION.fullmatch(line))), b"")
    row = dict(zip(columns.split(b", "), next(lines, b"").split(b"\t"), strict=False))
    version = row.get(b"schema_version", b"")
    return int(version) if version.isdigit() else None


def load(conn: Connection, file: Path, *, tell: Callable[[int], None]) -> None:
    """Replace what is in the database by a backup, with its schema made current. Raises BackupError.

    All of it within the caller's transaction: what cannot be brought up to date is not kept. `tell` is told now and
    then how many bytes have been read.
    """
    take_turn(conn)
    _drop_tables(conn)
    _restore(conn, file, tell)
    # pg_restore names every schema itself, and leaves none to be searched.
    conn.execute("SET LOCAL search_path TO DEFAULT")
    try:
        bring_up_to_date(conn)
    except psycopg.Error as error:
        raise BackupError(f"{file} cannot be brought up to date: {first_line(error)}") from error


def _drop_tables(conn: Connection) -> None:
    """Make room: an older backup does not name what came later, and its steps would find it there."""
    conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.SQL(", ").join(map(sql.Identifier, TABLES))))
    conn.execute("DROP FUNCTION IF EXISTS count_new_events()")


def _restore(conn: Connection, file: Path, tell: Callable[[int], None]) -> None:
    """Put back what the file holds.

    pg_restore only reads it: it speaks no TLS, and tells an older server what only its own version knows.
    """
    command = [
        str(binary("pg_restore")),
        "--clean",
        "--if-exists",
        "--no-owner",
        "--no-privileges",
        "--file=-",
        str(file),
    ]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as restore,  # noqa: S603 - PostgreSQL's own
    ):
        assert restore.stdout is not None  # noqa: S101 - it is a pipe
        try:
            _replay(conn, _told(restore.stdout, tell))
        except psycopg.Error as error:
            raise BackupError(f"{file} cannot be restored: {first_line(error)}") from error
        if restore.wait() != 0:
            complaints.seek(0)
            raise BackupError(_failed("pg_restore", complaints.read()))


def _failed(program: str, complaints: bytes) -> str:
    return f"{program} failed: {complaints.decode(errors='replace').strip()[:_SHOWN_CHARS]}"


def _replay(conn: Connection, script: Iterable[bytes]) -> None:
    """Do what a script says that is meant for psql: statements, rows behind COPY, and commands of psql's own."""
    lines = iter(script)
    statements: list[bytes] = []
    for line in lines:
        if line.startswith(b"COPY ") and line.endswith(_ROWS_FOLLOW):
            conn.execute(b"".join(statements))
            statements.clear()
            _copy(conn, line, lines)
        elif not _is_left_out(line):
            statements.append(_for_now(line))
    conn.execute(b"".join(statements))


def _is_left_out(line: bytes) -> bool:
    """Return whether a line is psql's own, or what one version alone understands."""
    return line.startswith(b"\\") or line == _UNKNOWN_BEFORE_17 or _COLUMN_OPTION.fullmatch(line) is not None


def _told(lines: Iterable[bytes], tell: Callable[[int], None]) -> Iterator[bytes]:
    size = 0
    for line in lines:
        yield line
        size += len(line)
        tell(size)


def _for_now(line: bytes) -> bytes:
    """Let settings end with the transaction: they must not stay with a connection that others get."""
    if line.startswith(b"SELECT pg_catalog.set_config("):
        return line.replace(b", false)", b", true)")
    return line.replace(b"SET ", b"SET LOCAL ", 1) if line.startswith(b"SET ") else line


def _copy(conn: Connection, statement: bytes, lines: Iterator[bytes]) -> None:
    with conn.cursor().copy(statement) as copy:
        for line in lines:
            if line == _ROWS_END:
                return
            copy.write(line)
        raise BackupError("the backup is cut off: take another file")


def _dump(conninfo: str, file: Path, tell: Callable[[int], None]) -> None:
    parameters = psycopg.conninfo.conninfo_to_dict(conninfo)
    environment = {**os.environ, **_variables(parameters)}
    words = ("--no-password", "--format", "custom", "--no-owner", "--no-privileges", "--file", str(file))
    command = [_pg_dump_for(parameters), *words]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=complaints) as process,  # noqa: S603 - PostgreSQL's own
    ):
        try:
            while not _ended(process):
                tell(file.stat().st_size)
        except BaseException:
            # Whoever stops this must not have to wait until all is written.
            process.kill()
            raise
        if process.returncode != 0:
            complaints.seek(0)
            raise BackupError(_failed("pg_dump", complaints.read()))


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait for a moment; return whether the process has come to its end."""
    try:
        process.wait(_LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _pg_dump_for(parameters: Mapping[str, object]) -> str:
    if parameters.get("sslmode") not in _MUST_HAVE_TLS:
        return str(binary("pg_dump"))
    # The one out of the wheel speaks no TLS.
    found = shutil.which("pg_dump")
    if found is None:
        raise BackupError(
            "a backup through TLS needs a pg_dump on the PATH: install PostgreSQL's client programs, of the server's "
            "version or newer"
        )
    return found


def _variables(parameters: Mapping[str, object]) -> dict[str, str]:
    """Return the variables that tell libpq how to connect: unlike words of a command, no other user can read them."""
    names = {option.keyword.decode(): option.envvar for option in psycopg.pq.Conninfo.get_defaults()}
    return {
        variable.decode(): str(value)
        for keyword, value in parameters.items()
        if (variable := names.get(keyword)) is not None and value is not None
    }
