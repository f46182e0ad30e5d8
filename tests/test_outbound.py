"""No connection but to the configured buckets and alerts: nothing else is connected to, sent to, or asked for names.

strace records each call of each process that names another end, tries that fail too; a list of connections that is
looked at now and then would miss what is short. All of it happens in a network that has only a loopback, where root
runs the tests: nothing that works can have needed another.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from conftest import Appliance, http, s3_server, wait_for
from exporting import exported_ids
from outbound import Sent, in_a_network_of_its_own, sent, strays, traced
from signals import listening
from windows import PASSWORD, PATHS

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace: apt-get install strace")


def test_the_whole_appliance_reaches_nobody_but_its_buckets_its_alerts_and_its_database(
    appliance: Callable[..., Appliance],
    empty: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on a user's machine, where boto3 may look for keys and regions in an instance's metadata.
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    calls, allowed = in_a_network_of_its_own(lambda: live_a_day(Traced(appliance, tmp_path), tmp_path, empty))
    used = {call.where for call in calls}
    assert allowed <= used, "what is allowed is used, or nothing would have been recorded"
    # Both databases have their sockets there.
    assert strays(calls, addresses=allowed, below=tmp_path_factory.getbasetemp()) == []


@dataclass
class Traced:
    """Makes appliances of which every command is recorded."""

    make: Callable[..., Appliance]
    directory: Path
    records: list[Path] = field(default_factory=list)

    def __call__(self, **config: Any) -> Appliance:
        box = self.make(**config)
        box.wrap = self._under_strace
        return box

    def _under_strace(self, command: list[str]) -> list[str]:
        self.records.append(self.directory / f"record{len(self.records)}")
        return traced(command, self.records[-1])


def live_a_day(make: Traced, directory: Path, conninfo: str) -> tuple[list[Sent], set[str]]:
    """Do what an appliance does, and return every call and the addresses of the buckets and the alerts."""
    (directory / "s3").mkdir()
    with s3_server(directory / "s3") as s3, listening() as listener:
        client, vault = s3.new_bucket("client"), s3.new_bucket("vault")
        config: dict[str, Any] = {
            "admin": {"password": PASSWORD},
            "buckets": {"client": s3.settings(client), "vault": s3.settings(vault)},
            "exports": {"acme": {"client": "client", "backup": "vault", "schedule": "* * * * *"}},
            "alerts": {"urls": [listener.url]},
        }
        box = make(**config, server={"demo": True}).start()
        send_one(box)
        look_at_every_page(box)
        # The scheduler's, in the export's own process.
        wait_for(lambda: exported_ids(s3.objects(client)).total() == 1, "a scheduled export", seconds=120)
        work_by_hand(box, directory / "dump")
        assert listener.titles
        assert box.stop() == 0
        make(**config).run("restore", "client")
        move_out(make, config, directory / "dump", conninfo)
        address = s3.endpoint.removeprefix("http://")
    return [call for record in make.records for call in sent(record)], {address, f"127.0.0.1:{listener.port}"}


def send_one(box: Appliance) -> None:
    event = {"eventType": "pageview", "siteId": "shop", "url": "https://shop.example.com/", "ip": "192.0.2.7"}
    assert http(box, "POST", "/collect", json.dumps(event).encode(), {"Content-Type": "text/plain"}).status == 200


def work_by_hand(box: Appliance, dump: Path) -> None:
    for words in (("export",), ("check", "--probe"), ("verify", "--repair"), ("status",), ("backup", str(dump))):
        box.run(*words)
    box.run("backfill", "acme", "--from", "2026-01-01", "--to", "2100-01-01", "--bucket", "vault")


def move_out(make: Traced, config: dict[str, Any], dump: Path, conninfo: str) -> None:
    """Fill a database from a backup, move it to one of somebody's own, and take events in there."""
    box = make(**config)
    box.run("restore-backup", str(dump))
    same = {"data_dir": str(box.data_dir)}
    moved = make(**config, server=same, database={"url": conninfo})
    box.run("move", str(moved.write_config()))
    send_one(moved.start())
    assert moved.stop() == 0


def look_at_every_page(box: Appliance) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = http(box, "POST", "/admin/login", urlencode({"password": PASSWORD}).encode(), form)
    cookie = {"Cookie": str(answer.headers["Set-Cookie"]).partition(";")[0]}
    for path in (*(f"/admin{path}" for path in PATHS), "/demo/", "/tracking.js", "/health/ready"):
        assert http(box, "GET", path, headers=cookie).status == 200, path


CONNECTS = "import socket; socket.create_connection(('{}', 9), 1)"
CHILD = CONNECTS.format("192.0.2.1")


@pytest.mark.parametrize(
    ("program", "goes_to"),
    [
        (CONNECTS.format("192.0.2.1"), "192.0.2.1:9"),
        (CONNECTS.format("2001:db8::1"), "2001:db8::1:9"),
        ("import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))", "192.0.2.1:53"),
        ("import socket; socket.getaddrinfo('collector.example.com', 443)", ":53"),
        ("import urllib.request as u; u.urlopen('http://169.254.169.254/', timeout=1)", "169.254.169.254:80"),
        (f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])", "192.0.2.1:9"),
    ],
    ids=["IPv4", "IPv6", "a datagram", "a name", "metadata", "a child"],
)
def test_what_goes_elsewhere_is_seen_though_it_fails(tmp_path: Path, program: str, goes_to: str) -> None:
    record = tmp_path / "record"
    command = traced([sys.executable, "-c", program], record)
    in_a_network_of_its_own(lambda: subprocess.run(command, stderr=subprocess.DEVNULL, check=False))
    wait_for(lambda: [call for call in sent(record) if goes_to in call.where], f"a record of {goes_to}")
    assert strays(sent(record), addresses={"127.0.0.1:9000"}, below=tmp_path)
