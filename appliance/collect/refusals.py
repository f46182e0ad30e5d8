"""What was refused goes to the quarantine a little later, by a thread of its own: no sender makes us wait for that."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime

from appliance.errors import DatabaseUnavailableError
from appliance.log import Seldom
from appliance.store import quarantine
from appliance.store.database import Database
from appliance.store.quarantine import Refused

log = logging.getLogger(__name__)

# Enough to see what is wrong. The rest is counted.
_KEPT_BYTES = 16_384
_MAX_WAITING_PER_KIND = 20
_FORGET_SECONDS = 3_600.0
_FLUSH_SECONDS = 2.0
_ANSWER_SECONDS = 5.0


class Refusals:
    """Collects what was refused; bounded, and lost in a crash: its senders know."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: dict[str, list[Refused]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self.totals: Counter[tuple[str, str]] = Counter()
        """All that was refused since the start, by kind and site."""
        self._forgetting = Seldom(seconds=_FORGET_SECONDS)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refusals", daemon=True)

    def start(self) -> None:
        """Begin to write. The database must be there."""
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, and end."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_FLUSH_SECONDS)

    def note(self, kind: str, reason: str, *, site_id: str = "", content: bytes | None = None, number: int = 1) -> None:
        """Note that something was refused. The site must be one that is known: there are endless unknown ones."""
        with self._lock:
            self._counts[kind, site_id] += number
            self.totals[kind, site_id] += number
            waiting = self._waiting.setdefault(kind, [])
            if len(waiting) < _MAX_WAITING_PER_KIND:
                kept = content[:_KEPT_BYTES] if content is not None else None
                waiting.append(
                    Refused(kind=kind, reason=reason, site_id=site_id, content=kept, refused_at=datetime.now(UTC))
                )

    def _run(self) -> None:
        while not self._stopped.wait(_FLUSH_SECONDS):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            counts, self._counts = self._counts, Counter()
        if counts:
            try:
                self._write(waiting, counts)
            except DatabaseUnavailableError:
                self._put_back(waiting, counts)
            except Exception:
                log.exception("what was refused could not be kept")

    def _put_back(self, waiting: Mapping[str, list[Refused]], counts: Counter[tuple[str, str]]) -> None:
        with self._lock:
            self._counts.update(counts)
            for kind, entries in waiting.items():
                self._waiting[kind] = [*entries, *self._waiting.get(kind, [])][:_MAX_WAITING_PER_KIND]

    def _write(self, waiting: Mapping[str, list[Refused]], counts: Counter[tuple[str, str]]) -> None:
        with self._db.connection(answer_seconds=_ANSWER_SECONDS) as conn:
            quarantine.keep(conn, [one for entries in waiting.values() for one in entries])
            # In one order, so that two appliances on one database cannot deadlock.
            quarantine.count(conn, sorted(counts.items()))
            if self._forgetting.due():
                quarantine.forget_old_counts(conn)
