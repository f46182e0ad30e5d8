"""What is measured and how."""

from collections.abc import Callable
from dataclasses import dataclass

import psutil

from bench.runs import Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The pace of the runs, rows in the full table and in an export, minutes of load."""

    pace: Pace
    rows: int
    export_rows: int
    minutes: float
    tell: Callable[[str], None]


def load_now() -> float:
    """Return the machine's load average of the last minute."""
    return psutil.getloadavg()[0]
