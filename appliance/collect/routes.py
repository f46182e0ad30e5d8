"""/collect and /tracking.js."""

import gzip
import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import minify
from flask import Blueprint, Response, jsonify, request
from werkzeug.wrappers import Response as BaseResponse

from appliance.collect import payload
from appliance.collect.client import client_address, kept_address, parse_address
from appliance.collect.events import Arrival, Parsed, TooManyEventsError, parse
from appliance.collect.identifiers import uuid7
from appliance.collect.inbox import Inbox, InboxFullError, Stored
from appliance.config import DEMO_SITE, Settings, Site
from appliance.errors import DatabaseUnavailableError
from appliance.resources import read_resource
from appliance.store.events import Event

_MEDIA_TYPES = frozenset({"application/json", "text/plain"})
_RETRY_AFTER_SECONDS = 5
# A day: the longest that browsers keep a preflight is less.
_PREFLIGHT_SECONDS = 86_400
_DISCARDED_BYTES = 1024 * 1024
_TRACKER_SECONDS = 3_600


class _RefusedError(Exception):
    """The request is answered with an error and nothing of it is stored."""

    def __init__(self, status: int, reason: str, **details: Any) -> None:
        super().__init__(reason)
        self.status = status
        self.details = details


def blueprint(settings: Settings, inbox: Inbox) -> Blueprint:
    """Return the routes of the way in."""
    routes = Blueprint("collect", __name__)
    collector = _Collector(settings, inbox)
    tracker = _Tracker(read_resource("tracking.js"))
    routes.add_url_rule(
        "/collect", view_func=collector.collect, methods=["POST"], endpoint="collect", provide_automatic_options=False
    )
    routes.add_url_rule("/collect", view_func=collector.preflight, methods=["OPTIONS"], endpoint="preflight")
    routes.add_url_rule("/tracking.js", view_func=tracker.serve, endpoint="tracker")
    return routes


class _Collector:
    """Answers /collect."""

    def __init__(self, settings: Settings, inbox: Inbox) -> None:
        self._settings = settings
        self._inbox = inbox
        self._sites = {site.id: site for site in settings.sites}
        if self._sites and settings.server.demo:
            self._sites.setdefault(DEMO_SITE, Site(id=DEMO_SITE))
        self._any_origin = not settings.sites or any(not site.origins for site in settings.sites)
        self._origins = frozenset(origin for site in settings.sites for origin in site.origins)

    def collect(self) -> Response:
        try:
            answer = self._store()
        except _RefusedError as error:
            answer = jsonify(error=str(error), **error.details)
            answer.status_code = error.status
        except (InboxFullError, DatabaseUnavailableError):
            answer = jsonify(error="the events cannot be stored just now, please send them again")
            answer.status_code = 503
            answer.headers["Retry-After"] = str(_RETRY_AFTER_SECONDS)
        return self._with_cors(answer)

    def preflight(self) -> Response:
        """Tell a browser whether its page may send; which site it speaks for is known only with the body."""
        answer = Response(status=204)
        answer.headers["Access-Control-Allow-Methods"] = "POST"
        answer.headers["Access-Control-Allow-Headers"] = "Content-Type"
        answer.headers["Access-Control-Max-Age"] = str(_PREFLIGHT_SECONDS)
        return self._with_cors(answer)

    def _store(self) -> Response:
        parsed = self._admitted(self._parse(self._body()))
        if not parsed.rows:
            reasons = _rejections(parsed)
            raise _RefusedError(400, reasons[0]["reason"] if reasons else "there are no events", rejected=reasons)
        rows = [self._with_kept_address(row) for row in parsed.rows]
        return _answer(parsed, self._inbox.store(rows))

    def _body(self) -> bytes:
        """Read the body, bounded whatever it claims its length to be."""
        limit = self._settings.collect.max_body_bytes
        # What is refused for its size or type is read all the same, within reason: left unread, it would end the
        # connection under the client's next request.
        body = _read(max(limit + 1, _DISCARDED_BYTES))
        if request.mimetype not in _MEDIA_TYPES:
            raise _RefusedError(415, "send application/json or text/plain")
        length = request.content_length
        if len(body) > limit or (length is not None and length > limit):
            raise _RefusedError(413, f"the body is larger than {limit} bytes")
        if length is not None and len(body) < length:
            raise _RefusedError(400, "the body is shorter than it claims to be")
        return body

    def _parse(self, body: bytes) -> Parsed:
        peer = client_address(
            request.remote_addr,
            forwarded_for=request.headers.get("X-Forwarded-For"),
            forwarded=request.headers.get("Forwarded"),
            trusted=self._settings.server.trusted_proxies,
        )
        arrival = Arrival(
            received_at=datetime.now(UTC),
            user_agent=request.headers.get("User-Agent"),
            ip_address=str(peer) if peer else None,
        )
        limit = self._settings.collect.max_batch_events
        try:
            return parse(payload.decode(body), arrival, max_events=limit, mint=uuid7)
        except TooManyEventsError as error:
            raise _RefusedError(413, str(error)) from error
        except payload.BadPayloadError as error:
            raise _RefusedError(400, str(error)) from error

    def _admitted(self, parsed: Parsed) -> Parsed:
        """Reject what the sender may not send, and only that; when nothing else is left, the whole request."""
        refusals = {site_id: why for site_id in parsed.site_ids if (why := self._refusal(site_id))}
        if not refusals:
            return parsed
        admitted = parsed.without(refusals)
        if not admitted.rows:
            raise _RefusedError(403, next(iter(refusals.values())), rejected=_rejections(admitted))
        return admitted

    def _refusal(self, site_id: str) -> str | None:
        if not self._sites:
            return None
        site = self._sites.get(site_id)
        if site is None:
            return f'no site "{site_id}" is configured here'
        origin = request.headers.get("Origin")
        if origin and site.origins and origin.lower() not in site.origins:
            return f'pages of this origin may not send events of site "{site_id}"'
        return None

    def _with_kept_address(self, row: Event) -> Event:
        site = self._sites.get(row.site_id)
        if site is None or site.ip == "keep":
            return row
        return replace(row, ip_address=kept_address(parse_address(row.ip_address), site.ip))

    def _with_cors(self, answer: Response) -> Response:
        origin = request.headers.get("Origin")
        answer.vary.add("Origin")
        if origin and (self._any_origin or origin.lower() in self._origins):
            answer.headers["Access-Control-Allow-Origin"] = origin
        return answer


