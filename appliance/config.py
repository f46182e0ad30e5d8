"""config.toml and the environment -> frozen settings. The only reader of os.environ.

Every problem is found in one go and reported where the user wrote it: `config.toml: exports.acme.schedule: why`.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from appliance.errors import ConfigError

DEFAULT_FILE = "config.toml"
ENV_PREFIX = "APPLIANCE_"
SITE_ID_PATTERN = r"[A-Za-z0-9._-]{1,100}"
NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"
ALL_SITES = "*"
# What the demo page sends as; taken in whatever sites are configured while server.demo is on.
DEMO_SITE = "demo"
LOCAL = "local"

_MAX_GOT_CHARS = 60
_SECRET_KEYS = frozenset({"password", "token", "url", "access_key_id", "secret_access_key"})


# ---------------------------------------------------------------------------------------------------------------------
# Types of single values


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


def _secret_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the secret's file {path} cannot be read ({type(error).__name__})") from error


def _check_bind(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:  # noqa: PLR2004 - the ports there are
        raise ValueError("write it as host:port, for example 0.0.0.0:8080")
    return value


def _check_cron(value: str) -> str:
    if len(value.split()) != 5:  # noqa: PLR2004 - minute, hour, day, month, weekday
        raise ValueError('a cron line has five fields, for example "5 * * * *"')
    try:
        next(CronSim(value, datetime.now(UTC)))
    except (CronSimError, StopIteration) as error:
        reason = str(error) or "it never comes"
        raise ValueError(f"not a cron line: {reason}") from error
    return value


def _check_origin(value: str) -> str:
    if not re.fullmatch(r"https?://[^/\s?#@]+", value):
        raise ValueError("an origin is scheme and host alone, for example https://shop.example.com")
    return value.lower()


def _check_prefix(value: str) -> str:
    prefix = value.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9!_.'()=/-]*", prefix) or ".." in prefix or "//" in prefix:
        raise ValueError("a prefix has letters, digits and - _ . = / only, and no '..'")
    return prefix


def _check_endpoint(value: str) -> str:
    if value and not re.fullmatch(r"https?://[^/\s?#]+/?", value):
        raise ValueError("write the server's address alone, for example https://s3.example.com")
    return value.rstrip("/")


def _matching(pattern: str, why: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(why)
        return value

    return AfterValidator(check)


def _network(value: object) -> object:
    return ip_network(value) if isinstance(value, str) else value


def _check_path(value: Path) -> Path:
    if "\x00" in str(value):
        raise ValueError("a path has no NUL in it")
    return value


Network: TypeAlias = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
FilePath: TypeAlias = Annotated[Path, AfterValidator(_check_path)]
Secret: TypeAlias = Annotated[SecretStr, BeforeValidator(_resolve_secret)]
SiteId: TypeAlias = Annotated[str, _matching(SITE_ID_PATTERN, "a site id has 1 to 100 letters, digits and . _ -")]
SiteOrAll: TypeAlias = Annotated[str, _matching(rf"\*|{SITE_ID_PATTERN}", 'write site ids, or "*" for every site')]
Name: TypeAlias = Annotated[str, _matching(NAME_PATTERN, "a name has up to 63 small letters, digits and _ -")]
NameOrNone: TypeAlias = Annotated[
    str, _matching(f"({NAME_PATTERN})?", "a name has up to 63 small letters, digits and _ -")
]
Origin: TypeAlias = Annotated[str, AfterValidator(_check_origin)]
Prefix: TypeAlias = Annotated[str, AfterValidator(_check_prefix)]


# ---------------------------------------------------------------------------------------------------------------------
# Sections


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(_Section):
    """Where the appliance listens and keeps its data."""

    bind: Annotated[str, AfterValidator(_check_bind)] = "0.0.0.0:8080"
    data_dir: FilePath = Path("/data")
    trusted_proxies: tuple[Network, ...] = ()
    demo: bool = False

    @property
    def host(self) -> str:
        """The address to bind, without the brackets of IPv6."""
        return self.bind.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The TCP port to bind."""
        return int(self.bind.rpartition(":")[2])


class DatabaseSettings(_Section):
    """Which PostgreSQL keeps the events; an empty URL means the embedded one."""

    url: Secret = SecretStr("")


class Admin(_Section):
    """Who may look in; both empty turns the admin pages off."""

    password: Secret = SecretStr("")
    token: Secret = SecretStr("")

    @property
    def enabled(self) -> bool:
        """Whether there is any way to log in."""
        return bool(self.password.get_secret_value() or self.token.get_secret_value())


class Collect(_Section):
    """Limits of one request to /collect."""

    max_body_bytes: Annotated[int, Field(ge=1024, le=16 * 1024 * 1024)] = 65536
    max_batch_events: Annotated[int, Field(ge=1, le=10_000)] = 500


class Site(_Section):
    """One site that may send events."""

    id: SiteId
    origins: tuple[Origin, ...] = ()
    ip: Literal["keep", "truncate", "drop"] = "keep"


