"""What is read from and written to a client's socket, by a loop that waits for nobody."""

import logging
import socket
from fcntl import ioctl
from termios import TIOCOUTQ

log = logging.getLogger(__name__)

_RECEIVE_BYTES = 65_536
_RETRY_AFTER_SECONDS = 2

_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
}


class AnswerSocket:
    """What gunicorn writes an answer to: head and body leave together, in one call and one packet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._head: bytes | None = None
        self._begun = False
        self.sent = False

    def sendall(self, data: bytes) -> None:
        """Keep the first piece back until there is a second."""
        if not self._begun:
            self._begun, self._head = True, data
            return
        head, self._head = self._head, None
        self.sent = True
        self._sock.sendall(data if head is None else head + data)

    def flush(self) -> None:
        """Send a head that had no body."""
        if self._head is not None:
            self.sent = True
            self._sock.sendall(self._head)


def received(sock: socket.socket) -> bytes | None:
    """Return what has come in; b"" at the end, None where there is nothing yet."""
    try:
        return sock.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return b""


def send_now(sock: socket.socket, data: bytes) -> None:
    """Send what fits; a client that has left no room for a line does not read anyway."""
    try:
        sock.send(data, socket.MSG_DONTWAIT)
    except OSError as error:
        log.debug("a short answer could not be sent: %s", error)


def unread_bytes(sock: socket.socket) -> int:
    """Return how much of what was sent the client has not taken yet (tcp(7), SIOCOUTQ)."""
    return int.from_bytes(ioctl(sock.fileno(), TIOCOUTQ, bytes(4)), "little")


def refusal(status: int) -> bytes:
    """Return a whole answer that ends the connection."""
    reason = _REASONS.get(status, "Internal Server Error")
    body = f'{{"error":"{reason.lower()}"}}\n'
    retry = f"Retry-After: {_RETRY_AFTER_SECONDS}\r\n" if status == 503 else ""  # noqa: PLR2004 - HTTP's number
    return (
        f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"{retry}Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
