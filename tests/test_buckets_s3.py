"""S3: what each provider is asked for, large objects in parts, roles, and every way in which a server can fail."""

import logging
import re
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import ACCESS_KEY, SECRET_KEY, S3Server, free_port, moto_client, moto_settings
from faulty import Fault, Faulty, faulty, raw_answer, refusal, refuse

from appliance.config import S3Bucket as S3Settings
from appliance.errors import BucketError, ForeignObjectError
from appliance.export.buckets.profiles import region_of
from appliance.export.buckets.s3 import S3Bucket
from appliance.export.files import LocalObject, described

KEY = "raw/site=shop/x.jsonl.gz"
PART = 5 << 20
SMALL, LARGE = b'{"a": 1}\n' * 100, bytes(range(256)) * 4096 * 11  # the second is 11 MiB: three parts
TIMEOUTS: dict[str, Any] = {"connect_timeout_seconds": 0.3, "read_timeout_seconds": 0.3}


@pytest.fixture
def local(tmp_path: Path) -> Callable[[bytes], LocalObject]:
    """Make files to put."""

    def make(content: bytes) -> LocalObject:
        path = tmp_path / f"local-{uuid4().hex}"
        path.write_bytes(content)
        return described(path)

    return make


@pytest.fixture
def bucket(moto: str) -> str:
    name = f"b-{uuid4().hex}"
    moto_client(moto).create_bucket(Bucket=name)
    return name


@pytest.fixture
def proxy(moto: str) -> Iterator[Faulty]:
    with faulty(moto) as one:
        yield one


def make_bucket(**options: Any) -> S3Bucket:
    return S3Bucket("acme", S3Settings.model_validate(options), part_bytes=PART)


def at(endpoint: str, bucket: str, provider: str = "minio", **options: Any) -> S3Bucket:
    return make_bucket(**{**moto_settings(endpoint, bucket, provider), **options})


def content_of(moto: str, bucket: str) -> bytes:
    return bytes(moto_client(moto).get_object(Bucket=bucket, Key=KEY)["Body"].read())


def unfinished(moto: str, bucket: str) -> list[Any]:
    return list(moto_client(moto).list_multipart_uploads(Bucket=bucket).get("Uploads", []))


