"""Group commit: the only writer of events.

Requests hand in their rows and wait. One thread takes what has gathered, commits it with a single COPY and releases all
of them. There is no delay on purpose: while one group is being committed the next gathers by itself, and an idle server
answers one event at the price of one commit.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

import psycopg

from appliance.errors import ApplianceError, DatabaseUnavailableError
from appliance.store import counters
from appliance.store import events as store
from appliance.store.database import Database
from appliance.store.events import Event

log = logging.getLogger(__name__)

# Larger groups gain little (60,000 rows/s are reached at 1,000) and make everyone in them wait.
_MAX_GROUP_EVENTS = 2_000
# Beyond this, requests are refused at once instead of waiting in a queue that only grows.
_MAX_WAITING_EVENTS = 20_000
_CONNECTION_WAIT_SECONDS = 1.0
_CLOSE_SECONDS = 4.0


class InboxFullError(ApplianceError):
    """More events wait than can be stored soon; the sender should come again."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of the events handed in, by their position; what is neither new nor refused is a duplicate."""

    new: frozenset[int]
    refused: dict[int, str]


@dataclass(slots=True, eq=False)
class _Submission:
    """The rows of one request, and where its thread waits for them."""

    events: Sequence[Event]
    done: threading.Event = field(default_factory=threading.Event)
    result: Stored | None = None
    error: ApplianceError | None = None


@dataclass(slots=True)
class _Outcome:
    """What became of a group's events, by event id."""

    new: set[UUID] = field(default_factory=set)
    refused: dict[UUID, str] = field(default_factory=dict)


class Inbox:
    """Stores events in groups. Start it once in the worker."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: deque[_Submission] = deque()
        self._waiting_events = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._write_groups, name="inbox", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def close(self) -> None:
        """Store what waits, then stop. What comes in later is refused.

        A database that has frozen must not keep the appliance from ending: what waits then was never answered.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the writer runs."""
        return self._thread.is_alive()

    def store(self, events: Sequence[Event]) -> Stored:
        """Commit the events and return what became of each; the caller's thread waits that long.

        Raises InboxFullError and DatabaseUnavailableError; the events may then be stored or not, and sending them again
        with the same ids is right.
        """
        submission = _Submission(events)
        with self._changed:
            if self._closed or self._waiting_events + len(events) > _MAX_WAITING_EVENTS:
                raise InboxFullError("too many events are waiting to be stored")
            self._waiting.append(submission)
            self._waiting_events += len(events)
            self._changed.notify()
        submission.done.wait()
        if submission.error is not None:
            raise submission.error
        if submission.result is None:
            raise ApplianceError("the inbox gave no result")
        return submission.result

    # -- the writer's thread ------------------------------------------------------------------------------------------

    def _write_groups(self) -> None:
        while group := self._next_group():
            try:
                outcome = self._commit([event for submission in group for event in submission.events])
            except ApplianceError as error:
                self._release(group, error)
            except Exception:
                # Whatever it was, the threads that wait must hear of it and the writer must live.
                log.exception("storing a group of events failed")
                self._release(group, DatabaseUnavailableError("the events could not be stored"))
            else:
                _share_out(group, outcome)

    def _next_group(self) -> list[_Submission]:
        """Wait for events and take them in order of arrival; an empty group means the end."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            group: list[_Submission] = []
            size = 0
            while self._waiting and (not group or size + len(self._waiting[0].events) <= _MAX_GROUP_EVENTS):
                submission = self._waiting.popleft()
                group.append(submission)
                size += len(submission.events)
            self._waiting_events -= size
            return group

    def _release(self, group: Sequence[_Submission], error: ApplianceError) -> None:
        for submission in group:
            submission.error = error
            submission.done.set()

    def _commit(self, events: Sequence[Event]) -> _Outcome:
        """Store a group: by one COPY while all is well, row by row where the database refuses some.

        Only errors of SQLSTATE classes 22 and 23 blame a row. Any other is tried once more on a fresh connection; a
        commit whose answer was lost is then found by its ids, which count as duplicates.
        """
        # In the order of their ids: two appliances on one database that get the same events cannot deadlock.
        ordered = sorted(events, key=lambda event: event.event_id)
        try:
            return self._copy(ordered)
        except psycopg.errors.UniqueViolation:
            return self._insert_new(ordered)
        except (psycopg.DataError, psycopg.IntegrityError):
            return self._isolate(ordered)
        except DatabaseUnavailableError as error:
            log.warning("storing a group of events failed, trying once more: %s", error)
            return self._isolate(ordered)

    def _copy(self, events: Sequence[Event]) -> _Outcome:
        with self._db.connection(wait_seconds=_CONNECTION_WAIT_SECONDS) as conn:
            store.copy_in(conn, events)
            counters.count_events(conn, events)
        return _Outcome({event.event_id for event in events})

    def _insert_new(self, events: Sequence[Event]) -> _Outcome:
        with self._db.connection(wait_seconds=_CONNECTION_WAIT_SECONDS) as conn:
            new = store.insert_new(conn, events)
            if new:
                counters.count_events(conn, _first_of_each(events, set(new)), last_id=max(new.values()))
        return _Outcome(set(new))

    def _isolate(self, events: Sequence[Event]) -> _Outcome:
        """Halve a group until what is refused stands alone, and store the rest."""
        try:
            return self._insert_new(events)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if len(events) == 1:
                reason = str(error).strip().partition("\n")[0]
                return _Outcome(refused={events[0].event_id: f"the database refuses it: {reason}"})
            middle = len(events) // 2
            left, right = self._isolate(events[:middle]), self._isolate(events[middle:])
            return _Outcome(left.new | right.new, left.refused | right.refused)


def _first_of_each(events: Sequence[Event], wanted: set[UUID]) -> list[Event]:
    """Return one event for each wanted id, the first of those that share it."""
    first: dict[UUID, Event] = {}
    for event in events:
        if event.event_id in wanted:
            first.setdefault(event.event_id, event)
    return list(first.values())


def _share_out(group: Sequence[_Submission], outcome: _Outcome) -> None:
    """Tell each request about its own events; of equal ids in one group the first to arrive is the new one."""
    unclaimed = set(outcome.new)
    for submission in group:
        new: set[int] = set()
        refused: dict[int, str] = {}
        for position, event in enumerate(submission.events):
            if event.event_id in outcome.refused:
                refused[position] = outcome.refused[event.event_id]
            elif event.event_id in unclaimed:
                unclaimed.remove(event.event_id)
                new.add(position)
        submission.result = Stored(frozenset(new), refused)
        submission.done.set()
