"""The embedded PostgreSQL takes what its machine can spare."""

import re
from pathlib import Path

import psycopg
import pytest

from appliance.store import sizing
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.sizing import Machine, settings_for

MB, GB = 1 << 20, 1 << 30
OPERATIONS = Path(__file__).resolve().parent.parent / "docs" / "operations.md"
# The words of its table.
SHARES = {"half": 2, "a quarter": 4, "an eighth": 8, "a sixteenth": 16, "a twentieth": 20, "a 256th": 256}

MACHINES = [
    # memory, disk, shared_buffers, work_mem, maintenance_work_mem, max_wal_size
    (512 * MB, 4 * GB, "64MB", "4MB", "64MB", "256MB"),
    (1 * GB, 20 * GB, "128MB", "4MB", "64MB", "1024MB"),
    (8 * GB, 80 * GB, "1024MB", "32MB", "512MB", "4096MB"),
    (256 * GB, 4000 * GB, "2048MB", "32MB", "512MB", "4096MB"),
]


@pytest.mark.parametrize(("memory", "disk", "buffers", "work", "maintenance", "log"), MACHINES)
def test_postgres_takes_a_bounded_share_of_its_machine(  # noqa: PLR0913, PLR0917
    memory: int, disk: int, buffers: str, work: str, maintenance: str, log: str
) -> None:
    settings = settings_for(Machine(memory=memory, disk=disk))
    assert settings["shared_buffers"] == buffers
    assert settings["work_mem"] == work
    assert settings["maintenance_work_mem"] == maintenance
    assert settings["max_wal_size"] == log


@pytest.mark.parametrize(
    ("said", "expected"), [("max\n", 10**15), ("536870912\n", 536870912), ("9223372036854771712\n", 10**15)]
)
def test_the_limit_of_a_container_counts_as_its_memory(
    said: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(said)
    monkeypatch.setattr(sizing, "_LIMITS", (limit, tmp_path / "the other version"))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 10**12}.__getitem__)
    assert Machine.of(tmp_path).memory == expected


def test_the_running_postgres_has_the_settings_and_checksums(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    expected = settings_for(Machine.of(tmp_path))
    with psycopg.connect(postgres.conninfo) as conn:
        rows = conn.execute("SELECT name, current_setting(name) FROM pg_settings").fetchall()
    running: dict[str, str] = dict(rows)
    assert {name: in_mb(running[name]) for name in expected} == {name: in_mb(said) for name, said in expected.items()}
    assert running["max_connections"] == rows_of_the_table()["max_connections"][0]
    assert running["data_checksums"] == "on"


@pytest.mark.parametrize(("memory", "disk"), [machine[:2] for machine in MACHINES])
def test_the_table_that_users_read_says_what_postgres_is_given(memory: int, disk: int) -> None:
    settings = settings_for(Machine(memory=memory, disk=disk))
    told = rows_of_the_table()
    assert told.keys() == settings.keys() | {"max_connections"}
    shared = {"memory": memory, "disk": disk, "that": min(max(disk // 20, 256 * MB), 4 * GB)}
    for name, said in settings.items():
        assert in_mb(said) == as_told(told[name], shared), name


def rows_of_the_table() -> dict[str, list[str]]:
    """Read what docs/operations.md tells of each setting: what it is, at least, at most."""
    _, _, section = OPERATIONS.read_text().partition("## What PostgreSQL takes\n")
    rows = [line.strip("|").split("|") for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    return {name.strip(" `"): [word.strip() for word in words] for name, *words in rows}


def as_told(row: list[str], shared: dict[str, int]) -> int | str:
    share, least, most = row
    if not (found := re.fullmatch(r"(half|an? \w+) of (?:the )?(\w+)", share)):
        return in_mb(share)
    size = shared[found[2]] // SHARES[found[1]] // MB
    size = max(size, int(in_mb(least))) if least else size
    return min(size, int(in_mb(most))) if most else size


def in_mb(said: str) -> int | str:
    """Return a size as PostgreSQL, its options or the table name it; what is no size stays as it is."""
    found = re.fullmatch(r"(\d+) ?(MB|GB)", said)
    return int(found[1]) * {"MB": 1, "GB": 1024}[found[2]] if found else said.replace(" ", "")
