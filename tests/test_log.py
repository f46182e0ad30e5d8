"""The log: one bounded line a record, and never a secret in it."""

import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from conftest import Appliance, http

from appliance import log
from appliance.collect.http import Request
from appliance.collect.routes import PATHS, in_front_of
from appliance.collect.tallies import RequestTally
from appliance.log import MAX_MESSAGE_CHARS, redactor

SECRET = "s3cr3t-key/with+signs="
SHORTER = "s3cr3t-key"


def set_up(secrets: Iterable[str], *, as_json: bool = False) -> io.StringIO:
    """Set logging up as the appliance does and return what stands for standard error."""
    stream = io.StringIO()
    log.configure(secrets=secrets, as_json=as_json)
    for handler in logging.getLogger().handlers:
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(stream)
    return stream


SECRETS = [SHORTER, SECRET, "two\nlines", "", "abc"]


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield set_up(SECRETS)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def in_json(written: io.StringIO) -> io.StringIO:
    """The same, as JSON."""
    assert not written.getvalue()
    return set_up(SECRETS, as_json=True)


logger = logging.getLogger("appliance.test")


def test_a_record_is_one_line_with_time_in_utc_level_and_place(written: io.StringIO) -> None:
    logger.warning("took %d events", 3)
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(rf"{time} WARNING appliance\.test: took 3 events\n", written.getvalue())


FORGERIES = ["\n", "\r\n", "\r", "\x0b", "\x1b[2J", "\x7f", "\x00", "\x85", "\x9b2J"]


@pytest.mark.parametrize("trick", FORGERIES, ids=ascii)
def test_a_message_cannot_forge_a_line_or_steer_a_terminal(written: io.StringIO, trick: str) -> None:
    logger.info("site %s", f"x{trick}2026-01-01 00:00:00.000Z ERROR appliance: forged")
    (line,) = written.getvalue().splitlines()
    assert line.isprintable()


def test_the_text_of_an_exception_cannot_forge_a_line(written: io.StringIO) -> None:
    forged = "2026-01-01 00:00:00.000Z ERROR appliance: forged"
    try:
        raise ValueError(f"x\n{forged}")  # noqa: TRY301 - what is tested is how it is logged
    except ValueError:
        logger.exception("storing failed")
    text = written.getvalue()
    assert "storing failed" in text
    assert forged not in text.splitlines()


def test_a_message_is_bounded(written: io.StringIO) -> None:
    logger.info("x" * 1_000_000)
    text = written.getvalue()
    assert len(text) < MAX_MESSAGE_CHARS + 200
    assert "1000000 characters" in text


SPILLS = {
    "in the message": ("key %s", SECRET),
    "twice": ("%s", f"{SECRET} and {SECRET}"),
    "in the format itself": (f"key {SECRET} %s", ""),
    "a secret that is part of another": ("key %s", SHORTER),
    "of two lines": ("key %s", "two\nlines"),
    "where a long message is cut": ("%s", "x" * (MAX_MESSAGE_CHARS - 9) + SECRET),
}


@pytest.mark.parametrize(("message", "argument"), SPILLS.values(), ids=SPILLS)
def test_a_secret_never_reaches_the_log(written: io.StringIO, message: str, argument: str) -> None:
    logger.info(message, argument)
    text = written.getvalue()
    assert text.strip()
    for part in (SHORTER, SHORTER[:8], "with+signs", "lines"):
        assert part not in text


def test_a_secret_in_a_traceback_is_blanked_too(written: io.StringIO) -> None:
    try:
        raise ValueError(f"bad key {SECRET}")  # noqa: TRY301 - what is tested is how it is logged
    except ValueError:
        logger.exception("failed")
    text = written.getvalue()
    assert "ValueError: bad key ***" in text
    assert SECRET not in text


EVERYDAY = [
    "export demo: 3 events in 1 batch delivered",
    'no site "demo" is configured here',
    "taking /demo/ and demo-site in, data in /home/demo",
    "user=demo host=demo",
    "the demo's password, a token, demo",
    "key: demo/2026/07/events.jsonl.gz",
    "session.key demo",
    "monkey: demo",
    "token=demonstration",
    "password",
]


@pytest.mark.parametrize("text", EVERYDAY)
def test_a_secret_that_is_an_everyday_word_does_not_blank_the_log(text: str) -> None:
    assert redactor(["demo", "abc"])(text) == text


SHORT_SPILLS = {
    "token=demo": "token=***",
    "token = demo, more": "token = ***, more",
    "Authorization: Bearer demo": "Authorization: Bearer ***",
    "bearer 'demo'": "bearer '***'",
    "{'password': 'demo', 'user': 'demo'}": "{'password': '***', 'user': 'demo'}",
    '{"secret_access_key": "demo"}': '{"secret_access_key": "***"}',
    "access_key_id=demo&x=1": "access_key_id=***&x=1",
    "APPLIANCE_ADMIN__PASSWORD=demo": "APPLIANCE_ADMIN__PASSWORD=***",
    "Token: demo.": "Token: ***.",
    "token=demo-2": "token=***",
    "token=d.m": "token=***",
    "postgresql://me:demo@db/demo": "postgresql://me:***@db/demo",
    "host=demo password=demo": "host=demo password=***",
}


@pytest.mark.parametrize(("text", "clean"), SHORT_SPILLS.items())
def test_a_short_secret_is_blanked_where_something_says_that_it_is_one(text: str, clean: str) -> None:
    assert redactor(["demo", "demo-2", "d.m"])(text) == clean


