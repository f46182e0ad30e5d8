"""Load from several processes while parts are killed and frozen at random: what was acknowledged is there, once.

`make torture` runs the same for longer (TORTURE_ROUNDS, OUTAGE_SECONDS).
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg
import pytest
from conftest import Appliance, wait_for

from appliance.store.embedded import EmbeddedPostgres

pytestmark = pytest.mark.alone

ROUNDS = int(os.environ.get("TORTURE_ROUNDS", "8"))
OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "10"))
CLIENTS = 3
THREADS = 4


@dataclass
class Load:
    """Client processes and what they have noted."""

    directory: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, url: str) -> None:
        command = [sys.executable, str(Path(__file__).parent / "load.py"), url]
        for number in range(CLIENTS):
            notes = str(self.directory / f"notes{number}")
            process = subprocess.Popen([*command, notes, str(THREADS)], stdin=subprocess.PIPE, text=True)
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            assert process.wait(90) == 0
        self.processes.clear()

    def answers(self) -> list[tuple[str, list[str]]]:
        """Return status and acknowledged ids of every request."""
        lines = [line.split() for path in self.directory.glob("notes*") for line in path.read_text().splitlines()]
        return [(words[0], words[1:]) for words in lines if words]

    def acknowledged(self) -> set[str]:
        return {one for _, ids in self.answers() for one in ids}

    def statuses(self) -> Counter[str]:
        return Counter(status for status, _ in self.answers())


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    directory = tmp_path / "load"
    directory.mkdir()
    one = Load(directory)
    yield one
    for process in one.processes:
        process.kill()


def stored(box: Appliance) -> Counter[str]:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        return Counter(str(row[0]) for row in conn.execute("SELECT event_id FROM events_log"))


def assert_nothing_is_lost_or_doubled(box: Appliance, load: Load) -> None:
    found, acknowledged = stored(box), load.acknowledged()
    missing = acknowledged - found.keys()
    doubled = [one for one, number in found.items() if number > 1]
    print(f"acknowledged {len(acknowledged)}, missing {len(missing)}, doubled {len(doubled)}, {load.statuses()}")  # noqa: T201
    assert acknowledged
    assert (len(missing), doubled) == (0, [])


def worker_of(box: Appliance) -> psutil.Process:
    """The process that answers: the child of gunicorn's arbiter, a child of the supervisor as PostgreSQL is."""
    assert box.process is not None
    (arbiter,) = [child for child in psutil.Process(box.process.pid).children() if "postgres" not in child.name()]
    return wait_for(lambda: next(iter(arbiter.children()), None), "a worker")  # type: ignore[no-any-return]


def postgres_of(box: Appliance) -> list[psutil.Process]:
    """The postmaster and all its processes."""
    pid = wait_for(lambda: EmbeddedPostgres(box.data_dir).running_pid(), "PostgreSQL")
    postmaster = psutil.Process(pid)
    return [postmaster, *postmaster.children(recursive=True)]


def kill_worker(box: Appliance) -> None:
    worker_of(box).kill()


def kill_server(box: Appliance) -> None:
    box.kill()
    box.start()


def kill_postmaster(box: Appliance) -> None:
    postgres_of(box)[0].kill()


def kill_postgres(box: Appliance) -> None:
    each(postgres_of(box), signal.SIGKILL)


def kill_everything(box: Appliance) -> None:
    processes = postgres_of(box)
    box.kill()
    each(processes, signal.SIGKILL)
    box.start()


def freeze_postgres(box: Appliance) -> None:
    with frozen(box):
        time.sleep(3)


def restart(box: Appliance) -> None:
    assert box.stop() == 0
    box.start()


def each(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


@contextmanager
def frozen(box: Appliance) -> Iterator[None]:
    """Stop PostgreSQL in its tracks: it neither answers nor closes anything."""
    processes = postgres_of(box)
    each(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        each(processes, signal.SIGCONT)


BLOWS = [kill_worker, kill_server, kill_postmaster, kill_postgres, kill_everything, freeze_postgres, restart]


def test_whatever_is_killed_nothing_acknowledged_is_lost_and_nothing_is_stored_twice(
    appliance: Callable[..., Appliance], load: Load
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
    appliance: Callable[..., Appliance], load: Load
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
