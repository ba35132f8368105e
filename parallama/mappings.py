"""
Model mappings: names that clients may use, and the models that they mean (pure).

Each gateway has a table of them, one step and no more: what a name means is no name of the table
itself. Names are found as Ollama finds models: without ASCII case, and with `:latest` where no tag
is named.
"""

from collections.abc import Mapping
from functools import lru_cache

from parallama.errors import UsageError

MOST = 200
"""On one gateway. All of them travel with each request (docs/decisions/0023)."""

LONGEST_NAME = 256
"""In bytes. facts.lua refuses longer ones of clients."""

Table = Mapping[str, str]
"""What is meant, by the name that clients use."""

_LATEST = b":latest"


@lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """The one spelling for all under which a mapping is found."""
    raw = name.encode(errors="surrogatepass").lower()
    return raw.removesuffix(_LATEST).decode(errors="surrogatepass")


def check_name(name: str) -> str:
    """Of a model, on either side. Raises UsageError, which does not repeat what cannot be shown."""
    if not name or not name.isprintable() or name != name.strip():
        raise UsageError(
            "a model's name has visible characters only, and at least one, with no space around it"
        )
    size = len(name.encode(errors="replace"))
    if size > LONGEST_NAME:
        raise UsageError(f"a model's name has at most {LONGEST_NAME} bytes, not {size}")
    if "*" in name:
        raise UsageError(f"a mapping is of one name to one model, without *: {name!r}")
    if not plain(name):
        raise UsageError(f"a model has a name before its tag: {name!r}")
    return name


def wrong_with(table: Table, name: str, target: str, default: str | None = None) -> str | None:
    """
    Why `name` of this gateway cannot mean `target`: a sentence without its subject, and without any
    model's name. `table` may hold this mapping already. `default` is the model of those who name
    none.
    """
    own = plain(name)
    meant = {plain(each): plain(model) for each, model in table.items() if plain(each) != own}
    if plain(target) == own:
        return (
            "means itself: write another model, or leave it out, for a name that is not mapped "
            "means itself anyway"
        )
    further = meant.get(plain(target))
    if further == own:
        return "goes in a circle: remove one of the two, or write the model that is served"
    if further is not None:
        return (
            "means a name that is itself mapped, and a mapping is one step: write the model that "
            "that one means"
        )
    if default is not None and plain(default) == own:
        return (
            "is what default_model means, and a mapping is one step: let default_model name the "
            "model, and first"
        )
    if len(meant) >= MOST:
        return (
            f"is one too many, for a gateway has at most {MOST} mappings: remove what nobody uses"
        )
    return None


def in_the_way(table: Table, name: str) -> str | None:
    """The name that means `name`, so that this cannot be mapped any further."""
    return next((each for each, model in table.items() if plain(model) == plain(name)), None)


def merged(configured: Table, stored: Table) -> dict[str, str]:
    """By plain name. What the database says of a name counts before what the configuration says."""
    return {plain(name): model for each in (configured, stored) for name, model in each.items()}


def target_of(table: Table, name: str) -> str | None:
    """What a client who says `name` means; None where that is not mapped. `table` is merged."""
    return table.get(plain(name))


def aliases(table: Table, default: str | None = None) -> str:
    """
    A merged table as facts.lua reads it: "\\n", name, "\\t", model, and so on, "\\n" at the end.
    The empty name is that of those who name none. Empty where nothing is mapped.
    """
    every = {**({"": default} if default else {}), **table}
    lines = "".join(f"\n{name}\t{model}" for name, model in sorted(every.items()))
    return lines and lines + "\n"
