"""Servers held to a part of a core each, as if each stood on a small machine of its own.

With control groups of Linux, version 2 or 1, which only root may make.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psutil

from bench.errors import BenchError

_ROOT = Path("/sys/fs/cgroup")
# What `docker run --cpus` takes, too.
_PERIOD_MICROSECONDS = 100_000


@contextmanager
def held(pid: int, *, cores: float) -> Iterator[None]:
    """Hold a process and its children to so much of a core until the block ends. Raises BenchError without root."""
    group = _parent() / f"appliance-bench-{uuid4().hex[:12]}"
    try:
        group.mkdir()
    except OSError as error:
        raise BenchError(f"a share of a core cannot be given: {error.strerror}; control groups need root") from error
    try:
        _limit(group, round(cores * _PERIOD_MICROSECONDS))
        try:
            _move(pid, group)
            yield
        finally:
            _move(pid, group.parent)
    finally:
        group.rmdir()


def _parent() -> Path:
    return _ROOT / "cpu" if (_ROOT / "cpu/cpu.cfs_quota_us").exists() else _ROOT


def _limit(group: Path, microseconds: int) -> None:
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_MICROSECONDS))
        (group / "cpu.cfs_quota_us").write_text(str(microseconds))
    elif (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{microseconds} {_PERIOD_MICROSECONDS}")
    else:
        raise BenchError("a share of a core cannot be given: control groups have no controller of the processor here")


def _move(pid: int, group: Path) -> None:
    parent = psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        (group / "cgroup.procs").write_text(str(process.pid))