def test_a_secret_of_eight_characters_is_blanked_everywhere() -> None:
    assert redactor(["1234567", "12345678"])("1234567 x12345678x") == "1234567 x***x"


def test_setting_up_again_replaces_the_former_setting(written: io.StringIO) -> None:
    stream = set_up(["another-secret"])
    logger.info("once another-secret")
    assert stream.getvalue().count("once ***") == stream.getvalue().count("\n") == 1
    assert not written.getvalue()


PASSWORDS = {
    "a URL": ("at postgresql://bob:hunter2@db/x", "at postgresql://bob:***@db/x"),
    "a URL without a user": ("redis://:hunter2@db", "redis://:***@db"),
    "a colon in the password": ("postgresql://bob:hun:ter2@db/x", "postgresql://bob:***@db/x"),
    "keywords": ("host=db password=hunter2 user=bob", "host=db password=*** user=bob"),
    "keywords with quotes": ("password = 'hun ter2' user=bob", "password = *** user=bob"),
    "an escaped quote": (r"password='hun\'ter2' user=bob", "password=*** user=bob"),
    "no password": ("postgresql://bob@db:5432/x", "postgresql://bob@db:5432/x"),
    "a port and an address elsewhere": ("http://db:80/ by bob@x", "http://db:80/ by bob@x"),
}


@pytest.mark.parametrize(("text", "clean"), PASSWORDS.values(), ids=PASSWORDS)
def test_a_password_in_a_database_url_is_blanked_without_being_known(text: str, clean: str) -> None:
    assert redactor([])(text) == clean


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_in_json_a_record_is_an_object_on_one_line(in_json: io.StringIO) -> None:
    logger.warning("took %d events of \u201cshop\u201d", 3)
    (line,) = in_json.getvalue().splitlines()
    record = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    message = "took 3 events of \u201cshop\u201d"
    assert record == {"level": "WARNING", "logger": "appliance.test", "message": message}


@pytest.mark.parametrize("trick", [*FORGERIES, '"', "\\", "\u2028", "\ud800"], ids=ascii)
def test_in_json_nothing_can_forge_a_line_or_steer_a_terminal(in_json: io.StringIO, trick: str) -> None:
    logger.info("site %s", f"x{trick}y")
    text = in_json.getvalue()
    assert text.isascii()
    assert text.removesuffix("\n").isprintable()
    assert set(json.loads(text)) == {"time", "level", "logger", "message"}


def test_in_json_a_traceback_is_a_field_without_secrets(in_json: io.StringIO) -> None:
    try:
        raise ValueError(f"bad key {SECRET}")  # noqa: TRY301 - what is tested is how it is logged
    except ValueError:
        logger.exception("failed with %s", SECRET)
    (line,) = in_json.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "failed with ***"
    assert "ValueError: bad key ***" in record["exception"]
    assert SHORTER not in line


@pytest.mark.parametrize(("message", "argument"), SPILLS.values(), ids=SPILLS)
def test_in_json_a_secret_never_reaches_the_log(in_json: io.StringIO, message: str, argument: str) -> None:
    logger.info(message, argument)
    assert len(in_json.getvalue()) < MAX_MESSAGE_CHARS + 300
    for part in (SHORTER, SHORTER[:8], "with+signs", "lines"):
        assert part not in in_json.getvalue()


def test_a_program_can_read_every_line_of_a_whole_life(appliance: Callable[..., Appliance]) -> None:
    box = appliance(server={"log_format": "json"}, admin={"password": "never-to-be-logged"}).start()
    visitor = b'{"eventType": "click", "siteId": "shop", "visitorId": "visitor-of-mine"}'
    assert http(box, "POST", "/collect", visitor, {"Content-Type": "text/plain"}).status == 200
    box.run("export")
    assert box.stop() == 0
    records = [json.loads(line) for line in box.log.splitlines()]
    said = [record["message"] for record in records]
    assert "ready" in said
    assert said[-1] == "stopped"
    for private in ("never-to-be-logged", "visitor-of-mine", "127.0.0.1"):
        assert private not in box.log


# -- requests ----------------------------------------------------------------------------------------------------------


def test_what_is_logged_for_a_request_names_it_and_nothing_else_does(written: io.StringIO) -> None:
    first, second = log.request_number(), log.request_number()
    assert first != second
    log.begin_request(first)
    name = log.request_id()
    logger.info("mine")
    other = threading.Thread(target=logger.info, args=("of another thread",))
    other.start()
    other.join()
    log.end_request()
    logger.info("later")
    mine, another, later = (line.partition("test: ")[2] for line in written.getvalue().splitlines())
    assert (mine, another, later) == (f"mine (request {name})", "of another thread", "later")


def test_in_json_the_request_is_a_field(in_json: io.StringIO) -> None:
    log.begin_request(255)
    logger.info("mine")
    log.end_request()
    assert json.loads(in_json.getvalue())["request"] == "ff"


def test_an_answer_that_failed_names_the_request_that_the_log_names(in_json: io.StringIO) -> None:
    class Broken:
        def collect(self, _request: Request) -> Any:
            raise ZeroDivisionError

        preflight = pixel = collect

    tallies = {path: RequestTally() for path in PATHS}
    app = in_front_of(lambda *_: [], Broken(), tallies)  # type: ignore[arg-type]
    log.begin_request(4095)
    (body,) = app({"PATH_INFO": "/collect", "REQUEST_METHOD": "POST"}, lambda *_: None)
    log.end_request()
    assert json.loads(body) == {"error": "internal server error", "request": "fff"}
    assert json.loads(in_json.getvalue())["request"] == "fff"
    assert tallies["/collect"].statuses == {500: 1}
