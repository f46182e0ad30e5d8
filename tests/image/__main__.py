"""`python3 -m image`: build the image, try it, break it, upgrade to it; count every event after each step."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from image.box import Box, require, wait_for
from image.counting import Events
from image.engine import Engine, FailedError, found, script_instead

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGE, FORMER = "appliance-test", "appliance-test-former"
_STOP_SECONDS = 10
# What stands on top of the base image; docs/deploy.md says what each part is for.
_MOST_MB = 240
# Enough for an export that a stop meets in the middle.
_LONG_EXPORT_ROWS = 200_000


def main() -> None:
    engine = found()
    if engine is None:
        tell(f"left out: it needs docker with its engine, or root and {script_instead()}")
        return
    # Behind symbolic links engines find no files to mount.
    with tempfile.TemporaryDirectory(prefix="image-test-") as name:
        directory = Path(name).resolve()
        try:
            timed("build", lambda: engine.build(ROOT, IMAGE))
            try_image(engine, directory / "new")
            try_upgrade(engine, directory / "upgrade")
        except FailedError as problem:
            tell(str(problem))
            sys.exit(1)
    tell("passed")


def try_image(engine: Engine, directory: Path) -> None:
    with box_and_events(engine, directory) as (box, events):
        timed("start", lambda: box.create(IMAGE).wait_ready())
        for step in (may_do_little, is_small_and_whole, does_its_job):
            timed(step.__name__, partial(step, box))
        for befalls in (killed, parts_killed, stopped_in_an_export, stopped_at_once):
            timed(befalls.__name__, partial(befalls, box, events))


def try_upgrade(engine: Engine, directory: Path) -> None:
    """Let the image of the previous commit leave a backlog, in table and spool, to the new one."""
    content = former_commit()
    if content is None:
        tell("the upgrade is left out: this checkout has no previous commit")
        return
    with box_and_events(engine, directory) as (box, events):
        context = directory / "former"
        context.mkdir()
        subprocess.run(["tar", "--extract", "--directory", context], input=content, check=True)
        timed("build the previous commit", lambda: engine.build(context, FORMER))
        timed("start the previous commit", lambda: box.create(FORMER).wait_ready())
        timed("upgraded", lambda: upgraded(box, events))


@contextmanager
def box_and_events(engine: Engine, directory: Path) -> Iterator[tuple[Box, Events]]:
    """Lend a box that is not started and clients for it; show the log of a failure, and leave nothing behind."""
    directory.mkdir()
    box = Box(engine, f"{directory.parent.name}-{directory.name}", directory)
    events = Events(box, directory)
    with box.published():
        try:
            yield box, events
        except FailedError:
            tell(box.log())
            raise
        finally:
            events.give_up()


def former_commit() -> bytes | None:
    done = subprocess.run(["git", "-C", ROOT, "archive", "HEAD~1"], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


# -- what it is -------------------------------------------------------------------------------------------------------


def may_do_little(box: Box) -> str:
    rights, network = box.inside("rights"), box.inside("network")
    expected = {"user": 10001, "capabilities": ["0" * 16], "no_new_privileges": "1", "writable": ["/tmp", "/data"]}  # noqa: S108
    require(rights == expected, f"its rights are {rights}, not {expected}")
    cut_off = {"interfaces": ["lo"], "routes": [], "attempt": "Network is unreachable"}
    require(network == cut_off, f"its network is {network}, not {cut_off}")
    return "user 10001, no capability, writes to /tmp and /data alone, and there is no way out"


def is_small_and_whole(box: Box) -> str:
    """What was left out of the image must not be missing: exports are tried by every step, the rest here."""
    size = int(box.execute("du", "-sm", "/opt/appliance").split()[0])
    require(size <= _MOST_MB, f"/opt/appliance takes {size} MB, more than {_MOST_MB}")
    box.inside("loads")
    services = box.inside("clients")
    return f"{size} MB on top of the base image, clients of {', '.join(services)}"


def does_its_job(box: Box) -> str:
    event = '{"eventType": "pageview", "siteId": "shop"}'
    status, text = box.ask("POST", "/collect", event, Content_Type="application/json")
    require(status == 200, f"an event was answered {status}: {text}")
    require("sendBeacon" in box.ask("GET", "/tracking.js")[1], "tracking.js is not served")
    exported = box.execute("appliance", "export")
    require(exported.count("1 event in 1 batch delivered") == 2, f"the export said: {exported}")
    require("Exports" in box.execute("appliance", "status"), "appliance status shows no exports")
    words = box.engine.command("inspect", "--format", "{{json .Config.Healthcheck.Test}}", box.name)
    require(words.strip() == '["CMD","appliance","healthcheck"]', f"its health check is {words}")
    return box.execute("appliance", "healthcheck").strip()


# -- what befalls it --------------------------------------------------------------------------------------------------


def killed(box: Box, events: Events) -> str:
    begin_long_exports(box, events)
    box.kill()
    time.sleep(0.5)
    box.start(IMAGE).wait_ready()
    half = half_exported(box)
    time.sleep(2)
    statuses = events.end()
    require(statuses["-"], "no client noticed the kill")
    return f"killed with {half}; {events.count()}"


def parts_killed(box: Box, events: Events) -> str:
    """Its processes die below process 1, and one loses its parent: process 1 must bury them all."""
    events.begin()
    time.sleep(1)
    box.execute("sh", "-c", "sleep 1 &")
    box.inside("strike")
    time.sleep(2)
    box.wait_ready()
    events.end()
    wait_for(lambda: not box.inside("zombies"), "process 1 to bury the dead", seconds=10)
    return events.count() + ", no zombies"


def stopped_in_an_export(box: Box, events: Events) -> str:
    begin_long_exports(box, events)
    seconds = box.stop()
    require(seconds < _STOP_SECONDS, f"it took {seconds:.1f} s to stop")
    require(box.exit_code() == 0, f"it stopped with {box.exit_code()}")
    require(box.log().rstrip().endswith(" stopped"), "it did not stop by itself")
    events.end()
    box.start(IMAGE).wait_ready()
    return f"stopped in {seconds:.1f} s with {half_exported(box)}; {events.count()}"


def begin_long_exports(box: Box, events: Events) -> None:
    """Be in the middle of an export of many rows, under load."""
    events.known |= set(box.inside("fill", str(_LONG_EXPORT_ROWS)))
    events.begin()
    time.sleep(2)
    box.begin_exports()
    wait_for(lambda: box.inside("processes", "appliance.export.process"), "the exports to begin")


def half_exported(box: Box) -> str:
    """Say how far the exports have come, which is not all the way."""
    counted = {name: len(ids) for name, ids in box.inside("count").items()}
    rows = counted.pop("table")
    require(min(counted.values()) < rows, f"no export was in the middle: {counted} of {rows} rows")
    return f"{' and '.join(f'{number:,} in {name}' for name, number in counted.items())} of {rows:,} events exported"


def stopped_at_once(box: Box, events: Events) -> str:
    """A stop that comes while the program is still loading must not be lost."""
    box.stop()
    box.engine.command("start", box.name)
    seconds = box.stop()
    require(seconds < _STOP_SECONDS, f"right after its start it took {seconds:.1f} s to stop")
    box.start(IMAGE).wait_ready()
    return f"stopped in {seconds:.1f} s; {events.count()}"


def upgraded(box: Box, events: Events) -> str:
    events.begin()
    time.sleep(2)
    box.export()
    time.sleep(2)
    box.inside("freeze")
    time.sleep(4)
    backlog = box.inside("spooled")
    require(backlog, "the previous commit has left no backlog in its spool")
    box.kill()
    box.remove()
    box.create(IMAGE).wait_ready()
    time.sleep(1)
    statuses = events.end()
    require(statuses["202"], "no event went to the spool")
    return f"{backlog:,} bytes in the spool; {events.count()}"


# -- telling ----------------------------------------------------------------------------------------------------------


def timed(name: str, step: Callable[[], object]) -> None:
    before = time.monotonic()
    outcome = step()
    said = f": {outcome}" if isinstance(outcome, str) else ""
    tell(f"{name.replace('_', ' ')} ({time.monotonic() - before:.0f} s){said}")


def tell(text: str) -> None:
    with suppress(BrokenPipeError):
        sys.stdout.write(f"image test: {text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
