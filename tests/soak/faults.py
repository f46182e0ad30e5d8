"""What befalls the parts while the load goes on, by a chance that a seed repeats."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import blows
import psutil
import weather
from conftest import Appliance, wait_for

from soak.world import World

Fault = Callable[[World, random.Random], None]
_KINDS = (weather.busy, weather.refused, weather.expired, weather.cut_off, weather.anything)
_LARGEST_STEP_SECONDS = 3600


def storm_at_one_bucket(world: World, chance: random.Random) -> None:
    """500, 503, 403, an expired token, answers that are cut off and connections that are reset, for some seconds."""
    sky = world.skies[chance.choice(sorted(world.skies))]
    sky.kind, sky.rate = chance.choice(_KINDS), chance.uniform(0.2, 1)
    sky.bad = True
    world.export_beside()
    time.sleep(chance.uniform(3, 6))
    sky.bad = False


def bucket_server_down(world: World, chance: random.Random) -> None:
    world.server.down()
    world.export_beside()
    time.sleep(chance.uniform(2, 4))
    world.server.up()


def export_beside(world: World, _: random.Random) -> None:
    """Nobody waits for it: what comes next meets it in the middle."""
    world.export_beside()


def kill_exports(world: World, chance: random.Random) -> None:
    world.export_beside()
    time.sleep(chance.uniform(1, 3))
    for process in world.export_processes():
        process.kill()


def stop_postgres(world: World, _: random.Random) -> None:
    """As an administrator does who restarts it."""
    blows.postgres_of(world.box)[0].send_signal(signal.SIGINT)


def step_clock(world: World, chance: random.Random) -> None:
    """Forwards or backwards, by seconds or by an hour; then back to the true time at the next blow, or further."""
    world.clock.set(chance.choice([-1, 1]) * chance.uniform(1, _LARGEST_STEP_SECONDS) * chance.choice([0.01, 1]))
    time.sleep(chance.uniform(2, 4))
    if chance.random() < 0.5:
        world.clock.set(0)


def _to_box(blow: Callable[[Appliance], None]) -> Fault:
    def fault(world: World, _: random.Random) -> None:
        blow(world.box)

    fault.__name__ = blow.__name__
    return fault


# The worker lives through these: while only they come, its memory and its files can be watched for long.
SPARING = [
    storm_at_one_bucket,
    bucket_server_down,
    export_beside,
    kill_exports,
    stop_postgres,
    *(_to_box(blow) for blow in (blows.kill_postmaster, blows.kill_postgres, blows.freeze_postgres)),
]
ALL = SPARING + [_to_box(blow) for blow in (blows.kill_worker, blows.kill_server, blows.kill_everything, blows.restart)]


def faults(kinds: list[Fault], world: World, chance: random.Random) -> Iterator[Fault]:
    """Each kind once, in any order, before any comes again."""
    kinds = [*kinds, step_clock] if world.clock.steps else kinds
    while True:
        yield from chance.sample(kinds, len(kinds))


def strike(fault: Fault, world: World, chance: random.Random) -> None:
    """Let it happen, and wait until the appliance is ready again."""
    # What was to be killed may have ended by itself, or by what came before.
    with suppress(psutil.NoSuchProcess):
        fault(world, chance)
    wait_for(world.box.ready, f"the appliance to be ready after {fault.__name__}", seconds=120)
