"""Finding the right server: the master that sentinels name, or a node of a cluster."""

import asyncio
from binascii import crc_hqx
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from parallama.resp import (
    Address,
    Connection,
    LoginRefused,
    Redis,
    RedisError,
    Refused,
    Unreachable,
    pairs,
)

T = TypeVar("T")

_SLOTS = 16384

# How often a connection that works is asked whether it still leads to the right server.
_LOOK_SECONDS = 0.5


def explain(error: BaseException, otherwise: str = "") -> str:
    """What went wrong, and where to look where the message alone does not tell."""
    if isinstance(error, LoginRefused):
        return f"{error} (redis.username, redis.password_file)"
    return str(error) or otherwise or type(error).__name__


def slot_of(key: str) -> int:
    """Of what stands in the first braces, where there is something."""
    raw = key.encode()
    tag = raw.partition(b"{")[2].partition(b"}")
    return crc_hqx(tag[0] if tag[0] and tag[1] else raw, 0) % _SLOTS


class Doors:
    """
    Servers that may be asked where others are.

    The one that answered last is asked first; the next as soon as one failed, or has said nothing
    for a while: so a dead machine among them costs a fraction of `timeout`.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        connect: Callable[[Address], Redis],
        *,
        timeout: float,
    ) -> None:
        self._addresses = list(addresses)
        self.connect = connect
        self._clients: dict[Address, Redis] = {}
        self._timeout = timeout

    async def ask(
        self,
        question: Callable[[Redis], Awaitable[T]],
        *,
        last: Address | None = None,
    ) -> tuple[T, Address]:
        """The first answer and who gave it. `last` is asked after all others."""
        order = sorted(self._addresses, key=lambda address: address == last)
        pause = self._timeout / (2 * len(order))
        asked: dict[asyncio.Task[T], Address] = {}
        failed: list[str] = []
        try:
            while order or asked:
                if order:
                    address = order.pop(0)
                    asked[asyncio.create_task(self._ask(question, address))] = address
                done, _ = await asyncio.wait(
                    asked,
                    timeout=pause if order else self._timeout,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done and not order:
                    failed += [f"{_named(at)}: no answer in time" for at in asked.values()]
                    break
                for task in done:
                    address = asked.pop(task)
                    error = task.exception()
                    if error is None:
                        self._prefer(address)
                        return task.result(), address
                    failed.append(f"{_named(address)}: {explain(error)}")
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise Unreachable("; ".join(failed))

    def _prefer(self, address: Address) -> None:
        self._addresses.sort(key=lambda other: other != address)

    async def replace(self, addresses: Iterable[Address]) -> None:
        """From now on these are asked, in the order in which the known ones stand."""
        wanted = dict.fromkeys(addresses)
        known = [address for address in self._addresses if address in wanted]
        self._addresses = list(dict.fromkeys([*known, *wanted]))
        for address in self._clients.keys() - wanted.keys():
            await self._clients.pop(address).aclose()

    def turn(self) -> None:
        """Ask another one first the next time."""
        self._addresses.append(self._addresses.pop(0))

    async def aclose(self) -> None:
        while self._clients:
            await self._clients.popitem()[1].aclose()

    async def _ask(self, question: Callable[[Redis], Awaitable[T]], address: Address) -> T:
        client = self._clients.get(address)
        if client is None:
            client = self._clients[address] = self.connect(address)
        return await question(client)


class Sentinels:
    """The master of one name, as sentinels know it."""

    def __init__(self, name: str, doors: Doors) -> None:
        self._name = name
        self._doors = doors

    async def find(self) -> Address:
        try:
            address, _ = await self._doors.ask(self._master)
        except Unreachable as error:
            raise Unreachable(f"no sentinel names the master ({error})") from None
        return address

    async def astray(self, at: Address) -> bool:
        return await self.find() != at

    async def check(self, connection: Connection) -> None:
        # Not ROLE: a user of an access list may say HELLO and nothing else.
        if pairs(await connection.run("HELLO")).get(b"role") != b"master":
            raise Unreachable("the sentinels name a server that is no master")

    async def aclose(self) -> None:
        await self._doors.aclose()

    async def _master(self, sentinel: Redis) -> Address:
        try:
            told = await sentinel.run("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name)
        except LoginRefused as error:
            raise RedisError(f"{error} (redis.sentinel_password_file)") from None
        if told is None:
            raise RedisError(f"knows no master {self._name} (redis.sentinel_master)")
        return told[0].decode(), int(told[1])


class Cluster:
    """The nodes of a cluster. `owners` has the master of each slot, as far as it was learnt."""

    def __init__(self, seeds: Sequence[Address], doors: Doors) -> None:
        self._seeds = seeds
        self._doors = doors
        self._turn = 0
        self._out: Address | None = None
        self._nodes: set[Address] = set()
        self.owners: list[Address | None] = [None] * _SLOTS

    async def look(self, *, last: Address | None = None) -> Address:
        """Learn the nodes and their slots anew. Returns who told."""
        ranges, teller = await self._doors.ask(_slots, last=last)
        owners: list[Address | None] = [None] * _SLOTS
        nodes = set()
        for first, end, *servers in ranges:
            named = [
                self.named((host or b"").decode(), port, by=teller) for host, port, *_ in servers
            ]
            owners[first : end + 1] = [named[0]] * (end + 1 - first)
            nodes |= set(named)
        self._nodes, self.owners = nodes, owners
        await self._doors.replace([*nodes, *self._seeds])
        return teller

    def connection(self, at: Address) -> Connection:
        """To one node, not yet made."""
        return self._doors.connect(at).new_connection()

    @staticmethod
    def named(host: str, port: int, *, by: Address) -> Address:
        """A server that `by` names. One that does not know its own name leaves it out."""
        return host or by[0], port

    async def look_again(self) -> None:
        """As `look`, from another node: what the last one told did not hold."""
        self._doors.turn()
        await self.look()

    async def find(self) -> Address:
        """Any node: what is published at one, all of them say."""
        self._doors.turn()  # who asks has lost a connection, or has none yet
        teller = await self.look(last=self._out)
        if teller in self._nodes:
            return teller
        self._turn += 1  # a seed may be another name of a node, or of all of them
        masters = sorted({owner for owner in self.owners if owner is not None})
        return masters[self._turn % len(masters)]

    async def astray(self, at: Address) -> bool:
        """A node that was taken out of the cluster would go on, and say nothing."""
        await self.look(last=at)
        if at in self._nodes:
            return False
        self._out = at  # it still believes that it belongs to them
        return True

    async def check(self, connection: Connection) -> None:
        """Any node is right."""

    async def aclose(self) -> None:
        await self._doors.aclose()


async def until_astray(connection: Connection) -> None:
    """Ends when `connection` works and should go elsewhere. While nobody can tell, it stays."""
    finder, at = connection.finder, connection.at
    if finder is None or isinstance(at, str):
        await asyncio.Event().wait()  # there is one server only
        return
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        with suppress(RedisError):
            if await finder.astray(at):
                return


async def _slots(node: Redis) -> list[list[Any]]:
    try:
        told: list[list[Any]] = await node.run("CLUSTER", "SLOTS")
    except Refused as error:
        raise RedisError(f"{error} (redis.mode)") from None
    if not told:
        raise RedisError("belongs to no cluster")
    return told


def _named(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
