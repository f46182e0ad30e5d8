"""The clock that export jobs go by: their cron lines, and what follows when somebody sets it."""

import time
from datetime import UTC, datetime, timedelta

from apscheduler.triggers.base import BaseTrigger
from cronsim import CronSim

# What came due longer ago is run once all the same, and need not be counted: a clock that is set from 1970 to today has
# passed thirty million minutes.
_COUNTED_BACK = timedelta(days=1)
# NTP moves a clock by less than a hundredth of a second while nobody looks, or else in a step.
_STEP_SECONDS = 1.0


class CronTrigger(BaseTrigger):
    """A cron line in UTC as crontab(5) reads it; APScheduler's own trigger takes 0 for Monday."""

    def __init__(self, line: str) -> None:
        self._line = line
        self.fired: datetime | None = None
        """The moment that came due last: of one line the same on every appliance, whatever their clocks say."""

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """Return the first moment after the last run, or after now before the first; moments long past are left out."""
        # APScheduler asks what follows a moment before it lets that moment's run begin.
        self.fired = previous_fire_time or self.fired
        after = max(previous_fire_time or now, now - _COUNTED_BACK)
        return next(CronSim(self._line, after.astimezone(UTC)))

    def __str__(self) -> str:
        return f"cron[{self._line}]"


class WallClock:
    """The time of day against the time that nobody can set."""

    def __init__(self) -> None:
        self._offset = self._now()

    def was_set_back(self) -> bool:
        """Return whether it was set back since this was asked last."""
        before, self._offset = self._offset, self._now()
        return self._offset < before - _STEP_SECONDS

    @staticmethod
    def _now() -> float:
        return time.time() - time.monotonic()
