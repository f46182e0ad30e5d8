"""Payload -> rows, or a reason for each that cannot be one. Pure: no I/O, no clock, no chance of its own."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid5

from appliance.collect.payload import BadPayloadError, check_length, encode, without_unusable, written_out
from appliance.config import SITE_ID_PATTERN
from appliance.store.events import Event

BATCH_TYPE = "batch"
# Small metadata travels in every row of its envelope; larger would multiply (47 KB in 500 events made 19 MB of rows).
# So would an address: what is longer is cut in the rows, and stands whole in the envelope's own.
MAX_METADATA_CHARS = 2048
# A header may have 8 KB, and stands in every row of its request. Those of browsers have 100 to 300 letters.
MAX_USER_AGENT_CHARS = 1024
# Events may wait for days in a browser that is offline; beyond this a clock is wrong rather than slow.
MAX_AGE = timedelta(days=30)
# Where ids that are no UUIDs, and envelopes without an id, get theirs from.
ID_NAMESPACE = UUID("6f0d6d2e-3f0c-5a58-9c0e-8f6d0a4f2b11")

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_INHERITED = ("siteId", "sessionId", "visitorId", "url")
_MILLISECONDS_FROM = 100_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What the request itself says: when it came and from whom."""

    received_at: datetime
    user_agent: str | None
    ip_address: str | None


@dataclass(frozen=True, slots=True)
class Rejection:
    """An event that was refused; its index in the payload."""

    index: int
    reason: str
    item: Any = None
    """What stood there, where it may be kept."""
    site_id: str | None = None
    """The site that it names."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """The rows of a payload. `metadata` is a large envelope stored as a row of its own."""

    events: tuple[Event, ...]
    indexes: tuple[int, ...] = ()
    """Where in the payload each event stood."""
    rejected: tuple[Rejection, ...] = ()
    metadata: Event | None = None

    @property
    def rows(self) -> tuple[Event, ...]:
        """Everything to be stored."""
        return (*self.events, self.metadata) if self.metadata else self.events

    @property
    def site_ids(self) -> set[str]:
        """The sites that the payload speaks for."""
        return {row.site_id for row in self.rows}

    def without(self, sites: Mapping[str, str]) -> "Parsed":
        """Return this without the rows of some sites; their events are rejected for the reason given by site."""
        kept = [(i, e) for i, e in zip(self.indexes, self.events, strict=True) if e.site_id not in sites]
        refused = [
            Rejection(i, sites[e.site_id]) for i, e in zip(self.indexes, self.events, strict=True) if e.site_id in sites
        ]
        metadata = self.metadata
        if metadata and metadata.site_id in sites:
            # The events that are left name it: it goes with them, as it would if it were small.
            metadata = replace(metadata, site_id=kept[0][1].site_id) if kept else None
        return Parsed(
            tuple(event for _, event in kept),
            tuple(index for index, _ in kept),
            tuple(sorted((*self.rejected, *refused), key=lambda rejection: rejection.index)),
            metadata,
        )


class TooManyEventsError(BadPayloadError):
    """The payload holds more events than one request may."""


class _RefusedError(ValueError):
    """One event cannot be a row."""


def parse(payload: Any, arrival: Arrival, *, max_events: int, mint: Callable[[], UUID]) -> Parsed:
    """Turn one event, an array of events, or a batch envelope into rows.

    `mint` gives ids to events that bring none. Raises TooManyEventsError, and BadPayloadError for what is neither.
    """
    if isinstance(payload, dict):
        if payload.get("eventType") == BATCH_TYPE:
            return _parse_envelope(payload, arrival, max_events, mint)
        return _parse_list([payload], arrival, mint)
    if isinstance(payload, list):
        _check_number(payload, max_events)
        return _parse_list(payload, arrival, mint)
    raise BadPayloadError("the body must be an event (a JSON object) or an array of events")


def _check_number(events: list[Any], max_events: int) -> None:
    if len(events) > max_events:
        raise TooManyEventsError(f"{len(events)} events in one request, {max_events} are allowed")


def _parse_list(items: list[Any], arrival: Arrival, mint: Callable[[], UUID]) -> Parsed:
    return _sorted_out(_rows(items, {}, lambda item: item, arrival, mint))


def _sorted_out(results: Iterable[Event | Rejection]) -> Parsed:
    found = list(enumerate(results))
    return Parsed(
        tuple(result for _, result in found if isinstance(result, Event)),
        tuple(index for index, result in found if isinstance(result, Event)),
        tuple(result for _, result in found if isinstance(result, Rejection)),
    )


def _parse_envelope(envelope: dict[str, Any], arrival: Arrival, max_events: int, mint: Callable[[], UUID]) -> Parsed:
    children = envelope.get("events")
    if not isinstance(children, list):
        return _parse_list([envelope], arrival, mint)
    _check_number(children, max_events)
    fields = {key: value for key, value in envelope.items() if key != "events"}
    # What the database would not take of it must not cost the events that it holds.
    metadata = _usable(fields)
    envelope = {**envelope, **metadata}
    text = encode(metadata)
    large = written_out(text) > MAX_METADATA_CHARS
    note = {"eventId": str(_metadata_id(envelope, text, mint))} if large else metadata
    inherited = {**fields, "url": _cut(_text(fields.get("url")), MAX_METADATA_CHARS)}
    parsed = _sorted_out(_rows(children, inherited, lambda child: _with_note(child, note), arrival, mint))
    if not parsed.events:
        return _whole_envelope(envelope, fields, parsed.rejected, arrival, mint)
    if large:
        return replace(parsed, metadata=_metadata_row(metadata, note["eventId"], parsed.events[0], arrival, mint))
    return parsed


def _usable(fields: dict[str, Any]) -> dict[str, Any]:
    """Return an envelope's metadata as far as it can be stored; where it cannot, the reason stands in its place."""
    metadata: dict[str, Any] = without_unusable(fields)
    try:
        check_length(encode(metadata))
    except BadPayloadError as error:
        return {"eventType": BATCH_TYPE, "refused": str(error)}
    return metadata


