"""The disk journal for when the database is away: append-only files, synced before anything is answered.

A record is one group of events: magic, length and CRC-32 of the text, then the text, a JSON array of rows. Files
(segments) are read and deleted whole, oldest first, while new records go to a newer one. A record that a crash has cut
off was never answered; its checksum shows it, and reading goes on with the next record that is whole.
"""

import errno
import json
import logging
import os
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from appliance.disk import sync
from appliance.errors import ApplianceError, StartError
from appliance.store.events import INSERTED_COLUMNS, Event

log = logging.getLogger(__name__)

# What is drained again after a crash, at most; the ids keep it from being stored twice.
SEGMENT_BYTES = 16 * 1024 * 1024
_HEADER = struct.Struct(">4sII")
_MAGIC = b"APJ1"
_SUFFIX = ".journal"
_DAMAGED_SUFFIX = ".damaged"
# Of these it may read the file in a while: no more files or memory just now, a share that comes and goes. Eight tries
# of the drain take it half a minute.
_MAY_PASS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE})
_READ_TRIES = 8


class SpoolError(ApplianceError):
    """The spool is full, or cannot be written or read just now: nothing was kept, and nothing is lost."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of the journal."""

    number: int
    path: Path


class Spool:
    """The journal in a directory of its own. Many threads may use it; only one process does (the data's lock)."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._sizes: dict[Segment, int] = {}
        self._last_number = 0
        self._file: int | None = None
        self._active: Segment | None = None
        self._damaged: set[Segment] = set()
        self._tries: Counter[Segment] = Counter()

    def open(self) -> None:
        """Find what an earlier run has left. Raises StartError."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = sorted(path for path in self._directory.iterdir() if path.suffix in (_SUFFIX, _DAMAGED_SUFFIX))
            self._last_number = max((int(path.stem) for path in found), default=0)
            self._sizes = {
                Segment(int(path.stem), path): path.stat().st_size for path in found if path.suffix == _SUFFIX
            }
        except (OSError, ValueError) as error:
            raise StartError(f"the spool {self._directory} cannot be used: {error}") from error

    def close(self) -> None:
        """Let go of the file that is written."""
        with self._lock:
            self._close_active()

    @property
    def used_bytes(self) -> int:
        """How much the journal takes on disk."""
        return sum(self._sizes.copy().values())

    @property
    def max_bytes(self) -> int:
        """How much it may take."""
        return self._max_bytes

    @property
    def empty(self) -> bool:
        """Whether there is nothing to drain."""
        return not self._sizes

    def append(self, events: Sequence[Event]) -> None:
        """Write the events and return when they are on disk. Raises SpoolError; then none of them is promised."""
        record = _encode(events)
        with self._lock:
            if self.used_bytes + len(record) > self._max_bytes:
                raise SpoolError("the spool is full")
            try:
                self._write(record)
            except OSError as error:
                raise SpoolError(f"the spool cannot be written: {error.strerror or error}") from error

    def _write(self, record: bytes) -> None:
        file, segment = self._writable()
        promised = self._sizes[segment]
        try:
            if not promised:
                # A new file must be found again after a power cut.
                sync(self._directory)
            rest = memoryview(record)
            while rest:
                written = os.write(file, rest)
                self._sizes[segment] += written
                rest = rest[written:]
            os.fdatasync(file)
        except OSError:
            self._take_back(segment, promised)
            raise

    def _take_back(self, segment: Segment, promised: int) -> None:
        """Nobody knows how much of a record is on disk: its file gets no more, and keeps only what was promised.

        A full disk takes new files and nothing in them: one for each group that is refused would pile up.
        """
        self._close_active()
        with suppress(OSError):
            if promised:
                os.truncate(segment.path, promised)
                self._sizes[segment] = promised
            else:
                segment.path.unlink()
                del self._sizes[segment]

    def _writable(self) -> tuple[int, Segment]:
        if self._file is not None and self._active is not None and self._sizes[self._active] < SEGMENT_BYTES:
            return self._file, self._active
        self._close_active()
        self._last_number += 1
        segment = Segment(self._last_number, self._directory / f"{self._last_number:012d}{_SUFFIX}")
        file = os.open(segment.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._file, self._active = file, segment
        self._sizes[segment] = 0
        return file, segment

    def _close_active(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
        self._file = self._active = None

    def oldest(self) -> Segment | None:
        """Return the segment to drain next; it gets no more records from now on."""
        with self._lock:
            segment = min(self._sizes, key=lambda one: one.number, default=None)
            if segment is not None and segment == self._active:
                self._close_active()
            return segment

    def read(self, segment: Segment) -> Iterator[list[Event]]:
        """Yield the groups of a segment in the order in which they were written; what is damaged is passed over.

        Raises SpoolError where it may be read in a while.
        """
        try:
            content = segment.path.read_bytes()
        except OSError as error:
            self._tries[segment] += 1
            if error.errno in _MAY_PASS and self._tries[segment] < _READ_TRIES:
                raise SpoolError(f"{segment.path} cannot be read ({error.strerror}), it is tried again") from error
            # What lies behind it, and what comes in, must not wait for this one.
            log.error("%s cannot be read (%s)", segment.path, error.strerror)  # noqa: TRY400 - that says it all
            self._damaged.add(segment)
            return
        position = 0
        while position < len(content):
            group, end = _decode(content, position)
            if group is not None:
                yield group
            else:
                following = content.find(_MAGIC, position + 1)
                if following >= 0 or not _is_cut_off(content, position):
                    self._damaged.add(segment)
                end = following if following >= 0 else len(content)
                log.warning("%s: %d bytes at %d are no whole record", segment.path, end - position, position)
            position = end

    def remove(self, segment: Segment) -> None:
        """Forget a segment whose events are kept elsewhere now: delete it, or put it aside if some were unreadable."""
        with self._lock:
            # Whatever becomes of the file: it is not to be drained again.
            self._sizes.pop(segment, None)
            self._tries.pop(segment, None)
            if segment in self._damaged:
                _put_aside(segment)
            else:
                segment.path.unlink(missing_ok=True)


def _put_aside(segment: Segment) -> None:
    aside = segment.path.with_suffix(_DAMAGED_SUFFIX)
    try:
        segment.path.replace(aside)
    except OSError as error:
        log.error("%s cannot be put aside (%s)", segment.path, error.strerror)  # noqa: TRY400 - that says it all
    else:
        log.error("%s holds events that cannot be read; everything else in it is kept", aside)


def _is_cut_off(content: bytes, position: int) -> bool:
    """Return whether this is the beginning of a record: a crash in the middle of writing leaves one, never answered."""
    header = content[position : position + _HEADER.size]
    if len(header) < _HEADER.size:
        return _MAGIC.startswith(header[: len(_MAGIC)])
    magic, length, _ = _HEADER.unpack(header)
    return bool(magic == _MAGIC and len(content) < position + _HEADER.size + length)


def _decode(content: bytes, position: int) -> tuple[list[Event] | None, int]:
    """Return the record at a position and where it ends; None where there is no whole one."""
    if len(content) - position < _HEADER.size:
        return None, position
    magic, length, checksum = _HEADER.unpack_from(content, position)
    start = position + _HEADER.size
    text = content[start : start + length]
    if magic != _MAGIC or len(text) < length or zlib.crc32(text) != checksum:
        return None, position
    try:
        return [_event(row) for row in json.loads(text)], start + length
    except (ValueError, TypeError):
        # Whole, but of a version that knows other columns.
        return None, position


def _encode(events: Sequence[Event]) -> bytes:
    rows = [[value.isoformat() if isinstance(value, datetime) else value for value in e.as_row()] for e in events]
    text = json.dumps(rows, default=str, ensure_ascii=False, separators=(",", ":")).encode()
    return _HEADER.pack(_MAGIC, len(text), zlib.crc32(text)) + text


def _event(row: list[Any]) -> Event:
    fields = dict(zip(INSERTED_COLUMNS, row, strict=True))
    fields["event_id"] = UUID(fields["event_id"])
    for moment in ("timestamp", "created_at"):
        fields[moment] = datetime.fromisoformat(fields[moment])
    return Event(**fields)
