"""Record batches -> files. The same rows always make the same bytes, however they arrive."""

import hashlib
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from appliance.store.ledger import Batch, ObjectRecord

if TYPE_CHECKING:
    from datetime import datetime

# Hive's own name for a partition whose value is NULL.
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"

_EXTENSIONS = {"gzip": ".gz", "zstd": ".zst", "none": ""}
# A compressor may make other bytes of the same input when it comes in other pieces: it always gets pieces of this size.
_PIECE_BYTES = 1 << 20
_MAX_SITE_CHARS = 180
_GZIP_LEVEL = 6
_GZIP_WINDOW_BITS = 31  # 15 for the largest window, 16 for a gzip header (with no time in it)


@dataclass(frozen=True, slots=True)
class LocalObject:
    """An object as it lies on the disk before its upload; `md5` is for S3's own check of it."""

    path: Path
    bytes: int
    sha256: str
    md5: str


@dataclass(frozen=True, slots=True)
class MadeObject:
    """A finished object of a batch and what the ledger keeps of it."""

    record: ObjectRecord
    local: LocalObject


def described(path: Path) -> LocalObject:
    """Describe a file that is there already: a manifest, or an object fetched from a bucket."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return LocalObject(path, path.stat().st_size, sha256, md5)


def write_objects(record_batches: Iterable[Any], batch: Batch, directory: Path) -> Iterator[MadeObject]:
    """Write the objects of a batch one after the other; each file is the caller's until the next is asked for.

    A new object begins with each site and hour, and where the frozen limits of rows or bytes (before compression) are
    reached: at the same row every time, whatever the pieces in which the rows come.
    """
    current: _Writer | None = None
    part = 0
    try:
        for record_batch in record_batches:
            for partition, start, end in _runs(record_batch):
                position = start
                while position < end:
                    if current is None or current.partition != partition or current.full:
                        if current is not None:
                            yield current.finish()
                            current.discard()
                        part += 1
                        current = _Writer(batch, partition, part, directory)
                    position = current.take(record_batch, position, end)
        if current is not None:
            yield current.finish()
    finally:
        if current is not None:
            current.discard()


def _runs(record_batch: Any) -> Iterator[tuple[str, int, int]]:
    """Cut a record batch into (partition, first row, row after the last)."""
    import pyarrow.compute as pc  # noqa: PLC0415 - only exports need Arrow

    encoded = pc.run_end_encode(record_batch.column("partition"))
    start = 0
    for partition, end in zip(encoded.values.to_pylist(), encoded.run_ends.to_pylist(), strict=True):
        yield partition, start, end
        start = end


def object_key(batch: Batch, partition: str, part: int) -> str:
    """Return the key of an object, relative to a bucket's prefix, from "DATE HOUR +SITE" ("-" for what is NULL)."""
    date, hour, site = partition.split(" ", 2)
    site = _quoted(site[1:]) if site.startswith("+") else NULL_PARTITION
    date, hour = (NULL_PARTITION if value == "-" else value for value in (date, hour))
    name = f"{batch.key.job}-{batch.key.sequence:010d}-{part:04d}.{batch.format}{_EXTENSIONS[batch.compression]}"
    return f"site={site}/date={date}/hour={hour}/{name}"


def _quoted(site: str) -> str:
    """Write a site id as part of a key. Collected ids need nothing but not to pass for NULL; others may hold anything.

    A name of a directory may have 255 bytes; what is longer is cut and told apart by its digest.
    """
    if site == NULL_PARTITION:
        return f"%5F{site[1:]}"
    quoted = quote(site, safe="")
    if len(quoted) <= _MAX_SITE_CHARS:
        return quoted
    return f"{quoted[:_MAX_SITE_CHARS]}~{hashlib.sha256(site.encode()).hexdigest()[:16]}"


