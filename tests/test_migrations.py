"""The schema: made on an empty database, left alone on a current one, and never run on a newer one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

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


@pytest.fixture
def empty(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A database with nothing in it."""
    name = f"empty_{uuid4().hex}"
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        yield psycopg.conninfo.make_conninfo(postgres.conninfo, dbname=name)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


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


def described(conninfo: str) -> list[tuple[Any, ...]]:
    """Return every column, constraint and index, as PostgreSQL describes them."""
    query = """
        SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull::text, attidentity::text,
            pg_get_expr(adbin, adrelid)
        FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid LEFT JOIN pg_attrdef ON adrelid = attrelid
            AND adnum = attnum
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0
        UNION ALL SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '', '' FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT tablename, indexname, indexdef, '', '', '' FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT relname, array_to_string(reloptions, ','), '', '', '', '' FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
        ORDER BY 1, 2, 3
    """
    with psycopg.connect(conninfo) as conn:
        return conn.execute(query).fetchall()


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
