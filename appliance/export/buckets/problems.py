"""What boto3 and the servers say when something fails -> a sentence that says what to do."""

import re
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from appliance.config import S3Bucket as S3Settings
from appliance.export.buckets.profiles import region_of

# Everything that a call of a client, or reading an answer, may raise. RuntimeError: keys that came are too old already;
# ValueError: an address that is none, of which the environment may have some too.
ERRORS = (ClientError, BotoCoreError, ResponseParserError, OSError, RuntimeError, ValueError)
_MAX_MESSAGE_CHARS = 300
_KEYS = "correct access_key_id and secret_access_key, or make a new pair"
_REFUSED = frozenset(
    {"AccessDenied", "AccessDeniedException", "AllAccessDisabled", "AccountProblem", "Forbidden", "403"}
)
_WRONG_REGION = frozenset(
    {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException"}
    | {"InvalidRegion", "301", "307"}
)
_CHECKSUM = re.compile(r"checksum|content-md5|trailer|aws-chunked", re.IGNORECASE)
_CHECKSUM_REFUSED = (
    "the server refused the checksum ({code}): its bytes came changed, or it reads checksums otherwise: "
    'correct `provider` ("other" asks least of a server)'
)
_BUSY = "the server is overloaded or out of order ({code}): nothing to correct here, the next run tries again"
_NO_S3 = (
    "something answered what is not S3 ({code}): the server, or one before it, is out of order (then the next run "
    "tries again), or endpoint_url is wrong"
)
_CODES: Mapping[str, str] = {
    "NoSuchBucket": "there is no bucket {bucket}: create the bucket, or correct `bucket`",
    "InvalidBucketName": "{bucket} can be no bucket's name: correct `bucket`",
    "NoSuchKey": "nothing stands there",
    "NoSuchUpload": "somebody ended this upload: nothing to correct here, the next run tries again",
    "InvalidAccessKeyId": "the server does not know the access key: " + _KEYS,
    "InvalidClientTokenId": "the server does not know the access key: " + _KEYS,
    "UnrecognizedClientException": "the server does not know the access key: " + _KEYS,
    "SignatureDoesNotMatch": "the secret key is not that of the access key: " + _KEYS,
    "ExpiredToken": "the session token has run out: renew the keys where AWS's usual chain finds them",
    "InvalidToken": "the server does not accept the session token: renew the keys where AWS's usual chain finds them",
    "RequestTimeTooSkewed": "this machine's clock is wrong ({clock}): set it, best by NTP",
    "BadDigest": _CHECKSUM_REFUSED,
    "InvalidDigest": _CHECKSUM_REFUSED,
    "XAmzContentSHA256Mismatch": _CHECKSUM_REFUSED,
    "XAmzContentChecksumMismatch": _CHECKSUM_REFUSED,
    "NotImplemented": "the server cannot do what was asked: {message}: correct `provider`, and take out `tags`, "
    "`storage_class` and `encryption` where it has none",
    "InvalidStorageClass": 'there is no storage class "{storage_class}" here: correct `storage_class`',
    "InvalidObjectState": "objects of its storage class cannot be read at once: correct `storage_class`",
    "InvalidTag": "the server refused the tags: {message}: correct `tags`",
    "MethodNotAllowed": "what answers is no S3 bucket: correct `endpoint_url`",
    "ConditionalRequestConflict": "another upload to this key is under way: the next run tries again",
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "InternalError": _BUSY,
}
_PERMISSIONS = {
    "ListObjectsV2": "s3:ListBucket (without it the server does not say whether a key is free)",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
}
_NAMED = re.compile(r"not authorized to perform: ([\w-]+:\w+)")
_SERVER_ERROR = 500


def reason_of(error: Exception, settings: S3Settings) -> str:
    """Return why, and what to do. No secret is in it."""
    if isinstance(error, ClientError):
        return _refusal(error, settings)
    for kinds, sentence in _TROUBLES:
        if isinstance(error, kinds):
            return sentence(error, settings)
    return _one_line(error)


def status_of(error: ClientError) -> int:
    """Return the answer's HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """Return S3's own word for the error; an answer without a body has its status instead."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:_MAX_MESSAGE_CHARS]


def told(answer: Mapping[str, Any], name: str) -> Any:
    """Return a field of an answer. Where its head was cut off, http.client sees nothing wrong with it."""
    if name not in answer:
        raise ResponseParserError(f"the answer has no {name}")
    return answer[name]


# ---- what a server refused


def _refusal(error: ClientError, settings: S3Settings) -> str:
    code, message = code_of(error), _one_line(error.response.get("Error", {}).get("Message", ""))
    if code in _REFUSED:
        return _missing_permission(error, message, settings)
    if code in _WRONG_REGION:
        return _wrong_region(error, settings)
    if code.startswith("KMS"):
        return f"the key of KMS cannot be used ({code}: {message}): correct kms_key_id, or enable the key"
    return _text(error, code, message).format(
        code=code,
        message=message,
        bucket=settings.bucket,
        storage_class=settings.storage_class,
        clock=_clocks(error),
    )


def _text(error: ClientError, code: str, message: str) -> str:
    if code in _CODES:
        return _CODES[code]
    if _CHECKSUM.search(message):
        return _CHECKSUM_REFUSED
    if status_of(error) < _SERVER_ERROR:
        return "the server refused it ({code}: {message})"
    # Without a word of S3's own, unless the answer is one to HEAD, which never has any.
    return _NO_S3 if code.isdigit() and error.operation_name != "HeadObject" else _BUSY


def _missing_permission(error: ClientError, message: str, settings: S3Settings) -> str:
    if error.operation_name == "AssumeRole":
        return (
            f"the role {settings.assume_role_arn} may not be taken on: let its trust policy name the owner of these "
            "keys, and the same external id as assume_role_external_id; let the keys have sts:AssumeRole"
        )
    named = _NAMED.search(message)
    permission = named[1] if named else _PERMISSIONS.get(error.operation_name) or _for_writing(settings)
    return f"a permission is missing, {permission}: check the keys, and that they may list, read and write here"


def _for_writing(settings: S3Settings) -> str:
    also = [
        *(["s3:PutObjectTagging for the tags"] if settings.tags else []),
        *(["kms:GenerateDataKey and kms:Decrypt for the key of KMS"] if settings.encryption == "aws:kms" else []),
    ]
    return " or ".join(["s3:PutObject", *also])


def _wrong_region(error: ClientError, settings: S3Settings) -> str:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    right = (
        f'set region = "{_one_line(region)}"'
        if region
        else "set the bucket's `region`, or correct endpoint_url (https rather than http?)"
    )
    asked = region_of(settings) or "that of AWS's usual chain"
    return f"the region ({asked}) is not the bucket's: {right}"


def _clocks(error: ClientError) -> str:
    told = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "another time")
    return f"here it is {datetime.now(UTC):%a, %d %b %Y %H:%M:%S} GMT, at the server {told}"


