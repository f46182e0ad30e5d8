"""Rules between sections, on raw values: they are checked even where a section itself is wrong."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from appliance.config.sections import DirectoryBucket, Export
from appliance.config.values import ALL_SITES

_LOCAL = "local"
# What nobody has written counts as a default, like that of any option.
_NOT_WRITTEN: set[str] = set()


def with_default_job(values: dict[str, Any]) -> dict[str, Any]:
    """Without any export job, keep a local copy of everything: nobody starts with a collector that leads nowhere."""
    if values.get("exports"):
        return values
    server = values.get("server")
    data_dir = server.get("data_dir", "/data") if isinstance(server, Mapping) else "/data"
    buckets = values.get("buckets", {})
    if isinstance(buckets, Mapping):
        path = (Path(str(data_dir)) / "export").absolute()
        buckets = {_LOCAL: DirectoryBucket.model_construct(_NOT_WRITTEN, kind="directory", path=path), **buckets}
    return {**values, "buckets": buckets, "exports": {_LOCAL: Export.model_construct(_NOT_WRITTEN, client=_LOCAL)}}


def with_kinds(values: dict[str, Any]) -> dict[str, Any]:
    """Take a bucket with a path for a directory where its kind is missing: that is one mistake, not three."""
    buckets = _mapping(values.get("buckets"))
    meant = {name: {**buckets[name], "kind": "directory"} for name in _without_kind(buckets)}
    return {**values, "buckets": {**buckets, **meant}} if meant else values


def _without_kind(buckets: Mapping[str, Any]) -> list[str]:
    options = {name: set(_mapping(bucket)) for name, bucket in buckets.items()}
    return [name for name, given in options.items() if "path" in given and not given & {"kind", "bucket"}]


def reference_problems(values: dict[str, Any]) -> Iterator[InitErrorDetails]:
    """Find what is wrong between sections: sites that stand twice, buckets and sites that no one defines."""
    buckets = _mapping(values.get("buckets"))
    for name in _without_kind(buckets):
        yield _problem(("buckets", name), 'kind = "directory" is missing', None)
    site_ids = [_mapping(site).get("id") for site in _list(values.get("sites"))]
    for index, site_id in enumerate(site_ids):
        if site_id is not None and site_id in site_ids[:index]:
            yield _problem(("sites", index, "id"), "this site stands here twice", site_id)
    for name, export in _mapping(values.get("exports")).items():
        yield from _export_problems(name, _mapping(export), buckets=buckets, site_ids=site_ids)


def _export_problems(
    name: str, export: Mapping[str, Any], *, buckets: Mapping[str, Any], site_ids: list[Any]
) -> Iterator[InitErrorDetails]:
    for role in ("client", "backup"):
        bucket = export.get(role)
        if isinstance(bucket, str) and bucket and bucket not in buckets:
            yield _problem(("exports", name, role), f"no [buckets.{bucket}] is defined", bucket)
    places = [place_of(_mapping(buckets.get(str(export.get(role) or "")))) for role in ("client", "backup")]
    if places[0] and places[0] == places[1]:
        yield _problem(("exports", name, "backup"), "client and backup are one place", export.get("backup"))
    sites = _list(export.get("sites"))
    for site in sites:
        if site_ids and site != ALL_SITES and site not in site_ids:
            yield _problem(("exports", name, "sites"), "no [[sites]] entry has this id", site)
    if ALL_SITES in sites and len(sites) > 1:
        yield _problem(("exports", name, "sites"), '"*" already means every site', sites)


def place_of(bucket: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return what tells two places apart: the same server, bucket and prefix are one place under two names."""
    if not bucket:
        return None
    prefix = str(bucket.get("prefix", "")).strip("/")
    if "path" in bucket:
        # What no path can be is told where the path is checked.
        with suppress(ValueError):
            return ("directory", os.path.realpath(Path(str(bucket["path"])) / prefix))
        return None
    return ("s3", str(bucket.get("endpoint_url", "")).rstrip("/").lower(), str(bucket.get("bucket")), prefix)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _problem(loc: tuple[str | int, ...], message: str, got: object) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("reference", "{why}", {"why": message}), loc=loc, input=got)


def as_init_error(details: ErrorDetails) -> InitErrorDetails:
    """Return an error that pydantic has reported as one that it can be given again, with others."""
    error = PydanticCustomError(details["type"], "{why}", {**details.get("ctx", {}), "why": details["msg"]})
    return InitErrorDetails(type=error, loc=details["loc"], input=details["input"])
