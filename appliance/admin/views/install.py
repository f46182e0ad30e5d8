"""Install: the snippet of each site, whether its events arrive, and what stands in the way."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from flask import Blueprint, render_template, request

from appliance.admin import filters
from appliance.admin.inside import House
from appliance.admin.sentences import KINDS
from appliance.admin.sessions import over_tls
from appliance.config import DEMO_SITE, Settings
from appliance.store import counters, quarantine
from appliance.store.counters import SiteCount
from appliance.store.quarantine import Kept, RefusalCount

_UNKNOWN_SITE = re.compile(r'no site "([A-Za-z0-9._-]{1,100})" is configured here')
_LOOKED_AT = 200
_SHOWN_SITES = 100

# What to do about each kind of refusal; {} is the site.
_ADVICE = {
    "origin": "Add the address of those pages to origins of [[sites]] {}, if they are yours.",
    "site": "Correct data-site in the snippet, or add the site under [[sites]].",
    "dnt": "Those visitors ask not to be tracked, and honor_dnt is on: this is as it should be.",
    "site rate": "Raise collect.requests_per_minute_per_site, if this is honest traffic.",
    "address rate": "One address sends too much. If it is your proxy, name it in server.trusted_proxies.",
    "event": "The events themselves are wrong: the Quarantine shows them.",
    "database": "The database did not take these events: the Quarantine shows them.",
    "body": "What was sent is no JSON that can be read: the Quarantine shows it.",
    "request": "Programs that look for weak spots send such requests, and browsers whose network breaks off.",
    "size": "Send less at once, or raise collect.max_body_bytes and collect.max_batch_events.",
    "media type": "Send application/json or text/plain; tracking.js does so by itself.",
}


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why some events do not arrive."""

    kind: str
    number: int
    reasons: tuple[str, ...]
    advice: str


@dataclass(frozen=True, slots=True)
class SiteCheck:
    """One site: what arrives and what does not."""

    site_id: str
    count: SiteCount | None
    origins: tuple[str, ...]
    obstacles: tuple[Obstacle, ...]
    mistaken_for: tuple[str, ...]
    """Site ids that nobody configured and that look like this one."""

    @property
    def state(self) -> str:
        """One of: good, quiet, none."""
        if self.count is None:
            return "none"
        return "good" if self.count.last_hour else "quiet"


def register(routes: Blueprint, house: House) -> None:
    """Add the page."""
    routes.add_url_rule("/install", view_func=lambda: _page(house), endpoint="install")


def _page(house: House) -> str:
    with house.connection() as conn:
        counts = {one.site_id: one for one in counters.per_site(conn)}
        refusals = quarantine.counts_of_a_day(conn)
        kept = quarantine.newest(conn, limit=_LOOKED_AT)
    mistaken = list(dict.fromkeys(found[1] for one in kept if (found := _UNKNOWN_SITE.search(one.reason))))
    configured = _site_ids(house.settings)
    sites = configured or sorted(counts)[:_SHOWN_SITES]
    return render_template(
        "install.html",
        checks=[_check(house.settings, site, counts.get(site), refusals, kept, mistaken) for site in sites],
        unknown=[] if not configured else mistaken[:10],
        general=_obstacles("", refusals, kept),
        configured=bool(configured),
        kinds=KINDS,
        address=_address(),
        now=datetime.now(UTC),
    )


def _site_ids(settings: Settings) -> list[str]:
    found = [site.id for site in settings.sites]
    if found and settings.server.demo and DEMO_SITE not in found:
        found.append(DEMO_SITE)
    return found


def _check(  # noqa: PLR0913, PLR0917 - what is known of a site comes from as many places
    settings: Settings,
    site_id: str,
    count: SiteCount | None,
    refusals: Iterable[RefusalCount],
    kept: Iterable[Kept],
    mistaken: list[str],
) -> SiteCheck:
    site = settings.site(site_id)
    return SiteCheck(
        site_id=site_id,
        count=count,
        origins=site.origins if site else (),
        obstacles=tuple(_obstacles(site_id, refusals, kept)),
        mistaken_for=tuple(difflib.get_close_matches(site_id, mistaken, n=3, cutoff=0.6)),
    )


def _obstacles(site_id: str, refusals: Iterable[RefusalCount], kept: Iterable[Kept]) -> list[Obstacle]:
    """Say what was refused of a site in the last day, or of nobody knows which; the most frequent first."""
    found = []
    for one in refusals:
        if one.site_id == site_id:
            reasons = dict.fromkeys(
                filters.text(entry.reason)
                for entry in kept
                if entry.kind == one.kind and (entry.site_id or "") == site_id
            )
            advice = _ADVICE.get(one.kind, "The Quarantine shows what it was.").format(site_id)
            found.append(Obstacle(one.kind, one.number, tuple(reasons)[:3], advice))
    return found


def _address() -> str:
    """Return where browsers reach this server, as the browser that asks does."""
    return f"{'https' if over_tls(request.environ) else 'http'}://{request.host}"
