"""The thread that looks every few seconds whether something is wrong, and has people told."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import psycopg

from appliance.alerts import conditions, sending
from appliance.alerts.board import Board
from appliance.alerts.conditions import Alert, Exports, Room, lags
from appliance.config import Settings
from appliance.errors import DatabaseUnavailableError
from appliance.log import Seldom, redactor
from appliance.store import figures
from appliance.store.database import Database

log = logging.getLogger(__name__)

EVERY_SECONDS = 20.0
_ANSWER_SECONDS = 10.0
_OF_ROOM = frozenset({"disk", "spool"})
_OF_EXPORTS = frozenset({"failing", "late"})


class Watch:
    """Started once in the worker. Without URLs it tells nobody, and knows all the same how late exports are."""

    def __init__(
        self, settings: Settings, db: Database, *, room: Callable[[], Room], every_seconds: float = EVERY_SECONDS
    ) -> None:
        self._settings = settings
        self._db = db
        self._room = room
        self._every_seconds = every_seconds
        self._schedules = {name: export.schedule for name, export in settings.exports.items()}
        self._board = board_of(settings)
        self._late: tuple[str, ...] = ()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
        self.looked_at: float | None = None
        """When it last looked (seconds since 1970)."""

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Wait for what is being sent, so that it is known to be told after a restart; but not for long."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def late_jobs(self) -> tuple[str, ...]:
        """Return the jobs that are later than [health] allows, as it was when the database last answered."""
        return self._late

    def look(self) -> None:
        """Look once."""
        limits = self._settings.alerts
        holding = conditions.of_room(self._room(), limits, active=self._board.active() if limits.urls else frozenset())
        judged = _OF_ROOM
        exports = self._exports()
        if exports is not None:
            now = datetime.now(UTC)
            holding |= conditions.of_exports(exports, limits, self._schedules, now=now)
            # While the database is away nobody knows, and what was wrong is taken to be so still.
            judged = _OF_ROOM | _OF_EXPORTS
            self._note_late(exports, now)
        if limits.urls:
            self._board.settle(holding, lambda key: key.partition(":")[0] in judged)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
            except Exception:
                log.exception("looking for what is wrong failed")
            self.looked_at = time.time()
            self._stopped.wait(self._every_seconds)

    def _exports(self) -> Exports | None:
        try:
            with self._db.connection(wait_seconds=1, answer_seconds=_ANSWER_SECONDS) as conn:
                return Exports(
                    backlog=figures.backlog(conn),
                    failed_runs=figures.failed_runs(conn),
                    failing_buckets=figures.failing_buckets(conn),
                )
        except (DatabaseUnavailableError, psycopg.Error):
            return None

    def _note_late(self, exports: Exports, now: datetime) -> None:
        allowed = self._settings.health.max_export_lag_minutes
        late = lags(exports.backlog, self._schedules, now=now) if allowed else {}
        self._late = tuple(job for job, lag in late.items() if lag.total_seconds() > allowed * 60)


def board_of(settings: Settings) -> Board:
    """Return the board of this appliance."""
    return Board(settings.server.data_dir, _Teller(settings).tell)


class _Teller:
    def __init__(self, settings: Settings) -> None:
        self._urls = [url.get_secret_value() for url in settings.alerts.urls]
        self._redact = redactor(settings.secret_values())
        self._complaints = Seldom(seconds=600)

    def tell(self, alert: Alert) -> bool:
        """Tell everybody; return whether anybody has heard of it."""
        sent = sending.send(self._urls, Alert(alert.title, self._redact(alert.text)))
        problems = [one for one in sent if one.problem]
        if len(problems) < len(sent):
            log.warning("alert: %s: %s", alert.title, alert.text)
        if problems and (len(problems) < len(sent) or self._complaints.due()):
            log.error('the alert "%s" did not go to %s', alert.title, "; ".join(one.line for one in problems))
        return len(problems) < len(sent)
