"""A PostgreSQL of the user's own, of another major version."""

import json
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from conftest import Appliance, wait_for

from appliance.store import programs

# The wheel that brings PostgreSQL 18 brings 16 too.
OLD_BINARIES = programs.binaries_of("16") or Path("PostgreSQL 16 is not in the wheel")


@pytest.fixture
def postgres_16(tmp_path: Path) -> Iterator[str]:
    """Run PostgreSQL 16 with a database that holds nothing and return its URL."""
    data, sockets = tmp_path / "pg16", tmp_path / "s"
    sockets.mkdir(mode=0o700)
    as_user = programs.command_prefix()
    initdb = [*as_user, str(OLD_BINARIES / "initdb"), "-D", str(data), "-U", "owner", "--auth=trust"]
    subprocess.run([*initdb, "--encoding=UTF8", "--locale=C"], check=True, capture_output=True)
    options = ["-c", f"unix_socket_directories={sockets}", "-c", "listen_addresses=", "-c", "timezone=Asia/Kolkata"]
    server = subprocess.Popen(
        [*as_user, str(OLD_BINARIES / "postgres"), "-D", str(data), *options], stderr=subprocess.DEVNULL
    )
    wait_for((sockets / ".s.PGSQL.5432").exists, "PostgreSQL 16")
    url = f"postgresql://owner@/postgres?host={sockets}"
    wait_for(lambda: _connects(url), "PostgreSQL 16")
    yield url
    server.send_signal(signal.SIGINT)
    server.wait(30)


def _connects(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def test_everything_works_on_an_external_postgresql_16(appliance: Callable[..., Appliance], postgres_16: str) -> None:
    box = appliance(database={"url": postgres_16}).start()
    body = json.dumps([{"eventType": "click", "siteId": "shop", "n": n} for n in range(5)]).encode()
    request = urllib.request.Request(f"{box.url}/collect", body, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        assert json.load(answer)["accepted"] == 5
    report = json.loads(box.run("export", "--json").stdout)
    assert (report[0]["row_count"], report[0]["failed"]) == (5, False)
    with psycopg.connect(postgres_16) as conn:
        assert conn.info.server_version // 10000 == 16
        assert conn.execute("SELECT count(exported_at) FROM events_log").fetchone() == (5,)
    assert not (box.data_dir / "postgres").exists()
    assert box.stop() == 0
