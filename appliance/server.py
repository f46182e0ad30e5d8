"""`serve`: starts the embedded PostgreSQL and gunicorn side by side, keeps them running, stops them in reverse order.

This process does no work of its own, so that there is little in it that can fail. It holds the listening socket:
while gunicorn is being restarted, clients wait in the socket's queue instead of being refused.
"""

import errno
import fcntl
import logging
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger

from appliance.config import Settings
from appliance.errors import StartError
from appliance.runtime import Runtime, create_app
from appliance.store.attach import conninfo_of
from appliance.store.embedded import EmbeddedPostgres, lock_file
from appliance.store.programs import die_with_parent
from appliance.words import how_ended

log = logging.getLogger(__name__)

# No thread waits for the database while events are stored, so these are for the work itself, which is Python's; more of
# them only get in each other's way.
THREADS = 16
_BACKLOG = 1024
# Connections that are open at once, most of them idle; and what the worker needs descriptors for beside them.
_MAX_CONNECTIONS = 4096
_OTHER_DESCRIPTORS = 200
# `docker stop` kills after ten seconds: gunicorn has these, and PostgreSQL's fast shutdown the rest.
_GUNICORN_STOP_SECONDS = 6
_POSTGRES_STOP_SECONDS = 60
_UPGRADE_STOP_SECONDS = 1
_TICK_SECONDS = 0.5
_RESTART_FROM_SECONDS = 0.5
_RESTART_TO_SECONDS = 30.0
# Each try of an upgrade copies the whole database, and mostly fails again until a person has done something about it.
_UPGRADE_AGAIN_FROM_SECONDS = 60.0
_UPGRADE_AGAIN_TO_SECONDS = 6 * 3600.0
# A child that has run this long was healthy: its next failure starts the back-off anew.
_HEALTHY_SECONDS = 60.0
# The port of an appliance that was just killed is free a moment later.
_BIND_PATIENCE_SECONDS = 2.0


@dataclass(slots=True)
class _Child:
    """A process that is kept running."""

    name: str
    pid: int | None = None
    adopted: bool = False
    started_at: float = 0.0
    restart_at: float = 0.0
    delay: float = 0.0
    healthy_seconds: float = _HEALTHY_SECONDS
    restart_from: float = _RESTART_FROM_SECONDS
    restart_to: float = _RESTART_TO_SECONDS

    def started(self, pid: int, *, adopted: bool = False) -> None:
        self.pid = pid
        self.adopted = adopted
        self.started_at = time.monotonic()

    def ended(self) -> None:
        """Plan the restart: the more often it has failed in a row, the later."""
        self.pid = None
        healthy = time.monotonic() - self.started_at > self.healthy_seconds
        self.delay = self.restart_from if healthy or not self.delay else min(self.delay * 2, self.restart_to)
        self.restart_at = time.monotonic() + self.delay

    def done(self) -> None:
        """It has come to its end as it should, and nothing has to wait."""
        self.pid = None

    def due(self) -> bool:
        return self.pid is None and time.monotonic() >= self.restart_at


def serve(settings: Settings) -> None:
    """Run the appliance until SIGTERM or SIGINT. Raises StartError where it cannot start, ConfigError before that."""
    conninfo_of(settings)
    data_dir = settings.server.data_dir
    lock = lock_data_dir(data_dir)
    listener = _listen(settings.server.host, settings.server.port)
    embedded = not settings.database.url.get_secret_value()
    postgres = EmbeddedPostgres(data_dir) if embedded else None
    # A program that reads the log line by line would stumble over it.
    if settings.server.log_format == "text":
        _print_welcome(settings)
    try:
        _Supervisor(settings, listener, postgres, lock).run()
    finally:
        listener.close()
        lock.close()


