"""The session's cookie: signed by Flask, and marked Secure where the browser speaks TLS."""

from collections.abc import Mapping
from typing import Any

from flask import Flask, request
from flask.sessions import SecureCookieSessionInterface


def over_tls(environ: Mapping[str, Any]) -> bool:
    """Return whether the browser speaks TLS, to us or to the proxy in front.

    What a proxy says of that counts from anyone: who makes it up hardens his own cookie and nobody else's.
    """
    forwarded = str(environ.get("HTTP_FORWARDED", "")).lower().replace('"', "")
    said = str(environ.get("HTTP_X_FORWARDED_PROTO", "")).lower().split(",")[0].strip()
    return environ["wsgi.url_scheme"] == "https" or said == "https" or "proto=https" in forwarded


class Sessions(SecureCookieSessionInterface):
    """Sessions whose cookie never crosses an open line that came by a closed one."""

    def get_cookie_secure(self, app: Flask) -> bool:
        """Whether the cookie may travel over TLS only."""
        return over_tls(request.environ) or super().get_cookie_secure(app)
