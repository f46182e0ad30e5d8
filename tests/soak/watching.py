"""Looks at every process of the appliance and at its directory again and again, while the load goes on."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
from conftest import Appliance

from appliance.store.embedded import EmbeddedPostgres
from soak.disk import Disk
from soak.growth import Point

MB = 2**20
_LOOK_EVERY_SECONDS = 1.0
# To walk through a directory takes longer.
_LOOK_AT_DISK_EVERY = 5
SUPERVISOR, ARBITER, WORKER, POSTMASTER = "supervisor", "arbiter", "worker", "postmaster"
ROLES = (SUPERVISOR, ARBITER, WORKER, POSTMASTER)


@dataclass(frozen=True)
class Sample:
    """A process at a moment: the memory that is its own, in bytes, and its open files."""

    role: str
    pid: int
    seconds: float
    memory: int
    files: int


@dataclass
class Record:
    """What was seen of every process that lived, and of the directory."""

    samples: list[Sample] = field(default_factory=list)
    disks: list[tuple[float, Disk]] = field(default_factory=list)

    def points(self, role: str, figure: Callable[[Sample], float]) -> list[Point]:
        return [Point(one.pid, one.seconds, figure(one)) for one in self.samples if one.role == role]

    def disk_points(self, figure: Callable[[Disk], float]) -> list[Point]:
        """A directory has one life, whatever befalls the processes."""
        return [Point(0, seconds, figure(disk)) for seconds, disk in self.disks]

    def most(self, role: str, figure: Callable[[Sample], float]) -> float:
        return max((figure(one) for one in self.samples if one.role == role), default=0)


@contextmanager
def watching(box: Appliance) -> Iterator[Record]:
    record, ended = Record(), threading.Event()
    thread = threading.Thread(target=_watch, args=(box, record, ended), daemon=True)
    thread.start()
    try:
        yield record
    finally:
        ended.set()
        thread.join(10)


def _watch(box: Appliance, record: Record, ended: threading.Event) -> None:
    begun = time.monotonic()
    for number in itertools.count():
        if ended.wait(_LOOK_EVERY_SECONDS):
            return
        seconds = time.monotonic() - begun
        record.samples += look(box, seconds)
        if number % _LOOK_AT_DISK_EVERY == 0:
            record.disks.append((seconds, Disk.of(box.data_dir)))


def look(box: Appliance, seconds: float) -> list[Sample]:
    """Look at those that live: between two lives of a process there is nothing of it to see."""
    found = []
    for role, process in _processes(box).items():
        try:
            with process.oneshot():
                memory = process.memory_info()
                # PostgreSQL's buffers and the files of libraries are nobody's own.
                own = memory.rss - memory.shared
                found.append(Sample(role, process.pid, seconds, own, process.num_fds()))
        except psutil.Error:
            continue
    return found


def _processes(box: Appliance) -> dict[str, psutil.Process]:
    found: dict[str, psutil.Process] = {}
    try:
        if pid := EmbeddedPostgres(box.data_dir).running_pid():
            found[POSTMASTER] = psutil.Process(pid)
        found[SUPERVISOR] = psutil.Process(box.process.pid if box.process else -1)
        (found[ARBITER],) = [
            child for child in found[SUPERVISOR].children() if child.pid != pid and "postgres" not in child.name()
        ]
        found[WORKER] = found[ARBITER].children()[0]
    except (psutil.Error, ValueError, IndexError):
        # What was found so far is there.
        return found
    return found


def left_over(box: Appliance) -> list[str]:
    """Name the processes below the supervisor that are dead but not waited for, or export though nothing is to do."""
    assert box.process is not None
    deadline = time.monotonic() + 20
    while True:
        found = []
        for process in psutil.Process(box.process.pid).children(recursive=True):
            try:
                words = " ".join(process.cmdline())
                if process.status() == psutil.STATUS_ZOMBIE or "export.process" in words:
                    found.append(f"{process.pid} {process.name()} {process.status()}")
            except psutil.NoSuchProcess:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