class _Supervisor:
    def __init__(
        self, settings: Settings, listener: socket.socket, postgres: EmbeddedPostgres | None, lock: IO[str]
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._postgres = postgres
        self._lock = lock
        self._owns_postgres = False
        self._stopping = False
        self._gunicorn = _Child("the web server")
        self._database = _Child("PostgreSQL")
        self._upgrade = _Child(
            "the upgrade of PostgreSQL",
            # It may take long and fail in the end: it must not begin anew at once.
            healthy_seconds=math.inf,
            restart_from=_UPGRADE_AGAIN_FROM_SECONDS,
            restart_to=_UPGRADE_AGAIN_TO_SECONDS,
        )

    def run(self) -> None:
        wakeup = _wake_up_on(self._on_signal, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        try:
            while not self._stopping:
                self._reap()
                self._start_what_is_due()
                select.select([wakeup], [], [], _TICK_SECONDS)
                with suppress(BlockingIOError):
                    wakeup.recv(4096)
        finally:
            self._stop_all()

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._stopping = self._stopping or number != signal.SIGCHLD

    # -- starting -----------------------------------------------------------------------------------------------------

    def _start_what_is_due(self) -> None:
        if self._postgres is not None:
            self._keep_postgres(self._postgres)
        if self._gunicorn.due():
            self._gunicorn.started(self._fork("the web server", self._run_gunicorn))

    def _keep_postgres(self, postgres: EmbeddedPostgres) -> None:
        """Start it as soon as this process may: a command that is under way may own it for now, and serves us too."""
        if not self._owns_postgres:
            self._owns_postgres = postgres.acquire()
        if not self._owns_postgres or not self._database.due() or not self._upgrade.due():
            return
        try:
            if postgres.upgrade.needed:
                self._begin_upgrade(postgres)
            else:
                self._database.started(postgres.start(), adopted=postgres.adopted)
        except (StartError, OSError) as error:
            # At the first start a person is looking and must hear of it. Later, events go to the spool meanwhile.
            if not self._database.started_at and not self._upgrade.started_at:
                raise
            log.error("PostgreSQL cannot be started: %s", error)  # noqa: TRY400 - the message says it all
            self._database.ended()

    def _begin_upgrade(self, postgres: EmbeddedPostgres) -> None:
        """Let a child do it: it takes as long as copying the data, and events go to the spool meanwhile."""
        postgres.upgrade.check()
        self._upgrade.started(self._fork(self._upgrade.name, postgres.upgrade.run))

    def _fork(self, name: str, work: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            self._be(name, work)
        return pid

    def _be(self, name: str, work: Callable[[], None]) -> NoReturn:
        """Do a child's work in the forked process; never return into the supervisor's code."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            # A session of its own: Ctrl-C reaches the supervisor alone, which then stops everything in order.
            os.setsid()
            die_with_parent()
            # The locks belong to the supervisor; a copy of them here would outlive it.
            self._lock.close()
            if self._postgres is not None:
                self._postgres.release()
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except StartError as error:
            log.error("%s", error)  # noqa: TRY400 - the message says it all
        except BaseException:
            log.exception("%s failed", name)
        finally:
            logging.shutdown()
            os._exit(code)

    def _run_gunicorn(self) -> None:
        _Gunicorn(self._settings, self._listener.fileno()).run()

    # -- watching -----------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Note which children have ended. As process 1 of a container this also buries strangers."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            for child in (self._gunicorn, self._database, self._upgrade):
                if child.pid == pid:
                    self._note_end(child, status)
        if self._database.adopted and self._database.pid and not self._adopted_lives():
            self._note_end(self._database, None)

    def _adopted_lives(self) -> bool:
        return self._postgres is not None and self._postgres.running_pid() == self._database.pid

    def _note_end(self, child: _Child, status: int | None) -> None:
        if child is self._upgrade and status == 0:
            # It has said so.
            child.done()
            return
        child.ended()
        if self._stopping:
            return
        how = "ended" if status is None else f"ended ({how_ended(os.waitstatus_to_exitcode(status))})"
        log.error("%s %s, starting it again in %.1f s%s", child.name, how, child.delay, self._more_about(child))

    def _more_about(self, child: _Child) -> str:
        if child is self._database and self._postgres:
            return f"; {self._postgres.where_it_says_why()}"
        if child is self._upgrade:
            return ", and after a further failure twice as late each time: to try at once, restart the appliance"
        return ""

    # -- stopping -----------------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        """The web server first, so that everything that was answered is committed; PostgreSQL last."""
        self._stopping = True
        log.info("stopping")
        if self._gunicorn.pid is not None:
            self._end(self._gunicorn, signal.SIGTERM, _GUNICORN_STOP_SECONDS + 1)
        if self._upgrade.pid is not None:
            self._end(self._upgrade, signal.SIGTERM, _UPGRADE_STOP_SECONDS)
        if self._postgres is not None and self._owns_postgres:
            # What is left of an upgrade; where one still runs after this, the next start waits for its end.
            if self._upgrade.started_at and not self._database.started_at:
                self._postgres.upgrade.end_servers()
            if self._database.pid is not None:
                self._postgres.stop(self._database.pid)
                self._wait_for_end(self._database, _POSTGRES_STOP_SECONDS)
            self._postgres.release()
        log.info("stopped")

    def _end(self, child: _Child, number: int, patience: float) -> None:
        pid = child.pid
        assert pid is not None  # noqa: S101 - the caller has looked
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        if not self._wait_for_end(child, patience):
            log.warning("%s does not stop, killing it", child.name)
            with suppress(ProcessLookupError):
                # Its whole session: the arbiter and the worker.
                os.killpg(pid, signal.SIGKILL)
            self._wait_for_end(child, patience)

    def _wait_for_end(self, child: _Child, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while child.pid is not None and time.monotonic() < deadline:
            time.sleep(0.02)
            self._reap()
        return child.pid is None


class _Gunicorn(BaseApplication):
    """gunicorn, configured by code alone; the app is built in the worker."""

    def __init__(self, settings: Settings, listener: int) -> None:
        self._settings = settings
        self._listener = listener
        super().__init__()

    def load_config(self) -> None:
        options = {
            "bind": f"fd://{self._listener}",
            "workers": 1,
            "worker_class": "appliance.worker.Worker",
            "threads": THREADS,
            "worker_connections": _max_connections(),
            "graceful_timeout": _GUNICORN_STOP_SECONDS,
            "timeout": 60,
            "keepalive": 15,
            "backlog": _BACKLOG,
            "control_socket_disable": True,
            # Answers are written in one piece (worker.py).
            "sendfile": False,
            "logger_class": _GunicornLogger,
            "post_fork": lambda _arbiter, _worker: die_with_parent(),
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return create_app(Runtime(self._settings))


class _GunicornLogger(Logger):
    """gunicorn's messages in the appliance's format, without the everyday ones. There is no access log."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
        self.access_log.disabled = True

    def access(self, *_: Any) -> None:
        """Write nothing: visitors' addresses and URLs stay out of logs."""


def _max_connections() -> int:
    """Return how many connections there may be, after asking the system for as many descriptors as it gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(_MAX_CONNECTIONS, soft - _OTHER_DESCRIPTORS)


def _wake_up_on(handler: Any, *signals: signal.Signals) -> socket.socket:
    """Return a socket that becomes readable when one of the signals comes."""
    wakeup, writer = socket.socketpair()
    for end in (wakeup, writer):
        end.setblocking(False)  # noqa: FBT003 - the signature is Python's
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, handler)
    return wakeup


def lock_data_dir(data_dir: Path) -> IO[str]:
    """Keep any appliance off a data directory until what is returned is closed. Raises StartError where one runs."""
    lock = lock_file(data_dir, "appliance.lock")
    deadline = time.monotonic() + _BIND_PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StartError(f"another appliance runs on the data directory {data_dir}: stop it first") from None
            time.sleep(0.1)
        else:
            return lock


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + _BIND_PATIENCE_SECONDS
    while True:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise StartError(_bind_problem(host, port, error)) from error
        else:
            listener.set_inheritable(True)
            return listener


def _bind_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by another program or appliance: stop that, or set server.bind to another port"
    return f"cannot listen on {host}:{port} ({error.strerror or error}): correct server.bind"


def _print_welcome(settings: Settings) -> None:
    """Tell a newcomer where everything is."""
    server = settings.server
    url = server.local_url
    site = settings.sites[0].id if settings.sites else "shop"
    lines = [f"The appliance listens on {url}", ""]
    lines.append(
        f"  admin page     {url}/admin/" if settings.admin.enabled else "  admin page     off (set admin.password)"
    )
    if server.demo:
        lines.append(f"  demo page      {url}/demo/")
    for name, export in settings.exports.items():
        folders = [str(getattr(settings.buckets[b], "path", f"bucket {b}")) for b in export.bucket_names]
        lines.append(f"  export {name:<7} {', '.join(folders)}  (schedule {export.schedule}, UTC)")
    lines += ["", "Put this into the pages of a site (data-site is its id):", ""]
    lines += [f'  <script async src="{url}/tracking.js" data-site="{site}"></script>', ""]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
