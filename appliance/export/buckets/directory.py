"""A directory of this machine, or of a NAS mounted here, as a bucket."""

import errno
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from appliance.config import DirectoryBucket as DirectorySettings
from appliance.disk import place, sync
from appliance.errors import BucketError
from appliance.export.buckets import Listed
from appliance.export.buckets.checks import READ_BYTES, ActionError, check_probe, foreign, pieces_of, sha256_of
from appliance.export.files import LocalObject

_INCOMING = ".incoming"
_LEFT_OVER_SECONDS = 24 * 3600
# A disk that sleeps, or a busy share, has answered by then.
_ANSWER_SECONDS = 30.0


class DirectoryBucket:
    """A directory filled like a bucket. Objects appear whole or not at all."""

    def __init__(self, name: str, settings: DirectorySettings, *, may_create: bool) -> None:
        self.name = name
        self._root = settings.path
        self._may_create = may_create

    def put(self, key: str, local: LocalObject) -> None:
        with self._errors("put", key):
            target = self._path(key)
            if not target.exists():
                self._write(target, local.path)
            # Where it stood there already, too: the run that put it there may have been killed before this.
            for directory in (target.parent, *target.parent.relative_to(self._root).parents):
                sync(self._root / directory)
            if target.stat().st_size != local.bytes or sha256_of(pieces_of(target)) != local.sha256:
                raise foreign(self.name, key)

    def exists(self, key: str) -> bool:
        with self._errors("look up", key):
            return self._path(key).exists()

    def fetch(self, key: str, path: Path) -> None:
        with self._errors("fetch", key):
            shutil.copyfile(self._path(key), path)

    def list(self, prefix: str) -> Iterator[Listed]:
        with self._errors("list", prefix):
            for path in _files(self._path(prefix.rpartition("/")[0])):
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and not key.startswith(f"{_INCOMING}/"):
                    yield Listed(key, path.stat().st_size)

    def sha256(self, key: str) -> str | None:
        with self._errors("read", key):
            try:
                return sha256_of(pieces_of(self._path(key)))
            except FileNotFoundError:
                return None

    def remove_probe(self, key: str) -> None:
        check_probe(key)
        with self._errors("delete", key):
            self._path(key).unlink()
            with suppress(OSError):  # another probe stands beside it
                self._path(key).parent.rmdir()

    def _path(self, key: str) -> Path:
        self._check_answers()
        if self._may_create:
            self._root.mkdir(parents=True, exist_ok=True)
        elif not self._root.is_dir():
            # An unmounted NAS must not be replaced by a directory on the local disk.
            raise BucketError(f"bucket {self.name}: {self._root} is not there: create or mount it")
        if key.startswith("/") or ".." in key.split("/"):
            # Keys come out of manifests, too, and anybody may have written those.
            raise BucketError(f"bucket {self.name}: {key} leads out of {self._root}")
        return self._root / key

    def _write(self, target: Path, source: Path) -> None:
        """Write to a temporary name, then link: unlike a rename, a link never replaces what stands there."""
        incoming = self._root / _INCOMING
        incoming.mkdir(exist_ok=True)
        _clear(incoming)
        temporary = incoming / uuid.uuid4().hex
        try:
            with source.open("rb") as reader, temporary.open("xb") as writer:
                shutil.copyfileobj(reader, writer, READ_BYTES)
                writer.flush()
                os.fsync(writer.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            # Where another run was faster, the caller checks whether its bytes are ours.
            place(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _check_answers(self) -> None:
        """Raise BucketError where the file system does not answer: nothing that is asked of it would come back.

        A share whose server is gone makes every call wait for ever (nfs(5), "hard", which is the default). What a disk
        has left is asked of the server each time.
        """
        answered = threading.Event()

        def ask() -> None:
            # Whatever it is that goes wrong, whoever asked for something meets it too.
            with suppress(OSError):
                os.statvfs(self._root)
            answered.set()

        threading.Thread(target=ask, name=f"bucket {self.name}", daemon=True).start()
        if not answered.wait(_ANSWER_SECONDS):
            raise BucketError(
                f"bucket {self.name}: {self._root} does not answer: see whether the share's server is there, or mount "
                "it again"
            )

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ActionError(self.name, action, key, reason=_reason(error)) from error


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno == errno.EROFS:
        return f"{reason}: mount it for writing, and let the service write there (systemd: ReadWritePaths)"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"{reason}: the appliance's user needs to read, list and write here"
    return reason


def _files(directory: Path) -> Iterator[Path]:
    """Find every file below, while others may come and temporary ones go; a directory that is not there is empty."""
    try:
        with os.scandir(directory) as entries:
            found = list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _clear(incoming: Path) -> None:
    for left_over in incoming.iterdir():
        # Of a process that was killed; younger ones may belong to another, which may remove them just now.
        with suppress(FileNotFoundError):
            if left_over.stat().st_mtime < time.time() - _LEFT_OVER_SECONDS:
                left_over.unlink()
