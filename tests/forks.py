"""Runs of export jobs in processes that can be killed, forked from one that has imported all they need.

    python tests/forks.py

For each pickled (settings, conninfo, job) on standard input it forks a process that runs the job, and answers with two
pickles: the process's id, and how it ended (an exit code, or minus the number of a signal).
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import adbc_driver_postgresql.dbapi
import pyarrow.compute

from appliance.config import S3Bucket, Settings
from appliance.errors import ApplianceError
from appliance.export import delivery
from appliance.export import run as one_run
from appliance.export.buckets import clients, s3
from appliance.export.job import Exporter
from appliance.store import runs
from appliance.store.database import Database

# What a run would import when it first needs it.
_NEEDED = (adbc_driver_postgresql.dbapi, pyarrow.compute, s3)
_clients: dict[str, Any] = {}


def one_client(settings: S3Bucket) -> Any:
    """Return the client of an address and its patience: it takes longer to make than a small run."""
    which = f"{settings.endpoint_url} {settings.read_timeout_seconds}"
    if which not in _clients:
        _clients[which] = clients.make_client(settings)
    return _clients[which]


# What makes a run small and hasty: few rows are many batches already; a dead run's lease is over; a call of a bucket is
# one request, and comes in its turn; nobody has to go first.
SMALL_AND_HASTY: tuple[tuple[Any, str, Any], ...] = (
    (one_run, "BATCH_ROWS", 3),
    (runs, "LEASE_SECONDS", -1),
    (delivery, "_UPLOADS_AT_ONCE", 1),
    (clients, "_ATTEMPTS", 1),
    (s3, "make_client", one_client),
)


def main() -> None:
    for module, name, value in SMALL_AND_HASTY:
        setattr(module, name, value)
    while True:
        try:
            work = pickle.load(sys.stdin.buffer)  # noqa: S301 - our own test has written it
        except EOFError:
            return
        for bucket in work[0].buckets.values():
            one_client(bucket)
        pid = os.fork()
        if pid == 0:
            os._exit(run(*work))
        answer(pid)
        answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def answer(value: int) -> None:
    pickle.dump(value, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def run(settings: Settings, conninfo: str, job: str) -> int:
    try:
        with Database(conninfo) as db:
            return int(Exporter(settings, db, conninfo=conninfo).run(job).failed)
    except ApplianceError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1


class Forks:
    """The process that forks, from outside."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def start(self, settings: Settings, conninfo: str, job: str) -> int:
        """Start a run and return its process's id."""
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps((settings, conninfo, job)))
        self._process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """Return how the run ended."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(pickle.load(self._process.stdout))  # noqa: S301 - our own process has written it


@contextmanager
def forks() -> Iterator[Forks]:
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()


if __name__ == "__main__":
    main()
