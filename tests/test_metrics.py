"""GET /metrics: who may read it, and that every figure says what has happened."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Appliance, S3Server, http, make_event, make_inbox, running, store_events, wait_for
from exporting import World, failing, watch
from prometheus_client import generate_latest
from signals import TOKEN, Scrape, ask, run_apart, scrape
from test_serve import status_of

from appliance.admin.ledger import LedgerReader
from appliance.admin.metrics import NO_SITE, OTHER_SITES, Sources, registry_of
from appliance.alerts.conditions import Room
from appliance.collect.commit import Outcome
from appliance.collect.refusals import Refusals
from appliance.collect.tallies import Histogram
from appliance.errors import BucketError
from appliance.store import counters, figures, runs
from appliance.store.database import Database

Conn = psycopg.Connection[Any]

SITES = [{"id": "shop", "origins": ["https://shop.example.com"]}, {"id": "blog"}]
DOWN = BucketError("bucket vault: it is down")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    config = {"admin": {"token": TOKEN}, "sites": SITES, "server": {"log_format": "json"}}
    with running(tmp_path_factory.mktemp("metrics"), **config) as one:
        yield one


def post(box: Appliance, *events: dict[str, Any], **headers: str) -> int:
    body = json.dumps(list(events)).encode()
    return http(box, "POST", "/collect", body, {"Content-Type": "application/json", **headers}).status


def event(site: str = "shop", **fields: Any) -> dict[str, Any]:
    return {"eventType": "click", "siteId": site, **fields}


def grown(box: Appliance, before: Scrape, name: str, **labels: str) -> float:
    return (scrape(box).value(name, **labels) or 0) - (before.value(name, **labels) or 0)


# -- who may read ------------------------------------------------------------------------------------------------------


def test_metrics_are_for_who_has_the_token_and_never_cached(box: Appliance) -> None:
    right = ask(box)
    assert right.status == 200
    assert right.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    for answer, status in ((right, 200), (ask(box, "x"), 401), (http(box, "GET", "/metrics"), 401)):
        assert answer.status == status
        assert answer.headers["Cache-Control"] == "no-store"
        assert ("WWW-Authenticate" in answer.headers) is (status == 401)
        assert (b"appliance_" in answer.body) is (status == 200)


@pytest.mark.parametrize("header", [f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", "Bearer \xff", TOKEN, "Bearer  "])
def test_no_other_word_opens_metrics(box: Appliance, header: str) -> None:
    assert http(box, "GET", "/metrics", headers={"Authorization": header}).status == 401


def test_without_a_token_there_are_no_metrics(appliance: Callable[..., Appliance]) -> None:
    answer = ask(appliance(admin={"password": "only-a-password"}).start(), "")
    assert answer.status == 404
    assert answer.json == {"error": "metrics are off until admin.token is set"}


# -- what comes in -----------------------------------------------------------------------------------------------------


def test_events_are_counted_by_what_became_of_them(box: Appliance) -> None:
    twice = "01890a5d-ac96-774b-bcce-b302099a8057"
    before = scrape(box)
    assert post(box, event(eventId=twice), event("blog"), {"siteId": "shop"}) == 200
    assert post(box, event(eventId=twice), event(), event("blog"), event("blog")) == 200
    assert post(box, event("nowhere")) == 403
    assert post(box, event(), Origin="https://evil.example.com") == 403
    assert http(box, "POST", "/collect", b"{", {"Content-Type": "application/json"}).status == 400
    assert grown(box, before, "events_accepted_total", site="shop") == 2
    assert grown(box, before, "events_accepted_total", site="blog") == 3
    assert grown(box, before, "events_duplicate_total", site="shop") == 1
    assert grown(box, before, "refused_total", site="shop", reason="origin") == 1
    for reason in ("event", "site", "body"):
        assert grown(box, before, "refused_total", site=NO_SITE, reason=reason) == 1, reason
    assert not [labels for _, labels in scrape(box) if ("site", "nowhere") in labels]


def test_requests_are_counted_by_status_and_timed(box: Appliance) -> None:
    before = scrape(box)
    for _ in range(3):
        assert post(box, event()) == 200
    assert post(box, {}) == 400
    assert http(box, "GET", "/pixel.gif?site=shop").status == 200
    assert http(box, "OPTIONS", "/collect").status == 204
    assert grown(box, before, "requests_total", path="/collect", status="200") == 3
    assert grown(box, before, "requests_total", path="/collect", status="400") == 1
    assert grown(box, before, "requests_total", path="/pixel.gif", status="200") == 1
    assert grown(box, before, "request_seconds_count", path="/collect") == 4
    assert 0 < grown(box, before, "request_seconds_sum", path="/collect") < 60
    assert grown(box, before, "group_events_count") == 4
    assert grown(box, before, "group_events_sum") == 4


def test_what_the_web_server_refuses_by_itself_is_counted(box: Appliance) -> None:
    before = scrape(box)
    assert http(box, "POST", "/collect", headers={"Content-Length": "999999999999"}).status == 413
    assert grown(box, before, "web_refused_total", status="413") == 1
    assert scrape(box).value("web_requests") == 1


def test_room_and_process_are_told(box: Appliance) -> None:
    found = scrape(box)
    assert found.value("spool_limit_bytes") == 1024**3
    assert 0 < (found.value("disk_free_bytes") or 0) < (found.value("disk_bytes") or 0)
    assert (found.value("database_bytes") or 0) > 1_000_000
    assert found.value("database_up") == found.value("ledger_up") == 1
    assert (found.value("pool_connections") or 0) >= 1
    assert found["process_resident_memory_bytes", frozenset()] > 10_000_000


def test_a_histogram_counts_each_value_once_up_to_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.1, 2.0, 9.0):
        histogram.note(value)
    assert histogram.up_to() == [(1.0, 2), (2.0, 4), (float("inf"), 5)]
    assert histogram.total == pytest.approx(13.6)


# -- in one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(db: Database, tmp_path: Path) -> Sources:
    """An appliance's parts, of which none runs."""
    room = Room(disk_path="/data", disk_free=1, disk_size=2, spool_used=3, spool_size=4)
    return Sources(
        db=db,
        inbox=make_inbox(db, tmp_path),
        refusals=Refusals(db),
        requests={},
        room=lambda: room,
        web=lambda: None,
        alerts_looked_at=lambda: 1_800_000_000.0,
    )


