"""Events and ledger come back out of a bucket, exactly, and exports go on as if nothing had happened."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from conftest import S3Server, database, make_event, store_events
from exporting import CrashError, MortalDatabase, Steps, World, crash, exported_ids, watch, world_of

from appliance.errors import BucketAheadError, BucketError, RestoreError
from appliance.export.restore import Restore, Restored, give_up
from appliance.export.verify import Verification
from appliance.store import events, overview
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres

Conn = psycopg.Connection[Any]
Row = tuple[Any, ...]

RAW = json.dumps({"q": 'a "b" \\n \\ é 😀', "n": 2**53 + 1, "x": "1.10", "deep": {"a": [1, None, True]}})
COLUMNS = ", ".join(events.EXPORTED_COLUMNS)


@pytest.fixture
def world(db: Database, conn: Conn, s3: S3Server, tmp_path: Path) -> World:
    """Two batches of two sites each, delivered to both buckets."""
    one = World(db, conn, s3, tmp_path)
    fill(one)
    return one


def fill(world: World) -> None:
    for _ in range(2):
        store_events(world.db, 3, raw_event_data=RAW, url='https://shop.example.com/?q="\\\n,;=1', path="")
        store_events(world.db, 2, site_id="blog", session_id=None, visitor_id="", url=None, ip_address=None)
        assert not world.export().failed


@pytest.fixture
def install(postgres: EmbeddedPostgres, tmp_path: Path) -> Iterator[Callable[[World], World]]:
    """Make new installations, with the same configuration and buckets as another."""
    with ExitStack() as stack:
        yield lambda world: stack.enter_context(installation(postgres, world, tmp_path / f"fresh{uuid4().hex[:6]}"))


@contextmanager
def installation(postgres: EmbeddedPostgres, world: World, directory: Path) -> Iterator[World]:
    name = f"fresh_{uuid4().hex}"
    with database(postgres, "template_of_tests", name), world_of(postgres, name, world.s3, directory) as fresh:
        yield same_buckets(fresh, world)


def same_buckets(one: World, other: World) -> World:
    one.names, one.tables, one.jobs = other.names, other.tables, other.jobs
    return one


@pytest.fixture
def fresh(world: World, install: Callable[[World], World]) -> World:
    """A new installation on the buckets of `world`."""
    return install(world)


def restore(world: World, bucket: str = "vault", *, db: Database | None = None) -> Restored:
    return Restore(world.exporter(db=db).means, bucket).run()


def rows(world: World) -> list[Row]:
    return world.conn.execute(f"SELECT {COLUMNS} FROM events_log ORDER BY id").fetchall()  # noqa: S608 - our own names


def states(world: World, bucket: str) -> list[str]:
    query = "SELECT state FROM export_deliveries WHERE bucket = %s ORDER BY sequence"
    return [state for (state,) in world.conn.execute(query, (bucket,))]


def delete(world: World, bucket: str, words: str = "") -> None:
    """Delete what has the words in its key, through the server, which remembers what it has listed."""
    for key in world.contents(bucket):
        if words in key:
            world.s3.client().delete_object(Bucket=world.names[bucket], Key=key)


def put(world: World, bucket: str, key: str, content: bytes) -> None:
    world.s3.client().put_object(Bucket=world.names[bucket], Key=key, Body=content)


def assert_right(world: World, *, batches: int) -> None:
    """Each event of the table stands once in each bucket, and nothing is owed, damaged or left to mark."""
    assert world.contents("client") == world.contents("vault")
    assert exported_ids(world.contents("vault")) == world.rows()
    assert states(world, "client") == states(world, "vault") == ["delivered"] * batches
    assert world.conn.execute("SELECT count(*) FROM events_log WHERE exported_at IS NULL").fetchone() == (0,)
    verdict = Verification(world.exporter().means, "acme").run()
    assert (verdict.findings, verdict.problems, verdict.batches) == ((), (), batches)
    assert world.export().summary == "nothing new delivered"


FORMATS = {
    "jsonl, gzip": {"format": "jsonl", "compression": "gzip"},
    "jsonl, zstd": {"format": "jsonl", "compression": "zstd"},
    "jsonl": {"format": "jsonl", "compression": "none"},
    "csv, gzip": {"format": "csv", "compression": "gzip"},
    "csv": {"format": "csv", "compression": "none"},
    "parquet": {"format": "parquet", "compression": "zstd"},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_from_the_backup_alone_every_row_comes_back_as_it_was(  # noqa: PLR0913, PLR0917 - fixtures
    db: Database,
    conn: Conn,
    s3: S3Server,
    tmp_path: Path,
    install: Callable[[World], World],
    options: dict[str, str],
) -> None:
    world = World(db, conn, s3, tmp_path)
    world.jobs["acme"] |= options
    fill(world)
    fresh = install(world)
    outcome = restore(fresh)
    assert (outcome.batches, outcome.rows, outcome.damage, outcome.notes) == (2, 10, [], [])
    assert rows(fresh) == rows(world)


def test_the_next_export_continues_the_chain_in_both_buckets(fresh: World) -> None:
    restore(fresh)
    store_events(fresh.db, 4)
    assert not fresh.export().failed
    assert_right(fresh, batches=3)


def test_events_are_counted_as_they_were(world: World, fresh: World) -> None:
    query = "SELECT minute, site_id, sum(events), max(last_id) FROM event_counts GROUP BY 1, 2 ORDER BY 1, 2"
    restore(fresh)
    assert fresh.conn.execute(query).fetchall() == world.conn.execute(query).fetchall()


def test_what_a_new_installation_has_collected_is_kept_and_exported_once(fresh: World) -> None:
    collected = store_events(fresh.db, 7) + store_events(fresh.db, 1, site_id="blog")
    with pytest.raises(BucketAheadError, match="restore from it"):
        fresh.export()
    outcome = restore(fresh)
    assert (outcome.rows, outcome.moved) == (10, 8)
    assert Counter(map(str, collected)) <= fresh.rows()
    assert not fresh.export().failed
    assert_right(fresh, batches=3)


def test_an_event_that_was_sent_to_the_new_installation_again_is_there_once(world: World, fresh: World) -> None:
    again = rows(world)[0][1]
    with fresh.db.connection() as conn:
        events.copy_in(conn, [make_event(event_id=again, path="/other"), make_event()])
    restore(fresh)
    assert rows(fresh)[:10] == rows(world)
    assert fresh.conn.execute("SELECT sum(events) FROM event_counts").fetchone() == (11,)
    assert len(rows(fresh)) == 11
    assert not fresh.export().failed
    assert_right(fresh, batches=3)


def test_rows_that_arrive_while_it_runs_are_exported_afterwards(fresh: World) -> None:
    exporter = fresh.exporter()
    stored: list[UUID] = []

    @contextmanager
    def collect(_call: str) -> Iterator[None]:
        stored.extend(store_events(fresh.db, 1))
        yield

    Restore(watch(exporter, collect).means, "vault").run()
    assert stored
    assert not fresh.export().failed
    assert_right(fresh, batches=3)


def test_while_it_is_unfinished_nothing_is_sealed_until_it_is_given_up(fresh: World) -> None:
    delete(fresh, "client")
    store_events(fresh.db, 2)
    with pytest.raises(BucketError, match="down"):
        Restore(watch(fresh.exporter(), fails_at(fetch=5)).means, "vault").run()
    report = fresh.export()
    assert report.failed
    assert "until the restore from bucket vault" in report.summary
    with fresh.db.connection() as conn:
        assert overview.read(conn).restoring == "vault"
    assert len(states(fresh, "vault")) == 1
    give_up(fresh.exporter().means)
    with pytest.raises(BucketAheadError):
        fresh.export()
    restore(fresh)
    assert not fresh.export().failed
    assert_right(fresh, batches=3)


def fails_at(*, fetch: int) -> Callable[[str], Any]:
    seen = 0

    @contextmanager
    def step(call: str) -> Iterator[None]:
        nonlocal seen
        seen += call == "fetch"
        if seen == fetch:
            raise BucketError("bucket vault: it is down")
        yield

    return step


def test_killed_at_any_step_it_goes_on_when_it_is_run_again(
    world: World, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    last = 1
    while True:
        with installation(postgres, world, tmp_path / f"killed{last}") as fresh:
            store_events(fresh.db, 3)
            survived = restored_until(fresh, Steps(last))
            # What had come to its end already is refused.
            with suppress(RestoreError):
                restore(fresh)
            assert rows(fresh)[:10] == rows(world)
            assert len(rows(fresh)) == 13
            assert states(fresh, "vault") == ["delivered"] * 2
        if survived:
            break
        last += 1
    assert last > 20


def restored_until(world: World, steps: Steps) -> bool:
    """Restore until the process dies at a step; return whether it has survived."""
    with MortalDatabase(world.db.conninfo) as db:
        db.steps = steps
        means = watch(world.exporter(db=db), steps.step).means
        try:
            Restore(means, "vault").run()
        except CrashError:
            return False
    return True


def test_one_bucket_after_another_makes_up_for_what_one_has_lost(fresh: World) -> None:
    delete(fresh, "vault", "0000000001-0002")
    outcome = restore(fresh)
    assert [damage.rpartition("/")[2] for damage in outcome.damage] == ["acme-0000000001-0002.jsonl.gz is missing"]
    assert (outcome.batches, outcome.notes) == (1, [])
    second = restore(fresh, "client")
    assert (second.batches, second.proven, second.damage) == (1, 1, [])
    assert states(fresh, "vault") == ["pending", "delivered"]
    assert not fresh.export().failed
    assert_right(fresh, batches=2)


def test_what_a_bucket_cannot_prove_is_owed_to_it(fresh: World) -> None:
    delete(fresh, "client")
    restore(fresh)
    assert (states(fresh, "vault"), states(fresh, "client")) == (["delivered"] * 2, ["pending"] * 2)
    assert not fresh.export().failed
    assert_right(fresh, batches=2)


def test_a_client_bucket_that_is_further_on_stops_the_job_until_it_is_restored_from_too(fresh: World) -> None:
    delete(fresh, "vault", "acme-0000000002")
    delete(fresh, "vault", "_manifests/acme/0000000002")
    store_events(fresh.db, 1)
    assert restore(fresh).batches == 1
    with pytest.raises(BucketAheadError, match="appliance restore client"):
        fresh.export()
    assert restore(fresh, "client").batches == 1
    assert not fresh.export().failed
    assert_right(fresh, batches=3)


def test_a_bucket_that_begins_late_says_which_batches_another_may_have(fresh: World) -> None:
    delete(fresh, "vault", "0000000001")
    outcome = restore(fresh)
    assert outcome.notes == ["batches 1 to 1 of acme are not here: if another bucket has them, restore from it too"]
    assert restore(fresh, "client").notes == []
    assert not fresh.export().failed
    assert_right(fresh, batches=2)


def test_what_was_collected_under_ids_of_batches_that_are_gone_is_exported_all_the_same(fresh: World) -> None:
    """A rule of the buckets has removed what is old."""
    for bucket in ("client", "vault"):
        delete(fresh, bucket, "0000000001")
    collected = set(map(str, store_events(fresh.db, 3)))
    with pytest.raises(BucketAheadError):
        fresh.export()
    assert restore(fresh).moved == 3
    assert not fresh.export().failed
    fresh.check_claims()
    assert collected <= exported_ids(fresh.contents("client")).keys()
    assert exported_ids(fresh.contents("vault")) == fresh.rows()


def test_a_job_that_names_its_sites_now_does_not_export_again_what_it_exported_as_all_sites(fresh: World) -> None:
    fresh.jobs["acme"]["sites"] = ["shop", "blog"]
    store_events(fresh.db, 1)
    with pytest.raises(BucketAheadError):
        fresh.export()
    restore(fresh)
    assert not fresh.export().failed
    assert_right(fresh, batches=3)


def test_a_job_that_was_added_since_exports_what_came_back(fresh: World) -> None:
    fresh.tables["other"] = fresh.tables["client"] | {"prefix": "other"}
    fresh.jobs["other"] = {"sites": ["shop"], "client": "other"}
    store_events(fresh.db, 2, site_id="blog")
    # It has passed over what was here, and found nothing of its own.
    assert fresh.export("other").summary == "nothing new delivered"
    restore(fresh)
    assert fresh.export("other").row_count == 6


def test_a_database_of_last_week_gets_what_it_lacks(world: World, install: Callable[[World], World]) -> None:
    """The ledger is the beginning of the bucket's history: a backup put back, or a failover that lost the newest."""
    late = install(world)
    restore(late)
    fill(world)
    # Ids go on from where they were, and others have drawn them.
    late.conn.execute("SELECT setval('events_log_id_seq', 10)")
    store_events(late.db, 3)
    with pytest.raises(BucketAheadError):
        late.export()
    outcome = restore(late, "client")
    assert (outcome.batches, outcome.rows, outcome.moved) == (2, 10, 3)
    assert rows(late)[:20] == rows(world)
    assert not late.export().failed
    assert_right(late, batches=5)


