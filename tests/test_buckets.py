"""Buckets: an object is put once, checked where it stands, and never written over."""

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import ACCESS_KEY, SECRET_KEY, S3Server, free_port, make_settings, moto_client, moto_settings
from faulty import faulty
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from appliance.errors import BucketError, ForeignObjectError
from appliance.export import buckets
from appliance.export.buckets import Bucket, directory
from appliance.export.files import LocalObject, described

KEY = "raw/site=shop/date=2026-01-02/hour=03/acme-0000000001-0001.jsonl.gz"
CONTENT = b'{"a": 1}\n' * 1000


def build(name: str, **settings: Any) -> Bucket:
    return buckets.build(make_settings(buckets={name: settings}, exports={"job": {"client": name}}))[name]


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


@pytest.mark.parametrize(("split", "reads"), [(None, 0), (5 << 20, 1)], ids=["as we do", "in other parts"])
def test_what_another_has_put_there_in_parts_is_compared_whatever_the_parts(
    moto: str, tmp_path: Path, split: int | None, reads: int
) -> None:
    (tmp_path / "large").write_bytes(content := CONTENT * 600)
    local = described(tmp_path / "large")
    client = moto_client(moto)
    for name, there in (("same", content), ("other", content[:-2] + b"!\n")):
        bucket = f"{name}-{uuid4().hex}"
        client.create_bucket(Bucket=bucket)
        upload = client.create_multipart_upload(Bucket=bucket, Key=KEY)["UploadId"]
        target = {"Bucket": bucket, "Key": KEY, "UploadId": upload}
        pieces = [there[:split], *([there[split:]] if split else [])]
        parts = [
            {"PartNumber": number, "ETag": client.upload_part(**target, PartNumber=number, Body=piece)["ETag"]}
            for number, piece in enumerate(pieces, start=1)
        ]
        client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
        with faulty(moto) as proxy:
            found = build("acme", **moto_settings(proxy.url, bucket, "r2"))
            if there is content:
                found.put(KEY, local)
                assert proxy.count("^GET ") == reads
            else:
                with pytest.raises(ForeignObjectError):
                    found.put(KEY, local)


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        pytest.param("", ["a.b/1", "a/1", "a/2", "a/b/3", "ab", "z/é +%2F"], id="all"),
        pytest.param("a", ["a.b/1", "a/1", "a/2", "a/b/3", "ab"], id="letters"),
        pytest.param("a/", ["a/1", "a/2", "a/b/3"], id="a folder"),
        pytest.param("a/b/3", ["a/b/3"], id="one key"),
        pytest.param("z/é", ["z/é +%2F"], id="other letters"),
        pytest.param("b", [], id="nothing"),
        pytest.param("a/1/x/", [], id="below an object"),
        pytest.param(".", [], id="what is on its way"),
    ],
)
def test_objects_are_found_by_what_their_keys_begin_with(place: Place, prefix: str, found: list[str]) -> None:
    for key in ("a.b/1", "a/1", "a/2", "a/b/3", "ab", "z/é +%2F"):
        place.write(key, key.encode())
    if place.kind == "directory":
        place.write(".incoming/half", b"not there yet")
    listed = list(place.bucket.list(prefix))
    assert sorted(one.key for one in listed) == found
    assert all(one.bytes == len(one.key.encode()) for one in listed)


def test_more_objects_are_listed_than_one_answer_holds(moto: str) -> None:
    name = f"b-{uuid4().hex}"
    moto_client(moto).create_bucket(Bucket=name)
    for number in range(1003):
        # Straight into the server: a thousand requests take ten seconds.
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(name, f"a/{number:04}", b"x")
    with faulty(moto) as proxy:
        bucket = build("acme", **moto_settings(proxy.url, name, "minio"))
        assert [(one.key, one.bytes) for one in bucket.list("a/")] == [(f"a/{number:04}", 1) for number in range(1003)]
        assert len(proxy.seen) == 2


def test_an_objects_digest_is_that_of_the_bytes_that_stand_there(place: Place, local: LocalObject) -> None:
    assert place.bucket.sha256(KEY) is None
    place.bucket.put(KEY, local)
    assert place.bucket.sha256(KEY) == local.sha256
    place.write(KEY, b"")
    assert place.bucket.sha256(KEY) == hashlib.sha256(b"").hexdigest()


def test_nothing_but_a_probe_is_removed(place: Place, local: LocalObject) -> None:
    for key in (KEY, "raw/_probe", "_probes/x"):
        with pytest.raises(ValueError, match="is no probe"):
            place.bucket.remove_probe(key)
    place.bucket.put("raw/_probe/x", local)
    place.bucket.put(KEY, local)
    place.bucket.remove_probe("raw/_probe/x")
    assert place.names() == [KEY]


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong with S3


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        pytest.param({"access_key_id": "NOBODY"}, "does not know the access key", id="unknown key"),
        pytest.param({"secret_access_key": "wrong-secret-of-mine"}, "not that of the access key", id="wrong secret"),
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


def test_a_share_whose_server_is_gone_fails_in_time(
    local: LocalObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = directory_place(tmp_path / "nas")
    gone = threading.Event()
    monkeypatch.setattr(directory, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(os, "statvfs", lambda _path: gone.wait(20))
    actions: list[Callable[[], object]] = [
        lambda: place.bucket.put(KEY, local),
        lambda: place.bucket.sha256(KEY),
        lambda: place.bucket.exists(KEY),
        lambda: place.bucket.fetch(KEY, tmp_path / "copy"),
        lambda: list(place.bucket.list("site=")),
    ]
    for action in actions:
        with pytest.raises(BucketError, match=r"nas does not answer: see whether the share's server is there"):
            action()
    gone.set()
    place.bucket.put(KEY, local)
    assert place.read(KEY) == CONTENT


def test_an_object_that_an_earlier_run_has_put_is_synced_before_it_is_believed(
    local: LocalObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = directory_place(tmp_path / "nas")
    place.bucket.put(KEY, local)
    synced: list[Path] = []
    monkeypatch.setattr(directory, "sync", synced.append)
    place.bucket.put(KEY, local)
    target = tmp_path / "nas" / KEY
    assert set(synced) == {parent for parent in target.parents if parent.is_relative_to(tmp_path / "nas")}


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/hostname", ".."])
def test_no_key_leads_out_of_a_directory(local: LocalObject, tmp_path: Path, key: str) -> None:
    place = directory_place(tmp_path / "nas")
    actions: list[Callable[[], object]] = [
        lambda: place.bucket.put(key, local),
        lambda: place.bucket.sha256(key),
        lambda: place.bucket.exists(key),
        lambda: place.bucket.fetch(key, tmp_path / "copy"),
        lambda: list(place.bucket.list(f"{key}/")),
    ]
    for action in actions:
        with pytest.raises(BucketError, match="leads out of"):
            action()


@pytest.mark.parametrize(("prefix", "joined"), [("", "a/b"), ("raw", "raw/a/b"), ("x/y", "x/y/a/b")])
def test_a_prefix_comes_before_the_key(prefix: str, joined: str) -> None:
    assert buckets.join(prefix, "a/b") == joined
