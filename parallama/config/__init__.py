"""One frozen tree of settings, from a YAML file, the environment and secret files."""

from parallama.config.authentication import Authentication, Issuer, JwtAlgorithm
from parallama.config.loading import load
from parallama.config.processes import Cors, Logging
from parallama.config.stores import Database, Redis
from parallama.config.telling import document, settings, warnings
from parallama.config.tree import Config

__all__ = [
    "Authentication",
    "Config",
    "Cors",
    "Database",
    "Issuer",
    "JwtAlgorithm",
    "Logging",
    "Redis",
    "document",
    "load",
    "settings",
    "warnings",
]
