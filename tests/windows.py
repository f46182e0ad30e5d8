"""An appliance whose windows have something to show, and a browser that looks through them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from conftest import Appliance, http, running, wait_for
from playwright.sync_api import Browser, Page

from appliance.store.embedded import EmbeddedPostgres

PASSWORD = "pässword & more"
TOKEN = "token-of-a-script"
PATHS = ("/", "/live", "/install", "/exports", "/quarantine", "/configuration")
AXE = Path(__file__).parent / "browser" / "node_modules" / "axe-core" / "axe.min.js"


@dataclass(frozen=True)
class Windows:
    """An appliance with a password and a token, and its database."""

    box: Appliance
    url: str

    def execute(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as conn:
            cursor = conn.execute(statement, params)
            return cursor.fetchall() if cursor.description else []

    def send(self, *events: dict[str, Any], origin: str = "https://shop.example.com", status: int = 200) -> None:
        headers = {"Content-Type": "text/plain", "Origin": origin}
        answer = http(self.box, "POST", "/collect", json.dumps(events).encode(), headers)
        assert answer.status == status, answer.body

    def get(self, path: str) -> str:
        """Return a page as a script sees it."""
        answer = http(self.box, "GET", f"/admin{path}", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status == 200, answer.body
        return answer.body.decode()

    def post(self, path: str, **fields: str) -> int:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-www-form-urlencoded"}
        return http(self.box, "POST", f"/admin{path}", urlencode(fields).encode(), headers).status


@contextmanager
def windows(postgres: EmbeddedPostgres, directory: Path, name: str, **config: Any) -> Iterator[Windows]:
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template_of_tests")
    url = psycopg.conninfo.make_conninfo(postgres.conninfo, dbname=name)
    (directory / "acme").mkdir()
    with running(directory, database={"url": url}, admin={"password": PASSWORD, "token": TOKEN}, **config) as box:
        yield Windows(box, url)


def two_buckets(directory: Path) -> dict[str, Any]:
    """Three sites and two jobs: one well, one whose backup is not there; and a bucket with secrets."""
    cloud = {
        "kind": "s3",
        "provider": "minio",
        "bucket": "vault-events",
        "prefix": "raw",
        "endpoint_url": "https://s3.example.com",
        "access_key_id": "AKIAEXAMPLE",
        "secret_access_key": "a-secret-that-no-page-shows",
    }
    return {
        "sites": [
            {"id": "shop", "origins": ["https://shop.example.com"]},
            {"id": "blog", "origins": ["https://blog.example.com"]},
            {"id": "docs"},
        ],
        "buckets": {
            "acme": {"kind": "directory", "path": str(directory / "acme")},
            "vault": {"kind": "directory", "path": str(directory / "nas")},
            "cloud": cloud,
        },
        "exports": {
            "acme": {"sites": ["shop"], "client": "acme", "schedule": "5 * * * *"},
            "everything": {"sites": ["*"], "client": "acme", "backup": "vault", "format": "parquet"},
        },
    }


def fill(one: Windows) -> None:
    """Weeks of traffic by the counters, and a little of everything by the way in."""
    now = datetime.now(UTC)
    rows = []
    for day in range(1, 28):
        for site, share in (("shop", 1.0), ("blog", 0.4)):
            number = int((900 + 350 * ((day * 7919) % 11) / 11 - (500 if day % 7 in {2, 3} else 0)) * share)
            rows.append((now - timedelta(days=day), site, number))
    for minute in range(170, 1, -1):
        for site, share in (("shop", 1.0), ("blog", 0.4)):
            rows.append((now - timedelta(minutes=minute), site, int((8 + (minute * 31 % 17)) * share)))
    with psycopg.connect(one.url, autocommit=True) as conn, conn.cursor() as cursor:
        cursor.executemany("INSERT INTO event_counts VALUES (date_trunc('minute', %s::timestamptz), %s, %s, 0)", rows)
    for number in range(12):
        one.send(
            {"eventType": "pageview", "siteId": "shop", "visitorId": f"visitor{number:04}", "path": f"/p/{number}"},
            {"eventType": "click", "siteId": "shop", "visitorId": f"visitor{number:04}", "element": "buy", "n": number},
        )
    one.send({"eventType": "pageview", "siteId": "shop"}, origin="https://staging.example.com", status=403)
    one.send({"eventType": "pageview", "siteId": "shpo"}, status=403)
    one.send({"siteId": "shop"}, status=400)
    http(one.box, "POST", "/collect", b'{"eventType": "x", ', {"Content-Type": "text/plain"})
    wait_for(lambda: len(one.execute("SELECT DISTINCT kind FROM quarantine")) >= 4, "what was refused to be kept")
    assert one.post("/exports/run", job="acme") == 303
    assert one.post("/exports/run", job="everything") == 303
    ended = "SELECT job FROM export_runs WHERE outcome <> 'running'"
    wait_for(lambda: len(one.execute(ended)) >= 2, "both jobs to have run")


@contextmanager
def page_of(browser: Browser, one: Windows, **options: Any) -> Iterator[Page]:
    """Lend a page of somebody who has logged in."""
    context = browser.new_context(base_url=one.box.url, **options)
    page = context.new_page()
    page.goto("/admin/login")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/admin/")
    yield page
    context.close()


def needs_axe() -> str:
    """Return the source of axe-core; skip without it."""
    if not AXE.exists():
        pytest.skip("needs axe-core: make axe")
    return AXE.read_text()
