"""What a run has done: told to people by its summary, and to the ledger by its figures."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from appliance.store.sealing import Writer
from appliance.words import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one run did. `problems` are deliveries that stay pending, each with its reason.

    `batches` every bucket has now; of those that another bucket still waits for, `partly` says how many each got.
    Buckets that failed before are `resting` until a moment in UTC. Nothing was done where another run was under way
    (`skipped`), or had been made for the moment at which this one was due (`done_elsewhere`).
    """

    job: str
    batches: int = 0
    row_count: int = 0
    partly: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    blockers: tuple[Writer, ...] = ()
    resting: Mapping[str, datetime] = field(default_factory=dict)
    skipped: bool = False
    done_elsewhere: bool = False

    @property
    def failed(self) -> bool:
        """Whether something was not delivered that should have been."""
        return bool(self.problems)

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.skipped:
            return "another run of this job is under way"
        if self.done_elsewhere:
            return "another appliance has run it"
        done = (
            [f"{counted(self.row_count, 'event', 'events')} in {_batches(self.batches)} delivered"]
            if self.batches
            else []
        )
        done += [f"{_batches(number)} delivered to {bucket}" for bucket, number in self.partly.items()]
        waits = [f"nothing new was sealed: {writer}" for writer in self.blockers]
        waits += [f"bucket {name} failed and is left alone until {at:%H:%M:%S}" for name, at in self.resting.items()]
        return "; ".join([*(done or ["nothing new delivered"]), *waits, *self.problems])


def _batches(number: int) -> str:
    return counted(number, "batch", "batches")


@dataclass(slots=True)
class Tally:
    """What a run has done so far, and which buckets have failed in it or are left alone (`broken`)."""

    job: str
    batches: int = 0
    row_count: int = 0
    partly: Counter[str] = field(default_factory=Counter)
    broken: set[str] = field(default_factory=set)
    resting: dict[str, datetime] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def report(self, blockers: tuple[Writer, ...] = ()) -> Report:
        """Return what has been done; each problem is told once."""
        problems = tuple(dict.fromkeys(self.problems))
        return Report(
            job=self.job,
            batches=self.batches,
            row_count=self.row_count,
            partly=dict(self.partly),
            problems=problems,
            blockers=blockers,
            resting=dict(self.resting),
        )
