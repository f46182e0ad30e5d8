"""The `appliance` command: every subcommand, and the one place that turns errors into messages and exit codes."""

import json
import os
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from appliance import config, log
from appliance.admin.sentences import ANY_SITE, held_up
from appliance.config import ALL_SITES, Settings
from appliance.errors import ApplianceError, ConfigError

_config_option = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="Configuration file (default: config.toml where it stands; without it, the defaults).",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for a script.")


def main() -> None:
    """Run the command and exit: 0 done, 1 failed, 2 wrong usage or configuration, 3 found damage."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ApplianceError as error:
        click.echo(str(error) if isinstance(error, ConfigError) else f"appliance: {error}", err=True)
        sys.exit(error.exit_code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="appliance")
def cli() -> None:
    """Collect raw web events and hand complete copies to your own buckets."""


@cli.command(epilog="Example: appliance serve --config /etc/appliance/config.toml")
@_config_option
def serve(file: Path | None) -> None:
    """Run the appliance until it is told to stop (Ctrl-C, SIGTERM)."""
    settings = _load(file)
    from appliance import server  # noqa: PLC0415 - `check` must not need what only serving needs

    server.serve(settings)


@cli.command(epilog="Example: appliance check --config config.toml")
@_config_option
@_json_option
@click.option("--probe", is_flag=True, help="Write, read, list and delete an object in every bucket.")
def check(file: Path | None, as_json: bool, probe: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Read the configuration and say what it means; every error at once, exit code 2; a probe that fails, 1."""
    try:
        settings = _load(file)
    except ConfigError as error:
        if not as_json:
            raise
        _print_json({"ok": False, "problems": error.problems})
        sys.exit(error.exit_code)
    warnings = _warnings(settings)
    if as_json:
        probes = _probes(settings) if probe else []
        answer = {"ok": not _failed(probes), "warnings": warnings, "exports": sorted(settings.exports)}
        _print_json(answer | ({"probes": [asdict(one) for one in probes]} if probe else {}))
    else:
        for line in [*_describe(settings), *(f"warning: {warning}" for warning in warnings)]:
            click.echo(line)
        probes = _probes(settings) if probe else []
        for one in probes:
            click.echo(one.line)
    if _failed(probes):
        sys.exit(1)


