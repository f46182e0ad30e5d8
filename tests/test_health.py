"""/health: alive while the process is, ready unless events are lost or soon will be, and why not."""

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psycopg
from conftest import Appliance, http, make_event, wait_for
from test_serve import status_of

from appliance.store import events
from appliance.store.embedded import EmbeddedPostgres


def test_a_disk_that_is_nearly_full_is_not_ready_and_collects_on(appliance: Callable[..., Appliance]) -> None:
    box = appliance(health={"min_free_disk_bytes": 2**60})
    command = [sys.executable, "-m", "appliance", "serve", "--config", str(box.write_config())]
    with (box.directory / "log").open("a") as log:
        box.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: status_of(f"{box.url}/health/live") == 200, "the web server")
    ready = http(box, "GET", "/health/ready")
    assert ready.status == 503
    assert ready.json == {"status": "not ready", "problems": ["the disk of the data directory is nearly full"]}
    event = b'{"eventType": "click", "siteId": "shop"}'
    assert http(box, "POST", "/collect", event, {"Content-Type": "text/plain"}).status in (200, 202)


def test_exports_that_are_too_late_are_not_ready_and_named_without_the_job(
    appliance: Callable[..., Appliance],
) -> None:
    # Its next run is the better part of an hour away.
    schedule = f"{(datetime.now(UTC) - timedelta(minutes=5)).minute} * * * *"
    buckets = {"acme": {"kind": "directory", "path": "/nonexistent"}}
    box = appliance(
        health={"max_export_lag_minutes": 30},
        buckets=buckets,
        exports={"acme": {"client": "acme", "schedule": schedule}},
    ).start()
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        events.copy_in(conn, [make_event(created_at=datetime.now(UTC) - timedelta(hours=3))])
    wait_for(lambda: http(box, "GET", "/health/ready").status == 503, "the next look")
    problems = http(box, "GET", "/health/ready").json["problems"]
    assert problems == ["exports are later than health.max_export_lag_minutes"]