def test_run_again_where_all_is_there_it_says_so_and_changes_nothing(world: World, fresh: World) -> None:
    restore(fresh)
    for one in (world, fresh):
        before = rows(one)
        outcome = restore(one)
        (line,) = outcome.lines
        assert line.startswith("nothing to bring back: the ledger has every batch of bucket vault")
        assert (outcome.batches, outcome.proven, rows(one)) == (0, 0, before)


@pytest.mark.parametrize("begun", [False, True], ids=["delivered", "perhaps sent"])
def test_a_ledger_with_another_history_is_refused_and_stays_as_it_is(
    world: World, install: Callable[[World], World], *, begun: bool
) -> None:
    other = install(world)
    other.tables = {name: table | {"prefix": "elsewhere"} for name, table in world.tables.items()}
    store_events(other.db, 4)
    if begun:
        crash(other)
    else:
        assert not other.export().failed
    other.tables = world.tables
    before = rows(other)
    with pytest.raises(RestoreError, match="the ledger is not empty, and has another batch acme 1 than bucket vault"):
        restore(other)
    assert rows(other) == before
    assert other.conn.execute("SELECT restoring FROM installation").fetchone() == (None,)


def test_events_under_ids_that_another_job_has_exported_meanwhile_are_refused(fresh: World) -> None:
    fresh.tables["other"] = fresh.tables["client"] | {"prefix": "other"}
    fresh.jobs["other"] = {"sites": ["*"], "client": "other"}
    store_events(fresh.db, 4)
    assert fresh.export("other").row_count == 4
    before = rows(fresh)
    with pytest.raises(RestoreError, match="restore into a database of its own"):
        restore(fresh)
    assert rows(fresh) == before