@cli.command(epilog="Example: appliance export acme")
@click.argument("job", required=False)
@_config_option
@_json_option
def export(job: str | None, file: Path | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Run export jobs now: JOB, or all of them."""
    settings = _load(file)
    from appliance.export.job import Exporter  # noqa: PLC0415 - heavy, and only needed here
    from appliance.store.attach import attached, conninfo_of  # noqa: PLC0415

    with attached(settings) as db:
        exporter = Exporter(settings, db, conninfo=conninfo_of(settings))
        jobs = exporter.jobs()
        if job is not None and job not in jobs:
            raise click.BadParameter(f"there is no job {job} (there are: {', '.join(jobs)})", param_hint="JOB")
        reports = [exporter.run(name, wait_for_lease=True) for name in ([job] if job else jobs)]
    if as_json:
        _print_json([{**asdict(report), "failed": report.failed} for report in reports])
    for report in reports if not as_json else ():
        click.echo(f"{report.job}: {report.summary}")
    if any(report.failed for report in reports):
        sys.exit(1)


@cli.command(epilog="Example: appliance verify acme --repair")
@click.argument("job", required=False)
@click.option("--repair", "repairs", is_flag=True, help="Deliver again what is missing; nothing is ever written over.")
@_config_option
@_json_option
def verify(job: str | None, file: Path | None, *, repairs: bool, as_json: bool) -> None:
    """Read every object of JOB (or of all jobs) again and hold it against manifest, ledger and table.

    Exit code 3 when something is missing, altered, foreign or doubled; 1 when a bucket could not be asked.
    """
    settings = _load(file)
    from appliance.export import verify as verification  # noqa: PLC0415 - heavy, and only needed here
    from appliance.export.means import Means  # noqa: PLC0415
    from appliance.store import ledger  # noqa: PLC0415
    from appliance.store.attach import attached, conninfo_of  # noqa: PLC0415

    with attached(settings) as db:
        means = Means.of(settings, db, conninfo=conninfo_of(settings))
        with db.connection() as conn:
            jobs = ledger.jobs(conn)
        if job is not None and job not in jobs:
            raise click.BadParameter(f"job {job} has exported nothing yet", param_hint="JOB")
        names = [job] if job else jobs
        verdicts = [verification.Verification(means, name).run() for name in names]
        left = [what for verdict in verdicts for what in verification.repair(means, verdict)] if repairs else []
    if as_json:
        _print_json([asdict(verdict) for verdict in verdicts])
    for verdict in verdicts if not as_json else ():
        _print_verdict(verdict)
    for what in left:
        click.echo(f"could not be repaired: {what}", err=True)
    damaged = bool(left) if repairs else any(verdict.findings for verdict in verdicts)
    if damaged or any(verdict.problems for verdict in verdicts):
        sys.exit(3 if damaged else 1)


def _print_verdict(verdict: Any) -> None:
    for finding in verdict.findings:
        where = f"bucket {finding.bucket}: " if finding.bucket else ""
        click.echo(f"{verdict.job}: {finding.kind}: {where}{finding.key}: {finding.what}")
    for problem in verdict.problems:
        click.echo(f"{verdict.job}: {problem}")
    what = f"{verdict.objects} objects of {verdict.batches} batches read ({verdict.bytes} bytes)"
    click.echo(f"{verdict.job}: {what}, {len(verdict.findings)} found wrong")


@cli.command(epilog="Example: appliance status --json")
@_config_option
@_json_option
def status(file: Path | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Show events in, waiting and exported, and the last runs."""
    settings = _load(file)
    from appliance.store import overview  # noqa: PLC0415 - `check` must not need the database
    from appliance.store.attach import attached  # noqa: PLC0415

    with attached(settings) as db, db.connection() as conn:
        state = overview.read(conn)
    if as_json:
        _print_json({"events": state.events, **asdict(state)})
        return
    _print_status(state)


def _probes(settings: Settings) -> list[Any]:
    from appliance.export.buckets.probe import probe_all  # noqa: PLC0415 - reading the configuration needs no boto3

    return list(probe_all(settings))


def _failed(probes: list[Any]) -> bool:
    return any(probe.failures for probe in probes)


def _load(file: Path | None) -> Settings:
    log.configure()
    settings = config.load(file)
    log.configure(secrets=settings.secret_values())
    return settings


def _describe(settings: Settings) -> list[str]:
    database = "given by database.url" if settings.database.url.get_secret_value() else "embedded"
    lines = [
        "the configuration is right",
        f"listens on {settings.server.bind}, data in {settings.server.data_dir}, database {database}",
        f"sites: {', '.join(site.id for site in settings.sites) or 'any'}",
    ]
    for name, export in settings.exports.items():
        where = " and ".join(export.bucket_names)
        lines.append(
            f"export {name}: sites {', '.join(export.sites)} to {where}, {export.format} ({export.codec}), "
            f"on {export.schedule} UTC"
        )
    return lines


def _warnings(settings: Settings) -> list[str]:
    warnings = []
    if not settings.sites:
        warnings.append(ANY_SITE)
    if not settings.admin.enabled:
        warnings.append("the admin page is off until admin.password or admin.token is set")
    warnings += _data_dir_warnings(settings.server.data_dir)
    used = {name for export in settings.exports.values() for name in export.bucket_names}
    warnings += [f"no export uses [buckets.{name}]" for name in settings.buckets if name not in used]
    exported = {site for export in settings.exports.values() for site in export.sites}
    for site in settings.sites:
        if not exported & {site.id, ALL_SITES}:
            warnings.append(f'no export has the site "{site.id}": its events are kept here and go to no bucket')
    return warnings


def _data_dir_warnings(data_dir: Path) -> list[str]:
    # Not Path.exists: below a directory that this user may not enter it raises.
    existing = next(path for path in (data_dir, *data_dir.parents) if os.access(path, os.F_OK))
    if os.access(existing, os.W_OK | os.X_OK):
        return []
    return [f"the data directory {data_dir} cannot be written by this user"]


def _print_status(state: Any) -> None:
    from rich.console import Console  # noqa: PLC0415 - only for people at a terminal
    from rich.table import Table  # noqa: PLC0415

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
                bucket.last_error or "",
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


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, default=_jsonable, ensure_ascii=False, indent=2))


def _jsonable(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
