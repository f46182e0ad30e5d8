"""The parts that the windows are made of: guesses, pictures, words, the verdict, and what they read."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import make_event, make_settings, store_events, wait_for

from appliance.admin import auth, charts, filters, passwords, verdict
from appliance.admin.guesses import ALL_GUESSES, CLIENT_GUESSES, LONGEST_LOCK_SECONDS, WINDOW_SECONDS, Guesses
from appliance.admin.sessions import over_tls
from appliance.admin.verdict import Disk
from appliance.admin.views import overview as overview_page
from appliance.config import Settings
from appliance.config.explain import explain
from appliance.errors import ApplianceError, BucketError
from appliance.export.buckets.probe import Probe
from appliance.export.errands import Errands
from appliance.export.verify import Verdict
from appliance.store import events, history, overview
from appliance.store.database import Database
from appliance.store.history import SlotCount
from appliance.store.overview import BucketState, JobState, Overview
from appliance.store.runs import Run

NOON = datetime(2026, 3, 4, 12, 0, 30, tzinfo=UTC)


# ---- guesses


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_after_ten_wrong_passwords_each_further_one_closes_the_form_for_twice_as_long() -> None:
    clock = Clock()
    guesses = Guesses(clock)
    assert [guesses.allow("a") for _ in range(CLIENT_GUESSES)] == [0] * CLIENT_GUESSES
    waits = []
    for _ in range(9):
        waits.append(guesses.allow("a"))
        clock.now += waits[-1] - 1
        assert guesses.allow("a") == 1
        clock.now += 1
        assert guesses.allow("a") == 0
    assert waits[:4] == [WINDOW_SECONDS, 2 * WINDOW_SECONDS, 4 * WINDOW_SECONDS, 8 * WINDOW_SECONDS]
    assert waits[-1] == LONGEST_LOCK_SECONDS
    assert guesses.allow("b") == 0


def test_guesses_are_forgotten_with_the_right_password_or_after_an_hour_without_one() -> None:
    clock = Clock()
    guesses = Guesses(clock)
    for _ in range(CLIENT_GUESSES):
        guesses.allow("a")
    guesses.forgive("b")
    assert guesses.allow("a") > 0
    guesses.forgive("a")
    assert [guesses.allow("a") for _ in range(CLIENT_GUESSES)] == [0] * CLIENT_GUESSES
    clock.now += 60 + 3600
    assert [guesses.allow("a") for _ in range(CLIENT_GUESSES)] == [0] * CLIENT_GUESSES


def test_many_addresses_together_cannot_guess_without_end() -> None:
    clock = Clock()
    guesses = Guesses(clock)
    allowed = [guesses.allow(f"192.0.2.{number}") for number in range(10 * ALL_GUESSES)]
    assert allowed.count(0) == ALL_GUESSES
    assert 0 < guesses.allow("198.51.100.1") <= WINDOW_SECONDS
    clock.now += WINDOW_SECONDS
    assert guesses.allow("198.51.100.1") == 0


def test_a_hash_knows_its_password_and_no_other() -> None:
    made = passwords.hashed("pässword")
    assert passwords.is_hash(made)
    assert passwords.matches("pässword", made)
    assert not passwords.matches("password", made)
    assert not passwords.matches(made, made)
    assert not passwords.matches("\ud800", made)


def test_many_who_log_in_at_once_hold_few_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = threading.Event()
    monkeypatch.setattr(auth, "matches", lambda *_: not checked.wait(60))
    monkeypatch.setattr(auth, "_BUSY_SECONDS", 60)
    settings = make_settings(admin={"password": passwords.hashed("a password")})
    door = auth.Auth(settings.admin, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        guesses = [pool.submit(door.log_in, "a guess", "192.0.2.1") for _ in range(8)]
        wait_for(lambda: sum(guess.done() for guess in guesses) == 5, "those for whom there is no room")
        checked.set()
    answers = [guess.result() for guess in guesses]
    assert (answers.count(None), answers.count(False)) == (5, 3)


@pytest.mark.parametrize(
    ("environ", "secure"),
    [
        ({}, False),
        ({"wsgi.url_scheme": "https"}, True),
        ({"HTTP_X_FORWARDED_PROTO": "https"}, True),
        ({"HTTP_X_FORWARDED_PROTO": "https, http"}, True),
        ({"HTTP_X_FORWARDED_PROTO": "http"}, False),
        ({"HTTP_FORWARDED": 'for=192.0.2.1;proto="https"'}, True),
    ],
)
def test_what_the_proxy_says_of_tls_is_heard(environ: dict[str, str], secure: bool) -> None:  # noqa: FBT001 - a case
    assert over_tls({"wsgi.url_scheme": "http", **environ}) is secure


# ---- pictures and words


def test_bars_stack_by_site_and_fill_the_height_at_the_peak() -> None:
    minute = NOON.replace(second=0)
    counts = [
        SlotCount(minute, "shop", 30),
        SlotCount(minute, "blog", 10),
        SlotCount(minute - timedelta(minutes=1), "shop", 20),
        SlotCount(minute - timedelta(minutes=60), "shop", 99),
    ]
    colours = charts.colours_of(counts)
    picture = charts.draw(counts, colours, end=NOON, slot=timedelta(minutes=1), slots=60)
    assert colours == {"shop": 0, "blog": 1}
    assert (picture.total, picture.peak, picture.peak_at) == (60, 40, minute)
    assert (picture.first, picture.last) == (minute - timedelta(minutes=59), minute)
    assert [(bar.x, bar.y, bar.height, bar.colour) for bar in picture.bars] == [
        (581, 50.0, 50.0, 0),
        (591, 25.0, 75.0, 0),
        (591, 0.0, 25.0, 1),
    ]


def test_the_quieter_of_many_sites_share_one_colour() -> None:
    counts = [SlotCount(NOON, f"site{number}", 100 - number) for number in range(9)]
    colours = charts.colours_of(counts)
    assert [colours[f"site{number}"] for number in range(9)] == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    picture = charts.draw(counts, colours, end=NOON, slot=timedelta(days=1), slots=28)
    assert [bar.colour for bar in picture.bars] == [0, 1, 2, 3, 4, 5]


def test_without_events_there_is_no_bar_and_no_peak() -> None:
    picture = charts.draw([], {}, end=NOON, slot=timedelta(days=1), slots=28)
    assert (picture.bars, picture.total, picture.peak, picture.peak_at) == ((), 0, 0, None)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (25_000, "25 KB"), (3_200_000_000, "3.2 GB")],
)
def test_sizes_are_said_as_people_say_them(value: int, said: str) -> None:
    assert filters.size(value).replace("\u202f", " ") == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(5, "5 s ago"), (300, "5 min ago"), (7300, "2 h ago"), (300_000, "3 days ago"), (-90, "in 90 s")],
)
def test_moments_are_said_by_their_distance(seconds: int, said: str) -> None:
    assert filters.ago(NOON - timedelta(seconds=seconds), NOON).replace("\u202f", " ") == said


def test_control_characters_and_changes_of_direction_are_shown_as_what_they_are_not() -> None:
    assert filters.text(b"a\x00\x1b[2J\xff\n{}") == "a\ufffd\ufffd[2J\ufffd\n{}"
    assert filters.text("\u202eevil") == "\ufffdevil"
    assert filters.text(None) == ""


# ---- the verdict


def state_with(*buckets: BucketState, **other: Any) -> Overview:
    job = JobState(job="acme", active=True, waiting=0, exported=5, buckets=buckets)
    return Overview(**{"sites": (), "jobs": (job,), "runs": (), "open_writers": (), "restoring": None, **other})


def bucket_state(**fields: Any) -> BucketState:
    values = {"delivered": 3, "pending": 0, "last_delivered_at": NOON, "last_error": None, "retry_at": None}
    return BucketState(job="acme", bucket="vault", **{**values, **fields})


def judge(state: Overview, **other: Any) -> verdict.Verdict:
    settings = make_settings(sites=[{"id": "shop"}])
    values: dict[str, Any] = {"last_runs": {}, "disk": Disk(500_000_000_000, 10**12), "warnings": []}
    return verdict.of(settings, state, **{**values, **other})


def failed_run() -> Run:
    return Run(
        job="acme",
        started_at=NOON,
        finished_at=NOON,
        outcome="failed",
        batches=0,
        row_count=0,
        message="bucket is ahead",
    )


def test_all_is_well_where_nothing_is_wrong() -> None:
    judged = judge(state_with(bucket_state(last_error="an old one")))
    assert (judged.headline, judged.troubles, judged.hints) == ("All is well.", (), ())


def test_a_bucket_that_fails_is_told_once_with_its_reason_and_its_next_try() -> None:
    broken = bucket_state(pending=2, last_error="bucket vault: it is full", retry_at=NOON)
    judged = judge(state_with(broken), last_runs={"acme": failed_run()})
    assert judged.headline == "One thing needs you."
    assert judged.troubles[0].what == "Bucket vault is missing 2 batches of job acme."
    assert judged.troubles[0].why == "It is full."
    assert "2026-03-04 12:00 UTC" in judged.troubles[0].advice


def test_everything_that_is_wrong_is_named() -> None:
    judged = judge(
        state_with(restoring="vault"),
        last_runs={"acme": failed_run()},
        disk=Disk(900_000_000, 10**12),
        warnings=["the scheduler does not run"],
    )
    assert judged.headline == "4 things need you."
    text = " ".join(f"{one.what} {one.why}" for one in judged.troubles)
    for words in ("The scheduler does not run.", "restore from bucket vault", "Bucket is ahead.", "left on the disk"):
        assert words in text


def test_a_site_that_nobody_exports_is_a_hint_and_no_trouble() -> None:
    settings = make_settings(
        sites=[{"id": "shop"}, {"id": "blog"}],
        buckets={"acme": {"kind": "directory", "path": "/tmp/acme"}},  # noqa: S108 - nothing is written
        exports={"acme": {"sites": ["shop"], "client": "acme"}},
    )
    judged = verdict.of(settings, state_with(), last_runs={}, disk=Disk(10**12, 10**12), warnings=[])
    assert judged.well
    assert [one.what for one in judged.hints] == ["No job exports the site blog: its events stay here."]


# ---- what is read


class Recording(psycopg.Connection[Any]):
    """A connection that remembers what it was asked."""

    asked: list[tuple[Any, Any]]

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        self.asked.append((query, params))
        return super().execute(query, params, **options)


def test_the_overview_never_reads_the_events_however_many_there_are(conninfo: str) -> None:
    with Recording.connect(conninfo, autocommit=True) as conn:
        conn.asked = []
        conn.execute(
            "INSERT INTO events_log (event_id, event_type, site_id, timestamp, raw_event_data)"
            " SELECT gen_random_uuid(), 'x', 'shop', now(), '{}' FROM generate_series(1, 1000000)"
        )
        conn.execute("ANALYZE")
        conn.asked.clear()
        assert overview_page.read(conn)["state"].events == 1_000_000
        asked = list(conn.asked)
        assert len(asked) > 8
        for query, params in asked:
            plan = "\n".join(line for (line,) in conn.execute("EXPLAIN " + query, params))
            assert not re.search(r"\bon events_log\b", plan), plan


def test_history_counts_by_minute_and_by_day(db: Database) -> None:
    with db.connection() as conn:
        conn.execute(
            "INSERT INTO event_counts SELECT date_trunc('minute', now()) - days * interval '1 day', site, 5, 0"
            " FROM (VALUES (0, 'shop'), (0, 'blog'), (1, 'shop'), (40, 'shop')) AS v (days, site)"
        )
        minutes = history.per_minute(conn, minutes=60)
        days = history.per_day(conn, days=28)
    assert [(one.site_id, one.events) for one in minutes] == [("blog", 5), ("shop", 5)]
    assert sorted((one.site_id, one.events) for one in days) == [("blog", 5), ("shop", 5), ("shop", 5)]
    assert all(one.slot.astimezone(UTC).hour == one.slot.astimezone(UTC).minute == 0 for one in days)


def test_live_looks_for_a_site_and_a_type_behind_an_id(db: Database) -> None:
    store_events(db, 2, site_id="shop", event_type="click")
    with db.connection() as conn:
        seen = events.newest(conn, limit=1)[0].id
    store_events(db, 3, site_id="shop", event_type="click")
    store_events(db, 1, site_id="blog", event_type="click")
    store_events(db, 1, site_id="shop", event_type="view")
    with db.connection() as conn:
        found = events.newest(conn, limit=10, after=seen, site_id="shop", event_type="click")
        assert [one.event_type for one in found] == ["click"] * 3
        assert [one.id for one in found] == sorted((one.id for one in found), reverse=True)
        assert len(events.newest(conn, limit=10)) == 7


def test_the_oldest_that_waits_is_known(db: Database) -> None:
    with db.connection() as conn:
        conn.execute("INSERT INTO export_coverage (job, site) VALUES ('acme', '*')")
        assert overview.read(conn).jobs[0].oldest_waiting is None
        events.copy_in(conn, [make_event(created_at=NOON), make_event()])
        assert overview.read(conn).jobs[0].oldest_waiting == NOON.replace(second=0)


# ---- what can be asked for


def test_an_errand_is_done_in_the_background_and_what_came_of_it_is_remembered() -> None:
    def verify(job: str) -> Verdict:
        if job == "broken":
            raise ApplianceError("the database is away")
        if job == "lost":
            return Verdict(job=job, batches=0, objects=0, bytes=0, problems=("bucket acme is ahead",))
        return Verdict(job=job, batches=1, objects=2, bytes=3)

    def probe(bucket: str) -> Probe:
        if bucket == "odd":
            raise RuntimeError
        return Probe(bucket, held=["listing"], failures=[str(BucketError("writing failed: it is full"))])

    errands = Errands(verify, probe)
    for kind, name in (
        ("verify", "acme"),
        ("verify", "broken"),
        ("verify", "lost"),
        ("probe", "vault"),
        ("probe", "odd"),
    ):
        errands.ask(kind, name)  # type: ignore[arg-type]  # literals through a loop
    errands.wait_idle(10)
    verified, probed = errands.last("verify"), errands.last("probe")
    assert (verified["acme"].state, verified["acme"].lines) == (
        "well",
        ("2 objects of 1 batch read, nothing found wrong",),
    )
    assert (verified["lost"].state, verified["lost"].lines) == ("failed", ("bucket acme is ahead",))
    assert (verified["broken"].state, verified["broken"].lines) == ("failed", ("the database is away",))
    assert (probed["vault"].state, probed["vault"].lines) == (
        "failed",
        ("writing failed: it is full", "listing: works"),
    )
    assert probed["odd"].state == "failed"


# ---- the configuration


def explained(settings: Settings) -> dict[str, tuple[str, str]]:
    return {
        f"{section.name} {option.name}": (option.value, option.source)
        for section in explain(settings)
        for option in section.options
    }


def test_the_job_that_nobody_has_written_comes_from_no_file(tmp_path: Path) -> None:
    found = explained(make_settings(server={"data_dir": str(tmp_path)}))
    assert found["[buckets.local] path"] == (str(tmp_path / "export"), "default")
    assert {found[f"[exports.local] {option}"][1] for option in ("client", "sites", "schedule")} == {"default"}
    written = explained(
        make_settings(
            buckets={"local": {"kind": "directory", "path": "/mnt/nas"}}, exports={"local": {"client": "local"}}
        )
    )
    assert written["[buckets.local] path"] == ("/mnt/nas", "file")
    assert written["[exports.local] client"] == ("local", "file")


def test_each_option_is_explained_with_its_source_and_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("APPLIANCE_SERVER__DEMO", "true")
    monkeypatch.setenv("APPLIANCE_ADMIN__TOKEN", "secret-token")
    settings = make_settings(
        server={"bind": "127.0.0.1:1"},
        sites=[{"id": "shop", "origins": ["https://shop.example.com"]}],
        buckets={"acme": {"bucket": "b-1", "access_key_id": "AKIA", "secret_access_key": "secret-key"}},
        exports={"acme": {"client": "acme"}},
        database={"url": "postgresql://u:secret-word@h/d"},
    )
    found = explained(settings)
    assert found["[server] bind"] == ("127.0.0.1:1", "file")
    assert found["[server] demo"] == ("true", "environment")
    assert found["[collect] max_batch_events"] == ("500", "default")
    assert found["[[sites]] shop origins"] == ("https://shop.example.com", "file")
    assert found["[admin] token"] == ("set, not shown", "environment")
    assert found["[admin] password"] == ("not set", "default")
    assert found["[buckets.acme] secret_access_key"] == ("set, not shown", "file")
    assert "secret" not in "".join(value for value, _ in found.values())
