"""How often one sender may come: at an even pace with something saved up, each for itself, in bounded memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.collect.limits import RateLimit

BURST_SECONDS = 10.0
MAX_KEYS = 20_000


def passed(limit: RateLimit, key: str, moments: list[float]) -> list[float]:
    """Return the moments at which a sender got through."""
    return [now for now in moments if limit.wait_seconds(key, now) == 0]


def burst(per_minute: int) -> int:
    """Return how many requests a sender that was quiet may send at once."""
    return max(int(BURST_SECONDS * per_minute / 60), 1)


@pytest.mark.parametrize("per_minute", [1, 5, 6, 60, 600, 3_000, 60_000])
def test_a_sender_that_was_quiet_has_ten_seconds_of_requests_saved_up_and_one_at_least(per_minute: int) -> None:
    limit = RateLimit(per_minute)
    number = len(passed(limit, "a", [1000.0] * (burst(per_minute) + 50)))
    # Adding up many short intervals may cost the last of them.
    assert burst(per_minute) - 1 <= number <= burst(per_minute)
    assert number >= 1


@pytest.mark.parametrize("per_minute", [1, 30, 600])
def test_who_keeps_the_pace_is_never_turned_away(per_minute: int) -> None:
    limit = RateLimit(per_minute)
    moments = [n * (60.0 / per_minute) * 1.000001 for n in range(1000)]
    assert passed(limit, "a", moments) == moments


@pytest.mark.parametrize("per_minute", [1, 30, 600])
def test_who_is_turned_away_gets_through_after_the_time_that_was_named_and_not_before(per_minute: int) -> None:
    limit = RateLimit(per_minute)
    passed(limit, "a", [0.0] * 1000)
    wait = limit.wait_seconds("a", 0.0)
    assert 0 < wait <= 60.0 / per_minute + 0.001
    assert limit.wait_seconds("a", wait * 0.99) > 0
    assert limit.wait_seconds("a", wait + 0.001) == 0


def test_who_is_turned_away_is_not_kept_away_by_asking_again() -> None:
    limit = RateLimit(60)
    asked = [n / 100 for n in range(6000)]
    assert len(passed(limit, "a", asked)) >= 60


def test_a_rate_of_zero_is_none_and_keeps_nothing() -> None:
    limit = RateLimit(0)
    assert len(passed(limit, "a", [0.0] * 10_000)) == 10_000
    assert len(limit) == 0


def test_one_noisy_sender_takes_nothing_from_the_others() -> None:
    limit = RateLimit(60)
    others = [f"quiet {n}" for n in range(100)]
    got: dict[str, int] = dict.fromkeys([*others, "noisy"], 0)
    for second in range(60):
        for _ in range(200):
            got["noisy"] += limit.wait_seconds("noisy", float(second)) == 0
        for other in others:
            got[other] += limit.wait_seconds(other, float(second)) == 0
    assert all(got[other] == 60 for other in others)
    assert got["noisy"] <= 60 + burst(60)


def test_a_flood_of_addresses_is_forgotten_oldest_first_and_costs_bounded_memory() -> None:
    limit = RateLimit(6)
    for n in range(100_000):
        assert limit.wait_seconds(n, 0.0) == 0
        assert len(limit) <= MAX_KEYS
    assert len(limit) == MAX_KEYS
    assert limit.wait_seconds(99_999, 0.0) > 0
    assert limit.wait_seconds(0, 0.0) == 0


def test_who_goes_on_sending_is_not_forgotten_for_a_flood_of_others() -> None:
    limit = RateLimit(60)
    got = 0
    for n in range(50_000):
        limit.wait_seconds(n, n / 1000)
        if n % 10 == 0:
            got += limit.wait_seconds("steady", n / 1000) == 0
    # 50 seconds at one a second, and what was saved up.
    assert got <= 50 + burst(60) + 1


def test_a_turned_away_sender_is_remembered_as_long_as_any() -> None:
    limit = RateLimit(60)
    passed(limit, "a", [0.0] * 100)
    for n in range(MAX_KEYS - 1):
        limit.wait_seconds(n, 0.0)
    assert limit.wait_seconds("a", 0.0) > 0


gaps = st.floats(min_value=0, max_value=30, allow_nan=False) | st.just(0.0)


@settings(max_examples=200, deadline=None, database=None)
@given(
    per_minute=st.integers(min_value=1, max_value=6_000),
    sendings=st.lists(st.tuples(st.sampled_from("ab"), gaps), max_size=200),
    start=st.floats(min_value=0, max_value=1e7, allow_nan=False),
)
def test_no_more_than_the_rate_and_what_was_saved_up_ever_passes(
    per_minute: int, sendings: list[tuple[str, float]], start: float
) -> None:
    limit = RateLimit(per_minute)
    now = start
    got: dict[str, list[float]] = {"a": [], "b": []}
    for key, gap in sendings:
        now += gap
        wait = limit.wait_seconds(key, now)
        assert wait >= 0
        if wait == 0:
            got[key].append(now)
    for moments in got.values():
        for first in range(len(moments)):
            for last in range(first, len(moments)):
                allowed = (moments[last] - moments[first]) * per_minute / 60 + max(BURST_SECONDS * per_minute / 60, 1)
                assert last - first + 1 <= allowed + 1e-3
