"""A clock that can be stepped: a small library (clock.c) shows it to the appliance and its PostgreSQL.

Only the time of day is stepped, as an administrator or NTP does it; the monotonic clock goes on as it always does.
"""

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """The clock of every process that is started while `of_children` lasts."""

    def __init__(self, directory: Path) -> None:
        self._library, self._file = directory / "clock.so", directory / "clock"
        self.steps = False

    @contextmanager
    def of_children(self, *, wanted: bool) -> Iterator[Self]:
        compiler = shutil.which("cc")
        self.set(0)
        if not wanted or compiler is None:
            yield self
            return
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(self._library), str(_SOURCE)], check=True)
        settings = {"LD_PRELOAD": str(self._library), "SOAK_CLOCK": str(self._file)}
        os.environ.update(settings)
        self.steps = True
        try:
            yield self
        finally:
            for name in settings:
                del os.environ[name]

    def set(self, seconds: float) -> None:
        """Let the clock be so far ahead of the true time, at once for all: the file is a part of their memory."""
        if not self._file.exists():
            self._file.write_bytes(struct.pack("l", 0))
        with self._file.open("r+b") as file:
            file.write(struct.pack("l", round(seconds)))
