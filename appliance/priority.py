"""Work that can wait lets work go first that somebody waits for."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

# A thread or process of this niceness gets a tenth of the processor beside one without (sched(7)), and all of it alone.
_NICENESS = 10


def step_back(thread_or_process: int) -> None:
    """Let everything else on this machine go first, for good: an ordinary user cannot take it back.

    On Linux each thread has a niceness of its own.
    """
    try:
        if os.getpriority(os.PRIO_PROCESS, thread_or_process) < _NICENESS:
            os.setpriority(os.PRIO_PROCESS, thread_or_process, _NICENESS)
    except OSError as error:
        # It has ended, or belongs to somebody else: then it is as fast as it is.
        log.debug("the priority of %d stays: %s", thread_or_process, error)


def is_local_postgres(pid: int) -> bool:
    """Return whether this is a PostgreSQL process of this machine, and not the number of one on another."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(b"postgres:")
    except OSError:
        return False
