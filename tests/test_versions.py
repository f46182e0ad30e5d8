"""A PostgreSQL that is too old is refused in a sentence, one that nobody has tried is used, with a warning.

The server is a real one of version 18; what is moved is the range that the appliance was tried with.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Appliance, http, wait_for
from servers import BINARIES

from appliance.store import versions

SERVER = 18
TOO_OLD = (
    f"the database is PostgreSQL {SERVER}, and the appliance needs {SERVER + 1} or newer: upgrade that server, or name "
    "another one in database.url"
)
UNTRIED = f"WARNING appliance.runtime: the database is PostgreSQL {SERVER}, and this version of the appliance was tried"


@pytest.fixture
def box(appliance: Callable[..., Appliance], conninfo: str) -> Appliance:
    return appliance(database={"url": conninfo})


def command(box: Appliance, words: str, *, oldest: int = versions.OLDEST, newest: int = versions.NEWEST) -> list[str]:
    """Return a command of an appliance that was tried with other versions."""
    script = (
        "from appliance.cli import main; from appliance.store import versions;"
        f"versions.OLDEST, versions.NEWEST = {oldest}, {newest}; main()"
    )
    return [sys.executable, "-c", script, words, "--config", str(box.write_config())]


@contextmanager
def serving(box: Appliance, words: list[str]) -> Iterator[Path]:
    """Let it serve; yields its log."""
    path = box.directory / "log"
    with path.open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            wait_for(box.reached, "the web server")
            yield path
        finally:
            process.terminate()


def test_a_server_that_is_too_old_is_refused_by_commands_in_one_sentence(box: Appliance) -> None:
    words = command(box, "status", oldest=SERVER + 1)
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, f"appliance: {TOO_OLD}\n")


def test_an_appliance_on_one_that_is_too_old_says_so_and_keeps_events_in_the_spool(box: Appliance) -> None:
    with serving(box, command(box, "serve", oldest=SERVER + 1)):
        wait_for(lambda: TOO_OLD in http(box, "GET", "/health/ready").json.get("notes", []), "the reason")
        event = b'{"eventType": "click", "siteId": "shop"}'
        assert http(box, "POST", "/collect", event, {"Content-Type": "text/plain"}).status == 202


def test_one_that_is_newer_than_any_that_was_tried_is_used_with_a_warning(box: Appliance) -> None:
    with serving(box, command(box, "serve", newest=SERVER - 1)) as log:
        wait_for(box.ready, "the appliance")
        assert log.read_text().count(UNTRIED) == 1


def test_of_a_version_that_was_tried_nothing_is_said(box: Appliance) -> None:
    assert "was tried" not in box.start().log


def test_the_versions_that_are_promised_are_those_that_tests_run_on() -> None:
    assert (str(versions.OLDEST), str(versions.NEWEST)) == (min(BINARIES), max(BINARIES))
