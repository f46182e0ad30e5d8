"""What is worth an alert. Pure: figures in, sentences out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cronsim import CronSim

from appliance.config import Alerts
from appliance.store.figures import Backlog, FailedRuns, FailingBucket
from appliance.words import counted

# Jobs that are no longer configured deliver what they owe about once an hour.
_RETIRED_SCHEDULE = "0 * * * *"
# What has filled up is over when there is clearly more room again: at the threshold itself it would come and go.
_ROOM_AGAIN_PERCENT = 2
_DAMAGES_NAMED = 5

Judges = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Alert:
    """What people are told of one thing that is wrong."""

    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How full the places are into which events go."""

    disk_path: str
    disk_free: int
    disk_size: int
    spool_used: int
    spool_size: int

    @property
    def disk_free_percent(self) -> float:
        """What is left of the disk."""
        return 100 * self.disk_free / max(self.disk_size, 1)

    @property
    def spool_used_percent(self) -> float:
        """What is used of the spool."""
        return 100 * self.spool_used / max(self.spool_size, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """How exports go, as the ledger tells."""

    backlog: Sequence[Backlog] = ()
    failed_runs: Sequence[FailedRuns] = ()
    failing_buckets: Sequence[FailingBucket] = ()


def lags(backlog: Sequence[Backlog], schedules: Mapping[str, str], *, now: datetime) -> dict[str, timedelta]:
    """Return by job how late its oldest event is: since the first run after its arrival, which should have taken it."""
    found = {}
    for one in backlog:
        if one.oldest is not None:
            due = next(CronSim(schedules.get(one.job, _RETIRED_SCHEDULE), one.oldest.astimezone(UTC)))
            found[one.job] = max(now - due, timedelta())
    return found


def of_room(room: Room, limits: Alerts, *, active: AbstractSet[str]) -> dict[str, Alert]:
    """Return what fills up; `active` is what people have been told of and is not over yet."""
    found = {}
    least_free = limits.disk_free_percent + (_ROOM_AGAIN_PERCENT if "disk" in active else 0)
    if limits.disk_free_percent and room.disk_free_percent < least_free:
        left = (
            f"{room.disk_free_percent:.1f} % ({_megabytes(room.disk_free)}) are left of the disk of {room.disk_path}."
        )
        found["disk"] = Alert("the disk is filling up", left)
    most_used = limits.spool_used_percent / (2 if "spool" in active else 1)
    if limits.spool_used_percent and room.spool_used_percent > most_used:
        used = f"{room.spool_used_percent:.0f} % of its {_megabytes(room.spool_size)} are used"
        what = "events wait in it for the database, and are refused when it is full"
        found["spool"] = Alert("the spool is filling up", f"{used}: {what}.")
    return found


def of_exports(exports: Exports, limits: Alerts, schedules: Mapping[str, str], *, now: datetime) -> dict[str, Alert]:
    """Return what is wrong with exports."""
    found: dict[str, Alert] = {}
    for job, why in _failing(exports, limits.failed_runs):
        found.setdefault(f"failing:{job}", Alert(f"export {job} fails", why))
    late = lags(exports.backlog, schedules, now=now) if limits.exports_late_minutes else {}
    for one in exports.backlog:
        lag = late.get(one.job, timedelta())
        if one.oldest is not None and lag > timedelta(minutes=limits.exports_late_minutes):
            waiting = (
                f"{counted(one.events, 'event waits', 'events wait')}, the oldest since {one.oldest:%Y-%m-%d %H:%M} UTC"
            )
            text = f"{waiting}; it should have been exported {_hours(lag)} ago."
            found[f"late:{one.job}"] = Alert(f"exports of {one.job} are late", text)
    return found


def _failing(exports: Exports, often: int) -> Iterator[tuple[str, str]]:
    for bucket in exports.failing_buckets:
        if bucket.number >= often:
            yield bucket.job, f"Bucket {bucket.bucket} has failed {bucket.number} times in a row: {bucket.error}"
    for runs in exports.failed_runs:
        if runs.number >= often:
            yield runs.job, f"{runs.number} runs have failed in a row; the last one said: {runs.message}"


def damage_key(job: str) -> str:
    """Return under which key damage of a job's objects is kept."""
    return f"damage:{job}"


def of_damage(job: str, findings: Sequence[str]) -> Alert:
    """Return what is told when a verification has found something."""
    named = "; ".join(findings[:_DAMAGES_NAMED])
    more = f"; and {len(findings) - _DAMAGES_NAMED} more" if len(findings) > _DAMAGES_NAMED else ""
    return Alert(f"verify found damage in the exports of {job}", f"{named}{more}.")


def _megabytes(number: int) -> str:
    return f"{number / 1024 / 1024:,.0f} MB"


def _hours(lag: timedelta) -> str:
    minutes = int(lag.total_seconds() // 60)
    return f"{minutes // 60} h {minutes % 60} min"
