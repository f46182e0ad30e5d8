"""The whole way: a browser on the demo site, the server process, PostgreSQL, and two buckets of a real S3 server."""

import gzip
import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from conftest import Appliance, S3Server, wait_for
from playwright.sync_api import Browser, BrowserContext

from appliance.store.embedded import EmbeddedPostgres

# Keeps a copy of every body that the page hands to the network, where the next page can still read it.
RECORD_WHAT_IS_SENT = """
(() => {
  const keep = (body) => localStorage.setItem("test.sent", (localStorage.getItem("test.sent") || "") + body + "\\n");
  const { send } = XMLHttpRequest.prototype;
  XMLHttpRequest.prototype.send = function (body) { keep(body); send.call(this, body); };
  const beacon = navigator.sendBeacon.bind(navigator);
  navigator.sendBeacon = (url, body) => { keep(body); return beacon(url, body); };
})();
"""


def test_every_event_the_browser_sent_stands_once_in_both_buckets(
    appliance: Callable[..., Appliance], s3: S3Server, browser: Browser
) -> None:
    client, backup = s3.new_bucket("client"), s3.new_bucket("backup")
    box = appliance(
        server={"demo": True},
        buckets={"acme": s3.settings(client, prefix="raw"), "vault": s3.settings(backup, prefix="raw")},
        exports={"acme": {"client": "acme", "backup": "vault", "schedule": "* * * * *"}},
    ).start()

    sent = visit_the_demo_site(browser, box)
    assert {"pageview", "click", "signup", "submit", "scroll", "pageleave"} <= {event["eventType"] for event in sent}
    ids = {event["eventId"] for event in sent}
    wait_for(lambda: stored_ids(box) == ids, "all events to be stored")
    wait_for(lambda: stored_ids(box, exported=True) == ids, "a scheduled export", seconds=90)

    first, second = s3.objects(client), s3.objects(backup)
    assert first == second
    lines = exported_lines(first)
    assert sorted(line["event_id"] for line in lines) == sorted(ids)
    raw = {line["event_id"]: line["raw_event_data"] for line in lines}
    for event in sent:
        assert raw[event["eventId"]].items() >= event.items()
    assert list(json.loads(first["raw/_manifests/acme/0000000001.json"])["objects"])

    again = json.loads(box.run("export", "acme", "--json").stdout)
    assert (again[0]["batches"], again[0]["failed"]) == (0, False)
    assert s3.objects(client) == first
    assert s3.objects(backup) == first
    assert box.stop() == 0


def test_a_kill_between_the_first_and_the_second_bucket_leaves_no_trace(
    appliance: Callable[..., Appliance], s3: S3Server, deadly_door: "DeadlyDoor"
) -> None:
    client, backup = s3.new_bucket("client"), s3.new_bucket("backup")
    deadly_door.leads_to(s3.endpoint)
    box = appliance(
        buckets={
            "a-client": s3.settings(client),
            "b-backup": s3.settings(backup, endpoint_url=deadly_door.endpoint),
        },
        exports={"acme": {"client": "a-client", "backup": "b-backup", "schedule": "0 0 1 1 *"}},
    ).start()
    ids = send_events(box, 25)
    box.stop()
    # From here on a run comes each minute, and finds all of them.
    box.config["exports"]["acme"]["schedule"] = "* * * * *"
    box.start()
    assert box.process is not None
    deadly_door.kills(box.process.pid, once=lambda: s3.objects(client))

    wait_for(lambda: box.process and box.process.poll() is not None, "the kill", seconds=90)
    assert deadly_door.killed
    assert len(exported_lines(s3.objects(client))) == 25
    assert s3.objects(backup) == {}

    deadly_door.open()
    box.start()
    box.run("export", "acme")
    first, second = s3.objects(client), s3.objects(backup)
    assert first == second
    assert sorted(line["event_id"] for line in exported_lines(first)) == sorted(ids)
    assert stored_ids(box, exported=True) == set(ids)
    assert list(first) == [
        "_manifests/acme/0000000001.json",
        *(key for key in first if key.startswith("site=shop/")),
    ]


