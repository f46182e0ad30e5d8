"""docs/reading.md with Spark, on this machine alone. It also plays Athena, whose tables are Hive's."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from reading_page import ROW, Tree, double_an_object, exported_tree, forget_a_manifest, ordered, statements

from appliance.store.database import Database

pytestmark = pytest.mark.spark

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
COUNTS = "SELECT site, date, hour, count(*) FROM events GROUP BY ALL"


@pytest.fixture(scope="session")
def spark_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Spark for the whole run; its metastore is in memory."""
    # Not installed where the other tests run.
    from pyspark.sql import SparkSession  # noqa: PLC0415

    home = tmp_path_factory.mktemp("spark")
    options = {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.extraJavaOptions": f"-Dderby.system.home={home}",
        "spark.hadoop.javax.jdo.option.ConnectionURL": "jdbc:derby:memory:metastore;create=true",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": "1",
        "spark.sql.warehouse.dir": str(home / "warehouse"),
        "spark.ui.enabled": "false",
    }
    server = SparkSession.builder.master("local[1]").config(map=options).enableHiveSupport().getOrCreate()
    yield server
    server.stop()


@pytest.fixture
def spark(spark_server: Any) -> Any:
    """A session with views of its own."""
    return spark_server.newSession()


@pytest.fixture
def tree(db: Database, conn: psycopg.Connection[Any], tmp_path: Path) -> Tree:
    return exported_tree(db, conn, tmp_path, "parquet")


def run(spark: Any, tree: Tree) -> None:
    for statement in statements("Spark", tree.root):
        spark.sql(statement)


def rows_of(spark: Any, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in spark.sql(query).collect()]


def types_of(spark: Any, table: str) -> dict[str, str]:
    return dict(spark.table(table).dtypes)


def test_the_page_counts_what_postgresql_counts(spark: Any, tree: Tree) -> None:
    run(spark, tree)
    assert ordered(rows_of(spark, COUNTS)) == tree.counts()


def test_the_page_brings_every_value_back_exactly(spark: Any, tree: Tree) -> None:
    run(spark, tree)
    columns = ROW.replace("timestamp", "unix_micros(timestamp)").replace("created_at", "unix_micros(created_at)")
    expected = [
        tuple((value - EPOCH) // timedelta(microseconds=1) if isinstance(value, datetime) else value for value in row)
        for row in tree.rows()
    ]
    assert rows_of(spark, f"SELECT {columns} FROM events ORDER BY id") == expected  # noqa: S608 - our own names
    number = "SELECT get_json_object(raw_event_data, '$.n') FROM events WHERE raw_event_data LIKE '%n%'"
    assert rows_of(spark, number) == [(str(2**53 + 1),)]


def test_the_files_have_the_types_that_the_page_says(spark: Any, tree: Tree) -> None:
    run(spark, tree)
    by_page = types_of(spark, "events")
    # The files themselves, without a word about types; what is in the path is guessed.
    by_file = dict(spark.read.parquet(str(tree.root)).dtypes)
    in_file = [name for name in by_page if name not in {"site", "date", "hour"}]
    assert {name: by_page[name] for name in in_file} == {name: by_file[name] for name in in_file}
    assert (by_page["id"], by_page["timestamp"], by_page["created_at"]) == ("bigint", "timestamp", "timestamp")
    assert (by_page["site"], by_page["date"], by_page["hour"]) == ("string", "date", "int")


def test_objects_without_a_manifest_are_left_out_of_complete_events(spark: Any, tree: Tree) -> None:
    complete = forget_a_manifest(tree)
    run(spark, tree)
    assert spark.table("complete_events").count() == complete
    assert spark.table("events").count() == len(tree.rows())


def test_an_event_that_stands_twice_is_read_once(spark: Any, tree: Tree) -> None:
    double_an_object(tree)
    run(spark, tree)
    assert spark.table("events").count() > len(tree.rows())
    assert sorted(rows_of(spark, "SELECT id FROM events_once")) == [(row[0],) for row in tree.rows()]


def test_athenas_table_counts_what_postgresql_counts(spark: Any, tree: Tree) -> None:
    """Where Athena works partitions out, Hive looks for them."""
    events, manifests, _question = statements("Athena", tree.root)
    spark.sql(events)
    spark.sql(manifests)
    spark.sql("MSCK REPAIR TABLE events")
    counted = rows_of(spark, "SELECT site, CAST(date AS date), hour, count(*) FROM events GROUP BY ALL")
    assert ordered(counted) == tree.counts()
    assert rows_of(spark, "SELECT raw_event_data FROM events ORDER BY id") == [(row[-2],) for row in tree.rows()]
    keys = 'SELECT DISTINCT regexp_extract(line, \'"key": "(.*)"\', 1) FROM manifests WHERE line LIKE \'%"key": %\''
    found = {tree.root / key for (key,) in rows_of(spark, keys)}
    assert found == set(tree.root.glob("site=*/**/*.parquet"))
