"""A run in a process of its own: it reports what a run reports, ends when it is told, and outlives nobody."""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import psycopg
import pytest
from conftest import make_settings, store_events, wait_for

from appliance.config import Settings
from appliance.errors import ApplianceError, BucketAheadError
from appliance.export import process
from appliance.export.means import StoppedError
from appliance.export.process import STOP_SECONDS, run_apart
from appliance.store.database import Database
from appliance.words import how_ended

if TYPE_CHECKING:
    from appliance.export.report import Report


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "bucket").mkdir()
    return make_settings(
        server={"data_dir": str(tmp_path / "data")},
        buckets={"acme": {"kind": "directory", "path": str(tmp_path / "bucket")}},
        exports={"acme": {"sites": ["*"], "client": "acme"}},
    )


class Runs:
    """Runs of the job, one at a time, beside the test."""

    def __init__(self, settings: Settings, conninfo: str) -> None:
        self.settings, self.conninfo, self.stopping = settings, conninfo, threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def start(self) -> "Future[Report]":
        return self._pool.submit(run_apart, self.settings, "acme", conninfo=self.conninfo, stopping=self.stopping)


@pytest.fixture
def runs(settings: Settings, conninfo: str) -> Runs:
    return Runs(settings, conninfo)


@contextmanager
def held(conninfo: str) -> Iterator[None]:
    """Keep a run waiting where it reads what it covers."""
    with psycopg.connect(conninfo) as conn:
        conn.execute("SELECT id FROM installation FOR UPDATE")
        yield


def waiting_child(conn: psycopg.Connection[Any], parent: psutil.Process | None = None) -> psutil.Process:
    """Return the process of a run that waits for what `held` holds."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    wait_for(lambda: conn.execute(query).fetchone() != (0,), "a run to be held")
    (child,) = [c for c in (parent or psutil.Process()).children() if "appliance.export.process" in c.cmdline()]
    return child


def manifests(settings: Settings) -> list[Path]:
    return list(Path(settings.buckets["acme"].path).rglob("_manifests/**/*.json"))  # type: ignore[union-attr]


def test_it_delivers_and_reports_as_a_run_in_this_process_does(runs: Runs, db: Database) -> None:
    store_events(db, 5)
    report = runs.start().result(60)
    assert (report.job, report.batches, report.row_count, report.failed) == ("acme", 1, 5, False)
    assert len(manifests(runs.settings)) == 1
    assert runs.start().result(60).summary == "nothing new delivered"


def test_what_a_run_raises_is_raised_here(runs: Runs, db: Database) -> None:
    store_events(db, 1)
    theirs = Path(runs.settings.buckets["acme"].path) / "_manifests" / "acme"  # type: ignore[union-attr]
    theirs.mkdir(parents=True)
    (theirs / "0000000001.json").write_text("{}")
    with pytest.raises(BucketAheadError, match="is ahead"):
        runs.start().result(60)


def test_one_that_is_killed_is_told_of_and_the_next_goes_on(
    runs: Runs, db: Database, conn: psycopg.Connection[Any]
) -> None:
    store_events(db, 3)
    with held(runs.conninfo):
        run = runs.start()
        waiting_child(conn).kill()
        with pytest.raises(ApplianceError, match=r"acme ended with SIGKILL; the next run goes on"):
            run.result(60)
    conn.execute("DELETE FROM export_leases")
    assert runs.start().result(60).row_count == 3


def test_it_and_its_connections_let_everything_else_on_the_machine_go_first(
    runs: Runs, conn: psycopg.Connection[Any]
) -> None:
    with held(runs.conninfo):
        run = runs.start()
        child = waiting_child(conn)
        query = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        (backend,) = [pid for (pid,) in conn.execute(query)]
        assert [makes_way(pid) for pid in (child.pid, backend, os.getpid())] == [True, True, False]
    run.result(60)


def makes_way(pid: int) -> bool:
    """Return whether a process steps back within its session, and its session behind the others where that matters."""
    steps_back = os.sched_getscheduler(pid) == os.SCHED_IDLE or psutil.Process(pid).nice() > 0
    return steps_back and session_niceness(pid) != 0


def session_niceness(pid: int) -> int | None:
    """Read /autogroup-25 nice 19; None where Linux does not weigh sessions."""
    group = Path(f"/proc/{pid}/autogroup")
    words = group.read_text().split() if group.exists() else []
    return int(words[-1]) if words else None


# A child that leaves a file when it has been told to stop.
TELLING = """
import pathlib, sys
from appliance.export import process

