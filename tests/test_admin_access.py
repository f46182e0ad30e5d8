"""Who may look in and who may change anything: every route, every form, streams, and passwords kept as hashes."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import urlencode

import pytest
from conftest import Answer, Appliance, http, make_settings, wait_for
from windows import PASSWORD, PATHS, TOKEN, Windows, two_buckets, windows

from appliance.admin.views.live import MAX_STREAMS
from appliance.runtime import Runtime, create_app
from appliance.store.embedded import EmbeddedPostgres

FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def house(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windows]:
    directory = tmp_path_factory.mktemp("access")
    with windows(postgres, directory, "access", **two_buckets(directory)) as one:
        one.send({"eventType": "pageview", "siteId": "shop"})
        yield one


def routes(directory: Path) -> list[tuple[str, str]]:
    """Return every route of the windows that needs a session: its method and an address that it answers."""
    app = create_app(Runtime(make_settings(server={"data_dir": str(directory)})))
    found = []
    with app.test_request_context():
        for rule in app.url_map.iter_rules():
            if rule.endpoint.startswith("admin.") and rule.endpoint not in {
                "admin.static",
                "admin.login",
                "admin.log_in",
            }:
                values = {"job": "acme", "sequence": 1}
                address = rule.build({name: values[name] for name in rule.arguments})
                assert address is not None
                found += [(method, address[1]) for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}]
    return sorted(found)


def session_of(box: Appliance, password: str = PASSWORD) -> str:
    answer = http(box, "POST", "/admin/login", urlencode({"password": password}).encode(), {"Content-Type": FORM})
    assert answer.status == 302
    return str(answer.headers["Set-Cookie"]).partition(";")[0]


def csrf_of(box: Appliance, session: str) -> str:
    page = http(box, "GET", "/admin/", headers={"Cookie": session}).body.decode()
    found = re.search(r'name="csrf" value="([0-9a-f]{64})"', page)
    assert found
    return found[1]


def send(box: Appliance, path: str, headers: dict[str, str], **fields: str) -> Answer:
    return http(box, "POST", path, urlencode(fields).encode(), {"Content-Type": FORM, **headers})


# ---- every route


def test_the_routes_are_those_that_are_meant(tmp_path: Path) -> None:
    found = routes(tmp_path)
    assert {f"/admin{path}" for path in PATHS} <= {path for method, path in found if method == "GET"}
    assert [path for method, path in found if method == "POST"] == [
        "/admin/exports/probe",
        "/admin/exports/retry",
        "/admin/exports/run",
        "/admin/exports/verify",
        "/admin/logout",
    ]


@pytest.mark.parametrize(
    "headers", [{}, {"Cookie": "appliance=eyJhZG1pbiI6IngifQ.x.y"}, {"Authorization": "Bearer x"}], ids=str
)
def test_no_route_opens_without_a_session(house: Windows, tmp_path: Path, headers: dict[str, str]) -> None:
    for method, path in routes(tmp_path):
        answer = http(house.box, method, path, headers=headers)
        assert answer.status == (302 if method == "GET" else 303), path
        assert answer.headers["Location"] == "/admin/login"
        assert answer.headers["Cache-Control"] == "no-store"
        assert b"shop" not in answer.body


def test_an_address_that_leads_nowhere_says_the_same_to_a_stranger_whatever_it_is(house: Windows) -> None:
    for path in ("/admin/nothing", "/admin/exports/acme/x", "/admin/.git/config"):
        assert http(house.box, "GET", path).status == 404
        assert b"shop" not in http(house.box, "GET", path).body


def test_every_page_opens_to_a_script_with_the_token(house: Windows) -> None:
    for path in PATHS:
        assert 'name="csrf"' not in house.get(path) or path == "/exports"


# ---- every form


def test_no_form_does_anything_without_the_token_of_its_own_session(house: Windows, tmp_path: Path) -> None:
    session = session_of(house.box)
    other = csrf_of(house.box, session_of(house.box))
    right = csrf_of(house.box, session)
    assert other != right
    before = house.execute("SELECT count(*) FROM export_runs")
    for method, path in routes(tmp_path):
        if method == "POST":
            for wrong in ("", other, right[:-1], right.upper(), "é"):
                answer = send(house.box, path, {"Cookie": session}, csrf=wrong, job="acme", bucket="acme")
                assert answer.status == 403, path
                assert b"Nothing was changed." in answer.body
            for site in ("cross-site", "same-site"):
                headers = {"Cookie": session, "Sec-Fetch-Site": site}
                assert send(house.box, path, headers, csrf=right, job="acme", bucket="acme").status == 403
    assert http(house.box, "GET", "/admin/", headers={"Cookie": session}).status == 200
    assert house.execute("SELECT count(*) FROM export_runs") == before


def test_forms_of_the_session_run_verify_and_probe_in_the_background(house: Windows) -> None:
    session = session_of(house.box)
    csrf = csrf_of(house.box, session)

    def ask(path: str, **fields: str) -> str:
        answer = send(house.box, f"/admin/exports/{path}", {"Cookie": session}, csrf=csrf, **fields)
        return f"{answer.status} {answer.headers['Location'] or ''}"

    assert ask("run", job="acme") == "303 /admin/exports?asked=run"
    done = "SELECT 1 FROM export_batches WHERE job = 'acme' AND state = 'settled'"
    wait_for(lambda: house.execute(done), "the job to have run")
    assert ask("verify", job="acme") == "303 /admin/exports?asked=verify"
    assert ask("probe", bucket="acme") == "303 /admin/exports?asked=probe"
    wait_for(lambda: "nothing found wrong" in house.get("/exports"), "the verdict")
    wait_for(lambda: "listing, writing, reading, finding, deleting: works" in house.get("/exports"), "the probe")
    assert "settled" not in house.get("/exports/acme")
    assert "delivered" in house.get("/exports/acme/1")
    for path, fields in (("run", {"job": "x"}), ("retry", {"job": "\x00"}), ("verify", {}), ("probe", {"bucket": "x"})):
        assert ask(path, **fields).startswith("404")


def test_retry_tries_a_resting_bucket_at_once(house: Windows) -> None:
    house.post("/exports/run", job="everything")
    failed = "SELECT failures FROM export_deliveries WHERE bucket = 'vault' AND retry_at IS NOT NULL"
    wait_for(lambda: house.execute(failed), "the bucket to rest")
    ended = "SELECT 1 FROM export_leases WHERE job = 'everything'"
    wait_for(lambda: not house.execute(ended), "the run to end")
    house.execute("UPDATE export_deliveries SET retry_at = now() + interval '1 hour' WHERE retry_at IS NOT NULL")
    (house.box.directory / "nas").mkdir()
    assert house.post("/exports/retry", job="everything", bucket="vault") == 303
    wait_for(
        lambda: house.execute("SELECT 1 FROM export_deliveries WHERE bucket = 'vault' AND state = 'delivered'"),
        "the bucket to get its batch",
    )


# ---- what the pages say of the state of things


def test_install_says_what_stands_in_the_way_of_each_site(house: Windows) -> None:
    house.send({"eventType": "x", "siteId": "blog"}, origin="https://staging.example.com", status=403)
    house.send({"eventType": "x", "siteId": "dosc"}, status=403)
    wait_for(lambda: len(house.execute("SELECT 1 FROM quarantine")) >= 2, "what was refused to be kept")
    blog, docs = (section.partition("</section>")[0] for section in house.get("/install").split("<section")[2:4])
    assert "(https://staging.example.com)" in blog
    assert "Add the address of those pages to origins of [[sites]] blog" in blog
    assert "No event of this site has arrived yet." in docs
    assert "Events came for dosc, which no one configured." in docs
    assert f"{house.box.url}/tracking.js" in docs


def test_the_configuration_page_tells_sources_and_no_secret(house: Windows) -> None:
    page = house.get("/configuration")
    assert "[buckets.cloud]" in page
    assert "https://s3.example.com" in page
    assert page.count("set, not shown") >= 4
    for secret in ("a-secret-that-no-page-shows", "AKIAEXAMPLE", TOKEN, "pässword", "dbname=access"):
        assert secret not in page


# ---- the cookie and the password


def test_the_cookie_stays_on_tls_where_it_came_by_tls(house: Windows) -> None:
    body = urlencode({"password": PASSWORD}).encode()
    for headers, secure in (({}, False), ({"X-Forwarded-Proto": "https"}, True)):
        answer = http(house.box, "POST", "/admin/login", body, {"Content-Type": FORM, **headers})
        cookie = SimpleCookie(str(answer.headers["Set-Cookie"]))["appliance"]
        assert bool(cookie["secure"]) is secure
        assert cookie["httponly"]
        assert cookie["samesite"] == "Strict"


def test_a_password_may_be_kept_as_the_hash_that_the_command_prints(
    appliance: Callable[..., Appliance], conninfo: str
) -> None:
    box = appliance(database={"url": conninfo})
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "hash-password"],
        input=f"{PASSWORD}\n",
        capture_output=True,
        text=True,
        check=True,
    )
    made = done.stdout.strip()
    assert made.startswith("scrypt:")
    box.config["admin"] = {"password": made}
    box.start()
    session = session_of(box)
    assert http(box, "GET", "/admin/", headers={"Cookie": session}).status == 200
    for wrong in (made, PASSWORD[:-1], ""):
        body = urlencode({"password": wrong}).encode()
        assert http(box, "POST", "/admin/login", body, {"Content-Type": FORM}).status == 401
    assert made not in box.log


def test_something_that_begins_like_a_hash_and_is_none_is_refused(appliance: Callable[..., Appliance]) -> None:
    done = appliance(admin={"password": "scrypt:32768:8:1$salt"}).run("check", check=False)
    assert done.returncode == 2
    assert "config.toml: admin.password: it begins like a hash and is none" in done.stderr
    assert "salt" not in done.stderr


# ---- streams


def open_stream(box: Appliance, session: str, query: str = "") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", box.port), timeout=15)
    request = f"GET /admin/live/events{query} HTTP/1.1\r\nHost: x\r\nCookie: {session}\r\n\r\n"
    connection.sendall(request.encode())
    return connection


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    found = b""
    while mark not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


def read_to_the_end(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"0\r\n\r\n") and (part := connection.recv(65536)):
        found += part
    return found


def test_streams_are_few_bring_what_is_asked_for_and_end_with_their_session_and_the_appliance(
    appliance: Callable[..., Appliance], conninfo: str
) -> None:
    box = appliance(database={"url": conninfo}, admin={"password": PASSWORD, "token": TOKEN}).start()
    session = session_of(box)
    streams = [open_stream(box, session, "?site=shop&type=view") for _ in range(MAX_STREAMS)]
    for stream in streams:
        head = read_until(stream, b": hello")
        assert b" 200 OK" in head
        assert b"text/event-stream" in head
    with open_stream(box, session) as one_too_many:
        assert b" 503 " in read_until(one_too_many, b"\r\n\r\n")
    sent = [
        {"eventType": kind, "siteId": site} for kind, site in (("click", "shop"), ("view", "blog"), ("view", "shop"))
    ]
    assert http(box, "POST", "/collect", json.dumps(sent).encode(), {"Content-Type": "text/plain"}).status == 200
    for stream in streams:
        told = read_until(stream, b'"type": "view"')
        assert b'"site": "shop"' in told
        assert b"click" not in told
        assert b"blog" not in told
    send(box, "/admin/logout", {"Cookie": session}, csrf=csrf_of(box, session))
    for stream in streams:
        read_to_the_end(stream)
        stream.close()
    again = open_stream(box, session_of(box))
    read_until(again, b": hello")
    assert box.stop() == 0
    read_to_the_end(again)
    again.close()
    assert "worker stopped" in box.log