# ---------------------------------------------------------------------------------------------------------------------
# What each provider is asked for


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["in one piece", "in parts"])
def test_each_object_is_given_the_options_of_its_bucket(
    moto: str, bucket: str, local: Callable[[bytes], LocalObject], content: bytes
) -> None:
    key = moto_client(moto, "kms").create_key()["KeyMetadata"]["KeyId"]
    options = {"encryption": "aws:kms", "kms_key_id": key, "storage_class": "STANDARD_IA"}
    at(moto, bucket, "aws", **options, tags={"team": "web + co", "k": ""}).put(KEY, local(content))
    found = moto_client(moto).head_object(Bucket=bucket, Key=KEY)
    assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", key)
    assert found["StorageClass"] == "STANDARD_IA"
    tags = moto_client(moto).get_object_tagging(Bucket=bucket, Key=KEY)["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "web + co", "k": ""}
    assert content_of(moto, bucket) == content


def test_an_object_may_be_encrypted_by_s3_itself(moto: str, bucket: str, local: Callable[[bytes], LocalObject]) -> None:
    at(moto, bucket, encryption="AES256").put(KEY, local(SMALL))
    assert moto_client(moto).head_object(Bucket=bucket, Key=KEY)["ServerSideEncryption"] == "AES256"


# The provider, its encryption, the object; the digest by which it is checked: one of the server, or one of a reading.
CHECKED_BY = {
    "aws": ("aws", "", SMALL, "x-amz-checksum-sha256"),
    "aws with KMS": ("aws", "aws:kms", SMALL, "x-amz-checksum-sha256"),
    "aws in parts": ("aws", "", LARGE, "x-amz-checksum-crc32"),
    "minio": ("minio", "", SMALL, "x-amz-checksum-sha256"),
    "minio in parts": ("minio", "", LARGE, "Content-MD5"),
    "r2": ("r2", "", SMALL, "Content-MD5"),
    "b2": ("b2", "", SMALL, "Content-MD5"),
    "gcs": ("gcs", "", SMALL, "Content-MD5"),
    "other": ("other", "", SMALL, "Content-MD5"),
    "other in parts": ("other", "", LARGE, "Content-MD5"),
    "other in parts with KMS": ("other", "aws:kms", LARGE, None),
    "other with KMS": ("other", "aws:kms", SMALL, None),
}


@pytest.mark.parametrize(("provider", "encryption", "content", "digest"), CHECKED_BY.values(), ids=CHECKED_BY)
def test_an_object_is_checked_by_a_digest_of_the_server_or_read_back(  # noqa: PLR0913, PLR0917
    proxy: Faulty,
    bucket: str,
    local: Callable[[bytes], LocalObject],
    provider: str,
    encryption: str,
    content: bytes,
    digest: str | None,
) -> None:
    at(proxy.url, bucket, provider, encryption=encryption).put(KEY, local(content))
    assert proxy.count("^GET ") == (0 if digest else 1)
    sent = {name.lower() for headers in proxy.headers for name in headers}
    if digest:
        assert digest.lower() in sent
    asked = [name for name in sent if "checksum" in name or name in {"if-none-match", "content-md5"}]
    if provider in {"r2", "b2", "gcs", "other"}:
        assert not [name for name in asked if "checksum" in name]
    assert ("if-none-match" in asked) == (provider in {"aws", "minio", "r2"})


REGIONS: dict[str, tuple[dict[str, str], str | None]] = {
    "aws": ({}, None),
    "aws, given": ({"region": "eu-central-1"}, "eu-central-1"),
    "aws by another address": ({"endpoint_url": "https://x.example"}, "us-east-1"),
    "r2": ({"provider": "r2", "endpoint_url": "https://x.r2.cloudflarestorage.com"}, "auto"),
    "b2": ({"provider": "b2", "endpoint_url": "https://s3.us-west-004.backblazeb2.com"}, "us-west-004"),
    "b2 by another address": ({"provider": "b2", "endpoint_url": "https://files.example"}, "us-east-1"),
    "minio": ({"provider": "minio", "endpoint_url": "https://x.example"}, "us-east-1"),
    "gcs": ({"provider": "gcs", "endpoint_url": "https://storage.googleapis.com"}, "auto"),
}


@pytest.mark.parametrize(("options", "region"), REGIONS.values(), ids=REGIONS)
def test_each_provider_has_a_region_to_sign_for(options: dict[str, str], region: str | None) -> None:
    assert region_of(S3Settings.model_validate({"bucket": "acme-events", **options})) == region


@pytest.mark.parametrize(
    ("style", "host", "path"), [("auto", "s3.test", "/b/"), ("path", "s3.test", "/b/"), ("virtual", "b.s3.test", "/")]
)
def test_a_bucket_is_addressed_by_path_or_by_name(  # noqa: PLR0913, PLR0917
    proxy: Faulty, bucket: str, monkeypatch: pytest.MonkeyPatch, style: str, host: str, path: str
) -> None:
    original, port = socket.getaddrinfo, proxy.url.rpartition(":")[2]
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, **options: original("127.0.0.1", *rest, **options))
    proxy.faults.append(Fault(answer=raw_answer(404)))
    assert not at(f"http://s3.test:{port}", bucket, addressing_style=style).exists(KEY)
    assert proxy.headers[0]["Host"] == host.replace("b.", f"{bucket}.") + f":{port}"
    assert proxy.seen == [f"HEAD {path.replace('b', bucket)}{KEY.replace('=', '%3D')}"]


# ---------------------------------------------------------------------------------------------------------------------
# Large objects


@pytest.mark.parametrize("provider", ["aws", "minio", "r2", "other"])
def test_a_large_object_goes_in_parts_and_stands_there_whole(
    moto: str, proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], provider: str
) -> None:
    one = at(proxy.url, bucket, provider)
    one.put(KEY, local(LARGE))
    assert content_of(moto, bucket) == LARGE
    assert proxy.count("^PUT .*partNumber=") == 3
    one.put(KEY, local(LARGE))
    assert proxy.count("^PUT ") == 3
    assert not unfinished(moto, bucket)
    with pytest.raises(ForeignObjectError):
        one.put(KEY, local(LARGE[:-1] + b"!"))


def test_a_large_object_goes_in_parts_to_a_server_that_checks_signatures(
    s3: S3Server, local: Callable[[bytes], LocalObject]
) -> None:
    name = s3.new_bucket()
    make_bucket(**s3.settings(name)).put(KEY, local(LARGE))
    assert s3.objects(name) == {KEY: LARGE}


