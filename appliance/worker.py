"""The gunicorn worker: a request takes a thread only when it has arrived whole.

gthread gives a thread to each connection that has sent a byte, and the thread then waits for the rest: as many dawdling
clients as there are threads stop everything. Here the main loop reads, and keeps what is incomplete (wire/). It never
waits for a client, and a thread never waits for one either, except to write: see _UNREAD_BYTES.
"""

import errno
import logging
import selectors
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from gunicorn import http
from gunicorn.http import errors, wsgi
from gunicorn.workers.gthread import ThreadWorker

from appliance.collect.client import Network, limited_as
from appliance.collect.http import ARRIVED, LATER, Later
from appliance.log import begin_request, end_request, request_number
from appliance.wire.figures import WebFigures
from appliance.wire.framing import FramingError, Incoming
from appliance.wire.sockets import AnswerSocket, received, refusal, send_now, unread_bytes
from appliance.wire.threads import Threads
from appliance.wire.waiting import PerAddress, WaitingRoom

if TYPE_CHECKING:
    from appliance.runtime import Runtime

log = logging.getLogger(__name__)

# From the first byte (or the connection itself) to the last byte of a request.
REQUEST_SECONDS = 10.0
# Connections that wait for their next request.
IDLE_SECONDS = 15.0
# After the last answer, for a client that still sends: closing at once would take the answer from it (RFC 9112, 9.6).
_LINGER_SECONDS = 2.0
# When stopping, for a request that is on its way on an idle connection.
_STOP_IDLE_SECONDS = 0.5
# Incomplete requests: all of them together, those of one address, and the bytes that they hold.
_MAX_INCOMPLETE = 1_024
_MAX_INCOMPLETE_PER_ADDRESS = 64
_MAX_INCOMPLETE_BYTES = 64 * 1024 * 1024
# Whole requests that wait for a thread: a second's work. More would only wait longer than their senders do.
_MAX_QUEUED = 1_024
# Requests that are being answered, or wait for a thread; one alone may be larger.
_MAX_BUSY_BYTES = 64 * 1024 * 1024
# Bodies that are too large are read up to here, so that the client gets its answer and the connection stays usable.
_MIN_READ_BYTES = 1024 * 1024
_PARSED_BYTES = 16_384
# An answer fits into the socket's buffer as long as the client reads: who leaves this much unread gets no more.
_SEND_BUFFER_BYTES = 262_144
_UNREAD_BYTES = 65_536
# Answers larger than the buffer may make a thread wait for so long; nothing that strangers can ask for is as large.
_WRITE_SECONDS = 5
_SWEEP_SECONDS = 0.2

_PARSER_STATUS = {
    errors.LimitRequestLine: 414,
    errors.LimitRequestHeaders: 431,
    errors.ExpectationFailed: 417,
    errors.UnsupportedTransferCoding: 501,
}


class _Connection:
    """A client's connection and what has come in on it. gunicorn's code reads `sock`, `client` and `server`."""

    __slots__ = ("address", "client", "counted_bytes", "incoming", "polled", "request_bytes", "server", "sock")

    def __init__(self, sock: socket.socket, client: Any, server: Any, address: str | None, max_body_bytes: int) -> None:
        self.sock = sock
        self.client = client
        self.server = server
        self.incoming = Incoming(max_body_bytes)
        self.counted_bytes = 0
        self.polled = False
        # What its limits count it as; None: it has none.
        self.address = address
        # Of the request that is being answered.
        self.request_bytes = 0


class _Answering:
    """A request that is being answered."""

    __slots__ = ("conn", "later", "number", "response", "reusable", "sock")

    def __init__(self, conn: _Connection) -> None:
        self.conn = conn
        self.sock = AnswerSocket(conn.sock)
        self.number = request_number()
        self.response: Any = None
        self.later: Later | None = None
        # Whether the connection can be used for another request.
        self.reusable = False

    def write(self, body: Iterable[bytes]) -> None:
        """Send an answer whose head has been given to gunicorn's response."""
        try:
            for piece in body:
                self.response.write(piece)
            self.response.close()
            self.sock.flush()
        finally:
            if hasattr(body, "close"):
                body.close()
        self.reusable = not self.response.should_close()


