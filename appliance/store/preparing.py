"""Waits for the database and makes it ready for work, as often as that takes; knows meanwhile why it is not used."""

import logging
import threading
from collections.abc import Callable

from appliance.errors import DatabaseUnavailableError, SchemaError
from appliance.log import Seldom
from appliance.store.database import Database

log = logging.getLogger(__name__)

_EVERY_SECONDS = 0.5
_SAY_EVERY_SECONDS = 30.0
# A database that answers and cannot be used is put right by a person, who need not start the appliance again for that.
_REFUSED_EVERY_SECONDS = 5.0
_REPEAT_EVERY_SECONDS = 600.0
# Of what nobody has foreseen the log has a traceback, which may hold anything.
_UNFORESEEN = "the database could not be prepared: the log says why"


class Preparation:
    """A thread that does `prepare` until it goes well, and `then` what comes after it, once."""

    def __init__(
        self, db: Database, prepare: Callable[[], None], *, then: Callable[[], None], stopping: threading.Event
    ) -> None:
        self._db = db
        self._prepare = prepare
        self._then = then
        self._stopping = stopping
        self._waiting = Seldom(seconds=_SAY_EVERY_SECONDS)
        self._complaints = Seldom(seconds=_REPEAT_EVERY_SECONDS)
        self._refusal = ""
        self._thread = threading.Thread(target=self._run, name="prepare", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def under_way(self) -> bool:
        """Whether it has not come to its end."""
        return self._thread.is_alive()

    @property
    def refusal(self) -> str:
        """Why a database that answers is not used, in a sentence that strangers may read; empty otherwise."""
        return self._refusal

    def _run(self) -> None:
        while not self._stopping.is_set() and not self._goes_well():
            self._stopping.wait(_REFUSED_EVERY_SECONDS if self._refusal else _EVERY_SECONDS)
        if not self._stopping.is_set():
            self._then()

    def _goes_well(self) -> bool:
        try:
            self._prepare()
        except DatabaseUnavailableError as error:
            self._refusal = ""
            if self._waiting.due():
                log.info("waiting for the database: %s", self._db.why_away(str(error)))
            return False
        except SchemaError as error:
            if self._is_to_be_said(str(error)):
                log.error("%s; events go to the spool until then", error)  # noqa: TRY400 - the message says it all
            return False
        except Exception:
            if self._is_to_be_said(_UNFORESEEN):
                log.exception("the database could not be prepared")
            return False
        self._refusal = ""
        return True

    def _is_to_be_said(self, refusal: str) -> bool:
        """Keep why it is not used; return whether that is news, or was said long ago."""
        due = self._complaints.due()
        news, self._refusal = refusal != self._refusal, refusal
        return news or due
