"""One object's file -> rows in the database's staging table: the way of formats.py, backwards."""

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from psycopg import sql

from appliance.export.buckets.checks import READ_BYTES
from appliance.store import restoring
from appliance.store.database import Connection
from appliance.store.events import EXPORTED_AS_SQL, EXPORTED_COLUMNS
from appliance.store.ledger import Batch

# Rows of Parquet that are Python objects at a time.
_ROWS = 5_000


def load(conn: Connection, batch: Batch, path: Path) -> None:
    """Stage the rows of an object of this batch. Raises psycopg.DataError where they are no rows of events."""
    _LOADERS[batch.format](conn, batch.compression, path)


def _load_lines(conn: Connection, compression: str, path: Path) -> None:
    with (
        _opened(compression, path) as file,
        io.TextIOWrapper(file, encoding="utf-8", newline="\n") as lines,
        conn.cursor().copy("COPY lines (line) FROM STDIN") as copy,
    ):
        for line in lines:
            copy.write_row((line.removesuffix("\n"),))
    restoring.unpack_lines(conn)


def _load_csv(conn: Connection, compression: str, path: Path) -> None:
    # PostgreSQL reads what its own rules have written: NULL is nothing, an empty text is "".
    statement = sql.SQL("COPY restored ({}) FROM STDIN (FORMAT csv, HEADER match)").format(EXPORTED_AS_SQL)
    with _opened(compression, path) as file, conn.cursor().copy(statement) as copy:
        while piece := file.read(READ_BYTES):
            copy.write(piece)


def _load_parquet(conn: Connection, _compression: str, path: Path) -> None:
    statement = sql.SQL("COPY restored ({}) FROM STDIN").format(EXPORTED_AS_SQL)
    with conn.cursor().copy(statement) as copy:
        for row in _parquet_rows(path):
            copy.write_row(row)


def _parquet_rows(path: Path) -> Iterator[tuple[Any, ...]]:
    import pyarrow.parquet as pq  # noqa: PLC0415 - only exports need Arrow

    with pq.ParquetFile(path) as file:
        for record_batch in file.iter_batches(batch_size=_ROWS, columns=list(EXPORTED_COLUMNS)):
            columns = {name: record_batch.column(name).to_pylist() for name in EXPORTED_COLUMNS}
            # Parquet has no infinity; every event has a time.
            columns["timestamp"] = [time or "infinity" for time in columns["timestamp"]]
            yield from zip(*columns.values(), strict=True)


_LOADERS: dict[str, Callable[[Connection, str, Path], None]] = {
    "jsonl": _load_lines,
    "csv": _load_csv,
    "parquet": _load_parquet,
}


def _opened(compression: str, path: Path) -> BinaryIO:
    if compression == "gzip":
        return gzip.open(path)  # type: ignore[return-value]
    if compression == "zstd":
        import pyarrow as pa  # noqa: PLC0415 - only exports need Arrow

        return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    return path.open("rb")
