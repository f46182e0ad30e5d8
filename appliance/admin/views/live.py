"""Live: events as they arrive. Each stream holds a thread while it lasts, so there are few and they end."""

import json
import threading
import time
from collections.abc import Iterator

from flask import Blueprint, Response, render_template, request, stream_with_context

from appliance.admin import filters
from appliance.admin.asked import clean, row_id
from appliance.admin.inside import House
from appliance.errors import DatabaseUnavailableError
from appliance.store import counters, events
from appliance.store.events import StoredEvent

# Of the sixteen threads that answer (server.py).
MAX_STREAMS = 4
STREAM_SECONDS = 180.0
_LOOK_EVERY_SECONDS = 1.0
# So long a stream whose reader has gone may hold its thread.
_SIGN_OF_LIFE_SECONDS = 5.0
_FIRST_EVENTS = 50
_EVENTS_A_LOOK = 100
_MAX_FILTER_CHARS = 100


def register(routes: Blueprint, house: House) -> None:
    """Add the page and its stream."""
    places = threading.BoundedSemaphore(MAX_STREAMS)
    routes.add_url_rule("/live", view_func=lambda: _page(house), endpoint="live")
    routes.add_url_rule("/live/events", view_func=lambda: _stream(house, places), endpoint="live_events")


def _page(house: House) -> str:
    site, event_type = _filter("site"), _filter("type")
    with house.connection() as conn:
        found = events.newest(conn, limit=_FIRST_EVENTS, site_id=site, event_type=event_type)
        sites = sorted(counters.site_ids(conn))
    return render_template(
        "live.html",
        events=[_shown(event) for event in found],
        newest=found[0].id if found else 0,
        sites=sites,
        site=site,
        event_type=event_type,
    )


def _stream(house: House, places: threading.BoundedSemaphore) -> Response:
    if not places.acquire(blocking=False):
        return Response("Too many live views are open.\n", 503, {"Retry-After": "30"}, mimetype="text/plain")
    stream = _Stream(house, places, after=_last_seen(), site=_filter("site"), event_type=_filter("type"))
    return Response(_Closing(stream), mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})


class _Stream:
    """What one browser gets."""

    def __init__(
        self, house: House, places: threading.BoundedSemaphore, *, after: int, site: str | None, event_type: str | None
    ) -> None:
        self._house = house
        self._places = places
        self._after = after
        self._site = site
        self._type = event_type
        self._closed = False

    def pieces(self) -> Iterator[str]:
        """Look again and again, until the time is over, the appliance stops, or the session has ended."""
        yield ": hello\n\n"
        ends_at = time.monotonic() + STREAM_SECONDS
        said_at = time.monotonic()
        stopping = self._house.inside.stopping
        while time.monotonic() < ends_at and not stopping.is_set() and self._house.auth.allowed():
            fresh = self._fresh()
            if fresh or time.monotonic() > said_at + _SIGN_OF_LIFE_SECONDS:
                said_at = time.monotonic()
                yield "".join(fresh) or ": still here\n\n"
            stopping.wait(_LOOK_EVERY_SECONDS)

    def close(self) -> None:
        """Give the place back."""
        if not self._closed:
            self._closed = True
            self._places.release()

    def _fresh(self) -> list[str]:
        try:
            with self._house.connection() as conn:
                found = events.newest(
                    conn, limit=_EVENTS_A_LOOK, after=self._after, site_id=self._site, event_type=self._type
                )
        except DatabaseUnavailableError:
            return []
        # A row that is committed behind a younger one is not shown: this is a window, and the export misses none.
        self._after = max([self._after, *(event.id for event in found)])
        return [f"id: {event.id}\ndata: {json.dumps(_shown(event))}\n\n" for event in reversed(found)]


class _Closing:
    """A body that gives its place back also where nobody has ever read it."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._pieces = stream_with_context(stream.pieces())

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """End it."""
        self._stream.close()


def _shown(event: StoredEvent) -> dict[str, str | int]:
    """Everything as text that cannot do anything; the page puts it in as text, too."""
    return {
        "id": event.id,
        "time": filters.moment(event.created_at),
        "site": filters.text(event.site_id) or filters.NONE,
        "type": filters.text(event.event_type),
        "path": filters.text(event.path) or filters.NONE,
        "visitor": filters.text(event.visitor_id)[-8:] or filters.NONE,
        "raw": filters.text(_indented(event.raw)),
    }


def _indented(raw: str) -> str:
    try:
        return json.dumps(json.loads(raw), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        # Cut off.
        return raw


def _filter(name: str) -> str | None:
    value = clean(request.args.get(name, ""))[:_MAX_FILTER_CHARS]
    return value or None


def _last_seen() -> int:
    """Where the browser has come to: by what it says when it connects again, or by where the page began."""
    said = request.headers.get("Last-Event-ID", "") or request.args.get("after", "")
    return row_id(said) or 0
