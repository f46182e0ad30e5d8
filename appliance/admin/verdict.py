"""Whether all is well, in one sentence; and if not, what is wrong and what to do about it."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.admin.filters import minute, number, size
from appliance.admin.sentences import ANY_SITE, held_up, sentence, trouble_of
from appliance.config import Settings
from appliance.store.overview import BucketState, JobState, Overview
from appliance.store.restoring import unfinished
from appliance.store.runs import Run
from appliance.words import counted

_LITTLE_DISK_BYTES = 1_000_000_000
_LITTLE_DISK_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is not as it should be."""

    what: str
    why: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """What is left where the data directory stands."""

    free: int
    total: int

    @property
    def is_short(self) -> bool:
        """Whether it will be full before anybody looks again."""
        return self.free < max(_LITTLE_DISK_BYTES, self.total * _LITTLE_DISK_SHARE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`troubles` need somebody; `hints` are worth knowing."""

    troubles: tuple[Trouble, ...]
    hints: tuple[Trouble, ...]

    @property
    def well(self) -> bool:
        """Whether nobody needs to do anything."""
        return not self.troubles

    @property
    def headline(self) -> str:
        """What the page says first."""
        if self.well:
            return "All is well."
        return "One thing needs you." if len(self.troubles) == 1 else f"{len(self.troubles)} things need you."


def disk_of(data_dir: Path) -> Disk:
    """Return how much room there is for data."""
    usage = shutil.disk_usage(data_dir)
    return Disk(usage.free, usage.total)


def of(
    settings: Settings, state: Overview, *, last_runs: dict[str, Run], disk: Disk, warnings: Iterable[str]
) -> Verdict:
    """Judge what is known."""
    troubles = [Trouble(sentence(warning)) for warning in warnings]
    troubles += [Trouble(held_up(writer)) for writer in state.open_writers]
    if state.restoring:
        troubles.append(Trouble(sentence(unfinished(state.restoring))))
    troubles += _of_jobs(state.jobs, last_runs)
    if disk.is_short:
        troubles.append(
            Trouble(
                f"Only {size(disk.free)} are left on the disk of the data directory.",
                advice="Make room, or set retention.keep_days; with a full disk no event is taken in.",
            )
        )
    return Verdict(tuple(troubles), tuple(_hints(settings)))


def _of_jobs(jobs: Iterable[JobState], last_runs: dict[str, Run]) -> Iterator[Trouble]:
    for job in jobs:
        failing = [bucket for bucket in job.buckets if bucket.pending and bucket.last_error]
        yield from (_of_bucket(bucket) for bucket in failing)
        run = last_runs.get(job.job)
        if run is not None and run.outcome == "failed" and not failing:
            yield Trouble(f"The last run of job {job.job} failed.", sentence(run.message))


def _of_bucket(bucket: BucketState) -> Trouble:
    owed = counted(bucket.pending, "batch", "batches")
    again = (
        f"It is tried again at {minute(bucket.retry_at)} UTC" if bucket.retry_at else "The job's next run tries again"
    )
    return Trouble(
        f"Bucket {bucket.bucket} is missing {owed} of job {bucket.job}.",
        trouble_of(bucket.bucket, bucket.last_error or ""),
        f"Nothing is lost. {again}; mend it and press \u201cRetry\u201d on the Exports page to do so now.",
    )


def _hints(settings: Settings) -> Iterator[Trouble]:
    if not settings.sites:
        yield Trouble(sentence(ANY_SITE), advice="Name your sites under [[sites]] in config.toml.")
    for site in settings.unexported_sites():
        yield Trouble(f"No job exports the site {site}: its events stay here.", advice="Add it to an [exports] job.")


def summary(state: Overview) -> str:
    """Say in numbers what is going on."""
    hour = sum(site.last_hour for site in state.sites)
    waiting = sum(job.waiting for job in state.jobs)
    came = f"{number(hour)} {'event' if hour == 1 else 'events'} came in during the last hour"
    if not state.events:
        return "Nothing has come in yet."
    return f"{came}; {number(waiting)} wait for their export." if waiting else f"{came}; all of them are exported."
