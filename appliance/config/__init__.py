"""config.toml and the environment -> frozen settings. The only reader of os.environ.

Every problem is found in one go and reported where the user wrote it: `config.toml: exports.acme.schedule: why`.
"""

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from appliance.config.problems import describe, unknown_variable
from appliance.config.sections import Admin, Alerts, Bucket, DirectoryBucket, Export, Health, S3Bucket, Site
from appliance.config.settings import ENV_PREFIX, Settings
from appliance.config.values import ALL_SITES, PASSWORD_HASH, SITE_ID_PATTERN
from appliance.errors import ConfigError

__all__ = [
    "ALL_SITES",
    "DEMO_SITE",
    "PASSWORD_HASH",
    "SITE_ID_PATTERN",
    "Admin",
    "Alerts",
    "Bucket",
    "DirectoryBucket",
    "Export",
    "Health",
    "S3Bucket",
    "Settings",
    "Site",
    "exposed_secrets",
    "load",
]

DEFAULT_FILE = "config.toml"
# What the demo page sends as; taken in whatever sites are configured while server.demo is on.
DEMO_SITE = "demo"


def load(file: Path | None = None) -> Settings:
    """Read the configuration file (default: config.toml where it stands) and the environment.

    Raises ConfigError with every problem found.
    """
    path = file or Path(DEFAULT_FILE)
    document = _read_toml(path, required=file is not None)
    problems = _unknown_variables()
    try:
        settings = Settings(**document)
    except ValidationError as error:
        problems += [describe(details, path.name) for details in error.errors(include_url=False)]
    if problems:
        raise ConfigError(problems)
    return settings


def exposed_secrets(settings: Settings, file: Path | None = None) -> list[str]:
    """Return a warning when the file holds secrets, and users who do not run the appliance can read it."""
    path = file or Path(DEFAULT_FILE)
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except OSError:
        return []
    if not mode & stat.S_IROTH or not any(secret in text for secret in settings.secret_values()):
        return []
    advice = (
        f"give it to the user who runs the appliance (10001 in its image) and let nobody else read it: chmod 600 {path}"
    )
    return [f"{path.name} holds secrets, and every user of this machine can read it: {advice}"]


def _read_toml(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if required:
            raise ConfigError([f"{path}: there is no such file"]) from None
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path.name}: not a TOML file: {error}"]) from error
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    # Settings(**document) must not take a key of the file for one of pydantic-settings' own arguments.
    private = [key for key in document if key.startswith("_")]
    if private:
        raise ConfigError([f"{path.name}: {key}: there is no such option" for key in private])
    return document


def _unknown_variables() -> list[str]:
    names = [name for name in sorted(os.environ) if name.upper().startswith(ENV_PREFIX)]
    return [unknown_variable(name) for name in names if _section_of(name) not in Settings.model_fields]


def _section_of(variable: str) -> str:
    return variable[len(ENV_PREFIX) :].lower().partition("__")[0]
