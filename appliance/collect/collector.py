"""Collecting: from a request to rows that are on disk, or to the reason why not."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from appliance.collect import payload
from appliance.collect.admission import Admission, Refusal, Sender
from appliance.collect.client import Address, client_address, is_unnamed_proxy, kept_address, said_by_proxies
from appliance.collect.events import Arrival, Parsed, TooManyEventsError, parse
from appliance.collect.http import Answer, BrokenBodyError, Pending, Request, then
from appliance.collect.identifiers import uuid7
from appliance.collect.inbox import Inbox, Outcome, Stored
from appliance.collect.refusals import Refusals
from appliance.config import Settings
from appliance.errors import ApplianceError
from appliance.store.events import Event

_MEDIA_TYPES = frozenset({"application/json", "text/plain"})
_RETRY_AFTER_SECONDS = 5
_OK = 200
_REFUSED_FROM = 400
_ORIGIN_CHARS = 200
# A day: the longest that browsers keep a preflight is less.
_PREFLIGHT_SECONDS = 86_400
# A transparent GIF of one by one pixels.
PIXEL = bytes.fromhex("47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b")
# What nearly every request is answered with.
_ONE_ACCEPTED = b'{"accepted":1,"duplicates":0,"rejected":[]}\n'


class _RefusedError(Exception):
    """The request is answered with an error and nothing of it is stored."""

    def __init__(self, status: int, reason: str, *, kind: str, content: bytes | None = None, **details: Any) -> None:
        super().__init__(reason)
        self.status = status
        self.kind = kind
        self.content = content
        self.details = details
        self.retry_after_seconds: int | None = None

    @classmethod
    def of(cls, refusal: Refusal, **details: Any) -> "_RefusedError":
        """Refuse the request as the sender was refused."""
        error = cls(refusal.status, refusal.reason, kind="", **details)
        error.retry_after_seconds = refusal.retry_after_seconds
        return error


class Collector:
    """Answers /collect and /pixel.gif."""

    def __init__(self, settings: Settings, inbox: Inbox, admission: Admission, refusals: Refusals) -> None:
        self._limits = settings.collect
        self._trusted_proxies = settings.server.trusted_proxies
        self._inbox = inbox
        self._admission = admission
        self._refusals = refusals

    def collect(self, request: Request) -> Answer | Pending:
        """Store the events of a body."""
        origin = request.header("HTTP_ORIGIN")
        return then(self._answered(self._store_body, request, origin), lambda answer: self._with_cors(answer, origin))

    def preflight(self, request: Request) -> Answer:
        """Tell a browser whether its page may send; which site it speaks for is known only with the body."""
        answer = Answer(204)
        answer.headers += [
            ("Access-Control-Allow-Methods", "POST"),
            ("Access-Control-Allow-Headers", "Content-Type, Content-Encoding"),
            ("Access-Control-Max-Age", str(_PREFLIGHT_SECONDS)),
        ]
        return self._with_cors(answer, request.header("HTTP_ORIGIN"))

    def pixel(self, request: Request) -> Answer | Pending:
        """Store a pageview of a page without JavaScript."""
        if request.method == "HEAD":
            # It asks about the picture and has seen no page.
            return _uncached(_pixel())
        return then(self._answered(self._store_pixel, request, _origin_of(request.header("HTTP_REFERER"))), _uncached)

    def _answered(
        self, store: Callable[[Request, str | None], Answer | Pending], request: Request, origin: str | None
    ) -> Answer | Pending:
        """Turn what went wrong into an answer."""
        try:
            return store(request, origin)
        except _RefusedError as error:
            if error.kind:
                kept = self._admission.may_be_kept(_sender(request, None, origin), None)
                self._refusals.note(error.kind, str(error), content=error.content if kept else None)
            answer = Answer.of(error.status, error=str(error), **error.details)
            if error.retry_after_seconds is not None:
                answer.headers.append(("Retry-After", str(error.retry_after_seconds)))
            return answer

    # -- /collect -----------------------------------------------------------------------------------------------------

    def _store_body(self, request: Request, origin: str | None) -> Answer | Pending:
        address = self._address(request)
        body = self._body(request)
        parsed = self._parse(body, _arrival(request, address))
        return self._store(parsed, _sender(request, address, origin), body)

    def _body(self, request: Request) -> bytes:
        limit = self._limits.max_body_bytes
        try:
            body = request.body(limit + 1)
        except BrokenBodyError as error:
            raise _RefusedError(400, str(error), kind="body") from error
        if request.media_type not in _MEDIA_TYPES:
            raise _RefusedError(415, "send application/json or text/plain", kind="media type", content=body)
        encoding = (request.header("HTTP_CONTENT_ENCODING") or "identity").strip().lower()
        if encoding == "gzip" and len(body) <= limit:
            try:
                body = payload.inflate(body, limit)
            except payload.BadPayloadError as error:
                raise _RefusedError(400, str(error), kind="body", content=body) from error
        elif encoding not in ("identity", "gzip"):
            raise _RefusedError(415, "send the body as it is, or with gzip", kind="media type")
        if len(body) > limit:
            raise _RefusedError(413, f"the body is larger than {limit} bytes", kind="size", content=body)
        return body

    def _parse(self, body: bytes, arrival: Arrival) -> Parsed:
        try:
            decoded = payload.decode(body)
            return parse(decoded, arrival, max_events=self._limits.max_batch_events, mint=uuid7)
        except TooManyEventsError as error:
            raise _RefusedError(413, str(error), kind="size", content=body) from error
        except payload.BadPayloadError as error:
            raise _RefusedError(400, str(error), kind="body", content=body) from error

    # -- /pixel.gif ---------------------------------------------------------------------------------------------------

    def _store_pixel(self, request: Request, origin: str | None) -> Answer | Pending:
        address = self._address(request)
        fields = request.query()
        page = request.header("HTTP_REFERER")
        event = {"url": page, **fields, "eventType": "pageview", "siteId": fields.get("site")}
        # Through text and back: a query may hold what JSON strings may not.
        parsed = self._parse(payload.encode(event).encode(errors="replace"), _arrival(request, address))
        stored = self._store(parsed, _sender(request, address, origin), None)
        return then(stored, lambda answer: _pixel() if answer.status < _REFUSED_FROM else answer)

    # -- both ---------------------------------------------------------------------------------------------------------

    def _address(self, request: Request) -> Address | None:
        """Return the client's address, unless it comes too often."""
        said = said_by_proxies(request.environ)
        address = client_address(request.header("REMOTE_ADDR"), **said, trusted=self._trusted_proxies)
        if address is not None and is_unnamed_proxy(address, **said, trusted=self._trusted_proxies):
            self._admission.note_proxy(address)
        refusal = self._admission.too_often(address)
        if refusal is not None:
            self._refusals.note(refusal.kind, refusal.reason)
            raise _RefusedError.of(refusal)
        return address

    def _store(self, parsed: Parsed, sender: Sender, body: bytes | None) -> Pending:
        for rejection in parsed.rejected:
            kept = self._admission.may_be_kept(sender, rejection.site_id)
            content = payload.describe(rejection.item).encode() if kept else None
            self._refusals.note("event", rejection.reason, content=content)
        if not parsed.rows:
            reasons = _rejections(parsed)
            # What was refused event by event is noted already.
            kind = "" if reasons else "body"
            reason = reasons[0]["reason"] if reasons else "there are no events"
            raise _RefusedError(400, reason, kind=kind, content=body, rejected=reasons)
        admitted = self._admitted(parsed, sender)
        rows = [self._with_kept_address(row, sender.address) for row in admitted.rows]
        return Pending(partial(self._inbox.submit, rows), partial(self._stored, admitted))

    def _stored(self, admitted: Parsed, outcome: Outcome) -> Answer:
        if isinstance(outcome, ApplianceError):
            answer = Answer.of(503, error="the events cannot be stored just now, please send them again")
            answer.headers.append(("Retry-After", str(_RETRY_AFTER_SECONDS)))
            return answer
        for position, reason in outcome.refused.items():
            row = admitted.rows[position]
            self._refusals.note("database", reason, site_id=row.site_id, content=row.raw_event_data.encode())
        return _answer(admitted, outcome)

    def _admitted(self, parsed: Parsed, sender: Sender) -> Parsed:
        """Reject what the sender may not send, and only that; when nothing else is left, the whole request."""
        refusals = {site: refusal for site in parsed.site_ids if (refusal := self._admission.refusal(site, sender))}
        if not refusals:
            return parsed
        for site_id, refusal in refusals.items():
            known = site_id if self._admission.knows(site_id) else ""
            # Who refuses an origin by mistake must hear which.
            where = f" ({sender.origin[:_ORIGIN_CHARS]})" if refusal.kind == "origin" and sender.origin else ""
            self._refusals.note(refusal.kind, refusal.reason + where, site_id=known)
        later = [refusal for refusal in refusals.values() if refusal.retry_after_seconds is not None]
        if later:
            # All of it: what is taken in now would not be sent again with the rest.
            raise _RefusedError.of(later[0])
        admitted = parsed.without({site_id: refusal.reason for site_id, refusal in refusals.items()})
        worst = max(refusals.values(), key=lambda refusal: refusal.status)
        if not admitted.rows and worst.status != _OK:
            raise _RefusedError.of(worst, rejected=_rejections(admitted))
        return admitted

    def _with_kept_address(self, row: Event, address: Address | None) -> Event:
        site = self._admission.site(row.site_id)
        if site is None or site.ip == "keep":
            return row
        return replace(row, ip_address=kept_address(address, site.ip))

    def _with_cors(self, answer: Answer, origin: str | None) -> Answer:
        answer.headers.append(("Vary", "Origin"))
        if origin and self._admission.allows_pages_of(origin):
            answer.headers += [
                ("Access-Control-Allow-Origin", origin),
                ("Access-Control-Expose-Headers", "Retry-After"),
            ]
        return answer


