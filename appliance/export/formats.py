"""Record batches -> the bytes of one object: JSON lines, CSV or Parquet. The same rows always make the same bytes.

Encoders of text and of Parquet cut what they are given into pieces of their own: a compressor, or a row group, must not
depend on the pieces in which rows arrive. They work in a thread of their own: compressing takes as long as reading.
"""

import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from appliance.export.files import ArrowSink, HashedFile
from appliance.store.events import EXPORTED_COLUMNS
from appliance.store.ledger import Batch

_COMPRESSIONS = {"gzip": ".gz", "zstd": ".zst", "none": ""}
_PIECE_BYTES = 1 << 20
_GZIP_LEVEL = 6
_GZIP_WINDOW_BITS = 31  # 15 for the largest window, 16 for a gzip header (with no time in it)
# Record batches that wait to be encoded: as many as come in (about 4 MB each) while a row group is written.
_MOST_WAITING = 4
# A row group is what a reader of Parquet holds in memory, and the writer too.
_GROUP_ROWS = 65_536
_GROUP_BYTES = 16 << 20
# Columns whose values come again and again; of others a dictionary is tried, and thrown away when it has become large.
_WITH_DICTIONARY = ["event_type", "session_id", "visitor_id", "site_id", "url", "path", "user_agent", "ip_address"]
# Of long texts the smallest and the largest help no reader to leave out a row group.
_WITH_STATISTICS = [column for column in EXPORTED_COLUMNS if column not in {"raw_event_data", "user_agent"}]
# What a row takes beside its texts: an id, two moments, lengths.
_FIXED_ROW_BYTES = 64


class Encoder(Protocol):
    """Writes rows of record batches into one file."""

    def write(self, record_batch: Any, offsets: Sequence[int], start: int, end: int) -> None:
        """Append rows; `offsets` are those of `row_offsets` for this record batch."""

    def close(self) -> None:
        """Write what is left, and leave the file open."""


class Encoding:
    """An encoder at work in a thread of its own, one record batch after the other."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._waiting: deque[Future[None]] = deque()

    def write(self, record_batch: Any, offsets: Sequence[int], start: int, end: int) -> None:
        """Append rows soon. Raises what went wrong with earlier ones."""
        while len(self._waiting) >= _MOST_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._encoder.write, record_batch, offsets, start, end))

    def close(self) -> None:
        """Write what is left, and leave the file open."""
        while self._waiting:
            self._waiting.popleft().result()
        self._encoder.close()
        self.stop()

    def stop(self) -> None:
        """Leave the file alone from now on."""
        self._thread.shutdown(cancel_futures=True)


def extension(batch: Batch) -> str:
    """Return how the names of a batch's objects end, without the first dot."""
    return batch.format if batch.format == "parquet" else f"{batch.format}{_COMPRESSIONS[batch.compression]}"


def encoder(batch: Batch, file: HashedFile) -> Encoding:
    """Return what writes an object of this batch."""
    if batch.format == "parquet":
        return Encoding(_Parquet(file, batch.compression))
    header = _csv_header() if batch.format == "csv" else b""
    return Encoding(_Text(_COMPRESSORS[batch.compression](file), header))


def row_offsets(record_batch: Any) -> Sequence[int]:
    """Return where each row begins if the rows stood one behind the other, and where the last one ends, in bytes."""
    names = record_batch.schema.names
    if "line" in names:
        _, offsets, _ = record_batch.column("line").buffers()
        column = record_batch.column("line")
        return memoryview(offsets).cast("i")[column.offset : column.offset + len(column) + 1]
    return _sums_of_lengths(record_batch)


