"""Files that stand at the top of the repository and travel inside the wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def read_resource(name: str) -> str:
    """Return the text of `schema.sql`, `tracking.js` or `config.example.toml`, from a wheel or from a checkout."""
    shipped = _PACKAGE / "_files" / name
    path = shipped if shipped.is_file() else _PACKAGE.parent / name
    return path.read_text(encoding="utf-8")
