"""The table: figures, what they must be, and the machine they were taken on."""

import os
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from bench.errors import BenchError

_PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
_BEGIN, _END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
_HEAD = (
    "| measure | this | against that | ratio | lowest | highest | must be | runs | load | date |",
    "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a ratio must be, and what it should be where that is more."""

    at_least: float | None = None
    at_most: float | None = None
    aim: float | None = None

    def holds(self, ratio: float) -> bool:
        """Return whether the ratio is within the bound."""
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)

    def __str__(self) -> str:
        bound = f"≥ {self.at_least:.2f}" if self.at_least is not None else f"≤ {self.at_most:.2f}"
        return f"{bound} (aim {self.aim:.2f})" if self.aim is not None else bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measure: each run's figure, and that of the run against which it is held."""

    name: str
    unit: str
    figures: tuple[float, ...]
    against: tuple[float, ...]
    bound: Bound
    load_before: float
    """The machine's load average of one minute before the measure began: what others were doing."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """This run to that one, round by round."""
        return tuple(a / b for a, b in zip(self.figures, self.against, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def holds(self) -> bool:
        """Whether the measure is what it must be."""
        return self.bound.holds(self.ratio)

    def line(self, date: str) -> str:
        """Return the measure as a line of the table."""
        cells = [
            self.name,
            f"{_number(statistics.median(self.figures))} {self.unit}",
            f"{_number(statistics.median(self.against))} {self.unit}",
            f"{self.ratio:.2f}",
            f"{min(self.ratios):.2f}",
            f"{max(self.ratios):.2f}",
            f"{self.bound}{'' if self.holds else ' **missed**'}",
            str(len(self.ratios)),
            f"{self.load_before:.1f}",
            date,
        ]
        return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row], machine: str) -> str:
    """Return the table with the machine above it."""
    return "\n".join(_block([row.line(_today()) for row in rows], machine))


def write(rows: Sequence[Row], machine: str) -> Path:
    """Put the table into docs/performance.md; measures that were not taken keep the lines they have on this machine."""
    text = _PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    old, end, after = rest.partition(_END)
    if not begin or not end:
        raise BenchError(f"{_PAGE} has lost the comments between which the table belongs: {_BEGIN} and {_END}")
    lines = {_name(line): line for line in old.splitlines() if line.startswith("| ")} if machine in old else {}
    lines.update({row.name: row.line(_today()) for row in rows})
    for head in _HEAD:
        lines.pop(_name(head), None)
    block = "\n".join(_block(list(lines.values()), machine))
    _PAGE.write_text(f"{before}{_BEGIN}\n\n{block}\n\n{_END}{after}", encoding="utf-8")
    return _PAGE


def _block(lines: list[str], machine: str) -> list[str]:
    return [f"{machine}.", "", *_HEAD, *lines]


def _name(line: str) -> str:
    return line.split("|")[1].strip()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"  # noqa: PLR2004 - three figures are enough


def machine(postgres_version: str) -> str:
    """Describe what was measured on, in one line."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = psutil.virtual_memory().total / 2**30
    python = ".".join(str(part) for part in sys.version_info[:3])
    return (
        f"{os.cpu_count()} cores{f' ({model[1]})' if model else ''}, {memory:.0f} GB RAM, Linux {os.uname().release}, "
        f"Python {python}, PostgreSQL {postgres_version}"
    )
