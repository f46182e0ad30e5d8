"""Trying a bucket: an object is written, read, listed and deleted, and each failure is a sentence."""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from appliance.config import Settings
from appliance.errors import BucketError
from appliance.export.buckets import ProbedBucket, build_probed, join
from appliance.export.buckets.checks import PROBES, ActionError
from appliance.export.files import LocalObject, described


@dataclass(slots=True)
class Probe:
    """What was tried in a bucket and held, and what failed. Deleting may fail: exports never delete."""

    bucket: str
    held: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """All of it in one line."""
        held = f"{', '.join(self.held)}: works" if self.held else ""
        return f"bucket {self.bucket}: " + "; ".join(filter(None, [held, *self.failures, *self.warnings]))


def probe_all(settings: Settings) -> list[Probe]:
    """Try every configured bucket, each below its own prefix."""
    with TemporaryDirectory() as directory:
        local = _local_object(Path(directory))
        return [probe(bucket, settings.buckets[name].prefix, local) for name, bucket in build_probed(settings).items()]


def probe_one(settings: Settings, name: str) -> Probe:
    """Try one configured bucket below its own prefix."""
    with TemporaryDirectory() as directory:
        return probe(build_probed(settings)[name], settings.buckets[name].prefix, _local_object(Path(directory)))


def probe(bucket: ProbedBucket, prefix: str, local: LocalObject) -> Probe:
    """Try a bucket until something fails: what comes after needs what came before."""
    result = Probe(bucket.name)
    key = join(prefix, f"{PROBES}/{uuid4()}")
    steps = (
        ("listing", partial(_find, bucket, key, 0)),
        ("writing", partial(bucket.put, key, local)),
        ("reading", partial(_read, bucket, key, local)),
        ("finding", partial(_find, bucket, key, 1)),
    )
    for name, step in steps:
        try:
            step()
        except BucketError as error:
            result.failures.append(f"{name} failed: {_reason(bucket, error)}")
            break
        result.held.append(name)
    _remove(bucket, key, result)
    return result


def _local_object(directory: Path) -> LocalObject:
    path = directory / "probe"
    path.write_text("`appliance check --probe` wrote this, and could not delete it. It may go.\n")
    return described(path)


def _find(bucket: ProbedBucket, key: str, number: int) -> None:
    found = [listed.key for listed in bucket.list(key)]
    if found != [key] * number:
        raise BucketError(f"{len(found)} objects are listed at {key}, where there should be {number}")


def _read(bucket: ProbedBucket, key: str, local: LocalObject) -> None:
    if bucket.sha256(key) != local.sha256:
        raise BucketError(f"what was written to {key} is not what is read there")


def _remove(bucket: ProbedBucket, key: str, result: Probe) -> None:
    if "writing" in result.held:
        try:
            bucket.remove_probe(key)
        except BucketError as error:
            result.warnings.append(f"warning: deleting failed, so {key} stays there: {_reason(bucket, error)}")
        else:
            result.held.append("deleting")
    elif "listing" in result.held:
        # It may have arrived all the same; what cannot be removed either was said already.
        with suppress(BucketError):
            bucket.remove_probe(key)


def _reason(bucket: ProbedBucket, error: BucketError) -> str:
    # The line has the bucket's name already.
    return error.reason if isinstance(error, ActionError) else str(error).removeprefix(f"bucket {bucket.name}: ")
