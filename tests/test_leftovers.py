"""What a power cut leaves behind is no obstacle to the next start."""

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from blows import each
from conftest import Appliance
from test_serve import post, stored

from appliance.store.embedded import EmbeddedPostgres


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """Another program of the same user, which has got the number that PostgreSQL had."""
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait(10)


def cut_the_power(box: Appliance) -> Path:
    """Kill everything at once and return the pid file that stays."""
    postmaster = psutil.Process(EmbeddedPostgres(box.data_dir).running_pid())
    processes = [postmaster, *postmaster.children(recursive=True)]
    box.kill()
    each(processes, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)
    return box.data_dir / "postgres" / "postmaster.pid"


def rename_owner(lock: Path, pid: int) -> None:
    _, *rest = lock.read_text().split("\n")
    lock.write_text("\n".join([str(pid), *rest]))


def test_lock_files_that_name_another_living_program_are_no_obstacle(
    appliance: Callable[..., Appliance], stranger: subprocess.Popen[bytes]
) -> None:
    box = appliance().start()
    event_id = post(box)
    pid_file = cut_the_power(box)
    rename_owner(pid_file, stranger.pid)
    rename_owner(box.data_dir / "run" / ".s.PGSQL.5432.lock", stranger.pid)
    box.start()
    assert stored(box) == [event_id]
    assert stranger.poll() is None
    assert "starting it again" not in box.log
    assert box.stop() == 0


def test_a_socket_lock_alone_that_names_another_living_program_is_no_obstacle(
    appliance: Callable[..., Appliance], stranger: subprocess.Popen[bytes]
) -> None:
    box = appliance().start()
    assert box.stop() == 0
    directory = box.data_dir / "run"
    (directory / ".s.PGSQL.5432.lock").write_text(f"{stranger.pid}\n/nowhere\n0\n5432\n{directory}\n")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(directory / ".s.PGSQL.5432"))
    box.start()
    assert post(box)


@pytest.mark.parametrize("content", ["", "\n", "12"], ids=["empty", "blank", "cut off"])
def test_a_pid_file_that_was_cut_off_is_no_obstacle(appliance: Callable[..., Appliance], content: str) -> None:
    box = appliance().start()
    event_id = post(box)
    cut_the_power(box).write_text(content)
    box.start()
    assert stored(box) == [event_id]
    assert "starting it again" not in box.log


def test_processes_that_outlived_their_postmaster_still_keep_the_next_one_from_starting(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path, overrides={"fsync": "off"})
    assert server.acquire()
    first = psutil.Process(server.start())
    server.wait_ready()
    checkpointer = next(child for child in first.children() if "checkpointer" in " ".join(child.cmdline()))
    checkpointer.suspend()
    first.kill()
    assert server.wait_stopped()
    server.start()
    assert server.wait_stopped(30)
    assert "pre-existing shared memory block" in server.where_it_says_why()
    checkpointer.resume()
    psutil.wait_procs([checkpointer], timeout=20)
    pid = server.start()
    server.wait_ready()
    server.stop(pid)
    assert server.wait_stopped()
    server.release()
