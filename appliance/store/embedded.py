"""The bundled PostgreSQL: its binaries, its directory, its start and its end.

It listens on a Unix socket only, in a directory of mode 0700, and lets in nobody but the user who runs the appliance
(peer authentication).
"""

import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import psycopg

from appliance.disk import sync
from appliance.errors import StartError
from appliance.log import Seldom
from appliance.store.leftovers import clear_stale_locks
from appliance.store.programs import (
    DATABASE,
    MAJOR_VERSION,
    ROLE,
    binary,
    command_prefix,
    initdb,
    make_private,
    postmaster_of,
    run_program,
    was_shut_down,
    write_admission,
)
from appliance.store.recovering import refuses_for_now
from appliance.store.sizing import Machine, settings_for
from appliance.store.upgrading import Upgrade, version_of

log = logging.getLogger(__name__)

# A socket's address has room for 107 bytes (unix(7)); the rest of it is "/.s.PGSQL.5432".
_SOCKET = ".s.PGSQL.5432"
_MAX_SOCKET_DIR_CHARS = 107 - len(f"/{_SOCKET}")
_SAY_EVERY_SECONDS = 10.0
# Mostly it takes a moment: nobody needs to hear of that.
_SILENT_SECONDS = 3.0

_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "50",
    "max_prepared_transactions": "0",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    # Statements here are short, or read what they find once: to compile them never pays.
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Who waits for a lock does not notice that we have given up: each try would leave a connection behind.
    "client_connection_check_interval": "2s",
    # Bounded logs in the data directory: one file a weekday, written over after a week.
    "logging_collector": "on",
    "log_directory": "log",
    "log_filename": "postgresql-%a.log",
    "log_rotation_age": "1d",
    "log_rotation_size": "0",
    "log_truncate_on_rotation": "on",
    # Statements and rows hold visitors' data and have no business in a log.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
}


