"""The configuration: what it means, and every mistake in it at once, in the user's own words."""

import json
import os
import re
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from appliance.config import DirectoryBucket, S3Bucket, Settings, load
from appliance.errors import ConfigError
from appliance.resources import read_resource

Load = Callable[[str], Settings]


@pytest.fixture
def read(tmp_path: Path) -> Load:
    """Load a configuration from its text."""

    def load_text(text: str) -> Settings:
        (tmp_path / "config.toml").write_text(text)
        return load()

    return load_text


def problems(read: Load, text: str) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        read(text)
    assert refusal.value.exit_code == 2
    return list(refusal.value.problems)


S3 = '[buckets.acme]\nbucket = "acme-events"\n'
VAULT = '[buckets.vault]\nbucket = "vault-events"\n'
ROLE = 'assume_role_arn = "arn:aws:iam::123456789012:role/export"\n'
JOB = '[exports.acme]\nclient = "acme"\nbackup = "vault"\n'


# ---- what it means


def test_without_a_file_it_collects_into_a_local_copy() -> None:
    settings = load()
    assert settings.server.bind == "0.0.0.0:8080"
    assert not settings.database.url.get_secret_value()
    assert not settings.admin.enabled
    assert not settings.server.demo
    (job,) = settings.exports.items()
    assert job[0] == "local"
    assert (job[1].sites, job[1].format, job[1].codec) == (("*",), "jsonl", "gzip")
    bucket = settings.buckets[job[1].client]
    assert isinstance(bucket, DirectoryBucket)
    assert bucket.path.is_relative_to("/data")


def test_the_local_copy_moves_with_the_data_directory(read: Load) -> None:
    bucket = read('[server]\ndata_dir = "/srv/x"').buckets["local"]
    assert isinstance(bucket, DirectoryBucket)
    assert bucket.path.is_relative_to("/srv/x")


def test_a_job_of_ones_own_takes_the_place_of_the_local_copy(read: Load) -> None:
    settings = read(S3 + VAULT + JOB)
    assert list(settings.exports) == ["acme"]
    assert list(settings.buckets) == ["acme", "vault"]
    assert settings.exports["acme"].bucket_names == ("acme", "vault")


def test_a_bucket_has_what_its_objects_are_given(read: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_BUCKETS__ACME__TAGS", '{"team": "web + co", "cost centre": "7"}')
    kms = 'encryption = "aws:kms"\nkms_key_id = "alias/export"\nstorage_class = "STANDARD_IA"\n'
    bucket = read(S3 + ROLE + 'assume_role_external_id = "ours/7"\n' + kms).buckets["acme"]
    assert isinstance(bucket, S3Bucket)
    assert bucket.tags == {"team": "web + co", "cost centre": "7"}
    assert (bucket.encryption, bucket.kms_key_id, bucket.storage_class) == ("aws:kms", "alias/export", "STANDARD_IA")


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "other.toml")


def test_the_example_is_what_holds_without_it(read: Load) -> None:
    assert read(read_resource("config.example.toml")) == load(Path("/dev/null"))


def test_every_option_that_the_example_explains_is_one(read: Load) -> None:
    """Without its comment signs, too; there the buckets need their addresses and the job its buckets."""
    text = re.sub(r"(?m)^# (?=\[|\w+ = )", "", read_resource("config.example.toml"))
    settings = read(text)
    assert settings.sites[0].id == "shop"
    assert isinstance(settings.buckets["acme"], S3Bucket)
    assert isinstance(settings.buckets["nas"], DirectoryBucket)
    shown = set(re.findall(r"(?m)^(\w+) = ", text))
    sections = (settings.server, settings.database, settings.admin, settings.collect, settings.sites[0])
    more = (settings.retention, settings.health, settings.alerts)
    every = (*sections, *more, *settings.buckets.values(), *settings.exports.values())
    assert shown == {name for section in every for name in type(section).model_fields}


