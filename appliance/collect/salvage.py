"""Storing events that failed together: each for itself if need be, and the finding of whose fault it is.

An error that blames no row may still be one event's own: a key too long for an index of the owner's, a trigger that
fails. What fails alone while others are stored is kept aside, or it would hold up all that came after it; what fails
because of a lock, a limit or a full disk must not be.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import psycopg

from appliance.collect.commit import Committer, Outcome, SequenceIsBehindError, halves, means_away
from appliance.errors import DatabaseUnavailableError
from appliance.store.database import first_line
from appliance.store.events import Event

# Nobody waits for these commits, but a frozen database must not stop the draining for good.
STATEMENT_SECONDS = 10.0
# So many parts in a row that cannot be stored are more than some events' own fault, unless others can be.
_MAX_FAILURES_IN_A_ROW = 32


@dataclass(slots=True)
class Salvage:
    """One attempt at a group."""

    committer: Committer
    _: KW_ONLY
    others_are_stored: bool
    """Whether events outside of the group have been stored since it failed for the first time."""
    _outcome: Outcome = field(default_factory=Outcome)
    _witness: Event | None = None
    """One of the group that is in the table."""
    _failures: int = 0

    def store(self, events: Sequence[Event]) -> Outcome:
        """Store what can be, however long that takes; `stuck` are those that fail where the witness does not.

        Without a witness they are all of the group that the table does not refuse. Raises DatabaseUnavailableError and
        psycopg.Error where the database is to blame, or may be; events may then be stored or not.
        """
        parts = [list(events)]
        while parts:
            # The first half next: what came first is stored first.
            parts += reversed(self._try(parts.pop()))
        if self._outcome.stuck and self._witness is not None:
            self._try_again([event for event in events if event.event_id in self._outcome.stuck])
        return self._outcome

    def _try(self, part: list[Event]) -> tuple[list[Event], ...]:
        """Store a part, or return the two in which to try it."""
        try:
            self._store(part)
        except (DatabaseUnavailableError, psycopg.Error) as error:
            if isinstance(error, SequenceIsBehindError) or self._is_away(error, alone=len(part) == 1):
                raise
            self._failures += 1
            if self._failures > _MAX_FAILURES_IN_A_ROW and not self.others_are_stored:
                self._ask_the_witness(error)
            if len(part) > 1:
                return halves(part)
            self._outcome.stuck[part[0].event_id] = first_line(error)
        return ()

    def _store(self, part: list[Event]) -> None:
        stored = self.committer.store_each(part, statement_seconds=STATEMENT_SECONDS)
        self._failures = 0
        self._witness = next((event for event in part if event.event_id not in stored.refused), self._witness)
        self._outcome = self._outcome.add(stored)

    def _try_again(self, stuck: list[Event]) -> None:
        """Try those that failed once more, now that others have been stored: a lock may have come and gone."""
        for event in stuck:
            reason = self._outcome.stuck.pop(event.event_id, None)
            if reason is None:
                # It was sent twice, and is stored.
                continue
            try:
                self._store([event])
            except SequenceIsBehindError:
                raise
            except (DatabaseUnavailableError, psycopg.Error) as error:
                self._ask_the_witness(error)
                self._outcome.stuck[event.event_id] = reason

    def _ask_the_witness(self, error: Exception) -> None:
        """Raise the error unless an event that is in the table is still taken, as a duplicate."""
        if self._witness is None:
            raise error
        self.committer.store_each([self._witness], statement_seconds=STATEMENT_SECONDS)
        self._failures = 0

    def _is_away(self, error: Exception, *, alone: bool) -> bool:
        """Return whether it is the database; where that answers, it was too much at once for the time."""
        if alone or not means_away(error):
            return means_away(error)
        return not self.committer.answers()
