"""Storing one group of events: by one COPY while all is well, row by row where the database refuses some."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import psycopg

from appliance.collect.recent import RecentIds
from appliance.errors import DatabaseUnavailableError, StatementFailedError
from appliance.store import events as store
from appliance.store.database import Connection, Database, first_line
from appliance.store.events import Event

_CONNECTION_SECONDS = 1.0
# The constraint of schema.sql's primary key.
_ROW_IDS = "events_log_pkey"


@dataclass(slots=True)
class Outcome:
    """What became of a group's events, by event id; what is neither new, refused nor stuck is a duplicate."""

    everything_is_new: bool = False
    """One COPY took all of it: no id stands there twice, and none was there before."""
    new: set[UUID] = field(default_factory=set)
    refused: dict[UUID, str] = field(default_factory=dict)
    stuck: dict[UUID, str] = field(default_factory=dict)
    """Not stored for reasons that blame no row; found only where each is tried for itself (salvage.py)."""

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


class SequenceIsBehindError(StatementFailedError):
    """The ids that rows would get are taken, as after a copy by hand. That is no event's fault."""

    def __init__(self) -> None:
        super().__init__(
            "the sequence of events_log.id gives ids that are taken; this puts it right: "
            "SELECT setval(pg_get_serial_sequence('events_log', 'id'), max(id)) FROM events_log"
        )


class Committer:
    """Stores groups. Only errors of SQLSTATE classes 22 and 23 blame a row.

    Its methods raise DatabaseUnavailableError, and psycopg.Error for what else goes wrong in the database; events may
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
        deadline = time.monotonic() + within_seconds

        def left() -> float:
            return deadline - time.monotonic()

        try:
            outcome = self._copy(events, left)
        except psycopg.errors.UniqueViolation:
            outcome = self._insert_new(_by_id(events), left)
        except (psycopg.DataError, psycopg.IntegrityError):
            outcome = self._isolate(_by_id(events), left)
        except DatabaseUnavailableError:
            if left() < within_seconds / 2:
                raise
            outcome = self._isolate(_by_id(events), left)
        self._recent.add([e for e in events if e.event_id not in outcome.refused] if outcome.refused else events)
        return outcome

    def store_each(self, events: Sequence[Event], *, statement_seconds: float) -> Outcome:
        """Store events that may have been stored before; each statement may take so long."""
        return self._isolate(_by_id(events), lambda: statement_seconds)

    def answers(self) -> bool:
        """Return whether the database answers."""
        try:
            self._db.ping()
        except DatabaseUnavailableError:
            return False
        return True

    def _copy(self, events: Sequence[Event], left: Callable[[], float]) -> Outcome:
        """Store with one COPY what is not remembered to be there; what is remembered is looked for."""
        fresh, remembered = self._recent.sort_out(events)
        with self._connection(left, autocommit=True) as conn:
            if remembered:
                fresh += store.without_stored(conn, remembered)
            if fresh:
                store.copy_in(conn, _by_id(fresh))
        if len(fresh) == len(events):
            return Outcome(everything_is_new=True)
        return Outcome(new={event.event_id for event in fresh})

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
            first, second = halves(events)
            return self._isolate(first, left).add(self._isolate(second, left))

    @contextmanager
    def _connection(self, left: Callable[[], float], *, autocommit: bool = False) -> Iterator[Connection]:
        """Lend a connection for what is left of the time."""
        seconds = left()
        if seconds <= 0:
            raise DatabaseUnavailableError("the database is too slow")
        try:
            with self._db.connection(
                wait_seconds=min(seconds, _CONNECTION_SECONDS), answer_seconds=seconds, autocommit=autocommit
            ) as conn:
                yield conn
        except psycopg.errors.UniqueViolation as error:
            if error.diag.constraint_name == _ROW_IDS:
                raise SequenceIsBehindError from error
            raise


def _by_id(events: Sequence[Event]) -> list[Event]:
    """Order events so that two appliances on one database that get the same ones cannot deadlock."""
    # As numbers: UUIDs themselves compare in Python.
    return sorted(events, key=lambda event: event.event_id.int)


def halves(events: list[Event]) -> tuple[list[Event], list[Event]]:
    """Return the first and the second half."""
    middle = len(events) // 2
    return events[:middle], events[middle:]
