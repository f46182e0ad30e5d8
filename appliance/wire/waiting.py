"""Connections that keep us waiting: until when, how many of them, and which has to go when there are too many. Pure.

A hostile client costs nothing but a place here. When places run out, the one that has waited longest goes: an honest
client is here for milliseconds, so that is hardly ever one of those.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class WaitingRoom(Generic[T]):
    """Connections in the order of their deadlines: all wait equally long, so the first to come is the first to go."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._deadlines: dict[T, float] = {}

    def __len__(self) -> int:
        return len(self._deadlines)

    def __contains__(self, one: T) -> bool:
        return one in self._deadlines

    def add(self, one: T, now: float) -> None:
        """Let it wait from now on; who is here already keeps the deadline."""
        self._deadlines.setdefault(one, now + self._seconds)

    def remove(self, one: T) -> bool:
        """Forget it; False when it was not here."""
        return self._deadlines.pop(one, None) is not None

    def oldest(self) -> T | None:
        """Return who has waited longest."""
        return next(iter(self._deadlines), None)

    def overdue(self, now: float) -> Iterator[T]:
        """Yield who has waited too long. Each must be removed before the next is asked for."""
        while self._deadlines:
            one, deadline = next(iter(self._deadlines.items()))
            if deadline > now:
                return
            yield one

    def hurry(self, now: float, *, seconds: float) -> None:
        """Let nobody wait longer than this from now on, and nobody who comes later either."""
        self._seconds = min(self._seconds, seconds)
        self._deadlines = {one: min(due, now + self._seconds) for one, due in self._deadlines.items()}


class PerAddress(Generic[T]):
    """Who waits at which address, the oldest first."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[str, dict[T, None]] = {}

    def add(self, address: str, one: T) -> T | None:
        """Add it; return the oldest of that address where there are now more than may wait."""
        group = self._waiting.setdefault(address, {})
        group[one] = None
        return next(iter(group)) if len(group) > self._limit else None

    def remove(self, address: str, one: T) -> None:
        """Forget it; nothing is kept of an address where nobody waits."""
        group = self._waiting.get(address)
        if group is not None:
            group.pop(one, None)
            if not group:
                del self._waiting[address]
