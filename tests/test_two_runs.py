"""Two runs of one job at once, in two processes that both think they hold the lease."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import S3Server, store_events
from exporting import World
from forks import SMALL_AND_HASTY, Forks, forks

from appliance.store.database import Database

ROUNDS = 12


@pytest.fixture
def world(
    db: Database, conn: psycopg.Connection[Any], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    for module, name, value in SMALL_AND_HASTY:
        monkeypatch.setattr(module, name, value)
    return World(db, conn, s3, tmp_path)


@pytest.fixture
def both() -> Iterator[list[Forks]]:
    with ExitStack() as stack:
        yield [stack.enter_context(forks()) for _ in range(2)]


def test_two_processes_that_run_one_job_at_once_end_right(world: World, both: list[Forks]) -> None:
    for _ in range(ROUNDS):
        for site in ("shop", "blog", "shop", "blog"):
            store_events(world.db, 2, site_id=site)
        for one in both:
            one.start(world.settings(), world.db.conninfo, "acme")
        # One may meet a batch of the other that is not far enough yet; what counts is what comes of it.
        assert {one.wait() for one in both} <= {0, 1}
        world.check_claims()
    # They did meet: neither left the work to the other.
    query = "SELECT count(*), count(*) FILTER (WHERE batches > 0) FROM export_runs"
    runs, useful = world.conn.execute(query).fetchone() or (0, 0)
    assert runs == 2 * ROUNDS
    assert useful > ROUNDS
    assert not world.export().failed
    world.check()
    assert world.conn.execute("SELECT 1 FROM events_log WHERE exported_at IS NULL").fetchone() is None
