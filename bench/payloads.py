"""What is posted: pageviews as tracking.js sends them, but without ids of their own, so that each is new."""

import json
from datetime import UTC, datetime
from typing import Any

BATCH_EVENTS = 20


def single() -> bytes:
    """Return one pageview, about 400 bytes."""
    return json.dumps({"siteId": "shop", **_pageview(1)}, separators=(",", ":")).encode()


def batch() -> bytes:
    """Return an envelope of 20 pageviews, about 7.5 KB."""
    events = [_pageview(number) for number in range(BATCH_EVENTS)]
    envelope = {"eventType": "batch", "siteId": "shop", "sentAt": _now(), "events": events}
    return json.dumps(envelope, separators=(",", ":")).encode()


def _pageview(number: int) -> dict[str, Any]:
    path = f"/products/{number}/a-product-like-any-other"
    return {
        "url": f"https://shop.example.com{path}",
        "path": path,
        "title": "A product like any other",
        "referrer": "https://www.example.org/",
        "language": "en-US",
        "screen": "1920x1080",
        "eventType": "pageview",
        "timestamp": _now(),
        "sessionId": "0199f2a4-6c1e-7b3a-9d52-3f6a8c0e4b17",
        "visitorId": "0199e1b3-2a4d-7c5f-8e61-7d9b0a2c4f38",
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
