"""The image test's own parts: what it counts, and how it publishes a port. The image itself: `make image-test`."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from conftest import Appliance, free_port, wait_for
from image.counting import check
from image.engine import FailedError

FORWARD = Path(__file__).parent / "image" / "forward.py"
ALL_WELL = {"table": ["a", "b"], "jsonl": ["b", "a"], "parquet": ["a", "b"]}


def test_events_that_are_everywhere_once_are_well() -> None:
    check({"a", "b"}, ALL_WELL)
    # Stored, and the answer was lost.
    check({"a"}, ALL_WELL)


@pytest.mark.parametrize(
    ("known", "changed", "said"),
    [
        ({"a", "b", "c"}, {}, "of 3 acknowledged events are missing"),
        ({"a", "b"}, {"table": ["a", "b", "b"]}, "more than once"),
        ({"a", "b"}, {"parquet": ["a", "b", "a"]}, "more than once"),
        ({"a"}, {"jsonl": ["a"]}, "in an export or the table only"),
        ({"a"}, {"jsonl": ["a", "b", "c"]}, "in an export or the table only"),
        (set(), {}, "no event was acknowledged"),
    ],
)
def test_every_event_that_is_missing_doubled_or_strange_fails_the_image_test(
    known: set[str], changed: dict[str, list[str]], said: str
) -> None:
    with pytest.raises(FailedError, match=said):
        check(known, ALL_WELL | changed)


@contextmanager
def forwarded(listen: str, target: str) -> Iterator[None]:
    with subprocess.Popen([sys.executable, FORWARD, listen, target]) as process:
        try:
            yield
        finally:
            process.terminate()


def test_a_port_is_published_by_way_of_a_socket_while_what_is_behind_it_comes_and_goes(tmp_path: Path) -> None:
    box = Appliance(tmp_path, {})
    front = Appliance(tmp_path, {}, port=free_port())
    path = str(tmp_path / "socket")
    with forwarded(f"127.0.0.1:{front.port}", path):
        wait_for(front.reached, "the port")
        for _ in range(2):
            with forwarded(path, f"127.0.0.1:{box.port}"), socket.create_server(("127.0.0.1", box.port)) as server:
                wait_for(partial(answered, front, server), "an answer")


def answered(front: Appliance, server: socket.socket) -> bool:
    """Send a request and let the other end answer it."""
    with socket.create_connection(("127.0.0.1", front.port)) as client:
        client.sendall(b"asked")
        server.settimeout(0.5)
        with suppress(OSError):
            there, _ = server.accept()
            with there:
                assert there.recv(16) == b"asked"
                there.sendall(b"answered")
            return client.recv(16) == b"answered"
    return False
