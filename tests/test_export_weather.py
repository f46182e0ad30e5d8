"""Servers and networks out of order: what is marked is there, collecting goes on, and exports recover by themselves."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import psycopg
import pytest
import weather
from conftest import Appliance, S3Server, http, store_events, wait_for
from exporting import World, chain, exported_ids, failing, watch
from faulty import faulty
from forks import one_client
from weather import Weather

from appliance.errors import BucketError
from appliance.export import formats, run
from appliance.export.buckets import clients
from appliance.export.buckets import s3 as s3_buckets
from appliance.export.verify import Verification, repair
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres


@pytest.fixture
def world(
    db: Database, conn: psycopg.Connection[Any], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    monkeypatch.setattr(run, "OBJECT_ROWS", 2)
    monkeypatch.setattr(run, "BATCH_ROWS", 3)
    # A request that is not tried again fails a call, which is what shall happen here.
    monkeypatch.setattr(clients, "_ATTEMPTS", 1)
    monkeypatch.setattr(s3_buckets, "make_client", one_client)
    return World(db, conn, s3, tmp_path)


def assert_all_is_exported(world: World) -> None:
    world.check_claims()
    world.check()
    assert world.conn.execute("SELECT 1 FROM events_log WHERE exported_at IS NULL").fetchone() is None


# ---------------------------------------------------------------------------------------------------------------------
# Both buckets, in any weather

KINDS = {
    "busy": (weather.busy, 0.3),
    "busy at times": (weather.busy, 0.05),
    "cut off": (weather.cut_off, 0.3),
    "reset in the answer": (weather.reset_in_the_answer, 0.3),
    "reset in the request": (weather.reset_in_the_request, 0.3),
    "anything": (weather.anything, 0.2),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "rate"), KINDS.values(), ids=KINDS)
def test_in_any_weather_what_is_marked_is_there_and_in_the_end_all_is(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: weather.Kind, rate: float, seed: int
) -> None:
    sky = Weather(kind, rate, seed)
    with faulty(world.s3.endpoint, choose=sky.choose) as proxy:
        for table in world.tables.values():
            table["endpoint_url"] = proxy.url
        for number in range(6):
            store_events(world.db, 2, raw_event_data=json.dumps({"text": "to be or not to be " * 9}))
            # As another zlib does; what a bucket has already is then fetched from there.
            monkeypatch.setattr(formats, "_GZIP_LEVEL", 1 + number % 2)
            before = world.everything()
            with suppress(BucketError):
                world.export()
            world.check_claims()
            assert all(before[name].items() <= world.contents(name).items() for name in before)
        sky.bad = False
        assert not world.export().failed
    assert sky.struck
    assert_all_is_exported(world)


@pytest.mark.parametrize("down", ["client", "vault"])
def test_a_bucket_that_is_down_for_many_runs_catches_up_and_never_holds_the_other_back(world: World, down: str) -> None:
    other = "vault" if down == "client" else "client"
    for number in range(12):
        store_events(world.db, 4)
        # Sometimes it comes back for a moment, in the middle of an object's way.
        refuses = failing(BucketError(f"bucket {down}: down"), at=1 + number % 4)
        assert watch(world.exporter(), refuses, down).run("acme").failed
        assert exported_ids(world.contents(other)) == world.rows()
        chain(world.contents(other))
        world.check_claims()
    assert not world.export().failed
    assert_all_is_exported(world)


@pytest.mark.parametrize("seconds", [300, 0], ids=["at once", "while it goes on"])
def test_a_bucket_that_catches_up_keeps_nothing_new_from_the_other(
    world: World, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(run, "_SEAL_AGAIN_SECONDS", seconds)
    for _ in range(4):
        store_events(world.db, 2)
        assert watch(world.exporter(), failing(BucketError("bucket vault: down")), "vault").run("acme").failed
    store_events(world.db, 2)
    there: list[int] = []

    @contextmanager
    def noting(call: str) -> Iterator[None]:
        if call == "put":
            there.append(exported_ids(world.contents("client")).total())
            if len(there) == 3:
                store_events(world.db, 2)
        yield

    # The vault gets what is new, an object and a manifest, beside the client, and then what it has missed.
    report = watch(world.exporter(), noting, "vault").run("acme")
    assert not report.failed
    assert there[2:4] == [10, 10]
    assert there[-1] == (12 if seconds == 0 else 10)
    assert not world.export().failed
    assert_all_is_exported(world)


def test_a_bucket_that_was_deleted_and_made_again_gets_what_is_new_and_by_a_repair_what_it_had(world: World) -> None:
    store_events(world.db, 4)
    assert not world.export().failed
    s3, name = world.s3.client(), world.names["client"]
    for key in world.contents("client"):
        s3.delete_object(Bucket=name, Key=key)
    s3.delete_bucket(Bucket=name)
    store_events(world.db, 4)
    for _ in range(2):
        assert "create the bucket" in world.export().summary
        assert exported_ids(world.contents("vault")) == world.rows()
        assert world.conn.execute("SELECT count(exported_at) FROM events_log").fetchone() == (4,)
    s3.create_bucket(Bucket=name)
    assert not world.export().failed
    assert exported_ids(world.contents("client")).total() == 4
    verdict = Verification(world.exporter().means, "acme").run()
    assert {finding.kind for finding in verdict.findings} == {"missing"}
    assert repair(world.exporter().means, verdict).left == ()
    assert_all_is_exported(world)


# ---------------------------------------------------------------------------------------------------------------------
# The appliance as it runs: each job has a site and a client bucket of its own, in weather of its own

# Each with what happens to its requests, and how often; and whether anything can come through.
SKIES: dict[str, tuple[weather.Kind | None, float]] = {
    "rarely-busy": (weather.busy, 0.01),
    "often-busy": (weather.busy, 0.3),
    "cut-off": (weather.cut_off, 0.2),
    "reset-answer": (weather.reset_in_the_answer, 0.2),
    "reset-request": (weather.reset_in_the_request, 0.2),
    "always-busy": (weather.busy, 1),
    "refused": (weather.refused, 1),
    "expired": (weather.expired, 1),
    "no-bucket": (None, 0),
}
HOPELESS = ("always-busy", "refused", "expired", "no-bucket")


@dataclass
class Visitors:
    """Send an event to each site, again and again, and note what is answered."""

    box: Appliance
    sent: dict[str, set[str]] = field(default_factory=lambda: {site: set() for site in SKIES})
    answers: Counter[int] = field(default_factory=Counter)
    gone: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._send)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gone.set()
        self._thread.join(30)

    def _send(self) -> None:
        while not self.gone.wait(0.1):
            ids = {site: str(uuid4()) for site in SKIES}
            body = json.dumps([{"eventType": "x", "siteId": site, "eventId": one} for site, one in ids.items()])
            answer = http(self.box, "POST", "/collect", body.encode(), {"Content-Type": "application/json"})
            self.answers[answer.status] += 1
            for site, one in ids.items():
                self.sent[site].add(one)


@pytest.fixture
def skies(s3: S3Server) -> Iterator[dict[str, tuple[Weather, str]]]:
    """The weather of each job, and the address where it has it."""
    with ExitStack() as stack:
        made: dict[str, tuple[Weather, str]] = {}
        for seed, (name, (kind, rate)) in enumerate(SKIES.items()):
            sky = Weather(kind or weather.busy, rate, seed)
            made[name] = sky, stack.enter_context(faulty(s3.endpoint, choose=sky.choose)).url
        yield made


def test_while_buckets_fail_in_every_way_collecting_goes_on_and_exports_recover_by_themselves(
    appliance: Callable[..., Appliance], s3: S3Server, skies: dict[str, tuple[Weather, str]]
) -> None:
    vault = s3.new_bucket("vault")
    clients_of = {name: s3.new_bucket(name) for name in SKIES if name != "no-bucket"}
    clients_of["no-bucket"] = f"late-{uuid4().hex[:8]}"
    tables = {
        name: s3.settings(clients_of[name], endpoint_url=url, read_timeout_seconds=2)
        for name, (_, url) in skies.items()
    }
    box = appliance(
        buckets={**tables, "vault": s3.settings(vault)},
        exports={name: {"sites": [name], "client": name, "backup": "vault", "schedule": "* * * * *"} for name in SKIES},
    ).start()
    often = [sky for name, (sky, _) in skies.items() if name not in {"no-bucket", "rarely-busy"}]
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo, autocommit=True) as conn:
        with Visitors(box) as visitors:
            # The next minute may begin before there are visitors: what runs then has nothing to export.
            wait_for(lambda: visitors.answers.total() > 50, "visitors")
            wait_for(
                lambda: runs_of(conn) >= set(SKIES) and all(sky.struck for sky in often),
                "each job to run in bad weather",
                seconds=300,
            )
            assert_marked_events_stand(conn, s3, clients_of, vault)
        assert set(visitors.answers) == {200}
        assert all(not s3.objects(clients_of[name]) for name in HOPELESS if name != "no-bucket")
        assert not marked(conn) & set().union(*(visitors.sent[name] for name in HOPELESS))

        for sky, _ in skies.values():
            sky.bad = False
        s3.client().create_bucket(Bucket=clients_of["no-bucket"])
        everything = set().union(*visitors.sent.values())
        wait_for(lambda: marked(conn) == everything, "all to be exported", seconds=240)
    of_vault = s3.objects(vault)
    for name, bucket in clients_of.items():
        theirs = s3.objects(bucket)
        assert exported_ids(theirs) == dict.fromkeys(visitors.sent[name], 1)
        assert theirs == {key: data for key, data in of_vault.items() if f"/{name}" in key}
        chain(theirs, "", job=name)
    assert box.stop() == 0


def runs_of(conn: psycopg.Connection[Any]) -> set[str]:
    return {name for (name,) in conn.execute("SELECT job FROM export_runs WHERE finished_at IS NOT NULL")}


def marked(conn: psycopg.Connection[Any]) -> set[str]:
    return {str(one) for (one,) in conn.execute("SELECT event_id FROM events_log WHERE exported_at IS NOT NULL")}


def assert_marked_events_stand(
    conn: psycopg.Connection[Any], s3: S3Server, clients_of: dict[str, str], vault: str
) -> None:
    claimed = marked(conn)
    in_clients: Counter[str] = Counter()
    for name in SKIES.keys() - {"no-bucket"}:
        in_clients += exported_ids(s3.objects(clients_of[name]))
    assert claimed <= in_clients.keys()
    assert claimed <= exported_ids(s3.objects(vault)).keys()
