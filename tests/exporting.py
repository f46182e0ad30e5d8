"""Help for tests of whole export runs: a world with two buckets, and ways to end it."""

import gzip
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import S3Server, make_settings
from psycopg.conninfo import make_conninfo

from appliance.config import Settings
from appliance.export.buckets import Bucket, Listed
from appliance.export.files import LocalObject
from appliance.export.job import Exporter
from appliance.store.database import Connection, Database
from appliance.store.embedded import EmbeddedPostgres

Contents = dict[str, bytes]
# Every object and manifest of which the ledger says that a bucket has it.
CLAIMS = """
    SELECT bucket, prefix || '/' || o.key, o.sha256
    FROM export_deliveries d JOIN export_objects o USING (job, sequence) WHERE state = 'delivered'
    UNION ALL
    SELECT bucket, prefix || '/_manifests/' || job || '/' || lpad(sequence::text, 10, '0') || '.json', manifest_sha256
    FROM export_deliveries d JOIN export_batches b USING (job, sequence) WHERE d.state = 'delivered'
"""
# Surrounds a call of a bucket, of which it is told the name.
Step = Callable[[str], AbstractContextManager[None]]


class World:
    """A database and the two buckets of the job `acme`."""

    def __init__(self, db: Database, conn: psycopg.Connection[Any], s3: S3Server, directory: Path) -> None:
        self.db, self.conn, self.s3, self.directory = db, conn, s3, directory
        self.names = {"client": s3.new_bucket("client"), "vault": s3.new_bucket("vault")}
        self.tables = {name: s3.settings(bucket, prefix="raw") for name, bucket in self.names.items()}
        self.jobs: dict[str, Any] = {"acme": {"sites": ["*"], "client": "client", "backup": "vault"}}

    def settings(self) -> Settings:
        return make_settings(server={"data_dir": str(self.directory / "data")}, buckets=self.tables, exports=self.jobs)

    def exporter(self, *, db: Database | None = None, stopping: threading.Event | None = None) -> Exporter:
        return Exporter(self.settings(), db or self.db, conninfo=self.db.conninfo, stopping=stopping)

    def export(self, name: str = "acme") -> Any:
        return self.exporter().run(name)

    def contents(self, name: str) -> Contents:
        """Read a bucket's objects from the disk of the S3 server."""
        root = self.s3.root / self.names[name]
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def everything(self) -> dict[str, Contents]:
        return {name: self.contents(name) for name in self.names}

    def rows(self) -> Counter[str]:
        return Counter(str(row[0]) for row in self.conn.execute("SELECT event_id FROM events_log"))

    def check_claims(self) -> None:
        """Hold what ledger and table say is delivered against the buckets, however far a run has come."""
        claimed = self.conn.execute(CLAIMS).fetchall()
        marked = {
            str(row[0]) for row in self.conn.execute("SELECT event_id FROM events_log WHERE exported_at IS NOT NULL")
        }
        for name in self.names:
            standing = self.contents(name)
            for key, sha256 in ((key, sha256) for bucket, key, sha256 in claimed if bucket == name):
                assert hashlib.sha256(standing[key]).hexdigest() == sha256
            assert marked <= exported_ids(standing).keys()

    def check(self) -> list[dict[str, Any]]:
        """Hold both buckets against the table: each event once, byte-equal, an unbroken chain. Return the manifests."""
        client, vault = self.contents("client"), self.contents("vault")
        assert client == vault
        assert exported_ids(client) == self.rows()
        manifests = chain(client)
        assert sum(manifest["row_count"] for manifest in manifests) == self.rows().total()
        assert not list(self.directory.glob("data/tmp/*"))
        return manifests


@contextmanager
def world_of(postgres: EmbeddedPostgres, name: str, s3: S3Server, directory: Path) -> Iterator[World]:
    conninfo = make_conninfo(postgres.conninfo, dbname=name)
    with Database(conninfo) as db, psycopg.connect(conninfo, autocommit=True) as conn:
        yield World(db, conn, s3, directory)