def test_the_environment_overrides_the_file(read: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_SERVER__DEMO", "true")
    monkeypatch.setenv("APPLIANCE_COLLECT__MAX_BATCH_EVENTS", "7")
    monkeypatch.setenv("APPLIANCE_SERVER__TRUSTED_PROXIES", '["10.0.0.0/8", "::1"]')
    monkeypatch.setenv("APPLIANCE_BUCKETS__ACME__PREFIX", "raw")
    monkeypatch.setenv("APPLIANCE_SITES", '[{"id": "shop", "ip": "drop"}]')
    settings = read('[server]\nbind = "127.0.0.1:1"\ndemo = false\n[[sites]]\nid = "blog"\n' + S3 + VAULT + JOB)
    assert (settings.server.bind, settings.server.demo, settings.collect.max_batch_events) == ("127.0.0.1:1", True, 7)
    assert settings.server.trusted_proxies == (ip_network("10.0.0.0/8"), ip_network("::1"))
    assert settings.buckets["acme"].prefix == "raw"
    assert [(site.id, site.ip) for site in settings.sites] == [("shop", "drop")]


@pytest.mark.parametrize("key", ["0123456", "1234567890", "1e5", "true", "null", '"quoted"', "[1]", "{}", "a=b#c"])
def test_a_secret_from_the_environment_is_taken_letter_by_letter(
    read: Load, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("APPLIANCE_ADMIN__PASSWORD", key)
    monkeypatch.setenv("APPLIANCE_BUCKETS__ACME__ACCESS_KEY_ID", "id")
    monkeypatch.setenv("APPLIANCE_BUCKETS__ACME__SECRET_ACCESS_KEY", key)
    settings = read(S3)
    bucket = settings.buckets["acme"]
    assert isinstance(bucket, S3Bucket)
    assert settings.admin.password.get_secret_value() == bucket.secret_access_key.get_secret_value() == key


@pytest.mark.parametrize("name", ["APPLIANCE_ADMIN__PASSWORD", "OTHER"])
def test_a_secret_from_the_environment_that_is_no_utf_8_is_refused(
    read: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, os.fsdecode(b"p\xe4ssword"))
    (problem,) = problems(read, '[admin]\npassword = { env = "OTHER" }' if name == "OTHER" else "")
    assert problem.lower().endswith("password: it is not written in utf-8")


@pytest.mark.parametrize("number", ["2024", "1e5"])
def test_a_prefix_from_the_environment_may_look_like_a_number(
    read: Load, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    monkeypatch.setenv("APPLIANCE_BUCKETS__ACME__PREFIX", number)
    assert read(S3).buckets["acme"].prefix == number


def test_a_secret_can_stand_in_a_file_or_another_variable(
    read: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("from the file\n")
    monkeypatch.setenv("OTHER", "from the variable")
    settings = read(f'[admin]\npassword = {{ file = "{tmp_path}/secret" }}\ntoken = {{ env = "OTHER" }}')
    assert settings.admin.password.get_secret_value() == "from the file"
    assert settings.admin.token.get_secret_value() == "from the variable"
    assert set(settings.secret_values()) == {"from the file", "from the variable"}


def test_settings_show_no_secret_and_cannot_be_changed(read: Load) -> None:
    keys = 'access_key_id = "AKIA-hidden"\nsecret_access_key = "hidden-key"\n'
    settings = read(
        '[admin]\npassword = "hidden-p"\ntoken = "hidden-t"\n[database]\nurl = "postgresql://hidden-u"\n'
        '[alerts]\nurls = ["json://hidden-a"]\n' + S3 + keys
    )
    assert len(settings.secret_values()) == 6
    assert "hidden" not in repr(settings) + str(settings) + settings.model_dump_json()
    with pytest.raises(ValueError, match="frozen"):
        settings.server.demo = True


# ---- mistakes

MISTAKES: dict[str, tuple[str, str]] = {
    "unknown section": ("[sever]\n", 'config.toml: sever: there is no such option; did you mean "server"?'),
    "unknown option": ('[server]\nbnd = "x"', 'config.toml: server.bnd: there is no such option; did you mean "bind"?'),
    "unknown option of a site": ('[[sites]]\nid = "a"\norigin = []', "sites.0.origin: there is no such option"),
    "an option of another kind of bucket": (
        '[buckets.a]\nkind = "directory"\npath = "/x"\nregion = "x"',
        "buckets.a.region: a bucket of this kind has no such option",
    ),
    "a name that AWS has not": (
        '[buckets.a]\nbucket = "Acme_Events"\nregion = "eu-central-1"',
        'buckets.a: bucket "Acme_Events": at AWS a name has 3 to 63 small letters',
    ),
    "private": ("_env_file = 1", "_env_file: there is no such option"),
    "self": ("self = 1", "self: there is no such option"),
    "no option's name at all": ("port = 1", "config.toml: port: there is no such option"),
    "wrong type": ("[server]\ndemo = 7", "config.toml: server.demo: write true or false (got 7)"),
    "a text that is none": ("[server]\nbind = 7", "server.bind: write a text in quotes (got 7)"),
    "a list that is none": ('[server]\ntrusted_proxies = "::1"', 'server.trusted_proxies: write a list (got "::1")'),
    "a number that is none": ('[collect]\nmax_body_bytes = "x"', "collect.max_body_bytes: write a whole number (got"),
    "half a number": ("[collect]\nmax_body_bytes = 2000.5", "collect.max_body_bytes: write a whole number (got"),
    "a path that is none": ("[server]\ndata_dir = 7", "server.data_dir: write a path in quotes (got 7)"),
    "section is a value": ("server = 1", "config.toml: server: write a table (got 1)"),
    "sites are a table": ('[sites]\nid = "a"', "config.toml: sites: write each site under [[sites]]"),
    "buckets are a list": ("buckets = [1]", "config.toml: buckets: write a table (got [1])"),
    "exports are a list": ("exports = [1]", "config.toml: exports: write a table (got [1])"),
    "a job is a value": ("[exports]\na = 1", "config.toml: exports.a: write a table (got 1)"),
    "a bucket is a value": ("[buckets]\na = 1", "buckets.a: a bucket is a table"),
    "kind is a list": ('[buckets.a]\nkind = ["s3"]', "config.toml: buckets.a"),
    "unknown kind": (
        '[buckets.a]\nkind = "S3"',
        'a.kind: a bucket is a table with kind = "s3" or kind = "directory" (got "S3")',
    ),
    "a path without a kind": ('[buckets.a]\npath = "/x"', 'config.toml: buckets.a: kind = "directory" is missing'),
    "bind without port": (
        '[server]\nbind = "x"',
        'server.bind: write it as host:port, for example 0.0.0.0:8080 (got "x',
    ),
    "bind to port 0": ('[server]\nbind = "x:0"', "server.bind:"),
    "bind to port 65536": ('[server]\nbind = "x:65536"', "server.bind:"),
    "bind to a superscript": ('[server]\nbind = "x:²"', "server.bind:"),
    "host bits": ('[server]\ntrusted_proxies = ["10.0.0.1/8"]', "server.trusted_proxies.0: write a network such as"),
    "no network": ("[server]\ntrusted_proxies = [{}]", "server.trusted_proxies.0: write a network such as"),
    "too small a limit": ("[collect]\nmax_body_bytes = 10", "collect.max_body_bytes: it must be at least 1024 (got"),
    "too large a limit": ("[collect]\nmax_batch_events = 99999", "max_batch_events: it must be at most 1000 (got"),
    "no time": (S3 + "read_timeout_seconds = 0", "acme.read_timeout_seconds: it must be more than 0 (got 0)"),
    "a path as origin": ('[[sites]]\nid = "a"\norigins = ["https://a.example/"]', "sites.0.origins.0: an origin is"),
    "an origin's port": ('[[sites]]\nid = "a"\norigins = ["https://a.example:x"]', "sites.0.origins.0: an origin is"),
    "site id": ('[[sites]]\nid = "a/b"', 'sites.0.id: a site id has 1 to 100 letters, digits and . _ - (got "a/b")'),
    "site without id": ("[[sites]]\n", "sites.0.id: this option is missing"),
    "site twice": ('[[sites]]\nid = "a"\n[[sites]]\nid = "a"', "sites.1.id: this site stands here twice"),
    "ip policy": ('[[sites]]\nid = "a"\nip = "hide"', 'sites.0.ip: write "keep", "truncate" or "drop" (got "hide")'),
    "prefix upwards": (S3 + 'prefix = "a/../b"', "buckets.acme.prefix:"),
    "prefix with a line break": (S3 + 'prefix = "a\\n"', "buckets.acme.prefix:"),
    "one key of two": (S3 + 'access_key_id = "AKIA"', "buckets.acme: set both"),
    "provider without address": (S3 + 'provider = "minio"', 'buckets.acme: provider "minio" needs endpoint_url'),
    "a password in an address": (
        S3 + 'endpoint_url = "https://me:x@s3.example"',
        "acme.endpoint_url: write the server's address alone, for example https://s3.example.com",
    ),
    "an address that is none": (S3 + 'endpoint_url = "https://a..b"', "acme.endpoint_url: write the server's address"),
    "a region that is none": (S3 + 'region = "Frankfurt (EU)"', "acme.region: write it like eu-central-1 (got"),
    "a line break in a key": (S3 + 'access_key_id = "a\\nb"', "acme.access_key_id: no key has spaces, line breaks"),
    "a key of KMS without KMS": (
        S3 + 'encryption = "AES256"\nkms_key_id = "x"',
        'buckets.acme: kms_key_id is for encryption = "aws:kms"',
    ),
    "an encryption that is none": (S3 + 'encryption = "yes"', 'acme.encryption: write "", "AES256" or "aws:kms" (got'),
    "an external id without a role": (
        S3 + 'assume_role_external_id = "x1"',
        "buckets.acme: assume_role_external_id is",
    ),
    "an external id with a space": (
        S3 + 'assume_role_external_id = "x 1"',
        "assume_role_external_id: an external id has",
    ),
    "a role's name alone": (S3 + 'assume_role_arn = "export"', "acme.assume_role_arn: write the role's whole ARN"),
    "a role where there are none": (
        S3 + ROLE + 'provider = "r2"\nendpoint_url = "https://x.example"',
        'buckets.acme: provider "r2" has no roles: take assume_role_arn out',
    ),
    "storage class": (S3 + 'storage_class = "standard"', "acme.storage_class: a storage class is written in capitals"),
    "addressing style": (S3 + 'addressing_style = "host"', 'acme.addressing_style: write "auto", "path" or "virtual"'),
    "too many tags": (
        S3 + "".join(f'tags.t{number} = "x"\n' for number in range(11)),
        "acme.tags: an object has at most 10 tags",
    ),
    "a tag's name": (S3 + 'tags = { "a&b" = "x" }', "acme.tags: a tag has letters, digits, spaces and + - = . _ : / @"),
    "a tag's text": (S3 + 'tags = { a = "x?" }', "acme.tags: a tag has letters"),
    "a tag that is a number": (S3 + "tags = { a = 7 }", "acme.tags.a: write a text in quotes (got 7)"),
    "tags that are a list": (S3 + 'tags = ["a"]', "acme.tags: write a table"),
    "name of a job": ('[exports."A b"]\nclient = "local"', "exports.A b: a name has up to 63"),
    "name of a backup": (S3 + '[exports.a]\nclient = "acme"\nbackup = "A b"', "exports.a.backup:"),
    "client missing": (S3 + "[exports.a]\n", "exports.a.client:"),
    "unknown bucket": (S3 + JOB, "exports.acme.backup: no [buckets.vault] is defined"),
    "unknown site": (
        '[[sites]]\nid = "a"\n' + S3 + VAULT + JOB + 'sites = ["b"]',
        "exports.acme.sites: no [[sites]] entry",
    ),
    "star and more": (S3 + VAULT + JOB + 'sites = ["*", "b"]', 'exports.acme.sites: "*" already means every site'),
    "no sites": (S3 + VAULT + JOB + "sites = []", "exports.acme.sites: write at least one"),
    "cron of six fields": (
        S3 + VAULT + JOB + 'schedule = "* * * * * *"',
        "exports.acme.schedule: a cron line has five",
    ),
    "cron out of range": (
        S3 + VAULT + JOB + 'schedule = "61 * * * *"',
        "exports.acme.schedule: not a cron line: Bad minute (0 to 59)",
    ),
    "cron that never comes": (S3 + VAULT + JOB + 'schedule = "0 0 30 2 *"', "exports.acme.schedule:"),
    "format": (S3 + VAULT + JOB + 'format = "xlsx"', "exports.acme.format:"),
    "secret in two ways": ('[admin]\npassword = { file = "a", env = "B" }', "admin.password: write the secret itself"),
    "secret in no file": (
        '[admin]\npassword = { file = "/nonexistent" }',
        "admin.password: the secret's file /nonexistent cannot be read: No such file",
    ),
    "secret in no variable": (
        '[admin]\npassword = { env = "NOPE" }',
        "admin.password: the environment has no variable NOPE",
    ),
    "a database that is none": ('[database]\nurl = "x"', "database.url: write it as postgresql://user:password@"),
    "no data directory": ('[server]\ndata_dir = ""', "server.data_dir: write a path"),
    "no directory": ('[buckets.a]\nkind = "directory"\npath = ""', "buckets.a.path: write a path"),
    "an alert's URL": ('[alerts]\nurls = ["me@example.com"]', "alerts.urls.0: write an address as apprise reads it"),
    "no list of URLs": ('[alerts]\nurls = "json://x"', "alerts.urls: write a list"),
    "no free disk": ("[health]\nmin_free_disk_bytes = -1", "health.min_free_disk_bytes: it must be at least 0"),
    "log format": ('[server]\nlog_format = "xml"', 'server.log_format: write "text" or "json"'),
    "no TOML": ("[server", "config.toml: not a TOML file"),
    "a NUL in a path": (S3 + '[buckets.vault]\nkind = "directory"\npath = "a\\u0000b"\n' + JOB, "buckets.vault.path"),
}


@pytest.mark.parametrize(("text", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_where_it_was_written(read: Load, text: str, said: str) -> None:
    found = problems(read, text)
    assert any(said in problem for problem in found), found
    assert not [problem for problem in found if "\n" in problem or "function-" in problem or "nput should" in problem]


def test_a_bucket_without_its_kind_is_one_mistake(read: Load) -> None:
    nas = '[buckets.nas]\npath = "/x"\n[exports.nas]\nclient = "nas"\n'
    assert problems(read, nas) == ['config.toml: buckets.nas: kind = "directory" is missing']
    assert problems(read, nas.replace("nas]\n", "nas]\nregion = 7\n", 1))[1:] == [
        "config.toml: buckets.nas.region: a bucket of this kind has no such option"
    ]


def test_all_mistakes_are_named_at_once(read: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_SERVER__DEMO", "perhaps")
    monkeypatch.setenv("APPLIANCE_SEVER__BIND", "x")
    found = problems(read, '[server]\nbind = "x"\n[[sites]]\nid = "/"\n' + S3 + JOB + 'schedule = "x"\ncolour = "red"')
    places = ["APPLIANCE_SEVER__BIND", "APPLIANCE_SERVER__DEMO", "server.bind", "sites.0.id"]
    places += ["exports.acme.backup", "exports.acme.schedule", "exports.acme.colour"]
    assert len(found) == len(places)
    for place in places:
        assert sum(f": {place}: " in problem for problem in found) == 1, place


IN_THE_ENVIRONMENT: dict[str, tuple[str, str, str]] = {
    "a value": ("APPLIANCE_SERVER__BIND", "x", "APPLIANCE_SERVER__BIND: write it as host:port"),
    "no list": (
        "APPLIANCE_EXPORTS__ACME__SITES",
        "x",
        'APPLIANCE_EXPORTS__ACME__SITES: write a list, as JSON (got "x")',
    ),
    "no list of sites": ("APPLIANCE_SITES", "{}", "APPLIANCE_SITES: write a list, as JSON"),
    "an item": ("APPLIANCE_SERVER__TRUSTED_PROXIES", '["x"]', "APPLIANCE_SERVER__TRUSTED_PROXIES: server.trusted_prox"),
    "a value in JSON": ("APPLIANCE_SITES", '[{"id": "/"}]', "APPLIANCE_SITES: sites.0.id: a site id has"),
    "small letters": ("appliance_sites", '[{"id": "/"}]', "APPLIANCE_SITES: sites.0.id: a site id has"),
    "missing in JSON": ("APPLIANCE_SITES", "[{}]", "APPLIANCE_SITES: sites.0.id: this option is missing"),
    "twice in JSON": ("APPLIANCE_SITES", '[{"id": "a"}, {"id": "a"}]', "APPLIANCE_SITES: sites.1.id: this site stands"),
    "a reference": (
        "APPLIANCE_EXPORTS",
        '{"x": {"client": "y"}}',
        "APPLIANCE_EXPORTS: exports.x.client: no [buckets.y]",
    ),
    "a kind": ("APPLIANCE_BUCKETS__ACME__KIND", "S3", "APPLIANCE_BUCKETS__ACME__KIND: a bucket is a table with kind"),
    "a database": ("APPLIANCE_DATABASE__URL", "x31337", "APPLIANCE_DATABASE__URL: write it as postgresql://"),
}


@pytest.mark.parametrize(("name", "value", "said"), IN_THE_ENVIRONMENT.values(), ids=IN_THE_ENVIRONMENT)
def test_a_mistake_in_the_environment_is_named_there(
    read: Load, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    (problem,) = problems(read, S3 + VAULT + JOB)
    assert problem.startswith(f"environment: {said}")
    assert "31337" not in problem


def test_a_mistake_in_the_file_is_named_there_though_the_environment_has_the_same_table(
    read: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPLIANCE_BUCKETS", '{"acme": {"prefix": "raw"}}')
    assert problems(read, S3 + "region = 7") == ["config.toml: buckets.acme.region: write a text in quotes (got 7)"]


UNKNOWN_VARIABLES = {
    "APPLIANCE_PORT": None,
    "APPLIANCE_LOG_LEVEL": None,
    "APPLIANCE_": None,
    "APPLIANCE_SERVER__PORT": None,
    "APPLIANCE_BIND": "APPLIANCE_SERVER__BIND",
    "APPLIANCE_SERVER_BIND": "APPLIANCE_SERVER__BIND",
    "APPLIANCE_SERVER__BND": "APPLIANCE_SERVER__BIND",
    "APPLIANCE_SEVER__BIND": "APPLIANCE_SERVER__BIND",
    "APPLIANCE_DATABASE_URL": "APPLIANCE_DATABASE__URL",
    "APPLIANCE_ADMIN_PASSWORD": "APPLIANCE_ADMIN__PASSWORD",
    "APPLIANCE_SITE": "APPLIANCE_SITES",
    "APPLIANCE_EXPORT__ACME__CLIENT": "APPLIANCE_EXPORTS__ACME__CLIENT",
}


@pytest.mark.parametrize(("name", "meant"), UNKNOWN_VARIABLES.items())
def test_an_unknown_variable_is_named_with_the_one_that_may_have_been_meant(
    read: Load, monkeypatch: pytest.MonkeyPatch, name: str, meant: str | None
) -> None:
    monkeypatch.setenv(name, "x31337")
    hint = f'; did you mean "{meant}"?' if meant else ""
    assert problems(read, S3 + VAULT + JOB) == [f"environment: {name}: there is no such option{hint}"]


@pytest.mark.parametrize(
    "address",
    [
        "https://s3.example.com",
        "http://127.0.0.1:9000",
        "http://[::1]:9000",
        "http://minio",
        "https://s3_a.example.com.",
    ],
)
def test_an_address_of_a_server_is_taken_as_it_is(read: Load, address: str) -> None:
    bucket = read(S3 + f'endpoint_url = "{address}/"').buckets["acme"]
    assert isinstance(bucket, S3Bucket)
    assert bucket.endpoint_url == address


ORIGINS = {
    "https://shop.example.com": "https://shop.example.com",
    "HTTPS://Shop.Example.com": "https://shop.example.com",
    "https://shop.example.com:443": "https://shop.example.com",
    "http://shop.example.com:80": "http://shop.example.com",
    "http://shop.example.com:443": "http://shop.example.com:443",
    "https://shop.example.com:08443": "https://shop.example.com:8443",
    "https://[2001:DB8::1]:443": "https://[2001:db8::1]",
    "http://localhost:8080": "http://localhost:8080",
}


@pytest.mark.parametrize(("written", "sent"), ORIGINS.items())
def test_an_origin_is_compared_as_a_browser_sends_it(read: Load, written: str, sent: str) -> None:
    assert read(f'[[sites]]\nid = "a"\norigins = ["{written}"]').sites[0].origins == (sent,)


@pytest.mark.parametrize("name", ["APPLIANCE_SERVER__TRUSTED_PROXIES", "APPLIANCE_SITES"])
def test_a_variable_that_is_no_json_is_named_beside_the_mistakes_of_the_file(
    read: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "10.0.0.0/8")
    found = problems(read, "[collect]\nmax_batch_events = 0")
    assert any(name in problem for problem in found), found
    assert any("collect.max_batch_events" in problem for problem in found), found


ONE_PLACE: dict[str, tuple[str, str]] = {
    "one bucket": ('bucket = "x-1"', 'bucket = "x-1"'),
    "a slash more": ('bucket = "x-1"\nprefix = "a"', 'bucket = "x-1"\nprefix = "/a/"'),
    "one server": (
        'bucket = "x-1"\nprovider = "minio"\nendpoint_url = "https://s3.example"',
        'bucket = "x-1"\nprovider = "other"\nendpoint_url = "https://S3.example/"',
    ),
    "one directory": ('kind = "directory"\npath = "/x/y"', 'kind = "directory"\npath = "/x/z/../y/"'),
    "a directory and its prefix": (
        'kind = "directory"\npath = "/x/y"',
        'kind = "directory"\npath = "/x"\nprefix = "y"',
    ),
}


@pytest.mark.parametrize(("first", "second"), ONE_PLACE.values(), ids=ONE_PLACE)
def test_client_and_backup_may_not_be_one_place(read: Load, first: str, second: str) -> None:
    found = problems(read, f"[buckets.acme]\n{first}\n[buckets.vault]\n{second}\n" + JOB)
    assert found == ['config.toml: exports.acme.backup: client and backup are one place (got "vault")']


def test_client_and_backup_may_be_two_prefixes_of_one_bucket(read: Load) -> None:
    assert (
        read(S3 + 'prefix = "a"\n[buckets.vault]\nbucket = "acme-events"\nprefix = "b"\n' + JOB).exports["acme"].backup
    )


SPILLS: dict[str, str] = {
    "a password that is a number": "[admin]\npassword = 31337",
    "a list as token": '[admin]\ntoken = ["x31337"]',
    "a misspelt password": '[admin]\npasword = "x31337"',
    "half a pair of keys": S3 + 'secret_access_key = "x31337"',
    "a key that is no text": S3 + "secret_access_key = 31337",
    "a key with a space": S3 + 'secret_access_key = "x31337 "',
    "a password in an address": S3 + 'endpoint_url = "https://me:x31337@s3.example"',
    "a database that is no text": "[database]\nurl = 31337",
    "a database that is none": '[database]\nurl = "postgres//me:x31337@db/x"',
    "a bucket of unknown kind": '[buckets.a]\nkind = "ftp"\nsecret_access_key = "x31337"',
}


@pytest.mark.parametrize("text", SPILLS.values(), ids=SPILLS)
def test_an_error_shows_no_secret(read: Load, text: str) -> None:
    assert "31337" not in "\n".join(problems(read, text))


def test_what_was_written_is_shown_but_not_at_any_length(read: Load) -> None:
    (problem,) = problems(read, f"[server]\nbind = {json.dumps('x' * 9999)}")
    assert '(got "xxx' in problem
    assert len(problem) < 250


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for name, content in [("binary", b"\xff\xfe"), ("nul", b"\x00")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="not a TOML file"):
            load(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_a_site_is_found_by_its_id(read: Load) -> None:
    settings: Any = read('[[sites]]\nid = "a"\n[[sites]]\nid = "b"\nip = "drop"')
    assert settings.site("b").ip == "drop"
    assert settings.site("c") is None
