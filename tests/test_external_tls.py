"""A PostgreSQL of the user's own that lets nobody in without TLS."""

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from conftest import Appliance, wait_for
from servers import PASSWORD, Server, exporting_to, ids_in, new_ids, post, server_of

pytestmark = pytest.mark.servers


def certificate(directory: Path, name: str) -> Path:
    """Make a certificate for `localhost` that has signed itself; its key lies beside it."""
    crt, key = directory / f"{name}.crt", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(crt)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    key.chmod(0o600)
    return crt


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Debian's server: the wheel's speak no TLS."""
    with server_of("15", tmp_path_factory.mktemp("pg")) as one:
        one.create()
        crt = certificate(one.directory, "server")
        (one.data / "pg_hba.conf").write_text("local all admin trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n")
        yield one.start(fsync="off", ssl="on", ssl_cert_file=str(crt), ssl_key_file=str(crt.with_suffix(".key")))


def url_of(server: Server, root: Path, *, host: str = "localhost", mode: str = "verify-full") -> str:
    options = f"hostaddr=127.0.0.1&sslmode={mode}&sslrootcert={root}"
    return f"postgresql://appliance:{PASSWORD}@{host}:{server.port}/{server.new_database()}?{options}"


def test_with_the_certificate_verified_events_are_collected_and_exported(
    appliance: Callable[..., Appliance], tls_server: Server, tmp_path: Path
) -> None:
    """Reading for an export goes through another library than everything else."""
    url, ids, bucket = url_of(tls_server, tls_server.directory / "server.crt"), new_ids(5), tmp_path / "bucket"
    box = appliance(**exporting_to(bucket, url)).start()
    assert post(box, ids)[1]["accepted"] == 5
    assert box.run("export").stdout == "acme: 5 events in 1 batch delivered\n"
    assert ids_in(bucket) == Counter(ids)
    with psycopg.connect(url) as conn:
        assert conn.pgconn.ssl_in_use


def test_a_backup_goes_through_tls_and_back(
    appliance: Callable[..., Appliance], tls_server: Server, tmp_path: Path
) -> None:
    root, bucket = tls_server.directory / "server.crt", tmp_path / "bucket"
    box = appliance(**exporting_to(bucket, url_of(tls_server, root))).start()
    post(box, new_ids(5))
    box.run("backup", str(tmp_path / "all.dump"))
    new = appliance(**exporting_to(bucket, url_of(tls_server, root)))
    new.run("restore-backup", str(tmp_path / "all.dump"))
    assert new.run("export").stdout == "acme: 5 events in 1 batch delivered\n"


def test_without_tls_the_server_lets_nobody_in(tls_server: Server) -> None:
    """What the other tests rest on."""
    with pytest.raises(psycopg.OperationalError, match="no encryption"):
        psycopg.connect(url_of(tls_server, tls_server.directory / "server.crt", mode="disable"))


def test_a_certificate_of_somebody_else_is_refused_and_the_message_says_what_to_do(
    appliance: Callable[..., Appliance], tls_server: Server, tmp_path: Path
) -> None:
    done = appliance(**exporting_to(tmp_path / "b", url_of(tls_server, certificate(tmp_path, "other")))).run(
        "status", check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "certificate verify failed; the server's certificate is signed by nobody that sslrootcert" in done.stderr
    assert PASSWORD not in done.stderr


def test_a_certificate_for_another_name_is_refused_and_the_message_says_what_to_do(
    appliance: Callable[..., Appliance], tls_server: Server, tmp_path: Path
) -> None:
    url = url_of(tls_server, tls_server.directory / "server.crt", host="db.example.com")
    done = appliance(**exporting_to(tmp_path / "b", url)).run("status", check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "write the name that stands in it into database.url" in done.stderr


def test_while_the_certificate_is_refused_events_wait_in_the_spool_and_the_log_says_why(
    appliance: Callable[..., Appliance], tls_server: Server, tmp_path: Path
) -> None:
    wrong, ids = certificate(tmp_path, "other"), new_ids(3)
    right = tls_server.directory / "server.crt"
    url = url_of(tls_server, wrong)
    box = appliance(**exporting_to(tmp_path / "bucket", url))
    box.start(until=lambda one: "correct the file in database.url" in one.log)
    assert post(box, ids)[0] == 202
    # What the owner does about it, without a restart: each connection reads the file anew.
    wrong.write_bytes(right.read_bytes())
    wait_for(box.ready, "the spool to be drained")
    with psycopg.connect(url) as conn:
        assert {str(row[0]) for row in conn.execute("SELECT event_id FROM events_log")} == set(ids)
