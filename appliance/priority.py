"""Work that can wait lets work go first that somebody waits for."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

# What a thread or process of this niceness gets beside one without is a tenth of the processor (sched(7)).
_NICENESS = 10


def step_back(thread_or_process: int, *, holds_locks: bool = False) -> None:
    """Let everything else on this machine go first, for good: an ordinary user cannot take it back.

    What `holds_locks` that a waiting request needs keeps its tenth. Taken off the processor with a lock in its hands it
    would hold up the very work that it makes way for.

    On Linux each thread has a priority of its own, and those started later inherit it. With more than one processor it
    gets what nobody else wants (SCHED_IDLE), and makes way at once: with a niceness alone a waking request waits until
    a tick, some milliseconds. On a single one, which may be busy for hours, it keeps its tenth.
    """
    try:
        if len(os.sched_getaffinity(0)) > 1 and not holds_locks:
            os.sched_setscheduler(thread_or_process, os.SCHED_IDLE, os.sched_param(0))
        elif os.getpriority(os.PRIO_PROCESS, thread_or_process) < _NICENESS:
            os.setpriority(os.PRIO_PROCESS, thread_or_process, _NICENESS)
    except OSError as error:
        # It has ended, belongs to somebody else, or a container forbids it: then it is as fast as it is.
        log.debug("the priority of %d stays: %s", thread_or_process, error)


def step_back_postgres(pid: int, *, holds_locks: bool = False) -> None:
    """Let the server's process behind a connection make way too, where it is one of this machine's."""
    if _is_local_postgres(pid):
        step_back(pid, holds_locks=holds_locks)


def _is_local_postgres(pid: int) -> bool:
    """Return whether this is a PostgreSQL process of this machine, and not the number of one on another."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(b"postgres:")
    except OSError:
        return False
