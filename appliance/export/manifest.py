"""What a batch holds, written last to each of its buckets, and chained batch to batch."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from appliance.errors import ManifestError
from appliance.store.events import EXPORT_SCHEMA_VERSION
from appliance.store.ledger import Batch, Delivery, Key, ObjectRecord
from appliance.store.ranges import Range

MANIFEST_VERSION = 1
FOLDER = "_manifests"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The text of a manifest and its digest, which the next one carries."""

    text: str
    sha256: str


def folder(job: str) -> str:
    """Return what the keys of a job's manifests begin with, relative to a bucket's prefix."""
    return f"{FOLDER}/{job}/"


def manifest_key(key: Key) -> str:
    """Return where a batch's manifest stands, relative to a bucket's prefix."""
    return f"{folder(key.job)}{key.sequence:010d}.json"


def from_text(text: str) -> Manifest:
    """Return a recorded manifest."""
    return Manifest(text, digest(text.encode()))


def digest(content: bytes) -> str:
    """Return what a manifest says of the one before it."""
    return hashlib.sha256(content).hexdigest()


def follows(text: str, before: str | None) -> bool:
    """Return whether a manifest carries the digest of the one before it, or of none where there is none."""
    expected = digest(before.encode()) if before is not None else None
    return bool(json.loads(text)["previous_sha256"] == expected)


def build(
    batch: Batch, objects: Iterable[ObjectRecord], *, installation: UUID, previous_sha256: str | None
) -> Manifest:
    """Describe a batch: all that the ledger froze, its objects, and the digest of the manifest before it.

    The same batch always makes the same text: nothing in it comes from a clock or from a bucket.
    """
    content = {
        "manifest_version": MANIFEST_VERSION,
        "installation": str(installation),
        "kind": batch.kind,
        "job": batch.key.job,
        "sequence": batch.key.sequence,
        "previous_sha256": previous_sha256,
        "sealed_at": _utc(batch.sealed_at),
        "row_count": batch.row_count,
        "format": batch.format,
        "compression": batch.compression,
        "object_rows": batch.object_rows,
        "object_bytes": batch.object_bytes,
        "escape_formulas": batch.escape_formulas,
        "schema_version": batch.schema_version,
        "ranges": [
            {"site": r.site, "except_sites": list(r.except_sites), "from_id": r.from_id, "to_id": r.to_id}
            for r in batch.ranges
        ],
        "buckets": [{"name": d.bucket, "prefix": d.prefix} for d in batch.deliveries],
        "objects": [_object(record) for record in objects],
    }
    return from_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _object(record: ObjectRecord) -> dict[str, str | int | None]:
    return {
        "key": record.key,
        "row_count": record.row_count,
        "bytes": record.bytes,
        "sha256": record.sha256,
        "first_event": _utc(record.first_event),
        "last_event": _utc(record.last_event),
    }


def _utc(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat() if moment else None


# -- reading them back ------------------------------------------------------------------------------------------------

_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# PostgreSQL has no NUL in a text.
_Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Object(_Part):
    key: str
    row_count: _Count
    bytes: _Count
    sha256: _Sha256
    first_event: AwareDatetime | None
    last_event: AwareDatetime | None


class _RangePart(_Part):
    site: _Text
    except_sites: list[_Text]
    from_id: _Count
    to_id: _Count


class _BucketPart(_Part):
    name: _Text
    prefix: _Text


class _Content(_Part):
    """What `build` writes. A key that is missing, or one that this version does not know, makes it another thing."""

    manifest_version: Literal[1]
    installation: str
    kind: Literal["batch"]
    job: str
    sequence: Annotated[int, Field(gt=0, lt=2**63)]
    previous_sha256: _Sha256 | None
    sealed_at: AwareDatetime
    row_count: _Count
    format: Literal["jsonl", "parquet", "csv"]
    compression: Literal["gzip", "zstd", "none"]
    object_rows: _Count
    object_bytes: _Count
    escape_formulas: bool
    schema_version: Annotated[int, Field(le=EXPORT_SCHEMA_VERSION)]
    ranges: Annotated[list[_RangePart], Field(min_length=1)]
    buckets: list[_BucketPart]
    objects: Annotated[list[_Object], Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A batch as its manifest describes it, all its deliveries pending."""

    batch: Batch
    objects: tuple[ObjectRecord, ...]
    sha256: str
    previous_sha256: str | None


def key_of(name: str) -> Key:
    """Return the batch whose manifest stands at a key, relative to a bucket's prefix. Raises ManifestError."""
    match = re.fullmatch(rf"{FOLDER}/([a-z0-9_-]{{1,63}})/(\d{{10,18}})\.json", name)
    if match is None:
        raise ManifestError(f"{name[:200]} is no key of a manifest")
    return Key(match[1], int(match[2]))


def parse(content: bytes, key: Key) -> Described:
    """Read the manifest of a batch. Raises ManifestError unless it is one, and this batch's.

    Whoever can write into the bucket may have written it: nothing in it is believed that could lead elsewhere.
    """
    try:
        text = content.decode()
        read = _Content.model_validate_json(text)
    except UnicodeDecodeError as error:
        raise ManifestError(f"{manifest_key(key)} is no text") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ManifestError(
            f"{manifest_key(key)} is no manifest that this version reads: {where}: {first['msg']}"
        ) from error
    if (read.job, read.sequence) != (key.job, key.sequence):
        raise ManifestError(f"{manifest_key(key)} is the manifest of another batch: {read.job[:100]} {read.sequence}")
    for part, entry in enumerate(read.objects, 1):
        if not _is_key_of(key, part, entry.key):
            raise ManifestError(f"{manifest_key(key)} names an object that is none of its batch: {entry.key[:200]!r}")
    return Described(
        batch=_batch_of(read, key, text),
        objects=tuple(_record_of(part, entry) for part, entry in enumerate(read.objects, 1)),
        sha256=digest(content),
        previous_sha256=read.previous_sha256,
    )


def _is_key_of(key: Key, part: int, name: str) -> bool:
    pattern = rf"site=[^/]*/date=[^/]+/hour=[^/]+/{re.escape(key.job)}-{key.sequence:010d}-{part:04d}\.[a-z.]+"
    return re.fullmatch(pattern, name) is not None and "/../" not in name


def _batch_of(content: _Content, key: Key, text: str) -> Batch:
    return Batch(
        key=key,
        kind=content.kind,
        sealed_at=content.sealed_at,
        row_count=content.row_count,
        format=content.format,
        compression=content.compression,
        object_rows=content.object_rows,
        object_bytes=content.object_bytes,
        schema_version=content.schema_version,
        ranges=tuple(
            Range(site=r.site, from_id=r.from_id, to_id=r.to_id, except_sites=tuple(r.except_sites))
            for r in content.ranges
        ),
        deliveries=tuple(Delivery(bucket=bucket.name, prefix=bucket.prefix) for bucket in content.buckets),
        manifest=text,
        escape_formulas=content.escape_formulas,
    )


def _record_of(part: int, entry: _Object) -> ObjectRecord:
    return ObjectRecord(
        part=part,
        key=entry.key,
        row_count=entry.row_count,
        bytes=entry.bytes,
        sha256=entry.sha256,
        first_event=entry.first_event,
        last_event=entry.last_event,
    )
