"""`python -m bench.exporter`: one run of an export job as the worker starts it, and the most memory that it took.

In a process of its own, because the kernel tells the largest of all children a process has had: here there is one.
"""

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from appliance import log
from appliance.config import Settings
from appliance.errors import ApplianceError
from appliance.export.process import run_apart
from appliance.store.programs import die_with_parent
from bench.errors import BenchError
from bench.servers import EXPORT_JOB

_LONGEST_SECONDS = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run did and took; `peak_mb` is the largest resident memory of its process."""

    rows: int
    seconds: float
    peak_mb: float

    @property
    def per_second(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


def run(settings: Mapping[str, Any], conninfo: str) -> Run:
    """Run the job EXPORT_JOB of a configuration. Raises BenchError when it did not deliver everything."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps({"settings": settings, "conninfo": conninfo}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=_LONGEST_SECONDS,
    )
    if done.returncode != 0:
        raise BenchError("the export failed; the lines above say why")
    return Run(**json.loads(done.stdout))


def main() -> None:
    """Run the job that standard input tells, and answer on standard output."""
    die_with_parent()
    log.configure()
    wanted = json.load(sys.stdin)
    settings = Settings.model_validate(wanted["settings"])
    started = time.monotonic()
    try:
        report = run_apart(settings, EXPORT_JOB, conninfo=wanted["conninfo"], stopping=threading.Event())
    except ApplianceError as error:
        sys.exit(str(error))
    seconds = time.monotonic() - started
    if report.failed:
        sys.exit(report.summary)
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    json.dump(asdict(Run(rows=report.row_count, seconds=seconds, peak_mb=peak_mb)), sys.stdout)


if __name__ == "__main__":
    main()
