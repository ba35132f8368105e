"""PostgreSQL: migrations, and what happens when the server is not as one would wish."""

import asyncio
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Thread

import psycopg
import pytest
import uvloop

from parallama.config import Database
from parallama.db import Store, ledger, revisions
from parallama.db.manage import people, usage
from parallama.db.manage.schema import managed, upgrade
from parallama.db.months import LIST
from parallama.db.postgres import Connections
from parallama.db.store import open_store
from parallama.errors import SchemaError, Unavailable
from parallama.roles import Role
from tests.containers import stores
from tests.parallama.db_on_disk import Opened, a_record, on
from tests.parallama.test_db_schema import (
    Use,
    people_read,
    people_write,
    readers,
    serve,
    services_read,
    services_write,
    writers,
)
from tests.postgres import PASSWORD, USER, Postgres


def upgrades(at: Database) -> None:
    asyncio.run(upgrade(at))


everybody = pytest.mark.parametrize("use", [people_read, services_read, upgrades])


def refusal(use: Use, at: Database) -> str:
    """What is said, after a look for what must not be."""
    with pytest.raises(Unavailable) as raised:
        use(at)
    error: BaseException | None = raised.value
    while error is not None:
        assert PASSWORD not in str(error)
        error = error.__cause__
    return str(raised.value)


@pytest.fixture
def at(postgres: Postgres) -> Iterator[Database]:
    made = postgres.migrated()
    yield made
    postgres.drop(made)


