"""Serves tracking.js small, cached and compressed."""

import gzip
import hashlib

import minify
from flask import Response, request
from werkzeug.wrappers import Response as BaseResponse

_CACHE_SECONDS = 3_600


class Tracker:
    """tracking.js as it is served; all of it is made once."""

    def __init__(self, source: str) -> None:
        self._plain = minify.string("application/javascript", source).encode()
        self._gzipped = gzip.compress(self._plain, mtime=0)
        self._etag = hashlib.sha256(self._plain).hexdigest()[:16]

    def serve(self) -> BaseResponse:
        """Answer GET /tracking.js."""
        zipped = request.accept_encodings["gzip"] > 0
        answer = Response(self._gzipped if zipped else self._plain, mimetype="text/javascript")
        if zipped:
            answer.headers["Content-Encoding"] = "gzip"
        answer.headers["Cache-Control"] = f"public, max-age={_CACHE_SECONDS}"
        answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        answer.vary.add("Accept-Encoding")
        # Two representations, two tags.
        answer.set_etag(f"{self._etag}-gz" if zipped else self._etag)
        # By the tag alone: there is no date to compare with, and werkzeug fails on absurd ones (OverflowError).
        wanted = {name: request.environ.get(name, "") for name in ("REQUEST_METHOD", "HTTP_IF_NONE_MATCH")}
        return answer.make_conditional(wanted)
