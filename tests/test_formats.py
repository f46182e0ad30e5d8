"""The same rows always make the same bytes, and whatever stands in a row is read back exactly as it was stored."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from conftest import store_events

from appliance.errors import BatchChangedError, DatabaseUnavailableError
from appliance.export.files import HashedFile
from appliance.export.objects import object_key, write_objects
from appliance.store import reading
from appliance.store.database import Database
from appliance.store.ledger import Batch, Key, ObjectRecord
from appliance.store.ranges import Range
from appliance.store.reading import rows_of

Conn = psycopg.Connection[Any]
NOON = datetime(2026, 3, 4, 12, 30, tzinfo=UTC)
EVERYTHING = (Range(site="*", from_id=0, to_id=10**9),)


def make_batch(compression: str = "none", *, rows: int = 10**6, size: int = 10**9) -> Batch:
    return Batch(
        key=Key("acme", 7),
        kind="batch",
        sealed_at=NOON,
        row_count=1,
        format="jsonl",
        compression=compression,
        object_rows=rows,
        object_bytes=size,
        schema_version=1,
        manifest=None,
        ranges=(),
        deliveries=(),
    )


def sealed_batch(rows: int, format_: str = "jsonl", compression: str = "none", **options: Any) -> Batch:
    """A batch of all that stands in the table, which should be so many rows."""
    batch = make_batch(compression)
    return replace(batch, row_count=rows, format=format_, ranges=EVERYTHING, **options)


def record_batch(rows: Sequence[tuple[str, str, datetime | None]]) -> Any:
    partitions, lines, times = zip(*rows, strict=True)
    columns = [pa.array(partitions), pa.array(lines), pa.array(times, pa.timestamp("us", tz="UTC"))]
    return pa.RecordBatch.from_arrays(columns, ["partition", "line", "timestamp"])


def sliced(whole: Any, size: int) -> list[Any]:
    return [whole.slice(start, size) for start in range(0, whole.num_rows, size)]


def write(batches: Iterable[Any], batch: Batch, directory: Path) -> list[tuple[ObjectRecord, bytes]]:
    """Write objects and read each while it is ours."""
    written = []
    for made in write_objects(batches, batch, directory):
        content = made.local.path.read_bytes()
        assert made.record.bytes == made.local.bytes == len(content)
        assert made.record.sha256 == made.local.sha256 == hashlib.sha256(content).hexdigest()
        assert made.local.md5 == hashlib.md5(content, usedforsecurity=False).hexdigest()
        made.local.path.unlink()
        written.append((made.record, content))
    assert list(directory.iterdir()) == []
    return written


def unpack(compression: str, content: bytes) -> bytes:
    if compression == "gzip":
        return gzip.decompress(content)
    if compression == "zstd":
        return bytes(pa.input_stream(pa.BufferReader(content), compression="zstd").read())
    return content


def export(conninfo: str, rows: int, directory: Path) -> list[tuple[ObjectRecord, bytes]]:
    """Write what stands in the table."""
    with rows_of(conninfo, sealed_batch(rows)) as batches:
        return write(batches, make_batch(), directory)


def lines_of(written: Iterable[tuple[ObjectRecord, bytes]]) -> list[dict[str, Any]]:
    return [json.loads(line) for _, content in written for line in content.splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


ROWS = [
    (f"2026-03-04 {hour:02d} +{site}", json.dumps({"n": n, "text": "é\N{PILE OF POO}" * (n % 9)}) + "\n", moment)
    for site in ("blog", "shop")
    for hour in (8, 9, 11)
    for n, moment in enumerate([NOON, None, NOON + timedelta(days=1), NOON - timedelta(days=1)] * 6)
]


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("limits", [{}, {"rows": 5}, {"size": 200}, {"rows": 7, "size": 300}, {"size": 1}], ids=str)
def test_the_pieces_in_which_rows_come_do_not_matter(compression: str, limits: dict[str, Any], tmp_path: Path) -> None:
    whole = record_batch(ROWS)
    batch = make_batch(compression, **limits)
    expected = write([whole], batch, tmp_path)
    for size in (1, 2, 3, 7, 24, 100):
        assert write(sliced(whole, size), batch, tmp_path) == expected
    assert b"".join(unpack(compression, content) for _, content in expected) == "".join(r[1] for r in ROWS).encode()


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_the_pieces_in_which_much_comes_do_not_matter_to_the_compressor(compression: str, tmp_path: Path) -> None:
    text = [hashlib.sha256(str(n).encode()).hexdigest() * 40 + "\n" for n in range(1500)]
    whole = record_batch([("2026-03-04 08 +shop", line, None) for line in text])
    ((_, expected),) = write([whole], make_batch(compression), tmp_path)
    assert len(unpack(compression, expected)) > 3 << 20
    assert unpack(compression, expected) == "".join(text).encode()
    for size in (1, 333, 1499):
        assert write(sliced(whole, size), make_batch(compression), tmp_path)[0][1] == expected


def test_a_gzip_object_has_no_time_in_it(tmp_path: Path) -> None:
    ((_, content),) = write([record_batch(ROWS[:3])], make_batch("gzip"), tmp_path)
    assert content[4:8] == bytes(4)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        pytest.param({}, [5], id="no limit reached"),
        pytest.param({"rows": 2}, [2, 2, 1], id="rows"),
        pytest.param({"rows": 5}, [5], id="exactly the rows"),
        pytest.param({"size": 10}, [1] * 5, id="exactly one row of bytes"),
        pytest.param({"size": 11}, [2, 2, 1], id="the row that crosses the limit is the last"),
        pytest.param({"size": 50}, [5], id="exactly the bytes"),
        pytest.param({"rows": 1, "size": 30}, [1] * 5, id="whichever comes first"),
    ],
)
def test_an_object_ends_at_its_limit(limits: dict[str, Any], sizes: list[int], tmp_path: Path) -> None:
    rows = [("2026-03-04 08 +shop", f"{n:09d}\n", NOON) for n in range(5)]
    written = write([record_batch(rows)], make_batch(**limits), tmp_path)
    assert [record.row_count for record, _ in written] == sizes
    assert [content.count(b"\n") for _, content in written] == sizes
    assert [record.part for record, _ in written] == list(range(1, len(sizes) + 1))


def test_an_object_knows_its_first_and_last_event(tmp_path: Path) -> None:
    records = [record for record, _ in write(sliced(record_batch(ROWS), 5), make_batch(), tmp_path)]
    assert len(records) == 6
    assert {(r.first_event, r.last_event) for r in records} == {(NOON - timedelta(days=1), NOON + timedelta(days=1))}
    ((nothing, _),) = write([record_batch([("2026-03-04 08 +shop", "{}\n", None)])], make_batch(), tmp_path)
    assert (nothing.first_event, nothing.last_event) == (None, None)


def test_an_object_that_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    objects = write_objects([record_batch(ROWS)], make_batch(), tmp_path)
    next(objects).local.path.unlink()
    objects.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [1, 2])
def test_an_object_that_cannot_be_written_is_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """Whether the disk is full while rows still come, or when the last of them is written."""
    written: list[int] = []
    write_for_real = HashedFile.write

    def fail(file: HashedFile, data: Any) -> int:
        written.append(len(data))
        if len(written) == broken:
            raise OSError("no space left on device")
        return write_for_real(file, data)

    monkeypatch.setattr(HashedFile, "write", fail)
    line = "x" * (1 << 20) + "\n"
    rows = record_batch([("2026-03-04 08 +shop", line, None)])
    with pytest.raises(OSError, match="no space left"):
        write([rows], make_batch(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Keys


@pytest.mark.parametrize(
    ("partition", "place"),
    [
        ("2026-01-02 03 +shop", "site=shop/date=2026-01-02/hour=03"),
        ("2026-01-02 03 -", "site=__HIVE_DEFAULT_PARTITION__/date=2026-01-02/hour=03"),
        ("- - +shop", "site=shop/date=__HIVE_DEFAULT_PARTITION__/hour=__HIVE_DEFAULT_PARTITION__"),
        ("2026-01-02 03 +../x", "site=..%2Fx/date=2026-01-02/hour=03"),
        ("2026-01-02 03 +a/b", "site=a%2Fb/date=2026-01-02/hour=03"),
        ("2026-01-02 03 +", "site=/date=2026-01-02/hour=03"),
        ("2026-01-02 03 +-", "site=-/date=2026-01-02/hour=03"),
        ("2026-01-02 03 +é", "site=%C3%A9/date=2026-01-02/hour=03"),
        ("2026-01-02 03 + +", "site=%20%2B/date=2026-01-02/hour=03"),
        ("2026-01-02 03 +a%2Fb", "site=a%252Fb/date=2026-01-02/hour=03"),
        ("2026-01-02 03 +a\nb\\", "site=a%0Ab%5C/date=2026-01-02/hour=03"),
    ],
)
def test_a_key_is_made_of_harmless_parts(partition: str, place: str) -> None:
    assert object_key(make_batch("gzip"), partition, 12) == f"{place}/acme-0000000007-0012.jsonl.gz"


@pytest.mark.parametrize(("compression", "ending"), [("gzip", ".jsonl.gz"), ("zstd", ".jsonl.zst"), ("none", ".jsonl")])
def test_a_key_ends_with_what_it_is(compression: str, ending: str) -> None:
    assert object_key(make_batch(compression), "2026-01-02 03 +shop", 1).endswith(f"-0001{ending}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows, out of a real database


def put_by_hand(conn: Conn, **columns: Any) -> None:
    values = {"event_type": "x", "site_id": "shop", "timestamp": NOON, "created_at": NOON, "raw_event_data": "{}"}
    values |= columns
    names = psycopg.sql.SQL(", ").join(map(psycopg.sql.Identifier, values))
    places = psycopg.sql.SQL(", ").join(psycopg.sql.Placeholder() * len(values))
    query = psycopg.sql.SQL("INSERT INTO events_log (event_id, {}) VALUES (gen_random_uuid(), {})")
    conn.execute(query.format(names, places), list(values.values()))


def test_rows_come_by_site_hour_and_id_and_fall_into_partitions(conn: Conn, conninfo: str, tmp_path: Path) -> None:
    for hours in (1, 0, 1):
        for site in ("shop", "Zoo", None, "é", ""):
            put_by_hand(conn, site_id=site, created_at=NOON + timedelta(hours=hours))
    written = export(conninfo, 15, tmp_path)
    sites = ["__HIVE_DEFAULT_PARTITION__", "", "Zoo", "shop", "%C3%A9"]
    assert [record.key.rpartition("/")[0] for record, _ in written] == [
        f"site={site}/date=2026-03-04/hour={hour}" for site in sites for hour in (12, 13)
    ]
    assert [record.row_count for record, _ in written] == [1, 2] * 5
    for _, content in written:
        ids = [line["id"] for line in lines_of([(written[0][0], content)])]
        assert ids == sorted(ids)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_rows_that_lie_in_order_are_the_same_bytes_however_they_are_read(
    conn: Conn, conninfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    for site, hour in ((None, 0), (None, 2), ("blog", 1), ("blog", 1), ("shop", 0), ("shop", 3)):
        put_by_hand(conn, site_id=site, created_at=NOON + timedelta(hours=hour))
    batch = make_batch(compression)
    with rows_of(conninfo, sealed_batch(6)) as batches:
        expected = write(batches, batch, tmp_path)
    assert len(expected) == 5
    monkeypatch.setattr(reading, "_BY_ID", reading._BY_SITE_AND_HOUR)  # noqa: SLF001 - as if they lay in disorder
    with rows_of(conninfo, sealed_batch(6)) as batches:
        assert write(batches, batch, tmp_path) == expected


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([("shop", 0), ("blog", 0)], id="sites"),
        pytest.param([("shop", 1), ("shop", 0)], id="hours"),
        pytest.param([("shop", 0), ("shop", 1), ("shop", 0)], id="one row too late"),
        pytest.param([("shop", 0), (None, 1)], id="no site last"),
        pytest.param([("a", 0), ("B", 0)], id="capitals, in another order in most languages"),
    ],
)
def test_rows_that_lie_in_disorder_are_put_in_order(
    conn: Conn, conninfo: str, tmp_path: Path, places: list[tuple[str | None, int]]
) -> None:
    for site, hour in places:
        put_by_hand(conn, site_id=site, created_at=NOON + timedelta(hours=hour))
    lines = lines_of(export(conninfo, len(places), tmp_path))
    found = [(line["site_id"] or "", line["created_at"], line["id"]) for line in lines]
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        pytest.param("url", None, id="NULL"),
        pytest.param("url", "", id="empty string"),
        pytest.param("url", 'say "hello"', id="quotes"),
        pytest.param("url", "C:\\new\\table \\N \\. \\u0000", id="backslashes"),
        pytest.param("user_agent", "a\nb\r\nc\td\x1f\x7f\u2028\u0085", id="line ends"),
        pytest.param("path", "/\N{PILE OF POO}/é/\U0010ffff", id="emoji"),
        pytest.param("site_id", "../x", id="site with a path"),
        pytest.param("site_id", "", id="empty site"),
        pytest.param("site_id", None, id="no site"),
        pytest.param("event_type", "'; DROP TABLE events_log; --", id="SQL"),
        pytest.param("ip_address", "2001:db8::1", id="IPv6"),
        pytest.param("session_id", None, id="no session"),
    ],
)
def test_a_column_is_read_back_as_it_was(
    conn: Conn, conninfo: str, tmp_path: Path, column: str, value: str | None
) -> None:
    put_by_hand(conn, **{column: value})
    written = export(conninfo, 1, tmp_path)
    assert written[0][1].count(b"\n") == 1
    (line,) = lines_of(written)
    assert line[column] == value
    assert "exported_at" not in line


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"n": 9007199254740993}', id="2^53 + 1"),
        pytest.param('{"n": 123456789012345678901234567890.000100}', id="a long decimal"),
        pytest.param('{"a": null, "b": "", "c": [], "d": {}}', id="nothing in many ways"),
        pytest.param('{"a": "\\\\u0000 \\" \\n / \\\\N"}', id="escapes"),
        pytest.param('{"é": "\N{PILE OF POO}"}', id="emoji"),
        pytest.param('"just text"', id="a scalar"),
    ],
)
def test_raw_data_is_passed_on_digit_for_digit(conn: Conn, conninfo: str, tmp_path: Path, text: str) -> None:
    put_by_hand(conn, raw_event_data=text)
    ((_, content),) = export(conninfo, 1, tmp_path)
    assert f'"raw_event_data":{text},'.encode() in content


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0044-03-15 BC", "294276-12-31", "9999-12-31 23:59:59"])
def test_a_row_with_a_time_out_of_this_world_is_exported_like_any_other(
    conn: Conn, conninfo: str, tmp_path: Path, moment: str
) -> None:
    put_by_hand(conn)
    put_by_hand(conn, timestamp=moment, created_at=moment)
    put_by_hand(conn, timestamp=moment, created_at=None)
    written = export(conninfo, 3, tmp_path)
    assert sorted(line["id"] for line in lines_of(written)) == [1, 2, 3]
    if "infinity" in moment:
        assert any("date=__HIVE_DEFAULT_PARTITION__" in record.key for record, _ in written)


@pytest.mark.parametrize(
    "setting",
    [
        "timezone = 'Asia/Kathmandu'",
        "datestyle = 'German, DMY'",
        "extra_float_digits = -15",
        "client_encoding = 'LATIN1'",
        "default_transaction_isolation = 'serializable'",
        "standard_conforming_strings = off",
    ],
)
def test_the_settings_of_a_database_do_not_change_a_byte(
    conn: Conn, conninfo: str, tmp_path: Path, setting: str
) -> None:
    put_by_hand(conn, site_id="é", path="C:\\é'", raw_event_data='{"f": 0.1234567890123456789}')
    put_by_hand(conn, created_at="2026-03-04 23:59:59.999999+00", timestamp="2026-07-01")
    expected = export(conninfo, 2, tmp_path)
    conn.execute(f"ALTER DATABASE {conn.info.dbname} SET {setting}")
    assert export(conninfo, 2, tmp_path) == expected
    assert b"+00:00" in expected[0][1]


@pytest.mark.parametrize("sealed", [1, 3])
def test_other_than_the_sealed_number_of_rows_is_refused_before_the_first(
    db: Database, conninfo: str, sealed: int
) -> None:
    store_events(db, 2)
    with (
        pytest.raises(BatchChangedError, match=f"{sealed} rows were sealed, 2 are there now"),
        rows_of(conninfo, sealed_batch(sealed)),
    ):
        pytest.fail("rows were lent")


def test_a_database_that_is_lost_while_rows_stream_is_unavailable(conn: Conn, conninfo: str) -> None:
    conn.execute(
        "INSERT INTO events_log (event_id, event_type, timestamp, raw_event_data)"
        " SELECT gen_random_uuid(), 'x', now(), to_jsonb(repeat('x', 100000)) FROM generate_series(1, 1000)"
    )
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> %s AND datname = current_database()"

    def lose_it() -> None:
        with rows_of(conninfo, sealed_batch(1000)) as batches:
            next(batches)
            conn.execute(kill, (conn.info.backend_pid,))
            list(batches)

    with pytest.raises(DatabaseUnavailableError):
        lose_it()
