"""The admin page: events in, waiting, exported, and the last runs."""

from collections.abc import Callable
from datetime import UTC, datetime

from flask import Blueprint, Response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as BaseResponse

from appliance.admin.auth import Auth
from appliance.admin.sentences import ANY_SITE, held_up
from appliance.collect.client import rate_key, sender_address
from appliance.config import Settings
from appliance.errors import DatabaseUnavailableError
from appliance.store import events, overview, quarantine
from appliance.store.database import Database

_NEWEST_EVENTS = 15
_SHOWN_RUNS = 10
_SHOWN_REFUSED = 10
_SHOWN_BYTES = 300
_ANSWER_SECONDS = 10.0

# Nothing but this server's own files runs or loads here, whatever an event's text may hold.
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def blueprint(settings: Settings, db: Database, *, notes: Callable[[], list[str]]) -> Blueprint:
    """Return the admin's routes. `notes` says what is not as it should be."""
    routes = Blueprint("admin", __name__, url_prefix="/admin", template_folder="templates", static_folder="static")
    pages = _Pages(settings, db, notes)
    routes.add_url_rule("/", view_func=pages.status, endpoint="status")
    routes.add_url_rule("/login", view_func=pages.login_form, endpoint="login")
    routes.add_url_rule("/login", view_func=pages.log_in, methods=["POST"], endpoint="log_in")
    routes.add_url_rule("/logout", view_func=pages.log_out, methods=["POST"], endpoint="log_out")
    routes.add_app_template_filter(_moment, "moment")
    routes.add_app_template_filter(_number, "number")
    routes.add_app_template_filter(_beginning, "beginning")
    routes.after_request(_with_security_headers)
    return routes


class _Pages:
    def __init__(self, settings: Settings, db: Database, notes: Callable[[], list[str]]) -> None:
        self._settings = settings
        self._db = db
        self._notes = notes
        self._auth = Auth(settings.admin, settings.server.data_dir)

    def status(self) -> BaseResponse | tuple[str, int]:
        if not self._settings.admin.enabled:
            return render_template("off.html"), 404
        if not self._auth.allowed():
            if not self._auth.has_password:
                return render_template("off.html", token_only=True), 401
            return redirect(url_for("admin.login"))
        try:
            with self._db.connection(wait_seconds=2, answer_seconds=_ANSWER_SECONDS) as conn:
                state = overview.read(conn, run_limit=_SHOWN_RUNS)
                shown = {
                    "state": state,
                    "newest": events.newest(conn, limit=_NEWEST_EVENTS),
                    "refusals": quarantine.counts_of_a_day(conn),
                    "quarantine": quarantine.newest(conn, limit=_SHOWN_REFUSED),
                }
        except DatabaseUnavailableError as error:
            return render_template("away.html", reason=error, notes=self._notes()), 503
        words = {"settings": self._settings, "any_site": ANY_SITE, "held_up": held_up, "notes": self._notes()}
        return Response(render_template("status.html", **shown, **words, now=datetime.now(UTC)))

    def login_form(self) -> BaseResponse | tuple[str, int]:
        if not self._auth.has_password:
            return redirect(url_for("admin.status"))
        return render_template("login.html", problem=None), 200

    def log_in(self) -> BaseResponse | tuple[str, int]:
        client = self._client()
        if not self._auth.may_guess(client):
            page = render_template("login.html", problem="Too many wrong passwords. Wait a minute.")
            return Response(page, status=429, headers={"Retry-After": "60"})
        if not self._auth.log_in(request.form.get("password", ""), client):
            return render_template("login.html", problem="That is not the password."), 401
        return redirect(url_for("admin.status"))

    def log_out(self) -> BaseResponse:
        self._auth.log_out()
        return redirect(url_for("admin.login"))

    def _client(self) -> str:
        address = sender_address(request.environ, self._settings.server.trusted_proxies)
        return rate_key(address) if address else ""


def _with_security_headers(answer: Response) -> Response:
    answer.headers["Content-Security-Policy"] = _CONTENT_POLICY
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["Referrer-Policy"] = "no-referrer"
    if request.endpoint != "admin.static":
        answer.headers["Cache-Control"] = "no-store"
    return answer


def _moment(value: datetime | None) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S") if value else "-"


def _number(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _beginning(content: bytes | None) -> str:
    """Show a person how something began that may be no text at all."""
    text = (content or b"")[:_SHOWN_BYTES].decode(errors="replace")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
