"""`appliance check --probe`: each bucket is tried, and what fails is said with what to do."""

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import tomli_w
from conftest import S3Server, free_port, make_settings, moto_client, moto_settings, wait_for
from faulty import Fault, faulty, raw_answer, refuse

from appliance.export.buckets.probe import Probe, probe_all

HELD = ["listing", "writing", "reading", "finding", "deleting"]


def probe(**options: Any) -> Probe:
    (found,) = probe_all(make_settings(buckets={"acme": options}, exports={"job": {"client": "acme"}}))
    return found


def check(directory: Path, *words: str, **tables: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    exports = {name: {"client": name} for name in tables}
    (directory / "config.toml").write_text(
        tomli_w.dumps({"server": {"data_dir": str(directory / "data")}, "buckets": tables, "exports": exports})
    )
    command = [sys.executable, "-m", "appliance", "check", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory, timeout=60)


def test_every_bucket_is_tried_and_nothing_is_left_in_it(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "nas").mkdir()
    name = s3.new_bucket()
    done = check(
        tmp_path,
        "--probe",
        acme=s3.settings(name, prefix="raw"),
        nas={"kind": "directory", "path": str(tmp_path / "nas"), "prefix": "a/b"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if line.startswith("bucket ")]
    assert lines == [f"bucket {name}: listing, writing, reading, finding, deleting: works" for name in ("acme", "nas")]
    assert s3.objects(name) == {}
    assert not [path for path in (tmp_path / "nas").rglob("*") if path.is_file() or "_probe" in str(path)]


def test_a_bucket_that_fails_is_named_and_the_others_are_tried_all_the_same(s3: S3Server, tmp_path: Path) -> None:
    tables = {
        "away": s3.settings("b-1", endpoint_url=f"http://127.0.0.1:{free_port()}"),
        "missing": s3.settings("no-such-bucket"),
        "nas": {"kind": "directory", "path": str(tmp_path / "not" / "mounted")},
        "right": s3.settings(s3.new_bucket()),
    }
    done = check(tmp_path, "--probe", **tables)
    assert (done.returncode, done.stderr) == (1, "")
    away, missing, nas, right = [line for line in done.stdout.splitlines() if line.startswith("bucket ")]
    assert away.startswith("bucket away: listing failed: Could not connect to 127.0.0.1:")
    assert missing.startswith("bucket missing: listing failed: there is no bucket no-such-bucket: create the bucket")
    assert nas == f"bucket nas: listing failed: {tmp_path}/not/mounted is not there: create or mount it"
    assert right == "bucket right: listing, writing, reading, finding, deleting: works"
    as_json = check(tmp_path, "--probe", "--json", **tables)
    answer = json.loads(as_json.stdout)
    assert (as_json.returncode, answer["ok"]) == (1, False)
    assert [(one["bucket"], one["held"]) for one in answer["probes"]] == [
        ("away", []),
        ("missing", []),
        ("nas", []),
        ("right", HELD),
    ]
    assert all(one["failures"] for one in answer["probes"][:3])


def test_without_being_told_to_no_bucket_is_tried(s3: S3Server, tmp_path: Path) -> None:
    with faulty(s3.endpoint) as proxy:
        done = check(tmp_path, "--json", acme=s3.settings("no-such-bucket", endpoint_url=proxy.url))
        assert not proxy.seen
    assert done.returncode == 0
    assert "probes" not in json.loads(done.stdout)


def test_a_wrong_configuration_is_told_before_any_bucket_is_tried(s3: S3Server, tmp_path: Path) -> None:
    with faulty(s3.endpoint) as proxy:
        done = check(tmp_path, "--probe", acme=s3.settings("b-1", endpoint_url=proxy.url, region=7))
        assert not proxy.seen
    assert done.returncode == 2


def test_a_probe_that_cannot_be_deleted_is_a_warning(s3: S3Server, tmp_path: Path) -> None:
    name = s3.new_bucket()
    with faulty(s3.endpoint, *refuse(403, "AccessDenied", method="DELETE")) as proxy:
        done = check(tmp_path, "--probe", acme=s3.settings(name, endpoint_url=proxy.url, prefix="raw"))
    (key,) = s3.objects(name)
    assert done.returncode == 0
    assert (
        f"finding: works; warning: deleting failed, so {key} stays there: a permission is missing, s3:DeleteObject"
        in (done.stdout)
    )
    assert key.startswith("raw/_probe/")
    assert b"It may go" in s3.objects(name)[key]


NO_LIST = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
DAMAGE: dict[str, tuple[Fault, str]] = {
    "other bytes": (
        Fault("^GET .*/_probe/", edit=lambda answer: answer[:-2] + b"!\n"),
        "reading failed: what was written to",
    ),
    "not listed": (
        Fault(
            "^GET .*list-type",
            answer=raw_answer(200, NO_LIST),
        ),
        "finding failed: 0 objects are listed at",
    ),
    "not stored": (Fault("^PUT", answer=raw_answer(200, headers={"ETag": '"x"'})), "writing failed: "),
    "silent": (Fault(hang=True), "listing failed: 127.0.0.1"),
}


@pytest.mark.parametrize(("fault", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_bucket_that_answers_well_and_does_otherwise_is_found_out(s3: S3Server, fault: Fault, said: str) -> None:
    name = s3.new_bucket()
    with faulty(s3.endpoint, Fault(**vars(fault))) as proxy:
        found = probe(**s3.settings(name, endpoint_url=proxy.url, read_timeout_seconds=0.3))
    assert found.failures
    assert said in found.failures[0]
    assert s3.objects(name) == {}


def test_a_directory_that_may_not_be_written_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "nas" / "raw").mkdir(parents=True)
    (tmp_path / "nas" / "raw" / "_probe").write_text("a file where a folder should be")
    found = probe(kind="directory", path=str(tmp_path / "nas"), prefix="raw")
    assert found.held == ["listing"]
    assert found.failures[0].startswith("writing failed: ")


# ---------------------------------------------------------------------------------------------------------------------
# Keys with fewer permissions than are needed


@dataclass(frozen=True)
class Strict:
    """A server that looks at signatures and at what the keys' owner may do, and a bucket there."""

    endpoint: str
    bucket: str

    def options(self, *actions: str) -> dict[str, Any]:
        """Return a bucket's table with keys that may do this and nothing else."""
        name = f"user-{uuid4().hex[:8]}"
        with self._open() as iam:
            iam.create_user(UserName=name)
            iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=policy(*actions))
            pair = iam.create_access_key(UserName=name)["AccessKey"]
        keys = {"access_key_id": pair["AccessKeyId"], "secret_access_key": pair["SecretAccessKey"]}
        return {**moto_settings(self.endpoint, self.bucket, "minio"), **keys}

    def role(self, external_id: str, *actions: str) -> str:
        """Make a role that whoever knows the external id may take on, and return its name."""
        trust = {
            "Effect": "Allow",
            "Principal": {"AWS": "*"},
            "Action": "sts:AssumeRole",
            "Condition": {"StringEquals": {"sts:ExternalId": external_id}},
        }
        name = f"role-{uuid4().hex[:8]}"
        with self._open() as iam:
            made = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps({"Statement": [trust]}))
            iam.put_role_policy(RoleName=name, PolicyName="p", PolicyDocument=policy(*actions))
        return str(made["Role"]["Arn"])

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """Let everything pass for a moment."""
        self._let_pass("inf")
        yield moto_client(self.endpoint, "iam")
        self._let_pass("0")

    def _let_pass(self, number: str) -> None:
        where, kind = f"{self.endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        request = urllib.request.Request(where, number.encode(), kind, method="POST")  # noqa: S310
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310


def policy(*actions: str) -> str:
    statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


@pytest.fixture(scope="module")
def strict() -> Iterator[Strict]:
    # A process of its own: what it demands of its clients would hold for every moto of this one.
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: accepts(port), "moto's server", alive=lambda: process.poll() is None)
        server = Strict(f"http://127.0.0.1:{port}", "acme-events")
        moto_client(server.endpoint).create_bucket(Bucket=server.bucket)
        yield server
    finally:
        process.terminate()
        process.wait(10)


