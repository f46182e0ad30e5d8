"""Holds every event that was acknowledged against the table and the objects of both jobs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crowd import Crowd

from image.box import Box, require


@dataclass
class Events:
    """Clients that send to a box, the ids that they were promised, and those that were put there without them."""

    box: Box
    directory: Path
    per_second: float = 600
    known: set[str] = field(default_factory=set)
    crowd: Crowd | None = None
    loads: int = 0

    def begin(self) -> None:
        """Let the clients begin; they go on, whatever becomes of the container."""
        self.loads += 1
        directory = self.directory / f"load{self.loads}"
        directory.mkdir(parents=True)
        self.crowd = Crowd(directory)
        self.crowd.start(self.box.url, per_second=self.per_second)

    def end(self) -> Counter[str]:
        """Let the clients end, and return how often each status was answered."""
        assert self.crowd is not None
        self.crowd.stop()
        self.known |= self.crowd.acknowledged()
        statuses = self.crowd.statuses()
        refused = {status for status in statuses if status.isdigit()} - {"200", "202", "503"}
        require(not refused, f"clients were answered {statuses}")
        return statuses

    def give_up(self) -> None:
        """End the clients, whatever happened."""
        for client in self.crowd.processes if self.crowd else []:
            client.kill()
            client.wait()

    def count(self) -> str:
        """Export what is left, count every event everywhere, and say it. Fails where one is missing or doubled."""
        self.box.wait_ready()
        self.box.export()
        check(self.known, self.box.inside("count"))
        return f"{len(self.known):,} events acknowledged, in table and exports none missing, none doubled"


def check(known: set[str], ids: Mapping[str, Sequence[str]]) -> None:
    """Fail where a place lacks an event that was acknowledged, has one twice, or is not like the table."""
    places = {name: Counter(found) for name, found in ids.items()}
    missing = {name: len(known - found.keys()) for name, found in places.items()}
    doubled = {name: found.total() - len(found) for name, found in places.items()}
    strange = {name: len(found.keys() ^ places["table"].keys()) for name, found in places.items()}
    require(known, "no event was acknowledged")
    require(not any(missing.values()), f"of {len(known):,} acknowledged events are missing: {missing}")
    require(not any(doubled.values()), f"events are there more than once: {doubled}")
    require(not any(strange.values()), f"events in an export or the table only: {strange}")
