"""The database: users, keys, limits and what was used. Every query lives in this package."""

from parallama.db.engine import open_database
from parallama.db.schema import HEAD, check_schema, current_revision, database, upgrade

__all__ = ["HEAD", "check_schema", "current_revision", "database", "open_database", "upgrade"]
