"""Where collecting is reached: /collect and /pixel.gif in front of Flask, /tracking.js in it."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from flask import Blueprint

from appliance.collect.collector import Collector
from appliance.collect.http import ARRIVED, LATER, Answer, Later, Pending, Request, WSGIApp, then, waited_for
from appliance.collect.tallies import RequestTally
from appliance.collect.tracker import Tracker
from appliance.log import request_id
from appliance.resources import read_resource

log = logging.getLogger(__name__)

_Action: TypeAlias = Callable[[Request], Answer | Pending]
# What is asked in advance or about the picture alone is no event and would only make the others look faster.
_UNCOUNTED = frozenset({"OPTIONS", "HEAD"})
# Where events are sent to.
PATHS = ("/collect", "/pixel.gif")
_Actions: TypeAlias = Mapping[str, Mapping[str, _Action]]


def blueprint() -> Blueprint:
    """Return the routes that Flask answers."""
    routes = Blueprint("collect", __name__)
    tracker = Tracker(read_resource("tracking.js"))
    routes.add_url_rule("/tracking.js", view_func=tracker.serve, endpoint="tracker")
    routes.add_url_rule("/tracking.<digest>.js", view_func=tracker.serve_pinned, endpoint="pinned_tracker")
    return routes


def in_front_of(app: WSGIApp, collector: Collector, tallies: Mapping[str, RequestTally]) -> WSGIApp:
    """Answer what comes with every event, and leave everything else to the app. Each path has a tally."""
    actions: _Actions = {
        "/collect": {"POST": collector.collect, "OPTIONS": collector.preflight},
        "/pixel.gif": {"GET": collector.pixel, "HEAD": collector.pixel},
    }

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        methods = actions.get(path)
        if methods is None:
            return app(environ, start_response)
        arrived = environ.get(ARRIVED) or time.monotonic()
        found = _answered(Request(environ), methods)
        if environ["REQUEST_METHOD"] not in _UNCOUNTED:
            found = then(found, partial(_counted, tallies[path], arrived))
        if isinstance(found, Answer):
            return found.send(start_response, without_body=environ["REQUEST_METHOD"] == "HEAD")
        return Later(found) if environ.get(LATER) else waited_for(found).send(start_response)

    return answer


def _counted(tally: RequestTally, arrived: float, answer: Answer) -> Answer:
    tally.note(answer, time.monotonic() - arrived)
    return answer


def _answered(request: Request, methods: Mapping[str, _Action]) -> Answer | Pending:
    action = methods.get(request.method)
    if action is None:
        answer = Answer.of(405, error="method not allowed")
        answer.headers.append(("Allow", ", ".join(methods)))
        return answer
    try:
        return action(request)
    except Exception:
        log.exception("collecting failed")
        return Answer.of(500, error="internal server error", request=request_id())
