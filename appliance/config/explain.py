"""The configuration as it was understood: every option with its value and where that comes from. Never a secret."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, SecretStr

from appliance.config.problems import variable_of
from appliance.config.sections import Site
from appliance.config.settings import Settings

Source: TypeAlias = Literal["default", "file", "environment"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `value` is what would be written for it; of a secret only whether there is one."""

    name: str
    value: str
    source: Source


@dataclass(frozen=True, slots=True)
class Section:
    """One table of config.toml."""

    name: str
    options: tuple[Option, ...]


def explain(settings: Settings) -> list[Section]:
    """Return every section with its options."""
    return [Section(_heading(loc, section), tuple(_options(section, loc))) for loc, section in _sections(settings)]


def _heading(loc: list[str], section: BaseModel) -> str:
    """Return the line that begins the table in config.toml; sites have no names there but their ids."""
    return f"[[sites]] {section.id}" if isinstance(section, Site) else f"[{'.'.join(loc)}]"


def _sections(settings: Settings) -> Iterator[tuple[list[str], BaseModel]]:
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield [name], value
        elif isinstance(value, dict):
            yield from (([name, key], section) for key, section in value.items())
        else:
            yield from (([name, str(index)], section) for index, section in enumerate(value))


def _options(section: BaseModel, loc: list[str]) -> Iterator[Option]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        yield Option(name, _written(value), _source(section, name, [*loc, name]))


def _source(section: BaseModel, name: str, loc: list[str]) -> Source:
    """Return where a value was written."""
    if name not in section.model_fields_set:
        return "default"
    return "environment" if variable_of(loc, missing=False) else "file"


def _written(value: Any) -> str:
    if isinstance(value, SecretStr):
        return "set, not shown" if value.get_secret_value() else "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(_written(one) for one in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_written(one)}" for key, one in value.items()) or "none"
    return str(value) if value != "" else "not set"
