"""All sections together, from the file and the environment."""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from appliance.config.rules import as_init_error, place_of, reference_problems, with_default_job, with_kinds
from appliance.config.sections import (
    Admin,
    Alerts,
    Bucket,
    Collect,
    DatabaseSettings,
    Export,
    Health,
    Retention,
    Server,
    Site,
)
from appliance.config.values import ALL_SITES, DatabaseUrl, Name

if TYPE_CHECKING:
    from pydantic_core import InitErrorDetails

ENV_PREFIX = "APPLIANCE_"


class _Environment(EnvSettingsSource):
    """The environment; a value that should be JSON and is not goes on as it is, to be refused under its name."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class _Database(DatabaseSettings):
    """The section with a URL that PostgreSQL's library can read."""

    url: DatabaseUrl = SecretStr("")


class Settings(BaseSettings):
    """All that can be configured. Read it with `load`; it never changes afterwards."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, case_sensitive=False
    )

    server: Server = Server()
    database: _Database = _Database()
    admin: Admin = Admin()
    collect: Collect = Collect()
    sites: tuple[Site, ...] = ()
    buckets: dict[Name, Bucket] = {}
    exports: dict[Name, Export] = {}
    retention: Retention = Retention()
    health: Health = Health()
    alerts: Alerts = Alerts()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment override the file, and nothing else speak."""
        return _Environment(settings_cls), init_settings

    @model_validator(mode="wrap")
    @classmethod
    def _check_references(cls, values: dict[str, Any], handler: Callable[[Any], "Settings"]) -> "Settings":
        """Check what sections say of each other even where a section itself is wrong: all errors come at once."""
        values = with_default_job(values)
        problems: list[InitErrorDetails] = list(reference_problems(values))
        try:
            settings = handler(with_kinds(values))
        except ValidationError as error:
            problems += [as_init_error(details) for details in error.errors(include_url=False)]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return settings

    def site(self, site_id: str) -> Site | None:
        """Return the configured site of that id."""
        return next((site for site in self.sites if site.id == site_id), None)

    def unexported_sites(self) -> list[str]:
        """Return the ids of configured sites that no export has."""
        exported = {site for export in self.exports.values() for site in export.sites}
        return [site.id for site in self.sites if not exported & {site.id, ALL_SITES}]

    def doubled(self) -> list[tuple[str, str, str]]:
        """Return two jobs and a bucket of the second, for each place to which both export some site."""
        found = []
        for (one, first), (other, second) in combinations(self.exports.items(), 2):
            if ALL_SITES not in (*first.sites, *second.sites) and set(first.sites).isdisjoint(second.sites):
                continue
            places = [self._place(bucket) for bucket in first.bucket_names]
            found += [(one, other, bucket) for bucket in second.bucket_names if self._place(bucket) in places]
        return found

    def _place(self, bucket: str) -> tuple[str, ...] | None:
        return place_of(self.buckets[bucket].model_dump())

    def secret_values(self) -> tuple[str, ...]:
        """Every secret in plain text, for redaction only."""
        return tuple(secret.get_secret_value() for secret in _secrets_of(self) if secret.get_secret_value())


def _secrets_of(section: BaseModel) -> Iterator[SecretStr]:
    for value in (getattr(section, name) for name in type(section).model_fields):
        for item in _items_of(value):
            if isinstance(item, SecretStr):
                yield item
            elif isinstance(item, BaseModel):
                yield from _secrets_of(item)


def _items_of(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, tuple) else [value]
