"""Files on their way to a bucket, and their digests."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LocalObject:
    """An object as it lies on the disk before its upload; `md5` is for S3's own check of it."""

    path: Path
    bytes: int
    sha256: str
    md5: str


def described(path: Path) -> LocalObject:
    """Describe a file that is there already: a manifest, or an object fetched from a bucket."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return LocalObject(path, path.stat().st_size, sha256, md5)


class HashedFile:
    """A file that knows its digests when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._bytes = 0

    def write(self, data: Any) -> int:
        """Append bytes and return how many."""
        self._file.write(data)
        self._sha256.update(data)
        self._md5.update(data)
        self._bytes += len(data)
        return len(data)

    def close(self) -> LocalObject:
        """Close the file and describe it."""
        self._file.close()
        return LocalObject(self._path, self._bytes, self._sha256.hexdigest(), self._md5.hexdigest())

    def abandon(self) -> None:
        """Close the file, which nobody needs."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class ArrowSink:
    """What Arrow needs of a file to write into; its close leaves ours open."""

    closed = False

    def __init__(self, file: HashedFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """Append bytes."""
        return self._file.write(data)

    def writable(self) -> bool:
        """Say so."""
        return True

    def readable(self) -> bool:
        """Say so."""
        return False

    def seekable(self) -> bool:
        """Say so."""
        return False

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """See the class."""