def _whole_envelope(
    envelope: dict[str, Any],
    fields: dict[str, Any],
    rejected: tuple[Rejection, ...],
    arrival: Arrival,
    mint: Callable[[], UUID],
) -> Parsed:
    """Lose nothing of an envelope without usable events: all of it stands in one row, if that can be one."""
    try:
        text = encode(envelope)
    except BadPayloadError:
        return Parsed((), rejected=rejected)
    fields = {**fields, "eventId": str(_envelope_id(envelope, text, mint))}
    whole = _sorted_out(_rows([fields], {}, lambda _: envelope, arrival, mint))
    return replace(whole, rejected=rejected or whole.rejected)


def _envelope_id(envelope: Mapping[str, Any], text: str, mint: Callable[[], UUID]) -> UUID:
    """Give the same envelope the same id each time it is sent, so that it is stored once like its children."""
    return _event_id(envelope.get("eventId") or text, str(envelope.get("siteId")), mint)


def _metadata_id(envelope: Mapping[str, Any], text: str, mint: Callable[[], UUID]) -> UUID:
    """Give an envelope's metadata an id of its own: one of the events may bear the envelope's."""
    return uuid5(ID_NAMESPACE, f"batch\x00{_envelope_id(envelope, text, mint)}")


def _metadata_row(
    metadata: dict[str, Any], event_id: str, child: Event, arrival: Arrival, mint: Callable[[], UUID]
) -> Event:
    """Store large metadata once; without a usable site of its own it goes with its first event's."""
    fields = {**metadata, "eventId": event_id}
    try:
        return _row(fields, {}, metadata, arrival, mint)
    except _RefusedError:
        return _row({**fields, "siteId": child.site_id}, {}, metadata, arrival, mint)


