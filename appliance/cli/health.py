"""`healthcheck`."""

import sys
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import click

from appliance.cli.common import config_option, json_option, load, print_json
from appliance.errors import ConfigError

# Shorter than the image's HEALTHCHECK waits: a sentence tells more than being killed.
_TIMEOUT_SECONDS = 4


@click.command(epilog="Example: appliance healthcheck")
@config_option
@json_option
def healthcheck(file: Path | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Ask the running appliance whether it lives, as a container's health check does: exit code 0 or 1."""
    try:
        url = f"{load(file).server.local_url}/health/live"
    except ConfigError:
        # To a container's engine 2 means nothing.
        url, problem = "", "the configuration is wrong, so it is not known where to ask: try appliance check"
    else:
        problem = _problem(url)
    if as_json:
        print_json({"ok": not problem, "url": url, "problem": problem})
    else:
        click.echo(problem or f"{url} answers")
    sys.exit(1 if problem else 0)


def _problem(url: str) -> str:
    """Say what is wrong, nothing where it lives. A proxy that the environment names is not asked for the way."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_SECONDS)
    try:
        connection.request("GET", parts.path)
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return f"{url} does not answer: {error or type(error).__name__}"
    finally:
        connection.close()
    return "" if status == HTTPStatus.OK else f"{url} answers {status}"
