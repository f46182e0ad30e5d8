"""What the soak counts: an event that is missing, doubled or different anywhere is told."""

import gzip
import json
from collections import Counter
from collections.abc import Mapping

import pytest
from soak.counting import tally
from soak.watching import Sample, growth

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


def test_growth_is_that_of_the_worker_that_lived_last_since_it_was_warm() -> None:
    killed = [Sample(pid=1, rss=10**9, files=500)] * 50
    warming = [Sample(pid=2, rss=n, files=1) for n in range(20)]
    leaking = [Sample(pid=2, rss=1000 + 10 * n, files=10 + n) for n in range(80)]
    assert growth(killed + warming + leaking) == (600, 60)
    assert growth(killed + [Sample(pid=3, rss=1000, files=10)] * 50) == (0, 0)
