"""Health checks for load balancers and for `docker`'s HEALTHCHECK."""

import os
from collections.abc import Callable
from pathlib import Path

from flask import Blueprint, Response, jsonify

from appliance.errors import DatabaseUnavailableError
from appliance.store.database import Database


def blueprint(db: Database, data_dir: Path, *, started: Callable[[], str | None]) -> Blueprint:
    """Return the routes. `started` names the part of the worker that does not run, or None."""
    routes = Blueprint("health", __name__, url_prefix="/health")

    @routes.get("/live")
    def live() -> Response:
        return jsonify(status="ok")

    @routes.get("/ready")
    def ready() -> tuple[Response, int]:
        problems = [problem for problem in (_database(db), started(), _data_dir(data_dir)) if problem]
        if problems:
            return jsonify(status="not ready", problems=problems), 503
        return jsonify(status="ok"), 200

    return routes


def _database(db: Database) -> str | None:
    try:
        db.ping()
    except DatabaseUnavailableError:
        # The reason may hold an address or a user's name, and this page is open to all: it stands in the log.
        return "the database does not answer"
    return None


def _data_dir(data_dir: Path) -> str | None:
    return None if os.access(data_dir, os.W_OK) else "the data directory cannot be written"
