"""Bytes of a request -> a JSON value that PostgreSQL's jsonb takes, or a reason. Pure."""

import json
import re
import sys
import zlib
from math import isfinite
from typing import Any

# Deeper than any tracker nests; jsonb and our own recursion could take more.
MAX_DEPTH = 64

_TOO_DEEP = "the JSON is nested too deeply"
_GZIP_BITS = 16 + zlib.MAX_WBITS
# As our encoder writes them.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_EXPONENT = re.compile(r"[0-9]e[+-]([0-9]+)")
_MAX_MORE_CHARS = 65_536
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class BadPayloadError(ValueError):
    """The body cannot be taken; the message tells the sender why."""


class Unusable:
    """Stands in a decoded value for what PostgreSQL would not take, so that only the event that holds it is refused."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __str__(self) -> str:
        return f"({self.reason})"


def inflate(body: bytes, limit: int) -> bytes:
    """Undo gzip (RFC 1952) as far as one byte beyond the limit. Raises BadPayloadError."""
    unzip = zlib.decompressobj(wbits=_GZIP_BITS)
    try:
        plain = unzip.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadPayloadError("the body is not gzip") from error
    if len(plain) <= limit and (not unzip.eof or unzip.unused_data):
        raise BadPayloadError("the body is not one whole gzip file")
    return plain


def decode(body: bytes) -> Any:
    r"""Parse strict JSON in UTF-8.

    NUL characters and lone surrogates, which jsonb refuses, are replaced by U+FFFD in the decoded values: in the text
    `\\u0000` may be legitimate. Numbers that are too large, and what is nested too deeply, become Unusable. Raises
    BadPayloadError.
    """
    try:
        text = body.decode("utf-8")
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise BadPayloadError("the body is not UTF-8") from error
    except RecursionError as error:
        raise BadPayloadError(_TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise BadPayloadError(f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:
        raise BadPayloadError(f"the body is not JSON: {error}"[:200]) from error
    return _clean(value) if _needs_cleaning(text) else value


def encode(value: Any) -> str:
    """Return JSON text for a decoded value; integers keep all their digits. Raises BadPayloadError for an Unusable."""
    return _ENCODER.encode(value)


def check_length(text: str) -> str:
    """Return JSON text whose numbers are not too long written out. Raises BadPayloadError.

    jsonb writes every digit of a number, so that 1e308 becomes 309 characters in each export: a request of a few
    kilobytes would become many megabytes in the buckets.
    """
    # Every event comes by here, and hardly any has many of what could be one.
    if (text.count("e+") + text.count("e-")) * sys.float_info.max_10_exp <= _MAX_MORE_CHARS:
        return text
    if written_out(text) - len(text) > _MAX_MORE_CHARS:
        raise BadPayloadError("its numbers are too long when they are written out")
    return text


def written_out(text: str) -> int:
    """Return about how many characters JSON text has when all digits of its numbers are written out."""
    return len(text) + sum(map(int, _EXPONENT.findall(_STRING.sub('""', text))))


def describe(value: Any) -> str:
    """Return JSON text for a person to read, with a reason where something is unusable."""
    return json.dumps(value, ensure_ascii=False, default=str)


def without_unusable(value: Any) -> Any:
    """Return a value in which the reason stands for what is unusable; the value itself where nothing is."""
    try:
        encode(value)
    except BadPayloadError:
        return json.loads(describe(value))
    return value


def _refuse(value: Any) -> Any:
    raise BadPayloadError(value.reason if isinstance(value, Unusable) else "not JSON")


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_refuse)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float | Unusable:
    number = float(text)
    return number if isfinite(number) else Unusable(f"the number {text[:20]} is too large")


def _whole(text: str) -> int | Unusable:
    try:
        return int(text)
    except ValueError:
        # Python reads and writes no longer ones: the time that takes grows with the square of their length.
        return Unusable(f"the number {text[:20]} has too many digits")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole)


def _needs_cleaning(text: str) -> bool:
    """Walking a value costs more than parsing it: only for texts that could hold what is looked for."""
    return "\\u" in text or "\x00" in text or text.count("[") + text.count("{") > MAX_DEPTH


def _clean(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value).replace("\x00", "\ufffd")
    if isinstance(value, list | dict) and depth > MAX_DEPTH:
        return Unusable(_TOO_DEEP)
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item, depth + 1) for key, item in value.items()}
    return value
