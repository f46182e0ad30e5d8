"""A PostgreSQL that recovers for long: events go to the spool, everybody is told, and nobody gives up."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Appliance, http, wait_for
from test_serve import post, stored

from appliance.errors import StartError
from appliance.store import embedded
from appliance.store.embedded import EmbeddedPostgres


@contextmanager
def held_in_recovery(cluster: Path) -> Iterator[Callable[[], None]]:
    """Let the next start of a stopped server last until it is let go: its startup process reads from an empty pipe."""
    pipe = cluster / "pg_stat" / "pgstat.stat"
    pipe.unlink()
    os.mkfifo(pipe)
    held = True

    def let_go() -> None:
        nonlocal held
        if held:
            held = False
            # Waits until the server has come there, which finds nothing in it and goes on.
            pipe.open("wb").close()

    try:
        yield let_go
    finally:
        if held:
            # Whatever the test did: a reader that waits would never end, and without one nobody must wait for it.
            os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


def test_while_it_recovers_events_are_taken_and_log_and_health_say_so_and_since_when(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance().start()
    before = post(box)
    assert box.stop() == 0
    with held_in_recovery(box.data_dir / "postgres") as let_go:
        box.begin()
        during = post(box)
        (note,) = wait_for(lambda: recovery_notes(box), "the note")
        assert wait_for(lambda: told(box), "the log") == 1
        # The same moment, however often one asks.
        assert wait_for(lambda: recovery_notes(box), "the note again") == [note]
        event = b'{"eventType": "click", "siteId": "shop", "n": 2}'
        assert http(box, "POST", "/collect", event, {"Content-Type": "text/plain"}).status == 202
        let_go()
        wait_for(box.ready, "the spool to be drained")
    assert told(box) == 1
    assert {before, during} < set(stored(box))
    assert len(stored(box)) == 3


def recovery_notes(box: Appliance) -> list[str]:
    answer = http(box, "GET", "/health/ready")
    assert answer.status == 200
    return [note for note in answer.json.get("notes", []) if note.startswith("PostgreSQL is recovering, since 2")]


def told(box: Appliance) -> int:
    return sum("PostgreSQL is recovering, since 2" in line for line in box.log.splitlines())


@contextmanager
def waiting_for(server: EmbeddedPostgres) -> Iterator[Callable[[], None]]:
    """Wait for a server in a thread, with less patience than it takes; lends what ends the wait well."""
    failures: list[StartError] = []

    def wait() -> None:
        try:
            server.wait_ready(timeout_seconds=0.3)
        except StartError as error:
            failures.append(error)

    def end_well() -> None:
        waiting.join(20)
        assert (waiting.is_alive(), failures) == (False, [])

    waiting = threading.Thread(target=wait)
    waiting.start()
    yield end_well
    waiting.join(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """One that was started once, and stopped."""
    one = EmbeddedPostgres(tmp_path, overrides=OVERRIDES)
    assert one.acquire()
    one.stop(one.start())
    assert one.wait_stopped()
    yield one
    pid = one.running_pid()
    if pid is not None:
        one.stop(pid)
        assert one.wait_stopped()
    one.release()


# A recovery asks this for each file it needs, and takes its time to say that there is none.
OVERRIDES = {"fsync": "off", "wal_level": "replica", "restore_command": "sleep 3; false"}


def test_a_command_waits_for_a_start_of_any_length(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(embedded, "_SILENT_SECONDS", 0.5)
    with held_in_recovery(server.cluster) as let_go:
        server.start()
        with waiting_for(server) as end_well:
            wait_for(lambda: "PostgreSQL is starting, waiting for it" in caplog.text, "the message")
            time.sleep(1)
            let_go()
            end_well()
    assert "recovering" not in caplog.text


def test_a_command_that_waits_for_a_recovery_says_so(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(embedded, "_SILENT_SECONDS", 0.5)
    pid = server.start()
    server.wait_ready()
    os.kill(pid, signal.SIGQUIT)
    assert server.wait_stopped()
    (server.cluster / "recovery.signal").touch()
    server.start()
    with waiting_for(server) as end_well:
        wait_for(lambda: "PostgreSQL is recovering, waiting for it" in caplog.text, "the message")
        end_well()
    assert "starting" not in caplog.text


def test_a_start_that_takes_a_moment_is_not_talked_about(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    # However slow the machine is on which this is tried.
    monkeypatch.setattr(embedded, "_SILENT_SECONDS", 60.0)
    with held_in_recovery(server.cluster) as let_go:
        server.start()
        with waiting_for(server) as end_well:
            time.sleep(1.5)
            let_go()
            end_well()
    assert caplog.text == ""


def test_a_postgres_that_does_not_start_at_all_is_given_up(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path, overrides={"port": "none"})
    assert server.acquire()
    server.start()
    with pytest.raises(StartError, match="does not start"):
        server.wait_ready(timeout_seconds=30)
    server.release()
