"""Who may send, on the real server: how often, from which pages, for which sites, and whether the visitor wants it."""

import json
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from conftest import Answer, Appliance, Collector, http, running, wait_for

from appliance.store.embedded import EmbeddedPostgres

SHOP = "https://shop.example.com"
PROXY = "127.0.0.2"
# One for each test, since they are limited too.
SITES = [f"site{n}" for n in range(20)]
# One request a second and ten at once; for a site five a second and fifty at once.
RATES = {"requests_per_minute_per_address": 60, "requests_per_minute_per_site": 300}
unused_sites = iter(SITES)
BURST = 10
SITE_BURST = 50


@pytest.fixture
def visitor() -> str:
    """A visitor of the test's own, to find its rows by."""
    return uuid4().hex


@pytest.fixture
def site() -> str:
    """A site of the test's own, whose rate no other test uses up."""
    return next(unused_sites)


def event(visitor: str = "v", **fields: Any) -> dict[str, Any]:
    return {"eventType": "pageview", "siteId": "shop", "visitorId": visitor, **fields}


def new_database(postgres: EmbeddedPostgres) -> str:
    name = f"senders_{uuid4().hex}"
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template_of_tests")
    return psycopg.conninfo.make_conninfo(postgres.conninfo, dbname=name)


def send(box: Appliance, payload: Any, *, source: str = "127.0.0.1", **headers: str) -> Answer:
    """Post as JSON; the underscores of a header's name are hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps(payload).encode()
    return http(box, "POST", "/collect", body, {"Content-Type": "application/json", **named}, source=source)


def send_from(box: Appliance, address: str, payload: Any, **headers: str) -> Answer:
    """Post as a visitor of that address behind the proxy that is trusted."""
    return send(box, payload, source=PROXY, X_Forwarded_For=address, **headers)


# ---- how often


@pytest.fixture(scope="module")
def limited(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    url = new_database(postgres)
    sites = [{"id": name, "origins": [SHOP]} for name in SITES] + [{"id": "short", "ip": "truncate", "origins": [SHOP]}]
    config = {
        "database": {"url": url},
        "collect": RATES,
        "sites": sites,
        "server": {"trusted_proxies": [f"{PROXY}/32"]},
    }
    with (
        running(tmp_path_factory.mktemp("limited"), **config) as box,
        psycopg.connect(url, autocommit=True) as connection,
    ):
        yield Collector(box, connection)


def use_up(box: Appliance, address: str, site: str, **headers: str) -> Answer:
    """Send as one address until it is too often, and return that answer."""
    passed = 0
    while (answer := send_from(box, address, event(siteId=site), **headers)).status == 200:
        passed += 1
        # A slow machine lets more of them through in the meantime.
        assert passed < BURST * 4
    assert passed >= BURST
    return answer


def test_who_comes_too_often_hears_when_to_come_again_and_then_may(limited: Collector, site: str) -> None:
    answer = use_up(limited.box, "203.0.113.1", site, Origin=SHOP)
    assert answer.status == 429
    assert "too many requests" in answer.json["error"]
    seconds = int(answer.headers["Retry-After"])
    assert 1 <= seconds <= 2
    assert answer.headers["Access-Control-Allow-Origin"] == SHOP
    assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After"
    time.sleep(seconds)
    assert send_from(limited.box, "203.0.113.1", event(siteId=site)).status == 200


def test_what_comes_too_often_is_not_stored(limited: Collector, site: str, visitor: str) -> None:
    use_up(limited.box, "203.0.113.2", site)
    statuses = [send_from(limited.box, "203.0.113.2", event(visitor, siteId=site)).status for _ in range(5)]
    assert 429 in statuses
    assert len(limited.rows(visitor)) == statuses.count(200)


def test_others_are_not_held_up_by_one_who_comes_too_often(limited: Collector, site: str) -> None:
    use_up(limited.box, "203.0.113.3", site)
    assert [send_from(limited.box, f"203.0.113.{n}", event(siteId=site)).status for n in range(100, 120)] == [200] * 20


def test_a_household_of_ipv6_counts_as_one(limited: Collector, site: str) -> None:
    use_up(limited.box, "2001:db8:1:2::1", site)
    statuses = [send_from(limited.box, f"2001:db8:1:2:{n}::1", event(siteId=site)).status for n in range(1, 6)]
    assert 429 in statuses
    assert send_from(limited.box, "2001:db8:1:3::1", event(siteId=site)).status == 200


def test_what_a_visitor_writes_before_its_own_address_gives_it_no_new_one(limited: Collector, site: str) -> None:
    use_up(limited.box, "203.0.113.4", site)
    statuses = [send_from(limited.box, f"198.51.100.{n}, 203.0.113.4", event(siteId=site)).status for n in range(5)]
    assert 429 in statuses


def test_an_address_in_forwarded_counts_like_one_in_x_forwarded_for(limited: Collector, site: str) -> None:
    use_up(limited.box, "203.0.113.5", site)
    by_rfc_7239 = [
        send(limited.box, event(siteId=site), source=PROXY, Forwarded="for=203.0.113.5").status for _ in range(5)
    ]
    assert 429 in by_rfc_7239


def test_looks_at_the_pixel_count_too(limited: Collector, site: str) -> None:
    use_up(limited.box, "203.0.113.6", site)
    headers = {"X-Forwarded-For": "203.0.113.6"}
    answers = [http(limited.box, "GET", f"/pixel.gif?site={site}", headers=headers, source=PROXY) for _ in range(5)]
    late = [answer for answer in answers if answer.status == 429]
    assert late
    assert late[0].headers["Retry-After"]
    assert late[0].headers["Cache-Control"] == "no-store"


def test_a_local_peer_has_no_limit_and_the_log_names_the_option_once(limited: Collector, site: str) -> None:
    for n in range(BURST * 3):
        assert send(limited.box, event(siteId=site), X_Forwarded_For=f"198.51.100.{n}").status == 200
    warnings = [line for line in limited.box.log.splitlines() if "trusted_proxies" in line]
    assert len(warnings) == 1
    assert "WARNING" in warnings[0]
    assert "127.0.0.1" in warnings[0]
    assert "198.51.100." not in limited.box.log


def test_a_site_that_gets_too_much_holds_up_itself_alone_and_nothing_of_a_mixed_request_is_stored(
    limited: Collector, site: str, visitor: str
) -> None:
    for n in range(SITE_BURST * 4):
        answer = send_from(limited.box, f"192.0.2.{n % 250}", event(siteId=site))
        if answer.status == 429:
            break
    assert answer.status == 429
    assert "of this site" in answer.json["error"]
    assert int(answer.headers["Retry-After"]) >= 1
    assert send_from(limited.box, "198.51.100.200", event(siteId="site19")).status == 200

    def mixed() -> bool:
        both = [event(visitor, siteId="site19"), event(visitor, siteId=site)]
        before = len(limited.rows(visitor))
        mixed_answer = send_from(limited.box, f"2001:db8:{uuid4().hex[:4]}::1", both)
        assert len(limited.rows(visitor)) - before == (2 if mixed_answer.status == 200 else 0)
        return mixed_answer.status == 429

    wait_for(mixed, "a mixed request that is refused")


def test_what_is_refused_for_its_rate_is_counted(limited: Collector, site: str) -> None:
    use_up(limited.box, "203.0.113.7", site)

    def counted() -> Any:
        return limited.conn.execute("SELECT sum(number) FROM refusal_counts WHERE kind = 'address rate'").fetchone()

    assert wait_for(lambda: counted() != (None,), "the counts")


def test_an_address_is_cut_before_it_reaches_the_spool(
    limited: Collector, postgres: EmbeddedPostgres, visitor: str
) -> None:
    name = limited.conn.info.dbname
    with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
            (name, limited.conn.info.backend_pid),
        )
        answer = send_from(limited.box, "203.0.113.88", event(visitor, siteId="short"))
        spooled = b"".join(path.read_bytes() for path in (limited.box.data_dir / "spool").iterdir())
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert answer.status == 202
    assert visitor.encode() in spooled
    assert b"203.0.113.0" in spooled
    assert b"203.0.113.88" not in spooled
    wait_for(lambda: limited.rows(visitor), "the spool to be drained")
    assert [str(row["ip_address"]) for row in limited.rows(visitor)] == ["203.0.113.0"]
    assert "203.0.113." not in limited.box.log


# ---- from which pages, and for whom

MAY_SEND: dict[str, tuple[str, dict[str, str], int, int]] = {
    "a page where one must be named": ("strict", {"Origin": "https://strict.example.com"}, 200, 1),
    "none where one must be named": ("strict", {}, 403, 0),
    "another where one must be named": ("strict", {"Origin": SHOP}, 403, 0),
    "a visitor who wants no tracking": ("polite", {"DNT": "1"}, 200, 0),
    "a visitor who wants no tracking, by another name": ("polite", {"Sec-GPC": "1"}, 200, 0),
    "a visitor who has said no to both": ("polite", {"DNT": "0", "Sec-GPC": "0"}, 200, 1),
    "a visitor who says something else": ("polite", {"DNT": "true"}, 200, 1),
    "a visitor whose wish the site does not honor": ("shop", {"DNT": "1"}, 200, 1),
    "a stranger who wants no tracking": ("polite", {"DNT": "1", "Origin": SHOP}, 403, 0),
}


@pytest.mark.parametrize("sender", MAY_SEND.values(), ids=MAY_SEND)
def test_a_site_says_whom_it_takes_events_from(
    collector: Collector, visitor: str, sender: tuple[str, dict[str, str], int, int]
) -> None:
    site, headers, status, rows = sender
    for shape in (event(visitor, siteId=site), {"eventType": "batch", "siteId": site, "events": [event(visitor)]}):
        answer = collector.post({**shape, "events": [event(visitor, siteId=site)]}, headers=headers)
        assert answer.status == status
        assert "Origin" in answer.headers["Vary"]
    assert len(collector.rows(visitor)) == rows * 2


def test_an_event_that_a_visitor_does_not_want_counted_costs_those_of_other_sites_nothing(
    collector: Collector, visitor: str
) -> None:
    answer = collector.post([event(visitor), event(visitor, siteId="polite")], headers={"DNT": "1"})
    assert (answer.status, answer.json["accepted"]) == (200, 1)
    (rejection,) = answer.json["rejected"]
    assert rejection["index"] == 1
    assert "DNT" in rejection["reason"]
    assert [row["site_id"] for row in collector.rows(visitor)] == ["shop"]


def test_events_that_visitors_do_not_want_counted_are_counted_as_refused(collector: Collector) -> None:
    assert collector.post(event(siteId="polite"), headers={"DNT": "1"}).json["accepted"] == 0

    def noted() -> Any:
        return collector.conn.execute(
            "SELECT content FROM quarantine WHERE kind = 'dnt' AND site_id = 'polite' LIMIT 1"
        ).fetchone()

    assert wait_for(noted, "the quarantine") == (None,)


# ---- for which sites


@pytest.fixture(scope="module")
def unconfigured(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """An appliance without sites that has taken in as many as it does."""
    url = new_database(postgres)
    with (
        running(tmp_path_factory.mktemp("unconfigured"), database={"url": url}) as box,
        psycopg.connect(url, autocommit=True) as connection,
    ):
        assert send(box, [event("all", siteId=f"s{n}") for n in range(100)]).json["accepted"] == 100
        yield Collector(box, connection)


def assert_full(box: Collector, visitor: str) -> None:
    """Check that those that have sent may go on, and that no other may begin."""
    answer = box.post(event(visitor, siteId="one-more"))
    assert answer.status == 403
    assert "[[sites]]" in answer.json["error"]
    assert http(box.box, "GET", "/pixel.gif?site=another").status == 403
    mixed = box.post([event(visitor, siteId="s99"), event(visitor, siteId="a-third")])
    assert (mixed.status, mixed.json["accepted"]) == (200, 1)
    assert [rejection["index"] for rejection in mixed.json["rejected"]] == [1]
    assert [row["site_id"] for row in box.rows(visitor)] == ["s99"]


def test_without_sites_a_hundred_are_taken_in_and_no_more(unconfigured: Collector, visitor: str) -> None:
    assert_full(unconfigured, visitor)


def test_sites_that_were_turned_away_are_no_names_in_the_counts(unconfigured: Collector) -> None:
    for n in range(50):
        assert unconfigured.post(event(siteId=f"invented-{n}")).status == 403

    def counted() -> list[tuple[str]]:
        return unconfigured.conn.execute("SELECT site_id FROM refusal_counts WHERE kind = 'site'").fetchall()

    wait_for(counted, "the counts")
    assert set(counted()) == {("",)}


def test_origins_beyond_ascii_and_absurd_ones_are_answered_where_all_are_allowed(
    unconfigured: Collector, visitor: str
) -> None:
    for origin in ("https://ex\xe4mple.com", "null", "x" * 5_000, "https://a, https://b", ""):
        answer = unconfigured.post(event(visitor, siteId="s1"), headers={"Origin": origin})
        assert answer.status == 200
        assert answer.headers["Access-Control-Allow-Origin"] == (origin or None)
    assert len(unconfigured.rows(visitor)) == 5


def test_after_a_restart_the_same_sites_may_go_on_and_no_others(unconfigured: Collector, visitor: str) -> None:
    unconfigured.box.stop()
    unconfigured.box.start()
    assert_full(unconfigured, visitor)
