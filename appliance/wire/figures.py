"""What the web server counts."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WebFigures:
    """Connections that are open, requests that have or wait for a thread, and what was sent away without one."""

    connections: int
    requests: int
    refused: Mapping[int, int]
    """Answers of the main loop, by status."""
    dropped: int
    """Connections that were closed to make a place."""
