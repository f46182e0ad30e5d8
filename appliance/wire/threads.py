"""Threads that answer requests."""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

log = logging.getLogger(__name__)


class Threads:
    """Threads that take jobs from one queue. The standard library's pool makes a future of each: 14 us more a job."""

    def __init__(self, number: int) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for index in range(number):
            threading.Thread(target=self._work, name=f"request-{index}", daemon=True).start()

    def submit(self, job: Callable[[], None]) -> None:
        """Let a thread do it."""
        self._jobs.put(job)

    def shutdown(self, *, wait: bool) -> None:
        """Leave the threads alone: they are daemons, and who stops has waited for the answers already."""

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:
                log.exception("a request's thread failed")
