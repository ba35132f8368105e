"""Which schemas this version knows (pure): to check one, nobody has to load Alembic."""

from parallama.errors import SchemaError

REVISIONS = ("0001", "0002", "0003", "0004")
HEAD = REVISIONS[-1]


def check(revision: str | None, where: str) -> None:
    """Raises SchemaError unless the tables are those of this version."""
    if revision == HEAD:
        return
    refuse_unknown(revision, where)
    state = "has no tables yet" if revision is None else f"is at revision {revision}, not {HEAD}"
    raise SchemaError(f"the database {where} {state}: run `parallama db upgrade`")


def refuse_unknown(revision: str | None, where: str) -> None:
    if revision is not None and revision not in REVISIONS:
        raise SchemaError(
            f"the database {where} is at revision {revision}, which this version does not know: "
            "it was made by a newer one; install that, or restore a backup"
        )
