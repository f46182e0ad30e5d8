"""What the windows look at: the configuration, the database, and what the running appliance knows of itself."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from appliance.admin.auth import Auth
from appliance.config import Settings
from appliance.errors import DatabaseUnavailableError
from appliance.export.errands import Errands
from appliance.store.database import Connection, Database

_WAIT_SECONDS = 2.0
_ANSWER_SECONDS = 10.0


class Inside(Protocol):
    """The running appliance (runtime.py)."""

    stopping: threading.Event
    errands: Errands

    def problems(self) -> list[str]:
        """Name what keeps events from being taken in."""

    def warnings(self) -> list[str]:
        """Say what is not as it should be."""

    def refusal(self) -> str:
        """Say why a database that answers is not used; empty where it is."""

    def spooled_bytes(self) -> int:
        """Return how much waits on disk for the database."""

    def next_runs(self) -> Mapping[str, datetime]:
        """Return when each job runs next."""

    def run_soon(self, job: str) -> bool:
        """Let a job run in the background."""


@dataclass(frozen=True, slots=True)
class House:
    """What every page is made from."""

    settings: Settings
    db: Database
    inside: Inside
    auth: Auth

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Lend a connection for one page. Raises DatabaseUnavailableError, also where it answers and is not to be used.

        Tables of another version may lack what a page reads, and must not get what it writes.
        """
        refusal = self.inside.refusal()
        if refusal:
            raise DatabaseUnavailableError(refusal)
        with self.db.connection(wait_seconds=_WAIT_SECONDS, answer_seconds=_ANSWER_SECONDS) as conn:
            yield conn
