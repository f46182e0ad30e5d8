"""One run of a job, or a look at its buckets, in a process of its own, so that it never holds up an answer.

In the worker it would share the interpreter's lock with every request, and a run that eats up the memory would take the
collector with it. The child gets what it needs on its standard input and answers on its standard output. When the input
ends, because it is told to stop or because the worker is gone, it stops at its next safe point.
"""

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

from appliance import log as logs
from appliance.config import Settings
from appliance.errors import ApplianceError
from appliance.export.job import Exporter
from appliance.export.means import Pulse
from appliance.export.report import Report
from appliance.priority import step_back
from appliance.store.database import Database
from appliance.words import how_ended

if TYPE_CHECKING:
    from appliance.export.buckets.probe import Probe
    from appliance.export.verify import Verdict

log = logging.getLogger(__name__)

# -P: nothing that lies in the working directory can pass for the appliance.
_COMMAND = (sys.executable, "-P", "-m", __name__)
_LOOK_EVERY_SECONDS = 0.2
# What a run gets to reach its next safe point, of the ten seconds of `docker stop`.
STOP_SECONDS = 8.0
# Each request to a bucket has time-outs of its own (clients.py), and an object has 256 MB at most before compression.
STUCK_SECONDS = 3600.0


def run_apart(
    settings: Settings, job: str, *, conninfo: str, stopping: threading.Event, due: datetime | None = None
) -> Report:
    """Run a job in a child as `Exporter.run` does, sparing buckets that rest, and raise what that raises.

    Raises ApplianceError when the child came to an end without an answer.
    """
    report: Report = _do_apart("run", settings, job, conninfo=conninfo, stopping=stopping, due=due)
    return report


def verify_apart(settings: Settings, job: str, *, conninfo: str, stopping: threading.Event) -> "Verdict":
    """Hold the buckets of a job against the ledger in a child; see `run_apart`."""
    verdict: Verdict = _do_apart("verify", settings, job, conninfo=conninfo, stopping=stopping)
    return verdict


def probe_apart(settings: Settings, bucket: str, *, conninfo: str, stopping: threading.Event) -> "Probe":
    """Try a bucket in a child; see `run_apart`."""
    probe: Probe = _do_apart("probe", settings, bucket, conninfo=conninfo, stopping=stopping)
    return probe


def _do_apart(  # noqa: PLR0913 - all that the child is told
    task: str, settings: Settings, name: str, *, conninfo: str, stopping: threading.Event, due: datetime | None = None
) -> Any:
    ended = threading.Event()
    # A session of its own steps back as a whole (priority.py), and hears nothing of a terminal's Ctrl-C: the worker
    # tells it to stop in its own time.
    with subprocess.Popen(  # noqa: S603 - our own
        _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
    ) as child:
        assert child.stdin is not None  # noqa: S101 - both are pipes
        assert child.stdout is not None  # noqa: S101
        try:
            # One that has died already tells so by its answer.
            with suppress(BrokenPipeError):
                child.stdin.write(pickle.dumps((task, settings, conninfo, name, due)))
            threading.Thread(target=_close_to_stop, args=(child.stdin, stopping, ended), daemon=True).start()
            answer = child.stdout.read()
        finally:
            ended.set()
    return _answer_of(name, answer, child.returncode)


def _close_to_stop(stdin: IO[bytes], stopping: threading.Event, ended: threading.Event) -> None:
    while not ended.wait(_LOOK_EVERY_SECONDS):
        if stopping.is_set():
            stdin.close()
            return


def _answer_of(name: str, answer: bytes, exit_code: int) -> Any:
    if not answer:
        raise ApplianceError(
            f"the process that ran {name} ended with {how_ended(exit_code)}; the next run goes on "
            "(SIGKILL often means that the machine has too little memory)"
        )
    found = pickle.loads(answer)  # noqa: S301 - our own child has written it
    if isinstance(found, ApplianceError):
        raise found
    return found


# -- the child --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the job that standard input tells, and answer with its report or its error."""
    # Before there are threads, which inherit it. Somebody waits for an event's answer, nobody for this.
    step_back(os.getpid())
    answer = os.dup(1)
    # What a library may print must not get into the answer.
    os.dup2(2, 1)
    task, settings, conninfo, name, due = pickle.load(sys.stdin.buffer)  # noqa: S301 - the worker has written it
    logs.configure(secrets=settings.secret_values(), as_json=settings.server.log_format == "json")
    stopping = threading.Event()
    threading.Thread(target=_stop_when_told, args=(stopping,), daemon=True).start()
    with os.fdopen(answer, "wb") as stream, suppress(BrokenPipeError):
        stream.write(pickle.dumps(_do(task, settings, conninfo, name, stopping, due)))


def _do(  # noqa: PLR0913, PLR0917 - what the worker has told
    task: str, settings: Settings, conninfo: str, name: str, stopping: threading.Event, due: datetime | None
) -> Any:
    try:
        if task == "probe":
            from appliance.export.buckets.probe import probe_one  # noqa: PLC0415 - seldom asked for

            return probe_one(settings, name)
        with Database(conninfo, makes_way=True) as db:
            exporter = Exporter(settings, db, conninfo=conninfo, stopping=stopping)
            threading.Thread(target=_cut_off_when_stuck, args=(exporter.means.pulse, name), daemon=True).start()
            if task == "verify":
                from appliance.export.verify import Verification  # noqa: PLC0415 - seldom asked for

                return Verification(exporter.means, name).run()
            return exporter.run(name, spare_resting=True, due=due)
    except ApplianceError as error:
        return error
    except Exception:
        log.exception("%s %s failed", task, name)
        return ApplianceError("it failed in a way that nobody foresaw: the log says how")


def _cut_off_when_stuck(pulse: Pulse, job: str) -> None:
    """End a run that hangs for good: on a database that is frozen, or a network file system that is gone."""
    while pulse.silent_seconds < STUCK_SECONDS:
        time.sleep(STUCK_SECONDS - pulse.silent_seconds)
    log.error("export %s: nothing has moved for %.0f s: cut off; the next run goes on", job, pulse.silent_seconds)
    os._exit(1)


def _stop_when_told(stopping: threading.Event) -> None:
    # Not through sys.stdin: its lock would still be held when the interpreter ends.
    os.read(0, 1)
    stopping.set()
    time.sleep(STOP_SECONDS)
    # Cut off here, in the middle of an upload perhaps, it is as if it had crashed: the next run goes on.
    os._exit(1)


if __name__ == "__main__":
    main()
