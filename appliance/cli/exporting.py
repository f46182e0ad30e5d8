"""What is done with exports by hand: `export`, `verify`, `backfill`, `restore`."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.common import complete_buckets, complete_jobs, config_option, json_option, load, print_json
from appliance.cli.progress import progress
from appliance.config import Settings
from appliance.errors import ApplianceError, DatabaseUnavailableError, SchemaError
from appliance.priority import step_back
from appliance.words import counted

if TYPE_CHECKING:
    from appliance.export.means import Means
    from appliance.export.report import Report
    from appliance.export.verify import Repair, Verdict
    from appliance.store.database import Database


class _Moment(click.ParamType[datetime]):
    """A moment in UTC. A day alone is its beginning, or its end where the option says until when."""

    name = "date or time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f'"{value}" is no time: write 2026-11-01 or 2026-11-01T07:00', param, ctx)
        if len(value) == len("2026-11-01") and param is not None and param.name == "end":
            moment += timedelta(days=1)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


_MOMENT = _Moment()


@click.command(epilog="Example: appliance export acme")
@click.argument("job", required=False, shell_complete=complete_jobs)
@config_option
@json_option
def export(job: str | None, file: Path | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Run export jobs now: JOB, or all of them. What stops one of them stops no other."""
    from appliance.export.job import Exporter  # noqa: PLC0415 - heavy, and only needed here

    reports: dict[str, Report | ApplianceError] = {}
    with _database(file) as (settings, db):
        exporter = Exporter(settings, db, conninfo=db.conninfo)
        jobs = exporter.jobs()
        if job is not None:
            _check_known(job, jobs)
        for name in [job] if job else jobs:
            try:
                reports[name] = exporter.run(name, wait_for_lease=True)
            except (DatabaseUnavailableError, SchemaError):
                raise
            except ApplianceError as error:
                reports[name] = error
    if as_json:
        print_json([_report_for_scripts(name, report) for name, report in reports.items()])
    for name, report in reports.items() if not as_json else ():
        if isinstance(report, ApplianceError):
            click.echo(f"{name}: {report}", err=True)
        else:
            click.echo(f"{name}: {report.summary}")
    if any(isinstance(report, ApplianceError) or report.failed for report in reports.values()):
        sys.exit(1)


def _report_for_scripts(job: str, report: "Report | ApplianceError") -> dict[str, Any]:
    if isinstance(report, ApplianceError):
        return {"job": job, "failed": True, "error": str(report)}
    return {**asdict(report), "failed": report.failed}


@click.command(epilog="Example: appliance verify acme --repair")
@click.argument("job", required=False, shell_complete=complete_jobs)
@click.option(
    "--repair", "repairing", is_flag=True, help="Deliver again what is missing; nothing is ever written over."
)
@config_option
@json_option
def verify(job: str | None, file: Path | None, *, repairing: bool, as_json: bool) -> None:
    """Read every object of JOB (or of all jobs) again and hold it against manifest, ledger and table.

    Exit code 3 when something is missing, altered, foreign or doubled; 1 when a bucket could not be asked, or holds
    batches of a job of which the database knows none.
    """
    from appliance.export import verify as verification  # noqa: PLC0415 - heavy, and only needed here

    with _means(file) as means:
        jobs = _jobs(means)
        if job is not None:
            _check_known(job, jobs)
        names = [job] if job else jobs
        with progress() as tell:
            verdicts = [verification.Verification(means, name, tell).run() for name in names]
        repairs = {v.job: verification.repair(means, v) for v in verdicts} if repairing else {}
        _tell_of_damage(means, verdicts, repairs)
    left = [what for repair in repairs.values() for what in repair.left]
    if as_json:
        print_json([_verdict_for_scripts(verdict, repairs.get(verdict.job)) for verdict in verdicts])
    for verdict in verdicts if not as_json else ():
        _print_verdict(verdict, repairs.get(verdict.job))
    for what in left:
        click.echo(f"could not be repaired: {what}", err=True)
    damaged = bool(left) if repairing else any(verdict.findings for verdict in verdicts)
    if damaged or any(verdict.problems for verdict in verdicts):
        sys.exit(3 if damaged else 1)


