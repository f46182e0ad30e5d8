"""Who may look in: the password through a login form, or the token of a script. And who may change anything."""

import hmac
import logging
import secrets
import threading
from pathlib import Path
from typing import cast

from flask import current_app, request, session

from appliance.admin.guesses import Guesses
from appliance.admin.passwords import is_hash, matches, same
from appliance.config import Admin
from appliance.errors import StartError

log = logging.getLogger(__name__)

_KEY_BYTES = 32
_BUSY_SECONDS = 1
# The one whose password is being checked, and those who wait for it: each holds a thread, of which there are few.
_MOST_LOGGING_IN = 3
CSRF_FIELD = "csrf"


class Auth:
    """Checks password, session, token, and whether a form is ours."""

    def __init__(self, admin: Admin, data_dir: Path) -> None:
        self._password = admin.password.get_secret_value()
        self._token = admin.token.get_secret_value()
        self._key_file = _key_file(data_dir)
        self._guesses = Guesses()
        self._logging_in = threading.BoundedSemaphore(_MOST_LOGGING_IN)
        self._checking = threading.Lock()

    @property
    def has_password(self) -> bool:
        """Whether the login form leads anywhere."""
        return bool(self._password)

    def allowed(self) -> bool:
        """Return whether this request may see data."""
        return self.has_session() or self._has_token()

    def may_change(self) -> bool:
        """Return whether this request may change anything.

        A browser sends its cookie along with forms of other pages too, so a session alone is not enough: the form must
        hold what only our own pages know. A token is sent by nobody who does not mean to.
        """
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
            return False
        own_form = self.has_session() and same(request.form.get(CSRF_FIELD, ""), self.csrf_token())
        return own_form or self._has_token()

    def csrf_token(self) -> str:
        """Return what the forms of this session hold."""
        return hmac.digest(_key(), f"form {session.get('nonce', '')}".encode(), "sha256").hex()

    def guess_wait_seconds(self, client: str) -> int:
        """Count a guess of this client and return 0, or return after how many seconds the next may come."""
        return self._guesses.allow(client)

    def log_in(self, password: str, client: str) -> bool | None:
        """Open a session if the password is right; None while others are being checked. Count the guess first."""
        right = self._is_password(password)
        if right:
            self._guesses.forgive(client)
            session.clear()
            session.permanent = True
            session["nonce"] = secrets.token_hex(16)
            session["admin"] = self._fingerprint()
        return right

    def log_out(self) -> None:
        """End every session there is: a cookie that was copied somewhere must not outlive this one."""
        current_app.secret_key = secrets.token_bytes(_KEY_BYTES)
        try:
            _write_key(self._key_file, current_app.secret_key)
        except OSError as error:
            why = error.strerror
            log.warning("%s cannot be written (%s): a restart may bring ended sessions back", self._key_file, why)
        session.clear()

    def has_session(self) -> bool:
        """Return whether the request brings a session that this password has opened."""
        return bool(self._password) and same(str(session.get("admin", "")), self._fingerprint())

    def _is_password(self, given: str) -> bool | None:
        if not self._password:
            return False
        if not is_hash(self._password):
            return matches(given, self._password)
        # A hash takes a tenth of a second and 32 MB on purpose: strangers must not have many made at once.
        if not self._logging_in.acquire(blocking=False):
            return None
        try:
            return self._checked_alone(given)
        finally:
            self._logging_in.release()

    def _checked_alone(self, given: str) -> bool | None:
        if not self._checking.acquire(timeout=_BUSY_SECONDS):
            return None
        try:
            return matches(given, self._password)
        finally:
            self._checking.release()

    def _has_token(self) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return bool(self._token) and scheme.lower() == "bearer" and same(token.strip(), self._token)

    def _fingerprint(self) -> str:
        """Sessions end when the password changes."""
        return hmac.digest(_key(), self._password.encode(), "sha256").hex()


def session_key(data_dir: Path) -> bytes:
    """Return the key that signs sessions; it is made once and kept, so that a restart logs nobody out."""
    path = _key_file(data_dir)
    try:
        key = path.read_bytes() if path.exists() else b""
        # A start that was cut off may have left less of it.
        if len(key) != _KEY_BYTES:
            key = secrets.token_bytes(_KEY_BYTES)
            _write_key(path, key)
    except OSError as error:
        raise StartError(f"{path} cannot be read or written: {error.strerror}") from error
    return key


def _key() -> bytes:
    return cast("bytes", current_app.secret_key)


def _key_file(data_dir: Path) -> Path:
    return data_dir / "session.key"


def _write_key(path: Path, key: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key)
