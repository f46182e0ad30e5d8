"""Other ways to get rows out of the table, against which an export is held. Each returns the seconds that it took."""

import gzip
import json
import shlex
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from appliance.store.events import EXPORTED_COLUMNS
from appliance.store.programs import binary
from bench.errors import BenchError
from bench.storage import Storage

_COPY = r"\copy (select row_to_json(e) from events_log e) to stdout"
_PAGE_ROWS = 10_000
_GZIP_LEVEL = 6
_READ_BYTES = 1 << 20
_SELECT = f"SELECT {', '.join(EXPORTED_COLUMNS)} FROM events_log WHERE id > %s ORDER BY id LIMIT %s"  # noqa: S608 - our own


def psql_and_gzip(conninfo: str, rows: int, directory: Path) -> float:
    """Copy all rows into one file as JSON lines: nothing is checked or marked, and nothing leaves the machine."""
    target = directory / "copy.jsonl.gz"
    psql = shlex.join([str(binary("psql")), "--no-psqlrc", "--quiet", "--command", _COPY, conninfo])
    started = time.monotonic()
    command = f"set -o pipefail; {psql} | gzip -{_GZIP_LEVEL} > {shlex.quote(str(target))}"
    done = subprocess.run(["/bin/bash", "-c", command], check=False)
    seconds = time.monotonic() - started
    if done.returncode != 0 or _lines(target) != rows:
        raise BenchError(f"psql and gzip did not copy {rows:,} rows")
    target.unlink()
    return seconds


def usual_way(conninfo: str, rows: int, storage: Storage) -> float:
    """Page by page: SELECT, json.dumps a row, gzip, put_object to two buckets, UPDATE ... WHERE id = ANY.

    All with their own defaults (gzip's is its highest level).
    By id, not by what is not marked yet: that would read over all that is, page by page.
    """
    client, buckets = storage.client(), [storage.new_bucket(), storage.new_bucket()]
    started = time.monotonic()
    last_id = done = 0
    with psycopg.connect(conninfo, row_factory=dict_row) as conn:
        while page := conn.execute(_SELECT, (last_id, _PAGE_ROWS)).fetchall():
            content = gzip.compress(_as_lines(page))
            for bucket in buckets:
                client.put_object(Bucket=bucket, Key=f"events-{last_id:012d}.jsonl.gz", Body=content)
            conn.execute("UPDATE events_log SET exported_at = now() WHERE id = ANY(%s)", ([row["id"] for row in page],))
            conn.commit()
            last_id, done = page[-1]["id"], done + len(page)
    if done != rows:
        raise BenchError(f"the usual way copied {done:,} rows of {rows:,}")
    return time.monotonic() - started


def _as_lines(page: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, default=str) + "\n" for row in page).encode()


def _lines(path: Path) -> int:
    unpack = zlib.decompressobj(wbits=31)
    with path.open("rb") as file:
        return sum(unpack.decompress(piece).count(b"\n") for piece in iter(lambda: file.read(_READ_BYTES), b""))
