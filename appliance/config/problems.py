"""Errors as the user reads them: where it was written, why it is wrong, and what was written."""

import difflib
import json
import os

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from appliance.config import sections
from appliance.config.settings import ENV_PREFIX, Settings

_MAX_GOT_CHARS = 60
_SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "server": (sections.Server,),
    "database": (sections.DatabaseSettings,),
    "admin": (sections.Admin,),
    "collect": (sections.Collect,),
    "sites": (sections.Site,),
    "buckets": (sections.S3Bucket, sections.DirectoryBucket),
    "exports": (sections.Export,),
}
_SECRET_KEYS = frozenset({"password", "token", "url", "access_key_id", "secret_access_key"})


def describe(details: ErrorDetails, file_name: str) -> str:
    """Return one line for one error that pydantic found. Secrets are never in it."""
    loc = [str(part) for part in _without_tags(details["loc"])]
    variable = ENV_PREFIX + "__".join(loc).upper()
    place = f"environment: {variable}" if variable in os.environ else f"{file_name}: {'.'.join(loc)}"
    if details["type"] == "extra_forbidden" and loc[0] == "buckets" and loc[-1] in _siblings(loc):
        return f"{place}: a bucket of this kind has no such option"
    if details["type"] == "extra_forbidden":
        return f"{place}: there is no such option{did_you_mean(loc[-1], _siblings(loc))}"
    why = details["msg"].removeprefix("Value error, ")
    return f"{place}: {why}{_got(details, loc)}"


def _without_tags(loc: tuple[int | str, ...]) -> list[int | str]:
    """Drop the kind that pydantic inserts after a bucket's name."""
    return [part for index, part in enumerate(loc) if not (index == 2 and loc[0] == "buckets")]  # noqa: PLR2004


def _got(details: ErrorDetails, loc: list[str]) -> str:
    value = details["input"]
    hidden = loc[-1] in _SECRET_KEYS or loc[0] in {"admin", "database"}
    if details["type"] == "missing" or hidden or not isinstance(value, str | int | float | list):
        return ""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f" (got {text if len(text) <= _MAX_GOT_CHARS else text[:_MAX_GOT_CHARS] + '...'})"


def _siblings(loc: list[str]) -> set[str]:
    """The options that exist where the user wrote an unknown one."""
    if len(loc) == 1:
        return set(Settings.model_fields)
    return {field for section in _SECTIONS[loc[0]] for field in section.model_fields}


def did_you_mean(word: str, known: set[str]) -> str:
    """Return a hint at the option that may have been meant."""
    close = difflib.get_close_matches(word, sorted(known - {word}), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
