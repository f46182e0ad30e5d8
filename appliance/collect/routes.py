"""Where collecting is reached: /collect and /pixel.gif in front of Flask, /tracking.js in it."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flask import Blueprint

from appliance.collect.collector import Collector
from appliance.collect.http import LATER, Answer, Later, Pending, Request, WSGIApp, waited_for
from appliance.collect.tracker import Tracker
from appliance.resources import read_resource

log = logging.getLogger(__name__)

_Action: TypeAlias = Callable[[Request], Answer | Pending]
_Actions: TypeAlias = Mapping[str, Mapping[str, _Action]]


def blueprint() -> Blueprint:
    """Return the routes that Flask answers."""
    routes = Blueprint("collect", __name__)
    tracker = Tracker(read_resource("tracking.js"))
    routes.add_url_rule("/tracking.js", view_func=tracker.serve, endpoint="tracker")
    routes.add_url_rule("/tracking.<digest>.js", view_func=tracker.serve_pinned, endpoint="pinned_tracker")
    return routes


def in_front_of(app: WSGIApp, collector: Collector) -> WSGIApp:
    """Answer what comes with every event, and leave everything else to the app."""
    actions: _Actions = {
        "/collect": {"POST": collector.collect, "OPTIONS": collector.preflight},
        "/pixel.gif": {"GET": collector.pixel, "HEAD": collector.pixel},
    }

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        methods = actions.get(environ["PATH_INFO"])
        if methods is None:
            return app(environ, start_response)
        found = _answered(Request(environ), methods)
        if isinstance(found, Answer):
            return found.send(start_response)
        return Later(found) if environ.get(LATER) else waited_for(found).send(start_response)

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
        return Answer.of(500, error="internal server error")
