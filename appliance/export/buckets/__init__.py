"""Buckets: S3 and local directories. An object is put once, checked there, and never written over."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from appliance.config import Bucket as BucketSettings
from appliance.config import S3Bucket as S3Settings
from appliance.config import Settings
from appliance.export.files import LocalObject


@dataclass(frozen=True, slots=True)
class Listed:
    """An object that stands in a bucket: its whole key and its size."""

    key: str
    bytes: int


class Bucket(Protocol):
    """A place for objects. Keys are whole: they begin with the batch's prefix. All methods raise BucketError."""

    name: str

    def put(self, key: str, local: LocalObject) -> None:
        """Put an object and check that its bytes stand there.

        Doing it again changes nothing. Raises ForeignObjectError, and changes nothing, when other bytes stand there.
        """

    def exists(self, key: str) -> bool:
        """Return whether anything stands at the key."""

    def fetch(self, key: str, path: Path) -> None:
        """Copy an object into a local file."""

    def list(self, prefix: str) -> Iterator[Listed]:
        """Find the objects whose keys begin with the prefix (which need not end at a slash), in no promised order."""

    def sha256(self, key: str) -> str | None:
        """Read an object as it stands there and return its digest; None where nothing stands."""


class ProbedBucket(Bucket, Protocol):
    """A bucket that can be tried. Nothing else is ever removed, so no other part of the house sees this method."""

    def remove_probe(self, key: str) -> None:
        """Remove a probe object; any other key is refused."""


def build(settings: Settings) -> Mapping[str, Bucket]:
    """Return the configured buckets by name; no connection is made yet."""
    return build_probed(settings)


def build_probed(settings: Settings) -> Mapping[str, ProbedBucket]:
    """Return the configured buckets as `appliance check --probe` needs them."""
    return {name: _build(name, bucket, settings.server.data_dir) for name, bucket in settings.buckets.items()}


def _build(name: str, settings: BucketSettings, data_dir: Path) -> ProbedBucket:
    if isinstance(settings, S3Settings):
        from appliance.export.buckets.s3 import S3Bucket  # noqa: PLC0415 - boto3 is heavy; directories do without

        return S3Bucket(name, settings)
    from appliance.export.buckets.directory import DirectoryBucket  # noqa: PLC0415 - it needs what stands above

    return DirectoryBucket(name, settings, may_create=settings.path.is_relative_to(data_dir))


def join(prefix: str, key: str) -> str:
    """Put a batch's prefix before a key."""
    return f"{prefix}/{key}" if prefix else key
