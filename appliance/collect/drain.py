"""Brings what is in the spool into the database, and knows whether the database takes events at all."""

import logging
import threading
from collections.abc import Iterable, Iterator

import psycopg

from appliance.collect.commit import Committer, means_away
from appliance.collect.salvage import STATEMENT_SECONDS, Salvage
from appliance.collect.spool import Segment, Spool
from appliance.errors import ApplianceError
from appliance.log import Seldom
from appliance.store import quarantine
from appliance.store.database import Database, first_line
from appliance.store.events import Event

log = logging.getLogger(__name__)

# A database that is back should have its events soon; one that is away should not be asked all the time.
_RETRY_FROM_SECONDS = 0.25
_RETRY_TO_SECONDS = 5.0
_STOP_SECONDS = 2.0
# Groups of the spool are as small as the load was low; in bundles they drain faster than a full load brings new ones.
_BUNDLE_EVENTS = 1_000
_BUNDLE_CHARS = 2_000_000


class _StuckError(ApplianceError):
    """Events cannot be stored, and nothing shows yet whether that is their fault or the database's."""


def _bundled(groups: Iterable[list[Event]]) -> Iterator[list[Event]]:
    """Put small groups together, in their order."""
    bundle: list[Event] = []
    chars = 0
    for group in groups:
        bundle += group
        chars += sum(event.chars for event in group)
        if len(bundle) >= _BUNDLE_EVENTS or chars >= _BUNDLE_CHARS:
            yield bundle
            bundle, chars = [], 0
    if bundle:
        yield bundle


class Drain:
    """A thread that drains the spool while there is something in it."""

    def __init__(self, db: Database, committer: Committer, spool: Spool) -> None:
        self._db = db
        self._committer = committer
        self._spool = spool
        self._away = True
        self._successes = 0
        self._successes_before: int | None = None
        self._stopping = threading.Event()
        self._complaints = Seldom(seconds=30)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)

    @property
    def database_away(self) -> bool:
        """Whether new events have to go to the spool."""
        return self._away

    def start(self) -> None:
        """Begin to drain."""
        self._thread.start()

    def stop(self) -> None:
        """End after the group that is being stored; the rest stays in the spool."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def note_success(self) -> None:
        """The database has just taken events beside those of the spool."""
        self._successes += 1

    def note_failure(self) -> None:
        """The database has just gone away: ask it again before it gets new events."""
        with self._changed:
            self._away = True
            self._changed.notify()

    def note_backlog(self) -> None:
        """There is something in the spool."""
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        delay = _RETRY_FROM_SECONDS
        while not self._stopping.is_set():
            try:
                self._advance()
                delay = _RETRY_FROM_SECONDS
            except (ApplianceError, psycopg.Error) as error:
                self._away = self._away or means_away(error)
                if self._complaints.due():
                    log.warning("the spool is not drained yet: %s", self._db.why_away(first_line(error)))
                self._stopping.wait(delay)
                delay = min(delay * 2, _RETRY_TO_SECONDS)
            except Exception:
                log.exception("draining the spool failed")
                self._stopping.wait(_RETRY_TO_SECONDS)

    def _advance(self) -> None:
        """Drain one segment; without any, see whether the database is back, or wait for something to do."""
        segment = self._spool.oldest()
        if segment is not None:
            self._drain(segment)
        elif self._away:
            self._db.ping()
            self._database_is_back()
        else:
            with self._changed:
                if self._spool.empty and not self._away and not self._stopping.is_set():
                    self._changed.wait()

    def _database_is_back(self) -> None:
        if self._away:
            self._away = False
            log.info("the database takes events")

    def _drain(self, segment: Segment) -> None:
        number = 0
        for group in _bundled(self._spool.read(segment)):
            if self._stopping.is_set():
                return
            self._store(group)
            self._database_is_back()
            number += len(group)
        self._spool.remove(segment)
        if number:
            log.info("%d events of the spool are in the database", number)

    def _store(self, group: list[Event]) -> None:
        since = self._successes_before
        others_are_stored = since is not None and since != self._successes
        try:
            outcome = Salvage(self._committer, others_are_stored=others_are_stored).store(group)
            failed = outcome.stuck.keys() | outcome.refused.keys()
            # (An event that was sent twice stands there twice.)
            if outcome.stuck and failed == {event.event_id for event in group} and not others_are_stored:
                raise _StuckError(next(iter(outcome.stuck.values())))
        except (ApplianceError, psycopg.Error) as error:
            if not means_away(error):
                self._wait_for_others()
            raise
        self._successes_before = None
        aside = {**outcome.refused, **outcome.stuck}
        if aside:
            log.error("%d events of the spool cannot be stored: they are in the quarantine", len(aside))
            with self._db.connection(answer_seconds=STATEMENT_SECONDS) as conn:
                quarantine.keep_acknowledged(conn, [(e, aside[e.event_id]) for e in group if e.event_id in aside])

    def _wait_for_others(self) -> None:
        """Note how many have been stored by now: once there are more, it is not the database that is to blame."""
        self._successes_before = self._successes
        # It answers, and may take other events: those are not kept from it.
        self._database_is_back()
