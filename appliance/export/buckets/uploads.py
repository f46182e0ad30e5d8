"""Sending one object: in one piece, or a large one in parts that are never left behind."""

import logging
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import md5
from typing import TYPE_CHECKING, Any

from appliance.export.buckets.checks import crc32_of, pieces_of
from appliance.export.buckets.problems import ERRORS, told
from appliance.export.buckets.profiles import Profile
from appliance.export.files import LocalObject

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 32 << 20
_MAX_PARTS = 10_000
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploader:
    """How objects are sent to one bucket. `options` are those that a new object is given: tags, encryption, ..."""

    client: "S3Client"
    bucket: str
    profile: Profile
    options: Mapping[str, Any]
    part_bytes: int = PART_BYTES

    def upload(self, key: str, local: LocalObject, *, is_free: Callable[[], bool]) -> None:
        """Send an object. `is_free` is asked once more before parts become an object without a condition."""
        if local.bytes <= self.part_bytes:
            self._put(key, local)
        else:
            self._put_in_parts(key, local, is_free)

    def _put(self, key: str, local: LocalObject) -> None:
        with local.path.open("rb") as body:
            self.client.put_object(
                Bucket=self.bucket,
                Key=key,
                Body=body,
                ContentLength=local.bytes,
                **self._digest(local),
                **self._condition,
                **self.options,
            )

    def _put_in_parts(self, key: str, local: LocalObject, is_free: Callable[[], bool]) -> None:
        began: Any = self.client.create_multipart_upload(
            Bucket=self.bucket, Key=key, **self._multipart_checksum, **self.options
        )
        target = {"Bucket": self.bucket, "Key": key, "UploadId": told(began, "UploadId")}
        try:
            parts = self._send_parts(target, local)
            if self.profile.conditional_put or is_free():
                self._complete(target, parts, local)
            else:
                self._abort(target)
        except BaseException:
            # Whatever it was, the end of the process too: parts cost money and are seen by nobody.
            self._abort(target)
            raise

    def _send_parts(self, target: Mapping[str, Any], local: LocalObject) -> list[Mapping[str, Any]]:
        parts = parts_of(local, self.part_bytes)
        return [self._send_part(target, number, piece) for number, piece in enumerate(parts, start=1)]

    def _send_part(self, target: Mapping[str, Any], number: int, piece: bytes) -> Mapping[str, Any]:
        checksum: dict[str, Any] = (
            {"ChecksumCRC32": _base64(zlib.crc32(piece).to_bytes(4, "big"))}
            if self.profile.multipart_crc
            else {"ContentMD5": _base64(_md5(piece))}
        )
        sent: Any = self.client.upload_part(**target, PartNumber=number, Body=piece, **checksum)
        part = {"PartNumber": number, "ETag": told(sent, "ETag")}
        return part | ({"ChecksumCRC32": checksum["ChecksumCRC32"]} if self.profile.multipart_crc else {})

    def _complete(self, target: Mapping[str, Any], parts: list[Mapping[str, Any]], local: LocalObject) -> None:
        whole: dict[str, Any] = {}
        if self.profile.multipart_crc:
            whole = {
                "ChecksumCRC32": _base64(crc32_of(pieces_of(local.path))),
                "ChecksumType": "FULL_OBJECT",
                "MpuObjectSize": local.bytes,
            }
        client: Any = self.client
        client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, **whole, **self._condition)

    def _abort(self, target: Mapping[str, Any]) -> None:
        client: Any = self.client
        try:
            client.abort_multipart_upload(**target)
        except ERRORS as error:
            log.warning("bucket %s: parts of %s may be left behind: %s", self.bucket, target["Key"], error)

    def _digest(self, local: LocalObject) -> dict[str, Any]:
        if self.profile.digest == "sha256":
            return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": _base64(bytes.fromhex(local.sha256))}
        return {"ContentMD5": _base64(bytes.fromhex(local.md5))}

    @property
    def _condition(self) -> dict[str, Any]:
        return {"IfNoneMatch": "*"} if self.profile.conditional_put else {}

    @property
    def _multipart_checksum(self) -> dict[str, Any]:
        return {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"} if self.profile.multipart_crc else {}


def parts_of(local: LocalObject, part_bytes: int) -> Iterator[bytes]:
    """Return the parts in which an object is sent: always the same, so that their ETag can be told beforehand."""
    return pieces_of(local.path, max(part_bytes, -(-local.bytes // _MAX_PARTS)))


def etag_of_parts(local: LocalObject, part_bytes: int) -> str:
    """Return the ETag that most servers give an object in parts: the MD5 of its parts' MD5s, and their number."""
    digests = [_md5(piece) for piece in parts_of(local, part_bytes)]
    return f"{_md5(b''.join(digests)).hex()}-{len(digests)}"


def _md5(data: bytes) -> bytes:
    return md5(data, usedforsecurity=False).digest()


def _base64(digest: bytes) -> str:
    return b64encode(digest).decode()
