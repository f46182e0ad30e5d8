"""A request and its answer, as little of HTTP as collecting needs.

Flask serves people and everything that is asked for now and then. What comes with every event is answered in front of
it: a request context, a session, the routing and a response object took a third of the time of a request that is
stored, and gave it nothing.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from queue import SimpleQueue
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

Environ: TypeAlias = Mapping[str, Any]
StartResponse: TypeAlias = Callable[[str, list[tuple[str, str]]], object]
WSGIApp: TypeAlias = Callable[[Any, Any], Iterable[bytes]]

_JSON = "application/json"
_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class BrokenBodyError(ValueError):
    """The body cannot be read."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a WSGI environment says."""

    environ: Environ

    @property
    def method(self) -> str:
        """GET, POST ..."""
        return str(self.environ["REQUEST_METHOD"])

    @property
    def media_type(self) -> str:
        """The content type without its parameters."""
        return str(self.environ.get("CONTENT_TYPE", "")).partition(";")[0].strip(" \t").lower()

    def header(self, name: str) -> str | None:
        """Return a header by its WSGI name: HTTP_ORIGIN."""
        value: str | None = self.environ.get(name)
        return value

    def body(self, limit: int) -> bytes:
        """Return the body, or as much of it as the limit. Raises BrokenBodyError."""
        try:
            content: bytes = self.environ["wsgi.input"].read(limit)
        except Exception as error:
            # Whatever the web server makes of chunks that are none.
            raise BrokenBodyError("the body is broken") from error
        return content

    def query(self) -> dict[str, str]:
        """Return the parameters of the URL; of a name that stands twice the first."""
        # WSGI gives bytes as Latin-1 (PEP 3333).
        text = str(self.environ.get("QUERY_STRING", "")).encode("latin-1").decode(errors="replace")
        pairs = parse_qsl(text, keep_blank_values=True, errors="replace")
        return dict(reversed(pairs))


@dataclass(slots=True)
class Answer:
    """What is sent back."""

    status: int = 200
    body: bytes = b""
    media_type: str = _JSON
    headers: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, status: int = 200, **content: Any) -> "Answer":
        """Answer with a JSON object."""
        return cls(status, json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    def send(self, start_response: StartResponse, *, without_body: bool = False) -> list[bytes]:
        """Send it as WSGI does; to HEAD `without_body`, whose length is told all the same."""
        own = [("Content-Length", str(len(self.body)))]
        if self.body:
            own.append(("Content-Type", self.media_type))
        start_response(_STATUS_LINES[self.status], own + self.headers)
        return [b"" if without_body else self.body]


# Set by a server that can send an answer later; see Later.
LATER = "appliance.later"
# Set by a server that knows it: time.monotonic() when the request was whole.
ARRIVED = "appliance.arrived"


@dataclass(frozen=True, slots=True)
class Pending:
    """An answer that comes when something is on disk.

    `begin` starts that and calls what it is given, from any thread, with the outcome; `finish` makes the answer of it.
    """

    begin: Callable[[Callable[[Any], None]], None]
    finish: Callable[[Any], Answer]

    def then(self, change: Callable[[Answer], Answer]) -> "Pending":
        """Change the answer when it is there."""
        return Pending(self.begin, lambda outcome: change(self.finish(outcome)))


def then(answer: Answer | Pending, change: Callable[[Answer], Answer]) -> Answer | Pending:
    """Change an answer, now or when it is there."""
    return answer.then(change) if isinstance(answer, Pending) else change(answer)


class Later:
    """What a WSGI app returns in place of a body when its answer is pending and the server has set LATER.

    No thread waits: with many requests in flight most of a thread's time went into falling asleep and waking up.
    """

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._outcome: Any = None

    def begin(self, ready: Callable[[], None]) -> None:
        """Start what the answer waits for; `ready` is called from any thread when `answer` may be."""

        def done(outcome: Any) -> None:
            self._outcome = outcome
            ready()

        self._pending.begin(done)

    def answer(self) -> Answer:
        """Return the answer."""
        return self._pending.finish(self._outcome)


def waited_for(pending: Pending) -> Answer:
    """Return the answer when it is there, for servers that cannot send it later."""
    outcomes: SimpleQueue[Any] = SimpleQueue()
    pending.begin(outcomes.put)
    return pending.finish(outcomes.get())
