"""Which questions the catalog asks, and which answers it believes."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from parallama.admin.catalog import catalog as under_test
from parallama.admin.catalog.aliases import Aliases
from parallama.admin.catalog.asking import Unanswered
from parallama.admin.catalog.catalog import MODELS, PS, TAGS, VERSION, Catalog, through
from parallama.admin.catalog.merging import Alias
from parallama.changes import Change
from parallama.db import Store
from parallama.db.manage import mappings
from parallama.errors import Unavailable
from tests.admin.servers import Behind, Raw, behind, http
from tests.parallama.db_on_disk import Opened, on

LIST = http(b'{"models":[{"name":"a"}]}')
DATA = http(b'{"data":[{"id":"a"}]}')
SAYS: dict[str, Raw] = {
    TAGS: LIST, PS: LIST, VERSION: http(b'{"version":"1"}'), MODELS: DATA, f"/ollama{MODELS}": DATA
}  # fmt: skip


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def tell(
    folder: Path,
    story: Callable[[Catalog, Behind, Clock], Awaitable[None]],
    *,
    gateways: tuple[str, ...] = ("ollama", "openai"),
    every: float = 300,
    **says: Raw,
) -> None:
    async def all_of_it() -> None:
        clock = Clock()
        async with behind(folder, **{**SAYS, **says}) as server:
            catalog = Catalog(through(server.path), gateways=gateways, every=every, clock=clock)
            await story(catalog, server, clock)

    asyncio.run(all_of_it())


@pytest.mark.parametrize(
    ("gateway", "path", "asked"),
    [
        ("ollama", TAGS, TAGS),
        ("ollama", PS, PS),
        ("ollama", VERSION, VERSION),
        ("ollama", MODELS, "/ollama/v1/models"),
        ("openai", MODELS, MODELS),
    ],
)
def test_each_list_is_asked_where_the_gateways_servers_are(
    tmp_path: Path, gateway: str, path: str, asked: str
) -> None:
    async def story(catalog: Catalog, server: Behind, _: Clock) -> None:
        look = await catalog.look(gateway, path)
        assert http(look.answer.body) == SAYS[asked]
        assert [(method, target) for method, target, *_ in server.asked] == [("GET", asked)]

    tell(tmp_path, story)


def test_of_a_gateway_that_is_not_served_there_is_no_list(tmp_path: Path) -> None:
    async def story(catalog: Catalog, _: Behind, __: Clock) -> None:
        for gateway, path in (("openai", MODELS), ("ollama", "/api/nothing")):
            with pytest.raises(LookupError):
                await catalog.look(gateway, path)

    tell(tmp_path, story, gateways=("ollama",))


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (http(b'{"error":"x"}', 500), "answers 500"),
        (http(b'{"error":"x"}', 404), "answers 404"),
        (http(b"<html>"), "not JSON"),
        (http(b'{"models":1}'), "no list"),
        (http(b'{"models":[]}', 206), "answers 206"),
        (http(b'{"models":["' + b"x" * (9 << 20) + b'"]}'), "larger than 8 MiB"),
    ],
    ids=["an error", "Ollama's 404", "HTML", "no list", "a part", "10 MB"],
)
def test_what_is_no_list_is_not_believed_and_the_last_one_is_shown(
    tmp_path: Path, says: bytes, why: str
) -> None:
    async def story(catalog: Catalog, server: Behind, clock: Clock) -> None:
        server.says[TAGS] = says
        with pytest.raises(Unanswered, match=why):
            await catalog.look("ollama", TAGS)
        clock.now += 1
        server.says[TAGS] = LIST
        assert (await catalog.look("ollama", TAGS)).fresh
        clock.now += 60
        server.says[TAGS] = says
        look = await catalog.look("ollama", TAGS)
        assert (look.answer.status, look.age, look.fresh) == (200, 60, False)

    tell(tmp_path, story)


@pytest.mark.parametrize(
    "says",
    [
        http(b"404 page not found", 404, "text/plain"),
        http(b'{"error":{"message":"File Not Found","code":404}}', 404),
        http(b"", 404),
    ],
)
@pytest.mark.parametrize("path", [TAGS, PS, VERSION])
def test_a_server_without_ollamas_api_is_said_to_have_none(
    tmp_path: Path, path: str, says: bytes
) -> None:
    async def story(catalog: Catalog, _: Behind, __: Clock) -> None:
        look = await catalog.look("ollama", path)
        assert look.answer.status == 404
        assert "has no Ollama API" in json.loads(look.answer.body)["error"]
        shown = await catalog.show("ollama", b'{"model":"a"}')
        assert shown.answer.body == look.answer.body

    tell(tmp_path, story, **{path: says, "/api/show": says})


# /api/show


def test_what_is_said_of_a_model_is_kept_by_question(tmp_path: Path) -> None:
    async def story(catalog: Catalog, server: Behind, clock: Clock) -> None:
        for body in (b'{"model":"a"}', b'{"model":"b"}', b'{"model":"a"}'):
            look = await catalog.show("ollama", body)
            assert (look.answer.body, look.fresh) == (b'{"license":"x"}', True)
        assert [body for *_, body in server.asked] == [b'{"model":"a"}', b'{"model":"b"}']
        clock.now += 60
        server.says["/api/show"] = http(b'{"error":"busy"}', 500)
        look = await catalog.show("ollama", b'{"model":"a"}')
        assert (look.answer.body, look.age, look.fresh) == (b'{"license":"x"}', 60, False)
        look = await catalog.show("ollama", b'{"model":"c"}')
        assert (look.answer.status, look.answer.body) == (500, b'{"error":"busy"}')

    tell(tmp_path, story, **{"/api/show": http(b'{"license":"x"}')})


def test_a_model_that_is_gone_is_gone_at_once_and_back_at_once(tmp_path: Path) -> None:
    async def story(catalog: Catalog, server: Behind, clock: Clock) -> None:
        await catalog.show("ollama", b"{}")
        clock.now += 1
        server.says["/api/show"] = gone = http(b'{"error":"model \'a\' not found"}', 404)
        assert http((await catalog.show("ollama", b"{}")).answer.body, 404) == gone
        server.says["/api/show"] = http(b'{"license":"x"}')
        assert (await catalog.show("ollama", b"{}")).answer.status == 200

    tell(tmp_path, story, **{"/api/show": http(b'{"license":"x"}')})


def test_what_is_kept_of_models_has_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "_ALL_SHOWN", 10_000)

    async def story(catalog: Catalog, server: Behind, _: Clock) -> None:
        for number in range(30):
            await catalog.show("ollama", b"%d" % number)
        asked = len(server.asked)
        await catalog.show("ollama", b"29")
        assert len(server.asked) == asked
        await catalog.show("ollama", b"0")
        assert len(server.asked) == asked + 1

    tell(tmp_path, story, **{"/api/show": http(b'"%s"' % (b"x" * 1000))})


def test_what_is_too_large_to_keep_is_passed_on(tmp_path: Path) -> None:
    whole = b'"%s"' % (b"x" * (2 << 20))

    async def story(catalog: Catalog, server: Behind, _: Clock) -> None:
        for _ in range(2):
            assert (await catalog.show("ollama", b"{}")).answer.body == whole
        assert len(server.asked) == 2

    tell(tmp_path, story, **{"/api/show": http(whole)})


# When


@pytest.mark.parametrize(("every", "asked"), [(300, 5), (0, 0)])
def test_the_lists_are_known_before_anybody_asks_unless_that_is_off(
    tmp_path: Path, every: float, asked: int
) -> None:
    async def story(catalog: Catalog, server: Behind, clock: Clock) -> None:
        rounds = Rounds(catalog)
        await rounds.go()
        assert len(server.asked) == asked
        clock.now += 299
        await rounds.go()
        assert len(server.asked) == asked
        clock.now += 1
        await rounds.go()
        assert len(server.asked) == 2 * asked

    tell(tmp_path, story, every=every)


def test_what_runs_is_asked_for_only_while_somebody_wants_to_know(tmp_path: Path) -> None:
    async def story(catalog: Catalog, server: Behind, clock: Clock) -> None:
        rounds = Rounds(catalog)
        await catalog.look("ollama", PS)
        for seconds, more in ((6, 1), (6, 1), (60, 0), (6, 0)):
            clock.now += seconds
            before = [target for _, target, *_ in server.asked].count(PS)
            await rounds.go()
            after = [target for _, target, *_ in server.asked].count(PS)
            assert after - before == more

    tell(tmp_path, story, every=0)


class Rounds:
    """What `run` does at each of its rounds, and its questions to their end."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def go(self) -> None:
        self._catalog.ask_what_is_due()
        asked = [each for each in asyncio.all_tasks() if each.get_name().startswith("ask ")]
        await asyncio.gather(*asked)


