"""`serve` and `check`."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from appliance.admin.sentences import ANY_SITE
from appliance.cli.common import config_option, json_option, load, print_json
from appliance.config import DirectoryBucket, Settings, exposed_secrets
from appliance.errors import ConfigError

log = logging.getLogger(__name__)


@click.command(epilog="Example: appliance serve --config /etc/appliance/config.toml")
@config_option
def serve(file: Path | None) -> None:
    """Run the appliance until it is told to stop (Ctrl-C, SIGTERM)."""
    settings = load(file)
    for warning in [*exposed_secrets(settings, file), *_missing_directories(settings)]:
        log.warning(warning)
    from appliance import server  # noqa: PLC0415 - `check` must not need what only serving needs

    server.serve(settings)


@click.command(epilog="Example: appliance check --config config.toml")
@config_option
@json_option
@click.option(
    "--probe",
    is_flag=True,
    help="Ask the database of database.url; write, read, list and delete an object in every bucket; send a test alert.",
)
def check(file: Path | None, as_json: bool, probe: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Read the configuration and say what it means; every error at once, exit code 2; a probe that fails, 1."""
    try:
        settings = load(file)
    except ConfigError as error:
        if not as_json:
            raise
        print_json({"ok": False, "problems": error.problems})
        sys.exit(error.exit_code)
    warnings = [*exposed_secrets(settings, file), *_warnings(settings)]
    tried = _try_everything(settings) if probe else iter(())
    if as_json:
        found = list(tried)
        answer = {"ok": not any(one.failed for one in found), "warnings": warnings, "exports": sorted(settings.exports)}
        print_json(answer | (_for_scripts(found) if probe else {}))
    else:
        for line in [*_describe(settings), *(f"warning: {warning}" for warning in warnings)]:
            click.echo(line)
        found = []
        for one in tried:
            click.echo(one.line)
            found.append(one)
    if any(one.failed for one in found):
        sys.exit(1)


@dataclass(frozen=True, slots=True)
class _Tried:
    """Something outside the configuration that was tried; `kind` is what scripts find it under."""

    kind: Literal["database", "probes", "alerts"]
    line: str
    failed: bool
    details: dict[str, Any]


def _try_everything(settings: Settings) -> Iterator[_Tried]:
    """Try what the configuration names, one after the other: any of them may take its time."""
    if url := settings.database.url.get_secret_value():
        from appliance.store.asking import ask  # noqa: PLC0415 - reading the configuration needs no database

        answer = ask(url)
        yield _Tried("database", answer.line, bool(answer.problem), asdict(answer))
    from appliance.export.buckets.probe import probe_all  # noqa: PLC0415 - reading the configuration needs no boto3

    for one in probe_all(settings):
        yield _Tried("probes", one.line, bool(one.failures), asdict(one))
    from appliance.alerts.conditions import Alert  # noqa: PLC0415 - nor alerts
    from appliance.alerts.sending import send  # noqa: PLC0415

    urls = [url.get_secret_value() for url in settings.alerts.urls]
    for sent in send(urls, Alert("a test", "Alerts come this way. Nothing is wrong.")) if urls else ():
        yield _Tried("alerts", sent.line, bool(sent.problem), asdict(sent))


def _for_scripts(tried: Sequence[_Tried]) -> dict[str, Any]:
    """Return what was tried by kind. The embedded database is not: it is started when something needs it."""
    found: dict[str, list[Any]] = {"database": [], "probes": [], "alerts": []}
    for one in tried:
        found[one.kind].append(one.details)
    return {**found, "database": next(iter(found["database"]), None)}


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
    warnings += _missing_directories(settings)
    used = {name for export in settings.exports.values() for name in export.bucket_names}
    warnings += [f"no export uses [buckets.{name}]" for name in settings.buckets if name not in used]
    warnings += [
        f"exports {one} and {other} share sites and one place, [buckets.{bucket}]: their events are there twice"
        for one, other, bucket in settings.doubled()
    ]
    return warnings + [
        f'no export has the site "{site}": its events are kept here and go to no bucket'
        for site in settings.unexported_sites()
    ]


def _missing_directories(settings: Settings) -> list[str]:
    """Warn of directories that exports do not make: one that is not mounted must not be filled on the local disk."""
    return [
        f"bucket {name}: {bucket.path} is not there: create or mount it, or nothing is exported to it"
        for name, bucket in settings.buckets.items()
        if isinstance(bucket, DirectoryBucket)
        and not bucket.path.is_relative_to(settings.server.data_dir)
        and not os.path.isdir(bucket.path)  # noqa: PTH112 - Path.is_dir raises where one may not look
    ]


def _data_dir_warnings(data_dir: Path) -> list[str]:
    # Not Path.exists: below a directory that this user may not enter it raises.
    existing = next(path for path in (data_dir, *data_dir.parents) if os.access(path, os.F_OK))
    if os.access(existing, os.W_OK | os.X_OK):
        return []
    return [f"the data directory {data_dir} cannot be written by this user"]
