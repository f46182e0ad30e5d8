"""PostgreSQL servers of the user's own, of several versions, and PgBouncer: real ones, each on a free loopback port."""

import gzip
import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import psycopg
import pytest
from blows import each
from conftest import Appliance, free_port, http, wait_for

from appliance.store import programs

PASSWORD = "secret-of-a-test"
# Of a pooler to a server, before a test begins.
CONNECTIONS = 4
# Debian 12 brings 15; the wheel that brings 18 brings 16 too.
BINARIES = {
    "15": Path("/usr/lib/postgresql/15/bin"),
    "16": programs.binaries_of("16") or Path("PostgreSQL 16 is not in the wheel"),
    "18": programs.binary("postgres").parent,
}


def program(path: str | Path, package: str) -> str:
    """Return where a program is; without it the test is skipped, but not where all of them must run."""
    found = shutil.which(path)
    if found is None:
        give_up = pytest.fail if os.environ.get("ALL_SERVERS") else pytest.skip
        give_up(f"needs {package}: apt-get install {package}")
    return str(found)


@dataclass
class Server:
    """A PostgreSQL with a role `appliance` that may do nothing but own databases made for it."""

    version: str
    directory: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def socket(self) -> str:
        """How the superuser connects."""
        return f"host={self.directory} port={self.port} user=admin dbname=postgres"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def run(self, name: str, *words: str) -> None:
        done = subprocess.run(self._command(name, *words), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _command(self, name: str, *words: str) -> list[str]:
        return [
            *programs.command_prefix(),
            program(BINARIES[self.version] / name, f"postgresql-{self.version}"),
            *words,
        ]

    def create(self) -> "Server":
        options = ("--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C")
        self.run("initdb", "-D", str(self.data), "-U", "admin", "--no-sync", *options)
        return self

    def start(self, **settings: str) -> "Server":
        options = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.directory),
            "timezone": "Asia/Kolkata",
            "datestyle": "SQL, DMY",
            **settings,
        }
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command("postgres", "-D", str(self.data), *words), stderr=log)
        wait_for(
            self._answers, f"PostgreSQL {self.version}", alive=lambda: self.process and self.process.poll() is None
        )
        return self

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.socket).close()
        except psycopg.OperationalError:
            return False
        return True

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Let the superuser ask, or do, something; return the rows."""
        with psycopg.connect(self.socket, autocommit=True) as conn:
            cursor = conn.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """Make the role where it is missing, and an empty database that it owns; return the database's name."""
        if not self.ask("SELECT 1 FROM pg_roles WHERE rolname = 'appliance'"):
            self.ask(f"CREATE ROLE appliance LOGIN PASSWORD '{PASSWORD}'")
        name = f"e_{uuid4().hex}"
        self.ask(f"CREATE DATABASE {name} OWNER appliance")
        return name

    def url(self, database: str, options: str = "") -> str:
        return f"postgresql://appliance:{PASSWORD}@{self.address}/{database}{options}"

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)

    def kill(self) -> None:
        """End all of it at once, as a power cut does to the machine it is on."""
        assert self.process is not None
        postmaster = psutil.Process(self.process.pid)
        each([postmaster, *postmaster.children(recursive=True)], signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def server_of(version: str, directory: Path) -> Iterator[Server]:
    """Lend the directory of a server that is made and started, and stop what runs there at the end."""
    one = Server(version, directory)
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="session", params=BINARIES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of each version for the whole run."""
    with server_of(request.param, tmp_path_factory.mktemp("pg")) as one:
        yield one.create().start(fsync="off")


@dataclass(frozen=True)
class Pooler:
    """PgBouncer in transaction mode in front of a server. Each transaction gets the next of its connections."""

    server: Server
    directory: Path
    port: int

    def new_database(self) -> str:
        """Make a database to which the pooler has several connections: it opens one only where none is idle."""
        name = self.server.new_database()
        with ExitStack() as stack:
            for _ in range(CONNECTIONS):
                stack.enter_context(psycopg.connect(self.url(name))).execute("SELECT 1")
        return name

    def url(self, database: str) -> str:
        return f"postgresql://appliance:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def socket(self, database: str) -> str:
        return f"host={self.directory} port={self.port} user=appliance password={PASSWORD} dbname={database}"


@contextmanager
def pooler_of(server: Server, directory: Path) -> Iterator[Pooler]:
    binary = program("/usr/sbin/pgbouncer", "pgbouncer")
    one = Pooler(server, directory, free_port())
    (directory / "users").write_text(f'"appliance" "{PASSWORD}"\n')
    (directory / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={server.directory} port={server.port}\n[pgbouncer]\npool_mode = transaction\n"
        f"server_round_robin = 1\nlisten_addr = 127.0.0.1\nlisten_port = {one.port}\n"
        f"unix_socket_dir = {directory}\nauth_type = scram-sha-256\nauth_file = {directory / 'users'}\n"
    )
    with (directory / "log").open("wb") as log:
        command = [*programs.command_prefix(), binary, str(directory / "pgbouncer.ini")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for((directory / f".s.PGSQL.{one.port}").exists, "PgBouncer", alive=lambda: process.poll() is None)
        yield one
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def pooler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pooler]:
    """PgBouncer, and a server behind it that lets in by its socket who has the name."""
    with ExitStack() as stack:
        server = stack.enter_context(server_of("16", tmp_path_factory.mktemp("pg"))).create().start(fsync="off")
        yield stack.enter_context(pooler_of(server, tmp_path_factory.mktemp("pgbouncer")))


# -- the appliance on them --------------------------------------------------------------------------------------------


def exporting_to(bucket: Path, url: str) -> dict[str, Any]:
    """Return a configuration with one job, to a directory."""
    bucket.mkdir(exist_ok=True)
    return {
        "database": {"url": url},
        "collect": {"requests_per_minute_per_site": 0},
        "buckets": {"nas": {"kind": "directory", "path": str(bucket)}},
        "exports": {"acme": {"client": "nas", "format": "jsonl", "compression": "gzip"}},
    }


def post(box: Appliance, ids: list[str]) -> tuple[int, Any]:
    """Send events of those ids; return status and answer."""
    events = [{"eventType": "click", "siteId": "shop", "eventId": one} for one in ids]
    answer = http(box, "POST", "/collect", json.dumps(events).encode(), {"Content-Type": "application/json"})
    return answer.status, answer.json


def new_ids(number: int) -> list[str]:
    return [str(uuid4()) for _ in range(number)]


def contents(bucket: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bucket)): path.read_bytes() for path in bucket.rglob("*") if path.is_file()}


def ids_in(bucket: Path) -> Counter[str]:
    """Count each event of a bucket."""
    objects = [gzip.decompress(data) for key, data in contents(bucket).items() if key.endswith(".jsonl.gz")]
    return Counter(json.loads(line)["event_id"] for data in objects for line in data.splitlines())