@click.command(epilog="Example: appliance backfill acme --from 2026-11-01 --to 2026-11-07 --bucket vault --dry-run")
@click.argument("job", shell_complete=complete_jobs)
@click.option("--from", "start", type=_MOMENT, required=True, help="Events that arrived from here on (UTC).")
@click.option(
    "--to", "end", type=_MOMENT, required=True, help="... and before here; a day alone is the whole day (UTC)."
)
@click.option(
    "--bucket",
    shell_complete=complete_buckets,
    help="Deliver to this bucket, which need not have been one of theirs.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be delivered, and deliver nothing.")
@config_option
@json_option
def backfill(  # noqa: PLR0913 - one for each option
    job: str, start: datetime, end: datetime, bucket: str | None, file: Path | None, *, dry_run: bool, as_json: bool
) -> None:
    """Deliver batches of JOB again that hold events of a time: whole batches, to the same keys.

    They come from the table, or from another bucket where their rows are gone. What stands there stays as it is.
    """
    from appliance.export import backfill as filling  # noqa: PLC0415 - heavy, and only needed here

    if start >= end:
        raise click.BadParameter("it has to be later than --from", param_hint="--to")
    with _means(file) as means:
        _check_known(job, _jobs(means))
        _check_has_batches(means, job)
        if bucket is not None:
            _check_bucket(means, bucket)
        steps = filling.plan(means, job, arrived_from=start, arrived_to=end, bucket=bucket)
        with progress() as tell:
            outcome = None if dry_run else filling.carry_out(means, steps, tell)
    problems = outcome.problems if outcome else []
    if as_json:
        batches = [{"sequence": s.batch.key.sequence, "rows": s.batch.row_count, "buckets": s.buckets} for s in steps]
        print_json({"job": job, "dry_run": dry_run, "batches": batches, "problems": problems})
    else:
        for step in steps:
            events = counted(step.batch.row_count, "event", "events")
            click.echo(f"batch {step.batch.key}: {events} to {' and '.join(step.buckets)}")
        for problem in problems:
            click.echo(problem, err=True)
        click.echo(_backfilled(len(steps), dry_run=dry_run, failed=len(problems)))
    if problems:
        sys.exit(1)


def _backfilled(batches: int, *, dry_run: bool, failed: int) -> str:
    if not batches:
        return "no batch holds events that arrived then"
    what = counted(batches, "batch", "batches")
    if dry_run:
        return f"{what} would be delivered"
    return f"{what} delivered" + (f", with {counted(failed, 'problem', 'problems')}" if failed else "")


@click.command(epilog="Example: appliance restore vault")
@click.argument("bucket", shell_complete=complete_buckets)
@click.option(
    "--give-up", "gives_up", is_flag=True, help="End a restore that cannot be finished; what came back stays."
)
@config_option
@json_option
def restore(bucket: str, file: Path | None, *, gives_up: bool, as_json: bool) -> None:
    """Rebuild the events and the record of exports from BUCKET, and check every byte of it.

    For a new installation, or one that lost its newest events; what it has collected since stays. It can be run again,
    and for one bucket after another. Exit code 3 when the bucket lacks something that was delivered.
    """
    from appliance.export import restore as restoring  # noqa: PLC0415 - heavy, and only needed here

    # To give up is to end a restore that has begun.
    with _means(file, creates=not gives_up) as means:
        _check_bucket(means, bucket)
        if gives_up:
            restoring.give_up(means)
            if as_json:
                print_json({"bucket": bucket, "given_up": True})
            else:
                click.echo("given up: what has come back stays, and jobs go on")
            return
        with progress() as tell:
            done = restoring.Restore(means, bucket, progress=tell).run()
    if as_json:
        print_json(asdict(done))
    else:
        for line in done.lines:
            click.echo(line)
    if done.damage:
        sys.exit(3)


