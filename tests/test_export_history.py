"""Buckets that hold more than the ledger knows of: the job stops, says what to do, and changes not one byte."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import S3Server, database, store_events
from exporting import CrashError, World, crash, failing, watch, world_of

from appliance.errors import BucketAheadError
from appliance.export import run
from appliance.store import runs
from appliance.store.embedded import EmbeddedPostgres

SENTENCE = (
    r"^bucket client is ahead: raw/_manifests/acme/000000000[13].json stands there, and this ledger does not know it: "
    r"restore from it \(appliance restore client\), or choose another prefix$"
)


@dataclass
class Installations:
    """Databases, one a copy of the other, with the same configuration and buckets."""

    postgres: EmbeddedPostgres
    s3: S3Server
    directory: Path
    stack: ExitStack
    buckets: dict[str, str] = field(default_factory=dict)

    def new(self, of: str = "template_of_tests") -> str:
        """Make a database that is empty, or as another is at this moment."""
        name = f"one_{uuid4().hex}"
        self.stack.enter_context(database(self.postgres, of, name))
        return name

    @contextmanager
    def open(self, name: str) -> Iterator[World]:
        with world_of(self.postgres, name, self.s3, self.directory / uuid4().hex) as world:
            self.buckets = self.buckets or {**world.names, "nas": self.s3.new_bucket("nas")}
            world.names = {bucket: self.buckets[bucket] for bucket in ("client", "vault")}
            world.tables = {bucket: self.s3.settings(where, prefix="raw") for bucket, where in self.buckets.items()}
            world.jobs["other"] = {"sites": ["*"], "client": "nas"}
            yield world


@pytest.fixture
def installations(
    postgres: EmbeddedPostgres, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Installations]:
    # A crashed run's lease is over when the next one begins.
    monkeypatch.setattr(runs, "LEASE_SECONDS", -1)
    with ExitStack() as stack:
        yield Installations(postgres, s3, tmp_path, stack)


@pytest.fixture
def first(installations: Installations) -> str:
    """An installation that has delivered two batches."""
    name = installations.new()
    with installations.open(name) as world:
        for _ in range(2):
            store_events(world.db, 2)
            assert not world.export().failed
    return name


def export_more(installations: Installations, name: str) -> None:
    with installations.open(name) as world:
        store_events(world.db, 2)
        assert not world.export().failed


def a_fresh_installation(installations: Installations, _first: str) -> str:
    return installations.new()


def a_second_installation(installations: Installations, first: str) -> str:
    """The first one goes on all the while."""
    name = installations.new()
    with installations.open(name) as world:
        store_events(world.db, 5)
    export_more(installations, first)
    return name


def an_older_backup(installations: Installations, first: str) -> str:
    name = installations.new(first)
    export_more(installations, first)
    return name


def a_failover_that_lost_the_seal(installations: Installations, first: str) -> str:
    """The events came through, and what was decided on them did not."""
    with installations.open(first) as world:
        store_events(world.db, 2)
    name = installations.new(first)
    with installations.open(first) as world:
        assert not world.export().failed
    return name


def a_failover_that_lost_the_attempt(installations: Installations, first: str) -> str:
    """The batch was sealed, and that it was about to be sent did not come through."""
    with installations.open(first) as world:
        store_events(world.db, 2)
        with pytest.raises(CrashError):
            watch(world.exporter(), failing(CrashError(), calls="sha256")).run("acme")
    name = installations.new(first)
    with installations.open(first) as world:
        assert not world.export().failed
    return name


@pytest.mark.parametrize(
    "late",
    [
        a_fresh_installation,
        a_second_installation,
        an_older_backup,
        a_failover_that_lost_the_seal,
        a_failover_that_lost_the_attempt,
    ],
    ids=lambda late: late.__name__.replace("_", " "),
)
def test_a_bucket_that_is_ahead_stops_that_job_alone_and_changes_not_one_byte(
    installations: Installations, first: str, late: Callable[[Installations, str], str]
) -> None:
    with installations.open(late(installations, first)) as world:
        before = world.everything()
        for _ in range(2):
            store_events(world.db, 2)
            with pytest.raises(BucketAheadError, match=SENTENCE):
                world.export()
            assert world.everything() == before
            assert runs.latest(world.conn, limit=1)[0].outcome == "failed"
        assert world.export("other").row_count == world.rows().total()
        # Only what was delivered before the ways parted may be marked.
        world.check_claims()
    # The one that is in the right goes on.
    export_more(installations, first)


def test_a_failover_that_lost_only_the_receipts_goes_on_with_the_same_bytes(
    installations: Installations, first: str
) -> None:
    with installations.open(first) as world:
        store_events(world.db, 2)
        crash(world)
    late = installations.new(first)
    with installations.open(first) as world:
        assert not world.export().failed
    with installations.open(late) as world:
        before = world.everything()
        assert not world.export().failed
        assert world.everything() == before
        store_events(world.db, 1)
        assert not world.export().failed
        assert len(world.check()) == 4


def test_what_a_lost_installation_has_half_delivered_is_not_written_over(
    installations: Installations, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "OBJECT_ROWS", 1)
    late = installations.new(first)
    with installations.open(first) as world:
        store_events(world.db, 2)
        crash(world, at=3)
    with installations.open(late) as world:
        before = world.everything()
        store_events(world.db, 3)
        for _ in range(2):
            report = world.export()
            for bucket in ("client", "vault"):
                assert f"bucket {bucket}: other bytes stand at raw/site=shop/" in report.summary
            assert "nothing there is ever written over: choose another prefix" in report.summary
            assert world.everything() == before
            world.check_claims()
