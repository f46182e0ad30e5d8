"""GET /metrics for Prometheus: what the worker has counted, and what the ledger says when it is asked."""

import hmac
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeAlias

from flask import Blueprint, Response, jsonify, request
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from appliance.admin.ledger import LedgerFigures, LedgerReader
from appliance.alerts.conditions import Room
from appliance.collect.inbox import Inbox
from appliance.collect.refusals import Refusals
from appliance.collect.tallies import Histogram, RequestTally
from appliance.store.database import Database
from appliance.wire.figures import WebFigures

# A series each: what has many sites is counted together from here on. A site id has no brackets.
_MAX_SITES = 200
OTHER_SITES = "(other)"
NO_SITE = "(none)"

# What psycopg's pool counts, as far as somebody would look at it.
_POOL_GAUGES = {
    "pool_size": ("connections", "Connections to the database that are open."),
    "pool_available": ("idle", "Connections to the database that nobody uses."),
    "requests_waiting": ("waiting", "Threads that wait for a connection to the database."),
}
_POOL_COUNTERS = {
    "requests_num": ("requests", "How often somebody wanted a connection to the database."),
    "requests_errors": ("errors", "How often nobody got one in time."),
    "connections_lost": ("lost", "Connections to the database that broke."),
}

_Samples: TypeAlias = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the figures are."""

    db: Database
    inbox: Inbox
    refusals: Refusals
    requests: Mapping[str, RequestTally]
    room: Callable[[], Room]
    web: Callable[[], WebFigures | None]
    alerts_looked_at: Callable[[], float | None]


def blueprint(token: str, sources: Sources) -> Blueprint:
    """Return the route. Without a token there is none."""
    routes = Blueprint("metrics", __name__)
    registry = registry_of(sources)

    @routes.get("/metrics")
    def metrics() -> tuple[Response, int]:
        answer, status = Response(content_type="application/json"), 200
        if not token:
            answer, status = jsonify(error="metrics are off until admin.token is set"), 404
        elif not _bears(token):
            answer, status = jsonify(error="send the header Authorization: Bearer <admin.token>"), 401
            answer.headers["WWW-Authenticate"] = "Bearer"
        else:
            answer = Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)
        answer.headers["Cache-Control"] = "no-store"
        return answer, status

    return routes


def registry_of(sources: Sources) -> CollectorRegistry:
    """Return a registry of the worker's own: nothing else in the process adds to it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Appliance(sources))
    ProcessCollector(registry=registry)
    return registry


