"""Work that can wait lets work go first that somebody waits for."""

import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

# What a process of this niceness gets beside one without is a tenth of the processor, and a seventieth (sched(7)).
_NICENESS = 10
_MOST_NICENESS = 19
# Linux lets ordinary users change a session's weight ten times a second, all of them together (sched(7)).
_SESSION_TRIES = 5
_SESSION_SECONDS = 0.1


def step_back(pid: int, *, holds_locks: bool = False) -> None:
    """Let everything else on this machine go first, for good: an ordinary user cannot take it back.

    What `holds_locks` that a waiting request needs keeps its tenth. Taken off the processor with a lock in its hands it
    would hold up the very work that it makes way for.

    On Linux each thread has a priority of its own, and those started later inherit it. With more than one processor it
    gets what nobody else wants (SCHED_IDLE), and makes way at once: with a niceness alone a waking request waits until
    a tick, some milliseconds. On a single one, which may be busy for hours, it keeps its tenth.

    Outside containers Linux shares the processors out between sessions first (autogroup, sched(7)): what makes way to
    nobody but its own session takes as much as the collector does. A process that leads a session takes it back, too.
    """
    idle = len(os.sched_getaffinity(0)) > 1 and not holds_locks
    try:
        if idle:
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        elif os.getpriority(os.PRIO_PROCESS, pid) < _NICENESS:
            os.setpriority(os.PRIO_PROCESS, pid, _NICENESS)
        if os.getsid(pid) == pid:
            _step_back_as_session(pid, _MOST_NICENESS if idle else _NICENESS)
    except OSError as error:
        # It has ended, belongs to somebody else, or a container forbids it: then it is as fast as it is.
        log.debug("the priority of %d stays: %s", pid, error)


def step_back_postgres(pid: int, *, holds_locks: bool = False) -> None:
    """Let the server's process behind a connection make way too, where it is one of this machine's."""
    if _is_local_postgres(pid):
        step_back(pid, holds_locks=holds_locks)


def _step_back_as_session(leader: int, niceness: int) -> None:
    group = Path(f"/proc/{leader}/autogroup")
    if not group.exists():
        return
    for _ in range(_SESSION_TRIES):
        try:
            group.write_text(str(niceness))
        except BlockingIOError:
            # Somebody's turn was less than a tenth of a second ago.
            time.sleep(_SESSION_SECONDS)
        else:
            return


def _is_local_postgres(pid: int) -> bool:
    """Return whether this is a PostgreSQL process of this machine, and not the number of one on another."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(b"postgres:")
    except OSError:
        return False
