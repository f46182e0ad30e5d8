"""The lines of the table that a soak ends with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A figure, and what it must be."""

    name: str
    figure: str
    must_be: str = ""
    holds: bool = True

    def __str__(self) -> str:
        return f"{self.name:<46} {self.figure:>12}   {self.must_be}{'' if self.holds else '   MISSED'}"


def none(name: str, number: int) -> Line:
    return Line(name, f"{number:,}", "0", number == 0)


def at_most(name: str, figure: float, limit: float, unit: str = "") -> Line:
    return Line(name, f"{figure:,.0f} {unit}".strip(), f"at most {limit:,.0f}", figure <= limit)
