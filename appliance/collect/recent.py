"""The ids of events that were stored lately: most duplicates come seconds after the event itself."""

from collections.abc import Iterable, Sequence
from uuid import UUID

from appliance.store.events import Event

# Of each of two generations; 150 bytes each.
_IDS = 10_000


class RecentIds:
    """Ten to twenty thousand ids that are in the table. For one thread.

    A page that is left hands its events to the browser and cannot hear whether they arrived, so the next page sends
    them again. One such event in a group, and the table refuses the whole COPY: this keeps them out of it.
    """

    def __init__(self) -> None:
        self._young: set[UUID] = set()
        self._old: set[UUID] = set()

    def unknown(self, events: Sequence[Event]) -> list[Event]:
        """Return the events whose ids are not known to be in the table, in their order; of equal ones the first."""
        found: dict[UUID, Event] = {}
        for event in events:
            if event.event_id not in self._young and event.event_id not in self._old:
                found.setdefault(event.event_id, event)
        return list(found.values())

    def add(self, ids: Iterable[UUID]) -> None:
        """Note ids that are committed."""
        self._young.update(ids)
        if len(self._young) >= _IDS:
            self._young, self._old = set(), self._young

    def forget(self) -> None:
        """Know nothing any more: the server that answers next may be another one, without the last commits."""
        self._young, self._old = set(), set()
