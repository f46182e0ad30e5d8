"""A PostgreSQL of the user's own, of each version that is supported, for a role that is no superuser."""

import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import tomli_w
from conftest import Appliance, http, make_settings, wait_for
from exporting import chain
from psycopg import sql
from servers import Server, contents, exporting_to, ids_in, new_ids, post

from appliance.store.attach import conninfo_of
from appliance.store.database import Database, fetch_value
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.moving import TABLES

pytestmark = pytest.mark.servers


def test_everything_works_for_a_role_that_owns_its_database_and_nothing_else(
    appliance: Callable[..., Appliance], server: Server, tmp_path: Path
) -> None:
    url, ids, bucket = server.url(server.new_database()), new_ids(5), tmp_path / "bucket"
    box = appliance(**exporting_to(bucket, url)).start()
    assert post(box, ids)[1]["accepted"] == 5
    assert post(box, ids)[1]["duplicates"] == 5
    (report,) = json.loads(box.run("export", "--json").stdout)
    assert (report["row_count"], report["failed"]) == (5, False)
    assert box.run("verify").stdout.endswith("0 found wrong\n")
    assert json.loads(box.run("status", "--json").stdout)["events"] == 5
    assert ids_in(bucket) == Counter(ids)
    assert not (box.data_dir / "postgres").exists()
    with psycopg.connect(url) as conn:
        assert str(conn.info.server_version // 10000) == server.version
        assert conn.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (False,)
    assert box.stop() == 0


@pytest.mark.parametrize(("options", "silent_seconds"), [("", 30 + 3 * 10), ("?keepalives_idle=7", 7 + 3 * 10)])
def test_a_server_whose_machine_is_gone_is_given_up_after_a_minute_unless_the_url_says_otherwise(
    server: Server, options: str, silent_seconds: int
) -> None:
    settings = make_settings(database={"url": server.url(server.new_database(), options)})
    with (
        Database(conninfo_of(settings)) as db,
        db.connection() as conn,
        socket.socket(fileno=os.dup(conn.fileno())) as s,
    ):
        idle, interval, count, unanswered_ms = (
            s.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        )
    assert (idle + interval * count, unanswered_ms) == (silent_seconds, 60_000)


def test_a_server_gives_up_an_appliance_whose_machine_is_gone_after_a_minute(server: Server) -> None:
    """What it has begun holds up the sealing of every other appliance until then."""
    names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
    with Database(server.url(server.new_database())) as db, db.connection() as conn:
        idle, interval, count, unanswered_ms = (int(fetch_value(conn, f"SELECT current_setting('{n}')")) for n in names)
    assert (idle + interval * count, unanswered_ms) == (60, 60_000)


def everything(conninfo: str) -> dict[str, Any]:
    """Return every table there is, and where the ids stand."""
    with psycopg.connect(conninfo) as conn:
        conn.execute("SET timezone = 'UTC'")
        conn.execute("SET datestyle = 'ISO, MDY'")
        tables = conn.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
        names = [name for (name,) in tables.fetchall()]
        query = "SELECT t::text FROM {} t ORDER BY 1"
        found = {name: conn.execute(sql.SQL(query).format(sql.Identifier(name))).fetchall() for name in names}
        return {**found, "ids": conn.execute("SELECT last_value FROM pg_sequences ORDER BY sequencename").fetchall()}


def moved_to(box: Appliance, **changes: Any) -> Path:
    """Write the new configuration and return its file."""
    new = box.directory / "new.toml"
    config = {**box.config, "server": {"data_dir": str(box.data_dir)}, **changes}
    new.write_text(tomli_w.dumps(config))
    return new


@pytest.mark.parametrize("server", ["15", "18"], indirect=True)
def test_after_a_move_from_the_embedded_database_exports_go_on_with_the_next_number(
    appliance: Callable[..., Appliance], server: Server, tmp_path: Path
) -> None:
    url, ids, bucket = server.url(server.new_database()), new_ids(9), tmp_path / "bucket"
    box = appliance(**exporting_to(bucket, "")).start()
    post(box, ids[:5])
    box.run("export")
    post(box, ids[5:8])
    before = everything(EmbeddedPostgres(box.data_dir).conninfo)
    new = moved_to(box, database={"url": url})
    while_it_runs = box.run("move", str(new), check=False)
    assert (while_it_runs.returncode, "stop it first" in while_it_runs.stderr) == (1, True)
    box.stop()
    box.run("move", str(new))
    assert everything(url) == before
    for command in (["move", str(new)], ["status"], ["export"]):
        again = box.run(*command, check=False)
        assert (again.returncode, "all of this database was moved to another one" in again.stderr) == (1, True)
    box.config["database"]["url"] = url
    box.start()
    post(box, ids[8:])
    assert box.run("export").stdout == "acme: 4 events in 1 batch delivered\n"
    assert [manifest["sequence"] for manifest in chain(contents(bucket), prefix="")] == [1, 2]
    assert ids_in(bucket) == Counter(ids)
    assert box.run("verify").stdout.endswith("0 found wrong\n")


@pytest.mark.parametrize("server", ["18"], indirect=True)
def test_a_move_leaves_no_table_behind(server: Server, appliance: Callable[..., Appliance], tmp_path: Path) -> None:
    url = server.url(server.new_database())
    assert appliance(**exporting_to(tmp_path / "bucket", url)).start().stop() == 0
    assert everything(url).keys() - {"ids"} == set(TABLES)


@pytest.mark.parametrize("server", ["15"], indirect=True)
def test_a_backup_of_the_embedded_database_can_be_put_into_one_of_an_older_version(
    appliance: Callable[..., Appliance], server: Server, tmp_path: Path
) -> None:
    url, ids, bucket = server.url(server.new_database()), new_ids(4), tmp_path / "bucket"
    box = appliance(**exporting_to(bucket, "")).start()
    post(box, ids)
    before = everything(EmbeddedPostgres(box.data_dir).conninfo)
    box.run("backup", str(tmp_path / "all.dump"))
    box.stop()
    box.config["database"]["url"] = url
    box.run("restore-backup", str(tmp_path / "all.dump"))
    assert everything(url) == before
    assert box.run("export").stdout == "acme: 4 events in 1 batch delivered\n"


@pytest.mark.parametrize("server", ["18"], indirect=True)
def test_a_move_back_to_the_embedded_database_is_the_same_command(
    appliance: Callable[..., Appliance], server: Server, tmp_path: Path
) -> None:
    url, ids = server.url(server.new_database()), new_ids(3)
    box = appliance(**exporting_to(tmp_path / "bucket", url)).start()
    post(box, ids)
    box.stop()
    before = everything(url)
    box.run("move", str(moved_to(box, database={"url": ""})))
    # By mistake with the old configuration: events wait for the right one.
    box.begin()
    post(box, new_ids(1))
    wait_for(lambda: "all of this database was moved" in str(http(box, "GET", "/health/ready").json), "the note")
    assert box.stop() == 0
    box.config["database"]["url"] = ""
    assert json.loads(box.run("status", "--json").stdout)["events"] == 3
    box.start()
    after = everything(EmbeddedPostgres(box.data_dir).conninfo)["events_log"]
    assert len(after) == 4
    assert set(before["events_log"]) < set(after)


@pytest.mark.parametrize(("changes", "why"), [({}, "database.url"), ({"server": {}}, "server.data_dir")])
def test_a_move_to_the_same_database_or_another_directory_is_refused(
    appliance: Callable[..., Appliance], tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    box = appliance(**exporting_to(tmp_path / "bucket", "postgresql://127.0.0.1:1/none"))
    done = box.run("move", str(moved_to(box, **changes)), check=False)
    assert (done.returncode, why in done.stderr) == (2, True)
