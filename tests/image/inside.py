"""What is done inside the container, by its own Python: this file comes in by standard input.

    docker exec -i NAME python3 - TASK [WORD] < inside.py

Prints its findings as JSON.
"""

import gzip
import importlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

DATA = Path("/data")
# Of the network that is set aside for documents: where there is a way out it is tried in vain until the time is over.
_OUTSIDE = ("192.0.2.1", 443)


def main() -> None:
    tasks: dict[str, Any] = {
        one.__name__: one
        for one in (count, fill, network, rights, clients, loads, processes, zombies, strike, freeze, spooled)
    }
    json.dump(tasks[sys.argv[1]](*sys.argv[2:]), sys.stdout)


# -- events -----------------------------------------------------------------------------------------------------------


def count() -> dict[str, list[str]]:
    """Every event's id, as often as it is there: in the table, in the objects of both jobs."""
    with _connection() as conn:
        stored = [str(row[0]) for row in conn.execute("SELECT event_id FROM events_log")]
    return {"table": stored, "jsonl": _in_lines(DATA / "export"), "parquet": _in_parquet(DATA / "lake")}


def fill(number: str) -> list[str]:
    """Write so many events into the table, for an export that takes some seconds."""
    statement = (
        "INSERT INTO events_log (event_id, event_type, site_id, timestamp, raw_event_data)"
        " SELECT gen_random_uuid(), 'fill', 'fill', now(), jsonb_build_object('n', n)"
        " FROM generate_series(1, %s) AS n RETURNING event_id"
    )
    with _connection() as conn:
        return [str(row[0]) for row in conn.execute(statement, (int(number),))]


def spooled() -> int:
    """The bytes in the spool."""
    return sum(path.stat().st_size for path in (DATA / "spool").iterdir())


def _connection() -> Any:
    import psycopg  # noqa: PLC0415 - most tasks need none of this

    from appliance.store.embedded import EmbeddedPostgres  # noqa: PLC0415

    return psycopg.connect(EmbeddedPostgres(DATA).conninfo)


def _in_lines(directory: Path) -> list[str]:
    paths = sorted(directory.rglob("*.jsonl.gz"))
    return [json.loads(line)["event_id"] for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]


def _in_parquet(directory: Path) -> list[str]:
    import pyarrow.parquet as pq  # noqa: PLC0415 - most tasks need none of this

    paths = sorted(directory.rglob("*.parquet"))
    return [one for path in paths for one in pq.ParquetFile(path).read(["event_id"])["event_id"].to_pylist()]


# -- what it may do ---------------------------------------------------------------------------------------------------


def network() -> dict[str, Any]:
    """Name the network's interfaces and routes, and how an attempt to leave ends."""
    routes = Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]
    try:
        socket.create_connection(_OUTSIDE, timeout=5).close()
        attempt = "connected"
    except OSError as error:
        attempt = error.strerror or "no answer"
    return {
        "interfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "routes": routes,
        "attempt": attempt,
    }


def rights() -> dict[str, Any]:
    """Tell the user, the capabilities of process 1, and which of some places can be written."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/1/status").read_text(encoding="ascii").splitlines())
    capabilities = {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    places = ("/", "/etc/appliance", "/opt/appliance", "/usr/bin", "/var/lib", "/tmp", "/data")  # noqa: S108
    return {
        "user": os.getuid(),
        "capabilities": sorted(capabilities),
        "no_new_privileges": status["NoNewPrivs"],
        "writable": [place for place in places if _can_write(Path(place))],
    }


def _can_write(directory: Path) -> bool:
    path = directory / ".tried"
    try:
        path.touch()
        path.unlink()
    except OSError:
        return False
    return True


def clients() -> list[str]:
    """Make a client of each of AWS's services that exports and the roles for them need."""
    import boto3  # noqa: PLC0415 - most tasks need none of this

    session: Any = boto3.session.Session(region_name="eu-central-1")
    services = ("s3", "sts", "sso", "sso-oidc", "signin")
    return [session.client(one).meta.service_model.service_name for one in services]


def loads() -> list[str]:
    """Load what only some commands and errands do: something of it may have been left out of the image."""
    names = ("adbc_driver_postgresql.dbapi", "apprise", "minify", "pyarrow.compute", "rich.progress", "rich.table")
    return [importlib.import_module(name).__name__ for name in names]


# -- processes --------------------------------------------------------------------------------------------------------


def processes(word: str) -> list[int]:
    """Name the processes whose command holds a word; this one's does, too, and is left out."""
    found = {pid: _read(pid, "cmdline") for pid in _pids()}
    return [pid for pid, command in found.items() if word in command and pid != os.getpid()]


def zombies() -> list[str]:
    """Name the dead whom nobody has waited for."""
    return [stat for stat in (_read(pid, "stat") for pid in _pids()) if stat and _fields(stat)[0] == "Z"]


def strike() -> list[int]:
    """Kill PostgreSQL's first process and the worker behind the web server's arbiter, each by itself."""
    children = _children(1)
    (postmaster,) = (pid for pid in children if _is_postgres(pid))
    (arbiter,) = (pid for pid in children if _read(pid, "cmdline").endswith("appliance\0serve\0"))
    (worker,) = _children(arbiter)
    for pid in (postmaster, worker):
        os.kill(pid, signal.SIGKILL)
    return [postmaster, worker]


def freeze() -> list[int]:
    """Stop PostgreSQL in its tracks: it neither answers nor closes anything."""
    frozen = [pid for pid in _pids() if _is_postgres(pid)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    return frozen


def _is_postgres(pid: int) -> bool:
    return _read(pid, "comm").strip() == "postgres"


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _children(parent: int) -> list[int]:
    return [pid for pid in _pids() if (stat := _read(pid, "stat")) and int(_fields(stat)[1]) == parent]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        # It has ended meanwhile.
        return ""


def _fields(stat: str) -> list[str]:
    """State, parent and so on: what follows the name, which may hold anything."""
    return stat.rpartition(")")[2].split()


if __name__ == "__main__":
    main()
