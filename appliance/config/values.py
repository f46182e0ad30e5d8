"""Types of single values: what may be written, and why not where it may not."""

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, TypeAlias

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BeforeValidator, SecretStr

ALL_SITES = "*"
MIN_KEEP_DAYS = 8
SITE_ID_PATTERN = r"[A-Za-z0-9._-]{1,100}"
# As werkzeug writes them: method:parameters$salt$digest.
PASSWORD_HASH = re.compile(r"(scrypt:\d+:\d+:\d+|pbkdf2:sha(1|256|512):\d+)\$[^$\s]+\$[0-9a-f]{40,128}")
_DEFAULT_PORTS = {"http": 80, "https": 443}
# What cronsim says of a field, and what may be written there.
_CRON_RANGES = {
    "Bad minute": "0 to 59",
    "Bad hour": "0 to 23",
    "Bad day-of-month": "1 to 31, or L for the last",
    "Bad month": "1 to 12, or jan to dec",
    "Bad day-of-week": "0 to 7, or sun to sat",
}
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_TAG_PATTERN = r"[\w +=.:/@-]"
_NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"


def _resolve_secret(value: object) -> object:
    """Read a secret written as `{ file = "..." }` or `{ env = "NAME" }`."""
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"file"}:
        return _secret_file(Path(str(value["file"])))
    if set(value) == {"env"}:
        name = str(value["env"])
        if name not in os.environ:
            raise ValueError(f"the environment has no variable {name}")
        return os.environ[name]
    raise ValueError('write the secret itself, { file = "/run/secrets/x" } or { env = "NAME" }')


def _check_secret(value: SecretStr) -> SecretStr:
    # The environment may hold any bytes; no form and no request could ever bring the same.
    if any("\ud800" <= character <= "\udfff" for character in value.get_secret_value()):
        raise ValueError("it is not written in UTF-8")
    return value


