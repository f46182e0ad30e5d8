"""What people have been told: a small file in the data directory, so that a restart tells nothing twice.

Not in the database: that it is away is what some alerts come from. `serve` and `verify` may write at the same time.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from appliance.alerts.conditions import Alert, Judges

log = logging.getLogger(__name__)

_FILE = "alerts.json"
_LOCK = "alerts.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that is wrong: since when, whether people know, and since when it is right again."""

    title: str
    text: str
    since: str
    told: bool = False
    over: str = ""

    @property
    def message(self) -> Alert | None:
        """What people do not know yet."""
        if self.over:
            return Alert(f"over: {self.title}", f"It began at {self.since} UTC and was over at {self.over} UTC.")
        return None if self.told else Alert(self.title, f"{self.text} (since {self.since} UTC)")


Entries = dict[str, Entry]


class Board:
    """The entries by key. `tell` sends a message and returns whether anybody got it."""

    def __init__(self, data_dir: Path, tell: Callable[[Alert], bool]) -> None:
        self._path = data_dir / _FILE
        self._lock_path = data_dir / _LOCK
        self._tell = tell
        # Stands in for a file that cannot be used.
        self._known: Entries = {}
        # Whether the file lacks what was last known.
        self._is_behind = False

    def active(self) -> frozenset[str]:
        """Return the keys of what is wrong."""
        return frozenset(key for key, entry in self._load().items() if not entry.over)

    def settle(self, holding: Mapping[str, Alert], judges: Judges) -> None:
        """Take in what is wrong now, of all keys that `judges` accepts, and tell people what they do not know.

        What nobody got is told again the next time. A message that was sent just before a crash is sent twice.
        """
        with self._locked():
            before = self._load()
            entries = _changed(before, holding, judges)
            if entries != before:
                self._save(entries)
            for key, entry in list(entries.items()):
                message = entry.message
                if message is not None and self._tell(message):
                    if entry.over:
                        del entries[key]
                    else:
                        entries[key] = replace(entry, told=True)
                    self._save(entries)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock: IO[str] | None = None
        with suppress(OSError):
            lock = self._lock_path.open("a")
        try:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            if lock is not None:
                lock.close()

    def _load(self) -> Entries:
        if self._is_behind:
            # The disk did not take the last word: on one that is full, people would be told of it again and again.
            return dict(self._known)
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {key: Entry(**fields) for key, fields in found.items()}
        except FileNotFoundError:
            return dict(self._known)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read (%s): people may be told again", self._path, type(error).__name__)
            return dict(self._known)

    def _save(self, entries: Entries) -> None:
        self._known = dict(entries)
        content = {key: {name: getattr(entry, name) for name in Entry.__slots__} for key, entry in entries.items()}
        new = self._path.with_suffix(".new")
        try:
            new.write_text(json.dumps(content, indent=1), encoding="utf-8")
            new.replace(self._path)
            self._is_behind = False
        except OSError as error:
            self._is_behind = True
            log.warning("%s cannot be written (%s): after a restart people are told again", self._path, error.strerror)


def _changed(entries: Entries, holding: Mapping[str, Alert], judges: Judges) -> Entries:
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
    changed = {}
    for key, entry in entries.items():
        if key in holding:
            # Wrong again before anybody heard that it was over: for people it has never been right.
            changed[key] = replace(entry, over="")
        elif not judges(key) or entry.over:
            changed[key] = entry
        elif entry.told:
            changed[key] = replace(entry, over=now)
    for key, alert in holding.items():
        changed.setdefault(key, Entry(title=alert.title, text=alert.text, since=now))
    return changed
