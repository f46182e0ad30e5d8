"""Who may send: the sites' origins, a hundred sites that nobody configured, rates, and the visitor's own wish."""

import logging
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import pytest
from conftest import make_settings

from appliance.collect.admission import MAX_UNCONFIGURED_SITES, Admission, Sender

SHOP = "https://shop.example.com"
SITES: list[dict[str, Any]] = [
    {"id": "shop", "origins": [SHOP, "https://m.example.com:8443"]},
    {"id": "blog", "origins": ["https://blog.example.com"]},
    {"id": "strict", "origins": [SHOP], "require_origin": True},
    {"id": "polite", "origins": ["https://polite.example.com"], "honor_dnt": True},
]
OPEN: dict[str, Any] = {"id": "open"}


def admission(*sites: dict[str, Any], demo: bool = False, rates: Any = None) -> Admission:
    return Admission(make_settings(sites=list(sites), collect=rates or {}, server={"demo": demo}))


def sender(origin: str | None = None, *, address: str = "192.0.2.1", no_tracking: bool = False) -> Sender:
    return Sender(address=ip_address(address), origin=origin, wants_no_tracking=no_tracking)


# ---- origins

MAY_SEND: dict[str, tuple[str, str | None, bool, str | None]] = {
    "a page of the site": ("shop", SHOP, False, None),
    "a page of the site in capitals": ("shop", SHOP.upper(), False, None),
    "a page at the site's other port": ("shop", "https://m.example.com:8443", False, None),
    "a program": ("shop", None, False, None),
    "a page of another site": ("blog", SHOP, False, "origin"),
    "a page at another port": ("shop", "https://m.example.com", False, "origin"),
    "a page without encryption": ("shop", "http://shop.example.com", False, "origin"),
    "a page in a subdomain": ("shop", "https://x.shop.example.com", False, "origin"),
    "a page with a path": ("shop", f"{SHOP}/", False, "origin"),
    "a page of a host that only begins so": ("shop", f"{SHOP}.evil.example", False, "origin"),
    "a page that hides itself": ("shop", "null", False, "origin"),
    "a star": ("shop", "*", False, "origin"),
    "an empty origin": ("shop", "", False, "origin"),
    "a program where a page must send": ("strict", None, False, "origin"),
    "a page where a page must send": ("strict", SHOP, False, None),
    "a site that nobody configured": ("nowhere", SHOP, False, "site"),
    "a site in capitals": ("SHOP", SHOP, False, "site"),
    "an empty site": ("", None, False, "site"),
    "a visitor who wants no tracking": ("polite", "https://polite.example.com", True, "dnt"),
    "a program that wants no tracking": ("polite", None, True, "dnt"),
    "a stranger who wants no tracking": ("polite", SHOP, True, "origin"),
    "a visitor whose wish the site does not honor": ("shop", SHOP, True, None),
}


@pytest.mark.parametrize(("site", "origin", "no_tracking", "refused"), MAY_SEND.values(), ids=MAY_SEND)
def test_a_site_says_who_may_send_for_it(
    site: str, origin: str | None, refused: str | None, *, no_tracking: bool
) -> None:
    refusal = admission(*SITES).refusal(site, sender(origin, no_tracking=no_tracking))
    assert (refusal and refusal.kind) == refused
    if refusal:
        assert refusal.status == (200 if refused == "dnt" else 403)
        assert refusal.reason
        assert refusal.retry_after_seconds is None


@pytest.mark.parametrize("origin", ["https://any.example", "null", "", None])
def test_a_site_without_origins_takes_events_from_everywhere(origin: str | None) -> None:
    assert admission(OPEN).refusal("open", sender(origin)) is None


CORS: dict[str, tuple[list[dict[str, Any]], str, bool]] = {
    "an origin of one site": (SITES, SHOP, True),
    "an origin of another": (SITES, "https://blog.example.com", True),
    "one in capitals": (SITES, "HTTPS://BLOG.EXAMPLE.COM", True),
    "a stranger's": (SITES, "https://evil.example", False),
    "null": (SITES, "null", False),
    "a stranger's where one site has no origins": ([*SITES, OPEN], "https://evil.example", True),
    "any without sites": ([], "https://evil.example", True),
}


@pytest.mark.parametrize(("sites", "origin", "allowed"), CORS.values(), ids=CORS)
def test_browsers_are_told_yes_for_the_origins_of_the_sites_alone(
    sites: list[dict[str, Any]], origin: str, *, allowed: bool
) -> None:
    assert admission(*sites).allows_pages_of(origin) is allowed


def test_the_demo_site_is_known_where_sites_are_configured_and_the_demo_is_on() -> None:
    assert admission(*SITES, demo=True).refusal("demo", sender("https://any.example")) is None
    assert admission(*SITES).refusal("demo", sender()) is not None


# ---- what may stand in the quarantine

KEPT: dict[str, tuple[list[dict[str, Any]], str | None, str | None, bool, bool]] = {
    "of a page of the site": (SITES, "shop", SHOP, False, True),
    "of a program": (SITES, "shop", None, False, True),
    "of a page of another site": (SITES, "blog", SHOP, False, False),
    "of a stranger": (SITES, "shop", "https://evil.example", False, False),
    "of a program where a page must send": (SITES, "strict", None, False, False),
    "of a visitor who wants no tracking": (SITES, "polite", None, True, False),
    "of a visitor whose wish the site does not honor": (SITES, "shop", SHOP, True, True),
    "without a site, of a page of some site": (SITES, None, SHOP, False, True),
    "without a site, of a program": (SITES, None, None, False, True),
    "without a site, of a stranger": (SITES, None, "https://evil.example", False, False),
    "without a site, of a program that wants no tracking": (SITES, None, None, True, False),
    "without a site, of a visitor whom the sites do not honor": (SITES, None, SHOP, True, True),
    "of an unknown site, of a stranger": (SITES, "nowhere", "https://evil.example", False, False),
    "of an unknown site, of a page": (SITES, "nowhere", SHOP, False, True),
    "of anybody where nothing is configured": ([], "any", "https://evil.example", True, True),
}


