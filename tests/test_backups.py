"""`appliance backup` writes the whole database into a file, and `restore-backup` makes an empty one the same."""

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from catalog import described
from conftest import Appliance, store_events

from appliance.cli import progress
from appliance.errors import BackupError
from appliance.store import dumps
from appliance.store.database import Database
from appliance.store.embedded import EmbeddedPostgres
from appliance.store.migrations import SCHEMA_VERSION
from appliance.store.programs import binary

TABLES = ("installation", "events_log", "event_counts", "export_coverage", "export_batches", "export_deliveries")


@pytest.fixture
def config(conninfo: str, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "bucket").mkdir()
    nas = {"kind": "directory", "path": str(tmp_path / "bucket")}
    return {"database": {"url": conninfo}, "buckets": {"nas": nas}, "exports": {"acme": {"client": "nas"}}}


@pytest.fixture
def box(appliance: Callable[..., Appliance], config: dict[str, Any], db: Database) -> Appliance:
    """An installation that has exported one batch and holds newer events."""
    one = appliance(**config)
    store_events(db, 5, raw_event_data='{"q": "\\"\\\\n😀"}')
    one.run("export")
    store_events(db, 3)
    return one


@pytest.fixture
def new(appliance: Callable[..., Appliance], config: dict[str, Any], box: Appliance) -> Appliance:
    """A new one with the embedded database and the same bucket."""
    del box
    return appliance(**{name: value for name, value in config.items() if name != "database"})


def everything(conninfo: str) -> dict[str, list[tuple[Any, ...]]]:
    with psycopg.connect(conninfo) as conn:
        return {table: conn.execute(f"SELECT t::text FROM {table} t ORDER BY 1").fetchall() for table in TABLES}  # noqa: S608


def dump(conn: psycopg.Connection[Any], file: Path) -> None:
    """Do as `backup` does, whatever the database holds."""
    dumps.dump(conn.info.dsn, file)


def rows(one: Appliance) -> int:
    events: int = json.loads(one.run("status", "--json").stdout)["events"]
    return events


def test_from_one_database_to_another_everything_is_the_same_and_exports_go_on(
    box: Appliance, new: Appliance, conninfo: str, tmp_path: Path
) -> None:
    file = tmp_path / "all.dump"
    assert box.run("backup", str(file)).stdout == f"{file}: {file.stat().st_size} bytes\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert new.run("restore-backup", str(file)).stdout == f"the database is that of {file}\n"
    before = everything(conninfo)
    new.start()
    assert everything(EmbeddedPostgres(new.data_dir).conninfo) == before
    assert new.run("export").stdout == "acme: 3 events in 1 batch delivered\n"
    assert new.run("verify").stdout.endswith("0 found wrong\n")
    assert len(list((tmp_path / "bucket").rglob("_manifests/acme/*.json"))) == 2


def test_ids_go_on_where_they_were(box: Appliance, new: Appliance, tmp_path: Path) -> None:
    box.run("backup", str(tmp_path / "all.dump"))
    new.run("restore-backup", str(tmp_path / "all.dump"))
    new.start()
    with Database(EmbeddedPostgres(new.data_dir).conninfo) as db:
        store_events(db, 1)
        with db.connection() as conn:
            assert conn.execute("SELECT max(id) FROM events_log").fetchone() == (9,)


def test_a_backup_is_never_written_over(box: Appliance, tmp_path: Path) -> None:
    file = tmp_path / "all.dump"
    file.write_text("last week's")
    done = box.run("backup", str(file), check=False)
    assert (done.returncode, "is there already: choose another name" in done.stderr) == (1, True)
    assert file.read_text() == "last week's"


def test_a_backup_that_fails_leaves_nothing_behind(box: Appliance, tmp_path: Path) -> None:
    done = box.run("backup", str(tmp_path / "missing" / "all.dump"), check=False)
    assert (done.returncode, "cannot be written: No such file or directory" in done.stderr) == (1, True)
    assert [path.name for path in tmp_path.glob("*.unfinished")] == []