class S3Bucket(_Section):
    """A bucket behind the S3 API."""

    kind: Literal["s3"] = "s3"
    provider: Literal["aws", "r2", "b2", "minio", "gcs", "other"] = "aws"
    bucket: Annotated[str, _matching(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", "not a bucket's name")]
    prefix: Prefix = ""
    region: str = ""
    endpoint_url: Annotated[str, AfterValidator(_check_endpoint)] = ""
    access_key_id: Secret = SecretStr("")
    secret_access_key: Secret = SecretStr("")
    connect_timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 10
    read_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 60

    @model_validator(mode="after")
    def _keys_come_in_pairs(self) -> "S3Bucket":
        if bool(self.access_key_id.get_secret_value()) != bool(self.secret_access_key.get_secret_value()):
            raise ValueError(
                "set both access_key_id and secret_access_key, or neither (then AWS's usual chain is used)"
            )
        return self

    @model_validator(mode="after")
    def _provider_has_an_address(self) -> "S3Bucket":
        if self.provider != "aws" and not self.endpoint_url:
            raise ValueError(f'provider "{self.provider}" needs endpoint_url')
        return self


class DirectoryBucket(_Section):
    """A directory of this machine (or of a NAS mounted here) that is filled like a bucket."""

    kind: Literal["directory"]
    path: FilePath
    prefix: Prefix = ""


Bucket: TypeAlias = Annotated[
    Annotated[S3Bucket, Tag("s3")] | Annotated[DirectoryBucket, Tag("directory")],
    Discriminator(
        lambda value: value.get("kind", "s3") if isinstance(value, Mapping) else getattr(value, "kind", None),
        custom_error_type="kind",
        custom_error_message='a bucket is a table with kind = "s3" or kind = "directory"',
    ),
]


class Export(_Section):
    """One export job: which sites go where, when, and in which format."""

    sites: Annotated[tuple[SiteOrAll, ...], Field(min_length=1)] = (ALL_SITES,)
    client: Name
    backup: NameOrNone = ""
    schedule: Annotated[str, AfterValidator(_check_cron)] = "5 * * * *"
    format: Literal["jsonl"] = "jsonl"
    compression: Literal["gzip", "zstd", "none"] = "gzip"

    @property
    def bucket_names(self) -> tuple[str, ...]:
        """The buckets this job fills: client first, backup second."""
        return (self.client, self.backup) if self.backup else (self.client,)


class _Environment(EnvSettingsSource):
    """The environment; a value that should be JSON and is not goes on as it is, to be refused under its name."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class Settings(BaseSettings):
    """All that can be configured. Read it with `load`; it never changes afterwards."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, case_sensitive=False
    )

    server: Server = Server()
    database: DatabaseSettings = DatabaseSettings()
    admin: Admin = Admin()
    collect: Collect = Collect()
    sites: tuple[Site, ...] = ()
    buckets: dict[Name, Bucket] = {}
    exports: dict[Name, Export] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment override the file, and nothing else speak."""
        return _Environment(settings_cls), init_settings

    @model_validator(mode="wrap")
    @classmethod
    def _check_references(cls, values: dict[str, Any], handler: Callable[[Any], "Settings"]) -> "Settings":
        """Check what sections say of each other even where a section itself is wrong: all errors come at once."""
        values = _with_default_job(values)
        problems: list[InitErrorDetails] = list(_reference_problems(values))
        try:
            settings = handler(values)
        except ValidationError as error:
            problems += [_as_init_error(details) for details in error.errors(include_url=False)]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return settings

    def site(self, site_id: str) -> Site | None:
        """Return the configured site of that id."""
        return next((site for site in self.sites if site.id == site_id), None)

    def secret_values(self) -> tuple[str, ...]:
        """Every secret in plain text, for redaction only."""
        return tuple(secret.get_secret_value() for secret in _secrets_of(self) if secret.get_secret_value())


def _secrets_of(section: BaseModel) -> Iterator[SecretStr]:
    for value in (getattr(section, name) for name in type(section).model_fields):
        for item in value.values() if isinstance(value, dict) else [value]:
            if isinstance(item, SecretStr):
                yield item
            elif isinstance(item, BaseModel):
                yield from _secrets_of(item)


# ---------------------------------------------------------------------------------------------------------------------
# Rules between sections, on raw values


def _with_default_job(values: dict[str, Any]) -> dict[str, Any]:
    """Without any export job, keep a local copy of everything: nobody starts with a collector that leads nowhere."""
    if values.get("exports"):
        return values
    server = values.get("server")
    data_dir = server.get("data_dir", "/data") if isinstance(server, Mapping) else "/data"
    buckets = values.get("buckets", {})
    if isinstance(buckets, Mapping):
        buckets = {LOCAL: {"kind": "directory", "path": Path(str(data_dir)) / "export"}, **buckets}
    return {**values, "buckets": buckets, "exports": {LOCAL: {"client": LOCAL}}}


def _reference_problems(values: dict[str, Any]) -> Iterator[InitErrorDetails]:
    buckets = _mapping(values.get("buckets"))
    site_ids = [_mapping(site).get("id") for site in _list(values.get("sites"))]
    for index, site_id in enumerate(site_ids):
        if site_id is not None and site_id in site_ids[:index]:
            yield _problem(("sites", index, "id"), "this site stands here twice", site_id)
    for name, export in _mapping(values.get("exports")).items():
        yield from _export_problems(name, _mapping(export), buckets=buckets, site_ids=site_ids)


def _export_problems(
    name: str, export: Mapping[str, Any], *, buckets: Mapping[str, Any], site_ids: list[Any]
) -> Iterator[InitErrorDetails]:
    for role in ("client", "backup"):
        bucket = export.get(role)
        if isinstance(bucket, str) and bucket and bucket not in buckets:
            yield _problem(("exports", name, role), f"no [buckets.{bucket}] is defined", bucket)
    places = [_place(_mapping(buckets.get(str(export.get(role) or "")))) for role in ("client", "backup")]
    if places[0] and places[0] == places[1]:
        yield _problem(("exports", name, "backup"), "client and backup are one place", export.get("backup"))
    sites = _list(export.get("sites"))
    for site in sites:
        if site_ids and site != ALL_SITES and site not in site_ids:
            yield _problem(("exports", name, "sites"), "no [[sites]] entry has this id", site)
    if ALL_SITES in sites and len(sites) > 1:
        yield _problem(("exports", name, "sites"), '"*" already means every site', sites)


def _place(bucket: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What tells two places apart: the same server, bucket and prefix are one place under two names."""
    if not bucket:
        return None
    prefix = str(bucket.get("prefix", "")).strip("/")
    if "path" in bucket:
        # What no path can be is told where the path is checked.
        with suppress(ValueError):
            return ("directory", os.path.realpath(Path(str(bucket["path"])) / prefix))
        return None
    return ("s3", str(bucket.get("endpoint_url", "")).rstrip("/").lower(), str(bucket.get("bucket")), prefix)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _problem(loc: tuple[str | int, ...], message: str, got: object) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("reference", "{why}", {"why": message}), loc=loc, input=got)


