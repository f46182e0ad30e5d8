"""A data directory of PostgreSQL 16 becomes one of 18, whatever happens meanwhile, and a copy is kept."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from blows import each
from conftest import Appliance, http, make_event, wait_for
from test_serve import post, stored

from appliance import server
from appliance.config import Settings
from appliance.errors import StartError
from appliance.store import events, programs
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.migrations import migrate
from appliance.store.upgrading import Upgrade

ROWS = 300


@contextmanager
def postgres_16(cluster: Path) -> Iterator[tuple[psutil.Process, str]]:
    """Run PostgreSQL 16 as an appliance of its time would; how it ends is up to the test."""
    sockets = cluster.parent / "run"
    sockets.mkdir(mode=0o700, exist_ok=True)
    settings = {**programs.write_admission(cluster), "unix_socket_directories": str(sockets), "listen_addresses": ""}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    command = [*programs.command_prefix(), str(directory_16() / "postgres"), "-D", str(cluster), *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        conninfo = psycopg.conninfo.make_conninfo(host=str(sockets), user=programs.ROLE, dbname=programs.DATABASE)
        wait_for(lambda: connects(conninfo), "PostgreSQL 16")
        try:
            yield psutil.Process(server.pid), conninfo
        finally:
            server.send_signal(signal.SIGINT)


def connects(conninfo: str) -> bool:
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        return False
    return True


def directory_16() -> Path:
    directory = programs.binaries_of("16")
    assert directory is not None
    return directory


@pytest.fixture(scope="session")
def template_16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster of PostgreSQL 16 with events, without checksums, shut down."""
    cluster = tmp_path_factory.mktemp("sixteen") / "postgres"
    options = ["-D", str(cluster), "-U", programs.ROLE, "--auth=reject", "--encoding=UTF8", "--locale=C"]
    programs.run_program([str(directory_16() / "initdb"), *options])
    single = [str(directory_16() / "postgres"), "--single", "-D", str(cluster), "postgres"]
    programs.run_program(single, stdin=f"CREATE DATABASE {programs.DATABASE};\n")
    with postgres_16(cluster) as (_, conninfo), psycopg.connect(conninfo) as conn:
        migrate(conn)
        events.copy_in(conn, [make_event() for _ in range(ROWS)])
    return cluster


@pytest.fixture
def old_box(appliance: Callable[..., Appliance], template_16: Path) -> Appliance:
    """An appliance whose data directory was made by PostgreSQL 16."""
    box = appliance()
    box.data_dir.mkdir(mode=0o700)
    shutil.copytree(template_16, box.data_dir / "postgres")
    return box


def facts(box: Appliance) -> dict[str, Any]:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        row = conn.execute(
            "SELECT current_setting('server_version_num')::int / 10000, current_setting('data_checksums'),"
            " (SELECT count(*) FROM events_log), (SELECT sum(events) FROM event_counts)"
        ).fetchone()
    return dict(zip(("version", "checksums", "rows", "counted"), row or (), strict=True))


def directories(box: Appliance) -> list[str]:
    return sorted(path.name for path in box.data_dir.glob("postgres*") if path.is_dir())


def upgraded(rows: int) -> dict[str, Any]:
    return {"version": 18, "checksums": "on", "rows": rows, "counted": rows}


def test_all_rows_are_there_with_checksums_and_the_old_directory_is_kept_as_it_was(old_box: Appliance) -> None:
    box = old_box.start()
    assert facts(box) == upgraded(ROWS)
    assert directories(box) == ["postgres", "postgres.16"]
    assert f"kept as {box.data_dir / 'postgres.16'} and may be deleted" in box.log
    post(box)
    assert box.stop() == 0
    # It is done once, and what has come since is there.
    box.start()
    assert facts(box) == upgraded(ROWS + 1)
    assert box.log.count("upgrading PostgreSQL from 16 to 18") == 1
    assert box.stop() == 0
    assert rows_in_16(box.data_dir / "postgres.16") == ROWS


