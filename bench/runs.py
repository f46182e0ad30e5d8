"""Runs of the load against servers, each held against the rows that were stored."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench import load
from bench.errors import BenchError
from bench.load import Answers
from bench.world import Body, Server

# What a load leaves on its way when it ends has arrived by then.
_SETTLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long each run lasts, and the warm-up before it, in seconds; how many runs there are of each side."""

    rounds: int
    seconds: float
    warm_up_seconds: float


def measured(server: Server, body: Body, seconds: float, *, per_second: float = 0) -> Answers:
    """Load a server and hold what wrk saw against the rows it stored. Raises BenchError when rows are missing."""
    with rows_checked(server, body) as seen:
        seen.append(load.run(server.url, body.path, seconds=seconds, per_second=per_second))
    return seen[0]


@contextmanager
def rows_checked(server: Server, body: Body) -> Iterator[list[Answers]]:
    """Compare the rows that came in during the block with the answers which the block has put into the list."""
    time.sleep(_SETTLE_SECONDS)
    before = server.newest_id() if server.stores else 0
    seen: list[Answers] = []
    yield seen
    if not server.stores:
        return
    promised = sum(answers.requests for answers in seen) * body.events
    stored = server.rows_after(before)
    if stored < promised:
        raise BenchError(f"{promised} events were answered with 200, and {stored} rows came in")


def alternate(
    servers: Sequence[Server], body: Body, pace: Pace, tell: Callable[[str], None]
) -> list[tuple[Answers, ...]]:
    """Load the servers in turn, round after round, so that the machine's moods hit all of them."""
    rounds = []
    for number in range(1, pace.rounds + 1):
        rounds.append(tuple(_warm(server, body, pace) for server in servers))
        figures = ", ".join(f"{answers.per_second:.0f}/s p99 {answers.p99_ms:.0f} ms" for answers in rounds[-1])
        tell(f"  {number}/{pace.rounds}: {figures}")
    return rounds


def _warm(server: Server, body: Body, pace: Pace) -> Answers:
    load.run(server.url, body.path, seconds=pace.warm_up_seconds)
    return measured(server, body, pace.seconds)
