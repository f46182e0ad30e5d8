"""Who may look in: the password through a login form, or the token of a script."""

import hmac
import logging
import secrets
from pathlib import Path
from typing import cast

from flask import current_app, request, session

from appliance.admin.guesses import Guesses
from appliance.config import Admin
from appliance.errors import StartError

log = logging.getLogger(__name__)

_KEY_BYTES = 32


class Auth:
    """Checks password, session and token."""

    def __init__(self, admin: Admin, data_dir: Path) -> None:
        self._password = admin.password.get_secret_value()
        self._token = admin.token.get_secret_value()
        self._key_file = _key_file(data_dir)
        self._guesses = Guesses()

    @property
    def has_password(self) -> bool:
        """Whether the login form leads anywhere."""
        return bool(self._password)

    def allowed(self) -> bool:
        """Return whether this request may see data."""
        return self._has_session() or self._has_token()

    def may_guess(self, client: str) -> bool:
        """Count a guess of this client; False when there were too many in the last minute."""
        return self._guesses.allow(client)

    def log_in(self, password: str, client: str) -> bool:
        """Open a session if the password is right. Ask `may_guess` first."""
        if not self._password or not _same(password, self._password):
            return False
        self._guesses.forgive(client)
        session.clear()
        session.permanent = True
        session["admin"] = self._fingerprint()
        return True

    def log_out(self) -> None:
        """End every session there is: a cookie that was copied somewhere must not outlive this one."""
        # Strangers can ask for this too, and end nothing.
        if self._has_session():
            current_app.secret_key = secrets.token_bytes(_KEY_BYTES)
            try:
                _write_key(self._key_file, current_app.secret_key)
            except OSError as error:
                why = error.strerror
                log.warning("%s cannot be written (%s): a restart may bring ended sessions back", self._key_file, why)
        session.clear()

    def _has_session(self) -> bool:
        return bool(self._password) and _same(str(session.get("admin", "")), self._fingerprint())

    def _has_token(self) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return bool(self._token) and scheme.lower() == "bearer" and _same(token.strip(), self._token)

    def _fingerprint(self) -> str:
        """Sessions end when the password changes."""
        return hmac.digest(cast("bytes", current_app.secret_key), self._password.encode(), "sha256").hex()


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


def _key_file(data_dir: Path) -> Path:
    return data_dir / "session.key"


def _write_key(path: Path, key: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key)


def _same(given: str, right: str) -> bool:
    """Compare without telling by the time it takes how much of it was right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), right.encode())
