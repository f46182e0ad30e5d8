"""A bucket behind the S3 API, at AWS or elsewhere."""

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from botocore.exceptions import ClientError

from appliance.config import S3Bucket as S3Settings
from appliance.errors import BucketError
from appliance.export.buckets import Listed
from appliance.export.buckets.checks import (
    READ_BYTES,
    ActionError,
    check_probe,
    crc32_of,
    foreign,
    pieces_of,
    sha256_of,
)
from appliance.export.buckets.clients import make_client
from appliance.export.buckets.problems import ERRORS, code_of, reason_of, status_of, told
from appliance.export.buckets.profiles import profile_of
from appliance.export.buckets.uploads import PART_BYTES, Uploader, etag_of_parts
from appliance.export.files import LocalObject

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_NOT_FOUND = 404
_PRECONDITION_FAILED = 412
# HEAD's answers carry no code: what these mean is told by another question only.
_UNTOLD = frozenset({301, 307, 400, 403})
# Somebody was faster, or an answer of ours was lost and the request sent again: the check will tell.
_TAKEN = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "NoSuchUpload"})


class S3Bucket:
    """A bucket behind the S3 API."""

    def __init__(self, name: str, settings: S3Settings, *, part_bytes: int = PART_BYTES) -> None:
        self.name = name
        self._settings = settings
        self._bucket = settings.bucket
        self._profile = profile_of(settings)
        self._part_bytes = part_bytes

    # Made when it is first needed: keys that are missing or wrong are this bucket's trouble and nobody else's.
    @cached_property
    def _client(self) -> "S3Client":
        return make_client(self._settings)

    def put(self, key: str, local: LocalObject) -> None:
        with self._errors("put", key):
            found = self._head(key)
            if found is None:
                self._upload(key, local)
                found = self._head(key)
            if found is None:
                raise BucketError(f"bucket {self.name}: {key} was put and is not there: the next run tries again")
            self._check(key, local, found)

    def exists(self, key: str) -> bool:
        with self._errors("look up", key):
            return self._head(key) is not None

    def fetch(self, key: str, path: Path) -> None:
        with self._errors("fetch", key), path.open("wb") as file:
            for piece in self._read(key):
                file.write(piece)

    def list(self, prefix: str) -> Iterator[Listed]:
        with self._errors("list", prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                # Each page says it. An answer that was cut off before its list would pass for an empty one.
                told(page, "IsTruncated")
                for entry in page.get("Contents", []):
                    yield Listed(entry["Key"], entry["Size"])

    def sha256(self, key: str) -> str | None:
        with self._errors("read", key):
            try:
                return sha256_of(self._read(key))
            except ClientError as error:
                if status_of(error) == _NOT_FOUND and code_of(error) != "NoSuchBucket":
                    return None
                raise

    def remove_probe(self, key: str) -> None:
        check_probe(key)
        with self._errors("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def _upload(self, key: str, local: LocalObject) -> None:
        uploader = Uploader(
            client=self._client,
            bucket=self._bucket,
            profile=self._profile,
            options=_options_of_objects(self._settings),
            part_bytes=self._part_bytes,
        )
        try:
            uploader.upload(key, local, is_free=lambda: self._head(key) is None)
        except ClientError as error:
            if status_of(error) != _PRECONDITION_FAILED and code_of(error) not in _TAKEN:
                raise

    def _head(self, key: str) -> Mapping[str, Any] | None:
        options: dict[str, Any] = {"ChecksumMode": "ENABLED"} if self._profile.digest == "sha256" else {}
        try:
            return self._client.head_object(Bucket=self._bucket, Key=key, **options)
        except ClientError as error:
            if error.operation_name == "HeadObject" and status_of(error) == _NOT_FOUND:
                return None
            if error.operation_name == "HeadObject" and status_of(error) in _UNTOLD:
                self._ask_again(key)
            raise

    def _ask_again(self, key: str) -> None:
        """Raise what a refused HEAD could not tell. Listing is asked first: without it, any key seems refused."""
        self._client.list_objects_v2(Bucket=self._bucket, Prefix=key, MaxKeys=1)
        try:
            self._client.get_object(Bucket=self._bucket, Key=key, Range="bytes=0-0")["Body"].close()
        except ClientError as error:
            if status_of(error) != _NOT_FOUND:
                raise

    def _read(self, key: str) -> Iterator[bytes]:
        answer: Any = self._client.get_object(Bucket=self._bucket, Key=key)
        with closing(answer["Body"]) as body:
            # Without either, what was cut off would pass for an object that is shorter, or empty.
            if "transfer-encoding" not in answer["ResponseMetadata"]["HTTPHeaders"]:
                told(answer, "ContentLength")
            yield from body.iter_chunks(READ_BYTES)

    def _check(self, key: str, local: LocalObject, found: Mapping[str, Any]) -> None:
        """Compare size, then a digest the server computed; where none is the same, read the object back."""
        if told(found, "ContentLength") != local.bytes:
            raise foreign(self.name, key)
        if not self._digest_is_same(found, local) and sha256_of(self._read(key)) != local.sha256:
            raise foreign(self.name, key)

    def _digest_is_same(self, found: Mapping[str, Any], local: LocalObject) -> bool:
        digests: Mapping[str, Callable[[], bytes]] = {
            "ChecksumSHA256": lambda: bytes.fromhex(local.sha256),
            "ChecksumCRC32": lambda: crc32_of(pieces_of(local.path)),
        }
        for name, compute in digests.items():
            # The digest of an object's parts is no digest of the object.
            if found.get(name) and found.get("ChecksumType") != "COMPOSITE":
                return bool(found[name] == b64encode(compute()).decode())
        return self._etag_is_same(found, local)

    def _etag_is_same(self, found: Mapping[str, Any], local: LocalObject) -> bool:
        if str(found.get("ServerSideEncryption", "")).startswith("aws:kms"):
            return False  # there it says nothing of the bytes
        etag = str(found.get("ETag", "")).strip('"')
        return etag == (etag_of_parts(local, self._part_bytes) if "-" in etag else local.md5)

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except ERRORS as error:
            raise ActionError(self.name, action, key, reason=reason_of(error, self._settings)) from error


def _options_of_objects(settings: S3Settings) -> dict[str, Any]:
    options = {
        "ServerSideEncryption": settings.encryption,
        "SSEKMSKeyId": settings.kms_key_id,
        "StorageClass": settings.storage_class,
        "Tagging": urlencode(settings.tags),
    }
    return {name: value for name, value in options.items() if value}
