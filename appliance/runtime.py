"""What runs in the worker: the pool, the inbox, the scheduler and the Flask app.

All of them are opened in the worker, never at import time and never in the arbiter: a thread or a connection does not
survive a fork.
"""

import logging
import os
import threading
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from flask import Flask, jsonify, request
from werkzeug.exceptions import BadRequest, HTTPException
from werkzeug.wrappers import Response

from appliance.admin import demo, health, metrics, pages
from appliance.admin.auth import session_key
from appliance.admin.sentences import ANY_SITE
from appliance.alerts.conditions import Room
from appliance.alerts.watch import Watch
from appliance.collect import routes as collect
from appliance.collect.admission import Admission
from appliance.collect.collector import Collector
from appliance.collect.inbox import Inbox
from appliance.collect.refusals import Refusals
from appliance.collect.spool import Spool
from appliance.collect.tallies import RequestTally
from appliance.config import Settings
from appliance.export.buckets.probe import Probe
from appliance.export.errands import Errands
from appliance.export.job import Exporter
from appliance.export.process import probe_apart, run_apart, verify_apart
from appliance.export.report import Report
from appliance.export.scheduler import Scheduler
from appliance.export.verify import Verdict
from appliance.log import request_id
from appliance.store import counters, versions
from appliance.store.attach import conninfo_of
from appliance.store.database import Database
from appliance.store.migrations import migrate
from appliance.store.preparing import Preparation
from appliance.store.upgrading import Upgrade
from appliance.wire.figures import WebFigures

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

# Of the ten seconds that `docker stop` gives, PostgreSQL needs some too (server.py).
EXPORT_STOP_SECONDS = 4.0
_ALERT_STOP_SECONDS = 1.0
_SESSION_HOURS = 12
_SPOOL_NEARLY_FULL = 0.9
_SERVER_ERROR = 500


class Runtime:
    """Everything that runs in the worker beside the web server."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._conninfo = conninfo_of(settings)
        self.stopping = threading.Event()
        self.db = Database(self._conninfo)
        self.spool = Spool(settings.server.data_dir / "spool", max_bytes=settings.collect.spool_max_bytes)
        self.inbox = Inbox(self.db, self.spool)
        self.admission = Admission(settings)
        self.refusals = Refusals(self.db)
        self._exporter = Exporter(settings, self.db, conninfo=self._conninfo, stopping=self.stopping)
        self._scheduler = Scheduler(settings, self.db, self._exporter, run=self.run_export, stopping=self.stopping)
        self.errands = Errands(self._verify, self._probe)
        self.requests = {path: RequestTally() for path in collect.PATHS}
        self.watch = Watch(settings, self.db, room=self.room)
        self.web: Callable[[], WebFigures | None] = lambda: None
        """What the web server counts; it says how to ask it."""
        embedded = not settings.database.url.get_secret_value()
        self._upgrade = Upgrade(settings.server.data_dir.resolve()) if embedded else None
        self._doubt = ""
        self._preparation = Preparation(self.db, self._prepare, then=self._work, stopping=self.stopping)

    def start(self) -> None:
        """Open everything. The database may come later: until then events go to the spool. Raises StartError."""
        if not self.settings.sites:
            log.warning(ANY_SITE)
        self.inbox.start()
        self.db.open()
        self._preparation.start()
        self.watch.start()

    def stop(self) -> None:
        """Close everything, the way in first. An export ends at its next safe point or is cut off."""
        self.stopping.set()
        self.watch.stop()
        self.inbox.close()
        self.refusals.stop()
        self._scheduler.stop(EXPORT_STOP_SECONDS)
        self.watch.wait(_ALERT_STOP_SECONDS)
        self.db.close()

    def run_export(self, job: str, due: datetime | None = None) -> Report:
        """Run a job now, in a process of its own (export/process.py); `due`: unless another appliance has."""
        return run_apart(self.settings, job, conninfo=self._conninfo, stopping=self.stopping, due=due)

    def run_soon(self, job: str) -> bool:
        """Let a job run in the background; False while the scheduler does not run."""
        return self._scheduler.run_soon(job)

    def next_runs(self) -> dict[str, datetime]:
        """Return when each job runs next."""
        return self._scheduler.next_runs()

    def spooled_bytes(self) -> int:
        """Return how much waits in the spool."""
        return 0 if self.spool.empty else self.spool.used_bytes

    def note_unread(self, reason: str) -> None:
        """Let the owner see that a request was refused before anybody knew what it wanted."""
        self.refusals.note("request", reason)

    def _verify(self, job: str) -> Verdict:
        return verify_apart(self.settings, job, conninfo=self._conninfo, stopping=self.stopping)

    def _probe(self, bucket: str) -> Probe:
        return probe_apart(self.settings, bucket, conninfo=self._conninfo, stopping=self.stopping)

    def problems(self) -> list[str]:
        """Name what keeps events from being taken in, or soon will, and exports that are later than is allowed."""
        if not self.inbox.alive:
            return ["the inbox does not run"]
        problems = []
        if self.inbox.database_away and self.spool.used_bytes > self.spool.max_bytes * _SPOOL_NEARLY_FULL:
            problems.append("the database is away and the spool is nearly full")
            # Where there is a problem nobody is told of notes.
            problems += self._refusals()
        if self.room().disk_free < self.settings.health.min_free_disk_bytes:
            problems.append("the disk of the data directory is nearly full")
        if self.watch.late_jobs:
            # Not which: a job may bear a client's name, and strangers can ask for this.
            problems.append("exports are later than health.max_export_lag_minutes")
        return problems

    def notes(self) -> list[str]:
        """Name what is not as it should be while events are taken in."""
        notes = []
        if not self.spool.empty:
            notes.append(f"{self.spool.used_bytes} bytes of events wait in the spool for the database")
        elif self.inbox.database_away:
            notes.append("events go to the spool until the database can be used")
        if self._upgrade is not None and self._upgrade.under_way:
            notes.append("PostgreSQL is being upgraded")
        elif self._upgrade is not None and self._upgrade.has_failed:
            notes.append("the upgrade of PostgreSQL has failed and is tried again later: the log says why")
        notes += self._refusals() or self._unready()
        return notes

    def refusal(self) -> str:
        """Return why a database that answers is not used; empty where it is, or where it does not answer."""
        return self._preparation.refusal

    def _refusals(self) -> list[str]:
        return [self.refusal()] if self.refusal() else []

    def _unready(self) -> list[str]:
        if self._scheduler.alive:
            return []
        return ["the database is being prepared" if self._preparation.under_way else "the scheduler does not run"]

    def web_figures(self) -> WebFigures | None:
        """Return what the web server counts; None where nobody has said how to ask it."""
        return self.web()

    def room(self) -> Room:
        """Return how full disk and spool are."""
        data_dir = self.settings.server.data_dir
        try:
            disk = os.statvfs(data_dir)
            # What this user can have of it, as df has it.
            free, size = disk.f_bavail * disk.f_frsize, (disk.f_blocks - disk.f_bfree + disk.f_bavail) * disk.f_frsize
        except OSError:
            free = size = 0
        return Room(
            disk_path=str(data_dir),
            disk_free=free,
            disk_size=size,
            spool_used=self.spool.used_bytes,
            spool_size=self.spool.max_bytes,
        )

    def warnings(self) -> list[str]:
        """Say to the admin what the notes say, and what is wrong with the configuration as traffic shows."""
        return list(dict.fromkeys([*self.problems(), *self.notes(), *self.admission.warnings()]))

    def _prepare(self) -> None:
        """Bring the database's schema up to date. A round that fails is begun again, so its last step is the last."""
        with self.db.connection(wait_seconds=1) as conn:
            migrate(conn)
            self._doubt = versions.doubt(conn)
            self.admission.remember_sites(counters.site_ids(conn))
        self._exporter.sync_coverage()
        self.inbox.use_database()

    def _work(self) -> None:
        """Let everything else begin that works with the database."""
        if self._doubt:
            log.warning(self._doubt)
        self.refusals.start()
        self._scheduler.start()
        log.info("ready")


