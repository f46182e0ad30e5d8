"""What commands share: options, reading the configuration, and printing."""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from appliance import config, log
from appliance.config import Settings
from appliance.errors import ConfigError

config_option = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="Configuration file (default: config.toml where it stands; without it, the defaults).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for a script.")


def complete_jobs(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Offer the jobs of the configuration to a shell."""
    return _configured(ctx, incomplete, lambda settings: settings.exports)


def complete_buckets(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Offer the buckets of the configuration to a shell."""
    return _configured(ctx, incomplete, lambda settings: settings.buckets)


def _configured(ctx: click.Context, incomplete: str, names_of: Callable[[Settings], Iterable[str]]) -> list[str]:
    try:
        settings = config.load(ctx.params.get("file"))
    except ConfigError:
        return []  # the command itself will say what is wrong; here it would land in the line that is being typed
    return [name for name in names_of(settings) if name.startswith(incomplete)]


def load(file: Path | None) -> Settings:
    """Read the configuration, and let nothing print its secrets."""
    log.configure()
    settings = config.load(file)
    log.configure(secrets=settings.secret_values(), as_json=settings.server.log_format == "json")
    return settings


def print_json(value: Any) -> None:
    """Print a value for a script."""
    click.echo(json.dumps(value, default=_jsonable, ensure_ascii=False, indent=2))


def _jsonable(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
