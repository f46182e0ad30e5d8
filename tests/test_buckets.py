"""Buckets: an object is put once, checked where it stands, and never written over."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
from conftest import ACCESS_KEY, SECRET_KEY, S3Server, free_port, make_settings
from moto.server import ThreadedMotoServer

from appliance.errors import BucketError, ForeignObjectError
from appliance.export import buckets
from appliance.export.buckets import Bucket
from appliance.export.files import LocalObject, described

KEY = "raw/site=shop/date=2026-01-02/hour=03/acme-0000000001-0001.jsonl.gz"
CONTENT = b'{"a": 1}\n' * 1000


def build(name: str, **settings: Any) -> Bucket:
    return buckets.build(make_settings(buckets={name: settings}, exports={"job": {"client": name}}))[name]


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Run a server that honours If-None-Match, which rclone does not."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@dataclass
class Place:
    """A bucket, and a way to it that does not lead through our code."""

    bucket: Any
    kind: str
    write: Callable[[str, bytes], object]
    read: Callable[[str], bytes]
    names: Callable[[], list[str]]


def s3_place(kind: str, settings: dict[str, Any], client: Any) -> Place:
    def names() -> list[str]:
        return [entry["Key"] for entry in client.list_objects_v2(Bucket=settings["bucket"]).get("Contents", [])]

    return Place(
        build("acme", **settings),
        kind,
        lambda key, content: client.put_object(Bucket=settings["bucket"], Key=key, Body=content),
        lambda key: bytes(client.get_object(Bucket=settings["bucket"], Key=key)["Body"].read()),
        names,
    )


def directory_place(root: Path) -> Place:
    root.mkdir()

    def write(key: str, content: bytes) -> None:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(content)

    def names() -> list[str]:
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    bucket = build("acme", kind="directory", path=str(root))
    return Place(bucket, "directory", write, lambda key: (root / key).read_bytes(), names)


def moto_settings(endpoint: str, bucket: str, provider: str) -> dict[str, Any]:
    keys = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY}
    return {
        "kind": "s3",
        "provider": provider,
        "bucket": bucket,
        "endpoint_url": endpoint,
        "region": "us-east-1",
        **keys,
    }


@pytest.fixture(params=["directory", "rclone", "moto as minio", "moto as aws"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "directory":
        return directory_place(tmp_path / "nas")
    if request.param == "rclone":
        server: S3Server = request.getfixturevalue("s3")
        return s3_place(request.param, server.settings(server.new_bucket()), server.client())
    settings = moto_settings(request.getfixturevalue("moto"), f"b-{uuid4().hex}", request.param.split()[-1])
    client = moto_client(settings["endpoint_url"])
    client.create_bucket(Bucket=settings["bucket"])
    return s3_place(request.param, settings, client)


@cache
def moto_client(endpoint: str) -> Any:
    keys: Any = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


@pytest.fixture
def local(tmp_path: Path) -> LocalObject:
    path = tmp_path / "local"
    path.write_bytes(CONTENT)
    return described(path)


@pytest.mark.parametrize("source", ["environment", "profile"])
def test_keys_that_are_not_configured_come_from_the_usual_chain_of_aws(
    s3: S3Server, local: LocalObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    if source == "environment":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    else:
        profile = f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        (tmp_path / "credentials").write_text(profile)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    bucket = build("acme", **s3.settings(s3.new_bucket(), access_key_id="", secret_access_key=""))
    bucket.put(KEY, local)
    assert bucket.exists(KEY)


def test_a_bucket_without_any_keys_says_so(s3: S3Server, local: LocalObject) -> None:
    bucket = build("acme", **s3.settings(s3.new_bucket(), access_key_id="", secret_access_key=""))
    with pytest.raises(BucketError, match=r"bucket acme: cannot put .*credentials"):
        bucket.put(KEY, local)


def test_what_a_killed_process_left_in_a_directory_bucket_is_cleared_away_after_a_day(
    tmp_path: Path, local: LocalObject
) -> None:
    incoming = tmp_path / "nas" / ".incoming"
    incoming.mkdir(parents=True)
    for name, age in (("old", 25 * 3600), ("young", 60)):
        (incoming / name).write_text("half")
        os.utime(incoming / name, (time.time() - age,) * 2)
    build("nas", kind="directory", path=tmp_path / "nas").put(KEY, local)
    assert [path.name for path in incoming.iterdir()] == ["young"]


def test_what_is_put_stands_there(place: Place, local: LocalObject, tmp_path: Path) -> None:
    assert not place.bucket.exists(KEY)
    place.bucket.put(KEY, local)
    assert place.bucket.exists(KEY)
    assert place.read(KEY) == CONTENT
    place.bucket.fetch(KEY, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert place.names() == [KEY]


def test_putting_again_changes_nothing(place: Place, local: LocalObject) -> None:
    place.bucket.put(KEY, local)
    place.bucket.put(KEY, local)
    assert place.read(KEY) == CONTENT
    assert place.names() == [KEY]


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(b"other", id="shorter"),
        pytest.param(CONTENT[:-1], id="cut off"),
        pytest.param(b"", id="empty"),
        pytest.param(CONTENT[:-2] + b"!\n", id="as long, one byte other"),
        pytest.param(CONTENT + b"\n", id="longer"),
    ],
)
def test_other_bytes_at_the_key_stay_and_are_reported(place: Place, local: LocalObject, foreign: bytes) -> None:
    place.write(KEY, foreign)
    with pytest.raises(ForeignObjectError, match="other bytes stand at"):
        place.bucket.put(KEY, local)
    assert place.read(KEY) == foreign
    assert place.names() == [KEY]


# rclone does not know If-None-Match: there nobody can tell.
@pytest.mark.parametrize("place", ["directory", "moto as minio", "moto as aws"], indirect=True)
def test_a_writer_who_comes_between_look_and_put_is_not_written_over(
    place: Place, local: LocalObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = "_write" if place.kind == "directory" else "_upload"
    original = getattr(place.bucket, step)

    def after_another(*args: Any) -> None:
        place.write(KEY, b"another was faster")
        original(*args)

    monkeypatch.setattr(place.bucket, step, after_another)
    with pytest.raises(ForeignObjectError):
        place.bucket.put(KEY, local)
    assert place.read(KEY) == b"another was faster"


def test_an_upload_that_arrives_cut_off_is_noticed(
    place: Place, local: LocalObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = "_write" if place.kind == "directory" else "_upload"
    monkeypatch.setattr(place.bucket, step, lambda *_: place.write(KEY, CONTENT[:100]))
    with pytest.raises(BucketError):
        place.bucket.put(KEY, local)


def test_an_upload_that_vanishes_is_noticed(place: Place, local: LocalObject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.bucket, "_write" if place.kind == "directory" else "_upload", lambda *_: None)
    with pytest.raises(BucketError):
        place.bucket.put(KEY, local)


def test_quoted_sites_are_kept_letter_for_letter(place: Place, local: LocalObject) -> None:
    sites = ["..%2Fx", "%C3%A9", "%20%2B", "a%252Fb", "a%0Ab%5C", "..", "__HIVE_DEFAULT_PARTITION__"]
    keys = [f"raw/site={site}/date=2026-01-02/x.jsonl" for site in sites]
    for key in [*keys, *keys]:
        place.bucket.put(key, local)
    assert sorted(place.names()) == sorted(keys)


def test_fetching_what_is_not_there_is_an_error_with_its_name(place: Place, tmp_path: Path) -> None:
    with pytest.raises(BucketError, match="bucket acme: cannot fetch nothing/here"):
        place.bucket.fetch("nothing/here", tmp_path / "copy")


def test_an_object_without_a_plain_digest_is_read_back(moto: str, local: LocalObject) -> None:
    client = moto_client(moto)
    for name, content, same in (("same", CONTENT, True), ("other", CONTENT[:-2] + b"!\n", False)):
        bucket = f"{name}-{uuid4().hex}"
        client.create_bucket(Bucket=bucket)
        upload = client.create_multipart_upload(Bucket=bucket, Key=KEY)["UploadId"]
        target = {"Bucket": bucket, "Key": KEY, "UploadId": upload}
        etag = client.upload_part(**target, PartNumber=1, Body=content)["ETag"]
        client.complete_multipart_upload(**target, MultipartUpload={"Parts": [{"ETag": etag, "PartNumber": 1}]})
        assert "-" in client.head_object(Bucket=bucket, Key=KEY)["ETag"]
        found = build("acme", **moto_settings(moto, bucket, "minio"))
        if same:
            found.put(KEY, local)
        else:
            with pytest.raises(ForeignObjectError):
                found.put(KEY, local)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong with S3


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        pytest.param({"access_key_id": "NOBODY"}, "check the keys", id="unknown key"),
        pytest.param({"secret_access_key": "wrong-secret-of-mine"}, "check the keys", id="wrong secret"),
        pytest.param({"bucket": "no-such-bucket"}, "create the bucket", id="no such bucket"),
        pytest.param({"endpoint_url": None}, "Could not connect", id="server down"),
    ],
)
def test_what_is_wrong_is_said_in_a_helpful_way_and_without_secrets(
    s3: S3Server, local: LocalObject, wrong: dict[str, Any], hint: str
) -> None:
    if "endpoint_url" in wrong:
        wrong = {"endpoint_url": f"http://127.0.0.1:{free_port()}"}
    settings = s3.settings(s3.new_bucket()) | wrong
    bucket = build("acme", **settings)
    with pytest.raises(BucketError) as raised:
        bucket.put(KEY, local)
    assert not isinstance(raised.value, ForeignObjectError)
    assert "bucket acme: cannot" in str(raised.value)
    assert hint in str(raised.value)
    assert settings["secret_access_key"] not in str(raised.value)
    assert settings["access_key_id"] not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# Directories


def test_a_directory_that_is_missing_is_refused_and_not_made(local: LocalObject, tmp_path: Path) -> None:
    missing = tmp_path / "not" / "mounted"
    bucket = build("acme", kind="directory", path=str(missing))
    for action in (lambda: bucket.put(KEY, local), lambda: bucket.exists(KEY)):
        with pytest.raises(BucketError, match="is not there: create or mount it"):
            action()
    assert not missing.parent.exists()


def test_a_directory_below_the_data_directory_is_made(local: LocalObject, tmp_path: Path) -> None:
    settings = make_settings(server={"data_dir": str(tmp_path / "data")})
    buckets.build(settings)["local"].put(KEY, local)
    assert (tmp_path / "data" / "export" / KEY).read_bytes() == CONTENT


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_a_directory_never_shows_half_an_object(
    local: LocalObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    place = directory_place(tmp_path / "nas")

    def break_off(_: Any, writer: Any, *__: Any) -> None:
        writer.write(CONTENT[:100])
        writer.flush()
        assert not (tmp_path / "nas" / KEY).exists()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", break_off)
        with pytest.raises((BucketError, KeyboardInterrupt)):
            place.bucket.put(KEY, local)
    assert place.names() == []
    place.bucket.put(KEY, local)
    assert place.read(KEY) == CONTENT


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.EACCES], ids=errno.errorcode.get)
def test_a_file_system_without_links_is_filled_by_renaming_and_any_other_error_is_one(
    local: LocalObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    place = directory_place(tmp_path / "nas")

    def no_link(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", no_link)
    if error == errno.EACCES:
        with pytest.raises(BucketError, match="Permission denied"):
            place.bucket.put(KEY, local)
        assert place.names() == []
    else:
        place.bucket.put(KEY, local)
        assert place.names() == [KEY]


@pytest.mark.parametrize(("prefix", "joined"), [("", "a/b"), ("raw", "raw/a/b"), ("x/y", "x/y/a/b")])
def test_a_prefix_comes_before_the_key(prefix: str, joined: str) -> None:
    assert buckets.join(prefix, "a/b") == joined