def create_app(runtime: Runtime) -> Flask:
    """Return the Flask app on a runtime."""
    settings = runtime.settings
    # Static files belong to the windows; the app itself has none.
    app = Flask("appliance", static_folder=None, template_folder=None)
    app.config.update(
        SECRET_KEY=session_key(settings.server.data_dir),
        SESSION_COOKIE_NAME="appliance",
        SESSION_COOKIE_HTTPONLY=True,
        # No other site can make an admin's browser do anything here.
        SESSION_COOKIE_SAMESITE="Strict",
        SESSION_COOKIE_PATH="/admin",
        PERMANENT_SESSION_LIFETIME=timedelta(hours=_SESSION_HOURS),
        # For the forms of the windows; /collect has a limit of its own.
        MAX_CONTENT_LENGTH=16_384,
    )
    app.register_blueprint(collect.blueprint())
    app.register_blueprint(
        health.blueprint(runtime.db, settings.server.data_dir, problems=runtime.problems, notes=runtime.notes)
    )
    app.register_blueprint(metrics.blueprint(settings.admin.token.get_secret_value(), _figures_of(runtime)))
    app.register_blueprint(pages.blueprint(settings, runtime.db, runtime))
    if settings.server.demo:
        app.register_blueprint(demo.blueprint())
    app.add_url_rule("/", view_func=lambda: _front(settings), endpoint="front")
    app.register_error_handler(HTTPException, _in_json)
    # What werkzeug makes of absurd dates in conditional requests for static files.
    app.register_error_handler(OverflowError, lambda _error: _in_json(BadRequest()))
    app.extensions["appliance"] = runtime
    collector = Collector(settings, runtime.inbox, runtime.admission, runtime.refusals)
    app.wsgi_app = collect.in_front_of(app.wsgi_app, collector, runtime.requests)  # type: ignore[assignment, method-assign]
    return app


def _figures_of(runtime: Runtime) -> metrics.Sources:
    return metrics.Sources(
        db=runtime.db,
        inbox=runtime.inbox,
        refusals=runtime.refusals,
        requests=runtime.requests,
        room=runtime.room,
        web=runtime.web_figures,
        alerts_looked_at=lambda: runtime.watch.looked_at,
    )


def _in_json(error: HTTPException) -> Response | HTTPException:
    """Answer programs as they expect it; the admin's pages are for people. What has failed stands in the log."""
    if request.path.startswith("/admin/"):
        return error
    answer = error.get_response()
    # What has failed stands in the log under this name.
    named = {"request": request_id()} if answer.status_code >= _SERVER_ERROR and request_id() else {}
    answer.set_data(jsonify(error=error.name.lower(), **named).get_data())
    answer.content_type = "application/json"
    return answer


def _front(settings: Settings) -> Response:
    """Send a person who opens the bare address somewhere useful."""
    answer = Response(status=302)
    answer.headers["Location"] = "/demo/" if settings.server.demo else "/admin/"
    return answer
