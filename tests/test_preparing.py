"""A database that answers and cannot be used: events wait in the spool, everybody is told why, it is tried again."""

import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from conftest import Appliance, http, wait_for
from test_serve import post

from appliance.store.migrations import SCHEMA_VERSION

SENTENCE = (
    f"the database has schema {SCHEMA_VERSION + 1}, this version of the appliance knows {SCHEMA_VERSION}: "
    "run the newer version that made it"
)
TOKEN = {"Authorization": "Bearer a-token-of-a-test"}


@pytest.fixture
def box(appliance: Callable[..., Appliance], conninfo: str) -> Appliance:
    return appliance(database={"url": conninfo}, admin={"token": "a-token-of-a-test"})


def make_newer(conn: psycopg.Connection[Any]) -> None:
    """Do what a newer version might."""
    conn.execute("UPDATE installation SET schema_version = schema_version + 1")
    conn.execute("ALTER TABLE export_runs RENAME outcome TO result")
    conn.execute("ALTER TABLE refusal_counts RENAME number TO how_many")


def make_right(conn: psycopg.Connection[Any]) -> None:
    conn.execute("ALTER TABLE export_runs RENAME result TO outcome")
    conn.execute("ALTER TABLE refusal_counts RENAME how_many TO number")
    conn.execute("UPDATE installation SET schema_version = schema_version - 1")


def notes(box: Appliance) -> list[str]:
    ready = http(box, "GET", "/health/ready")
    assert (ready.status, ready.json["status"]) == (200, "degraded")
    found: list[str] = ready.json["notes"]
    return found


def test_on_a_newer_schema_everybody_is_told_why_and_once_it_is_put_right_the_events_are_stored(
    box: Appliance, conn: psycopg.Connection[Any]
) -> None:
    make_newer(conn)
    box.begin()
    wait_for(lambda: SENTENCE in notes(box), "the reason")
    sent = [post(box), post(box)]
    found = notes(box)
    assert SENTENCE in found
    assert any("wait in the spool" in note for note in found)
    assert not [note for note in found if "scheduler" in note or "prepared" in note]
    for page in ("/admin/", "/admin/exports", "/admin/quarantine"):
        answer = http(box, "GET", page, headers=TOKEN)
        assert answer.status == 503
        assert answer.body.decode().count(SENTENCE) == 1
        assert "The database cannot be used." in answer.body.decode()
    status = box.run("status", check=False)
    assert (status.returncode, status.stderr) == (1, f"appliance: {SENTENCE}\n")
    # What was refused waits too.
    assert http(box, "POST", "/collect", b"{", {"Content-Type": "text/plain"}).status == 400
    assert conn.execute("SELECT count(*) FROM events_log").fetchone() == (0,)
    make_right(conn)
    box.wait_ready()
    stored = {str(event_id) for (event_id,) in conn.execute("SELECT event_id FROM events_log")}
    assert stored == set(sent)
    assert http(box, "GET", "/admin/", headers=TOKEN).status == 200
    wait_for(lambda: conn.execute("SELECT sum(number) FROM refusal_counts").fetchone() == (1,), "what was refused")
    # It has been tried more than once.
    assert box.log.count(f"ERROR appliance.store.preparing: {SENTENCE}; events go to the spool until then") == 1
    assert "Traceback" not in box.log


def test_with_a_spool_that_is_nearly_full_the_reason_stands_beside_it(
    appliance: Callable[..., Appliance], conninfo: str, conn: psycopg.Connection[Any]
) -> None:
    make_newer(conn)
    box = appliance(database={"url": conninfo}, collect={"spool_max_bytes": 1024 * 1024}).begin()
    event = json.dumps({"eventType": "click", "siteId": "shop", "text": "x" * 60_000}).encode()
    for _ in range(16):
        assert http(box, "POST", "/collect", event, {"Content-Type": "text/plain"}).status == 202
    ready = http(box, "GET", "/health/ready")
    assert ready.status == 503
    assert ready.json["problems"] == [
        "the database is away and the spool is nearly full",
        SENTENCE,
    ]