# What names mean


class Leaving:
    """A database that goes away when it is told to."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.away = False

    async def read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if self.away:
            raise Unavailable("gone")
        return await self._store.read(query, values)


def test_names_are_as_they_were_written_and_the_database_counts_first(tmp_path: Path) -> None:
    async def story(at: Opened) -> None:
        aliases = Aliases(at.store, {"openai": {"GPT-4": "llama3", "x": "y"}, "ollama": {"o": "p"}})
        written = (Alias("GPT-4", "llama3"), Alias("x", "y"))
        assert await aliases.of("openai") == written
        desk = at.desk()
        await mappings.set_mapping(desk, "openai", "gpt-4:latest", "qwen3")
        assert await aliases.of("openai") == written
        for change in (Change("key", "k"), Change("limits")):
            aliases.on_change(change)
        assert await aliases.of("openai") == written
        aliases.on_change(Change("mappings"))
        assert await aliases.of("openai") == (Alias("gpt-4:latest", "qwen3"), Alias("x", "y"))
        assert await aliases.of("ollama") == (Alias("o", "p"),)
        assert await aliases.of("other") == ()

    on(tmp_path, story)


def test_without_the_signal_the_database_is_asked_and_without_the_database_what_it_said_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(at: Opened) -> None:
        store = Leaving(at.store)
        aliases = Aliases(store, {})
        assert await aliases.of("openai") == ()
        aliases.pause()
        made = await mappings.set_mapping(at.desk(), "openai", "a", "b")
        assert await aliases.of("openai") == (Alias("a", "b"),)
        await mappings.unset_mapping(at.desk(), made.id)
        assert await aliases.of("openai") == ()
        made = await mappings.set_mapping(at.desk(), "openai", "a", "b")
        aliases.resume()
        assert await aliases.of("openai") == (Alias("a", "b"),)
        aliases.on_change(Change("everything"))
        store.away = True
        for _ in range(2):
            assert await aliases.of("openai") == (Alias("a", "b"),)

    on(tmp_path, story)
    assert [record.message for record in caplog.records] == ["mappings not read"]


def test_a_question_that_nobody_can_be_asked_is_no_answer(tmp_path: Path) -> None:
    async def story() -> None:
        catalog = Catalog(
            through(str(tmp_path / "none")), gateways=["ollama"], every=0, clock=Clock()
        )
        with pytest.raises(Unanswered):
            await catalog.look("ollama", TAGS)
        assert catalog.sources("ollama")[TAGS].state().answer is None

    asyncio.run(story())
