"""Export runs that meet a bucket ahead of them, rows that have changed, or a row like no other."""

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import S3Server, store_events
from exporting import CrashError, World, chain, crash, exported_ids, exported_lines, failing, watch

from appliance.errors import BatchChangedError, BucketAheadError, BucketError
from appliance.export import formats, run
from appliance.export.verify import Verification, repair
from appliance.store import runs
from appliance.store.database import Database

# So much that a better compressor has something to do.
TEXT = json.dumps({"text": "to be or not to be " * 9})
FORGET = (
    "TRUNCATE export_ranges, export_objects, export_deliveries, export_batches, export_coverage, export_marks;"
    "UPDATE installation SET id = gen_random_uuid(); UPDATE events_log SET exported_at = NULL"
)


@pytest.fixture
def world(
    db: Database, conn: psycopg.Connection[Any], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    # A crashed run's lease is over when the next one begins.
    monkeypatch.setattr(runs, "LEASE_SECONDS", -1)
    return World(db, conn, s3, tmp_path)


def fail(world: World, *names: str) -> Any:
    """Run the job while the named buckets are down."""
    return watch(world.exporter(), failing(BucketError("down"), calls="put fetch"), *names).run("acme")


# ---------------------------------------------------------------------------------------------------------------------
# A bucket that is ahead of the ledger


@pytest.mark.parametrize("ahead", [{"client"}, {"vault"}, {"client", "vault"}], ids=sorted)
def test_a_fresh_ledger_on_a_bucket_with_history_stops_and_changes_not_one_byte(world: World, ahead: set[str]) -> None:
    store_events(world.db, 3)
    world.export()
    world.conn.execute(FORGET)
    for name in set(world.names) - ahead:
        world.names[name] = world.s3.new_bucket(name)
        world.tables[name]["bucket"] = world.names[name]
    before = world.everything()
    store_events(world.db, 2)
    for _ in range(3):
        with pytest.raises(BucketAheadError, match=r"is ahead: .* restore from it .*, or choose another prefix$"):
            world.export()
        assert world.everything() == before
    assert "is ahead" in runs.latest(world.conn, limit=1)[0].message


def test_choosing_another_prefix_as_the_message_says_lets_the_job_go_on(world: World) -> None:
    store_events(world.db, 3)
    world.export()
    before = world.contents("client")
    world.conn.execute(FORGET)
    with pytest.raises(BucketAheadError):
        world.export()
    for table in world.tables.values():
        table["prefix"] = "second"
    assert not world.export().failed
    second = {key: data for key, data in world.contents("client").items() if key not in before}
    assert exported_ids(second) == world.rows()
    chain(second, "second")


@pytest.mark.parametrize("place", ["client", "vault"])
def test_a_foreign_object_at_a_key_stays_and_only_that_bucket_waits(world: World, place: str) -> None:
    other = "vault" if place == "client" else "client"
    store_events(world.db, 2)
    world.export()
    (key,) = [key for key in world.contents("client") if "_manifests" not in key]
    world.conn.execute(FORGET)
    for name in world.names:
        world.names[name] = world.s3.new_bucket(name)
        world.tables[name]["bucket"] = world.names[name]
    world.s3.client().put_object(Bucket=world.names[place], Key=key, Body=b"of somebody else")
    report = world.export()
    assert f"bucket {place}: other bytes stand at {key}" in report.summary
    assert world.contents(place) == {key: b"of somebody else"}
    assert exported_ids(world.contents(other)) == world.rows()


# ---------------------------------------------------------------------------------------------------------------------
# Rows that change after they were sealed


def test_a_batch_whose_rows_are_fewer_than_were_sealed_uploads_nothing(world: World) -> None:
    store_events(world.db, 3)
    crash(world)
    assert world.everything() == {"client": {}, "vault": {}}
    world.conn.execute("DELETE FROM events_log WHERE id = 2")
    with pytest.raises(BatchChangedError, match="3 rows were sealed, 2 are there now"):
        world.export()
    assert world.everything() == {"client": {}, "vault": {}}


@pytest.mark.parametrize("lacks", ["client", "vault"])
@pytest.mark.parametrize("change", ["DELETE FROM events_log WHERE id = 4", "UPDATE events_log SET url = 'x'"])
def test_a_batch_whose_rows_have_changed_is_copied_from_the_bucket_that_has_it(
    world: World, monkeypatch: pytest.MonkeyPatch, lacks: str, change: str
) -> None:
    monkeypatch.setattr(run, "OBJECT_ROWS", 2)
    expected = store_events(world.db, 5)
    assert fail(world, lacks).failed
    world.conn.execute(change)
    assert not world.export().failed
    assert world.contents("client") == world.contents("vault")
    assert exported_ids(world.contents("client")) == dict.fromkeys(map(str, expected), 1)
    assert len(chain(world.contents("client"))) == 1


def test_a_source_that_is_down_is_reported_and_later_batches_go_on(world: World) -> None:
    store_events(world.db, 2)
    assert fail(world, "client").failed
    world.conn.execute("DELETE FROM events_log WHERE id = 1")
    later = {str(event) for event in store_events(world.db, 2)}
    assert fail(world, "vault").failed
    assert later <= set(exported_ids(world.contents("client")))
    assert not world.export().failed
    assert world.contents("client") == world.contents("vault")


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_upgrade_that_makes_other_bytes_finishes_what_was_begun(
    world: World, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    # Each of two objects is put to client and vault in turn, then the manifest: so the first, the second, the fifth.
    monkeypatch.setattr(run, "OBJECT_ROWS", 20)
    store_events(world.db, 30, raw_event_data=TEXT)
    crash(world, at)
    before = world.everything()
    assert sum(map(len, before.values())) == at - 1
    # As a newer zlib does: as good, and different.
    monkeypatch.setattr(formats, "_GZIP_LEVEL", 1)
    assert not world.export().failed
    assert all(before[name].items() <= world.contents(name).items() for name in before)
    world.check()


def test_after_an_upgrade_while_every_bucket_is_down_the_manifests_name_what_then_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "OBJECT_ROWS", 20)
    monkeypatch.setattr(run, "BATCH_ROWS", 25)
    store_events(world.db, 40, raw_event_data=TEXT)
    assert fail(world).failed
    assert fail(world).failed
    monkeypatch.setattr(formats, "_GZIP_LEVEL", 1)
    assert not world.export().failed
    assert len(world.check()) == 2


def test_a_manifest_that_a_delivered_one_follows_is_not_made_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.jobs["acme"] = {"client": "client"}
    store_events(world.db, 30, raw_event_data=TEXT)
    assert fail(world).failed
    world.jobs["acme"] = {"client": "vault"}
    for _ in range(2):
        store_events(world.db, 2)
        fail(world, "client")
        monkeypatch.setattr(formats, "_GZIP_LEVEL", 1)
    report = world.export()
    assert "batch acme 1: its rows make another object now, and no bucket has" in report.summary
    assert world.contents("client") == {}
    query = "SELECT manifest_sha256 FROM export_batches ORDER BY sequence"
    kept = [sha256 for (sha256,) in world.conn.execute(query)]
    standing = [data for key, data in sorted(world.contents("vault").items()) if "_manifests" in key]
    assert [json.loads(text)["previous_sha256"] for text in standing] == kept[:2]
    # The version that sealed it can still deliver it.
    monkeypatch.setattr(formats, "_GZIP_LEVEL", 6)
    assert not world.export().failed
    assert exported_ids(world.contents("client")).total() == 30


def test_a_repair_after_an_upgrade_puts_nothing_that_its_manifest_does_not_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.jobs["acme"] = {"client": "client"}
    store_events(world.db, 30, raw_event_data=TEXT)
    assert not world.export().failed
    for key in world.contents("client"):
        world.s3.client().delete_object(Bucket=world.names["client"], Key=key)
    monkeypatch.setattr(formats, "_GZIP_LEVEL", 1)
    means = world.exporter().means
    (left,) = set(repair(means, Verification(means, "acme").run()).left)
    assert "batch acme 1: its rows make another object now, and no bucket has" in left
    assert world.contents("client") == {}


# ---------------------------------------------------------------------------------------------------------------------
# Rows like no other


SITES = ["../x", "a/b", "", "é", " +", "..", ".", "-", "\\", "%2F", "a\nb", "\"'", "*", "x" * 100]


@pytest.mark.parametrize("sites", [SITES, ["é" * 100], ["\N{PILE OF POO}" * 100]], ids=["hostile", "long", "longest"])
@pytest.mark.parametrize("kind", ["s3", "directory"])
def test_sites_put_there_by_hand_are_exported_beside_their_neighbours(
    world: World, tmp_path: Path, kind: str, sites: list[str]
) -> None:
    if kind == "directory":
        (tmp_path / "nas").mkdir()
        world.tables["client"] = {"kind": "directory", "path": str(tmp_path / "nas"), "prefix": "raw"}
    for site in ("shop", *sites):
        store_events(world.db, 2, site_id=site)
    world.jobs["acme"] = {"client": "client"}
    report = world.export()
    assert not report.failed, report.summary
    root = tmp_path / "nas" if kind == "directory" else world.s3.root / world.names["client"]
    contents = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    chain(contents)
    assert exported_ids(contents) == world.rows()
    assert {line["site_id"] for line in exported_lines(contents)} == {"shop", *sites}


@pytest.mark.parametrize("zone", ["America/New_York", "UTC", "Asia/Tokyo"])
def test_times_out_of_this_world_do_not_stop_an_export_whatever_the_servers_zone(
    world: World, conninfo: str, zone: str
) -> None:
    world.conn.execute(f"ALTER DATABASE {world.conn.info.dbname} SET timezone = '{zone}'")
    for moment in ("infinity", "-infinity", "0001-01-01 00:00Z", "9999-12-31 23:59Z", "0044-03-15 BC", "now"):
        world.conn.execute(
            "INSERT INTO events_log (event_id, event_type, timestamp, created_at, raw_event_data)"
            " VALUES (gen_random_uuid(), 'x', %(m)s, %(m)s, '{}')",
            {"m": moment},
        )
    with Database(conninfo) as db:
        world.db = db
        assert not world.export().failed
    world.check()


def test_a_failure_in_the_middle_of_a_batch_leaves_the_bucket_without_its_manifest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "OBJECT_ROWS", 1)
    store_events(world.db, 3)
    second_put = failing(BucketError("down"), at=2, calls="put")
    assert watch(world.exporter(), second_put, "client").run("acme").failed
    contents = world.contents("client")
    assert [line["id"] for line in exported_lines(contents)] == [1]
    assert not [key for key in contents if "_manifests" in key]
    assert len(chain(world.contents("vault"))) == 1
    world.export()
    world.check()


def test_a_crash_of_the_process_leaves_no_lease_that_stops_the_next_for_good(world: World) -> None:
    store_events(world.db, 1)
    with pytest.raises(CrashError):
        watch(world.exporter(), failing(CrashError())).run("acme")
    assert not world.export().skipped
    world.check()
