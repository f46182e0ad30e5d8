"""Parquet and CSV: what stands in a row comes back from each format exactly, through readers of other people."""

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import store_events
from test_formats import NOON, put_by_hand, sealed_batch, sliced, write

from appliance.store.database import Database
from appliance.store.events import EXPORTED_COLUMNS
from appliance.store.reading import rows_of

Conn = psycopg.Connection[Any]
Row = tuple[Any, ...]


def export(conninfo: str, rows: int, directory: Path, format_: str, **options: Any) -> list[bytes]:
    compression = {"parquet": "zstd", "csv": "gzip", "jsonl": "gzip"}[format_]
    batch = sealed_batch(rows, format_, compression, **options)
    with rows_of(conninfo, batch) as batches:
        return [content for _, content in write(batches, batch, directory)]


def stored(conn: Conn) -> list[Row]:
    """Return every row as the exported columns, of which inet and jsonb become text."""
    query = """SELECT id, event_id::text, event_type, session_id, visitor_id, site_id, timestamp, url, path, user_agent,
        abbrev(ip_address), raw_event_data::text, created_at FROM events_log ORDER BY id"""
    return [tuple(_utc(value) for value in row) for row in conn.execute(query)]


def _utc(value: Any) -> Any:
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def from_parquet(_conn: Conn, contents: list[bytes]) -> list[Row]:
    tables = [pq.read_table(pa.BufferReader(content)) for content in contents]
    return [tuple(_utc(row[column]) for column in EXPORTED_COLUMNS) for table in tables for row in table.to_pylist()]


def from_csv(conn: Conn, contents: list[bytes]) -> list[Row]:
    """Let PostgreSQL read it back into a table of the same shape."""
    conn.execute("CREATE TEMPORARY TABLE back (LIKE events_log)")
    columns = ", ".join(EXPORTED_COLUMNS)
    for content in contents:
        with conn.cursor().copy(f"COPY back ({columns}) FROM STDIN (FORMAT csv, HEADER match)") as copy:
            copy.write(gzip.decompress(content))
    rows = conn.execute("SELECT * FROM back ORDER BY id").fetchall()
    return [
        tuple(
            json.dumps(value)
            if column == "raw_event_data"
            else str(value)
            if column in AS_TEXT and value
            else _utc(value)
            for column, value in zip(EXPORTED_COLUMNS, row[:-1], strict=True)
        )
        for row in rows
    ]


AS_TEXT = {"event_id", "ip_address"}


def from_jsonl(_conn: Conn, contents: list[bytes]) -> list[Row]:
    lines = [json.loads(line) for content in contents for line in gzip.decompress(content).splitlines()]
    return [
        tuple(
            json.dumps(line[column])
            if column == "raw_event_data"
            else datetime.fromisoformat(line[column])
            if column in {"timestamp", "created_at"}
            else line[column]
            for column in EXPORTED_COLUMNS
        )
        for line in lines
    ]


READERS: dict[str, Callable[[Conn, list[bytes]], list[Row]]] = {
    "parquet": from_parquet,
    "csv": from_csv,
    "jsonl": from_jsonl,
}


def comparable(rows: list[Row]) -> list[Row]:
    """Raw data compares as a value: its text has other spaces and escapes in each format."""
    place = EXPORTED_COLUMNS.index("raw_event_data")
    return sorted((*row[:place], json.loads(row[place]), *row[place + 1 :]) for row in rows)


VALUES: dict[str, dict[str, Any]] = {
    "NULL everywhere": {"url": None, "path": None, "session_id": None, "user_agent": None, "ip_address": None},
    "empty texts": {"url": "", "path": "", "session_id": "", "user_agent": ""},
    "quotes and commas": {"url": 'say "hello", "" and \'\'', "path": ',,","'},
    "backslashes": {"url": "C:\\new\\table \\N \\. \\u0000", "path": "\\"},
    "line ends": {"user_agent": "a\nb\r\nc\td\x1f\x7f\u2028\u0085", "path": "\r\n"},
    "emoji": {"path": "/\N{PILE OF POO}/é/\U0010ffff"},
    "formulas": {"url": "=1+1", "path": "@SUM(A1)", "user_agent": "-2+3"},
    "no site": {"site_id": None},
    "IPv6": {"ip_address": "2001:db8::1"},
    "a network": {"ip_address": "192.0.2.0/24"},
    "2^53 + 1": {"raw_event_data": '{"n": 9007199254740993, "t": "\\" \\\\ \\n \N{PILE OF POO}"}'},
    "a scalar": {"raw_event_data": '"just text"'},
    "microseconds": {"timestamp": "2026-03-04 23:59:59.999999+00", "created_at": "1999-12-31 00:00:00.000001+00"},
    "NULL as text": {"url": "NULL", "path": "\\N", "session_id": "null"},
}


@pytest.mark.parametrize("format_", READERS)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_row_comes_back_from_every_format_exactly(
    conn: Conn, conninfo: str, tmp_path: Path, format_: str, values: dict[str, Any]
) -> None:
    put_by_hand(conn)
    put_by_hand(conn, **values)
    contents = export(conninfo, 2, tmp_path, format_)
    assert comparable(READERS[format_](conn, contents)) == comparable(stored(conn))


