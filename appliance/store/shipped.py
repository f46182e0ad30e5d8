"""What was exported, as people look at it: batches, their objects and how long they took. Reads the ledger alone."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from appliance.store.database import Connection
from appliance.store.ledger import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """One batch and how far it has come. `late`: the buckets that have not got it yet."""

    key: Key
    sealed_at: datetime
    settled_at: datetime | None
    row_count: int
    objects: int
    bytes: int
    format: str
    compression: str
    late: tuple[str, ...]

    @property
    def took(self) -> timedelta | None:
        """From being sealed until the last bucket had it; None while one has not."""
        return self.settled_at - self.sealed_at if self.settled_at else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """One batch on its way to one bucket."""

    bucket: str
    prefix: str
    state: str
    attempts: int
    attempted_at: datetime | None
    delivered_at: datetime | None
    last_error: str | None
    retry_at: datetime | None


_SHIPMENTS = """
    SELECT b.job, b.sequence, b.sealed_at, b.settled_at, b.row_count, o.number, o.bytes, b.format, b.compression,
        ARRAY(SELECT bucket FROM export_deliveries d WHERE d.job = b.job AND d.sequence = b.sequence
              AND d.state = 'pending' ORDER BY bucket)
    FROM export_batches b CROSS JOIN LATERAL (
        SELECT count(*) AS number, coalesce(sum(bytes), 0)::bigint AS bytes
        FROM export_objects o WHERE o.job = b.job AND o.sequence = b.sequence) o
"""


def newest(conn: Connection, job: str, *, below: int | None, limit: int) -> list[Shipment]:
    """Return the job's last batches, newest first; with `below` those before that sequence number."""
    rows = conn.execute(
        _SHIPMENTS + " WHERE b.job = %s AND b.sequence < coalesce(%s, 9223372036854775807)"
        " ORDER BY b.sequence DESC LIMIT %s",
        (job, below, limit),
    )
    return [_shipment(*row) for row in rows]


def find(conn: Connection, key: Key) -> Shipment | None:
    """Return one batch; None where there is none of that name."""
    row = conn.execute(_SHIPMENTS + " WHERE b.job = %s AND b.sequence = %s", (key.job, key.sequence)).fetchone()
    return _shipment(*row) if row else None


def parcels(conn: Connection, key: Key) -> list[Parcel]:
    """Return how a batch fared with each of its buckets."""
    rows = conn.execute(
        "SELECT bucket, prefix, state, attempts, attempted_at, delivered_at, last_error, retry_at"
        " FROM export_deliveries WHERE job = %s AND sequence = %s ORDER BY bucket",
        (key.job, key.sequence),
    )
    return [
        Parcel(
            bucket=b, prefix=p, state=s, attempts=a, attempted_at=at, delivered_at=d, last_error=error, retry_at=retry
        )
        for b, p, s, a, at, d, error, retry in rows
    ]


def _shipment(  # noqa: PLR0913, PLR0917 - the columns of one row
    job: str,
    sequence: int,
    sealed_at: datetime,
    settled_at: datetime | None,
    row_count: int,
    objects: int,
    size: int,
    format_: str,
    compression: str,
    late: list[str],
) -> Shipment:
    return Shipment(
        key=Key(job, sequence),
        sealed_at=sealed_at,
        settled_at=settled_at,
        row_count=row_count,
        objects=objects,
        bytes=size,
        format=format_,
        compression=compression,
        late=tuple(late),
    )
