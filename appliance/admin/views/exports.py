"""Exports: runs and batches as they went, and what can be done by hand. All of that happens in the background."""

from collections.abc import Callable
from datetime import UTC, datetime

from flask import Blueprint, abort, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from appliance.admin.asked import below, clean
from appliance.admin.inside import House
from appliance.config import S3Bucket
from appliance.store import ledger, overview, resting, runs, shipped
from appliance.store.ledger import Key

_SHOWN_RUNS = 20
_SHOWN_BATCHES = 20

_SAID = {
    "run": "The job runs now; this page shows how it fares.",
    "retry": "The bucket is tried again now; this page shows how it fares.",
    "verify": "Every object is being read and compared; this page shows what is found.",
    "probe": "The bucket is being tried; this page shows what works.",
    "clock": "Jobs do not run yet: the database is not ready.",
}


def register(routes: Blueprint, house: House) -> None:
    """Add the pages, and what their forms ask for."""
    routes.add_url_rule("/exports", view_func=lambda: _page(house), endpoint="exports")
    routes.add_url_rule("/exports/<job>", view_func=lambda job: _job(house, job), endpoint="job")
    routes.add_url_rule(
        "/exports/<job>/<int:sequence>", view_func=lambda job, sequence: _batch(house, job, sequence), endpoint="batch"
    )
    for name, action in (("run", _run), ("retry", _retry), ("verify", _verify), ("probe", _probe)):
        routes.add_url_rule(f"/exports/{name}", view_func=_form(house, action), methods=["POST"], endpoint=name)


# -- pages ------------------------------------------------------------------------------------------------------------


def _page(house: House) -> str:
    with house.connection() as conn:
        state = overview.read(conn, run_limit=_SHOWN_RUNS)
        newest = {job.job: shipped.newest(conn, job.job, below=None, limit=5) for job in state.jobs}
        last_runs = runs.last_of_each_job(conn)
    return render_template(
        "exports.html",
        jobs=state.jobs,
        runs=state.runs,
        last_runs=last_runs,
        newest=newest,
        exports=house.settings.exports,
        buckets={name: _place(bucket) for name, bucket in house.settings.buckets.items()},
        next_runs=house.inside.next_runs(),
        verified=house.inside.errands.last("verify"),
        probed=house.inside.errands.last("probe"),
        said=_SAID.get(request.args.get("asked", "")),
        now=datetime.now(UTC),
    )


def _job(house: House, job: str) -> str:
    with house.connection() as conn:
        found = shipped.newest(conn, clean(job), below=below(), limit=_SHOWN_BATCHES + 1)
        known = job in house.settings.exports or bool(found)
    if not known:
        abort(404)
    shown = found[:_SHOWN_BATCHES]
    older = shown[-1].key.sequence if len(found) > len(shown) else None
    return render_template("job.html", job=job, list=shown, older=older)


def _batch(house: House, job: str, sequence: int) -> str:
    key = Key(clean(job), min(sequence, 2**63 - 1))
    with house.connection() as conn:
        batch = shipped.find(conn, key)
        objects = ledger.objects(conn, key) if batch else []
        parcels = shipped.parcels(conn, key) if batch else []
    if batch is None:
        abort(404)
    return render_template("batch.html", batch=batch, objects=objects, parcels=parcels)


def _place(bucket: object) -> str:
    if isinstance(bucket, S3Bucket):
        where = f"{bucket.endpoint_url}/{bucket.bucket}" if bucket.endpoint_url else f"s3://{bucket.bucket}"
        return f"{where}/{bucket.prefix}" if bucket.prefix else where
    return str(getattr(bucket, "path", ""))


# -- forms ------------------------------------------------------------------------------------------------------------


def _form(house: House, action: Callable[[House], str]) -> Callable[[], Response]:
    """Do what a form asks for and show the page again: loading that once more asks for nothing."""
    return lambda: redirect(url_for("admin.exports", asked=action(house)), 303)


def _run(house: House) -> str:
    return _wake(house, _known_job(house), None, "run")


def _retry(house: House) -> str:
    return _wake(house, _known_job(house), request.form.get("bucket", ""), "retry")


def _verify(house: House) -> str:
    house.inside.errands.ask("verify", _known_job(house))
    return "verify"


def _probe(house: House) -> str:
    bucket = request.form.get("bucket", "")
    if bucket not in house.settings.buckets:
        abort(404)
    house.inside.errands.ask("probe", bucket)
    return "probe"


def _wake(house: House, job: str, bucket: str | None, asked: str) -> str:
    """Let a job run now, and try what has failed although it rests: somebody has mended it, or wants to know."""
    with house.connection() as conn:
        resting.end_rest(conn, job, clean(bucket) if bucket is not None else None)
    return asked if house.inside.run_soon(job) else "clock"


def _known_job(house: House) -> str:
    job = clean(request.form.get("job", ""))
    if job not in house.settings.exports:
        with house.connection() as conn:
            if job not in ledger.jobs(conn):
                abort(404)
    return job
