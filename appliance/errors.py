"""The errors that users meet: each message says what happened and what to do about it.

Code raises; `cli.py` (for commands), the worker's routes and the scheduler are the boundaries that report once.
"""

from collections.abc import Sequence


class ApplianceError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code = 1


class ConfigError(ApplianceError):
    """The configuration is wrong; carries every problem that was found, one line each."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class StartError(ApplianceError):
    """The appliance cannot start here: a port is taken, a directory is not writable, a lock is held."""


class DatabaseUnavailableError(ApplianceError):
    """The database cannot be reached just now; trying again later is right."""


class StatementFailedError(DatabaseUnavailableError):
    """The database answers and did not do this, for a reason that blames no row; it may well do other things."""


class SchemaError(ApplianceError):
    """The database holds a schema, or is a PostgreSQL, that this version cannot work with."""


class BackupError(ApplianceError):
    """The database cannot be written to, or filled from, this file."""


class ManifestError(ApplianceError):
    """What stands where a manifest should stand is none, or not one that this version reads."""


class RestoreError(ApplianceError):
    """A bucket's events cannot be brought back into this database as they are."""


class BatchChangedError(ApplianceError):
    """The rows of a sealed batch are no longer those that were sealed."""


class BucketError(ApplianceError):
    """A bucket did not do what was asked; the delivery stays pending and is tried again."""


class ForeignObjectError(BucketError):
    """A key that this batch needs already holds other bytes, which are never written over."""


class BucketAheadError(BucketError):
    """The bucket holds a batch that the ledger does not know as written: history must not be written over."""
