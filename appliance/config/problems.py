"""Errors as the user reads them: where it was written, why it is wrong, and what was written."""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from appliance.config import sections
from appliance.config.settings import ENV_PREFIX, Settings

_MAX_GOT_CHARS = 60
_PASSWORD_IN_ADDRESS = re.compile(r"//[^/]*@")
_SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "server": (sections.Server,),
    "database": (sections.DatabaseSettings,),
    "admin": (sections.Admin,),
    "collect": (sections.Collect,),
    "sites": (sections.Site,),
    "buckets": (sections.S3Bucket, sections.DirectoryBucket),
    "exports": (sections.Export,),
    "retention": (sections.Retention,),
    "health": (sections.Health,),
    "alerts": (sections.Alerts,),
}
_SECRET_KEYS = frozenset({"password", "token", "url", "access_key_id", "secret_access_key"})


# pydantic speaks to programmers; {} is filled from what it knows of the limit.
_WORDS = {
    "missing": "this option is missing",
    "tuple_type": "write a list",
    "dict_type": "write a table",
    "model_type": "write a table",
    "string_type": "write a text in quotes",
    "path_type": "write a path in quotes",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "int_type": "write a whole number",
    "int_parsing": "write a whole number",
    "int_from_float": "write a whole number",
    "float_type": "write a number",
    "float_parsing": "write a number",
    "greater_than": "it must be more than {gt:g}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than_equal": "it must be at most {le}",
    "literal_error": "write {expected}",
    "too_short": "write at least one",
}
_WRITTEN_AS_JSON = frozenset({"tuple_type", "dict_type", "model_type"})
# The sections whose options have one place each, and so one variable of the environment.
_PLAIN_SECTIONS = ("server", "database", "admin", "collect", "health", "alerts")
_CLOSE = 0.75


def describe(details: ErrorDetails, file_name: str) -> str:
    """Return one line for one error that pydantic found. Secrets are never in it."""
    loc = _as_written(details)
    variable = variable_of(loc, missing=details["type"] == "missing")
    place = f"environment: {variable}" if variable else f"{file_name}: {'.'.join(loc)}"
    if details["type"] == "extra_forbidden":
        return f"{place}: {_unknown(loc, as_variable=variable == _variable(loc))}"
    why = "write each site under [[sites]]" if loc == ["sites"] and not variable else _why(details)
    as_json = ", as JSON" if variable and details["type"] in _WRITTEN_AS_JSON else ""
    return f"{place}: {why}{as_json}{_got(details, loc)}"


def _as_written(details: ErrorDetails) -> list[str]:
    """Return the way to the mistake without what pydantic inserts: a bucket's kind, and a word for "the key itself"."""
    kind_at = 2 if details["loc"][0] == "buckets" else None
    loc = [str(part) for index, part in enumerate(details["loc"]) if index != kind_at and part != "[key]"]
    return [*loc, "kind"] if _has_wrong_kind(details) else loc


def _has_wrong_kind(details: ErrorDetails) -> bool:
    return details["type"] == "kind" and isinstance(details["input"], Mapping)


def _why(details: ErrorDetails) -> str:
    words = _WORDS.get(details["type"])
    if words is None:
        return details["msg"].removeprefix("Value error, ")
    return words.format(**details.get("ctx", {})).replace("'", '"')


def _got(details: ErrorDetails, loc: list[str]) -> str:
    value = details["input"]
    if _has_wrong_kind(details):
        value = value["kind"]
    hidden = loc[-1] in _SECRET_KEYS or loc[0] in {"admin", "database"} or loc[:2] == ["alerts", "urls"]
    if details["type"] == "missing" or hidden or not isinstance(value, str | int | float | list):
        return ""
    text = json.dumps(value, default=str, ensure_ascii=False)
    if _PASSWORD_IN_ADDRESS.search(text):
        return ""
    return f" (got {text if len(text) <= _MAX_GOT_CHARS else text[:_MAX_GOT_CHARS] + '...'})"


# ---- where it was written


def _variable(loc: Sequence[str]) -> str:
    return ENV_PREFIX + "__".join(loc).upper()


def variable_of(loc: list[str], *, missing: bool) -> str | None:
    """Name the variable of the environment in which a value stands, or should stand, by itself or within JSON."""
    environment = {name.upper(): value for name, value in os.environ.items()}
    for depth in range(len(loc), 0, -1):
        variable, inside = _variable(loc[:depth]), loc[depth:]
        if variable in environment and _holds(environment[variable], inside[:-1] if missing else inside):
            return f"{variable}: {'.'.join(loc)}" if inside else variable
    return None


def _holds(text: str, inside: list[str]) -> bool:
    if not inside:
        return True
    try:
        value = json.loads(text)
        for part in inside:
            value = value[int(part) if isinstance(value, list) else part]
    except (ValueError, LookupError, TypeError):
        return False
    return True


# ---- what may have been meant


def _unknown(loc: list[str], *, as_variable: bool) -> str:
    known = _siblings(loc)
    if loc[0] == "buckets" and loc[-1] in known:
        return "a bucket of this kind has no such option"
    near = _closest(loc[-1], known - {loc[-1]})
    return "there is no such option" + _hint(_variable([*loc[:-1], near]) if near and as_variable else near)


def unknown_variable(name: str) -> str:
    """Return one line for a variable of the environment that means nothing."""
    first, *rest = name[len(ENV_PREFIX) :].lower().split("__")
    if rest:
        near = _closest(first, set(Settings.model_fields))
        meant = [near, *rest] if near else []
    else:
        spellings = _spellings()
        meant = spellings.get(_closest(first, set(spellings)), [])
    return f"environment: {name}: there is no such option{_hint(_variable(meant) if meant else '')}"


def _spellings() -> dict[str, list[str]]:
    """What people write instead of SECTION__OPTION, and the way to what they mean."""
    spellings = {section: [section] for section in Settings.model_fields if section not in _PLAIN_SECTIONS}
    for section in _PLAIN_SECTIONS:
        for option in _siblings([section, ""]):
            spellings |= {spelling: [section, option] for spelling in (option, f"{section}_{option}")}
    return spellings


def _siblings(loc: list[str]) -> set[str]:
    """The options that exist where the user wrote an unknown one."""
    if len(loc) == 1:
        return set(Settings.model_fields)
    return {field for section in _SECTIONS[loc[0]] for field in section.model_fields}


def _closest(word: str, known: set[str]) -> str:
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=_CLOSE)), "")


def _hint(meant: str) -> str:
    return f'; did you mean "{meant}"?' if meant else ""
