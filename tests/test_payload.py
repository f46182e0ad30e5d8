"""What a body may be: strict JSON in UTF-8, cleaned of what PostgreSQL's jsonb refuses, and nothing else."""

import gzip
import json
import zlib
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.collect.payload import MAX_DEPTH, BadPayloadError, decode, describe, encode, inflate

REFUSED = {
    "nothing": b"",
    "white space": b" \n",
    "half an object": b'{"a": 1',
    "trailing garbage": b'{"a": 1} x',
    "two values": b'{"a": 1}{"b": 2}',
    "two values on two lines": b'{"a": 1}\n{"b": 2}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "-Infinity": b"[-Infinity]",
    "UTF-16": '{"a": "x"}'.encode("utf-16"),
    "UTF-16 without a mark": '{"a": "x"}'.encode("utf-16-le"),
    "UTF-32": '{"a": "x"}'.encode("utf-32"),
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "a surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "an overlong NUL": b'{"a": "\xc0\x80"}',
    "a raw NUL": b'{"a": "\x00"}',
    "a raw line break in a text": b'{"a": "x\ny"}',
    "single quotes": b"{'a': 1}",
    "a comment": b'{"a": 1} // x',
    "a trailing comma": b"[1,]",
    "a key without quotes": b"{a: 1}",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "30,000 lists": b"[" * 30_000 + b"]" * 30_000,
    "30,000 objects": b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
    "30,000 lists that never end": b"[" * 30_000,
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_is_no_strict_json_is_refused_with_a_reason(body: bytes) -> None:
    with pytest.raises(BadPayloadError) as refusal:
        decode(body)
    assert 0 < len(str(refusal.value)) <= 300


UNUSABLE = {
    "a number beyond floats": b'{"a": 1e999}',
    "a negative number beyond floats": b'{"a": [-1.5e400]}',
    "an integer of 5,000 digits": b'{"a": [-' + b"9" * 5000 + b"]}",
    "lists nested too deeply": b"[" * (MAX_DEPTH + 6) + b"1" + b"]" * (MAX_DEPTH + 6),
    "objects nested too deeply": b'{"a":' * (MAX_DEPTH + 6) + b"1" + b"}" * (MAX_DEPTH + 6),
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
def test_what_the_database_would_not_take_costs_its_neighbours_nothing(text: bytes) -> None:
    good, bad = decode(b'[{"a": 1}, ' + text + b"]")
    assert encode(good) == '{"a":1}'
    with pytest.raises(BadPayloadError, match=r"too large|too many digits|too deeply"):
        encode(bad)
    assert len(describe(bad)) < 1000


def test_gzip_is_undone_up_to_the_limit_and_one_byte_beyond() -> None:
    assert inflate(gzip.compress(b"x" * 100), 100) == b"x" * 100
    assert len(inflate(gzip.compress(b"x" * 10_000_000), 100)) == 101


NO_GZIP = {
    "nothing": b"",
    "plain text": b'{"a": 1}',
    "zlib": zlib.compress(b"x"),
    "cut off": gzip.compress(b"x" * 1000)[:-4],
    "a wrong checksum": gzip.compress(b"x")[:-8] + b"12345678",
    "garbage behind it": gzip.compress(b"x") + b"y",
    "two files": gzip.compress(b"x") * 2,
}


@pytest.mark.parametrize("body", NO_GZIP.values(), ids=NO_GZIP)
def test_what_is_not_one_whole_gzip_file_is_refused(body: bytes) -> None:
    with pytest.raises(BadPayloadError, match="gzip"):
        inflate(body, 1000)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'], ids=["lists", "objects"])
def test_a_value_that_is_nested_just_deep_enough_is_taken(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    body = opening * MAX_DEPTH + b"1" + closing * MAX_DEPTH
    assert encode(decode(body)).encode() == body


def test_brackets_in_a_text_are_no_depth() -> None:
    assert decode(b'{"a": "' + b"[{" * 5000 + b'"}') == {"a": "[{" * 5000}


def test_many_shallow_brackets_are_no_depth() -> None:
    assert decode(b"[" + b"[],{}," * 500 + b"[]]") == [*[[], {}] * 500, []]


CLEANED = {
    "NUL": (rb'"a\u0000b"', "a\ufffdb"),
    "a lone high surrogate": (rb'"a\ud800b"', "a\ufffdb"),
    "a lone low surrogate": (rb'"a\udc00b"', "a\ufffdb"),
    "a pair in the wrong order": (rb'"\udc00\ud800"', "\ufffd\ufffd"),
    "a pair in the right order": (rb'"\ud83d\ude00"', "\U0001f600"),
    "a capital escape": (rb'"\uD800"', "\ufffd"),
    "a backslash before u0000": (rb'"\\u0000"', "\\u0000"),
    "a backslash before a NUL": (rb'"\\\u0000"', "\\\ufffd"),
    "other control characters": (rb'"\u0001\u001f\u007f"', "\x01\x1f\x7f"),
    "what is not a character": (rb'"\uffff"', "\uffff"),
}


@pytest.mark.parametrize(("text", "meant"), CLEANED.values(), ids=CLEANED)
def test_characters_that_jsonb_refuses_are_replaced_in_keys_and_values_and_no_others(text: bytes, meant: str) -> None:
    assert decode(text) == meant
    assert decode(b'[{"k": [' + text + b"]}]") == [{"k": [meant]}]
    assert decode(b"{" + text + b': {"k": 1}}') == {meant: {"k": 1}}


@pytest.mark.parametrize("digits", ["9007199254740993", "-9223372036854775809", "1" * 400, "0", "-1"])
def test_integers_keep_every_digit(digits: str) -> None:
    assert encode(decode(digits.encode())) == digits


def test_text_beyond_ascii_comes_through_as_it_is() -> None:
    assert encode(decode('{"größe":"日本 😀"}'.encode())) == '{"größe":"日本 😀"}'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values, ascii_only=st.booleans())
def test_whatever_is_taken_jsonb_takes_too(conn: psycopg.Connection[Any], value: object, ascii_only: bool) -> None:  # noqa: FBT001
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        taken = decode(body)
    except BadPayloadError:
        return
    row = conn.execute("SELECT %s::jsonb::text", (encode(taken),)).fetchone()
    assert row
    # Both as floats: jsonb writes 1e16 with all its digits.
    assert json.loads(row[0], parse_int=float) == json.loads(encode(taken), parse_int=float)
