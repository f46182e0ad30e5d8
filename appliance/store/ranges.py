"""Which rows of events_log a batch is made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from psycopg import sql

ALL_SITES = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Rows of one site with from_id < id <= to_id; of every site but `except_sites` where the site is "*"."""

    site: str
    from_id: int
    to_id: int
    except_sites: tuple[str, ...] = field(default=())


def where(ranges: Sequence[Range]) -> sql.Composed:
    """Return the SQL condition (on `e`) for the rows of any of the ranges, with its values written in.

    The outer bounds let the primary key find the ground; no planner sees them in the alternatives.
    """
    bounds = _id_between(min(r.from_id for r in ranges), max(r.to_id for r in ranges))
    return sql.SQL("({} AND ({}))").format(bounds, sql.SQL(" OR ").join(_alternatives(ranges)))


def _alternatives(ranges: Iterable[Range]) -> list[sql.Composed]:
    return [sql.SQL("({} AND {})").format(_site_is(r), _id_between(r.from_id, r.to_id)) for r in ranges]


def _site_is(r: Range) -> sql.Composable:
    if r.site != ALL_SITES:
        return sql.SQL("e.site_id = {}").format(sql.Literal(r.site))
    if not r.except_sites:
        return sql.SQL("TRUE")
    # Rows put there by hand may have no site: they belong to "*" too.
    others = sql.SQL(", ").join(sql.Literal(site) for site in r.except_sites)
    return sql.SQL("(e.site_id IS NULL OR e.site_id NOT IN ({}))").format(others)


def _id_between(from_id: int, to_id: int) -> sql.Composed:
    return sql.SQL("e.id > {} AND e.id <= {}").format(sql.Literal(from_id), sql.Literal(to_id))