@pytest.mark.parametrize("size", [PART, PART + 1, 2 * PART], ids=["one part", "a byte more", "two parts"])
def test_no_byte_is_lost_where_parts_begin(
    moto: str, proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], size: int
) -> None:
    at(proxy.url, bucket, "aws").put(KEY, local(LARGE[:size]))
    assert content_of(moto, bucket) == LARGE[:size]
    assert proxy.count("partNumber=") == (0 if size == PART else 2)


BREAKS = {
    "a part refused": refuse(403, "AccessDenied", method="PUT", path="partNumber=2"),
    "a part cut off": [Fault("partNumber=3", request_cut=1000)],
    "a part's answer cut off": [Fault("partNumber=1", cut=20)],
    "a server out of order": refuse(503, "SlowDown", method="PUT", path="partNumber=2"),
    "the end refused": refuse(400, "InvalidPart", method="POST", path="uploadId="),
    "an error in an answer of 200": [
        Fault(
            "^POST .*uploadId=", answer=raw_answer(200, refusal(200, "InternalError")("GET").partition(b"\r\n\r\n")[2])
        )
    ],
}


@pytest.mark.parametrize("faults", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("provider", ["aws", "other"])
def test_an_upload_that_is_cut_off_leaves_no_parts_behind(  # noqa: PLR0913, PLR0917
    moto: str, proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], faults: list[Fault], provider: str
) -> None:
    proxy.faults += faults
    with pytest.raises(BucketError, match=r"^bucket acme: cannot put raw/site=shop/x.jsonl.gz: "):
        at(proxy.url, bucket, provider).put(KEY, local(LARGE))
    assert proxy.count("^DELETE .*uploadId=") == 1
    assert not unfinished(moto, bucket)
    proxy.faults.clear()
    at(proxy.url, bucket, provider).put(KEY, local(LARGE))
    assert content_of(moto, bucket) == LARGE


def test_an_upload_that_is_ended_by_ctrl_c_leaves_no_parts_behind(
    moto: str, proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = at(proxy.url, bucket)
    monkeypatch.setattr(one._client, "complete_multipart_upload", interrupt)  # noqa: SLF001
    with pytest.raises(KeyboardInterrupt):
        one.put(KEY, local(LARGE))
    assert not unfinished(moto, bucket)


def interrupt(**_: Any) -> None:
    raise KeyboardInterrupt


def test_parts_that_cannot_be_removed_are_told_of_beside_the_error_itself(
    proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults += refuse(400, "InvalidPart", method="PUT", path="partNumber=2") + refuse(
        403, "AccessDenied", method="DELETE", path="uploadId="
    )
    with caplog.at_level(logging.WARNING), pytest.raises(BucketError, match="InvalidPart"):
        at(proxy.url, bucket).put(KEY, local(LARGE))
    assert f"parts of {KEY} may be left behind" in caplog.text


@pytest.mark.parametrize("provider", ["aws", "minio", "r2", "other"])
def test_a_writer_who_comes_while_parts_are_sent_is_not_written_over(
    moto: str, proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], provider: str
) -> None:
    def write(answer: bytes) -> bytes:
        moto_client(moto).put_object(Bucket=bucket, Key=KEY, Body=b"another was faster")
        return answer

    proxy.faults.append(Fault("partNumber=3", edit=write))
    with pytest.raises(ForeignObjectError):
        at(proxy.url, bucket, provider).put(KEY, local(LARGE))
    assert content_of(moto, bucket) == b"another was faster"
    assert not unfinished(moto, bucket)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong and is borne

BORNE = {
    "slow down, twice": [Fault(times=2, answer=refusal(503, "SlowDown")("PUT"))],
    "an answer that was lost": [Fault("^PUT ", times=1, cut=0, reset=True)],
    "half an answer": [Fault("^PUT ", times=1, cut=5)],
    "a request that was cut off": [Fault("^PUT ", times=1, request_cut=100)],
    "the wrong region, told": refuse(400, "AuthorizationHeaderMalformed", Region="eu-west-3")[1:],
    "the last answer of parts lost": [Fault("^POST .*uploadId=", times=1, cut=0)],
}


@pytest.mark.parametrize("name", BORNE)
@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["in one piece", "in parts"])
def test_what_fails_once_is_tried_again_and_written_once(  # noqa: PLR0913, PLR0917
    moto: str, proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], name: str, content: bytes
) -> None:
    faults = [Fault(f.matches, min(f.times, 2), f.answer, f.edit, f.cut, f.reset, f.request_cut) for f in BORNE[name]]
    proxy.faults += [Fault(**{**vars(fault), "times": 1}) for fault in faults] if "region" in name else faults
    at(proxy.url, bucket, "aws").put(KEY, local(content))
    assert content_of(moto, bucket) == content
    assert not unfinished(moto, bucket)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong and is said