class _Writer:
    """One object that is being written."""

    def __init__(self, batch: Batch, partition: str, part: int, directory: Path) -> None:
        self.partition = partition
        self._part = part
        self._key = object_key(batch, partition, part)
        self._rows_left = batch.object_rows
        self._bytes_left = batch.object_bytes
        self._rows = 0
        self._first: datetime | None = None
        self._last: datetime | None = None
        self._path = directory / f"{batch.key.job}-{batch.key.sequence}-{part}"
        self._file = _HashedFile(self._path)
        self._stream = _Pieces(_compressor(batch.compression, self._file))

    @property
    def full(self) -> bool:
        return self._rows_left <= 0 or self._bytes_left <= 0

    def take(self, record_batch: Any, start: int, end: int) -> int:
        """Write rows from `start` on until the run or the room ends; return the row to go on from."""
        text, offsets = _text_of(record_batch.column("line"))
        end = min(end, start + self._rows_left)
        # The row that crosses the limit is the object's last.
        end = min(end, bisect_left(offsets, offsets[start] + self._bytes_left, start + 1, end))
        self._stream.write(text[offsets[start] : offsets[end]])
        self._rows += end - start
        self._rows_left -= end - start
        self._bytes_left -= offsets[end] - offsets[start]
        self._note_times(record_batch.column("event_time").slice(start, end - start))
        return end

    def _note_times(self, times: Any) -> None:
        import pyarrow.compute as pc  # noqa: PLC0415 - only exports need Arrow

        found = pc.min_max(times).as_py()
        if found["min"] is not None:
            self._first = min(self._first or found["min"], found["min"])
            self._last = max(self._last or found["max"], found["max"])

    def finish(self) -> MadeObject:
        self._stream.close()
        local = self._file.close()
        record = ObjectRecord(
            part=self._part,
            key=self._key,
            row_count=self._rows,
            bytes=local.bytes,
            sha256=local.sha256,
            first_event=self._first,
            last_event=self._last,
        )
        return MadeObject(record, local)

    def discard(self) -> None:
        self._file.abandon()
        self._path.unlink(missing_ok=True)


def _text_of(column: Any) -> tuple[memoryview, memoryview]:
    """Return a string column's bytes and where each of its rows begins in them, without copying."""
    _, offsets, text = column.buffers()
    starts = memoryview(offsets).cast("i")[column.offset : column.offset + len(column) + 1]
    return memoryview(text), starts


class _Sink(Protocol):
    def write(self, data: Any, /) -> object: ...
    def close(self) -> object: ...


class _HashedFile:
    """A file that knows its digests when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._bytes = 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self._md5.update(data)
        self._bytes += len(data)
        return len(data)

    def close(self) -> LocalObject:
        self._file.close()
        return LocalObject(self._path, self._bytes, self._sha256.hexdigest(), self._md5.hexdigest())

    def abandon(self) -> None:
        self._file.close()


class _Pieces:
    """Passes what it is given on in pieces of one size."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self._buffer = bytearray()

    def write(self, data: memoryview) -> None:
        self._buffer += data
        whole = len(self._buffer) - len(self._buffer) % _PIECE_BYTES
        for start in range(0, whole, _PIECE_BYTES):
            self._sink.write(bytes(self._buffer[start : start + _PIECE_BYTES]))
        del self._buffer[:whole]

    def close(self) -> None:
        self._sink.write(bytes(self._buffer))
        self._sink.close()


class _Plain:
    def __init__(self, file: _HashedFile) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def close(self) -> None:
        """Leave the file open: its owner closes it to learn its digests."""


class _Gzip(_Plain):
    def __init__(self, file: _HashedFile) -> None:
        super().__init__(file)
        self._deflate = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW_BITS)

    def write(self, data: bytes) -> None:
        self._file.write(self._deflate.compress(data))

    def close(self) -> None:
        self._file.write(self._deflate.flush())


class _Zstd(_Plain):
    def __init__(self, file: _HashedFile) -> None:
        import pyarrow as pa  # noqa: PLC0415 - only exports need Arrow

        super().__init__(file)
        self._zstd = pa.CompressedOutputStream(_Uncloseable(file), "zstd")

    def write(self, data: bytes) -> None:
        self._zstd.write(data)

    def close(self) -> None:
        self._zstd.close()


class _Uncloseable:
    """What Arrow needs of a file to write into; its close leaves ours open."""

    closed = False

    def __init__(self, file: _HashedFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """See the class."""


_COMPRESSORS: dict[str, type[_Plain]] = {"gzip": _Gzip, "zstd": _Zstd, "none": _Plain}


def _compressor(name: str, file: _HashedFile) -> _Sink:
    return _COMPRESSORS[name](file)
