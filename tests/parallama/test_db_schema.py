"""Migrations, and what is said about a database that cannot be used."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncEngine

from parallama import db
from parallama.config import Database
from parallama.db import accounts, schema
from parallama.db.tables import metadata
from parallama.errors import ParallamaError, SchemaError, Unavailable
from parallama.roles import Role
from tests.parallama.db_on_disk import NOW, on, settings


def use(
    at: Database, work: Callable[[AsyncEngine], Awaitable[object]] = accounts.list_users
) -> None:
    async def both() -> None:
        async with db.database(at) as engine:
            await work(engine)

    asyncio.run(both())


def add_anna(engine: AsyncEngine) -> Awaitable[object]:
    return accounts.create_user(engine, "anna", Role.USER, now=NOW)


def file_of(folder: Path) -> Path:
    return folder / "parallama.db"


def test_the_migrations_build_the_tables_of_the_code(tmp_path: Path) -> None:
    async def differences(engine: AsyncEngine) -> list[object]:
        async with engine.connect() as connection:
            return await connection.run_sync(
                lambda sync: compare_metadata(
                    MigrationContext.configure(sync, opts={"compare_server_default": True}),
                    metadata,
                )
            )

    assert on(tmp_path, differences) == []


def test_the_migrations_name_constraints_and_checks_as_the_code_does(tmp_path: Path) -> None:
    """Alembic does not compare checks, and a later migration must find constraints by name."""

    async def names(engine: AsyncEngine) -> tuple[set[str], set[str]]:
        async with engine.connect() as connection:
            rows = await connection.exec_driver_sql("SELECT sql FROM sqlite_master")
            migrated = " ".join(sql for (sql,) in rows if sql)
        wanted = {str(c.name) for table in metadata.tables.values() for c in table.constraints}
        return wanted, {name for name in wanted if f"CONSTRAINT {name} " in migrated}

    wanted, found = on(tmp_path, names)
    assert found == wanted


def test_the_revisions_in_the_code_are_those_of_the_migrations() -> None:
    scripts = ScriptDirectory.from_config(schema.alembic_settings())
    in_order = [script.revision for script in scripts.walk_revisions()][::-1]
    assert tuple(in_order) == schema.REVISIONS
    assert scripts.get_current_head() == schema.HEAD


def test_upgrade_says_what_it_did_and_is_harmless_when_repeated(tmp_path: Path) -> None:
    assert asyncio.run(db.upgrade(settings(tmp_path))) == (None, schema.HEAD)
    assert asyncio.run(db.upgrade(settings(tmp_path))) == (schema.HEAD, schema.HEAD)
    use(settings(tmp_path))


def test_two_upgrades_at_once_both_succeed(tmp_path: Path) -> None:
    async def twice() -> list[tuple[str | None, str]]:
        return await asyncio.gather(*(db.upgrade(settings(tmp_path)) for _ in range(2)))

    assert {before for before, _ in asyncio.run(twice())} == {None, schema.HEAD}


def test_a_failed_upgrade_leaves_nothing_behind(tmp_path: Path) -> None:
    """A table of ours that is there already stops the migration somewhere in its middle."""
    with closing(sqlite3.connect(file_of(tmp_path))) as other, other:
        other.execute("CREATE TABLE model_mappings (x)")
    with pytest.raises(Unavailable, match="model_mappings already exists"):
        asyncio.run(db.upgrade(settings(tmp_path)))
    with closing(sqlite3.connect(file_of(tmp_path))) as other:
        tables = other.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    assert tables == [("model_mappings",)]


def test_the_file_is_private(tmp_path: Path) -> None:
    asyncio.run(db.upgrade(settings(tmp_path)))
    assert file_of(tmp_path).stat().st_mode & 0o777 == 0o600


def test_a_folder_with_special_characters_works(tmp_path: Path) -> None:
    odd = tmp_path / "a b?c#d%20é"
    odd.mkdir()
    use_after_upgrade = on(odd, accounts.list_users)
    assert use_after_upgrade == []
    assert file_of(odd).exists()


def test_without_a_file_the_command_to_make_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="`parallama db upgrade`"):
        use(settings(tmp_path))
    assert not file_of(tmp_path).exists()


def test_a_file_without_tables_is_told_apart(tmp_path: Path) -> None:
    file_of(tmp_path).touch()
    with pytest.raises(SchemaError, match="no tables yet: run `parallama db upgrade`"):
        use(settings(tmp_path))


def test_an_older_schema_names_the_command(tmp_path: Path) -> None:
    set_revision(tmp_path, "0000")
    with pytest.raises(SchemaError, match="0000"):
        use(settings(tmp_path))


@pytest.mark.parametrize("upgrading", [False, True])
def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path, upgrading: bool) -> None:
    set_revision(tmp_path, "9999")
    with pytest.raises(SchemaError, match="made by a newer one"):
        asyncio.run(db.upgrade(settings(tmp_path))) if upgrading else use(settings(tmp_path))


def test_postgresql_is_named_as_coming_later() -> None:
    at = Database.model_validate({"host": "db", "name": "parallama", "user": "parallama"})
    with pytest.raises(ParallamaError, match="PostgreSQL is served by a later version"):
        use(at)


@pytest.mark.parametrize("create", [False, True])
def test_a_missing_folder_is_named(tmp_path: Path, create: bool) -> None:
    at = settings(tmp_path / "missing")
    with pytest.raises(ParallamaError, match=r"missing, .* is not a folder: create it"):
        db.open_database(at, create=create)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ParallamaError, match="is not a folder"):
        asyncio.run(db.upgrade(settings(tmp_path / "file")))


def test_a_folder_where_the_file_should_be_is_named(tmp_path: Path) -> None:
    file_of(tmp_path).mkdir()
    with pytest.raises(ParallamaError, match=r"is a folder: set database\.path"):
        asyncio.run(db.upgrade(settings(tmp_path)))


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    file_of(tmp_path).write_text("key: value\n" * 100)
    with pytest.raises(Unavailable, match=r"is not a SQLite database: set database\.path"):
        use(settings(tmp_path))


def test_a_read_only_database_says_so(tmp_path: Path) -> None:
    asyncio.run(db.upgrade(settings(tmp_path)))
    make_read_only(file_of(tmp_path))
    with pytest.raises(Unavailable, match="is read-only: let this user write"):
        use(settings(tmp_path), add_anna)


def test_a_full_disk_says_so_and_keeps_what_was_there(tmp_path: Path) -> None:
    async def until_full(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:  # the pool hands out this connection again
            await connection.exec_driver_sql("PRAGMA max_page_count = 1")
        for number in range(2000):
            await accounts.create_user(engine, f"{number:0200}", Role.USER, now=NOW)

    asyncio.run(db.upgrade(settings(tmp_path)))
    with pytest.raises(Unavailable, match="no space is left"):
        use(settings(tmp_path), until_full)
    use(settings(tmp_path), add_anna)


def test_a_database_locked_by_another_process_says_so(tmp_path: Path) -> None:
    asyncio.run(db.upgrade(settings(tmp_path)))
    with closing(sqlite3.connect(file_of(tmp_path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        use(settings(tmp_path, timeout_seconds=0.01))  # readers do not mind
        with pytest.raises(Unavailable, match=r"is busy: .* database.timeout_seconds"):
            use(settings(tmp_path, timeout_seconds=0.01), add_anna)


def test_too_many_at_once_are_told_to_wait(tmp_path: Path) -> None:
    async def hold_all(engine: AsyncEngine) -> None:
        async with engine.connect(), engine.connect():
            await accounts.list_users(engine)

    asyncio.run(db.upgrade(settings(tmp_path)))
    with pytest.raises(Unavailable, match=r"all connections .* are in use"):
        use(settings(tmp_path, timeout_seconds=0.01), hold_all)


def test_a_folder_that_may_not_be_entered_says_so(tmp_path: Path) -> None:
    """Root may enter every folder, so a link to itself stands for one."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ParallamaError, match="is not a folder"):
        use(settings(tmp_path / "loop"))


def test_errors_hold_no_values(tmp_path: Path) -> None:
    asyncio.run(db.upgrade(settings(tmp_path)))
    with closing(sqlite3.connect(file_of(tmp_path))) as other, other:
        other.execute("DROP TABLE users")
    with pytest.raises(SchemaError, match="no such table") as raised:
        use(settings(tmp_path), add_anna)
    assert "anna" not in f"{raised.value} {raised.value.__cause__}"


def test_what_was_committed_outlives_power_cuts(tmp_path: Path) -> None:
    async def pragmas(engine: AsyncEngine) -> list[object]:
        async with engine.connect() as connection:
            return [
                (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]

    assert on(tmp_path, pragmas) == ["wal", 2, 1]


def set_revision(folder: Path, revision: str) -> None:
    asyncio.run(db.upgrade(settings(folder)))
    with closing(sqlite3.connect(file_of(folder))) as other, other:
        other.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def make_read_only(file: Path) -> None:
    """By SQLite's own mark, a write version from the future: file modes do not stop root."""
    with file.open("r+b") as database:
        database.seek(18)
        database.write(b"\x03")
