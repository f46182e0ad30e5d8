"""What the soak counts and bounds: whatever is missing, doubled, refused or grown is told."""

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from soak import __main__ as program
from soak import bounds
from soak.bounds import Load
from soak.counting import tally
from soak.disk import Disk
from soak.faults import Deck, kinds, step_clock
from soak.table import Line
from soak.watching import ARBITER, MB, POSTMASTER, ROLES, SUPERVISOR, WORKER, Record, Sample

Objects = Mapping[str, bytes]


def an_object(*ids: str) -> bytes:
    return gzip.compress("".join(json.dumps({"event_id": one}) + "\n" for one in ids).encode(), mtime=0)


BOTH: Objects = {"1.jsonl.gz": an_object("a", "b"), "_manifests/1.json": b"{}"}
MISSING, DOUBLED = "acknowledged events missing", "duplicate events"
ONLY, DIFFERING = "events in the table or a bucket only", "objects that differ between the buckets"


@pytest.mark.parametrize(
    ("stored", "client", "vault", "missed"),
    [
        ("ab", BOTH, BOTH, set()),
        ("a", BOTH, BOTH, {MISSING, ONLY}),
        ("aba", BOTH, BOTH, {DOUBLED}),
        ("ab", BOTH, {**BOTH, "1.jsonl.gz": an_object("a")}, {MISSING, ONLY, DIFFERING}),
        ("ab", {**BOTH, "2.jsonl.gz": an_object("a")}, BOTH, {DOUBLED, DIFFERING}),
        ("ab", *[{**BOTH, "2.jsonl.gz": an_object("a")}] * 2, {DOUBLED}),
        ("ab", *[{**BOTH, "2.jsonl.gz": an_object("c")}] * 2, {ONLY}),
        ("ab", BOTH, {**BOTH, "_manifests/1.json": b"{ }"}, {DIFFERING}),
    ],
)
def test_what_is_missing_doubled_or_different_is_told(
    stored: str, client: Objects, vault: Objects, missed: set[str]
) -> None:
    lines = tally({"a", "b"}, Counter(stored), {"client": client, "vault": vault})
    assert {line.name for line in lines if not line.holds} == missed


def test_a_soak_in_which_nothing_was_acknowledged_proves_nothing() -> None:
    lines = tally(set(), Counter(), {"client": {}, "vault": {}})
    assert [line.name for line in lines if not line.holds] == ["events acknowledged"]


# -- bounds -----------------------------------------------------------------------------------------------------------

HOUR = 3600
# 200 events a second.
LOAD = Load(events=200 * HOUR, seconds=HOUR)
Figure = Callable[[int], int]


def a_life(
    role: str, *, pid: int = 1, lasts: int = HOUR, memory: Figure = lambda _: MB, files: Figure = lambda _: 9
) -> list[Sample]:
    """Make up the life of a process, of which a figure is told by the second."""
    return [Sample(role, pid, second, memory(second), files(second)) for second in range(lasts)]


def a_record(changed: list[Sample], *, lasts: int = HOUR) -> Record:
    """Make up what was seen: of every process nothing remarkable, but for one of them."""
    others = [one for role in ROLES if role != changed[0].role for one in a_life(role, lasts=lasts)]
    return Record(samples=[*others, *changed])


def missed(lines: list[Line]) -> list[str]:
    return [line.name for line in lines if not line.holds]


def test_processes_that_stay_as_they_are_hold_every_bound() -> None:
    assert missed(bounds.processes(a_record(a_life(WORKER)), LOAD)) == []


@pytest.mark.parametrize("role", ROLES)
def test_a_process_that_keeps_a_fraction_of_each_event_is_missed(role: str) -> None:
    leaking = a_life(role, memory=lambda second: MB + 200 * 25 * second)
    assert missed(bounds.processes(a_record(leaking), LOAD)) == [f"memory that the {role} kept of an event"]


