"""The measures. Each takes the two sides of a ratio in turn and returns lines of the table."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from bench import exports, load, tracker
from bench.errors import BenchError
from bench.filling import fill
from bench.load import Answers
from bench.plan import Plan, load_now
from bench.report import Bound, Row
from bench.runs import alternate, measured, rows_checked
from bench.servers import Kind
from bench.small_machines import held
from bench.world import Body, Server, World

_EXPORT_SECONDS = 300
# A p99 of few requests is that of one moment: without the export the load lasts about as long as beside it.
_RUNS_OF_AN_EXPORT = 4
_AFTERWARDS_SECONDS = 5
_LOOK_SECONDS = 0.2
_FIRST_MINUTE_SECONDS = 60
_LOOKS = 20
_PAGE_MS = 100
_SMALL_MACHINE_CORES = 0.25


def single(world: World, plan: Plan) -> list[Row]:
    """One event a request, against a route that does nothing and against the same route without storing."""
    row = partial(Row, unit="requests/s", load_before=load_now())
    durable, no_op, checks = _rates(world, plan, (Kind.DURABLE, Kind.NO_OP, Kind.CHECKS), world.single)
    return [
        row(
            name="one event, stored / Flask route that does nothing",
            figures=durable,
            against=no_op,
            bound=Bound(at_least=0.60, aim=0.75),
        ),
        row(
            name="one event, stored / same route without storing",
            figures=durable,
            against=checks,
            bound=Bound(at_least=0.80),
        ),
    ]


def batch(world: World, plan: Plan) -> list[Row]:
    """Twenty events a request, against the same route without storing."""
    row = partial(Row, unit="events/s", load_before=load_now())
    durable, checks = _rates(world, plan, (Kind.DURABLE, Kind.CHECKS), world.batch)
    return [
        row(
            name="20 events a request, stored / same route without storing",
            figures=durable,
            against=checks,
            bound=Bound(at_least=0.70),
        )
    ]


def insert(world: World, plan: Plan) -> list[Row]:
    """One event a request, against one INSERT and commit a request."""
    row = partial(Row, unit="requests/s", load_before=load_now())
    durable, inserted = _rates(world, plan, (Kind.DURABLE, Kind.INSERT), world.single)
    return [
        row(
            name="one event, stored / one INSERT and commit a request",
            figures=durable,
            against=inserted,
            bound=Bound(at_least=1.3),
        )
    ]


def full_table(world: World, plan: Plan) -> list[Row]:
    """One event a request into a full table, against an empty one."""
    load_before = load_now()
    with world.server(Kind.DURABLE) as full, world.server(Kind.DURABLE) as empty:
        fill(world, full.conninfo, plan.rows, plan.tell)
        rounds = alternate([full, empty], world.single, plan.pace, plan.tell)
    row = partial(Row, load_before=load_before)
    table = f"table of {plan.rows:,} rows / empty table"
    return [
        row(
            name=f"{table}, rate",
            unit="requests/s",
            figures=tuple(answers[0].per_second for answers in rounds),
            against=tuple(answers[1].per_second for answers in rounds),
            bound=Bound(at_least=0.9),
        ),
        row(
            name=f"{table}, p99",
            unit="ms",
            figures=tuple(answers[0].p99_ms for answers in rounds),
            against=tuple(answers[1].p99_ms for answers in rounds),
            bound=Bound(at_most=1.2),
        ),
    ]


def several(world: World, plan: Plan) -> list[Row]:
    """Two appliances on one database, each held to a part of a core, against one of them."""
    load_before = load_now()
    pairs = []
    with ExitStack() as running:
        conninfo = running.enter_context(world.database())
        servers = [running.enter_context(world.server_on(conninfo, Kind.DURABLE)) for _ in range(2)]
        for server in servers:
            running.enter_context(held(server.pid, cores=_SMALL_MACHINE_CORES))
        for number in range(1, plan.pace.rounds + 1):
            together, alone = (_rate_of_all(some, world.single, plan) for some in (servers, servers[:1]))
            plan.tell(f"  {number}/{plan.pace.rounds}: {together:.0f}/s of two, {alone:.0f}/s of one")
            pairs.append((together, alone))
    return [
        Row(
            name=f"two appliances on one database / one, each with {_SMALL_MACHINE_CORES} of a core",
            unit="requests/s",
            figures=tuple(pair[0] for pair in pairs),
            against=tuple(pair[1] for pair in pairs),
            bound=Bound(at_least=1.8),
            load_before=load_before,
        )
    ]


def _rate_of_all(servers: Sequence[Server], body: Body, plan: Plan) -> float:
    """Load servers that share a database, all at once; return the requests a second of all of them."""

    def load_one(server: Server, seconds: float) -> Answers:
        return load.run(server.url, body.path, seconds=seconds)

    with ThreadPoolExecutor(len(servers)) as clients:
        list(clients.map(partial(load_one, seconds=plan.pace.warm_up_seconds), servers))
        with rows_checked(servers[0], body) as seen:
            seen.extend(clients.map(partial(load_one, seconds=plan.pace.seconds), servers))
    return sum(answers.per_second for answers in seen)


def page(world: World, plan: Plan) -> list[Row]:
    """The slowest of many looks at the first page with a full table."""
    load_before = load_now()
    with world.server(Kind.DURABLE) as server:
        fill(world, server.conninfo, plan.rows, plan.tell)
        slowest = [_slowest_look(server) for _ in range(plan.pace.rounds)]
    return [
        Row(
            name=f"slowest of {_LOOKS} looks at the status page, {plan.rows:,} rows / what it may take",
            unit="ms",
            figures=tuple(slowest),
            against=(_PAGE_MS,) * plan.pace.rounds,
            bound=Bound(at_most=1),
            load_before=load_before,
        )
    ]


def _slowest_look(server: Server) -> float:
    return max(server.page_ms("/admin/") for _ in range(_LOOKS))


def export(world: World, plan: Plan) -> list[Row]:
    """A third of full load while a million rows are exported, against the same load without."""
    load_before = load_now()
    pairs = []
    seconds = _RUNS_OF_AN_EXPORT * plan.pace.seconds
    with world.server(Kind.DURABLE) as server:
        load.run(server.url, world.single.path, seconds=plan.pace.warm_up_seconds)
        third = measured(server, world.single, plan.pace.seconds).per_second / 3
        plan.tell(f"  a third of full load: {third:.0f} requests/s")
        for number in range(1, plan.pace.rounds + 1):
            fill(world, server.conninfo, plan.export_rows, plan.tell)
            alone = measured(server, world.single, seconds, per_second=third)
            beside = _beside_export(server, world.single, plan.export_rows, third)
            plan.tell(f"  {number}/{plan.pace.rounds}: {_p99(alone)} without, {_p99(beside)} beside the export")
            pairs.append((beside.p99_ms, alone.p99_ms))
    return [
        Row(
            name=f"p99 at a third of full load, during an export of {plan.export_rows:,} rows / without",
            unit="ms",
            figures=tuple(pair[0] for pair in pairs),
            against=tuple(pair[1] for pair in pairs),
            bound=Bound(at_most=3),
            load_before=load_before,
        )
    ]


def memory(world: World, plan: Plan) -> list[Row]:
    """The worker's resident memory after minutes of full load, against after the first of them."""
    load_before = load_now()
    with world.server(Kind.DURABLE) as server:
        figures = []
        for seconds in (_FIRST_MINUTE_SECONDS, (plan.minutes - 1) * 60):
            answers = measured(server, world.single, seconds)
            figures.append(server.resident_mb())
            plan.tell(f"  {figures[-1]:.0f} MB after {seconds:.0f} s more at {answers.per_second:.0f}/s")
    return [
        Row(
            name=f"memory after {plan.minutes:g} minutes of full load / after one",
            unit="MB",
            figures=(figures[1],),
            against=(figures[0],),
            bound=Bound(at_most=1.1),
            load_before=load_before,
        )
    ]