def _as_init_error(details: ErrorDetails) -> InitErrorDetails:
    error = PydanticCustomError(details["type"], "{why}", {"why": details["msg"]})
    return InitErrorDetails(type=error, loc=details["loc"], input=details["input"])


# ---------------------------------------------------------------------------------------------------------------------
# Loading, and errors as the user reads them


def load(file: Path | None = None) -> Settings:
    """Read the configuration file (default: config.toml where it stands) and the environment.

    Raises ConfigError with every problem found.
    """
    path = file or Path(DEFAULT_FILE)
    document = _read_toml(path, required=file is not None)
    problems = _unknown_variables()
    try:
        settings = Settings(**document)
    except ValidationError as error:
        problems += [_describe(details, path.name) for details in error.errors(include_url=False)]
    if problems:
        raise ConfigError(problems)
    return settings


def _read_toml(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigError([f"{path}: there is no such file"]) from None
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path.name}: not a TOML file: {error}"]) from error
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    # Settings(**document) must not take a key of the file for one of pydantic-settings' own arguments.
    private = [key for key in document if key.startswith("_")]
    if private:
        raise ConfigError([f"{path.name}: {key}: there is no such option" for key in private])
    return document


def _unknown_variables() -> list[str]:
    known = set(Settings.model_fields)
    return [
        f"environment: {name}: there is no such option{_did_you_mean(_path_of(name)[0], known)}"
        for name in sorted(os.environ)
        if name.upper().startswith(ENV_PREFIX) and _path_of(name)[0] not in known
    ]


def _path_of(variable: str) -> list[str]:
    return variable[len(ENV_PREFIX) :].lower().split("__")


def _describe(details: ErrorDetails, file_name: str) -> str:
    loc = [str(part) for part in _without_tags(details["loc"])]
    variable = ENV_PREFIX + "__".join(loc).upper()
    place = f"environment: {variable}" if variable in os.environ else f"{file_name}: {'.'.join(loc)}"
    if details["type"] == "extra_forbidden" and loc[0] == "buckets" and loc[-1] in _siblings(loc):
        return f"{place}: a bucket of this kind has no such option"
    if details["type"] == "extra_forbidden":
        return f"{place}: there is no such option{_did_you_mean(loc[-1], _siblings(loc))}"
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
    sections: dict[str, set[str]] = {
        "server": set(Server.model_fields),
        "database": set(DatabaseSettings.model_fields),
        "admin": set(Admin.model_fields),
        "collect": set(Collect.model_fields),
        "sites": set(Site.model_fields),
        "buckets": set(S3Bucket.model_fields) | set(DirectoryBucket.model_fields),
        "exports": set(Export.model_fields),
    }
    return sections.get(loc[0], set()) if len(loc) > 1 else set(Settings.model_fields)


def _did_you_mean(word: str, known: set[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known - {word}), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
