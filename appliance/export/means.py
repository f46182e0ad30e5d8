"""What everything that exports works with."""

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from appliance.config import Settings
from appliance.errors import ApplianceError
from appliance.export import buckets
from appliance.export.buckets import Bucket
from appliance.store.database import Database

# Told before each step of long work: how many are done, how many there are, and what comes next.
Progress = Callable[[int, int, object], None]


def silent(_done: int, _of: int, _what: object) -> None:
    """Tell nobody."""


class StoppedError(ApplianceError):
    """The appliance is shutting down; the next run goes on where this one stopped."""


class Pulse:
    """When something last moved, so that a run that hangs can be told from one that takes its time."""

    def __init__(self) -> None:
        self.beat()

    def beat(self) -> None:
        """Something has moved."""
        self._last = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """How long nothing has moved."""
        return time.monotonic() - self._last


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """The configuration, the database and the buckets, and whether there is still time."""

    settings: Settings
    db: Database
    conninfo: str
    buckets: Mapping[str, Bucket]
    stopping: threading.Event = field(default_factory=threading.Event)
    pulse: Pulse = field(default_factory=Pulse)

    @classmethod
    def of(cls, settings: Settings, db: Database, *, conninfo: str, stopping: threading.Event | None = None) -> "Means":
        """Build the buckets of a configuration; no connection is made yet."""
        return cls(
            settings=settings,
            db=db,
            conninfo=conninfo,
            buckets=buckets.build(settings),
            stopping=stopping or threading.Event(),
        )

    def stop_here_if_told(self) -> None:
        """Raise StoppedError when the appliance shuts down: between two objects, at the latest."""
        if not self.go_on():
            raise StoppedError("stopped with the appliance; the next run goes on")

    def go_on(self) -> bool:
        """Return whether there is still time for another step."""
        self.pulse.beat()
        return not self.stopping.is_set()

    @contextmanager
    def scratch(self, job: str) -> Iterator[Path]:
        """Lend a directory for the objects of one batch."""
        work_dir = self.settings.server.data_dir / "tmp"
        work_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as lent:
            # Nobody may take a directory for a left-over between its making and its lock.
            with _opened(work_dir) as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                _remove_left_overs(work_dir)
                name = lent.enter_context(tempfile.TemporaryDirectory(dir=work_dir, prefix=f"{job}-"))
                fcntl.flock(lent.enter_context(_opened(Path(name))), fcntl.LOCK_EX)
            yield Path(name)


def _remove_left_overs(work_dir: Path) -> None:
    """Remove what runs that were killed could not: a directory whose lock is free has no owner any more.

    Age would tell late and, when the clock is set, wrongly; runs that are cut off again and again would fill the disk.
    """
    for found in work_dir.iterdir():
        with suppress(FileNotFoundError, NotADirectoryError, BlockingIOError), _opened(found) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(found, ignore_errors=True)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """Open a directory, to lock it; its lock ends with this, or with the process."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield opened
    finally:
        os.close(opened)
