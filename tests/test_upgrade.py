"""Today's appliance takes over what the first version left behind, whatever happens to it while it does.

`upgrades/first` was written by the first version's own code: its database (as schemas/0001.sql has it) with a batch
that both buckets have, one that only one bucket has, and events that nobody has sealed; its buckets; and a spool. It is
never made again.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from catalog import described
from conftest import Appliance, http, wait_for
from exporting import chain, exported_ids

from appliance.store.migrations import SCHEMA_VERSION, current_version

HERE = Path(__file__).parent
FIRST = HERE / "upgrades" / "first"
SPOOLED = {str(UUID(int=number)) for number in (1, 2, 3)}
STORED = 15
# A step far behind the first alters it: who holds it keeps a migration waiting there.
HELD_TABLE = "export_deliveries"


@pytest.fixture
def old(empty: str) -> str:
    """The first version's database."""
    with psycopg.connect(empty) as conn:
        conn.execute((HERE / "schemas" / "0001.sql").read_text())
        conn.execute((FIRST / "database.sql").read_text())
    return empty


@pytest.fixture
def box(appliance: Callable[..., Appliance], old: str, tmp_path: Path) -> Appliance:
    """Today's appliance on the first version's database, buckets and spool; not started."""
    buckets = {}
    for name in ("client", "vault"):
        shutil.copytree(FIRST / name, tmp_path / name)
        buckets[name] = {"kind": "directory", "path": str(tmp_path / name), "prefix": "raw"}
    job = {"sites": ["*"], "client": "client", "backup": "vault", "schedule": "0 0 1 1 *"}
    made = appliance(database={"url": old}, buckets=buckets, exports={"acme": job})
    shutil.copytree(FIRST / "spool", made.data_dir / "spool")
    return made


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def rows(url: str) -> Counter[str]:
    with psycopg.connect(url) as conn:
        return Counter(str(row[0]) for row in conn.execute("SELECT event_id FROM events_log"))


def send(box: Appliance, number: int) -> int:
    body = json.dumps([{"eventType": "click", "siteId": "shop", "n": n} for n in range(number)]).encode()
    return http(box, "POST", "/collect", body, {"Content-Type": "application/json"}).status


@contextmanager
def migration_held(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Keep a migration waiting in the middle, with steps that it has done and not committed."""
    with psycopg.connect(url) as conn:
        conn.execute(f"LOCK TABLE {HELD_TABLE} IN ACCESS SHARE MODE")
        yield conn


def waiting(conn: psycopg.Connection[Any], kind: str) -> bool:
    """Return whether somebody waits for a lock of this kind in this database."""
    query = (
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = %s"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return conn.execute(query, (kind,)).fetchone() != (0,)


def test_what_the_first_version_left_half_done_is_ended_with_the_same_bytes_and_nothing_is_lost_or_doubled(
    box: Appliance, old: str, tmp_path: Path
) -> None:
    before = rows(old)
    assert before.total() == STORED
    assert len(contents(FIRST / "client")) > len(contents(FIRST / "vault")) > 0
    box.start()
    assert send(box, 3) in {200, 202}
    box.wait_ready()
    assert json.loads(box.run("export", "--json").stdout)[0]["problems"] == []
    client, vault = contents(tmp_path / "client"), contents(tmp_path / "vault")
    assert client == vault
    assert client.items() >= contents(FIRST / "client").items()
    stored = rows(old)
    assert set(stored.values()) == {1}
    assert stored.keys() >= before.keys() | SPOOLED
    assert stored.total() == STORED + len(SPOOLED) + 3
    assert exported_ids(client) == stored
    assert [manifest["sequence"] for manifest in chain(client)] == [1, 2, 3]
    assert {manifest["installation"] for manifest in chain(client)} == {installation(old)}
    assert json.loads(box.run("verify", "--json").stdout)[0]["findings"] == []
    assert box.stop() == 0


def installation(url: str) -> str:
    with psycopg.connect(url) as conn:
        ((one,),) = conn.execute("SELECT id FROM installation").fetchall()
        return str(one)


def test_a_migration_that_is_killed_in_the_middle_leaves_nothing_behind_and_the_next_start_makes_it(
    box: Appliance, old: str, conninfo: str
) -> None:
    with migration_held(old) as conn:
        box.launch()
        wait_for(lambda: waiting(conn, "relation"), "the migration to come to the table")
        # Nobody has to wait for it.
        wait_for(box.reached, "the web server")
        assert send(box, 2) == 202
        box.kill()
        wait_for(lambda: not box.reached(), "the web server to be gone")
    with psycopg.connect(old, autocommit=True) as conn:
        alone = "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()"
        wait_for(lambda: conn.execute(alone).fetchone() == (True,), "its transaction to end")
        assert current_version(conn) == 1
        assert conn.execute("SELECT to_regclass('quarantine')").fetchone() == (None,)
    box.start()
    assert described(old) == described(conninfo)
    assert rows(old).total() == STORED + len(SPOOLED) + 2


def test_two_appliances_that_start_at_once_on_an_old_database_migrate_it_once(
    box: Appliance, old: str, conninfo: str, appliance: Callable[..., Appliance]
) -> None:
    both = [box, appliance(**box.config)]
    before = installation(old)
    with migration_held(old) as conn:
        for one in both:
            one.launch()
        wait_for(lambda: waiting(conn, "relation"), "one to migrate")
        wait_for(lambda: waiting(conn, "advisory"), "the other to wait for it")
    for one in both:
        one.wait_ready()
        assert "could not be prepared" not in one.log
        # On a machine that is busy enough it goes to the spool first.
        assert send(one, 1) in {200, 202}
        one.wait_ready()
    assert described(old) == described(conninfo)
    assert installation(old) == before
    with psycopg.connect(old) as conn:
        assert current_version(conn) == SCHEMA_VERSION
    assert rows(old).total() == STORED + len(SPOOLED) + 2
