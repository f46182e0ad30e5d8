"""A cluster of an older major version is brought to this one by pg_upgrade, on a copy.

Everything happens under another name, and the last steps are renames: whenever it is killed, the next start begins
anew or takes the last step. What was there before is kept as `postgres.<version>`.
"""

import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from appliance.disk import sync
from appliance.errors import StartError
from appliance.log import Seldom
from appliance.store.leftovers import clear_stale_locks
from appliance.store.programs import (
    MAJOR_VERSION,
    ROLE,
    binaries_of,
    binary,
    command_prefix,
    die_with_parent,
    initdb,
    make_private,
    postmaster_of,
    run_program,
    write_admission,
)

log = logging.getLogger(__name__)

_MB = 1 << 20
# What a new cluster takes beside the copy, with the log of its own making.
_MARGIN_BYTES = 256 * _MB
# Copied is what holds data: the new cluster has a log of its own.
_NOT_COPIED = {"pg_wal", "log"}
_SAY_EVERY_SECONDS = 30.0
_LOOK_SECONDS = 0.1


class Upgrade:
    """The upgrade of one data directory. Whoever runs it has the right to start and stop its PostgreSQL."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._old = data_dir / "postgres"
        self._work = data_dir / "postgres.upgrade"
        self._done = data_dir / "postgres.upgraded"
        self._failed = data_dir / "postgres-upgrade.failed"
        self._lock: IO[bytes] | None = None

    @property
    def needed(self) -> bool:
        """Whether the cluster is older than this appliance's PostgreSQL, or its upgrade lacks the last step."""
        version = version_of(self._old)
        if version is None:
            return self._done.exists()
        return version.isdigit() and int(version) < int(MAJOR_VERSION)

    @property
    def under_way(self) -> bool:
        """Whether one has begun and has not come to its end."""
        return self._work.exists()

    @property
    def has_failed(self) -> bool:
        """Whether the last one did not succeed, and none has since."""
        return self.needed and self._failed.exists()

    def check(self) -> None:
        """Raise StartError where it cannot succeed: a person who looks can do something about it."""
        version = version_of(self._old)
        if version is None:
            return
        if binaries_of(version) is None:
            raise StartError(
                f"{self._old} was made by PostgreSQL {version}, whose programs are not here, and this appliance brings "
                f"{MAJOR_VERSION}: take a backup with the version of the appliance that made it (appliance backup) and "
                "fill an empty data directory with this one (appliance restore-backup)"
            )
        kept = self._kept_as(version)
        if kept.exists():
            raise StartError(f"{kept} is there already, and the upgrade of {self._old} needs that name: move it away")
        self._check_room()

    def _check_room(self) -> None:
        needed = _size_of(self._old) + _MARGIN_BYTES
        # What an upgrade that was killed has left is deleted first.
        free = shutil.disk_usage(self._data_dir).free + _size_of(self._work)
        if free < needed:
            raise StartError(
                f"the upgrade of {self._old} copies it and needs {needed // _MB} MB on its disk, where "
                f"{free // _MB} MB are free: make room and start again"
            )

    def run(self) -> None:
        """Do it. Raises StartError; the old cluster is then as it was."""
        self.check()
        self._wait_for_leftovers()
        try:
            version = version_of(self._old)
            if version is not None:
                self._make_copy_or_clear_up(version)
                self._work.rename(self._done)
                sync(self._data_dir)
                self._old.rename(self._kept_as(version))
                sync(self._data_dir)
            self._done.rename(self._old)
            sync(self._data_dir)
        finally:
            self._let_go()
        shutil.rmtree(self._failed, ignore_errors=True)
        kept = ", ".join(str(path) for path in sorted(self._data_dir.glob("postgres.[0-9]*")))
        log.info("PostgreSQL is upgraded to %s; the former one is kept as %s and may be deleted", MAJOR_VERSION, kept)

    def _kept_as(self, version: str) -> Path:
        return self._data_dir / f"postgres.{version}"

    # -- the work -----------------------------------------------------------------------------------------------------

    def _make_copy_or_clear_up(self, version: str) -> None:
        try:
            self._make_copy(version)
        except (StartError, OSError):
            # A server that pg_upgrade has left would write on.
            _wait_until(lambda: not self.end_servers(), "a failed upgrade is being ended")
            self._keep_what_it_says()
            raise

    def _keep_what_it_says(self) -> None:
        """Free the room that a failed copy takes, which the spool may need; what pg_upgrade says of it is kept."""
        said = self._work / "pg_upgrade_output.d"
        shutil.rmtree(self._failed, ignore_errors=True)
        if said.exists():
            said.rename(self._failed)
        else:
            self._failed.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(self._work, ignore_errors=True)

    def _make_copy(self, version: str) -> None:
        programs = binaries_of(version)
        assert programs is not None  # noqa: S101 - check() has looked
        for rest in (self._work, self._done):
            # An old cluster that stands in its place may have been used since that copy was made.
            shutil.rmtree(rest, ignore_errors=True)
        log.info(
            "upgrading PostgreSQL from %s to %s on a copy (%d MB); events go to the spool meanwhile",
            version,
            MAJOR_VERSION,
            _size_of(self._old) // _MB,
        )
        shutil.rmtree(self._private, ignore_errors=True)
        make_private(self._private)
        self._shut_down_cleanly(programs)
        checksums = "Data page checksum version: 0" not in self._control(programs)
        initdb(self._work, "--data-checksums" if checksums else "--no-data-checksums")
        self._run_pg_upgrade(programs)
        if not checksums:
            self._run_long("the making of checksums", [str(binary("pg_checksums")), "--enable", "-D", str(self._work)])
        shutil.rmtree(self._private, ignore_errors=True)

    def _control(self, programs: Path) -> str:
        """Return what the old cluster's control file says, with single spaces."""
        return " ".join(run_program([str(programs / "pg_controldata"), "-D", str(self._old)]).split())

    def _shut_down_cleanly(self, programs: Path) -> None:
        """Let the old PostgreSQL recover if it was killed: pg_upgrade takes only what was shut down."""
        shut_down = "Database cluster state: shut down pg_control" in self._control(programs)
        if shut_down and not (self._old / "postmaster.pid").exists():
            return
        log.info("PostgreSQL was killed before its upgrade and recovers first")
        clear_stale_locks(self._old)
        # Nobody finds it there: it must take no events.
        settings = {**write_admission(self._private), "unix_socket_directories": str(self._private)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(programs / "postgres"), "-D", str(self._old), "-c", "listen_addresses=", *options]
        server = self._start(command)
        _wait_until(lambda: server.poll() is not None or is_ready(self._old, server.pid), "PostgreSQL is recovering")
        server.send_signal(signal.SIGINT)
        if server.wait() != 0:
            raise StartError(f"the PostgreSQL of {self._old} does not recover; {self._says}")

    def _run_pg_upgrade(self, programs: Path) -> None:
        # The clusters' own files let nobody in.
        admission = write_admission(self._private)
        options = " ".join(f"-c {name}={shlex.quote(value)}" for name, value in admission.items())
        command = [str(binary("pg_upgrade")), "--username", ROLE, "--copy", "--socketdir", str(self._private)]
        command += ["--old-bindir", str(programs), "--new-bindir", str(binary("pg_upgrade").parent)]
        command += ["--old-datadir", str(self._old), "--new-datadir", str(self._work)]
        command += ["--old-options", options, "--new-options", options]
        self._run_long("the upgrade of PostgreSQL", command)

    def _run_long(self, what: str, command: list[str]) -> None:
        process = self._start(command)
        _wait_until(lambda: process.poll() is not None, f"{what} is under way")
        if process.returncode != 0:
            raise StartError(
                f"{what} failed, and {self._old} is as it was; what it wrote is in {self._failed}; {self._says}"
            )

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        assert self._lock is not None  # noqa: S101 - run() has taken it
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        with self._log_file.open("ab") as output:
            return subprocess.Popen(  # noqa: S603
                [*command_prefix(), *command],
                cwd=self._private,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[self._lock.fileno()],
                preexec_fn=die_with_parent,  # noqa: PLW1509 - no other thread runs in a process that upgrades
            )

    @property
    def _log_file(self) -> Path:
        return self._data_dir / "postgres-upgrade.log"

    @property
    def _says(self) -> str:
        lines = self._log_file.read_text(errors="replace").strip().splitlines()
        return f"see {self._log_file}, which ends with: {' '.join(lines[-3:])}"

    @property
    def _private(self) -> Path:
        """A directory for sockets that no client knows of, with a path that is short enough for them."""
        digest = hashlib.sha256(os.fsencode(self._data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"appliance-{os.geteuid()}-{digest}-upgrade"

    # -- what a killed upgrade leaves ---------------------------------------------------------------------------------

    def _wait_for_leftovers(self) -> None:
        """Begin when nothing works on the clusters any more: each program of an upgrade holds its lock while it lives.

        pg_upgrade's servers outlive it when it is killed, and one may just be starting.
        """
        self._lock = (self._data_dir / "postgres-upgrade.lock").open("ab")
        _wait_until(lambda: not self.end_servers() and self._locked(), "an earlier upgrade is being ended")

    def end_servers(self) -> bool:
        """Ask the servers of both clusters to end; return whether there was one."""
        pids = [pid for cluster in (self._old, self._work) if (pid := postmaster_of(cluster)) is not None]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        return bool(pids)

    def _locked(self) -> bool:
        assert self._lock is not None  # noqa: S101 - the caller has opened it
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _let_go(self) -> None:
        self.end_servers()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def version_of(cluster: Path) -> str | None:
    """Return the major version that made a cluster; None where there is none."""
    try:
        return (cluster / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        return None


def is_ready(cluster: Path, pid: int) -> bool:
    """Return whether this server of a cluster takes connections, by its own account: the last word of its pid file.

    Until it has written its own, that of a server which was killed may stand there, ready too.
    """
    try:
        words = (cluster / "postmaster.pid").read_text().split()
    except FileNotFoundError:
        return False
    return words[:1] == [str(pid)] and words[-1] == "ready"


def _wait_until(condition: Callable[[], bool], meanwhile: str) -> None:
    """Wait as long as it takes, and say every so often for what, and since when."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    seldom = Seldom(seconds=_SAY_EVERY_SECONDS)
    # Not at once: mostly it takes a moment.
    seldom.due()
    while not condition():
        if seldom.due():
            log.info("%s since %s", meanwhile, since)
        time.sleep(_LOOK_SECONDS)


def _size_of(cluster: Path) -> int:
    """Return how many bytes of a cluster are copied; 0 where there is none."""
    size = 0
    for directory, names, files in os.walk(cluster):
        if Path(directory) == cluster:
            names[:] = [name for name in names if name not in _NOT_COPIED]
        for file in files:
            # A file may go meanwhile.
            with suppress(FileNotFoundError):
                size += (Path(directory) / file).lstat().st_size
    return size