def read(sources: Sources) -> Scrape:
    return Scrape(generate_latest(registry_of(sources)).decode())


def test_many_sites_share_one_label_and_no_counter_ever_goes_down(sources: Sources) -> None:
    registry = registry_of(sources)
    tally = sources.inbox.tally

    def accepted() -> Scrape:
        return Scrape(generate_latest(registry).decode())

    tally.note_stored([make_event(site_id=f"site{n}") for n in range(300)], Outcome(everything_is_new=True))
    first = accepted()
    assert first.value("events_accepted_total", site="site199") == 1
    assert first.value("events_accepted_total", site="site200") is None
    assert first.value("events_accepted_total", site=OTHER_SITES) == 100
    tally.note_stored([make_event(site_id="site299")] * 1000, Outcome(everything_is_new=True))
    sources.refusals.note("dnt", "no", site_id="site250")
    second = accepted()
    assert second.value("events_accepted_total", site=OTHER_SITES) == 1100
    assert second.value("refused_total", site=OTHER_SITES, reason="dnt") == 1
    assert all(second[sample] >= number for sample, number in first.items() if sample[0].endswith("_total"))


def test_events_of_a_refused_or_doubled_group_are_told_apart(sources: Sources) -> None:
    new, refused, known = make_event(), make_event(), make_event()
    outcome = Outcome(new={new.event_id}, refused={refused.event_id: "no"})
    sources.inbox.tally.note_stored([new, new, refused, known], outcome)
    found = read(sources)
    assert found.value("events_accepted_total", site="shop") == 1
    assert found.value("events_duplicate_total", site="shop") == 2


def test_events_that_nothing_takes_are_counted(sources: Sources) -> None:
    sources.inbox.close()
    sources.inbox.submit([make_event(), make_event()], lambda _: None)
    assert read(sources).value("events_turned_away_total") == 2


# -- what goes out -----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(db: Database, conn: Conn, s3: S3Server, tmp_path: Path) -> World:
    return World(db, conn, s3, tmp_path)


def run(world: World, *, down: bool = False) -> None:
    exporter = world.exporter()
    if down:
        watch(exporter, failing(DOWN), "vault")
    assert run_apart(exporter).failed is down


def test_exports_are_told_by_job_and_bucket(world: World, sources: Sources) -> None:
    store_events(world.db, 3)
    run(world, down=True)
    run(world, down=True)
    found = read(sources)
    vault, client = {"export": "acme", "bucket": "vault"}, {"export": "acme", "bucket": "client"}
    assert found.value("export_pending_events", export="acme") == 3
    assert found.value("export_bucket_errors_total", **vault) == found.value("export_bucket_failing", **vault) == 2
    assert found.value("export_bucket_pending_batches", **vault) == 1
    assert found.value("export_bucket_success_timestamp_seconds", **vault) is None
    assert found.value("export_bucket_batches_total", **client) == 1
    assert found.value("export_bucket_errors_total", **client) == 0
    assert found.value("export_runs_total", export="acme", outcome="failed") == 2
    run(world)
    found = read(sources)
    assert found.value("export_pending_events", export="acme") == 0
    assert found.value("export_oldest_timestamp_seconds", export="acme") is None
    # What failed has failed, and is wrong no longer.
    assert found.value("export_bucket_errors_total", **vault) == 2
    assert found.value("export_bucket_failing", **vault) == 0
    (size,) = world.conn.execute("SELECT sum(bytes) FROM export_objects").fetchone() or (0,)
    for labels in (vault, client):
        assert found.value("export_bucket_bytes_total", **labels) == size > 0
        last = found.value("export_bucket_success_timestamp_seconds", **labels) or 0
        assert abs(last - datetime.now(UTC).timestamp()) < 60
    assert found.value("export_runs_total", export="acme", outcome="done") == 1
    assert found.value("export_events_total", export="acme") == 3
    assert found.value("export_run_seconds_count", export="acme") == 3