SKEW = refuse(403, "RequestTimeTooSkewed")
SAID: dict[str, tuple[list[Fault], str]] = {
    "no such key pair": (refuse(403, "InvalidAccessKeyId"), "does not know the access key: correct access_key_id"),
    "wrong secret": (refuse(403, "SignatureDoesNotMatch"), "the secret key is not that of the access key"),
    "old token": (refuse(400, "ExpiredToken"), "the session token has run out: renew"),
    "no such bucket": (refuse(404, "NoSuchBucket"), "create the bucket, or correct `bucket`"),
    "wrong region": (
        refuse(400, "AuthorizationHeaderMalformed", Region="eu-west-3"),
        'the region (us-east-1) is not the bucket\'s: set region = "eu-west-3"',
    ),
    "moved": (refuse(301, "PermanentRedirect"), "is not the bucket's: set the bucket's `region`"),
    "clock": (SKEW, "this machine's clock is wrong (here it is "),
    "the server's clock": (SKEW, "at the server Mon, 01 Jan 2001 00:00:00 GMT): set it"),
    "listing": (
        refuse(403, "AccessDenied"),
        "a permission is missing, s3:ListBucket (without it the server does not say whether a key is free)",
    ),
    "reading": (
        refuse(403, "AccessDenied", path="/raw/"),
        "a permission is missing, s3:GetObject: check the keys",
    ),
    "writing": (refuse(403, "AccessDenied", method="PUT"), "a permission is missing, s3:PutObject: check the keys"),
    "named by the server": (
        refuse(403, "AccessDenied", "User: x is not authorized to perform: kms:GenerateDataKey on", method="PUT"),
        "a permission is missing, kms:GenerateDataKey: check",
    ),
    "checksum": (refuse(400, "BadDigest", method="PUT"), "refused the checksum (BadDigest)"),
    "checksum by another name": (
        refuse(400, "InvalidRequest", "x-amz-checksum-sha256 is unknown", method="PUT"),
        "refused the checksum (InvalidRequest)",
    ),
    "not built": (refuse(501, "NotImplemented", "no tags", method="PUT"), "cannot do what was asked: no tags"),
    "KMS": (refuse(400, "KMS.DisabledException", method="PUT"), "the key of KMS cannot be used"),
    "overloaded": (refuse(503, "SlowDown"), "overloaded or out of order (503): nothing to correct here"),
    "out of order": ([Fault(answer=raw_answer(500))], "overloaded or out of order (500): nothing"),
    "overloaded by writing": (refuse(503, "SlowDown", method="PUT"), "overloaded or out of order (SlowDown): nothing"),
    "a proxy out of order": ([Fault("^PUT", answer=raw_answer(502, b"<h1>Bad"))], "answered what is not S3 (502)"),
    "a code of its own": (refuse(418, "Teapot", "short", method="PUT"), "the server refused it (Teapot: short)"),
    "silent": ([Fault(hang=True)], "gave no answer within 0.3 s (read_timeout_seconds)"),
    "reset": ([Fault(cut=0, reset=True)], "broke off: the next run tries again"),
    "closed": ([Fault(cut=0)], "broke off: the next run tries again"),
    "sent elsewhere": (
        [Fault(answer=raw_answer(301, b"", {"Location": "https://x"}))],
        "or correct endpoint_url (https",
    ),
    "cut within the head": ([Fault("^HEAD", cut=17)], "answered what is not S3, or half of it"),
    "a conflict": (refuse(409, "ConditionalRequestConflict", method="PUT"), "was put and is not there"),
}


