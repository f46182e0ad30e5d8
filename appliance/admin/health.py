"""Health checks for load balancers and for `docker`'s HEALTHCHECK."""

import os
from collections.abc import Callable
from pathlib import Path

from flask import Blueprint, Response, jsonify

from appliance.errors import DatabaseUnavailableError
from appliance.store.database import Database


def blueprint(
    db: Database, data_dir: Path, *, problems: Callable[[], list[str]], notes: Callable[[], list[str]]
) -> Blueprint:
    """Return the routes.

    `problems` names what keeps events from being taken in, `notes` what is not as it should be while they are.
    """
    routes = Blueprint("health", __name__, url_prefix="/health")

    @routes.get("/live")
    def live() -> Response:
        return jsonify(status="ok")

    @routes.get("/ready")
    def ready() -> tuple[Response, int]:
        # Asked first: it takes a moment in which the others may change.
        database = _database(db)
        found = [*problems(), *_data_dir(data_dir)]
        if found:
            return jsonify(status="not ready", problems=found), 503
        noted = [*database, *notes()]
        return jsonify(status="degraded", notes=noted) if noted else jsonify(status="ok"), 200

    return routes


def _database(db: Database) -> list[str]:
    try:
        db.ping()
    except DatabaseUnavailableError:
        # The error may hold an address or a user's name, and this page is open to all: it stands in the log.
        return [db.why_away("the database does not answer")]
    return []


def _data_dir(data_dir: Path) -> list[str]:
    return [] if os.access(data_dir, os.W_OK) else ["the data directory cannot be written"]
