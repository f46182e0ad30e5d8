"""Fills events_log by statements on the server: rows like those that come in, spread evenly over the time until now."""

import shutil
from collections.abc import Callable

import psycopg

from bench.errors import BenchError
from bench.world import World

_CHUNK_ROWS = 250_000
# A row of the table with half-empty pages and its two index entries, and the log that is written meanwhile.
_ROW_BYTES = 2_000
_SPARE_BYTES = 4 * 2**30
_MONTH_SECONDS = 30 * 24 * 3600

# Ids that grow with the time, as those of browsers do.
_FILL = """
INSERT INTO events_log (event_id, event_type, session_id, visitor_id, site_id, timestamp, url, path, user_agent,
    ip_address, raw_event_data, created_at)
SELECT id, 'pageview', session, visitor, 'shop', at, url, path,
    'Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0',
    '198.51.100.0'::inet + n %% 250,
    jsonb_build_object('siteId', 'shop', 'url', url, 'path', path, 'title', 'A product like any other',
        'referrer', 'https://www.example.org/', 'language', 'en-US', 'screen', '1920x1080', 'eventType', 'pageview',
        'eventId', id, 'timestamp', at, 'sessionId', session, 'visitorId', visitor),
    at
FROM (
    SELECT n, uuidv7(make_interval(secs => age)) AS id, now() - make_interval(secs => age) AS at,
        md5((n / 7)::text)::uuid::text AS session, md5((n / 40)::text)::uuid::text AS visitor, path,
        'https://shop.example.com' || path AS url
    FROM (
        SELECT n, %(span)s * (1 - n::float8 / %(rows)s) AS age,
            '/products/' || n %% 5000 || '/a-product-like-any-other' AS path
        FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n
    ) AS numbered
) AS made
"""


def fill(
    world: World, conninfo: str, rows: int, tell: Callable[[str], None], *, seconds: float = _MONTH_SECONDS
) -> None:
    """Store so many rows, and leave the table at rest: vacuumed, analysed, written out. Raises BenchError."""
    check_room(world, rows)
    tell(f"  filling the table with {rows:,} rows")
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute("SET synchronous_commit = off")
        for first in range(1, rows + 1, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS - 1, rows)
            conn.execute(_FILL, {"span": seconds, "rows": rows, "first": first, "last": last})
        # Vacuuming leaves alone what commits have not been written out for.
        conn.execute("CHECKPOINT")
        conn.execute("VACUUM (ANALYZE) events_log")
        conn.execute("CHECKPOINT")


def check_room(world: World, rows: int) -> None:
    """Raise BenchError where the disk has too little room for so many rows."""
    needed = rows * _ROW_BYTES + _SPARE_BYTES
    free = shutil.disk_usage(world.directory).free
    if free < needed:
        raise BenchError(
            f"{rows:,} rows need {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free: "
            "set TMPDIR to a directory with more room, or ask for fewer --rows"
        )
