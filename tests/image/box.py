"""The appliance in a container, from its start to its end."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from image.engine import Engine, FailedError

HERE = Path(__file__).resolve().parent
# As in deploy/compose.yaml, and without any network. A published port needs one that has a way out: where there is none
# (`docker network create --internal`), engines ignore `-p`. So forward.py publishes the port instead.
OPTIONS = "--network none --read-only --tmpfs /tmp --shm-size 256m --cap-drop ALL --security-opt no-new-privileges"
# Set in the file alone: the health check must find it there.
PORT = 9090
TOKEN = "token-of-the-image-test"
CONFIG = f"""
[server]
bind = "0.0.0.0:{PORT}"
[admin]
token = "{TOKEN}"
[collect]
requests_per_minute_per_address = 0
requests_per_minute_per_site = 0
[buckets.export]
kind = "directory"
path = "/data/export"
[buckets.lake]
kind = "directory"
path = "/data/lake"
[exports.lines]
client = "export"
schedule = "0 0 1 1 *"
[exports.columns]
client = "lake"
format = "parquet"
schedule = "0 0 1 1 *"
"""
JOBS = ("lines", "columns")
_READY_SECONDS = 90


@dataclass
class Box:
    """A container, the volume of the same name, and the way to its port."""

    engine: Engine
    name: str
    directory: Path
    port: int = field(default_factory=lambda: _free_port())  # noqa: PLW0108 - defined below

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- its life -----------------------------------------------------------------------------------------------------

    @contextmanager
    def published(self) -> Iterator["Box"]:
        """Lead from the port on this machine to the containers that come and go; leave nothing behind."""
        (self.directory / "gate").mkdir()
        (self.directory / "config.toml").write_text(CONFIG)
        command = [sys.executable, HERE / "forward.py", f"127.0.0.1:{self.port}", self.directory / "gate" / "socket"]
        with subprocess.Popen([str(word) for word in command]) as forward:
            try:
                yield self
            finally:
                forward.terminate()
                self.remove()
                self.engine.attempt("volume", "rm", self.name)

    def create(self, image: str) -> "Box":
        """Start a new container on the volume, which is made where there is none."""
        # Each image says itself where it looks for the file: an older one looks elsewhere.
        where = Path(self.engine.command("image", "inspect", "--format", "{{.Config.WorkingDir}}", image).strip())
        config = f"{self.directory / 'config.toml'}:{where / 'config.toml'}:ro"
        volumes = ("--volume", f"{self.name}:/data", "--volume", config)
        self.engine.run("--detach", "--name", self.name, *OPTIONS.split(), *volumes, image)
        return self._open(image)

    def start(self, image: str) -> "Box":
        """Start the container again that was killed or has stopped."""
        self.engine.command("start", self.name)
        return self._open(image)

    def _open(self, image: str) -> "Box":
        self._close()
        user = f"{os.getuid()}:{os.getgid()}"
        inside = ("--network", f"container:{self.name}", "--user", user, *OPTIONS.split()[2:])
        volumes = ("--volume", f"{self.directory / 'gate'}:/gate", "--volume", f"{HERE / 'forward.py'}:/forward.py:ro")
        words = (image, "/forward.py", "/gate/socket", f"127.0.0.1:{PORT}")
        self.engine.run("--detach", "--name", f"{self.name}-gate", *inside, *volumes, "--entrypoint", "python3", *words)
        return self

    def _close(self) -> None:
        self._end(f"{self.name}-gate")

    def kill(self) -> None:
        """End it as a power cut does, and return when it is gone."""
        self.engine.command("kill", "--signal", "KILL", self.name)
        wait_for(lambda: self._state("Running") == "false", "the container to be gone")

    def stop(self) -> float:
        """Stop it and return after how many seconds it was gone; left alone it may take longer than it should."""
        before = time.monotonic()
        self.engine.command("stop", "--time", "30", self.name)
        return time.monotonic() - before

    def exit_code(self) -> int:
        return int(self._state("ExitCode"))

    def _state(self, name: str) -> str:
        return self.engine.command("inspect", "--format", f"{{{{.State.{name}}}}}", self.name).strip()

    def remove(self) -> None:
        """Remove the container, and leave the volume."""
        self._close()
        self._end(self.name)

    def _end(self, name: str) -> None:
        # Killed first: removing alone would wait for a stop. Its volumes are those without a name: a gate has one.
        self.engine.attempt("kill", "--signal", "KILL", name)
        self.engine.attempt("rm", "--force", "--volumes", name)

    def log(self) -> str:
        done = self.engine.attempt("logs", self.name)
        return (done.stdout + done.stderr).decode(errors="replace")

    # -- from inside --------------------------------------------------------------------------------------------------

    def inside(self, task: str, *words: str) -> Any:
        """Do a task of inside.py in the container."""
        program = (HERE / "inside.py").read_bytes()
        return json.loads(
            self.engine.command("exec", "--interactive", self.name, "python3", "-", task, *words, given=program)
        )

    def execute(self, *words: str) -> str:
        return self.engine.command("exec", self.name, *words)

    def export(self) -> None:
        """Export all there is, by the command."""
        self.execute("appliance", "export")

    # -- from outside -------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def begin_exports(self) -> None:
        """Let the appliance itself run each job, as its clock does."""
        for job in JOBS:
            status, text = self.ask(
                "POST",
                "/admin/exports/run",
                f"job={job}",
                Authorization=f"Bearer {TOKEN}",
                Content_Type="application/x-www-form-urlencoded",
            )
            require(status == 303, f"an export was asked for and answered {status}: {text}")

    def wait_ready(self) -> "Box":
        """Wait until it stores events and nothing is left in its spool."""
        wait_for(self._ready, "the appliance to be ready", _READY_SECONDS)
        return self

    def _ready(self) -> bool:
        with suppress(OSError, HTTPException):
            status, text = self.ask("GET", "/health/ready")
            return status == 200 and re.search(r'"status":\s*"ok"', text) is not None
        return False


def require(holds: object, otherwise: str) -> None:
    """Fail with a sentence where something does not hold."""
    if not holds:
        raise FailedError(otherwise)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        require(time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}, in vain")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        return int(any_socket.getsockname()[1])
