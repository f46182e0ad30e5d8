"""Overview: whether all is well, what comes in, what waits, and how each job and bucket fares."""

from datetime import UTC, datetime, timedelta
from typing import Any

from flask import Blueprint, render_template

from appliance.admin import charts, verdict
from appliance.admin.inside import House
from appliance.store import figures, history, overview, quarantine, runs
from appliance.store.database import Connection

_HOURS = 3
_DAYS = 28
_MINUTE = timedelta(minutes=1)
_DAY = timedelta(days=1)


def register(routes: Blueprint, house: House) -> None:
    """Add the page."""
    routes.add_url_rule("/", view_func=lambda: _page(house), endpoint="status")


def read(conn: Connection) -> dict[str, Any]:
    """Read all that the page shows, from the counters and the ledger alone: events_log may hold any number of rows."""
    return {
        "state": overview.read(conn),
        "minutes": history.per_minute(conn, minutes=_HOURS * 60),
        "days": history.per_day(conn, days=_DAYS),
        "kept": sum(quarantine.sizes(conn).values()),
        "refused": sum(one.number for one in quarantine.counts_of_a_day(conn)),
        "last_runs": runs.last_of_each_job(conn),
        "database_bytes": figures.database_bytes(conn),
    }


def _page(house: House) -> str:
    now = datetime.now(UTC)
    with house.connection() as conn:
        found = read(conn)
    disk = verdict.disk_of(house.settings.server.data_dir)
    state = found["state"]
    colours = charts.colours_of(found["days"])
    return render_template(
        "overview.html",
        **found,
        verdict=verdict.of(
            house.settings, state, last_runs=found["last_runs"], disk=disk, warnings=house.inside.warnings()
        ),
        summary=verdict.summary(state),
        colours=colours,
        hours=charts.draw(found["minutes"], colours, end=now, slot=_MINUTE, slots=_HOURS * 60),
        weeks=charts.draw(found["days"], colours, end=now, slot=_DAY, slots=_DAYS),
        next_runs=house.inside.next_runs(),
        exports=house.settings.exports,
        spooled_bytes=house.inside.spooled_bytes(),
        disk=disk,
        now=now,
    )
