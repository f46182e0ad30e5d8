"""An S3 server on this machine, with signatures: `rclone serve s3`, on a directory of its own."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
from botocore.config import Config

from bench.errors import BenchError

_ACCESS_KEY, _SECRET_KEY = "BENCH", "of-a-throw-away-server"  # the server is gone after the measure
_START_SECONDS = 30
_STOP_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Storage:
    """A running server; each bucket is a directory below `root`."""

    endpoint: str
    root: Path

    def client(self) -> Any:
        """Return a client for it."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=_ACCESS_KEY,
            aws_secret_access_key=_SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )

    def new_bucket(self) -> str:
        """Make a bucket and return its name."""
        name = f"bench-{uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def settings(self, bucket: str) -> dict[str, Any]:
        """Return what a configuration says of a bucket of this server."""
        return {
            "kind": "s3",
            "provider": "other",
            "bucket": bucket,
            "endpoint_url": self.endpoint,
            "access_key_id": _ACCESS_KEY,
            "secret_access_key": _SECRET_KEY,
        }


@contextmanager
def serve(root: Path) -> Iterator[Storage]:
    """Run a server on a directory until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rclone = str(Path(sys.executable).parent / "rclone")
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{_ACCESS_KEY},{_SECRET_KEY}", "--config", ""]
    process = subprocess.Popen([rclone, "serve", "s3", *options, "--log-level", "ERROR", str(root)])
    try:
        _wait_for(port, process)
        yield Storage(f"http://127.0.0.1:{port}", root)
    finally:
        process.terminate()
        process.wait(_STOP_SECONDS)


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise BenchError("rclone serve s3 does not start")
