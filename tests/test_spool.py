"""The journal: what was appended is read back, in order, whatever a crash or a disk does to its files."""

import errno
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import make_event
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.collect import spool as spool_module
from appliance.collect.spool import Spool, SpoolError
from appliance.errors import StartError
from appliance.store.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def opened(directory: Path, *, max_bytes: int = 10**7) -> Spool:
    one = Spool(directory, max_bytes=max_bytes)
    one.open()
    return one


def drained(spool: Spool) -> list[Event]:
    """Read and remove everything, oldest first."""
    found: list[Event] = []
    while segment := spool.oldest():
        found += [event for group in spool.read(segment) for event in group]
        spool.remove(segment)
    return found


ODD = {
    "no optional fields": {"session_id": None, "visitor_id": None, "url": None, "path": None, "ip_address": None},
    "empty texts": {"session_id": "", "url": "", "user_agent": ""},
    "what JSON escapes": {"url": '\\ " \n \t \x00 \x1f \u2028 😀', "path": "\\N"},
    "the journal's own magic": {"url": "APJ1APJ1", "user_agent": "APJ1\x00\x00"},
    "a large event": {"raw_event_data": '"' + "x" * 200_000 + '"'},
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_every_field_comes_back_as_it_was(directory: Path, values: dict[str, Any]) -> None:
    event = make_event(**values)
    opened(directory).append([event])
    (found,) = drained(opened(directory))
    assert found == event
    assert {field.name: type(getattr(found, field.name)) for field in fields(Event)} == {
        field.name: type(getattr(event, field.name)) for field in fields(Event)
    }


def test_groups_come_back_in_order_from_many_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 2_000)
    one = opened(directory)
    events = [make_event() for _ in range(40)]
    for event in events:
        one.append([event])
    assert len(list(directory.iterdir())) > 3
    assert drained(opened(directory)) == events
    assert list(directory.iterdir()) == []


def test_what_is_appended_while_a_segment_is_read_goes_to_the_next(directory: Path) -> None:
    one = opened(directory)
    first, second = make_event(), make_event()
    one.append([first])
    segment = one.oldest()
    assert segment is not None
    one.append([second])
    assert list(one.read(segment)) == [[first]]
    one.remove(segment)
    assert drained(one) == [second]


def test_a_new_run_never_writes_to_an_old_file(directory: Path) -> None:
    opened(directory).append([make_event()])
    old = {path: path.read_bytes() for path in directory.iterdir()}
    opened(directory).append([make_event()])
    assert len(list(directory.iterdir())) == 2
    assert all(path.read_bytes() == content for path, content in old.items())


def test_the_spool_counts_what_an_earlier_run_has_left_against_its_bound(directory: Path) -> None:
    opened(directory).append([make_event()])
    size = opened(directory).used_bytes
    small = opened(directory, max_bytes=2 * size)
    small.append([make_event()])
    with pytest.raises(SpoolError, match="full"):
        small.append([make_event()])
    assert len(drained(small)) == 2
    small.append([make_event()])


# ---- damage


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_file_that_was_cut_off_anywhere_gives_all_whole_groups_before_that(tmp_path: Path, data: Any) -> None:
    directory = tmp_path / os.urandom(8).hex()
    events = [make_event() for _ in range(4)]
    ends = []
    one = opened(directory)
    for event in events:
        one.append([event])
        ends.append(one.used_bytes)
    (path,) = directory.iterdir()
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    assert drained(opened(directory)) == events[: sum(end <= cut for end in ends)]
    assert list(directory.iterdir()) == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_byte_costs_its_own_group_only(tmp_path: Path, data: Any) -> None:
    directory = tmp_path / os.urandom(8).hex()
    one = opened(directory)
    events = [make_event() for _ in range(4)]
    ends = [0]
    for event in events:
        one.append([event])
        ends.append(one.used_bytes)
    (path,) = directory.iterdir()
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    hit = next(number for number in range(4) if position < ends[number + 1])
    assert drained(opened(directory)) == [event for number, event in enumerate(events) if number != hit]
    # The file stays, for a person to look into; but what a crash leaves looks like some damage, and goes.
    assert {path.suffix for path in directory.iterdir()} <= {".damaged"}
    if hit < 3:
        assert [path.read_bytes() for path in directory.iterdir()] == [bytes(content)]


