"""docs/reading.md with DuckDB: the SQL of the page reads what PostgreSQL holds."""

import json
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest
from reading_page import RAW, ROW, Tree, double_an_object, exported_tree, forget_a_manifest, in_utc, ordered, statements

from appliance.store.database import Database

HEADINGS = {"parquet": "DuckDB", "jsonl": "JSON lines", "csv": "CSV"}
TYPES = {
    "id": "BIGINT",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
    "created_at": "TIMESTAMP WITH TIME ZONE",
    "site": "VARCHAR",
    "date": "DATE",
    "hour": "TINYINT",
}


@pytest.fixture
def duck() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def with_raw_events_as_values(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(*row[:RAW], json.loads(row[RAW]), *row[RAW + 1 :]) for row in rows]


def run(duck: duckdb.DuckDBPyConnection, heading: str, tree: Tree) -> None:
    for statement in statements(heading, tree.root):
        duck.execute(statement)


def count(duck: duckdb.DuckDBPyConnection, table: str) -> int:
    return len(duck.execute(f"SELECT id FROM {table}").fetchall())  # noqa: S608 - our own names


@pytest.mark.parametrize("format_", HEADINGS)
def test_the_page_counts_what_postgresql_counts(
    db: Database, conn: psycopg.Connection[Any], tmp_path: Path, duck: duckdb.DuckDBPyConnection, format_: str
) -> None:
    tree = exported_tree(db, conn, tmp_path, format_)
    run(duck, HEADINGS[format_], tree)
    counted = duck.execute("SELECT site, date, hour, count(*) FROM events GROUP BY ALL").fetchall()
    assert ordered(counted) == tree.counts()


@pytest.mark.parametrize("format_", HEADINGS)
def test_the_page_brings_every_value_back_exactly(
    db: Database, conn: psycopg.Connection[Any], tmp_path: Path, duck: duckdb.DuckDBPyConnection, format_: str
) -> None:
    tree = exported_tree(db, conn, tmp_path, format_)
    run(duck, HEADINGS[format_], tree)
    # By Arrow, because DuckDB's own way to moments in Python needs one more package.
    table = duck.sql(f"SELECT {ROW} FROM events ORDER BY id").to_arrow_table()  # noqa: S608 - our own names
    rows = [tuple(in_utc(value) for value in row.values()) for row in table.to_pylist()]
    # Of JSON lines DuckDB makes the text of the raw event anew.
    compare = with_raw_events_as_values if format_ == "jsonl" else list
    assert compare(rows) == compare(tree.rows())
    assert json.loads(rows[-2][RAW])["n"] == 2**53 + 1


@pytest.mark.parametrize("format_", HEADINGS)
def test_the_page_says_what_type_a_column_has(
    db: Database, conn: psycopg.Connection[Any], tmp_path: Path, duck: duckdb.DuckDBPyConnection, format_: str
) -> None:
    run(duck, HEADINGS[format_], exported_tree(db, conn, tmp_path, format_))
    described = {name: kind for name, kind, *_ in duck.execute("DESCRIBE events").fetchall()}
    assert {name: described[name] for name in TYPES} == TYPES


def test_objects_without_a_manifest_are_left_out_of_complete_events(
    db: Database, conn: psycopg.Connection[Any], tmp_path: Path, duck: duckdb.DuckDBPyConnection
) -> None:
    tree = exported_tree(db, conn, tmp_path, "parquet")
    complete = forget_a_manifest(tree)
    run(duck, "DuckDB", tree)
    assert (count(duck, "complete_events"), count(duck, "events")) == (complete, len(tree.rows()))


def test_an_event_that_stands_twice_is_read_once(
    db: Database, conn: psycopg.Connection[Any], tmp_path: Path, duck: duckdb.DuckDBPyConnection
) -> None:
    tree = exported_tree(db, conn, tmp_path, "parquet")
    double_an_object(tree)
    run(duck, "DuckDB", tree)
    assert count(duck, "events") > len(tree.rows())
    assert sorted(duck.execute("SELECT id FROM events_once").fetchall()) == [(row[0],) for row in tree.rows()]


@pytest.fixture
def hive(db: Database, conn: psycopg.Connection[Any], tmp_path: Path, duck: duckdb.DuckDBPyConnection) -> Tree:
    """The two tables of Athena and Trino as DuckDB sees them; of theirs, "$path" is a column that `*` leaves out."""
    tree = exported_tree(db, conn, tmp_path, "parquet")
    place = tree.root / "_manifests" / "acme"
    duck.execute(f"""CREATE VIEW events AS SELECT *, filename AS "$path"
        FROM read_parquet('{tree.root}/site=*/date=*/hour=*/*.parquet', hive_partitioning = true, filename = true)""")  # noqa: S608 - our own names
    duck.execute(f"""CREATE VIEW manifests AS SELECT * FROM read_csv('{place}/*.json',
        columns = {{line: 'VARCHAR'}}, delim = chr(1), quote = '', escape = '', header = false)""")  # noqa: S608 - as above
    return tree


def test_the_views_of_athena_and_trino_leave_out_objects_without_a_manifest(
    hive: Tree, duck: duckdb.DuckDBPyConnection
) -> None:
    complete = forget_a_manifest(hive)
    run(duck, "Views for Athena and Trino", hive)
    assert (count(duck, "complete_events"), count(duck, "events")) == (complete, len(hive.rows()))


def test_the_views_of_athena_and_trino_read_an_event_that_stands_twice_once(
    hive: Tree, duck: duckdb.DuckDBPyConnection
) -> None:
    double_an_object(hive)
    run(duck, "Views for Athena and Trino", hive)
    assert count(duck, "events") > len(hive.rows())
    assert sorted(duck.execute("SELECT id FROM events_once").fetchall()) == [(row[0],) for row in hive.rows()]
