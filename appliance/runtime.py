"""What runs in the worker: the pool, the inbox, the scheduler and the Flask app.

All of them are opened in the worker, never at import time and never in the arbiter: a thread or a connection does not
survive a fork.
"""

import logging
import threading
from datetime import datetime, timedelta

from flask import Flask, jsonify, request
from werkzeug.exceptions import BadRequest, HTTPException
from werkzeug.wrappers import Response

from appliance.admin import demo, health, pages
from appliance.admin.auth import session_key
from appliance.admin.sentences import ANY_SITE
from appliance.collect import routes as collect
from appliance.collect.admission import Admission
from appliance.collect.collector import Collector
from appliance.collect.inbox import Inbox
from appliance.collect.refusals import Refusals
from appliance.collect.spool import Spool
from appliance.config import Settings
from appliance.errors import ApplianceError, DatabaseUnavailableError
from appliance.export.buckets.probe import Probe
from appliance.export.errands import Errands
from appliance.export.job import Exporter, Report
from appliance.export.process import probe_apart, run_apart, verify_apart
from appliance.export.scheduler import Scheduler
from appliance.export.verify import Verdict
from appliance.store import counters
from appliance.store.attach import conninfo_of
from appliance.store.database import Database
from appliance.store.migrations import migrate

log = logging.getLogger(__name__)

# Of the ten seconds that `docker stop` gives, PostgreSQL needs some too (server.py).
EXPORT_STOP_SECONDS = 4.0
_PREPARE_EVERY_SECONDS = 0.5
_SESSION_HOURS = 12
_SPOOL_NEARLY_FULL = 0.9


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
        self._preparer = threading.Thread(target=self._prepare, name="prepare", daemon=True)

    def start(self) -> None:
        """Open everything. The database may come later: until then events go to the spool. Raises StartError."""
        if not self.settings.sites:
            log.warning(ANY_SITE)
        self.inbox.start()
        self.db.open()
        self.refusals.start()
        self._preparer.start()

    def stop(self) -> None:
        """Close everything, the way in first. An export ends at its next safe point or is cut off."""
        self.stopping.set()
        self.inbox.close()
        self.refusals.stop()
        self._scheduler.stop(EXPORT_STOP_SECONDS)
        self.db.close()

    def run_export(self, job: str) -> Report:
        """Run a job now, in a process of its own (export/process.py)."""
        return run_apart(self.settings, job, conninfo=self._conninfo, stopping=self.stopping)

    def run_soon(self, job: str) -> bool:
        """Let a job run in the background; False while the scheduler does not run."""
        return self._scheduler.run_soon(job)

    def next_runs(self) -> dict[str, datetime]:
        """Return when each job runs next."""
        return self._scheduler.next_runs()

    def spooled_bytes(self) -> int:
        """Return how much waits in the spool."""
        return 0 if self.spool.empty else self.spool.used_bytes

    def _verify(self, job: str) -> Verdict:
        return verify_apart(self.settings, job, conninfo=self._conninfo, stopping=self.stopping)

    def _probe(self, bucket: str) -> Probe:
        return probe_apart(self.settings, bucket, conninfo=self._conninfo, stopping=self.stopping)

    def problems(self) -> list[str]:
        """Name what keeps events from being taken in."""
        if not self.inbox.alive:
            return ["the inbox does not run"]
        if self.inbox.database_away and self.spool.used_bytes > self.spool.max_bytes * _SPOOL_NEARLY_FULL:
            return ["the database is away and the spool is nearly full"]
        return []

    def notes(self) -> list[str]:
        """Name what is not as it should be while events are taken in."""
        notes = []
        if self.inbox.database_away or not self.spool.empty:
            notes.append(f"{self.spool.used_bytes} bytes of events wait in the spool for the database")
        if not self._scheduler.alive:
            preparing = self._preparer.is_alive()
            notes.append("the database is being prepared" if preparing else "the scheduler does not run")
        return notes

    def warnings(self) -> list[str]:
        """Say to the admin what the notes say, and what is wrong with the configuration as traffic shows."""
        return [*self.problems(), *self.notes(), *self.admission.warnings()]

    def _prepare(self) -> None:
        """Wait for the database, bring its schema up to date, then let the scheduler run."""
        while not self.stopping.is_set():
            try:
                with self.db.connection(wait_seconds=1) as conn:
                    migrate(conn)
                    self.admission.remember_sites(counters.site_ids(conn))
                self._exporter.sync_coverage()
                # The last step: a round that fails is begun again.
                self.inbox.use_database()
                break
            except DatabaseUnavailableError as error:
                log.info("waiting for the database: %s", error)
            except ApplianceError as error:
                log.error("%s", error)  # noqa: TRY400 - the message says it all
                return
            except Exception:
                log.exception("the database could not be prepared")
            self.stopping.wait(_PREPARE_EVERY_SECONDS)
        if not self.stopping.is_set():
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
    app.register_blueprint(pages.blueprint(settings, runtime.db, runtime))
    if settings.server.demo:
        app.register_blueprint(demo.blueprint())
    app.add_url_rule("/", view_func=lambda: _front(settings), endpoint="front")
    app.register_error_handler(HTTPException, _in_json)
    # What werkzeug makes of absurd dates in conditional requests for static files.
    app.register_error_handler(OverflowError, lambda _error: _in_json(BadRequest()))
    app.extensions["appliance"] = runtime
    collector = Collector(settings, runtime.inbox, runtime.admission, runtime.refusals)
    app.wsgi_app = collect.in_front_of(app.wsgi_app, collector)  # type: ignore[assignment, method-assign]
    return app


def _in_json(error: HTTPException) -> Response | HTTPException:
    """Answer programs as they expect it; the admin's pages are for people. What has failed stands in the log."""
    if request.path.startswith("/admin/"):
        return error
    answer = error.get_response()
    answer.set_data(jsonify(error=error.name.lower()).get_data())
    answer.content_type = "application/json"
    return answer


def _front(settings: Settings) -> Response:
    """Send a person who opens the bare address somewhere useful."""
    answer = Response(status=302)
    answer.headers["Location"] = "/demo/" if settings.server.demo else "/admin/"
    return answer