@contextmanager
def _database(file: Path | None, *, creates: bool = False) -> Iterator[tuple[Settings, "Database"]]:
    """Lend the configuration and its database."""
    settings = load(file)
    from appliance.store.attach import attached  # noqa: PLC0415 - `check` must not need the database

    with attached(settings, creates=creates) as db:
        # Somebody waits for an event's answer, nobody for this; PostgreSQL, if it was started here, has started before.
        step_back(os.getpid())
        yield settings, db


@contextmanager
def _means(file: Path | None, *, creates: bool = False) -> Iterator["Means"]:
    """Lend what everything that exports works with."""
    from appliance.export.means import Means  # noqa: PLC0415 - heavy, and only needed here

    with _database(file, creates=creates) as (settings, db):
        yield Means.of(settings, db, conninfo=db.conninfo)


def _jobs(means: "Means") -> list[str]:
    """Return the jobs of the configuration, and those that were once and have left batches."""
    configured = means.settings.exports
    return [*configured, *(job for job in _jobs_with_batches(means) if job not in configured)]


def _jobs_with_batches(means: "Means") -> list[str]:
    from appliance.store import ledger  # noqa: PLC0415 - `check` must not need the database

    with means.db.connection() as conn:
        return ledger.jobs(conn)


def _check_known(job: str, jobs: Sequence[str]) -> None:
    if job not in jobs:
        raise click.BadParameter(f"there is no job {job} (there are: {', '.join(jobs)})", param_hint="JOB")


def _check_has_batches(means: "Means", job: str) -> None:
    if job not in _jobs_with_batches(means):
        raise click.BadParameter(f"job {job} has exported nothing yet", param_hint="JOB")


def _check_bucket(means: "Means", bucket: str) -> None:
    if bucket not in means.buckets:
        known = ", ".join(means.buckets)
        raise click.BadParameter(f"there is no bucket {bucket} in the configuration (there are: {known})")


def _tell_of_damage(means: "Means", verdicts: Sequence["Verdict"], repairs: Mapping[str, "Repair"]) -> None:
    """Send an alert where damage was found, or where it is repaired or gone."""
    if not means.settings.alerts.urls:
        return
    from appliance.alerts import conditions  # noqa: PLC0415 - only where there are alerts
    from appliance.alerts.watch import board_of  # noqa: PLC0415

    holding, judged = {}, set()
    for verdict in verdicts:
        repair = repairs.get(verdict.job)
        found = repair.left if repair else [one.name for one in verdict.findings]
        # A bucket that could not be asked says nothing about what was found in it before.
        if found or not verdict.problems:
            judged.add(conditions.damage_key(verdict.job))
        if found:
            holding[conditions.damage_key(verdict.job)] = conditions.of_damage(verdict.job, found)
    board_of(means.settings).settle(holding, judged.__contains__)


def _verdict_for_scripts(verdict: "Verdict", repair: "Repair | None") -> dict[str, Any]:
    if repair is None:
        return asdict(verdict)
    findings = [{**asdict(one), "repaired": one in repair.repaired} for one in verdict.findings]
    return {**asdict(verdict), "findings": findings, "unrepaired": repair.left}


def _print_verdict(verdict: "Verdict", repair: "Repair | None") -> None:
    for finding in verdict.findings:
        where = f"bucket {finding.bucket}: " if finding.bucket else ""
        again = "; delivered again" if repair and finding in repair.repaired else ""
        click.echo(f"{verdict.job}: {finding.kind}: {where}{finding.key}: {finding.what}{again}")
    for problem in verdict.problems:
        click.echo(f"{verdict.job}: {problem}")
    if verdict.batches:
        read = f"{counted(verdict.objects, 'object', 'objects')} of {counted(verdict.batches, 'batch', 'batches')} read"
        wrong = f"{len(verdict.findings)} found wrong" + (f", {len(repair.repaired)} repaired" if repair else "")
        click.echo(f"{verdict.job}: {read} ({counted(verdict.bytes, 'byte', 'bytes')}), {wrong}")
    elif not (verdict.findings or verdict.problems):
        click.echo(f"{verdict.job}: nothing exported yet")
