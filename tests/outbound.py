"""Help to see where processes connect, send and ask for names: strace's record, in a network that has only loopback."""

import ctypes
import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# From sched.h, sockios.h and if.h.
_CLONE_NEWNET, _SIOCSIFFLAGS, _IFF_UP = 0x40000000, 0x8914, 1
# Every call that can name another end. Where none is named, the bytes go to one that `connect` named before.
_CALLS = "connect,sendto,sendmsg,sendmmsg"
_INET = re.compile(r"sa_family=AF_INET6?, sin6?_port=htons\((\d+)\)[^}]*?(?:inet_addr\(|AF_INET6, )\"([^\"]+)\"")
_UNIX = re.compile(r'sa_family=AF_UNIX, sun_path=(@?"[^"]*")')
_FAMILY = re.compile(r"sa_family=(\w+)")


@dataclass(frozen=True)
class Sent:
    """One call that names another end: its family, where, and the line of the record."""

    family: str
    where: str
    line: str


def traced(command: list[str], record: Path) -> list[str]:
    """Return the command under strace, with all that it ever starts; its process id stays its own (-D)."""
    return ["strace", "-D", "-f", "-qq", "-s", "256", "-e", f"trace={_CALLS}", "-o", str(record), *command]


def sent(record: Path) -> list[Sent]:
    """Read what strace has recorded."""
    lines = record.read_text(errors="replace").splitlines()
    return [found for line in _whole(lines) if (found := _read(line))]


def _whole(lines: Iterable[str]) -> Iterator[str]:
    """Put calls together that another process's cut in two: what came of them stands in the second half."""
    begun: dict[str, str] = {}
    for line in lines:
        process = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line
        elif " resumed>" in line and process in begun:
            yield begun.pop(process) + line
        else:
            yield line
    yield from begun.values()


def _read(line: str) -> Sent | None:
    family = _FAMILY.search(line)
    if family is None:
        return None
    if found := _INET.search(line):
        return Sent(family[1], f"{found[2]}:{found[1]}", line)
    path = _UNIX.search(line)
    return Sent(family[1], path[1].strip('"') if path else "", line)


def strays(calls: Iterable[Sent], *, addresses: set[str], below: Path) -> list[str]:
    """Return the lines that lead anywhere else than to those addresses, and to sockets below that directory."""
    return [call.line for call in calls if not _is_known(call, addresses, below)]


def _is_known(call: Sent, addresses: set[str], below: Path) -> bool:
    if call.family in {"AF_INET", "AF_INET6"}:
        return call.where in addresses
    if call.family == "AF_UNIX":
        # The C library looks for daemons that know users and hosts (nscd): where there is none, nothing is asked.
        return call.where.startswith(str(below)) or "ENOENT" in call.line
    # The kernel itself, of which addresses it has.
    return call.family in {"AF_NETLINK", "AF_UNSPEC"}


def in_a_network_of_its_own(work: Callable[[], T]) -> T:
    """Do it in a thread, and with all it starts, that sees no network but a loopback of its own.

    Only root may have one. Others keep theirs: the record tells of every try all the same.
    """
    with ThreadPoolExecutor(1, initializer=_leave_the_network) as pool:
        return pool.submit(work).result()


def _leave_the_network() -> None:
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0:
        with socket.socket() as any_socket:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))
