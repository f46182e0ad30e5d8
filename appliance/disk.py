"""What must still be there after a power cut, and must never replace what is there already."""

import errno
import os
from pathlib import Path

# Some file systems have no links: FAT, and many shares of a network.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


def sync(path: Path) -> None:
    """Return when a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place(finished: Path, target: Path) -> bool:
    """Give a finished file of the same disk another name; False where something has that name already.

    Unlike a rename, a link never replaces what has come there meanwhile; the first name stays until it is removed.
    """
    try:
        os.link(finished, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            return False
        finished.rename(target)
    return True
