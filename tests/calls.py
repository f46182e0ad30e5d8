"""Every call that a run makes to PostgreSQL and to its buckets, numbered on the wire, and one of them goes wrong.

The run is as it is for users, its drivers and clients too: they talk to proxies. A call of a bucket is a request. A
call of PostgreSQL is a COMMIT, or one by which ADBC reads the rows: what comes before a COMMIT is done with it or not
at all. FAULT_POINTS=all counts each statement all the same.
"""

import os
import select
import signal
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from enum import Enum
from pathlib import Path

from faulty import Fault, Faulty, faulty, refusal

EVERY_STATEMENT = os.environ.get("FAULT_POINTS") == "all"


class Blow(Enum):
    """What becomes of a call."""

    FAILS = "fails"
    HANGS = "hangs"
    # It is done, and who called does not hear so.
    LOST = "is lost"
    KILLS = "kills"


class Calls:
    """Numbers the calls of a run and lets one go wrong: none, before it is told which."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.begin(0, Blow.FAILS)

    def begin(self, at: int, blow: Blow) -> None:
        """Count from one again. The process that a blow kills is told by `victim` as soon as it is known."""
        self.at, self.blow = at, blow
        self.names: list[str] = []
        self.victim: Future[int] = Future()

    def count_statement(self, statement: str) -> Blow | None:
        """Count a statement if it is a call, and return what becomes of it."""
        # A transaction that cannot begin fails as one whose first statement does.
        if not statement or statement.startswith("BEGIN"):
            return None
        counts = EVERY_STATEMENT or statement.startswith(("COMMIT", "COPY", "connect"))
        return self.blow_for(statement) if counts else None

    @property
    def struck(self) -> bool:
        return 0 < self.at <= len(self.names)

    @property
    def name(self) -> str:
        """The call that went wrong."""
        return self.names[self.at - 1]

    def blow_for(self, name: str) -> Blow | None:
        """Count a call and return what becomes of it; None: nothing."""
        with self._lock:
            self.names.append(name)
            if len(self.names) != self.at:
                return None
        if self.blow is Blow.KILLS:
            os.kill(self.victim.result(30), signal.SIGKILL)
        return self.blow


# ---------------------------------------------------------------------------------------------------------------------
# Buckets


@contextmanager
def bucket_door(upstream: str, calls: Calls) -> Iterator[Faulty]:
    """Run a proxy before an S3 server; its clients end what hangs by their own time-out."""
    faults = {Blow.HANGS: Fault(hang=True), Blow.LOST: Fault(cut=0, reset=True), Blow.KILLS: Fault(request_cut=0)}
    slow_down = refusal(503, "SlowDown")

    def choose(request: str) -> Fault | None:
        blow = calls.blow_for(request)
        if blow is Blow.FAILS:
            return Fault(answer=slow_down(request.split(maxsplit=1)[0]))
        return faults[blow] if blow else None

    with faulty(upstream, choose=choose) as door:
        yield door


# ---------------------------------------------------------------------------------------------------------------------
# PostgreSQL

_CANCEL = 80877102
_LENGTH = struct.Struct("!i")
_READY = b"Z"
_QUERY, _PARSE, _EXECUTE, _SYNC, _TERMINATE = b"Q", b"P", b"E", b"S", b"X"


@contextmanager
def postgres_door(server_directory: Path, directory: Path, calls: Calls, *, patience_seconds: float) -> Iterator[str]:
    """Run a proxy before a PostgreSQL of this machine and return the directory of its socket.

    A call that hangs ends with the connection, after `patience_seconds`, as a network ends it.
    """
    handler = type(
        "Handler",
        (_Relay,),
        {"upstream": f"{server_directory}/.s.PGSQL.5432", "calls": calls, "patience_seconds": patience_seconds},
    )
    directory.mkdir()
    with _Door(str(directory / ".s.PGSQL.5432"), handler) as door:
        thread = threading.Thread(target=door.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield str(directory)
        finally:
            door.shutdown()
            thread.join(10)


class _Door(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Say nothing: connections that break are what this is for."""


