"""Group commit: the only writer of events.

Requests hand in their rows. One thread takes what has gathered, commits it with a single COPY and then lets all of them
be answered; no thread of theirs waits for that. There is no delay on purpose: while one group is being committed the
next gathers by itself, and an idle server answers one event at the price of one commit.

A group that the database does not take goes to the spool, and so does all that follows until the database has taken
something of the spool (drain.py). From then on new groups go to the database again, beside what is still drained.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeAlias

import psycopg

from appliance.collect import commit
from appliance.collect.commit import Committer, means_away
from appliance.collect.drain import Drain
from appliance.collect.spool import Spool, SpoolError
from appliance.collect.tallies import GroupTally
from appliance.errors import ApplianceError, DatabaseUnavailableError
from appliance.log import Seldom
from appliance.store.database import Database, first_line
from appliance.store.events import Event

log = logging.getLogger(__name__)

# Larger groups gain little (60,000 rows/s are reached at 1,000) and make everyone in them wait. Of a group's text
# several copies are made on its way to the spool and back, each of up to four bytes a character.
_MAX_GROUP_EVENTS = 2_000
_MAX_GROUP_CHARS = 2_000_000
# Beyond this, requests are refused at once instead of waiting in a queue that only grows.
_MAX_WAITING_EVENTS = 20_000
# So many events of an ordinary size, and no more of large ones: 1,000 of 65 KB took 1.5 GB.
_MAX_WAITING_CHARS = 32_000_000
# A database that has not answered by then is taken for frozen.
_COMMIT_SECONDS = 2.0
_CLOSE_SECONDS = 4.0


class InboxFullError(ApplianceError):
    """The events can be stored neither in the database nor in the spool; the sender should come again."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of the events handed in, by their position; what is neither new nor refused is a duplicate."""

    new: frozenset[int]
    refused: dict[int, str]
    spooled: bool = False
    """They are on disk, and in the table only when the database is back: duplicates count as new."""


Outcome: TypeAlias = Stored | ApplianceError
Done: TypeAlias = Callable[[Outcome], None]


class _Submission:
    """The rows of one request, and who is to hear what became of them."""

    __slots__ = ("_done", "chars", "events")

    def __init__(self, events: Sequence[Event], done: Done) -> None:
        self.events = events
        self.chars = sum(event.chars for event in events)
        self._done: Done | None = done

    def answer(self, outcome: Outcome) -> None:
        """Tell the request; what was told once stays."""
        done, self._done = self._done, None
        if done is not None:
            done(outcome)


