"""Clients that dawdle, crowd, flood, pipeline and vanish, at a real `appliance serve`: none of them harms another."""

import json
import os
import resource
import select
import selectors
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection, parse_headers
from io import BufferedReader
from multiprocessing import get_context
from typing import NamedTuple
from uuid import uuid4

import psutil
import psycopg
import pytest
from conftest import Answer, Appliance, running, wait_for

from appliance.store.embedded import EmbeddedPostgres
from appliance.worker import IDLE_SECONDS, REQUEST_SECONDS

pytestmark = pytest.mark.alone

# appliance/worker.py: _MAX_INCOMPLETE
MAX_INCOMPLETE = 1_024
HEAD = b"POST /collect HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SCRIPT = b"GET /tracking.js HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """One appliance for all that is done to it here."""
    with running(tmp_path_factory.mktemp("connections"), admin={"password": "secret-of-the-admin"}) as one:
        yield one
        assert "Traceback" not in one.log


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process of its own for crowds of clients: in this one they would slow down the clients that are measured."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_allow_many_sockets) as executor:
        executor.submit(os.getpid).result(60)
        yield executor


def _allow_many_sockets() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (8_192 if hard == resource.RLIM_INFINITY else min(hard, 8_192), hard))


@pytest.fixture
def visitor() -> str:
    """A visitor of the test's own, to find its rows by."""
    return uuid4().hex


# ---- small clients


def event(visitor: str) -> bytes:
    return json.dumps({"eventType": "click", "siteId": "shop", "visitorId": visitor}).encode()


def post(visitor: str, *headers: bytes) -> bytes:
    body = event(visitor)
    lines = b"".join(header + b"\r\n" for header in headers)
    return HEAD + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def in_chunks(visitor: str) -> bytes:
    body = event(visitor)
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in body)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX-Sum: 1\r\n\r\n"


@contextmanager
def connected(box: Appliance) -> Iterator[tuple[socket.socket, BufferedReader]]:
    """Connect, and read with a bound: a server that hangs fails the test."""
    with socket.create_connection(("127.0.0.1", box.port), timeout=30) as sock, sock.makefile("rb") as stream:
        yield sock, stream


def answer_of(stream: BufferedReader) -> Answer | None:
    """Read one answer; None where the connection has ended."""
    line = stream.readline()
    if not line:
        return None
    headers = parse_headers(stream)
    return Answer(int(line.split()[1]), headers, stream.read(int(headers.get("Content-Length", 0))))


def all_answers(stream: BufferedReader) -> list[int]:
    """Return the statuses of all answers up to the end of the connection."""
    return [answer.status for answer in iter(lambda: answer_of(stream), None)]


def sent(box: Appliance, *pieces: bytes) -> list[int]:
    """Send the pieces, end the sending side and return the statuses of the answers."""
    with connected(box) as (sock, stream):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        return all_answers(stream)


def stored(box: Appliance, visitor: str) -> int:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        row = conn.execute("SELECT count(*) FROM events_log WHERE visitor_id = %s", (visitor,)).fetchone()
        assert row is not None
        return int(row[0])


