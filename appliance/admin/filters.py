"""How values are shown: moments, numbers, sizes, and bytes that may be no text."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from appliance.admin.sentences import trouble_of

_THIN_SPACE = "\u202f"
_UNITS = ("bytes", "KB", "MB", "GB", "TB")
# For what there is not.
NONE = "\u2013"
_STEP = 1000
_SMALL = 10
_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400


def moment(value: datetime | None) -> str:
    """Return a moment in UTC, to the second."""
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S") if value else NONE


def minute(value: datetime | None) -> str:
    """Return a moment in UTC, to the minute."""
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M") if value else NONE


def number(value: int) -> str:
    """Return a number with its thousands apart."""
    return f"{value:,}".replace(",", _THIN_SPACE)


def size(value: float) -> str:
    """Return a number of bytes as people say it."""
    unit = 0
    while value >= _STEP and unit < len(_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    figure = f"{value:.1f}" if unit and value < _SMALL else f"{value:.0f}"
    return f"{figure}{_THIN_SPACE}{_UNITS[unit]}"


def duration(value: timedelta | None) -> str:
    """Return how long something took."""
    if value is None:
        return NONE
    seconds = max(value.total_seconds(), 0.0)
    if seconds < _SMALL:
        return f"{seconds:.1f}{_THIN_SPACE}s"
    return _whole(seconds)


def _whole(seconds: float) -> str:
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f}{_THIN_SPACE}s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f}{_THIN_SPACE}min"
    if seconds < 2 * _DAY:
        return f"{seconds / _HOUR:.0f}{_THIN_SPACE}h"
    return f"{seconds / _DAY:.0f} days"


def ago(value: datetime | None, now: datetime) -> str:
    """Return how long ago something was, or how soon it will be."""
    if value is None:
        return "never"
    seconds = (now - value).total_seconds()
    return f"{_whole(seconds)} ago" if seconds >= 0 else f"in {_whole(-seconds)}"


def text(content: bytes | str | None) -> str:
    """Return what may be no text at all as characters that cannot do anything: no control, no change of direction."""
    decoded = content.decode(errors="replace") if isinstance(content, bytes) else content or ""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in decoded)


ALL: Mapping[str, Callable[..., str]] = {
    "moment": moment,
    "minute": minute,
    "number": number,
    "size": size,
    "duration": duration,
    "ago": ago,
    "inert": text,
    "trouble": lambda error, bucket: trouble_of(bucket, error),
}
