"""The measures of whole export runs: read, written, put into two buckets of an S3 server, checked there, and marked."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from appliance.store.database import fetch_value
from bench import rivals, storage
from bench.errors import BenchError
from bench.exporter import Run, run
from bench.filling import check_room, fill
from bench.plan import Plan, load_now
from bench.report import Bound, Row
from bench.servers import EXPORT_JOB
from bench.storage import Storage
from bench.world import World

# A busy site: an object of an hour is then as large as a row group of Parquet gets.
_ROWS_PER_SECOND = 30
_MOST_MEMORY_MB = 400
_FORMATS = {"parquet": "zstd", "jsonl": "gzip"}


def rate(world: World, plan: Plan) -> list[Row]:
    """A whole run against psql and gzip, and against the usual way in Python."""
    load_before = load_now()
    with _place(world, plan) as place, world.database() as filled:
        # Each side gets a copy.
        check_room(world, 2 * plan.export_rows)
        place.fill(filled, plan.export_rows)
        sides: dict[str, Callable[[str], float]] = {
            "psql": lambda conninfo: rivals.psql_and_gzip(conninfo, plan.export_rows, place.directory),
            "Parquet": lambda conninfo: place.export(conninfo, plan.export_rows, "parquet").seconds,
            "JSON lines": lambda conninfo: place.export(conninfo, plan.export_rows, "jsonl").seconds,
            "usual": lambda conninfo: rivals.usual_way(conninfo, plan.export_rows, place.storage),
        }
        rounds = [_round(world, plan, filled, sides, number) for number in range(1, plan.pace.rounds + 1)]
    rates = {side: tuple(plan.export_rows / seconds[side] for seconds in rounds) for side in sides}
    row = partial(Row, unit="rows/s", load_before=load_before)
    psql = "to two buckets / psql and gzip, one copy"
    return [
        row(
            name=f"export of {plan.export_rows:,} rows, Parquet {psql}",
            figures=rates["Parquet"],
            against=rates["psql"],
            bound=Bound(at_least=1.0),
        ),
        row(
            name=f"export of {plan.export_rows:,} rows, JSON lines gzip {psql}",
            figures=rates["JSON lines"],
            against=rates["psql"],
            bound=Bound(at_least=0.7),
        ),
        row(
            name=f"export of {plan.export_rows:,} rows, Parquet / the usual way in Python",
            figures=rates["Parquet"],
            against=rates["usual"],
            bound=Bound(at_least=5),
        ),
    ]


def memory(world: World, plan: Plan) -> list[Row]:
    """The most memory of a run's process with ten times the rows, against a run with half of `--export-rows`."""
    load_before = load_now()
    peaks = []
    few, many = max(1, plan.export_rows // 2), 5 * plan.export_rows
    with _place(world, plan) as place:
        for rows in (few, many):
            with world.database() as conninfo:
                place.fill(conninfo, rows)
                peaks.append(place.export(conninfo, rows, "parquet").peak_mb)
                plan.tell(f"  {rows:,} rows: {peaks[-1]:.0f} MB")
    row = partial(Row, unit="MB", figures=(peaks[1],), load_before=load_before)
    return [
        row(name=f"memory of an export of {many:,} rows / of {few:,}", against=(peaks[0],), bound=Bound(at_most=1.1)),
        row(
            name=f"memory of an export of {many:,} rows / what it may take",
            against=(_MOST_MEMORY_MB,),
            bound=Bound(at_most=1),
        ),
    ]


def beside_exported(world: World, plan: Plan) -> list[Row]:
    """The rate of a run with many rows in the table that were exported before, against one in an empty table."""
    load_before = load_now()
    pairs = []
    with _place(world, plan) as place, world.database() as full:
        place.fill(full, plan.rows)
        place.export(full, plan.rows, "parquet")
        for number in range(1, plan.pace.rounds + 1):
            place.fill(full, plan.export_rows)
            with world.database() as empty:
                place.fill(empty, plan.export_rows)
                figures = [place.export(one, plan.export_rows, "parquet").per_second for one in (full, empty)]
            plan.tell(f"  {number}/{plan.pace.rounds}: {figures[0]:,.0f}/s beside them, {figures[1]:,.0f}/s without")
            pairs.append(figures)
    return [
        Row(
            name=f"export of {plan.export_rows:,} rows beside {plan.rows:,} exported ones / into an empty table",
            unit="rows/s",
            figures=tuple(pair[0] for pair in pairs),
            against=tuple(pair[1] for pair in pairs),
            bound=Bound(at_least=0.9),
            load_before=load_before,
        )
    ]


@dataclass(frozen=True, slots=True)
class _Place:
    """An S3 server, and room for the files of a run."""

    world: World
    plan: Plan
    directory: Path
    storage: Storage

    def fill(self, conninfo: str, rows: int) -> None:
        """Fill a table with what a busy site sends until now."""
        fill(self.world, conninfo, rows, self.plan.tell, seconds=rows / _ROWS_PER_SECOND)

    def export(self, conninfo: str, rows: int, format_: str) -> Run:
        """Export what is new into two buckets. Raises BenchError unless that is so many rows, all marked."""
        buckets = [self.storage.new_bucket() for _ in range(2)]
        done = run(self._settings(buckets, format_), conninfo)
        if done.rows != rows or _unmarked(conninfo):
            raise BenchError(
                f"of {rows:,} rows {done.rows:,} were exported, and {_unmarked(conninfo):,} are not marked"
            )
        for bucket in buckets:
            shutil.rmtree(self.storage.root / bucket)
        return done

    def _settings(self, buckets: Sequence[str], format_: str) -> dict[str, Any]:
        client, backup = (self.storage.settings(bucket) for bucket in buckets)
        job = {
            "sites": ["shop"],
            "client": "client",
            "backup": "backup",
            "format": format_,
            "compression": _FORMATS[format_],
        }
        return {
            "server": {"data_dir": str(self.directory)},
            "buckets": {"client": client, "backup": backup},
            "exports": {EXPORT_JOB: job},
        }


@contextmanager
def _place(world: World, plan: Plan) -> Iterator[_Place]:
    directory = world.new_directory()
    root = world.new_directory()
    try:
        with storage.serve(root) as server:
            yield _Place(world, plan, directory, server)
    finally:
        shutil.rmtree(directory)
        shutil.rmtree(root)


def _round(
    world: World, plan: Plan, filled: str, sides: Mapping[str, Callable[[str], float]], number: int
) -> dict[str, float]:
    """Let each side have the same rows, in a table of its own; return its seconds."""
    seconds = {}
    for side, take in sides.items():
        with world.database(like=filled) as copy:
            seconds[side] = take(copy)
    figures = ", ".join(f"{side} {plan.export_rows / took:,.0f}/s" for side, took in seconds.items())
    plan.tell(f"  {number}/{plan.pace.rounds}: {figures}")
    return seconds


def _unmarked(conninfo: str) -> int:
    with psycopg.connect(conninfo) as conn:
        return int(fetch_value(conn, "SELECT count(*) FROM events_log WHERE exported_at IS NULL"))