def test_of_two_backups_of_one_name_at_once_one_is_whole_and_the_other_says_so(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumps, "_LOOK_SECONDS", 0.001)
    file = tmp_path / "all.dump"
    store_events(db, 3)

    def second(_size: int) -> None:
        if not file.exists():
            dumps.dump(db.conninfo, file)
            store_events(db, 2_000)

    with pytest.raises(BackupError, match="has come there meanwhile, and stays"):
        dumps.dump(db.conninfo, file, tell=second)
    with db.connection() as conn:
        dumps.load(conn, file, tell=lambda _size: None)
        assert conn.execute("SELECT count(*) FROM events_log").fetchone() == (3,)
    assert [path.name for path in tmp_path.iterdir()] == ["all.dump"]


def test_a_backup_goes_to_a_file_system_without_links_too(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    dumps.dump(db.conninfo, tmp_path / "all.dump")
    dumps.check_version(tmp_path / "all.dump")
    assert [path.name for path in tmp_path.iterdir()] == ["all.dump"]


def test_what_one_server_alone_says_of_its_columns_keeps_no_backup_from_being_restored(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PostgreSQL 15.20 does it."""
    store_events(db, 3)
    dumps.dump(db.conninfo, tmp_path / "all.dump")
    stamp = "ALTER TABLE ONLY public.events_log ALTER COLUMN event_id SET (pg_attver=35303080);"
    program = tmp_path / "pg_restore"
    program.write_text(f'#!/bin/sh\n{binary("pg_restore")} "$@" && echo "{stamp}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(dumps, "binary", lambda _name: program)
    with db.connection() as conn:
        dumps.load(conn, tmp_path / "all.dump", tell=lambda _size: None)
        assert conn.execute("SELECT count(*) FROM events_log").fetchone() == (3,)


def test_a_database_with_events_is_not_replaced(box: Appliance, tmp_path: Path) -> None:
    box.run("backup", str(tmp_path / "all.dump"))
    done = box.run("restore-backup", str(tmp_path / "all.dump"), check=False)
    assert (done.returncode, "the database is not empty (events_log has rows)" in done.stderr) == (1, True)
    assert rows(box) == 8


def test_what_is_no_backup_changes_nothing(new: Appliance, tmp_path: Path) -> None:
    (tmp_path / "odd.dump").write_bytes(b"PGDMP" + b"x" * 100)
    for name in ("odd.dump", "missing.dump"):
        done = new.run("restore-backup", str(tmp_path / name), check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
    assert not new.data_dir.exists()


def test_a_backup_that_is_cut_off_changes_nothing(box: Appliance, new: Appliance, tmp_path: Path) -> None:
    file = tmp_path / "all.dump"
    box.run("backup", str(file))
    file.write_bytes(file.read_bytes()[:-200])
    new.start().stop()
    assert new.run("restore-backup", str(file), check=False).returncode == 1
    assert rows(new) == 0


def test_while_the_appliance_runs_it_is_refused(new: Appliance, box: Appliance, tmp_path: Path) -> None:
    box.run("backup", str(tmp_path / "all.dump"))
    new.start()
    done = new.run("restore-backup", str(tmp_path / "all.dump"), check=False)
    assert (done.returncode, "stop it first" in done.stderr) == (1, True)


def test_how_far_it_has_come_is_told_on_the_way_out_and_back(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumps, "_LOOK_SECONDS", 0.001)
    store_events(db, 2_000)
    written: list[int] = []
    dumps.dump(db.conninfo, tmp_path / "all.dump", tell=written.append)
    assert written == sorted(written)
    assert len(set(written)) > 1
    read: list[int] = []
    with db.connection() as conn:
        dumps.load(conn, tmp_path / "all.dump", tell=read.append)
    assert read == sorted(read)
    # The rows alone, as text.
    assert read[-1] > 2_000 * 100


def test_what_takes_long_says_in_a_log_how_far_it_has_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.growth("written") as tell:
        tell(7_000_000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    with progress.growth("written") as tell:
        tell(1_234_000_000)
    assert capsys.readouterr().err == "1,234 MB written\n"


def test_no_other_user_can_read_the_password_of_the_database(tmp_path: Path) -> None:
    """Words of a command can be read by everybody; its environment cannot."""
    script = (
        "import sys; from pathlib import Path; from appliance.store import dumps;"
        "dumps.binary = lambda name: sys.argv[1];"
        "dumps.dump('host=db.example.com user=me password=hunter2 dbname=events sslmode=prefer', Path('x'))"
    )
    program = tmp_path / "pg_dump"
    program.write_text('#!/bin/sh\necho "$@" > words\nenv > environment\n')
    program.chmod(0o755)
    subprocess.run([sys.executable, "-c", script, str(program)], cwd=tmp_path, check=True)
    assert "hunter2" not in (tmp_path / "words").read_text()
    environment = (tmp_path / "environment").read_text()
    for line in ("PGPASSWORD=hunter2", "PGHOST=db.example.com", "PGSSLMODE=prefer", "PGDATABASE=events"):
        assert line in environment


def test_a_backup_of_a_newer_version_is_refused_before_anything_is_made(
    box: Appliance, new: Appliance, conn: psycopg.Connection[Any], tmp_path: Path
) -> None:
    box.run("backup", str(tmp_path / "right.dump"))
    conn.execute("UPDATE installation SET schema_version = schema_version + 1")
    dump(conn, tmp_path / "newer.dump")
    done = new.run("restore-backup", str(tmp_path / "newer.dump"), check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"appliance: {tmp_path / 'newer.dump'} has schema {SCHEMA_VERSION + 1}, this version of the appliance knows "
        f"{SCHEMA_VERSION}: put it back with the newer version that made it\n"
    )
    assert not new.data_dir.exists()
    new.run("restore-backup", str(tmp_path / "right.dump"))
    assert rows(new) == 8


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_a_backup_of_each_older_version_becomes_a_database_of_this_one(
    appliance: Callable[..., Appliance], empty: str, conninfo: str, tmp_path: Path, version: int
) -> None:
    with psycopg.connect(empty, autocommit=True) as old:
        old.execute((Path(__file__).parent / "schemas" / f"{version:04d}.sql").read_bytes())
        old.execute("INSERT INTO installation (schema_version) VALUES (%s)", (version,))
        dump(old, tmp_path / "old.dump")
    appliance(database={"url": empty}).run("restore-backup", str(tmp_path / "old.dump"))
    assert described(empty) == described(conninfo)


def test_a_backup_whose_schema_cannot_be_brought_up_to_date_changes_nothing(
    new: Appliance, conn: psycopg.Connection[Any], tmp_path: Path
) -> None:
    # Its last step finds there what it would make.
    conn.execute("UPDATE installation SET schema_version = schema_version - 1")
    dump(conn, tmp_path / "odd.dump")
    done = new.run("restore-backup", str(tmp_path / "odd.dump"), check=False)
    assert (done.returncode, "odd.dump cannot be brought up to date: column" in done.stderr) == (1, True)
    assert rows(new) == 0


def test_a_dump_of_something_else_is_no_backup(new: Appliance, empty: str, tmp_path: Path) -> None:
    with psycopg.connect(empty, autocommit=True) as other:
        other.execute("CREATE TABLE letters (a text)")
        dump(other, tmp_path / "other.dump")
    done = new.run("restore-backup", str(tmp_path / "other.dump"), check=False)
    assert (done.returncode, "other.dump is no backup of an appliance" in done.stderr) == (1, True)
    assert not new.data_dir.exists()