def test_runs_that_the_ledger_forgets_stay_counted(db: Database) -> None:
    reader = LedgerReader(db)

    def end_runs(number: int) -> None:
        with db.connection() as conn:
            for _ in range(number):
                runs.finish(conn, runs.start(conn, "acme"), failed=False, batches=1, row_count=2, message="")

    def counted() -> tuple[int, int, int]:
        def tally() -> Any:
            found = reader.read()
            assert found
            return found.runs.get("acme")

        one = wait_for(tally, "the runs to be read")
        return one.outcomes["done"], one.batches, one.events

    end_runs(400)
    assert counted() == (400, 400, 800)
    end_runs(400)
    with db.connection() as conn:
        runs.start(conn, "acme")
    wait_for(lambda: counted() == (800, 800, 1600), "all runs to be counted, and the one that runs not")


def test_a_second_scrape_right_after_the_first_asks_the_database_nothing(db: Database) -> None:
    reader = LedgerReader(db)
    first = reader.read()
    assert first is not None
    assert reader.read() is first


def oldest(conn: Conn) -> dict[str, tuple[int, datetime | None]]:
    return {one.job: (one.events, one.oldest) for one in figures.backlog(conn)}


def test_the_oldest_event_that_waits_is_the_oldest_that_is_not_in_all_buckets(world: World) -> None:
    now = datetime.now(UTC).replace(second=30, microsecond=0)

    def minutes_ago(number: int) -> datetime:
        return (now - timedelta(minutes=number)).replace(second=0)

    store_events(world.db, 2, created_at=now - timedelta(minutes=50))
    run(world)
    assert oldest(world.conn) == {"acme": (0, None)}
    store_events(world.db, 3, created_at=now - timedelta(minutes=40))
    # Sealed, and not in vault yet.
    run(world, down=True)
    assert oldest(world.conn) == {"acme": (3, minutes_ago(40))}
    # Not sealed; and older than what is, as events from the spool are.
    store_events(world.db, 4, created_at=now - timedelta(minutes=45), site_id="blog")
    assert oldest(world.conn) == {"acme": (7, minutes_ago(45))}
    with world.db.connection() as conn:
        counters.merge(conn)
    assert oldest(world.conn) == {"acme": (7, minutes_ago(45))}
    run(world)
    assert oldest(world.conn) == {"acme": (0, None)}


def test_what_waits_is_told_for_each_job_by_what_it_covers(world: World) -> None:
    world.jobs = {"acme": {"sites": ["*"], "client": "client"}, "blog": {"sites": ["blog"], "client": "vault"}}
    store_events(world.db, 2)
    store_events(world.db, 3, site_id="blog")
    world.exporter().sync_coverage()
    assert {job: events for job, (events, _) in oldest(world.conn).items()} == {"acme": 5, "blog": 3}
    assert not run_apart(world.exporter(), "blog").failed
    assert {job: events for job, (events, _) in oldest(world.conn).items()} == {"acme": 5, "blog": 0}
    # A job that is gone owes nothing that is not sealed.
    del world.jobs["acme"]
    world.exporter().sync_coverage()
    assert oldest(world.conn) == {"acme": (0, None), "blog": (0, None)}


def test_no_figure_is_read_from_the_events(world: World, sources: Sources, conninfo: str) -> None:
    store_events(world.db, 3)
    run(world, down=True)
    store_events(world.db, 2)
    with psycopg.connect(conninfo) as other:
        # Whoever read the table now would wait for this.
        other.execute("LOCK TABLE events_log IN ACCESS EXCLUSIVE MODE")
        found = read(sources)
    assert found.value("ledger_up") == 1
    assert found.value("export_pending_events", export="acme") == 5


def test_a_scrape_while_the_database_is_away_tells_what_is_known_without_it(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance(database={"url": "postgresql://nobody@127.0.0.1:1/none"}, admin={"token": TOKEN})
    command = [sys.executable, "-m", "appliance", "serve", "--config", str(box.write_config())]
    with (box.directory / "log").open("a") as log:
        box.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: status_of(f"{box.url}/health/live") == 200, "the web server")
    assert post(box, event(), event("blog")) == 202
    found = scrape(box)
    assert found.value("ledger_up") == found.value("database_up") == 0
    assert found.value("events_spooled_total", site="blog") == 1
    assert found.value("events_accepted_total", site="blog") == 1
    assert (found.value("spool_bytes") or 0) > 100
    assert found.value("export_pending_events", export="local") is None
