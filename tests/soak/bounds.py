"""Holds the figures of a soak against what they must be: each bound is a sensible way beyond what was measured.

A leak shows by what is kept of each event. In a short run it would drown in what a heap does by itself: then memory is
not judged, and the table says so. Open files and disk are judged wherever a process lived for some 20 seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from soak.disk import Disk
from soak.growth import Growth, growth
from soak.table import Line, at_most, none
from soak.watching import MB, ROLES, WORKER, Record

# What a client may be told: stored, spooled, and, while it is full or starting, to come again; "-" is no answer.
_TAKEN = {"200", "202"}
_HONEST_ANSWERS = _TAKEN | {"503", "-"}
# With a server that is killed or restarted every ten seconds, 92 to 99 % were measured.
_LEAST_TAKEN_PERCENT = 75
# In so many minutes each kind comes at least once, on a slow machine too.
ALL_KINDS_MINUTES = 5

# What a heap does by itself, whatever the load: the worker's went up by 1.2 MB in two minutes after its warm-up, the
# others' by 10 KB at most.
_HEAP_BYTES = {WORKER: 3 * MB}
_OTHER_HEAP_BYTES = MB // 4
# What may be kept of each event in a run that is long enough to tell: a fraction of the 100 bytes that it arrives as.
_KEPT_BYTES = 16
# A worker that was made to keep its events whole kept 900 bytes of each: a run that could not tell half of that judges
# nothing.
_TELLING_BYTES = 500
_MOST_WORKER_MB = 120
# The pool opens up to 8 connections and gives them back: 5 at most were measured from one part of a minute to another.
# Nothing else of the worker's comes and goes for long.
_GROWTH_FILES = {WORKER: 6}
_OTHER_GROWTH_FILES = 2
# 34 were measured: 12 clients, the pool, epoll, spool, locks, pipes of an export.
_MOST_WORKER_FILES = 64

# 750 bytes were measured for events as small as these, with indexes, ledger and counters. Half of each page is left
# free for exported_at, and what a COPY that was cut off leaves behind is reused only after a VACUUM.
_ROW_BYTES = 1024
_TABLES_BYTES = 8 * MB
# PostgreSQL's log and its record of transactions: 5 bytes were measured.
_REST_BYTES_AN_EVENT = 16
_REST_BYTES = 2 * MB
# Of the spool, and of objects that are being written: 0 to 3 at once were measured.
_GROWTH_FILES_ON_DISK = 6


@dataclass(frozen=True)
class Load:
    """What was taken in while the processes were watched."""

    events: int
    seconds: float

    def within(self, seconds: float) -> float:
        return self.events * seconds / self.seconds


def faults(struck: Mapping[str, int], minutes: float) -> list[Line]:
    """Tell how often each kind of fault came, and name those that never did."""
    missing = sorted(kind for kind, times in struck.items() if not times)
    lines = [Line(f"fault: {kind}", f"{times:,}") for kind, times in sorted(struck.items()) if times]
    if minutes < ALL_KINDS_MINUTES:
        said = f"{', '.join(missing)}: 0 from {ALL_KINDS_MINUTES} minutes on" if missing else ""
        return [*lines, Line("kinds of fault that never came", str(len(missing)), said)]
    return [*lines, *(Line(f"fault: {kind}", "0", "at least 1", holds=False) for kind in missing)]


def answers(statuses: Mapping[str, int]) -> list[Line]:
    """Tell what clients were answered."""
    names = {"-": "no answer"}
    lines = [Line(f"requests: {names.get(status, status)}", f"{n:,}") for status, n in sorted(statuses.items())]
    taken = 100 * sum(statuses.get(one, 0) for one in _TAKEN) / max(1, sum(statuses.values()))
    return [
        *lines,
        none("requests refused or failed", sum(statuses[one] for one in statuses.keys() - _HONEST_ANSWERS)),
        Line(
            "requests stored or spooled",
            f"{taken:.1f} %",
            f"at least {_LEAST_TAKEN_PERCENT}",
            taken >= _LEAST_TAKEN_PERCENT,
        ),
    ]


def processes(record: Record, load: Load) -> list[Line]:
    """Hold memory and open files of each process that the appliance lives by."""
    lines = []
    for role in ROLES:
        points = record.points(role, lambda one: one.memory)
        if not points:
            lines.append(Line(f"the {role}", "never seen", holds=False))
            continue
        lines.append(_kept(role, record, load))
        files = growth(record.points(role, lambda one: one.files))
        most = _GROWTH_FILES.get(role, _OTHER_GROWTH_FILES)
        lines.append(_grown(f"the {role}'s open files have grown by", files, most))
    largest = record.most(WORKER, lambda one: one.memory) / MB
    lines.append(at_most("the largest memory of a worker", largest, _MOST_WORKER_MB, "MB"))
    most_files = record.most(WORKER, lambda one: one.files)
    lines.append(at_most("the most open files of a worker", most_files, _MOST_WORKER_FILES))
    return lines


def _kept(role: str, record: Record, load: Load) -> Line:
    """Judge by bytes for each event; the fewer events there were, the more of them a heap's own doing stands for."""
    name = f"memory that the {role} kept of an event"
    grown = growth(record.points(role, lambda one: one.memory))
    events = load.within(grown.seconds)
    heap = _HEAP_BYTES.get(role, _OTHER_HEAP_BYTES)
    if events * _TELLING_BYTES < heap:
        return Line(name, "-", "too short to judge memory")
    return at_most(name, grown.by / events, max(_KEPT_BYTES, heap / events), "B")


def _grown(name: str, grown: Growth, most: int) -> Line:
    if not grown.seconds:
        return Line(name, "-", "too short to judge")
    return at_most(name, grown.by, most)


def disk(before: Disk, after: Disk, record: Record, load: Load, *, most_wal: int) -> list[Line]:
    """Hold what lay in the directory before and after, and what was seen there meanwhile."""
    events = max(1, load.events)
    files = growth(record.disk_points(lambda one: one.files))
    wal = max([after.wal, *(one.wal for _, one in record.disks)])
    return [
        at_most(
            "disk for each event's row",
            (after.tables - before.tables) / events,
            _ROW_BYTES + _TABLES_BYTES / events,
            "B",
        ),
        at_most("the most disk for PostgreSQL's WAL", wal / MB, most_wal / MB, "MB"),
        at_most(
            "disk for each event, other than its row",
            (after.rest - before.rest) / events,
            _REST_BYTES_AN_EVENT + _REST_BYTES / events,
            "B",
        ),
        _grown("files beside PostgreSQL's have grown by", files, _GROWTH_FILES_ON_DISK),
    ]
