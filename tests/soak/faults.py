"""What befalls the parts while the load goes on, by a chance that a seed repeats."""

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
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
    step_clock,
    *(_to_box(blow) for blow in (blows.kill_postmaster, blows.kill_postgres, blows.freeze_postgres)),
]
ENDING = [_to_box(blow) for blow in (blows.kill_worker, blows.kill_server, blows.kill_everything, blows.restart)]


def kinds(*, clock: bool) -> list[Fault]:
    return [kind for kind in (*ENDING, *SPARING) if clock or kind is not step_clock]


class Deck:
    """Deals the kinds of fault: by chance, but none again before each has come that may.

    Of those that are wanted it deals those that this machine is able to.
    """

    def __init__(self, wanted: Sequence[Fault], chance: random.Random, *, able: Sequence[Fault]) -> None:
        self._chance, self._able = chance, able
        self._struck = dict.fromkeys(wanted, 0)

    def times(self) -> dict[str, int]:
        """Return how often each was dealt."""
        return {kind.__name__: times for kind, times in self._struck.items()}

    def deal_all(self) -> Iterator[Fault]:
        """Deal in turn one that ends the worker and one that it lives through: half a short run must do for those."""
        while True:
            yield self._deal(ENDING)
            yield self._deal(SPARING)

    def deal_sparing(self) -> Iterator[Fault]:
        while True:
            yield self._deal(SPARING)

    def _deal(self, among: Sequence[Fault]) -> Fault:
        there = [kind for kind in among if kind in self._able]
        fewest = min(self._struck[kind] for kind in there)
        kind = self._chance.choice([kind for kind in there if self._struck[kind] == fewest])
        self._struck[kind] += 1
        return kind


def strike(fault: Fault, world: World, chance: random.Random) -> None:
    """Let it happen, and wait until the appliance is ready again."""
    # What was to be killed may have ended by itself, or by what came before.
    with suppress(psutil.NoSuchProcess):
        fault(world, chance)
    wait_for(world.box.ready, f"the appliance to be ready after {fault.__name__}", seconds=120)