def _arrival(request: Request, address: Address | None) -> Arrival:
    return Arrival(
        received_at=datetime.now(UTC),
        user_agent=request.header("HTTP_USER_AGENT"),
        ip_address=str(address) if address else None,
    )


def _sender(request: Request, address: Address | None, origin: str | None) -> Sender:
    wish = request.header("HTTP_DNT") == "1" or request.header("HTTP_SEC_GPC") == "1"
    return Sender(address=address, origin=origin, wants_no_tracking=wish)


def _origin_of(page: str | None) -> str | None:
    """Return the origin of a page; "null", as browsers call it, of what has none."""
    if not page:
        return None
    try:
        parts = urlsplit(page)
    except ValueError:
        return "null"
    return f"{parts.scheme}://{parts.netloc}" if parts.scheme and parts.netloc else "null"


def _uncached(answer: Answer) -> Answer:
    answer.headers += [("Cache-Control", "no-store"), ("Cross-Origin-Resource-Policy", "cross-origin")]
    return answer


def _pixel() -> Answer:
    return Answer(body=PIXEL, media_type="image/gif")


def _answer(parsed: Parsed, stored: Stored) -> Answer:
    """Count what the sender sent: the row of a large envelope stands behind its events and is not one of them."""
    status = 202 if stored.spooled else 200
    if len(parsed.events) == 1 and 0 in stored.new and not parsed.rejected:
        return Answer(status, _ONE_ACCEPTED)
    accepted = sum(position in stored.new for position in range(len(parsed.events)))
    refused = [
        {"index": index, "reason": stored.refused[position]}
        for position, index in enumerate(parsed.indexes)
        if position in stored.refused
    ]
    return Answer.of(
        status,
        accepted=accepted,
        duplicates=len(parsed.events) - accepted - len(refused),
        rejected=[*_rejections(parsed), *refused],
    )


def _rejections(parsed: Parsed) -> list[dict[str, Any]]:
    return [{"index": rejection.index, "reason": rejection.reason} for rejection in parsed.rejected]
