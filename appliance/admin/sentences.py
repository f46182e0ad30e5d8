"""What the status page and the commands say in the same words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # `appliance check` comes here too, and must not need the database.
    from appliance.store.sealing import Writer

ANY_SITE = "no [[sites]] are configured: anybody can send events for any site id"


def held_up(writer: "Writer") -> str:
    """Say that exports wait for a transaction, and what to do about it."""
    return f"New events are not exported for now: {writer}. End that transaction."


# What the kinds of refusals mean.
KINDS = {
    "address rate": "too many requests of one address",
    "body": "not readable as events",
    "database": "not taken by the database",
    "dnt": "the visitor does not want to be tracked",
    "event": "an event that is wrong in itself",
    "media type": "sent as something else than JSON",
    "origin": "from pages of another address",
    "request": "no request that can be read, not whole in time, or too many at once",
    "site": "for a site that is not configured",
    "site rate": "too many requests of this site",
    "size": "too large",
}


def sentence(text: str) -> str:
    """Begin with a capital and end with a full stop."""
    return text[:1].upper() + text[1:].rstrip(". ") + "." if text else ""


def trouble_of(bucket: str, error: str) -> str:
    """Say what is wrong with a bucket where its name stands already."""
    return sentence(error.removeprefix(f"bucket {bucket}: "))