class EmbeddedPostgres:
    """The PostgreSQL of one data directory. Nothing happens before `acquire` and `start`.

    `overrides` are PostgreSQL settings that replace the appliance's own.
    """

    def __init__(self, data_dir: Path, *, overrides: Mapping[str, str] | None = None) -> None:
        # Absolute, because PostgreSQL runs in a directory of its own.
        self._data_dir = data_dir.resolve()
        self.cluster = self._data_dir / "postgres"
        self.socket_dir = _socket_dir(self._data_dir)
        self.lock_path = self._data_dir / "postgres.lock"
        self.upgrade = Upgrade(self._data_dir)
        self._overrides = overrides or {}
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def conninfo(self) -> str:
        """How the appliance connects to it."""
        return psycopg.conninfo.make_conninfo(host=str(self.socket_dir), user=ROLE, dbname=DATABASE)

    @property
    def exists(self) -> bool:
        """Whether there is a database in the data directory; `start` makes one where there is none."""
        # An upgrade that was killed may lack its last step, which puts the new one in place.
        return version_of(self.cluster) is not None or self.upgrade.needed

    # -- ownership ----------------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Take the right to start and stop this server; False while another process has it.

        The lock ends with its holder, also when that is killed.
        """
        lock = lock_file(self._data_dir, self.lock_path.name)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock
        return True

    def release(self) -> None:
        """Give the right back; a forked child gives up its copy of the lock, which would outlive the parent's."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> int:
        """Start the server, or adopt the one that a killed appliance left behind; return its process id.

        It may still be recovering when this returns: connections are refused until it is ready.
        """
        running = self.running_pid()
        if running is not None:
            log.info("found PostgreSQL running (process %s), left by an appliance that was killed", running)
            self._process = None
            return running
        self._prepare()
        command = [*command_prefix(), str(binary("postgres")), "-D", str(self.cluster), *self._options()]
        with self._start_log.open("wb") as start_log:
            # A session of its own: Ctrl-C in the terminal must not stop it before the appliance has stopped writing.
            self._process = subprocess.Popen(command, cwd="/", stderr=start_log, start_new_session=True)  # noqa: S603
        return self._process.pid

    @property
    def adopted(self) -> bool:
        """Whether the server that was started last is another process's child."""
        return self._process is None

    def running_pid(self) -> int | None:
        """Return the process id of the server that runs on this directory, whoever started it."""
        return postmaster_of(self.cluster)

    def stop(self, pid: int) -> None:
        """Ask the server to end now: it drops its clients and writes a checkpoint (fast shutdown).

        Smart shutdown (SIGTERM) would wait for clients for ever.
        """
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)

    def wait_stopped(self, timeout_seconds: float = 60) -> bool:
        """Wait until no server runs on this directory any more; return whether that is so."""
        deadline = time.monotonic() + timeout_seconds
        while self._runs() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self._runs()

    def _runs(self) -> bool:
        # A child is asked for itself: it removes its pid file a moment before it ends.
        if self._process is not None:
            return self._process.poll() is None
        return self.running_pid() is not None

    def wait_ready(self, timeout_seconds: float = 60) -> None:
        """Wait until it takes connections: as long as it recovers or is upgraded, and for so long otherwise.

        Raises StartError when it does not in time.
        """
        deadline = time.monotonic() + timeout_seconds
        silent_until = time.monotonic() + _SILENT_SECONDS
        seldom = Seldom(seconds=_SAY_EVERY_SECONDS)
        while (error := self._refusal()) is not None:
            if self._is_busy(error):
                deadline = time.monotonic() + timeout_seconds
                if time.monotonic() > silent_until and seldom.due():
                    log.info("PostgreSQL %s, waiting for it", self._busy_with())
            died = self._process is not None and self._process.poll() is not None
            if died or time.monotonic() > deadline:
                raise StartError(f"the embedded PostgreSQL does not start; {self.where_it_says_why()}") from error
            time.sleep(0.05)

    def _refusal(self) -> psycopg.OperationalError | None:
        try:
            psycopg.connect(self.conninfo, connect_timeout=5).close()
        except psycopg.OperationalError as error:
            return error
        return None

    def _is_busy(self, refusal: psycopg.OperationalError) -> bool:
        """Return whether something takes its time; else it should be ready by now."""
        return self.upgrade.under_way or refuses_for_now(refusal)

    def _busy_with(self) -> str:
        """Say what takes its time."""
        if self.upgrade.under_way:
            return "is being upgraded"
        return "is starting" if was_shut_down(self.cluster) else "is recovering"

    def where_it_says_why(self) -> str:
        """Tell where to read why it ended: its first words if there are any, else its log."""
        lines = self._start_log.read_text(errors="replace").strip().splitlines() if self._start_log.exists() else []
        fatal = [line for line in lines if "FATAL" in line]
        return fatal[-1] if fatal else f"see {self.cluster / 'log'}"

    # -- directory ----------------------------------------------------------------------------------------------------

    @property
    def _start_log(self) -> Path:
        return self._data_dir / "postgres-start.log"

    def _options(self) -> list[str]:
        """Settings go on the command line: a new version's apply to an old cluster too."""
        settings = {
            **_SETTINGS,
            **settings_for(Machine.of(self._data_dir)),
            **self._overrides,
            "unix_socket_directories": str(self.socket_dir),
            **write_admission(self.cluster),
        }
        return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

    def _prepare(self) -> None:
        self._check_owner()
        make_private(self.socket_dir)
        if version_of(self.cluster) is None:
            self._create()
        self._check_version()
        (self.socket_dir / f"{_SOCKET}.lock").unlink(missing_ok=True)
        clear_stale_locks(self.cluster)

    def _check_owner(self) -> None:
        for path in (self._data_dir, self.cluster):
            _check_owner(path)
        if not os.access(self._data_dir, os.W_OK):
            raise StartError(f"{self._data_dir} cannot be written: change its owner, or server.data_dir")

    def _create(self) -> None:
        """Make the cluster under another name and move it into place: a crash halfway leaves nothing half-made."""
        fresh = self._data_dir / "postgres.new"
        shutil.rmtree(fresh, ignore_errors=True)
        initdb(fresh)
        single = [str(binary("postgres")), "--single", "-D", str(fresh), "postgres"]
        run_program(single, stdin=f"CREATE DATABASE {DATABASE};\n")
        fresh.rename(self.cluster)
        # Lost in a power cut, the name would be missing, and the next start would begin anew.
        sync(self._data_dir)

    def _check_version(self) -> None:
        version = version_of(self.cluster)
        if version != MAJOR_VERSION:
            raise StartError(
                f"{self.cluster} was made by PostgreSQL {version}, and this appliance brings {MAJOR_VERSION}: "
                "run the version of the appliance that made it"
            )


def lock_file(data_dir: Path, name: str) -> IO[str]:
    """Open a lock file of the data directory, which is made where it is missing: nobody else may look into it.

    Raises StartError where that cannot be.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return (data_dir / name).open("w")
    except (FileExistsError, NotADirectoryError) as error:
        raise StartError(
            f"the data directory {data_dir} is a file, or lies below one: set server.data_dir to a directory"
        ) from error
    except OSError as error:
        _check_owner(data_dir)
        raise StartError(
            f"the data directory {data_dir} cannot be used ({error.strerror}): "
            "make it writable for this user, or set server.data_dir"
        ) from error


def _check_owner(path: Path) -> None:
    """Raise StartError where something is somebody else's."""
    owner = path.stat().st_uid if path.exists() else os.geteuid()
    if owner not in {os.geteuid(), 0}:
        raise StartError(f"{path} belongs to user id {owner}: run the appliance as that user")


def _socket_dir(data_dir: Path) -> Path:
    """The socket lies beside the data, or in the temporary directory where that path is too long for a socket."""
    beside = data_dir / "run"
    if len(os.fsencode(beside)) <= _MAX_SOCKET_DIR_CHARS:
        return beside
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"appliance-{os.geteuid()}-{digest}"