@pytest.mark.parametrize(("faults", "said"), SAID.values(), ids=SAID)
def test_what_is_wrong_is_said_with_what_to_do(
    proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], faults: list[Fault], said: str
) -> None:
    proxy.faults += [Fault(**vars(fault)) for fault in faults]
    with pytest.raises(BucketError) as raised:
        at(proxy.url, bucket, **TIMEOUTS).put(KEY, local(SMALL))
    text = str(raised.value)
    assert text.startswith(f"bucket acme: {'' if 'was put' in said else 'cannot put '}{KEY}")
    assert said in text
    assert not re.search(f"{ACCESS_KEY}|{SECRET_KEY}|\n", text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tags": {"a": "b"}}, "s3:PutObject or s3:PutObjectTagging for the tags: check"),
        ({"encryption": "aws:kms"}, "s3:PutObject or kms:GenerateDataKey and kms:Decrypt for the key of KMS: check"),
    ],
    ids=["tags", "KMS"],
)
def test_the_permissions_that_an_option_needs_are_named_too(
    proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject], options: dict[str, Any], said: str
) -> None:
    proxy.faults += refuse(403, "AccessDenied", method="PUT")
    with pytest.raises(BucketError, match=said):
        at(proxy.url, bucket, **options).put(KEY, local(SMALL))


READING: dict[str, tuple[list[Fault], str]] = {
    "cut off": ([Fault("^GET", cut=400)], "broke off: the next run tries again"),
    "reset": ([Fault("^GET", cut=400, reset=True)], "broke off: the next run tries again"),
    "cut within the head": ([Fault("^GET", cut=17)], "answered what is not S3, or half of it"),
    "no such bucket": (refuse(404, "NoSuchBucket"), "create the bucket"),
    "archived": (refuse(403, "InvalidObjectState"), "cannot be read at once: correct `storage_class`"),
    "changed": ([Fault("^GET", edit=lambda answer: answer[:-2] + b"!\n")], "do not match their checksum"),
}


@pytest.mark.parametrize(("faults", "said"), READING.values(), ids=READING)
def test_an_object_that_comes_damaged_is_no_object(  # noqa: PLR0913, PLR0917
    proxy: Faulty,
    bucket: str,
    local: Callable[[bytes], LocalObject],
    tmp_path: Path,
    faults: list[Fault],
    said: str,
) -> None:
    one = at(proxy.url, bucket, "aws")
    one.put(KEY, local(SMALL))
    proxy.faults += [Fault(**vars(fault)) for fault in faults]
    with pytest.raises(BucketError, match=re.escape(said)):
        one.fetch(KEY, tmp_path / "copy")
    with pytest.raises(BucketError, match=re.escape(said)):
        one.sha256(KEY)


@pytest.mark.parametrize(
    "answer",
    [
        raw_answer(200, b"<html>Welcome"),
        raw_answer(200, b"<ListBucketResult><Contents><Key>half"),
        raw_answer(200)[:17],
        b"no HTTP\r\n\r\n",
    ],
    ids=["a page", "half a list", "cut within the head", "no HTTP"],
)
def test_what_is_no_s3_is_said_to_be_none(proxy: Faulty, bucket: str, answer: bytes) -> None:
    proxy.faults.append(Fault(answer=answer, cut=len(answer)))
    with pytest.raises(BucketError, match=r"answered what is not S3|broke off"):
        list(at(proxy.url, bucket).list("raw/"))


def test_a_server_that_is_not_there_is_named(bucket: str) -> None:
    port = free_port()
    with pytest.raises(BucketError, match=rf"Could not connect to 127.0.0.1:{port}: nothing listens there"):
        at(f"http://127.0.0.1:{port}", bucket).exists(KEY)


def test_a_name_that_nobody_knows_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(
        BucketError, match=r"Could not connect to s3.test: this name is not known: correct endpoint_url"
    ):
        at("http://s3.test", bucket).exists(KEY)


def test_a_server_that_takes_no_connection_is_not_waited_for(bucket: str) -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):
            waiting.settimeout(0)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(BucketError, match=r"Could not connect to 127.0.0.1:\d+ within 0.3 s: a firewall"):
            at(f"http://127.0.0.1:{full.getsockname()[1]}", bucket, **TIMEOUTS).exists(KEY)


def test_a_server_without_tls_where_there_should_be_is_named(proxy: Faulty, bucket: str) -> None:
    with pytest.raises(BucketError, match=r"the TLS of 127.0.0.1:\d+ cannot be trusted .*https or http"):
        at(proxy.url.replace("http:", "https:"), bucket).exists(KEY)