@pytest.mark.parametrize(("sites", "site", "origin", "no_tracking", "kept"), KEPT.values(), ids=KEPT)
def test_the_content_of_what_is_refused_is_kept_only_of_those_who_may_send(
    sites: list[dict[str, Any]], site: str | None, origin: str | None, *, no_tracking: bool, kept: bool
) -> None:
    assert admission(*sites).may_be_kept(sender(origin, no_tracking=no_tracking), site) is kept


# ---- sites that nobody configured


def test_without_configured_sites_a_hundred_are_taken_in_and_may_go_on() -> None:
    one = admission()
    one.remember_sites([])
    for n in range(MAX_UNCONFIGURED_SITES):
        assert one.refusal(f"s{n}", sender()) is None
    refusal = one.refusal("one-more", sender())
    assert refusal is not None
    assert (refusal.kind, refusal.status) == ("site", 403)
    assert "[[sites]]" in refusal.reason
    assert one.refusal("s0", sender()) is None
    assert one.knows("s99")
    assert not one.knows("one-more")


def test_after_a_restart_those_that_have_sent_may_go_on_and_count() -> None:
    one = admission()
    one.remember_sites(f"old{n}" for n in range(MAX_UNCONFIGURED_SITES - 1))
    assert one.refusal("new", sender()) is None
    assert one.refusal("newer", sender()) is not None
    assert one.refusal("old0", sender()) is None


def test_until_the_database_tells_which_sites_there_are_the_one_after_a_hundred_is_asked_to_come_again() -> None:
    one = admission()
    for n in range(MAX_UNCONFIGURED_SITES):
        assert one.refusal(f"invented{n}", sender()) is None
    refusal = one.refusal("old", sender())
    assert refusal is not None
    assert (refusal.status, refusal.retry_after_seconds) == (503, 60)
    one.remember_sites(["old"])
    assert one.refusal("old", sender()) is None
    refusal = one.refusal("invented-too", sender())
    assert refusal is not None
    assert refusal.status == 403


def test_more_sites_than_a_hundred_in_the_database_may_all_go_on() -> None:
    one = admission()
    one.remember_sites(f"old{n}" for n in range(150))
    assert one.refusal("old149", sender()) is None
    assert one.refusal("new", sender()) is not None


def test_many_threads_take_in_a_hundred_sites_and_not_one_more() -> None:
    one = admission()
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda n: one.refusal(f"s{n}", sender()) is None, range(500)))
    assert sum(taken) == MAX_UNCONFIGURED_SITES


def test_what_the_database_remembers_opens_no_site_where_sites_are_configured() -> None:
    one = admission(*SITES)
    one.remember_sites(["former"])
    refusal = one.refusal("former", sender())
    assert refusal is not None
    assert refusal.kind == "site"


# ---- rates


def too_often(one: Admission, address: str | None) -> bool:
    return one.too_often(ip_address(address) if address else None) is not None


RATES = {"requests_per_minute_per_address": 12, "requests_per_minute_per_site": 18}


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_an_address_that_comes_too_often_hears_when_to_come_again(address: str) -> None:
    one = admission(rates=RATES)
    assert [too_often(one, address) for _ in range(3)] == [False, False, True]
    refusal = one.too_often(ip_address(address))
    assert refusal is not None
    assert (refusal.kind, refusal.status) == ("address rate", 429)
    assert refusal.retry_after_seconds in {4, 5}


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "::1", "fd00::1", "fe80::1", None])
def test_local_peers_have_no_limit(address: str | None) -> None:
    one = admission(rates=RATES)
    assert not any(too_often(one, address) for _ in range(100))


def test_the_addresses_of_a_household_are_limited_together_and_others_are_not() -> None:
    one = admission(rates=RATES)
    assert [too_often(one, f"2001:db8:1:2::{n}") for n in range(1, 4)] == [False, False, True]
    assert not too_often(one, "2001:db8:1:3::1")
    assert not too_often(one, "192.0.2.1")


def test_a_site_that_is_sent_to_too_often_takes_nothing_from_the_others() -> None:
    one = admission(*SITES, rates=RATES)
    for n in range(3):
        assert one.refusal("shop", sender(address=f"192.0.2.{n}")) is None
    refusal = one.refusal("shop", sender(address="192.0.2.9"))
    assert refusal is not None
    assert (refusal.kind, refusal.status) == ("site rate", 429)
    assert refusal.retry_after_seconds in {3, 4}
    assert one.refusal("blog", sender(address="192.0.2.9")) is None


def test_what_is_refused_for_other_reasons_uses_up_no_rate_of_the_site() -> None:
    one = admission(*SITES, rates=RATES)
    for _ in range(100):
        assert one.refusal("shop", sender("https://evil.example")) is not None
        assert one.refusal("polite", sender(no_tracking=True)) is not None
    assert one.refusal("shop", sender()) is None
    assert one.refusal("polite", sender()) is None


# ---- the proxy that nobody named


def test_a_proxy_that_is_not_configured_is_named_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    one = admission()
    assert one.proxy is None
    with caplog.at_level(logging.WARNING):
        for address in ("172.17.0.1", "172.17.0.1", "10.0.0.9"):
            one.note_proxy(ip_address(address))
    (record,) = caplog.records
    assert "172.17.0.1" in record.getMessage()
    assert "server.trusted_proxies" in record.getMessage()
    assert one.proxy == "172.17.0.1"
