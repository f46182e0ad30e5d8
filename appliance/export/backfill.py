"""Delivering batches once more, by the time at which their events arrived: to the same keys, or not at all."""

from dataclasses import dataclass
from datetime import datetime

from appliance.export.means import Means, Progress, silent
from appliance.export.redeliver import Redelivery, redeliver
from appliance.store import ledger
from appliance.store.ledger import Batch


@dataclass(frozen=True, slots=True)
class Step:
    """One batch and the buckets that are to have it."""

    batch: Batch
    buckets: tuple[str, ...]


def plan(
    means: Means, job: str, *, arrived_from: datetime, arrived_to: datetime, bucket: str | None = None
) -> list[Step]:
    """Choose the batches with events that arrived from `arrived_from` on and before `arrived_to`, by whole hours.

    They go to `bucket`, or to each bucket that they were frozen for and that is still configured.
    """
    with means.db.connection() as conn:
        keys = ledger.batches_arrived(conn, job, arrived_from, arrived_to)
        batches = [ledger.load(conn, key) for key in keys]
    return [Step(batch, (bucket,) if bucket else _own_buckets(means, batch)) for batch in batches]


def _own_buckets(means: Means, batch: Batch) -> tuple[str, ...]:
    return tuple(delivery.bucket for delivery in batch.deliveries if delivery.bucket in means.buckets)


def carry_out(means: Means, steps: list[Step], progress: Progress = silent) -> Redelivery:
    """Deliver each batch."""
    outcome = Redelivery()
    for number, step in enumerate(steps):
        means.stop_here_if_told()
        progress(number, len(steps), f"batch {step.batch.key}")
        done = redeliver(means, step.batch.key, list(step.buckets))
        outcome.done += done.done
        outcome.problems += done.problems
    return outcome
