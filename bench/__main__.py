"""`python -m bench`: takes the measures, prints the table, and writes it into docs/performance.md where asked to."""

import signal
import sys

import click
import psycopg

from appliance.errors import ApplianceError
from bench import report, world
from bench.errors import BenchError
from bench.measures import MEASURES
from bench.plan import Plan
from bench.runs import Pace

_TERMINATED = 128 + signal.SIGTERM


class _Names(click.ParamType[list[str]]):
    """Names of measures, with commas between them."""

    name = "names"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        names = [name.strip() for name in value.split(",")]
        for name in names:
            if name not in MEASURES:
                self.fail(f"there is no measure {name} (there are: {', '.join(MEASURES)})", param, ctx)
        return names


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--only", type=_Names(), default=",".join(MEASURES), help="The measures to take.")
@click.option("--runs", type=click.IntRange(1), default=5, help="Runs of each side.")
@click.option("--seconds", type=click.FloatRange(1), default=8, help="Length of a run.")
@click.option("--rows", type=click.IntRange(1), default=10_000_000, help="Rows in the full table.")
@click.option("--export-rows", type=click.IntRange(1), default=1_000_000, help="Rows of each export.")
@click.option("--minutes", type=click.FloatRange(1.1), default=10, help="Minutes of load for the memory.")
@click.option("--write", is_flag=True, help="Put the table into docs/performance.md.")
def main(  # noqa: PLR0913 - one for each option
    *, only: list[str], runs: int, seconds: float, rows: int, export_rows: int, minutes: float, write: bool
) -> None:
    """Measure what the appliance carries here. Exit code 1 when a measure is not what it must be."""
    # Ended from outside, it still stops what it has started.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(_TERMINATED))
    pace = Pace(rounds=runs, seconds=seconds, warm_up_seconds=2)
    plan = Plan(pace=pace, rows=rows, export_rows=export_rows, minutes=minutes, tell=_tell)
    taken: list[report.Row] = []
    problems: list[str] = []
    with world.build() as running:
        machine = report.machine(running.postgres_version())
        for name in only:
            _tell(name)
            try:
                taken += MEASURES[name](running, plan)
            except (BenchError, ApplianceError, psycopg.Error, OSError) as error:
                problems.append(f"{name}: {error}")
    click.echo(report.table(taken, machine))
    if write and taken:
        _tell(f"written to {report.write(taken, machine)}")
    for problem in problems:
        click.echo(problem, err=True)
    sys.exit(1 if problems or not all(row.holds for row in taken) else 0)


def _tell(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    try:
        main()
    except (BenchError, ApplianceError) as problem:
        sys.exit(str(problem))
