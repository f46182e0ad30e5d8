"""How far the rows of each site are exported, and what follows from it: setting exported_at, and deleting old rows.

Both go on where they last ended, in short transactions, so a crash or a job that lags behind costs nothing.
"""

from collections.abc import Callable, Iterator, Sequence

from appliance.store import ledger
from appliance.store.counters import COVERED
from appliance.store.database import Connection, Database, fetch_value
from appliance.store.events import delete_exported, mark_exported
from appliance.store.migrations import check_version
from appliance.store.ranges import ALL_SITES, Range, where

# Ids that are gone through in one transaction: collecting goes on beside it, and sealing waits for it.
_STEP_IDS = 20_000

# What a batch has of a site, in a query over export_ranges r.
_OF_SITE = "(r.site = %(site)s OR (r.site = '*' AND NOT %(site)s = ANY(r.except_sites)))"


def mark_settled_rows(db: Database, *, go_on: Callable[[], bool] = lambda: True) -> int:
    """Set exported_at on every row that all jobs covering it have settled; return how many. `go_on` is asked each step.

    It reads what is committed, after the settling: of two jobs that settle at once the later sees both.
    """

    def step(conn: Connection, site: str) -> int | None:
        return _mark_step(conn, site) if go_on() else None

    return sum(_steps(db, step))


def delete_old_rows(db: Database, *, keep_days: int, go_on: Callable[[], bool]) -> int:
    """Delete rows that the ledger proves delivered for so many days; return how many. `go_on` is asked at each step.

    Proven is what lies in batches that all jobs covering it have settled, each bucket of each batch that long ago, and
    has exported_at set: a row put by hand among rows that were sealed before is in no batch, and stays.
    """

    def step(conn: Connection, site: str) -> int | None:
        return _delete_step(conn, site, keep_days) if go_on() else None

    return sum(_steps(db, step))


def uncovered_sites(conn: Connection) -> list[str]:
    """Return the sites that have sent and that no job covers: nothing of theirs is ever deleted."""
    rows = conn.execute(
        "SELECT DISTINCT site_id FROM event_counts n WHERE NOT EXISTS"  # noqa: S608 - a condition of our own
        f" (SELECT 1 FROM export_coverage c WHERE c.active AND {COVERED}) ORDER BY 1"
    )
    return [site for (site,) in rows]


def touched_by_retention(conn: Connection, ranges: Sequence[Range]) -> bool:
    """Return whether rows of these ranges may have been deleted."""
    marks: dict[str, int] = dict(conn.execute("SELECT site, deleted_to FROM export_marks").fetchall())
    common = marks.get(ALL_SITES, 0)
    furthest = max(marks.values(), default=0)
    return any(r.from_id < (furthest if r.site == ALL_SITES else marks.get(r.site, common)) for r in ranges)


def _steps(db: Database, step: Callable[[Connection, str], int | None]) -> Iterator[int]:
    """Do for each site, a transaction at a time, what there is to do; yield how many rows each has changed.

    Raises SchemaError where an appliance of another version has changed what this one goes by.
    """
    with db.connection() as conn:
        check_version(conn)
        sites = _marked_sites(conn)
    for site in sites:
        while True:
            with db.connection() as conn:
                changed = step(conn, site)
            if changed is None:
                break
            yield changed


def _marked_sites(conn: Connection) -> list[str]:
    """Give every site that a job names a mark of its own; it starts where the common one has come to.

    The common mark stays locked until the transaction ends: it must not move on over a site that just gets its own.
    """
    conn.execute("INSERT INTO export_marks (site) VALUES ('*') ON CONFLICT DO NOTHING")
    common = conn.execute("SELECT marked_to, deleted_to FROM export_marks WHERE site = '*' FOR UPDATE").fetchone()
    conn.execute(
        "INSERT INTO export_marks (site, marked_to, deleted_to)"
        " SELECT DISTINCT site, %s::bigint, %s::bigint FROM export_coverage ON CONFLICT DO NOTHING",
        common,
    )
    return [row[0] for row in conn.execute("SELECT site FROM export_marks ORDER BY site")]