# ---- what never became an answer


def _host(error: BaseException, settings: S3Settings) -> str:
    details = getattr(error, "kwargs", {})
    return urlsplit(str(details.get("endpoint_url") or settings.endpoint_url)).netloc or "the server"


def _no_connection(error: Exception, settings: S3Settings) -> str:
    host = _host(error, settings)
    why = f"there is no route to {host}: see the network and the firewall of this machine"
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror):
            why = "this name is not known: correct endpoint_url and region, or see this machine's DNS"
        elif isinstance(cause, ConnectionRefusedError):
            why = "nothing listens there: correct endpoint_url, or start the server"
    return f"Could not connect to {host}: {why}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _slow_connection(error: Exception, settings: S3Settings) -> str:
    return (
        f"Could not connect to {_host(error, settings)} within {settings.connect_timeout_seconds:g} s: a firewall may "
        "stand between, or endpoint_url is wrong (connect_timeout_seconds)"
    )


def _slow_answer(error: Exception, settings: S3Settings) -> str:
    return (
        f"{_host(error, settings)} gave no answer within {settings.read_timeout_seconds:g} s (read_timeout_seconds): "
        "the next run tries again"
    )


def _broken_off(error: Exception, settings: S3Settings) -> str:
    return f"the connection to {_host(error, settings)} broke off: the next run tries again"


def _no_s3(error: Exception, settings: S3Settings) -> str:
    return (
        f"{_host(error, settings)} answered what is not S3, or half of it: correct endpoint_url, "
        "or see what stands between"
    )


def _untrusted(error: Exception, settings: S3Settings) -> str:
    cause = _one_line(getattr(error, "kwargs", {}).get("error", ""))
    return (
        f"the TLS of {_host(error, settings)} cannot be trusted ({cause}): correct endpoint_url (https or http, its "
        "name), or let AWS_CA_BUNDLE name the file of its authority"
    )


def _no_keys(_: Exception, __: S3Settings) -> str:
    return (
        "no credentials were found: set access_key_id and secret_access_key, or let AWS's usual chain have some "
        "(environment, ~/.aws, instance role)"
    )


def _changed(_: Exception, __: S3Settings) -> str:
    return "the bytes that came do not match their checksum: the next run tries again"


_TROUBLES: tuple[tuple[tuple[type[Exception], ...], Callable[[Exception, S3Settings], str]], ...] = (
    ((exceptions.NoCredentialsError,), _no_keys),
    ((exceptions.EndpointConnectionError,), _no_connection),
    ((exceptions.ConnectTimeoutError,), _slow_connection),
    ((exceptions.ReadTimeoutError,), _slow_answer),
    ((exceptions.SSLError,), _untrusted),
    ((exceptions.FlexibleChecksumError, exceptions.ChecksumError), _changed),
    (
        (exceptions.ConnectionClosedError, exceptions.ResponseStreamingError, exceptions.IncompleteReadError),
        _broken_off,
    ),
    ((ResponseParserError,), _no_s3),
)