def test_a_leak_is_missed_in_a_process_that_is_started_again_all_the_time() -> None:
    lives = [a_life(POSTMASTER, pid=pid, lasts=60, memory=lambda second: MB + 200 * 25 * second) for pid in range(60)]
    assert missed(bounds.processes(a_record([one for life in lives for one in life]), LOAD)) == [
        f"memory that the {POSTMASTER} kept of an event"
    ]


def test_queues_of_an_outage_and_a_warm_up_are_no_leak() -> None:
    def memory(second: int) -> int:
        return 40 * MB + min(second, 300) * MB // 10 + (30 * MB if second % 600 < 60 else 0)

    assert missed(bounds.processes(a_record(a_life(WORKER, memory=memory)), LOAD)) == []


def test_a_run_that_is_too_short_to_judge_memory_says_so_and_judges_files() -> None:
    lasts = 45
    leaking = a_life(
        WORKER,
        lasts=lasts,
        memory=lambda second: MB + 200 * 400 * second,
        files=lambda second: 9 + 12 * second // lasts,
    )
    lines = bounds.processes(a_record(leaking, lasts=lasts), Load(events=200 * lasts, seconds=lasts))
    assert missed(lines) == ["the worker's open files have grown by"]
    (told,) = [line for line in lines if line.name == "memory that the worker kept of an event"]
    assert told.must_be == "too short to judge memory"


def test_of_a_process_that_never_lived_for_long_nothing_is_called_good() -> None:
    lives = [one for pid in range(9) for one in a_life(POSTMASTER, pid=pid, lasts=15)]
    told = {line.name: line.must_be for line in bounds.processes(a_record(lives, lasts=90), LOAD)}
    assert told[f"the {POSTMASTER}'s open files have grown by"] == "too short to judge"
    assert told[f"memory that the {POSTMASTER} kept of an event"] == "too short to judge memory"


def test_a_run_of_some_minutes_misses_a_worker_that_keeps_its_events_whole() -> None:
    lasts = 180
    leaking = a_life(WORKER, lasts=lasts, memory=lambda second: MB + 200 * 600 * second)
    lines = bounds.processes(a_record(leaking, lasts=lasts), Load(events=200 * lasts, seconds=lasts))
    assert missed(lines) == ["memory that the worker kept of an event"]


