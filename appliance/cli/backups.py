"""`backup` and `restore-backup`: the whole database in one file; `move`: into another database."""

from pathlib import Path

import click

from appliance.cli.common import config_option, json_option, load, print_json
from appliance.cli.progress import growth
from appliance.errors import ConfigError

_file_argument = click.argument("backup", type=click.Path(path_type=Path), metavar="FILE")


@click.command(epilog="Example: appliance backup /mnt/nas/appliance-2026-11-23.dump")
@_file_argument
@config_option
@json_option
def backup(backup: Path, file: Path | None, *, as_json: bool) -> None:
    """Write the whole database into FILE: events, record of exports, counts. The appliance may run meanwhile."""
    settings = load(file)
    from appliance.store import dumps  # noqa: PLC0415 - `check` must not need the database
    from appliance.store.attach import attached  # noqa: PLC0415

    with attached(settings) as db, growth("written") as tell:
        dumps.dump(db.conninfo, backup, tell=tell)
    size = backup.stat().st_size
    if as_json:
        print_json({"file": backup, "bytes": size})
    else:
        click.echo(f"{backup}: {size} bytes")


@click.command("restore-backup", epilog="Example: appliance restore-backup /mnt/nas/appliance-2026-11-23.dump")
@_file_argument
@config_option
@json_option
def restore_backup(backup: Path, file: Path | None, *, as_json: bool) -> None:
    """Fill an empty database from FILE, which `appliance backup` has written, perhaps from another database.

    The appliance must not run. What buckets have got since the backup comes back with `appliance restore` afterwards.
    """
    settings = load(file)
    from appliance import server  # noqa: PLC0415 - `check` must not need the database
    from appliance.store import dumps  # noqa: PLC0415
    from appliance.store.attach import attached  # noqa: PLC0415
    from appliance.store.events import newest_id  # noqa: PLC0415

    dumps.check_version(backup)
    with (
        server.lock_data_dir(settings.server.data_dir),
        attached(settings, creates=True, alone=True) as db,
        db.connection() as conn,
        growth("read") as tell,
    ):
        dumps.check_empty(conn)
        dumps.load(conn, backup, tell=tell)
        events = newest_id(conn)
    if as_json:
        print_json({"file": backup, "newest_id": events})
    else:
        click.echo(f"the database is that of {backup}")


@click.command(epilog="Example: appliance move new.toml --config config.toml")
@click.argument("new", type=click.Path(path_type=Path), metavar="NEW")
@config_option
@json_option
def move(new: Path, file: Path | None, *, as_json: bool) -> None:
    """Copy the whole database into the empty one of NEW, a configuration that differs in database.url.

    The appliance must not run. The database it comes from stays as it is, and is not used again.
    """
    old_settings, new_settings = load(file), load(new)
    if new_settings.server.data_dir != old_settings.server.data_dir:
        # Events may wait in its spool, and belong to the database that the next start has.
        raise ConfigError([f"{new}: server.data_dir: a move is between databases: leave it as it is"])
    if new_settings.database == old_settings.database:
        raise ConfigError(
            [f"{new}: database.url: it names the database to move from (the environment wins over files)"]
        )
    from appliance import server  # noqa: PLC0415 - `check` must not need the database
    from appliance.store import dumps, moving  # noqa: PLC0415
    from appliance.store.attach import attached, require_database  # noqa: PLC0415
    from appliance.store.events import newest_id  # noqa: PLC0415

    # Before the lock, which makes the data directory.
    require_database(old_settings)
    with (
        server.lock_data_dir(old_settings.server.data_dir),
        attached(old_settings, alone=True) as source,
        attached(new_settings, creates=True, alone=True) as target,
    ):
        with source.connection() as sending, target.connection() as receiving, growth("copied") as tell:
            dumps.check_empty(receiving)
            moving.copy_everything(sending, receiving, tell=tell)
            events = newest_id(receiving)
        with source.connection() as conn:
            moving.mark_moved(conn)
    if as_json:
        print_json({"newest_id": events})
    else:
        click.echo(f"everything is in the database of {new}: start the appliance with that")