class Telling:
    def __init__(self, stopping):
        self.stopping = stopping

    def set(self):
        self.stopping.set()
        pathlib.Path(sys.argv[2]).touch()

stop_when_told = process._stop_when_told
process._stop_when_told = lambda stopping: stop_when_told(Telling(stopping))
process.main()
"""


def test_told_to_stop_it_ends_at_its_next_safe_point(
    runs: Runs, db: Database, conn: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", TELLING, process.__name__, str(told)))
    store_events(db, 3)
    with held(runs.conninfo):
        run = runs.start()
        waiting_child(conn)
        runs.stopping.set()
        # It makes way for everything else on the machine, and may take its time.
        wait_for(told.exists, "the child to be told")
    with pytest.raises(StoppedError):
        run.result(60)
    assert manifests(runs.settings) == []


def test_one_that_reaches_no_safe_point_is_cut_off(runs: Runs, conn: psycopg.Connection[Any]) -> None:
    with held(runs.conninfo):
        run = runs.start()
        waiting_child(conn)
        runs.stopping.set()
        with pytest.raises(ApplianceError, match="ended with exit code 1"):
            run.result(STOP_SECONDS + 20)


def test_one_in_which_nothing_moves_for_long_is_cut_off(runs: Runs) -> None:
    script = "from appliance.export import process; process.STUCK_SECONDS = 1.0; process.main()"
    with held(runs.conninfo):
        child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdin is not None
        child.stdin.write(pickle.dumps(("run", runs.settings, runs.conninfo, "acme", None)))
        child.stdin.flush()
        # Its input stays open: nobody has told it to stop.
        assert child.wait(60) == 1
        _, errors = child.communicate()
    assert b"export acme: nothing has moved for 1 s: cut off" in errors


def test_it_does_not_outlive_the_worker(
    runs: Runs, db: Database, conn: psycopg.Connection[Any], start_parent: Callable[[Settings, str], psutil.Process]
) -> None:
    store_events(db, 3)
    with held(runs.conninfo):
        parent = start_parent(runs.settings, runs.conninfo)
        child = waiting_child(conn, parent)
        parent.kill()
    wait_for(lambda: not child.is_running(), "the run to end", seconds=STOP_SECONDS + 20)
    assert manifests(runs.settings) == []


@pytest.fixture
def start_parent() -> Iterator[Callable[[Settings, str], psutil.Process]]:
    """A worker that does nothing but this run."""
    script = (
        "import pickle, sys, threading; from appliance.export.process import run_apart;"
        "settings, conninfo = pickle.load(sys.stdin.buffer);"
        "run_apart(settings, 'acme', conninfo=conninfo, stopping=threading.Event())"
    )
    started: list[subprocess.Popen[bytes]] = []

    def start(settings: Settings, conninfo: str) -> psutil.Process:
        started.append(subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE))
        stdin = started[-1].stdin
        assert stdin is not None
        stdin.write(pickle.dumps((settings, conninfo)))
        stdin.close()
        return psutil.Process(started[-1].pid)

    yield start
    for one in started:
        one.kill()
        one.wait()


@pytest.mark.parametrize(
    ("exit_code", "said"), [(0, "exit code 0"), (3, "exit code 3"), (-9, "SIGKILL"), (-40, "signal 40")]
)
def test_every_way_in_which_a_process_ends_has_a_name(exit_code: int, said: str) -> None:
    assert how_ended(exit_code) == said