def test_a_profile_that_is_not_there_is_its_buckets_trouble_alone(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_bucket(**s3.settings(s3.new_bucket(), access_key_id="", secret_access_key=""))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(BucketError, match=r"bucket acme: cannot look up .*nobody"):
        one.exists(KEY)


# ---------------------------------------------------------------------------------------------------------------------
# Roles

ROLE = {"assume_role_arn": "arn:aws:iam::123456789012:role/export", "assume_role_external_id": "ours-7"}


def asked_for(proxy: Faulty) -> list[bytes]:
    return [body for body in proxy.bodies if b"Action=AssumeRole" in body]


@pytest.mark.parametrize("source", ["configuration", "environment"])
@pytest.mark.parametrize("provider", ["aws", "minio"])
def test_a_role_is_taken_on_once_with_its_external_id(  # noqa: PLR0913, PLR0917
    proxy: Faulty,
    bucket: str,
    local: Callable[[bytes], LocalObject],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    provider: str,
) -> None:
    keys: dict[str, str] = {}
    if source == "environment":
        keys = {"access_key_id": "", "secret_access_key": ""}
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    if provider == "aws":
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", proxy.url)
    one = at(proxy.url, bucket, provider, **ROLE, **keys)
    assert not proxy.seen
    one.put(KEY, local(SMALL))
    one.put(KEY, local(SMALL))
    (asked,) = asked_for(proxy)
    assert b"ExternalId=ours-7" in asked
    assert b"RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fexport" in asked
    assert f"Credential={ACCESS_KEY}/" in proxy.headers[0]["Authorization"]
    assert all("X-Amz-Security-Token" in headers for headers in proxy.headers[1:])
    assert not any(ACCESS_KEY in headers["Authorization"] for headers in proxy.headers[1:])


def test_keys_of_a_role_are_renewed_before_they_run_out(
    proxy: Faulty, bucket: str, local: Callable[[bytes], LocalObject]
) -> None:
    soon = f"{datetime.now(UTC) + timedelta(minutes=5):%Y-%m-%dT%H:%M:%SZ}".encode()

    def run_out_soon(answer: bytes) -> bytes:
        body = re.sub(rb"<Expiration>[^<]*<", b"<Expiration>" + soon + b"<", answer.partition(b"\r\n\r\n")[2])
        return raw_answer(200, body, {"Content-Type": "text/xml"})

    proxy.faults.append(Fault("^POST /$", times=1, edit=run_out_soon))
    one = at(proxy.url, bucket, **ROLE)
    one.put(KEY, local(SMALL))
    one.put(KEY, local(SMALL))
    assert one.sha256(KEY) == local(SMALL).sha256
    assert len(asked_for(proxy)) == 2
    tokens = [headers["X-Amz-Security-Token"] for headers in proxy.headers if "X-Amz-Security-Token" in headers]
    assert len(set(tokens)) == 2


REFUSED_ROLES = {
    "the role": (
        "AccessDenied",
        403,
        "the role arn:aws:iam::123456789012:role/export may not be taken on: let its trust",
    ),
    "the keys": ("InvalidClientTokenId", 403, "the server does not know the access key"),
    "the secret": ("SignatureDoesNotMatch", 403, "the secret key is not that of the access key"),
}


@pytest.mark.parametrize(("code", "status", "said"), REFUSED_ROLES.values(), ids=REFUSED_ROLES)
def test_a_role_that_is_refused_is_said_to_be(proxy: Faulty, bucket: str, code: str, status: int, said: str) -> None:
    error = f"<ErrorResponse><Error><Code>{code}</Code><Message>no</Message></Error></ErrorResponse>".encode()
    proxy.faults.append(Fault("^POST /$", answer=raw_answer(status, error, {"Content-Type": "text/xml"})))
    with pytest.raises(BucketError, match=re.escape(said)):
        at(proxy.url, bucket, **ROLE).exists(KEY)


def test_a_role_without_keys_to_ask_for_it_says_so(proxy: Faulty, bucket: str) -> None:
    with pytest.raises(BucketError, match="no credentials were found: set access_key_id"):
        at(proxy.url, bucket, **ROLE, access_key_id="", secret_access_key="").exists(KEY)
