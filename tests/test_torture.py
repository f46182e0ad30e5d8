"""Load from several processes while parts are killed and frozen at random: what was acknowledged is there, once.

`make torture` runs the same for longer (TORTURE_ROUNDS, OUTAGE_SECONDS).
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from blows import BLOWS, frozen
from conftest import Appliance, wait_for
from crowd import Crowd

from appliance.store.embedded import EmbeddedPostgres

pytestmark = pytest.mark.alone

ROUNDS = int(os.environ.get("TORTURE_ROUNDS", "8"))
OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "10"))


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Crowd]:
    directory = tmp_path / "load"
    directory.mkdir()
    one = Crowd(directory)
    yield one
    for process in one.processes:
        process.kill()


def stored(box: Appliance) -> Counter[str]:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        return Counter(str(row[0]) for row in conn.execute("SELECT event_id FROM events_log"))


def assert_nothing_is_lost_or_doubled(box: Appliance, load: Crowd) -> None:
    found, acknowledged = stored(box), load.acknowledged()
    missing = acknowledged - found.keys()
    doubled = [one for one, number in found.items() if number > 1]
    print(f"acknowledged {len(acknowledged)}, missing {len(missing)}, doubled {len(doubled)}, {load.statuses()}")  # noqa: T201
    assert acknowledged
    assert (len(missing), doubled) == (0, [])


def test_whatever_is_killed_nothing_acknowledged_is_lost_and_nothing_is_stored_twice(
    appliance: Callable[..., Appliance], load: Crowd
) -> None:
    seed = int(os.environ.get("TORTURE_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")  # noqa: T201 - shown when it fails
    chance = random.Random(seed)  # noqa: S311 - no secrets are made of it
    box = appliance().start()
    load.start(box.url)
    # Each blow at least once before any comes again.
    blows = [blow for _ in range(0, ROUNDS, len(BLOWS)) for blow in chance.sample(BLOWS, len(BLOWS))]
    for blow in blows[:ROUNDS]:
        time.sleep(chance.uniform(0.3, 1.5))
        print(blow.__name__)  # noqa: T201 - shown when it fails
        blow(box)
        wait_for(box.ready, "the appliance to be ready again")
    time.sleep(0.5)
    load.stop()
    wait_for(box.ready, "the spool to be drained")
    assert_nothing_is_lost_or_doubled(box, load)


def test_while_the_database_is_stopped_under_load_nobody_is_refused_and_all_is_stored_once_afterwards(
    appliance: Callable[..., Appliance], load: Crowd
) -> None:
    # What it can take, and not what one site may send.
    box = appliance(collect={"requests_per_minute_per_site": 0}).start()
    load.start(box.url)
    time.sleep(1)
    with frozen(box):
        time.sleep(OUTAGE_SECONDS)
        during = load.statuses()
    # Under a load that leaves nothing idle it takes about as long as it was away.
    wait_for(box.ready, "the spool to be drained", seconds=60 + 3 * OUTAGE_SECONDS)
    time.sleep(1)
    load.stop()
    wait_for(box.ready, "the spool to be drained")
    assert during["202"] > OUTAGE_SECONDS
    assert load.statuses().keys() <= {"200", "202"}
    assert_nothing_is_lost_or_doubled(box, load)
