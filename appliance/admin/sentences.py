"""What the status page and the commands say in the same words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # `appliance check` comes here too, and must not need the database.
    from appliance.store.sealing import Writer

ANY_SITE = "no [[sites]] are configured: anybody can send events for any site id"


def held_up(writer: "Writer") -> str:
    """Say that exports wait for a transaction, and what to do about it."""
    return f"New events are not exported for now: {writer}. End that transaction."
