"""How often one sender may come. Pure: the clock is given in."""

from collections import OrderedDict
from collections.abc import Hashable

# Beyond so many senders the ones not heard of for longest are forgotten: a flood of addresses costs memory once.
_MAX_KEYS = 20_000
# What a quiet sender has saved up: a browser that comes back with a queue, or an office behind one address.
_BURST_SECONDS = 10.0


class RateLimit:
    """Leaky buckets (GCRA): a number and no list for each sender. Not for several threads at once."""

    def __init__(self, per_minute: int) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        # When a sender that has been heard of would have used up all that it may, at an even pace.
        self._full_at: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def wait_seconds(self, key: Hashable, now: float) -> float:
        """Count a request; return 0 where it may pass, and else in how many seconds one may, and count nothing."""
        if not self._interval:
            return 0.0
        full_at = max(self._full_at.get(key, now), now) + self._interval
        if full_at > now + max(_BURST_SECONDS, self._interval):
            return full_at - now - max(_BURST_SECONDS, self._interval)
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        if len(self._full_at) > _MAX_KEYS:
            self._full_at.popitem(last=False)
        return 0.0
