"""`python -m soak`: steady load, faults by chance, and at the end one table. Exit code 1 when anything was missed."""

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
from conftest import wait_for

from soak import bounds, counting
from soak.bounds import Load
from soak.disk import at_rest, most_wal
from soak.faults import Deck, Fault, kinds, strike
from soak.table import Line
from soak.watching import watching
from soak.world import World, build

_TERMINATED = 128 + signal.SIGTERM
# After a kill, a run waits 30 seconds for the dead one's lease, and a bucket's retries take some more.
_EXPORT_SECONDS = 180
_NEEDS_COMPILER = "the clock cannot be stepped without a C compiler (apt-get install gcc libc6-dev)"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--minutes", type=click.FloatRange(0.5), default=60, help="Minutes of load and faults.")
@click.option("--per-second", type=click.FloatRange(1), default=200, help="Events sent each second.")
@click.option("--seed", type=int, default=None, help="Repeats the faults of a run, in their order.")
@click.option("--clock/--no-clock", default=True, help="Step the clock, where there is a C compiler.")
def main(*, minutes: float, per_second: float, seed: int | None, clock: bool) -> None:
    """Send a steady load, break everything by chance, and count: nothing lost, nothing doubled, nothing grown."""
    # Ended from outside, it still stops what it has started.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(_TERMINATED))
    if clock and minutes >= bounds.ALL_KINDS_MINUTES and shutil.which("cc") is None:
        raise click.UsageError(f"{_NEEDS_COMPILER}, or leave that out with --no-clock")
    seed = seed if seed is not None else time.time_ns() % 10**6
    tell(f"seed {seed}")
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    holds = False
    try:
        with build(directory, seed, steps_clock=clock) as world:
            if clock and not world.clock.steps:
                tell(_NEEDS_COMPILER)
            chance = random.Random(seed)  # noqa: S311 - no secrets are made of it
            lines = soak(
                world,
                Deck(kinds(clock=clock), chance, able=kinds(clock=world.clock.steps)),
                chance,
                minutes,
                per_second,
            )
        click.echo("\n".join(str(line) for line in lines))
        holds = all(line.holds for line in lines)
    except AssertionError as problem:
        tell(f"MISSED: {problem}")
    if holds:
        shutil.rmtree(directory)
    else:
        tell(f"What it left is in {directory} (box/log first). To repeat it: --seed {seed} --minutes {minutes:g}")
    sys.exit(0 if holds else 1)


def soak(world: World, deck: Deck, chance: random.Random, minutes: float, per_second: float) -> list[Line]:
    """First anything may break; then, for as long, only what the worker lives through. Return the table."""
    before, begun = at_rest(world.box), time.monotonic()
    world.crowd.start(world.box.url, per_second=per_second)
    with watching(world.box) as record:
        for faults in (deck.deal_all(), deck.deal_sparing()):
            _break(world, faults, chance, minutes * 30)
        time.sleep(1)
    world.crowd.stop()
    load = Load(events=len(world.crowd.acknowledged()), seconds=time.monotonic() - begun)
    quiet(world)
    verified = world.box.run("verify", check=False).returncode
    lines = [*bounds.faults(deck.times(), minutes), *bounds.answers(world.crowd.statuses()), *counting.events(world)]
    lines.append(Line("exit code of appliance verify", str(verified), "0", verified == 0))
    lines += bounds.processes(record, load)
    lines += bounds.disk(before, at_rest(world.box), record, load, most_wal=most_wal(world.box))
    lines += counting.remains(world)
    code = world.box.stop()
    return [*lines, Line("exit code of appliance serve", str(code), "0", code == 0)]


def _break(world: World, faults: Iterator[Fault], chance: random.Random, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        time.sleep(chance.uniform(0.5, 4))
        if time.monotonic() > deadline:
            return
        fault = next(faults)
        tell(f"{time.strftime('%H:%M:%S')} {fault.__name__}")
        strike(fault, world, chance)
        world.forget_requests()


def quiet(world: World) -> None:
    """Let everything be right again, and all be stored and exported."""
    world.clock.set(0)
    for sky in world.skies.values():
        sky.bad = False
    wait_for(world.box.ready, "the spool to be drained", seconds=120)
    world.wait_for_exports()
    wait_for(lambda: _exported(world), "everything to be exported", seconds=_EXPORT_SECONDS)


def _exported(world: World) -> bool:
    done = world.box.run("export", "--json", check=False)
    reports = json.loads(done.stdout or "[]")
    return done.returncode == 0 and bool(reports) and not any(one["failed"] or one["row_count"] for one in reports)


def tell(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