def test_while_somebody_holds_a_transaction_open_collecting_goes_on_and_the_status_names_it(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance().start()
    send_events(box, 5)
    assert export(box)["row_count"] == 5
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo, application_name="dawdler") as late:
        late.execute(
            "INSERT INTO events_log (event_id, event_type, site_id, timestamp, raw_event_data)"
            " VALUES (gen_random_uuid(), 'late', 'shop', now(), '{}')"
        )
        for _ in range(20):
            began = time.monotonic()
            send_events(box, 2)
            # A transaction that held them up would do so until it ends, or until they go to the spool after 2 s.
            assert time.monotonic() - began < 2
        report = export(box)
        assert (report["row_count"], report["blockers"][0]["pid"]) == (0, late.info.backend_pid)
        (writer,) = wait_for(lambda: open_writers(box), "the status to name it")
        assert (writer["pid"], writer["application"]) == (late.info.backend_pid, "dawdler")
        assert writer["age_seconds"] >= 5
        send_events(box, 1)
        late.commit()
    assert (export(box)["row_count"], open_writers(box)) == (42, [])
    assert len(stored_ids(box, exported=True)) == 47
    manifests = sorted(box.data_dir.rglob("_manifests/*/*.json"))
    assert [json.loads(path.read_text())["row_count"] for path in manifests] == [5, 42]


def export(box: Appliance) -> dict[str, Any]:
    (report,) = json.loads(box.run("export", "--json").stdout)
    return dict(report)


def open_writers(box: Appliance) -> list[dict[str, Any]]:
    return list(json.loads(box.run("status", "--json").stdout)["open_writers"])


def visit_the_demo_site(browser: Browser, box: Appliance) -> list[dict[str, Any]]:
    """Load, click, scroll, fill in a form, download and leave; return every event that was handed to the network."""
    context = browser.new_context(accept_downloads=True)
    context.add_init_script(RECORD_WHAT_IS_SENT)
    page = context.new_page()
    page.goto(f"{box.url}/demo/")
    page.click("#taste")
    page.click("#signup")
    with page.expect_download():
        page.click("text=Download the price list")
    page.click("text=Read how quinces ripen")
    page.mouse.wheel(0, 5000)
    page.click("text=Ask us about quinces")
    page.fill("textarea", "When do you open?")
    page.click("button[type=submit]")
    page.wait_for_selector("text=Thank you")
    page.goto("about:blank")
    events = recorded_events(context, box)
    context.close()
    return events


def recorded_events(context: BrowserContext, box: Appliance) -> list[dict[str, Any]]:
    reader = context.new_page()
    reader.goto(f"{box.url}/health/live")
    bodies = reader.evaluate("localStorage.getItem('test.sent')").splitlines()
    by_id = {event["eventId"]: event for body in bodies for event in json.loads(body)["events"]}
    return list(by_id.values())


def stored_ids(box: Appliance, *, exported: bool = False) -> set[str]:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        condition = "WHERE exported_at IS NOT NULL" if exported else ""
        rows = conn.execute(f"SELECT event_id::text FROM events_log {condition}").fetchall()  # noqa: S608
    assert len(rows) == len({row[0] for row in rows})
    return {row[0] for row in rows}


def exported_lines(objects: dict[str, bytes]) -> list[dict[str, Any]]:
    data = (body for key, body in objects.items() if key.endswith(".jsonl.gz"))
    return [json.loads(line) for body in data for line in gzip.decompress(body).splitlines()]


def send_events(box: Appliance, number: int) -> list[str]:
    events = [{"eventType": "click", "siteId": "shop", "n": n} for n in range(number)]
    request = urllib.request.Request(  # noqa: S310
        f"{box.url}/collect", json.dumps(events).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        assert json.load(answer)["accepted"] == number
    return sorted(stored_ids(box))


class DeadlyDoor:
    """A TCP door to the S3 server; once armed, the first object that is put through it kills a process instead.

    Both buckets are put to at once: the kill waits until the other has its object.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.killed = False
        self._victim: int | None = None
        self._once: Callable[[], object] = lambda: True
        self._target = ("", 0)
        threading.Thread(target=self._accept, daemon=True).start()

    def leads_to(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._target = (host, int(port))

    def kills(self, pid: int, *, once: Callable[[], object]) -> None:
        self._once, self._victim = once, pid

    def open(self) -> None:
        """Let everybody through again."""
        self._victim = None

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, outward: bool) -> None:  # noqa: FBT001
        with suppress(OSError):
            while data := source.recv(65536):
                if outward and self._victim and data.startswith(b"PUT "):
                    # The door stays shut: a worker outlives its supervisor by a moment, and tries again.
                    if not self.killed:
                        wait_for(self._once, "the other bucket to have its object")
                        os.kill(self._victim, signal.SIGKILL)
                        self.killed = True
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def deadly_door() -> Iterator[DeadlyDoor]:
    door = DeadlyDoor()
    yield door
    door.close()
