"""Bytes of a request -> a JSON value that PostgreSQL's jsonb takes, or a reason. Pure."""

import json
import re
from typing import Any

# Deeper than any tracker nests; jsonb and our own recursion could take more.
MAX_DEPTH = 64

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class BadPayloadError(ValueError):
    """The body cannot be taken; the message tells the sender why."""


def decode(body: bytes) -> Any:
    r"""Parse strict JSON in UTF-8.

    NUL characters and lone surrogates, which jsonb refuses, are replaced by U+FFFD in the decoded values: in the text
    `\\u0000` may be legitimate. Raises BadPayloadError.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise BadPayloadError("the body is not UTF-8") from error
    except RecursionError as error:
        raise BadPayloadError("the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BadPayloadError(f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:
        raise BadPayloadError(f"the body is not JSON: {error}"[:200]) from error
    return _clean(value) if _needs_cleaning(text) else value


def encode(value: Any) -> str:
    """Return JSON text for a decoded value; integers keep all their digits."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _needs_cleaning(text: str) -> bool:
    """Walking a value costs more than parsing it: only for texts that could hold what is looked for."""
    return "\\u" in text or "\x00" in text or text.count("[") + text.count("{") > MAX_DEPTH


def _clean(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise BadPayloadError("the JSON is nested too deeply")
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value).replace("\x00", "\ufffd")
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item, depth + 1) for key, item in value.items()}
    return value
