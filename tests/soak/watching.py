"""Looks at memory, open files and disk again and again, and says at the end whether they have stayed flat."""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
from conftest import Appliance

from appliance.store.embedded import EmbeddedPostgres

MB = 2**20
_LOOK_EVERY_SECONDS = 1.0
# Of a worker's life: while its pool, its threads and its caches fill for the first time it grows rightly.
_WARM_UP = 0.2


@dataclass(frozen=True)
class Sample:
    """The worker at a moment: its memory in bytes and its open files."""

    pid: int
    rss: int
    files: int


@dataclass
class Watch:
    """The samples of every worker that lived."""

    box: Appliance
    samples: list[Sample] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            thread.join(10)

    def _watch(self) -> None:
        while not self.ended.wait(_LOOK_EVERY_SECONDS):
            sample = _look(self.box)
            if sample is not None:
                self.samples.append(sample)

    def most(self) -> tuple[int, int]:
        """Return the largest memory and the most files that any worker ever had."""
        return max(one.rss for one in self.samples), max(one.files for one in self.samples)


def growth(samples: Sequence[Sample]) -> tuple[float, float]:
    """Return by how many bytes and files the worker that lived last has grown since it was warm (medians)."""
    life = [one for one in samples if one.pid == samples[-1].pid]
    warm = life[int(len(life) * _WARM_UP) :]
    part = max(1, len(warm) // 4)
    first, last = warm[:part], warm[-part:]
    memory = statistics.median(one.rss for one in last) - statistics.median(one.rss for one in first)
    files = statistics.median(one.files for one in last) - statistics.median(one.files for one in first)
    return memory, files


def _look(box: Appliance) -> Sample | None:
    try:
        worker = psutil.Process(box.process.pid if box.process else -1).children()
        (arbiter,) = [child for child in worker if "postgres" not in child.name()]
        process = arbiter.children()[0]
        return Sample(process.pid, process.memory_info().rss, process.num_fds())
    except (psutil.Error, ValueError, IndexError):
        # Between two lives there is nothing to see.
        return None


@dataclass(frozen=True)
class Disk:
    """The bytes of a data directory: the events' table, PostgreSQL's log of changes, and all the rest."""

    table: int
    wal: int
    rest: int
    wal_limit: int


def disk_of(box: Appliance) -> Disk:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo, autocommit=True) as conn:
        # What is in memory only would be missing from the files.
        conn.execute("CHECKPOINT")
        table = _one(conn, "SELECT pg_total_relation_size('events_log')")
        limit = _one(conn, "SELECT pg_size_bytes(current_setting('max_wal_size'))")
    wal = _bytes_below(box.data_dir / "postgres" / "pg_wal")
    return Disk(table, wal, _bytes_below(box.data_dir) - wal - table, limit)


def _one(conn: psycopg.Connection[Any], statement: str) -> int:
    ((value,),) = conn.execute(statement.encode()).fetchall()
    return int(value)


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except FileNotFoundError:
            # Removed between two looks, as files of a database are.
            continue
    return total


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