def _check_password(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if text.startswith(("scrypt:", "pbkdf2:")) and not PASSWORD_HASH.fullmatch(text):
        raise ValueError("it begins like a hash and is none: copy the whole line that `appliance hash-password` prints")
    return value


def _check_access_key(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]*", value.get_secret_value()):
        raise ValueError("no key has spaces, line breaks or letters beyond ASCII")
    return value


def _check_database_url(value: SecretStr) -> SecretStr:
    import psycopg  # noqa: PLC0415 - a quarter of the time of reading a configuration, for those who have a URL

    try:
        psycopg.conninfo.conninfo_to_dict(value.get_secret_value())
    except psycopg.ProgrammingError as error:
        raise ValueError("write it as postgresql://user:password@host/name") from error
    return value


def _check_alert_url(value: SecretStr) -> SecretStr:
    # Which services there are only apprise knows: `appliance check --probe` asks it.
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*://[!-~]+", value.get_secret_value()):
        raise ValueError("write an address as apprise reads it, for example mailto://user:password@example.com")
    return value


def _secret_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the secret's file {path} is not written in UTF-8") from error
    except OSError as error:
        raise ValueError(f"the secret's file {path} cannot be read: {error.strerror}") from error


def check_bind(value: str) -> str:
    """Accept host:port."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:  # noqa: PLR2004 - the ports there are
        raise ValueError("write it as host:port, for example 0.0.0.0:8080")
    return value


def check_cron(value: str) -> str:
    """Accept a line of crontab(5) that comes round at least once."""
    if len(value.split()) != 5:  # noqa: PLR2004 - minute, hour, day, month, weekday
        raise ValueError('a cron line has five fields, for example "5 * * * *"')
    try:
        next(CronSim(value, datetime.now(UTC)))
    except (CronSimError, StopIteration) as error:
        reason = str(error) or "it never comes"
        if reason in _CRON_RANGES:
            reason = f"{reason} ({_CRON_RANGES[reason]})"
        raise ValueError(f"not a cron line: {reason}") from error
    return value


def check_keep_days(value: int) -> int:
    """Accept 0, or more days than events may wait in a browser: their ids tell one that is sent again."""
    if value != 0 and not MIN_KEEP_DAYS <= value <= 36_500:  # noqa: PLR2004 - a century
        raise ValueError(f"write 0 to keep rows for ever, or at least {MIN_KEEP_DAYS} days")
    return value


def _check_origin(value: str) -> str:
    """Accept an origin, and return it as a browser sends it: in small letters, without its scheme's own port."""
    parts = re.fullmatch(r"(https?)://([^/\s?#@:\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", value.lower())
    if not parts:
        raise ValueError("an origin is scheme and host alone, for example https://shop.example.com")
    scheme, host, port = parts.groups()
    number = int(port) if port else _DEFAULT_PORTS[scheme]
    return f"{scheme}://{host}" if number == _DEFAULT_PORTS[scheme] else f"{scheme}://{host}:{number}"


def _check_prefix(value: str) -> str:
    prefix = value.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9!_.'()=/-]*", prefix) or ".." in prefix or "//" in prefix:
        raise ValueError("a prefix has letters, digits and - _ . = / only, and no '..'")
    return prefix


def check_endpoint(value: str) -> str:
    """Accept the address of an S3 server, or nothing."""
    if value and not re.fullmatch(rf"https?://({_LABEL}(\.{_LABEL})*\.?|\[[0-9A-Fa-f:.]+\])(:[0-9]{{1,5}})?/?", value):
        raise ValueError("write the server's address alone, for example https://s3.example.com")
    return value.rstrip("/")


def _check_tags(value: dict[str, str]) -> dict[str, str]:
    """Accept what S3 takes as the tags of an object."""
    if len(value) > 10:  # noqa: PLR2004 - as many as S3 keeps
        raise ValueError("an object has at most 10 tags")
    for key, text in value.items():
        if not re.fullmatch(_TAG_PATTERN + "{1,128}", key) or not re.fullmatch(_TAG_PATTERN + "{0,256}", text):
            raise ValueError(f'a tag has letters, digits, spaces and + - = . _ : / @ only, unlike "{key}"')
    return value


def matching(pattern: str, why: str) -> AfterValidator:
    """Accept texts that match the pattern as a whole; `why` is told of others."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(why)
        return value

    return AfterValidator(check)


def _network(value: object) -> object:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    try:
        return ip_network(str(value))
    except ValueError as error:
        raise ValueError(
            'write a network such as "172.16.0.0/12" (with zeros behind its bits), or one address'
        ) from error


def _not_empty(value: object) -> object:
    # Path("") is the directory where one happens to stand.
    if value == "":
        raise ValueError("write a path")
    return value


def _check_path(value: Path) -> Path:
    if "\x00" in str(value):
        raise ValueError("a path has no NUL in it")
    # Absolute: PostgreSQL and the buckets work from directories of their own.
    return value.absolute()


Network: TypeAlias = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
FilePath: TypeAlias = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_check_path)]
Secret: TypeAlias = Annotated[SecretStr, BeforeValidator(_resolve_secret), AfterValidator(_check_secret)]
DatabaseUrl: TypeAlias = Annotated[Secret, AfterValidator(_check_database_url)]
Password: TypeAlias = Annotated[Secret, AfterValidator(_check_password)]
AccessKey: TypeAlias = Annotated[Secret, AfterValidator(_check_access_key)]
AlertUrl: TypeAlias = Annotated[Secret, AfterValidator(_check_alert_url)]
SiteId: TypeAlias = Annotated[str, matching(SITE_ID_PATTERN, "a site id has 1 to 100 letters, digits and . _ -")]
SiteOrAll: TypeAlias = Annotated[str, matching(rf"\*|{SITE_ID_PATTERN}", 'write site ids, or "*" for every site')]
Name: TypeAlias = Annotated[str, matching(_NAME_PATTERN, "a name has up to 63 small letters, digits and _ -")]
NameOrNone: TypeAlias = Annotated[
    str, matching(f"({_NAME_PATTERN})?", "a name has up to 63 small letters, digits and _ -")
]
Origin: TypeAlias = Annotated[str, AfterValidator(_check_origin)]
Tags: TypeAlias = Annotated[dict[str, str], AfterValidator(_check_tags)]
Prefix: TypeAlias = Annotated[str, AfterValidator(_check_prefix)]
