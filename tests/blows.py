"""What may befall a running appliance: parts of it are killed, frozen, stopped and started again."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from conftest import Appliance, wait_for

from appliance.store.embedded import EmbeddedPostgres


def worker_of(box: Appliance) -> psutil.Process:
    """The process that answers: the child of gunicorn's arbiter, a child of the supervisor as PostgreSQL is."""
    assert box.process is not None
    (arbiter,) = [child for child in psutil.Process(box.process.pid).children() if "postgres" not in child.name()]
    return wait_for(lambda: next(iter(arbiter.children()), None), "a worker")  # type: ignore[no-any-return]


def postgres_of(box: Appliance) -> list[psutil.Process]:
    """The postmaster and all its processes."""
    pid = wait_for(lambda: EmbeddedPostgres(box.data_dir).running_pid(), "PostgreSQL")
    postmaster = psutil.Process(pid)
    return [postmaster, *postmaster.children(recursive=True)]


def kill_worker(box: Appliance) -> None:
    worker_of(box).kill()


def kill_server(box: Appliance) -> None:
    box.kill()
    box.start()


def kill_postmaster(box: Appliance) -> None:
    postgres_of(box)[0].kill()


def kill_postgres(box: Appliance) -> None:
    each(postgres_of(box), signal.SIGKILL)


def kill_everything(box: Appliance) -> None:
    processes = postgres_of(box)
    box.kill()
    each(processes, signal.SIGKILL)
    box.start()


def freeze_postgres(box: Appliance) -> None:
    with frozen(box):
        time.sleep(3)


def restart(box: Appliance) -> None:
    assert box.stop() == 0
    box.start()


def each(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


@contextmanager
def frozen(box: Appliance) -> Iterator[None]:
    """Stop PostgreSQL in its tracks: it neither answers nor closes anything."""
    processes = postgres_of(box)
    each(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        each(processes, signal.SIGCONT)


BLOWS = [kill_worker, kill_server, kill_postmaster, kill_postgres, kill_everything, freeze_postgres, restart]
