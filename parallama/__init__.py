"""Keys, quotas and honest usage for a shared language-model server."""

__version__ = "0.1.0"
