"""Pictures of what came in: bars by time, stacked by site. Pure geometry; the template writes the SVG."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from appliance.store.history import SlotCount

HEIGHT = 100.0
SLOT_WIDTH = 10
_BAR_WIDTH = 8
# More hues could not be told apart; the other sites share the last one.
COLOURS = 5
_MIN_HEIGHT = 1.5


@dataclass(frozen=True, slots=True)
class Bar:
    """One site's part of one slot."""

    x: float
    y: float
    width: float
    height: float
    colour: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture and what it says in words."""

    bars: tuple[Bar, ...]
    width: int
    total: int
    peak: int
    peak_at: datetime | None
    first: datetime
    last: datetime


def colours_of(counts: Iterable[SlotCount]) -> dict[str, int]:
    """Give the busiest sites a colour each, the same in every picture."""
    totals: Counter[str] = Counter()
    for one in counts:
        totals[one.site_id] += one.events
    busiest = sorted(totals, key=lambda site: (-totals[site], site))
    return {site: min(rank, COLOURS) for rank, site in enumerate(busiest)}


def draw(counts: Sequence[SlotCount], colours: dict[str, int], *, end: datetime, slot: timedelta, slots: int) -> Chart:
    """Draw the slots that end with the one that `end` lies in."""
    last = _floor(end, slot)
    first = last - slot * (slots - 1)
    stacks: dict[int, Counter[int]] = {}
    for one in counts:
        index = (one.slot.astimezone(UTC) - first) // slot
        if 0 <= index < slots:
            stacks.setdefault(index, Counter())[colours.get(one.site_id, COLOURS)] += one.events
    sums = {index: stack.total() for index, stack in stacks.items()}
    peak = max(sums.values(), default=0)
    top = min((index for index, events in sums.items() if events == peak), default=None)
    return Chart(
        bars=tuple(bar for index in sorted(stacks) for bar in _stack(index, stacks[index], peak)),
        width=slots * SLOT_WIDTH,
        total=sum(sums.values()),
        peak=peak,
        peak_at=None if top is None else first + slot * top,
        first=first,
        last=last,
    )


def _stack(index: int, stack: Counter[int], peak: int) -> list[Bar]:
    bars: list[Bar] = []
    y = HEIGHT
    for colour in sorted(stack):
        height = max(stack[colour] / peak * HEIGHT, _MIN_HEIGHT)
        y = max(y - height, 0.0)
        bars.append(Bar(index * SLOT_WIDTH + 1, round(y, 2), _BAR_WIDTH, round(height, 2), colour))
    return bars


def _floor(moment: datetime, slot: timedelta) -> datetime:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return moment.astimezone(UTC) - (moment.astimezone(UTC) - epoch) % slot
