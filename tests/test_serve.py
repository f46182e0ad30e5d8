"""`appliance serve` as a process: starting, surviving the death of each of its parts, and stopping in order."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import psycopg
import pytest
from conftest import Appliance, wait_for

from appliance.store.embedded import EmbeddedPostgres

EVENT = {"eventType": "click", "siteId": "shop"}


def test_a_second_start_finds_the_data_of_the_first(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    event_id = post(box)
    assert box.stop() == 0
    box.start()
    assert stored(box) == [event_id]
    assert box.stop() == 0


def test_a_taken_port_is_told_in_one_line(appliance: Callable[..., Appliance]) -> None:
    box = appliance()
    with socket.create_server(("127.0.0.1", box.port)):
        done = box.run("serve", check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"appliance: port {box.port} is taken by another program or appliance: "
        "stop that, or set server.bind to another port\n"
    )


def test_two_appliances_never_share_a_data_directory(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    rival = appliance(server={"data_dir": str(box.data_dir)})
    done = rival.run("serve", check=False)
    assert done.returncode == 1
    assert f"another appliance runs on the data directory {box.data_dir}" in done.stderr
    assert box.ready()


def test_a_data_directory_that_cannot_be_written_is_told_in_one_line(appliance: Callable[..., Appliance]) -> None:
    done = appliance(server={"data_dir": "/proc/appliance"}).run("serve", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("appliance: the data directory /proc/appliance cannot be used")
    assert done.stderr.count("\n") == 1


def test_the_welcome_names_every_place_and_the_tag_to_embed(appliance: Callable[..., Appliance]) -> None:
    box = appliance(server={"demo": True}, admin={"password": "secret-of-the-admin"}).start()
    for words in (f"{box.url}/admin/", f"{box.url}/demo/", str(box.data_dir / "export"), f"{box.url}/tracking.js"):
        assert words in box.log
    assert "<script async src=" in box.log
    assert "secret-of-the-admin" not in box.log


@pytest.mark.parametrize("part", ["worker", "arbiter", "postgres"])
def test_a_killed_part_comes_back_and_nothing_that_was_answered_is_lost(
    appliance: Callable[..., Appliance], part: str
) -> None:
    box = appliance().start()
    before = post(box)
    victim = parts(box)[part]
    victim.kill()
    wait_for(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, f"{part} to die")
    wait_for(box.ready, "the appliance to be ready again")
    after = post(box)
    assert stored(box) == sorted([before, after])
    assert box.stop() == 0


def test_processes_that_fork_have_a_single_thread_so_that_no_child_finds_a_lock_held_for_ever(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance().start()
    assert box.process is not None
    # Native threads, too, which libraries start when they are loaded.
    assert psutil.Process(box.process.pid).num_threads() == 1
    assert parts(box)["arbiter"].num_threads() == 1
    assert box.stop() == 0


def test_a_killed_supervisor_takes_gunicorn_along_and_the_next_start_adopts_postgres(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance().start()
    event_id = post(box)
    running = parts(box)
    box.kill()
    _, alive = psutil.wait_procs([running["arbiter"], running["worker"]], timeout=20)
    assert alive == []
    assert running["postgres"].is_running()

    box.start()
    assert EmbeddedPostgres(box.data_dir).running_pid() == running["postgres"].pid
    assert stored(box) == [event_id]
    assert box.stop() == 0
    assert EmbeddedPostgres(box.data_dir).running_pid() is None


def test_clients_wait_in_the_queue_while_the_web_server_restarts(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    running = parts(box)
    running["arbiter"].kill()
    psutil.wait_procs([running["worker"]], timeout=20)
    # Not one of these is refused: the supervisor holds the listening socket.
    assert len({post(box) for _ in range(20)}) == 20


def test_a_first_set_up_that_was_cut_off_is_begun_again(appliance: Callable[..., Appliance]) -> None:
    box = appliance()
    half_made = box.data_dir / "postgres.new"
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    box.start()
    assert post(box)


def test_a_data_directory_with_a_very_long_path_works(appliance: Callable[..., Appliance], tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    box = appliance(server={"data_dir": str(deep)}).start()
    assert post(box)
    assert box.stop() == 0


def test_no_other_user_can_reach_the_database(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    postgres = EmbeddedPostgres(box.data_dir)
    assert stat.S_IMODE(postgres.socket_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(postgres.cluster.stat().st_mode) == 0o700
    server = psutil.Process(postgres.running_pid())
    assert [c for c in server.net_connections() if c.status == psutil.CONN_LISTEN and c.family != socket.AF_UNIX] == []
    with pytest.raises(psycopg.OperationalError, match=r"Peer authentication failed"):
        psycopg.connect(postgres.conninfo, user="postgres")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_peer_authentication_turns_away_a_user_who_gets_past_the_directory(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance().start()
    postgres = EmbeddedPostgres(box.data_dir)
    for directory in (postgres.socket_dir, *postgres.socket_dir.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            directory.chmod(directory.stat().st_mode | stat.S_IXOTH)
    (postgres.socket_dir / ".s.PGSQL.5432").chmod(0o777)
    child = os.fork()
    if child == 0:
        os._exit(_connects_as_nobody(postgres.conninfo))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == REFUSED


REFUSED = 3


def _connects_as_nobody(conninfo: str) -> int:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        psycopg.connect(conninfo)
    except psycopg.OperationalError as error:
        return REFUSED if "Peer authentication failed" in str(error) else 4
    return 0


def test_a_command_attaches_to_the_running_database(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    post(box)
    status = json.loads(box.run("status", "--json").stdout)
    assert status["events"] == 1
    assert box.ready()


def test_a_command_starts_and_stops_the_database_when_nobody_runs_it(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    post(box)
    box.stop()
    report = json.loads(box.run("export", "--json").stdout)
    assert [(r["job"], r["row_count"], r["failed"]) for r in report] == [("local", 1, False)]
    assert EmbeddedPostgres(box.data_dir).running_pid() is None
    assert list((box.data_dir / "export").rglob("*.jsonl.gz"))


def test_collecting_goes_on_while_the_database_is_still_starting(appliance: Callable[..., Appliance]) -> None:
    box = appliance(database={"url": "postgresql://nobody@127.0.0.1:1/none"})
    command = [sys.executable, "-m", "appliance", "serve", "--config", str(box.write_config())]
    with (box.directory / "log").open("a") as log:
        box.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: status_of(f"{box.url}/health/live") == 200, "the web server")
    assert not box.ready()
    assert post(box)
    assert box.stop() == 0
    assert list((box.data_dir / "spool").iterdir())


def test_a_second_interrupt_does_not_cut_the_stop_short(appliance: Callable[..., Appliance]) -> None:
    box = appliance().start()
    post(box)
    assert box.process is not None
    box.process.send_signal(signal.SIGINT)
    box.process.send_signal(signal.SIGINT)
    assert box.process.wait(30) == 0
    assert EmbeddedPostgres(box.data_dir).running_pid() is None


def parts(box: Appliance) -> dict[str, psutil.Process]:
    """The processes below the supervisor."""
    assert box.process is not None
    children = psutil.Process(box.process.pid).children()
    postgres = EmbeddedPostgres(box.data_dir).running_pid()
    (arbiter,) = [child for child in children if child.pid != postgres]
    (worker,) = arbiter.children()
    return {"arbiter": arbiter, "worker": worker, "postgres": psutil.Process(postgres)}


def post(box: Appliance) -> str:
    event_id = str(uuid4())
    body = json.dumps({**EVENT, "eventId": event_id}).encode()
    request = urllib.request.Request(f"{box.url}/collect", body, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
        assert json.load(answer)["accepted"] == 1
    return event_id


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def stored(box: Appliance) -> list[str]:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        return [row[0] for row in conn.execute("SELECT event_id::text FROM events_log ORDER BY 1")]


def test_an_export_by_hand_with_another_file_ends_no_job_of_the_appliance(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    def config(job: str) -> dict[str, Any]:
        (tmp_path / job).mkdir()
        buckets = {job: {"kind": "directory", "path": str(tmp_path / job)}}
        return {"buckets": buckets, "exports": {job: {"client": job, "schedule": "0 0 1 1 *"}}}

    box = appliance(**config("acme")).start()
    post(box)
    other = Appliance(tmp_path, {**config("other"), "server": {"data_dir": str(box.data_dir)}})
    other.run("export", "other")
    conninfo = EmbeddedPostgres(box.data_dir).conninfo
    with psycopg.connect(conninfo, autocommit=True) as conn:
        covered = conn.execute("SELECT job FROM export_coverage WHERE active ORDER BY job").fetchall()
        assert covered == [("acme",), ("other",)]
        # The row is not marked before both have it.
        assert conn.execute("SELECT count(exported_at) FROM events_log").fetchone() == (0,)
        box.run("export")
        assert conn.execute("SELECT count(exported_at) FROM events_log").fetchone() == (1,)
    box.stop()
    box.start()
    with psycopg.connect(conninfo) as conn:
        assert conn.execute("SELECT job FROM export_coverage WHERE active").fetchall() == [("acme",)]


def test_as_process_1_of_a_container_it_hears_a_stop_while_it_is_still_loading(
    appliance: Callable[..., Appliance],
) -> None:
    # Root of its own: to unprivileged users a namespace for processes is given with one for users only.
    space = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*space, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs namespaces for users and processes")
    box = appliance()
    box.wrap = lambda command: [*space, *command]
    box.launch()
    assert box.process is not None
    outer = psutil.Process(box.process.pid)
    first = wait_for(lambda: next(iter(outer.children()), None), "process 1")
    wait_for(lambda: handles(first.pid, signal.SIGTERM), "it to hear a stop")
    first.terminate()
    assert box.process.wait(9) == 128 + signal.SIGTERM
    # It had come no further, so this is about loading.
    assert not box.data_dir.exists()


def handles(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal; from process 1 the kernel keeps all others."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)
