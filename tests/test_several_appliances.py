"""Several appliances on one PostgreSQL: each takes events in, each job is run once, and any of them may die."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import psutil
import psycopg
import pytest
from conftest import Appliance, S3Server, http, store_events, wait_for
from exporting import CrashError, World, watch
from faulty import Fault, faulty
from load import CHANCE, REPEATS, new_connection, number_of_events, post
from test_export_process import held
from test_scheduler import Clock

from appliance.store import counters, runs
from appliance.store.database import Database
from appliance.store.runs import LEASE_SECONDS, RENEW_LEASE_SECONDS

TOKEN = "token-of-a-script"
JOB = "export acme"


# -- several clocks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two(db: Database, tmp_path: Path) -> Iterator[tuple[Clock, Clock]]:
    """The schedulers of two appliances."""
    pair = Clock(db, tmp_path, "acme"), Clock(db, tmp_path, "acme")
    for one in pair:
        one.scheduler.start()
    yield pair
    for one in pair:
        one.scheduler.stop(10)


def come_due(clock: Clock, moment: datetime, name: str = JOB) -> None:
    """Let the clock's line come due for this moment, and wait until it has noticed."""
    clock.scheduler._scheduler.modify_job(name, next_run_time=moment)  # noqa: SLF001
    wait_for(lambda: clock.scheduler._scheduler.get_job(name).next_run_time != moment, "the line")  # noqa: SLF001


def test_what_one_appliance_has_run_for_a_moment_no_other_runs_for_it(two: tuple[Clock, Clock], db: Database) -> None:
    now = datetime.now(UTC)
    for number, moment in enumerate((now - timedelta(minutes=2), now - timedelta(minutes=1)), 1):
        one, other = two if number == 1 else reversed(two)
        store_events(db, 2)
        come_due(one, moment)
        one.wait_run("acme", number)
        # Were it run by the other too, these would be exported.
        store_events(db, 2)
        come_due(other, moment)
        other.scheduler.stop(10) if number == 2 else wait_idle(other)
        assert one.outcomes("acme") == ["done"] * number
        assert one.manifests("acme") == number


def wait_idle(clock: Clock) -> None:
    """Wait until the job that has come due is done with."""
    wait_for(lambda: "acme" not in clock.scheduler._under_way and not clock.scheduler._running, "the run")  # noqa: SLF001


def test_a_job_that_its_appliance_has_left_behind_another_ends(two: tuple[Clock, Clock], db: Database) -> None:
    dying, other = two
    begun, dies = threading.Event(), threading.Event()

    @contextmanager
    def die(call: str) -> Iterator[None]:
        if call == "put":
            begun.set()
            assert dies.wait(30)
            raise CrashError
        yield

    watch(dying.exporter, die, "acme")
    store_events(db, 2)
    now = datetime.now(UTC)
    come_due(dying, now)
    assert begun.wait(30)
    come_due(other, now)
    wait_for(lambda: other.scheduler._elsewhere, "the other to see that it is under way")  # noqa: SLF001
    wait_idle(other)
    come_due(other, now + timedelta(microseconds=1), "retries")
    wait_idle(other)
    assert other.manifests("acme") == 0
    dies.set()
    wait_idle(dying)
    come_due(other, datetime.now(UTC), "retries")
    wait_for(lambda: other.outcomes("acme")[0] == "done", "the other to go on")
    assert other.outcomes("acme") == ["done", "failed"]
    assert other.manifests("acme") == 1


def test_a_run_that_was_cut_off_or_made_by_hand_is_not_taken_for_one_that_was_due(db: Database) -> None:
    now = datetime.now(UTC)
    with db.connection() as conn:
        by_hand = runs.start(conn, "acme")
        runs.finish(conn, by_hand, failed=False, batches=0, row_count=0, message="")
        runs.start(conn, "acme")
        second = runs.start(conn, "acme")
        assert not runs.is_done(conn, "acme", now)
        runs.finish(conn, second, failed=True, batches=0, row_count=0, message="a bucket is down", due=now)
        assert runs.is_done(conn, "acme", now)
        assert not runs.is_done(conn, "acme", now + timedelta(seconds=1))


