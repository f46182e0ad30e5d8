"""Alerts: told once when something goes wrong and once when it is over, whatever is restarted in between."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Appliance, S3Server, http, make_settings, store_events, wait_for
from exporting import World, failing
from exporting import watch as watched
from signals import TOKEN, Listener, listening, run_apart, scrape

from appliance.alerts import conditions
from appliance.alerts.board import Board
from appliance.alerts.conditions import Alert, Exports, Room
from appliance.alerts.sender import secret_parts
from appliance.alerts.sending import send
from appliance.alerts.watch import Watch
from appliance.config import Alerts
from appliance.errors import BucketError
from appliance.store.figures import Backlog, FailedRuns, FailingBucket

Conn = psycopg.Connection[Any]

DOWN = BucketError("bucket vault: it is down")
NOW = datetime(2026, 11, 5, 12, 0, tzinfo=UTC)
GB = 1024**3


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as one:
        yield one


# -- what is wrong -----------------------------------------------------------------------------------------------------


def room(*, free: float = 50, used: float = 0) -> Room:
    """Percent of the disk and of the spool."""
    return Room(disk_path="/data", disk_free=int(free * GB), disk_size=100 * GB, spool_used=int(used), spool_size=100)


@pytest.mark.parametrize(
    ("now", "active", "found"),
    [
        (room(), set(), set()),
        (room(free=10.1), set(), set()),
        (room(free=9.9), set(), {"disk"}),
        # What comes and goes at the threshold is told once.
        (room(free=11), {"disk"}, {"disk"}),
        (room(free=12.1), {"disk"}, set()),
        (room(used=50), set(), set()),
        (room(used=51), set(), {"spool"}),
        (room(used=26), {"spool"}, {"spool"}),
        (room(used=25), {"spool"}, set()),
        (room(free=1, used=99), set(), {"disk", "spool"}),
    ],
)
def test_disk_and_spool_fill_up_at_their_thresholds(now: Room, active: set[str], found: set[str]) -> None:
    assert set(conditions.of_room(now, Alerts(), active=active)) == found


def test_a_threshold_of_zero_is_none() -> None:
    off = Alerts(disk_free_percent=0, spool_used_percent=0, exports_late_minutes=0)
    assert conditions.of_room(room(free=0, used=100), off, active={"disk", "spool"}) == {}
    waits = Exports(backlog=[Backlog(job="acme", events=1, oldest=NOW - timedelta(days=9))])
    assert conditions.of_exports(waits, off, {}, now=NOW) == {}


@pytest.mark.parametrize(
    ("schedule", "arrived", "minutes"),
    [
        ("5 * * * *", "2026-11-05T11:06", 0),
        ("5 * * * *", "2026-11-05T11:04", 55),
        ("5 * * * *", "2026-11-05T08:30", 175),
        # A week is no delay where exports are weekly.
        ("0 3 * * 0", "2026-11-01T03:00", 0),
        ("0 3 * * 0", "2026-11-01T02:59", 4 * 24 * 60 + 9 * 60),
        ("5 11 * * *", "2026-11-05T11:05", 0),
    ],
)
def test_exports_are_late_since_the_first_run_that_should_have_had_the_event(
    schedule: str, arrived: str, minutes: int
) -> None:
    oldest = datetime.fromisoformat(arrived).replace(tzinfo=UTC)
    backlog = [Backlog(job="acme", events=3, oldest=oldest), Backlog(job="empty", events=0, oldest=None)]
    assert conditions.lags(backlog, {"acme": schedule}, now=NOW) == {"acme": timedelta(minutes=minutes)}
    late = conditions.of_exports(Exports(backlog=backlog), Alerts(), {"acme": schedule}, now=NOW)
    assert set(late) == ({"late:acme"} if minutes > 120 else set())


def test_a_job_fails_when_its_runs_or_one_of_its_buckets_failed_often_in_a_row() -> None:
    def found(exports: Exports) -> dict[str, str]:
        return {key: alert.text for key, alert in conditions.of_exports(exports, Alerts(), {}, now=NOW).items()}

    def runs(number: int) -> Exports:
        return Exports(failed_runs=[FailedRuns(job="acme", number=number, message="no way")])

    def bucket(number: int) -> Exports:
        return Exports(failing_buckets=[FailingBucket(job="acme", bucket="vault", number=number, error="no way")])

    assert found(runs(2)) == found(bucket(2)) == {}
    assert found(runs(3)) == {"failing:acme": "3 runs have failed in a row; the last one said: no way"}
    assert found(bucket(4)) == {"failing:acme": "Bucket vault has failed 4 times in a row: no way"}


# -- told once ---------------------------------------------------------------------------------------------------------

FIRE = {"disk": Alert("the disk is filling up", "3 % are left.")}


class Told(list[str]):
    """Takes messages, or is not there."""

    there = True

    def tell(self, alert: Alert) -> bool:
        if self.there:
            self.append(alert.title)
        return self.there


def everything(_key: str) -> bool:
    return True


def test_what_is_wrong_is_told_once_and_that_it_is_over_once(tmp_path: Path) -> None:
    told = Told()
    for holding in ({}, FIRE, FIRE, FIRE, {}, {}, FIRE):
        # A new board each time: a restart forgets nothing.
        Board(tmp_path, told.tell).settle(holding, everything)
    first = "the disk is filling up"
    assert told == [first, f"over: {first}", first]


def test_what_nobody_heard_is_told_again_and_never_only_its_end(tmp_path: Path) -> None:
    told = Told()
    board = Board(tmp_path, told.tell)
    told.there = False
    board.settle(FIRE, everything)
    board.settle({}, everything)
    told.there = True
    board.settle({}, everything)
    assert told == []
    told.there = False
    board.settle(FIRE, everything)
    told.there = True
    board.settle(FIRE, everything)
    told.there = False
    board.settle({}, everything)
    told.there = True
    board.settle({}, everything)
    assert told == ["the disk is filling up", "over: the disk is filling up"]


def test_what_is_wrong_again_before_anybody_heard_the_end_goes_on(tmp_path: Path) -> None:
    told = Told()
    board = Board(tmp_path, told.tell)
    board.settle(FIRE, everything)
    told.there = False
    board.settle({}, everything)
    told.there = True
    board.settle(FIRE, everything)
    assert told == ["the disk is filling up"]
    assert board.active() == {"disk"}


def test_a_disk_that_is_too_full_to_note_it_is_told_of_once(tmp_path: Path) -> None:
    told = Told()
    board = Board(tmp_path, told.tell)
    board.settle({}, everything)
    board.settle({"other": FIRE["disk"]}, everything)
    # Nothing can be written under this name any more.
    (tmp_path / "alerts.new").mkdir()
    for _ in range(5):
        board.settle({**FIRE, "other": FIRE["disk"]}, everything)
    (tmp_path / "alerts.new").rmdir()
    board.settle({"other": FIRE["disk"]}, everything)
    assert told == ["the disk is filling up"] * 2 + ["over: the disk is filling up"]
    assert Board(tmp_path, told.tell).active() == {"other"}


def test_what_cannot_be_judged_now_stays_as_it_was(tmp_path: Path) -> None:
    told = Told()
    board = Board(tmp_path, told.tell)
    board.settle({"late:acme": Alert("late", "so late"), **FIRE}, everything)
    board.settle({}, lambda key: key == "disk")
    assert told == ["late", "the disk is filling up", "over: the disk is filling up"]
    assert board.active() == {"late:acme"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"disk": {"colour": "red"}}', '{"disk": 7}', "\x00"])
def test_a_damaged_file_only_makes_it_told_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "alerts.json").write_text(content)
    told = Told()
    for _ in range(2):
        Board(tmp_path, told.tell).settle(FIRE, everything)
    assert told == ["the disk is filling up"]


def test_a_board_that_cannot_be_written_still_tells_once() -> None:
    told = Told()
    board = Board(Path("/proc/nowhere"), told.tell)
    for holding in (FIRE, FIRE, {}, {}):
        board.settle(holding, everything)
    assert told == ["the disk is filling up", "over: the disk is filling up"]


# -- sending -----------------------------------------------------------------------------------------------------------


def test_a_message_reaches_a_server(listener: Listener) -> None:
    (sent,) = send([listener.url], Alert("export acme fails", 'Bucket "vault" <b>is</b> down: \u00e9'))
    assert sent.problem == ""
    (message,) = listener.messages
    assert message["title"] == "Appliance: export acme fails"
    assert message["message"] == 'Bucket "vault" <b>is</b> down: \u00e9'
    assert message["type"] == "warning"


def test_one_url_that_fails_or_hangs_keeps_no_message_from_the_others(listener: Listener) -> None:
    with listening() as hangs, listening() as refuses:
        hangs.hangs, refuses.status = True, 500
        # (apprise itself would give up after 4 s.)
        urls = [f"{hangs.url}?rto=60", refuses.url, "nothing://of-the-kind", listener.url]
        started = time.monotonic()
        sent = send(urls, Alert("a", "b"), seconds=8)
    assert time.monotonic() - started < 30
    assert listener.titles == ["Appliance: a"]
    assert [(one.number, one.service) for one in sent] == [(1, "json"), (2, "json"), (3, "nothing"), (4, "json")]
    hung, refused, unknown, went = (one.problem for one in sent)
    assert hung == "it did not answer within 8 s"
    assert "500" in refused
    assert unknown == "ValueError: apprise knows no such service, or the address lacks something"
    assert went == ""
    for one in sent:
        assert "key-that-nobody-may-see" not in one.line


def test_every_part_of_a_url_is_taken_for_a_secret() -> None:
    url = "discord://1234567890/pa%20ss%2Fword?thread=998877&format=text"
    assert {url, "1234567890", "pa%20ss%2Fword", "pa ss/word", "998877"} <= set(secret_parts(url))


def test_apprise_is_loaded_only_in_the_process_that_sends() -> None:
    code = (
        "import sys, appliance.server, appliance.cli, appliance.export.verify; assert 'apprise' not in sys.modules;"
        "import appliance.alerts.sender; assert 'apprise' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- exports -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(db: Any, conn: Conn, s3: S3Server, tmp_path: Path) -> World:
    return World(db, conn, s3, tmp_path)


def look(world: World, listener: Listener, **health: Any) -> Watch:
    """Look once as an appliance does that has just been started."""
    data_dir = world.directory / "data"
    data_dir.mkdir(exist_ok=True)
    settings = make_settings(
        server={"data_dir": str(data_dir)},
        buckets=world.tables,
        exports=world.jobs,
        alerts={"urls": [listener.url]},
        health=health,
    )
    one = Watch(settings, world.db, room=room)
    one.look()
    return one


def run(world: World, *, down: bool = False) -> None:
    exporter = world.exporter()
    if down:
        watched(exporter, failing(DOWN), "vault")
    assert run_apart(exporter).failed is down


def test_a_bucket_that_fails_again_and_again_is_told_once_until_it_goes_well(world: World, listener: Listener) -> None:
    store_events(world.db, 3)
    for _ in range(2):
        run(world, down=True)
    look(world, listener)
    assert listener.titles == []
    run(world, down=True)
    look(world, listener)
    run(world, down=True)
    look(world, listener)
    (message,) = listener.messages
    assert message["title"] == "Appliance: export acme fails"
    assert message["message"].startswith("Bucket vault has failed 3 times in a row: bucket vault: it is down (since 20")
    run(world)
    look(world, listener)
    look(world, listener)
    assert listener.titles[1:] == ["Appliance: over: export acme fails"]
    assert listener.messages[1]["type"] == "success"


def test_runs_that_crash_are_told_too(world: World, listener: Listener) -> None:
    for number in range(3):
        look(world, listener)
        assert listener.titles == [], number
        store_events(world.db, 1)
        broken = watched(world.exporter(), failing(ZeroDivisionError("so it is")), "vault")
        with pytest.raises(ZeroDivisionError):
            run_apart(broken)
    look(world, listener)
    (message,) = listener.messages
    assert message["message"].startswith("3 runs have failed in a row; the last one said: so it is")
    run(world)
    look(world, listener)
    assert listener.titles[1:] == ["Appliance: over: export acme fails"]


def test_late_exports_are_told_and_known_to_the_health_check(world: World, listener: Listener) -> None:
    run(world)
    store_events(world.db, 2, created_at=datetime.now(UTC) - timedelta(hours=5))
    assert look(world, listener).late_jobs == ()
    (message,) = listener.messages
    assert message["title"] == "Appliance: exports of acme are late"
    assert message["message"].startswith("2 events wait, the oldest since 20")
    assert look(world, listener, max_export_lag_minutes=200).late_jobs == ("acme",)
    assert look(world, listener, max_export_lag_minutes=600).late_jobs == ()
    run(world)
    assert look(world, listener, max_export_lag_minutes=200).late_jobs == ()
    assert listener.titles[1:] == ["Appliance: over: exports of acme are late"]


def test_a_secret_in_what_a_bucket_said_is_not_sent(world: World, listener: Listener) -> None:
    store_events(world.db, 1)
    secret = str(world.tables["vault"]["secret_access_key"])
    for _ in range(3):
        run_apart(watched(world.exporter(), failing(BucketError(f"it said {secret}")), "vault"))
    look(world, listener)
    assert "it said ***" in listener.messages[0]["message"]
    assert secret not in json.dumps(listener.messages)


# -- as processes ------------------------------------------------------------------------------------------------------


def start_without_database(box: Appliance) -> None:
    command = [sys.executable, "-m", "appliance", "serve", "--config", str(box.write_config())]
    with (box.directory / "log").open("a") as log:
        box.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)

    def looked() -> bool:
        try:
            return scrape(box).value("alerts_looked_timestamp_seconds") is not None
        except OSError:
            return False

    wait_for(looked, "the first look for alerts")


def test_a_spool_that_fills_up_is_told_once_over_a_restart(
    appliance: Callable[..., Appliance], listener: Listener
) -> None:
    box = appliance(
        database={"url": "postgresql://nobody@127.0.0.1:1/none"},
        admin={"token": TOKEN},
        collect={"spool_max_bytes": 1024 * 1024},
        alerts={"urls": [listener.url], "disk_free_percent": 0},
    )
    start_without_database(box)
    assert listener.titles == []
    event = {"eventType": "click", "siteId": "shop", "text": "x" * 60_000}
    for _ in range(10):
        assert http(box, "POST", "/collect", json.dumps(event).encode(), {"Content-Type": "text/plain"}).status == 202
    kept = box.data_dir / "alerts.json"
    wait_for(lambda: kept.exists() and '"told": true' in kept.read_text(), "the alert to be told")
    box.stop()
    start_without_database(box)
    assert listener.titles == ["Appliance: the spool is filling up"]
    assert "alert: the spool is filling up" in box.log
    assert "key-that-nobody-may-see" not in box.log


def test_damage_that_verify_finds_is_told_once_and_so_is_its_repair(
    appliance: Callable[..., Appliance], listener: Listener
) -> None:
    box = appliance(alerts={"urls": [listener.url], "disk_free_percent": 0}).start()
    http(box, "POST", "/collect", b'{"eventType": "click", "siteId": "shop"}', {"Content-Type": "text/plain"})
    box.run("export")
    box.run("verify")
    assert listener.titles == []
    (lost,) = (box.data_dir / "export").rglob("*.jsonl.gz")
    lost.unlink()
    for _ in range(2):
        assert box.run("verify", check=False).returncode == 3
    (message,) = listener.messages
    assert message["title"] == "Appliance: verify found damage in the exports of local"
    assert message["message"].startswith("missing: local site=shop/")
    box.run("verify", "--repair")
    assert lost.exists()
    box.run("verify")
    assert listener.titles[1:] == ["Appliance: over: verify found damage in the exports of local"]


def test_a_probe_says_of_each_url_whether_a_test_went(appliance: Callable[..., Appliance], listener: Listener) -> None:
    box = appliance(alerts={"urls": [listener.url]})
    (box.data_dir / "export").mkdir(parents=True)
    done = box.run("check", "--probe")
    assert "alerts.urls 1 (json): the message was sent" in done.stdout
    assert listener.titles == ["Appliance: a test"]
    listener.status = 403
    box.config["alerts"]["urls"] = ["json://127.0.0.1:1/token-of-mine", listener.url]
    done = box.run("check", "--probe", "--json", check=False)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert [(one["number"], one["service"], bool(one["problem"])) for one in answer["alerts"]] == [
        (1, "json", True),
        (2, "json", True),
    ]
    assert "403" in answer["alerts"][1]["problem"]
    assert "token-of-mine" not in done.stdout + done.stderr
    assert "alerts" not in json.loads(box.run("check", "--json").stdout)
