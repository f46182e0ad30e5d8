"""The sections of config.toml with their options and defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, SecretStr, Tag, model_validator

from appliance.config import values
from appliance.config.values import (
    ALL_SITES,
    FilePath,
    Name,
    NameOrNone,
    Network,
    Origin,
    Prefix,
    Secret,
    SiteId,
    SiteOrAll,
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(_Section):
    """Where the appliance listens and keeps its data."""

    bind: Annotated[str, AfterValidator(values.check_bind)] = "0.0.0.0:8080"
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
    """Limits of /collect; a rate of 0 is none."""

    max_body_bytes: Annotated[int, Field(ge=1024, le=16 * 1024 * 1024)] = 65536
    max_batch_events: Annotated[int, Field(ge=1, le=10_000)] = 500
    spool_max_bytes: Annotated[int, Field(ge=1024 * 1024)] = 1024 * 1024 * 1024
    requests_per_minute_per_address: Annotated[int, Field(ge=0, le=1_000_000)] = 3_000
    requests_per_minute_per_site: Annotated[int, Field(ge=0, le=10_000_000)] = 60_000


class Site(_Section):
    """One site that may send events."""

    id: SiteId
    origins: tuple[Origin, ...] = ()
    require_origin: bool = False
    honor_dnt: bool = False
    ip: Literal["keep", "truncate", "drop"] = "keep"


class S3Bucket(_Section):
    """A bucket behind the S3 API."""

    kind: Literal["s3"] = "s3"
    provider: Literal["aws", "r2", "b2", "minio", "gcs", "other"] = "aws"
    bucket: Annotated[str, values.matching(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", "not a bucket's name")]
    prefix: Prefix = ""
    region: str = ""
    endpoint_url: Annotated[str, AfterValidator(values.check_endpoint)] = ""
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
    schedule: Annotated[str, AfterValidator(values.check_cron)] = "5 * * * *"
    format: Literal["jsonl", "parquet", "csv"] = "jsonl"
    compression: Literal["", "gzip", "zstd", "none"] = ""
    escape_formulas: bool = False

    @property
    def codec(self) -> str:
        """The compression; without one named, the one that suits the format."""
        return self.compression or ("zstd" if self.format == "parquet" else "gzip")

    @model_validator(mode="after")
    def _only_csv_has_formulas(self) -> "Export":
        if self.escape_formulas and self.format != "csv":
            raise ValueError('escape_formulas is for format = "csv" alone')
        return self

    @property
    def bucket_names(self) -> tuple[str, ...]:
        """The buckets this job fills: client first, backup second."""
        return (self.client, self.backup) if self.backup else (self.client,)


class Retention(_Section):
    """How long rows stay in the table after their last delivery; 0 keeps them for ever."""

    keep_days: Annotated[int, AfterValidator(values.check_keep_days)] = 0