def test_a_file_of_rubbish_is_passed_over_and_kept_aside(directory: Path) -> None:
    one = opened(directory)
    one.append([make_event()])
    (path,) = directory.iterdir()
    path.write_bytes(os.urandom(5000) + b"APJ1" * 50)
    event = make_event()
    one = opened(directory)
    one.append([event])
    assert drained(one) == [event]
    assert [found.suffix for found in directory.iterdir()] == [".damaged"]


# ---- a disk that fails


def failing_writes(monkeypatch: pytest.MonkeyPatch, name: str, *, times: int) -> None:
    """Let the first calls of os.write or os.fdatasync fail as on a full disk, a write after a part of it."""
    real: Callable[..., Any] = getattr(os, name)
    left = [times]

    def failing(file: int, *data: Any) -> Any:
        if not left[0]:
            return real(file, *data)
        left[0] -= 1
        if data:
            real(file, data[0][: len(data[0]) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("name", ["write", "fdatasync"])
def test_a_disk_that_fails_is_told_and_harms_neither_earlier_nor_later_events(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one = opened(directory)
    before, during, after = make_event(), make_event(), make_event()
    one.append([before])
    failing_writes(monkeypatch, name, times=1)
    with pytest.raises(SpoolError, match="No space left"):
        one.append([during])
    one.append([after])
    # Not promised and perhaps there all the same: its sender sends it again, with the same id.
    assert [event for event in drained(opened(directory)) if event != during] == [before, after]


@pytest.mark.parametrize("name", ["write", "fdatasync"])
def test_a_full_disk_is_not_filled_with_files_that_hold_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one = opened(directory)
    before, after = make_event(), make_event()
    one.append([before])
    used = one.used_bytes
    failing_writes(monkeypatch, name, times=50)
    for _ in range(50):
        with pytest.raises(SpoolError, match="No space left"):
            one.append([make_event()])
    assert one.used_bytes == used == sum(path.stat().st_size for path in directory.iterdir())
    assert len(list(directory.iterdir())) == 1
    one.append([after])
    assert drained(opened(directory)) == [before, after]
    assert list(directory.iterdir()) == []


def test_a_file_that_is_gone_or_of_another_version_costs_nothing_but_itself(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 1)
    one = opened(directory)
    events = [make_event() for _ in range(3)]
    one.append(events[:1])
    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "INSERTED_COLUMNS", ("event_id", "of_a_later_version"))
        patch.setattr(type(events[1]), "as_row", lambda event: (event.event_id, "x"))
        one.append(events[1:2])
    one.append(events[2:])
    first, second, _ = sorted(directory.iterdir())
    first.unlink()
    assert drained(one) == events[2:]
    assert list(directory.iterdir()) == [second.with_suffix(".damaged")]


def test_a_file_that_cannot_be_read_for_a_moment_is_read_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory)
    event = make_event()
    spool.append([event])
    with monkeypatch.context() as patch:

        def fail(_: Path) -> bytes:
            raise OSError(errno.ENFILE, "Too many open files in system")

        patch.setattr(Path, "read_bytes", fail)
        for _ in range(5):
            with pytest.raises(SpoolError, match="tried again"):
                drained(spool)
    assert drained(spool) == [event]
    assert spool.empty


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"the spool .* cannot be used"):
        opened(tmp_path / "file" / "spool")
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "notes.journal").write_text("")
    with pytest.raises(StartError, match=r"the spool .* cannot be used"):
        opened(tmp_path / "spool")