def seconds_of_posts(box: Appliance, visitor: str, going_on: Callable[[], bool]) -> list[float]:
    """Post one event after another, by new connections and by a kept one in turn; all are answered with 200."""
    seconds = []
    with closing(HTTPConnection("127.0.0.1", box.port, timeout=30)) as kept:
        while going_on():
            with closing(HTTPConnection("127.0.0.1", box.port, timeout=30)) as new:
                for connection in (new, kept):
                    started = time.monotonic()
                    connection.request("POST", "/collect", event(visitor), {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    answer.read()
                    assert answer.status == 200
                    seconds.append(time.monotonic() - started)
    return seconds


def percentile_99(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)]


def postgres_of(box: Appliance) -> psutil.Process:
    return psutil.Process(EmbeddedPostgres(box.data_dir).running_pid())


def worker_of(box: Appliance) -> psutil.Process:
    assert box.process is not None
    below = psutil.Process(box.process.pid).children()
    (arbiter,) = [child for child in below if child != postgres_of(box)]
    (worker,) = arbiter.children()
    return worker


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@contextmanager
def frozen_database(box: Appliance) -> Iterator[None]:
    """Stop every process of PostgreSQL in its tracks, and let them go on afterwards."""
    server = postgres_of(box)
    server.suspend()
    children = server.children()
    try:
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.suspend()
        yield
    finally:
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.resume()
        server.resume()


# ---- one connection


def test_a_request_that_comes_byte_by_byte_is_answered_and_stored_once(box: Appliance, visitor: str) -> None:
    for request in (post(visitor), in_chunks(visitor)):
        assert sent(box, *(bytes([byte]) for byte in request)) == [200]
    assert stored(box, visitor) == 2


def test_pipelined_requests_are_answered_in_their_order(box: Appliance, visitor: str) -> None:
    one_of_each = [
        (200, post(visitor)),
        (404, b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"),
        (200, in_chunks(visitor)),
        (405, b"GET /collect HTTP/1.1\r\nHost: x\r\n\r\n"),
        (415, HEAD.replace(b"application/json", b"text/html") + b"Content-Length: 3\r\n\r\nxxx"),
        (204, b"OPTIONS /collect HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, HEAD + b"Content-Length: 1\r\n\r\n{"),
    ]
    statuses = [status for status, _ in one_of_each]
    assert sent(box, b"".join(request for _, request in one_of_each) * 10) == statuses * 10
    assert stored(box, visitor) == 20


def test_a_connection_serves_many_requests(box: Appliance, visitor: str) -> None:
    with connected(box) as (sock, stream):
        for _ in range(200):
            sock.sendall(post(visitor))
            answer = answer_of(stream)
            assert answer is not None
            assert answer.status == 200
    assert stored(box, visitor) == 200


@pytest.mark.parametrize("size", ["Content-Length", "chunked"])
def test_a_client_that_waits_to_be_asked_for_the_body_is_asked_once(box: Appliance, visitor: str, size: str) -> None:
    request = post(visitor, b"Expect: 100-continue")
    if size == "chunked":
        request = in_chunks(visitor).replace(b"Host: x\r\n", b"Host: x\r\nExpect: 100-continue\r\n")
    head, _, body = request.partition(b"\r\n\r\n")
    with connected(box) as (sock, stream):
        sock.sendall(head + b"\r\n\r\n")
        asked = answer_of(stream)
        assert asked is not None
        assert asked.status == 100
        sock.sendall(body)
        sock.shutdown(socket.SHUT_WR)
        assert all_answers(stream) == [200]
    assert stored(box, visitor) == 1


def test_a_client_whose_body_is_here_already_is_not_asked_for_it(box: Appliance, visitor: str) -> None:
    assert sent(box, post(visitor, b"Expect: 100-continue")) == [200]


def test_a_client_whose_body_would_be_too_large_is_not_asked_for_it(box: Appliance) -> None:
    assert sent(box, HEAD + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n") == [413]


OLD = b"GET /health/live HTTP/1.0\r\n"
OLD_POST = b"POST /collect HTTP/1.0\r\nContent-Type: application/json\r\n"


def test_a_client_of_http_1_0_gets_one_answer_and_an_end(box: Appliance, visitor: str) -> None:
    body = event(visitor)
    posting = OLD_POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    for pieces in ([OLD + b"\r\n"], [OLD + b"\r\n" + OLD + b"\r\n"], [posting, body]):
        with connected(box) as (sock, stream):
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(0.1)
            assert all_answers(stream) == [200]
    assert sent(box, (OLD + b"Connection: keep-alive\r\n\r\n") * 3) == [200] * 3
    assert sent(box, OLD_POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n") == [400]


CUT_OFF = {
    "in the request line": b"POST /coll",
    "in the head": HEAD,
    "before the body": HEAD + b"Content-Length: 10\r\n\r\n",
    "in the body": HEAD + b"Content-Length: 10\r\n\r\n{",
    "in a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
    "before the last chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "in the trailers": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n",
}


@pytest.mark.parametrize("part", CUT_OFF.values(), ids=CUT_OFF)
def test_a_client_that_ends_in_the_middle_hears_so(box: Appliance, visitor: str, part: bytes) -> None:
    assert sent(box, part) == [400]
    assert sent(box, post(visitor), part) == [200, 400]
    assert stored(box, visitor) == 1


def test_a_client_that_ends_without_a_request_gets_no_answer(box: Appliance) -> None:
    assert sent(box) == []


@pytest.mark.parametrize(
    "part", [b"", *CUT_OFF.values(), SCRIPT, SCRIPT * 100], ids=["nothing", *CUT_OFF, "one", "many"]
)
def test_a_client_that_resets_the_connection_harms_nobody(box: Appliance, visitor: str, part: bytes) -> None:
    worker = worker_of(box)
    for pause in (0.0, 0.001, 0.01):
        with socket.create_connection(("127.0.0.1", box.port), timeout=30) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(part)
            time.sleep(pause)
    assert sent(box, post(visitor)) == [200]
    assert worker_of(box) == worker


BROKEN_CHUNKS = {
    "a blank behind a size": b"5 \r\nhello\r\n0\r\n\r\n",
    "an extension without a name": b"5;\r\nhello\r\n0\r\n\r\n",
    "a trailer that is none": b"5\r\nhello\r\n0\r\nx\r\n\r\n",
    "a forbidden trailer": b"5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n",
    "a forbidden trailer alone": b"0\r\nHost: y\r\n\r\n",
}
READERS = {"read": b"POST /collect", "not read": b"GET /tracking.js", "read by a form": b"POST /admin/login"}


@pytest.mark.parametrize("line", READERS.values(), ids=READERS)
@pytest.mark.parametrize("body", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
def test_a_broken_body_is_refused_by_one_answer_whoever_would_read_it(box: Appliance, line: bytes, body: bytes) -> None:
    form = b"Content-Type: application/x-www-form-urlencoded\r\n"
    head = line + b" HTTP/1.1\r\nHost: x\r\n" + form + b"Transfer-Encoding: chunked\r\n\r\n"
    assert sent(box, head + body) == [400]
    assert sent(box, head + body + SCRIPT) == [400]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused_while_it_still_comes(box: Appliance, *, announced: bool) -> None:
    megabyte = b"x" * 1024 * 1024
    head = HEAD + (
        b"Content-Length: %d\r\n\r\n" % (8 * len(megabyte)) if announced else b"Transfer-Encoding: chunked\r\n\r\n"
    )
    chunk = megabyte if announced else b"%x\r\n%s\r\n" % (len(megabyte), megabyte)
    with connected(box) as (sock, stream):
        sock.sendall(head)
        for _ in range(8):
            sock.sendall(chunk)
            time.sleep(0.08)
        answer = answer_of(stream)
        assert answer is not None
        assert answer.status == 413
        assert answer.json["error"]
        assert answer_of(stream) is None


def test_a_body_of_very_many_chunks_costs_no_more_time_than_another(box: Appliance, visitor: str) -> None:
    body = event(visitor)
    chunks = b"1\r\n{\r\n" + b"ff\r\n%s\r\n" % (b" " * 255) * 4_000 + b"%x\r\n%s\r\n" % (len(body) - 1, body[1:])
    with connected(box) as (sock, stream):
        started = time.monotonic()
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        answer = answer_of(stream)
        assert answer is not None
        assert answer.status == 413
        assert time.monotonic() - started < 2


# ---- dawdling


class Dawdler(NamedTuple):
    """What a client sends before it falls silent, what it is answered, and when its connection ends."""

    sends: bytes
    answers: list[int]
    seconds: float


DAWDLERS = {
    "nothing": Dawdler(b"", [], REQUEST_SECONDS),
    "half a head": Dawdler(HEAD, [408], REQUEST_SECONDS),
    "half a body": Dawdler(HEAD + b"Content-Length: 10\r\n\r\n{", [408], REQUEST_SECONDS),
    "half a chunk": Dawdler(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", [408], REQUEST_SECONDS),
    "a request and a half": Dawdler(SCRIPT + HEAD, [200, 408], REQUEST_SECONDS),
    "a head that promised more": Dawdler(HEAD + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n", [100, 408], 10),
    "a request": Dawdler(SCRIPT, [200], IDLE_SECONDS),
}


def test_who_dawdles_is_told_so_and_cut_off(box: Appliance) -> None:
    def outcome(dawdler: Dawdler) -> tuple[list[int], float]:
        with connected(box) as (sock, stream):
            started = time.monotonic()
            sock.sendall(dawdler.sends)
            return all_answers(stream), time.monotonic() - started

    def dripped() -> tuple[list[int], float]:
        """A byte now and then gives no more time."""
        with connected(box) as (sock, stream):
            started = time.monotonic()
            sock.sendall(HEAD)
            while time.monotonic() < started + REQUEST_SECONDS - 1:
                sock.sendall(b"X")
                time.sleep(0.2)
            return all_answers(stream), time.monotonic() - started

    with ThreadPoolExecutor(len(DAWDLERS) + 1) as clients:
        outcomes = {name: clients.submit(outcome, dawdler) for name, dawdler in DAWDLERS.items()}
        outcomes["a byte now and then"] = clients.submit(dripped)
    expected = {**DAWDLERS, "a byte now and then": Dawdler(HEAD, [408], REQUEST_SECONDS)}
    for name, dawdler in expected.items():
        answers, seconds = outcomes[name].result()
        assert (name, answers) == (name, dawdler.answers)
        assert dawdler.seconds - 0.5 < seconds < dawdler.seconds + 4


# ---- crowds: these run in a process of their own

UNFINISHED = [
    b"",
    HEAD,
    HEAD + b"Content-Length: 1000\r\n\r\n{",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n1000\r\n{",
]
# Written as fast as they are taken, and nothing is ever read.
ENDLESS = [SCRIPT * 20, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100]


def socket_of(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def besiege(port: int, *, idle: int, flooding: int, seconds: float) -> int:
    """Hold so many connections that never become requests, each anew when it is cut off; return how many there were."""
    opened = 0
    poller = selectors.DefaultSelector()

    def connect(kind: int) -> None:
        nonlocal opened
        opened += 1
        sock = socket.socket()
        sock.setblocking(False)  # noqa: FBT003 - the signature is Python's
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sock.connect_ex(("127.0.0.1", port))
        poller.register(sock, selectors.EVENT_WRITE, kind)

    def proceed(sock: socket.socket, kind: int, events: int) -> bool:
        """Do one step; return whether the connection still stands."""
        if events & selectors.EVENT_READ:
            return bool(sock.recv(65_536))
        if kind >= idle:
            sock.send(ENDLESS[kind % len(ENDLESS)])
        else:
            sock.send(UNFINISHED[kind % len(UNFINISHED)])
            poller.modify(sock, selectors.EVENT_READ, kind)
        return True

    for kind in range(idle + flooding):
        connect(kind)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for key, events in poller.select(0.1):
            sock = socket_of(key)
            stands = False
            with suppress(OSError):
                stands = proceed(sock, key.data, events)
            if not stands:
                poller.unregister(sock)
                sock.close()
                connect(key.data)
    for key in list(poller.get_map().values()):
        socket_of(key).close()
    return opened


def crowd(port: int, *, number: int, seconds: float) -> list[bool]:
    """Open so many connections that send half a head, and return which of them were closed, in the order of opening."""
    socks = []
    for place in range(number):
        sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        sock.sendall(HEAD)
        socks.append(sock)
        if place % 50 == 0:
            time.sleep(0.02)
    time.sleep(seconds)
    closed = []
    for sock in socks:
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        closed.append(bool(poller.poll(0)))
        sock.close()
    return closed


class Outcome(NamedTuple):
    """What one of many clients got: a status (0: closed without an answer, -1: nothing at all), and when."""

    status: int
    retry_after: bool
    seconds: float


def swarm(port: int, requests: list[bytes], *, seconds: float) -> list[Outcome]:
    """Send all the requests at once, each on a connection of its own."""
    poller = selectors.DefaultSelector()
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for number, request in enumerate(requests):
        sock = socket.socket()
        sock.setblocking(False)  # noqa: FBT003 - the signature is Python's
        # Of a hundred addresses: one alone would soon have as many incomplete requests as it may.
        sock.bind((f"127.0.2.{number % 100 + 1}", 0))
        sock.connect_ex(("127.0.0.1", port))
        poller.register(sock, selectors.EVENT_WRITE, request)
    answers: dict[socket.socket, bytes] = {}
    while poller.get_map() and time.monotonic() < started + seconds:
        for key, events in poller.select(0.1):
            sock, data = socket_of(key), b""
            with suppress(OSError):
                if events & selectors.EVENT_WRITE:
                    sock.send(key.data)
                    poller.modify(sock, selectors.EVENT_READ)
                    continue
                data = sock.recv(65_536)
            answers[sock] = answers.get(sock, b"") + data
            if not data:
                answer = answers.pop(sock)
                status = int(answer.split()[1]) if answer else 0
                outcomes.append(Outcome(status, b"\r\nRetry-After: " in answer, time.monotonic() - started))
                poller.unregister(sock)
                sock.close()
    return outcomes + [Outcome(-1, retry_after=False, seconds=seconds) for _ in poller.get_map()]


def test_hundreds_of_hostile_clients_do_not_slow_honest_ones_down(
    box: Appliance, elsewhere: ProcessPoolExecutor, visitor: str
) -> None:
    worker = worker_of(box)
    before = worker.num_fds()
    siege = elsewhere.submit(besiege, box.port, idle=450, flooding=50, seconds=12.0)
    seconds = seconds_of_posts(box, visitor, lambda: not siege.done())
    assert siege.result() > 500
    assert len(seconds) > 20
    assert percentile_99(seconds) < 1.0
    assert stored(box, visitor) == len(seconds)
    assert worker_of(box) == worker
    wait_for(lambda: worker.num_fds() <= before + 10, "the connections to be closed")


def test_when_too_many_requests_are_incomplete_the_oldest_go_for_new_ones(
    box: Appliance, elsewhere: ProcessPoolExecutor, visitor: str
) -> None:
    crowding: Future[list[bool]] = elsewhere.submit(crowd, box.port, number=MAX_INCOMPLETE + 200, seconds=2.0)
    seconds = seconds_of_posts(box, visitor, lambda: not crowding.done())
    closed = crowding.result()
    assert len(seconds) > 20
    assert closed[:150] == [True] * 150
    assert closed[-800:] == [False] * 800


def test_clients_that_pipeline_and_never_read_hold_no_thread_and_are_cut_off(box: Appliance, visitor: str) -> None:
    with ExitStack() as stack:
        poller = stack.enter_context(selectors.PollSelector())
        for _ in range(40):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            sock.connect(("127.0.0.1", box.port))
            sock.setblocking(False)  # noqa: FBT003 - the signature is Python's
            sock.send(SCRIPT * 3_000)
            poller.register(sock, selectors.EVENT_WRITE)
        deadline = time.monotonic() + 20

        def going_on() -> bool:
            for key, _ in poller.select(0):
                with suppress(BlockingIOError):
                    try:
                        socket_of(key).send(SCRIPT)
                    except (ConnectionResetError, BrokenPipeError):
                        poller.unregister(key.fileobj)
            return bool(poller.get_map()) and time.monotonic() < deadline

        seconds = seconds_of_posts(box, visitor, going_on)
        assert list(poller.get_map()) == []
    assert percentile_99(seconds) < 2.0


def test_requests_beyond_the_capacity_are_refused_at_once_and_nobody_hangs(
    box: Appliance, elsewhere: ProcessPoolExecutor, visitor: str
) -> None:
    requests = [post(visitor, b"Connection: close")] * 2_000
    # Where events go to the spool already, nothing waits.
    wait_for(lambda: sent(box, post(visitor)) == [200], "the database to be used")
    # Answers are held back for as long as a group waits for the database, 2 s. For so many requests to be read
    # in that time on a busy machine, too, they are there before the worker sees the first of them.
    with frozen_database(box):
        with frozen(worker_of(box)):
            swarming: Future[list[Outcome]] = elsewhere.submit(swarm, box.port, requests, seconds=45.0)
            time.sleep(1)
        time.sleep(4)
    outcomes = swarming.result()
    refused = [outcome for outcome in outcomes if outcome.status == 503]
    statuses = Counter(outcome.status for outcome in outcomes)
    assert set(statuses) <= {200, 202, 503}
    assert refused
    assert min(outcome.seconds for outcome in refused) < 4
    assert all(outcome.retry_after for outcome in refused)
    wait_for(lambda: sent(box, post(visitor)) == [200], "the appliance to be well again")
    assert stored(box, visitor) >= statuses[200]


# ---- stopping


@pytest.fixture
def another(appliance: Callable[..., Appliance]) -> Appliance:
    """An appliance to be stopped."""
    return appliance().start()


def test_stopping_does_not_wait_for_requests_that_never_become_whole(another: Appliance) -> None:
    with ExitStack() as stack:
        socks = []
        for place in range(200):
            socks.append(stack.enter_context(socket.create_connection(("127.0.0.1", another.port), timeout=30)))
            socks[-1].sendall(UNFINISHED[place % len(UNFINISHED)])
        assert sent(another, post("v")) == [200]
        started = time.monotonic()
        assert another.stop() == 0
        assert time.monotonic() - started < 8
        assert Counter(sock.recv(12) for sock in socks) == {b"HTTP/1.1 408": 150, b"": 50}
    # It was not killed: then it would not have come to this.
    assert "worker stopped" in another.log


def test_stopping_does_not_wait_for_the_next_request_of_whom_it_has_just_answered(
    another: Appliance, visitor: str
) -> None:
    with connected(another) as (sock, stream):
        with frozen_database(another):
            sock.sendall(post(visitor))
            time.sleep(0.5)
            started = time.monotonic()
            assert another.process is not None
            another.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert all_answers(stream) == [200]
        assert another.process.wait(30) == 0
        assert time.monotonic() - started < 5
    assert "worker stopped" in another.log
