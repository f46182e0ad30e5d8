"""Counts every event where it must be, and holds the figures against what they must be."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import psycopg
from exporting import exported_ids

from appliance.store.embedded import EmbeddedPostgres
from soak.watching import MB, Disk, Watch, growth, left_over
from soak.world import World

# What a client may be told: stored, spooled, and, while it is full or starting, to come again; "-" is no answer.
_HONEST_ANSWERS = {"200", "202", "503", "-"}
# Queues of one outage and the heap's own holes; a worker that kept a hundredth of each event would be beyond it.
_GROWTH_MB = 24
# Connections come and go: 12 clients, the pool, the pipes of an export.
_GROWTH_FILES = 12
# A worker with its threads, its pool and the queue of an outage; three times what it has when it starts.
_MOST_MB = 200
# 12 clients, 1 for each of the pool, epoll, spool, locks, pipes: far from the 1,024 of a usual limit.
_MOST_FILES = 128
# Half of each page is left free for exported_at, and an id has an index: about 1 KB for events as small as these. What
# a COPY that was cut off leaves behind is reused only after a VACUUM.
_ROW_BYTES = 2048
# Ledger, counters, catalogs and PostgreSQL's log grow by the run and by the crash, not by the event.
_REST_MB = 64


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    name: str
    figure: str
    must_be: str = ""
    holds: bool = True

    def __str__(self) -> str:
        return f"{self.name:<46} {self.figure:>12}   {self.must_be}{'' if self.holds else '   MISSED'}"


def events(world: World) -> list[Line]:
    """Count every event in the table and in both buckets."""
    objects = {name: world.server.server.objects(bucket) for name, bucket in world.buckets.items()}
    return tally(world.crowd.acknowledged(), _stored(world), objects)


def tally(acknowledged: set[str], stored: Counter[str], objects: Mapping[str, Mapping[str, bytes]]) -> list[Line]:
    """Hold the table and the buckets against what was acknowledged, and against each other."""
    exported = {name: _ids(found) for name, found in objects.items()}
    places = [stored, *exported.values()]
    missing = {one for place in places for one in acknowledged - place.keys()}
    doubled = {one for place in places for one, number in place.items() if number > 1}
    strange = {one for ids in exported.values() for one in ids.keys() ^ stored.keys()}
    first, second = objects.values()
    return [
        Line("events acknowledged", f"{len(acknowledged):,}", "more than 0", bool(acknowledged)),
        Line("events stored", f"{stored.total():,}"),
        *(Line(f"events exported to {name}", f"{ids.total():,}") for name, ids in exported.items()),
        none("acknowledged events missing", len(missing)),
        none("duplicate events", len(doubled)),
        none("events in the table or a bucket only", len(strange)),
        none("objects that differ between the buckets", len({key for key, _ in first.items() ^ second.items()})),
    ]


def none(name: str, number: int) -> Line:
    return Line(name, f"{number:,}", "0", number == 0)


def at_most(name: str, figure: float, limit: float, unit: str) -> Line:
    return Line(name, f"{figure:,.0f} {unit}".strip(), f"at most {limit:,.0f}", figure <= limit)


def answers(world: World) -> list[Line]:
    """Tell what clients were answered."""
    statuses = world.crowd.statuses()
    names = {"-": "no answer"}
    lines = [Line(f"requests: {names.get(status, status)}", f"{n:,}") for status, n in sorted(statuses.items())]
    return [*lines, none("requests refused or failed", sum(statuses[one] for one in statuses.keys() - _HONEST_ANSWERS))]


def resources(world: World, watch: Watch, before: Disk, after: Disk) -> list[Line]:
    """Hold memory, open files, processes and disk against their bounds."""
    grown, files = growth(watch.samples)
    most, most_files = watch.most()
    rows = max(1, _stored(world).total())
    data = world.box.data_dir
    waiting = [*(data / "spool").glob("*.damaged"), *(data / "tmp").glob("*")]
    return [
        at_most("the last worker's memory has grown by", grown / MB, _GROWTH_MB, "MB"),
        at_most("the largest memory of a worker", most / MB, _MOST_MB, "MB"),
        at_most("the last worker's open files have grown by", files, _GROWTH_FILES, ""),
        at_most("the most open files of a worker", most_files, _MOST_FILES, ""),
        none("processes left over", len(left_over(world.box))),
        at_most("disk for each row", (after.table - before.table) / rows, _ROW_BYTES, "B"),
        at_most("disk for PostgreSQL's WAL", after.wal / MB, after.wal_limit / MB, "MB"),
        at_most("the rest of the data directory has grown by", (after.rest - before.rest) / MB, _REST_MB, "MB"),
        none("damaged or forgotten files", len(waiting)),
    ]


def _stored(world: World) -> Counter[str]:
    with psycopg.connect(EmbeddedPostgres(world.box.data_dir).conninfo) as conn:
        return Counter(str(row[0]) for row in conn.execute("SELECT event_id FROM events_log"))


def _ids(objects: Mapping[str, bytes]) -> Counter[str]:
    """One object at a time: all lines at once would not fit into the memory after hours."""
    found: Counter[str] = Counter()
    for key, data in objects.items():
        found.update(exported_ids({key: data}))
    return found
