"""What both kinds of bucket check by, and how they say that something went wrong."""

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from appliance.errors import BucketError, ForeignObjectError

READ_BYTES = 1 << 20
PROBES = "_probe"


class ActionError(BucketError):
    """Something could not be done in a bucket; `reason` says why, and what to do."""

    def __init__(self, bucket: str, action: str, key: str, *, reason: str) -> None:
        super().__init__(f"bucket {bucket}: cannot {action} {key}: {reason}")
        self.reason = reason


def foreign(bucket: str, key: str) -> ForeignObjectError:
    """Return the error for a key at which other bytes stand."""
    return ForeignObjectError(
        f"bucket {bucket}: other bytes stand at {key}, and nothing there is ever written over: "
        "choose another prefix for the batches to come, and move it away for this one"
    )


def check_probe(key: str) -> None:
    """Let nothing but probes be removed, whoever asks."""
    if PROBES not in key.split("/")[:-1]:
        raise ValueError(f"{key} is no probe")


def pieces_of(path: Path, size: int = READ_BYTES) -> Iterator[bytes]:
    """Read a file piece by piece."""
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


def sha256_of(pieces: Iterable[bytes]) -> str:
    """Return the SHA-256 of the pieces, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def crc32_of(pieces: Iterable[bytes]) -> bytes:
    """Return the CRC-32 of the pieces, one after the other, as S3 writes it: four bytes, the highest first."""
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value.to_bytes(4, "big")