class Inbox:
    """Stores events in groups. Start it once in the worker; until `use_database` it fills the spool."""

    def __init__(self, db: Database, spool: Spool) -> None:
        self._committer = Committer(db)
        self._spool = spool
        self._drain = Drain(db, self._committer, spool)
        self._complaints = Seldom(seconds=10)
        self.tally = GroupTally()
        self._turned_away = 0
        self._waiting: deque[_Submission] = deque()
        self._waiting_events = 0
        self._waiting_chars = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._write_groups, name="inbox", daemon=True)

    def start(self) -> None:
        """Begin to write. Raises StartError where the spool cannot be used."""
        self._spool.open()
        self._thread.start()

    def use_database(self) -> None:
        """Store events in the database from now on: it is there and its schema is current."""
        self._drain.start()

    def close(self) -> None:
        """Store what waits, then stop. What comes in later is refused.

        A database that has frozen must not keep the appliance from ending: what waits then goes to the spool.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)
        self._drain.stop()
        self._spool.close()

    @property
    def alive(self) -> bool:
        """Whether the writer runs."""
        return self._thread.is_alive()

    @property
    def database_away(self) -> bool:
        """Whether events go to the spool for now."""
        return self._drain.database_away

    @property
    def turned_away(self) -> int:
        """Events that could be put nowhere: too many waited, or neither database nor spool took them."""
        return self._turned_away

    def store(self, events: Sequence[Event]) -> Stored:
        """Put the events on disk and return what became of each; the caller's thread waits that long.

        Raises InboxFullError; the events may then be stored or not, and sending them again with the same ids is right.
        """
        answered: SimpleQueue[Outcome] = SimpleQueue()
        self.submit(events, answered.put)
        outcome = answered.get()
        if isinstance(outcome, ApplianceError):
            raise outcome
        return outcome

    def submit(self, events: Sequence[Event], done: Done) -> None:
        """Put the events on disk and call `done` then, with what became of each or with an InboxFullError.

        It may be called at once or by the writer's thread, which must not be made to wait.
        """
        if not events:
            done(Stored(frozenset(), {}))
            return
        submission = _Submission(events, done)
        with self._changed:
            full = self._closed or self._has_no_room_for(submission)
            if not full:
                self._waiting.append(submission)
                self._waiting_events += len(events)
                self._waiting_chars += submission.chars
                self._changed.notify()
            else:
                self._turned_away += len(events)
        if full:
            done(InboxFullError("too many events are waiting to be stored"))

    def _has_no_room_for(self, submission: _Submission) -> bool:
        """Return whether too much waits already; one submission alone may be as large as it is."""
        events, chars = self._waiting_events + len(submission.events), self._waiting_chars + submission.chars
        return bool(self._waiting) and (events > _MAX_WAITING_EVENTS or chars > _MAX_WAITING_CHARS)

    # -- the writer's thread ------------------------------------------------------------------------------------------

    def _write_groups(self) -> None:
        while group := self._next_group():
            try:
                self._write(group)
            except SpoolError as error:
                if self._complaints.due():
                    log.error("events are refused: %s", error)  # noqa: TRY400 - the message says it all
                self._refuse(group, error)
            except Exception as error:
                # Whatever it was, the threads that wait must hear of it and the writer must live.
                log.exception("storing a group of events failed")
                self._refuse(group, error)

    def _next_group(self) -> list[_Submission]:
        """Wait for events; return what has gathered, or nothing when it is time to end."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            group: list[_Submission] = []
            events = chars = 0
            while self._waiting:
                following = self._waiting[0]
                events += len(following.events)
                chars += following.chars
                if group and (events > _MAX_GROUP_EVENTS or chars > _MAX_GROUP_CHARS):
                    break
                group.append(self._waiting.popleft())
                self._waiting_events -= len(following.events)
                self._waiting_chars -= following.chars
            return group

    def _write(self, group: Sequence[_Submission]) -> None:
        events = [event for submission in group for event in submission.events]
        if not self._drain.database_away:
            try:
                outcome = self._committer.store(events, within_seconds=_COMMIT_SECONDS)
            except (DatabaseUnavailableError, psycopg.Error) as error:
                if self._complaints.due():
                    log.warning("the database does not take events, they go to the spool: %s", first_line(error))
                if means_away(error):
                    self._drain.note_failure()
            else:
                self.tally.note_stored(events, outcome)
                _share_out(group, outcome)
                if outcome.stored_any:
                    self._drain.note_success()
                return
        self._spool.append(events)
        self.tally.note_spooled(events)
        self._drain.note_backlog()
        for submission in group:
            submission.answer(_all_new(submission, spooled=True))

    def _refuse(self, group: Sequence[_Submission], error: Exception) -> None:
        with self._changed:
            self._turned_away += sum(len(submission.events) for submission in group)
        for submission in group:
            submission.answer(InboxFullError(f"the events could not be stored: {error}"))


def _all_new(submission: _Submission, *, spooled: bool) -> Stored:
    return Stored(frozenset(range(len(submission.events))), {}, spooled=spooled)


def _share_out(group: Sequence[_Submission], outcome: commit.Outcome) -> None:
    """Tell each request about its own events; of equal ids in one group the first to arrive is the new one."""
    if outcome.everything_is_new:
        for submission in group:
            submission.answer(_all_new(submission, spooled=False))
        return
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
        submission.answer(Stored(frozenset(new), refused))
