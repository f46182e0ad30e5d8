"""The program that builds and runs images: docker, or a script that takes the same arguments."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class FailedError(Exception):
    """Something is not as it must be; says what."""


@dataclass(frozen=True)
class Engine:
    """How each of its commands begins, and what an image is built with beside its context and its tag."""

    commands: tuple[str, ...]
    runs: tuple[str, ...]
    builds: tuple[str, ...]

    def build(self, context: Path, tag: str) -> None:
        """Build an image; layers that an earlier build has made are taken from there."""
        values = {"CONTEXT": str(context), "TAG": tag}
        _call([values.get(word, word) for word in self.builds])

    def run(self, *words: str) -> str:
        return _call([*self.runs, *words])

    def command(self, *words: str, given: bytes = b"") -> str:
        return _call([*self.commands, *words], given)

    def attempt(self, *words: str) -> "subprocess.CompletedProcess[bytes]":
        """Do it if it can be done."""
        return subprocess.run([*self.commands, *words], capture_output=True, check=False)


def _call(command: Sequence[str], given: bytes = b"") -> str:
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace").splitlines()[-30:]
        raise FailedError("\n".join([f"{' '.join(command)} ended with {done.returncode}", *said]))
    return done.stdout.decode()


def found() -> Engine | None:
    """Docker, if its engine runs; else (as root) the script that TRY_IMAGE names."""
    docker = ("docker",)
    try:
        answers = subprocess.run([*docker, "info"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        answers = False
    if answers:
        return Engine(docker, (*docker, "run"), (*docker, "build", "--tag", "TAG", "CONTEXT"))
    script = script_instead()
    if os.access(script, os.X_OK) and os.getuid() == 0:
        # Without --format an image keeps no health check there.
        builds = (script, "build", "CONTEXT", "TAG", "--layers", "--format", "docker")
        return Engine((script, "podman"), (script, "run"), builds)
    return None


def script_instead() -> str:
    return os.environ.get("TRY_IMAGE", "../shared/image/try-image")
