"""Who may keep the server waiting, until when, and who goes first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.wire.waiting import PerAddress, WaitingRoom

SECONDS = 10.0


def room(*entries: tuple[str, float]) -> WaitingRoom[str]:
    made = WaitingRoom[str](seconds=SECONDS)
    for one, since in entries:
        made.add(one, since)
    return made


def emptied(waiting: WaitingRoom[str], now: float) -> list[str]:
    """Take out who is overdue, as the worker does."""
    gone = []
    for one in waiting.overdue(now):
        waiting.remove(one)
        gone.append(one)
    return gone


@pytest.mark.parametrize(
    ("now", "gone"),
    [(9.99, []), (10.0, ["a"]), (10.5, ["a"]), (11.0, ["a", "b"]), (1000.0, ["a", "b", "c"])],
)
def test_who_waits_too_long_goes_and_nobody_else(now: float, gone: list[str]) -> None:
    waiting = room(("a", 0.0), ("b", 1.0), ("c", 2.0))
    assert emptied(waiting, now) == gone
    assert len(waiting) == 3 - len(gone)
    assert emptied(waiting, now) == []


def test_who_sends_a_byte_now_and_then_gets_no_longer_deadline() -> None:
    waiting = room(("a", 0.0), ("a", 5.0), ("a", 9.9))
    assert len(waiting) == 1
    assert emptied(waiting, 10.0) == ["a"]


def test_who_comes_back_waits_anew_and_behind_the_others() -> None:
    waiting = room(("a", 0.0), ("b", 1.0))
    assert waiting.remove("a")
    waiting.add("a", 5.0)
    assert waiting.oldest() == "b"
    assert emptied(waiting, 14.0) == ["b"]
    assert emptied(waiting, 15.0) == ["a"]


def test_an_empty_room_has_no_oldest_and_nobody_to_remove() -> None:
    waiting = room()
    assert waiting.oldest() is None
    assert not waiting.remove("a")
    assert "a" not in waiting
    assert emptied(waiting, 1e9) == []


def test_a_place_that_is_looked_at_twice_is_still_taken() -> None:
    waiting = room(("a", 0.0), ("b", 0.0))
    assert (waiting.oldest(), waiting.oldest()) == ("a", "a")
    assert ("a" in waiting, "b" in waiting, len(waiting)) == (True, True, 2)


def test_nobody_waits_longer_than_a_hurry_allows() -> None:
    waiting = room(("a", 0.0), ("b", 8.0))
    waiting.hurry(9.0, seconds=2.0)
    assert emptied(waiting, 10.0) == ["a"]
    assert emptied(waiting, 10.9) == []
    assert emptied(waiting, 11.0) == ["b"]


def test_who_comes_after_a_hurry_is_hurried_too() -> None:
    waiting = room(("a", 0.0))
    waiting.hurry(1.0, seconds=0.5)
    waiting.add("b", 1.2)
    assert emptied(waiting, 1.5) == ["a"]
    assert emptied(waiting, 1.7) == ["b"]


def test_a_hurry_gives_nobody_more_time() -> None:
    waiting = room(("a", 0.0))
    waiting.hurry(1.0, seconds=100.0)
    waiting.add("b", 1.0)
    assert emptied(waiting, 10.0) == ["a"]
    assert emptied(waiting, 11.0) == ["b"]


NAMES = st.sampled_from("abcdef")
STEPS = st.tuples(st.sampled_from(["add", "remove", "sweep", "hurry"]), NAMES, st.integers(0, 6))


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(STEPS, max_size=40))
def test_whatever_happens_each_goes_at_its_own_deadline_and_the_first_due_first(
    steps: list[tuple[str, str, int]],
) -> None:
    waiting, now, seconds = room(), 0.0, SECONDS
    due: dict[str, float] = {}
    for step, one, passed in steps:
        now += passed
        if step == "add":
            waiting.add(one, now)
            due.setdefault(one, now + seconds)
        elif step == "remove":
            assert waiting.remove(one) == (due.pop(one, None) is not None)
        elif step == "hurry":
            waiting.hurry(now, seconds=float(passed))
            seconds = min(seconds, float(passed))
            due = {name: min(deadline, now + seconds) for name, deadline in due.items()}
        else:
            late = {name for name, deadline in due.items() if deadline <= now}
            assert set(emptied(waiting, now)) == late
            due = {name: deadline for name, deadline in due.items() if name not in late}
        assert len(waiting) == len(due)
        assert due.get(waiting.oldest() or "") == min(due.values(), default=None)


# ---- of one address


def test_an_address_that_crowds_the_room_loses_its_own_oldest() -> None:
    addresses = PerAddress[str](limit=2)
    assert [addresses.add("192.0.2.1", one) for one in "abc"] == [None, None, "a"]
    assert addresses.add("192.0.2.2", "d") is None
    addresses.remove("192.0.2.1", "a")
    assert addresses.add("192.0.2.1", "e") == "b"


def test_more_bytes_of_the_same_connection_do_not_crowd() -> None:
    addresses = PerAddress[str](limit=2)
    assert [addresses.add("192.0.2.1", one) for one in "abababab"] == [None] * 8


def test_who_has_left_makes_place_and_may_leave_twice() -> None:
    addresses = PerAddress[str](limit=1)
    assert addresses.add("192.0.2.1", "a") is None
    addresses.remove("192.0.2.1", "a")
    addresses.remove("192.0.2.1", "a")
    addresses.remove("192.0.2.9", "a")
    assert addresses.add("192.0.2.1", "b") is None


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["x", "y"]), NAMES), max_size=60))
def test_no_address_ever_has_more_places_than_it_may_once_its_oldest_has_gone(
    steps: list[tuple[bool, str, str]],
) -> None:
    limit = 3
    addresses = PerAddress[str](limit=limit)
    waiting: dict[str, list[str]] = {"x": [], "y": []}
    for comes, address, one in steps:
        group = waiting[address]
        if not comes:
            addresses.remove(address, one)
            waiting[address] = [other for other in group if other != one]
            continue
        if one not in group:
            group.append(one)
        crowded = addresses.add(address, one)
        assert crowded == (group[0] if len(group) > limit else None)
        if crowded is not None:
            addresses.remove(address, crowded)
            group.remove(crowded)
