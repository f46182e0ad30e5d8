"""Who may send: sites, their origins, how often, and whether the visitor wants it. Knows no HTTP but a few headers."""

import logging
import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from appliance.collect.client import Address, is_local, rate_key
from appliance.collect.limits import RateLimit
from appliance.config import DEMO_SITE, Settings, Site

log = logging.getLogger(__name__)

# Without configured sites anybody can invent one; each is a line on the status page and a folder in the buckets.
MAX_UNCONFIGURED_SITES = 100
_ASK_AGAIN_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """What a request says of who sends it."""

    address: Address | None
    origin: str | None
    wants_no_tracking: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why events of a site are not taken in from a sender."""

    kind: str
    status: int
    reason: str
    retry_after_seconds: int | None = None


class Admission:
    """Decides about senders. Used by many threads."""

    def __init__(self, settings: Settings) -> None:
        self._sites = {site.id: site for site in settings.sites}
        if self._sites and settings.server.demo:
            self._sites.setdefault(DEMO_SITE, Site(id=DEMO_SITE))
        self._any_origin = not settings.sites or any(not site.origins for site in settings.sites)
        self._origins = frozenset(origin for site in settings.sites for origin in site.origins)
        self._addresses = RateLimit(settings.collect.requests_per_minute_per_address)
        self._site_rates = RateLimit(settings.collect.requests_per_minute_per_site)
        self._seen: set[str] = set()
        self._seen_is_complete = False
        self.proxy: str | None = None
        """A local peer that passes on others' requests and is not among the trusted proxies."""
        self._lock = threading.Lock()

    def remember_sites(self, site_ids: Iterable[str]) -> None:
        """Take in what the database knows: where no sites are configured, those that have sent may go on."""
        with self._lock:
            self._seen.update(site_ids)
            self._seen_is_complete = True

    def note_proxy(self, address: Address) -> None:
        """Say once that a proxy is not configured: its visitors have its address and no limit."""
        if self.proxy is None:
            self.proxy = str(address)
            log.warning(
                "requests come through the proxy %s, which server.trusted_proxies does not name: visitors' addresses "
                "are lost and not limited; add it there if it is yours",
                address,
            )

    def warnings(self) -> list[str]:
        """Say what traffic has shown to be missing in the configuration."""
        if self.proxy is None:
            return []
        lost = "visitors' addresses are lost and not limited"
        return [f"Requests come through the proxy {self.proxy}, which server.trusted_proxies does not name: {lost}."]

    def site(self, site_id: str) -> Site | None:
        """Return the configured site."""
        return self._sites.get(site_id)

    def knows(self, site_id: str) -> bool:
        """Return whether there is such a site, configured or taken in."""
        return site_id in self._sites or site_id in self._seen

    def allows_pages_of(self, origin: str) -> bool:
        """Return whether some site's pages stand there, so that a browser may be told yes."""
        return self._any_origin or origin.lower() in self._origins

    def too_often(self, address: Address | None) -> Refusal | None:
        """Count a request of an address. Local ones are not visitors': see `is_local`."""
        if address is None or is_local(address):
            return None
        with self._lock:
            wait = self._addresses.wait_seconds(rate_key(address), time.monotonic())
        return _too_often("address", wait) if wait else None

    def refusal(self, site_id: str, sender: Sender) -> Refusal | None:
        """Return why events of this site are not taken in from this sender; None where they are."""
        site = self._sites.get(site_id)
        refusal = self._unknown(site_id) if site is None else _not_allowed(site, sender)
        if refusal is not None:
            return refusal
        with self._lock:
            wait = self._site_rates.wait_seconds(site_id, time.monotonic())
        return _too_often("site", wait) if wait else None

    def may_be_kept(self, sender: Sender, site_id: str | None) -> bool:
        """Return whether something that was refused may stand in the quarantine with its content.

        Not where its site would take nothing from this sender. What names no such site may be meant for any.
        """
        site = self._sites.get(site_id or "")
        refusals = [_not_allowed(one, sender) for one in ([site] if site else self._sites.values())]
        unwanted = any(refusal is not None and refusal.kind == "dnt" for refusal in refusals)
        return not refusals or (None in refusals and not unwanted)

    def _unknown(self, site_id: str) -> Refusal | None:
        if self._sites:
            return Refusal("site", 403, f'no site "{site_id}" is configured here')
        if site_id in self._seen:
            return None
        with self._lock:
            if len(self._seen) < MAX_UNCONFIGURED_SITES:
                self._seen.add(site_id)
                return None
            complete = self._seen_is_complete
        if not complete:
            # It may be a site of old, and a browser throws away what is forbidden.
            reason = "which sites there are is not known until the database is there, please send this later"
            return Refusal("site", 503, reason, _ASK_AGAIN_SECONDS)
        return Refusal(
            "site", 403, f"while no [[sites]] are configured, at most {MAX_UNCONFIGURED_SITES} site ids are taken in"
        )


def _not_allowed(site: Site, sender: Sender) -> Refusal | None:
    if sender.origin is None and site.require_origin:
        return Refusal("origin", 403, f'events of site "{site.id}" must come from one of its pages (no Origin)')
    if sender.origin is not None and site.origins and sender.origin.lower() not in site.origins:
        return Refusal("origin", 403, f'pages of this origin may not send events of site "{site.id}"')
    if sender.wants_no_tracking and site.honor_dnt:
        return Refusal("dnt", 200, "the visitor does not want to be tracked (DNT or Sec-GPC)")
    return None


def _too_often(kind: str, wait_seconds: float) -> Refusal:
    return Refusal(
        f"{kind} rate", 429, f"too many requests of this {kind}, please send them later", math.ceil(wait_seconds)
    )
