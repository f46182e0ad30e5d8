"""Buckets that hold more than the ledger knows of: the job stops, says what to do, and changes not one byte."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import S3Server, database, store_events
from exporting import CrashError, World, crash, exported_ids, failing, watch, world_of

from appliance.errors import BucketAheadError
from appliance.export import run
from appliance.export.restore import Restore
from appliance.store import ledger, runs
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.ledger import Key

NOBODY = "http://127.0.0.1:9"
SENTENCE = (
    r"^bucket client is ahead: raw/_manifests/acme/000000000[123].json stands there, and this ledger does not know it: "
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


def a_fresh_installation_where_history_begins_late(installations: Installations, first: str) -> str:
    remove_the_beginning(installations, "client", "vault")
    return a_fresh_installation(installations, first)


def remove_the_beginning(installations: Installations, *names: str) -> None:
    """Do what a rule of a bucket does to what is old."""
    for name in names:
        for path in (installations.s3.root / installations.buckets[name]).rglob("*0000000001*"):
            path.unlink()


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
        a_fresh_installation_where_history_begins_late,
        a_second_installation,
        an_older_backup,
        a_failover_that_lost_the_seal,
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


def a_failover_that_lost_only_the_receipts(installations: Installations, first: str) -> str:
    with installations.open(first) as world:
        store_events(world.db, 2)
        crash(world)
    name = installations.new(first)
    with installations.open(first) as world:
        assert not world.export().failed
    return name


@pytest.mark.parametrize(
    "late",
    [a_failover_that_lost_only_the_receipts, a_failover_that_lost_the_attempt],
    ids=lambda late: late.__name__.replace("_", " "),
)
def test_a_failover_that_kept_the_seal_goes_on_with_the_same_bytes(
    installations: Installations, first: str, late: Callable[[Installations, str], str]
) -> None:
    with installations.open(late(installations, first)) as world:
        before = world.everything()
        assert not world.export().failed
        assert world.everything() == before
        store_events(world.db, 1)
        assert not world.export().failed
        assert len(world.check()) == 4


def test_an_older_backup_that_kept_a_seal_is_restored_to_the_newest_batch(
    installations: Installations, first: str
) -> None:
    late = a_failover_that_lost_the_attempt(installations, first)
    export_more(installations, first)
    with installations.open(late) as world:
        assert Restore(world.exporter().means, "client").run().batches == 1
        assert not world.export().failed
        store_events(world.db, 1)
        assert not world.export().failed
        assert len(world.check()) == 5


def test_a_batch_that_was_sealed_while_no_bucket_answered_gives_way_to_what_stands_there(
    installations: Installations, first: str
) -> None:
    with installations.open(an_older_backup(installations, first)) as world:
        heard = world.tables
        world.tables = {name: {**table, "endpoint_url": NOBODY} for name, table in heard.items()}
        collected = store_events(world.db, 3)
        assert world.export().failed
        with world.db.connection() as conn:
            sealed = ledger.load(conn, Key("acme", 3))
        assert sealed.row_count == 3
        world.tables = heard
        with pytest.raises(BucketAheadError, match=SENTENCE):
            world.export()
        outcome = Restore(world.exporter().means, "client").run()
        assert (outcome.batches, outcome.rows, outcome.moved) == (1, 2, 2)
        # A run that had read of it before, and was held up, sends nothing.
        with world.db.connection() as conn, pytest.raises(ledger.OvertakenError, match="has taken it back"):
            ledger.begin_attempt(conn, sealed, "vault")
        assert not world.export().failed
        assert world.rows() >= Counter(map(str, collected))
        assert len(world.check()) == 4


@pytest.mark.parametrize("sealed", [False, True], ids=["waiting", "sealed for silent buckets"])
def test_what_an_old_backup_has_collected_below_the_batches_that_come_back_is_exported_too(
    installations: Installations, *, sealed: bool
) -> None:
    """Where a job had passed over rows of others, its next batch begins far above its last."""

    @contextmanager
    def opened(name: str) -> Iterator[World]:
        with installations.open(name) as world:
            world.jobs = {"acme": world.jobs["acme"] | {"sites": ["shop"]}}
            yield world

    first = installations.new()
    with opened(first) as world:
        store_events(world.db, 2)
        assert not world.export().failed
    backup = installations.new(first)
    with opened(first) as world:
        store_events(world.db, 5, site_id="blog")
        assert world.export().batches == 0
        store_events(world.db, 3)
        assert world.export().batches == 1
    with opened(backup) as world:
        heard = world.tables
        store_events(world.db, 4)
        if sealed:
            world.tables = {name: {**table, "endpoint_url": NOBODY} for name, table in heard.items()}
            assert world.export().failed
            world.tables = heard
        with pytest.raises(BucketAheadError):
            world.export()
        assert Restore(world.exporter().means, "client").run().moved == 4
        assert not world.export().failed
        assert len(world.check()) == 3
        assert world.rows().total() == 9


def test_nothing_is_sealed_first_for_buckets_of_which_none_answers(installations: Installations) -> None:
    """They may be ahead, and what is sealed could then neither be delivered nor restored over."""
    fresh = installations.new()
    with installations.open(fresh) as world:
        heard = world.tables
        silent = {name: {**table, "endpoint_url": NOBODY} for name, table in heard.items()}
        number = "SELECT count(*) FROM export_batches"
        store_events(world.db, 2)
        world.tables = silent
        report = world.export()
        assert report.failed
        assert all(f"bucket {name}: " in report.summary for name in ("client", "vault"))
        assert world.conn.execute(number).fetchone() == (0,)
        world.tables = heard
        assert not world.export().failed
        # Whose history is known gets a batch that is tried again soon, and not at the job's next line.
        store_events(world.db, 2)
        world.tables = silent
        assert world.export().failed
        assert world.conn.execute(number).fetchone() == (2,)
        world.tables = heard
        assert not world.export().failed
        world.check()


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("begins_late", [False, True], ids=["whole", "begins late"])
def test_a_bucket_that_is_ahead_and_was_silent_costs_the_other_nothing(
    installations: Installations, *, begins_late: bool
) -> None:
    if begins_late:
        remove_the_beginning(installations, "client")
    with installations.open(installations.new()) as world:
        world.names["vault"] = installations.s3.new_bucket("vault")
        world.tables["vault"] = installations.s3.settings(world.names["vault"], prefix="raw")
        right, world.tables["client"] = world.tables["client"], {**world.tables["client"], "endpoint_url": NOBODY}
        store_events(world.db, 2)
        assert world.export().failed
        world.tables["client"] = right
        before = world.contents("client")
        store_events(world.db, 2)
        with pytest.raises(BucketAheadError):
            world.export()
        right["prefix"] = "second"
        assert "bucket client is ahead" in world.export().summary
        assert exported_ids(world.contents("vault")) == world.rows()
        below_raw = {key: body for key, body in world.contents("client").items() if key.startswith("raw/")}
        assert below_raw == before


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


@pytest.mark.parametrize("backup", ["vault", None], ids=["with a backup", "alone"])
def test_what_stands_in_the_way_of_one_batch_keeps_no_other_from_the_bucket(
    installations: Installations, backup: str | None
) -> None:
    with installations.open(installations.new()) as world:
        world.jobs["acme"] = {"client": "client", **({"backup": backup} if backup else {})}
        store_events(world.db, 2)
        crash(world)
        (key,) = [key for (key,) in world.conn.execute("SELECT key FROM export_objects")] or [""]
        world.s3.client().put_object(Bucket=world.names["client"], Key=f"raw/{key}", Body=b"of somebody else")
        assert "other bytes stand at" in world.export().summary
        for table in world.tables.values():
            table["prefix"] = "second"
        for _ in range(3):
            store_events(world.db, 2)
            # As the scheduler does it, which leaves alone what has failed.
            assert world.exporter().run("acme", spare_resting=True).batches == 1
        delivered = "SELECT sequence FROM export_deliveries WHERE bucket = 'client' AND state = 'delivered' ORDER BY 1"
        assert world.conn.execute(delivered).fetchall() == [(2,), (3,), (4,)]
        assert world.contents("client")[f"raw/{key}"] == b"of somebody else"


# ---------------------------------------------------------------------------------------------------------------------
# Jobs that share rows


def with_a_job_for_the_shop(world: World) -> None:
    world.jobs.pop("other")
    world.jobs["shopjob"] = {"sites": ["shop"], "client": "nas"}


def lose_what_the_shop_s_job_lacks(installations: Installations, first: str) -> str:
    """Let one job deliver three events more than the other, and return a backup from before that."""
    with installations.open(first) as world:
        with_a_job_for_the_shop(world)
        assert world.export("shopjob").row_count == 4
    backup = installations.new(first)
    with installations.open(first) as world:
        with_a_job_for_the_shop(world)
        store_events(world.db, 3)
        assert world.export().row_count == 3
    return backup


@pytest.mark.parametrize("fresh", [False, True], ids=["an old backup", "a new machine"])
def test_rows_that_a_restore_brings_back_are_exported_by_every_job_that_lacks_them(
    installations: Installations, first: str, *, fresh: bool
) -> None:
    backup = lose_what_the_shop_s_job_lacks(installations, first)
    with installations.open(installations.new() if fresh else backup) as world:
        with_a_job_for_the_shop(world)
        store_events(world.db, 4, site_id="blog")
        if fresh:
            Restore(world.exporter().means, "nas").run()
        # It looks over the ground on which the rows of the other one's batches will stand.
        assert world.export("shopjob").batches == 0
        Restore(world.exporter().means, "client").run()
        assert not world.export().failed
        assert world.export("shopjob").row_count == 3
        world.names["nas"] = installations.buckets["nas"]
        shop = {str(one) for (one,) in world.conn.execute("SELECT event_id FROM events_log WHERE site_id = 'shop'")}
        assert len(shop) == 7
        assert exported_ids(world.contents("nas")) == dict.fromkeys(shop, 1)
