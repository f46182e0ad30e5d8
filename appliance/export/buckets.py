"""Buckets: S3 and local directories. An object is put once, checked there, and never written over."""

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from appliance.config import Bucket as BucketSettings
from appliance.config import DirectoryBucket as DirectorySettings
from appliance.config import S3Bucket as S3Settings
from appliance.config import Settings
from appliance.errors import BucketError, ForeignObjectError
from appliance.export.files import LocalObject

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_READ_BYTES = 1 << 20
_LEFT_OVER_SECONDS = 24 * 3600
# Where a PUT with If-None-Match is known to be honoured; elsewhere the key is looked up first and checked afterwards.
_CONDITIONAL_PUT = frozenset({"aws", "r2", "minio"})
# The newer checksums that boto3 adds by itself are refused by others than AWS.
_OWN_CHECKSUMS = frozenset({"aws"})
_MD5_ETAG = re.compile(r'"[0-9a-f]{32}"')
_ATTEMPTS = 3


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


def build(settings: Settings) -> Mapping[str, Bucket]:
    """Return the configured buckets by name; no connection is made yet."""
    return {name: _build(name, bucket, settings.server.data_dir) for name, bucket in settings.buckets.items()}


def _build(name: str, settings: BucketSettings, data_dir: Path) -> Bucket:
    if isinstance(settings, S3Settings):
        return S3Bucket(name, settings)
    return DirectoryBucket(name, settings, may_create=settings.path.is_relative_to(data_dir))


def join(prefix: str, key: str) -> str:
    """Put a batch's prefix before a key."""
    return f"{prefix}/{key}" if prefix else key


class S3Bucket:
    """A bucket behind the S3 API."""

    def __init__(self, name: str, settings: S3Settings) -> None:
        self.name = name
        self._bucket = settings.bucket
        self._conditional = settings.provider in _CONDITIONAL_PUT
        # A session of its own: boto3's default one is not made for threads.
        self._client: S3Client = boto3.session.Session().client("s3", **_client_options(settings))

    def put(self, key: str, local: LocalObject) -> None:
        with self._errors("put", key):
            found = self._head(key)
            if found is None:
                self._upload(key, local)
                found = self._head(key)
            if found is None:
                raise BucketError(f"bucket {self.name}: {key} was put and is not there")
            self._check(key, local, found)

    def exists(self, key: str) -> bool:
        with self._errors("look up", key):
            return self._head(key) is not None

    def fetch(self, key: str, path: Path) -> None:
        with self._errors("fetch", key), path.open("wb") as file:
            body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"]
            shutil.copyfileobj(body, file, _READ_BYTES)

    def _upload(self, key: str, local: LocalObject) -> None:
        options: dict[str, Any] = {"IfNoneMatch": "*"} if self._conditional else {}
        try:
            with local.path.open("rb") as body:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=key,
                    Body=body,
                    ContentLength=local.bytes,
                    ContentMD5=b64encode(bytes.fromhex(local.md5)).decode(),
                    **options,
                )
        except ClientError as error:
            # Somebody was faster, or an answer of ours was lost and the request sent again: the check will tell.
            if _status(error) != 412:  # noqa: PLR2004 - precondition failed
                raise

    def _head(self, key: str) -> Mapping[str, Any] | None:
        try:
            return self._client.head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if _status(error) == 404:  # noqa: PLR2004 - not found
                return None
            raise

    def _check(self, key: str, local: LocalObject, found: Mapping[str, Any]) -> None:
        """Compare size, then a digest the server computed; where it gives none, read the object back."""
        etag = str(found.get("ETag", ""))
        if found["ContentLength"] != local.bytes:
            raise _foreign(self.name, key)
        if _MD5_ETAG.fullmatch(etag) and etag.strip('"') == local.md5:
            return
        body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"]
        if _sha256(iter(lambda: body.read(_READ_BYTES), b"")) != local.sha256:
            raise _foreign(self.name, key)

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            hint = _HINTS.get(code, "")
            raise BucketError(f"bucket {self.name}: cannot {action} {key}: {error}{hint}") from error
        except (BotoCoreError, OSError) as error:
            raise BucketError(f"bucket {self.name}: cannot {action} {key}: {error}") from error


_HINTS = {
    "NoSuchBucket": ": create the bucket, or correct `bucket`",
    "404": ": does the bucket exist?",
    "403": ": check the keys, and that they may read, list and write here",
    "AccessDenied": ": the keys need to read, list and write here",
    "InvalidAccessKeyId": ": check access_key_id",
    "SignatureDoesNotMatch": ": check secret_access_key",
}


def _client_options(settings: S3Settings) -> dict[str, Any]:
    checksums: Literal["when_supported", "when_required"] = (
        "when_supported" if settings.provider in _OWN_CHECKSUMS else "when_required"
    )
    options: dict[str, Any] = {
        "config": Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if settings.endpoint_url else "auto"},
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            connect_timeout=settings.connect_timeout_seconds,
            read_timeout=settings.read_timeout_seconds,
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
        ),
        "endpoint_url": settings.endpoint_url or None,
        # Servers of one's own care little about the region, but a signature needs one.
        "region_name": settings.region or ("us-east-1" if settings.endpoint_url else None),
    }
    if settings.access_key_id.get_secret_value():
        options["aws_access_key_id"] = settings.access_key_id.get_secret_value()
        options["aws_secret_access_key"] = settings.secret_access_key.get_secret_value()
    return options


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


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
            if target.stat().st_size != local.bytes or _file_sha256(target) != local.sha256:
                raise _foreign(self.name, key)

    def exists(self, key: str) -> bool:
        with self._errors("look up", key):
            return self._path(key).exists()

    def fetch(self, key: str, path: Path) -> None:
        with self._errors("fetch", key):
            shutil.copyfile(self._path(key), path)

    def _path(self, key: str) -> Path:
        if self._may_create:
            self._root.mkdir(parents=True, exist_ok=True)
        elif not self._root.is_dir():
            # An unmounted NAS must not be replaced by a directory on the local disk.
            raise BucketError(f"bucket {self.name}: {self._root} is not there: create or mount it")
        return self._root / key

    def _write(self, target: Path, source: Path) -> None:
        """Write to a temporary name, then link: unlike a rename, a link never replaces what stands there."""
        incoming = self._root / ".incoming"
        incoming.mkdir(exist_ok=True)
        for left_over in incoming.iterdir():
            # Of a process that was killed; younger ones may belong to another, which may remove them just now.
            with suppress(FileNotFoundError):
                if left_over.stat().st_mtime < time.time() - _LEFT_OVER_SECONDS:
                    left_over.unlink()
        temporary = incoming / uuid.uuid4().hex
        try:
            with source.open("rb") as reader, temporary.open("xb") as writer:
                shutil.copyfileobj(reader, writer, _READ_BYTES)
                writer.flush()
                os.fsync(writer.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            _place(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        for directory in (target.parent, *target.parent.relative_to(self._root).parents):
            _sync_directory(self._root / directory)

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BucketError(f"bucket {self.name}: cannot {action} {key}: {error.strerror or error}") from error


def _place(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)
    except FileExistsError:
        # Another run was faster; whether its bytes are ours is checked by the caller.
        return
    except OSError as error:
        # Some network file systems have no links.
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}:
            raise
        if not target.exists():
            temporary.rename(target)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(pieces: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _foreign(bucket: str, key: str) -> ForeignObjectError:
    return ForeignObjectError(
        f"bucket {bucket}: other bytes stand at {key}, and nothing there is ever written over: "
        "choose another prefix, or find out who wrote it"
    )
