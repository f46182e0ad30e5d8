"""A primary that dies under load, and the standby that takes its place."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from conftest import Appliance, wait_for
from crowd import Crowd
from servers import PASSWORD, Server, contents, exporting_to, ids_in, new_ids, post, server_of

pytestmark = pytest.mark.servers

ENOUGH = 200
ADVICE = "name the primary in database.url"


@dataclass(frozen=True)
class Pair:
    """A primary, and a standby without which it commits nothing."""

    primary: Server
    standby: Server
    database: str

    @property
    def url(self) -> str:
        """Both of them; the one that takes writes counts."""
        hosts = f"{self.primary.address},{self.standby.address}"
        return f"postgresql://appliance:{PASSWORD}@{hosts}/{self.database}?target_session_attrs=read-write"

    def follows_synchronously(self) -> bool:
        return self.primary.ask("SELECT sync_state FROM pg_stat_replication") == [("sync",)]


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        primary = stack.enter_context(server_of("15", tmp_path_factory.mktemp("pg"))).create().start()
        standby = stack.enter_context(server_of("15", tmp_path_factory.mktemp("pg")))
        database = primary.new_database()
        source = f"host={primary.directory} port={primary.port} user=admin"
        standby.run("pg_basebackup", "-d", source, "-D", str(standby.data), "-R", "--checkpoint=fast", "--no-sync")
        standby.start()
        # Only now, so that the copy has no such setting: promoted, it has nobody to wait for.
        primary.ask("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.ask("SELECT pg_reload_conf()")
        one = Pair(primary, standby, database)
        wait_for(one.follows_synchronously, "the standby to follow")
        yield one


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Crowd]:
    (tmp_path / "load").mkdir()
    one = Crowd(tmp_path / "load")
    yield one
    for process in one.processes:
        process.kill()


def test_when_the_primary_is_killed_under_load_nothing_acknowledged_is_lost_and_exports_go_on(
    appliance: Callable[..., Appliance], pair: Pair, load: Crowd, tmp_path: Path
) -> None:
    bucket = tmp_path / "bucket"
    box = appliance(**exporting_to(bucket, pair.url)).start()
    load.start(box.url)
    wait_for(lambda: load.statuses()["200"] > ENOUGH, "events")
    box.run("export")
    wait_for(lambda: load.statuses()["200"] > 2 * ENOUGH, "more events")
    began = time.monotonic()
    pair.primary.kill()
    wait_for(lambda: load.statuses()["202"] > ENOUGH, "events in the spool")
    assert pair.standby.ask("SELECT pg_promote()") == [(True,)]
    stored = load.statuses()["200"]
    wait_for(lambda: load.statuses()["200"] > stored + ENOUGH, "events in the new primary")
    print(f"stored again {time.monotonic() - began:.1f} s after the kill")  # noqa: T201
    load.stop()
    wait_for(box.ready, "the spool to be drained")
    acknowledged = load.acknowledged()
    with psycopg.connect(pair.url) as conn:
        found = Counter(str(row[0]) for row in conn.execute("SELECT event_id FROM events_log"))
    print(f"{len(acknowledged)} acknowledged, {len(found)} stored, {load.statuses()}")  # noqa: T201
    assert (acknowledged - found.keys(), max(found.values())) == (set(), 1)
    assert load.statuses().keys() == {"200", "202"}
    box.run("export")
    assert ids_in(bucket) == found
    assert box.run("verify").stdout.endswith("0 found wrong\n")
    assert len([key for key in contents(bucket) if "_manifests/" in key]) > 1


@pytest.mark.parametrize("options", ["", "?target_session_attrs=read-write"])
def test_with_a_standby_alone_commands_say_what_to_do_and_events_wait_until_it_is_promoted(
    appliance: Callable[..., Appliance], pair: Pair, tmp_path: Path, options: str
) -> None:
    bucket, ids = tmp_path / "bucket", new_ids(3)
    appliance(**exporting_to(bucket, pair.url)).start().stop()
    url = pair.standby.url(pair.database, options)
    box = appliance(**exporting_to(bucket, url))
    done = box.run("export", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert ADVICE in done.stderr
    box.start(until=lambda one: ADVICE in one.log)
    assert post(box, ids)[0] == 202
    assert "Traceback" not in box.log
    pair.standby.ask("SELECT pg_promote()")
    wait_for(box.ready, "the spool to be drained")
    with psycopg.connect(url) as conn:
        assert {str(row[0]) for row in conn.execute("SELECT event_id FROM events_log")} == set(ids)
