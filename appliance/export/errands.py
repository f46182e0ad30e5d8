"""What an admin asks for beside the schedule: holding a job's buckets against the ledger, trying a bucket.

One at a time, in a thread that waits for a process of its own (process.py). What came of it is remembered until the
appliance stops: it is for the one who asked.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Literal, TypeAlias

from appliance.errors import ApplianceError
from appliance.export.buckets.probe import Probe
from appliance.export.verify import Verdict
from appliance.words import counted

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["verify", "probe"]
State: TypeAlias = Literal["waiting", "running", "well", "damaged", "failed"]

# Of a bucket that somebody has emptied there is a line for each object.
_SHOWN_LINES = 50


@dataclass(frozen=True, slots=True)
class Errand:
    """Something that was asked for and what came of it."""

    kind: Kind
    name: str
    state: State
    changed_at: datetime
    lines: tuple[str, ...] = ()

    @property
    def under_way(self) -> bool:
        """Whether there is nothing to say of it yet."""
        return self.state in {"waiting", "running"}


class Errands:
    """Runs them one after the other and remembers the last of each kind and name."""

    def __init__(self, verify: Callable[[str], Verdict], probe: Callable[[str], Probe]) -> None:
        self._verify = verify
        self._probe = probe
        self._last: dict[tuple[Kind, str], Errand] = {}
        self._changed = threading.Condition()
        self._asked: SimpleQueue[Errand] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="errands", daemon=True)

    def ask(self, kind: Kind, name: str) -> None:
        """Have it done soon; what is under way already is not done twice."""
        with self._changed:
            last = self._last.get((kind, name))
            if last is not None and last.under_way:
                return
            errand = Errand(kind, name, "waiting", datetime.now(UTC))
            self._last[kind, name] = errand
            if not self._thread.is_alive():
                self._thread.start()
        self._asked.put(errand)

    def last(self, kind: Kind) -> dict[str, Errand]:
        """Return the last of a kind by name."""
        with self._changed:
            return {name: errand for (of, name), errand in self._last.items() if of == kind}

    def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until nothing is under way; False when that takes too long."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(one.under_way for one in self._last.values()), timeout_seconds
            )

    def _work(self) -> None:
        while True:
            errand = self._asked.get()
            self._note(replace(errand, state="running", changed_at=datetime.now(UTC)))
            state, lines = self._outcome(errand)
            shown = lines[:_SHOWN_LINES]
            if len(lines) > len(shown):
                shown.append(f"and {len(lines) - len(shown)} more: `appliance verify {errand.name}` lists them all")
            log.log(logging.INFO if state == "well" else logging.ERROR, "%s %s: %s", errand.kind, errand.name, lines[0])
            self._note(replace(errand, state=state, changed_at=datetime.now(UTC), lines=tuple(shown)))

    def _note(self, errand: Errand) -> None:
        with self._changed:
            self._last[errand.kind, errand.name] = errand
            self._changed.notify_all()

    def _outcome(self, errand: Errand) -> tuple[State, list[str]]:
        """Do it; the boundary where its errors become what the admin reads."""
        try:
            if errand.kind == "probe":
                return _of_probe(self._probe(errand.name))
            return _of_verdict(self._verify(errand.name))
        except ApplianceError as error:
            return "failed", [str(error)]
        except Exception:
            log.exception("%s %s failed", errand.kind, errand.name)
            return "failed", ["it failed in a way that nobody foresaw: the log says how"]


def _of_probe(probe: Probe) -> tuple[State, list[str]]:
    held = [f"{', '.join(probe.held)}: works"] if probe.held else []
    return "failed" if probe.failures else "well", [*probe.failures, *held, *probe.warnings]


def _of_verdict(verdict: Verdict) -> tuple[State, list[str]]:
    found = [f"{one.bucket or 'ledger'}: {one.kind}: {one.key}: {one.what}" for one in verdict.findings]
    state: State = "damaged" if verdict.findings else "failed" if verdict.problems else "well"
    if not verdict.batches:
        return state, [*verdict.problems, *found] or ["nothing exported yet"]
    read = f"{counted(verdict.objects, 'object', 'objects')} of {counted(verdict.batches, 'batch', 'batches')} read"
    return state, [f"{read}, {len(verdict.findings) or 'nothing'} found wrong", *verdict.problems, *found]
