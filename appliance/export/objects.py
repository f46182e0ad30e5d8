"""The rows of a batch -> its objects, one file after the other, cut at the same rows however the rows arrive."""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from appliance.export import formats
from appliance.export.files import HashedFile, LocalObject
from appliance.store.ledger import Batch, ObjectRecord

if TYPE_CHECKING:
    from datetime import datetime

# Hive's own name for a partition whose value is NULL.
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"

_MAX_SITE_CHARS = 180


@dataclass(frozen=True, slots=True)
class MadeObject:
    """A finished object of a batch and what the ledger keeps of it."""

    record: ObjectRecord
    local: LocalObject


def write_objects(record_batches: Iterable[Any], batch: Batch, directory: Path) -> Iterator[MadeObject]:
    """Write the objects of a batch one after the other; each file is the caller's until the next is asked for.

    A new object begins with each site and hour, and where the frozen limits of rows or bytes (before compression) are
    reached: at the same row every time, whatever the pieces in which the rows come.
    """
    current: _Writer | None = None
    part = 0
    try:
        for record_batch in record_batches:
            offsets = formats.row_offsets(record_batch)
            for partition, start, end in _runs(record_batch):
                position = start
                while position < end:
                    if current is None or current.partition != partition or current.full:
                        if current is not None:
                            yield current.finish()
                            current.discard()
                        part += 1
                        current = _Writer(batch, partition, part, directory)
                    position = current.take(record_batch, offsets, position, end)
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
    name = f"{batch.key.job}-{batch.key.sequence:010d}-{part:04d}.{formats.extension(batch)}"
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
        self._file = HashedFile(self._path)
        self._encoder = formats.encoder(batch, self._file)

    @property
    def full(self) -> bool:
        return self._rows_left <= 0 or self._bytes_left <= 0

    def take(self, record_batch: Any, offsets: Sequence[int], start: int, end: int) -> int:
        """Write rows from `start` on until the run or the room ends; return the row to go on from."""
        end = min(end, start + self._rows_left)
        # The row that crosses the limit is the object's last.
        end = min(end, bisect_left(offsets, offsets[start] + self._bytes_left, start + 1, end))
        self._encoder.write(record_batch, offsets, start, end)
        self._rows += end - start
        self._rows_left -= end - start
        self._bytes_left -= offsets[end] - offsets[start]
        self._note_times(record_batch.column("timestamp").slice(start, end - start))
        return end

    def _note_times(self, times: Any) -> None:
        import pyarrow.compute as pc  # noqa: PLC0415 - only exports need Arrow

        found = pc.min_max(times).as_py()
        if found["min"] is not None:
            self._first = min(self._first or found["min"], found["min"])
            self._last = max(self._last or found["max"], found["max"])

    def finish(self) -> MadeObject:
        self._encoder.close()
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
        self._encoder.stop()
        self._file.abandon()
