"""Storing one group of events: by one COPY while all is well, row by row where the database refuses some."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from uuid import UUID

import psycopg

from appliance.collect.recent import RecentIds
from appliance.errors import DatabaseUnavailableError, StatementFailedError
from appliance.store import events as store
from appliance.store.database import Connection, Database, first_line
from appliance.store.events import Event

_CONNECTION_SECONDS = 1.0
# So many parts of a group in a row that cannot be stored: it is not the events that are to blame.
_MAX_FAILURES_IN_A_ROW = 32


@dataclass(slots=True)
class Outcome:
    """What became of a group's events, by event id; what is neither new, refused nor stuck is a duplicate."""

    everything_is_new: bool = False
    """One COPY took all of it: no id stands there twice, and none was there before."""
    new: set[UUID] = field(default_factory=set)
    refused: dict[UUID, str] = field(default_factory=dict)
    stuck: dict[UUID, str] = field(default_factory=dict)
    """Not stored for reasons that blame no row, and only found when asked for (`store_what_can_be`)."""

    @property
    def stored_any(self) -> bool:
        """Whether the table has just taken an event."""
        return self.everything_is_new or bool(self.new)

    def add(self, other: "Outcome") -> "Outcome":
        """Return this with what became of other events."""
        return Outcome(new=self.new | other.new, refused=self.refused | other.refused, stuck=self.stuck | other.stuck)


def means_away(error: Exception) -> bool:
    """Return whether an error shows that the database takes nothing at all."""
    return isinstance(error, DatabaseUnavailableError) and not isinstance(error, StatementFailedError)


class Committer:
    """Stores groups. Only errors of SQLSTATE classes 22 and 23 blame a row.

    Both methods raise DatabaseUnavailableError, and psycopg.Error for what else goes wrong in the database; events may
    then be stored or not, and storing them again with the same ids is right.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._recent = RecentIds()

    def store(self, events: Sequence[Event], *, within_seconds: float) -> Outcome:
        """Store new events, or fail within about that time. For one thread.

        A quick failure is tried once more on a fresh connection: a server that has been restarted has left the pool
        full of dead ones. A commit whose answer was lost is then found by its ids, which count as duplicates.
        """
        unknown = self._recent.unknown(events)
        if not unknown:
            return Outcome()
        try:
            outcome = self._store(_by_id(unknown), within_seconds)
        except (DatabaseUnavailableError, psycopg.Error):
            self._recent.forget()
            raise
        self._recent.add([e for e in unknown if e.event_id not in outcome.refused] if outcome.refused else unknown)
        if outcome.everything_is_new and len(unknown) < len(events):
            return Outcome(new={event.event_id for event in unknown})
        return outcome

    def _store(self, ordered: list[Event], within_seconds: float) -> Outcome:
        deadline = time.monotonic() + within_seconds

        def left() -> float:
            return deadline - time.monotonic()

        try:
            return self._copy(ordered, left)
        except psycopg.errors.UniqueViolation:
            return self._insert_new(ordered, left)
        except (psycopg.DataError, psycopg.IntegrityError):
            return self._isolate(ordered, left)
        except DatabaseUnavailableError:
            if left() < within_seconds / 2:
                raise
            self._recent.forget()
            return self._isolate(ordered, left)

    def store_what_can_be(self, events: Sequence[Event], *, statement_seconds: float) -> Outcome:
        """Store events that may have been stored before, each for itself if need be, however long that takes."""
        outcome = Outcome()
        parts = [_by_id(events)]
        failures = 0
        while parts:
            part = parts.pop()
            try:
                outcome = outcome.add(self._isolate(part, lambda: statement_seconds))
                failures = 0
            except (DatabaseUnavailableError, psycopg.Error) as error:
                if self._is_away(error, alone=len(part) == 1):
                    raise
                failures += 1
                if failures > _MAX_FAILURES_IN_A_ROW:
                    raise
                if len(part) == 1:
                    outcome.stuck[part[0].event_id] = first_line(error)
                else:
                    left, right = _halves(part)
                    parts += [right, left]
        return outcome

    def _is_away(self, error: Exception, *, alone: bool) -> bool:
        """Return whether it is the database; where that answers, it was too much at once for the time."""
        if alone or not means_away(error):
            return means_away(error)
        try:
            self._db.ping()
        except DatabaseUnavailableError:
            return True
        return False

    def _copy(self, events: Sequence[Event], left: Callable[[], float]) -> Outcome:
        with self._connection(left, autocommit=True) as conn:
            store.copy_in(conn, events)
        return Outcome(everything_is_new=True)

    def _insert_new(self, events: Sequence[Event], left: Callable[[], float]) -> Outcome:
        with self._connection(left) as conn:
            return Outcome(new=store.insert_new(conn, events))

    def _isolate(self, events: list[Event], left: Callable[[], float]) -> Outcome:
        """Halve a group until what is refused stands alone, and store the rest."""
        try:
            return self._insert_new(events, left)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if len(events) == 1:
                return Outcome(refused={events[0].event_id: f"the database refuses it: {first_line(error)}"})
            first, second = _halves(events)
            return self._isolate(first, left).add(self._isolate(second, left))

    def _connection(self, left: Callable[[], float], *, autocommit: bool = False) -> AbstractContextManager[Connection]:
        """Lend a connection for what is left of the time."""
        seconds = left()
        if seconds <= 0:
            raise DatabaseUnavailableError("the database is too slow")
        return self._db.connection(
            wait_seconds=min(seconds, _CONNECTION_SECONDS), answer_seconds=seconds, autocommit=autocommit
        )


def _by_id(events: Sequence[Event]) -> list[Event]:
    """Order events so that two appliances on one database that get the same ones cannot deadlock."""
    # As numbers: UUIDs themselves compare in Python.
    return sorted(events, key=lambda event: event.event_id.int)


def _halves(events: list[Event]) -> tuple[list[Event], list[Event]]:
    middle = len(events) // 2
    return events[:middle], events[middle:]