MEASURES: Mapping[str, Callable[[World, Plan], list[Row]]] = {
    "single": single,
    "batch": batch,
    "insert": insert,
    "table": full_table,
    "several": several,
    "page": page,
    "tracker": tracker.longest_task,
    "export": export,
    "memory": memory,
    "export-rate": exports.rate,
    "export-memory": exports.memory,
    "export-table": exports.beside_exported,
}


def _rates(world: World, plan: Plan, kinds: tuple[Kind, ...], body: Body) -> list[tuple[float, ...]]:
    """Return for each kind of server the events/s of its runs, in the order of the rounds."""
    with ExitStack() as stack:
        servers = [stack.enter_context(world.server(kind)) for kind in kinds]
        rounds = alternate(servers, body, plan.pace, plan.tell)
    return [
        tuple(answers.per_second * body.events for answers in runs_of_one) for runs_of_one in zip(*rounds, strict=True)
    ]


def _beside_export(server: Server, body: Body, rows: int, per_second: float) -> Answers:
    """Load the server until its export is done, or busy for long with what has come in since it began."""
    goal = server.exported_rows() + rows
    deadline = time.monotonic() + _EXPORT_SECONDS
    with (
        rows_checked(server, body) as seen,
        load.in_background(server.url, body.path, per_second=per_second) as background,
        ThreadPoolExecutor(1) as pool,
    ):
        run = pool.submit(server.post, "/bench/export", timeout_seconds=_EXPORT_SECONDS)
        while not run.done() and time.monotonic() < deadline:
            if server.exported_rows() >= goal:
                deadline = min(deadline, time.monotonic() + _AFTERWARDS_SECONDS)
            time.sleep(_LOOK_SECONDS)
        seen.append(background.stop())
        _check_export(*run.result(), rows)
    return seen[0]


def _check_export(status: int, report: Any, rows: int) -> None:
    if status != 200 or report["failed"] or report["rows"] < rows:  # noqa: PLR2004 - HTTP's number
        raise BenchError(f"the export did not deliver {rows:,} rows: {status} {report}")


def _p99(answers: Answers) -> str:
    return f"p99 {answers.p99_ms:.0f} ms"