def _bears(token: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # Without telling by the time it takes how much of it was right.
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogatepass"), token.encode())
    return scheme.lower() == "bearer" and same


class _SiteLabels:
    """Gives the first sites a label each and all others one together, for good: no counter ever goes down."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {"": NO_SITE}
        self._lock = threading.Lock()

    def sum(self, counts: Mapping[Any, int]) -> dict[tuple[str, ...], float]:
        """Add up counts, whose key begins with a site, by labels."""
        summed: dict[tuple[str, ...], float] = {}
        with self._lock:
            for (site, *rest), number in counts.items():
                labels = (self._label(site), *rest)
                summed[labels] = summed.get(labels, 0) + number
        return summed

    def _label(self, site: str) -> str:
        if site not in self._known and len(self._known) <= _MAX_SITES:
            self._known[site] = site
        return self._known.get(site, OTHER_SITES)


class _Appliance(Collector):
    """Makes all families anew for each scrape."""

    def __init__(self, sources: Sources) -> None:
        self._from = sources
        self._sites = _SiteLabels()
        self._ledger = LedgerReader(sources.db)

    def collect(self) -> Iterator[Metric]:
        ledger = self._ledger.read()
        yield _gauge("info", "Which version runs.", ["version"], [((version("appliance"),), 1)])
        yield from self._events()
        yield from self._requests()
        yield from self._web()
        yield from self._room()
        yield from self._database(ledger)
        if ledger is not None:
            yield from _backlog(ledger)
            yield from _runs(ledger)
            yield from _buckets(ledger)

    def _events(self) -> Iterator[Metric]:
        tally = self._from.inbox.tally
        for name, text, counts in (
            ("events_accepted", "Events that were taken in, by site.", tally.accepted),
            ("events_duplicate", "Events that stood in the table already, by site.", tally.duplicates),
            ("events_spooled", "Of the accepted events those that went to the spool, by site.", tally.spooled),
        ):
            by_site = self._sites.sum({(site,): number for site, number in dict(counts).items()})
            yield _counter(name, text, ["site"], by_site.items())
        refused = {(site, kind): number for (kind, site), number in dict(self._from.refusals.totals).items()}
        text = "What was refused, by site where one is known, and reason: an event, a site's part of a request, or all."
        yield _counter("refused", text, ["site", "reason"], self._sites.sum(refused).items())
        text = "Events that were answered 503, because nothing could store them."
        yield _counter("events_turned_away", text, [], [((), self._from.inbox.turned_away)])
        yield _histogram("group_events", "Events that were stored together.", [], [((), tally.sizes)])

    def _requests(self) -> Iterator[Metric]:
        statuses, seconds = [], []
        for path, tally in self._from.requests.items():
            statuses += [((path, str(status)), float(n)) for status, n in dict(tally.statuses).items()]
            seconds.append(((path,), tally.seconds))
        yield _counter("requests", "Requests that bring events, by path and status.", ["path", "status"], statuses)
        text = "From the last byte of a request that brings events to its answer."
        yield _histogram("request_seconds", text, ["path"], seconds)

    def _web(self) -> Iterator[Metric]:
        web = self._from.web()
        if web is None:
            return
        yield _gauge("web_connections", "Connections of clients that are open.", [], [((), web.connections)])
        text = "Requests that are being answered, or wait for a thread."
        yield _gauge("web_requests", text, [], [((), web.requests)])
        refused = [((str(status),), float(number)) for status, number in web.refused.items()]
        yield _counter("web_refused", "Requests that were refused before any thread saw them.", ["status"], refused)
        text = "Connections that were closed because there were too many."
        yield _counter("web_dropped", text, [], [((), web.dropped)])

    def _room(self) -> Iterator[Metric]:
        room = self._from.room()
        yield _gauge("spool_bytes", "What waits in the spool for the database.", [], [((), room.spool_used)])
        yield _gauge("spool_limit_bytes", "What the spool may take.", [], [((), room.spool_size)])
        yield _gauge("disk_free_bytes", "What is left of the disk of the data directory.", [], [((), room.disk_free)])
        yield _gauge("disk_bytes", "The size of that disk.", [], [((), room.disk_size)])
        looked = self._from.alerts_looked_at()
        moments = [] if looked is None else [((), looked)]
        yield _gauge("alerts_looked_timestamp_seconds", "When it was last looked for alerts.", [], moments)

    def _database(self, ledger: LedgerFigures | None) -> Iterator[Metric]:
        up = not self._from.inbox.database_away
        yield _gauge("database_up", "1: events go to the database; 0: to the spool.", [], [((), up)])
        text = "1: the figures of exports are here; 0: the database did not give them."
        yield _gauge("ledger_up", text, [], [((), ledger is not None)])
        counted = self._from.db.pool_figures()
        for key, (name, text) in _POOL_GAUGES.items():
            yield _gauge(f"pool_{name}", text, [], [((), counted.get(key, 0))])
        for key, (name, text) in _POOL_COUNTERS.items():
            yield _counter(f"pool_{name}", text, [], [((), counted.get(key, 0))])
        if ledger is not None:
            yield _gauge("database_bytes", "What the database takes.", [], [((), ledger.database_bytes)])


# Prometheus itself puts a label "job" on all that it scrapes, and would rename ours: a job is an "export" here.


def _backlog(ledger: LedgerFigures) -> Iterator[Metric]:
    pending = [((one.job,), float(one.events)) for one in ledger.backlog]
    yield _gauge("export_pending_events", "Events that a job has not brought to all its buckets.", ["export"], pending)
    oldest = [((one.job,), one.oldest.timestamp()) for one in ledger.backlog if one.oldest]
    text = "When the oldest of them arrived, to the minute."
    yield _gauge("export_oldest_timestamp_seconds", text, ["export"], oldest)


def _runs(ledger: LedgerFigures) -> Iterator[Metric]:
    runs = ledger.runs
    outcomes = [((job, outcome), float(n)) for job, run in runs.items() for outcome, n in run.outcomes.items()]
    yield _counter("export_runs", "Runs that have ended: done or failed.", ["export", "outcome"], outcomes)
    durations = [((job,), run.seconds) for job, run in runs.items()]
    yield _histogram("export_run_seconds", "How long runs took.", ["export"], durations)
    events = [((job,), float(run.events)) for job, run in runs.items()]
    yield _counter("export_events", "Events of the batches that runs brought to their last bucket.", ["export"], events)
    batches = [((job,), float(run.batches)) for job, run in runs.items()]
    yield _counter("export_batches", "Those batches.", ["export"], batches)


def _buckets(ledger: LedgerFigures) -> Iterator[Metric]:
    labels = ["export", "bucket"]
    found = {(one.job, one.bucket): one for one in ledger.buckets}

    def each(attribute: str) -> _Samples:
        return [(key, float(getattr(one, attribute))) for key, one in found.items()]

    yield _counter("export_bucket_batches", "Batches that a bucket has.", labels, each("delivered"))
    yield _counter("export_bucket_bytes", "Bytes of their objects.", labels, each("delivered_bytes"))
    yield _counter("export_bucket_errors", "Attempts to deliver a batch that failed.", labels, each("errors"))
    yield _gauge("export_bucket_pending_batches", "Batches that a bucket waits for.", labels, each("pending"))
    yield _gauge("export_bucket_failing", "How often in a row it has failed.", labels, each("failing"))
    last = [(key, one.last_success.timestamp()) for key, one in found.items() if one.last_success]
    yield _gauge("export_bucket_success_timestamp_seconds", "When a bucket last got a batch.", labels, last)


def _counter(name: str, text: str, labels: list[str], samples: _Samples) -> Metric:
    family = CounterMetricFamily(f"appliance_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _gauge(name: str, text: str, labels: list[str], samples: _Samples) -> Metric:
    family = GaugeMetricFamily(f"appliance_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _histogram(name: str, text: str, labels: list[str], samples: Iterable[tuple[tuple[str, ...], Histogram]]) -> Metric:
    family = HistogramMetricFamily(f"appliance_{name}", text, labels=labels)
    for values, histogram in samples:
        buckets = [("+Inf" if bound == float("inf") else str(bound), n) for bound, n in histogram.up_to()]
        family.add_metric(values, buckets, sum_value=histogram.total)
    return family
