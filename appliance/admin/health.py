"""Health checks for load balancers and for `docker`'s HEALTHCHECK."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flask import Blueprint, Response, jsonify

from appliance.errors import DatabaseUnavailableError
from appliance.store.database import Database

# So long a database that was away is not asked again.
_AWAY_SECONDS = 0.5


def blueprint(
    db: Database, data_dir: Path, *, problems: Callable[[], list[str]], notes: Callable[[], list[str]]
) -> Blueprint:
    """Return the routes.

    `problems` names what keeps events from being taken in, `notes` what is not as it should be while they are.
    """
    asked = _Asked(db)
    routes = Blueprint("health", __name__, url_prefix="/health")

    @routes.get("/live")
    def live() -> Response:
        return jsonify(status="ok")

    @routes.get("/ready")
    def ready() -> tuple[Response, int]:
        # Asked first: it takes a moment in which the others may change.
        database = asked.notes()
        found = [*problems(), *_data_dir(data_dir)]
        if found:
            return jsonify(status="not ready", problems=found), 503
        noted = [*database, *notes()]
        return jsonify(status="degraded", notes=noted) if noted else jsonify(status="ok"), 200

    return routes


class _Asked:
    """What the database answered. While it is away one asks, and the others hear what that one heard last.

    Each would hold a thread for as long as that takes, and strangers may ask as often as they like.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._notes: list[str] = []
        self._again_at = 0.0

    def notes(self) -> list[str]:
        """Return what to say of it: nothing where it answers."""
        if not self._lock.acquire(blocking=not self._notes):
            return self._notes
        try:
            if not self._notes or time.monotonic() >= self._again_at:
                self._notes = _database(self._db)
                self._again_at = time.monotonic() + _AWAY_SECONDS
            return self._notes
        finally:
            self._lock.release()


def _database(db: Database) -> list[str]:
    try:
        db.ping()
    except DatabaseUnavailableError:
        # The error may hold an address or a user's name, and this page is open to all: it stands in the log.
        return [db.why_away("the database does not answer")]
    return []


def _data_dir(data_dir: Path) -> list[str]:
    return [] if os.access(data_dir, os.W_OK) else ["the data directory cannot be written"]
