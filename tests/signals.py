"""Help for tests of metrics and alerts: reading a scrape, and a server that alerts are sent to."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from conftest import Answer, Appliance, http
from prometheus_client.parser import text_string_to_metric_families

from appliance.export.job import Exporter
from appliance.export.report import Report

TOKEN = "token-of-the-scraper"

Labels = frozenset[tuple[str, str]]


class Scrape(dict[tuple[str, Labels], float]):
    """The samples of one scrape by name and labels."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        super().__init__(
            {(s.name, frozenset(s.labels.items())): s.value for family in self.families for s in family.samples}
        )

    def value(self, name: str, **labels: str) -> float | None:
        """Return one sample of the appliance; None where there is none."""
        return self.get((f"appliance_{name}", frozenset(labels.items())))


def scrape(box: Appliance) -> Scrape:
    answer = ask(box)
    assert answer.status == 200, answer.body
    return Scrape(answer.body.decode())


def ask(box: Appliance, token: str = TOKEN) -> Answer:
    return http(box, "GET", "/metrics", headers={"Authorization": f"Bearer {token}"})


def run_apart(exporter: Exporter, job: str = "acme") -> Report:
    """Run a job in a thread of its own, which steps back for good: the one of the tests must not."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(exporter.run, job).result()


@dataclass
class Listener:
    """A server that takes alerts, or refuses them, or never answers."""

    port: int = 0
    status: int = 200
    hangs: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """The URL by which apprise sends JSON there; its last part stands for a key."""
        return f"json://127.0.0.1:{self.port}/hook/key-that-nobody-may-see"

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.messages]


@contextmanager
def listening() -> Iterator[Listener]:
    """Run such a server."""
    listener = Listener()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if listener.hangs:
                listener.ended.wait(60)
                return
            if listener.status == 200:
                listener.messages.append(message)
            self.send_response(listener.status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        listener.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield listener
        finally:
            listener.ended.set()
            server.shutdown()
            thread.join(10)
