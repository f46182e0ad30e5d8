"""Ids for events that bring none."""

import random
import time
from uuid import UUID

# The system's own source of chance is a call into the kernel for each event, and an id is no secret: it has to differ.
# Python seeds this one anew in every process.
_bits = random.getrandbits


def uuid7() -> UUID:
    """Return a UUIDv7 (RFC 9562): its first 48 bits are milliseconds, so new rows stay together in the index."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | _bits(80)
    value = value & ~(0xF << 76) | (7 << 76)
    value = value & ~(0x3 << 62) | (2 << 62)
    return UUID(int=value)
