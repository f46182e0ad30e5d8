"""The commands as a user types them: messages, JSON and exit codes."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Appliance, S3Server, store_events

from appliance.cli import cli
from appliance.store.database import Database
from appliance.store.migrations import migrate


def appliance_command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "appliance", *words], capture_output=True, text=True, check=False, cwd=cwd, timeout=60
    )


@pytest.mark.parametrize("command", cli.commands)
def test_every_command_explains_itself_with_an_example(command: str, tmp_path: Path) -> None:
    done = appliance_command(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"Example: appliance {command}" in done.stdout


# A server has nothing to tell a script, and a hash is all that `hash-password` prints.
@pytest.mark.parametrize("command", sorted(cli.commands.keys() - {"serve", "hash-password"}))
def test_every_command_that_tells_something_tells_it_to_scripts_too(command: str) -> None:
    assert "--json" in {option for param in cli.commands[command].params for option in param.opts}


COMPLETED = [
    (
        "appliance ",
        "backfill backup check export hash-password healthcheck move restore restore-backup serve status verify",
    ),
    ("appliance re", "restore restore-backup"),
    ("appliance export ", "acme beta"),
    ("appliance verify b", "beta"),
    ("appliance restore ", "client vault"),
    ("appliance backfill acme --bucket v", "vault"),
    ("appliance backfill acme --d", "--dry-run"),
    ("appliance export --config broken.toml ", ""),
]


@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_a_shell_completes_commands_options_jobs_and_buckets(line: str, expected: str, tmp_path: Path) -> None:
    buckets = "".join(f'[buckets.{name}]\nkind = "directory"\npath = "/mnt/{name}"\n' for name in ("client", "vault"))
    jobs = "".join(f'[exports.{name}]\nclient = "client"\n' for name in ("acme", "beta"))
    (tmp_path / "config.toml").write_text(buckets + jobs)
    (tmp_path / "broken.toml").write_text("[exports")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_APPLIANCE_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [Path(sys.executable).parent / "appliance"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | asked,
        timeout=60,
    )
    assert sorted(one.removeprefix("plain,") for one in done.stdout.split()) == expected.split()
    assert not done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_for_a_shells_start_up_file_prints_a_script(shell: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "appliance"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"_APPLIANCE_COMPLETE": f"{shell}_source"},
        timeout=60,
    )
    assert "_appliance_completion" in done.stdout


def test_check_says_what_the_configuration_means(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[[sites]]\nid = "shop"\n[admin]\npassword = "x"\n')
    done = appliance_command("check", cwd=tmp_path)
    assert done.returncode == 0
    assert "sites: shop" in done.stdout
    assert "export local: sites * to local, jsonl (gzip), on 5 * * * * UTC" in done.stdout


def test_check_warns_of_events_that_would_stand_twice_in_one_place(tmp_path: Path) -> None:
    buckets = '[buckets.one]\nkind = "directory"\npath = "/mnt"\n[buckets.same]\nkind = "directory"\npath = "/mnt/."\n'
    sites = '[[sites]]\nid = "shop"\n[[sites]]\nid = "blog"\n'

    def warned(first: str, second: str, bucket: str = "same") -> bool:
        jobs = f'[exports.a]\nclient = "one"\nsites = {first}\n[exports.b]\nclient = "{bucket}"\nsites = {second}\n'
        (tmp_path / "config.toml").write_text(buckets + sites + jobs)
        return "exports a and b share sites and one place" in appliance_command("check", cwd=tmp_path).stdout

    assert warned('["*"]', '["shop"]')
    assert warned('["shop", "blog"]', '["blog"]', bucket="one")
    assert not warned('["shop"]', '["blog"]')


def test_a_configuration_out_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[server]\nbind = "127.0.0.1:1234"\n', encoding="utf-8-sig")
    assert "listens on 127.0.0.1:1234" in appliance_command("check", cwd=tmp_path).stdout


def test_check_warns_of_what_is_allowed_and_unwise(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[buckets.spare]\nkind = "directory"\npath = "/mnt"\n')
    done = appliance_command("check", "--json", cwd=tmp_path)
    warnings = " ".join(json.loads(done.stdout)["warnings"])
    assert "anybody can send events" in warnings
    assert "the admin page is off" in warnings
    assert "no export uses [buckets.spare]" in warnings


@pytest.mark.parametrize(
    ("job", "alone"), [('["shop"]', {"blog", "faq"}), ('["shop", "faq"]', {"blog"}), ('["*"]', set())]
)
def test_check_warns_of_a_site_that_is_never_exported(tmp_path: Path, job: str, alone: set[str]) -> None:
    sites = "".join(f'[[sites]]\nid = "{site}"\n' for site in ("shop", "blog", "faq"))
    nas = '[buckets.nas]\nkind = "directory"\npath = "/mnt"\n'
    (tmp_path / "config.toml").write_text(f'{sites}{nas}[exports.nas]\nclient = "nas"\nsites = {job}\n')
    warnings = json.loads(appliance_command("check", "--json", cwd=tmp_path).stdout)["warnings"]
    assert {
        site for site in ("shop", "blog", "faq") if any(f'no export has the site "{site}"' in w for w in warnings)
    } == alone


@pytest.mark.parametrize(
    ("mode", "secret", "warned"),
    [
        pytest.param(0o644, '"hunter2hunter2"', True, id="everybody can read it"),
        pytest.param(0o640, '"hunter2hunter2"', False, id="a group can read it"),
        pytest.param(0o600, '"hunter2hunter2"', False, id="nobody else can read it"),
        pytest.param(0o644, '{ file = "secret" }', False, id="the secret is in a file of its own"),
    ],
)
def test_check_warns_of_secrets_that_every_user_can_read(
    tmp_path: Path, mode: int, secret: str, *, warned: bool
) -> None:
    (tmp_path / "secret").write_text("hunter2hunter2")
    (tmp_path / "config.toml").write_text(f"[admin]\npassword = {secret}\n")
    (tmp_path / "config.toml").chmod(mode)
    done = appliance_command("check", "--json", cwd=tmp_path)
    warnings = json.loads(done.stdout)["warnings"]
    assert any("config.toml holds secrets" in warning for warning in warnings) == warned
    assert "hunter2" not in done.stdout + done.stderr


def test_check_prints_json_where_the_configuration_is_wrong_too(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[server]\nbind = "x"\ndemo = 7\n')
    done = appliance_command("check", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert [problem.split(": ")[1] for problem in answer["problems"]] == ["server.bind", "server.demo"]


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        pytest.param({"path": "missing"}, True, id="a NAS that is not mounted"),
        pytest.param({"path": "."}, False, id="a directory"),
        pytest.param({"path": "data/export"}, False, id="one below the data directory, which is made"),
    ],
)
def test_check_warns_of_a_buckets_directory_that_is_not_there(
    appliance: Callable[..., Appliance], settings: dict[str, str], *, warned: bool
) -> None:
    box = appliance()
    box.config["buckets"] = {"nas": {"kind": "directory", "path": str(box.directory / settings["path"])}}
    warnings = json.loads(box.run("check", "--json").stdout)["warnings"]
    assert any("is not there: create or mount it" in warning for warning in warnings) == warned


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"region": "eu-central-1"}, True),
        ({}, True),
        ({"region": "us-east-1"}, False),
        ({"endpoint_url": "https://s3.example.com"}, False),
        ({"provider": "minio", "endpoint_url": "https://s3.example.com"}, False),
    ],
    ids=["at AWS", "at AWS, wherever", "in its oldest region", "with AWS's ways elsewhere", "at another provider"],
)
def test_only_at_aws_names_with_capitals_are_refused(
    appliance: Callable[..., Appliance], options: dict[str, str], *, refused: bool
) -> None:
    done = appliance(buckets={"acme": {"kind": "s3", "bucket": "Acme_Events", **options}}).run("check", check=False)
    assert (done.returncode == 2) == refused
    assert ("at AWS a name has 3 to 63 small letters" in done.stderr) == refused


@pytest.mark.parametrize("below", ["", "data"], ids=["a file", "below a file"])
def test_a_data_directory_that_is_a_file_is_told_as_such(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "config.toml").write_text(f'[server]\ndata_dir = "{tmp_path / "file" / below}"\n')
    for command in ("serve", "status"):
        done = appliance_command(command, cwd=tmp_path)
        assert done.returncode == 1
        assert "is a file, or lies below one: set server.data_dir to a directory" in done.stderr


def test_check_warns_of_a_data_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "config.toml").write_text(f'[server]\ndata_dir = "{tmp_path}/file/data"\n')
    assert (
        f"the data directory {tmp_path}/file/data cannot be written" in appliance_command("check", cwd=tmp_path).stdout
    )


@pytest.mark.parametrize("name", ["closed/data", "x" * 300], ids=["below a closed directory", "too long"])
def test_check_bears_a_data_directory_that_it_may_not_look_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "config.toml").write_text(f'[server]\ndata_dir = "{tmp_path}/{name}"\n')
    done = appliance_command("check", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["serve", "check", "export", "status"])
def test_every_command_reports_all_errors_of_the_configuration_at_once(command: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[server]\nport = 1\n[exports.acme]\nclient = "nowhere"\nschedule = "99 * * * *"\n'
    )
    done = appliance_command(command, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert sorted(done.stderr.splitlines()) == [
        'config.toml: exports.acme.client: no [buckets.nowhere] is defined (got "nowhere")',
        'config.toml: exports.acme.schedule: not a cron line: Bad minute (0 to 59) (got "99 * * * *")',
        "config.toml: server.port: there is no such option",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("frobnicate",), "No such command"),
        (("check", "--frobnicate"), "No such option"),
        (("check", "--config", "missing.toml"), "missing.toml: there is no such file"),
        (("backfill", "acme"), "Missing option '--from'"),
        (("backfill", "acme", "--from", "soon", "--to", "2026-01-01"), '"soon" is no time: write 2026-11-01'),
        (("backfill", "acme", "--from", "2026-01-02", "--to", "2026-01-01"), "it has to be later than --from"),
        (("backfill", "acme", "--from", "2026-01-02T09:00", "--to", "2026-01-02T09:00"), "later than --from"),
        (("restore",), "Missing argument 'BUCKET'"),
    ],
    ids=["command", "option", "file", "no time", "a wrong time", "an earlier end", "no time at all", "no bucket"],
)
def test_wrong_usage_ends_with_exit_code_2_and_no_traceback(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = appliance_command(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_that_cannot_be_reached_is_one_line_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        f'[server]\ndata_dir = "{tmp_path}"\n[database]\nurl = "postgresql://me:hunter2secret@127.0.0.1:1/x"\n'
    )
    done = appliance_command("status", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("appliance: the database does not answer")
    assert done.stderr.endswith("Connection refused; start that server, or correct host and port in database.url)\n")
    assert "hunter2secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_probe_asks_the_database_of_database_url(
    appliance: Callable[..., Appliance], conninfo: str, tmp_path: Path
) -> None:
    box = appliance(**on_disk(tmp_path, conninfo))
    assert "the database of database.url answers (PostgreSQL 18" in box.run("check", "--probe").stdout
    answer = json.loads(box.run("check", "--probe", "--json").stdout)
    assert (answer["ok"], answer["database"]["problem"]) == (True, "")


def test_a_probe_of_a_database_that_does_not_answer_fails_and_says_where_to_look(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    box = appliance(**on_disk(tmp_path, "postgresql://me:hunter2secret@127.0.0.1:1/x"))
    done = box.run("check", "--probe", check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("the database of database.url")]
    assert (done.returncode, "start that server, or correct host and port in database.url" in line) == (1, True)
    as_json = box.run("check", "--probe", "--json", check=False)
    assert (as_json.returncode, json.loads(as_json.stdout)["ok"]) == (1, False)
    assert "hunter2secret" not in done.stdout + done.stderr + as_json.stdout
    # Without being told to, `check` asks nobody.
    assert box.run("check").returncode == 0


def test_a_probe_says_what_a_database_lacks(
    appliance: Callable[..., Appliance], conn: psycopg.Connection[Any], conninfo: str, tmp_path: Path
) -> None:
    conn.execute(f"ALTER DATABASE {conn.info.dbname} SET default_transaction_read_only = on")
    conn.execute("DROP SCHEMA public CASCADE")
    done = appliance(**on_disk(tmp_path, conninfo)).run("check", "--probe", check=False)
    assert done.returncode == 1
    assert "it takes no writes, as a standby does" in done.stdout
    assert "may not make tables there" in done.stdout


# All that work on a database, but those that fill one.
ON_A_DATABASE = [
    ("backup", "all.dump"),
    ("export",),
    ("verify",),
    ("backfill", "local", "--from", "2026-01-01", "--to", "2026-01-02"),
    ("restore", "local", "--give-up"),
    ("move", "new.toml"),
    ("status", "--json"),
]


@pytest.mark.parametrize("words", ON_A_DATABASE, ids=[words[0] for words in ON_A_DATABASE])
@pytest.mark.parametrize("stands", [True, False], ids=["an empty data directory", "none"])
def test_a_command_that_needs_a_database_makes_none_where_there_is_none(
    words: tuple[str, ...], appliance: Callable[..., Appliance], tmp_path: Path, *, stands: bool
) -> None:
    box = appliance()
    if stands:
        box.data_dir.mkdir()
    (tmp_path / "new.toml").write_text(
        f'[server]\ndata_dir = "{box.data_dir}"\n[database]\nurl = "postgresql://me@127.0.0.1:1/x"\n'
    )
    done = box.run(*words, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"there is no database in {box.data_dir}: start the appliance first" in done.stderr
    assert not (tmp_path / "all.dump").exists()
    assert not list(box.data_dir.iterdir() if stands else box.directory.glob("data"))


@pytest.mark.parametrize("words", [("status",), ("backup", "all.dump")], ids=["status", "backup"])
def test_a_command_makes_no_tables_in_a_database_that_is_not_the_appliances(
    words: tuple[str, ...], appliance: Callable[..., Appliance], conn: psycopg.Connection[Any], conninfo: str
) -> None:
    conn.execute("DROP SCHEMA public CASCADE")
    conn.execute("CREATE SCHEMA public")
    done = appliance(database={"url": conninfo}).run(*words, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "holds no appliance's tables: start the appliance first, or correct database.url" in done.stderr
    assert conn.execute("SELECT to_regclass('installation')").fetchone() == (None,)


def test_a_command_serves_itself_with_the_database_of_an_appliance_that_has_stopped(
    appliance: Callable[..., Appliance],
) -> None:
    box = appliance().start()
    assert box.stop() == 0
    assert json.loads(box.run("status", "--json").stdout)["events"] == 0


def test_export_names_the_jobs_there_are_when_it_is_given_another(
    appliance: Callable[..., Appliance], conninfo: str
) -> None:
    done = appliance(database={"url": conninfo}).run("export", "acme", check=False)
    assert done.returncode == 2
    assert "there is no job acme (there are: local)" in done.stderr


def test_export_fails_when_one_bucket_does_and_still_fills_the_other(
    appliance: Callable[..., Appliance], db: Database, conninfo: str, s3: S3Server
) -> None:
    store_events(db, 3)
    bucket = s3.new_bucket()
    box = appliance(**two_buckets(conninfo, s3.settings(bucket), s3.settings("no-such-bucket")))
    done = box.run("export", check=False)
    assert done.returncode == 1
    assert "bucket b: cannot" in done.stdout
    assert "create the bucket, or correct `bucket`" in done.stdout
    assert len(s3.objects(bucket)) == 2


def test_a_job_that_cannot_go_on_keeps_no_other_from_being_exported(
    appliance: Callable[..., Appliance], db: Database, conninfo: str, tmp_path: Path
) -> None:
    store_events(db, 3)
    config = on_disk(tmp_path, conninfo)
    foreign = tmp_path / "nas" / "_manifests" / "acme" / "0000000001.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("of an installation that was lost")
    config["buckets"]["other"] = {"kind": "directory", "path": str(tmp_path / "other")}
    (tmp_path / "other").mkdir()
    config["exports"]["other"] = {"sites": ["*"], "client": "other"}
    box = appliance(**config)
    done = box.run("export", check=False)
    assert (done.returncode, done.stdout) == (1, "other: 3 events in 1 batch delivered\n")
    assert "acme: bucket nas is ahead" in done.stderr
    acme, other = json.loads(box.run("export", "--json", check=False).stdout)
    assert (acme["job"], acme["failed"], other["job"], other["failed"]) == ("acme", True, "other", False)
    assert "bucket nas is ahead" in acme["error"]


def test_status_shows_what_waits_and_what_failed(
    appliance: Callable[..., Appliance], db: Database, conninfo: str, s3: S3Server
) -> None:
    store_events(db, 3)
    box = appliance(**two_buckets(conninfo, s3.settings(s3.new_bucket()), s3.settings("no-such-bucket")))
    box.run("export", check=False)
    store_events(db, 2)
    state = json.loads(box.run("status", "--json").stdout)
    (job,) = state["jobs"]
    assert (state["events"], job["waiting"], job["exported"]) == (5, 5, 0)
    assert [(b["bucket"], b["delivered"], b["pending"]) for b in job["buckets"]] == [("a", 1, 0), ("b", 0, 1)]
    assert state["runs"][0]["outcome"] == "failed"
    assert "no-such-bucket" not in box.run("status").stderr


def test_status_shows_what_a_bucket_said_letter_by_letter(
    appliance: Callable[..., Appliance], conn: psycopg.Connection[Any], conninfo: str
) -> None:
    said = "cannot [/x] [bold]put[/bold] :key:"
    conn.execute("INSERT INTO export_runs (job, outcome, message) VALUES ('acme', 'failed', %s)", (said,))
    assert said in appliance(database={"url": conninfo}).run("status").stdout


def test_status_says_why_a_job_stands_still_where_no_delivery_bears_the_reason(
    appliance: Callable[..., Appliance], conn: psycopg.Connection[Any], conninfo: str, db: Database, tmp_path: Path
) -> None:
    store_events(db, 1)
    box = appliance(**on_disk(tmp_path, conninfo))
    box.run("export")
    conn.execute("DROP SCHEMA public CASCADE")
    conn.execute("CREATE SCHEMA public")
    migrate(conn)
    store_events(db, 1)
    box.run("export", check=False)
    exports = box.run("status").stdout.partition("Exports")[2].partition("Last runs")[0]
    assert "bucket nas is ahead: _manifests/acme/0000000001.json" in exports


def test_status_names_the_transaction_that_holds_exports_back(
    appliance: Callable[..., Appliance], db: Database, conninfo: str
) -> None:
    store_events(db, 1)
    with psycopg.connect(conninfo, application_name="forgotten") as dawdler:
        dawdler.execute("DELETE FROM events_log WHERE false")
        box = appliance(database={"url": conninfo})
        report = json.loads(box.run("export", "--json").stdout)
        assert [blocker["application"] for blocker in report[0]["blockers"]] == ["forgotten"]
        assert report[0]["blockers"][0]["pid"] == dawdler.info.backend_pid
    report = json.loads(box.run("export", "--json").stdout)
    assert report[0]["row_count"] == 1


def two_buckets(conninfo: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {
        "database": {"url": conninfo},
        "buckets": {"a": first, "b": second},
        "exports": {"acme": {"client": "a", "backup": "b"}},
    }


def test_verify_tells_damage_by_its_exit_code_and_repairs_what_is_missing(
    appliance: Callable[..., Appliance], conninfo: str, db: Database, tmp_path: Path
) -> None:
    (tmp_path / "bucket").mkdir()
    buckets = {"nas": {"kind": "directory", "path": str(tmp_path / "bucket")}}
    box = appliance(database={"url": conninfo}, buckets=buckets, exports={"acme": {"client": "nas"}})
    store_events(db, 3)
    box.run("export", "acme")
    assert box.run("verify").stdout.endswith("0 found wrong\n")
    (written,) = (tmp_path / "bucket").rglob("*.jsonl.gz")
    written.unlink()
    damaged = box.run("verify", "acme", check=False)
    assert damaged.returncode == 3
    assert "acme: missing: bucket nas: site=shop/" in damaged.stdout
    (verdict,) = json.loads(box.run("verify", "--json", check=False).stdout)
    assert [finding["kind"] for finding in verdict["findings"]] == ["missing"]
    repaired = box.run("verify", "--repair").stdout
    assert "acme: missing: bucket nas: site=shop/" in repaired
    assert repaired.splitlines()[0].endswith("it belongs to batch acme 1; delivered again")
    assert repaired.endswith(", 1 found wrong, 1 repaired\n")
    assert written.exists()
    assert box.run("verify").stdout.endswith(" read (" + size_of(tmp_path / "bucket") + "), 0 found wrong\n")
    unknown = box.run("verify", "other", check=False)
    assert (unknown.returncode, "there is no job other (there are: acme)" in unknown.stderr) == (2, True)


def size_of(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.rglob('*') if path.is_file())} bytes"


def test_verify_tells_scripts_what_was_repaired_and_what_was_not(
    appliance: Callable[..., Appliance], conninfo: str, db: Database, tmp_path: Path
) -> None:
    box = appliance(**on_disk(tmp_path, conninfo))
    store_events(db, 3)
    box.run("export")
    (lost,) = (tmp_path / "nas").rglob("*.jsonl.gz")
    lost.unlink()
    (altered,) = (tmp_path / "vault").rglob("*.jsonl.gz")
    altered.write_bytes(altered.read_bytes()[:-1])
    done = box.run("verify", "--repair", "--json", check=False)
    assert done.returncode == 3
    (verdict,) = json.loads(done.stdout)
    found = [(one["kind"], one["bucket"], one["repaired"]) for one in verdict["findings"]]
    assert found == [("missing", "nas", True), ("altered", "vault", False)]
    assert len(verdict["unrepaired"]) == 1
    assert altered.name in verdict["unrepaired"][0]


def test_verify_says_so_where_nothing_was_exported_yet(
    appliance: Callable[..., Appliance], conninfo: str, tmp_path: Path
) -> None:
    assert appliance(**on_disk(tmp_path, conninfo)).run("verify").stdout == "acme: nothing exported yet\n"


def test_verify_notices_full_buckets_of_which_an_empty_database_knows_nothing(
    appliance: Callable[..., Appliance], conn: psycopg.Connection[Any], conninfo: str, db: Database, tmp_path: Path
) -> None:
    box = appliance(**on_disk(tmp_path, conninfo))
    for _ in range(2):
        store_events(db, 3)
        box.run("export")
    conn.execute("DROP SCHEMA public CASCADE")
    conn.execute("CREATE SCHEMA public")
    migrate(conn)
    done = box.run("verify", check=False)
    assert (done.returncode, done.stdout.splitlines()) == (
        1,
        [
            f"acme: bucket {name} is ahead: _manifests/acme/0000000001.json stands there, and this ledger does not "
            f"know it: restore from it (appliance restore {name}), or choose another prefix"
            for name in ("nas", "vault")
        ],
    )
    box.run("restore", "nas")
    box.run("export")
    assert box.run("verify").stdout.endswith(" 0 found wrong\n")


def on_disk(directory: Path, conninfo: str) -> dict[str, Any]:
    """A job with a client and a backup bucket on the disk."""
    buckets = {}
    for name in ("nas", "vault"):
        (directory / name).mkdir(exist_ok=True)
        buckets[name] = {"kind": "directory", "path": str(directory / name)}
    job = {"client": "nas", "backup": "vault"}
    return {"database": {"url": conninfo}, "buckets": buckets, "exports": {"acme": job}}


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_backfill_says_what_it_would_deliver_and_then_delivers_it(
    appliance: Callable[..., Appliance], conninfo: str, db: Database, tmp_path: Path
) -> None:
    box = appliance(**on_disk(tmp_path, conninfo))
    store_events(db, 3)
    box.run("export")
    before = files(tmp_path / "vault")
    shutil.rmtree(tmp_path / "vault")
    (tmp_path / "vault").mkdir()
    today = datetime.now(UTC).date()
    words = ("backfill", "acme", "--from", str(today - timedelta(days=1)), "--to", str(today))
    planned = box.run(*words, "--dry-run").stdout.splitlines()
    assert planned == ["batch acme 1: 3 events to nas and vault", "1 batch would be delivered"]
    assert files(tmp_path / "vault") == {}
    assert json.loads(box.run(*words, "--json").stdout) == {
        "job": "acme",
        "dry_run": False,
        "batches": [{"sequence": 1, "rows": 3, "buckets": ["nas", "vault"]}],
        "problems": [],
    }
    assert files(tmp_path / "vault") == before
    nothing = box.run("backfill", "acme", "--from", "2001-01-01", "--to", "2001-01-01")
    assert nothing.stdout == "no batch holds events that arrived then\n"
    for wrong in (("backfill", "other", *words[2:]), (*words, "--bucket", "tape")):
        assert box.run(*wrong, check=False).returncode == 2


def test_restore_rebuilds_a_new_installation_and_tells_damage_by_its_exit_code(
    appliance: Callable[..., Appliance], conninfo: str, db: Database, tmp_path: Path
) -> None:
    box = appliance(**on_disk(tmp_path, conninfo))
    for _ in range(2):
        store_events(db, 3)
        box.run("export")
    config = on_disk(tmp_path, conninfo)
    del config["database"]
    fresh = appliance(**config)
    (written,) = (tmp_path / "vault").rglob("acme-0000000001-0001.*")
    content = written.read_bytes()
    written.write_bytes(b"x" + content[1:])
    damaged = fresh.run("restore", "vault", check=False)
    assert damaged.returncode == 3
    assert damaged.stdout.splitlines()[0].startswith("damaged: batch acme 1: site=shop/")
    assert damaged.stdout.splitlines()[-1] == "3 events of 1 batch brought back from bucket vault"
    assert damaged.stderr.splitlines()[-1] == "1 of 2: batch acme 1"
    written.write_bytes(content)
    outcome = json.loads(fresh.run("restore", "vault", "--json").stdout)
    assert (outcome["batches"], outcome["rows"], outcome["damage"]) == (1, 3, [])
    assert json.loads(fresh.run("status", "--json").stdout)["events"] == 6
    assert fresh.run("export").stdout == "acme: 6 events in 2 batches delivered\n"
    assert fresh.run("restore", "vault").stdout.startswith(
        "nothing to bring back: the ledger has every batch of bucket"
    )
    unknown = fresh.run("restore", "tape", check=False)
    assert (unknown.returncode, "there is no bucket tape" in unknown.stderr) == (2, True)
    assert fresh.run("restore", "vault", "--give-up").stdout.startswith("given up")
    given_up = fresh.run("restore", "vault", "--give-up", "--json").stdout
    assert json.loads(given_up) == {"bucket": "vault", "given_up": True}


def test_on_a_terminal_long_work_shows_a_bar_that_is_gone_afterwards(
    appliance: Callable[..., Appliance], conninfo: str, db: Database, tmp_path: Path
) -> None:
    box = appliance(**on_disk(tmp_path, conninfo))
    store_events(db, 3)
    box.run("export")
    shown = on_a_terminal([sys.executable, "-m", "appliance", "verify"], box.directory)
    assert "0 found wrong" in shown
    assert "/2" in shown
    assert "\x1b[2K" in shown


def test_on_a_terminal_a_backup_shows_that_it_is_at_work(
    appliance: Callable[..., Appliance], conninfo: str, tmp_path: Path
) -> None:
    box = appliance(**on_disk(tmp_path, conninfo))
    box.write_config()
    shown = on_a_terminal([sys.executable, "-m", "appliance", "backup", "all.dump"], box.directory)
    assert re.search(r"\x1b\[2K.*all\.dump: \d+ bytes", shown, re.DOTALL)


def on_a_terminal(command: list[str], directory: Path) -> str:
    """Run a command and return all that its terminal was sent."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, cwd=directory, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        # The other end of a terminal that is gone is an error on Linux, not an end.
        with suppress(OSError):
            while piece := os.read(ours, 65536):
                shown += piece
        assert process.wait(60) == 0
    os.close(ours)
    return shown.decode()
