"""What a batch holds, written last to each of its buckets, and chained batch to batch."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from appliance.store.ledger import Batch, Key, ObjectRecord

MANIFEST_VERSION = 1
FOLDER = "_manifests"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The text of a manifest and its digest, which the next one carries."""

    text: str
    sha256: str


def manifest_key(key: Key) -> str:
    """Return where a batch's manifest stands, relative to a bucket's prefix."""
    return f"{FOLDER}/{key.job}/{key.sequence:010d}.json"


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
