"""What a job covers through changes of the configuration, and when a row counts as exported."""

import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from conftest import store_events, wait_for

from appliance.store import ledger, marks, overview, sealing
from appliance.store.database import Database
from appliance.store.ranges import where

Conn = psycopg.Connection[Any]
Jobs = Mapping[str, Sequence[str]]
SITES = ("shop", "blog", "wiki", None)


def configure(db: Database, jobs: Jobs) -> None:
    with db.connection() as conn:
        sealing.sync_coverage(conn, jobs)


def plan(job: str, batch_rows: int = 1000) -> sealing.Plan:
    return sealing.Plan(
        job=job,
        format="jsonl",
        compression="gzip",
        object_rows=1000,
        object_bytes=1000,
        batch_rows=batch_rows,
        schema_version=1,
        buckets={"client": "", "backup": ""},
    )


def seal(db: Database, *jobs: str, batch_rows: int = 1000) -> None:
    """Seal all there is of the jobs."""
    for job in jobs:
        sealed: object = None
        while not isinstance(sealed, sealing.Nothing):
            with db.connection() as conn:
                sealed = sealing.seal_next(conn, plan(job, batch_rows))


def deliver(db: Database, job: str, *buckets: str) -> None:
    """Record deliveries of everything the job has sealed, and settle what is settled by that."""
    with db.connection() as conn:
        for key in ledger.unsettled(conn, job):
            for bucket in buckets or ("client", "backup"):
                ledger.record_delivered(conn, key, bucket)
            ledger.settle(conn, key)


def arrive(db: Database, conn: Conn, site: str | None, number: int = 2) -> None:
    """Store events of a site; those without a site are put there by hand."""
    store_events(db, number, site_id=site or "by hand")
    conn.execute("UPDATE events_log SET site_id = NULL WHERE site_id = 'by hand'")


def sealed_rows(conn: Conn, job: str, *, state: str | None = None) -> Counter[int]:
    """Count in how many batches of the job each row stands."""
    query = "SELECT job, sequence FROM export_batches WHERE job = %s AND state = coalesce(%s, state)"
    found: Counter[int] = Counter()
    for key in conn.execute(query, (job, state)).fetchall():
        ranges = ledger.load(conn, ledger.Key(*key)).ranges
        rows = conn.execute(psycopg.sql.SQL("SELECT id FROM events_log e WHERE {}").format(where(ranges)))
        found.update(row[0] for row in rows)
    return found


def rows_of(conn: Conn, sites: Sequence[str]) -> Counter[int]:
    rows = conn.execute("SELECT id FROM events_log WHERE %(s)s @> ARRAY['*'] OR site_id = ANY(%(s)s)", {"s": [*sites]})
    return Counter(row[0] for row in rows)


def exported(conn: Conn) -> set[int]:
    return {row[0] for row in conn.execute("SELECT id FROM events_log WHERE exported_at IS NOT NULL")}


@pytest.mark.parametrize("sealed_between", [True, False], ids=["sealed between", "not sealed between"])
@pytest.mark.parametrize(
    "history",
    [
        pytest.param([["shop"], ["*"]], id="one site, then all"),
        pytest.param([["*"], ["shop"]], id="all, then one site"),
        pytest.param([["*"], ["shop"], ["*"]], id="all, one, all"),
        pytest.param([["shop"], ["*"], ["shop"], ["*"]], id="to and fro"),
        pytest.param([["*"], ["shop"], ["blog"], ["*"]], id="all, one, another, all"),
        pytest.param([["shop"], ["shop", "blog"]], id="a site added"),
        pytest.param([["shop", "blog"], ["shop"], ["shop", "blog"]], id="a site removed and put back"),
        pytest.param([["shop"], ["blog"]], id="a site replaced"),
        pytest.param([["shop"], None, ["shop"]], id="the job removed and put back"),
        pytest.param([["*"], None, ["shop"], ["*"]], id="the job removed and put back with other sites"),
        pytest.param([None, ["shop"]], id="the job added later"),
        pytest.param([None, ["*"]], id="a job for all sites added later"),
    ],
)
def test_whatever_is_covered_in_the_end_is_in_exactly_one_batch(
    db: Database, conn: Conn, history: list[list[str] | None], *, sealed_between: bool
) -> None:
    for sites in history:
        configure(db, {"other": ["wiki"], **({"acme": sites} if sites else {})})
        for site in SITES:
            arrive(db, conn, site)
        if sealed_between and sites:
            seal(db, "acme", batch_rows=3)
            arrive(db, conn, "shop")
            arrive(db, conn, "blog")
    seal(db, "acme", batch_rows=3)
    found = sealed_rows(conn, "acme")
    last = history[-1]
    assert last
    covered = rows_of(conn, last)
    assert set(found.values()) == {1}
    assert covered
    assert not covered - found


