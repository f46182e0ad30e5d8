"""What a soak runs on: the appliance as a process, clients, and two buckets of a real S3 server behind proxies."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import weather
from conftest import Appliance, S3Server, free_port, s3_server, stop_left_over_postgres
from crowd import Crowd
from faulty import Faulty, faulty
from weather import Weather

from soak.clock import Clock

BUCKETS = ("client", "vault")
_EXPORT_MODULE = "appliance.export.process"


class BucketServer:
    """An S3 server that can go down and come back with what it had."""

    def __init__(self, root: Path) -> None:
        self._root, self._port, self._life = root, free_port(), ExitStack()
        self.server: S3Server
        self.up()

    def up(self) -> None:
        self.server = self._life.enter_context(s3_server(self._root, self._port))

    def down(self) -> None:
        self._life.close()


@dataclass
class World:
    """The parts, for those who break them and those who count."""

    box: Appliance
    crowd: Crowd
    server: BucketServer
    # By the names of the configuration: the bucket, the proxy before it, and the weather there.
    buckets: dict[str, str]
    proxies: dict[str, Faulty]
    skies: dict[str, Weather]
    clock: Clock
    # Runs of `appliance export` that nobody waits for.
    exports: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def export_beside(self) -> None:
        """Begin an export as a person does from a shell, whatever else goes on."""
        command = [sys.executable, "-m", "appliance", "export", "--config", str(self.box.directory / "config.toml")]
        with (self.box.directory / "exports").open("ab") as log:
            self.exports.append(subprocess.Popen(command, stdout=log, stderr=log))

    def export_processes(self) -> list[psutil.Process]:
        """Everything that exports now: the scheduler's runs and those from the shell."""
        found = [psutil.Process(one.pid) for one in self.exports if one.poll() is None]
        assert self.box.process is not None
        for process in psutil.Process(self.box.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                found += [process] if _EXPORT_MODULE in process.cmdline() else []
        return found

    def wait_for_exports(self) -> None:
        for one in self.exports:
            one.wait(120)
        self.exports.clear()

    def forget_requests(self) -> None:
        """The proxies keep every body for tests, which hours of them do not need."""
        for proxy in self.proxies.values():
            for kept in (proxy.seen, proxy.bodies, proxy.headers):
                kept.clear()


@contextmanager
def build(directory: Path, seed: int, *, steps_clock: bool) -> Iterator[World]:
    """Start everything, and stop it whatever happens."""
    for name in [name for name in os.environ if name.startswith(("APPLIANCE_", "AWS_"))]:
        del os.environ[name]
    for name in ("s3", "load", "box"):
        (directory / name).mkdir()
    with ExitStack() as stack:
        clock = stack.enter_context(Clock(directory).of_children(wanted=steps_clock))
        server = BucketServer(directory / "s3")
        stack.callback(server.down)
        buckets = {name: server.server.new_bucket(name) for name in BUCKETS}
        skies = {name: Weather(weather.anything, 0.3, seed + n, bad=False) for n, name in enumerate(BUCKETS)}
        proxies = {
            name: stack.enter_context(faulty(server.server.endpoint, choose=skies[name].choose)) for name in BUCKETS
        }
        tables = {
            name: server.server.settings(buckets[name], endpoint_url=proxies[name].url, read_timeout_seconds=5)
            for name in BUCKETS
        }
        box = Appliance(
            directory / "box",
            {
                # What it can take, and not what one site may send.
                "collect": {"requests_per_minute_per_site": 0},
                "buckets": tables,
                "exports": {"acme": {"client": "client", "backup": "vault", "schedule": "* * * * *"}},
            },
        )
        world = World(box, Crowd(directory / "load"), server, buckets, proxies, skies, clock)
        stack.callback(_stop, world)
        box.start()
        yield world


def _stop(world: World) -> None:
    for client in world.crowd.processes:
        client.kill()
    for export in world.exports:
        export.kill()
        export.wait(10)
    box = world.box
    if box.process is not None and box.process.poll() is None:
        box.stop()
    stop_left_over_postgres(box.data_dir)
