"""Stopping under load is quick and costs nothing that was acknowledged."""

import time
from collections.abc import Callable

import pytest
from conftest import Appliance, wait_for
from crowd import Crowd
from test_torture import assert_nothing_is_lost_or_doubled, load

pytestmark = pytest.mark.alone

__all__ = ["load"]


def test_under_load_it_stops_within_the_ten_seconds_of_docker_stop(
    appliance: Callable[..., Appliance],
    load: Crowd,
) -> None:
    box = appliance(collect={"requests_per_minute_per_site": 0}).start()
    load.start(box.url)
    wait_for(lambda: load.statuses()["200"] > 200, "the load")
    began = time.monotonic()
    assert box.stop() == 0
    assert time.monotonic() - began < 10
    box.start()
    load.stop()
    wait_for(box.ready, "the spool to be drained")
    assert_nothing_is_lost_or_doubled(box, load)
    # Shut down in order, PostgreSQL had nothing to recover.
    log = "".join(path.read_text() for path in (box.data_dir / "postgres" / "log").iterdir())
    assert "database system was shut down" in log
    assert "not properly shut down" not in log
