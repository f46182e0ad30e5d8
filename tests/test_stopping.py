"""Stopping under load is quick and costs nothing that was acknowledged."""

import time
from collections.abc import Callable

import psycopg
import pytest
from conftest import Appliance, wait_for
from crowd import Crowd
from test_torture import assert_nothing_is_lost_or_doubled, load

from appliance.store.embedded import EmbeddedPostgres

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
    assert_it_was_shut_down_in_order(box)


def test_a_transaction_that_somebody_has_left_open_in_the_database_does_not_keep_it_from_stopping(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance().start()
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as somebody:
        somebody.execute("UPDATE installation SET id = id")
        began = time.monotonic()
        assert box.stop() == 0
        assert time.monotonic() - began < 10
        with pytest.raises(psycopg.OperationalError, match="terminating connection due to administrator command"):
            somebody.execute("SELECT 1")
    assert_it_was_shut_down_in_order(box.start())


def assert_it_was_shut_down_in_order(box: Appliance) -> None:
    """Hold that PostgreSQL had nothing to recover when it was started again."""
    log = "".join(path.read_text() for path in (box.data_dir / "postgres" / "log").iterdir())
    assert "database system was shut down" in log
    assert "not properly shut down" not in log