def _mark_step(conn: Connection, site: str) -> int | None:
    """Mark the next rows of a site; None when there is nothing left to mark."""
    # A job that begins to cover these rows just now must not find them marked as exported.
    ledger.lock_coverage(conn, exclusive=False)
    rows = _next_rows(conn, site, "marked_to", _settled_to(conn, site))
    return mark_exported(conn, where([rows])) if rows else None


def _delete_step(conn: Connection, site: str, keep_days: int) -> int | None:
    """Delete the next rows of a site; None when there is nothing left to delete."""
    # Nor find them gone.
    ledger.lock_coverage(conn, exclusive=False)
    marked_to = fetch_value(conn, "SELECT marked_to FROM export_marks WHERE site = %s", (site,))
    bounds = [marked_to, _settled_to(conn, site) or 0, _young_from(conn, site, keep_days)]
    rows = _next_rows(conn, site, "deleted_to", min(bound for bound in bounds if bound is not None))
    return delete_exported(conn, where([rows])) if rows else None


def _next_rows(conn: Connection, site: str, mark: str, target: int | None) -> Range | None:
    """Move a mark on towards the target and return the rows that it has passed; None when it is there."""
    named = [name for name in _marked_sites(conn) if name != ALL_SITES]
    start = fetch_value(conn, f"SELECT {mark} FROM export_marks WHERE site = %s", (site,))  # noqa: S608 - our own name
    if target is None or target <= start:
        return None
    end = _step_end(conn, start, target)
    conn.execute(f"UPDATE export_marks SET {mark} = %s WHERE site = %s", (end, site))  # noqa: S608 - our own name
    return Range(site=site, from_id=start, to_id=end, except_sites=tuple(named) if site == ALL_SITES else ())


def _step_end(conn: Connection, start: int, target: int) -> int:
    """Return where a step ends: so many ids behind the next row that there is, because a sequence may have leapt."""
    query = "SELECT min(id) FROM events_log WHERE id > %s AND id <= %s"
    next_id: int | None = fetch_value(conn, query, (start, target))
    return target if next_id is None else min(target, next_id - 1 + _STEP_IDS)


def _settled_to(conn: Connection, site: str) -> int | None:
    """Return the id up to which every job that covers the site has settled; None where no job ever covered it.

    Batches that a job sealed before it lost the site count too: they are still to be delivered. Where no job covers the
    site any more, what one has delivered is exported.
    """
    query = f"""
        SELECT least(
            coalesce(min(c.sealed_to) FILTER (WHERE c.active), max(c.sealed_to)),
            (SELECT min(r.from_id) FROM export_ranges r JOIN export_batches b USING (job, sequence)
             WHERE b.state = 'sealed' AND {_OF_SITE})
        )
        FROM export_coverage c
        WHERE (c.site = %(site)s OR (c.site = '*' AND NOT EXISTS (
            SELECT 1 FROM export_coverage own WHERE own.job = c.job AND own.site = %(site)s)))
        HAVING count(*) > 0
    """  # noqa: S608 - a condition of our own
    found: int | None = fetch_value(conn, query, {"site": site})
    return found


def _young_from(conn: Connection, site: str, keep_days: int) -> int | None:
    """Return the id from which on rows lie in a batch that some bucket has got too lately, or not yet."""
    query = f"""
        SELECT min(r.from_id) FROM export_ranges r JOIN export_deliveries d USING (job, sequence)
        WHERE (d.state <> 'delivered' OR d.delivered_at > now() - %(days)s * interval '1 day') AND {_OF_SITE}
    """  # noqa: S608 - a condition of our own
    found: int | None = fetch_value(conn, query, {"site": site, "days": keep_days})
    return found
