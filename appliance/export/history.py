"""Never over history: what stands in a bucket and is not ours is neither written over nor gone on with."""

from collections.abc import Iterator
from contextlib import suppress

from appliance.errors import BucketAheadError, ManifestError
from appliance.export import buckets, manifest
from appliance.export.means import Means
from appliance.store import ledger
from appliance.store.ledger import Batch, Delivery, Key


def bucket_ahead(bucket: str, prefix: str, key: Key) -> BucketAheadError:
    """Return the error of a batch whose manifest stands there and is not ours: history is not ours to continue."""
    where = buckets.join(prefix, manifest.manifest_key(key))
    return BucketAheadError(
        f"bucket {bucket} is ahead: {where} stands there, and this ledger does not know it: "
        f"restore from it (appliance restore {bucket}), or choose another prefix"
    )


def ahead_of(means: Means, key: Key, *, bucket: str, prefix: str) -> Key | None:
    """Return the batch of somebody else for which `key`, the next to be sealed, cannot come to a bucket; None: it can.

    Raises BucketError, and OvertakenError where another run has sealed it meanwhile.
    """
    if not _was_used(means, key.job, bucket, prefix):
        return _newest_foreign(means, key.job, bucket, prefix)
    if not means.buckets[bucket].exists(buckets.join(prefix, manifest.manifest_key(key))):
        return None
    with means.db.connection() as conn:
        if ledger.exists(conn, key):
            raise ledger.OvertakenError(f"another run has sealed batch {key}")
    return key


def check_first_attempt(means: Means, batch: Batch, delivery: Delivery) -> None:
    """Refuse to bring a batch to a bucket where history stands that is not ours. Raises BucketAheadError, BucketError.

    Before the first attempt nothing of ours can stand there, unless it was copied or the ledger was restored: then it
    is the very same manifest.
    """
    bucket, prefix = delivery.bucket, delivery.prefix
    foreign = None
    if not _was_used(means, batch.key.job, bucket, prefix):
        foreign = _newest_foreign(means, batch.key.job, bucket, prefix)
    if foreign is None and _is_foreign(means, batch.key, bucket, prefix):
        foreign = batch.key
    if foreign is not None:
        raise bucket_ahead(bucket, prefix, foreign)


def _was_used(means: Means, job: str, bucket: str, prefix: str) -> bool:
    with means.db.connection() as conn:
        return ledger.has_been_sent(conn, job, bucket, prefix)


def _newest_foreign(means: Means, job: str, bucket: str, prefix: str) -> Key | None:
    """Return the newest batch in a bucket unless the ledger knows it, and with it all that it is chained to.

    History need not begin with the first batch: a rule of the bucket may have removed what is old.
    """
    newest = max(_batches_in(means, job, bucket, prefix), key=lambda key: key.sequence, default=None)
    return newest if newest is not None and _is_foreign(means, newest, bucket, prefix) else None


def _batches_in(means: Means, job: str, bucket: str, prefix: str) -> Iterator[Key]:
    """Find the batches of a job whose manifests stand in a bucket; others may keep things of their own there."""
    below = buckets.join(prefix, "")
    for listed in means.buckets[bucket].list(f"{below}{manifest.folder(job)}"):
        with suppress(ManifestError):
            yield manifest.key_of(listed.key.removeprefix(below))


def _is_foreign(means: Means, key: Key, bucket: str, prefix: str) -> bool:
    """Return whether a manifest stands there for a batch of this name, and is not of this ledger's batch.

    The ledger is asked after the bucket: of two runs at once the other may have delivered it meanwhile.
    """
    found = means.buckets[bucket].sha256(buckets.join(prefix, manifest.manifest_key(key)))
    if found is None:
        return False
    with means.db.connection() as conn:
        if not ledger.exists(conn, key):
            return True
        ours = ledger.load(conn, key)
    if any(one.attempts for one in ours.deliveries if (one.bucket, one.prefix) == (bucket, prefix)):
        return False
    if ours.manifest is not None:
        return manifest.from_text(ours.manifest).sha256 != found
    return not _was_delivered_by_us(means, ours, bucket, prefix)


def _was_delivered_by_us(means: Means, batch: Batch, bucket: str, prefix: str) -> bool:
    """Return whether what stands there is this very batch: a failover or an old backup has lost that it was sent."""
    with means.scratch(batch.key.job) as directory:
        path = directory / "found"
        means.buckets[bucket].fetch(buckets.join(prefix, manifest.manifest_key(batch.key)), path)
        try:
            return ledger.is_same_seal(manifest.parse(path.read_bytes(), batch.key).batch, batch)
        except ManifestError:
            return False