LIST, GET, PUT, DELETE = "s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"
LACKS: dict[str, tuple[tuple[str, ...], list[str], str]] = {
    "listing": (
        (GET, PUT, DELETE),
        [],
        "listing failed: a permission is missing, s3:ListBucket (without it the server",
    ),
    "reading": ((LIST, PUT, DELETE), ["listing"], "writing failed: a permission is missing, s3:GetObject: check"),
    "writing": ((LIST, GET, DELETE), ["listing"], "writing failed: a permission is missing, s3:PutObject: check"),
    "everything": (("s3:CreateBucket",), [], "listing failed: a permission is missing, s3:ListBucket"),
}


@pytest.mark.parametrize(("actions", "held", "said"), LACKS.values(), ids=LACKS)
def test_the_permission_that_is_missing_is_named(
    strict: Strict, actions: tuple[str, ...], held: list[str], said: str
) -> None:
    found = probe(**strict.options(*actions))
    assert found.held == held
    assert len(found.failures) == 1
    assert found.failures[0].startswith(said)
    assert not found.warnings


def test_keys_that_may_not_delete_are_enough_and_a_warning(strict: Strict) -> None:
    found = probe(**strict.options(LIST, GET, PUT))
    assert (found.held, found.failures) == (HELD[:-1], [])
    assert "a permission is missing, s3:DeleteObject" in found.warnings[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"secret_access_key": "x31337"}, "listing failed: the secret key is not that of the access key"),
        ({"access_key_id": "AKIA31337"}, "listing failed: the server does not know the access key"),
    ],
    ids=["secret", "key"],
)
def test_wrong_keys_are_named_and_not_shown(strict: Strict, wrong: dict[str, str], said: str) -> None:
    found = probe(**{**strict.options(LIST, GET, PUT, DELETE), **wrong})
    assert found.failures[0].startswith(said)
    assert "31337" not in found.line


def test_a_role_is_enough_for_keys_that_may_do_nothing_themselves(strict: Strict) -> None:
    options = strict.options("sts:AssumeRole")
    role = {"assume_role_arn": strict.role("ours-7", LIST, GET, PUT, DELETE), "assume_role_external_id": "ours-7"}
    assert probe(**options).held == []
    assert probe(**options, **role).held == HELD
    found = probe(**options, **{**role, "assume_role_external_id": "theirs"})
    assert found.failures[0].startswith(f"listing failed: the role {role['assume_role_arn']} may not be taken on: let")


def accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
