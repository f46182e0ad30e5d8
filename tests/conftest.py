"""Real parts for tests: PostgreSQL from the wheel, an S3 server with signatures, the server process, a browser."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import boto3
import psycopg
import pytest
import tomli_w
from botocore.config import Config
from moto.server import ThreadedMotoServer
from playwright.sync_api import Browser, sync_playwright
from psycopg.rows import dict_row

from appliance.collect.inbox import Inbox
from appliance.collect.spool import Spool
from appliance.config import Settings
from appliance.store import events
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.events import Event
from appliance.store.migrations import migrate

ACCESS_KEY = "TESTKEY"
SECRET_KEY = "test-secret-of-a-throw-away-server"
# Proves nothing by being short: exports make way for everything else that keeps the machine busy.
START_SECONDS = 120.0

# What the tests of tracking.js share, and those with servers of several versions.
pytest_plugins = ["tracking", "servers"]


def pytest_configure() -> None:
    """Let Ctrl-C be what it is: a shell without job control has what it starts in the background ignore it.

    What the tests start would inherit that, and a PostgreSQL that is told to stop before it listens would not hear it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let what a test has logged travel between processes, whatever it is: lone surrogates cannot be encoded."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _no_configuration_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A developer's own settings, AWS profile or config.toml must not change what tests see."""
    for name in list(os.environ):
        if name.startswith(("APPLIANCE_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# PostgreSQL


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One PostgreSQL for the whole run, with a template database that holds the schema."""
    server = EmbeddedPostgres(
        tmp_path_factory.mktemp("postgres"), overrides={"fsync": "off", "max_prepared_transactions": "5"}
    )
    assert server.acquire()
    pid = server.start()
    try:
        server.wait_ready()
        with psycopg.connect(server.conninfo, autocommit=True) as admin:
            admin.execute("CREATE DATABASE template_of_tests")
        with psycopg.connect(server.conninfo, dbname="template_of_tests") as conn:
            migrate(conn)
        yield server
    finally:
        server.stop(pid)
        server.wait_stopped()
        server.release()


@contextmanager
def database(postgres: EmbeddedPostgres, template: str, name: str) -> Iterator[str]:
    """Make a copy of a database, to which nobody may be connected, for as long as this lasts; yields how to connect."""
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    yield psycopg.conninfo.make_conninfo(postgres.conninfo, dbname=name)
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def conninfo(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A database of the test's own."""
    with database(postgres, "template_of_tests", f"t_{uuid4().hex}") as conninfo:
        yield conninfo


@pytest.fixture
def empty(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A database with nothing in it."""
    with database(postgres, "template1", f"empty_{uuid4().hex}") as conninfo:
        yield conninfo


@pytest.fixture
def db(conninfo: str) -> Iterator[Database]:
    with Database(conninfo) as database:
        yield database


@pytest.fixture
def conn(conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection, for looking at what the code under test has committed."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        yield connection


def make_event(**fields: Any) -> Event:
    """An event like any other; name what matters for the test."""
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "event_id": uuid4(),
        "event_type": "pageview",
        "session_id": "s",
        "visitor_id": "v",
        "site_id": "shop",
        "timestamp": now,
        "url": "https://shop.example.com/a",
        "path": "/a",
        "user_agent": "test",
        "ip_address": "192.0.2.1",
        "raw_event_data": '{"a": 1}',
        "created_at": now,
    }
    return Event(**{**values, **fields})


def store_events(db: Database, number: int, **fields: Any) -> list[UUID]:
    """Store events as the inbox does and return their ids."""
    made = [make_event(**fields) for _ in range(number)]
    with db.connection() as connection:
        events.copy_in(connection, made)
    return [event.event_id for event in made]


def make_inbox(db: Database, directory: Path) -> Inbox:
    """An inbox with a spool of its own, not started yet."""
    return Inbox(db, Spool(directory / f"spool-{uuid4().hex}", max_bytes=64 * 1024 * 1024))


def start_inbox(inbox: Inbox) -> Inbox:
    """Start it and wait until it stores in the database."""
    inbox.start()
    inbox.use_database()
    wait_for(lambda: not inbox.database_away, "the inbox to find the database")
    return inbox


@pytest.fixture
def inbox(db: Database, tmp_path: Path) -> Iterator[Inbox]:
    one = start_inbox(make_inbox(db, tmp_path))
    yield one
    one.close()


def make_settings(**sections: Any) -> Settings:
    """Settings from sections alone."""
    return Settings(**sections)


# ---------------------------------------------------------------------------------------------------------------------
# S3


@dataclass(frozen=True)
class S3Server:
    """A running `rclone serve s3`; each bucket is a directory below `root`."""

    endpoint: str
    root: Path

    def new_bucket(self, name: str = "bucket") -> str:
        """Make a bucket and return its name."""
        unique = f"{name}-{uuid4().hex[:8]}"
        self.client().create_bucket(Bucket=unique)
        return unique

    def settings(self, bucket: str, **options: Any) -> dict[str, Any]:
        """Return a [buckets.NAME] table for a bucket of this server."""
        return {
            "kind": "s3",
            "provider": "other",
            "bucket": bucket,
            "endpoint_url": self.endpoint,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            **options,
        }

    def client(self) -> Any:
        return _s3_client(self.endpoint)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Return every object of a bucket, read through the S3 API."""
        client = self.client()
        found: dict[str, bytes] = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                found[entry["Key"]] = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        return found


@cache
def _s3_client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@contextmanager
def s3_server(root: Path, port: int | None = None) -> Iterator[S3Server]:
    """Run an S3 server of one's own, for a test that stops it."""
    port = port or free_port()
    rclone = Path(sys.executable).parent / "rclone"
    command = [str(rclone), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    process = subprocess.Popen([*command, "--config", "", "--log-level", "ERROR", str(root)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _accepts(port), "rclone serve s3")
        yield S3Server(f"http://127.0.0.1:{port}", root)
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Run a server that knows what rclone does not: If-None-Match, KMS, roles, tags, storage classes."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def moto_settings(endpoint: str, bucket: str, provider: str) -> dict[str, Any]:
    """Return a [buckets.NAME] table for a bucket of moto, which plays the provider."""
    return {
        "kind": "s3",
        "provider": provider,
        "bucket": bucket,
        "endpoint_url": endpoint,
        "region": "us-east-1",
        "access_key_id": ACCESS_KEY,
        "secret_access_key": SECRET_KEY,
    }


@cache
def moto_client(endpoint: str, service: str = "s3") -> Any:
    keys: Any = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
    client: Any = boto3.session.Session().client
    return client(service, endpoint_url=endpoint, region_name="us-east-1", **keys)


# ---------------------------------------------------------------------------------------------------------------------
# The appliance as a process


@dataclass
class Appliance:
    """A real `appliance serve`, and the commands beside it."""

    directory: Path
    config: dict[str, Any]
    process: subprocess.Popen[str] | None = None
    port: int = field(default_factory=lambda: free_port())  # noqa: PLW0108 - defined below
    # What each of its commands is made of before it is started: to run it under a tracer, say.
    wrap: Callable[[list[str]], list[str]] = lambda command: command

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def write_config(self) -> Path:
        server = {"bind": f"127.0.0.1:{self.port}", "data_dir": str(self.data_dir), **self.config.get("server", {})}
        path = self.directory / "config.toml"
        path.write_text(tomli_w.dumps({**self.config, "server": server}))
        return path

    def begin(self) -> "Appliance":
        """Start it and wait until it answers, whatever state its database is in."""
        self.launch()
        wait_for(self._lives, "the web server", alive=lambda: self.process and self.process.poll() is None)
        return self

    def _lives(self) -> bool:
        try:
            return http(self, "GET", "/health/live").status == 200
        except OSError:
            return False

    def launch(self) -> "Appliance":
        """Start it and wait for nothing."""
        command = [sys.executable, "-m", "appliance", "serve", "--config", str(self.write_config())]
        with (self.directory / "log").open("a") as log:
            self.process = subprocess.Popen(self.wrap(command), stdout=log, stderr=subprocess.STDOUT, text=True)
        return self

    def start(self, *, until: Callable[["Appliance"], bool] | None = None) -> "Appliance":
        """Start it and wait until it is ready, or as far as is asked for."""
        self.launch()
        self._wait(self.ready if until is None else lambda: until(self))
        return self

    def wait_ready(self) -> None:
        """Wait until it is ready: it stores events, and nothing is left in its spool."""
        self._wait(self.ready)

    def _wait(self, done: Callable[[], object]) -> None:
        try:
            wait_for(done, "appliance serve", alive=lambda: self.process and self.process.poll() is None)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from error

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health/ready", timeout=5) as answer:  # noqa: S310
                return bool(json.load(answer)["status"] == "ok")
        except OSError:
            return False

    def reached(self) -> bool:
        """Return whether anything listens."""
        return _accepts(self.port)

    def run(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of the appliance with this configuration."""
        command = [sys.executable, "-m", "appliance", *words, "--config", str(self.write_config())]
        done = subprocess.run(self.wrap(command), capture_output=True, text=True, check=False, timeout=120, **options)
        assert not check or done.returncode == 0, done.stderr
        return done

    def stop(self) -> int:
        """Stop it as `docker stop` does and return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.process = None
        return code

    def kill(self) -> None:
        """Kill the supervisor without a warning; what it leaves behind is part of the test."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self.process = None


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Callable[..., Appliance]]:
    """Make appliances that are stopped at the end, whatever the test did to them."""
    made: list[Appliance] = []

    def make(**config: Any) -> Appliance:
        directory = tmp_path / f"appliance{len(made)}"
        directory.mkdir()
        made.append(Appliance(directory, config))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.stop()
        stop_left_over_postgres(one.data_dir)


def stop_left_over_postgres(data_dir: Path) -> None:
    """End the PostgreSQL of a data directory that a killed appliance left running."""
    server = EmbeddedPostgres(data_dir)
    pid = server.running_pid()
    if pid is not None:
        server.stop(pid)
        assert server.wait_stopped()


# ---------------------------------------------------------------------------------------------------------------------
# A browser


def browser_options() -> dict[str, Any]:
    """How to launch the system's Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    flags = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    # Hosts that are not this one by their names: for cookies of a domain, and pages that come without TLS.
    flags.append("--host-resolver-rules=MAP *.test 127.0.0.1")
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    return {"executable_path": path, "args": flags}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for the whole run."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(**browser_options())
        yield chromium
        chromium.close()


# ---------------------------------------------------------------------------------------------------------------------
# Small help


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait_for(
    condition: Callable[[], Any], what: str, *, seconds: float = START_SECONDS, alive: Callable[[], Any] = lambda: True
) -> Any:
    """Wait until the condition holds and return its value; fail when that takes too long or the process is gone."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert alive(), f"{what} ended"
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# HTTP, and an appliance that tests may share


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def http(  # noqa: PLR0913 - a request has that many parts
    box: Appliance,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    source: str = "127.0.0.1",
) -> Answer:
    """Send one request from a loopback address; a body that is no bytes goes in chunks. Follows no redirect."""
    connection = HTTPConnection("127.0.0.1", box.port, timeout=30, source_address=(source, 0))
    with closing(connection):
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())


def raw_status(box: Appliance, request: bytes) -> int:
    """Send bytes as they are, end the sending side, and return the status of the answer; 0 where there is none."""
    with socket.create_connection(("127.0.0.1", box.port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return int(answer.split()[1]) if answer else 0


@contextmanager
def running(directory: Path, **config: Any) -> Iterator[Appliance]:
    """Run an appliance for more than one test."""
    box = Appliance(directory, config)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("APPLIANCE_")]:
                patch.delenv(name)
            box.start()
        yield box
    finally:
        if box.process is not None and box.process.poll() is None:
            box.stop()
        stop_left_over_postgres(box.data_dir)


@dataclass(frozen=True)
class Collector:
    """An appliance with sites of every kind, and a connection to its database."""

    box: Appliance
    conn: psycopg.Connection[Any]

    def post(
        self,
        payload: Any,
        *,
        media: str | None = "application/json",
        headers: Mapping[str, str] | None = None,
        source: str = "127.0.0.1",
    ) -> Answer:
        """Post bytes or chunks as they are, and anything else as JSON."""
        body = payload if isinstance(payload, bytes | Iterator) else json.dumps(payload).encode()
        kind = {"Content-Type": media} if media is not None else {}
        return http(self.box, "POST", "/collect", body, {**kind, **(headers or {})}, source=source)

    def rows(self, visitor: str) -> list[dict[str, Any]]:
        """Return the rows of a visitor in the order of their arrival."""
        with self.conn.cursor(row_factory=dict_row) as cursor:
            cursor.execute("SELECT * FROM events_log WHERE visitor_id = %s ORDER BY id", (visitor,))
            return cursor.fetchall()


COLLECTOR_SITES = [
    {"id": "shop", "origins": ["https://shop.example.com", "https://m.example.com:8443"]},
    {"id": "blog", "origins": ["https://blog.example.com"]},
    {"id": "truncated", "origins": ["https://shop.example.com"], "ip": "truncate"},
    {"id": "dropped", "origins": ["https://shop.example.com"], "ip": "drop"},
    {"id": "strict", "origins": ["https://strict.example.com"], "require_origin": True},
    {"id": "polite", "origins": ["https://polite.example.com"], "honor_dnt": True, "ip": "truncate"},
]


@pytest.fixture(scope="session")
def collector(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """Requests from 127.0.0.2 come through a trusted proxy, those from 127.0.0.1 do not."""
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute("CREATE DATABASE collector TEMPLATE template_of_tests")
    url = psycopg.conninfo.make_conninfo(postgres.conninfo, dbname="collector")
    server = {"trusted_proxies": ["127.0.0.2/32", "10.0.0.0/8"]}
    collect = {"max_body_bytes": 32768, "max_batch_events": 100}
    config = {"server": server, "database": {"url": url}, "collect": collect, "sites": COLLECTOR_SITES}
    with (
        running(tmp_path_factory.mktemp("collector"), **config) as box,
        psycopg.connect(url, autocommit=True) as connection,
    ):
        yield Collector(box, connection)
