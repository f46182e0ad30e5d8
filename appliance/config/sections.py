"""The sections of config.toml with their options and defaults."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, SecretStr, Tag, model_validator

from appliance.config import values
from appliance.config.values import (
    ALL_SITES,
    AccessKey,
    AlertUrl,
    FilePath,
    Name,
    NameOrNone,
    Network,
    Origin,
    Password,
    Prefix,
    Secret,
    SiteId,
    SiteOrAll,
    Tags,
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(_Section):
    """Where the appliance listens and keeps its data."""

    bind: Annotated[str, AfterValidator(values.check_bind)] = "0.0.0.0:8080"
    data_dir: FilePath = Path("/data")
    trusted_proxies: tuple[Network, ...] = ()
    demo: bool = False
    log_format: Literal["text", "json"] = "text"

    @property
    def host(self) -> str:
        """The address to bind, without the brackets of IPv6."""
        return self.bind.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The TCP port to bind."""
        return int(self.bind.rpartition(":")[2])

    @property
    def local_url(self) -> str:
        """Where a program on the same machine reaches it."""
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read here, not bound
        host = everywhere.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class DatabaseSettings(_Section):
    """Which PostgreSQL keeps the events; an empty URL means the embedded one."""

    url: Secret = SecretStr("")


class Admin(_Section):
    """Who may look in; both empty turns the admin pages off."""

    password: Password = SecretStr("")
    token: Secret = SecretStr("")

    @property
    def enabled(self) -> bool:
        """Whether there is any way to log in."""
        return bool(self.password.get_secret_value() or self.token.get_secret_value())


class Collect(_Section):
    """Limits of /collect; a rate of 0 is none."""

    max_body_bytes: Annotated[int, Field(ge=1024, le=16 * 1024 * 1024)] = 65536
    max_batch_events: Annotated[int, Field(ge=1, le=1_000)] = 500
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


_NAME_AT_AWS = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_WITHOUT_ROLES = frozenset({"r2", "b2", "gcs"})


class S3Bucket(_Section):
    """A bucket behind the S3 API."""

    kind: Literal["s3"] = "s3"
    provider: Literal["aws", "r2", "b2", "minio", "gcs", "other"] = "aws"
    bucket: Annotated[str, values.matching(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", "not a bucket's name")]
    prefix: Prefix = ""
    region: Annotated[
        str, values.matching(r"([A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]{0,61}[A-Za-z0-9])?", "write it like eu-central-1")
    ] = ""
    endpoint_url: Annotated[str, AfterValidator(values.check_endpoint)] = ""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    access_key_id: AccessKey = SecretStr("")
    secret_access_key: AccessKey = SecretStr("")
    assume_role_arn: Annotated[
        str,
        values.matching(
            r"(arn:\S{16,})?", "write the role's whole ARN, for example arn:aws:iam::123456789012:role/export"
        ),
    ] = ""
    assume_role_external_id: Annotated[
        str,
        values.matching(r"([\w+=,.@:/-]{2,1224})?", "an external id has letters, digits and _ + = , . @ : / - only"),
    ] = ""
    encryption: Literal["", "AES256", "aws:kms"] = ""
    kms_key_id: str = ""
    storage_class: Annotated[
        str, values.matching(r"[A-Z_]*", "a storage class is written in capitals: STANDARD_IA")
    ] = ""
    tags: Tags = {}
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
    def _name_is_one_of_aws(self) -> "S3Bucket":
        # Buckets of before 2018 may have other names, in AWS's oldest region alone.
        if self.provider != "aws" or self.endpoint_url or self.region == "us-east-1":
            return self
        if not re.fullmatch(_NAME_AT_AWS, self.bucket):
            raise ValueError(
                f'bucket "{self.bucket}": at AWS a name has 3 to 63 small letters, digits, - and . (for an old one '
                'with others set region = "us-east-1")'
            )
        return self

    @model_validator(mode="after")
    def _provider_has_an_address(self) -> "S3Bucket":
        if self.provider != "aws" and not self.endpoint_url:
            raise ValueError(f'provider "{self.provider}" needs endpoint_url')
        return self

    @model_validator(mode="after")
    def _roles_are_whole(self) -> "S3Bucket":
        if self.assume_role_external_id and not self.assume_role_arn:
            raise ValueError("assume_role_external_id is for a role: set assume_role_arn too")
        if self.assume_role_arn and self.provider in _WITHOUT_ROLES:
            raise ValueError(f'provider "{self.provider}" has no roles: take assume_role_arn out')
        return self

    @model_validator(mode="after")
    def _key_of_kms_is_used(self) -> "S3Bucket":
        if self.kms_key_id and self.encryption != "aws:kms":
            raise ValueError('kms_key_id is for encryption = "aws:kms"')
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


class Health(_Section):
    """When the appliance says of itself that it is not ready; 0 is never."""

    min_free_disk_bytes: Annotated[int, Field(ge=0)] = 256 * 1024 * 1024
    max_export_lag_minutes: Annotated[int, Field(ge=0)] = 0


class Alerts(_Section):
    """Who is told of what is wrong, and from when on; 0 minutes or percent are never."""

    urls: tuple[AlertUrl, ...] = ()
    failed_runs: Annotated[int, Field(ge=1, le=100)] = 3
    exports_late_minutes: Annotated[int, Field(ge=0)] = 120
    disk_free_percent: Annotated[int, Field(ge=0, le=90)] = 10
    spool_used_percent: Annotated[int, Field(ge=0, le=99)] = 50