def test_csv_with_escaped_formulas_is_refused(
    db: Database, conn: Conn, s3: S3Server, tmp_path: Path, install: Callable[[World], World]
) -> None:
    world = World(db, conn, s3, tmp_path)
    world.jobs["acme"] |= {"format": "csv", "escape_formulas": True}
    fill(world)
    fresh = install(world)
    with pytest.raises(RestoreError, match="escape_formulas"):
        restore(fresh)
    assert rows(fresh) == []


def test_a_bucket_without_exports_is_refused(fresh: World) -> None:
    fresh.tables["vault"] |= {"prefix": "nothing/here"}
    with pytest.raises(RestoreError, match="bucket vault holds no exports below nothing/here/"):
        restore(fresh)


def test_batches_for_a_bucket_that_nobody_configured_are_told_of(fresh: World) -> None:
    fresh.tables = {"vault": fresh.tables["vault"]}
    fresh.jobs = {"acme": {"sites": ["*"], "client": "vault"}}
    (note,) = restore(fresh).notes
    assert note.startswith("2 batches are owed to bucket client")


MANIFEST = "raw/_manifests/acme/0000000002.json"


def edited(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | fields).encode()


def with_object(**fields: Any) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        manifest = json.loads(content)
        manifest["objects"][0] |= fields
        return json.dumps(manifest).encode()

    return edit


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _content: b"",
    "no text": lambda _content: b"\xff\xfe",
    "no JSON": lambda _content: b"<html>",
    "a list": lambda _content: b"[]",
    "deep nesting": lambda _content: b"[" * 100_000,
    "of another job": edited(job="other"),
    "of another batch": edited(sequence=7),
    "of another kind": edited(kind="erasure"),
    "of a later version": edited(manifest_version=2),
    "of later columns": edited(schema_version=99),
    "a field that nobody knows": edited(surprise=1),
    "a format that nobody knows": edited(format="xml"),
    "rows as text": edited(row_count="5"),
    "more rows than there are": edited(row_count=6),
    "no ranges": edited(ranges=[]),
    "other ranges": edited(ranges=[{"site": "*", "except_sites": [], "from_id": 0, "to_id": 1}]),
    "a range beyond 64 bits": edited(ranges=[{"site": "*", "except_sites": [], "from_id": 0, "to_id": 2**70}]),
    "a NUL in a site": edited(ranges=[{"site": "a\0b", "except_sites": [], "from_id": 0, "to_id": 10}]),
    "no objects": edited(objects=[]),
    "a key that leads out": with_object(key="site=../../../etc/date=1/hour=1/acme-0000000002-0001.jsonl.gz"),
    "a key elsewhere": with_object(key="/etc/passwd"),
    "a key of another batch": with_object(key="site=a/date=1/hour=1/acme-0000000001-0001.jsonl.gz"),
    "an object that is not there": with_object(key="site=a/date=1/hour=1/acme-0000000002-0001.jsonl.gz"),
    "another digest": with_object(sha256="0" * 64),
    "no digest": with_object(sha256="zero"),
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_manifest_of_this_batch_is_told_of_and_costs_no_other_batch(
    world: World, fresh: World, edit: Callable[[bytes], bytes]
) -> None:
    put(world, "vault", MANIFEST, edit(world.contents("vault")[MANIFEST]))
    outcome = restore(fresh)
    assert len(outcome.damage) == 1
    assert len(outcome.damage[0]) < 500
    assert (outcome.batches, len(rows(fresh))) == (1, 5)
    second = restore(fresh, "client")
    assert (second.batches, second.damage) == (1, [])
    assert rows(fresh) == rows(world)


def test_a_manifest_that_the_next_does_not_confirm_is_not_believed(world: World, fresh: World) -> None:
    first = MANIFEST.replace("2.json", "1.json")
    put(world, "vault", first, world.contents("vault")[first].replace(b"\n", b"\n "))
    outcome = restore(fresh)
    assert outcome.damage == ["batch acme 1: its manifest is not the one that was delivered"]
    assert outcome.batches == 1


def test_an_object_with_other_bytes_is_told_of_and_nothing_of_its_batch_comes_back(world: World, fresh: World) -> None:
    key = next(key for key in sorted(world.contents("vault")) if "0000000002-0001" in key)
    put(world, "vault", key, b"x" + world.contents("vault")[key][1:])
    outcome = restore(fresh)
    assert len(outcome.damage) == 1
    assert "holds other bytes than were delivered" in outcome.damage[0]
    assert len(rows(fresh)) == 5


def test_rows_of_a_site_without_a_name_come_back_too(world: World, fresh: World) -> None:
    """Put there by hand: the collector takes no such site."""
    store_events(world.db, 1, site_id="")
    assert not world.export().failed
    assert restore(fresh).damage == []
    assert rows(fresh) == rows(world)