def test_parquet_has_real_types(conn: Conn, conninfo: str, tmp_path: Path) -> None:
    put_by_hand(conn)
    (content,) = export(conninfo, 1, tmp_path, "parquet")
    schema = pq.read_schema(pa.BufferReader(content))
    moments = {name: pa.timestamp("us", tz="UTC") for name in ("timestamp", "created_at")}
    expected = {name: pa.string() for name in EXPORTED_COLUMNS} | {"id": pa.int64()} | moments
    assert dict(zip(schema.names, schema.types, strict=True)) == expected


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0044-03-15 BC", "294276-12-31"])
def test_a_time_that_parquet_cannot_hold_becomes_null_and_stops_nothing(
    conn: Conn, conninfo: str, tmp_path: Path, moment: str
) -> None:
    put_by_hand(conn)
    put_by_hand(conn, timestamp=moment, created_at=moment)
    rows = from_parquet(conn, export(conninfo, 2, tmp_path, "parquet"))
    place = EXPORTED_COLUMNS.index("timestamp")
    assert sorted(str(row[place]) for row in rows) == [str(NOON), "None"]


def test_the_pieces_in_which_rows_come_do_not_matter_to_parquet(
    db: Database, conninfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.export.formats._GROUP_ROWS", 70)
    monkeypatch.setattr("appliance.export.formats._GROUP_BYTES", 9_000)
    for site in ("shop", "blog"):
        store_events(db, 300, site_id=site)
    batch = sealed_batch(600, "parquet", "zstd")
    with rows_of(conninfo, batch) as batches:
        (whole,) = list(batches)
    for cut in (batch, replace(batch, object_rows=111), replace(batch, object_bytes=20_000)):
        expected = write([whole], cut, tmp_path)
        assert sum(record.row_count for record, _ in expected) == 600
        assert max(pq.ParquetFile(pa.BufferReader(content)).num_row_groups for _, content in expected) > 1
        for size in (1, 7, 100, 599):
            assert write(sliced(whole, size), cut, tmp_path) == expected


@pytest.mark.parametrize("format_", READERS)
def test_the_same_batch_read_again_is_the_same_file(
    db: Database, conn: Conn, conninfo: str, tmp_path: Path, format_: str
) -> None:
    store_events(db, 200)
    first = export(conninfo, 200, tmp_path, format_)
    # Settled rows have moved within the table.
    conn.execute("UPDATE events_log SET exported_at = now()")
    assert export(conninfo, 200, tmp_path, format_) == first


FORMULAS = {
    "=1+1": "'=1+1",
    "+1": "'+1",
    "-1": "'-1",
    "@x": "'@x",
    "\tx": "'\tx",
    "\rx": "'\rx",
    "1+1": "1+1",
    " =1": " =1",
    "": "",
}


@pytest.mark.parametrize(("text", "escaped"), FORMULAS.items())
def test_formulas_are_escaped_where_that_was_asked_for(
    conn: Conn, conninfo: str, tmp_path: Path, text: str, escaped: str
) -> None:
    put_by_hand(conn, path=text, ip_address=None)
    (row,) = from_csv(conn, export(conninfo, 1, tmp_path, "csv", escape_formulas=True))
    assert row[EXPORTED_COLUMNS.index("path")] == escaped


def test_every_csv_object_begins_with_its_header(conn: Conn, conninfo: str, tmp_path: Path) -> None:
    put_by_hand(conn)
    put_by_hand(conn, site_id="blog")
    for content in export(conninfo, 2, tmp_path, "csv"):
        header, _, rest = gzip.decompress(content).partition(b"\r\n")
        assert header.decode() == ",".join(EXPORTED_COLUMNS)
        assert rest.endswith(b"\r\n")


ENDINGS = {
    ("parquet", "zstd"): ".parquet",
    ("parquet", "none"): ".parquet",
    ("csv", "gzip"): ".csv.gz",
    ("csv", "none"): ".csv",
    ("jsonl", "zstd"): ".jsonl.zst",
}


@pytest.mark.parametrize(("kind", "ending"), ENDINGS.items(), ids=map("-".join, ENDINGS))
def test_a_key_ends_with_its_format(
    conn: Conn, conninfo: str, tmp_path: Path, kind: tuple[str, str], ending: str
) -> None:
    put_by_hand(conn)
    batch = sealed_batch(1, *kind)
    with rows_of(conninfo, batch) as batches:
        ((record, _),) = write(batches, batch, tmp_path)
    assert record.key.endswith(f"-0001{ending}")


def test_duckdb_reads_the_tree_as_one_partitioned_table(conn: Conn, conninfo: str, tmp_path: Path) -> None:
    for hour in range(3):
        for site in ("shop", "blog"):
            put_by_hand(conn, site_id=site, created_at=NOON + timedelta(hours=hour), path=f"/{hour}")
    batch = sealed_batch(6, "parquet", "zstd")
    work = tmp_path / "work"
    work.mkdir()
    with rows_of(conninfo, batch) as batches:
        for record, content in write(batches, batch, work):
            (tmp_path / record.key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / record.key).write_bytes(content)
    rows = duckdb.execute(
        "SELECT site, date::text, hour::int, count(*), min(raw_event_data->>'$.n'), typeof(min(timestamp))"
        " FROM read_parquet(?, hive_partitioning = true) GROUP BY ALL ORDER BY ALL",
        [f"{tmp_path}/site=*/**/*.parquet"],
    ).fetchall()
    kind = "TIMESTAMP WITH TIME ZONE"
    assert rows == [(site, "2026-03-04", hour, 1, None, kind) for site in ("blog", "shop") for hour in (12, 13, 14)]


def test_memory_for_a_row_group_is_bounded_by_bytes(db: Database, conninfo: str, tmp_path: Path) -> None:
    store_events(db, 40, raw_event_data=json.dumps({"x": "y" * 1_000_000}))
    (content,) = export(conninfo, 40, tmp_path, "parquet")
    assert pq.ParquetFile(io.BytesIO(content)).num_row_groups == 3
