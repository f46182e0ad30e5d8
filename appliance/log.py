"""Log format and redaction: one line a record, bounded, without secrets."""

import itertools
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

# A hostile client must not be able to fill the disk or forge lines through a message.
MAX_MESSAGE_CHARS = 2_000

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]*@")
_KEYWORD_PASSWORD = re.compile(r"(password\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)")

# A shorter secret may be an ordinary word ("demo"): it is blanked only as a whole value and where something says that a
# secret follows, as in `token=...`, `"secret_access_key": "..."` or `Bearer ...`.
_WORD_CHARS = 8
_ANNOUNCED = r"""(?i:(?<![^\W_])(?:(?:password|token|secret|key|key_id)['"]? *[=:] *|bearer +)['"]?)"""
_VALUE_ENDS = r"(?![\w/-])"


class _Formatter(logging.Formatter):
    """Renders a record in UTC and blanks every known secret, tracebacks included."""

    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt=None)
        self._redact = redactor(secrets)

    def message_of(self, record: logging.LogRecord) -> str:
        """Return the message without secrets, in one line of a bounded length."""
        # Secrets first: cut or escaped, one would no longer be recognised.
        message = self._redact(record.getMessage()).translate(_CONTROL)
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}... ({len(message)} characters)"
        return message

    def format(self, record: logging.LogRecord) -> str:
        message = self.message_of(record)
        request = request_id()
        if request:
            message += f" (request {request})"
        # exc_text is what another handler may have made of the exception.
        clean = logging.makeLogRecord({**record.__dict__, "msg": message, "args": None, "exc_text": None})
        return super().format(clean)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the name is logging's
        """Indent a traceback, so that no text in it can pass for a record."""
        lines = self._redact(super().formatException(ei)).splitlines()
        return "\n".join(f"  | {line.translate(_CONTROL)[:MAX_MESSAGE_CHARS]}" for line in lines)


class _JsonFormatter(_Formatter):
    """The same as one JSON object a line, in ASCII alone."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": self.formatTime(record).replace(" ", "T"),
            "level": record.levelname,
            "logger": record.name,
            "message": self.message_of(record),
        }
        request = request_id()
        if request:
            content["request"] = request
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)


class _Redactor:
    def __init__(self, secrets: Iterable[str]) -> None:
        # Longest first: one secret may contain another.
        known = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
        self._secrets = [secret for secret in known if len(secret) >= _WORD_CHARS]
        words = "|".join(re.escape(secret) for secret in known if len(secret) < _WORD_CHARS)
        self._words = re.compile(f"({_ANNOUNCED})(?:{words}){_VALUE_ENDS}") if words else None

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        if self._words:
            text = self._words.sub(r"\1***", text)
        text = _URL_PASSWORD.sub(r"\1:***@", text)
        return _KEYWORD_PASSWORD.sub(r"\1***", text)


def redactor(secrets: Iterable[str]) -> _Redactor:
    """Return a function that blanks the given secrets, and passwords in database URLs, in any text.

    A secret of fewer than eight characters is blanked only where a secret is announced.
    """
    return _Redactor(secrets)


def configure(*, secrets: Iterable[str] = (), level: int = logging.INFO, as_json: bool = False) -> None:
    """Send all logging to standard error in the appliance's format. Calling it again replaces the former set-up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(secrets) if as_json else _Formatter(secrets))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # These report each retry of their own; what matters of it reaches the user through our errors.
    for chatty in ("psycopg.pool", "apscheduler", "botocore", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


# Microseconds: what is logged after a restart bears no number of before.
_numbers = itertools.count(time.time_ns() // 1000)
_thread = threading.local()


def request_number() -> int:
    """Return a number for a request that has come in."""
    return next(_numbers)


def begin_request(number: int) -> None:
    """Let what this thread logs from now on name the request."""
    _thread.request = number


def end_request() -> None:
    """Name no request any more."""
    _thread.request = None


def request_id() -> str:
    """Return what logs and answers call the request that this thread works on; empty when it works on none."""
    number: int | None = getattr(_thread, "request", None)
    # Made only where it is needed, which is hardly ever.
    return f"{number:x}" if number is not None else ""


class Seldom:
    """Keeps what happens at every request from being logged as often."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def due(self) -> bool:
        """Return whether it is time to say it (again)."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