def _sums_of_lengths(record_batch: Any) -> Sequence[int]:
    import pyarrow as pa  # noqa: PLC0415 - only exports need Arrow
    import pyarrow.compute as pc  # noqa: PLC0415

    total = pa.array([_FIXED_ROW_BYTES] * record_batch.num_rows, pa.int64())
    for column in record_batch.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            total = pc.add(total, pc.fill_null(pc.binary_length(column).cast(pa.int64()), 0))
    sums = pc.cumulative_sum(pa.concat_arrays([pa.array([0], pa.int64()), total]))
    # As Arrow has them: a Python number for each row would take longer than all the rest here.
    return memoryview(sums.buffers()[1]).cast("q")[: len(sums)]


class _Text:
    """Lines, compressed in pieces of one size."""

    def __init__(self, compressor: "_Plain", header: bytes) -> None:
        self._compressor = compressor
        self._buffer = bytearray(header)

    def write(self, record_batch: Any, offsets: Sequence[int], start: int, end: int) -> None:
        _, _, text = record_batch.column("line").buffers()
        self._buffer += memoryview(text)[offsets[start] : offsets[end]]
        whole = len(self._buffer) - len(self._buffer) % _PIECE_BYTES
        for piece in range(0, whole, _PIECE_BYTES):
            self._compressor.write(bytes(self._buffer[piece : piece + _PIECE_BYTES]))
        del self._buffer[:whole]

    def close(self) -> None:
        self._compressor.write(bytes(self._buffer))
        self._compressor.close()


def _csv_header() -> bytes:
    return (",".join(EXPORTED_COLUMNS) + "\r\n").encode()


class _Plain:
    def __init__(self, file: HashedFile) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def close(self) -> None:
        """Leave the file open: its owner closes it to learn its digests."""


class _Gzip(_Plain):
    def __init__(self, file: HashedFile) -> None:
        super().__init__(file)
        self._deflate = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW_BITS)

    def write(self, data: bytes) -> None:
        self._file.write(self._deflate.compress(data))

    def close(self) -> None:
        self._file.write(self._deflate.flush())


class _Zstd(_Plain):
    def __init__(self, file: HashedFile) -> None:
        import pyarrow as pa  # noqa: PLC0415 - only exports need Arrow

        super().__init__(file)
        self._zstd = pa.CompressedOutputStream(ArrowSink(file), "zstd")

    def write(self, data: bytes) -> None:
        self._zstd.write(data)

    def close(self) -> None:
        self._zstd.close()


_COMPRESSORS: dict[str, type[_Plain]] = {"gzip": _Gzip, "zstd": _Zstd, "none": _Plain}


class _Parquet:
    """Row groups that end at the same row each time."""

    def __init__(self, file: HashedFile, compression: str) -> None:
        self._sink = ArrowSink(file)
        self._compression = compression
        self._writer: Any = None
        self._group: list[Any] = []
        self._rows_left = _GROUP_ROWS
        self._bytes_left = _GROUP_BYTES

    def write(self, record_batch: Any, offsets: Sequence[int], start: int, end: int) -> None:
        rows = record_batch.select(list(EXPORTED_COLUMNS))
        while start < end:
            cut = min(end, start + self._rows_left)
            cut = min(cut, bisect_left(offsets, offsets[start] + self._bytes_left, start + 1, cut))
            self._group.append(rows.slice(start, cut - start))
            self._rows_left -= cut - start
            self._bytes_left -= offsets[cut] - offsets[start]
            if self._rows_left <= 0 or self._bytes_left <= 0:
                self._write_group()
            start = cut

    def _write_group(self) -> None:
        import pyarrow as pa  # noqa: PLC0415 - only exports need Arrow
        import pyarrow.parquet as pq  # noqa: PLC0415

        table = pa.Table.from_batches(self._group).combine_chunks()
        self._group.clear()
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._sink,
                table.schema,
                compression=self._compression,
                use_dictionary=_WITH_DICTIONARY,
                write_statistics=_WITH_STATISTICS,
                store_schema=False,
            )
        self._writer.write_table(table, row_group_size=_GROUP_ROWS)
        self._rows_left, self._bytes_left = _GROUP_ROWS, _GROUP_BYTES

    def close(self) -> None:
        if self._group:
            self._write_group()
        self._writer.close()
