"""What each provider of S3 can be asked for."""

import re
from dataclasses import dataclass
from typing import Literal

from appliance.config import S3Bucket as S3Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One provider. What it is said to lack is not asked of it, and is made up for by looking."""

    # If-None-Match, by which the server itself refuses to write over an object. Where it is not known to be honoured,
    # the key is looked up first and the object checked afterwards.
    conditional_put: bool = False
    # The checksums that boto3 adds by itself, in a trailer; many servers take them for part of the object, or refuse.
    own_checksums: bool = False
    # The digest of an object put in one piece. Each server compares it before it stores; the MD5 comes back as ETag.
    digest: Literal["md5", "sha256"] = "md5"
    # The CRC-32 of a whole object that came in parts.
    multipart_crc: bool = False
    # A signature needs a region, also where the server cares little about it. Empty: as AWS's usual chain says.
    region: str = "us-east-1"
    # Where the host of endpoint_url names the region.
    region_in_host: str = ""
    # Where roles are asked for: at AWS's own service, or at endpoint_url.
    own_sts: bool = True


_PROFILES = {
    "aws": Profile(
        conditional_put=True, own_checksums=True, digest="sha256", multipart_crc=True, region="", own_sts=False
    ),
    "r2": Profile(conditional_put=True, region="auto"),
    "b2": Profile(region_in_host=r"https://s3\.([a-z0-9-]+)\.backblazeb2\.com"),
    "minio": Profile(conditional_put=True, digest="sha256"),
    "gcs": Profile(region="auto"),
    "other": Profile(),
}


def profile_of(settings: S3Settings) -> Profile:
    """Return what the configured provider can be asked for."""
    return _PROFILES[settings.provider]


def region_of(settings: S3Settings) -> str | None:
    """Return the region to sign for; None leaves it to AWS's usual chain."""
    profile = profile_of(settings)
    host = re.fullmatch(profile.region_in_host, settings.endpoint_url) if profile.region_in_host else None
    if settings.region or host:
        return settings.region or (host and host[1])
    return profile.region or ("us-east-1" if settings.endpoint_url else None)