@pytest.mark.parametrize("role", ROLES)
def test_a_process_that_opens_files_and_keeps_them_is_missed(role: str) -> None:
    leaking = a_life(role, files=lambda second: 9 + second // 200)
    assert missed(bounds.processes(a_record(leaking), LOAD)) == [f"the {role}'s open files have grown by"]


def test_a_worker_that_is_too_large_from_the_start_is_missed() -> None:
    large = a_life(WORKER, memory=lambda _: 300 * MB, files=lambda _: 500)
    assert missed(bounds.processes(a_record(large), LOAD)) == [
        "the largest memory of a worker",
        "the most open files of a worker",
    ]


def test_a_process_that_was_never_seen_is_missed() -> None:
    record = Record(a_life(WORKER) + a_life(SUPERVISOR) + a_life(ARBITER))
    assert missed(bounds.processes(record, LOAD)) == [f"the {POSTMASTER}"]


EMPTY = Disk(tables=30 * MB, wal=16 * MB, rest=MB, files=1)
ROW, KEPT_ON_DISK = "disk for each event's row", "disk for each event, other than its row"
FILES_ON_DISK, WAL = "files beside PostgreSQL's have grown by", "the most disk for PostgreSQL's WAL"


@pytest.mark.parametrize(
    ("after", "files_in_an_hour", "most_wal", "expected"),
    [
        (Disk(EMPTY.tables + LOAD.events * 750, EMPTY.wal, EMPTY.rest + 2 * MB, 1), 2, 0, []),
        (Disk(EMPTY.tables + LOAD.events * 1100, EMPTY.wal, EMPTY.rest, 1), 2, 0, [ROW]),
        (Disk(EMPTY.tables, EMPTY.wal, EMPTY.rest + LOAD.events * 30, 1), 2, 0, [KEPT_ON_DISK]),
        (EMPTY, 20, 0, [FILES_ON_DISK]),
        (EMPTY, 2, 700 * MB, [WAL]),
    ],
    ids=["as it should be", "rows", "the rest", "files", "the log"],
)
def test_what_fills_the_disk_is_missed(after: Disk, files_in_an_hour: int, most_wal: int, expected: list[str]) -> None:
    disks = [
        (float(second), Disk(0, most_wal, 0, files=1 + files_in_an_hour * second // HOUR))
        for second in range(0, HOUR, 5)
    ]
    assert missed(bounds.disk(EMPTY, after, Record(disks=disks), LOAD, most_wal=512 * MB)) == expected


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"200": 80, "202": 15, "503": 3, "-": 2}, []),
        ({"200": 1, "503": 99}, ["requests stored or spooled"]),
        ({"200": 70, "-": 30}, ["requests stored or spooled"]),
        ({"200": 99, "500": 1}, ["requests refused or failed"]),
        ({}, ["requests stored or spooled"]),
    ],
)
def test_a_soak_that_took_too_little_or_failed_is_missed(statuses: dict[str, int], expected: list[str]) -> None:
    assert missed(bounds.answers(statuses)) == expected


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run the command as it is, but for the soak itself, which ends with these lines."""

    @contextmanager
    def nothing(*_: object, **__: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(clock=SimpleNamespace(steps=True))

    def run(*words: str, lines: Sequence[Line] = ()) -> Result:
        monkeypatch.setattr(program, "soak", lambda *_: lines)
        return CliRunner().invoke(program.main, words)

    monkeypatch.setattr(program, "build", nothing)
    # pytest's own stays.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return run


def test_one_line_that_is_missed_is_the_exit_code(command: Callable[..., Result]) -> None:
    good, bad = Line("files", "1", "at most 2"), Line("duplicates", "1", "0", holds=False)
    assert command(lines=[good]).exit_code == 0
    done = command(lines=[good, bad])
    assert (done.exit_code, "MISSED" in done.output, "--seed" in done.output) == (1, True, True)


def test_a_long_run_is_not_begun_where_it_cannot_step_the_clock(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    done = command("--minutes", "60")
    assert (done.exit_code, "--no-clock" in done.output) == (2, True)
    assert command("--minutes", "60", "--no-clock").exit_code == 0
    assert command("--minutes", "1.5").exit_code == 0


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_long_run_in_which_a_kind_of_fault_never_came_is_missed_and_a_short_one_names_it() -> None:
    struck = {"kill_worker": 2, "step_clock": 0}
    assert missed(bounds.faults(struck, 60)) == ["fault: step_clock"]
    assert missed(bounds.faults(struck, 1.5)) == []
    assert any("step_clock" in line.must_be for line in bounds.faults(struck, 1.5))


@pytest.mark.parametrize("seed", range(20))
def test_as_many_kinds_of_fault_come_as_fit_into_a_run(seed: int) -> None:
    deck = a_deck(seed)
    # A minute and a half: half of it for all kinds, half for those that the worker lives through.
    dealt = [*islice(deck.deal_all(), 8), *islice(deck.deal_sparing(), 5)]
    assert sorted(kind.__name__ for kind in dealt) == sorted(kind.__name__ for kind in kinds(clock=True))
    assert set(deck.times().values()) == {1}


def test_a_seed_repeats_the_faults_of_a_run() -> None:
    first, again, other = ([*islice(a_deck(seed).deal_all(), 30)] for seed in (1, 1, 2))
    assert first == again != other


def test_what_this_machine_cannot_do_counts_as_never_come() -> None:
    deck = Deck(kinds(clock=True), random.Random(1), able=kinds(clock=False))  # noqa: S311 - no secrets
    assert step_clock not in set(islice(deck.deal_all(), 50))
    assert deck.times()["step_clock"] == 0


def a_deck(seed: int) -> Deck:
    return Deck(kinds(clock=True), random.Random(seed), able=kinds(clock=True))  # noqa: S311 - no secrets
