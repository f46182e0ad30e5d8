"""What a power cut leaves in a cluster and would keep PostgreSQL from starting."""

import os
from pathlib import Path


def clear_stale_locks(cluster: Path) -> None:
    """Make PostgreSQL take over a lock file whose server is gone. Called by its parent-to-be, when no server runs.

    The file names a process. Where that number belongs to another program by now, as is likely in a container,
    PostgreSQL would take that for its rival and not start.
    """
    pid_file = cluster / "postmaster.pid"
    try:
        first, *rest = pid_file.read_text().split("\n")
    except FileNotFoundError:
        return
    if not first.strip().isdigit():
        # Cut off while it was written: PostgreSQL waits for somebody to finish it.
        pid_file.unlink()
    elif not _is_hidden(int(first)):
        # Not deleted: it also names the shared memory by which PostgreSQL finds processes that outlived their
        # postmaster. It knows that its parent is no rival.
        mended = cluster / "postmaster.pid.new"
        mended.write_text("\n".join([str(os.getpid()), *rest]))
        mended.replace(pid_file)


def _is_hidden(pid: int) -> bool:
    """Return whether nobody may see here what a process is: then PostgreSQL has to judge."""
    try:
        (Path("/proc") / str(pid) / "cwd").readlink()
    except PermissionError:
        return True
    except OSError:
        return False
    return False
