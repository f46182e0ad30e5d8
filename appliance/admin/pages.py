"""The admin pages: who may open them, what every answer carries, and where each page is."""

from flask import Blueprint, Response, make_response, redirect, render_template, request, url_for
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Response as BaseResponse

from appliance.admin import filters
from appliance.admin.auth import Auth
from appliance.admin.inside import House, Inside
from appliance.admin.sessions import Sessions
from appliance.admin.views import configuration, exports, install, live, overview, quarantine
from appliance.collect.client import rate_key, sender_address
from appliance.config import Settings
from appliance.errors import DatabaseUnavailableError
from appliance.store.database import Database

# Nothing but this server's own files runs or loads here, whatever an event's text may hold.
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_OPEN = frozenset({"admin.static", "admin.login", "admin.log_in"})


def blueprint(settings: Settings, db: Database, inside: Inside) -> Blueprint:
    """Return the admin's routes."""
    routes = Blueprint("admin", __name__, url_prefix="/admin", template_folder="templates", static_folder="static")
    house = House(settings, db, inside, Auth(settings.admin, settings.server.data_dir))
    door = _Door(house)
    routes.add_url_rule("/login", view_func=door.form, endpoint="login")
    routes.add_url_rule("/login", view_func=door.log_in, methods=["POST"], endpoint="log_in")
    routes.add_url_rule("/logout", view_func=door.log_out, methods=["POST"], endpoint="log_out")
    for view in (overview, live, install, exports, quarantine, configuration):
        view.register(routes, house)
    for name, function in filters.ALL.items():
        routes.add_app_template_filter(function, name)
    routes.before_request(door.stop)
    routes.after_request(_with_security_headers)
    routes.context_processor(lambda: {"csrf": house.auth.csrf_token})
    routes.register_error_handler(DatabaseUnavailableError, lambda error: _away(house, error))
    routes.register_error_handler(NotFound, lambda _error: (render_template("missing.html"), 404))
    routes.record_once(_use_sessions)
    return routes


def _use_sessions(state: BlueprintSetupState) -> None:
    state.app.session_interface = Sessions()  # type: ignore[attr-defined]  # it is a Flask, not only an App


class _Door:
    """Lets in who may come in."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._auth = house.auth

    def stop(self) -> BaseResponse | tuple[str, int] | None:
        """Answer in place of a page that this request may not have, whichever that is."""
        if request.endpoint in _OPEN:
            return None
        if not self._house.settings.admin.enabled:
            return render_template("off.html"), 404
        changes = request.method not in {"GET", "HEAD", "OPTIONS"}
        if not self._auth.allowed():
            if not self._auth.has_password:
                return render_template("off.html", token_only=True), 401
            return redirect(url_for("admin.login"), 303 if changes else 302)
        if changes and not self._auth.may_change():
            return render_template("refused.html"), 403
        return None

    def form(self) -> BaseResponse | tuple[str, int]:
        if not self._auth.has_password:
            return redirect(url_for("admin.status"))
        return render_template("login.html", problem=None), 200

    def log_in(self) -> BaseResponse | tuple[str, int]:
        client = self._client()
        wait = self._auth.guess_wait_seconds(client)
        if wait:
            return _wait(wait, f"Too many wrong passwords. Try again in {_said(wait)}.")
        right = self._auth.log_in(request.form.get("password", ""), client)
        if right is None:
            return _wait(1, "Too many are logging in at once. Try again.")
        if not right:
            return render_template("login.html", problem="That is not the password."), 401
        return redirect(url_for("admin.status"))

    def log_out(self) -> BaseResponse:
        self._auth.log_out()
        return redirect(url_for("admin.login"))

    def _client(self) -> str:
        address = sender_address(request.environ, self._house.settings.server.trusted_proxies)
        return rate_key(address) if address else ""


def _wait(seconds: int, why: str) -> BaseResponse:
    page = make_response(render_template("login.html", problem=why), 429)
    page.headers["Retry-After"] = str(seconds)
    return page


def _said(seconds: int) -> str:
    return f"{seconds} seconds" if seconds <= 90 else f"{seconds // 60 + 1} minutes"  # noqa: PLR2004 - a minute and a half


def _away(house: House, error: DatabaseUnavailableError) -> tuple[str, int]:
    notes = [note for note in house.inside.warnings() if note != str(error)]
    return render_template("away.html", reason=error, refused=bool(house.inside.refusal()), notes=notes), 503


def _with_security_headers(answer: Response) -> Response:
    answer.headers["Content-Security-Policy"] = _CONTENT_POLICY
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["Referrer-Policy"] = "no-referrer"
    answer.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    if request.endpoint != "admin.static":
        answer.headers["Cache-Control"] = "no-store"
    return answer
