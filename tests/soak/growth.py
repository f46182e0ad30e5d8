"""By how much a figure grows while the load goes on, told from made-up samples as from real ones.

Of each life of a process the medians of the last quarter and of the first are compared, once it is warm: a queue that
an outage filled for a moment counts for nothing, and what was kept counts in full. The lives of a process that was
ended and started again are added up.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Of a life: while its pool, its threads and its caches fill for the first time it grows rightly.
_WARM_UP = 0.2
_WARM_UP_SECONDS = 10.0
# Fewer samples than these tell nothing of a life.
_FEWEST = 8


@dataclass(frozen=True)
class Point:
    """A figure at a moment of a life."""

    life: int
    seconds: float
    figure: float


@dataclass(frozen=True)
class Growth:
    """By how much the figure has grown, and in how many seconds of all lives together."""

    by: float
    seconds: float


def growth(points: Sequence[Point]) -> Growth:
    lives: dict[int, list[Point]] = {}
    for point in points:
        lives.setdefault(point.life, []).append(point)
    grown = [_of_life(life) for life in lives.values()]
    return Growth(sum(one.by for one in grown), sum(one.seconds for one in grown))


def _of_life(life: Sequence[Point]) -> Growth:
    begun, lasted = life[0].seconds, life[-1].seconds - life[0].seconds
    warm = [one for one in life if one.seconds - begun >= max(_WARM_UP_SECONDS, lasted * _WARM_UP)]
    if len(warm) < _FEWEST:
        return Growth(0, 0)
    part = len(warm) // 4
    first, last = warm[:part], warm[-part:]
    return Growth(
        by=statistics.median(one.figure for one in last) - statistics.median(one.figure for one in first),
        seconds=statistics.median(one.seconds for one in last) - statistics.median(one.seconds for one in first),
    )
