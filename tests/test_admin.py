"""The windows: who may look in, what a hostile visitor can do to who looks, and what health checks say."""

import json
import re
from collections.abc import Callable, Iterator
from http.cookies import SimpleCookie
from urllib.parse import urlencode
from uuid import uuid4

import psycopg
import pytest
from conftest import Answer, Appliance, Collector, http, running, wait_for

from appliance.admin.auth import session_key
from appliance.store.embedded import EmbeddedPostgres

PASSWORD = "pässword & more"
TOKEN = "token-of-a-script"


@pytest.fixture(scope="module")
def box(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """An appliance with a password and a token, on a database that holds what hostile visitors sent."""
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute("CREATE DATABASE windows TEMPLATE template_of_tests")
    url = psycopg.conninfo.make_conninfo(postgres.conninfo, dbname="windows")
    with running(
        tmp_path_factory.mktemp("admin"), database={"url": url}, admin={"password": PASSWORD, "token": TOKEN}
    ) as one:
        yield one


def log_in(box: Appliance, password: str = PASSWORD, *, by_proxy_for: str | None = None) -> Answer:
    """Send the login form; the proxy of these tests speaks from 127.0.0.2."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    if by_proxy_for:
        headers["X-Forwarded-For"] = by_proxy_for
    source = "127.0.0.2" if by_proxy_for else "127.0.0.1"
    return http(box, "POST", "/admin/login", urlencode({"password": password}).encode(), headers, source=source)


def csrf_of(box: Appliance, session: str) -> str:
    """Return what the forms of a session hold."""
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', status_page(box, Cookie=session).body.decode())
    return found[1] if found else ""


def send_form(box: Appliance, path: str, headers: dict[str, str], **fields: str) -> Answer:
    headers = {"Content-Type": "application/x-www-form-urlencoded", **headers}
    return http(box, "POST", path, urlencode(fields).encode(), headers)


def log_out(box: Appliance, session: str = "") -> Answer:
    return send_form(box, "/admin/logout", {"Cookie": session}, csrf=csrf_of(box, session))


def cookie_of(answer: Answer) -> str:
    return str(answer.headers["Set-Cookie"]).partition(";")[0]


def status_page(box: Appliance, **headers: str) -> Answer:
    return http(box, "GET", "/admin/", headers=headers)


# ---- off


def test_the_admin_page_is_off_until_a_password_or_token_is_set(collector: Collector) -> None:
    page = status_page(collector.box)
    assert page.status == 404
    assert b"admin.password" in page.body
    assert b"Events in" not in page.body
    for headers in ({"Authorization": "Bearer "}, {"Authorization": "Bearer"}, {"Cookie": "appliance=x"}):
        assert status_page(collector.box, **headers).status == 404


@pytest.mark.parametrize("password", ["", "admin", "None"])
def test_no_password_opens_an_admin_page_that_is_off(collector: Collector, password: str) -> None:
    answer = log_in(collector.box, password)
    assert answer.status in {401, 404}
    assert answer.headers["Set-Cookie"] is None


def test_the_demo_is_off_until_it_is_turned_on(collector: Collector) -> None:
    assert [http(collector.box, "GET", path).status for path in ("/demo/", "/demo/contact", "/demo/prices.csv")] == [
        404
    ] * 3
    assert http(collector.box, "GET", "/").headers["Location"] == "/admin/"


# ---- who may look in


def test_the_password_opens_the_page_until_logging_out(box: Appliance) -> None:
    assert status_page(box).headers["Location"] == "/admin/login"
    opened = log_in(box)
    assert (opened.status, opened.headers["Location"]) == (302, "/admin/")
    page = status_page(box, Cookie=cookie_of(opened))
    assert page.status == 200
    assert b"Events in" in page.body
    closed = log_out(box, cookie_of(opened))
    assert closed.headers["Location"] == "/admin/login"
    assert status_page(box, Cookie=cookie_of(closed)).status == 302


def test_logging_out_ends_copies_of_the_cookie_for_good(appliance: Callable[..., Appliance], conninfo: str) -> None:
    box = appliance(database={"url": conninfo}, admin={"password": PASSWORD}).start()
    first, second = cookie_of(log_in(box)), cookie_of(log_in(box))
    log_out(box, first)
    assert [status_page(box, Cookie=copy).status for copy in (first, second)] == [302, 302]
    third = cookie_of(log_in(box))
    box.stop()
    box.start()
    assert [status_page(box, Cookie=one).status for one in (first, second, third)] == [302, 302, 200]


def test_only_who_is_logged_in_can_log_out(box: Appliance) -> None:
    session = cookie_of(log_in(box))
    for stranger in ("", "appliance=x", session[:-1]):
        assert log_out(box, stranger).headers["Location"] == "/admin/login"
    assert status_page(box, Cookie=session).status == 200


def test_logging_out_holds_where_the_key_cannot_be_kept(appliance: Callable[..., Appliance], conninfo: str) -> None:
    box = appliance(database={"url": conninfo}, admin={"password": PASSWORD}).start()
    session = cookie_of(log_in(box))
    key = box.data_dir / "session.key"
    key.unlink()
    key.mkdir()
    assert log_out(box, session).status == 302
    assert status_page(box, Cookie=session).status == 302
    assert "session.key cannot be written" in box.log


def test_the_session_is_out_of_reach_of_scripts_and_other_sites(box: Appliance) -> None:
    cookie = SimpleCookie(str(log_in(box).headers["Set-Cookie"]))["appliance"]
    assert cookie["httponly"]
    assert cookie["samesite"] == "Strict"
    assert cookie["path"] == "/admin"


GUESSES = [
    "",
    PASSWORD[:-1],
    PASSWORD + " ",
    PASSWORD.upper(),
    TOKEN,
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
]


def test_a_wrong_password_opens_nothing(box: Appliance) -> None:
    for guess in GUESSES:
        answer = log_in(box, guess)
        assert answer.status == 401
        assert answer.headers["Set-Cookie"] is None
        assert b"not the password" in answer.body
    assert log_in(box).status == 302
    assert http(box, "POST", "/admin/login", b"x" * 10_000, {"Content-Type": "text/plain"}).status == 401


@pytest.mark.parametrize("typed", [b"p\xe4ssword", b"p%E4ssword", b"\xff\xfe", b"%ED%A0%80", b"\xed\xa0\x80"])
@pytest.mark.parametrize("form", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_a_password_that_is_no_utf_8_is_a_wrong_password(box: Appliance, form: str, typed: bytes) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="password"\r\n\r\n' + typed + b"\r\n--x--\r\n"
    body = part if form.startswith("multipart") else b"password=" + typed
    assert http(box, "POST", "/admin/login", body, {"Content-Type": form}).status == 401
    assert log_in(box).status == 302


def test_a_form_that_is_too_large_is_refused(box: Appliance) -> None:
    assert log_in(box, "x" * 100_000).status == 413


TOKENS = ["", "Bearer", "Bearer ", "Bearer x", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN]


@pytest.mark.parametrize("credentials", [*TOKENS, f"Bearer {PASSWORD}".encode().decode("latin-1")])
def test_a_wrong_token_opens_nothing(box: Appliance, credentials: str) -> None:
    assert status_page(box, Authorization=credentials).status == 302


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_the_token_opens_the_page_to_a_script(box: Appliance, scheme: str) -> None:
    assert status_page(box, Authorization=f"{scheme} {TOKEN}").status == 200


def test_a_token_in_the_address_opens_nothing(box: Appliance) -> None:
    assert http(box, "GET", f"/admin/?token={TOKEN}&password=x").status == 302


def test_a_cookie_that_somebody_made_up_or_changed_opens_nothing(box: Appliance) -> None:
    cookie = cookie_of(log_in(box))
    name, _, value = cookie.partition("=")
    payload, _, signature = value.partition(".")
    forgeries = ["x", payload, f"{payload}.", f"{payload}A.{signature}", value[::-1], "eyJhZG1pbiI6dHJ1ZX0.x.y"]
    for forged in forgeries:
        assert status_page(box, Cookie=f"{name}={forged}").status == 302
    assert status_page(box, Cookie=cookie).status == 200


def test_too_many_wrong_passwords_lock_the_form_for_right_ones_too(
    appliance: Callable[..., Appliance], conninfo: str
) -> None:
    box = appliance(database={"url": conninfo}, admin={"password": PASSWORD, "token": TOKEN}).start()
    session = cookie_of(log_in(box))
    assert [log_in(box, "guess").status for _ in range(12)] == [401] * 10 + [429] * 2
    locked = log_in(box)
    assert (locked.status, locked.headers["Set-Cookie"]) == (429, None)
    assert status_page(box, Cookie=session).status == 200
    assert status_page(box, Authorization=f"Bearer {TOKEN}").status == 200
    assert PASSWORD not in box.log
    assert "guess" not in box.log
    assert TOKEN not in box.log


def test_a_stranger_who_guesses_locks_out_no_one_else(appliance: Callable[..., Appliance], conninfo: str) -> None:
    server = {"trusted_proxies": ["127.0.0.2/32"]}
    box = appliance(server=server, database={"url": conninfo}, admin={"password": PASSWORD}).start()
    addresses = [f"2001:db8::{number}" for number in range(12)]
    assert [log_in(box, "guess", by_proxy_for=one).status for one in addresses] == [401] * 10 + [429] * 2
    assert log_in(box, by_proxy_for="2001:db8::ffff").status == 429
    assert log_in(box, by_proxy_for="2001:db8:0:1::1").status == 302
    assert log_in(box, by_proxy_for="192.0.2.1").status == 302
    assert log_in(box).status == 302


def test_an_address_that_a_stranger_makes_up_gives_no_more_guesses(
    appliance: Callable[..., Appliance], conninfo: str
) -> None:
    box = appliance(database={"url": conninfo}, admin={"password": PASSWORD}).start()
    made_up = [f"192.0.2.{number}" for number in range(12)]
    assert [log_in(box, "guess", by_proxy_for=one).status for one in made_up] == [401] * 10 + [429] * 2


def test_a_session_ends_with_its_password_and_outlives_a_restart(
    appliance: Callable[..., Appliance], conninfo: str
) -> None:
    box = appliance(database={"url": conninfo}, admin={"password": PASSWORD}).start()
    session = cookie_of(log_in(box))
    box.stop()
    assert status_page(box.start(), Cookie=session).status == 200
    box.stop()
    box.config["admin"] = {"password": "another password"}
    assert status_page(box.start(), Cookie=session).status == 302
    key = box.data_dir / "session.key"
    assert key.stat().st_mode & 0o077 == 0
    assert len(session_key(box.data_dir)) >= 32


def test_with_a_token_alone_no_password_opens_the_page(appliance: Callable[..., Appliance], conninfo: str) -> None:
    box = appliance(database={"url": conninfo}, admin={"token": TOKEN}).start()
    assert [log_in(box, guess).headers["Set-Cookie"] for guess in ("", TOKEN)] == [None, None]
    assert status_page(box).status == 401
    assert status_page(box, Authorization="Bearer ").status == 401
    assert status_page(box, Authorization=f"Bearer {TOKEN}").status == 200


# ---- what hostile visitors can do to who looks


def assert_harmless(answer: Answer) -> None:
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["form-action"] == "'self'"
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("host", ['x"><script>alert(1)</script>', "evil.example", "x:y", ""])
def test_a_hostile_host_header_cannot_write_into_the_page(box: Appliance, host: str) -> None:
    answer = status_page(box, Authorization=f"Bearer {TOKEN}", Host=host)
    assert answer.status in {200, 400}
    assert b"<script>alert" not in answer.body


def test_every_page_comes_with_the_headers_that_keep_it_harmless(box: Appliance, collector: Collector) -> None:
    pages = [status_page(box), http(box, "GET", "/admin/login"), log_in(box), status_page(collector.box)]
    for answer in [*pages, log_in(box, "wrong"), log_out(box)]:
        assert_harmless(answer)


def test_static_files_come_from_their_folder_alone(box: Appliance) -> None:
    assert http(box, "GET", "/admin/static/live.js").status == 200
    for path in ("../auth.py", "%2e%2e/auth.py", "..%2fauth.py", "..%5cauth.py", "%2fetc%2fpasswd", "live.js%00"):
        assert http(box, "GET", f"/admin/static/{path}").status in {308, 400, 404}


def test_the_page_counts_what_came_in_and_shows_what_it_was(appliance: Callable[..., Appliance], conninfo: str) -> None:
    box = appliance(database={"url": conninfo}, admin={"token": TOKEN}).start()

    def page(path: str) -> str:
        return http(box, "GET", path, headers={"Authorization": f"Bearer {TOKEN}"}).body.decode()

    assert "Nothing has come in yet." in page("/admin/")
    assert f"{box.url}/tracking.js" in page("/admin/install")
    sent = [{"eventType": "x", "siteId": "shop", "visitorId": uuid4().hex} for _ in range(7)]
    http(box, "POST", "/collect", json.dumps(sent).encode(), {"Content-Type": "text/plain"})
    assert '<span class="total">7</span>' in page("/admin/")
    assert "7 events came in during the last hour; 7 wait for their export." in page("/admin/")
    live = page("/admin/live")
    assert all(event["visitorId"] in live for event in sent)


def test_page_and_commands_warn_in_the_same_words(appliance: Callable[..., Appliance], conninfo: str) -> None:
    box = appliance(database={"url": conninfo}, admin={"token": TOKEN}).start()

    def page() -> str:
        return status_page(box, Authorization=f"Bearer {TOKEN}").body.decode()

    assert "No [[sites]] are configured: anybody can send events" in page()
    assert "no [[sites]] are configured: anybody can send events" in box.run("check").stdout
    with psycopg.connect(conninfo, application_name="forgotten") as dawdler:
        dawdler.execute("DELETE FROM events_log WHERE false")
        wait_for(lambda: "End that transaction" in page(), "the page to name the open transaction")
        for said in (page(), box.run("status").stdout):
            assert re.search(r"not exported for now: process \d+ \(forgotten\) has held .* s\. End that", said)


# ---- health


def test_a_healthy_appliance_is_live_and_ready(box: Appliance) -> None:
    for path in ("/health/live", "/health/ready"):
        answer = http(box, "GET", path)
        assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_with_the_database_down_it_lives_says_what_is_wrong_and_recovers(
    appliance: Callable[..., Appliance], postgres: EmbeddedPostgres, conninfo: str
) -> None:
    box = appliance(database={"url": conninfo}, admin={"password": PASSWORD, "token": TOKEN}).start()
    name = str(psycopg.conninfo.conninfo_to_dict(conninfo)["dbname"])
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        ready = http(box, "GET", "/health/ready")
        assert (ready.status, ready.json["status"]) == (200, "degraded")
        assert "the database does not answer" in ready.json["notes"]
        assert http(box, "GET", "/health/live").status == 200
        page = status_page(box, Authorization=f"Bearer {TOKEN}")
        assert page.status == 503
        assert_harmless(page)
        # Health checks are open to all: no address, user or database may stand there.
        assert not [word for word in (name, str(postgres.socket_dir)) if word in ready.body.decode()]
        assert log_in(box).status == 302
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    wait_for(box.ready, "the appliance to be ready again")
    assert status_page(box, Authorization=f"Bearer {TOKEN}").status == 200
