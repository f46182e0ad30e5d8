"""How often a password may be guessed: seldom by one client, ever more seldom by one who goes on, boundedly by all."""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_SECONDS = 60.0
# A stranger who guesses locks out himself, not the admin. More than anyone mistypes in a row.
CLIENT_GUESSES = 10
# Many addresses together: few against a good password, and more than anyone needs to mistype.
ALL_GUESSES = 1_000
# After the tenth guess the form is closed for a minute, after each further one for twice as long.
LONGEST_LOCK_SECONDS = 3_600.0
FORGET_SECONDS = 3_600.0
_MAX_CLIENTS = 10_000


@dataclass(slots=True)
class _Client:
    guesses: int = 0
    open_at: float = 0.0


class Guesses:
    """Remembers the guesses of each client, and those of the last minute of all together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()

    def allow(self, client: str) -> int:
        """Count a guess and return 0, or return after how many seconds the next may come.

        Counted before it is checked, none slips through beside others.
        """
        with self._lock:
            now = self._clock()
            self._forget_old(now)
            known = self._clients.setdefault(client, _Client())
            if now < known.open_at:
                return math.ceil(known.open_at - now)
            if len(self._recent) >= ALL_GUESSES:
                return math.ceil(self._recent[0] + WINDOW_SECONDS - now)
            self._recent.append(now)
            known.guesses += 1
            known.open_at = now + _lock_seconds(known.guesses)
            self._clients.move_to_end(client)
            return 0

    def forgive(self, client: str) -> None:
        """Forget the guesses of a client who knew the password in the end."""
        with self._lock:
            self._clients.pop(client, None)

    def _forget_old(self, now: float) -> None:
        while self._recent and self._recent[0] <= now - WINDOW_SECONDS:
            self._recent.popleft()
        # In the order of their last guesses, nearly: locks are of different lengths.
        while self._clients:
            oldest = next(iter(self._clients.values()))
            if oldest.open_at > now - FORGET_SECONDS and len(self._clients) <= _MAX_CLIENTS:
                return
            self._clients.popitem(last=False)


def _lock_seconds(guesses: int) -> float:
    beyond = guesses - CLIENT_GUESSES
    return 0.0 if beyond < 0 else min(WINDOW_SECONDS * 2.0 ** min(beyond, 30), LONGEST_LOCK_SECONDS)
