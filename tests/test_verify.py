"""`appliance verify` finds what is wrong in a bucket, repairs what is missing, and never writes over anything."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import S3Server, store_events
from exporting import World

from appliance.export.verify import Finding, Verdict, Verification, repair
from appliance.store.database import Database
from appliance.store.ledger import Batch

Conn = psycopg.Connection[Any]


@pytest.fixture
def world(db: Database, conn: Conn, s3: S3Server, tmp_path: Path) -> World:
    """Two batches of two objects each, delivered to both buckets."""
    one = World(db, conn, s3, tmp_path)
    for _ in range(2):
        store_events(db, 3)
        store_events(db, 2, site_id="blog")
        assert not one.export().failed
    return one


def verify(world: World, job: str = "acme") -> Verdict:
    return Verification(world.exporter().means, job).run()


def key_of(world: World, bucket: str, what: str) -> str:
    """The first key of a bucket that holds the words."""
    return next(key for key in sorted(world.contents(bucket)) if what in key)


def put(world: World, bucket: str, key: str, content: bytes) -> None:
    """Put something there by hand: through the server, which remembers what it has listed."""
    world.s3.client().put_object(Bucket=world.names[bucket], Key=key, Body=content)


def delete(world: World, bucket: str, *keys: str) -> None:
    for key in keys:
        world.s3.client().delete_object(Bucket=world.names[bucket], Key=key)


def kinds(verdict: Verdict) -> list[tuple[str, str]]:
    return sorted((finding.kind, finding.bucket) for finding in verdict.findings)


def test_buckets_as_they_were_delivered_are_right(world: World) -> None:
    verdict = verify(world)
    assert (verdict.findings, verdict.problems) == ((), ())
    assert (verdict.batches, verdict.objects) == (2, 12)
    assert verdict.bytes == sum(len(data) for contents in world.everything().values() for data in contents.values())


def test_a_job_that_never_sealed_anything_is_right(world: World) -> None:
    verdict = verify(world, "other")
    assert (verdict.batches, verdict.findings) == (0, ())


def lose_an_object(world: World) -> None:
    delete(world, "vault", key_of(world, "vault", "0000000002-0001.jsonl"))


def lose_a_manifest(world: World) -> None:
    delete(world, "client", key_of(world, "client", "_manifests/acme/0000000001"))


def lose_everything(world: World) -> None:
    delete(world, "vault", *world.contents("vault"))


LOSSES: dict[str, tuple[Callable[[World], None], list[tuple[str, str]]]] = {
    "an object": (lose_an_object, [("missing", "vault")]),
    "a manifest": (lose_a_manifest, [("missing", "client")]),
    "a whole bucket": (lose_everything, [("missing", "vault")] * 6),
}


@pytest.mark.parametrize(("lose", "found"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("rows", ["from the table", "from the other bucket"])
def test_what_is_missing_is_found_and_repaired(
    world: World, lose: Callable[[World], None], found: list[tuple[str, str]], rows: str
) -> None:
    before = world.everything()
    lose(world)
    if rows == "from the other bucket":
        world.conn.execute("DELETE FROM events_log")
        world.conn.execute("UPDATE export_marks SET deleted_to = 1000")
    verdict = verify(world)
    assert kinds(verdict) == found
    mended = repair(world.exporter().means, verdict)
    assert (mended.repaired, mended.left) == (verdict.findings, ())
    assert world.everything() == before
    assert verify(world).findings == ()


def change(world: World, bucket: str, what: str, how: Callable[[bytes], bytes]) -> None:
    key = key_of(world, bucket, what)
    put(world, bucket, key, how(world.contents(bucket)[key]))


def copy(world: World, bucket: str, what: str, name: Callable[[str], str]) -> None:
    key = key_of(world, bucket, what)
    put(world, bucket, name(key), world.contents(bucket)[key])


def alter_a_byte(world: World) -> None:
    change(world, "vault", "0000000002-0001.jsonl", lambda data: data[:-1] + bytes([data[-1] ^ 1]))


def cut_an_object_short(world: World) -> None:
    change(world, "client", "0000000001-0002.jsonl", lambda data: data[:-1])


def edit_a_manifest(world: World) -> None:
    edit = (b'"row_count": 5', b'"row_count": 4')
    change(world, "client", "_manifests/acme/0000000002", lambda data: data.replace(*edit))


def double_an_object(world: World) -> None:
    copy(world, "client", "0000000001-0001.jsonl", lambda key: re.sub(r"hour=\d\d", "hour=25", key))


def add_a_manifest(world: World) -> None:
    copy(world, "client", "_manifests/acme/0000000002", lambda key: key.replace("0000000002", "0000000003"))


def add_an_object(world: World) -> None:
    copy(world, "vault", "0000000002-0001.jsonl", lambda key: key.replace("0000000002", "0000000009"))


DAMAGES: dict[str, tuple[Callable[[World], None], tuple[str, str]]] = {
    "one bit": (alter_a_byte, ("altered", "vault")),
    "cut short": (cut_an_object_short, ("altered", "client")),
    "an edited manifest": (edit_a_manifest, ("altered", "client")),
    "an object at two keys": (double_an_object, ("doubled", "client")),
    "a manifest of nobody": (add_a_manifest, ("foreign", "client")),
    "an object of nobody": (add_an_object, ("foreign", "vault")),
}


@pytest.mark.parametrize(("damage", "found"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_altered_foreign_or_doubled_is_found_and_left_alone(
    world: World, damage: Callable[[World], None], found: tuple[str, str]
) -> None:
    damage(world)
    before = world.everything()
    verdict = verify(world)
    assert kinds(verdict) == [found]
    mended = repair(world.exporter().means, verdict)
    left = mended.left
    assert mended.repaired == ()
    assert len(left) == 1
    assert verdict.findings[0].key in left[0]
    assert world.everything() == before


def test_things_of_others_in_the_bucket_are_no_matter(world: World) -> None:
    for key in ("notes.txt", "site=shop/readme.md", "site=shop/acme2-0000000001-0001.jsonl.gz"):
        put(world, "client", f"raw/{key}", b"x")
    assert verify(world).findings == ()


def test_a_delivery_that_is_still_owed_is_no_damage(world: World) -> None:
    world.tables["vault"]["access_key_id"] = "WRONG"
    store_events(world.db, 2)
    assert world.export().failed
    world.tables["vault"]["access_key_id"] = world.tables["client"]["access_key_id"]
    assert verify(world).findings == ()


def test_a_batch_that_is_sealed_and_delivered_meanwhile_is_not_foreign(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    verification = Verification(world.exporter().means, "acme")
    load = verification._load  # noqa: SLF001 - the moment between the ledger and the buckets

    def load_and_let_another_run_deliver() -> list[Batch]:
        batches = load()
        store_events(world.db, 2)
        assert not world.export().failed
        return batches

    monkeypatch.setattr(verification, "_load", load_and_let_another_run_deliver)
    verdict = verification.run()
    assert (verdict.batches, verdict.findings, verdict.problems) == (2, (), ())


def test_rows_that_were_deleted_or_added_by_hand_are_found(world: World) -> None:
    world.conn.execute("DELETE FROM events_log WHERE id = 2")
    (finding,) = verify(world).findings
    assert (finding.kind, finding.what) == ("rows", "5 rows were sealed, 4 are in the table")


def test_a_gap_and_a_broken_link_of_the_chain_are_found(world: World) -> None:
    world.conn.execute(
        "UPDATE export_batches SET manifest = replace(manifest, '\"kind\"', '\"Kind\"') WHERE sequence = 1"
    )
    assert {finding.kind for finding in verify(world).findings} == {"altered", "chain"}


def test_a_bucket_that_does_not_answer_is_a_problem_and_no_damage(world: World) -> None:
    world.tables["vault"]["endpoint_url"] = "http://127.0.0.1:1"
    verdict = verify(world)
    assert verdict.findings == ()
    assert len(verdict.problems) == 1
    assert "vault" in verdict.problems[0]


def test_a_bucket_that_has_left_the_configuration_is_a_problem_only_while_it_is_owed_something(world: World) -> None:
    vault = world.tables.pop("vault")
    del world.jobs["acme"]["backup"]
    assert (verify(world).findings, verify(world).problems) == ((), ())
    world.tables["vault"], world.jobs["acme"]["backup"] = {**vault, "bucket": "none-of-this-name"}, "vault"
    store_events(world.db, 1)
    assert world.export().failed
    del world.tables["vault"], world.jobs["acme"]["backup"]
    assert verify(world).problems == ("bucket vault: it is no longer in the configuration, and batches wait for it",)


def test_findings_name_where_and_what(world: World) -> None:
    lose_an_object(world)
    (finding,) = verify(world).findings
    assert isinstance(finding, Finding)
    assert finding.key.startswith("raw/site=")
    assert finding.what == "it belongs to batch acme 2"