@pytest.fixture(scope="module", params=stores.places("postgres"))
def own(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """One that may be killed."""
    server = stores.postgres(request.param)
    yield server
    server.remove()


# Migrations


def test_upgrade_says_what_it_did_and_is_harmless_when_repeated(postgres: Postgres) -> None:
    empty = postgres.empty()
    assert asyncio.run(upgrade(empty)) == (None, revisions.HEAD)
    assert asyncio.run(upgrade(empty)) == (revisions.HEAD, revisions.HEAD)
    services_read(empty)


def test_upgrades_at_once_all_succeed(postgres: Postgres) -> None:
    empty = postgres.empty()

    async def at_once() -> list[tuple[str | None, str]]:
        return await asyncio.gather(*(upgrade(empty) for _ in range(4)))

    before = [before for before, _ in asyncio.run(at_once())]
    assert sorted(before, key=str) == [revisions.HEAD] * 3 + [None]


def test_a_failed_upgrade_leaves_nothing_behind(postgres: Postgres) -> None:
    empty = postgres.empty()
    tables = "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relowner > 16000"
    postgres.run("CREATE TABLE limit_grants (x int)", database=str(empty.name))
    there = postgres.run(tables, database=str(empty.name))
    assert "limit_grants" in refusal(upgrades, empty)
    assert postgres.run(tables, database=str(empty.name)) == there


def test_this_month_and_the_next_are_made_at_upgrade(at: Database) -> None:
    async def work(store: Store) -> None:
        partitions = {name for (name,) in await store.read(LIST)}
        assert {"gateway_usage_logs_before_2020", "gateway_usage_logs_from_2100"} < partitions
        assert len(partitions) == 4
        ((now,),) = await store.read("SELECT now()")
        assert f"gateway_usage_logs_{now:%Y_%m}" in partitions

    serve(at, work)


@readers
def test_a_database_without_tables_names_the_command(postgres: Postgres, read: Use) -> None:
    with pytest.raises(SchemaError, match=r"at 127.0.0.1:\d+ has no tables yet: run `parallama"):
        read(postgres.empty())


@everybody
def test_a_database_of_a_newer_version_is_left_alone(
    postgres: Postgres, at: Database, use: Use
) -> None:
    postgres.run("UPDATE alembic_version SET version_num = '9999'", database=str(at.name))
    with pytest.raises(SchemaError, match="made by a newer one"):
        use(at)


# Ways not to get a connection


@everybody
def test_a_server_that_is_away_is_named(postgres: Postgres, use: Use) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    told = refusal(use, postgres.settings("parallama", port=port))
    assert f"parallama at 127.0.0.1:{port} does not answer: is the server running" in told


@everybody
def test_a_server_that_takes_calls_and_says_nothing_is_not_waited_for(
    postgres: Postgres, use: Use
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf_at = postgres.settings("x", port=deaf.getsockname()[1], timeout_seconds=0.2)
        began = time.monotonic()
        assert "did not take the connection within database.timeout" in refusal(use, deaf_at)
        assert time.monotonic() - began < 2


@everybody
def test_a_wrong_password_says_so(postgres: Postgres, tmp_path: Path, use: Use) -> None:
    wrong = tmp_path / "password"
    wrong.write_text("another made-up password")
    wrong.chmod(0o600)
    told = refusal(use, postgres.settings("migrated", password_file=str(wrong)))
    assert "refused the user or the password: check database.user" in told
    assert "another" not in told


@everybody
def test_a_missing_database_says_so(postgres: Postgres, use: Use) -> None:
    told = refusal(use, postgres.settings("nowhere"))
    assert told.startswith("there is no database nowhere at 127.0.0.1")
    assert "create it" in told


@everybody
def test_an_unknown_host_says_so(postgres: Postgres, use: Use) -> None:
    at = postgres.settings("x", host="nowhere.invalid")
    assert "x at nowhere.invalid" in refusal(use, at)


@everybody
def test_a_server_without_room_says_so(postgres: Postgres, at: Database, use: Use) -> None:
    postgres.run(f"ALTER DATABASE {at.name} CONNECTION LIMIT 0")
    assert "no connection left: raise its max_connections" in refusal(use, at)


@everybody
def test_tls_that_the_server_lacks_is_named(postgres: Postgres, use: Use) -> None:
    at = postgres.settings("migrated", ssl_mode="require")
    assert "check database.ssl_mode" in refusal(use, at)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_tls_is_checked_as_far_as_was_asked(
    postgres: Postgres, at: Database, tmp_path: Path
) -> None:
    ours, others = (certificate(tmp_path, name) for name in ("ours", "others"))

    def by(port: int, mode: str, trusted: Path) -> Database:
        return postgres.settings(
            str(at.name), port=port, ssl_mode=mode, ssl_root_cert_file=str(trusted)
        )

    with speaking_tls(postgres.port, *ours) as port:
        people_write(by(port, "verify-full", ours[0]))
        services_write(by(port, "verify-full", ours[0]))
        told = refusal(services_read, by(port, "verify-full", others[0]))
        assert "no TLS with the database" in told
        assert "certificate verify failed" in told


@contextmanager
def speaking_tls(behind: int, certificate: Path, key: Path) -> Iterator[int]:
    """The server of the wheel is built without TLS, so this stands before it. Its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(1 << 16):
                writer.write(data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readexactly(8)
        assert asked[4:] == (80877103).to_bytes(4, "big")  # is there TLS?
        writer.write(b"S")
        with closing(writer), suppress(OSError):
            await writer.start_tls(context)
            there, back = await asyncio.open_connection("127.0.0.1", behind)
            await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """For 127.0.0.1, signed by itself, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext"),
            *("subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return certificate, key


def test_callers_wait_for_a_connection_within_bounds(at: Database) -> None:
    few = at.model_copy(update={"pool_size": 2, "timeout_seconds": 0.05})

    async def work() -> None:
        connections = Connections(few, "here")
        async with connections.one(), connections.one():
            with pytest.raises(
                Unavailable, match=r"all connections .* here .* database\.pool_size"
            ):
                async with connections.one():
                    pass
        async with connections.one():
            pass
        await connections.close()

    asyncio.run(work())


def test_many_callers_share_a_few_connections(at: Database) -> None:
    async def work(store: Store) -> None:
        answers = await asyncio.gather(*(store.read("SELECT ?::int", (n,)) for n in range(100)))
        assert [row[0][0] for row in answers] == list(range(100))
        ((used,),) = await store.read(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = ?", (at.name,)
        )
        assert used <= at.pool_size

    serve(at, work)


# Ways to fail with one


@writers
def test_a_read_only_server_says_so(postgres: Postgres, at: Database, write: Use) -> None:
    postgres.run(f"ALTER DATABASE {at.name} SET default_transaction_read_only = on")
    assert "is read-only: set database.host to the primary" in refusal(write, at)


@writers
def test_a_full_disk_says_so(postgres: Postgres, at: Database, write: Use) -> None:
    """A trigger says it in place of the disk: with its very code."""
    postgres.run(
        """
        CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$
        """,
        *(
            f"CREATE TRIGGER full_disk BEFORE INSERT ON {table} EXECUTE FUNCTION full_disk()"
            for table in ("users", "gateway_usage_logs")
        ),
        database=str(at.name),
    )
    assert "no space is left for the database" in refusal(write, at)


@writers
def test_a_lock_is_not_waited_for_without_end(postgres: Postgres, at: Database, write: Use) -> None:
    hurried = at.model_copy(update={"timeout_seconds": 0.3})
    with closing(psycopg.connect(dsn(postgres, at))) as other:
        other.execute("LOCK TABLE users, gateway_usage_logs IN EXCLUSIVE MODE")
        people_read(hurried)  # readers do not mind
        services_read(hurried)
        told = refusal(write, hurried)
    assert "busy: another process" in told or "did not answer in time" in told


def dsn(postgres: Postgres, at: Database) -> str:
    return f"host=127.0.0.1 port={postgres.port} dbname={at.name} user={USER} password='{PASSWORD}'"


def test_a_question_that_takes_too_long_is_given_up(at: Database) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(Unavailable, match="did not answer in time"):
            await store.read("SELECT pg_sleep(60)")
        assert await store.read("SELECT 1") == [(1,)]

    serve(at.model_copy(update={"timeout_seconds": 0.2}), work)


@writers
def test_a_user_without_rights_is_told_which(postgres: Postgres, at: Database, write: Use) -> None:
    postgres.run(
        "ALTER TABLE users OWNER TO postgres",
        "ALTER TABLE gateway_usage_logs OWNER TO postgres",
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO parallama",
        database=str(at.name),
    )
    assert "does not let this user do that (permission denied" in refusal(write, at)


@writers
def test_errors_hold_no_values(postgres: Postgres, at: Database, write: Use) -> None:
    postgres.run("DROP TABLE users, gateway_usage_logs CASCADE", database=str(at.name))
    with pytest.raises(SchemaError, match=r"does not exist\): run `parallama db") as raised:
        write(at)
    assert "anna" not in f"{raised.value} {raised.value.__cause__}"


def test_text_that_is_no_id_is_nobodys(at: Database) -> None:
    async def work(store: Store) -> None:
        assert await store.read("SELECT 1 FROM users WHERE id = ?", ("user-1",)) == []
        assert await store.read("SELECT 1") == [(1,)]

    serve(at, work)


# A server that comes and goes


def test_what_is_served_goes_on_after_the_server_was_restarted(own: Postgres) -> None:
    async def work(at: Opened) -> None:
        await people.create_user(at.desk(), "anna", Role.USER)
        assert len(await at.store.read("SELECT id FROM users")) == 1
        own.stop()
        with pytest.raises(Unavailable, match="does not answer"):
            await at.store.read("SELECT id FROM users")
        with pytest.raises(Unavailable, match="does not answer"):
            await people.list_users(at.engine)
        own.start()
        assert len(await at.store.read("SELECT id FROM users")) == 1
        assert len(await people.list_users(at.engine)) == 1

    on(own.migrated(), work)


def test_a_connection_that_was_cut_meanwhile_is_replaced(own: Postgres) -> None:
    async def work(at: Opened) -> None:
        await at.store.read("SELECT 1")
        own.run(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE usename = 'parallama'"
        )
        assert await at.store.read("SELECT 1") == [(1,)]

    on(own.migrated(), work)


def test_a_server_that_hangs_is_not_waited_for(own: Postgres) -> None:
    async def work(store: Store) -> None:
        await store.read("SELECT 1")
        own.pause(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(Unavailable, match="went away, or did not answer in time"):
                await store.read("SELECT 1")
            assert time.monotonic() - began < 3
        finally:
            own.pause(signal.SIGCONT)
        assert await store.read("SELECT 1") == [(1,)]

    serve(own.migrated(timeout_seconds=0.2), work)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_server_killed_while_rows_come_loses_none_and_doubles_none(
    own: Postgres, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    at = own.migrated()
    batches = [[a_record(f"r{batch} {n}") for n in range(25)] for batch in range(120)]
    kill_after = {15, 40, 41, 90}
    failures = count()

    async def put(
        store: Store, todo: Iterator[list[ledger.UsageRecord]], done: Iterator[int]
    ) -> None:
        for batch in todo:
            while True:
                try:
                    await ledger.add(store, batch)
                    break
                except Unavailable:
                    next(failures)
                    await asyncio.sleep(0.01)
            if next(done) in kill_after:
                own.kill()
                own.start()

    async def work() -> None:
        store = open_store(at)
        todo, done = iter(batches), count()
        await asyncio.gather(*(put(store, todo, done) for _ in range(4)))
        await store.close()
        async with managed(at) as engine:
            assert await usage.count(engine) == 120 * 25
            found = {row.request_id async for row in usage.rows(engine, usage.Which())}
            assert len(found) == 120 * 25

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work())
    assert next(failures) > 0


def test_a_caller_who_gives_up_leaves_the_connection_usable(at: Database) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await store.read("SELECT pg_sleep(60)")
        assert await store.read("SELECT 1") == [(1,)]

    serve(at.model_copy(update={"pool_size": 1}), work)
