"""Counts every event where it must be."""

from collections import Counter
from collections.abc import Mapping

import psycopg
from exporting import exported_ids

from appliance.store.embedded import EmbeddedPostgres
from soak.table import Line, none
from soak.watching import left_over
from soak.world import World


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


def remains(world: World) -> list[Line]:
    """Count what nobody needs any more."""
    data = world.box.data_dir
    waiting = [*(data / "spool").glob("*.damaged"), *(data / "tmp").glob("*")]
    return [
        none("processes left over", len(left_over(world.box))),
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
