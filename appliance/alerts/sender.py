"""The process that sends one message: JSON on standard input, a line [number, problem] a URL on standard output."""

import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import apprise

from appliance.log import redactor
from appliance.priority import step_back

_MAX_PROBLEM_CHARS = 300
# Shorter parts of a URL are words: a port, "path", a service's name.
_SECRET_CHARS = 4
_MOST_AT_ONCE = 16


class _Complaints(logging.Handler):
    """Keeps what apprise says of each thread's URL."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.of_thread: dict[int, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        # The first one tells the cause.
        self.of_thread.setdefault(record.thread or 0, record.getMessage())


def main() -> None:
    """Send what standard input says."""
    step_back(os.getpid())
    message = json.load(sys.stdin)
    # Who started this may be gone.
    signal.alarm(int(message["seconds"]) + 2)
    complaints = _Complaints()
    logging.basicConfig(handlers=[complaints], level=logging.WARNING, force=True)
    logging.getLogger("apprise").setLevel(logging.WARNING)
    printing = threading.Lock()

    def send(number: int, url: str) -> None:
        problem = _problem(complaints, url, message)
        with printing:
            sys.stdout.write(json.dumps([number, problem]) + "\n")
            sys.stdout.flush()

    # A thread each, so that the complaints of one are not taken for those of another.
    for start in range(0, len(message["urls"]), _MOST_AT_ONCE):
        urls = message["urls"][start : start + _MOST_AT_ONCE]
        with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
            list(pool.map(send, range(start + 1, start + 1 + len(urls)), urls))


def _problem(complaints: _Complaints, url: str, message: dict[str, Any]) -> str:
    """Send to one URL; return why not, without its secrets."""
    complaints.of_thread.pop(threading.get_ident(), None)
    try:
        if _send(url, message):
            return ""
        why = complaints.of_thread.get(threading.get_ident(), "it was not taken")
    except Exception as error:  # noqa: BLE001 - a service's code is a stranger's
        why = f"{type(error).__name__}: {error}"
    return _told(redactor(secret_parts(url))(why))


def _send(url: str, message: dict[str, Any]) -> bool:
    asset = apprise.AppriseAsset(app_id="appliance", async_mode=False, secure_logging=True)
    one = apprise.Apprise(asset=asset)
    if not one.add(url):
        raise ValueError("apprise knows no such service, or the address lacks something")
    over = message["title"].startswith("over: ")
    kind = apprise.NotifyType.SUCCESS if over else apprise.NotifyType.WARNING
    title = f"Appliance: {message['title']}"
    return bool(one.notify(body=message["text"], title=title, notify_type=kind, body_format=apprise.NotifyFormat.TEXT))


def _told(why: str) -> str:
    line = re.sub(r"\s+", " ", why).strip()
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:_MAX_PROBLEM_CHARS]


def secret_parts(url: str) -> Sequence[str]:
    """Return the URL and all that it is made of: which part of it is a key is each service's own business."""
    rest = url.partition("://")[2]
    parts = [part for part in re.split(r"[/:@?&=,]", rest) if len(part) >= _SECRET_CHARS]
    return [url, rest, *parts, *(unquote(part) for part in parts)]


if __name__ == "__main__":
    main()
