"""Everything a measure needs that runs: PostgreSQL as in production, and servers in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import psycopg

from appliance.store.database import fetch_value
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.events import newest_id
from appliance.store.migrations import migrate
from bench import load, payloads
from bench.errors import BenchError
from bench.servers import TOKEN, Kind

_START_SECONDS = 60
_STOP_SECONDS = 20
_BACKLOG = 1024
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}


@dataclass(frozen=True, slots=True)
class Body:
    """What is posted, in a file for the load client, and how many events it holds."""

    path: Path
    events: int


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and the database behind it."""

    port: int
    pid: int
    conninfo: str
    stores: bool

    @property
    def url(self) -> str:
        """Where the load goes."""
        return f"http://127.0.0.1:{self.port}/collect"

    def post(self, path: str, body: bytes = b"", *, timeout_seconds: float = 10) -> tuple[int, Any]:
        """Send one request; return the status and the JSON of the answer, or what else it says."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_seconds)
        try:
            connection.request("POST", path, body, load.headers())
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content) if answer.headers.get_content_subtype() == "json" else content
        finally:
            connection.close()

    def page_ms(self, path: str) -> float:
        """Fetch a page of the admin's and return how long that took. Raises BenchError when it is refused."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            started = time.monotonic()
            connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:  # noqa: PLR2004 - HTTP's number
                raise BenchError(f"{path} answers {answer.status}")
            return (time.monotonic() - started) * 1000
        finally:
            connection.close()

    def resident_mb(self) -> float:
        """Return the resident memory of the worker in MB."""
        (worker,) = psutil.Process(self.pid).children()
        return float(worker.memory_info().rss) / 1e6

    def newest_id(self) -> int:
        """Return the largest row id."""
        with psycopg.connect(self.conninfo) as conn:
            return newest_id(conn)

    def exported_rows(self) -> int:
        """Return how many rows stand in all of the export's buckets."""
        with psycopg.connect(self.conninfo) as conn:
            query = "SELECT coalesce(sum(row_count), 0) FROM export_batches WHERE state = 'settled'"
            return int(fetch_value(conn, query))

    def rows_after(self, row_id: int) -> int:
        """Return how many rows have come in since."""
        with psycopg.connect(self.conninfo) as conn:
            return int(fetch_value(conn, "SELECT count(*) FROM events_log WHERE id > %s", (row_id,)))


class World:
    """One PostgreSQL with fsync on, in a temporary directory, and what is posted."""

    def __init__(self, directory: Path, postgres: EmbeddedPostgres) -> None:
        self.directory = directory
        self._postgres = postgres
        self.single = self._write("single", payloads.single(), 1)
        self.batch = self._write("batch", payloads.batch(), payloads.BATCH_EVENTS)

    def _write(self, name: str, body: bytes, events: int) -> Body:
        path = self.directory / f"{name}.json"
        path.write_bytes(body)
        return Body(path, events)

    def postgres_version(self) -> str:
        """Return the server's version as it says it."""
        with psycopg.connect(self._postgres.conninfo) as conn:
            version = str(fetch_value(conn, "SHOW server_version"))
        return version.partition(" ")[0]

    @contextmanager
    def database(self, *, like: str = "") -> Iterator[str]:
        """Lend a database until the block ends, by its connection string: empty, or a copy of one that nobody uses."""
        name = f"bench_{uuid4().hex[:12]}"
        # The copy as files, not as a log of every page: what is measured then starts with a log at rest.
        source = f"TEMPLATE {psycopg.conninfo.conninfo_to_dict(like)['dbname']} STRATEGY file_copy" if like else ""
        with psycopg.connect(self._postgres.conninfo, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} {source}")
        conninfo = psycopg.conninfo.make_conninfo(self._postgres.conninfo, dbname=name)
        try:
            if not like:
                with psycopg.connect(conninfo) as conn:
                    migrate(conn)
            yield conninfo
        finally:
            with psycopg.connect(self._postgres.conninfo, autocommit=True) as admin:
                admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def server(self, kind: Kind) -> Iterator[Server]:
        """Run a server on an empty database of its own until the block ends."""
        with self.database() as conninfo, self.server_on(conninfo, kind) as server:
            yield server

    @contextmanager
    def server_on(self, conninfo: str, kind: Kind) -> Iterator[Server]:
        """Run a server on a database, which it may share, until the block ends."""
        with _process(kind, self.new_directory(), conninfo) as (process, port):
            server = Server(port, process.pid, conninfo, stores=kind.stores)
            self._wait_until_ready(server, process)
            yield server

    def new_directory(self) -> Path:
        """Make a directory that is nobody else's."""
        directory = self.directory / uuid4().hex[:12]
        directory.mkdir()
        return directory

    def _wait_until_ready(self, server: Server, process: "subprocess.Popen[bytes]") -> None:
        """Wait until it takes an event; a refusal that time does not heal is reported."""
        deadline = time.monotonic() + _START_SECONDS
        last = "no answer"
        while time.monotonic() < deadline and process.poll() is None:
            try:
                status, answer = server.post("/collect", self.single.path.read_bytes())
            except OSError as error:
                last = str(error)
            else:
                if status == 200 and answer["accepted"] == 1:  # noqa: PLR2004 - HTTP's number
                    return
                last = f"{status} {answer}"
            time.sleep(0.1)
        raise BenchError(f"a server under test does not start: {last}")


@contextmanager
def build() -> Iterator[World]:
    """Start PostgreSQL in a temporary directory; everything is gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="appliance-bench-") as name:
        directory = Path(name)
        _check_disk(directory)
        postgres = EmbeddedPostgres(directory / "database")
        if not postgres.acquire():
            raise BenchError(f"{directory} is in use")
        pid = postgres.start()
        try:
            postgres.wait_ready()
            yield World(directory, postgres)
        finally:
            postgres.stop(pid)
            postgres.wait_stopped()
            postgres.release()


@contextmanager
def _process(kind: Kind, directory: Path, conninfo: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(_BACKLOG)
        port = listener.getsockname()[1]
        number = listener.fileno()
        command = [sys.executable, "-m", "bench.servers", kind, str(number), str(directory), conninfo]
        # A developer's own settings must not change what is measured.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("APPLIANCE_")}
        process = subprocess.Popen(command, pass_fds=[number], env=environment)
    try:
        yield process, port
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _check_disk(directory: Path) -> None:
    """Refuse a directory in memory: a commit there costs nothing."""
    mounts = [part for part in psutil.disk_partitions(all=True) if directory.is_relative_to(part.mountpoint)]
    innermost = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    if innermost is not None and innermost.fstype in _MEMORY_FILE_SYSTEMS:
        raise BenchError(f"{directory} lies in memory: set TMPDIR to a directory on a disk")
