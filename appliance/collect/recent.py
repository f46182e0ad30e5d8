"""The ids of events that were stored lately: most duplicates come seconds after the event itself."""

from collections.abc import Iterable, Sequence
from operator import attrgetter

from appliance.store.events import Event

# Of each of two generations; 150 bytes each.
_IDS = 10_000
# As numbers: UUIDs themselves are hashed and compared in Python.
_ID = attrgetter("event_id.int")


class RecentIds:
    """Ten to twenty thousand ids that were in the table when they were added. For one thread.

    A page that is left hands its events to the browser and cannot hear whether they arrived, so the next page sends
    them again. One such event in a group, and the table refuses the whole COPY: this keeps them out of it. Nobody is
    answered from memory alone: the server that answers now may be another one, without the last commits.
    """

    def __init__(self) -> None:
        self._young: set[int] = set()
        self._old: set[int] = set()

    def sort_out(self, events: Sequence[Event]) -> tuple[list[Event], list[Event]]:
        """Return the events with ids that are not remembered, and those with ids that are; of equal ids the first."""
        ids = set(map(_ID, events))
        if len(ids) == len(events) and ids.isdisjoint(self._young) and ids.isdisjoint(self._old):
            return list(events), []
        first: dict[int, Event] = {}
        for event in events:
            first.setdefault(_ID(event), event)
        remembered = [event for number, event in first.items() if number in self._young or number in self._old]
        return [e for number, e in first.items() if number not in self._young and number not in self._old], remembered

    def add(self, events: Iterable[Event]) -> None:
        """Note events that are committed."""
        self._young.update(map(_ID, events))
        if len(self._young) >= _IDS:
            self._young, self._old = set(), self._young
