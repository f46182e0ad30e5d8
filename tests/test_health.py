"""/health: alive while the process is, ready unless events are lost or soon will be, and why not.

`appliance healthcheck` asks it for a container's engine.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psycopg
import pytest
from blows import frozen
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


@pytest.mark.parametrize("bind", ["127.0.0.1:{}", "0.0.0.0:{}", "localhost:{}", "[::1]:{}", "[::]:{}"])
def test_the_health_check_asks_where_the_configuration_lets_it_listen(
    appliance: Callable[..., Appliance], bind: str
) -> None:
    box = appliance()
    box.config["server"] = {"bind": bind.format(box.port)}
    box.launch()
    wait_for(lambda: box.run("healthcheck", check=False).returncode == 0, "the health check to succeed")
    assert json.loads(box.run("healthcheck", "--json").stdout)["ok"] is True
    assert box.run("healthcheck").stdout.endswith(f":{box.port}/health/live answers\n")


def test_the_health_check_succeeds_while_the_database_is_away(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    with frozen(box):
        assert box.run("healthcheck").returncode == 0


def test_the_health_check_fails_in_a_sentence_where_nothing_listens(appliance: Callable[..., Appliance]) -> None:
    done = appliance().run("healthcheck", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "/health/live does not answer: " in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_the_health_check_is_not_content_with_any_answer(appliance: Callable[..., Appliance]) -> None:
    box = appliance()
    # It answers 501 to everything.
    with HTTPServer(("127.0.0.1", box.port), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        done = box.run("healthcheck", "--json", check=False)
        other.shutdown()
    problem = f"{box.url}/health/live answers 501"
    assert (done.returncode, json.loads(done.stdout)["problem"]) == (1, problem)


def test_the_health_check_never_ends_with_the_exit_code_that_engines_reserve(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance()
    box.config["server"] = {"bind": "nowhere"}
    done = box.run("healthcheck", check=False)
    assert (done.returncode, done.stdout.partition(",")[0]) == (1, "the configuration is wrong")


def test_the_health_check_loads_nothing_heavy(tmp_path: Path) -> None:
    """It comes every half minute, for as long as the container lives."""
    heavy = {"apprise", "boto3", "flask", "gunicorn", "psycopg", "pyarrow", "rich"}
    program = (
        "import sys\n"
        "from appliance.cli import cli\n"
        "try: cli.main(['healthcheck'])\n"
        f"except SystemExit: print(sorted({heavy} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[1:] == ["[]"]


def test_while_the_database_is_frozen_those_who_ask_for_it_hold_nobody_up(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            assert http(box, "GET", "/health/ready").status == 200

    def seconds_of(path: str) -> float:
        before = time.monotonic()
        assert http(box, "GET", path).status == 200
        return time.monotonic() - before

    with frozen(box), ThreadPoolExecutor(24) as clients:
        asking = [clients.submit(ask) for _ in range(24)]
        time.sleep(3)
        # Those of the threads that asked first may have waited for a second.
        slowest = max(seconds_of("/health/live") for _ in range(30))
        ended.set()
        for one in asking:
            one.result(30)
    assert slowest < 1.5
