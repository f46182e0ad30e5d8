"""The schema: made on an empty database, left alone on a current one, and never run on a newer one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from catalog import described
from conftest import Appliance

from appliance.errors import SchemaError
from appliance.resources import read_resource
from appliance.store import migrations
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.migrations import SCHEMA_VERSION, current_version, migrate

SPECIFIED = [
    ("id", "bigint", "NO"),
    ("event_id", "uuid", "NO"),
    ("event_type", "character varying(50)", "NO"),
    ("session_id", "character varying(100)", "YES"),
    ("visitor_id", "character varying(100)", "YES"),
    ("site_id", "character varying(100)", "YES"),
    ("timestamp", "timestamp with time zone", "NO"),
    ("url", "text", "YES"),
    ("path", "character varying(500)", "YES"),
    ("user_agent", "text", "YES"),
    ("ip_address", "inet", "YES"),
    ("raw_event_data", "jsonb", "NO"),
    ("created_at", "timestamp with time zone", "YES"),
    ("exported_at", "timestamp with time zone", "YES"),
]


def run(conninfo: str) -> None:
    with psycopg.connect(conninfo) as conn:
        migrate(conn)


def state(conninfo: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return who the installation is and every column there is."""
    columns = (
        "SELECT c.oid, attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute a JOIN pg_class c"
        " ON c.oid = attrelid WHERE relnamespace = 'public'::regnamespace ORDER BY 1, attnum"
    )
    with psycopg.connect(conninfo) as conn:
        return conn.execute("SELECT * FROM installation").fetchall(), conn.execute(columns).fetchall()


def test_an_empty_database_becomes_current(empty: str) -> None:
    with psycopg.connect(empty) as conn:
        assert current_version(conn) is None
        migrate(conn)
        assert current_version(conn) == SCHEMA_VERSION
    assert len(state(empty)[0]) == 1


def test_the_table_of_events_is_as_it_was_specified(conn: psycopg.Connection[Any]) -> None:
    query = (
        "SELECT attname, format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN 'NO' ELSE 'YES' END"
        " FROM pg_attribute WHERE attrelid = 'events_log'::regclass AND attnum > 0 ORDER BY attnum"
    )
    assert conn.execute(query).fetchall() == SPECIFIED
    indexes = conn.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'events_log'").fetchall()
    assert len(indexes) >= 2
    assert not [index for (index,) in indexes if "exported_at" in index]


def test_marking_rows_as_exported_seldom_touches_an_index(conn: psycopg.Connection[Any]) -> None:
    conn.execute(
        "INSERT INTO events_log (event_id, event_type, timestamp, raw_event_data)"
        " SELECT gen_random_uuid(), 'pageview', now(), to_jsonb(repeat('x', 400)) FROM generate_series(1, 500)"
    )
    conn.execute("UPDATE events_log SET exported_at = now()")
    conn.execute("SELECT pg_stat_force_next_flush()")
    query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'events_log'"
    updated, hot = conn.execute(query).fetchone() or (0, 0)
    assert updated == 500
    # A marked row is 8 bytes longer: on a page that is exactly half full the last one finds no room.
    assert hot >= 400


def test_ids_come_from_one_uncached_sequence(conn: psycopg.Connection[Any]) -> None:
    query = "SELECT seqcache, seqincrement, seqtypid::regtype::text FROM pg_sequence WHERE seqrelid = %s::regclass"
    name = conn.execute("SELECT pg_get_serial_sequence('events_log', 'id')").fetchone() or ("",)
    assert conn.execute(query, name).fetchone() == (1, 1, "bigint")


def test_a_second_time_changes_nothing(empty: str) -> None:
    run(empty)
    before = state(empty)
    run(empty)
    assert state(empty) == before


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_two_processes_that_start_at_once_make_one_installation(
    empty: str, postgres: EmbeddedPostgres, isolation: str
) -> None:
    name = psycopg.conninfo.conninfo_to_dict(empty)["dbname"]
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(run, empty) for _ in range(4)]:
            future.result()
    assert len(state(empty)[0]) == 1


def test_a_newer_database_is_refused_and_left_alone(empty: str) -> None:
    run(empty)
    with psycopg.connect(empty) as conn:
        conn.execute("UPDATE installation SET schema_version = schema_version + 1")
    before = state(empty)
    with pytest.raises(SchemaError, match=f"schema {SCHEMA_VERSION + 1}.*run the newer version"):
        run(empty)
    assert state(empty) == before