def _with_note(child: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    """Add the envelope to a child's raw data under a key that the child does not use."""
    key = "_batch"
    while key in child:
        key = f"_{key}"
    return {**child, key: note}


def _rows(
    items: list[Any],
    envelope: Mapping[str, Any],
    raw_of: Callable[[dict[str, Any]], dict[str, Any]],
    arrival: Arrival,
    mint: Callable[[], UUID],
) -> Iterator[Event | Rejection]:
    for index, item in enumerate(items):
        try:
            if not isinstance(item, dict):
                raise _RefusedError("an event must be a JSON object")  # noqa: TRY301 - one place makes the rejection
            yield _row(item, envelope, raw_of(item), arrival, mint)
        except (_RefusedError, BadPayloadError) as error:
            yield Rejection(index, str(error), item, _site_named(item, envelope))


def _row(
    item: Mapping[str, Any],
    envelope: Mapping[str, Any],
    raw: Mapping[str, Any],
    arrival: Arrival,
    mint: Callable[[], UUID],
) -> Event:
    inherited = {key: envelope[key] for key in _INHERITED if key in envelope}
    fields = {**inherited, **{key: value for key, value in item.items() if value is not None}}
    site_id = _site_id(fields)
    url = _text(fields.get("url"))
    sent_at = fields.get("sentAt", envelope.get("sentAt"))
    return Event(
        event_id=_event_id(fields.get("eventId"), site_id, mint),
        event_type=_event_type(fields)[:50],
        session_id=_cut(_text(fields.get("sessionId")), 100),
        visitor_id=_cut(_text(fields.get("visitorId")), 100),
        site_id=site_id,
        timestamp=_happened_at(fields.get("timestamp"), sent_at, arrival.received_at),
        url=url,
        path=_cut(_text(fields.get("path")) or _path_of(url), 500),
        user_agent=_cut(arrival.user_agent, MAX_USER_AGENT_CHARS),
        ip_address=arrival.ip_address,
        raw_event_data=check_length(encode(raw)),
        created_at=arrival.received_at,
    )


def _event_type(fields: Mapping[str, Any]) -> str:
    value = fields.get("eventType")
    if not isinstance(value, str) or not value.strip():
        raise _RefusedError("eventType is missing" if value is None else "eventType must be a text")
    return value


def _site_id(fields: Mapping[str, Any]) -> str:
    value = fields.get("siteId")
    if value is None:
        raise _RefusedError("siteId is missing")
    if not isinstance(value, str) or not re.fullmatch(SITE_ID_PATTERN, value):
        raise _RefusedError("siteId must have 1 to 100 letters, digits and . _ -")
    return value


def _site_named(item: Any, envelope: Mapping[str, Any]) -> str | None:
    value = (item.get("siteId") if isinstance(item, dict) else None) or envelope.get("siteId")
    return value if isinstance(value, str) else None


def _event_id(value: Any, site_id: str, mint: Callable[[], UUID]) -> UUID:
    """Take a UUID as it is, make the same one of the same other value every time, and mint one where there is none."""
    if value is None or value == "":
        return mint()
    if isinstance(value, str) and _UUID.fullmatch(value):
        return UUID(value)
    text = value if isinstance(value, str) else encode(value)
    return uuid5(ID_NAMESPACE, f"{site_id}\x00{text}")


def _text(value: Any) -> str | None:
    """Return a scalar as text; anything else stays in the raw data only."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return encode(value)
    return None


def _cut(value: str | None, length: int) -> str | None:
    return value[:length] if value is not None else None


def _path_of(url: str | None) -> str | None:
    if not url:
        return None
    try:
        return urlsplit(url).path or "/"
    except ValueError:
        return None


def _happened_at(timestamp: Any, sent_at: Any, received_at: datetime) -> datetime:
    """Return the client's time, corrected by how wrong its clock was when it sent; ours where that is absurd."""
    happened = _moment(timestamp)
    if happened is None:
        return received_at
    sent = _moment(sent_at)
    if sent is not None:
        try:
            happened = received_at - (sent - happened)
        except OverflowError:
            return received_at
    return happened if received_at - MAX_AGE <= happened <= received_at else received_at


def _moment(value: Any) -> datetime | None:
    """Read ISO 8601 (UTC where it names no zone), or seconds or milliseconds since 1970."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value / 1000 if abs(value) >= _MILLISECONDS_FROM else value, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return None
