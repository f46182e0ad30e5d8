"""How often a password may be guessed: seldom by one client, and not without end by many."""

import threading
import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 60.0
# A stranger who guesses locks out himself, not the admin.
CLIENT_GUESSES = 10
# Many addresses together: few against a good password, and more than anyone needs to mistype. It bounds the memory too.
ALL_GUESSES = 1_000


class Guesses:
    """Remembers the guesses of the last minute and whose they were."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, str]] = deque()
        self._lock = threading.Lock()

    def allow(self, client: str) -> bool:
        """Count a guess, unless there were too many: counted before it is checked, none slips through beside others."""
        with self._lock:
            self._forget_old()
            of_client = sum(who == client for _, who in self._recent)
            if of_client >= CLIENT_GUESSES or len(self._recent) >= ALL_GUESSES:
                return False
            self._recent.append((self._clock(), client))
            return True

    def forgive(self, client: str) -> None:
        """Forget the guesses of a client who knew the password in the end."""
        with self._lock:
            self._recent = deque(guess for guess in self._recent if guess[1] != client)

    def _forget_old(self) -> None:
        while self._recent and self._recent[0][0] <= self._clock() - WINDOW_SECONDS:
            self._recent.popleft()
