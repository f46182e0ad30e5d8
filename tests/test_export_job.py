"""Whole runs of an export job: whatever crashes, fails or changes, each event stands once in each bucket."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from conftest import S3Server, free_port, s3_server, store_events
from exporting import MortalDatabase, Steps, World, chain, crash, exported_ids, exported_lines, watch

from appliance.errors import ApplianceError, SchemaError
from appliance.export import run
from appliance.export.means import StoppedError
from appliance.store import overview, runs
from appliance.store.database import Database

if TYPE_CHECKING:
    from appliance.export.report import Report


@pytest.fixture
def world(db: Database, conn: psycopg.Connection[Any], s3: S3Server, tmp_path: Path) -> World:
    return World(db, conn, s3, tmp_path)


@pytest.fixture
def no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LEASE_SECONDS", -1)


# ---------------------------------------------------------------------------------------------------------------------
# All is well


def test_both_buckets_get_the_same_bytes_and_a_chain_of_manifests(world: World) -> None:
    for _ in range(3):
        store_events(world.db, 3)
        store_events(world.db, 2, site_id="blog")
        report = world.export()
        assert (report.batches, report.row_count, report.failed) == (1, 5, False)
    manifests = world.check()
    assert [manifest["sequence"] for manifest in manifests] == [1, 2, 3]
    assert len({manifest["installation"] for manifest in manifests}) == 1
    assert [len(manifest["objects"]) for manifest in manifests] == [2, 2, 2]
    (job_state,) = overview.read(world.conn).jobs
    assert (job_state.waiting, job_state.exported) == (0, 15)


def test_rows_arrive_as_they_stand_in_the_table(world: World) -> None:
    store_events(world.db, 2, raw_event_data='{"n": 9007199254740993}', url=None, path="")
    world.export()
    query = "SELECT row_to_json(e)::jsonb - 'exported_at' FROM events_log e ORDER BY id"
    assert exported_lines(world.contents("client")) == [row[0] for row in world.conn.execute(query)]


def test_a_second_run_exports_nothing(world: World) -> None:
    store_events(world.db, 3)
    world.export()
    before = world.everything()
    assert world.export().row_count == 0
    assert world.everything() == before
    query = "SELECT count(*) FROM events_log WHERE exported_at IS NULL"
    assert world.conn.execute(query).fetchone() == (0,)


def test_much_becomes_several_batches_and_objects(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BATCH_ROWS", 4)
    monkeypatch.setattr(run, "OBJECT_ROWS", 3)
    store_events(world.db, 10)
    assert world.export().batches == 3
    assert [[o["row_count"] for o in m["objects"]] for m in world.check()] == [[3, 1], [3, 1], [2]]


def test_a_run_leaves_the_work_to_another_that_is_under_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store_events(world.db, 1)
    other = uuid4()
    assert runs.take_lease(world.conn, "acme", other)
    assert world.export().skipped
    assert world.everything() == {"client": {}, "vault": {}}
    monkeypatch.setattr(runs, "LEASE_SECONDS", -1)
    runs.take_lease(world.conn, "acme", other)
    assert world.exporter().run("acme", wait_for_lease=True).row_count == 1
    world.check()


@pytest.mark.parametrize("step", [-1, 1], ids=["older", "newer"])
def test_in_a_database_that_another_version_has_changed_since_the_start_nothing_is_exported(
    world: World, step: int
) -> None:
    exporter = world.exporter()
    store_events(world.db, 1)
    world.conn.execute("UPDATE installation SET schema_version = schema_version + %s", (step,))
    with pytest.raises(SchemaError, match="this version of the appliance knows"):
        exporter.run("acme")
    assert world.everything() == {"client": {}, "vault": {}}
    assert not overview.read(world.conn).runs
    world.conn.execute("UPDATE installation SET schema_version = schema_version - %s", (step,))
    assert exporter.run("acme").row_count == 1
    world.check()


def test_a_lease_taken_before_the_clock_was_set_back_holds_no_job_up(world: World) -> None:
    store_events(world.db, 1)
    assert runs.take_lease(world.conn, "acme", uuid4())
    world.conn.execute("UPDATE export_leases SET expires_at = now() + interval '1 hour'")
    assert world.export().row_count == 1
    world.check()


# ---------------------------------------------------------------------------------------------------------------------
# Two runs, and runs that are cut off (at each of their calls: test_fault_points.py)


@pytest.mark.usefixtures("no_lease")
def test_two_runs_at_once_end_right(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BATCH_ROWS", 3)
    meet = threading.Barrier(2)

    def work() -> None:
        exporter = world.exporter()
        for _ in range(6):
            meet.wait(30)
            store_events(world.db, 4)
            # One may meet a batch of the other that is not far enough yet; what counts is what comes of it.
            with suppress(ApplianceError):
                assert not exporter.run("acme").skipped

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work), pool.submit(work)]:
            future.result()
    world.export()
    world.check()


@pytest.mark.usefixtures("no_lease")
def test_a_run_overtaken_by_one_that_then_dies_delivers_its_batch_too(world: World) -> None:
    with MortalDatabase(world.db.conninfo) as db:
        exporter = world.exporter(db=db)

        class Overtaken(Steps):
            @contextmanager
            def step(self, _action: str = "") -> Iterator[None]:
                self.count += 1
                # The lease, the record of the run, the coverage and what is owed: next is the seal.
                if self.count == 5:
                    store_events(world.db, 2)
                    crash(world)
                    store_events(world.db, 2)
                yield

        db.steps = Overtaken()
        assert not exporter.run("acme").failed
    assert len(world.check()) == 2


def test_a_frozen_batch_does_not_follow_edits_of_the_configuration(world: World) -> None:
    store_events(world.db, 3)
    crash(world)
    world.conn.execute("DELETE FROM export_leases")
    world.jobs["acme"] |= {"compression": "none", "sites": ["shop"]}
    for table in world.tables.values():
        table["prefix"] = "elsewhere"
    store_events(world.db, 2)
    world.export()
    assert world.contents("client") == world.contents("vault")
    old = {key: data for key, data in world.contents("client").items() if key.startswith("raw/")}
    assert exported_ids(old).total() == 3
    new = {key: data for key, data in world.contents("client").items() if key.startswith("elsewhere/")}
    assert sum(data.count(b"\n") for key, data in new.items() if key.endswith(".jsonl")) == 2
    (first,), second = chain(old), json.loads(new["elsewhere/_manifests/acme/0000000002.json"])
    assert (first["compression"], second["compression"]) == ("gzip", "none")
    assert second["previous_sha256"] == hashlib.sha256(old["raw/_manifests/acme/0000000001.json"]).hexdigest()


def test_shutting_down_stops_a_run_between_objects_and_the_next_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "OBJECT_ROWS", 2)
    store_events(world.db, 6)
    stopping = threading.Event()
    exporter = world.exporter(stopping=stopping)

    @contextmanager
    def step(_call: str) -> Iterator[None]:
        yield
        if any(world.everything().values()):
            stopping.set()

    with pytest.raises(StoppedError):
        watch(exporter, step).run("acme")
    assert [len(contents) for contents in world.everything().values()] == [1, 1]
    assert runs.latest(world.conn, limit=1)[0].outcome != "failed"
    with pytest.raises(StoppedError):
        exporter.run("acme")
    assert not world.export().failed
    world.check()


# ---------------------------------------------------------------------------------------------------------------------
# Buckets that fail


@pytest.mark.parametrize("down", ["client", "vault"])
def test_a_bucket_that_is_down_holds_no_other_back_and_catches_up(world: World, tmp_path: Path, down: str) -> None:
    (tmp_path / "own" / "bucket").mkdir(parents=True)
    port = free_port()
    other = "vault" if down == "client" else "client"
    world.tables[down]["endpoint_url"] = f"http://127.0.0.1:{port}"
    world.tables[down]["bucket"] = "bucket"
    for _ in range(2):
        store_events(world.db, 2)
        report = world.export()
        assert report.failed
        assert report.summary.startswith(f"1 batch delivered to {other}; bucket {down}: ")
        assert (report.batches, report.partly) == (0, {other: 1})
        assert "Could not connect" in report.summary
    assert exported_ids(world.contents(other)) == world.rows()
    assert world.conn.execute("SELECT 1 FROM events_log WHERE exported_at IS NOT NULL").fetchone() is None
    with s3_server(tmp_path / "own", port):
        report = world.export()
    assert report.summary == "4 events in 2 batches delivered"
    world.s3.root.joinpath(world.names[down]).rmdir()
    world.s3.root.joinpath(world.names[down]).symlink_to(tmp_path / "own" / "bucket")
    assert len(world.check()) == 2


@pytest.mark.parametrize("hangs_in", ["list", "put"])
def test_a_bucket_that_hangs_in_one_job_holds_no_other_job_up(world: World, hangs_in: str) -> None:
    world.jobs = {"acme": {"client": "client"}, "other": {"client": "vault"}}
    store_events(world.db, 2)
    hangs, let_go = threading.Event(), threading.Event()

    @contextmanager
    def hang(call: str) -> Iterator[None]:
        if call == hangs_in:
            hangs.set()
            let_go.wait(30)
        yield

    with ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(watch(world.exporter(), hang).run, "acme")
        assert hangs.wait(30)
        try:
            assert pool.submit(world.export, "other").result(10).row_count == 2
        finally:
            let_go.set()
        assert hanging.result().row_count == 2


def test_a_bucket_taken_out_of_the_configuration_is_reported_and_the_other_goes_on(world: World) -> None:
    store_events(world.db, 2)
    crash(world)
    world.conn.execute("DELETE FROM export_leases")
    del world.tables["client"]
    world.jobs["acme"] = {"client": "vault"}
    report = world.export()
    assert "bucket client: it is no longer in the configuration" in report.summary
    assert exported_ids(world.contents("vault")) == world.rows()


def test_a_retired_job_delivers_what_it_has_sealed_and_no_more(world: World) -> None:
    store_events(world.db, 2)
    crash(world)
    world.conn.execute("DELETE FROM export_leases")
    expected = world.rows()
    store_events(world.db, 2)
    world.jobs = {"other": {"sites": ["blog"], "client": "client"}}
    assert world.exporter().jobs() == ["other", "acme"]
    assert world.export("acme").batches == 1
    assert world.exporter().jobs() == ["other"]
    assert exported_ids(world.contents("client")) == exported_ids(world.contents("vault")) == expected


def test_a_run_ends_though_events_come_in_all_the_while(world: World) -> None:
    @contextmanager
    def beside_traffic(action: str) -> Iterator[None]:
        yield
        if action == "put":
            store_events(world.db, 1)

    store_events(world.db, 5)
    report = watch(world.exporter(), beside_traffic).run("acme")
    assert (report.batches, report.row_count) == (1, 5)
    assert world.rows().total() > 5
    assert world.export().row_count == world.rows().total() - 5
    world.check()


def test_a_run_works_through_a_backlog_of_many_batches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BATCH_ROWS", 4)
    store_events(world.db, 18)
    assert world.export().batches == 5
    world.check()


def test_a_run_keeps_its_lease_while_one_object_takes_long(
    world: World, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_events(db, 1)
    monkeypatch.setattr(runs, "LEASE_SECONDS", 1)
    monkeypatch.setattr(runs, "RENEW_LEASE_SECONDS", 0.1)
    reports: list[Report] = []

    @contextmanager
    def slow(call: str) -> Iterator[None]:
        if call == "put" and not reports:
            time.sleep(2)
            reports.append(world.export())
        yield

    assert watch(world.exporter(), slow).run("acme").batches == 1
    assert reports[0].skipped
