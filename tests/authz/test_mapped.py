"""What names mean: remembered, forgotten by change signals, kept while the database is away."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from envoy.service.auth.v3 import external_auth_pb2 as pb

from authz import wire
from authz.keyring import Keyring
from authz.mapped import Mapped
from authz.service import Authz
from parallama import contract as c
from parallama.changes import Change
from parallama.db.accounts import KeyRecord
from parallama.errors import Unavailable
from parallama.mappings import MOST
from parallama.roles import Role
from parallama.shapes import EVERY
from tests.authz.make import NOW, WRONG, a_check, a_key, no_signatures, no_tokens


class Base:
    """A database of mappings."""

    def __init__(self) -> None:
        self.holds: dict[str, dict[str, str]] = {}
        self.away = False
        self.asked = 0

    async def __call__(self) -> Mapping[str, dict[str, str]]:
        self.asked += 1
        if self.away:
            raise Unavailable("no answer")
        return self.holds


CONFIGURED = {"openai": {"gpt-4": "a"}, "ollama": {}}


def told(
    story: Callable[["Scene"], Awaitable[None]], *, shapes: Mapping[str, str] | None = None
) -> None:
    async def inside() -> None:
        await story(Scene(shapes or {}))

    asyncio.run(inside())


class Scene:
    """The service, with one key."""

    def __init__(self, shapes: Mapping[str, str]) -> None:
        self.base = Base()
        self.mapped = Mapped(self.base, configured=CONFIGURED, defaults={"ollama": "usual"})
        self.key = a_key(role=Role.ADMIN)
        self._service = Authz(
            Keyring(self._find, no_tokens(), size=10),
            no_signatures(),
            self.mapped,
            gateways=("ollama", "openai"),
            shapes=shapes,
            clock=lambda: NOW,
        )

    async def _find(self, public_id: str) -> KeyRecord | None:
        return self.key

    async def answer(self, check: pb.CheckRequest) -> pb.CheckResponse:
        said = self._service.check(check.SerializeToString())
        return pb.CheckResponse.FromString(said if isinstance(said, bytes) else await said)

    async def metadata(
        self, path: str = "/v1/chat/completions", gateway: str = "openai", method: str = "POST"
    ) -> dict[str, object]:
        route = {c.ROUTE_GATEWAY: gateway, c.ROUTE_DIALECT: gateway, c.ROUTE_BASE: ""}
        answer = await self.answer(a_check(path=path, route=route, method=method))
        assert answer.status.code == 0
        return dict(answer.dynamic_metadata)


def test_what_infers_and_what_shows_is_told_the_table_of_its_gateway() -> None:
    async def story(scene: Scene) -> None:
        scene.base.holds = {"ollama": {"B": "b"}, "openai": {"GPT-4:latest": "z"}}
        assert (await scene.metadata())[c.ALIASES] == "\ngpt-4\tz\n"
        for path in ("/api/chat", "/api/embed", "/api/show"):
            assert (await scene.metadata(path, "ollama"))[c.ALIASES] == "\n\tusual\nb\tb\n"
        for path in ("/api/pull", "/api/push", "/api/create", "/api/copy"):
            assert c.ALIASES not in await scene.metadata(path, "ollama")
        for path in ("/api/tags", "/api/version"):
            assert c.ALIASES not in await scene.metadata(path, "ollama", "GET")
        assert scene.base.asked == 1

    told(story)


def test_all_else_is_told_as_without_a_table() -> None:
    async def story(scene: Scene) -> None:
        with_one = await scene.metadata()
        assert with_one.pop(c.ALIASES)
        scene.mapped = Mapped(scene.base)
        scene._service._mapped = scene.mapped
        assert await scene.metadata() == with_one

    told(story)


def test_a_change_is_followed_and_another_is_not_asked_for() -> None:
    async def story(scene: Scene) -> None:
        await scene.metadata()
        scene.base.holds = {"openai": {"gpt-4": "z"}}
        scene.mapped.on_change(Change("limits", "user-1"))
        scene.mapped.on_change(Change("key", "key-1"))
        assert (await scene.metadata())[c.ALIASES] == "\ngpt-4\ta\n"
        for change in (Change("mappings"), Change("everything")):
            scene.base.asked = 0
            scene.mapped.on_change(change)
            assert (await scene.metadata())[c.ALIASES] == "\ngpt-4\tz\n"
            assert scene.base.asked == 1

    told(story)


def test_without_the_change_signal_the_database_is_asked_each_time() -> None:
    async def story(scene: Scene) -> None:
        scene.mapped.pause()
        for model in ("x", "y"):
            scene.base.holds = {"openai": {"gpt-4": model}}
            assert (await scene.metadata())[c.ALIASES] == f"\ngpt-4\t{model}\n"
        scene.mapped.resume()
        await scene.metadata()
        scene.base.holds = {}
        assert (await scene.metadata())[c.ALIASES] == "\ngpt-4\ty\n"

    told(story)


def test_what_is_known_holds_while_the_database_is_away() -> None:
    async def story(scene: Scene) -> None:
        await scene.metadata("/api/tags", "ollama", "GET")  # no table is told, and one is known
        scene.base.away = True
        assert (await scene.metadata())[c.ALIASES] == "\ngpt-4\ta\n"
        scene.mapped.on_change(Change("mappings"))
        refused = await scene.answer(a_check())
        assert refused.denied_response.status.code == 503
        scene.base.away = False
        assert (await scene.metadata())[c.ALIASES] == "\ngpt-4\ta\n"

    told(story)


def test_an_unknown_key_is_no_reason_to_ask() -> None:
    async def story(scene: Scene) -> None:
        headers = {"authorization": "Bearer plm_nonsense"}
        for given in (headers, {"authorization": f"Bearer {WRONG}"}):
            refused = await scene.answer(a_check(headers=given))
            assert refused.denied_response.status.code == 401
        assert scene.base.asked == 0

    told(story)


def test_the_shape_of_a_role() -> None:
    shapes = {EVERY: "\nnum_ctx max=9", "admin": ""}

    async def story(scene: Scene) -> None:
        assert c.SHAPE not in await scene.metadata()
        scene.key = a_key(role=Role.USER)
        scene._service._keyring.forget_all()
        for path, gateway in (("/v1/completions", "openai"), ("/api/embed", "ollama")):
            assert (await scene.metadata(path, gateway))[c.SHAPE] == "\nnum_ctx max=9"
        shown = await scene.metadata("/api/show", "ollama")
        assert c.SHAPE not in shown
        assert set(shown) <= c.AUTHZ_KEYS

    told(story, shapes=shapes)


def test_one_table_is_written_once_for_all_keys() -> None:
    table = "".join(f"\n{n:0256}\t{n:0256}" for n in range(MOST)) + "\n"
    assert wire.render_edits(table, "") is wire.render_edits(table, "")
    assert len(wire.render_edits(table, "")) > 100_000


def test_a_known_key_is_answered_at_once() -> None:
    async def story(scene: Scene) -> None:
        await scene.metadata()
        assert isinstance(scene._service.check(a_check().SerializeToString()), bytes)

    told(story)
