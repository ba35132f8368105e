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

from parallama.config import Database
from parallama.db import Store, database, revisions
from parallama.db.accounts import find_key
from parallama.db.ledger import add
from parallama.db.manage import people, schema
from parallama.db.manage.engine import open_database
from parallama.db.manage.schema import managed, upgrade
from parallama.db.manage.tables import metadata
from parallama.errors import ParallamaError, SchemaError, Unavailable
from parallama.roles import Role
from tests.parallama.db_on_disk import Opened, a_desk, a_record, on, settings
from tests.postgres import Postgres

Use = Callable[[Database], None]


def manage(at: Database, work: Callable[[AsyncEngine], Awaitable[object]]) -> None:
    async def both() -> None:
        async with managed(at) as engine:
            await work(engine)

    asyncio.run(both())


def serve(at: Database, work: Callable[[Store], Awaitable[object]]) -> None:
    async def both() -> None:
        async with database(at) as store:
            await work(store)

    asyncio.run(both())


def people_read(at: Database) -> None:
    manage(at, people.list_users)


def services_read(at: Database) -> None:
    serve(at, lambda store: find_key(store, "000000000000"))


def people_write(at: Database) -> None:
    manage(at, lambda engine: people.create_user(a_desk(engine), "anna", Role.USER))


def services_write(at: Database) -> None:
    serve(at, lambda store: add(store, [a_record(username="anna")]))


readers = pytest.mark.parametrize("read", [people_read, services_read])
writers = pytest.mark.parametrize("write", [people_write, services_write])


def file_of(folder: Path) -> Path:
    return folder / "parallama.db"


def test_the_migrations_build_the_tables_of_the_code(db: Database) -> None:
    async def differences(at: Opened) -> list[object]:
        async with at.engine.connect() as connection:
            return await connection.run_sync(
                lambda sync: compare_metadata(
                    MigrationContext.configure(
                        sync,
                        opts={"compare_server_default": True, "include_object": not_partitioned},
                    ),
                    metadata,
                )
            )

    assert on(db, differences) == []


def not_partitioned(
    _: object, name: str | None, kind: str, reflected: bool, other: object | None
) -> bool:
    """Without what PostgreSQL alone has: the months of the usage table, and time in its keys."""
    months = kind == "table" and reflected and other is None
    return not months and not str(name).startswith("uq_gateway_usage_logs_")


def test_the_migrations_name_constraints_and_checks_as_the_code_does(tmp_path: Path) -> None:
    """Alembic does not compare checks, and a later migration must find constraints by name."""

    async def names(at: Opened) -> set[str]:
        async with at.engine.connect() as connection:
            rows = await connection.exec_driver_sql("SELECT sql FROM sqlite_master")
            migrated = " ".join(sql for (sql,) in rows if sql)
        return {name for name in constraints() if f"CONSTRAINT {name} " in migrated}

    assert on(tmp_path, names) == constraints()


def test_postgresql_names_them_the_same(postgres: Postgres) -> None:
    found = {
        name
        for (name,) in postgres.run("SELECT conname FROM pg_constraint", database=new(postgres))
    }
    by_month = {"uq_gateway_usage_logs_request_id"}
    assert constraints() - found == by_month
    assert "uq_gateway_usage_logs_request_id_timestamp" in found


def constraints() -> set[str]:
    return {str(c.name) for table in metadata.tables.values() for c in table.constraints}


def new(postgres: Postgres) -> str:
    return str(postgres.migrated().name)


def test_the_revisions_in_the_code_are_those_of_the_migrations() -> None:
    scripts = ScriptDirectory.from_config(schema.alembic_settings())
    in_order = [script.revision for script in scripts.walk_revisions()][::-1]
    assert tuple(in_order) == revisions.REVISIONS
    assert scripts.get_current_head() == revisions.HEAD


def test_upgrade_says_what_it_did_and_is_harmless_when_repeated(tmp_path: Path) -> None:
    assert asyncio.run(upgrade(settings(tmp_path))) == (None, revisions.HEAD)
    assert asyncio.run(upgrade(settings(tmp_path))) == (revisions.HEAD, revisions.HEAD)
    services_read(settings(tmp_path))


def test_two_upgrades_at_once_both_succeed(tmp_path: Path) -> None:
    async def twice() -> list[tuple[str | None, str]]:
        return await asyncio.gather(*(upgrade(settings(tmp_path)) for _ in range(2)))

    assert {before for before, _ in asyncio.run(twice())} == {None, revisions.HEAD}


def test_a_failed_upgrade_leaves_nothing_behind(tmp_path: Path) -> None:
    """A table of ours that is there already stops the migration somewhere in its middle."""
    with closing(sqlite3.connect(file_of(tmp_path))) as other, other:
        other.execute("CREATE TABLE model_mappings (x)")
    with pytest.raises(Unavailable, match="model_mappings already exists"):
        asyncio.run(upgrade(settings(tmp_path)))
    with closing(sqlite3.connect(file_of(tmp_path))) as other:
        tables = other.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    assert tables == [("model_mappings",)]


def test_the_file_is_private(tmp_path: Path) -> None:
    asyncio.run(upgrade(settings(tmp_path)))
    assert file_of(tmp_path).stat().st_mode & 0o777 == 0o600


def test_a_folder_with_special_characters_works(tmp_path: Path) -> None:
    odd = tmp_path / "a b?c#d%20é"
    odd.mkdir()
    asyncio.run(upgrade(settings(odd)))
    people_write(settings(odd))
    services_write(settings(odd))
    assert file_of(odd).exists()


