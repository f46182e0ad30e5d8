"""How long tracking.js keeps a page busy: the processor's time of its longest task, as the browser traces it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

from bench.errors import BenchError
from bench.plan import Plan, load_now
from bench.report import Bound, Row
from bench.servers import Kind
from bench.world import World

_LOADS = 20
_TASK_MS = 10
_ORIGIN = "https://shop.example.com"
_PAGE = '<!doctype html><title>A page</title>{rows}<script async src="{url}/tracking.js" data-site="shop"></script>'
_ROWS = "<p>row</p>" * 3000
_RUNNING = "window.appliance && appliance.track && !appliance.q"
_CATEGORIES = {"traceConfig": {"includedCategories": ["devtools.timeline", "v8"]}}
_TASKS = {"EvaluateScript", "FunctionCall", "v8.compile"}
_POLL_MS = 30
_POLLS = 600


def longest_task(world: World, plan: Plan) -> list[Row]:
    """The longest task of tracking.js in any of several loads of a large page, against what it may take."""
    load_before = load_now()
    with world.server(Kind.DURABLE) as server, _chromium() as browser:
        root = server.url.removesuffix("/collect")
        longest = [max(_task_ms(browser, root) for _ in range(_LOADS)) for _ in range(plan.pace.rounds)]
    return [
        Row(
            name=f"longest task of tracking.js in {_LOADS} loads of a page / what it may take",
            unit="ms",
            figures=tuple(longest),
            against=(_TASK_MS,) * plan.pace.rounds,
            bound=Bound(at_most=1),
            load_before=load_before,
        )
    ]


@contextmanager
def _chromium() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise BenchError("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, and keeps pages of the world from asking this machine.
        flags = ["--disable-features=LocalNetworkAccessChecks"]
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0, args=flags)
        yield browser
        browser.close()


def _task_ms(browser: Browser, root: str) -> float:
    """Load the page as a new visitor. Raises BenchError when the tracker does not run there."""
    context = browser.new_context()
    try:
        page = context.new_page()
        body = _PAGE.format(rows=_ROWS, url=root)
        page.route(f"{_ORIGIN}/", lambda route: route.fulfill(body=body, content_type="text/html"))
        events = _traced(browser, page)
    except Error as error:
        raise BenchError(f"tracking.js does not run: {error}") from error
    finally:
        context.close()
    tasks: list[float] = [
        event["tdur"] / 1000
        for event in events
        if event["name"] in _TASKS
        and "tdur" in event
        and "tracking.js" in str(event["args"].get("data", {}).get("url"))
    ]
    if not tasks:
        raise BenchError("the browser has traced nothing of tracking.js")
    return max(tasks)


def _traced(browser: Browser, page: Page) -> list[dict[str, Any]]:
    """Open the page and return what the browser traced until the tracker was there."""
    events: list[dict[str, Any]] = []
    done: list[Any] = []
    session = browser.new_browser_cdp_session()
    session.on("Tracing.dataCollected", lambda data: events.extend(data["value"]))
    session.on("Tracing.tracingComplete", lambda data: done.append(data))  # noqa: PLW0108 - Playwright marks what it is given
    session.send("Tracing.start", _CATEGORIES)
    page.goto(f"{_ORIGIN}/")
    page.wait_for_function(_RUNNING)
    session.send("Tracing.end")
    for _ in range(_POLLS):
        # Playwright delivers what the browser has told it only while it is asked for something.
        page.wait_for_timeout(_POLL_MS)
        if done:
            session.detach()
            return events
    raise BenchError("the browser does not end its trace")
