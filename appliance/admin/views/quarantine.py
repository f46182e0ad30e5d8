"""Quarantine: what was refused and why. Its content is hostile until proven otherwise, and shown as text."""

from flask import Blueprint, render_template, request

from appliance.admin.asked import below
from appliance.admin.inside import House
from appliance.admin.sentences import KINDS
from appliance.store import quarantine

_SHOWN = 50


def register(routes: Blueprint, house: House) -> None:
    """Add the page."""
    routes.add_url_rule("/quarantine", view_func=lambda: _page(house), endpoint="quarantine")


def _page(house: House) -> str:
    with house.connection() as conn:
        sizes = quarantine.sizes(conn)
        kind = request.args.get("kind")
        kind = kind if kind in sizes else None
        entries = quarantine.newest(conn, limit=_SHOWN + 1, kind=kind, below=below())
        counts = quarantine.counts_of_a_day(conn)
    shown = entries[:_SHOWN]
    return render_template(
        "quarantine.html",
        counts=counts,
        kinds=KINDS,
        sizes=sizes,
        kind=kind,
        entries=shown,
        older=shown[-1].id if len(entries) > len(shown) else None,
    )