class Worker(ThreadWorker):
    """gthread with the appliance inside, and a main loop that reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle = WaitingRoom[_Connection](seconds=IDLE_SECONDS)
        self._incomplete = WaitingRoom[_Connection](seconds=REQUEST_SECONDS)
        self._lingering = WaitingRoom[_Connection](seconds=_LINGER_SECONDS)
        self._per_address = PerAddress[_Connection](limit=_MAX_INCOMPLETE_PER_ADDRESS)
        self._incomplete_bytes = 0
        self._busy = 0
        self._busy_bytes = 0
        self._refused: Counter[int] = Counter()
        self._dropped = 0
        self._swept_at = 0.0
        self._trusted_proxies: Sequence[Network] = ()
        self._max_body_bytes = _MIN_READ_BYTES
        self._note_unread: Callable[[str], None] = log.debug

    # -- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to stop, then close the appliance's parts within what is left of the grace period."""
        runtime: Runtime = self.wsgi.extensions["appliance"]
        self._trusted_proxies = runtime.settings.server.trusted_proxies
        self._max_body_bytes = max(_MIN_READ_BYTES, runtime.settings.collect.max_body_bytes + 1)
        runtime.web = self.figures
        self._note_unread = runtime.note_unread
        runtime.start()
        try:
            self._serve()
        finally:
            started = time.monotonic()
            runtime.stop()
            log.info("worker stopped in %.1f s", time.monotonic() - started)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to stop: exports hear of it while the last requests are answered."""
        if self.booted:
            self.wsgi.extensions["appliance"].stopping.set()
        super().handle_exit(sig, frame)

    def figures(self) -> WebFigures:
        """Return what the main loop has counted."""
        return WebFigures(
            connections=self.nr_conns, requests=self._busy, refused=dict(self._refused), dropped=self._dropped
        )

    def get_thread_pool(self) -> "Threads":
        """Return what answers requests."""
        return Threads(self.cfg.threads)

    def _serve(self) -> None:
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        self.set_accept_enabled(enabled=True)
        while self.alive and self.is_parent_alive():
            self._turn()
        self.set_accept_enabled(enabled=False)
        now = time.monotonic()
        self._idle.hurry(now, seconds=_STOP_IDLE_SECONDS)
        self._incomplete.hurry(now, seconds=_LINGER_SECONDS)
        while self.nr_conns > 0 and time.monotonic() < now + self.cfg.graceful_timeout:
            self._turn()
        self.tpool.shutdown(wait=False)
        # The poller and the queue stay open until the process ends: answers may still come in, and would be noted in
        # whatever had got the number of the queue's pipe since.
        for listener in self.sockets:
            listener.close()

    def _turn(self) -> None:
        """Go once round the main loop."""
        self.notify()
        self.wait_for_and_dispatch_events(timeout=_SWEEP_SECONDS)
        now = time.monotonic()
        if now >= self._swept_at + _SWEEP_SECONDS:
            self._swept_at = now
            self._sweep(now)

    def _sweep(self, now: float) -> None:
        for conn in self._incomplete.overdue(now):
            self._leave_incomplete(conn)
            # Who has sent nothing gets no answer: browsers open connections in advance.
            if conn.incoming.buffer:
                self._refuse(conn, 408, f"it was not here whole after {REQUEST_SECONDS:.0f} seconds")
            else:
                self._close(conn)
        for room in (self._idle, self._lingering):
            for conn in room.overdue(now):
                room.remove(conn)
                self._close(conn)

    # -- connections --------------------------------------------------------------------------------------------------

    def accept(self, listener: socket.socket) -> None:
        """Take a new connection; where there is no place left, the one that has waited longest goes for it."""
        try:
            sock, client = listener.accept()
        except OSError as error:
            # Out of descriptors: make a place, and the next round accepts.
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._make_place()
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                # Errors of the network come up here, too (accept(2)): they are the client's.
                log.warning("a connection could not be taken: %s", error)
            return
        if self.nr_conns >= self.worker_connections and not self._make_place():
            self._dropped += 1
            sock.close()
            return
        sock.setblocking(True)  # noqa: FBT003 - the signature is Python's
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _WRITE_SECONDS, 0))
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address = limited_as(client[0], self._trusted_proxies) if client else None
        conn = _Connection(sock, client, listener.getsockname(), address, self._max_body_bytes)
        self.nr_conns += 1
        self._wait_for_request(conn)

    def _make_place(self) -> bool:
        for room in (self._lingering, self._idle, self._incomplete):
            oldest = room.oldest()
            if oldest is not None:
                self._drop(oldest)
                return True
        return False

    def _drop(self, conn: _Connection) -> None:
        self._dropped += 1
        for room in (self._lingering, self._idle):
            room.remove(conn)
        self._leave_incomplete(conn)
        self._close(conn)

    def _close(self, conn: _Connection) -> None:
        self._stop_polling(conn)
        self.nr_conns -= 1
        conn.sock.close()

    def _poll(self, conn: _Connection) -> None:
        if not conn.polled:
            conn.polled = True
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._on_readable, conn))

    def _stop_polling(self, conn: _Connection) -> None:
        if conn.polled:
            conn.polled = False
            self.poller.unregister(conn.sock)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _wait_for_request(self, conn: _Connection) -> None:
        """Wait for the rest of a request that has begun, or for the first one of a new connection."""
        self._incomplete.add(conn, time.monotonic())
        self._count_bytes(conn, len(conn.incoming.buffer))
        self._poll(conn)
        crowded = None
        if conn.address is not None:
            crowded = self._per_address.add(conn.address, conn)
        if crowded is None and (
            len(self._incomplete) > _MAX_INCOMPLETE or self._incomplete_bytes > _MAX_INCOMPLETE_BYTES
        ):
            crowded = self._incomplete.oldest()
        if crowded is not None:
            self._drop(crowded)

    def _leave_incomplete(self, conn: _Connection) -> None:
        if self._incomplete.remove(conn):
            self._count_bytes(conn, 0)
            if conn.address is not None:
                self._per_address.remove(conn.address, conn)

    def _count_bytes(self, conn: _Connection, number: int) -> None:
        self._incomplete_bytes += number - conn.counted_bytes
        conn.counted_bytes = number

    def _on_readable(self, conn: _Connection, _sock: socket.socket) -> None:
        if conn in self._lingering:
            self._discard(conn)
        elif conn in self._idle or conn in self._incomplete:
            self._receive(conn)
        else:
            # A thread answers this client, which sends the next request already, or has gone: look later.
            self._stop_polling(conn)

    def _receive(self, conn: _Connection) -> None:
        data = received(conn.sock)
        if data is None:
            return
        self._idle.remove(conn)
        if not data:
            self._leave_incomplete(conn)
            # A client that has only shut its own side hears that its request is not whole.
            if conn.incoming.buffer:
                self._refuse(conn, 400, "its client ended in the middle of it")
            else:
                self._close(conn)
            return
        conn.incoming.buffer += data
        self._advance(conn)

    def _advance(self, conn: _Connection) -> None:
        """Hand on the request at the front if it is whole, or wait for the rest of it."""
        try:
            request = conn.incoming.take()
        except FramingError as error:
            self._leave_incomplete(conn)
            self._refuse(conn, error.status, str(error))
            return
        if request is None:
            self._wait_for_request(conn)
            if conn.incoming.expects_continue:
                conn.incoming.expects_continue = False
                send_now(conn.sock, b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        self._leave_incomplete(conn)
        if unread_bytes(conn.sock) > _UNREAD_BYTES:
            self._close(conn)
        elif self._is_full(len(request)):
            self._refuse(conn, 503, "too many requests are waiting for their answer")
        else:
            self._busy += 1
            self._busy_bytes += len(request)
            conn.request_bytes = len(request)
            self.tpool.submit(partial(self._answer, conn, request, time.monotonic()))

    def _is_full(self, more_bytes: int) -> bool:
        """Return whether there is no room for another request behind those that are under way."""
        if self._busy >= self.cfg.threads + _MAX_QUEUED:
            return True
        return self._busy > 0 and self._busy_bytes + more_bytes > _MAX_BUSY_BYTES

    def finish_request(self, conn: _Connection, fs: bool) -> None:  # noqa: FBT001 - the name is gunicorn's
        """Go on with a connection whose request a thread has answered; `fs`: it can be used for another."""
        self._busy -= 1
        self._busy_bytes -= conn.request_bytes
        if not fs:
            self._linger(conn)
        elif conn.incoming.buffer:
            self._advance(conn)
        else:
            self._idle.add(conn, time.monotonic())
            self._poll(conn)

    # -- refusing -----------------------------------------------------------------------------------------------------

    def _refuse(self, conn: _Connection, status: int, reason: str) -> None:
        """Answer from the main loop what needs no thread, and end the connection."""
        self._refused[status] += 1
        self._note_unread(reason)
        send_now(conn.sock, refusal(status))
        self._linger(conn)

    def _linger(self, conn: _Connection) -> None:
        conn.incoming.buffer.clear()
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            # The client is gone already.
            self._close(conn)
            return
        self._lingering.add(conn, time.monotonic())
        self._poll(conn)

    def _discard(self, conn: _Connection) -> None:
        data = received(conn.sock)
        if data is not None and not data:
            self._lingering.remove(conn)
            self._close(conn)

    # -- answering, in a thread ---------------------------------------------------------------------------------------

    def _answer(self, conn: _Connection, request: bytes, arrived: float) -> None:
        """Answer one request, or begin what its answer waits for."""
        # Made of bytes that are all here: whatever the parser thinks of them, it never waits for more.
        parser = http.get_parser(self.cfg, _pieces(request), conn.client)
        answering = _Answering(conn)
        with self._finishing(answering):
            req = next(parser)
            _read_body(req, parser.unreader)
            answering.response, environ = wsgi.create(req, answering.sock, conn.client, conn.server, self.cfg)
            environ["wsgi.multithread"] = True
            environ[LATER] = True
            environ[ARRIVED] = arrived
            if not self.alive:
                answering.response.force_close()
            body = self.wsgi(environ, answering.response.start_response)
            if isinstance(body, Later):
                answering.later = body
            else:
                answering.write(body)
        if answering.later is not None:
            answering.later.begin(lambda: self.tpool.submit(partial(self._answer_later, answering)))

    def _answer_later(self, answering: "_Answering") -> None:
        """Send an answer that has waited for something."""
        later, answering.later = answering.later, None
        assert later is not None  # noqa: S101 - that is why this was called
        with self._finishing(answering):
            answering.write(later.answer().send(answering.response.start_response))

    @contextmanager
    def _finishing(self, answering: "_Answering") -> Iterator[None]:
        """Tell the main loop when an answer is out, and turn what went wrong into one where nothing was sent yet."""
        begin_request(answering.number)
        try:
            yield
        except StopIteration:
            log.debug("a request that is none")
        except errors.ParseException as error:
            status = next((code for kind, code in _PARSER_STATUS.items() if isinstance(error, kind)), 400)
            self._note_unread(f"it is no request that can be read ({type(error).__name__})")
            send_now(answering.conn.sock, refusal(status))
        except OSError as error:
            log.debug("a client went away or does not read its answer: %s", error)
        except Exception:
            log.exception("answering a request failed")
            if not answering.sock.sent:
                send_now(answering.conn.sock, refusal(500))
        finally:
            end_request()
            if answering.later is None:
                self.method_queue.defer(self.finish_request, answering.conn, answering.reusable)


def _pieces(request: bytes) -> Iterator[bytes]:
    """Cut it up: for each chunk the parser copies all that it was given and has not read yet."""
    return (request[start : start + _PARSED_BYTES] for start in range(0, len(request), _PARSED_BYTES))


def _read_body(req: Any, unreader: Any) -> None:
    """Read the body before anybody answers, so that what is wrong with it is answered once, and with 400."""
    req.body = BytesIO(req.body.read())
    if unreader.take_buffered():
        raise errors.ParseException
    # Whoever waited to be asked for the body has been (_advance); gunicorn would ask again.
    req._expected_100_continue = False  # noqa: SLF001 - there is no other way to tell it
