"""Errors, sorted by who must act."""

from collections.abc import Iterator


class ParallamaError(Exception):
    """Something an operator can fix. The message says what to do."""


class ConfigError(ParallamaError):
    """The configuration cannot be used. `parallama config check` lists every mistake."""


class UsageError(ParallamaError):
    """A command asked for something that does not make sense."""


class NotFound(ParallamaError):
    """A user, key or limit that was named does not exist."""


class Conflict(ParallamaError):
    """What should be made exists already."""


class Stale(ParallamaError):
    """What should be changed is not what it was when the caller looked."""


class SchemaError(ParallamaError):
    """The database's schema is not the one that this version works with."""


class Unavailable(ParallamaError):
    """A store did not answer in time. Policy decides what the caller sees."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside an exception group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
