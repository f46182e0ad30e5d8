"""Serves tracking.js small, cached and compressed; and under a name that says what is in it, for those who pin it."""

import base64
import gzip
import hashlib
import re

from flask import Response, abort, request
from werkzeug.wrappers import Response as BaseResponse

_CACHE_SECONDS = 3_600
_IMMUTABLE_SECONDS = 31_536_000
_NAMED_NUMBER = re.compile(r"^ *const ([A-Z_]+) = (\d+);.*\n", re.MULTILINE)


class Tracker:
    """tracking.js as it is served; all of it is made once."""

    def __init__(self, source: str) -> None:
        self._plain = small(source)
        self._gzipped = gzip.compress(self._plain, mtime=0)
        self._digest = hashlib.sha256(self._plain).hexdigest()[:16]
        integrity = base64.b64encode(hashlib.sha384(self._plain).digest()).decode()
        # Relative: the tracker may be reached under another path, behind a proxy.
        self._link = f'<tracking.{self._digest}.js>; rel="alternate"; integrity="sha384-{integrity}"'

    def serve(self) -> BaseResponse:
        """Answer GET /tracking.js, and say where the same is pinned."""
        answer = self._answer(f"public, max-age={_CACHE_SECONDS}")
        answer.headers["Link"] = self._link
        return self._unless_known(answer)

    def serve_pinned(self, digest: str) -> BaseResponse:
        """Answer GET /tracking.DIGEST.js, which is never anything else."""
        if digest != self._digest:
            abort(404)
        return self._unless_known(self._answer(f"public, max-age={_IMMUTABLE_SECONDS}, immutable"))

    def _answer(self, caching: str) -> Response:
        zipped = request.accept_encodings["gzip"] > 0
        answer = Response(self._gzipped if zipped else self._plain, mimetype="text/javascript")
        if zipped:
            answer.headers["Content-Encoding"] = "gzip"
        answer.headers["Cache-Control"] = caching
        # A browser compares the integrity only of what it may read: crossorigin="anonymous".
        answer.headers["Access-Control-Allow-Origin"] = "*"
        answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        answer.vary.add("Accept-Encoding")
        # Two representations, two tags.
        answer.set_etag(f"{self._digest}-gz" if zipped else self._digest)
        return answer

    def _unless_known(self, answer: Response) -> BaseResponse:
        # By the tag alone: there is no date to compare with, and werkzeug fails on absurd ones (OverflowError).
        wanted = {name: request.environ.get(name, "") for name in ("REQUEST_METHOD", "HTTP_IF_NONE_MATCH")}
        return answer.make_conditional(wanted)


def small(source: str) -> bytes:
    """Return the script as it is sent.

    What the minifier leaves is done first: numbers go where their names stand, and `const` becomes `let`, which it
    joins to fewer statements.
    """
    # Go is in it, and Go starts threads when it is loaded. Here, because a process that forks must have none: of its
    # children, which find whatever those threads had locked locked for ever, one in many thousand would never start.
    import minify  # noqa: PLC0415

    for name, number in _NAMED_NUMBER.findall(source):
        source = re.sub(rf"\b{name}\b", number, _without_declaration(source, name))
    return bytes(minify.string("application/javascript", re.sub(r"\bconst ", "let ", source)), "utf-8")


def _without_declaration(source: str, name: str) -> str:
    return re.sub(rf"^ *const {name} = .*\n", "", source, count=1, flags=re.MULTILINE)
