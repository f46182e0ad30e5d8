"""What lies in a data directory, by what makes it grow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psycopg
from conftest import Appliance

from appliance.store.embedded import EmbeddedPostgres


@dataclass(frozen=True)
class Disk:
    """Bytes, by what takes them, and how many files lie beside PostgreSQL's own."""

    # With their indexes.
    tables: int
    wal: int
    rest: int
    files: int

    @classmethod
    def of(cls, data_dir: Path) -> Self:
        postgres = data_dir / "postgres"
        tables, wal = (sum(_sizes_below(postgres / name)) for name in ("base", "pg_wal"))
        total = sum(_sizes_below(data_dir))
        files = sum(path.is_file() for place in _places_beside(postgres) for path in place.rglob("*"))
        return cls(tables, wal, total - tables - wal, files)


def _places_beside(postgres: Path) -> Iterator[Path]:
    return (path for path in postgres.parent.iterdir() if path.is_dir() and path != postgres)


def _sizes_below(directory: Path) -> Iterator[int]:
    for path in directory.rglob("*"):
        try:
            if path.is_file():
                yield path.stat().st_blocks * 512
        except FileNotFoundError:
            # Removed between two looks, as files of a database are.
            continue


def at_rest(box: Appliance) -> Disk:
    """Look after a checkpoint: what is in memory only would be missing from the files."""
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo, autocommit=True) as conn:
        conn.execute("CHECKPOINT")
    return Disk.of(box.data_dir)


def most_wal(box: Appliance) -> int:
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        ((value,),) = conn.execute("SELECT pg_size_bytes(current_setting('max_wal_size'))").fetchall()
    return int(value)
