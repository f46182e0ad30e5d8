"""The load: wrk posting one body, as fast as it is answered or at a steady pace."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError

CONNECTIONS = 64
# wrk ends by itself after this long, in case nobody is left to stop it.
_LONGEST_SECONDS = 3600
_STOP_SECONDS = 10
_SCRIPT = Path(__file__).parent / "post.lua"
# What a browser sends along.
_HEADERS = {
    "Content-Type": "text/plain;charset=UTF-8",
    "Origin": "https://shop.example.com",
    "Referer": "https://shop.example.com/",
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    "Accept": "*/*",
    "Accept-Language": "en-US,en;q=0.5",
    "Accept-Encoding": "gzip, deflate, br",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a run of the load client saw: all of them 2xx."""

    requests: int
    seconds: float
    median_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def run(url: str, body: Path, *, seconds: float, per_second: float = 0) -> Answers:
    """Post the body for some seconds, `per_second` times a second or as often as it is answered (0).

    Raises BenchError when a request was refused or lost.
    """
    command = _command(url, body, seconds=seconds, per_second=per_second)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + _STOP_SECONDS)
    return _answers(done.stdout, done.stderr)


class Background:
    """A load that lasts until it is stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def stop(self) -> Answers:
        """End the load and return its figures. Raises BenchError as `run` does."""
        self._process.send_signal(signal.SIGINT)
        return _answers(*self._process.communicate(timeout=_STOP_SECONDS))

    def kill(self) -> None:
        """End it without figures."""
        self._process.kill()
        self._process.wait()


@contextmanager
def in_background(url: str, body: Path, *, per_second: float) -> Iterator[Background]:
    """Post the body at a steady pace until the load is stopped, at the latest when the block ends."""
    command = _command(url, body, seconds=_LONGEST_SECONDS, per_second=per_second)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    load = Background(process)
    try:
        yield load
    finally:
        load.kill()


def headers() -> dict[str, str]:
    """Return what is sent with each body."""
    return dict(_HEADERS)


def _command(url: str, body: Path, *, seconds: float, per_second: float) -> list[str]:
    wrk = shutil.which("wrk")
    if wrk is None:
        raise BenchError("wrk, which makes the load, is missing: apt-get install wrk")
    options = ["--threads", "1", "--connections", str(CONNECTIONS), "--duration", f"{seconds:.0f}s"]
    options += [word for name, value in _HEADERS.items() for word in ("--header", f"{name}: {value}")]
    return [wrk, *options, "--script", str(_SCRIPT), url, "--", str(body), f"{per_second:.1f}"]


def _answers(output: str, errors: str) -> Answers:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise BenchError(f"wrk failed: {(errors or output).strip()[-500:]}")
    seen = json.loads(lines[-1])
    if seen["refused"] or seen["lost"] or not seen["requests"]:
        raise BenchError(
            f"of {seen['requests']} requests {seen['refused']} were refused, and {seen['lost']} were lost: "
            "these runs measure nothing"
        )
    return Answers(
        requests=seen["requests"],
        seconds=seen["microseconds"] / 1e6,
        median_ms=seen["median"] / 1e3,
        p99_ms=seen["p99"] / 1e3,
    )
