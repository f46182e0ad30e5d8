"""`status`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.admin.sentences import held_up
from appliance.cli.common import config_option, json_option, load, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from appliance.store.overview import BucketState, Overview


@click.command(epilog="Example: appliance status --json")
@config_option
@json_option
def status(file: Path | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Show events in, waiting and exported, and the last runs."""
    settings = load(file)
    from appliance.store import overview  # noqa: PLC0415 - `check` must not need the database
    from appliance.store.attach import attached  # noqa: PLC0415

    with attached(settings) as db, db.connection() as conn:
        state = overview.read(conn)
    if as_json:
        print_json({"events": state.events, **asdict(state)})
        return
    _print_status(state)


def _print_status(state: "Overview") -> None:
    from rich.console import Console  # noqa: PLC0415 - only for people at a terminal

    from appliance.store.restoring import unfinished  # noqa: PLC0415 - `check` must not need the database

    # In a log the lines must not be cut to a terminal's width.
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    for table in (_sites(state), _jobs(state), _runs(state)):
        console.print(table)
    for writer in state.open_writers:
        console.print(held_up(writer))
    if state.restoring:
        console.print(unfinished(state.restoring))


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table  # noqa: PLC0415 - only for people at a terminal

    return Table(*columns, title=title, title_justify="left")


def _sites(state: "Overview") -> "Table":
    table = _table(f"Events in: {state.events}", "Site", "Last hour", "Last 24 hours", "All")
    for site in state.sites:
        table.add_row(site.site_id, str(site.last_hour), str(site.last_day), str(site.total))
    return table


def _jobs(state: "Overview") -> "Table":
    table = _table("Exports", "Job", "Waiting", "Exported", "Bucket", "Batches there", "Owed", "Last error")
    stopped = _stopped(state)
    for job in state.jobs:
        numbers, why = (job.job, str(job.waiting), str(job.exported)), stopped.get(job.job, "")
        for bucket in job.buckets:
            trouble = _trouble(bucket) or why
            table.add_row(*numbers, bucket.bucket, str(bucket.delivered), str(bucket.pending), trouble)
        if not job.buckets:
            table.add_row(*numbers, "", "", "", why)
    return table


def _stopped(state: "Overview") -> dict[str, str]:
    """Return why the last run of a job failed where no bucket has a delivery that could bear the reason."""
    latest: dict[str, str] = {}
    for run in state.runs:
        latest.setdefault(run.job, run.message if run.outcome == "failed" else "")
    blamed = {job.job for job in state.jobs if any(bucket.last_error for bucket in job.buckets)}
    return {job: why for job, why in latest.items() if job not in blamed}


def _runs(state: "Overview") -> "Table":
    table = _table("Last runs", "Job", "Started (UTC)", "Outcome", "Batches", "Events", "What it says")
    for run in state.runs:
        started = f"{run.started_at:%Y-%m-%d %H:%M:%S}"
        table.add_row(run.job, started, run.outcome, str(run.batches), str(run.row_count), run.message)
    return table


def _trouble(bucket: "BucketState") -> str:
    if not bucket.last_error:
        return ""
    return bucket.last_error + (f" (next try {bucket.retry_at:%Y-%m-%d %H:%M} UTC)" if bucket.retry_at else "")