def test_a_schema_that_fails_half_way_leaves_nothing_behind(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = read_resource("schema.sql")
    monkeypatch.setattr(migrations, "read_resource", lambda _: schema + "; SELECT 1 / 0")
    with pytest.raises(psycopg.errors.DivisionByZero):
        run(empty)
    with psycopg.connect(empty) as conn:
        assert current_version(conn) is None
    monkeypatch.undo()
    run(empty)


SMUGGLED = [
    "DROP TRIGGER count_new_events ON events_log",
    "ALTER TABLE events_log DISABLE TRIGGER count_new_events",
    "ALTER TABLE export_ranges DISABLE TRIGGER ALL",
    "CREATE OR REPLACE FUNCTION count_new_events() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "ALTER FUNCTION count_new_events() SECURITY DEFINER",
    "CREATE FUNCTION one() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "ALTER SEQUENCE events_log_id_seq CACHE 50",
    "ALTER SEQUENCE events_log_id_seq INCREMENT 2",
    "ALTER SEQUENCE quarantine_id_seq CYCLE",
    "CREATE SEQUENCE spare OWNED BY events_log.id",
    "ALTER TABLE events_log ALTER id SET GENERATED BY DEFAULT",
    "ALTER TABLE events_log ALTER raw_event_data SET STORAGE EXTERNAL",
    "ALTER TABLE events_log ALTER raw_event_data SET COMPRESSION pglz",
    "ALTER TABLE events_log ALTER created_at DROP DEFAULT",
    "ALTER TABLE events_log ALTER site_id SET NOT NULL",
    "ALTER TABLE events_log RESET (fillfactor)",
    "ALTER TABLE events_log SET (autovacuum_enabled = false)",
    "ALTER TABLE events_log SET UNLOGGED",
    "ALTER TABLE events_log REPLICA IDENTITY FULL",
    "ALTER TABLE events_log ENABLE ROW LEVEL SECURITY",
    "CREATE POLICY none ON events_log USING (false)",
    "CREATE RULE none AS ON INSERT TO events_log DO INSTEAD NOTHING",
    "CREATE INDEX extra ON events_log (created_at)",
    "CREATE STATISTICS extra ON site_id, event_type FROM events_log",
    "CREATE VIEW extra AS SELECT 1",
    "CREATE TYPE extra AS ENUM ('a')",
    "CREATE SCHEMA extra",
    "GRANT SELECT ON events_log TO PUBLIC",
    "GRANT SELECT (url) ON events_log TO PUBLIC",
    "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC",
    "COMMENT ON TABLE events_log IS 'events'",
    "COMMENT ON COLUMN events_log.url IS 'where'",
    "ALTER TABLE export_runs DROP COLUMN due; ALTER TABLE export_runs ADD COLUMN due TIMESTAMPTZ",
    "ALTER TABLE export_runs RENAME message TO m; ALTER TABLE export_runs ADD message TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE export_objects DROP CONSTRAINT export_objects_pkey",
]


@pytest.mark.parametrize("statement", SMUGGLED)
def test_nothing_that_a_step_could_change_escapes_the_comparison_of_schemas(
    conninfo: str, conn: psycopg.Connection[Any], statement: str
) -> None:
    before = described(conninfo)
    conn.execute(statement.encode())
    assert described(conninfo) != before


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_every_older_schema_becomes_exactly_the_current_one(empty: str, conninfo: str, version: int) -> None:
    schema = (Path(__file__).parent / "schemas" / f"{version:04d}.sql").read_text()
    with psycopg.connect(empty) as conn:
        conn.execute(schema)
        conn.execute("INSERT INTO installation (schema_version) VALUES (%s)", (version,))
    run(empty)
    assert described(empty) == described(conninfo)


def test_an_older_database_takes_each_step_in_order_and_all_or_none(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(empty)
    first, second = SCHEMA_VERSION + 1, SCHEMA_VERSION + 2
    (tmp_path / f"{first:04d}_first.sql").write_text("CREATE TABLE steps (n INTEGER); INSERT INTO steps VALUES (1)")
    broken = tmp_path / f"{second:04d}_second.sql"
    broken.write_text("INSERT INTO steps SELECT n + 1 FROM steps; SELECT 1 / 0")
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", second)
    monkeypatch.setattr(migrations, "_STEPS", tmp_path)
    with pytest.raises(psycopg.errors.DivisionByZero):
        run(empty)
    with psycopg.connect(empty) as conn:
        assert current_version(conn) == SCHEMA_VERSION
    broken.write_text("INSERT INTO steps SELECT n + 1 FROM steps")
    run(empty)
    with psycopg.connect(empty) as conn:
        assert current_version(conn) == second
        assert conn.execute("SELECT n FROM steps ORDER BY n").fetchall() == [(1,), (2,)]


def make_older(conn: psycopg.Connection[Any]) -> None:
    """Undo the last step."""
    conn.execute("ALTER TABLE installation DROP COLUMN moved_at")
    conn.execute("UPDATE installation SET schema_version = schema_version - 1")


OLDER = (
    f"appliance: the database has schema {SCHEMA_VERSION - 1}, this version of the appliance knows {SCHEMA_VERSION}: "
    "start the appliance of this version first, which brings it up to date, or use the version that runs on it\n"
)
COMMANDS = [["status"], ["export"], ["verify"], ["restore", "local"], ["backup", "all.dump"]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_leaves_the_older_schema_of_an_appliance_that_may_run_alone(
    appliance: Callable[..., Appliance], conninfo: str, conn: psycopg.Connection[Any], words: list[str]
) -> None:
    make_older(conn)
    before = described(conninfo)
    done = appliance(database={"url": conninfo}).run(*words, check=False)
    assert (done.returncode, done.stderr) == (1, OLDER)
    assert described(conninfo) == before
    assert current_version(conn) == SCHEMA_VERSION - 1


def test_serve_brings_an_older_schema_up_to_date_and_then_commands_work(
    appliance: Callable[..., Appliance], conninfo: str, conn: psycopg.Connection[Any]
) -> None:
    make_older(conn)
    box = appliance(database={"url": conninfo}).start()
    assert current_version(conn) == SCHEMA_VERSION
    box.run("status")


def test_a_command_brings_an_embedded_database_up_to_date_only_while_no_appliance_runs(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance().start()
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        make_older(conn)
    assert box.run("status", check=False).stderr == OLDER
    assert box.stop() == 0
    box.run("status")
    assert box.start().run("status").returncode == 0
