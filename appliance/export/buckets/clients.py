"""boto3's client for a bucket: address, timeouts, checksums, and where its keys come from."""

from functools import cache, partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    Credentials,
    DeferredRefreshableCredentials,
)
from botocore.exceptions import ClientError, NoCredentialsError

from appliance.config import S3Bucket as S3Settings
from appliance.export.buckets.profiles import profile_of, region_of

if TYPE_CHECKING:
    from botocore.loaders import Loader
    from mypy_boto3_s3 import S3Client

_ATTEMPTS = 3
_SESSION_NAME = "appliance"


def make_client(settings: S3Settings) -> "S3Client":
    """Return a client of its own for a bucket; nothing is sent yet."""
    session = _new_session()
    if settings.assume_role_arn:
        session.register_component("credential_provider", CredentialResolver([_Role(settings)]))
        keys: dict[str, Any] = {}
    else:
        keys = _static_keys(settings)
    client = boto3.session.Session(botocore_session=session).client(
        "s3",
        config=_config(settings),
        endpoint_url=settings.endpoint_url or None,
        region_name=region_of(settings),
        **keys,
    )
    client.meta.events.register_first("needs-retry.s3.HeadBucket", _stay_here)
    return client


def _new_session() -> botocore.session.Session:
    """Return a session of its own: boto3's default one is not made for threads."""
    session = botocore.session.Session()
    session.register_component("data_loader", _services())
    return session


@cache
def _services() -> "Loader":
    """Return what knows AWS's services. It reads them once; for each client anew, that took 150 of its 160 ms."""
    loader: Loader = botocore.session.Session().get_component("data_loader")
    return loader


def _stay_here(response: Any, **_: Any) -> None:
    """End botocore's search for a bucket's region where it would begin again: it asks HeadBucket for nothing else.

    A proxy that sends all requests elsewhere, as from http to https, would have it turn in a circle.
    """
    if response is not None and response[0].status_code != HTTPStatus.OK:
        raise ClientError(response[1], "HeadBucket")


def _config(settings: S3Settings) -> Config:
    checksums: Literal["when_supported", "when_required"] = (
        "when_supported" if profile_of(settings).own_checksums else "when_required"
    )
    return Config(
        signature_version="s3v4",
        s3={"addressing_style": _addressing_style(settings)},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
    ).merge(_patience(settings))


def _patience(settings: S3Settings) -> Config:
    return Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        connect_timeout=settings.connect_timeout_seconds,
        read_timeout=settings.read_timeout_seconds,
    )


def _addressing_style(settings: S3Settings) -> Literal["auto", "path", "virtual"]:
    # A server of one's own seldom has a name (and a certificate) for each bucket.
    if settings.addressing_style == "auto" and settings.endpoint_url:
        return "path"
    return settings.addressing_style


def _static_keys(settings: S3Settings) -> dict[str, Any]:
    if not settings.access_key_id.get_secret_value():
        return {}
    return {
        "aws_access_key_id": settings.access_key_id.get_secret_value(),
        "aws_secret_access_key": settings.secret_access_key.get_secret_value(),
    }


class _Role(CredentialProvider):
    """Keys of a role, asked for when they are first needed and again before they run out."""

    METHOD = "assume-role"
    CANONICAL_NAME = "custom-appliance-role"

    def __init__(self, settings: S3Settings) -> None:
        super().__init__()
        self._settings = settings

    def load(self) -> DeferredRefreshableCredentials:
        return DeferredRefreshableCredentials(refresh_using=self._assume, method=self.METHOD)

    def _assume(self) -> Any:
        # A new session each time: keys of the usual chain may have changed since.
        session = _new_session()
        names = {"RoleSessionName": _SESSION_NAME}
        if self._settings.assume_role_external_id:
            names["ExternalId"] = self._settings.assume_role_external_id
        fetcher = AssumeRoleCredentialFetcher(
            partial(session.create_client, **self._service(session)),
            self._source(session),
            self._settings.assume_role_arn,
            extra_args=names,
        )
        return fetcher.fetch_credentials()

    def _source(self, session: botocore.session.Session) -> Credentials:
        """Return the keys that may assume the role: those of the configuration, or of AWS's usual chain."""
        if self._settings.access_key_id.get_secret_value():
            return Credentials(
                self._settings.access_key_id.get_secret_value(), self._settings.secret_access_key.get_secret_value()
            )
        found = session.get_credentials()
        if found is None:
            raise NoCredentialsError
        return found

    def _service(self, session: botocore.session.Session) -> dict[str, Any]:
        own = profile_of(self._settings).own_sts
        region = region_of(self._settings) or session.get_config_variable("region") or "us-east-1"
        return {
            "region_name": region,
            "endpoint_url": (self._settings.endpoint_url or None) if own else None,
            "config": _patience(self._settings),
        }
