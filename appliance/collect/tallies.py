"""Counting what comes in as cheaply as can be: plain numbers, once a group of events or once a request."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter

from appliance.collect.commit import Outcome
from appliance.collect.http import Answer
from appliance.store.events import Event

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_EVENTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
_SITE = attrgetter("site_id")


class Histogram:
    """How often a value was up to each of some bounds, or above them. One thread at a time may note."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def up_to(self) -> list[tuple[float, int]]:
        """Return each bound with how many values are not above it; the last one is infinite."""
        found, number = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts.copy(), strict=True):
            number += count
            found.append((bound, number))
        return found


class GroupTally:
    """What became of the events of each site. Only the inbox's writer notes; anybody may look."""

    def __init__(self) -> None:
        self.sizes = Histogram(_EVENTS)
        self.accepted: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.spooled: Counter[str] = Counter()

    def note_stored(self, events: Sequence[Event], outcome: Outcome) -> None:
        """Count a group that the database has taken."""
        self.sizes.note(len(events))
        if outcome.everything_is_new:
            self.accepted.update(map(_SITE, events))
            return
        unclaimed = set(outcome.new)
        for event in events:
            if event.event_id in unclaimed:
                unclaimed.remove(event.event_id)
                self.accepted[event.site_id] += 1
            elif event.event_id not in outcome.refused:
                self.duplicates[event.site_id] += 1

    def note_spooled(self, events: Sequence[Event]) -> None:
        """Count a group that went to the spool; which of it is stored already will be seen later."""
        self.sizes.note(len(events))
        sites = Counter(map(_SITE, events))
        self.accepted.update(sites)
        self.spooled.update(sites)


class RequestTally:
    """How requests of one path were answered, and how long that took from their last byte on."""

    def __init__(self) -> None:
        self.seconds = Histogram(_SECONDS)
        self.statuses: Counter[int] = Counter()
        self._lock = threading.Lock()

    def note(self, answer: Answer, seconds: float) -> None:
        """Count an answer."""
        with self._lock:
            self.seconds.note(seconds)
            self.statuses[answer.status] += 1
