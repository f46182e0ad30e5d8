"""The `appliance` command, and the one place that turns errors into messages and exit codes."""

import sys

import click

from appliance.cli.backups import backup, move, restore_backup
from appliance.cli.exporting import backfill, export, restore, verify
from appliance.cli.health import healthcheck
from appliance.cli.passwords import hash_password
from appliance.cli.running import check, serve
from appliance.cli.status import status
from appliance.errors import ApplianceError, ConfigError


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


for _command in (
    serve,
    check,
    export,
    verify,
    backfill,
    restore,
    backup,
    restore_backup,
    move,
    status,
    healthcheck,
    hash_password,
):
    cli.add_command(_command)
