"""The ids of events that were stored lately: most duplicates come seconds after the event itself."""

from collections.abc import Iterable, Sequence
from operator import attrgetter

from appliance.store.events import Event

# Of each of two generations; 150 bytes each.
_IDS = 10_000
# As numbers: UUIDs themselves are hashed and compared in Python.
_ID = attrgetter("event_id.int")


class RecentIds:
    """Ten to twenty thousand ids that are in the table. For one thread.

    A page that is left hands its events to the browser and cannot hear whether they arrived, so the next page sends
    them again. One such event in a group, and the table refuses the whole COPY: this keeps them out of it.
    """

    def __init__(self) -> None:
        self._young: set[int] = set()
        self._old: set[int] = set()

    def unknown(self, events: Sequence[Event]) -> list[Event]:
        """Return the events whose ids are not known to be in the table, in their order; of equal ids the first."""
        ids = set(map(_ID, events))
        if len(ids) == len(events) and ids.isdisjoint(self._young) and ids.isdisjoint(self._old):
            return list(events)
        found: dict[int, Event] = {}
        for event in events:
            if _ID(event) not in self._young and _ID(event) not in self._old:
                found.setdefault(_ID(event), event)
        return list(found.values())

    def add(self, events: Iterable[Event]) -> None:
        """Note events that are committed."""
        self._young.update(map(_ID, events))
        if len(self._young) >= _IDS:
            self._young, self._old = set(), self._young

    def forget(self) -> None:
        """Know nothing any more: the server that answers next may be another one, without the last commits."""
        self._young, self._old = set(), set()
