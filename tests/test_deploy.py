"""The files in deploy/ say what docs/deploy.md says, and programs that read them find no fault."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from conftest import Appliance, free_port, http, wait_for

from appliance.store.embedded import EmbeddedPostgres

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return services


def test_only_the_proxy_is_published_and_files_that_are_mounted_are_there(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if service.get("ports")] == ["caddy"]
    mounted = [volume.partition(":")[0] for service in services.values() for volume in service["volumes"]]
    files = {name for name in mounted if name.startswith("./")}
    # config.toml is the user's.
    assert {name for name in files if not (DEPLOY / name).exists()} == {"./config.toml"}
    assert "reverse_proxy appliance:8080" in (DEPLOY / "Caddyfile").read_text()


def test_the_container_may_do_as_little_as_the_one_of_the_image_test(services: dict[str, Any]) -> None:
    service = services["appliance"]
    options = ["--read-only", "--tmpfs /tmp", f"--shm-size {service['shm_size'].removesuffix('b')}", "--cap-drop ALL"]
    assert (service["read_only"], service["tmpfs"], service["cap_drop"]) == (True, ["/tmp"], ["ALL"])  # noqa: S108
    for text in ((ROOT / "tests/image/box.py").read_text(), (ROOT / "docs/deploy.md").read_text()):
        assert [option for option in [*options, "--security-opt no-new-privileges"] if option not in text] == []


def test_the_image_is_labelled_with_what_the_package_says_of_itself() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', (ROOT / "Dockerfile").read_text()))
    assert labels == {
        "title": project["name"],
        "description": project["description"],
        "licenses": project["license"],
        "version": project["version"],
    }


def test_documents_mount_the_configuration_where_the_image_looks_for_it() -> None:
    (where,) = re.findall(r"^WORKDIR (\S+)$", (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1], re.MULTILINE)
    for name in ("README.md", "docs/deploy.md", "deploy/compose.yaml", "Dockerfile"):
        mounted = re.findall(r"config\.toml:(\S+config\.toml):ro", (ROOT / name).read_text())
        assert mounted == [str(Path(where) / "config.toml")], name


def test_what_the_containers_are_told_is_a_right_configuration(
    services: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in services["appliance"]["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{[^}]*\}", "choose-one", value))
    command = [sys.executable, "-m", "appliance", "check", "--config", str(ROOT / "config.example.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the admin page is off" not in done.stdout


LOCKS = sorted(path.name for path in ROOT.glob("requirements*.lock"))


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_version_has_hashes_and_no_place_that_it_must_come_from(name: str) -> None:
    text = (ROOT / name).read_text()
    required = [line for line in text.splitlines() if not line.startswith(" ")]
    assert [line for line in required if not re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [^;]+)? \\", line)] == []
    assert text.count("\n    --hash=sha256:") >= len(required) > 0
    assert "://" not in text


def test_what_builds_the_image_is_locked_and_is_what_the_build_system_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["dependency-groups"]["build"] == project["build-system"]["requires"]
    (backend,) = (re.split("[<>=]", one)[0] for one in project["build-system"]["requires"])
    assert f"\n{backend}==" in "\n" + (ROOT / "requirements-build.lock").read_text()
    installs = re.findall(r"pip.* (?:install|wheel) (.*?)(?: \\)?\n", (ROOT / "Dockerfile").read_text())
    allowed = ("--require-hashes -r ", "--no-build-isolation --no-deps ", "--no-deps --no-index ")
    assert [one for one in installs if not one.startswith(allowed)] == []
    assert len(installs) == len(allowed) + 1


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    unit = tmp_path / "appliance.service"
    # The program need not be installed here.
    unit.write_text((DEPLOY / "appliance.service").read_text().replace("/opt/appliance/bin/appliance", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@contextmanager
def nginx(box: Appliance, directory: Path) -> Iterator[Appliance]:
    """Run nginx with deploy/nginx.conf before an appliance; what is lent answers at nginx's port."""
    front = Appliance(directory, {}, port=free_port())
    location = (DEPLOY / "nginx.conf").read_text().replace("127.0.0.1:8080", f"127.0.0.1:{box.port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    (directory / "nginx.conf").write_text(
        f"daemon off; pid {directory}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{front.port};\n{location}\n}} }}\n"
    )
    command = ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr"]
    with subprocess.Popen(command) as process:
        try:
            wait_for(front.reached, "nginx", alive=lambda: process.poll() is None)
            yield front
        finally:
            process.terminate()


def test_behind_nginx_a_path_of_the_site_collects_and_shows_no_admin_page(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    box = appliance(server={"trusted_proxies": ["127.0.0.1/32"]}, admin={"password": "x", "token": "t"}).start()
    event = b'{"eventType": "pageview", "siteId": "shop"}'
    with nginx(box, tmp_path) as front:
        assert http(front, "GET", "/events/tracking.js").status == 200
        claimed = {"Content-Type": "application/json", "X-Forwarded-For": "203.0.113.9"}
        assert http(front, "POST", "/events/collect", event, claimed, source="127.0.0.7").json["accepted"] == 1
        for path in ("/events/admin", "/events/admin/", "/events/admin/login", "/events/metrics"):
            assert http(front, "GET", path).status == 404
    with psycopg.connect(EmbeddedPostgres(box.data_dir).conninfo) as conn:
        assert [str(ip) for (ip,) in conn.execute("SELECT ip_address FROM events_log")] == ["127.0.0.7"]
