"""Whatever call of a run goes wrong, in whatever way: after the next run each event stands once in both buckets.

`make torture` takes each statement for a call, not only what ends a transaction (FAULT_POINTS=all, calls.py).
"""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from calls import Blow, Calls, bucket_door, postgres_door
from conftest import S3Server, database, store_events
from exporting import Contents, World, crash, world_of
from forks import SMALL_AND_HASTY, Forks, forks
from psycopg.conninfo import make_conninfo

from appliance.errors import ApplianceError
from appliance.export.job import Exporter
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres

# How long a call of a bucket, or of the database, may hang.
PATIENCE_SECONDS = 0.3


@pytest.fixture(scope="module", autouse=True)
def _small_and_hasty() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in SMALL_AND_HASTY:
            patch.setattr(module, name, value)
        yield


@dataclass(frozen=True)
class Doors:
    """The ways of the run in which a call goes wrong."""

    calls: Calls
    s3_url: str
    postgres: str
    forks: Forks


@pytest.fixture(scope="module")
def doors(postgres: EmbeddedPostgres, s3: S3Server) -> Iterator[Doors]:
    calls = Calls()
    with (
        # The address of a socket has room for a short name only.
        tempfile.TemporaryDirectory() as short,
        postgres_door(
            postgres.socket_dir, Path(short) / "door", calls, patience_seconds=PATIENCE_SECONDS
        ) as postgres_host,
        bucket_door(s3.endpoint, calls) as s3_door,
        forks() as forked,
    ):
        yield Doors(calls, s3_door.url, postgres_host, forked)


@dataclass(frozen=True)
class Start:
    """What each case begins from."""

    database: str
    contents: dict[str, Contents]


@pytest.fixture(scope="module")
def start(postgres: EmbeddedPostgres, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Lay down a batch of two sites with one object in both buckets, and rows that are to be another batch."""
    name = f"start_{uuid4().hex}"
    with database(postgres, "template_of_tests", name):
        with world_of(postgres, name, s3, tmp_path_factory.mktemp("start")) as world:
            for site in ("shop", "blog", "shop"):
                store_events(world.db, 1, site_id=site)
            crash(world, at=3)
            for site in ("shop", "blog"):
                store_events(world.db, 1, site_id=site)
            contents = world.everything()
        assert [len(objects) for objects in contents.values()] == [1, 1]
        yield Start(name, contents)


@contextmanager
def case(postgres: EmbeddedPostgres, s3: S3Server, start: Start, directory: Path) -> Iterator[World]:
    """Begin from the start once more, with buckets of its own."""
    name = f"case_{uuid4().hex}"
    with database(postgres, start.database, name), world_of(postgres, name, s3, directory) as world:
        for bucket, contents in start.contents.items():
            for key, body in contents.items():
                world.s3.client().put_object(Bucket=world.names[bucket], Key=key, Body=body)
        yield world


def run_through(doors: Doors, world: World) -> None:
    """Run the job where its calls are numbered, and let it end as it may."""
    dying = copy.copy(world)
    dying.directory = world.directory / "dying"
    patience = {"read_timeout_seconds": PATIENCE_SECONDS} if doors.calls.blow is Blow.HANGS else {}
    dying.tables = {n: {**table, "endpoint_url": doors.s3_url, **patience} for n, table in world.tables.items()}
    conninfo = make_conninfo(world.db.conninfo, host=doors.postgres)
    if doors.calls.blow is Blow.KILLS:
        doors.calls.victim.set_result(doors.forks.start(dying.settings(), conninfo, "acme"))
        assert (doors.forks.wait() < 0) == doors.calls.struck
        return
    with Database(conninfo) as db, suppress(ApplianceError):
        Exporter(dying.settings(), db, conninfo=conninfo).run("acme")


@pytest.fixture(scope="module")
def calls_of_a_run(
    postgres: EmbeddedPostgres, s3: S3Server, doors: Doors, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> int:
    """How many calls a run makes in which none goes wrong."""
    doors.calls.begin(0, Blow.FAILS)
    with case(postgres, s3, start, tmp_path_factory.mktemp("whole")) as world:
        run_through(doors, world)
        check(world)
    return len(doors.calls.names)


@pytest.mark.parametrize("blow", Blow, ids=lambda blow: f"call {blow.value}")
def test_whatever_call_of_a_run_goes_wrong_the_next_run_puts_it_right(  # noqa: PLR0913, PLR0917
    postgres: EmbeddedPostgres,
    s3: S3Server,
    doors: Doors,
    start: Start,
    calls_of_a_run: int,
    tmp_path: Path,
    blow: Blow,
) -> None:
    assert calls_of_a_run > 70
    number, runs = 1, 0
    while number <= calls_of_a_run:
        runs += 1
        # Where patience is short, a busy machine ends a run before its blow; its number is tried again.
        assert runs < 2 * calls_of_a_run, f"no run comes as far as call {number}"
        doors.calls.begin(number, blow)
        with case(postgres, s3, start, tmp_path / str(runs)) as world:
            run_through(doors, world)
            with telling(doors.calls):
                check(world)
            number += doors.calls.struck
    print(f"{calls_of_a_run} calls")  # noqa: T201


def check(world: World) -> None:
    world.check_claims()
    before = world.everything()
    assert not world.export().failed
    assert all(before[name].items() <= world.contents(name).items() for name in before)
    world.check_claims()
    assert len(world.check()) == 2
    assert world.conn.execute("SELECT 1 FROM events_log WHERE exported_at IS NULL").fetchone() is None


@contextmanager
def telling(calls: Calls) -> Iterator[None]:
    """Say with what fails which call went wrong."""
    try:
        yield
    except Exception as error:
        if calls.struck:
            error.add_note(f"call {calls.at} {calls.blow.value}: {calls.name}")
        raise