def _read(limit: int) -> bytes:
    try:
        body: bytes = request.environ["wsgi.input"].read(limit)
    except Exception as error:
        # Whatever the web server makes of chunks that are none, or of a client that is gone in the middle.
        raise _RefusedError(400, "the body is broken") from error
    return body


def _answer(parsed: Parsed, stored: Stored) -> Response:
    """Count what the sender sent: the row of a large envelope stands behind its events and is not one of them."""
    accepted = sum(position in stored.new for position in range(len(parsed.events)))
    refused = [
        {"index": index, "reason": stored.refused[position]}
        for position, index in enumerate(parsed.indexes)
        if position in stored.refused
    ]
    return jsonify(
        accepted=accepted,
        duplicates=len(parsed.events) - accepted - len(refused),
        rejected=[*_rejections(parsed), *refused],
    )


def _rejections(parsed: Parsed) -> list[dict[str, Any]]:
    return [{"index": rejection.index, "reason": rejection.reason} for rejection in parsed.rejected]


class _Tracker:
    """Serves tracking.js small, cached and compressed; all of it is made once."""

    def __init__(self, source: str) -> None:
        self._plain = minify.string("application/javascript", source).encode()
        self._gzipped = gzip.compress(self._plain, mtime=0)
        self._etag = hashlib.sha256(self._plain).hexdigest()[:16]

    def serve(self) -> BaseResponse:
        zipped = request.accept_encodings["gzip"] > 0
        answer = Response(self._gzipped if zipped else self._plain, mimetype="text/javascript")
        if zipped:
            answer.headers["Content-Encoding"] = "gzip"
        answer.headers["Cache-Control"] = f"public, max-age={_TRACKER_SECONDS}"
        answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        answer.vary.add("Accept-Encoding")
        # Two representations, two tags.
        answer.set_etag(f"{self._etag}-gz" if zipped else self._etag)
        return answer.make_conditional(request.environ)