def test_a_clock_that_is_a_day_ahead_keeps_no_other_appliance_from_running_jobs(db: Database) -> None:
    now = datetime.now(UTC)
    with db.connection() as conn:
        run = runs.start(conn, "acme")
        runs.finish(conn, run, failed=False, batches=0, row_count=0, message="", due=now + timedelta(days=1))
        assert not runs.is_done(conn, "acme", now + timedelta(minutes=5))


def test_counters_that_all_merge_at_once_count_nothing_twice(db: Database, conn: psycopg.Connection[Any]) -> None:
    long_ago = datetime.now(UTC).replace(second=0) - timedelta(hours=1)
    for _ in range(40):
        store_events(db, 1, created_at=long_ago)
        store_events(db, 1, created_at=long_ago, site_id="blog")

    def merge(_number: int) -> None:
        with db.connection() as connection:
            counters.merge(connection)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(merge, range(8)))
    query = "SELECT site_id, count(*), sum(events) FROM event_counts GROUP BY 1 ORDER BY 1"
    assert conn.execute(query).fetchall() == [("blog", 1, 40), ("shop", 1, 40)]


# -- real appliances --------------------------------------------------------------------------------------------------


class Clients:
    """Threads that spread their requests over all appliances in turn, as a load balancer does.

    One request in so many repeats the one before, at another appliance.
    """

    def __init__(self, boxes: list[Appliance]) -> None:
        self._boxes = boxes
        self._ended = threading.Event()
        self.acknowledged: set[str] = set()
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(3)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for_more(self) -> None:
        """Wait until more events were acknowledged."""
        before = len(self.acknowledged)
        wait_for(lambda: len(self.acknowledged) > before + 50, "events to be acknowledged")

    def _send(self, number: int) -> None:
        connections = [new_connection(box.url) for box in self._boxes]
        turns = cycle(connections[number:] + connections[:number])
        sent: list[str] = []
        while not self._ended.wait(0.02):
            repeats = sent and CHANCE.randrange(REPEATS) == 0
            sent = sent if repeats else [str(uuid4()) for _ in range(number_of_events())]
            connection = next(turns)
            if post(connection, sent) in {200, 202}:
                self.acknowledged |= set(sent)
            else:
                connection.close()
        for connection in connections:
            connection.close()


@pytest.fixture
def world(db: Database, conn: psycopg.Connection[Any], s3: S3Server, tmp_path: Path) -> World:
    one = World(db, conn, s3, tmp_path)
    one.jobs["acme"]["schedule"] = "* * * * *"
    return one


@pytest.fixture
def boxes(appliance: Callable[..., Appliance], world: World) -> list[Appliance]:
    """Three appliances on one database, with the same configuration and data directories of their own."""
    return started(appliance, world, 3)


def started(appliance: Callable[..., Appliance], world: World, number: int) -> list[Appliance]:
    config: dict[str, Any] = {
        "database": {"url": world.db.conninfo},
        "admin": {"token": TOKEN},
        "buckets": world.tables,
        "exports": world.jobs,
    }
    made = [appliance(**config).launch() for _ in range(number)]
    for box in made:
        box.wait_ready()
    return made


def run_by_hand(box: Appliance) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-www-form-urlencoded"}
    assert http(box, "POST", "/admin/exports/run", b"job=acme", headers).status in {302, 303}