class _Relay(socketserver.BaseRequestHandler):
    """One connection: what a client asks goes to the server, and the answer back."""

    upstream: str
    calls: Calls
    patience_seconds: float

    def handle(self) -> None:
        with closing(socket.socket(socket.AF_UNIX)) as upstream, suppress(OSError, EOFError):
            upstream.connect(self.upstream)
            self._client, self._server = _Messages(self.request), _Messages(upstream)
            if self._connect():
                while self._pass():
                    pass

    def _connect(self) -> bool:
        startup = self._client.startup()
        if _LENGTH.unpack_from(startup, 4)[0] == _CANCEL:
            self._server.send(startup)
            return False
        # The pool connects in threads of its own, whenever it likes; who reads the rows connects when it is its turn.
        from_pool = b"application_name\0appliance\0" in startup
        return self._relay("connect", startup, None if from_pool else self.calls.count_statement("connect"))

    def _pass(self) -> bool:
        request, statement = self._client.request()
        if request[-5:-4] == _TERMINATE:
            self._server.send(request)
            return False
        return self._relay(statement, request, self.calls.count_statement(statement))

    def _relay(self, statement: str, request: bytes, blow: Blow | None) -> bool:
        if blow is Blow.FAILS and statement != "connect":
            self._client.send(_refusal(self._server.status))
            return True
        if blow is Blow.LOST:
            self._server.send(request)
            answer = b"".join(self._server.answer())
            self._client.send(answer[: len(answer) // 2])
        if blow is Blow.HANGS:
            select.select([self._client.socket], [], [], self.patience_seconds)
        if blow is not None:
            return False
        self._server.send(request)
        for piece in self._server.answer():
            self._client.send(piece)
        return True


class _Messages:
    """One end of a connection, message by message."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.status = b"I"
        self._rest = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def startup(self) -> bytes:
        self._need(4)
        return self._take(_LENGTH.unpack_from(self._rest)[0])

    def request(self) -> tuple[bytes, str]:
        """Return what a client sends before it waits for an answer, and the statement that it has executed, if any."""
        whole, statement, executes = b"", "(prepared before)", False
        while True:
            self._need(5)
            message = self._take(_LENGTH.unpack_from(self._rest, 1)[0] + 1)
            kind, whole = message[:1], whole + message
            executes |= kind in {_QUERY, _EXECUTE}
            if kind == _QUERY:
                statement = message[5:-1].decode()
            if kind == _PARSE:
                statement = message[5:].split(b"\0")[1].decode()
            if kind in {_QUERY, _SYNC, _TERMINATE}:
                return whole, " ".join(statement.split()) if executes else ""

    def answer(self) -> Iterator[bytes]:
        """Return what a server sends until it is ready for more, in pieces."""
        ready = False
        while not ready:
            self._need(5)
            end = 0
            while not ready and len(self._rest) >= end + 5:
                ready = self._rest[end : end + 1] == _READY
                end += _LENGTH.unpack_from(self._rest, end + 1)[0] + 1
            piece = self._take(end)
            yield piece
        self.status = piece[-1:]

    def _take(self, size: int) -> bytes:
        self._need(size)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def _need(self, size: int) -> None:
        while len(self._rest) < size:
            data = self.socket.recv(1 << 18)
            if not data:
                raise EOFError
            self._rest += data


def _refusal(status: bytes) -> bytes:
    """Return an error as the server sends it when its disk is full; a transaction that is open has failed then."""
    fields = b"SERROR\0VERROR\0C53100\0Mno space left on device\0\0"
    error = b"E" + _LENGTH.pack(len(fields) + 4) + fields
    return error + _READY + _LENGTH.pack(5) + (b"I" if status == b"I" else b"E")