def rows_in_16(cluster: Path) -> int:
    """Return what the version that made it finds in a cluster that was kept."""
    with postgres_16(cluster) as (_, conninfo), psycopg.connect(conninfo) as conn:
        row = conn.execute("SELECT count(*) FROM events_log").fetchone()
    return int(row[0]) if row else 0


def test_a_command_upgrades_too(old_box: Appliance) -> None:
    status = json.loads(old_box.run("status", "--json").stdout)
    assert status["events"] == ROWS
    assert directories(old_box) == ["postgres", "postgres.16"]


def test_events_that_come_meanwhile_are_taken_and_stored_afterwards(old_box: Appliance) -> None:
    # What a killed upgrade has left: a copy half made, and a program that still runs.
    half_made = old_box.data_dir / "postgres.upgrade"
    half_made.mkdir()
    (half_made / "PG_VERSION").write_text("18\n")
    with (old_box.data_dir / "postgres-upgrade.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        box = old_box.begin()
        event_id = post(box)
        assert "PostgreSQL is being upgraded" in http(box, "GET", "/health/ready").json["notes"]
    wait_for(box.ready, "the upgrade and the spool to be drained")
    assert event_id in stored(box)
    assert facts(box) == upgraded(ROWS + 1)


def test_a_kill_at_any_moment_is_made_good_by_the_next_start(old_box: Appliance) -> None:
    work = old_box.data_dir / "postgres.upgrade"
    moments: list[Callable[[], Any]] = [
        (work / "PG_VERSION").exists,
        # pg_upgrade has begun, its servers come and go.
        (work / "pg_upgrade_output.d").exists,
        EmbeddedPostgres(old_box.data_dir).running_pid,
        (work / "postmaster.pid").exists,
    ]
    for number, moment in enumerate(moments):
        old_box.launch()
        wait_for(moment, f"moment {number}")
        old_box.kill()
        assert "postgres.16" not in directories(old_box)
    box = old_box.start()
    assert facts(box) == upgraded(ROWS)
    assert directories(box) == ["postgres", "postgres.16"]
    assert box.stop() == 0
    assert rows_in_16(box.data_dir / "postgres.16") == ROWS


def test_a_kill_between_the_last_two_steps_is_made_good_by_the_next_start(old_box: Appliance) -> None:
    box = old_box.start()
    assert box.stop() == 0
    (box.data_dir / "postgres").rename(box.data_dir / "postgres.upgraded")
    box.start()
    assert facts(box) == upgraded(ROWS)
    assert directories(box) == ["postgres", "postgres.16"]


def test_a_copy_that_is_older_than_what_stands_in_its_place_is_not_used(old_box: Appliance) -> None:
    stale = old_box.data_dir / "postgres.upgraded"
    stale.mkdir()
    (stale / "PG_VERSION").write_text("18\n")
    assert facts(old_box.start()) == upgraded(ROWS)


def test_one_that_still_runs_is_shut_down_first(old_box: Appliance) -> None:
    with postgres_16(old_box.data_dir / "postgres") as (server, _):
        box = old_box.start()
        assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
        assert facts(box) == upgraded(ROWS)


def test_one_that_was_killed_recovers_first_whoever_has_its_number_now(old_box: Appliance) -> None:
    cluster = old_box.data_dir / "postgres"
    with postgres_16(cluster) as (server, conninfo):
        with psycopg.connect(conninfo) as conn:
            events.copy_in(conn, [make_event()])
        processes = [server, *server.children(recursive=True)]
        each(processes, signal.SIGKILL)
        psutil.wait_procs(processes[1:], timeout=20)
    pid_file = cluster / "postmaster.pid"
    _, *rest = pid_file.read_text().split("\n")
    # The test's own: another program of the same user that lives.
    pid_file.write_text("\n".join([str(os.getpid()), *rest]))
    box = old_box.start()
    assert facts(box) == upgraded(ROWS + 1)
    assert "starting it again" not in box.log


def test_stopping_it_in_the_middle_leaves_nothing_running(old_box: Appliance) -> None:
    cluster, work = old_box.data_dir / "postgres", old_box.data_dir / "postgres.upgrade"
    old_box.begin()
    wait_for(lambda: work.exists() or not Upgrade(old_box.data_dir).needed, "the upgrade")
    assert old_box.stop() == 0
    wait_for(lambda: all(programs.postmaster_of(one) is None for one in (cluster, work)), "the servers to end")
    assert facts(old_box.start()) == upgraded(ROWS)


@pytest.mark.parametrize(
    ("version", "words"),
    [("15", "whose programs are not here"), ("19", "was made by PostgreSQL 19, and this appliance brings 18")],
)
def test_one_that_cannot_be_upgraded_is_refused_in_a_sentence_and_left_alone(
    appliance: Callable[..., Appliance], version: str, words: str
) -> None:
    box = appliance()
    cluster = box.data_dir / "postgres"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text(f"{version}\n")
    for command in ("status", "serve"):
        done = box.run(command, check=False)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert [path.name for path in cluster.iterdir()] == ["PG_VERSION"]


def test_without_room_for_a_copy_nothing_is_begun(old_box: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(old_box.data_dir)._replace(free=100 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(StartError, match=r"needs \d+ MB on its disk, where 100 MB are free: make room"):
        Upgrade(old_box.data_dir).run()
    assert directories(old_box) == ["postgres"]


def test_a_former_copy_is_never_written_over(old_box: Appliance) -> None:
    (old_box.data_dir / "postgres.16").mkdir()
    done = old_box.run("serve", check=False)
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert directories(old_box) == ["postgres", "postgres.16"]


def in_16(cluster: Path, statement: str) -> None:
    """Let the version that made a cluster change it, while no server runs on it."""
    programs.run_program(
        [str(directory_16() / "postgres"), "--single", "-D", str(cluster), "postgres"], stdin=statement
    )


def test_one_that_fails_is_not_begun_again_at_once_and_says_so_and_leaves_no_copy(old_box: Appliance) -> None:
    cluster = old_box.data_dir / "postgres"
    # pg_upgrade wants to look into every database.
    in_16(cluster, "UPDATE pg_database SET datallowconn = false WHERE datname = 'template1';\n")
    box = old_box.begin()
    wait_for(lambda: "starting it again" in box.log, "the failure")
    assert f"the upgrade of PostgreSQL failed, and {cluster} is as it was" in box.log
    assert "starting it again in 60.0 s, and after a further failure twice as late each time" in box.log
    event_id = post(box)
    note = "the upgrade of PostgreSQL has failed and is tried again later: the log says why"
    ready = http(box, "GET", "/health/ready")
    assert (ready.status, note in ready.json["notes"]) == (200, True)
    assert directories(box) == ["postgres", "postgres-upgrade.failed"]
    assert list((box.data_dir / "postgres-upgrade.failed").rglob("*.log"))
    # Ten times as long as it used to wait.
    time.sleep(5)
    assert box.log.count("upgrading PostgreSQL from 16 to 18") == 1
    assert box.stop() == 0
    in_16(cluster, "UPDATE pg_database SET datallowconn = true WHERE datname = 'template1';\n")
    box.start()
    assert event_id in stored(box)
    assert facts(box) == upgraded(ROWS + 1)
    assert directories(box) == ["postgres", "postgres.16"]


def test_the_more_often_one_fails_the_later_it_is_tried_again_up_to_six_hours(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock, socket.socket() as listener:
        supervisor = server._Supervisor(Settings(), listener, None, lock)  # noqa: SLF001 - nobody waits for hours
    upgrade = supervisor._upgrade  # noqa: SLF001
    waits = []
    for _ in range(12):
        upgrade.started(1)
        upgrade.ended()
        waits.append(upgrade.delay)
    assert waits == [min(60 * 2**n, 6 * 3600) for n in range(12)]
