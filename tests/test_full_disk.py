"""A disk that is full, for real: what was acknowledged is kept, and all is well by itself once there is room again."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from conftest import Answer, Appliance, http, wait_for
from test_serve import stored

from appliance.store.embedded import EmbeddedPostgres

# What PostgreSQL needs on so small a disk, and room to fill.
DISK_BYTES = 400 << 20
BLOCK = b"x" * (1 << 20)


@pytest.fixture
def disk() -> Iterator[Callable[[Path], Path]]:
    """Put small disks in the place of directories."""
    mounted: list[Path] = []

    def mount(directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(directory)]
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("only root can mount a disk, and not everywhere")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that is left; deleting the file gives it back."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(BLOCK):
            pass
    assert os.statvfs(disk).f_bavail == 0
    return filler


def send(box: Appliance) -> tuple[str, Answer]:
    """Send one event that takes some room."""
    event_id = str(uuid4())
    event = {"eventType": "click", "siteId": "shop", "eventId": event_id, "text": os.urandom(8_000).hex()}
    return event_id, http(box, "POST", "/collect", json.dumps(event).encode(), {"Content-Type": "text/plain"})


def send_until(box: Appliance, status: int) -> list[str]:
    """Send events until one is answered so; return those that were acknowledged."""
    acknowledged = []
    for _ in range(2_000):
        event_id, answer = send(box)
        assert answer.status in (200, 202, 503)
        if answer.status != 503:
            acknowledged.append(event_id)
        if answer.status == status:
            return acknowledged
    raise AssertionError(f"nothing was answered {status}")


def exhaust_the_log(box: Appliance) -> None:
    """Make PostgreSQL ask for room for its log: where there is none, it panics."""
    conninfo = EmbeddedPostgres(box.data_dir).conninfo
    with suppress(psycopg.OperationalError), psycopg.connect(conninfo, autocommit=True) as conn:
        for _ in range(200):
            conn.execute("SELECT pg_logical_emit_message(false, 'test', repeat('x', 1000000))")


def test_with_the_disk_of_postgres_full_events_go_to_the_spool_and_come_back_from_it(
    appliance: Callable[..., Appliance], disk: Callable[[Path], Path]
) -> None:
    box = appliance().start()
    assert box.stop() == 0
    cluster = box.data_dir / "postgres"
    cluster.rename(box.data_dir / "elsewhere")
    shutil.copytree(box.data_dir / "elsewhere", disk(cluster), dirs_exist_ok=True)
    box.start()
    filler = fill(cluster)
    acknowledged = send_until(box, 202)

    def panics() -> bool:
        # Its log may find room once more where a checkpoint ends in between.
        exhaust_the_log(box)
        return "PostgreSQL ended" in box.log

    wait_for(panics, "PostgreSQL to panic")
    acknowledged += [event_id for event_id, answer in (send(box) for _ in range(20)) if answer.status == 202]
    assert len(acknowledged) > 20
    filler.unlink()
    # It is started again after half a minute at the latest.
    wait_for(box.ready, "the spool to be drained", seconds=90)
    assert stored(box) == sorted(acknowledged)


def test_with_the_only_disk_full_events_are_refused_for_a_while_and_none_that_was_acknowledged_is_lost(
    appliance: Callable[..., Appliance], disk: Callable[[Path], Path]
) -> None:
    box = appliance()
    disk(box.data_dir)
    box.start()
    filler = fill(box.data_dir)
    acknowledged = send_until(box, 503)
    _, refused = send(box)
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) > 0
    assert http(box, "GET", "/health/ready").json["problems"] == ["the disk of the data directory is nearly full"]
    exhaust_the_log(box)
    filler.unlink()
    wait_for(box.ready, "the appliance to be well again", seconds=90)
    acknowledged += send_until(box, 200)
    wait_for(box.ready, "the spool to be drained")
    assert set(acknowledged) <= set(stored(box))
    assert len(stored(box)) == len(set(stored(box)))
