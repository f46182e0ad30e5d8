"""Bringing a batch that is sealed, and perhaps long settled, to a bucket once more: to the same keys, or not at all."""

from dataclasses import dataclass, field

from appliance.errors import BucketError
from appliance.export.delivery import BatchDelivery, Target, target_of
from appliance.export.means import Means
from appliance.store import ledger
from appliance.store.ledger import Batch, Key


@dataclass(slots=True)
class Redelivery:
    """What came of it: the buckets that have the whole batch now, and why others have not."""

    done: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def redeliver(means: Means, key: Key, names: list[str]) -> Redelivery:
    """Put each object and the manifest of a batch into the named buckets, from the table or from another bucket.

    What stands there already is compared and left as it is. A bucket without a delivery of this batch gets one, under
    the prefix that is configured for it now. Raises BatchChangedError where neither the table nor a bucket has the rows
    any more, and StoppedError.
    """
    outcome = Redelivery()
    with means.db.connection() as conn:
        for name in names:
            ledger.add_delivery(conn, key, name, means.settings.buckets[name].prefix)
        batch = ledger.load(conn, key)
    targets = _targets(means, batch, names, outcome)
    wanted = list(targets)
    if targets:
        with means.scratch(key.job) as directory:
            BatchDelivery(
                db=means.db,
                conninfo=means.conninfo,
                all_buckets=means.buckets,
                batch=batch,
                targets=targets,
                directory=directory,
                fail=lambda _name, error: outcome.problems.append(str(error)),
                note_problem=lambda _name, error: outcome.problems.append(str(error)),
                safe_point=means.stop_here_if_told,
            ).deliver()
    # Those that failed are no longer among the targets.
    outcome.done += [name for name in wanted if name in targets]
    return outcome


def _targets(means: Means, batch: Batch, names: list[str], outcome: Redelivery) -> dict[str, Target]:
    targets = {}
    for delivery in batch.deliveries:
        if delivery.bucket in names:
            try:
                targets[delivery.bucket] = target_of(means, batch, delivery)
            except BucketError as error:
                outcome.problems.append(str(error))
    with means.db.connection() as conn:
        for name in targets:
            ledger.begin_attempt(conn, batch, name)
    return targets
