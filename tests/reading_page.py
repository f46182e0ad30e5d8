"""Help for tests of docs/reading.md: a tree that a real run has exported, and the SQL of the page, turned to it."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from conftest import make_settings
from test_formats import NOON, put_by_hand

from appliance.export.job import Exporter
from appliance.store.database import Database

PAGE = Path(__file__).parent.parent / "docs" / "reading.md"
COMPRESSION = {"parquet": "zstd", "jsonl": "gzip", "csv": "gzip"}
# What each format must bring back exactly, in the raw event and in the columns beside it.
HARD_TEXT = "say \"hello\", '' C:\\new\\table \\N \\u0041\ta\nb\r\nc \N{PILE OF POO} é \u2028 =1+1"
HARD_JSON = (
    '{"n": 9007199254740993, "f": 0.10, "t": "say \\"hello\\" C:\\\\new \\\\N \\n \\r\\n \\t \\u2028 '
    '\N{PILE OF POO} \\\\u0041"}'
)

Conn = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class Tree:
    """The directory of a bucket's prefix, and the database whose events it holds."""

    root: Path
    conn: Conn

    def counts(self) -> list[tuple[Any, ...]]:
        """Return site, date and hour of arrival with the number of events, as PostgreSQL counts them."""
        query = """SELECT site_id, (created_at AT TIME ZONE 'UTC')::date,
            extract(hour FROM created_at AT TIME ZONE 'UTC')::int, count(*) FROM events_log GROUP BY 1, 2, 3"""
        return ordered(self.conn.execute(query).fetchall())

    def rows(self) -> list[tuple[Any, ...]]:
        """Return what each row should come back as."""
        query = """SELECT id, event_id::text, event_type, site_id, timestamp, url, path, abbrev(ip_address),
            raw_event_data::text, created_at FROM events_log ORDER BY id"""
        return [tuple(in_utc(value) for value in row) for row in self.conn.execute(query)]


ROW = "id, event_id, event_type, site_id, timestamp, url, path, ip_address, raw_event_data, created_at"
RAW = ROW.split(", ").index("raw_event_data")


def in_utc(value: Any) -> Any:
    """Return a moment in UTC, and anything else as it is."""
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def ordered(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Sort rows in which NULL may stand."""
    return sorted(rows, key=lambda row: [(value is None, str(value)) for value in row])


def exported_tree(db: Database, conn: Conn, directory: Path, format_: str) -> Tree:
    """Store events that are hard to read, of several sites and hours, in two batches, and export them."""
    for number, site in enumerate(("shop", "blog", "007", None, "shop")):
        put_by_hand(conn, site_id=site, created_at=NOON + timedelta(hours=number - 5), path=f"/{number}")
    root = _export(db, directory, format_)
    hard = {"url": HARD_TEXT, "path": HARD_TEXT, "raw_event_data": HARD_JSON, "ip_address": "2001:db8::1"}
    put_by_hand(conn, **hard, timestamp="2026-03-04 23:59:59.999999+00")
    put_by_hand(conn, url="", path=None, ip_address=None, created_at=NOON + timedelta(hours=8))
    assert _export(db, directory, format_) == root
    return Tree(root, conn)


def _export(db: Database, directory: Path, format_: str) -> Path:
    bucket = directory / "bucket"
    bucket.mkdir(exist_ok=True)
    job = {"sites": ["*"], "client": "acme", "format": format_, "compression": COMPRESSION[format_]}
    settings = make_settings(
        server={"data_dir": str(directory / "data")},
        buckets={"acme": {"kind": "directory", "path": str(bucket), "prefix": "raw"}},
        exports={"acme": job},
    )
    assert not Exporter(settings, db, conninfo=db.conninfo).run("acme").failed
    return bucket / "raw"


def statements(heading: str, root: Path) -> list[str]:
    """Return the SQL under a heading of the page, with the bucket of the examples turned into a directory."""
    text = PAGE.read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    sql = "\n".join(line for line in section.splitlines() if line.startswith("    ") or not line)
    found = [part.strip() for part in sql.split(";\n") if part.strip()]
    assert found, f"{PAGE.name} has no SQL under {heading}"
    return [re.sub(r"s3a?://acme-events/raw", str(root), part) for part in found]


def forget_a_manifest(tree: Tree) -> int:
    """Take the second batch's manifest away, as if it were still on its way; return how many events are complete."""
    (tree.root / "_manifests" / "acme" / "0000000002.json").unlink()
    found = tree.conn.execute("SELECT row_count FROM export_batches WHERE sequence = 1").fetchone()
    assert found is not None
    return int(found[0])


def double_an_object(tree: Tree) -> None:
    """Put a copy of an object beside it, as another job on the same prefix would."""
    one = next(tree.root.glob("site=shop/**/acme-*"))
    one.with_name(one.name.replace("acme", "other")).write_bytes(one.read_bytes())