def exported_lines(contents: Contents) -> list[dict[str, Any]]:
    objects = [gzip.decompress(data) for key, data in sorted(contents.items()) if key.endswith(".gz")]
    return [json.loads(line) for data in objects for line in data.splitlines()]


def exported_ids(contents: Contents) -> Counter[str]:
    return Counter(line["event_id"] for line in exported_lines(contents))


def chain(contents: Contents, prefix: str = "raw", *, job: str = "acme") -> list[dict[str, Any]]:
    """Return the manifests after proving that they name all there is, in an unbroken chain."""
    keys = sorted(key for key in contents if "_manifests/" in key)
    below = f"{prefix}/" if prefix else ""
    before, named, manifests = None, set(keys), []
    for sequence, key in enumerate(keys, 1):
        assert key == f"{below}_manifests/{job}/{sequence:010d}.json"
        manifest = json.loads(contents[key])
        assert (manifest["sequence"], manifest["previous_sha256"]) == (sequence, before)
        for entry in manifest["objects"]:
            content = contents[f"{below}{entry['key']}"]
            assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
            named.add(f"{below}{entry['key']}")
        assert sum(entry["row_count"] for entry in manifest["objects"]) == manifest["row_count"]
        before = hashlib.sha256(contents[key]).hexdigest()
        manifests.append(manifest)
    assert named == set(contents)
    return manifests


class CrashError(BaseException):
    """The process is gone: nothing in it runs on after this."""


class Steps:
    """Counts every step that leaves the process and lets one of them be its last, done or not."""

    def __init__(self, last: int = 0, *, done: bool = False) -> None:
        self.count, self.last, self.done = 0, last, done

    @contextmanager
    def step(self, _action: str = "") -> Iterator[None]:
        self.count += 1
        dies = self.last and self.count >= self.last
        if dies and not (self.done and self.count == self.last):
            raise CrashError
        yield
        if dies:
            raise CrashError


class MortalDatabase(Database):
    """A database whose every transaction is a step."""

    steps = Steps()

    @contextmanager
    def connection(self, **options: Any) -> Iterator[Connection]:
        with self.steps.step(), super().connection(**options) as conn:
            yield conn


class Watched:
    """A bucket whose every call is a step."""

    def __init__(self, bucket: Bucket, step: Step) -> None:
        self.name, self.inner, self._step = bucket.name, bucket, step

    def put(self, key: str, local: LocalObject) -> None:
        with self._step("put"):
            self.inner.put(key, local)

    def exists(self, key: str) -> bool:
        with self._step("exists"):
            return self.inner.exists(key)

    def fetch(self, key: str, path: Path) -> None:
        with self._step("fetch"):
            self.inner.fetch(key, path)

    def list(self, prefix: str) -> Iterator[Listed]:
        with self._step("list"):
            yield from self.inner.list(prefix)

    def sha256(self, key: str) -> str | None:
        with self._step("sha256"):
            return self.inner.sha256(key)


def watch(exporter: Exporter, step: Step, *names: str) -> Exporter:
    """Put a watch on the exporter's buckets."""
    found = exporter.means.buckets
    plain = {name: bucket.inner if isinstance(bucket, Watched) else bucket for name, bucket in found.items()}
    watched = {name: Watched(bucket, step) for name, bucket in plain.items() if not names or name in names}
    exporter.means = replace(exporter.means, buckets={**plain, **watched})
    return exporter


def failing(error: BaseException, *, at: int = 1, calls: str = "put exists fetch") -> Step:
    """Make a step that fails from the Nth of those calls on."""
    seen = 0

    @contextmanager
    def step(call: str) -> Iterator[None]:
        nonlocal seen
        seen += call in calls
        if seen >= at:
            raise error
        yield

    return step


def crash(world: World, at: int = 1) -> None:
    """Run the job until its Nth put, which never happens."""
    with pytest.raises(CrashError):
        watch(world.exporter(), failing(CrashError(), at=at, calls="put")).run("acme")
