"""The embedded PostgreSQL takes what its machine can spare."""

from pathlib import Path

import psycopg
import pytest

from appliance.store import sizing
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.sizing import Machine, settings_for

MB, GB = 1 << 20, 1 << 30

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
        assert conn.execute("SELECT setting FROM pg_settings WHERE name = 'max_wal_size'").fetchone() == (
            expected["max_wal_size"].removesuffix("MB"),
        )
        assert conn.execute("SHOW data_checksums").fetchone() == ("on",)
