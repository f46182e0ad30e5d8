"""Configuration: as it was understood, without its secrets, and where each value comes from."""

from flask import Blueprint, render_template

from appliance.admin.inside import House
from appliance.config.explain import explain


def register(routes: Blueprint, house: House) -> None:
    """Add the page."""
    sections = explain(house.settings)
    routes.add_url_rule(
        "/configuration",
        view_func=lambda: render_template("configuration.html", sections=sections),
        endpoint="configuration",
    )
