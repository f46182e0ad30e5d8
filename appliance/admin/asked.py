"""What a request for an admin page asks for, made safe for the database."""

from flask import request

_DIGITS_OF_A_BIGINT = 18


def clean(text: str) -> str:
    """PostgreSQL's text has no NUL."""
    return text.replace("\x00", "")


def row_id(text: str) -> int | None:
    """Return the id of a row; None where the text is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS_OF_A_BIGINT else None


def below() -> int | None:
    """Return the number before which a list goes on; None at its beginning."""
    return row_id(request.args.get("below", ""))