def test_a_site_that_a_job_lost_is_sealed_no_further(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop", "blog"]})
    arrive(db, conn, "blog")
    seal(db, "acme")
    configure(db, {"acme": ["shop"]})
    arrive(db, conn, "blog")
    seal(db, "acme")
    assert sealed_rows(conn, "acme") == Counter({1: 1, 2: 1})


def test_a_job_taken_out_of_the_configuration_seals_nothing_and_still_owes_its_batches(
    db: Database, conn: Conn
) -> None:
    configure(db, {"acme": ["shop"]})
    arrive(db, conn, "shop")
    seal(db, "acme")
    configure(db, {})
    arrive(db, conn, "shop")
    seal(db, "acme")
    assert sealed_rows(conn, "acme") == Counter({1: 1, 2: 1})
    assert ledger.jobs_with_unsettled(conn) == ["acme"]


def test_rows_without_a_site_belong_to_every_site_and_to_no_named_one(db: Database, conn: Conn) -> None:
    configure(db, {"all": ["*"], "one": ["shop"]})
    arrive(db, conn, None)
    arrive(db, conn, "shop")
    configure(db, {"all": ["*"], "one": ["*"]})
    seal(db, "all", "one")
    assert sealed_rows(conn, "all") == sealed_rows(conn, "one") == Counter([1, 2, 3, 4])


def test_a_site_named_while_its_rows_are_being_sealed_for_all_sites_is_not_sealed_twice(
    db: Database, conn: Conn
) -> None:
    configure(db, {"acme": ["*"]})
    arrive(db, conn, "shop")
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with ThreadPoolExecutor(1) as pool:
        with db.connection() as old:
            assert isinstance(sealing.seal_next(old, plan("acme")), sealing.Sealed)
            # Another process starts with an edited configuration before this one commits.
            edited = pool.submit(configure, db, {"acme": ["shop"]})
            wait_for(lambda: edited.done() or conn.execute(waits).fetchone(), "the other process to meet this one")
        edited.result()
    seal(db, "acme")
    assert sealed_rows(conn, "acme") == Counter([1, 2])


@pytest.mark.parametrize("seed", range(6))
def test_any_history_of_configurations_keeps_every_promise(db: Database, conn: Conn, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret
    jobs: dict[str, list[str]] = {}
    names = ("acme", "vault", "lab")
    for _ in range(25):
        arrive(db, conn, chance.choice(SITES), chance.randint(1, 3))
        if chance.random() < 0.5:
            sites = chance.choice([["*"], ["shop"], ["blog"], ["shop", "blog"], ["wiki", "shop"]])
            jobs = {name: list(sites) for name in chance.sample(names, chance.randint(0, 3))}
        configure(db, jobs)
        for job in chance.sample(names, 2):
            seal(db, job, batch_rows=chance.choice([2, 5, 1000]))
            deliver(db, job, *chance.choice([["client"], ["backup"], ["client", "backup"]]))
        before = exported(conn)
        marks.mark_settled_rows(db)
        marked = exported(conn) - before
        for job, sites in jobs.items():
            assert marked & set(rows_of(conn, sites)) <= set(sealed_rows(conn, job, state="settled"))
        for job in names:
            assert set(sealed_rows(conn, job).values()) <= {1}
    seal(db, *jobs)
    for job in names:
        deliver(db, job)
    marks.mark_settled_rows(db)
    for job, sites in jobs.items():
        assert not rows_of(conn, sites) - sealed_rows(conn, job)
        assert set(rows_of(conn, sites)) <= exported(conn)


@pytest.mark.parametrize("order", [("acme", "vault"), ("vault", "acme")], ids=" then ".join)
def test_a_row_is_marked_when_the_last_of_its_jobs_has_settled(
    db: Database, conn: Conn, order: tuple[str, str]
) -> None:
    configure(db, {"acme": ["shop"], "vault": ["*"]})
    arrive(db, conn, "shop")
    seal(db, "acme", "vault")
    assert marks.mark_settled_rows(db) == 0
    deliver(db, order[0])
    assert marks.mark_settled_rows(db) == 0
    deliver(db, order[1])
    assert marks.mark_settled_rows(db) == 2
    assert exported(conn) == {1, 2}


@pytest.mark.parametrize("bucket", ["client", "backup"])
def test_a_row_that_one_bucket_lacks_is_not_marked(db: Database, conn: Conn, bucket: str) -> None:
    configure(db, {"acme": ["shop"]})
    arrive(db, conn, "shop")
    seal(db, "acme")
    deliver(db, "acme", bucket)
    marks.mark_settled_rows(db)
    assert exported(conn) == set()


def test_rows_of_a_job_that_lags_behind_stay_unmarked_and_others_do_not_wait(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop"], "vault": ["shop", "blog"]})
    arrive(db, conn, "shop")
    arrive(db, conn, "blog")
    seal(db, "vault")
    deliver(db, "vault")
    marks.mark_settled_rows(db)
    assert exported(conn) == {3, 4}


def test_a_batch_that_settles_before_an_older_one_is_marked_only_after_it(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop"]})
    arrive(db, conn, "shop", 4)
    seal(db, "acme", batch_rows=2)
    first, second = ledger.unsettled(conn, "acme")
    for key in (second, first):
        for bucket in ("client", "backup"):
            ledger.record_delivered(conn, key, bucket)
        ledger.settle(conn, key)
        marks.mark_settled_rows(db)
        assert exported(conn) == (set() if key == second else {1, 2, 3, 4})


def test_rows_that_a_job_sealed_before_it_was_removed_wait_for_their_delivery(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop"], "vault": ["*"]})
    arrive(db, conn, "shop")
    seal(db, "acme", "vault")
    configure(db, {"vault": ["*"]})
    deliver(db, "vault")
    marks.mark_settled_rows(db)
    assert exported(conn) == set()
    deliver(db, "acme")
    marks.mark_settled_rows(db)
    assert exported(conn) == {1, 2}


def test_a_retired_jobs_last_rows_are_marked_when_they_are_delivered(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop"]})
    arrive(db, conn, "shop")
    seal(db, "acme")
    configure(db, {})
    deliver(db, "acme")
    marks.mark_settled_rows(db)
    assert exported(conn) == {1, 2}


def test_rows_that_nobody_covers_are_never_marked(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop"]})
    for site in SITES:
        arrive(db, conn, site)
    seal(db, "acme")
    deliver(db, "acme")
    marks.mark_settled_rows(db)
    assert exported(conn) == set(rows_of(conn, ["shop"]))


def test_marking_in_small_steps_marks_the_same_rows_and_each_once(
    db: Database, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "_STEP_IDS", 3)
    configure(db, {"acme": ["shop"], "vault": ["*"]})
    for site in SITES * 2:
        arrive(db, conn, site)
    seal(db, "acme", "vault", batch_rows=5)
    deliver(db, "acme")
    deliver(db, "vault")
    assert marks.mark_settled_rows(db) == 16
    moments = conn.execute("SELECT id, exported_at FROM events_log ORDER BY id").fetchall()
    assert all(moment for _, moment in moments)
    arrive(db, conn, "shop")
    assert marks.mark_settled_rows(db) == 0
    assert conn.execute("SELECT id, exported_at FROM events_log ORDER BY id LIMIT 16").fetchall() == moments


def test_a_job_that_begins_while_rows_are_being_marked_waits_for_that(
    db: Database, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(db, {"vault": ["*"]})
    arrive(db, conn, "shop")
    seal(db, "vault")
    deliver(db, "vault")
    settled_to = marks._settled_to  # noqa: SLF001 - the moment between two steps of the marking
    begins = threading.Thread(target=configure, args=(db, {"vault": ["*"], "acme": ["shop"]}))

    def while_another_process_starts(connection: Conn, site: str) -> int | None:
        if not begins.ident:
            begins.start()
            wait_for(lambda: waits_for_a_lock(conn), "the other process to wait")
        return settled_to(connection, site)

    monkeypatch.setattr(marks, "_settled_to", while_another_process_starts)
    marks.mark_settled_rows(db)
    begins.join(30)
    assert not begins.is_alive()
    marked = exported(conn)
    arrive(db, conn, "shop")
    seal(db, "vault")
    deliver(db, "vault")
    marks.mark_settled_rows(db)
    assert exported(conn) == marked


def test_a_job_that_begins_before_a_step_of_the_marking_keeps_its_rows_unmarked(
    db: Database, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(db, {"vault": ["*"]})
    arrive(db, conn, "shop")
    seal(db, "vault")
    deliver(db, "vault")
    mark_step = marks._mark_step  # noqa: SLF001 - the moment before a step, after the sites were listed

    def another_process_starts(connection: Conn, site: str) -> int | None:
        configure(db, {"vault": ["*"], "acme": ["shop"]})
        return mark_step(connection, site)

    with monkeypatch.context() as patch:
        patch.setattr(marks, "_mark_step", another_process_starts)
        marks.mark_settled_rows(db)
    assert exported(conn) == set()
    seal(db, "acme")
    deliver(db, "acme")
    marks.mark_settled_rows(db)
    assert exported(conn) == {1, 2}


def waits_for_a_lock(conn: Conn) -> bool:
    row = conn.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ).fetchone()
    return row is not None and row[0] > 0


def test_the_overview_counts_what_waits_and_what_is_exported(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop"], "vault": ["*"], "old": ["wiki"]})
    for site, number in (("shop", 3), ("blog", 2), ("wiki", 1)):
        arrive(db, conn, site, number)

    def numbers() -> dict[str, tuple[int, int]]:
        return {job.job: (job.waiting, job.exported) for job in overview.read(conn).jobs}

    assert numbers() == {"acme": (3, 0), "vault": (6, 0), "old": (1, 0)}
    seal(db, "acme", "old")
    configure(db, {"acme": ["shop"], "vault": ["*"]})
    arrive(db, conn, "shop", 4)
    arrive(db, conn, "wiki", 5)
    assert numbers() == {"acme": (7, 0), "vault": (15, 0), "old": (1, 0)}
    deliver(db, "acme", "client")
    assert numbers()["acme"] == (7, 0)
    deliver(db, "acme", "backup")
    seal(db, "vault")
    deliver(db, "vault")
    assert numbers() == {"acme": (4, 3), "vault": (0, 15), "old": (1, 0)}
    assert {job.job: job.active for job in overview.read(conn).jobs} == {"acme": True, "vault": True, "old": False}


def test_the_overview_shows_how_far_each_bucket_is_and_why_not_further(db: Database, conn: Conn) -> None:
    configure(db, {"acme": ["shop"]})
    arrive(db, conn, "shop", 2)
    seal(db, "acme", batch_rows=1)
    deliver(db, "acme", "client")
    ledger.record_failure(conn, ledger.Key("acme", 1), "backup", "no room")
    ledger.record_failure(conn, ledger.Key("acme", 1), "client", "too late: it has it")
    (job,) = overview.read(conn).jobs
    assert [(b.bucket, b.delivered, b.pending, b.last_error) for b in job.buckets] == [
        ("backup", 0, 2, "no room"),
        ("client", 2, 0, None),
    ]
    assert job.buckets[0].last_delivered_at is None
    assert job.buckets[1].last_delivered_at is not None
