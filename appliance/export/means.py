"""What everything that exports works with."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from appliance.config import Settings
from appliance.errors import ApplianceError
from appliance.export import buckets
from appliance.export.buckets import Bucket
from appliance.store.database import Database

_LEFT_OVER_SECONDS = 24 * 3600


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
        for left_over in work_dir.glob(f"{job}-*"):
            # A run that was killed could not clean up. Younger ones may belong to a run that is under way.
            with suppress(FileNotFoundError):
                if left_over.stat().st_mtime < time.time() - _LEFT_OVER_SECONDS:
                    shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=work_dir, prefix=f"{job}-") as name:
            yield Path(name)