def runner_of(box: Appliance) -> psutil.Process | None:
    """Return the process of an export that this appliance runs."""
    assert box.process is not None
    children = psutil.Process(box.process.pid).children(recursive=True)
    return next((child for child in children if "appliance.export.process" in command_of(child)), None)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def kill_who_exports(boxes: list[Appliance], conn: psycopg.Connection[Any]) -> Appliance:
    """Let all run the job at once, kill the appliance that does in the middle of it, and return that."""
    left = f"{JOB}: another run of this job is under way"
    before = {box.port: len(box.log) for box in boxes}
    with held(conn.info.dsn):
        for box in boxes:
            run_by_hand(box)
        wait_for(lambda: sum(left in box.log[before[box.port] :] for box in boxes) == 2, "two to leave it to one")
        (runs_it,) = [box for box in boxes if left not in box.log[before[box.port] :]]
        wait_for(lambda: runner_of(runs_it), "its run").kill()
        runs_it.kill()
    # Another test waits for that: half a minute is long.
    assert conn.execute("UPDATE export_leases SET expires_at = now()").rowcount == 1
    return runs_it


def has_run(conn: psycopg.Connection[Any], after: int) -> bool:
    query = "SELECT count(*) FROM export_runs WHERE id > %s AND outcome = 'done'"
    return conn.execute(query, (after,)).fetchone() != (0,)


def last_run(conn: psycopg.Connection[Any]) -> int:
    return int((conn.execute("SELECT coalesce(max(id), 0) FROM export_runs").fetchone() or (0,))[0])


def test_whichever_appliance_dies_or_stops_all_is_kept_once_and_each_batch_is_written_once(
    boxes: list[Appliance], world: World, conn: psycopg.Connection[Any]
) -> None:
    with Clients(boxes) as clients:
        clients.wait_for_more()
        killed = kill_who_exports(boxes, conn)
        stopped, stays = [box for box in boxes if box is not killed]
        clients.wait_for_more()
        run = last_run(conn)
        run_by_hand(stays)
        assert stopped.stop() == 0
        wait_for(lambda: has_run(conn, run), "the one that stays to end what the dead one has begun")
        clients.wait_for_more()
        killed.start()
        stopped.start()
        come_to_a_moment_of_the_schedule(boxes)
    for box in boxes:
        box.wait_ready()
    assert not clients.acknowledged - world.rows().keys()
    stays.run("export")
    assert len(world.check()) >= 2
    assert conn.execute("SELECT DISTINCT count(*) FROM export_runs WHERE due IS NOT NULL GROUP BY due").fetchall() == [
        (1,)
    ]
    for box in boxes:
        assert json.loads(box.run("verify", "--json").stdout)[0]["findings"] == []


def test_when_one_dies_between_the_buckets_another_waits_for_its_lease_and_goes_on(
    appliance: Callable[..., Appliance], world: World, conn: psycopg.Connection[Any]
) -> None:
    world.jobs["acme"]["schedule"] = "0 0 1 1 *"
    with faulty(world.s3.endpoint, Fault("PUT ", hang=True)) as vault:
        world.tables["vault"]["endpoint_url"] = vault.url
        dying, other = started(appliance, world, 2)
        store_events(world.db, 20)
        run_by_hand(dying)
        wait_for(lambda: vault.count("PUT ") and world.contents("client"), "one of two buckets to have an object")
        wait_for(lambda: runner_of(dying), "its run").kill()
        dying.kill()
        assert not world.contents("vault")
        vault.faults.clear()
        left, began = lease_seconds(conn), time.monotonic()
        other.run("export")
        waited = time.monotonic() - began
    assert left > LEASE_SECONDS - RENEW_LEASE_SECONDS - 5
    assert left - 1 < waited < left + 15
    assert len(world.check()) == 1


def lease_seconds(conn: psycopg.Connection[Any]) -> float:
    """Return for how long the job's lease will hold others off."""
    ((left,),) = conn.execute("SELECT extract(epoch FROM expires_at - clock_timestamp()) FROM export_leases").fetchall()
    return float(left)


def come_to_a_moment_of_the_schedule(boxes: list[Appliance]) -> None:
    """Wait until the job has come due on every appliance, and was run or left to another."""
    before = {box.port: len(box.log) for box in boxes}
    for box in boxes:
        wait_for(partial(has_logged, box, before[box.port]), "the job to come due", seconds=75)


def has_logged(box: Appliance, start: int) -> bool:
    return f"{JOB}: " in box.log[start:]
