"""The admin's password as it may stand in the configuration: as given, or as a hash that gives nothing away."""

import hmac

from werkzeug.security import check_password_hash, generate_password_hash

from appliance.config import PASSWORD_HASH


def hashed(password: str) -> str:
    """Return a hash of a password (scrypt) to be written into the configuration."""
    return generate_password_hash(password)


def is_hash(configured: str) -> bool:
    """Return whether what is configured is a hash."""
    return PASSWORD_HASH.fullmatch(configured) is not None


def matches(given: str, configured: str) -> bool:
    """Return whether a password is the configured one; how long that takes tells nothing of it."""
    if is_hash(configured):
        return check_password_hash(configured, given.encode("utf-8", "replace").decode())
    return same(given, configured)


def same(given: str, right: str) -> bool:
    """Compare without telling by the time it takes how much of it was right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), right.encode())