@readers
def test_without_a_file_the_command_to_make_one_is_named(tmp_path: Path, read: Use) -> None:
    with pytest.raises(SchemaError, match="`parallama db upgrade`"):
        read(settings(tmp_path))
    assert not file_of(tmp_path).exists()


@readers
def test_a_file_without_tables_is_told_apart(tmp_path: Path, read: Use) -> None:
    file_of(tmp_path).touch()
    with pytest.raises(SchemaError, match="no tables yet: run `parallama db upgrade`"):
        read(settings(tmp_path))


@readers
def test_an_older_schema_names_the_command(tmp_path: Path, read: Use) -> None:
    set_revision(tmp_path, "0000")
    with pytest.raises(SchemaError, match="0000"):
        read(settings(tmp_path))


@pytest.mark.parametrize("use", [people_read, services_read, lambda at: asyncio.run(upgrade(at))])
def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path, use: Use) -> None:
    set_revision(tmp_path, "9999")
    with pytest.raises(SchemaError, match="made by a newer one"):
        use(settings(tmp_path))


@pytest.mark.parametrize("create", [False, True])
def test_a_missing_folder_is_named(tmp_path: Path, create: bool) -> None:
    at = settings(tmp_path / "missing")
    with pytest.raises(ParallamaError, match=r"missing, .* is not a folder: create it"):
        open_database(at, create=create)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ParallamaError, match="is not a folder"):
        asyncio.run(upgrade(settings(tmp_path / "file")))


def test_a_folder_where_the_file_should_be_is_named(tmp_path: Path) -> None:
    file_of(tmp_path).mkdir()
    with pytest.raises(ParallamaError, match=r"is a folder: set database\.path"):
        asyncio.run(upgrade(settings(tmp_path)))


@readers
def test_a_file_that_is_no_database_is_named(tmp_path: Path, read: Use) -> None:
    file_of(tmp_path).write_text("key: value\n" * 100)
    with pytest.raises(Unavailable, match=r"is not a SQLite database: set database\.path"):
        read(settings(tmp_path))


@writers
def test_a_read_only_database_says_so(tmp_path: Path, write: Use) -> None:
    asyncio.run(upgrade(settings(tmp_path)))
    make_read_only(file_of(tmp_path))
    with pytest.raises(Unavailable, match="is read-only: let this user write"):
        write(settings(tmp_path))


def test_a_full_disk_says_so_and_keeps_what_was_there(tmp_path: Path) -> None:
    async def fill(store: Store) -> None:
        await store.read("PRAGMA max_page_count = 1")  # no more than there are now
        for batch in range(100):
            await add(store, [a_record(f"{batch} {number}") for number in range(100)])

    asyncio.run(upgrade(settings(tmp_path)))
    with pytest.raises(Unavailable, match="no space is left"):
        serve(settings(tmp_path), fill)
    services_write(settings(tmp_path))
    people_write(settings(tmp_path))


@writers
def test_a_database_locked_by_another_process_says_so(tmp_path: Path, write: Use) -> None:
    asyncio.run(upgrade(settings(tmp_path)))
    with closing(sqlite3.connect(file_of(tmp_path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        people_read(settings(tmp_path))  # readers do not mind
        services_read(settings(tmp_path))
        with pytest.raises(Unavailable, match=r"is busy: .* database.timeout_seconds"):
            write(settings(tmp_path, timeout_seconds=0.01))


def test_too_many_at_once_are_told_to_wait(tmp_path: Path) -> None:
    async def hold_all(engine: AsyncEngine) -> None:
        async with engine.connect(), engine.connect():
            await people.list_users(engine)

    asyncio.run(upgrade(settings(tmp_path)))
    with pytest.raises(Unavailable, match=r"all connections .* are in use"):
        manage(settings(tmp_path, timeout_seconds=0.01), hold_all)


@readers
def test_a_folder_that_may_not_be_entered_says_so(tmp_path: Path, read: Use) -> None:
    """Root may enter every folder, so a link to itself stands for one."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ParallamaError, match="is not a folder"):
        read(settings(tmp_path / "loop"))


@writers
def test_errors_hold_no_values(tmp_path: Path, write: Use) -> None:
    asyncio.run(upgrade(settings(tmp_path)))
    with closing(sqlite3.connect(file_of(tmp_path))) as other, other:
        other.execute("DROP TABLE users")
        other.execute("DROP TABLE gateway_usage_logs")
    with pytest.raises(SchemaError, match="no such table") as raised:
        write(settings(tmp_path))
    assert "anna" not in f"{raised.value} {raised.value.__cause__}"


def test_what_was_committed_outlives_power_cuts(tmp_path: Path) -> None:
    async def pragmas(at: Opened) -> tuple[list[object], list[object]]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        services = [(await at.store.read(f"PRAGMA {name}"))[0][0] for name in names]
        async with at.engine.connect() as connection:
            asked = [await connection.exec_driver_sql(f"PRAGMA {name}") for name in names]
            return services, [each.scalar() for each in asked]

    assert on(tmp_path, pragmas) == (["wal", 2, 1], ["wal", 2, 1])


def set_revision(folder: Path, revision: str) -> None:
    asyncio.run(upgrade(settings(folder)))
    with closing(sqlite3.connect(file_of(folder))) as other, other:
        other.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def make_read_only(file: Path) -> None:
    """By SQLite's own mark, a write version from the future: file modes do not stop root."""
    with file.open("r+b") as database:
        database.seek(18)
        database.write(b"\x03")
