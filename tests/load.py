"""A client process that posts events and notes the ids of those that were acknowledged.

    python tests/load.py URL NOTES THREADS EVENTS_PER_SECOND

Each thread sends so many events a second, or, where that is 0, all it can without a pause.

Ends when its standard input is closed. NOTES gets a line for each answer: its status, or "-" for none, and then the ids
of the events if it was 2xx. A line is written before the next request is sent.
"""

import json
import random
import sys
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

TIMEOUT_SECONDS = 30
# One in so many requests repeats events that were sent before, as a client does that heard no answer.
REPEATS = 5
CHANCE = random.Random()  # noqa: S311 - no secrets are made of it


def main() -> None:
    url, notes, threads, per_second = sys.argv[1:]
    ended = threading.Event()
    for number in range(int(threads)):
        path = Path(f"{notes}.{number}")
        threading.Thread(target=send_until, args=(ended, url, path, float(per_second)), daemon=True).start()
    sys.stdin.read()
    ended.set()
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(TIMEOUT_SECONDS)


def send_until(ended: threading.Event, url: str, notes: Path, per_second: float) -> None:
    connection = new_connection(url)
    sent: list[str] = []
    with notes.open("w", buffering=1) as lines:
        while not ended.is_set():
            ids = sent if sent and CHANCE.randrange(REPEATS) == 0 else [str(uuid4()) for _ in range(number_of_events())]
            status = post(connection, ids)
            if status is None:
                connection.close()
                time.sleep(0.02)
            lines.write(f"{status or '-'} {' '.join(ids) if status in (200, 202) else ''}\n")
            # Without an answer the same events are sent again.
            sent = ids
            if per_second:
                ended.wait(len(ids) / per_second)
    connection.close()


def number_of_events() -> int:
    return CHANCE.choice([1, 1, 1, 5, 20])


def new_connection(url: str) -> HTTPConnection:
    parts = urlsplit(url)
    return HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)


def post(connection: HTTPConnection, ids: list[str]) -> int | None:
    body = json.dumps([{"eventType": "load", "siteId": "load", "eventId": one, "n": 1} for one in ids])
    with suppress(OSError, HTTPException):
        connection.request("POST", "/collect", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    return None


if __name__ == "__main__":
    main()
