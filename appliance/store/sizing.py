"""How much of the machine the embedded PostgreSQL takes: docs/operations.md has the same table in words."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_MB = 1 << 20
_GB = 1 << 30
# The limit of a container, as version 2 and version 1 of control groups show it inside.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to share, in bytes."""

    memory: int
    disk: int

    @classmethod
    def of(cls, directory: Path) -> "Machine":
        """Return the memory of this machine, or of the container it is, and the size of a directory's disk."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(memory=min([memory, *_limits()]), disk=shutil.disk_usage(directory).total)


def settings_for(machine: Machine) -> dict[str, str]:
    """Return PostgreSQL's settings of memory and of its log.

    An eighth of the memory for its buffers, and not a quarter as its manual says (chapter 19.4): it shares the machine
    with the collector and with exports, and both read and write through the kernel's cache. The log may take a
    twentieth of the disk between two checkpoints: fewer of them write fewer whole pages, more of it takes longer to
    recover.
    """
    max_wal = _within(machine.disk // 20, 256 * _MB, 4 * _GB)
    return {
        "shared_buffers": _in_mb(_within(machine.memory // 8, 64 * _MB, 2 * _GB)),
        "effective_cache_size": _in_mb(machine.memory // 2),
        "work_mem": _in_mb(_within(machine.memory // 256, 4 * _MB, 32 * _MB)),
        "maintenance_work_mem": _in_mb(_within(machine.memory // 16, 64 * _MB, 512 * _MB)),
        # By itself it would grow to 16 MB with the buffers above. A commit waits until what stands in it is written; an
        # export that marks its rows fills it all the time.
        "wal_buffers": "4MB",
        "max_wal_size": _in_mb(max_wal),
        "min_wal_size": _in_mb(max_wal // 4),
        "checkpoint_timeout": "15min",
    }


def _limits() -> list[int]:
    return [int(text) for path in _LIMITS if (text := _text_of(path)).isdigit()]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""  # this version of control groups is not here


def _within(size: int, least: int, most: int) -> int:
    return max(least, min(size, most))


def _in_mb(size: int) -> str:
    return f"{size // _MB}MB"
