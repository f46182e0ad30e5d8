"""`status`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.admin.sentences import held_up
from appliance.cli.common import config_option, json_option, load, print_json

if TYPE_CHECKING:
    from appliance.store.overview import BucketState


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


def _print_status(state: Any) -> None:
    from rich.console import Console  # noqa: PLC0415 - only for people at a terminal
    from rich.table import Table  # noqa: PLC0415

    from appliance.store.restoring import unfinished  # noqa: PLC0415 - `check` must not need the database

    # In a log the lines must not be cut to a terminal's width.
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    sites = Table("Site", "Last hour", "Last 24 hours", "All", title=f"Events in: {state.events}", title_justify="left")
    for site in state.sites:
        sites.add_row(site.site_id, str(site.last_hour), str(site.last_day), str(site.total))
    jobs = Table(
        "Job",
        "Waiting",
        "Exported",
        "Bucket",
        "Batches there",
        "Owed",
        "Last error",
        title="Exports",
        title_justify="left",
    )
    for job in state.jobs:
        for bucket in job.buckets:
            jobs.add_row(
                job.job,
                str(job.waiting),
                str(job.exported),
                bucket.bucket,
                str(bucket.delivered),
                str(bucket.pending),
                _trouble(bucket),
            )
        if not job.buckets:
            jobs.add_row(job.job, str(job.waiting), str(job.exported), "", "", "", "")
    runs = Table(
        "Job", "Started (UTC)", "Outcome", "Batches", "Events", "What it says", title="Last runs", title_justify="left"
    )
    for run in state.runs:
        started = f"{run.started_at:%Y-%m-%d %H:%M:%S}"
        runs.add_row(run.job, started, run.outcome, str(run.batches), str(run.row_count), run.message)
    for table in (sites, jobs, runs):
        console.print(table)
    for writer in state.open_writers:
        console.print(held_up(writer))
    if state.restoring:
        console.print(unfinished(state.restoring))


def _trouble(bucket: "BucketState") -> str:
    if not bucket.last_error:
        return ""
    return bucket.last_error + (f" (next try {bucket.retry_at:%Y-%m-%d %H:%M} UTC)" if bucket.retry_at else "")
